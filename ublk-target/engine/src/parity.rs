//! XOR over the private memory of a group, as wide as the CPU can.
//!
//! The only file of the engine with `unsafe`. Buffers are `&[Cell<u8>]`, because the kernel (DMA) may look at
//! them; a slice of cells may be written through a shared reference, and two of them may be the same memory.
//! The functions here refuse overlap of target and sources, take any length and alignment, and read every
//! source once: one pass over memory for up to [`SOURCES_PER_PASS`] operands.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::OnceLock;

/// Operands of one pass over memory; more are done in several passes.
pub const SOURCES_PER_PASS: usize = 5;

/// Which instructions do the work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Path {
    /// 64-bit words; every CPU.
    Portable,
    /// 256-bit vectors.
    Avx2,
    /// 512-bit vectors.
    Avx512,
}

impl Path {
    /// Returns the paths of this CPU, best last.
    pub fn available() -> Vec<Self> {
        let mut paths = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx2") {
                paths.push(Self::Avx2);
            }
            if std::arch::is_x86_feature_detected!("avx512f") {
                paths.push(Self::Avx512);
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

/// `dst ^= all srcs`.
///
/// # Shape   all of one length, any alignment, any count of sources
/// # Panics  if the lengths differ or a source overlaps `dst`
pub fn xor_into(dst: &[Cell<u8>], srcs: &[&[Cell<u8>]]) {
    check_operands(dst, srcs);
    xor_into_by(Path::chosen(), dst, srcs);
}

/// `dst = xor of all srcs`; without sources, zeroes.
///
/// # Shape   all of one length, any alignment, any count of sources
/// # Panics  if the lengths differ or a source overlaps `dst`
pub fn xor_to(dst: &[Cell<u8>], srcs: &[&[Cell<u8>]]) {
    check_operands(dst, srcs);
    xor_to_by(Path::chosen(), dst, srcs);
}

/// Copies `src` to `dst`; they may overlap.
///
/// # Panics  if the lengths differ
pub fn copy(dst: &[Cell<u8>], src: &[Cell<u8>]) {
    assert_eq!(dst.len(), src.len(), "copy of different lengths");
    // SAFETY: both pointers cover `len` bytes that live as long as the borrows; cells may be written through
    // a shared borrow; `ptr::copy` allows overlap.
    unsafe { std::ptr::copy(start(src), start_mut(dst), src.len()) }
}

/// Fills with zeroes.
pub fn zero(dst: &[Cell<u8>]) {
    // SAFETY: the pointer covers `len` bytes that live as long as the borrow; cells may be written through it.
    unsafe { std::ptr::write_bytes(start_mut(dst), 0, dst.len()) }
}

/// Copies plain bytes in.
///
/// # Panics  if the lengths differ
pub fn copy_in(dst: &[Cell<u8>], src: &[u8]) {
    assert_eq!(dst.len(), src.len(), "copy of different lengths");
    // SAFETY: both pointers cover `len` bytes; `src` is not made of cells, so nothing of it is in `dst`.
    unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), start_mut(dst), src.len()) }
}

/// Copies out into plain bytes.
///
/// # Panics  if the lengths differ
pub fn copy_out(dst: &mut [u8], src: &[Cell<u8>]) {
    assert_eq!(dst.len(), src.len(), "copy of different lengths");
    // SAFETY: both pointers cover `len` bytes; `dst` is borrowed alone, so nothing of `src` is in it.
    unsafe { std::ptr::copy_nonoverlapping(start(src), dst.as_mut_ptr(), src.len()) }
}

/// Says whether every byte is zero; ends at the first block that is not.
pub fn is_zero(src: &[Cell<u8>]) -> bool {
    const BLOCK: usize = 256;
    let mut at = 0;
    while at + BLOCK <= src.len() {
        let mut any = 0;
        for word in 0..BLOCK / 8 {
            // SAFETY: `at + BLOCK <= len`, so the 8 bytes are inside; read_unaligned needs no alignment.
            any |= unsafe { start(src).add(at + word * 8).cast::<u64>().read_unaligned() };
        }
        if any != 0 {
            return false;
        }
        at += BLOCK;
    }
    src[at..].iter().all(|byte| byte.get() == 0)
}

/// Says whether two buffers hold the same; ends at the first block that differs.
///
/// # Panics  if the lengths differ
pub fn is_equal(a: &[Cell<u8>], b: &[Cell<u8>]) -> bool {
    const BLOCK: usize = 256;
    assert_eq!(a.len(), b.len(), "comparison of different lengths");
    let mut at = 0;
    while at + BLOCK <= a.len() {
        let mut any = 0;
        for word in 0..BLOCK / 8 {
            let offset = at + word * 8;
            // SAFETY: `at + BLOCK <= len` of both, so the 8 bytes are inside; no alignment is needed.
            any |= unsafe {
                start(a).add(offset).cast::<u64>().read_unaligned()
                    ^ start(b).add(offset).cast::<u64>().read_unaligned()
            };
        }
        if any != 0 {
            return false;
        }
        at += BLOCK;
    }
    a[at..]
        .iter()
        .zip(&b[at..])
        .all(|(a, b)| a.get() == b.get())
}

fn start(cells: &[Cell<u8>]) -> *const u8 {
    cells.as_ptr().cast()
}

/// The pointer may be written: it comes from cells.
fn start_mut(cells: &[Cell<u8>]) -> *mut u8 {
    cells.as_ptr().cast::<u8>().cast_mut()
}

fn check_operands(dst: &[Cell<u8>], srcs: &[&[Cell<u8>]]) {
    let to = dst.as_ptr_range();
    for src in srcs {
        assert_eq!(dst.len(), src.len(), "xor of different lengths");
        let from = src.as_ptr_range();
        let is_apart = from.end <= to.start || to.end <= from.start;
        assert!(is_apart || dst.is_empty(), "xor onto one of its sources");
    }
}

fn xor_into_by(path: Path, dst: &[Cell<u8>], srcs: &[&[Cell<u8>]]) {
    for srcs in srcs.chunks(SOURCES_PER_PASS - 1) {
        let d = start(dst);
        match *srcs {
            [a] => pass(path, dst, [d, start(a)]),
            [a, b] => pass(path, dst, [d, start(a), start(b)]),
            [a, b, c] => pass(path, dst, [d, start(a), start(b), start(c)]),
            [a, b, c, e] => pass(path, dst, [d, start(a), start(b), start(c), start(e)]),
            _ => unreachable!("chunks of 1 to 4"),
        }
    }
}

fn xor_to_by(path: Path, dst: &[Cell<u8>], srcs: &[&[Cell<u8>]]) {
    let (first, rest) = srcs.split_at(srcs.len().min(SOURCES_PER_PASS));
    match *first {
        [] => zero(dst),
        [a] => copy(dst, a),
        [a, b] => pass(path, dst, [a, b].map(start)),
        [a, b, c] => pass(path, dst, [a, b, c].map(start)),
        [a, b, c, d] => pass(path, dst, [a, b, c, d].map(start)),
        [a, b, c, d, e] => pass(path, dst, [a, b, c, d, e].map(start)),
        _ => unreachable!("at most {SOURCES_PER_PASS}"),
    }
    xor_into_by(path, dst, rest);
}

/// One pass: `dst = xor of srcs`. Callers give pointers to slices of the length of `dst`, checked by
/// `check_operands`; a source may be `dst` itself.
fn pass<const N: usize>(path: Path, dst: &[Cell<u8>], srcs: [*const u8; N]) {
    let (to, len) = (start_mut(dst), dst.len());
    match path {
        // SAFETY: every pointer covers `len` bytes of live cells (see above).
        Path::Portable => unsafe { pass_portable(to, srcs, 0, len) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; `Path` says Avx2 only where the CPU has it.
        Path::Avx2 => unsafe { pass_avx2(to, srcs, len) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above; `Path` says Avx512 only where the CPU has it.
        Path::Avx512 => unsafe { pass_avx512(to, srcs, len) },
        #[cfg(not(target_arch = "x86_64"))]
        Path::Avx2 | Path::Avx512 => unreachable!("x86-64 only"),
    }
}

/// Does bytes `[at, len)`.
///
/// # Safety
/// `to` and every source cover `len` bytes; each source is `to` itself or apart from it.
unsafe fn pass_portable<const N: usize>(
    to: *mut u8,
    srcs: [*const u8; N],
    mut at: usize,
    len: usize,
) {
    const STEP: usize = 32;
    while at + STEP <= len {
        let mut sum = [0_u64; STEP / 8];
        for src in srcs {
            // SAFETY: `at + STEP <= len`; read_unaligned needs no alignment.
            let words = unsafe { src.add(at).cast::<[u64; STEP / 8]>().read_unaligned() };
            for (sum, word) in sum.iter_mut().zip(words) {
                *sum ^= word;
            }
        }
        // SAFETY: `at + STEP <= len`; write_unaligned needs no alignment.
        unsafe { to.add(at).cast::<[u64; STEP / 8]>().write_unaligned(sum) };
        at += STEP;
    }
    while at < len {
        let mut sum = 0;
        for src in srcs {
            // SAFETY: `at < len`.
            sum ^= unsafe { *src.add(at) };
        }
        // SAFETY: `at < len`.
        unsafe { *to.add(at) = sum };
        at += 1;
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! vector_pass {
    ($name:ident, $feature:literal, $vector:ident, $load:ident, $store:ident, $xor:ident) => {
        /// Four vectors a turn, then the rest in words.
        ///
        /// # Safety
        /// The CPU has the feature; `to` and every source cover `len` bytes; each source is `to` itself or
        /// apart from it.
        #[target_feature(enable = $feature)]
        unsafe fn $name<const N: usize>(to: *mut u8, srcs: [*const u8; N], len: usize) {
            use std::arch::x86_64::{$load, $store, $vector, $xor};
            const WIDTH: usize = size_of::<$vector>();
            const STEP: usize = 4 * WIDTH;
            let mut at = 0;
            while at + STEP <= len {
                for part in 0..4 {
                    let offset = at + part * WIDTH;
                    // SAFETY: `at + STEP <= len`; the unaligned load needs no alignment.
                    let mut sum = unsafe { $load(srcs[0].add(offset).cast()) };
                    for src in &srcs[1..] {
                        // SAFETY: as above.
                        sum = $xor(sum, unsafe { $load(src.add(offset).cast()) });
                    }
                    // SAFETY: as above, for the store.
                    unsafe { $store(to.add(offset).cast(), sum) };
                }
                at += STEP;
            }
            // SAFETY: the same pointers and length.
            unsafe { pass_portable(to, srcs, at, len) };
        }
    };
}

#[cfg(target_arch = "x86_64")]
vector_pass!(
    pass_avx2,
    "avx2",
    __m256i,
    _mm256_loadu_si256,
    _mm256_storeu_si256,
    _mm256_xor_si256
);
#[cfg(target_arch = "x86_64")]
vector_pass!(
    pass_avx512,
    "avx512f",
    __m512i,
    _mm512_loadu_si512,
    _mm512_storeu_si512,
    _mm512_xor_si512
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that look random and differ by buffer.
    fn buffer(seed: usize, len: usize) -> Vec<Cell<u8>> {
        let mut x = (seed as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        (0..len)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                Cell::new(x.to_le_bytes()[3])
            })
            .collect()
    }

    fn plain(cells: &[Cell<u8>]) -> Vec<u8> {
        cells.iter().map(Cell::get).collect()
    }

    fn bytewise(len: usize, operands: &[&[Cell<u8>]]) -> Vec<u8> {
        (0..len)
            .map(|i| operands.iter().fold(0, |sum, src| sum ^ src[i].get()))
            .collect()
    }

    const LENGTHS: [usize; 18] = [
        0, 1, 7, 8, 31, 32, 33, 63, 127, 128, 129, 255, 256, 257, 511, 1031, 4096, 4099,
    ];

    #[test]
    fn every_path_equals_bytewise_at_any_length_and_alignment() {
        for path in Path::available() {
            for count in 0..=11 {
                for (i, len) in LENGTHS.into_iter().enumerate() {
                    let memory: Vec<_> = (0..count).map(|s| buffer(s + 2, len + 64)).collect();
                    let srcs: Vec<_> = memory
                        .iter()
                        .enumerate()
                        .map(|(s, m)| {
                            let skip = (s * 7 + i * 3) % 61;
                            &m[skip..skip + len]
                        })
                        .collect();
                    let target = buffer(1, len + 64);
                    let skip = (i * 5 + count) % 37;
                    let dst = &target[skip..skip + len];
                    let around = (plain(&target[..skip]), plain(&target[skip + len..]));

                    let with_dst: Vec<_> = srcs.iter().copied().chain([dst]).collect();
                    let expected = bytewise(len, &with_dst);
                    xor_into_by(path, dst, &srcs);
                    assert_eq!(plain(dst), expected, "into, {path:?}, {count} x {len}");

                    xor_to_by(path, dst, &srcs);
                    let expected = bytewise(len, &srcs);
                    assert_eq!(plain(dst), expected, "to, {path:?}, {count} x {len}");
                    let after = (plain(&target[..skip]), plain(&target[skip + len..]));
                    assert_eq!(after, around, "neighbours, {path:?}, {count} x {len}");
                }
            }
        }
    }

    #[test]
    fn chosen_path_is_the_best_available() {
        let available = Path::available();
        println!(
            "xor paths of this CPU: {available:?}, chosen: {:?}",
            Path::chosen()
        );
        assert_eq!(Path::chosen(), *available.iter().max().unwrap());
    }

    #[test]
    fn public_functions_take_the_chosen_path() {
        let (a, b, dst) = (buffer(1, 5000), buffer(2, 5000), buffer(3, 5000));
        xor_to(&dst, &[&a, &b]);
        assert_eq!(plain(&dst), bytewise(5000, &[&a, &b]));
        xor_into(&dst, &[&b]);
        assert!(is_equal(&dst, &a));
    }

    #[test]
    fn copies_move_every_byte() {
        let a = buffer(1, 777);
        let b = buffer(2, 777);
        copy(&b, &a);
        assert_eq!(plain(&b), plain(&a));
        let mut out = vec![0; 777];
        copy_out(&mut out, &a);
        assert_eq!(out, plain(&a));
        zero(&a);
        copy_in(&b[1..], &out[1..]);
        assert_eq!(plain(&b)[1..], out[1..]);
        assert!(is_zero(&a));
    }

    #[test]
    fn copy_of_overlapping_cells_is_a_move() {
        let a = buffer(1, 100);
        let before = plain(&a);
        copy(&a[3..], &a[..97]);
        assert_eq!(plain(&a)[3..], before[..97]);
    }

    #[test]
    fn is_zero_and_is_equal_see_every_byte() {
        for len in LENGTHS {
            let (a, b) = (buffer(1, len), buffer(2, len));
            zero(&a);
            zero(&b);
            assert!(is_zero(&a) && is_equal(&a, &b));
            for i in 0..len {
                a[i].set(0x40);
                assert!(
                    !is_zero(&a) && !is_equal(&a, &b) && !is_equal(&b, &a),
                    "{i} of {len}"
                );
                a[i].set(0);
            }
        }
    }

    #[test]
    fn xor_refuses_overlap_and_different_lengths() {
        let a = buffer(1, 64);
        for (dst, src) in [
            (0..32, 31..63),
            (0..32, 0..32),
            (8..40, 0..32),
            (0..32, 32..63),
        ] {
            let caught = std::panic::catch_unwind(|| {
                let a = buffer(1, 64);
                xor_to(&a[dst.clone()], &[&a[src.clone()]]);
            });
            assert!(caught.is_err(), "{dst:?} {src:?}");
        }
        xor_to(&a[..32], &[&a[32..]]);
    }
}
