//! The two maps: what is resynced after a power loss, and what a member is caught up with that was away.

use lunar_api::target::{ScrubOrder, ScrubState};
use lunar_engine::region_map::MAP_BYTES;

use super::*;

const SHAPES: [(Level, u8, u64); 5] = [
    (Level::Raid1, 2, 65536),
    (Level::Raid10, 3, 1 << 20),
    (Level::Raid5, 4, 65536),
    (Level::Raid6, 5, 4096),
    (Level::Raid10, 4, 65536),
];

/// An even seed: policy `bitmap`.
fn seed_of(i: u64) -> u64 {
    1400 + 2 * i + round()
}

/// Bytes of a member's data in which the LU lies, in whole regions.
fn marked_most(level: Level, n: u8) -> u64 {
    let data = match level {
        Level::Raid1 => 1,
        Level::Raid10 => u64::from(n) / 2,
        Level::Raid5 => u64::from(n) - 1,
        _ => u64::from(n) - 2,
    };
    LU_BYTES.div_ceil(data).next_multiple_of(1 << 20) + (2 << 20)
}

impl Rig {
    /// After a few I/Os of the sync that runs, or at its end.
    fn lose_power_in_the_sync(&self) {
        self.world.crash_in.set(Some(1 + self.world.random(40)));
        let group = Rc::clone(&self.group);
        self.world.run_until(move || group.status().sync.is_none());
        self.world.kill();
    }

    fn slot(&self, slot: u16) -> MemberState {
        self.group.status().members[usize::from(slot)].state
    }
}

#[test]
fn power_lost_resyncs_the_regions_under_writes_and_no_more() {
    for (i, (level, n, chunk)) in (0..20).zip(SHAPES.into_iter().cycle()) {
        let mut rig = rig(seed_of(i), level, n, chunk, true);
        rig.storm_until_power_is_lost(600);
        rig.restart(&memory(), false).unwrap();
        let sync = rig.group.status().sync.expect("regions are marked");
        assert!(sync.total <= marked_most(level, n), "{sync:?}");
        rig.check();
        rig.wait_synced();
        rig.settle();
        rig.check_without_others(&[]);
        assert_eq!(rig.storm(60, || ()), 0);
        rig.check();
    }
}

#[test]
fn power_lost_again_in_the_resync_loses_no_mark() {
    for (i, (level, n, chunk)) in (20..40).zip(SHAPES.into_iter().cycle()) {
        let mut rig = rig(seed_of(i), level, n, chunk, true);
        rig.storm_until_power_is_lost(600);
        for _ in 0..3 {
            rig.restart(&memory(), false).unwrap();
            rig.check();
            rig.lose_power_in_the_sync();
        }
        rig.restart(&memory(), false).unwrap();
        rig.wait_synced();
        rig.settle();
        rig.check_without_others(&[]);
    }
}

#[test]
fn marks_go_once_what_was_written_is_flushed_and_quiet() {
    for (i, (level, n, chunk)) in (40..45).zip(SHAPES) {
        let mut rig = rig(seed_of(i), level, n, chunk, true);
        assert_eq!(rig.storm(40, || ()), 0);
        rig.sleep(4);
        // It is kept from being clean: what counts are the marks alone.
        let busy = rig.read(0, 4096);
        assert!(busy.is_ok());
        rig.world.kill();
        rig.restart(&memory(), false).unwrap();
        assert!(rig.group.status().sync.is_some(), "marked");
        rig.wait_synced();
        rig.check();
        for _ in 0..8 {
            rig.sleep(2);
            assert!(rig.read(0, 4096).is_ok());
        }
        rig.world.kill();
        rig.restart(&memory(), false).unwrap();
        assert!(rig.group.status().sync.is_none(), "nothing is marked");
        rig.check_without_others(&[]);
    }
}

#[test]
fn damaged_map_counts_as_marked() {
    let mut rig = rig(seed_of(50), Level::Raid1, 2, 65536, true);
    assert_eq!(rig.storm(4, || ()), 0);
    rig.world.kill();
    let at = 8192 + (32 << 10);
    for store in &rig.stores {
        store.write(at, &vec![0x55; MAP_BYTES as usize]);
    }
    rig.restart(&memory(), false).unwrap();
    let sync = rig.group.status().sync.expect("all is marked");
    assert_eq!(sync.total, rig.group.status().member_bytes);
    rig.wait_synced();
    rig.check_without_others(&[]);
}

#[test]
fn member_that_comes_back_is_caught_up_with_what_it_missed() {
    for (i, (level, n, chunk)) in (60..90).zip(SHAPES.into_iter().cycle()) {
        // Also under policy `none`: what is missed is noted under every policy.
        let mut rig = rig(seed_of(i) + i % 2, level, n, chunk, true);
        assert_eq!(rig.storm(40, || ()), 0);
        let slot = (i % u64::from(n)) as u16;
        let store = Rc::clone(&rig.stores[usize::from(slot)]);
        assert_eq!(rig.storm(60, || store.faults.dead.set(true)), 0);
        rig.check();
        assert_eq!(rig.slot(slot), MemberState::Faulty);
        store.faults.dead.set(false);
        store.reads.set(0);
        let before = store.writes.get();
        rig.replace(slot, slot as u8, &store);
        // Under writes, and, every other time, with a crash in between.
        assert_eq!(rig.storm(20, || ()), 0);
        if i % 3 == 0 {
            rig.storm_with_kills(2);
        }
        rig.wait_synced();
        let sync_writes = store.writes.get() - before;
        assert!(sync_writes < 4000, "{sync_writes}");
        rig.check();
        rig.check_without_others(&[]);
        // Whatever comes next finds nothing to do.
        rig.stop();
        rig.restart(&memory(), false).unwrap();
        assert!(rig.group.status().sync.is_none());
    }
}

#[test]
fn member_that_was_not_there_for_some_starts_is_caught_up_by_itself() {
    for (i, (level, n, chunk)) in (90..120).zip(SHAPES.into_iter().cycle()) {
        let mut rig = rig(seed_of(i) + i % 2, level, n, chunk, true);
        assert_eq!(rig.storm(40, || ()), 0);
        rig.stop();
        let slot = (i % u64::from(n)) as u16;
        let store = Rc::clone(&rig.stores[usize::from(slot)]);
        store.faults.dead.set(true);
        rig.restart(&memory(), false).unwrap();
        assert_eq!(rig.slot(slot), MemberState::Missing);
        assert_eq!(rig.storm(40, || ()), 0);
        let is_bitmap = i % 2 == 0;
        match is_bitmap && matches!(level, Level::Raid1 | Level::Raid10) {
            // The mirror that is left has all that was answered.
            true => rig.world.kill(),
            false => rig.stop(),
        }
        rig.restart(&memory(), false).unwrap();
        rig.check();
        assert_eq!(rig.storm(20, || ()), 0);
        rig.stop();
        store.faults.dead.set(false);
        rig.restart(&memory(), false).unwrap();
        assert_eq!(rig.slot(slot), MemberState::Rebuilding);
        let sync = rig.group.status().sync.expect("it is caught up");
        assert!(sync.total <= marked_most(level, n), "{sync:?}");
        rig.check();
        // Power is lost while it is caught up: it is caught up all the same.
        if i % 3 == 0 && matches!(level, Level::Raid1 | Level::Raid10) {
            rig.lose_power_in_the_sync();
            rig.restart(&memory(), false).unwrap();
            rig.check();
        }
        rig.wait_synced();
        rig.check();
        rig.check_without_others(&[]);
    }
}

#[test]
fn crash_while_a_member_leaves_notes_what_it_has_missed() {
    for (i, (level, n, chunk)) in (120..288).zip(SHAPES.into_iter().cycle()) {
        // A parity group that lost a member with the power does not start where anything is marked.
        let is_parity = matches!(level, Level::Raid5 | Level::Raid6);
        let mut rig = rig(seed_of(i), level, n, chunk, true);
        assert_eq!(rig.storm(30, || ()), 0);
        let slot = (i % u64::from(n)) as u16;
        let store = Rc::clone(&rig.stores[usize::from(slot)]);
        store.faults.dead.set(true);
        if is_parity {
            rig.storm_with_kills(3);
        } else {
            rig.storm_until_power_is_lost(24);
            rig.restart(&memory(), false).unwrap();
            rig.check();
            assert_eq!(rig.storm(10, || ()), 0);
        }
        store.faults.dead.set(false);
        rig.stop();
        rig.restart(&memory(), false).unwrap();
        if rig.slot(slot) == MemberState::Faulty {
            rig.replace(slot, slot as u8, &store);
        }
        rig.wait_synced_or_rebuilt(slot);
        rig.settle();
        rig.check_without_others(&[]);
    }
}

impl Rig {
    /// Waits until a slot is in sync again, with its disk handed in once more if nothing else does it.
    fn wait_synced_or_rebuilt(&self, slot: u16) {
        if self.slot(slot) == MemberState::Missing {
            self.replace(slot, slot as u8, &self.stores[usize::from(slot)]);
        }
        self.wait_synced();
    }
}

#[test]
fn an_older_copy_of_a_member_is_filled_from_the_start() {
    for (i, (level, n, chunk)) in (300..305).zip(SHAPES) {
        let mut rig = rig(seed_of(i), level, n, chunk, true);
        assert_eq!(rig.storm(10, || ()), 0);
        rig.stop();
        let copy = rig.stores[0].copy();
        rig.restart(&memory(), false).unwrap();
        assert_eq!(rig.storm(40, || ()), 0);
        let store = Rc::clone(&rig.stores[0]);
        assert_eq!(rig.storm(40, || store.faults.dead.set(true)), 0);
        rig.replace(0, 0, &copy);
        let sync = rig.group.status().sync.expect("it is filled");
        assert_eq!(sync.total, rig.group.status().member_bytes);
        rig.stores[0] = copy;
        rig.wait_synced();
        rig.check();
        rig.check_without_others(&[]);
    }
}

#[test]
fn members_that_were_away_are_caught_up_one_after_the_other() {
    let rig = rig(seed_of(310), Level::Raid6, 6, 65536, true);
    assert_eq!(rig.storm(40, || ()), 0);
    for slot in [1, 4] {
        rig.stores[slot].faults.dead.set(true);
        assert_eq!(rig.storm(40, || ()), 0);
    }
    rig.check();
    for slot in [1, 4] {
        let store = Rc::clone(&rig.stores[slot]);
        store.faults.dead.set(false);
        rig.replace(slot as u16, slot as u8, &store);
        let sync = rig.group.status().sync.expect("it is caught up");
        assert!(sync.total <= marked_most(Level::Raid6, 6), "{sync:?}");
        let group = Rc::clone(&rig.group);
        rig.world
            .run_until(move || group.status().members[slot].state == MemberState::InSync);
        assert_eq!(rig.storm(20, || ()), 0);
    }
    rig.wait_synced();
    rig.check();
    rig.check_without_others(&[]);
}

/// Given a member that left before copies were alike for the first time, when it comes back, then it is filled, not caught
/// up: what a sync gave the others meanwhile nobody has noted.
#[test]
fn member_that_left_before_all_was_synced_is_filled_from_the_start() {
    for (level, n) in [(Level::Raid1, 3), (Level::Raid10, 4), (Level::Raid5, 4)] {
        for i in 0..2 {
            let rig = rig(seed_of(300) + i, level, n, 65536, false);
            rig.group.set_rebuild_rate(None, Some(4 << 20));
            let store = Rc::clone(&rig.stores[1]);
            assert_eq!(rig.storm(40, || store.faults.dead.set(true)), 0);
            assert_eq!(rig.slot(1), MemberState::Faulty);
            rig.group.set_rebuild_rate(None, Some(1 << 40));
            rig.sleep(120);
            store.faults.dead.set(false);
            rig.replace(1, 1, &store);
            rig.wait_synced();
            rig.check();
            let group = Rc::clone(&rig.group);
            let order = ScrubOrder::Start {
                repair: false,
                from: 0,
                rate: None,
            };
            let ordered = rig.world.block_on(async move { group.scrub(order).await });
            assert_eq!(ordered, Ok(()));
            let scrubbed = || rig.group.status().scrub;
            rig.world
                .run_until(|| scrubbed().is_some_and(|scrub| scrub.state == ScrubState::Done));
            assert_eq!(scrubbed().map(|scrub| scrub.bad), Some(0), "{level:?}");
        }
    }
}
