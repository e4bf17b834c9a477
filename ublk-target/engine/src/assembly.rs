//! Which of the superblocks that are there decides, and who is believed. Pure.

use lunar_api::target::{MemberState, Witness};
use lunar_api::{ApiError, ErrorKind, GroupUuid};

use crate::superblock::{GroupRecord, Superblock};

/// A disk that is there.
#[derive(Debug, Clone)]
pub struct Present {
    /// The caller's name for it.
    pub index: usize,
    pub path: String,
    pub superblock: Superblock,
}

/// Who is in a slot; the numbers are `Present::index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotPlan {
    InSync(usize),
    Rebuilding(usize),
    /// The deciding superblock says that what is on it is old.
    Stale(usize),
    Faulty,
    Missing,
}

/// How the group starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What the deciding superblock says.
    pub record: GroupRecord,
    pub generation: u64,
    pub slots: Vec<SlotPlan>,
    /// Somebody who was in sync is not there: a new history begins.
    pub lost: bool,
    /// Writes may have been torn by a power loss: redundancy is made right again from the start.
    pub resync: bool,
}

/// Decides how a group starts.
///
/// The newest generation of one history decides. A member is stale only if that superblock says so: a power
/// cut may have stopped an update after one member of four, and the others are not behind by that.
///
/// # Errors  `NoService` with the reason: not enough members, two histories, older than the witness, unclean after
/// a power loss and degraded; `Usage` for disks that are not of this group
pub fn assemble(
    group: GroupUuid,
    present: &[Present],
    witness: Option<Witness>,
    process_death_only: bool,
    force: bool,
) -> Result<Plan, ApiError> {
    let what = "the group could not be started";
    let refuse = |why: String| ApiError::new(ErrorKind::NoService, what).because(why);
    let mut newest: Option<(&Present, &GroupRecord)> = None;
    for p in present {
        let Some(member) = &p.superblock.member else {
            return Err(refuse(format!("{} is a free disk, not a member", p.path)));
        };
        if member.group.uuid != group {
            return Err(refuse(format!(
                "{} belongs to group {}",
                p.path, member.group.uuid
            )));
        }
        if member.group.flags.deleted {
            return Err(refuse(format!(
                "{} says that the group was deleted",
                p.path
            )));
        }
        if present
            .iter()
            .any(|q| q.index != p.index && q.superblock.disk == p.superblock.disk)
        {
            return Err(refuse(format!(
                "two disks say that they are disk {}: one is a copy",
                p.superblock.disk
            )));
        }
        if newest.is_none_or(|(q, _)| p.superblock.generation > q.superblock.generation) {
            newest = Some((p, &member.group));
        }
    }
    let Some((decider, record)) = newest else {
        return Err(refuse("none of its disks is there".into()));
    };
    for p in present {
        let Some(member) = &p.superblock.member else {
            continue;
        };
        let theirs = member.group.history;
        let related = theirs == record.history || record.parents.contains(&theirs);
        let same = p.superblock.generation == decider.superblock.generation;
        if !related || (same && member.group != *record) {
            return Err(refuse(format!(
                "{} and {} went on without each other (histories {theirs} and {}): neither is older",
                p.path, decider.path, record.history
            ))
            .hint("lunar group resolve --keep"));
        }
    }
    let generation = decider.superblock.generation;
    if let Some(witness) = witness
        && !force
        && (generation < witness.generation
            || (record.history != witness.history && !record.parents.contains(&witness.history)))
    {
        return Err(refuse(format!(
            "its disks are older (generation {generation}) than what was seen last ({}): newer members are missing",
            witness.generation
        ))
        .hint("find the missing disks, or lunar group start --force (loses what was written since)"));
    }
    let mut slots = Vec::new();
    let (mut in_sync, mut lost) = (0, false);
    for entry in &record.members {
        let there = present
            .iter()
            .find(|p| p.superblock.disk == entry.disk && !entry.disk.is_nil());
        slots.push(match (entry.state, there) {
            (MemberState::InSync, Some(p)) => {
                in_sync += 1;
                SlotPlan::InSync(p.index)
            }
            (MemberState::InSync, None) => {
                lost = true;
                SlotPlan::Missing
            }
            (MemberState::Rebuilding, Some(p)) => SlotPlan::Rebuilding(p.index),
            (MemberState::Faulty, Some(p)) => SlotPlan::Stale(p.index),
            (MemberState::Faulty, None) => SlotPlan::Faulty,
            (MemberState::Rebuilding | MemberState::Missing, _) => SlotPlan::Missing,
        });
    }
    let geometry = record
        .geometry()
        .map_err(|error| refuse(error.to_string()))?;
    let members = record.members.len();
    let needed = members - usize::from(geometry.redundancy());
    if in_sync < needed {
        return Err(refuse(format!(
            "{in_sync} of its {members} members are there and in sync, {needed} are needed"
        ))
        .hint("bring the missing disks back, then: lunar group start"));
    }
    let torn = record.flags.dirty && !process_death_only && geometry.redundancy() > 0;
    if torn && in_sync < members && geometry.parity_slot(0).is_some() && !force {
        return Err(refuse(
            "it was not stopped cleanly (power loss) and a member is missing: some stripes may be torn, and the \
             missing chunks of those cannot be told from wrong ones"
                .into(),
        )
        .hint("bring the missing disk back, or lunar group start --force (accepts that)"));
    }
    Ok(Plan {
        record: record.clone(),
        generation,
        slots,
        lost,
        resync: torn,
    })
}
