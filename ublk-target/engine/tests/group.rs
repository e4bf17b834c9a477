//! The real engine on disks in memory: content against a plain byte model, healthy, degraded, rebuilt.
#![allow(clippy::cast_possible_truncation, missing_debug_implementations)]

#[path = "group/bad_blocks.rs"]
mod bad_blocks;
#[path = "group/erases.rs"]
mod erases;
#[path = "group/growing.rs"]
mod growing;
#[path = "group/health.rs"]
mod health;
#[path = "group/levels.rs"]
mod levels;
#[path = "group/logs.rs"]
mod logs;
#[path = "group/maps.rs"]
mod maps;
#[path = "group/power.rs"]
mod power;
#[path = "group/replacing.rs"]
mod replacing;
#[path = "group/rig.rs"]
mod rig;
#[path = "group/scrubs.rs"]
mod scrubs;
#[path = "group/troubles.rs"]
mod troubles;
#[path = "group/views.rs"]
mod views;
mod world;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use lunar_api::LuUuid;
use lunar_api::target::{Consistency, GroupState, Level, LuSize, MemberState};
use lunar_engine::limits::{CONFIG_PIECE, MAX_IO};
use lunar_engine::raid_group::{CreateSpec, Fill, RaidGroup, StartSpec};
use lunar_engine::superblock::{At, decode};
use lunar_engine::traits::{Clock, HostRequest, HostVerb, RequestId, SECOND};

use rig::*;
use world::{GROUP, Sim, SimClock, Store, World, given, memory, parts, run, uuid};

#[test]
fn write_and_read_equal_the_model() {
    for (seed, level, n, chunk) in [
        (1, Level::Raid0, 1, 65536),
        (2, Level::Raid0, 3, 4096),
        (3, Level::Raid0, 5, 1 << 20),
        (4, Level::Raid1, 2, 65536),
        (5, Level::Raid1, 3, 65536),
        (6, Level::Raid5, 3, 4096),
        (7, Level::Raid5, 4, 65536),
        (8, Level::Raid5, 5, 1 << 20),
        (9, Level::Raid5, 8, 16384),
        (15, Level::Raid10, 2, 65536),
        (16, Level::Raid10, 3, 4096),
        (17, Level::Raid10, 4, 65536),
        (18, Level::Raid10, 5, 1 << 20),
        (25, Level::Raid6, 4, 4096),
        (26, Level::Raid6, 5, 65536),
        (27, Level::Raid6, 6, 1 << 20),
        (28, Level::Raid6, 8, 16384),
        (19, Level::Linear, 1, 1 << 20),
        (20, Level::Linear, 3, 1 << 20),
    ] {
        let seed = seed + round();
        for clean in [true, false] {
            let rig = rig(seed, level, n, chunk, clean);
            assert_eq!(rig.storm(300, || ()), 0, "{level:?} {n}");
            rig.check();
        }
    }
}

/// Adjacent writes are merged to a longest request wherever the first of them began.
#[test]
fn longest_write_may_begin_within_a_grain() {
    for (level, n, chunk) in [
        (Level::Raid1, 2, 65536),
        (Level::Raid5, 4, 65536),
        (Level::Raid6, 5, 65536),
        (Level::Raid10, 3, 65536),
    ] {
        let rig = rig(21, level, n, chunk, true);
        for at in [0, 512, 3584, 65024] {
            let bytes: Vec<u8> = (0..MAX_IO).map(|_| rig.world.random(256) as u8).collect();
            rig.model.borrow_mut()[at..at + bytes.len()].copy_from_slice(&bytes);
            rig.world.pages.borrow_mut()[0] = bytes;
            let verb = HostVerb::Write { fua: false };
            let (group, request) = (
                Rc::clone(&rig.group),
                Rig::request(0, verb, at as u64, MAX_IO),
            );
            let result = rig
                .world
                .block_on(async move { group.serve(0, request).await });
            assert_eq!(result, Ok(()));
            rig.check();
        }
    }
}

#[test]
fn member_lost_under_writes_then_replaced_and_each_other_taken_away() {
    for (seed, level, n, chunk) in [
        (11, Level::Raid1, 2, 65536),
        (12, Level::Raid5, 3, 4096),
        (13, Level::Raid5, 4, 65536),
        (14, Level::Raid5, 5, 1 << 20),
        (15, Level::Raid10, 3, 65536),
        (16, Level::Raid10, 4, 4096),
        (17, Level::Raid10, 5, 65536),
    ] {
        let seed = seed + round();
        for lost in 0..n.min(3) {
            for other in 0..n {
                if other == lost {
                    continue;
                }
                let mut rig = rig(
                    seed * 100 + u64::from(lost),
                    level,
                    n,
                    chunk,
                    other % 2 == 0,
                );
                let store = Rc::clone(&rig.stores[usize::from(lost)]);
                assert_eq!(rig.storm(120, || store.faults.dead.set(true)), 0);
                rig.check();
                assert_eq!(rig.group.status().state, GroupState::Degraded);
                let fresh = Store::new(DISK, 0x77);
                let new = given(&rig.world, 40, &fresh);
                let group = Rc::clone(&rig.group);
                let slot = u16::from(lost);
                let replaced = rig
                    .world
                    .block_on(async move { group.member_replace(slot, new, Fill::Missed).await });
                assert_eq!(replaced, Ok(()));
                assert_eq!(rig.storm(120, || ()), 0);
                rig.wait_synced();
                rig.check();
                rig.stores[usize::from(lost)] = fresh;
                rig.stores[usize::from(other)].faults.dead.set(true);
                rig.check();
                assert_eq!(rig.storm(40, || ()), 0);
                rig.check();
            }
        }
    }
}

#[test]
fn unreadable_sector_is_rewritten_from_redundancy() {
    for (level, n) in [
        (Level::Raid1, 2),
        (Level::Raid5, 4),
        (Level::Raid6, 4),
        (Level::Raid10, 3),
    ] {
        let rig = rig(21, level, n, 65536, true);
        rig.storm(100, || ());
        for store in &rig.stores[..1] {
            let data: Vec<u64> = (0..DISK as u64 / 512).skip(16).step_by(3).collect();
            store.faults.bad.borrow_mut().extend(data);
        }
        rig.check();
        rig.check();
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Optimal, "{}", status.reason);
        assert!(status.members[0].read_errors > 0);
        assert_eq!(rig.storm(100, || ()), 0);
        rig.check();
    }
}

#[test]
fn bad_block_is_rewritten_whole_whatever_part_of_it_is_read() {
    for (level, n) in [
        (Level::Raid1, 2),
        (Level::Raid5, 4),
        (Level::Raid6, 4),
        (Level::Raid10, 3),
    ] {
        let rig = rig(24, level, n, 65536, true);
        assert_eq!(rig.storm(100, || ()), 0);
        let first = rig.group.status().members[0].data_offset / 512;
        let store = &rig.stores[0];
        store.faults.coarse.set(true);
        // Whole blocks, and parts of others: what can be read of those is what counts.
        let blocks = (0..400).map(|i| first + i * 24);
        let bad = blocks.flat_map(|block| block..block + [8, 3][block as usize / 24 % 2]);
        store.faults.bad.borrow_mut().extend(bad);
        let model = rig.model.borrow().clone();
        for at in (0..LU_BYTES).step_by(512) {
            let (from, len) = (at as usize, 512 * (1 + at / 512 % 3));
            let len = len.min(LU_BYTES - at);
            assert_eq!(
                rig.read(at, len).as_deref(),
                Ok(&model[from..from + len as usize])
            );
        }
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Optimal, "{}", status.reason);
        assert!(status.members[0].read_errors > 0);
        assert_eq!(status.members[0].write_errors, 0);
        rig.check();
    }
}

#[test]
fn second_loss_is_eio_and_never_wrong_bytes() {
    let rig = rig(23, Level::Raid5, 4, 65536, true);
    rig.storm(60, || ());
    rig.stores[0].faults.dead.set(true);
    rig.check();
    rig.storm(20, || ());
    rig.stores[2].faults.dead.set(true);
    let mut errors = 0;
    for at in (0..LU_BYTES).step_by(65536) {
        match rig.read(at, 65536) {
            Ok(bytes) => assert_eq!(bytes, rig.model.borrow()[at as usize..at as usize + 65536]),
            Err(_) => errors += 1,
        }
    }
    assert!(errors > 0);
}

#[test]
fn parity_is_right_on_every_stripe_after_writes_and_sync() {
    let rig = rig(24, Level::Raid5, 5, 16384, false);
    rig.storm(200, || ());
    rig.wait_synced();
    let data = DISK as u64 - (8 << 20);
    let start = 16 << 20;
    for at in (start..data).step_by(512) {
        let mut sum = [0u8; 512];
        for store in &rig.stores {
            let mut bytes = [0u8; 512];
            store.read(at, &mut bytes);
            for (a, b) in sum.iter_mut().zip(&bytes) {
                *a ^= b;
            }
        }
        assert_eq!(sum, [0; 512], "sector at {at}");
    }
}

#[test]
fn killed_process_loses_nothing_healthy_or_degraded() {
    for (seed, level, n, chunk) in [
        (31, Level::Raid1, 2, 65536),
        (32, Level::Raid1, 3, 65536),
        (33, Level::Raid5, 3, 4096),
        (34, Level::Raid5, 4, 65536),
        (35, Level::Raid5, 6, 16384),
        (36, Level::Raid10, 2, 4096),
        (37, Level::Raid10, 5, 16384),
    ] {
        let seed = seed + round();
        for lost in [None, Some(0), Some(n - 1)] {
            let mut rig = rig(seed, level, n, chunk, true);
            rig.storm(30, || ());
            if let Some(lost) = lost {
                rig.stores[usize::from(lost)].faults.dead.set(true);
                rig.storm(20, || ());
            }
            rig.storm_with_kills(12);
        }
    }
}

#[test]
fn clean_stop_starts_without_resync_unclean_with_and_degraded_not_at_all() {
    let mut rig = rig_of(41, Level::Raid5, 4, 65536, Consistency::None);
    rig.storm(30, || ());
    let group = Rc::clone(&rig.group);
    assert_eq!(
        rig.world.block_on(async move { group.stop(false).await }),
        Ok(())
    );
    let lost_memory = memory();
    rig.restart(&lost_memory, false).unwrap();
    assert_eq!(rig.group.status().sync, None);
    rig.check();
    rig.storm(30, || ());
    rig.world.kill();
    let lost_memory = memory();
    rig.restart(&lost_memory, false).unwrap();
    rig.wait_synced();
    rig.check();
    rig.storm(30, || ());
    rig.stores[1].faults.dead.set(true);
    rig.storm(30, || ());
    rig.world.kill();
    let refused = rig.restart(&memory(), false).unwrap_err();
    assert!(refused.contains("not stopped cleanly"), "{refused}");
    rig.restart(&memory(), true).unwrap();
    rig.check();
}

#[test]
fn replay_comes_before_anything_is_read_into_the_memory_that_it_replays() {
    let mut rig = rig(51, Level::Raid5, 3, 65536, true);
    let group = Rc::clone(&rig.group);
    rig.world.block_on(async move {
        // A configuration longer than the superblocks' place, which is the first of the work memory.
        for i in 0..100u8 {
            let name = format!("v{i:0>60}");
            let lu = LuUuid::from_bytes([i + 10; 16]);
            let made = group.lu_create(lu, &name, LuSize::Bytes(1 << 20), 32).await;
            assert!(made.is_ok(), "{i} {made:?}");
        }
    });
    rig.storm_with_kills(6);
}

/// A disk that hangs has all of the memory be used; what a start reads must not come to where the dead process's
/// writes still are.
#[test]
fn start_reads_nothing_into_what_it_replays_whatever_memory_that_is() {
    for seed in 500..520 {
        let mut rig = rig(seed, Level::Raid5, 4, 65536, true);
        rig.stores[1].faults.hang.set(true);
        rig.storm(20, || ());
        rig.sleep(60);
        assert_eq!(rig.group.status().members[1].state, MemberState::Faulty);
        rig.stores[1].faults.dead.set(true);
        rig.storm_with_kills(1);
    }
}

#[test]
fn disk_that_replaces_a_rebuilding_one_is_filled_from_the_start() {
    for (level, n) in [(Level::Raid1, 2), (Level::Raid5, 3)] {
        let rig = rig(52, level, n, 65536, true);
        rig.storm(60, || ());
        rig.stores[1].faults.dead.set(true);
        rig.storm(20, || ());
        rig.group.set_rebuild_rate(None, Some(1 << 20));
        rig.replace(1, 40, &Store::new(DISK, 0x77));
        rig.wait_done(8 << 20);
        let group = Rc::clone(&rig.group);
        let failed = rig
            .world
            .block_on(async move { group.member_fail(uuid(40), "by hand").await });
        assert_eq!(failed, Ok(()));
        rig.replace(1, 41, &Store::new(DISK, 0x78));
        rig.group.set_rebuild_rate(None, Some(1 << 40));
        rig.wait_synced();
        rig.stores[0].faults.dead.set(true);
        rig.check();
    }
}

#[test]
fn start_makes_durable_everywhere_what_only_one_member_says() {
    for crash in 1..10 {
        for dead in 0..2 {
            let mut rig = rig(53 + crash, Level::Raid1, 3, 65536, true);
            rig.storm(20, || ());
            rig.world.crash_in.set(Some(crash));
            let group = Rc::clone(&rig.group);
            let _ = rig
                .world
                .try_block_on(async move { group.member_fail(uuid(2), "by hand").await });
            rig.world.kill();
            let memory = Rc::clone(&rig.memory);
            rig.restart(&memory, false).unwrap();
            assert_eq!(rig.storm(40, || ()), 0);
            rig.world.kill();
            rig.stores[dead].faults.dead.set(true);
            rig.restart(&memory, false).unwrap();
            for _ in 0..3 {
                rig.check();
            }
        }
    }
}

#[test]
fn failed_flush_in_the_background_does_not_hold_writes() {
    for rebuild in [true, false] {
        let rig = rig(54, Level::Raid5, 4, 65536, rebuild);
        rig.group.set_rebuild_rate(None, Some(1 << 20));
        let mut store = Rc::clone(&rig.stores[2]);
        if rebuild {
            store.faults.dead.set(true);
            rig.storm(30, || ());
            store = Store::new(DISK, 0x77);
            rig.replace(2, 40, &store);
        }
        rig.wait_done(2 << 20);
        store.faults.flush_errors.set(true);
        rig.sleep(15);
        assert_eq!(rig.storm(30, || ()), 0);
        rig.check();
        assert_eq!(rig.group.status().members[2].state, MemberState::Faulty);
    }
}

#[test]
fn member_that_hangs_is_failed_whoever_waits_for_it() {
    // The clean mark of an idle group.
    let rig = rig(55, Level::Raid5, 4, 65536, true);
    rig.storm(30, || ());
    rig.stores[1].faults.hang.set(true);
    rig.sleep(120);
    assert_eq!(rig.group.status().members[1].state, MemberState::Faulty);
    assert_eq!(rig.storm(30, || ()), 0);
    rig.check();
}

#[test]
fn second_member_that_hangs_is_failed_while_the_first_is_being_failed() {
    let rig = rig(56, Level::Raid1, 3, 65536, true);
    let (world, first, second) = (
        Rc::clone(&rig.world),
        Rc::clone(&rig.stores[1]),
        Rc::clone(&rig.stores[2]),
    );
    let errors = rig.storm(60, || {
        first.faults.hang.set(true);
        let (clock, second) = (SimClock(Rc::clone(&world)), Rc::clone(&second));
        world.spawn(async move {
            clock.sleep(15 * SECOND).await;
            second.faults.hang.set(true);
        });
    });
    assert_eq!(errors, 0);
    rig.check();
}

#[test]
fn replay_after_redundancy_was_exhausted_writes_what_was_meant() {
    for seed in 57..67 {
        let mut rig = rig(seed, Level::Raid5, 4, 65536, true);
        rig.storm(60, || ());
        rig.stores[0].faults.dead.set(true);
        rig.storm(20, || ());
        let store = Rc::clone(&rig.stores[1]);
        assert!(rig.storm(40, || store.faults.write_errors.set(true)) > 0);
        // Reads go on, and use the memory.
        for at in (0..LU_BYTES).step_by(512 << 10) {
            let _ = rig.read(at, 512 << 10);
        }
        rig.world.kill();
        store.faults.write_errors.set(false);
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        for (at, len) in rig.refused.borrow().iter() {
            rig.known.borrow_mut()[*at as usize..(at + len) as usize].fill(false);
        }
        rig.check();
    }
}

#[test]
fn rebuilding_disk_that_dies_costs_no_write() {
    let rig = rig(68, Level::Raid5, 4, 65536, true);
    rig.storm(60, || ());
    rig.stores[1].faults.dead.set(true);
    rig.storm(20, || ());
    rig.group.set_rebuild_rate(None, Some(1 << 20));
    let fresh = Store::new(DISK, 0x77);
    rig.replace(1, 40, &fresh);
    rig.wait_done(8 << 20);
    fresh.faults.worn.set(true);
    *fresh.faults.bad.borrow_mut() = (0..(DISK / 512) as u64).collect();
    assert_eq!(rig.storm(60, || ()), 0);
    rig.check();
}

#[test]
fn process_that_dies_while_it_starts_after_a_power_loss_leaves_the_resync_to_do() {
    // At the first write of its superblocks; whether one of those happened is drawn.
    // With a log nothing is left to be resynced.
    for (seed, crash) in (69..85).map(|seed| (seed, 8)) {
        let policy = [Consistency::None, Consistency::Bitmap][seed as usize % 2];
        let mut rig = rig_of(seed, Level::Raid5, 3, 65536, policy);
        rig.storm(20, || ());
        rig.world.kill();
        let lost_memory = memory();
        let members = (0..3u8)
            .map(|i| given(&rig.world, i, &rig.stores[usize::from(i)]))
            .collect();
        let parts = parts(&rig.world, members, &lost_memory);
        let spec = StartSpec {
            group: GROUP,
            force: false,
            witness: None,
            without: Vec::new(),
            keep: None,
            undelete: false,
        };
        rig.world.crash_in.set(Some(crash));
        let _ = rig.world.try_block_on(RaidGroup::start(parts, spec));
        rig.world.kill();
        rig.restart(&lost_memory, false).unwrap();
        rig.sleep(1);
        let mut events = Vec::new();
        rig.group.take_events(&mut events);
        let resync = events.iter().any(|event| event.name == "ResyncStarted");
        assert!(resync, "killed at I/O {crash}");
    }
}

/// What was left out at a start has not got what was replayed; if that start dies before it said so, the next one,
/// which has that disk again, must know.
#[test]
fn start_that_dies_after_its_replay_remembers_who_was_not_there() {
    for (seed, crash) in (430..630).zip((13..20).cycle()) {
        let mut rig = rig(seed, Level::Raid5, 6, 65536, true);
        rig.storm(20, || ());
        let mut busy = Vec::new();
        rig.world.crash_in.set(Some(20 + rig.world.random(18)));
        for tag in 0..8 {
            let at = u64::from(tag) * 3 * 65536 + 512;
            let bytes = vec![tag as u8 + 1; 512];
            rig.model.borrow_mut()[at as usize..][..512].copy_from_slice(&bytes);
            rig.world.pages.borrow_mut()[usize::from(tag)] = bytes;
            let request = Rig::request(tag, HostVerb::Write { fua: false }, at, 512);
            busy.push(request);
            let group = Rc::clone(&rig.group);
            rig.world
                .spawn(async move { assert_eq!(group.serve(0, request).await, Ok(())) });
        }
        let world = Rc::clone(&rig.world);
        rig.world.run_until(|| world.crashed());
        rig.world.kill();
        let members = (0..6u8)
            .map(|i| given(&rig.world, i, &rig.stores[usize::from(i)]))
            .collect();
        let parts = parts(&rig.world, members, &rig.memory);
        let spec = StartSpec {
            group: GROUP,
            force: false,
            witness: None,
            without: vec![uuid(1)],
            keep: None,
            undelete: false,
        };
        rig.world.crash_in.set(Some(crash));
        let _ = rig.world.try_block_on(RaidGroup::start(parts, spec));
        rig.world.kill();
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        for request in busy {
            let group = Rc::clone(&rig.group);
            let result = rig
                .world
                .block_on(async move { group.serve(0, request).await });
            assert_eq!(result, Ok(()));
        }
        rig.check();
        if rig.group.status().state == GroupState::Optimal {
            rig.without_each(&[]);
        }
    }
}
