//! What to type next about a group.

use lunar_api::rows::DiskState;
use lunar_api::target::{GroupState, GroupStatus, MemberStatus, SyncAction};

use crate::jobs::scrub_left;
use crate::returns;
use crate::spares::replaced;
use crate::tables::GroupSave;
use crate::views::{View, member_state};

/// What to type about a group; empty when there is nothing to do.
pub fn action(view: &View, save: &GroupSave) -> String {
    match (
        view.live.groups.get(&save.uuid),
        view.live.problems.get(&save.uuid),
    ) {
        (Some(group), _) => started_action(view, group),
        (None, Some(problem)) if !problem.action.is_empty() => problem.action.clone(),
        (None, _) => format!("lunar group start {}", view.group_row(save).name),
    }
}

/// What there is to do while a disk is copied to another.
fn copying_action(view: &View, group: &GroupStatus, new: &MemberStatus) -> String {
    let number = |disk| view.tables.disk(disk).map_or(0, |d| d.number);
    let old = group.members.iter().find(|m| m.slot == new.slot);
    let (old, new) = (old.map_or(0, |m| number(m.disk)), number(new.disk));
    format!(
        "none needed, disk {old} is being copied to disk {new}; to give that up: lunar disk fail {new}"
    )
}

/// What there is to do while a slot is filled: nothing, but a disk may wait to be taken out.
fn recovering_action(view: &View, group: &GroupStatus) -> String {
    let slot = group.sync.as_ref().and_then(|sync| sync.slot);
    let member = group.members.iter().find(|m| Some(m.slot) == slot);
    let spare = member.and_then(|m| Some((view.tables.disk(m.disk)?, m.disk)));
    match spare.and_then(|(spare, disk)| Some((spare, replaced(view, group, disk)?))) {
        Some((spare, was)) => format!(
            "none needed, spare {} took its place; replace disk {1}: lunar disk replace {1} NEW",
            spare.number, was.number
        ),
        None => "none needed, the rebuild is running".into(),
    }
}

/// What ends a quarantine.
pub fn again(name: &str) -> String {
    format!("lunar group start {name} --again")
}

fn started_action(view: &View, group: &GroupStatus) -> String {
    let out = group.members.iter().find(|m| {
        matches!(
            member_state(m.state),
            DiskState::Faulty | DiskState::Missing
        )
    });
    let recovering = group
        .sync
        .as_ref()
        .is_some_and(|s| s.action == SyncAction::Recover);
    let is_left = group
        .scrub
        .as_ref()
        .is_some_and(|s| !scrub_left(s).is_empty());
    match (group.state, out) {
        (GroupState::Optimal, _) if is_left => format!(
            "lunar group show {0}, which lists the bad stripes; compare what is there with a backup, then: lunar group \
             scrub {0} --repair",
            group.name
        ),
        (GroupState::Optimal, _) => match &group.replacement {
            Some(new) => copying_action(view, group, new),
            None => String::new(),
        },
        (GroupState::Quarantined, _) => again(&group.name),
        (GroupState::Failed, _) => {
            format!(
                "bring the missing disks back, then: lunar group stop {0}; lunar group start {0}",
                group.name
            )
        }
        (_, Some(m)) => {
            let Some(n) = view.tables.disk(m.disk).map(|d| d.number) else {
                // Its label was never read here, as after an import without it: no verb can name it.
                return "put the disk back, then: lunar import PATH; or give a spare, which takes its place: lunar disk add \
                        --role spare PATH"
                    .into();
            };
            if let Some(action) = returns::action(view, m, n) {
                return action;
            }
            // One that comes back is stale, whatever it says: it missed what was written since.
            format!(
                "add a disk (lunar disk add PATH), then: lunar disk replace {n} NEW; or, with the same disk back and \
                 sound: lunar disk replace {n} {n}"
            )
        }
        (_, None) if recovering => recovering_action(view, group),
        (_, None) => "lunar events".into(),
    }
}
