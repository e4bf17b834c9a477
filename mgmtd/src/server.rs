//! The socket: varlink calls in, answers out. A slow or hostile client costs itself only.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use lunar_api::mgmt::CALL_MAX;
use lunar_api::{ApiError, ErrorKind};
use nix::sys::socket::{getsockopt, sockopt};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::api;
use crate::daemon::Daemon;
use crate::limits::{
    CONNECTIONS_MAX, CONNECTIONS_NEAR, CONNECTIONS_USER_MAX, IDLE_LIMIT, MESSAGE_LIMIT,
};
use crate::varlink::{Asked, decode, encode_answer, encode_error, frame};

/// Makes the socket: mode 0660, group `lunar` if there is one; a socket that nobody serves is replaced.
///
/// # Errors  another mgmtd serves it, or it cannot be made
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if let Ok(other) = std::os::unix::net::UnixStream::connect(path) {
        let peer = getsockopt(&other, sockopt::PeerCredentials);
        let pid = peer.map_or(String::new(), |peer| format!(", process {}", peer.pid()));
        let what = format!("another mgmtd serves it{pid}");
        return Err(io::Error::new(io::ErrorKind::AddrInUse, what));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o660);
    std::fs::set_permissions(path, mode)?;
    if let Some(gid) = lunar_group() {
        std::os::unix::fs::chown(path, None, Some(gid))?;
    }
    Ok(listener)
}

fn lunar_group() -> Option<u32> {
    nix::unistd::Group::from_name("lunar")
        .ok()
        .flatten()
        .map(|g| g.gid.as_raw())
}

/// An open connection, as the others see it.
#[derive(Debug)]
struct Seat {
    uid: u32,
    /// When it last finished a request; None: it is being served.
    idle_since: Cell<Option<Instant>>,
    leave: tokio::sync::Notify,
}

/// Accepts for as long as mgmtd runs.
pub async fn serve(daemon: Arc<Daemon>, listener: UnixListener) {
    let seats: Rc<std::cell::RefCell<BTreeMap<u64, Rc<Seat>>>> = Rc::default();
    for id in 0.. {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors: wait for some to come back instead of spinning.
                tracing::warn!(%error, "accept");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(peer) = stream.peer_cred() else {
            continue;
        };
        let uid = peer.uid();
        if let Err(error) = admit(&seats.borrow(), uid) {
            refuse(stream, &error);
            continue;
        }
        let seat = Rc::new(Seat {
            uid,
            idle_since: Cell::new(Some(Instant::now())),
            leave: tokio::sync::Notify::new(),
        });
        seats.borrow_mut().insert(id, seat.clone());
        let (daemon, seats) = (daemon.clone(), seats.clone());
        tokio::task::spawn_local(async move {
            let may_read = may_read(&peer);
            tokio::select! {
                _ = talk(&daemon, stream, &seat, may_read) => {}
                () = seat.leave.notified() => {}
            }
            seats.borrow_mut().remove(&id);
        });
    }
}

/// Decides on one more connection; makes room near the limit. Root always finds a seat: the idlest leaves.
fn admit(seats: &BTreeMap<u64, Rc<Seat>>, uid: u32) -> Result<(), ApiError> {
    if seats.len() + 1 >= CONNECTIONS_NEAR {
        let old = |s: &&Rc<Seat>| {
            s.idle_since
                .get()
                .is_some_and(|at| at.elapsed() > IDLE_LIMIT)
        };
        seats
            .values()
            .filter(old)
            .for_each(|seat| seat.leave.notify_one());
    }
    let own = seats.values().filter(|seat| seat.uid == uid).count();
    if seats.len() < CONNECTIONS_MAX && (uid == 0 || own < CONNECTIONS_USER_MAX) {
        return Ok(());
    }
    if uid == 0 {
        let idlest = seats.values().filter(|s| s.idle_since.get().is_some());
        if let Some(seat) = idlest.min_by_key(|seat| seat.idle_since.get()) {
            seat.leave.notify_one();
            return Ok(());
        }
    }
    Err(
        ApiError::new(ErrorKind::Busy, "mgmtd has too many connections")
            .because(format!(
                "{} are open, at most {CONNECTIONS_MAX} are served",
                seats.len()
            ))
            .hint("close some: ss -xp | grep mgmtd"),
    )
}

fn refuse(stream: UnixStream, error: &ApiError) {
    // A fresh socket takes so little at once; whoever does not read it loses nothing.
    let _ = stream.try_write(&frame(&encode_error(error)));
}

fn may_read(peer: &tokio::net::unix::UCred) -> bool {
    if peer.uid() == 0 {
        return true;
    }
    let Some(lunar) = lunar_group() else {
        return false;
    };
    let gid = nix::unistd::Gid::from_raw(peer.gid());
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(peer.uid()))
        .ok()
        .flatten();
    let groups = user
        .and_then(|user| std::ffi::CString::new(user.name).ok())
        .and_then(|name| nix::unistd::getgrouplist(&name, gid).ok())
        .unwrap_or_default();
    peer.gid() == lunar || groups.iter().any(|g| g.as_raw() == lunar)
}

async fn talk(
    daemon: &Arc<Daemon>,
    mut stream: UnixStream,
    seat: &Seat,
    may_read: bool,
) -> io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let Some(message) = receive(&mut stream, &mut buffer).await? else {
            return Ok(());
        };
        seat.idle_since.set(None);
        let (answer, close) = respond(daemon, &message, seat.uid, may_read).await;
        if let Some(answer) = answer {
            let bytes = frame(&answer);
            tokio::time::timeout(MESSAGE_LIMIT, stream.write_all(&bytes)).await??;
        }
        if daemon.is_stopping() || daemon.next().is_some() {
            daemon.told.notify_one();
        }
        seat.idle_since.set(Some(Instant::now()));
        if close {
            return Ok(());
        }
    }
}

/// Reads up to the next NUL. A begun message must end within its limit; between messages there is none.
async fn receive(stream: &mut UnixStream, buffer: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let mut searched = 0;
    let mut begun = None;
    loop {
        if let Some(at) = buffer[searched..].iter().position(|b| *b == 0) {
            let rest = buffer.split_off(searched + at + 1);
            let mut message = std::mem::replace(buffer, rest);
            message.pop();
            return Ok(Some(message));
        }
        searched = buffer.len();
        if buffer.len() > CALL_MAX {
            let error = ApiError::new(ErrorKind::Usage, "the message is too long")
                .because(format!("at most {CALL_MAX} bytes are read"));
            let _ = stream.try_write(&frame(&encode_error(&error)));
            return Ok(None);
        }
        let mut piece = [0; 16384];
        let read = stream.read(&mut piece);
        let len = if buffer.is_empty() {
            read.await?
        } else {
            let begun = *begun.get_or_insert_with(tokio::time::Instant::now);
            tokio::time::timeout_at(begun + MESSAGE_LIMIT, read).await??
        };
        if len == 0 {
            return Ok(None);
        }
        buffer.extend_from_slice(&piece[..len]);
    }
}

/// Answers one message; true: the connection is closed after it.
async fn respond(
    daemon: &Arc<Daemon>,
    message: &[u8],
    uid: u32,
    may_read: bool,
) -> (Option<Value>, bool) {
    let asked = match decode(message) {
        Err(error) => return (Some(encode_error(&error)), true),
        Ok(Asked::Answer(answer)) => return (Some(answer), false),
        Ok(asked) => asked,
    };
    let Asked::Verb {
        request,
        changes,
        oneway,
    } = asked
    else {
        return (None, true);
    };
    let result = if (changes && uid != 0) || !may_read {
        let who = if changes {
            "root"
        } else {
            "root and members of the group `lunar`"
        };
        Err(ApiError::new(ErrorKind::Failed, "you may not do this")
            .because(format!("it is for {who} only, you are uid {uid}"))
            .hint(if changes {
                "sudo lunar .."
            } else {
                "sudo usermod -aG lunar $USER"
            }))
    } else {
        // On its own task: a client that goes away does not stop a change half-way.
        let daemon = daemon.clone();
        let task = tokio::spawn(async move { api::answer(&daemon, request).await });
        task.await.unwrap_or_else(|e| {
            Err(ApiError::new(ErrorKind::Failed, "mgmtd failed inside").because(e.to_string()))
        })
    };
    let answer = match result {
        Ok(value) => encode_answer(&value),
        Err(error) => encode_error(&error),
    };
    ((!oneway).then_some(answer), false)
}
