//! Lines for standard error, written by a thread of their own: whoever reads them may wait for a LU (its journal lies on one,
//! its memory was swapped to one), and nobody here may wait for that.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait; at 200 bytes each 200 KiB. More are dropped, and counted.
const LINES_MAX: usize = 1024;
/// Longest wait of a process that ends for its last lines.
const DRAIN_LIMIT: Duration = Duration::from_millis(500);

static LINES: OnceLock<SyncSender<Vec<u8>>> = OnceLock::new();
static WAITING: AtomicU64 = AtomicU64::new(0);
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Starts the thread; until then lines are written by whoever has them.
pub(crate) fn start() -> io::Result<()> {
    let (lines, from) = sync_channel(LINES_MAX);
    std::thread::Builder::new()
        .name("log".into())
        .stack_size(128 << 10)
        .spawn(move || write_out(&from))?;
    let _ = LINES.set(lines);
    Ok(())
}

fn write_out(from: &Receiver<Vec<u8>>) {
    for line in from {
        let _ = io::stderr().write_all(&line);
        WAITING.fetch_sub(1, Ordering::Relaxed);
        let dropped = DROPPED.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let _ = writeln!(io::stderr(), "{dropped} lines of the log were dropped");
        }
    }
}

/// Waits a moment until all is written. At the end of the process.
pub(crate) fn drain() {
    let (_never, wait) = crossbeam::channel::bounded::<()>(0);
    let deadline = Instant::now() + DRAIN_LIMIT;
    while WAITING.load(Ordering::Relaxed) > 0 && Instant::now() < deadline {
        let _ = wait.recv_timeout(Duration::from_millis(1));
    }
}

/// Where tracing writes to: a line a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let Some(lines) = LINES.get() else {
            return io::stderr().write(line);
        };
        WAITING.fetch_add(1, Ordering::Relaxed);
        if lines.try_send(line.to_vec()).is_err() {
            WAITING.fetch_sub(1, Ordering::Relaxed);
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}
