//! What ublk-target says of a group, its members, its LUs and its background work.

use serde::{Deserialize, Serialize};

use super::{Consistency, GroupState, Level, MemberState};
use crate::ids::{DiskUuid, GroupUuid, History, LuUuid};

/// A group, live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupStatus {
    pub group: GroupUuid,
    pub name: String,
    pub level: Level,
    pub chunk: u64,
    /// Bytes of data in a full stripe.
    pub stripe_bytes: u64,
    /// How many more members it can lose now, whichever they are.
    pub can_lose: u16,
    pub consistency: Consistency,
    pub state: GroupState,
    /// Why it is not optimal, for people; empty when it is.
    pub reason: String,
    pub history: History,
    pub generation: u64,
    /// Usable bytes, and those not given to a LU.
    pub capacity: u64,
    pub free: u64,
    /// Usable bytes once it is grown: `capacity` where its members have no more room.
    #[serde(default)]
    pub capacity_max: u64,
    /// Bytes of one member that hold data (linear: of the largest).
    pub member_bytes: u64,
    pub logical_block: u32,
    pub members: Vec<MemberStatus>,
    pub lus: Vec<LuStatus>,
    /// The disk that is filled to replace the one in its slot, which is in sync.
    #[serde(default)]
    pub replacement: Option<MemberStatus>,
    /// Running background work.
    pub sync: Option<SyncStatus>,
    /// The scrub that runs, or the last one.
    #[serde(default)]
    pub scrub: Option<ScrubStatus>,
    /// LUs that are zeroed before they are there.
    #[serde(default)]
    pub zeroing: Vec<ZeroStatus>,
    /// Read errors of a member that may be repaired lately before it is failed; 0: any number.
    #[serde(default)]
    pub read_errors_max: u32,
    pub zero_copy: bool,
    /// Times that serving requests allocated memory since the group started; stays as it is once warm.
    pub allocations: u64,
}

impl GroupStatus {
    /// Its members, and the disk that is filled to replace one of them.
    pub fn all_members(&self) -> impl Iterator<Item = &MemberStatus> {
        self.members.iter().chain(&self.replacement)
    }
}

/// A slot, live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberStatus {
    pub slot: u16,
    pub disk: DiskUuid,
    pub path: String,
    pub state: MemberState,
    /// Bytes from the start of the disk to the group's data; 0 where nobody is.
    pub data_offset: u64,
    /// Why it is not in sync; empty when it is.
    pub reason: String,
    /// Counted since the group started.
    pub reads: u64,
    pub writes: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    /// Reads that failed, by media errors or others; and writes and flushes.
    pub read_errors: u64,
    pub write_errors: u64,
    /// Grains (4 KiB) that could not be read, and were written anew from redundancy.
    #[serde(default)]
    pub repaired: u64,
    /// Times that it did not answer for 30 s.
    #[serde(default)]
    pub timeouts: u64,
    /// Read errors that were repaired and count against it: each hour halves them.
    #[serde(default)]
    pub errors_lately: u32,
    /// Grains (4 KiB) of its data that do not hold what they should, and are not read: redundancy serves them, or nobody.
    #[serde(default)]
    pub bad_blocks: u64,
    /// The first of them, in bytes from the start of the disk.
    #[serde(default)]
    pub bad_blocks_at: Vec<u64>,
    /// Why it was failed, since the group started.
    #[serde(default)]
    pub cause: Option<FailCause>,
    /// It is not in sync, and what it has missed since is known.
    #[serde(default)]
    pub can_catch_up: bool,
    /// Microseconds of an I/O, over the last 5 s that had any.
    #[serde(default)]
    pub latency_us: u64,
    /// It is much slower than its peers, for some time.
    #[serde(default)]
    pub slow: Option<SlowStatus>,
}

/// A member that is much slower than its peers: microseconds of an I/O, and the median of theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SlowStatus {
    pub latency_us: u64,
    pub peers_us: u64,
}

/// Why a member was failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum FailCause {
    /// By hand.
    Hand,
    /// Too many read errors lately.
    Reads,
    /// A write or flush failed, or what could not be read could not be written anew.
    Writes,
    /// It did not answer in time.
    NoAnswer,
    /// The kernel says that its device is not there any more.
    Gone,
}

/// A LU that is zeroed before it is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZeroStatus {
    pub name: String,
    /// Bytes of the LU.
    pub done: u64,
    pub total: u64,
    /// Bytes a second since it began.
    pub rate: u64,
}

/// Background work of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SyncStatus {
    /// `resync` or `recover` (md's words).
    pub action: SyncAction,
    /// Bytes of a member that are done, of `total`.
    pub done: u64,
    pub total: u64,
    /// Bytes a second of a member, lately.
    pub rate: u64,
    /// Slot being filled, for `recover`.
    pub slot: Option<u16>,
}

/// Kinds of background work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum SyncAction {
    /// Make redundancy right: a new group, or one after an unclean shutdown.
    Resync,
    /// Fill a replacement.
    Recover,
    /// Copy a disk that is replaced to the one that takes its slot.
    Replace,
}

/// What is to be done about the scrub of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ScrubOrder {
    /// A new one; refused (`Busy`) while another runs or is paused.
    Start {
        /// md's `repair`: parity is made from the data, mirror legs from the lowest slot in sync. Else md's `check`.
        repair: bool,
        /// Bytes of a member's data to begin at.
        from: u64,
        /// Most bytes a second of a member.
        rate: Option<u64>,
    },
    Pause,
    Resume,
    Cancel,
}

/// State of a scrub.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ScrubState {
    /// It runs, or waits for a resync or rebuild to end.
    Running,
    Paused,
    Done,
    Cancelled,
}

/// A scrub: every stripe read from all members and compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScrubStatus {
    pub state: ScrubState,
    /// What does not fit is made to fit.
    pub repair: bool,
    /// Bytes of a member where it began; all from there to `done` is compared, of `total`.
    pub from: u64,
    pub done: u64,
    pub total: u64,
    /// Bytes a second of a member, lately.
    pub rate: u64,
    pub rate_max: Option<u64>,
    /// Stripes whose redundancy did not fit, and those of them that fit now.
    pub bad: u64,
    pub repaired: u64,
    /// Stripes that could not be compared: more is unreadable than redundancy gives back.
    pub unreadable: u64,
    /// Bytes that could not be read and were rewritten from redundancy.
    pub rewritten: u64,
    /// Milliseconds since 1970, UTC.
    pub started: u64,
    pub ended: Option<u64>,
    /// The first of the bad stripes, in order; `bad` counts them all.
    pub stripes: Vec<BadStripe>,
}

/// A stripe whose redundancy did not fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BadStripe {
    pub stripe: u64,
    /// Bytes of the members' data within which the difference lies.
    pub at: u64,
    pub len: u64,
    /// Slots that are wrong, where that can be told: mirror legs unlike the lowest slot in sync. Empty: it cannot.
    pub slots: Vec<u16>,
    /// The LU that has data there, and which bytes of it may be wrong.
    pub lu: Option<LuUuid>,
    pub lu_at: u64,
    pub lu_len: u64,
    pub repaired: bool,
}

/// A LU, live.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LuStatus {
    pub lu: LuUuid,
    pub name: String,
    pub group: GroupUuid,
    /// Bytes.
    pub capacity: u64,
    pub depth: u16,
    /// Queues that it is to have.
    pub queues: u16,
    /// Queues that the kernel made: no more than there are CPUs; 0 when it is not up.
    pub queues_served: u16,
    /// Number N of /dev/ublkbN, when the device is up.
    pub ublk: Option<u32>,
    /// Why it is not up, or answers errors; empty when all is well.
    pub problem: String,
    pub counters: LuCounters,
}

impl std::ops::AddAssign for LuCounters {
    fn add_assign(&mut self, more: Self) {
        let Self {
            reads,
            writes,
            flushes,
            discards,
            read_bytes,
            write_bytes,
            errors,
            zero_copy,
            user_copy,
            bounced,
            range_lock_waits,
            full_stripe_writes,
            reconstruct_writes,
            read_modify_writes,
            degraded_reads,
            merged,
        } = more;
        self.reads += reads;
        self.writes += writes;
        self.flushes += flushes;
        self.discards += discards;
        self.read_bytes += read_bytes;
        self.write_bytes += write_bytes;
        self.errors += errors;
        self.zero_copy += zero_copy;
        self.user_copy += user_copy;
        self.bounced += bounced;
        self.range_lock_waits += range_lock_waits;
        self.full_stripe_writes += full_stripe_writes;
        self.reconstruct_writes += reconstruct_writes;
        self.read_modify_writes += read_modify_writes;
        self.degraded_reads += degraded_reads;
        self.merged += merged;
    }
}

/// Counted per LU since its device came up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct LuCounters {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub read_bytes: u64,
    pub write_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests whose own pages went to or came from the members.
    pub zero_copy: u64,
    /// Requests copied through the private pool.
    pub user_copy: u64,
    /// Requests that had to be read and merged because they were not whole 4 KiB grains.
    pub bounced: u64,
    /// Times that a request waited for a stripe or range held by another.
    pub range_lock_waits: u64,
    /// Stripe operations by kind.
    pub full_stripe_writes: u64,
    pub reconstruct_writes: u64,
    pub read_modify_writes: u64,
    pub degraded_reads: u64,
    /// Writes that joined another's stripe operation.
    pub merged: u64,
}
