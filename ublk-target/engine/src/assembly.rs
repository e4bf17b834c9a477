//! Decides whether and how a group starts from the superblocks of the members that are there.
//!
//! Pure: it reads nothing and writes nothing. In this order:
//!
//! 1. Every superblock is of the group, no disk is there twice, and the group is not deleted.
//! 2. One *history* has all others among its parents; its highest generation decides. Two histories of which neither is the
//!    other's ancestor were written apart from each other: refused, nothing orders them (never a clock). A disk that
//!    left before all that is remembered is told from that where it can be proven (`is_outlived`).
//! 3. What decides is not older than the witness (what mgmtd saw last), or `force`.
//! 4. A member is stale iff *the deciding superblock says so*. A lower generation of its own says nothing: a power
//!    cut may have stopped an update after one member of four. But one below the recorded `floor` is an older copy of
//!    itself (a snapshot put back, a disk that lied about its writes): stale too. Only where it cannot be done without, and with
//!    `force`, it is taken as it is.
//!    So is one whose bad-block list cannot be read: nobody knows what of it is data.
//! 5. No more members are missing than the level can do without. `force` does not help: there is no data.
//! 6. Parity, not cleanly stopped (under policy `bitmap`: and with any region marked; with a log: and one of the logs
//!    cannot be read) and degraded: parity may not match, and the missing member cannot be told from it:
//!    refused without `force`. Not so after the mere death of the process, whose in-flight log is there.
//!    Mirrors need no parity: every copy holds old or new.
//!
//! With `keep` a person has chosen between the sides of rule 2: that of the disk named goes on, and every member that is not
//! behind it is stale. The histories of the others become parents: what they wrote is given up for good.
//!
//! Invariant: the same superblocks in another order give the same plan.

use lunar_api::target::{Consistency, Level, MemberState, Witness};
use lunar_api::{DiskUuid, GroupUuid, History};

use crate::geometry::Geometry;
use crate::limits::{AHEAD_MAX, PARENTS_MAX};
use crate::planted::{self, Bug};
use crate::superblock::{GroupRecord, Superblock};

mod error;
mod histories;
mod seats;
#[cfg(test)]
mod tests;

pub use error::{AssemblyError, Side};
use histories::{find_kept, find_leader, side_of};
use seats::{Older, is_replacement, missing, place, take_over};

/// A disk that is there.
#[derive(Debug, Clone, Copy)]
pub struct Present<'a> {
    pub superblock: &'a Superblock,
    /// For messages.
    pub path: &'a str,
    /// Its intent map has marks, or it has none.
    pub is_marked: bool,
    /// Its log, where the policy has one, cannot be read.
    pub is_log_lost: bool,
    /// Its bad-block list, where a superblock says that it has one, cannot be read.
    pub is_list_lost: bool,
}

/// Under which conditions a group starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Conditions {
    /// The last state that mgmtd saw.
    pub witness: Option<Witness>,
    /// A person said that losing what rules 3 and 6 protect is all right.
    pub force: bool,
    /// The in-flight log of the process that died is there and valid: the machine did not stop.
    pub process_death_only: bool,
    /// The side of this disk goes on.
    pub keep: Option<DiskUuid>,
    /// A deleted group comes back.
    pub undelete: bool,
}

/// What is to be done with a slot. The number is that of the disk in what [`assemble`] was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotPlan {
    /// Holds what it should.
    InSync(usize),
    /// There, but it missed writes: it needs a rebuild from the start.
    Stale(usize),
    /// There, and right below the cursor of its entry; or, where that says since when it was away, but for what is in the
    /// missed map.
    Rebuilding(usize),
    /// There again: it has all but what is in the missed map, and is caught up.
    Returning(usize),
    /// Failed, and not there.
    Faulty,
    /// Nobody there.
    Missing,
}

/// How a group starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The number of the disk whose superblock decides.
    pub leader: usize,
    /// The superblock that decides.
    pub superblock: Superblock,
    /// The next generation counts on from here: above all that was given up too.
    pub generation: u64,
    /// Histories that were given up for that of the superblock.
    pub given_up: Vec<History>,
    /// One a slot.
    pub slots: Vec<SlotPlan>,
    /// The disk that the replacement in `superblock` is.
    pub replacement: Option<usize>,
    /// Slots that are not in sync.
    pub degraded: u16,
    /// A member that was in sync is not there, or the witness was overruled: the history has to be renewed, durably, before the
    /// first write.
    pub renew_history: bool,
    /// Parity or mirrors are to be made right again, from `synced_to` on.
    pub resync: bool,
    /// From here on (bytes of a member's data area): 0 after an unclean stop, else as recorded. A degraded raid5 is
    /// resynced by the rebuild, a raid6 after it, as is a raid5 that had been rebuilt in part.
    pub synced_to: u64,
    /// Regions that are marked are to be made right again.
    pub marked_unsynced: bool,
    /// What was rebuilt of a mirror is not believed: it and the copy that is read may differ in what was being written,
    /// and who was told of one may not be shown the other later. Nor what was rebuilt on a member whose log is lost.
    pub rebuild_anew: bool,
    /// The flag `torn` of the next superblock.
    pub torn: bool,
    /// It is known what who is not there any more will have missed: nothing but what is written, and what is marked.
    pub notes_missed: bool,
    /// Disks that were given but have no slot any more.
    pub surplus: Vec<usize>,
    /// What a person should know, a sentence each.
    pub reasons: Vec<String>,
}

/// Decides. See the head of this file for the rules.
///
/// # Panics  never
pub fn assemble(
    group: GroupUuid,
    present: &[Present<'_>],
    conditions: Conditions,
) -> Result<Plan, AssemblyError> {
    let members = check_members(group, present)?;
    let (leader, given_up) = match conditions.keep {
        None => (find_leader(&members)?, Vec::new()),
        Some(disk) => find_kept(&members, disk)?,
    };
    let said = leader.group;
    if said.flags.deleted && !conditions.undelete {
        return Err(AssemblyError::Deleted);
    }
    let mut reasons = Vec::new();
    let overruled = check_witness(&members, leader, conditions, &mut reasons)?;
    let geometry = said.geometry().map_err(AssemblyError::Geometry)?;
    let seat = |older, forgets| {
        let mut record = take_over(said, &members, &given_up, older);
        if overruled || forgets || older == Older::Taken || !given_up.is_empty() {
            // Who was away may have more than what counts from here on: what it misses is not known.
            record
                .members
                .iter_mut()
                .for_each(|entry| entry.left_at = 0);
        }
        let seats = place(&record, &members, &given_up, older);
        (record, seats)
    };
    let (mut record, mut seats) = seat(Older::Stale, false);
    let mut older_taken = false;
    // By force parity is believed that may not match: then what redundancy says of a member is not what that has, also
    // where it has missed nothing.
    let is_unproven = said.flags.torn || said.flags.dirty && !conditions.process_death_only;
    if conditions.force && is_unproven && geometry.parities() > 0 && missing(&seats) != 0 {
        (record, seats) = seat(Older::Stale, true);
    }
    if conditions.force && !geometry.survives(missing(&seats)) {
        let all = seat(Older::Taken, true);
        if geometry.survives(missing(&all.1)) {
            older_taken = true;
            (record, seats) = all;
        }
    }
    let record = &record;
    let replacement = record
        .replacement
        .and_then(|new| members.iter().find(|m| is_replacement(m, new)))
        .map(|new| new.index);
    reasons.extend(seats.iter().filter_map(|seat| seat.reason.clone()));
    for member in &members {
        let is_seated = record.slot_of(member.superblock.disk).is_some();
        if !is_seated && replacement != Some(member.index) {
            reasons.push(format!("{} is no member any more", member.path));
        }
    }
    let lost: Vec<String> = seats.iter().filter_map(|seat| seat.lost.clone()).collect();
    let slots: Vec<SlotPlan> = seats.iter().map(|seat| seat.plan).collect();
    check_redundancy(&geometry, missing(&seats), &lost)?;

    let is_unclean = record.flags.dirty && !conditions.process_death_only;
    let is_bitmap = record.consistency == Consistency::Bitmap;
    let in_sync = |m: &&Found<'_>| slots.contains(&SlotPlan::InSync(m.index));
    let is_marked = members.iter().filter(in_sync).any(|m| m.is_marked);
    let lost_log = members.iter().filter(in_sync).find(|m| m.is_log_lost);
    let lost_log = lost_log.filter(|_| record.consistency.has_log());
    // What tells of what was being written, if anything does.
    let is_all_torn = is_unclean
        && match record.consistency {
            Consistency::None => true,
            Consistency::Bitmap => false,
            Consistency::Ppl | Consistency::Journal => lost_log.is_some(),
        };
    let is_doubted = match is_bitmap {
        true => (record.flags.torn || is_unclean) && is_marked,
        false => record.flags.torn || is_all_torn,
    };
    let parity = check_parity(&geometry, &lost, is_doubted, conditions, &mut reasons)?;
    let is_rebuilt_in_part = record
        .members
        .iter()
        .zip(&slots)
        .any(|(entry, slot)| matches!(slot, SlotPlan::Rebuilding(_)) && entry.rebuilt_to > 0);
    let synced_to = match (geometry.redundancy() > 0, parity) {
        (false, _) => geometry.member_bytes(),
        // P and Q may say different things of what is missing: nothing may be written that relies on both.
        (true, Parity::Accepted) if geometry.parities() > 1 => 0,
        // What was rebuilt has all its data, and parity that may be torn: it is made right once the rest is rebuilt.
        (true, Parity::Accepted) if is_rebuilt_in_part => 0,
        (true, _) if older_taken => 0,
        (true, Parity::Accepted) => record.synced_to,
        (true, Parity::Right | Parity::Torn) if is_all_torn => {
            reasons.push(match lost_log {
                Some(member) => format!(
                    "it was not stopped cleanly, and the log on {} cannot be read: all of it is resynced",
                    member.path
                ),
                None => "it was not stopped cleanly: all of it is resynced".to_owned(),
            });
            0
        }
        (true, Parity::Right | Parity::Torn) => record.synced_to,
    };
    let is_used = |member: &Found<'_>| {
        replacement == Some(member.index)
            || slots.iter().any(|slot| slot.disk() == Some(member.index))
    };
    let lost_in_sync = said.members.iter().zip(&slots).any(|(entry, slot)| {
        entry.state == MemberState::InSync && !matches!(slot, SlotPlan::InSync(_))
    });
    let mut superblock = leader.superblock.clone();
    if let Some(member) = &mut superblock.member {
        member.group = record.clone();
    }
    let renew_history = overruled || lost_in_sync || older_taken || !given_up.is_empty();
    let newest = given_up
        .iter()
        .map(Found::generation)
        .fold(leader.generation(), u64::max);
    Ok(Plan {
        leader: leader.index,
        superblock,
        replacement,
        degraded: u16::try_from(lost.len()).expect("at most 64 slots"),
        renew_history,
        // Who is not there may have what an update that was cut short wrote to nobody else: it is behind too.
        generation: newest + u64::from(renew_history) * AHEAD_MAX,
        given_up: given_up.iter().map(|m| m.group.history).collect(),
        resync: synced_to < geometry.member_bytes(),
        synced_to,
        notes_missed: record.maps
            && !overruled
            && !older_taken
            && given_up.is_empty()
            && parity != Parity::Accepted
            && (is_bitmap
                || record.consistency.has_log() && lost_log.is_none()
                || !record.flags.dirty),
        torn: parity == Parity::Torn || is_bitmap && is_doubted && parity != Parity::Accepted,
        marked_unsynced: is_bitmap && is_doubted && parity != Parity::Accepted,
        rebuild_anew: is_unclean
            && (geometry.is_mirrored()
                || record.consistency.has_log()
                    && members
                        .iter()
                        .any(|m| m.is_log_lost && slots.contains(&SlotPlan::Rebuilding(m.index)))),
        surplus: members
            .iter()
            .filter(|m| !is_used(m))
            .map(|m| m.index)
            .collect(),
        slots,
        reasons,
    })
}

/// What is known of the parity where redundancy is missing or was not stopped cleanly.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parity {
    /// It matches what was written, below `synced_to`; above, what was written since the group was made.
    Right,
    /// Above `synced_to` it may not match.
    Torn,
    /// It may not match, and a person said to go on with it as it is.
    Accepted,
}

impl Plan {
    /// Returns the record of the next generation. If it differs from that of `superblock`, it has to be durable on all
    /// in-sync members before the first write is acknowledged: a member that is not there now may come back.
    ///
    /// Stale members stay what they are until somebody starts their rebuild.
    ///
    /// # Shape   `fresh`: random, taken if the history is renewed
    pub fn next_record(&self, fresh: History) -> Option<GroupRecord> {
        let mut record = self.superblock.member.as_ref()?.group.clone();
        if self.renew_history {
            let old = std::mem::replace(&mut record.history, fresh);
            let former = std::mem::replace(&mut record.parents, vec![old]);
            for history in self.given_up.iter().copied().chain(former) {
                if !record.parents.contains(&history) {
                    record.parents.push(history);
                }
            }
            record.parents.truncate(PARENTS_MAX);
        }
        record.flags.deleted = false;
        let (floor, notes_missed) = (record.floor, self.notes_missed);
        // Where nothing was proven yet it has more to be given than what is noted from here on.
        let is_whole = record.synced_to == record.member_bytes;
        for (entry, plan) in record.members.iter_mut().zip(&self.slots) {
            if planted::is(Bug::StaleMemberTaken) && matches!(plan, SlotPlan::InSync(_)) {
                (entry.state, entry.left_at) = (MemberState::InSync, 0);
            }
            let is_held = match plan {
                SlotPlan::InSync(_) | SlotPlan::Rebuilding(_) | SlotPlan::Faulty => true,
                SlotPlan::Returning(_) => {
                    entry.state = MemberState::Rebuilding;
                    true
                }
                SlotPlan::Stale(_) => {
                    matches!(entry.state, MemberState::Faulty | MemberState::Missing)
                }
                SlotPlan::Missing => false,
            };
            if !is_held {
                entry.left_at = match (plan, entry.state) {
                    (SlotPlan::Missing, MemberState::InSync) if notes_missed && is_whole => floor,
                    (SlotPlan::Missing, _) => entry.left_at,
                    _ => 0,
                };
                entry.state = MemberState::Missing;
                entry.rebuilt_to = 0;
            }
        }
        if let Some(new) = &mut record.replacement {
            // Right after a clean stop only, and from here on this is none.
            new.copied_to = 0;
        }
        if self.rebuild_anew {
            for (entry, plan) in record.members.iter_mut().zip(&self.slots) {
                if matches!(plan, SlotPlan::Rebuilding(_)) {
                    entry.rebuilt_to = 0;
                }
            }
        }
        record.synced_to = self.synced_to;
        record.flags.torn = self.torn;
        Some(record)
    }
}

impl SlotPlan {
    /// Returns the number of the disk that the running group works with: a stale one waits for its rebuild.
    pub fn used(self) -> Option<usize> {
        match self {
            Self::InSync(disk) | Self::Rebuilding(disk) | Self::Returning(disk) => Some(disk),
            Self::Stale(_) | Self::Faulty | Self::Missing => None,
        }
    }

    /// Returns the number of the disk that is in the slot.
    pub fn disk(self) -> Option<usize> {
        match self {
            Self::InSync(disk)
            | Self::Stale(disk)
            | Self::Rebuilding(disk)
            | Self::Returning(disk) => Some(disk),
            Self::Faulty | Self::Missing => None,
        }
    }
}

/// A disk that is there and of the group.
#[derive(Clone, Copy)]
struct Found<'a> {
    index: usize,
    path: &'a str,
    superblock: &'a Superblock,
    slot: u16,
    group: &'a GroupRecord,
    is_marked: bool,
    is_log_lost: bool,
    is_list_lost: bool,
}

impl Found<'_> {
    fn generation(&self) -> u64 {
        self.superblock.generation
    }
}

/// Rule 1.
fn check_members<'a>(
    group: GroupUuid,
    present: &[Present<'a>],
) -> Result<Vec<Found<'a>>, AssemblyError> {
    let mut members: Vec<Found<'a>> = Vec::new();
    for (index, one) in present.iter().enumerate() {
        let Present {
            superblock,
            path,
            is_marked,
            is_log_lost,
            is_list_lost,
        } = *one;
        let member = superblock
            .member
            .as_ref()
            .filter(|member| member.group.uuid == group);
        let Some(member) = member else {
            return Err(AssemblyError::NotOfGroup {
                path: path.to_owned(),
                group,
            });
        };
        let disk = superblock.disk;
        if let Some(twin) = members.iter().find(|m| m.superblock.disk == disk) {
            let (a, b) = sorted(twin.path, path);
            return Err(AssemblyError::DuplicateDisk { disk, a, b });
        }
        members.push(Found {
            index,
            path,
            superblock,
            slot: member.slot,
            group: &member.group,
            is_marked,
            is_log_lost,
            is_list_lost,
        });
    }
    if members.is_empty() {
        return Err(AssemblyError::NobodyThere);
    }
    // From here on the order of the disks does not matter.
    members.sort_by_key(|m| (m.slot, m.superblock.disk));
    Ok(members)
}

fn sorted(a: &str, b: &str) -> (String, String) {
    let (a, b) = if a <= b { (a, b) } else { (b, a) };
    (a.to_owned(), b.to_owned())
}

/// Rule 3. Returns whether the witness was overruled.
fn check_witness(
    members: &[Found<'_>],
    leader: Found<'_>,
    conditions: Conditions,
    reasons: &mut Vec<String>,
) -> Result<bool, AssemblyError> {
    let Some(witness) = conditions.witness else {
        return Ok(false);
    };
    let is_same = leader.group.history == witness.history;
    let is_later = is_same || leader.group.parents.contains(&witness.history);
    if is_later && leader.generation() >= witness.generation {
        return Ok(false);
    }
    let mut found = side_of(&leader);
    let of_leader = members.iter().filter(|m| m.group.history == found.history);
    found.paths = of_leader.map(|m| m.path.to_owned()).collect();
    if !conditions.force && conditions.keep.is_none() {
        return Err(AssemblyError::OlderThanWitness { found, witness });
    }
    reasons.push(format!(
        "forced: {found}, although generation {} was seen of history {}",
        witness.generation, witness.history
    ));
    Ok(true)
}

/// Rule 5.
fn check_redundancy(
    geometry: &Geometry,
    missing: u64,
    lost: &[String],
) -> Result<(), AssemblyError> {
    if geometry.survives(missing) {
        return Ok(());
    }
    Err(AssemblyError::TooFew {
        members: geometry.members(),
        allowed: match geometry.level() {
            Level::Raid10 => "one of each two that hold the same chunks may be".to_owned(),
            _ => format!("{} may be", geometry.redundancy()),
        },
        lost: lost.to_vec(),
    })
}

/// Rule 6.
fn check_parity(
    geometry: &Geometry,
    lost: &[String],
    is_doubted: bool,
    conditions: Conditions,
    reasons: &mut Vec<String>,
) -> Result<Parity, AssemblyError> {
    if geometry.parities() == 0 || !is_doubted || planted::is(Bug::WriteHoleAccepted) {
        return Ok(Parity::Right);
    }
    if lost.is_empty() || conditions.process_death_only {
        return Ok(Parity::Torn);
    }
    if !conditions.force {
        return Err(AssemblyError::DirtyDegraded {
            lost: lost.to_vec(),
        });
    }
    reasons.push(
        "forced: it was not stopped cleanly and is degraded; what was being written may have spoilt data on the \
         missing member"
            .to_owned(),
    );
    Ok(Parity::Accepted)
}
