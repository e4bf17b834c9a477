//! Which bytes of a group belong to a LU, and how free ones are found.
//!
//! An extent is whole *units*: the smallest multiple of a stripe from 1 MiB. Pure arithmetic: [`ExtentMap`] answers
//! addresses on the data path, [`FreeSpace`] cuts new extents when a LU is made.

use serde::{Deserialize, Serialize};

use crate::geometry::{Geometry, Piece};
use crate::limits::EXTENT_MIN;

/// A range of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Extent {
    /// Bytes from the start of the group.
    pub at: u64,
    /// Bytes.
    pub len: u64,
}

impl Extent {
    /// Returns the first byte behind it.
    pub fn end(&self) -> u64 {
        self.at.saturating_add(self.len)
    }
}

/// Returns the bytes of the smallest extent of a group.
///
/// # Example raid5 of 4, chunk 64 KiB: stripe 192 KiB, unit 1152 KiB
pub fn unit_bytes(geometry: &Geometry) -> u64 {
    EXTENT_MIN.next_multiple_of(geometry.stripe_bytes())
}

/// Returns the bytes of a group that extents can have: whole units.
pub fn allocatable_bytes(geometry: &Geometry) -> u64 {
    let unit = unit_bytes(geometry);
    geometry.capacity() / unit * unit
}

/// Maps a LU's bytes to the group's; made once when the LU comes up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExtentMap {
    /// In order of the LU: its first byte there, and the extent.
    parts: Vec<(u64, Extent)>,
    capacity: u64,
}

impl ExtentMap {
    /// Takes the extents of a LU in its order.
    pub fn new(extents: &[Extent]) -> Self {
        let mut capacity = 0;
        let parts = extents
            .iter()
            .filter(|extent| extent.len > 0)
            .map(|extent| {
                let first = capacity;
                capacity += extent.len;
                (first, *extent)
            });
        Self {
            parts: parts.collect(),
            capacity,
        }
    }

    /// Returns the bytes of all extents.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Maps byte `at` of the LU to its address in the group, and says how many bytes follow there in a row.
    /// `None` behind the end. Allocates nothing.
    pub fn resolve(&self, at: u64) -> Option<(u64, u64)> {
        if at >= self.capacity {
            return None;
        }
        let behind = self.parts.partition_point(|(first, _)| *first <= at);
        let (first, extent) = self.parts[behind.checked_sub(1)?];
        let inside = at - first;
        Some((extent.at + inside, extent.len - inside))
    }
}

impl ExtentMap {
    /// Cuts a range of the LU into the parts that lie in one chunk each, in order; their offsets are from the
    /// start of the range. Allocates nothing.
    ///
    /// # Panics  if the range leaves the LU: requests are checked when they arrive
    pub(crate) fn pieces(
        &self,
        geometry: &Geometry,
        at: u64,
        len: u64,
    ) -> impl Iterator<Item = Piece> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let left = len.checked_sub(done).filter(|left| *left > 0)?;
            let (from, room) = self.resolve(at + done).expect("requests lie within the LU");
            let start = done;
            let part = room.min(left);
            done += part;
            Some(geometry.pieces(from, part).map(move |piece| Piece {
                offset_in_request: start + piece.offset_in_request,
                ..piece
            }))
        })
        .flatten()
    }
}

/// The free runs of a group, in order of address, none empty, none adjacent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeSpace {
    runs: Vec<Extent>,
}

impl FreeSpace {
    /// Finds what `used` (whole units, apart from each other, in any order) leaves of a group.
    pub fn new(geometry: &Geometry, used: impl IntoIterator<Item = Extent>) -> Self {
        let mut used: Vec<Extent> = used.into_iter().collect();
        used.sort_by_key(|extent| extent.at);
        let mut runs = Vec::new();
        let mut at = 0;
        let end = Extent {
            at: allocatable_bytes(geometry),
            len: 0,
        };
        for extent in used.into_iter().chain([end]) {
            if extent.at > at {
                runs.push(Extent {
                    at,
                    len: extent.at - at,
                });
            }
            at = at.max(extent.end());
        }
        Self { runs }
    }

    /// Returns the free bytes.
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Takes `bytes` (whole units): from the first run that holds all of it, else from the runs in order.
    /// `None` if there is not so much.
    pub fn take(&mut self, bytes: u64) -> Option<Vec<Extent>> {
        if bytes > self.bytes() {
            return None;
        }
        let mut taken = Vec::new();
        let mut left = bytes;
        let first = self
            .runs
            .iter()
            .position(|run| run.len >= bytes)
            .unwrap_or(0);
        for run in &mut self.runs[first..] {
            let len = run.len.min(left);
            if len == 0 {
                break;
            }
            taken.push(Extent { at: run.at, len });
            *run = Extent {
                at: run.at + len,
                len: run.len - len,
            };
            left -= len;
        }
        self.runs.retain(|run| run.len > 0);
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use lunar_api::target::Level;
    use lunar_api::units::{KIB, MIB};
    use proptest::prelude::*;

    use super::*;

    fn raid0(mib: u64) -> Geometry {
        Geometry::new(Level::Raid0, 1, 64 * KIB, mib * MIB).unwrap()
    }

    fn mib(at: u64, len: u64) -> Extent {
        Extent {
            at: at * MIB,
            len: len * MIB,
        }
    }

    #[test]
    fn unit_is_whole_stripes_of_at_least_1_mib() {
        for (level, members, chunk, unit) in [
            (Level::Raid0, 1, 64 * KIB, MIB),
            (Level::Raid0, 3, 64 * KIB, 6 * 192 * KIB),
            (Level::Raid1, 2, 0, MIB),
            (Level::Raid5, 4, 64 * KIB, 6 * 192 * KIB),
            (Level::Raid5, 64, MIB, 63 * MIB),
            (Level::Raid5, 8, 4 * KIB, 37 * 28 * KIB),
            (Level::Linear, 2, 0, MIB),
            (Level::Raid6, 5, 64 * KIB, 6 * 192 * KIB),
            (Level::Raid10, 3, 64 * KIB, 6 * 192 * KIB),
            (Level::Raid10, 5, MIB, 5 * MIB),
        ] {
            let g = Geometry::new(level, members, chunk, 64 * MIB).unwrap();
            assert_eq!(unit_bytes(&g), unit, "{g:?}");
            assert!(unit >= MIB && unit - MIB < g.stripe_bytes());
            assert!(allocatable_bytes(&g) <= g.capacity());
        }
    }

    #[test]
    fn take_prefers_the_first_run_that_holds_all() {
        let mut free = FreeSpace::new(&raid0(20), [mib(2, 1), mib(8, 2), mib(4, 1)]);
        // Free: 0-2, 3-4, 5-8, 10-20.
        assert_eq!(free.bytes(), 16 * MIB);
        assert_eq!(free.take(3 * MIB), Some(vec![mib(5, 3)]));
        assert_eq!(free.take(MIB), Some(vec![mib(0, 1)]));
        assert_eq!(
            free.take(11 * MIB),
            Some(vec![mib(1, 1), mib(3, 1), mib(10, 9)])
        );
        assert_eq!(free.take(2 * MIB), None);
        assert_eq!(free.take(MIB), Some(vec![mib(19, 1)]));
        assert_eq!(free.take(0), Some(vec![]));
        assert_eq!(free.bytes(), 0);
    }

    #[test]
    fn freed_neighbours_are_one_run() {
        let free = FreeSpace::new(&raid0(8), [mib(6, 2), mib(0, 2)]);
        assert_eq!(free.runs, [mib(2, 4)]);
        assert_eq!(FreeSpace::new(&raid0(8), [mib(0, 8)]).runs, []);
    }

    #[test]
    fn resolve_finds_the_extent_and_its_rest() {
        let map = ExtentMap::new(&[mib(5, 2), mib(0, 1), mib(9, 3)]);
        assert_eq!(map.capacity(), 6 * MIB);
        for (at, expected) in [
            (0, Some((5 * MIB, 2 * MIB))),
            (2 * MIB - 1, Some((7 * MIB - 1, 1))),
            (2 * MIB, Some((0, MIB))),
            (3 * MIB + 5, Some((9 * MIB + 5, 3 * MIB - 5))),
            (6 * MIB - 1, Some((12 * MIB - 1, 1))),
            (6 * MIB, None),
            (u64::MAX, None),
        ] {
            assert_eq!(map.resolve(at), expected, "{at}");
        }
        assert_eq!(ExtentMap::new(&[]).resolve(0), None);
    }

    proptest! {
        /// A random history of takes and frees against a map of units.
        #[test]
        fn free_space_equals_a_map_of_units(
            steps in prop::collection::vec((any::<bool>(), 1_u64..12, any::<prop::sample::Index>()), 1..60),
        ) {
            const UNITS: u64 = 40;
            let mut lus: Vec<Vec<Extent>> = Vec::new();
            for (is_take, units, which) in steps {
                if !is_take && !lus.is_empty() {
                    lus.swap_remove(which.index(lus.len()));
                    continue;
                }
                let used = lus.iter().flatten().copied();
                let mut free = FreeSpace::new(&raid0(UNITS), used);
                let free_units = free.bytes() / MIB;
                match free.take(units * MIB) {
                    Some(taken) => {
                        prop_assert_eq!(taken.iter().map(|e| e.len).sum::<u64>(), units * MIB);
                        prop_assert_eq!(free.bytes() / MIB, free_units - units);
                        lus.push(taken);
                    }
                    None => prop_assert!(units > free_units),
                }
                let mut map = vec![0; usize::try_from(UNITS).unwrap()];
                for extent in lus.iter().flatten() {
                    for unit in extent.at / MIB..extent.end() / MIB {
                        map[usize::try_from(unit).unwrap()] += 1;
                    }
                }
                prop_assert!(map.iter().all(|n| *n <= 1));
                let taken: u64 = map.iter().sum();
                let all = FreeSpace::new(&raid0(UNITS), lus.iter().flatten().copied());
                prop_assert_eq!(all.bytes() / MIB, UNITS - taken);
            }
        }
    }
}
