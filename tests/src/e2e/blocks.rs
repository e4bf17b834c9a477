//! Writers of our own: every sector says who wrote it, so that the end can be judged without knowing the order.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use nix::fcntl::OFlag;

use super::shell::Failure;

/// Bytes of a sector.
pub(super) const SECTOR: usize = 512;
/// A sector is this many times the same tag.
const TAG: usize = 16;

/// Memory that direct I/O takes.
pub(crate) struct Pages {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Pages {
    pub(crate) fn new(len: usize) -> Self {
        let bytes = vec![0; len + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self { bytes, start, len }
    }

    pub(crate) fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub(crate) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Opens a device or file past the page cache.
pub(crate) fn open(path: &str) -> Result<File, Failure> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(path)
        .map_err(|error| format!("{path}: {error}"))
}

/// Reads past the page cache.
pub(crate) fn read(path: &str, at: u64, len: usize) -> Result<Pages, Failure> {
    let mut pages = Pages::new(len);
    open(path)?
        .read_exact_at(pages.get_mut(), at)
        .map_err(|error| format!("{path}: {len} bytes at {at}: {error}"))?;
    Ok(pages)
}

/// Writes a block of 4 KiB that is one number throughout.
pub(super) fn write_value(file: &File, at: u64, value: u64) -> Result<(), Failure> {
    let mut pages = Pages::new(4096);
    let word = value.to_le_bytes();
    let words = pages.get_mut().chunks_exact_mut(word.len());
    words.for_each(|to| to.copy_from_slice(&word));
    file.write_all_at(pages.get(), at)
        .map_err(|error| format!("4 KiB at {at}: {error}"))
}

/// Reads such a block: the least number in it, should two writes have met.
pub(super) fn least_value(file: &File, at: u64) -> Result<u64, Failure> {
    let mut pages = Pages::new(4096);
    file.read_exact_at(pages.get_mut(), at)
        .map_err(|error| format!("4 KiB at {at}: {error}"))?;
    let (words, _) = pages.get().as_chunks::<8>();
    let values = words.iter().map(|word| u64::from_le_bytes(*word));
    Ok(values.min().unwrap_or(0))
}

/// Numbers that look random; the same seed gives the same.
pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// One write that ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Written {
    writer: u32,
    seq: u32,
    first: u64,
    count: u64,
    start: Instant,
    end: Instant,
}

/// What a writer writes to.
#[derive(Debug, Clone)]
pub(super) struct Area {
    pub path: String,
    /// Sectors from the start of it.
    pub sectors: u64,
    /// Most sectors of one write.
    pub most: u64,
}

fn tag(writer: u32, seq: u32, sector: u64) -> [u8; TAG] {
    let mut tag = [0; TAG];
    tag[..4].copy_from_slice(&writer.to_le_bytes());
    tag[4..8].copy_from_slice(&seq.to_le_bytes());
    tag[8..].copy_from_slice(&sector.to_le_bytes());
    tag
}

/// Starts writers of random ranges, one request each at a time, until `stop`, or until each has done `writes`.
pub(super) fn start_writers(
    area: &Area,
    writers: u32,
    writes: u32,
    stop: &Arc<AtomicBool>,
) -> Vec<JoinHandle<Result<Vec<Written>, Failure>>> {
    (1..=writers)
        .map(|writer| {
            let (area, stop) = (area.clone(), Arc::clone(stop));
            std::thread::spawn(move || write_tags(&area, writer, writes, &stop))
        })
        .collect()
}

fn write_tags(
    area: &Area,
    writer: u32,
    writes: u32,
    stop: &AtomicBool,
) -> Result<Vec<Written>, Failure> {
    let file = open(&area.path)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ u64::from(writer) << 32);
    let mut all = Vec::new();
    for seq in 1..=writes {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let count = 1 + random.below(area.most);
        let first = random.below(area.sectors - count + 1);
        let bytes = usize::try_from(count).expect("small") * SECTOR;
        let mut pages = Pages::new(bytes);
        for (sector, bytes) in (first..).zip(pages.get_mut().chunks_exact_mut(SECTOR)) {
            let tag = tag(writer, seq, sector);
            bytes
                .chunks_exact_mut(TAG)
                .for_each(|to| to.copy_from_slice(&tag));
        }
        let start = Instant::now();
        file.write_all_at(pages.get(), first * SECTOR as u64)
            .map_err(|error| format!("writer {writer}, write {seq}: {error}"))?;
        all.push(Written {
            writer,
            seq,
            first,
            count,
            start,
            end: Instant::now(),
        });
    }
    Ok(all)
}

/// Waits for writers; the first failure of any.
pub(super) fn join(
    writers: Vec<JoinHandle<Result<Vec<Written>, Failure>>>,
) -> Result<Vec<Written>, Failure> {
    let mut all = Vec::new();
    for writer in writers {
        all.extend(writer.join().map_err(|_| "a writer died")??);
    }
    Ok(all)
}

/// Judges every sector of an area that read as zero before: it holds one write whole, and no other write of it
/// began after that one had been answered.
pub(super) fn judge(area: &Area, bytes: &[u8], log: &[Written]) -> Result<(), Failure> {
    let mut by_name = BTreeMap::new();
    let mut by_sector = vec![Vec::new(); usize::try_from(area.sectors).expect("small")];
    for written in log {
        by_name.insert((written.writer, written.seq), *written);
        for sector in written.first..written.first + written.count {
            by_sector[usize::try_from(sector).expect("small")].push(*written);
        }
    }
    let mut wrong = Vec::new();
    for (i, (bytes, writes)) in bytes.chunks_exact(SECTOR).zip(&by_sector).enumerate() {
        if let Err(why) = judge_sector(i as u64, bytes, writes, &by_name) {
            wrong.push(format!("sector {i}: {why}"));
        }
    }
    if wrong.is_empty() {
        return Ok(());
    }
    Err(format!(
        "{} of {} sectors are wrong: {}",
        wrong.len(),
        area.sectors,
        wrong[..wrong.len().min(5)].join("; ")
    ))
}

fn judge_sector(
    sector: u64,
    bytes: &[u8],
    writes: &[Written],
    by_name: &BTreeMap<(u32, u32), Written>,
) -> Result<(), Failure> {
    let first = &bytes[..TAG];
    if bytes.chunks_exact(TAG).any(|other| other != first) {
        return Err("it is of two writes".into());
    }
    if first == [0; TAG] {
        return match writes.len() {
            0 => Ok(()),
            n => Err(format!("{n} writes were answered, none is there")),
        };
    }
    let number = |at: usize| u32::from_le_bytes(first[at..at + 4].try_into().expect("4 bytes"));
    let name = (number(0), number(4));
    let Some(winner) = by_name.get(&name) else {
        return Err(format!("nobody wrote {name:?}"));
    };
    let covers = (winner.first..winner.first + winner.count).contains(&sector);
    if !covers || *first != tag(name.0, name.1, sector) {
        return Err(format!("{name:?} is not of this sector"));
    }
    match writes.iter().find(|other| other.start > winner.end) {
        Some(newer) => Err(format!(
            "it holds {name:?}, answered before ({}, {}) began",
            newer.writer, newer.seq
        )),
        None => Ok(()),
    }
}

/// Reads and writes single blocks of 4 KiB at random places with so many at a time, `requests` in all.
pub(super) fn mixed(path: &str, blocks: u64, at_once: u64, requests: u64) -> Result<(), Failure> {
    let one = |seed: u64| -> Result<(), Failure> {
        let file = open(path)?;
        let mut random = Random(0x1234_5678_9abc_def1 ^ (seed + 1) << 24);
        let mut pages = Pages::new(4096);
        for _ in 0..requests / at_once {
            let at = random.below(blocks) * 4096;
            let done = if random.below(2) == 0 {
                file.read_exact_at(pages.get_mut(), at)
            } else {
                file.write_all_at(pages.get(), at)
            };
            done.map_err(|error| format!("4 KiB at {at}: {error}"))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once)
            .map(|seed| scope.spawn(move || one(seed)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a thread died")?)
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn sector(writer: u32, seq: u32, sector: u64) -> Vec<u8> {
        tag(writer, seq, sector).repeat(SECTOR / TAG)
    }

    #[test]
    fn judge_tells_lost_torn_and_late_writes() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let write = |writer, seq, start, end| Written {
            writer,
            seq,
            first: 0,
            count: 1,
            start: at(start),
            end: at(end),
        };
        let area = Area {
            path: String::new(),
            sectors: 1,
            most: 1,
        };
        let log = [write(1, 1, 0, 5), write(2, 1, 3, 6), write(1, 2, 7, 9)];
        assert_eq!(judge(&area, &sector(1, 2, 0), &log), Ok(()));
        // Two that met: either may stay.
        assert_eq!(judge(&area, &sector(1, 1, 0), &log[..2]), Ok(()));
        assert_eq!(judge(&area, &sector(2, 1, 0), &log[..2]), Ok(()));
        assert!(judge(&area, &sector(2, 1, 0), &log).is_err());
        assert!(judge(&area, &sector(1, 2, 1), &log).is_err());
        assert!(judge(&area, &sector(3, 1, 0), &log).is_err());
        assert!(judge(&area, &[0; SECTOR], &log).is_err());
        assert_eq!(judge(&area, &[0; SECTOR], &[]), Ok(()));
        let mut torn = sector(1, 2, 0);
        torn[300..].fill(0);
        assert!(judge(&area, &torn, &log).is_err());
    }
}
