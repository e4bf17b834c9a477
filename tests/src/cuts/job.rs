//! What the host tells the guest of a boot, and what the guest answers: files in the folder that both see.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use serde_json::{Value, json};

/// How the raw writers make their writes durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ways {
    /// Some by FUA, some by FLUSH, some not at all.
    Mixed,
    /// Seldom, so that caches are full of what nobody asked to keep.
    Lazy,
    FlushOnly,
    FuaOnly,
}

/// One boot.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// In every stamp; another one for each set of disks.
    pub run: u64,
    pub boot: u64,
    pub seed: u64,
    pub level: &'static str,
    pub policy: &'static str,
    pub members: usize,
    pub chunk_kib: u64,
    /// Disks that are there, but for disk 0, which has the state directory.
    pub there: Vec<usize>,
    pub assume_clean: bool,
    pub ways: Ways,
    /// Start a group that is refused by `--force`; else leave it alone.
    pub force: bool,
    /// Wait until all is in sync, and compare all redundancy, before the load.
    pub firm: bool,
    /// Make and delete a LU all the while.
    pub admin: bool,
    /// The raw writers write to a file that is there, on an ext4 without a journal: on a block device the kernel sends a
    /// FLUSH after every write with O_DSYNC, in such a file FUA alone.
    pub in_file: bool,
    /// No load: end in order.
    pub last: bool,
}

/// Levels by name, so that a job needs no memory of its own for it.
pub(super) const LEVELS: [&str; 4] = ["raid5", "raid1", "raid6", "raid10"];
/// Policies that a level has, the default first.
pub(super) fn policies(level: &str) -> &'static [&'static str] {
    match level {
        "raid5" => &["ppl", "bitmap", "none"],
        "raid6" => &["journal", "bitmap", "none"],
        _ => &["bitmap", "none"],
    }
}

const WAYS: [(&str, Ways); 4] = [
    ("mixed", Ways::Mixed),
    ("lazy", Ways::Lazy),
    ("flush", Ways::FlushOnly),
    ("fua", Ways::FuaOnly),
];

impl Job {
    /// Sectors of a stripe of the LU.
    pub(super) fn stripe_sectors(&self) -> u64 {
        let chunk = self.chunk_kib * 2;
        match self.level {
            "raid5" => chunk * (self.members as u64 - 1),
            "raid6" => chunk * (self.members as u64 - 2),
            "raid10" => chunk * (self.members as u64 / 2),
            _ => 128,
        }
    }

    /// True if a write that was cut can spoil other data of its stripe.
    pub(super) fn has_parity(&self) -> bool {
        matches!(self.level, "raid5" | "raid6")
    }

    /// True if what it may spoil is no more than what was being written.
    pub(super) fn has_log(&self) -> bool {
        matches!(self.policy, "ppl" | "journal")
    }

    pub(super) fn write(&self, dir: &Path) -> io::Result<()> {
        let ways = WAYS.iter().find(|(_, ways)| *ways == self.ways);
        let value = json!({
            "run": self.run, "boot": self.boot, "seed": self.seed, "level": self.level,
            "policy": self.policy, "members": self.members,
            "chunk_kib": self.chunk_kib, "there": self.there, "assume_clean": self.assume_clean,
            "ways": ways.map(|(name, _)| *name), "force": self.force, "firm": self.firm, "admin": self.admin,
            "in_file": self.in_file, "last": self.last,
        });
        fs::write(dir.join("job"), value.to_string())
    }

    pub(super) fn read(dir: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(dir.join("job")).map_err(|error| error.to_string())?;
        let value: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let parse = || -> Option<Self> {
            let there = value["there"].as_array()?.iter().map(index);
            Some(Self {
                run: value["run"].as_u64()?,
                boot: value["boot"].as_u64()?,
                seed: value["seed"].as_u64()?,
                level: LEVELS.iter().find(|name| value["level"] == **name)?,
                policy: policies(value["level"].as_str()?)
                    .iter()
                    .find(|name| value["policy"] == **name)?,
                members: index(&value["members"])?,
                chunk_kib: value["chunk_kib"].as_u64()?,
                there: there.collect::<Option<_>>()?,
                assume_clean: value["assume_clean"].as_bool()?,
                ways: WAYS.iter().find(|(name, _)| value["ways"] == *name)?.1,
                force: value["force"].as_bool()?,
                firm: value["firm"].as_bool()?,
                admin: value["admin"].as_bool()?,
                in_file: value["in_file"].as_bool()?,
                last: value["last"].as_bool()?,
            })
        };
        parse().ok_or_else(|| format!("no job: {text}"))
    }
}

fn index(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

/// Where the guest says how far it is: a line of JSON for each stage.
#[derive(Debug)]
pub(super) struct Report(File);

impl Report {
    pub(super) fn create(dir: &Path, boot: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        Ok(Self(
            options.create(true).append(true).open(path(dir, boot))?,
        ))
    }

    /// Adds a stage, with what there is to say of it.
    pub(super) fn say(&mut self, stage: &str, mut what: Value) {
        what["stage"] = stage.into();
        let line = format!("{what}\n");
        if self.0.write_all(line.as_bytes()).is_err() || self.0.sync_all().is_err() {
            eprintln!("nobody hears: {line}");
        }
    }
}

/// The stages that a boot has said so far; the last may be there in part, and is then left out.
pub(super) fn stages(dir: &Path, boot: u64) -> Vec<Value> {
    let text = fs::read_to_string(path(dir, boot)).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let lines = whole.lines();
    lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

fn path(dir: &Path, boot: u64) -> std::path::PathBuf {
    dir.join(format!("report.{boot}"))
}
