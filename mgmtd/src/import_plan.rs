//! What an import does with the disks it was given, decided from what was seen of them. Pure.

use std::collections::BTreeMap;

use lunar_api::target::{Label, Probe};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, SystemUuid};

use crate::sightings::{Sightings, part};
use crate::views::View;

/// A path that was named.
#[derive(Debug, Clone)]
pub enum Given {
    /// Nothing to import, and why.
    Left(String, String),
    /// It carries a superblock of Lunar.
    Lunar(String, Box<Probe>),
}

/// What the decision rests on.
#[derive(Debug)]
pub struct Facts<'a> {
    pub view: &'a View,
    pub seen: &'a Sightings,
    pub given: &'a [Given],
    /// Deleted groups come back.
    pub deleted: bool,
    /// Groups of other systems become this one's.
    pub take: bool,
    /// This boot.
    pub boot: &'a str,
}

/// The decision.
#[derive(Debug, Clone, Default)]
pub struct ImportPlan {
    /// The system that this one, which has nothing, becomes.
    pub become_system: Option<SystemUuid>,
    /// Groups (nil: free disks) to take away from a system.
    pub take: Vec<(GroupUuid, SystemUuid)>,
    /// Their disks that are here, the highest generation first.
    pub members: BTreeMap<(GroupUuid, SystemUuid), Vec<Probe>>,
    /// Disks that get a row if they have none, in the order given; with what they were before another took their place.
    pub disks: Vec<(DiskUuid, Option<(GroupUuid, u16)>)>,
    /// Groups to start, those among them that were deleted, and those that run already.
    pub start: Vec<GroupUuid>,
    pub undelete: Vec<GroupUuid>,
    pub running: Vec<GroupUuid>,
    /// What will be done.
    pub steps: Vec<String>,
    /// What is left alone, and why.
    pub left: Vec<String>,
    names: BTreeMap<GroupUuid, String>,
}

impl ImportPlan {
    /// The name of a group, as far as its disks say it.
    pub fn name(&self, group: GroupUuid) -> String {
        self.names.get(&group).cloned().unwrap_or(group.to_string())
    }
}

/// Decides.
///
/// # Errors  `Refused` if none of the disks can be imported, or they are of several systems of which one was to be become
pub fn plan(facts: &Facts<'_>) -> Result<ImportPlan, ApiError> {
    let mut out = ImportPlan::default();
    let own = facts.view.tables.system;
    let mut mine: Vec<(&str, &Probe)> = Vec::new();
    let mut others: Vec<(&str, &Probe)> = Vec::new();
    for given in facts.given {
        match given {
            Given::Left(path, why) => out.left.push(format!("{path} {why}: left alone")),
            Given::Lunar(path, probe) => match &probe.label {
                Some(label) if label.system == own => mine.push((path, probe)),
                Some(_) => others.push((path, probe)),
                None => {}
            },
        }
    }
    let is_new = facts.view.is_new();
    if facts.take {
        take(facts, &others, &mut out);
        mine.append(&mut others);
    } else if is_new && mine.is_empty() && !others.is_empty() {
        let system = one_system(&others)?;
        out.become_system = Some(system);
        out.steps.push(format!(
            "become Lunar system {system}, as the disks say: this one is new and has nothing"
        ));
        mine.append(&mut others);
    }
    for (path, probe) in &others {
        if let Some(label) = &probe.label {
            let (system, part) = (label.system, part(label));
            out.left.push(format!(
                "{path} belongs to Lunar system {system} ({part}): left alone; --take makes it this system's"
            ));
        }
    }
    let newest = newest_labels(facts);
    for (path, probe) in &mine {
        if let Some(label) = &probe.label {
            own_disk(facts, path, label, &newest, &mut out);
        }
    }
    beside(facts, &newest, &mut out);
    groups(facts, &mine, &newest, &mut out);
    if out.disks.is_empty() {
        let mut refused = ApiError::new(ErrorKind::Refused, "nothing is imported");
        refused.causes.clone_from(&out.left);
        let hint = match facts.given.iter().any(|g| matches!(g, Given::Lunar(..))) {
            true => "lunar import --take PATH.., if the other system is to lose them; lunar status",
            false => {
                "lsblk -o NAME,SIZE,FSTYPE; lunar disk add PATH.., for disks that are to become Lunar's"
            }
        };
        return Err(refused.hint(hint));
    }
    Ok(out)
}

/// # Errors  `Refused`, with a disk of each of two systems
fn one_system(others: &[(&str, &Probe)]) -> Result<SystemUuid, ApiError> {
    let mut systems: BTreeMap<SystemUuid, Vec<&str>> = BTreeMap::new();
    for (path, probe) in others {
        if let Some(label) = &probe.label {
            systems.entry(label.system).or_default().push(path);
        }
    }
    let mut all = systems.iter();
    match (all.next(), all.next()) {
        (Some((system, _)), None) => Ok(*system),
        _ => {
            let what =
                "the disks belong to several Lunar systems, and this one can become one of them";
            let mut refused = ApiError::new(ErrorKind::Refused, what);
            refused.causes = systems
                .iter()
                .map(|(system, paths)| format!("{system}: {}", paths.join(" ")))
                .collect();
            Err(refused
                .hint("lunar import PATH.. with the disks of one; then --take for the others"))
        }
    }
}

/// What the newest disk of each group says, of all systems that are this one's, or become it.
fn newest_labels<'a>(facts: &'a Facts<'_>) -> BTreeMap<GroupUuid, &'a Label> {
    let probes = facts.seen.ours.values().chain(&facts.seen.foreign);
    let mut newest: BTreeMap<GroupUuid, &Label> = BTreeMap::new();
    for label in probes.filter_map(|probe| probe.label.as_ref()) {
        let place = newest.entry(label.group).or_insert(label);
        if label.generation > place.generation {
            *place = label;
        }
    }
    newest
}

/// Groups are taken whole: every disk of theirs that is here, named or not.
fn take(facts: &Facts<'_>, others: &[(&str, &Probe)], out: &mut ImportPlan) {
    for (path, probe) in others {
        let Some(label) = &probe.label else { continue };
        let key = (label.group, label.system);
        if label.group.is_nil() {
            out.members.entry(key).or_default().push((*probe).clone());
            if !out.take.contains(&key) {
                out.take.push(key);
            }
            out.steps.push(format!(
                "take {path}, a free disk, over from system {}",
                label.system
            ));
            continue;
        }
        if out.take.contains(&key) {
            continue;
        }
        let all = facts.seen.foreign.iter();
        let is_of = |probe: &&Probe| {
            let label = probe.label.as_ref();
            label.is_some_and(|label| (label.group, label.system) == key)
        };
        let mut members: Vec<Probe> = all.filter(is_of).cloned().collect();
        members.sort_by_key(|probe| std::cmp::Reverse(probe.label.as_ref().map(|l| l.generation)));
        let paths: Vec<&str> = members.iter().map(|probe| probe.path.as_str()).collect();
        let name = match label.group_name.as_str() {
            "" => label.group.to_string(),
            name => name.to_string(),
        };
        out.steps.push(format!(
            "take group {name} ({}) over from system {}, which will not start it any more",
            paths.join(", "),
            label.system
        ));
        out.take.push(key);
        out.members.insert(key, members);
    }
}

fn own_disk(
    facts: &Facts<'_>,
    path: &str,
    label: &Label,
    newest: &BTreeMap<GroupUuid, &Label>,
    out: &mut ImportPlan,
) {
    if let Some(all) = facts.seen.copies.get(&label.disk) {
        let paths: Vec<&str> = all.iter().map(|probe| probe.path.as_str()).collect();
        out.left.push(format!(
            "{path} is there twice, as {}: one is a copy of the other, and none is taken",
            paths.join(" and ")
        ));
        return;
    }
    let held = facts.seen.ours.get(&label.disk);
    let foreign = facts.seen.foreign.iter();
    let same_disk = foreign.filter(|p| p.label.as_ref().is_some_and(|l| l.disk == label.disk));
    let twins: Vec<&str> = same_disk.map(|probe| probe.path.as_str()).collect();
    if held.is_none() && twins.len() > 1 {
        out.left.push(format!(
            "{path} is there twice, as {}: one is a copy of the other, and none is taken",
            twins.join(" and ")
        ));
        return;
    }
    if let Some(damaged) = &label.damaged {
        out.left.push(format!("{path}: {damaged}"));
    }
    let mut was = None;
    if let Some(newest) = newest.get(&label.group).filter(|_| !label.group.is_nil()) {
        if !newest.lists(label.disk) {
            was = label.slot.map(|slot| (label.group, slot));
            let generations = (label.generation, newest.generation);
            out.left.push(format!(
                "{path} is no member of its group any more: it says generation {}, the others {}",
                generations.0, generations.1
            ));
        } else if newest.deleted && !facts.deleted {
            out.left.push(format!(
                "{path} is {}: --deleted brings it back",
                part(newest)
            ));
        }
    }
    if facts.view.tables.disk(label.disk).is_none() {
        out.steps
            .push(format!("give {path} a number: {}", part(label)));
    }
    out.disks.push((label.disk, was));
}

/// Members that nobody named: they come with the system or the group that is imported.
fn beside(facts: &Facts<'_>, newest: &BTreeMap<GroupUuid, &Label>, out: &mut ImportPlan) {
    if out.disks.is_empty() {
        return;
    }
    let system = out.become_system.unwrap_or(facts.view.tables.system);
    let seen = facts.seen.ours.values().chain(&facts.seen.foreign);
    let labels = || {
        seen.clone()
            .filter_map(|p| Some((&p.path, p.label.as_ref()?)))
    };
    let comes = |label: &Label| {
        let key = (label.group, label.system);
        let is_listed = newest.get(&label.group).is_some_and(|newest| {
            !label.group.is_nil() && newest.lists(label.disk) && !newest.deleted && !label.deleted
        });
        let is_known = facts.view.tables.disk(label.disk).is_some()
            || out.disks.iter().any(|(disk, _)| *disk == label.disk);
        (label.system == system || out.take.contains(&key)) && is_listed && !is_known
    };
    let is_there_once = |label: &Label| {
        labels()
            .filter(|(_, other)| other.disk == label.disk)
            .count()
            == 1
    };
    let all = labels().filter(|(_, label)| comes(label) && is_there_once(label));
    let steps: Vec<String> = all
        .map(|(path, label)| format!("give {path} a number too: {}", part(label)))
        .collect();
    out.steps.extend(steps);
}

fn groups(
    facts: &Facts<'_>,
    mine: &[(&str, &Probe)],
    newest: &BTreeMap<GroupUuid, &Label>,
    out: &mut ImportPlan,
) {
    for label in mine.iter().filter_map(|(_, probe)| probe.label.as_ref()) {
        let group = label.group;
        let known = out.disks.iter().any(|(disk, _)| *disk == label.disk);
        if group.is_nil() || out.start.contains(&group) || out.running.contains(&group) {
            continue;
        }
        let row = facts.view.tables.group(group);
        let said = newest.get(&group).map(|newest| newest.group_name.clone());
        let named = row.map(|row| row.name_seen.clone());
        let name = said.filter(|name| !name.is_empty()).or(named);
        if let Some(name) = name {
            out.names.insert(group, name);
        }
        let name = out.name(group);
        let deleted = newest.get(&group).is_some_and(|newest| newest.deleted);
        let by_hand = row.and_then(|row| row.stopped_in.as_deref()) == Some(facts.boot);
        if facts.view.live.groups.contains_key(&group) {
            out.running.push(group);
        } else if known && deleted && facts.deleted {
            out.undelete.push(group);
            out.start.push(group);
            out.steps
                .push(format!("bring the deleted group {name} back, and its LUs"));
        } else if known && !deleted && by_hand {
            out.left.push(format!(
                "group {name} was stopped by hand: lunar group start {name}"
            ));
        } else if known && !deleted {
            out.start.push(group);
            out.steps.push(format!("start group {name} and its LUs"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use lunar_api::History;
    use lunar_api::target::Level;

    use super::*;
    use crate::sightings::sort;
    use crate::tables::DiskSave;

    const OWN: SystemUuid = SystemUuid::from_bytes([1; 16]);
    const OLD: SystemUuid = SystemUuid::from_bytes([2; 16]);
    const THIRD: SystemUuid = SystemUuid::from_bytes([3; 16]);

    fn disk(n: u8) -> DiskUuid {
        DiskUuid::from_bytes([n; 16])
    }

    const GROUP: GroupUuid = GroupUuid::from_bytes([9; 16]);

    /// Member n of the group `data` of disks 1 to 3.
    fn member(n: u8, system: SystemUuid) -> Probe {
        let label = Label {
            system,
            disk: disk(n),
            group: GROUP,
            group_name: "data".into(),
            level: Some(Level::Raid5),
            slots: 3,
            slot: Some(u16::from(n) - 1),
            history: History::NIL,
            generation: 5,
            members: vec![disk(1), disk(2), disk(3)],
            replacement: None,
            deleted: false,
            damaged: None,
        };
        Probe {
            path: format!("/dev/{n}"),
            capacity: 1 << 30,
            data_bytes: 1 << 29,
            logical_block: 512,
            label: Some(label),
            problem: None,
        }
    }

    fn with(mut probe: Probe, change: impl Fn(&mut Label)) -> Probe {
        probe.label.iter_mut().for_each(change);
        probe
    }

    struct Asked {
        view: View,
        probes: Vec<Probe>,
        deleted: bool,
        take: bool,
    }

    impl Asked {
        /// A system that has nothing sees these disks, and is to import them all.
        fn new(probes: Vec<Probe>) -> Self {
            let mut view = View::default();
            view.tables.system = OWN;
            let (deleted, take) = (false, false);
            Self {
                view,
                probes,
                deleted,
                take,
            }
        }

        /// It has a disk of its own.
        fn settled(mut self) -> Self {
            let (path, capacity) = ("/dev/own".into(), 1 << 30);
            self.view.tables.put_disk(DiskSave {
                number: 1,
                uuid: disk(77),
                path,
                role: Default::default(),
                capacity,
                was: None,
                sick: None,
                left: None,
            });
            self
        }

        fn plan(&self) -> Result<ImportPlan, ApiError> {
            self.plan_of(self.probes.len())
        }

        /// Of the first `named` disks; the others are there too.
        fn plan_of(&self, named: usize) -> Result<ImportPlan, ApiError> {
            let system = self.view.tables.system;
            let none = BTreeSet::new();
            let seen = sort(system, &BTreeMap::new(), &none, self.probes.clone());
            let given: Vec<Given> = (self.probes[..named].iter())
                .map(|probe| Given::Lunar(probe.path.clone(), Box::new(probe.clone())))
                .collect();
            plan(&Facts {
                view: &self.view,
                seen: &seen,
                given: &given,
                deleted: self.deleted,
                take: self.take,
                boot: "now",
            })
        }
    }

    fn all(system: SystemUuid) -> Vec<Probe> {
        [3, 1, 2].map(|n| member(n, system)).into()
    }

    #[test]
    fn a_system_that_has_nothing_becomes_that_of_the_disks() {
        let plan = Asked::new(all(OLD)).plan().unwrap();
        assert_eq!(plan.become_system, Some(OLD));
        let disks: Vec<_> = plan.disks.iter().map(|(disk, _)| *disk).collect();
        assert_eq!(
            disks,
            [disk(3), disk(1), disk(2)],
            "numbers in the order given"
        );
        assert_eq!(
            (plan.start.len(), plan.take.len(), plan.left.len()),
            (1, 0, 0)
        );
        assert!(plan.steps[0].contains(&OLD.to_string()), "{:?}", plan.steps);
        assert!(plan.steps.last().unwrap().contains("start group data"));
        // Of two systems it can become one, and nobody said which.
        let mut mixed = all(OLD);
        mixed.push(with(member(4, THIRD), |label| label.group = GroupUuid::NIL));
        let refused = Asked::new(mixed).plan().unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Refused);
        assert!(
            refused.causes.iter().any(|why| why.contains("/dev/4")),
            "{refused:?}"
        );
    }

    /// Given one disk that is named, then its plan has those too that come with it; not one of another system, nor one
    /// that is there twice.
    #[test]
    fn disks_that_come_unnamed_are_in_the_plan() {
        let too = |asked: &Asked| -> Vec<String> {
            let steps = asked.plan_of(1).unwrap().steps;
            let too = steps.iter().filter(|step| step.contains("a number too"));
            too.map(|step| step[..step.find(" a number").unwrap()].into())
                .collect()
        };
        let mut asked = Asked::new(all(OLD));
        asked
            .probes
            .push(with(member(4, THIRD), |label| label.members.push(disk(4))));
        assert_eq!(too(&asked), ["give /dev/1", "give /dev/2"]);
        let path = "/dev/copy".to_string();
        asked.probes.push(Probe {
            path,
            ..member(2, OLD)
        });
        assert_eq!(too(&asked), ["give /dev/1"]);
        assert_eq!(too(&Asked::new(all(OWN))), ["give /dev/1", "give /dev/2"]);
        let mut taken = Asked::new(all(OLD)).settled();
        taken.take = true;
        assert_eq!(too(&taken), ["give /dev/1", "give /dev/2"]);
    }

    #[test]
    fn a_system_that_has_something_leaves_others_alone_unless_told() {
        let refused = Asked::new(all(OLD)).settled().plan().unwrap_err();
        assert_eq!(
            (refused.kind, refused.causes.len()),
            (ErrorKind::Refused, 3)
        );
        assert!(refused.causes[0].contains(&OLD.to_string()), "{refused:?}");
        let mut asked = Asked::new(all(OLD)).settled();
        asked.take = true;
        let plan = asked.plan().unwrap();
        assert_eq!(
            (plan.become_system, &plan.take[..]),
            (None, &[(GROUP, OLD)][..])
        );
        assert_eq!(plan.members[&(GROUP, OLD)].len(), 3);
        assert!(plan.steps[0].contains("group data"), "{:?}", plan.steps);
        // Mixed with its own: those are imported, the others named.
        let mut mixed = Asked::new(all(OWN)).settled();
        mixed
            .probes
            .push(with(member(4, THIRD), |label| label.group = GroupUuid::NIL));
        let plan = mixed.plan().unwrap();
        assert_eq!((plan.disks.len(), plan.left.len()), (3, 1));
        assert!(plan.left[0].contains("/dev/4"), "{:?}", plan.left);
    }

    #[test]
    fn a_take_over_writes_the_highest_generation_first() {
        let mut asked = Asked::new(all(OLD)).settled();
        asked.take = true;
        for (probe, generation) in asked.probes.iter_mut().zip([4, 9, 7]) {
            *probe = with(probe.clone(), |label| label.generation = generation);
        }
        let plan = asked.plan().unwrap();
        let order = plan.members[&(GROUP, OLD)]
            .iter()
            .map(|probe| probe.path.as_str());
        assert_eq!(order.collect::<Vec<_>>(), ["/dev/1", "/dev/2", "/dev/3"]);
    }

    #[test]
    fn what_is_deleted_replaced_or_there_twice_is_told() {
        let gone = |label: &mut Label| label.deleted = true;
        let mut asked = Asked::new(all(OWN).into_iter().map(|p| with(p, gone)).collect());
        let plan = asked.plan().unwrap();
        assert_eq!(
            (plan.start.len(), plan.disks.len(), plan.left.len()),
            (0, 3, 3)
        );
        asked.deleted = true;
        let plan = asked.plan().unwrap();
        assert_eq!(
            (&plan.start[..], &plan.undelete[..]),
            (&[GROUP][..], &[GROUP][..])
        );

        let mut replaced = Asked::new(all(OWN));
        let newer = |label: &mut Label| {
            label.generation = 8;
            label.members[2] = disk(4);
        };
        for probe in replaced.probes.iter_mut().skip(1) {
            *probe = with(probe.clone(), newer);
        }
        let plan = replaced.plan().unwrap();
        assert_eq!(plan.disks[0], (disk(3), Some((GROUP, 2))));
        assert!(
            plan.left[0].contains("/dev/3 is no member"),
            "{:?}",
            plan.left
        );

        let mut twice = Asked::new(all(OWN));
        let path = "/dev/copy".to_string();
        twice.probes.push(Probe {
            path,
            ..member(1, OWN)
        });
        let plan = twice.plan().unwrap();
        assert_eq!((plan.disks.len(), plan.left.len()), (2, 2));
        assert!(
            plan.left.iter().all(|l| l.contains("/dev/1 and /dev/copy")),
            "{:?}",
            plan.left
        );
    }

    #[test]
    fn the_second_time_there_is_nothing_to_do() {
        let mut asked = Asked::new(all(OWN));
        for n in 1..=3 {
            let (path, capacity) = (format!("/dev/{n}"), 1 << 30);
            asked.view.tables.put_disk(DiskSave {
                number: n,
                uuid: disk(u8::try_from(n).unwrap()),
                path,
                role: Default::default(),
                capacity,
                was: None,
                sick: None,
                left: None,
            });
        }
        let number = asked.view.tables.number_group(GROUP, "data");
        let mut row = asked.view.tables.groups[&number].clone();
        row.stopped_in = Some("now".into());
        asked.view.tables.put_group(row);
        let plan = asked.plan().unwrap();
        assert!(
            plan.steps.is_empty() && plan.start.is_empty(),
            "{:?}",
            plan.steps
        );
        assert!(plan.left[0].contains("stopped by hand"), "{:?}", plan.left);
    }
}
