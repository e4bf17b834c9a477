//! `group`: RAID groups.

mod deletion;

use std::path::Path;
use std::time::Duration;

use lunar_api::mgmt::{
    GroupCreate, GroupEnd, GroupScrub, GroupSet, GroupStart, Rename, Role, ScrubAsk,
};
use lunar_api::rows::{Changed, DiskState, GroupList, GroupOne, JobState};
use lunar_api::target::{
    GroupState, GroupStatus, Level, MEMBERS_MAX, MemberSpec, ScrubOrder, ScrubState, TargetAnswer,
    TargetRequest,
};
use lunar_api::units::format_size;
use lunar_api::{ApiError, ErrorKind, GroupUuid};

use super::{check_not_held, disk, last_view, name_openers, view};
use crate::boot::{
    How, check_barred, find_disks, inflight, look_again, members_of, probe_paths, start_group,
};
use crate::config_file::are_rates;
use crate::daemon::{About, Daemon, Problem};
use crate::limits::CHUNK;
use crate::link::unexpected;
use crate::names::check_name;
use crate::opener::open_patiently;
use crate::planner::{Gate, Plan};
use crate::probe::{boot_id, random};
use crate::tables::DiskSave;
use crate::text::level_word;
use crate::views::View;

pub use deletion::delete;

/// Answers `GroupList`.
///
/// # Errors  never
pub async fn list(daemon: &Daemon) -> Result<GroupList, ApiError> {
    let view = view(daemon).await;
    Ok(GroupList {
        groups: view
            .tables
            .groups
            .values()
            .map(|g| view.group_row(g))
            .collect(),
    })
}

/// Answers `GroupShow`.
///
/// # Errors  `Usage` if there is no such group
pub async fn show(daemon: &Daemon, name: &str) -> Result<GroupOne, ApiError> {
    let view = view(daemon).await;
    Ok(GroupOne {
        group: view.group_show(view.find_group(name)?),
    })
}

/// Answers `GroupCreate`.
///
/// # Errors  `Usage` for members, chunk or level that do not fit; `Busy` for a member in use
pub async fn create(daemon: &Daemon, ask: GroupCreate) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    check_name(&ask.name)?;
    let view = view(daemon).await;
    let level = ask
        .level
        .ok_or_else(|| usage("--level is missing", "lunar group create --help"))?;
    let chunk = ask.chunk.unwrap_or(CHUNK);
    let members = disk::choose(&view, &ask.disks)?;
    let plan = match view.group_named(&ask.name)?.map(|g| view.group_row(g)) {
        Some(row) => {
            let numbers: Vec<_> = members.iter().map(|d| Some(d.number)).collect();
            if row.level != Some(level) || row.disks != numbers {
                return Err(usage(
                    &format!("there is a group {} already", ask.name),
                    "lunar group list",
                ));
            }
            Plan::unchanged(format!("group {} is there", ask.name))
        }
        None => {
            check_shape(level, chunk, members.len())?;
            check_free(&view, &members)?;
            let chosen: Vec<DiskSave> = members.iter().map(|d| (*d).clone()).collect();
            look_again(daemon, &chosen).await?;
            check_free(&last_view(daemon), &members)?;
            let numbers: Vec<_> = members.iter().map(|d| d.number.to_string()).collect();
            let (word, numbers) = (level_word(level), numbers.join(", "));
            let mut text = format!("make {word} group {} of disks {numbers}", ask.name);
            if level.is_striped() {
                text += &format!(", chunk {}", format_size(chunk));
            }
            Plan::step(text)
        }
    };
    if let Gate::Answer(mut answer) = plan.gate(ask.dry_run, ask.yes)? {
        answer.group = view.find_group(&ask.name).ok().map(|g| view.group_row(g));
        return Ok(*answer);
    }
    let uuid = random().map_err(|e| {
        ApiError::new(ErrorKind::Failed, "no random numbers").because(e.to_string())
    })?;
    let group = GroupUuid::from_bytes(uuid);
    let mut fds = Vec::new();
    for member in &members {
        let opened = open_patiently(Path::new(&member.path), Duration::ZERO).await;
        fds.push(opened.map_err(|e| {
            ApiError::new(
                ErrorKind::Busy,
                format!("disk {} cannot be opened", member.number),
            )
            .because(e.to_string())
            .hint(format!("lsof {}", member.path))
        })?);
    }
    fds.push(inflight(daemon, group)?);
    let specs = members
        .iter()
        .map(|d| MemberSpec {
            disk: d.uuid,
            path: d.path.clone(),
        })
        .collect();
    let request = TargetRequest::GroupCreate {
        group,
        name: ask.name.clone(),
        level,
        chunk,
        consistency: ask.consistency.unwrap_or(level.consistency()),
        assume_clean: ask.assume_clean,
        members: specs,
    };
    let status = group_answer(daemon.ask(&request, fds).await?)?;
    {
        let mut tables = daemon.tables();
        for member in &members {
            tables.put_disk(DiskSave {
                was: None,
                ..(*member).clone()
            });
        }
    }
    finish(daemon, &plan, status, format!("group {} is up", ask.name)).await
}

fn usage(why: &str, hint: &str) -> ApiError {
    ApiError::new(ErrorKind::Usage, why).hint(hint)
}

/// Checks level, chunk and number of members.
fn check_shape(level: Level, chunk: u64, members: usize) -> Result<(), ApiError> {
    let least = level.members_min();
    if members < least || members > MEMBERS_MAX {
        let word = level_word(level);
        let why = format!("{word} takes {least} to {MEMBERS_MAX} disks, {members} are named");
        return Err(usage(&why, "lunar disk list"));
    }
    if !chunk.is_power_of_two() || !(4096..=1 << 20).contains(&chunk) {
        return Err(usage(
            "a chunk is a power of two, 4 KiB to 1 MiB",
            "--chunk 64KiB",
        ));
    }
    Ok(())
}

fn check_free(view: &View, members: &[&DiskSave]) -> Result<(), ApiError> {
    for disk in members {
        let row = view.disk_row(disk);
        if row.state == DiskState::Free && disk.role == Role::Data {
            continue;
        }
        let (kind, why) = match row.group.and_then(|g| view.tables.groups.get(&g)) {
            Some(group) => (
                ErrorKind::Busy,
                format!("it is a member of group {}", group.name_seen),
            ),
            None => (
                ErrorKind::Usage,
                format!(
                    "it is {}, role {:?}",
                    crate::text::word(row.state),
                    disk.role
                ),
            ),
        };
        return Err(
            ApiError::new(kind, format!("disk {} cannot become a member", disk.number))
                .because(why)
                .hint("lunar disk list"),
        );
    }
    Ok(())
}

fn group_answer(answer: TargetAnswer) -> Result<GroupStatus, ApiError> {
    match answer {
        TargetAnswer::Group { group } => Ok(*group),
        other => Err(unexpected(&other)),
    }
}

fn about(daemon: &Daemon, name: &str, group: GroupUuid, text: String) {
    daemon.event(name, About::group(group), text);
}

/// Takes a group as answered and makes the answer of the verb.
pub(super) async fn finish(
    daemon: &Daemon,
    plan: &Plan,
    status: GroupStatus,
    text: String,
) -> Result<Changed, ApiError> {
    let uuid = status.group;
    daemon.absorb_group(status).await?;
    let view = last_view(daemon);
    let mut answer = plan.done(text);
    answer.group = view.tables.group(uuid).map(|g| view.group_row(g));
    // One that is paused does not end by itself: nobody is to wait for it.
    let running = |j: &&crate::tables::JobSave| j.group == uuid && j.state == JobState::Running;
    answer.job = view
        .tables
        .jobs
        .values()
        .rev()
        .find(running)
        .map(|j| j.number);
    Ok(answer)
}

fn started<'a>(view: &'a View, name: &str) -> Result<&'a GroupStatus, ApiError> {
    let save = view.find_group(name)?;
    view.live.groups.get(&save.uuid).ok_or_else(|| {
        ApiError::new(
            ErrorKind::NoService,
            format!("group {} is not started", save.name_seen),
        )
        .because(
            view.live
                .problems
                .get(&save.uuid)
                .map_or("it was stopped".into(), |p| p.why.clone()),
        )
        .hint(crate::text::action(view, save))
    })
}

/// Answers `GroupSet`.
///
/// # Errors  `Usage` if nothing is set or the least is above the most
pub async fn set(daemon: &Daemon, ask: GroupSet) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let group = started(&view, &ask.group)?.group;
    let mut row = view.find_group(&ask.group)?.clone();
    let old = row.clone();
    row.rebuild_min = ask.rebuild_min.or(row.rebuild_min);
    row.rebuild_max = ask.rebuild_max.or(row.rebuild_max);
    row.read_errors_max = ask.read_errors_max.or(row.read_errors_max);
    if (ask.rebuild_min, ask.rebuild_max, ask.read_errors_max) == (None, None, None) {
        return Err(usage("nothing to set", "lunar group set --help"));
    }
    if !are_rates(row.rebuild_min, row.rebuild_max) {
        return Err(usage(
            "--rebuild-max must be above 0 and not below --rebuild-min",
            "lunar group set --help",
        ));
    }
    let plan = if row == old {
        Plan::unchanged("it is set so")
    } else {
        Plan::step(format!("set what group {} is told", row.name_seen))
    };
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let request = TargetRequest::GroupSet {
        group,
        rebuild_min_bytes: row.rebuild_min,
        rebuild_max_bytes: row.rebuild_max,
        read_errors_max: row.read_errors_max,
    };
    let status = group_answer(daemon.ask(&request, Vec::new()).await?)?;
    daemon.tables().put_group(row);
    let mut answer = finish(daemon, &plan, status, "set".into()).await?;
    // What runs was started by somebody else.
    answer.job = None;
    Ok(answer)
}

/// Answers `GroupScrub`.
///
/// # Errors  what ublk-target refuses; nothing that could be paused or resumed
pub async fn scrub(daemon: &Daemon, ask: GroupScrub) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let live = started(&view, &ask.group)?;
    let (group, name) = (live.group, live.name.clone());
    let plan = scrub_plan(live, &ask);
    if let Gate::Answer(mut answer) = plan.gate(ask.dry_run, ask.yes)? {
        answer.job = view.scrub_job(group);
        return Ok(*answer);
    }
    let (order, text) = match ask.order {
        ScrubAsk::Start => {
            let (repair, from, rate) = (ask.repair, ask.from.unwrap_or(0), ask.rate);
            let order = ScrubOrder::Start { repair, from, rate };
            (order, format!("group {name} is being scrubbed"))
        }
        ScrubAsk::Pause => (
            ScrubOrder::Pause,
            format!("paused; go on: lunar group scrub {name} --resume"),
        ),
        ScrubAsk::Resume => (ScrubOrder::Resume, "resumed".into()),
        ScrubAsk::Cancel => (ScrubOrder::Cancel, "cancelled".into()),
    };
    let request = TargetRequest::GroupScrub { group, order };
    let status = group_answer(daemon.ask(&request, Vec::new()).await?)?;
    let mut answer = finish(daemon, &plan, status, text).await?;
    answer.job = match ask.order {
        ScrubAsk::Start | ScrubAsk::Resume => last_view(daemon).scrub_job(group),
        ScrubAsk::Pause | ScrubAsk::Cancel => None,
    };
    Ok(answer)
}

fn scrub_plan(live: &GroupStatus, ask: &GroupScrub) -> Plan {
    let state = live.scrub.as_ref().map(|scrub| scrub.state);
    let is_open = matches!(state, Some(ScrubState::Running | ScrubState::Paused));
    let name = &live.name;
    match ask.order {
        ScrubAsk::Start
            if state == Some(ScrubState::Running)
                && live.scrub.as_ref().is_some_and(|s| s.repair == ask.repair) =>
        {
            Plan::unchanged("it is being scrubbed")
        }
        ScrubAsk::Start if ask.repair => Plan::step(format!(
            "compare every stripe of group {name}, and make what does not fit fit: parity from the data, mirrors from the lowest slot"
        )),
        ScrubAsk::Start => Plan::step(format!("compare every stripe of group {name}")),
        ScrubAsk::Pause if state == Some(ScrubState::Paused) => Plan::unchanged("it is paused"),
        ScrubAsk::Pause => Plan::step(format!("pause the scrub of group {name}")),
        ScrubAsk::Resume if state == Some(ScrubState::Running) => Plan::unchanged("it is running"),
        ScrubAsk::Resume => Plan::step(format!("resume the scrub of group {name}")),
        ScrubAsk::Cancel if !is_open => Plan::unchanged("no scrub is running"),
        ScrubAsk::Cancel => Plan::step(format!("end the scrub of group {name}")),
    }
}

/// Answers `GroupStart`.
///
/// # Errors  what ublk-target refuses
pub async fn start(daemon: &Daemon, ask: GroupStart) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let save = view.find_group(&ask.group)?;
    let (group, name) = (save.uuid, save.name_seen.clone());
    let quarantined = quarantine_of(&view, group);
    if let Some(why) = quarantined.as_ref().filter(|_| !ask.again) {
        let what = format!("group {name} is quarantined");
        return Err(ApiError::new(ErrorKind::NoService, what)
            .because(why.clone())
            .hint(crate::text::again(&name)));
    }
    let live = view.live.groups.get(&group);
    if let Some(failed) = live.filter(|live| live.state == GroupState::Failed) {
        let what = format!("group {name} is started, and has failed");
        return Err(ApiError::new(ErrorKind::NoService, what)
            .because(failed.reason.clone())
            .hint(crate::text::action(&view, save)));
    }
    let plan = if live.is_some() && quarantined.is_none() {
        Plan::unchanged(format!("group {name} is started"))
    } else {
        let plan = Plan::step(format!("start group {name}"));
        match ask.force {
            false => plan,
            true => plan.dies(format!("what the missing members of {name} alone hold, and sectors being written when it stopped may be wrong"), &name),
        }
    };
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    find_disks(daemon).await?;
    check_barred(daemon, group, &name)?;
    let how = How {
        force: ask.force,
        ..How::default()
    };
    let begun = start_group(daemon, group, members_of(daemon, group), how).await;
    begun.inspect_err(|error| {
        if quarantined.is_none() {
            daemon.live().problems.insert(group, Problem::from(error));
        }
    })?;
    daemon.live().quarantined.remove(&group);
    by_hand(daemon, group, None);
    about(
        daemon,
        "GroupStarted",
        group,
        format!("group {name} was started"),
    );
    let status = daemon.live().groups.get(&group).cloned();
    let status = status.ok_or_else(|| ApiError::new(ErrorKind::Failed, "the group went away"))?;
    finish(daemon, &plan, status, format!("group {name} is up")).await
}

/// Why a group is quarantined, if it is; an adopted ublk-target knows it better than we do.
fn quarantine_of(view: &View, group: GroupUuid) -> Option<String> {
    let live = view.live.groups.get(&group);
    live.filter(|g| g.state == GroupState::Quarantined)
        .map(|g| g.reason.clone())
        .or_else(|| view.live.quarantined.get(&group).cloned())
}

fn by_hand(daemon: &Daemon, group: GroupUuid, stopped_in: Option<String>) {
    let mut tables = daemon.tables();
    if let Some(mut row) = tables.group(group).cloned() {
        row.stopped_in = stopped_in;
        tables.put_group(row);
    }
}

/// Answers `GroupStop`.
///
/// # Errors  `Busy` with who holds a LU
pub async fn stop(daemon: &Daemon, ask: GroupEnd) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let save = view.find_group(&ask.group)?;
    let name = save.name_seen.clone();
    let live = view.live.groups.get(&save.uuid);
    if let Some(live) = live {
        check_not_held(live, &format!("group {name} is not stopped"))?;
    }
    let plan = match live {
        None => Plan::unchanged(format!("group {name} is stopped")),
        Some(_) => Plan::step(format!("stop group {name} and its LUs")),
    };
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let group = save.uuid;
    end(daemon, &TargetRequest::GroupStop { group }, live).await?;
    by_hand(daemon, group, Some(boot_id()));
    daemon.live().groups.remove(&group);
    daemon.live().quarantined.remove(&group);
    reprobe(daemon, &view, live).await?;
    about(
        daemon,
        "GroupStopped",
        group,
        format!("group {name} was stopped"),
    );
    daemon.absorb().await?;
    Ok(plan.done(format!("group {name} is stopped")))
}

async fn end(
    daemon: &Daemon,
    request: &TargetRequest,
    live: Option<&GroupStatus>,
) -> Result<(), ApiError> {
    let ublks: Vec<u32> = live
        .iter()
        .flat_map(|g| &g.lus)
        .filter_map(|lu| lu.ublk)
        .collect();
    match daemon
        .ask(request, Vec::new())
        .await
        .map_err(|e| name_openers(e, &ublks))?
    {
        TargetAnswer::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Looks again at the disks that a group gave free.
async fn reprobe(daemon: &Daemon, view: &View, live: Option<&GroupStatus>) -> Result<(), ApiError> {
    let members = live.iter().flat_map(|g| g.all_members());
    let paths: Vec<_> = members
        .filter_map(|m| view.tables.disk(m.disk))
        .map(|d| d.path.clone().into())
        .collect();
    let system = view.tables.system;
    for probe in probe_paths(daemon, &paths).await? {
        if let Some(label) = probe.label.clone().filter(|l| l.system == system) {
            daemon.live().probes.insert(label.disk, probe);
        }
    }
    Ok(())
}

/// Answers `GroupGrow`.
///
/// # Errors  what ublk-target refuses: a member that is not in sync, a scrub or copy under way
pub async fn grow(daemon: &Daemon, ask: GroupEnd) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let live = started(&view, &ask.group)?;
    let (group, name) = (live.group, &live.name);
    let has = format_size(live.capacity);
    let plan = match live.capacity_max > live.capacity {
        false => Plan::unchanged(format!(
            "group {name} has {has}: its members have no more room"
        )),
        true => Plan::step(format!(
            "grow group {name} from {has} to {}",
            format_size(live.capacity_max)
        )),
    };
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let request = TargetRequest::GroupGrow { group };
    let status = group_answer(daemon.ask(&request, Vec::new()).await?)?;
    let text = format!("group {name} has {}", format_size(status.capacity));
    finish(daemon, &plan, status, text).await
}

/// Answers `GroupRename`.
///
/// # Errors  `Usage` for a name that cannot be, or is taken
pub async fn rename(daemon: &Daemon, ask: Rename) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    check_name(&ask.to)?;
    let view = view(daemon).await;
    let live = started(&view, &ask.name)?;
    let plan = if live.name == ask.to {
        Plan::unchanged("it has this name")
    } else if view.group_named(&ask.to)?.is_some() {
        return Err(usage(
            &format!("there is a group {} already", ask.to),
            "lunar group list",
        ));
    } else {
        Plan::step(format!("rename group {} to {}", live.name, ask.to))
    };
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let request = TargetRequest::GroupRename {
        group: live.group,
        name: ask.to.clone(),
    };
    let status = group_answer(daemon.ask(&request, Vec::new()).await?)?;
    let text = format!("group {} is now {}", live.name, ask.to);
    let mut answer = finish(daemon, &plan, status, text).await?;
    answer.job = None;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_shape_table() {
        for (level, chunk, members, good) in [
            (Level::Raid0, 4096, 1, true),
            (Level::Raid1, 65536, 1, false),
            (Level::Raid5, 65536, 2, false),
            (Level::Raid5, 65536, 3, true),
            (Level::Raid5, 65535, 3, false),
            (Level::Raid5, 2 << 20, 3, false),
            (Level::Raid0, 4096, 0, false),
            (Level::Raid6, 4096, 3, false),
            (Level::Raid6, 4096, 4, true),
            (Level::Raid10, 4096, 1, false),
            (Level::Raid10, 4096, 3, true),
            (Level::Linear, 4096, 1, true),
            (Level::Raid6, 4096, 64, true),
            (Level::Raid0, 4096, 65, false),
        ] {
            assert_eq!(
                check_shape(level, chunk, members).is_ok(),
                good,
                "{level:?} {chunk} {members}"
            );
        }
    }
}
