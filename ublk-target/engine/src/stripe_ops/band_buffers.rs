//! Where the bytes of a band are while it is written, and the arithmetic on them.

use std::cell::Cell;
use std::ops::Range;

use arrayvec::ArrayVec;

use crate::gf::{self, Term, power};
use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::plan::{Band, GRAIN, Mode, Span};
use crate::pool::Lease;
use crate::recipe::recipe;
use crate::serve::bits;
use crate::stripe_table::{Item, Task};

/// Source of a segment that lies in work memory.
pub(super) const WORK: u16 = u16::MAX;

/// Buffers of data chunks with their factors in Q, or of a recipe.
type Terms<'a> = ArrayVec<Term<'a>, MEMBERS_MAX>;

/// The buffers of a band in the pass's work memory: one for each part that it holds, in their order.
pub(super) struct BandBuffers<'a> {
    pub band: &'a Band,
    pub work: Option<&'a Lease>,
    pub base: usize,
}

impl<'a> BandBuffers<'a> {
    /// Offset of the buffer of a part that the band holds.
    pub(super) fn offset(&self, part: u16) -> usize {
        let before = self.band.held() & ((1 << part) - 1);
        self.base + before.count_ones() as usize * self.band.bytes()
    }

    /// The buffer of a part that the band holds.
    fn buffer(&self, part: u16) -> &'a [Cell<u8>] {
        let offset = self.offset(part);
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
            && let Some(work) = self.work
        {
            return (work, self.offset(d), WORK);
        }
        let (i, lease, from, span) = self.item(batch, d);
        (
            lease,
            (from + self.band.rows.start * GRAIN - span.start) as usize,
            i,
        )
    }

    /// Fills in what is computed: missing chunks, composed grains, parity. `data`, `parities`: of the stripe.
    pub(super) fn compute(&self, batch: &'a [Item], data: u16, parities: u16) {
        let band = self.band;
        for lost in bits(band.computed) {
            let recipe = recipe(data, parities, lost, band.reads);
            let recipe = recipe.expect("planned: as much is read as is missing");
            let terms: Terms<'_> = recipe
                .iter()
                .map(|(part, by)| (*by, self.buffer(*part)))
                .collect();
            gf::combine_to(self.buffer(lost), &terms);
        }
        let adds = band.mode == Mode::ReadModify;
        if adds {
            let old = bits(band.modified).map(|d| (power(d.into()), self.buffer(d)));
            self.sum(data, &old.collect::<Terms<'_>>(), true);
        }
        for d in bits(band.partial) {
            self.compose(batch, d);
        }
        let new = |d: u16| {
            let (lease, offset, _) = self.source(batch, d);
            lease.cells(offset..offset + band.bytes())
        };
        let term = |d: u16| match band.modified & 1 << d {
            0 => (power(d.into()), self.buffer(d)),
            _ => (power(d.into()), new(d)),
        };
        let terms: Terms<'_> = match adds {
            true => bits(band.modified).map(term).collect(),
            false if band.parity == 0 => return,
            false => (0..data).map(term).collect(),
        };
        self.sum(data, &terms, adds);
    }

    /// Sums data chunks up in the parities that are written, or adds them to those.
    fn sum(&self, data: u16, terms: &[Term<'a>], adds: bool) {
        let has = |parity: u16| {
            let part = data + parity;
            (self.band.parity & 1 << part != 0).then(|| self.buffer(part))
        };
        let sources =
            || -> ArrayVec<&[Cell<u8>], MEMBERS_MAX> { terms.iter().map(|(_, of)| *of).collect() };
        match (has(0), has(1), adds) {
            (Some(p), Some(q), false) => gf::syndromes_to(p, q, terms),
            (Some(p), Some(q), true) => gf::syndromes_into(p, q, terms),
            (Some(p), None, false) => parity::xor_to(p, &sources()),
            (Some(p), None, true) => parity::xor_into(p, &sources()),
            (None, Some(q), false) => gf::combine_to(q, terms),
            (None, Some(q), true) => gf::combine_into(q, terms),
            (None, None, _) => {}
        }
    }

    /// Sums up what is not modified of these grains, from what `compute` has left: parity less the new data.
    ///
    /// # Shape   one parity, part `data`; `to`: of the grains' bytes
    pub(super) fn unmodified_to(
        &self,
        batch: &'a [Item],
        data: u16,
        (grains, modified): (&Range<u32>, u64),
        to: &[Cell<u8>],
    ) {
        let from = ((grains.start - self.band.rows.start) * GRAIN) as usize;
        let bytes = from..from + ((grains.end - grains.start) * GRAIN) as usize;
        let new = bits(modified).map(|d| {
            let (lease, offset, _) = self.source(batch, d);
            lease.cells(offset + bytes.start..offset + bytes.end)
        });
        let parity = &self.buffer(data)[bytes.clone()];
        let sources: ArrayVec<&[Cell<u8>], MEMBERS_MAX> = new.chain([parity]).collect();
        parity::xor_to(to, &sources);
    }

    /// The rows of the band, in bytes of a chunk, by which data chunks are modified there.
    pub(super) fn runs(&self, batch: &[Item], mut each: impl FnMut(Range<u32>, u64)) {
        let rows = self.band.rows.start * GRAIN..self.band.rows.end * GRAIN;
        if self.band.partial == 0 {
            return each(rows, self.band.modified);
        }
        let span = |d: u16| {
            let (.., span) = self.item(batch, d);
            span.start.max(rows.start)..span.end.min(rows.end)
        };
        let mut borders: ArrayVec<u32, { 2 * MEMBERS_MAX }> = ArrayVec::new();
        borders.extend(bits(self.band.modified).flat_map(|d| [span(d).start, span(d).end]));
        borders.sort_unstable();
        for pair in borders.windows(2).filter(|pair| pair[0] < pair[1]) {
            let covers = |d: &u16| span(*d).start <= pair[0] && pair[1] <= span(*d).end;
            let modified = bits(self.band.modified).filter(covers);
            let modified = modified.fold(0, |set, d| set | 1 << d);
            if modified != 0 {
                each(pair[0]..pair[1], modified);
            }
        }
    }

    /// Lays the new bytes of a chunk that is not covered whole over its old content.
    fn compose(&self, batch: &'a [Item], d: u16) {
        let (_, lease, from, span) = self.item(batch, d);
        let start = span.start.max(self.band.rows.start * GRAIN);
        let end = span.end.min(self.band.rows.end * GRAIN);
        let into = self.buffer(d);
        let at = (start - self.band.rows.start * GRAIN) as usize;
        let len = (end - start) as usize;
        let new = (from + start - span.start) as usize;
        parity::copy(&into[at..at + len], lease.cells(new..new + len));
    }
}
