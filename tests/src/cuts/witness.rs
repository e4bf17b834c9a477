//! What a writer reports out of the guest, record by record, before it goes on.
//!
//! A record of 32 bytes is appended to a file of the host (O_SYNC on hostfs: it is outside when the call returns). A
//! write that was begun but has no record does not exist: the record is out before the write is sent.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::stamp::mix;

/// Bytes of a record.
const RECORD: usize = 32;

/// What was reported of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// It is about to be sent.
    Begun,
    /// It was acknowledged.
    Done,
    /// It was acknowledged, and is durable: FUA, or the end of an fsync that is part of it.
    Durable,
    /// Everything of this writer that was acknowledged before is durable: a FLUSH was acknowledged.
    Flushed,
}

const STEPS: [Step; 4] = [Step::Begun, Step::Done, Step::Durable, Step::Flushed];

/// What the places of a record are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Sectors of the raw LU.
    Sector,
    /// Files of the file system.
    File,
    /// LUs that are made and deleted.
    Lu,
}

const KINDS: [Kind; 3] = [Kind::Sector, Kind::File, Kind::Lu];

/// A step of a write to `count` places from `first` on; `seq` rises with each write to a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub step: Step,
    pub kind: Kind,
    pub first: u64,
    pub count: u32,
    pub seq: u64,
}

impl Record {
    fn check(&self) -> u64 {
        let head = (self.step as u64) << 40 | (self.kind as u64) << 32 | u64::from(self.count);
        mix(head ^ mix(self.first ^ mix(self.seq)))
    }

    fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[0] = self.step as u8;
        bytes[1] = self.kind as u8;
        bytes[4..8].copy_from_slice(&self.count.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.first.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.seq.to_le_bytes());
        bytes[24..].copy_from_slice(&self.check().to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let record = Self {
            step: *STEPS.get(usize::from(bytes[0]))?,
            kind: *KINDS.get(usize::from(bytes[1]))?,
            first: word(8),
            count: u32::from_le_bytes(bytes[4..8].try_into().expect("4 bytes")),
            seq: word(16),
        };
        (record.check() == word(24)).then_some(record)
    }
}

/// A writer's file.
#[derive(Debug)]
pub(super) struct Witness(File);

impl Witness {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.create_new(true).append(true);
        let sync = nix::fcntl::OFlag::O_SYNC.bits();
        Ok(Self(options.custom_flags(sync).open(path)?))
    }

    /// Reports; when this returns the record is outside.
    pub(super) fn report(&mut self, record: Record) -> io::Result<()> {
        self.0.write_all(&record.encode())
    }
}

/// Reads what a writer reported; the last record may have been cut short with the writer.
pub(super) fn read(path: &Path) -> io::Result<Vec<Record>> {
    let bytes = std::fs::read(path)?;
    let mut records = Vec::new();
    let whole = bytes.chunks_exact(RECORD);
    let count = whole.len();
    for (i, bytes) in whole.enumerate() {
        match Record::decode(bytes) {
            Some(record) => records.push(record),
            None if i + 1 == count => {}
            None => return Err(io::Error::other(format!("record {i} of {count} is none"))),
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_read_back_and_a_torn_tail_is_left_out() {
        let path = std::env::temp_dir().join(format!("lunar-witness.{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let record = |step, seq| Record {
            step,
            kind: Kind::File,
            first: 7,
            count: 3,
            seq,
        };
        let all = [
            record(Step::Begun, 1),
            record(Step::Durable, 1),
            record(Step::Flushed, 0),
        ];
        let mut witness = Witness::create(&path).unwrap();
        for one in all {
            witness.report(one).unwrap();
        }
        assert_eq!(read(&path).unwrap(), all);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
        assert_eq!(read(&path).unwrap(), all[..2]);
        std::fs::remove_file(&path).unwrap();
    }
}
