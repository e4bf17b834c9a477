//! What a worker does to a stripe that it holds: write, read by way of redundancy, sync.
//!
//! The holder of a stripe is alone on it: nobody else writes its rows, and reads that compute from several
//! members see one state of it. Healthy reads do not come here.

use std::ops::Range;
use std::rc::Rc;

use arrayvec::ArrayVec;
use lunar_api::target::Level;

use crate::inflight::{SEGMENTS_MAX, Segment};
use crate::limits::MEMBERS_MAX;
use crate::member::{MemberIo, add};
use crate::parity;
use crate::plan::{BANDS_MAX, Band, GRAIN, Mode, Span, StripeState, cut, plan_band};
use crate::pool::{Lease, Quota};
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::serve::bits;
use crate::stripe_table::{Batch, Item, Task};
use crate::sync::join_all;
use crate::traits::{Buf, Disk, DiskVerb, Env, Piece};

/// Work memory of one pass over a stripe, in bytes: 64 workers share 8 MiB, and a pass must fit one block.
const PASS_BYTES: usize = 1 << 20;
/// Member I/Os of one pass.
const PASS_IOS: usize = 192;
/// Bands of one operation: its writes' borders, and long bands cut to what a pass holds.
const BANDS: usize = BANDS_MAX + 128;
/// Times an operation is planned anew because a member failed under it; each costs a member or repairs one.
const ATTEMPTS: usize = 8;

type Ios<E> = ArrayVec<(u16, Option<MemberIo<<<E as Env>::Disk as Disk>::Io>>), PASS_IOS>;
type Bands = ArrayVec<Band, BANDS>;

/// How a pass ended that did not fail for good.
enum Pass {
    Done,
    /// These slots could not be read at these rows.
    Unreadable {
        slots: u64,
        rows: Range<u32>,
    },
}

impl<E: Env> RaidGroup<E> {
    /// Works off stripe operations; the rim spawns `WORKERS` of them. Ends when the group has stopped.
    pub async fn worker(self: Rc<Self>) {
        let mut batch = Batch::new();
        while let Some((stripe, head)) = self.stripes.take(&mut batch).await {
            let result = match batch.first().map(|item| &item.task) {
                Some(Task::Write { .. }) => match self.geometry.level() {
                    Level::Raid5 => self.write_parity(stripe, &batch).await,
                    Level::Raid1 | Level::Raid0 => self.write_mirrors(stripe, &batch).await,
                },
                Some(Task::Read {
                    span,
                    lease,
                    to,
                    avoid,
                }) => self.read_around(stripe, *span, lease, *to, *avoid).await,
                Some(Task::Sync) => self.sync_stripe(stripe).await,
                None => Ok(()),
            };
            if batch.len() > 1 {
                self.count(&batch, |lu| add(&lu.merged, 1));
            }
            for item in batch.drain(..) {
                self.stripes.done(&item, result.map_err(|errno| errno.0));
            }
            self.stripes.release(head);
        }
    }

    fn count(&self, batch: &[Item], change: impl FnOnce(&crate::raid_group::Counters)) {
        if let Some(lu) = batch
            .first()
            .and_then(|item| item.lu)
            .and_then(|lu| self.lu(lu))
        {
            change(&lu.counters);
        }
    }

    /// Waits for I/Os and returns the slots that failed, as bits.
    async fn finish(&self, ios: &mut Ios<E>, verb: DiskVerb) -> u64 {
        let mut failed = 0;
        join_all(ios, |slot, result| {
            if result.is_err() {
                self.member(slot).note_error(verb);
                failed |= 1 << slot;
            }
        })
        .await;
        failed
    }

    /// Bytes from the start of a member's data to a stripe's chunk.
    fn chunk_at(&self, stripe: u64) -> u64 {
        stripe * self.geometry.chunk()
    }

    fn stripe_state(&self, stripe: u64) -> StripeState {
        let (readable, writable) = (self.readable(stripe), self.writable(stripe));
        let data = self.geometry.data_slots();
        let mut missing = 0;
        for d in 0..data {
            if readable & 1 << self.geometry.data_slot(stripe, d) == 0 {
                missing |= 1 << d;
            }
        }
        let parity = self
            .geometry
            .parity_slot(stripe)
            .map_or(0, |slot| 1u64 << slot);
        StripeState {
            data,
            missing,
            parity_readable: readable & parity != 0,
            parity_writable: writable & parity != 0,
            synced: stripe < self.synced.get(),
        }
    }

    /// Writes data and parity of one stripe.
    ///
    /// # Crash  process: the in-flight log has every write of a pass before the first of them is issued. Power:
    /// data and parity may be torn; policy `none` resyncs the group (write hole open)
    async fn write_parity(&self, stripe: u64, batch: &[Item]) -> Result<(), Errno> {
        let mut spans: ArrayVec<Span, { crate::plan::WRITES_MAX }> = ArrayVec::new();
        let mut fua = false;
        for item in batch {
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
        let mut attempts = 0;
        'again: loop {
            attempts += 1;
            if attempts > ATTEMPTS || self.failed.get() {
                return Err(EIO);
            }
            let state = self.stripe_state(stripe);
            let grains = PASS_BYTES / crate::plan::GRAIN as usize;
            let rows_max = (grains / (usize::from(state.data) + 2)).max(1);
            let mut bands = Bands::new();
            let mut exhausted = false;
            let rows_max = u32::try_from(rows_max).expect("at most 256");
            cut(&spans, rows_max, |rows, modified, partial| match plan_band(
                &state, rows, modified, partial,
            ) {
                Ok(band) => bands.push(band),
                Err(_) => exhausted = true,
            });
            if exhausted {
                return Err(EIO);
            }
            if attempts == 1 {
                self.count(batch, |lu| match bands.first().map(|band| band.mode) {
                    Some(Mode::Full) => add(&lu.full_stripe_writes, 1),
                    Some(Mode::ReadModify) => add(&lu.read_modify_writes, 1),
                    Some(Mode::Reconstruct | Mode::Rebuild) => add(&lu.reconstruct_writes, 1),
                    Some(Mode::DataOnly) | None => {}
                });
            }
            let mut next = 0;
            while next < bands.len() {
                let end = pass_end(&bands, next);
                match self
                    .write_pass(stripe, batch, &bands[next..end], fua)
                    .await?
                {
                    Pass::Done => next = end,
                    Pass::Unreadable { slots, rows } => {
                        for slot in bits(slots) {
                            self.repair(stripe, slot, &rows).await?;
                        }
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
        let bytes: usize = bands.iter().map(|band| band.buffers() * band.bytes()).sum();
        let work = match bytes {
            0 => None,
            bytes => Some(self.pool.lease(Quota::Work, bytes).await),
        };
        let parity_slot = self.geometry.parity_slot(stripe);
        let chunk_at = self.chunk_at(stripe);
        let mut ios: Ios<E> = ArrayVec::new();
        // Old content.
        let mut at = 0;
        for band in bands {
            if let Some(work) = &work {
                let mut buffer = at;
                let parity = parity_slot.filter(|_| band.read_parity);
                let data = bits(band.reads).map(|d| self.geometry.data_slot(stripe, d));
                for slot in data.chain(parity) {
                    let piece = piece(buffer, band.bytes());
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
                    buffer += band.bytes();
                }
            }
            at += band.buffers() * band.bytes();
        }
        let failed = self.finish(&mut ios, DiskVerb::Read).await;
        if failed != 0 {
            let start = bands.iter().map(|band| band.rows.start).min().unwrap_or(0);
            let end = bands.iter().map(|band| band.rows.end).max().unwrap_or(0);
            return Ok(Pass::Unreadable {
                slots: failed,
                rows: start..end,
            });
        }
        // New content and parity, and the list of writes.
        let mut segments: ArrayVec<(Segment, u16), SEGMENTS_MAX> = ArrayVec::new();
        let writable = self.writable(stripe);
        let mut at = 0;
        for band in bands {
            let layout = BandBuffers {
                band,
                work: work.as_ref(),
                base: at,
            };
            layout.compute(batch, self.geometry.data_slots());
            for d in bits(band.modified) {
                let slot = self.geometry.data_slot(stripe, d);
                if writable & 1 << slot != 0 {
                    let (lease, from, source) = layout.source(batch, d);
                    let segment = Segment {
                        slot,
                        at: chunk_at + u64::from(band.rows.start * GRAIN),
                        len: piece(0, band.bytes()).len,
                        from: absolute(lease, from),
                    };
                    push_segment(&mut segments, segment, source);
                }
            }
            if let (Some(slot), Some(offset), Some(work)) = (parity_slot, layout.parity(), &work) {
                let segment = Segment {
                    slot,
                    at: chunk_at + u64::from(band.rows.start * GRAIN),
                    len: piece(0, band.bytes()).len,
                    from: absolute(work, offset),
                };
                push_segment(&mut segments, segment, WORK);
            }
            at += band.buffers() * band.bytes();
        }
        self.write_segments(batch, work.as_ref(), &segments, fua)
            .await?;
        Ok(Pass::Done)
    }

    /// Writes a prepared list: log, members, state; in this order.
    async fn write_segments(
        &self,
        batch: &[Item],
        work: Option<&Lease>,
        segments: &[(Segment, u16)],
        fua: bool,
    ) -> Result<(), Errno> {
        let entry = self.log.open().await;
        let mut logged: ArrayVec<Segment, SEGMENTS_MAX> = ArrayVec::new();
        logged.extend(segments.iter().map(|(segment, _)| {
            let data_offset = self.member(segment.slot).data_offset;
            Segment {
                at: data_offset + segment.at,
                ..*segment
            }
        }));
        self.log.commit(&entry, &logged);
        let mut ios: Ios<E> = ArrayVec::new();
        for (segment, source) in segments {
            let lease = match (*source, work) {
                (WORK, Some(work)) => work,
                (WORK, None) => unreachable!("a segment of work memory without any"),
                (item, _) => match &batch[usize::from(item)].task {
                    Task::Write { lease, .. } => lease,
                    Task::Read { .. } | Task::Sync => unreachable!("batches of writes hold writes"),
                },
            };
            let offset = segment.from - absolute(lease, 0);
            let piece = Piece {
                offset,
                len: segment.len,
            };
            let verb = DiskVerb::Write { fua };
            let len = u64::from(segment.len);
            let io =
                self.member(segment.slot)
                    .submit(verb, segment.at, len, Buf::Pool(lease), &[piece]);
            ios.push((segment.slot, Some(io)));
        }
        let failed = self.finish(&mut ios, DiskVerb::Write { fua }).await;
        if failed != 0
            && let Err(errno) = self.fail(failed, "write failed").await
        {
            // Without redundancy for it the entry stays, and the memory that it names: a successor writes these
            // rows once more.
            let mut kept = self.kept.borrow_mut();
            kept.extend(work.cloned());
            kept.extend(batch.iter().filter_map(|item| match &item.task {
                Task::Write { lease, .. } => Some(lease.clone()),
                Task::Read { .. } | Task::Sync => None,
            }));
            return Err(errno);
        }
        self.log.clear(entry);
        Ok(())
    }

    /// Writes one stripe of every mirror leg from one private copy.
    async fn write_mirrors(&self, stripe: u64, batch: &[Item]) -> Result<(), Errno> {
        if self.failed.get() {
            return Err(EIO);
        }
        let mut fua = false;
        let mut segments: ArrayVec<(Segment, u16), SEGMENTS_MAX> = ArrayVec::new();
        for slot in bits(self.writable(stripe)) {
            for (i, item) in (0u16..).zip(batch) {
                let Task::Write {
                    span,
                    lease,
                    from,
                    fua: item_fua,
                } = &item.task
                else {
                    continue;
                };
                fua |= item_fua;
                let segment = Segment {
                    slot,
                    at: self.chunk_at(stripe) + u64::from(span.start),
                    len: span.end - span.start,
                    from: absolute(lease, *from as usize),
                };
                if segments.is_full() {
                    self.write_segments(batch, None, &segments, fua).await?;
                    segments.clear();
                }
                push_segment(&mut segments, segment, i);
            }
        }
        self.write_segments(batch, None, &segments, fua).await?;
        self.wait_durable().await
    }

    /// Reads a span whose own member cannot be used or just failed, and repairs that member where it can.
    async fn read_around(
        &self,
        stripe: u64,
        span: Span,
        lease: &Lease,
        to: u32,
        avoid: u64,
    ) -> Result<(), Errno> {
        let own = self.geometry.data_slot(stripe, span.data);
        let at = self.chunk_at(stripe) + u64::from(span.start);
        let whole = piece(to as usize, (span.end - span.start) as usize);
        let readable = self.readable(stripe);
        if self.geometry.level() == Level::Raid1 {
            for slot in bits(readable & !avoid).chain(bits(readable & avoid)) {
                if self.read_one(slot, at, lease, whole).await.is_ok() {
                    for bad in bits(readable & avoid & !(1 << slot)) {
                        self.rewrite(bad, at, lease, whole, None).await?;
                    }
                    return Ok(());
                }
            }
            return Err(EIO);
        }
        if readable & !avoid & 1 << own != 0 && self.read_one(own, at, lease, whole).await.is_ok() {
            return Ok(());
        }
        self.reconstruct(
            stripe,
            own,
            span.start..span.end,
            (lease, to as usize),
            None,
        )
        .await?;
        if readable & 1 << own != 0 {
            self.rewrite(own, at, lease, whole, None).await?;
        }
        Ok(())
    }

    async fn read_one(&self, slot: u16, at: u64, lease: &Lease, piece: Piece) -> Result<(), ()> {
        let mut ios: Ios<E> = ArrayVec::new();
        let len = u64::from(piece.len);
        ios.push((
            slot,
            Some(
                self.member(slot)
                    .submit(DiskVerb::Read, at, len, Buf::Pool(lease), &[piece]),
            ),
        ));
        if self.finish(&mut ios, DiskVerb::Read).await == 0 {
            Ok(())
        } else {
            Err(())
        }
    }

    /// Computes bytes `rows` of a slot's chunk from all others, into the lease at `to`. Work memory is `scratch` (a
    /// lease with room for every other member's rows from that offset on), or is leased.
    async fn reconstruct(
        &self,
        stripe: u64,
        slot: u16,
        rows: Range<u32>,
        (lease, to): (&Lease, usize),
        scratch: Option<(&Lease, usize)>,
    ) -> Result<(), Errno> {
        let all = u64::MAX >> (64 - u32::from(self.geometry.members()));
        let others = all & !(1 << slot);
        if self.failed.get() || self.readable(stripe) & others != others {
            return Err(EIO);
        }
        let n = others.count_ones() as usize;
        let total = (rows.end - rows.start) as usize;
        let step = if scratch.is_some() {
            total
        } else {
            rows_of(PASS_BYTES / n)
        };
        let mut done = 0;
        while done < total {
            let len = step.min(total - done);
            let leased;
            let (work, base) = match scratch {
                Some((work, base)) => (work, base),
                None => {
                    leased = self.pool.lease(Quota::Work, n * len).await;
                    (&leased, 0)
                }
            };
            let mut ios: Ios<E> = ArrayVec::new();
            let from = self.chunk_at(stripe) + u64::from(rows.start) + done as u64;
            for (i, other) in bits(others).enumerate() {
                let piece = piece(base + i * len, len);
                let buf = Buf::Pool(work);
                let io = self
                    .member(other)
                    .submit(DiskVerb::Read, from, len as u64, buf, &[piece]);
                ios.push((other, Some(io)));
            }
            if self.finish(&mut ios, DiskVerb::Read).await != 0 {
                return Err(EIO);
            }
            let mut sources: ArrayVec<&[std::cell::Cell<u8>], MEMBERS_MAX> = ArrayVec::new();
            sources.extend((0..n).map(|i| work.cells(base + i * len..base + (i + 1) * len)));
            parity::xor_to(lease.cells(to + done..to + done + len), &sources);
            done += len;
        }
        Ok(())
    }

    /// A read of `slot` failed under a write: computes its rows, writes them back.
    async fn repair(&self, stripe: u64, slot: u16, rows: &Range<u32>) -> Result<(), Errno> {
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
            let lease = self.pool.lease(Quota::Work, members * len).await;
            self.reconstruct(stripe, slot, part, (&lease, 0), Some((&lease, len)))
                .await?;
            let at = self.chunk_at(stripe) + u64::from(start);
            self.rewrite(slot, at, &lease, piece(0, len), Some((&lease, len)))
                .await?;
            start += step;
        }
        Ok(())
    }

    /// Writes right content over what could not be read, and reads it again; a member that fails either is
    /// failed, if redundancy allows. The bytes read go to `scratch`, or to a lease.
    async fn rewrite(
        &self,
        slot: u16,
        at: u64,
        lease: &Lease,
        good: Piece,
        scratch: Option<(&Lease, usize)>,
    ) -> Result<(), Errno> {
        let bytes = u64::from(good.len);
        let len = good.len as usize;
        let mut ios: Ios<E> = ArrayVec::new();
        let verb = DiskVerb::Write { fua: true };
        ios.push((
            slot,
            Some(
                self.member(slot)
                    .submit(verb, at, bytes, Buf::Pool(lease), &[good]),
            ),
        ));
        let mut ok = self.finish(&mut ios, verb).await == 0;
        if ok {
            let leased;
            let (check, base) = match scratch {
                Some((check, base)) => (check, base),
                None => {
                    leased = self.pool.lease(Quota::Work, len).await;
                    (&leased, 0)
                }
            };
            let start = good.offset as usize;
            ok = self
                .read_one(slot, at, check, piece(base, len))
                .await
                .is_ok()
                && parity::is_equal(
                    check.cells(base..base + len),
                    lease.cells(start..start + len),
                );
        }
        if ok {
            self.event_repaired(slot, at, bytes);
            return Ok(());
        }
        let live = self.in_sync.get() | self.rebuilding().map_or(0, |slot| 1 << slot);
        if live & 1 << slot == 0 {
            return Ok(()); // Failed meanwhile.
        }
        if self.can_lose(1 << slot) {
            return self
                .fail(1 << slot, "unreadable, and could not be rewritten")
                .await;
        }
        // Never fail the last redundancy for a sector: the caller has the right bytes.
        Ok(())
    }

    /// Makes the redundancy of a stripe right, or fills the slot that is rebuilt.
    async fn sync_stripe(&self, stripe: u64) -> Result<(), Errno> {
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
        let lease = self.pool.lease(Quota::Work, members * len).await;
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
        match self.finish(&mut ios, verb).await {
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
        let work = self.pool.lease(Quota::Work, n * len).await;
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
        let failed = self.finish(&mut ios, DiskVerb::Read).await;
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
        match self.finish(&mut ios, verb).await {
            0 => Ok(()),
            failed => self.fail(failed, "write failed during resync").await,
        }
    }
}

/// Source of a segment that lies in work memory.
const WORK: u16 = u16::MAX;

/// The whole grains of so many bytes; at least one.
fn rows_of(bytes: usize) -> usize {
    let grain = GRAIN as usize;
    (bytes / grain * grain).max(grain)
}

fn piece(offset: usize, len: usize) -> Piece {
    Piece {
        offset: u32::try_from(offset).expect("within a lease: at most 4 MiB"),
        len: u32::try_from(len).expect("within a lease: at most 4 MiB"),
    }
}

/// Bytes from the start of the group's memory.
fn absolute(lease: &Lease, offset: usize) -> u32 {
    u32::try_from(lease.start() + offset).expect("the memory is below 4 GiB")
}

/// Adds a write, joined to one that it follows both on the member and in memory.
fn push_segment(to: &mut ArrayVec<(Segment, u16), SEGMENTS_MAX>, segment: Segment, source: u16) {
    let joins = |(s, from): &&mut (Segment, u16)| {
        s.slot == segment.slot
            && *from == source
            && s.at + u64::from(s.len) == segment.at
            && s.from + s.len == segment.from
    };
    match to.iter_mut().find(joins) {
        Some((s, _)) => s.len += segment.len,
        None => to.push((segment, source)),
    }
}

/// How many bands one pass takes: by memory, by I/Os, by room in the log.
fn pass_end(bands: &[Band], start: usize) -> usize {
    let (mut bytes, mut reads, mut writes) = (0, 0, 0);
    for (i, band) in bands.iter().enumerate().skip(start) {
        bytes += band.buffers() * band.bytes();
        reads += band.buffers();
        writes += band.modified.count_ones() as usize + 1;
        if i > start && (bytes > PASS_BYTES || reads > PASS_IOS || writes > SEGMENTS_MAX) {
            return i;
        }
    }
    bands.len()
}

/// Where the buffers of a band are in the pass's work memory: its reads by data chunk, parity, and the chunk
/// that is computed.
struct BandBuffers<'a> {
    band: &'a Band,
    work: Option<&'a Lease>,
    base: usize,
}

impl<'a> BandBuffers<'a> {
    /// Offset of the buffer that holds a data chunk's old (or composed) content.
    fn data(&self, d: u16) -> Option<usize> {
        let bytes = self.band.bytes();
        if self.band.reads & 1 << d != 0 {
            let before = (self.band.reads & ((1 << d) - 1)).count_ones() as usize;
            return Some(self.base + before * bytes);
        }
        let rebuilt = self.band.mode == Mode::Rebuild;
        rebuilt.then(|| self.base + (self.band.reads.count_ones() as usize + 1) * bytes)
    }

    fn parity(&self) -> Option<usize> {
        let at = self.base + self.band.reads.count_ones() as usize * self.band.bytes();
        (self.band.mode != Mode::DataOnly).then_some(at)
    }

    fn cells(&self, offset: usize) -> &'a [std::cell::Cell<u8>] {
        match self.work {
            Some(work) => work.cells(offset..offset + self.band.bytes()),
            None => &[],
        }
    }

    /// The item that covers data chunk `d` in these rows.
    fn item<'b>(&self, batch: &'b [Item], d: u16) -> (u16, &'b Lease, u32, Span) {
        for (i, item) in (0u16..).zip(batch) {
            if let Task::Write {
                span, lease, from, ..
            } = &item.task
            {
                let grains = span.grains();
                if span.data == d
                    && grains.start <= self.band.rows.start
                    && self.band.rows.end <= grains.end
                {
                    return (i, lease, *from, *span);
                }
            }
        }
        unreachable!("a band is cut from the writes of its batch")
    }

    /// Where the new content of a modified chunk is, for these whole rows: lease, offset, and whose it is.
    fn source(&self, batch: &'a [Item], d: u16) -> (&'a Lease, usize, u16) {
        if self.band.partial & 1 << d != 0
            && let (Some(work), Some(offset)) = (self.work, self.data(d))
        {
            return (work, offset, WORK);
        }
        let (i, lease, from, span) = self.item(batch, d);
        (
            lease,
            (from + self.band.rows.start * GRAIN - span.start) as usize,
            i,
        )
    }

    /// Fills in what is computed: the missing chunk, composed grains, parity.
    fn compute(&self, batch: &'a [Item], data: u16) {
        let band = self.band;
        let mut sources: ArrayVec<&[std::cell::Cell<u8>], { 2 * MEMBERS_MAX }> = ArrayVec::new();
        let parity = self.parity();
        let read = |d: u16| self.data(d).map(|offset| self.cells(offset));
        if band.mode == Mode::Rebuild
            && let Some(p) = parity
        {
            let lost = self.base + (band.reads.count_ones() as usize + 1) * band.bytes();
            sources.extend(bits(band.reads).filter_map(read));
            sources.push(self.cells(p));
            parity::xor_to(self.cells(lost), &sources);
            sources.clear();
        }
        if band.mode == Mode::ReadModify
            && let Some(p) = parity
        {
            sources.extend(bits(band.modified).filter_map(read));
            parity::xor_into(self.cells(p), &sources);
            sources.clear();
        }
        for d in bits(band.partial) {
            self.compose(batch, d);
        }
        let Some(p) = parity else { return };
        let new = |d: u16| {
            let (lease, offset, _) = self.source(batch, d);
            lease.cells(offset..offset + band.bytes())
        };
        match band.mode {
            Mode::ReadModify => {
                sources.extend(bits(band.modified).map(new));
                parity::xor_into(self.cells(p), &sources);
            }
            Mode::Full | Mode::Reconstruct | Mode::Rebuild => {
                sources.extend((0..data).map(|d| match band.modified & 1 << d {
                    0 => read(d).unwrap_or(&[]),
                    _ => new(d),
                }));
                parity::xor_to(self.cells(p), &sources);
            }
            Mode::DataOnly => {}
        }
    }

    /// Lays the new bytes of a chunk that is not covered whole over its old content.
    fn compose(&self, batch: &'a [Item], d: u16) {
        let Some(old) = self.data(d) else { return };
        let (_, lease, from, span) = self.item(batch, d);
        let start = span.start.max(self.band.rows.start * GRAIN);
        let end = span.end.min(self.band.rows.end * GRAIN);
        let into = self.cells(old);
        let at = (start - self.band.rows.start * GRAIN) as usize;
        let len = (end - start) as usize;
        let new = (from + start - span.start) as usize;
        parity::copy(&into[at..at + len], lease.cells(new..new + len));
    }
}
