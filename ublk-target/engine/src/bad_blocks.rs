//! Grains of a member that do not hold what they should: the bad-block list.
//!
//! ```text
//! listed:    a grain that a rebuild could not produce; one that could not be read, nor be written anew; parity of a row
//!            whose data cannot be read
//! a read:    is an error at once, as of a bad sector: redundancy serves it, or nobody
//! a write:   of all of it, once it is there, takes it off the list
//! ```
//!
//! A listed grain may be read well by its disk: what it has is not what it should have. So the list is as durable as what relies
//! on it. On the member lie two copies of it, written in turn: the higher number counts. `FORMAT.md` has the bytes.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use lunar_api::target::FailCause;
use lunar_api::{DiskUuid, GroupUuid};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::GRAIN;
use crate::member::{LIST_AT, Member};
use crate::parity;
use crate::planted::{self, Bug};
use crate::pool::Lease;
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::reserve::Area;
use crate::serve::bits;
use crate::superblock::{BYTES, crc32c};
use crate::traits::{Buf, Disk, DiskVerb, Env, Piece};

/// Bytes of one copy.
pub const COPY_BYTES: usize = 16384;
/// Copies of the list on a member.
const COPIES: u64 = 2;
/// Bytes of a member that the list takes.
pub const LIST_BYTES: u64 = COPIES * COPY_BYTES as u64;
const MAGIC: [u8; 8] = *b"LUNARBB1";
/// Grains that a list may have. More, and it is a bad disk.
pub const GRAINS_MAX: usize = (COPY_BYTES - 64) / 8;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    crc: U32,
    grains: U32,
    group: [u8; 16],
    disk: [u8; 16],
    number: U64,
    reserved: [u8; 8],
    table: [U64; GRAINS_MAX],
}
const _: () = assert!(size_of::<Raw>() == COPY_BYTES);

/// Whose list it is.
pub type Whose = (GroupUuid, DiskUuid);

/// The grains of a list, by their number in the member's data.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grains(BTreeSet<u64>);

impl Grains {
    /// Adds a grain; false if there is no room for it.
    pub fn insert(&mut self, grain: u64) -> bool {
        let has_room = self.0.len() < GRAINS_MAX || self.0.contains(&grain);
        if has_room {
            self.0.insert(grain);
        }
        has_room
    }

    /// Says whether any of these bytes of the member's data is in one of the grains.
    pub fn touch(&self, at: u64, len: u64) -> bool {
        let range = at / GRAIN..at.saturating_add(len).div_ceil(GRAIN);
        !range.is_empty() && self.0.range(range).next().is_some()
    }

    /// Writes a copy of the list.
    pub fn encode(&self, (group, disk): Whose, number: u64, to: &mut [u8; COPY_BYTES]) {
        let mut raw = Raw::new_zeroed();
        raw.magic = MAGIC;
        raw.group = group.to_bytes();
        raw.disk = disk.to_bytes();
        raw.number = number.into();
        let grains = u32::try_from(self.0.len()).expect("at most GRAINS_MAX");
        raw.grains = grains.into();
        for (to, grain) in raw.table.iter_mut().zip(&self.0) {
            *to = (*grain).into();
        }
        raw.crc = crc32c(raw.as_bytes()).into();
        to.copy_from_slice(raw.as_bytes());
    }

    /// Reads a copy: the list, and its number. `None`: it is none, or not this member's.
    pub fn decode(bytes: &[u8; COPY_BYTES], whose: Whose) -> Option<(Self, u64)> {
        let raw = Raw::ref_from_bytes(bytes).ok()?;
        if raw.magic != MAGIC {
            return None;
        }
        let grains = usize::try_from(raw.grains.get()).ok()?;
        let table = raw.table.get(..grains)?;
        let grains = Self(table.iter().map(|grain| grain.get()).collect());
        let number = raw.number.get();
        // There is one encoding of a list.
        let mut again = [0; COPY_BYTES];
        grains.encode(whose, number, &mut again);
        (again == *bytes && number > 0).then_some((grains, number))
    }
}

/// A list as it was found, and its number.
pub(crate) type List = (Grains, u64);

/// The list of a member, in memory.
#[derive(Debug, Default)]
pub(crate) struct BadBlocks {
    grains: RefCell<Grains>,
    len: Cell<usize>,
    /// Memory says other than the disk.
    is_changed: Cell<bool>,
    /// The superblocks are to say that there is a list.
    pub is_listed: Cell<bool>,
    /// Of the copy that was written last.
    number: Cell<u64>,
}

impl BadBlocks {
    /// Takes what was found on the disk.
    pub(crate) fn load(&self, (grains, number): List) {
        self.len.set(grains.0.len());
        self.grains.replace(grains);
        self.number.set(number);
        self.is_listed.set(true);
    }

    pub(crate) fn len(&self) -> usize {
        self.len.get()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len.get() == 0
    }

    /// Says whether any of these bytes of the member's data is in a listed grain.
    pub(crate) fn touches(&self, at: u64, len: u64) -> bool {
        !self.is_empty() && self.grains.borrow().touch(at, len)
    }

    /// These bytes were written: grains that they are all of are right.
    fn written(&self, at: u64, len: u64) {
        if self.is_empty() {
            return;
        }
        let whole = at.div_ceil(GRAIN)..(at + len) / GRAIN;
        if whole.is_empty() {
            return;
        }
        let mut grains = self.grains.borrow_mut();
        grains.0.retain(|grain| !whole.contains(grain));
        if grains.0.len() != self.len.get() {
            self.is_changed.set(true);
        }
        self.len.set(grains.0.len());
    }

    /// Adds the grain of a byte of the member's data; false if there is no room.
    pub(crate) fn insert(&self, at: u64) -> bool {
        let mut grains = self.grains.borrow_mut();
        let has_room = grains.insert(at / GRAIN);
        self.is_changed
            .set(self.is_changed.get() || grains.0.len() != self.len.get());
        self.len.set(grains.0.len());
        has_room
    }

    /// The first bytes of the member's data that are listed.
    pub(crate) fn first(&self, most: usize) -> Vec<u64> {
        let grains = self.grains.borrow();
        grains
            .0
            .iter()
            .take(most)
            .map(|grain| grain * GRAIN)
            .collect()
    }
}

impl<D: Disk> Member<D> {
    /// What was written to the member is there.
    pub(crate) fn note_written(&self, verb: DiskVerb, (at, len): (u64, u64)) {
        if matches!(verb, DiskVerb::Write { .. } | DiskVerb::WriteZeroes { .. }) {
            self.bad.written(at, len);
        }
    }
}

/// Puts a copy of a list into a member's private memory.
fn write_to(grains: &Grains, whose: Whose, number: u64, meta: &Lease) {
    let mut bytes = [0; COPY_BYTES];
    grains.encode(whose, number, &mut bytes);
    parity::copy_in(meta.cells(LIST_AT..LIST_AT + COPY_BYTES), &bytes);
}

/// Reads the list of a member from its copies; `None` where neither can be believed.
///
/// # Shape   `memory`: [`BYTES`] bytes from `page` on
pub(crate) async fn read_list<D: Disk>(
    disk: &D,
    area: Area,
    whose: Whose,
    (memory, page): (&Lease, usize),
) -> Option<List> {
    let mut newest: Option<List> = None;
    if area.len < LIST_BYTES {
        return None;
    }
    'copies: for copy in 0..COPIES {
        let mut bytes = Box::new([0; COPY_BYTES]);
        let at = area.offset + copy * COPY_BYTES as u64;
        for (part, from) in bytes.chunks_exact_mut(BYTES).zip((at..).step_by(BYTES)) {
            let piece = Piece {
                offset: u32::try_from(page).expect("the memory is below 4 GiB"),
                len: 4096,
            };
            let buf = Buf::Pool(memory);
            let io = disk.submit(DiskVerb::Read, from, BYTES as u64, buf, &[piece]);
            if io.await.is_err() {
                continue 'copies;
            }
            parity::copy_out(part, memory.cells(page..page + BYTES));
        }
        let found = Grains::decode(&bytes, whose);
        if let Some((grains, number)) = found
            && newest.as_ref().is_none_or(|(_, before)| number > *before)
        {
            newest = Some((grains, number));
        }
    }
    newest
}

impl<E: Env> RaidGroup<E> {
    /// Lists grains of a slot, by bytes of the member's data, durably; false if there is no room for all.
    ///
    /// # Crash  who relies on them waits for this: until then nothing has changed that the list is about
    pub(crate) async fn list_blocks(&self, slot: u16, at: &[u64]) -> Result<bool, Errno> {
        let member = self.member(slot);
        let mut has_room = true;
        let before = member.bad.len();
        for at in at {
            has_room &= member.bad.insert(*at);
        }
        if let Some(copying) = self.copying().filter(|copying| copying.slot == slot) {
            // What it has got of them is not right, either.
            copying.lost.borrow_mut().extend(at);
        }
        let more = member.bad.len() - before;
        if more == 0 {
            self.save_bad_blocks().await?;
            return Ok(has_room);
        }
        let text = format!(
            "{more} blocks of 4096 bytes of disk {} (slot {slot}) do not hold what they should, the first at byte {} of it; they \
             are not read until they are written",
            member.path,
            member.data_offset + at.first().copied().unwrap_or(0),
        );
        self.event("BadBlocks", Some(slot), &text);
        self.has_bad.set(true);
        self.views.advance();
        self.save_bad_blocks().await?;
        Ok(has_room)
    }

    fn changed_lists(&self) -> u64 {
        let live = self.in_sync.get() | self.rebuilding().map_or(0, |slot| 1 << slot);
        let is_changed = |slot: &u16| self.member(*slot).bad.is_changed.get();
        bits(live)
            .filter(is_changed)
            .fold(0, |set, slot| set | 1 << slot)
    }

    /// Writes the lists that have changed.
    ///
    /// # Crash  what was taken off a list is flushed before. A list is on the disk before a superblock says that there is
    /// one, and the one before stays until the next is there
    pub(crate) async fn save_bad_blocks(&self) -> Result<(), Errno> {
        if !self.has_bad.get() || planted::is(Bug::ListNotDurable) {
            return Ok(());
        }
        let turn = || match (self.is_listing.get(), self.changed_lists()) {
            (true, _) => None,
            (false, 0) => Some(0),
            (false, slots) => {
                self.is_listing.set(true);
                Some(slots)
            }
        };
        let slots = self.changed.until(turn).await;
        if slots == 0 {
            // Whoever wrote them last may not have published yet that there are any.
            return self.publish().await;
        }
        let (mut failed, mut is_new) = (0, false);
        for slot in bits(slots) {
            let member = self.member(slot);
            let was_listed = member.bad.is_listed.get();
            match self.save_list(&member).await {
                Ok(()) => is_new |= member.bad.is_listed.get() && !was_listed,
                Err(()) => {
                    member.to_blame.set(true);
                    failed |= 1 << slot;
                }
            }
        }
        self.is_listing.set(false);
        self.views.advance();
        self.changed.wake_all();
        if failed != 0 {
            let why = "its bad-block list could not be written";
            self.fail_or_stop(failed, FailCause::Writes, why)?;
        }
        if is_new {
            self.advance();
        }
        self.publish().await
    }

    /// Writes the list of a member.
    pub(crate) async fn save_list(&self, member: &Rc<Member<E::Disk>>) -> Result<(), ()> {
        let (Some(place), Some(meta)) = (&member.place, &member.meta) else {
            return Err(());
        };
        let (area, bad) = (place.reserve.layout.bad_blocks, &member.bad);
        if area.len < LIST_BYTES {
            return Err(());
        }
        // As it is now: what leaves it from here on is not flushed.
        let grains = bad.grains.borrow().clone();
        bad.is_changed.set(false);
        // Old copies of a list that nobody counts may have any number: both are written over.
        let copies = if bad.is_listed.get() { 1 } else { COPIES };
        let mut result = match planted::is(Bug::OffListUnflushed) {
            true => Ok(()),
            false => member.submit(DiskVerb::Flush, 0, 0, Buf::None, &[]).await,
        };
        for _ in 0..copies {
            let number = bad.number.get() + 1;
            write_to(&grains, (self.id, member.uuid), number, meta);
            let piece = Piece {
                offset: u32::try_from(LIST_AT).expect("8 KiB"),
                len: u32::try_from(COPY_BYTES).expect("16 KiB"),
            };
            let (len, buf) = (COPY_BYTES as u64, Buf::Pool(meta));
            let at = area.offset + number % COPIES * len;
            let verb = DiskVerb::Write { fua: true };
            if result.is_ok() {
                result = member.submit_meta(verb, at, len, buf, &[piece]).await;
            }
            bad.number.set(number);
        }
        if result.is_err() {
            bad.is_changed.set(true);
            return Err(());
        }
        // Of an empty list nothing has to be said; the next superblocks do not.
        bad.is_listed.set(!grains.0.is_empty());
        Ok(())
    }

    /// Says whether every member that is to have data can be asked: what cannot be read then is not to be had, and nobody
    /// has it who is only away.
    pub(crate) fn does_everybody_answer(&self) -> bool {
        let answers = |slot| {
            let member = self.member(slot);
            !member.is_gone.get() && !member.is_stalled.get()
        };
        !self.failed.get() && bits(self.in_sync.get()).all(answers)
    }

    /// Says whether data of a row can be written without its parity, by a byte of the members' data in it: that is on a list
    /// already, or every member has its own of the row.
    pub(crate) fn can_do_without_parity(&self, stripe: u64, at: u64) -> bool {
        let mut parity = self.geometry.parity_slots(stripe);
        let mut data = (0..self.geometry.data_slots()).map(|d| self.geometry.slot_of(stripe, d));
        let is_whole =
            data.all(|slot| self.in_sync.get() & 1 << slot != 0) && self.does_everybody_answer();
        is_whole || parity.all(|slot| self.member(slot).bad.touches(at, GRAIN))
    }

    /// Puts the parity of rows, by bytes of the stripe's chunk, on the lists: it says nothing of their data any more.
    pub(crate) async fn give_up_parity(&self, stripe: u64, rows: &[u32]) -> Result<(), Errno> {
        let chunk = stripe * self.geometry.chunk();
        let at: Vec<u64> = rows.iter().map(|row| chunk + u64::from(*row)).collect();
        let slots: Vec<u16> = self.geometry.parity_slots(stripe).collect();
        for slot in slots {
            let is_live = self.writable(stripe) & 1 << slot != 0;
            if is_live && !at.is_empty() && !self.list_blocks(slot, &at).await? {
                return Err(EIO);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whose() -> Whose {
        (
            GroupUuid::from_bytes([7; 16]),
            DiskUuid::from_bytes([9; 16]),
        )
    }

    fn copy(grains: &Grains, number: u64) -> [u8; COPY_BYTES] {
        let mut to = [0; COPY_BYTES];
        grains.encode(whose(), number, &mut to);
        to
    }

    proptest! {
        #[test]
        fn a_list_reads_back(
            set in prop::collection::btree_set(any::<u64>(), 0..200),
            number in 1u64..u64::MAX,
        ) {
            let mut grains = Grains::default();
            prop_assert!(set.iter().all(|grain| grains.insert(*grain)));
            prop_assert_eq!(&grains.0, &set);
            prop_assert_eq!(Grains::decode(&copy(&grains, number), whose()), Some((grains, number)));
        }

        #[test]
        fn a_damaged_list_is_none(grain in any::<u64>(), at in 0usize..COPY_BYTES, bit in 0u8..8) {
            let mut grains = Grains::default();
            grains.insert(grain);
            let mut bytes = copy(&grains, 3);
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(Grains::decode(&bytes, whose()), None);
        }
    }

    #[test]
    fn a_full_list_refuses_more_and_reads_back() {
        let mut grains = Grains::default();
        assert_eq!(
            (0..).take_while(|n| grains.insert(n * 2)).count(),
            GRAINS_MAX
        );
        assert!(grains.insert(0) && !grains.insert(1));
        assert_eq!(
            Grains::decode(&copy(&grains, 1), whose()),
            Some((grains, 1))
        );
    }

    #[test]
    fn a_list_of_another_disk_or_group_is_none() {
        let grains = Grains::default();
        let bytes = copy(&grains, 1);
        let (group, disk) = whose();
        assert!(Grains::decode(&bytes, (group, disk)).is_some());
        assert!(Grains::decode(&bytes, (group, DiskUuid::from_bytes([8; 16]))).is_none());
        assert!(Grains::decode(&bytes, (GroupUuid::from_bytes([8; 16]), disk)).is_none());
        assert!(Grains::decode(&copy(&grains, 0), whose()).is_none());
    }

    #[test]
    fn only_grains_written_whole_leave_the_list() {
        let bad = BadBlocks::default();
        for at in [0, GRAIN, 5 * GRAIN] {
            assert!(bad.insert(at));
        }
        assert!(bad.touches(GRAIN + 512, 512) && !bad.touches(2 * GRAIN, 3 * GRAIN));
        bad.is_changed.set(false);
        bad.written(512, GRAIN);
        assert_eq!((bad.len(), bad.is_changed.get()), (3, false));
        bad.written(512, 2 * GRAIN);
        assert_eq!((bad.len(), bad.is_changed.get()), (2, true));
        assert_eq!(bad.first(8), [0, 5 * GRAIN]);
        bad.written(0, 6 * GRAIN);
        assert!(bad.is_empty());
    }
}
