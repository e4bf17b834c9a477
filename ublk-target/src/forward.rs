//! Requests on their way from a queue thread to the owner, and the answers back.
//!
//! A queue of a device that a queue thread serves has a *line* to the owner: a place for each tag, where the request
//! lies while the owner has it, and a message box in the ring of either side. A message (`MSG_RING`) names box and
//! tag; there is at most one on its way for each tag and direction, so nothing has to wait for room. The owner moves
//! the bytes by user copy, which the kernel allows to any thread; the queue thread commits.
//!
//! # Crash  the places are memory of the process: the kernel hands its successor every request that was not answered

use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use lunar_api::ApiError;
use lunar_engine::raid_group::{EIO, Errno};
use lunar_engine::traits::{HostRequest, RequestId};

use crate::executor::Executor;
use crate::ring::{Address, MailBox, Ring, RingError};
use crate::thread::failed;
use crate::ublk::device::Devices;

/// A request that the owner has, and the slots that failed to read it, as bits.
type Forwarded = (HostRequest, u64);

/// The places of a line, by tag.
#[derive(Debug)]
pub(crate) struct Places(Vec<Mutex<Option<Forwarded>>>);

impl Places {
    pub(crate) fn new(depth: u16) -> Arc<Self> {
        Arc::new(Self((0..depth).map(|_| Mutex::default()).collect()))
    }

    fn put(&self, tag: u16, what: Option<Forwarded>) -> Option<Forwarded> {
        let mut place = self.0[usize::from(tag)]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut place, what)
    }
}

/// The end of a line at the queue thread.
#[derive(Debug)]
pub(crate) struct Sender {
    pub(crate) own: Rc<MailBox>,
    pub(crate) to: Address,
    pub(crate) places: Arc<Places>,
}

impl Sender {
    /// Has the owner serve a request to its end.
    pub(crate) async fn forward(
        &self,
        ring: &Rc<Ring>,
        request: HostRequest,
        failed: u64,
    ) -> Result<(), Errno> {
        let tag = request.id.tag;
        self.places.put(tag, Some((request, failed)));
        ring.send(self.to, tag, 0).await;
        match self.own.letter(tag).await {
            Some(0) => Ok(()),
            Some(errno) => Err(Errno(errno)),
            None => Err(EIO),
        }
    }
}

/// The end of a line at the owner.
#[derive(Debug)]
pub(crate) struct Receiver {
    ring: Rc<Ring>,
    devices: Rc<Devices>,
    own: Rc<MailBox>,
    file: u32,
    slot: u16,
    _file: Arc<OwnedFd>,
}

impl Receiver {
    /// Makes the end of a line for a queue of the device that is open as `file`.
    pub(crate) fn new(
        ring: &Rc<Ring>,
        devices: &Rc<Devices>,
        file: Arc<OwnedFd>,
        queue: u16,
        depth: u16,
    ) -> Result<Rc<Self>, ApiError> {
        let what = |error: RingError| failed("the device cannot be served", &error);
        let own = ring.add_box(depth).map_err(what)?;
        let registered = ring.add_file(file.as_fd()).map_err(what)?;
        Ok(Rc::new(Self {
            ring: Rc::clone(ring),
            devices: Rc::clone(devices),
            own,
            file: registered,
            slot: devices.add(registered, queue),
            _file: file,
        }))
    }

    /// Where the other end sends to.
    pub(crate) fn address(&self) -> Address {
        self.ring.address(&self.own)
    }

    /// Serves what comes by `serve`, until the line is closed: one task a tag.
    pub(crate) fn serve(
        self: &Rc<Self>,
        executor: &Executor,
        to: Address,
        places: &Arc<Places>,
        depth: u16,
        serve: impl AsyncFn(HostRequest, u64) -> Result<(), Errno> + 'static,
    ) {
        let serve = Rc::new(serve);
        for tag in 0..depth {
            let (line, places) = (Rc::clone(self), Arc::clone(places));
            let serve = Rc::clone(&serve);
            executor.spawn_serving(async move {
                while line.own.letter(tag).await.is_some() {
                    let (mut request, failed) = places
                        .put(tag, None)
                        .expect("a message comes after its request");
                    request.id = RequestId {
                        device: line.slot,
                        tag,
                    };
                    // Its pages are registered with the other ring.
                    request.zero_copy = false;
                    let errno = serve(request, failed)
                        .await
                        .map_or_else(|errno| errno.0, |()| 0);
                    line.ring.send(to, tag, errno).await;
                }
            });
        }
    }

    /// Lets the tasks end; the other end has nothing on its way any more.
    pub(crate) fn close(&self) {
        self.own.close();
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.devices.remove(self.slot);
        self.ring.remove_file(self.file);
    }
}
