//! What members are told of: read errors that were repaired, I/O without an answer, slowness; and why they were failed.

use lunar_api::target::{FailCause, MemberStatus};
use lunar_engine::traits::MILLISECOND;

use super::*;

const CHUNK: u64 = 65536;

fn member(rig: &Rig, slot: usize) -> MemberStatus {
    rig.group.status().members[slot].clone()
}

/// Makes one sector of a member unreadable in each of these stripes, one after the other, and reads all in between.
fn spoil(rig: &Rig, slot: usize, stripes: impl IntoIterator<Item = u64>) {
    let at = member(rig, slot).data_offset;
    for stripe in stripes {
        let sector = (at + stripe * CHUNK) / 512 + 24;
        rig.stores[slot].faults.bad.borrow_mut().insert(sector);
        // Reads of a mirror go round the copies.
        (0..4).for_each(|_| rig.check());
        rig.sleep(2);
    }
}

fn fail_by_hand(rig: &Rig, disk: u8) {
    let group = Rc::clone(&rig.group);
    let failed = rig
        .world
        .block_on(async move { group.member_fail(uuid(disk), "by hand").await });
    assert_eq!(failed, Ok(()));
}

fn events(rig: &Rig) -> Vec<String> {
    let mut events = Vec::new();
    rig.group.take_events(&mut events);
    events.into_iter().map(|event| event.name).collect()
}

/// Given a mirror or parity and a most of 5 read errors, when sectors of a member cannot be read here and there, then each
/// is repaired and counted, once for all that one read had to repair, and the sixth fails the member.
#[test]
fn member_with_too_many_read_errors_is_failed() {
    for (seed, level, n) in [(600, Level::Raid1, 2), (601, Level::Raid5, 4)] {
        let rig = rig(seed, level, n, CHUNK, true);
        rig.group.set_read_errors_max(5);
        rig.storm(60, || ());
        let data_of_slot_1 = [0, 1, 3, 4, 5, 7, 8, 9];
        spoil(&rig, 1, data_of_slot_1.into_iter().take(5));
        let seen = member(&rig, 1);
        assert_eq!((seen.errors_lately, seen.state), (5, MemberState::InSync));
        spoil(&rig, 1, [7]);
        let worn = member(&rig, 1);
        assert_eq!(worn.state, MemberState::Faulty);
        assert_eq!(worn.cause, Some(FailCause::Reads));
        assert!(
            worn.reason.contains("6 read errors lately, more than 5"),
            "{}",
            worn.reason
        );
        assert_eq!(worn.errors_lately, 6);
        assert!(worn.repaired >= 6 && worn.read_errors >= 6, "{worn:?}");
        assert!(events(&rig).contains(&"Fail".into()));
        assert_eq!(member(&rig, 0).errors_lately, 0);
        rig.check();
    }
}

/// Given a member that is being copied to another, or a group one slot of which is filled, when it has too many read errors,
/// then it stays: it is what is copied from.
#[test]
fn member_is_not_failed_for_read_errors_while_a_slot_is_filled_or_copied() {
    let rig = rig(603, Level::Raid6, 5, CHUNK, true);
    rig.group.set_read_errors_max(2);
    rig.storm(60, || ());
    rig.group.set_rebuild_rate(None, Some(1 << 20));
    rig.replace(1, 40, &Store::new(DISK, 0x77));
    assert!(rig.group.status().replacement.is_some());
    spoil(&rig, 1, 0..12);
    assert!(member(&rig, 1).errors_lately > 2, "{:?}", member(&rig, 1));
    assert_eq!(member(&rig, 1).state, MemberState::InSync);
    let rig = self::rig(604, Level::Raid6, 5, CHUNK, true);
    rig.group.set_read_errors_max(2);
    rig.storm(60, || ());
    rig.group.set_rebuild_rate(None, Some(1 << 20));
    fail_by_hand(&rig, 3);
    rig.replace(3, 41, &Store::new(DISK, 0x77));
    spoil(&rig, 1, 0..12);
    assert!(member(&rig, 1).errors_lately > 2, "{:?}", member(&rig, 1));
    assert_eq!(member(&rig, 1).state, MemberState::InSync);
}

/// Given a member with as many read errors as it may have, when an hour passes, then half of them count, and it may have
/// more; with 0 as the most it may have any number.
#[test]
fn read_errors_count_half_after_an_hour_and_0_is_no_limit() {
    let rig = rig(605, Level::Raid5, 4, CHUNK, true);
    rig.group.set_read_errors_max(4);
    rig.storm(60, || ());
    let data_of_slot_1 = [0, 1, 3, 4, 5, 7, 8, 9, 11];
    spoil(&rig, 1, data_of_slot_1.into_iter().take(4));
    assert_eq!(member(&rig, 1).errors_lately, 4);
    for _ in 0..8 {
        rig.sleep(500);
    }
    assert_eq!(member(&rig, 1).errors_lately, 2);
    spoil(&rig, 1, data_of_slot_1.into_iter().skip(4).take(2));
    let seen = member(&rig, 1);
    assert_eq!((seen.errors_lately, seen.state), (4, MemberState::InSync));
    rig.group.set_read_errors_max(0);
    spoil(&rig, 1, 0..12);
    assert!(member(&rig, 1).errors_lately > 8);
    assert_eq!(member(&rig, 1).state, MemberState::InSync);
}

/// Given members that fail in every way, then each says why: by hand, a write that failed, no answer, a device that is
/// gone; and whether it is known what they have missed since.
#[test]
fn failed_member_says_why_and_whether_it_can_be_caught_up() {
    type Fault<'a> = &'a dyn Fn(&Rig);
    let cases: [(Fault<'_>, FailCause); 4] = [
        (&|rig| fail_by_hand(rig, 1), FailCause::Hand),
        (
            &|rig| rig.stores[1].faults.write_errors.set(true),
            FailCause::Writes,
        ),
        (
            &|rig| rig.stores[1].faults.hang.set(true),
            FailCause::NoAnswer,
        ),
        (&|rig| rig.stores[1].faults.gone.set(true), FailCause::Gone),
    ];
    for (fail, cause) in cases {
        let rig = rig_of(606, Level::Raid5, 4, CHUNK, Consistency::Bitmap);
        rig.storm(30, || ());
        assert_eq!(member(&rig, 1).cause, None);
        fail(&rig);
        assert_eq!(rig.storm(30, || ()), 0);
        rig.sleep(60);
        let failed = member(&rig, 1);
        assert_eq!(
            (failed.state, failed.cause),
            (MemberState::Faulty, Some(cause))
        );
        assert_eq!(failed.timeouts, u64::from(cause == FailCause::NoAnswer));
        assert!(failed.can_catch_up, "{cause:?}");
        rig.check();
    }
}

/// Given a group without redundancy, when a member does not answer, then it is waited for, and that is counted and told
/// once.
#[test]
fn member_that_hangs_where_nobody_can_do_without_it_is_told_of() {
    let rig = rig(607, Level::Raid0, 2, CHUNK, true);
    rig.stores[1].faults.slow.set(true);
    let group = Rc::clone(&rig.group);
    rig.world.pages.borrow_mut()[5] = vec![7; 131_072];
    rig.world.spawn(async move {
        let request = Rig::request(5, HostVerb::Write { fua: false }, 0, 131_072);
        assert_eq!(group.serve(0, request).await, Ok(()));
    });
    rig.sleep(90);
    let hung = member(&rig, 1);
    assert_eq!((hung.timeouts, hung.state), (1, MemberState::InSync));
    let told = events(&rig).into_iter().filter(|name| name == "DiskHangs");
    assert_eq!(told.count(), 1);
    rig.stores[1].faults.slow.set(false);
    rig.stores[1].release(&rig.world);
    rig.sleep(5);
    assert_eq!(member(&rig, 1).timeouts, 1);
}

/// Reads here and there, a tick of 10 ms each, for so long.
fn reads_for(rig: &Rig, seconds: u64) {
    let clock = SimClock(Rc::clone(&rig.world));
    let end = clock.now().0 + seconds * SECOND;
    while clock.now().0 < end {
        let at = rig.world.random(LU_BYTES / 4096) * 4096;
        assert!(rig.read(at, 4096).is_ok());
        let clock = clock.clone();
        rig.world
            .block_on(async move { clock.sleep(10 * MILLISECOND).await });
    }
}

/// Given a group whose members take 1 ms, when one takes 80 ms, then after 20 s it is named, and no other, with its
/// latency and that of its peers; when it is as fast as they again, then its name ends. A group of which all are slow
/// names none.
#[test]
fn disk_that_is_much_slower_than_its_peers_is_named_until_it_is_well() {
    for (seed, level, n) in [
        (608, Level::Raid1, 2),
        (609, Level::Raid5, 4),
        (610, Level::Raid0, 3),
    ] {
        let rig = rig(seed, level, n, CHUNK, true);
        let delay = |slot: usize, ms: u64| rig.stores[slot].faults.delay.set(ms * MILLISECOND);
        let named = || -> Vec<usize> {
            let members = rig.group.status().members;
            (0..members.len())
                .filter(|i| members[*i].slow.is_some())
                .collect()
        };
        (0..usize::from(n)).for_each(|slot| delay(slot, 1));
        reads_for(&rig, 40);
        assert!(named().is_empty());
        let _ = events(&rig);
        delay(1, 80);
        reads_for(&rig, 12);
        assert!(named().is_empty(), "too soon");
        reads_for(&rig, 20);
        assert_eq!(named(), [1]);
        let slow = member(&rig, 1).slow.unwrap();
        assert!((60_000..110_000).contains(&slow.latency_us), "{slow:?}");
        assert!(slow.peers_us < 4_000, "{slow:?}");
        assert_eq!(events(&rig), ["SlowDisk"]);
        delay(1, 1);
        reads_for(&rig, 35);
        assert!(named().is_empty());
        assert_eq!(events(&rig), ["SlowDiskEnded"]);
        (0..usize::from(n)).for_each(|slot| delay(slot, 80));
        reads_for(&rig, 60);
        assert!(named().is_empty());
    }
}
