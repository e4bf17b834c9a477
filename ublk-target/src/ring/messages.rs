//! What other rings of the process send: completions that nobody here began, for a place in a box.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use super::{Ring, RingError};
use crate::op::{Act, Place, Spec};

/// Most messages that can be on their way here: the places of all boxes.
pub(super) const MESSAGES: u32 = 8192;
/// In the number of a completion: it is a message. Below are box and place, of 16 bits each.
pub(super) const MESSAGE: u64 = 1 << 63;

/// Where messages from other rings go: a ring of this process, and a box there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Address {
    ring: RawFd,
    mail_box: u16,
}

#[derive(Debug, Default)]
struct Letter {
    value: Option<i32>,
    waker: Option<Waker>,
}

/// Messages from other rings: at most one at a time in each place.
#[derive(Debug)]
pub(crate) struct MailBox {
    index: u16,
    letters: RefCell<Vec<Letter>>,
    is_closed: Cell<bool>,
}

impl MailBox {
    fn put(&self, place: u16, value: i32) {
        let letter = &mut self.letters.borrow_mut()[usize::from(place)];
        assert!(letter.value.is_none(), "a message before the last was read");
        letter.value = Some(value);
        if let Some(waker) = letter.waker.take() {
            waker.wake();
        }
    }

    /// Waits for the next message in a place; none when the box is closed.
    pub(crate) async fn letter(&self, place: u16) -> Option<i32> {
        std::future::poll_fn(|cx| {
            let letter = &mut self.letters.borrow_mut()[usize::from(place)];
            if let Some(value) = letter.value.take() {
                return Poll::Ready(Some(value));
            }
            if self.is_closed.get() {
                return Poll::Ready(None);
            }
            if !(letter.waker.as_ref()).is_some_and(|waker| waker.will_wake(cx.waker())) {
                letter.waker = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// Nothing comes any more.
    pub(crate) fn close(&self) {
        self.is_closed.set(true);
        for letter in self.letters.borrow_mut().iter_mut() {
            if let Some(waker) = letter.waker.take() {
                waker.wake();
            }
        }
    }
}

impl Ring {
    #[expect(clippy::cast_possible_truncation, reason = "two of its quarters")]
    pub(super) fn deliver(&self, data: u64, value: i32) {
        let (index, place) = ((data >> 16) as u16, data as u16);
        let found = self.boxes.borrow().get(usize::from(index)).cloned();
        // A box that is gone waits for nothing.
        if let Some(mail_box) = found.and_then(|mail_box| mail_box.upgrade()) {
            mail_box.put(place, value);
        }
    }

    /// Makes a box for messages of other rings, of so many places.
    pub(crate) fn add_box(&self, places: u16) -> Result<Rc<MailBox>, RingError> {
        let mut boxes = self.boxes.borrow_mut();
        let there = boxes.iter().filter_map(Weak::upgrade);
        let taken: usize = there.map(|mail_box| mail_box.letters.borrow().len()).sum();
        let free = boxes
            .iter()
            .position(|mail_box| mail_box.strong_count() == 0);
        let index = free.unwrap_or(boxes.len());
        if taken + usize::from(places) > MESSAGES as usize || index > usize::from(u16::MAX) {
            return Err(RingError::Full(MESSAGES, "messages"));
        }
        let mail_box = Rc::new(MailBox {
            index: u16::try_from(index).expect("checked above"),
            letters: RefCell::new((0..places).map(|_| Letter::default()).collect()),
            is_closed: Cell::new(false),
        });
        if index == boxes.len() {
            boxes.push(Weak::new());
        }
        boxes[index] = Rc::downgrade(&mail_box);
        Ok(mail_box)
    }

    /// Where other rings send to.
    pub(crate) fn address(&self, mail_box: &MailBox) -> Address {
        Address {
            ring: self.uring.borrow().as_raw_fd(),
            mail_box: mail_box.index,
        }
    }

    /// Sends a message to another ring of this process.
    ///
    /// # Panics  if that ring is not there: whoever sends ends before those that he sends to
    pub(crate) async fn send(self: &Rc<Self>, to: Address, place: u16, value: i32) {
        let data = MESSAGE | u64::from(to.mail_box) << 16 | u64::from(place);
        loop {
            let spec = Spec {
                who: 0,
                file: 0,
                act: Act::Message {
                    ring: to.ring,
                    data,
                    value,
                },
                at: 0,
                len: 0,
                place: Place::None,
                lease: None,
            };
            let sent = self.start(spec, std::iter::empty()).await;
            match sent.map_or(-libc::EIO, |result| -result) {
                result if result <= 0 => return,
                // No memory for it just now.
                libc::ENOMEM | libc::EAGAIN | libc::EINTR | libc::EOVERFLOW => {}
                errno => panic!(
                    "a ring of this process takes no message: {}",
                    io::Error::from_raw_os_error(errno)
                ),
            }
        }
    }
}
