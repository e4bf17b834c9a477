//! Tells systemd (or whoever set `NOTIFY_SOCKET`) that mgmtd is ready: one datagram, by hand.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends lines such as `READY=1`; without `NOTIFY_SOCKET` nothing happens.
pub fn notify(lines: &str) {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let name = name.to_string_lossy();
    let address = match name.strip_prefix('@') {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name),
        None => SocketAddr::from_pathname(&*name),
    };
    let sent = UnixDatagram::unbound().and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.send_to_addr(lines.as_bytes(), &address?)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager was not told");
    }
}
