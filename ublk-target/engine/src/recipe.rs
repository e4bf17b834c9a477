//! How a part of a stripe is computed from other parts: each times a factor, summed. Pure.
//!
//! Parts are numbered as in `geometry`: data chunks from 0, then P, then Q. P is the sum of the data, Q the sum of
//! `g^i` times chunk `i` (`g` is 2). Any as many parts as there are data chunks determine all others:
//!
//! ```text
//! a lost, P there:        a = P + sum(d_i)                                       i: all other data
//! a lost, Q there:        a = (Q + sum(g^i d_i)) / g^a
//! a and b lost:           a = (g^b P + Q + sum((g^b + g^i) d_i)) / (g^a + g^b)   i: all data but a and b
//! ```

use arrayvec::ArrayVec;

use crate::gf::{inverse, mul, power};
use crate::limits::MEMBERS_MAX;

/// Parts and their factors.
pub type Recipe = ArrayVec<(u16, u8), MEMBERS_MAX>;

/// Says how to compute part `target` from the parts `there` (as bits; `target` itself is not used). `None` if they do
/// not determine it. P is preferred to Q.
pub fn recipe(data: u16, parities: u16, target: u16, there: u64) -> Option<Recipe> {
    let (p, q) = (data, data + 1);
    let has = |part: u16| part != target && part < data + parities && there & 1 << part != 0;
    let g = |part: u16| power(i32::from(part));
    // What cannot be had of the data, the target left out.
    let mut gaps = (0..data).filter(|part| *part != target && !has(*part));
    let gap = gaps.next();
    if gaps.next().is_some() {
        return None;
    }
    let mut recipe = Recipe::new();
    let mut from = |factor: &dyn Fn(u16) -> u8, parity: &[(u16, u8)]| {
        let others = (0..data).filter(|part| has(*part));
        recipe.extend(others.map(|part| (part, factor(part))));
        recipe.extend(parity.iter().copied());
    };
    match gap {
        None if target == p => from(&|_| 1, &[]),
        None if target == q => from(&g, &[]),
        None if has(p) => from(&|_| 1, &[(p, 1)]),
        None if has(q) => {
            let over = inverse(g(target));
            from(&|part| mul(g(part), over), &[(q, over)]);
        }
        Some(a) if target == p && has(q) => {
            let over = inverse(g(a));
            from(&|part| 1 ^ mul(g(part), over), &[(q, over)]);
        }
        Some(a) if target == q && has(p) => from(&|part| g(part) ^ g(a), &[(p, g(a))]),
        Some(b) if target < data && has(p) && has(q) => {
            let over = inverse(g(target) ^ g(b));
            let factor = |part| mul(g(b) ^ g(part), over);
            from(&factor, &[(p, mul(g(b), over)), (q, over)]);
        }
        None | Some(_) => return None,
    }
    Some(recipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts of a stripe of bytes.
    fn stripe(data: &[u8], parities: u16) -> Vec<u8> {
        let p = data.iter().fold(0, |sum, d| sum ^ d);
        let q = data
            .iter()
            .zip(0..)
            .fold(0, |sum, (d, i)| sum ^ mul(power(i), *d));
        let mut parts = data.to_vec();
        parts.extend([p, q].iter().take(usize::from(parities)));
        parts
    }

    #[test]
    fn every_part_is_computed_from_every_set_of_parts_that_determines_it_and_from_no_other() {
        for (parities, data) in (1..=2).flat_map(|p| (2..=6_u16).map(move |d| (p, d))) {
            let bytes: Vec<u8> = (1..=u8::try_from(data).unwrap()).map(|i| i * 37).collect();
            let parts = stripe(&bytes, parities);
            let all = data + parities;
            for target in 0..all {
                for there in 0..1_u64 << all {
                    let others = there & !(1 << target);
                    let found = recipe(data, parities, target, there);
                    let is_determined = others.count_ones() >= u32::from(data);
                    assert_eq!(
                        found.is_some(),
                        is_determined,
                        "{data}+{parities}: {target} {there:b}"
                    );
                    let Some(found) = found else { continue };
                    let sum = found.iter().fold(0, |sum, (part, by)| {
                        assert!(others & 1 << part != 0, "{part} is not there");
                        sum ^ mul(*by, parts[usize::from(*part)])
                    });
                    assert_eq!(
                        sum,
                        parts[usize::from(target)],
                        "{data}+{parities}: {target} {there:b}"
                    );
                }
            }
        }
    }

    #[test]
    fn every_pair_lost_of_the_widest_stripe_comes_back() {
        let bytes: Vec<u8> = (0..62_u8).map(|i| i.wrapping_mul(91) ^ 7).collect();
        let parts = stripe(&bytes, 2);
        for (a, b) in (0..64_u16).flat_map(|a| (0..64).map(move |b| (a, b))) {
            let there = !(1_u64 << a | 1 << b);
            let found = recipe(62, 2, a, there).unwrap();
            let sum = found.iter().fold(0, |sum, (part, by)| {
                sum ^ mul(*by, parts[usize::from(*part)])
            });
            assert_eq!(sum, parts[usize::from(a)], "{a} without {b}");
        }
    }
}
