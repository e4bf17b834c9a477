//! A queue thread: serves queues of the LUs of one group beside its owner thread, on a ring of its own.
//!
//! It serves by itself what the picture of the group settles that it was given last (`lunar_engine::view`), and
//! forwards everything else to the owner.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use lunar_api::target::LuCounters;
use lunar_api::{ApiError, DiskUuid, GroupUuid, LuUuid};
use lunar_engine::extents::ExtentMap;
use lunar_engine::traits::{Clock, MILLISECOND};
use lunar_engine::view::{GroupView, QueueLu, QueueServer, Served};

use crate::allocations;
use crate::breadcrumb::Crumb;
use crate::clock::{RingClock, Timers};
use crate::executor::Executor;
use crate::forward::{Places, Sender};
use crate::member_file::{MemberFile, SharedFile};
use crate::owner::Local;
use crate::ring::{Address, MailBox, Ring};
use crate::sandbox;
use crate::thread::{Door, Lane, Thread, failed};
use crate::ublk::attached::Attached;
use crate::ublk::device::Shape;

/// How often the owner hears how old the oldest I/O of each member is; it gives one up after 30 s.
const AGES_NS: u64 = 500 * MILLISECOND;

/// What a queue thread has.
#[derive(Debug)]
pub(crate) struct Queue {
    ring: Rc<Ring>,
    executor: Rc<Executor>,
    attached: Rc<Attached>,
    crumb: Option<Crumb>,
    server: Rc<QueueServer<MemberFile>>,
    lus: RefCell<BTreeMap<LuUuid, Rc<QueueLu>>>,
    /// Message boxes of LUs that are about to be attached.
    boxes: RefCell<BTreeMap<LuUuid, Rc<MailBox>>>,
    clock: RingClock,
    ending: Cell<bool>,
}

impl Lane for Queue {
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
        self.ending.get() && self.attached.is_empty()
    }
}

async fn tell_ages(server: Rc<QueueServer<MemberFile>>, clock: RingClock) {
    loop {
        clock.turn(AGES_NS).await;
        server.find_disk(|disk| {
            disk.tell_age();
            false
        });
    }
}

/// The handle that other threads have.
pub(crate) type QueueThread = Thread<Queue>;

/// What a queue thread did, to be added to what the owner says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Report {
    pub(crate) allocations: u64,
    pub(crate) lus: BTreeMap<LuUuid, LuCounters>,
    pub(crate) members: BTreeMap<DiskUuid, MemberReport>,
    pub(crate) problems: BTreeMap<LuUuid, String>,
}

/// What a queue thread did on a member.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MemberReport {
    pub(crate) reads: u64,
    pub(crate) writes: u64,
    pub(crate) read_bytes: u64,
    pub(crate) write_bytes: u64,
    pub(crate) read_errors: u64,
    pub(crate) write_errors: u64,
}

impl Report {
    /// Adds what another says; problems are only those of now.
    pub(crate) fn add(&mut self, other: &Self) {
        self.allocations += other.allocations;
        for (lu, counters) in &other.lus {
            *self.lus.entry(*lu).or_default() += *counters;
        }
        for (disk, more) in &other.members {
            let sum = self.members.entry(*disk).or_default();
            sum.reads += more.reads;
            sum.writes += more.writes;
            sum.read_bytes += more.read_bytes;
            sum.write_bytes += more.write_bytes;
            sum.read_errors += more.read_errors;
            sum.write_errors += more.write_errors;
        }
    }
}

/// Starts a queue thread of a group.
pub(crate) fn spawn(name: &str, group: GroupUuid) -> Result<QueueThread, ApiError> {
    Thread::spawn(name, Some(group), Queue::new)
}

impl Queue {
    fn new(crumb: Option<Crumb>) -> Result<Rc<Self>, ApiError> {
        const WHAT: &str = "a queue's thread cannot be set up";
        sandbox::become_io_flusher().map_err(|e| failed(WHAT, &e))?;
        let timers = Timers::new();
        let ring = Ring::new(Rc::clone(&timers)).map_err(|e| failed(WHAT, &e))?;
        let executor = Executor::new();
        let queue = Rc::new(Self {
            attached: Attached::new(&ring, &executor),
            ring,
            executor,
            crumb,
            server: Rc::default(),
            lus: RefCell::default(),
            boxes: RefCell::default(),
            clock: RingClock(timers),
            ending: Cell::new(false),
        });
        let watch = tell_ages(Rc::clone(&queue.server), queue.clock.clone());
        queue.executor.spawn(watch);
        Ok(queue)
    }

    /// Requests served here, for the owner to see.
    pub(crate) fn requests(&self) -> Arc<std::sync::atomic::AtomicU64> {
        self.server.requests()
    }

    /// Looks at another picture of the group from now on, and tells the owner so.
    pub(crate) fn load(
        &self,
        number: u64,
        view: &Arc<GroupView>,
        files: &[Option<Arc<SharedFile>>],
        owner: &Door<Local>,
    ) {
        let version = view.version;
        let disk = |file: &Option<Arc<SharedFile>>| {
            let file = file.as_ref()?;
            let same = self.server.find_disk(|disk| disk.is_of(file));
            same.or_else(|| match MemberFile::on(&self.ring, file) {
                Ok(disk) => Some(Rc::new(disk)),
                Err(error) => {
                    // Without it the owner reads it for us.
                    tracing::warn!(%error, "a queue thread goes without a member");
                    None
                }
            })
        };
        let disks = files.iter().map(disk).collect();
        // Those that are not looked at any more hold no memory of the owner's.
        self.server.find_disk(|disk| {
            disk.forget_age();
            false
        });
        self.server.load(Arc::clone(view), disks);
        let (server, clock, owner) = (
            Rc::clone(&self.server),
            self.clock.clone(),
            Door::clone(owner),
        );
        self.executor.spawn(async move {
            while !server.is_settled() {
                clock.sleep(MILLISECOND).await;
            }
            // An owner that has ended waits for nobody.
            let _ = owner.send(move |local| local.view_confirmed(number, version));
        });
    }

    /// Makes the message box of a queue that will be attached.
    pub(crate) fn prepare(&self, lu: LuUuid, depth: u16) -> Result<Address, ApiError> {
        let own = self.ring.add_box(depth);
        let own = own.map_err(|e| failed("the device cannot be served", &e))?;
        let address = self.ring.address(&own);
        self.boxes.borrow_mut().insert(lu, own);
        Ok(address)
    }

    /// Serves a queue of a device as LU `handle` of the owner.
    pub(crate) fn attach(
        self: &Rc<Self>,
        (lu, handle, extents): (LuUuid, u16, ExtentMap),
        (file, shape, queue): (Arc<OwnedFd>, Shape, u16),
        (to, places): (Address, Arc<Places>),
    ) -> Result<(), ApiError> {
        let own = self.boxes.borrow_mut().remove(&lu);
        let own = own.expect("attached after it was prepared");
        let line = Sender { own, to, places };
        let served = Rc::new(QueueLu::new(extents));
        let (ring, server) = (Rc::clone(&self.ring), Rc::clone(&self.server));
        let counted = Rc::clone(&served);
        let crumb = self.crumb;
        self.attached
            .attach(lu, file, shape, queue, async move |request| {
                if let Some(crumb) = crumb {
                    crumb.note(handle, &request);
                }
                match server.serve(&counted, request).await {
                    Served::Done(result) => result,
                    Served::Forward { failed } => line.forward(&ring, request, failed).await,
                }
            })?;
        self.lus.borrow_mut().insert(lu, served);
        Ok(())
    }

    /// A LU that may be served here has grown.
    pub(crate) fn grow(&self, lu: LuUuid, extents: ExtentMap) {
        if let Some(served) = self.lus.borrow().get(&lu) {
            served.grow(extents);
        }
    }

    /// Waits until the kernel has taken back every tag of a LU's queue here. Answers what was done for it.
    pub(crate) async fn detach(&self, lu: LuUuid) -> LuCounters {
        self.boxes.borrow_mut().remove(&lu);
        self.attached.detach(lu).await;
        let ended = self.lus.borrow_mut().remove(&lu);
        ended.map(|lu| lu.counters()).unwrap_or_default()
    }

    pub(crate) fn report(&self) -> Report {
        let member = |counts: &Rc<lunar_engine::view::MemberCounts>| {
            let report = MemberReport {
                reads: counts.reads.get(),
                writes: counts.writes.get(),
                read_bytes: counts.read_bytes.get(),
                write_bytes: counts.write_bytes.get(),
                read_errors: counts.read_errors.get(),
                write_errors: counts.write_errors.get(),
            };
            (counts.disk, report)
        };
        let lus = self.lus.borrow();
        Report {
            allocations: allocations::count(),
            lus: lus.iter().map(|(id, lu)| (*id, lu.counters())).collect(),
            members: self.server.counts().iter().map(member).collect(),
            problems: self.attached.problems(),
        }
    }
}
