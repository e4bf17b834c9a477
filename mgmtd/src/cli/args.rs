//! What can be typed.

use std::path::PathBuf;

use clap::{Args as Group_, Parser, Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use lunar_api::mgmt::Role;
use lunar_api::target::{Consistency, Level, LuSize};
use lunar_api::units::parse_size;

use crate::complete;

const EXIT: &str = "Exit status: 0 ok, 1 failed, 2 usage, 3 redundancy missing, 4 no service, 5 daemon unreachable,\n6 refused because data would die, 7 in use or held elsewhere.";

/// Steers a Lunar storage array.
#[derive(Debug, Parser)]
#[command(name = "lunar", version, after_help = const_format())]
pub(crate) struct Args {
    /// Socket of mgmtd
    #[arg(long, global = true, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Number of the system, when this machine runs several
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u32).range(1..10000))]
    pub(crate) system: Option<u32>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print the steps, do nothing
    #[arg(long, global = true)]
    pub(crate) dry_run: bool,
    /// What dies may die
    #[arg(long, short, global = true)]
    pub(crate) yes: bool,
    /// Wait until the background job has ended too
    #[arg(long, global = true, conflicts_with = "no_wait")]
    pub(crate) wait: bool,
    /// Do not wait for background jobs (the default)
    #[arg(long, global = true)]
    pub(crate) no_wait: bool,
    #[command(subcommand)]
    pub(crate) noun: Noun,
}

fn const_format() -> String {
    format!(
        "Examples:\n  lunar disk add /dev/sdb /dev/sdc /dev/sdd\n  lunar group create data --level raid5 --disks 1-3\n  lunar lu create vol --group data --size max\n  lunar status\n\n{EXIT}"
    )
}

#[derive(Debug, Subcommand)]
pub(crate) enum Noun {
    /// Tell the health of everything
    #[command(
        after_help = "Examples:\n  lunar status\n  lunar status -x\n  lunar status --watch\n  lunar status --json\n\nExit status: 0 optimal, 3 redundancy missing, 4 something gives no service, 5 daemon unreachable."
    )]
    Status {
        /// Only what is not healthy
        #[arg(short = 'x', long)]
        unhealthy: bool,
        /// Again every 2 s, until Ctrl-C
        #[arg(long)]
        watch: bool,
    },
    /// Print a table
    #[command(
        after_help = "Examples:\n  lunar table disks\n  lunar table raid-groups --json\n  lunar table lus"
    )]
    Table { name: Table },
    /// Tell what happened
    #[command(
        after_help = "Examples:\n  lunar events\n  lunar events --follow\n  lunar events --json\n  lunar events --test     (a TestMessage for every group, also to the hooks)"
    )]
    Events {
        /// Go on until Ctrl-C
        #[arg(long, short)]
        follow: bool,
        /// Record a TestMessage for every group and run the hooks with it
        #[arg(long, conflicts_with = "follow")]
        test: bool,
    },
    /// Background jobs
    #[command(
        after_help = "Examples:\n  lunar job list\n  lunar job watch 7\n  lunar job cancel 7"
    )]
    Job {
        #[command(subcommand)]
        verb: Job,
    },
    /// Disks, partitions and files given to Lunar
    #[command(
        after_help = "Examples:\n  lunar disk add /dev/disk/by-id/wwn-0x5000c500a1\n  lunar disk list\n  lunar disk replace 2 5"
    )]
    Disk {
        #[command(subcommand)]
        verb: Disk,
    },
    /// RAID groups
    #[command(
        after_help = "Examples:\n  lunar group create data --level raid5 --disks 1-4\n  lunar group show data\n  lunar group delete data"
    )]
    Group {
        #[command(subcommand)]
        verb: Group,
    },
    /// Logical units: what file systems are put on
    #[command(
        after_help = "Examples:\n  lunar lu create vol --group data --size 10GiB\n  lunar lu show vol\n  lunar lu delete vol"
    )]
    Lu {
        #[command(subcommand)]
        verb: Lu,
    },
    /// Ways to the LUs
    #[command(after_help = "Examples:\n  lunar path list\n  lunar path list --json")]
    Path {
        #[command(subcommand)]
        verb: PathVerb,
    },
    /// Take disks, groups and LUs from what the disks themselves say
    ///
    /// After the state directory was lost: the new, empty system becomes the one that the disks belong to, finds their groups and
    /// LUs, and starts them. Disks of another system are named and left alone; --take makes them this system's for good.
    #[command(
        after_help = "Examples:\n  lunar import /dev/sdb /dev/sdc /dev/sdd\n  lunar import --dry-run /dev/disk/by-id/wwn-*\n  lunar import --deleted /dev/sdb /dev/sdc     (deleted groups and LUs come back)\n  lunar import --take /dev/sdb /dev/sdc        (the other system loses them)"
    )]
    Import {
        #[arg(required = true, value_name = "PATH")]
        paths: Vec<PathBuf>,
        /// Bring deleted groups and LUs back, as far as nobody has needed their space since
        #[arg(long)]
        deleted: bool,
        /// Take groups away from the system that they belong to
        #[arg(long)]
        take: bool,
    },
    /// Keep what no disk carries, and what there is, in a file
    #[command(
        after_help = "Examples:\n  lunar config save /root/lunar.json\n  lunar config load /root/lunar.json --dry-run"
    )]
    Config {
        #[command(subcommand)]
        verb: Config,
    },
    /// Check the machine and the set-up, and say what to do about what is not well
    #[command(
        after_help = "Examples:\n  lunar doctor\n  lunar doctor --all\n  lunar doctor --json\n\nExit status: 0 nothing failed (warnings allowed), 1 a check failed."
    )]
    Doctor {
        /// Print the checks that are fine too
        #[arg(long, short)]
        all: bool,
    },
    /// Print counters and states for Prometheus (text format 0.0.4)
    #[command(
        after_help = "Examples:\n  lunar metrics\n  lunar metrics > /var/lib/node_exporter/lunar.prom     (textfile collector)"
    )]
    Metrics,
    /// Print the I/O of LUs and members
    #[command(
        after_help = "Examples:\n  lunar stat           (counts since the group started)\n  lunar stat 2         (a second's I/O, every 2 s, until Ctrl-C)\n  lunar stat 1 10 --json"
    )]
    Stat {
        /// Seconds between two lines; without: counts since the group started
        #[arg(value_parser = clap::value_parser!(u32).range(1..=86400))]
        interval: Option<u32>,
        /// How many times; without: until Ctrl-C
        #[arg(value_parser = clap::value_parser!(u32).range(1..))]
        count: Option<u32>,
    },
    /// Print all that a bug report needs, without secrets
    #[command(after_help = "Examples:\n  lunar report > lunar-report.txt")]
    Report,
    /// Print what a shell needs to complete lunar's verbs, options and names
    #[command(
        after_help = "Examples:\n  lunar completions bash > /usr/share/bash-completion/completions/lunar\n  lunar completions zsh > /usr/local/share/zsh/site-functions/_lunar\n  lunar completions fish > /etc/fish/completions/lunar.fish"
    )]
    Completions { shell: Shell },
    /// Write the manual pages of every verb
    #[command(
        hide = true,
        after_help = "Examples:\n  lunar man --out /usr/local/share/man/man1"
    )]
    Man {
        /// Folder; it is made if it is not there
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Stop everything in order; names the mounts that hold it
    #[command(after_help = "Examples:\n  lunar shutdown --dry-run\n  lunar shutdown")]
    Shutdown,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Table {
    Disks,
    RaidGroups,
    Lus,
    Paths,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Job {
    /// List jobs
    #[command(after_help = "Examples:\n  lunar job list")]
    List,
    /// Follow a job to its end; Ctrl-C detaches, the job goes on
    #[command(after_help = "Examples:\n  lunar job watch 7")]
    Watch {
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        job: u32,
    },
    /// End a job early
    #[command(after_help = "Examples:\n  lunar job cancel 7")]
    Cancel {
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        job: u32,
    },
}

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
        after_help = "Examples:\n  lunar disk replace 2 5\n  lunar disk replace 2 --wait     (takes a spare)"
    )]
    Replace {
        /// Number, name or path
        #[arg(add = ArgValueCandidates::new(complete::disks))]
        old: String,
        /// Number, name or path; without: a spare
        #[arg(add = ArgValueCandidates::new(complete::disks))]
        new: Option<String>,
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

#[derive(Debug, Subcommand)]
pub(crate) enum Group {
    /// Make a group
    #[command(
        after_help = "Examples:\n  lunar group create data --level raid5 --disks 1-4\n  lunar group create fast --level raid0 --disks 5,6 --chunk 128KiB\n  lunar group create safe --level raid1 --disks 7,8 --assume-clean     (both known to be zero)\n  lunar group create wide --level raid10 --disks 1-5\n  lunar group create big --level linear --disks 1-3     (of different sizes)"
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
    #[command(after_help = "Examples:\n  lunar group set data --rebuild-max 200MiB")]
    Set {
        #[arg(add = ArgValueCandidates::new(complete::groups))]
        group: String,
        /// Bytes a second that a rebuild gets at least
        #[arg(long, value_parser = size)]
        rebuild_min: Option<u64>,
        /// Bytes a second that a rebuild takes at most
        #[arg(long, value_parser = size)]
        rebuild_max: Option<u64>,
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

#[derive(Debug, Group_)]
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
    #[arg(long)]
    pub(crate) consistency: Option<ConsistencyArg>,
    /// The members are known to be zero: no first sync
    #[arg(long)]
    pub(crate) assume_clean: bool,
}

#[derive(Debug, Group_)]
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
}

impl From<ConsistencyArg> for Consistency {
    fn from(consistency: ConsistencyArg) -> Self {
        match consistency {
            ConsistencyArg::None => Self::None,
        }
    }
}

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

#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Write it to FILE, or to standard output
    #[command(
        after_help = "Examples:\n  lunar config save > lunar.json\n  lunar config save /root/lunar.json"
    )]
    Save { file: Option<PathBuf> },
    /// Give numbers, roles and options as FILE has them, and say what differs
    #[command(
        after_help = "Examples:\n  lunar config load /root/lunar.json --dry-run\n  lunar config load /root/lunar.json\n  lunar config load /root/lunar.json --create --yes     (the same groups and LUs, empty, on blank disks)"
    )]
    Load {
        file: PathBuf,
        /// Make its groups and LUs anew, empty, on the disks at the paths that it names
        #[arg(long)]
        create: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PathVerb {
    /// List paths
    #[command(after_help = "Examples:\n  lunar path list")]
    List,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|e| e.to_string())
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
    use std::path::Path;

    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    /// Given every verb of the command tree, then it has an example that begins with its own words and parses.
    #[test]
    fn every_verb_has_examples_that_parse() {
        fn check(command: &clap::Command, words: &str) {
            let help = command.get_after_help().map(ToString::to_string);
            let help = help.unwrap_or_default();
            let lines = help.lines().skip_while(|line| *line != "Examples:").skip(1);
            let lines: Vec<&str> = lines.take_while(|line| line.starts_with("  ")).collect();
            let own = |line: &&&str| format!("{} ", line.trim()).starts_with(&format!("{words} "));
            assert!(
                lines.iter().any(|line| own(&line)),
                "no example of: {words}"
            );
            for line in lines {
                // What follows five spaces is a remark, what follows `>` the shell's.
                let typed = line.trim().split("     ").next().unwrap_or_default();
                let typed = typed.split(" > ").next().unwrap_or_default();
                let parsed = Args::try_parse_from(typed.split_whitespace());
                assert!(parsed.is_ok(), "{typed}: {}", parsed.unwrap_err());
            }
            for verb in command.get_subcommands().filter(|c| c.get_name() != "help") {
                check(verb, &format!("{words} {}", verb.get_name()));
            }
        }
        Args::command().debug_assert();
        check(&Args::command(), "lunar");
    }

    /// Source files of all that gives people something to type, but this one and tests.
    fn sources(dir: &Path, to: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            let is_code = path.extension().is_some_and(|ext| ext == "rs");
            if path.is_dir() && !path.ends_with("tests") {
                sources(&path, to);
            } else if is_code && !path.ends_with("cli/args.rs") && !path.ends_with("tests.rs") {
                to.push(path);
            }
        }
    }

    /// The command lines in the texts of a source: up to what ends a clause, with 1 for each value.
    fn commands(source: &str) -> Vec<String> {
        let code = source
            .split("#[cfg(test)]\nmod ")
            .next()
            .unwrap_or_default();
        let code = code.lines().filter(|line| !line.trim().starts_with("//"));
        let mut text = String::new();
        for line in code {
            match line.strip_suffix('\\') {
                Some(part) => text += part.trim_start(),
                None => text += &format!("{}\n", line.trim_start()),
            }
        }
        let mut out = Vec::new();
        for (at, _) in text.match_indices("lunar ") {
            let before = text[..at].chars().next_back();
            let rest = &text[at..];
            let is_verb = rest["lunar ".len()..].starts_with(|c: char| c.is_ascii_lowercase());
            if !matches!(before, Some('"' | ' ' | '(' | '`')) || !is_verb {
                continue;
            }
            let ends = ["\"", ";", ", ", "`", "\\n", " (", ")", ": ", "\n"];
            let end = ends.iter().filter_map(|end| rest.find(end)).min();
            let mut typed = String::new();
            let mut depth = 0;
            for c in rest[..end.unwrap_or(rest.len())].chars() {
                match c {
                    '{' => depth += 1,
                    '}' => {
                        depth -= 1;
                        typed.push('1');
                    }
                    c if depth == 0 => typed.push(c),
                    _ => {}
                }
            }
            out.push(typed);
        }
        out
    }

    /// Given every text that names a command of `lunar`, then that command can be typed as it stands there.
    #[test]
    fn every_command_that_is_told_parses() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut files = Vec::new();
        for dir in [
            "mgmtd/src",
            "mgmtd/api/src",
            "ublk-target/src",
            "ublk-target/engine/src",
        ] {
            sources(&root.join(dir), &mut files);
        }
        let mut told = 0;
        let mut bad = Vec::new();
        for path in files {
            let source = std::fs::read_to_string(&path).unwrap();
            for typed in commands(&source) {
                told += 1;
                let parsed = Args::try_parse_from(typed.split_whitespace());
                let error = parsed.err().filter(|e| e.kind() != ErrorKind::DisplayHelp);
                bad.extend(error.map(|e| format!("{}: {typed}: {e}", path.display())));
            }
        }
        assert!(
            told > 100,
            "{told} were found: this test looks at the wrong place"
        );
        assert!(bad.is_empty(), "{}", bad.join("\n"));
    }

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
