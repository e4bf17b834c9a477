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

/// What a stripe offers.
#[derive(Debug, Clone, Copy)]
pub struct StripeState {
    /// Data chunks of the stripe.
    pub data: u16,
    /// Data chunks that cannot be read, as bits.
    pub missing: u64,
    pub parity_readable: bool,
    pub parity_writable: bool,
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
    /// Data chunks whose old content is read.
    pub reads: u64,
    pub read_parity: bool,
}

impl Band {
    /// Bytes of one chunk's part.
    pub fn bytes(&self) -> usize {
        ((self.rows.end - self.rows.start) * GRAIN) as usize
    }

    /// Buffers of `bytes()` that it needs beside the writes themselves.
    pub fn buffers(&self) -> usize {
        let parity = usize::from(self.mode != Mode::DataOnly);
        let rebuilt = usize::from(self.mode == Mode::Rebuild);
        self.reads.count_ones() as usize + parity + rebuilt
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
/// # Errors  `Exhausted` where two chunks of the band would have to be computed from one parity
pub fn plan_band(
    stripe: &StripeState,
    rows: Range<u32>,
    modified: u64,
    partial: u64,
) -> Result<Band, Exhausted> {
    let all = u64::MAX >> (64 - u32::from(stripe.data));
    let rest = all & !modified;
    let band = |mode, reads, read_parity| {
        Ok(Band {
            rows: rows.clone(),
            modified,
            partial,
            mode,
            reads,
            read_parity,
        })
    };
    let lost = stripe.missing & all;
    if !stripe.parity_writable {
        // Parity's slot is the one that is missing; no data chunk may be, too.
        return if lost != 0 {
            Err(Exhausted)
        } else {
            band(Mode::DataOnly, partial, false)
        };
    }
    if lost == 0 {
        let reconstruct = rest | partial;
        let modify = stripe.synced && stripe.parity_readable;
        if modify && modified.count_ones() + 1 < reconstruct.count_ones() {
            return band(Mode::ReadModify, modified, true);
        }
        let mode = if reconstruct == 0 {
            Mode::Full
        } else {
            Mode::Reconstruct
        };
        return band(mode, reconstruct, false);
    }
    if lost.count_ones() > 1 {
        return Err(Exhausted);
    }
    if lost & modified == 0 {
        // What the missing chunk holds is what parity says: keep that, whatever it is.
        return if stripe.parity_readable {
            band(Mode::ReadModify, modified, true)
        } else {
            Err(Exhausted)
        };
    }
    if lost & partial == 0 {
        let reads = rest | partial;
        let mode = if reads == 0 {
            Mode::Full
        } else {
            Mode::Reconstruct
        };
        return band(mode, reads, false);
    }
    if stripe.parity_readable {
        band(Mode::Rebuild, all & !lost, true)
    } else {
        Err(Exhausted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: StripeState = StripeState {
        data: 4,
        missing: 0,
        parity_readable: true,
        parity_writable: true,
        synced: true,
    };

    fn mode(
        stripe: StripeState,
        modified: u64,
        partial: u64,
    ) -> Result<(Mode, u64, bool), Exhausted> {
        plan_band(&stripe, 0..1, modified, partial).map(|b| (b.mode, b.reads, b.read_parity))
    }

    #[test]
    fn plan_band_takes_the_fewest_reads() {
        for (modified, partial, expect) in [
            (0b0001, 0, (Mode::ReadModify, 0b0001, true)),
            (0b0011, 0, (Mode::Reconstruct, 0b1100, false)),
            (0b0111, 0, (Mode::Reconstruct, 0b1000, false)),
            (0b1111, 0, (Mode::Full, 0, false)),
            (0b1111, 0b0001, (Mode::Reconstruct, 0b0001, false)),
            (0b0001, 0b0001, (Mode::ReadModify, 0b0001, true)),
        ] {
            assert_eq!(
                mode(WHOLE, modified, partial),
                Ok(expect),
                "{modified:b} {partial:b}"
            );
        }
    }

    #[test]
    fn plan_band_does_not_trust_parity_that_was_not_synced() {
        let fresh = StripeState {
            synced: false,
            ..WHOLE
        };
        assert_eq!(
            mode(fresh, 0b0001, 0),
            Ok((Mode::Reconstruct, 0b1110, false))
        );
    }

    #[test]
    fn plan_band_degraded() {
        let lost = StripeState {
            missing: 0b0001,
            ..WHOLE
        };
        assert_eq!(mode(lost, 0b0010, 0), Ok((Mode::ReadModify, 0b0010, true)));
        assert_eq!(
            mode(lost, 0b0001, 0),
            Ok((Mode::Reconstruct, 0b1110, false))
        );
        assert_eq!(
            mode(lost, 0b0001, 0b0001),
            Ok((Mode::Rebuild, 0b1110, true))
        );
        assert_eq!(mode(lost, 0b1111, 0), Ok((Mode::Full, 0, false)));
        let no_parity = StripeState {
            parity_readable: false,
            parity_writable: false,
            ..WHOLE
        };
        assert_eq!(
            mode(no_parity, 0b0011, 0b0001),
            Ok((Mode::DataOnly, 0b0001, false))
        );
        let both = StripeState {
            missing: 0b0001,
            ..no_parity
        };
        assert_eq!(mode(both, 0b0010, 0), Err(Exhausted));
        assert_eq!(
            mode(
                StripeState {
                    missing: 0b11,
                    ..WHOLE
                },
                0b0100,
                0
            ),
            Err(Exhausted)
        );
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
