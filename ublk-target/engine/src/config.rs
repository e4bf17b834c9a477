//! The configuration of a group: its name, its LUs, and where they are.
//!
//! Lies as JSON in one of two slots of every member; the superblock says which, how long it is and its
//! crc32c. A change writes the other slot, syncs, and then the superblock points to it, so the old one counts
//! until the new one is whole.
//!
//! Invariants, checked when it is read and before it is written: extents are whole units inside the group
//! and apart from each other; names are legal and unique; identities are unique. A deleted LU keeps its extents
//! until a new one needs them.

use lunar_api::LuUuid;
use lunar_api::target::{LuSize, ScrubState};

use crate::extents::FreeSpace;
pub use crate::extents::{Extent, ExtentMap, allocatable_bytes, unit_bytes};
use crate::geometry::Geometry;
use crate::limits::{
    CONFIG_MAX, CONFIG_SLOT_MIN, DELETED_MAX, DEPTH_MAX, EXTENTS_MAX, LU_MAX, NAME_MAX, QUEUES_MAX,
    SCRUB_LIST_MAX,
};
use crate::superblock::{ConfigVersion, crc32c};

mod save;
#[cfg(test)]
mod tests;

/// Version of the JSON that this code reads and writes.
pub const FORMAT: u32 = 1;

/// What a group holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupConfig {
    pub name: String,
    /// In order of creation.
    pub lus: Vec<LuConfig>,
    /// Deleted ones, oldest first.
    pub deleted: Vec<LuConfig>,
    pub options: Options,
    /// The scrub that runs, or the last one.
    pub scrub: Option<ScrubRecord>,
}

/// A scrub, as far as it has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScrubRecord {
    pub state: ScrubState,
    pub repair: bool,
    /// Bytes of a member where it began.
    pub from: u64,
    /// Bytes of a member below which it is done.
    pub next: u64,
    /// Most bytes a second of a member.
    pub rate: Option<u64>,
    /// Milliseconds since 1970; `ended` is 0 until it has.
    pub started: u64,
    pub ended: u64,
    /// The first bad stripes, in order.
    pub list: Vec<BadRecord>,
    /// Bad stripes that are not listed, and those of them that were repaired.
    pub more: u64,
    pub more_repaired: u64,
    /// Stripes that could not be compared.
    pub unreadable: u64,
    /// Bytes rewritten because they could not be read.
    pub rewritten: u64,
}

/// A stripe whose redundancy did not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRecord {
    pub stripe: u64,
    /// Bytes of the members' data within which the difference lies.
    pub at: u64,
    pub len: u64,
    /// Slots that are wrong, as bits; 0: it cannot be told.
    pub slots: u64,
    pub repaired: bool,
}

/// The queues of a LU's device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queues {
    pub count: u16,
    /// Requests in flight of each.
    pub depth: u16,
}

impl From<u16> for Queues {
    /// One queue of so many requests.
    fn from(depth: u16) -> Self {
        Self { count: 1, depth }
    }
}

/// A LU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LuConfig {
    pub uuid: LuUuid,
    pub name: String,
    /// Requests in flight of each queue.
    pub depth: u16,
    /// Queues of its device; the kernel makes at most one for each CPU.
    pub queues: u16,
    /// Bytes; what its extents hold.
    pub capacity: u64,
    /// In order of the LU's bytes.
    pub extents: Vec<Extent>,
}

/// Tunables that stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Slowest and fastest rebuild, bytes a second of a member.
    pub rebuild_min_bytes: Option<u64>,
    pub rebuild_max_bytes: Option<u64>,
}

/// Why a configuration cannot be believed, or a change of it not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration has {len} bytes, the superblock says {said}")]
    Length { len: usize, said: u64 },
    #[error("checksum {found:08x}, the superblock says {said:08x}: damaged")]
    Checksum { said: u32, found: u32 },
    #[error("configuration format {found}; this Lunar knows {FORMAT}")]
    Version { found: u32 },
    #[error("the configuration is not the JSON it should be")]
    Json(#[source] serde_json::Error),
    #[error(
        "`{name}` is no name: 1 to {NAME_MAX} of a-z A-Z 0-9 . _ -, beginning with a letter, a digit or _, not \
         digits alone"
    )]
    Name { name: String },
    #[error("there is a LU `{name}` already")]
    NameTaken { name: String },
    #[error("there is a LU {uuid} already")]
    UuidTaken { uuid: LuUuid },
    #[error("there is no LU {uuid}")]
    NoSuchLu { uuid: LuUuid },
    #[error("a queue has a depth of 1 to {DEPTH_MAX}, not {depth}")]
    Depth { depth: u16 },
    #[error("a LU has 1 to {QUEUES_MAX} queues, not {count}")]
    Queues { count: u16 },
    #[error("{percent} percent is not 1 to 100")]
    Percent { percent: u8 },
    #[error("a LU of 0 bytes")]
    Empty,
    #[error("it has {capacity} bytes, {asked} are asked for: a LU only grows")]
    Shrink { capacity: u64, asked: u64 },
    /// `needed` is rounded up to whole units.
    #[error("{needed} bytes are asked for (in units of {unit}), {free} are free")]
    NoSpace { needed: u64, unit: u64, free: u64 },
    #[error("a group has at most {LU_MAX} LUs")]
    TooManyLus,
    #[error("the LUs of a group have at most {EXTENTS_MAX} extents")]
    TooManyExtents,
    #[error("the configuration needs {needed} bytes, its slots on the members have {slot}")]
    TooLong { needed: u64, slot: u64 },
    #[error("extent {at}+{len} of LU `{lu}` is not whole units of {unit} inside {limit} bytes")]
    Extent {
        lu: String,
        at: u64,
        len: u64,
        unit: u64,
        limit: u64,
    },
    #[error("the LUs `{a}` and `{b}` both have byte {at}")]
    Overlap { a: String, b: String, at: u64 },
    #[error("LU `{lu}` says {capacity} bytes, its extents hold {held}")]
    Capacity {
        lu: String,
        capacity: u64,
        held: u64,
    },
    #[error("the slowest rebuild is faster than the fastest, or stands still")]
    RebuildRate,
    #[error("the record of the scrub is not one of this group: {0}")]
    Scrub(&'static str),
}

impl ScrubRecord {
    fn check(&self, geometry: &Geometry) -> Result<(), ConfigError> {
        let bytes = geometry.member_bytes();
        let within = |bad: &BadRecord| {
            let unit = geometry.stripe_on_member();
            let start = bad.stripe.checked_mul(unit);
            let end = bad.at.checked_add(bad.len).filter(|end| *end > bad.at);
            start
                .zip(end)
                .is_some_and(|(start, end)| start <= bad.at && end <= bytes && end - start <= unit)
        };
        let known = geometry.slots();
        let rules = [
            (self.from <= self.next && self.next <= bytes, "its place"),
            (self.rate != Some(0), "its rate"),
            (self.more_repaired <= self.more, "its counts"),
            (self.list.len() <= SCRUB_LIST_MAX, "too long a list"),
            (self.list.iter().all(within), "a stripe"),
            (
                self.list.iter().all(|bad| bad.slots & !known == 0),
                "a slot",
            ),
            (
                self.list
                    .windows(2)
                    .all(|pair| pair[0].stripe < pair[1].stripe),
                "the order of its list",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, why)) => Err(ConfigError::Scrub(why)),
            None => Ok(()),
        }
    }
}

impl GroupConfig {
    /// Makes the configuration of a new group.
    ///
    /// # Errors  an illegal name
    pub fn new(name: &str) -> Result<Self, ConfigError> {
        check_name(name)?;
        Ok(Self {
            name: name.to_owned(),
            lus: Vec::new(),
            deleted: Vec::new(),
            options: Options::default(),
            scrub: None,
        })
    }

    /// Writes it as JSON, and returns what the superblock has to say of it.
    ///
    /// # Errors  what [`Self::decode`] would refuse, and what is longer than any slot; whether it fits the slots
    /// that the members have, [`check_fits`] says
    pub fn encode(
        &self,
        geometry: &Geometry,
        current: u8,
        generation: u64,
    ) -> Result<(Vec<u8>, ConfigVersion), ConfigError> {
        self.check(geometry)?;
        let json = save::encode(self)?;
        let len = json.len() as u64;
        check_fits(len, CONFIG_MAX)?;
        let version = ConfigVersion {
            current,
            len,
            crc: crc32c(&json),
            generation,
        };
        Ok((json, version))
    }

    /// Reads the JSON (exactly the bytes that the superblock points to), checking all of it.
    ///
    /// # Panics  never
    pub fn decode(
        json: &[u8],
        version: &ConfigVersion,
        geometry: &Geometry,
    ) -> Result<Self, ConfigError> {
        let len = json.len();
        if len as u64 != version.len {
            return Err(ConfigError::Length {
                len,
                said: version.len,
            });
        }
        let found = crc32c(json);
        if found != version.crc {
            return Err(ConfigError::Checksum {
                said: version.crc,
                found,
            });
        }
        let config = save::decode(json)?;
        config.check(geometry)?;
        Ok(config)
    }

    /// Returns the bytes of a slot that holds `len` bytes of JSON: a power of two from 1 MiB.
    pub fn slot_bytes_needed(len: u64) -> u64 {
        len.next_power_of_two().max(CONFIG_SLOT_MIN)
    }

    /// Checks every invariant.
    pub fn check(&self, geometry: &Geometry) -> Result<(), ConfigError> {
        check_name(&self.name)?;
        self.check_options()?;
        if let Some(scrub) = &self.scrub {
            scrub.check(geometry)?;
        }
        if self.lus.len() > LU_MAX || self.deleted.len() > DELETED_MAX {
            return Err(ConfigError::TooManyLus);
        }
        for lu in self.all() {
            lu.check(geometry)?;
        }
        let mut names: Vec<&str> = self.lus.iter().map(|lu| lu.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ConfigError::NameTaken {
                name: pair[0].to_owned(),
            });
        }
        let mut uuids: Vec<LuUuid> = self.all().map(|lu| lu.uuid).collect();
        uuids.sort_unstable();
        if let Some(pair) = uuids.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ConfigError::UuidTaken { uuid: pair[0] });
        }
        self.check_apart()
    }

    fn check_options(&self) -> Result<(), ConfigError> {
        let (min, max) = (
            self.options.rebuild_min_bytes,
            self.options.rebuild_max_bytes,
        );
        if max == Some(0) || min.zip(max).is_some_and(|(min, max)| min > max) {
            return Err(ConfigError::RebuildRate);
        }
        Ok(())
    }

    fn check_apart(&self) -> Result<(), ConfigError> {
        let mut extents: Vec<(Extent, &str)> = self
            .all()
            .flat_map(|lu| lu.extents.iter().map(|extent| (*extent, lu.name.as_str())))
            .collect();
        if extents.len() > EXTENTS_MAX {
            return Err(ConfigError::TooManyExtents);
        }
        extents.sort_by_key(|(extent, _)| extent.at);
        for pair in extents.windows(2) {
            let ((first, a), (second, b)) = (pair[0], pair[1]);
            if first.end() > second.at {
                let (a, b) = (a.to_owned(), b.to_owned());
                return Err(ConfigError::Overlap {
                    a,
                    b,
                    at: second.at,
                });
            }
        }
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &LuConfig> {
        self.lus.iter().chain(&self.deleted)
    }

    /// Returns a LU that is not deleted.
    pub fn lu(&self, uuid: LuUuid) -> Result<&LuConfig, ConfigError> {
        self.lus
            .iter()
            .find(|lu| lu.uuid == uuid)
            .ok_or(ConfigError::NoSuchLu { uuid })
    }

    /// Returns the bytes that no LU has; those of deleted LUs count as free.
    pub fn free_bytes(&self, geometry: &Geometry) -> u64 {
        let used: u64 = self
            .lus
            .iter()
            .flat_map(|lu| &lu.extents)
            .map(|extent| extent.len)
            .sum();
        allocatable_bytes(geometry).saturating_sub(used)
    }

    /// Makes a LU: from space that nobody has, else from that of deleted LUs, which are then forgotten, oldest
    /// first. Nothing has changed after an error.
    ///
    /// # Units   the size is rounded up to whole units; a percentage (of the group) down, to at least one
    /// # Errors  name, identity or queues; not so much free, with the numbers
    pub fn create_lu(
        &mut self,
        geometry: &Geometry,
        uuid: LuUuid,
        name: &str,
        size: LuSize,
        queues: impl Into<Queues>,
    ) -> Result<&LuConfig, ConfigError> {
        let queues = queues.into();
        check_name(name)?;
        check_queues(queues)?;
        self.check_free_name(name)?;
        if uuid.is_nil() || self.all().any(|lu| lu.uuid == uuid) {
            return Err(ConfigError::UuidTaken { uuid });
        }
        if self.lus.len() >= LU_MAX {
            return Err(ConfigError::TooManyLus);
        }
        let capacity = self.bytes_of(geometry, size)?;
        let extents = self.take_extents(geometry, capacity)?;
        self.lus.push(LuConfig {
            uuid,
            name: name.to_owned(),
            depth: queues.depth,
            queues: queues.count,
            capacity,
            extents,
        });
        self.lu(uuid)
    }

    /// Gives a LU more space, behind what it has, from where [`Self::create_lu`] takes it. Nothing has changed after an
    /// error, nor if it has that size.
    ///
    /// # Units   as [`Self::create_lu`]; the size is that of the whole LU, `Max` what it has and all that is free
    /// # Errors  less than it has; not so much free
    pub fn resize_lu(
        &mut self,
        geometry: &Geometry,
        uuid: LuUuid,
        size: LuSize,
    ) -> Result<&LuConfig, ConfigError> {
        let at = self.position(uuid)?;
        let capacity = self.lus[at].capacity;
        let asked = match size {
            LuSize::Max => capacity + self.free_bytes(geometry),
            LuSize::Bytes(_) | LuSize::Percent(_) => self.bytes_of(geometry, size)?,
        };
        let more = asked
            .checked_sub(capacity)
            .ok_or(ConfigError::Shrink { capacity, asked })?;
        let extents = self.take_extents(geometry, more)?;
        let lu = &mut self.lus[at];
        for extent in extents {
            match lu.extents.last_mut() {
                Some(last) if last.end() == extent.at => last.len += extent.len,
                _ => lu.extents.push(extent),
            }
        }
        lu.capacity = asked;
        self.lu(uuid)
    }

    /// Takes space that no LU has, and forgets the deleted ones that had it.
    fn take_extents(
        &mut self,
        geometry: &Geometry,
        bytes: u64,
    ) -> Result<Vec<Extent>, ConfigError> {
        let (extents, forgotten) = self.find_extents(geometry, bytes)?;
        let kept: usize = self
            .lus
            .iter()
            .chain(&self.deleted[forgotten..])
            .map(extents_of)
            .sum();
        if kept + extents.len() > EXTENTS_MAX {
            return Err(ConfigError::TooManyExtents);
        }
        self.deleted.drain(..forgotten);
        Ok(extents)
    }

    /// Returns extents of so many bytes, and how many deleted LUs have to be forgotten for them.
    fn find_extents(
        &self,
        geometry: &Geometry,
        bytes: u64,
    ) -> Result<(Vec<Extent>, usize), ConfigError> {
        for forgotten in 0..=self.deleted.len() {
            let kept = self.lus.iter().chain(&self.deleted[forgotten..]);
            let used = kept.flat_map(|lu| lu.extents.iter().copied());
            if let Some(extents) = FreeSpace::new(geometry, used).take(bytes) {
                return Ok((extents, forgotten));
            }
        }
        let (unit, free) = (unit_bytes(geometry), self.free_bytes(geometry));
        Err(ConfigError::NoSpace {
            needed: bytes,
            unit,
            free,
        })
    }

    fn bytes_of(&self, geometry: &Geometry, size: LuSize) -> Result<u64, ConfigError> {
        let unit = unit_bytes(geometry);
        let free = self.free_bytes(geometry);
        match size {
            LuSize::Bytes(0) => Err(ConfigError::Empty),
            LuSize::Bytes(bytes) => {
                bytes
                    .checked_next_multiple_of(unit)
                    .ok_or(ConfigError::NoSpace {
                        needed: bytes,
                        unit,
                        free,
                    })
            }
            LuSize::Percent(percent @ 1..=100) => {
                let units = allocatable_bytes(geometry) / unit;
                let share = u128::from(units) * u128::from(percent) / 100;
                let units = u64::try_from(share).expect("no more than all units").max(1);
                Ok(units * unit)
            }
            LuSize::Percent(percent) => Err(ConfigError::Percent { percent }),
            LuSize::Max if free == 0 => Err(ConfigError::NoSpace {
                needed: unit,
                unit,
                free,
            }),
            LuSize::Max => Ok(free),
        }
    }

    /// Marks a LU deleted; it comes back by [`Self::undelete_lu`] until its space is needed.
    pub fn delete_lu(&mut self, uuid: LuUuid) -> Result<(), ConfigError> {
        let at = self.position(uuid)?;
        let lu = self.lus.remove(at);
        self.deleted.push(lu);
        let surplus = self.deleted.len().saturating_sub(DELETED_MAX);
        self.deleted.drain(..surplus);
        Ok(())
    }

    /// Brings a deleted LU back.
    pub fn undelete_lu(&mut self, uuid: LuUuid) -> Result<&LuConfig, ConfigError> {
        let at = self.deleted.iter().position(|lu| lu.uuid == uuid);
        let at = at.ok_or(ConfigError::NoSuchLu { uuid })?;
        self.check_free_name(&self.deleted[at].name)?;
        if self.lus.len() >= LU_MAX {
            return Err(ConfigError::TooManyLus);
        }
        let lu = self.deleted.remove(at);
        self.lus.push(lu);
        self.lu(uuid)
    }

    /// Renames a LU.
    pub fn rename_lu(&mut self, uuid: LuUuid, name: &str) -> Result<(), ConfigError> {
        check_name(name)?;
        let at = self.position(uuid)?;
        if self.lus[at].name != name {
            self.check_free_name(name)?;
            name.clone_into(&mut self.lus[at].name);
        }
        Ok(())
    }

    /// Gives a LU another number of queues.
    pub fn set_queues(&mut self, uuid: LuUuid, count: u16) -> Result<(), ConfigError> {
        let at = self.position(uuid)?;
        check_queues(Queues {
            count,
            depth: self.lus[at].depth,
        })?;
        self.lus[at].queues = count;
        Ok(())
    }

    /// Renames the group.
    pub fn rename(&mut self, name: &str) -> Result<(), ConfigError> {
        check_name(name)?;
        name.clone_into(&mut self.name);
        Ok(())
    }

    fn position(&self, uuid: LuUuid) -> Result<usize, ConfigError> {
        let at = self.lus.iter().position(|lu| lu.uuid == uuid);
        at.ok_or(ConfigError::NoSuchLu { uuid })
    }

    fn check_free_name(&self, name: &str) -> Result<(), ConfigError> {
        if self.lus.iter().any(|lu| lu.name == name) {
            return Err(ConfigError::NameTaken {
                name: name.to_owned(),
            });
        }
        Ok(())
    }
}

impl LuConfig {
    /// Returns where its bytes are.
    pub fn map(&self) -> ExtentMap {
        ExtentMap::new(&self.extents)
    }

    fn check(&self, geometry: &Geometry) -> Result<(), ConfigError> {
        check_name(&self.name)?;
        check_queues(Queues {
            count: self.queues,
            depth: self.depth,
        })?;
        if self.uuid.is_nil() {
            return Err(ConfigError::UuidTaken { uuid: self.uuid });
        }
        let (unit, limit) = (unit_bytes(geometry), allocatable_bytes(geometry));
        let mut held = 0;
        for Extent { at, len } in self.extents.iter().copied() {
            let end = at.checked_add(len).filter(|end| *end <= limit);
            let is_whole = at.is_multiple_of(unit) && len.is_multiple_of(unit) && len > 0;
            if end.is_none() || !is_whole {
                return Err(ConfigError::Extent {
                    lu: self.name.clone(),
                    at,
                    len,
                    unit,
                    limit,
                });
            }
            // Overlap is found later; a sum of overlapping extents must not wrap before.
            held = u64::saturating_add(held, len);
        }
        if held != self.capacity || held == 0 {
            let (lu, capacity) = (self.name.clone(), self.capacity);
            return Err(ConfigError::Capacity { lu, capacity, held });
        }
        Ok(())
    }
}

fn extents_of(lu: &LuConfig) -> usize {
    lu.extents.len()
}

/// Checks that a configuration fits the smallest slot that a member has for it.
///
/// # Errors  too long: the change is refused before anything is written
pub fn check_fits(len: u64, slot: u64) -> Result<(), ConfigError> {
    if len > slot {
        return Err(ConfigError::TooLong { needed: len, slot });
    }
    Ok(())
}

/// Checks a name of a group or LU. It becomes a file name, and must not be mistaken for a number or an option.
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    let is_legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let starts_well = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let is_name = (1..=NAME_MAX).contains(&name.len())
        && name.chars().all(is_legal)
        && name.starts_with(starts_well)
        && !name.chars().all(|c| c.is_ascii_digit());
    if is_name {
        return Ok(());
    }
    Err(ConfigError::Name {
        name: name.chars().take(NAME_MAX).collect(),
    })
}

fn check_queues(Queues { count, depth }: Queues) -> Result<(), ConfigError> {
    if !(1..=DEPTH_MAX).contains(&depth) {
        return Err(ConfigError::Depth { depth });
    }
    if !(1..=QUEUES_MAX).contains(&count) {
        return Err(ConfigError::Queues { count });
    }
    Ok(())
}
