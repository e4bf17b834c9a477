//! The logs on the members: power and members lost at once, and nothing that nobody was writing changes.

use lunar_api::target::{ScrubOrder, ScrubState};
use lunar_engine::ppl::{LANE_BYTES, SLOT_BYTES};
use lunar_engine::reserve::lay_out;

use super::*;

const SHAPES: [(Level, u8, u64); 6] = [
    (Level::Raid5, 3, 65536),
    (Level::Raid5, 4, 4096),
    (Level::Raid6, 5, 65536),
    (Level::Raid5, 5, 256 << 10),
    (Level::Raid6, 4, 4096),
    (Level::Raid6, 6, 256 << 10),
];

fn log_of(level: Level) -> Consistency {
    match level {
        Level::Raid5 => Consistency::Ppl,
        _ => Consistency::Journal,
    }
}

impl Rig {
    fn lose(&self, disks: &[usize]) {
        for disk in disks {
            self.stores[*disk].faults.dead.set(true);
        }
    }

    /// As many members as the level can do without, and which.
    fn drawn(&self, most: u64) -> Vec<usize> {
        let n = self.stores.len() as u64;
        let mut drawn = vec![self.world.random(n) as usize];
        if most > 1 && self.world.random(2) == 0 {
            drawn.push((drawn[0] + 1 + self.world.random(n - 1) as usize) % n as usize);
        }
        drawn
    }

    fn scrub_finds(&self) -> u64 {
        let order = ScrubOrder::Start {
            repair: false,
            from: 0,
            rate: None,
        };
        let group = Rc::clone(&self.group);
        let started = self.world.block_on(async move { group.scrub(order).await });
        assert_eq!(started, Ok(()));
        let group = Rc::clone(&self.group);
        self.world.run_until(move || {
            let scrub = group.status().scrub;
            scrub.is_some_and(|scrub| scrub.state == ScrubState::Done)
        });
        self.group.status().scrub.map_or(0, |scrub| scrub.bad)
    }

    fn logs_area(&self) -> std::ops::Range<usize> {
        let at = lay_out(DISK as u64).unwrap().layout.logs.offset as usize;
        at..at + LANE_BYTES as usize
    }
}

fn losses(level: Level) -> u64 {
    match level {
        Level::Raid5 => 1,
        _ => 2,
    }
}

/// Power is lost under writes, and members with it; the group comes back as it is, and with other disks in their place.
fn power_and_members_lost(seed: u64, shape: (Level, u8, u64), consistency: Consistency) -> bool {
    let (level, n, chunk) = shape;
    let mut rig = rig_of(seed, level, n, chunk, consistency);
    assert_eq!(rig.storm(20, || ()), 0);
    rig.storm_until_power_is_lost(500);
    let lost = rig.drawn(losses(level));
    rig.lose(&lost);
    rig.restart(&memory(), consistency == Consistency::None)
        .unwrap();
    let all = rig.read_all();
    let (model, known) = (rig.model.borrow().clone(), rig.known.borrow().clone());
    let is_kept = (0..all.len()).all(|i| !known[i] || all[i] == model[i]);
    if consistency == Consistency::None || !is_kept {
        return is_kept;
    }
    rig.settle();
    assert_eq!(rig.storm(20, || ()), 0);
    rig.check();
    for (disk, new) in lost.into_iter().zip(60u8..) {
        let fresh = Store::new(DISK, 0x3C);
        rig.replace(disk as u16, new, &fresh);
        rig.stores[disk] = fresh;
        rig.disks[disk] = new;
        let group = Rc::clone(&rig.group);
        rig.world.run_until(move || group.status().sync.is_none());
    }
    rig.wait_synced();
    assert_eq!(rig.scrub_finds(), 0);
    rig.check_without_others(&[]);
    true
}

/// Given writes under way on raid5 and raid6 with their logs, when power is lost and as many members with it as can be
/// done without, then the group starts, what was answered is there, and what nobody was writing is what it was.
#[test]
fn power_lost_and_members_with_it_harm_nothing_that_nobody_was_writing() {
    for (i, shape) in (0..60).zip(SHAPES.into_iter().cycle()) {
        let seed = 1600 + i + round();
        assert!(
            power_and_members_lost(seed, shape, log_of(shape.0)),
            "seed {seed}: something has changed"
        );
    }
}

/// The same with policy `none`: the write hole, which the test above is to see.
#[test]
fn write_hole_is_seen_without_a_log() {
    let is_kept = (0..40).zip(SHAPES.into_iter().cycle()).all(|(i, shape)| {
        let seed = 1600 + i + round();
        power_and_members_lost(seed, shape, Consistency::None)
    });
    assert!(!is_kept, "the write hole was not hit");
}

/// Given a whole group, when power is lost under writes, then nothing is resynced, and redundancy is right.
#[test]
fn power_lost_leaves_redundancy_right_without_a_resync() {
    for (i, (level, n, chunk)) in (0..36).zip(SHAPES.into_iter().cycle()) {
        let mut rig = rig_of(1700 + i + round(), level, n, chunk, log_of(level));
        for _ in 0..2 {
            rig.storm_until_power_is_lost(500);
            rig.restart(&memory(), false).unwrap();
            assert_eq!(rig.group.status().sync, None);
            rig.check();
            rig.settle();
        }
        assert_eq!(rig.scrub_finds(), 0);
        rig.check_without_others(&[]);
    }
}

/// Given a member that was lost with the power, when it is back, then it is caught up with what it missed: also with the
/// parity that was being written on it as it left, of which its own log alone tells.
#[test]
fn member_lost_with_the_power_is_caught_up_when_it_is_back() {
    for (i, (level, n, chunk)) in (0..36).zip(SHAPES.into_iter().cycle()) {
        let mut rig = rig_of(1800 + i + round(), level, n, chunk, log_of(level));
        rig.storm_until_power_is_lost(500);
        let lost = rig.drawn(1)[0];
        rig.lose(&[lost]);
        rig.restart(&memory(), false).unwrap();
        rig.check();
        rig.settle();
        if i % 2 == 0 {
            assert_eq!(rig.storm(6, || ()), 0);
        }
        // Some are back at the next start, after a power loss or a clean stop, some while the group runs.
        rig.stores[lost].faults.dead.set(false);
        match i % 3 {
            0 => {
                rig.storm_until_power_is_lost(200);
                rig.restart(&memory(), false).unwrap();
                rig.check();
                rig.settle();
            }
            1 => {
                rig.stop();
                rig.restart(&memory(), false).unwrap();
            }
            _ => {
                let store = Rc::clone(&rig.stores[lost]);
                rig.replace(lost as u16, rig.disks[lost], &store);
            }
        }
        rig.wait_synced();
        rig.check();
        assert_eq!(rig.scrub_finds(), 0);
        rig.check_without_others(&[]);
    }
}

/// Given a log of which neither slot can be read, when power was lost, then all is resynced; with a member missing too the
/// start is refused.
#[test]
fn log_that_cannot_be_read_costs_a_resync_and_degraded_a_refusal() {
    for (i, (level, n, chunk)) in (0..12).zip(SHAPES.into_iter().cycle()) {
        let mut rig = rig_of(1900 + i + round(), level, n, chunk, log_of(level));
        rig.storm_until_power_is_lost(300);
        let (damaged, area) = (rig.world.random(n.into()) as usize, rig.logs_area());
        for slot in [area.start, area.start + SLOT_BYTES as usize] {
            let at = slot + rig.world.random(64) as usize;
            let mut byte = [0];
            rig.stores[damaged].read(at as u64, &mut byte);
            rig.stores[damaged].write(at as u64, &[byte[0] ^ 0x10]);
        }
        let other = (damaged + 1) % usize::from(n);
        rig.stores[other].faults.dead.set(true);
        let refused = rig.restart(&memory(), false).unwrap_err();
        assert!(refused.contains("not stopped cleanly"), "{refused}");
        rig.stores[other].faults.dead.set(false);
        rig.restart(&memory(), false).unwrap();
        let sync = rig.group.status().sync.expect("all of it is resynced");
        assert_eq!(sync.done, 0);
        rig.check();
        rig.wait_synced();
        rig.settle();
        assert_eq!(rig.scrub_finds(), 0);
        // From here on there is a log again.
        rig.storm_until_power_is_lost(300);
        rig.restart(&memory(), false).unwrap();
        assert_eq!(rig.group.status().sync, None);
        rig.check();
    }
}
