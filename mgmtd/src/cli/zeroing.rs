//! How far a LU is that is zeroed before it is there, shown beside the call that waits for it. Ctrl-C ends the call, not
//! the work.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use lunar_api::ApiError;
use lunar_api::mgmt::{Nothing, Request};
use lunar_api::rows::{JobKind, JobList, JobRow};

use crate::args::Args;
use crate::client::{Client, socket};
use crate::show;

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// Looks between two lines where there is no terminal.
const TURNS: u32 = 10;
/// Longest answer to a look.
const LOOK_LIMIT: Duration = Duration::from_secs(30);

/// Shows until it is dropped.
#[derive(Debug)]
pub(crate) struct Shown {
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Shown {
    /// Begins to show how far the LU of this name is.
    pub(crate) fn begin(args: &Args, name: String) -> Self {
        let path = socket(args.socket.as_deref(), args.system);
        let has_bar = std::io::stderr().is_terminal() && !args.json;
        let (end, ended) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let mut screen = Screen::new(has_bar);
            while ended.recv_timeout(PAUSE) == Err(RecvTimeoutError::Timeout) {
                // The call itself says what is wrong.
                if let Ok(Some(job)) = look(&path, &name) {
                    screen.show(&job);
                }
            }
            screen.clear();
        });
        Self {
            end: Some(end),
            thread: Some(thread),
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.end = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// The job that zeroes this LU now.
fn look(path: &Path, name: &str) -> Result<Option<JobRow>, ApiError> {
    let mut client = Client::open(path, LOOK_LIMIT)?;
    let all: JobList = client.call(&Request::JobList(Nothing {}))?;
    let is_it = |job: &JobRow| {
        job.kind == JobKind::Zero && job.ended.is_none() && job.lu_name.as_deref() == Some(name)
    };
    Ok(all.jobs.into_iter().find(is_it))
}

/// A bar, or a line now and then.
#[derive(Debug)]
struct Screen {
    has_bar: bool,
    bar: Option<indicatif::ProgressBar>,
    turns: u32,
}

impl Screen {
    fn new(has_bar: bool) -> Self {
        Self {
            has_bar,
            bar: None,
            turns: 0,
        }
    }

    fn show(&mut self, job: &JobRow) {
        if self.turns == 0 {
            let number = job.job;
            eprintln!("job {number} started, also after Ctrl-C. Follow: lunar job watch {number}");
        }
        if self.has_bar {
            let bar = self.bar.get_or_insert_with(|| show::bar(job));
            bar.set_position(job.done);
        } else if self.turns.is_multiple_of(TURNS) {
            eprintln!("{}", show::job_line(job));
        }
        self.turns += 1;
    }

    fn clear(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
