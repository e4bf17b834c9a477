//! What no disk carries, in memory: numbers, paths, roles, jobs, events, witnesses. Pure.
//!
//! Invariant: every change leaves a [`Write`] behind, which the store makes durable before an answer is given.

use std::collections::{BTreeMap, VecDeque};

use lunar_api::mgmt::Role;
use lunar_api::rows::{JobKind, JobState};
use lunar_api::target::Witness;
use lunar_api::{DiskUuid, GroupUuid, LuUuid, SystemUuid};
use serde::{Deserialize, Serialize};

use crate::limits::{EVENTS_MAX, JOBS_MAX, WRITES_MAX};

/// Tables of the store, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Disks,
    Groups,
    Lus,
    Jobs,
    Events,
}

/// One row to make durable; without a value it goes away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    pub kind: Kind,
    pub key: u64,
    pub value: Option<String>,
}

/// A disk, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSave {
    pub number: u32,
    pub uuid: DiskUuid,
    pub path: String,
    pub role: Role,
    /// Bytes, when last seen.
    pub capacity: u64,
    /// It failed in this group, slot, and was replaced.
    #[serde(default)]
    pub was: Option<(GroupUuid, u16)>,
    /// Why this spare did not do; until it is added again it is faulty.
    #[serde(default)]
    pub sick: Option<String>,
    /// How it left its group; none: it did not, or nobody knows.
    #[serde(default)]
    pub left: Option<Left>,
}

/// How a member left its group: whether it may come back by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Left {
    /// Its device went away.
    Away,
    /// It failed while it was there, or by hand: it is back when somebody says so.
    Failed,
}

/// A group, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSave {
    pub number: u32,
    pub uuid: GroupUuid,
    /// The name when last seen; the superblocks say the true one.
    pub name_seen: String,
    #[serde(default)]
    pub witness: Option<Witness>,
    /// Boot id in which somebody stopped it by hand.
    #[serde(default)]
    pub stopped_in: Option<String>,
    #[serde(default)]
    pub rebuild_min: Option<u64>,
    #[serde(default)]
    pub rebuild_max: Option<u64>,
    #[serde(default)]
    pub read_errors_max: Option<u32>,
}

/// A LU, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LuSave {
    pub number: u32,
    pub uuid: LuUuid,
    pub group: GroupUuid,
    pub name_seen: String,
}

/// A job, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSave {
    pub number: u32,
    pub kind: JobKind,
    pub group: GroupUuid,
    pub disk: Option<DiskUuid>,
    /// Name of the LU that is zeroed.
    #[serde(default)]
    pub lu_name: Option<String>,
    pub state: JobState,
    pub done: u64,
    pub total: u64,
    pub started: u64,
    pub ended: Option<u64>,
    pub reason: String,
}

/// An event, as saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventSave {
    pub number: u64,
    pub time: u64,
    pub name: String,
    pub group: Option<GroupUuid>,
    pub disk: Option<DiskUuid>,
    pub lu: Option<LuUuid>,
    pub text: String,
}

/// All tables.
#[derive(Debug, Clone, Default)]
pub struct Tables {
    pub system: SystemUuid,
    pub disks: BTreeMap<u32, DiskSave>,
    pub groups: BTreeMap<u32, GroupSave>,
    pub lus: BTreeMap<u32, LuSave>,
    pub jobs: BTreeMap<u32, JobSave>,
    pub events: VecDeque<EventSave>,
    writes: Vec<Write>,
}

macro_rules! put_and_drop {
    ($put:ident, $drop:ident, $map:ident, $save:ident, $kind:ident) => {
        /// Puts a row in place.
        pub fn $put(&mut self, row: $save) {
            let old = self.$map.get(&row.number);
            if old != Some(&row) {
                self.note(Kind::$kind, row.number.into(), Some(&row));
                self.$map.insert(row.number, row);
            }
        }

        /// Takes a row away.
        pub fn $drop(&mut self, number: u32) {
            if self.$map.remove(&number).is_some() {
                self.note::<()>(Kind::$kind, number.into(), None);
            }
        }
    };
}

impl Tables {
    put_and_drop!(put_disk, drop_disk, disks, DiskSave, Disks);
    put_and_drop!(put_group, drop_group, groups, GroupSave, Groups);
    put_and_drop!(put_lu, drop_lu, lus, LuSave, Lus);
    put_and_drop!(put_job, drop_job, jobs, JobSave, Jobs);

    fn note<T: Serialize>(&mut self, kind: Kind, key: u64, value: Option<&T>) {
        let value = value.map(|v| serde_json::to_string(v).expect("saved rows are plain JSON"));
        self.writes.push(Write { kind, key, value });
    }

    /// Hands over what is not durable yet.
    pub fn take_writes(&mut self) -> Vec<Write> {
        std::mem::take(&mut self.writes)
    }

    /// Takes back what could not be made durable, before what came since.
    pub fn put_back(&mut self, mut writes: Vec<Write>) {
        writes.append(&mut self.writes);
        // The newest of a row is all that counts, and a store that stays broken must not fill the memory.
        let mut kept: Vec<Write> = Vec::new();
        for write in writes.into_iter().rev() {
            let same = |k: &Write| (k.kind, k.key) == (write.kind, write.key);
            if kept.len() < WRITES_MAX && !kept.iter().any(same) {
                kept.push(write);
            }
        }
        kept.reverse();
        self.writes = kept;
    }

    /// Returns the lowest number above every one in use: numbers in use never change.
    pub fn next_disk(&self) -> u32 {
        self.disks.keys().last().map_or(1, |n| n + 1)
    }

    /// As [`Self::next_disk`], of jobs.
    pub fn next_job(&self) -> u32 {
        self.jobs.keys().last().map_or(1, |n| n + 1)
    }

    /// Finds a disk by its identity.
    pub fn disk(&self, uuid: DiskUuid) -> Option<&DiskSave> {
        self.disks.values().find(|d| d.uuid == uuid)
    }

    /// Finds a group by its identity.
    pub fn group(&self, uuid: GroupUuid) -> Option<&GroupSave> {
        self.groups.values().find(|g| g.uuid == uuid)
    }

    /// Finds a LU by its identity.
    pub fn lu(&self, uuid: LuUuid) -> Option<&LuSave> {
        self.lus.values().find(|l| l.uuid == uuid)
    }

    /// Returns the number of a group, giving it the next one if it has none.
    pub fn number_group(&mut self, uuid: GroupUuid, name: &str) -> u32 {
        let next = self.groups.keys().last().map_or(1, |n| n + 1);
        let mut row = self.group(uuid).cloned().unwrap_or(GroupSave {
            number: next,
            uuid,
            name_seen: String::new(),
            witness: None,
            stopped_in: None,
            rebuild_min: None,
            rebuild_max: None,
            read_errors_max: None,
        });
        // Superblocks do not say it: the name comes when the group starts.
        if !name.is_empty() {
            row.name_seen = name.to_string();
        } else if row.name_seen.is_empty() {
            row.name_seen = format!("group-{:.8}", uuid.to_string());
        }
        let number = row.number;
        self.put_group(row);
        number
    }

    /// Returns the number of a LU, giving it the next one if it has none.
    pub fn number_lu(&mut self, uuid: LuUuid, group: GroupUuid, name: &str) -> u32 {
        let next = self.lus.keys().last().map_or(1, |n| n + 1);
        let number = self.lu(uuid).map_or(next, |l| l.number);
        let name_seen = name.to_string();
        self.put_lu(LuSave {
            number,
            uuid,
            group,
            name_seen,
        });
        number
    }

    /// Adds an event; the oldest goes when there are too many.
    pub fn push_event(&mut self, mut event: EventSave) -> u64 {
        event.number = self.events.back().map_or(1, |e| e.number + 1);
        let number = event.number;
        self.note(Kind::Events, number, Some(&event));
        self.events.push_back(event);
        while self.events.len() > EVENTS_MAX {
            let old = self.events.pop_front().expect("longer than the limit");
            self.note::<()>(Kind::Events, old.number, None);
        }
        number
    }

    /// Drops the oldest ended jobs beyond the limit.
    pub fn trim_jobs(&mut self) {
        let ended: Vec<u32> = self
            .jobs
            .values()
            .filter(|j| j.ended.is_some())
            .map(|j| j.number)
            .collect();
        for number in ended.iter().take(ended.len().saturating_sub(JOBS_MAX)) {
            self.drop_job(*number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn put_disk_twice_writes_once() {
        let mut tables = Tables::default();
        let row = DiskSave {
            number: tables.next_disk(),
            uuid: DiskUuid::from_bytes([1; 16]),
            path: "/dev/a".into(),
            role: Role::Data,
            capacity: 1,
            was: None,
            sick: None,
            left: None,
        };
        tables.put_disk(row.clone());
        tables.put_disk(row);
        assert_eq!(tables.take_writes().len(), 1);
        assert_eq!(tables.next_disk(), 2);
    }

    #[test]
    fn put_back_keeps_the_newest_of_each_row() {
        let mut tables = Tables::default();
        tables.number_group(GroupUuid::from_bytes([1; 16]), "a");
        let failed = tables.take_writes();
        tables.number_group(GroupUuid::from_bytes([1; 16]), "b");
        tables.number_group(GroupUuid::from_bytes([2; 16]), "c");
        tables.put_back(failed);
        let writes = tables.take_writes();
        let values: Vec<_> = writes.iter().filter_map(|w| w.value.clone()).collect();
        assert_eq!(values.len(), 2);
        assert!(values[0].contains("\"b\"") && values[1].contains("\"c\""));
    }

    #[test]
    fn number_group_keeps_the_number() {
        let mut tables = Tables::default();
        let id = GroupUuid::from_bytes([1; 16]);
        assert_eq!(tables.number_group(id, "a"), 1);
        assert_eq!(tables.number_group(id, "b"), 1);
        assert_eq!(tables.number_group(GroupUuid::from_bytes([2; 16]), "c"), 2);
        assert_eq!(tables.groups[&1].name_seen, "b");
        tables.number_group(id, "");
        assert_eq!(tables.groups[&1].name_seen, "b");
        let third = tables.number_group(GroupUuid::from_bytes([3; 16]), "");
        assert_eq!(tables.groups[&third].name_seen, "group-03030303");
    }
}
