//! Tables of the benchmarks, from the CSVs that `tests/bench.sh` wrote.
//!
//! `lunar-bench-report report DIR` prints all tables as Markdown, `lunar-bench-report progress CSV WORKLOAD` one
//! workload for the screen. Exit 1, and the line is named, if a file is not what it should be.

use std::path::Path;
use std::process::ExitCode;

use lunar_tests::bench::{parse_goals, parse_set, progress, report};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["report", dir] => all(Path::new(dir)),
        ["progress", csv, workload] => read_set(Path::new(csv)).map(|set| progress(&set, workload)),
        _ => Err("Try: lunar-bench-report report DIR | progress CSV WORKLOAD".to_owned()),
    };
    match result {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn read(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|why| format!("{}: {why}", path.display()))
}

fn read_set(path: &Path) -> Result<lunar_tests::bench::Set, String> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    parse_set(&name, &read(path)?)
}

fn all(dir: &Path) -> Result<String, String> {
    let goals = parse_goals(&read(&dir.join("goals.txt"))?)?;
    let entries = std::fs::read_dir(dir).map_err(|why| format!("{}: {why}", dir.display()))?;
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|kind| kind == "csv"));
    paths.sort();
    let sets: Result<Vec<_>, _> = paths.iter().map(|path| read_set(path)).collect();
    Ok(report(&sets?, &goals))
}
