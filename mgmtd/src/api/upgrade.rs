//! `upgrade`: what runs, what is to run, whether that fits, and the change.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use lunar_api::mgmt::UpgradeAsk;
use lunar_api::rows::{Outcome, ProgramRow, UpgradeReply};
use lunar_api::target::TARGET_API;
use lunar_api::{ApiError, ErrorKind};

use super::view;
use crate::daemon::{About, Daemon};
use crate::upgrade::{self, Program, UPGRADE_LIMIT};

/// One program: what runs and what would.
#[derive(Debug)]
struct Pair {
    pid: Option<u32>,
    running: Option<Program>,
    to: Option<Program>,
    path: PathBuf,
    problems: Vec<String>,
}

impl Pair {
    async fn look(pid: Option<u32>, path: PathBuf, args: &[String]) -> Self {
        let mut problems = Vec::new();
        let running = match pid {
            Some(pid) => Program::look(Path::new(&format!("/proc/{pid}/exe")), &[])
                .await
                .ok(),
            None => None,
        };
        let to = match Program::look(&path, args).await {
            Ok(program) => Some(program),
            Err(why) => {
                problems.push(format!("{}: {why}", path.display()));
                None
            }
        };
        Self {
            pid,
            running,
            to,
            path,
            problems,
        }
    }

    /// Another build would run.
    fn changes(&self) -> bool {
        let digest = |program: &Option<Program>| program.as_ref().map(|p| p.digest.clone());
        self.to.is_some() && digest(&self.to) != digest(&self.running)
    }

    fn row(&self, program: &str) -> ProgramRow {
        ProgramRow {
            program: program.into(),
            pid: self.pid,
            path: self.path.display().to_string(),
            running: self.running.as_ref().map(Program::row),
            installed: self.to.as_ref().map(Program::row),
            changes: self.changes(),
            problems: self.problems.clone(),
        }
    }
}

/// What is to run, from `--to` or from where the running ones were started.
fn wanted(daemon: &Daemon, to: Option<&str>) -> Result<(PathBuf, Option<PathBuf>), ApiError> {
    let Some(to) = to.map(Path::new) else {
        let own = upgrade::own_path().map_err(|e| {
            ApiError::new(ErrorKind::Failed, "the program of mgmtd is not known")
                .because(e.to_string())
        })?;
        return Ok((daemon.config.target_bin.clone(), Some(own)));
    };
    if to.is_dir() {
        let mgmtd = to.join("mgmtd");
        return Ok((to.join("ublk-target"), mgmtd.exists().then_some(mgmtd)));
    }
    Ok((to.into(), None))
}

/// Looks at everything, and says what does not fit.
async fn look(daemon: &Daemon, ask: &UpgradeAsk) -> Result<(Pair, Option<Pair>), ApiError> {
    let (target, mgmtd) = wanted(daemon, ask.to.as_deref())?;
    let view = view(daemon).await;
    let mut target = Pair::look(view.live.target_pid, target, &[]).await;
    let own: Vec<String> = std::env::args().skip(1).collect();
    let mut mgmtd = match mgmtd {
        Some(path) => Some(Pair::look(Some(std::process::id()), path, &own).await),
        None => None,
    };
    let speaks = |pair: &Pair| {
        let build = pair.to.as_ref().and_then(|to| to.build.as_ref());
        build.map(|build| build.protocol)
    };
    for pair in std::iter::once(&mut target).chain(&mut mgmtd) {
        if let Some(other) = speaks(pair).filter(|other| *other != TARGET_API) {
            pair.problems.push(format!(
                "it speaks version {other} of the protocol between mgmtd and ublk-target, what runs speaks {TARGET_API}: both are \
                 changed together, with the LUs out of use (umount, lunar shutdown, start mgmtd)"
            ));
        }
    }
    // What the disks say themselves decides: another build reads them, and says which it could not serve.
    if let Some(program) = &target.to
        && target.changes()
        && program.build.is_some()
    {
        let members = view.live.groups.values().flat_map(|g| g.all_members());
        let rows = members.filter_map(|member| view.tables.disk(member.disk));
        let paths: Vec<String> = rows.map(|disk| disk.path.clone()).collect();
        match upgrade::unreadable(&program.path, paths).await {
            Ok(bad) => target.problems.extend(bad.into_iter().map(|reading| {
                let why = reading.problem.unwrap_or_default();
                format!("it cannot serve {}: {why}", reading.path)
            })),
            Err(why) => target
                .problems
                .push(format!("it cannot look at the disks: {why}")),
        }
    }
    if let Some(zeroed) = view.live.groups.values().flat_map(|g| &g.zeroing).next() {
        target.problems.push(format!(
            "LU {} is being zeroed, and would have to be made anew: lunar job list",
            zeroed.name
        ));
    }
    Ok((target, mgmtd))
}

fn steps(target: &Pair, mgmtd: Option<&Pair>, lus: usize) -> Vec<String> {
    let mut out = Vec::new();
    if target.changes() {
        match target.pid {
            Some(pid) => out.push(format!(
                "quiesce {lus} LUs: what is in flight ends, what comes waits; end ublk-target {pid}"
            )),
            None => out.push("have ublk-target started".into()),
        }
        let path = target.path.display();
        out.push(format!("start {path}, which takes the LUs up again"));
        out.push("if it does not: start the old one again".into());
    }
    if let Some(mgmtd) = mgmtd.filter(|pair| pair.changes()) {
        let path = mgmtd.path.display();
        out.push(format!("have mgmtd become {path}; no LU notices"));
    }
    out
}

/// Answers `Upgrade`.
///
/// # Errors  `Failed` if it does not fit, or if the new ublk-target did not do: then the old one serves
pub async fn upgrade(daemon: &Daemon, ask: UpgradeAsk) -> Result<UpgradeReply, ApiError> {
    let _turn = match ask.check {
        true => None,
        false => Some(daemon.turn().await?),
    };
    let (target, mgmtd) = look(daemon, &ask).await?;
    let rows: Vec<ProgramRow> = std::iter::once(target.row("ublk-target"))
        .chain(mgmtd.as_ref().map(|pair| pair.row("mgmtd")))
        .collect();
    let problems: Vec<String> = rows
        .iter()
        .flat_map(|row| {
            row.problems
                .iter()
                .map(|why| format!("{}: {why}", row.program))
        })
        .collect();
    let lus = daemon.lus().iter().filter(|lu| lu.ublk.is_some()).count();
    let steps = steps(&target, mgmtd.as_ref(), lus);
    let mut reply = UpgradeReply {
        outcome: if steps.is_empty() {
            Outcome::Unchanged
        } else {
            Outcome::Planned
        },
        exit: u8::from(!problems.is_empty()),
        programs: rows,
        steps,
        lus: u32::try_from(lus).unwrap_or(u32::MAX),
        quiesced_ms: None,
        stood_still_ms: None,
        mgmtd_restarts: false,
        text: Vec::new(),
    };
    if ask.check
        || ask.dry_run && problems.is_empty()
        || reply.outcome == Outcome::Unchanged && problems.is_empty()
    {
        return Ok(reply);
    }
    if !problems.is_empty() {
        let mut error = ApiError::new(ErrorKind::Failed, "nothing was upgraded: it does not fit");
        error.causes = problems;
        return Err(error.hint("lunar upgrade --check"));
    }
    if target.changes() {
        exchange(daemon, &target, &mut reply).await?;
    }
    if let Some(mgmtd) = mgmtd.filter(Pair::changes) {
        let text = format!("mgmtd becomes {}", mgmtd.path.display());
        daemon.event("MgmtdUpgraded", About::default(), text.clone());
        reply.text.push(text);
        reply.mgmtd_restarts = true;
        daemon.renew(mgmtd.path);
    }
    reply.outcome = Outcome::Changed;
    Ok(reply)
}

/// Puts one ublk-target in the place of the other.
async fn exchange(
    daemon: &Daemon,
    target: &Pair,
    reply: &mut UpgradeReply,
) -> Result<(), ApiError> {
    let failed = |what: &str, why: String| {
        ApiError::new(ErrorKind::Failed, what)
            .because(why)
            .hint("lunar events; lunar status")
    };
    let Some(pid) = target.pid else {
        *daemon.target_bin() = target.path.clone();
        reply
            .text
            .push(format!("{} is started", target.path.display()));
        return Ok(());
    };
    // Open: at its path may already lie the new one, and once it has ended nothing else leads to it.
    let old = File::open(format!("/proc/{pid}/exe")).map_err(|e| {
        failed(
            "the running ublk-target could not be kept for the way back",
            e.to_string(),
        )
    })?;
    let back = format!("/proc/{}/fd/{}", std::process::id(), old.as_raw_fd());
    daemon.keep(old);
    let begun = std::time::Instant::now();
    let since = || u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    let text = format!(
        "{} takes the place of ublk-target {pid}",
        target.path.display()
    );
    daemon.event("UpgradeStarted", About::default(), text);
    let told = upgrade::begin(daemon, target.path.clone(), back.into());
    let handed = upgrade::hand_over(daemon, &target.path).await;
    if let Some(ms) = handed.quiesced_ms {
        let text = format!("{} LUs stood still after {ms} ms", handed.lus);
        daemon.event("Quiesced", About::default(), text);
    }
    let ended = tokio::time::timeout(UPGRADE_LIMIT, told).await;
    let result = match ended {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err("it was given up".into()),
        Err(_) => Err(format!(
            "no ublk-target serves after {} s",
            UPGRADE_LIMIT.as_secs()
        )),
    };
    result.map_err(|why| {
        failed(
            "the new ublk-target does not do; the old one serves on",
            why,
        )
    })?;
    reply.quiesced_ms = handed.quiesced_ms;
    reply.stood_still_ms = Some(since());
    let quiesced = handed
        .quiesced_ms
        .map_or("it had to be killed".into(), |ms| {
            format!("they were quiesced in {ms} ms")
        });
    let text = format!(
        "ublk-target is {}; {} LUs stood still for {} ms, {quiesced}",
        target.path.display(),
        handed.lus,
        since()
    );
    daemon.event("Upgraded", About::default(), text.clone());
    reply.text.push(text);
    let _ = daemon.save().await;
    Ok(())
}
