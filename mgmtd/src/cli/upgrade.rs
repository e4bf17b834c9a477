//! `upgrade`: what happens is shown while it happens; Ctrl-C ends the showing, not the upgrade.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lunar_api::mgmt::{self, EventsAsk, Request, StatusAsk};
use lunar_api::rows::{BuildRow, EventsReply, Outcome, ProgramRow, StatusReply, UpgradeReply};
use lunar_api::{ApiError, ErrorKind};

use crate::args::Args;
use crate::client::{Client, socket};
use crate::run::{absolute_path, flags, print};

/// Longest wait for the next event, and for its answer.
const WAIT_MS: u32 = 500;
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// Longest wait for the mgmtd that takes over.
const RESTART_LIMIT: Duration = Duration::from_secs(180);

pub(crate) fn run(
    args: &Args,
    client: &mut Client,
    check: bool,
    to: Option<&Path>,
) -> Result<u8, ApiError> {
    let (dry_run, yes) = flags(args);
    let request = Request::Upgrade(mgmt::UpgradeAsk {
        check,
        to: to.map(absolute_path),
        dry_run,
        yes,
    });
    client.wait_for_ever()?;
    let shown = Shown::begin(args, !check && !dry_run);
    let reply = client.call::<UpgradeReply>(&request);
    drop(shown);
    let reply = reply?;
    if reply.mgmtd_restarts {
        wait_for_mgmtd(args)?;
    }
    print(args, "upgrade", &reply, || text(&reply));
    Ok(reply.exit)
}

/// Waits until the next mgmtd serves, and has found what runs.
fn wait_for_mgmtd(args: &Args) -> Result<(), ApiError> {
    let path = socket(args.socket.as_deref(), args.system);
    let deadline = Instant::now() + RESTART_LIMIT;
    loop {
        let ask = Request::Status(StatusAsk { unhealthy: false });
        let asked = Client::open(&path, LOOK_LIMIT).and_then(|mut c| c.call::<StatusReply>(&ask));
        match asked {
            Ok(reply) if !reply.status.starting => return Ok(()),
            Err(error) if Instant::now() >= deadline => {
                let what = "mgmtd did not come back; the LUs are served";
                return Err(ApiError::new(ErrorKind::Unreachable, what)
                    .because(error.to_string())
                    .hint("systemctl status mgmtd; systemctl start mgmtd"));
            }
            Ok(_) if Instant::now() >= deadline => return Ok(()),
            Ok(_) | Err(_) => std::thread::park_timeout(Duration::from_millis(50)),
        }
    }
}

/// Tells events until it is dropped.
#[derive(Debug)]
struct Shown(Arc<AtomicBool>, Option<std::thread::JoinHandle<()>>);

impl Shown {
    fn begin(args: &Args, wanted: bool) -> Self {
        let ended = Arc::new(AtomicBool::new(!wanted || args.json));
        let path = socket(args.socket.as_deref(), args.system);
        let flag = Arc::clone(&ended);
        // The call itself says what is wrong.
        let thread = std::thread::spawn(move || drop(tell(&path, &flag)));
        Self(ended, Some(thread))
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
        let _ = self.1.take().map(std::thread::JoinHandle::join);
    }
}

fn tell(path: &Path, ended: &AtomicBool) -> Result<(), ApiError> {
    if ended.load(Ordering::Relaxed) {
        return Ok(());
    }
    let mut client = Client::open(path, LOOK_LIMIT)?;
    let mut ask = |after, wait_ms| -> Result<EventsReply, ApiError> {
        client.call(&Request::Events(EventsAsk { after, wait_ms }))
    };
    // Those before do not count; an answer has so many of them.
    let mut after = 0;
    while let Some(last) = ask(after, 0)?.events.last() {
        after = last.event;
    }
    while !ended.load(Ordering::Relaxed) {
        for event in ask(after, WAIT_MS)?.events {
            after = event.event;
            eprintln!("{}: {}", event.name, event.text);
        }
    }
    Ok(())
}

fn build(row: Option<&BuildRow>) -> String {
    let Some(row) = row else {
        return "-".into();
    };
    let mut out = Vec::new();
    if !row.version.is_empty() {
        out.push(format!("version {}", row.version));
    }
    if !row.commit.is_empty() {
        out.push(format!("commit {}", row.commit));
    }
    out.push(format!("build {}", row.build));
    match (row.protocol, row.format_min, row.format_max) {
        (Some(protocol), Some(min), Some(max)) => {
            out.push(format!("protocol {protocol}"));
            out.push(if min == max {
                format!("format {max}")
            } else {
                format!("formats {min} to {max}")
            });
        }
        _ => out.push("does not say which formats it reads: what it cannot read it refuses".into()),
    }
    out.join(", ")
}

fn program(row: &ProgramRow) -> String {
    let pid = row
        .pid
        .map_or("not running".into(), |pid| format!("process {pid}"));
    let mut out = format!("{}: {pid}\n", row.program);
    out += &format!("    runs: {}\n", build(row.running.as_ref()));
    let verdict = if row.changes { "" } else { " (the same)" };
    out += &format!("      at: {}{verdict}\n", row.path);
    if row.changes {
        out += &format!("          {}\n", build(row.installed.as_ref()));
    }
    for problem in &row.problems {
        out += &format!("  refused: {problem}\n");
    }
    out
}

fn text(reply: &UpgradeReply) -> String {
    if reply.outcome == Outcome::Changed {
        return reply.text.iter().map(|line| format!("{line}\n")).collect();
    }
    let mut out: String = reply.programs.iter().map(program).collect();
    if reply.exit != 0 {
        return out + "nothing would be upgraded: it does not fit\n";
    }
    if reply.outcome == Outcome::Unchanged {
        return out + "unchanged: what runs is what is installed\n";
    }
    for step in &reply.steps {
        out += &format!("would {step}\n");
    }
    out
}
