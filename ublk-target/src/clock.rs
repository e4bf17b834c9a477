//! Time of an owner thread: handed to the engine, with the waits that hang on it.
//!
//! The clock is not read every turn: where it is a system call that is half of what a turn costs. It is read when a
//! wait is due and every [`TURNS`] turns. The kernel ends the ring's wait at the next due time, so what
//! [`Timers::now`] says is late by no more than the time to the next wait, or by [`TURNS`] busy turns.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use lunar_engine::traits::{Clock, Tick};
use nix::time::{ClockId, clock_gettime};

/// Waits that there is room for before the lists grow: every tag and worker of a busy group.
const SLEEPS_EXPECTED: usize = 4096;
/// Turns of the ring from one reading of the clock to the next while it is busy.
const TURNS: u32 = 16;

/// Nanoseconds of `CLOCK_MONOTONIC`, the one that the ring's waits go by.
fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("this clock is everywhere");
    u64::try_from(Duration::from(now).as_nanos()).expect("the time since boot")
}

#[derive(Debug, Default)]
struct Place {
    generation: u32,
    fired: bool,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Sleeps {
    places: Vec<Place>,
    free: Vec<u32>,
    /// Earliest first; entries of dropped waits stay until they are due.
    due: BinaryHeap<Reverse<(u64, u32, u32)>>,
}

/// The waits of one thread.
#[derive(Debug)]
pub(crate) struct Timers {
    /// Monotonic time of its making.
    base: u64,
    now: Cell<u64>,
    /// Turns since the clock was read.
    turns: Cell<u32>,
    sleeps: RefCell<Sleeps>,
}

impl Timers {
    /// Makes an empty set; its clock starts at 1 ns.
    pub(crate) fn new() -> Rc<Self> {
        Rc::new(Self {
            base: monotonic(),
            now: Cell::new(1),
            turns: Cell::new(0),
            sleeps: RefCell::new(Sleeps {
                places: Vec::with_capacity(SLEEPS_EXPECTED),
                free: Vec::with_capacity(SLEEPS_EXPECTED),
                due: BinaryHeap::with_capacity(SLEEPS_EXPECTED),
            }),
        })
    }

    /// Nanoseconds as of the last reading of the clock.
    pub(crate) fn now(&self) -> u64 {
        self.now.get()
    }

    /// Ends a turn of the ring; `due` when its wait ended by time.
    pub(crate) fn turn(&self, due: bool) {
        self.turns.set(self.turns.get() + 1);
        if due || self.turns.get() >= TURNS {
            self.turns.set(0);
            self.fire();
        }
    }

    /// Reads the clock and wakes what is due.
    fn fire(&self) {
        let now = monotonic().saturating_sub(self.base);
        self.now.set(now + 1);
        let sleeps = &mut *self.sleeps.borrow_mut();
        while let Some(Reverse((at, place, generation))) = sleeps.due.peek().copied() {
            if at > now {
                return;
            }
            sleeps.due.pop();
            let place = &mut sleeps.places[place as usize];
            if place.generation == generation {
                place.fired = true;
                if let Some(waker) = place.waker.take() {
                    waker.wake();
                }
            }
        }
    }

    /// Monotonic time at which the next wait is due; None: there is none.
    pub(crate) fn next(&self) -> Option<Duration> {
        let sleeps = self.sleeps.borrow();
        let Reverse((at, ..)) = sleeps.due.peek()?;
        Some(Duration::from_nanos(
            self.base.saturating_add(*at).saturating_add(1),
        ))
    }

    fn start(self: &Rc<Self>, ns: u64) -> Sleep {
        let sleeps = &mut *self.sleeps.borrow_mut();
        let place = sleeps.free.pop().unwrap_or_else(|| {
            sleeps.places.push(Place::default());
            u32::try_from(sleeps.places.len() - 1).expect("far fewer than 2^32 waits")
        });
        let generation = sleeps.places[place as usize].generation;
        let at = self.now.get().saturating_add(ns);
        sleeps.due.push(Reverse((at, place, generation)));
        Sleep {
            timers: Rc::clone(self),
            place,
        }
    }
}

/// A wait; dropping it forgets it.
#[derive(Debug)]
pub(crate) struct Sleep {
    timers: Rc<Timers>,
    place: u32,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let place = &mut self.timers.sleeps.borrow_mut().places[self.place as usize];
        if place.fired {
            return Poll::Ready(());
        }
        place.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let sleeps = &mut *self.timers.sleeps.borrow_mut();
        let place = &mut sleeps.places[self.place as usize];
        place.generation = place.generation.wrapping_add(1);
        place.fired = false;
        place.waker = None;
        sleeps.free.push(self.place);
    }
}

/// The clock that the engine gets.
#[derive(Debug, Clone)]
pub(crate) struct RingClock(pub Rc<Timers>);

impl Clock for RingClock {
    type Sleep = Sleep;

    fn now(&self) -> Tick {
        Tick(self.0.now())
    }

    fn sleep(&self, ns: u64) -> Sleep {
        self.0.start(ns)
    }

    fn date(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleep_fires_when_due_and_not_when_dropped() {
        let timers = Timers::new();
        let clock = RingClock(Rc::clone(&timers));
        let dropped = clock.sleep(0);
        drop(dropped);
        let mut late = clock.sleep(3_600_000_000_000);
        let mut soon = clock.sleep(0);
        let mut cx = Context::from_waker(Waker::noop());
        let due = timers.next().unwrap();
        assert!(due <= Duration::from_nanos(monotonic() + 2));
        timers.turn(true);
        assert!(timers.next().unwrap() > due + Duration::from_secs(60));
        assert_eq!(Pin::new(&mut soon).poll(&mut cx), Poll::Ready(()));
        assert_eq!(Pin::new(&mut late).poll(&mut cx), Poll::Pending);
    }

    #[test]
    fn clock_is_read_when_due_and_after_some_turns() {
        let timers = Timers::new();
        for _ in 1..TURNS {
            timers.turn(false);
        }
        assert_eq!(timers.now(), 1);
        timers.turn(false);
        let late = timers.now();
        assert!(late > 1);
        timers.turn(true);
        assert!(timers.now() > late);
    }
}
