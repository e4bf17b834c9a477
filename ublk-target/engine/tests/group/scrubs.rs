//! Scrub: what was planted behind the engine's back is found, exactly, and nothing else ever is.

use std::collections::BTreeSet;

use lunar_api::target::{ScrubOrder, ScrubState, ScrubStatus};
use lunar_engine::geometry::{Geometry, Spot};

use super::*;

const CHECK: ScrubOrder = ScrubOrder::Start {
    repair: false,
    from: 0,
    rate: None,
};
const REPAIR: ScrubOrder = ScrubOrder::Start {
    repair: true,
    from: 0,
    rate: None,
};

impl Rig {
    fn order(&self, order: ScrubOrder) -> Result<(), lunar_api::ApiError> {
        let group = Rc::clone(&self.group);
        self.world.block_on(async move { group.scrub(order).await })
    }

    fn scrub_status(&self) -> ScrubStatus {
        self.group.status().scrub.expect("one was started")
    }

    /// Runs a scrub to its end.
    fn scrub(&self, order: ScrubOrder) -> ScrubStatus {
        self.order(order).unwrap();
        self.wait_scrubbed()
    }

    fn wait_scrubbed(&self) -> ScrubStatus {
        let group = Rc::clone(&self.group);
        self.world.run_until(move || {
            group
                .status()
                .scrub
                .is_some_and(|scrub| scrub.state == ScrubState::Done)
        });
        self.scrub_status()
    }

    /// Where a byte of a member's data is on its disk.
    fn place(&self, slot: usize, at: u64) -> u64 {
        self.group.status().members[slot].data_offset + at
    }

    /// Flips bits of a byte of a member's data.
    fn flip(&self, slot: usize, at: u64) {
        let place = self.place(slot, at);
        let mut byte = [0];
        self.stores[slot].read(place, &mut byte);
        self.stores[slot].write(place, &[byte[0] ^ 0x55]);
    }

    fn events(&self, name: &str) -> usize {
        let mut events = Vec::new();
        self.group.take_events(&mut events);
        events.iter().filter(|event| event.name == name).count()
    }
}

const SHAPES: [(Level, u8, u64); 9] = [
    (Level::Raid6, 4, 65536),
    (Level::Raid6, 5, 16384),
    (Level::Raid10, 4, 65536),
    (Level::Raid10, 5, 16384),
    (Level::Raid1, 2, 65536),
    (Level::Raid1, 3, 65536),
    (Level::Raid5, 3, 4096),
    (Level::Raid5, 4, 65536),
    (Level::Raid5, 5, 1 << 20),
];

fn geometry(rig: &Rig, level: Level, n: u8, chunk: u64) -> Geometry {
    let bytes = rig.group.status().member_bytes;
    Geometry::new(level, usize::from(n), chunk, bytes).unwrap()
}

/// Where damage of a stripe is made good by md's rule: its parity, or a copy that is not the first.
fn redundant(geometry: &Geometry, stripe: u64, d: u16) -> Spot {
    // Of two parities each in turn.
    let turn = usize::from(geometry.parities() == 2 && stripe % 2 == 1);
    let parity = geometry.parity_slots(stripe).nth(turn);
    match parity {
        Some(slot) => Spot {
            slot,
            member_at: stripe * geometry.stripe_on_member(),
        },
        None => {
            let c = 1 + stripe % u64::from(geometry.copies_of_each() - 1);
            geometry.copy(stripe, d % geometry.data_slots(), c as u16)
        }
    }
}

/// The same of a raid5 of 4 with chunks of 64 KiB.
fn parity_slot(stripe: u64) -> usize {
    (3 - stripe % 4) as usize
}

/// Given k stripes damaged behind the engine's back, when it is scrubbed, then exactly those are told, with their place
/// and LU; a repair makes them fit, the next scrub finds none, and the data is as written.
#[test]
fn planted_flips_are_found_exactly_and_repaired() {
    for (seed, (level, n, chunk)) in (700..).zip(SHAPES) {
        let rig = rig(seed, level, n, chunk, true);
        rig.storm(60, || ());
        let clean = rig.scrub(CHECK);
        assert_eq!((clean.bad, clean.unreadable), (0, 0), "before: {clean:?}");
        let geometry = geometry(&rig, level, n, chunk);
        let stripes = geometry.stripes();
        let mut planted = BTreeSet::from([0, stripes - 1]);
        while planted.len() < 7 {
            planted.insert(rig.world.random(stripes));
        }
        let mut places = Vec::new();
        for stripe in &planted {
            let spot = redundant(&geometry, *stripe, rig.world.random(8) as u16);
            let at = spot.member_at + rig.world.random(geometry.chunk());
            rig.flip(usize::from(spot.slot), at);
            places.push((spot.slot, at));
        }
        let found = rig.scrub(CHECK);
        let told: BTreeSet<u64> = found.stripes.iter().map(|bad| bad.stripe).collect();
        assert_eq!((&told, found.bad, found.repaired), (&planted, 7, 0));
        for (bad, (slot, at)) in found.stripes.iter().zip(&places) {
            assert_eq!((bad.at, bad.len), (at / 512 * 512, 512));
            // Only the start of the group has a LU.
            let start = bad.stripe * geometry.stripe_bytes();
            assert_eq!(bad.lu.is_some(), start < LU_BYTES, "{bad:?}");
            if geometry.is_mirrored() {
                let address = geometry.address_of_member(*slot, bad.at).unwrap();
                assert_eq!(bad.slots, [*slot]);
                assert!(bad.lu.is_none() || (bad.lu_at, bad.lu_len) == (address, 512));
            } else {
                // Of two parities the one that fits proves the other wrong.
                let told: &[u16] = if geometry.parities() == 2 {
                    &[*slot]
                } else {
                    &[]
                };
                assert_eq!(bad.slots, told);
                let whole = (start, geometry.stripe_bytes());
                assert!(bad.lu.is_none() || (bad.lu_at, bad.lu_len) == whole);
            }
        }
        assert_eq!(rig.events("ScrubMismatch"), 7);
        // A check changed nothing.
        let repaired = rig.scrub(REPAIR);
        assert_eq!((repaired.bad, repaired.repaired), (7, 7), "{repaired:?}");
        let after = rig.scrub(CHECK);
        assert_eq!((after.bad, after.unreadable), (0, 0), "after: {after:?}");
        rig.check();
        rig.without_each(&[]);
    }
}

/// Given data and not parity damaged, when it is repaired, then parity fits what is there: md's rule, and said so.
#[test]
fn damaged_data_of_a_raid5_is_found_and_not_attributed() {
    let rig = rig(710, Level::Raid5, 4, 65536, true);
    rig.storm(60, || ());
    let parity = parity_slot(3);
    rig.flip((parity + 1) % 4, 3 * 65536 + 1000);
    let found = rig.scrub(REPAIR);
    let bad = &found.stripes[0];
    assert_eq!((found.bad, bad.stripe, bad.at), (1, 3, 3 * 65536 + 512));
    assert!(bad.slots.is_empty() && bad.repaired);
    assert_eq!(
        (bad.lu, bad.lu_at, bad.lu_len),
        (Some(LU), 9 * 65536, 3 * 65536)
    );
    assert_eq!(rig.scrub(CHECK).bad, 0);
}

/// Given writers at work, when it is scrubbed all the while, then nothing is found: a scrub sees no half of a write.
#[test]
fn scrub_under_writes_finds_nothing() {
    for (seed, (level, n, chunk)) in (720..).zip(SHAPES) {
        for clean in [true, false] {
            let rig = rig(seed + round(), level, n, chunk, clean);
            rig.wait_synced();
            let group = Rc::clone(&rig.group);
            rig.world.spawn(async move {
                assert_eq!(group.scrub(REPAIR).await, Ok(()));
            });
            // The scrub goes over the LU, at the start of the group, while these are under way.
            assert_eq!(rig.storm(300, || ()), 0);
            let done = rig.wait_scrubbed();
            assert_eq!((done.bad, done.unreadable, done.rewritten), (0, 0, 0));
            rig.check();
        }
    }
}

/// Given sectors that cannot be read, when it is scrubbed, then they are rewritten from redundancy and counted apart;
/// where too much cannot be read the stripe is counted, and no byte is made up.
#[test]
fn unreadable_sectors_are_rewritten_and_counted_apart() {
    for (level, n) in [(Level::Raid1, 2), (Level::Raid1, 3), (Level::Raid5, 4)] {
        let rig = rig(730, level, n, 65536, true);
        rig.storm(60, || ());
        for (slot, at) in [
            (0, 5 * 65536),
            (1, 9 * 65536 + 8192),
            (1, 9 * 65536 + 12288),
        ] {
            let sector = rig.place(slot, at) / 512;
            rig.stores[slot].faults.bad.borrow_mut().insert(sector);
        }
        let done = rig.scrub(CHECK);
        assert_eq!(
            (done.bad, done.unreadable, done.rewritten),
            (0, 0, 3 * 4096)
        );
        assert!(
            rig.stores
                .iter()
                .all(|store| store.faults.bad.borrow().is_empty())
        );
        assert_eq!(rig.group.status().state, GroupState::Optimal);
        rig.check();
        for slot in 0..usize::from(n) {
            let sector = rig.place(slot, 70 * 65536) / 512;
            rig.stores[slot].faults.bad.borrow_mut().insert(sector);
        }
        let done = rig.scrub(REPAIR);
        assert_eq!((done.bad, done.unreadable, done.rewritten), (0, 1, 0));
        assert_eq!(rig.group.status().state, GroupState::Optimal);
    }
}

/// Given a scrub in the middle, when the process is killed, or the group stopped, then the next one goes on where it
/// was, with what was found, and repairs each stripe once.
#[test]
fn scrub_goes_on_after_a_restart() {
    for (seed, kill) in [(740, true), (741, false), (742, true)] {
        let mut rig = rig(seed, Level::Raid5, 4, 65536, true);
        rig.storm(30, || ());
        let planted = [2, 3, 900, 1000];
        for stripe in planted {
            rig.flip(parity_slot(stripe), stripe * 65536);
        }
        let order = ScrubOrder::Start {
            repair: true,
            from: 0,
            rate: Some(1 << 20),
        };
        rig.order(order).unwrap();
        let group = Rc::clone(&rig.group);
        rig.world
            .run_until(|| group.status().scrub.is_some_and(|s| s.done > 40 << 20));
        assert_eq!(rig.scrub_status().repaired, 2);
        if kill {
            rig.world.kill();
        } else {
            let group = Rc::clone(&rig.group);
            let stopped = rig.world.block_on(async move { group.stop(false).await });
            assert_eq!(stopped, Ok(()));
        }
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        let status = rig.scrub_status();
        assert_eq!(
            (status.state, status.rate_max),
            (ScrubState::Running, Some(1 << 20))
        );
        assert!((1 << 20..=58 << 20).contains(&status.done), "{status:?}");
        assert_eq!((status.bad, status.repaired), (2, 2));
        let done = rig.wait_scrubbed();
        let told: Vec<u64> = done.stripes.iter().map(|bad| bad.stripe).collect();
        assert_eq!((&told[..], done.repaired), (&planted[..], 4));
        assert!(done.ended.is_some_and(|ended| ended > done.started));
        assert_eq!(rig.scrub(CHECK).bad, 0);
        rig.check();
    }
}

/// Given a repair that dies at a drawn I/O, when it goes on, then every planted stripe is told, all fit in the end, and
/// the data is as written.
#[test]
fn repair_killed_anywhere_tells_every_stripe() {
    for seed in 750..790 {
        let mut rig = rig(seed + round(), Level::Raid5, 4, 65536, true);
        rig.storm(20, || ());
        let planted: BTreeSet<u64> = (0..6).map(|i| i * 3 + 1).collect();
        for stripe in &planted {
            rig.flip(parity_slot(*stripe), stripe * 65536 + 77);
        }
        rig.order(REPAIR).unwrap();
        rig.world.crash_in.set(Some(1 + rig.world.random(400)));
        let world = Rc::clone(&rig.world);
        rig.world.run_until(|| world.crashed());
        rig.world.kill();
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        let done = rig.wait_scrubbed();
        let told: BTreeSet<u64> = done.stripes.iter().map(|bad| bad.stripe).collect();
        assert_eq!((told, done.repaired), (planted, 6), "seed {seed}");
        assert_eq!(rig.scrub(CHECK).bad, 0);
        rig.check();
    }
}

/// Given a scrub, when it is paused it stands, across a restart too; resumed it goes on; cancelled it ends, and another
/// may begin, from where it is told.
#[test]
fn scrub_is_paused_resumed_and_cancelled() {
    let mut rig = rig(790, Level::Raid1, 2, 65536, true);
    let slow = ScrubOrder::Start {
        repair: false,
        from: 0,
        rate: Some(1 << 20),
    };
    rig.order(slow).unwrap();
    assert!(rig.order(CHECK).is_err(), "one runs already");
    let group = Rc::clone(&rig.group);
    rig.world
        .run_until(|| group.status().scrub.is_some_and(|s| s.done > 4 << 20));
    rig.order(ScrubOrder::Pause).unwrap();
    let stood = rig.scrub_status().done;
    rig.sleep(30);
    assert_eq!(rig.scrub_status().done, stood);
    rig.world.kill();
    let memory = Rc::clone(&rig.memory);
    rig.restart(&memory, false).unwrap();
    rig.sleep(30);
    let status = rig.scrub_status();
    assert_eq!((status.state, status.done), (ScrubState::Paused, stood));
    rig.order(ScrubOrder::Resume).unwrap();
    let group = Rc::clone(&rig.group);
    rig.world
        .run_until(|| group.status().scrub.is_some_and(|s| s.done > stood));
    rig.order(ScrubOrder::Cancel).unwrap();
    let status = rig.scrub_status();
    assert!(status.state == ScrubState::Cancelled && status.ended.is_some());
    assert!(rig.order(ScrubOrder::Resume).is_err() && rig.order(ScrubOrder::Cancel).is_err());
    rig.flip(1, 10 * 65536);
    rig.flip(1, 500 * 65536);
    let done = rig.scrub(ScrubOrder::Start {
        repair: false,
        from: 11 * 65536 + 5,
        rate: None,
    });
    assert_eq!(
        (done.from, done.bad, done.stripes[0].stripe),
        (11 * 65536, 1, 500)
    );
}

/// Given a scrub, when a member fails and is replaced, then the rebuild goes first and the scrub goes on after it.
#[test]
fn rebuild_goes_before_the_scrub() {
    let mut rig = rig(791, Level::Raid5, 4, 65536, true);
    rig.storm(30, || ());
    let slow = ScrubOrder::Start {
        repair: false,
        from: 0,
        rate: Some(4 << 20),
    };
    rig.order(slow).unwrap();
    let group = Rc::clone(&rig.group);
    rig.world
        .run_until(|| group.status().scrub.is_some_and(|s| s.done > 4 << 20));
    rig.stores[2].faults.dead.set(true);
    rig.storm(20, || ());
    let fresh = Store::new(DISK, 0x77);
    rig.group.set_rebuild_rate(None, Some(8 << 20));
    let stood = rig.scrub_status().done;
    assert!(rig.order(ScrubOrder::Pause).is_ok() && rig.order(ScrubOrder::Resume).is_ok());
    rig.replace(2, 40, &fresh);
    rig.stores[2] = fresh;
    let group = Rc::clone(&rig.group);
    rig.world
        .run_until(|| group.status().sync.is_some_and(|sync| sync.done > 8 << 20));
    assert_eq!(rig.scrub_status().done, stood);
    rig.wait_synced();
    let done = rig.wait_scrubbed();
    assert_eq!((done.bad, done.unreadable), (0, 0), "{done:?}");
    rig.check();
}

/// Given more bad stripes than the list holds, when it is scrubbed, then the first are listed and all are counted.
#[test]
fn list_is_bounded_and_the_count_is_not() {
    let rig = rig(792, Level::Raid1, 2, 65536, true);
    for stripe in 0..300 {
        rig.flip(1, stripe * 65536 + stripe);
    }
    let found = rig.scrub(CHECK);
    assert_eq!((found.bad, found.stripes.len()), (300, 128));
    assert_eq!(found.stripes[127].stripe, 127);
    assert!(rig.events("ScrubMismatch") < 20);
    let found = rig.scrub(REPAIR);
    assert_eq!((found.bad, found.repaired), (300, 300));
    assert_eq!(rig.scrub(CHECK).bad, 0);
}

/// Given nothing to compare, when a scrub is asked for, then it is refused with the reason.
#[test]
fn scrub_without_redundancy_is_refused() {
    let plain = rig(793, Level::Raid0, 3, 65536, true);
    let why = plain.order(CHECK).unwrap_err();
    assert!(why.causes[0].contains("no redundancy"), "{why:?}");
    let degraded = rig(794, Level::Raid5, 3, 65536, true);
    degraded.stores[1].faults.dead.set(true);
    degraded.storm(10, || ());
    let why = degraded.order(CHECK).unwrap_err();
    assert!(why.causes[0].contains("degraded"), "{why:?}");
    let far = ScrubOrder::Start {
        repair: false,
        from: 1 << 40,
        rate: None,
    };
    assert!(rig(795, Level::Raid1, 2, 65536, true).order(far).is_err());
}
