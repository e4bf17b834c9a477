//! The command line on real devices: names, plans that change nothing, hooks, checks, metrics.

use serde_json::Value;

use super::rig::{Rig, members, text};
use super::shell::{Failure, sh, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "cli_rename_of_a_mounted_lu", rename);
    add(to, "cli_dry_run_changes_nothing", dry_run);
    add(to, "cli_arguments_are_numbers_names_and_links", arguments);
    add(to, "cli_hooks_run_for_a_failed_member", hooks);
    add(to, "cli_doctor_metrics_stat_and_report", looks);
    add(to, "cli_failed_group_comes_back_as_told", failed);
}

const RAID5: [&str; 3] = ["--level", "raid5", "--assume-clean"];

/// Runs `lunar ARGS`, which must exit `code` and say `what`, wherever.
fn exits(rig: &Rig, args: &[&str], code: i32, what: &str) -> Result<(), Failure> {
    let out = rig.run(args)?;
    let said = format!("{}{}", out.stdout, out.stderr);
    ensure(out.code == code && said.contains(what), || {
        let line = args.join(" ");
        format!(
            "lunar {line}: expected {code} and `{what}`: exit {}: {said}",
            out.code
        )
    })
}

/// Given a mounted LU that is being written, when it and its group are renamed, then the writer sees nothing of it, the
/// link moves, and after a restart of everything the new names stand and the data is what was written.
fn rename() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    let device = rig.device()?;
    sh("mkfs.ext4 -q /dev/lunar/vol; mkdir -p /mnt/r; mount /dev/lunar/vol /mnt/r
        (i=0; while [ ! -e /tmp/stop ] && echo $i >> /mnt/r/log; do i=$((i + 1)); sync /mnt/r/log; done; echo $? > /tmp/writer) > /dev/null 2>&1 &")?;
    until("it writes", 20, || {
        Ok(sh("cat /mnt/r/log 2>/dev/null | wc -l")? != "0")
    })?;
    rig.lunar(&["lu", "rename", "/dev/lunar/vol", "archive"])?;
    rig.lunar(&["group", "rename", &device, "store"])?;
    exits(
        &rig,
        &["lu", "rename", "archive", "archive"],
        0,
        "unchanged",
    )?;
    exits(&rig, &["group", "rename", "store", "store"], 0, "unchanged")?;
    exits(&rig, &["lu", "show", "vol"], 2, "Try:")?;
    for bad in ["1", "1-4", "A", "../x", ""] {
        exits(&rig, &["lu", "rename", "archive", bad], 2, "Try:")?;
    }
    let lines = sh("wc -l < /mnt/r/log")?;
    until("it goes on writing", 20, || {
        Ok(sh("wc -l < /mnt/r/log")? != lines)
    })?;
    let link = sh("readlink /dev/lunar/archive; test ! -e /dev/lunar/vol")?;
    ensure(link == device, || format!("{link} is not {device}"))?;
    exits(&rig, &["status"], 0, "/dev/lunar/archive")?;
    sh(
        "touch /tmp/stop; while [ ! -e /tmp/writer ]; do sleep 0.05; done; md5sum < /mnt/r/log > /tmp/sum; umount /mnt/r",
    )?;
    rig.shutdown()?;
    rig.start()?;
    until("the LU is back", 60, || {
        Ok(sh("test -b /dev/lunar/archive && echo yes || true")? == "yes")
    })?;
    let group = rig.json(&["group", "show", "store"])?;
    ensure(group["name"] == "store", || group.to_string())?;
    sh("mount /dev/lunar/archive /mnt/r; md5sum < /mnt/r/log | cmp - /tmp/sum; umount /mnt/r")
        .map(drop)
}

/// All that could have changed: tables, superblocks, devices.
fn everything(rig: &Rig) -> Result<String, Failure> {
    let mut out = String::new();
    for table in [
        ["disk", "list"],
        ["group", "list"],
        ["lu", "list"],
        ["path", "list"],
        ["job", "list"],
    ] {
        let mut rows = rig.json(&table)?;
        for row in rows.as_array_mut().into_iter().flatten() {
            // A look at what would die reads it.
            row["counters"] = serde_json::Value::Null;
        }
        out += &rows.to_string();
    }
    let events = rig.json(&["events"])?;
    out += &events.as_array().map_or(0, Vec::len).to_string();
    out += &sh(
        "ls -l /dev/lunar; for i in 0 1 2 3 4; do dd if=/dev/ram$i bs=5M count=1 iflag=direct 2>/dev/null; done | md5sum",
    )?;
    Ok(out)
}

/// Given every changing verb, when it is given with `--dry-run`, then it tells its steps and nothing is changed: no row,
/// no byte of a superblock, no device, no event.
fn dry_run() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = members("ram", 5, 256)?;
    rig.array_of(&paths[..3], &RAID5)?;
    rig.lunar(&["disk", "add", &paths[3]])?;
    rig.lunar(&["disk", "fail", "2", "--yes"])?;
    // What ublk-target tells comes a moment later.
    until("all that happened is told", 20, || {
        Ok(rig.json(&["events"])?.to_string().contains("DegradedArray"))
    })?;
    let before = everything(&rig)?;
    let table: &[(&[&str], &str)] = &[
        (&["disk", "add", &paths[4]], "would label"),
        (&["disk", "fail", "2"], "unchanged"),
        (&["disk", "replace", "2", "4"], "would put disk 4"),
        (&["disk", "remove", "4", "--wipe"], "would die"),
        (&["disk", "remove", "4"], "would forget"),
        (
            &["group", "create", "two", "--level", "raid0", "--disks", "4"],
            "would make",
        ),
        (
            &["group", "set", "data", "--rebuild-max", "1MiB"],
            "would set",
        ),
        (&["group", "start", "data"], "unchanged"),
        (&["group", "stop", "data"], "would stop"),
        (&["group", "rename", "data", "x"], "would rename"),
        (&["group", "delete", "data"], "would die"),
        (&["lu", "rename", "vol", "x"], "would rename"),
        (&["lu", "delete", "vol"], "would die"),
        (&["events", "--test"], "would record"),
        (&["shutdown"], "would stop"),
    ];
    for (args, says) in table {
        let mut args = args.to_vec();
        args.push("--dry-run");
        exits(&rig, &args, 0, says)?;
        let after = everything(&rig)?;
        ensure(before == after, || {
            format!("{args:?} changed something:\n{before}\n{after}")
        })?;
    }
    // What would be refused is refused in the plan too.
    exits(&rig, &["disk", "replace", "2", "1", "--dry-run"], 7, "Try:")?;
    exits(&rig, &["disk", "fail", "1", "--dry-run"], 3, "Try:")?;
    exits(
        &rig,
        &[
            "lu",
            "create",
            "v2",
            "--group",
            "data",
            "--size",
            "1GiB",
            "--dry-run",
        ],
        2,
        "Try:",
    )?;
    ensure(before == everything(&rig)?, || {
        "a refused plan changed something".into()
    })
}

/// Given disks and LUs named by number, range, name, link and device, then the right ones are meant; of several none if
/// one is wrong; and a repeated command says so.
fn arguments() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = members("ram", 5, 256)?;
    sh(&format!(
        "mkdir -p /tmp/links; ln -sfn {} /tmp/links/a; ln -sfn {} /tmp/links/b",
        paths[0], paths[4]
    ))?;
    rig.lunar(&[
        "disk",
        "add",
        "/tmp/links/a",
        &paths[1],
        &paths[2],
        &paths[3],
    ])?;
    exits(&rig, &["disk", "add", "/tmp/links/a"], 0, "unchanged")?;
    exits(
        &rig,
        &["disk", "add", "/tmp/links/b", "/nosuch"],
        2,
        "/nosuch",
    )?;
    ensure(
        rig.json(&["disk", "list"])?.as_array().map(Vec::len) == Some(4),
        || "one was added".into(),
    )?;
    for name in [
        "1",
        "/tmp/links/a",
        &paths[0],
        paths[0].trim_start_matches("/dev/"),
    ] {
        let disk = rig.json(&["disk", "show", name])?;
        ensure(
            disk["disk"] == 1 && !disk["links"].to_string().is_empty(),
            || format!("{name}: {disk}"),
        )?;
    }
    exits(
        &rig,
        &[
            "group",
            "create",
            "data",
            "--level",
            "raid5",
            "--disks",
            "1,/tmp/links/a,2",
        ],
        2,
        "twice",
    )?;
    rig.lunar(&[
        "group",
        "create",
        "data",
        "--level",
        "raid5",
        "--assume-clean",
        "--disks",
        "1-2,/dev/ram2",
    ])?;
    exits(
        &rig,
        &[
            "group", "create", "data", "--level", "raid5", "--disks", "1-3",
        ],
        0,
        "unchanged",
    )?;
    for lu in ["a", "b", "c"] {
        rig.lunar(&[
            "lu",
            "create",
            lu,
            "--group",
            "/tmp/links/a",
            "--size",
            "16MiB",
        ])?;
    }
    exits(
        &rig,
        &["lu", "create", "a", "--group", "1", "--size", "16MiB"],
        0,
        "unchanged",
    )?;
    let device = sh("readlink -f /dev/lunar/b")?;
    for name in ["2", "b", "/dev/lunar/b", &device] {
        let lu = rig.json(&["lu", "show", name])?;
        ensure(lu["name"] == "b", || format!("{name}: {lu}"))?;
    }
    sh("mkfs.ext4 -q /dev/lunar/b; mkdir -p /mnt/b; mount /dev/lunar/b /mnt/b")?;
    // The second is in use: the first stays too.
    exits(&rig, &["lu", "delete", "1,2", "--yes"], 7, "umount /mnt/b")?;
    ensure(
        rig.json(&["lu", "list"])?.as_array().map(Vec::len) == Some(3),
        || "one was deleted".into(),
    )?;
    sh("umount /mnt/b")?;
    exits(&rig, &["lu", "delete", "1-3"], 6, "Try:")?;
    rig.lunar(&["lu", "delete", "1-3", "--yes"])?;
    for bad in ["4-1", "1,,2", "0", "nosuch", "/tmp/links", ""] {
        exits(&rig, &["disk", "remove", bad], 2, "Try:")?;
    }
    exits(
        &rig,
        &["disk", "remove", "4,1", "--yes"],
        7,
        "member of group data",
    )?;
    let disk = rig.json(&["disk", "show", "4"])?;
    ensure(disk["state"] == "free", || disk.to_string())
}

/// Given hooks that work, fail and hang, when a member fails, then the one that works hears of it with md's words, the
/// others are told of by name, and commands are answered all the while.
fn hooks() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    sh("mkdir -p /tmp/hooks; cd /tmp/hooks
        printf '#!/bin/sh\necho \"$1 $2 $3 disk=$LUNAR_DISK\" >> /tmp/heard\n' > 10-good
        printf '#!/bin/sh\nexit 3\n' > 20-bad
        printf '#!/bin/sh\n[ \"$1\" = Fail ] || exit 0; sleep 1000 & wait\n' > 30-hangs
        printf '#!/bin/sh\necho no >> /tmp/heard\n' > 40-anybody-writes
        chmod 755 *; chmod 777 40-anybody-writes")?;
    rig.restart_with(&["--hooks-dir", "/tmp/hooks", "--hook-limit", "5"])?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    let heard = |line: &str| {
        until(line, 60, || {
            Ok(sh("cat /tmp/heard 2>/dev/null || true")?
                .lines()
                .any(|l| l == line))
        })
    };
    heard("NewArray data  disk=")?;
    rig.lunar(&["events", "--test"])?;
    heard("TestMessage data  disk=")?;
    rig.lunar(&["disk", "fail", "2", "--yes"])?;
    heard(&format!("Fail data {} disk=2", paths[1]))?;
    heard("DegradedArray data  disk=")?;
    // The one that hangs holds up nobody.
    rig.lunar(&["group", "set", "data", "--rebuild-max", "64MiB"])?;
    let events = || pairs(&rig, "events", ["name", "text"]);
    until("the hang is ended and told", 60, || {
        Ok(events()?
            .iter()
            .any(|(n, t)| n == "HookKilled" && t.contains("30-hangs Fail")))
    })?;
    let all = events()?;
    for (name, part) in [
        ("HookFailed", "20-bad"),
        ("HookRefused", "40-anybody-writes"),
    ] {
        ensure(
            all.iter().any(|(n, t)| n == name && t.contains(part)),
            || format!("no {name} {part}: {all:?}"),
        )?;
    }
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    rig.lunar(&["group", "delete", "data", "--yes"])?;
    heard("DeviceDisappeared data  disk=")?;
    let said = sh("cat /tmp/heard; ! pgrep -f '[s]leep 1000'")?;
    ensure(
        !said.contains("Hook") && !said.lines().any(|l| l == "no"),
        || said.clone(),
    )
}

/// Two fields of every row that `lunar NOUN` prints.
fn pairs(rig: &Rig, noun: &str, keys: [&str; 2]) -> Result<Vec<(String, String)>, Failure> {
    let all = rig.json(&[noun])?;
    let all = all.as_array().cloned().unwrap_or_default();
    let pair = |row: &Value| (text(&row[keys[0]]), text(&row[keys[1]]));
    Ok(all.iter().map(pair).collect())
}

/// Given a degraded group, then `doctor` fails and says what to type, `metrics` and `stat` count what is written, and
/// `report` has all of it; without mgmtd `doctor` still says what it sees.
fn looks() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("ram", 3, 256, &RAID5)?;
    let checks = |rig: &Rig| pairs(rig, "doctor", ["check", "state"]);
    let has = |all: &[(String, String)], check: &str, state: &str| {
        ensure(all.iter().any(|(c, s)| c == check && s == state), || {
            format!("no {check} {state}: {all:?}")
        })
    };
    let all = checks(&rig)?;
    for check in [
        "ublk module",
        "io_uring",
        "mgmtd",
        "ublk-target",
        "memlock",
        "run directory",
        "disks",
        "LU vol",
    ] {
        has(&all, check, "ok")?;
    }
    ensure(!all.iter().any(|(_, state)| state == "fail"), || {
        format!("{all:?}")
    })?;
    exits(&rig, &["doctor"], 0, "0 failed")?;
    sh("dd if=/dev/urandom of=/dev/lunar/vol bs=1M count=8 oflag=direct 2>/dev/null")?;
    let metric = |rig: &Rig, name: &str| -> Result<String, Failure> {
        let page = rig.lunar(&["metrics"])?;
        let line = page
            .lines()
            .find_map(|l| l.strip_prefix(name).map(|v| v.trim().to_owned()));
        line.ok_or_else(|| format!("no {name}: {page}"))
    };
    let wrote = metric(
        &rig,
        "lunar_lu_write_bytes_total{lu=\"vol\",number=\"1\",group=\"data\"}",
    )?;
    ensure(wrote == "8388608", || format!("{wrote} bytes written"))?;
    let stat = rig.json(&["stat"])?;
    let line = &stat["lus"][0];
    ensure(
        line["name"] == "vol" && line["write_bytes"] == 8_388_608.0,
        || stat.to_string(),
    )?;
    ensure(stat["members"].as_array().map(Vec::len) == Some(3), || {
        stat.to_string()
    })?;
    let idle = rig.json(&["stat", "1", "1"])?;
    ensure(
        idle["lus"][0]["write_bytes"] == 0.0 && idle["interval_ms"].is_u64(),
        || idle.to_string(),
    )?;
    rig.lunar(&["disk", "fail", "3", "--yes"])?;
    exits(&rig, &["doctor"], 1, "lunar disk replace 3")?;
    exits(&rig, &["status", "-x"], 3, "DEGRADED")?;
    let degraded = metric(&rig, "lunar_group_degraded{group=\"data\",number=\"1\"}")?;
    ensure(degraded == "1", || degraded.clone())?;
    for part in ["== status", "== doctor", "== superblocks", "DegradedArray"] {
        exits(&rig, &["report"], 0, part)?;
    }
    exits(&rig, &["disk", "locate", "1", "3"], 0, "/dev/ram2")?;
    rig.end_mgmtd("TERM")?;
    exits(&rig, &["doctor"], 1, "mgmtd cannot be reached")?;
    rig.start()?;
    rig.lunar(&["disk", "remove", "nosuch"])
        .map(drop)
        .err()
        .map_or(Err("removed".into()), |_| Ok(()))
}

/// Given a group that has failed because two members answer errors, then its LU is not said to be well, a start is refused with
/// what to type, and once the members answer again that brings the group and its data back.
fn failed() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", 3, 256, &RAID5)?;
    sh(
        "head -c 8M /dev/urandom > /tmp/seed; dd if=/tmp/seed of=/dev/lunar/vol bs=1M oflag=direct conv=fsync 2>/dev/null
        dm_error member0; dm_error member1",
    )?;
    sh("! dd if=/dev/zero of=/dev/lunar/vol bs=1M count=4 seek=16 oflag=direct 2>/dev/null")?;
    let status = rig.run(&["status"])?;
    ensure(
        status.code == 4
            && status.stdout.contains("state: FAILED")
            && !status.stdout.contains("I/O ok"),
        || format!("exit {}: {}", status.code, status.stdout),
    )?;
    let told = "lunar group stop data; lunar group start data";
    exits(&rig, &["status"], 4, told)?;
    exits(&rig, &["doctor"], 1, told)?;
    exits(&rig, &["group", "start", "data"], 4, told)?;
    sh("dm_heal member0; dm_heal member1")?;
    rig.lunar(&["group", "stop", "data"])?;
    rig.lunar(&["group", "start", "data"])?;
    sh("cmp -n $((8 << 20)) /tmp/seed /dev/lunar/vol")?;
    // The first that failed may have lost what its cache had: it is caught up.
    until(
        "all are in sync",
        60,
        || Ok(rig.run(&["status"])?.code == 0),
    )?;
    exits(&rig, &["status"], 0, "I/O ok")?;
    sh("cmp -n $((8 << 20)) /tmp/seed /dev/lunar/vol").map(drop)
}
