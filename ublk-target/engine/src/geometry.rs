//! Where the bytes of a group are on its members.
//!
//! Pure arithmetic on numbers checked once in [`Geometry::new`]; it owns nothing and allocates nothing.
//! Byte for byte the layouts of Linux md: raid0 of equal members, raid1, raid5 `left_symmetric`.
//!
//! ```text
//! raid5 of 4 members: data chunks 0.. and parity P by stripe
//!            slot 0  slot 1  slot 2  slot 3
//! stripe 0      0       1       2       P
//! stripe 1      4       5       P       3
//! stripe 2      8       P       6       7
//! stripe 3      P       9      10      11
//! ```
//!
//! Invariants: `locate` and `address` are inverse to each other; every (stripe, slot) holds either parity or
//! exactly one data index (raid1: every slot holds data 0).

use std::fmt;

use lunar_api::target::Level;

use crate::limits::{CHUNK_MAX, CHUNK_MIN, GRAIN, MEMBER_BYTES_MAX, MEMBERS_MAX, RAID1_STRIPE};

/// Why a group cannot have this shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// Too few or too many members for the level.
    #[error("{level:?} takes {min} to {max} members, not {members}")]
    Members {
        level: Level,
        members: usize,
        min: usize,
        max: usize,
    },
    /// The chunk is not a power of two in range.
    #[error("a chunk of {chunk} bytes is not a power of two from {CHUNK_MIN} to {CHUNK_MAX}")]
    Chunk { chunk: u64 },
    /// The data area of a member is empty, not whole chunks, or beyond all disks.
    #[error("a data area of {member_bytes} bytes is not a whole number of chunks of {chunk} bytes")]
    MemberBytes { member_bytes: u64, chunk: u64 },
}

/// The shape of a group: level, members, chunk, and how much of every member is data.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    level: Level,
    members: u16,
    data_slots: u16,
    chunk_shift: u32,
    member_bytes: u64,
}

/// Where one byte of a group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub stripe: u64,
    /// Data index in the stripe, counted from 0.
    pub data: u16,
    /// Slot that holds it (raid1: the first of all).
    pub slot: u16,
    /// Bytes from the start of the chunk.
    pub in_chunk: u32,
    /// Bytes from the start of the member's data area.
    pub member_at: u64,
}

/// The part of a request that is in one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub stripe: u64,
    /// Data index in the stripe, counted from 0.
    pub data: u16,
    /// Slot that holds it (raid1: the first of all).
    pub slot: u16,
    /// Bytes from the start of the chunk.
    pub in_chunk: u32,
    /// Bytes from the start of the member's data area.
    pub member_at: u64,
    /// Bytes from the start of the request.
    pub offset_in_request: u64,
    /// Bytes.
    pub len: u32,
}

/// Returns the fewest members that a level has.
pub fn members_min(level: Level) -> usize {
    match level {
        Level::Raid0 => 1,
        Level::Raid1 => 2,
        Level::Raid5 => 3,
    }
}

impl Geometry {
    /// Checks a shape.
    ///
    /// # Units   bytes; `chunk` a power of two, ignored by raid1; `member_bytes` the data area of every member
    /// # Errors  wrong count of members, chunk or size
    pub fn new(
        level: Level,
        members: usize,
        chunk: u64,
        member_bytes: u64,
    ) -> Result<Self, GeometryError> {
        let min = members_min(level);
        let out_of_range = GeometryError::Members {
            level,
            members,
            min,
            max: MEMBERS_MAX,
        };
        if members < min || members > MEMBERS_MAX {
            return Err(out_of_range);
        }
        let members = u16::try_from(members).map_err(|_| out_of_range)?;
        let chunk = match level {
            Level::Raid1 => RAID1_STRIPE,
            Level::Raid0 | Level::Raid5 => chunk,
        };
        if !chunk.is_power_of_two() || !(CHUNK_MIN..=CHUNK_MAX).contains(&chunk) {
            return Err(GeometryError::Chunk { chunk });
        }
        const { assert!(CHUNK_MIN.is_multiple_of(GRAIN)) };
        if !member_bytes.is_multiple_of(chunk) || !(1..=MEMBER_BYTES_MAX).contains(&member_bytes) {
            return Err(GeometryError::MemberBytes {
                member_bytes,
                chunk,
            });
        }
        let data_slots = match level {
            Level::Raid0 => members,
            Level::Raid1 => 1,
            Level::Raid5 => members - 1,
        };
        Ok(Self {
            level,
            members,
            data_slots,
            chunk_shift: chunk.trailing_zeros(),
            member_bytes,
        })
    }

    /// Returns the level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Returns the count of slots.
    pub fn members(&self) -> u16 {
        self.members
    }

    /// Returns the bytes of a chunk (raid1: of its stripe).
    pub fn chunk(&self) -> u64 {
        1 << self.chunk_shift
    }

    /// Returns the bytes of data and parity on every member.
    pub fn member_bytes(&self) -> u64 {
        self.member_bytes
    }

    /// Returns the chunks of data in a stripe.
    pub fn data_slots(&self) -> u16 {
        self.data_slots
    }

    /// Returns the bytes of data in a stripe.
    pub fn stripe_bytes(&self) -> u64 {
        u64::from(self.data_slots) << self.chunk_shift
    }

    /// Returns the count of stripes.
    pub fn stripes(&self) -> u64 {
        self.member_bytes >> self.chunk_shift
    }

    /// Returns the bytes of data in the group.
    pub fn capacity(&self) -> u64 {
        self.member_bytes * u64::from(self.data_slots)
    }

    /// Returns how many members may be lost.
    pub fn redundancy(&self) -> u16 {
        match self.level {
            Level::Raid0 => 0,
            Level::Raid1 => self.members - 1,
            Level::Raid5 => 1,
        }
    }

    /// Returns the slot that holds the parity of a stripe.
    ///
    /// # Source  Linux drivers/md/raid5.c `raid5_compute_sector`, ALGORITHM_LEFT_SYMMETRIC
    pub fn parity_slot(&self, stripe: u64) -> Option<u16> {
        match self.level {
            Level::Raid0 | Level::Raid1 => None,
            Level::Raid5 => {
                let turn = stripe % u64::from(self.members);
                Some(self.members - 1 - u16::try_from(turn).expect("below the count of members"))
            }
        }
    }

    /// Returns the slot that holds data chunk `d` of a stripe (raid1: the first of all).
    ///
    /// # Panics  if the stripe has no such data chunk
    pub fn data_slot(&self, stripe: u64, d: u16) -> u16 {
        assert!(d < self.data_slots, "data chunk {d} of {}", self.data_slots);
        match self.parity_slot(stripe) {
            None => d,
            Some(parity) => (parity + 1 + d) % self.members,
        }
    }

    /// Returns which data chunk of a stripe a slot holds; `None` for parity. Inverse of [`Self::data_slot`].
    ///
    /// # Panics  if there is no such slot
    pub fn data_index(&self, stripe: u64, slot: u16) -> Option<u16> {
        assert!(slot < self.members, "slot {slot} of {}", self.members);
        match (self.level, self.parity_slot(stripe)) {
            (Level::Raid1, _) => Some(0),
            (Level::Raid0 | Level::Raid5, None) => Some(slot),
            (Level::Raid0 | Level::Raid5, Some(parity)) if slot == parity => None,
            (Level::Raid0 | Level::Raid5, Some(parity)) => {
                Some((slot + self.members - parity - 1) % self.members)
            }
        }
    }

    /// Maps an address of the group to the member that holds it.
    ///
    /// # Shape   `at < capacity`; returns `slot < members`, `member_at < member_bytes`
    /// # Units   bytes
    /// # Example 4 members, raid5, chunk 4096: byte 12288 -> stripe 1, data 0, slot 3, member byte 4096
    /// # Panics  if `at >= capacity`
    /// # Source  Linux drivers/md/raid5.c `raid5_compute_sector`; table in fixtures/golden/left_symmetric_4.csv
    pub fn locate(&self, at: u64) -> Place {
        assert!(
            at < self.capacity(),
            "byte {at} of a group of {}",
            self.capacity()
        );
        let chunk = at >> self.chunk_shift;
        let slots = u64::from(self.data_slots);
        let stripe = chunk / slots;
        let data = u16::try_from(chunk % slots).expect("below the count of members");
        let in_chunk = at & (self.chunk() - 1);
        Place {
            stripe,
            data,
            slot: self.data_slot(stripe, data),
            in_chunk: u32::try_from(in_chunk).expect("a chunk is at most 1 MiB"),
            member_at: (stripe << self.chunk_shift) + in_chunk,
        }
    }

    /// Maps a place back to its address in the group. Inverse of [`Self::locate`].
    pub fn address(&self, stripe: u64, data: u16, in_chunk: u32) -> u64 {
        let chunk = stripe * u64::from(self.data_slots) + u64::from(data);
        (chunk << self.chunk_shift) + u64::from(in_chunk)
    }

    /// Maps a byte of a member's data area to its address in the group; `None` where it is parity.
    ///
    /// # Panics  if there is no such slot or byte
    pub fn address_of_member(&self, slot: u16, member_at: u64) -> Option<u64> {
        assert!(
            member_at < self.member_bytes,
            "byte {member_at} of {}",
            self.member_bytes
        );
        let stripe = member_at >> self.chunk_shift;
        let data = self.data_index(stripe, slot)?;
        Some(self.address(stripe, data, 0) + (member_at & (self.chunk() - 1)))
    }

    /// Cuts a range of the group into the parts that lie in one chunk each, in order.
    ///
    /// # Panics  if the range leaves the group
    pub fn pieces(&self, at: u64, len: u64) -> Pieces {
        let end = at.checked_add(len).filter(|end| *end <= self.capacity());
        let end = end.unwrap_or_else(|| panic!("bytes {at}+{len} of {}", self.capacity()));
        Pieces {
            geometry: *self,
            start: at,
            at,
            end,
        }
    }
}

impl fmt::Debug for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Geometry")
            .field("level", &self.level)
            .field("members", &self.members)
            .field("chunk", &self.chunk())
            .field("member_bytes", &self.member_bytes)
            .finish()
    }
}

/// The iterator of [`Geometry::pieces`]; allocates nothing.
#[derive(Debug, Clone)]
pub struct Pieces {
    geometry: Geometry,
    start: u64,
    at: u64,
    end: u64,
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.at == self.end {
            return None;
        }
        let place = self.geometry.locate(self.at);
        let left_in_chunk = self.geometry.chunk() - u64::from(place.in_chunk);
        let len = left_in_chunk.min(self.end - self.at);
        let piece = Piece {
            stripe: place.stripe,
            data: place.data,
            slot: place.slot,
            in_chunk: place.in_chunk,
            member_at: place.member_at,
            offset_in_request: self.at - self.start,
            len: u32::try_from(len).expect("a chunk is at most 1 MiB"),
        };
        self.at += len;
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use lunar_api::units::{KIB, MIB};
    use proptest::prelude::*;

    use super::*;

    const GOLDEN: &str = include_str!("../../../fixtures/golden/left_symmetric_4.csv");

    fn geometry(level: Level, members: usize, chunk: u64, stripes: u64) -> Geometry {
        let bytes = if level == Level::Raid1 {
            RAID1_STRIPE
        } else {
            chunk
        };
        Geometry::new(level, members, chunk, stripes * bytes).unwrap()
    }

    #[test]
    fn left_symmetric_equals_golden_table() {
        let g = geometry(Level::Raid5, 4, 4 * KIB, 8);
        for line in GOLDEN.lines().skip(1) {
            let mut cells = line.split(',');
            let stripe: u64 = cells.next().unwrap().parse().unwrap();
            for slot in 0..4 {
                let cell = cells.next().unwrap();
                let at = g.address_of_member(slot, stripe * g.chunk());
                let found = at.map_or("P".to_owned(), |at| (at / g.chunk()).to_string());
                assert_eq!(found, cell, "stripe {stripe}, slot {slot}");
            }
        }
    }

    #[test]
    fn raid0_goes_round_the_members() {
        let g = geometry(Level::Raid0, 3, 64 * KIB, 4);
        let place = g.locate(64 * KIB * 7 + 5);
        let expected = Place {
            stripe: 2,
            data: 1,
            slot: 1,
            in_chunk: 5,
            member_at: 128 * KIB + 5,
        };
        assert_eq!(place, expected);
        assert_eq!(
            (g.capacity(), g.redundancy(), g.parity_slot(1)),
            (768 * KIB, 0, None)
        );
    }

    #[test]
    fn raid1_ignores_chunk_and_every_slot_holds_the_data() {
        let g = Geometry::new(Level::Raid1, 3, 0, MIB).unwrap();
        assert_eq!(
            (g.stripe_bytes(), g.stripes(), g.capacity()),
            (64 * KIB, 16, MIB)
        );
        assert_eq!(g.redundancy(), 2);
        for slot in 0..3 {
            assert_eq!(g.data_index(9, slot), Some(0));
            assert_eq!(g.address_of_member(slot, 70_000), Some(70_000));
        }
    }

    #[test]
    fn new_refuses_illegal_shapes() {
        let members = |level, members| Geometry::new(level, members, 4096, 1 << 30);
        for (level, ok, bad) in [
            (Level::Raid0, [1, 64], [0, 65]),
            (Level::Raid1, [2, 64], [1, 65]),
            (Level::Raid5, [3, 64], [2, 65]),
        ] {
            assert!(ok.iter().all(|n| members(level, *n).is_ok()), "{level:?}");
            assert!(
                bad.iter()
                    .all(|n| matches!(members(level, *n), Err(GeometryError::Members { .. }))),
                "{level:?}"
            );
        }
        for chunk in [0, 1, 2048, 4097, 12288, 2 * MIB, u64::MAX] {
            let refused = Geometry::new(Level::Raid0, 2, chunk, 1 << 30);
            assert_eq!(refused, Err(GeometryError::Chunk { chunk }));
        }
        for bytes in [0, 1, 64 * KIB + 4096, u64::MAX - 65535] {
            let refused = Geometry::new(Level::Raid5, 3, 64 * KIB, bytes);
            assert!(
                matches!(refused, Err(GeometryError::MemberBytes { .. })),
                "{bytes}"
            );
        }
    }

    /// Every (stripe, slot) of every small shape holds parity or exactly one data chunk, all addresses are
    /// used once, and all four mappings agree.
    #[test]
    fn mappings_agree_exhaustively() {
        for level in [Level::Raid0, Level::Raid1, Level::Raid5] {
            for members in members_min(level)..=9 {
                let g = geometry(level, members, 4 * KIB, 20);
                let chunks = g.stripes() * u64::from(g.data_slots());
                let mut seen = vec![0_u16; usize::try_from(chunks).unwrap()];
                for stripe in 0..g.stripes() {
                    for slot in 0..g.members() {
                        let at = g.address_of_member(slot, stripe * g.chunk());
                        assert_eq!(at.is_none(), g.parity_slot(stripe) == Some(slot));
                        let Some(at) = at else { continue };
                        seen[usize::try_from(at / g.chunk()).unwrap()] += 1;
                        let place = g.locate(at);
                        assert_eq!(g.data_index(stripe, slot), Some(place.data));
                        assert_eq!(place.stripe, stripe);
                        assert_eq!(place.slot, if level == Level::Raid1 { 0 } else { slot });
                    }
                }
                let copies = if level == Level::Raid1 {
                    g.members()
                } else {
                    1
                };
                assert!(seen.iter().all(|n| *n == copies), "{g:?}");
            }
        }
    }

    #[test]
    fn pieces_of_nothing_are_none() {
        let g = geometry(Level::Raid5, 3, 4 * KIB, 4);
        assert_eq!(g.pieces(0, 0).next(), None);
        assert_eq!(g.pieces(g.capacity(), 0).next(), None);
    }

    fn shapes() -> impl Strategy<Value = Geometry> {
        let level = prop_oneof![Just(Level::Raid0), Just(Level::Raid1), Just(Level::Raid5)];
        (level, 3_usize..=64, 12_u32..=20, 1_u64..1 << 30)
            .prop_map(|(level, members, shift, n)| geometry(level, members, 1 << shift, n))
    }

    proptest! {
        #[test]
        fn locate_inverts(g in shapes(), at in any::<u64>()) {
            let at = at % g.capacity();
            let p = g.locate(at);
            prop_assert!(p.member_at < g.member_bytes() && p.slot < g.members());
            prop_assert_eq!(g.address(p.stripe, p.data, p.in_chunk), at);
            prop_assert_eq!(g.address_of_member(p.slot, p.member_at), Some(at));
            prop_assert_ne!(g.parity_slot(p.stripe), Some(p.slot));
        }

        #[test]
        fn pieces_cover_the_range_once(g in shapes(), at in any::<u64>(), len in 0_u64..3 << 20) {
            let at = at % g.capacity();
            let len = len.min(g.capacity() - at);
            let mut done = 0;
            for piece in g.pieces(at, len) {
                prop_assert_eq!(piece.offset_in_request, done);
                let first = g.locate(at + done);
                let last = g.locate(at + done + u64::from(piece.len) - 1);
                prop_assert_eq!((first.stripe, first.data), (piece.stripe, piece.data));
                prop_assert_eq!((last.stripe, last.data), (piece.stripe, piece.data));
                prop_assert_eq!((first.slot, first.member_at), (piece.slot, piece.member_at));
                prop_assert_eq!(first.in_chunk, piece.in_chunk);
                done += u64::from(piece.len);
            }
            prop_assert_eq!(done, len);
        }
    }
}
