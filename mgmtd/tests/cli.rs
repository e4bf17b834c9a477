//! What `lunar` prints, held by golden files: the real program against a mgmtd that answers samples.
//!
//! Every verb of the command tree has a manual page, completions and a golden file `fixtures/golden/json/VERB.json`;
//! a new verb without them fails here. `LUNAR_BLESS=1` writes the golden files.

mod samples;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};

use lunar_api::rows::*;
use lunar_api::{ApiError, ErrorKind};
use serde_json::{Value, json};

use samples::*;

/// Every verb, and what is typed after it. A new verb needs a line here, and an answer in [`answer`].
const VERBS: &[(&str, &str)] = &[
    ("status", ""),
    ("table", "disks"),
    ("events", ""),
    ("events --test", ""),
    ("doctor", ""),
    ("metrics", ""),
    ("stat", ""),
    ("report", ""),
    ("job list", ""),
    ("job watch", "7"),
    ("job cancel", "7"),
    ("disk add", "/dev/sdb"),
    ("disk list", ""),
    ("disk show", "1"),
    ("disk locate", "1"),
    ("disk fail", "1"),
    ("disk replace", "1 2"),
    ("disk remove", "1-2"),
    ("group create", "data --level raid5 --disks 1-3"),
    ("group list", ""),
    ("group show", "data"),
    ("group set", "data --rebuild-max 1MiB"),
    ("group scrub", "data"),
    ("group start", "data"),
    ("group resolve", "data --keep 1 --yes"),
    ("group stop", "data"),
    ("group grow", "data"),
    ("group rename", "data archive"),
    ("group delete", "data --yes"),
    ("lu create", "vol --group data --size max"),
    ("lu list", ""),
    ("lu show", "vol"),
    ("lu rename", "vol archive"),
    ("lu set", "vol --queues 2"),
    ("lu resize", "vol +10GiB"),
    ("lu delete", "vol --yes"),
    ("path list", ""),
    ("import", "/dev/sdb"),
    ("config save", ""),
    ("config load", "Cargo.toml"),
    ("shutdown", "--yes"),
    ("upgrade", "--check"),
];

/// Verbs that print a file for another program, not data.
const NO_JSON: [&str; 1] = ["completions"];

/// The clock of `stat`: half a second more with every look.
static STAT_AT: AtomicU64 = AtomicU64::new(1000);

/// What the mgmtd of these tests answers to a method.
fn answer(method: &str, ask: &Value) -> Value {
    let value = match method {
        "Status" => serde_json::to_value(status()),
        "Events" if ask["after"].as_u64() > Some(0) => json_of(EventsReply { events: Vec::new() }),
        "Events" => json_of(EventsReply {
            events: vec![event()],
        }),
        "Doctor" => json_of(doctor()),
        "Metrics" => json_of(MetricsReply {
            text: "lunar_target_up 1\n".into(),
        }),
        "Report" => json_of(ReportReply {
            text: "Lunar\n".into(),
        }),
        "Stat" => json_of(stat(STAT_AT.fetch_add(500, Ordering::Relaxed))),
        "DiskLocate" => json_of(locate()),
        "JobList" => json_of(JobList { jobs: vec![job()] }),
        "JobShow" => json_of(JobOneReply { job: job() }),
        "DiskList" => json_of(DiskList {
            disks: vec![disk_row()],
        }),
        "DiskShow" => json_of(DiskOne { disk: disk_show() }),
        "GroupList" => json_of(GroupList {
            groups: vec![group_row()],
        }),
        "GroupShow" => json_of(GroupOne {
            group: group_show(),
        }),
        "LuList" => json_of(LuList {
            lus: vec![lu_row()],
        }),
        "LuShow" => json_of(LuOne { lu: lu_show() }),
        "PathList" => json_of(PathList {
            paths: vec![path_row()],
        }),
        "Upgrade" => json_of(upgrade()),
        "ConfigSave" => json_of(config_text()),
        _ => json_of(changed()),
    };
    value.unwrap()
}

fn json_of(reply: impl serde::Serialize) -> serde_json::Result<Value> {
    serde_json::to_value(reply)
}

/// A mgmtd that knows samples only; ends with the test.
struct Fake {
    socket: PathBuf,
}

impl Fake {
    fn new(name: &str) -> Self {
        Self::that(name, answer)
    }

    fn that(name: &str, answer: fn(&str, &Value) -> Value) -> Self {
        let socket = std::env::temp_dir().join(format!("lunar-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        std::thread::spawn(move || {
            listener.incoming().flatten().for_each(|stream| {
                std::thread::spawn(move || serve(stream, answer));
            });
        });
        Self { socket }
    }

    fn lunar(&self, args: &str) -> Output {
        let socket = self.socket.display().to_string();
        lunar(&format!("--socket {socket} {args}"), &[])
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Answers the calls of one connection. `nosuch` is in use, and says so.
fn serve(mut stream: UnixStream, answer: fn(&str, &Value) -> Value) -> std::io::Result<()> {
    let mut buffer = Vec::new();
    loop {
        let mut piece = [0; 4096];
        let len = stream.read(&mut piece)?;
        if len == 0 {
            return Ok(());
        }
        buffer.extend_from_slice(&piece[..len]);
        while let Some(at) = buffer.iter().position(|b| *b == 0) {
            let rest = buffer.split_off(at + 1);
            buffer.pop();
            let call: Value = serde_json::from_slice(&buffer)?;
            buffer = rest;
            let method = call["method"].as_str().unwrap().replace("io.lunar.", "");
            let whole = if call.to_string().contains("nosuch") {
                let error = ApiError::new(ErrorKind::Busy, "LU vol is not deleted: in use");
                let error = error.because("/dev/ublkb0 is mounted at /srv");
                json!({"error": "io.lunar.Error", "parameters": error.hint("umount /srv")})
            } else {
                json!({"parameters": answer(&method, &call["parameters"])})
            };
            stream.write_all(&[whole.to_string().as_bytes(), &[0]].concat())?;
        }
    }
}

fn lunar(args: &str, env: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lunar"))
        .args(args.split_whitespace())
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../fixtures/golden/json/{name}.json"))
}

/// `disk add` is in disk.add.json, `events --test` in events.test.json.
fn file_of(verb: &str) -> String {
    verb.replace(' ', ".").replace("--", "")
}

/// The command tree, as its manual pages show it: verbs only, no nouns.
fn verbs() -> BTreeSet<String> {
    let dir = std::env::temp_dir().join(format!("lunar-man-{}", std::process::id()));
    let made = lunar(&format!("man --out {}", dir.display()), &[]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let names: BTreeSet<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .map(|name| name.trim_end_matches(".1").to_string())
        .collect();
    for name in &names {
        let page = std::fs::read_to_string(dir.join(format!("{name}.1"))).unwrap();
        for part in [
            ".TH ",
            ".SH NAME",
            ".SH SYNOPSIS",
            ".SH EXAMPLES",
            ".SH \"SEE ALSO\"",
        ] {
            assert!(page.contains(part), "{name}.1 has no {part}");
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
    let is_verb = |name: &&String| {
        !names
            .iter()
            .any(|other| other.starts_with(&format!("{name}-")))
    };
    let words = |name: &String| name.trim_start_matches("lunar-").replace('-', " ");
    let hidden = |name: &String| name != "man";
    names
        .iter()
        .filter(is_verb)
        .map(words)
        .filter(hidden)
        .collect()
}

/// Given every verb of the command tree, when it is given with `--json`, then it prints the envelope with its own
/// schema's name, and what the golden file holds.
#[test]
fn every_verb_has_a_golden_file() {
    let verbs_only = VERBS.iter().filter(|(verb, _)| !verb.contains("--"));
    let known: BTreeSet<String> = verbs_only.map(|(verb, _)| verb.to_string()).collect();
    let mut wanted = verbs();
    NO_JSON
        .iter()
        .for_each(|verb| assert!(wanted.remove(*verb)));
    assert_eq!(
        known, wanted,
        "left: VERBS of this test; right: the command tree"
    );
    let fake = Fake::new("golden");
    for (verb, rest) in VERBS {
        let out = fake.lunar(&format!("{verb} {rest} --json"));
        let printed = text(&out.stdout);
        assert!(out.stderr.is_empty(), "{verb}: {}", text(&out.stderr));
        let value: Value =
            serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{verb}: {e}: {printed}"));
        let name = file_of(verb);
        let schema = value["schema"].as_str().unwrap();
        assert!(schema.starts_with(&format!("lunar.{name}")), "{schema}");
        hold(
            &golden(&name),
            &(serde_json::to_string_pretty(&value).unwrap() + "\n"),
        );
    }
}

/// Given the golden files, then each belongs to a verb that is there, or is the error.
#[test]
fn golden_files_have_verbs() {
    let mut known: BTreeSet<String> = VERBS.iter().map(|(verb, _)| file_of(verb)).collect();
    known.insert("error".into());
    for entry in std::fs::read_dir(golden("error").parent().unwrap()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if let Some(name) = name.strip_suffix(".json") {
            assert!(known.contains(name), "{name}.json belongs to no verb");
        }
    }
}

/// Given an answer that is an error, then its text says what, why and what to type, and the exit code is its kind's;
/// with `--json` it is an object.
#[test]
fn errors_say_what_why_and_what_to_type() {
    let fake = Fake::new("error");
    let out = fake.lunar("lu delete nosuch");
    assert_eq!(out.status.code(), Some(7));
    let said = text(&out.stderr);
    assert_eq!(
        said,
        "lunar: LU vol is not deleted: in use\n  because: /dev/ublkb0 is mounted at /srv\nTry: umount /srv\n"
    );
    let out = fake.lunar("lu delete nosuch --json");
    let value: Value = serde_json::from_slice(&out.stderr).unwrap();
    hold(
        &golden("error"),
        &(serde_json::to_string_pretty(&value).unwrap() + "\n"),
    );
}

/// Given a LU that is zeroed before it is there, when its job is a quarter done, then the call that waits for the LU
/// shows that, and how to follow it once that call is ended; in the end it answers as always.
#[test]
fn zeroing_is_shown_while_it_is_waited_for() {
    static LOOKS: AtomicU64 = AtomicU64::new(0);
    fn zeroing(method: &str, ask: &Value) -> Value {
        match method {
            "JobList" => {
                let mut zero = job();
                (zero.kind, zero.disk, zero.lu_name) = (JobKind::Zero, None, Some("vol".into()));
                (zero.state, zero.ended, zero.done, zero.total) = (JobState::Running, None, 2, 8);
                LOOKS.fetch_add(1, Ordering::Relaxed);
                json_of(JobList { jobs: vec![zero] }).unwrap()
            }
            // Not there before somebody has looked twice.
            "LuCreate" => {
                while LOOKS.load(Ordering::Relaxed) < 2 {
                    std::thread::yield_now();
                }
                answer(method, ask)
            }
            _ => answer(method, ask),
        }
    }
    let fake = Fake::that("zeroing", zeroing);
    let out = fake.lunar("lu create vol --group data --size max --zero --json");
    let said = text(&out.stderr);
    assert!(out.status.success(), "{said}");
    let expected = "job 7 started, also after Ctrl-C. Follow: lunar job watch 7\n\
                    job 7: zero of LU vol in group data: 25.0 %, 2 B/s, about 3 s\n";
    assert_eq!(said, expected);
    let value: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(value["schema"], "lunar.lu.create/1");
}

/// Given what cannot be typed so, then the exit code is 2, nothing is on stdout, and there is something to type.
#[test]
fn bad_arguments_are_usage() {
    for bad in [
        "nosuch",
        "disk nosuch",
        "disk add",
        "disk add --role king /dev/sdb",
        "group create data --level raid99 --disks 1-3",
        "group create data --level raid5",
        "group create data --level raid5 --disks 1-3 --chunk 1.5K",
        "group set data --rebuild-max -1",
        "lu create vol --group data",
        "lu create vol --group data --size 0%",
        "lu create vol --group data --size 101%",
        "lu create vol --group data --size -1",
        "lu create vol --group data --size max --depth 70000",
        "lu delete",
        "job watch x",
        "job watch 4294967296",
        "--system 0 status",
        "--system 10000 status",
        "--wait --no-wait status",
        "status extra",
        "completions ksh",
    ] {
        let out = lunar(bad, &[]);
        assert_eq!(out.status.code(), Some(2), "{bad}: {}", text(&out.stderr));
        assert!(out.stdout.is_empty(), "{bad}");
        let said = text(&out.stderr);
        assert!(
            said.contains("Try: lunar") && said.starts_with("lunar: "),
            "{bad}: {said}"
        );
    }
    let none = lunar("--socket /nonexistent/sock status", &[]);
    assert_eq!(none.status.code(), Some(5));
    assert!(text(&none.stderr).contains("Try: "));
}

/// Given a shell's request for completions, then verbs, options and the names that mgmtd knows are offered; and without
/// a mgmtd nothing is said.
#[test]
fn completions_offer_verbs_and_names() {
    let fake = Fake::new("complete");
    let socket = fake.socket.display().to_string();
    let offer = |line: &str| {
        let index = (line.split(' ').count() - 1).to_string();
        let env = [
            ("COMPLETE", "bash"),
            ("_CLAP_COMPLETE_INDEX", index.as_str()),
            ("_CLAP_IFS", "\n"),
        ];
        let out = Command::new(env!("CARGO_BIN_EXE_lunar"))
            .arg("--")
            .args(line.split(' '))
            .envs(env)
            .output()
            .unwrap();
        assert!(out.stderr.is_empty(), "{}", text(&out.stderr));
        text(&out.stdout)
    };
    for verb in verbs() {
        let (before, last) = verb.rsplit_once(' ').unwrap_or(("", &verb));
        let line = format!("lunar {before} ").replace("  ", " ");
        assert!(offer(&line).lines().any(|word| word == last), "{verb}");
        assert!(
            offer(&format!("lunar {verb} --js")).contains("--json"),
            "{verb}"
        );
    }
    let with = |line: &str| offer(&line.replace("lunar ", &format!("lunar --socket {socket} ")));
    assert_eq!(with("lunar lu show ").lines().next(), Some("vol"));
    assert_eq!(with("lunar group stop ").lines().next(), Some("data"));
    assert_eq!(with("lunar disk fail ").lines().next(), Some("1"));
    assert_eq!(with("lunar job watch ").lines().next(), Some("7"));
    let none = offer("lunar --socket /nonexistent/sock lu show ");
    assert!(!none.contains("vol"), "{none}");
    for shell in ["bash", "zsh", "fish"] {
        let out = lunar(&format!("completions {shell}"), &[]);
        assert!(
            out.status.success() && text(&out.stdout).contains("COMPLETE="),
            "{shell}"
        );
    }
}

/// Given a unit that names manual pages, then a program prints each.
#[test]
fn pages_that_units_name_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = |program: &str, args: &[&str]| {
        let out = Command::new(program).args(args).output().unwrap();
        assert!(out.status.success(), "{program}");
        text(&out.stdout)
    };
    let mgmtd = page(env!("CARGO_BIN_EXE_mgmtd"), &["--man"]);
    assert!(
        mgmtd.contains(".TH mgmtd 8") && mgmtd.contains(".SH EXAMPLES"),
        "{mgmtd}"
    );
    for unit in ["mgmtd.service", "mgmtd@.service"] {
        let unit = std::fs::read_to_string(root.join("dist").join(unit)).unwrap();
        assert!(
            unit.contains("\nDocumentation=man:mgmtd(8) man:lunar(1)\n"),
            "{unit}"
        );
    }
}
