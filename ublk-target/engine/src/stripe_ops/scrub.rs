//! A stripe compared: what every member holds of it against what redundancy says; and made right, if asked for.

use std::cell::Cell;
use std::ops::Range;

use arrayvec::ArrayVec;

use super::write::{Write, Writes};
use super::{Ios, PASS_BYTES, absolute, piece, rows_of};
use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::plan::{GRAIN, Span};
use crate::pool::{Lease, Quota};
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::serve::bits;
use crate::stripe_ops::band_buffers::WORK;
use crate::traits::{Buf, DiskVerb, Env};

/// Times that rows are read anew because something of them had to be restored first.
const ATTEMPTS: usize = 3;
/// Differences are told in these: the smallest block that any disk has.
const SECTOR: usize = 512;

/// What a scrub found in a stripe.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Bytes of the chunk within which redundancy does not fit; none: it fits.
    pub wrong: Option<Range<u32>>,
    /// Slots that are wrong, as bits, where that can be told.
    pub slots: u64,
    /// It was written anew and fits now.
    pub repaired: bool,
    /// Bytes that could not be read and were rewritten.
    pub rewritten: u64,
}

impl Finding {
    fn add(&mut self, wrong: Range<u32>, slots: u64) {
        self.wrong = Some(match self.wrong.take() {
            Some(old) => old.start.min(wrong.start)..old.end.max(wrong.end),
            None => wrong,
        });
        self.slots |= slots;
    }
}

/// How some rows compare.
#[derive(Default)]
struct Compared {
    /// Bytes of the rows that differ, from the first to the last.
    wrong: Option<Range<usize>>,
    slots: u64,
    /// What makes them fit: slot, and which of the buffers goes there.
    writes: ArrayVec<(u16, usize), MEMBERS_MAX>,
}

impl<E: Env> RaidGroup<E> {
    /// Compares a stripe, and repairs it if asked for. What was found is left in `scrub_found`.
    ///
    /// # Crash  as any write: the in-flight log has a repair before it is issued
    /// # Errors  it cannot be compared: too much of it is unreadable, or a member was lost meanwhile
    pub(super) async fn scrub_stripe(&self, stripe: u64, repair: bool) -> Result<(), Errno> {
        if !self.is_synced(stripe) {
            return Err(EIO);
        }
        let chunk = usize::try_from(self.geometry.chunk()).expect("at most 1 MiB");
        let members = usize::from(self.geometry.members());
        let step = rows_of(PASS_BYTES / members).min(chunk);
        let mut found = Finding {
            repaired: repair,
            ..Finding::default()
        };
        let mut result = Ok(());
        for start in (0..chunk).step_by(step) {
            let end = chunk.min(start + step);
            let rows = u32::try_from(start).expect("at most 1 MiB")
                ..u32::try_from(end).expect("at most 1 MiB");
            result = self.scrub_rows(stripe, rows, repair, &mut found).await;
            if result.is_err() {
                break;
            }
        }
        if found.wrong.is_some() || found.rewritten > 0 {
            self.scrub_found.borrow_mut().insert(stripe, found);
        }
        result
    }

    async fn scrub_rows(
        &self,
        stripe: u64,
        rows: Range<u32>,
        repair: bool,
        found: &mut Finding,
    ) -> Result<(), Errno> {
        let slots = self.in_sync.get();
        let n = slots.count_ones() as usize;
        let len = (rows.end - rows.start) as usize;
        let mut written = false;
        for _ in 0..ATTEMPTS {
            let work = self.lease(Quota::Work, n * len).await?;
            let failed = self.read_members(stripe, &rows, slots, &work).await;
            if self.in_sync.get() != slots || !self.can_scrub() {
                return Err(EIO);
            }
            if failed != 0 {
                // Who holds work memory waits for no more of it.
                drop(work);
                found.rewritten += self.restore(stripe, &rows, failed).await?;
                continue;
            }
            let compared = self.compare(stripe, slots, len, &work);
            let Some(wrong) = compared.wrong else {
                return Ok(());
            };
            let in_chunk = |at: usize| rows.start + u32::try_from(at).expect("at most 1 MiB");
            found.add(in_chunk(wrong.start)..in_chunk(wrong.end), compared.slots);
            if !repair || written {
                found.repaired = false;
                return Ok(());
            }
            let at = self.chunk_at(stripe) + u64::from(rows.start);
            let write = |(slot, buffer): &(u16, usize)| Write {
                slot: *slot,
                at,
                len: piece(0, len).len,
                from: absolute(&work, buffer * len),
                source: WORK,
            };
            let writes: Writes = compared.writes.iter().map(write).collect();
            self.write_logged(&[], Some(&work), &writes, false).await?;
            // Only what reads back as it should counts as repaired.
            written = true;
        }
        found.repaired = false;
        Err(EIO)
    }

    /// Reads rows of these slots side by side; returns those that failed.
    async fn read_members(&self, stripe: u64, rows: &Range<u32>, slots: u64, work: &Lease) -> u64 {
        let len = (rows.end - rows.start) as usize;
        let at = self.chunk_at(stripe) + u64::from(rows.start);
        let mut ios: Ios<E> = ArrayVec::new();
        for (i, slot) in bits(slots).enumerate() {
            let piece = piece(i * len, len);
            let io =
                self.member(slot)
                    .submit(DiskVerb::Read, at, len as u64, Buf::Pool(work), &[piece]);
            ios.push((slot, Some(io)));
        }
        self.finish(&mut ios).await
    }

    /// Gives slots back what they cannot read, grain by grain; returns the bytes.
    async fn restore(&self, stripe: u64, rows: &Range<u32>, failed: u64) -> Result<u64, Errno> {
        let mut restored = 0;
        for start in rows.clone().step_by(GRAIN as usize) {
            let from = self.chunk_at(stripe) + u64::from(start);
            for slot in bits(failed) {
                let grain = piece(0, GRAIN as usize);
                {
                    let lease = self.lease(Quota::Work, GRAIN as usize).await?;
                    if self.read_one(slot, from, &lease, grain).await.is_ok() {
                        continue;
                    }
                }
                self.restore_grain(stripe, slot, start).await?;
                restored += u64::from(GRAIN);
            }
        }
        Ok(restored)
    }

    async fn restore_grain(&self, stripe: u64, slot: u16, start: u32) -> Result<(), Errno> {
        let row = start / GRAIN;
        if self.geometry.parity_slot(stripe).is_some() {
            return self.repair(stripe, slot, &(row..row + 1)).await;
        }
        let span = Span {
            data: 0,
            start,
            end: start + GRAIN,
        };
        let lease = self.lease(Quota::Work, 2 * GRAIN as usize).await?;
        self.copy_from_leg(stripe, slot, span, &lease).await
    }

    /// Compares rows of every slot in sync, which lie in `work` one after the other; parity's own may be changed.
    fn compare(&self, stripe: u64, slots: u64, len: usize, work: &Lease) -> Compared {
        match self.geometry.parity_slot(stripe) {
            Some(parity) => compare_parity(slots, parity, len, work),
            None => compare_mirrors(slots, len, work),
        }
    }
}

fn buffer(work: &Lease, i: usize, len: usize) -> &[Cell<u8>] {
    work.cells(i * len..(i + 1) * len)
}

/// One parity: it is the XOR of the data, or it is made so. Which chunk is wrong cannot be told.
fn compare_parity(slots: u64, parity_slot: u16, len: usize, work: &Lease) -> Compared {
    let n = slots.count_ones() as usize;
    let Some(p) = bits(slots).position(|slot| slot == parity_slot) else {
        return Compared::default();
    };
    let mut data: ArrayVec<&[Cell<u8>], MEMBERS_MAX> = ArrayVec::new();
    data.extend((0..n).filter(|i| *i != p).map(|i| buffer(work, i, len)));
    let parity = buffer(work, p, len);
    // P ^ data is zero where parity is right.
    parity::xor_into(parity, &data);
    if parity::is_zero(parity) {
        return Compared::default();
    }
    let wrong = differing(len, |sector| !parity::is_zero(&parity[sector]));
    parity::xor_to(parity, &data);
    Compared {
        wrong,
        slots: 0,
        writes: ArrayVec::from_iter([(parity_slot, p)]),
    }
}

/// Mirrors: every leg equals the lowest slot in sync, or is made so.
fn compare_mirrors(slots: u64, len: usize, work: &Lease) -> Compared {
    let mut compared = Compared::default();
    let first = buffer(work, 0, len);
    for (i, slot) in bits(slots).enumerate().skip(1) {
        let leg = buffer(work, i, len);
        if parity::is_equal(leg, first) {
            continue;
        }
        let is_other =
            |sector: Range<usize>| !parity::is_equal(&leg[sector.clone()], &first[sector]);
        let wrong = differing(len, is_other).unwrap_or(0..len);
        compared.wrong = Some(match compared.wrong.take() {
            Some(old) => old.start.min(wrong.start)..old.end.max(wrong.end),
            None => wrong,
        });
        compared.slots |= 1 << slot;
        compared.writes.push((slot, 0));
    }
    compared
}

/// The sectors from the first to the last that differ.
fn differing(len: usize, differs: impl Fn(Range<usize>) -> bool) -> Option<Range<usize>> {
    let sector = |i: usize| i * SECTOR..len.min((i + 1) * SECTOR);
    let sectors = len.div_ceil(SECTOR);
    let first = (0..sectors).find(|i| differs(sector(*i)))?;
    let last = (0..sectors).rfind(|i| differs(sector(*i)))?;
    Some(sector(first).start..sector(last).end)
}
