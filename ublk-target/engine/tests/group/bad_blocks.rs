//! What neither a disk nor redundancy gives: it is on a list, an error to whoever reads it, and nothing else is.

use super::*;
use lunar_api::target::ScrubOrder;
use lunar_engine::bad_blocks::COPY_BYTES;

const NEW: u8 = 40;
/// Sectors of the first member's data that cannot be read: of two grains within the LU, and of one behind it.
const BAD: [u64; 4] = [5, 1600, 1601, 80_000];

impl Rig {
    /// Grains of the LU whose reads are errors, in bytes; all else is as it was written.
    fn lost(&self) -> Vec<u64> {
        let mut lost = Vec::new();
        for at in (0..LU_BYTES).step_by(4096) {
            let is = at as usize..at as usize + 4096;
            match self.read(at, 4096) {
                Ok(bytes) => assert!(bytes == self.model.borrow()[is], "byte {at} is another"),
                Err(_) => lost.push(at),
            }
        }
        lost
    }

    fn bad_blocks(&self, slot: usize) -> u64 {
        self.group.status().members[slot].bad_blocks
    }

    fn write_model(&self, at: u64, byte: u8, len: usize) -> Result<(), i32> {
        let written = self.write(at, vec![byte; len]);
        if written.is_ok() {
            self.model.borrow_mut()[at as usize..at as usize + len].fill(byte);
        }
        written
    }

    /// The group as it is after the process, or all power, has gone.
    fn comes_back(&mut self, power: bool) {
        self.world.kill();
        let memory = match power {
            true => memory(),
            false => Rc::clone(&self.memory),
        };
        self.restart(&memory, false).unwrap();
        self.memory = memory;
    }

    /// Member 1 is gone, and a new disk is there for it, as member 0 cannot read everything.
    fn begin_rebuild(&mut self) {
        assert_eq!(self.storm(60, || ()), 0);
        self.stores[1].faults.dead.set(true);
        assert_eq!(self.storm(20, || ()), 0);
        let data = self.group.status().members[0].data_offset / 512;
        let bad = BAD.map(|sector| data + sector);
        self.stores[0].faults.bad.borrow_mut().extend(bad);
        let fresh = Store::new(DISK, 0x77);
        self.replace(1, NEW, &fresh);
        self.stores[1] = fresh;
        self.disks[1] = NEW;
    }

    pub(crate) fn scrub_all(&self) {
        let group = Rc::clone(&self.group);
        let order = ScrubOrder::Start {
            repair: true,
            from: 0,
            rate: None,
        };
        let ordered = self.world.block_on(async move { group.scrub(order).await });
        assert_eq!(ordered, Ok(()));
        let group = Rc::clone(&self.group);
        self.world.run_until(move || {
            let scrub = group.status().scrub;
            scrub.is_some_and(|scrub| scrub.state == lunar_api::target::ScrubState::Done)
        });
    }
}

const REDUNDANT: [(Level, u8, Consistency); 6] = [
    (Level::Raid1, 2, Consistency::None),
    (Level::Raid1, 2, Consistency::Bitmap),
    (Level::Raid10, 4, Consistency::Bitmap),
    (Level::Raid5, 4, Consistency::None),
    (Level::Raid5, 4, Consistency::Bitmap),
    (Level::Raid5, 4, Consistency::Ppl),
];

/// Given a member that cannot read a few sectors, when another is rebuilt, then the rebuild ends; what could not be produced is
/// an error to who reads it, also after a crash, and everything else is right. Sectors that come back give it back, and so does
/// a write.
#[test]
fn a_rebuild_ends_and_lists_what_nobody_has() {
    for (i, power) in [(0, false), (1, true)] {
        for (level, n, consistency) in REDUNDANT {
            let mut rig = rig_of(900 + i, level, n, 65536, consistency);
            rig.begin_rebuild();
            rig.wait_synced();
            assert_eq!(rig.bad_blocks(1), 3, "{level:?}");
            let lost = rig.lost();
            // Of a row with parity two blocks may be data.
            assert!((2..=4).contains(&lost.len()), "{level:?} {lost:?}");
            rig.comes_back(power);
            assert_eq!(rig.bad_blocks(1), 3, "{level:?} {power}");
            assert_eq!(rig.lost(), lost);
            rig.wait_synced();
            // A part of a block brings nothing back, and is refused where its rest would be lost.
            let _ = rig.write_model(lost[0] + 512, 7, 512);
            assert!(rig.read(lost[0], 4096).is_err());
            // A write of it does, for good.
            assert_eq!(rig.write_model(lost[0], 9, 4096), Ok(()), "{level:?}");
            assert_eq!(rig.lost(), lost[1..]);
            rig.comes_back(power);
            assert_eq!(rig.lost(), lost[1..]);
            rig.wait_synced();
            assert_eq!(rig.lost(), lost[1..]);
            // Its neighbours are written as ever, and are right without any member.
            assert_eq!(rig.storm_but(&lost[1..]), 0);
            assert_eq!(rig.lost(), lost[1..]);
            // What comes back by itself is taken from where it is.
            rig.stores[0].faults.bad.borrow_mut().clear();
            // Where parity was given up, for what was written or by a resync that cannot prove it, the other block of the row
            // is not there.
            let still = rig.lost();
            let is_torn = power && consistency != Consistency::Ppl;
            let given_up = if is_torn { &lost[1..] } else { &lost[1..2] };
            assert!(
                still.iter().all(|at| given_up.contains(at)),
                "{level:?} {still:?}"
            );
            assert!(still.is_empty() || level == Level::Raid5);
            for at in still {
                assert_eq!(rig.write_model(at, 11, 4096), Ok(()));
            }
            rig.scrub_all();
            // Behind the LU nobody writes.
            let behind = u64::from(is_torn && level == Level::Raid5);
            assert!(rig.bad_blocks(1) <= behind, "{level:?}");
            rig.check_without_others(&[]);
            rig.comes_back(true);
            assert!(rig.bad_blocks(1) <= behind);
            rig.check();
        }
    }
}

impl Rig {
    /// Writes to all but some grains.
    fn storm_but(&self, lost: &[u64]) -> u64 {
        let mut errors = 0;
        for i in 0..200 {
            let len = [512, 4096, 12288, 65536][i % 4];
            let at = self.world.random((LU_BYTES - len) / 512) * 512;
            let touches = |lost: &u64| at < lost + 4096 && *lost < at + len;
            if !lost.iter().any(touches) {
                errors += u64::from(self.write_model(at, i as u8, len as usize).is_err());
            }
        }
        errors
    }
}

/// Given a rebuild that lists what it cannot produce, when power is lost at any I/O of it, then what is read is right or an
/// error, and the rebuild ends at the next start.
#[test]
fn a_rebuild_that_lists_may_be_cut_anywhere() {
    for (level, n, consistency) in REDUNDANT {
        for seed in 0..10 {
            let mut rig = rig_of(910 + seed, level, n, 65536, consistency);
            rig.group.set_rebuild_rate(None, Some(64 << 20));
            assert_eq!(rig.storm(60, || ()), 0);
            rig.world.crash_in.set(Some(40 + seed * 21));
            rig.begin_rebuild_uncounted();
            rig.world.run_until({
                let (world, group) = (Rc::clone(&rig.world), Rc::clone(&rig.group));
                move || world.crashed() || group.status().sync.is_none()
            });
            let is_closed = !level.has_parity() || consistency == Consistency::Ppl;
            rig.comes_back(is_closed && seed % 2 == 0);
            assert!(rig.lost().len() <= 4);
            rig.wait_synced();
            assert_eq!(rig.bad_blocks(1), 3, "{level:?} {seed}");
            assert!((2..=4).contains(&rig.lost().len()), "{level:?} {seed}");
        }
    }
}

impl Rig {
    /// As `begin_rebuild`; the crash that is due comes in the rebuild.
    fn begin_rebuild_uncounted(&mut self) {
        let due = self.world.crash_in.take();
        self.begin_rebuild();
        self.world.crash_in.set(due);
    }
}

/// Given grains that can be neither read nor written anew, when they are read, then they come from redundancy and are listed, the
/// member stays, and no disk is asked for them again.
#[test]
fn what_cannot_be_rewritten_is_listed() {
    for (level, n) in [
        (Level::Raid1, 2),
        (Level::Raid5, 4),
        (Level::Raid6, 5),
        (Level::Raid10, 4),
    ] {
        let mut rig = rig(920, level, n, 65536, true);
        rig.storm(60, || ());
        let data = rig.group.status().members[0].data_offset / 512;
        let bad = [9, 200, 210, 1500].map(|sector| data + sector);
        rig.stores[0].faults.bad.borrow_mut().extend(bad);
        rig.stores[0].faults.worn.set(true);
        rig.scrub_all();
        rig.check();
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Optimal, "{}", status.reason);
        let listed = rig.bad_blocks(0);
        assert!((3..=4).contains(&listed), "{level:?}: {listed}");
        rig.comes_back(true);
        assert_eq!(rig.bad_blocks(0), listed);
        rig.check();
        rig.wait_synced();
        // Redundancy is less there, and it is said; without another member that is an error, never other bytes.
        let gone = usize::from(n) - 1;
        rig.stores[gone].faults.dead.set(true);
        let lost = rig.lost();
        let is_single = level != Level::Raid6;
        assert!(
            lost.len() <= if is_single { 8 } else { 0 },
            "{level:?} {lost:?}"
        );
    }
}

/// Given more than a list has room for, then the member is failed: it is no disk any more.
#[test]
fn a_member_that_is_all_bad_is_failed() {
    let rig = rig(22, Level::Raid5, 4, 65536, true);
    rig.storm(50, || ());
    rig.without_each(&[]);
    let group = Rc::clone(&rig.group);
    let order = ScrubOrder::Start {
        repair: true,
        from: 0,
        rate: None,
    };
    rig.world.spawn(async move {
        assert_eq!(group.scrub(order).await, Ok(()));
    });
    let group = Rc::clone(&rig.group);
    rig.world
        .run_until(move || group.status().members[0].state == MemberState::Faulty);
    rig.check();
}

/// Given a list on a disk, when one copy of it is damaged, then the other counts; when both are, the member is not believed.
#[test]
fn a_list_that_is_damaged_is_not_believed() {
    for (level, n, consistency) in REDUNDANT {
        let mut rig = rig_of(930, level, n, 65536, consistency);
        rig.begin_rebuild();
        rig.wait_synced();
        let lost = rig.lost();
        // Both copies are of this list: one of them is enough.
        assert_eq!(rig.write_model(lost[0], 9, 4096), Ok(()));
        rig.stop();
        let (store, at) = (Rc::clone(&rig.stores[1]), 8192);
        let mut copies = [vec![0; COPY_BYTES], vec![0; COPY_BYTES]];
        for (i, copy) in (0..).zip(&mut copies) {
            store.read(at + i * COPY_BYTES as u64, copy);
        }
        let number = |copy: &[u8]| u64::from_le_bytes(copy[48..56].try_into().unwrap());
        let older = usize::from(number(&copies[1]) < number(&copies[0]));
        assert!(number(&copies[1 - older]) == number(&copies[older]) + 1);
        let damaged = |i: usize| {
            let mut copy = copies[i].clone();
            copy[70] ^= 1;
            store.write(at + (i * COPY_BYTES) as u64, &copy);
        };
        damaged(older);
        rig.restart(&memory(), false).unwrap();
        assert_eq!(rig.lost(), lost[1..], "{level:?}");
        rig.stop();
        damaged(0);
        damaged(1);
        rig.restart(&memory(), false).unwrap();
        let status = rig.group.status();
        assert_ne!(status.members[1].state, MemberState::InSync, "{level:?}");
        assert!(rig.lost().len() <= 3);
    }
}

/// Given a block that is lost, when its neighbour of the row is written and another member dies then, then nothing is made up.
#[test]
fn parity_that_says_nothing_is_not_asked() {
    for consistency in [Consistency::None, Consistency::Bitmap, Consistency::Ppl] {
        let mut rig = rig_of(940, Level::Raid5, 4, 65536, consistency);
        rig.begin_rebuild();
        rig.wait_synced();
        let lost = rig.lost();
        assert_eq!(rig.write_model(lost[0], 3, 4096), Ok(()));
        // The rows of the stripe, but not the row's lost block.
        let start = lost[1] / 196_608 * 196_608;
        for at in (start..start + 196_608)
            .step_by(4096)
            .filter(|at| !lost[1..].contains(at))
        {
            assert_eq!(rig.write_model(at, (at >> 12) as u8, 4096), Ok(()), "{at}");
        }
        assert_eq!(rig.lost(), lost[1..]);
        rig.comes_back(true);
        rig.wait_synced();
        assert_eq!(rig.lost(), lost[1..]);
        rig.stores[3].faults.dead.set(true);
        let now = rig.lost();
        assert!(now.len() <= 6, "{now:?}");
    }
}

/// Given a member with a list that was away, when it comes back, then it is caught up, and its list counts.
#[test]
fn a_member_that_comes_back_has_its_list() {
    for (level, n, consistency) in REDUNDANT {
        let mut rig = rig_of(950, level, n, 65536, consistency);
        rig.begin_rebuild();
        rig.wait_synced();
        let lost = rig.lost();
        let store = Rc::clone(&rig.stores[1]);
        rig.stores[1].faults.dead.set(true);
        assert_eq!(rig.storm_but(&lost), 0);
        assert_eq!(rig.group.status().members[1].state, MemberState::Faulty);
        rig.stores[1].faults.dead.set(false);
        rig.replace(1, NEW, &store);
        rig.wait_synced();
        assert_eq!(rig.lost(), lost, "{level:?}");
        rig.comes_back(true);
        assert_eq!(rig.lost(), lost, "{level:?}");
    }
}

// ---- hostile ----

/// Given a disk that is copied, when its parity of a row is given up, then the copy does not say what that was.
#[test]
fn parity_given_up_while_its_disk_is_copied_is_given_up_on_the_copy() {
    for parity_slot in [2u16, 3] {
        let mut rig = rig_of(960, Level::Raid5, 4, 65536, Consistency::None);
        rig.begin_rebuild();
        rig.wait_synced();
        let lost = rig.lost();
        rig.group.set_rebuild_rate(Some(1 << 20), Some(1 << 20));
        let fresh = Store::new(DISK, 0x55);
        rig.replace(parity_slot, 41, &fresh);
        rig.stores.push(Rc::clone(&fresh));
        rig.disks.push(41);
        rig.wait_done(8 << 20);
        // Whole blocks, of which one is to be had nowhere: written without parity.
        for at in lost.iter().step_by(2) {
            assert_eq!(rig.write_model(*at, 9, 4096), Ok(()));
        }
        rig.group.set_rebuild_rate(None, Some(64 << 20));
        let group = Rc::clone(&rig.group);
        rig.world.run_until(move || {
            let status = group.status();
            status.sync.is_none() && status.replacement.is_none()
        });
        // Asserts that what is read is right.
        rig.lost();
    }
}

/// Given a block that its disk does not take anew, when its row is written, then redundancy does what the disk does not.
#[test]
fn write_beside_a_listed_block_is_done_from_redundancy() {
    for (level, n) in [(Level::Raid5, 4), (Level::Raid6, 5), (Level::Raid5, 8)] {
        let rig = rig_of(961, level, n, 65536, Consistency::None);
        rig.storm(60, || ());
        for slot in 0..usize::from(n) {
            let data = rig.group.status().members[slot].data_offset / 512;
            if slot == 0 {
                let bad = [9, 200, 210, 1500].map(|sector| data + sector);
                rig.stores[0].faults.bad.borrow_mut().extend(bad);
                rig.stores[0].faults.worn.set(true);
            }
        }
        let mut refused = Vec::new();
        for at in (0..LU_BYTES).step_by(4096) {
            if rig.write_model(at + 512, (at >> 12) as u8, 512).is_err() {
                refused.push(at);
            }
        }
        let status = rig.group.status();
        rig.check();
        assert!(
            refused.is_empty(),
            "{level:?} {n}: {refused:?} {:?}",
            status.state
        );
    }
}

impl Rig {
    /// Sends writes at once (where, and bytes), and returns where those are that were refused.
    fn write_at_once(&self, all: &[(u64, u64)]) -> Vec<u64> {
        let errors: Rc<RefCell<Vec<u64>>> = Rc::default();
        let done = Rc::new(Cell::new(0));
        for (tag, (at, len)) in all.iter().copied().enumerate() {
            self.world.pages.borrow_mut()[tag] = vec![5; len as usize];
            let group = Rc::clone(&self.group);
            let (errors, done) = (Rc::clone(&errors), Rc::clone(&done));
            let request = Self::request(tag as u16, HostVerb::Write { fua: false }, at, len);
            self.world.spawn(async move {
                if group.serve(0, request).await.is_err() {
                    errors.borrow_mut().push(at);
                }
                done.set(done.get() + 1);
            });
        }
        self.world.run_until(|| done.get() == all.len());
        errors.take()
    }
}

/// Given writes that one worker takes, when one of them is a part of a lost block, then that one alone is refused.
#[test]
fn a_part_of_a_lost_block_is_refused_alone() {
    for (level, n) in [(Level::Raid1, 2), (Level::Raid5, 4)] {
        let mut rig = rig_of(962, level, n, 65536, Consistency::None);
        rig.begin_rebuild();
        rig.wait_synced();
        let lost = rig.lost()[0];
        let stripe = if level == Level::Raid1 {
            65536
        } else {
            3 * 65536
        };
        let start = lost / stripe * stripe;
        let ats: Vec<u64> = (start..start + stripe)
            .step_by(4096)
            .filter(|at| *at / 4096 != lost / 4096 && !rig.lost().contains(at))
            .take(12)
            .collect();
        let mut all: Vec<(u64, u64)> = vec![(ats[0], 4096), (lost + 512, 512)];
        all.extend(ats[1..].iter().map(|at| (*at, 4096)));
        let mut errors = rig.write_at_once(&all);
        errors.retain(|at| *at != lost + 512);
        assert!(
            errors.is_empty(),
            "{level:?}: refused too: {errors:?}, lost {lost}"
        );
    }
}

/// Given a row with a loss between two that are written, then its parity stays, and what comes back is whole.
#[test]
fn parity_of_a_row_that_nobody_writes_is_not_given_up() {
    let mut rig = rig_of(963, Level::Raid5, 4, 65536, Consistency::None);
    assert_eq!(rig.storm(60, || ()), 0);
    rig.stores[1].faults.dead.set(true);
    assert_eq!(rig.storm(20, || ()), 0);
    let data = rig.group.status().members[0].data_offset / 512;
    // Rows 6 and 12 of the first stripes.
    let bad = (0..8).flat_map(|stripe| [6, 12].map(|row| data + stripe * 128 + row * 8));
    rig.stores[0].faults.bad.borrow_mut().extend(bad);
    let fresh = Store::new(DISK, 0x77);
    rig.replace(1, NEW, &fresh);
    rig.stores[1] = fresh;
    rig.disks[1] = NEW;
    rig.wait_synced();
    let lost = rig.lost();
    // From row 12 of a chunk to row 3 of the next one of the stripe.
    let mut wrote = 0;
    for at in &lost {
        let is_last = (at / 65536) % 3 == 2;
        if at % 65536 / 4096 == 12 && !is_last && rig.write_model(*at, 7, 8 * 4096).is_ok() {
            wrote += 1;
        }
    }
    assert!(wrote > 0);
    let before: Vec<u64> = rig.lost();
    // Control: rows 6 were never written.
    assert!(
        lost.iter()
            .filter(|at| **at % 65536 / 4096 == 6)
            .all(|at| before.contains(at))
    );
    rig.stores[0].faults.bad.borrow_mut().clear();
    let still: Vec<u64> = rig.lost();
    let sixes: Vec<u64> = still
        .iter()
        .copied()
        .filter(|at| at % 65536 / 4096 == 6)
        .collect();
    assert!(
        sixes.is_empty(),
        "wrote {wrote}; row 6 is lost for good: {sixes:?} {still:?}"
    );
}

/// Given a stripe with a listed block, when power is lost in a write of it, then the log makes all its other rows right.
#[test]
fn a_log_is_replayed_beside_a_listed_block() {
    replayed_after_a_cut(true)
}
#[test]
fn a_log_is_replayed_where_nothing_is_listed() {
    replayed_after_a_cut(false)
}
fn replayed_after_a_cut(lists: bool) {
    let mut wrong = Vec::new();
    for seed in 0..40u64 {
        let mut rig = rig_of(9700 + seed, Level::Raid5, 4, 65536, Consistency::Ppl);
        rig.begin_rebuild();
        if !lists {
            rig.stores[0].faults.bad.borrow_mut().clear();
        }
        rig.wait_synced();
        let lost = rig.lost();
        rig.stores[0].faults.bad.borrow_mut().clear();
        let start = lost.first().map_or(0, |at| at / 196_608 * 196_608);
        // Whole stripes: their data is all written, and the log says so.
        rig.world.crash_in.set(Some(1 + seed % 12));
        rig.world.pages.borrow_mut()[0] = vec![0x33; 196_608];
        let group = Rc::clone(&rig.group);
        let done = Rc::new(Cell::new(false));
        let d = Rc::clone(&done);
        rig.world.spawn(async move {
            d.set(
                group
                    .serve(
                        0,
                        Rig::request(0, HostVerb::Write { fua: false }, start, 196_608),
                    )
                    .await
                    .is_ok(),
            );
        });
        let world = Rc::clone(&rig.world);
        rig.world.run_until(|| world.crashed() || done.get());
        rig.world.crash_in.set(Some(0));
        rig.world.kill();
        rig.restart(&memory(), false).unwrap();
        rig.wait_synced();
        let old = rig.model.borrow().clone();
        let is_known = |at: u64, bytes: &[u8]| {
            // Each sector is old or new.
            bytes.chunks(512).zip((at..).step_by(512)).all(|(now, at)| {
                let was = &old[at as usize..at as usize + 512];
                now == was || now.iter().all(|b| *b == 0x33)
            })
        };
        let mut now: std::collections::BTreeMap<u64, Vec<u8>> = Default::default();
        for at in (start..start + 196_608).step_by(4096) {
            if lost.contains(&at) {
                continue;
            }
            if let Ok(bytes) = rig.read(at, 4096) {
                if !is_known(at, &bytes) {
                    wrong.push((seed, at, "whole", 9));
                }
                now.insert(at, bytes);
            }
        }
        // Without one more: what redundancy says of it.
        let slot = 0;
        let data = rig.group.status().members[slot].data_offset / 512;
        *rig.stores[slot].faults.bad.borrow_mut() = (data..(DISK / 512) as u64).collect();
        rig.stores[slot].faults.worn.set(true);
        for (at, was) in &now {
            if let Ok(bytes) = rig.read(*at, 4096)
                && bytes != *was
            {
                wrong.push((seed, *at, "without", slot));
            }
        }
        for at in &lost {
            if let Ok(bytes) = rig.read(*at, 4096)
                && !is_known(*at, &bytes)
            {
                wrong.push((seed, *at, "lost", 9));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "{} wrong: {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(12)]
    );
}

/// Given rows with a loss whose parity is being rebuilt, when their other blocks are written, then they are.
#[test]
fn rows_with_a_loss_are_written_in_the_window_of_a_rebuild() {
    let mut refused = Vec::new();
    for seed in 0..6 {
        let mut rig = rig_of(9800 + seed, Level::Raid5, 4, 65536, Consistency::None);
        assert_eq!(rig.storm(60, || ()), 0);
        rig.stores[1].faults.dead.set(true);
        assert_eq!(rig.storm(20, || ()), 0);
        let data = rig.group.status().members[0].data_offset / 512;
        let bad = (0..21).flat_map(|stripe| [6, 12].map(|row| data + stripe * 128 + row * 8));
        rig.stores[0].faults.bad.borrow_mut().extend(bad);
        // What cannot be read now: not to be written in part; all else is.
        let before = rig.lost();
        let fresh = Store::new(DISK, 0x77);
        rig.replace(1, NEW, &fresh);
        rig.stores[1] = fresh;
        rig.disks[1] = NEW;
        for i in 0..400u64 {
            let at = (i * 37 + seed * 11) % (LU_BYTES / 4096) * 4096;
            let row = at % 65536 / 4096;
            if before.contains(&at) || !(row == 6 || row == 12) || at / 196_608 % 4 != 2 {
                continue;
            }
            if rig.write_model(at, i as u8, 4096).is_err() {
                refused.push((seed, at, rig.group.status().sync.map(|s| s.done)));
            }
        }
        rig.wait_synced();
        rig.lost();
    }
    assert!(refused.is_empty(), "{refused:?}");
}

/// The same on mirrors.
#[test]
fn a_part_of_a_lost_block_is_refused_alone_on_mirrors() {
    let mut rig = rig_of(962, Level::Raid1, 2, 65536, Consistency::None);
    rig.begin_rebuild();
    rig.wait_synced();
    let lost = rig.lost()[0];
    let start = lost / 65536 * 65536;
    let ats: Vec<u64> = (start..start + 65536)
        .step_by(4096)
        .filter(|at| !rig.lost().contains(at))
        .collect();
    // A first one holds the stripe; what comes meanwhile is taken together.
    rig.stores[0].faults.delay.set(1_000_000);
    rig.stores[1].faults.delay.set(1_000_000);
    let mut all: Vec<(u64, u64)> = vec![(ats[0], 4096), (lost + 512, 512)];
    all.extend(ats[1..].iter().map(|at| (*at, 4096)));
    let mut errors = rig.write_at_once(&all);
    errors.retain(|at| *at != lost + 512);
    assert!(errors.is_empty(), "refused too: {errors:?}, lost {lost}");
}

/// Given a write of a part of a lost block, then it is refused, and what comes back later is whole.
#[test]
fn a_refused_write_costs_no_parity() {
    let mut rig = rig_of(964, Level::Raid5, 4, 65536, Consistency::None);
    rig.begin_rebuild();
    rig.wait_synced();
    let lost = rig.lost();
    for at in &lost {
        assert!(rig.write_model(at + 512, 7, 512).is_err(), "{at}");
    }
    rig.stores[0].faults.bad.borrow_mut().clear();
    let still = rig.lost();
    assert!(
        still.is_empty(),
        "a refused write made lost for good: {still:?} of {lost:?}"
    );
}

/// Given a block of parity and one of data that their disks do not take anew, then every write of their rows is done.
#[test]
fn parity_that_its_disk_does_not_take_costs_no_write() {
    for (level, n) in [
        (Level::Raid5, 3),
        (Level::Raid5, 4),
        (Level::Raid6, 4),
        (Level::Raid6, 6),
    ] {
        let rig = rig_of(965, level, n, 65536, Consistency::None);
        rig.storm(60, || ());
        let data = rig.group.status().members[0].data_offset / 512;
        let bad = (0..30).map(|stripe| data + stripe * 128 + 9);
        rig.stores[0].faults.bad.borrow_mut().extend(bad);
        rig.stores[0].faults.worn.set(true);
        let mut refused = Vec::new();
        for at in (0..LU_BYTES).step_by(4096) {
            if rig.write_model(at, (at >> 12) as u8, 4096).is_err() {
                refused.push(at);
            }
        }

        rig.check();
        assert!(refused.is_empty());
    }
}

/// The same, as the disk that is copied fails after parity was given up.
#[test]
fn parity_given_up_is_given_up_on_the_copy_that_takes_over() {
    for parity_slot in [2u16, 3] {
        let mut rig = rig_of(966, Level::Raid5, 4, 65536, Consistency::None);
        rig.begin_rebuild();
        rig.wait_synced();
        let lost = rig.lost();
        rig.group.set_rebuild_rate(Some(1 << 20), Some(1 << 20));
        let fresh = Store::new(DISK, 0x55);
        rig.replace(parity_slot, 41, &fresh);
        rig.wait_done(8 << 20);
        for at in lost.iter().step_by(2) {
            assert_eq!(rig.write_model(*at, 9, 4096), Ok(()));
        }
        rig.stores[usize::from(parity_slot)].faults.dead.set(true);
        rig.group.set_rebuild_rate(None, Some(64 << 20));
        assert_eq!(rig.storm_but(&lost), 0);
        rig.wait_synced();
        rig.lost();
    }
}
