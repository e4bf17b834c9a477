//! ublk control commands, out of the way of everything else.
//!
//! A control command can block for ever (a device whose server hangs holds a lock that every other command
//! wants). So none runs in this process: a helper, forked before there are threads and descriptors, has children that
//! run one at a time, forks another where all are at work, and gives up on one that takes too long. It holds no
//! device, so that it never stands in the way of a recovery.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, bounded};
use libublk::sys;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::sandbox::{SandboxError, fork_single};
use crate::ublk::{Command, Control};

/// Children that wait for the next command; others end with theirs.
const IDLE_MAX: usize = 4;
/// Longest message: a command with its parameters as JSON.
const MESSAGE_MAX: usize = 16 << 10;
/// Commands in one message: 64 bytes and their frame are under 300 bytes of JSON each.
const COMMANDS_MAX: usize = 32;
/// START_DEV and END_USER_RECOVERY wait for every tag; TRY_STOP and DEL for I/O to drain.
const LIMIT_LONG: Duration = Duration::from_secs(30);
const LIMIT: Duration = Duration::from_secs(10);
/// Added before this side gives up on the helper itself.
const HELPER_SLACK: Duration = Duration::from_secs(5);

/// What a child of the helper does.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Job {
    Command(Command),
    /// Several that only read: the buffers of those that succeed, one after the other.
    Commands(Vec<Command>),
    /// STOP_DEV, if the block device can be opened exclusively: for kernels without TRY_STOP_DEV.
    StopUnheld(u32),
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
    job: Job,
    limit_ms: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Report {
    id: u64,
    /// Result of the command, negative errno, or None: it took too long or died.
    result: Option<i32>,
    buffer: Vec<u8>,
}

/// Why a control command did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    #[error("ublk command {name} on device {device} failed")]
    Failed {
        name: String,
        device: u32,
        #[source]
        source: io::Error,
    },
    #[error("ublk command {name} on device {device} did not end in {seconds} s and was given up")]
    Late {
        name: String,
        device: u32,
        seconds: u64,
    },
    #[error("the process for ublk control commands is gone")]
    Gone(#[source] io::Error),
}

impl ControlError {
    /// The kernel's errno, if it gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Failed { source, .. } => source.raw_os_error(),
            Self::Late { .. } | Self::Gone(_) => None,
        }
    }
}

type Waiting = Arc<Mutex<BTreeMap<u64, Sender<Report>>>>;

/// This side of the helper.
#[derive(Debug)]
pub(crate) struct ControlHelper {
    socket: OwnedFd,
    waiting: Waiting,
    next: AtomicU64,
}

/// The helper, forked but not attended yet.
#[derive(Debug)]
pub(crate) struct Forked(OwnedFd);

/// Forks the helper. While the process has one thread.
pub(crate) fn fork_helper() -> Result<Forked, SandboxError> {
    let (ours, theirs) = pair()?;
    if fork_single()?.is_some() {
        return Ok(Forked(ours));
    }
    drop(ours);
    serve(&theirs);
    std::process::exit(0);
}

fn pair() -> Result<(OwnedFd, OwnedFd), SandboxError> {
    let pair = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    );
    crate::sandbox::step("no socket pair", pair)
}

impl Forked {
    /// Starts the thread that hands reports to who waits for them.
    pub(crate) fn attend(self) -> io::Result<ControlHelper> {
        let waiting = Waiting::default();
        let (reports, socket) = (Arc::clone(&waiting), self.0.try_clone()?);
        std::thread::Builder::new()
            .name("control-reports".into())
            .stack_size(128 << 10)
            .spawn(move || hand_out(&socket, &reports))?;
        Ok(ControlHelper {
            socket: self.0,
            waiting,
            next: AtomicU64::new(1),
        })
    }
}

fn hand_out(socket: &OwnedFd, waiting: &Waiting) {
    let mut buffer = vec![0; MESSAGE_MAX];
    while let Ok(Some(report)) = receive::<Report>(socket.as_fd(), &mut buffer) {
        let to = waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&report.id);
        // Nobody waits for what was given up.
        if let Some(to) = to {
            let _ = to.send(report);
        }
    }
    // Dropping the senders tells everybody.
    waiting
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clear();
    tracing::error!("the process for ublk control commands is gone");
}

fn receive<T: for<'a> Deserialize<'a>>(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
) -> io::Result<Option<T>> {
    loop {
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(0) => return Ok(None),
            Ok(count) => return Ok(Some(serde_json::from_slice(&buffer[..count])?)),
        }
    }
}

fn put<T: Serialize>(socket: BorrowedFd<'_>, message: &T) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

impl ControlHelper {
    /// Runs a command; blocks for at most its limit.
    pub(crate) fn run(&self, command: Command) -> Result<(i32, Vec<u8>), ControlError> {
        let (name, device) = (command.name.clone(), command.device);
        let limit = match command.op {
            sys::UBLK_U_CMD_START_DEV
            | sys::UBLK_U_CMD_END_USER_RECOVERY
            | sys::UBLK_U_CMD_STOP_DEV
            | sys::UBLK_U_CMD_TRY_STOP_DEV
            | sys::UBLK_U_CMD_DEL_DEV => LIMIT_LONG,
            _ => LIMIT,
        };
        self.order(Job::Command(command), name, device, limit)
    }

    /// Runs several commands that only read; answers the buffers of those that succeeded.
    pub(crate) fn run_all(&self, commands: Vec<Command>) -> Result<Vec<u8>, ControlError> {
        let mut found = Vec::new();
        for part in commands.chunks(COMMANDS_MAX) {
            let (name, device) = (part[0].name.clone(), part[0].device);
            let job = Job::Commands(part.to_vec());
            found.extend(self.order(job, name, device, LIMIT)?.1);
        }
        Ok(found)
    }

    /// Stops a device that nobody has mounted or opened exclusively.
    pub(crate) fn stop_unheld(&self, device: u32) -> Result<(), ControlError> {
        let name = "STOP_DEV".to_owned();
        self.order(Job::StopUnheld(device), name, device, LIMIT_LONG)
            .map(drop)
    }

    fn order(
        &self,
        job: Job,
        name: String,
        device: u32,
        limit: Duration,
    ) -> Result<(i32, Vec<u8>), ControlError> {
        let began = Instant::now();
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (to, report) = bounded(1);
        self.waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(id, to);
        let limit_ms = u64::try_from(limit.as_millis()).expect("seconds");
        put(self.socket.as_fd(), &Order { id, job, limit_ms }).map_err(ControlError::Gone)?;
        let Ok(report) = report.recv_timeout(limit + HELPER_SLACK) else {
            let error = io::Error::other("no answer");
            return Err(ControlError::Gone(error));
        };
        tracing::debug!(name, device, result = report.result, took = ?began.elapsed(), "control command");
        match report.result {
            Some(result) if result >= 0 => Ok((result, report.buffer)),
            Some(errno) => {
                let source = io::Error::from_raw_os_error(-errno);
                Err(ControlError::Failed {
                    name,
                    device,
                    source,
                })
            }
            None => Err(ControlError::Late {
                name,
                device,
                seconds: limit.as_secs(),
            }),
        }
    }
}

// ---- the helper's own process ----

struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    /// None: it is to end.
    socket: Option<OwnedFd>,
    /// What it does, and how long it may.
    work: Option<(u64, Instant)>,
}

/// Serves until the other side is gone. Children that wait end with this; those that are at work are left to the kernel.
fn serve(socket: &OwnedFd) {
    let mut children: Vec<Child> = Vec::new();
    let mut buffer = vec![0; MESSAGE_MAX];
    loop {
        let mut fds = vec![PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        for child in &children {
            fds.push(PollFd::new(child.pidfd.as_fd(), PollFlags::POLLIN));
            if let Some(socket) = &child.socket {
                fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
            }
        }
        let _ = poll(&mut fds, next_timeout(&children));
        let ordered = fds[0].any().unwrap_or(true);
        take_reports(socket, &mut children, &mut buffer);
        children.retain(|child| !reaped(socket, child));
        give_up_late(socket, &mut children);
        if ordered {
            match receive::<Order>(socket.as_fd(), &mut buffer) {
                Ok(Some(order)) => start(socket, &order, &mut children),
                Ok(None) | Err(_) => return,
            }
        }
    }
}

fn next_timeout(children: &[Child]) -> PollTimeout {
    let next = children
        .iter()
        .filter_map(|child| child.work)
        .map(|work| work.1)
        .min();
    next.map_or(PollTimeout::NONE, |at| {
        let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    })
}

/// Passes on what children report; who has is idle.
fn take_reports(socket: &OwnedFd, children: &mut [Child], buffer: &mut [u8]) {
    let mut idle = children.iter().filter(|child| child.is_idle()).count();
    for child in children {
        let Some(from) = child
            .socket
            .as_ref()
            .filter(|socket| is_readable(socket.as_fd()))
        else {
            continue;
        };
        match receive::<Report>(from.as_fd(), buffer) {
            Ok(Some(said)) => {
                // Who took too long has no socket any more: what is read here is waited for.
                child.work = None;
                report(socket, said.id, said.result, said.buffer);
                idle += 1;
                if idle > IDLE_MAX {
                    child.socket = None;
                }
            }
            // It ends, and is reaped.
            Ok(None) | Err(_) => child.socket = None,
        }
    }
}

fn is_readable(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].any().unwrap_or(true)
}

/// Reports for a child that died without doing so.
fn reaped(socket: &OwnedFd, child: &Child) -> bool {
    match waitpid(child.pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::StillAlive) => false,
        Ok(_) | Err(_) => {
            if let Some((id, _)) = child.work {
                report(socket, id, Some(-libc::EIO), Vec::new());
            }
            true
        }
    }
}

fn give_up_late(socket: &OwnedFd, children: &mut [Child]) {
    let now = Instant::now();
    for child in children {
        if let Some((id, _)) = child.work.filter(|(_, deadline)| *deadline <= now) {
            (child.work, child.socket) = (None, None);
            report(socket, id, None, Vec::new());
            // It may not die: the kernel waits uninterruptibly. Then it is left behind.
            let _ = kill(child.pid, Signal::SIGKILL);
        }
    }
}

fn report(socket: &OwnedFd, id: u64, result: Option<i32>, buffer: Vec<u8>) {
    // If nobody reads it there is nobody to tell.
    let _ = put(socket.as_fd(), &Report { id, result, buffer });
}

impl Child {
    fn is_idle(&self) -> bool {
        self.work.is_none() && self.socket.is_some()
    }

    /// Hands it an order; false if it cannot be had any more.
    fn order(&mut self, order: &Order) -> bool {
        let sent = (self.socket.as_ref()).is_some_and(|socket| put(socket.as_fd(), order).is_ok());
        if sent {
            let limit = Duration::from_millis(order.limit_ms);
            self.work = Some((order.id, Instant::now() + limit));
        } else {
            self.socket = None;
        }
        sent
    }
}

fn start(socket: &OwnedFd, order: &Order, children: &mut Vec<Child>) {
    for child in children.iter_mut().filter(|child| child.is_idle()) {
        if child.order(order) {
            return;
        }
    }
    match new_child(children) {
        Ok(mut child) => {
            if !child.order(order) {
                report(socket, order.id, Some(-libc::EIO), Vec::new());
            }
            children.push(child);
        }
        Err(_) => report(socket, order.id, Some(-libc::EAGAIN), Vec::new()),
    }
}

/// Forks a child, which does not come back from here.
fn new_child(others: &mut Vec<Child>) -> io::Result<Child> {
    let (ours, theirs) = pair().map_err(io::Error::other)?;
    let Some(pid) = fork_single().map_err(io::Error::other)? else {
        // Whoever holds the sockets of the others keeps them from ending.
        others.clear();
        drop(ours);
        work_on(&theirs);
        std::process::exit(0);
    };
    // Without a descriptor of it nobody waits for it: it ends as `ours` closes.
    let pidfd = crate::sandbox::pidfd(pid)?;
    Ok(Child {
        pid,
        pidfd,
        socket: Some(ours),
        work: None,
    })
}

/// Does what is ordered until there is nobody to order.
fn work_on(socket: &OwnedFd) {
    let mut buffer = vec![0; MESSAGE_MAX];
    let mut control = None;
    while let Ok(Some(order)) = receive::<Order>(socket.as_fd(), &mut buffer) {
        let (result, buffer) = work(&mut control, order.job);
        report(socket, order.id, Some(result), buffer);
    }
}

fn work(control: &mut Option<Control>, job: Job) -> (i32, Vec<u8>) {
    let done = match job {
        Job::Command(command) => run_command(control, command),
        Job::Commands(commands) => {
            let mut read =
                |command| run_command(control, command).map_or(Vec::new(), |read| read.1);
            Ok((0, commands.into_iter().flat_map(&mut read).collect()))
        }
        Job::StopUnheld(device) => stop_if_unheld(control, device),
    };
    done.unwrap_or_else(|error| (-error.raw_os_error().unwrap_or(libc::EIO), Vec::new()))
}

fn run_command(control: &mut Option<Control>, mut command: Command) -> io::Result<(i32, Vec<u8>)> {
    let control = match control {
        Some(control) => control,
        None => control.insert(Control::open()?),
    };
    let result = control.execute(&mut command)?;
    Ok((result, command.buffer))
}

fn stop_if_unheld(control: &mut Option<Control>, device: u32) -> io::Result<(i32, Vec<u8>)> {
    let path = format!("/dev/ublkb{device}");
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(path)?;
    drop(held);
    let command = Command {
        op: sys::UBLK_U_CMD_STOP_DEV,
        name: "STOP_DEV".into(),
        device,
        data: 0,
        buffer: Vec::new(),
    };
    run_command(control, command)
}
