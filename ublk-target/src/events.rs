//! What happened lately, in order, for those who wait for it.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use lunar_api::target::TargetEvent;

/// Events kept; mgmtd asks all the time.
const EVENTS_KEPT: usize = 4096;
/// Events in one answer: they fit a message.
const EVENTS_ANSWERED: usize = 512;
/// Longest wait of one request.
const WAIT_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Log {
    events: VecDeque<TargetEvent>,
    last: u64,
}

/// The events of this process.
#[derive(Debug, Default)]
pub(crate) struct Events {
    log: Mutex<Log>,
    more: Condvar,
}

impl Events {
    /// Numbers and keeps events.
    pub(crate) fn push(&self, events: Vec<TargetEvent>) {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        for mut event in events {
            tracing::info!(name = event.name, group = ?event.group, text = event.text, "event");
            log.last += 1;
            event.seq = log.last;
            log.events.push_back(event);
            if log.events.len() > EVENTS_KEPT {
                log.events.pop_front();
            }
        }
        drop(log);
        self.more.notify_all();
    }

    /// Waits for events later than `after`; none when the time is over.
    pub(crate) fn after(&self, after: u64, wait: Duration) -> Vec<TargetEvent> {
        let deadline = Instant::now() + wait.min(WAIT_MAX);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if log.last > after || left.is_zero() {
                let later = log.events.iter().filter(|event| event.seq > after);
                return later.take(EVENTS_ANSWERED).cloned().collect();
            }
            log = self
                .more
                .wait_timeout(log, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(text: &str) -> TargetEvent {
        TargetEvent {
            seq: 0,
            name: "Fail".into(),
            group: None,
            disk: None,
            lu: None,
            text: text.into(),
        }
    }

    #[test]
    fn after_gives_what_is_later_and_keeps_a_limit() {
        let events = Events::default();
        assert!(events.after(0, Duration::ZERO).is_empty());
        events.push(
            (0..EVENTS_KEPT + 10)
                .map(|i| event(&i.to_string()))
                .collect(),
        );
        let first = events.after(0, Duration::from_secs(1));
        assert_eq!((first.len(), first[0].seq), (EVENTS_ANSWERED, 11));
        let last = events.after(EVENTS_KEPT as u64 + 9, Duration::ZERO);
        assert_eq!(last.len(), 1);
        assert_eq!(last[0].seq, EVENTS_KEPT as u64 + 10);
    }
}
