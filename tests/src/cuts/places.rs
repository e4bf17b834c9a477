//! What is known of all places, from the folder of the host: where they stood at some boot, and what every writer
//! reported since.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::model::{Place, replay};
use super::witness::{self, Kind};

/// Files that are written, by number.
pub(super) const FILES: u64 = 48;

/// All places of a run.
#[derive(Debug)]
pub(super) struct Places {
    pub sectors: Vec<Place>,
    pub files: Vec<Place>,
    pub lus: Vec<Place>,
    /// Parts of the raw LU, of so many sectors each, in which something was open at a cut since they stood firm: a
    /// parity there may be torn.
    pub open: Vec<bool>,
    pub parts: Parts,
}

/// How sectors make stripes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Parts {
    /// Sectors of a stripe.
    pub sectors: u64,
    /// Sectors of the LU before the first.
    pub shift: u64,
}

impl Parts {
    /// The stripe that a sector is in.
    pub(super) fn of(self, sector: usize) -> usize {
        let part = (sector as u64 + self.shift) / self.sectors;
        usize::try_from(part).expect("small")
    }
}

/// The file with the logs of a boot's writer.
pub(super) fn log_path(dir: &Path, boot: u64, writer: &str) -> PathBuf {
    dir.join(format!("log.{boot}.{writer}"))
}

/// The file that says where on the LU the file of the raw writers begins.
pub(super) fn shift_path(dir: &Path) -> PathBuf {
    dir.join("shift")
}

fn base_path(dir: &Path) -> PathBuf {
    dir.join("base")
}

impl Places {
    fn new(sectors: u64, parts: Parts) -> Self {
        let many = |count: u64| vec![Place::default(); usize::try_from(count).expect("small")];
        Self {
            sectors: many(sectors),
            files: many(FILES),
            lus: many(1),
            open: vec![false; parts.of(usize::try_from(sectors).expect("small")) + 1],
            parts,
        }
    }

    /// Reads the state before boot `boot`; `stripe`: sectors of a stripe of the raw LU.
    pub(super) fn read(dir: &Path, boot: u64, sectors: u64, stripe: u64) -> io::Result<Self> {
        let shift = fs::read_to_string(shift_path(dir)).ok();
        let shift = shift.and_then(|text| text.trim().parse().ok());
        let parts = Parts {
            sectors: stripe,
            shift: shift.unwrap_or_default(),
        };
        let mut places = Self::new(sectors, parts);
        let mut from = 0;
        if let Ok(bytes) = fs::read(base_path(dir)) {
            let mut words = bytes
                .chunks_exact(8)
                .map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")));
            from = words.next().unwrap_or_default();
            let all = places.sectors.iter_mut();
            let all = all.chain(&mut places.files).chain(&mut places.lus);
            for (place, durable) in all.zip(words) {
                place.durable = durable;
            }
        }
        for boot in from..boot {
            places.replay_boot(dir, boot)?;
            for (index, sector) in places.sectors.iter().enumerate() {
                places.open[parts.of(index)] |= !sector.later.is_empty();
            }
        }
        Ok(places)
    }

    fn replay_boot(&mut self, dir: &Path, boot: u64) -> io::Result<()> {
        let prefix = format!("log.{boot}.");
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                let records = witness::read(&entry.path())?;
                replay(&mut self.sectors, Kind::Sector, &records);
                replay(&mut self.files, Kind::File, &records);
                replay(&mut self.lus, Kind::Lu, &records);
            }
        }
        Ok(())
    }

    /// Says that these values stand: what boots before `boot` reported is of the past. At once, or not at all.
    pub(super) fn stand(
        dir: &Path,
        boot: u64,
        values: impl Iterator<Item = u64>,
    ) -> io::Result<()> {
        let words = std::iter::once(boot).chain(values);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        let part = dir.join("base.part");
        fs::write(&part, bytes)?;
        fs::File::open(&part)?.sync_all()?;
        fs::rename(part, base_path(dir))
    }
}
