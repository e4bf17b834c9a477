//! What the maps say after an unclean stop, and who comes back.

use super::*;

/// A group with policy `bitmap`.
fn bitmap(level: Level, members: usize) -> World {
    let all: Vec<usize> = (0..members).collect();
    World::new(level, members).update(&all, |group| {
        group.maps = true;
        group.consistency = Consistency::Bitmap;
        group.floor = 10;
    })
}

/// As [`bitmap`], with policy `none`.
fn none(level: Level, members: usize) -> World {
    let all: Vec<usize> = (0..members).collect();
    bitmap(level, members).update(&all, |group| group.consistency = Consistency::None)
}

#[test]
fn an_unclean_bitmap_is_resynced_where_it_is_marked() {
    for level in [Level::Raid1, Level::Raid5, Level::Raid6, Level::Raid10] {
        let mut world = bitmap(level, 4).dirty();
        for marked in [0, 0b0100, 0b1111] {
            world.marked = marked;
            let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
            let is_marked = marked != 0;
            assert_eq!(
                (plan.resync, plan.synced_to),
                (false, 58 * MIB),
                "{level:?}"
            );
            assert_eq!((plan.marked_unsynced, plan.torn), (is_marked, is_marked));
            let plan = world.assemble(&[0, 1, 2, 3], DEATH).unwrap();
            assert_eq!((plan.marked_unsynced, plan.torn), (false, false));
        }
        // A resync of marked regions that was under way goes on, however it was stopped.
        let mut torn = world.clone().update(&[0, 1, 2, 3], |group| {
            group.flags.dirty = false;
            group.flags.torn = true;
        });
        torn.marked = 0b0001;
        let plan = torn.assemble(&[0, 1, 2, 3], CALM).unwrap();
        assert!(plan.marked_unsynced && plan.torn);
    }
}

#[test]
fn an_unclean_and_degraded_bitmap_starts_if_nothing_is_marked() {
    for level in [Level::Raid5, Level::Raid6] {
        let mut world = bitmap(level, 4).dirty();
        world.marked = 0b0010;
        // Whoever is not there, or not believed, says nothing.
        let plan = world.assemble(&[0, 2, 3], CALM).unwrap();
        assert_eq!((plan.torn, plan.marked_unsynced), (false, false));
        let mut failed = world.clone().update(&[0, 2, 3], fails(1, 2));
        assert!(failed.assemble(&[0, 1, 2, 3], CALM).is_ok());
        failed.marked = 0b0110;
        let refused = failed.assemble(&[0, 1, 2, 3], CALM).unwrap_err();
        assert!(matches!(refused, AssemblyError::DirtyDegraded { .. }));
        let forced = failed.assemble(&[0, 1, 2, 3], FORCE).unwrap();
        assert!(!forced.marked_unsynced, "it is resynced by other means");
    }
}

#[test]
fn who_is_not_there_left_at_the_floor_if_it_is_known_what_it_misses() {
    let left_at = |world: &World, conditions| {
        let plan = world.assemble(&[0, 2, 3], conditions).unwrap();
        let next = plan.next_record(history(200)).unwrap();
        assert_eq!(next.members[1].state, MemberState::Missing);
        next.members[1].left_at
    };
    let level = Level::Raid10;
    assert_eq!(left_at(&bitmap(level, 4), CALM), 10);
    assert_eq!(left_at(&bitmap(level, 4).dirty(), CALM), 10);
    assert_eq!(left_at(&none(level, 4), CALM), 10, "stopped cleanly");
    assert_eq!(left_at(&none(level, 4).dirty(), CALM), 0);
    assert_eq!(
        left_at(&none(level, 4).dirty(), DEATH),
        0,
        "it may have had more in its cache"
    );
    assert_eq!(left_at(&World::new(level, 4), CALM), 0, "no maps");
    // What was overruled is nothing to count on.
    let witness = Some(Witness {
        history: history(1),
        generation: 99,
    });
    let overruled = Conditions { witness, ..FORCE };
    assert_eq!(left_at(&bitmap(level, 4), overruled), 0);
}

/// Slot 1 was not there for a while: its own superblock is the one from before.
fn away(left_at: u64, state: MemberState) -> World {
    let world = bitmap(Level::Raid6, 4);
    world.update(&[0, 2, 3], move |group| {
        next_history(2)(group);
        group.members[1].state = state;
        group.members[1].left_at = left_at;
    })
}

#[test]
fn who_comes_back_is_caught_up_if_it_is_known_what_it_misses() {
    let own = away(11, MemberState::Missing).superblocks[1].generation;
    assert_eq!(own, 11);
    for (left_at, state, plan) in [
        (own, MemberState::Missing, SlotPlan::Returning(1)),
        (own - 1, MemberState::Missing, SlotPlan::Returning(1)),
        // An older copy of itself; nothing known; failed, not away.
        (own + 1, MemberState::Missing, SlotPlan::Stale(1)),
        (0, MemberState::Missing, SlotPlan::Stale(1)),
        (own, MemberState::Faulty, SlotPlan::Stale(1)),
        // It was being caught up.
        (own, MemberState::Rebuilding, SlotPlan::Rebuilding(1)),
    ] {
        let world = away(left_at, state);
        let found = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
        assert_eq!(found.slots[1], plan, "{left_at} {state:?}");
        let next = found.next_record(history(200)).unwrap().members[1];
        if plan == SlotPlan::Returning(1) {
            assert_eq!(
                (next.state, next.left_at),
                (MemberState::Rebuilding, left_at)
            );
        } else {
            assert_eq!((next.state, next.left_at), (state, left_at));
        }
        assert_eq!(found.degraded, 1);
    }
}

#[test]
fn who_was_used_apart_is_not_caught_up() {
    // It wrote under a history of its own, from which nobody else went on.
    let apart = away(11, MemberState::Missing).update(&[1], |group| {
        group.history = history(77);
        group.parents = vec![history(1)];
    });
    let found = apart.assemble(
        &[0, 1, 2, 3],
        Conditions {
            keep: Some(disk(0)),
            ..FORCE
        },
    );
    let found = found.unwrap();
    assert_eq!(found.slots[1], SlotPlan::Stale(1));
    assert_eq!(
        found.next_record(history(200)).unwrap().members[1].left_at,
        0
    );
}

#[test]
fn one_comes_back_after_the_other() {
    let world = bitmap(Level::Raid6, 4).update(&[0, 3], |group| {
        next_history(2)(group);
        for slot in [1, 2] {
            group.members[slot].state = MemberState::Missing;
            group.members[slot].left_at = 11;
        }
    });
    let found = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(
        found.slots[1..3],
        [SlotPlan::Returning(1), SlotPlan::Stale(2)]
    );
    let next = found.next_record(history(200)).unwrap();
    assert_eq!(
        (next.members[2].state, next.members[2].left_at),
        (MemberState::Missing, 11)
    );
}

#[test]
fn a_member_whose_bad_block_list_is_lost_is_not_believed() {
    for level in [Level::Raid1, Level::Raid5, Level::Raid6] {
        let mut world = World::new(level, 4).update(&[0, 1, 2, 3], |group| {
            group.members[1].has_bad_blocks = true;
        });
        // One that has no list cannot have lost it.
        world.lost_lists = 0b1101;
        let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
        assert_eq!(plan.degraded, 0);
        world.lost_lists = 0b0010;
        let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
        assert_eq!(plan.slots[1], SlotPlan::Stale(1), "{level:?}");
        assert!(plan.reasons.iter().any(|r| r.contains("bad blocks")));
    }
    let mut world = World::new(Level::Raid5, 4).update(&[0, 1, 2, 3], |group| {
        group.members[1].has_bad_blocks = true;
    });
    world.lost_lists = 0b0010;
    let refused = world.assemble(&[0, 1, 2], CALM).unwrap_err();
    assert!(refused.to_string().contains("nobody knows"), "{refused}");
    // Without it there is nothing: a person may say that it is taken as it is.
    let plan = world.assemble(&[0, 1, 2], FORCE).unwrap();
    assert_eq!(plan.slots[1], SlotPlan::InSync(1));
    assert!(plan.reasons.iter().any(|r| r.contains("forced")));
}
