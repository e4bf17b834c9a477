//! ublk-target and mgmtd killed in the middle of a change, and both at once.

use super::disks::redundancy_is_right;
use super::rig::Rig;
use super::shell::{Failure, pause, sh, sh_in, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for who in ["target", "mgmtd", "both"] {
        add(
            to,
            format!("deaths_of_{who}_while_lus_are_made_and_deleted"),
            move || changes(who),
        );
    }
    add(to, "deaths_of_both_at_once_under_load_in_a_rebuild", both);
}

const RAID5: [&str; 5] = ["--level", "raid5", "--chunk", "64KiB", "--assume-clean"];

fn kill(rig: &mut Rig, who: &str) -> Result<(), Failure> {
    let target = rig.target_pid()?;
    match who {
        "target" => {
            sh(&format!("kill -KILL {target}"))?;
            until("a successor", 60, || {
                Ok(rig.target_pid().is_ok_and(|new| new != target))
            })
        }
        "mgmtd" => rig.end_mgmtd("KILL").and_then(|()| rig.start()),
        _ => {
            sh(&format!("kill -KILL {} {target}", rig.mgmtd_pid()))?;
            rig.end_mgmtd("KILL").and_then(|()| rig.start())
        }
    }
}

fn is_served(rig: &Rig) -> Result<bool, Failure> {
    Ok(rig.state().is_ok_and(|(state, _)| state == "optimal"))
}

/// Given a group with a LU that is mounted, when LUs are made and deleted and a process is killed at another moment of each
/// such command, then the same command again has it done; in the end the kernel has as many devices as there are LUs, all
/// space that is not in use is free, and the file system is whole.
fn changes(who: &str) -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    rig.lunar(&["lu", "create", "vol", "--group", "data", "--size", "64MiB"])?;
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/k && mount {device} /mnt/k && cp -a /etc /mnt/k/ && sync -f /mnt/k"
    ))?;
    let free = |rig: &Rig| {
        rig.json(&["group", "show", "data"])
            .map(|g| g["free"].clone())
    };
    let before = free(&rig)?;
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let lunar = exe.with_file_name("lunar").display().to_string();
    let create = ["lu", "create", "x", "--group", "data", "--size", "32MiB"];
    let delete = ["lu", "delete", "x", "--yes"];
    let is_there = |rig: &Rig| Ok::<_, Failure>(rig.run(&["lu", "show", "x"])?.code == 0);
    for turn in 0..6 {
        for command in [&create[..], &delete] {
            sh(&format!(
                "{lunar} {} >/tmp/change.out 2>&1 & echo",
                command.join(" ")
            ))?;
            pause(turn * 25);
            kill(&mut rig, who)?;
            until("it serves", 60, || is_served(&rig))
                .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
            let wanted = command[1] == "create";
            // Done, or not at all; what was not is done now.
            until("the command is done", 60, || {
                if is_there(&rig)? != wanted {
                    let again = rig.run(command)?;
                    ensure(matches!(again.code, 0 | 2 | 4 | 5 | 7), || {
                        format!("exit {}: {}", again.code, again.stderr)
                    })?;
                }
                Ok(is_there(&rig)? == wanted)
            })
            .map_err(|why| format!("{command:?}: {why}\n{}", rig.log_tail()))?;
            if wanted {
                sh("until [ -b /dev/lunar/x ]; do sleep 0.05; done
                    head -c 4M /dev/urandom > /tmp/x; dd if=/tmp/x of=/dev/lunar/x bs=1M oflag=direct 2>/dev/null
                    cmp -n $((4 << 20)) /tmp/x /dev/lunar/x")?;
            }
        }
    }
    let now = free(&rig)?;
    ensure(now == before, || format!("free: {before}, then {now}"))?;
    let devices = sh("ls /sys/class/ublk-char | wc -l")?;
    ensure(devices == "1", || format!("{devices} devices of one LU"))?;
    sh_in(
        &format!("diff -r --no-dereference /etc /mnt/k/etc; umount /mnt/k; e2fsck -fn {device}"),
        60,
    )
    .map(drop)
}

/// Given a LU under verified load whose group is rebuilt, when mgmtd and ublk-target are killed at once, four times, then the
/// rebuild goes on and ends, no request fails, everything reads as written, and the redundancy on the disks is right.
fn both() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let mut paths = rig.array("ram", 4, 256, &RAID5)?;
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/k && mount {device} /mnt/k"
    ))?;
    rig.lunar(&["disk", "add", "/dev/ram6"])?;
    rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    rig.rebuild_rate("8MiB")?;
    rig.lunar(&["disk", "replace", "2", "/dev/ram6"])?;
    let load = std::thread::spawn(|| {
        sh_in(
            "fio --name=k --directory=/mnt/k --size=64m --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
             --bsrange=512-128k --blockalign=512 --verify=crc32c --verify_fatal=1 --time_based --runtime=20 \
             --verify_backlog=256 >/tmp/fio.out 2>&1 || { cat /tmp/fio.out; exit 1; }",
            300,
        )
    });
    for _ in 0..4 {
        pause(2000);
        let was = rig.target_pid()?;
        let sync = &rig.json(&["group", "show", "data"])?["sync"];
        ensure(!sync.is_null(), || "it is not rebuilt any more".into())?;
        kill(&mut rig, "both")?;
        until("it serves", 60, || {
            Ok(rig.target_pid().is_ok_and(|new| new != was)
                && rig.state().is_ok_and(|(state, _)| state == "degraded"))
        })
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    }
    rig.rebuild_rate("1GiB")?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    rig.wait_optimal(120)?;
    sh_in(&format!("umount /mnt/k && e2fsck -fn {device}"), 100)?;
    paths[1] = "/dev/ram6".into();
    redundancy_is_right(&rig, "raid5", &paths, 64 << 20)
}
