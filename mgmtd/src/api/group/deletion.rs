//! The end of a group, of one that runs and of one that does not.

use lunar_api::mgmt::GroupEnd;
use lunar_api::rows::{Changed, DiskState};
use lunar_api::target::{GroupState, TargetAnswer, TargetRequest};
use lunar_api::units::format_size;
use lunar_api::{ApiError, ErrorKind, GroupUuid};

use super::super::{check_not_held, last_view, view};
use super::{about, end, reprobe};
use crate::boot::{OpenedMembers, find_disks, look_again, members_of, open_members};
use crate::daemon::Daemon;
use crate::link::unexpected;
use crate::planner::{Gate, Plan};
use crate::tables::DiskSave;
use crate::text::level_word;

/// Answers `GroupDelete`; a group that is not started is deleted on the disks of it that are here.
///
/// # Errors  `Busy` with who holds a LU; `Refused` without a yes
pub async fn delete(daemon: &Daemon, ask: GroupEnd) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let save = view.find_group(&ask.group)?;
    let Some(live) = view.live.groups.get(&save.uuid) else {
        return delete_stopped(daemon, save.uuid, &ask).await;
    };
    let (group, name) = (live.group, live.name.clone());
    check_not_held(live, &format!("group {name} is not deleted"))?;
    if live.state == GroupState::Quarantined {
        let what = format!("group {name} is not deleted: it is quarantined");
        return Err(ApiError::new(ErrorKind::NoService, what)
            .because(live.reason.clone())
            .hint(format!(
                "lunar group stop {name}, then the same command again"
            )));
    }
    let mut plan = Plan::step(format!("stop group {name}, mark its superblocks deleted"));
    let what = format!(
        "group {name}: {} {}",
        level_word(live.level),
        format_size(live.capacity)
    );
    plan = plan.dies(what, &name);
    for lu in &live.lus {
        plan = plan.dies(
            format!("LU {}: {}", lu.name, format_size(lu.capacity)),
            &name,
        );
    }
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    end(daemon, &TargetRequest::GroupDelete { group }, Some(live)).await?;
    forget(daemon, group, &name);
    reprobe(daemon, &view, Some(live)).await?;
    daemon.absorb().await?;
    Ok(plan.done(format!("group {name} is deleted; its disks are free")))
}

/// Deletes a group that is not started, and does not start it for that.
///
/// # Crash  member by member: those that were reached are free, the same command goes on with the others
async fn delete_stopped(
    daemon: &Daemon,
    group: GroupUuid,
    ask: &GroupEnd,
) -> Result<Changed, ApiError> {
    // What was last seen may be old: look at the disks now.
    find_disks(daemon).await?;
    let view = last_view(daemon);
    let show = view.group_show(view.find_group(&group.to_string())?);
    let name = show.name.clone();
    let here = members_of(daemon, group);
    let away: Vec<String> = show
        .members
        .iter()
        .filter(|m| m.state == DiskState::Missing)
        .map(|m| {
            m.disk
                .map_or(format!("slot {}", m.slot), |d| format!("disk {d}"))
        })
        .collect();
    let mut plan = Plan::default();
    for member in &here {
        let path = &member.path;
        plan.steps
            .push(format!("mark the superblocks of {path} deleted"));
    }
    plan.steps.push(format!("forget group {name}"));
    let level = show.level.map_or("level unknown", level_word);
    plan = plan.dies(format!("group {name}: {level}, not started"), &name);
    for lu in view.tables.lus.values().filter(|l| l.group == group) {
        plan = plan.dies(format!("LU {} of it", lu.name_seen), &name);
    }
    if !away.is_empty() {
        let away = away.join(", ");
        plan.steps.push(format!(
            "leave {away}, which is not here, a member of {name}"
        ));
    }
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let wanted = here.len();
    let OpenedMembers {
        specs: members,
        fds,
        ..
    } = open_members(daemon, group, here).await;
    if members.len() < wanted {
        return Err(ApiError::new(
            ErrorKind::Busy,
            format!("group {name} is not deleted: a disk of it cannot be opened"),
        )
        .because("somebody holds it, or a dead ublk-target's last I/O is not over")
        .hint("lunar events"));
    }
    let disks: Vec<_> = members.iter().map(|m| m.disk).collect();
    if !members.is_empty() {
        let request = TargetRequest::GroupErase { group, members };
        match daemon.ask(&request, fds).await? {
            TargetAnswer::Done => {}
            other => return Err(unexpected(&other)),
        }
    }
    forget(daemon, group, &name);
    let saves: Vec<DiskSave> = disks
        .iter()
        .filter_map(|d| view.tables.disk(*d).cloned())
        .collect();
    look_again(daemon, &saves).await?;
    daemon.absorb().await?;
    let mut text = format!("group {name} is deleted; its disks are free");
    if !away.is_empty() {
        text += &format!(
            ", but for {}: a disk that comes back brings what is left of the group with it",
            away.join(", ")
        );
    }
    Ok(plan.done(text))
}

/// Drops the rows of a group that is no more.
fn forget(daemon: &Daemon, group: GroupUuid, name: &str) {
    about(
        daemon,
        "GroupDeleted",
        group,
        format!("group {name} was deleted"),
    );
    {
        let mut tables = daemon.tables();
        let lus: Vec<u32> = tables
            .lus
            .values()
            .filter(|l| l.group == group)
            .map(|l| l.number)
            .collect();
        lus.into_iter().for_each(|lu| tables.drop_lu(lu));
        let jobs: Vec<_> = tables
            .jobs
            .values()
            .filter(|j| j.group == group)
            .cloned()
            .collect();
        for mut job in jobs.into_iter().filter(|j| j.ended.is_none()) {
            job.ended = Some(crate::probe::now_ms());
            (job.state, job.reason) = (
                lunar_api::rows::JobState::Failed,
                "the group was deleted".into(),
            );
            tables.put_job(job);
        }
        if let Some(number) = tables.group(group).map(|g| g.number) {
            tables.drop_group(number);
        }
    }
    let mut live = daemon.live();
    live.groups.remove(&group);
    live.problems.remove(&group);
    let log = (daemon.config.run_dir.join("inflight")).join(group.to_string());
    let _ = std::fs::remove_file(log);
}
