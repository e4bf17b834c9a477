//! Disks that go and come back, that are slow, that have read errors: what is done by itself, and what is said.

use super::disks::identity;
use super::rig::{Rig, text};
use super::shell::{Failure, pause, sh, sh_in, until};
use super::spares::{compare, each_other_away, events, fill};
use super::{Test, add, ensure};

const RAID5: [&str; 5] = ["--level", "raid5", "--chunk", "64KiB", "--assume-clean"];
const RAID1: [&str; 5] = ["--level", "raid1", "--chunk", "64KiB", "--assume-clean"];

pub(super) fn tests(to: &mut Vec<Test>) {
    add(
        to,
        "health_disk_that_vanishes_and_is_back_as_another_device_is_caught_up",
        || comes_back(4, &RAID5, "dm_vanish member1", ""),
    );
    add(
        to,
        "health_disk_that_gives_errors_for_a_while_is_caught_up",
        || comes_back(2, &RAID1, "dm_error member1", "dm_heal member1"),
    );
    add(
        to,
        "health_disk_that_failed_by_hand_or_by_its_own_writes_stays_out",
        stays_out,
    );
    add(to, "health_disk_that_comes_and_goes_is_given_up", given_up);
    add(
        to,
        "health_slow_disk_is_named_and_keeps_nobody_else_waiting",
        slow,
    );
    add(
        to,
        "health_read_errors_are_repaired_counted_and_fail_a_disk_with_too_many",
        read_errors,
    );
    add(
        to,
        "health_bad_blocks_of_a_rebuild_are_listed_and_come_back_by_writes",
        rebuild_over_bad_blocks,
    );
    add(
        to,
        "health_bad_blocks_that_cannot_be_rewritten_are_served_from_redundancy",
        cannot_be_rewritten,
    );
}

/// Sectors written to a device since it was made, as the kernel counts them.
fn written(device: &str) -> Result<u64, Failure> {
    counted(device, 7)
}

/// A field of what the kernel counts of a device.
fn counted(device: &str, field: u32) -> Result<u64, Failure> {
    let number = "$((0x$(stat -Lc %t $d))):$((0x$(stat -Lc %T $d)))";
    let value = sh(&format!(
        "d={device}; awk '{{print ${field}}}' /sys/dev/block/{number}/stat"
    ))?;
    value.parse().map_err(|_| format!("{device}: {value}"))
}

fn member_state(rig: &Rig, slot: usize) -> Result<String, Failure> {
    Ok(rig.state()?.1[slot].clone())
}

fn count(rig: &Rig, event: &str) -> Result<usize, Failure> {
    Ok(events(rig)?.iter().filter(|name| *name == event).count())
}

/// Given a group with content all over it under verified writes to a part of it, when a member goes away and its disk is back
/// later, under the same name or as another device, then without a command it is in its slot again and caught up: the
/// kernel saw but a part of a member written to it, nobody saw an error, an event tells it, and everything reads as
/// written without each other member.
fn comes_back(
    members: usize,
    options: &[&str],
    goes: &str,
    returns: &'static str,
) -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", members, 256, options)?;
    fill(&rig)?;
    let device = rig.device()?;
    let load = std::thread::spawn(move || {
        sh_in(
            &format!(
                "fio --name=v --filename={device} --offset=64m --size=32m --direct=1 --ioengine=io_uring --iodepth=8 \
                 --rw=randwrite --bsrange=4k-64k --blockalign=4k --verify=crc32c --verify_fatal=1 --do_verify=1 \
                 --randseed=7 --io_size=160m --rate=8m >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
            ),
            300,
        )
    });
    pause(1000);
    sh(goes)?;
    until("the member is out", 60, || {
        Ok(member_state(&rig, 1)? == "faulty")
    })?;
    until("it is known that it went away", 30, || {
        Ok(rig.run(&["status"])?.stdout.contains("bring disk 2 back"))
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    // What it misses.
    pause(3000);
    let before = match returns {
        "" => {
            sh(
                "dmsetup create member9 --table \"0 $(blockdev --getsz /dev/ram1) linear /dev/ram1 0\"; dmsetup mknodes",
            )?;
            0
        }
        heals => {
            sh(heals)?;
            written("/dev/mapper/member1")?
        }
    };
    rig.wait_optimal(60)
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    let path = text(&rig.json(&["disk", "show", "2"])?["path"]);
    let device = if returns.is_empty() {
        "/dev/mapper/member9"
    } else {
        "/dev/mapper/member1"
    };
    ensure(identity(&path)? == identity(device)?, || {
        format!("its path is {path}")
    })?;
    // 248 MiB of data; 160 MiB at most is what the load wrote, of which a part on this member.
    let sectors = written(device)? - before;
    let most = if members == 2 { 200 << 11 } else { 120 << 11 };
    ensure(sectors > 0 && sectors < most, || {
        format!("{} MiB were written to it", sectors >> 11)
    })?;
    ensure(count(&rig, "DiskReturned")? == 1, || {
        format!("events: {:?}", events(&rig))
    })?;
    compare(&rig, "after it is back")?;
    each_other_away(&rig, 1)
}

/// Given a group, when a member is failed by hand, and when another fails because it takes no writes while it still reads,
/// then neither is put back by itself, though both are sound again.
fn stays_out() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array(
        "dm",
        5,
        256,
        &["--level", "raid6", "--chunk", "64KiB", "--assume-clean"],
    )?;
    fill(&rig)?;
    rig.lunar(&["disk", "fail", "2"])?;
    // Behind its superblock, which still can be read.
    sh("dm_error_range member3 65536 400000")?;
    fill(&rig)?;
    until("it is out", 60, || Ok(member_state(&rig, 3)? == "faulty"))?;
    // For long enough that it would have been looked at.
    pause(4000);
    sh("dm_heal member3")?;
    pause(12_000);
    let (_, states) = rig.state()?;
    ensure(states[1] == "faulty" && states[3] == "faulty", || {
        format!("{states:?}\n{}", rig.log_tail())
    })?;
    ensure(count(&rig, "DiskReturned")? == 0, || {
        "an event says otherwise".into()
    })?;
    let status = rig.run(&["status"])?.stdout;
    ensure(status.contains("lunar disk replace 2 2"), || status.clone())?;
    compare(&rig, "without both")
}

/// Given a disk that goes away again whenever it is back, when that was three times, then it is left out, and `status` says
/// what to see to and what to type; that brings it back.
fn given_up() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", 3, 256, &RAID5)?;
    fill(&rig)?;
    for round in 1..=4 {
        sh("dm_error member1")?;
        fill(&rig)?;
        until("it is out", 60, || Ok(member_state(&rig, 1)? == "faulty"))?;
        let says = if round < 4 {
            "bring disk 2 back"
        } else {
            "disk 2 went away 3 times"
        };
        until("it is known that it went away", 30, || {
            Ok(rig.run(&["status"])?.stdout.contains(says))
        })
        .map_err(|why| format!("round {round}: {why}\n{}", rig.log_tail()))?;
        sh("dm_heal member1")?;
        if round < 4 {
            rig.wait_optimal(60)
                .map_err(|why| format!("round {round}: {why}\n{}", rig.log_tail()))?;
        }
    }
    pause(12_000);
    ensure(member_state(&rig, 1)? == "faulty", || {
        "it was put back".into()
    })?;
    ensure(count(&rig, "DiskReturned")? == 3, || {
        format!("{:?}", events(&rig))
    })?;
    rig.lunar(&["disk", "replace", "2", "2"])?;
    rig.wait_optimal(60)?;
    each_other_away(&rig, 1)
}

/// Reads of a part of the LU for some seconds; answers the longest in milliseconds, and how many there were.
fn reads(device: &str, at: &str, seconds: u32, depth: u32) -> Result<(f64, f64), Failure> {
    let out = sh_in(
        &format!(
            "fio --name=r --filename={device} --offset={at} --size=64k --direct=1 --ioengine=io_uring \
             --iodepth={depth} --rw=randread --bs=4k --time_based --runtime={seconds} --output-format=json \
             | jq -r '.jobs[0].read | \"\\(.clat_ns.max) \\(.total_ios)\"'"
        ),
        u64::from(seconds) * 2 + 60,
    )?;
    let mut numbers = out.split_whitespace().filter_map(|n| n.parse::<f64>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(longest), Some(count)) => Ok((longest / 1e6, count)),
        _ => Err(format!("fio says: {out}")),
    }
}

/// Given a raid5 under reads, when one of its disks takes 800 ms for each I/O, then reads of the others take no part of that
/// while many wait for it, and after some time `status` and an event name it, and what to type; when it is fast
/// again, then the name ends. The kernel counts that the slow disk was read at all.
fn slow() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", 4, 256, &RAID5)?;
    fill(&rig)?;
    let device = rig.device()?;
    let read = || counted("/dev/mapper/member1", 1);
    let load = |seconds: u32| {
        let device = device.clone();
        // Stripe by stripe all members.
        std::thread::spawn(move || {
            sh_in(
                &format!(
                    "fio --name=l --filename={device} --offset=1m --size=64m --direct=1 --ioengine=io_uring \
                     --iodepth=16 --rw=randread --bs=4k --time_based --runtime={seconds} >/tmp/load.out 2>&1"
                ),
                u64::from(seconds) * 2 + 60,
            )
        })
    };
    sh("dm_delay member1 800")?;
    let before = read()?;
    let all = load(60);
    // The first stripe: its first chunk is on the first member, its second on the second.
    let (longest, count) = reads(&device, "0", 10, 1)?;
    ensure(longest < 700.0 && count > 200.0, || {
        format!("{count} reads of another disk, the longest took {longest} ms")
    })?;
    let (longest, _) = reads(&device, "64k", 5, 1)?;
    ensure(longest >= 800.0, || {
        format!("the slow disk took {longest} ms at most")
    })?;
    ensure(read()? > before + 50, || {
        "the slow disk was not read".into()
    })?;
    until("it is named", 60, || {
        let status = rig.run(&["status"])?;
        let says = status.stdout.contains("disk 2 (slot 1) is slow");
        Ok(says && status.stdout.contains("lunar disk replace 2 NEW") && status.code == 0)
    })
    .map_err(|why| {
        format!(
            "{why}\n{}\n{}",
            rig.run(&["status"]).map_or(String::new(), |s| s.stdout),
            rig.log_tail()
        )
    })?;
    ensure(super::health::count(&rig, "SlowDisk")? == 1, || {
        format!("{:?}", events(&rig))
    })?;
    let doctor = rig.run(&["doctor"])?.stdout;
    ensure(doctor.contains("is slow"), || doctor.clone())?;
    all.join().map_err(|_| "thread")??;
    sh("dm_heal member1")?;
    let all = load(40);
    until("its name ends", 60, || {
        Ok(!rig.run(&["status"])?.stdout.contains("is slow"))
    })?;
    all.join().map_err(|_| "thread")??;
    until("that is told", 20, || {
        Ok(super::health::count(&rig, "SlowDiskEnded")? == 1)
    })
}

/// Given a disk some blocks of which cannot be read until they are written, and a most of 5 read errors, when they are read
/// one after the other, then nobody sees an error, each is written anew (the disk has none any more), `status` and `disk
/// show` count them; the sixth fails the disk, which stays out.
fn read_errors() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", 4, 256, &RAID5)?;
    rig.lunar(&["group", "set", "data", "--read-errors-max", "5"])?;
    fill(&rig)?;
    let group = rig.json(&["group", "show", "data"])?;
    ensure(group["read_errors_max"] == 5, || {
        format!("{}", group["read_errors_max"])
    })?;
    let data = group["members"][1]["data_offset"]
        .as_u64()
        .ok_or("no data offset")?;
    sh(
        "dm_table member1 \"0 $(dm_sectors member1) dust /dev/ram1 0 4096\" && dmsetup message member1 0 enable",
    )?;
    let bad = || {
        sh(
            "dmsetup message member1 0 countbadblocks 2>&1 | grep -o '[0-9]* badblock' | cut -d' ' -f1",
        )
    };
    // Of stripes where this member has the second chunk of data, 4 MiB of it apart.
    let spoil = |n: u64| -> Result<(), Failure> {
        let block = (data + n * (4 << 20)) / 4096 + 3;
        sh(&format!("dmsetup message member1 0 addbadblock {block}"))?;
        ensure(bad()? == "1", || "it has no bad block".into())?;
        let at = n * 64 * 3;
        let device = rig.device()?;
        sh(&format!(
            "dd if={device} of=/dev/null bs=64k skip={at} count=3 iflag=direct 2>/dev/null"
        ))?;
        Ok(())
    };
    for n in 0..5 {
        spoil(n)?;
        ensure(bad()? == "0", || format!("block {n} was not written anew"))?;
        pause(1200);
    }
    let status = rig.run(&["status"])?;
    let says = "disk 2 (slot 1) had 5 read errors lately, all repaired, more than 5 would fail it";
    ensure(status.code == 0 && status.stdout.contains(says), || {
        status.stdout.clone()
    })?;
    let disk = rig.json(&["disk", "show", "2"])?;
    ensure(
        disk["errors_lately"] == 5 && disk["repaired"].as_u64() >= Some(5),
        || disk.to_string(),
    )?;
    let metrics = rig.run(&["metrics"])?.stdout;
    ensure(metrics.contains("member_repaired_grains"), || {
        metrics.clone()
    })?;
    spoil(5)?;
    until(
        "it is failed",
        20,
        || Ok(member_state(&rig, 1)? == "faulty"),
    )?;
    let status = rig.run(&["status"])?.stdout;
    ensure(status.contains("6 read errors lately, more than 5"), || {
        status.clone()
    })?;
    pause(10_000);
    ensure(member_state(&rig, 1)? == "faulty", || {
        "it was put back".into()
    })?;
    compare(&rig, "without it")
}

/// Reads a block of 4 KiB of the LU past the page cache: as a checksum, or the error.
fn block(device: &str, block: u64) -> Result<String, Failure> {
    sh(&format!(
        "set -o pipefail; dd if={device} bs=4k skip={block} count=1 iflag=direct 2>/dev/null | md5sum || echo EIO"
    ))
    .map(|text| text.lines().last().unwrap_or_default().to_owned())
}

fn bad_blocks(rig: &Rig, disk: &str) -> Result<u64, Failure> {
    let disk = rig.json(&["disk", "show", disk])?;
    Ok(disk["bad_blocks"].as_u64().unwrap_or(u64::MAX))
}

fn data_offset(rig: &Rig, slot: usize) -> Result<u64, Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    let offset = group["members"][slot]["data_offset"].as_u64();
    offset.ok_or_else(|| "no data offset".into())
}

/// Given a mirror with content, one disk of which cannot read three blocks, when the other is replaced, then the rebuild ends;
/// `status` and `disk show` count three bad blocks; exactly those blocks are errors, also after a kill of ublk-target, and
/// everything else is as written. A write of a block brings it back; so does a scrub once the disk reads the others again.
fn rebuild_over_bad_blocks() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", 2, 256, &RAID1)?;
    fill(&rig)?;
    let device = rig.device()?;
    let data = data_offset(&rig, 0)?;
    let lost = [5, 700, 3000];
    let before: Vec<String> =
        (lost.iter().map(|b| block(&device, *b))).collect::<Result<_, _>>()?;
    let spare = sh("member_make dm 2 256")?;
    rig.lunar(&["disk", "add", &spare])?;
    rig.lunar(&["disk", "fail", "2"])?;
    sh(
        "dm_table member0 \"0 $(dm_sectors member0) dust /dev/ram0 0 4096\" && dmsetup message member0 0 enable",
    )?;
    for block in lost {
        let at = data / 4096 + block;
        sh(&format!("dmsetup message member0 0 addbadblock {at}"))?;
    }
    rig.lunar(&["disk", "replace", "2", "3"])?;
    rig.wait_optimal(120)?;
    let check = |lost: &[u64], when: &str| -> Result<(), Failure> {
        let count = bad_blocks(&rig, "3")?;
        ensure(count == lost.len() as u64, || {
            format!("{when}: {count} bad blocks")
        })?;
        let errors = sh_in(
            &format!(
                "gives() {{ dd if={device} of=/tmp/block bs=$1k skip=$2 count=1 iflag=direct 2>/dev/null; }}
                 for c in $(seq 0 255); do gives 64 $c || for b in $(seq $((c * 16)) $((c * 16 + 15))); do
                   gives 4 $b || echo $b
                 done; done | tr '\\n' ' '"
            ),
            200,
        )?;
        let expected: Vec<String> = lost.iter().map(u64::to_string).collect();
        ensure(errors.trim() == expected.join(" "), || {
            format!("{when}: errors at {errors}, not at {expected:?}")
        })
    };
    check(&lost, "after the rebuild")?;
    let status = rig.run(&["status"])?;
    ensure(
        status.stdout.contains("disk 3 (slot 1) has 3 bad blocks"),
        || status.stdout.clone(),
    )?;
    ensure(count(&rig, "BadBlocks")? > 0, || "no event".into())?;
    sh(&format!("kill -9 {}", rig.target_pid()?))?;
    rig.wait_lu()?;
    rig.wait_optimal(60)?;
    check(&lost, "after a kill")?;
    sh(&format!(
        "dd if=/tmp/content of={device} bs=4k skip=5 seek=5 count=1 oflag=direct 2>/dev/null"
    ))?;
    check(&lost[1..], "after a write")?;
    ensure(block(&device, 5)? == before[0], || "another content".into())?;
    for block in lost {
        let at = data / 4096 + block;
        sh(&format!(
            "dmsetup message member0 0 removebadblock {at} || true"
        ))?;
    }
    rig.lunar(&["group", "scrub", "data", "--repair", "--wait"])?;
    check(&[], "after a scrub")?;
    compare(&rig, "in the end")?;
    rig.lunar(&["disk", "fail", "1"])?;
    compare(&rig, "without the first disk")
}

/// Given a group with content and a disk that neither reads nor writes eight of its blocks, when everything is read, then nobody
/// sees an error, the disk stays, its blocks are listed, and it is not asked for them again, also after a kill of
/// ublk-target.
fn cannot_be_rewritten() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("dm", 4, 256, &RAID5)?;
    fill(&rig)?;
    let data = data_offset(&rig, 1)?;
    // Eight blocks that are this member's chunk of the first stripe: the second chunk of its data.
    sh(&format!("dm_error_range member1 {} 64", data / 512 + 16))?;
    compare(&rig, "with blocks that are errors")?;
    let listed = bad_blocks(&rig, "2")?;
    ensure(listed == 8, || {
        format!("{listed} bad blocks\n{}", rig.log_tail())
    })?;
    ensure(rig.state()?.0 == "optimal", || "not optimal".into())?;
    let reads = || -> Result<u64, Failure> {
        let disk = rig.json(&["disk", "show", "2"])?;
        Ok(disk["read_errors"].as_u64().unwrap_or(u64::MAX))
    };
    let before = reads()?;
    compare(&rig, "again")?;
    ensure(reads()? == before, || "it was asked again".into())?;
    sh(&format!("kill -9 {}", rig.target_pid()?))?;
    rig.wait_lu()?;
    compare(&rig, "after a kill")?;
    ensure(bad_blocks(&rig, "2")? == 8 && reads()? == 0, || {
        "the list is forgotten".into()
    })?;
    // A write of them fails, as any write: that fails the disk, and nothing is lost.
    let device = rig.device()?;
    sh(&format!(
        "dd if=/tmp/content of={device} bs=1M count=1 oflag=direct 2>/dev/null"
    ))?;
    ensure(member_state(&rig, 1)? == "faulty", || {
        "a write error".into()
    })?;
    compare(&rig, "without it")
}
