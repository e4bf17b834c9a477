//! What the engine asks of the world: disks, requests, memory, time.
//!
//! Everything runs on one thread (the group's owner); nothing here is `Send`. A submitted I/O runs to its
//! end whether or not its future is still looked at: the implementation keeps the buffer (a [`Lease`]
//! clone) until the kernel is done with it.

use std::cell::Cell;
use std::future::Future;
use std::ops::Range;

use crate::pool::Lease;

/// Nanoseconds on a clock that never goes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tick(pub u64);

/// One millisecond in ticks.
pub const MILLISECOND: u64 = 1_000_000;
/// One second in ticks.
pub const SECOND: u64 = 1_000_000_000;

/// Time, handed in.
pub trait Clock: 'static {
    /// A wait that ends.
    type Sleep: Future<Output = ()> + Unpin;
    /// Now.
    fn now(&self) -> Tick;
    /// Ends no earlier than `ns` nanoseconds from now.
    fn sleep(&self, ns: u64) -> Self::Sleep;
    /// Ends at the next multiple of `ns`: all who look around now and then wake a thread together.
    fn turn(&self, ns: u64) -> Self::Sleep {
        self.sleep(ns - self.now().0 % ns)
    }
    /// Milliseconds since 1970, UTC: for people. Nothing is ordered or decided by it.
    fn date(&self) -> u64;
}

/// Why a member's I/O failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// The member answered an error; errno as the kernel gave it (EIO, ENODATA, ENODEV, EREMOTEIO, ...).
    #[error("errno {0}")]
    Errno(i32),
    /// Fewer bytes than asked for, and no more to come.
    #[error("short transfer: {0} bytes")]
    Short(u32),
    /// The member was abandoned: it did not answer within its limit, or it was failed.
    #[error("abandoned")]
    Abandoned,
}

/// What to do with a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskVerb {
    /// Member to buffer.
    Read,
    /// Buffer to member; with `fua` it is durable when it completes.
    Write { fua: bool },
    /// All completed writes durable.
    Flush,
    /// The range may forget its content.
    Discard,
    /// The range reads as zero afterwards.
    WriteZeroes,
}

/// A piece of a buffer: bytes from the start of the request, or of the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub offset: u32,
    pub len: u32,
}

/// Where the bytes of a member I/O are.
#[derive(Debug)]
pub enum Buf<'a> {
    /// None: flush, discard, zeroes.
    None,
    /// The pages of a host request, registered with the ring: the CPU cannot touch them.
    Request(RequestId),
    /// As `Request`, and this I/O is all that is left to do for it: if all of it succeeds, `serve` will answer Ok.
    /// The disk may then answer the host already as this I/O ends.
    Answer(RequestId),
    /// Private memory.
    Pool(&'a Lease),
}

/// A member of a group: a block device or a file, opened once.
pub trait Disk: 'static {
    /// One I/O in flight. Dropping it before it is done is a bug; it does not cancel anything.
    type Io: Future<Output = Result<(), DiskError>> + Unpin;

    /// Starts an I/O at byte `at` of the member. `pieces` are taken in order and are adjacent on the member;
    /// `len` is their sum (or the length of a discard). At most [`PIECES_MAX`] pieces.
    /// Never fails here, never blocks: a full ring is flow control inside.
    fn submit(&self, verb: DiskVerb, at: u64, len: u64, buf: Buf<'_>, pieces: &[Piece])
    -> Self::Io;

    /// Bytes.
    fn capacity(&self) -> u64;
    /// Bytes; 512 or 4096.
    fn logical_block(&self) -> u32;
    /// Gives up on everything in flight on pool memory: those futures end with `Abandoned` at once, their
    /// leases stay taken until the kernel is done. Later submits end with `Abandoned`.
    fn abandon(&self);
    /// Age in ns of the oldest I/O in flight; 0 if there is none.
    fn oldest(&self) -> u64;
    /// Says whether writes may sit in a volatile cache.
    fn has_volatile_cache(&self) -> bool;
}

/// Most pieces of one submit.
pub const PIECES_MAX: usize = 16;

/// Names a host request while it is served: device slot and tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// Device slot in its owner's ring.
    pub device: u16,
    pub tag: u16,
}

/// What the host wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostVerb {
    Read,
    Write {
        fua: bool,
    },
    Flush,
    Discard,
    /// `unmap` false means that the space must stay allocated (it always is here).
    WriteZeroes,
}

/// A request of the host, by value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRequest {
    pub id: RequestId,
    pub verb: HostVerb,
    /// Bytes from the start of the LU.
    pub at: u64,
    /// Bytes; up to `limits::MAX_IO` for reads and writes.
    pub len: u64,
    /// The request's pages may be given to member I/O (`Buf::Request`). False: copy mode.
    pub zero_copy: bool,
}

/// The side towards the host: moves bytes between a request's pages and private memory.
pub trait Front: 'static {
    /// One transfer in flight.
    type Io: Future<Output = Result<(), DiskError>> + Unpin;
    /// Copies bytes `[offset, offset+len)` of a WRITE request into the lease at `into`.
    fn fetch(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, into: u32) -> Self::Io;
    /// Copies `len` bytes of the lease at `from` into a READ request at `offset`.
    fn fill(&self, id: RequestId, offset: u32, len: u32, lease: &Lease, from: u32) -> Self::Io;
}

/// The private memory of a group: aligned to 4096, locked, registered with the ring as one buffer.
pub trait Memory: 'static {
    /// Bytes in all.
    fn bytes(&self) -> usize;
    /// A view; shared with the kernel while an I/O is in flight, hence cells.
    fn cells(&self, range: Range<usize>) -> &[Cell<u8>];
}

/// The kinds of one world, together.
pub trait Env: 'static {
    type Disk: Disk;
    type Clock: Clock;
    type Front: Front;
}
