//! What a sector, and a file, says of itself: which place it is, of which run, and which write put it there.

/// Bytes of a sector.
pub(super) const SECTOR: usize = 512;
/// A stamp is repeated to fill a sector.
const STAMP: usize = 32;

/// The stamp of write `seq` to place `place` of run `run`.
fn stamp(run: u64, place: u64, seq: u64) -> [u8; STAMP] {
    let mut stamp = [0; STAMP];
    let check = mix(run ^ mix(place ^ mix(seq)));
    for (to, word) in stamp.chunks_exact_mut(8).zip([run, place, seq, check]) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    stamp
}

/// A number that depends on every bit of another.
pub(super) fn mix(from: u64) -> u64 {
    let mut z = from.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills sectors from `place` on.
pub(super) fn fill(run: u64, place: u64, seq: u64, bytes: &mut [u8]) {
    for (place, sector) in (place..).zip(bytes.chunks_exact_mut(SECTOR)) {
        let stamp = stamp(run, place, seq);
        for to in sector.chunks_exact_mut(STAMP) {
            to.copy_from_slice(&stamp);
        }
    }
}

/// Returns which write a sector is of; 0: none, it is all zeroes.
///
/// # Errors  it is no write's, another run's or another place's, or of two writes
pub(super) fn read(run: u64, place: u64, sector: &[u8]) -> Result<u64, String> {
    if sector.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("8 bytes"));
    let (of_run, of_place, seq) = (word(0), word(8), word(16));
    if sector[..STAMP] != stamp(of_run, of_place, seq) {
        return Err(format!("no stamp: {:02x?}", &sector[..16]));
    }
    if (of_run, of_place) != (run, place) {
        return Err(format!("stamp of run {of_run:x}, place {of_place}"));
    }
    if sector
        .chunks_exact(STAMP)
        .any(|part| part != &sector[..STAMP])
    {
        return Err(format!("write {seq:x} is there in part"));
    }
    Ok(seq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamp_read_back_only_whole_and_in_its_place() {
        let mut bytes = vec![0; 2 * SECTOR];
        fill(1, 10, 77, &mut bytes);
        let (first, second) = bytes.split_at(SECTOR);
        assert_eq!(read(1, 10, first), Ok(77));
        assert_eq!(read(1, 11, second), Ok(77));
        assert!(read(1, 11, first).is_err());
        assert!(read(2, 10, first).is_err());
        assert_eq!(read(1, 10, &[0; SECTOR]), Ok(0));
        let mut torn = first.to_vec();
        torn[256..].fill(0);
        assert!(read(1, 10, &torn).is_err());
        torn.fill(9);
        assert!(read(1, 10, &torn).is_err());
    }
}
