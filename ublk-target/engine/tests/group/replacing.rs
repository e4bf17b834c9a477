//! A member that still reads is replaced by copying: under writes, with either disk failing, with crashes.

use lunar_api::target::SyncAction;

use super::*;

/// Number of the disk that comes.
const NEW: u8 = 40;

const SHAPES: [(Level, u8, u64); 7] = [
    (Level::Raid0, 3, 65536),
    (Level::Linear, 2, 65536),
    (Level::Raid1, 2, 65536),
    (Level::Raid5, 4, 65536),
    (Level::Raid5, 3, 4096),
    (Level::Raid6, 5, 65536),
    (Level::Raid10, 3, 65536),
];

impl Rig {
    /// Begins to replace the disk in a slot; the new one is there at restarts too.
    pub(super) fn begin_replace(&mut self, slot: u16) -> Rc<Store> {
        let fresh = Store::new(DISK, 0x77);
        self.replace(slot, NEW, &fresh);
        self.stores.push(Rc::clone(&fresh));
        self.disks.push(NEW);
        fresh
    }

    /// Waits until nothing is copied or synced any more.
    pub(super) fn wait_replaced(&self, slot: u16) {
        let group = Rc::clone(&self.group);
        self.world.run_until(move || {
            let status = group.status();
            status.sync.is_none() && status.replacement.is_none()
        });
        let status = self.group.status();
        assert_eq!(status.members[usize::from(slot)].disk, uuid(NEW));
        assert_eq!(status.state, GroupState::Optimal, "{}", status.reason);
    }

    /// Everything reads as written without the disk that left, and, one after the other, without each other member.
    pub(super) fn check_without_old(&self, slot: u16) {
        let old = &self.stores[usize::from(slot)];
        old.faults.dead.set(true);
        self.check();
        if self.group.status().level == Level::Raid0 || self.group.status().level == Level::Linear {
            return;
        }
        self.check_without_others(&[self.disks[usize::from(slot)]]);
    }
}

#[test]
fn replaced_disk_is_copied_under_writes_and_stays_until_the_new_one_is_whole() {
    for (i, (level, n, chunk)) in (0..).zip(SHAPES) {
        let seed = 900 + i + round();
        let mut rig = rig(seed, level, n, chunk, true);
        let slot = u16::from(n) - 1 - u16::from(level == Level::Linear);
        assert_eq!(rig.storm(60, || ()), 0);
        let fresh = rig.begin_replace(slot);
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Optimal);
        assert_eq!(status.members[usize::from(slot)].disk, uuid(slot as u8));
        assert_eq!(status.replacement.as_ref().map(|m| m.disk), Some(uuid(NEW)));
        assert_eq!(
            status.sync.as_ref().map(|s| s.action),
            Some(SyncAction::Replace)
        );
        assert_eq!(rig.storm(120, || ()), 0);
        rig.wait_replaced(slot);
        assert!(fresh.writes.get() > 0);
        assert_eq!(rig.storm(60, || ()), 0);
        rig.check_without_old(slot);
        // The disk that left says so itself.
        let mut bytes = [0; 4096];
        rig.stores[usize::from(slot)].read(4096, &mut bytes);
        let at = At {
            offset: 4096,
            device_size: DISK as u64,
        };
        let left = decode(&bytes, at).unwrap();
        assert!(left.is_free() && left.disk == uuid(slot as u8));
    }
}

#[test]
fn replacing_reads_the_disk_that_leaves_and_no_other() {
    let mut rig = rig(31, Level::Raid5, 4, 65536, true);
    let before: Vec<u64> = rig.group.status().members.iter().map(|m| m.reads).collect();
    let old = Rc::clone(&rig.stores[2]);
    let had = old.reads.get();
    rig.begin_replace(2);
    rig.wait_replaced(2);
    assert!(old.reads.get() - had >= (DISK as u64 - (8 << 20)) / 65536);
    for slot in [0, 1, 3] {
        let now = rig.group.status().members[slot].reads;
        assert_eq!(now, before[slot], "slot {slot} was read");
    }
}

#[test]
fn disk_that_fails_while_it_is_copied_is_rebuilt_from_where_the_copy_was() {
    for (i, (level, n, chunk)) in (0..)
        .zip(SHAPES)
        .filter(|(_, s)| s.0 != Level::Raid0 && s.0 != Level::Linear)
    {
        let mut rig = rig(950 + i + round(), level, n, chunk, true);
        rig.begin_replace(1);
        rig.wait_done(8 << 20);
        let old = Rc::clone(&rig.stores[1]);
        assert_eq!(rig.storm(80, || old.faults.dead.set(true)), 0);
        let status = rig.group.status();
        assert_eq!(status.members[1].disk, uuid(NEW), "{}", status.reason);
        rig.wait_replaced(1);
        let mut events = Vec::new();
        rig.group.take_events(&mut events);
        let begun = events.iter().rfind(|e| e.name == "RebuildStarted").unwrap();
        let is_anew = begun.text.starts_with("from 0 ") || !begun.text.starts_with("from ");
        assert!(!is_anew, "it was begun anew: {}", begun.text);
        rig.check_without_old(1);
    }
}

#[test]
fn new_disk_that_fails_leaves_the_group_as_it_was() {
    for (i, (level, n, chunk)) in (0..).zip(SHAPES) {
        for how in 0..3 {
            let mut rig = rig(980 + i * 3 + how + round(), level, n, chunk, true);
            rig.group.set_rebuild_rate(Some(1 << 20), Some(1 << 20));
            let fresh = rig.begin_replace(0);
            rig.wait_done(2 << 20);
            let errors = rig.storm(80, || match how {
                0 => fresh.faults.dead.set(true),
                1 => fresh.faults.write_errors.set(true),
                _ => fresh.faults.hang.set(true),
            });
            assert_eq!(errors, 0);
            let group = Rc::clone(&rig.group);
            rig.world
                .run_until(move || group.status().replacement.is_none());
            let status = rig.group.status();
            assert_eq!(
                (status.state, status.members[0].disk),
                (GroupState::Optimal, uuid(0))
            );
            rig.check();
            let mut events = Vec::new();
            rig.group.take_events(&mut events);
            assert!(
                events
                    .iter()
                    .any(|e| e.name == "FailSpare" && e.disk == Some(uuid(NEW)))
            );
            assert!(!events.iter().any(|e| e.name == "Fail"));
        }
    }
}

#[test]
fn killed_process_in_a_copy_loses_nothing_and_the_copy_ends() {
    for (i, (level, n, chunk)) in (0..).zip(SHAPES).filter(|(_, s)| s.0 != Level::Linear) {
        let mut rig = rig(1010 + i + round(), level, n, chunk, true);
        rig.begin_replace(1);
        rig.storm_with_kills(6);
        rig.wait_replaced(1);
        rig.check_without_old(1);
    }
}

#[test]
fn power_loss_in_a_copy_never_makes_the_new_disk_one_that_is_in_sync() {
    for seed in 0..12 {
        let mut rig = rig(1040 + seed + round(), Level::Raid1, 2, 65536, true);
        rig.begin_replace(1);
        assert_eq!(rig.storm(40, || ()), 0);
        rig.world.crash_in.set(Some(1 + rig.world.random(3000)));
        let group = Rc::clone(&rig.group);
        rig.world
            .run_until(move || group.status().replacement.is_none());
        if !rig.world.crashed() {
            rig.world.crash_in.set(None);
        }
        rig.world.kill();
        // Without what a process leaves behind, and without the disk that both came from: it is not believed.
        let with_all = rig.restart(&memory(), false);
        assert_eq!(with_all, Ok(()));
        rig.check();
        rig.wait_replaced(1);
        rig.check_without_old(1);
    }
}

/// Stops cleanly in the middle of a copy and starts with some of the disks.
fn stopped_in_the_middle(level: Level, n: u8) -> Rig {
    let mut rig = rig(1060, level, n, 65536, true);
    rig.begin_replace(1);
    rig.wait_done(16 << 20);
    let group = Rc::clone(&rig.group);
    assert_eq!(
        rig.world.block_on(async move { group.stop(false).await }),
        Ok(())
    );
    rig
}

#[test]
fn copy_goes_on_after_a_clean_stop_with_whoever_is_there() {
    for level in [Level::Raid5, Level::Raid0] {
        // Both: the copy goes on from where it was.
        let mut rig = stopped_in_the_middle(level, 3);
        rig.restart(&memory(), false).unwrap();
        let sync = rig.group.status().sync.unwrap();
        assert!(
            sync.action == SyncAction::Replace && sync.done >= 16 << 20,
            "{sync:?}"
        );
        rig.wait_replaced(1);
        rig.check_without_old(1);
        // The old one alone: as it was before.
        let mut rig = stopped_in_the_middle(level, 3);
        rig.restart_without(&memory(), false, &[NEW]).unwrap();
        let status = rig.group.status();
        assert_eq!(
            (status.state, status.replacement),
            (GroupState::Optimal, None)
        );
        rig.check();
        // The new one alone: what it lacks is rebuilt, or nothing starts.
        let mut rig = stopped_in_the_middle(level, 3);
        let started = rig.restart_without(&memory(), false, &[1]);
        if level == Level::Raid0 {
            assert!(started.is_err());
            continue;
        }
        started.unwrap();
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Degraded);
        assert_eq!(status.members[1].state, MemberState::Rebuilding);
        assert!(status.sync.unwrap().done >= 16 << 20);
        rig.wait_replaced(1);
        rig.check_without_old(1);
    }
}

#[test]
fn places_that_the_old_disk_does_not_give_come_from_redundancy_or_are_named() {
    for level in [Level::Raid5, Level::Raid1, Level::Raid0] {
        let mut rig = rig(1070, level, 3, 65536, true);
        assert_eq!(rig.storm(60, || ()), 0);
        let offset = rig.group.status().members[1].data_offset;
        let bad = (offset + 128 * 1024) / 512;
        rig.stores[1].faults.bad.borrow_mut().insert(bad);
        rig.begin_replace(1);
        if level != Level::Raid0 {
            rig.wait_replaced(1);
            rig.check_without_old(1);
            continue;
        }
        rig.sleep(120);
        let status = rig.group.status();
        assert_eq!(status.members[1].disk, uuid(1));
        let mut events = Vec::new();
        rig.group.take_events(&mut events);
        let said = events.iter().find(|e| e.name == "RebuildStopped").unwrap();
        assert!(
            said.text.contains(&(bad * 512).to_string()),
            "{}",
            said.text
        );
        // Written over, it is no hole any more.
        for at in (0..LU_BYTES).step_by(MAX_IO as usize) {
            let bytes = rig.model.borrow()[at as usize..][..MAX_IO as usize].to_vec();
            rig.world.pages.borrow_mut()[1] = bytes;
            let group = Rc::clone(&rig.group);
            let request = Rig::request(1, HostVerb::Write { fua: false }, at, MAX_IO);
            let wrote = rig
                .world
                .block_on(async move { group.serve(0, request).await });
            assert_eq!(wrote, Ok(()));
        }
        rig.wait_replaced(1);
        rig.check_without_old(1);
    }
}

impl Rig {
    /// Begins to write so many bytes; the model has them.
    fn begin_put(&self, at: u64, len: u64, byte: u8) -> Rc<Cell<bool>> {
        self.model.borrow_mut()[at as usize..(at + len) as usize].fill(byte);
        let tag = usize::from(byte % 60);
        self.world.pages.borrow_mut()[tag] = vec![byte; len as usize];
        let (group, done) = (Rc::clone(&self.group), Rc::new(Cell::new(false)));
        let request = Self::request(tag as u16, HostVerb::Write { fua: false }, at, len);
        let ended = Rc::clone(&done);
        self.world.spawn(async move {
            assert_eq!(group.serve(0, request).await, Ok(()));
            ended.set(true);
        });
        done
    }

    fn put(&self, at: u64, len: u64, byte: u8) {
        let done = self.begin_put(at, len, byte);
        self.world.run_until(move || done.get());
    }
}

#[test]
fn new_disk_that_missed_a_write_is_not_believed_when_the_old_one_fails_too() {
    let redundant = |shape: &(Level, u8, u64)| shape.0 != Level::Raid0 && shape.0 != Level::Linear;
    let shapes: Vec<_> = SHAPES.into_iter().filter(redundant).collect();
    for (seed, (level, n, chunk)) in (0..6).flat_map(|seed| shapes.iter().map(move |s| (seed, *s)))
    {
        let mut rig = rig(1080 + seed, level, n, chunk, true);
        rig.group.set_rebuild_rate(Some(1 << 20), Some(1 << 20));
        let fresh = rig.begin_replace(1);
        rig.wait_done(8 << 20);
        rig.put(2 << 20, 4096, 0x5B);
        // One write that neither of the two takes, as when they hang on one cable; then the new one answers again.
        fresh.faults.write_errors.set(true);
        rig.stores[1].faults.dead.set(true);
        let before = fresh.writes.get();
        rig.begin_put(0, 4096, 0x5C);
        rig.world.run_until(|| fresh.writes.get() > before);
        fresh.faults.write_errors.set(false);
        rig.put(1 << 20, MAX_IO, 0x5D);
        rig.sleep(1);
        rig.check();
        let status = rig.group.status();
        assert_eq!(status.state, GroupState::Degraded);
        assert_eq!(status.replacement, None);
        rig.sleep(120);
        rig.check();
    }
}

#[test]
fn write_without_redundancy_is_not_answered_while_the_disks_name_one_that_missed_it() {
    for (level, seed) in [Level::Raid0, Level::Linear]
        .into_iter()
        .flat_map(|level| (0..10).map(move |seed| (level, 1100 + seed)))
    {
        let mut rig = rig(seed, level, 2, 65536, true);
        // linear: what is replaced is the member that the LU is on.
        let slot = u16::from(level == Level::Raid0);
        rig.begin_replace(slot);
        let (group, at) = (Rc::clone(&rig.group), usize::from(slot));
        rig.world
            .run_until(move || group.status().members[at].disk == uuid(NEW));
        // In memory the new disk has the slot; the old one fails, and power with it once a write is answered.
        let old = Rc::clone(&rig.stores[at]);
        old.faults.write_errors.set(true);
        rig.put(0, 256 << 10, 0x5E);
        rig.world.kill();
        old.faults.write_errors.set(false);
        rig.restart(&memory(), false).unwrap();
        rig.check();
    }
}

#[test]
fn read_that_waits_for_room_does_not_go_on_with_a_disk_that_is_being_filled() {
    // 65 runs of bytes of the members, one more than are read at once.
    let len = 512 << 10;
    for slot in 0..3 {
        let mut rig = rig(1120, Level::Raid5, 3, 4096, true);
        assert_eq!(rig.storm(60, || ()), 0);
        let fresh = Store::new(DISK, 0x77);
        fresh.faults.slow.set(true);
        rig.stores.push(Rc::clone(&fresh));
        rig.disks.push(NEW);
        let (group, new) = (Rc::clone(&rig.group), given(&rig.world, NEW, &fresh));
        rig.world.spawn(async move {
            let _ = group.member_replace(slot, new, Fill::Missed).await;
        });
        let copying = || rig.group.status().replacement.is_some();
        while !copying() {
            let held = Rc::clone(&fresh);
            rig.world.run_until(|| held.held() > 0 || copying());
            fresh.release(&rig.world);
        }
        let other = Rc::clone(&rig.stores[usize::from((slot + 1) % 3)]);
        other.faults.slow.set(true);
        rig.world.pages.borrow_mut()[2] = vec![0; len as usize];
        let done = Rc::new(Cell::new(None));
        let (group, to) = (Rc::clone(&rig.group), Rc::clone(&done));
        rig.world.spawn(async move {
            let request = Rig::request(2, HostVerb::Read, 0, len);
            to.set(Some(group.serve(0, request).await));
        });
        let held = Rc::clone(&other);
        rig.world.run_until(|| held.held() > 15);
        rig.sleep(1);
        let group = Rc::clone(&rig.group);
        rig.world.spawn(async move {
            let _ = group.member_fail(uuid(slot as u8), "pulled").await;
        });
        let group = Rc::clone(&rig.group);
        rig.world
            .run_until(move || group.status().members[usize::from(slot)].disk == uuid(NEW));
        fresh.faults.slow.set(false);
        other.faults.slow.set(false);
        other.release(&rig.world);
        let end = Rc::clone(&done);
        rig.world.run_until(move || end.get().is_some());
        fresh.release(&rig.world);
        assert_eq!(done.get(), Some(Ok(())));
        let (read, model) = (rig.world.pages.borrow()[2].clone(), rig.model.borrow());
        let wrong = (0..read.len()).find(|i| read[*i] != model[*i]);
        assert_eq!(wrong, None, "slot {slot}");
    }
}

#[test]
fn new_disk_that_fails_as_it_takes_the_slot_leaves_it_to_the_old_one_that_cannot_be_missed() {
    for (level, n) in [
        (Level::Raid0, 2),
        (Level::Raid1, 2),
        (Level::Raid5, 3),
        (Level::Raid10, 4),
    ] {
        let mut rig = rig(1130, level, n, 65536, true);
        let mut state = GroupState::Optimal;
        if level != Level::Raid0 {
            rig.stores[0].faults.dead.set(true);
            state = GroupState::Degraded;
        }
        assert_eq!(rig.storm(40, || ()), 0);
        let fresh = rig.begin_replace(1);
        for disk in [NEW, 1] {
            let group = Rc::clone(&rig.group);
            rig.world
                .run_until(move || group.status().members[1].disk == uuid(disk));
            fresh.faults.write_errors.set(true);
        }
        assert_eq!(rig.storm(40, || ()), 0);
        rig.check();
        let status = rig.group.status();
        assert_eq!((status.state, status.replacement), (state, None));
    }
}
