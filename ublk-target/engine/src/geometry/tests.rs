use lunar_api::units::{KIB, MIB};
use proptest::prelude::*;

use super::*;

const LEVELS: [Level; 6] = [
    Level::Linear,
    Level::Raid0,
    Level::Raid1,
    Level::Raid5,
    Level::Raid6,
    Level::Raid10,
];

fn geometry(level: Level, members: usize, chunk: u64, stripes: u64) -> Geometry {
    let unit = Geometry::member_unit(level, members, chunk);
    Geometry::new(level, members, chunk, stripes * unit).unwrap()
}

/// What a slot holds at a row, as the golden tables write it.
fn cell(g: &Geometry, row: u64, slot: u16) -> String {
    match g.address_of_member(slot, row * g.chunk()) {
        Some(at) => (at / g.chunk()).to_string(),
        None => {
            let parity = g.parity_slots(row).position(|p| p == slot).unwrap();
            ["P", "Q"][parity].to_owned()
        }
    }
}

fn equals_golden(g: &Geometry, golden: &str) {
    for line in golden.lines().skip(1) {
        let mut cells = line.split(',');
        let row: u64 = cells.next().unwrap().parse().unwrap();
        for slot in 0..g.members() {
            let expected = cells.next().unwrap();
            assert_eq!(cell(g, row, slot), expected, "row {row}, slot {slot}");
        }
        assert_eq!(cells.next(), None);
    }
}

#[test]
fn left_symmetric_equals_golden_tables() {
    let golden = include_str!("../../../../fixtures/golden/left_symmetric_4.csv");
    equals_golden(&geometry(Level::Raid5, 4, 4 * KIB, 8), golden);
    let golden = include_str!("../../../../fixtures/golden/left_symmetric_6_of_5.csv");
    equals_golden(&geometry(Level::Raid6, 5, 4 * KIB, 10), golden);
}

#[test]
fn near_2_equals_golden_tables() {
    let golden = include_str!("../../../../fixtures/golden/near_2_of_4.csv");
    equals_golden(&geometry(Level::Raid10, 4, 4 * KIB, 4), golden);
    let golden = include_str!("../../../../fixtures/golden/near_2_of_5.csv");
    equals_golden(&geometry(Level::Raid10, 5, 4 * KIB, 3), golden);
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
        (g.capacity(), g.redundancy(), g.parities()),
        (768 * KIB, 0, 0)
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
        assert_eq!(g.address_of_member(slot, 70_000), Some(70_000));
    }
}

#[test]
fn linear_is_one_member_after_the_other() {
    let g = Geometry::linear(&[3 * MIB, MIB, 5 * MIB]).unwrap();
    assert_eq!(
        (g.capacity(), g.stripes(), g.member_bytes()),
        (9 * MIB, 9, 5 * MIB)
    );
    for (at, slot, member_at) in [
        (0, 0, 0),
        (3 * MIB - 1, 0, 3 * MIB - 1),
        (3 * MIB, 1, 0),
        (4 * MIB, 2, 0),
        (9 * MIB - 1, 2, 5 * MIB - 1),
    ] {
        let place = g.locate(at);
        assert_eq!((place.slot, place.member_at), (slot, member_at), "{at}");
        assert_eq!(g.address_of_member(slot, member_at), Some(at));
    }
    assert_eq!(
        [0, 1, 2].map(|slot| g.data_bytes(slot)),
        [3 * MIB, MIB, 5 * MIB]
    );
    let pieces: Vec<_> = g
        .pieces(3 * MIB - 4096, 8192)
        .map(|p| (p.slot, p.len))
        .collect();
    assert_eq!(pieces, [(0, 4096), (1, 4096)]);
    assert!(Geometry::linear(&[MIB, MIB + 4096]).is_err());
    assert!(Geometry::linear(&[MIB, 0]).is_err());
    assert!(Geometry::linear(&[]).is_err());
}

#[test]
fn new_refuses_illegal_shapes() {
    let members = |level, members| Geometry::new(level, members, 4096, 1 << 30);
    for (level, ok, bad) in [
        (Level::Linear, [1, 64], [0, 65]),
        (Level::Raid0, [1, 64], [0, 65]),
        (Level::Raid1, [2, 64], [1, 65]),
        (Level::Raid5, [3, 64], [2, 65]),
        (Level::Raid6, [4, 64], [3, 65]),
        (Level::Raid10, [2, 64], [1, 65]),
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
    // The copies of an odd count of members come round after two rows.
    assert!(Geometry::new(Level::Raid10, 4, 64 * KIB, 3 * 64 * KIB).is_ok());
    assert!(Geometry::new(Level::Raid10, 5, 64 * KIB, 3 * 64 * KIB).is_err());
}

/// Every chunk of every member of every small shape holds parity or exactly one data chunk, all addresses are
/// there as often as the level says, on different members, and all mappings agree.
#[test]
fn mappings_agree_exhaustively() {
    for level in LEVELS {
        for members in level.members_min()..=9 {
            let g = geometry(level, members, 4 * KIB, 20);
            let chunks = g.stripes() * u64::from(g.data_slots());
            let mut seen = vec![0_u16; usize::try_from(chunks).unwrap()];
            let mut parity = 0;
            for slot in 0..g.members() {
                for row in 0..g.data_bytes(slot) / g.chunk() {
                    let member_at = row * g.chunk();
                    let Some(at) = g.address_of_member(slot, member_at) else {
                        assert!(g.parity_slots(row).any(|p| p == slot));
                        assert!(g.part_of(row, slot) >= g.data_slots());
                        assert_eq!(g.slot_of(row, g.part_of(row, slot)), slot);
                        parity += 1;
                        continue;
                    };
                    seen[usize::try_from(at / g.chunk()).unwrap()] += 1;
                    let place = g.locate(at);
                    let spot = Spot { slot, member_at };
                    let found = g.copies(place.stripe, place.data).filter(|s| *s == spot);
                    assert_eq!(found.count(), 1, "{g:?} {spot:?}");
                    if g.parities() > 0 {
                        assert_eq!(g.part_of(place.stripe, slot), place.data);
                        assert_eq!(g.slot_of(place.stripe, place.data), slot);
                    }
                }
            }
            assert!(seen.iter().all(|n| *n == g.copies_of_each()), "{g:?}");
            assert_eq!(parity, g.stripes() * u64::from(g.parities()));
            for (stripe, d) in
                (0..g.stripes()).flat_map(|s| (0..g.data_slots()).map(move |d| (s, d)))
            {
                let slots: u64 = g.copies(stripe, d).fold(0, |set, s| set | 1 << s.slot);
                assert_eq!(slots.count_ones(), u32::from(g.copies_of_each()));
            }
        }
    }
}

/// Held against a definition that looks at every chunk of every stripe.
#[test]
fn survives_says_whether_every_chunk_is_still_there_or_computable() {
    for level in LEVELS {
        for members in level.members_min()..=7 {
            let g = geometry(level, members, 4 * KIB, 20);
            let is_there = |missing: u64| {
                (0..g.stripes()).all(|stripe| {
                    let lost = (0..g.data_slots())
                        .filter(|d| g.copies(stripe, *d).all(|s| missing & 1 << s.slot != 0));
                    let parity = g.parity_slots(stripe).filter(|p| missing & 1 << p == 0);
                    lost.count() <= parity.count()
                })
            };
            for missing in 0..1_u64 << members {
                assert_eq!(g.survives(missing), is_there(missing), "{g:?} {missing:b}");
                if !g.survives(missing) {
                    continue;
                }
                let more = |k: u32| {
                    (0..1_u64 << members)
                        .filter(|m| m & missing == 0 && m.count_ones() == k)
                        .all(|m| g.survives(missing | m))
                };
                let margin = u32::from(g.margin(missing));
                assert!(more(margin), "{g:?} {missing:b}: {margin}");
                assert!(!more(margin + 1), "{g:?} {missing:b}: {margin}");
            }
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
    let levels = (0..LEVELS.len()).prop_map(|i| LEVELS[i]);
    (levels, 4_usize..=64, 12_u32..=20, 1_u64..1 << 30)
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
        prop_assert!(g.parity_slots(p.stripe).all(|parity| parity != p.slot));
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
