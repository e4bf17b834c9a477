//! Holds `schema.json` and `io.lunar.varlink` to the types. `LUNAR_BLESS=1` writes them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

mod samples;

use samples::hold;

use lunar_api::ApiError;
use lunar_api::{mgmt, rows};
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
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
    m.add::<mgmt::EventsTestAsk, rows::Changed>("EventsTest");
    m.add::<mgmt::Nothing, rows::DoctorReply>("Doctor");
    m.add::<mgmt::Nothing, rows::MetricsReply>("Metrics");
    m.add::<mgmt::Nothing, rows::StatReply>("Stat");
    m.add::<mgmt::Nothing, rows::ReportReply>("Report");
    m.add::<mgmt::Nothing, rows::JobList>("JobList");
    m.add::<mgmt::JobOne, rows::JobOneReply>("JobShow");
    m.add::<mgmt::JobEnd, rows::Changed>("JobCancel");
    m.add::<mgmt::Nothing, rows::DiskList>("DiskList");
    m.add::<mgmt::One, rows::DiskOne>("DiskShow");
    m.add::<mgmt::DiskAdd, rows::Changed>("DiskAdd");
    m.add::<mgmt::DiskLocate, rows::LocateReply>("DiskLocate");
    m.add::<mgmt::DiskFail, rows::Changed>("DiskFail");
    m.add::<mgmt::DiskReplace, rows::Changed>("DiskReplace");
    m.add::<mgmt::DiskRemove, rows::Changed>("DiskRemove");
    m.add::<mgmt::Nothing, rows::GroupList>("GroupList");
    m.add::<mgmt::One, rows::GroupOne>("GroupShow");
    m.add::<mgmt::GroupCreate, rows::Changed>("GroupCreate");
    m.add::<mgmt::GroupSet, rows::Changed>("GroupSet");
    m.add::<mgmt::GroupScrub, rows::Changed>("GroupScrub");
    m.add::<mgmt::GroupStart, rows::Changed>("GroupStart");
    m.add::<mgmt::GroupResolve, rows::Changed>("GroupResolve");
    m.add::<mgmt::GroupEnd, rows::Changed>("GroupStop");
    m.add::<mgmt::GroupEnd, rows::Changed>("GroupGrow");
    m.add::<mgmt::Rename, rows::Changed>("GroupRename");
    m.add::<mgmt::GroupEnd, rows::Changed>("GroupDelete");
    m.add::<mgmt::Nothing, rows::LuList>("LuList");
    m.add::<mgmt::One, rows::LuOne>("LuShow");
    m.add::<mgmt::LuCreate, rows::Changed>("LuCreate");
    m.add::<mgmt::Rename, rows::Changed>("LuRename");
    m.add::<mgmt::LuSet, rows::Changed>("LuSet");
    m.add::<mgmt::LuResize, rows::Changed>("LuResize");
    m.add::<mgmt::LuEnd, rows::Changed>("LuDelete");
    m.add::<mgmt::Nothing, rows::PathList>("PathList");
    m.add::<mgmt::Import, rows::Changed>("Import");
    m.add::<mgmt::Nothing, rows::ConfigText>("ConfigSave");
    m.add::<mgmt::ConfigLoad, rows::Changed>("ConfigLoad");
    m.add::<mgmt::ShutdownAsk, rows::Changed>("Shutdown");
    m.add::<mgmt::UpgradeAsk, rows::UpgradeReply>("Upgrade");
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
