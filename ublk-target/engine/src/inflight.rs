//! The in-flight log: what a dead process was writing, for the one that comes after it.
//!
//! It lies in the first bytes of the group's memory, a file on tmpfs that outlives the process. Private copies and
//! parity are in the same memory, so an entry only says which bytes of it go where: nothing is copied. It names
//! disks, not slots: another disk may be in a slot before an entry of the former is cleared. The successor waits until the dead process's I/O is over (exclusive open) and writes every live entry again,
//! data and parity, before it reads or serves anything.
//!
//! # Crash
//! SIGKILL at any instant: an entry becomes live by one store after all of it is there, and is cleared when
//! its writes are complete and, if a member failed, its failure is durable. Entries of one stripe never live
//! together. A power loss takes the tmpfs with it: then there is no log, and the group is resynced.
//!
//! # Layout
//! Little endian. At 0 a header: magic (8; 0: nothing to say), group (16), generation (8), slots that failed or did not
//! take a replay, which the superblocks do not say yet (8). From 4096 on entries of 4096 bytes: live (1), 7 unused, count (8), then segments: address on the
//! disk (8), length (4), place in the memory (4; ffffffff: zeroes), disk (16).

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use lunar_api::{DiskUuid, GroupUuid};

use crate::pool::{BLOCK_MIN, PREFIX, Pool};
use crate::sync::Waiters;

const HEADER: usize = 4096;
const ENTRY: usize = 4096;
/// Where the header names the slots that did not take the replay.
const UNREPLAYED: usize = 32;
/// Entries.
pub(crate) const ENTRIES: usize = (PREFIX - HEADER) / ENTRY;
const MAGIC: u64 = u64::from_le_bytes(*b"LUNARIF3");
/// In place of a place in the memory: the range is zeroed.
pub(crate) const ZEROES: u32 = u32::MAX;
/// What the magic of every version begins with.
const MAGIC_START: [u8; 7] = *b"LUNARIF";
const SEGMENT: usize = 32;
const ENTRY_HEAD: usize = 16;
/// Segments of one entry.
pub(crate) const SEGMENTS_MAX: usize = (ENTRY - ENTRY_HEAD) / SEGMENT;

/// One write to one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub disk: DiskUuid,
    /// Bytes from the start of the disk.
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
    /// Slots whose failure is noted here, as bits.
    failed: Cell<u64>,
}

/// An entry that was filled and is live, until it is cleared.
#[derive(Debug)]
#[must_use]
pub(crate) struct Entry(u16);

/// Entries that nobody fills; given back when it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Held<'a>(Vec<(&'a InflightLog, u16)>);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for (log, entry) in self.0.drain(..) {
            log.clear(Entry(entry));
        }
    }
}

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
    /// Makes room for so many who wait for an entry.
    pub(crate) fn reserve(&self, tasks: usize) {
        self.waiters.reserve(tasks);
    }

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
            failed: Cell::new(0),
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

    /// Takes the free entries; answers true once nobody else has any.
    pub(crate) fn take_all<'a>(&'a self, held: &mut Held<'a>) -> bool {
        held.0
            .extend(self.spare.borrow_mut().drain(..).map(|entry| (self, entry)));
        held.0.len() == ENTRIES
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
            put(cells, at + 16, &segment.disk.to_bytes());
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

    /// Notes slots, as bits, that have failed: what their disks were told before may be gone with their caches, and a successor
    /// that found them well would believe it.
    ///
    /// # Crash  until the superblocks say that they have failed, this does
    pub(crate) fn note_failed(&self, slots: u64) {
        self.failed.set(self.failed.get() | slots);
        let cells = self.pool.cells(0..HEADER);
        let noted = get_u64(cells, UNREPLAYED) | slots;
        put(cells, UNREPLAYED, &noted.to_le_bytes());
        barrier();
    }

    /// The superblocks say it of those that this process has noted.
    pub(crate) fn failures_are_durable(&self) {
        let slots = self.failed.take();
        if slots != 0 {
            barrier();
            let cells = self.pool.cells(0..HEADER);
            let noted = get_u64(cells, UNREPLAYED) & !slots;
            put(cells, UNREPLAYED, &noted.to_le_bytes());
        }
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
    /// Slots that an earlier replay could not write or that had failed, as bits; their failure is not durable yet.
    pub unreplayed: u64,
}

impl Left {
    /// A page of the memory that no entry names: there is one, the place of a superblock.
    pub(crate) fn spare_page(&self, memory_len: u64) -> Option<usize> {
        let mut named: Vec<_> = self
            .segments
            .iter()
            .filter(|segment| segment.from != ZEROES)
            .map(|segment| segment.from as usize..(segment.from + segment.len) as usize)
            .collect();
        named.sort_unstable_by_key(|range| range.start);
        let mut page = PREFIX;
        for range in named {
            if page + BLOCK_MIN <= range.start {
                break;
            }
            page = page.max(range.end.next_multiple_of(BLOCK_MIN));
        }
        ((page + BLOCK_MIN) as u64 <= memory_len).then_some(page)
    }
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

/// Why what a dead process left cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "what a dead process was writing is in an in-flight log of version `{}`, which this Lunar does not read",
    char::from(*version)
)]
pub(crate) struct OtherVersion {
    version: u8,
}

/// Says whether another version of Lunar left a log of the group that is as new as its disks.
pub(crate) fn check_version(
    pool: &Pool,
    group: GroupUuid,
    generation: u64,
) -> Result<(), OtherVersion> {
    // This much of the header has been the same in all versions.
    let cells = pool.cells(0..HEADER);
    let magic = get::<8>(cells, 0);
    let is_other = magic.starts_with(&MAGIC_START) && u64::from_le_bytes(magic) != MAGIC;
    let is_ours = get::<16>(cells, 8) == group.to_bytes() && get_u64(cells, 24) >= generation;
    match is_other && is_ours {
        true => Err(OtherVersion { version: magic[7] }),
        false => Ok(()),
    }
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
                disk: DiskUuid::from_bytes(get(cells, at + 16)),
            };
            let end = u64::from(segment.from) + u64::from(segment.len);
            if segment.from != ZEROES && end > memory_len {
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

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::pool::BLOCK_MAX;
    use crate::traits::Memory;

    struct Bytes(Vec<Cell<u8>>);

    impl Memory for Bytes {
        fn bytes(&self) -> usize {
            self.0.len()
        }
        fn cells(&self, range: Range<usize>) -> &[Cell<u8>] {
            &self.0[range]
        }
    }

    const GROUP: GroupUuid = GroupUuid::from_bytes([9; 16]);

    fn pool() -> Rc<Pool> {
        let bytes = vec![Cell::new(0); PREFIX + 3 * BLOCK_MAX];
        Pool::new(Box::new(Bytes(bytes)))
    }

    fn version(pool: &Pool, generation: u64) -> Result<(), u8> {
        check_version(pool, GROUP, generation).map_err(|other| other.version)
    }

    #[test]
    fn live_entries_are_read_back_with_their_disk() {
        let pool = pool();
        let log = InflightLog::start(&pool, GROUP, 7, false);
        log.begin();
        let segment = |n: u8| Segment {
            disk: DiskUuid::from_bytes([n; 16]),
            at: 1 << 40 | u64::from(n),
            len: 4096,
            from: 8192,
        };
        log.commit(&Entry(3), &[segment(1), segment(2)]);
        log.commit(&Entry(5), &[segment(4)]);
        log.clear(Entry(5));
        let left = read(&pool, GROUP, 1 << 20).unwrap();
        assert_eq!(left.segments, [segment(1), segment(2)]);
        assert_eq!(left.generation, 7);
        assert!(read(&pool, GroupUuid::from_bytes([8; 16]), 1 << 20).is_none());
        assert!(read(&pool, GROUP, 10_000).is_none());
    }

    #[test]
    fn spare_page_is_one_that_no_entry_names() {
        let spare = |named: &[(usize, usize)]| {
            let segment = |(from, len): &(usize, usize)| Segment {
                disk: DiskUuid::from_bytes([1; 16]),
                at: 0,
                len: u32::try_from(*len).unwrap(),
                from: u32::try_from(PREFIX + from).unwrap(),
            };
            let left = Left {
                generation: 1,
                segments: named.iter().map(segment).collect(),
                unreplayed: 0,
            };
            let page = left.spare_page((PREFIX + 65536) as u64)?;
            Some(page - PREFIX)
        };
        assert_eq!(spare(&[]), Some(0));
        assert_eq!(spare(&[(4096, 512)]), Some(0));
        assert_eq!(spare(&[(8192, 4096), (512, 512)]), Some(4096));
        assert_eq!(spare(&[(0, 4096), (4608, 8192), (0, 4096)]), Some(16384));
        assert_eq!(spare(&[(4096, 61440), (0, 4096)]), None);
    }

    #[test]
    fn log_of_another_version_is_refused_while_it_is_about_these_disks() {
        let pool = pool();
        assert_eq!(version(&pool, 7), Ok(()));
        InflightLog::start(&pool, GROUP, 7, false).begin();
        assert_eq!(version(&pool, 7), Ok(()));
        put(pool.cells(0..HEADER), 0, b"LUNARIF1");
        assert!(read(&pool, GROUP, 1 << 20).is_none());
        assert_eq!(version(&pool, 7), Err(b'1'));
        // The disks went on since.
        assert_eq!(version(&pool, 8), Ok(()));
        put(pool.cells(0..HEADER), 8, &[8; 16]);
        assert_eq!(version(&pool, 7), Ok(()));
    }
}
