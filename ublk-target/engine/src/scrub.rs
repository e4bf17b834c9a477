//! Scrub: every stripe below the resync cursor is read from all members in sync and compared, in the background.
//!
//! What it has come to is in the configuration of every member, so that it goes on after any restart. One of
//! resync, rebuild and scrub runs at a time: a scrub gives way, and goes on after.

use std::collections::VecDeque;
use std::ops::Range;

use lunar_api::target::{BadStripe, Level, ScrubOrder, ScrubState, ScrubStatus};
use lunar_api::{ApiError, ErrorKind, LuUuid};

use crate::background::{Pace, WINDOW_MAX};
use crate::config::{BadRecord, ScrubRecord};
use crate::limits::SCRUB_LIST_MAX;
use crate::raid_group::RaidGroup;
use crate::stripe_ops::scrub::Finding;
use crate::stripe_table::{Item, JoinId, Task};
use crate::traits::{Clock, Env, SECOND};

/// The record is made durable after so many bytes of a member, or so long: that much is compared twice after a crash.
const SAVE_BYTES: u64 = 1 << 30;
const SAVE_AFTER: u64 = 30 * SECOND;
/// Bad stripes that are told one by one; beyond them the end of the scrub tells the count.
const EVENTS_MAX: usize = 16;

/// What a pass is about.
#[derive(Clone, Copy)]
struct Began {
    orders: u64,
    in_sync: u64,
}

impl<E: Env> RaidGroup<E> {
    /// Starts, pauses, resumes or cancels a scrub.
    ///
    /// # Crash  answered when the configuration of every member says so
    /// # Errors  no redundancy to compare; another one runs; none that could be paused, resumed or cancelled
    pub async fn scrub(&self, order: ScrubOrder) -> Result<(), ApiError> {
        let old = self.scrub.borrow().clone();
        let name = self.config.borrow().name.clone();
        let mut next = self.ordered(&name, order, old.clone())?;
        let (event, text) = match order {
            ScrubOrder::Start { repair: true, .. } => ("ScrubStarted", "repair"),
            ScrubOrder::Start { repair: false, .. } => ("ScrubStarted", "check"),
            ScrubOrder::Pause => ("ScrubPaused", "paused"),
            ScrubOrder::Resume => ("ScrubResumed", "resumed"),
            ScrubOrder::Cancel => {
                next.ended = self.clock.date();
                ("ScrubCancelled", "cancelled")
            }
        };
        let text = format!(
            "{text}, at byte {} of {} of the members' data",
            next.next,
            self.geometry.member_bytes()
        );
        // From here on a pass that runs counts nothing more.
        self.scrub_orders.set(self.scrub_orders.get() + 1);
        self.changed.wake_all();
        *self.scrub.borrow_mut() = Some(next);
        if let Err(error) = self.save_scrub().await {
            *self.scrub.borrow_mut() = old;
            return Err(error);
        }
        self.event(event, None, &text);
        Ok(())
    }

    /// What the record is after an order.
    fn ordered(
        &self,
        name: &str,
        order: ScrubOrder,
        old: Option<ScrubRecord>,
    ) -> Result<ScrubRecord, ApiError> {
        let open =
            old.filter(|scrub| matches!(scrub.state, ScrubState::Running | ScrubState::Paused));
        let none = |what: &str| {
            ApiError::new(ErrorKind::Usage, format!("group {name} was not {what}"))
                .because("no scrub of it is running")
                .hint(format!("lunar group scrub {name}"))
        };
        match (order, open) {
            (ScrubOrder::Start { .. }, Some(_)) => Err(ApiError::new(
                ErrorKind::Busy,
                format!("no scrub of group {name} was started"),
            )
            .because("one is running or paused already")
            .hint(format!("lunar group scrub {name} --cancel"))),
            (ScrubOrder::Start { repair, from, rate }, None) => {
                self.check_scrub(name, from, rate)?;
                let unit = self.geometry.stripe_on_member();
                let from = from / unit * unit;
                Ok(ScrubRecord {
                    state: ScrubState::Running,
                    repair,
                    from,
                    next: from,
                    rate,
                    started: self.clock.date(),
                    ended: 0,
                    list: Vec::new(),
                    more: 0,
                    more_repaired: 0,
                    unreadable: 0,
                    rewritten: 0,
                })
            }
            (ScrubOrder::Pause, Some(scrub)) => Ok(ScrubRecord {
                state: ScrubState::Paused,
                ..scrub
            }),
            (ScrubOrder::Resume, Some(scrub)) => Ok(ScrubRecord {
                state: ScrubState::Running,
                ..scrub
            }),
            (ScrubOrder::Cancel, Some(scrub)) => Ok(ScrubRecord {
                state: ScrubState::Cancelled,
                ..scrub
            }),
            (ScrubOrder::Pause, None) => Err(none("paused")),
            (ScrubOrder::Resume, None) => Err(none("resumed")),
            (ScrubOrder::Cancel, None) => Err(none("cancelled")),
        }
    }

    fn check_scrub(&self, name: &str, from: u64, rate: Option<u64>) -> Result<(), ApiError> {
        let what = format!("no scrub of group {name} was started");
        let refuse = |kind, why: &str| Err(ApiError::new(kind, &what).because(why));
        if self.geometry.redundancy() == 0 {
            return refuse(ErrorKind::Usage, "its level has no redundancy to compare");
        }
        if from >= self.geometry.member_bytes() {
            let bytes = self.geometry.member_bytes();
            return refuse(
                ErrorKind::Usage,
                &format!("--from {from} is beyond the {bytes} bytes of data of a member"),
            );
        }
        if rate == Some(0) {
            return refuse(ErrorKind::Usage, "a rate of 0 never ends");
        }
        if !self.can_scrub() && self.rebuilding().is_none() {
            return refuse(
                ErrorKind::NoRedundancy,
                "it is degraded: without its missing members there is nothing to compare with",
            )
            .map_err(|error| error.hint("lunar status"));
        }
        Ok(())
    }

    /// Says whether there is redundancy to compare.
    pub(crate) fn can_scrub(&self) -> bool {
        let in_sync = self.in_sync.get();
        in_sync == self.geometry.slots()
            || self.geometry.level() == Level::Raid1 && in_sync.count_ones() > 1
    }

    /// Says whether a scrub is to run now, apart from what goes before it.
    pub(crate) fn wants_scrub(&self) -> bool {
        let running = |scrub: &ScrubRecord| scrub.state == ScrubState::Running;
        !self.failed.get() && self.can_scrub() && self.scrub.borrow().as_ref().is_some_and(running)
    }

    /// Says whether a pass is still about what it began with: the same order, the same members.
    fn is_scrubbing(&self, began: Began) -> bool {
        self.scrub_orders.get() == began.orders
            && self.in_sync.get() == began.in_sync
            && self.wants_scrub()
    }

    /// Makes the record durable, after what was repaired.
    ///
    /// # Crash  a record that is behind has stripes compared again: those of the list are known, and one that fits by
    /// then counts as repaired. Of the bad stripes beyond the list those repaired since the last save are forgotten
    pub(crate) async fn save_scrub(&self) -> Result<(), ApiError> {
        let repairs = self
            .scrub
            .borrow()
            .as_ref()
            .is_some_and(|scrub| scrub.repair);
        if repairs {
            self.flush_members().await.map_err(|_| {
                ApiError::new(
                    ErrorKind::Failed,
                    "the scrub's repairs could not be flushed",
                )
            })?;
        }
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        config.scrub.clone_from(&self.scrub.borrow());
        self.write_config(config).await
    }

    /// Runs the scrub until it ends or has to give way.
    pub(crate) async fn scrub_pass(&self) {
        let began = Began {
            orders: self.scrub_orders.get(),
            in_sync: self.in_sync.get(),
        };
        let (stripes, unit) = (self.geometry.stripes(), self.geometry.stripe_on_member());
        let Some((mut next, repair, rate)) = self
            .scrub
            .borrow()
            .as_ref()
            .map(|scrub| (scrub.next / unit, scrub.repair, scrub.rate))
        else {
            return;
        };
        let mut window: VecDeque<(u64, JoinId)> = VecDeque::new();
        let mut pace = Pace::new(self.clock.now(), next);
        let (mut saved, mut saved_at) = (next, self.clock.now());
        let mut counts = true;
        loop {
            let busy = pace.is_busy(self.clock.now(), self.requests_seen());
            let goes_on = !self.stopping.get() && !self.is_sync_due() && self.is_scrubbing(began);
            let room = pace.room(busy, unit).min(WINDOW_MAX);
            while goes_on && counts && next < stripes && (window.len() as u64) < room {
                window.push_back((next, self.push_scrub(next, false)));
                next += 1;
            }
            let Some((stripe, join)) = window.pop_front() else {
                break;
            };
            let compared = self.stripes.wait(join).await.is_ok();
            let found = self.scrub_found.borrow_mut().remove(&stripe);
            // What was lost on the way is compared again, once it can be.
            counts = counts && self.is_scrubbing(began);
            if counts {
                counts = self
                    .note_scrubbed(began, stripe, compared, found, repair)
                    .await;
            }
            if counts {
                self.change_scrub(|scrub| scrub.next = (stripe + 1) * unit);
                self.scrub_rate
                    .set(pace.rate(self.clock.now(), stripe + 1, unit));
            }
            let done = stripe + 1;
            let now = self.clock.now();
            let due =
                done.saturating_sub(saved) * unit >= SAVE_BYTES || now.0 - saved_at.0 >= SAVE_AFTER;
            if due && counts {
                counts = self.save_scrub().await.is_ok();
                (saved, saved_at) = (done, self.clock.now());
            }
            self.throttle(busy, unit, rate).await;
        }
        self.scrub_rate.set(0);
        if self.scrub_orders.get() != began.orders {
            return; // Whoever ordered something else saves it.
        }
        let is_whole = self.is_scrubbing(began) && counts && next == stripes;
        if is_whole {
            self.end_scrub().await;
        } else if !self.failed.get() {
            let _ = self.save_scrub().await;
        }
    }

    fn push_scrub(&self, stripe: u64, repair: bool) -> JoinId {
        let join = self.stripes.open();
        let item = Item {
            task: Task::Scrub { repair },
            join,
            lu: None,
        };
        self.stripes.push(stripe, item);
        join
    }

    fn change_scrub(&self, change: impl FnOnce(&mut ScrubRecord)) {
        if let Some(scrub) = self.scrub.borrow_mut().as_mut() {
            change(scrub);
        }
    }

    /// Takes what was found in a stripe, and repairs it if that is wanted. False: it has to be looked at again.
    async fn note_scrubbed(
        &self,
        began: Began,
        stripe: u64,
        compared: bool,
        found: Option<Finding>,
        repair: bool,
    ) -> bool {
        let found = found.unwrap_or_default();
        self.change_scrub(|scrub| scrub.rewritten += found.rewritten);
        if let Some(wrong) = &found.wrong {
            let listed = self.list_bad(stripe, wrong, found.slots);
            if repair {
                // In the list before it is gone from the disks.
                let saved = !listed || self.save_scrub().await.is_ok();
                return saved && self.repair_bad(began, stripe, listed).await;
            }
        } else if compared {
            // Found by a process that died before it said more.
            self.change_scrub(|scrub| {
                if let Some(bad) = scrub.list.iter_mut().find(|bad| bad.stripe == stripe) {
                    bad.repaired = true;
                }
            });
        }
        if !compared {
            self.change_scrub(|scrub| scrub.unreadable += 1);
        }
        true
    }

    /// Notes a bad stripe; true if it is in the list.
    fn list_bad(&self, stripe: u64, wrong: &Range<u64>, slots: u64) -> bool {
        let bad = BadRecord {
            stripe,
            at: wrong.start,
            len: wrong.end - wrong.start,
            slots,
            repaired: false,
        };
        let mut told = None;
        let mut listed = true;
        self.change_scrub(|scrub| {
            match scrub.list.binary_search_by_key(&stripe, |bad| bad.stripe) {
                Ok(i) => scrub.list[i] = bad.clone(),
                Err(i) if scrub.list.len() < SCRUB_LIST_MAX => {
                    scrub.list.insert(i, bad.clone());
                    told = (scrub.list.len() <= EVENTS_MAX).then_some(());
                }
                Err(_) => {
                    scrub.more += 1;
                    listed = false;
                }
            }
        });
        if told.is_some() {
            let text = self.bad_text(&bad);
            self.event("ScrubMismatch", None, &text);
        }
        listed
    }

    fn bad_text(&self, bad: &BadRecord) -> String {
        let shown = self.bad_status(bad);
        let config = self.config.borrow();
        let lu = config.lus.iter().find(|lu| Some(lu.uuid) == shown.lu);
        let lu = match lu {
            Some(lu) => format!(
                "LU {}, bytes {} to {}",
                lu.name,
                shown.lu_at,
                shown.lu_at + shown.lu_len
            ),
            None => "no LU has data there".to_owned(),
        };
        let who = match (self.geometry.is_mirrored(), &shown.slots[..]) {
            (true, slots) => {
                format!("slots {slots:?} are unlike the first copy; which is right cannot be told")
            }
            (false, []) => {
                "data and parity do not fit; which of them is wrong cannot be told".to_owned()
            }
            (false, slots) => format!("slots {slots:?} are wrong"),
        };
        format!(
            "stripe {}, bytes {} to {} of the members' data ({lu}): {who}",
            bad.stripe,
            bad.at,
            bad.at + bad.len
        )
    }

    async fn repair_bad(&self, began: Began, stripe: u64, listed: bool) -> bool {
        if self.ensure_dirty().await.is_err() {
            return false;
        }
        // As a write of the host does, it keeps the group from being marked clean.
        self.active_writes.set(self.active_writes.get() + 1);
        let join = self.push_scrub(stripe, true);
        let ended = self.stripes.wait(join).await;
        self.active_writes.set(self.active_writes.get() - 1);
        let found = self.scrub_found.borrow_mut().remove(&stripe);
        if !self.is_scrubbing(began) {
            return false;
        }
        // Nothing found: somebody wrote all of it meanwhile.
        let repaired = ended.is_ok() && found.is_none_or(|found| found.repaired);
        self.change_scrub(|scrub| {
            let bad = scrub.list.iter_mut().find(|bad| bad.stripe == stripe);
            match bad {
                Some(bad) => bad.repaired = repaired,
                None if !listed => scrub.more_repaired += u64::from(repaired),
                None => {}
            }
        });
        true
    }

    /// # Crash  not ended in the record: the last part is compared again
    async fn end_scrub(&self) {
        let date = self.clock.date();
        self.change_scrub(|scrub| {
            scrub.state = ScrubState::Done;
            scrub.next = self.geometry.member_bytes();
            scrub.ended = date;
        });
        if self.save_scrub().await.is_err() {
            return;
        }
        let Some(status) = self.scrub_status() else {
            return;
        };
        let text = format!(
            "mismatches found: {} stripes, {} repaired; {} could not be compared; {} bytes that could not be read \
             were rewritten",
            status.bad, status.repaired, status.unreadable, status.rewritten
        );
        self.event("ScrubFinished", None, &text);
    }

    /// The scrub that runs, or the last one.
    pub(crate) fn scrub_status(&self) -> Option<ScrubStatus> {
        let scrub = self.scrub.borrow();
        let scrub = scrub.as_ref()?;
        let repaired = scrub.list.iter().filter(|bad| bad.repaired).count() as u64;
        Some(ScrubStatus {
            state: scrub.state,
            repair: scrub.repair,
            from: scrub.from,
            done: scrub.next,
            total: self.geometry.member_bytes(),
            rate: self.scrub_rate.get(),
            rate_max: scrub.rate,
            bad: scrub.list.len() as u64 + scrub.more,
            repaired: repaired + scrub.more_repaired,
            unreadable: scrub.unreadable,
            rewritten: scrub.rewritten,
            started: scrub.started,
            ended: (scrub.ended != 0).then_some(scrub.ended),
            stripes: scrub.list.iter().map(|bad| self.bad_status(bad)).collect(),
        })
    }

    fn bad_status(&self, bad: &BadRecord) -> BadStripe {
        let (lu, lu_at, lu_len) = match self.lu_of(bad) {
            Some((lu, at, len)) => (Some(lu), at, len),
            None => (None, 0, 0),
        };
        BadStripe {
            stripe: bad.stripe,
            at: bad.at,
            len: bad.len,
            slots: crate::serve::bits(bad.slots).collect(),
            lu,
            lu_at,
            lu_len,
            repaired: bad.repaired,
        }
    }

    /// The LU that has data in a bad stripe, and which bytes of it. LUs are whole stripes, so there is at most one.
    fn lu_of(&self, bad: &BadRecord) -> Option<(LuUuid, u64, u64)> {
        let whole = (
            self.geometry.address(bad.stripe, 0, 0),
            self.geometry.stripe_bytes(),
        );
        let chunk = self.geometry.chunk();
        let is_in_one_chunk = bad.at / chunk == (bad.at + bad.len - 1) / chunk;
        let slot = crate::serve::bits(bad.slots).next();
        // Where it is not known which chunk is wrong, any may be.
        let known = slot.filter(|_| is_in_one_chunk);
        let known = known.and_then(|slot| self.geometry.address_of_member(slot, bad.at));
        let (at, len) = known.map_or(whole, |at| (at, bad.len));
        let config = self.config.borrow();
        config.lus.iter().find_map(|lu| {
            let mut start = 0;
            lu.extents.iter().find_map(|extent| {
                let here = start;
                start += extent.len;
                let inside = extent.at <= at && at < extent.at + extent.len;
                inside.then(|| (lu.uuid, here + at - extent.at, len))
            })
        })
    }
}
