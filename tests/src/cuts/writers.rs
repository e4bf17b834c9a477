//! Writers that report what they were told before they go on. They end with the power, or with an error.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use lunar_disks::Random;
use nix::fcntl::OFlag;

use super::job::{Job, Ways};
use super::places::{FILES, log_path};
use super::stamp::{self, SECTOR};
use super::witness::{Kind, Record, Step, Witness};
use crate::e2e::blocks::Pages;
use crate::e2e::rig::Rig;
use crate::e2e::shell::{Failure, pause};

/// Sectors of the raw LU that are written.
pub(super) const SECTORS: u64 = 24 << 11;
/// Writers to it. Each has granules of its own, among those of the others, so that they meet in stripes but never in a
/// sector.
pub(super) const RAW_WRITERS: u64 = 6;
/// Sectors of a granule in the first half of the LU, and in the second.
const SMALL: u64 = 64;
const LARGE: u64 = 2048;
/// Longest write.
const WRITE_MAX: u64 = 1024;
/// Most sectors of a file.
const FILE_SECTORS_MAX: u64 = 400;

/// Numbers of the writes of a boot, rising over all boots.
fn seq(boot: u64, n: u64) -> u64 {
    boot << 32 | n
}

/// Where writer `writer` writes next: first sector and count.
fn draw_place(random: &mut Random, writer: u64) -> (u64, u64) {
    let half = SECTORS / 2;
    let (from, granule, longest) = if random.percent(15) {
        (half, LARGE, WRITE_MAX)
    } else {
        (0, SMALL, SMALL)
    };
    let own = half / granule / RAW_WRITERS;
    // Half of the small ones go to a few places, so that they meet.
    let near = granule == SMALL && random.percent(50);
    let turn = random.below(if near { 4 } else { own });
    let start = from + (turn * RAW_WRITERS + writer) * granule;
    let unit = *random.pick(&[1, 8, 8, 8]);
    let units = granule / unit;
    let first = random.below(units);
    let count = 1 + random.below((units - first).min(longest / unit));
    (start + first * unit, count * unit)
}

/// Writes stamped sectors to the raw LU.
pub(super) fn raw(dir: &Path, job: &Job, device: &str, writer: u64) -> Result<(), Failure> {
    let said = |error: io::Error| format!("raw writer {writer}: {error}");
    let open = |flags: OFlag| {
        let mut options = OpenOptions::new();
        let direct = (OFlag::O_DIRECT | flags).bits();
        options.write(true).custom_flags(direct).open(device)
    };
    let plain = open(OFlag::empty()).map_err(said)?;
    let durable = open(OFlag::O_DSYNC).map_err(said)?;
    let path = log_path(dir, job.boot, &format!("raw{writer}"));
    let mut witness = Witness::create(&path).map_err(said)?;
    let mut random = Random::new(stamp::mix(job.seed ^ writer));
    let mut pages = Pages::new(usize::try_from(WRITE_MAX).expect("small") * SECTOR);
    let (fua, flush) = match job.ways {
        Ways::Mixed => (20, 15),
        Ways::Lazy => (1, 1),
        Ways::FlushOnly => (0, 25),
        Ways::FuaOnly => (100, 0),
    };
    for n in 1.. {
        let (first, count) = draw_place(&mut random, writer);
        let seq = seq(job.boot, n);
        let bytes = usize::try_from(count).expect("small") * SECTOR;
        stamp::fill(job.run, first, seq, &mut pages.get_mut()[..bytes]);
        let record = Record {
            step: Step::Begun,
            kind: Kind::Sector,
            first,
            count: u32::try_from(count).expect("small"),
            seq,
        };
        witness.report(record).map_err(said)?;
        let (file, step) = if random.percent(fua) {
            (&durable, Step::Durable)
        } else {
            (&plain, Step::Done)
        };
        let written = file.write_all_at(&pages.get()[..bytes], first * SECTOR as u64);
        written.map_err(|error| format!("raw writer {writer}: {count} at {first}: {error}"))?;
        witness.report(Record { step, ..record }).map_err(said)?;
        if random.percent(flush) {
            plain.sync_data().map_err(said)?;
            let step = Step::Flushed;
            witness.report(Record { step, ..record }).map_err(said)?;
        }
    }
    Ok(())
}

/// Sectors of the file that write `seq` makes; 0: it removes it.
fn file_sectors(seq: u64) -> u64 {
    if seq & 1 == 1 {
        return 0;
    }
    1 + stamp::mix(seq) % FILE_SECTORS_MAX
}

/// Puts files into the place of others, each time whole and fsynced, or removes them.
pub(super) fn files(dir: &Path, job: &Job, mount: &str) -> Result<(), Failure> {
    let said = |error: io::Error| format!("file writer: {error}");
    let path = log_path(dir, job.boot, "files");
    let mut witness = Witness::create(&path).map_err(said)?;
    let mut random = Random::new(stamp::mix(job.seed ^ 0xf11e));
    let folder = File::open(mount).map_err(said)?;
    for n in 1.. {
        let file = random.below(FILES);
        let name = format!("{mount}/file{file}");
        let removes = random.percent(15) && Path::new(&name).exists();
        let seq = seq(job.boot, n) << 1 | u64::from(removes);
        let record = Record {
            step: Step::Begun,
            kind: Kind::File,
            first: file,
            count: 1,
            seq,
        };
        witness.report(record).map_err(said)?;
        if removes {
            fs::remove_file(&name).map_err(said)?;
        } else {
            let part = format!("{mount}/part{file}");
            write_file(&part, job.run, file, seq).map_err(said)?;
            fs::rename(part, &name).map_err(said)?;
        }
        folder.sync_all().map_err(said)?;
        let step = Step::Durable;
        witness.report(Record { step, ..record }).map_err(said)?;
        match job.ways {
            Ways::Mixed | Ways::FlushOnly => {}
            // Each fsync flushes every member.
            Ways::Lazy => pause(300 + random.below(700)),
            Ways::FuaOnly => pause(2000 + random.below(2000)),
        }
    }
    Ok(())
}

/// The place of a file's first sector among stamps.
fn file_place(file: u64) -> u64 {
    (file + 1) << 32
}

fn write_file(path: &str, run: u64, file: u64, seq: u64) -> io::Result<()> {
    let sectors = usize::try_from(file_sectors(seq)).expect("small");
    let mut bytes = vec![0; sectors * SECTOR];
    stamp::fill(run, file_place(file), seq, &mut bytes);
    let mut to = File::create(path)?;
    to.write_all(&bytes)?;
    to.sync_all()
}

/// Which write a file is of; 0: there is none and there never was, or it was removed by a write that says so.
pub(super) fn read_file(mount: &str, run: u64, file: u64) -> Result<Option<u64>, String> {
    let bytes = match fs::read(format!("{mount}/file{file}")) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let mut seqs = Vec::new();
    for (place, sector) in (file_place(file)..).zip(bytes.chunks(SECTOR)) {
        if sector.len() != SECTOR {
            return Err(format!("it has {} bytes", bytes.len()));
        }
        seqs.push(stamp::read(run, place, sector)?);
    }
    let seq = seqs.first().copied().unwrap_or_default();
    let right = seqs.iter().all(|other| *other == seq);
    if !right || seqs.len() as u64 != file_sectors(seq) {
        return Err(format!("{} sectors are not write {seq:x}", seqs.len()));
    }
    Ok(Some(seq))
}

/// True if no file is what write `seq` leaves; 0: nothing was written yet.
pub(super) fn is_absent(seq: u64) -> bool {
    seq == 0 || seq & 1 == 1
}

/// Makes and deletes the LU `tmp`: odd writes make it.
pub(super) fn lus(dir: &Path, job: &Job, rig: &Rig, there: bool) -> Result<(), Failure> {
    let said = |error: io::Error| format!("LU writer: {error}");
    let path = log_path(dir, job.boot, "lus");
    let mut witness = Witness::create(&path).map_err(said)?;
    let mut makes = !there;
    for n in 1.. {
        let seq = seq(job.boot, n) << 1 | u64::from(makes);
        let record = Record {
            step: Step::Begun,
            kind: Kind::Lu,
            first: 0,
            count: 1,
            seq,
        };
        witness.report(record).map_err(said)?;
        if makes {
            rig.lunar(&["lu", "create", "tmp", "--group", "data", "--size", "1MiB"])?;
        } else {
            rig.lunar(&["lu", "delete", "tmp", "--yes"])?;
        }
        let step = Step::Durable;
        witness.report(Record { step, ..record }).map_err(said)?;
        makes = !makes;
        pause(100);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_never_meet_in_a_sector() {
        let mut owner = vec![None; usize::try_from(SECTORS).unwrap()];
        for writer in 0..RAW_WRITERS {
            let mut random = Random::new(writer);
            for _ in 0..20_000 {
                let (first, count) = draw_place(&mut random, writer);
                assert!((1..=WRITE_MAX).contains(&count) && first + count <= SECTORS);
                for at in first..first + count {
                    let was = owner[usize::try_from(at).unwrap()].replace(writer);
                    assert!(was.is_none_or(|was| was == writer), "sector {at}");
                }
            }
        }
        assert!(owner.iter().all(Option::is_some));
    }
}
