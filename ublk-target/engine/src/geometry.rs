//! Where the bytes of a group are on its members.
//!
//! Pure arithmetic on numbers checked once in [`Geometry::new`]; on the data path it allocates nothing.
//! Byte for byte the layouts of Linux md: linear, raid0 of equal members, raid1, raid5 and raid6 `left_symmetric`,
//! raid10 `near=2`.
//!
//! ```text
//! raid5 of 4 members: data chunks 0.. and parity P by stripe
//!            slot 0  slot 1  slot 2  slot 3
//! stripe 0      0       1       2       P
//! stripe 1      4       5       P       3
//! stripe 2      8       P       6       7
//! stripe 3      P       9      10      11
//!
//! raid6 of 5 members                 raid10 of 3 members: a stripe is two rows
//! stripe 0      Q   0   1   2   P    stripe 0      0   0   1
//! stripe 1      3   4   5   P   Q                  1   2   2
//! ```
//!
//! A stripe's chunks have *parts*: its data chunks from 0, then P, then Q. A level has parity, or copies, or neither.
//!
//! Invariants: `locate` and `address` are inverse to each other; every chunk of every member holds either parity or
//! exactly one data chunk; every data chunk is in `copies` places.

use std::fmt;

use lunar_api::target::Level;

use crate::limits::{
    CHUNK_MAX, CHUNK_MIN, GRAIN, LINEAR_MEMBER_MAX, LINEAR_STRIPE, MEMBER_BYTES_MAX, MEMBERS_MAX,
    RAID1_STRIPE,
};

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
    /// The data area of a member is empty, not whole stripes, or beyond all disks.
    #[error("a data area of {member_bytes} bytes is not whole stripes of {unit} bytes a member")]
    MemberBytes { member_bytes: u64, unit: u64 },
}

/// The shape of a group: level, members, chunk, and how much of every member is data.
#[derive(Clone, PartialEq, Eq)]
pub struct Geometry {
    level: Level,
    members: u16,
    data_slots: u16,
    /// Chunks of every member in a stripe.
    rows: u16,
    chunk_shift: u32,
    member_bytes: u64,
    /// linear: where in the group the part of each member ends. Else empty.
    ends: Box<[u64]>,
}

/// Where one byte of a group is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub stripe: u64,
    /// Data index in the stripe, counted from 0.
    pub data: u16,
    /// Slot that holds it (mirrors: the first that does).
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
    /// Slot that holds it (mirrors: the first that does).
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

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spot {
    pub slot: u16,
    /// Bytes from the start of the member's data area to the chunk.
    pub member_at: u64,
}

/// Copies of a chunk in a raid10: md's `near=2`.
const NEAR: u16 = 2;

/// Returns the slots of a group of so many members, as bits.
fn all_slots(members: u16) -> u64 {
    u64::MAX >> (64 - u32::from(members))
}

impl Geometry {
    /// Checks a shape whose members have equal data areas.
    ///
    /// # Units   bytes; `chunk` a power of two, ignored by raid1 and linear; `member_bytes` the data area of every
    /// member, whole stripes ([`Self::member_unit`])
    /// # Errors  wrong count of members, chunk or size
    pub fn new(
        level: Level,
        members: usize,
        chunk: u64,
        member_bytes: u64,
    ) -> Result<Self, GeometryError> {
        let out_of_range = GeometryError::Members {
            level,
            members,
            min: level.members_min(),
            max: MEMBERS_MAX,
        };
        if !(level.members_min()..=MEMBERS_MAX).contains(&members) {
            return Err(out_of_range);
        }
        if level == Level::Linear {
            return Self::linear(&vec![member_bytes; members]);
        }
        let n = u16::try_from(members).map_err(|_| out_of_range)?;
        let chunk = match level {
            Level::Raid1 => RAID1_STRIPE,
            _ => chunk,
        };
        if !chunk.is_power_of_two() || !(CHUNK_MIN..=CHUNK_MAX).contains(&chunk) {
            return Err(GeometryError::Chunk { chunk });
        }
        const { assert!(CHUNK_MIN.is_multiple_of(GRAIN)) };
        let unit = Self::member_unit(level, members, chunk);
        if !member_bytes.is_multiple_of(unit) || !(1..=MEMBER_BYTES_MAX).contains(&member_bytes) {
            return Err(GeometryError::MemberBytes { member_bytes, unit });
        }
        let (rows, data_slots) = match level {
            Level::Linear | Level::Raid0 => (1, n),
            Level::Raid1 => (1, 1),
            Level::Raid5 => (1, n - 1),
            Level::Raid6 => (1, n - 2),
            // The copies of an odd count of members come round after two rows.
            Level::Raid10 if n.is_multiple_of(NEAR) => (1, n / NEAR),
            Level::Raid10 => (NEAR, n),
        };
        Ok(Self {
            level,
            members: n,
            data_slots,
            rows,
            chunk_shift: chunk.trailing_zeros(),
            member_bytes,
            ends: Box::default(),
        })
    }

    /// Checks a linear group, whose members may have data areas of different sizes: one after the other.
    ///
    /// # Errors  wrong count of members; a size that is not whole MiB, or 4 PiB and more (a superblock counts them in
    /// 32 bits of MiB)
    pub fn linear(sizes: &[u64]) -> Result<Self, GeometryError> {
        let out_of_range = GeometryError::Members {
            level: Level::Linear,
            members: sizes.len(),
            min: Level::Linear.members_min(),
            max: MEMBERS_MAX,
        };
        if !(Level::Linear.members_min()..=MEMBERS_MAX).contains(&sizes.len()) {
            return Err(out_of_range);
        }
        let is_ok = |size: &u64| {
            size.is_multiple_of(LINEAR_STRIPE) && (1..=LINEAR_MEMBER_MAX).contains(size)
        };
        if let Some(bad) = sizes.iter().find(|size| !is_ok(size)) {
            return Err(GeometryError::MemberBytes {
                member_bytes: *bad,
                unit: LINEAR_STRIPE,
            });
        }
        let ends = sizes.iter().scan(0, |end, size| {
            *end += size;
            Some(*end)
        });
        Ok(Self {
            level: Level::Linear,
            members: u16::try_from(sizes.len()).map_err(|_| out_of_range)?,
            data_slots: 1,
            rows: 1,
            chunk_shift: LINEAR_STRIPE.trailing_zeros(),
            member_bytes: sizes.iter().copied().max().unwrap_or(0),
            ends: ends.collect(),
        })
    }

    /// Returns what the data area of every member is a multiple of: its part of one stripe.
    pub fn member_unit(level: Level, members: usize, chunk: u64) -> u64 {
        match level {
            Level::Linear => LINEAR_STRIPE,
            Level::Raid1 => RAID1_STRIPE,
            Level::Raid10 if !members.is_multiple_of(usize::from(NEAR)) => {
                chunk.saturating_mul(NEAR.into())
            }
            Level::Raid0 | Level::Raid5 | Level::Raid6 | Level::Raid10 => chunk,
        }
    }

    /// Returns the level.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Returns the count of slots.
    pub fn members(&self) -> u16 {
        self.members
    }

    /// Returns the slots, as bits.
    pub fn slots(&self) -> u64 {
        all_slots(self.members)
    }

    /// Returns the bytes of a chunk (raid1 and linear: of their stripe).
    pub fn chunk(&self) -> u64 {
        1 << self.chunk_shift
    }

    /// Returns the bytes of data and redundancy on every member (linear: on the largest).
    pub fn member_bytes(&self) -> u64 {
        self.member_bytes
    }

    /// Returns the bytes of data and redundancy on one member.
    ///
    /// # Panics  if there is no such slot
    pub fn data_bytes(&self, slot: u16) -> u64 {
        assert!(slot < self.members, "slot {slot} of {}", self.members);
        if self.ends.is_empty() {
            return self.member_bytes;
        }
        self.ends[usize::from(slot)] - self.start_of(slot)
    }

    /// Returns the chunks of data in a stripe.
    pub fn data_slots(&self) -> u16 {
        self.data_slots
    }

    /// Returns the chunks of parity in a stripe.
    pub fn parities(&self) -> u16 {
        match self.level {
            Level::Linear | Level::Raid0 | Level::Raid1 | Level::Raid10 => 0,
            Level::Raid5 => 1,
            Level::Raid6 => 2,
        }
    }

    /// Returns how many times every chunk of data is there.
    pub fn copies_of_each(&self) -> u16 {
        match self.level {
            Level::Linear | Level::Raid0 | Level::Raid5 | Level::Raid6 => 1,
            Level::Raid1 => self.members,
            Level::Raid10 => NEAR,
        }
    }

    /// Says whether the redundancy is copies.
    pub fn is_mirrored(&self) -> bool {
        self.copies_of_each() > 1
    }

    /// Returns the bytes of data in a stripe.
    pub fn stripe_bytes(&self) -> u64 {
        u64::from(self.data_slots) << self.chunk_shift
    }

    /// Returns the bytes of every member in a stripe: what a cursor counts for one.
    pub fn stripe_on_member(&self) -> u64 {
        u64::from(self.rows) << self.chunk_shift
    }

    /// Returns the count of stripes.
    pub fn stripes(&self) -> u64 {
        match self.ends.last() {
            Some(end) => end >> self.chunk_shift,
            None => self.member_bytes / self.stripe_on_member(),
        }
    }

    /// Returns the stripes that have a part on a slot: all, but for linear.
    ///
    /// # Panics  if there is no such slot
    pub fn stripes_of(&self, slot: u16) -> std::ops::Range<u64> {
        assert!(slot < self.members, "slot {slot} of {}", self.members);
        match self.ends.get(usize::from(slot)) {
            Some(end) => self.start_of(slot) >> self.chunk_shift..end >> self.chunk_shift,
            None => 0..self.stripes(),
        }
    }

    /// Returns the bytes of data in the group.
    pub fn capacity(&self) -> u64 {
        self.stripes() * self.stripe_bytes()
    }

    /// Returns how many members may be lost, whichever they are.
    pub fn redundancy(&self) -> u16 {
        self.margin(0)
    }

    /// Says whether all data is still there without these slots (as bits).
    pub fn survives(&self, missing: u64) -> bool {
        let missing = missing & self.slots();
        match self.level {
            Level::Linear | Level::Raid0 => missing == 0,
            Level::Raid1 => missing != self.slots(),
            Level::Raid5 | Level::Raid6 => missing.count_ones() <= u32::from(self.parities()),
            Level::Raid10 => (0..self.data_slots).all(|d| self.copies_left(d, missing) > 0),
        }
    }

    /// Returns how many more members may be lost without these slots (as bits), whichever they are.
    pub fn margin(&self, missing: u64) -> u16 {
        let lost = u16::try_from((missing & self.slots()).count_ones()).expect("at most 64");
        match self.level {
            Level::Linear | Level::Raid0 => 0,
            Level::Raid1 => (self.members - 1).saturating_sub(lost),
            Level::Raid5 | Level::Raid6 => self.parities().saturating_sub(lost),
            Level::Raid10 => (0..self.data_slots)
                .map(|d| self.copies_left(d, missing).saturating_sub(1))
                .min()
                .unwrap_or(0),
        }
    }

    /// Copies of data chunk `d` that are not in these slots; in all stripes the same.
    fn copies_left(&self, d: u16, missing: u64) -> u16 {
        let left = self
            .copies(0, d)
            .filter(|spot| missing & 1 << spot.slot == 0);
        u16::try_from(left.count()).expect("at most 64")
    }

    /// Returns the slot that holds a part of a stripe of a level with parity or with neither parity nor copies: a data
    /// chunk, P behind them, Q behind P.
    ///
    /// # Panics  if the stripe has no such part
    /// # Source  Linux drivers/md/raid5.c `raid5_compute_sector`, ALGORITHM_LEFT_SYMMETRIC: of raid5 and raid6 P's
    /// slot is the same, Q follows it, and data follows that
    pub fn slot_of(&self, stripe: u64, part: u16) -> u16 {
        let parities = self.parities();
        assert!(
            part < self.data_slots + parities,
            "part {part} of {}",
            self.data_slots + parities
        );
        if parities == 0 {
            return self.copy(stripe, part, 0).slot;
        }
        let p = self.first_parity(stripe);
        match part.checked_sub(self.data_slots) {
            Some(parity) => (p + parity) % self.members,
            None => (p + parities + part) % self.members,
        }
    }

    /// Returns the part of a stripe that a slot holds, of a level with parity. Inverse of [`Self::slot_of`].
    ///
    /// # Panics  if there is no such slot
    pub fn part_of(&self, stripe: u64, slot: u16) -> u16 {
        assert!(slot < self.members, "slot {slot} of {}", self.members);
        let after_p = (slot + self.members - self.first_parity(stripe)) % self.members;
        match after_p.checked_sub(self.parities()) {
            Some(data) => data,
            None => self.data_slots + after_p,
        }
    }

    /// Returns the slots that hold the parity of a stripe: P, then Q.
    pub fn parity_slots(&self, stripe: u64) -> impl Iterator<Item = u16> {
        (self.data_slots..self.data_slots + self.parities())
            .map(move |part| self.slot_of(stripe, part))
    }

    fn first_parity(&self, stripe: u64) -> u16 {
        let turn = stripe % u64::from(self.members);
        self.members - 1 - u16::try_from(turn).expect("below the count of members")
    }

    /// Returns the parts that these slots (as bits) hold in a stripe, of a level with parity, as bits.
    pub fn parts_of(&self, stripe: u64, slots: u64) -> u64 {
        (0..self.members)
            .filter(|slot| slots & 1 << slot != 0)
            .fold(0, |parts, slot| parts | 1 << self.part_of(stripe, slot))
    }

    /// Returns where copy `c` of data chunk `d` of a stripe is.
    ///
    /// # Panics  if the stripe has no such data chunk, or that no such copy
    /// # Source  Linux drivers/md/raid10.c `__raid10_find_phys`: with `near` copies, copy `c` of chunk `k` is at
    /// position `near * k + c`, counted along the rows
    pub fn copy(&self, stripe: u64, d: u16, c: u16) -> Spot {
        assert!(d < self.data_slots, "data chunk {d} of {}", self.data_slots);
        assert!(
            c < self.copies_of_each(),
            "copy {c} of {}",
            self.copies_of_each()
        );
        let row = stripe * u64::from(self.rows);
        let (slot, row) = match self.level {
            Level::Linear => {
                let at = stripe << self.chunk_shift;
                let slot = self.ends.partition_point(|end| *end <= at);
                let slot = u16::try_from(slot).expect("at most 64 members");
                let member_at = at - self.start_of(slot);
                return Spot { slot, member_at };
            }
            Level::Raid0 => (d, row),
            Level::Raid1 => (c, row),
            Level::Raid5 | Level::Raid6 => (self.slot_of(stripe, d), row),
            Level::Raid10 => {
                let position = NEAR * d + c;
                let below = u64::from(position / self.members);
                (position % self.members, row + below)
            }
        };
        Spot {
            slot,
            member_at: row << self.chunk_shift,
        }
    }

    /// Returns where every copy of a data chunk is.
    pub fn copies(&self, stripe: u64, d: u16) -> impl Iterator<Item = Spot> {
        (0..self.copies_of_each()).map(move |c| self.copy(stripe, d, c))
    }

    /// linear: where in the group the part of a member begins.
    fn start_of(&self, slot: u16) -> u64 {
        match slot.checked_sub(1) {
            Some(before) => self.ends[usize::from(before)],
            None => 0,
        }
    }

    /// Maps an address of the group to the member that holds it.
    ///
    /// # Shape   `at < capacity`; returns `slot < members`, `member_at < member_bytes`
    /// # Units   bytes
    /// # Example 4 members, raid5, chunk 4096: byte 12288 -> stripe 1, data 0, slot 3, member byte 4096
    /// # Panics  if `at >= capacity`
    /// # Source  as [`Self::slot_of`] and [`Self::copy`]; tables in fixtures/golden
    pub fn locate(&self, at: u64) -> Place {
        assert!(
            at < self.capacity(),
            "byte {at} of a group of {}",
            self.capacity()
        );
        let chunk = at >> self.chunk_shift;
        let stripe = chunk / u64::from(self.data_slots);
        let data = u16::try_from(chunk % u64::from(self.data_slots)).expect("below data_slots");
        let in_chunk = u32::try_from(at & (self.chunk() - 1)).expect("a chunk is at most 1 MiB");
        let spot = self.copy(stripe, data, 0);
        Place {
            stripe,
            data,
            slot: spot.slot,
            in_chunk,
            member_at: spot.member_at + u64::from(in_chunk),
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
        let bytes = self.data_bytes(slot);
        assert!(member_at < bytes, "byte {member_at} of {bytes}");
        let row = member_at >> self.chunk_shift;
        let (stripe, below) = (row / u64::from(self.rows), row % u64::from(self.rows));
        let data = match self.level {
            Level::Linear => return Some(self.start_of(slot) + member_at),
            Level::Raid0 => slot,
            Level::Raid1 => 0,
            Level::Raid5 | Level::Raid6 => {
                Some(self.part_of(stripe, slot)).filter(|part| *part < self.data_slots)?
            }
            Level::Raid10 => {
                let below = u16::try_from(below).expect("below the rows of a stripe");
                (below * self.members + slot) / NEAR
            }
        };
        Some(self.address(stripe, data, 0) + (member_at & (self.chunk() - 1)))
    }

    /// Cuts a range of the group into the parts that lie in one chunk each, in order.
    ///
    /// # Panics  if the range leaves the group
    pub fn pieces(&self, at: u64, len: u64) -> Pieces<'_> {
        let end = at.checked_add(len).filter(|end| *end <= self.capacity());
        let end = end.unwrap_or_else(|| panic!("bytes {at}+{len} of {}", self.capacity()));
        Pieces {
            geometry: self,
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
            .field("ends", &self.ends)
            .finish()
    }
}

/// The iterator of [`Geometry::pieces`]; allocates nothing.
#[derive(Debug, Clone)]
pub struct Pieces<'a> {
    geometry: &'a Geometry,
    start: u64,
    at: u64,
    end: u64,
}

impl Iterator for Pieces<'_> {
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
mod tests;
