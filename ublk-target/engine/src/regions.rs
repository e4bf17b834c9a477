//! The two maps of a running group: which regions may be under writes, and which a member that is away has missed.
//!
//! ```text
//!             enter                                   look (every 5 s)
//!  write ---> intent: marked, durable (policy bitmap) ----------------> flushed, unmarked when nobody writes there
//!        ---> missed: marked, durable, while a member is away --------> cleared when nobody is away any more
//! ```
//!
//! *Intent* is kept in memory under every policy: what was written since the last flush is what a member that leaves now may
//! not have. Policy `bitmap` keeps it on the members too. After a power loss the redundancy of marked regions is not
//! believed (`unsynced`) until a resync has passed them.
//!
//! *Missed* says what a member that comes back is caught up with. It begins with the intent map of the moment at which the
//! member leaves.
//!
//! # Crash
//! A write's marks are durable on every member in use before its first I/O; a mark goes only after a flush of what was written
//! there. A superblock that says that a member has left at a generation is written after the missed map. A map that is read has more marks
//! than it needs, or as many, never fewer.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use lunar_api::GroupUuid;
use lunar_api::target::{Consistency, FailCause};

use crate::limits::CONFIG_PIECE;
use crate::member::{Member, MemberIo};
use crate::parity;
use crate::planted::{self, Bug};
use crate::pool::Lease;
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::region_map::{Kind, PAGE, PAGE_REGIONS, PAGES, RegionSet};
use crate::reserve::Layout;
use crate::serve::bits;
use crate::superblock::GroupRecord;
use crate::sync::Waiters;
use crate::traits::{Buf, Clock, Disk, DiskVerb, Env, Piece, SECOND, Tick};

/// A region that nobody has written for so long loses its mark; at the latest after twice as long.
const QUIET_AFTER: u64 = 5 * SECOND;

/// One map.
#[derive(Debug)]
pub(crate) struct Map {
    kind: Kind,
    /// It lies on the members too.
    is_kept: bool,
    marked: RefCell<RegionSet>,
    /// Marked on every member in use.
    durable: RefCell<RegionSet>,
    /// Pages that have to be written, as bits.
    pages: Cell<u64>,
}

impl Map {
    fn new(kind: Kind, is_kept: bool, found: Found) -> Self {
        let map = Self {
            kind,
            is_kept,
            marked: RefCell::new(found.any),
            durable: RefCell::new(found.all),
            pages: Cell::new(0),
        };
        let differ = *map.marked.borrow() != *map.durable.borrow();
        if differ {
            map.pages.set(map.all_pages());
        }
        map
    }

    fn all_pages(&self) -> u64 {
        let pages = self.marked.borrow().regions().div_ceil(PAGE_REGIONS);
        u64::MAX >> (64 - pages)
    }

    fn mark(&self, region: u64) {
        if self.marked.borrow_mut().insert(region) {
            self.change(region);
        }
    }

    fn change(&self, region: u64) {
        self.pages
            .set(self.pages.get() | 1 << (region / PAGE_REGIONS));
    }

    fn mark_all(&self, other: &RegionSet) {
        if self.marked.borrow_mut().add_all(other) {
            self.pages.set(self.all_pages());
        }
    }

    fn unmark(&self, region: u64) {
        if self.marked.borrow_mut().remove(region) {
            self.change(region);
        }
    }

    fn is_durable(&self, regions: &Range<u64>) -> bool {
        let durable = self.durable.borrow();
        !self.is_kept || regions.clone().all(|region| durable.contains(region))
    }

    /// The next page that has to be written, and its bytes. What it does not mark is not durable from here on.
    fn take_page(&self, group: GroupUuid, to: &mut [u8; PAGE]) -> Option<u64> {
        if !self.is_kept || self.pages.get() == 0 {
            return None;
        }
        let page = u64::from(self.pages.get().trailing_zeros());
        self.pages.set(self.pages.get() & !(1 << page));
        let marked = self.marked.borrow();
        marked.encode_page(self.kind, group, page, to);
        let mut durable = self.durable.borrow_mut();
        let first = page * PAGE_REGIONS;
        let mut from = first;
        while let Some(region) = durable.next(from).filter(|r| *r < first + PAGE_REGIONS) {
            if !marked.contains(region) {
                durable.remove(region);
            }
            from = region + 1;
        }
        Some(page)
    }

    /// A page with these bytes is on every member in use.
    fn page_written(&self, group: GroupUuid, page: u64, bytes: &[u8; PAGE]) {
        let bad = self
            .durable
            .borrow_mut()
            .add_page(self.kind, group, page, Some(bytes));
        debug_assert_eq!(bad, 0, "it was encoded here");
    }

    fn area(&self, layout: &Layout) -> u64 {
        match self.kind {
            Kind::Intent => layout.intent.offset,
            Kind::Missed => layout.missed.offset,
        }
    }
}

/// What the members of a group have of a map.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    /// What any member in sync has marked.
    pub any: RegionSet,
    /// What every member in use has.
    pub all: RegionSet,
}

/// The maps of a group.
#[derive(Debug)]
pub(crate) struct Maps {
    region_bytes: u64,
    intent: Map,
    missed: Map,
    /// Regions whose redundancy may not be right.
    pub unsynced: RefCell<RegionSet>,
    /// Regions that the member which is caught up has not yet.
    pub behind: RefCell<RegionSet>,
    /// Written since the last look.
    recent: RefCell<RegionSet>,
    /// Those without a write at the last look; kept so that looking takes no memory.
    quiet: RefCell<RegionSet>,
    /// Regions under writes, and how many.
    active: RefCell<Vec<(u64, u32)>>,
    looked: Cell<Tick>,
    writing: Cell<bool>,
    /// `writing`, or what is durable, changed.
    changed: Waiters,
}

/// What a group starts with: the maps, and whether what is marked is to be synced.
#[derive(Debug)]
pub(crate) struct MapsFound {
    pub intent: Found,
    pub missed: Found,
    pub is_unsynced: bool,
}

impl MapsFound {
    /// Of a new group.
    pub(crate) fn none(record: &GroupRecord) -> Self {
        let set = RegionSet::new(regions(record));
        let found = Found {
            any: set.clone(),
            all: set,
        };
        Self {
            intent: found.clone(),
            missed: found,
            is_unsynced: false,
        }
    }
}

/// Regions of a group.
pub(crate) fn regions(record: &GroupRecord) -> u64 {
    record.member_bytes.div_ceil(record.region_bytes)
}

impl Maps {
    pub(crate) fn new(record: &GroupRecord, found: MapsFound) -> Self {
        let none = RegionSet::new(regions(record));
        let is_bitmap = record.consistency == Consistency::Bitmap;
        let maps = Self {
            region_bytes: record.region_bytes,
            unsynced: RefCell::new(match found.is_unsynced {
                true => found.intent.any.clone(),
                false => none.clone(),
            }),
            intent: Map::new(Kind::Intent, is_bitmap, found.intent),
            missed: Map::new(Kind::Missed, true, found.missed),
            behind: RefCell::new(none.clone()),
            recent: RefCell::new(none.clone()),
            quiet: RefCell::new(none),
            active: RefCell::new(Vec::with_capacity(512)),
            looked: Cell::default(),
            writing: Cell::new(false),
            changed: Waiters::default(),
        };
        if record.members.iter().any(|entry| entry.left_at != 0) {
            // Who was lost with the power may not have what was being written.
            maps.missed.mark_all(&maps.intent.marked.borrow());
            if planted::is(Bug::MissedForgotten) {
                maps.forget_missed();
            }
            maps.begin_behind();
        } else {
            maps.forget_missed();
        }
        maps
    }

    /// Nobody is away any more.
    pub(crate) fn forget_missed(&self) {
        if !self.missed.marked.borrow().is_empty() {
            self.missed.marked.borrow_mut().clear();
            self.missed.pages.set(self.missed.all_pages());
        }
    }

    /// A member leaves that was in sync: what may not be durable on it is what it misses.
    pub(crate) fn begin_missed(&self) {
        self.missed.mark_all(&self.intent.marked.borrow());
    }

    /// Marks what a member misses that is away.
    pub(crate) fn note_missed(&self, mark: impl FnOnce(&mut RegionSet)) {
        mark(&mut self.missed.marked.borrow_mut());
        self.missed.pages.set(self.missed.all_pages());
    }

    /// What a member that has come back is caught up with: from here on it gets what is written.
    pub(crate) fn begin_behind(&self) {
        let missed = self.missed.marked.borrow();
        self.behind.borrow_mut().clone_from(&missed);
    }

    pub(crate) fn grow(&self, regions: u64) {
        for map in [&self.intent, &self.missed] {
            map.marked.borrow_mut().grow(regions);
            map.durable.borrow_mut().grow(regions);
        }
        for set in [&self.unsynced, &self.behind, &self.recent, &self.quiet] {
            set.borrow_mut().grow(regions);
        }
    }

    /// Regions in which stripes of so many bytes of a member lie.
    pub(crate) fn regions_of(&self, stripes: &Range<u64>, unit: u64) -> Range<u64> {
        let (from, to) = (stripes.start * unit, stripes.end * unit);
        from / self.region_bytes..to.div_ceil(self.region_bytes)
    }

    /// Stripes of which a part lies in a region.
    pub(crate) fn stripes_of(&self, region: u64, unit: u64) -> Range<u64> {
        let from = region * self.region_bytes;
        from / unit..(from + self.region_bytes).div_ceil(unit)
    }

    /// Says whether a stripe lies in a region of a set.
    pub(crate) fn is_in(&self, set: &RegionSet, stripe: u64, unit: u64) -> bool {
        !set.is_empty()
            && self
                .regions_of(&(stripe..stripe + 1), unit)
                .any(|region| set.contains(region))
    }

    fn begin(&self, regions: Range<u64>) {
        let mut active = self.active.borrow_mut();
        for region in regions {
            self.recent.borrow_mut().insert(region);
            self.intent.mark(region);
            match active.iter_mut().find(|one| one.0 == region) {
                Some(one) => one.1 += 1,
                None => active.push((region, 1)),
            }
        }
    }

    fn end(&self, regions: Range<u64>) {
        let mut active = self.active.borrow_mut();
        for region in regions {
            if let Some(i) = active.iter().position(|one| one.0 == region) {
                active[i].1 -= 1;
                if active[i].1 == 0 {
                    active.swap_remove(i);
                }
            }
        }
    }

    /// Looks for marked regions that nobody has written since the last look; says whether there are any.
    fn look(&self) -> bool {
        let (mut quiet, mut recent) = (self.quiet.borrow_mut(), self.recent.borrow_mut());
        let unsynced = self.unsynced.borrow();
        quiet.clear();
        for region in self.intent.marked.borrow().iter() {
            if !recent.contains(region) && !unsynced.contains(region) {
                quiet.insert(region);
            }
        }
        recent.clear();
        // A write that takes long is one all the time.
        for (region, _) in self.active.borrow().iter() {
            quiet.remove(*region);
            recent.insert(*region);
        }
        !quiet.is_empty()
    }

    /// What was quiet at the last look, and still is, is flushed since: its marks go.
    fn unmark(&self) {
        let (quiet, recent) = (self.quiet.borrow(), self.recent.borrow());
        for region in quiet.iter().filter(|region| !recent.contains(*region)) {
            self.intent.unmark(region);
        }
    }
}

/// Stripes under writes, until it is dropped.
pub(crate) struct Entered<'a>(Option<(&'a Maps, Range<u64>)>);

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some((maps, regions)) = self.0.take() {
            maps.end(regions);
        }
    }
}

/// The right to write maps.
pub(crate) struct MapsTurn<'a>(&'a Maps);

impl Drop for MapsTurn<'_> {
    fn drop(&mut self) {
        self.0.writing.set(false);
        self.0.changed.wake_all();
    }
}

impl<E: Env> RaidGroup<E> {
    /// Says whether a member is away that is to be caught up.
    fn is_missing_writes(&self) -> bool {
        let is_whole = self.in_sync.get() == self.geometry.slots();
        let is_away = |member: &Rc<Member<E::Disk>>| member.left_at.get() != 0;
        !is_whole && self.members.borrow().iter().any(is_away)
    }

    /// Marks the regions of stripes that are to be written, and waits until the marks are where they have to be.
    /// Allocates nothing.
    ///
    /// # Crash  before it ends nothing of the write is on any member
    /// # Errors  EIO when too few members are left to take a map
    pub(crate) async fn enter(&self, stripes: Range<u64>) -> Result<Entered<'_>, Errno> {
        let Some(maps) = &self.maps else {
            return Ok(Entered(None));
        };
        let regions = maps.regions_of(&stripes, self.geometry.stripe_on_member());
        maps.begin(regions.clone());
        let entered = Entered(Some((maps, regions.clone())));
        if self.is_missing_writes() && !planted::is(Bug::MissedNotNoted) {
            for region in regions.clone() {
                maps.missed.mark(region);
            }
        }
        let is_durable = || {
            let missed = !self.is_missing_writes() || maps.missed.is_durable(&regions);
            let missed = missed || planted::is(Bug::MissedNotNoted);
            missed && maps.intent.is_durable(&regions) || planted::is(Bug::AckBeforeIntent)
        };
        while !is_durable() {
            let turn = maps
                .changed
                .until(|| {
                    if is_durable() {
                        Some(None)
                    } else {
                        self.take_turn(maps).map(Some)
                    }
                })
                .await;
            if let Some(turn) = turn {
                self.write_pages(&turn).await?;
            }
        }
        Ok(entered)
    }

    fn take_turn<'a>(&self, maps: &'a Maps) -> Option<MapsTurn<'a>> {
        // Made only where it is had: to drop it gives it back.
        (!maps.writing.replace(true)).then(|| MapsTurn(maps))
    }

    /// Waits for the right to write maps: nobody else does until it is given back.
    pub(crate) async fn maps_turn(&self) -> Option<MapsTurn<'_>> {
        let maps = self.maps.as_ref()?;
        Some(maps.changed.until(|| self.take_turn(maps)).await)
    }

    /// Writes what the members do not say yet.
    ///
    /// # Errors  as [`Self::enter`]
    pub(crate) async fn write_maps(&self) -> Result<(), Errno> {
        match self.maps_turn().await {
            Some(turn) => self.write_pages(&turn).await,
            None => Ok(()),
        }
    }

    async fn write_pages(&self, turn: &MapsTurn<'_>) -> Result<(), Errno> {
        let maps = turn.0;
        let mut bytes = [0; PAGE];
        for map in [&maps.intent, &maps.missed] {
            while let Some(page) = map.take_page(self.id, &mut bytes) {
                if self.failed.get() {
                    map.pages.set(map.pages.get() | 1 << page);
                    return Err(EIO);
                }
                let mut members = self.keepers();
                if planted::is(Bug::MapOnOneMember) {
                    members.truncate(1);
                }
                let mut ios = Vec::new();
                for member in members {
                    let (Some(place), Some(meta)) = (&member.place, &member.meta) else {
                        continue;
                    };
                    parity::copy_in(meta.cells(PAGE..2 * PAGE), &bytes);
                    let piece = Piece {
                        offset: 4096,
                        len: 4096,
                    };
                    let at = map.area(&place.reserve.layout) + page * PAGE as u64;
                    let verb = DiskVerb::Write { fua: true };
                    let io = member.submit_meta(verb, at, PAGE as u64, Buf::Pool(meta), &[piece]);
                    ios.push((Rc::clone(&member), io));
                }
                let mut failed = 0;
                for (member, io) in ios {
                    if io.await.is_err() && member.counts.get() {
                        failed |= 1 << member.slot;
                    }
                }
                self.map_failed(failed).inspect_err(|_| {
                    map.pages.set(map.pages.get() | 1 << page);
                })?;
                map.page_written(self.id, page, &bytes);
            }
        }
        Ok(())
    }

    /// Those that have the maps: members in sync or being filled, and the disks beside them.
    fn keepers(&self) -> Vec<Rc<Member<E::Disk>>> {
        let slots = self.in_sync.get() | self.rebuilding().map_or(0, |slot| 1 << slot);
        let mut all = Vec::new();
        for slot in bits(slots) {
            let member = self.member(slot);
            let twin = member
                .twin
                .borrow()
                .as_ref()
                .map(|twin| Rc::clone(&twin.member));
            all.push(member);
            all.extend(twin.filter(|twin| !twin.to_blame.get()));
        }
        all
    }

    /// Fails, in memory, members that did not take a map: who relies on it waits for the superblocks too.
    fn map_failed(&self, failed: u64) -> Result<(), Errno> {
        let why = "a map could not be written";
        if let Some(copying) = self.copying()
            && copying.to.to_blame.get()
        {
            self.drop_copy(why);
        }
        let failed = self.blamed(failed);
        if failed & self.in_sync.get() != 0 && !self.can_lose(failed) {
            self.set_failed();
            let text = format!(
                "slots {:?} failed too ({why}): redundancy is exhausted",
                bits(failed).collect::<Vec<_>>()
            );
            self.event("ArrayFailed", None, &text);
            return Err(EIO);
        }
        if failed != 0 {
            self.fail_now(failed, FailCause::Writes, why);
        }
        Ok(())
    }

    /// Writes both maps, all of them, to members that come in; returns those that did not take them, as bits.
    ///
    /// # Shape   `lease`: [`CONFIG_PIECE`]
    pub(crate) async fn put_maps(
        &self,
        turn: &MapsTurn<'_>,
        lease: &Lease,
        members: &[Rc<Member<E::Disk>>],
    ) -> u64 {
        let most = (CONFIG_PIECE / PAGE) as u64;
        for map in [&turn.0.intent, &turn.0.missed] {
            for first in (0..PAGES).step_by(CONFIG_PIECE / PAGE) {
                let pages = first..(first + most).min(PAGES);
                for (i, page) in pages.clone().enumerate() {
                    let mut bytes = [0; PAGE];
                    let marked = map.marked.borrow();
                    marked.encode_page(map.kind, self.id, page, &mut bytes);
                    parity::copy_in(lease.cells(i * PAGE..(i + 1) * PAGE), &bytes);
                }
                let len = (pages.end - pages.start) * PAGE as u64;
                let piece = Piece {
                    offset: 0,
                    len: u32::try_from(len).expect("at most CONFIG_PIECE"),
                };
                let mut ios: Vec<(u16, MemberIo<E::Disk>)> = Vec::new();
                for member in members {
                    let Some(place) = &member.place else { continue };
                    let at = map.area(&place.reserve.layout) + first * PAGE as u64;
                    let verb = DiskVerb::Write { fua: true };
                    let io = member.submit_meta(verb, at, len, Buf::Pool(lease), &[piece]);
                    ios.push((member.slot, io));
                }
                let mut bad = 0;
                for (slot, io) in ios {
                    if io.await.is_err() {
                        bad |= 1 << slot;
                    }
                }
                if bad != 0 {
                    return bad;
                }
            }
        }
        0
    }

    /// Takes the marks of regions that nobody writes any more, after a flush.
    ///
    /// # Crash  a mark that is still on a member costs a resync of its region
    pub(crate) async fn unmark_quiet(&self) {
        let Some(maps) = &self.maps else { return };
        let now = self.clock.now();
        if now.0 - maps.looked.get().0 < QUIET_AFTER || self.failed.get() {
            return;
        }
        maps.looked.set(now);
        let flushes = !planted::is(Bug::UnmarkUnflushed);
        if !maps.look() || flushes && self.flush_members().await.is_err() {
            return;
        }
        // What could not be synced keeps its mark.
        let unit = self.geometry.stripe_on_member();
        for hole in self.holes.borrow().iter() {
            for region in maps.regions_of(&(*hole..hole + 1), unit) {
                maps.recent.borrow_mut().insert(region);
            }
        }
        maps.unmark();
        let _ = self.write_maps().await;
    }

    /// How much is not proven after a power loss, for people.
    pub(crate) fn unsynced_text(&self) -> Option<String> {
        let maps = self.maps.as_ref()?;
        let unsynced = maps.unsynced.borrow();
        let bytes = unsynced.len() * maps.region_bytes;
        (!unsynced.is_empty()).then(|| {
            format!(
                "it was not stopped cleanly: {} of {} regions were being written, and are resynced: {} MiB of each member",
                unsynced.len(),
                unsynced.regions(),
                bytes >> 20
            )
        })
    }

    /// Says whether a stripe lies in a region whose redundancy is not proven.
    pub(crate) fn is_unsynced(&self, stripe: u64) -> bool {
        self.maps.as_ref().is_some_and(|maps| {
            let unit = self.geometry.stripe_on_member();
            maps.is_in(&maps.unsynced.borrow(), stripe, unit)
        })
    }

    /// The first stripe whose region is not proven, if there is one.
    pub(crate) fn first_unsynced(&self) -> Option<u64> {
        let maps = self.maps.as_ref()?;
        let region = maps.unsynced.borrow().next(0)?;
        Some(
            maps.stripes_of(region, self.geometry.stripe_on_member())
                .start,
        )
    }
}

/// Reads what a member has of a map, page by page, into one page of memory.
pub(crate) async fn read_map<D: Disk>(
    disk: &D,
    at: u64,
    (kind, record): (Kind, &GroupRecord),
    (memory, page): (&Lease, usize),
) -> RegionSet {
    let mut set = RegionSet::new(regions(record));
    for number in 0..set.regions().div_ceil(PAGE_REGIONS) {
        let piece = Piece {
            offset: u32::try_from(page).expect("the memory is below 4 GiB"),
            len: 4096,
        };
        let from = at + number * PAGE as u64;
        let buf = Buf::Pool(memory);
        let read = disk
            .submit(DiskVerb::Read, from, PAGE as u64, buf, &[piece])
            .await;
        let mut bytes = [0; PAGE];
        parity::copy_out(&mut bytes, memory.cells(page..page + PAGE));
        set.add_page(kind, record.uuid, number, read.is_ok().then_some(&bytes));
    }
    set
}
