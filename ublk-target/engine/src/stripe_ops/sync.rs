//! Redundancy made right: the parity or the legs of a stripe, or the slot that is rebuilt.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::repair::Source;
use super::{Ios, PASS_BYTES, piece, rows_of, sum_data};
use lunar_api::target::FailCause;

use crate::geometry::Spot;
use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::plan::GRAIN;
use crate::pool::{Lease, Quota};
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::serve::bits;
use crate::traits::{Buf, DiskVerb, Env};

impl<E: Env> RaidGroup<E> {
    /// Makes the redundancy of a stripe right, or fills the slot that is rebuilt.
    pub(super) async fn sync_stripe(&self, stripe: u64) -> Result<(), Errno> {
        let chunk = usize::try_from(self.geometry.chunk()).expect("at most 1 MiB");
        let is_mirrored = self.geometry.is_mirrored();
        let (width, chunks) = match is_mirrored {
            true => (self.geometry.copies_of_each(), self.geometry.data_slots()),
            false => (self.geometry.members(), 1),
        };
        let step = rows_of(PASS_BYTES / usize::from(width)).min(chunk);
        for d in 0..chunks {
            for done in (0..chunk).step_by(step) {
                let len = step.min(chunk - done);
                let rows = u32::try_from(done).expect("at most 1 MiB")
                    ..u32::try_from(done + len).expect("at most 1 MiB");
                match (self.rebuilding(), is_mirrored) {
                    (Some(slot), true) => self.fill_copy(stripe, d, slot, rows).await?,
                    (Some(slot), false) => self.fill_rows(stripe, slot, rows).await?,
                    (None, true) => self.check_copies(stripe, d, rows).await?,
                    (None, false) => self.check_parity(stripe, rows, false).await?,
                }
            }
        }
        Ok(())
    }

    /// Fills rows of a data chunk of a slot from another copy; nothing if the slot has none.
    async fn fill_copy(
        &self,
        stripe: u64,
        d: u16,
        slot: u16,
        rows: Range<u32>,
    ) -> Result<(), Errno> {
        let is_own = |spot: &Spot| spot.slot == slot;
        let Some(own) = self.geometry.copies(stripe, d).find(is_own) else {
            return Ok(());
        };
        let len = (rows.end - rows.start) as usize;
        let lease = self.lease(Quota::Work, len).await?;
        let at = own.member_at + u64::from(rows.start);
        if self
            .read_any_copy((stripe, d), rows.clone(), &lease, 0)
            .await
        {
            return self.fill_at(slot, at, (&lease, 0), len).await;
        }
        // Copies may be unreadable at different grains of these.
        Box::pin(self.fill_grains(slot, at, &lease, len, async |to| {
            let start = rows.start + to32(to);
            let copy = self.read_any_copy((stripe, d), start..start + GRAIN, &lease, to);
            copy.await.then_some(()).ok_or(EIO)
        }))
        .await
    }

    /// Reads rows of a data chunk from a copy that is in sync to `to` of the lease; false if none gives them.
    async fn read_any_copy(
        &self,
        (stripe, d): (u64, u16),
        rows: Range<u32>,
        lease: &Lease,
        to: usize,
    ) -> bool {
        let part = piece(to, (rows.end - rows.start) as usize);
        for from in self.geometry.copies(stripe, d) {
            let at = from.member_at + u64::from(rows.start);
            let is_right = self.in_sync.get() & 1 << from.slot != 0;
            if is_right && self.read_one(from.slot, at, lease, part).await.is_ok() {
                return true;
            }
        }
        false
    }

    /// Fills a slot grain by grain with what `get` brings to the lease; what it does not is put on the list of its bad blocks.
    ///
    /// # Crash  the list is durable before the rebuild counts these rows as done
    async fn fill_grains(
        &self,
        slot: u16,
        at: u64,
        lease: &Lease,
        len: usize,
        get: impl AsyncFn(usize) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let grain = GRAIN as usize;
        let mut lost = Vec::new();
        for to in (0..len).step_by(grain) {
            match get(to).await {
                Ok(()) => {
                    self.fill_at(slot, at + to as u64, (lease, to), grain)
                        .await?
                }
                Err(errno) if !self.does_everybody_answer() => return Err(errno),
                Err(_) => lost.push(at + to as u64),
            }
        }
        match Box::pin(self.list_blocks(slot, &lost)).await? {
            true => Ok(()),
            false => Err(EIO),
        }
    }

    /// Fills rows of a slot from the rest of the stripe.
    async fn fill_rows(&self, stripe: u64, slot: u16, rows: Range<u32>) -> Result<(), Errno> {
        let len = (rows.end - rows.start) as usize;
        let at = self.chunk_at(stripe) + u64::from(rows.start);
        let members = usize::from(self.geometry.members());
        let lease = self.lease(Quota::Work, members * len).await?;
        let whole = self
            .reconstruct(
                stripe,
                (slot, 0),
                rows.clone(),
                (&lease, 0),
                Some((&lease, len)),
            )
            .await;
        if whole.is_ok() {
            return self.fill_at(slot, at, (&lease, 0), len).await;
        }
        // Others may be unreadable at different grains of these.
        Box::pin(self.fill_grains(slot, at, &lease, len, async |to| {
            let start = rows.start + to32(to);
            let (part, scratch) = (start..start + GRAIN, Some((&lease, len)));
            self.reconstruct(stripe, (slot, 0), part, (&lease, to), scratch)
                .await
        }))
        .await
    }

    /// Writes bytes of a lease to the slot that is rebuilt.
    async fn fill_at(
        &self,
        slot: u16,
        at: u64,
        (lease, from): (&Lease, usize),
        len: usize,
    ) -> Result<(), Errno> {
        let verb = DiskVerb::Write { fua: false };
        let mut ios: Ios<E> = ArrayVec::new();
        let io =
            self.member(slot)
                .submit(verb, at, len as u64, Buf::Pool(lease), &[piece(from, len)]);
        ios.push((slot, Some(io)));
        match self.finish(&mut ios).await {
            0 => Ok(()),
            failed => {
                self.fail(failed, FailCause::Writes, "write failed during rebuild")
                    .await?;
                Err(EIO)
            }
        }
    }

    /// Reads rows of every copy of a data chunk, and writes what does not fit the first that can be read.
    async fn check_copies(&self, stripe: u64, d: u16, rows: Range<u32>) -> Result<(), Errno> {
        let in_sync = self.in_sync.get();
        let copies = self.geometry.copies(stripe, d);
        let spots: ArrayVec<Spot, MEMBERS_MAX> = copies
            .filter(|spot| in_sync & 1 << spot.slot != 0)
            .collect();
        if spots.len() < 2 {
            return Ok(()); // There is nothing to compare.
        }
        let len = (rows.end - rows.start) as usize;
        let at = |spot: &Spot| spot.member_at + u64::from(rows.start);
        let work = self.lease(Quota::Work, spots.len() * len).await?;
        let cells = |i: usize| work.cells(i * len..(i + 1) * len);
        let mut ios: Ios<E> = ArrayVec::new();
        for (i, spot) in spots.iter().enumerate() {
            let (buf, pieces) = (Buf::Pool(&work), [piece(i * len, len)]);
            let io =
                self.member(spot.slot)
                    .submit(DiskVerb::Read, at(spot), len as u64, buf, &pieces);
            ios.push((spot.slot, Some(io)));
        }
        let failed = self.finish(&mut ios).await;
        let is_read = |spot: &Spot| failed & 1 << spot.slot == 0;
        if failed != 0 && len > GRAIN as usize {
            drop(work);
            let check = async |rows| self.check_copies(stripe, d, rows).await;
            return self.check_grains(rows, check).await;
        }
        let Some(first) = spots.iter().position(is_read) else {
            // Of one that is not on a list nothing else has to be made right, should it come back.
            let is_listed = |spot: &&Spot| {
                let bad = &self.member(spot.slot).bad;
                bad.touches(at(spot), u64::from(GRAIN))
            };
            return match spots.iter().filter(is_listed).count() + 1 < spots.len() {
                true => Err(EIO),
                false => Ok(()),
            };
        };
        for (i, spot) in spots.iter().enumerate() {
            if !is_read(spot) || (i != first && !parity::is_equal(cells(i), cells(first))) {
                let (verb, buf) = (DiskVerb::Write { fua: false }, Buf::Pool(&work));
                let pieces = [piece(first * len, len)];
                let io = self
                    .member(spot.slot)
                    .submit(verb, at(spot), len as u64, buf, &pieces);
                ios.push((spot.slot, Some(io)));
            }
        }
        match self.finish(&mut ios).await {
            0 => Ok(()),
            failed => {
                self.fail(failed, FailCause::Writes, "write failed during resync")
                    .await
            }
        }
    }

    /// Makes one row fit whose data cannot all be read, by a byte of the chunk. What a sector is that cannot be read is what
    /// parity says, as where a member is missing; what can be read is as it is.
    async fn settle_row(&self, stripe: u64, row: u32, failed: u64) -> Result<(), Errno> {
        let parities = usize::from(self.geometry.parities());
        let chunk = self.chunk_at(stripe);
        let is_listed = |slot: u16| {
            let bad = &self.member(slot).bad;
            bad.touches(chunk + u64::from(row), u64::from(GRAIN))
        };
        let unlisted = bits(failed).filter(|slot| !is_listed(*slot));
        let unlisted: ArrayVec<u16, MEMBERS_MAX> = unlisted.collect();
        let unread = failed.count_ones() as usize;
        if unread > parities {
            // What redundancy cannot say now it is not to say later.
            return match self.does_everybody_answer() {
                true => Box::pin(self.give_up_parity(stripe, &[row])).await,
                false => Err(EIO),
            };
        }
        for slot in &unlisted {
            let source = Source::Others(stripe, 0);
            self.rewrite_grain((*slot, chunk), row / GRAIN, source)
                .await?;
        }
        if unlisted.iter().any(|slot| !is_listed(*slot)) {
            return Err(EIO); // Repaired, or failed: looked at again.
        }
        if unread == parities {
            return Ok(());
        }
        // Two parities have to say the same of what is lost.
        let grain = GRAIN as usize;
        let n = usize::from(self.geometry.members());
        let work = self.lease(Quota::Work, 2 * n * grain).await?;
        let at = |slot: u16| usize::from(slot) * grain;
        let member_at = chunk + u64::from(row);
        let lost = u16::try_from(failed.trailing_zeros()).expect("a slot");
        let q = self.geometry.parity_slots(stripe).last().ok_or(EIO)?;
        for slot in bits(self.geometry.slots() & !failed) {
            let part = piece(at(slot), grain);
            let read = self.read_one(slot, member_at, &work, part).await;
            read.map_err(|()| EIO)?;
        }
        let (rows, scratch) = (row..row + GRAIN, Some((&work, n * grain)));
        self.reconstruct(stripe, (lost, 1 << q), rows, (&work, at(lost)), scratch)
            .await?;
        let cells = |slot: u16| work.cells(at(slot)..at(slot) + grain);
        sum_data(&self.geometry, stripe, cells, false);
        self.fill_at(q, member_at, (&work, at(q)), grain).await
    }

    /// Does by grains what cannot be done at once.
    async fn check_grains(
        &self,
        rows: Range<u32>,
        check: impl AsyncFn(Range<u32>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        for start in rows.step_by(GRAIN as usize) {
            Box::pin(check(start..start + GRAIN)).await?;
        }
        Ok(())
    }

    /// Reads rows of every member, and writes the parity that does not fit the data.
    async fn check_parity(
        &self,
        stripe: u64,
        rows: Range<u32>,
        is_again: bool,
    ) -> Result<(), Errno> {
        let slots = self.geometry.slots();
        if self.in_sync.get() != slots {
            return Ok(()); // What is missing is computed from the parity as it is.
        }
        let n = usize::from(self.geometry.members());
        let len = (rows.end - rows.start) as usize;
        let at = self.chunk_at(stripe) + u64::from(rows.start);
        let work = self.lease(Quota::Work, n * len).await?;
        let mut ios: Ios<E> = ArrayVec::new();
        for slot in bits(slots) {
            let piece = piece(usize::from(slot) * len, len);
            let buf = Buf::Pool(&work);
            let io = self
                .member(slot)
                .submit(DiskVerb::Read, at, len as u64, buf, &[piece]);
            ios.push((slot, Some(io)));
        }
        let failed = self.finish(&mut ios).await;
        let cells = |slot: u16| {
            let i = usize::from(slot);
            work.cells(i * len..(i + 1) * len)
        };
        // What cannot be read is written from the data.
        let geometry = &self.geometry;
        let parity: ArrayVec<u16, 2> = geometry.parity_slots(stripe).collect();
        let mut wrong = failed;
        if bits(failed).any(|slot| !parity.contains(&slot)) {
            drop(work);
            if len > GRAIN as usize {
                let check = async |rows| self.check_parity(stripe, rows, is_again).await;
                return self.check_grains(rows, check).await;
            }
            let is_settled = Box::pin(self.settle_row(stripe, rows.start, failed)).await;
            // Once more: what could be repaired can be read now.
            return match (is_settled, is_again) {
                (Err(_), false) => Box::pin(self.check_parity(stripe, rows, true)).await,
                (settled, _) => settled,
            };
        }
        sum_data(geometry, stripe, cells, true);
        for slot in &parity {
            if !parity::is_zero(cells(*slot)) {
                wrong |= 1 << slot;
            }
        }
        if wrong == 0 {
            return Ok(());
        }
        sum_data(geometry, stripe, cells, false);
        for slot in bits(wrong) {
            let (verb, buf) = (DiskVerb::Write { fua: false }, Buf::Pool(&work));
            let pieces = [piece(usize::from(slot) * len, len)];
            let io = self.member(slot).submit(verb, at, len as u64, buf, &pieces);
            ios.push((slot, Some(io)));
        }
        match self.finish(&mut ios).await {
            0 => Ok(()),
            failed => {
                self.fail(failed, FailCause::Writes, "write failed during resync")
                    .await
            }
        }
    }
}

/// A number of bytes of a chunk.
fn to32(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("at most 1 MiB")
}
