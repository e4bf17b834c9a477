//! What raid6, raid10 and linear promise: every loss that leaves the data there is read around and rebuilt; members of
//! any size in a row; mkfs takes what `lu show` says.

use super::disks::{identity, let_go};
use super::rig::{Rig, text};
use super::shell::{Failure, sh, sh_in, until};
use super::{LONG, Test, add, ensure};

/// MiB of a member of a group that is read whole again and again: the least that a disk can have.
const MIB: u64 = 64;

pub(super) fn tests(to: &mut Vec<Test>) {
    for members in [4, 5, 6, 8] {
        let long = if members == 4 { "" } else { LONG };
        add(
            to,
            format!("{long}levels_raid6_of_{members}_every_pair_lost_read_and_rebuilt"),
            move || every_loss("raid6", members, |_, _| true),
        );
    }
    for (members, two, long) in [(5, (1, 3), ""), (4, (0, 2), LONG), (6, (4, 5), LONG)] {
        add(
            to,
            format!("{long}levels_raid6_of_{members}_reads_by_two_rebuilt_without_each_other"),
            move || rebuilt_is_relied_on(members, two),
        );
    }
    for members in [3, 4, 5, 6] {
        let long = if members == 5 { "" } else { LONG };
        add(
            to,
            format!(
                "{long}levels_raid10_of_{members}_every_loss_of_two_that_leaves_copies_read_and_rebuilt"
            ),
            move || {
                every_loss("raid10", members, |a, b| match members % 2 {
                    0 => a / 2 != b / 2,
                    _ => b - a > 1 && b - a < members - 1,
                })
            },
        );
    }
    add(to, "levels_raid6_without_three_members_is_eio", third_loss);
    add(
        to,
        "levels_raid10_without_both_copies_is_refused_and_one_of_each_is_not",
        neighbours,
    );
    add(to, "levels_linear_has_all_of_members_of_any_size", linear);
    for (long, level, members, chunk, data) in [
        ("", "raid6", 5, 64, 3),
        ("", "raid10", 7, 64, 7),
        ("", "linear", 3, 0, 0),
        (LONG, "raid6", 6, 4, 4),
        (LONG, "raid10", 6, 1024, 3),
        (LONG, "raid5", 4, 512, 3),
        (LONG, "raid0", 3, 64, 3),
    ] {
        add(
            to,
            format!("{long}levels_mkfs_takes_what_lu_show_says_of_{level}_of_{members}"),
            move || mkfs(level, members, chunk, data),
        );
    }
}

/// Disks of these sizes in MiB.
fn sized(sizes: &[u64]) -> Result<Vec<String>, Failure> {
    let sizes = sizes.iter().enumerate();
    sizes
        .map(|(i, mib)| sh(&format!("member_make dm {i} {mib}")))
        .collect()
}

/// Writes random bytes to all of the LU; they are in /tmp/content too.
fn fill(device: &str) -> Result<(), Failure> {
    sh_in(
        &format!(
            "size=$(blockdev --getsize64 {device}); head -c $size /dev/urandom > /tmp/content
             dd if=/tmp/content of={device} bs=1M oflag=direct 2>/dev/null"
        ),
        100,
    )
    .map(drop)
}

/// Reads all of the LU past the page cache and compares.
fn reads_as_written(device: &str) -> Result<(), Failure> {
    sh_in(
        // Not by a pipe, which is slow.
        &format!("dd if={device} of=/tmp/read iflag=direct bs=1M 2>/dev/null; cmp /tmp/read /tmp/content >&2"),
        100,
    )
    .map(drop)
}

/// Given a group full of data, when any two members are failed that may be, then all of it reads as written, degraded
/// writes too; overwritten with something else, put back and rebuilt one after the other, they hold what they should:
/// all reads as written meanwhile, and the next two are taken away.
fn every_loss(
    level: &str,
    members: usize,
    may_be_lost: impl Fn(usize, usize) -> bool,
) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = sized(&vec![MIB; members])?;
    rig.array_of(
        &paths,
        &["--level", level, "--chunk", "64KiB", "--assume-clean"],
    )?;
    let device = rig.device()?;
    fill(&device)?;
    let mut pairs = Vec::new();
    for (a, b) in (0..members).flat_map(|a| (a + 1..members).map(move |b| (a, b))) {
        if may_be_lost(a, b) {
            pairs.push((a, b));
        }
    }
    if pairs.is_empty() {
        pairs.extend((0..members).map(|a| (a, a)));
    }
    for (turn, (a, b)) in pairs.into_iter().enumerate() {
        let what = format!("without {a} and {b}");
        let mut lost = vec![a, b];
        lost.dedup();
        for slot in &lost {
            rig.lunar(&["disk", "fail", &paths[*slot], "--yes"])?;
        }
        sh_in(
            &format!(
                "head -c 3000000 /dev/urandom > /tmp/part; for to in {device} /tmp/content; do
                 dd if=/tmp/part of=$to bs=1M seek={} conv=notrunc,fsync 2>/dev/null; done",
                5 + 3 * (turn % 12)
            ),
            60,
        )?;
        reads_as_written(&device).map_err(|why| format!("{what}: {why}"))?;
        let (state, _) = rig.state()?;
        ensure(state == "degraded", || format!("{what}: {state}"))?;
        for slot in lost {
            // It is not read where it is not filled yet.
            let early = turn < 2;
            rig.rebuild_rate(if early { "4MiB" } else { "1GiB" })?;
            put_back(&rig, &paths[slot], slot, || match early {
                true => reads_as_written(&device).and_then(|()| rig.rebuild_rate("1GiB")),
                false => Ok(()),
            })
            .map_err(|why| format!("{what}: {why}"))?;
        }
        rig.wait_optimal(100)?;
        reads_as_written(&device).map_err(|why| format!("{what}, rebuilt: {why}"))?;
    }
    Ok(())
}

/// Overwrites a failed member's data with something else, puts the disk back, does something `meanwhile`, and waits until
/// it is rebuilt.
fn put_back(
    rig: &Rig,
    path: &str,
    slot: usize,
    meanwhile: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let_go(rig, path, identity(path)?)?;
    let group = rig.json(&["group", "show", "data"])?;
    let offset = group["members"][slot]["data_offset"].as_u64();
    let offset = offset.ok_or("no data_offset")? >> 20;
    sh_in(
        &format!(
            "dd if=/dev/urandom of={path} bs=1M seek={offset} count=$(({MIB} - 1 - {offset})) oflag=direct 2>/dev/null"
        ),
        30,
    )?;
    rig.lunar(&["disk", "replace", path, path, "--full"])?;
    meanwhile()?;
    until("the slot is in sync", 100, || {
        Ok(rig.state()?.1[slot] == "in_sync")
    })
    .map_err(|why| format!("{why}\n{}", rig.log_tail()))
}

/// Given a raid6 whose members two were lost, overwritten and rebuilt, when each other member is taken away, then all
/// reads as written; the same with each two others.
fn rebuilt_is_relied_on(members: usize, two: (usize, usize)) -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = sized(&vec![MIB; members])?;
    rig.array_of(
        &paths,
        &["--level", "raid6", "--chunk", "64KiB", "--assume-clean"],
    )?;
    let device = rig.device()?;
    fill(&device)?;
    for slot in [two.0, two.1] {
        rig.lunar(&["disk", "fail", &paths[slot], "--yes"])?;
    }
    for slot in [two.0, two.1] {
        put_back(&rig, &paths[slot], slot, || Ok(()))?;
    }
    rig.wait_optimal(100)?;
    let others: Vec<usize> = (0..members)
        .filter(|slot| ![two.0, two.1].contains(slot))
        .collect();
    for (i, &a) in others.iter().enumerate() {
        rig.lunar(&["disk", "fail", &paths[a], "--yes"])?;
        reads_as_written(&device).map_err(|why| format!("rebuilt, without {a}: {why}"))?;
        for &b in &others[i + 1..] {
            rig.lunar(&["disk", "fail", &paths[b], "--yes"])?;
            reads_as_written(&device)
                .map_err(|why| format!("rebuilt, without {a} and {b}: {why}"))?;
            put_back(&rig, &paths[b], b, || Ok(()))?;
        }
        put_back(&rig, &paths[a], a, || Ok(()))?;
    }
    Ok(())
}

/// Given a raid6, when two members are failed by hand and the third dies, then what needs it is EIO and what does not
/// reads as written; failing it by hand was refused.
fn third_loss() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = sized(&[64; 5])?;
    rig.array_of(
        &paths,
        &["--level", "raid6", "--chunk", "64KiB", "--assume-clean"],
    )?;
    let device = rig.device()?;
    fill(&device)?;
    for (slot, says) in [(0, "survives one more"), (3, "another failure may lose")] {
        rig.lunar(&["disk", "fail", &paths[slot], "--yes"])?;
        let status = rig.run(&["status"])?;
        ensure(status.code == 3 && status.stdout.contains(says), || {
            status.stdout.clone()
        })?;
    }
    let refused = rig.run(&["disk", "fail", &paths[1], "--yes"])?;
    ensure(
        refused.code != 0 && refused.stderr.contains("data would be lost"),
        || refused.stderr.clone(),
    )?;
    reads_as_written(&device)?;
    sh("dm_error member1")?;
    let wrong = sh_in(
        &format!(
            "errors=0; for at in $(seq 0 29); do
                 if dd if={device} of=/tmp/part iflag=direct bs=64k skip=$at count=1 2>/dev/null
                 then cmp -s -n 65536 -i 0:$((at * 65536)) /tmp/part /tmp/content || echo wrong at $at
                 else errors=$((errors + 1)); fi; done; [ $errors -gt 0 ] || echo no errors"
        ),
        60,
    );
    sh("dm_heal member1")?;
    let wrong = wrong?;
    ensure(wrong.is_empty(), || wrong.clone())
}

/// Given a raid10 of 4, when one of each two that hold the same is failed, then all reads as written; the other of
/// one of them is refused.
fn neighbours() -> Result<(), Failure> {
    let rig = Rig::new()?;
    let paths = sized(&[64; 4])?;
    rig.array_of(
        &paths,
        &["--level", "raid10", "--chunk", "64KiB", "--assume-clean"],
    )?;
    let device = rig.device()?;
    fill(&device)?;
    rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    let refused = rig.run(&["disk", "fail", &paths[0], "--yes"])?;
    ensure(
        refused.code != 0 && refused.stderr.contains("data would be lost"),
        || refused.stderr.clone(),
    )?;
    rig.lunar(&["disk", "fail", &paths[2], "--yes"])?;
    reads_as_written(&device)
}

/// Given disks of three sizes, when a linear group is made of them, then it has all of each but the reserve, bytes go
/// where the sizes say, and a new start finds them.
fn linear() -> Result<(), Failure> {
    let mut rig = Rig::new()?;
    let sizes = [64, 112, 80];
    let paths = sized(&sizes)?;
    rig.array_of(&paths, &["--level", "linear"])?;
    let device = rig.device()?;
    fill(&device)?;
    let group = rig.json(&["group", "show", "data"])?;
    let mut at = 0;
    for (slot, (path, mib)) in paths.iter().zip(sizes).enumerate() {
        let offset = group["members"][slot]["data_offset"].as_u64();
        let offset = offset.ok_or("no data_offset")?;
        let len = (mib << 20) - offset - (1 << 20);
        sh_in(
            &format!("cmp -n {len} -i {offset}:{at} {path} /tmp/content >&2"),
            30,
        )
        .map_err(|why| format!("slot {slot}: {why}"))?;
        at += len;
    }
    let size: u64 = sh("stat -c %s /tmp/content")?
        .parse()
        .map_err(|_| "no size")?;
    ensure(size == at, || format!("{size} of {at} bytes are in the LU"))?;
    rig.shutdown()?;
    rig.start()?;
    rig.wait_lu()?;
    reads_as_written(&rig.device()?)
}

/// Given a group whose full stripe is or is not a power of two, when the lines of `lu show` are typed, then mkfs takes
/// them, and the file systems have that geometry and can be mounted.
fn mkfs(level: &str, members: usize, chunk: usize, data: usize) -> Result<(), Failure> {
    let rig = Rig::new()?;
    // What mkfs.xfs wants by itself: no less than 300 MiB, with a stripe no less than about 600.
    let paths = sized(&vec![256; members])?;
    let kib = format!("{chunk}KiB");
    let mut create = vec!["--level", level, "--assume-clean"];
    if chunk > 0 {
        create.extend(["--chunk", &kib]);
    }
    rig.array_of(&paths, &create)?;
    let lu = rig.json(&["lu", "show", "vol"])?;
    let lines = lu["mkfs"].as_array().ok_or("no mkfs lines")?;
    let kinds = lines.iter().map(text).filter_map(|line| {
        let kind = line.split_whitespace().next()?.strip_prefix("mkfs.")?;
        Some((kind.to_owned(), line.clone()))
    });
    let kinds: Vec<(String, String)> = kinds.collect();
    for wanted in ["ext4", "xfs"] {
        let (_, line) = (kinds.iter().find(|(kind, _)| kind == wanted))
            .ok_or_else(|| format!("no line for {wanted} in {lines:?}"))?;
        let facts = match wanted {
            "ext4" => "dumpe2fs -h /dev/lunar/vol 2>/dev/null",
            _ => "xfs_db -r -c info /dev/lunar/vol",
        };
        let out = sh_in(
            &format!(
                "wipefs -qa /dev/lunar/vol; {line} >/tmp/mkfs.out 2>&1 || {{ cat /tmp/mkfs.out; exit 1; }}
                 {facts}
                 mkdir -p /mnt/l; mount -t {wanted} /dev/lunar/vol /mnt/l; touch /mnt/l/x; umount /mnt/l"
            ),
            60,
        )
        .map_err(|why| format!("{line}: {why}"))?;
        let (stride, width) = (chunk / 4, chunk / 4 * data);
        let expected = match (chunk, wanted) {
            (0, "ext4") => vec![],
            (0, _) => vec!["sunit=0 swidth=0 blks".to_owned()],
            (_, "ext4") => vec![
                format!("RAID stride: {stride}"),
                format!("RAID stripe width: {width}"),
            ],
            _ => vec![format!("sunit={stride} swidth={width} blks")],
        };
        let squeezed = out.split_whitespace().collect::<Vec<_>>().join(" ");
        for fact in expected {
            ensure(squeezed.contains(&fact), || {
                format!("{line}: no `{fact}` in {out}")
            })?;
        }
    }
    Ok(())
}
