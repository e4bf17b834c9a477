//! Everything about ublk: what the kernel can do, how a device is described, and the control command itself.
//!
//! [`device`] serves the tags of a device's queue on a ring, [`attached`] keeps those of a thread, [`lifecycle`] brings devices up and down.

pub(crate) mod attached;
pub(crate) mod device;
pub(crate) mod lifecycle;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use libublk::sys;
use lunar_api::LuUuid;
use lunar_api::target::{Features, GroupStatus, Level};
use lunar_engine::raid_group;

const CONTROL: &str = "/dev/ublk-control";
/// Largest request: what one private copy takes, and 1/16 of the pool's part for them.
pub(crate) const IO_BYTES_MAX: u32 = 1 << 20;
const _: () = assert!(IO_BYTES_MAX as u64 == lunar_engine::limits::MAX_IO);
/// The engine's grain: what is smaller it reads, merges and writes back.
const PHYSICAL_BLOCK: u32 = lunar_engine::plan::GRAIN;
/// Sectors of a discard or zeroing request, 128 MiB: each ends soon even where zeroes have to be written.
const ZEROES_SECTORS_MAX: u32 = 128 << 11;
/// Least mask of a request's memory: the block layer's own default.
const DMA_MASK_MIN: u32 = 511;
/// Largest that ublk takes: a page's; memory of members that want more is not theirs to choose.
const DMA_MASK_MAX: u32 = 4095;
/// Parameter the sys crate does not know yet.
const PARAM_DMA_ALIGN: u32 = 1 << 4;
/// Bytes of the kernel's `struct ublk_params`, up to and with the integrity part.
const PARAMS_BYTES: usize = 152;

const fn flag(bit: u32) -> u64 {
    bit as u64
}

/// What every device needs.
const FLAGS_NEEDED: u64 = flag(sys::UBLK_F_CMD_IOCTL_ENCODE)
    | flag(sys::UBLK_F_USER_COPY)
    | flag(sys::UBLK_F_USER_RECOVERY)
    | flag(sys::UBLK_F_USER_RECOVERY_REISSUE);
/// What is used where the kernel has it.
const FLAGS_WANTED: u64 = flag(sys::UBLK_F_QUIESCE) | FLAG_UPDATE_SIZE;
/// UPDATE_SIZE is there.
const FLAG_UPDATE_SIZE: u64 = flag(sys::UBLK_F_UPDATE_SIZE);
/// Registers a request's pages with the ring as it is fetched.
const FLAG_ZERO_COPY: u64 = flag(sys::UBLK_F_AUTO_BUF_REG);
/// TRY_STOP_DEV is there.
pub(crate) const FLAG_SAFE_STOP: u64 = flag(sys::UBLK_F_SAFE_STOP_DEV);

/// The environment variable that forces copy mode, for tests.
const NO_ZERO_COPY: &str = "LUNAR_NO_ZERO_COPY";

/// Reads what the kernel can do into words; `bits` are those of GET_FEATURES.
pub(crate) fn features(kernel: &str, bits: Result<u64, String>) -> Features {
    let mut notes = Vec::new();
    let ublk = bits.unwrap_or_else(|why| {
        notes.push(format!("no ublk devices: {why}"));
        0
    });
    if let Some(why) = bad_kernel(kernel) {
        notes.push(format!("no ublk devices: {why}"));
    }
    let missing = FLAGS_NEEDED & !ublk;
    if ublk != 0 && missing != 0 {
        notes.push(format!(
            "no ublk devices: this kernel lacks ublk features {missing:#x}; 6.17 or later has them"
        ));
    }
    let mut zero_copy = ublk & FLAG_ZERO_COPY != 0;
    if ublk != 0 && !zero_copy {
        notes.push(
            "copy mode: this kernel does not register ublk requests (6.17 or later does)".into(),
        );
    }
    if zero_copy && std::env::var_os(NO_ZERO_COPY).is_some_and(|value| value == "1") {
        zero_copy = false;
        notes.push(format!("copy mode: {NO_ZERO_COPY}=1"));
    }
    if ublk != 0 && ublk & FLAG_SAFE_STOP == 0 {
        notes.push(
            "a device is stopped after looking for openers, not in one step (7.0 or later does)"
                .into(),
        );
    }
    Features {
        kernel: kernel.into(),
        ublk,
        zero_copy,
        notes,
    }
}

/// Says why devices are not made on a kernel at all.
///
/// # Source  ADD_DEV dereferences NULL in 6.18.4, 6.18.5 and Ubuntu's 6.17.0-24 to -40
pub(crate) fn bad_kernel(release: &str) -> Option<&'static str> {
    const WHY: &str = "this kernel crashes when a ublk device is added (6.18.4, 6.18.5 and Ubuntu's 6.17.0-24 to -40); use another";
    let numbers: Vec<u32> = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse().ok())
        .collect();
    match numbers[..] {
        [6, 18, 4 | 5, ..] => Some(WHY),
        [6, 17, 0, 24..=40, ..] if release.contains("generic") || release.contains("ubuntu") => {
            Some(WHY)
        }
        _ => None,
    }
}

/// Flags of a new device.
fn device_flags(features: &Features) -> u64 {
    let zero_copy = if features.zero_copy {
        FLAG_ZERO_COPY
    } else {
        0
    };
    FLAGS_NEEDED | (FLAGS_WANTED & features.ublk) | zero_copy
}

/// The LU's mark in the kernel object (FNV-1a of its uuid); never 0.
pub(crate) fn identity(lu: LuUuid) -> u64 {
    let hash = lu
        .to_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    hash.max(1)
}

/// What the block layer is told of a LU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) bytes: u64,
    /// Bytes.
    pub(crate) logical_block: u32,
    /// Bytes; the engine's grain.
    pub(crate) physical_block: u32,
    /// Bytes, powers of two.
    pub(crate) io_min: u64,
    pub(crate) io_opt: u64,
    /// Every member gives space back: discards are announced. Zeroing always is.
    pub(crate) discard: bool,
    /// Bytes, a power of two: what discards shorter than this do is not worth their while.
    pub(crate) discard_grain: u32,
    /// Bits of a memory address that are 0: so that every member takes a request's own pages.
    pub(crate) dma_mask: u32,
}

impl Geometry {
    /// Reads it off a group. A full stripe that is no power of two cannot be said: the power of two below it.
    pub(crate) fn of(group: &GroupStatus, bytes: u64, discard: bool, members_mask: u32) -> Self {
        let (io_min, stripe) = match group.level.is_striped() {
            true => (group.chunk, group.stripe_bytes),
            false => (4096, 4096),
        };
        Self {
            bytes,
            logical_block: group.logical_block,
            physical_block: PHYSICAL_BLOCK,
            io_min,
            io_opt: 1 << stripe.max(1).ilog2(),
            discard,
            discard_grain: match group.level {
                Level::Raid0 | Level::Linear => PHYSICAL_BLOCK,
                // The kernel rounds with it as with a power of two.
                _ => u32::try_from(group.stripe_bytes.next_power_of_two()).unwrap_or(1 << 31),
            },
            dma_mask: (members_mask | DMA_MASK_MIN).min(DMA_MASK_MAX),
        }
    }

    /// The kernel's `struct ublk_params`.
    pub(crate) fn params(&self) -> Vec<u8> {
        let shift = |bytes: u64| u8::try_from(bytes.max(512).ilog2()).expect("a logarithm");
        let mut to = vec![0; PARAMS_BYTES];
        let mut put = |at: usize, bytes: &[u8]| to[at..at + bytes.len()].copy_from_slice(bytes);
        let types = sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD | PARAM_DMA_ALIGN;
        put(
            8,
            &(sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA).to_ne_bytes(),
        );
        put(
            12,
            &[
                shift(u64::from(self.logical_block)),
                shift(u64::from(self.physical_block)),
                shift(self.io_opt),
                shift(self.io_min),
            ],
        );
        put(16, &(IO_BYTES_MAX >> 9).to_ne_bytes());
        put(24, &(self.bytes >> 9).to_ne_bytes());
        let discards = if self.discard { ZEROES_SECTORS_MAX } else { 0 };
        put(44, &self.discard_grain.to_ne_bytes());
        put(48, &discards.to_ne_bytes());
        put(52, &ZEROES_SECTORS_MAX.to_ne_bytes());
        put(56, &1_u16.to_ne_bytes());
        put(108, &self.dma_mask.to_ne_bytes());
        put(0, &u32::try_from(PARAMS_BYTES).expect("152").to_ne_bytes());
        put(4, &types.to_ne_bytes());
        to
    }
}

/// What GET_PARAMS is asked with: its length; everything else comes from the kernel.
fn ask_params() -> Vec<u8> {
    let mut ask = vec![0; PARAMS_BYTES];
    ask[..4].copy_from_slice(&u32::try_from(PARAMS_BYTES).expect("152").to_ne_bytes());
    ask
}

/// Bytes of a device with these parameters.
fn bytes_of(params: &[u8]) -> Option<u64> {
    let sectors = params.get(24..32)?.try_into().ok()?;
    u64::from_ne_bytes(sectors).checked_mul(512)
}

/// One control command as it goes to the kernel.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Command {
    pub(crate) op: u32,
    /// For messages.
    pub(crate) name: String,
    /// u32::MAX: the kernel chooses.
    pub(crate) device: u32,
    pub(crate) data: u64,
    /// Read and written by the kernel.
    pub(crate) buffer: Vec<u8>,
}

/// The way to the kernel's control device.
pub(crate) struct Control {
    device: File,
    ring: IoUring<Entry128, cqueue::Entry>,
}

impl Control {
    /// # Errors  `/dev/ublk-control` is not there, or no ring can be had
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self {
            device: File::options().read(true).write(true).open(CONTROL)?,
            ring: IoUring::builder().dontfork().build(4)?,
        })
    }

    /// Sends a control command and waits for its answer; blocks for as long as the kernel likes.
    ///
    /// # Errors  the kernel's errno, negative numbers in the completion included
    pub(crate) fn execute(&mut self, command: &mut Command) -> io::Result<i32> {
        let mut bytes = [0_u8; 80];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        let len = u16::try_from(command.buffer.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let addr = command.buffer.as_mut_ptr().expose_provenance() as u64;
        // struct ublksrv_ctrl_cmd: dev_id, queue_id (-1: none), len, addr, data.
        put(0, &command.device.to_ne_bytes());
        put(4, &u16::MAX.to_ne_bytes());
        if len > 0 {
            put(6, &len.to_ne_bytes());
            put(8, &addr.to_ne_bytes());
        }
        put(16, &command.data.to_ne_bytes());
        let fd = types::Fd(self.device.as_raw_fd());
        let entry = opcode::UringCmd80::new(fd, command.op).cmd(bytes).build();
        // SAFETY: the buffer outlives the command, which is waited for below; the descriptor is open.
        unsafe { self.ring.submission().push(&entry) }.expect("an empty queue of 4");
        while self.ring.completion().is_empty() {
            match self.ring.submit_and_wait(1) {
                // What may be under way has the buffer: this process ends, and is reported.
                Err(error) if error.raw_os_error() != Some(libc::EINTR) => std::process::exit(1),
                Ok(_) | Err(_) => {}
            }
        }
        let result = self.ring.completion().next().expect("waited for").result();
        if result < 0 {
            Err(io::Error::from_raw_os_error(-result))
        } else {
            Ok(result)
        }
    }
}

/// Answers the errno that a request of the host gets; EAGAIN would be taken for "not yet" and never tried again.
fn host_errno(errno: raid_group::Errno) -> i32 {
    match errno.0 {
        0 | libc::EAGAIN | libc::EINTR => -libc::EIO,
        errno => -errno.abs(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_kernel_names_the_crashing_ones_only() {
        for (release, bad) in [
            ("6.18.4", true),
            ("6.18.5-arch1", true),
            ("6.18.6", false),
            ("6.17.0-24-generic", true),
            ("6.17.0-41-generic", false),
            ("6.17.0-30.fc42", false),
            ("7.2.12", false),
            ("", false),
        ] {
            assert_eq!(bad_kernel(release).is_some(), bad, "{release}");
        }
    }

    #[test]
    fn host_errno_is_never_again() {
        for (errno, answer) in [(5, -5), (28, -28), (11, -5), (4, -5), (0, -5)] {
            assert_eq!(host_errno(raid_group::Errno(errno)), answer);
        }
    }

    #[test]
    fn params_lie_where_the_kernel_reads_them() {
        let geometry = Geometry {
            bytes: 1 << 30,
            logical_block: 512,
            physical_block: 4096,
            io_min: 65536,
            io_opt: 131_072,
            discard: true,
            discard_grain: 196_608,
            dma_mask: 4095,
        };
        let params = geometry.params();
        let u32_at = |at: usize| u32::from_ne_bytes(params[at..at + 4].try_into().unwrap());
        assert_eq!((u32_at(0), u32_at(4)), (152, 0b1_0011));
        assert_eq!(params[12..16], [9, 12, 17, 16]);
        assert_eq!((u32_at(16), u32_at(24)), (2048, 1 << 21));
        assert_eq!((u32_at(44), u32_at(108)), (196_608, 4095));
        assert_eq!((u32_at(48), u32_at(52)), (128 << 11, 128 << 11));
        assert_eq!(bytes_of(&params), Some(1 << 30));
        assert_eq!(ask_params()[..4], params[..4]);
    }

    #[test]
    fn features_without_needed_bits_say_so() {
        let all = features("7.2.12", Ok(0xf_ffff));
        assert!(all.zero_copy && all.notes.is_empty());
        let none = features("7.2.12", Err("no /dev/ublk-control".into()));
        assert!(!none.zero_copy && none.notes.len() == 1);
        let old = features("6.5.0", Ok(0xff));
        assert!(!old.zero_copy && old.notes.len() == 2);
    }
}
