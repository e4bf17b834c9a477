//! Writes the log on the members (`ppl` has its rules and its format).
//!
//! ```text
//!  pass: joins the unit that forms ---> somebody who waits writes it ---> durable: data and parity ---> leaves it
//!        (of each parity member,        when the unit before is left                              the last one out
//!         at one moment)                by all, and flushed                                       lets the next begin
//! ```
//!
//! Two header pages a member: one forms while the other is on the disk. Payloads are written from where they are, so a
//! pass keeps its memory until the unit is written. A pass waits for those that joined before it only: units are joined on all
//! members at one moment, so no two passes wait for each other.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use arrayvec::ArrayVec;
use crc_fast::{CrcAlgorithm, Digest};
use lunar_api::target::{Consistency, FailCause};

use crate::limits::MEMBERS_MAX;
use crate::member::{Member, MemberIo};
use crate::parity;
use crate::planted::{self, Bug};
use crate::pool::{Lease, Pool};
use crate::ppl::{ENTRIES_MAX, Entry, HEADER, PAYLOAD_MAX, SLOTS, Unit, What, seal, slot_at};
use crate::raid_group::{EIO, Errno, RaidGroup, WORKERS};
use crate::serve::bits;
use crate::superblock::GroupRecord;
use crate::sync::{Waiters, join, join_all};
use crate::traits::{Buf, Disk, DiskVerb, Env, PIECES_MAX, Piece};

/// An entry, and where its payload is: bytes from the start of the group's memory.
pub(crate) type Logging = (What, u32);
/// What a pass logs.
pub(crate) type Entries = ArrayVec<Logging, ENTRIES_MAX>;

/// What is logged of a stripe operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogKind {
    /// Of what is not modified, its sum.
    PartialParity,
    /// What is written.
    Journal,
}

/// The logs of a group whose policy has them.
#[derive(Debug)]
pub(crate) struct Lanes {
    pub kind: LogKind,
    /// Of the newest unit of the group.
    number: Cell<u64>,
    /// For payloads, wherever they are.
    memory: Lease,
}

impl Lanes {
    /// `number`: of the newest unit that was found.
    pub(crate) fn new(record: &GroupRecord, pool: &Rc<Pool>, number: u64) -> Option<Self> {
        let kind = match record.consistency {
            Consistency::None | Consistency::Bitmap => return None,
            Consistency::Ppl => LogKind::PartialParity,
            Consistency::Journal => LogKind::Journal,
        };
        Some(Self {
            kind,
            number: Cell::new(number),
            memory: pool.whole(),
        })
    }
}

/// The log of a member, and of the disk that is filled to replace it: they have the same units.
#[derive(Debug)]
pub(crate) struct Lane {
    /// Two headers.
    pages: Lease,
    forming: RefCell<Forming>,
    /// The unit that was written last, or tried: those of this process count from 1.
    last: Cell<u64>,
    /// It is durable.
    is_good: Cell<bool>,
    /// Passes that have not left it.
    open: Cell<u32>,
    /// Somebody is about to write the next unit, or does.
    is_writing: Cell<bool>,
    /// That one takes nobody more.
    is_sealed: Cell<bool>,
    /// The slot that comes next.
    slot: Cell<u64>,
    changed: Waiters,
}

#[derive(Debug, Default)]
struct Forming {
    entries: usize,
    payload: u32,
    passes: u32,
    pieces: ArrayVec<Piece, ENTRIES_MAX>,
}

impl Forming {
    fn fits(&self, entries: &[Logging]) -> bool {
        let payload: u32 = entries.iter().map(|(what, _)| what.payload()).sum();
        self.entries + entries.len() <= ENTRIES_MAX && self.payload + payload <= PAYLOAD_MAX
    }

    fn add(&mut self, header: &[Cell<u8>], memory: &Lease, entries: &[Logging]) {
        for (what, from) in entries {
            let len = what.payload();
            let crc = match len {
                0 => 0,
                len => {
                    let mut crc = Crc::default();
                    crc.update(memory, *from as usize, len as usize);
                    crc.value()
                }
            };
            let entry = Entry { what: *what, crc };
            entry.encode(self.entries, |at, bytes| {
                parity::copy_in(&header[at..at + bytes.len()], bytes);
            });
            self.entries += 1;
            if len > 0 {
                self.payload += len;
                self.pieces.push(Piece { offset: *from, len });
            }
        }
        self.passes += 1;
    }
}

/// crc32c of bytes of memory, piece by piece.
pub(crate) struct Crc(Digest);

impl Default for Crc {
    fn default() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }
}

impl Crc {
    pub(crate) fn update(&mut self, memory: &Lease, from: usize, len: usize) {
        const STEP: usize = 4096;
        let mut bytes = [0; STEP];
        for start in (from..from + len).step_by(STEP) {
            let part = start..(from + len).min(start + STEP);
            let to = &mut bytes[..part.len()];
            parity::copy_out(to, memory.cells(part));
            self.0.update(to);
        }
    }

    pub(crate) fn value(&self) -> u32 {
        u32::try_from(self.0.finalize()).expect("32 bits")
    }
}

impl Lane {
    /// Bytes of its pages.
    pub(crate) const PAGES: usize = 2 * HEADER;

    /// `next`: the slot of its next unit.
    pub(crate) fn new(pages: Lease, next: u64) -> Rc<Self> {
        let lane = Self {
            pages,
            forming: RefCell::default(),
            last: Cell::new(0),
            is_good: Cell::new(true),
            open: Cell::new(0),
            is_writing: Cell::new(false),
            is_sealed: Cell::new(false),
            slot: Cell::new(next % SLOTS),
            changed: Waiters::default(),
        };
        // Every worker, and who erases.
        lane.changed.reserve(2 * WORKERS);
        Rc::new(lane)
    }

    /// The unit that forms.
    fn next(&self) -> u64 {
        self.last.get() + 1 + u64::from(self.is_sealed.get())
    }

    /// Where the header of a unit is in the pages: by turns.
    fn header(unit: u64) -> usize {
        match unit % 2 {
            0 => 0,
            _ => HEADER,
        }
    }

    /// Adds entries to the unit that forms; answers its number.
    fn join(&self, memory: &Lease, entries: &[Logging]) -> u64 {
        let unit = self.next();
        let at = Self::header(unit);
        let header = self.pages.cells(at..at + HEADER);
        self.forming.borrow_mut().add(header, memory, entries);
        unit
    }

    /// Who has joined a unit leaves it: its writes are complete, or are not made.
    fn leave(&self, unit: u64) {
        if self.last.get() != unit {
            return; // It was not written: the process ends.
        }
        self.open.set(self.open.get().saturating_sub(1));
        if self.open.get() == 0 {
            self.changed.wake_all();
        }
    }
}

/// What a pass has in the logs, until it is dropped: after its writes are complete.
pub(crate) struct Logged(ArrayVec<(u16, Rc<Lane>, u64), MEMBERS_MAX>);

impl Drop for Logged {
    fn drop(&mut self) {
        for (_, lane, unit) in &self.0 {
            lane.leave(*unit);
        }
    }
}

enum Turn {
    Over,
    Write,
}

impl<E: Env> RaidGroup<E> {
    /// Logs what is about to be written, at the members in these slots. Nothing of it is written before this ends. None:
    /// one of them did not take it, and is failed; what is written has to be planned anew. Allocates nothing.
    ///
    /// # Shape   `entries`: no more than a unit takes
    /// # Crash   before it ends nothing was written; after it a start makes these rows right
    /// # Errors  EIO where redundancy does not allow a member's failure
    pub(crate) async fn log_write(
        &self,
        slots: u64,
        entries: &[Logging],
    ) -> Result<Option<Logged>, Errno> {
        let mut logged = Logged(ArrayVec::new());
        let Some(lanes) = self.lanes.as_ref().filter(|_| !entries.is_empty()) else {
            return Ok(Some(logged));
        };
        let there: ArrayVec<(u16, Rc<Lane>), MEMBERS_MAX> = bits(slots)
            .filter_map(|slot| Some((slot, self.member(slot).lane.borrow().clone()?)))
            .collect();
        let full = || {
            let is_full = |(_, lane): &&(u16, Rc<Lane>)| !lane.forming.borrow().fits(entries);
            there.iter().find(is_full)
        };
        while let Some((slot, lane)) = full() {
            self.unit_written(lanes, (*slot, lane), lane.next()).await;
        }
        // Nothing waits from here to the end of the loop: who joins, joins everywhere.
        for (slot, lane) in there {
            let unit = lane.join(&lanes.memory, entries);
            logged.0.push((slot, lane, unit));
        }
        for two in logged.0.chunks(2) {
            let written = |one: &(u16, Rc<Lane>, u64)| {
                let (slot, lane, unit) = (one.0, Rc::clone(&one.1), one.2);
                async move { self.unit_written(lanes, (slot, &lane), unit).await }
            };
            match two {
                [a, b] => join(written(a), written(b)).await,
                one => {
                    for one in one {
                        written(one).await;
                    }
                }
            }
        }
        let bad = logged.0.iter().filter(|(_, lane, _)| !lane.is_good.get());
        let bad = bad.fold(0, |set, (slot, ..)| set | 1 << slot);
        if bad == 0 {
            return Ok(Some(logged));
        }
        drop(logged);
        if self.failed.get() {
            return Err(EIO);
        }
        self.fail(bad, FailCause::Writes, "its log could not be written")
            .await?;
        Ok(None)
    }

    /// Waits until a unit was written, or could not be; writes it if it is its turn and nobody else does.
    async fn unit_written(&self, lanes: &Lanes, (slot, lane): (u16, &Rc<Lane>), unit: u64) {
        loop {
            let turn = lane
                .changed
                .until(|| {
                    if lane.last.get() >= unit {
                        Some(Turn::Over)
                    } else if (lane.open.get() == 0 || planted::is(Bug::UnitTooEarly))
                        && !lane.is_writing.replace(true)
                    {
                        Some(Turn::Write)
                    } else {
                        None
                    }
                })
                .await;
            match turn {
                Turn::Over => return,
                Turn::Write => self.write_unit(lanes, (slot, lane)).await,
            }
        }
    }

    /// Writes the unit that has formed to the member in a slot, and to the disk that is filled to replace it.
    async fn write_unit(&self, lanes: &Lanes, (slot, lane): (u16, &Rc<Lane>)) {
        // What the unit before covers may lie in caches: as long as it does, that one is needed. Who comes meanwhile still
        // joins.
        let needs_flush = self.has_volatile_cache() && !planted::is(Bug::UnitUnflushed);
        let is_flushed = !needs_flush || self.flush().await.is_ok();
        let unit = lane.next();
        let mut pieces: ArrayVec<Piece, { ENTRIES_MAX + 1 }> = ArrayVec::new();
        let passes = {
            let mut forming = lane.forming.borrow_mut();
            let at = Lane::header(unit);
            let cells = lane.pages.cells(at..at + HEADER);
            let mut header = [0; HEADER];
            parity::copy_out(&mut header, cells);
            lanes.number.set(lanes.number.get() + 1);
            seal(self.id, lanes.number.get(), forming.entries, &mut header);
            parity::copy_in(cells, &header);
            pieces.push(Piece {
                offset: u32::try_from(lane.pages.start() + at).expect("below 4 GiB"),
                len: u32::try_from(HEADER as u64).expect("4096"),
            });
            pieces.extend(forming.pieces.drain(..));
            std::mem::take(&mut *forming).passes
        };
        // Who joins from here on is in the next one.
        lane.is_sealed.set(true);
        let mut is_good = is_flushed && self.is_lane_of(slot, lane);
        if is_good {
            let member = self.member(slot);
            let twin = member.twin.borrow().as_ref().map(|t| Rc::clone(&t.member));
            let at = lane.slot.replace((lane.slot.get() + 1) % SLOTS);
            let to = [Some(&member), twin.as_ref()];
            is_good = self.write_pieces(lanes, to, at, &pieces).await;
        }
        lane.is_good.set(is_good);
        lane.open.set(passes);
        lane.last.set(unit);
        lane.is_sealed.set(false);
        lane.is_writing.set(false);
        lane.changed.wake_all();
    }

    /// Says whether the log of the member in a slot is this one; after another disk has come it is not.
    fn is_lane_of(&self, slot: u16, lane: &Rc<Lane>) -> bool {
        let member = self.member(slot);
        let now = member.lane.borrow();
        now.as_ref().is_some_and(|now| Rc::ptr_eq(now, lane))
    }

    /// Writes pieces of the memory, one after the other, to a slot of the logs of a member and its twin; false if the
    /// former did not take them.
    async fn write_pieces(
        &self,
        lanes: &Lanes,
        members: [Option<&Rc<Member<E::Disk>>>; 2],
        slot: u64,
        pieces: &[Piece],
    ) -> bool {
        const IOS: usize = 2 * (ENTRIES_MAX + 1).div_ceil(PIECES_MAX);
        let mut ios: ArrayVec<(u16, Option<MemberIo<E::Disk>>), IOS> = ArrayVec::new();
        for (i, member) in (0u16..).zip(members) {
            let Some((member, place)) = member.and_then(|m| m.place.as_ref().map(|p| (m, p)))
            else {
                continue;
            };
            let mut at = slot_at(place.reserve.layout.logs.offset, slot);
            for some in pieces.chunks(PIECES_MAX) {
                let len = some.iter().map(|piece| u64::from(piece.len)).sum();
                let fua = !planted::is(Bug::LogWithoutFua);
                let verb = DiskVerb::Write { fua };
                let io = member.submit_meta(verb, at, len, Buf::Pool(&lanes.memory), some);
                ios.push((i, Some(io)));
                at += len;
            }
        }
        let mut failed = [false; 2];
        join_all(&mut ios, |i, result| {
            failed[usize::from(i)] |= result.is_err();
        })
        .await;
        // Who counts may have changed meanwhile: the one that leaves is not asked any more.
        let [own, other] = members.map(|member| member.is_some_and(|m| m.counts.get()));
        if !other
            && failed[1]
            && self
                .copying()
                .is_some_and(|copying| copying.to.to_blame.get())
        {
            self.drop_copy("its log could not be written");
        }
        !(own && failed[0] || other && failed[1])
    }

    /// Says whether what was written to a member may lie in a cache that a power loss empties.
    fn has_volatile_cache(&self) -> bool {
        let slots = self.writable(0) | self.in_sync.get();
        bits(slots).any(|slot| {
            let member = self.member(slot);
            let disk = member.disk.borrow();
            disk.as_ref().is_some_and(|disk| disk.has_volatile_cache())
        })
    }

    /// Writes units without entries to both slots of a member that comes in, or whose log counts for nothing any more;
    /// false if it did not take them.
    ///
    /// # Crash  what is half done counts as emptied, or as not readable: nobody relies on the log of a member before the
    /// superblocks say that it is one
    pub(crate) async fn empty_log(&self, member: &Rc<Member<E::Disk>>) -> bool {
        let (Some(meta), Some(place)) = (&member.meta, &member.place) else {
            return false;
        };
        if self.lanes.is_none() {
            return true;
        }
        let mut header = [0; HEADER];
        Unit::default().encode(self.id, &mut header);
        // In the place of its superblock, which is written after this.
        parity::copy_in(meta.cells(0..HEADER), &header);
        let piece = Piece {
            offset: 0,
            len: u32::try_from(HEADER as u64).expect("4096"),
        };
        for slot in 0..SLOTS {
            let at = slot_at(place.reserve.layout.logs.offset, slot);
            let verb = DiskVerb::Write { fua: true };
            let io = member.submit_meta(verb, at, HEADER as u64, Buf::Pool(meta), &[piece]);
            if io.await.is_err() {
                return false;
            }
        }
        true
    }
}
