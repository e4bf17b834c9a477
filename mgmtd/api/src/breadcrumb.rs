//! What each owner thread of ublk-target was at: a file on tmpfs that outlives the process, for whoever looks
//! into a death. A slot a thread, 8 words of 8 bytes (native order), written by plain stores.

use crate::ids::GroupUuid;

/// Name of the file in the run directory.
pub const FILE: &str = "breadcrumb";
/// As long as another has that.
pub const STANDBY_FILE: &str = "breadcrumb.standby";
/// Threads that have a slot: those beyond leave none.
pub const SLOTS: usize = 1024;
/// Words of a slot.
pub const WORDS: usize = 8;
/// Bytes of the file.
pub const BYTES: usize = SLOTS * WORDS * 8;

/// Word: not 0, a thread has the slot.
pub const TAKEN: usize = 0;
/// Words: the group, as its bytes lie on disk.
pub const GROUP: [usize; 2] = [1, 2];
/// Word: the signal that the thread died by.
pub const SIGNAL: usize = 3;
/// Word: operation of the request begun last (an index of [`OPS`]), and its tag from bit 32 on.
pub const OP: usize = 4;
/// Word: handle of its LU.
pub const LU: usize = 5;
/// Words: where it is on the LU and how long, in bytes.
pub const AT: usize = 6;
pub const LEN: usize = 7;

/// Operations by their number; 0: none was begun.
pub const OPS: [&str; 6] = ["none", "read", "write", "flush", "discard", "write_zeroes"];

/// A thread that died by a signal of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    pub group: GroupUuid,
    pub signal: i32,
    /// The request begun last, for people; others may have been under way.
    pub request: String,
}

/// Reads the threads that died by a signal of their own out of the file.
pub fn crashes(bytes: &[u8]) -> Vec<Crash> {
    let (words, _) = bytes.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    let (slots, _) = words.as_chunks::<WORDS>();
    slots.iter().filter_map(crash).collect()
}

fn crash(slot: &[u64; WORDS]) -> Option<Crash> {
    let signal = i32::try_from(slot[SIGNAL]).ok().filter(|n| *n != 0)?;
    let mut group = [0; 16];
    group[..8].copy_from_slice(&slot[GROUP[0]].to_ne_bytes());
    group[8..].copy_from_slice(&slot[GROUP[1]].to_ne_bytes());
    let op = usize::try_from(slot[OP] & 0xffff_ffff).ok()?;
    let request = match OPS.get(op) {
        Some(op) if slot[OP] != 0 => {
            let (tag, at, len) = (slot[OP] >> 32, slot[AT], slot[LEN]);
            format!("{op} of {len} bytes at {at} (tag {tag}) was begun last")
        }
        Some(_) | None => "no request had been begun".into(),
    };
    Some(Crash {
        group: GroupUuid::from_bytes(group),
        signal,
        request,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crashes_are_slots_with_a_signal() {
        let mut words = [0_u64; 3 * WORDS];
        for slot in 0..3 {
            words[slot * WORDS + TAKEN] = 1;
            words[slot * WORDS + GROUP[0]] = u64::from_ne_bytes([7; 8]);
            words[slot * WORDS + GROUP[1]] = u64::from_ne_bytes([7; 8]);
        }
        words[WORDS + SIGNAL] = 11;
        words[WORDS + OP] = 5 << 32 | 2;
        words[WORDS + LEN] = 4096;
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes.push(1);
        let found = crashes(&bytes);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].group, GroupUuid::from_bytes([7; 16]));
        assert_eq!(found[0].signal, 11);
        assert_eq!(
            found[0].request,
            "write of 4096 bytes at 0 (tag 5) was begun last"
        );
        assert!(crashes(&[]).is_empty());
    }
}
