//! Serves the tags of one queue of a device on a ring, and moves bytes between a request and private memory.
//!
//! One task a tag, made when the device is attached: fetch, copy the descriptor, serve, commit and fetch the
//! next. A task ends when the kernel aborts its tag: the device is stopped or quiesced.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use libublk::sys;
use lunar_engine::pool::Lease;
use lunar_engine::raid_group::Errno;
use lunar_engine::sync::Waiters;
use lunar_engine::traits::{DiskError, Front, HostRequest, HostVerb, RequestId};
use memmap2::{MmapOptions, MmapRaw};

use crate::op::{Act, Place, Spec};
use crate::ring::{Handle, Ring, RingError};

/// What the kernel answers on a tag that it takes back.
const ABORT: i32 = -libc::ENODEV;
const PAGE: usize = 4096;
/// Bytes from one queue's descriptors to the next's: the deepest queue's.
const QUEUE_BYTES: u64 =
    sys::UBLK_MAX_QUEUE_DEPTH as u64 * size_of::<sys::ublksrv_io_desc>() as u64;
const _: () = assert!(QUEUE_BYTES.is_multiple_of(PAGE as u64));
const ANSWERED: &str = "commands are answered by their number";

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    #[error("the descriptors of its requests cannot be mapped")]
    Map(#[source] io::Error),
    #[error(transparent)]
    Ring(RingError),
}

/// A device as the kernel described it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// N of /dev/ublkbN.
    pub(crate) number: u32,
    pub(crate) queues: u16,
    /// Of each queue.
    pub(crate) depth: u16,
    /// The kernel registers each request's pages (AUTO_BUF_REG).
    pub(crate) registers: bool,
    /// They are used: false is copy mode.
    pub(crate) zero_copy: bool,
}

/// Files and queues of the devices of a ring, by device slot.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    files: RefCell<Vec<Option<(u32, u16)>>>,
}

impl Devices {
    pub(crate) fn add(&self, file: u32, queue: u16) -> u16 {
        let mut files = self.files.borrow_mut();
        let slot = files.iter().position(Option::is_none).unwrap_or_else(|| {
            files.push(None);
            files.len() - 1
        });
        files[slot] = Some((file, queue));
        u16::try_from(slot).expect("fewer devices than files")
    }

    pub(crate) fn remove(&self, slot: u16) {
        self.files.borrow_mut()[usize::from(slot)] = None;
    }

    fn file(&self, slot: u16) -> Option<(u32, u16)> {
        *self.files.borrow().get(usize::from(slot))?
    }
}

/// What the commands of a device are made of.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tags {
    /// First registered buffer.
    pub(crate) base: u16,
    /// Registered file.
    file: u32,
    queue: u16,
    /// The kernel registers each request's pages.
    registers: bool,
}

impl Tags {
    /// The command that answers a tag's request and fetches the next.
    pub(crate) fn commit(&self, tag: u16, result: i32) -> Spec {
        self.command(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, result)
    }

    fn fetch(&self, tag: u16) -> Spec {
        self.command(sys::UBLK_U_IO_FETCH_REQ, tag, 0)
    }

    fn command(&self, op: u32, tag: u16, result: i32) -> Spec {
        let mut bytes = [0; 16];
        // struct ublksrv_io_cmd: q_id, tag, result, addr 0 (user copy).
        bytes[..2].copy_from_slice(&self.queue.to_ne_bytes());
        bytes[2..4].copy_from_slice(&tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&result.to_ne_bytes());
        let addr = if self.registers {
            u64::from(self.base + tag) | u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK) << 16
        } else {
            0
        };
        Spec {
            who: 0,
            file: self.file,
            act: Act::Command { op, bytes, addr },
            at: 0,
            len: 0,
            place: Place::None,
            lease: None,
        }
    }
}

/// A queue of a device being served.
pub(crate) struct Device {
    pub(crate) shape: Shape,
    ring: Rc<Ring>,
    devices: Rc<Devices>,
    descriptors: MmapRaw,
    /// Closed after the registered copy, which drop() releases first.
    _file: Arc<OwnedFd>,
    commands: Tags,
    slot: u16,
    tags: Cell<u16>,
    ended: Waiters,
    problem: RefCell<String>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("shape", &self.shape)
            .field("tags", &self.tags.get())
            .finish_non_exhaustive()
    }
}

impl Device {
    /// Takes a queue of the device whose /dev/ublkcN is open as `file`.
    pub(crate) fn new(
        ring: &Rc<Ring>,
        devices: &Rc<Devices>,
        file: Arc<OwnedFd>,
        shape: Shape,
        queue: u16,
    ) -> Result<Rc<Self>, DeviceError> {
        let bytes = usize::from(shape.depth) * size_of::<sys::ublksrv_io_desc>();
        let descriptors = MmapOptions::new()
            .offset(u64::from(queue) * QUEUE_BYTES)
            .len(bytes.next_multiple_of(PAGE))
            .map_raw_read_only(&*file)
            .map_err(DeviceError::Map)?;
        let base = ring.add_requests(shape.depth).map_err(DeviceError::Ring)?;
        let registered = ring
            .add_file(file.as_fd())
            .inspect_err(|_| ring.remove_requests(base));
        let registered = registered.map_err(DeviceError::Ring)?;
        let slot = devices.add(registered, queue);
        let commands = Tags {
            base,
            file: registered,
            queue,
            registers: shape.registers,
        };
        ring.set_tags(slot, commands, shape.depth);
        Ok(Rc::new(Self {
            shape,
            ring: Rc::clone(ring),
            devices: Rc::clone(devices),
            descriptors,
            _file: file,
            commands,
            slot,
            tags: Cell::new(shape.depth),
            ended: Waiters::default(),
            problem: RefCell::default(),
        }))
    }

    /// Serves one tag until the kernel takes it back.
    pub(crate) async fn serve_tag<F>(self: Rc<Self>, tag: u16, serve: impl Fn(HostRequest) -> F)
    where
        F: Future<Output = Result<(), Errno>>,
    {
        let mut answer = self.command(self.commands.fetch(tag)).await;
        while answer == 0 {
            let result = match self.request(tag) {
                Ok(request) => match serve(request).await {
                    Ok(()) => done(&request),
                    Err(errno) => super::host_errno(errno),
                },
                Err(errno) => -errno,
            };
            // Chained to the request's I/O: cancelled if that failed, refused if it did not reach the kernel's tag.
            // Either way the tag is still ours to answer.
            if let Some(chained) = self.ring.take_answer(self.id(tag)) {
                answer = chained.await.expect(ANSWERED);
                if answer >= 0 || answer == ABORT {
                    continue;
                }
            }
            answer = self.command(self.commands.commit(tag, result)).await;
        }
        if answer != ABORT {
            let error = io::Error::from_raw_os_error(-answer);
            tracing::error!(device = self.shape.number, tag, %error, "the kernel refuses a tag");
            *self.problem.borrow_mut() = format!("the kernel refused tag {tag}: {error}");
        }
        self.tags.set(self.tags.get() - 1);
        if self.tags.get() == 0 {
            self.ended.wake_all();
        }
    }

    async fn command(&self, spec: Spec) -> i32 {
        self.ring
            .start(spec, std::iter::empty())
            .await
            .expect(ANSWERED)
    }

    fn id(&self, tag: u16) -> RequestId {
        RequestId {
            device: self.slot,
            tag,
        }
    }

    /// Copies a tag's descriptor out of shared memory and reads it; Err is an errno.
    fn request(&self, tag: u16) -> Result<HostRequest, i32> {
        let descriptors = self.descriptors.as_ptr().cast::<sys::ublksrv_io_desc>();
        // SAFETY: the mapping holds `depth` descriptors, the tag is below it, and a page is aligned enough.
        // The kernel wrote it before the completion and leaves it alone until the commit; it is read once.
        let descriptor = unsafe { descriptors.add(usize::from(tag)).read_volatile() };
        let flags = descriptor.op_flags;
        let verb = match flags & 0xff {
            sys::UBLK_IO_OP_READ => HostVerb::Read,
            sys::UBLK_IO_OP_WRITE => HostVerb::Write {
                fua: flags & sys::UBLK_IO_F_FUA != 0,
            },
            sys::UBLK_IO_OP_FLUSH => HostVerb::Flush,
            sys::UBLK_IO_OP_DISCARD => HostVerb::Discard,
            sys::UBLK_IO_OP_WRITE_ZEROES => HostVerb::WriteZeroes,
            _ => return Err(libc::EOPNOTSUPP),
        };
        // A flush has no place; what the kernel leaves there is beyond every device.
        let (sector, sectors) = match verb {
            HostVerb::Flush => (0, 0),
            HostVerb::Read | HostVerb::Write { .. } | HostVerb::Discard | HostVerb::WriteZeroes => {
                (descriptor.start_sector, descriptor.nr_sectors)
            }
        };
        Ok(HostRequest {
            id: self.id(tag),
            verb,
            at: sector << 9,
            len: u64::from(sectors) << 9,
            // Registration failed for this one: it goes by copy.
            zero_copy: self.shape.zero_copy && flags & sys::UBLK_IO_F_NEED_REG_BUF == 0,
        })
    }

    /// Waits until the kernel has taken back every tag.
    pub(crate) async fn end(&self) {
        self.ended
            .until(|| (self.tags.get() == 0).then_some(()))
            .await;
    }

    /// Why it is not served in full; empty when it is.
    pub(crate) fn problem(&self) -> String {
        if self.tags.get() == 0 && self.problem.borrow().is_empty() {
            return "its kernel device was stopped by somebody else".into();
        }
        self.problem.borrow().clone()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.devices.remove(self.slot);
        self.ring.remove_file(self.commands.file);
        self.ring.remove_requests(self.commands.base);
    }
}

/// What is committed for a request that was served: bytes moved, or 0.
fn done(request: &HostRequest) -> i32 {
    match request.verb {
        HostVerb::Read | HostVerb::Write { .. } => {
            i32::try_from(request.len).expect("requests are at most IO_BYTES_MAX")
        }
        HostVerb::Flush | HostVerb::Discard | HostVerb::WriteZeroes => 0,
    }
}

/// Moves bytes between requests and private memory: user copy, batched on the ring like everything else.
#[derive(Debug)]
pub(crate) struct UblkFront {
    pub(crate) ring: Rc<Ring>,
    pub(crate) devices: Rc<Devices>,
}

impl UblkFront {
    fn transfer(
        &self,
        act: Act,
        id: RequestId,
        offset: u32,
        memory: usize,
        len: u32,
        lease: &Lease,
    ) -> CopyIo {
        let Some((file, queue)) = self.devices.file(id.device) else {
            return CopyIo::Gone;
        };
        let at = u64::from(sys::UBLKSRV_IO_BUF_OFFSET)
            + (u64::from(queue) << sys::UBLK_QID_OFF)
            + (u64::from(id.tag) << sys::UBLK_TAG_OFF)
            + u64::from(offset);
        let spec = Spec {
            who: 0,
            file,
            act,
            at,
            len: u64::from(len),
            // The kernel takes plain memory only for this, not a registered buffer.
            place: Place::Memory,
            lease: Some(lease.clone()),
        };
        let vectors = std::iter::once((memory, len as usize));
        CopyIo::Running(self.ring.start(spec, vectors))
    }
}

fn address(lease: &Lease, from: u32, len: u32) -> usize {
    let range = from as usize..from as usize + len as usize;
    lease.cells(range).as_ptr().expose_provenance()
}

impl Front for UblkFront {
    type Io = CopyIo;

    fn fetch(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, into: u32) -> CopyIo {
        self.transfer(Act::Read, id, offset, address(lease, into, len), len, lease)
    }

    fn fill(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, from: u32) -> CopyIo {
        let act = Act::Write { fua: false };
        self.transfer(act, id, offset, address(lease, from, len), len, lease)
    }
}

/// One transfer.
#[derive(Debug)]
pub(crate) enum CopyIo {
    Running(Handle),
    /// The device is not there any more.
    Gone,
}

impl Future for CopyIo {
    type Output = Result<(), DiskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Running(handle) => Pin::new(handle).poll(cx).map(|result| result.map(drop)),
            Self::Gone => Poll::Ready(Err(DiskError::Errno(libc::ENODEV))),
        }
    }
}
