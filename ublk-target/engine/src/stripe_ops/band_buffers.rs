//! Where the bytes of a band are while it is written, and the arithmetic on them.

use std::cell::Cell;

use arrayvec::ArrayVec;

use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::plan::{Band, GRAIN, Mode, Span};
use crate::pool::Lease;
use crate::serve::bits;
use crate::stripe_table::{Item, Task};

/// Source of a segment that lies in work memory.
pub(super) const WORK: u16 = u16::MAX;

/// Where the buffers of a band are in the pass's work memory: its reads by data chunk, parity, and the chunk
/// that is computed.
pub(super) struct BandBuffers<'a> {
    pub band: &'a Band,
    pub work: Option<&'a Lease>,
    pub base: usize,
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

    /// Offset of the buffer of parity.
    pub(super) fn parity(&self) -> Option<usize> {
        let at = self.base + self.band.reads.count_ones() as usize * self.band.bytes();
        (self.band.mode != Mode::DataOnly).then_some(at)
    }

    fn cells(&self, offset: usize) -> &'a [Cell<u8>] {
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
    pub(super) fn source(&self, batch: &'a [Item], d: u16) -> (&'a Lease, usize, u16) {
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
    pub(super) fn compute(&self, batch: &'a [Item], data: u16) {
        let band = self.band;
        let mut sources: ArrayVec<&[Cell<u8>], { 2 * MEMBERS_MAX }> = ArrayVec::new();
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
