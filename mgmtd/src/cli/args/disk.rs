//! `lunar disk ..`

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use lunar_api::mgmt::Role;

use crate::complete;

#[derive(Debug, Subcommand)]
pub(crate) enum Disk {
    /// Give disks to Lunar, all or none
    #[command(
        after_help = "Examples:\n  lunar disk add /dev/sdb /dev/sdc\n  lunar disk add --role spare /dev/sdd\n  lunar disk add --force=ext4 /dev/sde     (that ext4 dies)\n  lunar disk add --as-new /dev/sdf         (a copy of another disk)"
    )]
    Add {
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        #[arg(long, default_value = "data")]
        role: RoleArg,
        /// The one foreign signature that may be destroyed
        #[arg(long, require_equals = true, value_name = "SIGNATURE")]
        force: Option<String>,
        /// Take a copy of a disk of this system as a new one: what it holds dies
        #[arg(long)]
        as_new: bool,
    },
    /// List disks
    #[command(after_help = "Examples:\n  lunar disk list\n  lunar disk list --json")]
    List,
    /// Show a disk
    #[command(after_help = "Examples:\n  lunar disk show 1\n  lunar disk show /dev/sdb")]
    Show {
        /// Number, name or path
        #[arg(add = ArgValueCandidates::new(complete::disks))]
        disk: String,
    },
    /// Say where disks are (links, model, serial, slot), and light their LEDs
    #[command(after_help = "Examples:\n  lunar disk locate 2\n  lunar disk locate 2-4 --off")]
    Locate {
        /// Numbers, ranges, names or paths
        #[arg(required = true, value_name = "DISK", add = ArgValueCandidates::new(complete::disks))]
        disks: Vec<String>,
        /// Put the LEDs out
        #[arg(long)]
        off: bool,
    },
    /// Fail a member by hand
    #[command(after_help = "Examples:\n  lunar disk fail 2")]
    Fail {
        /// Number, name or path
        #[arg(add = ArgValueCandidates::new(complete::disks))]
        disk: String,
    },
    /// Put NEW, or a spare, in the place of OLD: copied from OLD while that is in sync, else rebuilt
    #[command(
        after_help = "Examples:\n  lunar disk replace 2 5\n  lunar disk replace 2 --wait      (takes a spare)\n  lunar disk replace 2 2 --full     (what it holds is not trusted)"
    )]
    Replace {
        /// Number, name or path
        #[arg(add = ArgValueCandidates::new(complete::disks))]
        old: String,
        /// Number, name or path; without: a spare
        #[arg(add = ArgValueCandidates::new(complete::disks))]
        new: Option<String>,
        /// Fill it from the start, also where it is known what it has missed
        #[arg(long)]
        full: bool,
    },
    /// Take disks back
    #[command(after_help = "Examples:\n  lunar disk remove 2\n  lunar disk remove 3-5 --wipe")]
    Remove {
        /// Numbers, ranges, names or paths
        #[arg(required = true, value_name = "DISK", add = ArgValueCandidates::new(complete::disks))]
        disks: Vec<String>,
        /// Overwrite the superblocks: they cannot be brought back
        #[arg(long)]
        wipe: bool,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum RoleArg {
    Data,
    Spare,
    Work,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Self {
        match role {
            RoleArg::Data => Self::Data,
            RoleArg::Spare => Self::Spare,
            RoleArg::Work => Self::Work,
        }
    }
}
