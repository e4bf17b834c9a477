//! The simulator in small: what `tests/run.sh sim` does with many seeds in a build that is fast, it does here with few.

use lunar_tests::sim::plan::Plan;
use lunar_tests::sim::sweep::{run_plan, run_seed};

#[test]
fn seeds_keep_the_laws_and_repeat_exactly() {
    for seed in [2, 5, 9] {
        let outcome = run_seed(seed, true);
        assert_eq!(outcome.violation, None, "seed {seed}");
        assert!(outcome.tally.requests > 0);
    }
}

#[test]
fn other_seed_is_another_run() {
    let hash = |seed| run_plan(&Plan::draw(seed), None).hash;
    assert_ne!(hash(2), hash(5));
}
