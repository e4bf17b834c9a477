//! What mgmtd is asked over its socket: varlink framing, one request an answer, in order.
//!
//! Every changing request carries `dry_run` (say the steps, do nothing) and `yes` (what dies may die).
//! DISK, GROUP and LU arguments are texts: a number, a name, a path; lists take ranges (`1-4`).

use serde::{Deserialize, Serialize};

use crate::target::{Consistency, Level, LuSize};

/// Longest message on the socket, in bytes.
pub const CALL_MAX: usize = 1 << 20;
/// The interface that mgmtd serves.
pub const INTERFACE: &str = "io.lunar";
/// The text of the interface file.
pub const VARLINK: &str = include_str!("../io.lunar.varlink");

/// What a disk is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Becomes a member of a group.
    #[default]
    Data,
    /// Takes the place of a failed member.
    Spare,
    /// Takes parked writes.
    Work,
}

/// What is to be done about a scrub.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ScrubAsk {
    #[default]
    Start,
    Pause,
    Resume,
    Cancel,
}

macro_rules! requests {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
            #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
            #[serde(deny_unknown_fields, default)]
            pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }
        )*
    };
}

requests! {
    /// Asks for the health of everything.
    StatusAsk {
        /// Leaves out what is optimal.
        unhealthy: bool,
    }
    /// Asks without any field.
    Nothing {}
    /// Asks for one row.
    One {
        /// A number, a name or a path.
        name: String,
    }
    /// Asks for events later than `after`; waits for one at most `wait_ms` (<= 10 s).
    EventsAsk {
        after: u64,
        wait_ms: u32,
    }
    /// Records a test message.
    EventsTestAsk {
        dry_run: bool,
        yes: bool,
    }
    /// Names one job.
    JobOne {
        job: u32,
    }
    /// Ends a job early.
    JobEnd {
        job: u32,
        dry_run: bool,
        yes: bool,
    }
    /// Gives disks to Lunar, all or none.
    DiskAdd {
        paths: Vec<String>,
        role: Role,
        /// The one foreign signature that may be destroyed.
        force: Option<String>,
        /// A disk of this system becomes a new one: what it holds dies.
        as_new: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Says where disks are and lights their LEDs.
    DiskLocate {
        disks: Vec<String>,
        /// Puts the LEDs out.
        off: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Fails a member by hand.
    DiskFail {
        disk: String,
        dry_run: bool,
        yes: bool,
    }
    /// Puts another disk in the place of a member; without `new`, a spare.
    DiskReplace {
        old: String,
        new: Option<String>,
        /// The disk is filled from the start, also where it is known what it has missed.
        full: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Takes disks back, all or none.
    DiskRemove {
        disks: Vec<String>,
        /// Overwrites the superblocks.
        wipe: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Makes a RAID group.
    GroupCreate {
        name: String,
        level: Option<Level>,
        disks: Vec<String>,
        /// Bytes; none: 64 KiB.
        chunk: Option<u64>,
        consistency: Option<Consistency>,
        assume_clean: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Sets tunables of a group.
    GroupSet {
        group: String,
        /// Bytes a second.
        rebuild_min: Option<u64>,
        /// Bytes a second.
        rebuild_max: Option<u64>,
        /// Read errors of a disk that may be repaired lately before it is failed; 0: any number.
        read_errors_max: Option<u32>,
        dry_run: bool,
        yes: bool,
    }
    /// Starts or steers a scrub.
    GroupScrub {
        group: String,
        order: ScrubAsk,
        /// Makes what does not fit fit.
        repair: bool,
        /// Bytes of a member's data to begin at.
        from: Option<u64>,
        /// Most bytes a second of a member.
        rate: Option<u64>,
        dry_run: bool,
        yes: bool,
    }
    /// Starts a stopped group.
    GroupStart {
        group: String,
        /// Starts a quarantined group again.
        again: bool,
        /// Starts although data may be old or wrong.
        force: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Chooses a side of a group whose members were written apart from each other.
    GroupResolve {
        group: String,
        /// A disk of the side that goes on.
        keep: String,
        /// Starts although it was not stopped cleanly and is degraded.
        force: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Takes disks and what is on them from what they say themselves.
    Import {
        paths: Vec<String>,
        /// Brings deleted groups and LUs back.
        deleted: bool,
        /// Takes groups away from the system that they belong to.
        take: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Gives numbers, roles and options as a saved configuration has them.
    ConfigLoad {
        /// The file's text.
        text: String,
        /// Makes its groups and LUs anew on blank disks.
        create: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Stops a group, deletes it, or has it grow.
    GroupEnd {
        group: String,
        dry_run: bool,
        yes: bool,
    }
    /// Gives a group or a LU another name.
    Rename {
        name: String,
        to: String,
        dry_run: bool,
        yes: bool,
    }
    /// Makes a LU.
    LuCreate {
        name: String,
        group: String,
        size: Option<LuSize>,
        /// Requests in flight; none: 128.
        depth: Option<u16>,
        /// Queues of its device; none: 1.
        queues: Option<u16>,
        /// All of it reads as zero before it is there; else it has what its space was used for before.
        zero: bool,
        dry_run: bool,
        yes: bool,
    }
    /// Changes how a LU is served.
    LuSet {
        lu: String,
        /// Queues of its device.
        queues: Option<u16>,
        dry_run: bool,
        yes: bool,
    }
    /// Gives a LU more space.
    LuResize {
        lu: String,
        /// What it has then; or `more`.
        size: Option<LuSize>,
        /// Bytes that it gets on top.
        more: Option<u64>,
        dry_run: bool,
        yes: bool,
    }
    /// Deletes LUs, all or none.
    LuEnd {
        lus: Vec<String>,
        dry_run: bool,
        yes: bool,
    }
    /// Stops all in order.
    ShutdownAsk {
        dry_run: bool,
        yes: bool,
    }
    /// Puts other programs in the place of those that run.
    UpgradeAsk {
        /// Only says what would happen.
        check: bool,
        /// A ublk-target, or a folder with one and perhaps a mgmtd; none: what is installed where they were started from.
        to: Option<String>,
        dry_run: bool,
        yes: bool,
    }
}

/// A request to mgmtd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "parameters")]
pub enum Request {
    /// The health of everything. Answer: `StatusReply`.
    #[serde(rename = "io.lunar.Status")]
    Status(StatusAsk),
    /// What happened. Answer: `EventsReply`.
    #[serde(rename = "io.lunar.Events")]
    Events(EventsAsk),
    /// Records a `TestMessage` for every group and runs the hooks with it. Answer: `Changed`.
    #[serde(rename = "io.lunar.EventsTest")]
    EventsTest(EventsTestAsk),
    /// Checks the machine and the set-up. Answer: `DoctorReply`.
    #[serde(rename = "io.lunar.Doctor")]
    Doctor(Nothing),
    /// Counters and states for Prometheus. Answer: `MetricsReply`.
    #[serde(rename = "io.lunar.Metrics")]
    Metrics(Nothing),
    /// The I/O of LUs and members. Answer: `StatReply`.
    #[serde(rename = "io.lunar.Stat")]
    Stat(Nothing),
    /// What a bug report needs. Answer: `ReportReply`.
    #[serde(rename = "io.lunar.Report")]
    Report(Nothing),
    /// Every job. Answer: `JobList`.
    #[serde(rename = "io.lunar.JobList")]
    JobList(Nothing),
    /// One job. Answer: `JobOneReply`.
    #[serde(rename = "io.lunar.JobShow")]
    JobShow(JobOne),
    /// Ends a job early. Answer: `Changed`.
    #[serde(rename = "io.lunar.JobCancel")]
    JobCancel(JobEnd),
    /// The disk table. Answer: `DiskList`.
    #[serde(rename = "io.lunar.DiskList")]
    DiskList(Nothing),
    /// One disk. Answer: `DiskOne`.
    #[serde(rename = "io.lunar.DiskShow")]
    DiskShow(One),
    /// Gives disks to Lunar. Answer: `Changed`.
    #[serde(rename = "io.lunar.DiskAdd")]
    DiskAdd(DiskAdd),
    /// Says where disks are. Answer: `LocateReply`.
    #[serde(rename = "io.lunar.DiskLocate")]
    DiskLocate(DiskLocate),
    /// Fails a member. Answer: `Changed`.
    #[serde(rename = "io.lunar.DiskFail")]
    DiskFail(DiskFail),
    /// Replaces a member. Answer: `Changed`.
    #[serde(rename = "io.lunar.DiskReplace")]
    DiskReplace(DiskReplace),
    /// Takes disks back. Answer: `Changed`.
    #[serde(rename = "io.lunar.DiskRemove")]
    DiskRemove(DiskRemove),
    /// The table of RAID groups. Answer: `GroupList`.
    #[serde(rename = "io.lunar.GroupList")]
    GroupList(Nothing),
    /// One group. Answer: `GroupOne`.
    #[serde(rename = "io.lunar.GroupShow")]
    GroupShow(One),
    /// Makes a group. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupCreate")]
    GroupCreate(GroupCreate),
    /// Sets tunables of a group. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupSet")]
    GroupSet(GroupSet),
    /// Starts or steers a scrub. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupScrub")]
    GroupScrub(GroupScrub),
    /// Starts a stopped group. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupStart")]
    GroupStart(GroupStart),
    /// Chooses a side of a group in two. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupResolve")]
    GroupResolve(GroupResolve),
    /// Stops a group. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupStop")]
    GroupStop(GroupEnd),
    /// Gives a group all that its members have room for. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupGrow")]
    GroupGrow(GroupEnd),
    /// Renames a group. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupRename")]
    GroupRename(Rename),
    /// Deletes a group. Answer: `Changed`.
    #[serde(rename = "io.lunar.GroupDelete")]
    GroupDelete(GroupEnd),
    /// The table of LUs. Answer: `LuList`.
    #[serde(rename = "io.lunar.LuList")]
    LuList(Nothing),
    /// One LU. Answer: `LuOne`.
    #[serde(rename = "io.lunar.LuShow")]
    LuShow(One),
    /// Makes a LU. Answer: `Changed`.
    #[serde(rename = "io.lunar.LuCreate")]
    LuCreate(LuCreate),
    /// Renames a LU. Answer: `Changed`.
    #[serde(rename = "io.lunar.LuRename")]
    LuRename(Rename),
    /// Changes how a LU is served. Answer: `Changed`.
    #[serde(rename = "io.lunar.LuSet")]
    LuSet(LuSet),
    /// Gives a LU more space, in use too. Answer: `Changed`.
    #[serde(rename = "io.lunar.LuResize")]
    LuResize(LuResize),
    /// Deletes LUs. Answer: `Changed`.
    #[serde(rename = "io.lunar.LuDelete")]
    LuDelete(LuEnd),
    /// The table of paths. Answer: `PathList`.
    #[serde(rename = "io.lunar.PathList")]
    PathList(Nothing),
    /// Takes disks and what is on them. Answer: `Changed`.
    #[serde(rename = "io.lunar.Import")]
    Import(Import),
    /// What no disk carries, and what there is. Answer: `ConfigText`.
    #[serde(rename = "io.lunar.ConfigSave")]
    ConfigSave(Nothing),
    /// Loads what `ConfigSave` gave. Answer: `Changed`.
    #[serde(rename = "io.lunar.ConfigLoad")]
    ConfigLoad(ConfigLoad),
    /// Stops all in order. Answer: `Changed`.
    #[serde(rename = "io.lunar.Shutdown")]
    Shutdown(ShutdownAsk),
    /// Puts other programs in the place of those that run, while LUs are in use. Answer: `UpgradeReply`.
    #[serde(rename = "io.lunar.Upgrade")]
    Upgrade(UpgradeAsk),
}

/// Every verb: method, and whether it changes something (root only).
pub const VERBS: &[(&str, bool)] = &[
    ("io.lunar.Status", false),
    ("io.lunar.Events", false),
    ("io.lunar.EventsTest", true),
    ("io.lunar.Doctor", false),
    ("io.lunar.Metrics", false),
    ("io.lunar.Stat", false),
    ("io.lunar.Report", false),
    ("io.lunar.JobList", false),
    ("io.lunar.JobShow", false),
    ("io.lunar.JobCancel", true),
    ("io.lunar.DiskList", false),
    ("io.lunar.DiskShow", false),
    ("io.lunar.DiskAdd", true),
    ("io.lunar.DiskLocate", true),
    ("io.lunar.DiskFail", true),
    ("io.lunar.DiskReplace", true),
    ("io.lunar.DiskRemove", true),
    ("io.lunar.GroupList", false),
    ("io.lunar.GroupShow", false),
    ("io.lunar.GroupCreate", true),
    ("io.lunar.GroupSet", true),
    ("io.lunar.GroupScrub", true),
    ("io.lunar.GroupStart", true),
    ("io.lunar.GroupResolve", true),
    ("io.lunar.GroupStop", true),
    ("io.lunar.GroupGrow", true),
    ("io.lunar.GroupRename", true),
    ("io.lunar.GroupDelete", true),
    ("io.lunar.LuList", false),
    ("io.lunar.LuShow", false),
    ("io.lunar.LuCreate", true),
    ("io.lunar.LuRename", true),
    ("io.lunar.LuSet", true),
    ("io.lunar.LuResize", true),
    ("io.lunar.LuDelete", true),
    ("io.lunar.PathList", false),
    ("io.lunar.Import", true),
    ("io.lunar.ConfigSave", false),
    ("io.lunar.ConfigLoad", true),
    ("io.lunar.Shutdown", true),
    ("io.lunar.Upgrade", true),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_with_unknown_field_is_refused() {
        for text in [
            r#"{"method":"io.lunar.DiskList","parameters":{"x":1}}"#,
            r#"{"method":"io.lunar.DiskFail","parameters":{"disk":"1","force":true}}"#,
            r#"{"method":"io.lunar.Nothing","parameters":{}}"#,
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn request_keeps_its_method_name() {
        let ask = Request::LuShow(One { name: "vol".into() });
        let text = serde_json::to_string(&ask).unwrap();
        assert_eq!(
            text,
            r#"{"method":"io.lunar.LuShow","parameters":{"name":"vol"}}"#
        );
    }

    #[test]
    fn interface_file_names_every_verb() {
        for (verb, _) in VERBS {
            let name = verb.strip_prefix("io.lunar.").unwrap();
            assert!(VARLINK.contains(&format!("method {name}(")), "{name}");
        }
    }
}
