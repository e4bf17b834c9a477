//! `lunar group ..`

use clap::{Args, Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use lunar_api::target::{Consistency, Level};

use super::size;
use crate::complete;

#[derive(Debug, Subcommand)]
pub(crate) enum Group {
    /// Make a group
    #[command(
        after_help = "Examples:\n  lunar group create data --level raid5 --disks 1-4\n  lunar group create fast --level raid0 --disks 5,6 --chunk 128KiB\n  lunar group create safe --level raid1 --disks 7,8 --assume-clean     (both known to be zero)\n  lunar group create wide --level raid10 --disks 1-5\n  lunar group create home --level raid5 --disks 1-4 --consistency bitmap\n  lunar group create big --level linear --disks 1-3     (of different sizes)"
    )]
    Create(Create),
    /// List groups
    #[command(after_help = "Examples:\n  lunar group list")]
    List,
    /// Show a group
    #[command(after_help = "Examples:\n  lunar group show data")]
    Show {
        /// Number or name, or a disk or LU of it
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
    },
    /// Set tunables
    #[command(
        after_help = "Examples:\n  lunar group set data --rebuild-max 200MiB\n  lunar group set data --read-errors-max 100\n\nA read error that redundancy repairs counts against its disk; each hour halves what counts. A disk with more than\nthe most, which is 20 unless it is set, is failed where that costs no data and no slot is being filled or copied.\nBelow that `lunar status` names it."
    )]
    Set {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
        /// Bytes a second that a rebuild gets at least
        #[arg(long, value_parser = size)]
        rebuild_min: Option<u64>,
        /// Bytes a second that a rebuild takes at most
        #[arg(long, value_parser = size)]
        rebuild_max: Option<u64>,
        /// Read errors that a disk may have lately, all repaired, before it is failed; 0: any number
        #[arg(long)]
        read_errors_max: Option<u32>,
    },
    /// Compare every stripe of a group; say which do not fit, or make them fit
    #[command(
        after_help = "Examples:\n  lunar group scrub data\n  lunar group scrub data --wait     (exit 1 if bad stripes remain)\n  lunar group scrub data --repair --rate 50MiB\n  lunar group scrub data --pause\n  lunar group show data     (lists the bad stripes)\n\n--repair follows md: parity is made from the data, mirrors from the lowest slot in sync. It makes the copies equal\nagain; which of them was right cannot be told without a checksum."
    )]
    Scrub(Scrub),
    /// Start a stopped group
    #[command(
        after_help = "Examples:\n  lunar group start data\n  lunar group start data --force     (old or wrong data is accepted)\n  lunar group start data --again     (out of quarantine, once the reason is gone)"
    )]
    Start {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
        /// Start although data may be old or wrong
        #[arg(long)]
        force: bool,
        /// Start a group that is quarantined
        #[arg(long)]
        again: bool,
    },
    /// Go on with one side of a group whose disks were written apart from each other
    #[command(
        after_help = "Examples:\n  lunar group resolve data --keep 2 --dry-run\n  lunar group resolve data --keep 2     (what the other side wrote since is given up)"
    )]
    Resolve {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
        /// A disk of the side that goes on
        #[arg(long, value_name = "DISK", add = ArgValueCandidates::new(complete::disks))]
        keep: String,
        /// Although it was not stopped cleanly and is degraded
        #[arg(long)]
        force: bool,
    },
    /// Stop a group and its LUs
    #[command(after_help = "Examples:\n  lunar group stop data")]
    Stop {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
    },
    /// Use all the room of its members, once all were replaced by larger ones; LUs go on meanwhile
    #[command(
        after_help = "Examples:\n  lunar group grow data --dry-run\n  lunar group grow data --wait     (until the redundancy of the new part is made)"
    )]
    Grow {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
    },
    /// Rename a group
    #[command(after_help = "Examples:\n  lunar group rename data archive")]
    Rename {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
        /// The new name
        to: String,
    },
    /// Delete a group and its LUs
    #[command(
        after_help = "Examples:\n  lunar group delete data --dry-run\n  lunar group delete data"
    )]
    Delete {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Create {
    pub(crate) name: String,
    #[arg(long)]
    pub(crate) level: LevelArg,
    /// Numbers, ranges, names or paths
    #[arg(long, required = true, num_args = 1.., value_name = "DISKS", add = ArgValueCandidates::new(complete::disks))]
    pub(crate) disks: Vec<String>,
    /// Contiguous piece on one member; default 64KiB
    #[arg(long, value_parser = size)]
    pub(crate) chunk: Option<u64>,
    /// What is done after a power loss; default: ppl for raid5, journal for raid6, bitmap for raid1 and raid10
    #[arg(long)]
    pub(crate) consistency: Option<ConsistencyArg>,
    /// The members are known to be zero: no first sync
    #[arg(long)]
    pub(crate) assume_clean: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Scrub {
    pub(crate) group: String,
    /// Make what does not fit fit
    #[arg(long)]
    pub(crate) repair: bool,
    /// Let it stand until it is resumed
    #[arg(long, conflicts_with_all = ["repair", "from", "rate", "resume", "cancel"])]
    pub(crate) pause: bool,
    /// Let it go on
    #[arg(long, conflicts_with_all = ["repair", "from", "rate", "cancel"])]
    pub(crate) resume: bool,
    /// End it
    #[arg(long, conflicts_with_all = ["repair", "from", "rate"])]
    pub(crate) cancel: bool,
    /// Byte of a member's data to begin at
    #[arg(long, value_parser = size, value_name = "OFFSET")]
    pub(crate) from: Option<u64>,
    /// Bytes a second of a member that it takes at most
    #[arg(long, value_parser = size, value_name = "RATE")]
    pub(crate) rate: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum LevelArg {
    /// Disks of any size one after the other; no redundancy
    Linear,
    /// Striping; no redundancy
    Raid0,
    /// All disks hold the same
    Raid1,
    /// One disk's room for parity; from 3 disks
    Raid5,
    /// Two disks' room for parity: any two may fail; from 4 disks
    Raid6,
    /// Half the room: every chunk on two disks, from 2, also an odd count
    Raid10,
}

impl From<LevelArg> for Level {
    fn from(level: LevelArg) -> Self {
        match level {
            LevelArg::Raid0 => Self::Raid0,
            LevelArg::Raid1 => Self::Raid1,
            LevelArg::Raid5 => Self::Raid5,
            LevelArg::Raid6 => Self::Raid6,
            LevelArg::Raid10 => Self::Raid10,
            LevelArg::Linear => Self::Linear,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum ConsistencyArg {
    /// Everything is resynced after a power loss; the write hole is open
    None,
    /// Only regions that were being written are resynced after a power loss; default of raid1 and raid10
    Bitmap,
    /// raid5: partial parity is logged before each write, so that nothing is lost with the power and a disk at once
    Ppl,
    /// raid6: each write is logged first, so that nothing is lost with the power and two disks at once
    Journal,
}

impl From<ConsistencyArg> for Consistency {
    fn from(consistency: ConsistencyArg) -> Self {
        match consistency {
            ConsistencyArg::None => Self::None,
            ConsistencyArg::Bitmap => Self::Bitmap,
            ConsistencyArg::Ppl => Self::Ppl,
            ConsistencyArg::Journal => Self::Journal,
        }
    }
}
