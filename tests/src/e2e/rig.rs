//! One Lunar: mgmtd with a state directory of its own, ublk-target behind it, and the command line.

use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::shell::{Failure, Output, run, sh, sh_in, until};

/// A running system. Dropping it shuts it down, by force if need be.
#[derive(Debug)]
pub struct Rig {
    bin: String,
    state: String,
    mgmtd: Option<Child>,
    log: String,
    /// Variables of mgmtd, and by it of ublk-target.
    env: &'static [(&'static str, &'static str)],
    args: Vec<String>,
}

impl Rig {
    /// Starts mgmtd on a fresh state directory.
    pub fn new() -> Result<Self, Failure> {
        Self::with_env(&[])
    }

    /// As [`Self::new`], with variables.
    pub fn with_env(env: &'static [(&'static str, &'static str)]) -> Result<Self, Failure> {
        Self::of(sh("mktemp -d -p /tmp")?, env)
    }

    /// As [`Self::new`], with a state directory that is there.
    pub fn in_state(state: &str) -> Result<Self, Failure> {
        Self::of(state.to_owned(), &[])
    }

    /// As [`Self::new`], with programs that lie elsewhere than this one.
    pub fn in_bin(bin: &str) -> Result<Self, Failure> {
        Self::made(bin.to_owned(), sh("mktemp -d -p /tmp")?, &[])
    }

    /// Has programs that lie elsewhere be started from here on.
    pub fn set_bin(&mut self, bin: &str) {
        bin.clone_into(&mut self.bin);
    }

    fn of(state: String, env: &'static [(&'static str, &'static str)]) -> Result<Self, Failure> {
        let exe = std::env::current_exe().map_err(|error| error.to_string())?;
        let bin = exe.parent().ok_or("no folder")?.display().to_string();
        Self::made(bin, state, env)
    }

    fn made(
        bin: String,
        state: String,
        env: &'static [(&'static str, &'static str)],
    ) -> Result<Self, Failure> {
        let log = format!("/tmp/{}.log", state.replace('/', "-"));
        let mut rig = Self {
            bin,
            state,
            mgmtd: None,
            log,
            env,
            args: Vec::new(),
        };
        rig.start()?;
        Ok(rig)
    }

    /// Starts mgmtd anew with more arguments; ublk-target stays.
    pub fn restart_with(&mut self, args: &[&str]) -> Result<(), Failure> {
        self.end_mgmtd("TERM")?;
        self.args = args.iter().map(|arg| (*arg).to_owned()).collect();
        self.start()
    }

    /// Starts mgmtd; the state directory is as it was left.
    pub fn start(&mut self) -> Result<(), Failure> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log);
        let log = log.map_err(|error| error.to_string())?;
        let err = log.try_clone().map_err(|error| error.to_string())?;
        let child = Command::new(format!("{}/mgmtd", self.bin))
            .args(["--state-dir", &self.state])
            .args(&self.args)
            .envs(self.env.iter().copied())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(err)
            .spawn()
            .map_err(|error| format!("mgmtd: {error}"))?;
        self.mgmtd = Some(child);
        until("mgmtd has started", 100, || {
            let output = self.run(&["status", "--json"])?;
            let said: Option<serde_json::Value> = serde_json::from_str(&output.stdout).ok();
            Ok(said.is_some_and(|said| said["data"]["starting"] == false))
        })
        .map_err(|why| format!("{why}\n{}", self.log_tail()))
    }

    /// The state directory.
    pub fn state_dir(&self) -> &str {
        &self.state
    }

    /// The file of mgmtd's and ublk-target's log.
    pub fn log(&self) -> &str {
        &self.log
    }

    /// The last lines of mgmtd's and ublk-target's log.
    pub fn log_tail(&self) -> String {
        sh(&format!("tail -n 40 {}", self.log)).unwrap_or_default()
    }

    /// Sends mgmtd a signal and waits for its end; ublk-target stays.
    pub fn end_mgmtd(&mut self, signal: &str) -> Result<(), Failure> {
        if let Some(mut child) = self.mgmtd.take() {
            sh(&format!("kill -{signal} {}", child.id()))?;
            until("mgmtd ends", 20, || {
                Ok(child.try_wait().map_err(|e| e.to_string())?.is_some())
            })?;
        }
        Ok(())
    }

    /// Process id of ublk-target.
    pub fn target_pid(&self) -> Result<String, Failure> {
        sh("cat /run/lunar/target.pid")
    }

    /// Process id of mgmtd; empty when it does not run.
    pub fn mgmtd_pid(&self) -> String {
        self.mgmtd
            .as_ref()
            .map_or_else(String::new, |child| child.id().to_string())
    }

    /// Runs `lunar ARGS`.
    pub fn run(&self, args: &[&str]) -> Result<Output, Failure> {
        run(&format!("{}/lunar", self.bin), args, 120)
    }

    /// Runs `lunar ARGS`, which must exit 0.
    pub fn lunar(&self, args: &[&str]) -> Result<String, Failure> {
        let output = self.run(args)?;
        if output.code != 0 {
            return Err(format!(
                "lunar {} exited {}: {}{}\n{}",
                args.join(" "),
                output.code,
                output.stdout,
                output.stderr,
                self.log_tail()
            ));
        }
        Ok(output.stdout)
    }

    /// Runs `lunar ARGS --json` and returns `data`.
    pub fn json(&self, args: &[&str]) -> Result<Value, Failure> {
        let mut all = args.to_vec();
        all.push("--json");
        let output = self.run(&all)?;
        let value: Value = serde_json::from_str(&output.stdout).map_err(|error| {
            format!(
                "lunar {}: {error}: {}{}",
                args.join(" "),
                output.stdout,
                output.stderr
            )
        })?;
        Ok(value["data"].clone())
    }

    /// Makes members, adds them, makes a group of them and a LU of all its space. Returns the members' paths.
    pub fn array(
        &self,
        kind: &str,
        count: usize,
        mib: u32,
        create: &[&str],
    ) -> Result<Vec<String>, Failure> {
        let paths = members(kind, count, mib)?;
        self.array_of(&paths, create)?;
        Ok(paths)
    }

    /// As [`Self::array`], on disks that are there.
    pub fn array_of(&self, paths: &[String], create: &[&str]) -> Result<(), Failure> {
        let mut add = vec!["disk", "add"];
        add.extend(paths.iter().map(String::as_str));
        self.lunar(&add)?;
        let list = paths.join(",");
        let mut group = vec!["group", "create", "data", "--disks", &list];
        group.extend(create);
        self.lunar(&group)?;
        self.lunar(&["lu", "create", "vol", "--group", "data", "--size", "max"])?;
        Ok(())
    }

    /// A raid1 of two disks, told by their numbers, and a LU of all its space.
    pub fn mirror(&self, group: &str, disks: &str, lu: &str) -> Result<(), Failure> {
        let level = ["--level", "raid1", "--assume-clean"];
        let create = ["group", "create", group, "--disks", disks];
        self.lunar(&[&create[..], &level].concat())?;
        self.lunar(&["lu", "create", lu, "--group", group, "--size", "max"])
            .map(drop)
    }

    /// Waits until the LU `vol` has its device: after a start mgmtd answers before, and a write would make a file.
    pub fn wait_lu(&self) -> Result<(), Failure> {
        until("the LU is up", 60, || {
            Ok(run("test", &["-b", "/dev/lunar/vol"], 5)?.code == 0)
        })
        .map_err(|why| format!("{why}\n{}", self.log_tail()))
    }

    /// The block device of the LU `vol`.
    pub fn device(&self) -> Result<String, Failure> {
        sh("readlink -f /dev/lunar/vol")
    }

    /// The state of the group `data`, and of its slots.
    pub fn state(&self) -> Result<(String, Vec<String>), Failure> {
        let group = self.json(&["group", "show", "data"])?;
        let members = group["members"].as_array().cloned().unwrap_or_default();
        let states = members.iter().map(|m| text(&m["state"])).collect();
        Ok((text(&group["state"]), states))
    }

    /// Waits until nothing is rebuilt or resynced and the group is optimal.
    pub fn wait_optimal(&self, seconds: u64) -> Result<(), Failure> {
        until("the group is optimal and nothing runs", seconds, || {
            let group = self.json(&["group", "show", "data"])?;
            Ok(text(&group["state"]) == "optimal" && group["sync"].is_null())
        })
        .map_err(|why| format!("{why}: {:?}", self.state()))
    }

    /// Has rebuilds and resyncs of the group `data` go at this rate, no faster and no slower.
    pub fn rebuild_rate(&self, rate: &str) -> Result<(), Failure> {
        let bounds = ["--rebuild-min", rate, "--rebuild-max", rate];
        self.lunar(&[&["group", "set", "data"], &bounds[..]].concat())
            .map(drop)
    }

    /// Stops all in order and ends mgmtd.
    pub fn shutdown(&mut self) -> Result<(), Failure> {
        self.lunar(&["shutdown", "--yes"])?;
        if let Some(mut child) = self.mgmtd.take() {
            until("mgmtd ends", 30, || {
                Ok(child.try_wait().map_err(|e| e.to_string())?.is_some())
            })?;
        }
        Ok(())
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = sh_in(
            "mount | awk '$1 ~ /^.dev.ublkb/ {print $3}' | xargs -r umount",
            60,
        );
        if self.mgmtd.is_some() && self.shutdown().is_err() {
            let target = self.target_pid().unwrap_or_default();
            if let Some(mut child) = self.mgmtd.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
            let _ = sh(&format!("kill -KILL {target}"));
        }
        // To its end, whatever is not there any more (a disk that vanished). Who held a disk lets go a moment after
        // its end, and not before requests that hang have ended. Plain discard gives the RAM back, and reads as zero; what somebody else holds (md) stays.
        let cleaned = sh("set +e; members_remove
             for i in $(seq 50); do
                 left=$(dmsetup ls | awk '/^member/ {print $1}'); [ -n \"$left\" ] || break
                 for d in $left; do dmsetup resume $d; dmsetup remove --force $d; done 2>/dev/null; sleep 0.2
             done
             for d in /dev/ram[0-9]*; do blkdiscard $d 2>/dev/null; done; rm -rf /run/lunar
             ! dmsetup info -c --noheadings -o name,open 2>/dev/null | grep ^member");
        if let Err(why) = cleaned {
            eprintln!("member disks are left: {why}");
        }
    }
}

/// Makes member disks.
pub fn members(kind: &str, count: usize, mib: u32) -> Result<Vec<String>, Failure> {
    Ok(sh(&format!("members_make {kind} {count} {mib}"))?
        .lines()
        .map(str::to_owned)
        .collect())
}

/// A JSON string, or what else it is as text.
pub fn text(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}
