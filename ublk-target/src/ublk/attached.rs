//! The queues of devices that one thread serves, by LU.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;

use lunar_api::{ApiError, LuUuid};
use lunar_engine::raid_group::Errno;
use lunar_engine::traits::HostRequest;

use super::device::{Device, Devices, Shape};
use crate::executor::Executor;
use crate::ring::Ring;
use crate::thread::failed;

/// The queues that a thread serves.
#[derive(Debug)]
pub(crate) struct Attached {
    ring: Rc<Ring>,
    executor: Rc<Executor>,
    pub(crate) devices: Rc<Devices>,
    served: RefCell<BTreeMap<LuUuid, Vec<Rc<Device>>>>,
    /// Devices that somebody else stopped, and how.
    lost: RefCell<BTreeMap<LuUuid, String>>,
}

impl Attached {
    pub(crate) fn new(ring: &Rc<Ring>, executor: &Rc<Executor>) -> Rc<Self> {
        Rc::new(Self {
            ring: Rc::clone(ring),
            executor: Rc::clone(executor),
            devices: Rc::default(),
            served: RefCell::default(),
            lost: RefCell::default(),
        })
    }

    /// Serves a queue of a LU's device by `serve`: fetches every tag.
    pub(crate) fn attach(
        self: &Rc<Self>,
        lu: LuUuid,
        file: Arc<OwnedFd>,
        shape: Shape,
        queue: u16,
        serve: impl AsyncFn(HostRequest) -> Result<(), Errno> + 'static,
    ) -> Result<(), ApiError> {
        let device = Device::new(&self.ring, &self.devices, file, shape, queue)
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
        self.served.borrow_mut().entry(lu).or_default().push(device);
        Ok(())
    }

    /// Lets go of a queue that somebody else stopped: whoever deletes the device waits for that.
    async fn notice_end(self: Rc<Self>, lu: LuUuid, device: Rc<Device>) {
        device.end().await;
        let mut served = self.served.borrow_mut();
        // Not there, or another: it is being detached.
        let queues = served.get_mut(&lu);
        if let Some(queues) = queues
            && let Some(at) = queues.iter().position(|now| Rc::ptr_eq(now, &device))
        {
            queues.remove(at);
            if queues.is_empty() {
                served.remove(&lu);
            }
            let problem = device.problem();
            // Usual before a detach; otherwise status names the problem.
            tracing::info!(%lu, number = device.shape.number, "the kernel device of a LU has ended");
            self.lost.borrow_mut().insert(lu, problem);
        }
    }

    /// Waits until the kernel has taken back every tag of a LU's queues here, and lets go of them.
    pub(crate) async fn detach(&self, lu: LuUuid) {
        let queues = self.served.borrow_mut().remove(&lu);
        for device in queues.into_iter().flatten() {
            device.end().await;
        }
        self.lost.borrow_mut().remove(&lu);
    }

    /// What is wrong with the queues of LUs; nothing is said of those that are well.
    pub(crate) fn problems(&self) -> BTreeMap<LuUuid, String> {
        let mut problems = self.lost.borrow().clone();
        for (lu, queues) in self.served.borrow().iter() {
            let all = queues.iter().map(|device| device.problem());
            if let Some(problem) = all.max() {
                problems.insert(*lu, problem);
            }
        }
        problems
    }

    /// Drops what is left at the end of the thread.
    pub(crate) fn is_empty(&self) -> bool {
        self.served.borrow().is_empty()
    }
}
