//! What the logs on the members say when a group starts, and what is made right from them (`ppl`, rule 5).

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use lunar_api::GroupUuid;
use lunar_api::target::MemberState;

use crate::bad_blocks::List;
use crate::geometry::Geometry;
use crate::gf::{self, Term};
use crate::lanes::Crc;
use crate::launch::Slot;
use crate::limits::CONFIG_PIECE;
use crate::parity;
use crate::plan::GRAIN;
use crate::planted::{self, Bug};
use crate::pool::{BLOCK_MAX, Lease, Pool, Quota};
use crate::ppl::{HEADER, SECTOR, SLOTS, Unit, What, grains_of, slot_at, stripes_of};
use crate::recipe::recipe;
use crate::region_map::RegionSet;
use crate::serve::bits;
use crate::superblock::GroupRecord;
use crate::traits::{Buf, Disk, DiskError, DiskVerb, Piece};

/// The log of a member, as it was found.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemberLog {
    /// The newest unit that is whole, and its slot; none: neither slot can be believed.
    pub newest: Option<(Unit, u64)>,
}

impl MemberLog {
    /// The slot of the next unit.
    pub(crate) fn next(&self) -> u64 {
        self.newest
            .as_ref()
            .map_or(0, |(_, slot)| (slot + 1) % SLOTS)
    }

    pub(crate) fn number(&self) -> u64 {
        self.newest.as_ref().map_or(0, |(unit, _)| unit.number)
    }

    /// Adds the regions of all that its newest unit is about.
    pub(crate) fn mark(&self, record: &GroupRecord, to: &mut RegionSet) {
        let Ok(geometry) = record.geometry() else {
            return;
        };
        if planted::is(Bug::ReturningLogForgotten) {
            return;
        }
        let unit = geometry.stripe_on_member();
        for entry in self.newest.iter().flat_map(|(unit, _)| &unit.entries) {
            let stripes = stripes_of(&entry.what, geometry.chunk());
            let stripes =
                stripes.start.min(geometry.stripes())..stripes.end.min(geometry.stripes());
            let bytes = stripes.start * unit..stripes.end * unit;
            let regions =
                bytes.start / record.region_bytes..bytes.end.div_ceil(record.region_bytes);
            for region in regions {
                to.insert(region);
            }
        }
    }
}

/// Memory to read into: a lease, and which bytes of it.
pub(crate) type Scratch<'a> = (&'a Lease, Range<usize>);

/// Reads the log of a member that begins at `at`. `payloads`: they are checked too; without, a unit is believed whose header
/// is right.
///
/// # Shape   `scratch`: whole grains
pub(crate) async fn read_log<D: Disk>(
    disk: &D,
    at: u64,
    group: GroupUuid,
    scratch: &Scratch<'_>,
    payloads: bool,
) -> MemberLog {
    let mut log = MemberLog::default();
    for slot in 0..SLOTS {
        let at = slot_at(at, slot);
        let Some(unit) = read_header(disk, at, group, scratch).await else {
            continue;
        };
        let is_newer = log.newest.is_none()
            || (unit.number > log.number()) != planted::is(Bug::OlderUnitReplayed);
        if is_newer && (!payloads || are_payloads_right(disk, at, &unit, scratch).await) {
            log.newest = Some((unit, slot));
        }
    }
    log
}

async fn read_header<D: Disk>(
    disk: &D,
    at: u64,
    group: GroupUuid,
    (memory, bytes): &Scratch<'_>,
) -> Option<Unit> {
    read(disk, at, memory, bytes.start, HEADER).await.ok()?;
    let mut header = [0; HEADER];
    parity::copy_out(&mut header, memory.cells(bytes.start..bytes.start + HEADER));
    Unit::decode(&header, group)
}

async fn are_payloads_right<D: Disk>(
    disk: &D,
    at: u64,
    unit: &Unit,
    (memory, bytes): &Scratch<'_>,
) -> bool {
    let mut at = at + HEADER as u64;
    for entry in &unit.entries {
        let len = entry.what.payload() as usize;
        let mut crc = Crc::default();
        for start in (0..len).step_by(bytes.len()) {
            let part = bytes.len().min(len - start);
            if read(disk, at + start as u64, memory, bytes.start, part)
                .await
                .is_err()
            {
                return false;
            }
            crc.update(memory, bytes.start, part);
        }
        if len > 0 && crc.value() != entry.crc && !planted::is(Bug::TornUnitTaken) {
            return false;
        }
        at += len as u64;
    }
    true
}

async fn read<D: Disk>(
    disk: &D,
    at: u64,
    memory: &Lease,
    to: usize,
    len: usize,
) -> Result<(), DiskError> {
    let piece = piece(to, len);
    disk.submit(DiskVerb::Read, at, len as u64, Buf::Pool(memory), &[piece])
        .await
}

fn piece(offset: usize, len: usize) -> Piece {
    Piece {
        offset: u32::try_from(offset).expect("the memory is below 4 GiB"),
        len: u32::try_from(len).expect("the memory is below 4 GiB"),
    }
}

/// Makes right what the newest units of these members (by slot) are about.
///
/// # Crash   it is done again: the logs stay as they are
pub(crate) async fn replay<D: Disk>(
    pool: &Rc<Pool>,
    record: &GroupRecord,
    (slots, bad): (&[Slot<D>], &[Option<List>]),
    logs: &[(u16, MemberLog)],
) -> Replayed {
    let Ok(geometry) = record.geometry() else {
        return Replayed::default();
    };
    if planted::is(Bug::LogsNotReplayed) {
        return Replayed::default();
    }
    let members = usize::from(geometry.members());
    let step = CONFIG_PIECE.min(BLOCK_MAX / members / GRAIN as usize * GRAIN as usize);
    let work = pool.lease(Quota::Work, members * step).await;
    let replay = Replay {
        record,
        geometry,
        slots,
        bad,
        work,
        step,
        failed: Cell::new(0),
        written: Cell::new(0),
        torn: RefCell::default(),
    };
    let mut units: Vec<(&Unit, u16, u64)> = logs
        .iter()
        // What one has that was away is old: it counts for what it has missed, and for nothing else.
        .filter(|(slot, _)| record.members[usize::from(*slot)].left_at == 0)
        .filter_map(|(slot, log)| {
            let (unit, at) = log.newest.as_ref()?;
            Some((unit, *slot, *at))
        })
        .collect();
    units.sort_by_key(|(unit, ..)| unit.number);
    for (unit, slot, at) in units {
        replay.unit(unit, slot, at).await;
    }
    replay.flush().await;
    Replayed {
        failed: replay.failed.get(),
        torn: replay.torn.take(),
    }
}

/// What came of a replay.
#[derive(Debug, Default)]
pub(crate) struct Replayed {
    /// Slots that did not take it, as bits.
    pub failed: u64,
    /// Parity that is to be on a list: slot, and byte of the member's data.
    pub torn: Vec<(u16, u64)>,
}

struct Replay<'a, D> {
    record: &'a GroupRecord,
    geometry: Geometry,
    slots: &'a [Slot<D>],
    /// One a slot.
    bad: &'a [Option<List>],
    /// Room for a step of every member.
    work: Lease,
    step: usize,
    /// Slots, as bits.
    failed: Cell<u64>,
    written: Cell<u64>,
    /// Parity that says nothing of its row: slot, and byte of the member's data.
    torn: RefCell<Vec<(u16, u64)>>,
}

impl<D: Disk> Replay<'_, D> {
    async fn unit(&self, unit: &Unit, slot: u16, at: u64) {
        let Some((_, place)) = &self.slots[usize::from(slot)] else {
            return;
        };
        let mut from = slot_at(place.reserve.layout.logs.offset, at) + HEADER as u64;
        for entry in &unit.entries {
            match entry.what {
                What::Partial {
                    stripe,
                    rows,
                    modified,
                } => self.partial((slot, from), stripe, rows, modified).await,
                What::Whole {
                    stripe,
                    stripes,
                    rows,
                } => {
                    for stripe in stripe..stripe.saturating_add(stripes.into()) {
                        self.whole(slot, stripe, rows).await;
                    }
                }
                What::Copy { slot: to, at, len } => self.copy((slot, from), to, at, len).await,
            }
            from += u64::from(entry.what.payload());
        }
    }

    /// Bytes of a chunk that rows are, if they are there.
    fn bytes_of(&self, stripe: u64, (first, rows): (u16, u16)) -> Option<Range<u64>> {
        let sector = u64::from(SECTOR);
        let bytes = u64::from(first) * sector..(u64::from(first) + u64::from(rows)) * sector;
        let fits = stripe < self.geometry.stripes() && bytes.end <= self.geometry.chunk();
        fits.then_some(bytes)
    }

    /// Says whether what a slot has of a stripe can be believed.
    fn is_right(&self, slot: u16, stripe: u64) -> bool {
        let entry = &self.record.members[usize::from(slot)];
        let is_there =
            self.slots[usize::from(slot)].is_some() && self.failed.get() & 1 << slot == 0;
        is_there
            && match entry.state {
                MemberState::InSync => true,
                MemberState::Rebuilding => {
                    entry.left_at == 0
                        && stripe < entry.rebuilt_to / self.geometry.stripe_on_member()
                }
                MemberState::Faulty | MemberState::Missing => false,
            }
    }

    /// Reads bytes of a slot's data to the nth part of the work memory.
    async fn read(&self, slot: u16, at: u64, nth: usize, len: usize) -> bool {
        let Some((given, place)) = &self.slots[usize::from(slot)] else {
            return false;
        };
        // What is on a list is no data.
        let bad = self.bad[usize::from(slot)].as_ref();
        if bad.is_some_and(|(grains, _)| grains.touch(at, len as u64)) {
            return false;
        }
        let at = place.reserve.layout.data_offset + at;
        read(&given.disk, at, &self.work, nth * self.step, len)
            .await
            .is_ok()
    }

    /// Writes bytes of the nth part of the work memory to a slot's data.
    async fn write(&self, slot: u16, at: u64, nth: usize, len: usize) {
        let Some((given, place)) = &self.slots[usize::from(slot)] else {
            return;
        };
        let at = place.reserve.layout.data_offset + at;
        let (verb, piece) = (DiskVerb::Write { fua: false }, piece(nth * self.step, len));
        let io = given
            .disk
            .submit(verb, at, len as u64, Buf::Pool(&self.work), &[piece]);
        self.written.set(self.written.get() | 1 << slot);
        if io.await.is_err() {
            self.failed.set(self.failed.get() | 1 << slot);
        }
    }

    /// Reads bytes of a payload to the first part of the work memory.
    async fn read_log(&self, (slot, at): (u16, u64), len: usize) -> bool {
        let Some((given, _)) = &self.slots[usize::from(slot)] else {
            return false;
        };
        let is_read = read(&given.disk, at, &self.work, 0, len).await.is_ok();
        if !is_read {
            // It could be read a moment ago.
            self.failed.set(self.failed.get() | 1 << slot);
        }
        is_read
    }

    async fn partial(
        &self,
        (slot, from): (u16, u64),
        stripe: u64,
        rows: (u16, u16),
        modified: u64,
    ) {
        let all = u64::MAX >> (64 - self.geometry.data_slots());
        let Some(bytes) = self.bytes_of(stripe, rows) else {
            return;
        };
        let is_its = self.geometry.parity_slots(stripe).eq([slot]);
        let data = |d| self.geometry.slot_of(stripe, d);
        if !is_its
            || modified & !all != 0
            || !bits(modified).all(|d| self.is_right(data(d), stripe))
        {
            return;
        }
        let base = stripe * self.geometry.chunk();
        // Whole grains are in the payload; of the first and the last some sectors may not count.
        let grains = grains_of(rows);
        let start = u64::from(grains.start * GRAIN);
        let end = u64::from(grains.end * GRAIN);
        let mut step = self.step as u64;
        let mut at = start;
        while at < end {
            let part = bytes.start.max(at)..bytes.end.min(at + step);
            let len = usize::try_from(part.end - part.start).expect("at most a step");
            if !self
                .read_log((slot, from + (part.start - start)), len)
                .await
            {
                return;
            }
            let mut unread = None;
            for d in bits(modified) {
                if !self.read(data(d), base + part.start, 1, len).await {
                    unread = Some(data(d));
                    break;
                }
                let sum = self.work.cells(0..len);
                parity::xor_into(sum, &[self.work.cells(self.step..self.step + len)]);
            }
            match unread {
                None => self.write(slot, base + part.start, 0, len).await,
                // What cannot be read of it is as if it were not there; the rest is.
                Some(_) if step > u64::from(GRAIN) => {
                    step = u64::from(GRAIN);
                    continue;
                }
                Some(unread) => self.note_torn(stripe, slot, base + at, unread),
            }
            at += step;
        }
    }

    /// The parity of a row is torn that has data which cannot be read: should another block of it be on a list, nobody is to
    /// compute that from this.
    fn note_torn(&self, stripe: u64, parity: u16, at: u64, unread: u16) {
        let grain = u64::from(GRAIN);
        let is_listed = |slot: &u16| {
            let list = self.bad[usize::from(*slot)].as_ref();
            list.is_some_and(|(grains, _)| grains.touch(at, grain))
        };
        let data = (0..self.geometry.data_slots()).map(|d| self.geometry.slot_of(stripe, d));
        if data
            .filter(|slot| *slot != unread)
            .any(|slot| is_listed(&slot))
        {
            self.torn.borrow_mut().push((parity, at));
        }
    }

    /// Makes the parities of rows right whose data was all being written. Where data is missing, what it is said to be is
    /// what P says, and Q is made to fit: two answers would be one too many.
    async fn whole(&self, slot: u16, stripe: u64, rows: (u16, u16)) {
        let Some(bytes) = self.bytes_of(stripe, rows) else {
            return;
        };
        let (data, parities) = (self.geometry.data_slots(), self.geometry.parities());
        if !self.geometry.parity_slots(stripe).any(|own| own == slot) {
            return;
        }
        let of = |part: u16| self.geometry.slot_of(stripe, part);
        let right = (0..data).filter(|part| self.is_right(of(*part), stripe));
        let mut there = right.fold(0u64, |set, part| set | 1 << part);
        let is_whole = there.count_ones() == u32::from(data);
        if !is_whole {
            if parities < 2 || !self.is_right(of(data), stripe) {
                return;
            }
            there |= 1 << data;
        }
        let base = stripe * self.geometry.chunk();
        let (mut at, mut step) = (bytes.start, self.step);
        'steps: while at < bytes.end {
            let before = usize::try_from(at % u64::from(GRAIN)).expect("below a grain");
            let room = step - before;
            let len = usize::try_from(bytes.end - at).map_or(room, |len| len.min(room));
            for part in bits(there) {
                if self.read(of(part), base + at, usize::from(part), len).await {
                    continue;
                }
                match step > GRAIN as usize {
                    true => step = GRAIN as usize,
                    false => at += len as u64,
                }
                continue 'steps;
            }
            for target in data..data + parities {
                if there & 1 << target != 0 {
                    continue;
                }
                let Some(recipe) = recipe(data, parities, target, there) else {
                    continue;
                };
                let cells = |part: u16| {
                    let from = usize::from(part) * self.step;
                    self.work.cells(from..from + len)
                };
                let terms: Vec<Term<'_>> = recipe
                    .iter()
                    .map(|(part, by)| (*by, cells(*part)))
                    .collect();
                gf::combine_to(cells(target), &terms);
                self.write(of(target), base + at, usize::from(target), len)
                    .await;
            }
            at += len as u64;
        }
    }

    async fn copy(&self, (slot, from): (u16, u64), to: u16, at: u64, len: u32) {
        let is_there = to < self.geometry.members()
            && at
                .checked_add(len.into())
                .is_some_and(|end| end <= self.geometry.member_bytes());
        if !is_there {
            return;
        }
        let total = len as usize;
        for done in (0..total).step_by(self.step) {
            let len = self.step.min(total - done);
            if !self.read_log((slot, from + done as u64), len).await {
                return;
            }
            self.write(to, at + done as u64, 0, len).await;
        }
    }

    async fn flush(&self) {
        for slot in bits(self.written.get() & !self.failed.get()) {
            let Some((given, _)) = &self.slots[usize::from(slot)] else {
                continue;
            };
            let io = given.disk.submit(DiskVerb::Flush, 0, 0, Buf::None, &[]);
            if io.await.is_err() {
                self.failed.set(self.failed.get() | 1 << slot);
            }
        }
    }
}
