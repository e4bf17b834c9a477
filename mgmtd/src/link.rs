//! The connection to ublk-target: SEQPACKET, one JSON message a packet, descriptors attached.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use lunar_api::target::{
    FDS_MAX, MESSAGE_MAX, STANDBY_READY, TargetAnswer, TargetReply, TargetRequest,
};
use lunar_api::{ApiError, ErrorKind};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg,
    setsockopt, socket, sockopt,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// One connection. After a time-out or an error it must be dropped: its answers would be out of step.
#[derive(Debug)]
pub struct Link {
    /// A SEQPACKET socket in the type that tokio registers without `unsafe`; only `async_io` is used on it.
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl Link {
    /// Connects to the socket of a living ublk-target.
    ///
    /// # Errors  nobody listens there
    pub fn connect(path: &Path) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Self::over(fd)
    }

    /// Takes a connected, non-blocking SEQPACKET socket.
    ///
    /// # Errors  it cannot be watched
    pub fn over(fd: OwnedFd) -> io::Result<Self> {
        // A packet must fit the send buffer whole; root may exceed wmem_max.
        if setsockopt(&fd, sockopt::SndBufForce, &(2 * MESSAGE_MAX)).is_err() {
            let _ = setsockopt(&fd, sockopt::SndBuf, &(2 * MESSAGE_MAX));
        }
        let socket = UnixStream::from_std(std::os::unix::net::UnixStream::from(fd))?;
        Ok(Self {
            socket,
            buffer: vec![0; MESSAGE_MAX],
        })
    }

    /// Sends one request with descriptors and waits for its answer.
    ///
    /// # Errors  `Unreachable` if ublk-target does not answer in `limit`; else what it answered
    pub async fn call(
        &mut self,
        request: &TargetRequest,
        fds: &[RawFd],
        limit: Duration,
    ) -> Result<TargetReply, LinkError> {
        let text = serde_json::to_vec(request).map_err(|_| LinkError::TooLong)?;
        if text.len() > MESSAGE_MAX || fds.len() > FDS_MAX {
            return Err(LinkError::TooLong);
        }
        let turn = async {
            self.send(&text, fds).await.map_err(LinkError::Lost)?;
            let len = self.receive().await.map_err(LinkError::Lost)?;
            serde_json::from_slice(&self.buffer[..len]).map_err(LinkError::Garbled)
        };
        tokio::time::timeout(limit, turn)
            .await
            .map_err(|_| LinkError::Slow(limit))?
    }

    /// Waits for a ublk-target that waits to take another's place to say that it is ready.
    ///
    /// # Errors  it ended, says something else, or nothing in `limit`
    pub async fn ready(&mut self, limit: Duration) -> Result<(), LinkError> {
        let told = tokio::time::timeout(limit, self.receive());
        let len = told.await.map_err(|_| LinkError::Slow(limit))?;
        match &self.buffer[..len.map_err(LinkError::Lost)?] {
            STANDBY_READY => Ok(()),
            _ => Err(LinkError::Lost(io::ErrorKind::InvalidData.into())),
        }
    }

    async fn send(&self, text: &[u8], fds: &[RawFd]) -> io::Result<()> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() {
            &rights[..0]
        } else {
            &rights[..]
        };
        let raw = self.socket.as_raw_fd();
        let send = || {
            let iov = [IoSlice::new(text)];
            let sent = sendmsg::<UnixAddr>(raw, &iov, control, MsgFlags::MSG_NOSIGNAL, None);
            sent.map(drop).map_err(io::Error::from)
        };
        self.socket.async_io(Interest::WRITABLE, send).await
    }

    async fn receive(&mut self) -> io::Result<usize> {
        let raw = self.socket.as_raw_fd();
        let buffer = &mut self.buffer;
        let receive = || Ok(recv(raw, buffer, MsgFlags::empty())?);
        match self.socket.async_io(Interest::READABLE, receive).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            len => Ok(len),
        }
    }
}

/// Why no answer came.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the connection to ublk-target broke")]
    Lost(#[source] io::Error),
    #[error("ublk-target did not answer in {} s", .0.as_secs())]
    Slow(Duration),
    #[error("ublk-target answered what mgmtd does not understand")]
    Garbled(#[source] serde_json::Error),
    #[error("the request does not fit one message")]
    TooLong,
}

impl From<LinkError> for ApiError {
    fn from(error: LinkError) -> Self {
        let kind = match error {
            LinkError::Lost(_) | LinkError::Slow(_) => ErrorKind::Unreachable,
            LinkError::Garbled(_) | LinkError::TooLong => ErrorKind::Failed,
        };
        let mut out = Self::new(kind, error.to_string()).hint("lunar events; lunar status");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            out = out.because(cause.to_string());
            source = cause.source();
        }
        out
    }
}

/// An answer of another kind than the request asks for.
pub fn unexpected(answer: &TargetAnswer) -> ApiError {
    let name = serde_json::to_value(answer)
        .ok()
        .and_then(|v| v["answer"].as_str().map(String::from));
    ApiError::new(
        ErrorKind::Failed,
        "ublk-target gave the wrong kind of answer",
    )
    .because(format!("it answered `{}`", name.unwrap_or_default()))
    .hint("lunar status")
}
