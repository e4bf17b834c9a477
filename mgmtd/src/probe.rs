//! Facts about paths from /sys and stat: what a path is, its stable name, candidates for a search.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::limits::{DISK_MIN, SEARCH_MAX};

/// What a path leads to; two paths with one identity are one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Identity {
    /// Device number of a block device.
    Block(u64),
    /// Device and inode of a regular file.
    File(u64, u64),
    Directory,
    Other,
}

/// Finds out what a path leads to, symlinks followed.
///
/// # Errors  it does not exist or may not be looked at
pub fn identify(path: &Path) -> io::Result<Identity> {
    let meta = std::fs::metadata(path)?;
    let kind = meta.file_type();
    Ok(if kind.is_block_device() {
        Identity::Block(meta.rdev())
    } else if kind.is_file() {
        Identity::File(meta.dev(), meta.ino())
    } else if kind.is_dir() {
        Identity::Directory
    } else {
        Identity::Other
    })
}

/// The device that a path leads to now: one that was taken away and came back is another, though its name is the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub identity: Identity,
    /// The kernel's number of this block device, never given twice in a boot; empty for a file.
    pub sequence: String,
}

/// Finds the device that a path leads to; none if there is nothing.
pub fn device(path: &Path) -> Option<Device> {
    let identity = identify(path).ok()?;
    let sequence = match identity {
        Identity::Block(dev) => {
            let base = format!("/sys/dev/block/{}", major_minor(dev));
            // A partition has that of its disk.
            let read = |at: &str| std::fs::read_to_string(format!("{base}/{at}")).ok();
            read("diskseq").or_else(|| read("../diskseq"))?
        }
        Identity::File(..) | Identity::Directory | Identity::Other => String::new(),
    };
    Some(Device { identity, sequence })
}

/// Everything that a disk could come back as: whenever that is another, something came or went.
pub fn block_devices() -> Vec<(String, String)> {
    let all = names("/sys/block").into_iter();
    let devices = all.filter(|name| !name.starts_with("ublkb"));
    devices
        .map(|name| {
            let at = format!("/sys/block/{name}");
            let sequence = std::fs::read_to_string(format!("{at}/diskseq")).unwrap_or_default();
            let parts = names(&at)
                .into_iter()
                .filter(|part| part.starts_with(&name));
            (name.clone(), parts.fold(sequence, |all, part| all + &part))
        })
        .collect()
}

/// What a disk really is: a loop device is its file.
pub fn behind(identity: Identity) -> Identity {
    let Identity::Block(dev) = identity else {
        return identity;
    };
    let link = format!("/sys/dev/block/{}/loop/backing_file", major_minor(dev));
    let file = std::fs::read_to_string(link);
    file.ok()
        .and_then(|path| identify(Path::new(path.trim_end())).ok())
        .unwrap_or(identity)
}

/// Writes a device number as /sys and mountinfo do.
pub fn major_minor(dev: u64) -> String {
    format!(
        "{}:{}",
        nix::sys::stat::major(dev),
        nix::sys::stat::minor(dev)
    )
}

/// Bytes of a disk.
///
/// # Errors  it is neither block device nor file
pub fn capacity(path: &Path, identity: Identity) -> io::Result<u64> {
    match identity {
        Identity::Block(dev) => {
            let size =
                std::fs::read_to_string(format!("/sys/dev/block/{}/size", major_minor(dev)))?;
            let sectors: u64 = size.trim().parse().map_err(io::Error::other)?;
            Ok(sectors * lunar_api::units::SECTOR)
        }
        Identity::File(..) => Ok(std::fs::metadata(path)?.len()),
        Identity::Directory | Identity::Other => Err(io::ErrorKind::InvalidInput.into()),
    }
}

/// Returns the name of a disk that lasts longest: a by-id link if there is one, else the real path.
pub fn stable_path(path: &Path) -> PathBuf {
    let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    if !matches!(identify(&real), Ok(Identity::Block(_))) {
        return real;
    }
    let Ok(links) = std::fs::read_dir("/dev/disk/by-id") else {
        return real;
    };
    links
        .flatten()
        .map(|entry| entry.path())
        .filter(|link| std::fs::canonicalize(link).is_ok_and(|to| to == real))
        .min_by_key(|link| (rank(link), link.clone()))
        .unwrap_or(real)
}

/// Orders by-id links by how long they last: world-wide names before models before the rest.
fn rank(link: &Path) -> usize {
    let name = link
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let order = [
        "wwn-",
        "nvme-eui.",
        "nvme-",
        "ata-",
        "scsi-",
        "virtio-",
        "dm-uuid-",
        "md-uuid-",
    ];
    order
        .iter()
        .position(|prefix| name.starts_with(prefix))
        .unwrap_or(order.len())
}

/// Lists where a lost disk may be: every block device with a size that is not a LU of ours, and the files
/// beside the file members known.
pub fn candidates(known: &[PathBuf]) -> Vec<PathBuf> {
    let mut out = BTreeSet::new();
    for disk in names("/sys/block") {
        // A LU is never a disk here; a drive without a medium has no size.
        if disk.starts_with("ublkb") || disk.starts_with("zram") || disk.starts_with("fd") {
            continue;
        }
        for part in names(&format!("/sys/block/{disk}")) {
            if part.starts_with(&disk) && !is_below(&format!("/sys/block/{disk}/{part}")) {
                add_block(&mut out, &part, &format!("/sys/block/{disk}/{part}/size"));
            }
        }
        if !is_below(&format!("/sys/block/{disk}")) {
            add_block(&mut out, &disk, &format!("/sys/block/{disk}/size"));
        }
    }
    let directories: BTreeSet<&Path> = known
        .iter()
        .filter(|path| !path.starts_with("/dev"))
        .filter_map(|path| path.parent())
        .collect();
    for directory in directories {
        let Ok(entries) = std::fs::read_dir(directory) else {
            continue;
        };
        for entry in entries.flatten().take(SEARCH_MAX) {
            if entry
                .metadata()
                .is_ok_and(|m| m.is_file() && m.len() >= DISK_MIN)
            {
                out.insert(entry.path());
            }
        }
    }
    out.into_iter().collect()
}

/// Something is stacked on it: it shows the same superblock as what stands on it, and cannot be opened exclusively.
fn is_below(sys: &str) -> bool {
    !names(&format!("{sys}/holders")).is_empty()
}

fn add_block(out: &mut BTreeSet<PathBuf>, name: &str, size: &str) {
    let sectors = std::fs::read_to_string(size)
        .ok()
        .and_then(|s| s.trim().parse::<u64>().ok());
    if sectors.is_some_and(|s| s * lunar_api::units::SECTOR >= DISK_MIN) {
        out.insert(Path::new("/dev").join(name.replace('!', "/")));
    }
}

/// File names in a directory; none if it is not there.
pub fn names(directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut out: Vec<String> = entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect();
    out.sort();
    out
}

/// Ids of every ublk device that the kernel has.
pub fn ublk_devices() -> Vec<u32> {
    let names = names("/sys/class/ublk-char");
    names
        .iter()
        .filter_map(|name| name.strip_prefix("ublkc")?.parse().ok())
        .collect()
}

/// This boot, as the kernel names it.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_string()
}

/// 16 random bytes.
///
/// # Errors  no /dev/urandom
pub fn random() -> io::Result<[u8; 16]> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Milliseconds since 1970, UTC; for people and logs only, nothing is ordered by it.
pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_prefers_world_wide_names() {
        let rank = |name: &str| rank(Path::new(name));
        assert!(rank("wwn-0x5000") < rank("ata-ST4000"));
        assert!(rank("nvme-eui.00") < rank("nvme-Samsung"));
        assert!(rank("md-uuid-1") < rank("usb-stick"));
    }

    #[test]
    fn identify_follows_links() {
        let link = std::env::temp_dir().join(format!("lunar-link-{}", std::process::id()));
        std::os::unix::fs::symlink("/etc/passwd", &link).unwrap();
        assert_eq!(
            identify(&link).unwrap(),
            identify(Path::new("/etc/passwd")).unwrap()
        );
        std::fs::remove_file(&link).unwrap();
    }
}
