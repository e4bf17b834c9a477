//! `lunar stat`: the I/O of LUs and members, in all or by the second.

use std::time::{Duration, Instant};

use lunar_api::ApiError;
use lunar_api::mgmt::{EventsAsk, Nothing, Request};
use lunar_api::rows::{EventsReply, LuRow, MemberRow, StatReply};
use lunar_api::units::format_size;
use serde::Serialize;

use crate::args::Args;
use crate::client::Client;
use crate::{run, show};

/// One line: counts in all, or by the second.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Line {
    /// LU's name, or the group and slot of a member.
    name: String,
    disk: Option<u32>,
    reads: f64,
    writes: f64,
    read_bytes: f64,
    write_bytes: f64,
    errors: f64,
}

/// What is printed once.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Sample {
    /// Milliseconds that the numbers are a second's average of; none: counts in all.
    interval_ms: Option<u64>,
    lus: Vec<Line>,
    members: Vec<Line>,
}

/// Prints counts in all, or every `interval` seconds what there was in a second, `count` times.
pub(crate) fn stat(
    args: &Args,
    client: &mut Client,
    interval: Option<u32>,
    count: Option<u32>,
) -> Result<u8, ApiError> {
    let mut last: StatReply = client.call(&Request::Stat(Nothing {}))?;
    let Some(interval) = interval else {
        put(args, &sample(None, &last));
        return Ok(0);
    };
    for _ in 0..count.unwrap_or(u32::MAX) {
        wait(client, interval)?;
        let now: StatReply = client.call(&Request::Stat(Nothing {}))?;
        put(args, &sample(Some(&last), &now));
        last = now;
    }
    Ok(0)
}

/// Sleeps on the daemon's clock; an event wakes it before its time, then it goes on.
fn wait(client: &mut Client, seconds: u32) -> Result<(), ApiError> {
    let end = Instant::now() + Duration::from_secs(seconds.into());
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        let wait_ms = u32::try_from(left.as_millis() + 1).map_or(10_000, |ms| ms.min(10_000));
        let after = u64::MAX;
        let _: EventsReply = client.call(&Request::Events(EventsAsk { after, wait_ms }))?;
    }
}

/// Compares two looks.
fn sample(before: Option<&StatReply>, now: &StatReply) -> Sample {
    let interval_ms = before.map(|b| now.at.saturating_sub(b.at));
    let lus = now.lus.iter().map(|lu| {
        let old = before.and_then(|b| b.lus.iter().find(|l| l.lu == lu.lu));
        line(
            lu.name.clone(),
            None,
            old.map(lu_counts),
            lu_counts(lu),
            interval_ms,
        )
    });
    let mut members = Vec::new();
    for group in &now.groups {
        let old = before.and_then(|b| b.groups.iter().find(|g| g.group == group.group));
        for m in &group.members {
            let old = old.and_then(|g| {
                g.members
                    .iter()
                    .find(|o| (o.slot, o.disk) == (m.slot, m.disk))
            });
            let name = format!("{}/{}", group.name, m.slot);
            let counts = member_counts(m);
            members.push(line(
                name,
                m.disk,
                old.map(member_counts),
                counts,
                interval_ms,
            ));
        }
    }
    Sample {
        interval_ms,
        lus: lus.collect(),
        members,
    }
}

fn lu_counts(lu: &LuRow) -> [u64; 5] {
    let c = &lu.counters;
    [c.reads, c.writes, c.read_bytes, c.write_bytes, c.errors]
}

fn member_counts(m: &MemberRow) -> [u64; 5] {
    let errors = m.read_errors + m.write_errors;
    [m.reads, m.writes, m.read_bytes, m.write_bytes, errors]
}

/// For people and rates: exact up to 2^53.
#[allow(clippy::cast_precision_loss)]
fn line(
    name: String,
    disk: Option<u32>,
    old: Option<[u64; 5]>,
    now: [u64; 5],
    interval_ms: Option<u64>,
) -> Line {
    let value = |at: usize| match interval_ms {
        None => now[at] as f64,
        // Fewer than before: the device came up anew and counts from 0.
        Some(ms) => {
            let before = old.map_or(0, |old| old[at]);
            let more = now[at].checked_sub(before).unwrap_or(now[at]);
            more as f64 * 1000.0 / ms.max(1) as f64
        }
    };
    Line {
        name,
        disk,
        reads: value(0),
        writes: value(1),
        read_bytes: value(2),
        write_bytes: value(3),
        errors: value(4),
    }
}

fn put(args: &Args, sample: &Sample) {
    run::print(args, "stat", sample, || text(sample));
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn text(sample: &Sample) -> String {
    let size = |bytes: f64| format_size(bytes as u64);
    let row = |l: &Line| {
        vec![
            l.name.clone(),
            l.disk.map_or("-".into(), |d| d.to_string()),
            format!("{:.0}", l.reads),
            format!("{:.0}", l.writes),
            size(l.read_bytes),
            size(l.write_bytes),
            format!("{:.0}", l.errors),
        ]
    };
    let lines = sample.lus.iter().chain(&sample.members).map(row);
    let unit = match sample.interval_ms {
        None => ["READS", "WRITES", "READ", "WRITTEN", "ERRORS"],
        Some(_) => ["READS/S", "WRITES/S", "READ/S", "WRITTEN/S", "ERRORS/S"],
    };
    let head: Vec<&str> = ["LU|GROUP/SLOT", "DISK"].into_iter().chain(unit).collect();
    show::table(&head, lines) + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_gives_counts_rates_and_survives_a_restart() {
        let value = |old: Option<[u64; 5]>, ms| line("x".into(), None, old, [600; 5], ms).reads;
        for (old, ms, want) in [
            (None, None, 600.0),
            (Some([100; 5]), Some(500), 1000.0),
            (Some([900; 5]), Some(1000), 600.0),
            (None, Some(2000), 300.0),
            (Some([600; 5]), Some(0), 0.0),
        ] {
            assert!((value(old, ms) - want).abs() < 1e-9, "{old:?} {ms:?}");
        }
    }
}
