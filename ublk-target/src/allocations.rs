//! Counts what the threads that serve groups allocate while they serve.
//!
//! The rule is: serving a request allocates nothing (design.md §3). The count proves it, always on: one look at
//! a flag of the thread for each allocation, and none for each request. What people ask (status, new LUs) and
//! what goes on in the background runs on the same thread and may allocate; it is not counted.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Neither is made on first use nor dropped at the end: the allocator may look at any time.
    static COUNTS: Cell<bool> = const { Cell::new(false) };
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counted.
pub(crate) struct Counting;

fn note() {
    if COUNTS.get() {
        COUNT.set(COUNT.get() + 1);
    }
}

// SAFETY: every call goes to the system's allocator as it came; `note` neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note();
        // SAFETY: the caller keeps `alloc_zeroed`'s contract.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note();
        // SAFETY: the caller keeps `realloc`'s contract, and `at` came from the system's allocator.
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Runs `work`; what it allocates counts, or does not.
pub(crate) fn counted<T>(counts: bool, work: impl FnOnce() -> T) -> T {
    let before = COUNTS.replace(counts);
    let done = work();
    COUNTS.set(before);
    done
}

/// Allocations of this thread that count.
pub(crate) fn count() -> u64 {
    COUNT.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_counts_new_and_grown_memory_where_it_is_told_to() {
        let before = count();
        let mut list = counted(true, || Vec::<u64>::with_capacity(1));
        assert_eq!(count(), before + 1);
        counted(true, || list.reserve_exact(1000));
        assert_eq!(count(), before + 2);
        counted(true, || counted(false, || list.reserve_exact(10_000)));
        drop(counted(false, || Box::new(1)));
        counted(true, || list.push(1));
        assert_eq!(count(), before + 2);
    }
}
