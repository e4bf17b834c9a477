//! mgmtd starts the next ublk-target when one dies. Until that serves, nothing can be swapped in from a LU, nor written back to
//! one to make room: nothing of mgmtd may lie there, and none of its allocations may wait for it.

use std::io;

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::configure_io_flusher_behavior;

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
