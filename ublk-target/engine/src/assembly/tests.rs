//! One test a rule; each builds the superblocks as an update or its interruption would leave them.

use lunar_api::SystemUuid;
use lunar_api::error::ErrorKind;
use lunar_api::target::Consistency;
use lunar_api::units::{KIB, MIB};

use super::*;
use crate::reserve::{lay_out, region_bytes};
use crate::superblock::{BYTES, ConfigVersion, Copy, Flags, Member, MemberEntry};
mod histories;
mod logs;
mod maps;
mod replacing;
mod unclean;

const GROUP: GroupUuid = GroupUuid::from_bytes([9; 16]);

fn history(n: u8) -> History {
    History::from_bytes([n; 16])
}

fn disk(slot: usize) -> DiskUuid {
    DiskUuid::from_bytes([u8::try_from(slot).unwrap() + 1; 16])
}

/// A group as all its members say, and a superblock of each slot.
#[derive(Clone)]
struct World {
    superblocks: Vec<Superblock>,
    /// Slots whose intent map has marks, as bits.
    marked: u64,
    /// Slots whose log cannot be read, as bits.
    lost_logs: u64,
    /// Slots whose bad-block list cannot be read, as bits.
    lost_lists: u64,
}

impl World {
    /// Synced, in sync, clean; history 1, generation 10.
    fn new(level: Level, members: usize) -> Self {
        let reserve = lay_out(64 * MIB).unwrap();
        let entry = |slot| MemberEntry {
            disk: disk(slot),
            state: MemberState::InSync,
            rebuilt_to: 0,
            left_at: 0,
            data_bytes: match level {
                Level::Linear => reserve.data_bytes,
                _ => 0,
            },
            has_bad_blocks: false,
        };
        let record = GroupRecord {
            uuid: GROUP,
            history: history(1),
            parents: Vec::new(),
            flags: Flags::default(),
            level,
            chunk: match level {
                Level::Linear => MIB,
                _ => 64 * KIB,
            },
            consistency: Consistency::None,
            logical_block: 512,
            physical_block: 4096,
            member_bytes: reserve.data_bytes,
            maps: false,
            region_bytes: region_bytes(reserve.data_bytes),
            synced_to: reserve.data_bytes,
            log_lanes: 1,
            config: ConfigVersion::default(),
            floor: 0,
            members: (0..members).map(entry).collect(),
            replacement: None,
        };
        let superblock = |slot: usize| Superblock {
            system: SystemUuid::from_bytes([7; 16]),
            disk: disk(slot),
            device_size: 64 * MIB,
            end_copy: reserve.end_copy,
            generation: 10,
            member: Some(Member {
                slot: u16::try_from(slot).unwrap(),
                layout: reserve.layout,
                group: record.clone(),
            }),
        };
        Self {
            superblocks: (0..members).map(superblock).collect(),
            marked: 0,
            lost_logs: 0,
            lost_lists: 0,
        }
    }

    /// The next generation, on some of the disks only.
    fn update(mut self, on: &[usize], change: impl Fn(&mut GroupRecord)) -> Self {
        let newest = self
            .superblocks
            .iter()
            .max_by_key(|sb| sb.generation)
            .unwrap()
            .clone();
        for slot in on {
            let superblock = &mut self.superblocks[*slot];
            superblock.generation = newest.generation + 1;
            let member = superblock.member.as_mut().unwrap();
            member.group = newest.member.as_ref().unwrap().group.clone();
            change(&mut member.group);
        }
        self
    }

    fn dirty(self) -> Self {
        let all: Vec<usize> = (0..self.superblocks.len()).collect();
        self.update(&all, |group| group.flags.dirty = true)
    }

    fn assemble(&self, slots: &[usize], conditions: Conditions) -> Result<Plan, AssemblyError> {
        let paths: Vec<String> = slots.iter().map(|slot| format!("/dev/d{slot}")).collect();
        let present: Vec<Present<'_>> = slots
            .iter()
            .zip(&paths)
            .map(|(slot, path)| Present {
                superblock: &self.superblocks[*slot],
                path,
                is_marked: self.marked & 1 << slot != 0,
                is_log_lost: self.lost_logs & 1 << slot != 0,
                is_list_lost: self.lost_lists & 1 << slot != 0,
            })
            .collect();
        let result = assemble(GROUP, &present, conditions);
        assert_order_is_nothing(&present, conditions, &result);
        if let Ok(plan) = &result {
            assert_next_is_legal(plan);
        }
        result
    }
}

fn next_history(n: u8) -> impl Fn(&mut GroupRecord) {
    move |group| {
        group.parents.insert(0, group.history);
        group.history = history(n);
    }
}

fn fails(slot: usize, n: u8) -> impl Fn(&mut GroupRecord) {
    move |group| {
        next_history(n)(group);
        group.members[slot].state = MemberState::Faulty;
    }
}

/// The invariant at the head of the module.
fn assert_order_is_nothing(
    present: &[Present<'_>],
    conditions: Conditions,
    result: &Result<Plan, AssemblyError>,
) {
    let turned: Vec<Present<'_>> = present.iter().rev().copied().collect();
    let turn = |i: usize| present.len() - 1 - i;
    let again = assemble(GROUP, &turned, conditions).map(|plan| Plan {
        leader: turn(plan.leader),
        surplus: plan.surplus.into_iter().map(turn).collect(),
        replacement: plan.replacement.map(turn),
        slots: plan
            .slots
            .into_iter()
            .map(|slot| match slot {
                SlotPlan::InSync(i) => SlotPlan::InSync(turn(i)),
                SlotPlan::Stale(i) => SlotPlan::Stale(turn(i)),
                SlotPlan::Rebuilding(i) => SlotPlan::Rebuilding(turn(i)),
                SlotPlan::Returning(i) => SlotPlan::Returning(turn(i)),
                SlotPlan::Faulty | SlotPlan::Missing => slot,
            })
            .collect(),
        ..plan
    });
    match (&again, result) {
        // Which of the strangers is named is all that may depend on the order.
        (Err(AssemblyError::NotOfGroup { .. }), Err(AssemblyError::NotOfGroup { .. })) => {}
        _ => assert_eq!(&again, result),
    }
}

/// What follows from a plan can be written.
fn assert_next_is_legal(plan: &Plan) {
    let mut next = plan.superblock.clone();
    next.generation += 1;
    next.member.as_mut().unwrap().group = plan.next_record(history(200)).unwrap();
    next.encode(Copy::Start, &mut [0; BYTES]).unwrap();
}

const CALM: Conditions = Conditions {
    witness: None,
    force: false,
    process_death_only: false,
    keep: None,
    undelete: false,
};
const FORCE: Conditions = Conditions {
    force: true,
    ..CALM
};
const DEATH: Conditions = Conditions {
    process_death_only: true,
    ..CALM
};

fn seen(n: u8, generation: u64) -> Conditions {
    let history = history(n);
    Conditions {
        witness: Some(Witness {
            history,
            generation,
        }),
        ..CALM
    }
}

use SlotPlan::{Faulty, InSync, Missing, Rebuilding, Stale};

#[test]
fn all_there_and_clean_starts_as_it_was() {
    for (level, members) in [(Level::Raid0, 3), (Level::Raid1, 3), (Level::Raid5, 3)] {
        let plan = World::new(level, members)
            .assemble(&[0, 1, 2], CALM)
            .unwrap();
        assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2)]);
        assert_eq!(
            (plan.degraded, plan.renew_history, plan.resync),
            (0, false, false)
        );
        assert_eq!(
            (plan.torn, &plan.surplus, &plan.reasons),
            (false, &vec![], &vec![])
        );
        let group = plan.superblock.member.as_ref().unwrap().group.clone();
        assert_eq!(
            plan.next_record(history(200)),
            Some(group),
            "nothing to write"
        );
    }
}

#[test]
fn members_come_in_any_order() {
    let plan = World::new(Level::Raid5, 4)
        .assemble(&[2, 0, 3, 1], CALM)
        .unwrap();
    assert_eq!(plan.slots, [InSync(1), InSync(3), InSync(0), InSync(2)]);
}

#[test]
fn nobody_strangers_and_twins_are_refused() {
    let world = World::new(Level::Raid5, 3);
    assert_eq!(world.assemble(&[], CALM), Err(AssemblyError::NobodyThere));

    let mut stranger = world.clone();
    stranger.superblocks[1].member.as_mut().unwrap().group.uuid = GroupUuid::from_bytes([8; 16]);
    stranger.superblocks[2].member = None;
    for slot in [1, 2] {
        let refused = stranger.assemble(&[0, slot], CALM);
        let path = format!("/dev/d{slot}");
        assert_eq!(
            refused,
            Err(AssemblyError::NotOfGroup { path, group: GROUP })
        );
    }

    let twins = [0, 1].map(|i| Present {
        superblock: &world.superblocks[1],
        path: ["/dev/a", "/dev/b"][i],
        is_marked: false,
        is_log_lost: false,
        is_list_lost: false,
    });
    let refused = assemble(GROUP, &twins, FORCE).unwrap_err();
    let (a, b) = ("/dev/a".to_owned(), "/dev/b".to_owned());
    assert_eq!(
        refused,
        AssemblyError::DuplicateDisk {
            disk: disk(1),
            a,
            b
        }
    );
}

#[test]
fn a_power_cut_after_one_member_of_four_leaves_the_others_in_sync() {
    let world = World::new(Level::Raid5, 4).update(&[2], |group| group.synced_to = MIB);
    let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), InSync(3)]);
    assert_eq!((plan.leader, plan.superblock.generation), (2, 11));
    assert_eq!(
        (plan.synced_to, plan.resync, plan.renew_history),
        (MIB, true, false)
    );
}

#[test]
fn a_power_cut_while_a_failure_was_recorded_on_one_of_four() {
    let world = World::new(Level::Raid5, 4).update(&[0], fails(3, 2));
    let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), InSync(2), Stale(3)]);
    assert_eq!((plan.degraded, plan.renew_history), (1, false));
    // Without the one that knew, the older say that all is well, but for that one.
    let plan = world.assemble(&[1, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [Missing, InSync(0), InSync(1), InSync(2)]);
    assert!(plan.renew_history);
    // Then the two went on apart from each other.
    let world = world.update(&[1, 2, 3], |group| {
        group.parents.clear();
        group.history = history(1);
        group.members[3].state = MemberState::InSync;
        fails(0, 3)(group);
    });
    let refused = world.assemble(&[0, 1, 2, 3], FORCE).unwrap_err();
    assert!(matches!(refused, AssemblyError::Split { .. }), "{refused}");
}

#[test]
fn a_failed_member_that_comes_back_is_stale() {
    let world = World::new(Level::Raid5, 4).update(&[0, 1, 3], fails(2, 2));
    let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), Stale(2), InSync(3)]);
    let plan = world.assemble(&[0, 1, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), Faulty, InSync(2)]);
    assert_eq!((plan.degraded, plan.renew_history), (1, false));
    // It alone with another does not make a group of old data.
    let refused = world.assemble(&[0, 2], FORCE).unwrap_err();
    assert!(matches!(refused, AssemblyError::TooFew { .. }), "{refused}");
}

#[test]
fn a_missing_member_renews_the_history() {
    let plan = World::new(Level::Raid5, 4)
        .assemble(&[0, 1, 3], CALM)
        .unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), Missing, InSync(2)]);
    assert_eq!((plan.degraded, plan.renew_history), (1, true));
    assert!(plan.reasons[0].contains("slot 2") && plan.reasons[0].contains("not there"));
    let next = plan.next_record(history(200)).unwrap();
    assert_eq!(
        (next.history, next.parents),
        (history(200), vec![history(1)])
    );
    assert_eq!(next.members[2].state, MemberState::Missing);
    assert_eq!(
        next.members[2].disk,
        disk(2),
        "who was there is not forgotten"
    );
}

#[test]
fn more_missing_than_redundancy_is_refused_whatever_is_forced() {
    let neighbours = "one of each two that hold the same chunks may be";
    for (level, members, there, allowed) in [
        (Level::Linear, 3, vec![0, 1], "0 may be"),
        (Level::Raid0, 3, vec![0, 1], "0 may be"),
        (Level::Raid5, 4, vec![1, 3], "1 may be"),
        (Level::Raid5, 3, vec![2], "1 may be"),
        (Level::Raid6, 5, vec![1, 3], "2 may be"),
        (Level::Raid10, 4, vec![2, 3], neighbours),
        (Level::Raid10, 5, vec![1, 2, 3], neighbours),
    ] {
        for conditions in [CALM, FORCE, DEATH] {
            let refused = World::new(level, members)
                .assemble(&there, conditions)
                .unwrap_err();
            let AssemblyError::TooFew {
                members: m,
                allowed: a,
                lost,
            } = &refused
            else {
                panic!("{refused}");
            };
            assert_eq!((usize::from(*m), a.as_str()), (members, allowed));
            assert_eq!(lost.len(), members - there.len());
            assert_eq!(refused.kind(), ErrorKind::NoRedundancy);
        }
    }
    let plan = World::new(Level::Raid1, 4).assemble(&[2], CALM).unwrap();
    assert_eq!(
        (plan.degraded, plan.slots),
        (3, vec![Missing, Missing, InSync(0), Missing])
    );
    for (level, members, there) in [
        (Level::Raid6, 5, vec![0, 2, 3]),
        (Level::Raid10, 4, vec![1, 2]),
        (Level::Raid10, 5, vec![0, 2, 3]),
    ] {
        let plan = World::new(level, members).assemble(&there, CALM).unwrap();
        assert_eq!(usize::from(plan.degraded), members - there.len());
        assert!(plan.renew_history);
    }
}

#[test]
fn a_rebuilding_member_is_believed_below_its_cursor() {
    let world = World::new(Level::Raid5, 3).update(&[0, 1, 2], |group| {
        group.members[1].state = MemberState::Rebuilding;
        group.members[1].rebuilt_to = 2 * MIB;
    });
    let plan = world.assemble(&[0, 1, 2], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), Rebuilding(1), InSync(2)]);
    assert_eq!((plan.degraded, plan.renew_history), (1, false));
    assert_eq!(
        plan.next_record(history(200)).unwrap().members[1].rebuilt_to,
        2 * MIB
    );
    // Not there, it will have missed what is written now.
    let plan = world.assemble(&[0, 2], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), Missing, InSync(1)]);
    let next = plan.next_record(history(200)).unwrap().members[1];
    assert_eq!((next.state, next.rebuilt_to), (MemberState::Missing, 0));
    // And it cannot stand in for one that is in sync.
    let refused = world.assemble(&[0, 1], FORCE).unwrap_err();
    assert!(matches!(refused, AssemblyError::TooFew { .. }));
}

#[test]
fn a_disk_that_was_in_another_slot_is_stale() {
    let mut world = World::new(Level::Raid5, 3).update(&[0, 1], fails(2, 2));
    // Disk 2 became the replacement of slot 1, but the power cut came before its own superblock.
    world = world.update(&[0], |group| {
        group.members[1] = MemberEntry {
            disk: disk(2),
            state: MemberState::Rebuilding,
            rebuilt_to: MIB,
            left_at: 0,
            data_bytes: 0,
            has_bad_blocks: false,
        };
        group.members[2] = MemberEntry {
            disk: DiskUuid::from_bytes([77; 16]),
            state: MemberState::InSync,
            rebuilt_to: 0,
            left_at: 0,
            data_bytes: 0,
            has_bad_blocks: false,
        };
    });
    let plan = world.assemble(&[0, 2], CALM);
    assert!(
        matches!(plan, Err(AssemblyError::TooFew { .. })),
        "slot 2 is not there"
    );
    let mut newcomer = world.superblocks[0].clone();
    newcomer.disk = DiskUuid::from_bytes([77; 16]);
    newcomer.member.as_mut().unwrap().slot = 2;
    world.superblocks.push(newcomer);
    let plan = world.assemble(&[0, 1, 2, 3], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), Stale(2), InSync(3)]);
    assert_eq!(plan.surplus, [1]);
    assert!(
        plan.reasons
            .iter()
            .any(|reason| reason.contains("/dev/d1 is no member any more"))
    );
}
#[test]
fn a_deleted_group_does_not_start() {
    let world = World::new(Level::Raid5, 3).update(&[1], |group| group.flags.deleted = true);
    assert_eq!(
        world.assemble(&[0, 1, 2], FORCE),
        Err(AssemblyError::Deleted)
    );
    assert!(
        AssemblyError::Deleted
            .hint("g")
            .unwrap()
            .contains("--deleted")
    );
}

#[test]
fn an_empty_slot_is_missing() {
    let world = World::new(Level::Raid5, 3).update(&[0, 1], |group| {
        group.members[2] = MemberEntry {
            disk: DiskUuid::NIL,
            state: MemberState::Missing,
            rebuilt_to: 0,
            left_at: 0,
            data_bytes: 0,
            has_bad_blocks: false,
        };
    });
    let plan = world.assemble(&[0, 1], CALM).unwrap();
    assert_eq!(plan.slots, [InSync(0), InSync(1), Missing]);
    assert_eq!(plan.reasons, ["slot 2 is empty"]);
    assert!(!plan.renew_history);
    let plan = world.assemble(&[0, 1, 2], CALM).unwrap();
    assert_eq!(plan.surplus, [2]);
}

/// Every combination of who is there, what the newest says of whom, and dirtiness: never a panic, and a
/// plan never has fewer in-sync members than the level needs.
#[test]
fn no_combination_starts_without_enough_members() {
    let states = [
        MemberState::InSync,
        MemberState::Faulty,
        MemberState::Rebuilding,
        MemberState::Missing,
    ];
    for level in [
        Level::Linear,
        Level::Raid0,
        Level::Raid1,
        Level::Raid5,
        Level::Raid10,
    ] {
        for combination in 0..4_usize.pow(3) {
            let world = World::new(level, 3).update(&[combination % 3], |group| {
                group.flags.dirty = combination % 2 == 0;
                for (slot, entry) in group.members.iter_mut().enumerate() {
                    let power = 4_usize.pow(u32::try_from(slot).unwrap());
                    entry.state = states[combination / power % 4];
                }
            });
            for there in 0..8_usize {
                let there: Vec<usize> = (0..3).filter(|slot| there >> slot & 1 == 1).collect();
                for conditions in [CALM, FORCE, DEATH] {
                    let Ok(plan) = world.assemble(&there, conditions) else {
                        continue;
                    };
                    let in_sync = plan.slots.iter().filter(|s| matches!(s, InSync(_))).count();
                    let missing = (0..3).filter(|slot| !matches!(plan.slots[*slot], InSync(_)));
                    let missing = missing.fold(0, |set, slot| set | 1 << slot);
                    let geometry = world.superblocks[0]
                        .member
                        .as_ref()
                        .unwrap()
                        .group
                        .geometry();
                    let geometry = geometry.unwrap();
                    assert!(geometry.survives(missing), "{plan:?}");
                    assert_eq!(usize::from(plan.degraded), 3 - in_sync);
                }
            }
        }
    }
}
