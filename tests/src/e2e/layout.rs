//! Layouts equal md's, byte for byte.

use super::rig::Rig;
use super::shell::{Failure, sh, sh_in};
use super::{LONG, Test, add, ensure};

/// A geometry: level, members, chunk in KiB.
type Shape = (&'static str, usize, u32);

/// Bytes that are compared, of a device or of each member.
const COMPARED: usize = 48 << 20;
/// Bytes of md's members before their data.
const MD_OFFSET: u64 = 16 << 20;

/// Those that always run; every other one in a long run.
const SHORT_EQUAL: [Shape; 17] = [
    ("raid0", 3, 4),
    ("raid0", 4, 64),
    ("raid0", 8, 1024),
    ("raid5", 3, 64),
    ("raid5", 4, 4),
    ("raid5", 5, 1024),
    ("raid5", 6, 64),
    ("raid5", 8, 64),
    ("raid6", 4, 64),
    ("raid6", 5, 4),
    ("raid6", 6, 1024),
    ("raid6", 8, 64),
    ("raid10", 2, 64),
    ("raid10", 3, 4),
    ("raid10", 3, 1024),
    ("raid10", 4, 64),
    ("raid10", 5, 64),
];
const SHORT_READ: [Shape; 5] = [
    ("raid0", 5, 64),
    ("raid5", 3, 1024),
    ("raid5", 5, 64),
    ("raid6", 4, 64),
    ("raid10", 3, 64),
];

pub(super) fn tests(to: &mut Vec<Test>) {
    for (level, counts) in [
        ("raid0", 3..=8),
        ("raid5", 3..=8),
        ("raid6", 4..=8),
        ("raid10", 2..=6),
    ] {
        for members in counts {
            for chunk in [4, 64, 1024] {
                let shape = (level, members, chunk);
                let long = |short: &[Shape]| if short.contains(&shape) { "" } else { LONG };
                let name = format!("layout_{level}_of_{members}_chunk_{chunk}k");
                let equal = format!("{}{name}_equals_md", long(&SHORT_EQUAL));
                add(to, equal, move || equals_md(shape));
                let read = format!("{}{name}_reads_what_md_wrote", long(&SHORT_READ));
                add(to, read, move || reads_md(shape));
            }
        }
    }
}

/// An md device; stopped, and its members zeroed, when it is dropped.
struct Md {
    members: Vec<String>,
}

impl Md {
    const DEVICE: &str = "/dev/md77";

    /// On the upper eight RAM disks, with the layout of a shape.
    fn new((level, members, chunk): Shape) -> Result<Self, Failure> {
        let disks: Vec<String> = (0..members).map(|i| format!("/dev/ram{}", 8 + i)).collect();
        let layout = match level {
            "raid5" | "raid6" => "--layout=left-symmetric --bitmap=none",
            "raid10" => "--layout=n2 --bitmap=none",
            _ => "",
        };
        sh_in(
            &format!(
                "mdadm --create {} --run --assume-clean --metadata=1.2 --data-offset=16M --level={} \
                 --raid-devices={members} --chunk={chunk} {layout} {} >&2",
                Self::DEVICE,
                level.trim_start_matches("raid"),
                disks.join(" ")
            ),
            60,
        )?;
        Ok(Self { members: disks })
    }
}

impl Drop for Md {
    fn drop(&mut self) {
        let _ = sh(&format!(
            "mdadm --stop {} 2>/dev/null; for d in {}; do blkdiscard $d; done",
            Self::DEVICE,
            self.members.join(" ")
        ));
    }
}

/// The same seed of unaligned partial writes, always the same bytes.
fn write(device: &str) -> Result<(), Failure> {
    sh_in(
        &format!(
            "fio --name=l --filename={device} --size=48m --direct=1 --ioengine=io_uring --iodepth=1 --rw=randwrite \
             --bsrange=512-300k --blockalign=512 --randseed=99 --io_size=64m --buffer_pattern=0x5a --refill_buffers=0 \
             --verify=pattern --verify_pattern=%o --do_verify=0 >/tmp/fio.out 2>&1 || {{ cat /tmp/fio.out; exit 1; }}"
        ),
        200,
    )?;
    Ok(())
}

/// Lunar's group of a shape on the lower RAM disks; it writes nothing to their data.
fn create(rig: &Rig, (level, members, chunk): Shape) -> Result<Vec<String>, Failure> {
    let chunk = format!("{chunk}KiB");
    let create = ["--level", level, "--chunk", &chunk, "--assume-clean"];
    rig.array("ram", members, 256, &create)
}

fn data_offsets(rig: &Rig) -> Result<Vec<u64>, Failure> {
    let group = rig.json(&["group", "show", "data"])?;
    let members = group["members"].as_array().ok_or("no members")?;
    let offsets = members.iter().map(|m| m["data_offset"].as_u64());
    offsets
        .collect::<Option<_>>()
        .ok_or("no data_offset".into())
}

/// Given zeroed members for Lunar and for md, when the same seed of unaligned partial writes goes through both,
/// then the data areas of all members are equal, and Lunar's degraded reads equal md's device.
fn equals_md(shape: Shape) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = create(&rig, shape)?;
    let md = Md::new(shape)?;
    let device = rig.device()?;
    for on in [device.as_str(), Md::DEVICE] {
        write(on)?;
    }
    sh("sync")?;
    let members = paths.iter().zip(&md.members).zip(data_offsets(&rig)?);
    for (slot, ((ours, theirs), offset)) in members.enumerate() {
        sh_in(
            &format!("cmp -n {COMPARED} -i {offset}:{MD_OFFSET} {ours} {theirs} >&2"),
            60,
        )
        .map_err(|why| format!("slot {slot}: {why}"))?;
    }
    same(&device)?;
    let lost = match shape {
        ("raid6", ..) | ("raid10", 4.., _) => &paths[1..4],
        ("raid5" | "raid10", ..) => &paths[1..2],
        _ => &[],
    };
    // Not neighbours: those may hold the same.
    for path in lost.iter().step_by(2) {
        rig.lunar(&["disk", "fail", path, "--yes"])?;
        same(&device).map_err(|why| format!("without {path}: {why}"))?;
    }
    Ok(())
}

/// Compares a device with md's, past the page cache of both.
fn same(device: &str) -> Result<(), Failure> {
    let md = Md::DEVICE;
    sh_in(
        &format!("blockdev --flushbufs {device} {md}; cmp -n {COMPARED} {device} {md} >&2"),
        60,
    )?;
    Ok(())
}

/// Given md's members after unaligned partial writes, when their data areas are put under a group of Lunar that
/// has read nothing yet, then Lunar reads what md reads: with all members, and with each one (raid6: each two) failed
/// in turn.
fn reads_md(shape: Shape) -> Result<(), Failure> {
    let (level, members, _) = shape;
    let md = Md::new(shape)?;
    write(Md::DEVICE)?;
    sh("sync")?;
    let mut losses = vec![Vec::new()];
    match level {
        "raid5" | "raid10" => losses.extend((0..members).map(|slot| vec![slot])),
        "raid6" => losses.extend((0..members).flat_map(|b| (0..b).map(move |a| vec![a, b]))),
        _ => {}
    }
    for failed in losses {
        let rig = Rig::new()?;
        let paths = create(&rig, shape)?;
        let device = rig.device()?;
        for ((ours, theirs), offset) in paths.iter().zip(&md.members).zip(data_offsets(&rig)?) {
            sh_in(
                &format!(
                    "dd if={theirs} of={ours} iflag=direct,skip_bytes,count_bytes oflag=direct,seek_bytes bs=1M \
                     skip={MD_OFFSET} seek={offset} count={COMPARED} conv=notrunc 2>/dev/null"
                ),
                60,
            )?;
        }
        for slot in &failed {
            rig.lunar(&["disk", "fail", &paths[*slot], "--yes"])?;
        }
        same(&device).map_err(|why| format!("without {failed:?}: {why}"))?;
        let (state, _) = rig.state()?;
        ensure((state == "degraded") != failed.is_empty(), || {
            format!("without {failed:?} the state is {state}")
        })?;
    }
    Ok(())
}
