//! What the members have of maps, logs and bad-block lists, read before a group is put together, and what of it counts.

use lunar_api::DiskUuid;

use crate::assembly::{Plan, SlotPlan};
use crate::bad_blocks::{List, read_list};
use crate::launch::LogsFound;
use crate::pool::Lease;
use crate::region_map::{Kind, RegionSet};
use crate::regions::{MapsFound, read_map, regions};
use crate::replay::{MemberLog, Scratch, read_log};
use crate::superblock::{GroupRecord, MemberEntry, Superblock};
use crate::traits::Disk;

/// Reads the log of a member whose group has them.
pub(super) async fn read_log_of<D: Disk>(
    superblock: &Superblock,
    disk: &D,
    scratch: &Scratch<'_>,
    payloads: bool,
) -> MemberLog {
    match &superblock.member {
        Some(member) if member.group.consistency.has_log() => {
            let (at, group) = (member.layout.logs.offset, member.group.uuid);
            read_log(disk, at, group, scratch, payloads).await
        }
        _ => MemberLog::default(),
    }
}

/// Says whether a superblock says that a disk has bad blocks.
pub(super) fn is_listed(disk: DiskUuid, superblocks: &[Superblock]) -> bool {
    let groups = superblocks.iter().filter_map(|s| s.member.as_ref());
    let mut entries = groups.flat_map(|member| &member.group.members);
    entries.any(|entry| entry.disk == disk && entry.has_bad_blocks)
}

/// Reads the bad-block list of a member.
pub(super) async fn read_list_of<D: Disk>(
    superblock: &Superblock,
    disk: &D,
    memory: (&Lease, usize),
) -> Option<List> {
    let member = superblock.member.as_ref()?;
    let whose = (member.group.uuid, superblock.disk);
    read_list(disk, member.layout.bad_blocks, whose, memory).await
}

/// The lists that count, one a slot.
pub(super) fn find_lists(
    plan: &Plan,
    record: &GroupRecord,
    lists: Vec<Option<List>>,
) -> Vec<Option<List>> {
    let slots = plan.slots.iter().zip(&record.members);
    let list = |(slot, entry): (&SlotPlan, &MemberEntry)| {
        let is_kept = entry.has_bad_blocks && !matches!(slot, SlotPlan::Stale(_));
        slot.used()
            .filter(|_| is_kept)
            .and_then(|disk| lists[disk].clone())
    };
    slots.map(list).collect()
}

/// Marks what the logs are about: a member that leaves now may not have it, nor the one that comes back.
pub(super) fn mark_logged(
    plan: &Plan,
    record: &GroupRecord,
    logs: &[MemberLog],
    found: &mut MapsFound,
) {
    if !record.consistency.has_log() {
        return;
    }
    for slot in &plan.slots {
        let Some(disk) = slot.used() else { continue };
        let to = match slot {
            SlotPlan::InSync(_) => &mut found.intent.any,
            _ => &mut found.missed.any,
        };
        logs[disk].mark(record, to);
    }
}

pub(super) fn logs_found(logs: &[(u16, MemberLog)], record: &GroupRecord) -> LogsFound {
    let mut found = LogsFound {
        number: logs.iter().map(|(_, log)| log.number()).max().unwrap_or(0),
        next: vec![0; record.members.len()],
    };
    for (slot, log) in logs {
        found.next[usize::from(*slot)] = log.next();
    }
    found
}

/// What a member has of the maps.
pub(super) struct MemberMaps {
    pub intent: RegionSet,
    pub missed: RegionSet,
}

/// Reads the maps of a member whose group keeps them.
pub(super) async fn read_maps<D: Disk>(
    superblock: &Superblock,
    disk: &D,
    memory: (&Lease, usize),
) -> Option<MemberMaps> {
    let member = superblock.member.as_ref()?;
    let (layout, group) = (&member.layout, &member.group);
    if !group.maps {
        return None;
    }
    let (intent, missed) = (layout.intent.offset, layout.missed.offset);
    Some(MemberMaps {
        intent: read_map(disk, intent, (Kind::Intent, group), memory).await,
        missed: read_map(disk, missed, (Kind::Missed, group), memory).await,
    })
}

/// Joins what the members have of the maps: marked is what any member in sync has marked; on all members is what every member
/// in use has marked.
pub(super) fn find_maps(
    plan: &Plan,
    record: &GroupRecord,
    maps: Vec<Option<MemberMaps>>,
) -> Option<MapsFound> {
    if !record.maps {
        return None;
    }
    let mut found = MapsFound::none(record);
    found.is_unsynced = plan.marked_unsynced;
    let mut is_first = true;
    let used = plan.slots.iter().filter_map(|slot| slot.used());
    for disk in used.chain(plan.replacement) {
        let in_sync = plan.slots.contains(&SlotPlan::InSync(disk));
        // One that has none yet says nothing, and takes what the others have with the next page.
        let none = RegionSet::new(regions(record));
        let (intent, missed) = match &maps[disk] {
            Some(maps) => (&maps.intent, &maps.missed),
            None => (&none, &none),
        };
        for (to, from) in [(&mut found.intent, intent), (&mut found.missed, missed)] {
            match is_first {
                // Not a copy: one that was not there as the group grew has fewer regions.
                true => {
                    to.all.add_all(from);
                }
                false => to.all.keep_all(from),
            }
            if in_sync {
                to.any.add_all(from);
            }
        }
        is_first = false;
    }
    Some(found)
}
