//! Finds every disk again by its identity, and starts the groups.
//!
//! # Order
//! 1. Probe the known paths; if an identity is missing, probe every other candidate.
//! 2. Correct paths in the tables from what the disks carry; save.
//! 3. Open the members of each group exclusively (a dead process's I/O may hold them for up to 30 s).
//!    A group whose members are all held starts when they are let go of.
//! 4. GroupStart. A crash anywhere here changes nothing on the disks; the next start does it again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lunar_api::target::{GroupStatus, MemberSpec, Probe, TargetAnswer, TargetRequest};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid};

use crate::daemon::{About, Daemon};
use crate::limits::{HELD_PAUSE, REOPEN_LIMIT};
use crate::link::unexpected;
use crate::opener::{open_exclusive, open_inflight, open_patiently, open_plain};
use crate::probe::{boot_id, candidates, identify, stable_path, ublk_devices};
use crate::tables::DiskSave;

/// Most paths probed in one message.
const PROBE_MAX: usize = 64;

/// Asks ublk-target what is on these paths; those that cannot be opened are left out.
///
/// # Errors  ublk-target does not answer
pub async fn probe_paths(daemon: &Daemon, paths: &[PathBuf]) -> Result<Vec<Probe>, ApiError> {
    let mut out = Vec::new();
    for some in paths.chunks(PROBE_MAX) {
        let some = some.to_vec();
        let opened = tokio::task::spawn_blocking(move || {
            some.into_iter()
                .filter_map(|p| Some((open_plain(&p).ok()?, p)))
                .collect::<Vec<_>>()
        });
        let opened = tokio::time::timeout(REOPEN_LIMIT, opened).await;
        let Ok(Ok(opened)) = opened else {
            let text =
                "a block device did not open in 30 s; it and those probed with it are left out";
            daemon.event("ProbeStuck", About::default(), text);
            continue;
        };
        if opened.is_empty() {
            continue;
        }
        let (fds, paths): (Vec<OwnedFd>, Vec<PathBuf>) = opened.into_iter().unzip();
        let paths = paths.iter().map(|p| p.display().to_string()).collect();
        match daemon.ask(&TargetRequest::Probe { paths }, fds).await? {
            TargetAnswer::Probed { disks } => out.extend(disks),
            other => return Err(unexpected(&other)),
        }
    }
    Ok(out)
}

/// Finds every known disk and corrects its path (steps 1 and 2).
///
/// # Errors  ublk-target does not answer, or the tables cannot be saved
pub async fn find_disks(daemon: &Daemon) -> Result<(), ApiError> {
    let (system, known): (_, Vec<DiskSave>) = {
        let tables = daemon.tables();
        (tables.system, tables.disks.values().cloned().collect())
    };
    let paths: Vec<PathBuf> = known.iter().map(|d| d.path.clone().into()).collect();
    let mut found = BTreeMap::new();
    let ours = |probe: &Probe| {
        probe
            .label
            .as_ref()
            .filter(|label| label.system == system)
            .map(|label| label.disk)
    };
    let mut wanted: BTreeSet<DiskUuid> = known.iter().map(|d| d.uuid).collect();
    for probe in probe_paths(daemon, &paths).await? {
        if let Some(disk) = ours(&probe) {
            wanted.extend(
                probe
                    .label
                    .iter()
                    .filter(|l| !l.deleted)
                    .flat_map(|l| l.members.clone()),
            );
            found.entry(disk).or_insert(probe);
        }
    }
    wanted.retain(|disk| !disk.is_nil() && !found.contains_key(disk));
    if !wanted.is_empty() {
        let seen: BTreeSet<_> = paths.iter().filter_map(|p| identify(p).ok()).collect();
        let others: Vec<PathBuf> = candidates(&paths)
            .into_iter()
            .filter(|path| identify(path).is_ok_and(|id| !seen.contains(&id)))
            .collect();
        for probe in probe_paths(daemon, &others).await? {
            if let Some(disk) = ours(&probe) {
                found.entry(disk).or_insert(probe);
            }
        }
    }
    correct(daemon, found);
    daemon.save().await
}

fn correct(daemon: &Daemon, found: BTreeMap<DiskUuid, Probe>) {
    let mut moved = Vec::new();
    {
        let mut tables = daemon.tables();
        for (uuid, probe) in &found {
            let path = stable_path(Path::new(&probe.path)).display().to_string();
            let old = tables.disk(*uuid).cloned();
            // A disk whose row was lost gets a new number, but only if the newest superblock of its group
            // lists it: one that was replaced and removed keeps its old label and stays out.
            let member = is_listed(&found, *uuid);
            let number = match &old {
                Some(row) => row.number,
                None if member => tables.next_disk(),
                None => continue,
            };
            let (role, was) = old
                .as_ref()
                .map_or_else(Default::default, |o| (o.role, o.was));
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
            });
            if let Some(label) = probe.label.as_ref().filter(|_| member) {
                tables.number_group(label.group, &label.group_name);
            }
        }
    }
    for (disk, text) in moved {
        daemon.event(
            "DiskMoved",
            About {
                disk: Some(disk),
                ..About::default()
            },
            text,
        );
    }
    daemon.live().probes = found;
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
        .is_some_and(|newest| newest.members.contains(&disk))
}

/// Groups that should be up and are not.
fn groups_to_start(daemon: &Daemon) -> Vec<GroupUuid> {
    let boot = boot_id();
    let tables = daemon.tables();
    let live = daemon.live();
    let by_hand = |group| {
        tables
            .group(group)
            .is_some_and(|g| g.stopped_in.as_ref() == Some(&boot))
    };
    let on_disk = live
        .probes
        .values()
        .filter_map(|p| p.label.as_ref())
        .filter(|l| !l.deleted);
    let groups: BTreeSet<GroupUuid> = on_disk.map(|label| label.group).collect();
    groups
        .into_iter()
        .filter(|g| !g.is_nil() && !live.groups.contains_key(g) && !by_hand(*g))
        .collect()
}

/// Members of a group, from the disks: every disk that says it is one.
pub fn members_of(daemon: &Daemon, group: GroupUuid) -> Vec<MemberSpec> {
    let tables = daemon.tables();
    let live = daemon.live();
    let is_member = |probe: &&Probe| {
        probe
            .label
            .as_ref()
            .is_some_and(|l| l.group == group && !l.deleted)
    };
    live.probes
        .values()
        .filter(is_member)
        .filter_map(|probe| probe.label.as_ref())
        // A disk that failed and was replaced is not brought back by its old superblock.
        .filter_map(|label| tables.disk(label.disk).filter(|disk| disk.was.is_none()))
        .map(|disk| MemberSpec {
            disk: disk.uuid,
            path: disk.path.clone(),
        })
        .collect()
}

/// A group whose disks a dead process's I/O holds, and its members.
#[derive(Debug)]
pub struct Held {
    group: GroupUuid,
    members: Vec<MemberSpec>,
}

/// Starts every group that should be up, but for those `held`; adds those whose disks are all held.
pub async fn start_groups(daemon: &Daemon, held: &mut Vec<Held>) {
    for group in groups_to_start(daemon) {
        if held.iter().all(|one| one.group != group) {
            let members = members_of(daemon, group);
            start_or_say(daemon, group, members, held).await;
        }
    }
}

async fn start_or_say(
    daemon: &Daemon,
    group: GroupUuid,
    members: Vec<MemberSpec>,
    held: &mut Vec<Held>,
) {
    if let Err(error) = start_group(daemon, group, members.clone(), false).await {
        not_started(daemon, group, &error);
        if error.kind == ErrorKind::Busy {
            held.push(Held { group, members });
        }
    }
}

/// Starts groups once their disks are let go of, for as long as this ublk-target lives. A dead process's disks come free
/// all at once, when its last I/O returns: one disk that hangs holds the others too.
pub async fn start_held(daemon: Arc<Daemon>, mut held: Vec<Held>) {
    let target = daemon.live().target_pid;
    while !held.is_empty() && daemon.live().target_pid == target && !daemon.is_stopping() {
        tokio::time::sleep(HELD_PAUSE).await;
        for one in std::mem::take(&mut held) {
            if !is_free(&one.members).await {
                held.push(one);
                continue;
            }
            let _turn = daemon.intent.lock().await;
            // Somebody may have started it by hand.
            if !daemon.live().groups.contains_key(&one.group) {
                start_or_say(&daemon, one.group, one.members, &mut held).await;
            }
        }
        let _ = daemon.save().await;
    }
}

/// Whether some member can be had.
async fn is_free(members: &[MemberSpec]) -> bool {
    let paths: Vec<PathBuf> = members.iter().map(|m| PathBuf::from(&m.path)).collect();
    let look = move || paths.iter().any(|path| open_exclusive(path).is_ok());
    let look = tokio::task::spawn_blocking(look);
    matches!(tokio::time::timeout(REOPEN_LIMIT, look).await, Ok(Ok(true)))
}

/// Brings back the groups that were up when ublk-target died, from what was last seen: no probe, no search.
///
/// A group stays in `were_up` while ublk-target cannot be reached: if it dies again in the middle, the next
/// one goes on with what is left. Returns the groups whose disks are all held.
pub async fn recover_groups(daemon: &Daemon, were_up: &mut Vec<GroupStatus>) -> Vec<Held> {
    let mut held = Vec::new();
    for group in std::mem::take(were_up) {
        let uuid = group.group;
        let members: Vec<MemberSpec> = {
            let tables = daemon.tables();
            group
                .members
                .iter()
                .filter_map(|m| tables.disk(m.disk))
                .filter(|disk| disk.was.is_none())
                .map(|disk| MemberSpec {
                    disk: disk.uuid,
                    path: disk.path.clone(),
                })
                .collect()
        };
        match start_group(daemon, uuid, members.clone(), false).await {
            Ok(()) => {}
            Err(error) if error.kind == ErrorKind::Unreachable => were_up.push(group),
            Err(error) => {
                not_started(daemon, uuid, &error);
                if error.kind == ErrorKind::Busy {
                    held.push(Held {
                        group: uuid,
                        members,
                    });
                }
            }
        }
    }
    held
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

fn not_started(daemon: &Daemon, group: GroupUuid, error: &ApiError) {
    let why = std::iter::once(&error.message).chain(&error.causes);
    let why = why.map(String::as_str).collect::<Vec<_>>().join(": ");
    daemon.event(
        "GroupNotStarted",
        About {
            group: Some(group),
            ..About::default()
        },
        why.clone(),
    );
    daemon.live().problems.insert(group, why);
}

/// Starts one group (steps 3 and 4).
///
/// # Errors  `Busy` if every member is held by somebody; no member can be opened, or ublk-target refuses
pub async fn start_group(
    daemon: &Daemon,
    group: GroupUuid,
    members: Vec<MemberSpec>,
    force: bool,
) -> Result<(), ApiError> {
    let OpenedMembers {
        specs,
        mut fds,
        without,
        busy,
    } = open_members(daemon, group, members).await;
    if specs.is_empty() && busy > 0 {
        return Err(ApiError::new(
            ErrorKind::Busy,
            "the disks of the group are held by I/O of a process that died, or by somebody else",
        )
        .because("one disk that does not answer holds all of them; the group starts when they are let go of")
        .hint("lunar events"));
    }
    if specs.is_empty() {
        return Err(
            ApiError::new(ErrorKind::NoService, "no member of the group can be opened")
                .hint("lunar disk list; lunar events"),
        );
    }
    fds.push(open_inflight(&daemon.config.run_dir, group).map_err(|e| {
        ApiError::new(ErrorKind::Failed, "the in-flight log cannot be opened")
            .because(e.to_string())
            .hint(format!("df {}", daemon.config.run_dir.display()))
    })?);
    let (witness, rates) = {
        let tables = daemon.tables();
        let row = tables.group(group);
        (
            row.and_then(|g| g.witness),
            row.map(|g| (g.rebuild_min, g.rebuild_max)),
        )
    };
    let ublk_devices = ublk_devices();
    let start = TargetRequest::GroupStart {
        group,
        force,
        members: specs,
        ublk_devices,
        witness,
        without,
    };
    let answer = daemon.ask(&start, fds).await?;
    let TargetAnswer::Group { group: status } = answer else {
        return Err(unexpected(&answer));
    };
    daemon.absorb_group(*status).await?;
    if let Some((rebuild_min_bytes, rebuild_max_bytes)) = rates.filter(|r| *r != (None, None)) {
        let set = TargetRequest::GroupSet {
            group,
            rebuild_min_bytes,
            rebuild_max_bytes,
        };
        daemon.ask(&set, Vec::new()).await?;
    }
    Ok(())
}

/// Members as far as they could be opened.
#[derive(Default)]
struct OpenedMembers {
    specs: Vec<MemberSpec>,
    fds: Vec<OwnedFd>,
    without: Vec<DiskUuid>,
    /// How many of `without` somebody else holds.
    busy: usize,
}

impl OpenedMembers {
    fn add(&mut self, spec: MemberSpec, fd: OwnedFd) {
        self.specs.push(spec);
        self.fds.push(fd);
    }
}

/// Opens members side by side; those that do not open in time are named and left out.
async fn open_members(
    daemon: &Daemon,
    group: GroupUuid,
    members: Vec<MemberSpec>,
) -> OpenedMembers {
    let tasks: Vec<_> = members
        .into_iter()
        .map(|spec| {
            tokio::spawn(async move {
                let opened = open_patiently(Path::new(&spec.path), REOPEN_LIMIT).await;
                (spec, opened)
            })
        })
        .collect();
    let mut out = OpenedMembers::default();
    let mut late = Vec::new();
    for task in tasks {
        match task.await {
            Ok((spec, Ok(fd))) => out.add(spec, fd),
            Ok((spec, Err(error))) => late.push((spec, error)),
            Err(_) => {}
        }
    }
    for (spec, error) in late {
        let is_busy = error.kind() == std::io::ErrorKind::ResourceBusy;
        // A dead process's disks come free all at once: if one has, a look a moment earlier was too early for another.
        if is_busy
            && !out.specs.is_empty()
            && let Ok(fd) = open_patiently(Path::new(&spec.path), HELD_PAUSE).await
        {
            out.add(spec, fd);
            continue;
        }
        let about = About {
            group: Some(group),
            disk: Some(spec.disk),
            lu: None,
        };
        let text = format!(
            "{} cannot be opened: {error}; the group goes on without it",
            spec.path
        );
        daemon.event("DiskBusy", about, text);
        out.without.push(spec.disk);
        out.busy += usize::from(is_busy);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use lunar_api::target::Label;
    use lunar_api::{History, SystemUuid};

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
            deleted: false,
        };
        let path = format!("/dev/{disk}");
        let (capacity, logical_block, problem) = (1 << 30, 512, None);
        (
            id(disk),
            Probe {
                path,
                capacity,
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
