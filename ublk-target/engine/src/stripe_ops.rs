//! What a worker does to a stripe that it holds: write, read by way of redundancy, sync.
//!
//! The holder of a stripe is alone on it: nobody else writes its rows, and reads that compute from several
//! members see one state of it. Healthy reads do not come here.

use std::cell::Cell;
use std::rc::Rc;

use arrayvec::ArrayVec;

use crate::geometry::Geometry;
use crate::gf::{self, Term, power};
use crate::limits::MEMBERS_MAX;
use crate::member::{MemberIo, add};
use crate::parity;
use crate::plan::{GRAIN, StripeState};
use crate::planted::{self, Bug};
use crate::pool::Lease;
use crate::raid_group::{EIO, RaidGroup};
use crate::stripe_table::{Batch, Item, Task};
use crate::sync::join_all;
use crate::traits::{Env, Piece};

mod band_buffers;
mod copy;
mod lost_rows;
mod repair;
pub(crate) mod scrub;
mod sync;
mod write;

/// Work memory of one pass over a stripe, in bytes: 64 workers share 8 MiB, and a pass must fit one block.
const PASS_BYTES: usize = 1 << 20;
/// Member I/Os of one pass.
const PASS_IOS: usize = 192;

type Ios<E> = ArrayVec<(u16, Option<MemberIo<<E as Env>::Disk>>), PASS_IOS>;

impl<E: Env> RaidGroup<E> {
    /// Works off stripe operations; the rim spawns `WORKERS` of them. Ends when the group has stopped.
    pub async fn worker(self: Rc<Self>) {
        let mut batch = Batch::new();
        while let Some((stripe, head)) = self.stripes.take(&mut batch).await {
            let is_early = planted::is(Bug::LockReleasedEarly)
                && matches!(
                    batch.first().map(|item| &item.task),
                    Some(Task::Write { .. })
                );
            if is_early {
                self.stripes.release(head);
            }
            let result = match batch.first().map(|item| &item.task) {
                Some(Task::Write { .. }) if self.geometry.redundancy() == 0 => {
                    self.write_alone(stripe, &batch).await
                }
                Some(Task::Write { .. }) => match self.geometry.is_mirrored() {
                    true => self.write_mirrors(stripe, &batch).await,
                    false => self.write_parity(stripe, &batch).await,
                },
                Some(Task::Read {
                    span,
                    lease,
                    to,
                    avoid,
                }) => self.read_around(stripe, *span, lease, *to, *avoid).await,
                Some(Task::Sync) => self.sync_stripe(stripe).await,
                Some(Task::Copy) => self.copy_stripe(stripe).await,
                Some(Task::Scrub { repair }) => self.scrub_stripe(stripe, *repair).await,
                Some(Task::Hold) | None => Ok(()),
            };
            if batch.len() > 1 {
                self.count(&batch, |lu| add(&lu.merged, 1));
            }
            let is_handed_over = matches!(batch.first().map(|item| &item.task), Some(Task::Hold));
            for item in batch.drain(..) {
                let result = match item.task.is_void() {
                    true => Err(EIO),
                    false => result,
                };
                self.stripes.done(&item, result.map_err(|errno| errno.0));
            }
            if !is_handed_over && !is_early {
                self.stripes.release(head);
            }
        }
    }

    fn count(&self, batch: &[Item], change: impl FnOnce(&crate::raid_group::Counters)) {
        if let Some(lu) = batch
            .first()
            .and_then(|item| item.lu)
            .and_then(|lu| self.lu(lu))
        {
            change(&lu.counters);
        }
    }

    /// Waits for I/Os and returns the slots that failed, as bits.
    async fn finish(&self, ios: &mut Ios<E>) -> u64 {
        let mut failed = 0;
        join_all(ios, |slot, result| {
            if result.is_err() {
                failed |= 1 << slot;
            }
        })
        .await;
        failed
    }

    /// Bytes from the start of a member's data to a stripe's chunk.
    fn chunk_at(&self, stripe: u64) -> u64 {
        stripe * self.geometry.chunk()
    }

    fn stripe_state(&self, stripe: u64) -> StripeState {
        StripeState {
            data: self.geometry.data_slots(),
            readable: self.geometry.parts_of(stripe, self.readable(stripe)),
            writable: self.geometry.parts_of(stripe, self.writable(stripe)),
            synced: self.is_synced(stripe),
        }
    }
}

/// Sums the data of a stripe up in its parities, or adds it to them: added, it leaves zeroes where they were right.
/// `rows` are the rows of a slot.
fn sum_data<'a>(
    geometry: &Geometry,
    stripe: u64,
    rows: impl Fn(u16) -> &'a [Cell<u8>],
    adds: bool,
) {
    let parity: ArrayVec<&[Cell<u8>], 2> = geometry.parity_slots(stripe).map(&rows).collect();
    let terms: ArrayVec<Term<'_>, MEMBERS_MAX> = (0..geometry.data_slots())
        .map(|d| (power(d.into()), rows(geometry.slot_of(stripe, d))))
        .collect();
    let sources: ArrayVec<&[Cell<u8>], MEMBERS_MAX> = terms.iter().map(|term| term.1).collect();
    match (parity.as_slice(), adds) {
        ([p, q], true) => gf::syndromes_into(p, q, &terms),
        ([p, q], false) => gf::syndromes_to(p, q, &terms),
        ([p], true) => parity::xor_into(p, &sources),
        ([p], false) => parity::xor_to(p, &sources),
        _ => {}
    }
}

/// The whole grains of so many bytes; at least one.
fn rows_of(bytes: usize) -> usize {
    let grain = GRAIN as usize;
    (bytes / grain * grain).max(grain)
}

fn piece(offset: usize, len: usize) -> Piece {
    Piece {
        offset: u32::try_from(offset).expect("within a lease: at most 4 MiB"),
        len: u32::try_from(len).expect("within a lease: at most 4 MiB"),
    }
}

/// Bytes from the start of the group's memory.
fn absolute(lease: &Lease, offset: usize) -> u32 {
    u32::try_from(lease.start() + offset).expect("the memory is below 4 GiB")
}
