//! Discards and zeroing on real disks: what is read is what was asked for, redundancy fits, and space comes back.

use super::disks::redundancy_is_right;
use super::rig::{Rig, members, text};
use super::shell::{Failure, pause, sh, sh_in, until};
use super::{LONG, Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    for (long, kind, level, count) in [
        ("", "ext4-file", "raid5", 3),
        ("", "ext4-file", "raid0", 3),
        ("", "loop", "raid6", 4),
        ("", "4k", "raid10", 5),
        (LONG, "ext4-file", "raid1", 2),
        (LONG, "ext4-file", "raid5", 4),
        (LONG, "ext4-file", "raid6", 5),
        (LONG, "loop", "raid10", 4),
        (LONG, "null_blk", "raid5", 3),
        (LONG, "null_blk", "raid6", 4),
        (LONG, "ram", "raid1", 3),
        (LONG, "ram", "raid10", 5),
    ] {
        let name = format!("{long}discard_reads_as_asked_for_{level}_of_{count}_{kind}");
        add(to, name, move || reads_as_asked_for(kind, level, count));
    }
    for (long, fs, level) in [
        ("", "ext4", "raid5"),
        ("", "xfs", "raid10"),
        (LONG, "ext4", "raid1"),
        (LONG, "ext4", "raid6"),
        (LONG, "ext4", "raid10"),
        (LONG, "xfs", "raid1"),
        (LONG, "xfs", "raid5"),
        (LONG, "xfs", "raid6"),
    ] {
        let name = format!("{long}discard_by_fstrim_of_{fs}_frees_the_members_{level}");
        add(to, name, move || fstrim(fs, level));
    }
    for (long, fs, level) in [("", "ext4", "raid5"), (LONG, "xfs", "raid6")] {
        let name = format!("{long}discard_by_fstrim_survives_kills_{fs}_{level}");
        add(to, name, move || trimmed_and_killed(fs, level));
    }
    add(to, "discard_of_a_member_that_keeps_its_space", mixed);
    add(to, "discard_while_degraded_and_rebuilt", degraded);
    add(to, "discard_makes_a_new_lu_read_as_zero", new_lu);
    for (long, level) in [("", "raid5"), (LONG, "raid1"), (LONG, "raid10")] {
        let name = format!("{long}discard_survives_kills_{level}");
        add(to, name, move || kills(level));
    }
}

const MIB: u64 = 1 << 20;
/// Bytes of the LU that are looked at; `/tmp/content` says what they are.
const CONTENT: u64 = 48 * MIB;

/// A running system with an array of zeroed members; where members differ, its LU has two queues.
fn array(kind: &str, level: &str, count: usize, mib: u32) -> Result<(Rig, Vec<String>), Failure> {
    let rig = Rig::new()?;
    let create = ["--level", level, "--chunk", "64KiB", "--assume-clean"];
    let create = match level {
        "raid0" => &create[..4],
        _ => &create[..],
    };
    let paths = rig.array(kind, count, mib, create)?;
    if level != "raid1" {
        rig.lunar(&["lu", "set", "vol", "--queues", "2"])?;
    }
    Ok((rig, paths))
}

/// Random content in the first bytes.
fn fill(rig: &Rig) -> Result<(), Failure> {
    sh(&format!(
        "dd if=/dev/urandom of=/tmp/content bs=1M count={} 2>/dev/null
         dd if=/tmp/content of={} bs=1M oflag=direct 2>/dev/null",
        CONTENT / MIB,
        rig.device()?
    ))
    .map(drop)
}

fn content_is_right(rig: &Rig, when: &str) -> Result<(), Failure> {
    let device = rig.device()?;
    sh(&format!(
        "dd if={device} bs=1M count={} iflag=direct 2>/dev/null | cmp - /tmp/content >&2",
        CONTENT / MIB
    ))
    .map(drop)
    .map_err(|why| format!("{when}: {why}\n{}", rig.log_tail()))
}

/// The script that zeroes a range of the device and of the content.
fn zero(rig: &Rig, at: u64, len: u64) -> Result<String, Failure> {
    let device = rig.device()?;
    Ok(format!(
        "blkdiscard -z -o {at} -l {len} {device}; fallocate -p -o {at} -l {len} /tmp/content\n"
    ))
}

/// As [`zero`], with the space given back.
fn punch(rig: &Rig, at: u64, len: u64) -> Result<String, Failure> {
    let device = rig.device()?;
    Ok(format!(
        "for f in {device} /tmp/content; do fallocate -p -o {at} -l {len} $f; done\n"
    ))
}

/// The script that discards a range of the device; what is of whole stripes reads as zero afterwards, the rest as it
/// was.
fn discard(rig: &Rig, at: u64, len: u64, stripe: u64) -> Result<String, Failure> {
    let device = rig.device()?;
    let (first, last) = (at.next_multiple_of(stripe), (at + len) / stripe * stripe);
    let mut script = format!("blkdiscard -o {at} -l {len} {device}\n");
    if last > first {
        let len = last - first;
        script += &format!("fallocate -p -o {first} -l {len} /tmp/content\n");
    }
    Ok(script)
}

/// A limit of the device's queue.
fn limit(rig: &Rig, name: &str) -> Result<u64, Failure> {
    let text = sh(&format!(
        "cat /sys/block/$(basename {})/queue/{name}",
        rig.device()?
    ))?;
    text.parse().map_err(|_| format!("{name}: {text}"))
}

/// Bytes that the members' files take.
fn taken(paths: &[String]) -> Result<u64, Failure> {
    let text = sh(&format!(
        "sync; for p in {}; do
             case $p in /dev/loop*) p=$(losetup -nO BACK-FILE $p) ;; esac
             du -B1 $p
         done | awk '{{ sum += $1 }} END {{ print sum }}'",
        paths.join(" ")
    ))?;
    text.parse().map_err(|_| text)
}

/// Bytes of a stripe's data, with chunks of 64 KiB.
fn stripe_of(level: &str, count: usize) -> u64 {
    let n = count as u64;
    let chunks = match level {
        "raid1" => 1,
        "raid5" => n - 1,
        "raid6" => n - 2,
        _ if n.is_multiple_of(2) => n / 2,
        _ => n,
    };
    chunks * 65536
}

/// Bytes of all members for so many of a LU.
fn on_members(level: &str, count: usize, bytes: u64) -> u64 {
    let n = count as u64;
    match level {
        "raid0" => bytes,
        "raid1" => bytes * n,
        "raid10" => bytes * 2,
        "raid6" => bytes * n / (n - 2),
        _ => bytes * n / (n - 1),
    }
}

pub(super) fn scrub_finds_nothing(rig: &Rig) -> Result<(), Failure> {
    let output = rig.run(&["group", "scrub", "data", "--wait"])?;
    let row = rig.json(&["group", "show", "data"])?["scrub"].clone();
    let is_right = row["bad"] == 0 && row["unreadable"] == 0 && text(&row["state"]) == "done";
    ensure(output.code == 0 && is_right, || {
        format!("{}{} {row}", output.stdout, output.stderr)
    })
}

/// Takes every member away in turn, reads everything without it, and rebuilds it.
fn each_away(rig: &Rig, paths: &[String]) -> Result<(), Failure> {
    for path in paths {
        rig.lunar(&["disk", "fail", path, "--yes"])?;
        content_is_right(rig, &format!("without {path}"))?;
        rig.lunar(&["disk", "replace", path, path, "--yes"])?;
        rig.wait_optimal(120)?;
    }
    content_is_right(rig, "in the end")
}

/// Given random content, when parts of it are zeroed and discarded at every alignment, then it reads as asked for with
/// all members and without each, a scrub finds nothing, and members that are files have the space back; discards are
/// announced only where members give space back and read as zero.
fn reads_as_asked_for(kind: &str, level: &str, count: usize) -> Result<(), Failure> {
    let (rig, paths) = array(kind, level, count, 80)?;
    fill(&rig)?;
    let is_announced = limit(&rig, "discard_max_bytes")? > 0;
    let gives_back = matches!(kind, "ext4-file" | "loop");
    ensure(is_announced == gives_back, || {
        format!("discards are announced: {is_announced}, on {kind}")
    })?;
    let sector = limit(&rig, "logical_block_size")?;
    let before = match gives_back {
        true => taken(&paths)?,
        false => 0,
    };
    // A stripe's part of it, a part of two, whole ones and both ends, and many.
    let mut script = zero(&rig, 4096, sector)?;
    script += &zero(&rig, MIB - sector, 2 * sector)?;
    script += &zero(&rig, 2 * MIB + sector, 3 * MIB)?;
    script += &zero(&rig, 8 * MIB, 16 * MIB)?;
    if is_announced {
        let grain = match level {
            // Every byte of it is passed on.
            "raid0" => sector,
            // What the kernel is told is the next power of two.
            _ => stripe_of(level, count),
        };
        script += &discard(&rig, 25 * MIB + sector, 2 * MIB, grain)?;
        script += &discard(&rig, 28 * MIB + sector, 2 * sector, grain)?;
        script += &discard(&rig, 30 * MIB, 16 * MIB, grain)?;
    }
    script += &punch(&rig, 46 * MIB, 2 * MIB)?;
    sh(&script).map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    content_is_right(&rig, "erased")?;
    if gives_back {
        let (freed, wanted) = (
            before.saturating_sub(taken(&paths)?),
            // What blkdiscard zeroes stays allocated.
            on_members(level, count, 19 * MIB),
        );
        ensure(freed >= wanted, || {
            format!("the members gave {freed} bytes back, not {wanted}")
        })?;
    }
    if level == "raid0" {
        return Ok(());
    }
    let part = usize::try_from(CONTENT / 3).expect("small");
    redundancy_is_right(&rig, level, &paths, part)?;
    scrub_finds_nothing(&rig)?;
    each_away(&rig, &paths)
}

fn members_of(level: &str) -> usize {
    match level {
        "raid1" => 2,
        "raid5" => 3,
        _ => 4,
    }
}

/// MiB of a member, so that xfs finds its least of 300 MiB.
fn size_of(level: &str) -> u32 {
    match level {
        "raid1" => 400,
        _ => 220,
    }
}

fn make_fs(fs: &str, device: &str) -> Result<(), Failure> {
    sh(&format!(
        "mkfs.{fs} -q {device} >&2; mkdir -p /tmp/at; mount {device} /tmp/at"
    ))
    .map(drop)
}

/// Looks at the file system and at the files of `/tmp/sums`.
fn fs_is_right(rig: &Rig, fs: &str, device: &str, when: &str) -> Result<(), Failure> {
    let check = match fs {
        "xfs" => "xfs_repair -n",
        _ => "e2fsck -fn",
    };
    let script = format!(
        "umount /tmp/at; {check} {device} >&2; mount {device} /tmp/at; cd /tmp/at; sha256sum -c /tmp/sums >&2"
    );
    sh_in(&script, 120)
        .map(drop)
        .map_err(|why| format!("{when}: {why}\n{}", rig.log_tail()))
}

/// Given a file system with files on members that are files, when some are removed and it is trimmed, then the members'
/// files have the space back, the other files are as written, and a scrub finds nothing.
fn fstrim(fs: &str, level: &str) -> Result<(), Failure> {
    let (rig, paths) = array("ext4-file", level, members_of(level), size_of(level))?;
    let device = rig.device()?;
    make_fs(fs, &device)?;
    sh(
        "for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/tmp/at/f$i bs=1M count=8 2>/dev/null; done
        (cd /tmp/at; sha256sum f2 f4 f6) > /tmp/sums; sync -f /tmp/at",
    )?;
    let before = taken(&paths)?;
    let said = sh_in(
        "cd /tmp/at; rm f1 f3 f5; sync -f .; cd /; fstrim -v /tmp/at",
        120,
    )?;
    let freed = before.saturating_sub(taken(&paths)?);
    // Edges of files that are not whole stripes stay.
    let wanted = on_members(level, paths.len(), 24 * MIB) / 10 * 9;
    ensure(freed >= wanted, || {
        format!("{said}: the members gave {freed} bytes back, not {wanted}")
    })?;
    let right = |when: &str| fs_is_right(&rig, fs, &device, when);
    right("trimmed")?;
    scrub_finds_nothing(&rig)?;
    rig.lunar(&["disk", "fail", &paths[0], "--yes"])?;
    right("degraded")?;
    sh("umount /tmp/at").map(drop)
}

/// Given a file system whose files come and go and that is trimmed again and again, when ublk-target is killed
/// meanwhile, then nothing fails, the file system and the other files are right, also without a member, and a scrub
/// finds nothing.
fn trimmed_and_killed(fs: &str, level: &str) -> Result<(), Failure> {
    let (rig, paths) = array("ext4-file", level, members_of(level), size_of(level))?;
    let device = rig.device()?;
    make_fs(fs, &device)?;
    sh(
        "rm -f /tmp/stop; dd if=/dev/urandom of=/tmp/noise bs=1M count=12 2>/dev/null
        for i in 1 2 3; do cp /tmp/noise /tmp/at/kept$i; done
        (cd /tmp/at; sha256sum kept*) > /tmp/sums; sync -f /tmp/at",
    )?;
    let load = std::thread::spawn(|| {
        let script = "rounds=0
            until [ -e /tmp/stop ]; do
                for i in 1 2 3 4; do cp /tmp/noise /tmp/at/f$i; done
                sync -f /tmp/at; rm /tmp/at/f1 /tmp/at/f3
                fstrim /tmp/at &
                cp /tmp/noise /tmp/at/f5; sync -f /tmp/at
                wait $!
                cmp /tmp/noise /tmp/at/f4 >&2; rm /tmp/at/f*
                rounds=$((rounds + 1))
            done; echo $rounds";
        sh_in(script, 120)
    });
    kill_again_and_again(&rig)?;
    sh("touch /tmp/stop")?;
    let rounds = load
        .join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    ensure(rounds != "0", || "nothing was trimmed".into())?;
    fs_is_right(&rig, fs, &device, "after the kills")?;
    scrub_finds_nothing(&rig)?;
    rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    fs_is_right(&rig, fs, &device, "degraded")?;
    sh("umount /tmp/at").map(drop)
}

/// Given a group that announced discards, and a disk in it since that gives no space back, when parts of it are
/// discarded and zeroed, then that disk too reads as zero there: redundancy fits, and every member can be missed.
fn mixed() -> Result<(), Failure> {
    let (rig, mut paths) = array("ext4-file", "raid5", 3, 80)?;
    let grain = limit(&rig, "discard_granularity")?;
    let ram = members("null_blk", 1, 80)?.remove(0);
    let keeps = sh(&format!(
        "cat /sys/block/$(basename {ram})/queue/write_zeroes_max_bytes"
    ))?;
    ensure(keeps == "0", || format!("it zeroes by itself: {keeps}"))?;
    rig.lunar(&["disk", "add", &ram])?;
    rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    rig.lunar(&["disk", "replace", &paths[1], &ram, "--yes"])?;
    rig.wait_optimal(120)?;
    paths[1] = ram;
    fill(&rig)?;
    let script = discard(&rig, MIB + 4096, 16 * MIB, grain)?
        + &punch(&rig, 20 * MIB, 4 * MIB)?
        + &zero(&rig, 25 * MIB + 4096, 4 * MIB)?;
    sh(&script)?;
    content_is_right(&rig, "erased")?;
    let part = usize::try_from(CONTENT / 2).expect("small");
    redundancy_is_right(&rig, "raid5", &paths, part)?;
    scrub_finds_nothing(&rig)?;
    for path in [&paths[0], &paths[1]] {
        rig.lunar(&["disk", "fail", path, "--yes"])?;
        content_is_right(&rig, &format!("without {path}"))?;
        rig.lunar(&["disk", "replace", path, path, "--yes"])?;
        rig.wait_optimal(120)?;
    }
    Ok(())
}

/// Given space that a deleted LU had, when a LU is made of it with `--zero`, then all of it reads as zero, also without
/// two members, its space is given back, the deleted LU cannot come back, and a scrub finds nothing; without `--zero`
/// it has what was there.
fn new_lu() -> Result<(), Failure> {
    let (rig, paths) = array("ext4-file", "raid6", 4, 80)?;
    fill(&rig)?;
    let again = |zero: &[&str]| {
        rig.lunar(&["lu", "delete", "vol", "--yes"])?;
        let create = ["lu", "create", "vol", "--group", "data", "--size", "max"];
        rig.lunar(&[&create[..], zero].concat())
    };
    again(&[])?;
    content_is_right(&rig, "made without --zero")?;
    let before = taken(&paths)?;
    again(&["--zero"])?;
    let freed = before.saturating_sub(taken(&paths)?);
    let device = rig.device()?;
    let bytes: u64 = sh(&format!("blockdev --getsize64 {device}"))?
        .parse()
        .map_err(|_| "size")?;
    ensure(freed >= on_members("raid6", 4, bytes), || {
        format!("of a LU of {bytes} bytes the members gave {freed} back")
    })?;
    let zeroes = |when: &str| {
        sh(&format!(
            "dd if={device} bs=1M iflag=direct 2>/dev/null | cmp -n {bytes} - /dev/zero >&2"
        ))
        .map_err(|why| format!("{when}: {why}"))
    };
    zeroes("new")?;
    scrub_finds_nothing(&rig)?;
    for path in &paths[..2] {
        rig.lunar(&["disk", "fail", path, "--yes"])?;
        zeroes("degraded")?;
    }
    let output = rig.run(&["import", "--deleted", "vol", "--yes"])?;
    ensure(output.code != 0, || {
        format!("it came back: {}", output.stdout)
    })
}

fn kill_again_and_again(rig: &Rig) -> Result<(), Failure> {
    for wait in [130, 370, 210, 290] {
        let pid = rig.target_pid()?;
        pause(wait);
        sh(&format!("kill -KILL {pid}"))?;
        until("a successor", 60, || {
            Ok(rig.target_pid().is_ok_and(|new| new != pid) && rig.state().is_ok())
        })?;
    }
    Ok(())
}

/// Given a raid5 that lost a member, when it is erased degraded, and before and behind where its rebuild is, then all
/// reads as asked for, then and when it is rebuilt and without another member.
fn degraded() -> Result<(), Failure> {
    let (rig, paths) = array("ext4-file", "raid5", 3, 80)?;
    fill(&rig)?;
    let grain = limit(&rig, "discard_granularity")?;
    rig.lunar(&["disk", "fail", &paths[1], "--yes"])?;
    let erased = zero(&rig, MIB + 512, 3 * MIB)? + &discard(&rig, 5 * MIB + 512, 3 * MIB, grain)?;
    sh(&erased)?;
    content_is_right(&rig, "degraded")?;
    rig.rebuild_rate("12MiB")?;
    rig.lunar(&["disk", "replace", &paths[1], &paths[1], "--full", "--yes"])?;
    let mut rounds = 0;
    for at in [10, 44, 14, 40, 18, 36] {
        let group = rig.json(&["group", "show", "data"])?;
        rounds += u32::from(text(&group["state"]) != "optimal");
        sh(&(zero(&rig, at * MIB + 512, MIB + 4096)?
            + &discard(&rig, (at + 2) * MIB - 512, MIB, grain)?))?;
        content_is_right(&rig, "while it is rebuilt")?;
    }
    ensure(rounds >= 3, || {
        format!("the rebuild was under way in {rounds} rounds")
    })?;
    rig.rebuild_rate("1GiB")?;
    rig.wait_optimal(120)?;
    scrub_finds_nothing(&rig)?;
    rig.lunar(&["disk", "fail", &paths[0], "--yes"])?;
    content_is_right(&rig, "without a member that was there")
}

/// Given ranges that are written, zeroed and discarded again and again, when ublk-target is killed meanwhile, then no
/// request fails, all reads as asked for at the end, and redundancy fits.
fn kills(level: &str) -> Result<(), Failure> {
    let (rig, paths) = array("ext4-file", level, members_of(level), 80)?;
    fill(&rig)?;
    let device = rig.device()?;
    let grain = limit(&rig, "discard_granularity")?;
    let erased = zero(&rig, 8 * MIB + 512, 14 * MIB)? + &discard(&rig, 24 * MIB, 20 * MIB, grain)?;
    sh("rm -f /tmp/stop")?;
    let load = std::thread::spawn(move || {
        sh_in(
            &format!(
                "rounds=0
                 cp /tmp/content /tmp/noise
                 until [ -e /tmp/stop ]; do
                     cp /tmp/noise /tmp/content
                     dd if=/tmp/noise of={device} bs=1M count={} oflag=direct conv=notrunc 2>/dev/null
                     {erased}
                     rounds=$((rounds + 1))
                 done; echo $rounds",
                CONTENT / MIB
            ),
            120,
        )
    });
    kill_again_and_again(&rig)?;
    sh("touch /tmp/stop")?;
    let rounds = load
        .join()
        .map_err(|_| "thread")?
        .map_err(|why| format!("{why}\n{}", rig.log_tail()))?;
    ensure(rounds != "0", || "nothing was erased".into())?;
    content_is_right(&rig, "after the kills")?;
    let part = usize::try_from(CONTENT / 2).expect("small");
    redundancy_is_right(&rig, level, &paths, part)?;
    scrub_finds_nothing(&rig)
}
