//! What raid6, raid10 and linear have of their own: pairs of members lost, copies that meet, members in a row.

use super::*;

/// Multiplication in the field of raid6 as its definition has it.
fn times_2(a: u8) -> u8 {
    (a << 1) ^ if a & 0x80 != 0 { 0x1d } else { 0 }
}

impl Rig {
    fn wait_in_sync(&self, slot: u16) {
        let group = Rc::clone(&self.group);
        self.world.run_until(move || {
            group.status().members[usize::from(slot)].state == MemberState::InSync
        });
    }

    /// Puts a fresh disk into a slot, writes while it is filled, and waits for the end of that.
    fn rebuild(&mut self, slot: u8, disk: u8) {
        let fresh = Store::new(DISK, 0x77 ^ disk);
        self.replace(slot.into(), disk, &fresh);
        self.stores[usize::from(slot)].forget();
        self.stores[usize::from(slot)] = fresh;
        self.disks[usize::from(slot)] = disk;
        assert_eq!(self.storm(60, || ()), 0);
        self.wait_in_sync(slot.into());
        self.check();
    }

    /// Checks P and Q of every row of a raid6, read past the engine.
    fn parities_are_right(&self, chunk: u64) {
        let status = self.group.status();
        let n = self.stores.len() as u64;
        for at in (0..status.member_bytes).step_by(4096) {
            let p = n - 1 - at / chunk % n;
            let rows: Vec<[u8; 4096]> = (0..n)
                .map(|i| {
                    let slot = ((p + i) % n) as usize;
                    let mut row = [0; 4096];
                    self.stores[slot].read(status.members[slot].data_offset + at, &mut row);
                    row
                })
                .collect();
            for byte in 0..4096 {
                let (mut sum, mut syndrome) = (0, 0);
                for row in rows[2..].iter().rev() {
                    sum ^= row[byte];
                    syndrome = times_2(syndrome) ^ row[byte];
                }
                let found = (rows[0][byte], rows[1][byte]);
                assert_eq!(found, (sum, syndrome), "byte {byte} of row {at}");
            }
        }
    }
}

#[test]
fn raid6_every_pair_lost_under_writes_then_rebuilt_one_after_the_other_and_every_pair_taken_away() {
    for (n, chunk) in [(4, 65536), (5, 4096)] {
        for (a, b) in (0..n).flat_map(|a| (0..n).map(move |b| (a, b))) {
            if a == b {
                continue;
            }
            let seed = 700 + u64::from(a * n + b) + round();
            let mut rig = rig(seed, Level::Raid6, n, chunk, (a + b) % 2 == 0);
            for lost in [a, b] {
                let store = Rc::clone(&rig.stores[usize::from(lost)]);
                assert_eq!(rig.storm(60, || store.faults.dead.set(true)), 0);
                rig.check();
            }
            let status = rig.group.status();
            assert_eq!(
                (status.state, status.can_lose),
                (GroupState::Degraded, 0),
                "{}",
                status.reason
            );
            rig.rebuild(a, 40);
            assert_eq!(rig.group.status().state, GroupState::Degraded);
            rig.rebuild(b, 41);
            rig.wait_synced();
            rig.parities_are_right(chunk);
            // The one of the pair and another, or both others.
            for lost in [a, (a.max(b) + 1) % n] {
                rig.stores[usize::from(lost)].faults.dead.set(true);
                rig.check();
                assert_eq!(rig.storm(20, || ()), 0);
                rig.check();
            }
        }
    }
}

#[test]
fn raid6_member_lost_in_the_first_sync_then_rebuilt_has_both_parities_right_everywhere() {
    let mut rig = rig(750, Level::Raid6, 5, 16384, false);
    rig.storm(60, || ());
    rig.stores[2].faults.dead.set(true);
    rig.storm(60, || ());
    rig.rebuild(2, 40);
    rig.wait_synced();
    rig.parities_are_right(16384);
    rig.check();
}

#[test]
fn raid6_sectors_unreadable_on_two_members_at_once_are_rewritten() {
    let rig = rig(751, Level::Raid6, 5, 65536, true);
    rig.storm(100, || ());
    for (store, skip) in rig.stores[1..3].iter().zip([0, 1]) {
        let bad = (DISK as u64 / 512).saturating_sub(16);
        let data = (16..bad).skip(skip).step_by(2);
        store.faults.bad.borrow_mut().extend(data);
    }
    rig.check();
    rig.check();
    let status = rig.group.status();
    assert_eq!(status.state, GroupState::Optimal, "{}", status.reason);
    assert!(status.members[1].read_errors > 0 && status.members[2].read_errors > 0);
    // Both at the same sectors, under writes.
    rig.stores[2].faults.bad.borrow_mut().clear();
    for store in &rig.stores[..2] {
        store.faults.bad.borrow_mut().extend(10_000..60_000);
    }
    assert_eq!(rig.storm(100, || ()), 0);
    rig.check();
    assert_eq!(rig.group.status().state, GroupState::Optimal);
}

/// A chunk that is missing is computed, while sectors of another cannot be read.
#[test]
fn raid6_degraded_reads_and_rebuilds_around_unreadable_sectors() {
    let mut rig = rig(752, Level::Raid6, 5, 65536, true);
    rig.storm(100, || ());
    rig.stores[0].faults.dead.set(true);
    rig.storm(40, || ());
    for (store, skip) in rig.stores[1..3].iter().zip([0, 8]) {
        let bad = (16_384..DISK as u64 / 512 - 4096).skip(skip).step_by(16);
        store.faults.bad.borrow_mut().extend(bad);
    }
    rig.check();
    rig.rebuild(0, 40);
    rig.stores[3].faults.dead.set(true);
    rig.check();
}

#[test]
fn loss_beyond_redundancy_is_eio_and_never_wrong_bytes() {
    for (seed, level, n, lost) in [
        (753, Level::Raid6, 5, vec![0, 2, 3]),
        (754, Level::Raid6, 4, vec![1, 2, 3]),
        (755, Level::Raid10, 4, vec![2, 3]),
        (756, Level::Raid10, 5, vec![0, 1]),
        (757, Level::Raid10, 3, vec![0, 2]),
        (758, Level::Linear, 2, vec![0]),
    ] {
        let rig = rig(seed, level, n, 65536, true);
        rig.storm(60, || ());
        for lost in lost {
            rig.stores[lost].faults.dead.set(true);
            for at in (0..LU_BYTES).step_by(65536) {
                let _ = rig.read(at, 65536);
            }
        }
        let mut errors = 0;
        for at in (0..LU_BYTES).step_by(65536) {
            match rig.read(at, 65536) {
                Ok(bytes) => {
                    assert_eq!(bytes, rig.model.borrow()[at as usize..at as usize + 65536]);
                }
                Err(_) => errors += 1,
            }
        }
        assert!(errors > 0, "{level:?}");
    }
}

#[test]
fn raid10_survives_every_loss_that_leaves_a_copy_of_every_chunk() {
    for (seed, n, lost) in [
        (760, 4, vec![0, 2]),
        (761, 4, vec![1, 2]),
        (762, 5, vec![0, 2]),
        (763, 5, vec![4, 1]),
        (764, 6, vec![0, 3, 5]),
        (765, 7, vec![0, 2, 4]),
    ] {
        let mut rig = rig(seed + round(), Level::Raid10, n, 16384, seed % 2 == 0);
        for lost in &lost {
            let store = Rc::clone(&rig.stores[usize::from(*lost)]);
            assert_eq!(rig.storm(60, || store.faults.dead.set(true)), 0, "{lost}");
            rig.check();
        }
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Degraded, "{}", status.reason);
        assert_eq!(status.can_lose, 0);
        let memory = Rc::clone(&rig.memory);
        rig.world.kill();
        rig.restart(&memory, false).unwrap();
        rig.check();
        for (lost, disk) in lost.iter().zip(40..) {
            rig.rebuild(*lost, disk);
        }
        rig.wait_synced();
        // What was rebuilt is all there is now of some chunks.
        rig.stores[usize::from(lost[0] + 1) % usize::from(n)]
            .faults
            .dead
            .set(true);
        rig.check();
    }
}

#[test]
fn killed_process_loses_nothing_of_a_raid6_without_two_members() {
    for (seed, n, chunk, lost) in [
        (770, 4, 4096, vec![0_usize, 1]),
        (771, 5, 65536, vec![2, 4]),
        (772, 6, 16384, vec![0, 5]),
        (773, 5, 16384, vec![3]),
        (774, 6, 65536, vec![]),
    ] {
        let mut rig = rig(seed + round(), Level::Raid6, n, chunk, true);
        rig.storm(30, || ());
        for lost in lost {
            rig.stores[lost].faults.dead.set(true);
            rig.storm(20, || ());
        }
        rig.storm_with_kills(12);
    }
}

#[test]
fn linear_goes_on_on_the_next_member_and_uses_all_of_each() {
    let world = World::new(780);
    let stores: Vec<_> = [80, 96, 72]
        .map(|mib| Store::new(mib << 20, 0))
        .into_iter()
        .collect();
    let members = || -> Vec<_> {
        let stores = stores.iter().zip(0..);
        stores.map(|(store, i)| given(&world, i, store)).collect()
    };
    let memory = memory();
    let made = parts(&world, members(), &memory);
    let group = world
        .block_on(RaidGroup::create(made, spec(Level::Linear, 0, false)))
        .unwrap();
    run(&world, &group);
    let g = Rc::clone(&group);
    let made = world.block_on(async move { g.lu_create(LU, "vol", LuSize::Max, 32).await });
    assert_eq!(made, Ok(0));
    let capacity = group.status().capacity;
    // 248 MiB of disks, and no more than the reserves of three less.
    assert!(capacity > (248 - 24) << 20, "{capacity}");
    let io = |group: &Rc<RaidGroup<Sim>>, verb, at, bytes: Vec<u8>| {
        let (group, len) = (Rc::clone(group), bytes.len() as u64);
        world.pages.borrow_mut()[1] = bytes;
        let request = Rig::request(1, verb, at, len);
        let done = world.block_on(async move { group.serve(0, request).await });
        assert_eq!(done, Ok(()), "{verb:?} at {at}");
        world.pages.borrow()[1].clone()
    };
    let pattern = |at: u64| -> Vec<u8> {
        let words = (at / 8..at / 8 + (MAX_IO / 8)).map(|word| word.wrapping_mul(0x9E37_79B9));
        words.flat_map(u64::to_le_bytes).collect()
    };
    let starts: Vec<u64> = (0..capacity / MAX_IO).map(|i| i * MAX_IO).collect();
    for at in &starts {
        io(&group, HostVerb::Write { fua: false }, *at, pattern(*at));
    }
    let check = |group: &Rc<RaidGroup<Sim>>| {
        // Between MiB, so that each request may straddle two members.
        for at in &starts[..starts.len() - 1] {
            let at = at + MAX_IO / 2;
            let read = io(group, HostVerb::Read, at, vec![0; MAX_IO as usize]);
            assert_eq!(read, pattern(at), "{at}");
        }
    };
    check(&group);
    let g = Rc::clone(&group);
    assert_eq!(world.block_on(async move { g.stop(false).await }), Ok(()));
    let start = StartSpec {
        group: GROUP,
        force: false,
        witness: None,
        without: Vec::new(),
        keep: None,
        undelete: false,
    };
    let again = world
        .block_on(RaidGroup::start(parts(&world, members(), &memory), start))
        .unwrap();
    run(&world, &again);
    assert_eq!(again.status().capacity, capacity);
    check(&again);
}
