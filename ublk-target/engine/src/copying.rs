//! A member that is replaced while it still reads: the new disk is filled by copying from it.
//!
//! ```text
//!              member_replace                 copy_end
//!  OLD in_sync --------------> OLD in_sync  --------------> NEW in_sync, OLD is a free disk
//!                              NEW is filled
//!                 NEW fails: OLD in_sync   OLD fails: NEW rebuilding, from where the copy was
//! ```
//!
//! OLD stays what it is until the end: reads go to it. What is written to it goes to NEW too, below the window
//! ([`Twin`] of its member), and a stripe is copied by whoever holds it: so NEW is right below `done`.
//!
//! # Crash
//! The superblocks name NEW beside the slots, never in one, until it is whole and flushed. After a clean stop the copy goes
//! on from the recorded cursor; any other start begins it anew, so a write to NEW needs no log of its own.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

use lunar_api::target::{MemberState, SyncAction, SyncStatus};

use crate::background::Pace;
use crate::inflight::Held;
use crate::limits::HOLES_MAX;
use crate::member::{Member, Twin};
use crate::raid_group::{RaidGroup, Rebuild};
use crate::stripe_table::{Item, JoinId, Task};
use crate::superblock::{BYTES, Copy, Superblock};
use crate::traits::{Buf, Clock, Disk, DiskVerb, Env, MILLISECOND, Piece};

/// A copy under way.
pub(crate) struct Copying<D> {
    /// Of OLD.
    pub slot: u16,
    /// NEW.
    pub to: Rc<Member<D>>,
    /// Stripes below are on NEW, but for what is lost.
    pub done: Cell<u64>,
    /// Stripes below may be under work.
    pub next: Cell<u64>,
    /// Bytes of the members' data below which writes go to NEW too.
    pub window: Rc<Cell<u64>>,
    /// Grains that neither OLD nor redundancy gives, in bytes of the members' data.
    pub lost: RefCell<BTreeSet<u64>>,
}

impl<E: Env> RaidGroup<E> {
    /// The copy under way.
    pub(crate) fn copying(&self) -> Option<Rc<Copying<E::Disk>>> {
        self.copying.borrow().clone()
    }

    /// Begins to copy the disk in `slot` to `to`, `done` stripes of which are right.
    pub(crate) fn begin_copy(&self, slot: u16, to: Rc<Member<E::Disk>>, done: u64) {
        let first = self.geometry.stripes_of(slot).start;
        let done = done.max(first);
        let window = Rc::new(Cell::new(self.copied_bytes(slot, done)));
        to.counts.set(false);
        // Both have the same units: whichever of them is in the slot, its log is whole.
        to.lane.replace(self.member(slot).lane.borrow().clone());
        *self.member(slot).twin.borrow_mut() = Some(Twin {
            member: Rc::clone(&to),
            window: Rc::clone(&window),
        });
        let copying = Copying {
            slot,
            to,
            done: Cell::new(done),
            next: Cell::new(done),
            window,
            lost: RefCell::default(),
        };
        *self.copying.borrow_mut() = Some(Rc::new(copying));
        self.views.advance();
        self.want_sync();
    }

    /// Bytes of a member's data that so many stripes are.
    pub(crate) fn copied_bytes(&self, slot: u16, stripes: u64) -> u64 {
        let first = self.geometry.stripes_of(slot).start;
        (stripes - first) * self.geometry.stripe_on_member()
    }

    fn is_copying(&self, copying: &Rc<Copying<E::Disk>>) -> bool {
        let now = self.copying.borrow();
        now.as_ref().is_some_and(|now| Rc::ptr_eq(now, copying))
    }

    /// Gives the copy up in memory: the group is as it was. Not durable yet.
    pub(crate) fn drop_copy(&self, why: &str) {
        let Some(copying) = self.copying.borrow_mut().take() else {
            return;
        };
        self.member(copying.slot).twin.take();
        self.views.advance();
        copying.to.state.set(MemberState::Faulty);
        self.give_up(&copying.to);
        let text = format!(
            "disk {} that was to replace slot {}: {why}; the group goes on without it",
            copying.to.path, copying.slot
        );
        self.event_of("FailSpare", Some(copying.to.uuid), &text);
        self.advance();
    }

    /// OLD has failed: NEW takes its slot and is rebuilt from where the copy was. False if another slot is rebuilt, or NEW
    /// has failed too.
    pub(crate) fn turn_into_rebuild(&self, why: &str) -> bool {
        let Some(copying) = self.copying.borrow_mut().take() else {
            return false;
        };
        let old = self.member(copying.slot);
        old.twin.take();
        let unfit = match copying.to.to_blame.get() {
            // It has missed a write that the other disk took, or that redundancy has.
            true => Some("write failed, and the disk that it copied from has failed too"),
            false => self
                .rebuilding()
                .map(|_| "the disk that it copied from has failed, and another slot is rebuilt"),
        };
        if let Some(unfit) = unfit {
            *self.copying.borrow_mut() = Some(copying);
            self.drop_copy(unfit);
            return false;
        }
        let new = Rc::clone(&copying.to);
        new.counts.set(true);
        new.state.set(MemberState::Rebuilding);
        *new.reason.borrow_mut() =
            format!("in the place of disk {}, which failed: {why}", old.path);
        self.members.borrow_mut()[usize::from(copying.slot)] = new;
        self.views.advance();
        // What a resync left out stays to be done.
        let unit = self.geometry.stripe_on_member();
        let lost: BTreeSet<u64> = copying.lost.borrow().iter().map(|at| at / unit).collect();
        let holes = std::mem::replace(&mut *self.holes.borrow_mut(), lost);
        if let Some(first) = holes.first() {
            self.synced.set(self.synced.get().min(*first));
        }
        self.durable_rebuild.set(0);
        self.rebuild.set(Some(Rebuild {
            window: copying.next.get(),
            ..Rebuild::new(copying.slot, copying.done.get())
        }));
        self.want_sync();
        true
    }

    /// What is being copied, or waits to be.
    pub(crate) fn copy_status(&self, rate: u64) -> Option<SyncStatus> {
        let copying = self.copying()?;
        let total = self.geometry.stripes_of(copying.slot).end;
        Some(SyncStatus {
            action: SyncAction::Replace,
            done: self.copied_bytes(copying.slot, copying.done.get()),
            total: self.copied_bytes(copying.slot, total),
            rate,
            slot: Some(copying.slot),
        })
    }

    /// Says what cannot be copied, for people.
    pub(crate) fn lost_text(&self, copying: &Copying<E::Disk>) -> String {
        let lost = copying.lost.borrow();
        let old = self.member(copying.slot);
        let at: Vec<String> = lost
            .iter()
            .take(8)
            .map(|at| (old.data_offset + at).to_string())
            .collect();
        let more = if lost.len() > 8 { ", .." } else { "" };
        format!(
            "{} places of 4096 bytes cannot be read, not from disk {} nor from redundancy: at bytes {}{more} of it; the \
             rest is copied, and it stays a member until they are written over",
            lost.len(),
            old.path,
            at.join(", ")
        )
    }

    /// Copies until all is copied, or something comes between.
    pub(crate) async fn copy(&self) -> Result<(), ()> {
        let Some(copying) = self.copying() else {
            return Ok(());
        };
        // From here on writes without redundancy take stripes too, those of queue threads as well; those under way do not.
        self.views.confirmed().await;
        while self.plain_writes.get() > 0 && !self.stopping.get() {
            self.clock.sleep(MILLISECOND).await;
        }
        let range = self.geometry.stripes_of(copying.slot);
        let again: Vec<u64> = self.lost_stripes(&copying);
        let is_again = copying.next.get() == range.end;
        if !is_again {
            let old = self.member(copying.slot);
            let text = format!("disk {} is copied to {}", old.path, copying.to.path);
            self.event_of("RebuildStarted", Some(copying.to.uuid), &text);
        }
        let result = self
            .copy_stripes(&copying, again.into_iter(), range.end)
            .await;
        self.sync_status.borrow_mut().take();
        if !self.is_copying(&copying) || self.stopping.get() {
            return Ok(());
        }
        if copying.to.to_blame.get() {
            self.drop_copy("write failed");
            return self.publish().await.map_err(|_| ());
        }
        result?;
        if copying.done.get() < range.end {
            // A rebuild comes first; else too much of it cannot be read.
            return self.rebuilding().map(drop).ok_or(());
        }
        if !copying.lost.borrow().is_empty() {
            if !is_again {
                let text = self.lost_text(&copying);
                self.event_of("RebuildStopped", Some(copying.to.uuid), &text);
            }
            return Err(());
        }
        self.copy_end(&copying).await
    }

    /// Bytes of the slot that are right on NEW, in a row from its start.
    pub(crate) fn copied_until(&self, copying: &Copying<E::Disk>) -> u64 {
        let done = self.copied_bytes(copying.slot, copying.done.get());
        let unit = self.geometry.stripe_on_member();
        let lost = copying.lost.borrow();
        lost.first().map_or(done, |at| done.min(at / unit * unit))
    }

    fn lost_stripes(&self, copying: &Copying<E::Disk>) -> Vec<u64> {
        let first = self.geometry.stripes_of(copying.slot).start;
        let unit = self.geometry.stripe_on_member();
        let stripes: BTreeSet<u64> = copying
            .lost
            .borrow()
            .iter()
            .map(|at| first + at / unit)
            .collect();
        stripes.into_iter().collect()
    }

    async fn copy_stripes(
        &self,
        copying: &Rc<Copying<E::Disk>>,
        mut again: impl Iterator<Item = u64>,
        end: u64,
    ) -> Result<(), ()> {
        let unit = self.geometry.stripe_on_member();
        let mut window: VecDeque<(u64, JoinId)> = VecDeque::new();
        let mut pace = Pace::new(self.clock.now(), copying.done.get());
        let mut result = Ok(());
        *self.sync_status.borrow_mut() = self.copy_status(0);
        loop {
            let busy = pace.is_busy(self.clock.now(), self.requests.get());
            let gone = self.stopping.get()
                || self.failed.get()
                || self.rebuilding().is_some()
                || !self.is_copying(copying)
                || copying.to.to_blame.get()
                || copying.lost.borrow().len() > HOLES_MAX;
            let room = pace.room(busy, unit);
            while !gone && result.is_ok() && (window.len() as u64) < room {
                let stripe = match copying.next.get() {
                    next if next < end => {
                        copying.next.set(next + 1);
                        copying
                            .window
                            .set(self.copied_bytes(copying.slot, next + 1));
                        next
                    }
                    _ => match again.next() {
                        Some(stripe) => stripe,
                        None => break,
                    },
                };
                let join = self.stripes.open();
                let task = Task::Copy;
                self.stripes.push(
                    stripe,
                    Item {
                        task,
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
            match ended {
                Ok(()) if result.is_ok() && stripe == copying.done.get() => {
                    copying.done.set(stripe + 1);
                }
                Ok(()) => {}
                Err(_) => result = Err(()),
            }
            let rate = pace.rate(self.clock.now(), copying.done.get(), unit);
            *self.sync_status.borrow_mut() = self.copy_status(rate);
            self.throttle(busy, unit, None).await;
        }
        // What was begun and not done is begun again.
        copying.next.set(copying.done.get());
        result
    }

    /// NEW is whole: it takes the slot.
    ///
    /// # Crash  (1) NEW is flushed, and the in-flight log empty. (2) The next generation names NEW in the slot; until that is durable, every write and
    /// flush goes to both disks, so whichever superblock decides names a disk that has it all. (3) OLD is
    /// labelled as a free disk: should that fail, a newer history is on the others
    async fn copy_end(&self, copying: &Rc<Copying<E::Disk>>) -> Result<(), ()> {
        self.flush_members().await.map_err(|_| ())?;
        if !self.is_copying(copying) || self.stopping.get() || copying.to.to_blame.get() {
            return Err(());
        }
        // Its list is there before a superblock says so.
        if !copying.to.bad.is_empty() {
            self.save_list(&copying.to).await?;
        }
        let quiet = self.quiet_log().await?;
        let is_whole = copying.lost.borrow().is_empty();
        if !self.is_copying(copying) || copying.to.to_blame.get() || !is_whole {
            return Err(());
        }
        let (slot, new) = (usize::from(copying.slot), Rc::clone(&copying.to));
        let old = self.member(copying.slot);
        self.copying.borrow_mut().take();
        old.twin.take();
        old.counts.set(false);
        new.counts.set(true);
        new.state.set(MemberState::InSync);
        new.reason.borrow_mut().clear();
        *new.twin.borrow_mut() = Some(Twin {
            member: Rc::clone(&old),
            window: Rc::new(Cell::new(u64::MAX)),
        });
        self.members.borrow_mut()[slot] = Rc::clone(&new);
        self.is_handed_over.set(true);
        self.views.advance();
        self.renew_history();
        self.advance();
        let published = self.publish().await;
        if published.is_err() && !self.failed.get() && !old.to_blame.get() {
            // NEW does not take a superblock, the group cannot do without, and OLD has had every write.
            new.twin.take();
            new.counts.set(false);
            old.counts.set(true);
            self.members.borrow_mut()[slot] = Rc::clone(&old);
            self.is_handed_over.set(false);
            self.views.advance();
            self.give_up(&new);
            let text = format!("disk {}: superblock could not be written", new.path);
            self.event_of("FailSpare", Some(new.uuid), &text);
            self.advance();
            return self.publish().await.map_err(|_| ());
        }
        if published.is_err() && self.geometry.redundancy() > 0 {
            self.set_failed();
        }
        // Durable, and no queue thread reads the disk that leaves.
        published.map_err(|_| ())?;
        self.is_handed_over.set(false);
        drop(quiet);
        new.twin.take();
        self.views.advance();
        // One that failed meanwhile was told of as any other; OLD has missed what was written since.
        if new.state.get() == MemberState::InSync {
            let text = format!(
                "disk {} has all of disk {}, and takes its place",
                new.path, old.path
            );
            self.event_of("RebuildFinished", Some(new.uuid), &text);
            self.event_of(
                "SpareActive",
                Some(new.uuid),
                "it is filled, and in sync from now on",
            );
        }
        self.set_free(&old).await;
        Ok(())
    }

    /// Waits until no write is under way that the in-flight log has, and keeps new ones waiting: an entry names the disk
    /// of its time, and a successor looks for that disk in the superblocks of its own.
    async fn quiet_log(&self) -> Result<Held<'_>, ()> {
        let mut held = Held::default();
        while !self.log.take_all(&mut held) {
            if self.stopping.get() || self.failed.get() {
                return Err(());
            }
            self.clock.sleep(MILLISECOND).await;
        }
        Ok(held)
    }

    /// Waits until nobody reads a disk that has left, and labels it as a free one.
    async fn set_free(&self, old: &Rc<Member<E::Disk>>) {
        let Some(disk) = old.disk.borrow().clone() else {
            return;
        };
        while disk.oldest() > 0 && disk.oldest() < crate::watching::DISK_LIMIT {
            self.clock.sleep(MILLISECOND).await;
        }
        let (Some(place), Some(meta)) = (&old.place, &old.meta) else {
            return;
        };
        let label = Superblock {
            system: self.system,
            disk: old.uuid,
            device_size: place.device_size,
            end_copy: place.reserve.end_copy,
            generation: self.durable.get() + 1,
            member: None,
        };
        let mut failed = false;
        for copy in Copy::BOTH {
            let mut bytes = [0; BYTES];
            if failed || label.encode(copy, &mut bytes).is_err() {
                failed = true;
                continue;
            }
            crate::parity::copy_in(meta.cells(0..BYTES), &bytes);
            let piece = Piece {
                offset: 0,
                len: 4096,
            };
            let (verb, at) = (DiskVerb::Write { fua: true }, label.copy_at(copy));
            let io = old.submit_meta(verb, at, 4096, Buf::Pool(meta), &[piece]);
            failed = io.await.is_err();
        }
        let text = match failed {
            false => format!("disk {} left slot {} and is free", old.path, old.slot),
            true => format!(
                "disk {} left slot {}, but takes no label: wipe it before it is used elsewhere",
                old.path, old.slot
            ),
        };
        self.event_of("Removed", Some(old.uuid), &text);
        if failed {
            self.give_up(old);
        }
        old.disk.take();
    }
}
