//! `/dev/lunar/NAME` -> `/dev/ublkbN`, made and removed by mgmtd itself.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

/// Directory of the links; numbered systems have their own (a name is never all digits).
pub fn node_dir(system: Option<u32>) -> PathBuf {
    match system {
        None => "/dev/lunar".into(),
        Some(n) => format!("/dev/lunar/{n}").into(),
    }
}

/// Makes the directory hold exactly `want` (name -> N of /dev/ublkbN); foreign things in it stay.
///
/// # Errors  the first link that could not be made; the others are made all the same
pub fn sync_nodes(dir: &Path, want: &BTreeMap<String, u32>) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    for entry in std::fs::read_dir(dir)?.flatten() {
        let Ok(target) = std::fs::read_link(entry.path()) else {
            continue;
        };
        let ours = target.to_string_lossy().starts_with("/dev/ublkb");
        let name = entry.file_name().to_string_lossy().into_owned();
        if ours && !want.contains_key(&name) {
            std::fs::remove_file(entry.path())?;
        }
    }
    let mut result = Ok(());
    for (name, ublk) in want {
        if let Err(e) = put_link(dir, name, *ublk) {
            result = Err(e);
        }
    }
    result
}

/// Puts a link in place in one step: whoever looks finds the old one or the new one.
fn put_link(dir: &Path, name: &str, ublk: u32) -> io::Result<()> {
    let target = PathBuf::from(format!("/dev/ublkb{ublk}"));
    let link = dir.join(name);
    if std::fs::read_link(&link).is_ok_and(|t| t == target) {
        return Ok(());
    }
    let fresh = dir.join(format!(".new.{name}"));
    let _ = std::fs::remove_file(&fresh);
    std::os::unix::fs::symlink(&target, &fresh)?;
    std::fs::rename(&fresh, &link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sync_nodes_makes_moves_and_removes() {
        let dir = std::env::temp_dir().join(format!("lunar-nodes-{}", std::process::id()));
        sync_nodes(&dir, &BTreeMap::from([("a".into(), 0), ("b".into(), 1)])).unwrap();
        std::fs::write(dir.join("foreign"), "").unwrap();
        sync_nodes(&dir, &BTreeMap::from([("b".into(), 2)])).unwrap();
        assert!(!dir.join("a").exists() && dir.join("foreign").exists());
        assert_eq!(
            std::fs::read_link(dir.join("b")).unwrap(),
            Path::new("/dev/ublkb2")
        );
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
