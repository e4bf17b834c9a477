//! Hot spares: takes one for a slot that is faulty or missing, by itself.
//!
//! Spares are shared by all groups. Who takes one holds `intent`, so that no two groups (and no person) take the
//! same; ublk-target makes the slot's new disk durable before anything else counts. Nothing is remembered between two
//! looks: what a crash leaves undone, the next look does.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lunar_api::mgmt::Role;
use lunar_api::rows::DiskState;
use lunar_api::target::{GroupState, GroupStatus, MemberSpec, MemberState, MemberStatus};
use lunar_api::target::{TargetAnswer, TargetRequest};
use lunar_api::{ApiError, DiskUuid, ErrorKind};

use crate::api::last_view;
use crate::boot::look_again;
use crate::daemon::{About, Daemon};
use crate::limits::SPARES_PAUSE;
use crate::link::unexpected;
use crate::opener::open_patiently;
use crate::tables::DiskSave;
use crate::views::View;

/// A slot for a spare, and the spare that fits it best.
#[derive(Debug, Clone, Copy)]
struct Match<'a> {
    group: &'a GroupStatus,
    member: &'a MemberStatus,
    spare: &'a DiskSave,
}

/// Looks whenever something happened, and from time to time, for as long as mgmtd runs.
pub async fn watch(daemon: Arc<Daemon>) {
    loop {
        let rang = daemon.rang.notified();
        let has_spares = daemon
            .tables()
            .disks
            .values()
            .any(|d| d.role == Role::Spare);
        if has_spares && !daemon.is_stopping() && daemon.live().target_pid.is_some() {
            fill(&daemon).await;
        }
        let _ = tokio::time::timeout(SPARES_PAUSE, rang).await;
    }
}

/// Fills what can be filled now.
async fn fill(daemon: &Daemon) {
    let _turn = daemon.intent.lock().await;
    if daemon.refresh().await.is_err() {
        return;
    }
    // Each turn takes a spare or puts one aside: it ends.
    while let Some((slot, spare)) = next(&last_view(daemon)) {
        let probed = look_again(daemon, std::slice::from_ref(&spare)).await;
        if probed.is_err() || daemon.is_stopping() {
            return;
        }
        let view = last_view(daemon);
        // Else it is not what it was when it was last seen: the next look does without it.
        let Some(found) = find(&view).filter(|m| m.spare.uuid == spare.uuid) else {
            continue;
        };
        match take(daemon, found).await {
            Ok(()) => {}
            // Not the spare's fault: when ublk-target is back, or the group is.
            Err(error) if matches!(error.kind, ErrorKind::Unreachable | ErrorKind::NoService) => {
                return;
            }
            Err(error) => put_aside(daemon, &spare, slot, &error),
        }
    }
    let _ = daemon.save().await;
}

fn next(view: &View) -> Option<(u16, DiskSave)> {
    find(view).map(|found| (found.member.slot, found.spare.clone()))
}

/// The first slot that wants a spare and has one that fits: the smallest.
fn find(view: &View) -> Option<Match<'_>> {
    view.live.groups.values().find_map(|group| {
        let member = open_slot(group)?;
        let spare = best(view, group)?;
        Some(Match {
            group,
            member,
            spare,
        })
    })
}

/// A slot that nobody fills. One at a time: another one of the group waits until that is filled.
fn open_slot(group: &GroupStatus) -> Option<&MemberStatus> {
    let is_out = |m: &&MemberStatus| matches!(m.state, MemberState::Faulty | MemberState::Missing);
    let filling = |m: &MemberStatus| m.state == MemberState::Rebuilding;
    if group.state != GroupState::Degraded || group.members.iter().any(filling) {
        return None;
    }
    group.members.iter().find(is_out)
}

/// The smallest spare that a group can take.
pub fn best<'a>(view: &'a View, group: &GroupStatus) -> Option<&'a DiskSave> {
    let fits = |disk: &&DiskSave| {
        let probe = view.live.probes.get(&disk.uuid);
        let is_waiting = view.disk_row(disk).state == DiskState::Spare;
        is_waiting
            && !view.live.bad_paths.contains_key(&disk.path)
            && probe.is_some_and(|p| {
                p.data_bytes >= group.member_bytes && p.logical_block <= group.logical_block
            })
    };
    let spares = view.tables.disks.values().filter(fits);
    spares.min_by_key(|disk| (disk.capacity, disk.number))
}

/// Puts the spare into the slot.
///
/// # Crash  before the answer: the next look finds the slot filled, or the spare still free
async fn take(daemon: &Daemon, found: Match<'_>) -> Result<(), ApiError> {
    let Match {
        group,
        member,
        spare,
    } = found;
    let fd = open_patiently(Path::new(&spare.path), Duration::ZERO)
        .await
        .map_err(|e| {
            ApiError::new(ErrorKind::Failed, "it cannot be opened").because(e.to_string())
        })?;
    let request = TargetRequest::MemberReplace {
        group: group.group,
        slot: member.slot,
        member: MemberSpec {
            disk: spare.uuid,
            path: spare.path.clone(),
        },
        full: false,
        only_missed: false,
    };
    let status = match daemon.ask(&request, vec![fd]).await? {
        TargetAnswer::Group { group } => *group,
        other => return Err(unexpected(&other)),
    };
    let was = seat(daemon, group, member, spare);
    let about = About {
        group: Some(group.group),
        disk: Some(spare.uuid),
        lu: None,
    };
    let text = format!(
        "spare {} took the place of {was} (slot {}) of group {}",
        spare.number, member.slot, group.name
    );
    daemon.event("MoveSpare", about, text);
    daemon.absorb_group(status).await
}

/// Corrects the rows of who left and who came; says who left.
fn seat(daemon: &Daemon, group: &GroupStatus, member: &MemberStatus, spare: &DiskSave) -> String {
    let mut tables = daemon.tables();
    let old = tables.disk(member.disk).cloned();
    let was = old.as_ref().map_or("a missing disk".into(), |old| {
        format!("disk {}", old.number)
    });
    if let Some(old) = old {
        tables.put_disk(DiskSave {
            was: Some((group.group, member.slot)),
            ..old
        });
    }
    tables.put_disk(DiskSave {
        was: None,
        ..spare.clone()
    });
    was
}

/// A spare that does not do: it is faulty until somebody adds it again.
fn put_aside(daemon: &Daemon, spare: &DiskSave, slot: u16, error: &ApiError) {
    let why = std::iter::once(&error.message).chain(&error.causes);
    let why = why.map(String::as_str).collect::<Vec<_>>().join(": ");
    let text = format!(
        "spare {} ({}) could not take slot {slot}: {why}; the next one is taken",
        spare.number, spare.path
    );
    daemon.event("FailSpare", About::disk(spare.uuid), text);
    let disk: Option<DiskSave> = daemon.tables().disk(spare.uuid).cloned();
    if let Some(disk) = disk {
        daemon.tables().put_disk(DiskSave {
            sick: Some(why),
            ..disk
        });
    }
}

/// The disk whose slot a spare has taken, if the member came as a spare.
pub fn replaced<'a>(view: &'a View, group: &GroupStatus, disk: DiskUuid) -> Option<&'a DiskSave> {
    let member = group.members.iter().find(|m| m.disk == disk)?;
    view.tables.disk(disk).filter(|d| d.role == Role::Spare)?;
    let place = Some((group.group, member.slot));
    view.tables.disks.values().find(|d| d.was == place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view as three_disks;
    use lunar_api::target::{Label, Probe};
    use lunar_api::{GroupUuid, History};

    const MIB: u64 = 1 << 20;

    /// Adds a spare of so much room for data.
    fn spare(view: &mut View, number: u32, data_bytes: u64, logical_block: u32) {
        let uuid = DiskUuid::from_bytes([u8::try_from(number).unwrap(); 16]);
        let path = format!("/dev/spare{number}");
        let capacity = data_bytes + 8 * MIB;
        view.tables.put_disk(DiskSave {
            number,
            uuid,
            path: path.clone(),
            role: Role::Spare,
            capacity,
            was: None,
            sick: None,
            left: None,
        });
        let label = Label {
            system: view.tables.system,
            disk: uuid,
            group: GroupUuid::NIL,
            group_name: String::new(),
            level: None,
            slots: 0,
            slot: None,
            history: History::NIL,
            generation: 1,
            members: Vec::new(),
            replacement: None,
            deleted: false,
            damaged: None,
        };
        let probe = Probe {
            path,
            capacity,
            data_bytes,
            logical_block,
            label: Some(label),
            problem: None,
        };
        view.live.probes.insert(uuid, probe);
    }

    fn degraded() -> View {
        let mut view = three_disks();
        for group in view.live.groups.values_mut() {
            group.state = GroupState::Degraded;
            group.members[1].state = MemberState::Faulty;
        }
        view
    }

    fn taken(view: &View) -> Option<u32> {
        find(view).map(|found| found.spare.number)
    }

    #[test]
    fn the_smallest_spare_that_fits_is_taken() {
        let mut view = degraded();
        assert_eq!(taken(&view), None);
        spare(&mut view, 10, 4096 * MIB, 512);
        spare(&mut view, 11, 1024 * MIB, 512);
        spare(&mut view, 12, 1024 * MIB, 512);
        // Too small, and of larger blocks than the group's.
        spare(&mut view, 13, 1023 * MIB, 512);
        spare(&mut view, 14, 1024 * MIB, 4096);
        assert_eq!(taken(&view), Some(11));
        let gone = DiskUuid::from_bytes([11; 16]);
        view.live.probes.remove(&gone);
        assert_eq!(taken(&view), Some(12));
        view.live
            .bad_paths
            .insert("/dev/spare12".into(), "cannot be read".into());
        assert_eq!(taken(&view), Some(10));
        let sick = DiskSave {
            sick: Some("it does not take writes".into()),
            ..view.tables.disks[&10].clone()
        };
        view.tables.put_disk(sick);
        assert_eq!(taken(&view), None);
    }

    #[test]
    fn a_slot_waits_while_another_of_the_group_is_filled_or_data_is_missing() {
        let mut view = degraded();
        spare(&mut view, 10, 4096 * MIB, 512);
        assert_eq!(taken(&view), Some(10));
        let edit = |view: &mut View, change: &dyn Fn(&mut GroupStatus)| {
            view.live.groups.values_mut().for_each(change);
        };
        edit(&mut view, &|g| g.members[2].state = MemberState::Rebuilding);
        assert_eq!(taken(&view), None);
        edit(&mut view, &|g| {
            g.members[2].state = MemberState::Missing;
            g.state = GroupState::Failed;
        });
        assert_eq!(taken(&view), None);
    }
}
