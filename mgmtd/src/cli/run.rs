//! Turns what was typed into a request, and the answer into lines.

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use lunar_api::mgmt::{self, EventsAsk, JobOne, Nothing, One, Request, ScrubAsk, StatusAsk};
use lunar_api::rows::{
    Changed, DiskList, DiskOne, DoctorReply, EventsReply, GroupList, GroupOne, JobList,
    JobOneReply, JobState, LocateReply, LuList, LuOne, MetricsReply, Outcome, PathList,
    ReportReply, StatusReply,
};
use lunar_api::{ApiError, ErrorKind};
use serde_json::{Value, json};

use crate::args::{Args, Disk, Group, Job, Lu, NewSize, Noun, PathVerb, Table};
use crate::client::Client;
use crate::{manual, show, stat, zeroing};

/// Does what was typed and gives the exit code.
pub(crate) fn run(args: &Args) -> Result<u8, ApiError> {
    match &args.noun {
        Noun::Doctor { all } => return doctor(args, *all),
        Noun::Completions { shell } => return manual::completions(*shell).map(|()| 0),
        Noun::Man { out } => return manual::write_pages(out).map(|()| 0),
        _ => {}
    }
    let mut client = Client::connect(args)?;
    let c = &mut client;
    match &args.noun {
        Noun::Status { unhealthy, watch } => status(args, c, *unhealthy, *watch),
        Noun::Events { test: true, .. } => {
            let (dry_run, yes) = flags(args);
            let ask = |yes| Request::EventsTest(mgmt::EventsTestAsk { dry_run, yes });
            change(args, c, "events.test", ask, yes)
        }
        Noun::Events { follow, .. } => events(args, c, *follow),
        Noun::Table { name } => match name {
            Table::Disks => disks(args, c, "table.disks"),
            Table::RaidGroups => groups(args, c, "table.raid_groups"),
            Table::Lus => lus(args, c, "table.lus"),
            Table::Paths => paths(args, c, "table.paths"),
        },
        Noun::Job { verb } => job(args, c, verb),
        Noun::Disk { verb } => disk(args, c, verb),
        Noun::Group { verb } => group(args, c, verb),
        Noun::Lu { verb } => lu(args, c, verb),
        Noun::Path {
            verb: PathVerb::List,
        } => paths(args, c, "path.list"),
        Noun::Import { .. } | Noun::Config { .. } => crate::import::run(args, c),
        Noun::Shutdown => {
            let (dry_run, yes) = flags(args);
            let ask = |yes| Request::Shutdown(mgmt::ShutdownAsk { dry_run, yes });
            change(args, c, "shutdown", ask, yes)
        }
        Noun::Upgrade { check, to } => crate::upgrade::run(args, c, *check, to.as_deref()),
        Noun::Metrics => {
            let reply: MetricsReply = c.call(&Request::Metrics(Nothing {}))?;
            print(args, "metrics", &reply, || reply.text.clone());
            Ok(0)
        }
        Noun::Report => {
            let reply: ReportReply = c.call(&Request::Report(Nothing {}))?;
            print(args, "report", &reply, || reply.text.clone());
            Ok(0)
        }
        Noun::Stat { interval, count } => stat::stat(args, c, *interval, *count),
        Noun::Completions { .. } | Noun::Man { .. } | Noun::Doctor { .. } => Ok(0),
    }
}

pub(crate) fn flags(args: &Args) -> (bool, bool) {
    (args.dry_run, args.yes)
}

/// The checks of mgmtd; those that need no mgmtd when it cannot be reached.
fn doctor(args: &Args, all: bool) -> Result<u8, ApiError> {
    let asked = Client::connect(args).and_then(|mut c| c.call(&Request::Doctor(Nothing {})));
    let reply: DoctorReply = match asked {
        Err(error) if error.kind == ErrorKind::Unreachable => {
            let base = args.system.map_or(String::new(), |n| format!("/{n}"));
            let (state, run) = (format!("/var/lib/lunar{base}"), format!("/run/lunar{base}"));
            let mut checks = mgmtd::doctor::machine(Path::new(&state), Path::new(&run));
            checks.push(lunar_api::rows::CheckRow {
                check: "mgmtd".into(),
                state: lunar_api::rows::CheckState::Fail,
                text: format!("{}: {}", error.message, error.causes.join(", ")),
                action: error.hint.unwrap_or_default(),
            });
            DoctorReply { exit: 1, checks }
        }
        other => other?,
    };
    print(args, "doctor", &reply.checks, || {
        show::checks(&reply.checks, all)
    });
    Ok(reply.exit)
}

/// Prints the envelope of `--json`, or what `text` gives.
pub(crate) fn print(
    args: &Args,
    name: &str,
    data: impl serde::Serialize,
    text: impl FnOnce() -> String,
) {
    if args.json {
        println!(
            "{}",
            json!({"schema": format!("lunar.{name}/1"), "data": data})
        );
    } else {
        print!("{}", text());
    }
}

fn status(args: &Args, client: &mut Client, unhealthy: bool, watch: bool) -> Result<u8, ApiError> {
    loop {
        let reply: StatusReply = client.call(&Request::Status(StatusAsk { unhealthy }))?;
        if watch && !args.json && std::io::stdout().is_terminal() {
            print!("\x1b[H\x1b[2J");
        }
        print(args, "status", &reply.status, || reply.text.clone());
        let _ = std::io::stdout().flush();
        if !watch {
            return Ok(reply.exit);
        }
        // Sleeps on the daemon's clock: it wakes us early when something happens.
        let newest: EventsReply = client.call(&Request::Events(EventsAsk {
            after: 0,
            wait_ms: 0,
        }))?;
        let after = newest.events.last().map_or(0, |e| e.event);
        let _: EventsReply = client.call(&Request::Events(EventsAsk {
            after,
            wait_ms: 2000,
        }))?;
    }
}

fn events(args: &Args, client: &mut Client, follow: bool) -> Result<u8, ApiError> {
    let mut after = 0;
    let mut all = Vec::new();
    loop {
        let wait_ms = if follow { 10_000 } else { 0 };
        let reply: EventsReply = client.call(&Request::Events(EventsAsk { after, wait_ms }))?;
        if let Some(last) = reply.events.last() {
            after = last.event;
        }
        let ended = reply.events.is_empty() && !follow;
        for event in reply.events {
            match (args.json, follow) {
                (true, true) => print(args, "event", &event, String::new),
                (true, false) => all.push(event),
                (false, _) => println!("{}", show::event(&event)),
            }
        }
        let _ = std::io::stdout().flush();
        if ended {
            if args.json {
                print(args, "events", &all, String::new);
            }
            return Ok(0);
        }
    }
}

fn job(args: &Args, client: &mut Client, verb: &Job) -> Result<u8, ApiError> {
    match verb {
        Job::List => {
            let reply: JobList = client.call(&Request::JobList(Nothing {}))?;
            print(args, "job.list", &reply.jobs, || show::jobs(&reply.jobs));
            Ok(0)
        }
        Job::Watch { job } => watch(args, client, *job),
        Job::Cancel { job } => {
            let (dry_run, job) = (args.dry_run, *job);
            let ask = |yes| Request::JobCancel(mgmt::JobEnd { job, dry_run, yes });
            change(args, client, "job.cancel", ask, args.yes)
        }
    }
}

/// Follows a job: a bar on a terminal, else a line each 10 s. Ctrl-C just ends us.
fn watch(args: &Args, client: &mut Client, job: u32) -> Result<u8, ApiError> {
    let mut bar = None;
    let mut turns = 0;
    loop {
        let row = client
            .call::<JobOneReply>(&Request::JobShow(JobOne { job }))?
            .job;
        if row.ended.is_some() {
            if let Some(bar) = bar {
                indicatif::ProgressBar::finish_and_clear(&bar);
            }
            print(args, "job.watch", &row, || {
                format!("{}\n", show::job_line(&row))
            });
            let is_well = row.state == JobState::Done && row.reason.is_empty();
            return Ok(if is_well { 0 } else { 1 });
        }
        if std::io::stderr().is_terminal() && !args.json {
            let bar = bar.get_or_insert_with(|| show::bar(&row));
            bar.set_length(row.total);
            bar.set_position(row.done);
        } else if turns % 10 == 0 {
            eprintln!("{}", show::job_line(&row));
        }
        turns += 1;
        let newest: EventsReply = client.call(&Request::Events(EventsAsk {
            after: u64::MAX,
            wait_ms: 1000,
        }))?;
        drop(newest);
    }
}

fn disks(args: &Args, client: &mut Client, name: &str) -> Result<u8, ApiError> {
    let reply: DiskList = client.call(&Request::DiskList(Nothing {}))?;
    print(args, name, &reply.disks, || show::disks(&reply.disks));
    Ok(0)
}

fn groups(args: &Args, client: &mut Client, name: &str) -> Result<u8, ApiError> {
    let reply: GroupList = client.call(&Request::GroupList(Nothing {}))?;
    print(args, name, &reply.groups, || show::groups(&reply.groups));
    Ok(0)
}

fn lus(args: &Args, client: &mut Client, name: &str) -> Result<u8, ApiError> {
    let reply: LuList = client.call(&Request::LuList(Nothing {}))?;
    print(args, name, &reply.lus, || show::lus(&reply.lus));
    Ok(0)
}

fn paths(args: &Args, client: &mut Client, name: &str) -> Result<u8, ApiError> {
    let reply: PathList = client.call(&Request::PathList(Nothing {}))?;
    print(args, name, &reply.paths, || show::paths(&reply.paths));
    Ok(0)
}

fn one(name: &str) -> One {
    One {
        name: absolute(name),
    }
}

/// A path is made absolute here: the daemon has another working directory. Of a list (`1,./x`) each word for itself.
fn absolute(name: &str) -> String {
    let one = |word: &str| {
        if word.contains('/') {
            absolute_path(Path::new(word))
        } else {
            word.to_string()
        }
    };
    name.split(',').map(one).collect::<Vec<_>>().join(",")
}

pub(crate) fn absolute_path(path: &Path) -> String {
    let whole = std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path));
    whole.display().to_string()
}

fn disk(args: &Args, client: &mut Client, verb: &Disk) -> Result<u8, ApiError> {
    let (dry_run, yes) = flags(args);
    match verb {
        Disk::List => disks(args, client, "disk.list"),
        Disk::Show { disk } => {
            let reply: DiskOne = client.call(&Request::DiskShow(one(disk)))?;
            print(args, "disk.show", &reply.disk, || show::object(&reply.disk));
            Ok(0)
        }
        Disk::Add {
            paths,
            role,
            force,
            as_new,
        } => {
            let paths: Vec<String> = paths.iter().map(|p| absolute_path(p)).collect();
            let (role, force, as_new) = ((*role).into(), force.clone(), *as_new);
            let ask = |yes| {
                let (paths, force) = (paths.clone(), force.clone());
                Request::DiskAdd(mgmt::DiskAdd {
                    paths,
                    role,
                    force,
                    as_new,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "disk.add", ask, yes)
        }
        Disk::Locate { disks, off } => {
            let request = Request::DiskLocate(mgmt::DiskLocate {
                disks: disks.iter().map(|d| absolute(d)).collect(),
                off: *off,
                dry_run,
                yes,
            });
            let reply: LocateReply = client.call(&request)?;
            print(args, "disk.locate", &reply, || show::locate(&reply));
            Ok(0)
        }
        Disk::Fail { disk } => {
            let ask = |yes| {
                Request::DiskFail(mgmt::DiskFail {
                    disk: absolute(disk),
                    dry_run,
                    yes,
                })
            };
            change(args, client, "disk.fail", ask, yes)
        }
        Disk::Replace { old, new, full } => {
            let ask = |yes| {
                let (old, new) = (absolute(old), new.as_deref().map(absolute));
                Request::DiskReplace(mgmt::DiskReplace {
                    old,
                    new,
                    full: *full,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "disk.replace", ask, yes)
        }
        Disk::Remove { disks, wipe } => {
            let ask = |yes| {
                let disks = disks.iter().map(|d| absolute(d)).collect();
                Request::DiskRemove(mgmt::DiskRemove {
                    disks,
                    wipe: *wipe,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "disk.remove", ask, yes)
        }
    }
}

fn group(args: &Args, client: &mut Client, verb: &Group) -> Result<u8, ApiError> {
    let (dry_run, yes) = flags(args);
    let end = |group: &String, yes| mgmt::GroupEnd {
        group: absolute(group),
        dry_run,
        yes,
    };
    match verb {
        Group::List => groups(args, client, "group.list"),
        Group::Show { group } => {
            let reply: GroupOne = client.call(&Request::GroupShow(one(group)))?;
            print(args, "group.show", &reply.group, || {
                show::object(&reply.group)
            });
            Ok(0)
        }
        Group::Create(create) => {
            let ask = |yes| {
                Request::GroupCreate(mgmt::GroupCreate {
                    name: create.name.clone(),
                    level: Some(create.level.into()),
                    disks: create.disks.iter().map(|d| absolute(d)).collect(),
                    chunk: create.chunk,
                    consistency: create.consistency.map(Into::into),
                    assume_clean: create.assume_clean,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "group.create", ask, yes)
        }
        Group::Set {
            group,
            rebuild_min,
            rebuild_max,
            read_errors_max,
        } => {
            let read_errors_max = *read_errors_max;
            let (group, rebuild_min, rebuild_max) = (absolute(group), *rebuild_min, *rebuild_max);
            let ask = |yes| {
                let group = group.clone();
                Request::GroupSet(mgmt::GroupSet {
                    group,
                    rebuild_min,
                    rebuild_max,
                    read_errors_max,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "group.set", ask, yes)
        }
        Group::Scrub(scrub) => {
            let order = match (scrub.pause, scrub.resume, scrub.cancel) {
                (true, _, _) => ScrubAsk::Pause,
                (_, true, _) => ScrubAsk::Resume,
                (_, _, true) => ScrubAsk::Cancel,
                _ => ScrubAsk::Start,
            };
            let ask = |yes| {
                Request::GroupScrub(mgmt::GroupScrub {
                    group: absolute(&scrub.group),
                    order,
                    repair: scrub.repair,
                    from: scrub.from,
                    rate: scrub.rate,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "group.scrub", ask, yes)
        }
        Group::Start {
            group,
            force,
            again,
        } => {
            let ask = |yes| {
                let (group, force, again) = (absolute(group), *force, *again);
                Request::GroupStart(mgmt::GroupStart {
                    group,
                    again,
                    force,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "group.start", ask, yes)
        }
        Group::Resolve { group, keep, force } => {
            let ask = |yes| {
                let (group, keep, force) = (group.clone(), absolute(keep), *force);
                Request::GroupResolve(mgmt::GroupResolve {
                    group,
                    keep,
                    force,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "group.resolve", ask, yes)
        }
        Group::Stop { group } => change(
            args,
            client,
            "group.stop",
            |yes| Request::GroupStop(end(group, yes)),
            yes,
        ),
        Group::Grow { group } => {
            let ask = |yes| {
                let group = absolute(group);
                Request::GroupGrow(mgmt::GroupEnd {
                    group,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "group.grow", ask, yes)
        }
        Group::Rename { group, to } => {
            let ask = |yes| Request::GroupRename(rename(group, to, dry_run, yes));
            change(args, client, "group.rename", ask, yes)
        }
        Group::Delete { group } => change(
            args,
            client,
            "group.delete",
            |yes| Request::GroupDelete(end(group, yes)),
            yes,
        ),
    }
}

fn rename(name: &str, to: &str, dry_run: bool, yes: bool) -> mgmt::Rename {
    mgmt::Rename {
        name: absolute(name),
        to: to.to_string(),
        dry_run,
        yes,
    }
}

fn lu(args: &Args, client: &mut Client, verb: &Lu) -> Result<u8, ApiError> {
    let (dry_run, yes) = flags(args);
    match verb {
        Lu::List => lus(args, client, "lu.list"),
        Lu::Show { lu } => {
            let reply: LuOne = client.call(&Request::LuShow(one(lu)))?;
            print(args, "lu.show", &reply.lu, || show::lu(&reply.lu));
            Ok(0)
        }
        Lu::Create {
            name,
            group,
            size,
            depth,
            queues,
            zero,
        } => {
            if *zero {
                client.wait_for_ever()?;
            }
            let ask = |yes| {
                let (name, group) = (name.clone(), absolute(group));
                let (size, depth, queues) = (Some(*size), *depth, *queues);
                let zero = *zero;
                Request::LuCreate(mgmt::LuCreate {
                    name,
                    group,
                    size,
                    depth,
                    queues,
                    zero,
                    dry_run,
                    yes,
                })
            };
            let shown = (*zero && !dry_run).then(|| zeroing::Shown::begin(args, name.clone()));
            let reply = decide(client, ask, yes);
            drop(shown);
            tell(args, client, "lu.create", reply?)
        }
        Lu::Rename { lu, to } => {
            let ask = |yes| Request::LuRename(rename(lu, to, dry_run, yes));
            change(args, client, "lu.rename", ask, yes)
        }
        Lu::Set { lu, queues } => {
            let ask = |yes| {
                Request::LuSet(mgmt::LuSet {
                    lu: absolute(lu),
                    queues: *queues,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "lu.set", ask, yes)
        }
        Lu::Resize { lu, size } => {
            let (size, more) = match *size {
                NewSize::Whole(size) => (Some(size), None),
                NewSize::More(more) => (None, Some(more)),
            };
            let ask = |yes| {
                let lu = absolute(lu);
                Request::LuResize(mgmt::LuResize {
                    lu,
                    size,
                    more,
                    dry_run,
                    yes,
                })
            };
            change(args, client, "lu.resize", ask, yes)
        }
        Lu::Delete { lus } => {
            let ask = |yes| {
                Request::LuDelete(mgmt::LuEnd {
                    lus: lus.iter().map(|lu| absolute(lu)).collect(),
                    dry_run,
                    yes,
                })
            };
            change(args, client, "lu.delete", ask, yes)
        }
    }
}

/// Sends a changing request; on a terminal what dies is shown first and its name has to be typed.
pub(crate) fn change(
    args: &Args,
    client: &mut Client,
    name: &str,
    ask: impl Fn(bool) -> Request,
    yes: bool,
) -> Result<u8, ApiError> {
    let reply = decide(client, ask, yes)?;
    tell(args, client, name, reply)
}

fn decide(
    client: &mut Client,
    ask: impl Fn(bool) -> Request,
    yes: bool,
) -> Result<Changed, ApiError> {
    let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
    let mut reply = client.call::<Changed>(&ask(yes));
    if let Err(error) = &reply
        && error.kind == ErrorKind::Refused
        && error.message == "refused: data would die"
        && terminal
        && !yes
    {
        let Some(word) = confirm_word(&ask(false)) else {
            return Err(error.clone());
        };
        confirm(error, &word)?;
        reply = client.call(&ask(true));
    }
    reply
}

/// Prints what was done, and follows its job where that is asked for.
fn tell(args: &Args, client: &mut Client, name: &str, mut reply: Changed) -> Result<u8, ApiError> {
    if name == "disk.replace" && reply.outcome == Outcome::Changed {
        if let Some(job) = reply.job {
            reply.text = vec![format!("job {job} started. Follow: lunar job watch {job}")];
        }
    } else if let (Some(job), false) = (reply.job, args.wait) {
        reply
            .text
            .push(format!("job {job} started. Follow: lunar job watch {job}"));
    }
    print(args, name, data(name, &reply), || show::changed(&reply));
    match reply.job {
        Some(job) if args.wait => watch(args, client, job),
        _ => Ok(0),
    }
}

/// The name that has to be typed: what the request is about, as it was typed in it.
fn confirm_word(request: &Request) -> Option<String> {
    let whole = serde_json::to_value(request).ok()?;
    let parameters = &whole["parameters"];
    let text = ["lu", "group"]
        .iter()
        .find_map(|key| parameters[key].as_str());
    let list = ["lus", "disks"]
        .iter()
        .find_map(|key| parameters[key].as_array());
    let list = list.map(|list| {
        list.iter()
            .filter_map(Value::as_str)
            .collect::<Vec<_>>()
            .join(" ")
    });
    text.map(String::from).or(list)
}

fn confirm(error: &ApiError, word: &str) -> Result<(), ApiError> {
    eprintln!("This dies:");
    error.causes.iter().for_each(|what| eprintln!("  {what}"));
    eprint!("Type {word} to go on: ");
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    if read.is_ok() && line.trim() == word {
        return Ok(());
    }
    Err(ApiError::new(ErrorKind::Refused, "nothing was done")
        .because(format!("`{word}` was not typed"))
        .hint("the same command again, or with --yes"))
}

/// `data` of the envelope: the object for `create`, the rows for `disk add`, else the whole answer.
fn data(name: &str, reply: &Changed) -> Value {
    let whole = |value: serde_json::Result<Value>| value.unwrap_or(Value::Null);
    if reply.outcome == Outcome::Planned {
        return whole(serde_json::to_value(reply));
    }
    match name {
        "disk.add" => whole(serde_json::to_value(&reply.disks)),
        "group.create" => whole(serde_json::to_value(&reply.group)),
        "lu.create" => whole(serde_json::to_value(&reply.lu)),
        _ => whole(serde_json::to_value(reply)),
    }
}
