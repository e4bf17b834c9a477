//! The host: requests that it has sent, what it was told, and what it may be told.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use lunar_engine::raid_group::Errno;
use lunar_engine::traits::{HostRequest, HostVerb, RequestId};

use super::disk::SECTOR;
use super::model::{Before, Model, Stamp, Wrong, ZEROES, fill};
use super::plan::Config;
use super::random::Random;
use super::world::{TAGS, World};

/// Tag of requests that are sent alone, to look at what is there.
pub const LOOK_TAG: usize = TAGS - 1;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write { fua: bool },
    Flush,
    Discard,
    Zeroes { unmap: bool },
}

/// A request that is not answered yet.
#[derive(Debug, Clone)]
pub struct Sent {
    pub tag: usize,
    pub lu: usize,
    pub kind: Kind,
    pub sectors: Range<u64>,
    pub stamp: Stamp,
    /// Of a flush: answers that there were.
    answers: u64,
    /// Of a read: what it might have shown when it was sent.
    before: Vec<Before>,
    stripes: Vec<u64>,
    zero_copy: bool,
    pub answer: Rc<Cell<Option<Result<(), Errno>>>>,
}

impl Sent {
    pub fn request(&self) -> HostRequest {
        let verb = match self.kind {
            Kind::Read => HostVerb::Read,
            Kind::Write { fua } => HostVerb::Write { fua },
            Kind::Flush => HostVerb::Flush,
            Kind::Discard => HostVerb::Discard,
            Kind::Zeroes { unmap } => HostVerb::WriteZeroes { unmap },
        };
        HostRequest {
            id: RequestId {
                device: self.lu as u16,
                tag: self.tag as u16,
            },
            verb,
            at: self.sectors.start * SECTOR,
            len: (self.sectors.end - self.sectors.start) * SECTOR,
            zero_copy: self.zero_copy,
        }
    }

    fn overlaps(&self, lu: usize, sectors: &Range<u64>) -> bool {
        self.lu == lu && self.sectors.start < sectors.end && sectors.start < self.sectors.end
    }
}

/// What a harvest has shown.
#[derive(Debug)]
pub enum Told {
    Answered,
    /// An errno, to a request of this kind.
    Failed(Kind, Errno),
    Wrong(Wrong),
}

/// The host.
#[derive(Debug)]
pub struct Host {
    pub models: Vec<Model>,
    pub sent: Vec<Sent>,
    stamps: Stamp,
    /// Requests, and those of them that shared a stripe with another when they were sent.
    pub requests: u64,
    pub sharing: u64,
    pub writes_failed: u64,
}

impl Host {
    pub fn new(models: Vec<Model>) -> Self {
        Self {
            models,
            sent: Vec::new(),
            stamps: ZEROES,
            requests: 0,
            sharing: 0,
            writes_failed: 0,
        }
    }

    fn draw_kind(random: &Random, config: &Config) -> Kind {
        let mut left = random.below(100);
        for (i, share) in config.mix.iter().enumerate() {
            if left < *share {
                return match i {
                    0 => Kind::Read,
                    1 => Kind::Flush,
                    2 => Kind::Discard,
                    _ => Kind::Zeroes {
                        unmap: random.percent(50),
                    },
                };
            }
            left -= share;
        }
        Kind::Write {
            fua: random.percent(config.fua),
        }
    }

    fn draw_sectors(&self, random: &Random, config: &Config, lu: usize, kind: Kind) -> Range<u64> {
        let all = self.models[lu].sectors();
        let most = match kind {
            Kind::Flush => return 0..0,
            Kind::Discard | Kind::Zeroes { .. } => 2048,
            Kind::Read | Kind::Write { .. } => config.longest,
        };
        let most = *random.of(&[1, 8, 8, 32, most, most]);
        let mut len = 1 + random.below(most.min(config.longest.max(8)).min(all));
        let mut at = match random.percent(75) {
            true => random.below(config.hot.min(all)),
            false => random.below(all),
        };
        if random.percent(50) {
            (at, len) = (at / 8 * 8, len.next_multiple_of(8));
        }
        let len = len.min(all);
        at.min(all - len)..at.min(all - len) + len
    }

    /// The next request, if one can be sent that does not write what another is at.
    pub fn draw(&mut self, world: &World, random: &Random, config: &Config) -> Option<Sent> {
        let tag = (0..LOOK_TAG).find(|tag| !self.sent.iter().any(|sent| sent.tag == *tag))?;
        for _ in 0..12 {
            let lu = random.index(self.models.len());
            let kind = Self::draw_kind(random, config);
            let sectors = self.draw_sectors(random, config, lu, kind);
            let meets = |sent: &Sent| sent.overlaps(lu, &sectors);
            let is_read = kind == Kind::Read;
            let clashes = |sent: &Sent| meets(sent) && !(is_read && sent.kind == Kind::Read);
            // A read may see what is being written; a write never meets anything.
            let is_refused = match is_read {
                true => false,
                false => self.sent.iter().any(clashes),
            };
            if is_refused {
                continue;
            }
            return Some(self.make(world, random, (tag, lu, kind, sectors)));
        }
        None
    }

    /// A read of these sectors, to look at what is there.
    pub fn look(&self, lu: usize, sectors: Range<u64>) -> Sent {
        let before = self.models[lu].before(sectors.clone());
        Sent {
            tag: LOOK_TAG,
            lu,
            kind: Kind::Read,
            sectors,
            stamp: ZEROES,
            answers: 0,
            before,
            stripes: Vec::new(),
            zero_copy: true,
            answer: Rc::default(),
        }
    }

    fn make(
        &mut self,
        world: &World,
        random: &Random,
        (tag, lu, kind, sectors): (usize, usize, Kind, Range<u64>),
    ) -> Sent {
        let model = &mut self.models[lu];
        let mut sent = Sent {
            tag,
            lu,
            kind,
            stripes: model.stripes(sectors.clone()),
            sectors: sectors.clone(),
            stamp: ZEROES,
            answers: model.answers(),
            before: Vec::new(),
            zero_copy: random.percent(70),
            answer: Rc::default(),
        };
        let mut pages = world.pages.borrow_mut();
        pages[tag] = vec![0; ((sectors.end - sectors.start) * SECTOR) as usize];
        match kind {
            Kind::Read => sent.before = model.before(sectors),
            Kind::Flush => {}
            Kind::Write { .. } => {
                self.stamps += 1;
                sent.stamp = self.stamps;
                for (sector, bytes) in sectors.clone().zip(pages[tag].chunks_exact_mut(512)) {
                    fill(sent.stamp, sector, bytes);
                }
                model.begin(sectors, sent.stamp);
            }
            Kind::Discard | Kind::Zeroes { .. } => model.begin(sectors, ZEROES),
        }
        self.requests += 1;
        let shares = |other: &Sent| {
            let both = other
                .stripes
                .iter()
                .any(|stripe| sent.stripes.contains(stripe));
            other.lu == lu && both
        };
        self.sharing += u64::from(self.sent.iter().any(shares));
        self.sent.push(sent.clone());
        sent
    }

    /// Takes in one answer, if there is one. `is_whole`: every member of the group is in sync.
    pub fn harvest(&mut self, world: &World, is_whole: bool) -> Option<Told> {
        let at = self
            .sent
            .iter()
            .position(|sent| sent.answer.get().is_some())?;
        let sent = self.sent.swap_remove(at);
        let answer = sent.answer.get().unwrap_or(Ok(()));
        let told = sent.sectors.start << 16 ^ (sent.tag as u64) << 1 ^ u64::from(answer.is_ok());
        world.trace(told);
        world.tell(|| format!("answer {}: {answer:?}", sent.tag));
        Some(self.take(world, &sent, answer, is_whole))
    }

    /// Takes in the answer to a request.
    pub fn take(
        &mut self,
        world: &World,
        sent: &Sent,
        answer: Result<(), Errno>,
        is_whole: bool,
    ) -> Told {
        let model = &mut self.models[sent.lu];
        let sectors = sent.sectors.clone();
        match (sent.kind, answer) {
            (Kind::Read, Ok(())) => {
                let pages = world.pages.borrow();
                if let Err(wrong) = model.shown(sectors, &pages[sent.tag], &sent.before) {
                    return Told::Wrong(wrong);
                }
            }
            (Kind::Read | Kind::Flush, Err(errno)) => return Told::Failed(sent.kind, errno),
            (Kind::Flush, Ok(())) => model.flushed(sent.answers),
            (Kind::Discard, Ok(())) => model.doubtful(sectors, ZEROES),
            (Kind::Write { .. } | Kind::Zeroes { .. }, Ok(())) => {
                let fua = sent.kind == Kind::Write { fua: true };
                if is_whole {
                    model.rows_written(sectors.clone());
                }
                model.acked(sectors, sent.stamp, fua);
            }
            (Kind::Write { .. } | Kind::Zeroes { .. } | Kind::Discard, Err(errno)) => {
                model.doubtful(sectors, sent.stamp);
                self.writes_failed += 1;
                return Told::Failed(sent.kind, errno);
            }
        }
        Told::Answered
    }

    /// The power went: nobody waits for anything any more.
    pub fn power_lost(&mut self) {
        self.sent.clear();
        self.models.iter_mut().for_each(Model::power_lost);
    }
}
