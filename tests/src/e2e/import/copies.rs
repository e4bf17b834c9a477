//! Copies of disks, and superblocks that are damaged, of the future, or cut.

use lunar_engine::superblock::crc32c;

use super::super::ensure;
use super::super::rig::{Rig, members};
use super::super::shell::{Failure, sh};
use super::{RAID5, import, refused, seed, seed_is_there, status_says, unwritten};

/// Given a copy of one member, or of all, then none of the twins is used and both are named; a copy that becomes a new disk
/// is no copy any more. A group that runs goes on with its own.
pub(super) fn copies() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = rig.array("ram", 3, 256, &RAID5)?;
    seed(&rig)?;
    rig.shutdown()?;
    let all: Vec<String> = (0..3)
        .chain(8..11)
        .map(|i| format!("/dev/ram{i}"))
        .collect();
    for copied in [&[1][..], &[0, 2]] {
        for i in copied {
            sh(&format!(
                "dd if=/dev/ram{i} of=/dev/ram{} bs=1M conv=sparse 2>/dev/null",
                i + 8
            ))?;
        }
        unwritten(&all, || {
            rig.start()?;
            status_says(
                &rig,
                &["state: STOPPED", "/dev/ram1 and /dev/ram9", "--as-new"],
            )?;
            refused(
                &rig,
                &["group", "start", "data"],
                6,
                &["/dev/ram1", "/dev/ram9"],
            )?;
            refused(
                &rig,
                &import(&[], &all[1..2]),
                6,
                &["/dev/ram1", "/dev/ram9"],
            )?;
            rig.shutdown()
        })?;
    }
    rig.start()?;
    refused(
        &rig,
        &["disk", "add", "--as-new", "/dev/ram9"],
        6,
        &["a copy of /dev/ram1"],
    )?;
    rig.lunar(&[
        "disk",
        "add",
        "--as-new",
        "--yes",
        "/dev/ram8",
        "/dev/ram9",
        "/dev/ram10",
    ])?;
    rig.lunar(&["group", "start", "data"])?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    seed_is_there(&rig)?;
    sh("dd if=/dev/ram2 of=/dev/ram12 bs=1M conv=sparse 2>/dev/null")?;
    rig.end_mgmtd("TERM")?;
    rig.start()?;
    status_says(
        &rig,
        &["state: optimal", "/dev/ram12 is a copy of /dev/ram2"],
    )?;
    ensure(rig.state()?.0 == "optimal", || format!("{:?}", rig.state()))?;
    ensure(paths.len() == 3, || "three members".into())?;
    seed_is_there(&rig)
}

/// Changes the superblock at byte `at` of a disk, with a right checksum.
pub(in crate::e2e) fn rewrite(
    path: &str,
    at: u64,
    change: impl FnOnce(&mut [u8]),
) -> Result<(), Failure> {
    use std::os::unix::fs::FileExt;
    let say = |error: std::io::Error| format!("{path}: {error}");
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(say)?;
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, at).map_err(say)?;
    change(&mut bytes);
    bytes[8..12].fill(0);
    let crc = crc32c(&bytes);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    file.write_all_at(&bytes, at).map_err(say)?;
    file.sync_all().map_err(say)
}

/// Where the second superblock of a disk is.
pub(in crate::e2e) fn end_copy(path: &str) -> Result<u64, Failure> {
    let text = sh(&format!(
        "dd if={path} bs=1 skip=$((4096 + 320)) count=8 2>/dev/null | od -An -tu8"
    ))?;
    text.trim()
        .parse()
        .map_err(|error| format!("{path}: {text}: {error}"))
}

/// Given a disk with one damaged superblock of its two, a larger one, one of a future Lunar, and one that was cut short:
/// then the first two serve as they are; the others are named, left as they are, and the group goes on without.
pub(super) fn damaged() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let paths = members("ext4-file", 3, 96)?;
    rig.array_of(&paths, &RAID5)?;
    seed(&rig)?;
    let victim = paths[1].clone();
    let end = end_copy(&victim)?;
    for at in [4096, end] {
        rig.shutdown()?;
        sh(&format!(
            "dd if=/dev/urandom of={victim} bs=1 seek={} count=64 conv=notrunc,fsync 2>/dev/null",
            at + 700
        ))?;
        rig.start()?;
        rig.wait_optimal(60)?;
        let events = rig.lunar(&["events"])?;
        let copy = if at == 4096 { "copy 0" } else { "copy 1" };
        ensure(
            events.contains("SuperblockDamaged") && events.contains(copy),
            || events.clone(),
        )?;
        seed(&rig)?;
    }
    rig.shutdown()?;
    sh(&format!("truncate -s +32M {victim}"))?;
    rig.start()?;
    rig.wait_optimal(60)?;
    seed_is_there(&rig)?;
    // From here on without it, each time from the same bytes.
    rig.shutdown()?;
    let put = paths
        .iter()
        .map(|p| format!("cp --sparse=always $d/{0} {p}; ", name(p)))
        .collect::<String>();
    sh(&format!(
        "d=/tmp/kept; mkdir -p $d; cp --sparse=always {} $d/",
        paths.join(" ")
    ))?;
    for (what, says) in [("future", "format version 2"), ("cut", "cut off")] {
        sh(&format!("d=/tmp/kept; {put}"))?;
        if what == "future" {
            for at in [4096, end] {
                rewrite(&victim, at, |bytes| bytes[12] = 2)?;
            }
        } else {
            sh(&format!("truncate -s 80M {victim}"))?;
        }
        unwritten(std::slice::from_ref(&victim), || {
            if what == "future" {
                rig.start()?;
            } else {
                // The witness has seen the group without it.
                sh(&format!("rm -rf {0}; mkdir {0}", rig.state_dir()))?;
                rig.start()?;
                let said = rig.lunar(&import(&[], &paths))?;
                ensure(said.contains(says) && said.contains("degraded"), || {
                    said.clone()
                })?;
            }
            status_says(&rig, &["state: DEGRADED", &victim, says])?;
            refused(&rig, &["import", &victim], 6, &[says])?;
            seed_is_there(&rig)?;
            rig.shutdown()
        })?;
    }
    Ok(())
}

fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}
