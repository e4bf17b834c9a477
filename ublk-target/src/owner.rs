//! An owner thread: ring, executor, private memory, at most one RAID group and the devices of its LUs.
//!
//! Everything in [`Local`] is plain data of that thread. Others ask by closures over a channel, which an
//! eventfd in the ring announces. The thread ends when it is told so, or when its group could not start.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use lunar_api::target::TargetEvent;
use lunar_api::{ApiError, ErrorKind, GroupUuid, LuUuid};
use lunar_engine::pool::Pool;
use lunar_engine::raid_group::{Errno, RaidGroup, WORKERS};
use lunar_engine::traits::{Clock, Env, HostRequest, MILLISECOND};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::allocations;
use crate::breadcrumb::{self, Crumb};
use crate::buffers::Mapping;
use crate::clock::{RingClock, Timers};
use crate::executor::Executor;
use crate::member_file::{MemberFile, POOL_BUFFER};
use crate::op::{Act, Place, Spec};
use crate::ring::Ring;
use crate::sandbox;
use crate::ublk::device::{Device, Devices, Shape, UblkFront};

/// Stack of an owner thread: futures live on the heap, engine calls are shallow; it is locked memory.
const STACK_BYTES: usize = 512 << 10;
/// How often the group is asked what happened.
const EVENTS_NS: u64 = 200 * MILLISECOND;

/// The kinds of the real world.
#[derive(Debug)]
pub(crate) struct World;

impl Env for World {
    type Disk = MemberFile;
    type Clock = RingClock;
    type Front = UblkFront;
}

/// What an owner thread has.
pub(crate) struct Local {
    pub(crate) ring: Rc<Ring>,
    pub(crate) executor: Rc<Executor>,
    pub(crate) pool: Rc<Pool>,
    pub(crate) clock: RingClock,
    pub(crate) devices: Rc<Devices>,
    crumb: Option<Crumb>,
    /// Of all members that were opened: what every one takes.
    pub(crate) dma_mask: Cell<u32>,
    /// Every member that was opened gives space back.
    pub(crate) unmaps: Cell<bool>,
    served: RefCell<BTreeMap<LuUuid, Rc<Device>>>,
    /// Devices that somebody else stopped, and how.
    lost: RefCell<BTreeMap<LuUuid, String>>,
    group: OnceCell<Rc<RaidGroup<World>>>,
    /// Workers and background tasks that run.
    running: Cell<usize>,
    ending: Cell<bool>,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local")
            .field("ring", &self.ring)
            .field("devices", &self.served.borrow().len())
            .finish_non_exhaustive()
    }
}

type Job = Box<dyn FnOnce(&Rc<Local>) + Send>;

/// The handle that other threads have.
pub(crate) struct Owner {
    jobs: Sender<Job>,
    bell: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner").finish_non_exhaustive()
    }
}

fn failed(what: &str, error: &dyn std::error::Error) -> ApiError {
    crate::control::api_error(ErrorKind::Failed, what, error)
}

fn gone() -> ApiError {
    ApiError::new(ErrorKind::NoService, "the group's thread has ended")
}

impl Owner {
    /// Starts a thread over a memory that `memory` makes on it; `events` gets what happens in its group. A crash of
    /// the thread names `group`.
    pub(crate) fn spawn(
        name: &str,
        group: Option<GroupUuid>,
        memory: impl FnOnce() -> Result<Mapping, crate::buffers::BufferError> + Send + 'static,
        events: impl Fn(Vec<TargetEvent>) + Send + 'static,
    ) -> Result<Self, ApiError> {
        let (jobs, received) = unbounded::<Job>();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let bell = EventFd::from_value_and_flags(0, flags)
            .map_err(|e| failed("a thread cannot be started", &io::Error::from(e)))?;
        let bell = Arc::new(bell);
        let (started, wait) = bounded(1);
        let rung = Arc::clone(&bell);
        let thread = std::thread::Builder::new()
            .name(name.into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let crumb = group.and_then(breadcrumb::claim);
                match Local::new(memory, crumb) {
                    Ok(local) => {
                        let _ = started.send(Ok(()));
                        run(&local, received, rung, events);
                    }
                    Err(error) => {
                        let _ = started.send(Err(error));
                    }
                }
                if let Some(crumb) = crumb {
                    crumb.release();
                }
            })
            .map_err(|e| failed("a thread cannot be started", &e))?;
        wait.recv().unwrap_or_else(|_| Err(gone()))?;
        Ok(Self {
            jobs,
            bell,
            thread: Some(thread),
        })
    }

    /// Runs `ask` on the thread and waits for what it answers.
    pub(crate) fn call<T, F>(
        &self,
        ask: impl FnOnce(Rc<Local>) -> F + Send + 'static,
    ) -> Result<T, ApiError>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        self.call_within(None, ask)
    }

    /// As [`Owner::call`], for at most `limit`; what was asked goes on.
    pub(crate) fn call_within<T, F>(
        &self,
        limit: Option<Duration>,
        ask: impl FnOnce(Rc<Local>) -> F + Send + 'static,
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
        ask: impl FnOnce(Rc<Local>) -> F + Send + 'static,
    ) -> Result<Receiver<T>, ApiError>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (to, answer) = bounded(1);
        self.send(Box::new(move |local| {
            let future = ask(Rc::clone(local));
            local.executor.spawn(async move {
                let _ = to.send(future.await);
            });
        }))?;
        Ok(answer)
    }

    fn send(&self, job: Job) -> Result<(), ApiError> {
        self.jobs.send(job).map_err(|_| gone())?;
        self.bell
            .write(1)
            .map_err(|e| failed("the thread cannot be rung", &io::Error::from(e)))?;
        Ok(())
    }

    /// Lets the thread end once everything counted has ended, without waiting for that.
    pub(crate) fn leave(mut self) {
        drop(self.thread.take());
        let _ = self.send(Box::new(|local| local.ending.set(true)));
    }

    /// Ends the thread; its members and devices are closed when this returns.
    pub(crate) fn end(mut self) {
        let _ = self.call(async |local: Rc<Local>| local.ending.set(true));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Local {
    fn new(
        memory: impl FnOnce() -> Result<Mapping, crate::buffers::BufferError>,
        crumb: Option<Crumb>,
    ) -> Result<Rc<Self>, ApiError> {
        const WHAT: &str = "the group's thread cannot be set up";
        sandbox::become_io_flusher().map_err(|e| failed(WHAT, &e))?;
        let timers = Timers::new();
        let ring = Ring::new(Rc::clone(&timers)).map_err(|e| failed(WHAT, &e))?;
        let memory = memory().map_err(|e| failed(WHAT, &e))?;
        ring.add_memory(POOL_BUFFER, &memory)
            .map_err(|e| failed(WHAT, &e))?;
        Ok(Rc::new(Self {
            ring,
            executor: Executor::new(),
            pool: Pool::new(Box::new(memory)),
            clock: RingClock(timers),
            devices: Rc::default(),
            crumb,
            dma_mask: Cell::new(0),
            unmaps: Cell::new(true),
            served: RefCell::default(),
            lost: RefCell::default(),
            group: OnceCell::new(),
            running: Cell::new(0),
            ending: Cell::new(false),
        }))
    }

    /// The group, once it runs.
    pub(crate) fn group(&self) -> Result<&Rc<RaidGroup<World>>, ApiError> {
        self.group.get().ok_or_else(gone)
    }

    /// The side towards the host, for a group.
    pub(crate) fn front(&self) -> UblkFront {
        UblkFront {
            ring: Rc::clone(&self.ring),
            devices: Rc::clone(&self.devices),
        }
    }

    /// A source of random ids.
    pub(crate) fn random(&self) -> Result<Box<dyn FnMut() -> [u8; 16]>, ApiError> {
        let mut source = File::open("/dev/urandom").map_err(|e| failed("no randomness", &e))?;
        Ok(Box::new(move || {
            let mut bytes = [0; 16];
            source
                .read_exact(&mut bytes)
                .expect("urandom never fails nor ends");
            bytes
        }))
    }

    /// Takes over a group that runs: spawns its workers and its background.
    pub(crate) fn adopt(self: &Rc<Self>, group: Rc<RaidGroup<World>>) {
        for _ in 0..WORKERS {
            let worker = self.until_ended(Rc::clone(&group).worker());
            self.executor.spawn_serving(worker);
        }
        let background = self.until_ended(Rc::clone(&group).background());
        self.executor.spawn(background);
        let watch = self.until_ended(Rc::clone(&group).watch());
        self.executor.spawn(watch);
        assert!(self.group.set(group).is_ok(), "one group a thread");
    }

    /// Has the thread wait for the end of a task of the group.
    fn until_ended(
        self: &Rc<Self>,
        task: impl Future<Output = ()> + 'static,
    ) -> impl Future<Output = ()> + 'static {
        let local = Rc::clone(self);
        async move { local.counted(task).await }
    }

    /// Keeps the thread from ending before `task` has.
    pub(crate) async fn counted<T>(&self, task: impl Future<Output = T>) -> T {
        self.running.set(self.running.get() + 1);
        let done = task.await;
        self.running.set(self.running.get() - 1);
        done
    }

    /// Serves a device as LU `handle`: fetches every tag.
    pub(crate) fn attach(
        self: &Rc<Self>,
        lu: LuUuid,
        handle: u16,
        file: OwnedFd,
        shape: Shape,
    ) -> Result<(), ApiError> {
        let group = Rc::clone(self.group()?);
        let crumb = self.crumb;
        self.attach_with(lu, file, shape, async move |request| {
            if let Some(crumb) = crumb {
                crumb.note(handle, &request);
            }
            group.serve(handle, request).await
        })
    }

    /// Serves a device by answering EIO to everything.
    pub(crate) fn attach_refusing(
        self: &Rc<Self>,
        lu: LuUuid,
        file: OwnedFd,
        shape: Shape,
    ) -> Result<(), ApiError> {
        self.attach_with(lu, file, shape, async |_| Err(Errno(libc::EIO)))
    }

    fn attach_with(
        self: &Rc<Self>,
        lu: LuUuid,
        file: OwnedFd,
        shape: Shape,
        serve: impl AsyncFn(HostRequest) -> Result<(), Errno> + 'static,
    ) -> Result<(), ApiError> {
        let device = Device::new(&self.ring, &self.devices, file, shape)
            .map_err(|e| failed("the device cannot be served", &e))?;
        let serve = Rc::new(serve);
        for tag in 0..shape.depth {
            let (device, serve) = (Rc::clone(&device), Rc::clone(&serve));
            self.executor.spawn_serving(async move {
                device.serve_tag(tag, |request| serve(request)).await;
            });
        }
        self.executor
            .spawn(Rc::clone(self).notice_end(lu, Rc::clone(&device)));
        self.lost.borrow_mut().remove(&lu);
        self.served.borrow_mut().insert(lu, device);
        Ok(())
    }

    /// Lets go of a device that somebody else stopped: whoever deletes it waits for that.
    async fn notice_end(self: Rc<Self>, lu: LuUuid, device: Rc<Device>) {
        device.end().await;
        let mut served = self.served.borrow_mut();
        // Not there, or another: it is being detached.
        if served.get(&lu).is_some_and(|now| Rc::ptr_eq(now, &device)) {
            served.remove(&lu);
            let problem = device.problem();
            // Usual before a detach; otherwise status names the problem.
            tracing::info!(%lu, number = device.shape.number, "the kernel device of a LU has ended");
            self.lost.borrow_mut().insert(lu, problem);
        }
    }

    /// Waits until the kernel has taken back every tag of a LU's device, and lets go of it.
    pub(crate) async fn detach(&self, lu: LuUuid) {
        let device = self.served.borrow_mut().remove(&lu);
        if let Some(device) = device {
            device.end().await;
        }
        self.lost.borrow_mut().remove(&lu);
    }

    /// What is wrong with the devices of LUs; nothing is said of those that are well.
    pub(crate) fn problems(&self) -> BTreeMap<LuUuid, String> {
        let mut problems = self.lost.borrow().clone();
        for (lu, device) in self.served.borrow().iter() {
            problems.insert(*lu, device.problem());
        }
        problems
    }
}

fn run(
    local: &Rc<Local>,
    jobs: Receiver<Job>,
    bell: Arc<EventFd>,
    events: impl Fn(Vec<TargetEvent>) + 'static,
) {
    match local.ring.add_file(bell.as_fd()) {
        Ok(file) => local
            .executor
            .spawn(take_jobs(Rc::clone(local), jobs, bell, file)),
        Err(error) => {
            tracing::error!(%error, "a thread that nobody can ask");
            return;
        }
    }
    local.executor.spawn(pass_events(Rc::clone(local), events));
    loop {
        local.executor.run_ready();
        if local.ending.get() && local.running.get() == 0 {
            break;
        }
        allocations::counted(true, || local.ring.turn(&local.executor));
    }
    local.executor.clear();
}

async fn take_jobs(local: Rc<Local>, jobs: Receiver<Job>, bell: Arc<EventFd>, file: u32) {
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
        let _ = local.ring.start(spec, std::iter::empty()).await;
        // Nonblocking: it may have been read with the last one.
        let _ = bell.read();
        while let Ok(job) = jobs.try_recv() {
            job(&local);
        }
    }
}

async fn pass_events(local: Rc<Local>, events: impl Fn(Vec<TargetEvent>)) {
    loop {
        local.clock.sleep(EVENTS_NS).await;
        if let Some(group) = local.group.get() {
            let mut happened = Vec::new();
            group.take_events(&mut happened);
            if !happened.is_empty() {
                events(happened);
            }
        }
    }
}
