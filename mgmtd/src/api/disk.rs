//! `disk`: giving disks to Lunar, failing, replacing, taking them back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use lunar_api::mgmt::{DiskAdd, DiskFail, DiskLocate, DiskRemove, DiskReplace, Role};
use lunar_api::rows::{
    Changed, DiskList, DiskOne, DiskShow, DiskState, Led, LocateReply, LocateRow, Outcome,
};
use lunar_api::target::{MemberSpec, MemberState, TargetAnswer, TargetRequest};
use lunar_api::units::format_size;
use lunar_api::{ApiError, DiskUuid, ErrorKind};

use super::admission::{
    Fresh, check_fresh, check_kind, check_unused, error, known_disk, were_there,
};
use super::{last_view, view};
use crate::boot::{find_disks, look_again, probe_paths};
use crate::daemon::{About, Daemon};
use crate::limits::{PATHS_MAX, REOPEN_LIMIT};
use crate::link::unexpected;
use crate::names::expand;
use crate::opener::open_patiently;
use crate::planner::{Gate, Plan};
use crate::probe::{random, stable_path};
use crate::tables::{DiskSave, Left};
use crate::views::View;
use crate::{hardware, signature};

/// Answers `DiskList`.
///
/// # Errors  never
pub async fn list(daemon: &Daemon) -> Result<DiskList, ApiError> {
    Ok(DiskList {
        disks: view(daemon).await.disk_rows(),
    })
}

/// Answers `DiskShow`.
///
/// # Errors  `Usage` if there is no such disk
pub async fn show(daemon: &Daemon, name: &str) -> Result<DiskOne, ApiError> {
    let view = view(daemon).await;
    let save = find(&view, name)?;
    let row = view.disk_row(save);
    let member = view.member(save.uuid).map(|(_, m)| m);
    let group = view.group_of(save).and_then(|g| view.tables.group(g));
    let bad = view.live.bad_paths.get(&save.path).filter(|_| {
        // The group's own reason comes first.
        member.is_none_or(|m| m.reason.is_empty())
    });
    let hardware = hardware::of(Path::new(&save.path));
    let disk = DiskShow {
        disk: row.disk,
        path: row.path,
        capacity: row.capacity,
        role: row.role,
        state: row.state,
        group: row.group,
        errors: row.errors,
        uuid: save.uuid,
        group_name: group.map(|g| g.name_seen.clone()),
        slot: member.map(|m| m.slot),
        reason: member.map_or(save.sick.clone().unwrap_or_default(), |m| m.reason.clone())
            + bad.map_or("", |b| b),
        read_errors: member.map_or(0, |m| m.read_errors),
        write_errors: member.map_or(0, |m| m.write_errors),
        repaired: member.map_or(0, |m| m.repaired),
        timeouts: member.map_or(0, |m| m.timeouts),
        bad_blocks: member.map_or(0, |m| m.bad_blocks),
        bad_blocks_at: member.map_or_else(Vec::new, |m| m.bad_blocks_at.clone()),
        errors_lately: member.map_or(0, |m| m.errors_lately),
        latency_us: member.map_or(0, |m| m.latency_us),
        slow: member.and_then(|m| m.slow),
        model: hardware.model,
        serial: hardware.serial,
        links: hardware.links,
        place: hardware.slot.map(|slot| slot.name),
        write_cache: hardware.write_cache,
    };
    Ok(DiskOne { disk })
}

/// Finds a disk by number, identity or path; links are followed.
///
/// # Errors  `Usage` if there is none
pub fn find<'a>(view: &'a View, name: &str) -> Result<&'a DiskSave, ApiError> {
    view.find_disk(name)
}

/// The disks that a list names, each once.
///
/// # Errors  `Usage` for a name that nothing has, or a disk named twice
pub fn choose<'a>(view: &'a View, names: &[String]) -> Result<Vec<&'a DiskSave>, ApiError> {
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    for name in expand(names)? {
        let disk = find(view, &name)?;
        if !seen.insert(disk.number) {
            let what = format!("disk {} is named twice", disk.number);
            return Err(ApiError::new(ErrorKind::Usage, what).hint("name each disk once"));
        }
        out.push(disk);
    }
    Ok(out)
}

/// Answers `DiskAdd`.
///
/// # Crash  between labels: the labelled ones are free disks of this system; the same command finishes it
/// # Errors  `Usage`, `Busy` or `Refused` for the first path that cannot be taken; then nothing is done
pub async fn add(daemon: &Daemon, ask: DiskAdd) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    if ask.paths.is_empty() || ask.paths.len() > PATHS_MAX {
        return Err(ApiError::new(
            ErrorKind::Usage,
            format!("1 to {PATHS_MAX} paths are needed"),
        )
        .hint("lunar disk add /dev/disk/by-id/.."));
    }
    let mut view = view(daemon).await;
    let mut seen = BTreeSet::new();
    let (mut unknown, mut numbers, mut changes) = (Vec::new(), Vec::new(), Vec::new());
    for path in &ask.paths {
        let path = PathBuf::from(path);
        let identity = check_kind(&path)?;
        if !seen.insert(identity) {
            return Err(
                error(&path, ErrorKind::Usage, "the same disk is named twice")
                    .hint("name each disk once"),
            );
        }
        let away = were_there(&view, identity);
        if !away.is_empty() {
            look_again(daemon, &away).await?;
            view = last_view(daemon);
        }
        match known_disk(&view, identity) {
            Some(known) => {
                numbers.push(known.number);
                if is_changed(&view, known, ask.role)? {
                    changes.push(known.clone());
                }
            }
            None => unknown.push((path, identity)),
        }
    }
    // Usage first, then who holds it, then what would die: of all paths each.
    for (path, identity) in &unknown {
        check_unused(path, *identity).await?;
    }
    let mut fresh = Vec::new();
    for (path, _) in &unknown {
        fresh.push(check_fresh(daemon, &view, path, &ask).await?);
    }
    let there = numbers.clone();
    if fresh.is_empty() && changes.is_empty() {
        let plan = Plan::unchanged("these disks are already given to Lunar");
        if let Gate::Answer(mut answer) = plan.gate(ask.dry_run, ask.yes)? {
            answer.disks = rows(&view, &numbers);
            return Ok(*answer);
        }
    }
    let mut plan = Plan::default();
    for disk in &fresh {
        let at = disk.path.display();
        if let Some(signature) = &disk.erase {
            plan.steps
                .push(format!("erase the {signature} signature of {at}"));
        }
        let size = format_size(disk.capacity);
        plan.steps.push(match disk.known {
            Some(_) => format!("take {at} ({size}) back"),
            None => format!("label {at} ({size})"),
        });
        plan.dies.extend(disk.dies.clone());
    }
    for disk in &changes {
        let (n, role) = (disk.number, role_word(ask.role));
        plan.steps.push(match disk.role == ask.role {
            true => format!("take disk {n} for a good {role} disk again"),
            false => format!("make disk {n} a {role} disk"),
        });
    }
    // A signature that is named with --force is confirmed by that.
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    look_again(daemon, &changes).await?;
    for disk in &changes {
        give_role(daemon, disk, ask.role);
    }
    for disk in fresh {
        numbers.push(take(daemon, disk, ask.role).await?);
    }
    if ask.as_new {
        find_disks(daemon).await?;
    }
    let view = last_view(daemon);
    let mut answer = plan.done("");
    answer.disks = rows(&view, &numbers);
    answer.text = answer
        .disks
        .iter()
        .map(|d| {
            let is_same = there.contains(&d.disk) && !changes.iter().any(|c| c.number == d.disk);
            let unchanged = if is_same { ", unchanged" } else { "" };
            let size = format_size(d.capacity);
            format!("disk {}: {} ({size}){unchanged}", d.disk, d.path)
        })
        .collect();
    Ok(answer)
}

fn rows(view: &View, numbers: &[u32]) -> Vec<lunar_api::rows::DiskRow> {
    numbers
        .iter()
        .filter_map(|n| view.tables.disks.get(n))
        .map(|d| view.disk_row(d))
        .collect()
}

/// Says whether adding a known disk with a role changes it.
///
/// # Errors  `Busy` for a member that is no spare: what it is for was said when its group was made
fn is_changed(view: &View, disk: &DiskSave, role: Role) -> Result<bool, ApiError> {
    if disk.role == role {
        return Ok(disk.sick.is_some());
    }
    let Some(group) = view.group_of(disk) else {
        return Ok(true);
    };
    if (disk.role, role) == (Role::Spare, Role::Data) {
        return Ok(true);
    }
    let group = (view.tables.group(group)).map_or(group.to_string(), |g| g.name_seen.clone());
    let what = format!(
        "disk {} does not become a {} disk",
        disk.number,
        role_word(role)
    );
    Err(ApiError::new(ErrorKind::Busy, what)
        .because(format!("it is a member of group {group}"))
        .hint("lunar disk list"))
}

fn role_word(role: Role) -> &'static str {
    match role {
        Role::Data => "data",
        Role::Spare => "spare",
        Role::Work => "work",
    }
}

/// Gives a known disk another role; whatever it was before, it is tried again.
fn give_role(daemon: &Daemon, disk: &DiskSave, role: Role) {
    daemon.tables().put_disk(DiskSave {
        role,
        sick: None,
        ..disk.clone()
    });
    let text = format!("disk {} is a {} disk now", disk.number, role_word(role));
    daemon.event("DiskRole", About::disk(disk.uuid), text);
}

/// Labels one disk and gives it a number.
async fn take(daemon: &Daemon, fresh: Fresh, role: Role) -> Result<u32, ApiError> {
    let path = stable_path(&fresh.path);
    let shown = path.display().to_string();
    if let Some(erase) = &fresh.erase {
        signature::erase(&fresh.path, erase).await?;
    }
    let uuid = match fresh.known {
        Some(uuid) => uuid,
        None => {
            let bytes = random().map_err(|e| error(&path, ErrorKind::Failed, e.to_string()))?;
            let disk = DiskUuid::from_bytes(bytes);
            let fd = open_patiently(&path, REOPEN_LIMIT).await.map_err(|e| {
                error(&path, ErrorKind::Busy, e.to_string()).hint(format!("lsof {shown}"))
            })?;
            match daemon
                .ask(
                    &TargetRequest::Label {
                        path: shown.clone(),
                        disk,
                    },
                    vec![fd],
                )
                .await?
            {
                TargetAnswer::Done => disk,
                other => return Err(unexpected(&other)),
            }
        }
    };
    let number = {
        let mut tables = daemon.tables();
        let number = tables.disk(uuid).map_or(tables.next_disk(), |d| d.number);
        let (path, capacity) = (shown.clone(), fresh.capacity);
        tables.put_disk(DiskSave {
            number,
            uuid,
            path,
            role,
            capacity,
            was: None,
            sick: None,
            left: None,
        });
        number
    };
    for probe in probe_paths(daemon, &[path]).await? {
        daemon.live().probes.insert(uuid, probe);
    }
    let about = About::disk(uuid);
    daemon.event("DiskAdded", about, format!("disk {number} is {shown}"));
    daemon.save().await?;
    Ok(number)
}

/// Answers `DiskLocate`: changes nothing but a light.
///
/// # Errors  `Usage` for a name that nothing has; `Failed` if an enclosure does not take it
pub async fn locate(daemon: &Daemon, ask: DiskLocate) -> Result<LocateReply, ApiError> {
    let view = view(daemon).await;
    let disks = choose(&view, &ask.disks)?;
    let (mut rows, mut steps) = (Vec::new(), Vec::new());
    for disk in &disks {
        let found = hardware::of(Path::new(&disk.path));
        let want = if ask.off { Led::Off } else { Led::On };
        let led = found.slot.as_ref().map_or(Led::None, hardware::Slot::led);
        if led != Led::None && led != want {
            let how = if ask.off { "put out" } else { "light" };
            steps.push(format!("{how} the LED of disk {}", disk.number));
        }
        rows.push((disk, found, led, want));
    }
    let mut out = Vec::new();
    for (disk, found, mut led, want) in rows {
        if let Some(slot) = found
            .slot
            .as_ref()
            .filter(|_| !ask.dry_run && led != Led::None)
        {
            slot.light(want == Led::On).map_err(|e| {
                let what = format!("the LED of disk {} does not obey", disk.number);
                ApiError::new(ErrorKind::Failed, what)
                    .because(e.to_string())
                    .hint("dmesg | tail")
            })?;
            led = want;
        }
        out.push(LocateRow {
            disk: disk.number,
            path: disk.path.clone(),
            state: view.disk_row(disk).state,
            model: found.model,
            serial: found.serial,
            links: found.links,
            place: found.slot.map(|slot| slot.name),
            led,
        });
    }
    let outcome = match (steps.is_empty(), ask.dry_run) {
        (true, _) => Outcome::Unchanged,
        (false, true) => Outcome::Planned,
        (false, false) => Outcome::Changed,
    };
    Ok(LocateReply {
        outcome,
        steps,
        disks: out,
    })
}

/// Answers `DiskFail`.
///
/// # Errors  `NoRedundancy` where data would be lost
pub async fn fail(daemon: &Daemon, ask: DiskFail) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let disk = find(&view, &ask.disk)?;
    let n = disk.number;
    let plan = match view.member(disk.uuid) {
        None => return Err(not_member(n)),
        Some((_, m)) if m.state == lunar_api::target::MemberState::Faulty => {
            Plan::unchanged(format!("disk {n} is faulty"))
        }
        // The engine decides; a plan must not promise what it will refuse. On a raid10 it depends on the mirror.
        Some((group, m))
            if m.state == lunar_api::target::MemberState::InSync
                && group.can_lose == 0
                && group.level != lunar_api::target::Level::Raid10 =>
        {
            return Err(
                ApiError::new(ErrorKind::NoRedundancy, format!("disk {n} is not failed"))
                    .because("without it data would be lost: the group has no redundancy left")
                    .hint("lunar status"),
            );
        }
        Some((group, _)) => Plan::step(format!("fail disk {n} in group {}", group.name)),
    };
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let group = view
        .member(disk.uuid)
        .map(|(group, _)| group.group)
        .unwrap_or_default();
    match daemon
        .ask(
            &TargetRequest::MemberFail {
                group,
                disk: disk.uuid,
            },
            Vec::new(),
        )
        .await?
    {
        TargetAnswer::Group { group } => daemon.absorb_group(*group).await?,
        other => return Err(unexpected(&other)),
    }
    daemon.tables().put_disk(DiskSave {
        left: Some(Left::Failed),
        ..disk.clone()
    });
    daemon.save().await?;
    let mut answer = plan.done(format!("disk {n} is faulty"));
    answer.disks = rows(&last_view(daemon), &[n]);
    Ok(answer)
}

fn not_member(disk: u32) -> ApiError {
    ApiError::new(
        ErrorKind::Usage,
        format!("disk {disk} is no member of a started group"),
    )
    .because("only a member can fail or be replaced")
    .hint("lunar disk list")
}

/// Answers `DiskReplace`.
///
/// # Errors  `Usage` if OLD is no member or NEW is not free and large enough; `Refused` if OLD is in sync
pub async fn replace(daemon: &Daemon, ask: DiskReplace) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let old = find(&view, &ask.old)?;
    if let (Some(was), Some(new)) = (old.was, &ask.new) {
        let new = find(&view, new)?;
        let there = view
            .member(new.uuid)
            .is_some_and(|(g, m)| (g.group, m.slot) == was);
        if there
            && let Gate::Answer(a) =
                Plan::unchanged("that has been done").gate(ask.dry_run, true)?
        {
            return Ok(*a);
        }
    }
    // Where a spare has taken its place, that one makes way: it is a spare again then.
    let old = spare_for(&view, old).unwrap_or(old);
    let (group, member) = view
        .member(old.uuid)
        .ok_or_else(|| not_member(old.number))?;
    if let (Some(coming), Some(name)) = (&group.replacement, &ask.new) {
        let is_same = find(&view, name)?.uuid == coming.disk && coming.slot == member.slot;
        if is_same
            && let Gate::Answer(a) =
                Plan::unchanged("that is being done").gate(ask.dry_run, true)?
        {
            return Ok(*a);
        }
    }
    let is_copied = member.state == MemberState::InSync;
    if is_copied
        && ask
            .new
            .as_ref()
            .is_some_and(|name| find(&view, name).is_ok_and(|d| d.uuid == old.uuid))
    {
        let what = format!("disk {} does not replace itself", old.number);
        return Err(ApiError::new(ErrorKind::Usage, what)
            .because("it is in sync: there is nothing to rebuild")
            .hint("lunar disk list"));
    }
    let new = choose_new(&view, &ask, old, group.member_bytes)?.clone();
    look_again(daemon, std::slice::from_ref(&new)).await?;
    let fresh = last_view(daemon);
    let new = choose_new(
        &fresh,
        &DiskReplace {
            new: Some(new.number.to_string()),
            ..ask.clone()
        },
        old,
        group.member_bytes,
    )?;
    if let Some(why) = (fresh.live.bad_paths.get(&new.path)).filter(|_| new.uuid == old.uuid) {
        let what = format!("disk {} cannot take its place again", new.number);
        return Err(ApiError::new(ErrorKind::Failed, what)
            .because(format!("it {why}"))
            .hint(format!("lunar disk replace {} NEW", old.number)));
    }
    let (n, slot) = (new.number, member.slot);
    let name = &group.name;
    let plan = Plan::step(match is_copied {
        true => format!(
            "copy disk {} to disk {n}, which then takes slot {slot} of group {name}",
            old.number
        ),
        false => format!("put disk {n} into slot {slot} of group {name} and rebuild it"),
    });
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    let fd = open_patiently(Path::new(&new.path), REOPEN_LIMIT)
        .await
        .map_err(|e| {
            ApiError::new(ErrorKind::Busy, format!("disk {n} cannot be opened"))
                .because(e.to_string())
                .hint(format!("lsof {}", new.path))
        })?;
    let spec = MemberSpec {
        disk: new.uuid,
        path: new.path.clone(),
    };
    let request = TargetRequest::MemberReplace {
        group: group.group,
        slot,
        member: spec,
        full: ask.full,
        only_missed: false,
    };
    let status = match daemon.ask(&request, vec![fd]).await? {
        TargetAnswer::Group { group } => *group,
        other => return Err(unexpected(&other)),
    };
    {
        let mut tables = daemon.tables();
        if old.uuid != new.uuid && !is_copied {
            tables.put_disk(DiskSave {
                was: Some((group.group, slot)),
                ..old.clone()
            });
        }
        tables.put_disk(DiskSave {
            was: None,
            sick: None,
            role: Role::Data,
            ..new.clone()
        });
    }
    daemon.absorb_group(status).await?;
    let mut answer = plan.done(match is_copied {
        true => format!("disk {} is being copied to disk {n}", old.number),
        false => format!("disk {n} is in slot {slot}"),
    });
    let tables = daemon.tables();
    let running = |j: &&crate::tables::JobSave| j.disk == Some(new.uuid) && j.ended.is_none();
    answer.job = tables.jobs.values().rev().find(running).map(|j| j.number);
    Ok(answer)
}

/// The spare that sits where a disk was that failed.
fn spare_for<'a>(view: &'a View, old: &DiskSave) -> Option<&'a DiskSave> {
    let (group, slot) = old.was?;
    let group = view.live.groups.get(&group)?;
    let member = group.members.iter().find(|m| m.slot == slot)?;
    let sits = view.tables.disk(member.disk)?;
    (sits.role == Role::Spare).then_some(sits)
}

fn choose_new<'a>(
    view: &'a View,
    ask: &DiskReplace,
    old: &DiskSave,
    need: u64,
) -> Result<&'a DiskSave, ApiError> {
    let free = |d: &DiskSave| {
        let room = view.live.probes.get(&d.uuid).map_or(0, |p| p.data_bytes);
        matches!(view.disk_row(d).state, DiskState::Free | DiskState::Spare) && room >= need
    };
    let Some(name) = &ask.new else {
        let mut spares = view
            .tables
            .disks
            .values()
            .filter(|d| d.role == Role::Spare && free(d) && d.uuid != old.uuid);
        return spares.next().ok_or_else(|| {
            ApiError::new(ErrorKind::Usage, "there is no spare of this size")
                .hint("lunar disk add --role spare PATH")
        });
    };
    let new = find(view, name)?;
    // A disk that was away comes back into its slot: what it holds is stale and written over.
    if new.uuid == old.uuid {
        return Ok(new);
    }
    if let Some(group) = view.group_of(new) {
        let group = (view.tables.group(group)).map_or(group.to_string(), |g| g.name_seen.clone());
        let what = format!("disk {} cannot take its place", new.number);
        return Err(ApiError::new(ErrorKind::Busy, what)
            .because(format!("it is a member of group {group}"))
            .hint("lunar disk list"));
    }
    if !free(new) {
        let row = view.disk_row(new);
        let why = format!(
            "it is {}, {}",
            crate::text::word(row.state),
            format_size(new.capacity)
        );
        return Err(ApiError::new(
            ErrorKind::Usage,
            format!("disk {} cannot take its place", new.number),
        )
        .because(why)
        .because(format!(
            "needed: a free disk of more than {}",
            format_size(need)
        ))
        .hint("lunar disk list"));
    }
    Ok(new)
}

/// Answers `DiskRemove`.
///
/// # Errors  `Busy` for a member; `Refused` to wipe without a yes
pub async fn remove(daemon: &Daemon, ask: DiskRemove) -> Result<Changed, ApiError> {
    let _turn = daemon.turn().await?;
    let view = view(daemon).await;
    let chosen = choose(&view, &ask.disks)?;
    // What was last seen may be old, and a wipe cannot be taken back: look at the disks now.
    let free = chosen.iter().filter(|d| view.member(d.uuid).is_none());
    let free: Vec<DiskSave> = free.map(|d| (*d).clone()).collect();
    look_again(daemon, &free).await?;
    let view = last_view(daemon);
    let mut disks = Vec::new();
    for disk in choose(&view, &ask.disks)? {
        // The disk's own label decides, also for a group that has no row yet.
        if let Some(group) = view.group_of(disk) {
            let name = view
                .tables
                .group(group)
                .map_or(group.to_string(), |g| g.name_seen.clone());
            let what = format!("disk {} is not removed", disk.number);
            return Err(ApiError::new(ErrorKind::Busy, what)
                .because(format!("it is a member of group {name}"))
                .hint(format!("lunar disk replace {} NEW", disk.number)));
        }
        disks.push(disk.clone());
    }
    let blank = |disk: &&DiskSave| !view.live.probes.contains_key(&disk.uuid);
    if let Some(disk) = disks.iter().find(blank).filter(|_| ask.wipe) {
        let what = format!("disk {} is not wiped", disk.number);
        return Err(ApiError::new(ErrorKind::Refused, what)
            .because(format!("{} does not carry its identity now", disk.path))
            .hint(format!("lunar disk remove {}", disk.number)));
    }
    let mut plan = Plan::default();
    for disk in &disks {
        let (n, path) = (disk.number, &disk.path);
        if ask.wipe {
            plan.steps
                .push(format!("overwrite the superblocks of {path}"));
            let size = format_size(disk.capacity);
            plan = plan.dies(
                format!("the superblocks of disk {n} ({path}, {size}): it cannot be brought back"),
                &n.to_string(),
            );
        }
        plan.steps.push(format!("forget disk {n}"));
    }
    if let Gate::Answer(answer) = plan.gate(ask.dry_run, ask.yes)? {
        return Ok(*answer);
    }
    for disk in &disks {
        if ask.wipe {
            let fd = open_patiently(Path::new(&disk.path), REOPEN_LIMIT)
                .await
                .map_err(|e| {
                    error(Path::new(&disk.path), ErrorKind::Busy, e.to_string())
                        .hint("the same command without --wipe")
                })?;
            daemon
                .ask(
                    &TargetRequest::Wipe {
                        path: disk.path.clone(),
                    },
                    vec![fd],
                )
                .await?;
        }
        let about = About::disk(disk.uuid);
        daemon.event(
            "DiskRemoved",
            about,
            format!("disk {} ({}) was removed", disk.number, disk.path),
        );
        daemon.tables().drop_disk(disk.number);
        daemon.live().probes.remove(&disk.uuid);
        daemon.save().await?;
    }
    let numbers: Vec<String> = disks.iter().map(|d| d.number.to_string()).collect();
    Ok(plan.done(format!("removed: {}", numbers.join(", "))))
}
