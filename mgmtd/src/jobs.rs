//! Jobs: background work of groups, numbered and remembered. Derived from what ublk-target says. Pure.

use lunar_api::rows::{JobKind, JobState};
use lunar_api::target::{GroupStatus, MemberState, ScrubState, ScrubStatus, SyncAction};
use lunar_api::{DiskUuid, GroupUuid};

use crate::tables::{JobSave, Tables};

/// Work that a group does or has paused.
struct Work {
    kind: JobKind,
    disk: Option<DiskUuid>,
    lu_name: Option<String>,
    state: JobState,
    done: u64,
    total: u64,
    /// Tells one scrub from the next.
    started: Option<u64>,
}

impl Work {
    fn is_that_of(&self, job: &JobSave) -> bool {
        let same = self.started.is_none_or(|started| started == job.started);
        let (own, other) = (&self.lu_name, &job.lu_name);
        (self.kind, self.disk, own) == (job.kind, job.disk, other) && same
    }
}

/// Starts, goes on with, and ends the jobs of the groups that are up.
///
/// A job of a group that is not up stays as it is: it goes on when the group does.
pub fn derive(tables: &mut Tables, groups: &[GroupStatus], now: u64) {
    for group in groups {
        let all = sync(group).into_iter().chain(scrub(group));
        let mut running: Vec<Work> = all.chain(zeroing(group)).collect();
        let open: Vec<JobSave> = tables
            .jobs
            .values()
            .filter(|job| job.group == group.group && job.ended.is_none())
            .cloned()
            .collect();
        for mut job in open {
            match running.iter().position(|work| work.is_that_of(&job)) {
                Some(at) => {
                    let work = running.swap_remove(at);
                    job.total = work.total;
                    // Progress lives in ublk-target; a row is written each tenth only.
                    if work.done < job.done || work.done - job.done > work.total / 10 {
                        job.done = work.done;
                    }
                    job.state = work.state;
                }
                None => end(&mut job, group, now),
            }
            tables.put_job(job);
        }
        for work in running {
            let job = start(tables.next_job(), group.group, &work, now);
            tables.put_job(job);
        }
    }
    tables.trim_jobs();
}

fn sync(group: &GroupStatus) -> Option<Work> {
    let sync = group.sync.as_ref()?;
    let (kind, disk) = match sync.action {
        SyncAction::Resync => (JobKind::Resync, None),
        SyncAction::Replace => (JobKind::Replace, group.replacement.as_ref().map(|m| m.disk)),
        SyncAction::Recover => {
            let member = group.members.iter().find(|m| Some(m.slot) == sync.slot);
            (JobKind::Recover, member.map(|m| m.disk))
        }
    };
    Some(Work {
        kind,
        disk,
        lu_name: None,
        state: JobState::Running,
        done: sync.done,
        total: sync.total,
        started: None,
    })
}

fn scrub(group: &GroupStatus) -> Option<Work> {
    let scrub = group.scrub.as_ref()?;
    let state = match scrub.state {
        ScrubState::Running => JobState::Running,
        ScrubState::Paused => JobState::Paused,
        ScrubState::Done | ScrubState::Cancelled => return None,
    };
    Some(Work {
        kind: JobKind::Scrub,
        disk: None,
        lu_name: None,
        state,
        done: scrub.done,
        total: scrub.total,
        started: Some(scrub.started),
    })
}

fn zeroing(group: &GroupStatus) -> impl Iterator<Item = Work> {
    group.zeroing.iter().map(|zero| Work {
        kind: JobKind::Zero,
        disk: None,
        lu_name: Some(zero.name.clone()),
        state: JobState::Running,
        done: zero.done,
        total: zero.total,
        started: None,
    })
}

fn start(number: u32, group: GroupUuid, work: &Work, now: u64) -> JobSave {
    JobSave {
        number,
        kind: work.kind,
        group,
        disk: work.disk,
        lu_name: work.lu_name.clone(),
        state: work.state,
        done: work.done,
        total: work.total,
        started: work.started.unwrap_or(now),
        ended: None,
        reason: String::new(),
    }
}

fn end(job: &mut JobSave, group: &GroupStatus, now: u64) {
    job.ended = Some(now);
    let member = group.members.iter().find(|m| Some(m.disk) == job.disk);
    let done = |reason: String| (JobState::Done, reason);
    let failed = |reason: String| (JobState::Failed, reason);
    (job.state, job.reason) = match job.kind {
        JobKind::Resync => done(String::new()),
        JobKind::Zero => match group
            .lus
            .iter()
            .any(|lu| Some(&lu.name) == job.lu_name.as_ref())
        {
            true => done(String::new()),
            false => failed("the LU is not there: its group stopped, or a write failed".into()),
        },
        JobKind::Recover | JobKind::Replace => match member {
            Some(m) if m.state == MemberState::InSync => done(String::new()),
            Some(m) => failed(m.reason.clone()),
            None => failed("the disk left the group".into()),
        },
        JobKind::Scrub => {
            let own = group.scrub.as_ref();
            match own.filter(|scrub| scrub.started == job.started) {
                Some(scrub) => {
                    job.ended = scrub.ended.or(job.ended);
                    job.done = scrub.done;
                    match scrub.state {
                        ScrubState::Cancelled => (JobState::Cancelled, scrub_left(scrub)),
                        _ => done(scrub_left(scrub)),
                    }
                }
                None => failed("another scrub took its place".into()),
            }
        }
    };
    if job.state == JobState::Done {
        job.done = job.total;
    }
}

/// What a scrub found and did not put right; empty if there is nothing.
pub fn scrub_left(scrub: &ScrubStatus) -> String {
    left_text(scrub.bad, scrub.repaired, scrub.unreadable)
}

/// The same from its counts.
pub fn left_text(bad: u64, repaired: u64, unreadable: u64) -> String {
    let mut parts = Vec::new();
    let left = bad.saturating_sub(repaired);
    if left > 0 {
        parts.push(format!("{left} bad stripes remain"));
    }
    if unreadable > 0 {
        parts.push(format!(
            "{unreadable} stripes could not be compared: more of them is unreadable than redundancy gives back"
        ));
    }
    parts.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::views::tests::{group, scrub as scrub_of};
    use lunar_api::target::{SyncStatus, ZeroStatus};

    /// A scrub that waits for a rebuild is a job beside it; paused it is one still; the next scrub is another job.
    #[test]
    fn derive_tells_scrubs_apart() {
        let mut tables = Tables::default();
        let mut one = group();
        one.scrub = Some(scrub_of(ScrubState::Running));
        let (done, total, rate, slot) = (0, 100, 1, None);
        let action = SyncAction::Resync;
        one.sync = Some(SyncStatus {
            action,
            done,
            total,
            rate,
            slot,
        });
        derive(&mut tables, &[one.clone()], 1);
        assert_eq!(tables.jobs.len(), 2);
        one.sync = None;
        one.scrub = Some(scrub_of(ScrubState::Paused));
        derive(&mut tables, &[one.clone()], 2);
        let states: Vec<_> = tables
            .jobs
            .values()
            .map(|job| (job.kind, job.state))
            .collect();
        let expected = [
            (JobKind::Resync, JobState::Done),
            (JobKind::Scrub, JobState::Paused),
        ];
        assert_eq!(states, expected);
        let mut next = scrub_of(ScrubState::Running);
        next.started += 1;
        one.scrub = Some(next.clone());
        derive(&mut tables, &[one.clone()], 3);
        assert_eq!(tables.jobs[&2].state, JobState::Failed);
        (next.state, next.bad, next.repaired, next.ended) = (ScrubState::Done, 3, 1, Some(77));
        one.scrub = Some(next);
        derive(&mut tables, &[one], 4);
        let job = &tables.jobs[&3];
        assert_eq!((job.state, job.ended), (JobState::Done, Some(77)));
        assert_eq!(job.reason, "2 bad stripes remain");
    }

    /// Given two LUs of a group that are zeroed, then each is a job by its name; one that is there in the end is done,
    /// one that is not has failed.
    #[test]
    fn derive_tells_zeroed_lus_apart() {
        let mut tables = Tables::default();
        let mut one = group();
        let zero = |name: &str, done| ZeroStatus {
            name: name.into(),
            done,
            total: 100,
            rate: 1,
        };
        one.zeroing = vec![zero("vol", 10), zero("other", 20)];
        derive(&mut tables, &[one.clone()], 1);
        one.zeroing = vec![zero("other", 90), zero("vol", 40)];
        derive(&mut tables, &[one.clone()], 2);
        let seen: Vec<_> = (tables.jobs.values())
            .map(|job| (job.kind, job.lu_name.as_deref(), job.done))
            .collect();
        let expected = [
            (JobKind::Zero, Some("vol"), 40),
            (JobKind::Zero, Some("other"), 90),
        ];
        assert_eq!(seen, expected);
        one.zeroing.clear();
        derive(&mut tables, &[one], 3);
        let states: Vec<_> = tables.jobs.values().map(|job| job.state).collect();
        assert_eq!(states, [JobState::Done, JobState::Failed]);
    }

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
