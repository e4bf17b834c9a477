//! Memory runs short while Lunar serves the swap: what serves it must not wait for it.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use super::rig::Rig;
use super::shell::{Failure, pause, sh, sh_in, until};
use super::{Test, add, ensure, figure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "memory_swap_on_a_lu_outlives_the_target", swap_on_a_lu);
}

/// Bytes of a page.
const PAGE: usize = 4096;
/// Memory that the process takes: more than what is free beside ublk-target.
const HOG_MIB: usize = 220;
/// What has to be swapped out, at least.
const SWAPPED_KIB: u64 = 100 << 10;

/// What lies in a page in one round.
fn word(page: usize, round: u64) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ round.wrapping_mul(0xd1b5_4a32_d192_ed03)
}

/// Takes so many MiB, and reads and writes all of it round after round, until standard input ends; says `full` after the
/// first round, in the end how many rounds there were. A page that is not what was written ends it with 1.
pub fn hog(mib: usize) -> i32 {
    let pages = (mib << 20) / PAGE;
    let mut memory = vec![0u64; pages * PAGE / 8];
    let words = PAGE / 8;
    let fill = |memory: &mut [u64], page: usize, round: u64| {
        memory[page * words..(page + 1) * words].fill(word(page, round));
    };
    (0..pages).for_each(|page| fill(&mut memory, page, 0));
    println!("full");
    let (tell, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        let _ = tell.send(());
    });
    let mut round = 0;
    loop {
        let is_last = ended.try_recv().is_ok();
        for page in 0..pages {
            let is = &memory[page * words..(page + 1) * words];
            if is.iter().any(|is| *is != word(page, round)) {
                println!("page {page} is wrong in round {round}");
                return 1;
            }
            fill(&mut memory, page, round + 1);
        }
        round += 1;
        if is_last {
            println!("{round} rounds");
            return 0;
        }
    }
}

struct Hog(Child);

impl Hog {
    fn start() -> Result<(Self, BufReader<std::process::ChildStdout>), Failure> {
        let exe = std::env::current_exe().map_err(|error| error.to_string())?;
        let mut child = Command::new(exe)
            .args(["--hog", &HOG_MIB.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| error.to_string())?;
        let out = child.stdout.take().ok_or("no stdout")?;
        Ok((Self(child), BufReader::new(out)))
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// KiB that are swapped out.
fn swapped() -> Result<u64, Failure> {
    let text = sh("awk 'NR > 1 { n += $4 } END { print n + 0 }' /proc/swaps")?;
    text.parse().map_err(|error| format!("{text}: {error}"))
}

/// The process that waits to take ublk-target's place, once it has memory of its own; else nothing.
fn standby() -> Result<String, Failure> {
    sh(r#"serving=$(cat /run/lunar/target.pid)
        for p in $(pidof ublk-target); do
          tr '\0' ' ' < /proc/$p/cmdline | grep -q -- --standby= && [ $p != $serving ] \
            && awk -v p=$p '$1 == "RssAnon:" && $2 > 30000 {print p}' /proc/$p/status
        done || true"#)
}

/// Given a machine of 256 MiB whose swap is a LU, beside one with ext4, and a process whose memory is swapped out by 100 MiB
/// and more and goes in and out, and a writer of dirty pages at dirty_ratio 60, when ublk-target is killed twice meanwhile,
/// then everything goes on to its end: every page of memory and every byte of the file is as written, nothing was killed for
/// want of memory, and the swap can be taken away.
fn swap_on_a_lu() -> Result<(), Failure> {
    let total = sh("awk '$1 == \"MemTotal:\" {print $2}' /proc/meminfo")?;
    ensure(
        total.parse::<u64>().is_ok_and(|kib| kib < 300 << 10),
        || format!("a machine of {total} KiB shows nothing: it has to have 256 MiB"),
    )?;
    let disks: Vec<String> = std::env::var("LAB_DISKS")
        .unwrap_or_default()
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    ensure(disks.len() >= 3, || {
        format!("three disks are needed: {disks:?}")
    })?;
    let rig = Rig::new()?;
    let add = [&["disk", "add"][..], &[&disks[0], &disks[1], &disks[2]]].concat();
    rig.lunar(&add)?;
    rig.lunar(&[
        "group",
        "create",
        "data",
        "--disks",
        "1-3",
        "--level",
        "raid5",
        "--assume-clean",
    ])?;
    rig.lunar(&[
        "lu", "create", "swap", "--group", "data", "--size", "384MiB",
    ])?;
    rig.lunar(&["lu", "create", "vol", "--group", "data", "--size", "256MiB"])?;
    sh("mkswap -q /dev/lunar/swap; swapon /dev/lunar/swap
        mkfs.ext4 -q -F /dev/lunar/vol; mkdir -p /mnt/m; mount /dev/lunar/vol /mnt/m
        echo 60 > /proc/sys/vm/dirty_ratio; echo 50 > /proc/sys/vm/dirty_background_ratio")?;
    until("the next ublk-target waits, and has its memory", 60, || {
        standby().map(|pid| !pid.is_empty())
    })?;
    let (mut hog, mut out) = Hog::start()?;
    let mut line = String::new();
    out.read_line(&mut line)
        .map_err(|error| error.to_string())?;
    ensure(line == "full\n", || format!("the process said {line}"))?;
    let first = swapped()?;
    ensure(first >= SWAPPED_KIB, || {
        format!("{first} KiB are swapped out")
    })?;
    // The same 8 MiB again and again, so that they can be told: 120 MiB.
    sh("head -c 8M /dev/urandom > /tmp/piece")?;
    let writer = std::thread::spawn(|| {
        sh_in(
            "for i in $(seq 15); do cat /tmp/piece; done > /mnt/m/file; sync -f /mnt/m/file",
            400,
        )
    });
    let mut least = first;
    for _ in 0..2 {
        pause(1500);
        let (pid, mut next) = (rig.target_pid()?, String::new());
        until("another waits", 120, || {
            next = standby()?;
            Ok(!next.is_empty() && next != pid)
        })?;
        pause(1000);
        sh(&format!("kill -KILL {pid}"))?;
        let killed = std::time::Instant::now();
        until("a successor serves", 120, || {
            Ok(rig.target_pid().is_ok_and(|new| new != pid)
                && rig.state().is_ok_and(|(state, _)| state == "optimal"))
        })
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
        let now = rig.target_pid()?;
        ensure(now == next, || format!("{now} serves, {next} had waited"))?;
        figure(format!(
            "swap on a LU: served again after {} ms, {} KiB are swapped out",
            killed.elapsed().as_millis(),
            swapped()?
        ));
        least = least.min(swapped()?);
    }
    writer.join().map_err(|_| "thread")??;
    ensure(least >= SWAPPED_KIB, || {
        format!("only {least} KiB were swapped out")
    })?;
    hog.0
        .stdin
        .take()
        .ok_or("no stdin")?
        .write_all(b"\n")
        .map_err(|error| error.to_string())?;
    line.clear();
    out.read_line(&mut line)
        .map_err(|error| error.to_string())?;
    ensure(line.ends_with("rounds\n"), || line.clone())?;
    figure(format!("swap on a LU: {}", line.trim()));
    let status = hog.0.wait().map_err(|error| error.to_string())?;
    ensure(status.success(), || format!("{status}"))?;
    let killed = sh("dmesg | grep -ciE 'out of memory|oom-kill|invoked oom' || true")?;
    ensure(killed == "0", || {
        "something was killed for want of memory".into()
    })?;
    sh_in(
        "swapoff /dev/lunar/swap; echo 3 > /proc/sys/vm/drop_caches
         for i in $(seq 15); do cat /tmp/piece; done | cmp - /mnt/m/file
         umount /mnt/m; e2fsck -fn /dev/lunar/vol",
        200,
    )?;
    sh("echo 20 > /proc/sys/vm/dirty_ratio; echo 10 > /proc/sys/vm/dirty_background_ratio")
        .map(drop)
}
