//! mgmtd starts the next ublk-target when one dies. Until that serves, nothing can be swapped in from a LU, nor written back to
//! one to make room: nothing of mgmtd may lie there, and none of its allocations may wait for it.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::configure_io_flusher_behavior;

use crate::daemon::Daemon;

/// Locks what this process has touched and will touch, has its allocations wait for no I/O, and takes it out of the
/// out-of-memory killer's sight. Before it starts a thread: those inherit it. Says what could not be had; that is not needed
/// to serve, unless memory runs short.
pub fn protect() -> Vec<String> {
    let mut missing = Vec::new();
    let mut step = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            missing.push(format!("{what}: {error}"));
        }
    };
    // Only what is touched: the stacks of threads are mostly never used. What is read from the program's file is not on a LU.
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    step("memory cannot be locked", mlockall(all).map_err(Into::into));
    step(
        "PR_SET_IO_FLUSHER",
        configure_io_flusher_behavior(true).map_err(Into::into),
    );
    step(
        "oom_score_adj",
        std::fs::write("/proc/self/oom_score_adj", "-1000"),
    );
    missing
}

/// Has the run directory lie on a tmpfs of its own that is never swapped: the log of what is in flight, and what a dead
/// ublk-target leaves, are read before the next one serves. Only where nothing is in it yet: else it is hidden by that.
///
/// # Errors  what is there stays as it is, and may be swapped
pub fn keep_in_memory(run_dir: &Path) -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let own = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        (words.next().map(Path::new) == Some(run_dir)).then(|| words.nth(1).unwrap_or_default())
    });
    if own.is_some_and(|options| options.split(',').any(|word| word == "noswap")) {
        return Ok(());
    }
    if std::fs::read_dir(run_dir)?.next().is_some() {
        return Err(io::Error::other("it is in use already"));
    }
    let flags = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = Some("mode=755,noswap");
    Ok(mount(
        Some("lunar"),
        run_dir,
        Some("tmpfs"),
        flags,
        options,
    )?)
}

/// Between two looks whether a LU is swapped to.
const PAUSE: Duration = Duration::from_secs(2);
/// Memory is put by in such pieces, so that it can be given up in the middle.
const PIECE: usize = 1 << 20;
/// What a successor needs beside what ublk-target has: its program is started, its groups are read.
const MORE: usize = 16 << 20;
/// A small machine cannot spare all that: it lives by what its own successor gave back.
const PART: usize = 8;
/// From here on the allocator gives memory back to the kernel when it is freed.
const MAPPED: usize = 33 << 20;

/// Memory for the next ublk-target, put by while a LU is swapped to. When ublk-target dies its own is taken at once by whoever
/// dirties pages, none can be made free while the swap does not answer, and without its buffers a successor serves nothing.
#[derive(Debug, Default)]
pub struct Ballast {
    held: Mutex<Option<Vec<u8>>>,
    given_up: AtomicBool,
}

impl Ballast {
    /// Gives it to whoever is quick: the caller, by starting what needs it.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self) -> usize {
        self.lock().as_ref().map_or(0, Vec::len)
    }

    /// Takes so many bytes; blocks while they are made free.
    fn take(&self, bytes: usize) {
        let mut memory = Vec::with_capacity(bytes.max(MAPPED));
        while memory.len() < bytes && !self.given_up.load(Ordering::Relaxed) {
            // Touched, and so locked.
            memory.resize(memory.len() + PIECE, 1);
        }
        let mut held = self.lock();
        if !self.given_up.load(Ordering::Relaxed) {
            *held = Some(memory);
        }
    }
}

/// Keeps memory by for as long as a LU is swapped to, and none else.
pub async fn watch(daemon: Arc<Daemon>) {
    loop {
        tokio::time::sleep(PAUSE).await;
        let ublks: Vec<u32> = daemon.lus().iter().filter_map(|lu| lu.ublk).collect();
        let pid = daemon.live().target_pid;
        let is_served = pid.is_some() && !daemon.recovering.load(Ordering::Relaxed);
        let all =
            std::fs::read_to_string("/proc/meminfo").map_or(0, |text| kib(&text, "MemTotal:"));
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        let status =
            pid.and_then(|pid| std::fs::read_to_string(format!("/proc/{pid}/status")).ok());
        let needed = match (is_swapped_to(&swaps, &ublks), status) {
            (true, Some(status)) => (resident(&status) + MORE).min(all / PART),
            _ => 0,
        };
        if !is_served || needed == 0 {
            daemon.ballast.give_up();
        } else if daemon.ballast.has() < needed {
            daemon.ballast.give_up();
            daemon.ballast.given_up.store(false, Ordering::Relaxed);
            let daemon = Arc::clone(&daemon);
            let _ = tokio::task::spawn_blocking(move || daemon.ballast.take(needed)).await;
        }
    }
}

/// Whether `/proc/swaps` names one of these devices.
fn is_swapped_to(swaps: &str, ublks: &[u32]) -> bool {
    let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
    swaps.lines().filter_map(first).any(|path| {
        let number = path.strip_prefix("/dev/ublkb").and_then(|n| n.parse().ok());
        number.is_some_and(|number| ublks.contains(&number))
    })
}

/// Bytes in memory, of `/proc/PID/status`.
fn resident(status: &str) -> usize {
    kib(status, "VmRSS:")
}

/// Bytes, of a line that gives kB.
fn kib(text: &str, name: &str) -> usize {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| {
        line.trim()
            .strip_suffix(" kB")?
            .trim()
            .parse::<usize>()
            .ok()
    });
    kib.unwrap_or(0) << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swap_on_a_lu_is_seen() {
        let head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";
        let swaps =
            format!("{head}/dev/sda2 partition 8 0 -1\n/dev/ublkb12   partition\t393212 10 -2\n");
        assert!(is_swapped_to(&swaps, &[3, 12]));
        assert!(!is_swapped_to(&swaps, &[1, 2]) && !is_swapped_to(head, &[12]));
    }

    #[test]
    fn resident_memory_is_read() {
        assert_eq!(
            resident("Name:\tx\nVmRSS:\t   56320 kB\nVmLck:\t1 kB\n"),
            55 << 20
        );
        assert_eq!(resident(""), 0);
    }

    #[test]
    fn ballast_that_is_given_up_is_not_taken() {
        let ballast = Ballast::default();
        ballast.take(1);
        assert_eq!(ballast.has(), PIECE);
        ballast.give_up();
        ballast.take(1);
        assert_eq!(ballast.has(), 0);
    }
}
