//! Rules 2 and 3: which history decides, and what mgmtd saw last.

use super::*;

#[test]
fn two_sides_are_refused_and_named() {
    let base = World::new(Level::Raid1, 2);
    let world = base.update(&[0], fails(1, 2)).update(&[1], |group| {
        group.parents = vec![history(1)];
        group.history = history(3);
        group.members[0].state = MemberState::Faulty;
        group.members[1].state = MemberState::InSync;
    });
    let refused = world.assemble(&[0, 1], FORCE).unwrap_err();
    let AssemblyError::Split { a, b } = &refused else {
        panic!("{refused}")
    };
    assert_eq!(
        (a.history, a.generation, &a.paths[..]),
        (history(3), 12, &["/dev/d1".into()][..])
    );
    assert_eq!(
        (b.history, b.generation, &b.paths[..]),
        (history(2), 11, &["/dev/d0".into()][..])
    );
    let error = refused.to_api("data");
    assert_eq!(error.kind, ErrorKind::Refused);
    assert_eq!(error.message, "group data does not start");
    assert!(error.causes[0].contains("/dev/d0") && error.causes[0].contains("/dev/d1"));
    assert_eq!(
        error.hint.as_deref(),
        Some("lunar group resolve data --keep DISK")
    );
    // Each side alone starts.
    assert_eq!(
        world.assemble(&[0], CALM).unwrap().slots,
        [InSync(0), Faulty]
    );
    assert_eq!(
        world.assemble(&[1], CALM).unwrap().slots,
        [Faulty, InSync(0)]
    );
}

#[test]
fn two_sides_are_named_although_their_ancestor_is_there() {
    let world = World::new(Level::Raid1, 4)
        .update(&[0], next_history(2))
        .update(&[1], |group| {
            group.parents = vec![history(1)];
            group.history = history(3);
        });
    let refused = world.assemble(&[0, 1, 2, 3], FORCE).unwrap_err();
    let AssemblyError::Split { a, b } = refused else {
        panic!("{refused}")
    };
    assert_eq!((a.history, b.history), (history(3), history(2)));
}

#[test]
fn unrelated_histories_are_refused() {
    let world = World::new(Level::Raid5, 3).update(&[1], |group| group.history = history(9));
    let refused = world.assemble(&[0, 1, 2], CALM).unwrap_err();
    assert!(matches!(refused, AssemblyError::Split { .. }), "{refused}");
}

#[test]
fn an_ancestor_that_went_on_by_itself_is_another_side() {
    let world = World::new(Level::Raid1, 2)
        .update(&[0], fails(1, 2))
        .update(&[1], |group| {
            group.history = history(1);
            group.parents.clear();
        });
    let refused = world.assemble(&[0, 1], FORCE).unwrap_err();
    assert!(matches!(refused, AssemblyError::Split { .. }), "{refused}");
}

#[test]
fn grandparents_are_ancestors() {
    let mut world = World::new(Level::Raid1, 2);
    for n in 2..=9 {
        world = world.update(&[0], next_history(n));
    }
    world = world.update(&[0], |group| group.members[1].state = MemberState::Faulty);
    assert_eq!(
        world.assemble(&[0, 1], CALM).unwrap().slots,
        [InSync(0), Stale(1)]
    );
}

#[test]
fn one_generation_with_two_contents_is_refused() {
    let mut world = World::new(Level::Raid5, 3);
    world.superblocks[2]
        .member
        .as_mut()
        .unwrap()
        .group
        .synced_to = MIB;
    let refused = world.assemble(&[0, 1, 2], FORCE).unwrap_err();
    let (a, b) = ("/dev/d0".to_owned(), "/dev/d2".to_owned());
    assert_eq!(
        refused,
        AssemblyError::Differ {
            a,
            b,
            generation: 10
        }
    );
    // Not so where a newer one decides.
    let world = world.update(&[1], |_| {});
    assert!(world.assemble(&[0, 1, 2], CALM).is_ok());
}

#[test]
fn what_is_older_than_the_witness_needs_force() {
    let world = World::new(Level::Raid5, 3).update(&[0, 1, 2], next_history(2));
    for (conditions, starts) in [
        (seen(2, 11), true),
        (seen(2, 10), true),
        (seen(1, 10), true),
        (seen(2, 12), false),
        (seen(1, 12), false),
        (seen(3, 1), false),
    ] {
        let plan = world.assemble(&[0, 1, 2], conditions);
        assert_eq!(plan.is_ok(), starts, "{conditions:?}");
        if starts {
            assert!(!plan.unwrap().renew_history);
            continue;
        }
        let refused = plan.unwrap_err();
        assert!(
            matches!(refused, AssemblyError::OlderThanWitness { .. }),
            "{refused}"
        );
        assert!(refused.hint("g").unwrap().contains("--force"));
        let forced = Conditions {
            force: true,
            ..conditions
        };
        let plan = world.assemble(&[0, 1, 2], forced).unwrap();
        assert!(
            plan.renew_history && plan.reasons[0].starts_with("forced"),
            "{conditions:?}"
        );
    }
}

/// Slots that go on through so many histories, all that is remembered of them in the superblocks.
fn go_on(mut world: World, on: &[usize], histories: std::ops::RangeInclusive<u8>) -> World {
    for n in histories {
        world = world.update(on, |group| {
            next_history(n)(group);
            group.parents.truncate(PARENTS_MAX);
        });
    }
    world
}

#[test]
fn a_disk_that_left_before_all_that_is_remembered_is_left_out() {
    // Failed, and not replaced.
    let world = go_on(World::new(Level::Raid1, 2), &[0], 2..=10)
        .update(&[0], |group| group.members[1].state = MemberState::Faulty);
    let plan = world.assemble(&[0, 1], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), Stale(1)]);
    // Failed, and another disk is in its place.
    let world = go_on(World::new(Level::Raid5, 4), &[0, 1, 2], 2..=12)
        .update(&[0, 1, 2], |group| group.members[3].disk = disk(40));
    let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), Missing]);
    assert_eq!(plan.surplus, [3]);
    let named = |reason: &String| reason.contains("/dev/d3 is no member any more");
    assert!(plan.reasons.iter().any(named), "{:?}", plan.reasons);
}

#[test]
fn a_disk_of_a_forgotten_history_is_refused_where_it_may_be_another_side() {
    let replaced = |group: &mut GroupRecord| group.members[3].disk = disk(40);
    let world =
        || go_on(World::new(Level::Raid5, 4), &[0, 1, 2], 2..=12).update(&[0, 1, 2], replaced);
    let changed = |change: &dyn Fn(&mut Superblock)| {
        let mut world = world();
        change(&mut world.superblocks[3]);
        world
    };
    let group = |sb: &mut Superblock, change: &dyn Fn(&mut GroupRecord)| {
        change(&mut sb.member.as_mut().unwrap().group);
    };
    assert!(world().assemble(&[0, 1, 2, 3], CALM).is_ok());
    let cases = [
        // It went on without one of the others.
        changed(&|sb| group(sb, &|g| g.members[0].state = MemberState::Faulty)),
        // It branched off from what is remembered.
        changed(&|sb| group(sb, &|g| g.parents = vec![history(7)])),
        // It is as far.
        changed(&|sb| sb.generation = 99),
        // Of those that were with it not enough are left.
        world().update(&[0, 1], |g| g.members[2].disk = disk(41)),
        // All is remembered, and it is not of it.
        go_on(World::new(Level::Raid5, 4), &[0, 1, 2], 2..=5).update(&[0, 1, 2], |g| {
            g.parents.pop();
            replaced(g);
        }),
    ];
    for (i, world) in cases.iter().enumerate() {
        let refused = world.assemble(&[0, 1, 2, 3], FORCE);
        let is_split = matches!(refused, Err(AssemblyError::Split { .. }));
        assert!(is_split, "case {i}: {refused:?}");
    }
}

/// All members at generation 10 and history 1; then, on those of `on`, a run that wrote three more generations and knew
/// that everybody had 11.
fn went_on(level: Level, members: usize, on: &[usize]) -> World {
    let all: Vec<usize> = (0..members).collect();
    let world = World::new(level, members);
    let older = world.clone();
    let mut world = world.update(&all, |_| {});
    for _ in 0..2 {
        world = world.update(&all, |group| group.floor = 11);
    }
    for slot in all.iter().filter(|slot| !on.contains(slot)) {
        world.superblocks[*slot] = older.superblocks[*slot].clone();
    }
    world
}

#[test]
fn an_older_copy_of_a_member_is_stale_and_named() {
    let plan = went_on(Level::Raid1, 2, &[0])
        .assemble(&[0, 1], CALM)
        .unwrap();
    assert_eq!(plan.slots, [InSync(0), Stale(1)]);
    assert!(plan.renew_history, "it must not come back as in sync");
    assert!(
        plan.reasons[0].contains(
            "/dev/d1 (slot 1) is an older copy of itself: it says generation 10, it had 11"
        ),
        "{:?}",
        plan.reasons
    );
    let next = plan.next_record(history(200)).unwrap();
    assert_eq!(next.members[1].state, MemberState::Missing);
    // By itself nothing contradicts it: the witness does.
    assert!(went_on(Level::Raid1, 2, &[0]).assemble(&[1], CALM).is_ok());
    assert!(matches!(
        went_on(Level::Raid1, 2, &[0]).assemble(&[1], seen(1, 13)),
        Err(AssemblyError::OlderThanWitness { .. })
    ));
}

#[test]
fn two_generations_of_half_the_members_each_do_not_start() {
    let world = went_on(Level::Raid5, 4, &[0, 2]);
    let refused = world.assemble(&[0, 1, 2, 3], CALM).unwrap_err();
    let AssemblyError::TooFew { lost, .. } = &refused else {
        panic!("{refused}")
    };
    assert_eq!(lost.len(), 2);
    assert!(
        lost[0].contains("/dev/d1") && lost[1].contains("/dev/d3"),
        "{lost:?}"
    );
    assert!(
        lost.iter().all(|text| text.contains("older copy")),
        "{lost:?}"
    );
    let plan = world.assemble(&[0, 1, 2, 3], FORCE).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), InSync(3)]);
    assert_eq!(
        (plan.synced_to, plan.resync, plan.renew_history),
        (0, true, true)
    );
    assert!(
        plan.reasons
            .iter()
            .all(|reason| reason.starts_with("forced")),
        "{:?}",
        plan.reasons
    );
    // Force does not take what redundancy can do without.
    let plan = went_on(Level::Raid5, 4, &[0, 2, 3])
        .assemble(&[0, 1, 2, 3], FORCE)
        .unwrap();
    assert_eq!(plan.slots, [InSync(0), Stale(1), InSync(2), InSync(3)]);
}

#[test]
fn power_cuts_in_the_middle_of_every_start_leave_nobody_older() {
    // Three starts in turn, each cut after one member: the first says that all had 10 at least.
    let mut world = World::new(Level::Raid5, 4);
    for _ in 0..3 {
        world = world.update(&[1], |group| group.floor = 10);
    }
    let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), InSync(3)]);
    assert!(!plan.renew_history);
}

#[test]
fn an_older_copy_of_a_member_being_rebuilt_begins_again() {
    let world = went_on(Level::Raid5, 3, &[0, 1]);
    let world = world.update(&[0, 1], |group| {
        group.members[2].state = MemberState::Rebuilding;
        group.members[2].rebuilt_to = 2 * MIB;
    });
    for conditions in [CALM, FORCE] {
        let plan = world.assemble(&[0, 1, 2], conditions).unwrap();
        assert_eq!(plan.slots, [InSync(0), InSync(1), Stale(2)]);
    }
}

fn keep(slot: usize) -> Conditions {
    Conditions {
        keep: Some(disk(slot)),
        ..CALM
    }
}

/// Two that went on apart from each other, the second further.
fn apart() -> World {
    World::new(Level::Raid1, 2)
        .update(&[0], fails(1, 2))
        .update(&[1], |group| {
            group.parents = vec![history(1)];
            group.history = history(3);
            group.members[0].state = MemberState::Faulty;
            group.members[1].state = MemberState::InSync;
        })
}

#[test]
fn the_side_that_is_kept_goes_on_and_the_other_is_stale_for_good() {
    for (slot, slots, kept, given_up) in [
        (0, [InSync(0), Stale(1)], 2, 3),
        (1, [Stale(0), InSync(1)], 3, 2),
    ] {
        let world = apart();
        let plan = world.assemble(&[0, 1], keep(slot)).unwrap();
        assert_eq!(plan.slots, slots);
        assert_eq!(
            (plan.renew_history, plan.generation),
            (true, 12 + AHEAD_MAX)
        );
        assert_eq!(plan.given_up, [history(given_up)]);
        // As it is then written on the side that was kept.
        let next = plan.next_record(history(200)).unwrap();
        assert_eq!(next.parents, [history(kept), history(given_up), history(1)]);
        let mut world = world;
        let superblock = &mut world.superblocks[slot];
        superblock.generation = plan.generation + 1;
        superblock.member.as_mut().unwrap().group = next;
        let plan = world.assemble(&[0, 1], CALM).unwrap();
        assert_eq!((plan.slots, plan.renew_history), (slots.to_vec(), false));
    }
}

#[test]
fn one_generation_with_two_contents_is_resolved_by_a_disk() {
    let mut world = World::new(Level::Raid1, 2);
    let other = world.superblocks[1].member.as_mut().unwrap();
    other.group.synced_to = MIB;
    assert!(matches!(
        world.assemble(&[0, 1], CALM),
        Err(AssemblyError::Differ { .. })
    ));
    let plan = world.assemble(&[0, 1], keep(1)).unwrap();
    assert_eq!(plan.slots, [Stale(0), InSync(1)]);
    assert_eq!(plan.synced_to, MIB);
    let next = plan.next_record(history(200)).unwrap();
    assert_eq!(next.members[0].state, MemberState::Missing);
}

#[test]
fn the_older_of_two_generations_can_be_kept() {
    let world = went_on(Level::Raid1, 2, &[0]);
    let plan = world.assemble(&[0, 1], keep(1)).unwrap();
    assert_eq!(plan.slots, [Stale(0), InSync(1)]);
    assert_eq!(plan.generation, 13 + AHEAD_MAX, "above what is given up");
}

#[test]
fn keeping_gives_up_nothing_where_nothing_is_apart() {
    let world = World::new(Level::Raid5, 4).update(&[0, 1, 3], fails(2, 2));
    let calm = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(world.assemble(&[0, 1, 2, 3], keep(0)).unwrap(), calm);
    let refused = world.assemble(&[0, 1, 3], keep(2)).unwrap_err();
    assert_eq!(refused, AssemblyError::KeptNotThere { disk: disk(2) });
    // A side that is too small for data is no side to go on with.
    let refused = world.assemble(&[0, 1, 2, 3], keep(2)).unwrap_err();
    assert!(matches!(refused, AssemblyError::TooFew { .. }), "{refused}");
}

#[test]
fn a_deleted_group_comes_back_when_asked() {
    let world = World::new(Level::Raid5, 3).update(&[1], |group| group.flags.deleted = true);
    let conditions = Conditions {
        undelete: true,
        ..CALM
    };
    let plan = world.assemble(&[0, 1, 2], conditions).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2)]);
    assert!(!plan.next_record(history(200)).unwrap().flags.deleted);
}

/// Given an update of the superblocks that reached one member only, when the group goes on without that, then it is known as
/// stale when it is back, and no other side.
#[test]
fn one_that_an_update_reached_alone_is_behind_those_that_went_on_without_it() {
    for ahead in 1..4 {
        let mut world = World::new(Level::Raid6, 4);
        world.superblocks[0].generation += ahead;
        let plan = world.assemble(&[1, 2, 3], CALM).unwrap();
        let next = plan.next_record(history(2)).unwrap();
        for superblock in &mut world.superblocks[1..] {
            superblock.generation = plan.generation + 1;
            superblock.member.as_mut().unwrap().group = next.clone();
        }
        let again = world.assemble(&[0, 2, 3], CALM).unwrap();
        assert!(matches!(again.slots[0], SlotPlan::Stale(_)), "{again:?}");
        assert_eq!(again.slots[1], Missing);
    }
}
