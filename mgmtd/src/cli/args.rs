//! What can be typed.

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::engine::ArgValueCandidates;
use lunar_api::units::parse_size;

use crate::complete;

mod disk;
mod group;
mod lu;

pub(crate) use disk::Disk;
pub(crate) use group::Group;
pub(crate) use lu::{Lu, NewSize};

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
    /// Put another version of the programs in the place of the one that runs, while LUs are in use
    ///
    /// The devices are quiesced: what is in flight ends, what comes waits in the kernel until the new ublk-target has taken them
    /// up. One that does not come up, or does not bring up all that was up, is ended, and the old one goes on. mgmtd then
    /// becomes the new mgmtd; no LU notices. Without --to: what is installed where they were started from.
    #[command(
        after_help = "Examples:\n  lunar upgrade --check\n  lunar upgrade\n  lunar upgrade --to /opt/lunar-0.2 --dry-run\n  lunar upgrade --to /opt/lunar-0.2/ublk-target     (mgmtd stays; it starts the installed one when it is started anew)\n\nExit status: 0 done, or nothing to do, or (--check) it would be done; 1 it does not fit, or the old version had to go on."
    )]
    Upgrade {
        /// Only say what runs, what would run, and whether it fits
        #[arg(long)]
        check: bool,
        /// A ublk-target, or a folder with one and perhaps a mgmtd
        #[arg(long, value_name = "PATH")]
        to: Option<PathBuf>,
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

    /// Source files of all that gives people something to type, but these ones and tests.
    fn sources(dir: &Path, to: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            let is_code = path.extension().is_some_and(|ext| ext == "rs");
            if path.is_dir() && !path.ends_with("tests") && !path.ends_with("cli/args") {
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
}
