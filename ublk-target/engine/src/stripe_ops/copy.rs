//! A stripe of a disk that is replaced, copied to the one that will take its slot; and writes where nothing protects them.

use arrayvec::ArrayVec;

use super::{Ios, piece};
use crate::copying::Copying;
use crate::limits::MEMBERS_MAX;
use crate::plan::GRAIN;
use crate::pool::{Lease, Quota};
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::stripe_table::{Item, Task};
use crate::traits::{Buf, DiskVerb, Env};

/// Bytes copied at once. With a grain of every member, to compute one that cannot be read, it fits a lease.
const STEP: usize = 512 << 10;
const _: () = assert!(STEP + (MEMBERS_MAX + 1) * GRAIN as usize <= crate::pool::LEASE_MAX);

impl<E: Env> RaidGroup<E> {
    /// Copies the stripe's part of a slot. Its holder is alone on it: what is written before comes along, what is
    /// written later goes to both.
    pub(super) async fn copy_stripe(&self, stripe: u64) -> Result<(), Errno> {
        let Some(copying) = self.copying() else {
            return Err(EIO);
        };
        let bytes = usize::try_from(self.geometry.stripe_on_member()).expect("at most 2 MiB");
        let start = self.copied_bytes(copying.slot, stripe);
        for done in (0..bytes).step_by(STEP) {
            let len = STEP.min(bytes - done);
            self.copy_range(stripe, &copying, start + done as u64, len)
                .await?;
        }
        Ok(())
    }

    async fn copy_range(
        &self,
        stripe: u64,
        copying: &Copying<E::Disk>,
        at: u64,
        len: usize,
    ) -> Result<(), Errno> {
        let grain = GRAIN as usize;
        let spare = (usize::from(self.geometry.members()) + 1) * grain;
        let lease = self.lease(Quota::Work, len + spare).await?;
        let is_whole = self
            .read_one(copying.slot, at, &lease, piece(0, len))
            .await
            .is_ok();
        if is_whole {
            self.forget_lost(copying, at, len);
            return self.put_copy(copying, at, &lease, 0, len).await;
        }
        // Grain by grain: what the disk does not give comes from redundancy, and what that does not is said.
        for from in (0..len).step_by(grain) {
            let here = at + from as u64;
            let part = piece(from, grain);
            let mut got = self
                .read_one(copying.slot, here, &lease, part)
                .await
                .is_ok();
            if !got {
                got = self
                    .get_otherwise(stripe, copying.slot, here, &lease, (from, len))
                    .await;
            }
            match got {
                true => {
                    self.forget_lost(copying, here, grain);
                    self.put_copy(copying, here, &lease, from, grain).await?;
                }
                // Nobody has it, and that is known: the new disk has the same list.
                false
                    if self
                        .member(copying.slot)
                        .bad
                        .touches(here, u64::from(GRAIN))
                        && copying.to.bad.insert(here) =>
                {
                    self.has_bad.set(true);
                    self.forget_lost(copying, here, grain);
                }
                false => {
                    copying.lost.borrow_mut().insert(here);
                }
            }
        }
        Ok(())
    }

    fn forget_lost(&self, copying: &Copying<E::Disk>, at: u64, len: usize) {
        let mut lost = copying.lost.borrow_mut();
        if !lost.is_empty() {
            lost.retain(|one| !(at..at + len as u64).contains(one));
        }
    }

    /// Gets one grain of a slot without reading it, to `to` of the lease; from `scratch` on there is room for a grain of
    /// every member.
    async fn get_otherwise(
        &self,
        stripe: u64,
        slot: u16,
        at: u64,
        lease: &Lease,
        (to, scratch): (usize, usize),
    ) -> bool {
        let grain = GRAIN as usize;
        if self.geometry.is_mirrored() {
            let chunk = self.geometry.chunk();
            for d in 0..self.geometry.data_slots() {
                let own = (self.geometry.copies(stripe, d)).find(|spot| spot.slot == slot);
                let Some(own) =
                    own.filter(|own| (own.member_at..own.member_at + chunk).contains(&at))
                else {
                    continue;
                };
                for spot in self.geometry.copies(stripe, d) {
                    let is_other = spot.slot != slot && self.readable(stripe) & 1 << spot.slot != 0;
                    let from = spot.member_at + (at - own.member_at);
                    if is_other
                        && self
                            .read_one(spot.slot, from, lease, piece(to, grain))
                            .await
                            .is_ok()
                    {
                        return true;
                    }
                }
            }
            return false;
        }
        if self.geometry.parities() == 0 {
            return false;
        }
        let row = u32::try_from(at - self.chunk_at(stripe)).expect("at most 1 MiB");
        self.reconstruct(
            stripe,
            (slot, 0),
            row..row + GRAIN,
            (lease, to),
            Some((lease, scratch)),
        )
        .await
        .is_ok()
    }

    async fn put_copy(
        &self,
        copying: &Copying<E::Disk>,
        at: u64,
        lease: &Lease,
        from: usize,
        len: usize,
    ) -> Result<(), Errno> {
        let verb = DiskVerb::Write { fua: false };
        let bytes = len as u64;
        let io = copying
            .to
            .submit(verb, at, bytes, Buf::Pool(lease), &[piece(from, len)]);
        // Whoever looks after the copy sees that it is to blame, and gives it up.
        io.await.map_err(|_| EIO)
    }

    /// Writes parts of a stripe of a group without redundancy, in order with the copy of it.
    pub(super) async fn write_alone(&self, stripe: u64, batch: &[Item]) -> Result<(), Errno> {
        let mut ios: Ios<E> = ArrayVec::new();
        for item in batch {
            let Task::Write {
                span,
                lease,
                from,
                fua,
                ..
            } = &item.task
            else {
                continue;
            };
            let spot = self.geometry.copy(stripe, span.data, 0);
            let len = span.end - span.start;
            let io = self.member(spot.slot).submit(
                DiskVerb::Write { fua: *fua },
                spot.member_at + u64::from(span.start),
                u64::from(len),
                Buf::Pool(lease),
                &[piece(*from as usize, len as usize)],
            );
            ios.push((spot.slot, Some(io)));
        }
        match self.finish(&mut ios).await {
            0 => Ok(()),
            _ => Err(EIO),
        }
    }
}
