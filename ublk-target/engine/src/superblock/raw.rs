//! The bytes of a superblock, and nothing but the bytes. Little endian throughout; see `FORMAT.md`.

use std::mem::offset_of;

use lunar_api::target::{Consistency, Level, MemberState};
use lunar_api::units::MIB;
use lunar_api::{DiskUuid, GroupUuid, History, SystemUuid};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{
    At, BYTES, ConfigVersion, Copy, FORMAT, Flags, GroupRecord, MAGIC, Member, MemberEntry,
    Replacement, Superblock, SuperblockError, crc32c,
};
use crate::limits::{MEMBERS_MAX, PARENTS_MAX};
use crate::planted::{self, Bug};
use crate::reserve::{Area, COPY_0_AT, Layout};

/// A compatible feature: `floor` is recorded. Set where it is not 0.
const FLOOR: u64 = 1 << 0;
/// Features that this code knows, by word.
const COMPAT: u64 = FLOOR;
const RO_COMPAT: u64 = 0;
/// The replacement is there, and may be.
const INCOMPAT_REPLACEMENT: u64 = 1 << 0;
/// The maps are kept: whoever writes without keeping them makes them wrong.
const INCOMPAT_MAPS: u64 = 1 << 1;
/// A member has a bad-block list: whoever reads it without gives out what is no data.
const INCOMPAT_BAD_BLOCKS: u64 = 1 << 2;
const INCOMPAT: u64 = INCOMPAT_REPLACEMENT | INCOMPAT_MAPS | INCOMPAT_BAD_BLOCKS;

/// Of a member: it has a bad-block list.
const HAS_BAD_BLOCKS: u8 = 1 << 0;

const DIRTY: u32 = 1 << 0;
const ASSUME_CLEAN: u32 = 1 << 1;
const DELETED: u32 = 1 << 2;
const TORN: u32 = 1 << 3;

const RESERVED: usize = 1560;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct RawMember {
    disk: [u8; 16],
    state: u8,
    flags: u8,
    reserved: [u8; 2],
    data_mib: U32,
    /// Rebuilding: how far. Catching up, faulty, missing: `left_at`.
    cursor: U64,
}
const _: () = assert!(size_of::<RawMember>() == 32);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawArea {
    offset: U64,
    len: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawReplacement {
    disk: [u8; 16],
    slot: U16,
    reserved: [u8; 6],
    copied_to: U64,
}
const _: () = assert!(size_of::<RawReplacement>() == 32);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    crc: U32,
    format: U32,
    compat: U64,
    ro_compat: U64,
    incompat: U64,
    system: [u8; 16],
    group: [u8; 16],
    disk: [u8; 16],
    history: [u8; 16],
    parents: [[u8; 16]; PARENTS_MAX],
    generation: U64,
    written_at: U64,
    device_size: U64,
    copy: u8,
    level: u8,
    consistency: u8,
    config_current: u8,
    slot: U16,
    members: U16,
    flags: U32,
    logical_block: U32,
    chunk: U64,
    physical_block: U32,
    log_lanes: U16,
    reserved_a: [u8; 2],
    data_offset: U64,
    member_bytes: U64,
    synced_to: U64,
    region_bytes: U64,
    end_copy: U64,
    /// Config A and B, intent, missed, logs, bad blocks, overlays, checksums: as `Layout::areas`.
    areas: [RawArea; 8],
    config_len: U64,
    config_generation: U64,
    config_crc: U32,
    reserved_b: [u8; 4],
    floor: U64,
    reserved_c: [u8; RESERVED - 32],
    replacement: RawReplacement,
    table: [RawMember; MEMBERS_MAX],
}
const _: () = assert!(size_of::<Raw>() == BYTES);
const _: () = assert!(offset_of!(Raw, crc) == 8);
const _: () = assert!(offset_of!(Raw, system) == 40);
const _: () = assert!(offset_of!(Raw, parents) == 104);
const _: () = assert!(offset_of!(Raw, generation) == 232);
const _: () = assert!(offset_of!(Raw, copy) == 256);
const _: () = assert!(offset_of!(Raw, chunk) == 272);
const _: () = assert!(offset_of!(Raw, data_offset) == 288);
const _: () = assert!(offset_of!(Raw, areas) == 328);
const _: () = assert!(offset_of!(Raw, config_len) == 456);
const _: () = assert!(offset_of!(Raw, floor) == 480);
const _: () = assert!(offset_of!(Raw, reserved_c) == 488);
const _: () = assert!(offset_of!(Raw, replacement) == 2016);
const _: () = assert!(offset_of!(Raw, table) == BYTES / 2);

pub(super) fn encode(superblock: &Superblock, copy: Copy, to: &mut [u8; BYTES]) {
    let mut raw = Raw::new_zeroed();
    raw.magic = MAGIC;
    raw.format = FORMAT.into();
    raw.ro_compat = RO_COMPAT.into();
    raw.system = superblock.system.to_bytes();
    raw.disk = superblock.disk.to_bytes();
    raw.generation = superblock.generation.into();
    raw.written_at = superblock.copy_at(copy).into();
    raw.device_size = superblock.device_size.into();
    raw.copy = copy.index();
    raw.end_copy = superblock.end_copy.into();
    if let Some(member) = &superblock.member {
        encode_layout(&member.layout, &mut raw);
        raw.slot = member.slot.into();
        encode_group(&member.group, &mut raw);
    }
    to.copy_from_slice(raw.as_bytes());
    let crc = checksum(to);
    to[8..12].copy_from_slice(&crc.to_le_bytes());
}

fn encode_layout(layout: &Layout, raw: &mut Raw) {
    raw.data_offset = layout.data_offset.into();
    for (to, (_, area)) in raw.areas.iter_mut().zip(layout.areas()) {
        *to = RawArea {
            offset: area.offset.into(),
            len: area.len.into(),
        };
    }
}

fn encode_group(group: &GroupRecord, raw: &mut Raw) {
    raw.group = group.uuid.to_bytes();
    raw.history = group.history.to_bytes();
    for (to, parent) in raw.parents.iter_mut().zip(&group.parents) {
        *to = parent.to_bytes();
    }
    raw.flags = flags_to_bits(group.flags).into();
    raw.level = level_to_byte(group.level);
    raw.chunk = group.chunk.into();
    raw.consistency = consistency_to_byte(group.consistency);
    raw.logical_block = group.logical_block.into();
    raw.physical_block = group.physical_block.into();
    raw.member_bytes = group.member_bytes.into();
    raw.region_bytes = group.region_bytes.into();
    raw.synced_to = group.synced_to.into();
    raw.log_lanes = group.log_lanes.into();
    raw.config_current = group.config.current;
    raw.config_len = group.config.len.into();
    raw.config_generation = group.config.generation.into();
    raw.config_crc = group.config.crc.into();
    raw.floor = group.floor.into();
    raw.compat = if group.floor == 0 { 0 } else { FLOOR }.into();
    let mut incompat = if group.maps { INCOMPAT_MAPS } else { 0 };
    if let Some(new) = group.replacement {
        incompat |= INCOMPAT_REPLACEMENT;
        raw.replacement = RawReplacement {
            disk: new.disk.to_bytes(),
            slot: new.slot.into(),
            reserved: [0; 6],
            copied_to: new.copied_to.into(),
        };
    }
    if group.members.iter().any(|entry| entry.has_bad_blocks) {
        incompat |= INCOMPAT_BAD_BLOCKS;
    }
    raw.incompat = incompat.into();
    let members = u16::try_from(group.members.len()).expect("checked: at most 64");
    raw.members = members.into();
    for (to, entry) in raw.table.iter_mut().zip(&group.members) {
        *to = RawMember {
            disk: entry.disk.to_bytes(),
            state: match (entry.state, entry.left_at) {
                (MemberState::Rebuilding, left_at) if left_at != 0 => CATCHES_UP,
                (state, _) => state_to_byte(state),
            },
            flags: match entry.has_bad_blocks {
                true => HAS_BAD_BLOCKS,
                false => 0,
            },
            reserved: [0; 2],
            data_mib: u32::try_from(entry.data_bytes / MIB)
                .expect("checked: a size of linear")
                .into(),
            cursor: match entry.left_at {
                0 => entry.rebuilt_to,
                left_at => left_at,
            }
            .into(),
        };
    }
}

/// Reads the bytes; what they mean together is checked by the caller.
pub(super) fn decode(bytes: &[u8], at: At) -> Result<Superblock, SuperblockError> {
    let Ok(raw) = Raw::ref_from_bytes(bytes) else {
        return Err(SuperblockError::Length { len: bytes.len() });
    };
    if raw.magic != MAGIC {
        return Err(SuperblockError::NotLunar);
    }
    let (said, found) = (raw.crc.get(), checksum(bytes));
    if said != found && !planted::is(Bug::TornSuperblockTaken) {
        return Err(SuperblockError::Checksum { said, found });
    }
    check_version(raw)?;
    check_place(raw, at)?;
    let member = match GroupUuid::from_bytes(raw.group) {
        GroupUuid::NIL => None,
        _ => Some(decode_member(raw)?),
    };
    Ok(Superblock {
        system: SystemUuid::from_bytes(raw.system),
        disk: DiskUuid::from_bytes(raw.disk),
        device_size: raw.device_size.get(),
        end_copy: raw.end_copy.get(),
        generation: raw.generation.get(),
        member,
    })
}

fn check_version(raw: &Raw) -> Result<(), SuperblockError> {
    if raw.format.get() != FORMAT {
        return Err(SuperblockError::FutureVersion {
            found: raw.format.get(),
        });
    }
    for (word, value, known) in [
        ("incompat", raw.incompat, INCOMPAT),
        ("ro_compat", raw.ro_compat, RO_COMPAT),
    ] {
        let unknown = value.get() & !known;
        if unknown != 0 {
            return Err(SuperblockError::UnknownFeatures { word, unknown });
        }
    }
    Ok(())
}

fn check_place(raw: &Raw, at: At) -> Result<(), SuperblockError> {
    let written_at = raw.written_at.get();
    if written_at != at.offset {
        return Err(SuperblockError::Misdirected {
            read_at: at.offset,
            written_at,
        });
    }
    let expected = match raw.copy {
        0 => COPY_0_AT,
        1 => raw.end_copy.get(),
        other => {
            return Err(SuperblockError::Field {
                field: "copy index",
                value: other.into(),
            });
        }
    };
    if expected != written_at {
        return Err(SuperblockError::Misdirected {
            read_at: expected,
            written_at,
        });
    }
    let said = raw.device_size.get();
    if at.device_size < said {
        return Err(SuperblockError::DeviceTooSmall {
            said,
            found: at.device_size,
        });
    }
    Ok(())
}

fn decode_member(raw: &Raw) -> Result<Member, SuperblockError> {
    let [
        config_a,
        config_b,
        intent,
        missed,
        logs,
        bad_blocks,
        overlays,
        checksums,
    ] = raw.areas.map(|area| Area {
        offset: area.offset.get(),
        len: area.len.get(),
    });
    let layout = Layout {
        config: [config_a, config_b],
        intent,
        missed,
        logs,
        bad_blocks,
        overlays,
        checksums,
        data_offset: raw.data_offset.get(),
    };
    Ok(Member {
        slot: raw.slot.get(),
        layout,
        group: decode_group(raw)?,
    })
}

fn decode_group(raw: &Raw) -> Result<GroupRecord, SuperblockError> {
    let members = usize::from(raw.members.get());
    let Some(table) = raw.table.get(..members) else {
        return Err(SuperblockError::Field {
            field: "members",
            value: members as u64,
        });
    };
    Ok(GroupRecord {
        uuid: GroupUuid::from_bytes(raw.group),
        history: History::from_bytes(raw.history),
        // A nil in the middle is found when the bytes are compared.
        parents: raw
            .parents
            .iter()
            .map(|bytes| History::from_bytes(*bytes))
            .take_while(|parent| !parent.is_nil())
            .collect(),
        flags: flags_from_bits(raw.flags.get())?,
        level: level_from_byte(raw.level)?,
        chunk: raw.chunk.get(),
        consistency: match raw.consistency {
            1 => Consistency::None,
            2 => Consistency::Bitmap,
            3 => Consistency::Ppl,
            4 => Consistency::Journal,
            other => {
                return Err(SuperblockError::Field {
                    field: "consistency",
                    value: other.into(),
                });
            }
        },
        logical_block: raw.logical_block.get(),
        physical_block: raw.physical_block.get(),
        member_bytes: raw.member_bytes.get(),
        maps: raw.incompat.get() & INCOMPAT_MAPS != 0,
        region_bytes: raw.region_bytes.get(),
        synced_to: raw.synced_to.get(),
        log_lanes: raw.log_lanes.get(),
        config: ConfigVersion {
            current: raw.config_current,
            len: raw.config_len.get(),
            crc: raw.config_crc.get(),
            generation: raw.config_generation.get(),
        },
        floor: match raw.compat.get() & FLOOR {
            0 => 0,
            _ => raw.floor.get(),
        },
        members: table.iter().map(decode_entry).collect::<Result<_, _>>()?,
        // Without the feature bit the bytes are none that this version writes.
        replacement: (raw.incompat.get() & INCOMPAT_REPLACEMENT != 0).then(|| Replacement {
            disk: DiskUuid::from_bytes(raw.replacement.disk),
            slot: raw.replacement.slot.get(),
            copied_to: raw.replacement.copied_to.get(),
        }),
    })
}

fn decode_entry(raw: &RawMember) -> Result<MemberEntry, SuperblockError> {
    let disk = DiskUuid::from_bytes(raw.disk);
    let cursor = raw.cursor.get();
    let (state, catches_up) = match raw.state {
        CATCHES_UP => (MemberState::Rebuilding, true),
        byte => (state_from_byte(byte)?, false),
    };
    let (rebuilt_to, left_at) = match state {
        MemberState::Rebuilding if !catches_up => (cursor, 0),
        MemberState::InSync => (cursor, 0),
        MemberState::Rebuilding | MemberState::Faulty | MemberState::Missing => (0, cursor),
    };
    Ok(MemberEntry {
        disk,
        state,
        rebuilt_to,
        left_at,
        data_bytes: u64::from(raw.data_mib.get()) * MIB,
        has_bad_blocks: raw.flags & HAS_BAD_BLOCKS != 0,
    })
}

/// Checks that the bytes are the one encoding of what they mean: nothing reserved is in use.
///
/// Unknown compatible features may have put something into reserved bytes; it is dropped with the next write.
pub(super) fn check_canonical(
    superblock: &Superblock,
    bytes: &[u8],
) -> Result<(), SuperblockError> {
    let Ok(raw) = Raw::ref_from_bytes(bytes) else {
        return Err(SuperblockError::Length { len: bytes.len() });
    };
    if raw.compat.get() & !COMPAT != 0 {
        return Ok(());
    }
    let copy = if raw.copy == 0 {
        Copy::Start
    } else {
        Copy::End
    };
    let mut again = [0; BYTES];
    encode(superblock, copy, &mut again);
    let is_crc = |at: usize| (8..12).contains(&at);
    match bytes
        .iter()
        .zip(&again)
        .enumerate()
        .find(|(at, (a, b))| a != b && !is_crc(*at))
    {
        Some((at, _)) => Err(SuperblockError::Reserved { at }),
        None => Ok(()),
    }
}

/// The crc32c of a superblock with its field zero.
fn checksum(bytes: &[u8]) -> u32 {
    let mut copy = [0; BYTES];
    copy.copy_from_slice(bytes);
    copy[8..12].fill(0);
    crc32c(&copy)
}

fn flags_to_bits(flags: Flags) -> u32 {
    let Flags {
        dirty,
        assume_clean,
        deleted,
        torn,
    } = flags;
    [
        (dirty, DIRTY),
        (assume_clean, ASSUME_CLEAN),
        (deleted, DELETED),
        (torn, TORN),
    ]
    .into_iter()
    .filter_map(|(is_set, bit)| is_set.then_some(bit))
    .sum()
}

fn flags_from_bits(bits: u32) -> Result<Flags, SuperblockError> {
    if bits & !(DIRTY | ASSUME_CLEAN | DELETED | TORN) != 0 {
        return Err(SuperblockError::Field {
            field: "flags",
            value: bits.into(),
        });
    }
    Ok(Flags {
        dirty: bits & DIRTY != 0,
        assume_clean: bits & ASSUME_CLEAN != 0,
        deleted: bits & DELETED != 0,
        torn: bits & TORN != 0,
    })
}

pub(super) fn consistency_to_byte(consistency: Consistency) -> u8 {
    match consistency {
        Consistency::None => 1,
        Consistency::Bitmap => 2,
        Consistency::Ppl => 3,
        Consistency::Journal => 4,
    }
}

fn level_to_byte(level: Level) -> u8 {
    match level {
        Level::Raid0 => 1,
        Level::Raid1 => 2,
        Level::Raid5 => 3,
        Level::Raid6 => 4,
        Level::Raid10 => 5,
        Level::Linear => 6,
    }
}

fn level_from_byte(byte: u8) -> Result<Level, SuperblockError> {
    match byte {
        1 => Ok(Level::Raid0),
        2 => Ok(Level::Raid1),
        3 => Ok(Level::Raid5),
        4 => Ok(Level::Raid6),
        5 => Ok(Level::Raid10),
        6 => Ok(Level::Linear),
        other => Err(SuperblockError::Field {
            field: "level",
            value: other.into(),
        }),
    }
}

/// Rebuilding by catching up with what it has missed.
const CATCHES_UP: u8 = 5;

fn state_to_byte(state: MemberState) -> u8 {
    match state {
        MemberState::InSync => 1,
        MemberState::Faulty => 2,
        MemberState::Rebuilding => 3,
        MemberState::Missing => 4,
    }
}

fn state_from_byte(byte: u8) -> Result<MemberState, SuperblockError> {
    match byte {
        1 => Ok(MemberState::InSync),
        2 => Ok(MemberState::Faulty),
        3 => Ok(MemberState::Rebuilding),
        4 => Ok(MemberState::Missing),
        other => Err(SuperblockError::Field {
            field: "member state",
            value: other.into(),
        }),
    }
}

/// Puts the right checksum on bytes that a test has changed.
#[cfg(test)]
pub(super) fn seal(bytes: &mut [u8]) {
    let crc = checksum(bytes);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
}
