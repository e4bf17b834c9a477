//! mgmtd starts the next ublk-target when one dies. Until that serves, nothing can be swapped in from a LU, nor written back to
//! one to make room: nothing of mgmtd may lie there, and none of its allocations may wait for it.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::configure_io_flusher_behavior;

use crate::daemon::Daemon;
use crate::limits::STANDBY_PAUSE;
use crate::standby::Standby;

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
/// For as long as a LU is swapped to, and no longer: keeps a ublk-target ready to take the place of the one that serves, and
/// makes that, the next and mgmtd urgent. What the kernel allocates for them may then come from what it keeps back from all
/// others (`ALLOC_MIN_RESERVE` in its page_alloc.c); without that ublk-target waits in io_uring_enter for memory that only
/// its own answers would make free.
pub async fn watch(daemon: Arc<Daemon>) {
    let own = std::process::id();
    let mut urgent: BTreeSet<u32> = BTreeSet::new();
    let mut first = true;
    let mut not_before = Instant::now();
    loop {
        tokio::time::sleep(PAUSE).await;
        let ublks: Vec<u32> = daemon.lus().iter().filter_map(|lu| lu.ublk).collect();
        let pid = daemon.live().target_pid;
        let Some(pid) = pid.filter(|_| !daemon.recovering.load(Ordering::Relaxed)) else {
            continue;
        };
        if std::mem::take(&mut first) {
            // Made so by the mgmtd before this one, which this process may have been; the swap may be gone.
            urgent.extend([own, pid].into_iter().filter(|pid| is_urgent(&stat(*pid))));
        }
        let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
        if !is_swapped_to(&swaps, &ublks) {
            drop(daemon.standby().take());
            for pid in std::mem::take(&mut urgent) {
                set_urgent(pid, false).await;
            }
            continue;
        }
        for pid in [own, pid] {
            if urgent.insert(pid) {
                set_urgent(pid, true).await;
            }
        }
        urgent.retain(|urgent| [own, pid].contains(urgent));
        let program = daemon.target_bin().clone();
        let has_standby = daemon
            .standby()
            .as_mut()
            .is_some_and(|standby| standby.is_ready(&program));
        if has_standby || Instant::now() < not_before {
            continue;
        }
        drop(daemon.standby().take());
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
        let bytes = status.map_or(0, |status| anonymous(&status));
        match Standby::start(&daemon, program, bytes).await {
            Ok(standby) => *daemon.standby() = Some(standby),
            Err(error) => {
                not_before = Instant::now() + STANDBY_PAUSE;
                tracing::warn!("no ublk-target is kept ready for the swap on a LU: {error}");
            }
        }
    }
}

fn stat(pid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default()
}

/// Whether a `/proc/PID/stat` is of a process that [`set_urgent`] has made so: priority and policy (SCHED_RR) are its fields 40
/// and 41, the first after the name in brackets its third.
fn is_urgent(stat: &str) -> bool {
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    fields.split(' ').skip(37).take(2).eq([URGENT, "2"])
}

/// Has a process that mgmtd has started for somebody else run as all others do.
pub async fn calm(pid: u32) {
    if is_urgent(&stat(pid)) {
        set_urgent(pid, false).await;
    }
}

/// Has all threads of a process, and those that they start, run before all others, or as all others do.
async fn set_urgent(pid: u32, is_urgent: bool) {
    let how = match is_urgent {
        true => ["--rr", "--pid", URGENT],
        false => ["--other", "--pid", "0"],
    };
    let done = tokio::process::Command::new("chrt")
        .arg("--all-tasks")
        .args(how)
        .arg(pid.to_string())
        .stdin(std::process::Stdio::null())
        .status()
        .await;
    if !done.is_ok_and(|status| status.success()) {
        tracing::warn!("chrt {how:?} {pid} failed: a swap on a LU may hang if memory runs short");
    }
}

/// Priority of what is urgent: the least that is before all others.
pub(crate) const URGENT: &str = "1";

/// Whether `/proc/swaps` names one of these devices.
fn is_swapped_to(swaps: &str, ublks: &[u32]) -> bool {
    let first = |line: &str| line.split_whitespace().next().map(str::to_owned);
    swaps.lines().filter_map(first).any(|path| {
        let number = path.strip_prefix("/dev/ublkb").and_then(|n| n.parse().ok());
        number.is_some_and(|number| ublks.contains(&number))
    })
}

/// Bytes of a process that no file is behind, of its `/proc/PID/status`.
fn anonymous(status: &str) -> usize {
    kib(status, "RssAnon:")
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
    fn urgent_is_read_of_the_policy() {
        let stat = |priority, policy| {
            let between = ["0"; 36].join(" ");
            format!("7 (a b) c) S {between} {priority} {policy} 0 0 0")
        };
        assert!(is_urgent(&stat(1, 2)));
        assert!(!is_urgent(&stat(0, 0)) && !is_urgent(&stat(50, 1)) && !is_urgent(""));
    }

    #[test]
    fn anonymous_memory_is_read() {
        assert_eq!(
            anonymous("Name:\tx\nRssAnon:\t   56320 kB\nVmLck:\t1 kB\n"),
            55 << 20
        );
        assert_eq!(anonymous(""), 0);
    }
}
