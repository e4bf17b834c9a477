//! What was seen on all disks, sorted: ours, those of others, copies, what cannot be believed. Pure.
//!
//! Invariant: a disk whose identity is at two places is at neither, unless a running group holds one of them: nothing
//! tells the copy from the disk, and the wrong one would be written.

use std::collections::{BTreeMap, BTreeSet};

use lunar_api::rows::{Stranger, StrangerKind};
use lunar_api::target::{Label, Probe};
use lunar_api::{DiskUuid, GroupUuid, SystemUuid};

use crate::daemon::Problem;
use crate::text::level_word;

/// What was seen, sorted.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sightings {
    /// Disks of this system, each at its one place.
    pub ours: BTreeMap<DiskUuid, Probe>,
    /// Disks of other systems, and whatever else is left alone, by path.
    pub strangers: Vec<Stranger>,
    /// Disks of other systems.
    pub foreign: Vec<Probe>,
    /// Disks whose identity is there more than once, if nothing says which is the disk.
    pub copies: BTreeMap<DiskUuid, Vec<Probe>>,
    /// Groups that must not start by themselves, and why.
    pub barred: BTreeMap<GroupUuid, Problem>,
}

/// Sorts probes, each of another disk. `held`: where running groups have their disks; `known`: paths with a row, whose
/// problems are told elsewhere.
pub fn sort(
    system: SystemUuid,
    held: &BTreeMap<DiskUuid, String>,
    known: &BTreeSet<String>,
    probes: Vec<Probe>,
) -> Sightings {
    let mut out = Sightings::default();
    let mut by_disk: BTreeMap<DiskUuid, Vec<Probe>> = BTreeMap::new();
    for probe in probes {
        match (&probe.label, &probe.problem) {
            (Some(label), _) if label.system == system => {
                by_disk.entry(label.disk).or_default().push(probe);
            }
            (Some(label), _) => {
                out.strangers.push(other_system(&probe, label));
                out.foreign.push(probe);
            }
            (None, Some(problem)) if is_invalid(problem) && !known.contains(&probe.path) => {
                out.strangers.push(Stranger {
                    path: probe.path.clone(),
                    kind: StrangerKind::NotValid,
                    system: None,
                    group_name: String::new(),
                    text: problem.clone(),
                });
            }
            (None, _) => {}
        }
    }
    for (disk, mut all) in by_disk {
        if all.len() == 1 {
            out.ours.extend(all.pop().map(|probe| (disk, probe)));
            continue;
        }
        all.sort_by(|a, b| a.path.cmp(&b.path));
        let paths: Vec<String> = all.iter().map(|probe| probe.path.clone()).collect();
        let chosen = held.get(&disk);
        for probe in &all {
            if chosen == Some(&probe.path) {
                out.ours.insert(disk, probe.clone());
            } else {
                out.strangers.push(copy(probe, &paths, chosen));
            }
        }
        if chosen.is_none() {
            out.copies.insert(disk, all);
        }
    }
    out.strangers.sort_by(|a, b| a.path.cmp(&b.path));
    bar(&mut out);
    out
}

/// A superblock is there, but cannot be believed.
pub fn is_invalid(problem: &str) -> bool {
    problem.contains("superblock not valid")
}

/// What a label says of its disk's part, for people.
pub fn part(label: &Label) -> String {
    let name = match label.group_name.as_str() {
        "" => label.group.to_string(),
        name => name.to_string(),
    };
    match (label.group.is_nil(), label.deleted, label.slot) {
        (true, _, _) => "a free disk".into(),
        (_, true, _) => format!("of group {name}, which was deleted"),
        (_, _, Some(slot)) => {
            let level = label.level.map_or("level unknown", level_word);
            format!(
                "slot {slot} of group {name} ({level}, {} disks)",
                label.slots
            )
        }
        (_, _, None) => format!("of group {name}"),
    }
}

fn other_system(probe: &Probe, label: &Label) -> Stranger {
    Stranger {
        path: probe.path.clone(),
        kind: StrangerKind::OtherSystem,
        system: Some(label.system),
        group_name: label.group_name.clone(),
        text: format!("belongs to Lunar system {}: {}", label.system, part(label)),
    }
}

fn copy(probe: &Probe, paths: &[String], chosen: Option<&String>) -> Stranger {
    let others: Vec<&str> = paths
        .iter()
        .filter(|path| **path != probe.path)
        .map(String::as_str)
        .collect();
    let text = match chosen {
        Some(held) => format!("is a copy of {held}, which its group works with"),
        None => format!(
            "is the same disk as {}: one is a copy of the other, and neither is used",
            others.join(", ")
        ),
    };
    let label = probe.label.as_ref();
    Stranger {
        path: probe.path.clone(),
        kind: StrangerKind::Copy,
        system: label.map(|label| label.system),
        group_name: label.map_or(String::new(), |label| label.group_name.clone()),
        text,
    }
}

/// Finds the groups that would start with less than they have: a disk that is there twice, or on its way to another
/// system, would be left behind as stale.
fn bar(out: &mut Sightings) {
    let ours: BTreeMap<GroupUuid, String> = out
        .ours
        .values()
        .filter_map(|probe| probe.label.as_ref())
        .filter(|label| !label.group.is_nil())
        .map(|label| (label.group, label.group_name.clone()))
        .collect();
    for probe in &out.foreign {
        let Some(label) = &probe.label else { continue };
        // A copy of a disk that is here is no part of it.
        if !ours.contains_key(&label.group) || out.ours.contains_key(&label.disk) {
            continue;
        }
        let why = format!(
            "a take-over of it has begun: {} {}",
            probe.path,
            other_system(probe, label).text
        );
        let action = "lunar import --take PATH.., all its disks, ends it on this system".into();
        out.barred.insert(label.group, Problem { why, action });
    }
    let mut copied: BTreeMap<GroupUuid, (String, BTreeSet<String>)> = BTreeMap::new();
    for all in out.copies.values() {
        let mut paths: Vec<&str> = all.iter().map(|probe| probe.path.as_str()).collect();
        paths.sort_unstable();
        let labels = all.iter().filter_map(|probe| probe.label.as_ref());
        for label in labels.filter(|label| !label.group.is_nil() && !label.deleted) {
            let name = match label.group_name.as_str() {
                "" => label.group.to_string(),
                name => name.to_string(),
            };
            let (_, disks) = copied
                .entry(label.group)
                .or_insert_with(|| (name, BTreeSet::new()));
            disks.insert(paths.join(" and "));
        }
    }
    for (group, (name, disks)) in copied {
        let disks = Vec::from_iter(disks).join(", ");
        let why =
            format!("{disks} are one disk each: one is a copy of the other, and neither is used");
        let action = format!(
            "take the copy away, then: lunar group start {name}; or, if the copy may die: lunar disk add --as-new COPY"
        );
        out.barred.insert(group, Problem { why, action });
    }
}

#[cfg(test)]
mod tests {
    use lunar_api::History;
    use lunar_api::target::Level;

    use super::*;

    const OWN: SystemUuid = SystemUuid::from_bytes([1; 16]);
    const OTHER: SystemUuid = SystemUuid::from_bytes([2; 16]);

    fn disk(n: u8) -> DiskUuid {
        DiskUuid::from_bytes([n; 16])
    }

    fn group(n: u8) -> GroupUuid {
        GroupUuid::from_bytes([n; 16])
    }

    /// A member of a raid5 of three.
    fn probe(path: &str, system: SystemUuid, n: u8, of: u8) -> Probe {
        let label = Label {
            system,
            disk: disk(n),
            group: group(of),
            group_name: if of == 0 {
                String::new()
            } else {
                format!("g{of}")
            },
            level: (of != 0).then_some(Level::Raid5),
            slots: 3,
            slot: (of != 0).then_some(u16::from(n)),
            history: History::NIL,
            generation: 5,
            members: Vec::new(),
            replacement: None,
            deleted: false,
            damaged: None,
        };
        Probe {
            path: path.into(),
            capacity: 1 << 30,
            data_bytes: 1 << 29,
            logical_block: 512,
            label: Some(label),
            problem: None,
        }
    }

    fn invalid(path: &str, problem: &str) -> Probe {
        Probe {
            label: None,
            problem: Some(problem.into()),
            ..probe(path, OWN, 1, 0)
        }
    }

    fn sorted(probes: &[Probe]) -> Sightings {
        sort(OWN, &BTreeMap::new(), &BTreeSet::new(), probes.to_vec())
    }

    fn told(seen: &Sightings) -> Vec<(&str, StrangerKind)> {
        seen.strangers
            .iter()
            .map(|s| (s.path.as_str(), s.kind))
            .collect()
    }

    #[test]
    fn a_disk_of_another_system_is_named_and_no_part_of_anything() {
        let seen = sorted(&[probe("/dev/a", OWN, 1, 1), probe("/dev/b", OTHER, 2, 7)]);
        assert_eq!(seen.ours.keys().collect::<Vec<_>>(), [&disk(1)]);
        assert_eq!(told(&seen), [("/dev/b", StrangerKind::OtherSystem)]);
        let text = &seen.strangers[0].text;
        assert!(text.contains(&OTHER.to_string()), "{text}");
        assert!(
            text.contains("slot 2 of group g7 (raid5, 3 disks)"),
            "{text}"
        );
        assert!(seen.barred.is_empty());
    }

    #[test]
    fn a_disk_that_is_there_twice_is_used_nowhere_and_bars_its_group() {
        let twice = [
            probe("/dev/c", OWN, 2, 1),
            probe("/dev/a", OWN, 1, 1),
            probe("/dev/b", OWN, 2, 1),
        ];
        let seen = sorted(&twice);
        assert_eq!(seen.ours.keys().collect::<Vec<_>>(), [&disk(1)]);
        let copy = StrangerKind::Copy;
        assert_eq!(told(&seen), [("/dev/b", copy), ("/dev/c", copy)]);
        assert!(seen.strangers[0].text.contains("the same disk as /dev/c"));
        let bar = &seen.barred[&group(1)];
        assert!(bar.why.contains("/dev/b and /dev/c"), "{}", bar.why);
        assert!(
            bar.action.contains("lunar group start g1"),
            "{}",
            bar.action
        );
        // A running group knows which one it works with.
        let held = BTreeMap::from([(disk(2), "/dev/c".to_string())]);
        let seen = sort(OWN, &held, &BTreeSet::new(), twice.to_vec());
        assert_eq!(seen.ours[&disk(2)].path, "/dev/c");
        assert_eq!(told(&seen), [("/dev/b", copy)]);
        assert!(seen.strangers[0].text.contains("copy of /dev/c"));
        assert!(seen.barred.is_empty() && seen.copies.is_empty());
    }

    #[test]
    fn a_clone_of_all_disks_is_used_nowhere() {
        let all = [
            probe("/dev/a", OWN, 1, 1),
            probe("/dev/b", OWN, 2, 1),
            probe("/dev/x", OWN, 1, 1),
            probe("/dev/y", OWN, 2, 1),
        ];
        let seen = sorted(&all);
        assert!(seen.ours.is_empty());
        assert_eq!((seen.copies.len(), seen.strangers.len()), (2, 4));
        assert!(seen.barred.contains_key(&group(1)));
        // A free disk that is there twice bars no group.
        let free = [probe("/dev/a", OWN, 1, 0), probe("/dev/b", OWN, 1, 0)];
        assert!(sorted(&free).barred.is_empty());
    }

    #[test]
    fn a_take_over_that_has_begun_bars_the_group_on_both_systems() {
        let half = [probe("/dev/a", OWN, 1, 1), probe("/dev/b", OTHER, 2, 1)];
        for system in [OWN, OTHER] {
            let seen = sort(system, &BTreeMap::new(), &BTreeSet::new(), half.to_vec());
            let bar = &seen.barred[&group(1)];
            assert!(bar.why.contains("take-over"), "{}", bar.why);
            assert!(bar.action.contains("lunar import --take"), "{}", bar.action);
        }
        // A copy that another system took over is another disk.
        let seen = sorted(&[probe("/dev/a", OWN, 1, 1), probe("/dev/b", OTHER, 1, 1)]);
        assert!(seen.barred.is_empty());
        assert_eq!(seen.ours.len(), 1);
    }

    #[test]
    fn what_cannot_be_believed_is_told_unless_its_row_tells_it() {
        let cut = "superblock not valid: it is cut off";
        let all = [
            invalid("/dev/a", cut),
            invalid("/dev/b", cut),
            invalid("/dev/c", "cannot be read"),
        ];
        let known = BTreeSet::from(["/dev/a".to_string()]);
        let seen = sort(OWN, &BTreeMap::new(), &known, all.to_vec());
        assert_eq!(told(&seen), [("/dev/b", StrangerKind::NotValid)]);
        assert_eq!(seen.strangers[0].text, cut);
    }
}
