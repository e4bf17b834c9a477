//! One row of everything, for tests that hold what is printed and answered.
// Each test binary takes what it needs.
#![allow(dead_code)]

use std::path::Path;

use lunar_api::mgmt::Role;
use lunar_api::rows::*;
use lunar_api::target::{
    Consistency, Features, GroupState, Level, LuCounters, ScrubState, SlowStatus, SyncAction,
    SyncStatus,
};
use lunar_api::{DiskUuid, GroupUuid, History, LuUuid, SystemUuid};

/// Compares with the committed file, or writes it when told to.
pub(crate) fn hold(path: &Path, text: &str) {
    if std::env::var_os("LUNAR_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        committed,
        text,
        "{}: LUNAR_BLESS=1 cargo test -p mgmtd writes it",
        path.display()
    );
}

pub(crate) fn disk_row() -> DiskRow {
    DiskRow {
        disk: 1,
        path: "/dev/disk/by-id/wwn-0x5000c500a1".into(),
        capacity: 4_000_000_000_000,
        role: Role::Data,
        state: DiskState::InSync,
        group: Some(1),
        errors: 3,
    }
}

pub(crate) fn disk_show() -> DiskShow {
    DiskShow {
        disk: 1,
        path: disk_row().path,
        capacity: 1 << 40,
        role: Role::Spare,
        state: DiskState::Spare,
        group: None,
        errors: 0,
        uuid: DiskUuid::from_bytes([1; 16]),
        group_name: None,
        slot: None,
        reason: String::new(),
        read_errors: 0,
        write_errors: 0,
        repaired: 16,
        timeouts: 0,
        bad_blocks: 0,
        bad_blocks_at: Vec::new(),
        errors_lately: 1,
        latency_us: 380,
        slow: None,
        model: "ST4000VN008".into(),
        serial: "Z1F0A".into(),
        links: vec![disk_row().path],
        place: Some("Slot 07".into()),
        write_cache: "write back".into(),
    }
}

pub(crate) fn locate() -> LocateReply {
    let disk = disk_show();
    LocateReply {
        outcome: Outcome::Changed,
        steps: vec!["light the LED of disk 1".into()],
        disks: vec![LocateRow {
            disk: 1,
            path: disk.path,
            state: disk.state,
            model: disk.model,
            serial: disk.serial,
            links: disk.links,
            place: disk.place,
            led: Led::On,
        }],
    }
}

pub(crate) fn doctor() -> DoctorReply {
    let row = |check: &str, state, text: &str, action: &str| CheckRow {
        check: check.into(),
        state,
        text: text.into(),
        action: action.into(),
    };
    let old = "its program was replaced since it was started";
    DoctorReply {
        exit: 1,
        checks: vec![
            row("kernel", CheckState::Ok, "Linux 7.2.0", ""),
            row("mgmtd", CheckState::Warn, old, "systemctl restart mgmtd"),
            row(
                "ublk module",
                CheckState::Fail,
                "ublk_drv is not loaded",
                "modprobe ublk_drv",
            ),
        ],
    }
}

/// The I/O at a moment: the later, the more.
pub(crate) fn stat(at: u64) -> StatReply {
    let mut lu = lu_row();
    (lu.counters.reads, lu.counters.read_bytes) = (at * 2, at * 8192);
    let mut member = member();
    (member.writes, member.write_bytes) = (at, at * 4096);
    StatReply {
        at,
        groups: vec![GroupIo {
            group: 1,
            name: "data".into(),
            members: vec![member],
        }],
        lus: vec![lu],
    }
}

pub(crate) fn path_row() -> PathRow {
    let device = Some("/dev/ublkb0".into());
    PathRow {
        path: 1,
        lu: 1,
        head: "host".into(),
        device,
        state: PathState::Online,
    }
}

pub(crate) fn group_row() -> GroupRow {
    GroupRow {
        group: 1,
        name: "data".into(),
        level: Some(Level::Raid5),
        disks: vec![Some(1), Some(2), None],
        chunk: 65536,
        consistency: Some(Consistency::None),
        state: GroupState::Degraded,
    }
}

pub(crate) fn group_show() -> GroupShow {
    GroupShow {
        group: 1,
        name: "data".into(),
        level: Some(Level::Raid5),
        disks: group_row().disks,
        chunk: 65536,
        consistency: Some(Consistency::None),
        state: GroupState::Degraded,
        uuid: GroupUuid::from_bytes([2; 16]),
        reason: "disk 3 (slot 2) failed".into(),
        action: "add a disk (lunar disk add PATH), then: lunar disk replace 3 NEW".into(),
        capacity: 1 << 40,
        free: 1 << 30,
        logical_block: 512,
        write_hole_open: true,
        zero_copy: true,
        allocations: 0,
        history: Some(History::from_bytes([3; 16])),
        generation: 7,
        rebuild_min: None,
        rebuild_max: Some(200 << 20),
        read_errors_max: 20,
        members: vec![member()],
        lus: vec![1],
        sync: Some(sync()),
        scrub: Some(scrub()),
    }
}

pub(crate) fn lu_row() -> LuRow {
    LuRow {
        lu: 1,
        name: "vol".into(),
        group: 1,
        capacity: 10 << 30,
        device: Some("/dev/lunar/vol".into()),
        paths: vec![path_row()],
        counters: LuCounters::default(),
    }
}

pub(crate) fn lu_show() -> LuShow {
    LuShow {
        lu: 1,
        name: "vol".into(),
        group: 1,
        capacity: 10 << 30,
        device: lu_row().device,
        paths: vec![path_row()],
        counters: LuCounters {
            reads: 1,
            zero_copy: 1,
            ..LuCounters::default()
        },
        uuid: LuUuid::from_bytes([4; 16]),
        group_name: "data".into(),
        depth: 128,
        queues: 2,
        queues_served: 2,
        problem: String::new(),
        holders: vec!["mounted at /srv".into()],
        members: vec![member()],
        mkfs: vec!["mkfs.ext4 -b 4096 -E stride=16,stripe_width=32 /dev/lunar/vol".into()],
        fstab: "/dev/lunar/vol /srv/vol ext4 defaults,nofail 0 2".into(),
    }
}

pub(crate) fn member() -> MemberRow {
    MemberRow {
        slot: 0,
        disk: Some(1),
        path: disk_row().path,
        state: DiskState::Rebuilding,
        data_offset: 8 << 20,
        reason: "replaced".into(),
        reads: 1,
        writes: 2,
        read_bytes: 4096,
        write_bytes: 8192,
        read_errors: 0,
        write_errors: 3,
        repaired: 0,
        timeouts: 1,
        bad_blocks: 2,
        bad_blocks_at: vec![5_242_880, 6_651_904],
        errors_lately: 0,
        latency_us: 52_300,
        slow: Some(SlowStatus {
            latency_us: 52_300,
            peers_us: 410,
        }),
    }
}

pub(crate) fn scrub() -> ScrubRow {
    ScrubRow {
        state: ScrubState::Done,
        repair: false,
        from: 0,
        done: 1 << 30,
        total: 1 << 30,
        rate: 0,
        rate_max: None,
        bad: 1,
        repaired: 0,
        unreadable: 0,
        rewritten: 4096,
        started: 1_700_000_000_000,
        ended: Some(1_700_000_060_000),
        stripes: vec![BadStripeRow {
            stripe: 7,
            at: 459_264,
            len: 512,
            slots: Vec::new(),
            lu: Some(1),
            lu_name: Some("vol".into()),
            lu_at: 917_504,
            lu_len: 131_072,
            repaired: false,
        }],
    }
}

pub(crate) fn sync() -> SyncStatus {
    SyncStatus {
        action: SyncAction::Recover,
        done: 1,
        total: 8,
        rate: 2,
        slot: Some(0),
    }
}

pub(crate) fn job() -> JobRow {
    JobRow {
        job: 7,
        kind: JobKind::Recover,
        group: 1,
        group_name: "data".into(),
        disk: Some(5),
        lu_name: None,
        state: JobState::Done,
        done: 8,
        total: 8,
        rate: 2,
        started: 1_700_000_000_000,
        ended: Some(1_700_000_360_000),
        reason: String::new(),
    }
}

pub(crate) fn event() -> EventRow {
    EventRow {
        event: 1,
        time: 1_700_000_000_000,
        name: "Fail".into(),
        group: Some(1),
        disk: Some(2),
        lu: None,
        text: "disk 2 failed".into(),
    }
}

pub(crate) fn status() -> StatusReply {
    let status = StatusData {
        health: Health::Degraded,
        system: SystemUuid::from_bytes([9; 16]),
        target_up: true,
        starting: false,
        features: Features::default(),
        groups: vec![GroupHealth {
            group: 1,
            name: "data".into(),
            level: Some(Level::Raid5),
            state: GroupState::Degraded,
            reason: group_show().reason,
            action: group_show().action,
            write_hole_open: true,
            sync: Some(sync()),
            scrub: None,
            members: vec![MemberHealth {
                slot: 0,
                disk: Some(1),
                path: disk_row().path,
                state: DiskState::Rebuilding,
                read_errors: 0,
                write_errors: 3,
            }],
            warnings: vec![Warning {
                disk: Some(1),
                slot: 0,
                text: "disk 1 (slot 0) is slow: 52 ms for an I/O, its peers 410 us".into(),
                action: "lunar disk replace 1 NEW".into(),
            }],
            lus: vec![LuHealth {
                lu: 1,
                name: "vol".into(),
                capacity: 10 << 30,
                device: lu_row().device,
                problem: String::new(),
            }],
        }],
        disks: vec![disk_row()],
        bad_disks: vec![BadDisk {
            disk: 2,
            path: "/dev/sdb".into(),
            problem: "cannot be read: Input/output error".into(),
        }],
        strangers: vec![Stranger {
            path: "/dev/sdc".into(),
            kind: StrangerKind::OtherSystem,
            system: Some(SystemUuid::from_bytes([8; 16])),
            group_name: "old".into(),
            text: "belongs to another system".into(),
        }],
        unsaved: String::new(),
    };
    StatusReply {
        exit: 3,
        text: " group: data   raid5\n".into(),
        status,
    }
}

/// The answer to `ConfigSave`.
pub(crate) fn config_text() -> ConfigText {
    let text = "{\n  \"format\": \"lunar.config/1\"\n}\n".into();
    ConfigText { text }
}

/// The answer to a changing verb.
pub(crate) fn changed() -> Changed {
    Changed {
        outcome: Outcome::Changed,
        text: vec!["it is done".into()],
        steps: vec!["do it".into()],
        dies: vec!["LU vol: 10 GiB".into()],
        confirm: Some("vol".into()),
        job: Some(7),
        disks: vec![disk_row()],
        group: Some(group_row()),
        lu: Some(lu_row()),
    }
}

pub(crate) fn upgrade() -> UpgradeReply {
    let build = |version: &str, build: &str| BuildRow {
        version: version.into(),
        commit: "4f1c2a9b7d3e".into(),
        build: build.into(),
        protocol: Some(1),
        format_min: Some(1),
        format_max: Some(1),
    };
    let old = BuildRow {
        protocol: None,
        format_min: None,
        format_max: None,
        ..build("", "00000000000000aa")
    };
    UpgradeReply {
        outcome: Outcome::Planned,
        exit: 0,
        programs: vec![ProgramRow {
            program: "ublk-target".into(),
            pid: Some(812),
            path: "/usr/sbin/ublk-target".into(),
            running: Some(old),
            installed: Some(build("0.2.0", "00000000000000bb")),
            changes: true,
            problems: Vec::new(),
        }],
        steps: vec!["quiesce 2 LUs".into()],
        lus: 2,
        quiesced_ms: Some(3),
        stood_still_ms: Some(120),
        mgmtd_restarts: false,
        text: Vec::new(),
    }
}
