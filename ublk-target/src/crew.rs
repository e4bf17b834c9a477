//! Several pieces of work at a time, on threads that end with it. For control work that mostly waits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Stack of a helping thread: control commands and calls to owner threads, nothing deep.
const STACK_BYTES: usize = 128 << 10;

/// Does `work` for every item, `at_once` at a time. After a failure no further item is begun.
///
/// # Errors  the first failure; what was under way has ended
pub(crate) fn try_each<T: Sync, E: Send>(
    items: &[T],
    at_once: usize,
    work: impl Fn(&T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let first = || failed.lock().unwrap_or_else(PoisonError::into_inner);
    let take = || {
        while first().is_none() {
            let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) else {
                return;
            };
            if let Err(error) = work(item) {
                first().get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..at_once.min(items.len()) {
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            // A thread that there is no room for: the others do its part.
            let _ = thread.spawn_scoped(scope, take);
        }
        take();
    });
    failed
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .map_or(Ok(()), Err)
}

/// As [`try_each`], of work that does not fail.
pub(crate) fn each<T: Sync>(items: &[T], at_once: usize, work: impl Fn(&T) + Sync) {
    let done: Result<(), std::convert::Infallible> = try_each(items, at_once, |item| {
        work(item);
        Ok(())
    });
    done.expect("it cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn each_does_every_item_so_many_at_once() {
        let items: Vec<usize> = (0..12).collect();
        // Three items meet here each time: with fewer at once it would never end.
        let meet = Barrier::new(3);
        let sum = AtomicUsize::new(0);
        each(&items, 3, |item| {
            meet.wait();
            sum.fetch_add(*item, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 66);
        each(&[] as &[usize], 3, |_| unreachable!());
    }

    #[test]
    fn try_each_begins_nothing_after_a_failure() {
        let begun = AtomicUsize::new(0);
        let done = try_each(&[1, 2, 3, 4], 1, |item| {
            begun.fetch_add(1, Ordering::Relaxed);
            if *item == 2 { Err(*item) } else { Ok(()) }
        });
        assert_eq!((done, begun.into_inner()), (Err(2), 2));
    }
}
