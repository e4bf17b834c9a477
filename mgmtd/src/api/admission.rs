//! What `disk add` takes and what it refuses: foreign data, what is in use, what is no disk.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lunar_api::mgmt::DiskAdd;
use lunar_api::target::{Label, Probe};
use lunar_api::units::format_size;
use lunar_api::{ApiError, DiskUuid, ErrorKind};

use crate::boot::probe_paths;
use crate::daemon::Daemon;
use crate::limits::DISK_MIN;
use crate::opener::open_patiently;
use crate::probe::{Identity, capacity, identify};
use crate::tables::DiskSave;
use crate::views::View;
use crate::{holders, signature};

/// In the problem of a disk whose superblock is there, but cannot be believed.
const NOT_VALID: &str = "superblock not valid";

/// One path of `disk add` that passed every check.
#[derive(Debug)]
pub(super) struct Fresh {
    pub(super) path: PathBuf,
    pub(super) capacity: u64,
    /// Identity that it already has in this system: only its row is missing.
    pub(super) known: Option<DiskUuid>,
    /// Signature to erase first.
    pub(super) erase: Option<String>,
    /// What dies by it: it is taken as a new disk although it is one of this system.
    pub(super) dies: Option<String>,
}

pub(super) fn error(path: &Path, kind: ErrorKind, why: impl Into<String>) -> ApiError {
    ApiError::new(
        kind,
        format!("{} cannot be taken as a disk", path.display()),
    )
    .because(why)
}

pub(super) fn check_kind(path: &Path) -> Result<Identity, ApiError> {
    let usage = |why: String| {
        error(path, ErrorKind::Usage, why).hint("lsblk -o NAME,SIZE,FSTYPE,MOUNTPOINTS")
    };
    if !path.is_absolute() {
        return Err(usage("the path is not absolute".into()));
    }
    let identity = identify(path).map_err(|e| usage(e.to_string()))?;
    match identity {
        Identity::Block(_) | Identity::File(..) => {}
        Identity::Directory => return Err(usage("it is a directory".into())),
        Identity::Other => return Err(usage("it is neither a block device nor a file".into())),
    }
    let size = capacity(path, identity).map_err(|e| usage(e.to_string()))?;
    let name = path.display();
    match size {
        0 => Err(usage("it is empty".into()).hint(format!("fallocate -l 1GiB {name}"))),
        1..DISK_MIN => Err(usage(format!(
            "it has {}, the least is {}",
            format_size(size),
            format_size(DISK_MIN)
        ))),
        _ => Ok(identity),
    }
}

/// The disks that were where this one is, and that are not in service.
pub(super) fn were_there(view: &View, identity: Identity) -> Vec<DiskSave> {
    let disks = view.tables.disks.values();
    let away = disks.filter(|d| is_at(d, identity) && !view.serves(d));
    away.cloned().collect()
}

/// The disk that this one is; none if another one was there before.
pub(super) fn known_disk(view: &View, identity: Identity) -> Option<&DiskSave> {
    let mut disks = view.tables.disks.values();
    disks.find(|d| is_at(d, identity) && view.is_there(d))
}

fn is_at(disk: &DiskSave, identity: Identity) -> bool {
    identify(Path::new(&disk.path)).is_ok_and(|other| other == identity)
}

pub(super) async fn check_fresh(
    daemon: &Daemon,
    view: &View,
    path: &Path,
    ask: &DiskAdd,
) -> Result<Fresh, ApiError> {
    let force = ask.force.as_deref();
    let probe = probe_paths(daemon, &[path.to_path_buf()])
        .await?
        .into_iter()
        .next();
    let Some(probe) = probe else {
        return Err(
            error(path, ErrorKind::Failed, "it cannot be opened with O_DIRECT")
                .hint("use a block device or a file on ext4, xfs or btrfs"),
        );
    };
    let invalid = probe.problem.clone();
    if let Some(problem) = invalid.as_ref().filter(|p| !p.contains(NOT_VALID)) {
        return Err(error(path, ErrorKind::Failed, format!("it {problem}")).hint("dmesg | tail"));
    }
    let capacity = probe.capacity;
    let path = path.to_path_buf();
    let label = probe.label.as_ref();
    if let Some(label) = label.filter(|l| ask.as_new && l.system == view.tables.system) {
        let held = view.member(label.disk).map(|(_, m)| m.path.clone());
        let at = view.tables.disk(label.disk).map(|d| d.path.clone());
        let part = crate::sightings::part(label);
        return Ok(Fresh {
            dies: Some(match held.or(at) {
                Some(at) => format!("all on {}: a copy of {at}, {part}", path.display()),
                None => format!("all on {}: {part}", path.display()),
            }),
            path,
            capacity,
            known: None,
            erase: None,
        });
    }
    if let Some(known) = own_label(view, &path, &probe)? {
        return Ok(Fresh {
            path,
            capacity,
            known: Some(known),
            erase: None,
            dies: None,
        });
    }
    let mut found = signature::find(&path).await?;
    if probe
        .label
        .as_ref()
        .is_some_and(|label| !is_reusable(view, label))
    {
        found.insert(signature::LUNAR.into());
    }
    if invalid.is_some() {
        // It was a disk of a Lunar system; what it holds may be wanted back.
        found.insert(signature::LUNAR.into());
    }
    let erase = check_signatures(&path, &found, force, probe.label.as_ref())
        .map_err(|error| invalid.into_iter().fold(error, ApiError::because))?;
    Ok(Fresh {
        path,
        capacity,
        known: None,
        erase,
        dies: None,
    })
}

pub(super) async fn check_unused(path: &Path, identity: Identity) -> Result<(), ApiError> {
    if let Identity::Block(dev) = identity {
        let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
        let held = holders::Look::now().of_block(dev, &real.display().to_string());
        if !held.is_empty() {
            let mut busy = error(path, ErrorKind::Busy, "it is in use");
            busy.causes.extend(held);
            return Err(busy.hint("umount it, or name another disk"));
        }
    } else if let Ok(fs) = nix::sys::statfs::statfs(path) {
        // NFS, SMB, CIFS, SMB2, 9p, AFS, Ceph, FUSE: a flush there does not mean what we need.
        const REMOTE: [i64; 8] = [
            0x6969,
            0x517b,
            0xff53_4d42,
            0xfe53_4d42,
            0x0102_1997,
            0x5346_414f,
            0x00c3_6400,
            0x6573_5546,
        ];
        if REMOTE.contains(&fs.filesystem_type().0) {
            return Err(error(
                path,
                ErrorKind::Usage,
                "the file is not on a local file system",
            )
            .hint("use a block device or a file on ext4, xfs or btrfs"));
        }
    }
    // Not on this thread: the open of a sick disk can hang.
    let opened = open_patiently(path, Duration::ZERO).await;
    opened.map(drop).map_err(|e| match e.kind() {
        std::io::ErrorKind::ResourceBusy => {
            error(path, ErrorKind::Busy, "somebody holds it exclusively").hint(format!(
                "lsof {}; dmsetup ls; cat /proc/mdstat",
                path.display()
            ))
        }
        _ => error(path, ErrorKind::Failed, e.to_string()).hint("dmesg | tail"),
    })
}

/// The identity that a disk already has here, if only its row is missing.
fn own_label(view: &View, path: &Path, probe: &Probe) -> Result<Option<DiskUuid>, ApiError> {
    let Some(label) = probe
        .label
        .as_ref()
        .filter(|l| l.system == view.tables.system)
    else {
        return Ok(None);
    };
    if let Some(other) = view.tables.disk(label.disk) {
        if view.live.probes.contains_key(&other.uuid) || view.member(other.uuid).is_some() {
            let why = format!(
                "it carries the identity of disk {}, which is {}",
                other.number, other.path
            );
            return Err(error(path, ErrorKind::Refused, why).hint(format!(
                "lunar disk add --as-new {}, if it is a copy that may die",
                path.display()
            )));
        }
        return Ok(Some(label.disk));
    }
    let in_group = view
        .live
        .groups
        .get(&label.group)
        .is_some_and(|g| g.members.iter().any(|m| m.disk == label.disk));
    // A member whose row was lost with the tables is taken back like a free disk: its group finds it again.
    let ours = !label.deleted;
    Ok((ours || in_group).then_some(label.disk))
}

/// A superblock of ours that says the disk is free for reuse.
fn is_reusable(view: &View, label: &Label) -> bool {
    label.system == view.tables.system && (label.deleted || label.group.is_nil())
}

fn check_signatures(
    path: &Path,
    found: &BTreeSet<String>,
    force: Option<&str>,
    label: Option<&Label>,
) -> Result<Option<String>, ApiError> {
    let all = found.iter().cloned().collect::<Vec<_>>().join(", ");
    let at = path.display();
    match (found.len(), force) {
        (0, None) => Ok(None),
        // Nothing dies: it was erased by an earlier try that did not come to the label, or was never there.
        (0, Some(_)) => Ok(None),
        (1, Some(name)) if found.contains(name) => {
            Ok(Some(name.to_string()).filter(|name| name != signature::LUNAR))
        }
        (1, _) => {
            let mut refused = error(path, ErrorKind::Refused, format!("it carries data: {all}"));
            if let Some(label) = label.filter(|_| found.contains(signature::LUNAR)) {
                let what = match (&label.deleted, label.group.is_nil()) {
                    (_, true) => "it is a free disk".to_string(),
                    (true, _) => format!("it was a member of group {}, deleted,", label.group),
                    (false, _) => format!("it is a member of group {}", label.group),
                };
                refused = refused.because(format!("{what} of Lunar system {}", label.system));
            }
            Err(refused.hint(format!(
                "lunar disk add --force={all} {at}, if that data may die"
            )))
        }
        _ => Err(error(
            path,
            ErrorKind::Refused,
            format!("it carries more than one thing: {all}"),
        )
        .hint(format!(
            "wipefs {at} to look; wipefs -a {at}, if all of that may die"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_signatures_table() {
        let set = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<BTreeSet<_>>();
        let check = |names: &[&str], force| {
            check_signatures(Path::new("/dev/x"), &set(names), force, None).map_err(|e| e.kind)
        };
        assert_eq!(check(&[], None), Ok(None));
        assert_eq!(check(&[], Some("ext4")), Ok(None));
        assert_eq!(check(&["ext4"], None), Err(ErrorKind::Refused));
        assert_eq!(check(&["ext4"], Some("xfs")), Err(ErrorKind::Refused));
        assert_eq!(check(&["ext4"], Some("ext4")), Ok(Some("ext4".into())));
        assert_eq!(
            check(&["ext4", "dos"], Some("ext4")),
            Err(ErrorKind::Refused)
        );
        assert_eq!(check(&[signature::LUNAR], Some(signature::LUNAR)), Ok(None));
    }
}
