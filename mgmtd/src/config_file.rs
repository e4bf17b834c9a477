//! The saved configuration: what no disk carries (numbers, roles, options), and a description of what there is, to compare
//! with after a loss. JSON, a line a field. Pure but for the archive.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use lunar_api::mgmt::Role;
use lunar_api::target::{Consistency, Level};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, LuUuid, SystemUuid};
use serde::{Deserialize, Serialize};

use crate::limits::{ARCHIVE_MAX, NUMBER_MAX};
use crate::names::check_name;
use crate::tables::{DiskSave, GroupSave, LuSave, Tables};
use crate::views::View;

/// Version of the file that this code reads and writes.
pub const FORMAT: &str = "lunar.config/1";
/// Directory in the state directory where the last ones lie.
pub const ARCHIVE: &str = "archive";

/// The file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    pub format: String,
    pub system: SystemUuid,
    pub disks: Vec<DiskEntry>,
    pub groups: Vec<GroupEntry>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskEntry {
    pub disk: u32,
    pub uuid: DiskUuid,
    pub path: String,
    pub capacity: u64,
    pub role: Role,
}

/// A group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupEntry {
    pub group: u32,
    pub uuid: GroupUuid,
    pub name: String,
    /// None: it was not started since its description was lost.
    pub level: Option<Level>,
    pub chunk: u64,
    pub consistency: Option<Consistency>,
    /// Disk of each slot.
    pub members: Vec<DiskUuid>,
    pub rebuild_min: Option<u64>,
    pub rebuild_max: Option<u64>,
    pub lus: Vec<LuEntry>,
}

/// A LU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LuEntry {
    pub lu: u32,
    pub uuid: LuUuid,
    pub name: String,
    pub capacity: u64,
    pub depth: u16,
    /// Files of before there were several have none.
    #[serde(default = "one_queue")]
    pub queues: u16,
}

fn one_queue() -> u16 {
    1
}

/// Only the version: a newer one may have any other field.
#[derive(Deserialize)]
struct Version {
    format: String,
}

impl ConfigFile {
    /// Writes it.
    pub fn text(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }

    /// Describes what there is. Of groups that are not up the description is that of `before`.
    pub fn of(view: &View, before: Option<&Self>) -> Self {
        let disks = view.tables.disks.values().map(|d| DiskEntry {
            disk: d.number,
            uuid: d.uuid,
            path: d.path.clone(),
            capacity: d.capacity,
            role: d.role,
        });
        let groups = view.tables.groups.values().map(|save| {
            let old = before.and_then(|b| b.groups.iter().find(|g| g.uuid == save.uuid));
            group_entry(view, save, old)
        });
        Self {
            format: FORMAT.into(),
            system: view.tables.system,
            disks: disks.collect(),
            groups: groups.collect(),
        }
    }

    /// Reads and checks all of it.
    ///
    /// # Errors  `Usage`, with the line where there is one
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let refuse = |why: String| {
            ApiError::new(ErrorKind::Usage, "the configuration cannot be loaded")
                .because(why)
                .hint("lunar config save FILE, which makes one")
        };
        let at = |error: serde_json::Error| {
            let what = error.to_string();
            let place = format!(" at line {} column {}", error.line(), error.column());
            let what = what.strip_suffix(&place).unwrap_or(&what);
            refuse(format!(
                "line {}, column {}: {what}",
                error.line(),
                error.column()
            ))
        };
        let Version { format } = serde_json::from_str(text).map_err(at)?;
        if format != FORMAT {
            let line = line_of(text, "\"format\"");
            return Err(refuse(format!(
                "line {line}: its format is {format}, this version reads {FORMAT}"
            )));
        }
        let file: Self = serde_json::from_str(text).map_err(at)?;
        file.check(text).map_err(refuse)?;
        Ok(file)
    }

    fn check(&self, text: &str) -> Result<(), String> {
        let at = |what: &dyn std::fmt::Display| line_of(text, &what.to_string());
        let mut seen = BTreeSet::new();
        let lus = self.groups.iter().flat_map(|g| &g.lus).map(|l| l.lu);
        let numbers = self.disks.iter().map(|d| d.disk).chain(lus);
        let mut numbers = numbers.chain(self.groups.iter().map(|g| g.group));
        if let Some(large) = numbers.find(|number| *number > NUMBER_MAX) {
            let line = at(&large);
            return Err(format!(
                "line {line}: the number {large} is beyond {NUMBER_MAX}"
            ));
        }
        for disk in &self.disks {
            if disk.disk == 0 || !seen.insert(("disk", disk.disk)) {
                return Err(format!(
                    "line {}: the number of disk {} is 0 or there twice",
                    at(&disk.uuid),
                    disk.disk
                ));
            }
        }
        let mut uuids = BTreeSet::new();
        let known: BTreeSet<DiskUuid> = self.disks.iter().map(|d| d.uuid).collect();
        if known.len() != self.disks.len() || known.contains(&DiskUuid::NIL) {
            return Err("a disk is there twice, or has no uuid".into());
        }
        let mut names = BTreeSet::new();
        for group in &self.groups {
            let line = at(&group.uuid);
            if group.group == 0 || !seen.insert(("group", group.group)) {
                return Err(format!(
                    "line {line}: the number of group {} is 0 or there twice",
                    group.name
                ));
            }
            if !uuids.insert(group.uuid.to_bytes()) || !names.insert(&group.name) {
                return Err(format!("line {line}: group {} is there twice", group.name));
            }
            check_name(&group.name).map_err(|error| format!("line {line}: {}", error.message))?;
            if !are_rates(group.rebuild_min, group.rebuild_max) {
                return Err(format!(
                    "line {line}: rebuild_max of group {} is 0 or below its rebuild_min",
                    group.name
                ));
            }
            if let Some(lost) = group
                .members
                .iter()
                .find(|d| !d.is_nil() && !known.contains(*d))
            {
                return Err(format!(
                    "line {}: disk {lost} of group {} is not among the disks",
                    at(lost),
                    group.name
                ));
            }
            for lu in &group.lus {
                let line = at(&lu.uuid);
                if lu.lu == 0 || !seen.insert(("lu", lu.lu)) || !uuids.insert(lu.uuid.to_bytes()) {
                    return Err(format!(
                        "line {line}: LU {} is there twice, or its number is 0",
                        lu.name
                    ));
                }
                check_name(&lu.name).map_err(|error| format!("line {line}: {}", error.message))?;
            }
        }
        Ok(())
    }
}

/// The first line that has a text; 0 if none has.
fn line_of(text: &str, what: &str) -> usize {
    let found = text.lines().position(|line| line.contains(what));
    found.map_or(0, |at| at + 1)
}

fn group_entry(view: &View, save: &GroupSave, old: Option<&GroupEntry>) -> GroupEntry {
    let live = view.live.groups.get(&save.uuid);
    let row = view.group_row(save);
    let members = match (live, old) {
        (Some(live), _) => live.members.iter().map(|m| m.disk).collect(),
        (None, Some(old)) => old.members.clone(),
        (None, None) => Vec::new(),
    };
    let lus = view
        .tables
        .lus
        .values()
        .filter(|lu| lu.group == save.uuid)
        .map(|lu| {
            let live = view.lu_live(lu);
            let old = old.and_then(|old| old.lus.iter().find(|o| o.uuid == lu.uuid));
            LuEntry {
                lu: lu.number,
                uuid: lu.uuid,
                name: lu.name_seen.clone(),
                capacity: live.map_or(old.map_or(0, |o| o.capacity), |l| l.capacity),
                depth: live.map_or(old.map_or(0, |o| o.depth), |l| l.depth),
                queues: live.map_or(old.map_or(1, |o| o.queues), |l| l.queues),
            }
        });
    GroupEntry {
        group: save.number,
        uuid: save.uuid,
        name: row.name,
        level: live.map_or(old.and_then(|o| o.level), |g| Some(g.level)),
        chunk: live.map_or(old.map_or(0, |o| o.chunk), |g| g.chunk),
        consistency: live.map_or(old.and_then(|o| o.consistency), |g| Some(g.consistency)),
        // A slot whose disk is out of the tables names nobody.
        members: (members.into_iter())
            .map(|disk| {
                if view.tables.disk(disk).is_some() {
                    disk
                } else {
                    DiskUuid::NIL
                }
            })
            .collect(),
        rebuild_min: save.rebuild_min,
        rebuild_max: save.rebuild_max,
        lus: lus.collect(),
    }
}

/// What a load does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Load {
    /// Rows as they will be.
    pub disks: Vec<DiskSave>,
    pub groups: Vec<GroupSave>,
    pub lus: Vec<LuSave>,
    /// What changes, a line each.
    pub steps: Vec<String>,
    /// What differs and is not for a load to change.
    pub differs: Vec<String>,
}

/// Decides which rows get which numbers, roles and options; compares the rest.
pub fn compare(view: &View, file: &ConfigFile) -> Load {
    let mut out = Load::default();
    if file.system != view.tables.system {
        out.differs.push(format!(
            "the file is of system {}, this is {}",
            file.system, view.tables.system
        ));
    }
    disks(view, file, &mut out);
    groups(view, file, &mut out);
    lus(view, file, &mut out);
    out
}

/// Numbers as wanted; who has one that is wanted by another, and no wish of its own, gets the next that is free.
fn renumber<T: Copy + Ord>(here: &[(u32, T)], wanted: &[(u32, T)]) -> Vec<(u32, T)> {
    let wish = |id: T| {
        wanted
            .iter()
            .find(|(_, other)| *other == id)
            .map(|(n, _)| *n)
    };
    let is_here = |id: T| here.iter().any(|(_, other)| *other == id);
    let mut taken: BTreeSet<u32> = wanted
        .iter()
        .filter(|(_, id)| is_here(*id))
        .map(|(n, _)| *n)
        .collect();
    let mut out = Vec::new();
    for (number, id) in here {
        let number = match wish(*id) {
            Some(wish) => wish,
            None if taken.insert(*number) => *number,
            None => {
                let highest = here
                    .iter()
                    .chain(wanted)
                    .map(|(n, _)| *n)
                    .max()
                    .unwrap_or(0);
                let next = (highest + 1..)
                    .find(|n| !taken.contains(n))
                    .unwrap_or(u32::MAX);
                taken.insert(next);
                next
            }
        };
        out.push((number, *id));
    }
    out
}

fn disks(view: &View, file: &ConfigFile, out: &mut Load) {
    let here: Vec<_> = view
        .tables
        .disks
        .values()
        .map(|d| (d.number, d.uuid))
        .collect();
    let wanted: Vec<_> = file.disks.iter().map(|d| (d.disk, d.uuid)).collect();
    for (number, uuid) in renumber(&here, &wanted) {
        let Some(old) = view.tables.disk(uuid) else {
            continue;
        };
        let entry = file.disks.iter().find(|d| d.uuid == uuid);
        let role = entry.map_or(old.role, |entry| entry.role);
        if number != old.number {
            out.steps.push(format!(
                "disk {} ({}) gets number {number}",
                old.number, old.path
            ));
        }
        if role != old.role {
            out.steps
                .push(format!("disk {number} ({}) gets role {role:?}", old.path).to_lowercase());
        }
        match entry {
            None => out
                .differs
                .push(format!("disk {number} ({}) is not in the file", old.path)),
            Some(entry) if entry.capacity != old.capacity => out.differs.push(format!(
                "disk {number} ({}) has {} bytes, in the file {}",
                old.path, old.capacity, entry.capacity
            )),
            Some(_) => {}
        }
        out.disks.push(DiskSave {
            number,
            role,
            ..old.clone()
        });
    }
    for entry in file
        .disks
        .iter()
        .filter(|d| view.tables.disk(d.uuid).is_none())
    {
        out.differs.push(format!(
            "disk {} of the file ({}, {}) is not here",
            entry.disk, entry.path, entry.uuid
        ));
    }
}

/// Says whether a group can have these bounds of its rebuilds, in bytes a second of a member.
pub fn are_rates(min: Option<u64>, max: Option<u64>) -> bool {
    max != Some(0) && min.zip(max).is_none_or(|(min, max)| min <= max)
}

fn groups(view: &View, file: &ConfigFile, out: &mut Load) {
    let here: Vec<_> = view
        .tables
        .groups
        .values()
        .map(|g| (g.number, g.uuid))
        .collect();
    let wanted: Vec<_> = file.groups.iter().map(|g| (g.group, g.uuid)).collect();
    for (number, uuid) in renumber(&here, &wanted) {
        let Some(old) = view.tables.group(uuid) else {
            continue;
        };
        let mut row = GroupSave {
            number,
            ..old.clone()
        };
        let name = &old.name_seen;
        if number != old.number {
            out.steps.push(format!("group {name} gets number {number}"));
        }
        if let Some(entry) = file.groups.iter().find(|g| g.uuid == uuid) {
            (row.rebuild_min, row.rebuild_max) = (entry.rebuild_min, entry.rebuild_max);
            if (row.rebuild_min, row.rebuild_max) != (old.rebuild_min, old.rebuild_max) {
                out.steps
                    .push(format!("group {name} gets its rebuild rates"));
                let is_given_back =
                    |old: Option<u64>, new: Option<u64>| old.is_some() && new.is_none();
                if is_given_back(old.rebuild_min, row.rebuild_min)
                    || is_given_back(old.rebuild_max, row.rebuild_max)
                {
                    out.differs.push(format!(
                        "group {name} keeps a rebuild rate that the file does not set until it is started again"
                    ));
                }
            }
            if *name != entry.name {
                out.differs
                    .push(format!("group {} of the file is called {name}", entry.name));
            }
            let now = view.live.groups.get(&uuid);
            let members: Option<Vec<_>> = now.map(|g| g.members.iter().map(|m| m.disk).collect());
            if members.is_some_and(|members| members != entry.members) {
                out.differs
                    .push(format!("group {name} has other members than in the file"));
            }
        } else {
            out.differs.push(format!("group {name} is not in the file"));
        }
        out.groups.push(row);
    }
    for entry in file
        .groups
        .iter()
        .filter(|g| view.tables.group(g.uuid).is_none())
    {
        out.differs
            .push(format!("group {} of the file is not here", entry.name));
    }
}

fn lus(view: &View, file: &ConfigFile, out: &mut Load) {
    let entries: Vec<&LuEntry> = file.groups.iter().flat_map(|g| &g.lus).collect();
    let here: Vec<_> = view
        .tables
        .lus
        .values()
        .map(|l| (l.number, l.uuid))
        .collect();
    let wanted: Vec<_> = entries.iter().map(|l| (l.lu, l.uuid)).collect();
    for (number, uuid) in renumber(&here, &wanted) {
        let Some(old) = view.tables.lu(uuid) else {
            continue;
        };
        let name = &old.name_seen;
        if number != old.number {
            out.steps.push(format!("LU {name} gets number {number}"));
        }
        match entries.iter().find(|l| l.uuid == uuid) {
            None => out.differs.push(format!("LU {name} is not in the file")),
            Some(entry) => {
                if *name != entry.name {
                    out.differs
                        .push(format!("LU {} of the file is called {name}", entry.name));
                }
                let now = view.lu_live(old).map(|l| l.capacity);
                if let Some(now) = now.filter(|now| *now != entry.capacity && entry.capacity != 0) {
                    out.differs.push(format!(
                        "LU {name} has {now} bytes, in the file {}",
                        entry.capacity
                    ));
                }
                let queues = view.lu_live(old).map(|l| l.queues);
                if let Some(now) = queues.filter(|now| *now != entry.queues) {
                    out.differs.push(format!(
                        "LU {name} has {now} queues, in the file {}",
                        entry.queues
                    ));
                }
            }
        }
        out.lus.push(LuSave {
            number,
            ..old.clone()
        });
    }
    for entry in entries.iter().filter(|l| view.tables.lu(l.uuid).is_none()) {
        out.differs
            .push(format!("LU {} of the file is not here", entry.name));
    }
}

impl Load {
    /// Puts the rows in place.
    pub fn apply(&self, tables: &mut Tables) {
        // All away first: numbers change hands.
        let numbers: Vec<u32> = tables.disks.keys().copied().collect();
        numbers.into_iter().for_each(|n| tables.drop_disk(n));
        self.disks
            .iter()
            .cloned()
            .for_each(|row| tables.put_disk(row));
        let numbers: Vec<u32> = tables.groups.keys().copied().collect();
        numbers.into_iter().for_each(|n| tables.drop_group(n));
        self.groups
            .iter()
            .cloned()
            .for_each(|row| tables.put_group(row));
        let numbers: Vec<u32> = tables.lus.keys().copied().collect();
        numbers.into_iter().for_each(|n| tables.drop_lu(n));
        self.lus.iter().cloned().for_each(|row| tables.put_lu(row));
    }
}

/// Gives tables that were lost the rows of the newest of the archive, if that is of the same system: the disks are then
/// looked for, and have their numbers.
pub fn refill(tables: &mut Tables, file: &ConfigFile) -> bool {
    if file.system != tables.system || !tables.disks.is_empty() || !tables.groups.is_empty() {
        return false;
    }
    for d in &file.disks {
        tables.put_disk(DiskSave {
            number: d.disk,
            uuid: d.uuid,
            path: d.path.clone(),
            role: d.role,
            capacity: d.capacity,
            was: None,
            sick: None,
        });
    }
    for g in &file.groups {
        tables.put_group(GroupSave {
            number: g.group,
            uuid: g.uuid,
            name_seen: g.name.clone(),
            witness: None,
            stopped_in: None,
            rebuild_min: g.rebuild_min,
            rebuild_max: g.rebuild_max,
        });
        for lu in &g.lus {
            tables.put_lu(LuSave {
                number: lu.lu,
                uuid: lu.uuid,
                group: g.uuid,
                name_seen: lu.name.clone(),
            });
        }
    }
    !file.disks.is_empty()
}

fn archive_number(path: &Path) -> Option<u64> {
    path.file_name()?
        .to_str()?
        .strip_suffix(".json")?
        .parse()
        .ok()
}

/// Numbers and paths of the archive, oldest first.
fn archived(state_dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = std::fs::read_dir(state_dir.join(ARCHIVE))
        .into_iter()
        .flatten()
        .flatten();
    let numbered = |path: PathBuf| Some((archive_number(&path)?, path));
    let mut all: Vec<_> = entries.filter_map(|entry| numbered(entry.path())).collect();
    all.sort();
    all
}

/// The newest of the archive that can be read.
pub fn newest(state_dir: &Path) -> Option<(PathBuf, ConfigFile)> {
    archived(state_dir).into_iter().rev().find_map(|(_, path)| {
        let text = std::fs::read_to_string(&path).ok()?;
        Some((path, ConfigFile::parse(&text).ok()?))
    })
}

/// Keeps one more in the archive, and the last of them only. Blocks.
///
/// # Crash  a new file beside, durable, then renamed: the archive has it whole or not at all
/// # Errors  the disk of the state directory failed
pub fn archive(state_dir: &Path, file: &ConfigFile) -> std::io::Result<()> {
    let dir = state_dir.join(ARCHIVE);
    std::fs::create_dir_all(&dir)?;
    let all = archived(state_dir);
    let number = all.last().map_or(1, |(number, _)| number + 1);
    let new = dir.join("new");
    let mut to = std::fs::File::create(&new)?;
    to.write_all(file.text().as_bytes())?;
    to.sync_all()?;
    std::fs::rename(&new, dir.join(format!("{number:08}.json")))?;
    for (_, old) in all.iter().take((all.len() + 1).saturating_sub(ARCHIVE_MAX)) {
        std::fs::remove_file(old)?;
    }
    std::fs::File::open(&dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view;

    fn saved() -> ConfigFile {
        ConfigFile::of(&view(), None)
    }

    fn complaint(text: &str) -> String {
        let error = ConfigFile::parse(text).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Usage);
        error.causes.join("; ")
    }

    #[test]
    fn parse_reads_what_is_written_and_names_the_line_of_what_is_not() {
        let text = saved().text();
        assert_eq!(ConfigFile::parse(&text).unwrap(), saved());
        // Without queues, as files of before have it.
        let queues = text.lines().find(|l| l.contains("queues")).unwrap();
        let old = text.replace(&format!(",\n{queues}"), "");
        assert_eq!(ConfigFile::parse(&old).unwrap(), saved());
        let line = |what: &str| text.lines().position(|l| l.contains(what)).unwrap() + 1;
        for (from, to, says) in [
            ("\"role\"", "\"roel\"", format!("line {}", line("\"role\""))),
            ("\"disk\": 2", "\"disk\": 1", "there twice".into()),
            ("\"disk\": 1", "\"disk\": 0", "is 0".into()),
            (
                "\"disk\": 2",
                "\"disk\": 4294967295",
                format!("line {}: the number", line("\"disk\": 2")),
            ),
            (
                "lunar.config/1",
                "lunar.config/2",
                format!("line {}: its format", line("format")),
            ),
            (
                "\"name\": \"vol\"",
                "\"name\": \"a b\"",
                "`a b` cannot be a name".into(),
            ),
            (
                "\"chunk\": 65536",
                "\"chunk\": -1",
                format!("line {}", line("chunk")),
            ),
            (
                "\"rebuild_max\": null",
                "\"rebuild_max\": 0",
                "rebuild_max of group".into(),
            ),
        ] {
            assert!(text.contains(from), "{from}");
            let why = complaint(&text.replacen(from, to, 1));
            assert!(why.contains(&says), "{from}: {why}");
        }
        assert!(complaint("").contains("line 1"));
        assert!(complaint(&text[..text.len() / 2]).contains("line "));
        let mut lost = saved();
        lost.disks.remove(0);
        assert!(complaint(&lost.text()).contains("is not among the disks"));
    }

    #[test]
    fn compare_gives_numbers_back_and_tells_what_differs() {
        let file = saved();
        let same = compare(&view(), &file);
        assert!(same.steps.is_empty() && same.differs.is_empty(), "{same:?}");
        // Numbers turned round, a role gone, and a disk that the file does not know.
        let mut now = view();
        let rows: Vec<DiskSave> = now.tables.disks.values().cloned().collect();
        let count = u32::try_from(rows.len()).unwrap();
        for (number, row) in (1..).zip(rows.iter().rev()) {
            now.tables.put_disk(DiskSave {
                number,
                role: Role::Spare,
                ..row.clone()
            });
        }
        let mut file = file;
        let unknown = file.disks.remove(0);
        let load = compare(&now, &file);
        let at = |uuid| load.disks.iter().find(|d| d.uuid == uuid).unwrap();
        for entry in &file.disks {
            assert_eq!(
                (at(entry.uuid).number, at(entry.uuid).role),
                (entry.disk, entry.role)
            );
        }
        let numbers: BTreeSet<u32> = load.disks.iter().map(|d| d.number).collect();
        assert_eq!(numbers.len(), rows.len(), "each has its own: {load:?}");
        assert!(!(2..=count).contains(&at(unknown.uuid).number));
        assert!(
            load.differs
                .iter()
                .any(|d| d.contains("is not in the file")),
            "{load:?}"
        );
        load.apply(&mut now.tables);
        let again = compare(&now, &file);
        assert!(again.steps.is_empty(), "{again:?}");
        // What is in the file only.
        let mut more = saved();
        more.groups[0].lus[0].queues = 3;
        let load = compare(&view(), &more);
        assert!(
            load.differs
                .iter()
                .any(|d| d.contains("1 queues, in the file 3")),
            "{load:?}"
        );
        more.groups[0].lus[0].uuid = LuUuid::from_bytes([0x55; 16]);
        let load = compare(&view(), &more);
        assert!(
            load.differs.iter().any(|d| d.contains("is not here")),
            "{load:?}"
        );
    }

    #[test]
    fn the_description_of_a_group_that_is_not_up_is_kept() {
        let file = saved();
        let mut down = view();
        down.live.groups.clear();
        let kept = ConfigFile::of(&down, Some(&file));
        assert_eq!(kept, file);
        assert_eq!(ConfigFile::of(&down, None).groups[0].level, None);
    }

    #[test]
    fn refill_is_for_lost_tables_of_the_same_system() {
        let file = saved();
        let lost = |system| {
            let mut tables = Tables::default();
            tables.system = system;
            tables
        };
        let mut tables = lost(file.system);
        assert!(refill(&mut tables, &file));
        assert_eq!(tables.disks.len(), view().tables.disks.len());
        assert!(!tables.take_writes().is_empty(), "they become durable");
        assert!(!refill(&mut tables, &file), "they are not lost any more");
        assert!(!refill(
            &mut lost(SystemUuid::from_bytes([0x66; 16])),
            &file
        ));
    }

    #[test]
    fn the_archive_keeps_the_last_ones_and_the_newest_that_is_whole_counts() {
        let dir = std::env::temp_dir().join(format!("lunar-archive-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let mut file = saved();
        for n in 1..=ARCHIVE_MAX + 3 {
            file.disks[0].capacity = n as u64;
            archive(&dir, &file).unwrap();
        }
        let all = archived(&dir);
        assert_eq!(all.len(), ARCHIVE_MAX);
        let (path, found) = newest(&dir).unwrap();
        assert_eq!(found, file);
        std::fs::write(path, "{").unwrap();
        let (_, found) = newest(&dir).unwrap();
        assert_eq!(found.disks[0].capacity, (ARCHIVE_MAX + 2) as u64);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
