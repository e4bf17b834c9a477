//! Content: what fio wrote is there, and the members saw no more I/O than needed.

use super::rig::Rig;
use super::shell::{Failure, sh, sh_in};
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
            move || verified(kind, level, count, &[]),
        );
    }
    add(to, "data_verified_raid5_of_4_ram_copy_mode", || {
        verified("ram", "raid5", 4, &[("LUNAR_NO_ZERO_COPY", "1")])
    });
    add(to, "data_counters_say_what_was_done", counters);
}

/// Given a fresh group of a kind of members, when fio writes mixed sizes and reads back, then all is as written;
/// without zero copy no request's own pages went to a member.
fn verified(
    kind: &str,
    level: &str,
    count: usize,
    env: &'static [(&'static str, &'static str)],
) -> Result<(), Failure> {
    let rig = Rig::with_env(env)?;
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
    let zero_copy = counter(&rig, "zero_copy")?;
    ensure((zero_copy == 0) != env.is_empty(), || {
        format!("{zero_copy} requests without a copy")
    })
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

/// A counter of the LU `vol`.
pub(super) fn counter(rig: &Rig, name: &str) -> Result<u64, Failure> {
    rig.json(&["lu", "show", "vol"])?["counters"][name]
        .as_u64()
        .ok_or_else(|| format!("no counter {name}"))
}
