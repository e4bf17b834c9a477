//! Checks of the disks that serve.

use lunar_api::rows::CheckRow;
use lunar_api::target::MemberState;

use super::warn;
use crate::tables::GroupSave;
use crate::views::View;

/// Disks of a group that had errors since it started, or are slow.
pub(super) fn members(view: &View, save: &GroupSave) -> Vec<CheckRow> {
    let Some(live) = view.live.groups.get(&save.uuid) else {
        return Vec::new();
    };
    let check = |disk: Option<u32>| format!("disk {}", disk.unwrap_or_default());
    let mut out: Vec<CheckRow> = crate::text::warnings(view, live)
        .into_iter()
        .map(|w| warn(&check(w.disk), w.text, &w.action))
        .collect();
    for member in &live.members {
        let number = view.tables.disk(member.disk).map(|d| d.number);
        let is_told = out.iter().any(|row| row.check == check(number));
        let errors = member.read_errors + member.write_errors + member.timeouts;
        if errors > 0 && !is_told && member.state == MemberState::InSync {
            let text = format!(
                "since the group started: {} read errors, {} KiB repaired, {} write errors, {} times no answer",
                member.read_errors,
                member.repaired * 4,
                member.write_errors,
                member.timeouts
            );
            let action = format!("smartctl -x {}", member.path);
            out.push(warn(&check(number), text, &action));
        }
    }
    out
}
