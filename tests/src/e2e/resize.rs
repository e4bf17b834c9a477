//! A LU that is in use gets more space: on the disks, in the kernel, and for the file system on it.

use super::rig::Rig;
use super::shell::{Failure, pause, sh, sh_in, until};
use super::{LONG, Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for (long, fs, level) in [
        ("", "ext4", "raid5"),
        ("", "xfs", "raid1"),
        (LONG, "btrfs", "raid0"),
    ] {
        add(
            to,
            format!("{long}resize_of_a_mounted_{fs}_on_{level}_under_load"),
            move || mounted(fs, level),
        );
    }
    add(
        to,
        "resize_that_is_killed_before_the_kernel_hears_of_it",
        killed,
    );
}

const MIB: u64 = 1 << 20;

/// A group with a LU `vol` of so many MiB and two queues, and `other` behind it.
fn array(rig: &Rig, level: &str, mib: u64) -> Result<(), Failure> {
    let count = if level == "raid5" { 4 } else { 2 };
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    let create = if level == "raid0" {
        &create[..4]
    } else {
        &create
    };
    rig.array("ram", count, 256, create)?;
    rig.lunar(&["lu", "delete", "vol", "--yes"])?;
    let size = format!("{mib}MiB");
    let make = ["lu", "create", "vol", "--group", "data", "--size", &size];
    rig.lunar(&[&make[..], &["--queues", "2"]].concat())?;
    rig.lunar(&["lu", "create", "other", "--group", "data", "--size", "8MiB"])?;
    Ok(())
}

/// Bytes of the LU `vol` as the kernel has it, and as Lunar says.
fn sizes(rig: &Rig) -> Result<(u64, u64), Failure> {
    let device = rig.device()?;
    let sectors = sh(&format!("cat /sys/block/$(basename {device})/size"))?;
    let sectors: u64 = sectors.parse().map_err(|_| sectors)?;
    let said = rig.json(&["lu", "show", "vol"])?["capacity"].as_u64();
    Ok((512 * sectors, said.ok_or("no capacity")?))
}

/// Both say the same, and at least so much but no stripes more.
fn has(rig: &Rig, bytes: u64) -> Result<(), Failure> {
    let (kernel, said) = sizes(rig)?;
    let fits = kernel == said && (bytes..bytes + 2 * MIB).contains(&said);
    ensure(fits, || {
        format!("{bytes} bytes wanted: the kernel has {kernel}, Lunar says {said}")
    })
}

fn written(file: &str, seed: u32, what: &str) -> String {
    format!(
        "fio --name=v --filename={file} --size=24m --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite \
         --bsrange=4k-64k --blockalign=4k --verify=crc32c --verify_fatal=1 --randseed={seed} {what} \
         >/tmp/fio.$$ 2>&1 || {{ cat /tmp/fio.$$; exit 1; }}"
    )
}

/// Given a mounted file system under verified writes, when its LU is resized, then nobody sees an error, the kernel has the
/// new size, the command that Lunar prints grows the file system, which then holds what did not fit before; less is
/// refused, and it all is there after a shutdown.
fn mounted(fs: &str, level: &str) -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    // btrfs resizes to no less than 256 MiB.
    let mib = if fs == "btrfs" { 288 } else { 96 };
    let (most, content) = (format!("{}MiB", mib + 96), mib + 14);
    array(&rig, level, mib)?;
    has(&rig, mib * MIB)?;
    let make = match fs {
        "ext4" => "mkfs.ext4 -q -F",
        "xfs" => "mkfs.xfs -q -f --unsupported",
        _ => "mkfs.btrfs -q -f -M",
    };
    // The tools of xfs want 300 MB, unless they test.
    let make = format!("TEST_DIR=1 TEST_DEV=1 QA_CHECK_FS=1 {make} /dev/lunar/vol");
    sh(&make)?;
    sh("mkdir -p /mnt/vol && mount /dev/lunar/vol /mnt/vol")?;
    let writing = written(
        "/mnt/vol/busy",
        1,
        "--do_verify=1 --time_based --runtime=8 --rate=20m",
    );
    let load = std::thread::spawn(move || sh_in(&writing, 300));
    pause(1000);
    let dry = rig.lunar(&["lu", "resize", "vol", "+64MiB", "--dry-run"])?;
    ensure(dry.contains("grow LU vol"), || dry.clone())?;
    has(&rig, mib * MIB)?;
    let said = rig.lunar(&["lu", "resize", "vol", "+64MiB"])?;
    has(&rig, (mib + 64) * MIB)?;
    let said2 = rig.lunar(&["lu", "resize", "vol", &most])?;
    has(&rig, (mib + 96) * MIB)?;
    let again = rig.lunar(&["lu", "resize", "vol", &most])?;
    ensure(again.contains("unchanged"), || again.clone())?;
    let command = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Its file system grows by: "))
        .ok_or_else(|| format!("no command in {said}"))?;
    ensure(said2.contains(command), || said2.clone())?;
    let too_much =
        format!("dd if=/dev/zero of=/mnt/vol/much bs=1M count={content} oflag=direct 2>/dev/null");
    // A full btrfs takes no overwrites: the load would see that.
    if fs != "btrfs" {
        ensure(sh(&too_much).is_err(), || "it fit before".into())?;
        sh("rm /mnt/vol/much")?;
    }
    sh(&format!("export PATH=$PATH:/usr/sbin:/sbin; {command}"))?;
    sh(&too_much)?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    let less = rig.run(&["lu", "resize", "vol", "64MiB"])?;
    ensure(less.code == 6 && less.stderr.contains("Try:"), || {
        format!("exit {}: {}", less.code, less.stderr)
    })?;
    let more = rig.run(&["lu", "resize", "vol", "100GiB"])?;
    ensure(more.code == 2 && more.stderr.contains("free"), || {
        format!("exit {}: {}", more.code, more.stderr)
    })?;
    has(&rig, (mib + 96) * MIB)?;
    sh_in(&written("/mnt/vol/after", 2, "--do_verify=1"), 200)?;
    sh("umount /mnt/vol")?;
    rig.shutdown()?;
    rig.start()?;
    until("the LU is back", 60, || Ok(sizes(&rig).is_ok()))?;
    has(&rig, (mib + 96) * MIB)?;
    sh(&format!(
        "mount /dev/lunar/vol /mnt/vol && cmp -n $(({content} << 20)) /mnt/vol/much /dev/zero"
    ))?;
    sh_in(&written("/mnt/vol/after", 2, "--verify_only=1"), 200)?;
    sh("umount /mnt/vol")?;
    Ok(())
}

/// Given a resize that is durable but of which the kernel has not heard, when ublk-target is killed, then its successor
/// gives the device the new size, under a load that sees no error; both queues serve all of it.
fn killed() -> Result<(), Failure> {
    let rig = Rig::new()?;
    array(&rig, "raid5", 96)?;
    let device = rig.device()?;
    let writing = written(
        &device,
        3,
        "--do_verify=1 --time_based --runtime=10 --rate=20m",
    );
    let load = std::thread::spawn(move || sh_in(&writing, 300));
    pause(500);
    let pid = rig.target_pid()?;
    // The process that sends control commands: as if the kernel took its time.
    sh(&format!("kill -STOP $(pgrep -P {pid})"))?;
    let resized = std::thread::scope(|scope| {
        let asked = scope.spawn(|| rig.run(&["lu", "resize", "vol", "max"]));
        let durable = until("the new size is durable", 30, || {
            let (kernel, said) = sizes(&rig)?;
            ensure(kernel < 100 * MIB, || format!("the kernel has {kernel}"))?;
            Ok(said > 100 * MIB)
        });
        sh(&format!("kill -KILL {pid}"))?;
        durable?;
        asked.join().map_err(|_| "thread")?
    })?;
    ensure(resized.code != 0, || {
        format!("it was answered: {}", resized.stdout)
    })?;
    until("a successor with the new size", 60, || {
        Ok(rig.target_pid().is_ok_and(|now| now != pid)
            && sizes(&rig).is_ok_and(|(kernel, said)| kernel == said && kernel > 700 * MIB))
    })
    .map_err(|why| format!("{why}: {:?}\n{}", sizes(&rig), rig.log_tail()))?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    let again = rig.lunar(&["lu", "resize", "vol", "max"])?;
    ensure(again.contains("unchanged"), || again.clone())?;
    let new_part = "--do_verify=1 --offset=96m --numjobs=4 --offset_increment=150m";
    sh_in(&written(&device, 4, new_part), 200)?;
    sh_in(&written(&device, 3, "--verify_only=1"), 200)?;
    Ok(())
}
