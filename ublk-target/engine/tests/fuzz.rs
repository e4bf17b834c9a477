//! Whatever stands on a disk is read as what it is, or refused with a reason: no bytes make a reader panic, and what it
//! takes it would have written so.
//!
//! `LUNAR_FUZZ_CASES` inputs a body, made from the files in `fixtures/fuzz`; `LUNAR_FUZZ_SEED` begins elsewhere.
//! `LUNAR_BLESS=1` writes those of the corpus that this crate encodes.

use std::collections::BTreeMap;

use lunar_engine::assembly::{Conditions, Present, assemble};
use lunar_engine::bad_blocks::{COPY_BYTES, Grains};
use lunar_engine::config::GroupConfig;
use lunar_engine::ppl::{self, Entry, Unit, What};
use lunar_engine::region_map::{Kind, PAGE, RegionSet};
use lunar_engine::superblock::{
    At, BYTES, ConfigVersion, Copy, Superblock, SuperblockError, choose, crc32c, decode,
};

#[path = "../../../fixtures/fuzz/mutate.rs"]
mod mutate;
use mutate::{Random, cases, corpus, mutate};

const GOLDEN: &[u8; BYTES] = include_bytes!("../../../fixtures/golden/superblock_1.bin");
const DISK: u64 = 64 << 20;

fn random(body: u64) -> Random {
    let seed = std::env::var("LUNAR_FUZZ_SEED").ok();
    let seed: u64 = seed.map_or(1, |n| n.parse().expect("LUNAR_FUZZ_SEED is a number"));
    Random(seed << 8 | body)
}

fn golden() -> Superblock {
    let at = At {
        offset: 4096,
        device_size: DISK,
    };
    decode(GOLDEN, at).unwrap()
}

/// Mostly with a checksum that is right: without one nothing beyond it is looked at.
fn fix_crc(random: &mut Random, bytes: &mut [u8], place: usize) {
    if random.below(8) > 0 {
        bytes[place..place + 4].fill(0);
        let crc = crc32c(bytes);
        bytes[place..place + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

fn bless(name: &str, file: &str, bytes: &[u8]) {
    if std::env::var_os("LUNAR_BLESS").is_some() {
        let folder = format!("{}/../../fixtures/fuzz/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(format!("{folder}/{file}"), bytes).unwrap();
    }
}

/// Superblocks of the golden group in many states.
fn superblocks() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for slot in 0..4u16 {
        for copy in Copy::BOTH {
            let mut superblock = golden();
            let member = superblock.member.as_mut().unwrap();
            member.slot = slot;
            superblock.disk = member.group.members[usize::from(slot)].disk;
            superblock.generation += u64::from(slot % 2);
            let mut bytes = [0; BYTES];
            if superblock.encode(copy, &mut bytes).is_ok() {
                all.push(bytes.to_vec());
            }
        }
    }
    let mut free = golden();
    free.member = None;
    let mut bytes = [0; BYTES];
    free.encode(Copy::BOTH[0], &mut bytes).unwrap();
    all.push(bytes.to_vec());
    all
}

#[test]
fn superblocks_of_any_bytes() {
    for (i, bytes) in superblocks().iter().enumerate() {
        bless("superblock", &format!("{i:02}.bin"), bytes);
    }
    let corpus = corpus("superblock");
    let mut random = random(1);
    let mut taken: Vec<Superblock> = vec![golden()];
    let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
    for _ in 0..cases() {
        let mut bytes = mutate(&mut random, &corpus, true);
        fix_crc(&mut random, &mut bytes, 8);
        let at = At {
            offset: [4096, DISK - (512 << 10), 0, u64::MAX][random.below(4)],
            device_size: [DISK, DISK * 2, 0, u64::MAX][random.below(4)],
        };
        let Ok(superblock) = decode(&bytes, at) else {
            continue;
        };
        // What is taken is what is written, but for what a later version may add (compat).
        let compat = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
        let mut again = [0; BYTES];
        let is_written = Copy::BOTH
            .into_iter()
            .any(|copy| superblock.encode(copy, &mut again).is_ok() && again[..] == bytes[..]);
        assert!(is_written || compat & !1 != 0, "{superblock:?}");
        let other = taken[random.below(taken.len())].clone();
        let chosen = choose([Ok(superblock.clone()), Ok(other.clone())]);
        if let Err(error) = chosen {
            *reasons.entry(variant(&error)).or_default() += 1;
        }
        // Whoever comes together with it: a plan, or a reason.
        if let Some(member) = &superblock.member {
            let present = [&superblock, &other].map(|superblock| Present {
                superblock,
                path: "/dev/x",
                is_marked: random.below(2) == 0,
                is_list_lost: random.below(2) == 0,
                is_log_lost: random.below(2) == 0,
            });
            let conditions = Conditions {
                force: random.below(2) == 0,
                process_death_only: random.below(2) == 0,
                undelete: random.below(2) == 0,
                ..Conditions::default()
            };
            let some = &present[..1 + random.below(2)];
            if let Ok(plan) = assemble(member.group.uuid, some, conditions) {
                let history = lunar_api::History::from_bytes([9; 16]);
                assert!(plan.next_record(history).is_some());
            }
        }
        if taken.len() < 64 {
            taken.push(superblock);
        }
    }
    assert!(taken.len() > 8, "hardly anything was taken");
}

fn variant(error: &SuperblockError) -> String {
    let text = format!("{error:?}");
    text.split([' ', '(', '{'])
        .next()
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn map_pages_of_any_bytes() {
    let group = golden().member.unwrap().group.uuid;
    let mut set = RegionSet::new(60_000);
    for region in (0..60_000).step_by(7) {
        set.insert(region);
    }
    for (i, kind) in [Kind::Intent, Kind::Missed].into_iter().enumerate() {
        for number in 0..2 {
            let mut page = [0; PAGE];
            set.encode_page(kind, group, number, &mut page);
            bless("map", &format!("{i}{number}.bin"), &page);
        }
    }
    let corpus = corpus("map");
    let mut random = random(2);
    let mut believed = 0;
    for _ in 0..cases() {
        let mut page = mutate(&mut random, &corpus, true);
        for sector in page.chunks_exact_mut(512) {
            fix_crc(&mut random, sector, 4);
        }
        let page: [u8; PAGE] = page.try_into().expect("it keeps its length");
        let regions = [1, 63, 3840, 30_720, 60_000, 1 << 20][random.below(6)];
        let mut found = RegionSet::new(regions);
        let number = u64::try_from(random.below(35)).expect("small");
        let bad = found.add_page(Kind::Intent, group, number, Some(&page));
        assert!(bad <= 8);
        believed += u64::from(bad == 0 && !found.is_empty());
        assert_eq!(found.len(), found.iter().count() as u64);
        assert!(found.iter().all(|region| region < regions));
    }
    assert!(believed > 0, "no page was believed");
}

#[test]
fn bad_block_lists_of_any_bytes() {
    let superblock = golden();
    let whose = (superblock.member.unwrap().group.uuid, superblock.disk);
    let lists: [&[u64]; 3] = [&[], &[0, 1, 77, 1 << 40], &[u64::MAX]];
    for (i, list) in lists.iter().enumerate() {
        let mut grains = Grains::default();
        assert!(list.iter().all(|grain| grains.insert(*grain)));
        let mut copy = [0; COPY_BYTES];
        grains.encode(whose, 1 + i as u64, &mut copy);
        bless("bad_blocks", &format!("{i}.bin"), &copy);
    }
    let corpus = corpus("bad_blocks");
    let mut random = random(5);
    let mut taken = 0;
    for _ in 0..cases() {
        let mut copy = mutate(&mut random, &corpus, true);
        fix_crc(&mut random, &mut copy, 8);
        let copy: [u8; COPY_BYTES] = copy.try_into().expect("it keeps its length");
        let Some((grains, number)) = Grains::decode(&copy, whose) else {
            continue;
        };
        taken += 1;
        let _ = grains.touch(u64::MAX, u64::MAX);
        let mut again = [0; COPY_BYTES];
        grains.encode(whose, number, &mut again);
        assert!(again == copy, "a second encoding of one list");
    }
    assert!(taken > 0, "nothing was taken");
}

#[test]
fn log_headers_of_any_bytes() {
    let group = golden().member.unwrap().group.uuid;
    let partial = |stripe| What::Partial {
        stripe,
        rows: (8, 24),
        modified: 5,
    };
    let whole = What::Whole {
        stripe: 4,
        stripes: 256,
        rows: (0, 128),
    };
    let copy = What::Copy {
        slot: 2,
        at: 1 << 20,
        len: 65536,
    };
    let entry = |what| Entry { what, crc: 0 };
    let units = [
        Unit::default(),
        Unit {
            number: 7,
            entries: vec![entry(partial(3)), entry(whole), entry(partial(9))],
        },
        Unit {
            number: 1 << 40,
            entries: vec![entry(copy); 15],
        },
    ];
    for (i, unit) in units.iter().enumerate() {
        let mut header = [0; ppl::HEADER];
        unit.encode(group, &mut header);
        bless("log", &format!("{i}.bin"), &header);
    }
    let corpus = corpus("log");
    let mut random = random(3);
    let mut taken = 0;
    for _ in 0..cases() {
        let mut header = mutate(&mut random, &corpus, true);
        fix_crc(&mut random, &mut header, 4);
        let header: [u8; ppl::HEADER] = header.try_into().expect("it keeps its length");
        let Some(unit) = Unit::decode(&header, group) else {
            continue;
        };
        taken += 1;
        assert!(unit.payload() <= u64::from(ppl::PAYLOAD_MAX));
        for entry in &unit.entries {
            let stripes = ppl::stripes_of(&entry.what, 4096);
            assert!(stripes.start <= stripes.end);
        }
    }
    assert!(taken > 0, "no header was taken");
}

#[test]
fn configurations_of_any_bytes() {
    let golden = golden();
    let geometry = golden.member.unwrap().group.geometry().unwrap();
    bless(
        "config",
        "0.json",
        include_bytes!("../../../fixtures/golden/config_1.json"),
    );
    let corpus = corpus("config");
    let mut random = random(4);
    let mut taken = 0;
    for _ in 0..cases() {
        let json = mutate(&mut random, &corpus, false);
        let version = ConfigVersion {
            current: 0,
            len: json.len() as u64,
            crc: crc32c(&json),
            generation: 1,
        };
        if let Ok(config) = GroupConfig::decode(&json, &version, &geometry) {
            taken += 1;
            assert!(config.encode(&geometry, 1, 2).is_ok());
        }
    }
    assert!(taken > 0, "no configuration was taken");
}
