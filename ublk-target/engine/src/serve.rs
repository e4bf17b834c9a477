//! A host request on its way to the members: reads of every level, writes without redundancy, and the
//! splitting of redundant writes into stripes.

use std::cell::Cell;

use arrayvec::ArrayVec;
use lunar_api::target::FailCause;

use crate::geometry::{Piece as GroupPiece, Spot};
use crate::limits::MEMBERS_MAX;
use crate::member::{MemberIo, add};
use crate::plan::Span;
use crate::planted::{self, Bug};
use crate::pool::{LEASE_MAX, Lease, Quota};
use crate::raid_group::{EIO, Errno, Lu, RaidGroup};
use crate::stripe_table::{Copied, Item, JoinId, Task};
use crate::sync::join_all;
use crate::traits::{Buf, DiskVerb, Env, Front, HostRequest, HostVerb, PIECES_MAX, Piece};

pub(crate) mod erase;

use erase::Erase;

/// Adjacent bytes of one member, scattered in the request.
pub(crate) struct Run {
    pub slot: u16,
    pub at: u64,
    pub len: u64,
    pub pieces: ArrayVec<Piece, PIECES_MAX>,
}

/// Runs that may grow at once: few, as every tag has room for them in memory that is locked.
const RUNS_MAX: usize = 16;

/// The runs of a request that may still grow, one a member.
pub(crate) struct Runs(ArrayVec<Run, RUNS_MAX>);

impl Runs {
    pub(crate) fn new() -> Self {
        Self(ArrayVec::new())
    }

    /// Adds a piece; answers a run that is to be started, if there is one: that of its member, which it does not go on,
    /// or where there is no room the one that waits longest.
    pub(crate) fn add(&mut self, slot: u16, member_at: u64, part: Piece) -> Option<Run> {
        let open = self.0.iter().position(|run| run.slot == slot);
        if let Some(i) = open
            && extend(&mut self.0[i], member_at, part)
        {
            return None;
        }
        let ended = open.or(self.0.is_full().then_some(0));
        let ended = ended.map(|i| self.0.remove(i));
        let mut pieces = ArrayVec::new();
        pieces.push(part);
        self.0.push(Run {
            slot,
            at: member_at,
            len: u64::from(part.len),
            pieces,
        });
        ended
    }

    /// Takes the first of those that are left.
    pub(crate) fn next(&mut self) -> Option<Run> {
        self.0.pop_at(0)
    }
}

/// Where a piece's bytes are in its request.
pub(crate) fn request_piece(piece: &crate::geometry::Piece) -> Piece {
    Piece {
        offset: to_u32(piece.offset_in_request),
        len: piece.len,
    }
}

/// I/Os of one request in flight at once; more go in a second round.
pub(crate) const IOS_MAX: usize = MEMBERS_MAX;

type Ios<E> = ArrayVec<(u16, Option<MemberIo<<E as Env>::Disk>>), IOS_MAX>;

impl<E: Env> RaidGroup<E> {
    /// Serves one host request to its end. `lu` is the handle of `lus`. Allocates nothing.
    ///
    /// # Crash  a write is answered after its data, its parity, and the state that they rely on are written
    /// (with FUA: durable); before the answer each of its sectors is old or new
    pub async fn serve(&self, lu: u16, request: HostRequest) -> Result<(), Errno> {
        self.serve_after(lu, request, 0).await
    }

    /// As [`Self::serve`], of a request that a queue thread could not end: these slots, as bits, failed to read it.
    pub async fn serve_after(
        &self,
        lu: u16,
        request: HostRequest,
        failed: u64,
    ) -> Result<(), Errno> {
        let Some(lu) = self.lu(lu) else {
            return Err(EIO);
        };
        add(&self.requests, 1);
        let counters = &lu.counters;
        let fits = request
            .at
            .checked_add(request.len)
            .is_some_and(|end| end <= lu.capacity);
        let result = match request.verb {
            _ if !fits => Err(EIO),
            HostVerb::Read => {
                add(&counters.reads, 1);
                add(&counters.read_bytes, request.len);
                self.read(&lu, request, failed).await
            }
            HostVerb::Write { fua } => {
                add(&counters.writes, 1);
                add(&counters.write_bytes, request.len);
                if self.geometry.redundancy() == 0 {
                    let written = self.write_unprotected(&lu, request, fua).await;
                    self.settled(written).await
                } else {
                    self.active_writes.set(self.active_writes.get() + 1);
                    let result = self.write_redundant(&lu, request, fua).await;
                    self.active_writes.set(self.active_writes.get() - 1);
                    result
                }
            }
            HostVerb::Flush => {
                add(&counters.flushes, 1);
                self.flush().await
            }
            HostVerb::Discard => {
                add(&counters.discards, 1);
                let (at, len) = (request.at, request.len);
                self.erase(&lu, (at, len), Erase::Discard).await
            }
            HostVerb::WriteZeroes { unmap } => {
                add(&counters.discards, 1);
                let (at, len) = (request.at, request.len);
                self.erase(&lu, (at, len), Erase::Zero { unmap }).await
            }
        };
        if result.is_err() {
            add(&counters.errors, 1);
        }
        result
    }

    /// Makes a range of a LU read as zero; its space may be given back.
    pub(crate) async fn zero(&self, lu: &Lu, at: u64, len: u64) -> Result<(), Errno> {
        self.erase(lu, (at, len), Erase::Zero { unmap: true }).await
    }

    async fn erase(&self, lu: &Lu, range: (u64, u64), erase: Erase) -> Result<(), Errno> {
        if self.geometry.redundancy() == 0 {
            let erased = self.erase_plain(lu, range, erase).await;
            return self.settled(erased).await;
        }
        self.active_writes.set(self.active_writes.get() + 1);
        let result = self.erase_redundant(lu, range, erase).await;
        self.active_writes.set(self.active_writes.get() - 1);
        result
    }

    /// What the disk that leaves a slot may have missed is answered once no superblock names it any more. (With redundancy
    /// every write waits for that.)
    async fn settled(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        match self.is_handed_over.get() {
            true => result.and(self.wait_durable().await),
            false => result,
        }
    }

    /// Submits member I/O for the request's bytes; `each_lost` hears of pieces whose member cannot be used.
    /// Returns the slots that failed, as bits.
    async fn transfer(
        &self,
        lu: &Lu,
        request: &HostRequest,
        verb: DiskVerb,
        lease: Option<&Lease>,
    ) -> (u64, bool) {
        let mut runs = Runs::new();
        let mut ios: Ios<E> = ArrayVec::new();
        let (mut failed, mut lost) = (0u64, false);
        let (turn, seen) = (self.next_turn(), self.views.version());
        for piece in lu.pieces(&self.geometry, request.at, request.len) {
            let Spot { slot, member_at } = self.leg(turn, &piece);
            if verb == DiskVerb::Read && self.readable(piece.stripe) & 1 << slot == 0 {
                lost = true;
                continue;
            }
            if let Some(run) = runs.add(slot, member_at, request_piece(&piece)) {
                self.start_run(&run, verb, request, lease, &mut ios, &mut failed)
                    .await;
            }
        }
        while let Some(run) = runs.next() {
            self.start_run(&run, verb, request, lease, &mut ios, &mut failed)
                .await;
        }
        // Who waited for room may have gone on with another disk in the slot, one that is being filled.
        lost |= verb == DiskVerb::Read
            && self.views.version() != seen
            && self.geometry.redundancy() > 0;
        self.join(&mut ios, &mut failed).await;
        (failed, lost)
    }

    async fn start_run(
        &self,
        run: &Run,
        verb: DiskVerb,
        request: &HostRequest,
        lease: Option<&Lease>,
        ios: &mut Ios<E>,
        failed: &mut u64,
    ) {
        if ios.is_full() {
            self.join(ios, failed).await;
        }
        let buf = match lease {
            Some(lease) => Buf::Pool(lease),
            // Only requests without a private copy come here: plain writes, and reads that one member can answer.
            None if run.len == request.len => Buf::Answer(request.id),
            None => Buf::Request(request.id),
        };
        let io = self
            .member(run.slot)
            .submit(verb, run.at, run.len, buf, &run.pieces);
        ios.push((run.slot, Some(io)));
    }

    async fn join(&self, ios: &mut Ios<E>, failed: &mut u64) {
        join_all(ios, |slot, result| {
            if result.is_err() {
                *failed |= 1 << slot;
            }
        })
        .await;
    }

    async fn read(&self, lu: &Lu, request: HostRequest, failed: u64) -> Result<(), Errno> {
        let mut lease = None;
        if request.zero_copy {
            add(&lu.counters.zero_copy, 1);
        } else {
            add(&lu.counters.user_copy, 1);
            lease = Some(self.lease(Quota::Data, to_len(request.len)).await?);
        }
        let (failed, lost) = match failed {
            0 => {
                let lease = lease.as_ref();
                self.transfer(lu, &request, DiskVerb::Read, lease).await
            }
            failed => (failed, true),
        };
        if failed == 0 && !lost {
            return match &lease {
                Some(lease) => self.fill(&request, 0, request.len, lease).await,
                None => Ok(()),
            };
        }
        if self.geometry.redundancy() == 0 {
            return Err(EIO);
        }
        add(&lu.counters.degraded_reads, 1);
        if request.zero_copy {
            add(&lu.counters.user_copy, 1);
        }
        let whole = lease.is_some();
        let lease = match lease {
            Some(lease) => lease,
            None => self.lease(Quota::Data, to_len(request.len)).await?,
        };
        self.read_lost(lu, &request, failed, &lease).await?;
        if whole {
            return self.fill(&request, 0, request.len, &lease).await;
        }
        // Pieces that came straight from a member are in the request already.
        for piece in lu.pieces(&self.geometry, request.at, request.len) {
            if self.is_lost(&piece, failed) || lost {
                let (start, len) = (piece.offset_in_request, u64::from(piece.len));
                self.fill(&request, start, len, &lease).await?;
            }
        }
        Ok(())
    }

    fn is_lost(&self, piece: &GroupPiece, failed: u64) -> bool {
        // Which copy was asked is not remembered: all pieces are read again.
        self.geometry.is_mirrored()
            || (failed | !self.readable(piece.stripe)) & 1 << piece.slot != 0
    }

    /// Reads into the lease what did not come from its own member.
    async fn read_lost(
        &self,
        lu: &Lu,
        request: &HostRequest,
        failed: u64,
        lease: &Lease,
    ) -> Result<(), Errno> {
        let join = self.stripes.open();
        for piece in lu.pieces(&self.geometry, request.at, request.len) {
            let task = Task::Read {
                span: span_of(&piece),
                lease: lease.clone(),
                to: to_u32(piece.offset_in_request),
                avoid: if self.is_lost(&piece, failed) {
                    failed
                } else {
                    0
                },
            };
            self.push(lu, piece.stripe, task, join);
        }
        self.stripes.wait(join).await.map_err(Errno)
    }

    /// Queues a task of a request at its stripe.
    fn push(&self, lu: &Lu, stripe: u64, task: Task, join: JoinId) {
        let item = Item {
            task,
            join,
            lu: Some(lu.handle),
        };
        if self.stripes.push(stripe, item) {
            add(&lu.counters.range_lock_waits, 1);
        }
    }

    async fn fill(
        &self,
        request: &HostRequest,
        offset: u64,
        len: u64,
        lease: &Lease,
    ) -> Result<(), Errno> {
        let (offset, len) = (to_u32(offset), to_u32(len));
        self.front
            .fill(request.id, offset, len, lease, offset)
            .await
            .map_err(|_| EIO)
    }

    /// Writes where there is no redundancy: to the members at once, or, while one is copied, stripe by stripe.
    async fn write_unprotected(
        &self,
        lu: &Lu,
        request: HostRequest,
        fua: bool,
    ) -> Result<(), Errno> {
        if self.copying().is_some() {
            return self.write_stripes(lu, request, fua).await;
        }
        self.plain_writes.set(self.plain_writes.get() + 1);
        let result = self.write_plain(lu, request, fua).await;
        self.plain_writes.set(self.plain_writes.get() - 1);
        result
    }

    async fn write_plain(&self, lu: &Lu, request: HostRequest, fua: bool) -> Result<(), Errno> {
        let mut lease = None;
        if request.zero_copy {
            add(&lu.counters.zero_copy, 1);
        } else {
            add(&lu.counters.user_copy, 1);
            let private = self.lease(Quota::Data, to_len(request.len)).await?;
            self.front
                .fetch(request.id, 0, to_u32(request.len), &private, 0)
                .await
                .map_err(|_| EIO)?;
            lease = Some(private);
        }
        let (failed, _) = self
            .transfer(lu, &request, DiskVerb::Write { fua }, lease.as_ref())
            .await;
        if failed == 0 { Ok(()) } else { Err(EIO) }
    }

    /// Takes a private copy and writes it, stripe by stripe.
    async fn write_redundant(&self, lu: &Lu, request: HostRequest, fua: bool) -> Result<(), Errno> {
        self.ensure_dirty().await?;
        self.write_stripes(lu, request, fua).await
    }

    async fn write_stripes(&self, lu: &Lu, request: HostRequest, fua: bool) -> Result<(), Errno> {
        add(&lu.counters.user_copy, 1);
        let mut done = 0;
        while done < request.len {
            // The copy keeps its place within a grain, so that whole grains of it are aligned. With that place the
            // longest request is longer than a lease: what is beyond, less than a grain, goes after.
            let pad = (request.at + done) % u64::from(crate::plan::GRAIN);
            let len = (request.len - done).min(LEASE_MAX as u64 - pad);
            self.write_copied(lu, &request, done, len, fua).await?;
            done += len;
        }
        Ok(())
    }

    /// Writes bytes `[offset, offset + len)` of a request from one private copy.
    async fn write_copied(
        &self,
        lu: &Lu,
        request: &HostRequest,
        offset: u64,
        len: u64,
        fua: bool,
    ) -> Result<(), Errno> {
        let at = request.at + offset;
        let pad = to_u32(at % u64::from(crate::plan::GRAIN));
        let lease = self
            .lease(Quota::Data, to_len(u64::from(pad) + len))
            .await?;
        // Within one chunk the worker copies as it reads what is replaced: one turn of the ring for both.
        let first = lu.pieces(&self.geometry, at, len).next();
        let copied = match first.is_some_and(|piece| u64::from(piece.len) == len) {
            true if self.geometry.parities() > 0 => Copied::No {
                id: request.id,
                offset: to_u32(offset),
            },
            _ => {
                self.front
                    .fetch(request.id, to_u32(offset), to_u32(len), &lease, pad)
                    .await
                    .map_err(|_| EIO)?;
                Copied::Yes
            }
        };
        let join = self.stripes.open();
        let mut partial = false;
        for piece in lu.pieces(&self.geometry, at, len) {
            let span = span_of(&piece);
            partial |= span.is_partial_in(&span.grains());
            let task = Task::Write {
                span,
                lease: lease.clone(),
                from: pad + to_u32(piece.offset_in_request),
                fua,
                copied: Cell::new(copied),
            };
            self.push(lu, piece.stripe, task, join);
        }
        if partial && self.geometry.parities() > 0 {
            add(&lu.counters.bounced, 1);
        }
        drop(lease);
        self.stripes.wait(join).await.map_err(Errno)
    }

    /// Makes every completed write durable on every member that counts.
    pub(crate) async fn flush(&self) -> Result<(), Errno> {
        let mut ios: Ios<E> = ArrayVec::new();
        let mut failed = 0;
        let slots = self.writable(0) | self.in_sync.get();
        let skipped = match planted::is(Bug::FlushSkipsMember) {
            true => 1 << slots.trailing_zeros(),
            false => 0,
        };
        for slot in bits(slots & !skipped) {
            ios.push((
                slot,
                Some(
                    self.member(slot)
                        .submit(DiskVerb::Flush, 0, 0, Buf::None, &[]),
                ),
            ));
        }
        self.join(&mut ios, &mut failed).await;
        if failed != 0 {
            self.fail(failed, FailCause::Writes, "flush failed").await?;
        }
        self.wait_durable().await
    }

    /// Says whose turn among copies it is.
    fn next_turn(&self) -> u32 {
        let turn = self.turn.get().wrapping_add(1);
        self.turn.set(turn);
        turn
    }

    /// Where a piece is: on the one member that has it, or on the one of those with a copy whose turn it is. Where
    /// equality is not proven every read goes to the same copy.
    fn leg(&self, turn: u32, piece: &GroupPiece) -> Spot {
        let own = Spot {
            slot: piece.slot,
            member_at: piece.member_at,
        };
        if !self.geometry.is_mirrored() {
            return own;
        }
        let in_sync = self.in_sync.get();
        let copies = self.geometry.copies(piece.stripe, piece.data);
        let legs: ArrayVec<Spot, MEMBERS_MAX> = copies
            .filter(|spot| in_sync & 1 << spot.slot != 0)
            .collect();
        let nth = match self.is_synced(piece.stripe) {
            true => turn as usize % legs.len().max(1),
            false => 0,
        };
        legs.get(nth).map_or(own, |leg| Spot {
            slot: leg.slot,
            member_at: leg.member_at + u64::from(piece.in_chunk),
        })
    }
}

/// Adds a piece that follows on the member; false if it does not, or there is no room.
fn extend(run: &mut Run, member_at: u64, part: Piece) -> bool {
    if run.at + run.len != member_at {
        return false;
    }
    match run.pieces.last_mut() {
        Some(last) if last.offset + last.len == part.offset => last.len += part.len,
        Some(_) | None => {
            if run.pieces.try_push(part).is_err() {
                return false;
            }
        }
    }
    run.len += u64::from(part.len);
    true
}

/// Slots of a bit set.
pub(crate) fn bits(mut set: u64) -> impl Iterator<Item = u16> {
    std::iter::from_fn(move || {
        let slot = set.trailing_zeros();
        set &= set.wrapping_sub(1);
        u16::try_from(slot).ok().filter(|slot| *slot < 64)
    })
}

fn span_of(piece: &GroupPiece) -> Span {
    Span {
        data: piece.data,
        start: piece.in_chunk,
        end: piece.in_chunk + piece.len,
    }
}

fn to_u32(n: u64) -> u32 {
    u32::try_from(n).expect("within a request: at most MAX_IO")
}

fn to_len(n: u64) -> usize {
    usize::try_from(n).expect("within a request: at most MAX_IO")
}
