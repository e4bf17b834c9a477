//! Disks of another system, and a take-over that was killed.

use super::super::ensure;
use super::super::rig::{Rig, text};
use super::super::shell::{Failure, sh, until};
use super::{RAID5, import, refused, seed, seed_is_there, status_says, unwritten};

/// Puts the state directory of another system in place of the one there is; `name` is where it lies till then.
fn other_state(rig: &mut Rig, away: &str, back: &str) -> Result<(), Failure> {
    rig.shutdown()?;
    sh(&format!(
        "mv {0} {0}.{away}; if [ -d {0}.{back} ]; then mv {0}.{back} {0}; else mkdir {0}; fi",
        rig.state_dir()
    ))?;
    rig.start()
}

/// Given a running system and disks of another beside its own, then those are named and left alone; they are taken over
/// only when told so, and then the other system does not touch them.
pub(super) fn another_system() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let theirs = rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    let system = text(&rig.json(&["status"])?["system"]);
    let own = ["/dev/ram4", "/dev/ram5"].map(String::from);
    rig.shutdown()?;
    unwritten(&theirs, || {
        sh(&format!("mv {0} {0}.a; mkdir {0}", rig.state_dir()))?;
        rig.start()?;
        rig.lunar(&["disk", "add", &own[0], &own[1]])?;
        rig.mirror("other", "1,2", "well")?;
        rig.end_mgmtd("TERM")?;
        rig.start()?;
        status_says(
            &rig,
            &[
                &system,
                "(group data)",
                "lunar import --take /dev/ram0 /dev/ram1 /dev/ram2",
            ],
        )?;
        refused(
            &rig,
            &import(&[], &theirs),
            6,
            &[&system, "slot 0 of group data", "--take"],
        )?;
        refused(&rig, &["disk", "add", &theirs[0]], 6, &[&system])?;
        // With disks of its own between, those are imported and the others named.
        let mixed = [own[0].clone(), theirs[0].clone()];
        let said = rig.lunar(&import(&[], &mixed))?;
        ensure(
            said.contains("unchanged") && said.contains(&theirs[0]),
            || said.clone(),
        )?;
        rig.lunar(&import(&["--take", "--dry-run"], &theirs))
            .map(drop)
    })?;
    let said = rig.lunar(&import(&["--take"], &theirs[..1]))?;
    ensure(
        said.contains("taken over") && said.contains("group data is up"),
        || said.clone(),
    )?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    seed_is_there(&rig)?;
    let again = rig.lunar(&import(&["--take"], &theirs))?;
    ensure(again.contains("unchanged"), || again.clone())?;
    // Its old system, with its old state directory.
    let all: Vec<String> = theirs.iter().chain(&own).cloned().collect();
    rig.shutdown()?;
    unwritten(&all, || {
        sh(&format!("mv {0} {0}.b; mv {0}.a {0}", rig.state_dir()))?;
        rig.start()?;
        let found = rig.json(&["status"])?;
        let others = found["strangers"].as_array().map_or(0, Vec::len);
        ensure(others == 5, || format!("{found}"))?;
        ensure(rig.state()?.0 == "stopped", || format!("{:?}", rig.state()))?;
        refused(&rig, &["group", "start", "data"], 4, &[])?;
        rig.shutdown()
    })?;
    sh(&format!("mv {0} {0}.a; mv {0}.b {0}", rig.state_dir()))?;
    rig.start()?;
    seed_is_there(&rig)?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))
}

/// The system that the first superblock of a disk names.
fn system_on(path: &str) -> Result<String, Failure> {
    sh(&format!(
        "dd if={path} bs=4096 skip=1 count=1 iflag=direct 2>/dev/null | od -An -tx1 -j40 -N16 | tr -d ' \\n'"
    ))
}

/// Given a take-over that is killed after one disk of three, then neither system starts the group with what it has of it;
/// the same command again ends it.
pub(super) fn half_taken() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let theirs = rig.array("dm", 3, 256, &RAID5)?;
    seed(&rig)?;
    let old = system_on("/dev/ram0")?;
    rig.shutdown()?;
    sh(&format!("mv {0} {0}.a; mkdir {0}", rig.state_dir()))?;
    rig.start()?;
    // A system that has something does not become another.
    rig.lunar(&["disk", "add", "/dev/ram8"])?;
    let own = system_on("/dev/ram8")?;
    ensure(own != old, || "one system".into())?;
    sh("dm_delay member1 1500; dm_delay member2 1500")?;
    let lunar = std::env::current_exe().map_err(|error| error.to_string())?;
    let lunar = lunar.with_file_name("lunar").display().to_string();
    sh(&format!(
        "{lunar} import --take {} >/tmp/take.out 2>&1 & echo",
        theirs.join(" ")
    ))?;
    until("one disk is taken", 60, || {
        let systems = [0, 1, 2].map(|i| system_on(&format!("/dev/ram{i}")));
        Ok(systems.iter().any(|s| s.as_ref() == Ok(&own)))
    })
    .map_err(|why| format!("{why}: {}", sh("cat /tmp/take.out").unwrap_or_default()))?;
    let target = rig.target_pid()?;
    rig.end_mgmtd("KILL")?;
    sh(&format!(
        "kill -KILL {target}; while [ -d /proc/{target} ]; do sleep 0.1; done; dm_heal member1; dm_heal member2"
    ))?;
    let taken = [0, 1, 2].map(|i| system_on(&format!("/dev/ram{i}")));
    let count = taken.iter().filter(|s| s.as_ref() == Ok(&own)).count();
    ensure((1..3).contains(&count), || {
        format!("{count} of 3 are taken: no half")
    })?;
    rig.start()?;
    unwritten(&theirs, || {
        status_says(
            &rig,
            &["a take-over of it has begun", "lunar import --take"],
        )?;
        refused(&rig, &["group", "start", "data"], 6, &["take-over"])?;
        other_state(&mut rig, "b", "a")?;
        status_says(
            &rig,
            &["a take-over of it has begun", "lunar import --take"],
        )?;
        refused(&rig, &["group", "start", "data"], 6, &["take-over"])?;
        other_state(&mut rig, "a", "b")
    })?;
    rig.lunar(&import(&["--take"], &theirs))?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    seed_is_there(&rig)
}
