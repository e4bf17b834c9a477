//! Messages with descriptors over a `SOCK_SEQPACKET` socket.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use lunar_api::target::{FDS_MAX, MESSAGE_MAX};
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, send, setsockopt, sockopt,
};

/// One packet.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// Why a packet cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    #[error("the control socket")]
    Io(#[source] io::Error),
    #[error("a message is longer than {MESSAGE_MAX} bytes or has more than {FDS_MAX} descriptors")]
    TooLong,
}

fn os(errno: Errno) -> SocketError {
    SocketError::Io(errno.into())
}

/// Takes over the listening socket that this process was started with.
pub(crate) fn inherited(fd: RawFd) -> UnixListener {
    // SAFETY: mgmtd left it open for this process and said its number; nothing else here uses it.
    UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits for a connection; its answers may be as long as a message.
pub(crate) fn accept(listener: &UnixListener) -> Result<OwnedFd, SocketError> {
    let (connection, _) = listener.accept().map_err(SocketError::Io)?;
    setsockopt(&connection, sockopt::SndBufForce, &(2 * MESSAGE_MAX)).map_err(os)?;
    Ok(connection.into())
}

/// Waits for a packet; None: the other side is gone.
pub(crate) fn receive(
    connection: &OwnedFd,
    buffer: &mut [u8],
) -> Result<Option<Message>, SocketError> {
    let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
    let fd = connection.as_fd().as_raw_fd();
    let (count, flags, fds) = loop {
        let mut slices = [IoSliceMut::new(buffer)];
        match recvmsg::<UnixAddr>(
            fd,
            &mut slices,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Err(Errno::EINTR) => {}
            Err(Errno::ECONNRESET) => return Ok(None),
            Err(error) => return Err(os(error)),
            Ok(message) => {
                let fds = owned(message.cmsgs().map_err(os)?);
                break (message.bytes, message.flags, fds);
            }
        }
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(SocketError::TooLong);
    }
    if count == 0 {
        return Ok(None);
    }
    Ok(Some(Message {
        bytes: buffer[..count].to_vec(),
        fds,
    }))
}

fn owned(messages: impl Iterator<Item = ControlMessageOwned>) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    for message in messages {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel just made them for this message, nobody else has them.
            fds.extend(
                raw.into_iter()
                    .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            );
        }
    }
    fds
}

/// Sends an answer.
pub(crate) fn answer(connection: &OwnedFd, bytes: &[u8]) -> Result<(), SocketError> {
    debug_assert!(
        bytes.len() <= MESSAGE_MAX,
        "an answer of {} bytes",
        bytes.len()
    );
    loop {
        match send(connection.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(os(error)),
            Ok(_) => return Ok(()),
        }
    }
}
