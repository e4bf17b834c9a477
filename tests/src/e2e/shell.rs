//! Commands with a time limit; what they said is in the failure.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a command gave.
#[derive(Debug, Clone)]
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Why a test failed.
pub type Failure = String;

/// Runs a program; `Err` only if it could not be run, or overran its limit (then it was killed).
pub fn run(program: &str, args: &[&str], seconds: u64) -> Result<Output, Failure> {
    let what = || format!("{program} {}", args.join(" "));
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: {error}", what()))?;
    let mut out = child.stdout.take().ok_or("no stdout")?;
    let mut err = child.stderr.take().ok_or("no stderr")?;
    let read_out = std::thread::spawn(move || read_all(&mut out));
    let read_err = std::thread::spawn(move || read_all(&mut err));
    let limit = Instant::now() + Duration::from_secs(seconds);
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| error.to_string())? {
            break status;
        }
        if Instant::now() > limit {
            let _ = child.kill();
            return Err(format!("{}: no end in {seconds} s", what()));
        }
        pause(5);
    };
    let stdout = read_out.join().map_err(|_| "reader died")?;
    let stderr = read_err.join().map_err(|_| "reader died")?;
    Ok(Output {
        code: status.code().unwrap_or(-1),
        stdout,
        stderr,
    })
}

fn read_all(from: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    let _ = from.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Waits some milliseconds: the step of a loop that has a limit of its own.
pub fn pause(ms: u64) {
    #[allow(clippy::disallowed_methods)]
    std::thread::sleep(Duration::from_millis(ms));
}

/// Runs a bash script with the functions of `fixtures/members.sh`; fails unless it exits 0.
pub fn sh(script: &str) -> Result<String, Failure> {
    sh_in(script, 120)
}

/// As [`sh`], with a limit in seconds.
pub fn sh_in(script: &str, seconds: u64) -> Result<String, Failure> {
    let text = format!("set -eu -o pipefail; . fixtures/members.sh\n{script}");
    let output = run("bash", &["-c", &text], seconds)?;
    if output.code != 0 {
        return Err(format!(
            "`{script}` exited {}: {}{}",
            output.code, output.stdout, output.stderr
        ));
    }
    Ok(output.stdout.trim().to_owned())
}

/// Waits until `done` is true, at most so many seconds.
pub fn until(
    what: &str,
    seconds: u64,
    mut done: impl FnMut() -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let limit = Instant::now() + Duration::from_secs(seconds);
    while !done()? {
        if Instant::now() > limit {
            return Err(format!("{what}: not in {seconds} s"));
        }
        pause(50);
    }
    Ok(())
}
