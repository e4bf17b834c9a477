//! A running group on disks in memory beside a plain byte model of its LU.

use super::*;

pub(crate) const DISK: usize = 80 << 20;
pub(crate) const LU: LuUuid = LuUuid::from_bytes([3; 16]);
pub(crate) const LU_BYTES: u64 = 4 << 20;

pub(crate) struct Rig {
    pub world: Rc<World>,
    pub stores: Vec<Rc<Store>>,
    /// Which disk each store is.
    pub disks: Vec<u8>,
    pub group: Rc<RaidGroup<Sim>>,
    pub memory: Rc<Vec<Cell<u8>>>,
    pub model: Rc<RefCell<Vec<u8>>>,
    /// Bytes whose content is defined: all of a group of zeroed disks, else those written.
    pub known: RefCell<Vec<bool>>,
    /// Writes that were answered with an error.
    pub refused: Rc<RefCell<Vec<(u64, u64)>>>,
}

pub(crate) fn spec(level: Level, chunk: u64, assume_clean: bool) -> CreateSpec {
    CreateSpec {
        group: GROUP,
        name: "data".into(),
        level,
        chunk,
        consistency: Consistency::None,
        assume_clean,
    }
}

/// What the round of this run adds to the seeds of the storms: `LUNAR_SIM_ROUND`, else 0.
pub(crate) fn round() -> u64 {
    let asked = std::env::var("LUNAR_SIM_ROUND").ok();
    let round: u64 = asked.map_or(0, |n| n.parse().expect("LUNAR_SIM_ROUND is a number"));
    round << 20
}

/// A running group; a test that fails shows the seed, which replays it.
pub(crate) fn rig(seed: u64, level: Level, n: u8, chunk: u64, assume_clean: bool) -> Rig {
    let fill = |i: u8| if assume_clean { 0 } else { 0xA5 ^ i };
    let stores = (0..n).map(|i| Store::new(DISK, fill(i))).collect();
    rig_on(seed, level, stores, chunk, assume_clean)
}

/// As [`rig`], on these disks.
pub(crate) fn rig_on(
    seed: u64,
    level: Level,
    stores: Vec<Rc<Store>>,
    chunk: u64,
    assume_clean: bool,
) -> Rig {
    // Every test runs with one of the policies; its seed says with which.
    let consistency = match level {
        Level::Raid0 | Level::Linear => Consistency::None,
        Level::Raid5 if seed % 4 == 1 => Consistency::Ppl,
        Level::Raid6 if seed % 4 == 1 => Consistency::Journal,
        _ if seed.is_multiple_of(2) => Consistency::Bitmap,
        _ => Consistency::None,
    };
    rig_with(seed, (level, chunk, consistency), stores, assume_clean)
}

/// As [`rig`], of disks that are zero, with this policy.
pub(crate) fn rig_of(seed: u64, level: Level, n: u8, chunk: u64, consistency: Consistency) -> Rig {
    let stores = (0..n).map(|_| Store::new(DISK, 0)).collect();
    rig_with(seed, (level, chunk, consistency), stores, true)
}

fn rig_with(
    seed: u64,
    (level, chunk, consistency): (Level, u64, Consistency),
    stores: Vec<Rc<Store>>,
    assume_clean: bool,
) -> Rig {
    let n = stores.len() as u8;
    eprintln!(
        "{level:?} of {n}, chunk {chunk}, {consistency:?}, assume_clean {assume_clean}, seed {seed}"
    );
    let world = World::new(seed);
    let members = stores
        .iter()
        .zip(0..)
        .map(|(store, i)| given(&world, i, store))
        .collect();
    let memory = memory();
    let parts = parts(&world, members, &memory);
    let spec = CreateSpec {
        consistency,
        ..spec(level, chunk, assume_clean)
    };
    let group = world.block_on(RaidGroup::create(parts, spec)).unwrap();
    run(&world, &group);
    let g = Rc::clone(&group);
    let handle =
        world.block_on(async move { g.lu_create(LU, "vol", LuSize::Bytes(LU_BYTES), 32).await });
    assert_eq!(handle, Ok(0));
    let model = Rc::new(RefCell::new(vec![0; LU_BYTES as usize]));
    let known = RefCell::new(vec![assume_clean; LU_BYTES as usize]);
    let rig = Rig {
        memory,
        world,
        disks: (0..n).collect(),
        stores,
        group,
        model,
        known,
        refused: Rc::default(),
    };
    // The model starts from what is there: content of a new LU is undefined.
    let now = rig.read_all();
    *rig.model.borrow_mut() = now;
    rig
}

impl Drop for Rig {
    fn drop(&mut self) {
        // The tasks of the world hold the group, and it the world: what they take is freed here.
        self.stores.iter().for_each(|store| store.forget());
        self.world.end();
    }
}

impl Rig {
    pub(crate) fn request(tag: u16, verb: HostVerb, at: u64, len: u64) -> HostRequest {
        HostRequest {
            id: RequestId { device: 0, tag },
            verb,
            at,
            len,
            zero_copy: true,
        }
    }

    pub(crate) fn read(&self, at: u64, len: u64) -> Result<Vec<u8>, i32> {
        self.world.pages.borrow_mut()[63] = vec![0; len as usize];
        let group = Rc::clone(&self.group);
        let result = self.world.block_on(async move {
            group
                .serve(0, Self::request(63, HostVerb::Read, at, len))
                .await
        });
        result.map_err(|e| e.0)?;
        Ok(self.world.pages.borrow()[63].clone())
    }

    pub(crate) fn read_all(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for at in (0..LU_BYTES).step_by(512 << 10) {
            all.extend(self.read(at, 512 << 10).expect("readable"));
        }
        all
    }

    pub(crate) fn check(&self) {
        let all = self.read_all();
        let model = self.model.borrow();
        let known = self.known.borrow();
        if let Some(i) = (0..all.len()).find(|i| known[*i] && all[*i] != model[*i]) {
            panic!("byte {i} is {:#x}, was written {:#x}", all[i], model[i]);
        }
    }

    /// A successor of the process: the same disks in another order, the same tmpfs file.
    pub(crate) fn restart(
        &mut self,
        memory: &Rc<Vec<Cell<u8>>>,
        force: bool,
    ) -> Result<(), String> {
        self.restart_without(memory, force, &[])
    }

    pub(crate) fn restart_without(
        &mut self,
        memory: &Rc<Vec<Cell<u8>>>,
        force: bool,
        without: &[u8],
    ) -> Result<(), String> {
        let n = self.stores.len();
        let first = self.world.random(n as u64) as usize;
        let members = (0..n)
            .map(|i| (i + first) % n)
            .filter(|i| !self.stores[*i].faults.dead.get())
            .map(|i| given(&self.world, self.disks[i], &self.stores[i]))
            .collect();
        let parts = parts(&self.world, members, memory);
        let spec = StartSpec {
            group: GROUP,
            force,
            witness: None,
            without: without.iter().map(|disk| uuid(*disk)).collect(),
            keep: None,
            undelete: false,
        };
        let group = self
            .world
            .block_on(RaidGroup::start(parts, spec))
            .map_err(|e| format!("{} {:?}", e.message, e.causes))?;
        run(&self.world, &group);
        self.group = group;
        Ok(())
    }

    /// Storms with SIGKILL at a drawn I/O; every request that was not answered is issued again.
    pub(crate) fn storm_with_kills(&mut self, kills: u64) {
        for _ in 0..kills {
            let mut busy: Vec<(HostRequest, Rc<Cell<bool>>)> = Vec::new();
            self.world.crash_in.set(Some(1 + self.world.random(400)));
            let mut tag = 0;
            while !self.world.crashed() {
                busy.retain(|b| !b.1.get());
                tag = (0..60)
                    .cycle()
                    .skip(tag + 1)
                    .find(|t| !busy.iter().any(|b| usize::from(b.0.id.tag) == *t))
                    .unwrap();
                let sectors = 1 + self
                    .world
                    .random([1, 8, 16, 300][self.world.random(4) as usize]);
                let at = self.world.random(LU_BYTES / 512 - sectors) * 512;
                let len = sectors * 512;
                let overlaps = busy
                    .iter()
                    .any(|b| at < b.0.at + b.0.len && b.0.at < at + len);
                if !overlaps && busy.len() < 24 {
                    let bytes: Vec<u8> = (0..len).map(|_| self.world.random(256) as u8).collect();
                    self.model.borrow_mut()[at as usize..(at + len) as usize]
                        .copy_from_slice(&bytes);
                    self.known.borrow_mut()[at as usize..(at + len) as usize].fill(true);
                    self.world.pages.borrow_mut()[tag] = bytes;
                    let done = Rc::new(Cell::new(false));
                    let request =
                        Self::request(tag as u16, HostVerb::Write { fua: false }, at, len);
                    busy.push((request, Rc::clone(&done)));
                    let group = Rc::clone(&self.group);
                    self.world.spawn(async move {
                        assert_eq!(group.serve(0, request).await, Ok(()));
                        done.set(true);
                    });
                    continue;
                }
                let before = busy.iter().filter(|b| b.1.get()).count();
                self.world
                    .run_until(|| busy.iter().filter(|b| b.1.get()).count() > before);
            }
            busy.retain(|b| !b.1.get());
            self.world.kill();
            let memory = Rc::clone(&self.memory);
            self.restart(&memory, false)
                .expect("a dead process never keeps a group down");
            // What was answered, and what nobody is writing, is right even before anything is issued again.
            let mut unknown = self.known.borrow().clone();
            for (request, _) in &busy {
                unknown[request.at as usize..(request.at + request.len) as usize].fill(false);
            }
            let known = self.known.replace(unknown);
            self.check();
            *self.known.borrow_mut() = known;
            for (request, _) in busy {
                let group = Rc::clone(&self.group);
                let result = self
                    .world
                    .block_on(async move { group.serve(0, request).await });
                assert_eq!(result, Ok(()));
            }
            self.check();
        }
    }

    /// Many writes, and power is lost in the midst of them: each sector of those under way is old or new.
    pub(crate) fn storm_until_power_is_lost(&mut self, most: u64) {
        let before = self.model.borrow().clone();
        let mut busy: Vec<(u64, u64, Rc<Cell<bool>>)> = Vec::new();
        let mut tags: Vec<_> = (0..60).map(|_| Rc::new(Cell::new(true))).collect();
        self.world.crash_in.set(Some(1 + self.world.random(most)));
        while !self.world.crashed() {
            let free = tags.iter().position(|done| done.get());
            let tag = free.expect("at most 24 are under way");
            let sectors = 1 + self
                .world
                .random([1, 8, 300][self.world.random(3) as usize]);
            let at = self.world.random(LU_BYTES / 512 - sectors) * 512;
            let len = sectors * 512;
            // Nothing is written twice: what was there before is known of all that is under way.
            let overlaps = busy.iter().any(|b| at < b.0 + b.1 && b.0 < at + len);
            if !overlaps && busy.iter().filter(|b| !b.2.get()).count() < 24 {
                let bytes: Vec<u8> = (0..len).map(|_| self.world.random(256) as u8).collect();
                let place = at as usize..(at + len) as usize;
                self.model.borrow_mut()[place.clone()].copy_from_slice(&bytes);
                self.known.borrow_mut()[place].fill(true);
                self.world.pages.borrow_mut()[tag] = bytes;
                let done = Rc::new(Cell::new(false));
                busy.push((at, len, Rc::clone(&done)));
                tags[tag] = Rc::clone(&done);
                let request = Self::request(tag as u16, HostVerb::Write { fua: false }, at, len);
                let group = Rc::clone(&self.group);
                self.world.spawn(async move {
                    if group.serve(0, request).await == Ok(()) {
                        done.set(true);
                    }
                });
            }
            let count = || busy.iter().filter(|b| b.2.get()).count();
            let seen = count();
            if busy.iter().filter(|b| !b.2.get()).count() >= 24 || overlaps {
                let all = busy.len();
                self.world.run_until(|| count() > seen || count() == all);
            }
            if busy.len() > 200 {
                let all = busy.len();
                self.world.run_until(|| count() == all);
            }
            if busy.len() > 200 {
                break;
            }
        }
        self.world.crash_in.set(Some(0));
        self.world.kill();
        // What was not answered is what it was, or what it should be: nobody knows.
        for (at, len, done) in busy {
            if !done.get() {
                let place = at as usize..(at + len) as usize;
                self.model.borrow_mut()[place.clone()].copy_from_slice(&before[place.clone()]);
                self.known.borrow_mut()[place].fill(false);
            }
        }
    }

    /// The bytes of what nobody can know are what is read now: from here on they do not change by themselves.
    pub(crate) fn settle(&self) {
        let now = self.read_all();
        *self.model.borrow_mut() = now;
        self.known.borrow_mut().fill(true);
    }

    pub(crate) fn stop(&self) {
        let group = Rc::clone(&self.group);
        let stopped = self.world.block_on(async move { group.stop(false).await });
        assert_eq!(stopped, Ok(()));
        self.world.kill();
    }

    /// Many writers at once, none overlapping another in flight by sectors, all sharing stripes.
    pub(crate) fn storm(&self, writes: u64, mut at_half: impl FnMut()) -> u64 {
        let errors = Rc::new(Cell::new(0));
        let mut busy: Vec<(u64, u64, Rc<Cell<bool>>)> = Vec::new();
        let mut started = 0;
        while started < writes || !busy.is_empty() {
            busy.retain(|b| !b.2.get());
            if started < writes && busy.len() < 24 {
                let tag = (0..60)
                    .find(|t| !busy.iter().any(|b| b.0 >> 48 == *t))
                    .unwrap();
                let max = [1, 8, 16, 100, MAX_IO / 512][self.world.random(5) as usize];
                let sectors = 1 + self.world.random(max);
                let at = self.world.random(LU_BYTES / 512 - sectors) * 512;
                let len = sectors * 512;
                let overlaps = busy.iter().any(|b| {
                    let start = b.0 & 0xFFFF_FFFF_FFFF;
                    at < start + b.1 && start < at + len
                });
                if !overlaps {
                    let mut bytes = vec![0; len as usize];
                    for chunk in bytes.chunks_mut(8) {
                        chunk.copy_from_slice(&self.world.random(u64::MAX).to_le_bytes());
                    }
                    self.model.borrow_mut()[at as usize..(at + len) as usize]
                        .copy_from_slice(&bytes);
                    self.known.borrow_mut()[at as usize..(at + len) as usize].fill(true);
                    self.world.pages.borrow_mut()[tag as usize] = bytes;
                    let done = Rc::new(Cell::new(false));
                    busy.push((tag << 48 | at, len, Rc::clone(&done)));
                    let (group, errors) = (Rc::clone(&self.group), Rc::clone(&errors));
                    let refused = Rc::clone(&self.refused);
                    let verb = HostVerb::Write {
                        fua: self.world.random(8) == 0,
                    };
                    let request = Self::request(tag as u16, verb, at, len);
                    self.world.spawn(async move {
                        if group.serve(0, request).await.is_err() {
                            errors.set(errors.get() + 1);
                            refused.borrow_mut().push((at, len));
                        }
                        done.set(true);
                    });
                    started += 1;
                    if started == writes / 2 {
                        at_half();
                    }
                    continue;
                }
            }
            let before = busy.iter().filter(|b| b.2.get()).count();
            self.world.run_until(|| {
                busy.iter().filter(|b| b.2.get()).count() > before || busy.is_empty()
            });
        }
        errors.get()
    }

    pub(crate) fn wait_synced(&self) {
        let group = Rc::clone(&self.group);
        self.world.run_until(move || {
            let status = group.status();
            status.sync.is_none() && status.state == GroupState::Optimal
        });
    }

    pub(crate) fn replace(&self, slot: u16, disk: u8, with: &Rc<Store>) {
        let (group, new) = (Rc::clone(&self.group), given(&self.world, disk, with));
        let replaced = self
            .world
            .block_on(async move { group.member_replace(slot, new, Fill::Missed).await });
        assert_eq!(replaced, Ok(()));
    }

    /// Lets virtual time pass.
    pub(crate) fn sleep(&self, seconds: u64) {
        let clock = SimClock(Rc::clone(&self.world));
        self.world
            .block_on(async move { clock.sleep(seconds * SECOND).await });
    }

    /// Waits until the running sync has done so much of a member.
    pub(crate) fn wait_done(&self, bytes: u64) {
        let group = Rc::clone(&self.group);
        self.world
            .run_until(move || group.status().sync.is_some_and(|sync| sync.done >= bytes));
    }

    /// Everything reads as written without the data of each member, one after the other, but for those disks.
    pub(crate) fn check_without_others(&self, but: &[u8]) {
        for (disk, store) in self.disks.iter().zip(&self.stores) {
            let members = self.group.status().members;
            let Some(member) = members.iter().find(|member| member.disk == uuid(*disk)) else {
                continue;
            };
            if but.contains(disk) {
                continue;
            }
            let data = member.data_offset / 512..(DISK / 512) as u64;
            *store.faults.bad.borrow_mut() = data.collect();
            let reads = store.reads.get();
            self.check();
            assert!(
                store.reads.get() > reads,
                "disk {disk} is not what was read"
            );
            store.faults.bad.borrow_mut().clear();
        }
    }

    pub(crate) fn without_each(&self, but: &[u8]) {
        for (i, store) in self.stores.iter().enumerate() {
            if but.contains(&(i as u8)) {
                continue;
            }
            // Reads of this one fail: everything is read from the others.
            let bad = (0..(DISK / 512) as u64).collect();
            *store.faults.bad.borrow_mut() = bad;
            store.faults.worn.set(true);
            self.check();
            break;
        }
    }
}
