//! The io_uring of one owner thread.
//!
//! One system call a turn: everything that tasks made ready is submitted, and if nothing is left to do it
//! waits for a completion or the next timer. A full queue is flow control: operations wait in a backlog.
//! Nothing is cancelled; an operation whose future is gone stays until the kernel has answered.
//!
//! Other rings of the process send messages (`MSG_RING`): completions that nobody here began, for a place in a box.
//!
//! Buffer table: `[0, POOL_BUFFERS)` private memory, above it the requests of each device by tag.

mod messages;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use io_uring::squeue::{Flags, SubmissionQueue};
use io_uring::{IoUring, Probe, opcode};
use lunar_engine::traits::{DiskError, RequestId};

use crate::clock::Timers;
use crate::executor::Executor;
use crate::op::{Limit, Place, Slab, Spec, State, Vectors};
use crate::ublk::device::Tags;

pub(crate) use messages::{Address, MailBox};
use messages::{MESSAGE, MESSAGES};

/// Entries of the submission queue: what one turn hands over at once.
const SUBMISSIONS: u32 = 1024;
/// Entries of the completion queue: for every operation and every message.
const COMPLETIONS: u32 = 16_384;
/// Most operations in flight.
const OPERATIONS: u32 = COMPLETIONS - MESSAGES;
/// Registered files: members and devices of a group.
const FILES: u32 = 4096;
/// Registered buffers: the kernel's most.
const BUFFERS: u32 = 16_384;
/// Kernel threads that may sleep in I/O to files, which does not always go without. The default is 4 a CPU: those that
/// wait for a disk that hangs would leave none for the others, and every member would seem to hang. They are made
/// when needed: at most so many I/Os wait for one disk before it is failed.
const WORKERS_MAX: u32 = 1024;
/// Buffers below this are private memory.
pub(crate) const POOL_BUFFERS: u16 = 1024;

/// Flags and numbers of `io_uring_enter` and `io_uring_register` that the crate keeps to itself.
const ENTER_GETEVENTS: u32 = 1;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const ENTER_ABS_TIMER: u32 = 1 << 5;
const REGISTER_RING_FDS: u32 = 20;
const UNREGISTER_RING_FDS: u32 = 21;

/// Why there is no ring.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    #[error("io_uring is not available or too old (sysctl kernel.io_uring_disabled, Linux 6.17)")]
    Setup(#[source] io::Error),
    #[error("io_uring does not register its {0}")]
    Register(&'static str, #[source] io::Error),
    #[error("all {0} registered {1} are in use")]
    Full(u32, &'static str),
}

struct Tables {
    files: Vec<u32>,
    /// Ranges of the buffer table that devices have, in order.
    requests: Vec<Range<u16>>,
}

/// The ring of this thread.
pub(crate) struct Ring {
    uring: RefCell<IoUring>,
    ops: RefCell<Slab>,
    backlog: RefCell<VecDeque<u32>>,
    unsent: RefCell<Unsent>,
    in_flight: Cell<u32>,
    tables: RefCell<Tables>,
    /// By device slot.
    requests: RefCell<Vec<Requests>>,
    who: Cell<u32>,
    /// Index of the ring's own descriptor among those registered with this thread.
    registered: u32,
    vector_fixed: bool,
    timers: Rc<Timers>,
    orphans: Cell<u64>,
    turns: Cell<u64>,
    boxes: RefCell<Vec<Weak<MailBox>>>,
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("in_flight", &self.in_flight.get())
            .field("orphans", &self.orphans.get())
            .finish()
    }
}

/// Entries of the submission queue that the kernel has not taken, in order: true for one that is chained to the one
/// before it.
#[derive(Debug)]
struct Unsent(VecDeque<bool>);

impl Unsent {
    fn new() -> Self {
        Self(VecDeque::with_capacity(SUBMISSIONS as usize))
    }

    /// The kernel took so many.
    ///
    /// # Panics  if that cut a chain. Without memory the kernel takes fewer than it was given, and forgets the chain:
    /// it would answer the host before the bytes have moved. The process ends; its successor serves the request
    fn taken(&mut self, count: usize) {
        self.0.drain(..count);
        assert!(
            self.0.front() != Some(&true),
            "the kernel took an I/O without what is chained to it"
        );
    }
}

/// The requests of a device.
#[derive(Debug, Default)]
struct Requests {
    tags: Tags,
    /// By tag: place and generation of the command that is chained to its I/O, until it is taken.
    answers: Vec<Option<(u32, u32)>>,
}

#[repr(C)]
struct RingFd {
    offset: u32,
    reserved: u32,
    data: u64,
}

#[repr(C)]
struct Wait {
    sigmask: u64,
    sigmask_size: u32,
    min_wait_us: u32,
    timespec: u64,
}

impl Ring {
    /// Makes the ring of this thread.
    pub(crate) fn new(timers: Rc<Timers>) -> Result<Rc<Self>, RingError> {
        let uring = IoUring::builder()
            .dontfork()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_coop_taskrun()
            .setup_submit_all()
            .setup_no_sqarray()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)
            .map_err(RingError::Setup)?;
        let submitter = uring.submitter();
        submitter
            .register_files_sparse(FILES)
            .map_err(|e| RingError::Register("files", e))?;
        submitter
            .register_buffers_sparse(BUFFERS)
            .map_err(|e| RingError::Register("buffers", e))?;
        // The second number is for sockets and the like: 0 leaves it alone.
        submitter
            .register_iowq_max_workers(&mut [WORKERS_MAX, 0])
            .map_err(|e| RingError::Register("workers", e))?;
        let mut probe = Probe::new();
        let vector_fixed = submitter.register_probe(&mut probe).is_ok()
            && probe.is_supported(opcode::ReadvFixed::CODE)
            && probe.is_supported(opcode::WritevFixed::CODE);
        let registered = register_ring(uring.as_raw_fd())
            .map_err(|e| RingError::Register("own descriptor", e))?;
        Ok(Rc::new(Self {
            uring: RefCell::new(uring),
            ops: RefCell::new(Slab::new()),
            backlog: RefCell::new(VecDeque::with_capacity(4096)),
            unsent: RefCell::new(Unsent::new()),
            in_flight: Cell::new(0),
            tables: RefCell::new(Tables {
                files: (0..FILES).rev().collect(),
                requests: Vec::new(),
            }),
            requests: RefCell::new(Vec::new()),
            who: Cell::new(0),
            registered,
            vector_fixed,
            timers,
            orphans: Cell::new(0),
            turns: Cell::new(0),
            boxes: RefCell::default(),
        }))
    }

    /// Runs one turn: tasks, submission, waiting, completions, timers.
    pub(crate) fn turn(&self, executor: &Executor) {
        executor.run_ready();
        self.turns.set(self.turns.get() + 1);
        while self.push_backlog() {
            self.enter(0, None);
            self.reap();
        }
        let timeout = self.timers.next();
        // With nothing to wait for, nothing would ever end the wait.
        let wait = u32::from(self.in_flight.get() > 0 || timeout.is_some());
        let due = self.enter(wait, timeout);
        self.timers.turn(due);
        self.reap();
    }

    /// Fills the submission queue; true when operations are left that would fit after a submission.
    fn push_backlog(&self) -> bool {
        let mut uring = self.uring.borrow_mut();
        let mut queue = uring.submission();
        let mut backlog = self.backlog.borrow_mut();
        let mut ops = self.ops.borrow_mut();
        while self.in_flight.get() < OPERATIONS {
            let Some(index) = backlog.pop_front() else {
                return false;
            };
            let op = ops.get(index);
            if op.abandoned {
                // Never sent: whoever was told so may have written elsewhere since. Nobody waits, and its lease
                // wakes others only. Requests' own pages, which alone have successors, are not given up.
                drop(ops.end_part(index, Err(DiskError::Abandoned)));
                continue;
            }
            let then = op.then;
            if queue.capacity() - queue.len() < 2 {
                // A chain must not be cut by the end of the queue.
                backlog.push_front(index);
                return true;
            }
            self.push(&mut queue, &mut ops, index, false);
            if let Some(then) = then {
                self.push(&mut queue, &mut ops, then, true);
            }
        }
        false
    }

    /// Puts an operation into a queue that has room for it; one with a successor is chained to what follows.
    fn push(&self, queue: &mut SubmissionQueue<'_>, ops: &mut Slab, index: u32, is_chained: bool) {
        let op = ops.get(index);
        let data = u64::from(op.generation) << 32 | u64::from(index);
        let mut entry = op.entry(self.vector_fixed).user_data(data);
        // Sent again, after an answer that cut the chain, it goes alone.
        if op.then.take().is_some() {
            entry = entry.flags(Flags::IO_LINK);
        }
        // SAFETY: what the entry points to lives until its completion: vectors in the slab (its chunks
        // never move and the place is not reused before), memory by the operation's lease or, for requests
        // of the host, in the kernel; registered files and buffers are counted by the kernel.
        unsafe { queue.push(&entry) }.expect("there is room");
        self.unsent.borrow_mut().0.push_back(is_chained);
        op.state = State::InFlight;
        self.in_flight.set(self.in_flight.get() + 1);
    }

    /// Submits, and waits until a completion is there or it is `until` (monotonic); true: the time came first.
    fn enter(&self, wait: u32, until: Option<Duration>) -> bool {
        let submit =
            u32::try_from(self.uring.borrow_mut().submission().len()).expect("at most SUBMISSIONS");
        let timespec = until.map(|until| libc::timespec {
            tv_sec: i64::try_from(until.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(until.subsec_nanos()),
        });
        let arg = Wait {
            sigmask: 0,
            sigmask_size: 0,
            min_wait_us: 0,
            timespec: timespec
                .as_ref()
                .map_or(0, |t| std::ptr::from_ref(t).expose_provenance() as u64),
        };
        let flags = ENTER_GETEVENTS | ENTER_EXT_ARG | ENTER_REGISTERED_RING | ENTER_ABS_TIMER;
        // SAFETY: the registered ring is this thread's own; the argument and its timespec outlive the call,
        // and the size is that of the argument.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_enter,
                self.registered,
                submit,
                wait,
                flags,
                &raw const arg,
                size_of::<Wait>(),
            )
        };
        // What the kernel took it answers before any error of the wait.
        if let Ok(taken) = usize::try_from(result) {
            self.unsent.borrow_mut().taken(taken);
            return false;
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ETIME) => return true,
            // A signal, or the completion queue must be read first.
            Some(libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
            _ => panic!("io_uring_enter: {error}"),
        }
        false
    }

    fn reap(&self) {
        loop {
            let entry = self.uring.borrow_mut().completion().next();
            let Some(entry) = entry else {
                return;
            };
            let data = entry.user_data();
            if data & MESSAGE != 0 {
                self.deliver(data, entry.result());
                continue;
            }
            self.in_flight.set(self.in_flight.get() - 1);
            self.complete(data, entry.result());
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the two halves of user_data"
    )]
    fn complete(&self, user_data: u64, result: i32) {
        let (index, generation) = (user_data as u32, (user_data >> 32) as u32);
        let mut ops = self.ops.borrow_mut();
        let op = ops.get(index);
        assert!(
            op.generation == generation && op.state == State::InFlight,
            "a completion for an operation that is none"
        );
        let Some(outcome) = op.advance(result) else {
            op.state = State::Queued;
            self.backlog.borrow_mut().push_back(index);
            return;
        };
        let Some((lease, waker)) = ops.end_part(index, outcome) else {
            return;
        };
        drop(ops);
        // Both wake tasks; neither comes back here.
        drop(lease);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Starts an operation; it reaches the kernel at the end of this turn.
    pub(crate) fn start(
        self: &Rc<Self>,
        spec: Spec,
        vectors: impl Iterator<Item = (usize, usize)>,
    ) -> Handle {
        self.start_in_parts(Limit::MAX, spec, vectors)
    }

    /// As [`Ring::start`], in parts of at most `limit` bytes.
    pub(crate) fn start_in_parts(
        self: &Rc<Self>,
        limit: Limit,
        spec: Spec,
        vectors: impl Iterator<Item = (usize, usize)>,
    ) -> Handle {
        let now = self.timers.now();
        let mut ops = self.ops.borrow_mut();
        let mut backlog = self.backlog.borrow_mut();
        let (index, generation) = ops.insert(spec, vectors, now);
        backlog.push_back(index);
        let mut rest = Vectors::new();
        let mut last = index;
        while let Some(spec) = ops.get(last).cut(limit, &mut rest) {
            last = ops.insert(spec, rest.iter().copied(), now).0;
            ops.get(last).whole = Some(index);
            ops.get(index).parts += 1;
            backlog.push_back(last);
        }
        Handle {
            ring: Rc::clone(self),
            index,
            generation,
            taken: false,
        }
    }

    /// Gives up on what `who` has in flight, but for requests' own pages.
    pub(crate) fn abandon(&self, who: u32) {
        for op in self.ops.borrow_mut().unfinished() {
            if op.who == who && !matches!(op.place, Place::Request(_)) {
                op.abandoned = true;
                if let Some(waker) = op.waker.take() {
                    waker.wake();
                }
            }
        }
    }

    /// Age in ns of the oldest operation of `who`; 0 if there is none.
    pub(crate) fn oldest(&self, who: u32) -> u64 {
        let now = self.timers.now();
        let mut ops = self.ops.borrow_mut();
        let ages = ops
            .unfinished()
            .filter(|op| op.who == who)
            .map(|op| now.saturating_sub(op.started).max(1));
        ages.max().unwrap_or(0)
    }

    /// A new number for [`Spec::who`].
    pub(crate) fn next_who(&self) -> u32 {
        self.who.set(self.who.get() + 1);
        self.who.get()
    }

    /// Registers a file.
    pub(crate) fn add_file(&self, fd: BorrowedFd<'_>) -> Result<u32, RingError> {
        let slot = self
            .tables
            .borrow_mut()
            .files
            .pop()
            .ok_or(RingError::Full(FILES, "files"))?;
        match self.set_file(slot, fd.as_raw_fd()) {
            Ok(()) => Ok(slot),
            Err(error) => {
                self.tables.borrow_mut().files.push(slot);
                Err(RingError::Register("files", error))
            }
        }
    }

    /// Forgets a file; what is in flight keeps it open until it ends.
    pub(crate) fn remove_file(&self, slot: u32) {
        match self.set_file(slot, -1) {
            Ok(()) => self.tables.borrow_mut().files.push(slot),
            Err(error) => tracing::error!(slot, %error, "a registered file cannot be released"),
        }
    }

    fn set_file(&self, slot: u32, fd: RawFd) -> io::Result<()> {
        let uring = self.uring.borrow();
        uring
            .submitter()
            .register_files_update(slot, &[fd])
            .map(drop)
    }

    /// Registers private memory as buffer `index`.
    ///
    /// # Panics  if `index` is not below [`POOL_BUFFERS`]
    pub(crate) fn add_memory(
        &self,
        index: u16,
        memory: &crate::buffers::Mapping,
    ) -> Result<(), RingError> {
        assert!(index < POOL_BUFFERS, "buffer {index} is a request's");
        let vector = libc::iovec {
            iov_base: memory.as_ptr().cast(),
            iov_len: memory.len(),
        };
        let uring = self.uring.borrow();
        // SAFETY: the kernel pins the pages; the mapping outlives the ring's use of them, because operations
        // keep leases, leases the pool and the pool the mapping.
        unsafe {
            uring
                .submitter()
                .register_buffers_update(u32::from(index), &[vector], None)
        }
        .map_err(|e| RingError::Register("memory", e))
    }

    /// Reserves `depth` buffers for the requests of a device; answers the first.
    pub(crate) fn add_requests(&self, depth: u16) -> Result<u16, RingError> {
        let full = || RingError::Full(BUFFERS, "buffers");
        let requests = &mut self.tables.borrow_mut().requests;
        let mut base = POOL_BUFFERS;
        let mut place = 0;
        for (i, range) in requests.iter().enumerate() {
            if range.start - base >= depth {
                break;
            }
            base = range.end;
            place = i + 1;
        }
        let end = base.checked_add(depth).ok_or_else(full)?;
        if u32::from(end) > BUFFERS {
            return Err(full());
        }
        requests.insert(place, base..end);
        Ok(base)
    }

    /// Gives the buffers of a device back.
    pub(crate) fn remove_requests(&self, base: u16) {
        self.tables
            .borrow_mut()
            .requests
            .retain(|range| range.start != base);
    }

    /// Sets what the commands of a device slot are made of.
    pub(crate) fn set_tags(&self, device: u16, tags: Tags, depth: u16) {
        let mut all = self.requests.borrow_mut();
        if all.len() <= usize::from(device) {
            all.resize_with(usize::from(device) + 1, Requests::default);
        }
        let answers = vec![None; usize::from(depth)];
        all[usize::from(device)] = Requests { tags, answers };
    }

    /// Buffer of a request.
    pub(crate) fn request_buffer(&self, id: RequestId) -> u16 {
        self.requests.borrow()[usize::from(id.device)].tags.base + id.tag
    }

    /// Starts an operation on all the bytes of a request, and lets the kernel answer the host as it succeeds:
    /// one turn less. Who serves the tag takes the command with [`Ring::take_answer`].
    pub(crate) fn start_answering(
        self: &Rc<Self>,
        id: RequestId,
        spec: Spec,
        vectors: impl Iterator<Item = (usize, usize)>,
    ) -> Handle {
        let result = i32::try_from(spec.len).expect("requests are at most IO_BYTES_MAX");
        let tags = self.requests.borrow()[usize::from(id.device)].tags;
        let handle = self.start(spec, vectors);
        let mut ops = self.ops.borrow_mut();
        let command = tags.commit(id.tag, result);
        let then = ops.insert(command, std::iter::empty(), self.timers.now());
        ops.get(handle.index).then = Some(then.0);
        let requests = &mut self.requests.borrow_mut()[usize::from(id.device)];
        requests.answers[usize::from(id.tag)] = Some(then);
        handle
    }

    /// Takes the command that answers a request, if one was chained to its I/O.
    pub(crate) fn take_answer(self: &Rc<Self>, id: RequestId) -> Option<Handle> {
        let requests = &mut self.requests.borrow_mut()[usize::from(id.device)];
        let (index, generation) = requests.answers[usize::from(id.tag)].take()?;
        Some(Handle {
            ring: Rc::clone(self),
            index,
            generation,
            taken: false,
        })
    }

    /// Turns since the start; with the operations of a run this gives the batch size.
    pub(crate) fn turns(&self) -> u64 {
        self.turns.get()
    }
}

fn register_ring(fd: RawFd) -> io::Result<u32> {
    let mut update = RingFd {
        offset: u32::MAX,
        reserved: 0,
        data: u64::try_from(fd).expect("an open descriptor"),
    };
    // SAFETY: one update, of the size the kernel expects; it outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            fd,
            REGISTER_RING_FDS,
            &raw mut update,
            1,
        )
    };
    if result == 1 {
        Ok(update.offset)
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let update = RingFd {
            offset: self.registered,
            reserved: 0,
            data: 0,
        };
        let fd = self.uring.get_mut().as_raw_fd();
        // SAFETY: as in `register_ring`.
        unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                fd,
                UNREGISTER_RING_FDS,
                &raw const update,
                1,
            );
        }
        // Descriptors are given back at once, not when the kernel gets to it.
        let _ = self.uring.get_mut().submitter().unregister_files();
        let _ = self.uring.get_mut().submitter().unregister_buffers();
    }
}

/// One operation, awaited.
#[derive(Debug)]
pub(crate) struct Handle {
    ring: Rc<Ring>,
    index: u32,
    generation: u32,
    taken: bool,
}

impl Future for Handle {
    type Output = Result<i32, DiskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(!self.taken, "polled after it was done");
        let this = &mut *self;
        let mut ops = this.ring.ops.borrow_mut();
        let op = ops.get(this.index);
        assert_eq!(op.generation, this.generation, "the operation is another's");
        let outcome = match op.state {
            State::Done(outcome) => outcome,
            State::Queued | State::InFlight if op.abandoned => {
                op.orphan = true;
                this.ring.orphans.set(this.ring.orphans.get() + 1);
                this.taken = true;
                return Poll::Ready(Err(DiskError::Abandoned));
            }
            State::Queued | State::InFlight => {
                if !op
                    .waker
                    .as_ref()
                    .is_some_and(|waker| waker.will_wake(cx.waker()))
                {
                    op.waker = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
            State::Free => unreachable!("freed only by this handle or as an orphan"),
        };
        ops.remove(this.index);
        this.taken = true;
        Poll::Ready(outcome)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut ops = self.ring.ops.borrow_mut();
        let op = ops.get(self.index);
        if matches!(op.state, State::Done(_)) {
            ops.remove(self.index);
            return;
        }
        op.orphan = true;
        op.waker = None;
        self.ring.orphans.set(self.ring.orphans.get() + 1);
        debug_assert!(
            !cfg!(test) || std::thread::panicking(),
            "an operation was dropped before it was done"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_may_be_taken_up_to_a_chain() {
        let mut unsent = Unsent(VecDeque::from([false, false, true, false]));
        unsent.taken(0);
        unsent.taken(1);
        unsent.taken(2);
        unsent.taken(1);
        assert!(unsent.0.is_empty());
    }

    #[test]
    #[should_panic(expected = "chained")]
    fn chain_that_is_cut_ends_the_process() {
        Unsent(VecDeque::from([false, false, true])).taken(2);
    }
}
