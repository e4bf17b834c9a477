//! Several queues of a LU, several LUs of a group: all of them at once, and none at another's cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::blocks::{self, Random};
use super::data::counter;
use super::rig::Rig;
use super::shell::{Failure, pause, sh, sh_in, until};
use super::{LONG, Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for (level, count) in [("raid0", 3), ("raid1", 2), ("raid5", 4)] {
        add(
            to,
            format!("queues_two_serve_verified_data_{level}"),
            move || verified(level, count),
        );
    }
    for (level, count) in [("raid1", 3), ("raid5", 4)] {
        add(
            to,
            format!("queues_never_read_a_stale_member_{level}"),
            move || stale(level, count),
        );
    }
    add(to, "queues_survive_a_kill_under_load", killed);
    add(to, "queues_are_set_on_a_lu_that_nobody_holds", set);
    add(to, "queues_tell_of_errors_each", errors);
    add(to, format!("{LONG}queues_hang_on_no_member"), hung);
    add(to, "queues_of_two_lus_do_not_stall_each_other", two_lus);
    add(
        to,
        "queues_of_sixteen_lus_at_once_hold_what_was_written",
        sixteen,
    );
}

const CREATE: [&str; 3] = ["--chunk", "64KiB", "--assume-clean"];

/// A group of the level, and its LU `vol` with two queues.
fn two_queues(kind: &str, level: &str, count: usize) -> Result<(Rig, Vec<String>), Failure> {
    let rig = Rig::new()?;
    let mut create = vec!["--level", level];
    create.extend(CREATE);
    let paths = rig.array(kind, count, 256, &create)?;
    rig.lunar(&["lu", "set", "vol", "--queues", "2"])?;
    let device = rig.device()?;
    let kernel = sh(&format!("ls /sys/block/$(basename {device})/mq | wc -l"))?;
    let shown = rig.json(&["lu", "show", "vol"])?["queues_served"].clone();
    ensure(kernel == "2" && shown == 2, || {
        format!("the kernel has {kernel} queues, lu show says {shown}")
    })?;
    Ok((rig, paths))
}

/// Queue threads of ublk-target, and the ticks that they have worked.
fn queue_threads(rig: &Rig) -> Result<(u64, u64), Failure> {
    let pid = rig.target_pid()?;
    let said = sh(&format!(
        "for d in /proc/{pid}/task/*; do [[ $(cat $d/comm) != q1-* ]] || cat $d/stat; done \
         | awk '{{n++; t += $14 + $15}} END {{print n + 0, t + 0}}'"
    ))?;
    let (threads, ticks) = said.split_once(' ').ok_or("no threads")?;
    let number = |text: &str| text.parse().map_err(|_| format!("`{text}`"));
    Ok((number(threads)?, number(ticks)?))
}

fn allocated(rig: &Rig) -> Result<u64, Failure> {
    rig.json(&["group", "show", "data"])?["allocations"]
        .as_u64()
        .ok_or_else(|| "no allocations in group show".to_owned())
}

/// Given a LU with two queues, when four jobs write and read with verification, then all is as written, both queues
/// worked, requests allocated nothing once warm, and the counters have every request.
fn verified(level: &str, count: usize) -> Result<(), Failure> {
    let (rig, _) = two_queues("ram", level, count)?;
    let device = rig.device()?;
    let load = |seed: u32| {
        sh_in(
            &format!(
                "fio --name=v --filename={device} --size=8m --offset_increment=8m --numjobs=4 --direct=1 \
                 --ioengine=io_uring --iodepth=16 --rw=randwrite --bsrange=512-256k --blockalign=512 --verify=crc32c \
                 --verify_fatal=1 --do_verify=1 --randseed={seed} >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
            ),
            300,
        )
    };
    let reads = || {
        sh_in(
            &format!(
                "fio --name=r --filename={device} --size=32m --numjobs=4 --direct=1 --ioengine=io_uring --iodepth=16 \
                 --rw=randread --bs=4k --number_ios=2000 --cpus_allowed=0-1 --cpus_allowed_policy=split >/tmp/fio.out 2>&1"
            ),
            100,
        )
    };
    // Warm: as much in flight as there will be.
    for seed in [7, 8] {
        load(seed)?;
        reads()?;
    }
    let warm = allocated(&rig)?;
    let before = (counter(&rig, "reads")?, counter(&rig, "read_bytes")?);
    reads()?;
    let done = (
        counter(&rig, "reads")? - before.0,
        counter(&rig, "read_bytes")? - before.1,
    );
    ensure(done == (8000, 8000 * 4096), || {
        format!("reads and bytes that are counted of 8000: {done:?}")
    })?;
    load(9)?;
    let (threads, ticks) = queue_threads(&rig)?;
    ensure(threads == 1 && ticks > 0, || {
        format!("{threads} queue threads, which worked {ticks} ticks")
    })?;
    let after = allocated(&rig)?;
    ensure(warm == after, || {
        format!("{} allocations by requests", after - warm)
    })?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    let (threads, _) = queue_threads(&rig)?;
    ensure(threads == 0, || format!("{threads} queue threads are left"))
}

fn pin(cpu: usize) -> Result<(), Failure> {
    let mut set = CpuSet::new();
    set.set(cpu).map_err(|error| error.to_string())?;
    sched_setaffinity(Pid::from_raw(0), &set).map_err(|error| error.to_string())
}

/// Given two queues under load from both CPUs, when a member is failed, replaced and another failed, then no read gives
/// what an answered write had replaced before it began.
fn stale(level: &str, count: usize) -> Result<(), Failure> {
    const BLOCKS: u64 = 64;
    let (rig, paths) = two_queues("ram", level, count)?;
    rig.lunar(&["disk", "add", "/dev/ram8"])?;
    let device = rig.device()?;
    let answered: Arc<Vec<AtomicU64>> = Arc::new((0..BLOCKS).map(|_| AtomicU64::new(0)).collect());
    let stop = Arc::new(AtomicBool::new(false));
    // Every fourth block: they are on all members.
    let place = |block: u64| block * 5 * 4096 * 4;
    let mut threads = Vec::new();
    for writer in 0..4 {
        let (device, answered, stop) = (device.clone(), Arc::clone(&answered), Arc::clone(&stop));
        threads.push(std::thread::spawn(move || -> Result<u64, Failure> {
            pin(usize::try_from(writer % 2).expect("small"))?;
            let file = blocks::open(&device)?;
            let mut value = 0;
            while !stop.load(Ordering::Relaxed) {
                value += 1;
                for block in (writer..BLOCKS).step_by(4) {
                    blocks::write_value(&file, place(block), value)?;
                    answered[usize::try_from(block).expect("small")].store(value, Ordering::SeqCst);
                }
            }
            Ok(value)
        }));
    }
    for reader in 0..4 {
        let (device, answered, stop) = (device.clone(), Arc::clone(&answered), Arc::clone(&stop));
        threads.push(std::thread::spawn(move || -> Result<u64, Failure> {
            pin(reader % 2)?;
            let file = blocks::open(&device)?;
            let mut random = Random(77 + reader as u64);
            let mut reads = 0;
            while !stop.load(Ordering::Relaxed) {
                let block = random.below(BLOCKS);
                let least = answered[usize::try_from(block).expect("small")].load(Ordering::SeqCst);
                let seen = blocks::least_value(&file, place(block))?;
                ensure(seen >= least, || {
                    format!("block {block} read as {seen}, {least} had been answered before")
                })?;
                reads += 1;
            }
            Ok(reads)
        }));
    }
    let change = || -> Result<(), Failure> {
        pause(1000);
        rig.lunar(&["disk", "fail", &paths[0], "--yes"])?;
        pause(1000);
        rig.lunar(&["disk", "replace", &paths[0], "/dev/ram8"])?;
        rig.wait_optimal(200)?;
        pause(500);
        rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
        pause(1000);
        Ok(())
    };
    let changed = change();
    stop.store(true, Ordering::Relaxed);
    let mut least = u64::MAX;
    for thread in threads {
        least = least.min(thread.join().map_err(|_| "a thread died")??);
    }
    changed?;
    let (_, ticks) = queue_threads(&rig)?;
    ensure(least > 10 && ticks > 0, || {
        format!("{least} rounds, {ticks} ticks: hardly anything happened")
    })
}

/// Given a mounted LU with two queues under verified load, when ublk-target is killed twice, then no request fails
/// and everything reads as written.
fn killed() -> Result<(), Failure> {
    let (rig, _) = two_queues("ram", "raid5", 4)?;
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/l && mount {device} /mnt/l"
    ))?;
    let load = std::thread::spawn(|| {
        sh_in(
            "fio --name=k --directory=/mnt/l --size=24m --numjobs=4 --direct=1 --ioengine=io_uring --iodepth=8 \
             --rw=randwrite --bsrange=512-128k --blockalign=512 --verify=crc32c --verify_fatal=1 --time_based \
             --runtime=8 --verify_backlog=64 >/tmp/fio.out 2>&1 || { cat /tmp/fio.out; exit 1; }",
            300,
        )
    });
    for _ in 0..2 {
        pause(2000);
        let pid = rig.target_pid()?;
        sh(&format!("kill -KILL {pid}"))?;
        until("a successor", 60, || {
            Ok(rig.target_pid().is_ok_and(|new| new != pid))
        })?;
        until("the LU is up", 60, || {
            Ok(rig.json(&["lu", "show", "vol"])?["queues_served"] == 2)
        })?;
    }
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    let (threads, _) = queue_threads(&rig)?;
    ensure(threads == 1, || format!("{threads} queue threads"))?;
    sh_in(&format!("umount /mnt/l && e2fsck -fn {device}"), 100)?;
    Ok(())
}

/// Given a LU, when its queues are set, then a holder prevents it and is named, else its device has them with what was
/// written; they stay over a new start; what is out of range is refused.
fn set() -> Result<(), Failure> {
    let (mut rig, _) = two_queues("ram", "raid1", 2)?;
    let device = rig.device()?;
    sh(&format!(
        "head -c 8M /dev/urandom > /tmp/queues; dd if=/tmp/queues of={device} bs=1M oflag=direct 2>/dev/null"
    ))?;
    let holder = blocks::open(&device)?;
    let held = rig.run(&["lu", "set", "vol", "--queues", "1"])?;
    drop(holder);
    ensure(held.code == 7 && held.stderr.contains("lunar-e2e"), || {
        format!("exit {}: {}", held.code, held.stderr)
    })?;
    for queues in ["0", "65"] {
        let bad = rig.run(&["lu", "set", "vol", "--queues", queues])?;
        ensure(bad.code == 2 && bad.stderr.contains("Try:"), || {
            format!("exit {}: {}", bad.code, bad.stderr)
        })?;
    }
    let same = rig.lunar(&["lu", "set", "vol", "--queues", "2"])?;
    ensure(same.contains("unchanged"), || same.clone())?;
    let more = rig.lunar(&["lu", "set", "vol", "--queues", "64"])?;
    ensure(more.contains("2 are served now"), || more.clone())?;
    rig.lunar(&["lu", "set", "vol", "--queues", "2"])?;
    rig.shutdown()?;
    rig.start()?;
    until("the LU is up", 30, || {
        Ok(rig.json(&["lu", "show", "vol"])?["queues_served"] == 2)
    })?;
    rig.lunar(&["lu", "set", "vol", "--queues", "1"])?;
    sh("cmp -n $((8 << 20)) /tmp/queues /dev/lunar/vol")?;
    let (threads, _) = queue_threads(&rig)?;
    ensure(threads == 0, || format!("{threads} queue threads"))
}

/// Given two queues, when two members of a raid5 answer errors, then writes and reads from each CPU fail: what the owner
/// answers is what the host is told.
fn errors() -> Result<(), Failure> {
    let (rig, _) = two_queues("dm", "raid5", 3)?;
    let device = rig.device()?;
    sh("dm_error member0; dm_error member1")?;
    for cpu in [0, 1] {
        for dd in [
            format!("if=/dev/zero of={device} oflag=direct seek={cpu}"),
            format!("if={device} of=/dev/null iflag=direct skip={cpu}"),
        ] {
            sh(&format!(
                "! taskset -c {cpu} dd {dd} bs=1M count=1 2>/tmp/dd.out; grep -q 'Input/output error' /tmp/dd.out"
            ))
            .map_err(|why| format!("CPU {cpu}, dd {dd}: {why}"))?;
        }
    }
    sh("dm_heal member0; dm_heal member1")?;
    rig.lunar(&["group", "stop", "data"])?;
    rig.lunar(&["group", "start", "data"]).map(drop)
}

/// Given two queues and reads from both CPUs alone, when a member hangs, then it is failed, and reads go on by
/// redundancy; those that it had come when it answers again.
fn hung() -> Result<(), Failure> {
    let (rig, _) = two_queues("dm", "raid5", 4)?;
    let device = rig.device()?;
    let load = std::thread::spawn(move || {
        sh_in(
            &format!(
                "fio --name=h --filename={device} --size=96m --numjobs=2 --direct=1 --ioengine=io_uring --iodepth=4 \
                 --rw=randread --bs=4k --number_ios=20000 --cpus_allowed=0-1 --cpus_allowed_policy=split \
                 >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
            ),
            300,
        )
    });
    pause(300);
    sh("dm_hang member1")?;
    until("the member is failed", 90, || {
        Ok(rig.state()?.1.iter().any(|state| state == "faulty"))
    })?;
    let device = rig.device()?;
    for cpu in [0, 1] {
        sh_in(
            &format!(
                "taskset -c {cpu} dd if={device} of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null"
            ),
            60,
        )?;
    }
    sh("dm_heal member1")?;
    load.join().map_err(|_| "thread")??;
    Ok(())
}

/// Given two LUs of a group, when one is written 1 MiB at a time, 128 at once, then a request of the other, one at a
/// time, is overtaken by no more requests than the first can have in flight, twice: its copy and its stripes wait in
/// line.
fn two_lus() -> Result<(), Failure> {
    const DEPTH: u64 = 128;
    let rig = Rig::new()?;
    let mut create = vec!["--level", "raid5"];
    create.extend(CREATE);
    rig.array("ram", 4, 256, &create)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    for (name, size) in [("large", "384MiB"), ("small", "64MiB")] {
        rig.lunar(&["lu", "create", name, "--group", "data", "--size", size])?;
    }
    let device = sh("readlink -f /dev/lunar/large")?;
    let load = std::thread::spawn(|| {
        sh_in(
            "fio --name=h --filename=/dev/lunar/large --direct=1 --ioengine=io_uring --iodepth=128 --rw=write --bs=1m \
             --time_based --runtime=5 >/tmp/fio.out 2>&1 || { cat /tmp/fio.out; exit 1; }",
            100,
        )
    });
    let stat = format!("/sys/block/{}/stat", device.trim_start_matches("/dev/"));
    // Write requests that have ended, and all that have not.
    let ended = || -> Result<(u64, u64), Failure> {
        let text = std::fs::read_to_string(&stat).map_err(|error| format!("{stat}: {error}"))?;
        let field = |i: usize| text.split_whitespace().nth(i).and_then(|n| n.parse().ok());
        field(4).zip(field(8)).ok_or(text.clone())
    };
    until("the load runs", 20, || Ok(ended()?.0 > 2 * DEPTH))?;
    let small = blocks::open("/dev/lunar/small")?;
    let (mut worst, mut most, mut done) = (0, 0, 0);
    while done < 200 && !load.is_finished() {
        let (before, in_flight) = ended()?;
        blocks::write_value(&small, done * 4096 * 3, done)?;
        worst = worst.max(ended()?.0 - before);
        most = most.max(in_flight);
        done += 1;
    }
    load.join().map_err(|_| "thread")??;
    ensure(done >= 20 && most >= DEPTH / 2, || {
        format!("{done} requests beside at most {most}: hardly a load")
    })?;
    ensure(worst <= 2 * DEPTH, || {
        format!("a request was overtaken by {worst}")
    })
}

/// Given sixteen LUs of one group, of one queue and of two, when all are written and read with verification at once,
/// then all is as written.
fn sixteen() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let mut create = vec!["--level", "raid5"];
    create.extend(CREATE);
    rig.array("ram", 4, 256, &create)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    for i in 0..16 {
        let (name, queues) = (format!("s{i}"), (1 + i % 2).to_string());
        let args = [
            "lu", "create", &name, "--group", "data", "--size", "24MiB", "--queues", &queues,
        ];
        rig.lunar(&args)?;
    }
    sh_in(
        "for i in $(seq 0 15); do
             fio --name=s$i --filename=/dev/lunar/s$i --size=4m --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite \
                 --bsrange=512-128k --blockalign=512 --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=$i \
                 > /tmp/fio.$i 2>&1 & jobs[$i]=$!
         done
         for i in $(seq 0 15); do wait ${jobs[$i]} || { cat /tmp/fio.$i; exit 1; }; done",
        300,
    )?;
    let (threads, _) = queue_threads(&rig)?;
    ensure(threads == 1, || {
        format!("{threads} queue threads for the second queues of all")
    })
}
