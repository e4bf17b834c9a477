//! Life: kills, restarts, many LUs, nothing left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::blocks::{self, Area, judge, start_writers};
use super::disks::{self, identity, redundancy_is_right};
use super::rig::Rig;
use super::shell::{Failure, pause, sh, sh_in, until};
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
        "life_late_writes_of_a_killed_target_end_before_its_successor_begins",
        late_writes,
    );
    add(
        to,
        "life_target_killed_while_a_disk_hangs_comes_back",
        killed_with_hung_disk,
    );
    add(
        to,
        "life_mgmtd_goes_and_comes_and_io_goes_on",
        mgmtd_restarts,
    );
    add(to, "life_new_boot_other_order", new_boot);
    add(
        to,
        "life_new_boot_with_a_disk_that_hangs",
        boot_with_hung_disk,
    );
    add(to, "life_mounted_lu_is_not_deleted", mounted);
    add(
        to,
        "life_thirty_lus_after_sixty_creates_and_deletes",
        many_lus,
    );
    add(to, "life_create_delete_cycles_leave_nothing", || cycles(40));
    add(to, "long_life_create_delete_cycles", || cycles(200));
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

/// Given a mounted LU under verified load, when a disk hangs and ublk-target is killed, then `status` says who holds the
/// disks; when the disk answers again, then the LU comes back by itself, no request failed, and everything reads as
/// written.
fn killed_with_hung_disk() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let create = ["--level", "raid5", "--chunk", "64KiB", "--assume-clean"];
    rig.array("dm", 4, 256, &create)?;
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/l && mount {device} /mnt/l"
    ))?;
    let load = std::thread::spawn(|| {
        sh_in(
            "fio --name=k --directory=/mnt/l --size=64m --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
             --bsrange=512-128k --blockalign=512 --verify=crc32c --verify_fatal=1 --io_size=256m --rate=20m \
             >/tmp/fio.out 2>&1 || { cat /tmp/fio.out; exit 1; }",
            300,
        )
    });
    pause(3000);
    let pid = rig.target_pid()?;
    sh(&format!("dm_hang member1; sleep 0.2; kill -KILL {pid}"))?;
    // The kernel lets go of a dead ring's files all at once, so that this one disk holds all.
    let said = until("the status says that the disks are held", 90, || {
        let output = rig.run(&["status"])?;
        Ok(output.code == 4 && output.stdout.contains("held by I/O of a process that died"))
    });
    sh("dm_heal member1")?;
    let served = said.and_then(|()| {
        until("the LU is served again", 60, || {
            Ok(rig.state().is_ok_and(|(state, _)| state == "optimal"))
        })
    });
    served.map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    load.join().map_err(|_| "thread")??;
    sh_in(&format!("umount /mnt/l && e2fsck -fn {device}"), 100)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    Ok(())
}

/// Fills the first 32 MiB of the LU from `/tmp/content`.
fn write_content(rig: &Rig) -> Result<(), Failure> {
    let device = rig.device()?;
    sh(&format!(
        "dd if=/dev/urandom of=/tmp/content bs=1M count=32 2>/dev/null; dd if=/tmp/content of={device} bs=1M oflag=direct 2>/dev/null"
    ))?;
    Ok(())
}

/// Waits for the LU's device.
/// Given a group with data that was shut down, when one of its disks hangs at the start, then the group and its LU come
/// up without it, and every byte is there.
fn boot_with_hung_disk() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("dm", 4, 256, &["--level", "raid5", "--assume-clean"])?;
    write_content(&rig)?;
    rig.shutdown()?;
    sh("dm_hang member1")?;
    let result = rig.start().and_then(|()| rig.wait_lu());
    let result = result.and_then(|()| {
        sh("cmp -n $((32 << 20)) /tmp/content /dev/lunar/vol")?;
        let (state, _) = rig.state()?;
        ensure(state == "degraded", || format!("state is {state}"))
    });
    sh("dm_heal member1")?;
    result.map_err(|why| format!("{why}\n{}", rig.log_tail()))
}

/// Given a mounted LU under writes of our own and a member whose writes take 4 s, when ublk-target is killed, then its
/// successor has that member for data only after every write of the dead process has landed; in the end each sector
/// holds the newest of its writes, the members' parity is right, and after the umount the LU can be deleted.
fn late_writes() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let create = ["--level", "raid5", "--chunk", "64KiB", "--assume-clean"];
    // Above the slow device one that counts: dm-delay hides from the kernel's counters what it keeps waiting.
    let paths = sh("member_make dm 0 256; dm_wrap slow1 /dev/ram1 >/dev/null; dm_wrap member1 /dev/mapper/slow1
         member_make dm 2 256; member_make dm 3 256")?;
    let paths: Vec<String> = paths.lines().map(str::to_owned).collect();
    rig.array_of(&paths, &create)?;
    let device = rig.device()?;
    let slow = identity(&paths[1])?;
    sh_in(
        &format!(
            "mkfs.ext4 -q -F {device} && mkdir -p /mnt/l && mount {device} /mnt/l && dd if=/dev/zero of=/mnt/l/f bs=1M count=4 && sync"
        ),
        60,
    )?;
    let area = Area {
        path: "/mnt/l/f".into(),
        sectors: 4 * 192 * 2,
        most: 32,
    };
    let stop = Arc::new(AtomicBool::new(false));
    let writers = start_writers(&area, 6, u32::MAX, &stop);
    let result = (|| {
        pause(500);
        sh("dm_delay_writes slow1 4000")?;
        until("writes wait on the slow member", 30, || {
            Ok(disks::writes("member1")?.0 > 0)
        })?;
        let pid = rig.target_pid()?;
        sh(&format!("kill -KILL {pid}"))?;
        until("the process is dead", 30, || {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            Ok(state.map_or(true, |state| state.contains(") Z ")))
        })?;
        let (in_flight, ended) = disks::writes("member1")?;
        ensure(in_flight > 0, || "no late write is on its way".into())?;
        until("the successor has the slow member", 60, || {
            let Ok(new) = rig.target_pid() else {
                return Ok(false);
            };
            if new == pid || !disks::holds(&new, slow, true)? {
                return Ok(false);
            }
            let landed = disks::writes("member1")?.1 - ended;
            ensure(landed >= in_flight, || {
                format!("the successor began after {landed} of {in_flight} late writes")
            })?;
            Ok(true)
        })?;
        sh("dm_heal slow1")?;
        until("the LU is up", 60, || {
            Ok(rig.run(&["lu", "show", "vol"])?.code == 0)
        })?;
        pause(2000);
        Ok::<_, Failure>(())
    })();
    stop.store(true, Ordering::Relaxed);
    if result.is_err() {
        let _ = sh("dm_heal slow1");
    }
    let log = blocks::join(writers);
    result.map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    let bytes = usize::try_from(area.sectors).expect("small") * blocks::SECTOR;
    judge(&area, blocks::read(&area.path, 0, bytes)?.get(), &log?)?;
    sh_in(&format!("umount /mnt/l && e2fsck -fn {device}"), 100)?;
    // The file may lie anywhere: all of the LU.
    redundancy_is_right(&rig, "raid5", &paths, 64 << 20)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    Ok(())
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
    write_content(&rig)?;
    rig.shutdown()?;
    sh("for i in 0 1 2 3; do dmsetup remove member$i; done
        for i in 0 1 2 3; do dmsetup create member$i --table \"0 $(blockdev --getsz /dev/ram$(( (i + 1) % 4 ))) linear /dev/ram$(( (i + 1) % 4 )) 0\"; done")?;
    rig.start()?;
    rig.wait_lu()?;
    sh("cmp -n $((32 << 20)) /tmp/content /dev/lunar/vol")?;
    let (state, _) = rig.state()?;
    ensure(state == "optimal", || format!("state is {state}"))
}

/// Given a mounted LU with dirty pages, when it or its group is deleted, then exit 7 names the holder, all goes on, and
/// what was dirty is there after umount and mount.
fn mounted() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &["--level", "raid5", "--assume-clean"])?;
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/l && mount {device} /mnt/l && cp -a /etc /mnt/l/"
    ))?;
    let dirty = sh("awk '$1 == \"Dirty:\" {print $2}' /proc/meminfo")?;
    ensure(dirty != "0", || {
        "nothing is dirty: this shows nothing".into()
    })?;
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
        &format!(
            "umount /mnt/l; e2fsck -fn {device}; blockdev --flushbufs {device}; mount {device} /mnt/l
             diff -r --no-dereference /etc /mnt/l/etc; umount /mnt/l"
        ),
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

/// Given an idle group, when LUs of one queue and of two are made and deleted over and over, then devices (in sysfs and
/// as nodes), files in the run folder, descriptors and threads are as before, and locked memory does not grow with them.
fn cycles(count: u32) -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &["--level", "raid5", "--assume-clean"])?;
    let pid = rig.target_pid()?;
    let cycles = |count: u32| -> Result<(), Failure> {
        for i in 0..count {
            rig.lunar(&["lu", "delete", "vol", "--yes"])?;
            let queues = if i.is_multiple_of(2) { "2" } else { "1" };
            let mut create = vec!["lu", "create", "vol", "--group", "data"];
            create.extend(["--size", "32MiB", "--queues", queues]);
            rig.lunar(&create)?;
        }
        Ok(())
    };
    let things = || {
        sh(&format!(
            "echo $(ls /sys/class/ublk-char | wc -l) $(ls -d /dev/ublk[bc]* | wc -l) $(find /run/lunar | wc -l) \
             $(ls /proc/{pid}/fd | wc -l) $(ls /proc/{pid}/task | grep -c .)"
        ))
    };
    let locked = || {
        let kib = sh(&format!("awk '/VmLck/ {{print $2}}' /proc/{pid}/status"))?;
        kib.parse::<u64>()
            .map_err(|error| format!("{kib}: {error}"))
    };
    cycles(4)?;
    let (before, locked_before) = (things()?, locked()?);
    cycles(count)?;
    let (after, locked_after) = (things()?, locked()?);
    ensure(before == after, || {
        format!("devices, nodes, files, descriptors, threads: {before} -> {after}")
    })?;
    // A small piece on top of the heap keeps what is free below: at most the tasks of a queue, 8 MiB, and only once.
    ensure(locked_after < locked_before + (12 << 10), || {
        format!("locked KiB: {locked_before} -> {locked_after}")
    })
}
