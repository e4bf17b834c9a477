//! A disk: durable bytes, and writes that are not durable yet.
//!
//! # Rules
//! A write takes its bytes from memory when it is submitted or when it ends, as drawn: whoever changes them meanwhile is
//! found out. It is visible when it ends; it is durable then if it has FUA, else when a flush ends that was submitted after
//! it had ended, or at once on a disk without a volatile cache.
//!
//! When the power goes, every write that is not durable is kept, dropped, or torn at sectors of 512 bytes, each for itself: a later one
//! may be there and an earlier one not. When the process dies, what it has in flight happens or not (it may not have reached
//! the kernel yet), and its successor sees no more of it: a disk is opened exclusively.
//!
//! # How
//! `pages` is what is seen. Each write that is not durable leaves a record of what was there before; the power cut takes them
//! all back, in reverse, and then does those again that are kept. A FUA write over one of them is put into that record
//! too, so that neither brings back what it has overwritten.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use lunar_api::DiskUuid;
use lunar_engine::pool::Lease;
use lunar_engine::traits::{Buf, Disk, DiskError, DiskVerb, Piece};

use super::pages::{Bytes, Pages};
use super::random::Random;
use super::states::Eye;
use super::world::{Answer, Happen, Io, Slot, World};

pub const SECTOR: u64 = 512;
const EIO: DiskError = DiskError::Errno(5);

/// How long its I/O takes, in ns.
#[derive(Debug, Clone, Copy)]
pub struct Speed {
    pub least: u64,
    pub spread: u64,
    /// In a hundred: takes up to forty times as long.
    pub stalls: u64,
}

/// What is wrong with it.
#[derive(Debug, Default)]
pub struct Faults {
    /// It answers errors to all.
    pub is_gone: Cell<bool>,
    /// Its own power was lost, and the group does not know yet: until it does the disk stays gone. (What a disk forgets
    /// unseen nobody can know.)
    pub is_unseen: Cell<bool>,
    /// What is submitted ends when it does not hang any more.
    pub hangs: Cell<bool>,
    /// So many of the next writes fail.
    pub write_errors: Cell<u32>,
    /// One of its writes fails, or has: it will not be a member for long.
    pub is_failing: Cell<bool>,
    /// Everything takes this many times as long; 0: as always.
    pub slow: Cell<u64>,
    /// Sectors that cannot be read until they are written.
    pub bad: RefCell<BTreeSet<u64>>,
    /// It cannot zero.
    pub no_zeroes: Cell<bool>,
    /// Planted: it answers flushes without doing them; it takes FUA for nothing.
    pub ignores_flush: Cell<bool>,
    pub ignores_fua: Cell<bool>,
}

/// Where an I/O's bytes are.
#[derive(Debug)]
enum Held {
    None,
    Tag(usize),
    Lease(Lease),
}

/// An I/O that is under way.
#[derive(Debug)]
pub struct Flight {
    pub verb: DiskVerb,
    pub at: u64,
    pub len: u64,
    pub since: u64,
    pieces: Vec<Piece>,
    held: Held,
    /// Bytes of a write that were taken when it was submitted.
    taken: Option<Bytes>,
    slot: Rc<Slot>,
    /// What a flush makes durable: writes up to this one.
    covers: u64,
    /// On memory of the group: given up at once when the disk is.
    is_private: bool,
    hangs: bool,
}

/// A write that is not durable.
#[derive(Debug)]
struct Cached {
    number: u64,
    at: u64,
    len: u64,
    /// What was there before it.
    old: Bytes,
}

/// A disk.
pub struct SimDisk {
    pub number: u8,
    pub uuid: DiskUuid,
    has_cache: bool,
    speed: Speed,
    pages: RefCell<Pages>,
    cache: RefCell<Vec<Cached>>,
    /// Number of the last write that ended.
    written: Cell<u64>,
    flights: RefCell<BTreeMap<u64, Flight>>,
    next: Cell<u64>,
    pub faults: Faults,
    eye: Rc<Eye>,
}

impl std::fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "disk {}", self.number)
    }
}

/// What of a write is kept when the power goes.
#[derive(Debug, Clone, Copy)]
struct Fates {
    kept: u64,
    torn: u64,
}

impl SimDisk {
    pub fn new(number: u8, pages: Pages, speed: Speed, has_cache: bool, eye: &Rc<Eye>) -> Rc<Self> {
        Rc::new(Self {
            number,
            uuid: DiskUuid::from_bytes([number + 1; 16]),
            has_cache,
            speed,
            pages: RefCell::new(pages),
            cache: RefCell::default(),
            written: Cell::new(0),
            flights: RefCell::default(),
            next: Cell::new(0),
            faults: Faults::default(),
            eye: Rc::clone(eye),
        })
    }

    pub fn len(&self) -> u64 {
        self.pages.borrow().len()
    }

    /// Says whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What is seen on it.
    pub fn read(&self, at: u64, to: &mut [u8]) {
        self.pages.borrow().read(at, to);
    }

    /// A copy of what is seen on it.
    pub fn snapshot(&self) -> Pages {
        self.pages.borrow().clone()
    }

    /// Puts an older copy of it back.
    pub fn restore(&self, pages: Pages) {
        self.cache.borrow_mut().clear();
        *self.pages.borrow_mut() = pages;
    }

    /// Flips a bit of what is durable.
    pub fn rot(&self, at: u64, bit: u32) {
        let mut byte = [0];
        let mut pages = self.pages.borrow_mut();
        pages.read(at, &mut byte);
        byte[0] ^= 1 << bit;
        pages.write(at, &byte);
    }

    /// Calls `each` with what is under way.
    pub fn each_flight(&self, mut each: impl FnMut(&Flight)) {
        self.flights.borrow().values().for_each(&mut each);
    }

    /// Bytes of a write that is under way.
    pub fn bytes_of(&self, flight: &Flight, world: &World) -> Vec<u8> {
        let mut bytes = vec![0; flight.len as usize];
        match &flight.taken {
            Some(taken) => taken.copy_to(0, &mut bytes),
            None => gather(flight, world, &mut bytes),
        }
        bytes
    }

    fn apply(&self, at: u64, len: u64, bytes: &Bytes, is_durable: bool) {
        let number = self.written.get() + 1;
        self.written.set(number);
        let mut pages = self.pages.borrow_mut();
        let mut cache = self.cache.borrow_mut();
        if is_durable {
            for record in cache.iter_mut() {
                overwrite(record, at, len, bytes);
            }
        } else {
            let old = pages.get(at, len);
            cache.push(Cached {
                number,
                at,
                len,
                old,
            });
        }
        pages.put(at, len, bytes, 0);
        drop((pages, cache));
        let mut bad = self.faults.bad.borrow_mut();
        if !bad.is_empty() {
            for sector in at / SECTOR..(at + len) / SECTOR {
                bad.remove(&sector);
            }
        }
    }

    /// Ends an I/O.
    fn end(&self, world: &World, flight: &Flight) -> Answer {
        let (at, len) = (flight.at, flight.len);
        if self.faults.is_gone.get() {
            return Err(EIO);
        }
        match flight.verb {
            DiskVerb::Read => {
                let bad = self.faults.bad.borrow();
                if bad
                    .range(at / SECTOR..(at + len).div_ceil(SECTOR))
                    .next()
                    .is_some()
                {
                    return Err(EIO);
                }
                drop(bad);
                self.scatter(flight, world);
            }
            DiskVerb::Write { .. } | DiskVerb::WriteZeroes { .. } => {
                let errors = self.faults.write_errors.get();
                if errors > 0 {
                    self.faults.write_errors.set(errors - 1);
                    return Err(EIO);
                }
                if matches!(flight.verb, DiskVerb::WriteZeroes { .. })
                    && self.faults.no_zeroes.get()
                {
                    return Err(DiskError::Errno(95));
                }
                self.land(world, flight);
            }
            DiskVerb::Flush => {
                if !self.faults.ignores_flush.get() {
                    let mut cache = self.cache.borrow_mut();
                    cache.retain(|record| record.number > flight.covers);
                }
            }
        }
        Ok(())
    }

    /// A write happens.
    fn land(&self, world: &World, flight: &Flight) {
        let fua = flight.verb == DiskVerb::Write { fua: true } && !self.faults.ignores_fua.get();
        let is_durable = fua || !self.has_cache;
        let (at, len) = (flight.at, flight.len);
        self.apply(at, len, &self.new_bytes(flight, world), is_durable);
    }

    fn new_bytes(&self, flight: &Flight, world: &World) -> Bytes {
        match (&flight.taken, flight.verb) {
            (_, DiskVerb::WriteZeroes { .. }) => Bytes::Fill(0),
            (Some(taken), _) => taken.clone(),
            (None, _) => Bytes::of(&self.bytes_of(flight, world)),
        }
    }

    fn scatter(&self, flight: &Flight, world: &World) {
        let mut bytes = vec![0; flight.len as usize];
        self.read(flight.at, &mut bytes);
        let mut pos = 0;
        for piece in &flight.pieces {
            let (n, from) = (piece.len as usize, piece.offset as usize);
            let part = &bytes[pos..pos + n];
            match &flight.held {
                Held::Tag(tag) => {
                    world.pages.borrow_mut()[*tag][from..from + n].copy_from_slice(part);
                }
                Held::Lease(lease) => {
                    lunar_engine::parity::copy_in(lease.cells(from..from + n), part);
                }
                Held::None => {}
            }
            pos += n;
        }
    }

    /// The process died: what it had in flight happens, or it had not begun.
    pub fn process_died(&self, world: &World, random: &Random) {
        for (_, flight) in self.flights.take() {
            let is_write = !matches!(flight.verb, DiskVerb::Read | DiskVerb::Flush);
            if is_write && !self.faults.is_gone.get() && random.percent(60) {
                self.land(world, &flight);
            }
        }
    }

    /// The power went.
    pub fn power_lost(&self, world: &World, random: &Random) {
        let flights = self.flights.take();
        let fates = Fates {
            kept: *random.of(&[0, 20, 50, 80, 100]),
            torn: *random.of(&[0, 10, 50, 90]),
        };
        if !self.faults.is_gone.get() {
            for (_, flight) in flights {
                if !matches!(flight.verb, DiskVerb::Read | DiskVerb::Flush) {
                    let bytes = self.new_bytes(&flight, world);
                    // It was on its way: nothing of it is durable.
                    self.apply(flight.at, flight.len, &bytes, false);
                }
            }
        }
        self.forget_cache(random, fates);
        // All have lost theirs: that much is known.
        self.faults.is_unseen.set(false);
    }

    /// The power of this disk alone is lost; what it has in flight is lost with it.
    pub fn cut_alone(&self, random: &Random) {
        let fates = Fates {
            kept: *random.of(&[0, 50, 100]),
            torn: 10,
        };
        self.forget_cache(random, fates);
        self.faults.is_unseen.set(true);
    }

    /// Says whether anything is under way.
    pub fn has_flights(&self) -> bool {
        !self.flights.borrow().is_empty()
    }

    fn forget_cache(&self, random: &Random, fates: Fates) {
        let mut pages = self.pages.borrow_mut();
        let mut again = Vec::new();
        for record in self.cache.take().into_iter().rev() {
            let new = pages.get(record.at, record.len);
            pages.put(record.at, record.len, &record.old, 0);
            again.push((record.at, record.len, new));
        }
        for (at, len, new) in again.into_iter().rev() {
            if random.percent(fates.torn) {
                let mut keeps = random.percent(50);
                for sector in 0..len / SECTOR {
                    if random.percent(30) {
                        keeps = !keeps;
                    }
                    if keeps {
                        pages.put(at + sector * SECTOR, SECTOR, &new, sector * SECTOR);
                    }
                }
            } else if random.percent(fates.kept) {
                pages.put(at, len, &new, 0);
            }
        }
    }
}

/// Puts into a record what a durable write has put over it.
fn overwrite(record: &mut Cached, at: u64, len: u64, bytes: &Bytes) {
    let from = record.at.max(at);
    let to = (record.at + record.len).min(at + len);
    if from >= to {
        return;
    }
    let mut old = vec![0; record.len as usize];
    record.old.copy_to(0, &mut old);
    let place = (from - record.at) as usize..(to - record.at) as usize;
    bytes.copy_to((from - at) as usize, &mut old[place]);
    record.old = Bytes::Data(old.into());
}

fn gather(flight: &Flight, world: &World, bytes: &mut [u8]) {
    let mut pos = 0;
    for piece in &flight.pieces {
        let (n, from) = (piece.len as usize, piece.offset as usize);
        let to = &mut bytes[pos..pos + n];
        match &flight.held {
            Held::Tag(tag) => to.copy_from_slice(&world.pages.borrow()[*tag][from..from + n]),
            Held::Lease(lease) => lunar_engine::parity::copy_out(to, lease.cells(from..from + n)),
            Held::None => {}
        }
        pos += n;
    }
}

impl Happen for SimDisk {
    fn happen(self: Rc<Self>, world: &World, key: u64) {
        let Some(flight) = self.flights.borrow_mut().remove(&key) else {
            return;
        };
        let answer = self.end(world, &flight);
        let verb = match flight.verb {
            DiskVerb::Read => 1,
            DiskVerb::Write { fua } => 2 + u64::from(fua),
            DiskVerb::Flush => 4,
            DiskVerb::WriteZeroes { .. } => 5,
        };
        let answered = verb << 8 | u64::from(answer.is_ok());
        world.trace(u64::from(self.number) << 56 ^ flight.at << 12 ^ flight.len << 40 ^ answered);
        self.eye.ended(&self, &flight, answer.is_ok(), world);
        flight.slot.end(answer);
    }
}

/// A disk as one process has opened it.
#[derive(Debug)]
pub struct Handle {
    world: Rc<World>,
    disk: Rc<SimDisk>,
    is_abandoned: Cell<bool>,
}

impl Handle {
    pub fn new(world: &Rc<World>, disk: &Rc<SimDisk>) -> Self {
        Self {
            world: Rc::clone(world),
            disk: Rc::clone(disk),
            is_abandoned: Cell::new(false),
        }
    }
}

impl Disk for Handle {
    type Io = Io;

    fn submit(&self, verb: DiskVerb, at: u64, len: u64, buf: Buf<'_>, pieces: &[Piece]) -> Io {
        let (disk, world) = (&self.disk, &self.world);
        assert!(at + len <= disk.len(), "beyond the disk: {at}+{len}");
        assert!(at.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR));
        let slot = Rc::new(Slot::default());
        if self.is_abandoned.get() {
            slot.end(Err(DiskError::Abandoned));
            return Io(slot);
        }
        let (held, is_private) = match buf {
            Buf::None => (Held::None, true),
            Buf::Request(id) | Buf::Answer(id) => (Held::Tag(usize::from(id.tag)), false),
            Buf::Pool(lease) => (Held::Lease(lease.clone()), true),
        };
        let mut flight = Flight {
            verb,
            at,
            len,
            since: world.now(),
            pieces: pieces.to_vec(),
            held,
            taken: None,
            slot: Rc::clone(&slot),
            covers: disk.written.get(),
            is_private,
            hangs: disk.faults.hangs.get(),
        };
        if matches!(verb, DiskVerb::Write { .. }) && world.random.percent(50) {
            flight.taken = Some(Bytes::of(&disk.bytes_of(&flight, world)));
        }
        let key = disk.next.get();
        disk.next.set(key + 1);
        let hangs = flight.hangs;
        disk.eye.submitted(disk, &flight, world);
        disk.flights.borrow_mut().insert(key, flight);
        if !hangs {
            let speed = disk.speed;
            let mut ns = speed.least + world.random.below(speed.spread);
            if world.random.percent(speed.stalls) {
                ns *= 1 + world.random.below(40);
            }
            if verb == DiskVerb::Flush {
                ns *= 4;
            }
            ns *= disk.faults.slow.get().max(1);
            world.after(ns, Rc::clone(disk) as Rc<dyn Happen>, key);
        }
        Io(slot)
    }

    fn capacity(&self) -> u64 {
        self.disk.len()
    }

    fn logical_block(&self) -> u32 {
        512
    }

    fn abandon(&self) {
        self.is_abandoned.set(true);
        for flight in self
            .disk
            .flights
            .borrow()
            .values()
            .filter(|flight| flight.is_private)
        {
            flight.slot.end(Err(DiskError::Abandoned));
        }
    }

    fn oldest(&self) -> u64 {
        let flights = self.disk.flights.borrow();
        let since = flights.values().map(|flight| flight.since).min();
        since.map_or(0, |since| (self.world.now() - since).max(1))
    }

    fn has_volatile_cache(&self) -> bool {
        self.disk.has_cache
    }
}

impl SimDisk {
    /// What hangs ends after all.
    pub fn go_on(self: &Rc<Self>, world: &World) {
        self.faults.hangs.set(false);
        let hung: Vec<u64> = {
            let mut flights = self.flights.borrow_mut();
            let hung = flights.iter_mut().filter(|(_, flight)| flight.hangs);
            hung.map(|(key, flight)| {
                flight.hangs = false;
                *key
            })
            .collect()
        };
        for key in hung {
            let ns = 1 + world.random.below(5_000_000);
            world.after(ns, Rc::clone(self) as Rc<dyn Happen>, key);
        }
    }
}

/// A disk that hangs goes on.
#[derive(Debug)]
pub struct GoOn(pub Rc<SimDisk>);

impl Happen for GoOn {
    fn happen(self: Rc<Self>, world: &World, _: u64) {
        self.0.go_on(world);
    }
}
