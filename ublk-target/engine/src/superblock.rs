//! The 4 KiB that say what a disk is: the live type, and what makes it legal.
//!
//! Two copies on every disk (4 KiB from its start, and near its end). `raw` has the bytes; `FORMAT.md` in
//! `ublk-target/` documents them. There is one encoding of a superblock: what does not encode back to the very bytes
//! that were read is refused, so nothing on disk goes unchecked.
//!
//! Writing, per member: copy 0, sync, copy 1, sync: one valid copy exists at every instant, and [`choose`]
//! takes the newer one.

use lunar_api::target::{Consistency, Level, MemberState};
use lunar_api::{DiskUuid, GroupUuid, History, SystemUuid};

use crate::bad_blocks::LIST_BYTES;
use crate::geometry::{Geometry, GeometryError};
use crate::limits::{
    CONFIG_MAX, GRAIN, MEMBER_BYTES_MAX, MEMBER_MIN, MEMBERS_MAX, PARENTS_MAX, REGION_MIN,
    REGIONS_MAX,
};
use crate::ppl::LANE_BYTES;
use crate::region_map::MAP_BYTES;
use crate::reserve::{Area, COPY_0_AT, Layout, SUPERBLOCK_BYTES};

mod raw;
use raw::consistency_to_byte;
#[cfg(test)]
mod tests;

/// First bytes of a superblock.
pub const MAGIC: [u8; 8] = *b"LUNARSB1";
/// Version of the format that this code reads and writes.
pub const FORMAT: u32 = 1;
/// Bytes of a superblock.
pub const BYTES: usize = 4096;
const _: () = assert!(BYTES as u64 == SUPERBLOCK_BYTES);

/// Which of the two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    /// 4 KiB from the start of the disk.
    Start,
    /// At the recorded place near its end.
    End,
}

impl Copy {
    /// Both, in the order of writing.
    pub const BOTH: [Self; 2] = [Self::Start, Self::End];

    fn index(self) -> u8 {
        match self {
            Self::Start => 0,
            Self::End => 1,
        }
    }
}

/// Where bytes were read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At {
    /// Bytes from the start of the disk.
    pub offset: u64,
    /// Bytes that the disk has now.
    pub device_size: u64,
}

/// What a disk is, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    pub system: SystemUuid,
    pub disk: DiskUuid,
    /// Bytes that the disk had when this was written; now it has no fewer.
    pub device_size: u64,
    /// Where copy 1 is.
    pub end_copy: u64,
    /// Counts every change; equal on all in-sync members when no change is under way. A free disk has one too:
    /// a new group starts above those of its disks.
    pub generation: u64,
    /// `None`: a labelled, free disk.
    pub member: Option<Member>,
}

/// A disk's part in a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub slot: u16,
    pub layout: Layout,
    /// The same on every member of one generation.
    pub group: GroupRecord,
}

/// A group, as every member records it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRecord {
    pub uuid: GroupUuid,
    pub history: History,
    /// Former histories, newest first; at most 8.
    pub parents: Vec<History>,
    pub flags: Flags,
    pub level: Level,
    /// Bytes; what `Geometry::chunk` says (raid1: its stripe).
    pub chunk: u64,
    pub consistency: Consistency,
    /// Bytes: 512 or 4096.
    pub logical_block: u32,
    /// Bytes: 4096.
    pub physical_block: u32,
    /// Bytes of the data area of every member (linear: of the largest).
    pub member_bytes: u64,
    /// The intent and missed maps are kept.
    pub maps: bool,
    /// Bytes of a region of the intent and missed maps.
    pub region_bytes: u64,
    /// Parity and mirrors are right below this byte of the members' data areas.
    pub synced_to: u64,
    /// Lanes that the log area is divided into.
    pub log_lanes: u16,
    pub config: ConfigVersion,
    /// Every member that is in sync or rebuilding here had at least this generation on its own superblock when this one
    /// was written: one that says less is an older copy of itself. 0: not known.
    pub floor: u64,
    /// One a slot.
    pub members: Vec<MemberEntry>,
    /// The disk that is filled to replace one that is in sync.
    pub replacement: Option<Replacement>,
}

/// A disk that takes a slot when it is filled; it is in none before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replacement {
    pub disk: DiskUuid,
    /// Of the disk that it is copied from.
    pub slot: u16,
    /// Bytes of its data area that are right after a clean stop. Else 0.
    pub copied_to: u64,
}

/// Conditions of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags {
    /// Running, or not cleanly stopped: writes may have been under way.
    pub dirty: bool,
    /// Made with `--assume-clean`.
    pub assume_clean: bool,
    /// The group was deleted; its disks are free for reuse.
    pub deleted: bool,
    /// A resync after an unclean stop is not done yet: above `synced_to` parity may not match written data.
    /// (A first sync leaves this off: there only what was never written has wrong parity.)
    pub torn: bool,
}

/// Which configuration counts. The slots' places are in the [`Layout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConfigVersion {
    /// 0 or 1: slot A or B.
    pub current: u8,
    /// Bytes of JSON.
    pub len: u64,
    /// crc32c of the JSON.
    pub crc: u32,
    /// Generation of the superblock that first pointed to it.
    pub generation: u64,
}

/// A slot of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberEntry {
    /// Who is, or was last, in this slot; nil only if missing.
    pub disk: DiskUuid,
    pub state: MemberState,
    /// While rebuilding from the start: bytes of its data area that are right. Else 0.
    pub rebuilt_to: u64,
    /// While it is not in sync: what it misses of the time since its own superblock had this generation is in the missed
    /// map. A rebuild is a catching up then. 0: what it misses is not known.
    pub left_at: u64,
    /// linear: bytes of its data area. Else 0: it is that of all.
    pub data_bytes: u64,
    /// Its bad-block list has grains, and nobody may read it without.
    pub has_bad_blocks: bool,
}

/// Why bytes are no superblock to be believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// No magic: something else, or nothing.
    #[error("no Lunar superblock")]
    NotLunar,
    /// The disk could not be read there.
    #[error("the superblock cannot be read: errno {errno}")]
    Unreadable { errno: i32 },
    #[error("a superblock has {BYTES} bytes, not {len}")]
    Length { len: usize },
    #[error("checksum {found:08x}, the superblock says {said:08x}: damaged")]
    Checksum { said: u32, found: u32 },
    #[error(
        "format version {found}; this Lunar knows version {FORMAT}: it is too old for the disk"
    )]
    FutureVersion { found: u32 },
    #[error("features {word} {unknown:#x} are unknown: this Lunar is too old for the disk")]
    UnknownFeatures { word: &'static str, unknown: u64 },
    #[error(
        "read at byte {read_at} what was written for byte {written_at}: misdirected, or a moved disk image"
    )]
    Misdirected { read_at: u64, written_at: u64 },
    #[error("the disk has {found} bytes, the superblock was written for {said}: it is cut off")]
    DeviceTooSmall { said: u64, found: u64 },
    /// A field has a value that it cannot have.
    #[error("{field} has the illegal value {value}")]
    Field { field: &'static str, value: u64 },
    #[error("the shape of the group is illegal")]
    Geometry(#[source] GeometryError),
    #[error("slot {slot} of a group of {members} members")]
    Slot { slot: u16, members: usize },
    #[error("slot {slot} names another disk")]
    NotItsSlot { slot: u16 },
    #[error("disk {disk} is in the slots {a} and {b}")]
    DuplicateMember { disk: DiskUuid, a: usize, b: usize },
    #[error("the {area} at byte {offset} with {len} bytes is misaligned or not on the disk")]
    Area {
        area: &'static str,
        offset: u64,
        len: u64,
    },
    #[error("{a} and {b} overlap")]
    Overlap { a: &'static str, b: &'static str },
    #[error("byte {at} is not what this version writes there")]
    Reserved { at: usize },
    #[error("both copies have generation {generation}, but they differ")]
    CopiesDiffer { generation: u64 },
    #[error("generation {newer} of one copy does not go on from generation {older} of the other")]
    CopiesApart { newer: u64, older: u64 },
}

impl SuperblockError {
    /// Says whether a newer Lunar wrote it: then the other copy must not be taken instead.
    fn is_from_the_future(&self) -> bool {
        matches!(
            self,
            Self::FutureVersion { .. } | Self::UnknownFeatures { .. }
        )
    }
}

/// Returns the crc32c of some bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Takes the newer of the two copies of one disk.
///
/// # Errors  the reason of the better copy if neither can be believed; a copy of a newer Lunar; two copies of
/// one generation that differ (in more than their copy index); two of one group of which neither goes on from the
/// other
/// # Crash   an update leaves copy 0 newer than copy 1, or one of them damaged: both are served
pub fn choose(
    copies: [Result<Superblock, SuperblockError>; 2],
) -> Result<Superblock, SuperblockError> {
    match copies {
        [Ok(a), Ok(b)] if a.generation == b.generation && a != b => {
            Err(SuperblockError::CopiesDiffer {
                generation: a.generation,
            })
        }
        [Ok(a), Ok(b)] => {
            let (newer, older) = if b.generation > a.generation {
                (b, a)
            } else {
                (a, b)
            };
            if !newer.goes_on_from(&older) {
                return Err(SuperblockError::CopiesApart {
                    newer: newer.generation,
                    older: older.generation,
                });
            }
            Ok(newer)
        }
        [Err(e), _] | [_, Err(e)] if e.is_from_the_future() => Err(e),
        [Ok(one), Err(_)] | [Err(_), Ok(one)] => Ok(one),
        [Err(SuperblockError::NotLunar), Err(e)] | [Err(e), Err(_)] => Err(e),
    }
}

impl Superblock {
    /// Writes one copy into `to`.
    ///
    /// # Errors  what [`decode`] would refuse: an unreadable superblock is never written
    pub fn encode(&self, copy: Copy, to: &mut [u8; BYTES]) -> Result<(), SuperblockError> {
        self.check()?;
        raw::encode(self, copy, to);
        Ok(())
    }

    /// Returns where a copy is written.
    pub fn copy_at(&self, copy: Copy) -> u64 {
        match copy {
            Copy::Start => COPY_0_AT,
            Copy::End => self.end_copy,
        }
    }

    /// Says whether it, of a higher generation, may have been written after `older`. Between groups, or between a
    /// group and none, the generation alone says so: a disk's own never falls.
    fn goes_on_from(&self, older: &Self) -> bool {
        let (Some(newer), Some(older)) = (&self.member, &older.member) else {
            return true;
        };
        let (newer, older) = (&newer.group, &older.group);
        newer.uuid != older.uuid
            || newer.history == older.history
            || newer.parents.contains(&older.history)
    }

    /// Says whether it names a disk that is in no group.
    pub fn is_free(&self) -> bool {
        self.member.is_none()
    }

    /// Checks all that is not a matter of single bytes.
    fn check(&self) -> Result<(), SuperblockError> {
        if self.system.is_nil() {
            return Err(SuperblockError::Field {
                field: "system",
                value: 0,
            });
        }
        if self.disk.is_nil() {
            return Err(SuperblockError::Field {
                field: "disk",
                value: 0,
            });
        }
        if self.generation == 0 || self.generation == u64::MAX {
            return Err(SuperblockError::Field {
                field: "generation",
                value: self.generation,
            });
        }
        if !(MEMBER_MIN..=MEMBER_BYTES_MAX).contains(&self.device_size) {
            return Err(SuperblockError::Field {
                field: "device size",
                value: self.device_size,
            });
        }
        let end_copy = Area {
            offset: self.end_copy,
            len: SUPERBLOCK_BYTES,
        };
        check_area("end copy", end_copy, self.device_size)?;
        match &self.member {
            None => Ok(()),
            Some(member) if member.group.floor > self.generation => Err(SuperblockError::Field {
                field: "floor",
                value: member.group.floor,
            }),
            Some(member) => {
                let left = member.group.members.iter().map(|entry| entry.left_at);
                if let Some(value) = left.max().filter(|left| *left > self.generation) {
                    let field = "generation that a member left at";
                    return Err(SuperblockError::Field { field, value });
                }
                member.check(self.disk, end_copy, self.device_size)
            }
        }
    }
}

impl Member {
    fn check(
        &self,
        disk: DiskUuid,
        end_copy: Area,
        device_size: u64,
    ) -> Result<(), SuperblockError> {
        let group = &self.group;
        group.check()?;
        let Some(own) = group.members.get(usize::from(self.slot)) else {
            let members = group.members.len();
            return Err(SuperblockError::Slot {
                slot: self.slot,
                members,
            });
        };
        let is_new = |new: Replacement| (new.disk, new.slot) == (disk, self.slot);
        if own.disk != disk && !group.replacement.is_some_and(is_new) {
            return Err(SuperblockError::NotItsSlot { slot: self.slot });
        }
        let data = Area {
            offset: self.layout.data_offset,
            len: group.data_bytes(usize::from(self.slot)),
        };
        check_area("data area", data, device_size)?;
        for (name, area) in self.layout.areas() {
            if area != Area::default() {
                check_area(name, area, device_size)?;
            }
        }
        for (name, area, is_used, least) in [
            ("intent map", self.layout.intent, group.maps, MAP_BYTES),
            ("missed map", self.layout.missed, group.maps, MAP_BYTES),
            (
                "log lanes",
                self.layout.logs,
                group.consistency.has_log(),
                LANE_BYTES,
            ),
            (
                "bad blocks",
                self.layout.bad_blocks,
                own.has_bad_blocks,
                LIST_BYTES,
            ),
        ] {
            if is_used && area.len < least {
                return Err(SuperblockError::Area {
                    area: name,
                    offset: area.offset,
                    len: area.len,
                });
            }
        }
        let config = self.layout.config[usize::from(group.config.current)];
        if group.config.len > config.len.min(CONFIG_MAX) {
            return Err(SuperblockError::Field {
                field: "length of the configuration",
                value: group.config.len,
            });
        }
        check_apart(&self.layout, data, end_copy)
    }
}

/// Checks one area: whole grains, behind the first superblock, on the disk.
fn check_area(name: &'static str, area: Area, device_size: u64) -> Result<(), SuperblockError> {
    let is_aligned = area.offset.is_multiple_of(GRAIN) && area.len.is_multiple_of(GRAIN);
    let end = area.offset.checked_add(area.len);
    let is_inside = area.offset >= COPY_0_AT + SUPERBLOCK_BYTES
        && area.len > 0
        && end.is_some_and(|end| end <= device_size);
    if is_aligned && is_inside {
        return Ok(());
    }
    Err(SuperblockError::Area {
        area: name,
        offset: area.offset,
        len: area.len,
    })
}

fn check_apart(layout: &Layout, data: Area, end_copy: Area) -> Result<(), SuperblockError> {
    let mut areas = layout.areas().to_vec();
    areas.push(("data area", data));
    areas.push(("end copy", end_copy));
    areas.retain(|(_, area)| area.len > 0);
    areas.sort_by_key(|(_, area)| area.offset);
    for pair in areas.windows(2) {
        let ((a, first), (b, second)) = (pair[0], pair[1]);
        if first.end() > second.offset {
            return Err(SuperblockError::Overlap { a, b });
        }
    }
    Ok(())
}

impl GroupRecord {
    /// Returns the shape of the group.
    pub fn geometry(&self) -> Result<Geometry, GeometryError> {
        let members = self.members.len();
        if self.level == Level::Linear {
            let sizes: Vec<u64> = (0..members).map(|slot| self.data_bytes(slot)).collect();
            return Geometry::linear(&sizes);
        }
        Geometry::new(self.level, members, self.chunk, self.member_bytes)
    }

    /// Returns the bytes of the data area of a slot.
    ///
    /// # Panics  if there is no such slot
    pub fn data_bytes(&self, slot: usize) -> u64 {
        match self.level {
            Level::Linear => self.members[slot].data_bytes,
            _ => self.member_bytes,
        }
    }

    /// Returns the slot that names a disk.
    pub fn slot_of(&self, disk: DiskUuid) -> Option<usize> {
        self.members
            .iter()
            .position(|entry| entry.disk == disk && !disk.is_nil())
    }

    fn check(&self) -> Result<(), SuperblockError> {
        let geometry = self.geometry().map_err(SuperblockError::Geometry)?;
        self.check_numbers(&geometry)?;
        if self.uuid.is_nil() || self.history.is_nil() {
            return Err(SuperblockError::Field {
                field: "group or history",
                value: 0,
            });
        }
        let is_past_ok = self.parents.len() <= PARENTS_MAX
            && self
                .parents
                .iter()
                .all(|parent| !parent.is_nil() && *parent != self.history);
        if !is_past_ok {
            let value = self.parents.len() as u64;
            return Err(SuperblockError::Field {
                field: "parents",
                value,
            });
        }
        self.check_members()
    }

    fn check_numbers(&self, geometry: &Geometry) -> Result<(), SuperblockError> {
        let regions = self.member_bytes.div_ceil(self.region_bytes.max(1));
        let region_ok = self.region_bytes.is_power_of_two()
            && self.region_bytes >= REGION_MIN
            && regions <= REGIONS_MAX;
        let table = [
            ("chunk", self.chunk, self.chunk == geometry.chunk()),
            (
                "logical block",
                self.logical_block.into(),
                matches!(self.logical_block, 512 | 4096),
            ),
            (
                "physical block",
                self.physical_block.into(),
                self.physical_block == 4096,
            ),
            (
                "member bytes",
                self.member_bytes,
                self.member_bytes == geometry.member_bytes(),
            ),
            ("region", self.region_bytes, region_ok),
            ("synced_to", self.synced_to, self.is_cursor(self.synced_to)),
            (
                "log lanes",
                self.log_lanes.into(),
                (1..=64).contains(&self.log_lanes),
            ),
            (
                "maps",
                self.maps.into(),
                self.maps <= (geometry.redundancy() > 0),
            ),
            (
                "consistency",
                consistency_to_byte(self.consistency).into(),
                self.level.allows(self.consistency)
                    && (self.maps || self.consistency == Consistency::None),
            ),
            (
                "config slot",
                self.config.current.into(),
                self.config.current < 2,
            ),
        ];
        match table.into_iter().find(|(_, _, is_ok)| !is_ok) {
            Some((field, value, _)) => Err(SuperblockError::Field { field, value }),
            None => Ok(()),
        }
    }

    fn check_replacement(&self) -> Result<(), SuperblockError> {
        let Some(new) = self.replacement else {
            return Ok(());
        };
        let old = self.members.get(usize::from(new.slot));
        let is_copied = old.is_some_and(|old| old.state == MemberState::InSync);
        let is_ok = is_copied
            && !new.disk.is_nil()
            && self.slot_of(new.disk).is_none()
            && self.is_cursor(new.copied_to);
        match is_ok {
            true => Ok(()),
            false => Err(SuperblockError::Field {
                field: "replacement of slot",
                value: new.slot.into(),
            }),
        }
    }

    fn is_cursor(&self, at: u64) -> bool {
        at <= self.member_bytes && at.is_multiple_of(GRAIN)
    }

    fn check_members(&self) -> Result<(), SuperblockError> {
        const { assert!(MEMBERS_MAX * size_of::<raw::RawMember>() <= BYTES / 2) };
        for (slot, entry) in self.members.iter().enumerate() {
            let has_disk = !entry.disk.is_nil();
            let (rebuilt_to, left_at) = (entry.rebuilt_to, entry.left_at);
            let left_ok = left_at == 0 || self.maps && has_disk;
            let (disk_ok, cursor_ok) = match entry.state {
                MemberState::InSync => (has_disk, rebuilt_to == 0 && left_at == 0),
                MemberState::Faulty => (has_disk, rebuilt_to == 0 && left_ok),
                MemberState::Rebuilding if left_at != 0 => (has_disk, rebuilt_to == 0 && left_ok),
                MemberState::Rebuilding => (has_disk, self.is_cursor(rebuilt_to)),
                MemberState::Missing => (true, rebuilt_to == 0 && left_ok),
            };
            if !disk_ok {
                return Err(SuperblockError::Field {
                    field: "disk of slot",
                    value: slot as u64,
                });
            }
            if !cursor_ok {
                let value = entry.rebuilt_to;
                return Err(SuperblockError::Field {
                    field: "rebuild cursor",
                    value,
                });
            }
            let is_own_size = self.level == Level::Linear;
            if (entry.data_bytes != 0) != is_own_size {
                return Err(SuperblockError::Field {
                    field: "data area of slot",
                    value: slot as u64,
                });
            }
            let again = self.members[..slot]
                .iter()
                .position(|e| has_disk && e.disk == entry.disk);
            if let Some(a) = again {
                return Err(SuperblockError::DuplicateMember {
                    disk: entry.disk,
                    a,
                    b: slot,
                });
            }
        }
        self.check_replacement()
    }
}

/// Reads one copy, checking all of it.
///
/// # Shape   `bytes` are the 4096 at `at.offset`
/// # Errors  the first reason not to believe it, in the order of [`SuperblockError`]
/// # Panics  never
pub fn decode(bytes: &[u8], at: At) -> Result<Superblock, SuperblockError> {
    let superblock = raw::decode(bytes, at)?;
    superblock.check()?;
    raw::check_canonical(&superblock, bytes)?;
    Ok(superblock)
}
