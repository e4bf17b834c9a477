//! The saved configuration: what no disk carries (numbers, roles, options), and a description of what there is, to compare
//! with after a loss. JSON, a line a field.

mod archive;
mod load;

use std::collections::BTreeSet;

use lunar_api::mgmt::Role;
use lunar_api::target::{Consistency, Level};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, LuUuid, SystemUuid};
use serde::{Deserialize, Serialize};

use crate::limits::NUMBER_MAX;
use crate::names::check_name;
use crate::tables::GroupSave;
use crate::views::View;

pub use archive::{archive, newest};
pub use load::{Load, are_rates, compare, refill};

/// Version of the file that this code reads and writes.
pub const FORMAT: &str = "lunar.config/1";
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_errors_max: Option<u32>,
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
        read_errors_max: save.read_errors_max,
        lus: lus.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables::{DiskSave, Tables};
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
}
