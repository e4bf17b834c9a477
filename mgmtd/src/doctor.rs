//! Checks of the machine and the set-up: what was found, what follows from it, and what to type.
//!
//! [`machine`] needs no daemon: `lunar doctor` runs it by itself when mgmtd cannot be reached. The judgements are pure.

mod members;

use std::path::Path;

use lunar_api::rows::{CheckRow, CheckState, DiskState};
use lunar_api::target::{GroupState, Level};
use lunar_api::units::format_size;

use crate::hardware::{self, Hardware};
use crate::holders;
use crate::jobs::scrub_left;
use crate::tables::DiskSave;
use crate::views::View;

/// Least and recommended kernel.
const KERNEL_LEAST: (u32, u32) = (6, 17);
const KERNEL_GOOD: (u32, u32) = (7, 1);
/// Locked memory that 16 groups need: a pool of 24 MiB each.
const MEMLOCK_LEAST: u64 = 384 << 20;
/// Free space under which the state directory is about to fail, and under which it is warned of.
const SPACE_LEAST: u64 = 8 << 20;
const SPACE_GOOD: u64 = 64 << 20;
/// TMPFS_MAGIC, RAMFS_MAGIC.
const MEMORY_FS: [i64; 2] = [0x0102_1994, 0x8584_58f6];

fn row(check: &str, state: CheckState, text: impl Into<String>, action: &str) -> CheckRow {
    let (check, text, action) = (check.into(), text.into(), action.into());
    CheckRow {
        check,
        state,
        text,
        action,
    }
}

fn ok(check: &str, text: impl Into<String>) -> CheckRow {
    row(check, CheckState::Ok, text, "")
}

fn warn(check: &str, text: impl Into<String>, action: &str) -> CheckRow {
    row(check, CheckState::Warn, text, action)
}

fn fail(check: &str, text: impl Into<String>, action: &str) -> CheckRow {
    row(check, CheckState::Fail, text, action)
}

fn read(path: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_string()
}

/// Checks of what lies outside of Lunar's own processes.
pub fn machine(state_dir: &Path, run_dir: &Path) -> Vec<CheckRow> {
    vec![
        kernel(&read("/proc/sys/kernel/osrelease")),
        module(
            Path::new("/dev/ublk-control").exists(),
            Path::new("/sys/module/ublk_drv").exists(),
        ),
        io_uring(&read("/proc/sys/kernel/io_uring_disabled")),
        state_space(state_dir),
        run_place(run_dir),
        clock(crate::probe::now_ms(), 0),
        installed(
            "udev rule",
            &[
                "/etc/udev/rules.d/60-lunar.rules",
                "/usr/lib/udev/rules.d/60-lunar.rules",
                "/lib/udev/rules.d/60-lunar.rules",
            ],
            Path::new("/run/udev/control").exists(),
            "install -m 644 mgmtd/dist/60-lunar.rules /etc/udev/rules.d/ && udevadm control --reload",
        ),
        unit(
            Path::new("/run/systemd/system").exists(),
            &[
                "/etc/systemd/system",
                "/usr/lib/systemd/system",
                "/lib/systemd/system",
            ],
        ),
    ]
}

fn kernel(release: &str) -> CheckRow {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return warn("kernel", format!("`{release}` is no version"), "uname -r");
    };
    let text = format!("Linux {release}");
    let ((a, b), (c, d)) = (KERNEL_LEAST, KERNEL_GOOD);
    match (major, minor) {
        version if version < KERNEL_LEAST => fail(
            "kernel",
            format!("{text}: {a}.{b} is the least that has the ublk commands Lunar needs"),
            "install a newer kernel and boot it",
        ),
        version if version < KERNEL_GOOD => warn(
            "kernel",
            format!("{text} works; {c}.{d} or newer is recommended"),
            "install a newer kernel when you can",
        ),
        _ => ok("kernel", text),
    }
}

fn module(control: bool, loaded: bool) -> CheckRow {
    match (control, loaded) {
        (true, _) => ok("ublk module", "/dev/ublk-control is there"),
        (false, true) => fail(
            "ublk module",
            "ublk_drv is loaded, but there is no /dev/ublk-control: no LU can come up",
            "ls -l /dev/ublk-control; is /dev a devtmpfs?",
        ),
        (false, false) => fail(
            "ublk module",
            "ublk_drv is not loaded: no LU can come up",
            "modprobe ublk_drv; for every boot: echo ublk_drv > /etc/modules-load.d/lunar.conf",
        ),
    }
}

fn io_uring(disabled: &str) -> CheckRow {
    match disabled {
        "" | "0" => ok("io_uring", "allowed"),
        // CAP_SYS_ADMIN is exempt, and ublk-target is root.
        "1" => ok(
            "io_uring",
            "allowed for root (kernel.io_uring_disabled = 1)",
        ),
        other => fail(
            "io_uring",
            format!("kernel.io_uring_disabled = {other}: nobody may use it"),
            "sysctl -w kernel.io_uring_disabled=0",
        ),
    }
}

/// Checks of the directory of the tables.
fn state_space(dir: &Path) -> CheckRow {
    let shown = dir.display();
    if let Some(lu) = holders::lies_on_ublk(dir) {
        let text =
            format!("{shown} lies on {lu}, a LU of Lunar itself: it cannot start without itself");
        return fail("state directory", text, "mgmtd --state-dir DIR elsewhere");
    }
    let (Ok(space), Ok(fs)) = (
        nix::sys::statvfs::statvfs(dir),
        nix::sys::statfs::statfs(dir),
    ) else {
        return fail(
            "state directory",
            format!("{shown} cannot be looked at"),
            "mgmtd --state-dir DIR",
        );
    };
    let read_only = space
        .flags()
        .contains(nix::sys::statvfs::FsFlags::ST_RDONLY);
    let free = space.blocks_available() * space.fragment_size();
    let memory = MEMORY_FS.contains(&fs.filesystem_type().0);
    judge_space(&shown.to_string(), free, read_only, memory)
}

fn judge_space(dir: &str, free: u64, read_only: bool, memory: bool) -> CheckRow {
    let size = format_size(free);
    let text = format!("{dir}: {size} free");
    match (read_only, free) {
        (true, _) => fail(
            "state directory",
            format!("{dir} is on a read-only file system: no change can be recorded"),
            "mount it read-write, or mgmtd --state-dir DIR",
        ),
        (_, free) if free < SPACE_LEAST => {
            fail("state directory", text, &format!("df {dir}; make room"))
        }
        (_, free) if free < SPACE_GOOD => {
            warn("state directory", text, &format!("df {dir}; make room"))
        }
        _ if memory => warn(
            "state directory",
            format!(
                "{dir} is in memory: disk numbers, jobs and events are lost with the power (data is not)"
            ),
            "mgmtd --state-dir DIR on a disk",
        ),
        _ => ok("state directory", text),
    }
}

/// The in-flight logs must be memory.
fn run_place(dir: &Path) -> CheckRow {
    let shown = dir.display();
    match nix::sys::statfs::statfs(dir) {
        Ok(fs) if MEMORY_FS.contains(&fs.filesystem_type().0) => {
            ok("run directory", format!("{shown} is in memory"))
        }
        Ok(_) => fail(
            "run directory",
            format!(
                "{shown} is not on tmpfs: no group can start, the in-flight logs must not outlive the power"
            ),
            &format!("mount -t tmpfs tmpfs {shown}"),
        ),
        Err(error) => warn(
            "run directory",
            format!("{shown}: {error}"),
            "systemctl start mgmtd",
        ),
    }
}

/// Nothing is ordered by the clock, but people read it. `newest` is the time of the newest event.
fn clock(now: u64, newest: u64) -> CheckRow {
    // 2024-01-01: older than this program.
    if now < 1_704_067_200_000 {
        return warn(
            "clock",
            "it stands before 2024: times of events are wrong",
            "timedatectl set-ntp true",
        );
    }
    // A minute: what NTP may turn back.
    if newest > now + 60_000 {
        let seconds = (newest - now) / 1000;
        let text = format!("it was turned back: the newest event is {seconds} s in the future");
        return warn("clock", text, "timedatectl; date");
    }
    ok("clock", "plausible")
}

fn installed(check: &str, places: &[&str], needed: bool, action: &str) -> CheckRow {
    match places.iter().find(|path| Path::new(path).exists()) {
        Some(path) => ok(check, *path),
        None if needed => warn(
            check,
            "not installed: udev probes LUs that come up, and members look like blank disks to other programs",
            action,
        ),
        None => ok(check, "not needed: no udev runs here"),
    }
}

fn unit(systemd: bool, dirs: &[&str]) -> CheckRow {
    if !systemd {
        return ok("unit", "not needed: no systemd runs here");
    }
    let there = dirs
        .iter()
        .any(|dir| Path::new(dir).join("mgmtd.service").exists());
    if !there {
        return warn(
            "unit",
            "mgmtd.service is not installed: nothing comes up at boot",
            "install -m 644 mgmtd/dist/mgmtd.service /etc/systemd/system/ && systemctl enable mgmtd",
        );
    }
    let wanted = Path::new("/etc/systemd/system/multi-user.target.wants/mgmtd.service");
    match wanted.symlink_metadata() {
        Ok(_) => ok("unit", "mgmtd.service is enabled"),
        Err(_) => warn(
            "unit",
            "mgmtd.service is not enabled: nothing comes up at boot",
            "systemctl enable mgmtd",
        ),
    }
}

/// Checks of a running Lunar.
pub fn running(view: &View, state_dir: &Path, run_dir: &Path, target_up: bool) -> Vec<CheckRow> {
    let newest = view.tables.events.iter().map(|e| e.time).max();
    let mut out = machine(state_dir, run_dir);
    out.retain(|check| check.check != "clock");
    out.push(clock(crate::probe::now_ms(), newest.unwrap_or(0)));
    out.push(process(
        "mgmtd",
        Some(std::process::id()),
        env!("CARGO_PKG_VERSION"),
    ));
    let version = view.live.target_version.clone();
    let pid = view.live.target_pid.filter(|_| target_up);
    out.push(process("ublk-target", pid, &version));
    if let Some(pid) = pid {
        out.push(memlock(&read(&format!("/proc/{pid}/limits"))));
    }
    out.push(features(view));
    for save in view.tables.groups.values() {
        let disks: Vec<(&DiskSave, Hardware)> = (view.tables.disks.values())
            .filter(|d| view.group_of(d) == Some(save.uuid))
            .map(|d| (d, hardware::of(Path::new(&d.path))))
            .collect();
        out.push(redundancy(view, save));
        out.extend(scrubbed(view, save));
        out.extend(members::members(view, save));
        out.push(caches(&save.name_seen, &disks));
        out.push(sectors(&save.name_seen, &disks));
    }
    out.extend(disks(view));
    out.extend(held(view));
    out
}

/// A process runs, and from the file that is installed now.
fn process(name: &str, pid: Option<u32>, version: &str) -> CheckRow {
    let Some(pid) = pid else {
        return fail(name, "it does not answer", "lunar events");
    };
    let exe = std::fs::read_link(format!("/proc/{pid}/exe"));
    let exe = exe.map_or(String::new(), |exe| exe.display().to_string());
    let text = format!("version {version}, process {pid}");
    judge_process(name, &text, version, &exe)
}

fn judge_process(name: &str, text: &str, version: &str, exe: &str) -> CheckRow {
    let own = env!("CARGO_PKG_VERSION");
    if version != own {
        let text = format!("{text}, but mgmtd is {own}");
        return warn(name, text, "lunar upgrade");
    }
    if exe.ends_with(" (deleted)") {
        let text = format!("{text}; its program was replaced since it was started");
        let action = match name {
            "mgmtd" => "lunar upgrade",
            _ => "lunar upgrade",
        };
        return warn(name, text, action);
    }
    ok(name, text)
}

fn memlock(limits: &str) -> CheckRow {
    let line = limits
        .lines()
        .find_map(|l| l.strip_prefix("Max locked memory"));
    let soft = line.and_then(|l| l.split_whitespace().next()).unwrap_or("");
    match soft.parse::<u64>() {
        Ok(bytes) if bytes < MEMLOCK_LEAST => warn(
            "memlock",
            format!(
                "ublk-target may lock {}: groups beyond that do not start",
                format_size(bytes)
            ),
            "LimitMEMLOCK=infinity in the unit, or: ulimit -l unlimited; then start mgmtd",
        ),
        Ok(bytes) => ok("memlock", format_size(bytes)),
        Err(_) if soft == "unlimited" => ok("memlock", "unlimited"),
        Err(_) => warn(
            "memlock",
            "the limit of ublk-target cannot be read",
            "sudo lunar doctor",
        ),
    }
}

fn features(view: &View) -> CheckRow {
    let features = &view.live.features;
    if features.notes.is_empty() {
        let how = if features.zero_copy {
            "zero copy"
        } else {
            "copy mode"
        };
        return ok("ublk features", format!("{how}, bits {:#x}", features.ublk));
    }
    let notes = features.notes.join("; ");
    if notes.contains("no ublk devices") {
        let action = "modprobe ublk_drv, or boot another kernel; then start Lunar again";
        return fail("ublk features", notes, action);
    }
    warn(
        "ublk features",
        notes,
        "install a newer kernel when you can",
    )
}

fn redundancy(view: &View, save: &crate::tables::GroupSave) -> CheckRow {
    let show = view.group_show(save);
    let check = format!("group {}", show.name);
    let reason = if show.reason.is_empty() {
        "it is not started"
    } else {
        &show.reason
    };
    match (show.state, show.level) {
        (GroupState::Failed | GroupState::Stopped | GroupState::Quarantined, _) => {
            fail(&check, format!("no service: {reason}"), &show.action)
        }
        (GroupState::Degraded, _) => fail(
            &check,
            format!("redundancy is missing: {reason}"),
            &show.action,
        ),
        (GroupState::Optimal, Some(Level::Raid0 | Level::Linear)) => warn(
            &check,
            "it has no redundancy: the first disk that fails takes all of it",
            "back it up; for redundancy: lunar group create --help",
        ),
        (GroupState::Optimal, _) if show.write_hole_open => warn(
            &check,
            "its write hole is open: a disk that dies after a power loss, before the resync, may take other data along",
            "lunar group show NAME; a UPS, and backups",
        ),
        (GroupState::Optimal, _) => ok(&check, "every slot in sync"),
    }
}

/// What the last scrub of a group found and left.
fn scrubbed(view: &View, save: &crate::tables::GroupSave) -> Option<CheckRow> {
    let live = view.live.groups.get(&save.uuid)?;
    let left = scrub_left(live.scrub.as_ref()?);
    let check = format!("scrub of {}", live.name);
    let action = format!(
        "lunar group show {0}; compare what is there with a backup, then: lunar group scrub {0} --repair",
        live.name
    );
    (!left.is_empty()).then(|| warn(&check, left, &action))
}

fn caches(group: &str, disks: &[(&DiskSave, Hardware)]) -> CheckRow {
    let check = format!("caches of {group}");
    let volatile = disks.iter().filter(|(_, h)| h.write_cache == "write back");
    let numbers: Vec<String> = volatile.map(|(d, _)| d.number.to_string()).collect();
    ok(
        &check,
        match numbers.is_empty() {
            true => "no volatile write cache".to_string(),
            false => format!(
                "disks {}: volatile, flushed when it counts",
                numbers.join(", ")
            ),
        },
    )
}

fn sectors(group: &str, disks: &[(&DiskSave, Hardware)]) -> CheckRow {
    let check = format!("sectors of {group}");
    let mut sizes: Vec<u32> = disks.iter().filter_map(|(_, h)| h.logical_block).collect();
    sizes.sort_unstable();
    sizes.dedup();
    match sizes[..] {
        [_, _, ..] => {
            let list = |size| {
                let of = disks.iter().filter(|(_, h)| h.logical_block == Some(size));
                let of: Vec<String> = of.map(|(d, _)| d.number.to_string()).collect();
                format!("{size} bytes on disks {}", of.join(", "))
            };
            let lists: Vec<String> = sizes.iter().map(|s| list(*s)).collect();
            warn(
                &check,
                format!("mixed: {}", lists.join("; ")),
                "replace with disks of one kind",
            )
        }
        [size] => ok(&check, format!("{size} bytes")),
        [] => ok(&check, "members are files"),
    }
}

/// Disks that are away, faulty, or carry what is of no use any more.
fn disks(view: &View) -> Vec<CheckRow> {
    let mut out = Vec::new();
    for save in view.tables.disks.values() {
        let row = view.disk_row(save);
        let (n, check) = (row.disk, format!("disk {}", row.disk));
        let label = view
            .live
            .probes
            .get(&save.uuid)
            .and_then(|p| p.label.as_ref());
        if let Some(bad) = view.live.bad_paths.get(&save.path) {
            out.push(fail(
                &check,
                format!("{} {bad}", save.path),
                &format!("lunar disk show {n}"),
            ));
        } else if row.state == DiskState::Missing {
            let text = format!("{} does not carry it now", save.path);
            out.push(fail(
                &check,
                text,
                &format!("bring it back, or: lunar disk remove {n}"),
            ));
        } else if save.was.is_some() {
            let text = "it failed and was replaced: what it holds is stale";
            out.push(warn(&check, text, &format!("lunar disk remove {n}")));
        } else if let Some(label) =
            label.filter(|l| row.group.is_none() && !l.group.is_nil() && !l.deleted)
        {
            let name = if label.group_name.is_empty() {
                label.group.to_string()
            } else {
                label.group_name.clone()
            };
            let text = format!(
                "an old superblock of group {name} is on it, which does not know it any more"
            );
            out.push(warn(&check, text, &format!("lunar disk remove {n} --wipe")));
        }
    }
    if out.is_empty() {
        out.push(ok(
            "disks",
            format!("{} disks, all here", view.tables.disks.len()),
        ));
    }
    out
}

/// Who holds the LUs: what a shutdown waits for.
fn held(view: &View) -> Vec<CheckRow> {
    let look = holders::Look::now();
    let lus = view
        .tables
        .lus
        .values()
        .filter_map(|l| Some((view.lu_row(l).name, view.lu_live(l)?)));
    lus.map(|(name, live)| {
        let check = format!("LU {name}");
        match live.ublk {
            None => fail(
                &check,
                format!("it has no device: {}", live.problem),
                "lunar events",
            ),
            Some(_) if !live.problem.is_empty() => {
                fail(&check, live.problem.clone(), "lunar status")
            }
            Some(ublk) => {
                let held = look.of_ublk(ublk);
                ok(
                    &check,
                    if held.is_empty() {
                        "nobody holds it".into()
                    } else {
                        held.join(", ")
                    },
                )
            }
        }
    })
    .collect()
}

/// Exit code: 1 if a check failed.
pub fn exit(checks: &[CheckRow]) -> u8 {
    u8::from(checks.iter().any(|check| check.state == CheckState::Fail))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::{scrub, view};
    use CheckState::{Fail, Ok as Fine, Warn};
    use lunar_api::target::ScrubState;

    #[test]
    fn judgements_table() {
        let limits = |word: &str| {
            format!("Max cpu time unlimited\nMax locked memory         {word} x bytes\n")
        };
        let version = env!("CARGO_PKG_VERSION");
        for (at, (check, want)) in [
            (kernel("7.2.0-rc1"), Fine),
            (kernel("6.17.4-amd64"), Warn),
            (kernel("6.1.0-42-amd64"), Fail),
            (kernel("what"), Warn),
            (module(true, false), Fine),
            (module(false, true), Fail),
            (module(false, false), Fail),
            (io_uring("0"), Fine),
            (io_uring("1"), Fine),
            (io_uring("2"), Fail),
            (judge_space("/x", 1 << 40, false, false), Fine),
            (judge_space("/x", 1 << 40, false, true), Warn),
            (judge_space("/x", 20 << 20, false, false), Warn),
            (judge_space("/x", 1 << 20, false, false), Fail),
            (judge_space("/x", 1 << 40, true, false), Fail),
            (clock(1_900_000_000_000, 1_800_000_000_000), Fine),
            (clock(1_800_000_000_000, 1_900_000_000_000), Warn),
            (clock(5, 0), Warn),
            (memlock(&limits("unlimited")), Fine),
            (memlock(&limits("8388608")), Warn),
            (memlock(""), Warn),
            (judge_process("mgmtd", "", version, "/usr/sbin/mgmtd"), Fine),
            (
                judge_process("mgmtd", "", version, "/usr/sbin/mgmtd (deleted)"),
                Warn,
            ),
            (judge_process("ublk-target", "", "0.0.9", "/x"), Warn),
            (process("ublk-target", None, ""), Fail),
            (unit(false, &[]), Fine),
            (unit(true, &["/nonexistent"]), Warn),
            (installed("x", &["/nonexistent"], true, "y"), Warn),
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(check.state, want, "line {at}: {check:?}");
            assert_eq!(check.state == Fine, check.action.is_empty(), "{check:?}");
        }
    }

    fn states(view: &View, name: &str) -> Vec<CheckState> {
        let all = running(view, Path::new("/"), Path::new("/"), true);
        let of = all.iter().filter(|c| c.check == name);
        of.map(|c| c.state).collect()
    }

    #[test]
    fn running_tells_groups_and_disks() {
        let mut view = view();
        assert_eq!(states(&view, "group data"), [Warn], "the write hole");
        assert_eq!(states(&view, "scrub of data"), []);
        for (repaired, expected) in [(2, &[Warn][..]), (3, &[])] {
            let mut found = scrub(ScrubState::Done);
            (found.bad, found.repaired) = (3, repaired);
            for group in view.live.groups.values_mut() {
                group.scrub = Some(found.clone());
            }
            assert_eq!(states(&view, "scrub of data"), expected);
        }
        for group in view.live.groups.values_mut() {
            group.state = GroupState::Degraded;
            group.reason = "disk 2 failed".into();
        }
        assert_eq!(states(&view, "group data"), [Fail]);
        let mut disk = view.tables.disks[&2].clone();
        disk.uuid = lunar_api::DiskUuid::from_bytes([77; 16]);
        disk.number = 4;
        view.tables.put_disk(disk.clone());
        assert_eq!(states(&view, "disk 4"), [Fail], "it is missing");
        disk.was = Some((lunar_api::GroupUuid::from_bytes([9; 16]), 1));
        view.tables.put_disk(disk);
        view.live.probes.clear();
        assert_eq!(states(&view, "disk 4"), [Warn], "it was replaced");
        view.live.groups.clear();
        assert_eq!(states(&view, "group data"), [Fail]);
    }

    #[test]
    fn mixed_sectors_are_named() {
        let view = view();
        let hardware = |size| Hardware {
            logical_block: Some(size),
            ..Hardware::default()
        };
        let all: Vec<&DiskSave> = view.tables.disks.values().collect();
        let mixed = [(all[0], hardware(512)), (all[1], hardware(4096))];
        let check = sectors("data", &mixed);
        assert_eq!(check.state, Warn);
        assert!(
            check.text.contains("4096 bytes on disks 2"),
            "{}",
            check.text
        );
        assert_eq!(sectors("data", &mixed[..1]).state, Fine);
    }
}
