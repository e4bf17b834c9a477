//! What the process does to itself before it serves anybody: no mounts, no paging, no memory reclaim into
//! its own devices, no signals.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use nix::unistd::{ForkResult, Pid, chdir, fork, pivot_root};

/// Descriptors: 3 a LU, one a member, and those of the control socket.
const FILES_MAX: u64 = 65_536;
/// Arenas of the allocator: each but the first is 64 MiB of address space, all of which counts as locked. The I/O
/// path does not allocate, so nobody waits.
const ARENAS_MAX: i32 = 1;
/// Allocations from here on have mappings of their own, after [`take_memory`]: the most that glibc can be told.
const MAPPED_MIN: i32 = 32 << 20;
/// prctl numbers that libc does not have.
const SET_IO_FLUSHER: i32 = 57;
const GET_IO_FLUSHER: i32 = 58;

/// Which step failed.
#[derive(Debug, thiserror::Error)]
#[error("{step}")]
pub(crate) struct SandboxError {
    step: &'static str,
    #[source]
    source: io::Error,
}

pub(crate) fn step<T>(
    step: &'static str,
    result: Result<T, impl Into<io::Error>>,
) -> Result<T, SandboxError> {
    result.map_err(|source| SandboxError {
        step,
        source: source.into(),
    })
}

/// Leaves every mount of the host: a mount namespace of its own with `/dev` and `/sys` in it and nothing else.
/// A copy of a LU's mount would keep it busy after umount and dead-lock its last flush.
///
/// `place` is an existing folder; it is covered only in the new namespace.
pub(crate) fn detach_mounts(place: &Path) -> Result<(), SandboxError> {
    const NONE: Option<&str> = None;
    step(
        "a mount namespace cannot be made (root is needed)",
        unshare(CloneFlags::CLONE_NEWNS),
    )?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    step(
        "mounts cannot be made private",
        mount(NONE, "/", NONE, private, NONE),
    )?;
    let safe = MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
    let size = Some("mode=755,size=64k,nr_inodes=16");
    step(
        "no empty root",
        mount(Some("lunar"), place, Some("tmpfs"), safe, size),
    )?;
    for (name, kind, flags) in [
        ("dev", "devtmpfs", safe),
        ("sys", "sysfs", safe | MsFlags::MS_RDONLY),
    ] {
        let at = place.join(name);
        step("no empty root", fs::create_dir(&at))?;
        step(
            "devtmpfs or sysfs cannot be mounted",
            mount(Some(kind), &at, Some(kind), flags, NONE),
        )?;
    }
    step("the empty root cannot be entered", chdir(place))?;
    step("the root cannot be changed", pivot_root(".", "."))?;
    step(
        "the old root cannot be left",
        umount2(".", MntFlags::MNT_DETACH),
    )?;
    step("the empty root cannot be entered", chdir("/"))
}

/// Raises limits and takes the process out of the out-of-memory killer's sight. Before [`detach_mounts`].
pub(crate) fn raise_limits() -> Result<(), SandboxError> {
    step(
        "RLIMIT_MEMLOCK cannot be raised",
        setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY),
    )?;
    let (_, hard) = step("RLIMIT_NOFILE", getrlimit(Resource::RLIMIT_NOFILE))?;
    let files = FILES_MAX.max(hard);
    step(
        "RLIMIT_NOFILE cannot be raised",
        setrlimit(Resource::RLIMIT_NOFILE, files, files),
    )?;
    step(
        "oom_score_adj cannot be set",
        fs::write("/proc/self/oom_score_adj", "-1000"),
    )
}

/// Locks all memory, now and later: stacks of later threads too are there before they are used.
pub(crate) fn lock_memory() -> Result<(), SandboxError> {
    // SAFETY: sets a number of the allocator; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX) };
    let all = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE;
    step("memory cannot be locked", mlockall(all))
}

/// Takes locked memory that later allocations get, so that none of them has to wait for it. After [`lock_memory`].
pub(crate) fn take_memory(bytes: usize) {
    // SAFETY: sets numbers of the allocator; no other thread runs yet. Nothing is given back to the kernel, and nothing but
    // the largest pieces is asked of it apart.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_MIN);
    }
    let pieces: Vec<Vec<u8>> = (0..bytes >> 20).map(|_| vec![1; 1 << 20]).collect();
    drop(std::hint::black_box(pieces));
}

/// Blocks every signal of this thread and of those it starts, but for those that end a thread for what it did.
pub(crate) fn block_signals() -> Result<(), SandboxError> {
    let mut set = SigSet::all();
    for fatal in crate::breadcrumb::FATAL {
        set.remove(fatal);
    }
    step("signals cannot be blocked", set.thread_block())
}

/// Makes the calling thread one whose allocations never wait for I/O, and reads it back.
pub(crate) fn become_io_flusher() -> Result<(), SandboxError> {
    // SAFETY: both calls take and answer numbers only.
    let (set, got) = unsafe {
        (
            libc::prctl(SET_IO_FLUSHER, 1, 0, 0, 0),
            libc::prctl(GET_IO_FLUSHER, 0, 0, 0, 0),
        )
    };
    let result = match (set, got) {
        (0, 1) => Ok(()),
        (0, _) => Err(io::Error::other("the kernel did not keep it")),
        _ => Err(io::Error::from(Errno::last())),
    };
    step("PR_SET_IO_FLUSHER (CAP_SYS_RESOURCE is needed)", result)
}

/// Forks a process that has one thread. None in the child, whose memory is locked as it is used: locks are not inherited, and
/// while a LU that is swapped to waits for one of its commands nothing of it may lie there.
pub(crate) fn fork_single() -> Result<Option<Pid>, SandboxError> {
    // SAFETY: with one thread the child is whole: no lock is held by a thread that it does not have. The two
    // callers are main() before it starts a thread, and the helper, which never starts any.
    match step("the process cannot be forked", unsafe { fork() })? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => {
            let all = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE;
            let touched = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
            step("memory cannot be locked", mlockall(all | touched))?;
            become_io_flusher()?;
            Ok(None)
        }
    }
}

/// A descriptor that becomes readable when a child of this process ends.
pub(crate) fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: takes and answers numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made it, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
