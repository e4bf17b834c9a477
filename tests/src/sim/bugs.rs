//! Planted bugs: each has to be found within the default seeds, or the simulator is blind there.
//!
//! A bug of the engine is a [`Bug`] of `planted.rs`, a branch that is constant false in every other build; one of a disk is a
//! [`Plant`]. A new one: a line in `Bug` or a function here, and a line in the table.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use lunar_engine::planted::{Bug, plant};

use super::plan::Plan;
use super::run::{Plant, Run, Violation};
use super::sweep::run_plan;

/// A bug.
#[derive(Debug, Clone, Copy)]
pub enum Planted {
    Engine(Bug),
    Disk(&'static str, Plant),
}

impl std::fmt::Display for Planted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Engine(bug) => write!(f, "{bug:?}"),
            Self::Disk(name, _) => write!(f, "{name}"),
        }
    }
}

fn disk_ignores_flush(run: &Run) {
    run.disk(0).faults.ignores_flush.set(true);
}

fn disk_ignores_fua(run: &Run) {
    run.disk(1.min(run.disks.len() as u8 - 1))
        .faults
        .ignores_fua
        .set(true);
}

/// All of them.
pub fn all() -> Vec<Planted> {
    let engine = Bug::ALL.iter().map(|bug| Planted::Engine(*bug));
    let disks = [
        Planted::Disk("DiskIgnoresFlush", disk_ignores_flush),
        Planted::Disk("DiskIgnoresFua", disk_ignores_fua),
    ];
    engine.chain(disks).collect()
}

fn run_with(planted: Planted, seed: u64) -> Option<Violation> {
    let (bug, on_disks) = match planted {
        Planted::Engine(bug) => (Some(bug), None),
        Planted::Disk(_, on_disks) => (None, Some(on_disks)),
    };
    plant(bug);
    let outcome = run_plan(&Plan::draw(seed), on_disks);
    plant(None);
    outcome.violation
}

/// The first seed of some that finds a bug.
pub fn hunt(planted: Planted, from: u64, seeds: u64, threads: usize) -> Option<(u64, Violation)> {
    let next = AtomicU64::new(from);
    let found: Mutex<Option<(u64, Violation)>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= from + seeds {
                        return;
                    }
                    if let Some(violation) = run_with(planted, seed) {
                        let mut found = found.lock().expect("no thread panics with it");
                        if found.as_ref().is_none_or(|before| seed < before.0) {
                            *found = Some((seed, violation));
                        }
                        next.store(u64::MAX / 2, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    found.into_inner().expect("no thread panics with it")
}
