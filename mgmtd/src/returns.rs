//! Disks that went away and are back: puts them into their slot again, by itself.
//!
//! Only a disk whose device was not there: what was failed by hand, for its errors, or by a write that failed on a device
//! which was still there, waits for somebody who says so. It is caught up with what it has missed, or not taken.
//!
//! What became of a disk is in its row (`Left`); how often it came back is in the events. So a restart of mgmtd forgets
//! neither.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lunar_api::target::{
    FailCause, GroupState, GroupStatus, MemberSpec, MemberState, MemberStatus, TargetAnswer,
    TargetRequest,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind};

use crate::api::last_view;
use crate::boot::{correct, look, probe_paths};
use crate::daemon::{About, Daemon};
use crate::limits::{HANGS_PAUSE, RETURNS_MAX, RETURNS_PAUSE, RETURNS_WINDOW};
use crate::link::unexpected;
use crate::opener::open_patiently;
use crate::probe::{Device, block_devices, device, now_ms};
use crate::tables::{DiskSave, Left, Tables};
use crate::views::View;

/// A disk was put back.
const RETURNED: &str = "DiskReturned";
/// It was there again, but did not do.
const NOT_RETURNED: &str = "DiskReturnFailed";

/// What is remembered between two looks; nothing depends on it but how soon and how often a disk is looked at.
#[derive(Debug, Default)]
struct Memory {
    /// The devices of members while they served.
    seats: BTreeMap<DiskUuid, Device>,
    /// What there was when all disks were looked at last.
    devices: Vec<(String, String)>,
    /// Disks that hang: not before.
    wait: BTreeMap<DiskUuid, Instant>,
}

/// Looks whenever something happened, and from time to time, for as long as mgmtd runs.
pub async fn watch(daemon: Arc<Daemon>) {
    let mut memory = Memory::default();
    loop {
        let rang = daemon.rang.notified();
        let is_up = {
            let live = daemon.live();
            live.target_pid.is_some() && !live.starting
        };
        if is_up && !daemon.is_stopping() {
            look_around(&daemon, &mut memory).await;
        }
        let _ = tokio::time::timeout(RETURNS_PAUSE, rang).await;
        // What is told of comes before the state that it made.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn look_around(daemon: &Daemon, memory: &mut Memory) {
    settle(daemon, memory).await;
    let view = last_view(daemon);
    let now = Instant::now();
    memory.wait.retain(|_, until| *until > now);
    let away: Vec<DiskSave> = away(&view, now_ms())
        .filter(|disk| !memory.wait.contains_key(&disk.uuid))
        .cloned()
        .collect();
    if away.is_empty() || !is_any_back(daemon, memory, &away).await {
        return;
    }
    let _turn = daemon.intent.lock().await;
    // All of them: a copy of a disk is only known by its being there.
    let Ok(seen) = look(daemon, &[]).await else {
        return;
    };
    correct(daemon, &seen);
    for disk in away {
        if daemon.refresh().await.is_err() || daemon.is_stopping() {
            return;
        }
        let view = last_view(daemon);
        let is_here = seen.ours.get(&disk.uuid).is_some_and(|probe| {
            let label = probe.label.as_ref();
            let member = view.member(disk.uuid);
            label.zip(member).is_some_and(|(label, (group, member))| {
                label.group == group.group && label.slot == Some(member.slot)
            })
        });
        let still = self::away(&view, now_ms()).find(|d| d.uuid == disk.uuid);
        if let Some(found) = still.filter(|_| is_here) {
            put_back(daemon, &view, found).await;
        }
    }
    let _ = daemon.save().await;
}

/// Notes of each member how it left, while that can be seen.
async fn settle(daemon: &Daemon, memory: &mut Memory) {
    let view = last_view(daemon);
    let mut changed = false;
    for group in view.live.groups.values() {
        for member in &group.members {
            let Some(disk) = view.tables.disk(member.disk) else {
                continue;
            };
            let path = PathBuf::from(&disk.path);
            let left = match member.state {
                MemberState::InSync => {
                    memory
                        .seats
                        .extend(device(&path).map(|now| (disk.uuid, now)));
                    None
                }
                MemberState::Faulty if disk.left.is_none() => {
                    let seat = memory.seats.get(&disk.uuid);
                    let is_gone = is_gone(seat, device(&path).as_ref());
                    match judge(member.cause, is_gone) {
                        Verdict::Left(left) => Some(left),
                        Verdict::NotYet => None,
                        Verdict::Ask => Some(ask(daemon, &path).await),
                    }
                }
                MemberState::Faulty | MemberState::Missing | MemberState::Rebuilding => disk.left,
            };
            if left != disk.left {
                changed = true;
                let row = daemon.tables().disk(disk.uuid).cloned();
                if let Some(row) = row {
                    daemon.tables().put_disk(DiskSave { left, ..row });
                }
            }
        }
    }
    if changed {
        let _ = daemon.save().await;
    }
}

/// The device that served is not where it was: nothing is, or another.
fn is_gone(seat: Option<&Device>, now: Option<&Device>) -> bool {
    match (seat, now) {
        (_, None) => true,
        (Some(seat), Some(now)) => seat != now,
        (None, Some(_)) => false,
    }
}

/// What follows from why a member was failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Left(Left),
    /// The disk itself has to say whether it is there.
    Ask,
    /// It may still turn out that its device went away.
    NotYet,
}

fn judge(cause: Option<FailCause>, is_gone: bool) -> Verdict {
    match cause {
        Some(FailCause::Hand | FailCause::Reads) => Verdict::Left(Left::Failed),
        Some(FailCause::Gone) => Verdict::Left(Left::Away),
        Some(FailCause::Writes | FailCause::NoAnswer) if is_gone => Verdict::Left(Left::Away),
        Some(FailCause::Writes) => Verdict::Ask,
        // It hangs, and a look at it would hang too. Nobody saw it go: it failed before ublk-target was started.
        Some(FailCause::NoAnswer) | None => Verdict::NotYet,
    }
}

/// Asks a disk that failed a write what it carries: who answers that was there, and has failed.
async fn ask(daemon: &Daemon, path: &Path) -> Left {
    let probes = probe_paths(daemon, &[path.to_path_buf()]).await;
    let reads = |probe: &lunar_api::target::Probe| probe.label.is_some();
    match probes.is_ok_and(|probes| probes.iter().any(reads)) {
        true => Left::Failed,
        false => Left::Away,
    }
}

/// Members that may come back by themselves. One at a time: while a slot of their group is filled, the others wait.
fn away(view: &View, now: u64) -> impl Iterator<Item = &DiskSave> {
    let groups = view.live.groups.values().filter(|group| {
        let is_filling = |m: &MemberStatus| m.state == MemberState::Rebuilding;
        group.state == GroupState::Degraded
            && group.replacement.is_none()
            && !group.members.iter().any(is_filling)
    });
    groups
        .flat_map(|group| &group.members)
        .filter(move |member| is_away(view, member))
        .filter_map(|member| view.tables.disk(member.disk))
        .filter(move |disk| returns_lately(&view.tables, disk.uuid, now) < RETURNS_MAX)
}

/// It is known that it went away, and what it has missed.
fn is_away(view: &View, member: &MemberStatus) -> bool {
    let left = view.tables.disk(member.disk).and_then(|disk| disk.left);
    member.can_catch_up
        && match member.state {
            MemberState::Faulty => left == Some(Left::Away),
            MemberState::Missing => left != Some(Left::Failed),
            MemberState::InSync | MemberState::Rebuilding => false,
        }
}

/// How often a disk was put back lately, whether or not that went well.
fn returns_lately(tables: &Tables, disk: DiskUuid, now: u64) -> usize {
    let recent = tables.events.iter().rev();
    let recent = recent.take_while(|e| e.time + RETURNS_WINDOW > now);
    let is_return = |name: &str| name == RETURNED || name == NOT_RETURNED;
    recent
        .filter(|e| e.disk == Some(disk) && is_return(&e.name))
        .count()
}

/// What to type about a member that went away; none if it is not one.
pub fn action(view: &View, member: &MemberStatus, number: u32) -> Option<String> {
    if !is_away(view, member) {
        return None;
    }
    let now = now_ms();
    Some(
        match returns_lately(&view.tables, member.disk, now) < RETURNS_MAX {
            true => format!(
                "bring disk {number} back, it is then caught up by itself; or add a disk (lunar disk add PATH), then: lunar \
             disk replace {number} NEW"
            ),
            false => format!(
                "disk {number} went away {RETURNS_MAX} times within an hour: see to its cable, power and slot, then: lunar \
             disk replace {number} {number}; or: lunar disk replace {number} NEW"
            ),
        },
    )
}

/// Says whether one of them can be read where it was, or may be somewhere else: devices came or went since the last look.
async fn is_any_back(daemon: &Daemon, memory: &mut Memory, away: &[DiskSave]) -> bool {
    let devices = block_devices();
    let is_new = memory.devices != devices;
    memory.devices = devices;
    let mut is_back = is_new;
    for disk in away {
        let path = PathBuf::from(&disk.path);
        // While I/O of it is not over ublk-target holds it, and a look would hang as that does.
        if device(&path).is_none() || open_patiently(&path, Duration::ZERO).await.is_err() {
            continue;
        }
        let begun = Instant::now();
        let probes = probe_paths(daemon, &[path]).await.unwrap_or_default();
        if begun.elapsed() > Duration::from_secs(2) {
            memory.wait.insert(disk.uuid, Instant::now() + HANGS_PAUSE);
        }
        let own = |probe: &lunar_api::target::Probe| {
            probe
                .label
                .as_ref()
                .is_some_and(|label| label.disk == disk.uuid)
        };
        is_back |= probes.iter().any(own);
    }
    is_back
}

/// Puts a disk into its slot again.
///
/// # Crash  before the answer: the next look finds the slot being filled, or the disk still away
async fn put_back(daemon: &Daemon, view: &View, disk: &DiskSave) {
    let Some((group, member)) = view.member(disk.uuid) else {
        return;
    };
    let about = About {
        group: Some(group.group),
        disk: Some(disk.uuid),
        lu: None,
    };
    let place = format!("slot {} of group {}", member.slot, group.name);
    match give(daemon, group, member, disk).await {
        Ok(None) => {}
        Ok(Some(status)) => {
            let text = format!(
                "disk {} ({}) is back in {place}: what it has missed is filled",
                disk.number, disk.path
            );
            daemon.event(RETURNED, about, text);
            let _ = daemon.absorb_group(status).await;
        }
        // Not the disk's fault: when ublk-target is back, or the group is.
        Err(error) if matches!(error.kind, ErrorKind::Unreachable | ErrorKind::NoService) => {}
        Err(error) => {
            let why = std::iter::once(&error.message).chain(&error.causes);
            let why = why.map(String::as_str).collect::<Vec<_>>().join(": ");
            let text = format!(
                "disk {} ({}) is there again, but not in {place}: {why}",
                disk.number, disk.path
            );
            daemon.event(NOT_RETURNED, about, text);
        }
    }
}

/// Hands a disk to its group; none while somebody else holds it.
async fn give(
    daemon: &Daemon,
    group: &GroupStatus,
    member: &MemberStatus,
    disk: &DiskSave,
) -> Result<Option<GroupStatus>, ApiError> {
    let Ok(fd) = open_patiently(Path::new(&disk.path), Duration::ZERO).await else {
        return Ok(None);
    };
    let request = TargetRequest::MemberReplace {
        group: group.group,
        slot: member.slot,
        member: MemberSpec {
            disk: disk.uuid,
            path: disk.path.clone(),
        },
        full: false,
        only_missed: true,
    };
    match daemon.ask(&request, vec![fd]).await? {
        TargetAnswer::Group { group } => Ok(Some(*group)),
        other => Err(unexpected(&other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Identity;
    use crate::tables::EventSave;
    use crate::views::tests::view as three_disks;

    #[test]
    fn only_what_went_away_comes_back_by_itself() {
        use FailCause::{Gone, Hand, NoAnswer, Reads, Writes};
        for (cause, is_gone, expected) in [
            (Some(Hand), true, Verdict::Left(Left::Failed)),
            (Some(Reads), true, Verdict::Left(Left::Failed)),
            (Some(Gone), false, Verdict::Left(Left::Away)),
            (Some(Writes), true, Verdict::Left(Left::Away)),
            (Some(Writes), false, Verdict::Ask),
            (Some(NoAnswer), true, Verdict::Left(Left::Away)),
            (Some(NoAnswer), false, Verdict::NotYet),
            (None, true, Verdict::NotYet),
        ] {
            assert_eq!(judge(cause, is_gone), expected, "{cause:?} {is_gone}");
        }
    }

    #[test]
    fn device_that_came_back_is_another() {
        let device = |minor: u64, sequence: &str| Device {
            identity: Identity::Block(minor),
            sequence: sequence.into(),
        };
        let seat = device(7, "12");
        assert!(is_gone(Some(&seat), None));
        assert!(is_gone(Some(&seat), Some(&device(7, "13"))));
        assert!(is_gone(Some(&seat), Some(&device(8, "12"))));
        assert!(!is_gone(Some(&seat), Some(&seat)));
        // Nobody saw it serve: what is there may be what was.
        assert!(!is_gone(None, Some(&seat)));
    }

    /// The group with slot 1 as told; the numbers of the disks that may come back.
    fn back(state: MemberState, left: Option<Left>, change: impl Fn(&mut GroupStatus)) -> Vec<u32> {
        let mut view = three_disks();
        for group in view.live.groups.values_mut() {
            group.state = GroupState::Degraded;
            group.members[1].state = state;
            group.members[1].can_catch_up = true;
            change(group);
        }
        let row = view.tables.disks[&2].clone();
        view.tables.put_disk(DiskSave { left, ..row });
        away(&view, 1).map(|disk| disk.number).collect()
    }

    #[test]
    fn member_comes_back_if_it_went_away_and_its_past_is_known() {
        use MemberState::{Faulty, InSync, Missing, Rebuilding};
        for (state, left, expected) in [
            (Faulty, Some(Left::Away), true),
            (Faulty, Some(Left::Failed), false),
            (Faulty, None, false),
            (Missing, None, true),
            (Missing, Some(Left::Away), true),
            (Missing, Some(Left::Failed), false),
            (InSync, Some(Left::Away), false),
            (Rebuilding, Some(Left::Away), false),
        ] {
            let expected: &[u32] = if expected { &[2] } else { &[] };
            assert_eq!(back(state, left, |_| ()), expected, "{state:?} {left:?}");
        }
        let away = |change: &dyn Fn(&mut GroupStatus)| back(Missing, None, change);
        assert!(away(&|g| g.members[1].can_catch_up = false).is_empty());
        assert!(away(&|g| g.members[2].state = Rebuilding).is_empty());
        assert!(away(&|g| g.state = GroupState::Failed).is_empty());
        assert!(away(&|g| g.replacement = Some(g.members[0].clone())).is_empty());
    }

    #[test]
    fn disk_that_comes_and_goes_is_given_up_for_the_rest_of_an_hour() {
        let mut view = three_disks();
        for group in view.live.groups.values_mut() {
            group.state = GroupState::Degraded;
            group.members[1].state = MemberState::Missing;
            group.members[1].can_catch_up = true;
        }
        let disk = view.tables.disks[&2].uuid;
        let start = 1_000_000_000;
        for (i, name) in (0..).zip([RETURNED, NOT_RETURNED, "Fail", RETURNED]) {
            assert_eq!(away(&view, start + i).count(), 1, "{i}");
            view.tables.push_event(EventSave {
                number: 0,
                time: start + i,
                name: name.into(),
                group: None,
                disk: Some(disk),
                lu: None,
                text: String::new(),
            });
        }
        assert_eq!(away(&view, start + 9).count(), 0);
        assert_eq!(away(&view, start + RETURNS_WINDOW - 1).count(), 0);
        assert_eq!(away(&view, start + RETURNS_WINDOW).count(), 1);
        let member = view.live.groups.values().next().unwrap().members[1].clone();
        // By the clock of the machine that was long ago.
        let says = action(&view, &member, 2).unwrap();
        assert!(says.contains("by itself"), "{says}");
    }
}
