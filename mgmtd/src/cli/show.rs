//! Tables and lines for people.

use comfy_table::{Table, presets};
use lunar_api::rows::{
    Changed, CheckRow, CheckState, DiskRow, EventRow, GroupRow, JobRow, JobState, Led, LocateReply,
    LuRow, LuShow, Outcome, PathRow, PathState,
};
use lunar_api::target::GroupState;
use lunar_api::units::format_size;
use mgmtd::text::{duration, level_word, utc, word};
use serde_json::Value;

pub(crate) fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_header(head.iter().copied());
    rows.for_each(|row| {
        table.add_row(row);
    });
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_string())
        .collect();
    lines.join("\n") + "\n"
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or("-".into(), |v| v.to_string())
}

pub(crate) fn disks(rows: &[DiskRow]) -> String {
    let row = |d: &DiskRow| {
        let role = format!("{:?}", d.role).to_lowercase();
        let (state, group) = (word(d.state).to_string(), or_dash(d.group));
        let (disk, errors) = (d.disk.to_string(), d.errors.to_string());
        vec![
            disk,
            d.path.clone(),
            format_size(d.capacity),
            role,
            state,
            group,
            errors,
        ]
    };
    let head = [
        "DISK", "PATH", "CAPACITY", "ROLE", "STATE", "GROUP", "ERRORS",
    ];
    table(&head, rows.iter().map(row))
}

fn numbers(disks: &[Option<u32>]) -> String {
    disks
        .iter()
        .map(|d| or_dash(*d))
        .collect::<Vec<_>>()
        .join(",")
}

pub(crate) fn groups(rows: &[GroupRow]) -> String {
    let row = |g: &GroupRow| {
        let state = match g.state {
            GroupState::Optimal => "optimal",
            GroupState::Degraded => "degraded",
            GroupState::Failed => "failed",
            GroupState::Stopped => "stopped",
            GroupState::Quarantined => "quarantined",
        };
        vec![
            g.group.to_string(),
            g.name.clone(),
            g.level.map_or("-", level_word).into(),
            numbers(&g.disks),
            format_size(g.chunk),
            g.consistency
                .map_or("-".into(), |c| format!("{c:?}").to_lowercase()),
            state.into(),
        ]
    };
    let head = [
        "GROUP",
        "NAME",
        "LEVEL",
        "DISKS",
        "CHUNK",
        "CONSISTENCY",
        "STATE",
    ];
    table(&head, rows.iter().map(row))
}

pub(crate) fn lus(rows: &[LuRow]) -> String {
    let row = |l: &LuRow| {
        let paths = l
            .paths
            .iter()
            .filter_map(|p| p.device.clone())
            .collect::<Vec<_>>()
            .join(",");
        let (lu, group) = (l.lu.to_string(), l.group.to_string());
        vec![
            lu,
            l.name.clone(),
            group,
            format_size(l.capacity),
            or_dash(l.device.clone()),
            paths,
        ]
    };
    table(
        &["LU", "NAME", "GROUP", "CAPACITY", "DEVICE", "PATHS"],
        rows.iter().map(row),
    )
}

pub(crate) fn paths(rows: &[PathRow]) -> String {
    let row = |p: &PathRow| {
        let state = if p.state == PathState::Online {
            "online"
        } else {
            "offline"
        };
        let (path, lu) = (p.path.to_string(), p.lu.to_string());
        vec![
            path,
            lu,
            p.head.clone(),
            or_dash(p.device.clone()),
            state.into(),
        ]
    };
    table(
        &["PATH", "LU", "HEAD", "DEVICE", "STATE"],
        rows.iter().map(row),
    )
}

pub(crate) fn jobs(rows: &[JobRow]) -> String {
    rows.iter().map(|job| job_line(job) + "\n").collect()
}

pub(crate) fn job_line(job: &JobRow) -> String {
    let kind = format!("{:?}", job.kind).to_lowercase();
    let of = match (job.disk, &job.lu_name) {
        (Some(disk), _) => format!("{kind} of disk {disk} in group {}", job.group_name),
        (None, Some(lu)) => format!("{kind} of LU {lu} in group {}", job.group_name),
        (None, None) => format!("{kind} of group {}", job.group_name),
    };
    let state = match job.state {
        JobState::Done if job.reason.is_empty() => "done".into(),
        JobState::Done => format!("done: {}", job.reason),
        JobState::Cancelled => "cancelled".into(),
        JobState::Failed => format!("failed: {}", job.reason),
        JobState::Running | JobState::Paused => {
            let tenths = u128::from(job.done) * 1000 / u128::from(job.total.max(1));
            let left = (job.total.saturating_sub(job.done)).checked_div(job.rate);
            let left = left.map_or(String::new(), |s| format!(", about {}", duration(s)));
            let at = format!("{}.{} %", tenths / 10, tenths % 10);
            if job.state == JobState::Paused {
                format!("paused at {at}")
            } else {
                format!("{at}, {}/s{left}", format_size(job.rate))
            }
        }
    };
    format!("job {}: {of}: {state}", job.job)
}

pub(crate) fn bar(job: &JobRow) -> indicatif::ProgressBar {
    let template = "{msg} [{bar:40}] {percent} % {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    let style = indicatif::ProgressStyle::with_template(template).expect("the template is fixed");
    let bar = indicatif::ProgressBar::new(job.total).with_style(style);
    bar.with_message(format!("job {}", job.job))
}

pub(crate) fn event(event: &EventRow) -> String {
    let (name, text) = (&event.name, &event.text);
    let group = event.group.map_or(String::new(), |n| format!(" group {n}"));
    format!("{} {} {name}{group}: {text}", event.event, utc(event.time))
}

/// `key: value`, a line each, of any row; what is in it once more is a table or lines of its own.
pub(crate) fn object(row: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(row).unwrap_or_default();
    fields(&mut value.as_object().into_iter().flatten())
}

fn fields<'a>(all: &mut dyn Iterator<Item = (&'a String, &'a Value)>) -> String {
    let mut out = String::new();
    for (key, value) in all {
        out += &match value {
            Value::Array(list) if list.first().is_some_and(Value::is_object) => {
                let lines = rows(list);
                format!("{key:>16}:\n{}", indented(&lines))
            }
            Value::Array(list) if list.iter().all(|item| !item.is_string()) => {
                let items: Vec<String> = list.iter().map(|item| scalar(key, item)).collect();
                format!("{key:>16}: {}\n", or_none(items.join(", ")))
            }
            Value::Array(list) => {
                let lines: String = list.iter().map(|item| scalar(key, item) + "\n").collect();
                format!("{key:>16}:\n{}", indented(&lines))
            }
            Value::Object(inner) => {
                let (lists, items): (Vec<_>, Vec<_>) =
                    inner.iter().partition(|(_, value)| value.is_array());
                let items: Vec<String> = items
                    .into_iter()
                    .map(|(key, value)| format!("{key} {}", scalar(key, value)))
                    .collect();
                format!("{key:>16}: {}\n", items.join(", ")) + &fields(&mut lists.into_iter())
            }
            _ => format!("{key:>16}: {}\n", scalar(key, value)),
        };
    }
    out
}

/// Rows as a table; their keys are its head.
fn rows(list: &[Value]) -> String {
    let keys: Vec<&String> = list
        .iter()
        .filter_map(Value::as_object)
        .next()
        .into_iter()
        .flat_map(|first| first.keys())
        .collect();
    let head: Vec<String> = keys.iter().map(|key| key.to_uppercase()).collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    let line = |item: &Value| {
        keys.iter()
            .map(|key| scalar(key, item.get(key.as_str()).unwrap_or(&Value::Null)))
            .collect()
    };
    table(&head, list.iter().map(line))
}

fn indented(lines: &str) -> String {
    lines.lines().map(|line| format!("    {line}\n")).collect()
}

fn or_none(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

/// One value; sizes as people say them.
fn scalar(key: &str, value: &Value) -> String {
    const SIZES: [&str; 9] = [
        "capacity",
        "free",
        "chunk",
        "done",
        "total",
        "rate",
        "rate_max",
        "rebuild_min",
        "rebuild_max",
    ];
    match value {
        Value::Number(number) if SIZES.contains(&key) || key.ends_with("_bytes") => {
            format_size(number.as_u64().unwrap_or_default())
        }
        Value::String(text) => or_none(text.clone()),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

pub(crate) fn lu(row: &LuShow) -> String {
    let mut value = serde_json::to_value(row).unwrap_or_default();
    if let Some(fields) = value.as_object_mut() {
        // Said below, as lines to copy.
        fields.retain(|key, _| key != "mkfs" && key != "fstab");
    }
    let mut out = object(&value);
    out += "\nmake a file system of the right geometry:\n";
    row.mkfs
        .iter()
        .for_each(|line| out += &format!("  {line}\n"));
    out + &format!("line for /etc/fstab:\n  {}\n", row.fstab)
}

pub(crate) fn locate(reply: &LocateReply) -> String {
    let mut out = String::new();
    for row in &reply.disks {
        out += &object(row);
        if row.led == Led::None {
            out += "                  no LED is known: go by the serial number\n";
        }
    }
    let planned = reply.outcome == Outcome::Planned;
    let steps = reply.steps.iter().filter(|_| planned);
    steps.for_each(|step| out += &format!("would {step}\n"));
    out
}

/// What is not well, and all of it if asked for; then a line that sums up.
pub(crate) fn checks(checks: &[CheckRow], all: bool) -> String {
    let mut out = String::new();
    for check in checks {
        let word = match check.state {
            CheckState::Ok if !all => continue,
            CheckState::Ok => "ok",
            CheckState::Warn => "WARN",
            CheckState::Fail => "FAIL",
        };
        out += &format!("{word:<4}  {}: {}\n", check.check, check.text);
        if !check.action.is_empty() {
            out += &format!("      Try: {}\n", check.action);
        }
    }
    let count = |state| checks.iter().filter(|c| c.state == state).count();
    let (good, warn, fail) = (
        count(CheckState::Ok),
        count(CheckState::Warn),
        count(CheckState::Fail),
    );
    out + &format!("{good} ok, {warn} warnings, {fail} failed\n")
}

pub(crate) fn changed(reply: &Changed) -> String {
    let mut out: String = reply.text.iter().map(|line| format!("{line}\n")).collect();
    if reply.outcome == Outcome::Planned {
        reply
            .dies
            .iter()
            .for_each(|what| out += &format!("would die: {what}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn object_has_tables_lists_and_sizes() {
        let row = serde_json::json!({
            "capacity": 1024, "disks": [1, 2], "mkfs": ["a", "b"], "none": [], "counters": {"reads": 1},
            "scrub": {"bad": 1, "stripes": [{"stripe": 7, "slots": [1, 2]}]},
            "members": [{"slot": 0, "read_bytes": 4096}], "reason": "",
        });
        let text = object(&row);
        for line in [
            "        capacity: 1 KiB\n",
            "           disks: 1, 2\n",
            "            mkfs:\n    a\n    b\n",
            "            none: -\n",
            "        counters: reads 1\n",
            "          reason: -\n",
            "           scrub: bad 1\n         stripes:\n    ",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        assert!(text.contains("4 KiB"), "{text}");
    }
}
