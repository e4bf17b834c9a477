//! The text of `lunar status`, composed here and never in the client. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use lunar_api::rows::{
    DiskState, GroupHealth, Health, LuHealth, MemberHealth, ScrubRow, StatusData, StatusReply,
    Stranger, StrangerKind,
};
use lunar_api::target::{Consistency, GroupState, Level, ScrubState, SyncAction, SyncStatus};
use lunar_api::units::format_size;

use crate::jobs::left_text;
use crate::tables::GroupSave;
use crate::views::{View, is_write_hole_open};

mod action;
mod warnings;

pub use action::{action, again};
pub use warnings::warnings;

/// Composes the answer to `Status`. `holders` tells who holds a ublk device; `by_hand` which groups were
/// stopped on purpose.
pub fn status(
    view: &View,
    unhealthy: bool,
    target_up: bool,
    holders: &dyn Fn(u32) -> Vec<String>,
    by_hand: &dyn Fn(&GroupSave) -> bool,
) -> StatusReply {
    let mut health = if target_up {
        Health::Optimal
    } else {
        Health::NoService
    };
    let mut text = String::new();
    if !target_up {
        text += "ublk-target does not answer; what follows is what was last seen. See: lunar events\n\n";
    }
    if view.live.starting {
        text += "mgmtd has just started and still looks for disks; what follows is not settled. Wait a moment, then: lunar status\n\n";
    }
    let mut groups = Vec::new();
    for save in view.tables.groups.values() {
        let group = group_health(view, save);
        let own = if by_hand(save) {
            Health::Optimal
        } else {
            health_of(&group)
        };
        health = health.max(own);
        let is_well = left(&group).is_empty() && group.warnings.is_empty();
        if !unhealthy || own != Health::Optimal || !is_well {
            group_text(&mut text, view, save, &group, holders);
            groups.push(group);
        }
    }
    let need_look = [DiskState::Missing, DiskState::Faulty];
    let disks: Vec<_> = view
        .disk_rows()
        .into_iter()
        .filter(|d| d.group.is_none() && need_look.contains(&d.state))
        // What is told of them below says more.
        .filter(|d| !view.live.strangers.iter().any(|s| s.path == d.path))
        .collect();
    // A disk of a group whose members are not known yet may be one of them.
    let is_known = !view.live.starting && groups.iter().all(|g| g.level.is_some());
    for disk in &disks {
        let (n, state, path) = (disk.disk, word(disk.state), &disk.path);
        let _ = if is_known {
            writeln!(
                text,
                "disk {n} is {state} and in no group: {path}. Take it out: lunar disk remove {n}"
            )
        } else {
            writeln!(text, "disk {n} is {state}: {path}")
        };
    }
    let bad_disks = view.bad_disks();
    for bad in &bad_disks {
        let _ = writeln!(
            text,
            "disk {} ({}) {}. Repair it, or see: lunar disk show {}",
            bad.disk, bad.path, bad.problem, bad.disk
        );
    }
    if !view.live.unsaved.is_empty() {
        let why = &view.live.unsaved;
        let _ = writeln!(
            text,
            "the state directory takes no write: {why}. Data is safe, what commands change is kept in memory only. Make room: df"
        );
    }
    strangers_text(&mut text, view);
    for note in &view.live.features.notes {
        let _ = writeln!(text, "  note: {note}");
    }
    if text.is_empty() {
        text += if view.tables.groups.is_empty() {
            "no groups. Try: lunar disk add PATH..; lunar group create NAME --level raid5 --disks 1-3\n"
        } else {
            "all groups are optimal\n"
        };
    }
    let exit = match health {
        Health::Optimal => 0,
        Health::Degraded => 3,
        Health::NoService => 4,
    };
    let (system, features) = (view.tables.system, view.live.features.clone());
    StatusReply {
        exit,
        text,
        status: StatusData {
            health,
            system,
            target_up,
            starting: view.live.starting,
            features,
            groups,
            disks,
            bad_disks,
            strangers: view.live.strangers.clone(),
            unsaved: view.live.unsaved.clone(),
        },
    }
}

/// Disks of other systems, a line for each system, and what else is left alone.
fn strangers_text(text: &mut String, view: &View) {
    let strangers = &view.live.strangers;
    let mut systems: BTreeMap<_, Vec<&Stranger>> = BTreeMap::new();
    for stranger in strangers {
        match (stranger.kind, stranger.system) {
            (StrangerKind::OtherSystem, Some(system)) => {
                systems.entry(system).or_default().push(stranger);
            }
            _ => {
                let _ = writeln!(text, "{} {}", stranger.path, stranger.text);
            }
        }
    }
    let is_new = view.is_new();
    for (system, disks) in systems {
        let paths: Vec<&str> = disks.iter().map(|s| s.path.as_str()).collect();
        let mut groups: Vec<&str> = disks.iter().map(|s| s.group_name.as_str()).collect();
        groups.sort_unstable();
        groups.dedup();
        groups.retain(|name| !name.is_empty());
        let of = match groups.is_empty() {
            true => String::new(),
            false => format!(" (group {})", groups.join(", ")),
        };
        let paths = paths.join(" ");
        let _ = writeln!(
            text,
            "disks of Lunar system {system}{of} are here and left alone: {paths}"
        );
        let _ = match is_new {
            true => writeln!(
                text,
                "this system is new; if its state directory was lost, all comes back by: lunar import {paths}"
            ),
            false => writeln!(
                text,
                "if that system is to lose them to this one: lunar import --take {paths}"
            ),
        };
    }
}

fn health_of(group: &GroupHealth) -> Health {
    let lu_down = group
        .lus
        .iter()
        .any(|lu| lu.device.is_none() || !lu.problem.is_empty());
    match group.state {
        GroupState::Failed | GroupState::Stopped | GroupState::Quarantined => Health::NoService,
        _ if lu_down => Health::NoService,
        GroupState::Degraded => Health::Degraded,
        GroupState::Optimal => Health::Optimal,
    }
}

fn group_health(view: &View, save: &GroupSave) -> GroupHealth {
    let show = view.group_show(save);
    let members = show.members.iter().map(|m| MemberHealth {
        slot: m.slot,
        disk: m.disk,
        path: m.path.clone(),
        state: m.state,
        read_errors: m.read_errors,
        write_errors: m.write_errors,
    });
    let lus = view
        .tables
        .lus
        .values()
        .filter(|l| l.group == save.uuid)
        .map(|l| {
            let row = view.lu_row(l);
            let problem = view
                .lu_live(l)
                .map_or("its group is not started".into(), |l| l.problem.clone());
            LuHealth {
                lu: row.lu,
                name: row.name,
                capacity: row.capacity,
                device: row.device,
                problem,
            }
        });
    GroupHealth {
        group: save.number,
        members: members.collect(),
        warnings: view
            .live
            .groups
            .get(&save.uuid)
            .map_or_else(Vec::new, |live| warnings(view, live)),
        lus: lus.collect(),
        action: show.action,
        name: show.name,
        level: show.level,
        state: show.state,
        reason: show.reason,
        write_hole_open: show.write_hole_open,
        sync: show.sync,
        scrub: show.scrub,
    }
}

fn group_text(
    text: &mut String,
    view: &View,
    save: &GroupSave,
    group: &GroupHealth,
    holders: &dyn Fn(u32) -> Vec<String>,
) {
    let live = view.live.groups.get(&save.uuid);
    let mut head = match group.level {
        Some(level) => format!("{}   {}", group.name, level_word(level)),
        None => format!("{}   (no disk of it found)", group.name),
    };
    if let Some(live) = live {
        let _ = write!(head, ", {} disks", live.members.len());
        if live.level.is_striped() {
            let _ = write!(head, ", chunk {}", format_size(live.chunk));
        }
        if live.level.is_redundant() {
            head += match live.consistency {
                Consistency::None => ", none",
                Consistency::Bitmap => ", bitmap",
                Consistency::Ppl => ", ppl",
                Consistency::Journal => ", journal",
            };
        }
        if is_write_hole_open(live) {
            head += " (write hole open)";
        }
    }
    let state = match group.state {
        GroupState::Optimal => "optimal",
        GroupState::Degraded => "DEGRADED",
        GroupState::Failed => "FAILED",
        GroupState::Stopped => "STOPPED",
        GroupState::Quarantined => "QUARANTINED",
    };
    let doing = match group.sync.as_ref().map(|s| s.action) {
        Some(SyncAction::Recover) => ", rebuilding",
        Some(SyncAction::Replace) => ", replacing",
        Some(SyncAction::Resync) => ", syncing",
        None => "",
    };
    let _ = writeln!(text, " group: {head:<46} state: {state}{doing}");
    if !group.reason.is_empty() {
        let _ = writeln!(text, "reason: {}", group.reason);
    }
    if !group.action.is_empty() {
        let _ = writeln!(text, "action: {}", group.action);
    }
    if let Some(sync) = &group.sync {
        let _ = writeln!(text, "  scan: {}", scan(sync));
    }
    if let Some(live) = live.filter(|_| group.state == GroupState::Degraded) {
        let _ = writeln!(text, "  risk: {}", risk(live.can_lose));
    }
    for warning in &group.warnings {
        let (says, action) = (&warning.text, &warning.action);
        let _ = writeln!(text, "  warn: {says}: {action}");
    }
    if let Some(scrub) = &group.scrub {
        let _ = writeln!(text, "  scan: {}", scrub_scan(scrub, group.sync.is_some()));
    }
    if !group.members.is_empty() {
        let _ = writeln!(
            text,
            "        DISK  SLOT  STATE       READ WRITE CKSUM  PATH"
        );
    }
    for m in &group.members {
        let disk = m.disk.map_or("-".into(), |d| d.to_string());
        let (state, r, w) = (word(m.state), m.read_errors, m.write_errors);
        let _ = writeln!(
            text,
            "        {disk:<5} {:<5} {state:<10} {r:>5} {w:>5}     0  {}{}",
            m.slot,
            m.path,
            label_of(view, m.disk, m.state)
        );
    }
    for was in view
        .tables
        .disks
        .values()
        .filter(|d| d.was.is_some_and(|w| w.0 == save.uuid))
    {
        let slot = was.was.map_or(0, |w| w.1);
        let is_filled = |m: &MemberHealth| m.slot == slot && m.state == DiskState::InSync;
        if group.members.iter().any(is_filled) {
            continue;
        }
        let (n, path) = (was.number, &was.path);
        let label = label_of(view, Some(n), DiskState::Faulty);
        let _ = writeln!(
            text,
            "        {n:<5} {slot:<5} faulty         -     -     -  {path}  (was){label}"
        );
    }
    for (at, lu) in group.lus.iter().enumerate() {
        let label = if at == 0 { "   LUs:" } else { "       " };
        let _ = writeln!(text, "{label} {}", lu_text(view, lu, holders));
    }
    text.push('\n');
}

/// What stands on a disk that has to be taken out of the machine.
fn label_of(view: &View, disk: Option<u32>, state: DiskState) -> String {
    let out = matches!(state, DiskState::Faulty | DiskState::Missing);
    let uuid = disk.and_then(|n| view.tables.disks.get(&n)).map(|d| d.uuid);
    let label = uuid.and_then(|uuid| view.live.labels.get(&uuid));
    match label.filter(|label| out && !label.is_empty()) {
        Some(label) => format!("  {label}"),
        None => String::new(),
    }
}

fn lu_text(view: &View, lu: &LuHealth, holders: &dyn Fn(u32) -> Vec<String>) -> String {
    let save = view.tables.lus.get(&lu.lu);
    let ublk = save.and_then(|s| view.lu_live(s)).and_then(|l| l.ublk);
    let group = save.and_then(|s| view.live.groups.get(&s.group));
    let mut out = format!("{} {}", lu.name, format_size(lu.capacity));
    if let (Some(device), Some(ublk)) = (&lu.device, ublk) {
        let _ = write!(out, " {device} -> /dev/ublkb{ublk}");
        for holder in holders(ublk) {
            let _ = write!(out, ", {}", holder.replace("mounted at", "mounted"));
        }
    }
    out + &match (lu.problem.is_empty(), group) {
        (true, Some(group))
            if matches!(group.state, GroupState::Failed | GroupState::Quarantined) =>
        {
            format!(", {}", group.reason)
        }
        (true, _) => ", I/O ok".to_string(),
        (false, _) => format!(", NO I/O: {}", lu.problem),
    }
}

fn scan(sync: &SyncStatus) -> String {
    let tenths = u128::from(sync.done) * 1000 / u128::from(sync.total.max(1));
    let verb = match sync.action {
        SyncAction::Recover => "rebuild",
        SyncAction::Replace => "copy",
        SyncAction::Resync => "resync",
    };
    let mut out = format!(
        "{verb} {}.{} % ({}/{}), {}/s",
        tenths / 10,
        tenths % 10,
        format_size(sync.done),
        format_size(sync.total),
        format_size(sync.rate)
    );
    if let Some(left) = sync.total.saturating_sub(sync.done).checked_div(sync.rate) {
        let _ = write!(out, ", about {}", duration(left));
    }
    out
}

/// What a scrub has not put right; empty if there is nothing.
fn left(group: &GroupHealth) -> String {
    let left = |s: &ScrubRow| left_text(s.bad, s.repaired, s.unreadable);
    group.scrub.as_ref().map(left).unwrap_or_default()
}

/// As it stands in the `scan:` line; `waits`: for a resync or rebuild.
fn scrub_scan(scrub: &ScrubRow, waits: bool) -> String {
    let tenths = u128::from(scrub.done) * 1000 / u128::from(scrub.total.max(1));
    let at = format!("{}.{} %", tenths / 10, tenths % 10);
    let word = if scrub.repair {
        "scrub (repair)"
    } else {
        "scrub"
    };
    let found = match (scrub.bad, scrub.repaired) {
        (0, _) => "nothing bad found".to_owned(),
        (bad, 0) => format!("{bad} bad stripes found"),
        (bad, repaired) => format!("repaired {repaired} stripes, {} remain", bad - repaired),
    };
    let mut out = match (scrub.state, scrub.ended) {
        (ScrubState::Running, _) if waits => format!("{word} waits at {at}, {found}"),
        (ScrubState::Running, _) => {
            let total = format_size(scrub.total);
            let rate = format_size(scrub.rate);
            let mut out = format!(
                "{word} {at} ({}/{total}), {rate}/s",
                format_size(scrub.done)
            );
            let left = scrub.total.saturating_sub(scrub.done);
            if let Some(left) = left.checked_div(scrub.rate) {
                let _ = write!(out, ", about {}", duration(left));
            }
            out + &format!(", {found}")
        }
        (ScrubState::Paused, _) => format!("{word} paused at {at}, {found}"),
        (ScrubState::Done, ended) => format!("{word} {found}, ended {}", utc(ended.unwrap_or(0))),
        (ScrubState::Cancelled, ended) => {
            format!(
                "{word} cancelled at {at}, {found}, ended {}",
                utc(ended.unwrap_or(0))
            )
        }
    };
    if scrub.unreadable > 0 {
        let _ = write!(out, "; {} stripes could not be compared", scrub.unreadable);
    }
    if scrub.rewritten > 0 {
        let _ = write!(
            out,
            "; {} that could not be read were rewritten",
            format_size(scrub.rewritten)
        );
    }
    out
}

/// Milliseconds since 1970 as a date and a time of day, UTC.
pub fn utc(ms: u64) -> String {
    let (days, ms) = (ms / 86_400_000, ms % 86_400_000);
    let (year, month, day) = date(days);
    let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}Z")
}

/// Year, month, day of a day since 1970 (civil calendar, years counted from March).
fn date(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (
        yoe + era * 400 + u64::from(month <= 2),
        month,
        doy - (153 * mp + 2) / 5 + 1,
    )
}

/// What may still happen to a degraded group.
fn risk(can_lose: u16) -> String {
    match can_lose {
        0 => "another failure may lose data".into(),
        1 => "it survives one more failure".into(),
        more => format!("it survives {more} more failures"),
    }
}

/// Seconds as people say them.
pub fn duration(seconds: u64) -> String {
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) if m < 10 => format!("{m} min {s} s"),
        (0, m, _) => format!("{m} min"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// A level as people write it.
pub fn level_word(level: Level) -> &'static str {
    match level {
        Level::Raid0 => "raid0",
        Level::Raid1 => "raid1",
        Level::Raid5 => "raid5",
        Level::Raid6 => "raid6",
        Level::Raid10 => "raid10",
        Level::Linear => "linear",
    }
}

/// A disk state as it stands in JSON.
pub fn word(state: DiskState) -> &'static str {
    match state {
        DiskState::Free => "free",
        DiskState::Spare => "spare",
        DiskState::Stopped => "stopped",
        DiskState::InSync => "in_sync",
        DiskState::Rebuilding => "rebuilding",
        DiskState::Faulty => "faulty",
        DiskState::Missing => "missing",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view;
    use lunar_api::target::{MemberState, ScrubStatus};

    fn compose(view: &View) -> StatusReply {
        status(
            view,
            false,
            true,
            &|_| vec!["mounted at /srv".into()],
            &|_| false,
        )
    }

    #[test]
    fn status_optimal_exits_0() {
        let reply = compose(&view());
        assert_eq!(reply.exit, 0);
        assert!(reply.text.contains("write hole open"), "{}", reply.text);
        assert!(
            reply
                .text
                .contains("   LUs: vol 1 GiB /dev/lunar/vol -> /dev/ublkb0, mounted /srv, I/O ok"),
            "{}",
            reply.text
        );
    }

    #[test]
    fn status_degraded_exits_3_and_says_what_to_type() {
        let mut view = view();
        let disk = view.tables.disks[&2].uuid;
        (view.live.labels).insert(disk, "ST4000VN (serial Z1F0A)".into());
        for group in view.live.groups.values_mut() {
            group.state = GroupState::Degraded;
            group.reason = "disk 2 (slot 1) failed".into();
            group.members[1].state = MemberState::Faulty;
            group.members[1].write_errors = 3;
        }
        let reply = compose(&view);
        assert_eq!(reply.exit, 3);
        assert!(reply.text.contains("state: DEGRADED"), "{}", reply.text);
        assert!(
            reply.text.contains("wwn-2  ST4000VN (serial Z1F0A)\n"),
            "{}",
            reply.text
        );
        let risk = "  risk: it survives one more failure";
        assert!(reply.text.contains(risk), "{}", reply.text);
        assert!(
            reply.text.contains("lunar disk replace 2 NEW"),
            "{}",
            reply.text
        );
    }

    #[test]
    fn status_failed_exits_4_and_says_so_of_the_lus() {
        let mut view = view();
        for group in view.live.groups.values_mut() {
            group.state = GroupState::Failed;
            group.reason = "writes are answered EIO".into();
        }
        let reply = compose(&view);
        assert_eq!(reply.exit, 4);
        let (lu, action) = (
            "mounted /srv, writes are answered EIO\n",
            "then: lunar group stop data; lunar group start data\n",
        );
        assert!(reply.text.contains(lu), "{}", reply.text);
        assert!(reply.text.contains(action), "{}", reply.text);
    }

    #[test]
    fn status_not_started_exits_4() {
        let mut view = view();
        view.live.groups.clear();
        assert_eq!(compose(&view).exit, 4);
    }

    #[test]
    fn status_scrub_line() {
        let mut scrub = crate::views::tests::scrub(ScrubState::Running);
        let mut line = |change: fn(&mut ScrubStatus)| {
            change(&mut scrub);
            let mut view = view();
            for group in view.live.groups.values_mut() {
                group.scrub = Some(scrub.clone());
            }
            let all = compose(&view);
            let healthy = status(&view, true, true, &|_| Vec::new(), &|_| false).text;
            let line = all
                .text
                .lines()
                .find_map(|l| l.strip_prefix("  scan: ").map(str::to_owned));
            (line.unwrap(), all.exit, healthy.contains("--repair"))
        };
        let running = "scrub 25.0 % (256 MiB/1 GiB), 1 MiB/s, about 12 min, nothing bad found";
        assert_eq!(line(|_| ()), (running.into(), 0, false));
        let paused = "scrub paused at 25.0 %, 3 bad stripes found";
        let change = |s: &mut ScrubStatus| (s.state, s.bad) = (ScrubState::Paused, 3);
        assert_eq!(line(change), (paused.into(), 0, true));
        let done = "scrub (repair) repaired 3 stripes, 0 remain, ended 2023-11-14T22:13:20Z";
        assert_eq!(
            line(|s| {
                (s.state, s.repair, s.repaired) = (ScrubState::Done, true, 3);
                s.ended = Some(s.started);
            }),
            (done.into(), 0, false)
        );
    }

    #[test]
    fn date_table() {
        for (days, want) in [
            (0, (1970, 1, 1)),
            (19_782, (2024, 2, 29)),
            (20_778, (2026, 11, 21)),
        ] {
            assert_eq!(date(days), want);
        }
    }

    #[test]
    fn duration_is_short() {
        for (s, text) in [
            (5, "5 s"),
            (65, "1 min 5 s"),
            (1200, "20 min"),
            (34800, "9 h 40 min"),
        ] {
            assert_eq!(duration(s), text);
        }
    }
}
