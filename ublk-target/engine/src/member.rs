//! A member of a running group: its disk, its state, what it was asked.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use lunar_api::DiskUuid;
use lunar_api::target::{MemberState, MemberStatus};

use crate::traits::{Buf, Disk, DiskError, DiskVerb, Piece};

/// One slot.
pub(crate) struct Member<D> {
    pub slot: u16,
    pub uuid: DiskUuid,
    pub path: String,
    pub disk: Option<Rc<D>>,
    /// Bytes from the start of the disk to the group's data.
    pub data_offset: u64,
    pub state: Cell<MemberState>,
    pub reason: RefCell<String>,
    pub reads: Cell<u64>,
    pub writes: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub write_bytes: Cell<u64>,
    pub read_errors: Cell<u64>,
    pub write_errors: Cell<u64>,
}

/// Adds to a counter.
pub(crate) fn add(counter: &Cell<u64>, more: u64) {
    counter.set(counter.get().wrapping_add(more));
}

impl<D: Disk> Member<D> {
    pub(crate) fn new(slot: u16, uuid: DiskUuid, path: String, state: MemberState) -> Self {
        Self {
            slot,
            uuid,
            path,
            disk: None,
            data_offset: 0,
            state: Cell::new(state),
            reason: RefCell::default(),
            reads: Cell::new(0),
            writes: Cell::new(0),
            read_bytes: Cell::new(0),
            write_bytes: Cell::new(0),
            read_errors: Cell::new(0),
            write_errors: Cell::new(0),
        }
    }

    /// Starts an I/O at byte `at` of the group's data on this member.
    pub(crate) fn submit(
        &self,
        verb: DiskVerb,
        at: u64,
        len: u64,
        buf: Buf<'_>,
        pieces: &[Piece],
    ) -> MemberIo<D::Io> {
        match verb {
            DiskVerb::Read => {
                add(&self.reads, 1);
                add(&self.read_bytes, len);
            }
            DiskVerb::Write { .. } => {
                add(&self.writes, 1);
                add(&self.write_bytes, len);
            }
            DiskVerb::Flush | DiskVerb::Discard | DiskVerb::WriteZeroes => {}
        }
        match &self.disk {
            Some(disk) => MemberIo(Some(disk.submit(
                verb,
                self.data_offset + at,
                len,
                buf,
                pieces,
            ))),
            None => MemberIo(None),
        }
    }

    pub(crate) fn note_error(&self, verb: DiskVerb) {
        let counter = if verb == DiskVerb::Read {
            &self.read_errors
        } else {
            &self.write_errors
        };
        add(counter, 1);
    }

    pub(crate) fn status(&self) -> MemberStatus {
        MemberStatus {
            slot: self.slot,
            disk: self.uuid,
            path: self.path.clone(),
            state: self.state.get(),
            data_offset: self.data_offset,
            reason: self.reason.borrow().clone(),
            reads: self.reads.get(),
            writes: self.writes.get(),
            read_bytes: self.read_bytes.get(),
            write_bytes: self.write_bytes.get(),
            read_errors: self.read_errors.get(),
            write_errors: self.write_errors.get(),
        }
    }
}

/// An I/O of a member that may not be there.
#[derive(Debug)]
pub(crate) struct MemberIo<F>(Option<F>);

impl<F: Future<Output = Result<(), DiskError>> + Unpin> Future for MemberIo<F> {
    type Output = Result<(), DiskError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Some(io) => Pin::new(io).poll(cx),
            None => Poll::Ready(Err(DiskError::Abandoned)),
        }
    }
}
