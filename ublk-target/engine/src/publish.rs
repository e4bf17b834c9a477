//! The superblocks of a running group: state changes in memory at once, is made durable here, and whoever
//! relies on it waits for that.
//!
//! Two generations: that of memory (`generation`) is ahead of that on the disks (`durable`) while a change is under
//! way. A write is acknowledged when `durable` has caught up with what it relied on.

use std::rc::Rc;

use lunar_api::History;
use lunar_api::target::{FailCause, GroupState, MemberState};

use crate::limits::PARENTS_MAX;
use crate::member::Member;
use crate::parity;
use crate::planted::{self, Bug};
use crate::raid_group::{EIO, Errno, MemberPlace, RaidGroup};
use crate::serve::bits;
use crate::superblock::{
    BYTES, Copy, Flags, GroupRecord, Member as MemberBlock, MemberEntry, Replacement, Superblock,
};
use crate::traits::{Buf, Disk, DiskVerb, Env, Piece};

impl<E: Env> RaidGroup<E> {
    /// Counts a change of state that has to become durable.
    pub(crate) fn advance(&self) {
        self.generation.set(self.generation.get() + 1);
        self.log.expect_generation(self.generation.get());
    }

    /// Says whether data survives without these slots too.
    pub(crate) fn can_lose(&self, slots: u64) -> bool {
        self.geometry.survives(!self.in_sync.get() | slots)
    }

    /// Fails members in memory: from now on nobody reads them or waits for them. Not durable yet.
    pub(crate) fn fail_now(&self, slots: u64, cause: FailCause, why: &str) {
        let rebuilding = self.rebuilding().map_or(0, |slot| 1u64 << slot);
        let slots = slots & (self.in_sync.get() | rebuilding);
        if slots == 0 {
            return;
        }
        self.log.note_failed(slots);
        self.in_sync.set(self.in_sync.get() & !slots);
        self.views.advance();
        let catches_up = self.rebuild.get().is_some_and(|rebuild| rebuild.catches_up);
        if let Some(maps) = self.maps.as_ref().filter(|_| slots & !rebuilding != 0) {
            maps.begin_missed();
        }
        if rebuilding & slots != 0 {
            self.rebuild.set(None);
            self.durable_rebuild.set(0);
            self.holes.borrow_mut().clear();
        }
        // Where nothing was proven yet it has more to be given than what is noted from here on.
        let is_whole =
            self.synced.get() == self.geometry.stripes() && self.holes.borrow().is_empty();
        for slot in bits(slots) {
            let member = self.member(slot);
            member.state.set(MemberState::Faulty);
            member.left_at.set(match rebuilding & 1 << slot {
                // What every member has on its disk: it does not come back as an older copy of itself.
                0 if self.maps.is_some() && is_whole => self.floor.get(),
                0 => 0,
                _ if catches_up => member.left_at.get(),
                _ => 0,
            });
            *member.reason.borrow_mut() = why.to_owned();
            let is_gone = member.is_gone.get() && cause != FailCause::Hand;
            let cause = if is_gone { FailCause::Gone } else { cause };
            member.cause.set(Some(cause));
            self.give_up(&member);
            // md's words: a disk that was being filled was a spare until then.
            let name = match rebuilding & 1 << slot {
                0 => "Fail",
                _ => "FailSpare",
            };
            self.event(
                name,
                Some(slot),
                &format!("disk {} (slot {slot}): {why}", member.path),
            );
        }
        if self
            .copying()
            .is_some_and(|copying| slots & 1 << copying.slot != 0)
        {
            self.turn_into_rebuild(why);
        }
        if slots & !rebuilding != 0 {
            self.renew_history();
            self.event("DegradedArray", None, &self.reason());
        }
        self.advance();
    }

    /// Has nobody wait for a disk any more.
    pub(crate) fn give_up(&self, member: &Member<E::Disk>) {
        if let Some(disk) = &*member.disk.borrow() {
            disk.abandon();
            if disk.oldest() > 0 {
                self.hung.borrow_mut().push(Rc::clone(disk));
                self.pool.lend();
            }
        }
    }

    pub(crate) fn renew_history(&self) {
        let next = History::from_bytes((self.random.borrow_mut())());
        let mut record = self.record.borrow_mut();
        let old = std::mem::replace(&mut record.history, next);
        record.parents.insert(0, old);
        record.parents.truncate(PARENTS_MAX);
    }

    /// Fails members for what they answered, durably.
    ///
    /// # Errors  EIO if redundancy does not allow it: then the group stops serving what it cannot prove, and
    /// nothing is written to the superblocks, so that they still say what was true last
    pub(crate) async fn fail(&self, slots: u64, cause: FailCause, why: &str) -> Result<(), Errno> {
        self.fail_or_stop(slots, cause, why)?;
        self.wait_durable().await
    }

    /// As `fail`, in memory.
    pub(crate) fn fail_or_stop(
        &self,
        slots: u64,
        cause: FailCause,
        why: &str,
    ) -> Result<(), Errno> {
        let rebuilding = self.rebuilding().map_or(0, |slot| 1u64 << slot);
        let live = self.blamed(slots) & (self.in_sync.get() | rebuilding);
        if live & self.in_sync.get() != 0 && !self.can_lose(live) {
            if self.geometry.redundancy() > 0 && !self.failed.get() {
                self.set_failed();
                let text = format!(
                    "slots {:?} failed too ({why}): redundancy is exhausted",
                    bits(live).collect::<Vec<_>>()
                );
                self.event("ArrayFailed", None, &text);
            }
            return Err(EIO);
        }
        if live != 0 {
            self.fail_now(live, cause, why);
        }
        Ok(())
    }

    /// Those of the slots whose failure was that of the disk which is there now.
    pub(crate) fn blamed(&self, slots: u64) -> u64 {
        bits(slots)
            .filter(|slot| self.member(*slot).to_blame.get())
            .fold(0, |set, slot| set | 1 << slot)
    }

    /// Waits until the superblocks, and the bad-block lists, say what memory says now; writes them if nobody else does.
    pub(crate) async fn wait_durable(&self) -> Result<(), Errno> {
        if planted::is(Bug::DegradeNotDurable) && self.in_sync.get() != self.geometry.slots() {
            return Ok(());
        }
        self.publish().await?;
        match self.has_bad.get() {
            // Not a part of every future that waits: it is seldom, and large.
            true => Box::pin(self.save_bad_blocks()).await,
            false => Ok(()),
        }
    }

    /// Makes the first write after start (or after a clean mark) wait until the disks say `dirty`.
    pub(crate) async fn ensure_dirty(&self) -> Result<(), Errno> {
        if self.dirty.get() && self.dirty_durable.get() {
            return Ok(());
        }
        if self.stopping.get() || self.failed.get() {
            return Err(EIO);
        }
        if planted::is(Bug::DirtyNotDurable) {
            self.dirty.set(true);
            return Ok(());
        }
        if !self.dirty.replace(true) {
            self.advance();
        }
        self.wait_durable().await
    }

    /// Marks an idle group clean.
    ///
    /// # Crash  everything is flushed before; a write that comes meanwhile marks it dirty again first
    pub(crate) async fn mark_clean(&self) {
        if self.in_sync.get().count_ones() < u32::from(self.geometry.members()) {
            // Degraded, the mark buys nothing, and a start would have to trust it.
            return;
        }
        let requests = self.requests_seen();
        let flushes = !planted::is(Bug::CleanUnflushed);
        if flushes && self.flush_members().await.is_err() {
            return;
        }
        // A write that came and went meanwhile is not flushed.
        let is_idle = self.active_writes.get() == 0 && self.requests_seen() == requests;
        let whole = self.in_sync.get().count_ones() == u32::from(self.geometry.members());
        if is_idle && whole && self.dirty.get() && !self.failed.get() {
            self.dirty.set(false);
            self.dirty_durable.set(false);
            self.advance();
            let _ = self.publish().await;
        }
    }

    /// Flushes every member that counts; one that fails it is failed, durably.
    ///
    /// # Errors  EIO if redundancy does not allow that: what was written is not known to be durable
    pub(crate) async fn flush_members(&self) -> Result<(), Errno> {
        let mut failed = 0;
        for slot in bits(self.writable(0) | self.in_sync.get()) {
            if self
                .member(slot)
                .submit(DiskVerb::Flush, 0, 0, Buf::None, &[])
                .await
                .is_err()
            {
                failed |= 1 << slot;
            }
        }
        match failed {
            0 => Ok(()),
            failed => self.fail(failed, FailCause::Writes, "flush failed").await,
        }
    }

    /// Writes the superblocks until the disks say what memory says.
    ///
    /// No queue thread looks at an older state when this ends.
    ///
    /// # Crash  per member copy 0 is durable before copy 1 is begun; across members in parallel. After a stop in
    /// between, the newest generation decides, and members that are behind are not stale by that
    /// # Errors  EIO when too few members are left to say anything
    pub(crate) async fn publish(&self) -> Result<(), Errno> {
        let wanted = self.generation.get();
        loop {
            let turn = self
                .changed
                .until(|| {
                    if self.durable.get() >= wanted {
                        Some(Ok(false))
                    } else if self.failed.get() {
                        Some(Err(EIO))
                    } else {
                        (!self.publishing.replace(true)).then_some(Ok(true))
                    }
                })
                .await?;
            if !turn {
                return Ok(());
            }
            let result = self.publish_once().await;
            self.publishing.set(false);
            self.changed.wake_all();
            result?;
        }
    }

    async fn publish_once(&self) -> Result<(), Errno> {
        // A superblock that says that a member has left relies on what is noted of it.
        self.write_maps().await?;
        let generation = self.generation.get();
        let dirty = self.dirty.get();
        // From here on the disks may say that it is clean.
        self.dirty_durable.set(self.dirty_durable.get() && dirty);
        let record = self.record_now();
        let slots = self.in_sync.get() | self.rebuilding().map_or(0, |slot| 1 << slot);
        // Whoever comes into a slot meanwhile is of the next generation.
        let mut members: Vec<_> = bits(slots).map(|slot| self.member(slot)).collect();
        let copying = self.copying();
        members.extend(copying.iter().map(|copying| Rc::clone(&copying.to)));
        let mut failed = 0u64;
        for copy in Copy::BOTH {
            let mut ios = Vec::new();
            for member in &members {
                let (Some(place), Some(meta)) = (&member.place, &member.meta) else {
                    continue;
                };
                // Who is to replace another is in no slot: its own failure costs the slot nothing.
                let is_bad = match member.counts.get() {
                    true => failed & 1 << member.slot != 0,
                    false => member.to_blame.get(),
                };
                if is_bad {
                    continue;
                }
                let block = self.superblock(member, place, generation, &record);
                let mut bytes = [0; BYTES];
                if block.encode(copy, &mut bytes).is_err() {
                    self.event(
                        "BadSuperblock",
                        Some(member.slot),
                        "refused to write a superblock that no reader would take",
                    );
                    member.to_blame.set(true);
                    failed |= u64::from(member.counts.get()) << member.slot;
                    continue;
                }
                parity::copy_in(meta.cells(0..BYTES), &bytes);
                let piece = Piece {
                    offset: 0,
                    len: 4096,
                };
                let fua = !planted::is(Bug::SuperblockWithoutFua);
                let verb = DiskVerb::Write { fua };
                let at = block.copy_at(copy);
                let io = member.submit_meta(verb, at, 4096, Buf::Pool(meta), &[piece]);
                ios.push((member, io));
            }
            for (member, io) in ios {
                if io.await.is_err() {
                    failed |= u64::from(member.counts.get()) << member.slot;
                }
            }
        }
        // Whoever waits for this generation relies on members not being read any more that it has failed.
        self.views.confirmed().await;
        let failed = self.blamed(failed);
        if failed & self.in_sync.get() != 0 && !self.can_lose(failed) {
            // While a disk takes a slot the one before it has all that it has: the copy decides.
            if self.geometry.redundancy() > 0 && !self.is_handed_over.get() {
                self.set_failed();
            }
            return Err(EIO);
        }
        if failed != 0 {
            // The next generation, without them, is written by the loop of `publish`.
            self.fail_now(failed, FailCause::Writes, "superblock could not be written");
            return Ok(());
        }
        if let Some(copying) = &copying
            && copying.to.to_blame.get()
            && self.copying().is_some_and(|now| Rc::ptr_eq(&now, copying))
        {
            // It does not take superblocks: the next generation is without it.
            self.drop_copy("superblock could not be written");
        }
        self.durable.set(generation);
        if generation == self.generation.get() {
            self.log.failures_are_durable();
        }
        self.durable_history.set(record.history);
        self.floor.set(generation);
        self.dirty_durable.set(dirty);
        Ok(())
    }

    /// The group as it is now.
    pub(crate) fn record_now(&self) -> GroupRecord {
        let record = self.record.borrow();
        let members = self.members.borrow();
        let unit = self.geometry.stripe_on_member();
        GroupRecord {
            flags: Flags {
                dirty: self.dirty.get(),
                ..record.flags
            },
            synced_to: self.durable_synced.get() * unit,
            floor: self.floor.get(),
            members: members
                .iter()
                .zip(&record.members)
                .map(|(member, entry)| MemberEntry {
                    disk: member.uuid,
                    data_bytes: entry.data_bytes,
                    state: member.state.get(),
                    rebuilt_to: match member.state.get() {
                        MemberState::Rebuilding => self.durable_rebuild.get() * unit,
                        MemberState::InSync | MemberState::Faulty | MemberState::Missing => 0,
                    },
                    left_at: member.left_at.get(),
                    has_bad_blocks: member.bad.is_listed.get(),
                })
                .collect(),
            replacement: self.copying().map(|copying| Replacement {
                disk: copying.to.uuid,
                slot: copying.slot,
                copied_to: self.copied_to.get(),
            }),
            ..record.clone()
        }
    }

    fn superblock(
        &self,
        member: &Member<E::Disk>,
        place: &MemberPlace,
        generation: u64,
        record: &GroupRecord,
    ) -> Superblock {
        Superblock {
            system: self.system,
            disk: member.uuid,
            device_size: place.device_size,
            end_copy: place.reserve.end_copy,
            generation,
            member: Some(MemberBlock {
                slot: member.slot,
                layout: place.reserve.layout,
                group: record.clone(),
            }),
        }
    }

    /// Why it is not optimal, for people.
    pub(crate) fn reason(&self) -> String {
        let members = self.members.borrow();
        let lost = members
            .iter()
            .filter(|m| self.told_state(m) != MemberState::InSync);
        let parts: Vec<String> = lost
            .map(|m| {
                let state = match self.told_state(m) {
                    MemberState::Faulty => "failed",
                    MemberState::Rebuilding => "rebuilding",
                    MemberState::Missing => "missing",
                    MemberState::InSync => "in sync",
                };
                let reason = m.reason.borrow();
                let why = if reason.is_empty() {
                    String::new()
                } else {
                    format!(": {reason}")
                };
                format!("disk {} (slot {}) {state}{why}", m.path, m.slot)
            })
            .collect();
        let mut text = parts.join("; ");
        if self.rebuilding().is_none() && !self.holes.borrow().is_empty() {
            if !text.is_empty() {
                text.push_str("; ");
            }
            text.push_str(&self.holes_text("synced"));
        }
        if self.failed.get() {
            if !text.is_empty() {
                text.push_str("; ");
            }
            text.push_str("redundancy is exhausted, writes are answered EIO");
        }
        text
    }

    /// The state of a member for people: one that was filled is in sync when the superblocks say so. Before that, power that
    /// is lost leaves it to be filled, and whoever believed otherwise may have taken another away.
    pub(crate) fn told_state(&self, member: &Member<E::Disk>) -> MemberState {
        match member.state.get() {
            MemberState::InSync if member.filled_in.get() > self.durable.get() => {
                MemberState::Rebuilding
            }
            state => state,
        }
    }

    /// Slots in sync for people, as bits.
    pub(crate) fn told_in_sync(&self) -> u64 {
        let members = self.members.borrow();
        let told = members
            .iter()
            .filter(|member| self.told_state(member) == MemberState::InSync);
        told.fold(0, |set, member| set | 1 << member.slot) & self.in_sync.get()
    }

    pub(crate) fn group_state(&self) -> GroupState {
        if self.failed.get() || !self.can_lose(0) {
            GroupState::Failed
        } else if self.told_in_sync() != self.geometry.slots() {
            GroupState::Degraded
        } else {
            GroupState::Optimal
        }
    }

    /// The member in a slot.
    pub(crate) fn member(&self, slot: u16) -> Rc<Member<E::Disk>> {
        Rc::clone(&self.members.borrow()[usize::from(slot)])
    }
}
