//! Runs the simulator: `lunar-sim --seeds 500`, `lunar-sim --seconds 3600 --from 1000`, `lunar-sim --seed 17`.

use std::process::ExitCode;
use std::time::Duration;

use lunar_tests::sim::plan::Plan;
use lunar_tests::sim::sweep::{Sweep, run_plan};

const USAGE: &str = "lunar-sim [--seeds N] [--seconds N] [--from SEED] [--threads N] [--most-failed N] | --seed SEED";

fn number(args: &mut impl Iterator<Item = String>) -> Result<u64, String> {
    let text = args.next().ok_or(USAGE)?;
    text.parse().map_err(|_| format!("{text} is no number"))
}

fn main() -> ExitCode {
    match command() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(text) => {
            eprintln!("{text}");
            ExitCode::from(2)
        }
    }
}

fn command() -> Result<bool, String> {
    let mut sweep = Sweep {
        from: 1,
        seeds: u64::MAX / 4,
        time: None,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        most_failed: 20,
    };
    let mut one = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seeds" => sweep.seeds = number(&mut args)?,
            "--seconds" => sweep.time = Some(Duration::from_secs(number(&mut args)?)),
            "--from" => sweep.from = number(&mut args)?,
            "--threads" => sweep.threads = number(&mut args)? as usize,
            "--most-failed" => sweep.most_failed = number(&mut args)? as usize,
            "--seed" => one = Some(number(&mut args)?),
            _ => return Err(USAGE.to_owned()),
        }
    }
    if let Some(seed) = one {
        return Ok(run_one(seed));
    }
    // Each violation is told in the end.
    std::panic::set_hook(Box::new(|_| {}));
    let swept = sweep.run();
    print!("{}", swept.tally);
    for (seed, violation) in &swept.failed {
        println!("seed {seed}: {:?}: {}", violation.law, violation.text);
    }
    let rate = swept.tally.runs as f64 / swept.took.as_secs_f64();
    println!(
        "{:.1} s, {rate:.2} seeds a second",
        swept.took.as_secs_f64()
    );
    Ok(swept.failed.is_empty())
}

fn run_one(seed: u64) -> bool {
    let mut plan = Plan::draw(seed);
    println!("{plan:#?}");
    plan.is_loud = true;
    let outcome = run_plan(&plan, None);
    print!("{}", outcome.tally);
    println!("trace {:x}", outcome.hash);
    match outcome.violation {
        Some(violation) => {
            println!("seed {seed}: {:?}: {}", violation.law, violation.text);
            false
        }
        None => true,
    }
}
