use lunar_api::target::Level;
use lunar_api::units::{KIB, MIB};
use proptest::prelude::*;

use super::*;
use crate::limits::QUEUES_MAX;

const GOLDEN: &[u8] = include_bytes!("../../../../fixtures/golden/config_1.json");

/// Unit 1152 KiB; 58 MiB of a member are 928 stripes, 154 units.
fn raid5() -> Geometry {
    Geometry::new(Level::Raid5, 4, 64 * KIB, 58 * MIB).unwrap()
}

fn raid0(mib: u64) -> Geometry {
    Geometry::new(Level::Raid0, 1, 64 * KIB, mib * MIB).unwrap()
}

const UNIT: u64 = 1152 * KIB;

fn id(n: u8) -> LuUuid {
    LuUuid::from_bytes(std::array::from_fn(|i| {
        n.wrapping_mul(16) + u8::try_from(i).unwrap()
    }))
}

fn golden() -> GroupConfig {
    let extent = |at, len| Extent {
        at: at * UNIT,
        len: len * UNIT,
    };
    let lu = |n, name: &str, depth, extents| LuConfig {
        uuid: id(n),
        name: name.to_owned(),
        depth,
        queues: 1,
        capacity: 2 * UNIT,
        extents,
    };
    GroupConfig {
        name: "data".to_owned(),
        lus: vec![lu(1, "vol", 128, vec![extent(1, 2)])],
        deleted: vec![lu(2, "old", 64, vec![extent(0, 1), extent(3, 1)])],
        options: Options {
            rebuild_min_bytes: Some(MIB),
            rebuild_max_bytes: None,
        },
        scrub: None,
    }
}

fn scrub() -> ScrubRecord {
    ScrubRecord {
        state: ScrubState::Paused,
        repair: true,
        from: 0,
        next: MIB,
        rate: Some(MIB),
        started: 1,
        ended: 0,
        list: [2, 7]
            .map(|stripe| BadRecord {
                stripe,
                at: stripe * raid5().chunk() + 512,
                len: 512,
                slots: 0b10,
                repaired: stripe == 2,
            })
            .to_vec(),
        more: 0,
        more_repaired: 0,
        unreadable: 3,
        rewritten: 4096,
    }
}

/// A record of a scrub beside the golden rest; without one the JSON has no such key.
#[test]
fn scrub_is_read_as_it_was_written() {
    let mut config = golden();
    config.scrub = Some(scrub());
    let (json, version) = config.encode(&raid5(), 0, 1).unwrap();
    assert_eq!(
        GroupConfig::decode(&json, &version, &raid5()).unwrap(),
        config
    );
}

/// Breaks exactly one thing of a legal record.
#[test]
fn scrub_of_another_group_is_refused() {
    type Break = (&'static str, fn(&mut ScrubRecord));
    let breaks: &[Break] = &[
        ("its place", |s| s.from = 2 * MIB),
        ("its place", |s| s.next = raid5().member_bytes() + 1),
        ("its rate", |s| s.rate = Some(0)),
        ("its counts", |s| s.more_repaired = 1),
        ("too long", |s| {
            s.list = vec![s.list[0].clone(); SCRUB_LIST_MAX + 1]
        }),
        ("a stripe", |s| s.list[0].at -= 1024),
        ("a stripe", |s| s.list[0].len = raid5().chunk()),
        ("a stripe", |s| s.list[1].stripe = u64::MAX / 2),
        ("a slot", |s| s.list[0].slots = 1 << 63),
        ("the order", |s| s.list.swap(0, 1)),
    ];
    for (i, (reason, change)) in breaks.iter().enumerate() {
        let mut config = golden();
        let mut record = scrub();
        change(&mut record);
        config.scrub = Some(record);
        let refused = config.encode(&raid5(), 0, 1).unwrap_err().to_string();
        assert!(refused.contains(reason), "break {i} ({reason}): {refused}");
    }
}

fn version(json: &[u8]) -> ConfigVersion {
    ConfigVersion {
        current: 0,
        len: json.len() as u64,
        crc: crc32c(json),
        generation: 1,
    }
}

#[test]
fn golden_format_1_is_read_and_written() {
    let config = GroupConfig::decode(GOLDEN, &version(GOLDEN), &raid5()).unwrap();
    assert_eq!(config, golden());
    let (json, said) = golden().encode(&raid5(), 1, 7).unwrap();
    assert_eq!(json, GOLDEN);
    assert_eq!(
        said,
        ConfigVersion {
            current: 1,
            generation: 7,
            ..version(GOLDEN)
        }
    );
}

#[test]
fn damage_is_refused() {
    let said = version(GOLDEN);
    for at in 0..GOLDEN.len() {
        let mut json = GOLDEN.to_vec();
        json[at] ^= 0x04;
        let refused = GroupConfig::decode(&json, &said, &raid5());
        assert!(
            matches!(refused, Err(ConfigError::Checksum { .. })),
            "byte {at}"
        );
        // With the checksum put right it may be legal or not, but never a panic.
        let _ = GroupConfig::decode(&json, &version(&json), &raid5());
    }
    let refused = GroupConfig::decode(&GOLDEN[1..], &said, &raid5());
    assert!(matches!(refused, Err(ConfigError::Length { .. })));
}

#[test]
fn other_formats_and_unknown_fields_are_refused() {
    let decode = |json: &str| {
        GroupConfig::decode(json.as_bytes(), &version(json.as_bytes()), &raid5()).unwrap_err()
    };
    let golden = std::str::from_utf8(GOLDEN).unwrap();
    let newer = r#"{"format":2,"what":"ever"}"#;
    assert!(matches!(decode(newer), ConfigError::Version { found: 2 }));
    for (from, to) in [
        (r#""name":"data""#, r#""name":"data","more":1"#),
        (r#""depth":128"#, r#""depth":128,"more":1"#),
        (r#""at":0"#, r#""at":0,"more":1"#),
        (r#""options":{"#, r#""options":{"more":1,"#),
        (r#""depth":128"#, r#""depth":-1"#),
        (r#""depth":128"#, r#""depth":70000"#),
        (r#""capacity":2359296"#, r#""capacity":1e30"#),
        (r#""depth":128,"#, ""),
    ] {
        assert!(golden.contains(from), "{from}");
        let refused = decode(&golden.replacen(from, to, 1));
        assert!(matches!(refused, ConfigError::Json(_)), "{to}: {refused}");
    }
    assert!(matches!(decode(""), ConfigError::Json(_)));
    assert!(matches!(decode(&"[".repeat(100_000)), ConfigError::Json(_)));
}

/// Breaks exactly one thing of a legal configuration.
#[test]
fn one_broken_thing_is_refused() {
    type Break = (&'static str, fn(&mut GroupConfig));
    let breaks: &[Break] = &[
        ("no name", |c| c.name.clear()),
        ("no name", |c| c.lus[0].name = "a/b".to_owned()),
        ("no name", |c| c.deleted[0].name = "7".to_owned()),
        ("depth", |c| c.lus[0].depth = 0),
        ("depth", |c| c.lus[0].depth = DEPTH_MAX + 1),
        ("queues", |c| c.lus[0].queues = 0),
        ("queues", |c| c.lus[0].queues = QUEUES_MAX + 1),
        ("already", |c| c.lus[0].uuid = LuUuid::NIL),
        ("already", |c| c.lus[0].uuid = c.deleted[0].uuid),
        ("already", |c| {
            let twin = c.deleted.remove(0);
            c.lus.push(LuConfig {
                name: "vol".to_owned(),
                ..twin
            });
        }),
        ("both have byte", |c| c.deleted[0].extents[0].at = UNIT),
        ("both have byte", |c| c.deleted[0].extents[1].at = 0),
        ("whole units", |c| c.lus[0].extents[0].at += 4096),
        ("whole units", |c| c.lus[0].extents[0].len = 0),
        ("whole units", |c| c.lus[0].extents[0].len = MIB),
        ("whole units", |c| c.lus[0].extents[0].at = 153 * UNIT),
        ("whole units", |c| {
            c.lus[0].extents[0].at = u64::MAX / UNIT * UNIT
        }),
        ("hold", |c| c.lus[0].capacity = 3 * UNIT),
        ("hold", |c| c.lus[0].extents.clear()),
        ("at most 4096", |c| {
            c.deleted = vec![c.deleted[0].clone(); DELETED_MAX + 1]
        }),
        ("at most 4096", |c| {
            c.lus = vec![c.lus[0].clone(); LU_MAX + 1]
        }),
        ("extents", |c| {
            c.lus[0].extents = vec![Extent { at: 0, len: UNIT }; EXTENTS_MAX + 1];
            c.lus[0].capacity = UNIT * (EXTENTS_MAX as u64 + 1);
        }),
        ("rebuild", |c| c.options.rebuild_max_bytes = Some(0)),
        ("rebuild", |c| c.options.rebuild_max_bytes = Some(MIB - 1)),
    ];
    for (i, (reason, change)) in breaks.iter().enumerate() {
        let mut config = golden();
        change(&mut config);
        let refused = config.encode(&raid5(), 0, 1).unwrap_err().to_string();
        assert!(refused.contains(reason), "break {i} ({reason}): {refused}");
        let json = save::encode(&config).unwrap();
        assert!(
            GroupConfig::decode(&json, &version(&json), &raid5()).is_err(),
            "break {i}"
        );
    }
}

#[test]
fn names_are_file_names_and_no_numbers() {
    let long = "x".repeat(NAME_MAX);
    for name in ["a", "vol-1", "1a", "_x", "A.b", &long] {
        assert!(check_name(name).is_ok(), "{name}");
    }
    let longer = "x".repeat(NAME_MAX + 1);
    for name in [
        "", "12", ".", "..", ".a", "-a", "a b", "a/b", "é", "a\n", "a\0", &longer,
    ] {
        assert!(check_name(name).is_err(), "{name:?}");
    }
}

#[test]
fn sizes_are_rounded_to_units() {
    let g = raid5();
    assert_eq!((unit_bytes(&g), allocatable_bytes(&g)), (UNIT, 154 * UNIT));
    for (size, units) in [
        (LuSize::Bytes(1), 1),
        (LuSize::Bytes(UNIT), 1),
        (LuSize::Bytes(UNIT + 1), 2),
        (LuSize::Percent(50), 77),
        (LuSize::Percent(1), 1),
        (LuSize::Percent(100), 154),
        (LuSize::Max, 154),
    ] {
        let mut config = GroupConfig::new("g").unwrap();
        let lu = config.create_lu(&g, id(1), "v", size, 1).unwrap();
        assert_eq!(lu.capacity, units * UNIT, "{size:?}");
        assert_eq!(lu.map().capacity(), lu.capacity);
        assert_eq!(config.free_bytes(&g), (154 - units) * UNIT);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_numbers_and_changes_nothing() {
    let g = raid0(8);
    let mut config = GroupConfig::new("g").unwrap();
    config
        .create_lu(&g, id(1), "a", LuSize::Bytes(6 * MIB), 1)
        .unwrap();
    let before = config.clone();
    let mut create =
        |n, name: &str, size, depth| config.create_lu(&g, id(n), name, size, depth).unwrap_err();
    let refused = create(2, "b", LuSize::Bytes(2 * MIB + 1), 1);
    assert_eq!(
        refused.to_string(),
        "3145728 bytes are asked for (in units of 1048576), 2097152 are free"
    );
    assert!(matches!(
        create(2, "b", LuSize::Bytes(u64::MAX), 1),
        ConfigError::NoSpace { .. }
    ));
    assert!(matches!(
        create(2, "b", LuSize::Percent(0), 1),
        ConfigError::Percent { percent: 0 }
    ));
    assert!(matches!(
        create(2, "b", LuSize::Percent(101), 1),
        ConfigError::Percent { .. }
    ));
    assert!(matches!(
        create(2, "b", LuSize::Bytes(0), 1),
        ConfigError::Empty
    ));
    assert!(matches!(
        create(2, "a", LuSize::Bytes(1), 1),
        ConfigError::NameTaken { .. }
    ));
    assert!(matches!(
        create(1, "b", LuSize::Bytes(1), 1),
        ConfigError::UuidTaken { .. }
    ));
    assert!(matches!(
        create(2, "b", LuSize::Bytes(1), 0),
        ConfigError::Depth { .. }
    ));
    assert_eq!(config, before);
    config.create_lu(&g, id(2), "b", LuSize::Max, 1).unwrap();
    let refused = config
        .create_lu(&g, id(3), "c", LuSize::Max, 1)
        .unwrap_err();
    assert!(matches!(refused, ConfigError::NoSpace { free: 0, .. }));
}

#[test]
fn deleted_lus_come_back_until_their_space_is_needed() {
    let g = raid0(8);
    let mut config = GroupConfig::new("g").unwrap();
    for (n, name) in [(1, "a"), (2, "b"), (3, "c")] {
        config
            .create_lu(&g, id(n), name, LuSize::Bytes(2 * MIB), 1)
            .unwrap();
    }
    config.delete_lu(id(2)).unwrap();
    config.delete_lu(id(1)).unwrap();
    assert_eq!(config.free_bytes(&g), 6 * MIB);
    // Nobody's space first.
    let d = config
        .create_lu(&g, id(4), "d", LuSize::Bytes(2 * MIB), 1)
        .unwrap();
    assert_eq!(
        d.extents,
        [Extent {
            at: 6 * MIB,
            len: 2 * MIB
        }]
    );
    assert_eq!(config.deleted.len(), 2);
    // Then that of the one deleted first: `b`.
    let e = config
        .create_lu(&g, id(5), "e", LuSize::Bytes(MIB), 1)
        .unwrap();
    assert_eq!(
        e.extents,
        [Extent {
            at: 2 * MIB,
            len: MIB
        }]
    );
    assert!(matches!(
        config.undelete_lu(id(2)),
        Err(ConfigError::NoSuchLu { .. })
    ));
    assert_eq!(config.undelete_lu(id(1)).unwrap().extents[0].at, 0);
    assert!(matches!(
        config.delete_lu(id(2)),
        Err(ConfigError::NoSuchLu { .. })
    ));
    config.check(&g).unwrap();
}

#[test]
fn lu_grows_behind_what_it_has() {
    let g = raid0(16);
    let extent = |at, len| Extent {
        at: at * MIB,
        len: len * MIB,
    };
    let mut config = GroupConfig::new("g").unwrap();
    for (n, name) in [(1, "a"), (2, "b"), (3, "c")] {
        config
            .create_lu(&g, id(n), name, LuSize::Bytes(2 * MIB), 1)
            .unwrap();
    }
    let mut grow = |n, size, capacity, extents: &[Extent]| {
        let lu = config.resize_lu(&g, id(n), size).unwrap();
        assert_eq!((lu.capacity, &lu.extents[..]), (capacity * MIB, extents));
    };
    grow(1, LuSize::Bytes(4 * MIB), 4, &[extent(0, 2), extent(6, 2)]);
    // Right behind: the same extent.
    grow(
        1,
        LuSize::Bytes(5 * MIB - 1),
        5,
        &[extent(0, 2), extent(6, 3)],
    );
    grow(1, LuSize::Bytes(5 * MIB), 5, &[extent(0, 2), extent(6, 3)]);
    grow(2, LuSize::Percent(25), 4, &[extent(2, 2), extent(9, 2)]);
    config.check(&g).unwrap();
    let before = config.clone();
    assert!(matches!(
        config.resize_lu(&g, id(1), LuSize::Bytes(4 * MIB)),
        Err(ConfigError::Shrink { .. })
    ));
    assert!(matches!(
        config.resize_lu(&g, id(1), LuSize::Bytes(u64::MAX)),
        Err(ConfigError::NoSpace { .. })
    ));
    assert!(matches!(
        config.resize_lu(&g, id(1), LuSize::Bytes(11 * MIB)),
        Err(ConfigError::NoSpace {
            free: 5_242_880,
            ..
        })
    ));
    assert!(matches!(
        config.resize_lu(&g, id(9), LuSize::Max),
        Err(ConfigError::NoSuchLu { .. })
    ));
    assert_eq!(config, before);
    // Space of deleted ones comes last, and is theirs no more.
    config.delete_lu(id(2)).unwrap();
    let lu = config.resize_lu(&g, id(1), LuSize::Max).unwrap();
    assert_eq!(lu.capacity, 14 * MIB);
    assert!(config.deleted.is_empty());
    assert_eq!(config.free_bytes(&g), 0);
    let full = config.resize_lu(&g, id(1), LuSize::Max).unwrap().capacity;
    assert_eq!(full, 14 * MIB);
    config.check(&g).unwrap();
}

#[test]
fn undelete_wants_its_name_back() {
    let g = raid0(8);
    let mut config = GroupConfig::new("g").unwrap();
    config
        .create_lu(&g, id(1), "a", LuSize::Bytes(1), 1)
        .unwrap();
    config.delete_lu(id(1)).unwrap();
    config
        .create_lu(&g, id(2), "a", LuSize::Bytes(1), 1)
        .unwrap();
    assert!(matches!(
        config.undelete_lu(id(1)),
        Err(ConfigError::NameTaken { .. })
    ));
    config.rename_lu(id(2), "b").unwrap();
    config.rename_lu(id(2), "b").unwrap();
    config.undelete_lu(id(1)).unwrap();
    assert!(matches!(
        config.rename_lu(id(1), "b"),
        Err(ConfigError::NameTaken { .. })
    ));
    assert!(matches!(
        config.rename_lu(id(9), "c"),
        Err(ConfigError::NoSuchLu { .. })
    ));
    config.rename("other").unwrap();
    assert!(config.rename("1").is_err() && config.name == "other");
}

/// The row of issue 2: 30 LUs after 60 creates and deletes in mixed sizes; extents are reused.
#[test]
fn thirty_lus_after_sixty_creates_and_deletes_fit() {
    // 150 MiB are created in all, 90 MiB stay.
    let g = raid0(92);
    let mut config = GroupConfig::new("g").unwrap();
    for n in 0..60_u8 {
        let uuid = LuUuid::from_bytes([n + 1; 16]);
        let size = LuSize::Bytes(u64::from(n % 4 + 1) * MIB);
        config
            .create_lu(&g, uuid, &format!("lu-{n}"), size, 128)
            .unwrap();
        if n % 2 == 0 {
            config.delete_lu(uuid).unwrap();
        }
        config.check(&g).unwrap();
    }
    assert_eq!(config.lus.len(), 30);
    let used: u64 = config.lus.iter().map(|lu| lu.capacity).sum();
    assert_eq!(config.free_bytes(&g), 92 * MIB - used);
}

#[test]
fn slots_grow_by_powers_of_two() {
    for (len, slot) in [(0, MIB), (MIB, MIB), (MIB + 1, 2 * MIB), (5 * MIB, 8 * MIB)] {
        assert_eq!(GroupConfig::slot_bytes_needed(len), slot, "{len}");
    }
}

/// The largest configuration fits the largest slot.
#[test]
fn the_largest_configuration_fits() {
    let g = raid0(1 << 30);
    let per_lu = EXTENTS_MAX / (LU_MAX + DELETED_MAX);
    let long = "n".repeat(NAME_MAX - 5);
    let mut unit = 0;
    let mut lu = |i: usize| {
        let extents: Vec<_> = (0..per_lu)
            .map(|_| {
                unit += 2;
                Extent {
                    at: ((1 << 29) + unit) * MIB,
                    len: MIB,
                }
            })
            .collect();
        let mut uuid = [0xFF; 16];
        uuid[..8].copy_from_slice(&(i as u64).to_le_bytes());
        LuConfig {
            uuid: LuUuid::from_bytes(uuid),
            name: format!("{long}{i:05}"),
            depth: DEPTH_MAX,
            queues: 1,
            capacity: per_lu as u64 * MIB,
            extents,
        }
    };
    let mut config = GroupConfig::new("g").unwrap();
    config.lus = (0..LU_MAX).map(&mut lu).collect();
    config.deleted = (LU_MAX..LU_MAX + DELETED_MAX).map(&mut lu).collect();
    let (json, version) = config.encode(&g, 0, 1).unwrap();
    assert!(version.len <= CONFIG_MAX, "{} bytes", version.len);
    assert_eq!(GroupConfig::decode(&json, &version, &g).unwrap(), config);
    let refused = check_fits(version.len, MIB);
    assert!(matches!(
        refused,
        Err(ConfigError::TooLong { slot: MIB, .. })
    ));
}

proptest! {
    #[test]
    fn any_history_stays_legal_and_decodes_back(
        steps in prop::collection::vec((0_u8..5, any::<prop::sample::Index>(), 1_u64..20), 1..50),
    ) {
        let g = raid5();
        let mut config = GroupConfig::new("g").unwrap();
        for (i, (verb, which, units)) in steps.into_iter().enumerate() {
            let live = (!config.lus.is_empty()).then(|| config.lus[which.index(config.lus.len())].uuid);
            let dead = (!config.deleted.is_empty())
                .then(|| config.deleted[which.index(config.deleted.len())].uuid);
            match (verb, live, dead) {
                (0, Some(uuid), _) => config.delete_lu(uuid).unwrap(),
                (1, _, Some(uuid)) => { config.undelete_lu(uuid).unwrap(); }
                _ => {
                    let n = u8::try_from(i).unwrap() + 1;
                    let size = LuSize::Bytes(units * UNIT - 5);
                    let free = config.free_bytes(&g);
                    match config.create_lu(&g, LuUuid::from_bytes([n; 16]), &format!("lu{n}"), size, 8) {
                        Ok(lu) => prop_assert_eq!(lu.capacity, units * UNIT),
                        Err(_) => prop_assert!(free < units * UNIT),
                    }
                }
            }
            let (json, version) = config.encode(&g, 0, 1).unwrap();
            prop_assert_eq!(&GroupConfig::decode(&json, &version, &g).unwrap(), &config);
        }
    }
}
