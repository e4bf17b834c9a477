//! What gets larger while it is in use: a LU, and a group whose members were replaced by larger ones.

use lunar_api::target::ScrubOrder;
use lunar_engine::view::{QueueLu, QueueServer, Served};

use super::*;

const OTHER: LuUuid = LuUuid::from_bytes([4; 16]);
const MORE: u64 = 8 << 20;

impl Rig {
    fn resize(&self, bytes: u64) -> Result<u16, String> {
        let group = Rc::clone(&self.group);
        let resized = async move { group.lu_resize(LU, LuSize::Bytes(bytes)).await };
        self.world
            .block_on(resized)
            .map_err(|error| error.causes.join("; "))
    }

    fn capacity(&self) -> u64 {
        self.group.lus()[0].1.capacity
    }

    pub(crate) fn write(&self, at: u64, bytes: Vec<u8>) -> Result<(), i32> {
        let request = Self::request(62, HostVerb::Write { fua: false }, at, bytes.len() as u64);
        self.world.pages.borrow_mut()[62] = bytes;
        let group = Rc::clone(&self.group);
        let written = async move { group.serve(0, request).await };
        self.world.block_on(written).map_err(|errno| errno.0)
    }

    /// Another LU right behind `vol`.
    fn add_other(&self) {
        let group = Rc::clone(&self.group);
        let made = async move { group.lu_create(OTHER, "other", LuSize::Bytes(1), 32).await };
        assert_eq!(self.world.block_on(made), Ok(1));
    }
}

#[test]
fn lu_that_grows_under_writes_keeps_what_it_has_and_serves_what_it_gets() {
    for (i, (level, n)) in (0..).zip([
        (Level::Raid0, 3),
        (Level::Raid1, 2),
        (Level::Raid5, 4),
        (Level::Raid6, 4),
        (Level::Raid10, 3),
    ]) {
        let mut rig = rig(1100 + i + round(), level, n, 65536, true);
        rig.add_other();
        let grown = Rc::new(Cell::new(false));
        let (group, ended) = (Rc::clone(&rig.group), Rc::clone(&grown));
        let world = Rc::clone(&rig.world);
        let begin = move || {
            let (group, ended) = (Rc::clone(&group), Rc::clone(&ended));
            world.spawn(async move {
                group.lu_resize(LU, LuSize::Bytes(MORE)).await.unwrap();
                ended.set(true);
            });
        };
        let had = rig.capacity();
        assert_eq!(rig.write(had, vec![1; 4096]), Err(5));
        assert_eq!(rig.storm(200, begin), 0);
        rig.world.run_until(move || grown.get());
        rig.check();
        let has = rig.capacity();
        assert!((MORE..MORE + (2 << 20)).contains(&has), "{has}");
        let writes = rig.group.lus()[0].1.counters.writes;
        assert_eq!(writes, 200, "counters go on");
        // Over the old end, and the last bytes.
        for (at, byte) in [(rig.capacity() - 65536, 9), (had - 65536, 8)] {
            let bytes = vec![byte; 65536 * usize::from(10 - byte)];
            assert_eq!(rig.write(at, bytes.clone()), Ok(()));
            assert_eq!(rig.read(at, bytes.len() as u64), Ok(bytes), "{level:?}");
        }
        assert_eq!(rig.write(has - 2048, vec![1; 4096]), Err(5));
        assert_eq!(rig.resize(has), Ok(0));
        let refused = rig.resize(LU_BYTES).unwrap_err();
        assert!(refused.contains("only grows"), "{refused}");
        assert!(rig.resize(1 << 40).unwrap_err().contains("free"));
        assert_eq!(rig.capacity(), has);
        let (group, stop) = (Rc::clone(&rig.group), memory());
        assert_eq!(
            rig.world.block_on(async move { group.stop(false).await }),
            Ok(())
        );
        rig.restart(&stop, false).unwrap();
        assert_eq!(rig.capacity(), has);
        assert_eq!(rig.read(has - 65536, 65536), Ok(vec![9; 65536]));
    }
}

/// Given a process that is killed at every I/O of a resize in turn, then the LU has its old size or its new one, all that
/// it had, and no byte of its neighbour.
#[test]
fn lu_has_the_old_size_or_the_new_one_wherever_a_resize_was_killed() {
    let mut sizes = Vec::new();
    for at in 1.. {
        let mut rig = rig(1200, Level::Raid5, 4, 65536, true);
        rig.add_other();
        assert_eq!(rig.storm(20, || ()), 0);
        let before = rig.capacity();
        let ended = Rc::new(Cell::new(false));
        let (group, done) = (Rc::clone(&rig.group), Rc::clone(&ended));
        rig.world.crash_in.set(Some(at));
        rig.world.spawn(async move {
            group.lu_resize(LU, LuSize::Bytes(MORE)).await.unwrap();
            done.set(true);
        });
        let world = Rc::clone(&rig.world);
        let over = Rc::clone(&ended);
        rig.world.run_until(move || world.crashed() || over.get());
        if ended.get() {
            break;
        }
        rig.world.kill();
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        rig.check();
        let now = rig.capacity();
        assert!(now == before || now >= MORE, "{now}");
        sizes.push(now);
        // Whatever it has, it can use, and be given the rest.
        assert_eq!(rig.resize(MORE), Ok(0));
        assert_eq!(rig.write(MORE - 4096, vec![3; 4096]), Ok(()));
        assert_eq!(rig.read(MORE - 4096, 4096), Ok(vec![3; 4096]));
        rig.check();
    }
    let small = sizes.iter().filter(|size| **size < MORE).count();
    assert!(small > 0 && small < sizes.len(), "{sizes:?}");
}

#[test]
fn queue_thread_forwards_what_it_does_not_know_of_a_lu_yet() {
    let rig = rig(1300, Level::Raid0, 2, 65536, true);
    let server = QueueServer::default();
    let (view, _) = rig.group.view();
    let disks = (0..)
        .zip(&rig.stores)
        .map(|(i, store)| Some(Rc::new(given(&rig.world, i, store).disk)));
    server.load(std::sync::Arc::new(view), disks.collect());
    let lu = Rc::new(QueueLu::new(rig.group.lu_extents(0).unwrap()));
    assert_eq!(rig.resize(MORE), Ok(0));
    rig.world.pages.borrow_mut()[1] = vec![5; 4096];
    let server = Rc::new(server);
    let serve = || {
        let (server, lu) = (Rc::clone(&server), Rc::clone(&lu));
        let request = Rig::request(1, HostVerb::Write { fua: false }, LU_BYTES, 4096);
        rig.world
            .block_on(async move { server.serve(&lu, request).await })
    };
    assert_eq!(serve(), Served::Forward { failed: 0 });
    lu.grow(rig.group.lu_extents(0).unwrap());
    assert_eq!(serve(), Served::Done(Ok(())));
    assert_eq!(rig.read(LU_BYTES, 4096), Ok(vec![5; 4096]));
}

/// Bytes of a larger disk.
const LARGER: usize = 96 << 20;

impl Rig {
    fn grow(&self) -> Result<(), String> {
        let group = Rc::clone(&self.group);
        self.world
            .block_on(async move { group.grow().await })
            .map_err(|error| error.causes.join("; "))
    }

    /// Has a disk replaced by a larger one that is full of something else; by copy, as it still reads.
    fn replace_larger(&mut self, slot: u16) {
        let (fresh, number) = (Store::new(LARGER, 0x77), 40 + slot as u8);
        self.replace(slot, number, &fresh);
        let group = Rc::clone(&self.group);
        self.world.run_until(move || {
            let status = group.status();
            status.sync.is_none() && status.replacement.is_none()
        });
        let member = &self.group.status().members[usize::from(slot)];
        assert_eq!(member.disk, uuid(number));
        // Durable, and the other labelled as free.
        self.sleep(1);
        self.stores[usize::from(slot)] = fresh;
        self.disks[usize::from(slot)] = number;
    }

    /// Writes here and there in the last bytes of the LU, to its very end.
    fn write_end(&self, byte: u8) {
        let end = self.capacity();
        for i in 1..20 {
            let bytes = vec![byte + i as u8; 12288];
            assert_eq!(self.write(end - i * 200_704, bytes), Ok(()));
        }
        assert_eq!(self.write(end - 512, vec![byte; 512]), Ok(()));
    }

    fn check_end(&self, byte: u8, when: &str) {
        let end = self.capacity();
        for i in 1..20 {
            let bytes = vec![byte + i as u8; 12288];
            assert_eq!(self.read(end - i * 200_704, 12288), Ok(bytes), "{when}");
        }
        assert_eq!(self.read(end - 512, 512), Ok(vec![byte; 512]), "{when}");
    }

    /// What [`Rig::write_end`] wrote, and what was there before, are read without each member.
    fn check_without_each(&self, byte: u8) {
        for (i, store) in self.stores.iter().enumerate() {
            // All of the data, not the superblocks.
            let sectors = (16 << 11)..(self.stores[i].len() / 512 - 1024);
            *store.faults.bad.borrow_mut() = sectors.collect();
            store.faults.worn.set(true);
            self.check_end(byte, &format!("without {i}"));
            self.check();
            store.faults.bad.borrow_mut().clear();
            store.faults.worn.set(false);
            // It was failed for that, or has it on its list.
            let group = Rc::clone(&self.group);
            let slot = i as u16;
            if group.status().state != GroupState::Optimal {
                self.replace(slot, self.disks[i], store);
                self.wait_synced();
            }
            self.scrub_all();
        }
    }

    /// Both superblocks of every member are right, where it says that they are.
    fn check_superblocks(&self) {
        for store in &self.stores {
            let mut bytes = [0; 4096];
            let device_size = store.len();
            store.read(4096, &mut bytes);
            let offset = 4096;
            let first = decode(
                &bytes,
                At {
                    offset,
                    device_size,
                },
            )
            .unwrap();
            let offset = first.end_copy;
            store.read(offset, &mut bytes);
            assert_eq!(
                decode(
                    &bytes,
                    At {
                        offset,
                        device_size
                    }
                )
                .unwrap(),
                first
            );
        }
    }
}

#[test]
fn group_of_larger_members_grows_under_writes_and_the_new_part_gets_its_redundancy() {
    for (i, (level, n)) in (0..).zip([
        (Level::Raid0, 2),
        (Level::Raid1, 2),
        (Level::Raid5, 3),
        (Level::Raid6, 4),
        (Level::Raid10, 3),
    ]) {
        let mut rig = rig(1400 + i + round(), level, n, 65536, true);
        assert_eq!(rig.storm(40, || ()), 0);
        let before = rig.group.status();
        assert_eq!(before.capacity_max, before.capacity);
        for slot in 0..u16::from(n) {
            assert_eq!(
                rig.group.status().capacity_max,
                before.capacity,
                "{level:?}"
            );
            rig.replace_larger(slot);
        }
        let most = rig.group.status().capacity_max;
        assert_eq!(rig.group.status().capacity, before.capacity);
        let grown = Rc::new(Cell::new(false));
        let (group, world, ended) = (
            Rc::clone(&rig.group),
            Rc::clone(&rig.world),
            Rc::clone(&grown),
        );
        let begin = move || {
            let (group, ended) = (Rc::clone(&group), Rc::clone(&ended));
            world.spawn(async move {
                group.grow().await.unwrap();
                let all = group.lu_resize(LU, LuSize::Max).await;
                assert_eq!(all, Ok(0));
                ended.set(true);
            });
        };
        assert_eq!(rig.storm(80, begin), 0);
        rig.world.run_until(move || grown.get());
        let status = rig.group.status();
        assert_eq!((status.capacity, status.capacity_max), (most, most));
        assert_eq!(status.member_bytes % 65536, 0);
        // Whole MiB of a member, less what its own areas take: as much as a new group of such disks has.
        assert_eq!(
            status.member_bytes,
            (LARGER as u64) - (6 << 20),
            "{level:?}"
        );
        rig.write_end(7);
        rig.check_end(7, "while it is synced");
        rig.wait_synced();
        assert_eq!(rig.grow(), Ok(()), "once more is nothing");
        rig.check_superblocks();
        rig.check();
        let (group, stop) = (Rc::clone(&rig.group), memory());
        let stopped = async move { group.stop(false).await };
        assert_eq!(rig.world.block_on(stopped), Ok(()));
        rig.restart(&stop, false).unwrap();
        assert_eq!(rig.group.status().capacity, most);
        assert!(rig.group.status().sync.is_none());
        rig.check_end(7, "after a restart");
        if level != Level::Raid0 {
            rig.check_without_each(7);
        }
        rig.check_superblocks();
    }
}

/// Given a process that is killed at an I/O while a group grows and its new part is synced, then it has the old size or the
/// new one, everything reads as written, and in the end without each member too.
#[test]
fn group_killed_while_it_grows_has_the_old_size_or_the_new_one_and_ends_its_sync() {
    let mut sizes = Vec::new();
    // What is in flight has happened or has not: the first write of a superblock several times.
    let places = [1; 12].into_iter().chain(2..6).chain((20..600).step_by(97));
    for (i, at) in (0..).zip(places) {
        let larger = [
            Store::new(LARGER, 0),
            Store::new(LARGER, 0),
            Store::new(DISK, 0),
        ];
        let seed = 1500 + i;
        let mut rig = rig_on(seed, Level::Raid5, larger.into(), 65536, true);
        assert_eq!(rig.storm(20, || ()), 0);
        rig.replace_larger(2);
        let before = rig.group.status().capacity;
        rig.world.crash_in.set(Some(at));
        let group = Rc::clone(&rig.group);
        rig.world.spawn(async move { group.grow().await.unwrap() });
        let world = Rc::clone(&rig.world);
        rig.world.run_until(move || world.crashed());
        rig.world.kill();
        let memory = Rc::clone(&rig.memory);
        rig.restart(&memory, false).unwrap();
        rig.check();
        let now = rig.group.status();
        assert!(now.capacity == before || now.capacity == now.capacity_max);
        sizes.push(now.capacity);
        let (world, group) = (Rc::clone(&rig.world), Rc::clone(&rig.group));
        assert_eq!(world.block_on(async move { group.grow().await }), Ok(()));
        let group = Rc::clone(&rig.group);
        let resized = async move { group.lu_resize(LU, LuSize::Max).await };
        assert_eq!(world.block_on(resized), Ok(0));
        rig.write_end(9);
        rig.wait_synced();
        rig.check_without_each(9);
    }
    let new = sizes.iter().max().unwrap();
    let old = sizes.iter().filter(|size| *size < new).count();
    assert!(old > 0 && old < sizes.len(), "{sizes:?}");
}

#[test]
fn group_grows_only_when_all_members_are_in_sync_and_nothing_goes_over_its_stripes() {
    let stores = [
        Store::new(LARGER, 0),
        Store::new(LARGER, 0),
        Store::new(DISK, 0),
    ];
    let mut rig = rig_on(1600, Level::Raid5, stores.into(), 65536, true);
    assert_eq!(rig.grow(), Ok(()), "nothing to grow");
    rig.replace_larger(2);
    let capacity = rig.group.status().capacity;
    let refused = |rig: &Rig, why: &str| {
        let said = rig.grow().unwrap_err();
        assert!(said.contains(why), "{said}");
        assert_eq!(rig.group.status().capacity, capacity);
    };
    let scrub = |rig: &Rig, order| {
        let group = Rc::clone(&rig.group);
        let ordered = async move { group.scrub(order).await };
        assert_eq!(rig.world.block_on(ordered), Ok(()));
    };
    let (repair, from, rate) = (false, 0, Some(1 << 20));
    scrub(&rig, ScrubOrder::Start { repair, from, rate });
    refused(&rig, "scrub");
    scrub(&rig, ScrubOrder::Cancel);
    let group = Rc::clone(&rig.group);
    let failed = async move { group.member_fail(uuid(0), "by hand").await };
    assert_eq!(rig.world.block_on(failed), Ok(()));
    refused(&rig, "by hand");
    rig.replace(0, 0, &rig.stores[0]);
    refused(&rig, "rebuilding");
    rig.wait_synced();
    assert_eq!(rig.grow(), Ok(()));
    assert!(rig.group.status().capacity > capacity);
    rig.check();
}

#[test]
fn linear_group_grows_by_its_last_member() {
    let mut rig = rig(1700, Level::Linear, 2, 65536, true);
    assert_eq!(rig.storm(20, || ()), 0);
    let before = rig.group.status().capacity;
    rig.replace_larger(0);
    assert_eq!(rig.group.status().capacity_max, before);
    rig.replace_larger(1);
    assert_eq!(rig.grow(), Ok(()));
    let now = rig.group.status().capacity;
    assert_eq!(now, before + (LARGER - DISK) as u64);
    let group = Rc::clone(&rig.group);
    let resized = async move { group.lu_resize(LU, LuSize::Max).await };
    assert_eq!(rig.world.block_on(resized), Ok(0));
    rig.write_end(5);
    rig.check();
    let stop = memory();
    let group = Rc::clone(&rig.group);
    let stopped = async move { group.stop(false).await };
    assert_eq!(rig.world.block_on(stopped), Ok(()));
    rig.restart(&stop, false).unwrap();
    assert_eq!(rig.capacity(), now);
    rig.check_end(5, "after a restart");
    rig.check();
    rig.check_superblocks();
}

#[test]
fn resize_that_ended_with_an_error_is_done_by_the_next() {
    let rig = rig(95, Level::Raid0, 2, 65536, true);
    let store = Rc::clone(&rig.stores[1]);
    let resized = Rc::new(Cell::new(None));
    let resize = || {
        let (group, to) = (Rc::clone(&rig.group), Rc::clone(&resized));
        to.set(None);
        rig.world.spawn(async move {
            let size = LuSize::Bytes(2 * LU_BYTES);
            to.set(Some(group.lu_resize(LU, size).await.is_ok()));
        });
    };
    // The configuration is on the disk, the superblock is not.
    store.faults.slow.set(true);
    resize();
    let held = || rig.world.run_until(|| store.held() > 0);
    held();
    store.release(&rig.world);
    held();
    store.faults.write_errors.set(true);
    store.faults.slow.set(false);
    store.release(&rig.world);
    rig.world.run_until(|| resized.get().is_some());
    assert_eq!(resized.get(), Some(false));
    store.faults.write_errors.set(false);
    resize();
    rig.world.run_until(|| resized.get().is_some());
    assert_eq!(resized.get(), Some(true));
    assert_eq!(rig.group.lus()[0].1.capacity, 2 * LU_BYTES);
    assert!(rig.read(2 * LU_BYTES - 4096, 4096).is_ok());
}
