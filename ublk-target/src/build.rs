//! What this build says of itself, and what it does for another that serves: read its disks, quiesce its devices.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use clap::Args;
use lunar_api::build::{Build, COMMIT, Reading};
use lunar_api::target::TARGET_API;
use lunar_engine::reserve::{COPY_0_AT, end_copy_at};
use lunar_engine::superblock::{At, BYTES, FORMAT, SuperblockError, choose, decode};
use memmap2::MmapMut;

use crate::ublk::lifecycle::{Lifecycle, get_features};
use crate::{control_helper, crew, sandbox, ublk};

/// Devices quiesced at a time.
const AT_ONCE: usize = 32;
/// Looks at a superblock that cannot be believed: it may have been written at that moment.
const LOOKS: u32 = 3;

/// Prints what this build is.
pub(crate) fn print_info() -> Result<(), Box<dyn Error>> {
    let build = Build {
        program: "ublk-target".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        commit: COMMIT.into(),
        protocol: TARGET_API,
        format_min: FORMAT,
        format_max: FORMAT,
    };
    println!("{}", serde_json::to_string(&build)?);
    Ok(())
}

#[derive(Debug, Args)]
pub(crate) struct CanRead {
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
}

impl CanRead {
    /// Prints of each disk whether this build could serve it. Writes nothing, claims nothing: another may serve it now.
    pub(crate) fn run(&self) -> Result<(), Box<dyn Error>> {
        let reading = |path: &PathBuf| Reading {
            path: path.display().to_string(),
            problem: problem(path),
        };
        let readings: Vec<Reading> = self.paths.iter().map(reading).collect();
        println!("{}", serde_json::to_string(&readings)?);
        Ok(())
    }
}

/// Why a disk cannot be served.
fn problem(path: &Path) -> Option<String> {
    let mut last = None;
    for _ in 0..LOOKS {
        last = match look(path) {
            Ok(Ok(_)) | Ok(Err(SuperblockError::NotLunar)) => return None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(error) => Some(format!("it cannot be read: {error}")),
        };
    }
    last
}

fn look(
    path: &Path,
) -> std::io::Result<Result<lunar_engine::superblock::Superblock, SuperblockError>> {
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)?;
    let device_size = file.seek(SeekFrom::End(0))?;
    // Of whole pages: direct reads want aligned memory.
    let mut buffer = MmapMut::map_anon(BYTES)?;
    let mut copy = |file: &File, offset| {
        file.read_exact_at(&mut buffer, offset)?;
        let at = At {
            offset,
            device_size,
        };
        Ok::<_, std::io::Error>(decode(&buffer, at))
    };
    let Ok(end) = end_copy_at(device_size) else {
        return Ok(Err(SuperblockError::NotLunar));
    };
    let start = copy(&file, COPY_0_AT)?;
    let end = start.as_ref().map_or(end, |block| block.end_copy);
    let end = copy(&file, end)?;
    Ok(choose([start, end]))
}

#[derive(Debug, Args)]
pub(crate) struct Quiesce {
    /// Numbers N of /dev/ublkbN
    #[arg(required = true, value_name = "N")]
    devices: Vec<u32>,
}

impl Quiesce {
    /// Takes devices from a server that cannot be asked to give them up; it is to be killed next, and recovered from.
    pub(crate) fn run(&self) -> Result<(), Box<dyn Error>> {
        sandbox::block_signals()?;
        let helper = control_helper::fork_helper()?.attend()?;
        let kernel = nix::sys::utsname::uname()?;
        let kernel = kernel.release().to_string_lossy().into_owned();
        let features = ublk::features(&kernel, get_features(&helper).map_err(|e| e.to_string()));
        let lifecycle = Lifecycle {
            helper: &helper,
            features: &features,
        };
        crew::try_each(&self.devices, AT_ONCE, |number| lifecycle.quiesce(*number))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Given files with nothing of Lunar, too short for it, and none at all, then only the last is a problem.
    #[test]
    fn only_disks_that_cannot_be_had_are_a_problem() {
        let path = std::env::temp_dir().join(format!("lunar-can-read-{}", std::process::id()));
        for bytes in [0, 100 << 20] {
            let file = File::create(&path).unwrap();
            file.set_len(bytes).unwrap();
            assert_eq!(problem(&path), None, "{bytes}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(problem(&path).is_some());
    }
}
