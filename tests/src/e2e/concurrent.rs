//! Many requests at once: writers that meet, and a data path that allocates nothing.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::blocks::{self, Area, judge, mixed, start_writers};
use super::data::counter;
use super::disks::redundancy_is_right;
use super::rig::Rig;
use super::shell::Failure;
use super::{LONG, Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for level in ["raid1", "raid5"] {
        add(
            to,
            format!("data_overlapping_writers_lose_nothing_{level}"),
            move || overlapping(level, false),
        );
    }
    add(
        to,
        "data_overlapping_writers_lose_nothing_raid5_degraded",
        || overlapping("raid5", true),
    );
    for (long, level, degraded) in [
        ("", "raid5", false),
        ("", "raid5", true),
        (LONG, "raid0", false),
        (LONG, "raid1", false),
        (LONG, "raid1", true),
    ] {
        let state = if degraded { "degraded" } else { "healthy" };
        add(
            to,
            format!("{long}data_requests_allocate_nothing_{level}_{state}"),
            move || allocations(level, degraded),
        );
    }
}

/// Given a group, when eight writers write overlapping unaligned ranges at the same time, then they really met,
/// every sector holds one write whole that no later one should have replaced, and the redundancy is right: on the
/// members' bytes, and in a degraded read.
fn overlapping(level: &str, degraded: bool) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let count = if level == "raid1" { 2 } else { 4 };
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    let paths = rig.array("ram", count, 256, &create)?;
    if degraded {
        rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    }
    // Eight stripes of 192 KiB; of a mirror 24.
    let area = Area {
        path: rig.device()?,
        sectors: 8 * 192 * 2,
        most: 200,
    };
    let before = counter(&rig, "range_lock_waits")?;
    let writers = start_writers(&area, 8, 500, &Arc::new(AtomicBool::new(false)));
    let log = blocks::join(writers)?;
    let waits = counter(&rig, "range_lock_waits")? - before;
    ensure(waits > 100, || {
        format!("the writers hardly met: {waits} waits")
    })?;
    let bytes = usize::try_from(area.sectors).expect("small") * blocks::SECTOR;
    let healthy = blocks::read(&area.path, 0, bytes)?;
    judge(&area, healthy.get(), &log)?;
    if degraded {
        return Ok(());
    }
    let of_member = if level == "raid1" { bytes } else { bytes / 3 };
    redundancy_is_right(&rig, level, &paths, of_member)?;
    rig.lunar(&["disk", "fail", &paths[0], "--yes"])?;
    let degraded = blocks::read(&area.path, 0, bytes)?;
    judge(&area, degraded.get(), &log)?;
    ensure(healthy.get() == degraded.get(), || {
        "a degraded read differs".into()
    })
}

/// Given a group that has served a while, when it serves 100,000 mixed requests of 4 KiB, 32 at a time, then it
/// allocates no memory.
fn allocations(level: &str, degraded: bool) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let count = if level == "raid1" { 2 } else { 4 };
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    let paths = rig.array("ram", count, 256, &create)?;
    if degraded {
        rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    }
    let device = rig.device()?;
    let allocated = || {
        rig.json(&["group", "show", "data"])?["allocations"]
            .as_u64()
            .ok_or_else(|| "no allocations in group show".to_owned())
    };
    let blocks = (100 << 20) / 4096;
    mixed(&device, blocks, 32, 20_000)?;
    let warm = allocated()?;
    mixed(&device, blocks, 32, 100_000)?;
    let after = allocated()?;
    ensure(warm == after, || {
        format!("{} allocations in 100,000 requests", after - warm)
    })
}
