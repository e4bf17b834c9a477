//! Rows of the tables, from what is saved and what was last seen. Pure.

use lunar_api::rows::{
    BadDisk, BadStripeRow, DiskRow, DiskState, EventRow, GroupRow, GroupShow, JobKind, JobRow,
    JobState, LuRow, LuShow, MemberRow, PathRow, PathState, ScrubRow,
};
use lunar_api::target::{
    BadStripe, Consistency, GroupState, GroupStatus, Label, LuStatus, MemberState, MemberStatus,
    ScrubStatus,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid};

use crate::daemon::Live;
use crate::tables::{DiskSave, EventSave, GroupSave, JobSave, LuSave, Tables};
use crate::text;

/// One moment of everything.
#[derive(Debug, Clone, Default)]
pub struct View {
    pub tables: Tables,
    pub live: Live,
    /// Directory of the device links.
    pub nodes: String,
}

impl View {
    /// The group and slot that a disk is in.
    pub fn member(&self, disk: DiskUuid) -> Option<(&GroupStatus, &MemberStatus)> {
        self.live.groups.values().find_map(|group| {
            let member = group
                .all_members()
                .find(|m| m.disk == disk && !m.disk.is_nil())?;
            Some((group, member))
        })
    }

    /// Whether this system has nothing: no disk was ever given to it, or all is lost.
    pub fn is_new(&self) -> bool {
        self.tables.disks.is_empty() && self.tables.groups.is_empty() && self.live.groups.is_empty()
    }

    /// Known disks whose path could not be read, and why.
    pub fn bad_disks(&self) -> Vec<BadDisk> {
        let bad = |(path, problem): (&String, &String)| {
            let disk = self.tables.disks.values().find(|d| d.path == *path)?;
            Some(BadDisk {
                disk: disk.number,
                path: path.clone(),
                problem: problem.clone(),
            })
        };
        self.live.bad_paths.iter().filter_map(bad).collect()
    }

    /// Group that a disk belongs to, started or not.
    pub fn group_of(&self, disk: &DiskSave) -> Option<GroupUuid> {
        if let Some((group, _)) = self.member(disk.uuid) {
            return Some(group.group);
        }
        if disk.was.is_some() {
            return None;
        }
        let label = self.live.probes.get(&disk.uuid)?.label.as_ref()?;
        let up = self.live.groups.contains_key(&label.group);
        let newest = self.newest_label(label.group);
        let deleted = newest.is_some_and(|newest| newest.deleted);
        (!label.group.is_nil() && !deleted && !up).then_some(label.group)
    }

    fn disk_state(&self, disk: &DiskSave) -> DiskState {
        if let Some((_, member)) = self.member(disk.uuid) {
            return member_state(member.state);
        }
        if disk.was.is_some() || disk.sick.is_some() {
            return DiskState::Faulty;
        }
        if !self.live.probes.contains_key(&disk.uuid) {
            return DiskState::Missing;
        }
        match (self.group_of(disk), disk.role) {
            (Some(_), _) => DiskState::Stopped,
            (None, lunar_api::mgmt::Role::Spare) => DiskState::Spare,
            (None, _) => DiskState::Free,
        }
    }

    /// A row of table disks.
    pub fn disk_row(&self, disk: &DiskSave) -> DiskRow {
        let group = self.group_of(disk).and_then(|g| self.tables.group(g));
        let errors = self
            .member(disk.uuid)
            .map_or(0, |(_, m)| m.read_errors + m.write_errors);
        DiskRow {
            disk: disk.number,
            path: disk.path.clone(),
            capacity: disk.capacity,
            role: disk.role,
            state: self.disk_state(disk),
            group: group.map(|g| g.number),
            errors,
        }
    }

    /// Table disks.
    pub fn disk_rows(&self) -> Vec<DiskRow> {
        self.tables
            .disks
            .values()
            .map(|d| self.disk_row(d))
            .collect()
    }

    /// A row of table raid-groups; what is not up is told from the disks.
    pub fn group_row(&self, save: &GroupSave) -> GroupRow {
        let number = |disk: &DiskUuid| self.tables.disk(*disk).map(|d| d.number);
        let mut row = GroupRow {
            group: save.number,
            name: save.name_seen.clone(),
            level: None,
            disks: Vec::new(),
            chunk: 0,
            consistency: None,
            state: GroupState::Stopped,
        };
        if let Some(live) = self.live.groups.get(&save.uuid) {
            row.name.clone_from(&live.name);
            row.level = Some(live.level);
            row.disks = live.members.iter().map(|m| number(&m.disk)).collect();
            row.chunk = live.chunk;
            row.consistency = Some(live.consistency);
            row.state = live.state;
        } else {
            if let Some(label) = self.newest_label(save.uuid) {
                row.level = label.level;
                row.disks = label.members.iter().map(number).collect();
            }
        }
        row
    }

    /// Slots of a group.
    pub fn member_rows(&self, group: &GroupStatus) -> Vec<MemberRow> {
        let row = |m: &MemberStatus| {
            let disk = self.tables.disk(m.disk);
            MemberRow {
                slot: m.slot,
                disk: disk.map(|d| d.number),
                path: disk.map_or(m.path.clone(), |d| d.path.clone()),
                state: member_state(m.state),
                data_offset: m.data_offset,
                reason: m.reason.clone(),
                reads: m.reads,
                writes: m.writes,
                read_bytes: m.read_bytes,
                write_bytes: m.write_bytes,
                read_errors: m.read_errors,
                write_errors: m.write_errors,
                repaired: m.repaired,
                timeouts: m.timeouts,
                bad_blocks: m.bad_blocks,
                bad_blocks_at: m.bad_blocks_at.clone(),
                errors_lately: m.errors_lately,
                latency_us: m.latency_us,
                slow: m.slow,
            }
        };
        group.all_members().map(row).collect()
    }

    /// Slots of a group that is not started, from what its disks say.
    fn stopped_rows(&self, save: &GroupSave) -> Vec<MemberRow> {
        let Some(label) = self.newest_label(save.uuid) else {
            return Vec::new();
        };
        let row = |(slot, uuid): (u16, &DiskUuid)| {
            let disk = self.tables.disk(*uuid);
            let here = disk.filter(|d| self.group_of(d) == Some(save.uuid));
            let bad = disk.and_then(|d| self.live.bad_paths.get(&d.path)).cloned();
            let reason = match here {
                Some(_) => String::new(),
                None => bad.unwrap_or("not found".into()),
            };
            MemberRow {
                slot,
                disk: disk.map(|d| d.number),
                path: disk.map_or(String::new(), |d| d.path.clone()),
                state: here.map_or(DiskState::Missing, |_| DiskState::Stopped),
                data_offset: 0,
                reason,
                reads: 0,
                writes: 0,
                read_bytes: 0,
                write_bytes: 0,
                read_errors: 0,
                write_errors: 0,
                repaired: 0,
                timeouts: 0,
                bad_blocks: 0,
                bad_blocks_at: Vec::new(),
                errors_lately: 0,
                latency_us: 0,
                slow: None,
            }
        };
        (0..).zip(&label.members).map(row).collect()
    }

    /// ublk-target knows disks by identity only; people know their numbers.
    fn named(&self, mut text: String) -> String {
        for disk in self.tables.disks.values() {
            let (uuid, number) = (disk.uuid, format!("disk {}", disk.number));
            text = text.replace(&format!("disk (was disk {uuid})"), &number);
            text = text.replace(&format!("disk {uuid}"), &number);
        }
        text
    }

    /// What the newest disk of a group says of it.
    fn newest_label(&self, group: GroupUuid) -> Option<&Label> {
        let labels = self.live.probes.values().filter_map(|p| p.label.as_ref());
        labels
            .filter(|l| l.group == group)
            .max_by_key(|l| l.generation)
    }

    /// One group in full.
    pub fn group_show(&self, save: &GroupSave) -> GroupShow {
        let row = self.group_row(save);
        let live = self.live.groups.get(&save.uuid);
        let problem = self.live.problems.get(&save.uuid).map(|p| p.why.clone());
        let lus = self.tables.lus.values().filter(|l| l.group == save.uuid);
        GroupShow {
            group: row.group,
            name: row.name,
            level: row.level,
            disks: row.disks,
            chunk: row.chunk,
            consistency: row.consistency,
            state: row.state,
            uuid: save.uuid,
            reason: self.named(live.map_or(problem.unwrap_or_default(), |g| g.reason.clone())),
            capacity: live.map_or(0, |g| g.capacity),
            free: live.map_or(0, |g| g.free),
            logical_block: live.map_or(0, |g| g.logical_block),
            write_hole_open: live.is_some_and(is_write_hole_open),
            zero_copy: live.is_some_and(|g| g.zero_copy),
            allocations: live.map_or(0, |g| g.allocations),
            history: live.map(|g| g.history).or(save.witness.map(|w| w.history)),
            generation: live
                .map(|g| g.generation)
                .or(save.witness.map(|w| w.generation))
                .unwrap_or(0),
            rebuild_min: save.rebuild_min,
            rebuild_max: save.rebuild_max,
            read_errors_max: live.map_or(save.read_errors_max.unwrap_or(0), |g| g.read_errors_max),
            members: live.map_or_else(|| self.stopped_rows(save), |g| self.member_rows(g)),
            action: text::action(self, save),
            lus: lus.map(|l| l.number).collect(),
            sync: live.and_then(|g| g.sync.clone()),
            scrub: live
                .and_then(|g| g.scrub.as_ref())
                .map(|s| self.scrub_row(s)),
        }
    }

    /// A scrub with the names of the LUs.
    fn scrub_row(&self, scrub: &ScrubStatus) -> ScrubRow {
        let stripe = |bad: &BadStripe| {
            let lu = bad.lu.and_then(|lu| self.tables.lu(lu));
            BadStripeRow {
                stripe: bad.stripe,
                at: bad.at,
                len: bad.len,
                slots: bad.slots.clone(),
                lu: lu.map(|lu| lu.number),
                lu_name: lu.map(|lu| lu.name_seen.clone()),
                lu_at: bad.lu_at,
                lu_len: bad.lu_len,
                repaired: bad.repaired,
            }
        };
        ScrubRow {
            state: scrub.state,
            repair: scrub.repair,
            from: scrub.from,
            done: scrub.done,
            total: scrub.total,
            rate: scrub.rate,
            rate_max: scrub.rate_max,
            bad: scrub.bad,
            repaired: scrub.repaired,
            unreadable: scrub.unreadable,
            rewritten: scrub.rewritten,
            started: scrub.started,
            ended: scrub.ended,
            stripes: scrub.stripes.iter().map(stripe).collect(),
        }
    }

    /// The job of the scrub that a group does or has paused.
    pub fn scrub_job(&self, group: GroupUuid) -> Option<u32> {
        let open = |j: &&JobSave| j.group == group && j.kind == JobKind::Scrub && j.ended.is_none();
        self.tables.jobs.values().rev().find(open).map(|j| j.number)
    }

    /// A LU, live.
    pub fn lu_live(&self, save: &LuSave) -> Option<&LuStatus> {
        self.live
            .groups
            .get(&save.group)?
            .lus
            .iter()
            .find(|l| l.lu == save.uuid)
    }

    /// The one path of a LU in this version: the host's.
    pub fn path_row(&self, save: &LuSave) -> PathRow {
        let ublk = self.lu_live(save).and_then(|l| l.ublk);
        PathRow {
            path: save.number,
            lu: save.number,
            head: "host".into(),
            device: ublk.map(|n| format!("/dev/ublkb{n}")),
            state: if ublk.is_some() {
                PathState::Online
            } else {
                PathState::Offline
            },
        }
    }

    /// A row of table lus.
    pub fn lu_row(&self, save: &LuSave) -> LuRow {
        let live = self.lu_live(save);
        let name = live.map_or(&save.name_seen, |l| &l.name).clone();
        let up = live.is_some_and(|l| l.ublk.is_some());
        LuRow {
            lu: save.number,
            device: up.then(|| format!("{}/{name}", self.nodes)),
            name,
            group: self.tables.group(save.group).map_or(0, |g| g.number),
            capacity: live.map_or(0, |l| l.capacity),
            paths: vec![self.path_row(save)],
            counters: live.map(|l| l.counters).unwrap_or_default(),
        }
    }

    /// One LU in full.
    pub fn lu_show(&self, save: &LuSave, holders: Vec<String>) -> LuShow {
        let row = self.lu_row(save);
        let live = self.lu_live(save);
        let group = self.live.groups.get(&save.group);
        let node = format!("{}/{}", self.nodes, row.name);
        let problem = self.live.problems.get(&save.group).map(|p| p.why.clone());
        LuShow {
            lu: row.lu,
            mkfs: group.map(|g| mkfs_lines(g, &node)).unwrap_or_default(),
            fstab: format!(
                "{node} /srv/{} ext4 defaults,nofail,x-systemd.requires=mgmtd.service 0 2",
                row.name
            ),
            name: row.name,
            group: row.group,
            capacity: row.capacity,
            device: row.device,
            paths: row.paths,
            counters: row.counters,
            uuid: save.uuid,
            group_name: self
                .tables
                .group(save.group)
                .map_or(String::new(), |g| g.name_seen.clone()),
            depth: live.map_or(0, |l| l.depth),
            queues: live.map_or(0, |l| l.queues),
            queues_served: live.map_or(0, |l| l.queues_served),
            problem: live.map_or(problem.unwrap_or("its group is not started".into()), |l| {
                l.problem.clone()
            }),
            holders,
            members: group.map(|g| self.member_rows(g)).unwrap_or_default(),
        }
    }

    /// A row of the job list.
    pub fn job_row(&self, save: &JobSave) -> JobRow {
        let group = self.tables.group(save.group);
        let live = self.live.groups.get(&save.group);
        let live = live.filter(|_| save.state == JobState::Running);
        let now = live.and_then(|g| match save.kind {
            JobKind::Scrub => g.scrub.as_ref().map(|s| (s.done, s.total, s.rate)),
            JobKind::Resync | JobKind::Recover | JobKind::Replace => {
                g.sync.as_ref().map(|s| (s.done, s.total, s.rate))
            }
            JobKind::Zero => {
                let mut all = g.zeroing.iter();
                let own = all.find(|zero| Some(&zero.name) == save.lu_name.as_ref());
                own.map(|zero| (zero.done, zero.total, zero.rate))
            }
        });
        JobRow {
            job: save.number,
            kind: save.kind,
            group: group.map_or(0, |g| g.number),
            group_name: group.map_or(String::new(), |g| g.name_seen.clone()),
            disk: save
                .disk
                .and_then(|d| self.tables.disk(d))
                .map(|d| d.number),
            lu_name: save.lu_name.clone(),
            state: save.state,
            done: now.map_or(save.done, |now| now.0),
            total: now.map_or(save.total, |now| now.1),
            rate: now.map_or(0, |now| now.2),
            started: save.started,
            ended: save.ended,
            reason: save.reason.clone(),
        }
    }

    /// An event.
    pub fn event_row(&self, save: &EventSave) -> EventRow {
        EventRow {
            event: save.number,
            time: save.time,
            name: save.name.clone(),
            group: save
                .group
                .and_then(|g| self.tables.group(g))
                .map(|g| g.number),
            disk: save
                .disk
                .and_then(|d| self.tables.disk(d))
                .map(|d| d.number),
            lu: save.lu.and_then(|l| self.tables.lu(l)).map(|l| l.number),
            text: save.text.clone(),
        }
    }
}

/// The error for a name that nothing has.
pub fn unknown(noun: &str, name: &str) -> ApiError {
    let shown: String = name.chars().take(80).collect();
    let what = if noun == "lu" { "LU" } else { noun };
    ApiError::new(ErrorKind::Usage, format!("there is no {what} `{shown}`"))
        .because(format!("no {what} has this number, name or path"))
        .hint(format!("lunar {noun} list"))
}

/// The same state in the words of table disks.
pub fn member_state(state: MemberState) -> DiskState {
    match state {
        MemberState::InSync => DiskState::InSync,
        MemberState::Faulty => DiskState::Faulty,
        MemberState::Rebuilding => DiskState::Rebuilding,
        MemberState::Missing => DiskState::Missing,
    }
}

/// Parity without a log: a power loss while degraded can damage old data.
pub fn is_write_hole_open(group: &GroupStatus) -> bool {
    match group.consistency {
        Consistency::None | Consistency::Bitmap => group.level.has_parity(),
        Consistency::Ppl | Consistency::Journal => false,
    }
}

/// Command lines that make file systems of the group's geometry.
pub fn mkfs_lines(group: &GroupStatus, node: &str) -> Vec<String> {
    if !group.level.is_striped() {
        return vec![
            format!("mkfs.ext4 -b 4096 {node}"),
            format!("mkfs.xfs {node}"),
        ];
    }
    let (stride, kib) = (group.chunk / 4096, group.chunk / 1024);
    let data = group.stripe_bytes / group.chunk.max(1);
    let width = stride * data;
    vec![
        format!("mkfs.ext4 -b 4096 -E stride={stride},stripe_width={width} {node}"),
        format!("mkfs.xfs -d su={kib}k,sw={data} {node}"),
    ]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use lunar_api::mgmt::Role;
    use lunar_api::target::{Level, LuCounters, ScrubState};
    use lunar_api::{History, LuUuid};

    /// A raid5 of three disks with one LU.
    pub(crate) fn group() -> GroupStatus {
        let uuid = GroupUuid::from_bytes([9; 16]);
        let member = |slot: u16| MemberStatus {
            slot,
            disk: DiskUuid::from_bytes([u8::try_from(slot).unwrap() + 1; 16]),
            path: format!("/dev/disk{slot}"),
            state: MemberState::InSync,
            data_offset: 8 << 20,
            reason: String::new(),
            reads: 0,
            writes: 0,
            read_bytes: 0,
            write_bytes: 0,
            read_errors: 0,
            write_errors: 0,
            repaired: 0,
            timeouts: 0,
            errors_lately: 0,
            bad_blocks: 0,
            bad_blocks_at: Vec::new(),
            cause: None,
            can_catch_up: false,
            latency_us: 0,
            slow: None,
        };
        GroupStatus {
            group: uuid,
            name: "data".into(),
            level: Level::Raid5,
            chunk: 65536,
            stripe_bytes: 131_072,
            can_lose: 1,
            consistency: Consistency::None,
            state: GroupState::Optimal,
            reason: String::new(),
            history: History::from_bytes([5; 16]),
            generation: 4,
            capacity: 2 << 30,
            free: 1 << 30,
            capacity_max: 2 << 30,
            member_bytes: 1 << 30,
            logical_block: 512,
            members: (0..3).map(member).collect(),
            lus: vec![LuStatus {
                lu: LuUuid::from_bytes([7; 16]),
                name: "vol".into(),
                group: uuid,
                capacity: 1 << 30,
                depth: 128,
                queues: 1,
                queues_served: 1,
                ublk: Some(0),
                problem: String::new(),
                counters: LuCounters::default(),
            }],
            replacement: None,
            sync: None,
            scrub: None,
            zeroing: Vec::new(),
            read_errors_max: 20,
            zero_copy: true,
            allocations: 0,
        }
    }

    /// A scrub of it, a quarter done.
    pub(crate) fn scrub(state: ScrubState) -> ScrubStatus {
        ScrubStatus {
            state,
            repair: false,
            from: 0,
            done: 1 << 28,
            total: 1 << 30,
            rate: 1 << 20,
            rate_max: None,
            bad: 0,
            repaired: 0,
            unreadable: 0,
            rewritten: 0,
            started: 1_700_000_000_000,
            ended: None,
            stripes: Vec::new(),
        }
    }

    /// A view with that group.
    pub(crate) fn view() -> View {
        let mut view = View {
            nodes: "/dev/lunar".into(),
            ..View::default()
        };
        let group = group();
        for (n, m) in (1..).zip(&group.members) {
            let (path, capacity) = (format!("/dev/disk/by-id/wwn-{n}"), 1 << 30);
            view.tables.put_disk(DiskSave {
                number: n,
                uuid: m.disk,
                path,
                role: Role::Data,
                capacity,
                was: None,
                sick: None,
                left: None,
            });
        }
        view.tables.number_group(group.group, &group.name);
        view.tables.number_lu(group.lus[0].lu, group.group, "vol");
        view.live.groups.insert(group.group, group);
        view
    }

    #[test]
    fn mkfs_lines_of_raid5() {
        let lines = mkfs_lines(&group(), "/dev/lunar/vol");
        assert_eq!(
            lines[0],
            "mkfs.ext4 -b 4096 -E stride=16,stripe_width=32 /dev/lunar/vol"
        );
        assert_eq!(lines[1], "mkfs.xfs -d su=64k,sw=2 /dev/lunar/vol");
    }

    #[test]
    fn mkfs_lines_say_a_stripe_that_is_no_power_of_two() {
        let group = GroupStatus {
            level: Level::Raid10,
            stripe_bytes: 5 * 65536,
            ..group()
        };
        let lines = mkfs_lines(&group, "/dev/lunar/vol");
        assert!(
            lines[0].contains("stride=16,stripe_width=80"),
            "{}",
            lines[0]
        );
        assert!(lines[1].contains("su=64k,sw=5"), "{}", lines[1]);
    }

    #[test]
    fn mkfs_lines_of_a_level_without_chunks_name_none() {
        for level in [Level::Raid1, Level::Linear] {
            let group = GroupStatus { level, ..group() };
            for line in mkfs_lines(&group, "/dev/lunar/vol") {
                assert!(!line.contains("su=") && !line.contains("stride"), "{line}");
            }
        }
    }
}
