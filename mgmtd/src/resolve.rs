//! Whom a DISK, GROUP or LU argument means: a number, a name, an identity, or any path that leads there.
//!
//! A group is also named by a disk or a LU of it, a disk also by the name of its node (`sdb`, `wwn-0x5000c500a1`).

use std::path::{Path, PathBuf};

use lunar_api::target::MemberState;
use lunar_api::{ApiError, ErrorKind};

use crate::probe::{Identity, identify};
use crate::tables::{DiskSave, GroupSave, LuSave};
use crate::views::{View, unknown};

/// Where a bare name may be a node.
const NODE_DIRS: [&str; 3] = ["/dev", "/dev/disk/by-id", "/dev/mapper"];

impl View {
    /// Finds a disk by number, identity or path (links are followed), or by the name of its node.
    ///
    /// # Errors  `Usage` if there is none
    pub fn find_disk(&self, name: &str) -> Result<&DiskSave, ApiError> {
        let exact = |d: &&DiskSave| {
            d.number.to_string() == name || d.path == name || d.uuid.to_string() == name
        };
        if let Some(disk) = self.there_first(self.tables.disks.values().filter(exact)) {
            return Ok(disk);
        }
        let mut paths = paths_of(name).into_iter();
        paths
            .find_map(|path| self.disk_at(&path))
            .ok_or_else(|| unknown("disk", name))
    }

    /// The disk that a path leads to.
    fn disk_at(&self, path: &Path) -> Option<&DiskSave> {
        let there = disk_identity(path)?;
        let same = |d: &&DiskSave| disk_identity(Path::new(&d.path)) == Some(there);
        self.there_first(self.tables.disks.values().filter(same))
    }

    /// Of disks with one path the one that is there: another one may have had it before.
    fn there_first<'a>(&self, disks: impl Iterator<Item = &'a DiskSave>) -> Option<&'a DiskSave> {
        disks.min_by_key(|d| !self.is_there(d))
    }

    /// Says whether a disk serves, or was found where its row says when it was looked for last.
    pub fn is_there(&self, disk: &DiskSave) -> bool {
        self.serves(disk) || self.live.probes.contains_key(&disk.uuid)
    }

    /// Says whether a disk is in sync in its group, or filled.
    pub fn serves(&self, disk: &DiskSave) -> bool {
        let state = self.member(disk.uuid).map(|(_, member)| member.state);
        matches!(state, Some(MemberState::InSync | MemberState::Rebuilding))
    }

    /// Finds a group by number, name or identity, or by a disk or a LU of it.
    ///
    /// # Errors  `Usage` if there is none, or several have this name
    pub fn find_group(&self, name: &str) -> Result<&GroupSave, ApiError> {
        let all = || self.tables.groups.values();
        let number = |g: &&GroupSave| g.number.to_string() == name || g.uuid.to_string() == name;
        if let Some(group) = all().find(number) {
            return Ok(group);
        }
        if let Some(group) = self.group_named(name)? {
            return Ok(group);
        }
        let of_path = || {
            let path = Some(name).filter(|name| name.contains('/'))?;
            if let Ok(lu) = self.find_lu(path) {
                return self.tables.group(lu.group);
            }
            self.tables
                .group(self.group_of(self.disk_at(Path::new(path))?)?)
        };
        of_path().ok_or_else(|| unknown("group", name))
    }

    /// Finds a LU by number, name or identity, or by its device (links are followed).
    ///
    /// # Errors  `Usage` if there is none, or several have this name
    pub fn find_lu(&self, name: &str) -> Result<&LuSave, ApiError> {
        let all = || self.tables.lus.values();
        let number = |l: &&LuSave| l.number.to_string() == name || l.uuid.to_string() == name;
        if let Some(lu) = all().find(number) {
            return Ok(lu);
        }
        let short = name.strip_prefix(&format!("{}/", self.nodes));
        let short = short.unwrap_or(name);
        if let Some(lu) = self.lu_named(short)? {
            return Ok(lu);
        }
        let real = std::fs::canonicalize(name).ok();
        let real = real.filter(|_| name.contains('/'));
        let node = real.unwrap_or(name.into());
        let at = |l: &&LuSave| {
            let ublk = self.lu_live(l).and_then(|l| l.ublk);
            ublk.is_some_and(|n| node == Path::new(&format!("/dev/ublkb{n}")))
        };
        all().find(at).ok_or_else(|| unknown("lu", name))
    }

    /// The group with this very name.
    ///
    /// # Errors  `Usage` if several have it
    pub fn group_named(&self, name: &str) -> Result<Option<&GroupSave>, ApiError> {
        let all = self.tables.groups.values();
        let named: Vec<&GroupSave> = all.filter(|g| self.group_row(g).name == name).collect();
        match named[..] {
            [] => Ok(None),
            [one] => Ok(Some(one)),
            _ => Err(ambiguous("group", name, named.iter().map(|g| g.number))),
        }
    }

    /// The LU with this very name.
    ///
    /// # Errors  `Usage` if several have it
    pub fn lu_named(&self, name: &str) -> Result<Option<&LuSave>, ApiError> {
        let all = self.tables.lus.values();
        let named: Vec<&LuSave> = all.filter(|l| self.lu_row(l).name == name).collect();
        match named[..] {
            [] => Ok(None),
            [one] => Ok(Some(one)),
            _ => Err(ambiguous("lu", name, named.iter().map(|l| l.number))),
        }
    }
}

/// Paths that a word may stand for.
fn paths_of(name: &str) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![name.into()];
    }
    let dirs = NODE_DIRS.iter().filter(|_| !name.is_empty());
    dirs.map(|dir| Path::new(dir).join(name)).collect()
}

/// What a path leads to, if a disk can be there.
fn disk_identity(path: &Path) -> Option<Identity> {
    identify(path)
        .ok()
        .filter(|id| matches!(id, Identity::Block(_) | Identity::File(..)))
}

fn ambiguous(noun: &str, name: &str, numbers: impl Iterator<Item = u32>) -> ApiError {
    let what = if noun == "lu" { "LU" } else { noun };
    let numbers: Vec<String> = numbers.map(|n| n.to_string()).collect();
    ApiError::new(
        ErrorKind::Usage,
        format!("there is more than one {what} `{name}`"),
    )
    .because(format!("they are number {}", numbers.join(" and ")))
    .hint(format!(
        "the same command with the number; lunar {noun} list"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view;
    use lunar_api::{GroupUuid, LuUuid};

    #[test]
    fn find_takes_number_name_and_device() {
        let view = view();
        for name in ["1", "vol", "/dev/lunar/vol", "/dev/ublkb0"] {
            assert_eq!(view.find_lu(name).unwrap().number, 1, "{name}");
        }
        for name in ["1", "data", "/dev/lunar/vol", "/dev/ublkb0"] {
            assert_eq!(view.find_group(name).unwrap().number, 1, "{name}");
        }
        for bad in ["", "2", "/", "/dev", "/nosuch", "vol2", "ublkb0", "01"] {
            assert_eq!(view.find_lu(bad).unwrap_err().kind, ErrorKind::Usage);
            let error = view.find_group(bad).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Usage, "{bad}");
            assert!(error.hint.is_some());
        }
    }

    /// Given a disk known by one path, when it is named by a link to it, then it is found, and its group by it.
    #[test]
    fn find_follows_links() {
        let dir = std::env::temp_dir().join(format!("lunar-resolve-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (file, link) = (dir.join("disk"), dir.join("link"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut view = view();
        let mut disk = view.tables.disks[&2].clone();
        disk.path = file.display().to_string();
        view.tables.put_disk(disk);
        let link = link.display().to_string();
        assert_eq!(view.find_disk(&link).unwrap().number, 2);
        assert_eq!(view.find_group(&link).unwrap().number, 1);
        let dir_ = dir.display().to_string();
        assert!(view.find_disk(&dir_).is_err(), "a directory is no disk");
        assert!(view.find_disk("no-such-node").is_err());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn find_of_a_name_that_two_have_names_both() {
        let mut view = view();
        view.tables
            .number_group(GroupUuid::from_bytes([8; 16]), "data");
        let group = GroupUuid::from_bytes([8; 16]);
        view.tables
            .number_lu(LuUuid::from_bytes([8; 16]), group, "vol");
        for error in [
            view.find_group("data").unwrap_err(),
            view.find_lu("vol").unwrap_err(),
        ] {
            assert_eq!(error.causes, ["they are number 1 and 2"]);
        }
        assert_eq!(view.find_group("2").unwrap().number, 2);
    }
}
