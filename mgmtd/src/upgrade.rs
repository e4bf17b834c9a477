//! Puts one ublk-target in the place of another while the LUs are in use, and goes back where the new one does not do.
//!
//! # Order
//! 1. Look: what runs, what is to run, and what that says of itself and of the disks. Nothing is touched before it all fits.
//! 2. Hand over: devices are quiesced (requests in flight end, new ones wait in the kernel), groups closed, the old one ends.
//!    One that does not know how is quiesced from outside, and killed. What goes wrong here is no way back: it is killed too.
//! 3. The supervisor starts the new one, which recovers the devices, as after a death.
//! 4. Everything that was up must be up again; else the new one is ended and the old one started, from its open file:
//!    at its path the new one may lie.
//! 5. mgmtd becomes the new mgmtd, by exec: its process stays, and whoever supervises it.
//!
//! # Crash  of mgmtd, anywhere: the next one starts what is installed, or finds what runs; devices wait in the kernel

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crc_fast::{CrcAlgorithm, Digest};
use lunar_api::build::{Build, Reading};
use lunar_api::rows::BuildRow;
use lunar_api::target::{GroupState, GroupStatus, TargetAnswer, TargetRequest};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Command;
use tokio::sync::oneshot;

use crate::daemon::{About, Daemon};
use crate::limits::{COMMAND_LIMIT, HAND_OVER_LIMIT};

/// What is remembered of an upgrade of ublk-target that is under way.
#[derive(Debug)]
pub struct Turn {
    /// What serves on if the new one does not do; none: it is on its way back.
    back: Option<PathBuf>,
    /// What was up before.
    groups: Vec<GroupStatus>,
    why: String,
    tell: Option<oneshot::Sender<Result<(), String>>>,
}

/// How the old one let go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HandedOver {
    pub lus: u32,
    /// Milliseconds; none: it was killed.
    pub quiesced_ms: Option<u64>,
}

/// Adds the bytes of a program to a checksum, which is what this build is called by.
fn digest(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut sum = Digest::new(CrcAlgorithm::Crc64Nvme);
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(format!("{:016x}", sum.finalize())),
            len => sum.update(&piece[..len]),
        }
    }
}

/// Runs a program for what it prints.
async fn ask(path: &Path, args: &[String]) -> Result<Vec<u8>, String> {
    let mut command = Command::new(path);
    command
        .args(args)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(COMMAND_LIMIT, command.output()).await;
    let output = output
        .map_err(|_| format!("no answer in {} s", COMMAND_LIMIT.as_secs()))?
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or_default();
    Err(format!("{}: {said}", output.status))
}

/// A program file, and what it says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    pub path: PathBuf,
    pub digest: String,
    /// None: it is older than the question.
    pub build: Option<Build>,
}

impl Program {
    /// Looks at a program; `args` are those that it is to be started with.
    ///
    /// # Errors  it is not there, or cannot be run
    pub async fn look(path: &Path, args: &[String]) -> Result<Self, String> {
        let at = path.to_path_buf();
        let digest = tokio::task::spawn_blocking(move || digest(&at)).await;
        let digest = digest
            .map_err(|error| error.to_string())?
            .map_err(|error| error.to_string())?;
        let args = [args, &["--build-info".to_owned()]].concat();
        let build = match ask(path, &args).await {
            Ok(text) => serde_json::from_slice(&text).ok(),
            // Older than the question, or broken: then it does not answer this one either.
            Err(why) => {
                let version = ask(path, &["--version".to_owned()]).await;
                version.map_err(|_| format!("it does not run: {why}"))?;
                None
            }
        };
        Ok(Self {
            path: path.into(),
            digest,
            build,
        })
    }

    /// As it is told.
    pub fn row(&self) -> BuildRow {
        let build = self.build.clone().unwrap_or_default();
        let said = |number: u32| self.build.is_some().then_some(number);
        BuildRow {
            version: build.version,
            commit: build.commit,
            build: self.digest.clone(),
            protocol: said(build.protocol),
            format_min: said(build.format_min),
            format_max: said(build.format_max),
        }
    }
}

/// Asks a ublk-target which of these disks it could not serve, and why. One older than the question says nothing: what it
/// cannot read it refuses when it starts.
pub async fn unreadable(program: &Path, disks: Vec<String>) -> Result<Vec<Reading>, String> {
    if disks.is_empty() {
        return Ok(Vec::new());
    }
    let args = [vec!["can-read".to_owned()], disks].concat();
    let text = ask(program, &args).await?;
    let readings: Vec<Reading> = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    Ok(readings
        .into_iter()
        .filter(|reading| reading.problem.is_some())
        .collect())
}

/// Has the supervisor start `to` next, and `back` if that does not do. The answer comes when one of them serves.
pub fn begin(daemon: &Daemon, to: PathBuf, back: PathBuf) -> oneshot::Receiver<Result<(), String>> {
    let (tell, told) = oneshot::channel();
    let groups = daemon.live().groups.values().cloned().collect();
    *daemon.upgrade() = Some(Turn {
        back: Some(back),
        groups,
        why: String::new(),
        tell: Some(tell),
    });
    *daemon.target_bin() = to;
    told
}

/// Has the running ublk-target give its devices up and end. `helper`: a ublk-target that quiesces them if it cannot.
pub async fn hand_over(daemon: &Daemon, helper: &Path) -> HandedOver {
    let pid = daemon.live().target_pid;
    let devices: Vec<String> = daemon
        .lus()
        .iter()
        .filter_map(|lu| lu.ublk)
        .map(|ublk| ublk.to_string())
        .collect();
    let asked = daemon
        .ask_apart(&TargetRequest::HandOver, HAND_OVER_LIMIT)
        .await;
    let lus = u32::try_from(devices.len()).unwrap_or(u32::MAX);
    let mut out = HandedOver {
        lus,
        quiesced_ms: None,
    };
    match asked {
        Ok(TargetAnswer::HandedOver {
            lus, quiesced_ms, ..
        }) => {
            return HandedOver {
                lus,
                quiesced_ms: Some(quiesced_ms),
            };
        }
        // It has never heard of it: nothing has begun.
        Err(error) if error.kind == lunar_api::ErrorKind::Usage && !devices.is_empty() => {
            let begun = std::time::Instant::now();
            let args = [vec!["quiesce".to_owned()], devices].concat();
            match ask(helper, &args).await {
                Ok(_) => out.quiesced_ms = u64::try_from(begun.elapsed().as_millis()).ok(),
                Err(why) => say_killed(daemon, &why),
            }
        }
        Err(error) if error.kind == lunar_api::ErrorKind::Usage => {}
        Err(error) => say_killed(daemon, &format!("{error}: {}", error.causes.join(": "))),
        Ok(_) => say_killed(daemon, "the wrong kind of answer"),
    }
    if let Some(pid) = pid.and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    out
}

fn say_killed(daemon: &Daemon, why: &str) {
    let text = format!(
        "the devices could not be quiesced, ublk-target is killed and recovered from: {why}"
    );
    daemon.event("HandOverFailed", About::default(), text);
}

/// What was up before and is not now, and why.
fn missing(daemon: &Daemon, before: &[GroupStatus]) -> Vec<String> {
    let live = daemon.live();
    let mut out = Vec::new();
    for group in before {
        let name = &group.name;
        let serves = |state| !matches!(state, GroupState::Failed | GroupState::Stopped);
        match live.groups.get(&group.group) {
            Some(now) if serves(now.state) || !serves(group.state) => {
                let lus = group.lus.iter().filter(|lu| lu.problem.is_empty());
                for lu in lus {
                    let now = now.lus.iter().find(|other| other.lu == lu.lu);
                    let problem = now.map_or("it is gone", |lu| lu.problem.as_str());
                    if !problem.is_empty() {
                        out.push(format!("LU {}: {problem}", lu.name));
                    }
                }
            }
            Some(now) => out.push(format!("group {name}: {}", now.reason)),
            None => {
                let problem = live.problems.get(&group.group);
                let why = problem.map_or("it is not started", |problem| problem.why.as_str());
                out.push(format!("group {name}: {why}"));
            }
        }
    }
    out
}

/// The groups that a successor has to bring up beside those that were seen last: a ublk-target that did not do may have
/// left some out.
pub fn left_out(daemon: &Daemon) -> Vec<GroupStatus> {
    match daemon.upgrade().as_ref() {
        Some(turn) if turn.back.is_none() => turn.groups.clone(),
        _ => Vec::new(),
    }
}

/// A ublk-target has come up, and has brought up what it could.
pub async fn came_up(daemon: &Daemon) {
    let Some(groups) = daemon.upgrade().as_ref().map(|turn| turn.groups.clone()) else {
        return;
    };
    let missing = missing(daemon, &groups);
    if missing.is_empty() || !go_back(daemon, missing.join("; ")) {
        end(daemon, missing);
        return;
    }
    let helper = daemon.target_bin().clone();
    hand_over(daemon, &helper).await;
}

/// A ublk-target did not come up.
pub fn did_not_come_up(daemon: &Daemon, why: &str) {
    go_back(daemon, why.to_owned());
}

/// Whether the old one is to be started; else there is none, or it is what was tried.
fn go_back(daemon: &Daemon, why: String) -> bool {
    let mut held = daemon.upgrade();
    let Some(turn) = held.as_mut() else {
        return false;
    };
    let Some(back) = turn.back.take() else {
        return false;
    };
    *daemon.target_bin() = back;
    turn.why.clone_from(&why);
    drop(held);
    let text = format!("the new ublk-target does not do, the old one is started again: {why}");
    daemon.event("UpgradeFailed", About::default(), text);
    true
}

fn end(daemon: &Daemon, missing: Vec<String>) {
    let Some(turn) = daemon.upgrade().take() else {
        return;
    };
    let result = match (turn.why.is_empty(), missing.is_empty()) {
        (true, true) => Ok(()),
        (false, true) => Err(turn.why),
        (_, false) => Err(format!(
            "{}; also with the old one: {}",
            turn.why,
            missing.join("; ")
        )),
    };
    if let Some(tell) = turn.tell {
        let _ = tell.send(result);
    }
}

/// Where this mgmtd was started from, whatever lies there now.
///
/// # Errors  /proc does not say
pub fn own_path() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let text = path.to_string_lossy();
    Ok(text
        .strip_suffix(" (deleted)")
        .map_or(path.clone(), PathBuf::from))
}

/// Becomes another mgmtd, with the same arguments. Returns only if that cannot be.
pub fn become_it(program: &Path) -> io::Error {
    use std::os::unix::process::CommandExt;
    std::process::Command::new(program)
        .args(std::env::args_os().skip(1))
        .exec()
}

/// Longest wait for a new ublk-target to serve, or for the old one to serve again: each opens disks that a dead one's
/// I/O may hold, and starts groups.
pub const UPGRADE_LIMIT: Duration = Duration::from_secs(200);
