//! Names to complete with, asked from mgmtd. Whatever goes wrong, nothing is offered and nothing is said.

use std::path::PathBuf;
use std::time::Duration;

use clap_complete::engine::CompletionCandidate;
use lunar_api::mgmt::{Nothing, Request};
use lunar_api::rows::{DiskList, GroupList, JobList, LuList};

use crate::client::Client;

/// A shell waits for us with every press of the key.
const LIMIT: Duration = Duration::from_millis(800);

/// Reads `--socket` and `--system` off the line that is being typed.
fn socket() -> PathBuf {
    let words: Vec<String> = std::env::args().collect();
    let value = |option: &str| {
        let with = format!("{option}=");
        words.iter().enumerate().find_map(|(at, word)| {
            let joined = word.strip_prefix(&with).map(String::from);
            joined.or_else(|| (word == option).then(|| words.get(at + 1).cloned())?)
        })
    };
    let system = value("--system").and_then(|n| n.parse().ok());
    crate::client::socket(value("--socket").map(PathBuf::from).as_deref(), system)
}

fn ask<T: serde::de::DeserializeOwned>(request: &Request) -> Option<T> {
    let mut client = Client::open(&socket(), LIMIT).ok()?;
    client.call(request).ok()
}

fn candidate(value: impl ToString, help: String) -> CompletionCandidate {
    CompletionCandidate::new(value.to_string()).help(Some(help.into()))
}

pub(crate) fn disks() -> Vec<CompletionCandidate> {
    let list: Option<DiskList> = ask(&Request::DiskList(Nothing {}));
    let rows = list.into_iter().flat_map(|list| list.disks);
    rows.map(|d| candidate(d.disk, d.path)).collect()
}

pub(crate) fn groups() -> Vec<CompletionCandidate> {
    let list: Option<GroupList> = ask(&Request::GroupList(Nothing {}));
    let rows = list.into_iter().flat_map(|list| list.groups);
    rows.map(|g| candidate(g.name, format!("group {}", g.group)))
        .collect()
}

pub(crate) fn lus() -> Vec<CompletionCandidate> {
    let list: Option<LuList> = ask(&Request::LuList(Nothing {}));
    let rows = list.into_iter().flat_map(|list| list.lus);
    rows.map(|l| candidate(l.name, format!("LU {}", l.lu)))
        .collect()
}

pub(crate) fn jobs() -> Vec<CompletionCandidate> {
    let list: Option<JobList> = ask(&Request::JobList(Nothing {}));
    let rows = list.into_iter().flat_map(|list| list.jobs);
    rows.map(|j| candidate(j.job, crate::show::job_line(&j)))
        .collect()
}
