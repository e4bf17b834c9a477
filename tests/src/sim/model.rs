//! Which values each sector of a LU may have.
//!
//! Every write stamps its sectors with a number of its own; the bytes of a sector follow from the stamp and its address, so
//! that whoever reads a sector knows which write it is of, and that it is of this place. Stamp 0 is a sector of zeroes.
//!
//! # What a sector may have
//! ```text
//! base      what it had when all was durable last: one stamp, or after a power cut one of several
//! writes    those since, in order: under way, answered (acked), answered with an error (doubtful)
//! seen      of several the one that was read: it is that one from then on
//! ```
//! - *Read now*: the last acked write, or base, and every write after it that is under way or doubtful. Nothing else.
//! - *A flush that succeeds*: the last write that was acked before the flush was sent is base; what was before it is over.
//!   A FUA write is so by itself.
//! - *The process dies*: nothing changes. What was under way is sent again (ublk reissues it).
//! - *The power goes*: each of base and writes may be it, as a volatile cache loses what it likes; nothing else.
//! - *Discard*: the sector has what it had, or zeroes.
//!
//! A value that was read is shown ever after (`seen`), with one exception: where a power cut left several values, copies may differ until the
//! resync has passed. If a member is lost before, or cannot be read there, another copy may show another of these values: never any other.
//! Power that goes after such a loss takes what the resync had written of the lost member's from the others' caches: so then, too.
//!
//! # The write hole
//! `none` and `bitmap` do not close it, so the law exempts it, exactly: a row (one grain of every chunk of a stripe) is *in
//! doubt* after a power cut if it had a write that was not durable, and until it is written whole again, or the group is
//! synced. Where a member is lost (or is not there any more) while a row is in doubt, the sectors that the lost members
//! hold in that row may have anything. Mirrors have no such rows. A group that starts without force after a power cut says that there are none
//! for the members that are not there: then nothing of it is exempt. (Dirty and degraded it is refused by name.)
//!
//! The logs of `ppl` and `journal` close it, but for law 6 of the engine's `ppl`: where a member is lost with the power, a sector
//! that it held and that had a write which was not durable may have anything, if other chunks (`journal`: all) had such writes in the
//! same column too. It is over with the next start.
//!
//! # Rot
//! A sector whose column (the same sector of every chunk of its stripe) rotted on any member may have anything from then on: nothing attributes it.

use std::collections::{BTreeMap, BTreeSet};

use lunar_api::target::Consistency;
use lunar_engine::extents::ExtentMap;
use lunar_engine::geometry::Geometry;

use super::disk::SECTOR;
use super::random::mix;

/// Number of a write.
pub type Stamp = u32;
/// A sector of zeroes.
pub const ZEROES: Stamp = 0;
/// Sectors of a grain.
const GRAIN: u64 = 8;

/// Fills a sector as its write does.
pub fn fill(stamp: Stamp, sector: u64, to: &mut [u8]) {
    if stamp == ZEROES {
        return to.fill(0);
    }
    let key = mix(u64::from(stamp) << 32 ^ sector);
    to[..8].copy_from_slice(&(u64::from(stamp) << 32 | sector).to_le_bytes());
    for (word, i) in to[8..].chunks_exact_mut(8).zip(1u64..) {
        let value = key.wrapping_mul(i | 1).rotate_left(17) ^ key.wrapping_add(i);
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// The write that a sector is of; none: it is of no write, or of another place.
pub fn stamp_of(bytes: &[u8], sector: u64) -> Option<Stamp> {
    let head = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
    if head == 0 && bytes.iter().all(|byte| *byte == 0) {
        return Some(ZEROES);
    }
    let stamp = (head >> 32) as Stamp;
    let mut right = [0; SECTOR as usize];
    fill(stamp, sector, &mut right);
    (stamp != ZEROES && right == bytes).then_some(stamp)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    UnderWay,
    /// At this count of answers.
    Acked(u64),
    Doubtful,
}

#[derive(Debug, Clone)]
struct Sector {
    base: Vec<Stamp>,
    writes: Vec<(Stamp, Stage)>,
    seen: Option<Stamp>,
    /// Base may be anything, until a write is durable.
    is_any: bool,
    /// Something of its column rotted: nothing is known of it any more.
    is_rotten: bool,
}

impl Sector {
    fn of(stamp: Stamp) -> Self {
        Self {
            base: vec![stamp],
            writes: Vec::new(),
            seen: None,
            is_any: false,
            is_rotten: false,
        }
    }

    /// What a read may show.
    fn visible(&self) -> Vec<Stamp> {
        let acked = |(_, stage): &(Stamp, Stage)| matches!(stage, Stage::Acked(_));
        let last = self.writes.iter().rposition(acked);
        let mut all = match (self.seen, last) {
            (Some(seen), _) => vec![seen],
            (None, Some(_)) => Vec::new(),
            (None, None) => self.base.clone(),
        };
        for (stamp, stage) in &self.writes[last.unwrap_or(0)..] {
            if self.seen.is_none() || *stage == Stage::UnderWay {
                all.push(*stamp);
            }
        }
        all
    }

    /// Nothing is known of what a read shows.
    fn is_unknown(&self) -> bool {
        let acked = |(_, stage): &(Stamp, Stage)| matches!(stage, Stage::Acked(_));
        self.is_rotten || self.is_any && !self.writes.iter().any(acked)
    }

    fn is_under_way(&self) -> bool {
        self.writes
            .iter()
            .any(|(_, stage)| *stage == Stage::UnderWay)
    }
}

/// What a sector might have shown when a read was sent.
#[derive(Debug, Clone)]
pub struct Before {
    visible: Vec<Stamp>,
    is_under_way: bool,
    is_unknown: bool,
    /// Losses that there had been.
    losses: u64,
}

/// A sector that has what it must not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    pub lu: usize,
    pub sector: u64,
    /// None: bytes of no write.
    pub found: Option<Stamp>,
    pub allowed: Vec<Stamp>,
}

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (lu, sector, allowed) = (self.lu, self.sector, &self.allowed);
        match self.found {
            Some(found) => write!(
                f,
                "sector {sector} of LU {lu} has write {found}, may have {allowed:?}"
            ),
            None => write!(
                f,
                "sector {sector} of LU {lu} has bytes of no write, may have {allowed:?}"
            ),
        }
    }
}

/// What a policy leaves of the write hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hole {
    /// Nothing at all.
    None,
    /// All of it.
    Open,
    /// Columns in which several data chunks were being written.
    Several,
    /// Columns in which all were.
    All,
}

impl Hole {
    pub fn of(consistency: Consistency) -> Self {
        match consistency {
            Consistency::None | Consistency::Bitmap => Self::Open,
            Consistency::Ppl => Self::Several,
            Consistency::Journal => Self::All,
        }
    }
}

/// The values that a LU may have.
#[derive(Debug)]
pub struct Model {
    lu: usize,
    geometry: Geometry,
    extents: ExtentMap,
    sectors: Vec<Sector>,
    /// Sectors with writes that are not durable.
    unsettled: BTreeSet<u64>,
    /// Sectors that may have one of several values.
    open: BTreeSet<u64>,
    /// Rows in doubt: stripe, and grain of the chunk.
    doubt: BTreeSet<(u64, u64)>,
    /// Columns that a log does not give back: stripe, and sector of the chunk; the data chunks that were being written, as
    /// bits.
    torn: BTreeMap<(u64, u64), u64>,
    hole: Hole,
    /// Times that members were lost: what a member showed that is lost since says nothing that lasts.
    losses: u64,
    /// One was, and not all of it is synced since: what a resync wrote on others is in their caches.
    was_lost: bool,
    /// Nothing is left to be synced: all copies and parities fit.
    is_whole: bool,
    answers: u64,
}

impl Model {
    /// A LU that reads as zero, durably.
    pub fn new(lu: usize, geometry: Geometry, extents: ExtentMap, hole: Hole) -> Self {
        let sectors = extents.capacity() / SECTOR;
        Self {
            lu,
            geometry,
            extents,
            sectors: vec![Sector::of(ZEROES); sectors as usize],
            unsettled: BTreeSet::new(),
            open: BTreeSet::new(),
            doubt: BTreeSet::new(),
            torn: BTreeMap::new(),
            hole,
            losses: 0,
            was_lost: false,
            is_whole: false,
            answers: 0,
        }
    }

    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// The LU has grown; nobody knows what is in what it got.
    pub fn grow(&mut self, extents: ExtentMap) {
        let sectors = extents.capacity() / SECTOR;
        self.extents = extents;
        let new = Sector {
            is_any: true,
            ..Sector::of(ZEROES)
        };
        self.sectors.resize(sectors as usize, new);
    }

    /// The stripe of a sector, its data chunk, and the sector within the chunk.
    pub fn place(&self, sector: u64) -> (u64, u16, u64) {
        let (at, _) = self.extents.resolve(sector * SECTOR).expect("of the LU");
        let place = self.geometry.locate(at);
        (place.stripe, place.data, u64::from(place.in_chunk) / SECTOR)
    }

    /// The stripes of a range of sectors.
    pub fn stripes(&self, sectors: std::ops::Range<u64>) -> Vec<u64> {
        let step = (self.geometry.chunk() / SECTOR).max(1);
        let mut all = Vec::new();
        let mut at = sectors.start;
        while at < sectors.end {
            all.push(self.place(at).0);
            at = (at / step + 1) * step;
        }
        all.dedup();
        all
    }

    /// Says whether any of them has a write under way.
    pub fn is_under_way(&self, sectors: std::ops::Range<u64>) -> bool {
        self.sectors[sectors.start as usize..sectors.end as usize]
            .iter()
            .any(Sector::is_under_way)
    }

    /// A write is sent.
    pub fn begin(&mut self, sectors: std::ops::Range<u64>, stamp: Stamp) {
        for sector in sectors {
            self.sectors[sector as usize]
                .writes
                .push((stamp, Stage::UnderWay));
            self.unsettled.insert(sector);
        }
    }

    /// A write has succeeded.
    pub fn acked(&mut self, sectors: std::ops::Range<u64>, stamp: Stamp, fua: bool) {
        self.answers += 1;
        for sector in sectors {
            self.stage(sector, stamp, Stage::Acked(self.answers));
            if fua {
                self.settle(sector, self.answers);
            }
        }
    }

    /// A write has failed, or was a discard: old or new.
    pub fn doubtful(&mut self, sectors: std::ops::Range<u64>, stamp: Stamp) {
        self.answers += 1;
        for sector in sectors {
            self.stage(sector, stamp, Stage::Doubtful);
            self.open.insert(sector);
        }
    }

    fn stage(&mut self, sector: u64, stamp: Stamp, stage: Stage) {
        let place = &mut self.sectors[sector as usize];
        let is_it = |write: &&mut (Stamp, Stage)| *write == &(stamp, Stage::UnderWay);
        place
            .writes
            .iter_mut()
            .rfind(is_it)
            .expect("it was begun")
            .1 = stage;
        place.seen = None;
    }

    /// Whole rows that a write has made right again, in a group of which every member is there.
    pub fn rows_written(&mut self, sectors: std::ops::Range<u64>) {
        if self.doubt.is_empty() {
            return;
        }
        for sector in sectors {
            let (stripe, _, in_chunk) = self.place(sector);
            self.doubt.remove(&(stripe, in_chunk / GRAIN));
        }
    }

    /// Answers that there were: what a flush that is sent now covers.
    pub fn answers(&self) -> u64 {
        self.answers
    }

    /// A flush has succeeded that was sent after so many answers.
    pub fn flushed(&mut self, answers: u64) {
        let unsettled: Vec<u64> = self.unsettled.iter().copied().collect();
        for sector in unsettled {
            self.settle(sector, answers);
        }
    }

    fn settle(&mut self, sector: u64, answers: u64) {
        let place = &mut self.sectors[sector as usize];
        let covered =
            |(_, stage): &(Stamp, Stage)| matches!(stage, Stage::Acked(at) if *at <= answers);
        let Some(last) = place.writes.iter().rposition(covered) else {
            return;
        };
        place.base = vec![place.writes[last].0];
        place.is_any = false;
        place.writes.drain(..=last);
        if place.writes.is_empty() {
            self.unsettled.remove(&sector);
            self.open.remove(&sector);
        }
    }

    /// The power went.
    pub fn power_lost(&mut self) {
        let has_rows = self.geometry.parities() > 0;
        for sector in std::mem::take(&mut self.unsettled) {
            let (stripe, d, in_chunk) = self.place(sector);
            match self.hole {
                Hole::Open if has_rows => {
                    self.doubt.insert((stripe, in_chunk / GRAIN));
                }
                Hole::Several | Hole::All if has_rows => {
                    *self.torn.entry((stripe, in_chunk)).or_default() |= 1 << d;
                }
                _ => {}
            }
            let place = &mut self.sectors[sector as usize];
            for (stamp, _) in place.writes.drain(..) {
                if !place.base.contains(&stamp) {
                    place.base.push(stamp);
                }
            }
            place.seen = None;
            self.open.insert(sector);
        }
        let least = match self.hole {
            Hole::All => self.geometry.data_slots().into(),
            _ => 2,
        };
        self.torn.retain(|_, chunks| chunks.count_ones() >= least);
        self.is_whole = false;
        if std::mem::take(&mut self.was_lost) {
            for sector in &self.open {
                self.sectors[*sector as usize].seen = None;
            }
        }
    }

    /// A start has ended without these slots (as bits) in sync: what the logs do not give back is what it is from here on.
    pub fn started(&mut self, slots: u64) {
        for ((stripe, column), chunks) in &self.torn {
            for d in 0..self.geometry.data_slots() {
                let is_lost = slots & 1 << self.geometry.slot_of(*stripe, d) != 0;
                if !is_lost || chunks & 1 << d == 0 {
                    continue;
                }
                let in_chunk = u32::try_from(column * SECTOR).expect("within a chunk");
                let at = self.geometry.address(*stripe, d, in_chunk);
                for sector in self.sectors_at(at, 1) {
                    self.sectors[sector as usize].is_any = true;
                }
            }
        }
        self.torn.clear();
    }

    /// Every member is there, and all of it is synced.
    pub fn synced(&mut self) {
        self.was_lost = false;
        self.is_whole = true;
        self.doubt.clear();
        for sector in &self.open {
            let place = &mut self.sectors[*sector as usize];
            if let Some(seen) = place.seen.filter(|_| place.writes.is_empty()) {
                place.base = vec![seen];
            }
        }
    }

    /// These slots (as bits) are not there, or not in sync.
    pub fn lost(&mut self, slots: u64) {
        self.was_lost = true;
        self.is_whole = false;
        self.losses += 1;
        for sector in &self.open {
            self.sectors[*sector as usize].seen = None;
        }
        for (stripe, row) in &self.doubt {
            for d in 0..self.geometry.data_slots() {
                if slots & 1 << self.geometry.slot_of(*stripe, d) == 0 {
                    continue;
                }
                let in_chunk = u32::try_from(row * GRAIN * SECTOR).expect("within a chunk");
                let at = self.geometry.address(*stripe, d, in_chunk);
                for sector in self.sectors_at(at, GRAIN) {
                    self.sectors[sector as usize].is_any = true;
                }
            }
        }
    }

    /// Sectors of a member cannot be read: in rows in doubt they are lost, and of several values another copy may show
    /// another. `start`: where its data begins.
    pub fn unreadable(&mut self, slot: u16, start: u64, bad: &BTreeSet<u64>) {
        self.losses += 1;
        for sector in &self.open {
            self.sectors[*sector as usize].seen = None;
        }
        for (stripe, row) in &self.doubt {
            let d = self.geometry.part_of(*stripe, slot);
            if d >= self.geometry.data_slots() {
                continue;
            }
            let in_chunk = row * GRAIN * SECTOR;
            let first = (start + stripe * self.geometry.chunk() + in_chunk) / SECTOR;
            if bad.range(first..first + GRAIN).next().is_none() {
                continue;
            }
            let at = self.geometry.address(*stripe, d, in_chunk as u32);
            for sector in self.sectors_at(at, GRAIN) {
                self.sectors[sector as usize].is_any = true;
            }
        }
    }

    /// Sectors of the LU from an address of the group on.
    fn sectors_at(&self, at: u64, count: u64) -> std::ops::Range<u64> {
        let end = self.extents.capacity();
        // Extents are few and long: looked for from the first.
        let mut pos = 0;
        while pos < end {
            let (from, room) = self.extents.resolve(pos).expect("of the LU");
            if (from..from + room).contains(&at) {
                let first = (pos + at - from) / SECTOR;
                return first..(first + count).min(self.sectors());
            }
            pos += room;
        }
        0..0
    }

    /// A sector of a member's chunk rotted: nothing of its column is known any more.
    pub fn rotted(&mut self, stripe: u64, in_chunk: u32) {
        for d in 0..self.geometry.data_slots() {
            let at = self.geometry.address(stripe, d, in_chunk);
            for sector in self.sectors_at(at, 1) {
                // No write makes it known again: parity of the column may be computed from what rotted.
                self.sectors[sector as usize].is_rotten = true;
            }
        }
    }

    /// What a read that is sent now may show, beside what it may show when it ends.
    pub fn before(&self, sectors: std::ops::Range<u64>) -> Vec<Before> {
        let before = |sector| {
            let place = &self.sectors[sector as usize];
            Before {
                visible: place.visible(),
                is_under_way: place.is_under_way(),
                is_unknown: place.is_unknown(),
                losses: self.losses,
            }
        };
        sectors.map(before).collect()
    }

    /// A read has shown these bytes.
    ///
    /// # Errors  the first sector that has what it must not have
    pub fn shown(
        &mut self,
        sectors: std::ops::Range<u64>,
        bytes: &[u8],
        before: &[Before],
    ) -> Result<(), Wrong> {
        let parts = bytes.chunks_exact(SECTOR as usize).zip(before);
        for (sector, (bytes, before)) in sectors.zip(parts) {
            let place = &mut self.sectors[sector as usize];
            if place.is_unknown() || before.is_unknown {
                continue;
            }
            let visible = place.visible();
            let found = stamp_of(bytes, sector);
            let may = |found: &Stamp| visible.contains(found) || before.visible.contains(found);
            let Some(stamp) = found.filter(may) else {
                return Err(Wrong {
                    lu: self.lu,
                    sector,
                    found,
                    allowed: visible,
                });
            };
            // Of what was under way meanwhile a read says nothing that lasts.
            let is_quiet =
                !before.is_under_way && !place.is_under_way() && before.losses == self.losses;
            if is_quiet && visible == before.visible && visible.len() > 1 {
                place.seen = Some(stamp);
                if self.is_whole && place.writes.is_empty() {
                    place.base = vec![stamp];
                    place.seen = None;
                }
            }
        }
        Ok(())
    }

    /// Says whether nothing is known of a sector.
    pub fn is_unknown(&self, sector: u64) -> bool {
        self.sectors[sector as usize].is_unknown()
    }
}

#[cfg(test)]
mod tests {
    use lunar_api::target::Level;
    use lunar_engine::extents::Extent;

    use super::*;

    fn model() -> Model {
        let geometry = Geometry::new(Level::Raid5, 3, 65536, 1 << 20).unwrap();
        let extents = ExtentMap::new(&[Extent {
            at: 0,
            len: 1 << 20,
        }]);
        Model::new(0, geometry, extents, Hole::Open)
    }

    fn show(model: &mut Model, sector: u64, stamp: Stamp) -> bool {
        let mut bytes = [0; SECTOR as usize];
        fill(stamp, sector, &mut bytes);
        let before = model.before(sector..sector + 1);
        model.shown(sector..sector + 1, &bytes, &before).is_ok()
    }

    #[test]
    fn sector_knows_its_write_and_its_place() {
        let mut bytes = [0; SECTOR as usize];
        fill(7, 5, &mut bytes);
        assert_eq!(stamp_of(&bytes, 5), Some(7));
        assert_eq!(stamp_of(&bytes, 6), None);
        bytes[100] ^= 1;
        assert_eq!(stamp_of(&bytes, 5), None);
        assert_eq!(stamp_of(&[0; SECTOR as usize], 9), Some(ZEROES));
    }

    #[test]
    fn acked_write_is_all_that_is_read_and_a_power_cut_may_take_it_until_a_flush() {
        let mut model = model();
        model.begin(0..8, 1);
        assert!(show(&mut model, 0, 0) && show(&mut model, 0, 1));
        model.acked(0..8, 1, false);
        assert!(show(&mut model, 0, 1) && !show(&mut model, 0, 0));
        model.power_lost();
        // Either, and then that one for ever.
        assert!(show(&mut model, 0, 0) && !show(&mut model, 0, 1));
        assert!(show(&mut model, 1, 1) && !show(&mut model, 1, 0));
        assert!(!show(&mut model, 8, 1), "nobody wrote it");
        model.begin(0..8, 2);
        model.acked(0..8, 2, false);
        model.begin(0..4, 3);
        model.flushed(model.answers());
        model.acked(0..4, 3, false);
        model.power_lost();
        assert!(show(&mut model, 4, 2) && !show(&mut model, 5, 0));
        assert!(show(&mut model, 0, 3) && show(&mut model, 1, 2) && !show(&mut model, 2, 1));
    }

    #[test]
    fn write_hole_is_what_a_lost_member_holds_of_rows_in_doubt_and_no_more() {
        let mut model = model();
        // Stripe 0 of three members: P is on slot 2, data on 0 and 1.
        model.begin(0..1, 1);
        model.power_lost();
        model.lost(1 << 1);
        for sector in 128..136 {
            assert!(model.is_unknown(sector));
        }
        assert!(
            !model.is_unknown(0)
                && !model.is_unknown(8)
                && !model.is_unknown(136)
                && !model.is_unknown(127)
        );
        let mut model = self::model();
        model.begin(0..1, 1);
        model.power_lost();
        model.synced();
        model.lost(1 << 1);
        assert!(!model.is_unknown(128));
    }
}
