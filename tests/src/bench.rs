//! The report of the benchmarks: CSVs of rounds and a list of goals in, Markdown tables out.
//!
//! A CSV `SET-MEMBERS.csv` has one row for each round, workload and target:
//! `workload,round,target,iops,kib_s,p50_us,p99_us,cpu_us`; lines that begin with `#` are notes. A ratio is Lunar's
//! figure by the peer's in the same round, so that what swings for both swings out of it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The target that the ratios are about; in the set `loop` it is the ring and executor alone.
const LUNAR: &str = "lunar";
const LOOP: &str = "bench-loop";

/// One line of a CSV.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    workload: String,
    round: u32,
    target: String,
    /// iops, kib_s, p50_us, p99_us, cpu_us; NaN where the field is empty.
    of: [f64; 5],
}

const IOPS: usize = 0;
const P99: usize = 3;
const CPU: usize = 4;

/// All rounds of one set on one kind of members.
#[derive(Debug, Clone, PartialEq)]
pub struct Set {
    name: String,
    members: String,
    rows: Vec<Row>,
    notes: Vec<String>,
}

/// What a row is measured by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    /// Ratio of IOPS, at least.
    Iops,
    /// Ratio of the 99th percentile of latency, at most.
    P99,
    /// Ratio of the server's CPU time for one I/O, at most.
    Cpu,
    /// Lunar's own figure, at most.
    Value,
}

/// A line of goals.txt.
#[derive(Debug, Clone, PartialEq)]
pub struct Goal {
    measure: Measure,
    set: String,
    members: String,
    workload: String,
    peer: String,
    /// None: said to have no goal.
    bound: Option<f64>,
}

/// Reads a CSV.
///
/// # Errors  the line that is none, named
pub fn parse_set(file: &str, text: &str) -> Result<Set, String> {
    let stem = file.strip_suffix(".csv").unwrap_or(file);
    let (name, members) = stem
        .split_once('-')
        .ok_or_else(|| format!("{file}: the name is not SET-MEMBERS.csv"))?;
    let mut set = Set {
        name: name.to_owned(),
        members: members.to_owned(),
        rows: Vec::new(),
        notes: Vec::new(),
    };
    for (i, line) in text.lines().enumerate() {
        if let Some(note) = line.strip_prefix("# ") {
            set.notes.push(note.to_owned());
        } else if i > 0 {
            let row = parse_row(line).ok_or_else(|| format!("{file}:{}: `{line}`", i + 1))?;
            set.rows.push(row);
        }
    }
    Ok(set)
}

fn parse_row(line: &str) -> Option<Row> {
    let fields: Vec<&str> = line.split(',').collect();
    let [workload, round, target, figures @ ..] = fields.as_slice() else {
        return None;
    };
    let mut of = [f64::NAN; 5];
    if figures.len() != of.len() {
        return None;
    }
    for (of, text) in of.iter_mut().zip(figures) {
        if !text.is_empty() {
            *of = text.parse().ok()?;
        }
    }
    Some(Row {
        workload: (*workload).to_owned(),
        round: round.parse().ok()?,
        target: (*target).to_owned(),
        of,
    })
}

/// Reads goals.txt.
///
/// # Errors  the line that is none, named
pub fn parse_goals(text: &str) -> Result<Vec<Goal>, String> {
    let lines = text.lines().enumerate();
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|(i, line)| parse_goal(line).ok_or_else(|| format!("goals.txt:{}: `{line}`", i + 1)))
        .collect()
}

fn parse_goal(line: &str) -> Option<Goal> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let &[measure, set, members, workload, peer, bound] = words.as_slice() else {
        return None;
    };
    Some(Goal {
        measure: match measure {
            "iops" => Measure::Iops,
            "p99" => Measure::P99,
            "cpu" => Measure::Cpu,
            "value" => Measure::Value,
            _ => return None,
        },
        set: set.to_owned(),
        members: members.to_owned(),
        workload: workload.to_owned(),
        peer: peer.to_owned(),
        bound: match bound {
            "-" => None,
            bound => Some(bound.parse().ok()?),
        },
    })
}

/// Says whether a name fits a pattern of `*`, `?` and sets of letters in brackets.
fn fits(pattern: &str, name: &str) -> bool {
    let mut rest = pattern.chars();
    match rest.next() {
        None => name.is_empty(),
        Some('*') => {
            let rest = rest.as_str();
            (0..=name.len()).any(|at| name.is_char_boundary(at) && fits(rest, &name[at..]))
        }
        Some(first) => {
            let mut of_name = name.chars();
            let Some(letter) = of_name.next() else {
                return false;
            };
            let (hit, rest) = match (first, rest.as_str().split_once(']')) {
                ('?', _) => (true, rest.as_str()),
                ('[', Some((set, rest))) => (set.contains(letter), rest),
                _ => (first == letter, rest.as_str()),
            };
            hit && fits(rest, of_name.as_str())
        }
    }
}

fn bound(goals: &[Goal], measure: Measure, set: &Set, workload: &str, peer: &str) -> Option<f64> {
    let mut of_measure = goals.iter().filter(|goal| goal.measure == measure);
    let goal = of_measure.find(|goal| {
        fits(&goal.set, &set.name)
            && fits(&goal.members, &set.members)
            && fits(&goal.workload, workload)
            && fits(&goal.peer, peer)
    });
    goal.and_then(|goal| goal.bound)
}

/// The value below which a share `q` of the values lie; between two values, the one on the worse side of a quartile.
///
/// # Panics  if there are no values
fn quantile(values: &[f64], q: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a handful of rounds"
    )]
    let at = {
        let at = (values.len() - 1) as f64 * q;
        (if q < 0.5 { at.floor() } else { at.ceil() }) as usize
    };
    values[at]
}

impl Set {
    fn lunar(&self) -> &'static str {
        if self.name == "loop" { LOOP } else { LUNAR }
    }

    /// Names of a column in order of first appearance.
    fn names<'a>(&'a self, of: impl Fn(&'a Row) -> &'a str) -> Vec<&'a str> {
        let mut names = Vec::new();
        for row in &self.rows {
            if !names.contains(&of(row)) {
                names.push(of(row));
            }
        }
        names
    }

    /// A figure of every round in which both have it: (Lunar's, the peer's).
    fn pairs(&self, workload: &str, peer: &str, figure: usize) -> Vec<(f64, f64)> {
        let of = |target: &str| -> BTreeMap<u32, f64> {
            let rows = self
                .rows
                .iter()
                .filter(|row| row.workload == workload && row.target == target);
            rows.map(|row| (row.round, row.of[figure])).collect()
        };
        let (mine, theirs) = (of(self.lunar()), of(peer));
        let both = mine
            .iter()
            .filter_map(|(round, mine)| Some((*mine, *theirs.get(round)?)));
        both.filter(|(mine, theirs)| *mine > 0.0 && *theirs > 0.0)
            .collect()
    }
}

/// A line of the report: how far it is from its goal (above 1: reached), and its cells.
struct Line {
    reached: Option<f64>,
    cells: String,
}

fn lines_of(set: &Set, goals: &[Goal]) -> Vec<Line> {
    let mut lines = Vec::new();
    for workload in set.names(|row| &row.workload) {
        for peer in set.names(|row| &row.target) {
            if peer == set.lunar() {
                lines.extend(value_line(set, goals, workload));
                continue;
            }
            let iops = set.pairs(workload, peer, IOPS);
            if iops.is_empty() {
                continue;
            }
            let (p99, cpu) = (
                set.pairs(workload, peer, P99),
                set.pairs(workload, peer, CPU),
            );
            let wanted = |measure| bound(goals, measure, set, workload, peer);
            let measured = [
                (Measure::Iops, &iops),
                (Measure::P99, &p99),
                (Measure::Cpu, &cpu),
            ];
            let mut with_goal = 0;
            for (measure, pairs) in measured {
                if let (Some(bound), false) = (wanted(measure), pairs.is_empty()) {
                    lines.push(ratio_line(set, workload, peer, measure, pairs, Some(bound)));
                    with_goal += 1;
                }
            }
            if with_goal == 0 {
                lines.push(ratio_line(set, workload, peer, Measure::Iops, &iops, None));
            }
        }
    }
    lines
}

fn value_line(set: &Set, goals: &[Goal], workload: &str) -> Option<Line> {
    let bound = bound(goals, Measure::Value, set, workload, "-")?;
    let rows = set
        .rows
        .iter()
        .filter(|row| row.workload == workload && row.target == set.lunar());
    let values: Vec<f64> = rows.map(|row| row.of[IOPS]).collect();
    let (median, upper) = (quantile(&values, 0.5), quantile(&values, 0.75));
    let verdict = if upper <= bound { "yes" } else { "no" };
    Some(Line {
        reached: Some(bound / upper.max(f64::MIN_POSITIVE)),
        cells: format!(
            "| {} | {} | {workload} | - | value | {median:.0} | | | {upper:.0} | <= {bound} | {verdict} | {} |",
            set.name,
            set.members,
            values.len()
        ),
    })
}

fn ratio_line(
    set: &Set,
    workload: &str,
    peer: &str,
    measure: Measure,
    pairs: &[(f64, f64)],
    bound: Option<f64>,
) -> Line {
    let ratios: Vec<f64> = pairs.iter().map(|(mine, theirs)| mine / theirs).collect();
    let (mine, theirs): (Vec<f64>, Vec<f64>) = pairs.iter().copied().unzip();
    let (name, sign, quartile) = match measure {
        Measure::Iops => ("IOPS", ">=", quantile(&ratios, 0.25)),
        Measure::P99 => ("p99 us", "<=", quantile(&ratios, 0.75)),
        Measure::Cpu | Measure::Value => ("CPU us", "<=", quantile(&ratios, 0.75)),
    };
    let reached = bound.map(|bound| match measure {
        Measure::Iops => quartile / bound,
        Measure::P99 | Measure::Cpu | Measure::Value => bound / quartile,
    });
    let verdict = match (bound, reached) {
        (Some(bound), Some(reached)) => format!(
            "{sign} {bound} | {}",
            if reached >= 1.0 { "yes" } else { "no" }
        ),
        _ => " | ".to_owned(),
    };
    Line {
        reached,
        cells: format!(
            "| {} | {} | {workload} | {peer} | {name} | {:.0} | {:.0} | **{:.2}** | {quartile:.2} | {verdict} | {} |",
            set.name,
            set.members,
            quantile(&mine, 0.5),
            quantile(&theirs, 0.5),
            quantile(&ratios, 0.5),
            pairs.len(),
        ),
    }
}

/// Writes all tables: rows with a goal, the worst first; rows for information; notes.
pub fn report(sets: &[Set], goals: &[Goal]) -> String {
    let head = "| set | members | workload | peer | measure | Lunar | peer's | ratio | quartile | goal | reached | rounds |\n\
                |---|---|---|---|---|---|---|---|---|---|---|---|\n";
    let mut with: Vec<(f64, String)> = Vec::new();
    let mut without = Vec::new();
    for line in sets.iter().flat_map(|set| lines_of(set, goals)) {
        match line.reached {
            Some(reached) => with.push((reached, line.cells)),
            None => without.push(line.cells),
        }
    }
    with.sort_by(|a, b| a.0.total_cmp(&b.0));
    let hits = with.iter().filter(|(reached, _)| *reached >= 1.0).count();
    let mut text = format!(
        "### Rows with a goal, the worst first: {hits} of {} reached\n\n{head}",
        with.len()
    );
    for (_, cells) in with {
        let _ = writeln!(text, "{cells}");
    }
    let _ = write!(text, "\n### For information\n\n{head}");
    for cells in without {
        let _ = writeln!(text, "{cells}");
    }
    text.push_str("\n### Notes: how it was run\n\n");
    for set in sets {
        for note in &set.notes {
            let _ = writeln!(text, "- {}-{}: {note}", set.name, set.members);
        }
    }
    text
}

/// Writes one workload of one set for the screen, while others are still measured.
pub fn progress(set: &Set, workload: &str) -> String {
    let mut text = String::new();
    for target in set.names(|row| &row.target) {
        let rows = set
            .rows
            .iter()
            .filter(|row| row.workload == workload && row.target == target);
        let rows: Vec<&Row> = rows.collect();
        if rows.is_empty() {
            continue;
        }
        let median = |figure: usize| {
            let values: Vec<f64> = rows.iter().map(|row| row.of[figure]).collect();
            quantile(&values, 0.5)
        };
        let _ = write!(text, "{workload:<14} {target:<14} {:>9.0}", median(IOPS));
        if !median(P99).is_nan() {
            let _ = write!(text, " IOPS {:>8.0} us p99", median(P99));
        }
        let ratios: Vec<f64> = set
            .pairs(workload, target, IOPS)
            .iter()
            .map(|(a, b)| a / b)
            .collect();
        if target != set.lunar() && !ratios.is_empty() {
            let _ = write!(
                text,
                "  ratio {:.2} (lower quartile {:.2})",
                quantile(&ratios, 0.5),
                quantile(&ratios, 0.25)
            );
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const CSV: &str = "workload,round,target,iops,kib_s,p50_us,p99_us,cpu_us\n\
        read4k,1,md,100,400,5,10,\nread4k,1,lunar,150,600,5,10,2.0\n\
        read4k,2,lunar,90,360,5,50,2.0\nread4k,2,md,100,400,5,10,\n\
        resident,1,lunar,60,,,,\n# runs of 1 s\n";

    #[test]
    fn ratios_are_taken_within_a_round_and_the_worse_quartile_decides() {
        let set = parse_set("raid0-ram.csv", CSV).unwrap();
        let goals =
            parse_goals("iops raid? ram read* md 0.95\np99 * * * md 2\nvalue * * resident - 64\n")
                .unwrap();
        let text = report(&[set], &goals);
        assert!(text.contains("worst first: 1 of 3 reached"), "{text}");
        assert!(
            text.contains(
                "| read4k | md | IOPS | 150 | 100 | **1.50** | 0.90 | >= 0.95 | no | 2 |"
            ),
            "{text}"
        );
        assert!(
            text.contains("| read4k | md | p99 us | 50 | 10 | **5.00** | 5.00 | <= 2 | no | 2 |"),
            "{text}"
        );
        assert!(
            text.contains("| resident | - | value | 60 | | | 60 | <= 64 | yes | 1 |"),
            "{text}"
        );
        assert!(text.contains("- raid0-ram: runs of 1 s"), "{text}");
        let (worst, best) = (text.find("p99 us").unwrap(), text.find("resident").unwrap());
        assert!(worst < best, "the worst is not first: {text}");
    }

    #[test]
    fn the_first_goal_that_fits_counts_and_a_dash_is_none() {
        let set = parse_set("raid0-ram.csv", CSV).unwrap();
        let goals = parse_goals("iops raid0 * * md -\niops * * * * 9\n").unwrap();
        assert_eq!(bound(&goals, Measure::Iops, &set, "read4k", "md"), None);
        assert_eq!(
            bound(&goals, Measure::Iops, &set, "read4k", "raw"),
            Some(9.0)
        );
        assert_eq!(bound(&goals, Measure::P99, &set, "read4k", "md"), None);
    }

    #[test]
    fn patterns_fit_as_file_names_do() {
        for (pattern, name, fit) in [
            ("*", "", true),
            ("?*4k*", "read4k", true),
            ("?*4k*", "write4k-4j", true),
            ("?*4k*", "read1m", false),
            ("raid[56]", "raid6", true),
            ("raid[56]", "raid10", false),
            ("raid[56]", "raid", false),
            ("md-*", "md-t0", true),
            ("md-*", "md", false),
        ] {
            assert_eq!(fits(pattern, name), fit, "{pattern} {name}");
        }
    }

    #[test]
    fn a_line_that_is_none_is_named() {
        assert_eq!(
            parse_set("raid0-ram.csv", "head\nread4k,1,md,1,2\n").unwrap_err(),
            "raid0-ram.csv:2: `read4k,1,md,1,2`"
        );
        assert!(
            parse_set("raid0.csv", "")
                .unwrap_err()
                .contains("SET-MEMBERS")
        );
        assert_eq!(
            parse_goals("# x\n\nfast * * * * 1\n").unwrap_err(),
            "goals.txt:3: `fast * * * * 1`"
        );
    }

    #[test]
    fn the_committed_goals_and_figures_are_read() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("bench");
        parse_goals(&std::fs::read_to_string(dir.join("goals.txt")).unwrap()).unwrap();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|kind| kind == "csv") {
                let name = path.file_name().unwrap().to_str().unwrap();
                parse_set(name, &std::fs::read_to_string(&path).unwrap()).unwrap();
            }
        }
    }
}
