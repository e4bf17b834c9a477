//! Opens disks: exclusively for the data path, plainly for a look.
//!
//! Whoever opens hands the descriptor to ublk-target and drops it at once. A copy kept here would destroy the
//! proof that a dead ublk-target's I/O has ended (design.md §3): the kernel frees the claim with the last one.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use crate::limits::REOPEN_PAUSE;

/// Opens for data: O_RDWR, O_DIRECT, and O_EXCL (block device) or an exclusive flock (file).
///
/// # Errors  `ResourceBusy` while anybody else holds it, a dead process's last I/O included
pub fn open_exclusive(path: &Path) -> io::Result<OwnedFd> {
    let meta = std::fs::metadata(path)?;
    if meta.file_type().is_block_device() {
        let flags = OFlag::O_DIRECT | OFlag::O_EXCL;
        return Ok(with_flags(path, true, flags)?.into());
    }
    if !meta.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "neither block device nor file",
        ));
    }
    let file = with_flags(path, true, OFlag::O_DIRECT)?;
    // flock belongs to the open file description: it lasts until ublk-target's last copy is gone.
    match file.try_lock() {
        Ok(()) => Ok(file.into()),
        Err(TryLockError::WouldBlock) => Err(io::ErrorKind::ResourceBusy.into()),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

/// Opens for a look: O_RDONLY, O_DIRECT, claims nothing.
///
/// # Errors  it cannot be opened
pub fn open_plain(path: &Path) -> io::Result<OwnedFd> {
    // O_NONBLOCK: a removable drive without medium must not keep us waiting.
    Ok(with_flags(path, false, OFlag::O_DIRECT | OFlag::O_NONBLOCK)?.into())
}

fn with_flags(path: &Path, write: bool, flags: OFlag) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags.bits())
        .open(path)
}

/// Tries `open_exclusive` until it works or `limit` is over; only "busy" is worth another try.
///
/// # Errors  the last one
pub async fn open_patiently(path: &Path, limit: Duration) -> io::Result<OwnedFd> {
    let end = Instant::now() + limit;
    loop {
        let at = path.to_path_buf();
        let opened = tokio::task::spawn_blocking(move || open_exclusive(&at));
        // The open itself can hang on a sick device; then its thread is left behind.
        let opened = match tokio::time::timeout(limit.max(Duration::from_secs(5)), opened).await {
            Ok(joined) => joined.map_err(io::Error::other)?,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        };
        match opened {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                tokio::time::sleep(REOPEN_PAUSE).await;
            }
            other => return other,
        }
    }
}

/// The in-flight log is memory: on a disk every request would wait for it, and after a power loss an old one would be
/// taken for the truth.
fn check_tmpfs(dir: &Path) -> io::Result<()> {
    let kind = nix::sys::statfs::statfs(dir)?.filesystem_type();
    // TMPFS_MAGIC, RAMFS_MAGIC.
    if [0x0102_1994, 0x8584_58f6].contains(&kind.0) {
        return Ok(());
    }
    let what = format!("{} is not on tmpfs", dir.display());
    Err(io::Error::new(io::ErrorKind::Unsupported, what))
}

/// Opens the in-flight log of a group, on tmpfs.
///
/// # Errors  the run directory is not there, or not on tmpfs
pub fn open_inflight(run_dir: &Path, group: lunar_api::GroupUuid) -> io::Result<OwnedFd> {
    let dir = run_dir.join("inflight");
    std::fs::create_dir_all(&dir)?;
    check_tmpfs(&dir)?;
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600);
    Ok(options.open(dir.join(group.to_string()))?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_exclusive_twice_is_busy_until_the_last_copy_is_gone() {
        let path = std::env::current_dir()
            .unwrap()
            .join(format!(".lock-{}", std::process::id()));
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let first = open_exclusive(&path).unwrap();
        let copy = first.try_clone().unwrap();
        drop(first);
        let second = open_exclusive(&path).unwrap_err();
        assert_eq!(second.kind(), io::ErrorKind::ResourceBusy);
        drop(copy);
        assert!(open_exclusive(&path).is_ok());
        std::fs::remove_file(&path).unwrap();
    }
}
