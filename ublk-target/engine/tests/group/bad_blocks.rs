//! What neither a disk nor redundancy gives: it is on a list, an error to whoever reads it, and nothing else is.

use super::*;
use lunar_api::target::ScrubOrder;
use lunar_engine::bad_blocks::COPY_BYTES;

mod lost_rows;

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
