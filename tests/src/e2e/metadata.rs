//! Superblocks damaged copy by copy, taken from another disk, and a state directory whose disk takes no write.

use std::os::unix::fs::FileExt;

use lunar_engine::superblock::{At, Superblock, decode};

use super::disks::redundancy_is_right;
use super::import::{end_copy, refused, seed, seed_is_there, status_says, unwritten};
use super::rig::Rig;
use super::shell::{Failure, sh, sh_in, until};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "metadata_each_copy_of_each_member_is_healed", each_copy);
    add(
        to,
        "metadata_member_without_a_copy_is_left_out_by_name",
        both_copies,
    );
    add(
        to,
        "metadata_superblocks_of_another_disk_are_refused",
        swapped,
    );
    add(
        to,
        "metadata_state_directory_takes_no_write",
        state_directory,
    );
}

const RAID5: [&str; 3] = ["--level", "raid5", "--assume-clean"];
/// A superblock from one disk to another, and at which 4 KiB.
type Move = (usize, usize, u64);
/// Where copy 0 is.
const START: u64 = 4096;

/// Reads a copy of a superblock from the disk, as it lies there.
fn copy(path: &str, at: u64) -> Result<Superblock, Failure> {
    let say = |error: std::io::Error| format!("{path}: {error}");
    sh(&format!("blockdev --flushbufs {path}"))?;
    let device_size = sh(&format!("blockdev --getsize64 {path}"))?;
    let file = std::fs::File::open(path).map_err(say)?;
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, at).map_err(say)?;
    let at = At {
        offset: at,
        device_size: device_size
            .parse()
            .map_err(|e| format!("{device_size}: {e}"))?,
    };
    decode(&bytes, at).map_err(|error| format!("{path}: {error}"))
}

/// Ways to damage a superblock of 4 KiB at `$at` (in 4 KiB) of `$d`.
const DAMAGE: [(&str, &str); 4] = [
    (
        "noise",
        "dd if=/dev/urandom of=$d bs=64 seek=$((at * 64 + 11)) count=1 conv=notrunc,fsync",
    ),
    (
        "zeroes",
        "dd if=/dev/zero of=$d bs=4k seek=$at count=1 conv=notrunc,fsync",
    ),
    (
        "torn",
        "dd if=/dev/zero of=$d bs=512 seek=$((at * 8 + 4)) count=4 conv=notrunc,fsync",
    ),
    (
        "one bit",
        "b=$(dd if=$d bs=1 skip=$((at * 4096 + 233)) count=1 | od -An -tu1); printf \"\\\\$(printf %o $((b ^ 1)))\" | dd of=$d bs=1 seek=$((at * 4096 + 233)) conv=notrunc,fsync",
    ),
];

fn damage(path: &str, at: u64, how: &str) -> Result<(), Failure> {
    sh(&format!(
        "d={path}; at={}; {{ {how}; }} 2>/dev/null",
        at / 4096
    ))
    .map(drop)
}

/// Given a group of which one copy of one member's superblock is damaged, for each member, each copy, and each kind of damage,
/// when it is started, then it is whole, every byte is there, the event names copy and disk, and the copy on the disk is whole
/// again.
fn each_copy() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    let end = end_copy(&paths[0])?;
    let mut round = 0;
    for path in &paths {
        for (name, at) in [("copy 0", START), ("copy 1", end)] {
            let (kind, how) = DAMAGE[round % DAMAGE.len()];
            round += 1;
            rig.shutdown()?;
            damage(path, at, how)?;
            ensure(copy(path, at).is_err(), || {
                format!("{kind} at {name} of {path} damaged nothing")
            })?;
            let told = damages(&sh(&format!("cat {}", rig.log()))?, path, name);
            rig.start()?;
            rig.wait_optimal(60)
                .map_err(|why| format!("{kind} at {name} of {path}: {why}"))?;
            seed_is_there(&rig)?;
            let events = rig.lunar(&["events"])?;
            let now = damages(&sh(&format!("cat {}", rig.log()))?, path, name);
            ensure(now == told + 1, || {
                format!(
                    "{kind} at {name} of {path} was told {} times: {events}",
                    now - told
                )
            })?;
            // A write makes the group unclean, which its superblocks say.
            seed(&rig)?;
            let healed = until("the copy is whole", 20, || Ok(copy(path, at).is_ok()));
            healed.map_err(|why| format!("{kind} at {name} of {path}: {why}"))?;
        }
    }
    Ok(())
}

/// How often the log tells of damage to that copy on that disk.
fn damages(log: &str, path: &str, name: &str) -> usize {
    let is_it = |line: &&str| {
        line.contains("SuperblockDamaged") && line.contains(path) && line.contains(name)
    };
    log.lines().filter(is_it).count()
}

/// Given a group of which both copies of one member's superblock are damaged, for each member, when it is started, then it
/// serves without that one, which is named and not written; with its own superblocks back it is caught up with what it has missed, on the disks too.
fn both_copies() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    let end = end_copy(&paths[0])?;
    for (number, path) in paths.iter().enumerate() {
        rig.shutdown()?;
        for at in [START, end] {
            let page = at / 4096;
            sh(&format!(
                "dd if={path} of=/tmp/own.{page} bs=4k skip={page} count=1 2>/dev/null"
            ))?;
            damage(path, at, DAMAGE[number % 2].1)?;
        }
        unwritten(std::slice::from_ref(path), || {
            rig.start()?;
            status_says(&rig, &["state: DEGRADED", path])?;
            seed_is_there(&rig)
        })?;
        // Its own superblocks again: it has missed something, and is not believed before it has caught up.
        seed(&rig)?;
        rig.shutdown()?;
        for at in [START, end] {
            let page = at / 4096;
            sh(&format!(
                "dd if=/tmp/own.{page} of={path} bs=4k seek={page} conv=notrunc,fsync 2>/dev/null"
            ))?;
        }
        rig.start()?;
        rig.wait_lu()?;
        if rig.state()?.0 == "degraded" {
            let disk = (number + 1).to_string();
            rig.lunar(&["disk", "replace", &disk, &disk])?;
        }
        rig.wait_optimal(100)?;
        seed_is_there(&rig)?;
        redundancy_is_right(&rig, "raid5", &paths, 16 << 20)?;
    }
    Ok(())
}

/// Given a member of which one copy of the superblock, or both, are those of another member, when the group is started, then
/// it does not serve bytes that were not written: it says which disks do not fit, and no disk is written. With its own
/// superblocks back it is as it was.
fn swapped() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 4, 256, &RAID5)?;
    seed(&rig)?;
    rig.shutdown()?;
    let end = end_copy(&paths[0])? / 4096;
    let put = |from: usize, to: usize, at: u64| {
        sh(&format!(
            "dd if=/tmp/sb.{from}.{at} of={} bs=4k seek={at} conv=notrunc,fsync 2>/dev/null",
            paths[to]
        ))
        .map(drop)
    };
    let (a, b) = (&paths[1], &paths[2]);
    // One copy: the two of a disk do not fit each other. Both on one: there are two of one disk.
    let table: [(&[Move], &[&str]); 3] = [
        (&[(1, 2, 1)], &[b]),
        (&[(1, 2, end), (2, 1, 1)], &[a, b]),
        (&[(1, 2, 1), (1, 2, end)], &[a, b]),
    ];
    for (moves, names) in table {
        for (i, path) in paths.iter().enumerate() {
            for at in [1, end] {
                sh(&format!(
                    "dd if={path} of=/tmp/sb.{i}.{at} bs=4k skip={at} count=1 2>/dev/null"
                ))?;
            }
        }
        for (from, to, at) in moves {
            put(*from, *to, *at)?;
        }
        let named: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        unwritten(&named, || {
            rig.start()?;
            status_says(&rig, names)?;
            let (state, _) = rig.state()?;
            ensure(state != "optimal", || format!("{moves:?}: {state}"))?;
            if state == "degraded" {
                seed_is_there(&rig)?;
            } else {
                refused(&rig, &["group", "start", "data"], sh_code(&rig)?, &[])?;
            }
            rig.shutdown()
        })?;
        for (_, to, at) in moves {
            put(*to, *to, *at)?;
        }
        rig.start()?;
        rig.wait_lu()?;
        if rig.state()?.0 == "degraded" {
            rig.lunar(&["disk", "replace", b, b])?;
        }
        rig.wait_optimal(100)?;
        seed_is_there(&rig)?;
        redundancy_is_right(&rig, "raid5", &paths, 16 << 20)?;
        rig.shutdown()?;
    }
    Ok(())
}

/// What a start of the group exits with.
fn sh_code(rig: &Rig) -> Result<i32, Failure> {
    Ok(rig.run(&["group", "start", "data"])?.code)
}

/// Given a state directory whose disk answers every write with an error, then a change is done and said not to be saved,
/// `status` says so, ublk-target is started again when it is killed, and I/O goes on; when the disk works again all is saved.
fn state_directory() -> Result<(), Failure> {
    let state = "/mnt/frail/state";
    sh("dm_wrap member9 /dev/ram14 > /dev/null; mkfs.ext4 -q -F -O ^has_journal /dev/mapper/member9
        mkdir -p /mnt/frail; mount /dev/mapper/member9 /mnt/frail; mkdir /mnt/frail/state")?;
    let mut rig = Rig::in_state(state)?;
    rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    sh("sync; dm_error member9")?;
    let output = rig.run(&["lu", "rename", "vol", "other"])?;
    ensure(
        output.code == 1 && output.stderr.contains("could not be saved"),
        || format!("exit {}: {}{}", output.code, output.stdout, output.stderr),
    )?;
    let status = rig.run(&["status"])?;
    ensure(
        status.code == 0 && status.stdout.contains("the state directory takes no write"),
        || format!("exit {}: {}", status.code, status.stdout),
    )?;
    let pid = rig.target_pid()?;
    sh(&format!("kill -KILL {pid}"))?;
    until("a successor serves", 60, || {
        Ok(rig.target_pid().is_ok_and(|new| new != pid)
            && rig.state().is_ok_and(|(state, _)| state == "optimal"))
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    sh("cmp -n $((8 << 20)) /tmp/seed /dev/lunar/other
        dd if=/tmp/seed of=/dev/lunar/other bs=1M oflag=direct 2>/dev/null")?;
    rig.end_mgmtd("TERM").or_else(|_| rig.end_mgmtd("KILL"))?;
    sh_in(
        "dm_heal member9; umount /mnt/frail; e2fsck -fy /dev/mapper/member9 || [ $? -le 2 ]; mount /dev/mapper/member9 /mnt/frail",
        60,
    )?;
    rig.start()?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    let name = rig.json(&["lu", "show", "other"])?;
    ensure(name["name"] == "other", || name.to_string())?;
    rig.shutdown()?;
    sh("umount /mnt/frail").map(drop)
}
