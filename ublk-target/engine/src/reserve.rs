//! How a member is divided: what Lunar keeps for itself, and where its data area is.
//!
//! ```text
//! 0        4 KiB left alone (partition table, boot sector)
//! 4 KiB    superblock, copy 0
//! 8 KiB    bad blocks    32 KiB
//!          intent map   256 KiB     2^20 bits are 274 sectors of 480 bytes with a head each, 140 KiB; the rest is spare
//!          missed map   256 KiB
//!          configuration, slot A and B   1 to 8 MiB each (1/1024 of the disk)
//!          log lanes    2 to 64 MiB      (1/256 of the disk)
//!          checksums    4 bytes for each 4 KiB of the disk, in pages of 1016
//!          overlay maps what is left up to the data area: at least 128 KiB or 1/8192 of the disk
//! data_offset (whole MiB)   the data area, whole MiB
//!          the tail: at least the last MiB; 512 KiB before its end, superblock, copy 1
//! ```
//!
//! The reserve (all but the data area) is at least 6 MiB and at most 1/32 of the disk. Both cannot hold below
//! 192 MiB (1/32 of 64 MiB is 2 MiB): there the minimum wins, and a 64 MiB disk keeps 58 MiB for data.
//! Whole MiB are whole chunks of every legal size.

use lunar_api::units::{KIB, MIB};

use crate::limits::{
    CONFIG_MAX, CONFIG_SLOT_MIN, GRAIN, MEMBER_BYTES_MAX, MEMBER_MIN, REGION_MIN, REGIONS_WANTED,
};

/// Where copy 0 of the superblock is, in bytes.
pub const COPY_0_AT: u64 = 4 * KIB;
/// Bytes of a superblock.
pub const SUPERBLOCK_BYTES: u64 = 4 * KIB;

/// Alignment of the data area, in bytes.
const DATA_ALIGN: u64 = MIB;
/// The end of a member that is no data, in bytes. Other things keep their own records in the last KiB
/// of a disk (the second partition table), so copy 1 is in the middle of it.
const TAIL: u64 = MIB;
const TAIL_AFTER_COPY_1: u64 = 512 * KIB;
const BAD_BLOCKS: u64 = 32 * KIB;
const MAP: u64 = 256 * KIB;
/// Checksums of 4 bytes in a 4 KiB page; the rest of it is a head of 32 bytes.
const CHECKSUMS_A_PAGE: u64 = 1016;

/// A range of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Area {
    /// Bytes from the start of the member; 0 if `len` is 0.
    pub offset: u64,
    /// Bytes; 0: there is no such area.
    pub len: u64,
}

impl Area {
    /// Returns the first byte behind it.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// Where everything is on one member. The places may differ from member to member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    pub config: [Area; 2],
    pub intent: Area,
    pub missed: Area,
    pub logs: Area,
    pub bad_blocks: Area,
    pub overlays: Area,
    pub checksums: Area,
    /// Bytes from the start of the member to its data area.
    pub data_offset: u64,
}

impl Layout {
    /// Returns every area but the data area, with its name.
    pub fn areas(&self) -> [(&'static str, Area); 8] {
        [
            ("config A", self.config[0]),
            ("config B", self.config[1]),
            ("intent map", self.intent),
            ("missed map", self.missed),
            ("log lanes", self.logs),
            ("bad blocks", self.bad_blocks),
            ("overlay maps", self.overlays),
            ("checksums", self.checksums),
        ]
    }
}

/// What a disk of some size gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserve {
    pub layout: Layout,
    /// Bytes that the data area may have: whole MiB.
    pub data_bytes: u64,
    /// Where copy 1 of the superblock is.
    pub end_copy: u64,
}

impl Reserve {
    /// Returns what the data area may have on a disk that was of this size when it was divided: up to the tail, and to
    /// whatever else lies behind its start.
    pub fn room(&self, device_bytes: u64) -> u64 {
        let start = self.layout.data_offset;
        let areas = self.layout.areas().map(|(_, area)| area);
        let behind = areas
            .iter()
            .filter(|area| area.len > 0 && area.offset >= start);
        let end = behind.map(|area| area.offset).fold(
            self.end_copy.min(device_bytes.saturating_sub(TAIL)),
            u64::min,
        );
        end.saturating_sub(start) / DATA_ALIGN * DATA_ALIGN
    }
}

/// Why a disk cannot be a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// Below 64 MiB.
    #[error(
        "a disk of {device_bytes} bytes is too small: a member has at least {MEMBER_MIN} bytes"
    )]
    TooSmall { device_bytes: u64 },
    /// Beyond all arithmetic.
    #[error(
        "a disk of {device_bytes} bytes is too large: a member has at most {MEMBER_BYTES_MAX} bytes"
    )]
    TooLarge { device_bytes: u64 },
}

/// Returns where copy 1 of the superblock of a disk of this size is written.
///
/// A disk that grew since has it elsewhere: copy 0 records the place.
pub fn end_copy_at(device_bytes: u64) -> Result<u64, ReserveError> {
    check_size(device_bytes)?;
    Ok(device_bytes / GRAIN * GRAIN - TAIL_AFTER_COPY_1)
}

/// Divides a member.
///
/// # Units   bytes
/// # Errors  a disk below 64 MiB, or above 2^57 bytes
pub fn lay_out(device_bytes: u64) -> Result<Reserve, ReserveError> {
    let end_copy = end_copy_at(device_bytes)?;
    let config = part(device_bytes, 1024, CONFIG_SLOT_MIN, CONFIG_MAX);
    let logs = part(device_bytes, 256, 2 * MIB, 64 * MIB);
    let checksums = device_bytes.div_ceil(GRAIN).div_ceil(CHECKSUMS_A_PAGE) * GRAIN;
    let overlays = (device_bytes / 8192).next_multiple_of(GRAIN).max(128 * KIB);

    let mut at = COPY_0_AT + SUPERBLOCK_BYTES;
    let mut take = |len| {
        let area = Area { offset: at, len };
        at += len;
        area
    };
    let mut layout = Layout {
        bad_blocks: take(BAD_BLOCKS),
        intent: take(MAP),
        missed: take(MAP),
        config: [take(config), take(config)],
        logs: take(logs),
        checksums: take(checksums),
        overlays: take(overlays),
        data_offset: 0,
    };
    layout.data_offset = layout.overlays.end().next_multiple_of(DATA_ALIGN);
    layout.overlays.len = layout.data_offset - layout.overlays.offset;
    let data_bytes = (device_bytes - TAIL - layout.data_offset) / DATA_ALIGN * DATA_ALIGN;
    Ok(Reserve {
        layout,
        data_bytes,
        end_copy,
    })
}

/// Returns the size of an area that is `1/part` of the disk, in whole MiB, within bounds.
fn part(device_bytes: u64, part: u64, min: u64, max: u64) -> u64 {
    (device_bytes / part / MIB * MIB).clamp(min, max)
}

fn check_size(device_bytes: u64) -> Result<(), ReserveError> {
    if device_bytes < MEMBER_MIN {
        return Err(ReserveError::TooSmall { device_bytes });
    }
    if device_bytes > MEMBER_BYTES_MAX {
        return Err(ReserveError::TooLarge { device_bytes });
    }
    Ok(())
}

/// Returns the data area that every one of these disks can have; 0 without disks.
pub fn member_bytes(reserves: &[Reserve]) -> u64 {
    reserves.iter().map(|r| r.data_bytes).min().unwrap_or(0)
}

/// Returns the region of the intent and missed maps of a new group: the smallest power of two from 1 MiB with which a map
/// has at most 2^16.
pub fn region_bytes(member_bytes: u64) -> u64 {
    member_bytes
        .div_ceil(REGIONS_WANTED)
        .next_power_of_two()
        .max(REGION_MIN)
}

#[cfg(test)]
mod tests {
    use lunar_api::units::{GIB, TIB};

    use super::*;
    use crate::limits::{REGIONS_MAX, RESERVE_MIN, RESERVE_PART};
    use crate::region_map::MAP_BYTES;

    fn check(device: u64) {
        let r = lay_out(device).unwrap();
        let mut areas: Vec<Area> = r.layout.areas().map(|(_, area)| area).to_vec();
        areas.push(Area {
            offset: 0,
            len: COPY_0_AT + SUPERBLOCK_BYTES,
        });
        areas.push(Area {
            offset: r.layout.data_offset,
            len: r.data_bytes,
        });
        areas.push(Area {
            offset: r.end_copy,
            len: SUPERBLOCK_BYTES,
        });
        areas.sort_by_key(|area| area.offset);
        for pair in areas.windows(2) {
            assert!(pair[0].end() <= pair[1].offset, "{device}: {pair:?}");
        }
        assert!(
            areas
                .iter()
                .all(|a| a.len > 0 && a.offset % GRAIN == 0 && a.len % GRAIN == 0)
        );
        assert!(areas.last().unwrap().end() <= device, "{device}");
        assert_eq!(r.room(device), r.data_bytes, "{device}");
        assert!(device - r.end_copy <= MIB, "{device}");
        assert!(r.data_bytes.is_multiple_of(MIB) && r.layout.data_offset.is_multiple_of(MIB));
        // The tail takes what is no whole MiB: that is not reserve by choice.
        let reserve = r.layout.data_offset + TAIL;
        assert!(reserve >= RESERVE_MIN, "{device}: {reserve}");
        assert!(
            reserve <= RESERVE_MIN.max(device / RESERVE_PART),
            "{device}: {reserve}"
        );
        let bits = r.data_bytes.div_ceil(region_bytes(r.data_bytes));
        assert!(bits <= REGIONS_MAX);
        assert!(r.layout.intent.len >= MAP_BYTES && r.layout.missed.len >= MAP_BYTES);
        let pages = r.data_bytes.div_ceil(GRAIN).div_ceil(CHECKSUMS_A_PAGE);
        assert!(r.layout.checksums.len >= pages * GRAIN);
    }

    #[test]
    fn areas_are_apart_and_the_reserve_keeps_its_bounds() {
        for mib in 64..2048 {
            check(mib * MIB);
        }
        for shift in 26..=57 {
            for odd in [0, 512, 4095, 77_777_777] {
                check(((1 << shift) + odd).min(MEMBER_BYTES_MAX));
            }
        }
    }

    #[test]
    fn the_smallest_disk_keeps_58_mib_for_data() {
        let r = lay_out(64 * MIB).unwrap();
        assert_eq!((r.layout.data_offset, r.data_bytes), (5 * MIB, 58 * MIB));
        assert_eq!(r.end_copy, 64 * MIB - 512 * KIB);
    }

    #[test]
    fn room_ends_where_anything_else_begins() {
        let mut r = lay_out(64 * MIB).unwrap();
        r.data_bytes = MIB;
        assert_eq!(r.room(64 * MIB), 58 * MIB);
        assert_eq!(r.room(62 * MIB + 5), 56 * MIB);
        r.layout.logs.offset = 40 * MIB + KIB;
        assert_eq!(r.room(64 * MIB), 35 * MIB);
        r.end_copy = 20 * MIB;
        assert_eq!(r.room(64 * MIB), 15 * MIB);
    }

    #[test]
    fn too_small_and_too_large_are_refused() {
        for bytes in [0, 1, 64 * MIB - 1] {
            assert_eq!(
                lay_out(bytes),
                Err(ReserveError::TooSmall {
                    device_bytes: bytes
                })
            );
        }
        for bytes in [MEMBER_BYTES_MAX + 1, u64::MAX] {
            assert_eq!(
                lay_out(bytes),
                Err(ReserveError::TooLarge {
                    device_bytes: bytes
                })
            );
        }
    }

    #[test]
    fn the_smallest_member_decides() {
        let sizes = [GIB, 64 * MIB, TIB].map(|bytes| lay_out(bytes).unwrap());
        assert_eq!(member_bytes(&sizes), 58 * MIB);
        assert_eq!(member_bytes(&[]), 0);
    }

    #[test]
    fn regions_are_powers_of_two_from_1_mib() {
        for (bytes, region) in [
            (0, MIB),
            (MIB, MIB),
            (64 * GIB, MIB),
            (64 * GIB + MIB, 2 * MIB),
            (5 * TIB, 128 * MIB),
        ] {
            assert_eq!(region_bytes(bytes), region, "{bytes}");
        }
    }
}
