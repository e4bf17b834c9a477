//! Sets of regions, and how a map of them lies on a member.
//!
//! A *region* is a power of two of bytes of the members' data. On a member a map is a row of sectors of 512 bytes, each with
//! a head and a checksum of its own, written in pages of 4 KiB: a page that was torn by a power loss has old sectors and new
//! ones, and each of them is right. A sector that cannot be believed counts as if every bit of it were set.
//! `FORMAT.md` has the bytes.

use lunar_api::GroupUuid;

use crate::limits::REGIONS_MAX;
use crate::superblock::crc32c;

/// Bytes of a page: what is written at once.
pub const PAGE: usize = 4096;
const SECTOR: usize = 512;
const HEAD: usize = 32;
/// Regions of a sector: what its head leaves.
const SECTOR_REGIONS: u64 = ((SECTOR - HEAD) * 8) as u64;
const WORDS: usize = (SECTOR - HEAD) / 8;
/// Regions of a page.
pub const PAGE_REGIONS: u64 = SECTOR_REGIONS * (PAGE / SECTOR) as u64;
/// Pages of the largest map.
pub const PAGES: u64 = REGIONS_MAX.div_ceil(PAGE_REGIONS);
/// Bytes of a map on a member.
pub const MAP_BYTES: u64 = PAGES * PAGE as u64;
const _: () = assert!(PAGES <= 64, "dirty pages are bits");

const MAGIC: [u8; 4] = *b"LMAP";

/// Which map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Regions that may be under writes: redundancy may not be right there after a power loss.
    Intent,
    /// Regions that a member which is away has missed writes of.
    Missed,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Intent => 1,
            Self::Missed => 2,
        }
    }
}

/// A set of regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionSet {
    words: Vec<u64>,
    regions: u64,
    len: u64,
}

impl RegionSet {
    /// None of so many regions.
    pub fn new(regions: u64) -> Self {
        let words = usize::try_from(regions.div_ceil(64)).expect("at most 2^14");
        Self {
            words: vec![0; words],
            regions,
            len: 0,
        }
    }

    /// Regions that there are.
    pub fn regions(&self) -> u64 {
        self.regions
    }

    /// Regions in the set.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Says whether none is in the set.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for more regions.
    pub fn grow(&mut self, regions: u64) {
        self.regions = self.regions.max(regions);
        let words = usize::try_from(self.regions.div_ceil(64)).expect("at most 2^14");
        self.words.resize(words, 0);
    }

    fn place(region: u64) -> (usize, u64) {
        let word = usize::try_from(region / 64).expect("at most 2^14");
        (word, 1 << (region % 64))
    }

    /// Says whether a region is in the set; one that there is not is not.
    pub fn contains(&self, region: u64) -> bool {
        let (word, bit) = Self::place(region);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Adds a region; false if it was there.
    ///
    /// # Panics  if there is no such region
    pub fn insert(&mut self, region: u64) -> bool {
        assert!(region < self.regions, "region {region} of {}", self.regions);
        let (word, bit) = Self::place(region);
        let is_new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        self.len += u64::from(is_new);
        is_new
    }

    /// Takes a region out; false if it was not there.
    pub fn remove(&mut self, region: u64) -> bool {
        let was = self.contains(region);
        if was {
            let (word, bit) = Self::place(region);
            self.words[word] &= !bit;
            self.len -= 1;
        }
        was
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.len = 0;
    }

    /// Adds all of another set of as many regions; says whether any was new.
    pub fn add_all(&mut self, other: &Self) -> bool {
        let before = self.len;
        for (to, from) in self.words.iter_mut().zip(&other.words) {
            *to |= from;
        }
        self.count();
        self.len > before
    }

    /// Leaves what is in the other set too, which may have fewer regions.
    pub fn keep_all(&mut self, other: &Self) {
        let words = other.words.iter().chain(std::iter::repeat(&0));
        for (to, from) in self.words.iter_mut().zip(words) {
            *to &= from;
        }
        self.count();
    }

    fn count(&mut self) {
        self.len = self
            .words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum();
    }

    /// The first region of the set from this one on.
    pub fn next(&self, from: u64) -> Option<u64> {
        let (first, bit) = Self::place(from);
        let mut word = *self.words.get(first)? & !(bit - 1);
        let mut at = first;
        while word == 0 {
            at += 1;
            word = *self.words.get(at)?;
        }
        Some(at as u64 * 64 + u64::from(word.trailing_zeros()))
    }

    /// The regions of the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = u64> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let region = self.next(from)?;
            from = region + 1;
            Some(region)
        })
    }

    fn words_of(sector: u64) -> std::ops::Range<usize> {
        let first = usize::try_from(sector).expect("at most 274") * WORDS;
        first..first + WORDS
    }

    /// Writes a page of the map of this set.
    ///
    /// # Shape   `to`: [`PAGE`] bytes
    pub fn encode_page(&self, kind: Kind, group: GroupUuid, page: u64, to: &mut [u8; PAGE]) {
        for (i, sector) in (0..).zip(to.chunks_exact_mut(SECTOR)) {
            let index = page * (PAGE / SECTOR) as u64 + i;
            sector[..4].copy_from_slice(&MAGIC);
            sector[4..8].fill(0);
            sector[8..24].copy_from_slice(&group.to_bytes());
            sector[24] = kind.byte();
            sector[25..28].fill(0);
            let number = u32::try_from(index).expect("at most 280");
            sector[28..32].copy_from_slice(&number.to_le_bytes());
            for (to, word) in sector[HEAD..]
                .chunks_exact_mut(8)
                .zip(Self::words_of(index))
            {
                let word = self.words.get(word).copied().unwrap_or(0);
                to.copy_from_slice(&word.to_le_bytes());
            }
            let crc = crc32c(sector);
            sector[4..8].copy_from_slice(&crc.to_le_bytes());
        }
    }

    /// Adds what a page of a map has. `None`: it could not be read. Returns how many of its sectors cannot be believed: all
    /// regions of these are added.
    pub fn add_page(
        &mut self,
        kind: Kind,
        group: GroupUuid,
        page: u64,
        bytes: Option<&[u8; PAGE]>,
    ) -> u64 {
        let mut bad = 0;
        for i in 0..PAGE / SECTOR {
            let index = page * (PAGE / SECTOR) as u64 + i as u64;
            let first = index * SECTOR_REGIONS;
            if first >= self.regions {
                break;
            }
            let sector = bytes.map(|bytes| &bytes[i * SECTOR..(i + 1) * SECTOR]);
            match sector.filter(|sector| is_right(sector, kind, group, index)) {
                Some(sector) => {
                    for (word, place) in sector[HEAD..].chunks_exact(8).zip(Self::words_of(index)) {
                        let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
                        if let Some(to) = self.words.get_mut(place) {
                            *to |= word;
                        }
                    }
                }
                None => {
                    bad += 1;
                    for region in first..(first + SECTOR_REGIONS).min(self.regions) {
                        self.insert(region);
                    }
                }
            }
        }
        // Bits of regions that there are not mean nothing.
        if let Some(last) = self.words.last_mut()
            && !self.regions.is_multiple_of(64)
        {
            *last &= (1 << (self.regions % 64)) - 1;
        }
        self.count();
        bad
    }
}

fn is_right(sector: &[u8], kind: Kind, group: GroupUuid, index: u64) -> bool {
    let mut copy = [0; SECTOR];
    copy.copy_from_slice(sector);
    copy[4..8].fill(0);
    let said = u32::from_le_bytes(sector[4..8].try_into().expect("4 bytes"));
    let number = u32::from_le_bytes(sector[28..32].try_into().expect("4 bytes"));
    sector[..4] == MAGIC
        && said == crc32c(&copy)
        && sector[8..24] == group.to_bytes()
        && sector[24] == kind.byte()
        && sector[25..28] == [0; 3]
        && u64::from(number) == index
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GROUP: GroupUuid = GroupUuid::from_bytes([9; 16]);

    fn set(regions: u64, of: &[u64]) -> RegionSet {
        let mut set = RegionSet::new(regions);
        for region in of {
            set.insert(*region);
        }
        set
    }

    fn page_of(set: &RegionSet, page: u64) -> [u8; PAGE] {
        let mut bytes = [0xEE; PAGE];
        set.encode_page(Kind::Intent, GROUP, page, &mut bytes);
        bytes
    }

    #[test]
    fn the_largest_map_fits_its_area() {
        assert_eq!((SECTOR_REGIONS, PAGE_REGIONS, PAGES), (3840, 30720, 35));
        assert_eq!(MAP_BYTES, 140 << 10);
    }

    proptest! {
        /// Given a set, when all its pages are written and read, then it is the same; and it does what a set does.
        #[test]
        fn what_is_written_is_read(regions in 1..40_000u64, of in prop::collection::vec(0..40_000u64, 0..200)) {
            let of: std::collections::BTreeSet<u64> = of.into_iter().map(|region| region % regions).collect();
            let all: Vec<u64> = of.iter().copied().collect();
            let written = set(regions, &all);
            let mut read = RegionSet::new(regions);
            for page in 0..regions.div_ceil(PAGE_REGIONS) {
                prop_assert_eq!(read.add_page(Kind::Intent, GROUP, page, Some(&page_of(&written, page))), 0);
            }
            prop_assert_eq!(&read, &written);
            prop_assert_eq!(read.iter().collect::<Vec<_>>(), all.clone());
            for region in &all {
                prop_assert!(read.contains(*region) && read.remove(*region) && !read.contains(*region));
            }
            prop_assert!(read.is_empty() && read.next(0).is_none());
        }

        /// Given a page of which any byte is changed, then all regions of that sector are in the set, and of no other.
        #[test]
        fn a_damaged_sector_counts_as_full(at in 0..PAGE, bit in 0..8u32) {
            let written = set(PAGE_REGIONS, &[5, 4000, 30_000]);
            let mut bytes = page_of(&written, 0);
            bytes[at] ^= 1 << bit;
            let mut read = RegionSet::new(PAGE_REGIONS);
            prop_assert_eq!(read.add_page(Kind::Intent, GROUP, 0, Some(&bytes)), 1);
            let sector = (at / SECTOR) as u64;
            for region in 0..PAGE_REGIONS {
                let is_full = region / SECTOR_REGIONS == sector;
                prop_assert_eq!(read.contains(region), is_full || written.contains(region));
            }
        }
    }

    #[test]
    fn a_page_of_another_map_place_or_group_counts_as_full() {
        let empty = RegionSet::new(100);
        let other = GroupUuid::from_bytes([8; 16]);
        for (kind, group, page) in [
            (Kind::Missed, GROUP, 0),
            (Kind::Intent, other, 0),
            (Kind::Intent, GROUP, 1),
        ] {
            let mut bytes = [0; PAGE];
            empty.encode_page(kind, group, page, &mut bytes);
            let mut read = RegionSet::new(100);
            assert_eq!(read.add_page(Kind::Intent, GROUP, 0, Some(&bytes)), 1);
            assert_eq!(read.len(), 100);
        }
        let mut read = RegionSet::new(100);
        assert_eq!(read.add_page(Kind::Intent, GROUP, 0, None), 1);
        assert_eq!(read.len(), 100);
    }

    #[test]
    fn sets_are_joined_and_cut() {
        let mut a = set(200, &[1, 64, 199]);
        assert!(a.add_all(&set(200, &[2, 64])));
        assert!(!a.add_all(&set(200, &[2])));
        assert_eq!(a.iter().collect::<Vec<_>>(), [1, 2, 64, 199]);
        a.keep_all(&set(200, &[2, 199, 3]));
        assert_eq!((a.len(), a.next(3)), (2, Some(199)));
        a.grow(300);
        assert!(a.insert(299) && a.contains(2));
        let mut b = a.clone();
        b.keep_all(&set(100, &[2]));
        assert_eq!(
            b.iter().collect::<Vec<_>>(),
            [2],
            "a smaller one has no more"
        );
        a.clear();
        assert!(a.is_empty() && a.regions() == 300);
    }
}
