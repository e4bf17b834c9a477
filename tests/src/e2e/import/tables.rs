//! A state directory that is full, and tables that rotted.

use super::super::ensure;
use super::super::rig::Rig;
use super::super::shell::{Failure, sh, sh_in, until};
use super::{RAID5, seed, seed_is_there};

/// Given a state directory on a small file system that fills up, then commands and `status` say so, I/O goes on, and
/// nothing is lost once there is room.
pub(super) fn full() -> Result<(), Failure> {
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
pub(super) fn rotted() -> Result<(), Failure> {
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
