//! Discards and zeroing. What is erased reads as zero on every member, so that redundancy stays right.
//!
//! Whole stripes are held, as many as lie together, and every member is told to zero its part; what is not a whole
//! stripe is written as zeroes (zeroing) or left as it is (discard). A member gives space back if it can do that
//! and read as zero; else it zeroes without; else, and after any error, zeroes are written to it. It is never told to
//! discard: what is read there afterwards could differ from member to member.
//!
//! Where there is no redundancy stripes are held too: they may be under copy to another disk.

use std::cell::Cell;

use arrayvec::ArrayVec;

use super::{bits, span_of};
use lunar_api::target::FailCause;

use crate::inflight::{SEGMENTS_MAX, Segment, ZEROES};
use crate::limits::MEMBERS_MAX;
use crate::parity;
use crate::plan::GRAIN;
use crate::planted::{self, Bug};
use crate::pool::{Lease, Quota};
use crate::ppl::{What, sectors_of};
use crate::raid_group::{EIO, Errno, Lu, RaidGroup};
use crate::stripe_table::{Copied, Item, Task};
use crate::traits::{Buf, DiskError, DiskVerb, Env, Piece};

/// Bytes of one member that are erased at once: what a disk of 100 MB/s that only takes zeroes has written in 0.2 s.
const PART_BYTES: u64 = 16 << 20;
/// Stripes held at once by one request.
const HELD_MAX: u64 = 256;
/// Requests that erase at once in a group.
const AT_ONCE: u32 = 4;
/// Zeroes that are written from memory.
const ZEROES_BYTES: usize = 128 << 10;
const _: () = assert!(MEMBERS_MAX <= SEGMENTS_MAX);

/// What the host asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Erase {
    /// The content does not matter any more.
    Discard,
    /// It reads as zero; with `unmap` the space may be given back.
    Zero { unmap: bool },
}

impl Erase {
    fn unmaps(self) -> bool {
        match self {
            Self::Discard => true,
            Self::Zero { unmap } => unmap,
        }
    }
}

/// A turn to erase; given back when it is dropped.
struct Erasing<'a, E: Env>(&'a RaidGroup<E>);

impl<E: Env> Drop for Erasing<'_, E> {
    fn drop(&mut self) {
        self.0.erasing.set(self.0.erasing.get() - 1);
        self.0.changed.wake_all();
    }
}

impl<E: Env> RaidGroup<E> {
    /// Erases a part of a LU of a group with redundancy.
    ///
    /// # Crash  process: the in-flight log has every part before its first member is told, and a successor zeroes it
    /// again. Power: as a write, some members may have it and others not
    pub(super) async fn erase_redundant(
        &self,
        lu: &Lu,
        (at, len): (u64, u64),
        erase: Erase,
    ) -> Result<(), Errno> {
        self.ensure_dirty().await?;
        let stripe = self.geometry.stripe_bytes();
        let end = at + len;
        // LUs are whole stripes: their stripes begin where those of the group do.
        let first = at.next_multiple_of(stripe).min(end);
        let last = (end / stripe * stripe).max(first);
        if erase != Erase::Discard {
            self.write_zeroes(lu, at, first - at).await?;
            self.write_zeroes(lu, last, end - last).await?;
        }
        let unit = self.geometry.stripe_on_member();
        let most = (PART_BYTES / unit).clamp(1, HELD_MAX);
        let mut pos = first;
        while pos < last {
            let (from, room) = lu.resolve(pos);
            let stripes = (room.min(last - pos) / stripe).min(most);
            self.erase_stripes(from / stripe, stripes, erase.unmaps())
                .await?;
            pos += stripes * stripe;
        }
        Ok(())
    }

    /// Writes zeroes as any other data.
    async fn write_zeroes(&self, lu: &Lu, at: u64, len: u64) -> Result<(), Errno> {
        if len == 0 {
            return Ok(());
        }
        let most = ZEROES_BYTES as u64;
        // Each piece keeps its place within a grain.
        let lease = self
            .lease(Quota::Data, ZEROES_BYTES + GRAIN as usize)
            .await?;
        parity::zero(lease.cells(0..lease.len()));
        let mut done = 0;
        while done < len {
            let part = most.min(len - done);
            let join = self.stripes.open();
            for piece in lu.pieces(&self.geometry, at + done, part) {
                let span = span_of(&piece);
                let task = Task::Write {
                    span,
                    lease: lease.clone(),
                    from: span.start % GRAIN,
                    fua: false,
                    copied: Cell::new(Copied::Yes),
                };
                self.push(lu, piece.stripe, task, join);
            }
            self.stripes.wait(join).await.map_err(Errno)?;
            done += part;
        }
        Ok(())
    }

    async fn erase_turn(&self) -> Erasing<'_, E> {
        self.changed
            .until(|| {
                let now = self.erasing.get();
                (now < AT_ONCE).then(|| {
                    self.erasing.set(now + 1);
                    Erasing(self)
                })
            })
            .await
    }

    /// Waits until all of these stripes are held, to be given back by [`Self::release_all`].
    async fn hold(&self, stripes: impl Iterator<Item = u64>) -> Result<(), Errno> {
        let join = self.stripes.open();
        // All at once: whoever wants some of them too comes before or behind at every one.
        for stripe in stripes {
            let item = Item {
                task: Task::Hold,
                join,
                lu: None,
            };
            self.stripes.push(stripe, item);
        }
        self.stripes.wait(join).await.map_err(Errno)
    }

    fn release_all(&self, stripes: impl Iterator<Item = u64>) {
        for stripe in stripes {
            self.stripes.release_held(stripe);
        }
    }

    /// Holds stripes that follow one another, erases them on every member, and lets go of them.
    async fn erase_stripes(&self, first: u64, count: u64, unmap: bool) -> Result<(), Errno> {
        let _turn = self.erase_turn().await;
        let stripes = first..first + count;
        let mut result = self.hold(stripes.clone()).await;
        if result.is_ok() {
            result = self.erase_held(first, count, unmap).await;
        }
        self.release_all(stripes);
        result
    }

    async fn erase_held(&self, first: u64, count: u64, unmap: bool) -> Result<(), Errno> {
        // Leased before an entry of the log is taken: who has one waits for disks only.
        let zeroes = self.lease(Quota::Work, ZEROES_BYTES).await?;
        parity::zero(zeroes.cells(0..ZEROES_BYTES));
        let _entered = self.enter(first..first + count).await?;
        let unit = self.geometry.stripe_on_member();
        let mut from = first;
        while from < first + count {
            if self.failed.get() {
                return Err(EIO);
            }
            // The slot that is rebuilt has some of them, and gets the others by the rebuild.
            let slots = self.writable(from);
            let mut to = from + 1;
            while to < first + count && self.writable(to) == slots {
                to += 1;
            }
            let (at, len) = (from * unit, (to - from) * unit);
            let mut slots = slots;
            if planted::is(Bug::DiscardWithoutParity) {
                let parity = self.geometry.parity_slots(from);
                slots &= !parity.fold(0, |set, slot| set | 1 << slot);
            }
            if self.erase_members(slots, (at, len), unmap, &zeroes).await? {
                from = to;
            }
        }
        self.wait_durable().await
    }

    /// Erases a range of these members; false if one of them did not take the log, and is out now.
    async fn erase_members(
        &self,
        slots: u64,
        (at, len): (u64, u64),
        unmap: bool,
        zeroes: &Lease,
    ) -> Result<bool, Errno> {
        let unit = self.geometry.stripe_on_member();
        let what = What::Whole {
            stripe: at / unit,
            stripes: u32::try_from(len / unit).expect("at most HELD_MAX"),
            rows: sectors_of(0..u32::try_from(self.geometry.chunk()).expect("at most 1 MiB")),
        };
        let Some(noted) = self.log_write(slots, &[(what, 0)]).await? else {
            return Ok(false);
        };
        let entry = self.log.open().await;
        let mut logged: ArrayVec<Segment, MEMBERS_MAX> = ArrayVec::new();
        logged.extend(bits(slots).map(|slot| {
            let member = self.member(slot);
            Segment {
                disk: member.uuid,
                at: member.data_offset + at,
                len: u32::try_from(len).expect("at most PART_BYTES"),
                from: ZEROES,
            }
        }));
        self.log.commit(&entry, &logged);
        let failed = self.zero_members(slots, (at, len), unmap, zeroes).await;
        if failed != 0 {
            // Without redundancy for it the entry stays: a successor zeroes these once more.
            self.fail(failed, FailCause::Writes, "zeroing failed")
                .await?;
        }
        self.log.clear(entry);
        drop(noted);
        Ok(true)
    }

    /// Zeroes a range of these members, each in the best way that it takes; returns those that failed.
    async fn zero_members(
        &self,
        slots: u64,
        (at, len): (u64, u64),
        unmaps: bool,
        zeroes: &Lease,
    ) -> u64 {
        let (mut failed, mut left) = (0, slots);
        for unmap in [true, false] {
            let takes = |slot: &u16| self.member(*slot).takes_zeroing(unmap);
            let now = match unmap && !unmaps {
                true => 0,
                false => bits(left)
                    .filter(takes)
                    .fold(0, |set, slot| set | 1 << slot),
            };
            let mut ios: super::Ios<E> = ArrayVec::new();
            for slot in bits(now) {
                let verb = DiskVerb::WriteZeroes { unmap };
                let io = self.member(slot).submit(verb, at, len, Buf::None, &[]);
                ios.push((slot, Some(io)));
            }
            let mut refused = 0;
            crate::sync::join_all(&mut ios, |slot, result| match result {
                Ok(()) => {}
                Err(DiskError::Errno(_)) => refused |= 1u64 << slot,
                Err(_) => failed |= 1u64 << slot,
            })
            .await;
            left &= !now | refused;
        }
        for start in (0..len).step_by(ZEROES_BYTES) {
            let part = (len - start).min(ZEROES_BYTES as u64);
            let piece = Piece {
                offset: 0,
                len: u32::try_from(part).expect("at most ZEROES_BYTES"),
            };
            let mut ios: super::Ios<E> = ArrayVec::new();
            for slot in bits(left & !failed) {
                let (verb, buf) = (DiskVerb::Write { fua: false }, Buf::Pool(zeroes));
                let io = self
                    .member(slot)
                    .submit(verb, at + start, part, buf, &[piece]);
                ios.push((slot, Some(io)));
            }
            self.join(&mut ios, &mut failed).await;
        }
        failed
    }

    /// Erases a part of a LU of a group without redundancy: the members are told, each its part.
    pub(super) async fn erase_plain(
        &self,
        lu: &Lu,
        (start, len): (u64, u64),
        erase: Erase,
    ) -> Result<(), Errno> {
        let most = PART_BYTES.min(HELD_MAX * self.geometry.stripe_bytes());
        let mut done = 0;
        while done < len {
            let (at, part) = (start + done, (len - done).min(most));
            // Of the pieces of a stripe, which follow one another, the first.
            let stripes = || {
                let mut last = None;
                lu.pieces(&self.geometry, at, part)
                    .map(|piece| piece.stripe)
                    .filter(move |stripe| last.replace(*stripe) != Some(*stripe))
            };
            let _turn = self.erase_turn().await;
            let mut result = self.hold(stripes()).await;
            if result.is_ok() {
                result = self.erase_pieces(lu, (at, part), erase).await;
            }
            self.release_all(stripes());
            result?;
            done += part;
        }
        Ok(())
    }

    async fn erase_pieces(
        &self,
        lu: &Lu,
        (at, len): (u64, u64),
        erase: Erase,
    ) -> Result<(), Errno> {
        let mut runs: ArrayVec<(u16, u64, u64), MEMBERS_MAX> = ArrayVec::new();
        for piece in lu.pieces(&self.geometry, at, len) {
            let len = u64::from(piece.len);
            let follows = |run: &&mut (u16, u64, u64)| {
                run.0 == piece.slot && run.1 + run.2 == piece.member_at
            };
            match runs.iter_mut().find(follows) {
                Some(run) => run.2 += len,
                None => {
                    if runs.is_full() {
                        self.erase_runs(&runs, erase).await?;
                        runs.clear();
                    }
                    runs.push((piece.slot, piece.member_at, len));
                }
            }
        }
        self.erase_runs(&runs, erase).await
    }

    async fn erase_runs(&self, runs: &[(u16, u64, u64)], erase: Erase) -> Result<(), Errno> {
        let mut zeroes = None;
        // The disk that is filled to replace another must not have what the other has forgotten.
        if erase != Erase::Discard || self.copying().is_some() {
            let lease = self.lease(Quota::Work, ZEROES_BYTES).await?;
            parity::zero(lease.cells(0..ZEROES_BYTES));
            zeroes = Some(lease);
        }
        for (slot, at, len) in runs {
            let failed = match &zeroes {
                Some(zeroes) => {
                    self.zero_members(1 << slot, (*at, *len), erase.unmaps(), zeroes)
                        .await
                }
                None => self.discard_member(*slot, *at, *len).await,
            };
            if failed != 0 {
                return Err(EIO);
            }
        }
        Ok(())
    }

    /// Gives space of a member back; one that cannot keeps it, and what is there.
    async fn discard_member(&self, slot: u16, at: u64, len: u64) -> u64 {
        let member = self.member(slot);
        if !member.takes_zeroing(true) {
            return 0;
        }
        let verb = DiskVerb::WriteZeroes { unmap: true };
        match member.submit(verb, at, len, Buf::None, &[]).await {
            Ok(()) | Err(DiskError::Errno(_)) => 0,
            Err(_) => 1 << slot,
        }
    }
}
