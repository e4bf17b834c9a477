//! Scrub: damage done to the member disks behind Lunar's back is told exactly, put right, and nothing else is told.

use serde_json::Value;

use super::disks::redundancy_is_right;
use super::rig::{Rig, text};
use super::shell::{Failure, sh, sh_in, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for (kind, level, count) in [
        ("ram", "raid5", 4),
        ("ram", "raid1", 2),
        ("ext4-file", "raid5", 3),
        ("4k", "raid1", 3),
    ] {
        let name = format!("scrub_tells_and_repairs_damage_{level}_of_{count}_{kind}");
        add(to, name, move || damage(kind, level, count));
    }
    for level in ["raid5", "raid1"] {
        add(
            to,
            format!("scrub_under_load_finds_nothing_{level}"),
            move || under_load(level),
        );
    }
    add(to, "scrub_goes_on_after_kills_and_restarts", restarts);
    add(
        to,
        "scrub_is_refused_where_nothing_can_be_compared",
        refused,
    );
}

const CHUNK: u64 = 64 << 10;
const CONTENT: u64 = 48 << 20;

/// An array of zeroed members with random content in its first bytes, which `/tmp/content` keeps.
fn filled(rig: &Rig, kind: &str, level: &str, count: usize) -> Result<Vec<String>, Failure> {
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    let paths = rig.array(kind, count, 192, &create)?;
    sh(&format!(
        "dd if=/dev/urandom of=/tmp/content bs=1M count={} 2>/dev/null
         dd if=/tmp/content of={} bs=1M oflag=direct 2>/dev/null",
        CONTENT >> 20,
        rig.device()?
    ))?;
    Ok(paths)
}

fn content_is_right(rig: &Rig) -> Result<(), Failure> {
    let device = rig.device()?;
    sh(&format!(
        "blockdev --flushbufs {device}; cmp -n {CONTENT} /tmp/content {device} >&2"
    ))
    .map(drop)
}

/// The slot of a stripe that md's repair puts right: parity, or a leg that is not the lowest.
fn redundant_slot(level: &str, count: usize, stripe: u64) -> usize {
    let turn = usize::try_from(stripe).expect("small");
    match level {
        "raid1" => 1 + turn % (count - 1),
        _ => count - 1 - turn % count,
    }
}

/// Writes noise over a part of a stripe's chunk, past Lunar; the part ends in a block of 4 KiB.
fn damage_stripe(rig: &Rig, path: &str, slot: usize, stripe: u64, at: u64) -> Result<(), Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    let offset = group["members"][slot]["data_offset"].as_u64();
    let seek = offset.ok_or("no data_offset")? + stripe * CHUNK + at;
    sh(&format!(
        "dd if=/dev/urandom of={path} bs=4k count=1 seek={seek} oflag=direct,seek_bytes conv=notrunc 2>/dev/null"
    ))
    .map(drop)
}

/// Runs a scrub to its end; gives its exit code and what the group says of it.
fn scrub(rig: &Rig, extra: &[&str]) -> Result<(i32, Value), Failure> {
    let mut args = vec!["group", "scrub", "data", "--wait"];
    args.extend(extra);
    let output = rig.run(&args)?;
    let row = rig.json(&["group", "show", "data"])?["scrub"].clone();
    ensure(text(&row["state"]) == "done", || {
        format!("{args:?}: {}{} {row}", output.stdout, output.stderr)
    })?;
    Ok((output.code, row))
}

fn stripes(row: &Value) -> Vec<u64> {
    let list = row["stripes"].as_array().cloned().unwrap_or_default();
    list.iter()
        .filter_map(|bad| bad["stripe"].as_u64())
        .collect()
}

/// Given a healthy group with content, when so many chunks are damaged on the member disks, then a scrub before says 0,
/// one after says exactly those stripes and exits 1, a repair puts them right, and then it is 0 again; every byte of
/// the content is as written, also with the last member away.
fn damage(kind: &str, level: &str, count: usize) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = filled(&rig, kind, level, count)?;
    let (code, row) = scrub(&rig, &[])?;
    ensure(code == 0 && row["bad"] == 0, || {
        format!("before: {code} {row}")
    })?;
    let planted = [0, 1, 7, 100, 333, 1500];
    for stripe in planted {
        let slot = redundant_slot(level, count, stripe);
        damage_stripe(&rig, &paths[slot], slot, stripe, 4096 * (stripe % 16))?;
    }
    let (code, row) = scrub(&rig, &[])?;
    ensure(
        code == 1 && stripes(&row) == planted && row["repaired"] == 0,
        || format!("damaged {planted:?}: {code} {row}"),
    )?;
    for bad in row["stripes"].as_array().into_iter().flatten() {
        let stripe = bad["stripe"].as_u64().unwrap_or(u64::MAX);
        let at = stripe * CHUNK + 4096 * (stripe % 16);
        let found = bad["at"].as_u64().unwrap_or(0)..;
        let inside = found.contains(&at) || bad["at"].as_u64() == Some(at);
        ensure(inside && bad["lu_name"] == "vol", || format!("{bad}"))?;
    }
    let status = rig.run(&["status"])?;
    for what in ["scan: scrub 6 bad stripes found", "--repair"] {
        ensure(status.stdout.contains(what) && status.code == 0, || {
            format!("no `{what}`: {}", status.stdout)
        })?;
    }
    // A mirror may be read from a damaged leg until it is repaired; parity is not read at all.
    if level != "raid1" {
        content_is_right(&rig)?;
    }
    let (code, row) = scrub(&rig, &["--repair"])?;
    ensure(code == 0 && row["bad"] == 6 && row["repaired"] == 6, || {
        format!("repair: {code} {row}")
    })?;
    let shown = rig.run(&["status"])?.stdout;
    ensure(
        shown.contains("scrub (repair) repaired 6 stripes, 0 remain, ended 20"),
        || shown.clone(),
    )?;
    let (code, row) = scrub(&rig, &[])?;
    ensure(code == 0 && row["bad"] == 0, || {
        format!("after: {code} {row}")
    })?;
    redundancy_is_right(
        &rig,
        level,
        &paths,
        usize::try_from(CONTENT / 2).expect("small"),
    )?;
    content_is_right(&rig)?;
    rig.lunar(&["disk", "fail", &paths[count - 1], "--yes"])?;
    content_is_right(&rig)
}

/// Given verified writes under way, when the group is scrubbed again and again, then nothing is ever found.
fn under_load(level: &str) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    rig.array("ram", 4, 192, &create)?;
    let device = rig.device()?;
    // Without bounds a scrub under load goes at the pace of a resync under load.
    rig.lunar(&["group", "set", "data", "--rebuild-min", "400MiB"])?;
    let load = std::thread::spawn(move || {
        sh_in(
            &format!(
                "fio --name=s --filename={device} --size=96m --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
                 --bsrange=512-256k --blockalign=512 --verify=crc32c --verify_fatal=1 --time_based --runtime=20 \
                 --verify_backlog=256 >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
            ),
            200,
        )
    });
    let mut rounds = 0;
    while !load.is_finished() {
        let (code, row) = scrub(&rig, &["--repair"])?;
        ensure(
            code == 0 && row["bad"] == 0 && row["unreadable"] == 0,
            || format!("under load: {code} {row}"),
        )?;
        rounds += 1;
    }
    load.join().map_err(|_| "thread")??;
    ensure(rounds >= 2, || format!("{rounds} scrubs while fio wrote"))
}

/// Given a slow repair, when ublk-target is killed, mgmtd is killed, and all is shut down and started again, then it goes
/// on each time under the same job, stands while it is paused, and tells every damaged stripe in the end.
fn restarts() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = filled(&rig, "ram", "raid5", 4)?;
    let planted = [10, 1000, 2000, 2500];
    for stripe in planted {
        let slot = redundant_slot("raid5", 4, stripe);
        damage_stripe(&rig, &paths[slot], slot, stripe, 0)?;
    }
    rig.lunar(&["group", "scrub", "data", "--repair", "--rate", "12MiB"])?;
    let done = |rig: &Rig| -> Result<u64, Failure> {
        let row = rig.json(&["group", "show", "data"])?["scrub"].clone();
        row["done"].as_u64().ok_or_else(|| format!("{row}"))
    };
    let reaches = |rig: &Rig, mib: u64| {
        until(&format!("it is at {mib} MiB"), 60, || {
            Ok(done(rig).is_ok_and(|done| done >= mib << 20))
        })
    };
    reaches(&rig, 16)?;
    let pid = rig.target_pid()?;
    sh(&format!("kill -KILL {pid}"))?;
    until("a successor", 60, || {
        Ok(rig.target_pid().is_ok_and(|new| new != pid))
    })?;
    reaches(&rig, 32)?;
    rig.lunar(&["group", "scrub", "data", "--pause"])?;
    let stood = done(&rig)?;
    rig.end_mgmtd("KILL")?;
    rig.start()?;
    rig.shutdown()?;
    rig.start()?;
    until("the group is up", 60, || {
        Ok(rig.state().is_ok_and(|(state, _)| state == "optimal"))
    })?;
    let jobs = rig.json(&["job", "list"])?;
    let scrubs: Vec<&Value> = jobs.as_array().into_iter().flatten().collect();
    ensure(
        scrubs.len() == 1 && scrubs[0]["state"] == "paused" && done(&rig)? == stood,
        || format!("{jobs}"),
    )?;
    let shown = rig.run(&["status"])?.stdout;
    ensure(shown.contains("scrub (repair) paused at"), || shown.clone())?;
    rig.lunar(&["group", "scrub", "data", "--resume"])?;
    let again = rig.lunar(&["group", "scrub", "data", "--resume"])?;
    ensure(again.contains("running"), || again.clone())?;
    let job = scrubs[0]["job"].to_string();
    rig.lunar(&["job", "watch", &job])?;
    let row = rig.json(&["group", "show", "data"])?["scrub"].clone();
    ensure(stripes(&row) == planted && row["repaired"] == 4, || {
        format!("{row}")
    })?;
    let (code, row) = scrub(&rig, &[])?;
    ensure(code == 0 && row["bad"] == 0, || {
        format!("after: {code} {row}")
    })?;
    rig.lunar(&["group", "scrub", "data", "--rate", "4MiB"])?;
    let jobs = rig.json(&["job", "list"])?;
    let last = jobs
        .as_array()
        .and_then(|all| all.last())
        .map(|job| job["job"].to_string());
    rig.lunar(&["job", "cancel", &last.ok_or("no job")?])?;
    let row = rig.json(&["group", "show", "data"])?["scrub"].clone();
    ensure(text(&row["state"]) == "cancelled", || format!("{row}"))?;
    content_is_right(&rig)
}

/// Given a group without redundancy, or one that has lost it, when a scrub is asked for, then it is refused with the
/// reason and what to type; steering a scrub that is not there as well.
fn refused() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = rig.array("ram", 3, 192, &["--level", "raid5", "--assume-clean"])?;
    rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    for (args, code, says) in [
        (&["group", "scrub", "data"][..], 3, "degraded"),
        (
            &["group", "scrub", "data", "--pause"],
            2,
            "no scrub of it is running",
        ),
        (
            &["group", "scrub", "data", "--pause", "--repair"],
            2,
            "cannot be used with",
        ),
        (&["group", "scrub", "none"], 2, "there is no group"),
    ] {
        let output = rig.run(args)?;
        ensure(output.code == code && output.stderr.contains(says), || {
            format!(
                "{args:?}: {} {}{}",
                output.code, output.stdout, output.stderr
            )
        })?;
    }
    let cancelled = rig.lunar(&["group", "scrub", "data", "--cancel"])?;
    ensure(cancelled.contains("no scrub is running"), || {
        cancelled.clone()
    })
}
