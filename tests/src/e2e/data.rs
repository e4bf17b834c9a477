//! Content: what fio wrote and file systems hold is there, whatever members do.

use super::rig::{Rig, text};
use super::shell::{Failure, sh, sh_in, until};
use super::{Test, add, ensure};

/// fio with verification; each block carries its checksum, and all is read back at the end.
fn fio(device: &str, mib: u32, extra: &str) -> String {
    format!(
        "fio --name=v --filename={device} --size={mib}m --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
         --bsrange=512-256k --blockalign=512 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7 \
         --output-format=terse {extra} >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
    )
}

pub(super) fn tests(to: &mut Vec<Test>) {
    for (kind, level, count) in [
        ("ram", "raid0", 1),
        ("ram", "raid0", 3),
        ("ram", "raid1", 2),
        ("ram", "raid5", 4),
        ("ext4-file", "raid5", 3),
        ("ext4-file", "raid1", 2),
        ("null_blk", "raid5", 4),
        ("4k", "raid5", 4),
        ("4k", "raid1", 2),
    ] {
        add(
            to,
            format!("data_verified_{level}_of_{count}_{kind}"),
            move || verified(kind, level, count),
        );
    }
    for how in ["error", "hang"] {
        for level in ["raid1", "raid5"] {
            add(
                to,
                format!("data_survives_member_{how}_{level}"),
                move || member_dies(how, level),
            );
        }
    }
    for fs in ["ext4", "xfs", "btrfs"] {
        add(
            to,
            format!("data_file_system_{fs}_degraded_rebuilt_clean"),
            move || file_system(fs),
        );
    }
    add(to, "data_counters_say_what_was_done", counters);
}

/// Those that go last: a disk that was pulled from device-mapper is not to be had again in this boot.
pub(super) fn last_tests(to: &mut Vec<Test>) {
    add(to, "data_survives_member_vanish_raid1", || {
        member_dies("vanish", "raid1")
    });
}

/// Given a fresh group of a kind of members, when fio writes mixed sizes and reads back, then all is as written.
fn verified(kind: &str, level: &str, count: usize) -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array(kind, count, 192, &["--level", level, "--chunk", "64KiB"])?;
    let device = rig.device()?;
    let block: u32 = sh(&format!("blockdev --getss {device}"))?
        .parse()
        .map_err(|_| "no block size")?;
    let extra = if block == 4096 {
        "--bsrange=4k-256k --blockalign=4k"
    } else {
        ""
    };
    sh_in(&fio(&device, 96, extra), 300)?;
    Ok(())
}

/// Given a redundant group under verified writes, when a member fails, then nobody sees an error, and after its
/// replacement is filled everything reads as written without each other member in turn.
fn member_dies(how: &'static str, level: &str) -> Result<(), Failure> {
    let count = if level == "raid1" { 2 } else { 4 };
    let rig = Rig::new()?;
    rig.array("dm", count, 256, &["--level", level, "--chunk", "64KiB"])?;
    let device = rig.device()?;
    let write = fio(&device, 128, "--io_size=1g --rate=40m");
    let dying = std::thread::spawn(move || {
        super::shell::pause(2000);
        sh(&format!("dm_{how} member1"))?;
        if how == "hang" {
            // Past the limit of 30 s; then what hung comes back, and its late writes land on a stale disk.
            super::shell::pause(45_000);
            sh("dm_heal member1")?;
        }
        Ok::<_, Failure>(())
    });
    let written = sh_in(&write, 400);
    dying.join().map_err(|_| "thread")??;
    written?;
    until("the member is faulty", 60, || {
        Ok(rig.state()?.1.iter().any(|s| s == "faulty"))
    })?;
    let spare = sh(&format!("member_make dm {count} 256"))?;
    rig.lunar(&["disk", "add", &spare])?;
    let old = member_path(&rig, 1)?;
    rig.lunar(&["disk", "replace", &old, &spare])?;
    rig.wait_optimal(240)?;
    // Only read: the same blocks, verified by fio's checksums, with the first member gone.
    sh("dm_error member0")?;
    let check = format!(
        "fio --name=v --filename={device} --size=128m --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite \
         --bsrange=512-256k --blockalign=512 --verify=crc32c --verify_fatal=1 --verify_only=1 --io_size=1g \
         --randseed=7 >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
    );
    sh_in(&check, 300)?;
    Ok(())
}

/// The path of the disk in a slot, as Lunar says it.
fn member_path(rig: &Rig, slot: usize) -> Result<String, Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    Ok(text(&group["members"][slot]["path"]))
}

/// Given a file system on a raid5, when a member dies under a copy and is replaced, then its own checker finds
/// nothing, and checksums of all files are as before.
fn file_system(fs: &str) -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", 4, 256, &["--level", "raid5", "--chunk", "64KiB"])?;
    let device = rig.device()?;
    let force = if fs == "ext4" { "-F" } else { "-f" };
    sh_in(
        &format!(
            "mkfs.{fs} -q {force} {device} && mkdir -p /mnt/l && mount -t {fs} {device} /mnt/l"
        ),
        120,
    )?;
    let copy = "cp -a /usr/include /mnt/l/a && sync && dm_error member2 && cp -a /usr/include /mnt/l/b && sync";
    sh_in(copy, 300)?;
    let spare = sh("member_make dm 4 256")?;
    rig.lunar(&["disk", "add", &spare])?;
    let old = member_path(&rig, 2)?;
    rig.lunar(&["disk", "replace", &old, &spare])?;
    rig.wait_optimal(240)?;
    sh("dm_error member0; umount /mnt/l")?;
    let check = match fs {
        "ext4" => format!("e2fsck -fn {device}"),
        "xfs" => format!("xfs_repair -n {device}"),
        _ => format!("btrfs check --readonly {device}"),
    };
    sh_in(&check, 200)?;
    sh(&format!("mount -t {fs} {device} /mnt/l"))?;
    sh_in(
        "for d in a b; do diff -r --no-dereference /usr/include /mnt/l/$d || exit 1; done",
        200,
    )?;
    if fs == "btrfs" {
        sh_in(
            "btrfs scrub start -B /mnt/l | tee /tmp/scrub; grep -q 'no errors found' /tmp/scrub",
            120,
        )?;
    }
    sh("umount /mnt/l")?;
    Ok(())
}

/// Given a synced raid5 of 4 with 64 KiB chunks, when single requests are made, then the members saw the fewest
/// I/Os: 4 KiB write 2 reads + 2 writes, a full stripe no read, a large read no copy.
fn counters() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array(
        "ram",
        4,
        256,
        &["--level", "raid5", "--chunk", "64KiB", "--assume-clean"],
    )?;
    let device = rig.device()?;
    let one = |what: &str| {
        sh(&format!(
            "dd {what} bs=4k oflag=direct conv=notrunc 2>/dev/null of={device} if=/dev/urandom"
        ))
    };
    one("count=1 seek=4000")?; // The dirty mark is out of the way.
    let before = io(&rig)?;
    one("count=1 seek=2000")?;
    let after = io(&rig)?;
    ensure(after.0 - before.0 == 2 && after.1 - before.1 == 2, || {
        format!("4 KiB write: {before:?} -> {after:?}")
    })?;
    sh(&format!(
        "dd if=/dev/urandom of={device} bs=192k count=1 seek=20 oflag=direct conv=notrunc 2>/dev/null"
    ))?;
    let full = io(&rig)?;
    ensure(full.0 == after.0 && full.1 - after.1 == 4, || {
        format!("full stripe: {after:?} -> {full:?}")
    })?;
    let copied = counter(&rig, "user_copy")?;
    sh(&format!(
        "dd if={device} of=/dev/null bs=1M count=64 iflag=direct 2>/dev/null"
    ))?;
    let now = counter(&rig, "user_copy")?;
    ensure(now == copied, || {
        format!("large healthy reads were copied: {copied} -> {now}")
    })?;
    let zero_copy = counter(&rig, "zero_copy")?;
    ensure(zero_copy > 64, || format!("zero_copy is {zero_copy}"))
}

/// Reads and writes of all members together.
fn io(rig: &Rig) -> Result<(u64, u64), Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    let members = group["members"].as_array().ok_or("no members")?;
    let sum = |key: &str| members.iter().filter_map(|m| m[key].as_u64()).sum();
    Ok((sum("reads"), sum("writes")))
}

fn counter(rig: &Rig, name: &str) -> Result<u64, Failure> {
    rig.json(&["lu", "show", "vol"])?["counters"][name]
        .as_u64()
        .ok_or_else(|| format!("no counter {name}"))
}
