//! End-to-end tests: real `/dev/ublkbN`, real file systems, real kills. Run by `tests/run.sh e2e` in the lab.
//!
//! `lunar-e2e [FILTER]` runs those whose name contains FILTER; `--list` lists them. Tests called `long_..` are the
//! rest of matrices whose corners always run: they are there with `--long` first, or with LUNAR_E2E_LONG=1.

use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};
use lunar_tests::e2e::shell::Failure;

fn main() {
    let mut words: Vec<_> = std::env::args_os().collect();
    if words.get(1).is_some_and(|word| word == "--hog") {
        let mib = words.get(2).and_then(|word| word.to_str()?.parse().ok());
        std::process::exit(lunar_tests::e2e::memory::hog(mib.unwrap_or(0)));
    }
    let asked = words.get(1).is_some_and(|word| word == "--long");
    if asked {
        words.remove(1);
    }
    let long = asked || std::env::var_os("LUNAR_E2E_LONG").is_some_and(|value| value == "1");
    let mut args = Arguments::from_iter(words);
    // One machine, one /run/lunar: never two at once.
    args.test_threads = Some(1);
    let trials = lunar_tests::e2e::tests()
        .into_iter()
        .filter(|(name, _)| long || !name.starts_with(lunar_tests::e2e::LONG))
        .map(
            |(name, test): (String, Box<dyn FnOnce() -> Result<(), Failure> + Send>)| {
                Trial::test(name.clone(), move || {
                    let begun = Instant::now();
                    let result = test().map_err(Failed::from);
                    let seconds = begun.elapsed().as_secs();
                    lunar_tests::e2e::figure(format!("{seconds} s {name}"));
                    result
                })
            },
        )
        .collect();
    let ended = libtest_mimic::run(&args, trials);
    for line in lunar_tests::e2e::figures() {
        println!("figure: {line}");
    }
    ended.exit();
}
