//! Counters and states in Prometheus' text format 0.0.4. Pure.
//!
//! A state is one gauge for each word it can be, 1 for the one it is; sizes are bytes. Names are added, never renamed. Two
//! groups may have one name: `number` tells them apart.

use std::fmt::Write;

use lunar_api::rows::{DiskState, GroupShow, MemberRow};
use lunar_api::target::{GroupState, LuCounters, SyncStatus};

use crate::text::word;
use crate::views::View;

const GROUP_STATES: [(GroupState, &str); 5] = [
    (GroupState::Optimal, "optimal"),
    (GroupState::Degraded, "degraded"),
    (GroupState::Failed, "failed"),
    (GroupState::Stopped, "stopped"),
    (GroupState::Quarantined, "quarantined"),
];

const DISK_STATES: [DiskState; 7] = [
    DiskState::Free,
    DiskState::Spare,
    DiskState::Stopped,
    DiskState::InSync,
    DiskState::Rebuilding,
    DiskState::Faulty,
    DiskState::Missing,
];

/// The text, family after family.
#[derive(Debug, Default)]
struct Page(String);

impl Page {
    /// Writes a family: its help, its kind, a line for each sample.
    fn family(&mut self, name: &str, kind: &str, help: &str, samples: Vec<(String, f64)>) {
        if samples.is_empty() {
            return;
        }
        let _ = writeln!(self.0, "# HELP lunar_{name} {help}");
        let _ = writeln!(self.0, "# TYPE lunar_{name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(self.0, "lunar_{name}{labels} {value}");
        }
    }

    fn counter(&mut self, name: &str, help: &str, samples: Vec<(String, f64)>) {
        self.family(&format!("{name}_total"), "counter", help, samples);
    }

    fn gauge(&mut self, name: &str, help: &str, samples: Vec<(String, f64)>) {
        self.family(name, "gauge", help, samples);
    }
}

/// `{a="x",b="y"}` with what must be escaped escaped.
fn labels(pairs: &[(&str, &str)]) -> String {
    let escape = |text: &str| {
        let text = text.replace('\\', "\\\\").replace('"', "\\\"");
        text.replace('\n', "\\n")
    };
    let pairs = pairs
        .iter()
        .map(|(key, value)| format!("{key}=\"{}\"", escape(value)));
    format!("{{{}}}", pairs.collect::<Vec<_>>().join(","))
}

/// Prometheus' numbers are floats: counts beyond 2^53 lose their last digits, and only then.
#[allow(clippy::cast_precision_loss)]
fn float(count: u64) -> f64 {
    count as f64
}

fn flag(is: bool) -> f64 {
    f64::from(u8::from(is))
}

/// Composes the page.
pub fn page(view: &View, target_up: bool) -> String {
    let mut page = Page::default();
    let version = labels(&[("version", env!("CARGO_PKG_VERSION"))]);
    page.gauge("build_info", "Version of mgmtd.", vec![(version, 1.0)]);
    let up = vec![(String::new(), flag(target_up))];
    page.gauge("target_up", "Whether ublk-target answers.", up);
    groups(&mut page, view);
    members(&mut page, view);
    disks(&mut page, view);
    lus(&mut page, view);
    page.0
}

fn groups(page: &mut Page, view: &View) {
    let shows: Vec<_> = view
        .tables
        .groups
        .values()
        .map(|g| view.group_show(g))
        .collect();
    let mut states = Vec::new();
    for g in &shows {
        for (state, word) in GROUP_STATES {
            states.push((
                labels(&[
                    ("group", &g.name),
                    ("number", &g.group.to_string()),
                    ("state", word),
                ]),
                flag(g.state == state),
            ));
        }
    }
    page.gauge(
        "group_state",
        "1 for the state that the group is in.",
        states,
    );
    let of = |value: &dyn Fn(&GroupShow) -> Option<u64>| {
        let sample = |g: &GroupShow| {
            Some((
                labels(&[("group", &g.name), ("number", &g.group.to_string())]),
                float(value(g)?),
            ))
        };
        shows.iter().filter_map(sample).collect::<Vec<_>>()
    };
    let missing = |g: &GroupShow| {
        let in_sync = |m: &&MemberRow| m.state == DiskState::InSync;
        // One that is filled to replace another is in no slot that lacks one.
        let is_whole = |slot| g.members.iter().any(|m| m.slot == slot && in_sync(&m));
        let out = g.members.iter().filter(|m| !is_whole(m.slot));
        (g.state != GroupState::Stopped).then(|| out.count() as u64)
    };
    page.gauge(
        "group_degraded",
        "Members that are not in sync.",
        of(&missing),
    );
    page.gauge(
        "group_capacity_bytes",
        "Usable size.",
        of(&|g| Some(g.capacity)),
    );
    page.gauge(
        "group_free_bytes",
        "Size given to no LU.",
        of(&|g| Some(g.free)),
    );
    page.gauge(
        "group_generation",
        "Generation of the superblocks.",
        of(&|g| Some(g.generation)),
    );
    let hole = |g: &GroupShow| Some(u64::from(g.write_hole_open));
    page.gauge(
        "group_write_hole_open",
        "1 if a power loss while degraded may damage data.",
        of(&hole),
    );
    let sync = |value: fn(&SyncStatus) -> u64| of(&move |g| g.sync.as_ref().map(value));
    page.gauge(
        "group_sync_done_bytes",
        "Of a member, by the running job.",
        sync(|s| s.done),
    );
    page.gauge(
        "group_sync_size_bytes",
        "Of a member, in all.",
        sync(|s| s.total),
    );
    page.gauge(
        "group_sync_bytes_per_second",
        "Rate of the running job.",
        sync(|s| s.rate),
    );
}

fn members(page: &mut Page, view: &View) {
    let mut all = Vec::new();
    for save in view.tables.groups.values() {
        let Some(live) = view.live.groups.get(&save.uuid) else {
            continue;
        };
        for m in view.member_rows(live) {
            let (slot, disk) = (
                m.slot.to_string(),
                m.disk.map_or(String::new(), |d| d.to_string()),
            );
            let labels = labels(&[
                ("group", &live.name),
                ("number", &save.number.to_string()),
                ("slot", &slot),
                ("disk", &disk),
            ]);
            all.push((labels, m));
        }
    }
    let of = |value: fn(&MemberRow) -> u64| {
        all.iter()
            .map(|(labels, m)| (labels.clone(), float(value(m))))
            .collect::<Vec<_>>()
    };
    page.counter("member_reads", "Reads of a member.", of(|m| m.reads));
    page.counter("member_writes", "Writes of a member.", of(|m| m.writes));
    page.counter(
        "member_read_bytes",
        "Bytes read from a member.",
        of(|m| m.read_bytes),
    );
    page.counter(
        "member_written_bytes",
        "Bytes written to a member.",
        of(|m| m.write_bytes),
    );
    page.counter(
        "member_read_errors",
        "Reads of a member that failed.",
        of(|m| m.read_errors),
    );
    page.counter(
        "member_write_errors",
        "Writes of a member that failed.",
        of(|m| m.write_errors),
    );
    page.counter(
        "member_repaired_grains",
        "Grains (4 KiB) of a member that could not be read and were written anew.",
        of(|m| m.repaired),
    );
    page.counter(
        "member_timeouts",
        "Times that a member did not answer for 30 s.",
        of(|m| m.timeouts),
    );
    page.gauge(
        "member_bad_blocks",
        "Grains (4 KiB) of a member that do not hold what they should.",
        of(|m| m.bad_blocks),
    );
    page.gauge(
        "member_errors_lately",
        "Repaired read errors that count against a member.",
        of(|m| m.errors_lately.into()),
    );
    page.gauge(
        "member_latency_microseconds",
        "Time of an I/O of a member, over the last 5 s that had any.",
        of(|m| m.latency_us),
    );
    page.gauge(
        "member_slow",
        "1 for a member that is much slower than its peers.",
        of(|m| m.slow.is_some().into()),
    );
}

fn disks(page: &mut Page, view: &View) {
    let rows = view.disk_rows();
    let (mut states, mut sizes) = (Vec::new(), Vec::new());
    for disk in &rows {
        let number = disk.disk.to_string();
        for state in DISK_STATES {
            let labels = labels(&[("disk", &number), ("state", word(state))]);
            states.push((labels, flag(disk.state == state)));
        }
        let labels = labels(&[("disk", &number), ("path", &disk.path)]);
        sizes.push((labels, float(disk.capacity)));
    }
    page.gauge("disk_state", "1 for the state that the disk is in.", states);
    page.gauge("disk_capacity_bytes", "Size of the disk.", sizes);
}

fn lus(page: &mut Page, view: &View) {
    let group = |l: &crate::tables::LuSave| {
        let group = view.tables.group(l.group);
        group.map_or(String::new(), |g| view.group_row(g).name)
    };
    let (mut up, mut size, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for save in view.tables.lus.values() {
        let (row, live) = (view.lu_row(save), view.lu_live(save));
        let labels = labels(&[
            ("lu", &row.name),
            ("number", &row.lu.to_string()),
            ("group", &group(save)),
        ]);
        let serves = live.is_some_and(|l| l.ublk.is_some() && l.problem.is_empty());
        up.push((labels.clone(), flag(serves)));
        size.push((labels.clone(), float(row.capacity)));
        if live.is_some() {
            counts.push((labels, row.counters));
        }
    }
    page.gauge("lu_up", "Whether the LU's device is there and answers.", up);
    page.gauge("lu_capacity_bytes", "Size of the LU.", size);
    // Whatever is counted, a new counter too: the JSON of the counters names them.
    let names = serde_json::to_value(LuCounters::default());
    let names = names.unwrap_or_default();
    for key in names.as_object().into_iter().flat_map(|map| map.keys()) {
        let value = |counters: &LuCounters| {
            let all = serde_json::to_value(counters).unwrap_or_default();
            float(all[key].as_u64().unwrap_or_default())
        };
        let samples = counts.iter().map(|(labels, c)| (labels.clone(), value(c)));
        let help = format!("Counter `{key}` of a LU, since its device came up.");
        page.counter(&format!("lu_{key}"), &help, samples.collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::view;
    use std::collections::BTreeSet;

    /// Reads `{a="x"}` and gives what follows it.
    fn read_labels(text: &str) -> (Vec<(String, String)>, &str) {
        let Some(mut rest) = text.strip_prefix('{') else {
            return (Vec::new(), text);
        };
        let mut out = Vec::new();
        loop {
            let (key, after) = rest.split_once("=\"").expect("a label has a value");
            assert!(
                key.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
                "{key}"
            );
            let (mut value, mut chars) = (String::new(), after.char_indices());
            let end = loop {
                match chars.next().expect("a value ends") {
                    (at, '"') => break at,
                    (_, '\\') => match chars.next().expect("something is escaped").1 {
                        'n' => value.push('\n'),
                        c @ ('\\' | '"') => value.push(c),
                        other => panic!("\\{other} is no escape"),
                    },
                    (_, c) => value.push(c),
                }
            };
            out.push((key.to_string(), value));
            rest = &after[end + 1..];
            match rest.split_at(1) {
                (",", more) => rest = more,
                ("}", more) => return (out, more),
                (other, _) => panic!("`{other}` after a label"),
            }
        }
    }

    type Sample = (String, Vec<(String, String)>, f64);

    /// A strict reader of the format: each family once, HELP and TYPE before its samples, no sample twice.
    fn parse(text: &str) -> Vec<Sample> {
        let (mut families, mut seen, mut out) = (BTreeSet::new(), BTreeSet::new(), Vec::new());
        let (mut help, mut kind) = (String::new(), (String::new(), String::new()));
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, what) = rest.split_once(' ').expect("a help has a text");
                assert!(
                    what.len() > 5 && families.insert(name.to_string()),
                    "{line}"
                );
                help = name.into();
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, is) = rest.split_once(' ').expect("a type has a word");
                assert_eq!(name, help, "HELP comes before TYPE");
                assert!(["counter", "gauge"].contains(&is), "{line}");
                assert_eq!(is == "counter", name.ends_with("_total"), "{line}");
                kind = (name.into(), is.into());
            } else {
                let end = line.find(['{', ' ']).expect("a sample has a value");
                let (name, rest) = line.split_at(end);
                assert_eq!(name, kind.0, "a sample of another family");
                assert!(name.starts_with("lunar_"), "{name}");
                let (labels, rest) = read_labels(rest);
                let value: f64 = rest.strip_prefix(' ').unwrap().parse().expect("a number");
                assert!(
                    seen.insert(line[..line.len() - rest.len()].to_string()),
                    "twice: {line}"
                );
                out.push((name.to_string(), labels, value));
            }
        }
        out
    }

    #[test]
    fn page_is_valid_and_tells_states_and_counts() {
        let mut view = view();
        for group in view.live.groups.values_mut() {
            group.state = GroupState::Degraded;
            group.members[1].state = lunar_api::target::MemberState::Faulty;
            group.members[1].write_errors = 3;
            group.lus[0].counters.reads = 7;
        }
        let mut disk = view.tables.disks[&1].clone();
        disk.path = "/dev/a\"b\\c\nd".into();
        view.tables.put_disk(disk);
        let samples = parse(&page(&view, true));
        let value = |name: &str, has: &[(&str, &str)]| {
            let fits = |labels: &Vec<(String, String)>| {
                has.iter()
                    .all(|(k, v)| labels.contains(&(k.to_string(), v.to_string())))
            };
            let found: Vec<f64> = samples
                .iter()
                .filter(|(n, labels, _)| n == name && fits(labels))
                .map(|(_, _, value)| *value)
                .collect();
            assert_eq!(found.len(), 1, "{name} {has:?}");
            found[0]
        };
        for (name, labels, want) in [
            ("lunar_target_up", &[][..], 1.0),
            ("lunar_group_state", &[("state", "degraded")], 1.0),
            ("lunar_group_state", &[("state", "optimal")], 0.0),
            ("lunar_group_degraded", &[("group", "data")], 1.0),
            (
                "lunar_member_write_errors_total",
                &[("slot", "1"), ("disk", "2")],
                3.0,
            ),
            (
                "lunar_disk_state",
                &[("disk", "2"), ("state", "faulty")],
                1.0,
            ),
            (
                "lunar_disk_capacity_bytes",
                &[("path", "/dev/a\"b\\c\nd")],
                1_073_741_824.0,
            ),
            (
                "lunar_lu_reads_total",
                &[("lu", "vol"), ("group", "data")],
                7.0,
            ),
            ("lunar_lu_up", &[("lu", "vol")], 1.0),
        ] {
            assert!(
                (value(name, labels) - want).abs() < 1e-9,
                "{name} {labels:?}"
            );
        }
    }

    #[test]
    fn page_of_two_groups_of_one_name_has_no_sample_twice() {
        let mut view = view();
        let uuid = lunar_api::GroupUuid::from_bytes([8; 16]);
        view.tables.number_group(uuid, "data");
        let lu = lunar_api::LuUuid::from_bytes([8; 16]);
        view.tables.number_lu(lu, uuid, "vol");
        parse(&page(&view, true));
    }

    #[test]
    fn page_of_nothing_is_valid() {
        assert_eq!(parse(&page(&View::default(), false)).len(), 2);
    }
}
