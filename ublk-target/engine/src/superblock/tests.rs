//! What is proven here: a superblock survives its encoding; the golden file of version 1 is still read and
//! written byte for byte; every flipped byte is refused; random damage never panics; every single wrong field, with a right
//! checksum, is refused by its own reason.

use lunar_api::units::{KIB, MIB};
use proptest::prelude::*;

use super::*;
use crate::reserve::{lay_out, region_bytes};

const GOLDEN: &[u8; BYTES] = include_bytes!("../../../../fixtures/golden/superblock_1.bin");

fn uuid(n: u8) -> [u8; 16] {
    std::array::from_fn(|i| n.wrapping_mul(16).wrapping_add(u8::try_from(i).unwrap()))
}

fn sample() -> Superblock {
    let device_size = 64 * MIB;
    let reserve = lay_out(device_size).unwrap();
    let entry = |n, state, rebuilt_to| MemberEntry {
        disk: DiskUuid::from_bytes(uuid(n)),
        state,
        rebuilt_to,
        left_at: 0,
        data_bytes: 0,
        has_bad_blocks: false,
    };
    let group = GroupRecord {
        uuid: GroupUuid::from_bytes(uuid(2)),
        history: History::from_bytes(uuid(3)),
        parents: vec![History::from_bytes(uuid(4)), History::from_bytes(uuid(5))],
        flags: Flags {
            dirty: true,
            ..Flags::default()
        },
        level: Level::Raid5,
        chunk: 64 * KIB,
        consistency: Consistency::None,
        logical_block: 512,
        physical_block: 4096,
        member_bytes: reserve.data_bytes,
        maps: false,
        region_bytes: region_bytes(reserve.data_bytes),
        synced_to: 3 * MIB,
        log_lanes: 1,
        config: ConfigVersion {
            current: 1,
            len: 300,
            crc: 0x1234_5678,
            generation: 40,
        },
        floor: 0,
        members: vec![
            entry(6, MemberState::InSync, 0),
            entry(7, MemberState::InSync, 0),
            entry(8, MemberState::Rebuilding, 2 * MIB),
            entry(9, MemberState::InSync, 0),
        ],
        replacement: None,
    };
    Superblock {
        system: SystemUuid::from_bytes(uuid(1)),
        disk: DiskUuid::from_bytes(uuid(7)),
        device_size,
        end_copy: reserve.end_copy,
        generation: 41,
        member: Some(Member {
            slot: 1,
            layout: reserve.layout,
            group,
        }),
    }
}

/// The same while the disk of slot 3 is replaced.
fn replacing() -> Superblock {
    let mut superblock = sample();
    superblock.member.as_mut().unwrap().group.replacement = Some(Replacement {
        disk: DiskUuid::from_bytes(uuid(10)),
        slot: 3,
        copied_to: 5 * MIB,
    });
    superblock
}

fn free() -> Superblock {
    Superblock {
        member: None,
        ..sample()
    }
}

fn encoded(superblock: &Superblock, copy: Copy) -> [u8; BYTES] {
    let mut bytes = [0xAA; BYTES];
    superblock.encode(copy, &mut bytes).unwrap();
    bytes
}

fn at_start() -> At {
    At {
        offset: 4096,
        device_size: 64 * MIB,
    }
}

#[test]
fn encode_decodes_back() {
    for superblock in [sample(), replacing(), free()] {
        for copy in Copy::BOTH {
            let bytes = encoded(&superblock, copy);
            for device_size in [64 * MIB, 65 * MIB] {
                let at = At {
                    offset: superblock.copy_at(copy),
                    device_size,
                };
                assert_eq!(decode(&bytes, at), Ok(superblock.clone()));
            }
        }
    }
}

#[test]
fn golden_version_1_is_read_and_written() {
    assert!(
        decode(GOLDEN, at_start()) == Ok(sample()),
        "the golden file is not read"
    );
    assert!(
        encoded(&sample(), Copy::Start) == *GOLDEN,
        "the golden file is not written"
    );
}

#[test]
fn every_flipped_byte_is_refused() {
    for superblock in [sample(), replacing(), free()] {
        let bytes = encoded(&superblock, Copy::Start);
        for i in 0..BYTES {
            for flip in [0x01, 0x80, 0xFF] {
                let mut bytes = bytes;
                bytes[i] ^= flip;
                let refused = decode(&bytes, at_start()).unwrap_err();
                let expected = matches!(
                    (i, &refused),
                    (0..8, SuperblockError::NotLunar) | (8.., SuperblockError::Checksum { .. })
                );
                assert!(expected, "byte {i}: {refused}");
            }
        }
    }
}

/// The same with the checksum put right: what is accepted must be a legal other superblock, that is, encode
/// to the very bytes; no byte may be without meaning.
#[test]
fn every_flipped_byte_with_a_right_checksum_is_refused_or_means_something() {
    for original in [sample(), replacing()] {
        flip_every_byte(&original);
    }
}

fn flip_every_byte(original: &Superblock) {
    let bytes = encoded(original, Copy::Start);
    let mut accepted = 0;
    for i in (0..BYTES).filter(|i| !(8..12).contains(i)) {
        for flip in [0x01, 0x80] {
            let mut bytes = bytes;
            bytes[i] ^= flip;
            raw::seal(&mut bytes);
            let compat = 16..24;
            match decode(&bytes, at_start()) {
                Ok(_) if compat.contains(&i) => {}
                Ok(other) => {
                    accepted += 1;
                    assert_ne!(other, *original, "byte {i} has no meaning");
                    assert_eq!(encoded(&other, Copy::Start), bytes);
                }
                Err(refused) => assert!(!refused.to_string().is_empty()),
            }
        }
    }
    // Identities, the generation, the configuration's checksum and a few cursors may be anything.
    assert!((100..700).contains(&accepted), "{accepted}");
}

/// 200,000 damaged superblocks, half of them with a right checksum.
#[test]
fn random_damage_never_panics() {
    let samples = [
        encoded(&sample(), Copy::Start),
        encoded(&free(), Copy::Start),
    ];
    let mut x = 0x2545_F491_4F6C_DD1D_u64;
    let mut next = |below: u64| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        usize::try_from((x >> 16) % below).unwrap()
    };
    for round in 0..200_000 {
        let mut bytes = samples[next(2)];
        for _ in 0..=next(6) {
            // Most damage in the fields, some in the table.
            let at = if next(3) == 0 { next(4096) } else { next(480) };
            let value = [0, 1, 2, 0x7F, 0x80, 0xFF, next(256)][next(7)];
            bytes[at] = u8::try_from(value).unwrap();
        }
        bytes[..8].copy_from_slice(&MAGIC);
        if round % 2 == 0 {
            raw::seal(&mut bytes);
        }
        if let Ok(superblock) = decode(&bytes, at_start())
            && bytes[16..24] == [0; 8]
        {
            assert_eq!(encoded(&superblock, Copy::Start), bytes);
        }
    }
}

#[test]
fn what_is_no_superblock_has_its_reason() {
    let decode = |bytes: &[u8]| super::decode(bytes, at_start()).unwrap_err();
    assert_eq!(decode(&[]), SuperblockError::Length { len: 0 });
    assert_eq!(decode(&[0; 4095]), SuperblockError::Length { len: 4095 });
    assert_eq!(decode(&[0; 8192]), SuperblockError::Length { len: 8192 });
    assert_eq!(decode(&[0; BYTES]), SuperblockError::NotLunar);
    assert_eq!(decode(&[0xFF; BYTES]), SuperblockError::NotLunar);
}

/// Changes one byte range of a sealed superblock and tells why it is refused.
fn refusal(at: usize, value: &[u8]) -> SuperblockError {
    let mut bytes = encoded(&sample(), Copy::Start);
    bytes[at..at + value.len()].copy_from_slice(value);
    raw::seal(&mut bytes);
    decode(&bytes, at_start()).unwrap_err()
}

#[test]
fn versions_and_features_from_the_future_are_refused() {
    assert_eq!(
        refusal(12, &[2]),
        SuperblockError::FutureVersion { found: 2 }
    );
    assert_eq!(
        refusal(12, &[0]),
        SuperblockError::FutureVersion { found: 0 }
    );
    for (at, word) in [(24, "ro_compat"), (32, "incompat")] {
        let unknown = 1 << 63;
        assert_eq!(
            refusal(at + 7, &[0x80]),
            SuperblockError::UnknownFeatures { word, unknown }
        );
    }
}

#[test]
fn compatible_features_are_read_and_dropped() {
    let mut bytes = encoded(&sample(), Copy::Start);
    bytes[16] = 2;
    bytes[500] = 7;
    raw::seal(&mut bytes);
    assert_eq!(decode(&bytes, at_start()), Ok(sample()));
}

#[test]
fn misdirected_and_cut_off_are_refused() {
    let sample = sample();
    let bytes = encoded(&sample, Copy::End);
    let refused = decode(&bytes, at_start());
    let written_at = sample.end_copy;
    assert_eq!(
        refused,
        Err(SuperblockError::Misdirected {
            read_at: 4096,
            written_at
        })
    );
    let bytes = encoded(&sample, Copy::Start);
    let refused = decode(
        &bytes,
        At {
            offset: 4096,
            device_size: 64 * MIB - 512,
        },
    );
    let (said, found) = (64 * MIB, 64 * MIB - 512);
    assert_eq!(
        refused,
        Err(SuperblockError::DeviceTooSmall { said, found })
    );
    // Copy index 1 at the place of copy 0.
    assert!(matches!(
        refusal(256, &[1]),
        SuperblockError::Misdirected { .. }
    ));
    assert!(matches!(
        refusal(256, &[2]),
        SuperblockError::Field {
            field: "copy index",
            ..
        }
    ));
}

#[test]
fn raw_fields_out_of_range_are_refused() {
    for (at, value, field) in [
        (257, 9, "level"),
        (258, 0, "consistency"),
        (259, 2, "config slot"),
        (262, 65, "members"),
        (267, 1, "flags"),
        (2048 + 16, 0, "member state"),
        (2048 + 16, 6, "member state"),
    ] {
        let refused = refusal(at, &[value]);
        assert!(
            matches!(refused, SuperblockError::Field { field: f, .. } if f == field),
            "{at}: {refused}"
        );
    }
    for at in [286, 476, 2047, 2048 + 18, 2048 + 4 * 32, 4095] {
        assert_eq!(refusal(at, &[1]), SuperblockError::Reserved { at });
    }
    // Catching up, since no generation.
    let at = 2048 + 16;
    assert_eq!(refusal(at, &[5]), SuperblockError::Reserved { at });
    // A hole in the list of parents, and a free disk with remains of a group.
    assert!(matches!(
        refusal(104, &[0; 16]),
        SuperblockError::Reserved { .. }
    ));
    assert!(matches!(
        refusal(56, &[0; 16]),
        SuperblockError::Reserved { .. }
    ));
}

/// A disk that is filled to replace another has that slot in its own superblock, and is in none.
#[test]
fn replacement_says_its_own_slot_and_wrong_ones_are_refused() {
    let mut own = replacing();
    own.disk = DiskUuid::from_bytes(uuid(10));
    own.member.as_mut().unwrap().slot = 3;
    let bytes = encoded(&own, Copy::Start);
    assert_eq!(decode(&bytes, at_start()), Ok(own.clone()));
    let mut elsewhere = own;
    elsewhere.member.as_mut().unwrap().slot = 2;
    let refused = elsewhere.encode(Copy::Start, &mut [0; BYTES]);
    assert_eq!(refused, Err(SuperblockError::NotItsSlot { slot: 2 }));
    let breaks: [fn(&mut Replacement); 6] = [
        |new| new.slot = 4,
        // It is rebuilt: there is nothing to copy.
        |new| new.slot = 2,
        |new| new.disk = DiskUuid::NIL,
        |new| new.disk = DiskUuid::from_bytes(uuid(6)),
        |new| new.copied_to += 1,
        |new| new.copied_to = 64 * MIB,
    ];
    for (i, change) in breaks.iter().enumerate() {
        let mut broken = replacing();
        let group = &mut broken.member.as_mut().unwrap().group;
        change(group.replacement.as_mut().unwrap());
        let mut bytes = [0; BYTES];
        let refused = broken.encode(Copy::Start, &mut bytes).unwrap_err();
        assert!(
            refused.to_string().contains("replacement"),
            "break {i}: {refused}"
        );
        raw::encode(&broken, Copy::Start, &mut bytes);
        assert!(decode(&bytes, at_start()).is_err(), "break {i}");
    }
    // Without the feature bit its bytes are none that mean something.
    let mut bytes = encoded(&replacing(), Copy::Start);
    bytes[32] = 0;
    raw::seal(&mut bytes);
    let refused = decode(&bytes, at_start()).unwrap_err();
    assert!(
        matches!(refused, SuperblockError::Reserved { .. }),
        "{refused}"
    );
}

/// Breaks exactly one thing of a legal superblock; it is neither written nor, written nevertheless, read.
#[test]
fn one_broken_thing_is_refused() {
    type Break = (&'static str, fn(&mut Superblock, &mut Member));
    let breaks: &[Break] = &[
        ("system", |s, _| s.system = SystemUuid::NIL),
        ("disk has", |s, _| s.disk = DiskUuid::NIL),
        ("generation", |s, _| s.generation = 0),
        ("generation", |s, _| s.generation = u64::MAX),
        ("device size", |s, _| s.device_size = 63 * MIB),
        ("end copy", |s, _| s.end_copy = 64 * MIB),
        ("end copy", |s, _| s.end_copy = 0),
        ("end copy", |s, _| s.end_copy += 512),
        ("end copy", |s, m| s.end_copy = m.layout.data_offset),
        ("slot 4 of", |_, m| m.slot = 4),
        ("another disk", |_, m| m.slot = 0),
        ("in the slots 0 and 3", |_, m| {
            m.group.members[3].disk = m.group.members[0].disk
        }),
        ("disk of slot", |_, m| {
            m.group.members[0].disk = DiskUuid::NIL
        }),
        ("rebuild cursor", |_, m| {
            m.group.members[0].rebuilt_to = 4096
        }),
        ("rebuild cursor", |_, m| {
            m.group.members[2].rebuilt_to = m.group.member_bytes + 4096
        }),
        ("rebuild cursor", |_, m| m.group.members[2].left_at = 7),
        ("rebuild cursor", |_, m| {
            m.group.maps = true;
            m.group.members[0].left_at = 7;
        }),
        ("member left at", |s, m| {
            m.group.maps = true;
            m.group.members[2].rebuilt_to = 0;
            m.group.members[2].left_at = s.generation + 1;
        }),
        ("missed map", |_, m| {
            m.group.maps = true;
            m.layout.missed.len = 4096;
        }),
        ("bad blocks", |_, m| {
            m.group.members[usize::from(m.slot)].has_bad_blocks = true;
            m.layout.bad_blocks.len = 16384;
        }),
        ("maps", |_, m| {
            m.group.maps = true;
            m.group.level = Level::Raid0;
        }),
        ("consistency", |_, m| {
            m.group.consistency = Consistency::Bitmap
        }),
        ("consistency", |_, m| {
            m.group.maps = true;
            m.group.consistency = Consistency::Journal;
        }),
        ("log lanes", |_, m| {
            m.group.maps = true;
            m.group.consistency = Consistency::Ppl;
            m.layout.logs.len = 4096;
        }),
        ("history", |_, m| m.group.history = History::NIL),
        ("parents", |_, m| {
            m.group.parents = vec![History::from_bytes(uuid(4)); 9]
        }),
        ("parents", |_, m| m.group.parents[1] = m.group.history),
        ("parents", |_, m| m.group.parents[0] = History::NIL),
        ("shape", |_, m| m.group.members.truncate(2)),
        ("shape", |_, m| m.group.chunk = 5000),
        ("shape", |_, m| m.group.member_bytes -= 4096),
        ("shape", |_, m| m.group.member_bytes = 0),
        ("shape", |_, m| m.group.level = Level::Linear),
        ("data area of slot", |_, m| {
            m.group.members[1].data_bytes = m.group.member_bytes
        }),
        ("member bytes", |_, m| {
            m.group.level = Level::Linear;
            m.group.chunk = MIB;
            for entry in &mut m.group.members {
                entry.data_bytes = m.group.member_bytes - MIB;
            }
        }),
        ("chunk", |_, m| {
            m.group.level = Level::Raid1;
            m.group.chunk = 4096;
        }),
        ("logical block", |_, m| m.group.logical_block = 1024),
        ("physical block", |_, m| m.group.physical_block = 512),
        ("region", |_, m| m.group.region_bytes = 512 * KIB),
        ("region", |_, m| m.group.region_bytes = 3 * MIB),
        ("synced_to", |_, m| {
            m.group.synced_to = m.group.member_bytes + 4096
        }),
        ("synced_to", |_, m| m.group.synced_to = 100),
        ("log lanes", |_, m| m.group.log_lanes = 0),
        ("config slot", |_, m| m.group.config.current = 2),
        ("configuration", |_, m| m.group.config.len = MIB + 1),
        ("configuration", |_, m| m.group.config.len = u64::MAX),
        ("data area", |_, m| m.layout.data_offset += 7),
        ("data area", |_, m| m.layout.data_offset = 8 * MIB),
        ("overlap", |_, m| m.layout.data_offset -= MIB),
        ("data area", |_, m| m.layout.data_offset = u64::MAX - 4095),
        ("config A", |_, m| m.layout.config[0].offset = 4096),
        ("log lanes", |_, m| m.layout.logs.len = u64::MAX - 4095),
        ("checksums", |_, m| m.layout.checksums.len = 0),
        ("overlap", |_, m| {
            m.layout.missed.offset = m.layout.intent.offset
        }),
        ("overlap", |_, m| m.layout.bad_blocks.len += 4096),
    ];
    for (i, (reason, change)) in breaks.iter().enumerate() {
        let mut broken = sample();
        let mut member = broken.member.take().unwrap();
        change(&mut broken, &mut member);
        broken.member = Some(member);
        let mut bytes = [0; BYTES];
        let refused = broken.encode(Copy::Start, &mut bytes).unwrap_err();
        assert!(
            refused.to_string().contains(reason),
            "break {i} ({reason}): {refused}"
        );
        assert_eq!(bytes, [0; BYTES], "break {i}: nothing is written");
        if refused_by_table(&broken) {
            raw::encode(&broken, Copy::Start, &mut bytes);
            assert!(decode(&bytes, at_start()).is_err(), "break {i} ({reason})");
        }
    }
}

/// More parents than there is room for cannot be written at all.
fn refused_by_table(broken: &Superblock) -> bool {
    broken
        .member
        .as_ref()
        .is_some_and(|m| m.group.parents.len() <= PARENTS_MAX)
}

#[test]
fn absent_areas_are_allowed_and_recorded() {
    let mut superblock = sample();
    let member = superblock.member.as_mut().unwrap();
    member.layout.checksums = Area::default();
    member.layout.overlays = Area::default();
    let bytes = encoded(&superblock, Copy::Start);
    assert_eq!(decode(&bytes, at_start()), Ok(superblock));
}

#[test]
fn choose_takes_the_newer_and_refuses_twins() {
    let old = sample();
    let new = Superblock {
        generation: 42,
        ..old.clone()
    };
    let twin = Superblock {
        disk: DiskUuid::from_bytes(uuid(13)),
        ..free()
    };
    let with = |change: fn(&mut GroupRecord)| {
        let mut block = new.clone();
        change(&mut block.member.as_mut().unwrap().group);
        block
    };
    let renewed = with(|group| {
        group.parents.insert(0, group.history);
        group.parents.truncate(PARENTS_MAX);
        group.history = History::from_bytes(uuid(77));
    });
    let foreign = with(|group| {
        group.history = History::from_bytes(uuid(77));
        group.parents = vec![History::from_bytes(uuid(78))];
    });
    let other_group = with(|group| {
        group.uuid = GroupUuid::from_bytes(uuid(79));
        group.history = History::from_bytes(uuid(77));
    });
    let apart = Err(SuperblockError::CopiesApart {
        newer: 42,
        older: 41,
    });
    let damaged = || Err(SuperblockError::Checksum { said: 1, found: 2 });
    let future = || Err(SuperblockError::FutureVersion { found: 2 });
    let nothing = || Err(SuperblockError::NotLunar);
    let differ = Err(SuperblockError::CopiesDiffer { generation: 41 });
    for (copies, expected) in [
        ([Ok(old.clone()), Ok(old.clone())], Ok(old.clone())),
        ([Ok(new.clone()), Ok(old.clone())], Ok(new.clone())),
        ([Ok(old.clone()), Ok(new.clone())], Ok(new.clone())),
        ([Ok(old.clone()), Ok(renewed.clone())], Ok(renewed)),
        ([Ok(old.clone()), Ok(foreign)], apart),
        ([Ok(other_group.clone()), Ok(old.clone())], Ok(other_group)),
        ([damaged(), Ok(old.clone())], Ok(old.clone())),
        ([Ok(old.clone()), damaged()], Ok(old.clone())),
        ([nothing(), Ok(old.clone())], Ok(old.clone())),
        ([Ok(old.clone()), Ok(twin)], differ),
        ([future(), Ok(old.clone())], future()),
        ([Ok(old), future()], future()),
        ([damaged(), future()], future()),
        ([nothing(), damaged()], damaged()),
        ([damaged(), nothing()], damaged()),
        ([nothing(), nothing()], nothing()),
    ] {
        assert_eq!(choose(copies.clone()), expected, "{copies:?}");
    }
}

fn superblocks() -> impl Strategy<Value = Superblock> {
    let shape = (
        26_u32..50,
        0_u64..1 << 20,
        0_usize..6,
        4_usize..=64,
        12_u32..=20,
    );
    let state = (
        any::<[bool; 4]>(),
        0_usize..=8,
        any::<u64>(),
        any::<u64>(),
        0_u8..2,
    );
    (shape, state).prop_map(|((size, odd, level, members, chunk), state)| {
        let (flags, parents, generation, cursor, current) = state;
        let device_size = (1 << size) + odd * 512;
        let reserve = lay_out(device_size).unwrap();
        let member_bytes = reserve.data_bytes;
        let level = [
            Level::Raid0,
            Level::Raid1,
            Level::Raid5,
            Level::Raid6,
            Level::Raid10,
            Level::Linear,
        ][level];
        // Odd ones of raid10 have two rows a stripe.
        let member_bytes = member_bytes / (2 * MIB) * (2 * MIB);
        let cursor = cursor % (member_bytes / 4096 + 1) * 4096;
        let states = [
            MemberState::InSync,
            MemberState::Rebuilding,
            MemberState::Missing,
        ];
        let generation = generation.clamp(1, u64::MAX - 1);
        let maps = !matches!(level, Level::Raid0 | Level::Linear) && generation % 3 != 0;
        let left_at = if maps { generation / 2 } else { 0 };
        let members = (0..members)
            .map(|i| {
                let state = states[(i + members) % 3];
                let rebuilt_to = if state == MemberState::Rebuilding {
                    cursor
                } else {
                    0
                };
                let mut disk = uuid(200);
                disk[0] = u8::try_from(i).unwrap();
                MemberEntry {
                    disk: DiskUuid::from_bytes(disk),
                    state,
                    rebuilt_to: if left_at == 0 { rebuilt_to } else { 0 },
                    left_at: match state {
                        MemberState::InSync => 0,
                        _ => left_at,
                    },
                    data_bytes: match level {
                        Level::Linear => member_bytes - i as u64 % 2 * MIB,
                        _ => 0,
                    },
                    has_bad_blocks: (generation + i as u64).is_multiple_of(5),
                }
            })
            .collect::<Vec<_>>();
        let slot = u16::try_from(generation % members.len() as u64).unwrap();
        let mut superblock = sample();
        superblock.generation = generation;
        superblock.device_size = device_size;
        superblock.end_copy = reserve.end_copy;
        superblock.disk = members[usize::from(slot)].disk;
        let member = superblock.member.as_mut().unwrap();
        member.slot = slot;
        member.layout = reserve.layout;
        let [dirty, assume_clean, deleted, torn] = flags;
        let group = &mut member.group;
        group.flags = Flags {
            dirty,
            assume_clean,
            deleted,
            torn,
        };
        group.parents = (0..parents)
            .map(|n| History::from_bytes([u8::try_from(n).unwrap() + 100; 16]))
            .collect();
        group.level = level;
        group.chunk = match level {
            Level::Raid1 => 64 * KIB,
            Level::Linear => MIB,
            _ => 1 << chunk,
        };
        group.member_bytes = member_bytes;
        group.region_bytes = region_bytes(member_bytes);
        group.maps = maps;
        group.consistency = match (maps, generation % 3, level) {
            (true, 1, _) => Consistency::Bitmap,
            (true, 2, Level::Raid5) => Consistency::Ppl,
            (true, 2, Level::Raid6) => Consistency::Journal,
            _ => Consistency::None,
        };
        group.synced_to = cursor;
        group.config.current = current;
        group.members = members;
        superblock
    })
}

proptest! {
    #[test]
    fn any_legal_superblock_decodes_back(superblock in superblocks()) {
        for copy in Copy::BOTH {
            let bytes = encoded(&superblock, copy);
            let at = At { offset: superblock.copy_at(copy), device_size: superblock.device_size };
            prop_assert_eq!(decode(&bytes, at), Ok(superblock.clone()));
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), BYTES)) {
        bytes[..8].copy_from_slice(&MAGIC);
        raw::seal(&mut bytes);
        prop_assert!(decode(&bytes, at_start()).is_err());
    }
}

#[test]
fn a_floor_is_a_compatible_feature_and_no_higher_than_the_generation() {
    let with = |floor| {
        let mut superblock = sample();
        superblock.member.as_mut().unwrap().group.floor = floor;
        superblock
    };
    let bytes = encoded(&with(40), Copy::Start);
    assert_eq!((bytes[16], &bytes[480..488]), (1, &40u64.to_le_bytes()[..]));
    assert!(decode(&bytes, at_start()) == Ok(with(40)));
    assert_eq!(encoded(&with(0), Copy::Start)[16], 0);
    assert!(with(42).encode(Copy::Start, &mut [0; BYTES]).is_err());
    // The bit without a value, and a value without the bit, are not what is written.
    for (at, byte) in [(480, 0), (16, 0)] {
        let mut bytes = bytes;
        bytes[at] = byte;
        raw::seal(&mut bytes);
        assert!(decode(&bytes, at_start()).is_err(), "byte {at}");
    }
}
