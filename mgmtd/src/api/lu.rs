//! `lu`: logical units.

use lunar_api::mgmt::{LuCreate, LuEnd, LuResize, LuSet, Rename};
use lunar_api::rows::{Changed, LuList, LuOne};
use lunar_api::target::{GroupStatus, LuSize, LuStatus, TargetAnswer, TargetRequest};
use lunar_api::units::format_size;
use lunar_api::{ApiError, ErrorKind, LuUuid};
use std::path::{Path, PathBuf};

use super::{last_view, name_openers, view};
use crate::daemon::{About, Daemon};
use crate::limits::{DEPTH, DEPTH_MAX, QUEUES_MAX, ZERO_LIMIT};
use crate::link::unexpected;
use crate::names::{check_name, expand};
use crate::planner::{Gate, Plan};
use crate::probe::random;
use crate::tables::LuSave;
use crate::views::View;
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
/// # Errors  `Usage` for a size, depth or number of queues out of range
pub async fn create(daemon: &Daemon, ask: LuCreate) -> Result<Changed, ApiError> {
    let turn = daemon.turn().await?;
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
    let queues = ask.queues.unwrap_or(1);
    check_queues(queues)?;
    let Some(size) = ask.size else {
        return usage(
            "--size is missing".into(),
            "--size 10GiB, 50% or max".into(),
        );
    };
    let plan = match view.lu_named(&ask.name)? {
        Some(old) => {
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
            let zero = match ask.zero {
                true => ", and is not zeroed again",
                false => "",
            };
            Plan::unchanged(format!("LU {} is there{zero}", ask.name))
        }
        None => {
            check_size(size, live.capacity, live.free)?;
            if depth == 0 || depth > DEPTH_MAX {
                return usage(format!("depth is 1 to {DEPTH_MAX}"), "--depth 128".into());
            }
            let first = if ask.zero {
                "zero the space of and "
            } else {
                ""
            };
            Plan::step(format!(
                "{first}make LU {} in group {} and its device",
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
        queues,
        zero: ask.zero,
    };
    let (answer, _turn) = match ask.zero {
        // Others have their turn meanwhile: ublk-target keeps the space and looks at the name once more.
        true => {
            drop(turn);
            let answer = daemon.ask_apart(&request, ZERO_LIMIT).await?;
            (answer, daemon.turn().await)
        }
        false => (daemon.ask(&request, Vec::new()).await?, Ok(turn)),
    };
    let status = lu_answer(answer)?;
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
fn row_slack(group: &GroupStatus) -> u64 {
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
    } else if view.lu_named(&ask.to)?.is_some() {
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

/// Answers `LuSet`.
///
/// # Errors  `Busy` with who holds it: its device is made anew
pub async fn set(daemon: &Daemon, ask: LuSet) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let save = view.find_lu(&ask.lu)?;
    let row = view.lu_row(save);
    let Some(queues) = ask.queues else {
        return Err(ApiError::new(ErrorKind::Usage, "nothing to set is named").hint("--queues 2"));
    };
    check_queues(queues)?;
    let Some(live) = view.lu_live(save) else {
        let what = format!("the group of LU {} is not started", row.name);
        return Err(ApiError::new(ErrorKind::NoService, what).hint("lunar status"));
    };
    let ublk = live.ublk;
    let text = format!("LU {} has {queues} queues", row.name);
    let plan = if live.queues == queues {
        Plan::unchanged(text.clone())
    } else {
        check_unused(&view, save, "changed", &holders::Look::now())?;
        let step = format!(
            "make the device of LU {} anew, of {queues} queues",
            row.name
        );
        Plan::step(step)
    };
    if let Gate::Answer(mut answer) = plan.gate(ask.dry_run, ask.yes)? {
        answer.lu = Some(row);
        return Ok(*answer);
    }
    let (group, lu) = (save.group, save.uuid);
    let request = TargetRequest::LuSet { group, lu, queues };
    let ublks: Vec<u32> = ublk.into_iter().collect();
    let answer = daemon.ask(&request, Vec::new()).await;
    let status = lu_answer(answer.map_err(|e| name_openers(e, &ublks))?)?;
    absorb(daemon, status, "LuChanged", text.clone()).await?;
    let view = last_view(daemon);
    let live = view.find_lu(&ask.lu).ok().and_then(|lu| view.lu_live(lu));
    let served = live.map_or(queues, |live| live.queues_served);
    let mut answer = plan.done(match served < queues {
        true => format!("{text}; {served} are served now, as there are no more CPUs"),
        false => text,
    });
    answer.lu = view.find_lu(&ask.lu).ok().map(|l| view.lu_row(l));
    Ok(answer)
}

/// Answers `LuResize`.
///
/// # Crash  of ublk-target: the LU has its old size or its new one, and so has its device when it is back
/// # Errors  `Refused` for less than it has; `Usage` for more than there is
pub async fn resize(daemon: &Daemon, ask: LuResize) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let save = view.find_lu(&ask.lu)?;
    let row = view.lu_row(save);
    let (Some(live), Some(group)) = (view.lu_live(save), view.live.groups.get(&save.group)) else {
        let what = format!("the group of LU {} is not started", row.name);
        return Err(ApiError::new(ErrorKind::NoService, what).hint("lunar status"));
    };
    let size = match (ask.size, ask.more) {
        (Some(size), None) => size,
        (None, Some(more)) => LuSize::Bytes(live.capacity.saturating_add(more)),
        _ => {
            let error = ApiError::new(ErrorKind::Usage, "one size is to be named");
            return Err(error.hint("50GiB, 50% or max; or +10GiB"));
        }
    };
    let wanted = new_capacity(live, size, group)?;
    let named = format!("LU {} has {}", row.name, format_size(wanted));
    // One whose device has the old size yet is resized again.
    let plan = match wanted <= live.capacity && live.problem.is_empty() {
        true => Plan::unchanged(named.clone()),
        false => Plan::step(format!(
            "grow LU {} from {} to {}",
            row.name,
            format_size(live.capacity),
            format_size(wanted)
        )),
    };
    if let Gate::Answer(mut answer) = plan.gate(ask.dry_run, ask.yes)? {
        answer.lu = Some(row);
        return Ok(*answer);
    }
    let (group, lu, ublk) = (save.group, save.uuid, live.ublk);
    let request = TargetRequest::LuResize { group, lu, size };
    let ublks: Vec<u32> = ublk.into_iter().collect();
    let answer = daemon.ask(&request, Vec::new()).await;
    let status = lu_answer(answer.map_err(|e| name_openers(e, &ublks))?)?;
    let text = format!("LU {} has {}", row.name, format_size(status.capacity));
    absorb(daemon, status, "LuResized", text.clone()).await?;
    let view = last_view(daemon);
    let mut answer = plan.done(text);
    answer
        .text
        .extend(grow_line(row.device.as_deref(), ublk).await);
    answer.lu = view.find_lu(&ask.lu).ok().map(|l| view.lu_row(l));
    Ok(answer)
}

/// What a LU will have at least, if it may have that.
fn new_capacity(live: &LuStatus, size: LuSize, group: &GroupStatus) -> Result<u64, ApiError> {
    let wanted = match size {
        LuSize::Bytes(bytes) => bytes,
        LuSize::Percent(percent) => group.capacity / 100 * u64::from(percent),
        LuSize::Max => live.capacity.saturating_add(group.free),
    };
    let (has, want) = (format_size(live.capacity), format_size(wanted));
    // What was rounded up to whole stripes is not taken back.
    if wanted < live.capacity && live.capacity - wanted > row_slack(group) {
        let what = format!("LU {} is not made smaller", live.name);
        let why = format!("it has {has}, {want} is asked for: what lies behind would die");
        return Err(ApiError::new(ErrorKind::Refused, what)
            .because(why)
            .hint("make another LU of that size, and copy"));
    }
    let more = wanted.saturating_sub(live.capacity);
    if more > group.free {
        let free = format_size(group.free);
        let why = format!("it has {has}, {want} is asked for, {free} is free in the group");
        return Err(ApiError::new(ErrorKind::Usage, "the LU does not fit")
            .because(why)
            .hint(format!("lunar lu resize {} max", live.name)));
    }
    Ok(wanted)
}

/// How what is on a LU that has grown gets to use it; nothing where nothing is known.
async fn grow_line(device: Option<&str>, ublk: Option<u32>) -> Option<String> {
    let (device, ublk) = device.zip(ublk)?;
    let node = format!("/dev/ublkb{ublk}");
    let found = signature::find(Path::new(&node)).await.unwrap_or_default();
    let held = holders::Look::now().of_ublk(ublk);
    let mount = held
        .iter()
        .find_map(|held| held.strip_prefix("mounted at "));
    let command = found
        .iter()
        .find_map(|kind| grow_command(kind, device, mount))?;
    Some(format!("Its file system grows by: {command}"))
}

/// The command that has a file system, or what else is on a device, use all of it.
fn grow_command(kind: &str, device: &str, mount: Option<&str>) -> Option<String> {
    let at = match mount {
        Some(mount) => mount.to_owned(),
        None => "/mnt".into(),
    };
    let first = match mount {
        Some(_) => String::new(),
        None => format!("mount {device} /mnt && "),
    };
    match kind {
        "ext2" | "ext3" | "ext4" if mount.is_some() => Some(format!("resize2fs {device}")),
        "ext2" | "ext3" | "ext4" => Some(format!("e2fsck -f {device} && resize2fs {device}")),
        "xfs" => Some(format!("{first}xfs_growfs {at}")),
        "btrfs" => Some(format!("{first}btrfs filesystem resize max {at}")),
        "LVM2_member" => Some(format!("pvresize {device}")),
        _ => None,
    }
}

fn check_queues(queues: u16) -> Result<(), ApiError> {
    if (1..=QUEUES_MAX).contains(&queues) {
        return Ok(());
    }
    let why = format!("a LU has 1 to {QUEUES_MAX} queues");
    Err(ApiError::new(ErrorKind::Usage, why).hint("--queues 2"))
}

/// The LUs that a list names, each once.
fn choose<'a>(view: &'a View, names: &[String]) -> Result<Vec<&'a LuSave>, ApiError> {
    let mut out: Vec<&LuSave> = Vec::new();
    for name in expand(names)? {
        let lu = view.find_lu(&name)?;
        if out.iter().any(|other| other.number == lu.number) {
            let what = format!("LU {} is named twice", lu.number);
            return Err(ApiError::new(ErrorKind::Usage, what).hint("name each LU once"));
        }
        out.push(lu);
    }
    Ok(out)
}

/// Answers `LuDelete`.
///
/// # Crash  between two LUs: those before are deleted; the same command without them deletes the rest
/// # Errors  `Busy` with who holds one; `Refused` without a yes: then nothing is deleted
pub async fn delete(daemon: &Daemon, ask: LuEnd) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let lus = choose(&view, &ask.lus)?;
    let look = holders::Look::now();
    for save in &lus {
        check_unused(&view, save, "deleted", &look)?;
    }
    let mut plan = Plan::default();
    for save in &lus {
        let name = view.lu_row(save).name;
        let what = doomed(&view, save).await;
        plan.steps
            .push(format!("stop the device of LU {name} and forget it"));
        plan = plan.dies(what, &name);
    }
    if lus.len() > 1 {
        plan.confirm = Some(ask.lus.join(" "));
    }
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let mut done = Vec::new();
    for save in &lus {
        let row = view.lu_row(save);
        let deleted = delete_one(daemon, &view, save, &row.name).await;
        deleted.map_err(|error| match &done[..] {
            [] => error,
            _ => error.because(format!("deleted before it: {}", done.join(", "))),
        })?;
        done.push(row.name);
    }
    let mut answer = plan.done("");
    answer.text = done.iter().map(|n| format!("LU {n} is deleted")).collect();
    Ok(answer)
}

fn check_unused(
    view: &View,
    save: &LuSave,
    what: &str,
    look: &holders::Look,
) -> Result<(), ApiError> {
    let Some(ublk) = view.lu_live(save).and_then(|l| l.ublk) else {
        return Ok(());
    };
    let held = look.of_ublk(ublk);
    let Some(first) = held.first() else {
        return Ok(());
    };
    let hint = first.strip_prefix("mounted at ");
    let hint = hint.map(|at| format!("umount {at}"));
    let what = format!("LU {} is not {what}: in use", view.lu_row(save).name);
    let mut busy = ApiError::new(ErrorKind::Busy, what);
    let held = held.iter().map(|h| format!("/dev/ublkb{ublk} is {h}"));
    busy.causes = held.collect();
    Err(busy.hint(hint.unwrap_or("end what holds it".into())))
}

/// What dies with a LU: its size, and what it carries.
async fn doomed(view: &View, save: &LuSave) -> String {
    let row = view.lu_row(save);
    let mut what = format!("LU {}: {}", row.name, format_size(row.capacity));
    if let Some(ublk) = view.lu_live(save).and_then(|l| l.ublk) {
        let node = PathBuf::from(format!("/dev/ublkb{ublk}"));
        let found = signature::find(&node).await.unwrap_or_default();
        if !found.is_empty() {
            let found = found.into_iter().collect::<Vec<_>>().join(", ");
            what += &format!(", carries {found}");
        }
    }
    what
}

async fn delete_one(
    daemon: &Daemon,
    view: &View,
    save: &LuSave,
    name: &str,
) -> Result<(), ApiError> {
    let (group, lu) = (save.group, save.uuid);
    let ublk = view.lu_live(save).and_then(|l| l.ublk);
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
    daemon.event("LuDeleted", about, format!("LU {name} was deleted"));
    if let Some(group) = daemon.live().groups.get_mut(&group) {
        group.lus.retain(|l| l.lu != lu);
    }
    daemon.absorb().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grow_command_table() {
        for (kind, mount, command) in [
            ("ext4", Some("/srv"), Some("resize2fs /dev/lunar/vol")),
            (
                "ext4",
                None,
                Some("e2fsck -f /dev/lunar/vol && resize2fs /dev/lunar/vol"),
            ),
            ("xfs", Some("/srv"), Some("xfs_growfs /srv")),
            (
                "xfs",
                None,
                Some("mount /dev/lunar/vol /mnt && xfs_growfs /mnt"),
            ),
            (
                "btrfs",
                Some("/srv"),
                Some("btrfs filesystem resize max /srv"),
            ),
            ("LVM2_member", None, Some("pvresize /dev/lunar/vol")),
            ("swap", None, None),
        ] {
            let said = grow_command(kind, "/dev/lunar/vol", mount);
            assert_eq!(said.as_deref(), command, "{kind}");
        }
    }

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
