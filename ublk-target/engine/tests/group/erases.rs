//! Discards and zeroing: reads are as they should be with every member and without each, and redundancy fits.

use lunar_api::target::{MemberStatus, ScrubOrder, ScrubState};

use super::*;

const SHAPES: [(Level, u8, u64); 10] = [
    (Level::Raid0, 3, 16384),
    (Level::Linear, 3, 65536),
    (Level::Raid1, 2, 65536),
    (Level::Raid5, 3, 4096),
    (Level::Raid5, 4, 65536),
    (Level::Raid5, 5, 1 << 18),
    (Level::Raid6, 4, 16384),
    (Level::Raid6, 6, 65536),
    (Level::Raid10, 4, 65536),
    (Level::Raid10, 5, 16384),
];

/// What members do when they are told to zero.
#[derive(Debug, Clone, Copy)]
enum Members {
    GiveBack,
    Keep,
    /// They refuse, all but one.
    Refuse,
    /// They answer errors, all but one.
    Break,
}

impl Store {
    fn set(&self, members: Members) {
        let faults = &self.faults;
        faults.keeps.set(matches!(members, Members::Keep));
        faults.no_zeroes.set(matches!(members, Members::Refuse));
        faults.zero_errors.set(matches!(members, Members::Break));
    }
}

impl Rig {
    fn set(&self, members: Members) {
        self.stores
            .iter()
            .skip(1)
            .for_each(|store| store.set(members));
    }

    /// A request of any kind at a drawn place, and the model as it will be.
    fn draw(&self, tag: u16, stripe: u64) -> HostRequest {
        let most = [8, 200, 2048, 4096][self.world.random(4) as usize];
        let kind = self.world.random(4);
        let sectors = (1 + self.world.random(most)).min(if kind < 2 { MAX_IO / 512 } else { most });
        let at = self.world.random(LU_BYTES / 512 - sectors) * 512;
        let len = sectors * 512;
        let verb = match kind {
            0 | 1 => HostVerb::Write { fua: false },
            2 => HostVerb::Discard,
            _ => HostVerb::WriteZeroes {
                unmap: self.world.random(2) == 0,
            },
        };
        // A discard is of whole stripes, or ignored.
        let erased = match verb {
            HostVerb::Discard => at.next_multiple_of(stripe)..(at + len) / stripe * stripe,
            _ => at..at + len,
        };
        let mut bytes = vec![0; len as usize];
        if matches!(verb, HostVerb::Write { .. }) {
            for chunk in bytes.chunks_mut(8) {
                chunk.copy_from_slice(&self.world.random(u64::MAX).to_le_bytes());
            }
        }
        if !erased.is_empty() {
            let range = erased.start as usize..erased.end as usize;
            let n = range.len();
            self.known.borrow_mut()[range.clone()].fill(true);
            self.model.borrow_mut()[range].copy_from_slice(&bytes[..n]);
        }
        self.world.pages.borrow_mut()[usize::from(tag)] = bytes;
        Self::request(tag, verb, at, len)
    }

    /// Rounds of requests side by side that do not overlap; answers those of a round that were cut short by a crash.
    fn mixed(&self, rounds: u64, stripe: u64) -> Vec<HostRequest> {
        for _ in 0..rounds {
            let mut busy: Vec<(HostRequest, Rc<Cell<bool>>)> = Vec::new();
            for tag in 0..6 {
                let (model, known) = (self.model.borrow().clone(), self.known.borrow().clone());
                let request = self.draw(tag, stripe);
                let overlaps = |(b, _): &(HostRequest, _)| {
                    request.at < b.at + b.len && b.at < request.at + request.len
                };
                if busy.iter().any(overlaps) {
                    (*self.model.borrow_mut(), *self.known.borrow_mut()) = (model, known);
                    continue;
                }
                let done = Rc::new(Cell::new(false));
                busy.push((request, Rc::clone(&done)));
                let group = Rc::clone(&self.group);
                self.world.spawn(async move {
                    assert_eq!(group.serve(0, request).await, Ok(()), "{request:?}");
                    done.set(true);
                });
            }
            let world = Rc::clone(&self.world);
            self.world
                .run_until(|| world.crashed() || busy.iter().all(|b| b.1.get()));
            if self.world.crashed() {
                busy.retain(|b| !b.1.get());
                return busy.into_iter().map(|b| b.0).collect();
            }
        }
        Vec::new()
    }

    /// After a restart: but for what was cut off everything is right and redundancy fits; then that is done after all.
    fn serve_again(&self, cut: Vec<HostRequest>) {
        let mut unknown = self.known.borrow().clone();
        for request in &cut {
            unknown[request.at as usize..(request.at + request.len) as usize].fill(false);
        }
        let known = self.known.replace(unknown);
        self.check();
        self.redundancy_fits();
        *self.known.borrow_mut() = known;
        for request in cut {
            let group = Rc::clone(&self.group);
            let result = self
                .world
                .block_on(async move { group.serve(0, request).await });
            assert_eq!(result, Ok(()));
        }
    }

    fn redundancy_fits(&self) {
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
        let scrub = self.group.status().scrub.unwrap();
        assert_eq!((scrub.bad, scrub.unreadable), (0, 0), "{:?}", scrub.stripes);
    }
}

fn stripe_of(level: Level, n: u8, chunk: u64) -> u64 {
    let geometry = lunar_engine::geometry::Geometry::new(level, usize::from(n), chunk, 64 << 20);
    match level {
        Level::Raid0 | Level::Linear => 1,
        _ => geometry.unwrap().stripe_bytes(),
    }
}

/// Given members of every kind, when writes, discards and zeroing are mixed, then what is read is what the model says,
/// redundancy fits, and it reads the same with a member that cannot be read.
#[test]
fn erased_and_written_reads_as_the_model_says() {
    for (seed, (level, n, chunk)) in (800..).zip(SHAPES) {
        for members in [
            Members::GiveBack,
            Members::Keep,
            Members::Refuse,
            Members::Break,
        ] {
            let is_plain = matches!(level, Level::Raid0 | Level::Linear);
            // A discard where nothing protects, of a member that keeps its space, leaves what is there.
            if is_plain && !matches!(members, Members::GiveBack) {
                continue;
            }
            eprintln!("{members:?}");
            let rig = rig(seed + round(), level, n, chunk, true);
            rig.set(members);
            rig.mixed(60, stripe_of(level, n, chunk));
            rig.check();
            assert!(rig.stores[0].zeroed.get() > 0);
            let status = rig.group.status();
            let is_well = |m: &MemberStatus| m.write_errors == 0 && m.state == MemberState::InSync;
            assert!(status.members.iter().all(is_well), "{:?}", status.members);
            if !is_plain {
                rig.redundancy_fits();
                rig.without_each(&[]);
            }
        }
    }
}

/// Given a group that loses a member, when it is erased and written degraded and while the other disk is filled, then
/// all reads as the model says, and redundancy fits in the end.
#[test]
fn erase_degraded_and_during_a_rebuild() {
    for (seed, (level, n, chunk)) in (820..).zip(SHAPES.into_iter().skip(2)) {
        for lost in [0, n - 1] {
            let mut rig = rig(seed + round(), level, n, chunk, true);
            let stripe = stripe_of(level, n, chunk);
            rig.mixed(10, stripe);
            rig.stores[usize::from(lost)].faults.dead.set(true);
            rig.mixed(15, stripe);
            rig.check();
            let fresh = Store::new(DISK, 0x77);
            rig.group.set_rebuild_rate(Some(1 << 20), Some(4 << 20));
            rig.replace(u16::from(lost), 40, &fresh);
            rig.stores[usize::from(lost)] = fresh;
            rig.mixed(40, stripe);
            rig.check();
            rig.group.set_rebuild_rate(None, Some(1 << 40));
            rig.wait_synced();
            rig.redundancy_fits();
            rig.check();
            let other = usize::from((lost + 1) % n);
            rig.stores[other].faults.dead.set(true);
            rig.check();
        }
    }
}

/// Given a process that dies at a drawn I/O, when the next one comes up, then what nobody was changing is right before
/// anything is issued again, redundancy fits, and afterwards all is as asked for.
#[test]
fn erase_killed_anywhere_leaves_redundancy_right() {
    for (seed, (level, n, chunk)) in (840..).zip(SHAPES.into_iter().skip(2)) {
        for (round_, members) in
            (0..).zip([Members::GiveBack, Members::Refuse, Members::Break].repeat(3))
        {
            let mut rig = rig(seed * 100 + round_ + round(), level, n, chunk, true);
            rig.set(members);
            let stripe = stripe_of(level, n, chunk);
            rig.mixed(4, stripe);
            rig.world.crash_in.set(Some(1 + rig.world.random(300)));
            let cut = rig.mixed(1000, stripe);
            rig.world.kill();
            let memory = Rc::clone(&rig.memory);
            rig.restart(&memory, false).unwrap();
            rig.serve_again(cut);
            rig.check();
        }
    }
}

/// Given a member whose zeroing fails, when it is erased, then that member is failed and the request succeeds.
#[test]
fn member_that_fails_to_zero_is_failed() {
    let rig = rig(860, Level::Raid5, 4, 65536, true);
    rig.mixed(10, 3 * 65536);
    rig.stores[2].faults.write_errors.set(true);
    rig.mixed(10, 3 * 65536);
    rig.check();
    assert_eq!(rig.group.status().members[2].state, MemberState::Faulty);
}

const NEW: LuUuid = LuUuid::from_bytes([4; 16]);
const REST: LuUuid = LuUuid::from_bytes([5; 16]);

impl Rig {
    /// Takes all space but that of the LU, and deletes the LU: a new one of its size is where it was.
    fn leave_its_space(&self) {
        let group = Rc::clone(&self.group);
        self.world.block_on(async move {
            group.lu_create(REST, "rest", LuSize::Max, 1).await.unwrap();
            group.lu_delete(LU).await.unwrap();
        });
    }

    /// As `check`, of the LU with this handle.
    fn check_lu(&self, lu: u16) {
        for at in (0..LU_BYTES).step_by(512 << 10) {
            self.world.pages.borrow_mut()[63] = vec![0; 512 << 10];
            let group = Rc::clone(&self.group);
            let request = Self::request(63, HostVerb::Read, at, 512 << 10);
            let read = self
                .world
                .block_on(async move { group.serve(lu, request).await });
            assert_eq!(read, Ok(()));
            let bytes = self.world.pages.borrow()[63].clone();
            let (model, known) = (self.model.borrow(), self.known.borrow());
            let wrong = bytes.iter().zip(at as usize..);
            let wrong = wrong.filter(|(byte, i)| known[*i] && **byte != model[*i]);
            assert_eq!(wrong.count(), 0, "at {at}");
        }
    }

    fn has(&self, lu: LuUuid) -> bool {
        self.group.lus().iter().any(|(_, status)| status.lu == lu)
    }
}

async fn create_zeroed(group: Rc<RaidGroup<Sim>>) -> Result<u16, lunar_api::ApiError> {
    let size = LuSize::Bytes(LU_BYTES);
    group.lu_create_zeroed(NEW, "new", size, 32).await
}

/// Given the space of a deleted LU, when a LU is made of it that is to read as zero, then it does, also without a
/// member, and the deleted one cannot come back; another that is made meanwhile takes none of its space.
#[test]
fn erase_before_a_lu_is_there_leaves_zeroes() {
    for (seed, (level, n, chunk)) in (870..).zip(SHAPES) {
        let rig = rig(seed, level, n, chunk, true);
        rig.mixed(10, stripe_of(level, n, chunk));
        rig.leave_its_space();
        let free = rig.group.status().free;
        let made = Rc::new(Cell::new(None));
        let (group, to) = (Rc::clone(&rig.group), Rc::clone(&made));
        rig.world
            .spawn(async move { to.set(Some(create_zeroed(group).await.is_ok())) });
        let group = Rc::clone(&rig.group);
        rig.world.run_until(move || group.status().free < free);
        assert_eq!(made.get(), None, "its space is taken before it is there");
        let under_way = rig.group.status().zeroing;
        // It has whole stripes.
        let taken = free - rig.group.status().free;
        let under_way = under_way.iter().map(|z| (z.name.as_str(), z.done, z.total));
        assert_eq!(under_way.collect::<Vec<_>>(), [("new", 0, taken)]);
        let group = Rc::clone(&rig.group);
        let other = rig.world.block_on(async move {
            let lu = LuUuid::from_bytes([6; 16]);
            group
                .lu_create(lu, "other", LuSize::Bytes(LU_BYTES), 1)
                .await
        });
        assert!(other.is_err(), "there is no space for it");
        rig.world.run_until(|| made.get().is_some());
        assert_eq!(made.get(), Some(true));
        assert_eq!(rig.group.status().zeroing, []);
        rig.model.borrow_mut().fill(0);
        rig.known.borrow_mut().fill(true);
        rig.check();
        assert!(rig.group.deleted_lus().is_empty());
        if !matches!(level, Level::Raid0 | Level::Linear) {
            rig.redundancy_fits();
            rig.without_each(&[]);
        }
    }
}

/// Given a process that dies while a LU is made that is to read as zero, when the next one comes up, then the LU is
/// there and reads as zero, or it is not there; and the deleted one that had its space has all its bytes, or is gone.
#[test]
fn erase_before_a_lu_is_there_killed_anywhere() {
    let mut seen = [0; 3];
    for (seed, (level, n, chunk)) in (890..).zip(SHAPES) {
        for turn in 0..12 {
            let mut rig = rig(seed * 100 + turn + round(), level, n, chunk, true);
            rig.mixed(6, stripe_of(level, n, chunk));
            rig.leave_its_space();
            rig.world.crash_in.set(Some(1 + rig.world.random(160)));
            let group = Rc::clone(&rig.group);
            let _ = rig.world.try_block_on(create_zeroed(group));
            rig.world.kill();
            let memory = Rc::clone(&rig.memory);
            rig.restart(&memory, false).unwrap();
            if rig.has(NEW) {
                seen[0] += 1;
                rig.model.borrow_mut().fill(0);
                rig.known.borrow_mut().fill(true);
            } else if rig.group.deleted_lus().is_empty() {
                seen[1] += 1;
                continue;
            } else {
                seen[2] += 1;
                let group = Rc::clone(&rig.group);
                let back = rig
                    .world
                    .block_on(async move { group.lu_undelete(LU).await });
                assert!(back.is_ok());
            }
            let (at, _) = *(rig.group.lus().iter())
                .find(|(_, status)| status.lu != REST)
                .unwrap();
            rig.check_lu(at);
        }
    }
    assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
}

/// Given a LU that is being zeroed, when its group is stopped, then that ends well and the LU is not there.
#[test]
fn erase_before_a_lu_is_there_ends_when_the_group_stops() {
    let rig = rig(880, Level::Raid5, 4, 65536, true);
    rig.leave_its_space();
    let made = Rc::new(Cell::new(None));
    let (group, to) = (Rc::clone(&rig.group), Rc::clone(&made));
    rig.world
        .spawn(async move { to.set(Some(create_zeroed(group).await.is_ok())) });
    let store = Rc::clone(&rig.stores[0]);
    rig.world.run_until(move || store.zeroed.get() > 0);
    let group = Rc::clone(&rig.group);
    assert_eq!(
        rig.world.block_on(async move { group.stop(false).await }),
        Ok(())
    );
    assert_eq!(made.get(), Some(false));
    assert!(!rig.has(NEW));
}

/// Given a disk that is copied to another, which zeroes or does not, when it is erased and written in front of the copy
/// and behind it, then all reads as the model says, before and after the other has its place, and redundancy fits.
#[test]
fn erase_while_a_disk_is_copied() {
    let mut zeroed = 0;
    for (seed, (level, n, chunk)) in (0..).zip(SHAPES) {
        for (turn, (old, new)) in (0..).zip([
            (Members::GiveBack, Members::GiveBack),
            (Members::GiveBack, Members::Refuse),
            (Members::GiveBack, Members::Break),
            (Members::Refuse, Members::GiveBack),
            (Members::Keep, Members::Break),
        ]) {
            let is_plain = matches!(level, Level::Raid0 | Level::Linear);
            if is_plain && !matches!(old, Members::GiveBack) {
                continue;
            }
            eprintln!("{old:?} to {new:?}");
            let mut rig = rig(10_000 + seed * 10 + turn + round(), level, n, chunk, true);
            let stripe = stripe_of(level, n, chunk);
            let slot = u16::from(level != Level::Linear);
            rig.mixed(8, stripe);
            rig.stores[usize::from(slot)].set(old);
            rig.group.set_rebuild_rate(Some(1 << 20), Some(1 << 20));
            let fresh = rig.begin_replace(slot);
            fresh.set(new);
            rig.mixed(20, stripe);
            rig.wait_done(2 << 20);
            rig.mixed(30, stripe);
            rig.check();
            let status = rig.group.status();
            assert!(status.replacement.is_some(), "{}", status.reason);
            if let (Members::GiveBack, Members::GiveBack) = (old, new) {
                zeroed += fresh.zeroed.get();
            }
            rig.group.set_rebuild_rate(None, Some(1 << 40));
            if !is_plain {
                rig.mixed(60, stripe);
            }
            rig.wait_replaced(slot);
            rig.check();
            if !is_plain {
                rig.redundancy_fits();
            }
            rig.check_without_old(slot);
        }
    }
    assert!(zeroed > 0, "the disk that comes was never told to zero");
}

/// Given a disk that is copied to another, and a process that dies in the middle of it or as the other takes its
/// place, when the next one comes up, then what nobody was changing is right, redundancy fits, and afterwards all is
/// as asked for.
#[test]
fn erase_while_a_disk_is_copied_killed_anywhere() {
    let mut seen = [0; 2];
    for (seed, (level, n, chunk)) in (0..).zip(SHAPES.into_iter().skip(2)) {
        for turn in 0..8 {
            let mut rig = rig(
                11_000 + (4 << 20) + seed * 10 + turn + round(),
                level,
                n,
                chunk,
                true,
            );
            let stripe = stripe_of(level, n, chunk);
            rig.mixed(4, stripe);
            let fresh = rig.begin_replace(1);
            let total = rig.group.status().sync.unwrap().total;
            rig.wait_done(match turn % 4 {
                0 => 1 << 20,
                _ => total - (1 << 20),
            });
            rig.world.crash_in.set(Some(1 + rig.world.random(400)));
            if turn % 4 == 3 {
                // With nothing else to do the copy ends soon: some die as it does, and after.
                let group = Rc::clone(&rig.group);
                rig.world
                    .run_until(move || group.status().replacement.is_none());
            }
            let cut = match rig.world.crashed() {
                true => Vec::new(),
                false => rig.mixed(1000, stripe),
            };
            rig.world.kill();
            let memory = Rc::clone(&rig.memory);
            rig.restart(&memory, false).unwrap();
            let has_it = rig.group.status().members[1].disk != uuid(1);
            seen[usize::from(has_it)] += 1;
            rig.serve_again(cut);
            rig.wait_replaced(1);
            assert!(fresh.writes.get() > 0);
            rig.redundancy_fits();
            rig.check_without_old(1);
        }
    }
    assert!(seen.iter().all(|n| *n > 0), "{seen:?}");
}

/// Given a disk that is copied to one that refuses to zero, when a range is erased that the copy has passed, then zeroes
/// are written to that one, and it has them when it takes the place.
#[test]
fn erase_that_the_disk_to_come_refuses_is_written_to_it() {
    for (seed, (level, n, chunk)) in (0..).zip(SHAPES) {
        for (turn, new) in (0..).zip([Members::Refuse, Members::Break]) {
            let mut rig = rig(12_000 + seed * 10 + turn + round(), level, n, chunk, true);
            let slot = u16::from(level != Level::Linear);
            assert_eq!(rig.storm(60, || ()), 0);
            rig.group.set_rebuild_rate(Some(1 << 20), Some(1 << 20));
            let fresh = rig.begin_replace(slot);
            fresh.set(new);
            rig.wait_done(8 << 20);
            let (at, len) = (1 << 20, 2 << 20);
            let request = Rig::request(1, HostVerb::WriteZeroes { unmap: true }, at, len);
            let group = Rc::clone(&rig.group);
            let erased = rig
                .world
                .block_on(async move { group.serve(0, request).await });
            assert_eq!(erased, Ok(()));
            let range = at as usize..(at + len) as usize;
            rig.model.borrow_mut()[range.clone()].fill(0);
            rig.known.borrow_mut()[range].fill(true);
            assert!(rig.group.status().replacement.is_some());
            rig.group.set_rebuild_rate(None, Some(1 << 40));
            rig.wait_replaced(slot);
            rig.check_without_old(slot);
        }
    }
}

/// Given a write under way, when a copy is whole, then it does not take its place before the write has ended: the
/// in-flight log names the disk that leaves.
#[test]
fn erase_under_way_keeps_a_copy_from_its_place() {
    let mut rig = rig(12_900, Level::Raid5, 4, 65536, true);
    rig.begin_replace(1);
    let total = rig.group.status().sync.unwrap().total;
    rig.wait_done(total - (1 << 20));
    // The group is dirty: what the slow disk gets next is the write.
    rig.mixed(1, 3 * 65536);
    let slow = Rc::clone(&rig.stores[0]);
    slow.faults.slow.set(true);
    let request = Rig::request(1, HostVerb::WriteZeroes { unmap: true }, 0, 3 << 20);
    let (group, done) = (Rc::clone(&rig.group), Rc::new(Cell::new(false)));
    let to = Rc::clone(&done);
    rig.world.spawn(async move {
        assert_eq!(group.serve(0, request).await, Ok(()));
        to.set(true);
    });
    let held = Rc::clone(&slow);
    rig.world.run_until(move || held.held() > 0);
    slow.faults.slow.set(false);
    rig.sleep(10);
    assert!(!done.get());
    assert_eq!(rig.group.status().members[1].disk, uuid(1));
    slow.release(&rig.world);
    rig.wait_replaced(1);
    assert!(done.get());
}
