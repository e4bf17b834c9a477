//! An owner thread: ring, executor, private memory, at most one RAID group and the devices of its LUs.
//!
//! Everything in [`Local`] is plain data of that thread. The thread ends when it is told so, or when its group could
//! not start. Beside it there may be queue threads, which serve by pictures of the group that it hands them.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use lunar_api::target::TargetEvent;
use lunar_api::{ApiError, GroupUuid, LuUuid};
use lunar_engine::pool::Pool;
use lunar_engine::raid_group::{Errno, RaidGroup, WORKERS};
use lunar_engine::traits::Env;

use crate::breadcrumb::Crumb;
use crate::buffers::Mapping;
use crate::clock::{RingClock, Timers};
use crate::executor::Executor;
use crate::forward::{Places, Receiver};
use crate::member_file::{MemberFile, POOL_BUFFER};
use crate::queue::Queue;
use crate::ring::{Address, Ring};
use crate::sandbox;
use crate::thread::{Door, Lane, Thread, failed, gone};
use crate::ublk::attached::Attached;
use crate::ublk::device::{Shape, UblkFront};

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
    pub(crate) attached: Rc<Attached>,
    crumb: Option<Crumb>,
    /// Of all members that were opened: what every one takes.
    pub(crate) dma_mask: Cell<u32>,
    /// Every member that was opened gives space back.
    pub(crate) unmaps: Cell<bool>,
    /// Ends of the lines that queue threads forward requests on.
    lines: RefCell<BTreeMap<LuUuid, Vec<Rc<Receiver>>>>,
    readers: RefCell<Vec<Reader>>,
    /// The way to this thread, for queue threads.
    door: OnceCell<Door<Self>>,
    group: OnceCell<Rc<RaidGroup<World>>>,
    /// Workers and background tasks that run.
    running: Cell<usize>,
    ending: Cell<bool>,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local")
            .field("ring", &self.ring)
            .field("attached", &self.attached)
            .finish_non_exhaustive()
    }
}

/// The handle that other threads have.
pub(crate) type Owner = Thread<Local>;

/// Starts an owner thread over a memory that `memory` makes on it. A crash of the thread names `group`.
pub(crate) fn spawn(
    name: &str,
    group: Option<GroupUuid>,
    memory: impl FnOnce() -> Result<Mapping, crate::buffers::BufferError> + Send + 'static,
) -> Result<Owner, ApiError> {
    Thread::spawn(name, group, |crumb| Local::new(memory, crumb))
}

impl Lane for Local {
    fn ring(&self) -> &Rc<Ring> {
        &self.ring
    }

    fn executor(&self) -> &Rc<Executor> {
        &self.executor
    }

    fn end(&self) {
        self.ending.set(true);
    }

    fn is_over(&self) -> bool {
        self.ending.get() && self.running.get() == 0
    }
}

/// A queue thread that looks at pictures of the group.
#[derive(Debug)]
struct Reader {
    number: u64,
    door: Door<Queue>,
    /// The picture that it looks at; 0: none.
    version: u64,
    requests: Arc<AtomicU64>,
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
        let executor = Executor::new();
        Ok(Rc::new(Self {
            attached: Attached::new(&ring, &executor),
            ring,
            executor,
            pool: Pool::new(Box::new(memory)),
            clock: RingClock(timers),
            crumb,
            dma_mask: Cell::new(0),
            unmaps: Cell::new(true),
            lines: RefCell::default(),
            readers: RefCell::default(),
            door: OnceCell::new(),
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
            devices: Rc::clone(&self.attached.devices),
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
    pub(crate) fn adopt(
        self: &Rc<Self>,
        group: Rc<RaidGroup<World>>,
        events: impl Fn(Vec<TargetEvent>) + 'static,
    ) {
        for _ in 0..WORKERS {
            let worker = self.until_ended(Rc::clone(&group).worker());
            self.executor.spawn_serving(worker);
        }
        let background = self.until_ended(Rc::clone(&group).background());
        self.executor.spawn(background);
        let watch = self.until_ended(Rc::clone(&group).watch());
        self.executor.spawn(watch);
        self.executor.spawn(pass_events(Rc::clone(&group), events));
        assert!(self.group.set(group).is_ok(), "one group a thread");
        self.executor.spawn(Rc::clone(self).show_views());
    }

    /// Has the thread wait for the end of a task of the group.
    fn until_ended(
        self: &Rc<Self>,
        task: impl Future<Output = ()> + 'static,
    ) -> impl Future<Output = ()> + 'static {
        let local = Rc::clone(self);
        // Boxed, as every `async` that a future goes through holds room for it again.
        let task = Box::pin(task);
        async move { local.counted(task).await }
    }

    /// Keeps the thread from ending before `task` has.
    pub(crate) async fn counted<T>(&self, task: impl Future<Output = T>) -> T {
        self.running.set(self.running.get() + 1);
        let done = task.await;
        self.running.set(self.running.get() - 1);
        done
    }

    /// Serves a queue of a device as LU `handle`: fetches every tag.
    pub(crate) fn attach(
        &self,
        lu: LuUuid,
        handle: u16,
        file: Arc<OwnedFd>,
        shape: Shape,
        queue: u16,
    ) -> Result<(), ApiError> {
        let group = Rc::clone(self.group()?);
        let crumb = self.crumb;
        let serve = async move |request| {
            if let Some(crumb) = crumb {
                crumb.note(handle, &request);
            }
            group.serve(handle, request).await
        };
        self.attached.attach(lu, file, shape, queue, serve)
    }

    /// Serves a queue of a device by answering EIO to everything.
    pub(crate) fn attach_refusing(
        &self,
        lu: LuUuid,
        file: Arc<OwnedFd>,
        shape: Shape,
        queue: u16,
    ) -> Result<(), ApiError> {
        let refuse = async |_| Err(Errno(libc::EIO));
        self.attached.attach(lu, file, shape, queue, refuse)
    }

    /// Serves what a queue thread forwards to LU `handle`; answers where it sends to.
    pub(crate) fn open_line(
        &self,
        (lu, handle): (LuUuid, u16),
        (file, shape, queue): (Arc<OwnedFd>, Shape, u16),
        (to, places): (Address, &Arc<Places>),
    ) -> Result<Address, ApiError> {
        let group = Rc::clone(self.group()?);
        let crumb = self.crumb;
        let devices = &self.attached.devices;
        let line = Receiver::new(&self.ring, devices, file, queue, shape.depth)?;
        let serve = async move |request, failed| {
            if let Some(crumb) = crumb {
                crumb.note(handle, &request);
            }
            group.serve_after(handle, request, failed).await
        };
        line.serve(&self.executor, to, places, shape.depth, serve);
        let address = line.address();
        self.lines.borrow_mut().entry(lu).or_default().push(line);
        Ok(address)
    }

    /// Waits until the kernel has taken back every tag of a LU's queues here, and lets go of it. Queue threads have
    /// let go of it before.
    pub(crate) async fn detach(&self, lu: LuUuid) {
        self.attached.detach(lu).await;
        let lines = self.lines.borrow_mut().remove(&lu);
        lines.iter().flatten().for_each(|line| line.close());
    }

    /// From now on a queue thread is shown every picture of the group, and waited for.
    pub(crate) fn add_reader(
        &self,
        number: u64,
        door: Door<Queue>,
        requests: Arc<AtomicU64>,
        own: &Door<Self>,
    ) -> Result<(), ApiError> {
        self.group()?.follow(Arc::clone(&requests));
        self.readers.borrow_mut().push(Reader {
            number,
            door,
            version: 0,
            requests,
        });
        self.door.get_or_init(|| own.clone());
        self.confirm();
        self.show_view();
        Ok(())
    }

    /// A queue thread has ended.
    pub(crate) fn remove_reader(&self, number: u64) {
        let mut readers = self.readers.borrow_mut();
        let Some(at) = readers.iter().position(|reader| reader.number == number) else {
            return;
        };
        let reader = readers.remove(at);
        drop(readers);
        if let Some(group) = self.group.get() {
            group.unfollow(&reader.requests);
        }
        self.confirm();
    }

    /// A queue thread looks at a picture.
    pub(crate) fn view_confirmed(&self, number: u64, version: u64) {
        let mut readers = self.readers.borrow_mut();
        if let Some(reader) = readers.iter_mut().find(|reader| reader.number == number) {
            reader.version = reader.version.max(version);
        }
        drop(readers);
        self.confirm();
    }

    fn confirm(&self) {
        let readers = self.readers.borrow();
        let version = readers.iter().map(|reader| reader.version).min();
        if let Some(group) = self.group.get() {
            group.view_confirmed(version.unwrap_or(u64::MAX));
        }
    }

    /// Shows the present picture to every queue thread; answers its version.
    fn show_view(&self) -> u64 {
        let Some(group) = self.group.get() else {
            return 0;
        };
        let (view, disks) = group.view();
        let version = view.version;
        let Some(own) = self.door.get() else {
            return version;
        };
        let view = Arc::new(view);
        let share = |disk: &Option<Rc<MemberFile>>| disk.as_ref().map(|disk| disk.shared());
        let files: Arc<[_]> = disks.iter().map(share).collect();
        for reader in &*self.readers.borrow() {
            let (view, files) = (Arc::clone(&view), Arc::clone(&files));
            let (number, own) = (reader.number, own.clone());
            // One that has ended is removed soon.
            let _ = reader
                .door
                .send(move |queue| queue.load(number, &view, &files, &own));
        }
        version
    }

    async fn show_views(self: Rc<Self>) {
        let mut shown = 0;
        while let Some(group) = self.group.get() {
            group.view_after(shown).await;
            shown = self.show_view();
        }
    }
}

async fn pass_events(group: Rc<RaidGroup<World>>, events: impl Fn(Vec<TargetEvent>)) {
    loop {
        group.wait_events().await;
        let mut happened = Vec::new();
        group.take_events(&mut happened);
        events(happened);
    }
}
