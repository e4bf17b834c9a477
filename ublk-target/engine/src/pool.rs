//! The private memory of a group and who holds which part of it.
//!
//! A buddy allocator over one [`Memory`], in blocks of 4 KiB to 4 MiB. Waiters are served in order of
//! arrival, so a large request is not starved by small ones: a full pool is flow control, never an error.
//!
//! Deadlock is excluded by order, not by luck: there are two parts that do not borrow from one another, and a
//! holder of `Work` memory waits for nothing but disks. Whoever holds `Data` memory (a request's private copy)
//! may wait for a stripe and then for `Work`; nobody waits the other way round.
//!
//! What a member that does not answer holds does not come back: its I/O cannot be cancelled. So that the others go on
//! meanwhile, a part of the pool is set aside in whole blocks and lent when a member is given up. Nobody could
//! hold or split those blocks before, and who takes them then waits for members that answer. Each member that is
//! given up gets half of what is left; when the last of their I/O is over, the reserve is filled again.
//!
//! A failed group keeps what its in-flight log names, for ever. Its pool is closed: who would have to wait is refused.
//!
//! The first [`PREFIX`] bytes of the memory are not leased: the in-flight log lives there.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use crate::sync::Waiters;
use crate::traits::Memory;

/// Smallest block, in bytes.
pub const BLOCK_MIN: usize = 4096;
/// Slot of the lease on everything.
const WHOLE: u16 = u16::MAX;
/// Bytes at the start of the memory that belong to the in-flight log.
pub const PREFIX: usize = 1 << 20;
/// Orders of blocks: 4 KiB << 0 ..= 4 KiB << 10 = 4 MiB.
const ORDERS: usize = 11;
/// Largest block, in bytes.
pub const BLOCK_MAX: usize = BLOCK_MIN << (ORDERS - 1);

/// Blocks of the reserve: 1 MiB, what the longest request or pass takes.
const RESERVE_ORDER: u8 = 8;
/// This part of each quota is set aside.
const RESERVE_PART: usize = 4;
/// Longest lease of a group, in bytes: it fits a block of the reserve.
pub const LEASE_MAX: usize = BLOCK_MIN << RESERVE_ORDER;

/// What a lease is for; each kind has a part of the pool for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    /// Private copies of host requests.
    Data = 0,
    /// Old data, parity and reconstruction of a stripe that is locked; metadata.
    Work = 1,
}

/// Why there is no lease: the pool is closed, and has nothing free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

#[derive(Debug, Clone, Copy)]
struct Block {
    start: u32,
    order: u8,
    quota: Quota,
    holders: u32,
}

struct Inner {
    /// Free blocks of each quota and order, by start / BLOCK_MIN.
    free: [[Vec<u32>; ORDERS]; 2],
    /// Live leases; `spare` are unused places.
    blocks: Vec<Block>,
    spare: Vec<u16>,
    used: [usize; 2],
    tickets: [VecDeque<u64>; 2],
    ticket: u64,
    /// Blocks of `RESERVE_ORDER` set aside now, and how many there are when none is lent.
    reserve: [Vec<u32>; 2],
    reserve_max: [usize; 2],
    /// The reserve takes what becomes free.
    refilling: bool,
    closed: bool,
}

/// The pool; made once per group.
pub struct Pool {
    memory: Box<dyn Memory>,
    inner: RefCell<Inner>,
    waiters: [Waiters; 2],
    waits: Cell<u64>,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = self.inner.borrow();
        f.debug_struct("Pool").field("used", &inner.used).finish()
    }
}

impl Pool {
    /// Makes room for so many who wait.
    pub(crate) fn reserve(&self, tasks: usize) {
        for waiters in &self.waiters {
            waiters.reserve(tasks);
        }
    }

    /// Takes a memory; a third of what follows the prefix is kept for `Work`.
    ///
    /// # Panics  if the memory is not the prefix and at least two of the largest blocks, whole
    pub fn new(memory: Box<dyn Memory>) -> Rc<Self> {
        let len = memory.bytes().saturating_sub(PREFIX);
        assert!(
            len >= 2 * BLOCK_MAX && len.is_multiple_of(BLOCK_MAX),
            "pool of {len} bytes"
        );
        let work = (len / 3).next_multiple_of(BLOCK_MAX);
        let block = |at: usize| u32::try_from(at / BLOCK_MIN).expect("pools are far below 16 TiB");
        let mut free: [[Vec<u32>; ORDERS]; 2] = Default::default();
        for list in free.iter_mut().flatten() {
            list.reserve(len / BLOCK_MIN / 2);
        }
        // Offsets within the leased part, so that a buddy is one bit away.
        for at in (0..len).step_by(BLOCK_MAX).rev() {
            let quota = if at < len - work {
                Quota::Data
            } else {
                Quota::Work
            };
            free[quota as usize][ORDERS - 1].push(block(at));
        }
        let leases = len / BLOCK_MIN;
        let inner = Inner {
            free,
            blocks: Vec::with_capacity(leases),
            spare: Vec::with_capacity(leases),
            used: [0; 2],
            tickets: [VecDeque::with_capacity(4096), VecDeque::with_capacity(4096)],
            ticket: 0,
            reserve: Default::default(),
            reserve_max: [0; 2],
            refilling: false,
            closed: false,
        };
        Rc::new(Self {
            memory,
            inner: RefCell::new(inner),
            waiters: Default::default(),
            waits: Cell::new(0),
        })
    }

    /// The whole memory, prefix included, as it was found: for replay at start, before anything is leased.
    pub fn whole(self: &Rc<Self>) -> Lease {
        Lease {
            pool: Rc::clone(self),
            slot: WHOLE,
            len: u32::try_from(self.memory.bytes()).unwrap_or(u32::MAX),
        }
    }

    /// A view of a part of the memory, whoever holds it.
    pub fn cells(&self, range: Range<usize>) -> &[Cell<u8>] {
        self.memory.cells(range)
    }

    /// Sets the reserve aside; before that the whole pool may be leased.
    pub(crate) fn set_aside(&self) {
        let mut inner = self.inner.borrow_mut();
        for q in 0..2 {
            let bytes: usize = (0..ORDERS)
                .map(|o| inner.free[q][o].len() * (BLOCK_MIN << o))
                .sum();
            inner.reserve_max[q] = bytes / RESERVE_PART / LEASE_MAX;
        }
        inner.refilling = true;
        inner.refill();
    }

    /// A member was given up, and its I/O may never end: lends half of what is set aside to the others.
    pub(crate) fn lend(&self) {
        self.inner.borrow_mut().lend(|reserve| reserve.div_ceil(2));
        self.wake();
    }

    /// The I/O of all members that were given up is over: fills the reserve again, now and as memory comes back.
    pub(crate) fn recall(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.refilling = true;
        inner.refill();
    }

    /// From now on whoever would have to wait is refused; what was set aside is given out.
    pub(crate) fn close(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.closed = true;
        inner.lend(|reserve| reserve);
        drop(inner);
        self.wake();
    }

    fn wake(&self) {
        for waiters in &self.waiters {
            waiters.wake_all();
        }
    }

    /// Waits in order for `len` bytes.
    ///
    /// # Panics  if `len` is 0 or above [`BLOCK_MAX`]
    pub async fn lease(self: &Rc<Self>, quota: Quota, len: usize) -> Lease {
        match self.wait(quota, len, false).await {
            Ok(lease) => lease,
            Err(Closed) => unreachable!("only who asks for it is refused"),
        }
    }

    /// Waits in order for `len` bytes, as long as that can have an end.
    ///
    /// # Panics  if `len` is 0 or above [`LEASE_MAX`]
    pub(crate) async fn lease_if_open(
        self: &Rc<Self>,
        quota: Quota,
        len: usize,
    ) -> Result<Lease, Closed> {
        assert!(len <= LEASE_MAX, "a lease of {len} bytes in a group");
        self.wait(quota, len, true).await
    }

    async fn wait(
        self: &Rc<Self>,
        quota: Quota,
        len: usize,
        give_up: bool,
    ) -> Result<Lease, Closed> {
        assert!((1..=BLOCK_MAX).contains(&len), "a lease of {len} bytes");
        let order = order_of(len);
        let q = quota as usize;
        if self.inner.borrow().tickets[q].is_empty()
            && let Some(slot) = self.inner.borrow_mut().take(quota, order)
        {
            return Ok(self.hand_out(slot, len));
        }
        self.waits.set(self.waits.get() + 1);
        let ticket = {
            let mut inner = self.inner.borrow_mut();
            inner.ticket += 1;
            let ticket = inner.ticket;
            inner.tickets[q].push_back(ticket);
            ticket
        };
        let slot = self.waiters[q]
            .until(|| {
                let mut inner = self.inner.borrow_mut();
                let slot = match inner.tickets[q].front() == Some(&ticket) {
                    true => inner.take(quota, order),
                    false => None,
                };
                if slot.is_none() && !(give_up && inner.closed) {
                    return None;
                }
                inner.tickets[q].retain(|t| *t != ticket);
                Some(slot)
            })
            .await;
        // The next in line may fit too.
        self.waiters[q].wake_all();
        let slot = slot.ok_or(Closed)?;
        Ok(self.hand_out(slot, len))
    }

    fn hand_out(self: &Rc<Self>, slot: u16, len: usize) -> Lease {
        Lease {
            pool: Rc::clone(self),
            slot,
            len: u32::try_from(len).expect("at most 4 MiB"),
        }
    }

    /// How often a lease had to wait.
    pub fn waits(&self) -> u64 {
        self.waits.get()
    }

    /// Bytes handed out.
    pub fn used(&self) -> usize {
        self.inner.borrow().used.iter().sum()
    }
}

fn order_of(len: usize) -> u8 {
    let blocks = len.div_ceil(BLOCK_MIN).next_power_of_two();
    u8::try_from(blocks.trailing_zeros()).expect("at most 10")
}

impl Inner {
    /// Takes the start of a free block out, splitting a larger one if need be.
    fn split_off(&mut self, q: usize, order: u8) -> Option<u32> {
        let free = &mut self.free[q];
        let from = (usize::from(order)..ORDERS).find(|o| !free[*o].is_empty())?;
        let start = free[from].pop()?;
        for o in (usize::from(order)..from).rev() {
            free[o].push(start + (1 << o));
        }
        Some(start)
    }

    /// Takes a block, splitting larger ones.
    fn take(&mut self, quota: Quota, order: u8) -> Option<u16> {
        let start = self.split_off(quota as usize, order)?;
        self.used[quota as usize] += BLOCK_MIN << order;
        let block = Block {
            start,
            order,
            quota,
            holders: 1,
        };
        Some(match self.spare.pop() {
            Some(slot) => {
                self.blocks[usize::from(slot)] = block;
                slot
            }
            None => {
                self.blocks.push(block);
                u16::try_from(self.blocks.len() - 1).expect("at most one lease a block")
            }
        })
    }

    fn put(&mut self, slot: u16) {
        let block = self.blocks[usize::from(slot)];
        self.used[block.quota as usize] -= BLOCK_MIN << block.order;
        self.spare.push(slot);
        self.set_free(block.quota as usize, block.start, block.order);
        if self.refilling {
            self.refill();
        }
    }

    /// Moves whole blocks to the reserve until it is full.
    fn refill(&mut self) {
        for q in 0..2 {
            while self.reserve[q].len() < self.reserve_max[q] {
                let Some(start) = self.split_off(q, RESERVE_ORDER) else {
                    return;
                };
                self.reserve[q].push(start);
            }
        }
        self.refilling = false;
    }

    /// Moves so many blocks of each reserve to where they may be leased.
    fn lend(&mut self, part: impl Fn(usize) -> usize) {
        self.refilling = false;
        for q in 0..2 {
            for _ in 0..part(self.reserve[q].len()) {
                let start = self.reserve[q].pop().expect("a part of it");
                self.set_free(q, start, RESERVE_ORDER);
            }
        }
    }

    fn set_free(&mut self, q: usize, mut start: u32, order: u8) {
        let free = &mut self.free[q];
        let mut order = usize::from(order);
        while order + 1 < ORDERS {
            let buddy = start ^ (1 << order);
            let Some(i) = free[order].iter().position(|s| *s == buddy) else {
                break;
            };
            free[order].swap_remove(i);
            start = start.min(buddy);
            order += 1;
        }
        free[order].push(start);
    }
}

/// A part of the pool, held. Cloning shares it; it goes back when the last clone is dropped.
pub struct Lease {
    pool: Rc<Pool>,
    slot: u16,
    len: u32,
}

impl Lease {
    /// Bytes asked for.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Says whether it is empty; it never is.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Byte offset in the group's memory.
    pub fn start(&self) -> usize {
        if self.slot == WHOLE {
            return 0;
        }
        let block = self.pool.inner.borrow().blocks[usize::from(self.slot)].start as usize;
        PREFIX + block * BLOCK_MIN
    }

    /// A view of a part.
    ///
    /// # Panics  if `range` is outside the lease
    pub fn cells(&self, range: Range<usize>) -> &[Cell<u8>] {
        assert!(
            range.end <= self.len(),
            "{range:?} of a lease of {} bytes",
            self.len
        );
        let start = self.start();
        self.pool
            .memory
            .cells(start + range.start..start + range.end)
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("slot", &self.slot)
            .field("len", &self.len)
            .finish()
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        if self.slot != WHOLE {
            self.pool.inner.borrow_mut().blocks[usize::from(self.slot)].holders += 1;
        }
        Self {
            pool: Rc::clone(&self.pool),
            slot: self.slot,
            len: self.len,
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.slot == WHOLE {
            return;
        }
        let mut inner = self.pool.inner.borrow_mut();
        let block = &mut inner.blocks[usize::from(self.slot)];
        block.holders -= 1;
        if block.holders > 0 {
            return;
        }
        let block = *block;
        inner.put(self.slot);
        let quota = block.quota;
        drop(inner);
        self.pool.waiters[quota as usize].wake_all();
    }
}
