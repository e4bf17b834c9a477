//! What runs have seen, added up.

use super::plan::End;
use super::states::State;

/// Counts of runs.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    pub runs: u64,
    pub boots: u64,
    pub kills: u64,
    pub power_cuts: u64,
    pub requests: u64,
    pub sharing: u64,
    /// Requests that were outstanding, added up over samples.
    pub outstanding: u64,
    pub samples: u64,
    pub losses: u64,
    /// Runs with a crash and with a lost member.
    pub crash_and_loss: u64,
    pub refusals: u64,
    pub forced: u64,
    /// Runs that ended because nothing was left to start.
    pub given_up: u64,
    /// Runs in which redundancy was exhausted.
    pub exhausted: u64,
    pub errors: u64,
    pub events: u64,
    /// Crashes that hit each state, in the order of [`State::ALL`].
    pub hits: Vec<u64>,
    pub(super) has_crash: bool,
    pub(super) has_loss: bool,
}

impl Tally {
    pub fn new() -> Self {
        Self {
            hits: vec![0; State::ALL.len()],
            ..Self::default()
        }
    }

    /// A boot was crashed.
    pub fn crashed(&mut self, end: End, states: &[State]) {
        self.has_crash = true;
        match end {
            End::Power => self.power_cuts += 1,
            End::Kill | End::Stop => self.kills += 1,
        }
        for state in states {
            let at = State::ALL.iter().position(|one| one == state);
            self.hits[at.expect("one of all")] += 1;
        }
    }

    /// A member was lost.
    pub fn lost(&mut self) {
        self.losses += 1;
        self.has_loss = true;
    }

    /// The run has ended.
    pub fn ended(&mut self) {
        self.runs = 1;
        self.crash_and_loss = u64::from(self.has_crash && self.has_loss);
    }

    /// Adds those of another run.
    pub fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.runs, other.runs),
            (&mut self.boots, other.boots),
            (&mut self.kills, other.kills),
            (&mut self.power_cuts, other.power_cuts),
            (&mut self.requests, other.requests),
            (&mut self.sharing, other.sharing),
            (&mut self.outstanding, other.outstanding),
            (&mut self.samples, other.samples),
            (&mut self.losses, other.losses),
            (&mut self.crash_and_loss, other.crash_and_loss),
            (&mut self.refusals, other.refusals),
            (&mut self.forced, other.forced),
            (&mut self.given_up, other.given_up),
            (&mut self.exhausted, other.exhausted),
            (&mut self.errors, other.errors),
            (&mut self.events, other.events),
        ];
        for (to, from) in pairs {
            *to += from;
        }
        for (to, from) in self.hits.iter_mut().zip(&other.hits) {
            *to += from;
        }
    }

    /// Requests outstanding, on the average, in hundredths.
    pub fn mean_outstanding(&self) -> f64 {
        self.outstanding as f64 / self.samples.max(1) as f64
    }

    /// In a hundred requests, those that shared a stripe with another.
    pub fn sharing_percent(&self) -> f64 {
        100.0 * self.sharing as f64 / self.requests.max(1) as f64
    }

    /// In a hundred runs, those that have seen a crash and a loss.
    pub fn crash_and_loss_percent(&self) -> f64 {
        100.0 * self.crash_and_loss as f64 / self.runs.max(1) as f64
    }

    /// States that no crash has hit, of those that must be hit.
    pub fn missed_states(&self) -> Vec<State> {
        let pairs = State::ALL.iter().zip(&self.hits);
        pairs
            .filter(|(_, hits)| **hits == 0)
            .map(|(state, _)| *state)
            .collect()
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} runs, {} boots, {} kills, {} power cuts, {} members lost",
            self.runs, self.boots, self.kills, self.power_cuts, self.losses
        )?;
        writeln!(
            f,
            "{} requests, {} errors, {} events; {} starts refused with a reason, {} forced, {} runs given up, {} exhausted",
            self.requests,
            self.errors,
            self.events,
            self.refusals,
            self.forced,
            self.given_up,
            self.exhausted
        )?;
        writeln!(
            f,
            "mean outstanding {:.1}, {:.1} % of requests share a stripe, {:.1} % of runs see crash and loss",
            self.mean_outstanding(),
            self.sharing_percent(),
            self.crash_and_loss_percent()
        )?;
        writeln!(f, "crashes that hit:")?;
        for (state, hits) in State::ALL.iter().zip(&self.hits) {
            writeln!(f, "  {:<22} {hits}", format!("{state:?}"))?;
        }
        Ok(())
    }
}
