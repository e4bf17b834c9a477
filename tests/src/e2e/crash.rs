//! The server process dies under load, again and again, with as much in flight as there can be.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lunar_engine::region_map::{Kind, PAGE, PAGE_REGIONS, RegionSet};
use lunar_engine::superblock::{self, At, Superblock};

use super::blocks;
use super::discard::scrub_finds_nothing;
use super::replace::read_bytes;
use super::rig::Rig;
use super::shell::{Failure, pause, sh, sh_in, until};
use super::spares::{compare, fill};
use super::{Test, add, ensure, figure};

/// In flight at every kill, at least.
const IN_FLIGHT: u64 = 16;
/// A successor that has answered nothing for so long has failed.
const LIMIT: Duration = Duration::from_secs(60);

pub(super) fn tests(to: &mut Vec<Test>) {
    for (level, policy, lost) in [
        ("raid5", "ppl", 0),
        ("raid5", "ppl", 1),
        ("raid5", "none", 1),
        ("raid5", "bitmap", 1),
        ("raid6", "journal", 2),
        ("raid10", "bitmap", 1),
    ] {
        let name =
            format!("crash_target_killed_with_requests_in_flight_{level}_{policy}_{lost}_away");
        add(to, name, move || killed(level, policy, lost, 5));
    }
    for level in ["raid5", "raid10"] {
        let name = format!("crash_resync_copies_what_was_being_written_and_no_more_{level}");
        add(to, name, move || bounded_resync(level));
    }
    add(to, "long_crash_fifty_kills_with_requests_in_flight", || {
        killed("raid5", "ppl", 0, 50)
    });
}

fn in_flight(device: &str) -> Result<u64, Failure> {
    let name = device.trim_start_matches("/dev/");
    let counts = std::fs::read_to_string(format!("/sys/block/{name}/inflight"));
    let counts = counts.map_err(|error| format!("{device}: {error}"))?;
    let count = |n: &str| n.parse::<u64>().map_err(|error| error.to_string());
    counts.split_whitespace().map(count).sum()
}

fn served(rig: &Rig) -> Result<u64, Failure> {
    let counters = &rig.json(&["lu", "show", "vol"])?["counters"];
    let count = |key: &str| counters[key].as_u64().unwrap_or(0);
    Ok(count("reads") + count("writes") + count("flushes") + count("discards"))
}

/// Given a mounted LU under verified load at queue depth 32, also with members away, when ublk-target is stopped until
/// 16 requests and more wait for it, the load is held, and ublk-target is killed, over and over, then every one of those
/// requests is served by its successor, none fails, all reads as written, and the file system has no fault.
fn killed(level: &str, policy: &str, lost: usize, kills: u32) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let disks = if level == "raid6" { 5 } else { 4 };
    let create = ["--level", level, "--consistency", policy, "--assume-clean"];
    let paths = rig.array("ram", disks, 200, &create)?;
    for path in &paths[1..1 + lost] {
        rig.lunar(&["disk", "fail", path, "--yes"])?;
    }
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/c && mount {device} /mnt/c"
    ))?;
    let ended = Arc::new(AtomicBool::new(false));
    let load = std::thread::spawn({
        let ended = Arc::clone(&ended);
        move || {
            // It ends when the file that it looks for is there.
            let result = sh_in(
                "echo $$ > /tmp/load.pid
                 fio --name=c --directory=/mnt/c --size=80m --direct=1 --ioengine=io_uring --iodepth=32 \
                   --rw=randwrite --bsrange=512-64k --blockalign=512 --verify=crc32c --verify_fatal=1 --time_based \
                   --runtime=36000 --verify_backlog=512 --verify_state_save=0 --trigger-file=/tmp/load.end --trigger=true \
                   > /tmp/fio.out 2>&1 || { cat /tmp/fio.out; exit 1; }",
                1200,
            );
            ended.store(true, Ordering::SeqCst);
            result
        }
    });
    let result = kill_all(&rig, &device, kills, &ended);
    let _ = sh("touch /tmp/load.end; pkill -CONT fio");
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    sh("rm -f /tmp/load.end")?;
    let mut took = result?;
    took.sort();
    let ms = |nth: usize| took[nth].as_secs_f64() * 1e3;
    figure(format!(
        "{level} {policy} {lost} away, {kills} kills, to the first request answered: median {:.0} ms, worst {:.0} ms",
        ms(took.len() / 2),
        ms(took.len() - 1)
    ));
    sh_in(&format!("umount /mnt/c && e2fsck -fn {device}"), 100)?;
    let state = rig.state()?.0;
    let wanted = if lost > 0 { "degraded" } else { "optimal" };
    ensure(state == wanted, || format!("the group is {state}"))
}

/// Answers how long each kill kept requests waiting: until the first one was answered.
fn kill_all(
    rig: &Rig,
    device: &str,
    kills: u32,
    ended: &AtomicBool,
) -> Result<Vec<Duration>, Failure> {
    let mut took = Vec::new();
    for kill in 0..kills {
        pause(300 + u64::from(kill) * 37 % 500);
        let pid = rig.target_pid()?;
        sh(&format!("kill -STOP {pid}"))?;
        // The verifying reads of the load come one after the other: then there is nothing to be held, for a moment.
        let full = until("16 requests are in flight", 60, || {
            if in_flight(device)? < IN_FLIGHT && !ended.load(Ordering::SeqCst) {
                sh(&format!(
                    "kill -CONT {pid}; sleep 0.05; kill -STOP {pid}; sleep 0.2"
                ))?;
            }
            Ok(in_flight(device)? >= IN_FLIGHT)
        });
        sh("pkill -STOP -x fio")?;
        let waiting = in_flight(device)?;
        sh(&format!("kill -KILL {pid}"))?;
        let killed = Instant::now();
        full?;
        while in_flight(device)? >= waiting && killed.elapsed() < LIMIT {
            pause(2);
        }
        took.push(killed.elapsed());
        until("a successor that has served them", 60, || {
            Ok(rig.target_pid().is_ok_and(|new| new != pid) && in_flight(device)? == 0)
        })
        .map_err(|why| format!("kill {kill}: {why}\n{}", rig.log_tail()))?;
        // The load still stands: what the successor has served are those requests. mgmtd asks it now and then.
        let reissued = until("they are counted", 20, || Ok(served(rig)? >= waiting));
        sh("pkill -CONT -x fio")?;
        reissued.map_err(|why| format!("kill {kill}: of {waiting} in flight: {why}"))?;
        ensure(!ended.load(Ordering::SeqCst), || {
            format!("the load ended before kill {kill}")
        })?;
    }
    Ok(took)
}

/// What a superblock says, and where: copy 0, read past Lunar.
fn superblock_of(path: &str) -> Result<Superblock, Failure> {
    let size = sh(&format!("blockdev --getsize64 {path}"))?;
    let at = At {
        offset: 4096,
        device_size: size.parse().map_err(|_| "size")?,
    };
    let bytes = blocks::read(path, at.offset, superblock::BYTES)?;
    superblock::decode(bytes.get(), at).map_err(|error| format!("{path}: {error}"))
}

/// Regions that a member's intent map has marked, and bytes of one, read past Lunar.
fn marked(path: &str) -> Result<(RegionSet, u64), Failure> {
    let member = superblock_of(path)?.member.ok_or("no member")?;
    let region = member.group.region_bytes;
    let mut set = RegionSet::new(member.group.member_bytes.div_ceil(region));
    for page in 0..set.regions().div_ceil(PAGE_REGIONS) {
        let at = member.layout.intent.offset + page * PAGE as u64;
        let bytes = blocks::read(path, at, PAGE)?;
        let bytes = bytes.get().try_into().map_err(|_| "a page")?;
        set.add_page(Kind::Intent, member.group.uuid, page, Some(bytes));
    }
    Ok((set, region))
}

/// Spoils the parity of the stripe that a byte of the group is in; a mirror has none.
fn spoil_parity(paths: &[String], address: u64) -> Result<(), Failure> {
    let member = superblock_of(&paths[0])?.member.ok_or("no member")?;
    let geometry = member.group.geometry().map_err(|error| error.to_string())?;
    let chunk = geometry.chunk();
    let stripe = address / chunk / u64::from(geometry.data_slots());
    let Some(slot) = geometry.parity_slots(stripe).next() else {
        return Ok(());
    };
    let path = &paths[usize::from(slot)];
    let own = superblock_of(path)?.member.ok_or("no member")?;
    let at = (own.layout.data_offset + stripe * chunk) / 4096;
    sh(&format!(
        "dd if=/dev/urandom of={path} bs=4k seek={at} count={} oflag=direct 2>/dev/null",
        chunk / 4096
    ))
    .map(drop)
}

/// Given a `bitmap` group of which some places were being written, when all of Lunar dies and the in-flight log with it (as
/// by a power cut), and parity there is torn, then the next start resyncs the regions that the members have marked and
/// reads no more than those, all reads as written meanwhile, and after it also without a member.
fn bounded_resync(level: &str) -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let create = [
        "--level",
        level,
        "--consistency",
        "bitmap",
        "--assume-clean",
    ];
    let paths = rig.array("dm", 4, 256, &[&create[..], &["--chunk", "64KiB"]].concat())?;
    fill(&rig)?;
    for is_slow in [false, true] {
        rig.rebuild_rate(if is_slow { "8KiB" } else { "1GiB" })?;
        until("nothing is marked", 60, || {
            Ok(marked(&paths[0])?.0.is_empty())
        })?;
        let device = rig.device()?;
        let places: Vec<u64> = (0..24).map(|i| 5 + i * 1024).collect();
        // The bytes that are there, written once more.
        for at in &places {
            sh(&format!(
                "dd if={device} of=/tmp/same bs=4k skip={at} count=1 iflag=direct 2>/dev/null
                 dd if=/tmp/same of={device} bs=4k seek={at} count=1 oflag=direct 2>/dev/null"
            ))?;
        }
        let pid = rig.target_pid()?;
        let mgmtd = rig.mgmtd_pid();
        sh(&format!("kill -KILL {mgmtd} {pid}"))?;
        rig.end_mgmtd("KILL")?;
        until("ublk-target is dead", 30, || {
            Ok(!std::path::Path::new(&format!("/proc/{pid}")).exists())
        })?;
        sh("rm -r /run/lunar/inflight")?;
        let (regions, region) = marked(&paths[0])?;
        let dirty = regions.len();
        ensure((1..=2 * places.len() as u64).contains(&dirty), || {
            format!("{dirty} regions are marked")
        })?;
        for at in &places {
            spoil_parity(&paths, at * 4096)?;
        }
        let read = || -> Result<u64, Failure> {
            let mut most = 0;
            for path in &paths {
                most = most.max(read_bytes(path)?);
            }
            Ok(most)
        };
        let before = read()?;
        rig.start()?;
        rig.wait_lu()?;
        if is_slow {
            compare(&rig, "while it is resynced")?;
            let group = rig.json(&["group", "show", "data"])?;
            ensure(!group["sync"].is_null(), || "the resync had ended".into())?;
            rig.rebuild_rate("1GiB")?;
        }
        rig.wait_optimal(100)?;
        let bytes = read()? - before;
        // Beside the data: superblocks, maps and configuration, well below 4 MiB.
        let most = dirty * region + (4 << 20);
        ensure(is_slow || bytes <= most, || {
            format!(
                "{bytes} bytes of a member were read, {dirty} regions of {region} bytes were marked"
            )
        })?;
        ensure(is_slow || bytes >= dirty * region / 2, || {
            format!("{bytes} bytes of a member were read: nothing was resynced")
        })?;
        scrub_finds_nothing(&rig)?;
    }
    rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    compare(&rig, "without a member")
}
