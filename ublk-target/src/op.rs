//! An operation of the ring and the slab it lives in until the kernel has answered.
//!
//! Whoever waits may go away: the operation stays, with what keeps its memory, and is freed by its
//! completion. A place carries a generation, so that a late completion never meets a later operation.

use std::task::Waker;

use arrayvec::ArrayVec;
use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{opcode, squeue};
use lunar_engine::pool::Lease;
use lunar_engine::traits::{DiskError, PIECES_MAX};

/// Operations in one piece of the slab; pieces never move, the kernel reads io vectors in them.
const CHUNK: usize = 256;
/// Pieces that a ring begins with.
const CHUNKS: usize = 4;
/// POLLIN.
const READABLE: u32 = 1;
/// A generation is half of a completion's number, of which the highest bit tells messages.
const GENERATION_MAX: u32 = u32::MAX >> 1;
/// How often an operation is sent again that the kernel asks to repeat.
const RETRIES_MAX: u8 = 64;

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Read,
    Write {
        fua: bool,
    },
    /// fdatasync.
    Flush,
    /// `fallocate` with this mode.
    Allocate {
        mode: i32,
    },
    /// Until the file is readable.
    Poll,
    /// A message to another ring of this process.
    Message {
        ring: i32,
        data: u64,
        value: i32,
    },
    /// A command of a character device; `addr` goes beside it.
    Command {
        op: u32,
        bytes: [u8; 16],
        addr: u64,
    },
}

/// Where the bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// No bytes.
    None,
    /// A registered buffer; vectors hold addresses in it.
    Registered(u16),
    /// A registered request of the host; vectors hold offsets in it.
    Request(u16),
    /// Plain memory.
    Memory,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    /// Not handed to the kernel yet.
    Queued,
    InFlight,
    Done(Result<i32, DiskError>),
}

/// What a new operation is made of.
pub(crate) struct Spec {
    /// Who asks: a member, or the ring's user.
    pub(crate) who: u32,
    /// Registered file.
    pub(crate) file: u32,
    pub(crate) act: Act,
    pub(crate) at: u64,
    pub(crate) len: u64,
    pub(crate) place: Place,
    pub(crate) lease: Option<Lease>,
}

/// Most bytes that go to a file in one piece; what is longer goes in parts, all at once.
///
/// The kernel would have to cut them, and what it has to cut it does not submit at once but leaves to a worker thread
/// of the ring, one after the other.
pub(crate) type Limit = u64;

pub(crate) struct Op {
    pub(crate) generation: u32,
    pub(crate) state: State,
    /// Nobody waits any more: the completion frees it.
    pub(crate) orphan: bool,
    /// Given up: whoever waits is told so.
    pub(crate) abandoned: bool,
    /// The operation that this one is a part of.
    pub(crate) whole: Option<u32>,
    /// Parts that have not ended, itself included.
    pub(crate) parts: u32,
    /// What the first part that failed said.
    pub(crate) failed: Option<DiskError>,
    /// The operation that the kernel starts as soon as this one has succeeded, and cancels if it has not.
    pub(crate) then: Option<u32>,
    pub(crate) waker: Option<Waker>,
    pub(crate) lease: Option<Lease>,
    pub(crate) who: u32,
    pub(crate) started: u64,
    file: u32,
    act: Act,
    at: u64,
    len: u64,
    done: u64,
    pub(crate) place: Place,
    vectors: [libc::iovec; PIECES_MAX],
    first: usize,
    end: usize,
    retries: u8,
}

const NO_VECTOR: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

impl Op {
    fn free() -> Self {
        Self {
            generation: 0,
            state: State::Free,
            orphan: false,
            abandoned: false,
            whole: None,
            parts: 1,
            failed: None,
            then: None,
            waker: None,
            lease: None,
            who: 0,
            started: 0,
            file: 0,
            act: Act::Flush,
            at: 0,
            len: 0,
            done: 0,
            place: Place::None,
            vectors: [NO_VECTOR; PIECES_MAX],
            first: 0,
            end: 0,
            retries: 0,
        }
    }

    fn set(&mut self, spec: Spec, vectors: impl Iterator<Item = (usize, usize)>, now: u64) {
        self.state = State::Queued;
        self.orphan = false;
        self.abandoned = false;
        self.whole = None;
        self.parts = 1;
        self.failed = None;
        self.then = None;
        self.who = spec.who;
        self.started = now;
        self.file = spec.file;
        self.act = spec.act;
        self.at = spec.at;
        self.len = spec.len;
        self.done = 0;
        self.place = spec.place;
        self.lease = spec.lease;
        self.first = 0;
        self.end = 0;
        self.retries = 0;
        for (base, len) in vectors {
            self.push_vector(base, len);
        }
    }

    /// Adds a vector, to the last one if it goes on there: one range is cheaper for the kernel than many.
    fn push_vector(&mut self, base: usize, len: usize) {
        if let Some(last) = self.end.checked_sub(1) {
            let last = &mut self.vectors[last];
            if last.iov_base.addr() + last.iov_len == base {
                last.iov_len += len;
                return;
            }
        }
        assert!(self.end < PIECES_MAX, "more than {PIECES_MAX} pieces");
        self.vectors[self.end] = libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(base),
            iov_len: len,
        };
        self.end += 1;
    }

    /// Cuts off what is beyond `limit`: what the rest is to be made of, and its vectors in `rest`.
    pub(crate) fn cut(&mut self, limit: Limit, rest: &mut Vectors) -> Option<Spec> {
        let moves = matches!(self.act, Act::Read | Act::Write { .. });
        if self.len <= limit || !moves {
            return None;
        }
        rest.clear();
        let mut room = usize::try_from(limit).unwrap_or(usize::MAX);
        let mut end = 0;
        for i in 0..self.end {
            let vector = &mut self.vectors[i];
            let (base, len) = (vector.iov_base.addr(), vector.iov_len);
            let kept = len.min(room);
            room -= kept;
            vector.iov_len = kept;
            if kept > 0 {
                end = i + 1;
            }
            if kept < len {
                rest.push((base + kept, len - kept));
            }
        }
        self.end = end;
        let spec = Spec {
            who: self.who,
            file: self.file,
            act: self.act,
            at: self.at + limit,
            len: self.len - limit,
            place: self.place,
            // The first part keeps it until the last has ended.
            lease: None,
        };
        self.len = limit;
        Some(spec)
    }

    /// Builds the entry for what is left to do. `vector_fixed`: the kernel takes vectors of registered memory.
    pub(crate) fn entry(&self, vector_fixed: bool) -> squeue::Entry {
        let fd = Fixed(self.file);
        match self.act {
            Act::Read => self.read_entry(fd, vector_fixed),
            Act::Write { fua } => {
                self.write_entry(fd, if fua { libc::RWF_DSYNC } else { 0 }, vector_fixed)
            }
            Act::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Act::Allocate { mode } => opcode::Fallocate::new(fd, self.len)
                .offset(self.at)
                .mode(mode)
                .build(),
            Act::Poll => opcode::PollAdd::new(fd, READABLE).build(),
            Act::Message { ring, data, value } => {
                opcode::MsgRingData::new(Fd(ring), value, data, None).build()
            }
            Act::Command { op, bytes, addr } => opcode::UringCmd16::new(fd, op)
                .cmd(bytes)
                .addr(Some(addr))
                .build(),
        }
    }

    fn one(&self) -> (*mut u8, u32) {
        let vector = &self.vectors[self.first];
        let len = u32::try_from(vector.iov_len).expect("pieces are below 4 GiB");
        (vector.iov_base.cast(), len)
    }

    fn many(&self) -> (*const libc::iovec, u32) {
        let count = u32::try_from(self.end - self.first).expect("at most PIECES_MAX");
        (&raw const self.vectors[self.first], count)
    }

    fn read_entry(&self, fd: Fixed, vector_fixed: bool) -> squeue::Entry {
        let (base, len) = self.one();
        let (vectors, count) = self.many();
        match (self.place, count) {
            (Place::Registered(index) | Place::Request(index), 1) => {
                opcode::ReadFixed::new(fd, base, len, index)
                    .offset(self.at)
                    .build()
            }
            (Place::Request(index), _) => opcode::ReadvFixed::new(fd, vectors, count, index)
                .offset(self.at)
                .build(),
            (Place::Registered(index), _) if vector_fixed => {
                opcode::ReadvFixed::new(fd, vectors, count, index)
                    .offset(self.at)
                    .build()
            }
            (Place::None | Place::Memory, 1) => {
                opcode::Read::new(fd, base, len).offset(self.at).build()
            }
            (Place::None | Place::Memory | Place::Registered(_), _) => {
                opcode::Readv::new(fd, vectors, count)
                    .offset(self.at)
                    .build()
            }
        }
    }

    fn write_entry(&self, fd: Fixed, flags: i32, vector_fixed: bool) -> squeue::Entry {
        let (base, len) = self.one();
        let (vectors, count) = self.many();
        match (self.place, count) {
            (Place::Registered(index) | Place::Request(index), 1) => {
                opcode::WriteFixed::new(fd, base, len, index)
                    .offset(self.at)
                    .rw_flags(flags)
                    .build()
            }
            (Place::Request(index), _) => opcode::WritevFixed::new(fd, vectors, count, index)
                .offset(self.at)
                .rw_flags(flags)
                .build(),
            (Place::Registered(index), _) if vector_fixed => {
                opcode::WritevFixed::new(fd, vectors, count, index)
                    .offset(self.at)
                    .rw_flags(flags)
                    .build()
            }
            (Place::None | Place::Memory, 1) => opcode::Write::new(fd, base, len)
                .offset(self.at)
                .rw_flags(flags)
                .build(),
            (Place::None | Place::Memory | Place::Registered(_), _) => {
                opcode::Writev::new(fd, vectors, count)
                    .offset(self.at)
                    .rw_flags(flags)
                    .build()
            }
        }
    }

    /// Takes the kernel's answer: the outcome, or None when there is more to do.
    pub(crate) fn advance(&mut self, result: i32) -> Option<Result<i32, DiskError>> {
        if matches!(
            self.act,
            Act::Command { .. } | Act::Message { .. } | Act::Poll
        ) {
            return Some(Ok(result));
        }
        if result == -libc::EINTR || result == -libc::EAGAIN {
            self.retries += 1;
            return (self.retries > RETRIES_MAX).then_some(Err(DiskError::Errno(libc::EIO)));
        }
        let Ok(count) = u32::try_from(result) else {
            return Some(Err(DiskError::Errno(-result)));
        };
        if !matches!(self.act, Act::Read | Act::Write { .. }) {
            return Some(Ok(0));
        }
        self.done += u64::from(count);
        if self.done == self.len {
            return Some(Ok(0));
        }
        if count == 0 || self.done > self.len {
            let done = u32::try_from(self.done).unwrap_or(u32::MAX);
            return Some(Err(DiskError::Short(done)));
        }
        self.skip(count as usize);
        None
    }

    fn skip(&mut self, mut count: usize) {
        self.at += count as u64;
        while count > 0 {
            let vector = &mut self.vectors[self.first];
            let step = count.min(vector.iov_len);
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(step).cast();
            vector.iov_len -= step;
            count -= step;
            if vector.iov_len == 0 {
                self.first += 1;
            }
        }
    }
}

/// Addresses and lengths.
pub(crate) type Vectors = ArrayVec<(usize, usize), PIECES_MAX>;

/// All operations of a ring.
pub(crate) struct Slab {
    chunks: Vec<Box<[Op]>>,
    free: Vec<u32>,
}

impl Slab {
    pub(crate) fn new() -> Self {
        let mut slab = Self {
            chunks: Vec::with_capacity(256),
            free: Vec::with_capacity(4096),
        };
        // The tags of a queue and what they have in flight.
        for _ in 0..CHUNKS {
            slab.grow();
        }
        slab
    }

    /// Only until there is one for every I/O that can be in flight at once.
    fn grow(&mut self) {
        let start = self.chunks.len() * CHUNK;
        self.chunks.push((0..CHUNK).map(|_| Op::free()).collect());
        let index = |i: usize| u32::try_from(i).expect("far fewer than 2^32 operations");
        self.free.extend((start..start + CHUNK).rev().map(index));
    }

    /// Adds an operation; answers its index and generation.
    pub(crate) fn insert(
        &mut self,
        spec: Spec,
        vectors: impl Iterator<Item = (usize, usize)>,
        now: u64,
    ) -> (u32, u32) {
        if self.free.is_empty() {
            self.grow();
        }
        let index = self.free.pop().expect("grown");
        let op = self.get(index);
        op.set(spec, vectors, now);
        (index, op.generation)
    }

    pub(crate) fn get(&mut self, index: u32) -> &mut Op {
        let index = index as usize;
        &mut self.chunks[index / CHUNK][index % CHUNK]
    }

    /// Ends a part of an operation; answers the whole when this was its last part: its lease, its waker.
    pub(crate) fn end_part(
        &mut self,
        index: u32,
        outcome: Result<i32, DiskError>,
    ) -> Option<(Option<Lease>, Option<Waker>)> {
        let whole = match self.get(index).whole {
            Some(whole) => {
                self.remove(index);
                whole
            }
            None => index,
        };
        let op = self.get(whole);
        op.parts -= 1;
        if let Err(error) = outcome {
            op.failed.get_or_insert(error);
        }
        if op.parts > 0 {
            return None;
        }
        op.state = State::Done(op.failed.map_or(outcome, Err));
        let ended = (op.lease.take(), op.waker.take());
        if op.orphan {
            self.remove(whole);
        }
        Some(ended)
    }

    /// Frees an operation whose lease was taken out.
    pub(crate) fn remove(&mut self, index: u32) {
        let op = self.get(index);
        debug_assert!(op.lease.is_none(), "the lease is the caller's to drop");
        // The highest bit is that of messages.
        op.generation = op.generation.wrapping_add(1) & GENERATION_MAX;
        op.state = State::Free;
        op.waker = None;
        self.free.push(index);
    }

    /// Every operation that the kernel has or will have.
    pub(crate) fn unfinished(&mut self) -> impl Iterator<Item = &mut Op> {
        self.chunks
            .iter_mut()
            .flatten()
            .filter(|op| matches!(op.state, State::Queued | State::InFlight))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(len: u64, vectors: &[(usize, usize)]) -> Op {
        let mut op = Op::free();
        let spec = Spec {
            who: 0,
            file: 0,
            act: Act::Read,
            at: 100,
            len,
            place: Place::Memory,
            lease: None,
        };
        op.set(spec, vectors.iter().copied(), 1);
        op
    }

    #[test]
    fn advance_short_transfer_goes_on_where_it_stopped() {
        let mut op = op(30, &[(1000, 10), (2000, 20)]);
        assert_eq!(op.advance(15), None);
        assert_eq!((op.at, op.first), (115, 1));
        assert_eq!(op.one(), (std::ptr::with_exposed_provenance_mut(2005), 15));
        assert_eq!(op.advance(15), Some(Ok(0)));
    }

    #[test]
    fn set_joins_adjacent_vectors() {
        let op = op(35, &[(1000, 10), (1010, 20), (2000, 5)]);
        assert_eq!(
            (op.end, op.vectors[0].iov_len, op.vectors[1].iov_len),
            (2, 30, 5)
        );
    }

    #[test]
    fn advance_end_of_file_is_short() {
        let mut op = op(30, &[(1000, 30)]);
        assert_eq!(op.advance(10), None);
        assert_eq!(op.advance(0), Some(Err(DiskError::Short(10))));
    }

    #[test]
    fn advance_again_is_repeated_with_a_limit() {
        let mut op = op(30, &[(1000, 30)]);
        for _ in 0..RETRIES_MAX {
            assert_eq!(op.advance(-libc::EAGAIN), None);
        }
        assert_eq!(
            op.advance(-libc::EAGAIN),
            Some(Err(DiskError::Errno(libc::EIO)))
        );
    }

    #[test]
    fn advance_error_keeps_its_number() {
        let mut op = op(30, &[(1000, 30)]);
        assert_eq!(
            op.advance(-libc::ENODATA),
            Some(Err(DiskError::Errno(libc::ENODATA)))
        );
    }

    #[test]
    fn cut_takes_what_is_beyond_the_limit() {
        let mut first = op(35, &[(1000, 10), (2000, 20), (3000, 5)]);
        let mut rest = Vectors::new();
        let spec = first.cut(15, &mut rest).unwrap();
        assert_eq!((first.len, first.end, first.vectors[1].iov_len), (15, 2, 5));
        assert_eq!((spec.at, spec.len), (115, 20));
        assert_eq!(rest[..], [(2005, 15), (3000, 5)]);
        let mut second = op(20, &rest);
        assert!(second.cut(20, &mut rest).is_none());
        assert_eq!(first.advance(15), Some(Ok(0)));
    }

    #[test]
    fn end_part_last_of_them_ends_the_whole() {
        let mut slab = Slab::new();
        let spec = || Spec {
            who: 0,
            file: 0,
            act: Act::Flush,
            at: 0,
            len: 0,
            place: Place::None,
            lease: None,
        };
        let (whole, _) = slab.insert(spec(), std::iter::empty(), 0);
        let (part, _) = slab.insert(spec(), std::iter::empty(), 0);
        slab.get(part).whole = Some(whole);
        slab.get(whole).parts = 2;
        assert!(slab.end_part(whole, Ok(0)).is_none());
        assert!(slab.end_part(part, Err(DiskError::Errno(5))).is_some());
        let state = slab.get(whole).state;
        assert_eq!(state, State::Done(Err(DiskError::Errno(5))));
    }

    #[test]
    fn slab_place_changes_its_generation() {
        let mut slab = Slab::new();
        let spec = || Spec {
            who: 0,
            file: 0,
            act: Act::Flush,
            at: 0,
            len: 0,
            place: Place::None,
            lease: None,
        };
        let first = slab.insert(spec(), std::iter::empty(), 0);
        slab.remove(first.0);
        let second = slab.insert(spec(), std::iter::empty(), 0);
        assert_eq!(first.0, second.0);
        assert_ne!(first.1, second.1);
    }
}
