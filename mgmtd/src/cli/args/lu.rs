//! `lunar lu ..`

use clap::Subcommand;
use clap_complete::engine::ArgValueCandidates;
use lunar_api::target::LuSize;

use super::size;
use crate::complete;

#[derive(Debug, Subcommand)]
pub(crate) enum Lu {
    /// Make a LU and its device /dev/lunar/NAME
    #[command(
        after_help = "Examples:\n  lunar lu create vol --group data --size 10GiB\n  lunar lu create all --group data --size max --depth 256\n  lunar lu create busy --group data --size 10GiB --queues 2\n  lunar lu create clean --group data --size 10GiB --zero"
    )]
    Create {
        name: String,
        #[arg(long, add = ArgValueCandidates::new(complete::groups))]
        group: String,
        /// 10GiB, 50% or max
        #[arg(long, value_parser = lu_size)]
        size: LuSize,
        /// Requests in flight; default 128
        #[arg(long)]
        depth: Option<u16>,
        /// Queues of the device, each with a thread of its own but the first; default 1, at most one for each CPU
        #[arg(long)]
        queues: Option<u16>,
        /// Wait until all of it reads as zero; else it has what its space was used for before. Quick on disks that give
        /// space back, else as long as writing it
        #[arg(long)]
        zero: bool,
    },
    /// List LUs
    #[command(after_help = "Examples:\n  lunar lu list")]
    List,
    /// Show a LU, its mkfs geometry and its fstab line
    #[command(after_help = "Examples:\n  lunar lu show vol\n  lunar lu show vol --json")]
    Show {
        /// Number, name or device
        #[arg(add = ArgValueCandidates::new(complete::lus))]
        lu: String,
    },
    /// Rename a LU; it may be in use meanwhile
    #[command(after_help = "Examples:\n  lunar lu rename vol archive")]
    Rename {
        #[arg(add = ArgValueCandidates::new(complete::lus))]
        lu: String,
        /// The new name
        to: String,
    },
    /// Change how a LU is served; refused while anybody holds it
    #[command(
        after_help = "Examples:\n  lunar lu set vol --queues 2\n  lunar lu set vol --queues 1 --dry-run"
    )]
    Set {
        #[arg(add = ArgValueCandidates::new(complete::lus))]
        lu: String,
        /// Queues of the device, each with a thread of its own but the first; at most one for each CPU
        #[arg(long)]
        queues: Option<u16>,
    },
    /// Give a LU more space, while it is in use too, and say how its file system grows
    #[command(
        after_help = "Examples:\n  lunar lu resize vol +10GiB\n  lunar lu resize vol 50GiB\n  lunar lu resize vol max --dry-run"
    )]
    Resize {
        /// Number, name or device
        #[arg(add = ArgValueCandidates::new(complete::lus))]
        lu: String,
        /// What it has then: 50GiB, 50% or max; or what it gets on top: +10GiB
        #[arg(value_parser = new_size)]
        size: NewSize,
    },
    /// Delete LUs, all or none; refused while anybody holds one
    #[command(
        after_help = "Examples:\n  lunar lu delete vol --dry-run\n  lunar lu delete vol\n  lunar lu delete 1-3"
    )]
    Delete {
        /// Numbers, ranges, names or devices
        #[arg(required = true, value_name = "LU", add = ArgValueCandidates::new(complete::lus))]
        lus: Vec<String>,
    },
}

/// The size that a LU is to have, or what it gets on top.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewSize {
    Whole(LuSize),
    More(u64),
}

fn new_size(text: &str) -> Result<NewSize, String> {
    match text.strip_prefix('+') {
        Some(more) => size(more).map(NewSize::More),
        None => lu_size(text).map(NewSize::Whole),
    }
}

fn lu_size(text: &str) -> Result<LuSize, String> {
    if text == "max" {
        return Ok(LuSize::Max);
    }
    match text.strip_suffix('%') {
        Some(percent) => match percent.parse() {
            Ok(percent @ 1..=100) => Ok(LuSize::Percent(percent)),
            _ => Err("a percentage is 1% to 100%".into()),
        },
        None => size(text).map(LuSize::Bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lu_size_table() {
        assert_eq!(lu_size("50%"), Ok(LuSize::Percent(50)));
        assert_eq!(lu_size("max"), Ok(LuSize::Max));
        assert_eq!(lu_size("1GiB"), Ok(LuSize::Bytes(1 << 30)));
        for bad in ["", "0%", "101%", "-1", "x"] {
            assert!(lu_size(bad).is_err(), "{bad}");
        }
        assert_eq!(new_size("+1MiB"), Ok(NewSize::More(1 << 20)));
        assert_eq!(new_size("max"), Ok(NewSize::Whole(LuSize::Max)));
        for bad in ["+", "+50%", "+max", "++1MiB", "-1MiB"] {
            assert!(new_size(bad).is_err(), "{bad}");
        }
    }
}
