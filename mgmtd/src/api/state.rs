//! `status`, `events`, `job`, `path`, `shutdown`.

use std::sync::atomic::Ordering;
use std::time::Duration;

use lunar_api::mgmt::{
    EventsAsk, EventsTestAsk, GroupScrub, JobEnd, ScrubAsk, ShutdownAsk, StatusAsk,
};
use lunar_api::rows::{
    Changed, DoctorReply, EventsReply, GroupIo, JobKind, JobList, JobOneReply, MetricsReply,
    PathList, ReportReply, StatReply, StatusReply,
};
use lunar_api::target::TargetRequest;
use lunar_api::{ApiError, ErrorKind};

use super::{check_not_held, last_view, name_openers, view};
use crate::daemon::{About, Daemon};
use crate::planner::{Gate, Plan};
use crate::probe::boot_id;
use crate::tables::GroupSave;
use crate::{doctor, holders, hooks, metrics, text};

/// Longest wait of one `Events`.
const WAIT_MAX: u32 = 10_000;
/// Newest events in a report.
const REPORT_EVENTS: usize = 500;
/// Most events in one answer.
const EVENTS_ANSWER_MAX: usize = 1000;

/// Answers `Status`.
///
/// # Errors  never
pub async fn status(daemon: &Daemon, ask: StatusAsk) -> Result<StatusReply, ApiError> {
    // Tables that cannot be saved are another matter.
    let refreshed = daemon.refresh().await;
    let up = !matches!(&refreshed, Err(error) if error.kind == ErrorKind::Unreachable);
    let view = last_view(daemon);
    let boot = boot_id();
    let look = holders::Look::now();
    let by_hand = |g: &GroupSave| g.stopped_in.as_ref() == Some(&boot);
    Ok(text::status(
        &view,
        ask.unhealthy,
        up,
        &|ublk| look.of_ublk(ublk),
        &by_hand,
    ))
}

/// Answers `Events`.
///
/// # Errors  never
pub async fn events(daemon: &Daemon, ask: EventsAsk) -> Result<EventsReply, ApiError> {
    let wait = Duration::from_millis(ask.wait_ms.min(WAIT_MAX).into());
    let rang = daemon.rang.notified();
    let newest = daemon.tables().events.back().map_or(0, |e| e.number);
    if newest <= ask.after && !wait.is_zero() {
        let _ = tokio::time::timeout(wait, rang).await;
    }
    let view = last_view(daemon);
    let later = view.tables.events.iter().filter(|e| e.number > ask.after);
    let events = later
        .map(|e| view.event_row(e))
        .take(EVENTS_ANSWER_MAX)
        .collect();
    Ok(EventsReply { events })
}

/// Answers `EventsTest`: a message for every group, or one for none, as `mdadm --monitor --test`.
///
/// # Errors  never
pub fn events_test(daemon: &Daemon, ask: EventsTestAsk) -> Result<Changed, ApiError> {
    let view = last_view(daemon);
    let (hooks, refused) = hooks::hooks_in(&daemon.config.hooks_dir);
    let groups: Vec<_> = view.tables.groups.values().collect();
    let named = |g: &&GroupSave| format!("record TestMessage for group {}", g.name_seen);
    let mut plan = Plan {
        steps: groups.iter().map(named).collect(),
        ..Plan::default()
    };
    if groups.is_empty() {
        plan.steps.push("record TestMessage, of no group".into());
    }
    let run = hooks.iter().map(|hook| format!("run {}", hook.display()));
    plan.steps.extend(run);
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    for group in &groups {
        let text = format!("a test message of group {}", group.name_seen);
        daemon.event("TestMessage", About::group(group.uuid), text);
    }
    if groups.is_empty() {
        let text = "a test message; there is no group yet";
        daemon.event("TestMessage", About::default(), text);
    }
    let dir = daemon.config.hooks_dir.display();
    let count = groups.len().max(1);
    let mut answer = plan.done(format!(
        "TestMessage recorded {count} times; {} hooks in {dir}. What became of them: lunar events",
        hooks.len()
    ));
    answer.text.extend(refused);
    Ok(answer)
}

/// Answers `Doctor`.
///
/// # Errors  never
pub async fn doctor(daemon: &Daemon) -> Result<DoctorReply, ApiError> {
    let up = daemon.refresh().await.is_ok();
    let view = last_view(daemon);
    let (state_dir, run_dir) = (
        daemon.config.state_dir.clone(),
        daemon.config.run_dir.clone(),
    );
    // Not on this thread: a state directory may hang.
    let look = move || doctor::running(&view, &state_dir, &run_dir, up);
    let checks = tokio::task::spawn_blocking(look).await.map_err(|e| {
        ApiError::new(ErrorKind::Failed, "the checks did not end").because(e.to_string())
    })?;
    Ok(DoctorReply {
        exit: doctor::exit(&checks),
        checks,
    })
}

/// Answers `Metrics`.
///
/// # Errors  never
pub async fn metrics(daemon: &Daemon) -> Result<MetricsReply, ApiError> {
    let up = daemon.refresh().await.is_ok();
    let text = metrics::page(&last_view(daemon), up);
    Ok(MetricsReply { text })
}

/// Answers `Stat`.
///
/// # Errors  never
pub async fn stat(daemon: &Daemon) -> Result<StatReply, ApiError> {
    let view = view(daemon).await;
    let io = |g: &GroupSave| {
        let live = view.live.groups.get(&g.uuid)?;
        Some(GroupIo {
            group: g.number,
            name: live.name.clone(),
            members: view.member_rows(live),
        })
    };
    let at = daemon.started.elapsed().as_millis();
    Ok(StatReply {
        at: u64::try_from(at).unwrap_or(u64::MAX),
        groups: view.tables.groups.values().filter_map(io).collect(),
        lus: view.tables.lus.values().map(|l| view.lu_row(l)).collect(),
    })
}

/// Answers `Report`: status, checks, tables and events in one text. There is nothing secret in any of them.
///
/// # Errors  never
pub async fn report(daemon: &Daemon) -> Result<ReportReply, ApiError> {
    let ask = StatusAsk { unhealthy: false };
    let mut text = format!("Lunar {}\n\n== status\n", env!("CARGO_PKG_VERSION"));
    text += &status(daemon, ask).await?.text;
    text += "== doctor\n";
    for check in doctor(daemon).await?.checks {
        text += &format!("{:?} {}: {}\n", check.state, check.check, check.text);
    }
    let view = last_view(daemon);
    let mut section = |name: &str, rows: Vec<serde_json::Result<String>>| {
        text += &format!("== {name}\n");
        for row in rows.into_iter().flatten() {
            text += &format!("{row}\n");
        }
    };
    let disks = view.tables.disks.values();
    section("disks", disks.map(serde_json::to_string).collect());
    let shows = view.tables.groups.values().map(|g| view.group_show(g));
    section("groups", shows.map(|g| serde_json::to_string(&g)).collect());
    let shows = view
        .tables
        .lus
        .values()
        .map(|l| view.lu_show(l, Vec::new()));
    section("LUs", shows.map(|l| serde_json::to_string(&l)).collect());
    let labels = view.live.probes.values();
    section("superblocks", labels.map(serde_json::to_string).collect());
    let jobs = view.tables.jobs.values().map(|j| view.job_row(j));
    section("jobs", jobs.map(|j| serde_json::to_string(&j)).collect());
    let events = view.tables.events.iter().rev().take(REPORT_EVENTS);
    let mut events: Vec<_> = events
        .map(|e| serde_json::to_string(&view.event_row(e)))
        .collect();
    events.reverse();
    section("events", events);
    Ok(ReportReply { text })
}

/// Answers `JobList`.
///
/// # Errors  never
pub async fn job_list(daemon: &Daemon) -> Result<JobList, ApiError> {
    let view = view(daemon).await;
    Ok(JobList {
        jobs: view.tables.jobs.values().map(|j| view.job_row(j)).collect(),
    })
}

/// Answers `JobShow`.
///
/// # Errors  `Usage` if there is no such job
pub async fn job_show(daemon: &Daemon, job: u32) -> Result<JobOneReply, ApiError> {
    let view = view(daemon).await;
    let row = view.tables.jobs.get(&job).map(|j| view.job_row(j));
    Ok(JobOneReply {
        job: row.ok_or_else(|| crate::views::unknown("job", &job.to_string()))?,
    })
}

/// Answers `JobCancel`: what restores redundancy is never ended early, a scrub is.
///
/// # Errors  `Refused` while it runs
pub async fn job_cancel(daemon: &Daemon, ask: JobEnd) -> Result<Changed, ApiError> {
    let job = ask.job;
    let row = job_show(daemon, job).await?.job;
    if row.ended.is_some() {
        let plan = Plan::unchanged(format!("job {job} has ended"));
        if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
            return Ok(*answer);
        }
    }
    if let (JobKind::Replace, Some(disk)) = (row.kind, row.disk) {
        let what = format!("job {job} is not cancelled here");
        return Err(ApiError::new(ErrorKind::Refused, what)
            .because("it is given up with the disk that is filled; the group is then as it was")
            .hint(format!("lunar disk fail {disk}")));
    }
    if row.kind == JobKind::Scrub {
        let (group, order) = (row.group.to_string(), ScrubAsk::Cancel);
        let ask = GroupScrub {
            group,
            order,
            dry_run: ask.dry_run,
            yes: ask.yes,
            ..GroupScrub::default()
        };
        return super::group::scrub(daemon, ask).await;
    }
    if let Some(lu) = &row.lu_name {
        let what = format!("job {job} is not cancelled");
        return Err(ApiError::new(ErrorKind::Refused, what)
            .because(format!("LU {lu} comes when all of it is zeroed"))
            .hint(format!(
                "lunar job watch {job}, then: lunar lu delete {lu}; or, which ends it: lunar group stop {}",
                row.group_name
            )));
    }
    let error = ApiError::new(ErrorKind::Refused, format!("job {job} is not cancelled")).because(
        format!("redundancy of group {} would stay missing", row.group_name),
    );
    Err(match row.disk {
        Some(disk) => error.hint(format!(
            "lunar disk fail {disk}, which gives the replacement up"
        )),
        None => error.hint(format!(
            "lunar group set {} --rebuild-max 10MiB",
            row.group_name
        )),
    })
}

/// Answers `PathList`.
///
/// # Errors  never
pub async fn path_list(daemon: &Daemon) -> Result<PathList, ApiError> {
    let view = view(daemon).await;
    Ok(PathList {
        paths: view.tables.lus.values().map(|l| view.path_row(l)).collect(),
    })
}

/// Answers `Shutdown`: every group, then ublk-target, then mgmtd.
///
/// # Errors  `Busy` with the mounts that hold a LU; then everything goes on
pub async fn shutdown(daemon: &Daemon, ask: ShutdownAsk) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    for group in view.live.groups.values() {
        check_not_held(group, "Lunar cannot be shut down")?;
    }
    let stops = view
        .live
        .groups
        .values()
        .map(|g| format!("stop group {}", g.name));
    let mut plan = Plan {
        steps: stops.collect(),
        ..Plan::default()
    };
    plan.steps.push("end ublk-target".into());
    plan.steps.push("end mgmtd".into());
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    daemon.stopping.store(true, Ordering::Relaxed);
    let result = if daemon.live().target_pid.is_some() {
        daemon
            .ask(&TargetRequest::Shutdown, Vec::new())
            .await
            .map(drop)
    } else {
        Ok(())
    };
    if let Err(error) = result {
        // It may end before its answer is read: then it has done what was asked.
        if error.kind != ErrorKind::Unreachable {
            daemon.stopping.store(false, Ordering::Relaxed);
            let ublks: Vec<u32> = daemon.lus().iter().filter_map(|lu| lu.ublk).collect();
            return Err(name_openers(error, &ublks));
        }
    }
    daemon.event(
        "Shutdown",
        About::default(),
        "everything was stopped in order",
    );
    daemon.live().groups.clear();
    daemon.absorb().await?;
    daemon.stopped.notify_one();
    Ok(plan.done("everything is stopped"))
}
