//! `import`: disks, groups and LUs from what the disks themselves say; `group resolve`: one side of two.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use lunar_api::mgmt::{GroupResolve, Import};
use lunar_api::rows::Changed;
use lunar_api::target::{DeletedLu, GroupState, MemberSpec, Probe, TargetAnswer, TargetRequest};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, SystemUuid};

use super::admission::check_kind;
use super::{disk, group, last_view, view};
use crate::boot::{How, check_barred, correct, find_disks, look, members_of, start_group};
use crate::daemon::{About, Daemon, Problem};
use crate::import_plan::{Facts, Given, ImportPlan, plan};
use crate::limits::PATHS_MAX;
use crate::link::unexpected;
use crate::opener::open_patiently;
use crate::planner::{Gate, Plan};
use crate::probe::{behind, boot_id, identify, stable_path};
use crate::sightings::Sightings;
use crate::signature;
use crate::tables::DiskSave;

/// Answers `Import`.
///
/// # Crash  each step is durable before the next and is found done by the same command: the identity of the system, each
/// disk that changes systems, the rows
/// # Errors  nothing of the disks can be imported, or a group of them does not start: what was done is among the causes
pub async fn import(daemon: &Daemon, ask: Import) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let paths = check_paths(&ask.paths)?;
    let seen = look(daemon, &paths).await?;
    let given = given(&seen, daemon, &paths).await?;
    let view = view(daemon).await;
    let decided = plan(&Facts {
        view: &view,
        seen: &seen,
        given: &given,
        deleted: ask.deleted,
        take: ask.take,
        boot: &boot_id(),
    })?;
    let mut lus = BTreeMap::new();
    if ask.deleted {
        for group in &decided.running {
            lus.insert(*group, deleted_lus(daemon, *group).await?);
        }
    }
    let mut steps = decided.steps.clone();
    let back = lus.values().flatten();
    steps.extend(back.map(|lu| format!("bring the deleted LU {} back", lu.name)));
    let gate = if steps.is_empty() {
        Plan::unchanged("these disks are imported")
    } else {
        Plan {
            steps,
            ..Plan::default()
        }
    };
    if let Gate::Answer(mut answer) = gate.gate(ask.dry_run, ask.yes)? {
        answer.text.extend(decided.left.clone());
        return Ok(*answer);
    }
    let mut told = Told {
        text: decided.left.clone(),
        disks: Vec::new(),
        failed: None,
    };
    carry_out(daemon, &paths, &decided, ask.deleted, &mut told).await?;
    daemon.save().await?;
    let view = last_view(daemon);
    if let Some(error) = told.failed {
        let what = "the disks are imported, but not all of it is up";
        let mut all = ApiError::new(error.kind, what);
        all.causes = std::iter::once(error.message)
            .chain(error.causes)
            .chain(told.text)
            .collect();
        all.hint = error.hint;
        return Err(all);
    }
    let mut answer = gate.done("");
    answer.text = told.text;
    answer.disks = (view.tables.disks.values())
        .filter(|d| told.disks.contains(&d.uuid))
        .map(|d| view.disk_row(d))
        .collect();
    Ok(answer)
}

/// What there is to say in the end.
struct Told {
    text: Vec<String>,
    /// The disks that it tells of.
    disks: Vec<DiskUuid>,
    /// The first that failed.
    failed: Option<ApiError>,
}

impl Told {
    fn fail(&mut self, error: ApiError) {
        if self.failed.is_none() {
            self.failed = Some(error);
        } else {
            self.text.push(error.message);
            self.text.extend(error.causes);
        }
    }
}

async fn carry_out(
    daemon: &Daemon,
    paths: &[PathBuf],
    decided: &ImportPlan,
    deleted: bool,
    told: &mut Told,
) -> Result<(), ApiError> {
    if let Some(system) = decided.become_system {
        daemon.become_system(system).await?;
        let text = format!("this system is {system} now, as its disks say");
        daemon.event("SystemImported", About::default(), text.clone());
        told.text.push(text);
    }
    for (group, from) in &decided.take {
        take(daemon, *group, *from, &decided.members[&(*group, *from)]).await?;
        let text = format!(
            "group {} was taken over from system {from}",
            decided.name(*group)
        );
        daemon.event("GroupTaken", About::group(*group), text.clone());
        told.text.push(text);
    }
    let seen = look(daemon, paths).await?;
    let old: BTreeSet<DiskUuid> = daemon.tables().disks.values().map(|d| d.uuid).collect();
    for (uuid, was) in &decided.disks {
        if let Some(probe) = seen.ours.get(uuid) {
            row(daemon, *uuid, probe, *was);
        }
    }
    correct(daemon, &seen);
    daemon.save().await?;
    let view = last_view(daemon);
    let named = |disk: &DiskSave| decided.disks.iter().any(|(uuid, _)| *uuid == disk.uuid);
    for disk in view.tables.disks.values() {
        let (number, path) = (disk.number, &disk.path);
        if named(disk) {
            told.text.push(format!("disk {number}: {path}"));
        } else if !old.contains(&disk.uuid) {
            told.text.push(format!(
                "disk {number}: {path}, which was found beside them"
            ));
        } else {
            continue;
        }
        told.disks.push(disk.uuid);
    }
    for group in &decided.start {
        up(daemon, *group, decided, told).await;
    }
    if deleted {
        for group in decided.running.iter().chain(&decided.start) {
            undelete(daemon, *group, told).await;
        }
    }
    Ok(())
}

fn check_paths(asked: &[String]) -> Result<Vec<PathBuf>, ApiError> {
    if asked.is_empty() || asked.len() > PATHS_MAX {
        let what = format!("1 to {PATHS_MAX} paths are needed");
        return Err(ApiError::new(ErrorKind::Usage, what).hint("lunar import /dev/disk/by-id/.."));
    }
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for path in asked.iter().map(PathBuf::from) {
        // The same disk by two names is one disk.
        if seen.insert(behind(check_kind(&path)?)) {
            out.push(path);
        }
    }
    Ok(out)
}

/// What is at each of the paths. One that carries nothing of Lunar is asked what else it carries.
async fn given(
    seen: &Sightings,
    daemon: &Daemon,
    paths: &[PathBuf],
) -> Result<Vec<Given>, ApiError> {
    let same = |path: &Path, other: &str| {
        let identity = |p: &Path| identify(p).ok().map(behind);
        identity(path).is_some() && identity(path) == identity(Path::new(other))
    };
    let mut out = Vec::new();
    for path in paths {
        let shown = path.display().to_string();
        let all = seen.ours.values().chain(&seen.foreign);
        let all = all.chain(seen.copies.values().flatten());
        let found = all.into_iter().find(|probe| same(path, &probe.path));
        let stranger = seen.strangers.iter().find(|s| same(path, &s.path));
        out.push(match (found, stranger) {
            (Some(probe), _) => Given::Lunar(shown, Box::new(probe.clone())),
            (None, Some(stranger)) => Given::Left(shown, stranger.text.clone()),
            (None, None) => {
                let bad = {
                    let live = daemon.live();
                    let bad = live.bad_paths.iter().find(|(at, _)| same(path, at));
                    bad.map(|(_, why)| why.clone())
                };
                match bad {
                    Some(why) => Given::Left(shown, why),
                    None => Given::Left(shown, carries(path).await),
                }
            }
        });
    }
    Ok(out)
}

/// What a disk without any superblock of Lunar carries, for people.
async fn carries(path: &Path) -> String {
    match signature::find(path).await {
        Err(error) => format!("is no disk of Lunar ({})", error.message),
        Ok(found) if found.is_empty() => "is no disk of Lunar: it is blank".into(),
        Ok(found) => {
            let all: Vec<String> = found.into_iter().collect();
            format!("is no disk of Lunar: it carries {}", all.join(", "))
        }
    }
}

/// Has the members of a group belong to this system.
///
/// # Errors  `Busy` if somebody works with one of them; then none is written
async fn take(
    daemon: &Daemon,
    group: GroupUuid,
    from: SystemUuid,
    members: &[Probe],
) -> Result<(), ApiError> {
    let (mut specs, mut fds) = (Vec::new(), Vec::new());
    for probe in members {
        let opened = open_patiently(Path::new(&probe.path), Duration::ZERO).await;
        fds.push(opened.map_err(|error| {
            let what = format!("{} cannot be taken over", probe.path);
            ApiError::new(ErrorKind::Busy, what)
                .because(format!("somebody works with it: {error}"))
                .hint(format!(
                    "lsof {}; end the system that it belongs to",
                    probe.path
                ))
        })?);
        let disk = probe.label.as_ref().map_or(DiskUuid::NIL, |l| l.disk);
        let path = probe.path.clone();
        specs.push(MemberSpec { disk, path });
    }
    let request = TargetRequest::Adopt {
        group,
        from,
        members: specs,
    };
    match daemon.ask(&request, fds).await? {
        TargetAnswer::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Gives a disk a row, if it has none.
fn row(daemon: &Daemon, uuid: DiskUuid, probe: &Probe, was: Option<(GroupUuid, u16)>) {
    let mut tables = daemon.tables();
    if tables.disk(uuid).is_some() {
        return;
    }
    let path = stable_path(Path::new(&probe.path)).display().to_string();
    let number = tables.next_disk();
    tables.put_disk(DiskSave {
        number,
        uuid,
        path,
        role: Default::default(),
        capacity: probe.capacity,
        was,
        sick: None,
        left: None,
    });
}

async fn up(daemon: &Daemon, group: GroupUuid, decided: &ImportPlan, told: &mut Told) {
    let name = decided.name(group);
    let how = How {
        undelete: decided.undelete.contains(&group),
        ..How::default()
    };
    let begun = match check_barred(daemon, group, &name) {
        Ok(()) => start_group(daemon, group, members_of(daemon, group), how).await,
        Err(error) => Err(error),
    };
    if let Err(error) = begun {
        daemon.live().problems.insert(group, Problem::from(&error));
        return told.fail(error);
    }
    let view = last_view(daemon);
    let Some(status) = view.live.groups.get(&group) else {
        return;
    };
    let state = match status.state {
        GroupState::Optimal => "is up".to_string(),
        _ => format!("is up, degraded: {}", status.reason),
    };
    told.text.push(format!("group {} {state}", status.name));
    for lu in &status.lus {
        let twin = view.tables.lus.values().any(|l| {
            let first = view
                .tables
                .lu(lu.lu)
                .is_some_and(|own| l.number < own.number);
            first && view.lu_row(l).name == lu.name
        });
        let number = view.tables.lu(lu.lu).map_or(0, |l| l.number);
        told.text.push(match (twin, lu.problem.is_empty()) {
            (true, _) => format!(
                "LU {number} has the name of another, {0}, which keeps /dev/lunar/{0}: lunar lu rename {number} OTHER",
                lu.name
            ),
            (false, true) => format!("LU {} is up", lu.name),
            (false, false) => format!("LU {} is not up: {}", lu.name, lu.problem),
        });
    }
    daemon.event(
        "GroupImported",
        About::group(group),
        format!("group {name} was imported"),
    );
}

async fn deleted_lus(daemon: &Daemon, group: GroupUuid) -> Result<Vec<DeletedLu>, ApiError> {
    let request = TargetRequest::LuDeleted { group };
    match daemon.ask(&request, Vec::new()).await? {
        TargetAnswer::Deleted { lus } => Ok(lus),
        other => Err(unexpected(&other)),
    }
}

/// Brings the deleted LUs of a running group back; of several with one name the youngest.
async fn undelete(daemon: &Daemon, group: GroupUuid, told: &mut Told) {
    if !daemon.live().groups.contains_key(&group) {
        return;
    }
    let all = match deleted_lus(daemon, group).await {
        Ok(all) => all,
        Err(error) => return told.fail(error),
    };
    for DeletedLu { lu, name, .. } in all.into_iter().rev() {
        let request = TargetRequest::LuUndelete { group, lu };
        match daemon.ask(&request, Vec::new()).await {
            Ok(_) => {
                let text = format!("LU {name} is back");
                daemon.event("LuUndeleted", About::group(group), text.clone());
                told.text.push(text);
            }
            Err(error) => told.fail(error),
        }
    }
    if let Err(error) = daemon.refresh().await {
        told.fail(error);
    }
}

/// Answers `GroupResolve`.
///
/// # Errors  `Refused` without a yes; what ublk-target refuses
pub async fn resolve(daemon: &Daemon, ask: GroupResolve) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    if view(daemon).await.find_group(&ask.group).is_ok() {
        find_disks(daemon).await?;
    }
    let view = last_view(daemon);
    let save = view.find_group(&ask.group)?;
    let (uuid, name) = (save.uuid, save.name_seen.clone());
    let keep = disk::find(&view, &ask.keep)?;
    let gate = if view.live.groups.contains_key(&uuid) {
        Plan::unchanged(format!("group {name} is started: nothing is in two"))
    } else {
        let label = view.live.probes.get(&keep.uuid);
        let label = label.and_then(|probe| probe.label.as_ref());
        let label = label.filter(|label| label.group == uuid).ok_or_else(|| {
            let what = format!(
                "disk {} is not here as a member of group {name}",
                keep.number
            );
            ApiError::new(ErrorKind::Usage, what).hint("lunar disk list")
        })?;
        let others: Vec<String> = view
            .live
            .probes
            .values()
            .filter(|probe| {
                let other = probe.label.as_ref().filter(|l| l.group == uuid);
                other.is_some_and(|l| l.history != label.history || l.generation > label.generation)
            })
            .map(|probe| probe.path.clone())
            .collect();
        let what = match others.is_empty() {
            true => format!("what disks of group {name} wrote apart from {}", keep.path),
            false => format!("what {} wrote apart from {}", others.join(", "), keep.path),
        };
        Plan::step(format!("start group {name} from the side of {}", keep.path)).dies(what, &name)
    };
    if let Gate::Answer(answer) = gate.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    check_barred(daemon, uuid, &name)?;
    let how = How {
        force: ask.force,
        keep: Some(keep.uuid),
        undelete: false,
    };
    start_group(daemon, uuid, members_of(daemon, uuid), how)
        .await
        .inspect_err(|error| {
            daemon.live().problems.insert(uuid, Problem::from(error));
        })?;
    let text = format!("group {name} goes on from the side of disk {}", keep.number);
    daemon.event("GroupResolved", About::group(uuid), text.clone());
    let status = daemon.live().groups.get(&uuid).cloned();
    let status = status.ok_or_else(|| ApiError::new(ErrorKind::Failed, "the group went away"))?;
    group::finish(daemon, &gate, status, text).await
}
