//! Finds every disk again by its identity, and starts the groups.
//!
//! # Order
//! 1. Probe every disk there is: known paths first, a copy of one is only known by its being there.
//! 2. Correct paths in the tables from what the disks carry; save.
//! 3. Open the members of each group exclusively (a dead process's I/O may hold them for up to 30 s).
//!    A group whose members are all held starts when they are let go of.
//! 4. GroupStart. A crash anywhere here changes nothing on the disks; the next start does it again.

mod looking;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lunar_api::target::{GroupState, GroupStatus, Label, MemberSpec, TargetAnswer, TargetRequest};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid};

use crate::daemon::{About, Daemon, Problem};
use crate::limits::{HELD_PAUSE, REOPEN_LIMIT};
use crate::link::unexpected;
use crate::opener::{open_exclusive, open_inflight, open_patiently};
use crate::probe::{boot_id, ublk_devices};

pub use looking::{correct, find_disks, look, look_again, probe_paths};

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
    let (witness, told) = {
        let tables = daemon.tables();
        let row = tables.group(group);
        (
            row.and_then(|g| g.witness),
            row.map_or((None, None, None), |g| {
                (g.rebuild_min, g.rebuild_max, g.read_errors_max)
            }),
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
        rebuild_min_bytes: told.0,
        rebuild_max_bytes: told.1,
        read_errors_max: told.2,
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
