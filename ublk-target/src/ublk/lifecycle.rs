//! Brings devices up and down: the order of control commands around a device that is served elsewhere.
//!
//! New: ADD, SET_PARAMS, read back, open, serve, START. Recovered: START_USER_RECOVERY, open, serve,
//! END_USER_RECOVERY. Down: TRY_STOP (refused while somebody holds it), wait for the tags, DEL.
//!
//! # Crash  a device that was added and not started is DEAD and found by its identity; it is deleted and made anew

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use libublk::sys;
use lunar_api::target::Features;
use lunar_engine::config::Queues;

use super::device::Shape;
use super::{Command, FLAG_SAFE_STOP, FLAG_UPDATE_SIZE, FLAG_ZERO_COPY, Geometry, IO_BYTES_MAX};
use crate::control_helper::{ControlError, ControlHelper};

/// How long udev may hold a new device, or a dead predecessor take to be noticed.
const BUSY_LIMIT: Duration = Duration::from_secs(30);
const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// How long a device may take until no request is in flight.
const QUIESCE_MS: u64 = 5000;
/// Bytes of `struct ublksrv_ctrl_dev_info`.
const INFO_BYTES: usize = 64;

/// Why a device is not up, or not down.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LifecycleError {
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("{path} cannot be opened")]
    Open {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("the kernel made something else of it: {0}")]
    ReadBack(String),
    #[error("/dev/ublkb{0} is open or mounted")]
    Held(u32),
}

/// A device as GET_DEV_INFO describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Info {
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) state: u16,
    pub(crate) io_bytes_max: u32,
    pub(crate) number: u32,
    pub(crate) flags: u64,
    /// `ublksrv_flags`.
    pub(crate) identity: u64,
}

impl Info {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        Some(Self {
            queues: u16_at(0)?,
            depth: u16_at(2)?,
            state: u16_at(4)?,
            io_bytes_max: u32_at(8)?,
            number: u32_at(12)?,
            flags: u64_at(24)?,
            identity: u64_at(32)?,
        })
    }

    fn encode(&self) -> Vec<u8> {
        let mut to = vec![0; INFO_BYTES];
        let mut put = |at: usize, bytes: &[u8]| to[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.queues.to_ne_bytes());
        put(2, &self.depth.to_ne_bytes());
        put(8, &self.io_bytes_max.to_ne_bytes());
        put(12, &self.number.to_ne_bytes());
        put(24, &self.flags.to_ne_bytes());
        put(32, &self.identity.to_ne_bytes());
        to
    }

    /// The device as its server sees it.
    pub(crate) fn shape(&self, features: &Features) -> Shape {
        let registers = self.flags & FLAG_ZERO_COPY != 0;
        Shape {
            number: self.number,
            queues: self.queues,
            depth: self.depth,
            registers,
            zero_copy: registers && features.zero_copy,
        }
    }

    /// Its size can be changed while it is in use.
    pub(crate) fn can_resize(&self) -> bool {
        self.flags & FLAG_UPDATE_SIZE != 0
    }

    /// Nobody serves it and nobody can take it over.
    pub(crate) fn is_dead(&self) -> bool {
        u32::from(self.state) == sys::UBLK_S_DEV_DEAD
    }
}

/// The control commands of one kernel.
#[derive(Debug)]
pub(crate) struct Lifecycle<'a> {
    pub(crate) helper: &'a ControlHelper,
    pub(crate) features: &'a Features,
}

fn command(op: u32, name: &str, device: u32, data: u64, buffer: Vec<u8>) -> Command {
    Command {
        op,
        name: name.into(),
        device,
        data,
        buffer,
    }
}

/// Asks the kernel for its features.
pub(crate) fn get_features(helper: &ControlHelper) -> Result<u64, ControlError> {
    let ask = command(
        sys::UBLK_U_CMD_GET_FEATURES,
        "GET_FEATURES",
        u32::MAX,
        0,
        vec![0; 8],
    );
    let (_, buffer) = helper.run(ask)?;
    let bytes = buffer.try_into().unwrap_or_default();
    Ok(u64::from_ne_bytes(bytes))
}

impl Lifecycle<'_> {
    fn run(&self, op: u32, name: &str, device: u32, data: u64) -> Result<(), ControlError> {
        self.helper
            .run(command(op, name, device, data, Vec::new()))
            .map(drop)
    }

    /// Reads what devices there are of those numbers.
    pub(crate) fn infos(&self, numbers: &[u32]) -> Result<Vec<Info>, LifecycleError> {
        if numbers.is_empty() {
            return Ok(Vec::new());
        }
        let ask = |number: &u32| {
            let op = sys::UBLK_U_CMD_GET_DEV_INFO;
            command(op, "GET_DEV_INFO", *number, 0, vec![0; INFO_BYTES])
        };
        let found = self.helper.run_all(numbers.iter().map(ask).collect())?;
        Ok(found.chunks(INFO_BYTES).filter_map(Info::decode).collect())
    }

    /// Adds a device and describes it; it is not started. `number`: that one if it is free, else any.
    pub(crate) fn add(
        &self,
        number: Option<u32>,
        identity: u64,
        queues: Queues,
        geometry: &Geometry,
    ) -> Result<Info, LifecycleError> {
        let wanted = Info {
            queues: queues.count,
            depth: queues.depth,
            state: 0,
            io_bytes_max: IO_BYTES_MAX,
            number: number.unwrap_or(u32::MAX),
            flags: super::device_flags(self.features),
            identity,
        };
        let add = |info: &Info| {
            let op = sys::UBLK_U_CMD_ADD_DEV;
            self.helper
                .run(command(op, "ADD_DEV", info.number, 0, info.encode()))
        };
        let (_, buffer) = match add(&wanted) {
            Err(error) if number.is_some() && error.errno() == Some(libc::EEXIST) => add(&Info {
                number: u32::MAX,
                ..wanted
            })?,
            other => other?,
        };
        let info = Info::decode(&buffer)
            .ok_or_else(|| LifecycleError::ReadBack("a short ADD_DEV".into()))?;
        self.describe(&wanted, &info, geometry).inspect_err(|_| {
            // What was just made is nobody's.
            if let Err(error) = self.delete(info.number) {
                tracing::error!(device = info.number, %error, "a half-made device stays");
            }
        })?;
        Ok(info)
    }

    fn describe(
        &self,
        wanted: &Info,
        info: &Info,
        geometry: &Geometry,
    ) -> Result<(), LifecycleError> {
        let missing = wanted.flags & !info.flags;
        if missing != 0
            // No more than there are CPUs.
            || !(1..=wanted.queues).contains(&info.queues)
            || info.depth != wanted.depth
            || info.identity != wanted.identity
        {
            return Err(LifecycleError::ReadBack(format!(
                "asked for {wanted:?}, got {info:?}"
            )));
        }
        let params = geometry.params();
        self.helper.run(command(
            sys::UBLK_U_CMD_SET_PARAMS,
            "SET_PARAMS",
            info.number,
            0,
            params.clone(),
        ))?;
        let got = self.params(info.number)?;
        // Basic, discard and DMA alignment; what lies between is the kernel's.
        for range in [8..40, 40..60, 108..112] {
            let discard = range.start == 40 && !geometry.discard;
            if !discard && got.get(range.clone()) != params.get(range.clone()) {
                return Err(LifecycleError::ReadBack(format!("parameters at {range:?}")));
            }
        }
        let dropped = params[4] & !got[4];
        if dropped != 0 {
            return Err(LifecycleError::ReadBack(format!(
                "parameter types {dropped:#x} dropped"
            )));
        }
        Ok(())
    }

    /// Reads the parameters of a device, as `struct ublk_params`.
    fn params(&self, number: u32) -> Result<Vec<u8>, ControlError> {
        let op = sys::UBLK_U_CMD_GET_PARAMS;
        let get = command(op, "GET_PARAMS", number, 0, super::ask_params());
        Ok(self.helper.run(get)?.1)
    }

    /// Has a device be so large, while it is in use. Answers whether it was not.
    ///
    /// # Crash  whoever recovers the device does it
    pub(crate) fn resize(&self, number: u32, bytes: u64) -> Result<bool, LifecycleError> {
        if super::bytes_of(&self.params(number)?) == Some(bytes) {
            return Ok(false);
        }
        let op = sys::UBLK_U_CMD_UPDATE_SIZE;
        self.run(op, "UPDATE_SIZE", number, bytes >> 9)?;
        Ok(true)
    }

    /// Opens the character device of a device; not blocking, so that io_uring copies in place.
    pub(crate) fn open(&self, number: u32) -> Result<OwnedFd, LifecycleError> {
        let path = format!("/dev/ublkc{number}");
        let nonblock = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .clone();
        let opened = retry(|| match nonblock.open(&path) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT)) => {
                Err(Retry::Again(error))
            }
            other => other.map_err(Retry::Never),
        });
        let file: File = opened.map_err(|source| LifecycleError::Open { path, source })?;
        Ok(file.into())
    }

    /// Starts a device whose tags are all fetched.
    pub(crate) fn start(&self, number: u32) -> Result<(), LifecycleError> {
        let pid = u64::from(std::process::id());
        Ok(self.run(sys::UBLK_U_CMD_START_DEV, "START_DEV", number, pid)?)
    }

    /// Takes over a device whose server died; waits for the kernel to notice that it did.
    pub(crate) fn begin_recovery(&self, number: u32) -> Result<(), LifecycleError> {
        let op = sys::UBLK_U_CMD_START_USER_RECOVERY;
        let done = retry(|| match self.run(op, "START_USER_RECOVERY", number, 0) {
            Err(error) if error.errno() == Some(libc::EBUSY) => Err(Retry::Again(error)),
            other => other.map_err(Retry::Never),
        });
        Ok(done?)
    }

    /// Goes live with a device whose tags are all fetched.
    pub(crate) fn end_recovery(&self, number: u32) -> Result<(), LifecycleError> {
        let pid = u64::from(std::process::id());
        let op = sys::UBLK_U_CMD_END_USER_RECOVERY;
        Ok(self.run(op, "END_USER_RECOVERY", number, pid)?)
    }

    /// Stops a device if nobody holds it.
    pub(crate) fn stop(&self, number: u32) -> Result<(), LifecycleError> {
        let stopped = if self.features.ublk & FLAG_SAFE_STOP != 0 {
            self.run(sys::UBLK_U_CMD_TRY_STOP_DEV, "TRY_STOP_DEV", number, 0)
        } else {
            self.helper.stop_unheld(number)
        };
        match stopped {
            Err(error) if error.errno() == Some(libc::EBUSY) => Err(LifecycleError::Held(number)),
            // Somebody else deleted it.
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Takes the tags of a live device back, for another server to recover it: its requests wait meanwhile.
    pub(crate) fn quiesce(&self, number: u32) -> Result<(), LifecycleError> {
        let op = sys::UBLK_U_CMD_QUIESCE_DEV;
        Ok(self.run(op, "QUIESCE_DEV", number, QUIESCE_MS)?)
    }

    /// Deletes a stopped device whose server let go of it.
    pub(crate) fn delete(&self, number: u32) -> Result<(), LifecycleError> {
        match self.run(sys::UBLK_U_CMD_DEL_DEV, "DEL_DEV", number, 0) {
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(()),
            other => Ok(other?),
        }
    }
}

enum Retry<E> {
    Again(E),
    Never(E),
}

/// Tries until it is done, refused, or [`BUSY_LIMIT`] is over. Blocks: not for owner threads.
fn retry<T, E>(mut attempt: impl FnMut() -> Result<T, Retry<E>>) -> Result<T, E> {
    let deadline = Instant::now() + BUSY_LIMIT;
    let (_never, wait) = crossbeam::channel::bounded::<()>(0);
    loop {
        match attempt() {
            Ok(done) => return Ok(done),
            Err(Retry::Never(error)) => return Err(error),
            Err(Retry::Again(error)) if Instant::now() >= deadline => return Err(error),
            Err(Retry::Again(_)) => {
                let _ = wait.recv_timeout(BUSY_PAUSE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_decodes_what_it_encodes() {
        let info = Info {
            queues: 1,
            depth: 128,
            state: 0,
            io_bytes_max: IO_BYTES_MAX,
            number: 7,
            flags: 0x1234,
            identity: u64::MAX - 3,
        };
        assert_eq!(Info::decode(&info.encode()), Some(info));
        assert_eq!(Info::decode(&[0; 20]), None);
    }
}
