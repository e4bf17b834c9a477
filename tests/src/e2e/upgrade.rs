//! Another version of the programs in the place of the one that runs: with I/O running, there and back.

use std::thread::JoinHandle;

use super::import::{end_copy, rewrite};
use super::rig::{Rig, text};
use super::shell::{Failure, sh, sh_in, until};
use super::{Test, add, ensure, figure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(to, "upgrade_under_load_there_and_back", there_and_back);
    add(to, "upgrade_to_one_that_does_not_do_goes_back", does_not_do);
    add(
        to,
        "upgrade_to_one_that_cannot_read_the_disks_is_refused",
        cannot_read,
    );
    add(
        to,
        "upgrade_goes_on_without_its_client_and_without_mgmtd",
        cut_short,
    );
    add(to, "long_upgrade_from_an_older_commit_and_back", older);
}

/// Where the programs of these tests are installed.
const BIN: &str = "/tmp/lunar-bin";
/// The same version, another build.
const NEXT: &str = "/tmp/lunar-next";
const RAID5: [&str; 4] = ["--level", "raid5", "--chunk", "64KiB"];

/// Installs the programs, and beside them a build that differs by its last bytes.
fn install() -> Result<(), Failure> {
    let exe = std::env::current_exe().map_err(|error| error.to_string())?;
    let from = exe.parent().ok_or("no folder")?.display().to_string();
    sh(&format!(
        "rm -rf {BIN} {NEXT}; mkdir {BIN} {NEXT}
         cp {from}/lunar {from}/mgmtd {from}/ublk-target {BIN}/; cp {BIN}/mgmtd {BIN}/ublk-target {NEXT}/
         for p in mgmtd ublk-target; do echo next >> {NEXT}/$p; done"
    ))
    .map(drop)
}

/// A ublk-target that is a shell script; `serve` is what it does instead of serving at once.
fn script(name: &str, serve: &str) -> Result<String, Failure> {
    let path = format!("/tmp/{name}");
    let text = format!(
        "#!/bin/sh\ncase $1 in --listen-fd)\n{serve}\n;; esac\nexec {NEXT}/ublk-target \"$@\"\n"
    );
    std::fs::write(&path, text).map_err(|error| error.to_string())?;
    sh(&format!("chmod +x {path}"))?;
    Ok(path)
}

/// A LU with a file system, and fio that writes and verifies on it for so long.
fn loaded(rig: &Rig, seconds: u32) -> Result<JoinHandle<Result<String, Failure>>, Failure> {
    let device = rig.device()?;
    sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt/u && mount {device} /mnt/u"
    ))?;
    let fio = format!(
        "fio --name=u --directory=/mnt/u --size=64m --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
         --bsrange=512-128k --blockalign=512 --verify=crc32c --verify_fatal=1 --time_based --runtime={seconds} \
         --verify_backlog=256 >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
    );
    let load = std::thread::spawn(move || sh_in(&fio, u64::from(seconds) + 200));
    until("it writes", 30, || Ok(sectors(&device)? > 10_000))?;
    Ok(load)
}

/// Sectors that were written to a device, as the kernel counts them.
fn sectors(device: &str) -> Result<u64, Failure> {
    let count = sh(&format!(
        "awk '{{print $7}}' /sys/block/$(basename {device})/stat"
    ))?;
    count.parse().map_err(|error| format!("{count}: {error}"))
}

/// The writer goes on, ended without an error, and the file system is whole.
fn well(rig: &Rig, load: JoinHandle<Result<String, Failure>>, device: &str) -> Result<(), Failure> {
    let before = sectors(device)?;
    until("it goes on writing", 30, || {
        Ok(sectors(device)? > before + 1000)
    })?;
    load.join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    sh_in(&format!("umount /mnt/u && e2fsck -fn {device}"), 100).map(drop)
}

/// The program that runs as ublk-target is that file, byte for byte.
fn runs(rig: &Rig, path: &str) -> Result<(), Failure> {
    let pid = rig.target_pid()?;
    sh(&format!("cmp /proc/{pid}/exe {path}")).map(drop)
}

/// Upgrades, and tells how long the LUs stood still.
fn upgrade(rig: &Rig, what: &str, args: &[&str]) -> Result<(), Failure> {
    let all = [&["upgrade"], args].concat();
    rig.lunar(&[&all[..], &["--dry-run"]].concat())?;
    let reply = rig.json(&all)?;
    let ms = |key: &str| reply[key].as_u64();
    let (Some(quiesced), Some(still)) = (ms("quiesced_ms"), ms("stood_still_ms")) else {
        return Err(format!("{what}: {reply}\n{}", rig.log_tail()));
    };
    figure(format!(
        "upgrade, {what}: quiesced in {quiesced} ms, stood still for {still} ms"
    ));
    ensure(reply["outcome"] == "changed" && reply["lus"] == 1, || {
        reply.to_string()
    })
}

/// Given a mounted LU under verified load, when other builds of mgmtd and ublk-target are installed and `lunar upgrade` is
/// given, and then the way back, then both programs are the other build, mgmtd as the same process; no request fails,
/// everything reads as written; the devices were quiesced, nobody was killed, and no dead child is left.
fn there_and_back() -> Result<(), Failure> {
    install()?;
    let rig = Rig::in_bin(BIN)?;
    rig.array("ram", 4, 256, &RAID5)?;
    let device = rig.device()?;
    let load = loaded(&rig, 40)?;
    let same = rig.lunar(&["upgrade", "--check"])?;
    ensure(same.contains("unchanged"), || same.clone())?;
    let target = rig.target_pid()?;
    // As a package does it: the running file is taken away, and another lies there.
    sh(&format!(
        "mkdir /tmp/lunar-old; for p in mgmtd ublk-target; do cp {BIN}/$p /tmp/lunar-old/; mv {NEXT}/$p {BIN}/$p; done"
    ))?;
    let check = rig.lunar(&["upgrade", "--check"])?;
    ensure(
        check.contains(&format!("ublk-target: process {target}"))
            && check.contains("would quiesce"),
        || check.clone(),
    )?;
    let doctor = rig.run(&["doctor"])?.stdout;
    ensure(doctor.contains("lunar upgrade"), || doctor.clone())?;
    upgrade(&rig, "there", &[])?;
    let mgmtd = rig.mgmtd_pid();
    ensure(rig.target_pid()? != target, || {
        "it is the same process".into()
    })?;
    runs(&rig, &format!("{BIN}/ublk-target"))?;
    sh(&format!("cmp /proc/{mgmtd}/exe {BIN}/mgmtd"))?;
    let same = rig.lunar(&["upgrade"])?;
    ensure(same.contains("unchanged"), || same.clone())?;
    upgrade(&rig, "back", &["--to", "/tmp/lunar-old"])?;
    runs(&rig, "/tmp/lunar-old/ublk-target")?;
    sh(&format!("cmp /proc/{mgmtd}/exe /tmp/lunar-old/mgmtd"))?;
    well(&rig, load, &device)?;
    let events = rig.lunar(&["events"])?;
    ensure(
        events.matches("Quiesced").count() == 2
            && !events.contains("TargetDied")
            && !events.contains("HandOverFailed"),
        || events.clone(),
    )?;
    let dead = sh(&format!(
        "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z {mgmtd} ' || true"
    ))?;
    ensure(dead == "0", || format!("{dead} dead children of mgmtd"))?;
    rig.lunar(&["lu", "delete", "vol", "--yes"]).map(drop)
}

/// Given a mounted LU under verified load, when the new ublk-target ends at once, or finds no superblock on the disks, then
/// `lunar upgrade` exits 1 and says why, the old program serves on (also where its file was taken away), and no request
/// fails.
fn does_not_do() -> Result<(), Failure> {
    install()?;
    let rig = Rig::in_bin(BIN)?;
    let paths = rig.array("ram", 4, 256, &RAID5)?;
    let device = rig.device()?;
    let load = loaded(&rig, 40)?;
    sh(&format!("cp {BIN}/ublk-target /tmp/lunar-was"))?;
    let dies = script("dies", "echo cannot >&2; exit 3")?;
    // What it cannot read it refuses; the superblocks are as they were when it has ended.
    let hide: String = paths
        .iter()
        .map(|path| {
            let at = end_copy(path)?;
            Ok(format!("h {path} 1; h {path} {}\n", at / 4096))
        })
        .collect::<Result<_, Failure>>()?;
    let blind = script(
        "blind",
        &format!(
            "h() {{ f=/tmp/hidden.$(basename $1).$2; dd if=$1 of=$f bs=4k skip=$2 count=1 iflag=direct; dd if=/dev/zero of=$1 bs=4k seek=$2 count=1 oflag=direct; }} 2>/dev/null\n\
             {hide}{NEXT}/ublk-target \"$@\"\n\
             h() {{ f=/tmp/hidden.$(basename $1).$2; dd if=$f of=$1 bs=4k seek=$2 oflag=direct; }} 2>/dev/null\n{hide}exit 0"
        ),
    )?;
    for (to, says) in [(&dies, "it ended at once"), (&blind, "group data")] {
        let was = rig.target_pid()?;
        let out = rig.run(&["upgrade", "--to", to])?;
        ensure(
            out.code == 1 && out.stderr.contains("serves on") && out.stderr.contains(says),
            || {
                format!(
                    "{to}: exit {}: {}{}\n{}",
                    out.code,
                    out.stdout,
                    out.stderr,
                    rig.log_tail()
                )
            },
        )?;
        ensure(rig.target_pid()? != was, || {
            format!("{to}: nothing happened")
        })?;
        runs(&rig, "/tmp/lunar-was")?;
        let (state, _) = rig.state()?;
        ensure(state == "optimal", || format!("{to}: {state}"))?;
        // The next time from a file that lies nowhere any more.
        sh(&format!("rm -f {BIN}/ublk-target"))?;
    }
    let gone = rig.run(&["upgrade"])?;
    ensure(
        gone.code == 1 && gone.stderr.contains(&format!("{BIN}/ublk-target")),
        || format!("exit {}: {}", gone.code, gone.stderr),
    )?;
    well(&rig, load, &device)
}

/// Given a group whose disks say that a newer format was written to them (with right checksums), when `lunar upgrade` is
/// asked for a program that does not know it, then `--check` and the upgrade exit 1 with the disk and the reason, before
/// anything stands still: the process that serves is the same, and serves. The same for a program that does not run.
fn cannot_read() -> Result<(), Failure> {
    install()?;
    let rig = Rig::in_bin(BIN)?;
    let paths = rig.array("ram", 4, 256, &RAID5)?;
    rig.wait_optimal(60)?;
    let device = rig.device()?;
    let was = rig.target_pid()?;
    // A change of the group writes them anew: each time just before.
    let stamp = |change: &dyn Fn(&mut [u8])| {
        let end = end_copy(&paths[2])?;
        [4096, end]
            .into_iter()
            .try_for_each(|at| rewrite(&paths[2], at, change))
    };
    let refused = |to: &str, change: &dyn Fn(&mut [u8]), says: &[&str]| -> Result<(), Failure> {
        for check in [
            &["upgrade", "--check", "--to", to][..],
            &["upgrade", "--to", to],
        ] {
            stamp(change)?;
            let out = rig.run(check)?;
            let said = format!("{}{}", out.stdout, out.stderr);
            ensure(
                out.code == 1 && says.iter().all(|what| said.contains(what)),
                || format!("{check:?}: exit {}: {said}", out.code),
            )?;
        }
        ensure(rig.target_pid()? == was, || "another process serves".into())?;
        sh_in(
            &format!("dd if=/dev/urandom of={device} bs=64k count=50 oflag=direct 2>/dev/null"),
            30,
        )
        .map(drop)
    };
    refused(
        NEXT,
        &|bytes| bytes[12] = 2,
        &[&paths[2], "format version 2"],
    )?;
    // A feature that nobody knows yet.
    let feature = |bytes: &mut [u8]| (bytes[12], bytes[39]) = (1, 0x80);
    refused(NEXT, &feature, &[&paths[2], "incompat"])?;
    sh("printf 'not a program' > /tmp/no-program; chmod +x /tmp/no-program")?;
    let nothing = |bytes: &mut [u8]| (bytes[12], bytes[39]) = (1, 0);
    refused("/tmp/no-program", &nothing, &["/tmp/no-program"])?;
    refused("/tmp/nowhere", &nothing, &["/tmp/nowhere"])
}

/// Given a mounted LU under verified load, when `lunar upgrade` is interrupted in the middle, then the upgrade is finished;
/// when mgmtd is killed in the middle of the next one and started again, then a ublk-target serves; no request fails.
fn cut_short() -> Result<(), Failure> {
    install()?;
    let mut rig = Rig::in_bin(BIN)?;
    rig.array("ram", 4, 256, &RAID5)?;
    let device = rig.device()?;
    let load = loaded(&rig, 45)?;
    let slow = script("slow", "sleep 3")?;
    let was = rig.target_pid()?;
    let begun = |was: &str| {
        until("the old one has ended", 30, || {
            Ok(sh(&format!("test -e /proc/{was} && echo there || true"))?.is_empty())
        })
    };
    let start = format!("{BIN}/lunar upgrade --to {slow} >/tmp/upgrade.out 2>&1 & echo $!");
    let client = sh(&start)?;
    begun(&was)?;
    sh(&format!("kill -INT {client}"))?;
    until("another serves", 30, || {
        Ok(rig.lunar(&["events"])?.contains("Upgraded"))
    })?;
    runs(&rig, &format!("{NEXT}/ublk-target"))?;
    let was = rig.target_pid()?;
    sh(&format!("sed -i s,{NEXT},{BIN}, {slow}"))?;
    sh(&start)?;
    begun(&was)?;
    rig.end_mgmtd("KILL")?;
    rig.start()?;
    until("the LU is served", 60, || {
        Ok(rig.state().is_ok_and(|(state, _)| state == "optimal"))
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    well(&rig, load, &device)
}

/// Given a mounted LU under verified load that an older commit's mgmtd and ublk-target serve, when mgmtd is started anew as
/// this version and `lunar upgrade` is given, and then the way back to the older ublk-target, then the LU is quiesced both
/// times (the older one cannot be asked to: it is done from outside), and no request fails.
fn older() -> Result<(), Failure> {
    let from = std::env::var("LUNAR_OLDER").unwrap_or_default();
    ensure(!from.is_empty(), || {
        "no older commit was built, fixtures/older.sh says why".into()
    })?;
    install()?;
    sh(&format!(
        "rm -rf /tmp/lunar-old; cp -r {from} /tmp/lunar-old"
    ))?;
    let mut rig = Rig::in_bin("/tmp/lunar-old")?;
    rig.array("ram", 4, 256, &RAID5)?;
    let device = rig.device()?;
    let load = loaded(&rig, 45)?;
    rig.end_mgmtd("TERM")?;
    rig.set_bin(BIN);
    rig.start()?;
    runs(&rig, "/tmp/lunar-old/ublk-target")?;
    upgrade(&rig, "from the older commit", &[])?;
    runs(&rig, &format!("{BIN}/ublk-target"))?;
    upgrade(&rig, "back to it", &["--to", "/tmp/lunar-old/ublk-target"])?;
    runs(&rig, "/tmp/lunar-old/ublk-target")?;
    upgrade(&rig, "and here again", &[])?;
    let outcome = text(&rig.json(&["upgrade", "--check"])?["outcome"]);
    ensure(outcome == "unchanged", || outcome)?;
    well(&rig, load, &device)
}
