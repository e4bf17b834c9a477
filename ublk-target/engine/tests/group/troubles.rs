//! Disks that hang, are late, are replaced meanwhile or have bad sectors; memory that runs out; starts with some left out.

use lunar_engine::geometry::Geometry;

use super::*;

/// A leg answers a write with an error, another one is slow: the write's end comes after the first is replaced.
fn write_that_ends_after_a_replacement(seed: u64, fresh: &Rc<Store>) -> Rig {
    let rig = rig(seed, Level::Raid1, 3, 65536, true);
    rig.storm(20, || ());
    rig.stores[1].faults.write_errors.set(true);
    rig.stores[2].faults.slow.set(true);
    let errors = rig.stores[1].writes.get();
    rig.world.pages.borrow_mut()[5] = vec![7; 8192];
    rig.model.borrow_mut()[..8192].fill(7);
    let group = Rc::clone(&rig.group);
    let request = Rig::request(5, HostVerb::Write { fua: false }, 0, 8192);
    rig.world.spawn(async move {
        assert_eq!(group.serve(0, request).await, Ok(()));
    });
    let (slow, failing) = (Rc::clone(&rig.stores[2]), Rc::clone(&rig.stores[1]));
    rig.world
        .run_until(|| slow.held() > 0 && failing.writes.get() > errors);
    slow.faults.slow.set(false);
    let group = Rc::clone(&rig.group);
    let failed = rig
        .world
        .block_on(async move { group.member_fail(uuid(1), "by hand").await });
    assert_eq!(failed, Ok(()));
    rig.group.set_rebuild_rate(None, Some(1 << 20));
    rig.replace(1, 40, fresh);
    rig
}

#[test]
fn late_failure_of_a_replaced_disk_does_not_fail_the_new_one() {
    let rig = write_that_ends_after_a_replacement(90, &Store::new(DISK, 0x77));
    rig.stores[2].release(&rig.world);
    rig.sleep(1);
    let status = rig.group.status();
    assert_eq!(
        status.members[1].state,
        MemberState::Rebuilding,
        "{}",
        status.reason
    );
    assert_eq!(status.members[1].write_errors, 0);
    rig.group.set_rebuild_rate(None, Some(1 << 40));
    rig.wait_synced();
    rig.check();
}

#[test]
fn replay_does_not_write_to_the_disk_that_came_into_a_slot() {
    // It is larger: where the data of the old one was, it has its metadata.
    let fresh = Store::new(1 << 30, 0x77);
    let mut rig = write_that_ends_after_a_replacement(91, &fresh);
    let members = rig.group.status().members;
    let at = members[0].data_offset;
    assert!(at + 8192 <= members[1].data_offset, "{members:?}");
    let part = |store: &Store| {
        let mut bytes = vec![0; 8192];
        store.read(at, &mut bytes);
        bytes
    };
    let before = part(&fresh);
    rig.world.kill();
    rig.stores[1] = Rc::clone(&fresh);
    rig.disks[1] = 40;
    let memory = Rc::clone(&rig.memory);
    rig.restart(&memory, false).unwrap();
    assert!(part(&fresh) == before, "written over what it holds there");
    assert_eq!(part(&rig.stores[2]), vec![7; 8192]);
    rig.check();
    rig.wait_synced();
    rig.check();
}

#[test]
fn superblock_write_that_hangs_lands_as_it_was_meant() {
    let rig = rig(92, Level::Raid1, 3, 65536, true);
    rig.storm(20, || ());
    rig.stores[1].faults.hang.set(true);
    let group = Rc::clone(&rig.group);
    let failed = rig
        .world
        .block_on(async move { group.member_fail(uuid(2), "by hand").await });
    assert_eq!(failed, Ok(()));
    assert_eq!(rig.group.status().members[1].state, MemberState::Faulty);
    rig.replace(1, 40, &Store::new(DISK, 0x77));
    rig.stores[1].faults.hang.set(false);
    rig.stores[1].land();
    let mut copy = vec![0; 4096];
    rig.stores[1].read(4096, &mut copy);
    let at = At {
        offset: 4096,
        device_size: DISK as u64,
    };
    let superblock = decode(&copy, at).unwrap();
    assert_eq!(superblock.disk, uuid(1));
}

#[test]
fn disk_that_will_not_do_changes_nothing() {
    let rig = rig(93, Level::Raid5, 4, 65536, true);
    rig.storm(20, || ());
    let group = Rc::clone(&rig.group);
    let failed = rig
        .world
        .block_on(async move { group.member_fail(uuid(1), "by hand").await });
    assert_eq!(failed, Ok(()));
    let before = rig.group.status().members;
    let broken = Store::new(DISK, 0x77);
    broken.faults.write_errors.set(true);
    let cases = [
        ("in slot 0 already", 0, Store::new(DISK, 0x77)),
        ("does not take writes", 40, broken),
        ("room for", 40, Store::new(66 << 20, 0x77)),
    ];
    for (why, disk, store) in cases {
        let (group, new) = (Rc::clone(&rig.group), given(&rig.world, disk, &store));
        let refused = rig
            .world
            .block_on(async move { group.member_replace(1, new, Fill::Missed).await })
            .unwrap_err();
        assert!(refused.causes.concat().contains(why), "{refused:?}");
        let status = rig.group.status();
        assert_eq!(status.members, before, "{why}");
        assert_eq!(status.state, GroupState::Degraded);
    }
    assert_eq!(rig.storm(20, || ()), 0);
    rig.replace(1, 40, &Store::new(DISK, 0x77));
    rig.wait_synced();
    rig.check();
}

#[test]
fn killed_in_merged_writes_of_many_legs_leaves_them_equal() {
    for crash in (20..300).step_by(7) {
        let mut rig = rig(94 + crash, Level::Raid1, 12, 65536, true);
        rig.world.crash_in.set(Some(crash));
        for i in 0..16u16 {
            rig.world.pages.borrow_mut()[usize::from(i)] = vec![i as u8 + 1; 4096];
            let group = Rc::clone(&rig.group);
            let at = u64::from(i) * 4096;
            let request = Rig::request(i, HostVerb::Write { fua: false }, at, 4096);
            rig.world.spawn(async move {
                let _ = group.serve(0, request).await;
            });
        }
        let clock = SimClock(Rc::clone(&rig.world));
        let _ = rig
            .world
            .try_block_on(async move { clock.sleep(SECOND).await });
        rig.world.kill();
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        let at = rig.group.status().members[0].data_offset;
        let leg = |i: usize| {
            let mut bytes = vec![0; 65536];
            rig.stores[i].read(at, &mut bytes);
            bytes
        };
        for i in 1..12 {
            assert!(leg(i) == leg(0), "leg {i}, killed at I/O {crash}");
        }
    }
}

#[test]
fn member_that_is_left_out_at_start_is_stale_from_then_on() {
    for (level, n, seed) in [(Level::Raid1, 3, 400), (Level::Raid5, 4, 401)] {
        let mut rig = rig(seed, level, n, 65536, true);
        rig.storm(30, || ());
        rig.world.kill();
        let memory = Rc::clone(&rig.memory);
        rig.restart_without(&memory, false, &[1]).unwrap();
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Degraded);
        assert_eq!(status.members[1].state, MemberState::Missing);
        let mut events = Vec::new();
        rig.group.take_events(&mut events);
        let named = events.iter().any(|event| event.text.contains("left out"));
        assert!(named, "{events:?}");
        assert_eq!(rig.storm(30, || ()), 0);
        rig.world.kill();
        rig.restart(&memory, false).unwrap();
        let status = rig.group.status();
        assert_ne!(status.members[1].state, MemberState::InSync);
        rig.check();
    }
    let mut rig = rig(402, Level::Raid5, 4, 65536, true);
    rig.world.kill();
    let memory = Rc::clone(&rig.memory);
    let refused = rig.restart_without(&memory, false, &[0, 1]).unwrap_err();
    assert!(refused.contains("not there"), "{refused}");
    let refused = rig
        .restart_without(&memory, true, &[0, 1, 2, 3])
        .unwrap_err();
    assert!(refused.contains("left out"), "{refused}");
}

#[test]
fn configuration_of_many_pieces_is_written_and_read() {
    let world = World::new(403);
    let stores: Vec<_> = (0..2).map(|_| Store::new(640 << 20, 0)).collect();
    let members = |disks: std::ops::Range<u8>| {
        let given = disks.map(|i| given(&world, i, &stores[usize::from(i)]));
        given.collect()
    };
    let memory = memory();
    let made = parts(&world, members(0..2), &memory);
    let group = world
        .block_on(RaidGroup::create(made, spec(Level::Raid1, 65536, true)))
        .unwrap();
    run(&world, &group);
    let lus = 500u16;
    let g = Rc::clone(&group);
    world.block_on(async move {
        for i in 0..lus {
            let mut id = [5; 16];
            id[..2].copy_from_slice(&i.to_le_bytes());
            let (lu, name) = (LuUuid::from_bytes(id), format!("v{i:0>60}"));
            let made = g.lu_create(lu, &name, LuSize::Bytes(1 << 20), 1).await;
            assert_eq!(made, Ok(i));
        }
        // A disk that comes gets all of it.
        g.member_fail(uuid(1), "by hand").await.unwrap();
    });
    let fresh = Store::new(640 << 20, 0);
    let (g, new) = (Rc::clone(&group), given(&world, 2, &fresh));
    world
        .block_on(async move { g.member_replace(1, new, Fill::Missed).await })
        .unwrap();
    world.kill();
    let configuration = |store: &Store| {
        let mut copy = vec![0; 4096];
        store.read(4096, &mut copy);
        let at = At {
            offset: 4096,
            device_size: 640 << 20,
        };
        let member = decode(&copy, at).unwrap().member.unwrap();
        let version = member.group.config;
        let mut json = vec![0; version.len as usize];
        let place = member.layout.config[usize::from(version.current)];
        store.read(place.offset, &mut json);
        json
    };
    let json = configuration(&stores[0]);
    assert!(json.len() > CONFIG_PIECE && json == configuration(&fresh));
    let parts = parts(&world, members(0..1), &memory);
    let spec = StartSpec {
        group: GROUP,
        force: false,
        witness: None,
        without: Vec::new(),
        keep: None,
        undelete: false,
    };
    let group = world.block_on(RaidGroup::start(parts, spec)).unwrap();
    assert_eq!(group.lus().len(), usize::from(lus));
}

/// Twenty long writes to a LU of their own, more than the memory holds; none may wait for ever.
fn write_more_than_the_memory(rig: &Rig) {
    let left = Rc::new(Cell::new(20));
    for i in 0..20u16 {
        let tag = 64 + i;
        // Not whole grains: each takes a place of 1 MiB.
        let (at, len) = (u64::from(i) * (640 << 10) + 512, 512 << 10);
        rig.world.pages.borrow_mut()[usize::from(tag)] = vec![i as u8; len as usize];
        let (group, left) = (Rc::clone(&rig.group), Rc::clone(&left));
        let request = Rig::request(tag, HostVerb::Write { fua: false }, at, len);
        rig.world.spawn(async move {
            assert_eq!(group.serve(1, request).await, Ok(()));
            left.set(left.get() - 1);
        });
    }
    rig.world.run_until(|| left.get() == 0);
}

#[test]
fn orphans_of_hung_disks_leave_memory_for_degraded_service() {
    for (level, n, seed) in [(Level::Raid1, 3, 404), (Level::Raid5, 4, 405)] {
        let rig = rig(seed, level, n, 65536, true);
        let group = Rc::clone(&rig.group);
        let lu = LuUuid::from_bytes([4; 16]);
        let made = rig.world.block_on(async move {
            let size = LuSize::Bytes(16 << 20);
            group.lu_create(lu, "large", size, 32).await
        });
        assert_eq!(made, Ok(1));
        rig.stores[1].faults.hang.set(true);
        write_more_than_the_memory(&rig);
        assert_eq!(rig.group.status().members[1].state, MemberState::Faulty);
        // A second one, while what the first was given is not back; and one after it is.
        if level == Level::Raid1 {
            rig.stores[2].faults.hang.set(true);
            write_more_than_the_memory(&rig);
            rig.stores[2].land();
        }
        rig.stores[1].land();
        rig.sleep(1);
        for _ in 0..2 {
            let fresh = Store::new(DISK, 0x77);
            rig.replace(1, 40, &fresh);
            rig.world
                .run_until(|| rig.group.status().members[1].state == MemberState::InSync);
            fresh.faults.hang.set(true);
            write_more_than_the_memory(&rig);
            fresh.land();
            rig.sleep(1);
        }
        assert_eq!(rig.storm(60, || ()), 0);
        rig.check();
    }
}

#[test]
fn reads_of_a_failed_group_are_answered() {
    let rig = rig(406, Level::Raid5, 4, 65536, true);
    rig.storm(60, || ());
    rig.stores[0].faults.dead.set(true);
    rig.storm(20, || ());
    let store = Rc::clone(&rig.stores[1]);
    // All at once, so that what they leave behind fills the memory.
    store.faults.slow.set(true);
    store.faults.write_errors.set(true);
    let left = Rc::new(Cell::new(20));
    for i in 0..20u16 {
        let tag = 64 + i;
        let (at, len) = (u64::from(i) * (192 << 10) + 512, 190 << 10);
        rig.world.pages.borrow_mut()[usize::from(tag)] = vec![i as u8; len as usize];
        let (group, left) = (Rc::clone(&rig.group), Rc::clone(&left));
        let request = Rig::request(tag, HostVerb::Write { fua: false }, at, len);
        rig.world.spawn(async move {
            let _ = group.serve(0, request).await;
            left.set(left.get() - 1);
        });
    }
    rig.sleep(1);
    store.faults.slow.set(false);
    store.release(&rig.world);
    rig.world.run_until(|| left.get() == 0);
    assert_eq!(rig.group.status().state, GroupState::Failed);
    for at in (0..LU_BYTES).step_by(512 << 10) {
        rig.world.pages.borrow_mut()[63] = vec![0; 512 << 10];
        let group = Rc::clone(&rig.group);
        let mut request = Rig::request(63, HostVerb::Read, at, 512 << 10);
        request.zero_copy = false;
        // Whatever the answer is, it comes.
        let _ = rig
            .world
            .block_on(async move { group.serve(0, request).await });
    }
}

#[test]
fn members_unreadable_at_different_places_of_a_stripe_are_repaired() {
    for (level, n, seed) in [(Level::Raid1, 3, 407), (Level::Raid5, 4, 408)] {
        let rig = rig(seed, level, n, 65536, true);
        rig.storm(60, || ());
        let data = rig.group.status().members[0].data_offset;
        let spoil = || {
            for (store, i) in rig.stores.iter().zip(0..) {
                let grains = (data / 4096 + i..(data + LU_BYTES) / 4096).step_by(n.into());
                let sectors = grains.map(|grain| grain * 8 + i);
                store.faults.bad.borrow_mut().extend(sectors);
            }
        };
        spoil();
        rig.check();
        spoil();
        assert_eq!(rig.storm(100, || ()), 0, "{level:?}");
        rig.check();
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Optimal, "{}", status.reason);
    }
}

#[test]
fn write_goes_on_where_each_pass_has_something_to_repair() {
    let rig = rig(409, Level::Raid5, 16, 1 << 20, true);
    let group = Rc::clone(&rig.group);
    let lu = LuUuid::from_bytes([4; 16]);
    let made = rig.world.block_on(async move {
        let size = LuSize::Bytes(15 << 20);
        group.lu_create(lu, "large", size, 32).await
    });
    assert_eq!(made, Ok(1));
    // Its stripe is the second, and parity of that on slot 14.
    let at = rig.group.status().members[14].data_offset + (1 << 20);
    let sectors = at / 512..(at + (1 << 20)) / 512;
    rig.stores[14].faults.bad.borrow_mut().extend(sectors);
    let left = Rc::new(Cell::new(13));
    let write = |tag: u16, at: u64, len: u64| {
        rig.world.pages.borrow_mut()[usize::from(tag)] = vec![tag as u8; len as usize];
        let (group, left) = (Rc::clone(&rig.group), Rc::clone(&left));
        let request = Rig::request(tag, HostVerb::Write { fua: false }, at, len);
        rig.world.spawn(async move {
            assert_eq!(group.serve(1, request).await, Ok(()), "write {tag}");
            left.set(left.get() - 1);
        });
    };
    // While the first waits for the disk of its chunk, the others gather behind it.
    let slow = &rig.stores[12];
    slow.faults.slow.set(true);
    write(64, (14 << 20) - 4096, 4096);
    rig.world.run_until(|| slow.held() > 0);
    slow.faults.slow.set(false);
    for i in 0..12 {
        write(65 + i, u64::from(i) << 19, 512 << 10);
    }
    rig.sleep(1);
    slow.release(&rig.world);
    rig.world.run_until(|| left.get() == 0);
    assert_eq!(rig.group.status().state, GroupState::Optimal);
    assert!(rig.stores[14].faults.bad.borrow().is_empty());
    let errors = rig.group.status().members[14].read_errors;
    assert!(errors > 8, "only {errors} passes had something to repair");
}

/// Given a disk that loses what its cache has and is there again, and a process that dies before the superblocks say that the
/// disk failed, then its successor does not take it for one that has all it was told.
#[test]
fn failed_member_is_failed_for_the_successor_of_a_process_that_dies_at_once() {
    let mut seen = 0;
    for at in 1..60 {
        let mut rig = rig(480, Level::Raid5, 4, 65536, true);
        assert_eq!(rig.storm(30, || ()), 0);
        rig.stores[1].faults.write_errors.set(true);
        rig.world.crash_in.set(Some(at));
        for tag in 0..20 {
            rig.world.pages.borrow_mut()[tag] = vec![7; 65536];
            let write = HostVerb::Write { fua: false };
            let request = Rig::request(tag as u16, write, tag as u64 * 65536, 65536);
            let group = Rc::clone(&rig.group);
            rig.world.spawn(async move {
                let _ = group.serve(0, request).await;
            });
        }
        let (world, group) = (Rc::clone(&rig.world), Rc::clone(&rig.group));
        rig.world
            .run_until(|| world.crashed() || group.status().sync.is_some());
        let failed = rig.group.status().members[1].state == MemberState::Faulty;
        rig.stores[1].faults.write_errors.set(false);
        rig.world.kill();
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        let is = rig.group.status().members[1].state;
        assert!(!failed || is != MemberState::InSync, "{at}");
        seen += u32::from(failed);
    }
    assert!(seen > 5, "{seen}");
}

/// Given two writes to one stripe at once, when the bytes of one cannot be had, then that one alone fails, and what is
/// there reads as before and as written, also from what is left when any member is gone.
#[test]
fn write_whose_bytes_cannot_be_had_fails_alone() {
    for (level, n, len) in [
        (Level::Raid5, 3, 512),
        (Level::Raid5, 3, 65536),
        (Level::Raid5, 5, 4096),
        (Level::Raid6, 5, 4096),
        (Level::Raid6, 4, 65536_u64),
    ] {
        for gone in 0..n {
            let rig = rig(95, level, n, 65536, true);
            rig.storm(40, || ());
            one_of_two_without_bytes(&rig, len);
            rig.model.borrow_mut()[65536..][..len as usize].fill(0x22);
            rig.check();
            let others: Vec<u8> = (0..n).filter(|i| *i != gone).collect();
            rig.without_each(&others);
        }
    }
}

fn one_of_two_without_bytes(rig: &Rig, len: u64) {
    let merged = rig.group.status().lus[0].counters.merged;
    rig.world.no_bytes_of.set(Some(1));
    let answers: Rc<RefCell<Vec<_>>> = Rc::default();
    for (tag, fill) in [(1_u16, 0x11), (2, 0x22)] {
        rig.world.pages.borrow_mut()[usize::from(tag)] = vec![fill; len as usize];
        let (group, answers) = (Rc::clone(&rig.group), Rc::clone(&answers));
        let at = u64::from(tag - 1) * 65536;
        let request = Rig::request(tag, HostVerb::Write { fua: false }, at, len);
        rig.world.spawn(async move {
            let answer = group.serve(0, request).await;
            answers.borrow_mut().push((tag, answer.is_ok()));
        });
    }
    let all = Rc::clone(&answers);
    rig.world.run_until(move || all.borrow().len() == 2);
    rig.world.no_bytes_of.set(None);
    answers.borrow_mut().sort_unstable();
    assert_eq!(*answers.borrow(), [(1, false), (2, true)]);
    let now = rig.group.status().lus[0].counters.merged;
    assert_eq!(now, merged + 1, "one batch had both");
}

/// Whoever notes what a group says takes it for what the disks say: a start that finds something older is refused.
#[test]
fn status_says_no_history_that_is_not_durable() {
    let rig = rig(411, Level::Raid1, 3, 65536, true);
    assert_eq!(rig.storm(10, || ()), 0);
    let before = rig.group.status();
    rig.world.crash_in.set(Some(1));
    let group = Rc::clone(&rig.group);
    let failed = async move { group.member_fail(uuid(2), "by hand").await };
    assert!(rig.world.try_block_on(failed).is_none());
    let now = rig.group.status();
    assert_eq!(now.members[2].state, MemberState::Faulty);
    assert_eq!(
        (now.history, now.generation),
        (before.history, before.generation)
    );
}

/// Given parity that was never made right, when one sector of a chunk cannot be read, then all that can be is what it was.
#[test]
fn what_can_be_read_is_not_taken_from_redundancy_that_is_not_proven() {
    for (level, n) in [(Level::Raid5, 4), (Level::Raid6, 5)] {
        for is_write in [false, true] {
            let rig = rig(412, level, n, 65536, false);
            let status = rig.group.status();
            let geometry =
                Geometry::new(level, n.into(), 65536, status.member_bytes).expect("a group");
            // The sync has not come so far.
            let stripe = LU_BYTES / geometry.stripe_bytes() - 1;
            let synced = status.sync.map_or(u64::MAX, |sync| sync.done);
            assert!(synced <= stripe * 65536, "{synced}");
            let model = rig.model.borrow().clone();
            // In the third grain of the second chunk.
            let slot = usize::from(geometry.slot_of(stripe, 1));
            let sector = (status.members[slot].data_offset + stripe * 65536 + 8192) / 512;
            rig.stores[slot].faults.bad.borrow_mut().insert(sector);
            let first = stripe * geometry.stripe_bytes();
            if is_write {
                // Of the first, for which the second is read.
                rig.world.pages.borrow_mut()[5] = vec![9; 8192];
                let verb = HostVerb::Write { fua: false };
                let request = Rig::request(5, verb, first + 4608, 8192);
                let group = Rc::clone(&rig.group);
                let written = async move { group.serve(0, request).await };
                assert_eq!(rig.world.block_on(written), Ok(()));
            }
            let at = first + 65536;
            assert!(rig.read(at, 65536).is_ok());
            for part in [0..8192, 12288..65536_u64] {
                let bytes = rig.read(at + part.start, part.end - part.start);
                let right = &model[(at + part.start) as usize..(at + part.end) as usize];
                assert!(bytes.as_deref() == Ok(right), "{level:?}, write {is_write}");
            }
        }
    }
}
