//! Writes of a stripe: what is read and computed first, then the log, the members, the state.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::band_buffers::{BandBuffers, WORK};
use super::lost_rows::{LostRows, Unread};
use super::{Ios, PASS_BYTES, PASS_IOS, absolute, piece};
use lunar_api::target::FailCause;

use crate::inflight::{SEGMENTS_MAX, Segment};
use crate::lanes::{Entries, Lanes, LogKind};
use crate::limits::MEMBERS_MAX;
use crate::member::add;
use crate::plan::{BANDS_MAX, Band, GRAIN, Mode, Span, WRITES_MAX, cut};
use crate::planted::{self, Bug};
use crate::pool::{Lease, Quota};
use crate::ppl::{ENTRIES_MAX, PAYLOAD_MAX, What, grains_of, sectors_of};
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::serve::bits;
use crate::stripe_table::{Copied, Item, Task};
use crate::sync::join_all;
use crate::traits::{Buf, DiskError, DiskVerb, Env, Front, Piece};

/// Bands of one operation: its writes' borders, and long bands cut to what a pass holds; to grains, where some cannot be read.
const BANDS: usize = BANDS_MAX + 256;
/// Times a pass is planned anew because a member failed under it; each costs a member or repairs one.
const ATTEMPTS: usize = 8;

type Bands = ArrayVec<Band, BANDS>;
type Copies<E> = ArrayVec<(u16, Option<<<E as Env>::Front as Front>::Io>), WRITES_MAX>;

/// How a pass ended that did not fail for good.
enum Pass {
    Done,
    /// These slots could not be read at these rows.
    Unreadable {
        slots: u64,
        rows: Range<u32>,
    },
    /// The bytes of some writes could not be had: the pass is for the others.
    NotCopied,
    /// A member did not take the log, and is not written to any more.
    NotLogged,
}

impl<E: Env> RaidGroup<E> {
    /// Writes data and parity of one stripe.
    ///
    /// # Crash  process: the in-flight log has every write of a pass before the first of them is issued. Power: data and
    /// parity may be torn. Policies `ppl`, `journal`: the log on the parity members makes them right, it is durable before
    /// the first write. `bitmap` resyncs the regions that it has marked, `none` the group (write hole open)
    pub(super) async fn write_parity(&self, stripe: u64, batch: &[Item]) -> Result<(), Errno> {
        let _entered = self.enter(stripe..stripe + 1).await?;
        let (mut next, mut attempts, mut is_first) = (0, 0, true);
        let mut lost_rows = LostRows::default();
        'again: loop {
            attempts += 1;
            if attempts > ATTEMPTS || self.failed.get() {
                return Err(EIO);
            }
            let mut spans: ArrayVec<Span, WRITES_MAX> = ArrayVec::new();
            let mut fua = false;
            for item in batch.iter().filter(|item| !item.task.is_void()) {
                if let Task::Write {
                    span,
                    fua: item_fua,
                    ..
                } = &item.task
                {
                    spans.push(*span);
                    fua |= item_fua;
                }
            }
            let state = self.stripe_state(stripe);
            // With every part in a buffer, and one for the log with its edges; and what is logged of it fits a unit.
            let grains = PASS_BYTES / crate::plan::GRAIN as usize - 16;
            let rows_max = (grains / (usize::from(self.geometry.members()) + 1)).max(1);
            let mut bands = Bands::new();
            let mut exhausted = false;
            let rows_max = match lost_rows.is_empty() {
                true => u32::try_from(rows_max).expect("at most 256"),
                false => 1,
            };
            let mut stuck = Vec::new();
            cut(
                &spans,
                rows_max,
                |rows, modified, partial| match lost_rows.plan(
                    &state,
                    rows.clone(),
                    modified,
                    partial,
                ) {
                    Ok(band) => bands.push(band),
                    Err(_) if lost_rows.may_go_on(&rows) => stuck.push(rows.start * GRAIN),
                    Err(_) => exhausted = true,
                },
            );
            if exhausted {
                return Err(EIO);
            }
            if !stuck.is_empty() {
                Box::pin(self.go_without_parity(stripe, &stuck, &mut lost_rows)).await?;
                next = 0;
                continue 'again;
            }
            if std::mem::take(&mut is_first) {
                self.count(batch, |lu| match bands.first().map(|band| band.mode) {
                    Some(Mode::Full) => add(&lu.full_stripe_writes, 1),
                    Some(Mode::ReadModify) => add(&lu.read_modify_writes, 1),
                    Some(Mode::Reconstruct | Mode::Rebuild) => add(&lu.reconstruct_writes, 1),
                    Some(Mode::DataOnly) | None => {}
                });
            }
            // Where bands are cut depends on the writes that are done alone: what is done stays done in a new plan.
            while next < bands.len() {
                let end = self.pass_end(batch, &bands, next);
                match self
                    .write_pass(stripe, batch, &bands[next..end], fua)
                    .await?
                {
                    Pass::Done => (next, attempts) = (end, 0),
                    // Only the first pass copies: nothing was written yet.
                    Pass::NotCopied | Pass::NotLogged => continue 'again,
                    Pass::Unreadable { slots, rows } => {
                        let bands = &bands[next..end];
                        let unread = Unread { slots, rows, bands };
                        Box::pin(self.note_unread(stripe, batch, unread, &mut lost_rows)).await?;
                        if lost_rows.is_empty() {
                            continue 'again;
                        }
                        // Bands are cut anew: what was done is done again.
                        next = 0;
                        continue 'again;
                    }
                }
            }
            return self.wait_durable().await;
        }
    }

    async fn write_pass(
        &self,
        stripe: u64,
        batch: &[Item],
        bands: &[Band],
        fua: bool,
    ) -> Result<Pass, Errno> {
        let held: usize = bands.iter().map(|band| band.buffers() * band.bytes()).sum();
        let summed = bands.iter().map(|band| self.logged_sum(batch, band).0);
        let bytes = held + summed.sum::<usize>();
        let work = match bytes {
            0 => None,
            bytes => Some(self.lease(Quota::Work, bytes).await?),
        };
        let chunk_at = self.chunk_at(stripe);
        let mut copies = self.start_copies(batch);
        let mut ios: Ios<E> = ArrayVec::new();
        // Old content.
        let mut at = 0;
        for band in bands {
            if let Some(work) = &work {
                let layout = BandBuffers {
                    band,
                    work: Some(work),
                    base: at,
                };
                for part in bits(band.reads) {
                    let slot = self.geometry.slot_of(stripe, part);
                    let piece = piece(layout.offset(part), band.bytes());
                    let from = chunk_at + u64::from(band.rows.start * GRAIN);
                    let len = u64::from(piece.len);
                    let io = self.member(slot).submit(
                        DiskVerb::Read,
                        from,
                        len,
                        Buf::Pool(work),
                        &[piece],
                    );
                    ios.push((slot, Some(io)));
                }
            }
            at += band.buffers() * band.bytes();
        }
        let is_copied = end_copies(batch, &mut copies).await;
        let failed = self.finish(&mut ios).await;
        if !is_copied {
            return Ok(Pass::NotCopied);
        }
        if failed != 0 {
            let start = bands.iter().map(|band| band.rows.start).min().unwrap_or(0);
            let end = bands.iter().map(|band| band.rows.end).max().unwrap_or(0);
            return Ok(Pass::Unreadable {
                slots: failed,
                rows: start..end,
            });
        }
        // New content and parity, and the list of writes.
        let mut writes = Writes::new();
        let writable = self.writable(stripe);
        let mut at = 0;
        for band in bands {
            let layout = BandBuffers {
                band,
                work: work.as_ref(),
                base: at,
            };
            layout.compute(batch, self.geometry.data_slots(), self.geometry.parities());
            for d in bits(band.modified) {
                let slot = self.geometry.slot_of(stripe, d);
                if writable & 1 << slot != 0 {
                    let (lease, from, source) = layout.source(batch, d);
                    let write = Write {
                        slot,
                        at: chunk_at + u64::from(band.rows.start * GRAIN),
                        len: piece(0, band.bytes()).len,
                        from: absolute(lease, from),
                        source,
                    };
                    push_write(&mut writes, write);
                }
            }
            for part in bits(band.parity) {
                let Some(work) = &work else { break };
                let write = Write {
                    slot: self.geometry.slot_of(stripe, part),
                    at: chunk_at + u64::from(band.rows.start * GRAIN),
                    len: piece(0, band.bytes()).len,
                    from: absolute(work, layout.offset(part)),
                    source: WORK,
                };
                push_write(&mut writes, write);
            }
            at += band.buffers() * band.bytes();
        }
        // The log first: what tears from here on is written right from it.
        let entries = match self.lanes.as_ref().map(|lanes| lanes.kind) {
            None => Entries::new(),
            Some(_) if planted::is(Bug::NotLogged) => Entries::new(),
            Some(_) if bands.iter().all(|band| self.is_whole(band)) => whole_entries(stripe, bands),
            Some(LogKind::Journal) => copy_entries(&writes),
            Some(LogKind::PartialParity) => {
                self.sum_entries(stripe, batch, bands, (work.as_ref(), held))
            }
        };
        let parities = self.geometry.parity_slots(stripe);
        let parities = parities.fold(0, |set, slot| set | 1 << slot) & writable;
        let Some(logged) = self.log_write(parities, &entries).await? else {
            return Ok(Pass::NotLogged);
        };
        self.write_logged(batch, work.as_ref(), &writes, fua)
            .await?;
        drop(logged);
        Ok(Pass::Done)
    }

    /// Says whether all data of a band's rows is written.
    fn is_whole(&self, band: &Band) -> bool {
        let all = u64::MAX >> (64 - self.geometry.data_slots());
        band.modified == all && band.partial == 0
    }

    /// Bytes of the sums that are logged of a band, and entries.
    fn logged_sum(&self, batch: &[Item], band: &Band) -> (usize, usize) {
        let is_ours = |lanes: &Lanes| lanes.kind == LogKind::PartialParity;
        let is_summed = self.lanes.as_ref().is_some_and(is_ours) && band.parity != 0;
        if !is_summed || self.is_whole(band) {
            return (0, 1);
        }
        let layout = BandBuffers {
            band,
            work: None,
            base: 0,
        };
        let (mut bytes, mut entries) = (0, 0);
        layout.runs(batch, |rows, _| {
            let grains = grains_of(sectors_of(rows));
            bytes += ((grains.end - grains.start) * GRAIN) as usize;
            entries += 1;
        });
        (bytes, entries)
    }

    /// Entries with the sums of what is not modified, which go to `work` from `at` on.
    fn sum_entries(
        &self,
        stripe: u64,
        batch: &[Item],
        bands: &[Band],
        (work, mut at): (Option<&Lease>, usize),
    ) -> Entries {
        let mut entries = Entries::new();
        let mut base = 0;
        for band in bands {
            let layout = BandBuffers { band, work, base };
            base += band.buffers() * band.bytes();
            let Some(work) = work.filter(|_| band.parity != 0 && !self.is_whole(band)) else {
                entries.extend(whole_entries(stripe, std::slice::from_ref(band)));
                continue;
            };
            layout.runs(batch, |rows, modified| {
                let rows = sectors_of(rows);
                let grains = grains_of(rows);
                let len = ((grains.end - grains.start) * GRAIN) as usize;
                let to = work.cells(at..at + len);
                let data = self.geometry.data_slots();
                layout.unmodified_to(batch, data, (&grains, modified), to);
                let what = What::Partial {
                    stripe,
                    rows,
                    modified,
                };
                entries.push((what, absolute(work, at)));
                at += len;
            });
        }
        entries
    }

    /// How many bands one pass takes: by memory, by I/Os, by room in the logs.
    fn pass_end(&self, batch: &[Item], bands: &[Band], start: usize) -> usize {
        let (mut bytes, mut reads, mut writes, mut logged, mut entries) = (0, 0, 0, 0, 0);
        let is_journal = |lanes: &Lanes| lanes.kind == LogKind::Journal;
        let mut is_copied = false;
        for (i, band) in bands.iter().enumerate().skip(start) {
            let written = (band.modified | band.parity).count_ones() as usize;
            let sum = self.logged_sum(batch, band);
            bytes += band.buffers() * band.bytes() + sum.0;
            entries += sum.1;
            reads += band.buffers();
            writes += written;
            logged += written * band.bytes();
            is_copied |= !self.is_whole(band);
            let is_full = bytes > PASS_BYTES
                || reads > PASS_IOS
                || writes > SEGMENTS_MAX.min(ENTRIES_MAX)
                || entries > ENTRIES_MAX
                || (is_copied
                    && logged > PAYLOAD_MAX as usize
                    && self.lanes.as_ref().is_some_and(is_journal));
            if i > start && is_full {
                return i;
            }
        }
        bands.len()
    }

    /// Begins to copy what the host writes, where that is left to the worker.
    fn start_copies(&self, batch: &[Item]) -> Copies<E> {
        let mut copies = Copies::<E>::new();
        for (i, item) in (0u16..).zip(batch) {
            if let Task::Write {
                span,
                lease,
                from,
                copied,
                ..
            } = &item.task
                && let Copied::No { id, offset } = copied.get()
            {
                let len = span.end - span.start;
                let io = self.front.fetch(id, offset, len, lease, *from);
                copies.push((i, Some(io)));
            }
        }
        copies
    }

    /// Writes a prepared list: log, members, state; in this order.
    pub(super) async fn write_logged(
        &self,
        batch: &[Item],
        work: Option<&Lease>,
        writes: &[Write],
        fua: bool,
    ) -> Result<(), Errno> {
        let entry = self.log.open().await;
        let mut logged: ArrayVec<Segment, SEGMENTS_MAX> = ArrayVec::new();
        logged.extend(writes.iter().map(|write| {
            let member = self.member(write.slot);
            Segment {
                disk: member.uuid,
                at: member.data_offset + write.at,
                len: write.len,
                from: write.from,
            }
        }));
        if !planted::is(Bug::LogAfterData) {
            self.log.commit(&entry, &logged);
        }
        let mut ios: Ios<E> = ArrayVec::new();
        for write in writes {
            let lease = match (write.source, work) {
                (WORK, Some(work)) => work,
                (WORK, None) => unreachable!("a write from work memory without any"),
                (item, _) => match &batch[usize::from(item)].task {
                    Task::Write { lease, .. } => lease,
                    Task::Read { .. }
                    | Task::Sync
                    | Task::Copy
                    | Task::Scrub { .. }
                    | Task::Hold => {
                        unreachable!("batches of writes hold writes")
                    }
                },
            };
            let piece = Piece {
                offset: write.from - absolute(lease, 0),
                len: write.len,
            };
            let fua = fua && !planted::is(Bug::FuaIgnored);
            let (verb, len) = (DiskVerb::Write { fua }, u64::from(write.len));
            let member = self.member(write.slot);
            let io = member.submit(verb, write.at, len, Buf::Pool(lease), &[piece]);
            ios.push((write.slot, Some(io)));
        }
        let failed = self.finish(&mut ios).await;
        if planted::is(Bug::LogAfterData) {
            self.log.commit(&entry, &logged);
        }
        if failed != 0
            && let Err(errno) = self.fail(failed, FailCause::Writes, "write failed").await
        {
            // Without redundancy for it the entry stays, and the memory that it names: a successor writes these
            // rows once more.
            let mut kept = self.kept.borrow_mut();
            kept.extend(work.cloned());
            kept.extend(batch.iter().filter_map(|item| match &item.task {
                Task::Write { lease, .. } => Some(lease.clone()),
                Task::Read { .. } | Task::Sync | Task::Copy | Task::Scrub { .. } | Task::Hold => {
                    None
                }
            }));
            return Err(errno);
        }
        self.log.clear(entry);
        Ok(())
    }

    /// Says whether a write is of a part of a grain that no copy has the rest of: it could not be read afterwards.
    fn is_part_of_nothing(&self, stripe: u64, item: &Item) -> bool {
        let Task::Write { span, .. } = &item.task else {
            return false;
        };
        let readable = self.readable(stripe);
        let is_listed = |at: u32| {
            let grain = u64::from(at / GRAIN * GRAIN);
            let copies = self.geometry.copies(stripe, span.data);
            let mut copies = copies.filter(|spot| readable & 1 << spot.slot != 0);
            copies.all(|spot| {
                let bad = &self.member(spot.slot).bad;
                bad.touches(spot.member_at + grain, GRAIN.into())
            })
        };
        let edges = [span.start, span.end];
        edges
            .into_iter()
            .any(|at| !at.is_multiple_of(GRAIN) && is_listed(at))
    }

    /// Writes every copy of what a stripe holds from one private copy.
    ///
    /// # Crash  each write is on all members with a copy by one entry of the log, or on none
    pub(super) async fn write_mirrors(&self, stripe: u64, batch: &[Item]) -> Result<(), Errno> {
        if self.failed.get() {
            return Err(EIO);
        }
        let _entered = self.enter(stripe..stripe + 1).await?;
        if self.has_bad.get()
            && batch
                .iter()
                .any(|item| self.is_part_of_nothing(stripe, item))
        {
            return Err(EIO);
        }
        let copies = usize::from(self.geometry.copies_of_each());
        for part in batch.chunks(SEGMENTS_MAX / copies) {
            let mut fua = false;
            let mut writes = Writes::new();
            let writable = self.writable(stripe);
            for (source, item) in (0u16..).zip(part) {
                if item.task.is_void() {
                    continue;
                }
                let Task::Write {
                    span,
                    lease,
                    from,
                    fua: item_fua,
                    ..
                } = &item.task
                else {
                    continue;
                };
                fua |= item_fua;
                let spots = self.geometry.copies(stripe, span.data);
                let spots = spots.filter(|spot| writable & 1 << spot.slot != 0);
                writes.extend(spots.map(|spot| Write {
                    slot: spot.slot,
                    at: spot.member_at + u64::from(span.start),
                    len: span.end - span.start,
                    from: absolute(lease, *from as usize),
                    source,
                }));
            }
            self.write_logged(part, None, &writes, fua).await?;
        }
        self.wait_durable().await
    }
}

/// Waits for copies; false if one failed.
async fn end_copies<F>(batch: &[Item], copies: &mut ArrayVec<(u16, Option<F>), WRITES_MAX>) -> bool
where
    F: Future<Output = Result<(), DiskError>> + Unpin,
{
    let mut all = true;
    join_all(copies, |i, result| {
        if let Task::Write { copied, .. } = &batch[usize::from(i)].task {
            copied.set(match result {
                Ok(()) => Copied::Yes,
                Err(_) => Copied::Failed,
            });
        }
        all &= result.is_ok();
    })
    .await;
    all
}

/// A write to a member that is prepared.
pub(super) struct Write {
    pub slot: u16,
    /// Bytes from the start of the group's data on the member.
    pub at: u64,
    pub len: u32,
    /// Bytes from the start of the group's memory.
    pub from: u32,
    /// The item of the batch whose memory that is, or [`WORK`].
    pub source: u16,
}

/// Writes of one entry of the log.
pub(super) type Writes = ArrayVec<Write, SEGMENTS_MAX>;
// A write to every leg, and a band on every member, fit one entry.
const _: () = assert!(MEMBERS_MAX <= SEGMENTS_MAX && SEGMENTS_MAX <= PASS_IOS);

/// Adds a write, joined to one that it follows both on the member and in memory.
fn push_write(to: &mut Writes, write: Write) {
    let joins = |w: &&mut Write| {
        w.slot == write.slot
            && w.source == write.source
            && w.at + u64::from(w.len) == write.at
            && w.from + w.len == write.from
    };
    match to.iter_mut().find(joins) {
        Some(w) => w.len += write.len,
        None => to.push(write),
    }
}

/// Entries of rows whose data is all written.
fn whole_entries(stripe: u64, bands: &[Band]) -> Entries {
    let entry = |band: &Band| {
        let what = What::Whole {
            stripe,
            stripes: 1,
            rows: sectors_of(band.rows.start * GRAIN..band.rows.end * GRAIN),
        };
        (what, 0)
    };
    bands
        .iter()
        .filter(|band| band.parity != 0)
        .map(entry)
        .collect()
}

/// Entries with all that is written.
pub(super) fn copy_entries(writes: &[Write]) -> Entries {
    let entry = |write: &Write| {
        let what = What::Copy {
            slot: write.slot,
            at: write.at,
            len: write.len,
        };
        (what, write.from)
    };
    writes.iter().map(entry).collect()
}
