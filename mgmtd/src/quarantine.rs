//! Which groups make ublk-target crash: two crashes within a minute that name one group quarantine it.
//!
//! A crash is a signal that an owner thread got for what it did itself (a fault, or the abort of a panic); the thread
//! leaves it in its breadcrumb. SIGKILL from outside leaves none and counts for nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use lunar_api::GroupUuid;
use lunar_api::breadcrumb::{Crash, FILE, crashes};
use nix::sys::signal::Signal;

use crate::limits::{CRASH_WINDOW, CRASHES_MAX};

/// The crashes of late.
#[derive(Debug, Default)]
pub struct Crashes(BTreeMap<GroupUuid, Vec<Instant>>);

/// Takes what a dead ublk-target left: read once, then gone.
pub fn take(run_dir: &Path) -> Vec<Crash> {
    let path = run_dir.join(FILE);
    let bytes = std::fs::read(&path).unwrap_or_default();
    let _ = std::fs::remove_file(path);
    crashes(&bytes)
}

/// A crash, for people.
pub fn describe(crash: &Crash) -> String {
    let name = Signal::try_from(crash.signal).map_or("a signal", Signal::as_str);
    format!("{name} in the thread of the group; {}", crash.request)
}

impl Crashes {
    /// Counts a crash; the text of why the group is quarantined now, if it is.
    pub fn count(&mut self, crash: &Crash, now: Instant) -> Option<String> {
        let of_group = self.0.entry(crash.group).or_default();
        of_group.retain(|at| now.duration_since(*at) < CRASH_WINDOW);
        of_group.push(now);
        if of_group.len() < CRASHES_MAX {
            return None;
        }
        // A start by hand begins to count anew.
        let count = of_group.len();
        of_group.clear();
        let seconds = CRASH_WINDOW.as_secs();
        let last = describe(crash);
        Some(format!(
            "ublk-target crashed {count} times within {seconds} s by it, last by {last}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn crash(group: u8) -> Crash {
        Crash {
            group: GroupUuid::from_bytes([group; 16]),
            signal: 11,
            request: "no request had been begun".into(),
        }
    }

    #[test]
    fn count_wants_two_of_one_group_in_a_minute() {
        let (start, mut crashes) = (Instant::now(), Crashes::default());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(crashes.count(&crash(1), at(0)), None);
        assert_eq!(crashes.count(&crash(2), at(1)), None);
        assert_eq!(crashes.count(&crash(1), at(61)), None);
        let why = crashes.count(&crash(1), at(90)).unwrap();
        assert!(why.contains("2 times") && why.contains("SIGSEGV"), "{why}");
        // Started by hand: one more crash is one.
        assert_eq!(crashes.count(&crash(1), at(91)), None);
    }

    #[test]
    fn take_of_nothing_is_nothing() {
        assert!(take(Path::new("/nonexistent")).is_empty());
    }
}
