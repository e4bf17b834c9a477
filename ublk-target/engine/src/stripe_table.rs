//! Who works on which stripe, and who waits for it.
//!
//! A stripe that somebody wants has a head; the head holds its queue and is worked on by one worker at a
//! time. That is the range lock: overlapping writes meet in one head, and writes that wait together are taken
//! together. Nothing is allocated once the slabs have grown.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::task::{Poll, Waker};

use arrayvec::ArrayVec;

use crate::plan::{Span, WRITES_MAX};
use crate::pool::Lease;
use crate::raid_group::WORKERS;
use crate::sync::Waiters;
use crate::traits::RequestId;

/// What is to be done to a stripe.
#[derive(Debug)]
pub(crate) enum Task {
    /// Write `span` from `lease`, where byte `from` is the first.
    Write {
        span: Span,
        lease: Lease,
        from: u32,
        fua: bool,
        copied: Cell<Copied>,
    },
    /// Read `span` by way of redundancy into `lease` at `to`; `avoid` are slots that just failed to read it.
    Read {
        span: Span,
        lease: Lease,
        to: u32,
        avoid: u64,
    },
    /// Make the redundancy of the whole stripe right, or fill the slot that is rebuilt.
    Sync,
    /// Copy the stripe's part of the disk that is replaced.
    Copy,
    /// Compare the whole stripe, and make it fit.
    Scrub { repair: bool },
    /// Give the stripe to whoever waits for it; `release_held` takes it back.
    Hold,
}

/// Whether the bytes of a write are in its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Copied {
    Yes,
    /// The worker copies them while it reads what they replace: they begin at `offset` of a request.
    No {
        id: RequestId,
        offset: u32,
    },
    /// They could not be had; the write is not done, others of its batch are.
    Failed,
}

impl Task {
    /// Says whether it is a write whose bytes could not be had.
    pub(crate) fn is_void(&self) -> bool {
        matches!(self, Self::Write { copied, .. } if copied.get() == Copied::Failed)
    }
}

/// A task with who waits for it.
#[derive(Debug)]
pub(crate) struct Item {
    pub task: Task,
    pub join: JoinId,
    /// LU whose counters it moves; none for background work.
    pub lu: Option<u16>,
}

/// What one worker takes at once: writes that share no grain, or one other task.
pub(crate) type Batch = ArrayVec<Item, WRITES_MAX>;

/// A request's place to wait for its items.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct JoinId(u32);

#[derive(Debug, Default)]
struct Join {
    left: u32,
    errno: i32,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Head {
    stripe: u64,
    queue: VecDeque<Item>,
    next: Option<u32>,
}

#[derive(Debug)]
struct Inner {
    heads: Vec<Head>,
    spare: Vec<u32>,
    buckets: Vec<Option<u32>>,
    ready: VecDeque<u32>,
    joins: Vec<Join>,
    spare_joins: Vec<u32>,
}

/// The table; one a group.
#[derive(Debug)]
pub(crate) struct StripeTable {
    inner: RefCell<Inner>,
    work: Waiters,
    stopped: Cell<bool>,
}

const BUCKETS: usize = 1024;

fn bucket(stripe: u64) -> usize {
    usize::try_from(stripe % BUCKETS as u64).expect("below BUCKETS")
}

impl StripeTable {
    pub(crate) fn new() -> Self {
        let inner = Inner {
            heads: Vec::new(),
            spare: Vec::new(),
            buckets: vec![None; BUCKETS],
            ready: VecDeque::new(),
            joins: Vec::new(),
            spare_joins: Vec::new(),
        };
        let table = Self {
            inner: RefCell::new(inner),
            work: Waiters::default(),
            stopped: Cell::new(false),
        };
        table.grow(512);
        table.work.reserve(WORKERS);
        table
    }

    /// Makes room for so many stripes and requests at once in all, so that serving them does not.
    pub(crate) fn reserve(&self, in_all: usize) {
        let have = self.inner.borrow().heads.len();
        self.grow(in_all.saturating_sub(have));
    }

    fn grow(&self, more: usize) {
        let mut inner = self.inner.borrow_mut();
        let first = inner.heads.len();
        for i in first..first + more {
            inner.heads.push(Head {
                queue: VecDeque::with_capacity(8),
                ..Head::default()
            });
            inner.joins.push(Join::default());
            let i = u32::try_from(i).expect("far below 2^32 heads");
            inner.spare.push(i);
            inner.spare_joins.push(i);
        }
        let room = inner.heads.len();
        inner.ready.reserve(room);
    }

    /// Opens a place to wait; `wait` closes it.
    pub(crate) fn open(&self) -> JoinId {
        if self.inner.borrow().spare_joins.is_empty() {
            self.grow(128);
        }
        let mut inner = self.inner.borrow_mut();
        let id = inner.spare_joins.pop().expect("just grown");
        inner.joins[id as usize] = Join::default();
        JoinId(id)
    }

    /// Waits for every item that was pushed with `id`; `Err` is the first errno.
    pub(crate) async fn wait(&self, id: JoinId) -> Result<(), i32> {
        let errno = std::future::poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            let join = &mut inner.joins[id.0 as usize];
            if join.left == 0 {
                join.waker = None;
                return Poll::Ready(join.errno);
            }
            if !join
                .waker
                .as_ref()
                .is_some_and(|waker| waker.will_wake(cx.waker()))
            {
                join.waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
        self.inner.borrow_mut().spare_joins.push(id.0);
        if errno == 0 { Ok(()) } else { Err(errno) }
    }

    /// Ends an item.
    pub(crate) fn done(&self, item: &Item, result: Result<(), i32>) {
        let mut inner = self.inner.borrow_mut();
        let join = &mut inner.joins[item.join.0 as usize];
        join.left -= 1;
        if let Err(errno) = result
            && join.errno == 0
        {
            join.errno = errno;
        }
        if join.left == 0
            && let Some(waker) = join.waker.take()
        {
            waker.wake();
        }
    }

    /// Queues an item at its stripe. Returns true if it has to wait for another.
    pub(crate) fn push(&self, stripe: u64, item: Item) -> bool {
        if self.inner.borrow().spare.is_empty() {
            self.grow(128);
        }
        let mut inner = self.inner.borrow_mut();
        inner.joins[item.join.0 as usize].left += 1;
        let mut at = inner.buckets[bucket(stripe)];
        while let Some(head) = at {
            if inner.heads[head as usize].stripe == stripe {
                inner.heads[head as usize].queue.push_back(item);
                return true;
            }
            at = inner.heads[head as usize].next;
        }
        let head = inner.spare.pop().expect("just grown");
        let next = inner.buckets[bucket(stripe)].replace(head);
        let place = &mut inner.heads[head as usize];
        place.stripe = stripe;
        place.next = next;
        place.queue.push_back(item);
        inner.ready.push_back(head);
        drop(inner);
        self.work.wake_one();
        false
    }

    /// Waits for a stripe with work; none when the group has stopped.
    pub(crate) async fn take(&self, batch: &mut Batch) -> Option<(u64, u32)> {
        let head = self
            .work
            .until(|| match self.inner.borrow_mut().ready.pop_front() {
                Some(head) => Some(Some(head)),
                None if self.stopped.get() => Some(None),
                None => None,
            })
            .await?;
        let mut inner = self.inner.borrow_mut();
        if !inner.ready.is_empty() {
            self.work.wake_one();
        }
        let place = &mut inner.heads[head as usize];
        let stripe = place.stripe;
        take_batch(&mut place.queue, batch);
        Some((stripe, head))
    }

    /// Gives a stripe back: to whoever waits for it, or to nobody.
    pub(crate) fn release(&self, head: u32) {
        let mut inner = self.inner.borrow_mut();
        if inner.heads[head as usize].queue.is_empty() {
            let (stripe, next) = (
                inner.heads[head as usize].stripe,
                inner.heads[head as usize].next,
            );
            let first = bucket(stripe);
            if inner.buckets[first] == Some(head) {
                inner.buckets[first] = next;
            } else {
                let mut at = inner.buckets[first].expect("the head is in its bucket");
                while inner.heads[at as usize].next != Some(head) {
                    at = inner.heads[at as usize]
                        .next
                        .expect("the head is in its bucket");
                }
                inner.heads[at as usize].next = next;
            }
            inner.spare.push(head);
            return;
        }
        inner.ready.push_back(head);
        drop(inner);
        self.work.wake_one();
    }

    /// Gives a stripe back that was handed over by [`Task::Hold`].
    pub(crate) fn release_held(&self, stripe: u64) {
        let head = {
            let inner = self.inner.borrow();
            let mut at = inner.buckets[bucket(stripe)];
            while let Some(head) = at
                && inner.heads[head as usize].stripe != stripe
            {
                at = inner.heads[head as usize].next;
            }
            at.expect("it is held")
        };
        self.release(head);
    }

    /// Lets the workers end once nothing is left to do.
    pub(crate) fn stop(&self) {
        self.stopped.set(true);
        self.work.wake_all();
    }

    /// Says whether no stripe is worked on or waited for.
    pub(crate) fn is_idle(&self) -> bool {
        let inner = self.inner.borrow();
        inner.spare.len() == inner.heads.len()
    }
}

/// Moves the first task, and if it is a write every later write that shares no grain with those taken.
fn take_batch(queue: &mut VecDeque<Item>, batch: &mut Batch) {
    let Some(first) = queue.pop_front() else {
        return;
    };
    let is_write = matches!(first.task, Task::Write { .. });
    batch.push(first);
    if !is_write {
        return;
    }
    let mut i = 0;
    while i < queue.len() && !batch.is_full() {
        let Task::Write { span, .. } = &queue[i].task else {
            i += 1;
            continue;
        };
        if batch.iter().any(|item| shares_grain(&item.task, span)) {
            i += 1;
        } else if let Some(item) = queue.remove(i) {
            batch.push(item);
        }
    }
}

fn shares_grain(task: &Task, with: &Span) -> bool {
    let Task::Write { span, .. } = task else {
        return false;
    };
    let (a, b) = (span.grains(), with.grains());
    span.data == with.data && a.start < b.end && b.start < a.end
}
