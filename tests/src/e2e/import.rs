//! Disks that are not what the tables say: the state directory lost, disks of another system, copies, older copies, two
//! sides. Each is answered by name, and no answer writes to a disk.

mod copies;
mod generations;
mod systems;
mod tables;

pub(in crate::e2e) use copies::{end_copy, rewrite};

use super::rig::{Rig, text};
use super::shell::{Failure, sh, sh_in, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "import_after_the_state_directory_is_lost", lost);
    // As many members away as the level bears, then one more.
    for (level, members, away, over) in [
        ("raid6", 4, &[0, 2][..], 3),
        ("raid10", 5, &[1, 3], 2),
        ("linear", 3, &[], 1),
    ] {
        add(
            to,
            format!("import_{level}_without_what_it_can_lose"),
            move || without(level, members, away, over),
        );
    }
    add(
        to,
        "import_disks_of_another_system",
        systems::another_system,
    );
    add(to, "import_take_over_killed_half_way", systems::half_taken);
    add(to, "import_copies_of_disks", copies::copies);
    add(to, "import_damaged_cut_and_grown_disks", copies::damaged);
    add(
        to,
        "import_two_generations_and_two_sides",
        generations::generations,
    );
    add(to, "import_deleted_lus_and_groups", deleted);
    add(to, "import_state_directory_full", tables::full);
    add(to, "import_tables_that_rotted_are_told", tables::rotted);
}

const RAID5: [&str; 3] = ["--level", "raid5", "--assume-clean"];

/// A checksum of every byte of some disks, read past what is cached.
fn bytes_of(paths: &[String]) -> Result<String, Failure> {
    sh(&format!(
        "for d in {}; do dd if=$d bs=1M iflag=direct 2>/dev/null; done | cksum",
        paths.join(" ")
    ))
}

/// Runs something that must not change a byte of some disks.
pub(in crate::e2e) fn unwritten<T>(
    paths: &[String],
    what: impl FnOnce() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let before = bytes_of(paths)?;
    let done = what()?;
    ensure(bytes_of(paths)? == before, || {
        format!("{} were written", paths.join(", "))
    })?;
    Ok(done)
}

/// Runs `lunar ARGS`, which must exit `code`, say all of `what`, and what to type.
pub(in crate::e2e) fn refused(
    rig: &Rig,
    args: &[&str],
    code: i32,
    what: &[&str],
) -> Result<(), Failure> {
    let output = rig.run(args)?;
    let said = format!(
        "lunar {}: exit {}: {}{}",
        args.join(" "),
        output.code,
        output.stdout,
        output.stderr
    );
    ensure(output.code == code, || format!("expected {code}: {said}"))?;
    for what in what.iter().chain(&["Try:"]) {
        ensure(output.stderr.contains(what), || {
            format!("expected `{what}`: {said}")
        })?;
    }
    Ok(())
}

/// What `lunar status` prints has all of `what`.
pub(in crate::e2e) fn status_says(rig: &Rig, what: &[&str]) -> Result<(), Failure> {
    let mut said = String::new();
    until("the status", 60, || {
        said = rig.run(&["status"])?.stdout;
        Ok(what.iter().all(|what| said.contains(what)))
    })
    .map_err(|why| format!("{why} has {what:?}: {said}\n{}", rig.log_tail()))
}

pub(in crate::e2e) fn seed(rig: &Rig) -> Result<(), Failure> {
    rig.wait_lu()?;
    let device = rig.device()?;
    sh(&format!(
        "head -c 8M /dev/urandom > /tmp/seed; dd if=/tmp/seed of={device} bs=1M oflag=direct conv=fsync 2>/dev/null"
    ))
    .map(drop)
}

pub(in crate::e2e) fn seed_is_there(rig: &Rig) -> Result<(), Failure> {
    rig.wait_lu()?;
    sh("cmp -n $((8 << 20)) /tmp/seed /dev/lunar/vol").map(drop)
}

fn import<'a>(flags: &[&'a str], paths: &'a [String]) -> Vec<&'a str> {
    let mut args = vec!["import"];
    args.extend(flags);
    args.extend(paths.iter().map(String::as_str));
    args
}

/// Given a group whose state directory is lost, when mgmtd starts, then it touches nothing and says what to type; an
/// import of the disks in any order brings group, LU and data back, a second one changes nothing, and they stay.
fn lost() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 4, 256, &RAID5)?;
    seed(&rig)?;
    let system = text(&rig.json(&["status"])?["system"]);
    rig.shutdown()?;
    let mut shuffled = paths.clone();
    shuffled.rotate_left(1);
    shuffled.swap(0, 2);
    unwritten(&paths, || {
        sh(&format!("rm -rf {0}; mkdir {0}", rig.state_dir()))?;
        rig.start()?;
        let line = format!("lunar import {}", paths.join(" "));
        status_says(&rig, &[&system, "(group data)", &line])?;
        ensure(
            rig.json(&["group", "list"])?
                .as_array()
                .is_some_and(Vec::is_empty),
            || "a group came back unasked".into(),
        )?;
        let said = rig.lunar(&import(&["--dry-run"], &shuffled))?;
        ensure(
            said.contains(&format!("would become Lunar system {system}")),
            || said.clone(),
        )?;
        sh("mkfs.ext4 -q -F /dev/ram12")?;
        for (args, what) in [
            (&["import", "/dev/ram12"][..], "ext4"),
            (&["import", "/dev/ram13"], "blank"),
        ] {
            refused(&rig, args, 6, &[what])?;
        }
        refused(
            &rig,
            &["import", "/dev/nonexistent"],
            2,
            &["/dev/nonexistent"],
        )
    })?;
    let said = rig.lunar(&import(&[], &shuffled))?;
    ensure(
        said.contains("group data is up") && said.contains("LU vol is up"),
        || said.clone(),
    )?;
    ensure(text(&rig.json(&["status"])?["system"]) == system, || {
        "another system".into()
    })?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    seed_is_there(&rig)?;
    let first = text(&rig.json(&["disk", "show", "1"])?["path"]);
    ensure(first == shuffled[0], || {
        format!("disk 1 is {first}, not {}", shuffled[0])
    })?;
    let again = rig.lunar(&import(&[], &paths))?;
    ensure(again.contains("unchanged"), || again.clone())?;
    // The state directory knows it from now on.
    rig.shutdown()?;
    rig.start()?;
    seed_is_there(&rig)?;
    // One disk brings the others along; all are told of.
    rig.shutdown()?;
    sh(&format!("rm -rf {0}; mkdir {0}", rig.state_dir()))?;
    rig.start()?;
    status_says(&rig, &["(group data)"])?;
    let planned = rig.lunar(&import(&["--dry-run"], &paths[2..3]))?;
    let said = rig.lunar(&import(&[], &paths[2..3]))?;
    for (at, path) in paths.iter().enumerate() {
        let plan = match at {
            2 => format!("would give {path} a number: "),
            _ => format!("would give {path} a number too: "),
        };
        ensure(planned.contains(&plan), || planned.clone())?;
        let line = match at {
            2 => format!("disk 1: {path}\n"),
            _ => format!(": {path}, which was found beside them\n"),
        };
        ensure(said.contains(&line), || said.clone())?;
    }
    seed_is_there(&rig)
}

/// Given a group whose state directory is lost and of whose members `away` are not there, when the others are imported,
/// then all its data is there; without `over` too the import says that it cannot start, and writes nothing.
fn without(
    level: &'static str,
    members: usize,
    away: &'static [usize],
    over: usize,
) -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    // Files, moved to another folder: Lunar looks at all block devices, and at the folders of the files that it is given.
    let create = ["--level", level, "--assume-clean"];
    let paths = rig.array("ext4-file", members, 64, &create)?;
    let device = rig.device()?;
    // All of it: something of every member, and of every turn of the parity.
    sh_in(
        &format!(
            "head -c $(blockdev --getsize64 {device}) /dev/urandom > /tmp/all
             dd if=/tmp/all of={device} bs=1M oflag=direct 2>/dev/null"
        ),
        100,
    )?;
    let reads_as_written = |rig: &Rig| {
        rig.wait_lu()?;
        let device = rig.device()?;
        sh_in(
            &format!(
                "dd if={device} of=/tmp/read bs=1M iflag=direct 2>/dev/null; cmp /tmp/read /tmp/all >&2"
            ),
            100,
        )
        .map(drop)
    };
    rig.shutdown()?;
    let lose_state = format!("rm -rf {0}; mkdir {0}", rig.state_dir());
    let there = |gone: &[usize]| -> Vec<String> {
        let there = paths.iter().enumerate().filter(|(i, _)| !gone.contains(i));
        there.map(|(_, path)| path.clone()).collect()
    };
    let back = |slot: usize| format!("mv $(dirname {0})/away/$(basename {0}) {0}", paths[slot]);
    let mut too_many = away.to_vec();
    too_many.push(over);
    for slot in &too_many {
        sh(&format!(
            "cd $(dirname {0}); mkdir -p away; mv {0} away/",
            paths[*slot]
        ))?;
    }
    let few = there(&too_many);
    unwritten(&few, || {
        sh(&lose_state)?;
        rig.start()?;
        let output = rig.run(&import(&[], &few))?;
        ensure(output.code != 0, || {
            format!("without {too_many:?}: {}", output.stdout)
        })?;
        ensure(sh("test -b /dev/lunar/vol || echo none")? == "none", || {
            format!("without {too_many:?} the LU is up")
        })?;
        rig.shutdown()
    })?;
    sh(&format!("{}; {lose_state}", back(over)))?;
    rig.start()?;
    let said = rig.lunar(&import(&[], &there(away)))?;
    ensure(said.contains("LU vol is up"), || said.clone())?;
    reads_as_written(&rig).map_err(|why| format!("without {away:?}: {why}"))?;
    let expected = if away.is_empty() {
        "optimal"
    } else {
        "degraded"
    };
    ensure(rig.state()?.0 == expected, || format!("{:?}", rig.state()))?;
    Ok(())
}

/// Given LUs and a group that were deleted, then an import brings them back with their data, until their space is used.
fn deleted() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    let again = rig.lunar(&import(&[], &paths))?;
    ensure(again.contains("unchanged"), || again.clone())?;
    rig.lunar(&["lu", "create", "vol", "--group", "data", "--size", "8MiB"])?;
    refused(
        &rig,
        &import(&["--deleted"], &paths),
        1,
        &["lunar lu rename vol OTHER"],
    )
    .or_else(|_| {
        // The whole group was given to the deleted one: its space is used by now.
        let said = rig.lunar(&import(&["--deleted"], &paths))?;
        ensure(said.contains("unchanged"), || said.clone())
    })?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    rig.lunar(&["lu", "create", "a", "--group", "data", "--size", "16MiB"])?;
    rig.lunar(&["lu", "create", "b", "--group", "data", "--size", "16MiB"])?;
    sh(
        "head -c 8M /dev/urandom > /tmp/a; for i in a b; do dd if=/tmp/a of=/dev/lunar/$i bs=1M oflag=direct conv=fsync 2>/dev/null; done",
    )?;
    rig.lunar(&["lu", "delete", "a", "--yes"])?;
    ensure(rig.run(&["lu", "show", "a"])?.code == 2, || {
        "LU a is still there".into()
    })?;
    let said = rig.lunar(&import(&["--deleted"], &paths))?;
    ensure(said.contains("LU a is back"), || said.clone())?;
    sh("cmp -n $((8 << 20)) /tmp/a /dev/lunar/a")?;
    rig.lunar(&["group", "delete", "data", "--yes"])?;
    let said = rig.lunar(&import(&[], &paths))?;
    ensure(said.contains("--deleted brings it back"), || said.clone())?;
    unwritten(&paths, || {
        rig.lunar(&import(&["--deleted", "--dry-run"], &paths))
            .map(drop)
    })?;
    let said = rig.lunar(&import(&["--deleted"], &paths))?;
    ensure(said.contains("group data is up"), || said.clone())?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    sh("for i in a b; do cmp -n $((8 << 20)) /tmp/a /dev/lunar/$i; done")?;
    // With one of its disks in use elsewhere it comes back without, as any group.
    rig.lunar(&["group", "delete", "data", "--yes"])?;
    rig.lunar(&["group", "create", "new", "--level", "raid0", "--disks", "3"])?;
    let said = rig.lunar(&import(&["--deleted"], &paths))?;
    ensure(said.contains("degraded"), || said.clone())?;
    sh("for i in a b; do cmp -n $((8 << 20)) /tmp/a /dev/lunar/$i; done").map(drop)
}
