//! Runs the tasks of one thread.
//!
//! A waker is a task's index and nothing else; waking pushes it to a queue of the thread, once. Spawning
//! allocates, waking and polling do not. A waker that outlives its task wakes whoever has its place by then,
//! which costs one needless poll: futures look again before they believe.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, RawWaker, RawWakerVTable, Waker};

use crate::allocations;

/// Tasks the queue has room for before it grows.
const TASKS_EXPECTED: usize = 4096;

thread_local! {
    static READY: RefCell<Ready> = const { RefCell::new(Ready { queue: VecDeque::new(), queued: Vec::new() }) };
}

struct Ready {
    queue: VecDeque<u32>,
    /// By task: it is in the queue.
    queued: Vec<bool>,
}

impl Ready {
    fn push(&mut self, task: u32) {
        // A task that this thread does not know: a waker that went astray. Nobody waits for it.
        if let Some(queued) = self.queued.get_mut(task as usize)
            && !*queued
        {
            *queued = true;
            self.queue.push_back(task);
        }
    }

    fn pop(&mut self) -> Option<u32> {
        let task = self.queue.pop_front()?;
        self.queued[task as usize] = false;
        Some(task)
    }
}

const VTABLE: RawWakerVTable = RawWakerVTable::new(
    |data| RawWaker::new(data, &VTABLE),
    wake_data,
    wake_data,
    |_| {},
);

fn wake_data(data: *const ()) {
    let task = u32::try_from(data.addr()).expect("made from a u32");
    // A thread that ends has no queue any more.
    let _ = READY.try_with(|ready| ready.borrow_mut().push(task));
}

fn waker(task: u32) -> Waker {
    let data = std::ptr::without_provenance(task as usize);
    // SAFETY: the vtable never dereferences the data, which is a number; clone, wake and drop are defined
    // for every number on every thread.
    unsafe { Waker::from_raw(RawWaker::new(data, &VTABLE)) }
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    /// It is on the way of requests: what it allocates counts.
    serves: bool,
}

enum Place {
    Free,
    /// Being polled.
    Running,
    Task(Task),
}

/// The tasks of a thread; one executor a thread.
pub(crate) struct Executor {
    tasks: RefCell<Vec<Place>>,
    free: RefCell<Vec<u32>>,
}

impl fmt::Debug for Executor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Executor")
            .field("tasks", &self.len())
            .finish()
    }
}

impl Executor {
    /// Makes the executor of this thread.
    pub(crate) fn new() -> Rc<Self> {
        READY.with_borrow_mut(|ready| {
            ready.queue.reserve(TASKS_EXPECTED);
            ready.queued.reserve(TASKS_EXPECTED);
        });
        Rc::new(Self {
            tasks: RefCell::new(Vec::with_capacity(TASKS_EXPECTED)),
            free: RefCell::new(Vec::with_capacity(TASKS_EXPECTED)),
        })
    }

    /// Adds a task; it is polled at the next turn.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        self.add(Task {
            future: Box::pin(future),
            serves: false,
        });
    }

    /// Adds a task that serves requests: it allocates nothing once it is warm.
    pub(crate) fn spawn_serving(&self, future: impl Future<Output = ()> + 'static) {
        self.add(Task {
            future: Box::pin(future),
            serves: true,
        });
    }

    fn add(&self, task: Task) {
        let mut tasks = self.tasks.borrow_mut();
        let index = match self.free.borrow_mut().pop() {
            Some(index) => {
                tasks[index as usize] = Place::Task(task);
                index
            }
            None => {
                tasks.push(Place::Task(task));
                u32::try_from(tasks.len() - 1).expect("far fewer than 2^32 tasks")
            }
        };
        READY.with_borrow_mut(|ready| {
            if ready.queued.len() <= index as usize {
                ready.queued.resize(index as usize + 1, false);
            }
            ready.push(index);
        });
    }

    /// Polls every task that is ready, those too that become ready meanwhile.
    pub(crate) fn run_ready(&self) {
        while let Some(index) = READY.with_borrow_mut(Ready::pop) {
            let Some(task) = self.take(index) else {
                continue;
            };
            self.poll(index, task);
        }
    }

    fn take(&self, index: u32) -> Option<Task> {
        let place = &mut self.tasks.borrow_mut()[index as usize];
        match std::mem::replace(place, Place::Running) {
            Place::Task(task) => Some(task),
            Place::Free => {
                *place = Place::Free;
                None
            }
            Place::Running => unreachable!("one thread polls one task at a time"),
        }
    }

    fn poll(&self, index: u32, mut task: Task) {
        let waker = waker(index);
        let mut cx = Context::from_waker(&waker);
        let poll = allocations::counted(task.serves, || task.future.as_mut().poll(&mut cx));
        let place = match poll {
            Poll::Pending => Place::Task(task),
            Poll::Ready(()) => {
                // What the task held is dropped before its place is free; that may wake others.
                drop(task);
                self.free.borrow_mut().push(index);
                Place::Free
            }
        };
        self.tasks.borrow_mut()[index as usize] = place;
    }

    /// Counts the tasks that have not ended.
    pub(crate) fn len(&self) -> usize {
        self.tasks.borrow().len() - self.free.borrow().len()
    }

    /// Drops every task.
    pub(crate) fn clear(&self) {
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        drop(tasks);
        self.free.borrow_mut().clear();
        READY.with_borrow_mut(|ready| {
            ready.queue.clear();
            ready.queued.clear();
        });
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;

    use super::*;

    #[test]
    fn run_ready_polls_woken_tasks_only() {
        let executor = Executor::new();
        let polls = Rc::new(Cell::new(0));
        let kept: Rc<RefCell<Option<Waker>>> = Rc::default();
        let (count, keep) = (Rc::clone(&polls), Rc::clone(&kept));
        executor.spawn(poll_fn(move |cx| {
            count.set(count.get() + 1);
            *keep.borrow_mut() = Some(cx.waker().clone());
            if count.get() == 2 {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        }));
        executor.run_ready();
        executor.run_ready();
        assert_eq!(polls.get(), 1);
        let waker = kept.borrow().clone().unwrap();
        waker.wake_by_ref();
        waker.wake_by_ref();
        executor.run_ready();
        assert_eq!((polls.get(), executor.len()), (2, 0));
        waker.wake();
        executor.run_ready();
        assert_eq!(polls.get(), 2);
    }

    #[test]
    fn spawn_within_a_task_runs_and_reuses_places() {
        let executor = Executor::new();
        let ran = Rc::new(Cell::new(0));
        for _ in 0..3 {
            let (inner, count) = (Rc::clone(&executor), Rc::clone(&ran));
            executor.spawn(async move {
                let count_inner = Rc::clone(&count);
                inner.spawn(async move { count_inner.set(count_inner.get() + 1) });
                count.set(count.get() + 1);
            });
            executor.run_ready();
        }
        assert_eq!((ran.get(), executor.len()), (6, 0));
        assert!(executor.tasks.borrow().len() <= 2);
    }
}
