//! Rows some of whose blocks are not to be had, while their stripe is written.
//!
//! ```text
//! planned         without the parts whose blocks are on a list: redundancy has them
//!    | redundancy does not
//! by difference   parity goes on to say what it says of what is lost
//!    | that is what is written, or parity cannot be read
//! without parity  it is put on the list, and the data written
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::plan::{Band, Exhausted, GRAIN, StripeState, by_difference, data_only, plan_band};
use crate::raid_group::{EIO, Errno, RaidGroup};
use crate::serve::bits;
use crate::stripe_table::{Copied, Item, Task};
use crate::traits::Env;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Way {
    #[default]
    Planned,
    ByDifference,
    WithoutParity,
}

#[derive(Debug, Default)]
struct LostRow {
    way: Way,
    /// Parts that are not to be read, as bits.
    avoid: u64,
}

/// The rows of one operation, by bytes of the chunk.
#[derive(Debug, Default)]
pub(super) struct LostRows(BTreeMap<u32, LostRow>);

/// What redundancy did not give in a pass: the slots that failed, and rows.
pub(super) struct Unread<'a> {
    pub slots: u64,
    pub rows: Range<u32>,
    /// Of the pass.
    pub bands: &'a [Band],
}

impl LostRows {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Plans a band; of a single grain if there are any.
    pub(super) fn plan(
        &self,
        state: &StripeState,
        rows: Range<u32>,
        modified: u64,
        partial: u64,
    ) -> Result<Band, Exhausted> {
        let Some(row) = self.0.get(&(rows.start * GRAIN)) else {
            return plan_band(state, rows, modified, partial);
        };
        match row.way {
            Way::Planned => {
                let readable = state.readable & !row.avoid;
                let known = StripeState { readable, ..*state };
                plan_band(&known, rows.clone(), modified, partial)
                    .or_else(|_| by_difference(state, rows, modified, partial))
            }
            Way::ByDifference => by_difference(state, rows, modified, partial),
            Way::WithoutParity => data_only(state, rows, modified, partial),
        }
    }

    /// Says whether a row that could not be planned may be without its parity.
    pub(super) fn may_go_on(&self, rows: &Range<u32>) -> bool {
        let row = self.0.get(&(rows.start * GRAIN));
        row.is_some_and(|row| row.way != Way::WithoutParity)
    }
}

impl<E: Env> RaidGroup<E> {
    /// Repairs what a pass could not read, and notes what cannot be. A write of a part of a block whose rest is not to be had is
    /// made void.
    ///
    /// # Crash  parity that is given up is on its list before this ends
    pub(super) async fn note_unread(
        &self,
        stripe: u64,
        batch: &[Item],
        unread: Unread<'_>,
        lost_rows: &mut LostRows,
    ) -> Result<(), Errno> {
        let mut lost: BTreeMap<u32, u64> = BTreeMap::new();
        for slot in bits(unread.slots) {
            let part = 1 << self.geometry.part_of(stripe, slot);
            let mut of = BTreeSet::new();
            self.repair(stripe, slot, &unread.rows, &mut of).await?;
            // Of rows that nobody asked for nothing is concluded.
            let bands = unread.bands.iter().filter(|band| band.reads & part != 0);
            for row in bands.flat_map(|band| band.rows.clone()).map(|g| g * GRAIN) {
                let at = self.chunk_at(stripe) + u64::from(row);
                let is_lost = of.contains(&row);
                if is_lost || self.member(slot).bad.touches(at, u64::from(GRAIN)) {
                    lost_rows.0.entry(row).or_default().avoid |= part;
                }
                if is_lost {
                    *lost.entry(row).or_default() |= part;
                }
            }
        }
        let mut stuck = Vec::new();
        for (row, parts) in lost {
            if void_parts(batch, row, parts) {
                continue;
            }
            let known = lost_rows.0.entry(row).or_default();
            match known.way {
                Way::Planned => known.way = Way::ByDifference,
                Way::ByDifference => stuck.push(row),
                Way::WithoutParity => return Err(EIO),
            }
        }
        self.go_without_parity(stripe, &stuck, lost_rows).await
    }

    /// Gives the parity of rows up, where that harms nothing that is there.
    pub(super) async fn go_without_parity(
        &self,
        stripe: u64,
        rows: &[u32],
        lost_rows: &mut LostRows,
    ) -> Result<(), Errno> {
        let at = |row: &u32| self.chunk_at(stripe) + u64::from(*row);
        if !rows
            .iter()
            .all(|row| self.can_do_without_parity(stripe, at(row)))
        {
            return Err(EIO);
        }
        for row in rows {
            lost_rows.0.entry(*row).or_default().way = Way::WithoutParity;
        }
        self.give_up_parity(stripe, rows).await
    }
}

/// Makes writes void that are of a part of a block of these parts (as bits) in a row; says whether there were any.
fn void_parts(batch: &[Item], row: u32, parts: u64) -> bool {
    let grain = row / GRAIN;
    let mut any = false;
    for item in batch.iter().filter(|item| !item.task.is_void()) {
        if let Task::Write { span, copied, .. } = &item.task
            && parts & 1 << span.data != 0
            && span.grains().contains(&grain)
            && span.is_partial_in(&(grain..grain + 1))
        {
            copied.set(Copied::Failed);
            any = true;
        }
    }
    any
}
