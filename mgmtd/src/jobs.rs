//! Jobs: background work of groups, numbered and remembered. Derived from what ublk-target says. Pure.

use lunar_api::rows::{JobKind, JobState};
use lunar_api::target::{GroupStatus, MemberState, SyncAction, SyncStatus};
use lunar_api::{DiskUuid, GroupUuid};

use crate::tables::{JobSave, Tables};

/// Starts, goes on with, and ends the jobs of the groups that are up.
///
/// A job of a group that is not up stays as it is: it goes on when the group does.
pub fn derive(tables: &mut Tables, groups: &[GroupStatus], now: u64) {
    for group in groups {
        let running = group.sync.as_ref().map(|sync| (key(group, sync), sync));
        let open: Vec<JobSave> = tables
            .jobs
            .values()
            .filter(|job| job.group == group.group && job.state == JobState::Running)
            .cloned()
            .collect();
        let mut found = false;
        for mut job in open {
            match &running {
                Some((key, sync)) if *key == (job.kind, job.disk) => {
                    found = true;
                    job.total = sync.total;
                    // Progress lives in ublk-target; a row is written each tenth only.
                    if sync.done < job.done || sync.done - job.done > sync.total / 10 {
                        job.done = sync.done;
                    }
                }
                _ => end(&mut job, group, now),
            }
            tables.put_job(job);
        }
        if let (false, Some(((kind, disk), sync))) = (found, running) {
            let job = start(tables.next_job(), kind, group.group, disk, sync, now);
            tables.put_job(job);
        }
    }
    tables.trim_jobs();
}

fn key(group: &GroupStatus, sync: &SyncStatus) -> (JobKind, Option<DiskUuid>) {
    match sync.action {
        SyncAction::Resync => (JobKind::Resync, None),
        SyncAction::Replace => (JobKind::Replace, group.replacement.as_ref().map(|m| m.disk)),
        SyncAction::Recover => {
            let member = group.members.iter().find(|m| Some(m.slot) == sync.slot);
            (JobKind::Recover, member.map(|m| m.disk))
        }
    }
}

fn start(
    number: u32,
    kind: JobKind,
    group: GroupUuid,
    disk: Option<DiskUuid>,
    sync: &SyncStatus,
    now: u64,
) -> JobSave {
    let (done, total) = (sync.done, sync.total);
    let (state, started, ended) = (JobState::Running, now, None);
    JobSave {
        number,
        kind,
        group,
        disk,
        state,
        done,
        total,
        started,
        ended,
        reason: String::new(),
    }
}

fn end(job: &mut JobSave, group: &GroupStatus, now: u64) {
    let member = group.members.iter().find(|m| Some(m.disk) == job.disk);
    job.ended = Some(now);
    let filled = match job.kind {
        JobKind::Resync => Ok(()),
        JobKind::Recover | JobKind::Replace => match member {
            Some(m) if m.state == MemberState::InSync => Ok(()),
            Some(m) => Err(m.reason.clone()),
            None => Err("the disk left the group".into()),
        },
    };
    match filled {
        Ok(()) => (job.state, job.done) = (JobState::Done, job.total),
        Err(reason) => (job.state, job.reason) = (JobState::Failed, reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::group;

    #[test]
    fn derive_starts_once_and_ends() {
        let mut tables = Tables::default();
        let mut one = group();
        let (done, total, rate, slot) = (0, 100, 1, Some(1));
        one.sync = Some(SyncStatus {
            action: SyncAction::Recover,
            done,
            total,
            rate,
            slot,
        });
        derive(&mut tables, &[one.clone()], 1);
        derive(&mut tables, &[one.clone()], 2);
        assert_eq!(tables.jobs.len(), 1);
        assert_eq!(tables.jobs[&1].disk, Some(one.members[1].disk));
        one.sync = None;
        derive(&mut tables, &[one], 3);
        assert_eq!(
            (tables.jobs[&1].state, tables.jobs[&1].ended),
            (JobState::Done, Some(3))
        );
    }
}
