//! The tables, as mgmtd answers with them and as `--json` prints them.
//!
//! Keys are the snake_case of the columns. Sizes are bytes. A key is added, never renamed or taken away.

use serde::{Deserialize, Serialize};

use crate::ids::{DiskUuid, GroupUuid, History, LuUuid, SystemUuid};
use crate::mgmt::Role;
use crate::target::{
    Consistency, Features, GroupState, Level, LuCounters, ScrubState, SlowStatus, SyncStatus,
};

macro_rules! rows {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
            #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
            #[serde(deny_unknown_fields)]
            pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }
        )*
    };
}

/// State of a disk, in its group or without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum DiskState {
    /// Given to Lunar, in no group.
    Free,
    /// In no group, waiting for a member to fail.
    Spare,
    /// Member whose group is not started.
    Stopped,
    /// Member that holds what it should hold.
    InSync,
    /// Member being filled.
    Rebuilding,
    /// Failed; nothing on it is believed.
    Faulty,
    /// Not found at its path or anywhere else.
    Missing,
}

/// State of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum PathState {
    /// Its device answers.
    Online,
    /// It has no device.
    Offline,
}

/// State of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    Running,
    Paused,
    Done,
    Failed,
    Cancelled,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum JobKind {
    /// Makes redundancy right.
    Resync,
    /// Fills a replacement.
    Recover,
    /// Copies a disk that is replaced.
    Replace,
    /// Compares every stripe.
    Scrub,
    /// Zeroes the space of a LU before it is there.
    Zero,
}

/// A light at a disk's place in an enclosure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Led {
    On,
    Off,
    /// There is none, or nobody knows of one.
    None,
}

/// What a check of `doctor` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    Ok,
    /// It works, but may hurt one day.
    Warn,
    /// It does not work, or data is at risk.
    Fail,
}

/// The worst state of anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Exit 0.
    Optimal,
    /// Redundancy is missing: exit 3.
    Degraded,
    /// Something gives no service: exit 4.
    NoService,
}

/// Why a disk is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum StrangerKind {
    /// It belongs to another system.
    OtherSystem,
    /// Another disk has the same identity: one is a copy of the other.
    Copy,
    /// Its superblock cannot be believed.
    NotValid,
}

/// What a changing verb did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Changed,
    Unchanged,
    /// `dry_run`: nothing was done.
    Planned,
}

rows! {
    /// A row of table disks.
    DiskRow {
        disk: u32,
        path: String,
        capacity: u64,
        role: Role,
        state: DiskState,
        /// Number of its group.
        group: Option<u32>,
        /// Read and write errors since the group started.
        errors: u64,
    }
    /// One disk in full.
    DiskShow {
        disk: u32,
        path: String,
        capacity: u64,
        role: Role,
        state: DiskState,
        group: Option<u32>,
        errors: u64,
        uuid: DiskUuid,
        group_name: Option<String>,
        slot: Option<u16>,
        /// Why it is not in sync; empty when it is.
        reason: String,
        read_errors: u64,
        write_errors: u64,
        /// Grains (4 KiB) that could not be read, and were written anew from redundancy.
        repaired: u64,
        /// Times that it did not answer for 30 s.
        timeouts: u64,
        /// Grains (4 KiB) that do not hold what they should, and are not read: redundancy serves them, or nobody.
        bad_blocks: u64,
        /// The first of them, in bytes from the start of the disk.
        bad_blocks_at: Vec<u64>,
        /// Read errors that were repaired and count against it; each hour halves them.
        errors_lately: u32,
        /// Microseconds of an I/O, over the last 5 s that had any.
        latency_us: u64,
        /// It is much slower than its peers.
        slow: Option<SlowStatus>,
        /// As the disk says; empty when it does not.
        model: String,
        serial: String,
        /// Every lasting name of it in /dev.
        links: Vec<String>,
        /// Its place in an enclosure.
        place: Option<String>,
        /// `write back` (volatile) or `write through`; empty for a file.
        write_cache: String,
    }
    /// Where a disk is.
    LocateRow {
        disk: u32,
        path: String,
        state: DiskState,
        model: String,
        serial: String,
        links: Vec<String>,
        place: Option<String>,
        led: Led,
    }
    /// One check of `doctor`.
    CheckRow {
        /// What was looked at: `kernel`, `memlock`, `group data`, ...
        check: String,
        state: CheckState,
        /// What was found, and what follows from it.
        text: String,
        /// What to type about it; empty when it is fine.
        action: String,
    }
    /// A group's I/O in `stat`.
    GroupIo {
        group: u32,
        name: String,
        members: Vec<MemberRow>,
    }
    /// A row of table raid-groups.
    GroupRow {
        group: u32,
        name: String,
        /// None: no disk of the group was found.
        level: Option<Level>,
        /// Numbers, by slot; none for a slot without a known disk.
        disks: Vec<Option<u32>>,
        chunk: u64,
        consistency: Option<Consistency>,
        state: GroupState,
    }
    /// A slot of a group.
    MemberRow {
        slot: u16,
        disk: Option<u32>,
        path: String,
        state: DiskState,
        /// Bytes from the start of the disk to the group's data; 0 where nobody is.
        data_offset: u64,
        reason: String,
        reads: u64,
        writes: u64,
        read_bytes: u64,
        write_bytes: u64,
        read_errors: u64,
        write_errors: u64,
        /// Grains (4 KiB) that could not be read, and were written anew from redundancy.
        repaired: u64,
        /// Times that it did not answer for 30 s.
        timeouts: u64,
        /// Grains (4 KiB) that do not hold what they should, and are not read: redundancy serves them, or nobody.
        bad_blocks: u64,
        /// The first of them, in bytes from the start of the disk.
        bad_blocks_at: Vec<u64>,
        /// Read errors that were repaired and count against it; each hour halves them.
        errors_lately: u32,
        /// Microseconds of an I/O, over the last 5 s that had any.
        latency_us: u64,
        /// It is much slower than its peers.
        slow: Option<SlowStatus>,
    }
    /// One group in full.
    GroupShow {
        group: u32,
        name: String,
        level: Option<Level>,
        disks: Vec<Option<u32>>,
        chunk: u64,
        consistency: Option<Consistency>,
        state: GroupState,
        uuid: GroupUuid,
        /// Why it is not optimal; empty when it is.
        reason: String,
        /// What to type about it; empty when there is nothing to do.
        action: String,
        capacity: u64,
        free: u64,
        logical_block: u32,
        write_hole_open: bool,
        zero_copy: bool,
        /// Times that serving requests allocated memory since the group started; stays as it is once warm.
        allocations: u64,
        history: Option<History>,
        generation: u64,
        /// Bytes a second of a member that rebuilds and scrubs get at least and take at most, as set; none: the
        /// default, no limit.
        rebuild_min: Option<u64>,
        rebuild_max: Option<u64>,
        /// Read errors of a disk that may be repaired lately before it is failed; 0: any number.
        read_errors_max: u32,
        members: Vec<MemberRow>,
        /// Numbers of its LUs.
        lus: Vec<u32>,
        sync: Option<SyncStatus>,
        /// The scrub that runs, or the last one.
        scrub: Option<ScrubRow>,
    }
    /// A scrub: every stripe read from all members and compared.
    ScrubRow {
        state: ScrubState,
        /// What does not fit is made to fit.
        repair: bool,
        /// Bytes of a member where it began; all from there to `done` is compared, of `total`.
        from: u64,
        done: u64,
        total: u64,
        /// Bytes a second of a member.
        rate: u64,
        rate_max: Option<u64>,
        /// Stripes whose redundancy did not fit, and those of them that fit now.
        bad: u64,
        repaired: u64,
        /// Stripes that could not be compared.
        unreadable: u64,
        /// Bytes that could not be read and were rewritten from redundancy.
        rewritten: u64,
        /// Milliseconds since 1970, UTC.
        started: u64,
        ended: Option<u64>,
        /// The first of the bad stripes, in order; `bad` counts them all.
        stripes: Vec<BadStripeRow>,
    }
    /// A stripe whose redundancy did not fit.
    BadStripeRow {
        stripe: u64,
        /// Bytes of the members' data within which the difference lies.
        at: u64,
        len: u64,
        /// Slots that are wrong; empty: it cannot be told.
        slots: Vec<u16>,
        /// The LU that has data there, and which bytes of it may be wrong.
        lu: Option<u32>,
        lu_name: Option<String>,
        lu_at: u64,
        lu_len: u64,
        repaired: bool,
    }
    /// A row of table paths.
    PathRow {
        path: u32,
        lu: u32,
        /// `host`, or the head that it belongs to.
        head: String,
        /// `/dev/ublkbN`, when it is up.
        device: Option<String>,
        state: PathState,
    }
    /// A row of table lus.
    LuRow {
        lu: u32,
        name: String,
        /// Number of its group.
        group: u32,
        capacity: u64,
        /// `/dev/lunar/NAME`, when it is up.
        device: Option<String>,
        paths: Vec<PathRow>,
        counters: LuCounters,
    }
    /// One LU in full.
    LuShow {
        lu: u32,
        name: String,
        group: u32,
        capacity: u64,
        device: Option<String>,
        paths: Vec<PathRow>,
        counters: LuCounters,
        uuid: LuUuid,
        group_name: String,
        depth: u16,
        /// Queues that its device is to have, and those that the kernel made: no more than there are CPUs.
        queues: u16,
        queues_served: u16,
        /// Why it is not up or answers errors; empty when all is well.
        problem: String,
        /// Who holds its device now.
        holders: Vec<String>,
        members: Vec<MemberRow>,
        /// Command lines that make file systems of the right geometry.
        mkfs: Vec<String>,
        fstab: String,
    }
    /// A row of the job list.
    JobRow {
        job: u32,
        kind: JobKind,
        group: u32,
        group_name: String,
        /// Disk being filled.
        disk: Option<u32>,
        /// Name of the LU being zeroed.
        lu_name: Option<String>,
        state: JobState,
        /// Bytes of a member; of a LU being zeroed, its bytes.
        done: u64,
        total: u64,
        /// Bytes a second.
        rate: u64,
        /// Milliseconds since 1970, UTC.
        started: u64,
        ended: Option<u64>,
        /// Why it failed, or what it left to be looked at; empty otherwise.
        reason: String,
    }
    /// Something that happened.
    EventRow {
        event: u64,
        /// Milliseconds since 1970, UTC.
        time: u64,
        /// md's name where md has one.
        name: String,
        group: Option<u32>,
        disk: Option<u32>,
        lu: Option<u32>,
        text: String,
    }
    /// A group in `status`.
    GroupHealth {
        group: u32,
        name: String,
        level: Option<Level>,
        state: GroupState,
        reason: String,
        /// What to do about it; empty when there is nothing to do.
        action: String,
        write_hole_open: bool,
        /// Bytes done and bytes in all, while a resync or recover runs.
        sync: Option<SyncStatus>,
        /// The scrub that runs, or the last one.
        scrub: Option<ScrubRow>,
        members: Vec<MemberHealth>,
        /// Disks that serve, but may not for long.
        warnings: Vec<Warning>,
        lus: Vec<LuHealth>,
    }
    /// A disk that serves, but may not for long.
    Warning {
        disk: Option<u32>,
        slot: u16,
        text: String,
        /// What to type about it.
        action: String,
    }
    /// A slot in `status`.
    MemberHealth {
        slot: u16,
        disk: Option<u32>,
        path: String,
        state: DiskState,
        read_errors: u64,
        write_errors: u64,
    }
    /// A LU in `status`.
    LuHealth {
        lu: u32,
        name: String,
        capacity: u64,
        device: Option<String>,
        problem: String,
    }
    /// A known disk that cannot be read.
    BadDisk {
        disk: u32,
        path: String,
        problem: String,
    }
    /// Disks that carry a Lunar superblock and are left alone.
    Stranger {
        path: String,
        kind: StrangerKind,
        /// That it belongs to.
        system: Option<SystemUuid>,
        /// The name of its group; empty: it is in none, or that cannot be read.
        group_name: String,
        /// Why it is left alone.
        text: String,
    }
    /// `data` of `lunar status --json`.
    StatusData {
        health: Health,
        system: SystemUuid,
        /// Whether ublk-target answers.
        target_up: bool,
        /// mgmtd has just started: disks that are there may still be told as missing, groups as stopped.
        starting: bool,
        features: Features,
        groups: Vec<GroupHealth>,
        /// Disks in no group that need a look.
        disks: Vec<DiskRow>,
        /// Known disks that could not be read when they were last looked at.
        bad_disks: Vec<BadDisk>,
        /// Disks with a Lunar superblock that are left alone.
        strangers: Vec<Stranger>,
        /// Why the state directory takes no write; empty when it does.
        unsaved: String,
    }
    /// Answer to `Status`.
    StatusReply {
        /// Exit code of `lunar status`.
        exit: u8,
        /// For people, composed here and never in the client.
        text: String,
        status: StatusData,
    }
    /// Answer to `ConfigSave`.
    ConfigText {
        /// JSON, a line a field.
        text: String,
    }
    /// Answer to `DiskList`.
    DiskList { disks: Vec<DiskRow>, }
    /// Answer to `DiskShow`.
    DiskOne { disk: DiskShow, }
    /// Answer to `GroupList`.
    GroupList { groups: Vec<GroupRow>, }
    /// Answer to `GroupShow`.
    GroupOne { group: GroupShow, }
    /// Answer to `LuList`.
    LuList { lus: Vec<LuRow>, }
    /// Answer to `LuShow`.
    LuOne { lu: LuShow, }
    /// Answer to `PathList`.
    PathList { paths: Vec<PathRow>, }
    /// Answer to `JobList`.
    JobList { jobs: Vec<JobRow>, }
    /// Answer to `JobShow`.
    JobOneReply { job: JobRow, }
    /// Answer to `Events`.
    EventsReply { events: Vec<EventRow>, }
    /// Answer to `DiskLocate`.
    LocateReply {
        outcome: Outcome,
        /// What is done, or would be done.
        steps: Vec<String>,
        disks: Vec<LocateRow>,
    }
    /// Answer to `Doctor`.
    DoctorReply {
        /// Exit code of `lunar doctor`.
        exit: u8,
        checks: Vec<CheckRow>,
    }
    /// Answer to `Metrics`.
    MetricsReply {
        /// Prometheus' text format 0.0.4.
        text: String,
    }
    /// Answer to `Stat`: counts since the group started, or the LU's device came up.
    StatReply {
        /// Milliseconds of a clock that only runs forward: differences count.
        at: u64,
        groups: Vec<GroupIo>,
        lus: Vec<LuRow>,
    }
    /// Answer to `Report`.
    ReportReply {
        text: String,
    }
    /// A build of a program.
    BuildRow {
        /// Empty: it does not say.
        version: String,
        /// Empty: it does not say.
        commit: String,
        /// Of the file's bytes: another build has another.
        build: String,
        /// None: it is older than these were told.
        protocol: Option<u32>,
        format_min: Option<u32>,
        format_max: Option<u32>,
    }
    /// A program: what runs, and what would.
    ProgramRow {
        program: String,
        pid: Option<u32>,
        /// Where the one lies that would run.
        path: String,
        running: Option<BuildRow>,
        installed: Option<BuildRow>,
        changes: bool,
        /// Why it is refused.
        problems: Vec<String>,
    }
    /// Answer to `Upgrade`.
    UpgradeReply {
        outcome: Outcome,
        /// Exit code of `lunar upgrade`.
        exit: u8,
        programs: Vec<ProgramRow>,
        /// What is done, or would be done.
        steps: Vec<String>,
        /// Devices that stand still meanwhile.
        lus: u32,
        /// Milliseconds until nothing was in flight on any of them; none: they were not quiesced.
        quiesced_ms: Option<u64>,
        /// Milliseconds until all of them were served again.
        stood_still_ms: Option<u64>,
        /// mgmtd goes away for a moment after this answer.
        mgmtd_restarts: bool,
        /// For people, a line each.
        text: Vec<String>,
    }
    /// Answer to every changing verb.
    Changed {
        outcome: Outcome,
        /// For people, a line each.
        text: Vec<String>,
        /// What is done, or would be done.
        steps: Vec<String>,
        /// What dies by it, a line each.
        dies: Vec<String>,
        /// The name that a person types to let it die.
        confirm: Option<String>,
        /// The job that goes on in background.
        job: Option<u32>,
        disks: Vec<DiskRow>,
        group: Option<GroupRow>,
        lu: Option<LuRow>,
    }
}
