//! One thread, a clock that jumps, and events in order of their time: the world of a run.
//!
//! A task is polled when it was woken; when none is left, the clock jumps to the next event. Nothing else happens: the
//! same seed gives the same run, and the trace hash proves it.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use lunar_engine::pool::{BLOCK_MAX, Lease, PREFIX};
use lunar_engine::traits::{Clock, DiskError, Front, MILLISECOND, Memory, RequestId, Tick};

use super::random::{Random, mix};

/// What an I/O answers.
pub type Answer = Result<(), DiskError>;

/// A place where the end of an I/O or of a wait is left.
#[derive(Debug, Default)]
pub struct Slot {
    done: Cell<Option<Answer>>,
    waker: RefCell<Option<Waker>>,
}

impl Slot {
    /// Ends it, unless it has ended.
    pub fn end(&self, answer: Answer) {
        if self.done.get().is_none() {
            self.done.set(Some(answer));
            if let Some(waker) = self.waker.take() {
                waker.wake();
            }
        }
    }

    /// Says whether it has ended.
    pub fn is_over(&self) -> bool {
        self.done.get().is_some()
    }
}

/// Waits for a [`Slot`].
#[derive(Debug)]
pub struct Io(pub Rc<Slot>);

impl Future for Io {
    type Output = Answer;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        match self.0.done.get() {
            Some(answer) => Poll::Ready(answer),
            None => {
                *self.0.waker.borrow_mut() = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// What happens at a time.
pub trait Happen {
    /// Lets it happen.
    fn happen(self: Rc<Self>, world: &World, key: u64);
}

struct Event {
    at: u64,
    /// Among events of one time the first that was made.
    order: u64,
    key: u64,
    of: Rc<dyn Happen>,
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Event {}
impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Event {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl Happen for Slot {
    fn happen(self: Rc<Self>, _: &World, _: u64) {
        self.end(Ok(()));
    }
}

type Ready = Arc<Mutex<VecDeque<usize>>>;

struct TaskWaker {
    ready: Ready,
    index: usize,
    is_queued: AtomicBool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.is_queued.swap(true, Ordering::Relaxed) {
            let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
            ready.push_back(self.index);
        }
    }
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    waker: Arc<TaskWaker>,
}

/// Tags of the host.
pub const TAGS: usize = 64;
/// Most events of a run: far more than any needs.
const EVENTS_MAX: u64 = 40_000_000;

/// The world.
pub struct World {
    pub random: Random,
    now: Cell<u64>,
    order: Cell<u64>,
    events: RefCell<BinaryHeap<Reverse<Event>>>,
    tasks: RefCell<Vec<Option<Task>>>,
    free: RefCell<Vec<usize>>,
    ready: RefCell<Ready>,
    hash: Cell<u64>,
    /// Events that have happened.
    pub happened: Cell<u64>,
    /// The process or the power goes down when so many have happened.
    pub crash_at: Cell<u64>,
    /// Nothing goes on until `clear`.
    pub is_down: Cell<bool>,
    /// What is done is told on standard error.
    pub is_loud: Cell<bool>,
    /// Bytes of each request of the host, by tag.
    pub pages: RefCell<Vec<Vec<u8>>>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("now", &self.now)
            .finish_non_exhaustive()
    }
}

impl World {
    pub fn new(seed: u64) -> Rc<Self> {
        Rc::new(Self {
            random: Random::new(seed, 1),
            now: Cell::new(0),
            order: Cell::new(0),
            events: RefCell::default(),
            tasks: RefCell::default(),
            free: RefCell::default(),
            ready: RefCell::default(),
            hash: Cell::new(seed),
            happened: Cell::new(0),
            crash_at: Cell::new(u64::MAX),
            is_down: Cell::new(false),
            is_loud: Cell::new(false),
            pages: RefCell::new(vec![Vec::new(); TAGS]),
        })
    }

    /// Nanoseconds since it began.
    pub fn now(&self) -> u64 {
        self.now.get()
    }

    /// Tells what is done, if anybody listens.
    pub fn tell(&self, what: impl FnOnce() -> String) {
        if self.is_loud.get() {
            let (at, happened) = (self.now.get() / 1000, self.happened.get());
            eprintln!("{at:>12} us, event {happened:>7}: {}", what());
        }
    }

    /// Takes something into the trace.
    pub fn trace(&self, what: u64) {
        self.hash
            .set(mix(self.hash.get() ^ what).rotate_left(5) ^ self.now.get());
    }

    /// The hash of all that has happened.
    pub fn hash(&self) -> u64 {
        self.hash.get()
    }

    /// Has something happen in so many nanoseconds.
    pub fn after(&self, ns: u64, of: Rc<dyn Happen>, key: u64) {
        let order = self.order.get();
        self.order.set(order + 1);
        let at = self.now.get().saturating_add(ns);
        let event = Event { at, order, key, of };
        self.events.borrow_mut().push(Reverse(event));
    }

    /// Ends in so many nanoseconds.
    pub fn wait(&self, ns: u64) -> Io {
        let slot = Rc::new(Slot::default());
        self.after(ns.max(1), Rc::clone(&slot) as Rc<dyn Happen>, 0);
        Io(slot)
    }

    /// Begins a task.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let mut tasks = self.tasks.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or(tasks.len());
        let ready = Arc::clone(&self.ready.borrow());
        let waker = Arc::new(TaskWaker {
            ready,
            index,
            is_queued: AtomicBool::new(false),
        });
        Arc::clone(&waker).wake();
        let task = Task {
            future: Box::pin(future),
            waker,
        };
        match tasks.get_mut(index) {
            Some(place) => *place = Some(task),
            None => tasks.push(Some(task)),
        }
    }

    fn poll_one(&self) -> bool {
        let next = {
            let ready = self.ready.borrow();
            let mut ready = ready.lock().unwrap_or_else(PoisonError::into_inner);
            ready.pop_front()
        };
        let Some(index) = next else { return false };
        let Some(mut task) = self.tasks.borrow_mut()[index].take() else {
            return true;
        };
        task.waker.is_queued.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&task.waker));
        match task.future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(()) => self.free.borrow_mut().push(index),
            Poll::Pending => self.tasks.borrow_mut()[index] = Some(task),
        }
        true
    }

    /// Runs until `is_done`, or until it is down. False: `limit` nanoseconds went by before.
    ///
    /// # Panics  if the run has no end
    pub fn run_until(&self, limit: u64, mut is_done: impl FnMut() -> bool) -> bool {
        let end = self.now.get().saturating_add(limit);
        loop {
            while !self.is_down.get() && self.poll_one() {}
            if self.is_down.get() || is_done() {
                return true;
            }
            let next = {
                let mut events = self.events.borrow_mut();
                match events.peek() {
                    Some(Reverse(event)) if event.at <= end => events.pop(),
                    _ => None,
                }
            };
            let Some(Reverse(event)) = next else {
                self.now.set(end);
                return false;
            };
            self.now.set(event.at.max(self.now.get()));
            event.of.happen(self, event.key);
            let happened = self.happened.get() + 1;
            self.happened.set(happened);
            assert!(happened < EVENTS_MAX, "no end after {happened} events");
            if happened == self.crash_at.get() {
                self.is_down.set(true);
            }
        }
    }

    /// Runs one future to its end; none if it went down meanwhile, or took longer than `limit`.
    pub fn block_on<T: 'static>(
        &self,
        limit: u64,
        future: impl Future<Output = T> + 'static,
    ) -> Option<T> {
        let out = Rc::new(RefCell::new(None));
        let to = Rc::clone(&out);
        self.spawn(async move {
            let value = future.await;
            *to.borrow_mut() = Some(value);
        });
        let seen = Rc::clone(&out);
        self.run_until(limit, move || seen.borrow().is_some());
        out.borrow_mut().take()
    }

    /// The process is gone: its tasks and timers are dropped. Disks have been told before.
    pub fn clear(&self) {
        drop(self.tasks.take());
        self.free.borrow_mut().clear();
        *self.ready.borrow_mut() = Ready::default();
        drop(self.events.take());
        self.crash_at.set(u64::MAX);
        self.is_down.set(false);
    }
}

/// The clock of the engine.
#[derive(Debug, Clone)]
pub struct SimClock(pub Rc<World>);

/// A wait that ends.
#[derive(Debug)]
pub struct Sleep(Io);

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.0).poll(cx).map(|_| ())
    }
}

impl Clock for SimClock {
    type Sleep = Sleep;
    fn now(&self) -> Tick {
        Tick(self.0.now())
    }
    fn sleep(&self, ns: u64) -> Sleep {
        Sleep(self.0.wait(ns))
    }
    fn date(&self) -> u64 {
        1_700_000_000_000 + self.0.now() / MILLISECOND
    }
}

/// The host: its requests' bytes are the world's pages.
#[derive(Debug)]
pub struct SimFront(pub Rc<World>);

/// A transfer between a request and private memory.
struct Transfer {
    slot: Rc<Slot>,
    tag: usize,
    offset: usize,
    len: usize,
    lease: Lease,
    at: usize,
    is_fetch: bool,
}

impl Happen for Transfer {
    fn happen(self: Rc<Self>, world: &World, _: u64) {
        let mut pages = world.pages.borrow_mut();
        let page = &mut pages[self.tag][self.offset..self.offset + self.len];
        let cells = self.lease.cells(self.at..self.at + self.len);
        match self.is_fetch {
            true => lunar_engine::parity::copy_in(cells, page),
            false => lunar_engine::parity::copy_out(page, cells),
        }
        self.slot.end(Ok(()));
    }
}

impl SimFront {
    fn transfer(&self, id: RequestId, part: (u32, u32), to: (&Lease, u32), is_fetch: bool) -> Io {
        let slot = Rc::new(Slot::default());
        let transfer = Transfer {
            slot: Rc::clone(&slot),
            tag: usize::from(id.tag),
            offset: part.0 as usize,
            len: part.1 as usize,
            lease: to.0.clone(),
            at: to.1 as usize,
            is_fetch,
        };
        let ns = 500 + self.0.random.below(3000);
        self.0.after(ns, Rc::new(transfer), 0);
        Io(slot)
    }
}

impl Front for SimFront {
    type Io = Io;
    fn fetch(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, into: u32) -> Io {
        self.transfer(id, (offset, len), (lease, into), true)
    }
    fn fill(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, from: u32) -> Io {
        self.transfer(id, (offset, len), (lease, from), false)
    }
}

/// The memory of a process: what the in-flight log lies in, as on tmpfs.
#[derive(Debug, Clone)]
pub struct SimMemory(pub Rc<Vec<Cell<u8>>>);

impl SimMemory {
    /// As little as a group runs in: then it is sometimes full.
    pub fn fresh() -> Self {
        Self(Rc::new(vec![Cell::new(0); PREFIX + 3 * BLOCK_MAX]))
    }

    /// What a successor finds: nothing that the dead process still does changes it.
    pub fn left(&self) -> Self {
        Self(Rc::new(Vec::clone(&self.0)))
    }
}

impl Memory for SimMemory {
    fn bytes(&self) -> usize {
        self.0.len()
    }
    fn cells(&self, range: std::ops::Range<usize>) -> &[Cell<u8>] {
        &self.0[range]
    }
}

impl SimMemory {
    /// Says whether a process died that had this memory.
    pub fn has_log(&self) -> bool {
        self.0[0].get() != 0
    }

    /// Says whether the in-flight log in it has a live entry (the head of `inflight.rs` says where).
    pub fn has_live_entry(&self) -> bool {
        let entries = (4096..PREFIX).step_by(4096);
        self.0[0].get() != 0 && entries.into_iter().any(|at| self.0[at].get() == 1)
    }
}
