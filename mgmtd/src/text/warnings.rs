//! Disks that serve, but may not for long: what is said of them, and what to type.

use lunar_api::rows::Warning;
use lunar_api::target::{GroupStatus, MemberState, MemberStatus};

use crate::views::View;

/// What is to be said of the disks of a group that serve. Who is out of it is the group's own reason.
pub fn warnings(view: &View, group: &GroupStatus) -> Vec<Warning> {
    let serving = group
        .members
        .iter()
        .filter(|m| m.state == MemberState::InSync);
    serving
        .flat_map(|member| member_warnings(view, group, member))
        .collect()
}

fn member_warnings(view: &View, group: &GroupStatus, member: &MemberStatus) -> Vec<Warning> {
    let save = view.tables.disk(member.disk);
    let number = save.map_or("-".into(), |d| d.number.to_string());
    let path = save.map_or(member.path.clone(), |d| d.path.clone());
    let disk = format!("disk {number} (slot {})", member.slot);
    let is_copied = (group.replacement.as_ref()).is_some_and(|new| new.slot == member.slot);
    let replace = match is_copied {
        true => "none needed, it is being copied".to_owned(),
        false => format!("lunar disk replace {number} NEW, which copies it while it serves"),
    };
    let mut said = Vec::new();
    if let Some(slow) = member.slow {
        let text = format!(
            "{disk} is slow: {} for an I/O, its peers {}",
            millis(slow.latency_us),
            millis(slow.peers_us)
        );
        said.push((text, format!("smartctl -x {path}; {replace}")));
    }
    if member.errors_lately > 0 {
        let (errors, most) = (member.errors_lately, group.read_errors_max);
        let limit = match most {
            0 => String::new(),
            most if errors <= most => format!(", more than {most} would fail it"),
            most => format!(
                ", more than {most}, but while a slot is filled or copied it is not failed for that"
            ),
        };
        let text = format!("{disk} had {errors} read errors lately, all repaired{limit}");
        said.push((text, replace.clone()));
    }
    if member.write_errors > 0 && member.bad_blocks == 0 {
        let text = format!(
            "{disk} had {} write errors, and data would be lost without it",
            member.write_errors
        );
        said.push((text, format!("save the data; {replace}")));
    }
    let is_told = member.errors_lately > 0;
    if member.read_errors > 0 && !group.level.is_redundant() && !is_told {
        let text = format!(
            "{disk} had {} read errors, and there is no redundancy",
            member.read_errors
        );
        said.push((text, format!("save the data; {replace}")));
    }
    if member.timeouts > 0 {
        let text = format!(
            "{disk} did not answer for 30 s, {} times, and data would be lost without it",
            member.timeouts
        );
        said.push((text, format!("smartctl -x {path}; dmesg | tail")));
    }
    if member.bad_blocks > 0 {
        let first = member.bad_blocks_at.first().copied().unwrap_or(0);
        let text = format!(
            "{disk} has {} bad blocks of 4 KiB, the first at byte {first} of it: what they should hold comes from redundancy, or is \
             an error",
            member.bad_blocks
        );
        let name = &group.name;
        let action = format!(
            "lunar group scrub {name} --repair --wait, which gives back what redundancy has; write over the rest; if they grow: \
             {replace}"
        );
        said.push((text, action));
    }
    let warning = |(text, action)| Warning {
        disk: save.map(|d| d.number),
        slot: member.slot,
        text,
        action,
    };
    said.into_iter().map(warning).collect()
}

fn millis(us: u64) -> String {
    match us {
        0..1000 => format!("{us} us"),
        _ => format!("{} ms", us / 1000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view;
    use lunar_api::target::{Level, SlowStatus};

    fn said(change: impl Fn(&mut GroupStatus)) -> Vec<String> {
        let mut view = view();
        let mut group = view.live.groups.values().next().unwrap().clone();
        change(&mut group);
        view.live.groups.insert(group.group, group.clone());
        let all = warnings(&view, &group);
        assert!(
            all.iter()
                .all(|w| w.disk == Some(2) && w.slot == 1 && !w.action.is_empty())
        );
        all.into_iter()
            .map(|w| format!("{}: {}", w.text, w.action))
            .collect()
    }

    #[test]
    fn warnings_name_the_disk_and_what_to_type() {
        assert!(said(|_| ()).is_empty());
        type Change<'a> = &'a dyn Fn(&mut GroupStatus);
        let cases: [(Change<'_>, &str); 8] = [
            (
                &|g| (g.members[1].bad_blocks, g.members[1].bad_blocks_at) = (3, vec![4096]),
                "disk 2 (slot 1) has 3 bad blocks of 4 KiB, the first at byte 4096 of it: what they should hold comes from \
                 redundancy, or is an error: lunar group scrub data --repair --wait",
            ),
            (
                &|g| g.members[1].errors_lately = 4,
                "4 read errors lately, all repaired, more than 20 would fail it: lunar disk replace 2 NEW",
            ),
            (
                &|g| g.members[1].errors_lately = 21,
                "more than 20, but while a slot",
            ),
            (
                &|g| (g.read_errors_max, g.members[1].errors_lately) = (0, 99),
                "99 read errors lately, all repaired: ",
            ),
            (
                &|g| {
                    g.members[1].slow = Some(SlowStatus {
                        latency_us: 52_300,
                        peers_us: 410,
                    })
                },
                "disk 2 (slot 1) is slow: 52 ms for an I/O, its peers 410 us: smartctl -x /dev/disk/by-id/wwn-2; lunar disk replace 2 NEW",
            ),
            (
                &|g| g.members[1].write_errors = 3,
                "3 write errors, and data would be lost",
            ),
            (
                &|g| g.members[1].timeouts = 1,
                "did not answer for 30 s, 1 times",
            ),
            (
                &|g| (g.level, g.members[1].read_errors) = (Level::Raid0, 2),
                "2 read errors, and there is no redundancy: save the data",
            ),
        ];
        for (change, expected) in cases {
            let said = said(change);
            assert!(
                said.len() == 1 && said[0].contains(expected),
                "{expected}: {said:?}"
            );
        }
        // The group's own reason speaks of those that are out of it.
        assert!(
            said(|g| {
                g.members[1].state = MemberState::Faulty;
                g.members[1].errors_lately = 21;
            })
            .is_empty()
        );
        let copied = said(|g| {
            g.members[1].errors_lately = 9;
            g.replacement = Some(g.members[1].clone());
        });
        assert!(
            copied[0].contains("none needed, it is being copied"),
            "{copied:?}"
        );
    }
}
