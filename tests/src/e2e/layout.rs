//! Layouts equal md's, byte for byte.

use super::rig::Rig;
use super::shell::{Failure, sh, sh_in};
use super::{Test, add};

pub(super) fn tests(to: &mut Vec<Test>) {
    for level in ["raid0", "raid5"] {
        for members in [3, 4, 5, 8] {
            for chunk in [4, 64, 1024] {
                if chunk == 4 && members == 8 {
                    continue;
                }
                add(
                    to,
                    format!("layout_{level}_of_{members}_chunk_{chunk}k_equals_md"),
                    move || equals_md(level, members, chunk),
                );
            }
        }
    }
}

/// Given zeroed members for Lunar and for md, when the same seed of unaligned partial writes goes through both,
/// then the data areas of all members are equal, and Lunar's degraded reads equal md's device.
fn equals_md(level: &str, members: usize, chunk: u32) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let create = [
        "--level",
        level,
        "--chunk",
        &format!("{chunk}KiB"),
        "--assume-clean",
    ];
    let paths = rig.array("ram", members, 256, &create)?;
    let device = rig.device()?;
    let theirs: Vec<String> = (0..members).map(|i| format!("/dev/ram{}", 8 + i)).collect();
    let md = sh_in(
        &format!(
            "mdadm --create /dev/md77 --run --assume-clean --metadata=1.2 --data-offset=16M --level={} \
             --raid-devices={members} --chunk={chunk} {} {} >&2; echo /dev/md77",
            level.trim_start_matches("raid"),
            if level == "raid5" {
                "--layout=left-symmetric --bitmap=none"
            } else {
                ""
            },
            theirs.join(" ")
        ),
        60,
    )?;
    let result = compare(&rig, &device, &md, &paths, &theirs, level);
    sh("mdadm --stop /dev/md77 2>/dev/null; true")?;
    result
}

fn compare(
    rig: &Rig,
    device: &str,
    md: &str,
    paths: &[String],
    theirs: &[String],
    level: &str,
) -> Result<(), Failure> {
    for on in [device, md] {
        sh_in(
            &format!(
                "fio --name=l --filename={on} --size=48m --direct=1 --ioengine=io_uring --iodepth=1 --rw=randwrite \
                 --bsrange=512-300k --blockalign=512 --randseed=99 --io_size=64m --buffer_pattern=0x5a --refill_buffers=0 \
                 --verify=pattern --verify_pattern=%o --do_verify=0 >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
            ),
            200,
        )?;
    }
    sh("sync")?;
    let group = rig.json(&["group", "show", "data"])?;
    for (slot, (ours, theirs)) in paths.iter().zip(theirs).enumerate() {
        let offset = group["members"][slot]["data_offset"]
            .as_u64()
            .ok_or("no data_offset")?;
        sh_in(
            &format!("cmp -n $((48 << 20)) -i {offset}:$((16 << 20)) {ours} {theirs} >&2"),
            60,
        )
        .map_err(|why| format!("slot {slot}: {why}"))?;
    }
    sh_in(&format!("cmp -n $((48 << 20)) {device} {md} >&2"), 60)?;
    if level == "raid5" {
        rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
        sh_in(
            &format!("blockdev --flushbufs {device}; cmp -n $((48 << 20)) {device} {md} >&2"),
            60,
        )?;
    }
    Ok(())
}
