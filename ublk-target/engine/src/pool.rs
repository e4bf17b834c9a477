//! The private memory of a group and who holds which part of it.
//!
//! A buddy allocator over one [`Memory`], in blocks of 4 KiB to 4 MiB. Waiters are served in order of
//! arrival, so a large request is not starved by small ones: a full pool is flow control, never an error.
//!
//! Deadlock is excluded by order, not by luck: there are two parts that do not borrow from one another, and a
//! holder of `Work` memory waits for nothing but disks. Whoever holds `Data` memory (a request's private copy)
//! may wait for a stripe and then for `Work`; nobody waits the other way round.
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

/// What a lease is for; each kind has a part of the pool for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quota {
    /// Private copies of host requests.
    Data = 0,
    /// Old data, parity and reconstruction of a stripe that is locked; metadata.
    Work = 1,
}

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

    /// Waits in order for `len` bytes.
    ///
    /// # Panics  if `len` is 0 or above [`BLOCK_MAX`]
    pub async fn lease(self: &Rc<Self>, quota: Quota, len: usize) -> Lease {
        assert!((1..=BLOCK_MAX).contains(&len), "a lease of {len} bytes");
        let order = order_of(len);
        let q = quota as usize;
        if self.inner.borrow().tickets[q].is_empty()
            && let Some(slot) = self.inner.borrow_mut().take(quota, order)
        {
            return self.hand_out(slot, len);
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
                if inner.tickets[q].front() != Some(&ticket) {
                    return None;
                }
                let slot = inner.take(quota, order)?;
                inner.tickets[q].pop_front();
                Some(slot)
            })
            .await;
        // The next in line may fit too.
        self.waiters[q].wake_all();
        self.hand_out(slot, len)
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
    /// Takes a block, splitting larger ones.
    fn take(&mut self, quota: Quota, order: u8) -> Option<u16> {
        let bytes = BLOCK_MIN << order;
        let q = quota as usize;
        let free = &mut self.free[q];
        let from = (usize::from(order)..ORDERS).find(|o| !free[*o].is_empty())?;
        let start = free[from].pop()?;
        for o in (usize::from(order)..from).rev() {
            free[o].push(start + (1 << o));
        }
        self.used[q] += bytes;
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
        let free = &mut self.free[block.quota as usize];
        let mut start = block.start;
        let mut order = usize::from(block.order);
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
