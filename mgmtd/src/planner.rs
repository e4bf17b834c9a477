//! What a changing verb will do, before it does it: steps, what dies, or that nothing changes. Pure.

use lunar_api::rows::{Changed, Outcome};
use lunar_api::{ApiError, ErrorKind};

/// A plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub steps: Vec<String>,
    /// What dies by it, exactly.
    pub dies: Vec<String>,
    /// The name that is typed to let it die.
    pub confirm: Option<String>,
    /// Why there is nothing to do.
    pub unchanged: Option<String>,
}

/// What may happen to a plan.
#[derive(Debug, Clone, PartialEq)]
pub enum Gate {
    /// Carry it out.
    Go,
    /// Answer this: unchanged, or only planned.
    Answer(Box<Changed>),
}

impl Plan {
    /// Makes a plan of one step.
    pub fn step(text: impl Into<String>) -> Self {
        Self {
            steps: vec![text.into()],
            ..Self::default()
        }
    }

    /// Makes the plan that does nothing.
    pub fn unchanged(why: impl Into<String>) -> Self {
        Self {
            unchanged: Some(why.into()),
            ..Self::default()
        }
    }

    /// Adds what dies.
    #[must_use]
    pub fn dies(mut self, what: impl Into<String>, confirm: &str) -> Self {
        self.dies.push(what.into());
        self.confirm = Some(confirm.into());
        self
    }

    /// Decides whether it is carried out.
    ///
    /// # Errors  `Refused` if something dies by it and nobody said yes
    pub fn gate(&self, dry_run: bool, yes: bool) -> Result<Gate, ApiError> {
        if let Some(why) = &self.unchanged {
            let text = vec![format!("unchanged: {why}")];
            return Ok(Gate::Answer(Box::new(Changed {
                text,
                ..empty(Outcome::Unchanged)
            })));
        }
        if dry_run {
            return Ok(Gate::Answer(Box::new(Changed {
                text: self.steps.iter().map(|s| format!("would {s}")).collect(),
                steps: self.steps.clone(),
                dies: self.dies.clone(),
                confirm: self.confirm.clone(),
                ..empty(Outcome::Planned)
            })));
        }
        if !yes && !self.dies.is_empty() {
            let mut error = ApiError::new(ErrorKind::Refused, "refused: data would die");
            error.causes.clone_from(&self.dies);
            return Err(error.hint("the same command with --yes, if that may die"));
        }
        Ok(Gate::Go)
    }

    /// Makes the answer after it was carried out.
    pub fn done(&self, text: impl Into<String>) -> Changed {
        let text = vec![text.into()];
        Changed {
            text,
            steps: self.steps.clone(),
            dies: self.dies.clone(),
            ..empty(Outcome::Changed)
        }
    }
}

/// An answer with nothing in it.
pub fn empty(outcome: Outcome) -> Changed {
    Changed {
        outcome,
        text: Vec::new(),
        steps: Vec::new(),
        dies: Vec::new(),
        confirm: None,
        job: None,
        disks: Vec::new(),
        group: None,
        lu: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_table() {
        let kills = Plan::step("delete").dies("1 GiB", "vol");
        assert_eq!(
            kills.gate(false, false).unwrap_err().kind,
            ErrorKind::Refused
        );
        assert_eq!(kills.gate(false, true), Ok(Gate::Go));
        assert!(
            matches!(kills.gate(true, false), Ok(Gate::Answer(a)) if a.outcome == Outcome::Planned)
        );
        assert_eq!(Plan::step("rename").gate(false, false), Ok(Gate::Go));
        let same = Plan::unchanged("so it is").gate(false, false);
        assert!(matches!(same, Ok(Gate::Answer(a)) if a.outcome == Outcome::Unchanged));
    }
}
