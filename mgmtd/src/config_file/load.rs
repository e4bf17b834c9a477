//! A saved configuration beside what there is: what a load changes, and what it only tells. Pure.

use std::collections::BTreeSet;

use super::{ConfigFile, LuEntry};
use crate::tables::{DiskSave, GroupSave, LuSave, Tables};
use crate::views::View;

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
            row.read_errors_max = entry.read_errors_max;
            if row.read_errors_max != old.read_errors_max {
                let most = row
                    .read_errors_max
                    .map_or("the default".into(), |n| n.to_string());
                out.steps
                    .push(format!("group {name} gets {most} as the most read errors"));
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
            left: None,
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
            read_errors_max: g.read_errors_max,
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
