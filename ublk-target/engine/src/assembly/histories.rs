//! Rule 2: which superblock decides, and who is behind it.

use lunar_api::DiskUuid;
use lunar_api::History;
use lunar_api::target::MemberState;

use super::{AssemblyError, Found, Side, sorted};
use crate::limits::PARENTS_MAX;
use crate::planted::{self, Bug};
use crate::superblock::MemberEntry;

/// Rule 2.
pub(super) fn find_leader<'a>(members: &[Found<'a>]) -> Result<Found<'a>, AssemblyError> {
    let newest = |a: &Found<'a>, b: &Found<'a>| {
        // Among equals the first: they are the same but for their slot.
        let is_newer = b.generation() > a.generation();
        if is_newer != (planted::is(Bug::OlderGenerationWins) && a.generation() != b.generation()) {
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
pub(super) fn find_kept<'a>(
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

pub(super) fn side_of(member: &Found<'_>) -> Side {
    Side {
        history: member.group.history,
        generation: member.generation(),
        paths: vec![member.path.to_owned()],
    }
}
