//! Rule 6: what an unclean stop leaves of the parity.

use super::*;

#[test]
fn an_unclean_stop_is_resynced_a_mere_death_is_not() {
    for (level, resync) in [
        (Level::Linear, false),
        (Level::Raid0, false),
        (Level::Raid1, true),
        (Level::Raid5, true),
        (Level::Raid6, true),
        (Level::Raid10, true),
    ] {
        let world = World::new(level, 4).dirty();
        let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
        let from = if resync { 0 } else { 58 * MIB };
        assert_eq!((plan.resync, plan.synced_to), (resync, from), "{level:?}");
        assert_eq!(plan.torn, matches!(level, Level::Raid5 | Level::Raid6));
        let plan = world.assemble(&[0, 1, 2, 3], DEATH).unwrap();
        assert_eq!(
            (plan.resync, plan.synced_to, plan.torn),
            (false, 58 * MIB, false)
        );
    }
}

#[test]
fn dirty_and_degraded_by_level_and_condition() {
    for (level, conditions, starts) in [
        (Level::Raid5, CALM, false),
        (Level::Raid5, FORCE, true),
        (Level::Raid5, DEATH, true),
        (Level::Raid6, CALM, false),
        (Level::Raid6, FORCE, true),
        (Level::Raid6, DEATH, true),
        (Level::Raid10, CALM, true),
        (Level::Raid10, DEATH, true),
        (Level::Raid1, CALM, true),
        (Level::Raid1, DEATH, true),
    ] {
        let world = World::new(level, 4).dirty();
        // Gone with the power, or failed before.
        let failed = world.clone().update(&[0, 2, 3], fails(1, 2));
        for (world, there) in [
            (&world, &[0, 2, 3][..]),
            (&failed, &[0, 2, 3]),
            (&failed, &[0, 1, 2, 3]),
        ] {
            let plan = world.assemble(there, conditions);
            assert_eq!(plan.is_ok(), starts, "{level:?} {conditions:?} {there:?}");
            let Err(refused) = plan else { continue };
            assert!(
                matches!(refused, AssemblyError::DirtyDegraded { .. }),
                "{refused}"
            );
            let error = refused.to_api("data");
            assert_eq!(error.kind, ErrorKind::Refused);
            assert!(
                error
                    .hint
                    .unwrap()
                    .contains("lunar group start data --force")
            );
        }
    }
}

#[test]
fn forced_parities_of_a_raid6_are_not_relied_on_together() {
    let world = World::new(Level::Raid6, 4).dirty();
    let plan = world.assemble(&[0, 2, 3], FORCE).unwrap();
    assert_eq!((plan.synced_to, plan.torn, plan.resync), (0, false, true));
}

#[test]
fn forced_parity_is_taken_as_it_is_and_not_asked_again() {
    let world = World::new(Level::Raid5, 3).dirty();
    let plan = world.assemble(&[0, 2], FORCE).unwrap();
    assert_eq!(
        (plan.synced_to, plan.torn, plan.renew_history),
        (58 * MIB, false, true)
    );
    assert!(
        plan.reasons
            .iter()
            .any(|reason| reason.starts_with("forced"))
    );
}

#[test]
fn clean_and_degraded_starts_unless_a_resync_was_due() {
    let unsynced = |torn| {
        World::new(Level::Raid5, 3).update(&[0, 1, 2], move |group| {
            group.synced_to = MIB;
            group.flags.torn = torn;
        })
    };
    // A first sync: what was written has parity.
    let plan = unsynced(false).assemble(&[0, 1], CALM).unwrap();
    assert_eq!((plan.synced_to, plan.torn), (MIB, false));
    // A resync after an unclean stop.
    let refused = unsynced(true).assemble(&[0, 1], CALM).unwrap_err();
    assert!(
        matches!(refused, AssemblyError::DirtyDegraded { .. }),
        "{refused}"
    );
    let plan = unsynced(true).assemble(&[0, 1], DEATH).unwrap();
    assert_eq!((plan.synced_to, plan.torn), (MIB, true));
    let plan = unsynced(true).assemble(&[0, 1, 2], CALM).unwrap();
    assert_eq!((plan.synced_to, plan.torn, plan.resync), (MIB, true, true));
}
