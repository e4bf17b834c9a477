//! Many seeds, on some threads: what they have seen, and what they have found.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lunar_api::target::Consistency;

use super::plan::Plan;
use super::run::{Law, Outcome, Plant, Violation, run};
use super::tally::Tally;

/// Of so many seeds one runs twice.
const TWICE: u64 = 8;

/// Runs a plan; an assertion that fails is a law that was broken.
pub fn run_plan(plan: &Plan, plant: Option<Plant>) -> Outcome {
    match catch_unwind(AssertUnwindSafe(|| run(plan, plant))) {
        Ok(outcome) => outcome,
        Err(payload) => {
            let text = payload
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string));
            let text = text.unwrap_or_else(|| "a panic without words".to_owned());
            Outcome {
                violation: Some(Violation::new(Law::Asserts, text)),
                hash: 0,
                tally: Tally::new(),
            }
        }
    }
}

/// The first of some seeds that shows the write hole of a policy: a run that breaks the law of data as soon as nothing is
/// exempt, and does not as it is.
pub fn find_hole(consistency: Consistency, from: u64, seeds: u64) -> Option<(u64, Violation)> {
    (from..from + seeds).find_map(|seed| {
        let mut plan = Plan::draw(seed);
        if !plan.config.level.has_parity() || plan.config.consistency != consistency {
            return None;
        }
        plan.has_no_hole = true;
        let found = run_plan(&plan, None).violation;
        let found = found.filter(|violation| violation.law == Law::Data)?;
        plan.has_no_hole = false;
        run_plan(&plan, None)
            .violation
            .is_none()
            .then_some((seed, found))
    })
}

/// Runs a seed; some run twice, and have to be the same.
pub fn run_seed(seed: u64, is_twice: bool) -> Outcome {
    let plan = Plan::draw(seed);
    let mut outcome = run_plan(&plan, None);
    if is_twice && outcome.violation.is_none() {
        let again = run_plan(&plan, None);
        if again.hash != outcome.hash {
            let text = format!("trace {:x}, then {:x}", outcome.hash, again.hash);
            outcome.violation = Some(Violation::new(Law::Repeats, text));
        }
    }
    outcome
}

/// What is swept.
#[derive(Debug, Clone, Copy)]
pub struct Sweep {
    pub from: u64,
    /// Seeds at most.
    pub seeds: u64,
    pub time: Option<Duration>,
    pub threads: usize,
    /// Failing seeds after which it ends.
    pub most_failed: usize,
}

/// What a sweep came to.
#[derive(Debug)]
pub struct Swept {
    pub tally: Tally,
    /// By seed.
    pub failed: Vec<(u64, Violation)>,
    pub took: Duration,
}

impl Sweep {
    /// Runs seed after seed.
    pub fn run(self) -> Swept {
        let begun = Instant::now();
        let next = AtomicU64::new(self.from);
        let found = Mutex::new((Tally::new(), Vec::new()));
        thread::scope(|scope| {
            for _ in 0..self.threads.max(1) {
                scope.spawn(|| {
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        let is_late = self.time.is_some_and(|time| begun.elapsed() >= time);
                        if seed >= self.from.saturating_add(self.seeds) || is_late {
                            return;
                        }
                        let outcome = run_seed(seed, seed.is_multiple_of(TWICE));
                        let mut found = found.lock().expect("no thread panics with it");
                        found.0.add(&outcome.tally);
                        if let Some(violation) = outcome.violation {
                            found.1.push((seed, violation));
                            if found.1.len() >= self.most_failed {
                                next.store(u64::MAX / 2, Ordering::Relaxed);
                            }
                        }
                    }
                });
            }
        });
        let (tally, mut failed) = found.into_inner().expect("no thread panics with it");
        failed.sort_by_key(|one: &(u64, Violation)| one.0);
        Swept {
            tally,
            failed,
            took: begun.elapsed(),
        }
    }
}
