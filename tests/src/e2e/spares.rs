//! Hot spares, and disks that come back: who takes which place, and that nothing is lost by it.

use super::disks::identity;
use super::rig::{Rig, members, text};
use super::shell::{Failure, pause, sh, sh_in, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for level in ["raid1", "raid5"] {
        add(
            to,
            format!("spare_takes_a_failed_members_place_under_writes_{level}"),
            move || steps_in(level),
        );
    }
    add(to, "spare_shared_by_two_groups_is_taken_once", shared);
    add(to, "spare_that_is_bad_makes_way_for_the_next", bad);
    add(to, "spare_steps_in_after_mgmtd_was_down", mgmtd_down);
    add(to, "spare_fills_a_slot_that_is_missing_at_start", missing);
    add(to, "spare_role_of_a_known_disk_is_changed", role);
    add(
        to,
        "spare_disk_that_comes_back_is_caught_up_by_itself",
        back,
    );
}

const RAID5: [&str; 5] = ["--level", "raid5", "--chunk", "64KiB", "--assume-clean"];

/// Number of a disk by its path.
pub(super) fn number(rig: &Rig, path: &str) -> Result<String, Failure> {
    Ok(rig.json(&["disk", "show", path])?["disk"].to_string())
}

/// State of a disk by number or path.
pub(super) fn disk_state(rig: &Rig, disk: &str) -> Result<String, Failure> {
    Ok(text(&rig.json(&["disk", "show", disk])?["state"]))
}

/// Numbers of the disks of a group, by slot.
pub(super) fn disks_of(rig: &Rig, group: &str) -> Result<Vec<String>, Failure> {
    let group = rig.json(&["group", "show", group])?;
    let disks = group["disks"].as_array().cloned().unwrap_or_default();
    Ok(disks.iter().map(ToString::to_string).collect())
}

/// Names of all events so far, in order.
pub(super) fn events(rig: &Rig) -> Result<Vec<String>, Failure> {
    let events = rig.json(&["events"])?;
    let events = events.as_array().cloned().unwrap_or_default();
    Ok(events.iter().map(|e| text(&e["name"])).collect())
}

/// Writes 48 MiB of random bytes to the LU, and to `/tmp/content`: half of them at its start, the others one by one from
/// MiB 128 to its end, so that every part of every member has some. A small LU has all of them at its start.
pub(super) fn fill(rig: &Rig) -> Result<(), Failure> {
    let device = rig.device()?;
    sh_in(
        &format!(
            "mib=$(($(blockdev --getsize64 {device}) >> 20))
             at=24; step=1; if [ $mib -ge 200 ]; then at=128; step=$(((mib - 129) / 23)); fi
             (seq 0 23; seq $at $step $((at + 23 * step))) > /tmp/content.at
             dd if=/dev/urandom of=/tmp/content bs=1M count=48 2>/dev/null
             n=0; for at in $(cat /tmp/content.at); do
               dd if=/tmp/content of={device} bs=1M skip=$n seek=$at count=1 oflag=direct 2>/dev/null
               n=$((n + 1))
             done"
        ),
        120,
    )?;
    Ok(())
}

/// Reads it back past the page cache.
pub(super) fn compare(rig: &Rig, when: &str) -> Result<(), Failure> {
    let device = rig.device()?;
    sh_in(
        &format!(
            "set -o pipefail
             for at in $(cat /tmp/content.at); do
               dd if={device} bs=1M skip=$at count=1 iflag=direct 2>/dev/null
             done | cmp - /tmp/content"
        ),
        120,
    )
    .map_err(|why| format!("{when}: {why}\n{}", rig.log_tail()))?;
    Ok(())
}

/// Takes every member but the one in `slot` away in turn, reads everything without it, and rebuilds it from the others
/// and that one.
pub(super) fn each_other_away(rig: &Rig, slot: usize) -> Result<(), Failure> {
    let disks = disks_of(rig, "data")?;
    for (i, disk) in disks.iter().enumerate().filter(|(i, _)| *i != slot) {
        rig.lunar(&["disk", "fail", disk])?;
        compare(rig, &format!("without slot {i}"))?;
        rig.lunar(&["disk", "replace", disk, disk, "--full"])?;
        rig.wait_optimal(120)?;
    }
    compare(rig, "in the end")
}

/// Given a group with content and spares of three sizes, when a member fails under verified writes and ublk-target is
/// killed in the middle of the rebuild, then the smallest spare that fits takes the place by itself, nobody sees an
/// error, `status` and the events say it, and everything reads as written without each other member.
fn steps_in(level: &str) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let count = if level == "raid1" { 2 } else { 4 };
    rig.array(
        "dm",
        count,
        256,
        &["--level", level, "--chunk", "64KiB", "--assume-clean"],
    )?;
    let small = sh(
        "dmsetup create member5 --table '0 409600 linear /dev/ram5 0'; echo /dev/mapper/member5",
    )?;
    let fit = sh("member_make dm 6 256")?;
    let large = sh("member_make null_blk 7 300")?;
    for path in [&large, &small, &fit] {
        rig.lunar(&["disk", "add", "--role", "spare", path])?;
    }
    rig.rebuild_rate("20MiB")?;
    fill(&rig)?;
    let device = rig.device()?;
    let load = std::thread::spawn(move || {
        sh_in(
            &format!(
                "fio --name=v --filename={device} --offset=64m --size=64m --direct=1 --ioengine=io_uring --iodepth=8 \
                 --rw=randwrite --bsrange=4k-128k --blockalign=4k --verify=crc32c --verify_fatal=1 --do_verify=1 \
                 --randseed=7 --io_size=128m --rate=16m >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
            ),
            300,
        )
    });
    pause(500);
    sh("dm_error member1")?;
    let fit_number = number(&rig, &fit)?;
    until("the spare is rebuilt", 60, || {
        Ok(disk_state(&rig, &fit)? == "rebuilding")
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    let status = rig.run(&["status"])?;
    let says = format!("action: none needed, spare {fit_number} took its place");
    ensure(status.code == 3 && status.stdout.contains(&says), || {
        format!("expected exit 3 and `{says}`: {}", status.stdout)
    })?;
    let pid = rig.target_pid()?;
    sh(&format!("kill -KILL {pid}"))?;
    until("a successor", 60, || {
        Ok(rig.target_pid().is_ok_and(|new| new != pid) && rig.state().is_ok())
    })?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    rig.rebuild_rate("1GiB")?;
    rig.wait_optimal(120)?;
    let disks = disks_of(&rig, "data")?;
    ensure(disks[1] == fit_number, || format!("members are {disks:?}"))?;
    ensure(
        disk_state(&rig, &small)? == "spare" && disk_state(&rig, &large)? == "spare",
        || "the other spares were touched".into(),
    )?;
    for name in ["Fail", "MoveSpare", "RebuildStarted", "SpareActive"] {
        until(&format!("event {name}"), 30, || {
            Ok(events(&rig)?.iter().any(|e| e == name))
        })?;
    }
    // The others must not step in now.
    rig.lunar(&["disk", "add", "--role", "data", &small, &large])?;
    each_other_away(&rig, 1)
}

/// Two raid1 groups, `data` with a LU and `more`, of four RAM disks.
fn two_groups(rig: &Rig) -> Result<Vec<String>, Failure> {
    let paths = members("dm", 4, 256)?;
    rig.array_of(&paths[..2], &["--level", "raid1", "--assume-clean"])?;
    rig.lunar(&["disk", "add", &paths[2], &paths[3]])?;
    let list = paths[2..].join(",");
    rig.lunar(&[
        "group",
        "create",
        "more",
        "--level",
        "raid1",
        "--assume-clean",
        "--disks",
        &list,
    ])?;
    Ok(paths)
}

fn group_state(rig: &Rig, group: &str) -> Result<String, Failure> {
    Ok(text(&rig.json(&["group", "show", group])?["state"]))
}

/// Given two groups and one spare, when a member of each fails, then one of them takes the spare and the other stays
/// degraded; when another spare is added, then that takes the other place.
fn shared() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = two_groups(&rig)?;
    let first = sh("member_make dm 4 256")?;
    rig.lunar(&["disk", "add", "--role", "spare", &first])?;
    rig.lunar(&["disk", "fail", &paths[1]])?;
    rig.lunar(&["disk", "fail", &paths[3]])?;
    until("one group is whole again", 60, || {
        let states = [group_state(&rig, "data")?, group_state(&rig, "more")?];
        Ok(states.iter().any(|s| s == "optimal"))
    })?;
    let taken = number(&rig, &first)?;
    let both = [disks_of(&rig, "data")?, disks_of(&rig, "more")?].concat();
    ensure(both.iter().filter(|d| **d == taken).count() == 1, || {
        format!("members are {both:?}")
    })?;
    let states = [group_state(&rig, "data")?, group_state(&rig, "more")?];
    ensure(states.iter().any(|s| s == "degraded"), || {
        format!("states are {states:?}")
    })?;
    let second = sh("member_make dm 5 256")?;
    rig.lunar(&["disk", "add", "--role", "spare", &second])?;
    until("both groups are whole", 60, || {
        Ok(group_state(&rig, "data")? == "optimal" && group_state(&rig, "more")? == "optimal")
    })?;
    let both = [disks_of(&rig, "data")?, disks_of(&rig, "more")?].concat();
    ensure(both.contains(&number(&rig, &second)?), || {
        format!("members are {both:?}")
    })
}

/// Given three spares of which one fails where data goes, and one that cannot be opened, when a member fails, then
/// both are named and faulty, and the third is in sync in the end.
fn bad() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = rig.array("dm", 4, 256, &RAID5)?;
    fill(&rig)?;
    let spares: Vec<String> = sh("for i in 5 6 7; do member_make dm $i 256; done")?
        .lines()
        .map(str::to_owned)
        .collect();
    for path in &spares {
        rig.lunar(&["disk", "add", "--role", "spare", path])?;
    }
    // Behind the superblock and the configuration, in the data of every slot; and one that somebody else holds.
    sh(
        "dm_error_range member5 65536 1024; dmsetup create holder --table '0 8 linear /dev/mapper/member6 0'",
    )?;
    rig.lunar(&["disk", "fail", &paths[1]])?;
    let result = until("the third spare is in sync", 90, || {
        Ok(disk_state(&rig, &spares[2])? == "in_sync")
    });
    sh("dmsetup remove holder")?;
    result.map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    for path in &spares[..2] {
        let state = disk_state(&rig, path)?;
        ensure(state == "faulty", || format!("{path} is {state}"))?;
    }
    let named = events(&rig)?.iter().filter(|e| *e == "FailSpare").count();
    ensure(named == 2, || format!("{named} FailSpare events"))?;
    // What was only held is taken again when somebody says so.
    rig.lunar(&["disk", "add", "--role", "spare", &spares[1]])?;
    let state = disk_state(&rig, &spares[1])?;
    ensure(state == "spare", || format!("it is {state}"))?;
    rig.lunar(&["disk", "add", "--role", "data", &spares[1]])?;
    each_other_away(&rig, 1)
}

/// Given a group with a spare, when a member fails while mgmtd is down, then the spare steps in when mgmtd is back; the
/// data path never ended.
fn mgmtd_down() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("dm", 4, 256, &RAID5)?;
    let spare = sh("member_make dm 5 256")?;
    rig.lunar(&["disk", "add", "--role", "spare", &spare])?;
    fill(&rig)?;
    let pid = rig.target_pid()?;
    rig.end_mgmtd("KILL")?;
    sh(
        "dm_error member2; dd if=/tmp/content of=/dev/lunar/vol bs=1M oflag=direct conv=notrunc 2>/dev/null",
    )?;
    rig.start()?;
    until("the spare is in sync", 90, || {
        Ok(disk_state(&rig, &spare)? == "in_sync")
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    ensure(rig.target_pid()? == pid, || {
        "ublk-target was replaced".into()
    })?;
    rig.wait_optimal(60)?;
    compare(&rig, "with the spare")
}

/// Given a group that was shut down and lost a disk since, when it starts, then a spare takes the place, and also a
/// spare that is added after the start.
fn missing() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("dm", 4, 256, &RAID5)?;
    let spare = sh("member_make dm 5 256")?;
    rig.lunar(&["disk", "add", "--role", "spare", &spare])?;
    fill(&rig)?;
    rig.shutdown()?;
    sh("dm_vanish member1; blkdiscard -f /dev/ram1")?;
    rig.start()?;
    rig.wait_optimal(120)?;
    let state = disk_state(&rig, &spare)?;
    ensure(state == "in_sync", || format!("the spare is {state}"))?;
    rig.shutdown()?;
    sh("dm_vanish member3; blkdiscard -f /dev/ram3")?;
    rig.start()?;
    until("the group is up", 60, || Ok(rig.state()?.0 == "degraded"))?;
    let later = sh("member_make dm 6 256")?;
    rig.lunar(&["disk", "add", "--role", "spare", &later])?;
    rig.wait_optimal(120)?;
    compare(&rig, "with both spares")
}

/// Given known disks, when they are added with another role, then that is theirs, twice is `unchanged`, and a member
/// keeps its own.
fn role() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    rig.lunar(&["disk", "add", "/dev/ram5"])?;
    let spare = ["disk", "add", "--role", "spare", "/dev/ram5"];
    let said = rig.lunar(&spare)?;
    ensure(!said.contains("unchanged"), || said.clone())?;
    ensure(disk_state(&rig, "/dev/ram5")? == "spare", || {
        "it is no spare".into()
    })?;
    let said = rig.lunar(&spare)?;
    ensure(said.contains("unchanged"), || said.clone())?;
    let member = rig.run(&["disk", "add", "--role", "spare", &paths[0]])?;
    ensure(member.code == 7 && member.stderr.contains("Try:"), || {
        format!("exit {}: {}", member.code, member.stderr)
    })?;
    rig.lunar(&["disk", "add", "/dev/ram5"])?;
    ensure(disk_state(&rig, "/dev/ram5")? == "free", || {
        "it is no free disk".into()
    })
}

/// Given a member that vanished while the group ran, when writes went on without it, then it is missed: `status` names it
/// and what to do, also after mgmtd started again and after everything did; when it is there again under another name,
/// while all is down, then it is caught up by itself and nothing else is needed.
fn back() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    rig.array("dm", 4, 256, &RAID5)?;
    fill(&rig)?;
    sh("dm_vanish member1")?;
    fill(&rig)?;
    until(
        "the member is out",
        60,
        || Ok(rig.state()?.1[1] == "faulty"),
    )?;
    let missed = |rig: &Rig, when: &str| {
        until("it is known that it went away", 30, || {
            let (state, members) = rig.state()?;
            let status = rig.run(&["status"])?;
            Ok(state == "degraded"
                && ["faulty", "missing"].contains(&members[1].as_str())
                && status.stdout.contains("bring disk 2 back"))
        })
        .map_err(|why| format!("{when}: {why}\n{}", rig.log_tail()))?;
        compare(rig, when)
    };
    missed(&rig, "while it runs")?;
    rig.end_mgmtd("TERM")?;
    rig.start()?;
    missed(&rig, "after mgmtd started again")?;
    rig.shutdown()?;
    rig.start()?;
    until("the group is up", 60, || {
        Ok(rig.state().is_ok_and(|s| s.0 == "degraded"))
    })?;
    missed(&rig, "after everything started again")?;
    rig.shutdown()?;
    // The disk comes back as another device.
    sh("dmsetup create member9 --table \"0 $(blockdev --getsz /dev/ram1) linear /dev/ram1 0\"")?;
    rig.start()?;
    rig.wait_optimal(120)?;
    let path = text(&rig.json(&["disk", "show", "2"])?["path"]);
    ensure(identity(&path)? == identity("/dev/mapper/member9")?, || {
        format!("its path is {path}")
    })?;
    each_other_away(&rig, 1)
}
