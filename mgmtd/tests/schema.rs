//! Holds `schema.json`, `io.lunar.varlink` and the golden answers to the types. `LUNAR_BLESS=1` writes them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use lunar_api::mgmt::{self, Role};
use lunar_api::rows::{self, *};
use lunar_api::target::{
    Consistency, Features, GroupState, Level, LuCounters, SyncAction, SyncStatus,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, History, LuUuid, SystemUuid};
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Compares with the committed file, or writes it when told to.
fn hold(path: &Path, text: &str) {
    if std::env::var_os("LUNAR_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        committed,
        text,
        "{}: LUNAR_BLESS=1 cargo test -p mgmtd writes it",
        path.display()
    );
}

/// Method, request type, reply type.
struct Methods {
    generator: SchemaGenerator,
    list: Vec<(String, String, String)>,
}

impl Methods {
    fn add<A: JsonSchema, R: JsonSchema>(&mut self, name: &str) {
        self.generator.subschema_for::<A>();
        self.generator.subschema_for::<R>();
        self.list.push((
            name.into(),
            A::schema_name().into(),
            R::schema_name().into(),
        ));
    }
}

fn methods() -> Methods {
    let mut m = Methods {
        generator: SchemaGenerator::default(),
        list: Vec::new(),
    };
    m.add::<mgmt::StatusAsk, rows::StatusReply>("Status");
    m.add::<mgmt::EventsAsk, rows::EventsReply>("Events");
    m.add::<mgmt::Nothing, rows::JobList>("JobList");
    m.add::<mgmt::JobOne, rows::JobOneReply>("JobShow");
    m.add::<mgmt::JobOne, rows::Changed>("JobCancel");
    m.add::<mgmt::Nothing, rows::DiskList>("DiskList");
    m.add::<mgmt::One, rows::DiskOne>("DiskShow");
    m.add::<mgmt::DiskAdd, rows::Changed>("DiskAdd");
    m.add::<mgmt::DiskFail, rows::Changed>("DiskFail");
    m.add::<mgmt::DiskReplace, rows::Changed>("DiskReplace");
    m.add::<mgmt::DiskRemove, rows::Changed>("DiskRemove");
    m.add::<mgmt::Nothing, rows::GroupList>("GroupList");
    m.add::<mgmt::One, rows::GroupOne>("GroupShow");
    m.add::<mgmt::GroupCreate, rows::Changed>("GroupCreate");
    m.add::<mgmt::GroupSet, rows::Changed>("GroupSet");
    m.add::<mgmt::GroupStart, rows::Changed>("GroupStart");
    m.add::<mgmt::GroupResolve, rows::Changed>("GroupResolve");
    m.add::<mgmt::GroupEnd, rows::Changed>("GroupStop");
    m.add::<mgmt::Rename, rows::Changed>("GroupRename");
    m.add::<mgmt::GroupEnd, rows::Changed>("GroupDelete");
    m.add::<mgmt::Nothing, rows::LuList>("LuList");
    m.add::<mgmt::One, rows::LuOne>("LuShow");
    m.add::<mgmt::LuCreate, rows::Changed>("LuCreate");
    m.add::<mgmt::Rename, rows::Changed>("LuRename");
    m.add::<mgmt::LuEnd, rows::Changed>("LuDelete");
    m.add::<mgmt::Nothing, rows::PathList>("PathList");
    m.add::<mgmt::Import, rows::Changed>("Import");
    m.add::<mgmt::Nothing, rows::ConfigText>("ConfigSave");
    m.add::<mgmt::ConfigLoad, rows::Changed>("ConfigLoad");
    m.add::<mgmt::ShutdownAsk, rows::Changed>("Shutdown");
    m.generator.subschema_for::<ApiError>();
    m
}

#[test]
fn schema_file_is_that_of_the_types() {
    let mut m = methods();
    let defs: BTreeMap<String, Value> = m.generator.take_definitions(true).into_iter().collect();
    let whole = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What mgmtd is asked and answers; `data` of lunar --json is one of these",
        "$defs": defs,
    });
    let text = serde_json::to_string_pretty(&whole).unwrap() + "\n";
    hold(&root().join("mgmtd/api/schema.json"), &text);
}

/// Writes a schema as a type of the varlink language.
fn varlink_type(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.rsplit('/').next().unwrap();
        return match name {
            "DiskUuid" | "GroupUuid" | "History" | "LuUuid" | "SystemUuid" => "string".into(),
            // {"bytes": n}, {"percent": n} or "max": varlink has no such choice.
            "LuSize" => "object".into(),
            _ => name.to_string(),
        };
    }
    let nullable = |list: &Vec<Value>| {
        let real = list.iter().find(|s| s["type"] != "null").unwrap();
        format!("?{}", varlink_type(real))
    };
    if let Some(list) = schema["anyOf"].as_array() {
        return nullable(list);
    }
    if schema["prefixItems"].is_array() {
        return "[]object".into();
    }
    match &schema["type"] {
        Value::Array(kinds) => {
            let mut inner = schema.clone();
            inner["type"] = kinds.iter().find(|k| **k != "null").unwrap().clone();
            format!("?{}", varlink_type(&inner))
        }
        Value::String(kind) => match kind.as_str() {
            "integer" => "int".into(),
            "number" => "float".into(),
            "boolean" => "bool".into(),
            "string" => "string".into(),
            "array" => match varlink_type(&schema["items"]) {
                // Varlink has no nullable array items: an object stands for "number or null".
                item if item.starts_with('?') => "[]object".into(),
                item => format!("[]{item}"),
            },
            _ => "object".into(),
        },
        _ => "object".into(),
    }
}

fn fields(schema: &Value, optional: bool) -> String {
    let empty = Map::new();
    let properties = schema["properties"].as_object().unwrap_or(&empty);
    let field = |(key, schema): (&String, &Value)| {
        let kind = varlink_type(schema);
        let mark = if optional && !kind.starts_with('?') {
            "?"
        } else {
            ""
        };
        format!("{key}: {mark}{kind}")
    };
    let list: Vec<String> = properties.iter().map(field).collect();
    format!("({})", list.join(", "))
}

/// Words of an enum that has only words.
fn words(schema: &Value) -> Option<Vec<String>> {
    let word = |v: &Value| v["const"].as_str().or(v.as_str()).map(String::from);
    let list = schema["oneOf"].as_array().or(schema["enum"].as_array())?;
    let mut out = Vec::new();
    for item in list {
        match item["enum"].as_array() {
            Some(inner) => out.extend(inner.iter().filter_map(word)),
            None => out.push(word(item)?),
        }
    }
    Some(out)
}

#[test]
fn varlink_file_is_that_of_the_types() {
    let mut m = methods();
    let defs: BTreeMap<String, Value> = m.generator.take_definitions(true).into_iter().collect();
    let mut text =
        "# What mgmtd is asked. Every field of a call may be left out.\ninterface io.lunar\n"
            .to_string();
    let asked: Vec<&String> = m.list.iter().map(|(_, ask, _)| ask).collect();
    let answered: Vec<&String> = m.list.iter().map(|(_, _, reply)| reply).collect();
    for (name, schema) in &defs {
        if asked.contains(&name)
            || answered.contains(&name)
            || name == "ApiError"
            || name == "LuSize"
            || schema["type"] == "string" && words(schema).is_none()
        {
            continue;
        }
        match words(schema) {
            Some(words) => write!(text, "\ntype {name} ({})\n", words.join(", ")).unwrap(),
            None => write!(text, "\ntype {name} {}\n", fields(schema, false)).unwrap(),
        }
    }
    for (name, ask, reply) in &m.list {
        let (ask, reply) = (fields(&defs[ask], true), fields(&defs[reply], false));
        write!(text, "\nmethod {name}{ask} -> {reply}\n").unwrap();
    }
    write!(text, "\nerror Error {}\n", fields(&defs["ApiError"], false)).unwrap();
    hold(&root().join("mgmtd/api/io.lunar.varlink"), &text);
}

#[test]
fn every_verb_is_a_method() {
    let known: Vec<String> = methods()
        .list
        .into_iter()
        .map(|m| format!("io.lunar.{}", m.0))
        .collect();
    let verbs: Vec<&str> = mgmt::VERBS.iter().map(|(verb, _)| *verb).collect();
    assert_eq!(known, verbs);
}

fn golden(name: &str, value: &impl serde::Serialize) {
    let text = serde_json::to_string_pretty(value).unwrap() + "\n";
    hold(
        &root().join(format!("fixtures/golden/json/{name}.json")),
        &text,
    );
}

fn disk_row() -> DiskRow {
    DiskRow {
        disk: 1,
        path: "/dev/disk/by-id/wwn-0x5000c500a1".into(),
        capacity: 4_000_000_000_000,
        role: Role::Data,
        state: DiskState::InSync,
        group: Some(1),
        errors: 3,
    }
}

fn path_row() -> PathRow {
    let device = Some("/dev/ublkb0".into());
    PathRow {
        path: 1,
        lu: 1,
        head: "host".into(),
        device,
        state: PathState::Online,
    }
}

fn group_row() -> GroupRow {
    GroupRow {
        group: 1,
        name: "data".into(),
        level: Some(Level::Raid5),
        disks: vec![Some(1), Some(2), None],
        chunk: 65536,
        consistency: Some(Consistency::None),
        state: GroupState::Degraded,
    }
}

fn lu_row() -> LuRow {
    LuRow {
        lu: 1,
        name: "vol".into(),
        group: 1,
        capacity: 10 << 30,
        device: Some("/dev/lunar/vol".into()),
        paths: vec![path_row()],
        counters: LuCounters::default(),
    }
}

fn member() -> MemberRow {
    MemberRow {
        slot: 0,
        disk: Some(1),
        path: disk_row().path,
        state: DiskState::Rebuilding,
        data_offset: 8 << 20,
        reason: "replaced".into(),
        reads: 1,
        writes: 2,
        read_bytes: 4096,
        write_bytes: 8192,
        read_errors: 0,
        write_errors: 3,
    }
}

fn sync() -> SyncStatus {
    SyncStatus {
        action: SyncAction::Recover,
        done: 1,
        total: 8,
        rate: 2,
        slot: Some(0),
    }
}

#[test]
fn golden_answers() {
    golden(
        "disk.list",
        &DiskList {
            disks: vec![disk_row()],
        },
    );
    golden(
        "group.list",
        &GroupList {
            groups: vec![group_row()],
        },
    );
    golden(
        "lu.list",
        &LuList {
            lus: vec![lu_row()],
        },
    );
    golden(
        "path.list",
        &PathList {
            paths: vec![path_row()],
        },
    );
    let group = GroupShow {
        group: 1,
        name: "data".into(),
        level: Some(Level::Raid5),
        disks: group_row().disks,
        chunk: 65536,
        consistency: Some(Consistency::None),
        state: GroupState::Degraded,
        uuid: GroupUuid::from_bytes([2; 16]),
        reason: "disk 3 (slot 2) failed".into(),
        action: "add a disk (lunar disk add PATH), then: lunar disk replace 3 NEW".into(),
        capacity: 1 << 40,
        free: 1 << 30,
        logical_block: 512,
        write_hole_open: true,
        zero_copy: true,
        allocations: 0,
        history: Some(History::from_bytes([3; 16])),
        generation: 7,
        members: vec![member()],
        lus: vec![1],
        sync: Some(sync()),
    };
    golden("group.show", &GroupOne { group });
    let lu = LuShow {
        lu: 1,
        name: "vol".into(),
        group: 1,
        capacity: 10 << 30,
        device: lu_row().device,
        paths: vec![path_row()],
        counters: LuCounters {
            reads: 1,
            zero_copy: 1,
            ..LuCounters::default()
        },
        uuid: LuUuid::from_bytes([4; 16]),
        group_name: "data".into(),
        depth: 128,
        problem: String::new(),
        holders: vec!["mounted at /srv".into()],
        members: vec![member()],
        mkfs: vec!["mkfs.ext4 -b 4096 -E stride=16,stripe_width=32 /dev/lunar/vol".into()],
        fstab: "/dev/lunar/vol /srv/vol ext4 defaults,nofail 0 2".into(),
    };
    golden("lu.show", &LuOne { lu });
    let disk = DiskShow {
        disk: 1,
        path: disk_row().path,
        capacity: 1 << 40,
        role: Role::Spare,
        state: DiskState::Spare,
        group: None,
        errors: 0,
        uuid: DiskUuid::from_bytes([1; 16]),
        group_name: None,
        slot: None,
        reason: String::new(),
        read_errors: 0,
        write_errors: 0,
    };
    golden("disk.show", &DiskOne { disk });
    let job = JobRow {
        job: 7,
        kind: JobKind::Recover,
        group: 1,
        group_name: "data".into(),
        disk: Some(5),
        state: JobState::Running,
        done: 1,
        total: 8,
        rate: 2,
        started: 1_700_000_000_000,
        ended: None,
        reason: String::new(),
    };
    golden("job.list", &JobList { jobs: vec![job] });
    let event = EventRow {
        event: 1,
        time: 1_700_000_000_000,
        name: "Fail".into(),
        group: Some(1),
        disk: Some(2),
        lu: None,
        text: "disk 2 failed".into(),
    };
    golden(
        "events",
        &EventsReply {
            events: vec![event],
        },
    );
    let status = StatusData {
        health: Health::Optimal,
        system: SystemUuid::from_bytes([9; 16]),
        target_up: true,
        features: Features::default(),
        groups: Vec::new(),
        disks: vec![disk_row()],
        bad_disks: vec![BadDisk {
            disk: 2,
            path: "/dev/sdb".into(),
            problem: "cannot be read: Input/output error".into(),
        }],
        strangers: vec![Stranger {
            path: "/dev/sdc".into(),
            kind: StrangerKind::OtherSystem,
            system: Some(SystemUuid::from_bytes([8; 16])),
            group_name: "old".into(),
            text: "belongs to another system".into(),
        }],
    };
    golden(
        "status",
        &StatusReply {
            exit: 0,
            text: "all groups are optimal\n".into(),
            status,
        },
    );
    let error = ApiError::new(ErrorKind::Busy, "LU vol is not deleted: in use");
    golden(
        "error",
        &error
            .because("/dev/ublkb0 is mounted at /srv")
            .hint("umount /srv"),
    );
}
