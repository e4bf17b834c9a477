//! Inside the machine whose power is cut: brings Lunar up, checks what is there, and writes until the end.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::job::{Job, Report, policies};
use super::model::Place;
use super::places::Places;
use super::stamp::{self, SECTOR};
use super::writers::{self, RAW_WRITERS, SECTORS};
use crate::e2e::blocks;
use crate::e2e::rig::{Rig, text};
use crate::e2e::shell::{Failure, run, sh, sh_in, until};

const STATE: &str = "/mnt/state";
const MOUNT: &str = "/mnt/fs";
const RAW: &str = "/dev/lunar/raw";
/// The file that is written instead, where FUA is to be alone.
const RAW_MOUNT: &str = "/mnt/raw";
const RAW_FILE: &str = "/mnt/raw/file";
/// MiB of the LU that such a file system takes beside it.
const RAW_MORE_MIB: u64 = 8;
const FS: &str = "/dev/lunar/fs";
/// MiB of the LU with a file system.
const FS_MIB: u64 = 40;
/// Most differences that are told.
const TOLD: usize = 8;

/// One boot. Never returns well but for the last one.
pub fn main(dir: &Path) -> Result<(), Failure> {
    let job = Job::read(dir)?;
    let mut report = Report::create(dir, job.boot).map_err(|error| error.to_string())?;
    let done = boot(dir, &job, &mut report);
    match &done {
        Ok(()) => report.say("done", json!({})),
        Err(why) => report.say("failed", json!({ "why": why })),
    }
    done
}

/// The device of a disk of the server.
pub(super) fn device(disk: usize) -> String {
    let letter = b'a' + u8::try_from(disk).expect("16 disks at most");
    format!("/dev/ubd{}", char::from(letter))
}

/// The disk of a device.
fn disk_of(path: &str) -> Option<usize> {
    let letter = path.strip_prefix("/dev/ubd")?.bytes().next()?;
    letter.checked_sub(b'a').map(usize::from)
}

fn boot(dir: &Path, job: &Job, report: &mut Report) -> Result<(), Failure> {
    let state = device(0);
    if job.boot == 0 {
        sh(&format!("mkfs.ext4 -q -F {state}"))?;
    }
    sh(&format!(
        "mkdir -p {STATE} {MOUNT} && mount -t ext4 {state} {STATE}"
    ))?;
    let rig = Rig::in_state(STATE)?;
    report.say("up", json!({}));
    let log = |why: Failure| format!("{why}\n{}", rig.log_tail());
    if job.boot == 0 {
        create(job, &rig).map_err(log)?;
        start_anew(dir, job)?;
    } else if !check(dir, job, &rig, report).map_err(log)? {
        return Ok(()); // refused, and said so
    }
    disks_again(job, &rig, report).map_err(log)?;
    if job.firm || job.last {
        stand_firm(dir, job, &rig, report).map_err(log)?;
    }
    if job.last {
        sh(&format!(
            "umount {MOUNT}; umount {RAW_MOUNT} 2>/dev/null || true"
        ))?;
        let mut rig = rig;
        return rig.shutdown();
    }
    say_group(&rig, report)?;
    let why = load(dir, job, &rig, report);
    Err(log(why))
}

fn create(job: &Job, rig: &Rig) -> Result<(), Failure> {
    let (members, spares) = job.there.split_at(job.members);
    let paths: Vec<_> = members.iter().map(|disk| device(*disk)).collect();
    let mut add = vec!["disk", "add"];
    add.extend(paths.iter().map(String::as_str));
    rig.lunar(&add)?;
    for spare in spares {
        rig.lunar(&["disk", "add", "--role", "spare", &device(*spare)])?;
    }
    let list = paths.join(",");
    let chunk = format!("{}KiB", job.chunk_kib);
    let mut group = vec![
        "group", "create", "data", "--disks", &list, "--level", job.level,
    ];
    // The default of a level needs no word.
    if job.policy != policies(job.level)[0] {
        group.extend(["--consistency", job.policy]);
    }
    if job.level != "raid1" {
        group.extend(["--chunk", &chunk]);
    }
    if job.assume_clean {
        group.push("--assume-clean");
    }
    rig.lunar(&group)?;
    let more = if job.in_file { RAW_MORE_MIB } else { 0 };
    let sizes = [SECTORS / 2048 + more, FS_MIB];
    for (lu, mib) in ["raw", "fs"].iter().zip(sizes) {
        let size = format!("{mib}MiB");
        rig.lunar(&["lu", "create", lu, "--group", "data", "--size", &size])?;
    }
    Ok(())
}

/// Empties both LUs and begins to count anew.
fn start_anew(dir: &Path, job: &Job) -> Result<(), Failure> {
    if job.in_file {
        sh_in(
            &format!(
                "! mountpoint -q {RAW_MOUNT} || umount {RAW_MOUNT}; mkdir -p {RAW_MOUNT}
                 mkfs.ext4 -q -F -b 4096 -O ^has_journal -E nodiscard {RAW} && mount -o noatime {RAW} {RAW_MOUNT}
                 : > {RAW_FILE}"
            ),
            120,
        )?;
    }
    let to = raw_path(job);
    sh_in(
        &format!(
            "! mountpoint -q {MOUNT} || umount {MOUNT}
             dd if=/dev/zero of={to} bs=1M count={} oflag=direct conv=fsync,notrunc status=none
             mkfs.ext4 -q -F -E nodiscard {FS} && mount -t ext4 {FS} {MOUNT}",
            SECTORS / 2048
        ),
        120,
    )?;
    if job.in_file {
        // One extent, or nobody could say which stripe a sector is in.
        let at = sh(&format!(
            "filefrag -b512 -v {RAW_FILE} | awk '$1 == \"0:\" {{ sub(/\\.\\..*/, \"\", $4); print $4; n++ }} $1 == \"1:\" {{ exit 1 }}'"
        ))?;
        fs::write(super::places::shift_path(dir), at).map_err(|error| error.to_string())?;
    }
    let places = Places::read(dir, job.boot, SECTORS, job.stripe_sectors());
    let lus = places.map_err(|error| error.to_string())?.lus;
    let zeroes = (0..SECTORS + super::places::FILES).map(|_| 0);
    let values = zeroes.chain(lus.iter().map(shown_lu));
    Places::stand(dir, job.boot, values).map_err(|error| error.to_string())?;
    let _ = fs::remove_file(dir.join("anew"));
    Ok(())
}

/// Where the raw writers write.
fn raw_path(job: &Job) -> &'static str {
    if job.in_file { RAW_FILE } else { RAW }
}

/// True if a failure says that something is not what it must be, and not that the test could not go on.
pub(super) fn is_loss(why: &str) -> bool {
    let first = why.lines().next().unwrap_or_default();
    first.contains("sectors are wrong")
        || first.starts_with("file ")
        || first.starts_with("once in sync")
}

/// A value of the LU that says if it is there; which of several writes did it does not matter.
fn shown_lu(place: &Place) -> u64 {
    u64::from(lu_is_there() == Some(true)) + 2 * (place.durable >> 1)
}

fn lu_is_there() -> Option<bool> {
    let there = run("test", &["-b", "/dev/lunar/tmp"], 5).ok()?;
    Some(there.code == 0)
}

/// Waits for the group, starts it if it may, and checks everything. False: it is refused, for a good reason.
fn check(dir: &Path, job: &Job, rig: &Rig, report: &mut Report) -> Result<bool, Failure> {
    let group = say_group(rig, report)?;
    let mut forced = false;
    if text(&group["state"]) == "stopped" {
        let reason = text(&group["reason"]);
        report.say("refused", json!({ "reason": reason }));
        // The one reason that there may be; the host knows if there may be one.
        if job.has_log() || !reason.contains("not stopped cleanly and is degraded") {
            return Err(format!("refused: {group}"));
        }
        if !job.force {
            return Ok(false);
        }
        fs::write(dir.join("anew"), "").map_err(|error| error.to_string())?;
        rig.lunar(&["group", "start", "data", "--force", "--yes"])?;
        forced = true;
    }
    until("the LUs are up", 60, || {
        Ok(run("test", &["-b", RAW, "-a", "-b", FS], 5)?.code == 0)
    })?;
    let part = job.stripe_sectors();
    let places = Places::read(dir, job.boot, SECTORS, part);
    let places = places.map_err(|error| error.to_string())?;
    check_lu(rig, &places)?;
    let anew = dir.join("anew").exists();
    if job.in_file && (forced || !anew) {
        sh(&format!(
            "mkdir -p {RAW_MOUNT} && mount -o noatime {RAW} {RAW_MOUNT}"
        ))?;
    }
    let whole = match text(&group["state"]).as_str() {
        _ if forced => Whole::Forced,
        "optimal" => Whole::Yes,
        _ => Whole::Degraded,
    };
    let (hole, sectors) = if anew && !forced {
        (0, 0) // what a cut left of a start anew
    } else {
        check_raw(job, &places, whole)?
    };
    // What is spoilt stays so; from here on it counts for nothing.
    let anew = anew || hole > 0;
    if anew {
        fs::write(dir.join("anew"), "").map_err(|error| error.to_string())?;
    }
    if anew {
        start_anew(dir, job)?;
    } else {
        check_files(job, &places)?;
    }
    let files = places
        .files
        .iter()
        .filter(|place| place.durable != 0)
        .count();
    report.say(
        "checked",
        json!({ "sectors": sectors, "files": files, "hole": hole, "forced": forced, "anew": anew }),
    );
    Ok(true)
}

/// What the group is now, said to the host too.
fn say_group(rig: &Rig, report: &mut Report) -> Result<Value, Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    let members = group["members"].as_array().cloned().unwrap_or_default();
    let of = |member: &Value| json!({ "state": member["state"], "disk": member["path"].as_str().and_then(disk_of) });
    let members: Vec<Value> = members.iter().map(of).collect();
    report.say(
        "group",
        json!({ "state": group["state"], "reason": group["reason"], "members": members }),
    );
    Ok(group)
}

/// The LUs that there must be are there, and no other.
fn check_lu(rig: &Rig, places: &Places) -> Result<(), Failure> {
    let list = rig.json(&["lu", "list"])?;
    let lus = list.as_array().cloned().unwrap_or_default();
    let mut names: Vec<String> = lus.iter().map(|lu| text(&lu["name"])).collect();
    names.sort();
    let there = names.iter().any(|name| name == "tmp");
    names.retain(|name| name != "tmp");
    let place = &places.lus[0];
    let may = place.later.iter().chain([&place.durable]);
    let may = may.into_iter().any(|seq| (seq & 1 == 1) == there);
    if names != ["fs", "raw"] || !may {
        return Err(format!(
            "LUs {names:?}, tmp there: {there}, but it stands at {}",
            place.says()
        ));
    }
    Ok(())
}

/// With what a group came up.
#[derive(Clone, Copy)]
enum Whole {
    Yes,
    Degraded,
    /// Degraded, and only by force.
    Forced,
}

/// Reads the raw LU and judges each sector. Returns sectors in the write hole that hold something else, and how many
/// were judged without that excuse.
fn check_raw(job: &Job, places: &Places, whole: Whole) -> Result<(u64, u64), Failure> {
    let (shown, wrong) = read_raw(job, places)?;
    // With a log only a sector that was itself being written may be lost with its member (law 6 of the engine's `ppl`).
    let excused = |sector: usize| match whole {
        Whole::Forced => job.has_parity() && places.open[places.parts.of(sector)],
        Whole::Degraded => job.has_log() && !places.sectors[sector].later.is_empty(),
        Whole::Yes => false,
    };
    let (hole, bad): (Vec<_>, Vec<_>) = wrong.into_iter().partition(|(at, _)| excused(*at));
    let judged = (0..shown.len()).filter(|at| !excused(*at)).count();
    if bad.is_empty() {
        return Ok((hole.len() as u64, judged as u64));
    }
    let told: Vec<_> = bad.iter().take(TOLD).map(|(_, why)| why.as_str()).collect();
    Err(format!(
        "{} of {judged} sectors are wrong: {}",
        bad.len(),
        told.join("; ")
    ))
}

/// What each sector shows, and which show what they may not.
type Shown = (Vec<u64>, Vec<(usize, String)>);

fn read_raw(job: &Job, places: &Places) -> Result<Shown, Failure> {
    let mut shown = Vec::new();
    let mut wrong = Vec::new();
    const STEP: u64 = 2048;
    for first in (0..SECTORS).step_by(usize::try_from(STEP).expect("small")) {
        let len = usize::try_from(STEP).expect("small") * SECTOR;
        let pages = blocks::read(raw_path(job), first * SECTOR as u64, len)?;
        for (at, sector) in (first..).zip(pages.get().chunks_exact(SECTOR)) {
            let index = usize::try_from(at).expect("small");
            let place = &places.sectors[index];
            let why = match stamp::read(job.run, at, sector) {
                Ok(seq) => {
                    shown.push(seq);
                    if place.may_show(seq) {
                        continue;
                    }
                    format!("write {seq:x}")
                }
                Err(why) => {
                    shown.push(0);
                    why
                }
            };
            wrong.push((index, format!("sector {at}: {why}, not {}", place.says())));
        }
    }
    Ok((shown, wrong))
}

/// The file system is whole once its journal has been replayed, and every file is one that it may be.
fn check_files(job: &Job, places: &Places) -> Result<(), Failure> {
    sh_in(
        &format!(
            "mount -t ext4 {FS} {MOUNT} && umount {MOUNT} && e2fsck -fn {FS} && mount -t ext4 {FS} {MOUNT}"
        ),
        60,
    )?;
    for (file, place) in (0..).zip(&places.files) {
        let shown = writers::read_file(MOUNT, job.run, file)
            .map_err(|why| format!("file {file}: {why}, not {}", place.says()))?;
        let right = match shown {
            Some(seq) => place.may_show(seq),
            None => {
                writers::is_absent(place.durable)
                    || place.later.iter().any(|seq| writers::is_absent(*seq))
            }
        };
        if !right {
            return Err(format!("file {file} is {shown:x?}, not {}", place.says()));
        }
    }
    Ok(())
}

/// Disks that came back, empty or stale, become spares.
fn disks_again(job: &Job, rig: &Rig, report: &mut Report) -> Result<(), Failure> {
    const USED: [&str; 4] = ["in_sync", "rebuilding", "spare", "stopped"];
    let list = rig.json(&["disk", "list"])?;
    let rows = list.as_array().cloned().unwrap_or_default();
    let short = |row: &Value| json!([row["disk"], row["path"], row["role"], row["state"]]);
    let short: Vec<Value> = rows.iter().map(short).collect();
    report.say("disks", json!({ "disks": short }));
    for disk in &job.there {
        let path = device(*disk);
        let is_used = |row: &&Value| USED.iter().any(|state| row["state"] == *state);
        let here: Vec<&Value> = rows.iter().filter(|row| row["path"] == *path).collect();
        if here.iter().any(is_used) {
            continue;
        }
        rig.lunar(&["disk", "add", "--role", "spare", &path])?;
    }
    Ok(())
}

/// Waits until all is in sync, compares redundancy, and takes what is there for what stands.
fn stand_firm(dir: &Path, job: &Job, rig: &Rig, report: &mut Report) -> Result<(), Failure> {
    until("all is in sync", 120, || {
        let group = rig.json(&["group", "show", "data"])?;
        let waits = text(&group["state"]) == "degraded" && job.there.len() < job.members;
        Ok(group["sync"].is_null() && (text(&group["state"]) == "optimal" || waits))
    })
    .map_err(|why| {
        format!(
            "{why}: {:?}",
            rig.run(&["table", "disks"]).map(|said| said.stdout)
        )
    })?;
    let (state, _) = rig.state()?;
    if state != "optimal" {
        return Ok(());
    }
    rig.lunar(&["group", "scrub", "data", "--wait"])?;
    let scrub = rig.json(&["group", "show", "data"])?["scrub"].clone();
    let places = Places::read(dir, job.boot, SECTORS, job.stripe_sectors());
    let places = places.map_err(|error| error.to_string())?;
    let (shown, wrong) = read_raw(job, &places)?;
    if let Some((_, why)) = wrong.first() {
        return Err(format!("once in sync: {why}"));
    }
    let files = (0..super::places::FILES).map(|file| {
        let shown = writers::read_file(MOUNT, job.run, file)?;
        // What removed it is not to be seen; any such write will do.
        Ok(shown.unwrap_or(1))
    });
    let files: Vec<u64> = files.collect::<Result<_, String>>()?;
    let lus = places.lus.iter().map(shown_lu);
    let values = shown.into_iter().chain(files).chain(lus);
    Places::stand(dir, job.boot, values).map_err(|error| error.to_string())?;
    report.say("firm", json!({ "scrub": scrub }));
    Ok(())
}

/// Writes until the power goes. Returns why it did not.
fn load(dir: &Path, job: &Job, rig: &Rig, report: &mut Report) -> Failure {
    let there = lu_is_there() == Some(true);
    std::thread::scope(|scope| {
        let (failed, first) = std::sync::mpsc::channel();
        for writer in 0..RAW_WRITERS {
            let failed = failed.clone();
            scope.spawn(move || failed.send(writers::raw(dir, job, raw_path(job), writer)));
        }
        let failed_file = failed.clone();
        scope.spawn(move || failed_file.send(writers::files(dir, job, MOUNT)));
        if job.admin {
            let failed = failed.clone();
            scope.spawn(move || failed.send(writers::lus(dir, job, rig, there)));
        }
        report.say("load", json!({}));
        match first.recv() {
            Ok(Err(why)) => report.say("failed", json!({ "why": why, "log": rig.log_tail() })),
            Ok(Ok(())) | Err(_) => report.say("failed", json!({ "why": "a writer ended" })),
        }
        // The others never end; the machine does.
        std::process::exit(1)
    })
}
