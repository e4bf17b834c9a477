//! Management: many LUs at once, sick disks, groups that do not start, crashes in the middle of a command.

use super::rig::{Rig, members, text};
use super::shell::{Failure, sh, sh_in, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "manage_thirty_lus_go_down_and_up_together", thirty);
    add(to, "manage_sick_disk_hides_no_other", sick_disk);
    add(to, "manage_group_not_started", not_started);
    add(to, "manage_disk_add_killed_between_labels", add_killed);
    add(to, "manage_checks_come_before_confirmation", checks);
    add(to, "manage_crashing_group_is_quarantined", quarantined);
    add(to, "manage_state_directory", state_directory);
}

const RAID5: [&str; 3] = ["--level", "raid5", "--assume-clean"];

/// Runs `lunar ARGS`, which must exit `code` and say `what` and what to type.
fn refused(rig: &Rig, args: &[&str], code: i32, what: &str) -> Result<(), Failure> {
    let output = rig.run(args)?;
    let line = format!(
        "lunar {}: exit {}: {}{}",
        args.join(" "),
        output.code,
        output.stdout,
        output.stderr
    );
    ensure(output.code == code, || {
        format!("expected {code}: {line}\n{}", rig.log_tail())
    })?;
    ensure(output.stderr.contains(what), || {
        format!("expected `{what}`: {line}")
    })?;
    ensure(output.stderr.contains("Try:"), || {
        format!("no `Try:`: {line}")
    })
}

/// Given 29 LUs, when all is shut down, then no device of them is left; and when mgmtd starts, all are block devices again.
fn thirty() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 4, 256, &RAID5)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    for i in 0..30 {
        let name = format!("y{i}");
        rig.lunar(&["lu", "create", &name, "--group", "data", "--size", "16MiB"])?;
    }
    rig.lunar(&["lu", "delete", "y29", "--yes"])?;
    rig.shutdown()?;
    let left = sh("ls -d /dev/lunar/* /dev/ublkb* 2>/dev/null || true")?;
    ensure(left.is_empty(), || format!("left after shutdown: {left}"))?;
    rig.start()?;
    until("29 LUs are up", 30, || {
        Ok(sh("find -L /dev/lunar -type b | wc -l")? == "29")
    })
}

/// A shell line that makes a disk of kind dm unreadable from its superblock on; what lies below stays in its hands.
fn unreadable(member: usize) -> String {
    format!("dm_error_range member{member} 8 $(( $(dm_sectors member{member}) - 8 ))")
}

/// Given a group whose member hangs, or answers only errors, when mgmtd starts, then the group is up without it and
/// `status` names the disk; other disks can be added meanwhile, and a hanging one is refused by name.
fn sick_disk() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("dm", 4, 256, &RAID5)?;
    for (at, sick, says) in [
        (3, "dm_hang member3".to_owned(), "hangs"),
        (2, unreadable(2), "cannot be read"),
    ] {
        rig.shutdown()?;
        sh(&sick)?;
        rig.start()?;
        until("the group is up", 90, || {
            Ok(text(&rig.json(&["group", "show", "data"])?["state"]) == "degraded")
        })
        .map_err(|why| format!("{sick}: {why}\n{}", rig.log_tail()))?;
        let status = rig.json(&["status"])?;
        let (disk, bad) = ((at + 1).to_string(), &status["bad_disks"][0]);
        ensure(
            bad["disk"] == at + 1 && text(&bad["problem"]).contains(says),
            || format!("{sick}: {}", status["bad_disks"]),
        )?;
        let shown = rig.run(&["status"])?.stdout;
        ensure(shown.contains(&paths[at]) && shown.contains(says), || {
            shown.clone()
        })?;
        sh_in(
            "dd if=/dev/urandom of=/dev/lunar/vol bs=1M count=8 oflag=direct 2>/dev/null",
            30,
        )?;
        // Once it works again it takes its own place by itself, if no other has.
        refused(&rig, &["disk", "replace", &disk, &disk], 1, says)?;
        let heal = format!("dm_heal member{at}");
        let fresh = sh(&format!("dm_wrap member{0} /dev/ram{0}", at + 4))?;
        rig.lunar(&["disk", "add", &fresh])?;
        if at == 3 {
            sh(&heal)?;
            rig.wait_optimal(100)?;
        } else {
            rig.lunar(&["disk", "replace", &disk, &fresh])?;
            rig.wait_optimal(100)?;
            sh(&heal)?;
        }
    }
    let fresh = sh("dm_wrap member8 /dev/ram8")?;
    let other = sh("dm_wrap member9 /dev/ram9; dm_hang member9")?;
    refused(&rig, &["disk", "add", &fresh, &other], 1, &other)?;
    let disks = rig.json(&["disk", "list"])?;
    ensure(disks.as_array().is_some_and(|all| all.len() == 6), || {
        format!("a disk was added beside one that was refused: {disks}")
    })?;
    rig.lunar(&["disk", "add", &fresh])?;
    sh("dm_heal member9").map(drop)
}

/// Given a group with too few of its disks, then it is shown with its reason and what to type, started when they
/// are back, and deleted without being started; a disk that was away does not bring it back.
fn not_started() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("dm", 3, 256, &RAID5)?;
    // Not taken away: what lies below would be found in their place, rightly.
    let take_two = &format!("{}; {}", unreadable(1), unreadable(2));
    let put_two = "dm_heal member1; dm_heal member2";
    rig.shutdown()?;
    sh(take_two)?;
    rig.start()?;
    let shown = |rig: &Rig| -> Result<(), Failure> {
        until("the start was tried", 60, || {
            Ok(rig.json(&["group", "show", "data"])?["reason"] != "")
        })
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
        let group = rig.json(&["group", "show", "data"])?;
        let states: Vec<String> = group["members"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|m| text(&m["state"]))
            .collect();
        ensure(
            group["state"] == "stopped"
                && text(&group["action"]).contains("lunar ")
                && states == ["stopped", "missing", "missing"],
            || format!("{group}"),
        )?;
        let status = rig.run(&["status"])?;
        ensure(
            status.code == 4
                && status.stdout.contains("reason:")
                && status.stdout.contains("action:"),
            || status.stdout.clone(),
        )
    };
    shown(&rig)?;
    let output = rig.run(&["group", "start", "data"])?;
    ensure(
        output.code != 0 && output.stderr.contains("Try:") && !output.stderr.contains("-0000-"),
        || format!("exit {}: {}", output.code, output.stderr),
    )?;
    sh(put_two)?;
    rig.lunar(&["group", "start", "data"])?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    // Again without them, and away with it.
    rig.shutdown()?;
    sh(take_two)?;
    rig.start()?;
    shown(&rig)?;
    refused(&rig, &["group", "delete", "data"], 6, "LU vol")?;
    rig.lunar(&["group", "delete", "data", "--yes"])?;
    ensure(rig.json(&["disk", "show", "1"])?["state"] == "free", || {
        "disk 1 is not free".into()
    })?;
    rig.shutdown()?;
    sh(put_two)?;
    rig.start()?;
    let groups = rig.json(&["group", "list"])?;
    let back = groups.as_array().is_some_and(|list| {
        list.iter()
            .all(|group| group["state"] == "stopped" || group["state"] == "failed")
    });
    ensure(back, || format!("the group is back: {groups}"))
}

/// Given mgmtd killed while it labels several disks, when the same command is given again, then it finishes the work:
/// no disk needs a --force that did not need it before.
fn add_killed() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = members("dm", 4, 256)?;
    sh("mkfs.ext4 -q -F /dev/mapper/member2; dm_delay member1 150")?;
    let args = [
        "disk",
        "add",
        "--force=ext4",
        &paths[0],
        &paths[2],
        &paths[1],
        &paths[3],
    ];
    // With a signature on some only it is refused for none: the signature named is the one that may die.
    let bin = std::env::current_exe().map_err(|error| error.to_string())?;
    let lunar = bin.with_file_name("lunar").display().to_string();
    sh(&format!(
        "{lunar} {} >/tmp/add.out 2>&1 & echo",
        args.join(" ")
    ))?;
    until("two disks are labelled", 60, || {
        let disks = rig.json(&["disk", "list"])?;
        Ok(disks.as_array().is_some_and(|disks| disks.len() == 2))
    })
    .map_err(|why| format!("{why}: {}", sh("cat /tmp/add.out").unwrap_or_default()))?;
    rig.end_mgmtd("KILL")?;
    rig.start()?;
    let mut said = String::new();
    until("the same command finishes it", 60, || {
        let output = rig.run(&args)?;
        ensure(matches!(output.code, 0 | 7), || {
            format!("exit {}: {}", output.code, output.stderr)
        })?;
        said = output.stdout;
        Ok(output.code == 0)
    })?;
    ensure(said.matches("unchanged").count() == 2, || said.clone())?;
    let disks = rig.json(&["disk", "list"])?;
    let states: Vec<String> = disks
        .as_array()
        .into_iter()
        .flatten()
        .map(|disk| text(&disk["state"]))
        .collect();
    ensure(states == ["free"; 4], || format!("{disks}"))?;
    let again = rig.lunar(&args)?;
    ensure(again.contains("unchanged"), || again.clone())?;
    sh("dm_heal member1")?;
    let list = paths.join(",");
    rig.lunar(&[
        "group", "create", "data", "--disks", &list, "--level", "raid5",
    ])
    .map(drop)
}

/// Given what is in use, then that is said before a confirmation is asked for.
fn checks() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    sh(
        "mkfs.ext4 -q -F /dev/ram7; mkdir -p /mnt/held; mount /dev/ram7 /mnt/held; mkfs.ext4 -q -F /dev/ram8",
    )?;
    let device = rig.device()?;
    let table: &[(&[&str], i32, &str)] = &[
        (&["disk", "replace", "1", "2"], 7, "data"),
        (&["disk", "replace", "nosuch", "2"], 2, "nosuch"),
        (&["disk", "replace", "1", "nosuch"], 2, "nosuch"),
        (&["disk", "remove", "1", "--wipe"], 7, "data"),
        // In use comes before data that would die, whatever the order of the paths.
        (&["disk", "add", "/dev/ram8", "/dev/ram7"], 7, "/mnt/held"),
        (
            &["disk", "add", "/dev/ram8", "/dev/nonexistent"],
            2,
            "nonexistent",
        ),
        (&["lu", "delete", "nosuch"], 2, "nosuch"),
        (&["group", "delete", "nosuch"], 2, "nosuch"),
    ];
    for (args, code, what) in table {
        refused(&rig, args, *code, what)?;
    }
    sh("umount /mnt/held")?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mount {device} /mnt/held"
    ))?;
    for args in [
        &["lu", "delete", "vol"][..],
        &["group", "delete", "data"],
        &["group", "stop", "data"],
        &["shutdown"],
    ] {
        refused(&rig, args, 7, "/mnt/held")?;
    }
    sh("umount /mnt/held").map(drop)
}

/// The id of the owner thread of a group.
fn owner_thread(rig: &Rig, group: &str) -> Result<String, Failure> {
    let uuid = text(&rig.json(&["group", "show", group])?["uuid"]);
    let pid = rig.target_pid()?;
    sh(&format!(
        "grep -l '^g-{}$' /proc/{pid}/task/*/comm | cut -d/ -f5",
        &uuid[..8]
    ))
}

/// Given two groups under load, when the owner thread of one crashes twice within a minute, then this one is
/// quarantined: its device is there and answers EIO, its disks are as they were, and the other group goes on without
/// an error. A start by hand brings it back with what was written. One crash alone, and a kill from outside, do not.
fn quarantined() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    rig.lunar(&["disk", "add", "/dev/ram4", "/dev/ram5"])?;
    rig.mirror("other", "4,5", "well")?;
    sh(
        "head -c 8M /dev/urandom > /tmp/sick; dd if=/tmp/sick of=/dev/lunar/vol bs=1M oflag=direct 2>/dev/null",
    )?;
    let device = rig.device()?;
    let load = std::thread::spawn(|| {
        sh_in(
            "fio --name=w --filename=/dev/lunar/well --size=64m --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite \
             --bs=4k --verify=crc32c --verify_fatal=1 --verify_backlog=128 --time_based --runtime=30 >/tmp/fio.out 2>&1 \
             || { cat /tmp/fio.out; exit 1; }",
            200,
        )
    });
    let state = |rig: &Rig| Ok::<_, Failure>(rig.state()?.0);
    for (signal, expected) in [
        ("KILL", "optimal"),
        ("SEGV", "optimal"),
        ("ABRT", "quarantined"),
    ] {
        let pid = rig.target_pid()?;
        let at = match signal {
            "KILL" => pid.clone(),
            _ => owner_thread(&rig, "data")?,
        };
        sh(&format!("kill -{signal} {at}"))?;
        until("a successor", 60, || {
            Ok(rig.target_pid().is_ok_and(|new| new != pid))
        })
        .map_err(|why| format!("{signal}: {why}\n{}", rig.log_tail()))?;
        until("its state", 60, || Ok(state(&rig)? == expected))
            .map_err(|why| format!("{signal}: {why}: {:?}\n{}", rig.state(), rig.log_tail()))?;
    }
    let superblocks =
        "for i in 0 1 2; do dd if=/dev/ram$i bs=4k skip=1 count=1 2>/dev/null; done | sha256sum";
    let before = sh(superblocks)?;
    let errors = sh(&format!(
        "test -b {device}; ! dd if={device} of=/dev/null bs=4k count=1 iflag=direct 2>&1; ! dd if=/dev/zero of={device} bs=4k count=1 oflag=direct 2>&1"
    ))?;
    ensure(errors.matches("Input/output error").count() == 2, || {
        errors.clone()
    })?;
    let status = rig.run(&["status"])?;
    ensure(
        status.code == 4
            && status.stdout.contains("QUARANTINED")
            && status.stdout.contains("crashed 2 times")
            && status.stdout.contains("lunar group start data --again"),
        || format!("exit {}: {}", status.code, status.stdout),
    )?;
    for args in [
        &["group", "start", "data"][..],
        &["group", "delete", "data", "--yes"],
        &["lu", "delete", "vol", "--yes"],
        &["disk", "fail", "1"],
    ] {
        refused(&rig, args, 4, "quarantined")?;
    }
    ensure(sh(superblocks)? == before, || {
        "the members were written".into()
    })?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("the other group: {why}\n{}", rig.log_tail()))?;
    rig.lunar(&["group", "start", "data", "--again"])?;
    ensure(rig.device()? == device, || "another device".into())?;
    sh("cmp -n $((8 << 20)) /tmp/sick /dev/lunar/vol")?;
    ensure(state(&rig)? == "optimal", || format!("{:?}", rig.state()))?;
    rig.lunar(&["lu", "delete", "vol", "--yes"]).map(drop)
}

/// Given a state directory that is in use, read-only, damaged, or on a LU of Lunar, then mgmtd says so and what to type;
/// with the tables lost, groups and LUs come back from the disks.
fn state_directory() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let mgmtd = exe.with_file_name("mgmtd").display().to_string();
    let pid = sh("pidof mgmtd")?;
    let state = sh(&format!(
        "tr '\\0' '\\n' < /proc/{pid}/cmdline | grep -A1 state-dir | tail -n 1"
    ))?;
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device}; mkdir -p /mnt/l /tmp/ro /tmp/other; mount {device} /mnt/l; mount -t tmpfs -o ro tmpfs /tmp/ro"
    ))?;
    let says = |args: &str, what: &[&str]| -> Result<(), Failure> {
        let text = sh_in(&format!("! timeout 20 {mgmtd} {args} 2>&1"), 30)?;
        let all = what.iter().chain(&["Try: "]);
        for what in all {
            ensure(text.contains(what), || {
                format!("mgmtd {args}: expected `{what}`: {text}")
            })?;
        }
        Ok(())
    };
    says(
        &format!("--state-dir {state} --system 2"),
        &[&format!("process {pid} (mgmtd)")],
    )?;
    says("--state-dir /tmp/other", &[&format!("process {pid}")])?;
    says("--state-dir /tmp/ro --system 2", &["/tmp/ro"])?;
    says("--state-dir /mnt/l/state --system 2", &["a LU of Lunar"])?;
    sh(
        "umount /mnt/l /tmp/ro; head -c 4M /dev/urandom > /tmp/seed; dd if=/tmp/seed of=/dev/lunar/vol bs=1M oflag=direct 2>/dev/null",
    )?;
    for alive in [true, false] {
        if alive {
            rig.end_mgmtd("TERM")?;
        } else {
            rig.shutdown()?;
        }
        sh(&format!("truncate -s 100 {state}/lunar.redb"))?;
        says(&format!("--state-dir {state}"), &["lunar.redb", "mv "])?;
        sh(&format!("mv {state}/lunar.redb {state}/lunar.redb.bad"))?;
        rig.start()?;
        until("the LU is there", 60, || {
            Ok(rig.run(&["lu", "show", "vol"])?.code == 0 && rig.state()?.0 == "optimal")
        })
        .map_err(|why| format!("ublk-target alive: {alive}: {why}\n{}", rig.log_tail()))?;
        sh("test -b /dev/lunar/vol; cmp -n $((4 << 20)) /tmp/seed /dev/lunar/vol")?;
        let disks = rig.json(&["disk", "list"])?;
        ensure(disks.as_array().is_some_and(|all| all.len() == 3), || {
            format!("ublk-target alive: {alive}: {disks}")
        })?;
    }
    Ok(())
}
