//! What a group does by itself: resync, rebuild, clean marks, and failing members that do not answer.

use std::cell::Ref;
use std::collections::VecDeque;
use std::rc::Rc;

use lunar_api::target::{MemberState, SyncAction, SyncStatus};

use crate::limits::HOLES_MAX;
use crate::planted::{self, Bug};
use crate::raid_group::RaidGroup;
use crate::region_map::RegionSet;
use crate::regions::Maps;
use crate::stripe_table::{Item, JoinId, Task};
use crate::sync::either;
use crate::traits::{Clock, Env, MILLISECOND, SECOND, Tick};

/// Between two looks at the members.
pub(crate) const LOOK: u64 = SECOND;
/// Without a write for so long a group is marked clean.
const CLEAN_AFTER: u64 = 5 * SECOND;
/// The cursor is made durable after so many bytes of a member, or so long.
const CURSOR_BYTES: u64 = 256 << 20;
const CURSOR_AFTER: u64 = 10 * SECOND;
/// After a sync that could not go on it is tried again.
const RETRY_AFTER: u64 = 60 * SECOND;
/// Bytes of a member that are synced at once while nobody else wants the disks, and the bounds in stripes.
const WINDOW_BYTES: u64 = 2 << 20;
pub(crate) const WINDOW_MAX: u64 = 32;
/// Bytes a second that a sync may take while the host works, by default; md's `speed_limit_min`.
pub(crate) const RATE_MIN: u64 = 32 << 20;

/// How fast background work goes, and how much of it is begun at once.
pub(crate) struct Pace {
    /// Requests of the host that were seen.
    seen: Option<u64>,
    busy_until: Tick,
    /// Stripes that were done at that time.
    mark: (u64, Tick),
    rate: u64,
}

impl Pace {
    pub(crate) fn new(now: Tick, done: u64) -> Self {
        Self {
            seen: None,
            busy_until: Tick(0),
            mark: (done, now),
            rate: 0,
        }
    }

    /// Says whether the host works: it asked for something lately.
    pub(crate) fn is_busy(&mut self, now: Tick, requests: u64) -> bool {
        if self
            .seen
            .replace(requests)
            .is_some_and(|seen| seen != requests)
        {
            self.busy_until = Tick(now.0 + 100 * MILLISECOND);
        }
        now < self.busy_until
    }

    /// Stripes to work on at once.
    pub(crate) fn room(&self, busy: bool, unit: u64) -> u64 {
        match busy {
            true => (64 * 1024 / unit).clamp(1, 8),
            false => (WINDOW_BYTES / unit).clamp(2, WINDOW_MAX),
        }
    }

    fn is_second(&self, now: Tick) -> bool {
        now.0 - self.mark.1.0 >= SECOND
    }

    /// Bytes a second of a member, over the last second that is whole.
    pub(crate) fn rate(&mut self, now: Tick, done: u64, unit: u64) -> u64 {
        if self.is_second(now) {
            let (mark, at) = std::mem::replace(&mut self.mark, (done, now));
            let bytes = u128::from(done.saturating_sub(mark)) * u128::from(unit);
            let rate = bytes * u128::from(SECOND) / u128::from(now.0 - at.0);
            self.rate = u64::try_from(rate).unwrap_or(u64::MAX);
        }
        self.rate
    }
}

impl<E: Env> RaidGroup<E> {
    /// Marks an idle group clean.
    pub(crate) async fn tidy(&self) {
        let mut idle_since = self.clock.now();
        let mut seen = self.requests_seen();
        while !self.stopping.get() {
            self.look().await;
            let _ = self.wait_durable().await;
            self.unmark_quiet().await;
            let now = self.clock.now();
            let requests = self.requests_seen();
            if requests != seen || self.active_writes.get() != 0 {
                seen = requests;
                idle_since = now;
            } else if now.0 - idle_since.0 >= CLEAN_AFTER && self.dirty.get() {
                self.mark_clean().await;
            }
        }
    }

    /// Resync, rebuild and scrub; the rim spawns one. Ends when the group has stopped.
    pub async fn background(self: Rc<Self>) {
        while !self.stopping.get() {
            if self.is_copy_due() {
                if self.copy().await.is_err() {
                    let again = Tick(self.clock.now().0 + RETRY_AFTER);
                    self.copy_retry.set((again, self.sync_wanted.get()));
                }
            } else if self.is_sync_due() {
                if self.sync().await.is_err() {
                    self.sync_status.borrow_mut().take();
                    let again = Tick(self.clock.now().0 + RETRY_AFTER);
                    self.sync_retry.set((again, self.sync_wanted.get()));
                }
            } else if self.wants_scrub() {
                self.scrub_pass().await;
                // One that could not go on is not tried again at once.
                self.look().await;
            } else {
                self.look().await;
            }
        }
        self.background_ended.set(true);
        self.changed.wake_all();
    }

    /// Waits until it is time to look again, until there is new work, or until the group is stopped.
    pub(crate) async fn look(&self) {
        let now = || {
            (
                self.stopping.get(),
                self.sync_wanted.get(),
                self.scrub_orders.get(),
            )
        };
        let seen = now();
        let order = self.changed.until(|| (now() != seen).then_some(()));
        either(self.clock.turn(LOOK), order).await;
    }

    /// Tells the background of new work, and what runs that it is about another disk.
    pub(crate) fn want_sync(&self) {
        self.sync_wanted.set(self.sync_wanted.get() + 1);
        self.changed.wake_all();
    }

    /// Says whether a resync or rebuild is to run now: one that could not go on waits, unless it is about another disk.
    pub(crate) fn is_sync_due(&self) -> bool {
        let (again, wanted) = self.sync_retry.get();
        let waits = self.clock.now() < again && self.sync_wanted.get() == wanted;
        !waits && !self.failed.get() && self.has_sync_work()
    }

    /// Says whether a disk is to be copied now: slots without any come first.
    fn is_copy_due(&self) -> bool {
        let (again, wanted) = self.copy_retry.get();
        let waits = self.clock.now() < again && self.sync_wanted.get() == wanted;
        self.copying().is_some() && !waits && !self.failed.get() && self.rebuilding().is_none()
    }

    pub(crate) fn has_sync_work(&self) -> bool {
        if self.rebuilding().is_some() {
            return true;
        }
        let is_done = self.synced.get() == self.geometry.stripes();
        let is_done = is_done && self.holes.borrow().is_empty() && self.first_unsynced().is_none();
        self.geometry.redundancy() > 0 && !is_done && self.has_sync_redundancy()
    }

    /// The next stripe from `at` on that a sync has to do: all from its cursor on, and below it what lies in regions that are
    /// not proven, or that a member which comes back has missed.
    fn next_to_sync(&self, at: u64, cursor: u64) -> u64 {
        let (stripes, unit) = (self.geometry.stripes(), self.geometry.stripe_on_member());
        let Some(maps) = self.maps.as_ref().filter(|_| at < cursor) else {
            return at.max(cursor).min(stripes);
        };
        let region = self
            .set_to_sync(maps)
            .next(maps.regions_of(&(at..at + 1), unit).start);
        let marked = region.map(|region| maps.stripes_of(region, unit).start.max(at));
        marked.unwrap_or(cursor).min(cursor)
    }

    fn set_to_sync<'a>(&self, maps: &'a Maps) -> Ref<'a, RegionSet> {
        match self.catches_up() {
            true => maps.behind.borrow(),
            false => maps.unsynced.borrow(),
        }
    }

    fn catches_up(&self) -> bool {
        self.rebuild.get().is_some_and(|rebuild| rebuild.catches_up)
    }

    /// Where the sync that is to be done begins: stripes below are done, but for those in regions of the maps, if any are.
    fn sync_cursor(&self) -> u64 {
        match self.rebuild.get() {
            Some(rebuild) if rebuild.catches_up => self.geometry.stripes(),
            Some(rebuild) => rebuild.done,
            None => self.synced.get(),
        }
    }

    /// Stripes that are done before a sync begins, and those that are done when it ends.
    fn sync_extent(&self) -> (u64, u64) {
        let (cursor, stripes) = (self.sync_cursor(), self.geometry.stripes());
        let (mut marked, mut counted) = (0, self.first_to_sync());
        if let Some(maps) = self.maps.as_ref().filter(|_| counted < cursor) {
            let unit = self.geometry.stripe_on_member();
            for region in self.set_to_sync(maps).iter() {
                let range = maps.stripes_of(region, unit);
                let range = range.start.max(counted)..range.end.min(cursor);
                marked += range.end.saturating_sub(range.start);
                counted = range.end.max(counted);
            }
        }
        match marked {
            0 => (cursor, stripes),
            marked => (0, marked + stripes - cursor),
        }
    }

    fn first_to_sync(&self) -> u64 {
        let cursor = self.sync_cursor();
        match self.rebuild.get() {
            Some(rebuild) if !rebuild.catches_up => cursor,
            Some(_) | None => self.next_to_sync(0, cursor),
        }
    }

    /// A sync has passed all stripes before this one: regions before it are done.
    fn passed(&self, stripe: u64) {
        let set = match (&self.maps, self.rebuild.get()) {
            (Some(maps), Some(rebuild)) if rebuild.catches_up => &maps.behind,
            (Some(maps), None) => &maps.unsynced,
            _ => return,
        };
        let (unit, stripes) = (self.geometry.stripe_on_member(), self.geometry.stripes());
        let maps = self.maps.as_ref().expect("looked at above");
        let mut set = set.borrow_mut();
        while let Some(region) = set.next(0) {
            let is_early = planted::is(Bug::CaughtUpEarly) && self.catches_up();
            if maps.stripes_of(region, unit).end.min(stripes) > stripe && !is_early {
                break;
            }
            set.remove(region);
            self.views.advance();
        }
    }

    /// A resync or rebuild that has not begun yet, or waits to be tried again.
    pub(crate) fn waiting_sync(&self) -> Option<SyncStatus> {
        if self.rebuilding().is_none() && !self.failed.get() && self.copying().is_some() {
            return self.copy_status(0);
        }
        if self.failed.get() || !self.has_sync_work() {
            return None;
        }
        let (action, slot) = match self.rebuild.get() {
            Some(rebuild) => (SyncAction::Recover, Some(rebuild.slot)),
            None => (SyncAction::Resync, None),
        };
        let (done, total) = self.sync_extent();
        let done = done.saturating_sub(self.holes.borrow().len() as u64);
        let unit = self.geometry.stripe_on_member();
        Some(SyncStatus {
            action,
            done: done * unit,
            total: total * unit,
            rate: 0,
            slot,
        })
    }

    /// Says whether there is something that a resync can compare, or a slot to fill.
    fn has_sync_redundancy(&self) -> bool {
        let in_sync = self.in_sync.get().count_ones();
        self.rebuilding().is_some()
            || in_sync == u32::from(self.geometry.members())
            || self.geometry.is_mirrored() && in_sync > 1
    }

    /// Runs one resync or rebuild to its end. Stripes that nobody can read are left out, and are all that is done
    /// the next time; until they are, it has not ended.
    ///
    /// # Crash  what is above the durable cursor is done again; the cursor is durable only after a flush of
    /// what was written below it
    async fn sync(&self) -> Result<(), ()> {
        let slot = self.rebuilding();
        let (action, name) = match slot {
            Some(_) => (SyncAction::Recover, "Rebuild"),
            None => (SyncAction::Resync, "Resync"),
        };
        let wanted = self.sync_wanted.get();
        let stripes = self.geometry.stripes();
        let unit = self.geometry.stripe_on_member();
        let catches_up = self.catches_up();
        let cursor = self.sync_cursor();
        let mut next = self.first_to_sync();
        let (begun, total) = self.sync_extent();
        // The cursor, and stripes done since it began.
        let (mut done, mut did) = (cursor, 0);
        let left_out = self.holes.borrow().len();
        let again: Vec<u64> = match next == stripes {
            true => self.holes.borrow().iter().copied().collect(),
            false => Vec::new(),
        };
        let is_again = !again.is_empty();
        let mut again = again.into_iter();
        if !is_again {
            self.event(
                &format!("{name}Started"),
                slot,
                &match (begun == 0 && cursor > 0, slot) {
                    (false, _) => format!("from {cursor} of {stripes} stripes"),
                    (true, None) => {
                        format!("{total} of {stripes} stripes, in regions that were being written")
                    }
                    (true, Some(_)) => format!(
                        "{total} of {stripes} stripes, in regions that it has missed writes of"
                    ),
                },
            );
        }
        let mut window: VecDeque<(u64, JoinId)> = VecDeque::new();
        let (mut saved, mut saved_at) = (done, self.clock.now());
        let mut pace = Pace::new(saved_at, begun);
        let mut result = Ok(());
        loop {
            let busy = pace.is_busy(self.clock.now(), self.requests_seen());
            let gone = self.stopping.get() || !self.is_current(slot, wanted);
            let room = pace.room(busy, unit);
            while !gone && result.is_ok() && (window.len() as u64) < room {
                let stripe = match next < stripes {
                    true => {
                        let stripe = next;
                        next = self.next_to_sync(stripe + 1, cursor);
                        stripe
                    }
                    false => match again.next() {
                        Some(hole) => hole,
                        None => break,
                    },
                };
                if let Some(mut rebuild) = self.rebuild.get().filter(|_| !catches_up) {
                    rebuild.window = next;
                    self.rebuild.set(Some(rebuild));
                }
                let join = self.stripes.open();
                self.stripes.push(
                    stripe,
                    Item {
                        task: Task::Sync,
                        join,
                        lu: None,
                    },
                );
                window.push_back((stripe, join));
            }
            let Some((stripe, join)) = window.pop_front() else {
                break;
            };
            let ended = self.stripes.wait(join).await;
            let counts = result.is_ok() && self.is_current(slot, wanted);
            match ended {
                Ok(()) if counts && is_again => {
                    self.holes.borrow_mut().remove(&stripe);
                }
                Err(_) if counts && is_again => {}
                _ if counts && (ended.is_ok() || self.leave_out(stripe)) => {
                    did += 1;
                    done += u64::from(stripe >= cursor);
                    self.passed(window.front().map_or(next, |(next, _)| *next));
                    match (slot, self.rebuild.get()) {
                        (Some(_), Some(mut rebuild)) => {
                            rebuild.done = done;
                            self.rebuild.set(Some(rebuild));
                        }
                        (None, _) => self.synced.set(done),
                        (Some(_), None) => {}
                    }
                }
                Ok(()) => {}
                Err(_) => result = Err(()),
            }
            let now = self.clock.now();
            if pace.is_second(now) || self.sync_status.borrow().is_none() {
                let status = SyncStatus {
                    action,
                    done: (begun + did) * unit,
                    total: total * unit,
                    rate: pace.rate(now, begun + did, unit),
                    slot,
                };
                *self.sync_status.borrow_mut() = Some(status);
            }
            let due = (done - saved) * unit >= CURSOR_BYTES || now.0 - saved_at.0 >= CURSOR_AFTER;
            if due && result.is_ok() && !gone {
                result = self.save_cursor(slot, wanted, done).await;
                (saved, saved_at) = (done, self.clock.now());
            }
            self.throttle(busy, unit, None).await;
        }
        let mut why = "an I/O error on what it reads; tried again in 60 s".to_owned();
        if result.is_ok() && self.is_current(slot, wanted) {
            let holes = self.holes.borrow().len();
            let is_whole = next == stripes && done == stripes && holes == 0;
            result = if is_whole {
                self.sync_end(slot, wanted).await
            } else {
                // Stopping, or not all of it could be read: the next start goes on from here.
                self.save_cursor(slot, wanted, done).await
            };
            if result.is_ok() && is_whole {
                let text = format!("{} of {stripes} stripes", begun + did);
                self.event(&format!("{name}Finished"), slot, &text);
                if slot.is_some() {
                    self.event("SpareActive", slot, "it is filled, and in sync from now on");
                }
            } else if result.is_ok() && next == stripes && done == stripes {
                why = self.holes_text(if slot.is_some() { "rebuilt" } else { "synced" });
                if let Some(slot) = slot {
                    why.clone_into(&mut self.member(slot).reason.borrow_mut());
                }
                self.sync_status.borrow_mut().take();
                if is_again && holes == left_out {
                    return Err(()); // Said before.
                }
                result = Err(());
            }
        }
        self.sync_status.borrow_mut().take();
        if result.is_err() && self.is_current(slot, wanted) {
            self.event(&format!("{name}Stopped"), slot, &why);
            return Err(());
        }
        Ok(())
    }

    /// Takes a stripe for one that nobody can read, if that can be.
    fn leave_out(&self, stripe: u64) -> bool {
        let mut holes = self.holes.borrow_mut();
        let is_left_out = !self.failed.get() && holes.len() < HOLES_MAX && holes.insert(stripe);
        drop(holes);
        self.views.advance();
        is_left_out
    }

    /// Says how many stripes are left out, for people.
    pub(crate) fn holes_text(&self, what: &str) -> String {
        let holes = self.holes.borrow();
        let first = holes
            .first()
            .map_or(0, |stripe| stripe * self.geometry.stripe_on_member());
        format!(
            "{} stripes could not be {what}: what they need cannot be read (the first is at byte {first} of the \
             members' data); tried again every 60 s, or write over it",
            holes.len()
        )
    }

    /// Waits so long that background work keeps to its rate: the minimum while the host works, else the maximum; and
    /// a most of its own.
    pub(crate) async fn throttle(&self, busy: bool, bytes: u64, most: Option<u64>) {
        let rate = if busy {
            Some(self.rate_min.get())
        } else {
            self.rate_max.get()
        };
        if let Some(rate) = rate.into_iter().chain(most).min() {
            let ns = bytes.saturating_mul(SECOND) / rate.max(1);
            self.clock.sleep(ns.min(SECOND)).await;
        }
    }

    /// Says whether a sync is still about what it began with: the same disk in the slot that is rebuilt, or none,
    /// and redundancy to make right.
    fn is_current(&self, slot: Option<u16>, wanted: u64) -> bool {
        self.rebuilding() == slot && self.sync_wanted.get() == wanted && self.has_sync_redundancy()
    }

    async fn save_cursor(&self, slot: Option<u16>, wanted: u64, done: u64) -> Result<(), ()> {
        if self.catches_up() {
            return Ok(()); // What is missed is noted until it has all of it.
        }
        self.flush_members().await.map_err(|_| ())?;
        if !self.is_current(slot, wanted) {
            return Err(());
        }
        // A start believes all that is below the cursor.
        let done = self
            .holes
            .borrow()
            .first()
            .map_or(done, |hole| done.min(*hole));
        match slot {
            Some(_) if planted::is(Bug::CursorAhead) => {
                let ahead = (done + 256).min(self.geometry.stripes());
                self.durable_rebuild.set(ahead);
            }
            Some(_) => self.durable_rebuild.set(done),
            None => self.durable_synced.set(done),
        }
        self.views.advance();
        self.advance();
        self.publish().await.map_err(|_| ())
    }

    async fn sync_end(&self, slot: Option<u16>, wanted: u64) -> Result<(), ()> {
        if !planted::is(Bug::SyncUnflushed) {
            self.flush_members().await.map_err(|_| ())?;
        }
        if !self.is_current(slot, wanted) {
            return Err(());
        }
        if let Some(slot) = slot {
            // Whoever reads it from now on relies on data that is flushed; a crash before the publish only
            // repeats the end of the rebuild.
            self.in_sync.set(self.in_sync.get() | 1 << slot);
            let rebuild = self.rebuild.take();
            let (from, catches_up) = rebuild.map_or((0, false), |r| (r.from, r.catches_up));
            self.member(slot).state.set(MemberState::InSync);
            self.member(slot).left_at.set(0);
            self.member(slot).reason.borrow_mut().clear();
            let whole = self.in_sync.get().count_ones() == u32::from(self.geometry.members());
            if let Some(maps) = self.maps.as_ref().filter(|_| whole) {
                maps.forget_missed();
                if self.geometry.parities() == 1 && !catches_up && from == 0 {
                    maps.unsynced.borrow_mut().clear();
                }
            }
            if whole && self.geometry.parities() == 1 && !catches_up {
                // Every row from there on was read and written: parity is right wherever the rebuilt slot is. (Of two
                // parities only one is sure to fit what was computed.)
                if self.synced.get() >= from {
                    self.synced.set(self.geometry.stripes());
                } else {
                    // Power that was lost since has torn rows below, it may be.
                    self.record.borrow_mut().flags.torn = true;
                }
            }
        }
        if self.synced.get() == self.geometry.stripes() && self.first_unsynced().is_none() {
            self.record.borrow_mut().flags.torn = false;
        }
        self.durable_rebuild.set(0);
        self.durable_synced.set(self.synced.get());
        self.views.advance();
        self.advance();
        if let Some(slot) = slot {
            self.member(slot).filled_in.set(self.generation.get());
        }
        self.publish().await.map_err(|_| ())
    }
}
