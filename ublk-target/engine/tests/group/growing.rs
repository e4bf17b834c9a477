//! What gets larger while it is in use: a LU.

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

    fn write(&self, at: u64, bytes: Vec<u8>) -> Result<(), i32> {
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
