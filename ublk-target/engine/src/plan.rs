//! How a stripe write is done: which rows, what is read, what is computed. Pure; no buffers, no awaits.
//!
//! A *band* is a run of rows (in 4 KiB grains of the chunk) whose set of modified data chunks is the same.
//! Each band is planned for itself; the bands of one stripe operation run together.

use std::ops::Range;

use arrayvec::ArrayVec;

/// Most writes that one stripe operation takes.
pub const WRITES_MAX: usize = 32;
/// Most bands of them: each write adds at most two borders.
pub const BANDS_MAX: usize = 2 * WRITES_MAX;

/// One write within a stripe, in bytes of its data chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Data chunk of the stripe, from 0.
    pub data: u16,
    pub start: u32,
    pub end: u32,
}

/// Bytes of a grain; a smaller write reads what surrounds it.
pub const GRAIN: u32 = 4096;
const _: () = assert!(GRAIN as u64 == crate::limits::GRAIN);

impl Span {
    /// Grains that it touches.
    pub fn grains(&self) -> Range<u32> {
        self.start / GRAIN..self.end.div_ceil(GRAIN)
    }

    /// Says whether one of the grains `rows` that it touches is not covered whole.
    pub fn is_partial_in(&self, rows: &Range<u32>) -> bool {
        let grains = self.grains();
        (!self.start.is_multiple_of(GRAIN) && rows.contains(&grains.start))
            || (!self.end.is_multiple_of(GRAIN) && rows.contains(&(grains.end - 1)))
    }
}

/// How the parity of a band is found (md's words).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything is new: nothing is read.
    Full,
    /// Parity from the new data and the rest, read.
    Reconstruct,
    /// Parity from its old self, the old data and the new.
    ReadModify,
    /// The old content of a chunk that is missing is needed too: all that is left is read, and it computed.
    Rebuild,
    /// Parity cannot be written: data only.
    DataOnly,
}

/// What a stripe offers. Its parts are its data chunks from 0, then its parities.
#[derive(Debug, Clone, Copy)]
pub struct StripeState {
    /// Data chunks of the stripe.
    pub data: u16,
    /// Parts that can be read, as bits.
    pub readable: u64,
    /// Parts that are written where they change, as bits.
    pub writable: u64,
    /// Parity is right where nobody is writing.
    pub synced: bool,
}

/// The plan of a band.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Band {
    pub rows: Range<u32>,
    /// Data chunks that are written, as bits.
    pub modified: u64,
    /// Of those, the ones of which a grain is not covered whole.
    pub partial: u64,
    pub mode: Mode,
    /// Parts whose old content is read.
    pub reads: u64,
    /// Data chunks that are computed from those.
    pub computed: u64,
    /// Parities that are written, as bits of their parts.
    pub parity: u64,
}

impl Band {
    /// Bytes of one chunk's part.
    pub fn bytes(&self) -> usize {
        ((self.rows.end - self.rows.start) * GRAIN) as usize
    }

    /// Parts that have a buffer of `bytes()` beside the writes themselves, as bits.
    pub fn held(&self) -> u64 {
        self.reads | self.computed | self.parity
    }

    /// Buffers of `bytes()` that it needs beside the writes themselves.
    pub fn buffers(&self) -> usize {
        self.held().count_ones() as usize
    }
}

/// Why a stripe cannot be written: more is missing than the redundancy gives back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("redundancy is exhausted")]
pub struct Exhausted;

/// Cuts writes that do not share a grain into bands, in order of rows, none longer than `rows_max` grains.
pub fn cut(spans: &[Span], rows_max: u32, mut each: impl FnMut(Range<u32>, u64, u64)) {
    let mut borders: ArrayVec<u32, BANDS_MAX> = ArrayVec::new();
    for span in spans {
        borders.push(span.grains().start);
        borders.push(span.grains().end);
    }
    borders.sort_unstable();
    for pair in borders.windows(2) {
        let mut start = pair[0];
        while start < pair[1] {
            let rows = start..pair[1].min(start + rows_max);
            start = rows.end;
            let (mut modified, mut partial) = (0, 0);
            for span in spans {
                let grains = span.grains();
                if grains.start <= rows.start && rows.end <= grains.end {
                    modified |= 1 << span.data;
                    if span.is_partial_in(&rows) {
                        partial |= 1 << span.data;
                    }
                }
            }
            if modified != 0 {
                each(rows, modified, partial);
            }
        }
    }
}

/// Chooses how a band is written: by the fewest reads, on a tie by reconstruction.
///
/// # Errors  `Exhausted` where more chunks of the band are missing than there is parity for
pub fn plan_band(
    stripe: &StripeState,
    rows: Range<u32>,
    modified: u64,
    partial: u64,
) -> Result<Band, Exhausted> {
    let all = u64::MAX >> (64 - u32::from(stripe.data));
    let rest = all & !modified;
    let lost = all & !stripe.readable;
    // Parities that are written, and those that can be read.
    let parity = stripe.writable & !all;
    let known = stripe.readable & !all;
    let band = |mode, reads, computed| {
        Ok(Band {
            rows: rows.clone(),
            modified,
            partial,
            mode,
            reads,
            computed,
            parity,
        })
    };
    let is_known = parity & !known == 0;
    if lost.count_ones() > parity.count_ones() {
        // What is missing would be nowhere.
        return Err(Exhausted);
    }
    if parity == 0 {
        return band(Mode::DataOnly, partial, 0);
    }
    let reconstruct = rest | partial;
    let mode = match reconstruct {
        0 => Mode::Full,
        _ => Mode::Reconstruct,
    };
    if lost == 0 {
        let is_cheaper = modified.count_ones() + parity.count_ones() < reconstruct.count_ones();
        if stripe.synced && is_known && is_cheaper {
            return band(Mode::ReadModify, modified | parity, 0);
        }
        return band(mode, reconstruct, 0);
    }
    if lost & reconstruct == 0 {
        return band(mode, reconstruct, 0);
    }
    if known.count_ones() < lost.count_ones() {
        return Err(Exhausted);
    }
    let is_one_answer = stripe.synced || parity.count_ones() == lost.count_ones();
    if lost & modified == 0 && is_known && is_one_answer {
        // What a missing chunk holds is what parity says: keep that, whatever it is. (Two parities that were never
        // synced say two things of one chunk: then what is written now would be lost with the next.)
        return band(Mode::ReadModify, modified | parity, 0);
    }
    let mut enough = known;
    while enough.count_ones() > lost.count_ones() {
        enough &= !(1 << enough.ilog2());
    }
    band(Mode::Rebuild, all & !lost | enough, lost)
}

/// The band of rows some of whose data is not to be had: parity by difference, which needs none of that.
///
/// # Errors  `Exhausted` where a chunk that is written, or a parity, is missing
pub fn by_difference(
    stripe: &StripeState,
    rows: Range<u32>,
    modified: u64,
    partial: u64,
) -> Result<Band, Exhausted> {
    let all = u64::MAX >> (64 - u32::from(stripe.data));
    let parity = stripe.writable & !all;
    let reads = modified | parity;
    if parity == 0 || reads & !stripe.readable != 0 {
        return Err(Exhausted);
    }
    Ok(Band {
        rows,
        modified,
        partial,
        mode: Mode::ReadModify,
        reads,
        computed: 0,
        parity,
    })
}

/// The band of rows whose parity is given up: what they have to give is on their own members only.
///
/// # Errors  `Exhausted` where a chunk that is written is missing
pub fn data_only(
    stripe: &StripeState,
    rows: Range<u32>,
    modified: u64,
    partial: u64,
) -> Result<Band, Exhausted> {
    if modified & !(stripe.readable & stripe.writable) != 0 {
        return Err(Exhausted);
    }
    Ok(Band {
        rows,
        modified,
        partial,
        mode: Mode::DataOnly,
        reads: partial,
        computed: 0,
        parity: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stripe of four data chunks; `gone` are parts that are neither read nor written.
    fn stripe(parities: u32, gone: u64) -> StripeState {
        let parts = ((1 << (4 + parities)) - 1) & !gone;
        StripeState {
            data: 4,
            readable: parts,
            writable: parts,
            synced: true,
        }
    }

    const P: u64 = 1 << 4;
    const Q: u64 = 1 << 5;

    /// Mode, reads, what is computed, parities written.
    type Found = Result<(Mode, u64, u64, u64), Exhausted>;

    fn plan(stripe: StripeState, modified: u64, partial: u64) -> Found {
        plan_band(&stripe, 0..1, modified, partial).map(|b| (b.mode, b.reads, b.computed, b.parity))
    }

    #[test]
    fn plan_band_takes_the_fewest_reads() {
        for (modified, partial, mode, reads) in [
            (0b0001, 0, Mode::ReadModify, 0b0001 | P),
            (0b0011, 0, Mode::Reconstruct, 0b1100),
            (0b0111, 0, Mode::Reconstruct, 0b1000),
            (0b1111, 0, Mode::Full, 0),
            (0b1111, 0b0001, Mode::Reconstruct, 0b0001),
            (0b0001, 0b0001, Mode::ReadModify, 0b0001 | P),
        ] {
            let found = plan(stripe(1, 0), modified, partial);
            assert_eq!(found, Ok((mode, reads, 0, P)), "{modified:b} {partial:b}");
        }
        // With Q, reading what is changed and both parities is no less than reading the three others.
        for (modified, partial, mode, reads) in [
            (0b0001, 0, Mode::Reconstruct, 0b1110),
            (0b0001, 0b0001, Mode::ReadModify, 0b0001 | P | Q),
            (0b0011, 0, Mode::Reconstruct, 0b1100),
            (0b1111, 0, Mode::Full, 0),
        ] {
            let found = plan(stripe(2, 0), modified, partial);
            assert_eq!(
                found,
                Ok((mode, reads, 0, P | Q)),
                "{modified:b} {partial:b}"
            );
        }
    }

    #[test]
    fn plan_band_does_not_trust_parity_that_was_not_synced_or_is_being_filled() {
        let fresh = StripeState {
            synced: false,
            ..stripe(1, 0)
        };
        let expected = Ok((Mode::Reconstruct, 0b1110, 0, P));
        assert_eq!(plan(fresh, 0b0001, 0), expected);
        let filling = StripeState {
            readable: 0b1111,
            ..stripe(1, 0)
        };
        assert_eq!(plan(filling, 0b0001, 0), expected);
        // P and Q may say different things of what is missing: it is computed from P, and Q made to fit.
        let fresh = StripeState {
            synced: false,
            ..stripe(2, 1)
        };
        let expected = Ok((Mode::Rebuild, 0b1110 | P, 0b0001, P | Q));
        assert_eq!(plan(fresh, 0b0010, 0), expected);
        // P is being filled, and a chunk is missing: it is computed from Q.
        let both = StripeState {
            readable: 0b1110 | Q,
            writable: 0b1110 | P | Q,
            ..stripe(2, 0)
        };
        let expected = Ok((Mode::Rebuild, 0b1110 | Q, 0b0001, P | Q));
        assert_eq!(plan(both, 0b0010, 0), expected);
    }

    #[test]
    fn plan_band_degraded() {
        for (parities, gone, modified, partial, expected) in [
            (1, 1, 0b0010, 0, Ok((Mode::ReadModify, 0b0010 | P, 0, P))),
            (1, 1, 0b0001, 0, Ok((Mode::Reconstruct, 0b1110, 0, P))),
            (1, 1, 0b0001, 1, Ok((Mode::Rebuild, 0b1110 | P, 1, P))),
            (1, 1, 0b1111, 0, Ok((Mode::Full, 0, 0, P))),
            (1, P, 0b0011, 1, Ok((Mode::DataOnly, 0b0001, 0, 0))),
            (1, P | 1, 0b0010, 0, Err(Exhausted)),
            (1, 0b11, 0b0100, 0, Err(Exhausted)),
            (
                2,
                1,
                0b0010,
                0,
                Ok((Mode::ReadModify, 0b0010 | P | Q, 0, P | Q)),
            ),
            (2, 1, 0b0001, 1, Ok((Mode::Rebuild, 0b1110 | P, 1, P | Q))),
            (
                2,
                P | 1,
                0b0010,
                0,
                Ok((Mode::ReadModify, 0b0010 | Q, 0, Q)),
            ),
            (2, P | 1, 0b0001, 1, Ok((Mode::Rebuild, 0b1110 | Q, 1, Q))),
            (2, P | Q, 0b0001, 1, Ok((Mode::DataOnly, 0b0001, 0, 0))),
            (2, Q, 0b0001, 0, Ok((Mode::ReadModify, 0b0001 | P, 0, P))),
            (
                2,
                0b11,
                0b0100,
                0,
                Ok((Mode::ReadModify, 0b0100 | P | Q, 0, P | Q)),
            ),
            (
                2,
                0b11,
                0b0011,
                0,
                Ok((Mode::Reconstruct, 0b1100, 0, P | Q)),
            ),
            (
                2,
                0b11,
                0b0001,
                0,
                Ok((Mode::Rebuild, 0b1100 | P | Q, 0b11, P | Q)),
            ),
            (2, 0b11 | Q, 0b1111, 0, Err(Exhausted)),
            (2, 0b111, 0b1000, 0, Err(Exhausted)),
        ] {
            let found = plan(stripe(parities, gone), modified, partial);
            assert_eq!(
                found, expected,
                "{parities} {gone:b} {modified:b} {partial:b}"
            );
        }
    }

    #[test]
    fn cut_gives_bands_of_one_set_each() {
        let spans = [
            Span {
                data: 0,
                start: 0,
                end: 2 * GRAIN,
            },
            Span {
                data: 1,
                start: GRAIN,
                end: 3 * GRAIN + 512,
            },
            Span {
                data: 2,
                start: 8 * GRAIN,
                end: 9 * GRAIN,
            },
        ];
        let mut bands = Vec::new();
        cut(&spans, 256, |rows, modified, partial| {
            bands.push((rows, modified, partial))
        });
        assert_eq!(
            bands,
            [
                (0..1, 0b001, 0),
                (1..2, 0b011, 0),
                (2..4, 0b010, 0b010),
                (8..9, 0b100, 0)
            ]
        );
        let mut rows = 0;
        cut(&spans, 1, |band, _, _| rows += band.end - band.start);
        assert_eq!(rows, 5);
    }
}
