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
    /// By slot: the disk that is there, as the queue thread has it.
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

    /// Takes the present picture and confirms it.
    fn take(&self) -> u64 {
        let (view, disks) = self.group.view();
        let version = view.version;
        let stores = self.stores.borrow();
        // Not the owner's handle, which it gives up when the member fails: the disk may still answer.
        let own = disks.iter().zip(&*stores).map(|(disk, (n, store))| {
            disk.as_ref()
                .map(|_| Rc::new(given(&self.world, *n, store).disk))
        });
        self.server.load(Arc::new(view), own.collect());
        self.group.view_confirmed(version);
        version
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

/// Given queue threads that take pictures late, when members fail, are replaced and fail again under writes, then no
/// read is older than the last write that was answered before it began.
#[test]
fn storm_never_reads_a_stale_member() {
    const BLOCKS: u64 = 24;
    for seed in 0..9 {
        let levels = [(Level::Raid1, 3), (Level::Raid5, 4), (Level::Raid10, 4)];
        let (level, n) = levels[(seed % 3) as usize];
        let rig = rig(round() + 700 + seed, level, n, 4096, true);
        let follower = Follower::new(&rig);
        let answered: Rc<Vec<Cell<u8>>> = Rc::new((0..BLOCKS).map(|_| Cell::new(0)).collect());
        let ending = Rc::new(Cell::new(false));
        let running = Rc::new(Cell::new(0_u32));
        let here = Rc::new(Cell::new(0_u32));
        // A writer for every block.
        for at in 0..BLOCKS {
            let (group, world) = (Rc::clone(&rig.group), Rc::clone(&rig.world));
            let (answered, ending) = (Rc::clone(&answered), Rc::clone(&ending));
            let running = Rc::clone(&running);
            running.set(running.get() + 1);
            rig.world.spawn(async move {
                let tag = at as u16;
                for value in 1..=250 {
                    if ending.get() {
                        break;
                    }
                    world.pages.borrow_mut()[usize::from(tag)] = vec![value; 4096];
                    let write = block(at, tag, HostVerb::Write { fua: false });
                    assert_eq!(group.serve(0, write).await, Ok(()));
                    answered[at as usize].set(value);
                    SimClock(Rc::clone(&world))
                        .sleep(world.random(3_000_000))
                        .await;
                }
                running.set(running.get() - 1);
            });
        }
        // Readers by way of the queue thread.
        for reader in 0..8 {
            let (follower, answered) = (Rc::clone(&follower), Rc::clone(&answered));
            let (ending, running) = (Rc::clone(&ending), Rc::clone(&running));
            let here = Rc::clone(&here);
            running.set(running.get() + 1);
            rig.world.spawn(async move {
                let (world, tag) = (Rc::clone(&follower.world), 64 + reader);
                while !ending.get() {
                    let at = world.random(BLOCKS);
                    let least = answered[at as usize].get();
                    world.pages.borrow_mut()[usize::from(tag)] = vec![0; 4096];
                    let (result, is_here) = follower.serve(block(at, tag, HostVerb::Read)).await;
                    assert_eq!(result, Ok(()), "seed {seed}");
                    here.set(here.get() + u32::from(is_here));
                    let seen = world.pages.borrow()[usize::from(tag)].clone();
                    let oldest = seen.iter().min().copied().unwrap();
                    assert!(
                        oldest >= least,
                        "seed {seed}: block {at} is {oldest}, was {least}"
                    );
                    SimClock(Rc::clone(&world))
                        .sleep(1 + world.random(1_000_000))
                        .await;
                }
                running.set(running.get() - 1);
            });
        }
        // Pictures come late.
        let late = Rc::clone(&follower);
        rig.world.spawn(async move {
            let mut seen = 0;
            loop {
                late.group.view_after(seen).await;
                let world = Rc::clone(&late.world);
                SimClock(Rc::clone(&world))
                    .sleep(world.random(40_000_000))
                    .await;
                seen = late.take();
            }
        });
        let pause = |ms: u64| {
            let clock = SimClock(Rc::clone(&rig.world));
            let sleep = async move { clock.sleep(ms * 1_000_000).await };
            rig.world.block_on(sleep);
        };
        pause(20);
        let group = Rc::clone(&rig.group);
        let fail = async move { group.member_fail(uuid(0), "by hand").await };
        assert_eq!(rig.world.block_on(fail), Ok(()));
        pause(30);
        let new = Store::new(DISK, 0x5A);
        rig.replace(0, 9, &new);
        follower.stores.borrow_mut()[0] = (9, Rc::clone(&new));
        rig.wait_synced();
        pause(30);
        let group = Rc::clone(&rig.group);
        let fail = async move { group.member_fail(uuid(1), "by hand").await };
        assert_eq!(rig.world.block_on(fail), Ok(()));
        pause(30);
        ending.set(true);
        rig.world.run_until(|| running.get() == 0);
        assert!(
            here.get() > 50,
            "seed {seed}: {} reads by picture",
            here.get()
        );
    }
}
