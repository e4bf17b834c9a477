//! One connection to mgmtd: a call, an answer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lunar_api::mgmt::{CALL_MAX, Request};
use lunar_api::{ApiError, ErrorKind};
use mgmtd::varlink::{decode_answer, frame};
use serde::de::DeserializeOwned;

use crate::args::Args;

/// Longest answer: the tables of the largest system stay far below.
const ANSWER_MAX: usize = 64 * CALL_MAX;
/// mgmtd has its own limits, the longest path being a turn, an open and a call; this one is the last resort.
const ANSWER_LIMIT: Duration = Duration::from_secs(240);

/// The socket of the mgmtd that is meant.
pub(crate) fn socket(path: Option<&Path>, system: Option<u32>) -> PathBuf {
    match (path, system) {
        (Some(path), _) => path.into(),
        (None, Some(n)) => format!("/run/lunar/{n}/mgmtd.sock").into(),
        (None, None) => "/run/lunar/mgmtd.sock".into(),
    }
}

/// The connection.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects to the mgmtd that the arguments name.
    pub(crate) fn connect(args: &Args) -> Result<Self, ApiError> {
        let path = socket(args.socket.as_deref(), args.system);
        Self::open(&path, ANSWER_LIMIT)
    }

    /// Connects to a socket; no answer takes longer than `limit`.
    pub(crate) fn open(path: &Path, limit: Duration) -> Result<Self, ApiError> {
        let stream = UnixStream::connect(path).map_err(|e| {
            let hint = match e.kind() {
                std::io::ErrorKind::PermissionDenied => "sudo lunar ..",
                _ => "systemctl start mgmtd, or: mgmtd &",
            };
            ApiError::new(ErrorKind::Unreachable, "mgmtd cannot be reached")
                .because(format!("{}: {e}", path.display()))
                .hint(hint)
        })?;
        let limits = stream
            .set_read_timeout(Some(limit))
            .and_then(|()| stream.set_write_timeout(Some(limit)));
        limits.map_err(|e| lost(&e))?;
        Ok(Self {
            stream,
            buffer: Vec::new(),
        })
    }

    /// Waits for answers as long as mgmtd is there.
    pub(crate) fn wait_for_ever(&mut self) -> Result<(), ApiError> {
        self.stream.set_read_timeout(None).map_err(|e| lost(&e))
    }

    /// Asks and waits for the answer.
    pub(crate) fn call<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ApiError> {
        let failed = |why: String| {
            ApiError::new(ErrorKind::Failed, "the answer of mgmtd is not understood")
                .because(why)
                .hint("use the command line of the same version as mgmtd")
        };
        let call = serde_json::to_value(request).map_err(|e| failed(e.to_string()))?;
        // A refused connection has its reason waiting for us even if we cannot write any more.
        let sent = self.stream.write_all(&frame(&call));
        let message = match (self.receive(), sent) {
            (Ok(message), _) => message,
            (Err(_), Err(e)) | (Err(e), Ok(())) => return Err(lost(&e)),
        };
        serde_json::from_value(decode_answer(&message)?).map_err(|e| failed(e.to_string()))
    }

    fn receive(&mut self) -> std::io::Result<Vec<u8>> {
        loop {
            if let Some(at) = self.buffer.iter().position(|b| *b == 0) {
                let rest = self.buffer.split_off(at + 1);
                let mut message = std::mem::replace(&mut self.buffer, rest);
                message.pop();
                return Ok(message);
            }
            let mut piece = vec![0; 65536];
            let len = self.stream.read(&mut piece)?;
            if len == 0 || self.buffer.len() > ANSWER_MAX {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            self.buffer.extend_from_slice(&piece[..len]);
        }
    }
}

fn lost(error: &std::io::Error) -> ApiError {
    ApiError::new(ErrorKind::Unreachable, "mgmtd did not answer")
        .because(error.to_string())
        .hint("systemctl status mgmtd; lunar status")
}
