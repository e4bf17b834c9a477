//! A group whose members were all replaced by larger ones gets the room of the smallest.

use super::rig::Rig;
use super::shell::{Failure, pause, sh, sh_in, until};
use super::spares::{compare, disks_of, events, fill};
use super::{LONG, Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for (long, level) in [("", "raid5"), (LONG, "raid1"), (LONG, "raid0")] {
        add(
            to,
            format!("{long}grow_onto_larger_members_under_load_and_a_killed_process_{level}"),
            move || grown(level),
        );
    }
}

const MIB: u64 = 1 << 20;

fn number(rig: &Rig, key: &str) -> Result<u64, Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    group[key]
        .as_u64()
        .ok_or_else(|| format!("no {key} in {group}"))
}

/// The last MiB of the LU, behind what there was before it grew.
fn tail(rig: &Rig, command: &str) -> Result<(), Failure> {
    let end = rig.json(&["lu", "show", "vol"])?["capacity"].as_u64();
    let mib = end.ok_or("no capacity")? / MIB - 60;
    let device = rig.device()?;
    sh_in(&format!("export DEVICE={device} AT={mib}; {command}"), 120)
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))
        .map(drop)
}

fn compare_all(rig: &Rig, when: &str) -> Result<(), Failure> {
    compare(rig, when)?;
    tail(
        rig,
        "dd if=$DEVICE bs=1M skip=$AT count=60 iflag=direct 2>/dev/null | cmp - /tmp/tail",
    )
    .map_err(|why| format!("{when}, in the new part: {why}"))
}

/// Given a LU under verified writes, when all members of its group are replaced by larger ones and the group is grown,
/// then it has the room of those, and so can the LU; killed in the resync of the new part, ublk-target goes on with it.
/// In the end all reads as written without each member, and by the second superblocks alone.
fn grown(level: &str) -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let count = if level == "raid5" { 3 } else { 2 };
    let small = sh(&format!(
        "for i in $(seq 0 {}); do dmsetup create member$i --table \"0 262144 linear /dev/ram$i 0\"; \
         echo /dev/mapper/member$i; done",
        count - 1
    ))?;
    let small: Vec<String> = small.lines().map(str::to_owned).collect();
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    let create = if level == "raid0" {
        &create[..4]
    } else {
        &create
    };
    rig.array_of(&small, create)?;
    rig.lunar(&["lu", "set", "vol", "--queues", "2"])?;
    fill(&rig)?;
    rig.rebuild_rate("1GiB")?;
    let device = rig.device()?;
    let fio = move |extra: &str| {
        format!(
            "fio --name=v --filename={device} --offset=52m --size=48m --direct=1 --ioengine=io_uring --iodepth=8 \
             --rw=randwrite --bsrange=4k-128k --blockalign=4k --verify=crc32c --verify_fatal=1 --randseed=7 {extra} \
             >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
        )
    };
    let writing = fio("--do_verify=1 --rate=12m --io_size=200m");
    let load = std::thread::spawn(move || sh_in(&writing, 300));
    let had = number(&rig, "capacity")?;
    let data = if level == "raid1" { 1 } else { 2 };
    for (i, old) in small.iter().enumerate() {
        let none = rig.lunar(&["group", "grow", "data"])?;
        ensure(none.contains("unchanged"), || none.clone())?;
        let new = sh(&format!("member_make dm {} 256", count + i))?;
        rig.lunar(&["disk", "add", &new])?;
        rig.lunar(&["disk", "replace", old, &new, "--wait"])?;
        rig.wait_optimal(60)?;
    }
    let dry = rig.lunar(&["group", "grow", "data", "--dry-run"])?;
    ensure(
        dry.contains("grow group data from") && number(&rig, "capacity")? == had,
        || dry.clone(),
    )?;
    rig.rebuild_rate("20MiB")?;
    rig.lunar(&["group", "grow", "data"])?;
    let now = number(&rig, "capacity")?;
    // 128 MiB more of each member; the larger disks keep no more for Lunar.
    let more = (now - had) / data / MIB;
    ensure(now > had && (120..=128).contains(&more), || {
        format!("{had} bytes became {now}; each member has {more} MiB more")
    })?;
    rig.lunar(&["lu", "resize", "vol", "max"])?;
    let kernel = sh(&format!(
        "cat /sys/block/$(basename {})/size",
        rig.device()?
    ))?;
    let said = rig.json(&["lu", "show", "vol"])?["capacity"].as_u64();
    let kernel = kernel.parse::<u64>().ok().map(|sectors| 512 * sectors);
    ensure(kernel == said && said > Some(now - 4 * MIB), || {
        format!("the kernel has {kernel:?} bytes, Lunar says {said:?} of {now}")
    })?;
    tail(
        &rig,
        "dd if=/dev/urandom of=/tmp/tail bs=1M count=60 2>/dev/null; \
         dd if=/tmp/tail of=$DEVICE bs=1M seek=$AT oflag=direct 2>/dev/null",
    )?;
    if level != "raid0" {
        pause(1500);
        let sync = rig.json(&["group", "show", "data"])?["sync"].clone();
        ensure(sync["action"] == "resync", || format!("sync is {sync}"))?;
    }
    let pid = rig.target_pid()?;
    sh(&format!("kill -KILL {pid}"))?;
    until("a successor with the new size", 60, || {
        Ok(rig.target_pid().is_ok_and(|now| now != pid)
            && number(&rig, "capacity").is_ok_and(|capacity| capacity == now))
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    if level != "raid0" {
        let sync = rig.json(&["group", "show", "data"])?["sync"].clone();
        let is_on = sync["done"].as_u64().is_some_and(|done| done >= had / data);
        ensure(is_on, || format!("the resync began anew: {sync}"))?;
    }
    rig.rebuild_rate("1GiB")?;
    rig.wait_optimal(120)?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    sh_in(&fio("--verify_only=1"), 120)?;
    ensure(
        events(&rig)?.iter().any(|name| name == "GroupGrown"),
        || "no event GroupGrown".into(),
    )?;
    if level != "raid0" {
        for (i, disk) in disks_of(&rig, "data")?.iter().enumerate() {
            rig.lunar(&["disk", "fail", disk])?;
            compare_all(&rig, &format!("without slot {i}"))?;
            rig.lunar(&["disk", "replace", disk, disk])?;
            rig.wait_optimal(120)?;
        }
    }
    compare_all(&rig, "in the end")?;
    rig.shutdown()?;
    sh(&format!(
        "for i in $(seq {count} {}); do \
           dd if=/dev/zero of=/dev/mapper/member$i bs=4096 seek=1 count=1 oflag=direct 2>/dev/null; done",
        2 * count - 1
    ))?;
    rig.start()?;
    rig.wait_optimal(60)?;
    compare_all(&rig, "by the second superblocks")
}
