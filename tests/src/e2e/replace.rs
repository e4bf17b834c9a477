//! A disk that still reads is replaced: the new one is filled by copying, and takes the place when it is whole.

use super::discard::scrub_finds_nothing;
use super::disks::{identity, let_go};
use super::rig::{Rig, text};
use super::shell::{Failure, pause, sh, sh_in, until};
use super::spares::{compare, disk_state, disks_of, each_other_away, events, fill, number};
use super::{LONG, Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "replace_reads_the_old_disk_and_no_other", idle);
    for (long, level) in [(LONG, "raid0"), (LONG, "raid1"), ("", "raid5")] {
        add(
            to,
            format!("{long}replace_under_writes_and_a_killed_process_{level}"),
            move || busy(level),
        );
    }
    add(
        to,
        "replace_goes_on_as_a_rebuild_when_the_old_disk_fails",
        old_fails,
    );
    add(
        to,
        format!("{LONG}replace_leaves_all_as_it_was_when_the_new_disk_fails"),
        new_fails,
    );
    add(to, "replace_goes_on_after_a_shutdown", shutdown);
    add(to, "replace_by_a_blank_disk_at_the_same_path", same_path);
}

/// Given a failed member, at whose path there is a blank disk since, when that is added and replaces it, then it is another
/// disk, it is filled, and all reads as written without each other member; what was the old one's number stays with it.
fn same_path() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let (paths, _) = array(&rig, "raid5", 3)?;
    let old = number(&rig, &paths[1])?;
    let disk = identity(&paths[1])?;
    rig.lunar(&["disk", "fail", &old, "--yes"])?;
    let_go(&rig, &paths[1], disk)?;
    let again = rig.lunar(&["disk", "add", &paths[1]])?;
    ensure(again.contains("already given"), || again.clone())?;
    sh_in(
        &format!(
            "dd if=/dev/zero of={} bs=1M count=256 oflag=direct 2>/dev/null",
            paths[1]
        ),
        60,
    )?;
    rig.lunar(&["disk", "add", &paths[1]])?;
    let new = number(&rig, &paths[1])?;
    ensure(new != old, || format!("it is disk {old} still"))?;
    let was = disk_state(&rig, &old)?;
    ensure(was == "faulty", || format!("disk {old} is {was}"))?;
    rig.lunar(&["disk", "replace", &old, &new])?;
    rig.wait_optimal(120)?;
    ensure(disks_of(&rig, "data")?[1] == new, || "another slot".into())?;
    each_other_away(&rig, 1)
}

/// Bytes that were read from a block device, by the kernel's own count.
pub(super) fn read_bytes(path: &str) -> Result<u64, Failure> {
    let sectors = sh(&format!(
        "awk '{{print $3}}' /sys/block/dm-$(dmsetup info -c --noheadings -o minor {path})/stat"
    ))?;
    Ok(512 * sectors.parse::<u64>().map_err(|error| error.to_string())?)
}

/// A group of `count` members of 256 MiB with content, and a disk beside it. Answers the members' paths and its own.
fn array(rig: &Rig, level: &str, count: usize) -> Result<(Vec<String>, String), Failure> {
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    let create = if level == "raid0" {
        &create[..4]
    } else {
        &create[..]
    };
    let paths = rig.array("dm", count, 256, create)?;
    let new = sh(&format!("member_make dm {count} 256"))?;
    rig.lunar(&["disk", "add", &new])?;
    fill(rig)?;
    Ok((paths, new))
}

/// Waits until so many bytes of the disk are copied.
fn wait_copied(rig: &Rig, bytes: u64) -> Result<(), Failure> {
    until("the copy is under way", 60, || {
        let group = rig.json(&["group", "show", "data"])?;
        let sync = &group["sync"];
        Ok(text(&sync["action"]) == "replace" && sync["done"].as_u64().is_some_and(|d| d >= bytes))
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))
}

/// The group is optimal, the old disk sits in slot 1, and the new one is none that is in sync.
fn is_as_before(rig: &Rig, old: &str, new: &str, when: &str) -> Result<(), Failure> {
    let (state, disks) = (rig.state()?.0, disks_of(rig, "data")?);
    let new = disk_state(rig, new)?;
    ensure(
        state == "optimal" && disks[1] == old && new != "in_sync",
        || format!("{when}: {state}, members {disks:?}, the new disk is {new}"),
    )
}

/// Waits until the new disk is in slot 1.
fn wait_taken(rig: &Rig, new: &str) -> Result<(), Failure> {
    until("the new disk has the slot", 120, || {
        Ok(disks_of(rig, "data")?[1] == new && disk_state(rig, new)? == "in_sync")
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    rig.wait_optimal(60)
}

/// Given a raid5 with content, when a member is replaced, then all of it was read and, by the kernel's count, nothing of
/// the others; it is free in the end, and everything reads as written.
fn idle() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let (paths, new) = array(&rig, "raid5", 4)?;
    let (old_number, new_number) = (number(&rig, &paths[1])?, number(&rig, &new)?);
    let same = rig.run(&["disk", "replace", &paths[1], &paths[1]])?;
    ensure(same.code == 2 && same.stderr.contains("itself"), || {
        format!("exit {}: {}", same.code, same.stderr)
    })?;
    let before: Vec<u64> = paths
        .iter()
        .map(|p| read_bytes(p))
        .collect::<Result<_, _>>()?;
    rig.rebuild_rate("60MiB")?;
    rig.lunar(&["disk", "replace", &old_number, &new_number])?;
    let again = rig.lunar(&["disk", "replace", &old_number, &new_number])?;
    ensure(again.contains("unchanged"), || again.clone())?;
    wait_copied(&rig, 1)?;
    is_as_before(&rig, &old_number, &new_number, "while it is copied")?;
    let status = rig.run(&["status"])?;
    ensure(
        status.code == 0 && status.stdout.contains("is being copied to disk"),
        || format!("exit {}: {}", status.code, status.stdout),
    )?;
    let jobs = rig.json(&["job", "list"])?.to_string();
    ensure(jobs.contains("\"replace\""), || jobs.clone())?;
    wait_taken(&rig, &new_number)?;
    for (i, path) in paths.iter().enumerate() {
        let read = (read_bytes(path)? - before[i]) >> 20;
        // mgmtd looks at labels now and then.
        let is_right = if i == 1 { read >= 200 } else { read < 8 };
        ensure(is_right, || format!("{read} MiB were read from slot {i}"))?;
    }
    let left = disk_state(&rig, &old_number)?;
    ensure(left == "free", || format!("the old disk is {left}"))?;
    for name in [
        "RebuildStarted",
        "RebuildFinished",
        "SpareActive",
        "Removed",
    ] {
        until(&format!("event {name}"), 30, || {
            Ok(events(&rig)?.iter().any(|e| e == name))
        })?;
    }
    compare(&rig, "with the new disk")
}

/// Given verified writes, when a member is replaced and ublk-target is killed in the middle of the copy, then the new disk
/// is none that is in sync until it is whole, nobody sees an error, and everything reads as written with the old disk
/// dead and, one after the other, without each other member.
fn busy(level: &str) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let count = if level == "raid5" { 4 } else { 2 };
    let (paths, new) = array(&rig, level, count)?;
    let (old_number, new_number) = (number(&rig, &paths[1])?, number(&rig, &new)?);
    rig.rebuild_rate("20MiB")?;
    let device = rig.device()?;
    let fio = move |extra: &str| {
        format!(
            "fio --name=v --filename={device} --offset=64m --size=64m --direct=1 --ioengine=io_uring --iodepth=8 \
             --rw=randwrite --bsrange=4k-128k --blockalign=4k --verify=crc32c --verify_fatal=1 \
             --randseed=7 --io_size=256m {extra} >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
        )
    };
    let writing = fio("--do_verify=1 --rate=12m");
    let load = std::thread::spawn(move || sh_in(&writing, 300));
    pause(500);
    rig.lunar(&["disk", "replace", &old_number, &new_number])?;
    wait_copied(&rig, 40 << 20)?;
    let pid = rig.target_pid()?;
    sh(&format!("kill -KILL {pid}"))?;
    until("a successor", 60, || {
        Ok(rig.target_pid().is_ok_and(|now| now != pid) && rig.state().is_ok())
    })?;
    wait_copied(&rig, 1)?;
    is_as_before(
        &rig,
        &old_number,
        &new_number,
        "after the process was killed",
    )?;
    wait_taken(&rig, &new_number)?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    sh("dm_error member1")?;
    sh("echo 3 > /proc/sys/vm/drop_caches")?;
    sh_in(&fio("--verify_only=1"), 120)?;
    rig.rebuild_rate("1GiB")?;
    match level {
        "raid0" => compare(&rig, "without the old disk"),
        _ => {
            // A write that the new disk has missed verifies where an older one like it was copied; redundancy does not fit.
            scrub_finds_nothing(&rig)?;
            each_other_away(&rig, 1)
        }
    }
}

/// Given a copy under way, when the disk that it copies from fails, then the new disk takes the slot and is rebuilt from
/// where the copy was, and everything reads as written without each other member.
fn old_fails() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let (paths, new) = array(&rig, "raid5", 4)?;
    let (old_number, new_number) = (number(&rig, &paths[1])?, number(&rig, &new)?);
    rig.rebuild_rate("20MiB")?;
    rig.lunar(&["disk", "replace", &old_number, &new_number])?;
    wait_copied(&rig, 60 << 20)?;
    // So slow that it is still copied when the disk fails, however busy the machine is.
    rig.rebuild_rate("2MiB")?;
    sh("dm_error member1")?;
    // What it cannot read is had from the others; what it does not take fails it.
    sh(&format!(
        "dd if={0} of=/tmp/again bs=64k count=12 iflag=direct && dd if=/tmp/again of={0} bs=64k oflag=direct conv=notrunc",
        rig.device()?
    ))?;
    until("the new disk is rebuilt", 60, || {
        let group = rig.json(&["group", "show", "data"])?;
        Ok(text(&group["sync"]["action"]) == "recover" && disks_of(&rig, "data")?[1] == new_number)
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    let done = rig.json(&["group", "show", "data"])?["sync"]["done"].clone();
    ensure(done.as_u64().is_some_and(|done| done >= 60 << 20), || {
        format!("the rebuild began anew, at {done}")
    })?;
    compare(&rig, "while it is rebuilt")?;
    rig.rebuild_rate("1GiB")?;
    wait_taken(&rig, &new_number)?;
    let left = disk_state(&rig, &old_number)?;
    ensure(left == "faulty", || format!("the old disk is {left}"))?;
    each_other_away(&rig, 1)
}

/// Given a copy under way, when the new disk fails, and when somebody gives it up, then the group is and was optimal with
/// the old disk, and the new one does not pass for a free disk.
fn new_fails() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let (paths, new) = array(&rig, "raid5", 4)?;
    let (old_number, new_number) = (number(&rig, &paths[1])?, number(&rig, &new)?);
    rig.rebuild_rate("20MiB")?;
    for by_hand in [true, false] {
        rig.lunar(&["disk", "replace", &old_number, &new_number])?;
        wait_copied(&rig, 20 << 20)?;
        let other = rig.run(&["disk", "replace", &paths[2], "/dev/ram9"])?;
        ensure(other.code != 0 && other.stderr.contains("Try:"), || {
            format!("exit {}: {}", other.code, other.stderr)
        })?;
        match by_hand {
            true => rig.lunar(&["disk", "fail", &new_number])?,
            false => sh(&format!(
                "dm_error {}",
                new.trim_start_matches("/dev/mapper/")
            ))?,
        };
        until("the new disk is given up", 60, || {
            let group = rig.json(&["group", "show", "data"])?;
            Ok(group["sync"].is_null() && disk_state(&rig, &new_number)? == "faulty")
        })
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
        is_as_before(&rig, &old_number, &new_number, "without the new disk")?;
        let status = rig.state()?;
        ensure(status.1 == ["in_sync"; 4], || format!("{status:?}"))?;
        if by_hand {
            rig.lunar(&["disk", "add", &new])?;
        }
    }
    let names = events(&rig)?;
    ensure(
        names.iter().any(|e| e == "FailSpare") && !names.iter().any(|e| e == "Fail"),
        || format!("{names:?}"),
    )?;
    compare(&rig, "with the old disk")
}

/// Given a copy under way, when all is shut down and started without the new disk, then the group starts as it was before;
/// with it, the copy goes on from where it was, and everything reads as written without each other member.
fn shutdown() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let (paths, new) = array(&rig, "raid5", 4)?;
    let (old_number, new_number) = (number(&rig, &paths[1])?, number(&rig, &new)?);
    rig.rebuild_rate("20MiB")?;
    rig.lunar(&["disk", "replace", &old_number, &new_number])?;
    wait_copied(&rig, 20 << 20)?;
    rig.shutdown()?;
    let gone = new.trim_start_matches("/dev/mapper/").to_owned();
    sh(&format!("dm_vanish {gone}; blkdiscard -f /dev/ram4"))?;
    rig.start()?;
    rig.wait_optimal(60)?;
    let disks = disks_of(&rig, "data")?;
    ensure(disks[1] == old_number, || format!("members are {disks:?}"))?;
    compare(&rig, "without the new disk")?;
    let new = sh("member_make dm 5 256")?;
    rig.lunar(&["disk", "add", &new])?;
    let new_number = number(&rig, &new)?;
    rig.lunar(&["disk", "replace", &old_number, &new_number])?;
    wait_copied(&rig, 100 << 20)?;
    rig.shutdown()?;
    rig.start()?;
    wait_copied(&rig, 100 << 20)?;
    is_as_before(&rig, &old_number, &new_number, "after the start")?;
    rig.rebuild_rate("1GiB")?;
    wait_taken(&rig, &new_number)?;
    each_other_away(&rig, 1)
}
