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
//! 5. No more members are missing than the level can do without. `force` does not help: there is no data.
//! 6. Parity, not cleanly stopped and degraded: parity may not match, and the missing member cannot be told from it:
//!    refused without `force`. Not so after the mere death of the process, whose in-flight log is there.
//!    Mirrors need no parity: every copy holds old or new.
//!
//! With `keep` a person has chosen between the sides of rule 2: that of the disk named goes on, and every member that is not
//! behind it is stale. The histories of the others become parents: what they wrote is given up for good.
//!
//! Invariant: the same superblocks in another order give the same plan.

use lunar_api::target::{Level, MemberState, Witness};
use lunar_api::{DiskUuid, GroupUuid, History};

use crate::geometry::Geometry;
use crate::limits::PARENTS_MAX;
use crate::superblock::{GroupRecord, MemberEntry, Replacement, Superblock};

mod error;
#[cfg(test)]
mod tests;

pub use error::{AssemblyError, Side};

/// A disk that is there.
#[derive(Debug, Clone, Copy)]
pub struct Present<'a> {
    pub superblock: &'a Superblock,
    /// For messages.
    pub path: &'a str,
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
    /// There, and right below the cursor of its entry.
    Rebuilding(usize),
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
    /// What was rebuilt of a mirror is not believed: it and the copy that is read may differ in what was being written,
    /// and who was told of one may not be shown the other later.
    pub rebuild_anew: bool,
    /// The flag `torn` of the next superblock.
    pub torn: bool,
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
    let seat = |older| {
        let record = take_over(said, &members, &given_up, older);
        let seats = place(&record, &members, &given_up, older);
        (record, seats)
    };
    let (mut record, mut seats) = seat(Older::Stale);
    let mut older_taken = false;
    if conditions.force && !geometry.survives(missing(&seats)) {
        let all = seat(Older::Taken);
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
    let parity = check_parity(
        &geometry,
        record,
        &lost,
        is_unclean,
        conditions,
        &mut reasons,
    )?;
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
        (true, Parity::Right | Parity::Torn) if is_unclean => {
            reasons.push("it was not stopped cleanly: all of it is resynced".to_owned());
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
    Ok(Plan {
        leader: leader.index,
        superblock,
        replacement,
        degraded: u16::try_from(lost.len()).expect("at most 64 slots"),
        renew_history: overruled || lost_in_sync || older_taken || !given_up.is_empty(),
        generation: given_up
            .iter()
            .map(Found::generation)
            .fold(leader.generation(), u64::max),
        given_up: given_up.iter().map(|m| m.group.history).collect(),
        resync: synced_to < geometry.member_bytes(),
        synced_to,
        torn: parity == Parity::Torn,
        rebuild_anew: is_unclean && geometry.is_mirrored(),
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
        for (entry, plan) in record.members.iter_mut().zip(&self.slots) {
            let is_held = match plan {
                SlotPlan::InSync(_) | SlotPlan::Rebuilding(_) | SlotPlan::Faulty => true,
                SlotPlan::Stale(_) => {
                    matches!(entry.state, MemberState::Faulty | MemberState::Missing)
                }
                SlotPlan::Missing => false,
            };
            if !is_held {
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
            Self::InSync(disk) | Self::Rebuilding(disk) => Some(disk),
            Self::Stale(_) | Self::Faulty | Self::Missing => None,
        }
    }

    /// Returns the number of the disk that is in the slot.
    pub fn disk(self) -> Option<usize> {
        match self {
            Self::InSync(disk) | Self::Stale(disk) | Self::Rebuilding(disk) => Some(disk),
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
    for (index, Present { superblock, path }) in present.iter().copied().enumerate() {
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

/// Rule 2.
fn find_leader<'a>(members: &[Found<'a>]) -> Result<Found<'a>, AssemblyError> {
    let newest = |a: &Found<'a>, b: &Found<'a>| {
        // Among equals the first: they are the same but for their slot.
        if b.generation() > a.generation() {
            *b
        } else {
            *a
        }
    };
    let leads = |leader: &Found<'a>| {
        // A proof is read from the newest of a history: who was in sync before may not be any more.
        let same = members
            .iter()
            .filter(|m| m.group.history == leader.group.history);
        let head = same.max_by_key(|m| m.generation()).unwrap_or(leader);
        let behind = |other: &Found<'_>| is_ancestor(other, leader) || is_outlived(other, head);
        members.iter().all(behind)
    };
    let leader = members
        .iter()
        .filter(|m| leads(m))
        .copied()
        .reduce(|a, b| newest(&a, &b));
    let Some(leader) = leader else {
        return Err(split(members));
    };
    let differs = |m: &&Found<'_>| m.generation() == leader.generation() && m.group != leader.group;
    if let Some(other) = members.iter().find(differs) {
        let (a, b) = sorted(leader.path, other.path);
        return Err(AssemblyError::Differ {
            a,
            b,
            generation: leader.generation(),
        });
    }
    Ok(leader)
}

/// The side of a disk: the newest of its own history that counts it, and the members that are not behind that.
fn find_kept<'a>(
    members: &[Found<'a>],
    disk: DiskUuid,
) -> Result<(Found<'a>, Vec<Found<'a>>), AssemblyError> {
    let kept = members.iter().find(|m| m.superblock.disk == disk);
    let kept = kept.ok_or(AssemblyError::KeptNotThere { disk })?;
    let counts_it = |m: &&Found<'_>| {
        m.group.history == kept.group.history
            && kept.generation() >= m.group.floor
            && (m.generation() > kept.generation() || m.group == kept.group)
    };
    // Among equals the first, as without a choice.
    let newest = |a: Found<'a>, b: Found<'a>| {
        if b.generation() > a.generation() {
            b
        } else {
            a
        }
    };
    let leader = members.iter().filter(counts_it).copied().reduce(newest);
    let leader = leader.unwrap_or(*kept);
    let is_behind = |m: &&Found<'_>| match m.group.history == leader.group.history {
        true => m.generation() < leader.generation() || m.group == leader.group,
        false => is_ancestor(m, &leader) || is_outlived(m, &leader),
    };
    let given_up = members.iter().filter(|m| !is_behind(m)).copied().collect();
    Ok((leader, given_up))
}

/// Says whether what `old` says may have come before what `new` says. A former history ended when the next
/// began: one that is as far as `new` went on by itself, and is another side.
fn is_ancestor(old: &Found<'_>, new: &Found<'_>) -> bool {
    if old.group.history == new.group.history {
        return true;
    }
    new.group.parents.contains(&old.group.history) && old.generation() < new.generation()
}

/// Says whether `old` is proven to be of a history so old that `new` does not remember it: a disk that left long ago,
/// and no other side of a split.
///
/// When `old` was written every slot was in sync, so all that was ever acknowledged with it is on the others too; and
/// so many of those others as hold all the data are in sync in `new`, which is later. Another side shows itself:
/// to go on without the others it had to write that they are not in sync, under a history of its own; and one
/// that branched off from a history that `new` remembers has that among its parents.
fn is_outlived(old: &Found<'_>, new: &Found<'_>) -> bool {
    let (was, is) = (old.group, new.group);
    let Ok(geometry) = is.geometry() else {
        return false;
    };
    let forgets = is.parents.len() == PARENTS_MAX;
    let remembered = |history: &History| *history == is.history || is.parents.contains(history);
    let branched = remembered(&was.history) || was.parents.iter().any(remembered);
    let in_sync = |entry: &&MemberEntry| entry.state == MemberState::InSync;
    let was_whole = was.members.iter().all(|entry| in_sync(&entry));
    let others = was.members.iter().map(|entry| entry.disk);
    let has = |disk: &DiskUuid| is.members.iter().filter(in_sync).any(|e| e.disk == *disk);
    let gone = others
        .zip(0..)
        .filter(|(disk, _)| *disk == old.superblock.disk || !has(disk))
        .fold(0, |set, (_, slot)| set | 1_u64 << slot);
    let is_older = old.generation() < new.generation();
    is_older && forgets && !branched && was_whole && geometry.survives(gone)
}

/// Names two sides of which neither is the other's ancestor.
fn split(members: &[Found<'_>]) -> AssemblyError {
    let mut sides: Vec<Side> = Vec::new();
    for member in members {
        let history = member.group.history;
        match sides.iter_mut().find(|side| side.history == history) {
            Some(side) => {
                side.generation = side.generation.max(member.generation());
                side.paths.push(member.path.to_owned());
            }
            None => sides.push(side_of(member)),
        }
    }
    let is_old = |side: &Side| {
        members.iter().any(|m| {
            m.group.history != side.history
                && m.group.parents.contains(&side.history)
                && m.generation() > side.generation
        })
    };
    let mut newest: Vec<Side> = sides.iter().filter(|side| !is_old(side)).cloned().collect();
    // An ancestor that went on is a side too.
    if newest.len() < 2 {
        newest = sides;
    }
    newest.sort_by(|a, b| {
        b.generation
            .cmp(&a.generation)
            .then(a.history.cmp(&b.history))
    });
    let mut newest = newest.into_iter();
    match (newest.next(), newest.next()) {
        (Some(a), Some(b)) => AssemblyError::Split { a, b },
        // One history always leads itself, so there are two; without a panic all the same.
        _ => AssemblyError::NobodyThere,
    }
}

fn side_of(member: &Found<'_>) -> Side {
    Side {
        history: member.group.history,
        generation: member.generation(),
        paths: vec![member.path.to_owned()],
    }
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

/// Rule 4, where a disk was to be replaced: whoever of the two is there. The one that is filled is in no slot while the
/// other is there; without the other it is what a rebuild goes on with.
fn take_over(
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
                entry.state = MemberState::Rebuilding;
                entry.rebuilt_to = new.copied_to;
            }
        }
    }
    record
}

fn is_replacement(member: &Found<'_>, new: Replacement) -> bool {
    member.superblock.disk == new.disk && member.slot == new.slot
}

/// What is done with members that are older than the leader knew them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Older {
    Stale,
    /// A person said so, and without them there is nothing.
    Taken,
}

/// What is done with a slot, and what there is to say about it.
struct Seat {
    plan: SlotPlan,
    /// Why it does not count, if it does not.
    lost: Option<String>,
    reason: Option<String>,
}

/// Rule 4.
fn place(
    record: &GroupRecord,
    members: &[Found<'_>],
    given_up: &[Found<'_>],
    older: Older,
) -> Vec<Seat> {
    let mut seats = Vec::new();
    for (slot, entry) in record.members.iter().enumerate() {
        let found = members.iter().find(|m| m.superblock.disk == entry.disk);
        let counts = matches!(entry.state, MemberState::InSync | MemberState::Rebuilding);
        let in_place = found.filter(|m| counts && usize::from(m.slot) == slot);
        let is_given_up = found.is_some_and(|m| given_up.iter().any(|g| g.index == m.index));
        let below = in_place.filter(|m| m.generation() < record.floor);
        let is_taken = older == Older::Taken && entry.state == MemberState::InSync;
        let in_place = in_place.filter(|_| !is_given_up && (below.is_none() || is_taken));
        let plan = match (entry.state, found, in_place) {
            (MemberState::Rebuilding, _, Some(m)) => SlotPlan::Rebuilding(m.index),
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
            (None, SlotPlan::Stale(_)) => {
                format!("{path} (slot {slot}) missed writes: it needs a rebuild")
            }
            (None, plan) => describe(slot, entry.disk, plan),
        };
        let is_lost = !matches!(plan, SlotPlan::InSync(_));
        let forced = || below.map(|_| format!("forced: {said}"));
        seats.push(Seat {
            plan,
            lost: is_lost.then(|| match (below, is_given_up) {
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
fn missing(seats: &[Seat]) -> u64 {
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
        SlotPlan::Faulty => "has failed",
        SlotPlan::Missing => "is not there",
    };
    if disk.is_nil() {
        return format!("slot {slot} is empty");
    }
    format!("slot {slot} (disk {disk}) {state}")
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
    record: &GroupRecord,
    lost: &[String],
    is_unclean: bool,
    conditions: Conditions,
    reasons: &mut Vec<String>,
) -> Result<Parity, AssemblyError> {
    if geometry.parities() == 0 || !(record.flags.torn || is_unclean) {
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
