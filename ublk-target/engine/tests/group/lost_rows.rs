//! Rows with a block that nobody has: what is written to them, and what that costs.

use super::*;

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
