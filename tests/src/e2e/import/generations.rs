//! Older copies of members, and two sides that were used apart.

use super::super::ensure;
use super::super::rig::Rig;
use super::super::shell::{Failure, sh, until};
use super::{RAID5, import, refused, seed, seed_is_there, status_says, unwritten};

/// Keeps a sparse copy of a RAM disk, or puts it back.
fn keep(disk: u32, to: &str) -> Result<(), Failure> {
    sh(&format!("dd if=/dev/ram{disk} of=/tmp/{to} bs=1M conv=sparse 2>/dev/null; truncate -s 256M /tmp/{to}")).map(drop)
}

fn put(disk: u32, from: &str) -> Result<(), Failure> {
    sh(&format!(
        "dd if=/tmp/{from} of=/dev/ram{disk} bs=1M conv=fsync 2>/dev/null"
    ))
    .map(drop)
}

/// Given half the members from an older copy, or two halves that were used apart, then the group does not start, the disks
/// are named, and nothing is written, with the state directory and without; a side is chosen by a person.
pub(super) fn generations() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 4, 256, &RAID5)?;
    rig.shutdown()?;
    keep(0, "old0")?;
    keep(1, "old1")?;
    rig.start()?;
    seed(&rig)?;
    rig.shutdown()?;
    put(0, "old0")?;
    put(1, "old1")?;
    unwritten(&paths, || {
        rig.start()?;
        status_says(
            &rig,
            &[
                "state: STOPPED",
                "/dev/ram0 (slot 0) is an older copy",
                "/dev/ram1 (slot 1) is an older copy",
            ],
        )?;
        rig.shutdown()?;
        sh(&format!("mv {0} {0}.a; mkdir {0}", rig.state_dir()))?;
        rig.start()?;
        refused(
            &rig,
            &import(&[], &paths),
            3,
            &["group data does not start", "older copy"],
        )?;
        rig.shutdown()?;
        sh(&format!("rm -rf {0}; mv {0}.a {0}", rig.state_dir()))
    })?;
    rig.start()?;
    rig.lunar(&["group", "delete", "data", "--yes"])?;
    sides(&mut rig)
}

/// Two disks of a raid1, each used without the other.
fn sides(rig: &mut Rig) -> Result<(), Failure> {
    rig.mirror("data", "1,2", "vol")?;
    let paths = ["/dev/ram0", "/dev/ram1"].map(String::from);
    let hide = "blkdiscard /dev/ram";
    rig.shutdown()?;
    keep(0, "both0")?;
    keep(1, "both1")?;
    sh(&format!("{hide}1"))?;
    rig.start()?;
    until("degraded", 30, || Ok(rig.state()?.0 == "degraded"))?;
    seed(rig)?;
    rig.shutdown()?;
    keep(0, "one")?;
    sh(&format!("{hide}0"))?;
    put(1, "both1")?;
    rig.start()?;
    refused(
        rig,
        &["group", "start", "data"],
        6,
        &["older than what was seen last"],
    )?;
    rig.lunar(&["group", "start", "data", "--force", "--yes"])?;
    sh("dd if=/dev/urandom of=/dev/lunar/vol bs=1M count=4 oflag=direct conv=fsync 2>/dev/null")?;
    rig.shutdown()?;
    put(0, "one")?;
    unwritten(&paths, || {
        rig.start()?;
        status_says(
            rig,
            &[
                "state: STOPPED",
                "/dev/ram0",
                "/dev/ram1",
                "lunar group resolve data --keep DISK",
            ],
        )?;
        refused(
            rig,
            &["group", "resolve", "data", "--keep", "1"],
            6,
            &["/dev/ram1 wrote apart from /dev/ram0"],
        )?;
        refused(
            rig,
            &["group", "resolve", "data", "--keep", "nosuch"],
            2,
            &["nosuch"],
        )?;
        rig.lunar(&["group", "resolve", "data", "--keep", "1", "--dry-run"])
            .map(drop)
    })?;
    rig.lunar(&["group", "resolve", "data", "--keep", "1", "--yes"])?;
    seed_is_there(rig)?;
    ensure(rig.state()?.0 == "degraded", || {
        format!("{:?}", rig.state())
    })?;
    // The other side is stale for good, and becomes a member again.
    rig.shutdown()?;
    rig.start()?;
    until("degraded", 30, || Ok(rig.state()?.0 == "degraded"))?;
    rig.lunar(&["disk", "replace", "2", "2", "--yes"])?;
    rig.wait_optimal(60)?;
    seed_is_there(rig)
}
