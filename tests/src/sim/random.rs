//! Numbers drawn from a seed: the only source of chance in a run.

use std::cell::Cell;

/// A stream of numbers; who draws from one does not disturb who draws from another.
#[derive(Debug)]
pub struct Random(Cell<u64>);

/// One step of splitmix64: every bit of the result depends on every bit of `x`.
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    /// The stream with this name of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self(Cell::new(mix(mix(seed) ^ stream)))
    }

    /// The next 64 bits.
    pub fn next(&self) -> u64 {
        let x = self.0.get().wrapping_add(0x9E37_79B9_7F4A_7C15);
        self.0.set(x);
        mix(x)
    }

    /// A number below `n`; 0 if there is none.
    pub fn below(&self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// True in so many of a hundred cases.
    pub fn percent(&self, n: u64) -> bool {
        self.below(100) < n
    }

    /// One of them.
    ///
    /// # Panics  if there is none
    pub fn of<'a, T>(&self, all: &'a [T]) -> &'a T {
        &all[self.index(all.len())]
    }

    /// An index of so many.
    pub fn index(&self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}
