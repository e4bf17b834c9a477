//! Disks that are not what the tables say: the state directory lost, disks of another system, copies, older copies, two
//! sides. Each is answered by name, and no answer writes to a disk.

use lunar_engine::superblock::crc32c;

use super::rig::{Rig, members, text};
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
    add(to, "import_disks_of_another_system", another_system);
    add(to, "import_take_over_killed_half_way", half_taken);
    add(to, "import_copies_of_disks", copies);
    add(to, "import_damaged_cut_and_grown_disks", damaged);
    add(to, "import_two_generations_and_two_sides", generations);
    add(to, "import_deleted_lus_and_groups", deleted);
    add(to, "import_state_directory_full", full);
    add(to, "import_tables_that_rotted_are_told", rotted);
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
fn unwritten<T>(paths: &[String], what: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let before = bytes_of(paths)?;
    let done = what()?;
    ensure(bytes_of(paths)? == before, || {
        format!("{} were written", paths.join(", "))
    })?;
    Ok(done)
}

/// Runs `lunar ARGS`, which must exit `code`, say all of `what`, and what to type.
fn refused(rig: &Rig, args: &[&str], code: i32, what: &[&str]) -> Result<(), Failure> {
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
fn status_says(rig: &Rig, what: &[&str]) -> Result<(), Failure> {
    let mut said = String::new();
    until("the status", 60, || {
        said = rig.run(&["status"])?.stdout;
        Ok(what.iter().all(|what| said.contains(what)))
    })
    .map_err(|why| format!("{why} has {what:?}: {said}\n{}", rig.log_tail()))
}

fn seed(rig: &Rig) -> Result<(), Failure> {
    rig.wait_lu()?;
    let device = rig.device()?;
    sh(&format!(
        "head -c 8M /dev/urandom > /tmp/seed; dd if=/tmp/seed of={device} bs=1M oflag=direct conv=fsync 2>/dev/null"
    ))
    .map(drop)
}

fn seed_is_there(rig: &Rig) -> Result<(), Failure> {
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
fn another_system() -> Result<(), Failure> {
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
        rig.lunar(&[
            "group",
            "create",
            "other",
            "--level",
            "raid1",
            "--disks",
            "1,2",
            "--assume-clean",
        ])?;
        rig.lunar(&["lu", "create", "well", "--group", "other", "--size", "max"])?;
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
fn half_taken() -> Result<(), Failure> {
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

/// Given a copy of one member, or of all, then none of the twins is used and both are named; a copy that becomes a new disk
/// is no copy any more. A group that runs goes on with its own.
fn copies() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    rig.shutdown()?;
    let all: Vec<String> = (0..3)
        .chain(8..11)
        .map(|i| format!("/dev/ram{i}"))
        .collect();
    for copied in [&[1][..], &[0, 2]] {
        for i in copied {
            sh(&format!(
                "dd if=/dev/ram{i} of=/dev/ram{} bs=1M conv=sparse 2>/dev/null",
                i + 8
            ))?;
        }
        unwritten(&all, || {
            rig.start()?;
            status_says(
                &rig,
                &["state: STOPPED", "/dev/ram1 and /dev/ram9", "--as-new"],
            )?;
            refused(
                &rig,
                &["group", "start", "data"],
                6,
                &["/dev/ram1", "/dev/ram9"],
            )?;
            refused(
                &rig,
                &import(&[], &all[1..2]),
                6,
                &["/dev/ram1", "/dev/ram9"],
            )?;
            rig.shutdown()
        })?;
    }
    rig.start()?;
    refused(
        &rig,
        &["disk", "add", "--as-new", "/dev/ram9"],
        6,
        &["a copy of /dev/ram1"],
    )?;
    rig.lunar(&[
        "disk",
        "add",
        "--as-new",
        "--yes",
        "/dev/ram8",
        "/dev/ram9",
        "/dev/ram10",
    ])?;
    rig.lunar(&["group", "start", "data"])?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    seed_is_there(&rig)?;
    sh("dd if=/dev/ram2 of=/dev/ram12 bs=1M conv=sparse 2>/dev/null")?;
    rig.end_mgmtd("TERM")?;
    rig.start()?;
    status_says(
        &rig,
        &["state: optimal", "/dev/ram12 is a copy of /dev/ram2"],
    )?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    ensure(paths.len() == 3, || "three members".into())?;
    seed_is_there(&rig)
}

/// Changes the superblock at byte `at` of a disk, with a right checksum.
fn rewrite(path: &str, at: u64, change: impl FnOnce(&mut [u8])) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    let say = |error: std::io::Error| format!("{path}: {error}");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(say)?;
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, at).map_err(say)?;
    change(&mut bytes);
    bytes[8..12].fill(0);
    let crc = crc32c(&bytes);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&bytes, at).map_err(say)?;
    file.sync_all().map_err(say)
}

/// Where the second superblock of a disk is.
fn end_copy(path: &str) -> Result<u64, Failure> {
    let text = sh(&format!(
        "dd if={path} bs=1 skip=$((4096 + 320)) count=8 2>/dev/null | od -An -tu8"
    ))?;
    text.trim()
        .parse()
        .map_err(|error| format!("{path}: {text}: {error}"))
}

/// Given a disk with one damaged superblock of its two, a larger one, one of a future Lunar, and one that was cut short:
/// then the first two serve as they are; the others are named, left as they are, and the group goes on without.
fn damaged() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = members("ext4-file", 3, 96)?;
    rig.array_of(&paths, &RAID5)?;
    seed(&rig)?;
    let victim = paths[1].clone();
    let end = end_copy(&victim)?;
    for at in [4096, end] {
        rig.shutdown()?;
        sh(&format!(
            "dd if=/dev/urandom of={victim} bs=1 seek={} count=64 conv=notrunc,fsync 2>/dev/null",
            at + 700
        ))?;
        rig.start()?;
        rig.wait_optimal(60)?;
        let events = rig.lunar(&["events"])?;
        let copy = if at == 4096 { "copy 0" } else { "copy 1" };
        ensure(
            events.contains("SuperblockDamaged") && events.contains(copy),
            || events.clone(),
        )?;
        seed(&rig)?;
    }
    rig.shutdown()?;
    sh(&format!("truncate -s +32M {victim}"))?;
    rig.start()?;
    rig.wait_optimal(60)?;
    seed_is_there(&rig)?;
    // From here on without it, each time from the same bytes.
    rig.shutdown()?;
    let put = paths
        .iter()
        .map(|p| format!("cp --sparse=always $d/{0} {p}; ", name(p)))
        .collect::<String>();
    sh(&format!(
        "d=/tmp/kept; mkdir -p $d; cp --sparse=always {} $d/",
        paths.join(" ")
    ))?;
    for (what, says) in [("future", "format version 2"), ("cut", "cut off")] {
        sh(&format!("d=/tmp/kept; {put}"))?;
        if what == "future" {
            for at in [4096, end] {
                rewrite(&victim, at, |bytes| bytes[12] = 2)?;
            }
        } else {
            sh(&format!("truncate -s 80M {victim}"))?;
        }
        unwritten(std::slice::from_ref(&victim), || {
            if what == "future" {
                rig.start()?;
            } else {
                // The witness has seen the group without it.
                sh(&format!("rm -rf {0}; mkdir {0}", rig.state_dir()))?;
                rig.start()?;
                let said = rig.lunar(&import(&[], &paths))?;
                ensure(said.contains(says) && said.contains("degraded"), || {
                    said.clone()
                })?;
            }
            status_says(&rig, &["state: DEGRADED", &victim, says])?;
            refused(&rig, &["import", &victim], 6, &[says])?;
            seed_is_there(&rig)?;
            rig.shutdown()
        })?;
    }
    Ok(())
}

fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// Keeps a sparse copy of a RAM disk, or puts it back.
fn keep(disk: u32, to: &str) -> Result<(), Failure> {
    sh(&format!("dd if=/dev/ram{disk} of=/tmp/{to} bs=1M conv=sparse 2>/dev/null; truncate -s 256M /tmp/{to}")).map(drop)
}

fn put(disk: u32, from: &str) -> Result<(), Failure> {
    sh(&format!(
        "dd if=/tmp/{from} of=/dev/ram{disk} bs=1M conv=fsync 2>/dev/null"
    ))
    .map(drop)
}

/// Given half the members from an older copy, or two halves that were used apart, then the group does not start, the disks
/// are named, and nothing is written, with the state directory and without; a side is chosen by a person.
fn generations() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 4, 256, &RAID5)?;
    rig.shutdown()?;
    keep(0, "old0")?;
    keep(1, "old1")?;
    rig.start()?;
    seed(&rig)?;
    rig.shutdown()?;
    put(0, "old0")?;
    put(1, "old1")?;
    unwritten(&paths, || {
        rig.start()?;
        status_says(
            &rig,
            &[
                "state: STOPPED",
                "/dev/ram0 (slot 0) is an older copy",
                "/dev/ram1 (slot 1) is an older copy",
            ],
        )?;
        rig.shutdown()?;
        sh(&format!("mv {0} {0}.a; mkdir {0}", rig.state_dir()))?;
        rig.start()?;
        refused(
            &rig,
            &import(&[], &paths),
            3,
            &["group data does not start", "older copy"],
        )?;
        rig.shutdown()?;
        sh(&format!("rm -rf {0}; mv {0}.a {0}", rig.state_dir()))
    })?;
    rig.start()?;
    rig.lunar(&["group", "delete", "data", "--yes"])?;
    sides(&mut rig)
}

/// Two disks of a raid1, each used without the other.
fn sides(rig: &mut Rig) -> Result<(), Failure> {
    rig.lunar(&[
        "group",
        "create",
        "data",
        "--level",
        "raid1",
        "--disks",
        "1,2",
        "--assume-clean",
    ])?;
    rig.lunar(&["lu", "create", "vol", "--group", "data", "--size", "max"])?;
    let paths = ["/dev/ram0", "/dev/ram1"].map(String::from);
    let hide = "blkdiscard /dev/ram";
    rig.shutdown()?;
    keep(0, "both0")?;
    keep(1, "both1")?;
    sh(&format!("{hide}1"))?;
    rig.start()?;
    until("degraded", 30, || Ok(rig.state()?.0 == "degraded"))?;
    seed(rig)?;
    rig.shutdown()?;
    keep(0, "one")?;
    sh(&format!("{hide}0"))?;
    put(1, "both1")?;
    rig.start()?;
    refused(
        rig,
        &["group", "start", "data"],
        6,
        &["older than what was seen last"],
    )?;
    rig.lunar(&["group", "start", "data", "--force", "--yes"])?;
    sh("dd if=/dev/urandom of=/dev/lunar/vol bs=1M count=4 oflag=direct conv=fsync 2>/dev/null")?;
    rig.shutdown()?;
    put(0, "one")?;
    unwritten(&paths, || {
        rig.start()?;
        status_says(
            rig,
            &[
                "state: STOPPED",
                "/dev/ram0",
                "/dev/ram1",
                "lunar group resolve data --keep DISK",
            ],
        )?;
        refused(
            rig,
            &["group", "resolve", "data", "--keep", "1"],
            6,
            &["/dev/ram1 wrote apart from /dev/ram0"],
        )?;
        refused(
            rig,
            &["group", "resolve", "data", "--keep", "nosuch"],
            2,
            &["nosuch"],
        )?;
        rig.lunar(&["group", "resolve", "data", "--keep", "1", "--dry-run"])
            .map(drop)
    })?;
    rig.lunar(&["group", "resolve", "data", "--keep", "1", "--yes"])?;
    seed_is_there(rig)?;
    ensure(rig.state()?.0 == "degraded", || {
        format!("{:?}", rig.state())
    })?;
    // The other side is stale for good, and becomes a member again.
    rig.shutdown()?;
    rig.start()?;
    until("degraded", 30, || Ok(rig.state()?.0 == "degraded"))?;
    rig.lunar(&["disk", "replace", "2", "2", "--yes"])?;
    rig.wait_optimal(60)?;
    seed_is_there(rig)
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

/// Given a state directory on a small file system that fills up, then commands and `status` say so, I/O goes on, and
/// nothing is lost once there is room.
fn full() -> Result<(), Failure> {
    let state = "/mnt/small/state";
    sh(
        "mkfs.ext4 -q -F -O ^has_journal /dev/ram14 32M; mkdir -p /mnt/small; mount /dev/ram14 /mnt/small; mkdir /mnt/small/state",
    )?;
    let mut rig = Rig::in_state(state)?;
    rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    let fill = "dd if=/dev/zero of=/mnt/small/fill bs=4k 2>/dev/null || true; sync; df /mnt/small | tail -n 1";
    sh(fill)?;
    // There is room inside the file for some; then a change is done, and said not to be saved.
    let mut last = String::new();
    until("the state directory is full", 100, || {
        for names in [["vol", "other"], ["other", "vol"]] {
            let output = rig.run(&["lu", "rename", names[0], names[1]])?;
            last = format!("exit {}: {}{}", output.code, output.stdout, output.stderr);
            if output.code != 0 {
                return Ok(output.code == 1 && output.stderr.contains("Try: df"));
            }
        }
        sh(fill)?;
        Ok(false)
    })
    .map_err(|why| format!("{why}: {last}"))?;
    let status = rig.run(&["status"])?;
    ensure(
        status.code == 0 && status.stdout.contains("the state directory takes no write"),
        || format!("exit {}: {}", status.code, status.stdout),
    )?;
    sh(
        "dd if=/dev/urandom of=$(ls /dev/lunar/* | head -n 1) bs=1M count=4 oflag=direct 2>/dev/null",
    )?;
    rig.end_mgmtd("TERM").or_else(|_| rig.end_mgmtd("KILL"))?;
    sh_in("rm /mnt/small/fill", 30)?;
    rig.start()?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    rig.shutdown()?;
    sh("umount /mnt/small").map(drop)
}

/// Given tables with bytes that rotted, whichever, when mgmtd starts, then it reads what it had saved, or says what to type
/// and ends; that done, numbers, group, LU and data are there.
fn rotted() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    let disks = rig.json(&["disk", "list"])?;
    rig.shutdown()?;
    let state = rig.state_dir().to_owned();
    let bin = std::env::current_exe().map_err(|error| error.to_string())?;
    let bin = bin.parent().ok_or("no directory")?.display().to_string();
    sh(&format!("cp {state}/lunar.redb /tmp/whole.redb"))?;
    let mut refused = 0;
    for page in 0..12 {
        sh(&format!(
            "cp /tmp/whole.redb {state}/lunar.redb
             dd if=/dev/urandom of={state}/lunar.redb bs=1 seek=$(({page} * 4096 + 64)) count=512 conv=notrunc 2>/dev/null
             {bin}/mgmtd --state-dir {state} > /tmp/rotted.log 2>&1 & pid=$!
             up=yes
             until {bin}/lunar status > /dev/null 2>&1; [ $? -ne 5 ]; do
                 [ -e /proc/$pid ] || {{ up=no; break; }}; sleep 0.05
             done
             echo $up > /tmp/rotted.up; [ $up = yes ] || {{ rc=0; wait $pid || rc=$?; echo $rc > /tmp/rotted.rc; }}"
        ))?;
        if sh("cat /tmp/rotted.up")? == "yes" {
            rig.wait_lu()?;
            ensure(rig.json(&["disk", "list"])? == disks, || {
                format!("page {page}: the numbers are others")
            })?;
            rig.lunar(&["shutdown"])?;
            continue;
        }
        refused += 1;
        let said = sh("cat /tmp/rotted.rc /tmp/rotted.log")?;
        ensure(said.starts_with("1\n") && said.contains("Try: mv "), || {
            format!("page {page}: {said}")
        })?;
    }
    ensure(refused > 0, || "nothing was refused".into())?;
    sh(&format!("mv {state}/lunar.redb {state}/lunar.redb.bad"))?;
    rig.start()?;
    seed_is_there(&rig)?;
    ensure(rig.json(&["disk", "list"])? == disks, || {
        "the numbers are others".into()
    })
}
