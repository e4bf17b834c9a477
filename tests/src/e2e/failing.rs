//! Members that fail under verified writes: by error, by hanging, by vanishing; on every kind of disk.

use super::disks::{identity, let_go};
use super::rig::{Rig, text};
use super::shell::{Failure, pause, sh, sh_in, until};
use super::{LONG, Test, add, ensure};

/// How a member fails, and what it is: these always run, every other combination in a long run.
const SHORT: [(&str, &str, &str); 8] = [
    ("error", "raid1", "dm-null_blk"),
    ("error", "raid5", "dm"),
    ("error", "raid5", "dm-ext4-file"),
    ("hang", "raid1", "dm"),
    ("hang", "raid5", "dm"),
    ("vanish", "raid1", "dm"),
    ("vanish", "raid5", "dm"),
    ("vanish", "raid1", "dm-4k"),
];

pub(super) fn tests(to: &mut Vec<Test>) {
    for kind in ["dm", "dm-null_blk", "dm-4k", "dm-ext4-file"] {
        for how in ["error", "hang", "vanish"] {
            for level in ["raid1", "raid5"] {
                let long = match SHORT.contains(&(how, level, kind)) {
                    true => "",
                    false => LONG,
                };
                let kind_name = match kind {
                    "dm" => String::new(),
                    kind => format!("_{kind}"),
                };
                add(
                    to,
                    format!("{long}data_survives_member_{how}_{level}{kind_name}"),
                    move || member_dies(kind, how, level),
                );
            }
        }
    }
    for fs in ["ext4", "xfs", "btrfs"] {
        for (kind, long, kind_name) in [("dm", "", ""), ("dm-null_blk", LONG, "_dm-null_blk")] {
            add(
                to,
                format!("{long}data_file_system_{fs}_degraded_rebuilt_clean{kind_name}"),
                move || file_system(kind, fs),
            );
        }
    }
}

/// MiB of a member of a kind: a file leaves room for its file system.
fn mib(kind: &str) -> u32 {
    if kind == "dm-ext4-file" { 200 } else { 256 }
}

/// Given a redundant group under verified writes, when a member fails, then nobody sees an error, and soon
/// nobody holds it any more; when it is replaced and the replacement is filled, then everything reads as written with
/// another member gone; when all is shut down, then no disk is held.
fn member_dies(kind: &'static str, how: &'static str, level: &str) -> Result<(), Failure> {
    let count = if level == "raid1" { 2 } else { 4 };
    let mut rig = Rig::new()?;
    let paths = rig.array(
        kind,
        count,
        mib(kind),
        &["--level", level, "--chunk", "64KiB"],
    )?;
    let failing = identity(&paths[1])?;
    let device = rig.device()?;
    let grain = match sh(&format!("blockdev --getss {device}"))?.as_str() {
        "4096" => "--bsrange=4k-256k --blockalign=4k",
        _ => "--bsrange=512-256k --blockalign=512",
    };
    let fio = |extra: &str| {
        format!(
            "fio --name=v --filename={device} --size=128m --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
             {grain} --verify=crc32c --verify_fatal=1 --randseed=7 --io_size=1g {extra} >/tmp/fio.out 2>&1 \
             || {{ cat /tmp/fio.out; exit 1; }}"
        )
    };
    let name = device.trim_start_matches("/dev/").to_owned();
    let dying = std::thread::spawn(move || {
        let written = format!("awk '$5 > 200 {{print \"yes\"}}' /sys/block/{name}/stat");
        until("writes run", 120, || Ok(sh(&written)? == "yes"))?;
        sh(&format!("dm_{how} member1"))?;
        if how == "hang" {
            // Past the limit of 30 s; then what hung comes back, and its late writes land on a stale disk.
            pause(45_000);
            sh("dm_heal member1")?;
        }
        Ok::<_, Failure>(())
    });
    let written = sh_in(&fio("--do_verify=1 --rate=40m"), 400);
    dying.join().map_err(|_| "thread")??;
    written.map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    until("the member is faulty", 60, || {
        Ok(rig.state()?.1.iter().any(|s| s == "faulty"))
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    // Before there is a new disk: the kernel may give it the number of one that is gone.
    let_go(&rig, "the failed disk", failing)?;
    let spare = sh(&format!("member_make {kind} {count} {}", mib(kind)))?;
    rig.lunar(&["disk", "add", &spare])?;
    let old = member_path(&rig, 1)?;
    rig.lunar(&["disk", "replace", &old, &spare])?;
    rig.wait_optimal(240)?;
    // Only read: the same blocks, verified by fio's checksums, with the first member gone.
    sh("dm_error member0")?;
    sh_in(&fio("--verify_only=1"), 300)?;
    rig.shutdown()?;
    nobody_holds_devices(kind)
}

/// Removes the device-mapper devices of the members without force, which works if nobody holds them.
fn nobody_holds_devices(kind: &str) -> Result<(), Failure> {
    if kind == "dm-ext4-file" {
        sh("for at in /run/lunar-members/ext4-*; do umount $at; done")?;
    }
    let left = sh("for i in $(seq 100); do
             left=$(dmsetup ls | awk '/^member/ {print $1}'); [ -n \"$left\" ] || break
             for name in $left; do dmsetup remove --retry $name >/dev/null 2>&1 || true; done; sleep 0.1
         done; dmsetup info -c --noheadings -o name,open 2>/dev/null | grep ^member || true")?;
    ensure(left.is_empty(), || {
        format!("after the shutdown somebody still holds: {left}")
    })
}

/// The path of the disk in a slot, as Lunar says it.
fn member_path(rig: &Rig, slot: usize) -> Result<String, Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    Ok(text(&group["members"][slot]["path"]))
}

/// Given a file system on a raid5, when a member dies under a copy and is replaced, then its own checker finds
/// nothing, and all files are as before.
fn file_system(kind: &str, fs: &str) -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array(kind, 4, 256, &["--level", "raid5", "--chunk", "64KiB"])?;
    let device = rig.device()?;
    let force = if fs == "ext4" { "-F" } else { "-f" };
    sh_in(
        &format!(
            "mkfs.{fs} -q {force} {device} && mkdir -p /mnt/l && mount -t {fs} {device} /mnt/l"
        ),
        120,
    )?;
    let copy = "cp -a /usr/include /mnt/l/a && sync && dm_error member2 && cp -a /usr/include /mnt/l/b && sync";
    sh_in(copy, 300)?;
    let spare = sh(&format!("member_make {kind} 4 256"))?;
    rig.lunar(&["disk", "add", &spare])?;
    let old = member_path(&rig, 2)?;
    rig.lunar(&["disk", "replace", &old, &spare])?;
    rig.wait_optimal(240)?;
    sh("dm_error member0; umount /mnt/l")?;
    let check = match fs {
        "ext4" => format!("e2fsck -fn {device}"),
        "xfs" => format!("xfs_repair -n {device}"),
        _ => format!("btrfs check --readonly {device}"),
    };
    sh_in(&check, 200)?;
    sh(&format!("mount -t {fs} {device} /mnt/l"))?;
    sh_in(
        "for d in a b; do diff -r --no-dereference /usr/include /mnt/l/$d || exit 1; done",
        200,
    )?;
    if fs == "btrfs" {
        sh_in(
            "btrfs scrub start -B /mnt/l | tee /tmp/scrub; grep -q 'no errors found' /tmp/scrub",
            120,
        )?;
    }
    sh("umount /mnt/l")?;
    Ok(())
}
