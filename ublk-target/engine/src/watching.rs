//! What a group sees of its members while it runs: those that do not answer, and those that are slow.

use std::rc::Rc;

use arrayvec::ArrayVec;
use lunar_api::target::{FailCause, MemberState};

use crate::background::LOOK;
use crate::health::{Window, judge};
use crate::limits::{MEMBERS_MAX, SPEED_SAMPLE, SPEED_WINDOW};
use crate::member::{Member, add};
use crate::raid_group::RaidGroup;
use crate::serve::bits;
use crate::sync::{either, join};
use crate::traits::{Clock, Disk, Env, MILLISECOND, SECOND};

/// A member that has not answered for so long is failed (`--disk-limit`).
pub(crate) const DISK_LIMIT: u64 = 30 * SECOND;

impl<E: Env> RaidGroup<E> {
    /// Watches the members and marks an idle group clean; the rim spawns one. Ends when the group has stopped.
    pub async fn watch(self: Rc<Self>) {
        // Side by side: what writes to the members may wait for the very one that is to be given up.
        join(join(self.watch_members(), self.watch_speed()), self.tidy()).await;
    }

    /// Gives up members that do not answer; `tidy` makes that durable.
    async fn watch_members(&self) {
        let hangs = |disk: &Rc<E::Disk>| disk.oldest() > DISK_LIMIT;
        while !self.stopping.get() {
            self.look().await;
            self.recall_memory();
            self.let_go();
            let mut stalled = 0;
            for slot in bits(self.in_sync.get() | self.rebuilding().map_or(0, |slot| 1 << slot)) {
                let member = self.member(slot);
                let is_stalled = member.disk.borrow().as_ref().is_some_and(hangs);
                stalled |= u64::from(is_stalled) << slot;
                if is_stalled && !member.is_stalled.replace(is_stalled) {
                    self.note_stall(&member);
                }
                member.is_stalled.set(is_stalled);
            }
            if stalled != 0 && self.can_lose(stalled) {
                self.fail_now(stalled, FailCause::NoAnswer, "no answer for 30 s");
            }
            let new = self.copying();
            if new.is_some_and(|new| new.to.disk.borrow().as_ref().is_some_and(hangs)) {
                self.drop_copy("no answer for 30 s");
            }
        }
    }

    /// Closes members that have failed, once their I/O is over: whoever repairs such a disk may hand it in again.
    fn let_go(&self) {
        for member in self.members.borrow().iter() {
            let is_out = matches!(
                member.state.get(),
                MemberState::Faulty | MemberState::Missing
            );
            let is_over = |disk: &Rc<E::Disk>| disk.oldest() == 0;
            if is_out && member.disk.borrow().as_ref().is_some_and(is_over) {
                member.disk.take();
            }
        }
    }

    /// Takes back what was lent once no member that was given up holds memory any more.
    fn recall_memory(&self) {
        let mut hung = self.hung.borrow_mut();
        if hung.is_empty() {
            return;
        }
        hung.retain(|disk| disk.oldest() > 0);
        if hung.is_empty() && !self.failed.get() {
            self.pool.recall();
        }
    }

    fn note_stall(&self, member: &Member<E::Disk>) {
        add(&member.timeouts, 1);
        if !self.can_lose(1 << member.slot) {
            let text = format!(
                "disk {} (slot {}) does not answer for 30 s; without it data would be lost, so it is waited for",
                member.path, member.slot
            );
            self.event("DiskHangs", Some(member.slot), &text);
        }
    }

    /// Measures how fast the members answer, and names those that are slow. With nothing to do it looks once a second.
    async fn watch_speed(&self) {
        let mut seen = 0;
        let mut before = self.clock.now();
        let mut begun = before;
        while !self.stopping.get() {
            let sum = self.work_seen();
            let ns = match sum == seen {
                true => LOOK,
                false => SPEED_SAMPLE,
            };
            seen = sum;
            let stopped = || self.stopping.get().then_some(());
            either(self.clock.turn(ns), self.changed.until(stopped)).await;
            let now = self.clock.now();
            let passed = now.0.saturating_sub(before.0);
            before = now;
            for member in self.members.borrow().iter() {
                member.speed.sample(passed);
            }
            if now.0 - begun.0 >= SPEED_WINDOW {
                begun = now;
                self.judge_speed();
            }
        }
    }

    /// Changes whenever members have something to do.
    fn work_seen(&self) -> u64 {
        let members = self.members.borrow();
        let seen = members.iter().map(|member| member.speed.seen());
        seen.fold(0, |sum, (ended, in_flight)| {
            sum.wrapping_add(ended + u64::from(in_flight))
        })
    }

    /// Compares the members over the window that ends. Who is not in sync does other work than the rest.
    fn judge_speed(&self) {
        let members = self.members.borrow();
        let in_sync = self.in_sync.get();
        let windows: ArrayVec<Window, MEMBERS_MAX> = members
            .iter()
            .map(|member| {
                let window = member.speed.close();
                match in_sync & 1 << member.slot {
                    0 => Window::default(),
                    _ => window,
                }
            })
            .collect();
        for (i, member) in members.iter().enumerate() {
            if !member.speed.judge(judge(&windows, i)) {
                continue;
            }
            let (path, slot) = (&member.path, member.slot);
            let ms = |ns: u64| ns / MILLISECOND;
            match member.speed.slow.get() {
                Some((latency, peers)) => self.event(
                    "SlowDisk",
                    Some(slot),
                    &format!(
                        "disk {path} (slot {slot}) takes {} ms for an I/O, its peers {} ms",
                        ms(latency),
                        ms(peers)
                    ),
                ),
                None => {
                    let text = format!("disk {path} (slot {slot}) is as fast as its peers again");
                    self.event("SlowDiskEnded", Some(slot), &text);
                }
            }
        }
    }
}
