//! Power is lost while a member is rebuilt: what was rebuilt before is good, what was being written is torn.

use super::*;

const NEW: u8 = 40;
/// What is rebuilt before power is lost: far more than the LU has.
const REBUILT: u64 = 16 << 20;

/// A group whose member in `slot` is rebuilt beyond the LU, with a cursor that is durable: it was stopped cleanly since.
fn rebuilt_in_part(seed: u64, level: Level, n: u8, slot: u16) -> Rig {
    let mut rig = rig(seed, level, n, 65536, true);
    assert_eq!(rig.storm(40, || ()), 0);
    let group = Rc::clone(&rig.group);
    let failed = async move { group.member_fail(uuid(slot as u8), "by hand").await };
    assert_eq!(rig.world.block_on(failed), Ok(()));
    let fresh = Store::new(DISK, 0x77);
    rig.group.set_rebuild_rate(None, Some(8 << 20));
    rig.replace(slot, NEW, &fresh);
    rig.stores[usize::from(slot)] = fresh;
    rig.disks[usize::from(slot)] = NEW;
    rig.wait_done(REBUILT);
    let group = Rc::clone(&rig.group);
    let stopped = rig.world.block_on(async move { group.stop(false).await });
    assert_eq!(stopped, Ok(()));
    rig.restart(&memory(), false).unwrap();
    let sync = rig.group.status().sync.unwrap();
    assert!(sync.done >= REBUILT, "{sync:?}");
    rig
}

/// Power is lost as one member has got its part of a write of a sector, and others may have theirs.
fn torn_write(rig: &mut Rig, slot: u16) -> u64 {
    let at = rig.world.random(LU_BYTES / 512) * 512;
    // The group is marked dirty by another write, which is answered.
    let first = rig.world.random(LU_BYTES / 4096) * 4096;
    for (tag, at, len) in [(1, first, 4096), (2, at, 512)] {
        let bytes: Vec<u8> = (0..len).map(|_| rig.world.random(256) as u8).collect();
        let place = at as usize..(at + len) as usize;
        rig.model.borrow_mut()[place.clone()].copy_from_slice(&bytes);
        rig.known.borrow_mut()[place].fill(tag == 1);
        rig.world.pages.borrow_mut()[tag] = bytes;
        let request = Rig::request(tag as u16, HostVerb::Write { fua: false }, at, len);
        let group = Rc::clone(&rig.group);
        if tag == 1 {
            let written = rig
                .world
                .block_on(async move { group.serve(0, request).await });
            assert_eq!(written, Ok(()));
            continue;
        }
        // The member that is rebuilt has others too.
        let in_sync = (0..).zip(&rig.stores).filter(|(i, _)| *i != slot);
        let in_sync: Vec<_> = in_sync.map(|(_, store)| Rc::clone(store)).collect();
        let writes = || in_sync.iter().map(|store| store.writes.get()).sum::<u64>();
        let before = writes();
        rig.world.spawn(async move {
            let _ = group.serve(0, request).await;
        });
        rig.world.run_until(|| writes() > before);
    }
    rig.world.kill();
    at
}

#[test]
fn power_lost_in_a_rebuild_leaves_no_torn_parity_below_its_cursor() {
    for seed in 0..40 {
        let level = [Level::Raid5, Level::Raid6][seed as usize % 2];
        let n = 3 + u8::from(level == Level::Raid6) + (seed % 3) as u8;
        let slot = (seed % u64::from(n)) as u16;
        let mut rig = rebuilt_in_part(1200 + seed + round(), level, n, slot);
        torn_write(&mut rig, slot);
        // What is missing above the cursor may be spoilt: a person has to say so. The LU is below.
        rig.restart(&memory(), true).unwrap();
        rig.check();
        rig.wait_synced();
        rig.check_without_others(&[]);
    }
}

#[test]
fn power_lost_in_a_rebuild_of_a_mirror_shows_one_of_both_states_ever_after() {
    for seed in 0..40 {
        let (level, n) = [(Level::Raid1, 2), (Level::Raid10, 3)][seed as usize % 2];
        let mut rig = rebuilt_in_part(1300 + seed + round(), level, n, 0);
        let at = torn_write(&mut rig, 0);
        rig.restart(&memory(), false).unwrap();
        rig.check();
        let seen = rig.read(at, 512).unwrap();
        rig.wait_synced();
        for _ in 0..4 {
            assert!(rig.read(at, 512).as_ref() == Ok(&seen), "it has changed");
        }
        rig.check();
    }
}
