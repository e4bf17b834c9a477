//! The saved configuration: numbers and roles come back, differences are told, a layout is made anew.

use super::rig::{Rig, text};
use super::shell::{Failure, sh};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "config_load_gives_numbers_and_roles_back", numbers);
    add(to, "config_load_refuses_bad_files_by_line", bad_files);
    add(to, "config_load_makes_the_layout_anew", anew);
}

const RAID5: [&str; 3] = ["--level", "raid5", "--assume-clean"];

/// Number, path and role of every disk.
fn disks(rig: &Rig) -> Result<Vec<(String, String, String)>, Failure> {
    let list = rig.json(&["disk", "list"])?;
    let all = list.as_array().cloned().unwrap_or_default();
    Ok(all
        .iter()
        .map(|d| (text(&d["disk"]), text(&d["path"]), text(&d["role"])))
        .collect())
}

/// Given a saved configuration and a state directory that is lost, when the disks are imported in another order and the file is
/// loaded, then numbers, roles and rates are as before; what differs is told. With the archive of the state directory left,
/// they are as before by themselves.
fn numbers() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    rig.lunar(&["disk", "add", "--role", "spare", "/dev/ram5"])?;
    rig.lunar(&["group", "set", "data", "--rebuild-max", "100MiB"])?;
    rig.lunar(&["config", "save", "/tmp/saved.json"])?;
    let before = disks(&rig)?;
    let saved = rig.lunar(&["config", "save"])?;
    ensure(sh("cat /tmp/saved.json")? == saved.trim(), || saved.clone())?;
    let same = rig.lunar(&["config", "load", "/tmp/saved.json"])?;
    ensure(
        same.contains("unchanged") && !same.contains("differs"),
        || same.clone(),
    )?;
    // Only the tables are lost.
    rig.shutdown()?;
    sh(&format!("rm {}/lunar.redb", rig.state_dir()))?;
    rig.start()?;
    ensure(disks(&rig)? == before, || {
        format!("{:?} were {before:?}", disks(&rig))
    })?;
    // All of it is lost.
    rig.shutdown()?;
    sh(&format!("rm -rf {0}; mkdir {0}", rig.state_dir()))?;
    rig.start()?;
    rig.lunar(&["import", "/dev/ram5", &paths[2], &paths[0], &paths[1]])?;
    ensure(disks(&rig)? != before, || {
        "the numbers are as before by chance".into()
    })?;
    rig.lunar(&["lu", "rename", "vol", "now"])?;
    let said = rig.lunar(&["config", "load", "/tmp/saved.json", "--dry-run"])?;
    ensure(
        said.contains("would change: disk") && disks(&rig)? != before,
        || said.clone(),
    )?;
    let said = rig.lunar(&["config", "load", "/tmp/saved.json"])?;
    ensure(
        said.contains("differs: LU vol of the file is called now"),
        || said.clone(),
    )?;
    ensure(disks(&rig)? == before, || {
        format!("{:?} were {before:?}", disks(&rig))
    })?;
    let again = rig.lunar(&["config", "load", "/tmp/saved.json"])?;
    ensure(again.contains("unchanged"), || again.clone())?;
    rig.lunar(&["lu", "rename", "now", "vol"])?;
    let saved_again = rig.lunar(&["config", "save"])?;
    ensure(saved_again == saved, || {
        format!("{saved_again}\nwas {saved}")
    })?;
    // They stay.
    rig.end_mgmtd("TERM")?;
    rig.start()?;
    ensure(disks(&rig)? == before, || {
        format!("{:?} were {before:?}", disks(&rig))
    })
}

/// Given files that are no configuration, then each is refused with its reason and its line, and nothing changes.
fn bad_files() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    rig.lunar(&["config", "save", "/tmp/good.json"])?;
    let before = rig.json(&["status"])?;
    for (edit, says) in [
        ("echo hello", "line 1"),
        ("head -n 4 /tmp/good.json", "line 5"),
        (
            "sed 's/\"lunar.config.1\"/\"lunar.config\\/9\"/' /tmp/good.json",
            "line 2: its format is lunar.config/9",
        ),
        (
            "sed 's/\"disk\": 2/\"disk\": 1/' /tmp/good.json",
            "there twice",
        ),
        (
            "sed 's/\"role\": \"data\"/\"role\": \"king\"/' /tmp/good.json",
            "king",
        ),
        (
            "sed 's/\"name\": \"data\"/\"name\": \"a b\"/' /tmp/good.json",
            "`a b` cannot be a name",
        ),
        ("sed 's/\"level\"/\"levle\"/' /tmp/good.json", "levle"),
        ("head -c 2000000 /dev/zero", "at most"),
        ("head -c 100 /dev/urandom", ""),
    ] {
        sh(&format!("{edit} > /tmp/bad.json"))?;
        let output = rig.run(&["config", "load", "/tmp/bad.json"])?;
        let said = format!(
            "{edit}: exit {}: {}{}",
            output.code, output.stdout, output.stderr
        );
        ensure(output.code == 2 && output.stderr.contains("Try:"), || {
            said.clone()
        })?;
        ensure(output.stderr.contains(says), || {
            format!("expected `{says}`: {said}")
        })?;
    }
    let output = rig.run(&["config", "load", "/tmp/nosuch.json"])?;
    ensure(output.code == 2, || output.stderr.clone())?;
    let now = rig.json(&["status"])?;
    ensure(now == before, || format!("{now}"))
}

/// Given a saved configuration and blank disks, then its groups and LUs are made anew only after what dies is named and said
/// yes to; a disk that carries something stops it before anything is done.
fn anew() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    rig.lunar(&["disk", "add", "--role", "spare", "/dev/ram5"])?;
    rig.lunar(&["group", "set", "data", "--rebuild-max", "70MiB"])?;
    rig.lunar(&["lu", "set", "vol", "--queues", "2"])?;
    rig.lunar(&["config", "save", "/tmp/layout.json"])?;
    let size = text(&rig.json(&["lu", "show", "vol"])?["capacity"]);
    let load = ["config", "load", "/tmp/layout.json", "--create"];
    let output = rig.run(&load)?;
    ensure(
        output.code == 2 && output.stderr.contains("is disk 1 already"),
        || output.stderr.clone(),
    )?;
    rig.shutdown()?;
    sh(&format!(
        "rm -rf {0}; mkdir {0}; for i in 0 1 2 5; do blkdiscard /dev/ram$i; done; mkfs.ext4 -q -F /dev/ram2",
        rig.state_dir()
    ))?;
    rig.start()?;
    let output = rig.run(&load)?;
    ensure(
        output.code == 6 && output.stderr.contains("all that is on /dev/ram2"),
        || output.stderr.clone(),
    )?;
    let mut yes = load.to_vec();
    yes.push("--yes");
    let output = rig.run(&yes)?;
    ensure(output.code == 6 && output.stderr.contains("ext4"), || {
        output.stderr.clone()
    })?;
    ensure(disks(&rig)?.is_empty(), || format!("{:?}", disks(&rig)))?;
    sh("wipefs -qa /dev/ram2")?;
    rig.lunar(&yes)?;
    ensure(
        rig.state()?.0 == "optimal" || rig.state()?.0 == "degraded",
        || format!("{:?}", rig.state()),
    )?;
    let lu = rig.json(&["lu", "show", "vol"])?;
    ensure(text(&lu["capacity"]) == size && lu["queues"] == 2, || {
        format!("{lu}")
    })?;
    let saved = rig.lunar(&["config", "save"])?;
    ensure(saved.contains("\"rebuild_max\": 73400320"), || {
        saved.clone()
    })?;
    let roles: Vec<String> = disks(&rig)?.into_iter().map(|d| d.2).collect();
    ensure(roles == ["data", "data", "data", "spare"], || {
        format!("{roles:?}")
    })
}
