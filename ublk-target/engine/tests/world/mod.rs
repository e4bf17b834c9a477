//! A small world for the engine: disks in memory, a clock that jumps, one thread. Each I/O completes on a later
//! turn, in an order drawn from a seed.
#![allow(
    dead_code,
    missing_debug_implementations,
    clippy::cast_possible_truncation,
    clippy::type_complexity
)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use lunar_api::{DiskUuid, GroupUuid, SystemUuid};
use lunar_engine::pool::{BLOCK_MAX, Lease, PREFIX, Pool};
use lunar_engine::raid_group::{Given, Parts, RaidGroup, WORKERS};
use lunar_engine::traits::*;

pub(crate) struct Flag(AtomicBool);
impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

type Task = Pin<Box<dyn Future<Output = ()>>>;

#[derive(Default)]
struct IoState {
    done: Option<Result<(), DiskError>>,
    waker: Option<Waker>,
}

pub(crate) struct Io(Rc<RefCell<IoState>>);
impl Future for Io {
    type Output = Result<(), DiskError>;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.0.borrow_mut();
        match state.done {
            Some(result) => Poll::Ready(result),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

type Action = Box<dyn FnOnce() -> Result<(), DiskError>>;

pub(crate) struct World {
    pub seed: Cell<u64>,
    now: Cell<u64>,
    pending: RefCell<Vec<(Rc<RefCell<IoState>>, Option<Action>)>>,
    timers: RefCell<Vec<(u64, Rc<RefCell<IoState>>)>>,
    tasks: RefCell<Vec<Option<(Task, Arc<Flag>)>>>,
    fresh: RefCell<Vec<Task>>,
    /// Of processes that were killed: their destructors run when nothing of the world counts any more.
    killed: RefCell<Vec<Task>>,
    /// Bytes of each request, by tag.
    pub pages: RefCell<Vec<Vec<u8>>>,
    pub io_count: Cell<u64>,
    /// The request whose bytes cannot be had, by tag.
    pub no_bytes_of: Cell<Option<u16>>,
    /// I/Os left until the process dies (nothing completes any more).
    pub crash_in: Cell<Option<u64>>,
}

impl World {
    pub(crate) fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self {
            seed: Cell::new(seed * 2 + 1),
            now: Cell::new(0),
            pending: RefCell::default(),
            timers: RefCell::default(),
            tasks: RefCell::default(),
            fresh: RefCell::default(),
            killed: RefCell::default(),
            pages: RefCell::new(vec![Vec::new(); 128]),
            io_count: Cell::new(0),
            no_bytes_of: Cell::new(None),
            crash_in: Cell::new(None),
        })
    }

    pub(crate) fn random(&self, below: u64) -> u64 {
        let mut x = self.seed.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.seed.set(x);
        (x.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % below.max(1)
    }

    fn start(&self, action: Action) -> Io {
        let state = Rc::new(RefCell::new(IoState::default()));
        self.pending
            .borrow_mut()
            .push((Rc::clone(&state), Some(action)));
        self.io_count.set(self.io_count.get() + 1);
        Io(state)
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.fresh.borrow_mut().push(Box::pin(task));
    }

    pub(crate) fn crashed(&self) -> bool {
        self.crash_in.get() == Some(0)
    }

    fn turn(&self) -> bool {
        let mut tasks = self.tasks.borrow_mut();
        for task in self.fresh.borrow_mut().drain(..) {
            tasks.push(Some((task, Arc::new(Flag(AtomicBool::new(true))))));
        }
        let mut ran = false;
        for place in tasks.iter_mut() {
            let Some((task, flag)) = place else { continue };
            if flag.0.swap(false, Ordering::SeqCst) {
                ran = true;
                let waker = Waker::from(Arc::clone(flag));
                if task
                    .as_mut()
                    .poll(&mut Context::from_waker(&waker))
                    .is_ready()
                {
                    *place = None;
                }
            }
        }
        ran || !self.fresh.borrow().is_empty()
    }

    fn complete_one(&self) -> bool {
        let n = self.pending.borrow().len();
        if n == 0 || self.crashed() {
            return false;
        }
        if let Some(left) = self.crash_in.get() {
            self.crash_in.set(Some(left - 1));
            if left == 1 {
                return false;
            }
        }
        let i = self.random(n as u64) as usize;
        let (state, action) = self.pending.borrow_mut().swap_remove(i);
        let result = action.map_or(Ok(()), |action| action());
        let mut state = state.borrow_mut();
        if state.done.is_none() {
            state.done = Some(result);
        }
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
        true
    }

    fn fire_timer(&self) -> bool {
        let mut timers = self.timers.borrow_mut();
        let Some(i) = (0..timers.len()).min_by_key(|i| timers[*i].0) else {
            return false;
        };
        let (at, state) = timers.swap_remove(i);
        self.now.set(self.now.get().max(at));
        let mut state = state.borrow_mut();
        state.done = Some(Ok(()));
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
        true
    }

    /// Runs until `done`, the crash, or virtual time runs out.
    pub(crate) fn run_until(&self, mut done: impl FnMut() -> bool) {
        let limit = self.now.get() + 600 * SECOND;
        for _ in 0..20_000_000u64 {
            if done() || self.crashed() {
                return;
            }
            if self.turn() {
                continue;
            }
            if self.complete_one() {
                continue;
            }
            if self.crashed() {
                return;
            }
            assert!(self.fire_timer(), "nothing left to happen: a lost request");
            assert!(
                self.now.get() < limit,
                "no end in ten minutes of virtual time"
            );
        }
        panic!("no end in 20 million turns");
    }

    /// Runs one future to its end, or none if the process crashed.
    pub(crate) fn try_block_on<T: 'static>(
        &self,
        future: impl Future<Output = T> + 'static,
    ) -> Option<T> {
        let out = Rc::new(RefCell::new(None));
        let to = Rc::clone(&out);
        self.spawn(async move {
            let value = future.await;
            *to.borrow_mut() = Some(value);
        });
        let seen = Rc::clone(&out);
        self.run_until(move || seen.borrow().is_some());
        out.borrow_mut().take()
    }

    pub(crate) fn block_on<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> T {
        self.try_block_on(future).expect("no crash was planned")
    }

    /// Ends the run: all tasks, and what they hold, are dropped.
    pub(crate) fn end(&self) {
        let (tasks, fresh) = (self.tasks.take(), self.fresh.take());
        drop((tasks, fresh, self.killed.take()));
        let (pending, timers) = (self.pending.take(), self.timers.take());
        drop((pending, timers));
    }

    /// Everything of the process is gone: tasks, I/O that did not complete, timers.
    pub(crate) fn kill(&self) {
        let mut killed = self.killed.borrow_mut();
        let tasks = self.tasks.take();
        killed.extend(tasks.into_iter().flatten().map(|(task, _)| task));
        killed.append(&mut self.fresh.borrow_mut());
        drop(killed);
        for pending in self.pending.borrow_mut().drain(..) {
            // Each I/O in flight has happened or has not.
            if self.random(2) == 0
                && let Some(action) = pending.1
            {
                let _ = action();
            }
        }
        self.timers.borrow_mut().clear();
        self.crash_in.set(None);
    }
}

#[derive(Debug, Default)]
pub(crate) struct Faults {
    pub dead: Cell<bool>,
    /// Its device is not there: what the kernel answers then.
    pub gone: Cell<bool>,
    /// Nanoseconds that each I/O takes; 0: no time at all.
    pub delay: Cell<u64>,
    /// What is submitted now never ends; `abandon` gives it up. Its memory stays taken until `land`.
    pub hang: Cell<bool>,
    /// What is submitted now waits for `release`.
    pub slow: Cell<bool>,
    /// Sectors whose reads fail until they are written.
    pub bad: RefCell<BTreeSet<u64>>,
    /// Reads of them fail even after a write.
    pub worn: Cell<bool>,
    /// Its physical block is 4 KiB: a write of less over a bad sector fails, as it would have to read the rest.
    pub coarse: Cell<bool>,
    pub write_errors: Cell<bool>,
    /// It zeroes but gives no space back; it does not even zero.
    pub keeps: Cell<bool>,
    pub no_zeroes: Cell<bool>,
    /// It says that it zeroes, and answers an error.
    pub zero_errors: Cell<bool>,
    pub flush_errors: Cell<bool>,
}

/// Content of a disk: pages that were written, and `fill` everywhere else.
pub(crate) struct Store {
    len: u64,
    fill: u8,
    pages: RefCell<BTreeMap<u64, Box<[u8]>>>,
    pub faults: Faults,
    pub reads: Cell<u64>,
    pub writes: Cell<u64>,
    /// Bytes that it was told to zero.
    pub zeroed: Cell<u64>,
    /// What hangs, and what is slow.
    hung: RefCell<Vec<(Rc<Cell<bool>>, Action)>>,
    held: RefCell<Vec<(Rc<RefCell<IoState>>, Action)>>,
}

const PAGE: u64 = 64 << 10;

impl Store {
    pub(crate) fn new(len: usize, fill: u8) -> Rc<Self> {
        Rc::new(Self {
            len: len as u64,
            fill,
            pages: RefCell::default(),
            faults: Faults::default(),
            reads: Cell::new(0),
            writes: Cell::new(0),
            zeroed: Cell::new(0),
            hung: RefCell::default(),
            held: RefCell::default(),
        })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Another disk with the same content.
    pub(crate) fn copy(&self) -> Rc<Self> {
        let other = Self::new(self.len as usize, self.fill);
        *other.pages.borrow_mut() = self.pages.borrow().clone();
        other
    }

    /// Lets what hangs happen after all; nobody waits for it any more.
    pub(crate) fn land(&self) {
        for (landed, action) in self.hung.take() {
            let _ = action();
            landed.set(true);
        }
    }

    /// Gives its memory back: who holds the store may live as long as the process.
    pub(crate) fn forget(&self) {
        self.pages.borrow_mut().clear();
    }

    pub(crate) fn held(&self) -> usize {
        self.held.borrow().len()
    }

    /// Lets what was slow go on.
    pub(crate) fn release(&self, world: &World) {
        let held = self.held.take();
        let held = held
            .into_iter()
            .map(|(state, action)| (state, Some(action)));
        world.pending.borrow_mut().extend(held);
    }

    /// Calls `each` with the parts of a range that lie in one page: the page, where in it, and which of the bytes.
    fn cut(at: u64, len: usize, mut each: impl FnMut(u64, Range<usize>, Range<usize>)) {
        let mut done = 0;
        while done < len {
            let from = ((at + done as u64) % PAGE) as usize;
            let n = (len - done).min(PAGE as usize - from);
            each((at + done as u64) / PAGE, from..from + n, done..done + n);
            done += n;
        }
    }

    pub(crate) fn read(&self, at: u64, to: &mut [u8]) {
        let pages = self.pages.borrow();
        Self::cut(at, to.len(), |page, place, part| match pages.get(&page) {
            Some(page) => to[part].copy_from_slice(&page[place]),
            None => to[part].fill(self.fill),
        });
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let mut pages = self.pages.borrow_mut();
        Self::cut(at, bytes.len(), |page, place, part| {
            let page = pages
                .entry(page)
                .or_insert_with(|| vec![self.fill; PAGE as usize].into());
            page[place].copy_from_slice(&bytes[part]);
        });
    }
}

pub(crate) struct MemDisk {
    pub world: Rc<World>,
    pub store: Rc<Store>,
    pub abandoned: Rc<Cell<bool>>,
    /// I/Os that are slow or hang, and since when; those that hang until they have landed.
    stuck: RefCell<Vec<(u64, Rc<RefCell<IoState>>, Rc<Cell<bool>>)>>,
}

impl Disk for MemDisk {
    type Io = Io;

    fn submit(&self, verb: DiskVerb, at: u64, len: u64, buf: Buf<'_>, pieces: &[Piece]) -> Io {
        let sum: u64 = pieces.iter().map(|p| u64::from(p.len)).sum();
        match verb {
            DiskVerb::Read | DiskVerb::Write { .. } => assert_eq!(sum, len),
            _ => {}
        }
        assert!(at + len <= self.store.len, "beyond the disk: {at}+{len}");
        assert!(at.is_multiple_of(512) && len.is_multiple_of(512));
        let store = Rc::clone(&self.store);
        let world = Rc::clone(&self.world);
        let pieces = pieces.to_vec();
        let abandoned = Rc::clone(&self.abandoned);
        enum Held {
            None,
            Pages(usize),
            Lease(Lease),
        }
        let held = match buf {
            Buf::None => Held::None,
            Buf::Request(id) | Buf::Answer(id) => Held::Pages(usize::from(id.tag)),
            Buf::Pool(lease) => Held::Lease(lease.clone()),
        };
        let action: Action = Box::new(move || {
            if store.faults.gone.get() {
                return Err(DiskError::Errno(19));
            }
            if store.faults.dead.get() {
                return Err(DiskError::Errno(5));
            }
            let mut pos = at;
            match verb {
                DiskVerb::Read => {
                    store.reads.set(store.reads.get() + 1);
                    let bad = store.faults.bad.borrow();
                    if bad
                        .range(at / 512..(at + len).div_ceil(512))
                        .next()
                        .is_some()
                    {
                        return Err(DiskError::Errno(5));
                    }
                    for p in &pieces {
                        let n = p.len as usize;
                        match &held {
                            Held::Pages(tag) => {
                                let mut pages = world.pages.borrow_mut();
                                store.read(pos, &mut pages[*tag][p.offset as usize..][..n]);
                            }
                            Held::Lease(lease) => {
                                let mut bytes = vec![0; n];
                                store.read(pos, &mut bytes);
                                let cells = lease.cells(p.offset as usize..p.offset as usize + n);
                                for (c, b) in cells.iter().zip(&bytes) {
                                    c.set(*b);
                                }
                            }
                            Held::None => {}
                        }
                        pos += n as u64;
                    }
                }
                DiskVerb::Write { .. } => {
                    store.writes.set(store.writes.get() + 1);
                    if store.faults.write_errors.get() {
                        return Err(DiskError::Errno(5));
                    }
                    if store.faults.coarse.get() {
                        let bad = store.faults.bad.borrow();
                        let is_bad = |edge: u64| {
                            bad.range(edge / 4096 * 8..edge / 4096 * 8 + 8)
                                .next()
                                .is_some()
                        };
                        if [at, at + len]
                            .into_iter()
                            .any(|edge| edge % 4096 != 0 && is_bad(edge))
                        {
                            return Err(DiskError::Errno(5));
                        }
                    }
                    if !store.faults.worn.get() {
                        let mut bad = store.faults.bad.borrow_mut();
                        for sector in at / 512..(at + len) / 512 {
                            bad.remove(&sector);
                        }
                    }
                    for p in &pieces {
                        let n = p.len as usize;
                        match &held {
                            Held::Pages(tag) => {
                                let pages = world.pages.borrow();
                                store.write(pos, &pages[*tag][p.offset as usize..][..n]);
                            }
                            Held::Lease(lease) => {
                                let cells = lease.cells(p.offset as usize..p.offset as usize + n);
                                let bytes: Vec<u8> = cells.iter().map(Cell::get).collect();
                                store.write(pos, &bytes);
                            }
                            Held::None => {}
                        }
                        pos += n as u64;
                    }
                }
                DiskVerb::WriteZeroes { unmap } => {
                    if unmap && store.faults.keeps.get() || store.faults.no_zeroes.get() {
                        return Err(DiskError::Errno(95));
                    }
                    if store.faults.write_errors.get() || store.faults.zero_errors.get() {
                        return Err(DiskError::Errno(5));
                    }
                    store.zeroed.set(store.zeroed.get() + len);
                    store.write(at, &vec![0; len as usize]);
                }
                DiskVerb::Flush if store.faults.flush_errors.get() => {
                    return Err(DiskError::Errno(5));
                }
                _ => {}
            }
            Ok(())
        });
        let state = Rc::new(RefCell::new(IoState::default()));
        let since = self.world.now.get();
        if self.store.faults.hang.get() && !self.abandoned.get() {
            let landed = Rc::new(Cell::new(false));
            let entry = (since, Rc::clone(&state), Rc::clone(&landed));
            self.stuck.borrow_mut().push(entry);
            self.store.hung.borrow_mut().push((landed, action));
            return Io(state);
        }
        if self.store.faults.slow.get() && !self.abandoned.get() {
            let entry = (since, Rc::clone(&state), Rc::new(Cell::new(true)));
            self.stuck.borrow_mut().push(entry);
            let held = (Rc::clone(&state), action);
            self.store.held.borrow_mut().push(held);
            return Io(state);
        }
        let act: Action = Box::new(move || {
            if abandoned.get() {
                return Err(DiskError::Abandoned);
            }
            action()
        });
        let delay = self.store.faults.delay.get();
        if delay == 0 {
            return self.world.start(act);
        }
        let (late, world) = (SimClock(Rc::clone(&self.world)), Rc::clone(&self.world));
        let done = Rc::clone(&state);
        self.world.spawn(async move {
            late.sleep(delay).await;
            let result = world.start(act).await;
            let mut state = done.borrow_mut();
            state.done = Some(result);
            if let Some(waker) = state.waker.take() {
                waker.wake();
            }
        });
        Io(state)
    }

    fn capacity(&self) -> u64 {
        self.store.len
    }
    fn logical_block(&self) -> u32 {
        512
    }
    fn abandon(&self) {
        self.abandoned.set(true);
        for (_, state, _) in self.stuck.borrow().iter() {
            let mut state = state.borrow_mut();
            state.done = Some(Err(DiskError::Abandoned));
            if let Some(waker) = state.waker.take() {
                waker.wake();
            }
        }
    }
    fn oldest(&self) -> u64 {
        let mut stuck = self.stuck.borrow_mut();
        stuck.retain(|(_, state, landed)| state.borrow().done.is_none() || !landed.get());
        let since = stuck.iter().map(|(since, _, _)| *since).min();
        since.map_or(0, |since| (self.world.now.get() - since).max(1))
    }
    fn has_volatile_cache(&self) -> bool {
        false
    }
}

#[derive(Clone)]
pub(crate) struct SimClock(pub Rc<World>);
impl Clock for SimClock {
    type Sleep = Sleep;
    fn now(&self) -> Tick {
        Tick(self.0.now.get())
    }
    fn sleep(&self, ns: u64) -> Sleep {
        let state = Rc::new(RefCell::new(IoState::default()));
        self.0
            .timers
            .borrow_mut()
            .push((self.0.now.get() + ns.max(1), Rc::clone(&state)));
        Sleep(Io(state))
    }
    fn date(&self) -> u64 {
        1_700_000_000_000 + self.0.now.get() / MILLISECOND
    }
}
pub(crate) struct Sleep(Io);
impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll(cx).map(|_| ())
    }
}

pub(crate) struct SimFront(pub Rc<World>);
impl Front for SimFront {
    type Io = Io;
    fn fetch(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, into: u32) -> Io {
        let (world, lease) = (Rc::clone(&self.0), lease.clone());
        self.0.start(Box::new(move || {
            if world.no_bytes_of.get() == Some(id.tag) {
                return Err(DiskError::Errno(14));
            }
            let pages = world.pages.borrow();
            let from = &pages[usize::from(id.tag)][offset as usize..][..len as usize];
            for (c, b) in lease
                .cells(into as usize..(into + len) as usize)
                .iter()
                .zip(from)
            {
                c.set(*b);
            }
            Ok(())
        }))
    }
    fn fill(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, from: u32) -> Io {
        let (world, lease) = (Rc::clone(&self.0), lease.clone());
        self.0.start(Box::new(move || {
            let mut pages = world.pages.borrow_mut();
            let to = &mut pages[usize::from(id.tag)][offset as usize..][..len as usize];
            for (c, b) in lease
                .cells(from as usize..(from + len) as usize)
                .iter()
                .zip(to)
            {
                *b = c.get();
            }
            Ok(())
        }))
    }
}

/// The memory is shared with a successor, as a file on tmpfs is.
pub(crate) struct SimMemory(pub Rc<Vec<Cell<u8>>>);
impl Memory for SimMemory {
    fn bytes(&self) -> usize {
        self.0.len()
    }
    fn cells(&self, range: Range<usize>) -> &[Cell<u8>] {
        &self.0[range]
    }
}

pub(crate) fn memory() -> Rc<Vec<Cell<u8>>> {
    Rc::new(vec![Cell::new(0); PREFIX + 3 * BLOCK_MAX])
}

#[derive(Debug)]
pub(crate) struct Sim;
impl Env for Sim {
    type Disk = MemDisk;
    type Clock = SimClock;
    type Front = SimFront;
}

pub(crate) const SYSTEM: SystemUuid = SystemUuid::from_bytes([7; 16]);
pub(crate) const GROUP: GroupUuid = GroupUuid::from_bytes([9; 16]);

pub(crate) fn uuid(n: u8) -> DiskUuid {
    DiskUuid::from_bytes([n + 1; 16])
}

pub(crate) fn given(world: &Rc<World>, n: u8, store: &Rc<Store>) -> Given<MemDisk> {
    let disk = MemDisk {
        world: Rc::clone(world),
        store: Rc::clone(store),
        abandoned: Rc::default(),
        stuck: RefCell::default(),
    };
    Given {
        uuid: uuid(n),
        path: format!("/dev/disk{n}"),
        disk,
    }
}

pub(crate) fn parts(
    world: &Rc<World>,
    members: Vec<Given<MemDisk>>,
    memory: &Rc<Vec<Cell<u8>>>,
) -> Parts<Sim> {
    let random = Rc::clone(world);
    Parts {
        system: SYSTEM,
        members,
        pool: Pool::new(Box::new(SimMemory(Rc::clone(memory)))),
        clock: SimClock(Rc::clone(world)),
        front: SimFront(Rc::clone(world)),
        random: Box::new(move || {
            let mut bytes = [0; 16];
            for b in &mut bytes {
                *b = random.random(255) as u8 + 1;
            }
            bytes
        }),
    }
}

pub(crate) fn run(world: &Rc<World>, group: &Rc<RaidGroup<Sim>>) {
    // Tests have whole disks be unreadable, to be read from the others.
    group.set_read_errors_max(0);
    for _ in 0..WORKERS {
        world.spawn(Rc::clone(group).worker());
    }
    world.spawn(Rc::clone(group).background());
    world.spawn(Rc::clone(group).watch());
}
