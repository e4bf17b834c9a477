//! P and Q: linear combinations over GF(2^8), as wide as the CPU can.
//!
//! The field is that of Linux raid6: polynomial x^8 + x^4 + x^3 + x^2 + 1 (0x11d), generator 2. P is the sum of the
//! data chunks of a stripe, Q the sum of 2^i times chunk i. Buffers are as in `parity`: slices of cells. Targets
//! and sources must not overlap; any length and alignment will do; every source is read once.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::OnceLock;

use arrayvec::ArrayVec;

use crate::limits::MEMBERS_MAX;
use crate::parity;

/// A buffer, and what it is multiplied by.
pub type Term<'a> = (u8, &'a [Cell<u8>]);

/// The low byte of an index into tables.
const fn low(i: usize) -> u8 {
    i.to_le_bytes()[0]
}

/// Powers of 2, and after 255 of them again.
const POWERS: [u8; 255] = {
    let (mut table, mut x, mut i) = ([0; 255], 1_u8, 0);
    while i < 255 {
        table[i] = x;
        x = (x << 1) ^ if x & 0x80 != 0 { 0x1d } else { 0 };
        i += 1;
    }
    table
};

/// What power of 2 a byte is; of 0 it says 0.
const LOGARITHMS: [u8; 256] = {
    let (mut table, mut i) = ([0; 256], 0);
    while i < 255 {
        table[POWERS[i] as usize] = low(i);
        i += 1;
    }
    table
};

/// Products with every byte, by factor.
static PRODUCTS: [[u8; 256]; 256] = {
    let (mut table, mut a) = ([[0; 256]; 256], 0);
    while a < 256 {
        let mut b = 0;
        while b < 256 {
            table[a][b] = mul(low(a), low(b));
            b += 1;
        }
        a += 1;
    }
    table
};

/// Products of a factor with the 16 low nibbles, then with the 16 high ones.
#[cfg(target_arch = "x86_64")]
static NIBBLES: [[u8; 32]; 256] = {
    let (mut table, mut by) = ([[0; 32]; 256], 0);
    while by < 256 {
        let mut nibble = 0;
        while nibble < 16 {
            table[by][nibble] = mul(low(by), low(nibble));
            table[by][nibble + 16] = mul(low(by), low(nibble << 4));
            nibble += 1;
        }
        by += 1;
    }
    table
};

/// Multiplication by a factor as the 8x8 bit matrix of `gf2p8affineqb`: bit `i` of the product is the parity of the
/// byte and byte `7 - i` of the matrix.
#[cfg(target_arch = "x86_64")]
static MATRICES: [u64; 256] = {
    let (mut table, mut by) = ([0; 256], 0);
    while by < 256 {
        let mut bit = 0;
        while bit < 8 {
            let column = mul(low(by), 1 << bit);
            let mut row = 0;
            while row < 8 {
                if column & 1 << row != 0 {
                    table[by] |= 1 << (8 * (7 - row) + bit);
                }
                row += 1;
            }
            bit += 1;
        }
        by += 1;
    }
    table
};

/// Returns a product.
pub const fn mul(a: u8, b: u8) -> u8 {
    if a == 0 || b == 0 {
        return 0;
    }
    let sum = LOGARITHMS[a as usize] as usize + LOGARITHMS[b as usize] as usize;
    POWERS[sum % 255]
}

/// Returns 2 to the power of `n`, which may be negative.
pub const fn power(n: i32) -> u8 {
    POWERS[n.rem_euclid(255) as usize]
}

/// Returns 1 / a.
///
/// # Panics  if `a` is 0
pub const fn inverse(a: u8) -> u8 {
    assert!(a != 0, "0 has no inverse");
    POWERS[(255 - LOGARITHMS[a as usize] as usize) % 255]
}

/// Which instructions do the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// Table look-ups; every CPU.
    Portable,
    /// 256-bit vectors, products by nibbles.
    Avx2,
    /// 256-bit vectors, products by bit matrix.
    GfniAvx2,
    /// 512-bit vectors, products by bit matrix.
    GfniAvx512,
}

impl Path {
    /// Returns the paths of this CPU, best last.
    pub fn available() -> Vec<Self> {
        let mut paths = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx2 = std::arch::is_x86_feature_detected!("avx2");
            let has_gfni = std::arch::is_x86_feature_detected!("gfni");
            if has_avx2 {
                paths.push(Self::Avx2);
            }
            if has_avx2 && has_gfni {
                paths.push(Self::GfniAvx2);
            }
            if has_gfni && std::arch::is_x86_feature_detected!("avx512f") {
                paths.push(Self::GfniAvx512);
            }
        }
        paths
    }

    /// Returns the path that this process takes: the best there is, found out once.
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<Path> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            Self::available()
                .last()
                .copied()
                .expect("the portable path is everywhere")
        })
    }
}

/// `dst = sum of the terms`; without terms, zeroes.
///
/// # Shape   all of one length; at most [`MEMBERS_MAX`] terms
/// # Panics  if the lengths differ or a source overlaps `dst`
pub fn combine_to(dst: &[Cell<u8>], terms: &[Term<'_>]) {
    combine(Path::chosen(), dst, terms, false);
}

/// `dst ^= sum of the terms`.
///
/// # Shape   all of one length; at most [`MEMBERS_MAX`] terms
/// # Panics  if the lengths differ or a source overlaps `dst`
pub fn combine_into(dst: &[Cell<u8>], terms: &[Term<'_>]) {
    combine(Path::chosen(), dst, terms, true);
}

/// `p = sum of the sources`, `q = sum of the terms`, in one pass.
///
/// # Shape   all of one length; at most [`MEMBERS_MAX`] terms
/// # Panics  if the lengths differ or anything overlaps
pub fn syndromes_to(p: &[Cell<u8>], q: &[Cell<u8>], terms: &[Term<'_>]) {
    syndromes(Path::chosen(), p, q, terms, false);
}

/// `p ^= sum of the sources`, `q ^= sum of the terms`, in one pass.
///
/// # Shape   all of one length; at most [`MEMBERS_MAX`] terms
/// # Panics  if the lengths differ or anything overlaps
pub fn syndromes_into(p: &[Cell<u8>], q: &[Cell<u8>], terms: &[Term<'_>]) {
    syndromes(Path::chosen(), p, q, terms, true);
}

fn combine(path: Path, dst: &[Cell<u8>], terms: &[Term<'_>], keeps: bool) {
    if terms.iter().all(|(by, _)| *by == 1) {
        let sources: ArrayVec<&[Cell<u8>], MEMBERS_MAX> = terms.iter().map(|term| term.1).collect();
        return match keeps {
            true => parity::xor_into(dst, &sources),
            false => parity::xor_to(dst, &sources),
        };
    }
    let sources = sources(&[dst], terms);
    let work = Work {
        p: None,
        q: start_mut(dst),
        len: dst.len(),
        keeps,
        sources: &sources,
    };
    pass::<false>(path, &work);
}

fn syndromes(path: Path, p: &[Cell<u8>], q: &[Cell<u8>], terms: &[Term<'_>], keeps: bool) {
    assert!(are_apart(p, q), "P onto Q");
    let sources = sources(&[p, q], terms);
    let work = Work {
        p: Some(start_mut(p)),
        q: start_mut(q),
        len: q.len(),
        keeps,
        sources: &sources,
    };
    pass::<true>(path, &work);
}

#[derive(Clone, Copy)]
struct Source {
    by: u8,
    from: *const u8,
}

/// One pass. Every pointer covers `len` bytes of live cells; targets and sources are apart (see `sources`).
struct Work<'a> {
    /// There in `pass::<true>`.
    p: Option<*mut u8>,
    q: *mut u8,
    len: usize,
    /// The targets are added to.
    keeps: bool,
    sources: &'a [Source],
}

impl Work<'_> {
    /// P, or Q where there is none: then it is not looked at.
    fn p(&self) -> *mut u8 {
        self.p.unwrap_or(self.q)
    }
}

fn are_apart(a: &[Cell<u8>], b: &[Cell<u8>]) -> bool {
    assert_eq!(a.len(), b.len(), "buffers of different lengths");
    let (a, b) = (a.as_ptr_range(), b.as_ptr_range());
    a.is_empty() || a.end <= b.start || b.end <= a.start
}

fn sources(targets: &[&[Cell<u8>]], terms: &[Term<'_>]) -> ArrayVec<Source, MEMBERS_MAX> {
    let source = |&(by, of): &Term<'_>| {
        let is_apart = targets.iter().all(|target| are_apart(target, of));
        assert!(is_apart, "a sum onto one of its sources");
        let from = of.as_ptr().cast();
        Source { by, from }
    };
    terms.iter().map(source).collect()
}

/// The pointer may be written: it comes from cells.
fn start_mut(cells: &[Cell<u8>]) -> *mut u8 {
    cells.as_ptr().cast::<u8>().cast_mut()
}

fn pass<const P: bool>(path: Path, work: &Work<'_>) {
    match path {
        // SAFETY: the pointers cover `len` bytes (see `Work`).
        Path::Portable => unsafe { pass_portable::<P>(work, 0) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; `Path` says Avx2 only where the CPU has it.
        Path::Avx2 => unsafe { pass_avx2::<P>(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; `Path` says GfniAvx2 only where the CPU has both.
        Path::GfniAvx2 => unsafe { pass_gfni_avx2::<P>(work) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; `Path` says GfniAvx512 only where the CPU has both.
        Path::GfniAvx512 => unsafe { pass_gfni_avx512::<P>(work) },
        #[cfg(not(target_arch = "x86_64"))]
        Path::Avx2 | Path::GfniAvx2 | Path::GfniAvx512 => unreachable!("x86-64 only"),
    }
}

/// Does bytes `[at, len)`.
///
/// # Safety
/// What `Work` says of its pointers.
unsafe fn pass_portable<const P: bool>(work: &Work<'_>, at: usize) {
    for at in at..work.len {
        let (mut p, mut q) = (0, 0);
        for source in work.sources {
            // SAFETY: `at < len`.
            let x = unsafe { *source.from.add(at) };
            p ^= x;
            q ^= PRODUCTS[usize::from(source.by)][usize::from(x)];
        }
        // SAFETY: `at < len`; nobody else writes the targets.
        unsafe {
            if work.keeps {
                q ^= *work.q.add(at);
            }
            *work.q.add(at) = q;
            if P {
                if work.keeps {
                    p ^= *work.p().add(at);
                }
                *work.p().add(at) = p;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! vector_pass {
    (
        $name:ident, $feature:literal, $vector:ident, $parts:literal, $factor:ident, $product:ident,
        $load:ident, $store:ident, $xor:ident, $zero:ident
    ) => {
        /// Some vectors a turn, then the rest by bytes.
        ///
        /// # Safety
        /// The CPU has the features; what `Work` says of its pointers.
        #[target_feature(enable = $feature)]
        unsafe fn $name<const P: bool>(work: &Work<'_>) {
            use std::arch::x86_64::{$load, $store, $vector, $xor, $zero};
            const WIDTH: usize = size_of::<$vector>();
            const STEP: usize = $parts * WIDTH;
            let mut at = 0;
            while at + STEP <= work.len {
                let (mut p, mut q) = ([$zero(); $parts], [$zero(); $parts]);
                if work.keeps {
                    for part in 0..$parts {
                        let offset = at + part * WIDTH;
                        // SAFETY: `at + STEP <= len`; the unaligned load needs no alignment.
                        q[part] = unsafe { $load(work.q.add(offset).cast()) };
                        if P {
                            // SAFETY: as above.
                            p[part] = unsafe { $load(work.p().add(offset).cast()) };
                        }
                    }
                }
                for source in work.sources {
                    let factor = $factor(source.by);
                    for part in 0..$parts {
                        // SAFETY: as above.
                        let x = unsafe { $load(source.from.add(at + part * WIDTH).cast()) };
                        if P {
                            p[part] = $xor(p[part], x);
                        }
                        q[part] = $xor(q[part], $product(factor, x));
                    }
                }
                for part in 0..$parts {
                    let offset = at + part * WIDTH;
                    // SAFETY: as above, for the store.
                    unsafe { $store(work.q.add(offset).cast(), q[part]) };
                    if P {
                        // SAFETY: as above.
                        unsafe { $store(work.p().add(offset).cast(), p[part]) };
                    }
                }
                at += STEP;
            }
            // SAFETY: the same pointers and length.
            unsafe { pass_portable::<P>(work, at) };
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{MATRICES, NIBBLES};

    /// The products of both nibbles, in every lane.
    #[target_feature(enable = "avx2")]
    pub(super) fn nibbles(by: u8) -> (__m256i, __m256i) {
        let table = &NIBBLES[usize::from(by)];
        let (low, high) = table.split_at(16);
        // SAFETY: each half has 16 bytes; the unaligned load needs no alignment.
        let (low, high) = unsafe {
            (
                _mm_loadu_si128(low.as_ptr().cast()),
                _mm_loadu_si128(high.as_ptr().cast()),
            )
        };
        (
            _mm256_broadcastsi128_si256(low),
            _mm256_broadcastsi128_si256(high),
        )
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn by_nibbles((low, high): (__m256i, __m256i), x: __m256i) -> __m256i {
        let mask = _mm256_set1_epi8(0x0f);
        let l = _mm256_shuffle_epi8(low, _mm256_and_si256(x, mask));
        let h = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi64::<4>(x), mask));
        _mm256_xor_si256(l, h)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn matrix_256(by: u8) -> __m256i {
        _mm256_set1_epi64x(MATRICES[usize::from(by)].cast_signed())
    }

    #[target_feature(enable = "avx2,gfni")]
    pub(super) fn by_matrix_256(matrix: __m256i, x: __m256i) -> __m256i {
        _mm256_gf2p8affine_epi64_epi8::<0>(x, matrix)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn matrix_512(by: u8) -> __m512i {
        _mm512_set1_epi64(MATRICES[usize::from(by)].cast_signed())
    }

    #[target_feature(enable = "avx512f,gfni")]
    pub(super) fn by_matrix_512(matrix: __m512i, x: __m512i) -> __m512i {
        _mm512_gf2p8affine_epi64_epi8::<0>(x, matrix)
    }
}
#[cfg(target_arch = "x86_64")]
use x86::{by_matrix_256, by_matrix_512, by_nibbles, matrix_256, matrix_512, nibbles};

#[cfg(target_arch = "x86_64")]
vector_pass!(
    pass_avx2,
    "avx2",
    __m256i,
    2,
    nibbles,
    by_nibbles,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_xor_si256,
    _mm256_setzero_si256
);
#[cfg(target_arch = "x86_64")]
vector_pass!(
    pass_gfni_avx2,
    "avx2,gfni",
    __m256i,
    4,
    matrix_256,
    by_matrix_256,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_xor_si256,
    _mm256_setzero_si256
);
#[cfg(target_arch = "x86_64")]
vector_pass!(
    pass_gfni_avx512,
    "avx512f,gfni",
    __m512i,
    4,
    matrix_512,
    by_matrix_512,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_xor_si512,
    _mm512_setzero_si512
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplication as the definition has it: shift, and subtract the polynomial.
    fn slow(a: u8, b: u8) -> u8 {
        let mut product = 0_u16;
        for bit in 0..8 {
            if b & 1 << bit != 0 {
                product ^= u16::from(a) << bit;
            }
        }
        for bit in (8..16).rev() {
            if product & 1 << bit != 0 {
                product ^= 0x11d << (bit - 8);
            }
        }
        u8::try_from(product).unwrap()
    }

    fn buffer(seed: usize, len: usize) -> Vec<Cell<u8>> {
        let mut x = (seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            Cell::new(x.to_le_bytes()[3])
        };
        (0..len).map(|_| next()).collect()
    }

    fn plain(cells: &[Cell<u8>]) -> Vec<u8> {
        cells.iter().map(Cell::get).collect()
    }

    #[test]
    fn tables_equal_the_definition() {
        for a in 0..=255 {
            for b in 0..=255 {
                assert_eq!(mul(a, b), slow(a, b), "{a} * {b}");
            }
            if a != 0 {
                assert_eq!(slow(a, inverse(a)), 1, "1 / {a}");
            }
        }
        let mut x = 1;
        for n in 0..600 {
            assert_eq!(power(n), x, "2^{n}");
            assert_eq!(slow(power(-n), x), 1, "2^-{n}");
            x = slow(x, 2);
        }
    }

    #[test]
    fn every_path_equals_bytewise_for_every_factor_at_any_length_and_alignment() {
        println!("{:?}, chosen {:?}", Path::available(), Path::chosen());
        assert_eq!(Path::chosen(), *Path::available().iter().max().unwrap());
        let lengths = [0, 1, 31, 63, 64, 65, 127, 128, 255, 256, 257, 1031, 4099];
        for path in Path::available() {
            for by in 0..=255_u8 {
                let len = lengths[usize::from(by) % lengths.len()];
                let count = usize::from(by) % 6;
                let memory: Vec<_> = (0..count).map(|s| buffer(s + 3, len + 64)).collect();
                let terms: Vec<Term<'_>> = (0_u8..)
                    .zip(&memory)
                    .map(|(s, m)| {
                        let skip = usize::from(s) * 7 % 61;
                        (by.wrapping_add(s.wrapping_mul(29)), &m[skip..skip + len])
                    })
                    .collect();
                let sum = |i: usize, multiplies: bool| {
                    terms.iter().fold(0, |sum, (by, of)| match multiplies {
                        true => sum ^ slow(*by, of[i].get()),
                        false => sum ^ of[i].get(),
                    })
                };
                for keeps in [false, true] {
                    let targets = [buffer(1, len + 64), buffer(2, len + 64)];
                    let before = targets.each_ref().map(|t| plain(t));
                    let skip = usize::from(by) % 37;
                    let [p, q] = targets.each_ref().map(|t| &t[skip..skip + len]);
                    let expected = |which: usize, multiplies: bool| -> Vec<u8> {
                        let mut all = before[which].clone();
                        for i in 0..len {
                            let old = if keeps { all[skip + i] } else { 0 };
                            all[skip + i] = old ^ sum(i, multiplies);
                        }
                        all
                    };
                    syndromes(path, p, q, &terms, keeps);
                    assert_eq!(
                        plain(&targets[0]),
                        expected(0, false),
                        "P {path:?} {by} {len}"
                    );
                    assert_eq!(
                        plain(&targets[1]),
                        expected(1, true),
                        "Q {path:?} {by} {len}"
                    );
                    for (i, byte) in before[1].iter().enumerate() {
                        targets[1][i].set(*byte);
                    }
                    combine(path, q, &terms, keeps);
                    assert_eq!(plain(&targets[1]), expected(1, true), "{path:?} {by} {len}");
                }
            }
        }
    }
}
