//! Redundancy made right: the parity or the legs of a stripe, or the slot that is rebuilt.

use std::ops::Range;

use arrayvec::ArrayVec;

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
                    (None, false) => self.check_parity(stripe, rows).await?,
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
        for from in self.geometry.copies(stripe, d) {
            let at = from.member_at + u64::from(rows.start);
            let is_right = self.in_sync.get() & 1 << from.slot != 0;
            if is_right
                && self
                    .read_one(from.slot, at, &lease, piece(0, len))
                    .await
                    .is_ok()
            {
                let at = own.member_at + u64::from(rows.start);
                return self.fill_at(slot, at, &lease, len).await;
            }
        }
        Err(EIO)
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
        if whole.is_err() {
            // Others may be unreadable at different grains of these.
            for (start, to) in rows
                .step_by(GRAIN as usize)
                .zip((0..).step_by(GRAIN as usize))
            {
                let (part, scratch) = (start..start + GRAIN, Some((&lease, len)));
                self.reconstruct(stripe, (slot, 0), part, (&lease, to), scratch)
                    .await?;
            }
        }
        self.fill_at(slot, at, &lease, len).await
    }

    /// Writes the first bytes of a lease to the slot that is rebuilt.
    async fn fill_at(&self, slot: u16, at: u64, lease: &Lease, len: usize) -> Result<(), Errno> {
        let verb = DiskVerb::Write { fua: false };
        let mut ios: Ios<E> = ArrayVec::new();
        let io = self
            .member(slot)
            .submit(verb, at, len as u64, Buf::Pool(lease), &[piece(0, len)]);
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
        let Some(first) = spots.iter().position(is_read) else {
            return Err(EIO);
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

    /// Reads rows of every member, and writes the parity that does not fit the data.
    async fn check_parity(&self, stripe: u64, rows: Range<u32>) -> Result<(), Errno> {
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
            return Err(EIO);
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
