//! Rule 4: what is done with each slot.

use lunar_api::DiskUuid;
use lunar_api::target::MemberState;

use super::{Found, SlotPlan};
use crate::planted::{self, Bug};
use crate::superblock::{GroupRecord, MemberEntry, Replacement};

/// Rule 4, where a disk was to be replaced: whoever of the two is there. The one that is filled is in no slot while the
/// other is there; without the other it is what a rebuild goes on with.
pub(super) fn take_over(
    said: &GroupRecord,
    members: &[Found<'_>],
    given_up: &[Found<'_>],
    older: Older,
) -> GroupRecord {
    let mut record = said.clone();
    let Some(new) = record.replacement.take() else {
        return record;
    };
    let entry = &mut record.members[usize::from(new.slot)];
    let is_kept = |m: &&Found<'_>| !given_up.iter().any(|g| g.index == m.index);
    let is_fresh = |m: &Found<'_>| m.generation() >= said.floor;
    let is_old = |m: &&Found<'_>| m.superblock.disk == entry.disk && m.slot == new.slot;
    let has_new = members
        .iter()
        .filter(is_kept)
        .any(|m| is_replacement(m, new) && is_fresh(m));
    match members.iter().filter(is_kept).find(is_old) {
        Some(old) if is_fresh(old) => record.replacement = has_new.then_some(new),
        // What was copied is not what this older copy of it has.
        Some(_) if older == Older::Taken => {}
        _ => {
            let is_rebuilt = |entry: &MemberEntry| entry.state == MemberState::Rebuilding;
            if has_new && !said.members.iter().any(is_rebuilt) {
                entry.disk = new.disk;
                entry.has_bad_blocks = false;
                entry.state = MemberState::Rebuilding;
                entry.rebuilt_to = new.copied_to;
            }
        }
    }
    record
}

pub(super) fn is_replacement(member: &Found<'_>, new: Replacement) -> bool {
    member.superblock.disk == new.disk && member.slot == new.slot
}

/// What is done with members that are older than the leader knew them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Older {
    Stale,
    /// A person said so, and without them there is nothing.
    Taken,
}

/// What is done with a slot, and what there is to say about it.
pub(super) struct Seat {
    pub(super) plan: SlotPlan,
    /// Why it does not count, if it does not.
    pub(super) lost: Option<String>,
    pub(super) reason: Option<String>,
}

/// Rule 4.
pub(super) fn place(
    record: &GroupRecord,
    members: &[Found<'_>],
    given_up: &[Found<'_>],
    older: Older,
) -> Vec<Seat> {
    let mut seats = Vec::new();
    // One after the other.
    let mut is_filled = record.replacement.is_some()
        || record
            .members
            .iter()
            .any(|e| e.state == MemberState::Rebuilding);
    for (slot, entry) in record.members.iter().enumerate() {
        let found = members.iter().find(|m| m.superblock.disk == entry.disk);
        let counts = matches!(entry.state, MemberState::InSync | MemberState::Rebuilding);
        let counts = counts || planted::is(Bug::StaleMemberTaken);
        let in_place = found.filter(|m| counts && usize::from(m.slot) == slot);
        let is_given_up = found.is_some_and(|m| given_up.iter().any(|g| g.index == m.index));
        let below = in_place.filter(|m| m.generation() < record.floor);
        let below = below.filter(|_| !planted::is(Bug::StaleMemberTaken));
        let is_taken = older == Older::Taken && entry.state == MemberState::InSync;
        let in_place = in_place.filter(|_| !is_given_up && (below.is_none() || is_taken));
        let is_unlisted = |m: &Found<'_>| entry.has_bad_blocks && m.is_list_lost;
        let unlisted = in_place.filter(|m| is_unlisted(m));
        let in_place = in_place.filter(|m| is_taken || !is_unlisted(m));
        let returns = found.filter(|m| {
            let was = m.group.history;
            let is_ours = was == record.history || record.parents.contains(&was);
            let knows = entry.left_at != 0 && m.generation() >= entry.left_at && is_ours;
            // Of what had its parity on it, and was being written as it left, its own log knows.
            let has_log = !(record.consistency.has_log() && m.is_log_lost);
            let has_all = has_log && !is_unlisted(m);
            entry.state == MemberState::Missing && knows && has_all && usize::from(m.slot) == slot
        });
        let plan = match (entry.state, found, in_place) {
            (MemberState::Rebuilding, _, Some(m)) => SlotPlan::Rebuilding(m.index),
            (MemberState::Missing, Some(m), _) if returns.is_some() && !is_filled => {
                is_filled = true;
                SlotPlan::Returning(m.index)
            }
            (_, _, Some(m)) => SlotPlan::InSync(m.index),
            (_, Some(m), None) => SlotPlan::Stale(m.index),
            (MemberState::Faulty, None, None) => SlotPlan::Faulty,
            (_, None, None) => SlotPlan::Missing,
        };
        let path = found.map_or("", |m| m.path);
        let said = match (below, plan) {
            _ if is_given_up => format!("{path} (slot {slot}) is of the side that was given up"),
            (Some(m), _) => format!(
                "{path} (slot {slot}) is an older copy of itself: it says generation {}, it had {} at least",
                m.generation(),
                record.floor
            ),
            (None, _) if unlisted.is_some() => format!(
                "{path} (slot {slot}) has bad blocks, and both copies of the list of them are damaged: nobody knows what of it \
                 is data"
            ),
            (None, SlotPlan::Stale(_)) => {
                format!("{path} (slot {slot}) missed writes: it needs a rebuild")
            }
            (None, SlotPlan::Returning(_)) => {
                format!("{path} (slot {slot}) is back: it is caught up with what it has missed")
            }
            (None, plan) => describe(slot, entry.disk, plan),
        };
        let is_lost = !matches!(plan, SlotPlan::InSync(_));
        let forced = || below.or(unlisted).map(|_| format!("forced: {said}"));
        seats.push(Seat {
            plan,
            lost: is_lost.then(|| match (below.or(unlisted), is_given_up) {
                (None, false) => describe(slot, entry.disk, plan),
                _ => said.clone(),
            }),
            reason: if is_lost {
                Some(said.clone())
            } else {
                forced()
            },
        });
    }
    seats
}

/// The slots that are not in sync, as bits.
pub(super) fn missing(seats: &[Seat]) -> u64 {
    let lost = seats
        .iter()
        .zip(0..)
        .filter(|(seat, _)| seat.lost.is_some());
    lost.fold(0, |set, (_, slot)| set | 1 << slot)
}

fn describe(slot: usize, disk: DiskUuid, plan: SlotPlan) -> String {
    let state = match plan {
        SlotPlan::InSync(_) => "is in sync",
        SlotPlan::Stale(_) => "is stale",
        SlotPlan::Rebuilding(_) => "is being rebuilt",
        SlotPlan::Returning(_) => "is caught up",
        SlotPlan::Faulty => "has failed",
        SlotPlan::Missing => "is not there",
    };
    if disk.is_nil() {
        return format!("slot {slot} is empty");
    }
    format!("slot {slot} (disk {disk}) {state}")
}
