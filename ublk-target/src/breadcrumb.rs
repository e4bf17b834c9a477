//! Each owner thread's slot in a file on tmpfs: its group, the request begun last, and the signal it died by.
//!
//! Requests are noted by plain stores: no system call, no allocation. The signal is noted by a handler that runs on the
//! thread that crashed, so that of several groups the right one is named; SIGKILL from outside leaves none.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use lunar_api::GroupUuid;
use lunar_api::breadcrumb::{AT, BYTES, GROUP, LEN, LU, OP, SIGNAL, SLOTS, TAKEN, WORDS};
use lunar_engine::traits::{HostRequest, HostVerb};
use memmap2::{MmapOptions, MmapRaw};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Signals that a thread gets for what it did itself: a fault, or abort after a panic.
pub(crate) const FATAL: [Signal; 5] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGFPE,
    Signal::SIGABRT,
];

type Slot = [AtomicU64; WORDS];

/// Mapped for as long as the process lives.
static MAP: OnceLock<MmapRaw> = OnceLock::new();

thread_local! {
    /// The slot of this thread; the handler reads it: no lazy value, nothing to drop.
    static MINE: Cell<Option<&'static Slot>> = const { Cell::new(None) };
}

/// Makes the file anew and watches for fatal signals. Before mounts are detached, while there is one thread.
pub(crate) fn open(path: &Path) -> io::Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(BYTES as u64)?;
    let map = MmapOptions::new().len(BYTES).map_raw(&file)?;
    // Said twice, the first stays.
    let _ = MAP.set(map);
    for signal in FATAL {
        let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
        let action = SigAction::new(SigHandler::SigAction(crashed), flags, SigSet::empty());
        // SAFETY: the handler makes stores and async-signal-safe calls only.
        unsafe { sigaction(signal, &action)? };
    }
    Ok(())
}

extern "C" fn crashed(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    if let Ok(Some(slot)) = MINE.try_with(Cell::get) {
        let number = u64::try_from(signal).unwrap_or(0);
        slot[SIGNAL].store(number, Ordering::Relaxed);
    }
    // SAFETY: both calls are async-signal-safe; the kernel hands a valid siginfo to a SA_SIGINFO handler.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        // A fault comes again when this returns. What was sent does not: it is sent on.
        if (*info).si_code <= 0 {
            libc::raise(signal);
        }
    }
}

fn slots() -> &'static [Slot] {
    let Some(map) = MAP.get() else {
        return &[];
    };
    // SAFETY: the mapping holds SLOTS slots, is page-aligned and never unmapped; other processes may read it, and
    // words are atomic.
    unsafe { std::slice::from_raw_parts(map.as_mut_ptr().cast::<Slot>(), SLOTS) }
}

/// A thread's slot.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Crumb(&'static Slot);

/// Takes a slot for the group that this thread owns; None when all are taken.
pub(crate) fn claim(group: GroupUuid) -> Option<Crumb> {
    let free = |slot: &&Slot| {
        slot[TAKEN]
            .compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    };
    let slot = slots().iter().find(free)?;
    let bytes = group.to_bytes();
    let (halves, _) = bytes.as_chunks::<8>();
    for (word, half) in GROUP.into_iter().zip(halves) {
        slot[word].store(u64::from_ne_bytes(*half), Ordering::Relaxed);
    }
    MINE.set(Some(slot));
    Some(Crumb(slot))
}

impl Crumb {
    /// Notes a request as it is begun.
    pub(crate) fn note(self, lu: u16, request: &HostRequest) {
        let op: u64 = match request.verb {
            HostVerb::Read => 1,
            HostVerb::Write { .. } => 2,
            HostVerb::Flush => 3,
            HostVerb::Discard => 4,
            HostVerb::WriteZeroes { .. } => 5,
        };
        let words = [
            (OP, u64::from(request.id.tag) << 32 | op),
            (LU, lu.into()),
            (AT, request.at),
            (LEN, request.len),
        ];
        for (word, value) in words {
            self.0[word].store(value, Ordering::Relaxed);
        }
    }

    /// Gives the slot back: the thread ends well.
    pub(crate) fn release(self) {
        MINE.set(None);
        for word in self.0.iter().skip(1) {
            word.store(0, Ordering::Relaxed);
        }
        self.0[TAKEN].store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lunar_api::breadcrumb::FILE;
    use lunar_engine::traits::RequestId;

    #[test]
    fn claim_note_release_and_what_is_read_of_it() {
        let dir = std::env::temp_dir().join(format!("lunar-crumb-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        open(&dir.join(FILE)).unwrap();
        let read = || lunar_api::breadcrumb::crashes(&std::fs::read(dir.join(FILE)).unwrap());
        let group = GroupUuid::from_bytes([9; 16]);
        let crumb = claim(group).unwrap();
        crumb.note(
            3,
            &HostRequest {
                id: RequestId { device: 0, tag: 4 },
                verb: HostVerb::Write { fua: false },
                at: 8192,
                len: 512,
                zero_copy: false,
            },
        );
        assert!(read().is_empty());
        crumb.0[SIGNAL].store(11, Ordering::Relaxed);
        let found = read();
        assert_eq!((found[0].group, found[0].signal), (group, 11));
        assert!(found[0].request.starts_with("write of 512 bytes at 8192"));
        crumb.release();
        assert!(read().is_empty());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
