//! The write log on the members: partial parity (raid5, policy `ppl`) and the journal (raid6, policy `journal`).
//!
//! A stripe's data and parity cannot be written in one step. What a power loss tears is written right again from a log
//! that lies on the stripe's parity members. The rules:
//!
//! 1. Every change of parity in a running group is logged first: read-modify, reconstruct and full-stripe writes,
//!    zeroing, repair by a scrub.
//! 2. An *entry* is of rows with one set of modified data chunks, to the sector: what a write completes to a grain is not
//!    modified by it. raid5: the XOR of the data that is *not* modified there. raid6: what is written, data and both
//!    parities, each as a copy. Where all data of the rows is written there is no payload.
//! 3. A *unit* is a header and the payloads of all writes that wait for the same member; it goes there with FUA, to two
//!    slots in turn. Data and parity are issued when it is durable; the next unit of that member when all writes of the
//!    one before are complete, and, if a member has a volatile cache, flushed. So what may be torn is in the newest unit
//!    that is whole, and everything that is older is right already.
//! 4. The log of a member is emptied before it comes into a slot. What the log of a member says that is not used counts
//!    once more: when it comes back, for what it has missed.
//! 5. Replay precedes every read. Units go in order of their numbers, which count for the whole group: entries of one stripe
//!    are replayed as they were written, also from the logs of two members. raid5: parity = payload ^ the data that was being
//!    modified; where that is not all there, what is there stays. raid6: the copies are written again. A log of which neither
//!    slot can be read says nothing: all is resynced; a group that is degraded as well is refused.
//! 6. What a power loss *and* the loss of a member cost: of writes that were not durable (not answered, or with a volatile
//!    cache not flushed since) and modified two or more data chunks of the same rows (raid6: all of them), those sectors may
//!    hold anything. Any other is old or new, and one that nobody wrote is what it was.
//! 7. The area is laid out in lanes; one is used.
//!
//! This file is the format (`FORMAT.md` has the bytes); `lanes` writes it, `replay` reads it.

use std::ops::Range;

use lunar_api::GroupUuid;

use crate::plan::GRAIN;
use crate::superblock::crc32c;

/// Bytes of a unit's header.
pub const HEADER: usize = 4096;
/// Bytes of a slot: a unit with its header.
pub const SLOT_BYTES: u64 = 1 << 20;
/// Slots of a lane, written in turn.
pub const SLOTS: u64 = 2;
/// Bytes of a lane.
pub const LANE_BYTES: u64 = SLOTS * SLOT_BYTES;
/// Most bytes of a unit's payloads.
pub const PAYLOAD_MAX: u32 = (1 << 20) - 4096;
/// Most entries of a unit.
pub const ENTRIES_MAX: usize = (HEADER - HEAD) / ENTRY;
/// Rows are counted in sectors of so many bytes.
pub const SECTOR: u32 = 512;
const HEAD: usize = 64;
const ENTRY: usize = 32;
const MAGIC: [u8; 4] = *b"LPPL";

/// What an entry makes right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Parity of these rows of a stripe (in sectors of its chunks: the first, and how many), of which these data chunks, as
    /// bits, are modified. The payload is the XOR of the others, in the whole grains that the rows are in.
    Partial {
        stripe: u64,
        rows: (u16, u16),
        modified: u64,
    },
    /// Parity of these rows of stripes that follow one another: all their data is modified. No payload.
    Whole {
        stripe: u64,
        stripes: u32,
        rows: (u16, u16),
    },
    /// The payload is what these bytes of a slot's data are.
    Copy { slot: u16, at: u64, len: u32 },
}

impl What {
    /// Bytes of its payload.
    pub fn payload(&self) -> u32 {
        match self {
            Self::Partial { rows, .. } => {
                let grains = grains_of(*rows);
                (grains.end - grains.start) * GRAIN
            }
            Self::Whole { .. } => 0,
            Self::Copy { len, .. } => *len,
        }
    }
}

/// The grains that rows in sectors are in.
pub fn grains_of((first, rows): (u16, u16)) -> Range<u32> {
    let first = u32::from(first);
    let sectors = GRAIN / SECTOR;
    first / sectors..(first + u32::from(rows)).div_ceil(sectors)
}

/// Rows, in sectors, that bytes of a chunk are.
pub(crate) fn sectors_of(bytes: Range<u32>) -> (u16, u16) {
    let sectors = |n: u32| u16::try_from(n / SECTOR).expect("a chunk has at most 2048");
    (sectors(bytes.start), sectors(bytes.end - bytes.start))
}

/// An entry of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub what: What,
    /// crc32c of its payload; 0 without one.
    pub crc: u32,
}

impl Entry {
    /// Writes it to its place in a header.
    pub(crate) fn encode(&self, nth: usize, mut put: impl FnMut(usize, &[u8])) {
        let at = HEAD + nth * ENTRY;
        let (kind, place, count, rows, bits) = match self.what {
            What::Partial {
                stripe,
                rows,
                modified,
            } => (1u16, stripe, 1, rows, modified),
            What::Whole {
                stripe,
                stripes,
                rows,
            } => (2, stripe, stripes, rows, 0),
            What::Copy { slot, at, len } => (3, at, len, (0, 0), u64::from(slot)),
        };
        put(at, &place.to_le_bytes());
        put(at + 8, &bits.to_le_bytes());
        put(at + 16, &count.to_le_bytes());
        put(at + 20, &self.crc.to_le_bytes());
        put(at + 24, &rows.0.to_le_bytes());
        put(at + 26, &rows.1.to_le_bytes());
        put(at + 28, &kind.to_le_bytes());
        put(at + 30, &[0; 2]);
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let (place, bits, count, crc) = (u64_at(0), u64_at(8), u32_at(16), u32_at(20));
        let rows = (u16_at(24), u16_at(26));
        let what = match u16_at(28) {
            1 if count == 1 => What::Partial {
                stripe: place,
                rows,
                modified: bits,
            },
            2 if bits == 0 && crc == 0 => What::Whole {
                stripe: place,
                stripes: count,
                rows,
            },
            3 if rows == (0, 0) => What::Copy {
                slot: u16::try_from(bits).ok()?,
                at: place,
                len: count,
            },
            _ => return None,
        };
        (u16_at(30) == 0).then_some(Self { what, crc })
    }
}

/// A unit, as its header says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unit {
    /// Counts the units of a group. 0: of a log that was emptied.
    pub number: u64,
    pub entries: Vec<Entry>,
}

impl Unit {
    /// Bytes of all its payloads, which follow the header one after the other.
    pub fn payload(&self) -> u64 {
        let payloads = self.entries.iter().map(|entry| entry.what.payload());
        payloads.map(u64::from).sum()
    }

    /// Writes a header.
    pub fn encode(&self, group: GroupUuid, to: &mut [u8; HEADER]) {
        to.fill(0);
        for (nth, entry) in self.entries.iter().enumerate() {
            entry.encode(nth, |at, bytes| {
                to[at..at + bytes.len()].copy_from_slice(bytes);
            });
        }
        seal(group, self.number, self.entries.len(), to);
    }

    /// Reads a header; none if it is not one of this group, whole, and as it is written.
    pub fn decode(bytes: &[u8; HEADER], group: GroupUuid) -> Option<Self> {
        let number = u64::from_le_bytes(bytes[24..32].try_into().expect("8 bytes"));
        let count = usize::from(u16::from_le_bytes([bytes[34], bytes[35]]));
        if count > ENTRIES_MAX {
            return None;
        }
        let entries = bytes[HEAD..HEAD + count * ENTRY].chunks_exact(ENTRY);
        let entries: Option<Vec<Entry>> = entries.map(Entry::decode).collect();
        let unit = Self {
            number,
            entries: entries?,
        };
        // One content has one encoding: whatever does not encode back to these bytes is refused.
        let mut again = [0; HEADER];
        unit.encode(group, &mut again);
        (again == *bytes && unit.payload() <= u64::from(PAYLOAD_MAX)).then_some(unit)
    }
}

/// Writes the head of a header whose entries are there.
pub(crate) fn seal(group: GroupUuid, number: u64, entries: usize, header: &mut [u8; HEADER]) {
    header[..HEAD].fill(0);
    header[HEAD + entries * ENTRY..].fill(0);
    header[..4].copy_from_slice(&MAGIC);
    header[8..24].copy_from_slice(&group.to_bytes());
    header[24..32].copy_from_slice(&number.to_le_bytes());
    let entries = u16::try_from(entries).expect("at most ENTRIES_MAX");
    header[34..36].copy_from_slice(&entries.to_le_bytes());
    let crc = crc32c(header);
    header[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Where a slot is in the lanes of a member that begin at `at`.
pub fn slot_at(at: u64, slot: u64) -> u64 {
    at + slot * SLOT_BYTES
}

/// The stripes that an entry is of, on members whose chunk is so long.
pub fn stripes_of(what: &What, chunk: u64) -> Range<u64> {
    match what {
        What::Partial { stripe, .. } => *stripe..stripe.saturating_add(1),
        What::Whole {
            stripe, stripes, ..
        } => *stripe..stripe.saturating_add(u64::from(*stripes)),
        What::Copy { at, len, .. } => {
            at / chunk..at.saturating_add(u64::from(*len)).div_ceil(chunk)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn group() -> GroupUuid {
        GroupUuid::from_bytes([7; 16])
    }

    fn entries() -> impl Strategy<Value = Entry> {
        let rows = (0u16..2048, 1u16..=9);
        let what = prop_oneof![
            (any::<u64>(), rows.clone(), any::<u64>()).prop_map(|(stripe, rows, modified)| {
                What::Partial {
                    stripe,
                    rows,
                    modified,
                }
            }),
            (any::<u64>(), any::<u32>(), rows).prop_map(|(stripe, stripes, rows)| What::Whole {
                stripe,
                stripes,
                rows
            }),
            (0u16..64, any::<u64>(), 1u32..=2).prop_map(|(slot, at, grains)| What::Copy {
                slot,
                at,
                len: grains * GRAIN
            }),
        ];
        (what, any::<u32>()).prop_map(|(what, crc)| Entry {
            what,
            crc: if what.payload() == 0 { 0 } else { crc },
        })
    }

    fn units() -> impl Strategy<Value = Unit> {
        let entries = proptest::collection::vec(entries(), 0..ENTRIES_MAX / 2);
        (any::<u64>(), entries).prop_map(|(number, entries)| Unit { number, entries })
    }

    proptest! {
        #[test]
        fn a_header_says_what_was_written(unit in units()) {
            let mut bytes = [0; HEADER];
            unit.encode(group(), &mut bytes);
            prop_assert_eq!(Unit::decode(&bytes, group()), Some(unit));
        }

        #[test]
        fn a_header_with_a_changed_bit_is_none(unit in units(), bit in 0..HEADER * 8) {
            let mut bytes = [0; HEADER];
            unit.encode(group(), &mut bytes);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(Unit::decode(&bytes, group()), None);
        }

        #[test]
        fn any_bytes_are_a_header_or_none(
            mut bytes in proptest::collection::vec(any::<u8>(), HEADER),
            count in 0u16..200,
        ) {
            // As a hostile disk would have it: whole, and with any content.
            let mut header: [u8; HEADER] = std::mem::take(&mut bytes).try_into().expect("as long");
            header[..4].copy_from_slice(&MAGIC);
            header[8..24].copy_from_slice(&group().to_bytes());
            header[34..36].copy_from_slice(&count.to_le_bytes());
            header[4..8].fill(0);
            let crc = crc32c(&header);
            header[4..8].copy_from_slice(&crc.to_le_bytes());
            if let Some(unit) = Unit::decode(&header, group()) {
                prop_assert!(unit.payload() <= u64::from(PAYLOAD_MAX));
            }
        }
    }

    #[test]
    fn a_header_of_another_group_is_none() {
        let mut bytes = [0; HEADER];
        Unit::default().encode(group(), &mut bytes);
        assert_eq!(Unit::decode(&bytes, group()), Some(Unit::default()));
        let other = GroupUuid::from_bytes([8; 16]);
        assert_eq!(Unit::decode(&bytes, other), None);
    }

    #[test]
    fn stripes_of_an_entry() {
        let chunk = 64 << 10;
        let copy = |at, len| What::Copy { slot: 1, at, len };
        assert_eq!(stripes_of(&copy(chunk - 4096, 8192), chunk), 0..2);
        assert_eq!(stripes_of(&copy(chunk, 4096), chunk), 1..2);
        let whole = What::Whole {
            stripe: 7,
            stripes: 3,
            rows: (0, 16),
        };
        assert_eq!(stripes_of(&whole, chunk), 7..10);
    }
}
