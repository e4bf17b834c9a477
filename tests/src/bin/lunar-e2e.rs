//! End-to-end tests: real `/dev/ublkbN`, real file systems, real kills. Run by `tests/run.sh e2e` in the lab.
//!
//! `lunar-e2e [FILTER]` runs those whose name contains FILTER; `--list` lists them.

use libtest_mimic::{Arguments, Failed, Trial};
use lunar_tests::e2e::shell::Failure;

fn main() {
    let mut args = Arguments::from_args();
    // One machine, one /run/lunar: never two at once.
    args.test_threads = Some(1);
    let trials = lunar_tests::e2e::tests()
        .into_iter()
        .map(
            |(name, test): (String, Box<dyn FnOnce() -> Result<(), Failure> + Send>)| {
                Trial::test(name, move || test().map_err(Failed::from))
            },
        )
        .collect();
    libtest_mimic::run(&args, trials).exit();
}
