//! What a disk says it is when some of it cannot be read.
#![allow(clippy::cast_possible_truncation, missing_debug_implementations)]

mod world;

use std::rc::Rc;

use lunar_api::{GroupUuid, SystemUuid};
use lunar_engine::label::{adopt, label, probe};
use lunar_engine::pool::Pool;
use lunar_engine::reserve::lay_out;

use world::{SYSTEM, SimMemory, Store, World, given, memory, uuid};

const DISK: usize = 80 << 20;

#[test]
fn unreadable_copies_are_told_from_none() {
    let end = lay_out(DISK as u64).unwrap().end_copy / 512;
    let start = 4096 / 512;
    let unreadable = "cannot be read";
    for (labelled, bad, found, problem) in [
        (true, vec![], true, None),
        (true, vec![start], true, None),
        (true, vec![end], true, None),
        (true, vec![start, end], false, Some(unreadable)),
        (false, vec![], false, None),
        (false, vec![start], false, Some(unreadable)),
        (false, vec![end], false, Some(unreadable)),
    ] {
        let world = World::new(1);
        let store = Store::new(DISK, 0);
        let pool = Pool::new(Box::new(SimMemory(memory())));
        let disk = given(&world, 0, &store).disk;
        let said = world.block_on(async move {
            if labelled {
                label(&disk, &pool, SYSTEM, uuid(0)).await.unwrap();
            }
            store.faults.bad.borrow_mut().extend(&bad);
            let store = Rc::clone(&store);
            let probe = probe(&disk, "/dev/disk0", &pool).await;
            store.faults.bad.borrow_mut().clear();
            probe
        });
        assert_eq!(said.label.is_some(), found, "{said:?}");
        assert_eq!(
            said.problem
                .as_deref()
                .map(|text| text.contains(unreadable)),
            problem.map(|_| true),
            "{said:?}"
        );
    }
}

const OTHER: SystemUuid = SystemUuid::from_bytes([0x77; 16]);

/// Given a disk of one system, when another takes it over, then it says so in both copies, and a second time nothing is
/// written; for a third system, or as a member, it is not taken.
#[test]
fn a_disk_is_taken_over_from_the_system_that_has_it() {
    let world = World::new(1);
    let store = Store::new(DISK, 0);
    let pool = Pool::new(Box::new(SimMemory(memory())));
    let disk = given(&world, 0, &store).disk;
    let end = lay_out(DISK as u64).unwrap().end_copy / 512;
    world.block_on(async move {
        label(&disk, &pool, SYSTEM, uuid(0)).await.unwrap();
        let third = SystemUuid::from_bytes([0x78; 16]);
        let group = GroupUuid::from_bytes([5; 16]);
        assert!(
            adopt(&disk, &pool, GroupUuid::NIL, third, OTHER)
                .await
                .is_err()
        );
        assert!(adopt(&disk, &pool, group, SYSTEM, OTHER).await.is_err());
        let said = probe(&disk, "d", &pool).await.label.unwrap();
        assert_eq!((said.system, said.generation), (SYSTEM, 1));
        let written = adopt(&disk, &pool, GroupUuid::NIL, SYSTEM, OTHER).await;
        assert!(written.unwrap());
        assert!(
            !adopt(&disk, &pool, GroupUuid::NIL, SYSTEM, OTHER)
                .await
                .unwrap()
        );
        for bad in [end, 4096 / 512] {
            store.faults.bad.borrow_mut().clear();
            store.faults.bad.borrow_mut().insert(bad);
            let said = probe(&disk, "d", &pool).await.label.unwrap();
            assert_eq!(
                (said.system, said.disk, said.generation),
                (OTHER, uuid(0), 2)
            );
            assert!(said.damaged.is_some_and(|text| text.contains("copy")));
        }
        store.faults.bad.borrow_mut().clear();
        assert_eq!(probe(&disk, "d", &pool).await.label.unwrap().damaged, None);
    });
}
