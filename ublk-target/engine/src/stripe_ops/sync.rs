//! Redundancy made right: the parity or the legs of a stripe, or the slot that is rebuilt.

use std::ops::Range;

use arrayvec::ArrayVec;
use lunar_api::target::Level;

use super::{Ios, PASS_BYTES, piece, rows_of};
use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::pool::Quota;
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::serve::bits;
use crate::traits::{Buf, DiskVerb, Env};

impl<E: Env> RaidGroup<E> {
    /// Makes the redundancy of a stripe right, or fills the slot that is rebuilt.
    pub(super) async fn sync_stripe(&self, stripe: u64) -> Result<(), Errno> {
        let chunk = usize::try_from(self.geometry.chunk()).expect("at most 1 MiB");
        let members = usize::from(self.geometry.members());
        let step = rows_of(PASS_BYTES / members).min(chunk);
        let mut done = 0;
        while done < chunk {
            let len = step.min(chunk - done);
            let rows = u32::try_from(done).expect("at most 1 MiB")
                ..u32::try_from(done + len).expect("at most 1 MiB");
            match self.rebuilding() {
                Some(slot) => self.fill_rows(stripe, slot, rows).await?,
                None => self.check_rows(stripe, rows).await?,
            }
            done += len;
        }
        Ok(())
    }

    async fn fill_rows(&self, stripe: u64, slot: u16, rows: Range<u32>) -> Result<(), Errno> {
        let len = (rows.end - rows.start) as usize;
        let at = self.chunk_at(stripe) + u64::from(rows.start);
        let members = usize::from(self.geometry.members());
        let lease = self.lease(Quota::Work, members * len).await?;
        if self.geometry.level() == Level::Raid1 {
            let mut found = false;
            for leg in bits(self.in_sync.get()) {
                if !found {
                    found = self.read_one(leg, at, &lease, piece(0, len)).await.is_ok();
                }
            }
            if !found {
                return Err(EIO);
            }
        } else {
            self.reconstruct(stripe, slot, rows, (&lease, 0), Some((&lease, len)))
                .await?;
        }
        let verb = DiskVerb::Write { fua: false };
        let mut ios: Ios<E> = ArrayVec::new();
        let io =
            self.member(slot)
                .submit(verb, at, len as u64, Buf::Pool(&lease), &[piece(0, len)]);
        ios.push((slot, Some(io)));
        match self.finish(&mut ios).await {
            0 => Ok(()),
            failed => {
                self.fail(failed, "write failed during rebuild").await?;
                Err(EIO)
            }
        }
    }

    /// Reads rows of every member, and writes what does not fit the data (or the first leg).
    async fn check_rows(&self, stripe: u64, rows: Range<u32>) -> Result<(), Errno> {
        let slots = self.in_sync.get();
        let n = slots.count_ones() as usize;
        if n < usize::from(self.geometry.members()) && self.geometry.level() == Level::Raid5
            || n < 2
        {
            return Ok(()); // Without redundancy there is nothing to make right.
        }
        let len = (rows.end - rows.start) as usize;
        let at = self.chunk_at(stripe) + u64::from(rows.start);
        let work = self.lease(Quota::Work, n * len).await?;
        let mut ios: Ios<E> = ArrayVec::new();
        for (i, slot) in bits(slots).enumerate() {
            let piece = piece(i * len, len);
            let io = self.member(slot).submit(
                DiskVerb::Read,
                at,
                len as u64,
                Buf::Pool(&work),
                &[piece],
            );
            ios.push((slot, Some(io)));
        }
        let failed = self.finish(&mut ios).await;
        let cells = |i: usize| work.cells(i * len..(i + 1) * len);
        // What cannot be read is written: parity from the data, a mirror leg from the first that can be read.
        let mut writes: ArrayVec<(u16, usize), MEMBERS_MAX> = ArrayVec::new();
        match self.geometry.parity_slot(stripe) {
            Some(parity_slot) => {
                let p = bits(slots)
                    .position(|slot| slot == parity_slot)
                    .unwrap_or(0);
                if failed & !(1 << parity_slot) != 0 {
                    return Err(EIO);
                }
                let was_read = failed == 0;
                let mut sources: ArrayVec<&[std::cell::Cell<u8>], MEMBERS_MAX> = ArrayVec::new();
                sources.extend((0..n).filter(|i| *i != p).map(cells));
                if was_read {
                    // P ^ data is zero where parity is right; xor-ing the data again gives P back.
                    parity::xor_into(cells(p), &sources);
                    if !parity::is_zero(cells(p)) {
                        parity::xor_to(cells(p), &sources);
                        writes.push((parity_slot, p));
                    }
                } else {
                    parity::xor_to(cells(p), &sources);
                    writes.push((parity_slot, p));
                }
            }
            None => {
                let Some(first) = bits(slots).position(|slot| failed & 1 << slot == 0) else {
                    return Err(EIO);
                };
                for (i, slot) in bits(slots).enumerate() {
                    let unread = failed & 1 << slot != 0;
                    if unread || (i != first && !parity::is_equal(cells(i), cells(first))) {
                        writes.push((slot, first));
                    }
                }
            }
        }
        let verb = DiskVerb::Write { fua: false };
        for (slot, i) in writes {
            let io = self.member(slot).submit(
                verb,
                at,
                len as u64,
                Buf::Pool(&work),
                &[piece(i * len, len)],
            );
            ios.push((slot, Some(io)));
        }
        match self.finish(&mut ios).await {
            0 => Ok(()),
            failed => self.fail(failed, "write failed during resync").await,
        }
    }
}
