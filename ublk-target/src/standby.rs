//! A ublk-target that has all the memory that serving needs, and waits for another to die.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;

use lunar_api::target::STANDBY_READY;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};

/// Waits until it is needed: true once somebody connects, false when whoever started it is gone. That one has the first
/// connection, and is told that this process is ready.
///
/// # Errors  the socket is not one
pub(crate) fn wait(listener: &UnixListener) -> io::Result<bool> {
    let (owner, _) = listener.accept()?;
    let owner = OwnedFd::from(owner);
    send(owner.as_raw_fd(), STANDBY_READY, MsgFlags::MSG_NOSIGNAL)?;
    loop {
        let mut fds = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(owner.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let is_any = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        // The first that is asked for goes before the end of the other: both come at once where that was the last word.
        if is_any(&fds[0]) {
            return Ok(true);
        }
        if is_any(&fds[1]) {
            return Ok(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A listener, its place, and a connection of who started it that has been told.
    fn owned(
        name: &str,
    ) -> (
        std::path::PathBuf,
        std::thread::JoinHandle<bool>,
        UnixStream,
    ) {
        use std::io::Read;
        let path =
            std::env::temp_dir().join(format!("lunar-standby-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let mut owner = UnixStream::connect(&path).unwrap();
        let waiting = std::thread::spawn(move || wait(&listener).unwrap());
        let mut told = vec![0; STANDBY_READY.len()];
        owner.read_exact(&mut told).unwrap();
        assert_eq!(told, STANDBY_READY);
        (path, waiting, owner)
    }

    #[test]
    fn somebody_who_connects_needs_it() {
        let (path, waiting, owner) = owned("needed");
        assert!(!waiting.is_finished());
        let _asks = UnixStream::connect(&path).unwrap();
        drop(owner);
        assert!(waiting.join().unwrap());
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn nobody_needs_it_whose_owner_is_gone() {
        let (path, waiting, owner) = owned("gone");
        drop(owner);
        assert!(!waiting.join().unwrap());
        std::fs::remove_file(path).unwrap();
    }
}
