//! Queue threads beside the group: what they read by pictures of it is never older than what was acknowledged.

use std::sync::Arc;

use lunar_engine::limits::GRAIN;
use lunar_engine::view::{QueueLu, QueueServer, Served};

use super::*;
use crate::world::MemDisk;

/// A queue thread: it has the members on a ring of its own, and takes pictures as late as it likes.
struct Follower {
    world: Rc<World>,
    group: Rc<RaidGroup<Sim>>,
    /// By number: the disks, as the queue thread has them.
    stores: RefCell<Vec<(u8, Rc<Store>)>>,
    server: QueueServer<MemDisk>,
    lu: QueueLu,
}

impl Follower {
    fn new(rig: &Rig) -> Rc<Self> {
        let stores = rig.disks.iter().copied().zip(rig.stores.iter().cloned());
        let follower = Rc::new(Self {
            world: Rc::clone(&rig.world),
            group: Rc::clone(&rig.group),
            stores: RefCell::new(stores.collect()),
            server: QueueServer::default(),
            lu: QueueLu::new(rig.group.lu_extents(0).unwrap()),
        });
        rig.group.view_confirmed(0);
        follower.take();
        follower
    }

    /// Looks at the present picture.
    fn load(&self) -> u64 {
        let (view, disks) = self.group.view();
        let version = view.version;
        let stores = self.stores.borrow();
        let members = self.group.status().members;
        // Not the owner's handle, which it gives up when the member fails: the disk may still answer.
        let own = disks.iter().zip(&members).map(|(disk, member)| {
            disk.as_ref()?;
            let (n, store) = stores.iter().find(|(n, _)| uuid(*n) == member.disk)?;
            Some(Rc::new(given(&self.world, *n, store).disk))
        });
        self.server.load(Arc::new(view), own.collect());
        version
    }

    /// Takes the present picture and confirms it.
    fn take(&self) -> u64 {
        let version = self.load();
        assert!(self.server.is_settled());
        self.group.view_confirmed(version);
        version
    }

    /// Takes every picture, late, and confirms it when it may.
    async fn take_all(self: Rc<Self>) {
        let clock = SimClock(Rc::clone(&self.world));
        let mut seen = 0;
        loop {
            self.group.view_after(seen).await;
            clock.sleep(self.world.random(40_000_000)).await;
            seen = self.load();
            while !self.server.is_settled() {
                clock.sleep(100_000).await;
            }
            self.group.view_confirmed(seen);
        }
    }

    async fn serve(&self, request: HostRequest) -> (Result<(), i32>, bool) {
        match self.server.serve(&self.lu, request).await {
            Served::Done(result) => (result.map_err(|errno| errno.0), true),
            Served::Forward { failed } => {
                let request = HostRequest {
                    zero_copy: false,
                    ..request
                };
                let result = self.group.serve_after(0, request, failed).await;
                (result.map_err(|errno| errno.0), false)
            }
        }
    }
}

fn block(at: u64, tag: u16, verb: HostVerb) -> HostRequest {
    Rig::request(tag, verb, at * GRAIN, GRAIN)
}

/// Given a queue thread that has not confirmed, when a member is failed and a write is sent, then the write is not
/// answered; it is when the queue thread looks at the new picture, and then nobody reads the failed member.
#[test]
fn write_waits_until_nobody_reads_a_member_that_misses_it() {
    for (level, n) in [(Level::Raid1, 2), (Level::Raid5, 4)] {
        let rig = rig(5, level, n, 65536, true);
        let follower = Follower::new(&rig);
        let slot = 0;
        let failed = Rc::new(Cell::new(false));
        let (group, ended) = (Rc::clone(&rig.group), Rc::clone(&failed));
        rig.world.spawn(async move {
            group.member_fail(uuid(slot), "by hand").await.unwrap();
            ended.set(true);
        });
        let written = Rc::new(Cell::new(false));
        let (group, ended) = (Rc::clone(&rig.group), Rc::clone(&written));
        rig.world.pages.borrow_mut()[1] = vec![7; 4096];
        rig.world.spawn(async move {
            let write = block(0, 1, HostVerb::Write { fua: false });
            assert_eq!(group.serve(0, write).await, Ok(()));
            ended.set(true);
        });
        rig.sleep(20);
        assert!(!failed.get() && !written.get(), "{level:?}: not confirmed");
        follower.take();
        rig.sleep(1);
        assert!(failed.get() && written.get(), "{level:?}: confirmed");
        let before = rig.stores[usize::from(slot)].reads.get();
        for at in 0..64 {
            rig.world.pages.borrow_mut()[2] = vec![0; 4096];
            let follower = Rc::clone(&follower);
            let read = async move { follower.serve(block(at, 2, HostVerb::Read)).await };
            assert_eq!(rig.world.block_on(read).0, Ok(()));
            let expected = if at == 0 { 7 } else { 0 };
            assert_eq!(rig.world.pages.borrow()[2], vec![expected; 4096], "{at}");
        }
        assert_eq!(rig.stores[usize::from(slot)].reads.get(), before);
    }
}

/// Given a queue thread, when a member answers its read with an error, then the owner repairs it from redundancy, and
/// the next read is served by the queue thread again.
#[test]
fn read_error_of_a_queue_thread_is_repaired_by_the_owner() {
    let rig = rig(6, Level::Raid5, 4, 65536, true);
    let follower = Follower::new(&rig);
    // The first member holds the first chunk.
    let data = rig.group.status().members[0].data_offset / 512;
    *rig.stores[0].faults.bad.borrow_mut() = (data..data + 128).step_by(8).collect();
    let mut served = Vec::new();
    for store in &rig.stores[1..] {
        store.faults.bad.borrow_mut().clear();
    }
    for _ in 0..2 {
        for at in 0..48 {
            rig.world.pages.borrow_mut()[2] = vec![1; 4096];
            let follower = Rc::clone(&follower);
            let read = async move { follower.serve(block(at, 2, HostVerb::Read)).await };
            let (result, here) = rig.world.block_on(read);
            assert_eq!(result, Ok(()));
            assert_eq!(rig.world.pages.borrow()[2], vec![0; 4096]);
            served.push(here);
        }
    }
    let forwarded = served[..48].iter().filter(|here| !**here).count();
    assert_eq!(forwarded, 16, "the chunk of the bad member");
    assert!(served[48..].iter().all(|here| *here), "repaired");
    let errors: u64 = follower
        .server
        .counts()
        .iter()
        .map(|c| c.read_errors.get())
        .sum();
    assert_eq!(errors, 16);
}

/// Writers and readers of some blocks by way of a queue thread that takes pictures late.
struct Storm {
    follower: Rc<Follower>,
    answered: Rc<Vec<Cell<u8>>>,
    ending: Rc<Cell<bool>>,
    running: Rc<Cell<u32>>,
    /// Requests that the queue thread ended by itself.
    reads: Rc<Cell<u32>>,
    writes: Rc<Cell<u32>>,
}

impl Storm {
    const BLOCKS: u64 = 24;

    /// A writer for every block, and readers of all; what a read gives is never older than what was answered before.
    fn start(rig: &Rig, what: &str) -> Self {
        let storm = Self {
            follower: Follower::new(rig),
            answered: Rc::new((0..Self::BLOCKS).map(|_| Cell::new(0)).collect()),
            ending: Rc::default(),
            running: Rc::default(),
            reads: Rc::default(),
            writes: Rc::default(),
        };
        for at in 0..Self::BLOCKS {
            let (follower, answered) = (Rc::clone(&storm.follower), Rc::clone(&storm.answered));
            let (ending, running) = (Rc::clone(&storm.ending), Rc::clone(&storm.running));
            let here = Rc::clone(&storm.writes);
            running.set(running.get() + 1);
            rig.world.spawn(async move {
                let (world, tag) = (Rc::clone(&follower.world), at as u16);
                for value in 1..=250 {
                    if ending.get() {
                        break;
                    }
                    world.pages.borrow_mut()[usize::from(tag)] = vec![value; 4096];
                    let write = block(at, tag, HostVerb::Write { fua: false });
                    let (result, is_here) = follower.serve(write).await;
                    assert_eq!(result, Ok(()));
                    here.set(here.get() + u32::from(is_here));
                    answered[at as usize].set(value);
                    let pause = world.random(3_000_000);
                    SimClock(Rc::clone(&world)).sleep(pause).await;
                }
                running.set(running.get() - 1);
            });
        }
        for reader in 0..8 {
            let (follower, answered) = (Rc::clone(&storm.follower), Rc::clone(&storm.answered));
            let (ending, running) = (Rc::clone(&storm.ending), Rc::clone(&storm.running));
            let (here, what) = (Rc::clone(&storm.reads), what.to_owned());
            running.set(running.get() + 1);
            rig.world.spawn(async move {
                let (world, tag) = (Rc::clone(&follower.world), 64 + reader);
                while !ending.get() {
                    let at = world.random(Self::BLOCKS);
                    let least = answered[at as usize].get();
                    world.pages.borrow_mut()[usize::from(tag)] = vec![0; 4096];
                    let (result, is_here) = follower.serve(block(at, tag, HostVerb::Read)).await;
                    assert_eq!(result, Ok(()), "{what}");
                    here.set(here.get() + u32::from(is_here));
                    let seen = world.pages.borrow()[usize::from(tag)].clone();
                    let oldest = seen.iter().min().copied().unwrap();
                    assert!(
                        oldest >= least,
                        "{what}: block {at} is {oldest}, was {least}"
                    );
                    let pause = 1 + world.random(1_000_000);
                    SimClock(Rc::clone(&world)).sleep(pause).await;
                }
                running.set(running.get() - 1);
            });
        }
        rig.world.spawn(Rc::clone(&storm.follower).take_all());
        storm
    }

    fn pause(&self, ms: u64) {
        let clock = SimClock(Rc::clone(&self.follower.world));
        let sleep = async move { clock.sleep(ms * 1_000_000).await };
        self.follower.world.block_on(sleep);
    }

    fn fail(&self, disk: u8) {
        let group = Rc::clone(&self.follower.group);
        let fail = async move { group.member_fail(uuid(disk), "by hand").await };
        assert_eq!(self.follower.world.block_on(fail), Ok(()));
    }

    fn end(&self) {
        self.ending.set(true);
        let running = Rc::clone(&self.running);
        self.follower.world.run_until(move || running.get() == 0);
    }

    /// Every block reads as it was written last, by the owner.
    fn check(&self, what: &str) {
        for at in 0..Self::BLOCKS {
            let world = &self.follower.world;
            world.pages.borrow_mut()[1] = vec![0; 4096];
            let group = Rc::clone(&self.follower.group);
            let read = block(at, 1, HostVerb::Read);
            let result = world.block_on(async move { group.serve(0, read).await });
            assert_eq!(result, Ok(()), "{what}");
            let expected = self.answered[at as usize].get();
            assert_eq!(
                world.pages.borrow()[1],
                vec![expected; 4096],
                "{what}: block {at}"
            );
        }
    }
}

/// Given queue threads that take pictures late, when members fail, are replaced and fail again under writes, then no
/// read is older than the last write that was answered before it began.
#[test]
fn storm_never_reads_a_stale_member() {
    for seed in 0..9 {
        let levels = [(Level::Raid1, 3), (Level::Raid5, 4), (Level::Raid10, 4)];
        let (level, n) = levels[(seed % 3) as usize];
        let rig = rig(round() + 700 + seed, level, n, 4096, true);
        let storm = Storm::start(&rig, &format!("seed {seed}"));
        storm.pause(20);
        storm.fail(0);
        storm.pause(30);
        let new = Store::new(DISK, 0x5A);
        rig.replace(0, 9, &new);
        storm.follower.stores.borrow_mut().push((9, new));
        rig.wait_synced();
        storm.pause(30);
        storm.fail(1);
        storm.pause(30);
        storm.end();
        let reads = storm.reads.get();
        assert!(reads > 50, "seed {seed}: {reads} reads by picture");
    }
}

/// Given queue threads that take pictures late, when a member that reads is replaced by copying under writes, then no
/// read is older than the last write that was answered before it began, and the new disk has every write: also those
/// that queue threads did by themselves as the copy began and ended.
#[test]
fn storm_beside_a_copy_loses_no_write() {
    for seed in 0..10 {
        let levels = [
            Level::Raid0,
            Level::Linear,
            Level::Raid1,
            Level::Raid5,
            Level::Raid0,
        ];
        let level = levels[(seed % 5) as usize];
        let what = format!("seed {seed}, {level:?}");
        let rig = rig(round() + 760 + seed, level, 3, 4096, true);
        // The writes begin in the first bytes of the first member.
        let slot = 0;
        let storm = Storm::start(&rig, &what);
        storm.pause(20);
        let writes = storm.writes.get();
        let new = Store::new(DISK, 0x5A);
        storm
            .follower
            .stores
            .borrow_mut()
            .push((9, Rc::clone(&new)));
        rig.replace(slot, 9, &new);
        let group = Rc::clone(&rig.group);
        rig.world
            .run_until(move || group.status().replacement.is_none());
        assert_eq!(rig.group.status().members[0].disk, uuid(9), "{what}");
        storm.pause(60);
        storm.end();
        rig.stores[0].faults.dead.set(true);
        storm.check(&what);
        assert!(storm.reads.get() > 50, "{what}");
        let is_plain = matches!(level, Level::Raid0 | Level::Linear);
        assert_eq!(is_plain, writes > 0, "{what}: {writes} writes by picture");
    }
}

/// Given a write without redundancy, of a queue thread or of the owner, that is slow, when its disk is replaced, then nothing is copied before
/// that write has ended, and the new disk has it.
#[test]
fn copy_waits_for_writes_that_go_to_the_old_disk_alone() {
    for (level, is_owners) in [
        (Level::Raid0, false),
        (Level::Linear, false),
        (Level::Raid0, true),
        (Level::Linear, true),
    ] {
        let rig = rig(61, level, 2, 65536, true);
        let follower = Follower::new(&rig);
        rig.world.spawn(Rc::clone(&follower).take_all());
        rig.stores[0].faults.slow.set(true);
        rig.world.pages.borrow_mut()[1] = vec![9; 4096];
        let written = Rc::new(Cell::new(false));
        let (ended, queue) = (Rc::clone(&written), Rc::clone(&follower));
        rig.world.spawn(async move {
            let write = block(0, 1, HostVerb::Write { fua: false });
            match is_owners {
                true => assert_eq!(queue.group.serve(0, write).await, Ok(())),
                false => assert_eq!(queue.serve(write).await, (Ok(()), true)),
            }
            ended.set(true);
        });
        rig.sleep(1);
        assert_eq!(rig.stores[0].held(), 1);
        rig.stores[0].faults.slow.set(false);
        let new = Store::new(DISK, 0x5A);
        follower.stores.borrow_mut().push((9, Rc::clone(&new)));
        let (group, given) = (Rc::clone(&rig.group), given(&rig.world, 9, &new));
        rig.world.spawn(async move {
            assert_eq!(group.member_replace(0, given, Fill::Missed).await, Ok(()));
        });
        rig.sleep(5);
        let sync = rig.group.status().sync.unwrap();
        assert!(sync.done == 0 && !written.get(), "{level:?}: {sync:?}");
        rig.stores[0].release(&rig.world);
        let group = Rc::clone(&rig.group);
        rig.world
            .run_until(move || group.status().replacement.is_none());
        assert!(written.get());
        rig.stores[0].faults.dead.set(true);
        rig.world.pages.borrow_mut()[2] = vec![0; 4096];
        let group = Rc::clone(&rig.group);
        let read = block(0, 2, HostVerb::Read);
        let result = rig
            .world
            .block_on(async move { group.serve(0, read).await });
        assert_eq!(result, Ok(()));
        assert_eq!(rig.world.pages.borrow()[2], vec![9; 4096], "{level:?}");
    }
}
