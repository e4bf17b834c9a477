//! The in-flight log: what a dead process was writing, for the one that comes after it.
//!
//! It lies in the first bytes of the group's memory, a file on tmpfs that outlives the process. Private copies and
//! parity are in the same memory, so an entry only says which bytes of it go where: nothing is copied. The
//! successor waits until the dead process's I/O is over (exclusive open) and writes every live entry again,
//! data and parity, before it reads or serves anything.
//!
//! # Crash
//! SIGKILL at any instant: an entry becomes live by one store after all of it is there, and is cleared when
//! its writes are complete and, if a member failed, its failure is durable. Entries of one stripe never live
//! together. A power loss takes the tmpfs with it: then there is no log, and the group is resynced.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use lunar_api::GroupUuid;

use crate::pool::{PREFIX, Pool};
use crate::sync::Waiters;

const HEADER: usize = 4096;
const ENTRY: usize = 4096;
/// Where the header names the slots that did not take the replay.
const UNREPLAYED: usize = 32;
/// Entries.
pub(crate) const ENTRIES: usize = (PREFIX - HEADER) / ENTRY;
const MAGIC: u64 = u64::from_le_bytes(*b"LUNARIF1");
const SEGMENT: usize = 24;
const ENTRY_HEAD: usize = 16;
/// Segments of one entry.
pub(crate) const SEGMENTS_MAX: usize = (ENTRY - ENTRY_HEAD) / SEGMENT;

/// One write to one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub slot: u16,
    /// Bytes from the start of the member.
    pub at: u64,
    pub len: u32,
    /// Bytes from the start of the group's memory.
    pub from: u32,
}

/// The log of the running process.
#[derive(Debug)]
pub(crate) struct InflightLog {
    pool: Rc<Pool>,
    spare: RefCell<Vec<u16>>,
    waiters: Waiters,
}

/// An entry that was filled and is live, until it is cleared.
#[derive(Debug)]
#[must_use]
pub(crate) struct Entry(u16);

fn put(cells: &[Cell<u8>], at: usize, bytes: &[u8]) {
    for (cell, byte) in cells[at..at + bytes.len()].iter().zip(bytes) {
        cell.set(*byte);
    }
}

fn get<const N: usize>(cells: &[Cell<u8>], at: usize) -> [u8; N] {
    std::array::from_fn(|i| cells[at + i].get())
}

fn get_u64(cells: &[Cell<u8>], at: usize) -> u64 {
    u64::from_le_bytes(get(cells, at))
}

/// Tells the compiler that stores before it stay before it: the reader is another process.
fn barrier() {
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}

impl InflightLog {
    /// Starts a new log. It says something to a successor only after `begin`, or if it goes on that of a
    /// process that died (`died`): that stays valid throughout, with what its replay could not write.
    pub(crate) fn start(pool: &Rc<Pool>, group: GroupUuid, generation: u64, died: bool) -> Self {
        let cells = pool.cells(0..PREFIX);
        if !died {
            put(cells, 0, &[0; 8]);
            barrier();
            put(cells, UNREPLAYED, &[0; 8]);
        }
        for entry in 0..ENTRIES {
            put(cells, HEADER + entry * ENTRY, &[0; ENTRY_HEAD]);
        }
        put(cells, 8, &group.to_bytes());
        put(cells, 24, &generation.to_le_bytes());
        barrier();
        let spare = (0..ENTRIES)
            .rev()
            .map(|e| u16::try_from(e).expect("255 entries"))
            .collect();
        Self {
            pool: Rc::clone(pool),
            spare: RefCell::new(spare),
            waiters: Waiters::default(),
        }
    }

    /// From here on, finding this log proves that no more than a process died.
    ///
    /// # Crash  after the superblocks say what a power loss before this start left behind
    pub(crate) fn begin(&self) {
        barrier();
        put(self.pool.cells(0..HEADER), 0, &MAGIC.to_le_bytes());
    }

    /// Notes that superblocks of up to this generation may be on the disks from now on.
    pub(crate) fn expect_generation(&self, generation: u64) {
        put(self.pool.cells(0..HEADER), 24, &generation.to_le_bytes());
    }

    /// Waits for a free entry. A holder of one waits for disks only.
    pub(crate) async fn open(&self) -> Entry {
        let entry = self.waiters.until(|| self.spare.borrow_mut().pop()).await;
        Entry(entry)
    }

    /// Makes the entry live: from here on a successor writes these segments.
    ///
    /// # Panics  if there are more than `SEGMENTS_MAX` segments
    pub(crate) fn commit(&self, entry: &Entry, segments: &[Segment]) {
        assert!(
            segments.len() <= SEGMENTS_MAX,
            "{} segments",
            segments.len()
        );
        let base = HEADER + usize::from(entry.0) * ENTRY;
        let cells = self.pool.cells(base..base + ENTRY);
        for (i, segment) in segments.iter().enumerate() {
            let at = ENTRY_HEAD + i * SEGMENT;
            put(cells, at, &segment.at.to_le_bytes());
            put(cells, at + 8, &segment.len.to_le_bytes());
            put(cells, at + 12, &segment.from.to_le_bytes());
            put(cells, at + 16, &segment.slot.to_le_bytes());
        }
        put(
            cells,
            8,
            &u64::try_from(segments.len()).expect("few").to_le_bytes(),
        );
        barrier();
        cells[0].set(1);
        barrier();
    }

    /// The writes are complete, and whatever they rely on is durable.
    pub(crate) fn clear(&self, entry: Entry) {
        barrier();
        self.pool.cells(
            HEADER + usize::from(entry.0) * ENTRY..HEADER + usize::from(entry.0) * ENTRY + 1,
        )[0]
        .set(0);
        self.spare.borrow_mut().push(entry.0);
        self.waiters.wake_one();
    }

    /// A clean stop: there is nothing for a successor.
    pub(crate) fn end(&self) {
        put(self.pool.cells(0..HEADER), 0, &[0; 8]);
    }
}

/// What a dead predecessor left.
#[derive(Debug)]
pub(crate) struct Left {
    pub generation: u64,
    pub segments: Vec<Segment>,
    /// Slots that an earlier replay could not write, as bits; their failure is not durable yet.
    pub unreplayed: u64,
}

/// Notes that the entries are written again but for these slots: the memory that they name may be used.
///
/// # Crash  the slots are noted before the first entry is dropped
pub(crate) fn replayed(pool: &Pool, unreplayed: u64) {
    let cells = pool.cells(0..PREFIX);
    put(cells, UNREPLAYED, &unreplayed.to_le_bytes());
    barrier();
    for entry in 0..ENTRIES {
        cells[HEADER + entry * ENTRY].set(0);
    }
    barrier();
}

/// Reads what is in the memory; none if no process of this group died with it.
pub(crate) fn read(pool: &Pool, group: GroupUuid, memory_len: u64) -> Option<Left> {
    let cells = pool.cells(0..PREFIX);
    if get_u64(cells, 0) != MAGIC || get::<16>(cells, 8) != group.to_bytes() {
        return None;
    }
    let mut segments = Vec::new();
    for entry in 0..ENTRIES {
        let base = HEADER + entry * ENTRY;
        if cells[base].get() != 1 {
            continue;
        }
        let count = usize::try_from(get_u64(cells, base + 8))
            .ok()
            .filter(|n| *n <= SEGMENTS_MAX)?;
        for i in 0..count {
            let at = base + ENTRY_HEAD + i * SEGMENT;
            let segment = Segment {
                at: get_u64(cells, at),
                len: u32::from_le_bytes(get(cells, at + 8)),
                from: u32::from_le_bytes(get(cells, at + 12)),
                slot: u16::from_le_bytes(get(cells, at + 16)),
            };
            if u64::from(segment.from) + u64::from(segment.len) > memory_len {
                return None;
            }
            segments.push(segment);
        }
    }
    Some(Left {
        generation: get_u64(cells, 24),
        segments,
        unreplayed: get_u64(cells, UNREPLAYED),
    })
}
