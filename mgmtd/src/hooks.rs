//! Programs run when something happens, as mdadm's PROGRAM: `HOOK EVENT GROUP [COMPONENT]`.
//!
//! Each executable of the hooks directory is run for every event, in the order of their names, md's event names where md
//! has one. Only files of root (or of whom mgmtd runs as) that nobody else may write are run. A hook has a time limit,
//! then it and its children are killed; at most [`HOOKS_AT_ONCE`] events are handled at once, the next wait in the
//! event table, and what falls out of that is said. What hooks do is an event too, but not for hooks.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use lunar_api::{DiskUuid, GroupUuid, LuUuid};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, geteuid};
use tokio::process::Command;

use crate::daemon::{About, Daemon};
use crate::limits::HOOKS_AT_ONCE;
use crate::memory;
use crate::tables::{EventSave, Tables};

/// What a hook is given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Event, group, component: mdadm's arguments.
    pub args: Vec<String>,
    pub env: Vec<(&'static str, String)>,
}

/// md's name of an event; Lunar's own where md has none.
pub fn md_name(name: &str) -> &str {
    match name {
        "Assembled" => "NewArray",
        "GroupStopped" | "GroupDeleted" => "DeviceDisappeared",
        other => other,
    }
}

/// Whether hooks hear of an event: not of what they did themselves.
fn is_heard(event: &EventSave) -> bool {
    !event.name.starts_with("Hook")
}

/// Names of all that was ever there: an event that tells of an end comes when the row is gone.
#[derive(Debug, Default)]
pub struct Names {
    groups: BTreeMap<GroupUuid, String>,
    disks: BTreeMap<DiskUuid, (u32, String)>,
    lus: BTreeMap<LuUuid, String>,
}

impl Names {
    /// Learns what is there now.
    pub fn learn(&mut self, tables: &Tables) {
        let groups = tables
            .groups
            .values()
            .map(|g| (g.uuid, g.name_seen.clone()));
        self.groups.extend(groups);
        let disks = tables
            .disks
            .values()
            .map(|d| (d.uuid, (d.number, d.path.clone())));
        self.disks.extend(disks);
        let lus = tables.lus.values().map(|l| (l.uuid, l.name_seen.clone()));
        self.lus.extend(lus);
    }

    /// Makes the arguments and variables of an event.
    pub fn call(&self, event: &EventSave) -> Call {
        let group = event.group.and_then(|g| self.groups.get(&g).cloned());
        let (group, lu) = (
            group.unwrap_or_default(),
            event.lu.and_then(|l| self.lus.get(&l).cloned()),
        );
        let disk = event.disk.and_then(|d| self.disks.get(&d).cloned());
        let (number, path) = disk.map_or_else(Default::default, |(n, path)| (n.to_string(), path));
        let name = md_name(&event.name).to_string();
        let mut args = vec![name.clone(), group.clone()];
        if !path.is_empty() {
            args.push(path.clone());
        }
        let env = vec![
            ("LUNAR_EVENT", name),
            ("LUNAR_EVENT_OWN", event.name.clone()),
            ("LUNAR_EVENT_NUMBER", event.number.to_string()),
            ("LUNAR_TIME_MS", event.time.to_string()),
            ("LUNAR_TEXT", event.text.replace('\0', " ")),
            ("LUNAR_GROUP", group),
            ("LUNAR_DISK", number),
            ("LUNAR_COMPONENT", path),
            ("LUNAR_LU", lu.unwrap_or_default()),
        ];
        Call { args, env }
    }
}

/// The hooks of a directory in order, and files in it that are not run, with why. No directory: no hooks.
pub fn hooks_in(dir: &Path) -> (Vec<PathBuf>, Vec<String>) {
    let (mut hooks, mut refused) = (Vec::new(), Vec::new());
    for name in crate::probe::names(&dir.display().to_string()) {
        let path = dir.join(&name);
        let Ok(meta) = std::fs::metadata(&path) else {
            continue;
        };
        let mode = meta.permissions().mode();
        // What an editor or a package manager leaves behind is no hook.
        let left = name.starts_with('.') || name.ends_with('~') || name.contains(".dpkg-");
        if !meta.is_file() || mode & 0o111 == 0 || left {
            continue;
        }
        let owned = meta.uid() == 0 || meta.uid() == geteuid().as_raw();
        if !owned || mode & 0o022 != 0 {
            refused.push(format!(
                "{} is not run: others than root may change it",
                path.display()
            ));
        } else {
            hooks.push(path);
        }
    }
    (hooks, refused)
}

/// Hands every later event to the hooks, for as long as mgmtd runs.
pub async fn follow(daemon: Arc<Daemon>) {
    let slots = Arc::new(tokio::sync::Semaphore::new(HOOKS_AT_ONCE));
    let mut names = Names::default();
    names.learn(&daemon.tables());
    let mut after = daemon.tables().events.back().map_or(0, |e| e.number);
    loop {
        let rang = daemon.rang.notified();
        tokio::pin!(rang);
        // Armed before the look: what comes in between rings it.
        rang.as_mut().enable();
        let next = {
            let tables = daemon.tables();
            names.learn(&tables);
            let oldest = tables.events.front().map_or(0, |e| e.number);
            let next = tables.events.iter().find(|e| e.number > after).cloned();
            next.map(|event| (event, oldest.saturating_sub(after + 1)))
        };
        let Some((event, missed)) = next else {
            rang.await;
            continue;
        };
        after = event.number;
        if missed > 0 {
            let what = format!("{missed} events came faster than the hooks could be run");
            daemon.event("HooksMissed", About::default(), what);
        }
        if !is_heard(&event) {
            continue;
        }
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let (daemon, call) = (daemon.clone(), names.call(&event));
        tokio::spawn(async move {
            run_all(&daemon, &event, &call).await;
            drop(slot);
        });
    }
}

/// Runs every hook for one event.
async fn run_all(daemon: &Daemon, event: &EventSave, call: &Call) {
    let dir = daemon.config.hooks_dir.clone();
    // Not on this thread: the directory may lie on what hangs.
    let looked = tokio::task::spawn_blocking(move || hooks_in(&dir)).await;
    let Ok((hooks, refused)) = looked else { return };
    if hooks.is_empty() && refused.is_empty() {
        return;
    }
    let about = About {
        group: event.group,
        disk: event.disk,
        lu: event.lu,
    };
    for why in refused {
        daemon.event("HookRefused", about, why);
    }
    for hook in hooks {
        if let Err((name, why)) = run(&hook, call, daemon.config.hook_limit).await {
            let what = format!("{} {}: {why}", hook.display(), call.args[0]);
            daemon.event(name, about, what);
        }
    }
    let _ = daemon.save().await;
}

/// Runs one hook to its end or its limit.
///
/// # Errors  the event that tells of it, and why
async fn run(hook: &Path, call: &Call, limit: Duration) -> Result<(), (&'static str, String)> {
    let failed = |e: io::Error| ("HookFailed", e.to_string());
    let mut command = Command::new(hook);
    command
        .args(&call.args)
        .envs(call.env.iter().map(|(key, value)| (key, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .process_group(0);
    let spawned = tokio::task::spawn_blocking(move || command.spawn()).await;
    let mut child = spawned
        .map_err(io::Error::other)
        .and_then(|child| child)
        .map_err(failed)?;
    let group = child.id().and_then(|pid| i32::try_from(pid).ok());
    // That mgmtd may not be killed when memory runs short, and goes before others then, is not for it.
    if let Some(pid) = child.id() {
        let _ = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0");
        memory::calm(pid).await;
    }
    match tokio::time::timeout(limit, child.wait()).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(("HookFailed", status.to_string())),
        Ok(Err(error)) => Err(failed(error)),
        Err(_) => {
            // Its children too: a shell that waits for one would leave it behind.
            if let Some(group) = group {
                let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
            }
            let _ = child.wait().await;
            let seconds = limit.as_secs();
            Err(("HookKilled", format!("no end in {seconds} s, killed")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view;

    fn script(dir: &Path, name: &str, text: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        path
    }

    fn directory(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("lunar-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn hooks_in_takes_safe_executables_in_order() {
        let dir = directory("hooks-in");
        for (name, mode) in [
            ("20-b", 0o755),
            ("10-a", 0o700),
            ("30-not-executable", 0o644),
            ("40-writable", 0o777),
            ("50-backup~", 0o755),
            (".hidden", 0o755),
        ] {
            script(&dir, name, "", mode);
        }
        std::fs::create_dir_all(dir.join("60-directory")).unwrap();
        let (hooks, refused) = hooks_in(&dir);
        assert_eq!(hooks, [dir.join("10-a"), dir.join("20-b")]);
        assert_eq!(refused.len(), 1);
        assert!(refused[0].contains("40-writable"), "{refused:?}");
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(hooks_in(&dir), (Vec::new(), Vec::new()));
    }

    #[test]
    fn call_has_mdadms_arguments() {
        let mut view = view();
        let mut names = Names::default();
        names.learn(&view.tables);
        let group = view.live.groups.values().next().unwrap();
        let mut event = EventSave {
            number: 9,
            time: 1,
            name: "Fail".into(),
            group: Some(group.group),
            disk: Some(group.members[1].disk),
            lu: None,
            text: "a\0b".into(),
        };
        let made = names.call(&event);
        assert_eq!(made.args, ["Fail", "data", "/dev/disk/by-id/wwn-2"]);
        assert!(made.env.contains(&("LUNAR_TEXT", "a b".into())));
        assert!(made.env.contains(&("LUNAR_DISK", "2".into())));
        // The row goes before the hook hears of it.
        (event.name, event.disk) = ("GroupDeleted".into(), None);
        view.tables.drop_group(1);
        names.learn(&view.tables);
        assert_eq!(names.call(&event).args, ["DeviceDisappeared", "data"]);
        event.name = "HookFailed".into();
        assert!(!is_heard(&event));
    }

    /// Given a hook that works, one that fails, one that is no program and one that hangs with a child, then each is
    /// told apart, and nothing of the last is left.
    #[test]
    fn run_tells_success_failure_and_hang_apart() {
        let dir = directory("hooks-run");
        let out = dir.join("out");
        let good = format!("echo \"$1,$2,$3,$LUNAR_TEXT\" > {}", out.display());
        let good = script(&dir, "good", &good, 0o700);
        let bad = script(&dir, "bad", "exit 3", 0o700);
        let pid = dir.join("pid");
        let hang = format!("sleep 1000 & echo $! > {}; wait", pid.display());
        let hang = script(&dir, "hang", &hang, 0o700);
        let none = dir.join("none");
        std::fs::write(&none, [0x7f]).unwrap();
        std::fs::set_permissions(&none, PermissionsExt::from_mode(0o700)).unwrap();
        let made = Call {
            args: ["Fail", "data", "/dev/x"].map(String::from).into(),
            env: vec![("LUNAR_TEXT", "it failed".into())],
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let run = |hook: &Path, limit| {
            let result = runtime.block_on(run(hook, &made, Duration::from_millis(limit)));
            result.map_err(|(name, _)| name)
        };
        assert_eq!(run(&good, 60_000), Ok(()));
        let said = std::fs::read_to_string(&out).unwrap();
        assert_eq!(said, "Fail,data,/dev/x,it failed\n");
        assert_eq!(run(&bad, 60_000), Err("HookFailed"));
        assert_eq!(run(&none, 60_000), Err("HookFailed"));
        assert_eq!(run(&hang, 500), Err("HookKilled"));
        let child = std::fs::read_to_string(&pid).unwrap();
        let status = format!("/proc/{}/status", child.trim());
        // Dead, or waiting for somebody to take its exit status; a signal takes effect in a moment.
        let is_gone = || std::fs::read_to_string(&status).map_or(true, |s| s.contains("State:\tZ"));
        runtime.block_on(async {
            let gone = async {
                while !is_gone() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let limit = Duration::from_secs(20);
            tokio::time::timeout(limit, gone).await.expect("killed");
        });
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
