//! Looks at every disk there is, and corrects the tables by what the disks carry.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use lunar_api::rows::{Stranger, StrangerKind};
use lunar_api::target::{Probe, TargetAnswer, TargetRequest};
use lunar_api::{ApiError, DiskUuid};

use crate::daemon::{About, Daemon};
use crate::limits::OPEN_LIMIT;
use crate::link::unexpected;
use crate::opener::open_plain;
use crate::probe::{behind, candidates, identify, stable_path};
use crate::sightings::{self, Sightings};
use crate::tables::DiskSave;

/// Most paths probed in one message.
const PROBE_MAX: usize = 64;

/// Asks ublk-target what is on these paths, each by itself: one that hangs or fails is named in `bad_paths` and
/// holds up no other. Those that are not there are left out.
///
/// # Errors  ublk-target does not answer
pub async fn probe_paths(daemon: &Daemon, paths: &[PathBuf]) -> Result<Vec<Probe>, ApiError> {
    let mut out = Vec::new();
    for some in paths.chunks(PROBE_MAX) {
        let (paths, fds) = open_each(daemon, some).await;
        if paths.is_empty() {
            continue;
        }
        let disks = match daemon.ask(&TargetRequest::Probe { paths }, fds).await? {
            TargetAnswer::Probed { disks } => disks,
            other => return Err(unexpected(&other)),
        };
        for probe in disks {
            name_bad(daemon, &probe.path, probe.problem.clone());
            out.push(probe);
        }
    }
    Ok(out)
}

/// Opens paths side by side for a look; what does not open in time is named and left behind.
async fn open_each(daemon: &Daemon, paths: &[PathBuf]) -> (Vec<String>, Vec<OwnedFd>) {
    let opening: Vec<_> = paths
        .iter()
        .map(|path| {
            let at = path.clone();
            let open = tokio::task::spawn_blocking(move || open_plain(&at));
            (path.display().to_string(), open)
        })
        .collect();
    let end = tokio::time::Instant::now() + OPEN_LIMIT;
    let (mut names, mut fds) = (Vec::new(), Vec::new());
    for (path, open) in opening {
        let problem = match tokio::time::timeout_at(end, open).await {
            Ok(Ok(Ok(fd))) => {
                names.push(path);
                fds.push(fd);
                continue;
            }
            // It is where it was not found that says so.
            Ok(Ok(Err(error))) if error.kind() == std::io::ErrorKind::NotFound => None,
            Ok(Ok(Err(error))) => Some(format!("cannot be opened: {error}")),
            Ok(Err(error)) => Some(format!("cannot be opened: {error}")),
            Err(_) => Some(format!(
                "cannot be opened: no answer in {} s",
                OPEN_LIMIT.as_secs()
            )),
        };
        name_bad(daemon, &path, problem);
    }
    (names, fds)
}

/// Records what is wrong with a path, or that nothing is; an event tells of what is new for a known disk.
fn name_bad(daemon: &Daemon, path: &str, problem: Option<String>) {
    let Some(problem) = problem else {
        daemon.live().bad_paths.remove(path);
        return;
    };
    let old = (daemon.live().bad_paths).insert(path.to_string(), problem.clone());
    let disk = daemon
        .tables()
        .disks
        .values()
        .find(|d| d.path == path)
        .cloned();
    if let Some(disk) = disk.filter(|_| old.as_ref() != Some(&problem)) {
        let about = About::disk(disk.uuid);
        daemon.event(
            "DiskUnreadable",
            about,
            format!("disk {} ({path}) {problem}", disk.number),
        );
    }
}

/// Finds every known disk and corrects its path (steps 1 and 2).
///
/// # Errors  ublk-target does not answer
pub async fn find_disks(daemon: &Daemon) -> Result<(), ApiError> {
    let seen = look(daemon, &[]).await?;
    correct(daemon, &seen);
    // Groups do not wait for a state directory that has room; what is not saved is told by `status`.
    let _ = daemon.save().await;
    Ok(())
}

/// Looks at every disk that there is, and at `also`; takes what is ours as found.
///
/// All of them each time: a copy of a disk is only known by its being there.
///
/// # Errors  ublk-target does not answer
pub async fn look(daemon: &Daemon, also: &[PathBuf]) -> Result<Sightings, ApiError> {
    let mut paths: Vec<PathBuf> = {
        let tables = daemon.tables();
        tables
            .disks
            .values()
            .map(|d| d.path.clone().into())
            .collect()
    };
    let known: BTreeSet<String> = paths.iter().map(|p| p.display().to_string()).collect();
    paths.extend_from_slice(also);
    let others = candidates(&paths);
    // A path that is not there is asked for all the same: that names it.
    let mut seen = BTreeSet::new();
    let is_new = |path: &PathBuf| identify(path).map_or(true, |id| seen.insert(behind(id)));
    let all: Vec<PathBuf> = paths.into_iter().chain(others).filter(is_new).collect();
    let probes = probe_paths(daemon, &all).await?;
    let held: BTreeMap<DiskUuid, String> = {
        let (tables, live) = (daemon.tables(), daemon.live());
        let members = live.groups.values().flat_map(|g| g.all_members());
        let at = |disk| tables.disk(disk).map(|d| (disk, d.path.clone()));
        members.filter_map(|m| at(m.disk)).collect()
    };
    let system = daemon.tables().system;
    let sorted = sightings::sort(system, &held, &known, probes);
    tell(daemon, &sorted);
    let mut live = daemon.live();
    live.probes.clone_from(&sorted.ours);
    live.strangers.clone_from(&sorted.strangers);
    live.barred.clone_from(&sorted.barred);
    drop(live);
    Ok(sorted)
}

/// An event for each copy that is new, and each damaged superblock of ours.
fn tell(daemon: &Daemon, seen: &Sightings) {
    let copy = |s: &&Stranger| s.kind == StrangerKind::Copy;
    let old: BTreeSet<String> = {
        let live = daemon.live();
        live.strangers
            .iter()
            .filter(copy)
            .map(|s| s.path.clone())
            .collect()
    };
    for stranger in seen.strangers.iter().filter(copy) {
        if !old.contains(&stranger.path) {
            let text = format!("{} {}", stranger.path, stranger.text);
            daemon.event("DiskCopied", About::default(), text);
        }
    }
    for (disk, probe) in &seen.ours {
        if let Some(damaged) = probe.label.as_ref().and_then(|l| l.damaged.as_ref()) {
            let text = format!("{}: {damaged}", probe.path);
            daemon.event("SuperblockDamaged", About::disk(*disk), text);
        }
    }
}

/// Gives rows to the members found, and the paths that they are at now.
pub fn correct(daemon: &Daemon, seen: &Sightings) {
    let mut moved = Vec::new();
    let mut by_slot: Vec<(&DiskUuid, &Probe)> = seen.ours.iter().collect();
    // New numbers follow the slots.
    by_slot.sort_by_key(|(disk, probe)| {
        let label = probe.label.as_ref();
        label.map(|l| (l.group, l.slot, **disk))
    });
    {
        let mut tables = daemon.tables();
        for (uuid, probe) in by_slot {
            let path = stable_path(Path::new(&probe.path)).display().to_string();
            let old = tables.disk(*uuid).cloned();
            // A disk whose row was lost gets a new number, but only if the newest superblock of its group
            // lists it: one that was replaced and removed keeps its old label and stays out.
            let member = is_listed(&seen.ours, *uuid);
            let number = match &old {
                Some(row) => row.number,
                None if member => tables.next_disk(),
                None => continue,
            };
            let (role, was, sick, left) = old.as_ref().map_or_else(Default::default, |o| {
                (o.role, o.was, o.sick.clone(), o.left)
            });
            if let Some(old) = old.filter(|old| old.path != path) {
                moved.push((
                    *uuid,
                    format!("disk {number} was {}, is now {path}", old.path),
                ));
            }
            let (uuid, capacity) = (*uuid, probe.capacity);
            tables.put_disk(DiskSave {
                number,
                uuid,
                path,
                role,
                capacity,
                was,
                sick,
                left,
            });
            if let Some(label) = probe.label.as_ref().filter(|_| member) {
                tables.number_group(label.group, &label.group_name);
            }
        }
    }
    for (disk, text) in moved {
        daemon.event("DiskMoved", About::disk(disk), text);
    }
}

/// Whether the newest superblock found of a disk's group lists the disk.
fn is_listed(found: &BTreeMap<DiskUuid, Probe>, disk: DiskUuid) -> bool {
    let label = |probe: &Probe| {
        probe
            .label
            .clone()
            .filter(|l| !l.group.is_nil() && !l.deleted)
    };
    let Some(own) = found.get(&disk).and_then(label) else {
        return false;
    };
    let same = found
        .values()
        .filter_map(label)
        .filter(|l| l.group == own.group);
    same.max_by_key(|l| l.generation)
        .is_some_and(|newest| newest.lists(disk))
}

/// Looks again at what these disks carry; whoever destroys or hands out a disk asks this first.
///
/// # Errors  ublk-target does not answer
pub async fn look_again(daemon: &Daemon, disks: &[DiskSave]) -> Result<(), ApiError> {
    let paths: Vec<PathBuf> = disks.iter().map(|d| d.path.clone().into()).collect();
    let found = probe_paths(daemon, &paths).await?;
    let system = daemon.tables().system;
    let mut live = daemon.live();
    for disk in disks {
        live.probes.remove(&disk.uuid);
    }
    for probe in found {
        if let Some(label) = probe.label.clone().filter(|l| l.system == system) {
            live.probes.insert(label.disk, probe);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lunar_api::target::Label;
    use lunar_api::{GroupUuid, History, SystemUuid};

    fn probe(disk: u8, generation: u64, members: &[u8]) -> (DiskUuid, Probe) {
        let id = |n: u8| DiskUuid::from_bytes([n; 16]);
        let label = Label {
            system: SystemUuid::from_bytes([1; 16]),
            disk: id(disk),
            group: GroupUuid::from_bytes([1; 16]),
            group_name: "data".into(),
            level: None,
            slots: 2,
            slot: None,
            history: History::NIL,
            generation,
            members: members.iter().map(|n| id(*n)).collect(),
            replacement: None,
            deleted: false,
            damaged: None,
        };
        let path = format!("/dev/{disk}");
        let (capacity, data_bytes, logical_block, problem) = (1 << 30, 1 << 29, 512, None);
        (
            id(disk),
            Probe {
                path,
                capacity,
                data_bytes,
                logical_block,
                label: Some(label),
                problem,
            },
        )
    }

    #[test]
    fn is_listed_leaves_a_replaced_disk_out() {
        let found = BTreeMap::from([
            probe(1, 9, &[1, 3]),
            probe(2, 4, &[1, 2]),
            probe(3, 9, &[1, 3]),
        ]);
        let listed = |n| is_listed(&found, DiskUuid::from_bytes([n; 16]));
        assert_eq!([1, 2, 3, 4].map(listed), [true, false, true, false]);
    }
}
