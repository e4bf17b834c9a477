//! What the logs on the members say after an unclean stop, and what it costs that one cannot be read.

use super::*;

/// A group whose writes are logged, running.
fn logged(level: Level) -> World {
    World::new(level, 4)
        .update(&[0, 1, 2, 3], move |group| {
            group.maps = true;
            group.consistency = level.consistency();
            group.floor = 10;
        })
        .dirty()
}

const LEVELS: [Level; 2] = [Level::Raid5, Level::Raid6];

#[test]
fn an_unclean_group_with_its_logs_is_right_also_degraded() {
    for level in LEVELS {
        let world = logged(level);
        for slots in [&[0, 1, 2, 3][..], &[0, 2, 3]] {
            let plan = world.assemble(slots, CALM).unwrap();
            assert_eq!((plan.synced_to, plan.torn), (58 * MIB, false), "{level:?}");
        }
        let plan = world.assemble(&[0, 2, 3], CALM).unwrap();
        let next = plan.next_record(history(200)).unwrap();
        assert_eq!(next.members[1].left_at, 10, "it is known what it misses");
    }
}

#[test]
fn a_log_that_is_lost_costs_a_resync_and_degraded_a_refusal() {
    for level in LEVELS {
        let mut world = logged(level);
        world.lost_logs = 0b0100;
        let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
        assert_eq!((plan.synced_to, plan.torn), (0, true), "{level:?}");
        assert!(plan.reasons.iter().any(|r| r.contains("/dev/d2")));
        let dead = world.assemble(&[0, 1, 2, 3], DEATH).unwrap();
        assert_eq!((dead.synced_to, dead.torn), (58 * MIB, false));
        let refused = world.assemble(&[0, 2, 3], CALM).unwrap_err();
        assert!(matches!(refused, AssemblyError::DirtyDegraded { .. }));
        // Whoever is not there needs none; by force nothing is known of it any more.
        assert!(world.assemble(&[0, 1, 3], CALM).is_ok());
        let forced = world.assemble(&[0, 2, 3], FORCE).unwrap();
        let next = forced.next_record(history(200)).unwrap();
        assert_eq!(next.members[1].left_at, 0);
    }
}

#[test]
fn who_comes_back_without_its_log_is_filled_from_the_start() {
    for level in LEVELS {
        let mut world = logged(level).update(&[0, 2, 3], |group| {
            next_history(2)(group);
            group.members[1].state = MemberState::Missing;
            group.members[1].left_at = 10;
        });
        let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
        assert_eq!(plan.slots[1], SlotPlan::Returning(1));
        world.lost_logs = 0b0010;
        let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
        assert_eq!(plan.slots[1], SlotPlan::Stale(1));
    }
}

/// By force parity is believed that may not match: a member is not caught up then, but filled.
#[test]
fn who_is_caught_up_is_filled_from_the_start_after_a_start_by_force() {
    for state in [MemberState::Missing, MemberState::Rebuilding] {
        let mut world = logged(Level::Raid6).update(&[0, 2, 3], move |group| {
            next_history(2)(group);
            group.consistency = Consistency::Bitmap;
            group.members[1].state = state;
            group.members[1].left_at = 10;
        });
        world.marked = 0b0001;
        let refused = world.assemble(&[0, 1, 2, 3], CALM).unwrap_err();
        assert!(matches!(refused, AssemblyError::DirtyDegraded { .. }));
        let forced = world.assemble(&[0, 1, 2, 3], FORCE).unwrap();
        let next = forced.next_record(history(200)).unwrap();
        assert_eq!(
            (next.members[1].left_at, next.members[1].rebuilt_to),
            (0, 0)
        );
    }
}
