//! House rules that the compiler does not check. Each failure names file, line and what to do instead.
//!
//! Reads the checkout, never writes. Comments do not count: a rule is about code.

use std::fs;
use std::path::{Path, PathBuf};

/// Crates that must stay pure: the simulator runs them without a kernel and repeats every run exactly.
const PURE: [&str; 2] = ["ublk-target/engine/src", "mgmtd/api/src"];

/// What a pure crate may not name, and what it takes instead.
const IMPURE: [(&str, &str); 12] = [
    (
        "std::fs",
        "the caller reads and writes; take bytes or a `Disk`",
    ),
    ("std::net", "the caller talks; take messages"),
    ("std::thread", "the caller has the threads"),
    ("std::os", "the caller knows the operating system"),
    ("Instant::now", "take the time from `Clock`"),
    (
        "SystemTime",
        "take the time from `Clock`; never order by it",
    ),
    (
        "tokio",
        "async fns over the crate's own traits need no runtime",
    ),
    ("io_uring", "take a `Disk`"),
    ("libublk", "belongs to ublk-target/src/ublk.rs"),
    ("nix::", "the caller makes the system calls"),
    ("libc::", "the caller makes the system calls"),
    (
        "HashMap",
        "its order differs from run to run; take BTreeMap or a Vec",
    ),
];

/// The only files that may hold unsafe code, each under a `SAFETY:` comment.
const UNSAFE_ALLOWED: [&str; 13] = [
    "fixtures/disks/shim/src/lib.rs",
    "ublk-target/engine/src/gf.rs",
    "ublk-target/engine/src/parity.rs",
    "ublk-target/src/allocations.rs",
    "ublk-target/src/breadcrumb.rs",
    "ublk-target/src/buffers.rs",
    "ublk-target/src/executor.rs",
    "ublk-target/src/member_file.rs",
    "ublk-target/src/ring.rs",
    "ublk-target/src/sandbox.rs",
    "ublk-target/src/socket.rs",
    "ublk-target/src/ublk.rs",
    "ublk-target/src/ublk/device.rs",
];

const LINES_MAX: usize = 1000;

/// Folders that are not ours or not sources.
const SKIPPED: [&str; 3] = ["target", ".git", ".cache"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ lies in the checkout")
        .into()
}

fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            if !SKIPPED.iter().any(|name| path.ends_with(name)) {
                walk(&path, found);
            }
        } else {
            found.push(path);
        }
    }
}

fn files_below(relative: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(&root().join(relative), &mut found);
    found.sort();
    found
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|is| is == extension)
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

fn without_comment(line: &str) -> &str {
    line.split("//").next().unwrap_or(line)
}

/// Tells if `line` has `name` as whole words, so that `unsafe_code` or `my_tokio` do not count.
fn names(line: &str, name: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(name).any(|(at, _)| {
        let before = line[..at].chars().next_back().is_some_and(is_word);
        let after = line[at + name.len()..].chars().next().is_some_and(is_word);
        !(before || after && name.ends_with(is_word))
    })
}

/// The lines of `path`, numbered from 1, that name `word`.
fn lines_naming(path: &Path, word: &str) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let hits = text
        .lines()
        .enumerate()
        .filter(|(_, line)| names(without_comment(line), word));
    hits.map(|(index, _)| format!("{}:{}", shown(path), index + 1))
        .collect()
}

fn assert_none(rule: &str, findings: &[String]) {
    assert!(findings.is_empty(), "{rule}\n  {}", findings.join("\n  "));
}

#[test]
fn pure_crates_name_nothing_impure() {
    let mut findings = Vec::new();
    for path in PURE.iter().flat_map(|dir| files_below(dir)) {
        for (name, instead) in IMPURE {
            let hits = lines_naming(&path, name);
            findings.extend(
                hits.iter()
                    .map(|place| format!("{place}: `{name}`: {instead}")),
            );
        }
    }
    assert_none("engine and api are pure (design.md §1):", &findings);
}

#[test]
fn code_that_is_not_safe_only_in_listed_files() {
    let word = concat!("un", "safe");
    let mut findings = Vec::new();
    for path in files_below("")
        .into_iter()
        .filter(|path| has_extension(path, "rs"))
    {
        if !UNSAFE_ALLOWED.contains(&shown(&path).as_str()) {
            findings.extend(lines_naming(&path, word));
        }
    }
    assert_none(
        "move it behind a safe function in a file of UNSAFE_ALLOWED:",
        &findings,
    );
}

#[test]
fn fixtures_that_are_data_have_a_source() {
    let is_own_text = |path: &Path| {
        ["sh", "rs", "md", "txt", "toml"]
            .iter()
            .any(|e| has_extension(path, e))
    };
    let mut findings = Vec::new();
    for path in files_below("fixtures")
        .into_iter()
        .filter(|path| !is_own_text(path))
    {
        let folder = path.parent().unwrap();
        if !folder.join("SOURCE.txt").is_file() {
            findings.push(format!("{}: no SOURCE.txt beside it", shown(&path)));
        }
    }
    assert_none(
        "say in SOURCE.txt where data comes from and under which licence:",
        &findings,
    );
}

#[test]
fn files_are_short_enough_to_read() {
    let mut findings = Vec::new();
    let sources = files_below("");
    for path in sources
        .iter()
        .filter(|path| has_extension(path, "rs") || has_extension(path, "sh"))
    {
        let lines = fs::read_to_string(path).unwrap().lines().count();
        if lines > LINES_MAX {
            findings.push(format!("{}: {lines} lines", shown(path)));
        }
    }
    assert_none("split it by a noun (at most 1000 lines):", &findings);
}

#[test]
fn names_finds_whole_words_only() {
    let cases = [
        ("use std::fs;", "std::fs", true),
        ("use std::fs::File;", "std::fs", true),
        ("use std::fsx;", "std::fs", false),
        ("let my_tokio = 1;", "tokio", false),
        ("nix::unistd::getpid()", "nix::", true),
        ("unix::net", "nix::", false),
        ("#![forbid(unsafe_code)]", concat!("un", "safe"), false),
    ];
    for (line, name, expected) in cases {
        assert_eq!(names(line, name), expected, "{line} / {name}");
    }
}

/// A test that no part of tests/run.sh has runs nowhere.
#[test]
fn every_end_to_end_test_is_in_a_part() {
    let script = fs::read_to_string(root().join("tests/run.sh")).expect("tests/run.sh");
    let groups = |part: &str| -> Vec<&str> {
        let start = script.find(&format!("\npart_{part}() {{")).expect(part);
        let body = script[start..].split("\n}").next().expect("an end");
        let list = body.rsplit_once("e2e_groups").expect("its groups").1;
        list.split([' ', '\n', '\\'])
            .filter(|word| !word.is_empty())
            .collect()
    };
    let (short, long) = (groups("e2e"), groups("matrix"));
    assert!(short.len() > 20 && long.len() > 10, "{short:?} {long:?}");
    let nowhere: Vec<String> = lunar_tests::e2e::tests()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| {
            let of = if name.starts_with(lunar_tests::e2e::LONG) {
                &long
            } else {
                &short
            };
            !of.iter().any(|group| name.contains(group))
        })
        .collect();
    assert!(
        nowhere.is_empty(),
        "add their group to part_e2e or part_matrix of tests/run.sh: {nowhere:?}"
    );
}
