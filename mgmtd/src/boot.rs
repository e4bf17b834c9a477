//! Finds every disk again by its identity, and starts the groups.
//!
//! # Order
//! 1. Probe every disk there is: known paths first, a copy of one is only known by its being there.
//! 2. Correct paths in the tables from what the disks carry; save.
//! 3. Open the members of each group exclusively (a dead process's I/O may hold them for up to 30 s).
//!    A group whose members are all held starts when they are let go of.
//! 4. GroupStart. A crash anywhere here changes nothing on the disks; the next start does it again.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lunar_api::rows::{Stranger, StrangerKind};
use lunar_api::target::{
    GroupState, GroupStatus, Label, MemberSpec, Probe, TargetAnswer, TargetRequest,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid};

use crate::daemon::{About, Daemon, Problem};
use crate::limits::{HELD_PAUSE, OPEN_LIMIT, REOPEN_LIMIT};
use crate::link::unexpected;
use crate::opener::{open_exclusive, open_inflight, open_patiently, open_plain};
use crate::probe::{behind, boot_id, candidates, identify, stable_path, ublk_devices};
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
            let (role, was, sick) = old
                .as_ref()
                .map_or_else(Default::default, |o| (o.role, o.was, o.sick.clone()));
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
    let mut newest: BTreeMap<GroupUuid, &Label> = BTreeMap::new();
    for label in live.probes.values().filter_map(|p| p.label.as_ref()) {
        let place = newest.entry(label.group).or_insert(label);
        if label.generation > place.generation {
            *place = label;
        }
    }
    // A disk that was away when its group was deleted does not bring it back.
    newest
        .into_iter()
        .filter(|(group, label)| !group.is_nil() && !label.deleted)
        .map(|(group, _)| group)
        .filter(|group| !live.groups.contains_key(group) && !by_hand(*group))
        .filter(|group| !live.quarantined.contains_key(group) && !live.barred.contains_key(group))
        .collect()
}

/// Members of a group, from the disks: every disk that says it is one. Whether the group was deleted is what its newest
/// superblock says, as of everything.
pub fn members_of(daemon: &Daemon, group: GroupUuid) -> Vec<MemberSpec> {
    let (tables, live) = (daemon.tables(), daemon.live());
    let labels = || {
        let all = live
            .probes
            .values()
            .filter_map(|probe| probe.label.as_ref());
        all.filter(|label| label.group == group)
    };
    labels()
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
    // One that was up is served by EIO; one that never came up is not tried a third time.
    let quarantined = daemon.live().quarantined.clone();
    for (group, why) in quarantined {
        if !daemon.live().groups.contains_key(&group) {
            let name = daemon.tables().group(group).map(|g| g.name_seen.clone());
            let action = crate::text::again(&name.unwrap_or(group.to_string()));
            let problem = Problem { why, action };
            daemon.live().problems.insert(group, problem);
        }
    }
    let barred = daemon.live().barred.clone();
    for (group, problem) in barred {
        if !daemon.live().groups.contains_key(&group) {
            say_not_started(daemon, group, problem);
        }
    }
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
    if let Err(error) = start_group(daemon, group, members.clone(), How::default()).await {
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
        let quarantined = daemon.live().quarantined.get(&uuid).cloned();
        if let Some(why) = quarantined {
            match quarantine(daemon, group.clone(), why).await {
                Err(error) if error.kind == ErrorKind::Unreachable => were_up.push(group),
                Err(error) => not_started(daemon, uuid, &error),
                Ok(()) => {}
            }
            continue;
        }
        let members: Vec<MemberSpec> = {
            let tables = daemon.tables();
            group
                .all_members()
                .filter_map(|m| tables.disk(m.disk))
                .filter(|disk| disk.was.is_none())
                .map(|disk| MemberSpec {
                    disk: disk.uuid,
                    path: disk.path.clone(),
                })
                .collect()
        };
        match start_group(daemon, uuid, members.clone(), How::default()).await {
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

/// Has the devices of a group answer EIO; its members are not opened.
async fn quarantine(daemon: &Daemon, group: GroupStatus, why: String) -> Result<(), ApiError> {
    let seen = GroupStatus {
        state: GroupState::Quarantined,
        reason: why,
        sync: None,
        zeroing: Vec::new(),
        ..group
    };
    let request = TargetRequest::GroupQuarantine {
        seen: Box::new(seen),
        ublk_devices: ublk_devices(),
    };
    match daemon.ask(&request, Vec::new()).await? {
        TargetAnswer::Group { group } => daemon.absorb_group(*group).await,
        other => Err(unexpected(&other)),
    }
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
    // It is up, only the tables could not be saved.
    if !daemon.live().groups.contains_key(&group) {
        say_not_started(daemon, group, Problem::from(error));
    }
}

fn say_not_started(daemon: &Daemon, group: GroupUuid, problem: Problem) {
    let about = About::group(group);
    daemon.event("GroupNotStarted", about, problem.why.clone());
    daemon.live().problems.insert(group, problem);
}

/// Opens the in-flight log of a group.
///
/// # Errors  `Failed`, with what to type
pub fn inflight(daemon: &Daemon, group: GroupUuid) -> Result<OwnedFd, ApiError> {
    let dir = &daemon.config.run_dir;
    open_inflight(dir, group).map_err(|e| {
        let hint = if e.kind() == std::io::ErrorKind::Unsupported {
            format!(
                "mount -t tmpfs tmpfs {0}/inflight, or start mgmtd with /run on tmpfs",
                dir.display()
            )
        } else {
            format!("df {}", dir.display())
        };
        ApiError::new(ErrorKind::Failed, "the in-flight log cannot be opened")
            .because(e.to_string())
            .hint(hint)
    })
}

/// What a person said about a start.
#[derive(Debug, Default, Clone, Copy)]
pub struct How {
    /// Old or wrong data is accepted.
    pub force: bool,
    /// The side of this disk goes on.
    pub keep: Option<DiskUuid>,
    /// It was deleted, and comes back.
    pub undelete: bool,
}

/// Refuses a group that would leave disks behind that it needs.
///
/// # Errors  `Refused`, with the disks
pub fn check_barred(daemon: &Daemon, group: GroupUuid, name: &str) -> Result<(), ApiError> {
    match daemon.live().barred.get(&group) {
        None => Ok(()),
        Some(problem) => {
            let what = format!("group {name} is not started");
            Err(ApiError::new(ErrorKind::Refused, what)
                .because(problem.why.clone())
                .hint(problem.action.clone()))
        }
    }
}

/// Starts one group (steps 3 and 4).
///
/// # Errors  `Busy` if every member is held by somebody; no member can be opened, or ublk-target refuses
pub async fn start_group(
    daemon: &Daemon,
    group: GroupUuid,
    members: Vec<MemberSpec>,
    how: How,
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
    fds.push(inflight(daemon, group)?);
    let (witness, rates) = {
        let tables = daemon.tables();
        let row = tables.group(group);
        (
            row.and_then(|g| g.witness),
            row.map_or((None, None), |g| (g.rebuild_min, g.rebuild_max)),
        )
    };
    let ublk_devices = ublk_devices();
    let start = TargetRequest::GroupStart {
        group,
        force: how.force,
        members: specs,
        ublk_devices,
        witness,
        without,
        keep: how.keep,
        undelete: how.undelete,
        rebuild_min_bytes: rates.0,
        rebuild_max_bytes: rates.1,
    };
    let answer = daemon.ask(&start, fds).await;
    let answer = answer.map_err(|error| by_name(daemon, group, error))?;
    let TargetAnswer::Group { group: status } = answer else {
        return Err(unexpected(&answer));
    };
    daemon.absorb_group(*status).await
}

/// Members as far as they could be opened.
#[derive(Debug, Default)]
pub struct OpenedMembers {
    pub specs: Vec<MemberSpec>,
    /// Of `specs`, in this order.
    pub fds: Vec<OwnedFd>,
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

/// ublk-target knows a group that it refuses by its identity only; people know its name.
fn by_name(daemon: &Daemon, group: GroupUuid, mut error: ApiError) -> ApiError {
    let name = daemon.tables().group(group).map(|g| g.name_seen.clone());
    let (uuid, name) = (group.to_string(), name.unwrap_or(group.to_string()));
    error.message = error.message.replace(&uuid, &name);
    for text in error.causes.iter_mut().chain(&mut error.hint) {
        *text = text.replace(&uuid, &name);
    }
    error
}

/// Opens members side by side; those that do not open in time are named and left out.
pub async fn open_members(
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
