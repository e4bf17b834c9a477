//! The queue threads of a group: which LUs they serve a queue of.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use lunar_api::{ApiError, ErrorKind, LuUuid};

use super::{Group, lock};
use crate::forward::Places;
use crate::owner::Local;
use crate::queue::{self, QueueThread, Report};
use crate::thread::Thread;
use crate::ublk::device::Shape;

/// How long the tags of a stopped device may take to come back: member I/O in flight ends or is given up.
pub(super) const DETACH_LIMIT: Duration = Duration::from_secs(60);
/// Numbers of queue threads.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// A queue thread, and the LUs that it serves a queue of.
#[derive(Debug)]
pub(super) struct QueueLane {
    /// Which queue of a LU it serves.
    pub(super) queue: u16,
    /// Never that of another.
    pub(super) number: u64,
    pub(super) thread: Arc<QueueThread>,
    pub(super) lus: BTreeSet<LuUuid>,
}

impl Group {
    /// Serves a queue of a device on a queue thread.
    pub(super) fn serve_beside(
        &self,
        (lu, handle): (LuUuid, u16),
        (file, shape, queue): (Arc<OwnedFd>, Shape, u16),
    ) -> Result<(), ApiError> {
        let (owner, thread) = (self.owner()?, self.queue_thread(queue, lu)?);
        let places = Places::new(shape.depth);
        let own = thread.call(async move |queue| queue.prepare(lu, shape.depth));
        let (own, of_line, there) = (own.flatten()?, Arc::clone(&file), Arc::clone(&places));
        let (to, extents) = owner
            .call(async move |local: Rc<Local>| {
                let missing =
                    || ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}"));
                let extents = local.group()?.lu_extents(handle).ok_or_else(missing)?;
                let device = (of_line, shape, queue);
                let to = local.open_line((lu, handle), device, (own, &there))?;
                Ok((to, extents))
            })
            .flatten()?;
        thread
            .call(async move |thread: Rc<queue::Queue>| {
                let (lu, device) = ((lu, handle, extents), (file, shape, queue));
                thread.attach(lu, device, (to, places))
            })
            .flatten()
    }

    /// The thread for a queue, which has a LU more now.
    fn queue_thread(&self, queue: u16, lu: LuUuid) -> Result<Arc<QueueThread>, ApiError> {
        let mut lanes = lock(&self.queues);
        if let Some(lane) = lanes.iter_mut().find(|lane| lane.queue == queue) {
            lane.lus.insert(lu);
            return Ok(Arc::clone(&lane.thread));
        }
        let owner = self.owner()?;
        let name = format!("q{queue}-{:.8}", self.uuid.to_string());
        let thread = queue::spawn(&name, self.uuid)?;
        let requests = thread.call(async |queue: Rc<queue::Queue>| queue.requests())?;
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (door, own) = (thread.door(), owner.door());
        let known = owner
            .call(async move |local: Rc<Local>| local.add_reader(number, door, requests, &own))
            .flatten();
        if let Err(error) = known {
            thread.end();
            return Err(error);
        }
        let thread = Arc::new(thread);
        lanes.push(QueueLane {
            queue,
            number,
            thread: Arc::clone(&thread),
            lus: BTreeSet::from([lu]),
        });
        Ok(thread)
    }

    /// Tells queue threads that a LU has grown.
    pub(super) fn grow_beside(&self, lu: LuUuid, handle: u16) -> Result<(), ApiError> {
        let missing = move || ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}"));
        let extents =
            self.change(async move |group: Rc<_>| group.lu_extents(handle).ok_or_else(missing))?;
        let lanes = lock(&self.queues);
        let serving = lanes.iter().filter(|lane| lane.lus.contains(&lu));
        let threads: Vec<_> = serving.map(|lane| Arc::clone(&lane.thread)).collect();
        drop(lanes);
        for thread in threads {
            let extents = extents.clone();
            thread.call(async move |queue: Rc<queue::Queue>| queue.grow(lu, extents))?;
        }
        Ok(())
    }

    /// Waits until queue threads have let go of a LU; those that have none left end.
    pub(super) fn detach_beside(&self, lu: LuUuid) -> Result<(), ApiError> {
        let threads: Vec<Arc<QueueThread>> = lock(&self.queues)
            .iter()
            .filter(|lane| lane.lus.contains(&lu))
            .map(|lane| Arc::clone(&lane.thread))
            .collect();
        for thread in threads {
            let counters = thread
                .call_within(Some(DETACH_LIMIT), async move |queue: Rc<queue::Queue>| {
                    queue.detach(lu).await
                })?;
            let served = Report {
                lus: BTreeMap::from([(lu, counters)]),
                ..Report::default()
            };
            lock(&self.past).add(&served);
        }
        let mut lanes = lock(&self.queues);
        lanes.iter_mut().for_each(|lane| {
            lane.lus.remove(&lu);
        });
        let (idle, busy) = std::mem::take(&mut *lanes)
            .into_iter()
            .partition(|lane: &QueueLane| lane.lus.is_empty());
        *lanes = busy;
        drop(lanes);
        for QueueLane { number, thread, .. } in idle {
            let report = thread.call(async |queue: Rc<queue::Queue>| queue.report())?;
            self.owner()?
                .call(async move |local: Rc<Local>| local.remove_reader(number))?;
            lock(&self.past).add(&report);
            Thread::end_when_last(thread);
        }
        Ok(())
    }

    /// What all queue threads did.
    pub(super) fn served_beside(&self) -> Result<Report, ApiError> {
        let mut all = lock(&self.past).clone();
        let threads: Vec<_> = {
            let lanes = lock(&self.queues);
            lanes.iter().map(|lane| Arc::clone(&lane.thread)).collect()
        };
        for thread in threads {
            let report = thread.call(async |queue: Rc<queue::Queue>| queue.report())?;
            all.add(&report);
            all.problems.extend(report.problems);
        }
        Ok(all)
    }
}
