//! What the kernel knows of member disks: who holds them, what is in flight, which bytes they have.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::blocks;
use super::rig::Rig;
use super::shell::{Failure, sh, until};

/// A disk's name for ever: a block device's number, or a file's device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity(u64, u64);

// A character device (a LU's) may have the number of a block device.
fn of(meta: &std::fs::Metadata) -> Identity {
    match meta.file_type().is_block_device() {
        true => Identity(meta.rdev(), 0),
        false => Identity(meta.dev(), meta.ino()),
    }
}

/// Looks at a disk while its name is there.
pub(super) fn identity(path: &str) -> Result<Identity, Failure> {
    let meta = std::fs::metadata(path).map_err(|error| format!("{path}: {error}"))?;
    Ok(of(&meta))
}

/// Says whether a process has a descriptor of a disk; only those that can write count with `for_data`.
pub(super) fn holds(pid: &str, disk: Identity, for_data: bool) -> Result<bool, Failure> {
    let Ok(list) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return Ok(false);
    };
    for entry in list.flatten() {
        // It may be closed by now.
        let Ok(meta) = std::fs::metadata(entry.path()) else {
            continue;
        };
        let number = entry.file_name();
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", number.display()));
        let writes = info.is_ok_and(|info| {
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            flags.is_some_and(|flags| flags.trim().ends_with(['1', '2']))
        });
        if of(&meta) == disk && (writes || !for_data) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Waits until ublk-target and mgmtd have no descriptor of a disk.
pub(super) fn let_go(rig: &Rig, what: &str, disk: Identity) -> Result<(), Failure> {
    let what = format!("nobody holds {what}");
    until(&what, 60, || {
        let held = holds(&rig.target_pid()?, disk, false)? || holds(&rig.mgmtd_pid(), disk, false)?;
        Ok(!held)
    })
}

/// Writes of a device-mapper device: those in flight, and those that ended.
pub(super) fn writes(name: &str) -> Result<(u64, u64), Failure> {
    let text = sh(&format!(
        "d=/sys/dev/block/$(stat -Lc %Hr:%Lr /dev/mapper/{name}); awk '{{print $2}}' $d/inflight; awk '{{print $5}}' $d/stat"
    ))?;
    let mut numbers = text.lines().map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(in_flight)), Some(Ok(ended))) => Ok((in_flight, ended)),
        _ => Err(format!("{name}: {text}")),
    }
}

/// Each member's bytes of the first `len` bytes of the group's data, read past Lunar.
fn members(rig: &Rig, paths: &[String], len: usize) -> Result<Vec<blocks::Pages>, Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    let mut all = Vec::new();
    for (slot, path) in paths.iter().enumerate() {
        let offset = group["members"][slot]["data_offset"].as_u64();
        all.push(blocks::read(path, offset.ok_or("no data_offset")?, len)?);
    }
    Ok(all)
}

/// Checks the redundancy of the first `len` bytes of every member: parity of a raid5, equality of a raid1.
pub(super) fn redundancy_is_right(
    rig: &Rig,
    level: &str,
    paths: &[String],
    len: usize,
) -> Result<(), Failure> {
    let members = members(rig, paths, len)?;
    let wrong = (0..len).find(|&i| match level {
        "raid1" => members.iter().any(|m| m.get()[i] != members[0].get()[i]),
        _ => members.iter().fold(0, |sum, m| sum ^ m.get()[i]) != 0,
    });
    match wrong {
        Some(i) => Err(format!(
            "the redundancy is wrong at byte {i} of the members' data"
        )),
        None => Ok(()),
    }
}
