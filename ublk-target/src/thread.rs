//! A thread with a ring and an executor, which others ask by closures over a channel that an eventfd announces.
//!
//! What the thread has is plain data of its own, a [`Lane`]. It ends when its lane says that it is over.

use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use lunar_api::{ApiError, ErrorKind, GroupUuid};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::allocations;
use crate::breadcrumb::{self, Crumb};
use crate::executor::Executor;
use crate::op::{Act, Place, Spec};
use crate::ring::Ring;

/// Stack of a thread: futures live on the heap, engine calls are shallow; it is locked memory.
const STACK_BYTES: usize = 512 << 10;

/// What a thread has.
pub(crate) trait Lane: 'static {
    fn ring(&self) -> &Rc<Ring>;
    fn executor(&self) -> &Rc<Executor>;
    /// It may end as soon as nothing counted runs.
    fn end(&self);
    /// It was told to end, and can.
    fn is_over(&self) -> bool;
}

type Job<L> = Box<dyn FnOnce(&Rc<L>) + Send>;

/// The way to ask a thread something, for whoever does not wait for its end.
pub(crate) struct Door<L> {
    jobs: Sender<Job<L>>,
    bell: Arc<EventFd>,
}

impl<L> Clone for Door<L> {
    fn clone(&self) -> Self {
        Self {
            jobs: self.jobs.clone(),
            bell: Arc::clone(&self.bell),
        }
    }
}

impl<L> fmt::Debug for Door<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Door").finish_non_exhaustive()
    }
}

/// The handle of a thread.
pub(crate) struct Thread<L> {
    door: Door<L>,
    thread: Option<JoinHandle<()>>,
}

impl<L> fmt::Debug for Thread<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Thread").finish_non_exhaustive()
    }
}

pub(crate) fn failed(what: &str, error: &dyn std::error::Error) -> ApiError {
    crate::control::api_error(ErrorKind::Failed, what, error)
}

pub(crate) fn gone() -> ApiError {
    ApiError::new(ErrorKind::NoService, "the group's thread has ended")
}

impl<L: Lane> Door<L> {
    /// Runs `job` on the thread, later.
    ///
    /// # Errors  the thread has ended
    pub(crate) fn send(&self, job: impl FnOnce(&Rc<L>) + Send + 'static) -> Result<(), ApiError> {
        self.jobs.send(Box::new(job)).map_err(|_| gone())?;
        self.bell
            .write(1)
            .map_err(|e| failed("the thread cannot be rung", &io::Error::from(e)))?;
        Ok(())
    }
}

impl<L: Lane> Thread<L> {
    /// Starts a thread with what `make` makes on it. A crash of the thread names `group`.
    pub(crate) fn spawn(
        name: &str,
        group: Option<GroupUuid>,
        make: impl FnOnce(Option<Crumb>) -> Result<Rc<L>, ApiError> + Send + 'static,
    ) -> Result<Self, ApiError> {
        const WHAT: &str = "a thread cannot be started";
        let (jobs, received) = unbounded::<Job<L>>();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = EventFd::from_value_and_flags(0, flags)
            .map_err(|e| failed(WHAT, &io::Error::from(e)))?;
        let bell = Arc::new(bell);
        let (started, wait) = bounded(1);
        let rung = Arc::clone(&bell);
        let thread = std::thread::Builder::new()
            .name(name.into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let crumb = group.and_then(breadcrumb::claim);
                match make(crumb) {
                    Ok(lane) => {
                        let _ = started.send(Ok(()));
                        run(&lane, received, rung);
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
                if let Some(crumb) = crumb {
                    crumb.release();
                }
            })
            .map_err(|e| failed(WHAT, &e))?;
        wait.recv().unwrap_or_else(|_| Err(gone()))?;
        Ok(Self {
            door: Door { jobs, bell },
            thread: Some(thread),
        })
    }

    /// The way to it.
    pub(crate) fn door(&self) -> Door<L> {
        self.door.clone()
    }

    /// Runs `ask` on the thread and waits for what it answers.
    pub(crate) fn call<T, F>(
        &self,
        ask: impl FnOnce(Rc<L>) -> F + Send + 'static,
    ) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        self.call_within(None, ask)
    }

    /// As [`Thread::call`], for at most `limit`; what was asked goes on.
    pub(crate) fn call_within<T, F>(
        &self,
        limit: Option<Duration>,
        ask: impl FnOnce(Rc<L>) -> F + Send + 'static,
    ) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let answer = self.ask(ask)?;
        match limit {
            None => answer.recv().map_err(|_| gone()),
            Some(limit) => answer.recv_timeout(limit).map_err(|_| {
                ApiError::new(
                    ErrorKind::Failed,
                    "the group's thread did not answer in time",
                )
            }),
        }
    }

    /// Runs `ask` on the thread; what it answers comes by the channel.
    pub(crate) fn ask<T, F>(
        &self,
        ask: impl FnOnce(Rc<L>) -> F + Send + 'static,
    ) -> Result<Receiver<T>, ApiError>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (to, answer) = bounded(1);
        self.door.send(move |lane: &Rc<L>| {
            let future = ask(Rc::clone(lane));
            lane.executor().spawn(async move {
                let _ = to.send(future.await);
            });
        })?;
        Ok(answer)
    }

    /// Lets the thread end once everything counted has ended, without waiting for that.
    pub(crate) fn leave(mut self) {
        drop(self.thread.take());
        let _ = self.door.send(|lane| lane.end());
    }

    /// Ends the thread; its members and devices are closed when this returns.
    pub(crate) fn end(mut self) {
        let _ = self.door.send(|lane| lane.end());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Ends a thread once nobody else looks at it any more: somebody who asks for its status lets go soon.
    pub(crate) fn end_when_last(mut thread: Arc<Self>) {
        loop {
            match Arc::try_unwrap(thread) {
                Ok(thread) => return thread.end(),
                Err(shared) => {
                    thread = shared;
                    let _ = crossbeam::channel::after(Duration::from_millis(1)).recv();
                }
            }
        }
    }
}

fn run<L: Lane>(lane: &Rc<L>, jobs: Receiver<Job<L>>, bell: Arc<EventFd>) {
    let (ring, executor) = (lane.ring(), lane.executor());
    match ring.add_file(bell.as_fd()) {
        Ok(file) => executor.spawn(take_jobs(Rc::clone(lane), jobs, bell, file)),
        Err(error) => {
            tracing::error!(%error, "a thread that nobody can ask");
            return;
        }
    }
    loop {
        executor.run_ready();
        if lane.is_over() {
            break;
        }
        allocations::counted(true, || ring.turn(executor));
    }
    executor.clear();
}

async fn take_jobs<L: Lane>(lane: Rc<L>, jobs: Receiver<Job<L>>, bell: Arc<EventFd>, file: u32) {
    loop {
        let spec = Spec {
            who: 0,
            file,
            act: Act::Poll,
            at: 0,
            len: 0,
            place: Place::None,
            lease: None,
        };
        let _ = lane.ring().start(spec, std::iter::empty()).await;
        // Nonblocking: it may have been read with the last one.
        let _ = bell.read();
        while let Ok(job) = jobs.try_recv() {
            job(&lane);
        }
    }
}
