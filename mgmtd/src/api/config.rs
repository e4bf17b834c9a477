//! `config`: what no disk carries, in a file and back.

use std::path::Path;

use lunar_api::mgmt::{ConfigLoad, DiskAdd, GroupCreate, GroupSet, LuCreate, Role};
use lunar_api::rows::{Changed, ConfigText};
use lunar_api::target::{LuSize, TargetRequest};
use lunar_api::units::format_size;
use lunar_api::{ApiError, ErrorKind};

use super::{disk, group, last_view, lu, view};
use crate::config_file::{ConfigFile, DiskEntry, compare};
use crate::daemon::{About, Daemon};
use crate::planner::{Gate, Plan};
use crate::probe::{behind, identify};
use crate::tables::GroupSave;
use crate::text::level_word;

/// Answers `ConfigSave`.
///
/// # Errors  never
pub async fn save(daemon: &Daemon) -> Result<ConfigText, ApiError> {
    view(daemon).await;
    let text = daemon.config_now().text();
    Ok(ConfigText { text })
}

/// Answers `ConfigLoad`.
///
/// # Crash  rows change in one transaction
/// # Errors  `Usage` for a file that is none, with the line
pub async fn load(daemon: &Daemon, ask: ConfigLoad) -> Result<Changed, ApiError> {
    let file = ConfigFile::parse(&ask.text)?;
    if ask.create {
        return create(daemon, &file, &ask).await;
    }
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let load = compare(&view, &file);
    let gate = if load.steps.is_empty() {
        Plan::unchanged("numbers, roles and options are those of the file")
    } else {
        Plan {
            steps: load.steps.iter().map(|s| format!("change: {s}")).collect(),
            ..Plan::default()
        }
    };
    if let Gate::Answer(mut answer) = gate.gate(ask.dry_run, ask.yes)? {
        answer
            .text
            .extend(load.differs.iter().map(|d| format!("differs: {d}")));
        return Ok(*answer);
    }
    for row in &load.groups {
        let old = view.tables.group(row.uuid);
        let told = |row: &GroupSave| (row.rebuild_min, row.rebuild_max, row.read_errors_max);
        if old.map(told) != Some(told(row)) && view.live.groups.contains_key(&row.uuid) {
            let request = TargetRequest::GroupSet {
                group: row.uuid,
                rebuild_min_bytes: row.rebuild_min,
                rebuild_max_bytes: row.rebuild_max,
                read_errors_max: row.read_errors_max,
            };
            daemon.ask(&request, Vec::new()).await?;
        }
    }
    load.apply(&mut daemon.tables());
    daemon.event(
        "ConfigLoaded",
        About::default(),
        "a saved configuration was loaded",
    );
    daemon.absorb().await?;
    let mut answer = gate.done("");
    answer.text.clone_from(&load.steps);
    answer
        .text
        .extend(load.differs.iter().map(|d| format!("differs: {d}")));
    Ok(answer)
}

/// Makes the groups and LUs of the file anew, on the disks at its paths.
///
/// # Crash  disk by disk, group by group, LU by LU: what is there is there, `lunar status` tells it
/// # Errors  `Refused` without a yes; a path that is no blank disk, before anything is done
async fn create(daemon: &Daemon, file: &ConfigFile, ask: &ConfigLoad) -> Result<Changed, ApiError> {
    let view = view(daemon).await;
    let refuse = |why: String| {
        ApiError::new(ErrorKind::Usage, "the layout is not made anew")
            .because(why)
            .hint("lunar config load FILE, to compare; lunar status")
    };
    let mut plan = Plan::default();
    let members: Vec<_> = file.groups.iter().flat_map(|g| &g.members).collect();
    let used: Vec<&DiskEntry> = file
        .disks
        .iter()
        .filter(|d| members.contains(&&d.uuid) || d.role != Role::Data)
        .collect();
    for d in &used {
        let here = identify(Path::new(&d.path)).map_err(|e| refuse(format!("{}: {e}", d.path)))?;
        let mut rows = view.tables.disks.values();
        let same = |row: &str| identify(Path::new(row)).is_ok_and(|id| behind(id) == behind(here));
        if let Some(row) = rows.find(|row| same(&row.path)) {
            return Err(refuse(format!("{} is disk {} already", d.path, row.number)));
        }
        plan.steps.push(format!("label {}", d.path));
        let size = format_size(d.capacity);
        plan = plan.dies(
            format!("all that is on {} ({size} in the file)", d.path),
            "config",
        );
    }
    for g in &file.groups {
        if view.find_group(&g.name).is_ok() {
            return Err(refuse(format!("there is a group {} already", g.name)));
        }
        let Some(level) = g.level else {
            return Err(refuse(format!(
                "the file does not say what level group {} has",
                g.name
            )));
        };
        if g.members.iter().any(|disk| disk.is_nil()) {
            return Err(refuse(format!(
                "a slot of group {} has no disk in the file",
                g.name
            )));
        }
        plan.steps
            .push(format!("make {} group {}", level_word(level), g.name));
        plan.steps.extend(
            g.lus
                .iter()
                .map(|l| format!("make LU {}, {}", l.name, format_size(l.capacity))),
        );
    }
    if used.is_empty() {
        return Err(refuse("it has no group".into()));
    }
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    for role in [Role::Data, Role::Spare, Role::Work] {
        let paths: Vec<String> = used
            .iter()
            .filter(|d| d.role == role)
            .map(|d| d.path.clone())
            .collect();
        if !paths.is_empty() {
            // Refuses whatever carries something: blank disks only.
            let add = DiskAdd {
                paths,
                role,
                ..DiskAdd::default()
            };
            disk::add(daemon, add).await?;
        }
    }
    let path_of = |uuid| {
        file.disks
            .iter()
            .find(|d| d.uuid == uuid)
            .map(|d| d.path.clone())
    };
    for g in &file.groups {
        let view = last_view(daemon);
        // A path may have a comma in it: numbers have none.
        let disks = g.members.iter().filter_map(|uuid| path_of(*uuid));
        let disks = disks.map(|path| disk::find(&view, &path).map(|d| d.number.to_string()));
        let make = GroupCreate {
            name: g.name.clone(),
            level: g.level,
            disks: disks.collect::<Result<_, _>>()?,
            chunk: Some(g.chunk),
            consistency: g.consistency,
            yes: true,
            ..GroupCreate::default()
        };
        group::create(daemon, make).await?;
        let (rebuild_min, rebuild_max) = (g.rebuild_min, g.rebuild_max);
        if rebuild_min.or(rebuild_max).is_some() || g.read_errors_max.is_some() {
            let set = GroupSet {
                group: g.name.clone(),
                rebuild_min,
                rebuild_max,
                read_errors_max: g.read_errors_max,
                yes: true,
                ..GroupSet::default()
            };
            group::set(daemon, set).await?;
        }
        for l in &g.lus {
            let make = LuCreate {
                name: l.name.clone(),
                group: g.name.clone(),
                size: Some(LuSize::Bytes(l.capacity)),
                depth: Some(l.depth).filter(|depth| *depth != 0),
                queues: Some(l.queues),
                yes: true,
                ..LuCreate::default()
            };
            lu::create(daemon, make).await?;
        }
    }
    Ok(plan.done("the groups and LUs of the file are there, empty"))
}
