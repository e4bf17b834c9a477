//! A failing run made small: parts of its plan are left out as long as the same law is broken.

use std::fmt;
use std::str::FromStr;

use super::plan::Plan;
use super::run::{Law, Outcome, Plant};
use super::sweep::run_plan;

/// A run that is kept: a seed, and what is left out of its plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    pub seed: u64,
    /// Parts of the plan, by number.
    pub without: Vec<usize>,
    /// In a hundred, the requests that are sent.
    pub load: u64,
}

impl Kept {
    pub fn whole(seed: u64) -> Self {
        Self {
            seed,
            without: Vec::new(),
            load: 100,
        }
    }

    pub fn plan(&self) -> Plan {
        let mut plan = Plan::draw(self.seed).without(&self.without);
        for boot in &mut plan.boots {
            boot.requests = boot.requests * self.load / 100;
        }
        plan
    }

    fn run(&self, plant: Option<Plant>) -> Outcome {
        run_plan(&self.plan(), plant)
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.seed)?;
        if !self.without.is_empty() {
            let parts: Vec<String> = self.without.iter().map(ToString::to_string).collect();
            write!(f, " without {}", parts.join(","))?;
        }
        if self.load != 100 {
            write!(f, " load {}", self.load)?;
        }
        Ok(())
    }
}

impl FromStr for Kept {
    type Err = String;

    /// As it is displayed; what follows a `#` is for people.
    fn from_str(text: &str) -> Result<Self, String> {
        let said = text.split('#').next().unwrap_or("");
        let mut words = said.split_whitespace();
        let mut number = || -> Result<u64, String> {
            let word = words.next().ok_or("a number is missing")?;
            word.parse().map_err(|_| format!("{word} is no number"))
        };
        let mut kept = Self::whole(number()?);
        let rest: Vec<&str> = said.split_whitespace().skip(1).collect();
        for pair in rest.chunks(2) {
            match pair {
                ["without", parts] => {
                    let parts = parts.split(',').map(str::parse);
                    kept.without = parts.collect::<Result<_, _>>().map_err(|_| text)?;
                }
                ["load", load] => kept.load = load.parse().map_err(|_| text)?,
                _ => return Err(format!("{text}: SEED [without N,N..] [load N] [# cause]")),
            }
        }
        Ok(kept)
    }
}

/// The runs of a file of kept seeds.
///
/// # Errors  a line that is none
pub fn parse(file: &str) -> Result<Vec<Kept>, String> {
    let lines = file.lines().filter(|line| {
        let said = line.split('#').next().unwrap_or("");
        !said.trim().is_empty()
    });
    lines.map(str::parse).collect()
}

/// Leaves out of a failing run what is not needed to break the law; at most so many runs.
pub fn shrink(seed: u64, law: Law, plant: Option<Plant>, mut runs: u32) -> Kept {
    let mut best = Kept::whole(seed);
    let mut fails = |kept: &Kept| {
        if runs == 0 {
            return false;
        }
        runs -= 1;
        let found = kept.run(plant).violation;
        found.is_some_and(|violation| violation.law == law)
    };
    let parts = Plan::draw(seed).parts();
    // Half of them at once, then fewer.
    let mut size = parts.div_ceil(2).max(1);
    loop {
        for from in (0..parts).step_by(size) {
            let more = (from..(from + size).min(parts)).filter(|part| !best.without.contains(part));
            let mut tried = best.clone();
            tried.without.extend(more);
            tried.without.sort_unstable();
            if tried.without.len() > best.without.len() && fails(&tried) {
                best = tried;
            }
        }
        if size == 1 {
            break;
        }
        size = size.div_ceil(2);
    }
    for load in [10, 25, 50, 75] {
        let tried = Kept {
            load,
            ..best.clone()
        };
        if fails(&tried) {
            best = tried;
            break;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_runs_are_read_as_they_are_written() {
        for kept in [
            Kept::whole(17),
            Kept {
                seed: 4,
                without: vec![1, 3, 12],
                load: 25,
            },
        ] {
            assert_eq!(kept.to_string().parse(), Ok(kept));
        }
        let file = "# kept\n\n17 without 1 # a cause\n3\n";
        assert_eq!(parse(file).unwrap().len(), 2);
        assert!(parse("x").is_err() && parse("3 with 4").is_err());
    }
}
