//! A stripe compared: what every member holds of it against what redundancy says; and made right, if asked for.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ops::Range;

use arrayvec::ArrayVec;

use super::write::{Write, Writes, copy_entries};
use super::{Ios, PASS_BYTES, absolute, piece, rows_of, sum_data};
use crate::geometry::{Geometry, Spot};
use crate::lanes::{Entries, LogKind};
use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::plan::GRAIN;
use crate::pool::{Lease, Quota};
use crate::ppl::{What, sectors_of};
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
    /// Bytes of the members' data within which redundancy does not fit; none: it fits.
    pub wrong: Option<Range<u64>>,
    /// Slots that are wrong, as bits, where that can be told.
    pub slots: u64,
    /// It was written anew and fits now.
    pub repaired: bool,
    /// Bytes that could not be read and were rewritten.
    pub rewritten: u64,
}

impl Finding {
    fn add(&mut self, wrong: Range<u64>, slots: u64) {
        self.wrong = Some(hull(self.wrong.take(), wrong));
        self.slots |= slots;
    }
}

fn hull<T: Ord>(old: Option<Range<T>>, with: Range<T>) -> Range<T> {
    match old {
        Some(old) => old.start.min(with.start)..old.end.max(with.end),
        None => with,
    }
}

/// What is compared with each other.
enum Kind {
    /// The copies of a data chunk.
    Copies(u16),
    /// Every chunk of a stripe with parity.
    Parity,
}

/// Where it is: a part of a chunk on each of these, at the same bytes of the chunk.
type Spots = ArrayVec<Spot, MEMBERS_MAX>;

/// How some rows compare.
#[derive(Default)]
struct Compared {
    /// Bytes of the rows that differ, from the first to the last, of one of the spots.
    wrong: Option<(usize, Range<usize>)>,
    slots: u64,
    /// What makes them fit: spot, and which of the buffers goes there.
    writes: ArrayVec<(usize, usize), MEMBERS_MAX>,
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
        let mut found = Finding {
            repaired: repair,
            ..Finding::default()
        };
        let result = self.scrub_whole(stripe, repair, &mut found).await;
        found.repaired &= result.is_ok();
        if found.wrong.is_some() || found.rewritten > 0 {
            self.scrub_found.borrow_mut().insert(stripe, found);
        }
        result
    }

    async fn scrub_whole(
        &self,
        stripe: u64,
        repair: bool,
        found: &mut Finding,
    ) -> Result<(), Errno> {
        let chunk = usize::try_from(self.geometry.chunk()).expect("at most 1 MiB");
        let is_mirrored = self.geometry.is_mirrored();
        let chunks = match is_mirrored {
            true => self.geometry.data_slots(),
            false => 1,
        };
        for d in 0..chunks {
            let kind = if is_mirrored {
                Kind::Copies(d)
            } else {
                Kind::Parity
            };
            let spots = self.spots(stripe, &kind);
            let step = rows_of(PASS_BYTES / spots.len().max(1)).min(chunk);
            for start in (0..chunk).step_by(step) {
                let end = chunk.min(start + step);
                let rows = u32::try_from(start).expect("at most 1 MiB")
                    ..u32::try_from(end).expect("at most 1 MiB");
                self.scrub_rows(stripe, (&kind, &spots), rows, repair, found)
                    .await?;
            }
        }
        Ok(())
    }

    /// Where what is compared lies on members in sync. Of copies the first of md's order comes first: it wins.
    fn spots(&self, stripe: u64, kind: &Kind) -> Spots {
        let in_sync = self.in_sync.get();
        match kind {
            Kind::Copies(d) => self
                .geometry
                .copies(stripe, *d)
                .filter(|spot| in_sync & 1 << spot.slot != 0)
                .collect(),
            Kind::Parity => bits(self.geometry.slots())
                .map(|slot| Spot {
                    slot,
                    member_at: self.chunk_at(stripe),
                })
                .collect(),
        }
    }

    async fn scrub_rows(
        &self,
        stripe: u64,
        (kind, spots): (&Kind, &Spots),
        rows: Range<u32>,
        repair: bool,
        found: &mut Finding,
    ) -> Result<(), Errno> {
        let in_sync = self.in_sync.get();
        let len = (rows.end - rows.start) as usize;
        let place = |i: usize| spots[i].member_at + u64::from(rows.start);
        let mut written = false;
        for _ in 0..ATTEMPTS {
            let work = self.lease(Quota::Work, spots.len() * len).await?;
            let failed = self.read_spots(spots, &rows, &work).await;
            if self.in_sync.get() != in_sync || !self.can_scrub() {
                return Err(EIO);
            }
            if failed != 0 {
                // Who holds work memory waits for no more of it.
                drop(work);
                found.rewritten += self.restore(stripe, (kind, spots), &rows, failed).await?;
                continue;
            }
            let compared = self.compare(stripe, (kind, spots), len, &work);
            let Some((spot, wrong)) = compared.wrong else {
                return Ok(());
            };
            let on_member = |at: usize| place(spot) + at as u64;
            found.add(on_member(wrong.start)..on_member(wrong.end), compared.slots);
            if !repair || written {
                found.repaired = false;
                return Ok(());
            }
            let write = |(spot, buffer): &(usize, usize)| Write {
                slot: spots[*spot].slot,
                at: place(*spot),
                len: piece(0, len).len,
                from: absolute(&work, buffer * len),
                source: WORK,
            };
            let writes: Writes = compared.writes.iter().map(write).collect();
            let slots = self.geometry.parity_slots(stripe);
            let slots = slots.fold(0, |set, slot| set | 1 << slot) & self.in_sync.get();
            // raid5 writes parity alone; all data of the rows is what it is computed from.
            let entries = match self.lanes.as_ref().map(|lanes| lanes.kind) {
                None => Entries::new(),
                Some(LogKind::Journal) => copy_entries(&writes),
                Some(LogKind::PartialParity) => {
                    let what = What::Whole {
                        stripe,
                        stripes: 1,
                        rows: sectors_of(rows.clone()),
                    };
                    std::iter::once((what, 0)).collect()
                }
            };
            let Some(logged) = self.log_write(slots, &entries).await? else {
                return Err(EIO);
            };
            self.write_logged(&[], Some(&work), &writes, false).await?;
            drop(logged);
            // Only what reads back as it should counts as repaired.
            written = true;
        }
        Err(EIO)
    }

    /// Reads rows of all spots side by side; returns the slots that failed.
    async fn read_spots(&self, spots: &Spots, rows: &Range<u32>, work: &Lease) -> u64 {
        let len = (rows.end - rows.start) as usize;
        let mut ios: Ios<E> = ArrayVec::new();
        for (i, spot) in spots.iter().enumerate() {
            let at = spot.member_at + u64::from(rows.start);
            let (buf, pieces) = (Buf::Pool(work), [piece(i * len, len)]);
            let member = self.member(spot.slot);
            let io = member.submit(DiskVerb::Read, at, len as u64, buf, &pieces);
            ios.push((spot.slot, Some(io)));
        }
        self.finish(&mut ios).await
    }

    /// Gives slots back what they cannot read, grain by grain; returns the bytes.
    async fn restore(
        &self,
        stripe: u64,
        (kind, spots): (&Kind, &Spots),
        rows: &Range<u32>,
        failed: u64,
    ) -> Result<u64, Errno> {
        let mut restored = 0;
        for start in rows.clone().step_by(GRAIN as usize) {
            for spot in spots.iter().filter(|spot| failed & 1 << spot.slot != 0) {
                if self.is_grain_readable(spot, start).await? {
                    continue;
                }
                match kind {
                    Kind::Parity => {
                        let row = start / GRAIN;
                        let mut lost = BTreeSet::new();
                        self.repair(stripe, spot.slot, &(row..row + 1), &mut lost)
                            .await?;
                        if !lost.is_empty() {
                            return Err(EIO);
                        }
                    }
                    Kind::Copies(_) => self.restore_copy(spots, spot, start).await?,
                }
                restored += u64::from(GRAIN);
            }
        }
        Ok(restored)
    }

    async fn is_grain_readable(&self, spot: &Spot, start: u32) -> Result<bool, Errno> {
        let at = spot.member_at + u64::from(start);
        let lease = self.lease(Quota::Work, GRAIN as usize).await?;
        let read = self.read_one(spot.slot, at, &lease, piece(0, GRAIN as usize));
        Ok(read.await.is_ok())
    }

    /// Writes a grain of a copy anew from the first other copy that can be read.
    async fn restore_copy(&self, spots: &Spots, to: &Spot, start: u32) -> Result<(), Errno> {
        let grain = GRAIN as usize;
        let at = |spot: &Spot| spot.member_at + u64::from(start);
        let lease = self.lease(Quota::Work, 2 * grain).await?;
        for spot in spots.iter().filter(|spot| *spot != to) {
            let read = self.read_one(spot.slot, at(spot), &lease, piece(0, grain));
            if read.await.is_ok() {
                let scratch = Some((&lease, grain));
                return self
                    .rewrite(to.slot, at(to), &lease, piece(0, grain), scratch)
                    .await;
            }
        }
        Err(EIO)
    }

    /// Compares rows that lie in `work` one spot after the other; parity's own may be changed.
    fn compare(
        &self,
        stripe: u64,
        (kind, spots): (&Kind, &Spots),
        len: usize,
        work: &Lease,
    ) -> Compared {
        match kind {
            Kind::Copies(_) => compare_copies(spots, len, work),
            Kind::Parity => compare_parity(&self.geometry, stripe, len, work),
        }
    }
}

fn buffer(work: &Lease, i: usize, len: usize) -> &[Cell<u8>] {
    work.cells(i * len..(i + 1) * len)
}

/// Parity is the sum of the data, or is made so. Every member is in sync, so its spot is its slot. Which chunk is wrong
/// is told only of two parities of which one fits: it is the other.
fn compare_parity(geometry: &Geometry, stripe: u64, len: usize, work: &Lease) -> Compared {
    let rows = |slot: u16| buffer(work, usize::from(slot), len);
    sum_data(geometry, stripe, rows, true);
    let mut compared = Compared::default();
    for slot in geometry.parity_slots(stripe) {
        let parity = rows(slot);
        if parity::is_zero(parity) {
            continue;
        }
        let i = usize::from(slot);
        let wrong = differing(len, |sector| !parity::is_zero(&parity[sector]));
        compared.wrong = Some(match compared.wrong.take() {
            Some((first, old)) => (first, hull(Some(old), wrong)),
            None => (i, wrong),
        });
        compared.slots |= 1 << slot;
        compared.writes.push((i, i));
    }
    if compared.writes.len() == usize::from(geometry.parities()) {
        compared.slots = 0;
    }
    sum_data(geometry, stripe, rows, false);
    compared
}

/// Copies: every one equals the first that is in sync, or is made so.
fn compare_copies(spots: &Spots, len: usize, work: &Lease) -> Compared {
    let mut compared = Compared::default();
    for (i, spot) in spots.iter().enumerate().skip(1) {
        let (first, copy) = (buffer(work, 0, len), buffer(work, i, len));
        if parity::is_equal(copy, first) {
            continue;
        }
        let is_other =
            |sector: Range<usize>| !parity::is_equal(&copy[sector.clone()], &first[sector]);
        let wrong = differing(len, is_other);
        compared.wrong = Some(match compared.wrong.take() {
            Some((spot, old)) => (spot, hull(Some(old), wrong)),
            None => (i, wrong),
        });
        compared.slots |= 1 << spot.slot;
        compared.writes.push((i, 0));
    }
    compared
}

/// The sectors from the first to the last that differ, of so many bytes that do.
fn differing(len: usize, differs: impl Fn(Range<usize>) -> bool) -> Range<usize> {
    let sector = |i: usize| i * SECTOR..len.min((i + 1) * SECTOR);
    let sectors = len.div_ceil(SECTOR);
    let first = (0..sectors).find(|i| differs(sector(*i)));
    let last = (0..sectors).rfind(|i| differs(sector(*i)));
    match first.zip(last) {
        Some((first, last)) => sector(first).start..sector(last).end,
        None => 0..len,
    }
}
