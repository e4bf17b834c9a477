//! A ublk-target that has its memory and waits to take the place of the one that serves. There is one while a LU is swapped
//! to: when ublk-target dies then its memory is taken at once by whoever dirties pages, none can be made free while the swap
//! does not answer, and one that is started only then may wait for memory for ever.
//!
//! # Crash  it ends when mgmtd does; the next mgmtd starts another

use std::io;
use std::path::{Path, PathBuf};
use std::process::Child;

use lunar_api::breadcrumb::{FILE, STANDBY_FILE};

use crate::daemon::Daemon;
use crate::limits::STANDBY_LIMIT;
use crate::link::Link;
use crate::supervisor::{TARGET_SOCKET, listen_at, spawn};

const SOCKET: &str = "standby.sock";

/// Ended when it is dropped.
#[derive(Debug)]
pub struct Standby {
    program: PathBuf,
    run_dir: PathBuf,
    child: Option<Child>,
    /// Its end is the standby's, until another connects.
    owner: Option<Link>,
}

impl Standby {
    /// Starts one, which takes so many bytes for what it will serve, and waits until it has them.
    ///
    /// # Errors  it does not start (an older build does not know how to wait), or there is no memory for it
    pub async fn start(daemon: &Daemon, program: PathBuf, bytes: usize) -> io::Result<Self> {
        let run_dir = &daemon.config.run_dir;
        let socket = run_dir.join(SOCKET);
        let listening = listen_at(&socket)?;
        let child = spawn(&program, run_dir, listening, Some(bytes))?;
        let mut standby = Self {
            program,
            run_dir: run_dir.clone(),
            child: Some(child),
            owner: None,
        };
        let owner = standby.owner.insert(Link::connect(&socket)?);
        owner.ready(STANDBY_LIMIT).await.map_err(io::Error::other)?;
        Ok(standby)
    }

    /// Whether it is of this program, and still there.
    pub fn is_ready(&mut self, program: &Path) -> bool {
        let ended = self.child.as_mut().map(Child::try_wait);
        self.program == program && matches!(ended, Some(Ok(None)))
    }

    /// Gives it the names of the one that served: from here on it is as one that was just started. The link is kept until it
    /// has answered.
    ///
    /// # Errors  its files are gone: it is ended
    pub fn promote(mut self) -> io::Result<(Child, Option<Link>)> {
        for (from, to) in [(STANDBY_FILE, FILE), (SOCKET, TARGET_SOCKET)] {
            std::fs::rename(self.run_dir.join(from), self.run_dir.join(to))?;
        }
        let child = self.child.take().ok_or(io::ErrorKind::NotFound)?;
        Ok((child, self.owner.take()))
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
            for file in [STANDBY_FILE, SOCKET] {
                let _ = std::fs::remove_file(self.run_dir.join(file));
            }
        }
    }
}
