//! `lu`: logical units.

use lunar_api::mgmt::{LuCreate, LuEnd, Rename};
use lunar_api::rows::{Changed, LuList, LuOne};
use lunar_api::target::{LuSize, LuStatus, TargetAnswer, TargetRequest};
use lunar_api::units::format_size;
use lunar_api::{ApiError, ErrorKind, LuUuid};
use std::path::PathBuf;

use super::{last_view, name_openers, view};
use crate::daemon::{About, Daemon};
use crate::limits::{DEPTH, DEPTH_MAX};
use crate::link::unexpected;
use crate::names::check_name;
use crate::planner::{Gate, Plan};
use crate::probe::random;
use crate::{holders, signature};

/// Answers `LuList`.
///
/// # Errors  never
pub async fn list(daemon: &Daemon) -> Result<LuList, ApiError> {
    let view = view(daemon).await;
    Ok(LuList {
        lus: view.tables.lus.values().map(|l| view.lu_row(l)).collect(),
    })
}

/// Answers `LuShow`.
///
/// # Errors  `Usage` if there is no such LU
pub async fn show(daemon: &Daemon, name: &str) -> Result<LuOne, ApiError> {
    let view = view(daemon).await;
    let save = view.find_lu(name)?;
    let held = view
        .lu_live(save)
        .and_then(|l| l.ublk)
        .map(|ublk| holders::Look::now().of_ublk(ublk));
    Ok(LuOne {
        lu: view.lu_show(save, held.unwrap_or_default()),
    })
}

/// Answers `LuCreate`.
///
/// # Errors  `Usage` for a size or depth out of range
pub async fn create(daemon: &Daemon, ask: LuCreate) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    check_name(&ask.name)?;
    let view = view(daemon).await;
    let save = view.find_group(&ask.group)?;
    let usage = |why: String, hint: String| Err(ApiError::new(ErrorKind::Usage, why).hint(hint));
    let Some(live) = view.live.groups.get(&save.uuid) else {
        return Err(ApiError::new(
            ErrorKind::NoService,
            format!("group {} is not started", save.name_seen),
        )
        .hint(format!("lunar group start {}", save.name_seen)));
    };
    let group = live.group;
    let depth = ask.depth.unwrap_or(DEPTH);
    let Some(size) = ask.size else {
        return usage(
            "--size is missing".into(),
            "--size 10GiB, 50% or max".into(),
        );
    };
    let plan = match view.find_lu(&ask.name) {
        Ok(old) => {
            let row = view.lu_row(old);
            let fits = match size {
                LuSize::Bytes(bytes) => {
                    row.capacity >= bytes && row.capacity - bytes <= row_slack(live)
                }
                LuSize::Percent(_) | LuSize::Max => true,
            };
            if old.group != group || !fits {
                return usage(
                    format!("there is a LU {} already", ask.name),
                    "lunar lu list".into(),
                );
            }
            Plan::unchanged(format!("LU {} is there", ask.name))
        }
        Err(_) => {
            check_size(size, live.capacity, live.free)?;
            if depth == 0 || depth > DEPTH_MAX {
                return usage(format!("depth is 1 to {DEPTH_MAX}"), "--depth 128".into());
            }
            Plan::step(format!(
                "make LU {} in group {} and its device",
                ask.name, live.name
            ))
        }
    };
    if let Gate::Answer(mut answer) = plan.gate(ask.dry_run, ask.yes)? {
        answer.lu = view.find_lu(&ask.name).ok().map(|l| view.lu_row(l));
        return Ok(*answer);
    }
    let uuid = random().map_err(|e| {
        ApiError::new(ErrorKind::Failed, "no random numbers").because(e.to_string())
    })?;
    let lu = LuUuid::from_bytes(uuid);
    let name = ask.name.clone();
    let request = TargetRequest::LuCreate {
        group,
        lu,
        name,
        size,
        depth,
    };
    let status = lu_answer(daemon.ask(&request, Vec::new()).await?)?;
    let device = status
        .ublk
        .map_or("no device".into(), |n| format!("/dev/ublkb{n}"));
    absorb(
        daemon,
        status,
        "LuCreated",
        format!("LU {} was made", ask.name),
    )
    .await?;
    let view = last_view(daemon);
    let mut answer = plan.done(format!(
        "LU {}: {}/{} -> {device}",
        ask.name, view.nodes, ask.name
    ));
    answer.lu = view.find_lu(&ask.name).ok().map(|l| view.lu_row(l));
    Ok(answer)
}

/// A size is rounded up to whole stripes of at least 1 MiB: a repeat may be that much smaller.
fn row_slack(group: &lunar_api::target::GroupStatus) -> u64 {
    (group.chunk * group.members.len() as u64).max(1 << 20)
}

fn check_size(size: LuSize, capacity: u64, free: u64) -> Result<(), ApiError> {
    let bytes = match size {
        LuSize::Bytes(bytes) => bytes,
        LuSize::Percent(percent) => capacity / 100 * u64::from(percent),
        LuSize::Max => free,
    };
    let percent_bad = matches!(size, LuSize::Percent(p) if p == 0 || p > 100);
    if bytes == 0 || bytes > free || percent_bad {
        let (want, free) = (format_size(bytes), format_size(free));
        return Err(ApiError::new(ErrorKind::Usage, "the LU does not fit")
            .because(format!("{want} is asked for, {free} is free in the group"))
            .hint("--size max"));
    }
    Ok(())
}

fn lu_answer(answer: TargetAnswer) -> Result<LuStatus, ApiError> {
    match answer {
        TargetAnswer::Lu { lu } => Ok(*lu),
        other => Err(unexpected(&other)),
    }
}

async fn absorb(
    daemon: &Daemon,
    status: LuStatus,
    event: &str,
    text: String,
) -> Result<(), ApiError> {
    let about = About {
        group: Some(status.group),
        lu: Some(status.lu),
        disk: None,
    };
    daemon.event(event, about, text);
    if daemon.refresh().await.is_err() {
        if let Some(group) = daemon.live().groups.get_mut(&status.group) {
            group.lus.retain(|l| l.lu != status.lu);
            group.lus.push(status);
        }
        daemon.absorb().await?;
    }
    Ok(())
}

/// Answers `LuRename`.
///
/// # Errors  `Usage` for a name that cannot be, or is taken
pub async fn rename(daemon: &Daemon, ask: Rename) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    check_name(&ask.to)?;
    let view = view(daemon).await;
    let save = view.find_lu(&ask.name)?;
    let old = view.lu_row(save).name;
    let plan = if old == ask.to {
        Plan::unchanged("it has this name")
    } else if view.find_lu(&ask.to).is_ok() {
        return Err(ApiError::new(
            ErrorKind::Usage,
            format!("there is a LU {} already", ask.to),
        )
        .hint("lunar lu list"));
    } else {
        Plan::step(format!("rename LU {old} to {}", ask.to))
    };
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let (group, lu, name) = (save.group, save.uuid, ask.to.clone());
    let status = lu_answer(
        daemon
            .ask(&TargetRequest::LuRename { group, lu, name }, Vec::new())
            .await?,
    )?;
    let text = format!("LU {old} is now {}", ask.to);
    absorb(daemon, status, "LuRenamed", text.clone()).await?;
    let view = last_view(daemon);
    let mut answer = plan.done(text);
    answer.lu = view.find_lu(&ask.to).ok().map(|l| view.lu_row(l));
    Ok(answer)
}

/// Answers `LuDelete`.
///
/// # Errors  `Busy` with who holds it; `Refused` without a yes
pub async fn delete(daemon: &Daemon, ask: LuEnd) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let save = view.find_lu(&ask.lu)?;
    let row = view.lu_row(save);
    let live = view.lu_live(save);
    let ublk = live.and_then(|l| l.ublk);
    if let Some(ublk) = ublk {
        let held = holders::Look::now().of_ublk(ublk);
        if let Some(first) = held.first() {
            let hint = first
                .strip_prefix("mounted at ")
                .map(|at| format!("umount {at}"));
            let mut busy = ApiError::new(
                ErrorKind::Busy,
                format!("LU {} is not deleted: in use", row.name),
            );
            busy.causes = held
                .iter()
                .map(|h| format!("/dev/ublkb{ublk} is {h}"))
                .collect();
            return Err(busy.hint(hint.unwrap_or("end what holds it".into())));
        }
    }
    let mut what = format!("LU {}: {}", row.name, format_size(row.capacity));
    if let Some(ublk) = ublk {
        let found = signature::find(&PathBuf::from(format!("/dev/ublkb{ublk}")))
            .await
            .unwrap_or_default();
        if !found.is_empty() {
            what += &format!(
                ", carries {}",
                found.into_iter().collect::<Vec<_>>().join(", ")
            );
        }
    }
    let plan = Plan::step(format!("stop the device of LU {} and forget it", row.name))
        .dies(what, &row.name);
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let (group, lu) = (save.group, save.uuid);
    let ublks: Vec<u32> = ublk.into_iter().collect();
    let answer = daemon
        .ask(&TargetRequest::LuDelete { group, lu }, Vec::new())
        .await;
    match answer.map_err(|e| name_openers(e, &ublks))? {
        TargetAnswer::Done => {}
        other => return Err(unexpected(&other)),
    }
    let about = About {
        group: Some(group),
        lu: Some(lu),
        disk: None,
    };
    daemon.event("LuDeleted", about, format!("LU {} was deleted", row.name));
    if let Some(group) = daemon.live().groups.get_mut(&group) {
        group.lus.retain(|l| l.lu != lu);
    }
    daemon.absorb().await?;
    Ok(plan.done(format!("LU {} is deleted", row.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_size_table() {
        for (size, good) in [
            (LuSize::Bytes(0), false),
            (LuSize::Bytes(100), true),
            (LuSize::Bytes(101), false),
            (LuSize::Percent(0), false),
            (LuSize::Percent(10), true),
            (LuSize::Percent(101), false),
            (LuSize::Max, true),
        ] {
            assert_eq!(check_size(size, 1000, 100).is_ok(), good, "{size:?}");
        }
    }
}
