//! How well a member is: errors that count against it, and how fast it answers beside its peers.
//!
//! Nothing here reads the clock for an I/O: how long one takes is what was seen in flight, over what ended (Little's law).
//! A member is judged by windows of some seconds, and only by those in which it had enough to do.

use std::cell::Cell;

use arrayvec::ArrayVec;

use crate::limits::{
    MAX_IO, MEMBERS_MAX, SLOW_IOS_MIN, SLOW_LATENCY_MIN, SLOW_TIMES, SLOW_WINDOWS,
    STRIKES_HALVE_AFTER,
};
use crate::traits::{SECOND, Tick};

/// Errors that count against a member; each hour halves them (md's `max_corrected_read_errors`).
#[derive(Debug, Default)]
pub(crate) struct Strikes {
    count: Cell<u32>,
    /// When they were halved last.
    since: Cell<Tick>,
    /// When and where the last was.
    last: Cell<Option<(Tick, u64)>>,
}

impl Strikes {
    /// Those that count now.
    pub(crate) fn get(&self, now: Tick) -> u32 {
        let hours = now.0.saturating_sub(self.since.get().0) / STRIKES_HALVE_AFTER;
        let shift = u32::try_from(hours).unwrap_or(u32::MAX);
        self.count.get().checked_shr(shift).unwrap_or(0)
    }

    /// Counts one at byte `at` of the member. One sector that is bad fails the whole of a long read, and all that it
    /// read is repaired, piece by piece: what is near the last one and comes right after it counts for the same.
    pub(crate) fn add(&self, now: Tick, at: u64) {
        let last = self.last.replace(Some((now, at)));
        let is_same = |(when, place): (Tick, u64)| {
            now.0.saturating_sub(when.0) < SECOND && at.abs_diff(place) <= MAX_IO
        };
        if last.is_some_and(is_same) {
            return;
        }
        let left = self.get(now);
        let passed = now.0.saturating_sub(self.since.get().0);
        // The first begins an hour of its own.
        self.since.set(match left {
            0 => now,
            _ => Tick(now.0 - passed % STRIKES_HALVE_AFTER),
        });
        self.count.set(left.saturating_add(1));
    }
}

/// What a member did in a window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Window {
    /// I/Os that ended.
    pub ended: u64,
    /// Nanoseconds that its I/Os were in flight, all together.
    pub waited: u64,
    /// Nanoseconds that any was.
    pub busy: u64,
}

impl Window {
    fn per_io(&self, ns: u64) -> u64 {
        ns / self.ended.max(1)
    }

    /// Nanoseconds that an I/O took.
    pub(crate) fn latency(&self) -> u64 {
        self.per_io(self.waited)
    }
}

/// What is known of how fast a member answers.
#[derive(Debug, Default)]
pub(crate) struct Speed {
    in_flight: Cell<u32>,
    ended: Cell<u64>,
    window: Cell<Window>,
    /// What had ended when the window began.
    ended_before: Cell<u64>,
    /// Nanoseconds of an I/O in the last window that had any.
    pub latency: Cell<u64>,
    /// Windows that spoke against what is said of it, one after the other.
    streak: Cell<u32>,
    /// It is named slow: its latency and that of its peers then.
    pub slow: Cell<Option<(u64, u64)>>,
}

impl Speed {
    pub(crate) fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    pub(crate) fn end(&self) {
        self.in_flight.set(self.in_flight.get().saturating_sub(1));
        self.ended.set(self.ended.get().wrapping_add(1));
    }

    /// I/Os that have ended, and those under way: when neither changes nothing goes on.
    pub(crate) fn seen(&self) -> (u64, u32) {
        (self.ended.get(), self.in_flight.get())
    }

    /// What is in flight now was so for `ns`.
    pub(crate) fn sample(&self, ns: u64) {
        let in_flight = u64::from(self.in_flight.get());
        let window = self.window.get();
        self.window.set(Window {
            waited: window.waited.saturating_add(ns.saturating_mul(in_flight)),
            busy: window.busy + if in_flight > 0 { ns } else { 0 },
            ..window
        });
    }

    /// Ends the window.
    pub(crate) fn close(&self) -> Window {
        let ended = self.ended.get();
        let before = self.ended_before.replace(ended);
        let window = Window {
            ended: ended.wrapping_sub(before),
            ..self.window.take()
        };
        if window.ended > 0 || window.waited > 0 {
            self.latency.set(window.latency());
        }
        window
    }

    /// Takes a window's word; returns true when what is said of the member has changed.
    pub(crate) fn judge(&self, verdict: Option<Verdict>) -> bool {
        let Some(verdict) = verdict else {
            return false;
        };
        let is_named = self.slow.get().is_some();
        if verdict.is_slow == is_named {
            self.streak.set(0);
            return false;
        }
        self.streak.set(self.streak.get() + 1);
        if self.streak.get() < SLOW_WINDOWS {
            return false;
        }
        self.streak.set(0);
        let slow = verdict.is_slow.then_some((verdict.latency, verdict.peers));
        self.slow.set(slow);
        true
    }
}

/// What a window says of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub is_slow: bool,
    /// Nanoseconds of an I/O.
    pub latency: u64,
    /// The median of its peers.
    pub peers: u64,
}

/// What a window says of member `own`; none if it or its peers had too little to do.
///
/// Slow is who takes [`SLOW_TIMES`] as long as the median of the others, and that for each I/O it was busy with, too: one
/// that only has a longer queue than they is not.
pub(crate) fn judge(windows: &[Window], own: usize) -> Option<Verdict> {
    let is_enough = |window: &Window| window.ended >= SLOW_IOS_MIN;
    let mine = windows.get(own)?;
    // One that ends nothing and always has something to do says enough.
    let hangs = mine.ended == 0 && mine.waited >= SLOW_LATENCY_MIN * SLOW_IOS_MIN;
    if !is_enough(mine) && !hangs {
        return None;
    }
    let peers: ArrayVec<&Window, MEMBERS_MAX> = windows
        .iter()
        .enumerate()
        .filter(|(i, window)| *i != own && is_enough(window))
        .map(|(_, window)| window)
        .collect();
    let median = |of: &dyn Fn(&Window) -> u64| {
        let mut all: ArrayVec<u64, MEMBERS_MAX> = peers.iter().map(|window| of(window)).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied()
    };
    let peers_latency = median(&Window::latency)?;
    let peers_busy = median(&|window| window.per_io(window.busy))?;
    let (latency, busy) = (mine.latency(), mine.per_io(mine.busy));
    let is_slow = latency >= SLOW_LATENCY_MIN
        && latency >= peers_latency.saturating_mul(SLOW_TIMES)
        && busy >= peers_busy.saturating_mul(SLOW_TIMES);
    Some(Verdict {
        is_slow,
        latency,
        peers: peers_latency,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traits::MILLISECOND;

    fn window(ended: u64, latency: u64, queue: u64) -> Window {
        Window {
            ended,
            waited: ended * latency,
            busy: ended * latency / queue,
        }
    }

    #[test]
    fn strikes_are_halved_each_hour() {
        let (strikes, hour) = (Strikes::default(), STRIKES_HALVE_AFTER);
        let begun = 5 * hour + 7;
        for n in 0..9 {
            strikes.add(Tick(begun), n << 30);
        }
        for (passed, left) in [(hour - 1, 9), (hour, 4), (2 * hour, 2), (4 * hour, 0)] {
            assert_eq!(strikes.get(Tick(begun + passed)), left, "{passed}");
        }
        // What is added later does not make the older ones young.
        strikes.add(Tick(begun + hour + hour / 2), 0);
        assert_eq!(strikes.get(Tick(begun + hour + hour / 2)), 5);
        assert_eq!(strikes.get(Tick(begun + 2 * hour)), 2);
        assert_eq!(strikes.get(Tick(begun + 1000 * hour)), 0);
    }

    #[test]
    fn pieces_of_one_read_count_once() {
        let (strikes, now) = (Strikes::default(), Tick(90 * SECOND));
        for piece in 0..16 {
            strikes.add(now, (1 << 30) + piece * 65536);
        }
        assert_eq!(strikes.get(now), 1);
        // Elsewhere, and there again later.
        strikes.add(now, 1 << 40);
        assert_eq!(strikes.get(now), 2);
        strikes.add(Tick(now.0 + SECOND), 1 << 40);
        assert_eq!(strikes.get(now), 3);
    }

    #[test]
    fn slow_is_who_is_much_slower_than_the_median_of_its_peers() {
        let ms = MILLISECOND;
        let fast = window(100, ms / 10, 1);
        let slow = window(100, 50 * ms, 1);
        for (windows, expected) in [
            (vec![slow, fast, fast, fast], Some(true)),
            (vec![slow, fast], Some(true)),
            // Two of four: each has a fast median beside it.
            (vec![slow, slow, fast, fast, fast], Some(true)),
            // All are: nobody is slower than the others.
            (vec![slow, slow, slow], Some(false)),
            (
                vec![slow, window(100, 10 * ms, 1), window(100, 9 * ms, 1)],
                Some(false),
            ),
            // Many times as long, but nobody would notice.
            (vec![window(100, 5 * ms, 1), fast, fast], Some(false)),
            // It has a longer queue, and is as fast as they.
            (
                vec![window(3000, 256 * ms, 32), window(100, 8 * ms, 1)],
                Some(false),
            ),
            // Too little to do, itself or the others.
            (vec![window(SLOW_IOS_MIN - 1, 50 * ms, 1), fast], None),
            (vec![slow, window(3, ms, 1), Window::default()], None),
            (vec![slow], None),
            // Nothing ends at all.
            (
                vec![
                    Window {
                        ended: 0,
                        waited: 5 * SECOND,
                        busy: 5 * SECOND,
                    },
                    fast,
                    fast,
                ],
                Some(true),
            ),
        ] {
            let verdict = judge(&windows, 0);
            assert_eq!(verdict.map(|v| v.is_slow), expected, "{windows:?}");
        }
    }

    #[test]
    fn name_comes_and_goes_after_some_windows_in_a_row() {
        let speed = Speed::default();
        let verdict = |is_slow| {
            Some(Verdict {
                is_slow,
                latency: 9,
                peers: 1,
            })
        };
        let say = |is_slow, times: u32| {
            let changed = (0..times).filter(|_| speed.judge(verdict(is_slow))).count();
            (changed, speed.slow.get().is_some())
        };
        assert_eq!(say(true, SLOW_WINDOWS - 1), (0, false));
        assert_eq!(say(false, 1), (0, false));
        assert_eq!(say(true, SLOW_WINDOWS - 1), (0, false));
        // One that says nothing breaks no row.
        assert!(!speed.judge(None));
        assert_eq!(say(true, 1), (1, true));
        assert_eq!(speed.slow.get(), Some((9, 1)));
        assert_eq!(say(true, 9), (0, true));
        assert_eq!(say(false, SLOW_WINDOWS - 1), (0, true));
        assert_eq!(say(false, 1), (1, false));
    }

    #[test]
    fn latency_is_what_was_in_flight_over_what_ended() {
        let speed = Speed::default();
        for _ in 0..4 {
            speed.begin();
        }
        speed.sample(SECOND);
        speed.end();
        speed.end();
        speed.sample(SECOND);
        let window = speed.close();
        assert_eq!(
            window,
            Window {
                ended: 2,
                waited: 6 * SECOND,
                busy: 2 * SECOND
            }
        );
        assert_eq!(speed.latency.get(), 3 * SECOND);
        // What is in flight goes on into the next.
        speed.end();
        speed.end();
        speed.sample(SECOND);
        assert_eq!(
            speed.close(),
            Window {
                ended: 2,
                ..Window::default()
            }
        );
    }
}
