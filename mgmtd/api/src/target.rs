//! What mgmtd and ublk-target say to each other.
//!
//! A Unix `SOCK_SEQPACKET` socket, one JSON message a packet, file descriptors attached (`SCM_RIGHTS`) to
//! the packet that needs them, in the order that the request names them. mgmtd asks, ublk-target answers
//! once a request, in order, on the same connection; several connections may be open. mgmtd sends *intents*:
//! whatever decides where bytes are is written by ublk-target alone, made durable, then answered.

use serde::{Deserialize, Serialize};

use crate::error::ApiError;
use crate::ids::{DiskUuid, GroupUuid, History, LuUuid, SystemUuid};

mod status;

pub use status::*;

/// Version of this protocol; both sides refuse another.
pub const TARGET_API: u32 = 1;
/// What a ublk-target that waits to take another's place says on its first connection, once it is ready to.
pub const STANDBY_READY: &[u8] = b"ready";
/// Longest message, in bytes; a group of 4096 LUs with its extents fits.
pub const MESSAGE_MAX: usize = 1 << 20;
/// Most descriptors in one message: the kernel's SCM_MAX_FD.
pub const FDS_MAX: usize = 253;

/// RAID level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Members of any size one after the other, without redundancy.
    Linear,
    /// Striping without redundancy; one member alone is allowed.
    Raid0,
    /// Every member holds the same.
    Raid1,
    /// One rotating parity, md's `left-symmetric`.
    Raid5,
    /// Two rotating parities, P and Q, md's `left-symmetric`.
    Raid6,
    /// Every chunk on two members, md's `near=2`; the count of members may be odd.
    Raid10,
}

impl Level {
    /// Returns the fewest members that it has.
    pub fn members_min(self) -> usize {
        match self {
            Self::Linear | Self::Raid0 => 1,
            Self::Raid1 | Self::Raid10 => 2,
            Self::Raid5 => 3,
            Self::Raid6 => 4,
        }
    }

    /// Says whether its data goes round the members by chunks.
    pub fn is_striped(self) -> bool {
        match self {
            Self::Linear | Self::Raid1 => false,
            Self::Raid0 | Self::Raid5 | Self::Raid6 | Self::Raid10 => true,
        }
    }

    /// Says whether a member may fail without loss.
    pub fn is_redundant(self) -> bool {
        !matches!(self, Self::Linear | Self::Raid0)
    }

    /// What a new group of this level does after a power loss, unless something else is asked for.
    pub fn consistency(self) -> Consistency {
        match self {
            Self::Raid1 | Self::Raid10 => Consistency::Bitmap,
            Self::Raid5 => Consistency::Ppl,
            Self::Raid6 => Consistency::Journal,
            Self::Linear | Self::Raid0 => Consistency::None,
        }
    }

    /// Says whether a group of this level can have that policy.
    pub fn allows(self, consistency: Consistency) -> bool {
        match consistency {
            Consistency::None => true,
            Consistency::Bitmap => self.is_redundant(),
            Consistency::Ppl => self == Self::Raid5,
            Consistency::Journal => self == Self::Raid6,
        }
    }

    /// Says whether it has parity.
    pub fn has_parity(self) -> bool {
        matches!(self, Self::Raid5 | Self::Raid6)
    }
}

/// Most disks of a group: a superblock has no room for more.
pub const MEMBERS_MAX: usize = 64;

/// What is done so that redundancy is right again after a power loss (md's word).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// md's `resync`: everything is resynced after a power loss; the write hole is open.
    None,
    /// md's `bitmap`: regions that were being written are resynced after a power loss; the write hole is open there.
    Bitmap,
    /// md's `ppl` (raid5): what is not modified of a stripe is logged first; what a power loss tore is made right from that, also
    /// without a member.
    Ppl,
    /// raid6: what is written of a stripe is logged first, on the members that have its parity.
    Journal,
}

impl Consistency {
    /// Says whether writes are logged on the members.
    pub fn has_log(self) -> bool {
        matches!(self, Self::Ppl | Self::Journal)
    }
}

/// State of one slot of a group, as its superblocks say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum MemberState {
    /// Holds what it should hold (below `synced_to`).
    InSync,
    /// Failed; nothing on it is believed.
    Faulty,
    /// Being filled by a rebuild; believed below the rebuild cursor.
    Rebuilding,
    /// Nobody is in this slot.
    Missing,
}

/// State of a group, from its members.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GroupState {
    /// Every slot in sync.
    Optimal,
    /// Redundancy is missing, data is whole.
    Degraded,
    /// Data is missing: what needs it is answered EIO.
    Failed,
    /// Not started; the reason stands beside it.
    Stopped,
    /// It made ublk-target crash again and again: its devices answer EIO, its members are left alone.
    Quarantined,
}

/// A request to ublk-target.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub enum TargetRequest {
    /// First message of a connection. Answer: `Hello`.
    Hello { api: u32, system: SystemUuid },
    /// Reads what the attached disks (one descriptor each) carry; writes nothing. Answer: `Probed`.
    Probe { paths: Vec<String> },
    /// Writes the label of a free disk (superblocks without a group) to the one attached disk. Answer: `Done`.
    Label { path: String, disk: DiskUuid },
    /// Overwrites both superblocks of the one attached disk. Answer: `Done`.
    Wipe { path: String },
    /// Makes a group of the attached members (descriptor i is slot i; the last descriptor is the in-flight
    /// log file on tmpfs) and starts it. Answer: `Group`.
    GroupCreate {
        group: GroupUuid,
        name: String,
        level: Level,
        /// Bytes; a power of two, 4 KiB to 1 MiB; ignored by raid1.
        chunk: u64,
        consistency: Consistency,
        assume_clean: bool,
        members: Vec<MemberSpec>,
    },
    /// Starts a group from the attached members, in any order; last descriptor: in-flight log file. LUs
    /// come up too: a kernel device in `ublk_devices` that bears the LU's identity is recovered. Answer: `Group`.
    GroupStart {
        group: GroupUuid,
        force: bool,
        members: Vec<MemberSpec>,
        /// Ids of every ublk device that the kernel has now.
        ublk_devices: Vec<u32>,
        /// Last (history, generation) that mgmtd recorded; older disks do not start by themselves.
        witness: Option<Witness>,
        /// Members that did not answer in time and are started without.
        #[serde(default)]
        without: Vec<DiskUuid>,
        /// Of members written apart from each other the side of this disk goes on.
        #[serde(default)]
        keep: Option<DiskUuid>,
        /// A deleted group comes back.
        #[serde(default)]
        undelete: bool,
        /// Bytes a second of a member, as in `GroupSet`: from the first stripe on.
        #[serde(default)]
        rebuild_min_bytes: Option<u64>,
        #[serde(default)]
        rebuild_max_bytes: Option<u64>,
        #[serde(default)]
        read_errors_max: Option<u32>,
    },
    /// Has the attached members of a group that does not run (nil: free disks) belong to this system, in the order
    /// given: the highest generation first. Answer: `Done`.
    Adopt {
        group: GroupUuid,
        from: SystemUuid,
        members: Vec<MemberSpec>,
    },
    /// Stops the group's LUs (only those nobody holds: else `Busy`), marks it clean, closes its members. Answer: `Done`.
    GroupStop { group: GroupUuid },
    /// As `GroupStop`, then marks the members' superblocks deleted. Answer: `Done`.
    GroupDelete { group: GroupUuid },
    /// Recovers the devices of a group that makes the process crash, and answers EIO on them; its members are not
    /// opened. `GroupStart` ends it. Answer: `Group`.
    GroupQuarantine {
        /// The group as it was seen last, with the reason.
        seen: Box<GroupStatus>,
        ublk_devices: Vec<u32>,
    },
    /// Marks the superblocks of the attached members of a group that does not run deleted. Answer: `Done`.
    GroupErase {
        group: GroupUuid,
        members: Vec<MemberSpec>,
    },
    /// Renames the group. Answer: `Group`.
    GroupRename { group: GroupUuid, name: String },
    /// Sets tunables that are not on disk. Answer: `Group`.
    GroupSet {
        group: GroupUuid,
        rebuild_min_bytes: Option<u64>,
        rebuild_max_bytes: Option<u64>,
        /// Read errors of a member that may be repaired lately before it is failed; 0: any number.
        #[serde(default)]
        read_errors_max: Option<u32>,
    },
    /// Starts, pauses, resumes or cancels a scrub; durable when answered. Answer: `Group`.
    GroupScrub { group: GroupUuid, order: ScrubOrder },
    /// Gives the group all that its members have room for. Answer: `Group`.
    GroupGrow { group: GroupUuid },
    /// Fails a member by hand. Refused (`NoRedundancy`) where data would be lost. Answer: `Group`.
    MemberFail { group: GroupUuid, disk: DiskUuid },
    /// Puts the one attached disk into a slot that is faulty or missing, and starts its rebuild. Answer: `Group`.
    MemberReplace {
        group: GroupUuid,
        slot: u16,
        member: MemberSpec,
        /// Filled from the start, also where it is known what it has missed.
        #[serde(default)]
        full: bool,
        /// Refused where it is not known what it has missed.
        #[serde(default)]
        only_missed: bool,
    },
    /// Makes a LU and its device. Answer: `Lu`; of one that is zeroed, when it is.
    LuCreate {
        group: GroupUuid,
        lu: LuUuid,
        name: String,
        size: LuSize,
        depth: u16,
        /// Queues of its device.
        queues: u16,
        /// All of it reads as zero before it is there.
        zero: bool,
    },
    /// Gives a LU another number of queues: its device is made anew if nobody holds it (else `Busy`). Answer: `Lu`.
    LuSet {
        group: GroupUuid,
        lu: LuUuid,
        queues: u16,
    },
    /// Gives a LU more space, while it is in use; its size is then `size`. Answer: `Lu`.
    LuResize {
        group: GroupUuid,
        lu: LuUuid,
        size: LuSize,
    },
    /// Stops the device if nobody holds it (else `Busy`), then forgets the LU. Answer: `Done`.
    LuDelete { group: GroupUuid, lu: LuUuid },
    /// Renames a LU. Answer: `Lu`.
    LuRename {
        group: GroupUuid,
        lu: LuUuid,
        name: String,
    },
    /// Lists the deleted LUs whose space nobody has needed since. Answer: `Deleted`.
    LuDeleted { group: GroupUuid },
    /// Brings a deleted LU back, and its device. Answer: `Lu`.
    LuUndelete { group: GroupUuid, lu: LuUuid },
    /// Tells everything. Answer: `Status`.
    Status,
    /// Waits until an event later than `after` exists, at most `wait_ms` (<= 10 s). Answer: `Events`.
    Events { after: u64, wait_ms: u32 },
    /// Stops every group as `GroupStop`, then the process ends. Answer: `Done`, or `Busy` and all goes on.
    Shutdown,
    /// Quiesces every device (what is in flight ends, what comes waits in the kernel) and closes every group, for a
    /// successor to recover them; then the process ends. Answer: `HandedOver`. After an error there is no way back: the
    /// process is to be killed.
    HandOver,
}

/// One attached member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberSpec {
    pub disk: DiskUuid,
    /// For messages only.
    pub path: String,
}

/// Size of a LU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum LuSize {
    /// Bytes, rounded up to whole stripes of at least 1 MiB.
    Bytes(u64),
    /// Percent of what the group has in all.
    Percent(u8),
    /// All that is free.
    Max,
}

/// The last state of a group that mgmtd saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Witness {
    pub history: History,
    pub generation: u64,
}

/// The answer to one request.
pub type TargetReply = Result<TargetAnswer, ApiError>;

/// An answer that is a success.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case", deny_unknown_fields)]
pub enum TargetAnswer {
    Hello {
        api: u32,
        pid: u32,
        version: String,
        features: Features,
    },
    Probed {
        disks: Vec<Probe>,
    },
    Group {
        group: Box<GroupStatus>,
    },
    Lu {
        lu: Box<LuStatus>,
    },
    /// Oldest first.
    Deleted {
        lus: Vec<DeletedLu>,
    },
    Status {
        groups: Vec<GroupStatus>,
        features: Features,
    },
    Events {
        events: Vec<TargetEvent>,
    },
    HandedOver {
        /// Devices that wait for a successor.
        lus: u32,
        /// Milliseconds until all of them stood still, and until the groups were closed.
        quiesced_ms: u64,
        closed_ms: u64,
    },
    Done,
}

/// A deleted LU that can come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeletedLu {
    pub lu: LuUuid,
    pub name: String,
    /// Bytes.
    pub capacity: u64,
}

/// What the kernel gave, read back.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Features {
    pub kernel: String,
    /// Bits of GET_FEATURES.
    pub ublk: u64,
    pub zero_copy: bool,
    /// Why something is missing, one line each; empty when all is there.
    pub notes: Vec<String>,
}

/// What a disk carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    pub path: String,
    /// Bytes.
    pub capacity: u64,
    /// Bytes of a group's data that it has room for as a member; 0: none.
    pub data_bytes: u64,
    /// Bytes.
    pub logical_block: u32,
    /// None: no Lunar superblock there.
    pub label: Option<Label>,
    /// A superblock is there but cannot be believed, or the disk cannot be read: why.
    pub problem: Option<String>,
}

/// A superblock in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Label {
    pub system: SystemUuid,
    pub disk: DiskUuid,
    /// Nil: a free disk.
    pub group: GroupUuid,
    pub group_name: String,
    pub level: Option<Level>,
    /// Members of the group.
    pub slots: u16,
    pub slot: Option<u16>,
    pub history: History,
    pub generation: u64,
    /// Disk of each slot.
    pub members: Vec<DiskUuid>,
    /// Disk that is filled to replace one of them.
    #[serde(default)]
    pub replacement: Option<DiskUuid>,
    /// The group was deleted; the disk is free for reuse.
    pub deleted: bool,
    /// What is wrong with the copy of the superblock that does not count.
    #[serde(default)]
    pub damaged: Option<String>,
}

impl Label {
    /// It names that disk as a member, or as one that is filled to replace one.
    pub fn lists(&self, disk: DiskUuid) -> bool {
        self.members.contains(&disk) || self.replacement == Some(disk)
    }
}

/// Something that happened in ublk-target. md's event names where md has one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetEvent {
    /// Counts from 1 for this process.
    pub seq: u64,
    /// `Fail`, `DegradedArray`, `RebuildStarted`, `RebuildFinished`, `ReadErrorRepaired`, `ResyncStarted`,
    /// `ScrubStarted`, `ScrubMismatch`, `ScrubFinished`, ...
    pub name: String,
    pub group: Option<GroupUuid>,
    pub disk: Option<DiskUuid>,
    pub lu: Option<LuUuid>,
    /// For people.
    pub text: String,
}
