//! Keeps one ublk-target alive: adopts a living one, starts a new one, brings the groups back after a death.
//!
//! ublk-target has its own session and, where possible, its own cgroup: the end of mgmtd is not its end.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use lunar_api::target::{GroupStatus, TargetAnswer, TargetRequest};
use lunar_api::{DiskUuid, GroupUuid};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tokio::sync::oneshot;

use crate::api::last_view;
use crate::daemon::{About, Daemon};
use crate::limits::{BACKOFF_MAX, DEATHS_MAX, START_LIMIT, STATUS_LIMIT};
use crate::memory::URGENT;
use crate::quarantine::{self, Crashes};
use crate::tables::DiskSave;
use crate::{boot, notify, upgrade};

/// Own cgroup (best effort, version 2 only: elsewhere that path is a plain directory), listening socket from 0 to 3, then exec: what cannot be done between fork and
/// exec without `unsafe`.
const EXEC: &str = "{ test -e /sys/fs/cgroup/cgroup.controllers && mkdir -p /sys/fs/cgroup/lunar-target && \
    echo $$ > /sys/fs/cgroup/lunar-target/cgroup.procs; } 2>/dev/null; \
    exec \"$@\" 3<&0 </dev/null";

/// Where the one that serves listens, in the run directory.
pub(crate) const TARGET_SOCKET: &str = "target.sock";
/// A connection breaks a moment before the process has ended.
const END_PAUSE: Duration = Duration::from_millis(500);

/// A running ublk-target.
#[derive(Debug)]
struct Running {
    /// Comes when the process has ended.
    ended: oneshot::Receiver<()>,
    pid: Pid,
    /// None: adopted, its exit status is its parent's.
    child: Option<Child>,
}

/// Runs for as long as mgmtd does.
pub async fn supervise(daemon: Arc<Daemon>) {
    let mut deaths: Vec<Instant> = Vec::new();
    let mut first = true;
    let mut crashes = Crashes::default();
    let mut were_up = Vec::new();
    loop {
        let up = bring_up(&daemon, &mut first, &mut were_up, &mut crashes).await;
        match up {
            Ok(mut running) => {
                upgrade::came_up(&daemon).await;
                let _ = (&mut running.ended).await;
                if died(&daemon, &mut running, &mut were_up).await {
                    return;
                }
            }
            Err(error) => {
                daemon.live().starting = false;
                daemon.event("TargetNotStarted", About::default(), error.to_string());
                upgrade::did_not_come_up(&daemon, &error.to_string());
            }
        }
        // The restart waits for no disk.
        let saving = Arc::clone(&daemon);
        tokio::spawn(async move { drop(saving.save().await) });
        let now = Instant::now();
        deaths.retain(|at| now.duration_since(*at) < Duration::from_secs(60));
        deaths.push(now);
        if let Some(over) = deaths.len().checked_sub(DEATHS_MAX) {
            let pause = Duration::from_secs(1 << over.min(6)).min(BACKOFF_MAX);
            tokio::time::sleep(pause).await;
        }
    }
}

/// Says how it ended; true if that was asked for.
async fn died(daemon: &Daemon, running: &mut Running, were_up: &mut Vec<GroupStatus>) -> bool {
    let status = match (&mut running.child, running.pid) {
        (Some(child), _) => child.try_wait().ok().flatten(),
        // A mgmtd that became this one was its parent: it is ours to bury.
        (None, pid) => {
            let _ = waitpid(pid, Some(WaitPidFlag::WNOHANG));
            None
        }
    };
    let how = match status {
        Some(status) => match status.signal() {
            Some(signal) => format!("killed by signal {signal}"),
            None => format!("ended with {}", status.code().unwrap_or_default()),
        },
        None => "ended".into(),
    };
    let recovering = !daemon.is_stopping();
    daemon.recovering.store(recovering, Ordering::Relaxed);
    // Taken before the next one answers: a read verb would find it without groups and forget them.
    were_up.extend(std::mem::take(&mut daemon.live().groups).into_values());
    for group in upgrade::left_out(daemon) {
        if were_up.iter().all(|other| other.group != group.group) {
            were_up.push(group);
        }
    }
    daemon.disconnect().await;
    if daemon.is_stopping() {
        return true;
    }
    let (name, next) = match daemon.upgrade().is_some() {
        true => ("TargetHandedOver", "another takes its place"),
        false => ("TargetDied", "it is started again"),
    };
    let text = format!("ublk-target {how}; {next}");
    daemon.event(name, About::default(), text);
    false
}

/// Adopts or starts ublk-target, and brings the groups up.
async fn bring_up(
    daemon: &Arc<Daemon>,
    first: &mut bool,
    were_up: &mut Vec<GroupStatus>,
    crashes: &mut Crashes,
) -> io::Result<Running> {
    // A recovery waits for no change: I/O stands still, and no change touches members of groups that were up.
    let is_first = *first;
    let turn = if is_first {
        Some(daemon.intent.lock().await)
    } else {
        None
    };
    let adopted = if is_first { adopt(daemon).await? } else { None };
    let running = match adopted {
        Some(running) => running,
        None => {
            count_crashes(daemon, crashes);
            start(daemon).await?
        }
    };
    let mut held = Vec::new();
    let result = async {
        if is_first {
            daemon.refresh().await?;
            boot::find_disks(daemon).await?;
            // One that was found dying is followed by one that looks at the disks.
            *first = false;
        } else {
            held = boot::recover_groups(daemon, were_up).await;
        }
        boot::start_groups(daemon, &mut held).await;
        // Unless it died again in the middle.
        if were_up.is_empty() {
            daemon.recovering.store(false, Ordering::Relaxed);
        }
        daemon.refresh().await
    };
    if let Err(error) = result.await {
        daemon.event(
            "StartIncomplete",
            About::default(),
            format!("{error}: {:?}", error.causes),
        );
    }
    drop(turn);
    daemon.live().starting = false;
    let _ = daemon.save().await;
    ready(daemon);
    tokio::spawn(follow(daemon.clone()));
    if !held.is_empty() {
        tokio::spawn(boot::start_held(daemon.clone(), held));
    }
    Ok(running)
}

/// Learns from what the last ublk-target left whether a group made it crash.
fn count_crashes(daemon: &Daemon, crashes: &mut Crashes) {
    for crash in quarantine::take(&daemon.config.run_dir) {
        let about = About::group(crash.group);
        let what = format!("ublk-target crashed: {}", quarantine::describe(&crash));
        daemon.event("TargetCrashed", about, what);
        if let Some(why) = crashes.count(&crash, Instant::now()) {
            daemon.event("GroupQuarantined", about, why.clone());
            daemon.live().quarantined.insert(crash.group, why);
        }
    }
}

fn ready(daemon: &Daemon) {
    let down = daemon.lus().iter().filter(|lu| lu.ublk.is_none()).count();
    let problems = daemon.live().problems.len();
    let all_well = down == 0 && problems == 0;
    let status = if all_well {
        "STATUS=every LU is up".to_string()
    } else {
        format!("STATUS={problems} groups and {down} LUs are not up: lunar status")
    };
    notify::notify(&format!("READY=1\n{status}"));
}

/// Looks for a living ublk-target at its socket.
async fn adopt(daemon: &Daemon) -> io::Result<Option<Running>> {
    match daemon.hello(STATUS_LIMIT).await {
        Ok(_) => {}
        Err(error) if error.message == "ublk-target is not running" => return Ok(None),
        // It lives but does not answer: a second one must never be started beside it.
        Err(error) => return Err(io::Error::other(format!("{error}; it is left alone"))),
    }
    let Some(pid) = daemon.live().target_pid else {
        return Ok(None);
    };
    daemon.event(
        "TargetAdopted",
        About::default(),
        format!("ublk-target {pid} was found running"),
    );
    Ok(Some(Running {
        ended: watch(pid)?,
        pid: Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?),
        child: None,
    }))
}

/// Watches a process, child or not, by its pidfd; the pid cannot be taken for another's.
fn watch(pid: u32) -> io::Result<oneshot::Receiver<()>> {
    let raw = i32::try_from(pid).map_err(io::Error::other)?;
    let pid = rustix::process::Pid::from_raw(raw).ok_or(io::ErrorKind::InvalidInput)?;
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let (tell, ended) = oneshot::channel();
    // A thread that sleeps in poll: one per ublk-target, gone when it is.
    std::thread::Builder::new()
        .name("pidfd".into())
        .spawn(move || {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            while poll(&mut fds, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
            let _ = tell.send(());
        })?;
    Ok(ended)
}

/// Makes the listening socket and starts ublk-target with it; or has one that waits take the place.
async fn start(daemon: &Daemon) -> io::Result<Running> {
    let run_dir = &daemon.config.run_dir;
    let program = daemon.target_bin().clone();
    let mut standby = daemon.standby().take();
    let standby = standby.take_if(|standby| standby.is_ready(&program));
    // Its end would be the other's until that has a connection.
    let (child, _owner) = match standby.map(|standby| standby.promote()) {
        Some(promoted) => promoted?,
        None => {
            let listening = listen_at(&run_dir.join(TARGET_SOCKET))?;
            (spawn(&program, run_dir, listening, None)?, None)
        }
    };
    std::fs::write(run_dir.join("target.pid"), format!("{}\n", child.id()))?;
    let mut running = Running {
        ended: watch(child.id())?,
        pid: Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?),
        child: Some(child),
    };
    let mut ended = false;
    let hello = tokio::select! {
        hello = daemon.hello(START_LIMIT) => hello.map(drop).map_err(io::Error::other),
        _ = &mut running.ended => {
            ended = true;
            Err(io::Error::other("it ended"))
        }
    };
    if let Err(error) = hello {
        let has_ended = ended
            || tokio::time::timeout(END_PAUSE, &mut running.ended)
                .await
                .is_ok();
        let mut how = error.to_string();
        // It is our child and serves nothing yet: end it, or the next one would stand beside it.
        if let Some(child) = &mut running.child {
            let _ = child.kill();
            if let (Ok(status), true) = (child.wait(), has_ended) {
                how = format!("it ended at once, {status}");
            }
        }
        return Err(io::Error::other(format!(
            "ublk-target does not start: {how}"
        )));
    }
    Ok(running)
}

pub(crate) fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    // Before anybody can connect: only root speaks to ublk-target.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(path, mode)?;
    listen(&fd, Backlog::new(16)?)?;
    Ok(fd)
}

/// `setsid` gives it its own session, the shell its cgroup and descriptor 3; both exec, the pid stays.
///
/// # Shape   `standby`: bytes that it takes before it waits to take the place of another; None: it serves at once
pub(crate) fn spawn(
    target: &Path,
    run_dir: &Path,
    listening: OwnedFd,
    standby: Option<usize>,
) -> io::Result<Child> {
    // Until it has recovered what another left, which others may wait for.
    let urgent = standby.map(|_| ["chrt", "--rr", URGENT]);
    let standby = standby.map(|bytes| format!("--standby={bytes}"));
    Command::new("setsid")
        .args(urgent.iter().flatten())
        .args(["sh", "-c", EXEC])
        .arg("ublk-target")
        .arg(target)
        .args(["--listen-fd", "3", "--run-dir"])
        .arg(run_dir)
        .args(standby)
        .stdin(Stdio::from(listening))
        .spawn()
}

/// Follows ublk-target's events until it ends.
async fn follow(daemon: Arc<Daemon>) {
    let Ok(mut link) = daemon.hello(STATUS_LIMIT).await else {
        return;
    };
    let mut after = 0;
    let mut seen = BTreeSet::new();
    loop {
        let wait_ms = if daemon.live().groups.values().any(|g| g.sync.is_some()) {
            2000
        } else {
            10_000
        };
        let ask = TargetRequest::Events { after, wait_ms };
        let limit = Duration::from_millis(wait_ms.into()) + STATUS_LIMIT;
        let Ok(Ok(TargetAnswer::Events { events })) = link.call(&ask, &[], limit).await else {
            return;
        };
        let mut failed = Vec::new();
        for event in events {
            if matches!(event.name.as_str(), "Fail" | "FailSpare") {
                failed.extend(event.disk.map(|disk| (disk, event.text.clone())));
            }
            after = after.max(event.seq);
            if let Some(group) = event.group
                && seen.insert(group)
            {
                named(&daemon, group).await;
            }
            let about = About {
                group: event.group,
                disk: event.disk,
                lu: event.lu,
            };
            let filled = event.name == "RebuildFinished" && about.disk.is_some();
            daemon.event(&event.name, about, event.text.clone());
            if filled {
                // md tells both.
                daemon.event("SpareActive", about, event.text);
            }
        }
        if daemon.refresh().await.is_ok() {
            note_failed(&daemon, failed);
        }
        let _ = daemon.save().await;
    }
}

/// Waits until a group is in the tables: the first that happens to a new one is told before who makes it was answered.
async fn named(daemon: &Daemon, group: GroupUuid) {
    const LOOKS: u32 = 20;
    for _ in 0..LOOKS {
        if daemon.tables().group(group).is_some() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A disk that failed and is in no group any more (it was being replaced, or was to replace one) must not pass for a free
/// one.
fn note_failed(daemon: &Daemon, failed: Vec<(DiskUuid, String)>) {
    let view = last_view(daemon);
    for (disk, why) in failed {
        let row = view.tables.disk(disk).filter(|d| d.was.is_none());
        if let Some(row) = row.filter(|_| view.member(disk).is_none()) {
            daemon.tables().put_disk(DiskSave {
                sick: Some(why),
                ..row.clone()
            });
        }
    }
}
