//! A member of a running group: its disk, its state, what it was asked.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use lunar_api::DiskUuid;
use lunar_api::target::{FailCause, MemberState, MemberStatus, SlowStatus};

use crate::bad_blocks::{BadBlocks, COPY_BYTES};
use crate::health::{Speed, Strikes};
use crate::lanes::Lane;
use crate::planted::{self, Bug};
use crate::pool::Lease;
use crate::raid_group::{Given, MemberPlace};
use crate::superblock::BYTES;
use crate::traits::{Buf, Disk, DiskError, DiskVerb, Piece, Tick};

/// Where in a member's private memory the bad-block list is: after a superblock, and a page of a map.
pub(crate) const LIST_AT: usize = 2 * BYTES;
/// Bytes of it.
pub(crate) const META_BYTES: usize = LIST_AT + COPY_BYTES;

/// A disk in a slot, or the lack of one. Another disk in the slot is another `Member`.
pub(crate) struct Member<D> {
    pub slot: u16,
    pub uuid: DiskUuid,
    pub path: String,
    /// Let go of when it has failed and its I/O is over.
    pub disk: RefCell<Option<Rc<D>>>,
    /// Where its metadata lies; none if the disk is not there.
    pub place: Option<MemberPlace>,
    /// A place for its superblock, one for a page of a map and one for its bad-block list, held for as long as it or a write of it: publishing never
    /// waits for memory.
    pub meta: Option<Lease>,
    /// The log on it, where the group has one.
    pub lane: RefCell<Option<Rc<Lane>>>,
    /// Bytes from the start of the disk to the group's data.
    pub data_offset: u64,
    /// A write or flush of it failed. Whoever waited for that comes to `RaidGroup::fail` later: perhaps when
    /// another disk is in the slot, which is not to blame.
    pub to_blame: Cell<bool>,
    /// It has refused to zero a range: without giving the space back, and with it.
    pub no_zeroing: [Cell<bool>; 2],
    pub state: Cell<MemberState>,
    /// The entry's `left_at` of its superblocks.
    pub left_at: Cell<u64>,
    /// Generation of the first superblocks that say that it is in sync, once it was filled; else 0.
    pub filled_in: Cell<u64>,
    /// What fails on it fails the slot: not so while it is filled to replace another, or leaves.
    pub counts: Cell<bool>,
    /// The disk that gets what is written here too.
    pub twin: RefCell<Option<Twin<D>>>,
    pub reason: RefCell<String>,
    pub reads: Cell<u64>,
    pub writes: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub write_bytes: Cell<u64>,
    pub read_errors: Cell<u64>,
    pub write_errors: Cell<u64>,
    /// Grains that could not be read and were written anew.
    pub repaired: Cell<u64>,
    /// Times that it did not answer within the limit.
    pub timeouts: Cell<u64>,
    /// It does not answer now, and that is counted.
    pub is_stalled: Cell<bool>,
    /// The kernel said that its device is not there any more.
    pub is_gone: Cell<bool>,
    pub cause: Cell<Option<FailCause>>,
    /// Grains that do not hold what they should.
    pub bad: BadBlocks,
    pub strikes: Strikes,
    pub speed: Speed,
}

/// Bytes that a disk has and that are not what they should be: as a disk says it of a bad sector.
const ENODATA: DiskError = DiskError::Errno(61);
/// Bad blocks of a member that a status names.
const BAD_BLOCKS_TOLD: usize = 8;

/// Says whether an error means that the device is not there any more: ENXIO, ENODEV, ENOLINK (its transport has lost it).
fn is_gone(error: DiskError) -> bool {
    matches!(error, DiskError::Errno(6 | 19 | 67))
}

/// Another disk for the same slot: what is written to a member goes to it too.
pub(crate) struct Twin<D> {
    pub member: Rc<Member<D>>,
    /// Bytes of the members' data below which that is so.
    pub window: Rc<Cell<u64>>,
}

/// Adds to a counter.
pub(crate) fn add(counter: &Cell<u64>, more: u64) {
    counter.set(counter.get().wrapping_add(more));
}

impl<D: Disk> Member<D> {
    pub(crate) fn new(slot: u16, uuid: DiskUuid, path: String, state: MemberState) -> Self {
        Self {
            slot,
            uuid,
            path,
            disk: RefCell::default(),
            place: None,
            meta: None,
            lane: RefCell::default(),
            data_offset: 0,
            to_blame: Cell::new(false),
            no_zeroing: Default::default(),
            state: Cell::new(state),
            left_at: Cell::new(0),
            filled_in: Cell::new(0),
            counts: Cell::new(true),
            twin: RefCell::default(),
            reason: RefCell::default(),
            reads: Cell::new(0),
            writes: Cell::new(0),
            read_bytes: Cell::new(0),
            write_bytes: Cell::new(0),
            read_errors: Cell::new(0),
            write_errors: Cell::new(0),
            repaired: Cell::new(0),
            timeouts: Cell::new(0),
            is_stalled: Cell::new(false),
            is_gone: Cell::new(false),
            cause: Cell::new(None),
            bad: BadBlocks::default(),
            strikes: Strikes::default(),
            speed: Speed::default(),
        }
    }

    /// A member that is there. `meta`: [`META_BYTES`].
    pub(crate) fn present(
        slot: u16,
        state: MemberState,
        (given, place): (Given<D>, MemberPlace),
        meta: Lease,
    ) -> Self {
        Self {
            data_offset: place.reserve.layout.data_offset,
            disk: RefCell::new(Some(Rc::new(given.disk))),
            place: Some(place),
            meta: Some(meta),
            ..Self::new(slot, given.uuid, given.path, state)
        }
    }

    /// Starts an I/O at byte `at` of the group's data on this member.
    pub(crate) fn submit(
        self: &Rc<Self>,
        verb: DiskVerb,
        at: u64,
        len: u64,
        buf: Buf<'_>,
        pieces: &[Piece],
    ) -> MemberIo<D> {
        if verb == DiskVerb::Read && self.bad.touches(at, len) && !planted::is(Bug::ListedRead) {
            return MemberIo {
                member: Rc::clone(self),
                verb,
                range: (at, len),
                io: None,
                // What is there is not what should be; the disk is not asked.
                ended: Some(Err(ENODATA)),
                other: None,
            };
        }
        self.count(verb, len);
        let twin = self.twin.borrow();
        let both = twin.as_ref().filter(|twin| {
            verb != DiskVerb::Read && (verb == DiskVerb::Flush || at < twin.window.get())
        });
        let other = both.map(|twin| {
            let (member, at) = (&twin.member, twin.member.data_offset + at);
            member.count(verb, len);
            Other {
                io: member.start(verb, at, len, again(&buf), pieces),
                member: Rc::clone(member),
                ended: None,
            }
        });
        drop(twin);
        let buf = match other {
            Some(_) => again(&buf),
            None => buf,
        };
        MemberIo {
            member: Rc::clone(self),
            verb,
            range: (at, len),
            io: self.start(verb, self.data_offset + at, len, buf, pieces),
            ended: None,
            other,
        }
    }

    fn count(&self, verb: DiskVerb, len: u64) {
        match verb {
            DiskVerb::Read => {
                add(&self.reads, 1);
                add(&self.read_bytes, len);
            }
            DiskVerb::Write { .. } => {
                add(&self.writes, 1);
                add(&self.write_bytes, len);
            }
            DiskVerb::Flush | DiskVerb::WriteZeroes { .. } => {}
        }
    }

    fn start(
        &self,
        verb: DiskVerb,
        at: u64,
        len: u64,
        buf: Buf<'_>,
        pieces: &[Piece],
    ) -> Option<D::Io> {
        let disk = self.disk.borrow();
        let disk = disk.as_ref()?;
        self.speed.begin();
        Some(disk.submit(verb, at, len, buf, pieces))
    }

    /// Starts an I/O at byte `at` of the disk.
    pub(crate) fn submit_meta(
        self: &Rc<Self>,
        verb: DiskVerb,
        at: u64,
        len: u64,
        buf: Buf<'_>,
        pieces: &[Piece],
    ) -> MemberIo<D> {
        MemberIo {
            member: Rc::clone(self),
            verb,
            range: (0, 0),
            io: self.start(verb, at, len, buf, pieces),
            ended: None,
            other: None,
        }
    }

    /// Whether it is worth asking it, and its twin, to zero a range in this way.
    pub(crate) fn takes_zeroing(&self, unmap: bool) -> bool {
        let takes = |member: &Self| !member.no_zeroing[usize::from(unmap)].get();
        let twin = self.twin.borrow();
        takes(self) && twin.as_ref().is_none_or(|twin| takes(&twin.member))
    }

    fn note_error(&self, verb: DiskVerb, error: DiskError) {
        if is_gone(error) {
            self.is_gone.set(true);
        }
        match (verb, error) {
            // It was given up: that says nothing of what is on it.
            (DiskVerb::Read, DiskError::Abandoned) => {}
            (DiskVerb::Read, _) => add(&self.read_errors, 1),
            // Disks and bridges that announce it and answer any error to it are many: it is not asked again, and
            // zeroes are written. If they fail it has failed.
            (DiskVerb::WriteZeroes { unmap }, DiskError::Errno(_)) => {
                self.no_zeroing[usize::from(unmap)].set(true);
            }
            _ => {
                add(&self.write_errors, 1);
                self.to_blame.set(true);
            }
        }
    }

    pub(crate) fn status(&self, now: Tick) -> MemberStatus {
        let micros = |ns: u64| ns / 1000;
        MemberStatus {
            slot: self.slot,
            disk: self.uuid,
            path: self.path.clone(),
            state: self.state.get(),
            data_offset: self.data_offset,
            reason: self.reason.borrow().clone(),
            reads: self.reads.get(),
            writes: self.writes.get(),
            read_bytes: self.read_bytes.get(),
            write_bytes: self.write_bytes.get(),
            read_errors: self.read_errors.get(),
            write_errors: self.write_errors.get(),
            repaired: self.repaired.get(),
            timeouts: self.timeouts.get(),
            errors_lately: self.strikes.get(now),
            cause: self.cause.get(),
            bad_blocks: self.bad.len() as u64,
            bad_blocks_at: (self.bad.first(BAD_BLOCKS_TOLD).iter())
                .map(|at| self.data_offset + at)
                .collect(),
            can_catch_up: self.left_at.get() != 0,
            latency_us: micros(self.speed.latency.get()),
            slow: self.speed.slow.get().map(|(latency, peers)| SlowStatus {
                latency_us: micros(latency),
                peers_us: micros(peers),
            }),
        }
    }
}

/// The same place, for one I/O of two: the host is answered when both are over, by neither of them.
fn again<'a>(buf: &Buf<'a>) -> Buf<'a> {
    match buf {
        Buf::None => Buf::None,
        Buf::Request(id) | Buf::Answer(id) => Buf::Request(*id),
        Buf::Pool(lease) => Buf::Pool(lease),
    }
}

/// An I/O of a member that may not be there, and that of its twin. An error is noted at the member that it was given to.
pub(crate) struct MemberIo<D: Disk> {
    member: Rc<Member<D>>,
    verb: DiskVerb,
    /// Where in the members' data it is, and how long; no bytes: it is elsewhere.
    range: (u64, u64),
    io: Option<D::Io>,
    /// How it ended, once it has.
    ended: Option<Result<(), DiskError>>,
    other: Option<Other<D>>,
}

struct Other<D: Disk> {
    member: Rc<Member<D>>,
    io: Option<D::Io>,
    ended: Option<Result<(), DiskError>>,
}

/// Looks at one of the two; true when it has ended.
fn look<D: Disk>(
    member: &Member<D>,
    (verb, range): (DiskVerb, (u64, u64)),
    io: &mut Option<D::Io>,
    ended: &mut Option<Result<(), DiskError>>,
    cx: &mut Context<'_>,
) -> bool {
    if ended.is_some() {
        return true;
    }
    let result = match io {
        Some(io) => match Pin::new(io).poll(cx) {
            Poll::Ready(result) => {
                member.speed.end();
                result
            }
            Poll::Pending => return false,
        },
        None => Err(DiskError::Abandoned),
    };
    match result {
        Ok(()) => member.note_written(verb, range),
        Err(error) => member.note_error(verb, error),
    }
    *ended = Some(result);
    true
}

impl<D: Disk> Future for MemberIo<D> {
    type Output = Result<(), DiskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let what = (this.verb, this.range);
        let mut over = look(&this.member, what, &mut this.io, &mut this.ended, cx);
        if let Some(other) = &mut this.other {
            over &= look(&other.member, what, &mut other.io, &mut other.ended, cx);
        }
        if !over {
            return Poll::Pending;
        }
        let own = this.ended.unwrap_or(Ok(()));
        // Who is the slot's now says whether it failed: the twin may have taken it meanwhile, or the first have left.
        let counted = |member: &Member<D>, result: Result<(), DiskError>| match member.counts.get()
        {
            true => result,
            false => Ok(()),
        };
        let Some(other) = &this.other else {
            return Poll::Ready(own);
        };
        let second = other.ended.unwrap_or(Ok(()));
        // Whichever of the two does not zero has to be written to, also one that does not count yet.
        if let DiskVerb::WriteZeroes { .. } = this.verb
            && let Some(refused) = [own, second]
                .into_iter()
                .find(|result| matches!(result, Err(DiskError::Errno(_))))
        {
            return Poll::Ready(refused);
        }
        let second = counted(&other.member, second);
        Poll::Ready(counted(&this.member, own).and(second))
    }
}
