//! Tables of the benchmarks, from the CSVs that `tests/bench.sh` wrote.
//!
//! `lunar-bench-report report DIR` prints all tables as Markdown, `lunar-bench-report progress CSV WORKLOAD` one
//! workload for the screen. Exit 1, and the line is named, if a file is not what it should be.
//! `lunar-bench-report recovery PID DEVICE..` kills a server and prints how many milliseconds later the slowest of its
//! devices had completed a write.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use lunar_tests::bench::{parse_goals, parse_set, progress, report};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["report", dir] => all(Path::new(dir)),
        ["progress", csv, workload] => read_set(Path::new(csv)).map(|set| progress(&set, workload)),
        ["recovery", pid, devices @ ..] => recovery(pid, devices),
        _ => Err(
            "Try: lunar-bench-report report DIR | progress CSV WORKLOAD | recovery PID DEVICE.."
                .to_owned(),
        ),
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

/// One thread a device, each open before the kill: no start of a process is in the time.
fn recovery(pid: &str, devices: &[&str]) -> Result<String, String> {
    let pid = pid.parse().map_err(|why| format!("{pid}: {why}"))?;
    let open = |path: &&str| {
        let mut options = OpenOptions::new();
        options.write(true).custom_flags(nix::libc::O_DIRECT);
        options.open(path).map_err(|why| format!("{path}: {why}"))
    };
    let files: Vec<File> = devices.iter().map(open).collect::<Result<_, _>>()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL).map_err(|why| format!("{pid}: {why}"))?;
    let killed = Instant::now();
    let slowest = std::thread::scope(|scope| {
        let write = |file: File| move || write_4k(&file).map(|()| killed.elapsed());
        let writers: Vec<_> = files
            .into_iter()
            .map(|file| scope.spawn(write(file)))
            .collect();
        let ended = |writer: std::thread::ScopedJoinHandle<'_, Result<Duration, String>>| {
            writer.join().expect("a write does not panic")
        };
        writers
            .into_iter()
            .map(ended)
            .try_fold(Duration::ZERO, |all, one| Ok::<_, String>(all.max(one?)))
    })?;
    Ok(format!("{}\n", slowest.as_millis()))
}

fn write_4k(file: &File) -> Result<(), String> {
    const LEN: usize = 4096;
    let room = vec![0; 2 * LEN];
    let from = room.as_ptr().align_offset(LEN);
    file.write_all_at(&room[from..from + LEN], 0)
        .map_err(|why| why.to_string())
}
