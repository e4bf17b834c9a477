//! Runs the simulator: `lunar-sim --seeds 500`, `lunar-sim --seconds 3600 --from 1000`, `lunar-sim --seed 17`.
//!
//! What it prints is read by `tests/run.sh`: a line `test NAME ... ok` or `... FAILED` of each thing that it has looked for.

use std::fs;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use lunar_api::target::Consistency;
use lunar_tests::sim::shrink::{Kept, parse, shrink};
use lunar_tests::sim::sweep::{Sweep, find_hole, run_plan};

const USAGE: &str =
    "lunar-sim [--seeds N] [--seconds N] [--from SEED] [--threads N] [--most-failed N] [--keep]
lunar-sim --all          the default seeds, kept runs, planted bugs, the write hole
lunar-sim --run 'SEED [without N,N..] [load N]'
lunar-sim --kept | --planted | --bug NAME | --hole   (with --seeds, --from, --threads)";

/// Seeds that are run by default.
const SEEDS: u64 = 500;
/// Failing runs that are shrunk, and runs that each may cost.
const SHRUNK: usize = 3;
const SHRINK_RUNS: u32 = 150;
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/seeds/kept.txt");

struct Asked {
    sweep: Sweep,
    keeps: bool,
    sweeps: bool,
    kept: bool,
    planted: bool,
    hole: bool,
    /// Of planted bugs only those whose name has this in it.
    bug: String,
    one: Option<Kept>,
}

fn asked() -> Result<Asked, String> {
    let mut asked = Asked {
        sweep: Sweep {
            from: 1,
            seeds: SEEDS,
            time: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            most_failed: 20,
        },
        keeps: false,
        sweeps: true,
        kept: false,
        planted: false,
        hole: false,
        bug: String::new(),
        one: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut text = || args.next().ok_or_else(|| USAGE.to_owned());
        let number = |text: String| -> Result<u64, String> {
            text.parse().map_err(|_| format!("{text} is no number"))
        };
        let count = |n: u64| usize::try_from(n).map_err(|_| format!("{n} is too much"));
        match arg.as_str() {
            "--seeds" => asked.sweep.seeds = number(text()?)?,
            "--seconds" => {
                asked.sweep.time = Some(Duration::from_secs(number(text()?)?));
                asked.sweep.seeds = u64::MAX / 4;
            }
            "--from" => asked.sweep.from = number(text()?)?,
            "--threads" => asked.sweep.threads = count(number(text()?)?)?,
            "--most-failed" => asked.sweep.most_failed = count(number(text()?)?)?,
            "--keep" => asked.keeps = true,
            "--all" => (asked.kept, asked.planted, asked.hole) = (true, true, true),
            "--kept" => (asked.kept, asked.sweeps) = (true, false),
            "--planted" => (asked.planted, asked.sweeps) = (true, false),
            "--bug" => (asked.planted, asked.sweeps, asked.bug) = (true, false, text()?),
            "--hole" => (asked.hole, asked.sweeps) = (true, false),
            "--run" => asked.one = Some(text()?.parse()?),
            _ => return Err(USAGE.to_owned()),
        }
    }
    Ok(asked)
}

fn main() -> ExitCode {
    let asked = match asked() {
        Ok(asked) => asked,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if let Some(kept) = &asked.one {
        return code(run_one(kept));
    }
    // What a failed assertion says is told with its seed.
    std::panic::set_hook(Box::new(|_| {}));
    let mut is_ok = true;
    if asked.kept {
        is_ok &= run_kept();
    }
    if asked.sweeps {
        is_ok &= run_sweep(&asked);
    }
    if asked.hole {
        is_ok &= find_holes(&asked.sweep);
    }
    if asked.planted {
        is_ok &= find_planted(&asked.sweep, &asked.bug);
    }
    code(is_ok)
}

fn code(is_ok: bool) -> ExitCode {
    match is_ok {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// Tells how a test ended.
fn test(name: &str, is_ok: bool) -> bool {
    println!("test {name} ... {}", if is_ok { "ok" } else { "FAILED" });
    is_ok
}

fn run_one(kept: &Kept) -> bool {
    let mut plan = kept.plan();
    println!("{plan:#?}");
    plan.is_loud = true;
    let outcome = run_plan(&plan, None);
    print!("{}", outcome.tally);
    println!("trace {:x}", outcome.hash);
    if let Some(violation) = &outcome.violation {
        println!("{kept}: {:?}: {}", violation.law, violation.text);
    }
    outcome.violation.is_none()
}

fn run_kept() -> bool {
    let file = fs::read_to_string(KEPT).unwrap_or_default();
    let all = match parse(&file) {
        Ok(all) => all,
        Err(text) => {
            println!("{KEPT}: {text}");
            return test("sim_kept", false);
        }
    };
    let mut is_ok = true;
    for kept in all {
        let violation = run_plan(&kept.plan(), None).violation;
        if let Some(violation) = &violation {
            println!("{kept}: {:?}: {}", violation.law, violation.text);
        }
        let name = kept.to_string().replace([' ', ','], "_");
        is_ok &= test(&format!("sim_kept_{name}"), violation.is_none());
    }
    is_ok
}

fn run_sweep(asked: &Asked) -> bool {
    let swept = asked.sweep.run();
    print!("{}", swept.tally);
    let seconds = swept.took.as_secs_f64();
    let rate = swept.tally.runs as f64 / seconds;
    println!("{seconds:.1} s, {rate:.2} seeds a second");
    for (seed, violation) in &swept.failed {
        println!("seed {seed}: {:?}: {}", violation.law, violation.text);
    }
    for (seed, violation) in swept.failed.iter().take(SHRUNK).filter(|_| asked.keeps) {
        let kept = shrink(*seed, violation.law, None, SHRINK_RUNS);
        println!("shrunk: lunar-sim --run '{kept}'");
        keep(&kept, &format!("{:?}: {}", violation.law, violation.text));
    }
    let mut is_ok = test("sim_seeds_keep_the_laws", swept.failed.is_empty());
    // What fewer seeds have not seen says nothing.
    if swept.tally.runs >= SEEDS && swept.failed.is_empty() {
        let missed = swept.tally.missed_states();
        if !missed.is_empty() {
            println!("no crash has hit {missed:?}");
        }
        is_ok &= test("sim_crashes_hit_every_state", missed.is_empty());
        let tally = &swept.tally;
        is_ok &= test("sim_mean_outstanding_is_8", tally.mean_outstanding() >= 8.0);
        is_ok &= test(
            "sim_30_percent_share_a_stripe",
            tally.sharing_percent() >= 30.0,
        );
        let third = tally.crash_and_loss_percent() >= 100.0 / 3.0;
        is_ok &= test("sim_a_third_see_crash_and_loss", third);
    }
    is_ok
}

fn keep(kept: &Kept, cause: &str) {
    let line = format!(
        "{kept}  # {}\n",
        cause.chars().take(100).collect::<String>()
    );
    let opened = fs::OpenOptions::new().append(true).create(true).open(KEPT);
    if let Err(error) = opened.and_then(|mut file| file.write_all(line.as_bytes())) {
        println!("{KEPT}: {error}");
    }
}

fn find_holes(sweep: &Sweep) -> bool {
    let mut is_ok = true;
    for (name, consistency) in [("none", Consistency::None), ("bitmap", Consistency::Bitmap)] {
        let found = find_hole(consistency, sweep.from, sweep.seeds);
        if let Some((seed, violation)) = &found {
            println!("the write hole of {name}: seed {seed}: {}", violation.text);
        }
        is_ok &= test(
            &format!("sim_sees_the_write_hole_of_{name}"),
            found.is_some(),
        );
    }
    is_ok
}

#[cfg(feature = "planted")]
fn find_planted(sweep: &Sweep, bug: &str) -> bool {
    use lunar_tests::sim::bugs::{all, hunt};

    let mut is_ok = true;
    let all = all();
    let asked = all
        .iter()
        .filter(|planted| planted.to_string().contains(bug));
    for planted in asked.copied() {
        let found = hunt(planted, sweep.from, sweep.seeds, sweep.threads);
        match &found {
            Some((seed, violation)) => {
                println!(
                    "{planted}: seed {seed}: {:?}: {}",
                    violation.law, violation.text
                );
            }
            None => println!("{planted}: not found by {} seeds", sweep.seeds),
        }
        is_ok &= test(&format!("sim_finds_{planted}"), found.is_some());
    }
    is_ok
}

#[cfg(not(feature = "planted"))]
fn find_planted(_: &Sweep, _: &str) -> bool {
    println!("built without the feature `planted`: nothing can be planted");
    test("sim_finds_planted_bugs", false)
}
