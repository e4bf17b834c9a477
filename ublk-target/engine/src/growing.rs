//! A group whose members have all been replaced by larger ones gets what the smallest of them has room for.
//!
//! The group grows at its end: every byte stays where it is, stripes come behind the last. linear: only the room of the
//! last member is at the end.

use std::cell::OnceCell;
use std::ops::Deref;

use lunar_api::target::{Level, ScrubState};
use lunar_api::{ApiError, ErrorKind};

use crate::geometry::{Geometry, GeometryError};
use crate::limits::REGIONS_MAX;
use crate::raid_group::{MemberPlace, RaidGroup};
use crate::reserve::region_bytes;
use crate::traits::Env;

/// The shape of a running group. Who has borrowed it keeps a shape from before, which says the same of all that it knows.
#[derive(Debug)]
pub(crate) struct Shape {
    first: Geometry,
    grown: OnceCell<Box<Shape>>,
}

impl Shape {
    pub(crate) fn new(first: Geometry) -> Self {
        Self {
            first,
            grown: OnceCell::new(),
        }
    }

    fn grow(&self, to: Geometry) {
        let mut last = self;
        while let Some(next) = last.grown.get() {
            last = next;
        }
        let set = last.grown.set(Box::new(Self::new(to)));
        assert!(set.is_ok(), "nobody else is at it");
    }
}

impl Deref for Shape {
    type Target = Geometry;

    fn deref(&self) -> &Geometry {
        match self.grown.get() {
            None => &self.first,
            Some(next) => next,
        }
    }
}

impl<E: Env> RaidGroup<E> {
    /// The shape that the group can have at most with the members that it has.
    fn largest(&self) -> Result<Geometry, GeometryError> {
        let members = self.members.borrow();
        let room = |place: &Option<MemberPlace>, has: u64| {
            // A member that is not there may have no more than what it has.
            place
                .as_ref()
                .map_or(has, |place| place.reserve.room(place.device_size).max(has))
        };
        let sizes: Vec<u64> = members
            .iter()
            .map(|member| room(&member.place, self.geometry.data_bytes(member.slot)))
            .collect();
        let (level, chunk) = (self.geometry.level(), self.geometry.chunk());
        if level == Level::Linear {
            let last = sizes.len() - 1;
            let sizes: Vec<u64> = members
                .iter()
                .map(|member| match usize::from(member.slot) == last {
                    true => sizes[last],
                    false => self.geometry.data_bytes(member.slot),
                })
                .collect();
            return Geometry::linear(&sizes);
        }
        let unit = Geometry::member_unit(level, sizes.len(), chunk);
        let bytes = sizes.iter().min().map_or(0, |least| least / unit * unit);
        Geometry::new(level, sizes.len(), chunk, bytes)
    }

    /// Bytes of data that the group has once it is grown.
    pub(crate) fn capacity_max(&self) -> u64 {
        self.largest()
            .map_or(self.geometry.capacity(), |largest| largest.capacity())
    }

    /// Gives the group all that its members have room for. Redundancy of the new part is made by a resync, which goes on
    /// from its cursor like any other.
    ///
    /// # Crash  the group has the old size or the new one; of members that differ the newest decides. Nothing is in the new
    /// part before the size is durable, and `synced_to` says that its redundancy is not made
    /// # Errors  `Usage` while not all members are in sync, or work on all stripes is under way; then nothing has changed
    pub async fn grow(&self) -> Result<(), ApiError> {
        let what = "the group was not grown";
        let _turn = self.configure().await;
        let refuse = |why: String, hint: &str| {
            let error = ApiError::new(ErrorKind::Usage, what).because(why);
            Err(error.hint(hint))
        };
        if self.failed.get() || self.stopping.get() {
            return Err(ApiError::new(ErrorKind::NoService, what).because(self.reason()));
        }
        if self.in_sync.get() != self.geometry.slots() {
            return refuse(self.reason(), "lunar status");
        }
        let grown = self
            .largest()
            .map_err(|error| ApiError::new(ErrorKind::Failed, what).because(error.to_string()))?;
        if grown == *self.geometry {
            return Ok(());
        }
        if self.copying().is_some() || self.has_sync_work() {
            return refuse("its members are being synced".into(), "lunar job list");
        }
        // Marks stand for regions of this size.
        let region = self.record.borrow().region_bytes;
        let regions = grown.member_bytes().div_ceil(region);
        if self.maps.is_some() && regions > REGIONS_MAX {
            let why = format!(
                "its maps have {REGIONS_MAX} regions of {region} bytes at most, and members of {} bytes have {regions}",
                grown.member_bytes()
            );
            return refuse(why, "a group made on the larger disks has larger regions");
        }
        let scrub = self.scrub.borrow().as_ref().map(|scrub| scrub.state);
        if matches!(scrub, Some(ScrubState::Running | ScrubState::Paused)) {
            let why = "a scrub is under way, or paused: it knows of the stripes that there were";
            return refuse(why.into(), "lunar job list");
        }
        {
            let mut record = self.record.borrow_mut();
            record.member_bytes = grown.member_bytes();
            if !record.maps {
                record.region_bytes = region_bytes(grown.member_bytes());
            }
            if grown.level() == Level::Linear {
                for (slot, entry) in (0..).zip(&mut record.members) {
                    entry.data_bytes = grown.data_bytes(slot);
                }
            }
        }
        let text = format!(
            "from {} to {} bytes of data",
            self.geometry.capacity(),
            grown.capacity()
        );
        self.geometry.grow(grown);
        if let Some(maps) = &self.maps {
            maps.grow(regions);
        }
        if self.geometry.redundancy() == 0 {
            let all = self.geometry.member_bytes() / self.geometry.stripe_on_member();
            self.synced.set(all);
            self.durable_synced.set(all);
        }
        self.sync_wanted.set(self.sync_wanted.get() + 1);
        self.views.advance();
        self.advance();
        self.publish().await.map_err(|_| {
            ApiError::new(ErrorKind::Failed, what).because("too few members took the superblock")
        })?;
        self.event("GroupGrown", None, &text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shape_is_the_last_one_and_keeps_those_before() {
        let raid5 = |mib: u64| Geometry::new(Level::Raid5, 3, 65536, mib << 20).unwrap();
        let shape = Shape::new(raid5(1));
        let before: &Geometry = &shape;
        shape.grow(raid5(2));
        shape.grow(raid5(4));
        assert_eq!(
            (before.member_bytes(), shape.member_bytes()),
            (1 << 20, 4 << 20)
        );
    }
}
