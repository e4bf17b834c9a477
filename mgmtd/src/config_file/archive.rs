//! The last configurations, in the state directory.

use std::io::Write;
use std::path::{Path, PathBuf};

use super::ConfigFile;
use crate::limits::ARCHIVE_MAX;

/// Directory in the state directory where the last ones lie.
const ARCHIVE: &str = "archive";

fn archive_number(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_suffix(".json")?
        .parse()
        .ok()
}

/// Numbers and paths of the archive, oldest first.
fn archived(state_dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(state_dir.join(ARCHIVE))
        .into_iter()
        .flatten()
        .flatten();
    let numbered = |path: PathBuf| Some((archive_number(&path)?, path));
    let mut all: Vec<_> = entries.filter_map(|entry| numbered(entry.path())).collect();
    all.sort();
    all
}

/// The newest of the archive that can be read.
pub fn newest(state_dir: &Path) -> Option<(PathBuf, ConfigFile)> {
    archived(state_dir).into_iter().rev().find_map(|(_, path)| {
        let text = std::fs::read_to_string(&path).ok()?;
        Some((path, ConfigFile::parse(&text).ok()?))
    })
}

/// Keeps one more in the archive, and the last of them only. Blocks.
///
/// # Crash  a new file beside, durable, then renamed: the archive has it whole or not at all
/// # Errors  the disk of the state directory failed
pub fn archive(state_dir: &Path, file: &ConfigFile) -> std::io::Result<()> {
    let dir = state_dir.join(ARCHIVE);
    std::fs::create_dir_all(&dir)?;
    let all = archived(state_dir);
    let number = all.last().map_or(1, |(number, _)| number + 1);
    let new = dir.join("new");
    let mut to = std::fs::File::create(&new)?;
    to.write_all(file.text().as_bytes())?;
    to.sync_all()?;
    std::fs::rename(&new, dir.join(format!("{number:08}.json")))?;
    for (_, old) in all.iter().take((all.len() + 1).saturating_sub(ARCHIVE_MAX)) {
        std::fs::remove_file(old)?;
    }
    std::fs::File::open(&dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view;

    #[test]
    fn the_archive_keeps_the_last_ones_and_the_newest_that_is_whole_counts() {
        let dir = std::env::temp_dir().join(format!("lunar-archive-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let mut file = ConfigFile::of(&view(), None);
        for n in 1..=ARCHIVE_MAX + 3 {
            file.disks[0].capacity = n as u64;
            archive(&dir, &file).unwrap();
        }
        let all = archived(&dir);
        assert_eq!(all.len(), ARCHIVE_MAX);
        let (path, found) = newest(&dir).unwrap();
        assert_eq!(found, file);
        std::fs::write(path, "{").unwrap();
        let (_, found) = newest(&dir).unwrap();
        assert_eq!(found.disks[0].capacity, (ARCHIVE_MAX + 2) as u64);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
