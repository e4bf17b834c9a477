//! A disk that was being filled to replace another, at the start: with both, with either, with a record of each age.

use super::*;
use crate::superblock::Replacement;

/// The disk that comes: behind the slots in a world's list.
const NEW: usize = 4;
/// The slot that it is to take.
const SLOT: usize = 1;

/// Four members; the disk of slot 1 is copied to a fifth disk, `copied_to` bytes as of the last clean stop.
fn copying(level: Level, copied_to: u64) -> World {
    let mut world = World::new(level, 4);
    let new = Superblock {
        disk: disk(NEW),
        ..world.superblocks[SLOT].clone()
    };
    world.superblocks.push(new);
    world.update(&[0, 1, 2, 3, NEW], |group| {
        group.replacement = Some(Replacement {
            disk: disk(NEW),
            slot: u16::try_from(SLOT).unwrap(),
            copied_to,
        });
    })
}

fn record(plan: &Plan) -> GroupRecord {
    plan.next_record(history(200)).unwrap()
}

#[test]
fn both_there_the_old_one_counts_and_the_cursor_is_used_once() {
    let plan = copying(Level::Raid5, 2 * MIB)
        .assemble(&[0, 1, 2, 3, NEW], CALM)
        .unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), InSync(3)]);
    assert_eq!(
        (plan.replacement, plan.degraded, plan.renew_history),
        (Some(4), 0, false)
    );
    assert_eq!((&plan.surplus, &plan.reasons), (&vec![], &vec![]));
    let said = plan.superblock.member.as_ref().unwrap().group.replacement;
    assert_eq!(said.unwrap().copied_to, 2 * MIB);
    // Should this start die, the next one begins anew.
    let next = record(&plan).replacement.unwrap();
    assert_eq!((next.disk, next.copied_to), (disk(NEW), 0));
    assert_eq!(record(&plan).members[SLOT].disk, disk(SLOT));
}

#[test]
fn the_old_one_alone_is_the_group_as_it_was() {
    for level in [Level::Raid0, Level::Raid5] {
        let plan = copying(level, 2 * MIB)
            .assemble(&[0, 1, 2, 3], CALM)
            .unwrap();
        assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), InSync(3)]);
        assert_eq!(
            (plan.replacement, plan.degraded, plan.renew_history),
            (None, 0, false)
        );
        assert_eq!(record(&plan).replacement, None);
    }
}

#[test]
fn the_new_one_alone_is_rebuilt_and_never_in_sync() {
    for copied_to in [0, 2 * MIB] {
        let plan = copying(Level::Raid5, copied_to)
            .assemble(&[0, 2, 3, NEW], CALM)
            .unwrap();
        assert_eq!(plan.slots, [InSync(0), Rebuilding(3), InSync(1), InSync(2)]);
        assert_eq!(
            (plan.replacement, plan.degraded, plan.renew_history),
            (None, 1, true)
        );
        let next = record(&plan);
        assert_eq!(
            (next.replacement, next.members[SLOT].disk),
            (None, disk(NEW))
        );
        assert_eq!(next.members[SLOT].state, MemberState::Rebuilding);
        // The old one, when it comes back, has missed what was written since.
        let back = copying(Level::Raid5, copied_to).update(&[0, 2, 3, NEW], |group| {
            *group = next.clone();
        });
        let plan = back.assemble(&[0, 1, 2, 3, NEW], CALM).unwrap();
        assert_eq!(plan.slots, [InSync(0), Rebuilding(4), InSync(2), InSync(3)]);
        assert_eq!(plan.surplus, [1]);
    }
    // Without redundancy it does not stand for the old one, whatever is said.
    for conditions in [CALM, FORCE] {
        let refused = copying(Level::Raid0, 2 * MIB).assemble(&[0, 2, 3, NEW], conditions);
        assert!(
            matches!(refused, Err(AssemblyError::TooFew { .. })),
            "{refused:?}"
        );
    }
}

#[test]
fn neither_there_is_a_slot_that_is_missing() {
    let plan = copying(Level::Raid5, 0).assemble(&[0, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), Missing, InSync(1), InSync(2)]);
    assert_eq!((plan.replacement, record(&plan).replacement), (None, None));
}

#[test]
fn a_power_cut_as_the_new_one_takes_the_slot_leaves_one_of_the_two_in_sync() {
    let takes = |group: &mut GroupRecord| {
        next_history(2)(group);
        group.members[SLOT].disk = disk(NEW);
        group.replacement = None;
    };
    let all = [0, 1, 2, 3, NEW];
    // Whoever of those that go on was reached first.
    for reached in [&[0][..], &[NEW], &[0, 2, 3], &[0, 2, 3, NEW]] {
        let plan = copying(Level::Raid5, 0)
            .update(reached, takes)
            .assemble(&all, CALM)
            .unwrap();
        assert_eq!(
            plan.slots,
            [InSync(0), InSync(4), InSync(2), InSync(3)],
            "{reached:?}"
        );
        assert_eq!((&plan.surplus, plan.replacement), (&vec![1], None));
        // It alone of the two, also by those that do not know yet.
        let plan = copying(Level::Raid5, 0)
            .update(reached, takes)
            .assemble(&[0, 2, 3], CALM);
        assert_eq!(
            plan.unwrap().slots,
            [InSync(0), Missing, InSync(1), InSync(2)]
        );
    }
    // Nobody was reached.
    let plan = copying(Level::Raid5, 0).assemble(&all, CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), InSync(3)]);
}

#[test]
fn a_disk_that_was_given_up_is_nobody() {
    let all = [0, 1, 2, 3, NEW];
    let world = copying(Level::Raid5, 0).update(&[0, 1, 2, 3], |group| group.replacement = None);
    let plan = world.assemble(&all, CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), InSync(3)]);
    assert_eq!((&plan.surplus, plan.replacement), (&vec![4], None));
}
