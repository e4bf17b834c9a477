//! A member of a group: a block device or a file that mgmtd opened, on the owner's ring and on those of queue threads.
//!
//! All rings have the same open file description: the kernel's exclusive hold of it ends with the last I/O of any.

use std::cell::Cell;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use lunar_engine::traits::{Buf, Disk, DiskError, DiskVerb, Piece};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::op::{Act, Limit, Place, Spec};
use crate::ring::{Handle, Ring, RingError};

/// Modes of fallocate: reads as zero afterwards, space given back or kept.
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
/// Buffer of the private memory in the ring's table.
pub(crate) const POOL_BUFFER: u16 = 0;

nix::ioctl_read_bad!(
    /// Logical block of a block device.
    block_size,
    libc::BLKSSZGET,
    libc::c_int
);
nix::ioctl_read!(
    /// Bytes of a block device.
    block_bytes,
    0x12,
    114,
    u64
);

/// Why a descriptor cannot be a member.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemberError {
    #[error("its size and kind cannot be read")]
    Stat(#[source] io::Error),
    #[error("it is neither a block device nor a regular file")]
    Kind,
    #[error("it does not take direct I/O")]
    Direct(#[source] io::Error),
    #[error("its logical block is {0} bytes; 512 and 4096 are served")]
    Block(u32),
    #[error(transparent)]
    Ring(RingError),
}

/// What the rings of a member share.
#[derive(Debug)]
pub(crate) struct SharedFile {
    file: OwnedFd,
    shape: Shape,
    cache: Cache,
    /// How old the oldest I/O of each queue thread's ring was when it was looked at last.
    ages: Mutex<Vec<Arc<AtomicU64>>>,
}

impl SharedFile {
    fn ages(&self) -> std::sync::MutexGuard<'_, Vec<Arc<AtomicU64>>> {
        self.ages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open member on one ring.
#[derive(Debug)]
pub(crate) struct MemberFile {
    ring: Rc<Ring>,
    /// Closed after the registered copy, which drop() releases first.
    shared: Arc<SharedFile>,
    slot: u32,
    who: u32,
    abandoned: Cell<bool>,
    /// On a queue thread: where the owner sees how old its oldest I/O is.
    age: Option<Arc<AtomicU64>>,
}

/// What can be learned of a descriptor without a ring.
#[derive(Debug, Clone, Copy)]
struct Shape {
    capacity: u64,
    logical_block: u32,
    dma_mask: u32,
    volatile_cache: bool,
    limit: Limit,
}

impl MemberFile {
    /// Takes a descriptor that is open for reading and writing.
    pub(crate) fn new(ring: &Rc<Ring>, fd: OwnedFd) -> Result<Self, MemberError> {
        set_direct(&fd).map_err(MemberError::Direct)?;
        let file = File::from(fd);
        let shape = shape(&file)?;
        if !matches!(shape.logical_block, 512 | 4096) {
            return Err(MemberError::Block(shape.logical_block));
        }
        let fd = OwnedFd::from(file);
        let shared = Arc::new(SharedFile {
            file: fd,
            cache: Cache::new(shape.volatile_cache),
            shape,
            ages: Mutex::default(),
        });
        Self::register(ring, shared, None).map_err(MemberError::Ring)
    }

    /// Takes a member of the owner's on a queue thread's ring.
    pub(crate) fn on(ring: &Rc<Ring>, shared: &Arc<SharedFile>) -> Result<Self, RingError> {
        let age = Arc::new(AtomicU64::new(0));
        let member = Self::register(ring, Arc::clone(shared), Some(Arc::clone(&age)))?;
        shared.ages().push(age);
        Ok(member)
    }

    fn register(
        ring: &Rc<Ring>,
        shared: Arc<SharedFile>,
        age: Option<Arc<AtomicU64>>,
    ) -> Result<Self, RingError> {
        Ok(Self {
            ring: Rc::clone(ring),
            slot: ring.add_file(shared.file.as_fd())?,
            shared,
            who: ring.next_who(),
            abandoned: Cell::new(false),
            age,
        })
    }

    /// What other rings need of it.
    pub(crate) fn shared(&self) -> Arc<SharedFile> {
        Arc::clone(&self.shared)
    }

    /// It is this member, on this ring.
    pub(crate) fn is_of(&self, shared: &Arc<SharedFile>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    /// Tells the owner how old the oldest I/O on this ring is.
    pub(crate) fn tell_age(&self) {
        if let Some(age) = &self.age {
            age.store(self.ring.oldest(self.who), Ordering::Relaxed);
        }
    }

    /// Nothing on this ring is waited for by the owner.
    pub(crate) fn forget_age(&self) {
        if let Some(age) = &self.age {
            age.store(0, Ordering::Relaxed);
        }
    }

    /// Bits of a request's memory address that must be 0 for this member to take its pages as they are.
    pub(crate) fn dma_mask(&self) -> u32 {
        self.shared.shape.dma_mask
    }
}

impl Drop for MemberFile {
    fn drop(&mut self) {
        self.ring.remove_file(self.slot);
        if let Some(own) = &self.age {
            self.shared.ages().retain(|age| !Arc::ptr_eq(age, own));
        }
    }
}

fn set_direct(fd: &OwnedFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    if !flags.contains(OFlag::O_DIRECT) {
        fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT))?;
    }
    Ok(())
}

fn shape(file: &File) -> Result<Shape, MemberError> {
    let meta = file.metadata().map_err(MemberError::Stat)?;
    let kind = meta.file_type();
    if kind.is_block_device() {
        let (mut block, mut bytes) = (0, 0);
        // SAFETY: each call writes one value of its type to a local variable.
        unsafe {
            block_size(file.as_raw_fd(), &raw mut block)
                .map_err(|e| MemberError::Stat(e.into()))?;
            block_bytes(file.as_raw_fd(), &raw mut bytes)
                .map_err(|e| MemberError::Stat(e.into()))?;
        }
        Ok(Shape {
            capacity: bytes,
            logical_block: u32::try_from(block).unwrap_or(0),
            dma_mask: dma_mask(meta.rdev()),
            // What lies below a device that is made of others may change while it is used: pvmove.
            volatile_cache: has_write_back(meta.rdev()) || is_stacked(meta.rdev()),
            limit: limit(meta.rdev()),
        })
    } else if kind.is_file() {
        let (logical_block, dma_mask) = direct_alignment(file).map_err(MemberError::Stat)?;
        Ok(Shape {
            capacity: meta.len(),
            logical_block,
            dma_mask,
            // The disk below it may have one; only fdatasync says more.
            volatile_cache: true,
            limit: limit(meta.dev()),
        })
    } else {
        Err(MemberError::Kind)
    }
}

/// Alignment of direct I/O to a file: 512 if the file system says so, else 4096; and the mask of its memory.
fn direct_alignment(file: &File) -> io::Result<(u32, u32)> {
    // SAFETY: all-zero bytes are a valid statx.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the result is a local variable.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let known = stat.stx_mask & libc::STATX_DIOALIGN != 0;
    if !known {
        return Ok((4096, 4095));
    }
    let block = if (1..=512).contains(&stat.stx_dio_offset_align) {
        512
    } else {
        4096
    };
    Ok((block, stat.stx_dio_mem_align.max(1) - 1))
}

/// Reads an attribute of a block device's queue. A partition's queue is its disk's.
fn queue_attribute(device: u64, name: &str) -> Option<String> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let base = format!("/sys/dev/block/{major}:{minor}");
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| std::fs::read_to_string(format!("{base}/{queue}/{name}")).ok())
        .map(|text| text.trim().to_owned())
}

/// Says whether a block device has a write-back cache; yes if the kernel does not say.
fn has_write_back(device: u64) -> bool {
    queue_attribute(device, "write_cache").is_none_or(|text| text != "write through")
}

/// Mask of the addresses that a block device takes memory at; that of a sector if the kernel does not say.
fn dma_mask(device: u64) -> u32 {
    let mask = queue_attribute(device, "dma_alignment").and_then(|text| text.parse().ok());
    mask.unwrap_or(511)
}

/// Folder of a block device, or of the disk that a partition is on.
fn disk_folder(device: u64) -> Option<String> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let base = format!("/sys/dev/block/{major}:{minor}");
    ["..", "."]
        .map(|up| format!("{base}/{up}"))
        .into_iter()
        .find(|base| Path::new(&format!("{base}/queue")).exists())
}

/// A device that is made of others: device mapper, md.
fn is_stacked(device: u64) -> bool {
    let below = |folder: String| std::fs::read_dir(format!("{folder}/slaves"));
    disk_folder(device).is_some_and(|folder| below(folder).into_iter().flatten().next().is_some())
}

/// A device without request queues and without devices below it (RAM disks, pmem): nobody cuts its I/O, whatever
/// its limits say.
fn takes_all(device: u64) -> bool {
    let has_queues = |folder: String| Path::new(&format!("{folder}/mq")).exists();
    disk_folder(device).is_some_and(|folder| !has_queues(folder)) && !is_stacked(device)
}

/// Longest I/O that the kernel does not have to cut for a device: its longest request, and a page a segment, since
/// pages of requests are scattered. Whole grains; without limit if the kernel does not say.
fn limit(device: u64) -> Limit {
    if takes_all(device) {
        return Limit::MAX;
    }
    let number = |name: &str| -> Option<u64> { queue_attribute(device, name)?.parse().ok() };
    let grain = lunar_engine::limits::GRAIN;
    let bytes = number("max_sectors_kb").map_or(Limit::MAX, |kib| kib << 10);
    let pages =
        number("max_segments").map_or(Limit::MAX, |segments| segments.saturating_mul(grain));
    match bytes.min(pages) {
        Limit::MAX => Limit::MAX,
        least => (least / grain).max(1) * grain,
    }
}

/// What may be in the volatile cache of a member.
///
/// The owner counts its writes when they have ended: whoever waits for them hears of it later. The host may hear of a
/// queue thread's write, answered by the kernel, and send a flush to the owner before that thread has seen the end: it
/// is counted as begun before it is sent, and as long as it has not been seen to end, a flush is needed.
#[derive(Debug)]
struct Cache {
    volatile: bool,
    begun: AtomicU64,
    /// Failed ones too.
    ended: AtomicU64,
    /// One more than the writes that are durable; 0: nothing was flushed yet, and a former process may have written.
    flushed: AtomicU64,
}

impl Cache {
    /// A flush would change nothing. The kernel too sends none to a disk without a volatile cache, but each costs a
    /// worker thread of the ring.
    fn is_durable(&self) -> bool {
        let begun = self.begun.load(Ordering::SeqCst);
        !self.volatile || self.flushed.load(Ordering::SeqCst) == begun + 1
    }

    fn new(volatile: bool) -> Self {
        Self {
            volatile,
            begun: AtomicU64::new(0),
            ended: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
        }
    }
}

/// What an I/O changes in its member's cache when it ends.
#[derive(Debug)]
enum Note {
    None,
    /// Not counted as begun yet.
    Write(Arc<SharedFile>),
    BegunWrite(Arc<SharedFile>),
    /// It covers this many writes: those that had ended when it was started.
    Flush(Arc<SharedFile>, u64),
}

impl Note {
    fn ended(&self, ok: bool) {
        match self {
            Self::None => {}
            Self::Write(file) => {
                file.cache.begun.fetch_add(1, Ordering::SeqCst);
                file.cache.ended.fetch_add(1, Ordering::SeqCst);
            }
            Self::BegunWrite(file) => {
                file.cache.ended.fetch_add(1, Ordering::SeqCst);
            }
            // Of two at once the later may end first.
            Self::Flush(file, covered) if ok => {
                file.cache.flushed.fetch_max(*covered + 1, Ordering::SeqCst);
            }
            Self::Flush(..) => {}
        }
    }
}

/// One I/O of a member.
#[derive(Debug)]
pub(crate) struct MemberIo(Kind);

#[derive(Debug)]
enum Kind {
    Running(Handle, Note),
    /// There is nothing to do.
    Nothing,
    Refused,
}

impl Future for MemberIo {
    type Output = Result<(), DiskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Kind::Running(handle, note) => Pin::new(handle).poll(cx).map(|result| {
                note.ended(result.is_ok());
                result.map(drop)
            }),
            Kind::Nothing => Poll::Ready(Ok(())),
            Kind::Refused => Poll::Ready(Err(DiskError::Abandoned)),
        }
    }
}

impl Disk for MemberFile {
    type Io = MemberIo;

    fn submit(
        &self,
        verb: DiskVerb,
        at: u64,
        len: u64,
        buf: Buf<'_>,
        pieces: &[Piece],
    ) -> MemberIo {
        if self.abandoned.get() {
            return MemberIo(Kind::Refused);
        }
        let cache = &self.shared.cache;
        let note = match verb {
            DiskVerb::Flush if cache.is_durable() => return MemberIo(Kind::Nothing),
            DiskVerb::Flush => {
                Note::Flush(Arc::clone(&self.shared), cache.ended.load(Ordering::SeqCst))
            }
            DiskVerb::Read => Note::None,
            // Without a volatile cache nobody asks.
            _ if !cache.volatile => Note::None,
            DiskVerb::Write { .. } | DiskVerb::Discard | DiskVerb::WriteZeroes
                if self.age.is_some() =>
            {
                cache.begun.fetch_add(1, Ordering::SeqCst);
                Note::BegunWrite(Arc::clone(&self.shared))
            }
            DiskVerb::Write { .. } | DiskVerb::Discard | DiskVerb::WriteZeroes => {
                Note::Write(Arc::clone(&self.shared))
            }
        };
        let act = match verb {
            DiskVerb::Read => Act::Read,
            DiskVerb::Write { fua } => Act::Write { fua },
            DiskVerb::Flush => Act::Flush,
            DiskVerb::Discard => Act::Allocate { mode: PUNCH },
            DiskVerb::WriteZeroes => Act::Allocate { mode: ZERO },
        };
        let (place, base, lease) = match buf {
            Buf::None => (Place::None, 0, None),
            Buf::Request(id) | Buf::Answer(id) => {
                (Place::Request(self.ring.request_buffer(id)), 0, None)
            }
            Buf::Pool(lease) => (
                Place::Registered(POOL_BUFFER),
                lease.cells(0..lease.len()).as_ptr().expose_provenance(),
                Some(lease.clone()),
            ),
        };
        let vectors = pieces
            .iter()
            .map(|piece| (base + piece.offset as usize, piece.len as usize));
        let spec = Spec {
            who: self.who,
            file: self.slot,
            act,
            at,
            len,
            place,
            lease,
        };
        let handle = match buf {
            Buf::Answer(id) if len <= self.shared.shape.limit => {
                self.ring.start_answering(id, spec, vectors)
            }
            _ => (self.ring).start_in_parts(self.shared.shape.limit, spec, vectors),
        };
        MemberIo(Kind::Running(handle, note))
    }

    fn capacity(&self) -> u64 {
        self.shared.shape.capacity
    }

    fn logical_block(&self) -> u32 {
        self.shared.shape.logical_block
    }

    fn abandon(&self) {
        self.abandoned.set(true);
        self.ring.abandon(self.who);
    }

    fn oldest(&self) -> u64 {
        let ages = self.shared.ages();
        let theirs = ages.iter().map(|age| age.load(Ordering::Relaxed)).max();
        self.ring.oldest(self.who).max(theirs.unwrap_or(0))
    }

    fn has_volatile_cache(&self) -> bool {
        self.shared.cache.volatile
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cached() -> Arc<SharedFile> {
        Arc::new(SharedFile {
            file: File::open("/dev/null").unwrap().into(),
            shape: Shape {
                capacity: 0,
                logical_block: 512,
                dma_mask: 0,
                volatile_cache: true,
                limit: 0,
            },
            cache: Cache::new(true),
            ages: Mutex::default(),
        })
    }

    fn flush(file: &Arc<SharedFile>) -> Note {
        Note::Flush(Arc::clone(file), file.cache.ended.load(Ordering::SeqCst))
    }

    #[test]
    fn flush_is_needed_after_writes_that_it_did_not_see() {
        let file = cached();
        let write = Note::Write(Arc::clone(&file));
        assert!(
            !file.cache.is_durable(),
            "a former process may have written"
        );
        flush(&file).ended(true);
        assert!(file.cache.is_durable());
        let early = flush(&file);
        write.ended(true);
        early.ended(true);
        assert!(!file.cache.is_durable(), "it ended after the flush began");
        let (older, newer) = (flush(&file), flush(&file));
        newer.ended(true);
        older.ended(false);
        assert!(file.cache.is_durable());
        write.ended(false);
        assert!(!file.cache.is_durable(), "a write that failed may be there");
    }

    #[test]
    fn flush_is_needed_for_a_queue_threads_write_that_it_has_not_seen_the_end_of() {
        let file = cached();
        flush(&file).ended(true);
        file.cache.begun.fetch_add(1, Ordering::SeqCst);
        let write = Note::BegunWrite(Arc::clone(&file));
        assert!(!file.cache.is_durable());
        let early = flush(&file);
        write.ended(true);
        early.ended(true);
        assert!(!file.cache.is_durable());
        flush(&file).ended(true);
        assert!(file.cache.is_durable());
    }
}
