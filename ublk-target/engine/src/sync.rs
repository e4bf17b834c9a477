//! Waiting on one thread: no locks, no allocation once a list has grown to its size.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Poll, Waker};

use arrayvec::ArrayVec;

/// Tasks that wait for something to change; woken all together, each looks again.
#[derive(Debug, Default)]
pub struct Waiters {
    wakers: RefCell<Vec<Waker>>,
}

impl Waiters {
    /// Makes room for so many at once: who waits then allocates nothing.
    pub fn reserve(&self, tasks: usize) {
        let mut wakers = self.wakers.borrow_mut();
        let has = wakers.len();
        wakers.reserve(tasks.saturating_sub(has));
    }

    /// Wakes all. The list keeps its room.
    pub fn wake_all(&self) {
        let mut wakers = self.wakers.borrow_mut();
        for waker in wakers.drain(..) {
            waker.wake();
        }
    }

    /// Wakes the one that waits longest.
    pub fn wake_one(&self) {
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.is_empty() {
            wakers.remove(0).wake();
        }
    }

    /// Waits until `ready` gives a value; it is asked now and after each `wake_all`.
    pub async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        poll_fn(|cx| match ready() {
            Some(value) => {
                // A stale entry here would swallow a later `wake_one`.
                self.wakers
                    .borrow_mut()
                    .retain(|waker| !waker.will_wake(cx.waker()));
                Poll::Ready(value)
            }
            None => {
                let mut wakers = self.wakers.borrow_mut();
                if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                    wakers.push(cx.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }
}

/// Runs two flows side by side, to the end of both.
pub async fn join(a: impl Future<Output = ()>, b: impl Future<Output = ()>) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    let (mut a_ended, mut b_ended) = (false, false);
    poll_fn(|cx| {
        a_ended = a_ended || a.as_mut().poll(cx).is_ready();
        b_ended = b_ended || b.as_mut().poll(cx).is_ready();
        if a_ended && b_ended {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// Runs two flows side by side until one of them ends; the other is dropped.
pub async fn either(a: impl Future<Output = ()>, b: impl Future<Output = ()>) {
    let (mut a, mut b) = (pin!(a), pin!(b));
    poll_fn(|cx| {
        if a.as_mut().poll(cx).is_ready() || b.as_mut().poll(cx).is_ready() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    })
    .await;
}

/// Waits for a handful of futures at once; `done(i, output)` is told each as it ends.
///
/// # Panics  never; the futures are polled only while they are pending
pub async fn join_all<F, const N: usize>(
    futures: &mut ArrayVec<(u16, Option<F>), N>,
    mut done: impl FnMut(u16, F::Output),
) where
    F: Future + Unpin,
{
    poll_fn(|cx| {
        let mut pending = false;
        for (key, slot) in futures.iter_mut() {
            if let Some(future) = slot {
                match Pin::new(future).poll(cx) {
                    Poll::Ready(output) => {
                        *slot = None;
                        done(*key, output);
                    }
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    })
    .await;
    futures.clear();
}
