//! Outside the machine whose power is cut: boots it, draws when and how it is cut, and which disk is lost.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lunar_disks::{Count, Random, Server};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::guest;
use super::job::{self, Job, LEVELS, Ways, policies};
use super::selftest;
use super::stamp::mix;
use super::traps::{Aim, Members, POINTS, Point, Reach};
use crate::e2e::rig::text;
use crate::e2e::shell::{Failure, pause};

/// Bytes of the disk with the state directory, and of a member.
const STATE_BYTES: u64 = 64 << 20;
const MEMBER_BYTES: u64 = 96 << 20;
/// Cuts of a set of disks.
const CUTS_A_SET: u64 = 10;
/// Seconds that a boot may take, load and all.
const BOOT_LIMIT: u64 = 240;

/// What is run.
#[derive(Debug, Clone)]
struct Options {
    cuts: u64,
    seed: u64,
    /// Only this set.
    set: Option<u64>,
    level: Option<&'static str>,
    plant: Option<Plant>,
    /// The bug is in the program that runs, and not in its disks.
    is_built_in: bool,
    keep: bool,
    verbose: bool,
}

/// A bug of the program under test, as its disks would see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plant {
    /// FLUSH is not sent to one member.
    Flush,
    /// FUA is not set when parity is written.
    Parity,
}

/// What became of all.
#[derive(Debug, Default)]
struct Tally {
    cuts: u64,
    aimed: u64,
    /// Aimed, and frozen there.
    hit: BTreeMap<Point, u64>,
    missed: u64,
    lost: u64,
    lost_rebuilding: u64,
    /// Checks that found everything as it must be.
    checked: u64,
    forced: u64,
    refused: u64,
    firm: u64,
    hole: u64,
    sectors: u64,
    fates: Count,
    boots: u64,
}

/// Runs as `args` say. Returns the exit code.
pub fn main(args: &[String]) -> i32 {
    end_in_order();
    if args == ["--self-test"] {
        return selftest::main();
    }
    let Some(options) = parse(args) else {
        eprintln!(
            "usage: lunar-cuts [--cuts N] [--seed S] [--set N] [--level L] [--plant flush|parity [--built-in]] [--keep] [--verbose]\n       lunar-cuts --self-test"
        );
        return 2;
    };
    let started = Instant::now();
    let mut tally = Tally::default();
    let sets = options.cuts.div_ceil(CUTS_A_SET).max(LEVELS.len() as u64);
    let per_set = options.cuts.div_ceil(sets);
    let mut failures = 0;
    for set in (0..sets).filter(|set| options.set.is_none_or(|only| only == *set)) {
        let mut run = match Set::new(&options, set, per_set) {
            Ok(run) => run,
            Err(why) => {
                println!("cuts: set {set}: {why}");
                return 1;
            }
        };
        let name = format!("cuts_lose_nothing_{}_{set}", run.level);
        let ended = run.all(&mut tally);
        match (&ended, options.plant) {
            (Ok(()), None) => println!("test {name} ... ok"),
            (Err(why), None) => {
                println!("{why}\n{}", run.repeat());
                println!("test {name} ... FAILED");
                failures += 1;
            }
            // Only what the bug does is a catch.
            (Err(why), Some(_)) if !guest::is_loss(why) => {
                println!("{why}\n{}", run.repeat());
                println!("test {name} ... FAILED");
                return 1;
            }
            (Err(why), Some(_)) => {
                println!(
                    "caught at cut {} of set {set}: {}",
                    run.cut,
                    first_line(why)
                );
                failures += 1;
                break;
            }
            (Ok(()), Some(_)) => {}
        }
    }
    tell(&tally, started);
    // A run that is long enough has frozen everywhere.
    if options.cuts >= 100 && options.set.is_none() && options.level.is_none() && failures == 0 {
        let never = POINTS
            .iter()
            .filter(|(point, _)| !tally.hit.contains_key(point));
        let never: Vec<_> = never.map(|(_, name)| *name).collect();
        let result = if never.is_empty() { "ok" } else { "FAILED" };
        if !never.is_empty() {
            println!("never frozen at {never:?}");
            failures += 1;
        }
        println!("test cuts_freeze_at_every_point ... {result}");
    }
    match options.plant {
        None => i32::from(failures != 0),
        // A bug that nobody found is the failure.
        Some(plant) => {
            let name = match plant {
                Plant::Flush => "cuts_find_a_member_without_flush",
                Plant::Parity => "cuts_find_parity_without_fua",
            };
            let result = if failures == 0 { "FAILED" } else { "ok" };
            println!("test {name} ... {result}");
            i32::from(failures == 0)
        }
    }
}

/// Where folders of runs are made: in memory, where there is such a place.
fn base() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() {
        memory
    } else {
        std::env::temp_dir()
    }
}

/// Makes a folder of this run, with `disks` and `share` in it.
pub(super) fn folder(name: &str) -> Result<PathBuf, Failure> {
    let dir = base().join(format!("lunar-cuts.{}.{name}", std::process::id()));
    for part in ["disks", "share"] {
        let made = fs::create_dir_all(dir.join(part));
        made.map_err(|error| format!("{}: {error}", dir.display()))?;
    }
    Ok(dir)
}

/// Removes the folders of this run, or of runs that were killed.
fn remove_folders(own: bool) {
    for entry in fs::read_dir(base()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let pid = name
            .strip_prefix("lunar-cuts.")
            .and_then(|rest| rest.split('.').next());
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else {
            continue;
        };
        let is_gone = !Path::new("/proc").join(pid.to_string()).exists();
        if (own && pid == std::process::id()) || (!own && is_gone) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Told to end, it leaves nothing: the machine ends with this program, and the folders are removed.
fn end_in_order() {
    remove_folders(false);
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    // What is started later begins with no signal blocked, by the standard library's own care.
    if signals.thread_block().is_ok() {
        std::thread::spawn(move || {
            let signal = signals.wait().map_or(0, |signal| signal as i32);
            remove_folders(true);
            std::process::exit(128 + signal);
        });
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

fn parse(args: &[String]) -> Option<Options> {
    let mut options = Options {
        cuts: 12,
        seed: 1,
        set: None,
        level: None,
        plant: None,
        is_built_in: false,
        keep: false,
        verbose: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--cuts" => options.cuts = args.next()?.parse().ok().filter(|cuts| *cuts > 0)?,
            "--seed" => options.seed = args.next()?.parse().ok()?,
            "--set" => options.set = Some(args.next()?.parse().ok()?),
            "--level" => {
                let name = args.next()?;
                options.level = Some(LEVELS.iter().find(|level| **level == *name)?);
            }
            "--plant" => {
                options.plant = Some(match args.next()?.as_str() {
                    "flush" => Plant::Flush,
                    "parity" => Plant::Parity,
                    _ => return None,
                });
            }
            "--built-in" => options.is_built_in = true,
            "--keep" => options.keep = true,
            "--verbose" => options.verbose = true,
            _ => return None,
        }
    }
    Some(options)
}

fn tell(tally: &Tally, started: Instant) {
    println!(
        "{} cuts in {} boots, {:.1} min; {} aimed ({} did not come by); {} with a member lost, {} of them being rebuilt",
        tally.cuts,
        tally.boots,
        started.elapsed().as_secs_f64() / 60.0,
        tally.aimed,
        tally.missed,
        tally.lost,
        tally.lost_rebuilding
    );
    println!(
        "{} checks of {} sectors found all as it must be; {} starts refused with their reason, {} forced; {} sectors spoilt that may be (the \
         write hole; law 6); {} times in sync and scrubbed",
        tally.checked, tally.sectors, tally.refused, tally.forced, tally.hole, tally.firm
    );
    let Count {
        kept,
        dropped,
        torn,
    } = tally.fates;
    println!("unflushed writes: {kept} kept, {dropped} dropped, {torn} torn");
    let hits = POINTS.iter().filter_map(|(point, name)| {
        let count = tally.hit.get(point)?;
        Some(format!("{name} {count}"))
    });
    println!("frozen at: {}", hits.collect::<Vec<_>>().join(", "));
}

/// A set of disks, and its cuts.
struct Set {
    options: Options,
    set: u64,
    cuts: u64,
    seed: u64,
    random: Random,
    level: &'static str,
    policy: &'static str,
    members: usize,
    chunk_kib: u64,
    assume_clean: bool,
    dir: PathBuf,
    /// Taken away before its folder.
    server: Option<Server>,
    boot: u64,
    /// The cut that is next, or was last.
    cut: u64,
    /// The disk that is away.
    away: Option<usize>,
    /// The group was, or may have become, less than optimal.
    may_refuse: bool,
    /// Refused once already: the disk that is away would not help.
    must_force: bool,
    /// State and disk of each slot, as the guest said last.
    slots: Vec<(String, Option<usize>)>,
    /// Losses that were due when no member could go.
    owed: u64,
    /// Stages of this boot that were looked at.
    looked_at: usize,
    /// The disks, and what was done to them, for whoever repeats it.
    history: Vec<String>,
}

/// How a boot ended.
enum Ended {
    Cut {
        aim: Option<(Aim, bool)>,
    },
    /// It was not started without force, said so, and ended.
    Refused,
    Done,
}

impl Set {
    fn new(options: &Options, set: u64, cuts: u64) -> Result<Self, Failure> {
        let seed = mix(options.seed ^ mix(set));
        let mut random = Random::new(seed);
        let turn = usize::try_from(set).expect("small") % LEVELS.len();
        let level = match options.plant {
            Some(Plant::Parity) => "raid5",
            Some(Plant::Flush) | None => LEVELS[turn],
        };
        let level = options.level.unwrap_or(level);
        let members = match level {
            "raid1" => 2 + usize::from(random.percent(30)),
            "raid5" => 3 + usize::from(random.percent(60)),
            "raid6" => 4 + usize::from(random.percent(40)),
            _ => 4,
        };
        // Mostly the default; planted bugs are about that.
        let all = policies(level);
        let policy = match options.plant {
            None if random.percent(35) => *random.pick(&all[1..]),
            _ => all[0],
        };
        let dir = folder(&set.to_string())?;
        let said = |error: std::io::Error| format!("{}: {error}", dir.display());
        let mut sizes = vec![MEMBER_BYTES; members + 2];
        sizes[0] = STATE_BYTES;
        let server = Server::start(&dir.join("disks"), &sizes).map_err(said)?;
        Ok(Self {
            options: options.clone(),
            set,
            cuts,
            seed,
            level,
            policy,
            members,
            chunk_kib: *random.pick(&[16, 64, 64, 128]),
            // What the first sync writes is not what a planted bug is about.
            assume_clean: random.percent(60) || options.plant.is_some(),
            random,
            dir,
            server: Some(server),
            boot: 0,
            cut: 0,
            away: None,
            may_refuse: false,
            must_force: false,
            slots: Vec::new(),
            owed: 0,
            looked_at: 0,
            history: Vec::new(),
        })
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("only a drop takes it")
    }

    fn share(&self) -> PathBuf {
        self.dir.join("share")
    }

    fn note(&mut self, text: String) {
        if self.options.verbose {
            println!("{text}");
        }
        self.history.push(text);
    }

    /// What to type for this set once more.
    fn repeat(&self) -> String {
        let plant = match self.options.plant {
            Some(Plant::Flush) => " --plant flush",
            Some(Plant::Parity) => " --plant parity",
            None => "",
        };
        format!(
            "{}\nonce more: lunar-cuts --cuts {} --seed {} --set {}{plant}",
            self.history.join("\n"),
            self.options.cuts,
            self.options.seed,
            self.set
        )
    }

    /// All its cuts, and an end in order.
    fn all(&mut self, tally: &mut Tally) -> Result<(), Failure> {
        let (level, members, chunk) = (self.level, self.members, self.chunk_kib);
        self.note(format!(
            "set {}: seed {:x}, {level} of {members}, {}, chunk {chunk} KiB, first sync: {}",
            self.set, self.seed, self.policy, !self.assume_clean
        ));
        let done = self.run(tally);
        if let Err(why) = &done {
            let console = fs::read_to_string(self.dir.join("console")).unwrap_or_default();
            let lines: Vec<_> = console.lines().rev().take(12).collect();
            let tail: Vec<_> = lines.into_iter().rev().collect();
            return Err(format!("{why}\nconsole: {}", tail.join("\n  ")));
        }
        done
    }

    fn run(&mut self, tally: &mut Tally) -> Result<(), Failure> {
        while self.cut < self.cuts {
            let aim = self.draw_aim();
            let mut job = self.draw_job(false);
            job.admin |= aim.is_some_and(|aim| aim.point == Point::ConfigWritten);
            let ended = self.boot_once(&job, aim, tally)?;
            self.power_off(ended, tally)?;
        }
        // In the end everything comes back in order, with all disks.
        for _ in 0..3 {
            // Nobody has its place yet if it went with the last cut.
            let empty = self.away.is_some_and(|away| !self.has_slot(away));
            self.come_back(empty)?;
            let mut job = self.draw_job(true);
            job.force = self.must_force || self.away.is_none();
            let ended = self.boot_once(&job, None, tally)?;
            let refused = matches!(ended, Ended::Refused);
            self.power_off(ended, tally)?;
            if !refused {
                return Ok(());
            }
        }
        Err("it is refused again and again".to_owned())
    }

    /// Every second cut has an aim.
    fn draw_aim(&mut self) -> Option<Aim> {
        if self.cut.is_multiple_of(2) {
            return None;
        }
        let turn = self.cut / 2 + self.set * (CUTS_A_SET / 2) / 2 + self.set;
        let has = Reach {
            parity: matches!(self.level, "raid5" | "raid6"),
            log: matches!(self.policy, "ppl" | "journal"),
            map: self.policy == "bitmap",
            missed: self.slots.iter().any(|(state, _)| state != "in_sync"),
            rebuild: self.away.is_some()
                || self.slots.iter().any(|(state, _)| state == "rebuilding"),
        };
        Some(Aim::draw(&mut self.random, turn, self.boot == 0, has))
    }

    fn draw_job(&mut self, last: bool) -> Job {
        let there = (1..=self.members + 1).filter(|disk| Some(*disk) != self.away);
        let there = there.collect();
        let force = self.must_force || self.random.percent(60);
        Job {
            run: self.seed,
            boot: self.boot,
            seed: self.random.draw(),
            level: self.level,
            policy: self.policy,
            members: self.members,
            chunk_kib: self.chunk_kib,
            there,
            assume_clean: self.assume_clean,
            ways: match self.options.plant {
                Some(Plant::Flush) => Ways::FlushOnly,
                Some(Plant::Parity) => Ways::FuaOnly,
                None => *self.random.pick(&[
                    Ways::Mixed,
                    Ways::Lazy,
                    Ways::Lazy,
                    Ways::FlushOnly,
                    Ways::FuaOnly,
                ]),
            },
            force: force || self.options.plant.is_some(),
            // A group that is rebuilding can lose nothing but what is not there yet.
            firm: self.random.percent(35) || self.options.plant == Some(Plant::Parity),
            admin: self.random.percent(40),
            in_file: self.options.plant == Some(Plant::Parity),
            last,
        }
    }

    /// Boots, lets it work, and kills it at the drawn moment.
    fn boot_once(
        &mut self,
        job: &Job,
        aim: Option<Aim>,
        tally: &mut Tally,
    ) -> Result<Ended, Failure> {
        job.write(&self.share())
            .map_err(|error| error.to_string())?;
        tally.boots += 1;
        let from_boot = aim.is_some_and(Aim::is_of_start);
        // A quarter of the others are cut while they come up.
        let early = (job.boot > 0 && aim.is_none() && self.random.percent(25))
            .then(|| self.random.below(6000));
        let load_ms = 200 + self.random.below(2500);
        if from_boot {
            self.set_trap(aim);
        }
        let exe = std::env::current_exe().map_err(|error| error.to_string())?;
        let (exe, share) = (
            exe.display().to_string(),
            self.share().display().to_string(),
        );
        let mut machine = Machine::boot(&self.dir, &[&exe, "guest", &share])?;
        if let (Some(early), false) = (early, job.last) {
            let mut left = early;
            while left > 0 && machine.is_up()? {
                pause(left.min(20));
                left -= left.min(20);
            }
        } else {
            let wanted = if job.last { "done" } else { "load" };
            let frozen = from_boot;
            self.wait_stage(&mut machine, job, wanted, frozen)?;
        }
        self.look_at(job, tally)?;
        if let Some(stage) = self.stage(job, "done") {
            machine.wait_end()?;
            let refused =
                self.stage(job, "refused").is_some() && self.stage(job, "checked").is_none();
            drop(stage);
            return Ok(if refused { Ended::Refused } else { Ended::Done });
        }
        let mut hit = false;
        if aim.is_some() && !from_boot {
            self.set_trap(aim);
        }
        if job.boot == 0 && !self.options.is_built_in {
            self.plant();
        }
        if aim.is_some() {
            hit = self.server().wait_frozen(Duration::from_secs(6));
        } else if early.is_none() {
            pause(load_ms);
        }
        if let Some(failed) = self.stage(job, "failed") {
            return Err(text(&failed["why"]) + "\n" + &text(&failed["log"]));
        }
        machine.cut()?;
        self.check_console()?;
        // What it said in its last moments.
        self.look_at(job, tally)?;
        Ok(Ended::Cut {
            aim: aim.map(|aim| (aim, hit)),
        })
    }

    /// No kernel may have warned.
    fn check_console(&self) -> Result<(), Failure> {
        const FINDINGS: [&str; 6] = [
            "WARNING:",
            "BUG:",
            "Oops",
            "blocked for more than",
            "general protection",
            "Kernel panic",
        ];
        let console = fs::read(self.dir.join("console")).unwrap_or_default();
        let text = String::from_utf8_lossy(&console);
        let found = text
            .lines()
            .find(|line| FINDINGS.iter().any(|one| line.contains(one)));
        found.map_or(Ok(()), |line| Err(format!("the kernel warned: {line}")))
    }

    fn set_trap(&self, aim: Option<Aim>) {
        let disks: Vec<usize> = (1..=self.members + 1).collect();
        let members = Members::read(self.server(), &disks, MEMBER_BYTES);
        let trap = aim.map(|aim| aim.trap(members, MEMBER_BYTES));
        self.server().set_trap(trap);
    }

    fn plant(&self) {
        let Some(plant) = self.options.plant else {
            return;
        };
        let disks: Vec<usize> = (1..=self.members).collect();
        let members = Members::read(self.server(), &disks, MEMBER_BYTES);
        self.server().plant(Some(match plant {
            Plant::Flush => Box::new(move |disk, at| disk == 2 && members.is_data(disk, at)),
            Plant::Parity => Box::new(move |disk, at| members.is_parity(disk, at)),
        }));
    }

    fn stage(&self, job: &Job, name: &str) -> Option<Value> {
        let stages = job::stages(&self.share(), job.boot);
        stages
            .into_iter()
            .rev()
            .find(|stage| stage["stage"] == name)
    }

    /// Waits until the guest is so far, or has ended; or until the trap has closed, if one is set.
    fn wait_stage(
        &self,
        machine: &mut Machine,
        job: &Job,
        wanted: &str,
        frozen: bool,
    ) -> Result<(), Failure> {
        let limit = Instant::now() + Duration::from_secs(BOOT_LIMIT);
        loop {
            let up = machine.is_up()?;
            if let Some(failed) = self.stage(job, "failed") {
                return Err(text(&failed["why"]) + "\n" + &text(&failed["log"]));
            }
            let refused = self.stage(job, "refused").is_some() && !job.force;
            if self.stage(job, "done").is_some() || (!refused && self.stage(job, wanted).is_some())
            {
                return Ok(());
            }
            if !up {
                return Err("the machine ended by itself".to_owned());
            }
            if frozen && self.server().wait_frozen(Duration::from_millis(20)) {
                return Ok(());
            }
            if Instant::now() > limit {
                let stages = job::stages(&self.share(), job.boot);
                return Err(format!("no {wanted} in {BOOT_LIMIT} s: {stages:?}"));
            }
            pause(20);
        }
    }

    /// Takes in what the guest said.
    fn look_at(&mut self, job: &Job, tally: &mut Tally) -> Result<(), Failure> {
        let stages = job::stages(&self.share(), job.boot);
        let new = stages
            .iter()
            .skip(self.looked_at)
            .cloned()
            .collect::<Vec<_>>();
        self.looked_at = stages.len();
        for stage in new {
            match stage["stage"].as_str().unwrap_or_default() {
                "group" => {
                    let members = stage["members"].as_array().cloned().unwrap_or_default();
                    self.slots = members
                        .iter()
                        .map(|member| {
                            let disk = member["disk"].as_u64();
                            (
                                text(&member["state"]),
                                disk.and_then(|disk| usize::try_from(disk).ok()),
                            )
                        })
                        .collect();
                    match stage["state"].as_str() {
                        Some("optimal") => {
                            self.may_refuse = self.away.is_some_and(|away| self.has_slot(away));
                        }
                        Some("stopped") => {}
                        _ => self.may_refuse = true,
                    }
                }
                "refused" => {
                    let reason = text(&stage["reason"]);
                    if !self.may_refuse {
                        return Err(format!(
                            "refused, with all members there and in sync: {reason}"
                        ));
                    }
                    tally.refused += 1;
                    self.note(format!("  boot {}: refused: {reason}", job.boot));
                }
                "checked" => {
                    tally.checked += 1;
                    tally.sectors += stage["sectors"].as_u64().unwrap_or_default();
                    tally.hole += stage["hole"].as_u64().unwrap_or_default();
                    if stage["forced"] == true {
                        tally.forced += 1;
                    }
                    self.must_force = false;
                }
                "firm" => tally.firm += 1,
                _ => {}
            }
        }
        Ok(())
    }

    fn has_slot(&self, disk: usize) -> bool {
        self.slots.iter().any(|(_, of)| *of == Some(disk))
    }

    /// The disks decide what they keep; one may be lost, one may come back.
    fn power_off(&mut self, ended: Ended, tally: &mut Tally) -> Result<(), Failure> {
        let seed = self.random.draw();
        let counts = self
            .server()
            .cut(seed, None)
            .map_err(|error| error.to_string())?;
        self.boot += 1;
        self.looked_at = 0;
        let aim = match ended {
            Ended::Done => return Ok(()),
            Ended::Refused => {
                if self.away.is_none() || self.must_force {
                    self.must_force = true;
                } else {
                    // It says to connect the missing disk.
                    self.must_force = true;
                    self.come_back(false)?;
                }
                return Ok(());
            }
            Ended::Cut { aim } => aim,
        };
        tally.cuts += 1;
        for (_, count) in &counts {
            tally.fates += *count;
        }
        let how = match aim {
            None => "by time".to_owned(),
            Some((aim, true)) => format!("frozen at {} #{}", aim.name(), aim.nth),
            Some((aim, false)) => format!("not come by {} #{}", aim.name(), aim.nth),
        };
        if let Some((aim, hit)) = aim {
            tally.aimed += 1;
            tally.missed += u64::from(!hit);
            if hit {
                *tally.hit.entry(aim.point).or_default() += 1;
            }
        }
        let fates: Vec<String> = counts.iter().map(|(fate, _)| format!("{fate:?}")).collect();
        let (cut, boot) = (self.cut, self.boot - 1);
        self.note(format!(
            "  cut {cut} (boot {boot}, seed {seed:x}) {how}; {}",
            fates.join(" ")
        ));
        let loses = self.loses();
        self.cut += 1;
        if loses {
            self.lose(tally)?;
        } else if self.away.is_some() && !self.may_refuse && self.random.percent(60) {
            let empty = self.random.percent(50);
            self.come_back(empty)?;
        }
        Ok(())
    }

    /// Three of ten cuts take a member away; of a short set one.
    fn loses(&self) -> bool {
        match self.options.plant {
            Some(Plant::Parity) => true,
            Some(Plant::Flush) => false,
            None if self.cuts < 5 => self.cut == self.set % self.cuts.min(2),
            None => self.owed > 0 || matches!(self.cut % 10, 1 | 4 | 7),
        }
    }

    /// Takes away a member that the group can do without: the one that is being filled, or any.
    fn lose(&mut self, tally: &mut Tally) -> Result<(), Failure> {
        let filled: Vec<usize> = self
            .slots
            .iter()
            .filter(|(state, _)| state == "rebuilding")
            .filter_map(|(_, disk)| *disk)
            .collect();
        let all: Vec<usize> = self.slots.iter().filter_map(|(_, disk)| *disk).collect();
        let candidates = if self.may_refuse { &filled } else { &all };
        let candidates: Vec<usize> = candidates
            .iter()
            .copied()
            .filter(|disk| Some(*disk) != self.away)
            .collect();
        if candidates.is_empty() {
            self.owed += u64::from(matches!(self.cut.wrapping_sub(1) % 10, 1 | 4 | 7));
            self.note("  no member to lose: it is degraded already".to_owned());
            return Ok(());
        }
        self.come_back(true)?;
        let disk = *self.random.pick(&candidates);
        self.server()
            .lose(disk)
            .map_err(|error| error.to_string())?;
        self.away = Some(disk);
        let was_due = matches!(self.cut.wrapping_sub(1) % 10, 1 | 4 | 7);
        self.owed -= u64::from(!was_due).min(self.owed);
        tally.lost += 1;
        tally.lost_rebuilding += u64::from(filled.contains(&disk));
        self.may_refuse = true;
        self.must_force = false;
        let device = guest::device(disk);
        self.note(format!("  lost {device}, filled: {filled:?}"));
        Ok(())
    }

    fn come_back(&mut self, empty: bool) -> Result<(), Failure> {
        let Some(disk) = self.away.take() else {
            return Ok(());
        };
        self.note(format!(
            "  back: {}{}",
            guest::device(disk),
            if empty { ", empty" } else { "" }
        ));
        self.server()
            .bring_back(disk, empty)
            .map_err(|error| error.to_string())
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        if self.options.keep {
            // Its files too.
            std::mem::forget(self.server.take());
            println!("kept: {}", self.dir.display());
        } else {
            self.server = None;
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// A running machine. Dropping it cuts its power.
pub(super) struct Machine {
    lab: Child,
}

impl Machine {
    /// Boots with the disks in `dir/disks` and `dir/share` to talk by, and runs a command.
    pub(super) fn boot(dir: &Path, command: &[&str]) -> Result<Self, Failure> {
        let log = fs::File::create(dir.join("log")).map_err(|error| error.to_string())?;
        let err = log.try_clone().map_err(|error| error.to_string())?;
        let share = dir.join("share");
        // SIGKILL of this program ends the machine too.
        let lab = Command::new("setpriv")
            .args(["--pdeathsig", "TERM", "fixtures/lab.sh"])
            .args(["--timeout", &(BOOT_LIMIT + 30).to_string(), "--mem", "1G"])
            .arg("--served")
            .arg(dir.join("disks"))
            .arg("--share")
            .arg(&share)
            .arg("--keep-console")
            .arg(dir.join("console"))
            .arg("--")
            .args(command)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(err)
            .spawn()
            .map_err(|error| format!("fixtures/lab.sh: {error}"))?;
        Ok(Self { lab })
    }

    pub(super) fn is_up(&mut self) -> Result<bool, Failure> {
        let status = self.lab.try_wait().map_err(|error| error.to_string())?;
        Ok(status.is_none())
    }

    fn wait_end(&mut self) -> Result<(), Failure> {
        let status = self.lab.wait().map_err(|error| error.to_string())?;
        if status.success() {
            Ok(())
        } else {
            Err(format!("lab.sh: {status}"))
        }
    }

    /// SIGTERM: `lab.sh` kills the kernel with all its processes.
    pub(super) fn cut(&mut self) -> Result<(), Failure> {
        let pid = i32::try_from(self.lab.id()).map_err(|error| error.to_string())?;
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        self.lab.wait().map_err(|error| error.to_string())?;
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.cut();
    }
}
