//! The control socket: one thread a connection, requests answered in order.

use std::error::Error;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam::channel::{Sender, TrySendError};
use lunar_api::target::{MESSAGE_MAX, TARGET_API, TargetAnswer, TargetReply, TargetRequest};
use lunar_api::{ApiError, ErrorKind, SystemUuid};
use lunar_engine::config::Queues;
use lunar_engine::raid_group::Fill;

use crate::group::Tunables;
use crate::groups::Groups;
use crate::socket::{self, Message};

/// Connections at a time: mgmtd has a few, nobody else has any.
const CONNECTIONS_MAX: usize = 16;
const STACK_BYTES: usize = 256 << 10;
/// Connections whose threads are there from the start, as many as mgmtd has: the kernel fills the locked stack of a new thread
/// while it holds the lock of the address space, which I/O may need too; if memory has run short, neither goes on.
const READY: usize = 5;

/// Makes the error that crosses the socket, with its causes.
pub(crate) fn api_error(kind: ErrorKind, what: &str, error: &dyn Error) -> ApiError {
    let mut answer = ApiError::new(kind, what).because(error.to_string());
    let mut source = error.source();
    while let Some(cause) = source {
        answer = answer.because(cause.to_string());
        source = cause.source();
    }
    answer
}

/// The threads that wait for connections.
pub(crate) struct Ready {
    groups: Arc<Groups>,
    open: Arc<AtomicUsize>,
    idle: Sender<OwnedFd>,
}

impl Ready {
    pub(crate) fn start(groups: &Arc<Groups>) -> Self {
        let open = Arc::default();
        Self {
            idle: start_ready(groups, &open),
            groups: Arc::clone(groups),
            open,
        }
    }

    /// Accepts for ever.
    pub(crate) fn listen(&self, listener: &UnixListener) {
        loop {
            self.accept(listener);
        }
    }

    fn accept(&self, listener: &UnixListener) {
        let connection = match socket::accept(listener) {
            Ok(connection) => connection,
            Err(error) => {
                tracing::error!(error = &error as &dyn Error, "no connection");
                let _ = crossbeam::channel::after(Duration::from_millis(100)).recv();
                return;
            }
        };
        if self.open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            self.open.fetch_sub(1, Ordering::Relaxed);
            let reply = Err(ApiError::new(
                ErrorKind::Busy,
                format!("all {CONNECTIONS_MAX} connections are in use"),
            ));
            put(&connection, &reply);
            return;
        }
        // Taken by whichever of them is idle.
        let connection = match self.idle.try_send(connection) {
            Ok(()) => return,
            Err(TrySendError::Full(connection) | TrySendError::Disconnected(connection)) => {
                connection
            }
        };
        let (groups, open) = (Arc::clone(&self.groups), Arc::clone(&self.open));
        let thread = std::thread::Builder::new()
            .name("control".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                serve(&connection, &groups, &mut vec![0; MESSAGE_MAX]);
                open.fetch_sub(1, Ordering::Relaxed);
            });
        if let Err(error) = thread {
            self.open.fetch_sub(1, Ordering::Relaxed);
            tracing::error!(%error, "no thread for a connection");
        }
    }
}

/// Starts the threads that wait for connections; a connection is taken only by one that is idle.
fn start_ready(groups: &Arc<Groups>, open: &Arc<AtomicUsize>) -> Sender<OwnedFd> {
    let (give, take) = crossbeam::channel::bounded::<OwnedFd>(0);
    for _ in 0..READY {
        let (take, groups, open) = (take.clone(), Arc::clone(groups), Arc::clone(open));
        let thread = std::thread::Builder::new()
            .name("control".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut buffer = vec![0; MESSAGE_MAX];
                for connection in take {
                    serve(&connection, &groups, &mut buffer);
                    open.fetch_sub(1, Ordering::Relaxed);
                }
            });
        if let Err(error) = thread {
            tracing::error!(%error, "no thread for connections");
        }
    }
    give
}

fn put(connection: &OwnedFd, reply: &TargetReply) -> bool {
    let bytes = match serde_json::to_vec(reply) {
        Ok(bytes) if bytes.len() <= MESSAGE_MAX => bytes,
        Ok(_) | Err(_) => {
            br#"{"Err":{"kind":"failed","message":"the answer is too long"}}"#.to_vec()
        }
    };
    socket::answer(connection, &bytes).is_ok()
}

/// `buffer`: of one connection at a time; shared by all would be a lock.
fn serve(connection: &OwnedFd, groups: &Arc<Groups>, buffer: &mut [u8]) {
    let mut system = None;
    loop {
        let (reply, end) = match socket::receive(connection, buffer) {
            Ok(None) => return,
            Ok(Some(message)) => match decode(&message) {
                Ok(request) => {
                    let end = matches!(request, TargetRequest::Shutdown | TargetRequest::HandOver);
                    let reply = dispatch(request, message.fds, &mut system, groups);
                    let end = end && reply.is_ok();
                    (reply, end)
                }
                Err(error) => (Err(error), false),
            },
            Err(socket::SocketError::TooLong) => (
                Err(ApiError::new(
                    ErrorKind::Usage,
                    socket::SocketError::TooLong.to_string(),
                )),
                false,
            ),
            Err(socket::SocketError::Io(_)) => return,
        };
        let heard = put(connection, &reply);
        if end {
            crate::log::drain();
            std::process::exit(0);
        }
        if !heard {
            return;
        }
    }
}

fn decode(message: &Message) -> Result<TargetRequest, ApiError> {
    serde_json::from_slice(&message.bytes)
        .map_err(|error| api_error(ErrorKind::Usage, "the request makes no sense", &error))
}

fn take<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], ApiError> {
    let count = fds.len();
    fds.try_into().map_err(|_| {
        let what = format!("{N} descriptors are needed with this request, {count} came");
        ApiError::new(ErrorKind::Usage, what)
    })
}

fn dispatch(
    request: TargetRequest,
    fds: Vec<OwnedFd>,
    hello: &mut Option<SystemUuid>,
    groups: &Arc<Groups>,
) -> TargetReply {
    if let TargetRequest::Hello { api, system } = request {
        if api != TARGET_API {
            let what = format!("version {api} of the protocol is not spoken, {TARGET_API} is");
            return Err(ApiError::new(ErrorKind::Usage, what));
        }
        groups.set_system(system)?;
        *hello = Some(system);
        return Ok(TargetAnswer::Hello {
            api,
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").into(),
            features: groups.features().clone(),
        });
    }
    let Some(system) = *hello else {
        return Err(ApiError::new(
            ErrorKind::Usage,
            "the first message is hello",
        ));
    };
    match request {
        TargetRequest::Hello { .. } => unreachable!("answered above"),
        TargetRequest::Probe { paths } => groups.probe(paths, fds),
        TargetRequest::Label { path, disk } => {
            let [fd] = take(fds)?;
            groups.check_system(system)?;
            groups.label(path, fd, system, disk)
        }
        TargetRequest::Wipe { path } => {
            let [fd] = take(fds)?;
            groups.wipe(path, fd)
        }
        request @ (TargetRequest::GroupCreate { .. } | TargetRequest::GroupStart { .. }) => {
            groups.check_system(system)?;
            groups.begin(request, fds, system)
        }
        TargetRequest::GroupQuarantine { seen, ublk_devices } => {
            groups.quarantine(*seen, &ublk_devices)
        }
        TargetRequest::Adopt {
            group,
            from,
            members,
        } => {
            groups.check_system(system)?;
            groups.adopt(group, from, system, members, fds)
        }
        TargetRequest::GroupErase { group, members } => groups.erase(group, members, fds),
        TargetRequest::GroupStop { group } => groups.end(group, false),
        TargetRequest::GroupDelete { group } => groups.end(group, true),
        TargetRequest::GroupRename { group, name } => groups.get(group)?.rename(name),
        TargetRequest::GroupSet {
            group,
            rebuild_min_bytes,
            rebuild_max_bytes,
            read_errors_max,
        } => groups.get(group)?.set(Tunables {
            rates: (rebuild_min_bytes, rebuild_max_bytes),
            read_errors_max,
        }),
        TargetRequest::GroupGrow { group } => groups.get(group)?.grow(),
        TargetRequest::GroupScrub { group, order } => groups.get(group)?.scrub(order),
        TargetRequest::MemberFail { group, disk } => groups.get(group)?.member_fail(disk),
        TargetRequest::MemberReplace {
            group,
            slot,
            member,
            full,
            only_missed,
        } => {
            let [fd] = take(fds)?;
            let fill = match (full, only_missed) {
                (true, _) => Fill::All,
                (false, true) => Fill::OnlyMissed,
                (false, false) => Fill::Missed,
            };
            groups.get(group)?.member_replace(slot, member, fill, fd)
        }
        TargetRequest::LuCreate {
            group,
            lu,
            name,
            size,
            depth,
            queues,
            zero,
        } => {
            let queues = Queues {
                count: queues,
                depth,
            };
            groups.get(group)?.lu_create(lu, name, (size, zero), queues)
        }
        TargetRequest::LuSet { group, lu, queues } => groups.get(group)?.lu_set(lu, queues),
        TargetRequest::LuResize { group, lu, size } => groups.get(group)?.lu_resize(lu, size),
        TargetRequest::LuDelete { group, lu } => groups.get(group)?.lu_delete(lu),
        TargetRequest::LuDeleted { group } => groups.get(group)?.deleted_lus(),
        TargetRequest::LuUndelete { group, lu } => groups.get(group)?.lu_undelete(lu),
        TargetRequest::LuRename { group, lu, name } => groups.get(group)?.lu_rename(lu, name),
        TargetRequest::Status => groups.status(),
        TargetRequest::Events { after, wait_ms } => {
            let events = groups
                .events()
                .after(after, Duration::from_millis(wait_ms.into()));
            Ok(TargetAnswer::Events { events })
        }
        TargetRequest::Shutdown => groups.shutdown().map(|()| TargetAnswer::Done),
        TargetRequest::HandOver => groups.hand_over(),
    }
}
