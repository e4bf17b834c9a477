//! Reads by way of redundancy, and what could not be read written anew.

use std::collections::BTreeSet;
use std::ops::Range;

use arrayvec::ArrayVec;
use lunar_api::target::FailCause;

use super::{Ios, PASS_BYTES, piece, rows_of};
use crate::geometry::Spot;
use crate::gf::{self, Term};
use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::plan::{GRAIN, Span};
use crate::pool::{Lease, Quota};
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::recipe::recipe;
use crate::traits::{Buf, Clock, DiskVerb, Env, Piece};

/// Where what a member does not give is taken from.
#[derive(Clone, Copy)]
pub(super) enum Source {
    /// Another copy of the chunk.
    Copy(Spot),
    /// The other chunks of a stripe, but for those of some slots.
    Others(u64, u64),
}

/// The copies of a chunk.
type Spots = ArrayVec<Spot, MEMBERS_MAX>;

impl<E: Env> RaidGroup<E> {
    /// Reads a span whose own member cannot be used or just failed, and repairs that member where it can.
    pub(super) async fn read_around(
        &self,
        stripe: u64,
        span: Span,
        lease: &Lease,
        to: u32,
        avoid: u64,
    ) -> Result<(), Errno> {
        let grains = span.grains();
        // What redundancy is not proven for is taken from its own member, but for what that cannot give.
        let is_own_there = || {
            let own = self.geometry.slot_of(stripe, span.data);
            self.readable(stripe) & 1 << own != 0
        };
        let is_doubted = self.geometry.parities() > 0 && !self.is_synced(stripe) && is_own_there();
        if !is_doubted {
            let whole = self.read_rows(stripe, span, lease, to, avoid).await;
            if whole.is_ok() || grains.len() == 1 {
                return whole;
            }
        }
        // Two members may be unreadable at different places: what redundancy can give back it gives grain by grain.
        for grain in grains {
            let part = Span {
                start: span.start.max(grain * GRAIN),
                end: span.end.min((grain + 1) * GRAIN),
                ..span
            };
            let to = to + (part.start - span.start);
            self.read_rows(stripe, part, lease, to, 0).await?;
        }
        Ok(())
    }

    /// Reads a span of which all of a chunk can be read, or computed from chunks that can.
    async fn read_rows(
        &self,
        stripe: u64,
        span: Span,
        lease: &Lease,
        to: u32,
        avoid: u64,
    ) -> Result<(), Errno> {
        let whole = piece(to as usize, (span.end - span.start) as usize);
        if self.geometry.is_mirrored() {
            return self.read_copy(stripe, span, lease, whole, avoid).await;
        }
        let own = self.geometry.slot_of(stripe, span.data);
        let at = self.chunk_at(stripe) + u64::from(span.start);
        let readable = self.readable(stripe);
        if readable & !avoid & 1 << own != 0 && self.read_one(own, at, lease, whole).await.is_ok() {
            return Ok(());
        }
        let rows = span.start..span.end;
        self.reconstruct(stripe, (own, avoid), rows, (lease, to as usize), None)
            .await?;
        if readable & 1 << own != 0 {
            let chunk = self.chunk_at(stripe);
            let source = Source::Others(stripe, avoid);
            self.rewrite_span((own, chunk), span, (lease, to), source)
                .await?;
        }
        Ok(())
    }

    /// Reads a span of a chunk from any copy, those of `avoid` last, and writes those that could not be read.
    async fn read_copy(
        &self,
        stripe: u64,
        span: Span,
        lease: &Lease,
        whole: Piece,
        avoid: u64,
    ) -> Result<(), Errno> {
        let readable = self.readable(stripe);
        let copies = self.geometry.copies(stripe, span.data);
        let (last, first): (Spots, Spots) = copies
            .filter(|spot| readable & 1 << spot.slot != 0)
            .partition(|spot| avoid & 1 << spot.slot != 0);
        let at = |spot: &Spot| spot.member_at + u64::from(span.start);
        let mut bad = last.clone();
        for spot in first.iter().chain(&last) {
            if self
                .read_one(spot.slot, at(spot), lease, whole)
                .await
                .is_ok()
            {
                for bad in bad.iter().filter(|bad| bad.slot != spot.slot) {
                    let place = (bad.slot, bad.member_at);
                    self.rewrite_span(place, span, (lease, whole.offset), Source::Copy(*spot))
                        .await?;
                }
                return Ok(());
            }
            if !bad.contains(spot) {
                bad.push(*spot);
            }
        }
        Err(EIO)
    }

    pub(super) async fn read_one(
        &self,
        slot: u16,
        at: u64,
        lease: &Lease,
        piece: Piece,
    ) -> Result<(), ()> {
        let mut ios: Ios<E> = ArrayVec::new();
        let len = u64::from(piece.len);
        ios.push((
            slot,
            Some(
                self.member(slot)
                    .submit(DiskVerb::Read, at, len, Buf::Pool(lease), &[piece]),
            ),
        ));
        if self.finish(&mut ios).await == 0 {
            Ok(())
        } else {
            Err(())
        }
    }

    /// Computes bytes `rows` of a slot's chunk from others, those of `avoid` left out, into the lease at `to`. Work
    /// memory is `scratch` (a lease with room for every other member's rows from that offset on), or is leased. A
    /// member that cannot be read is done without, while redundancy lasts.
    pub(super) async fn reconstruct(
        &self,
        stripe: u64,
        (slot, avoid): (u16, u64),
        rows: Range<u32>,
        (lease, to): (&Lease, usize),
        scratch: Option<(&Lease, usize)>,
    ) -> Result<(), Errno> {
        let geometry = &self.geometry;
        let n = usize::from(geometry.data_slots());
        let total = (rows.end - rows.start) as usize;
        let step = if scratch.is_some() {
            total
        } else {
            rows_of(PASS_BYTES / n)
        };
        let target = geometry.part_of(stripe, slot);
        for done in (0..total).step_by(step.max(1)) {
            let len = step.min(total - done);
            let leased;
            let (work, base) = match scratch {
                Some((work, base)) => (work, base),
                None => {
                    leased = self.lease(Quota::Work, n * len).await?;
                    (&leased, 0)
                }
            };
            let from = self.chunk_at(stripe) + u64::from(rows.start) + done as u64;
            let mut unread = avoid;
            let recipe = loop {
                if self.failed.get() {
                    return Err(EIO);
                }
                let there = geometry.parts_of(stripe, self.readable(stripe) & !unread);
                let recipe = recipe(geometry.data_slots(), geometry.parities(), target, there);
                let recipe = recipe.ok_or(EIO)?;
                let mut ios: Ios<E> = ArrayVec::new();
                for (i, (part, _)) in recipe.iter().enumerate() {
                    let (other, buf) = (geometry.slot_of(stripe, *part), Buf::Pool(work));
                    let pieces = [piece(base + i * len, len)];
                    let io =
                        self.member(other)
                            .submit(DiskVerb::Read, from, len as u64, buf, &pieces);
                    ios.push((other, Some(io)));
                }
                match self.finish(&mut ios).await {
                    0 => break recipe,
                    failed => unread |= failed,
                }
            };
            let terms: ArrayVec<Term<'_>, MEMBERS_MAX> = recipe
                .iter()
                .enumerate()
                .map(|(i, (_, by))| (*by, work.cells(base + i * len..base + (i + 1) * len)))
                .collect();
            gf::combine_to(lease.cells(to + done..to + done + len), &terms);
        }
        Ok(())
    }

    /// A read of `slot` failed under a write: computes its rows, writes them back. What redundancy does not give of them is
    /// added to `lost`, by bytes of the chunk.
    pub(super) async fn repair(
        &self,
        stripe: u64,
        slot: u16,
        rows: &Range<u32>,
        lost: &mut BTreeSet<u32>,
    ) -> Result<(), Errno> {
        let members = usize::from(self.geometry.members());
        let step = u32::try_from(rows_of(PASS_BYTES / members)).expect("at most 1 MiB");
        let end = rows.end * GRAIN;
        let mut start = rows.start * GRAIN;
        while start < end {
            if self.readable(stripe) & 1 << slot == 0 {
                return Ok(()); // Failed by somebody else meanwhile: planned anew without it.
            }
            let part = start..end.min(start + step);
            let len = (part.end - part.start) as usize;
            // One lease for all: who holds work memory must not wait for more.
            let lease = self.lease(Quota::Work, members * len).await?;
            let is_whole = self.is_synced(stripe)
                && self
                    .repair_rows(stripe, slot, part.clone(), &lease)
                    .await
                    .is_ok();
            if !is_whole {
                // Another member may be unreadable too, at other grains of these; or it is not proven what
                // redundancy says, and taken only for those that cannot be read.
                for at in part.step_by(GRAIN as usize) {
                    let from = self.chunk_at(stripe) + u64::from(at);
                    let grain = piece(0, GRAIN as usize);
                    if self.read_one(slot, from, &lease, grain).await.is_err()
                        && let Err(errno) =
                            self.repair_rows(stripe, slot, at..at + GRAIN, &lease).await
                    {
                        if self.failed.get() {
                            return Err(errno);
                        }
                        lost.insert(at);
                    }
                }
            }
            start += step;
        }
        Ok(())
    }

    /// Computes and writes back bytes `rows` of a slot's chunk; the lease has room for those of every member.
    async fn repair_rows(
        &self,
        stripe: u64,
        slot: u16,
        rows: Range<u32>,
        lease: &Lease,
    ) -> Result<(), Errno> {
        let len = (rows.end - rows.start) as usize;
        let at = self.chunk_at(stripe) + u64::from(rows.start);
        self.reconstruct(stripe, (slot, 0), rows, (lease, 0), Some((lease, len)))
            .await?;
        self.rewrite(slot, at, lease, piece(0, len), Some((lease, len)))
            .await
    }

    /// Writes a span of a chunk (`at`: where that begins on the member) over what could not be read of it, in whole
    /// grains: a disk cannot write less than its physical block anew.
    async fn rewrite_span(
        &self,
        (slot, at): (u16, u64),
        span: Span,
        (lease, to): (&Lease, u32),
        source: Source,
    ) -> Result<(), Errno> {
        let grains = span.grains();
        let inner = span.start.next_multiple_of(GRAIN)..span.end / GRAIN * GRAIN;
        if !inner.is_empty() {
            let good = piece(
                (to + inner.start - span.start) as usize,
                (inner.end - inner.start) as usize,
            );
            self.rewrite(slot, at + u64::from(inner.start), lease, good, None)
                .await?;
        }
        for grain in grains.filter(|grain| !inner.contains(&(grain * GRAIN))) {
            self.rewrite_grain((slot, at), grain, source).await?;
        }
        Ok(())
    }

    /// Writes a grain anew of which the host asked for a part: what the member still gives of it, else what others have.
    pub(super) async fn rewrite_grain(
        &self,
        (slot, at): (u16, u64),
        grain: u32,
        source: Source,
    ) -> Result<(), Errno> {
        const LEN: usize = GRAIN as usize;
        const SECTOR: usize = 512;
        let room = LEN * (1 + usize::from(self.geometry.members()));
        let work = self.lease(Quota::Work, room).await?;
        let start = grain * GRAIN;
        let found = match source {
            Source::Copy(spot) => {
                let at = spot.member_at + u64::from(start);
                self.read_one(spot.slot, at, &work, piece(0, LEN))
                    .await
                    .is_ok()
            }
            Source::Others(stripe, avoid) => {
                let (rows, scratch) = (start..start + GRAIN, Some((&work, LEN)));
                self.reconstruct(stripe, (slot, avoid), rows, (&work, 0), scratch)
                    .await
                    .is_ok()
            }
        };
        if !found {
            return Ok(()); // What was asked for was there; of the rest, nobody asked.
        }
        let at = at + u64::from(start);
        for sector in (0..LEN).step_by(SECTOR) {
            let own = piece(LEN, SECTOR);
            if self
                .read_one(slot, at + sector as u64, &work, own)
                .await
                .is_ok()
            {
                let (from, to) = (
                    work.cells(LEN..LEN + SECTOR),
                    work.cells(sector..sector + SECTOR),
                );
                to.iter()
                    .zip(from)
                    .for_each(|(to, from)| to.set(from.get()));
            }
        }
        self.rewrite(slot, at, &work, piece(0, LEN), Some((&work, LEN)))
            .await
    }

    /// Writes right content over what could not be read, and reads it again. What fails either is put on the list of the member's
    /// bad blocks; if that cannot be, the member is failed, if redundancy allows. The bytes read go to `scratch`, or to a lease.
    pub(super) async fn rewrite(
        &self,
        slot: u16,
        at: u64,
        lease: &Lease,
        good: Piece,
        scratch: Option<(&Lease, usize)>,
    ) -> Result<(), Errno> {
        let bytes = u64::from(good.len);
        let len = good.len as usize;
        let member = self.member(slot);
        let leased;
        let scratch = match scratch {
            Some(scratch) => scratch,
            None => {
                leased = self.lease(Quota::Work, len).await?;
                (&leased, 0)
            }
        };
        let was_listed: Vec<u64> = (at..at + bytes)
            .step_by(GRAIN as usize)
            .filter(|at| member.bad.touches(*at, u64::from(GRAIN)))
            .collect();
        if self.put_back(slot, at, lease, good, scratch).await {
            Box::pin(self.save_bad_blocks()).await?;
            self.note_repaired(slot, at, bytes);
            return self.fail_if_worn(slot).await;
        }
        // What of it the disk does not take is not read any more, as long as the others have it.
        if self.in_sync.get() & 1 << slot != 0 && self.can_lose(1 << slot) {
            let mut bad = Vec::new();
            for done in (0..good.len).step_by(GRAIN as usize) {
                let part = piece((good.offset + done) as usize, GRAIN as usize);
                let at = at + u64::from(done);
                if !self.put_back(slot, at, lease, part, scratch).await {
                    bad.push(at);
                }
            }
            if !member.is_gone.get() && Box::pin(self.list_blocks(slot, &bad)).await? {
                member.strikes.add(self.clock.now(), at);
                return self.fail_if_worn(slot).await;
            }
        }
        // What was not right before is not right now.
        for at in was_listed {
            member.bad.insert(at);
        }
        let live = self.in_sync.get() | self.rebuilding().map_or(0, |slot| 1 << slot);
        if live & 1 << slot == 0 {
            return Ok(()); // Failed meanwhile.
        }
        if self.can_lose(1 << slot) {
            member.to_blame.set(true);
            return self
                .fail(
                    1 << slot,
                    FailCause::Writes,
                    "unreadable, and could not be rewritten",
                )
                .await;
        }
        // Never fail the last redundancy for a sector: the caller has the right bytes.
        Ok(())
    }

    /// Writes right content, and says whether it can be read then.
    async fn put_back(
        &self,
        slot: u16,
        at: u64,
        lease: &Lease,
        good: Piece,
        (check, base): (&Lease, usize),
    ) -> bool {
        let mut ios: Ios<E> = ArrayVec::new();
        let verb = DiskVerb::Write { fua: true };
        let (bytes, len) = (u64::from(good.len), good.len as usize);
        let member = self.member(slot);
        ios.push((
            slot,
            Some(member.submit(verb, at, bytes, Buf::Pool(lease), &[good])),
        ));
        if self.finish(&mut ios).await != 0 {
            return false;
        }
        let start = good.offset as usize;
        let read = self.read_one(slot, at, check, piece(base, len)).await;
        let (was, is) = (
            lease.cells(start..start + len),
            check.cells(base..base + len),
        );
        read.is_ok() && parity::is_equal(is, was)
    }

    /// Fails a member that had too many read errors lately, where that costs no data and stops nothing: not while it is
    /// being copied, nor while any slot is filled.
    async fn fail_if_worn(&self, slot: u16) -> Result<(), Errno> {
        let member = self.member(slot);
        let (errors, most) = (
            member.strikes.get(self.clock.now()),
            self.read_errors_max.get(),
        );
        let is_worn = most > 0 && errors > most;
        let is_filling = self.rebuilding().is_some() || self.copying().is_some();
        let is_in_sync = self.in_sync.get() & 1 << slot != 0;
        if !is_worn || is_filling || !is_in_sync || !self.can_lose(1 << slot) {
            return Ok(());
        }
        let why = format!(
            "{errors} read errors lately, more than {most}; all were repaired, but it wears out"
        );
        member.to_blame.set(true);
        self.fail(1 << slot, FailCause::Reads, &why).await
    }
}
