//! Life: kills, restarts, many LUs, nothing left behind.

use super::rig::Rig;
use super::shell::{Failure, pause, run, sh, sh_in, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "life_target_killed_under_load_healthy", || {
        killed(false)
    });
    add(to, "life_target_killed_under_load_degraded", || {
        killed(true)
    });
    add(
        to,
        "life_mgmtd_goes_and_comes_and_io_goes_on",
        mgmtd_restarts,
    );
    add(to, "life_new_boot_other_order", new_boot);
    add(to, "life_mounted_lu_is_not_deleted", mounted);
    add(
        to,
        "life_thirty_lus_after_sixty_creates_and_deletes",
        many_lus,
    );
    add(to, "life_create_delete_cycles_leave_nothing", cycles);
}

/// Given a mounted LU under verified load, when ublk-target is killed ten times, then no request fails and
/// everything reads as written.
fn killed(degraded: bool) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = rig.array(
        "ram",
        4,
        256,
        &["--level", "raid5", "--chunk", "64KiB", "--assume-clean"],
    )?;
    if degraded {
        rig.lunar(&["disk", "fail", &paths[2], "--yes"])?;
    }
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/l && mount {device} /mnt/l"
    ))?;
    let load = std::thread::spawn(|| {
        sh_in(
            "fio --name=k --directory=/mnt/l --size=96m --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
             --bsrange=512-128k --blockalign=512 --verify=crc32c --verify_fatal=1 --time_based --runtime=25 \
             --verify_backlog=256 >/tmp/fio.out 2>&1 || { cat /tmp/fio.out; exit 1; }",
            300,
        )
    });
    for _ in 0..10 {
        pause(1500);
        let pid = rig.target_pid()?;
        sh(&format!("kill -KILL {pid}"))?;
        until("a successor", 60, || {
            Ok(rig.target_pid().is_ok_and(|new| new != pid))
        })?;
        until("the LU is up", 60, || {
            Ok(rig.run(&["lu", "show", "vol"])?.code == 0)
        })?;
    }
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    sh_in(&format!("umount /mnt/l && e2fsck -fn {device}"), 100)?;
    let start = std::time::Instant::now();
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    ensure(start.elapsed().as_secs() < 10, || {
        "lu delete took too long".into()
    })
}

/// Given a LU under load, when mgmtd gets SIGTERM and starts again, then ublk-target is the same process, and no
/// request fails.
fn mgmtd_restarts() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 3, 256, &["--level", "raid5", "--assume-clean"])?;
    let device = rig.device()?;
    let pid = rig.target_pid()?;
    for signal in ["TERM", "KILL"] {
        rig.end_mgmtd(signal)?;
        sh_in(
            &format!("dd if=/dev/urandom of={device} bs=64k count=200 oflag=direct 2>/dev/null"),
            30,
        )?;
        rig.start()?;
        ensure(rig.target_pid()? == pid, || {
            "ublk-target was replaced".into()
        })?;
        until("the LU is there", 30, || {
            Ok(rig.run(&["lu", "show", "vol"])?.code == 0)
        })?;
    }
    Ok(())
}

/// Given a group with data, when everything is shut down, the disks change their names, and mgmtd starts, then
/// the group, the LU, its name and its bytes are there.
fn new_boot() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("dm", 4, 256, &["--level", "raid5", "--assume-clean"])?;
    let device = rig.device()?;
    sh(&format!(
        "dd if=/dev/urandom of=/tmp/content bs=1M count=32 2>/dev/null; dd if=/tmp/content of={device} bs=1M oflag=direct 2>/dev/null"
    ))?;
    rig.shutdown()?;
    sh("for i in 0 1 2 3; do dmsetup remove member$i; done
        for i in 0 1 2 3; do dmsetup create member$i --table \"0 $(blockdev --getsz /dev/ram$(( (i + 1) % 4 ))) linear /dev/ram$(( (i + 1) % 4 )) 0\"; done")?;
    rig.start()?;
    until("the LU is up", 60, || {
        Ok(run("test", &["-b", "/dev/lunar/vol"], 5)?.code == 0)
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    sh("cmp -n $((32 << 20)) /tmp/content /dev/lunar/vol")?;
    let (state, _) = rig.state()?;
    ensure(state == "optimal", || format!("state is {state}"))
}

/// Given a mounted LU, when it is deleted, or its group stopped, then exit 7 names the holder and all goes on.
fn mounted() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &["--level", "raid5", "--assume-clean"])?;
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/l && mount {device} /mnt/l && cp -a /etc /mnt/l/"
    ))?;
    for verb in [
        ["lu", "delete", "vol", "--yes"],
        ["group", "delete", "data", "--yes"],
    ] {
        let output = rig.run(&verb)?;
        ensure(output.code == 7, || {
            format!("{verb:?} exited {}: {}", output.code, output.stderr)
        })?;
        ensure(output.stderr.contains("/mnt/l"), || {
            format!("no holder named: {}", output.stderr)
        })?;
    }
    sh_in(
        &format!("diff -r --no-dereference /etc /mnt/l/etc; umount /mnt/l; e2fsck -fn {device}"),
        60,
    )?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    Ok(())
}

/// Given a group, when 60 LUs of mixed sizes were made and deleted, then 30 fit, all work, and one owner thread
/// serves them.
fn many_lus() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 4, 256, &["--level", "raid5", "--assume-clean"])?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    let free = rig.json(&["group", "show", "data"])?["free"]
        .as_u64()
        .ok_or("no free")?;
    for i in 0..60 {
        let size = format!("{}MiB", 3 + (i * 7) % 40);
        rig.lunar(&[
            "lu",
            "create",
            &format!("x{i}"),
            "--group",
            "data",
            "--size",
            &size,
        ])?;
        if i % 3 != 0 {
            rig.lunar(&["lu", "delete", &format!("x{i}"), "--yes"])?;
        } else if i >= 3 {
            rig.lunar(&["lu", "delete", &format!("x{}", i - 3), "--yes"])?;
        }
    }
    rig.lunar(&["lu", "delete", "x57", "--yes"])?;
    let now = rig.json(&["group", "show", "data"])?["free"]
        .as_u64()
        .ok_or("no free")?;
    ensure(now == free, || format!("{free} bytes were free, now {now}"))?;
    for i in 0..30 {
        rig.lunar(&[
            "lu",
            "create",
            &format!("y{i}"),
            "--group",
            "data",
            "--size",
            "16MiB",
        ])?;
    }
    sh_in(
        "for i in $(seq 0 29); do head -c 4M /dev/urandom > /tmp/y$i; dd if=/tmp/y$i of=/dev/lunar/y$i bs=1M oflag=direct 2>/dev/null & done; wait
         for i in $(seq 0 29); do cmp -n $((4 << 20)) /tmp/y$i /dev/lunar/y$i; done",
        120,
    )?;
    let pid = rig.target_pid()?;
    let owners = sh(&format!("cat /proc/{pid}/task/*/comm | grep -c ^g-"))?;
    ensure(owners == "1", || format!("{owners} owner threads"))
}

/// Given an idle group, when 100 LUs are made and deleted, then devices, descriptors, threads and locked memory
/// are as before.
fn cycles() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &["--level", "raid5", "--assume-clean"])?;
    let pid = rig.target_pid()?;
    let cycle = |rig: &Rig| -> Result<(), Failure> {
        rig.lunar(&["lu", "delete", "vol", "--yes"])?;
        rig.lunar(&["lu", "create", "vol", "--group", "data", "--size", "32MiB"])?;
        Ok(())
    };
    for _ in 0..3 {
        cycle(&rig)?;
    }
    let count = || {
        sh(&format!(
            "echo $(ls /sys/class/ublk-char | wc -l) $(ls /proc/{pid}/fd | wc -l) $(ls /proc/{pid}/task | grep -c .) $(awk '/VmLck/ {{print int($2 / 1024)}}' /proc/{pid}/status)"
        ))
    };
    let before = count()?;
    for _ in 0..100 {
        cycle(&rig)?;
    }
    let after = count()?;
    ensure(before == after, || {
        format!("devices, descriptors, threads, locked MiB: {before} -> {after}")
    })
}
