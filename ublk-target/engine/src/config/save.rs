//! The JSON of a configuration, apart from the live types: a new field there is no new format by accident.

use lunar_api::LuUuid;
use lunar_api::target::ScrubState;
use serde::{Deserialize, Serialize};

use super::{BadRecord, ConfigError, FORMAT, GroupConfig, LuConfig, Options, ScrubRecord};
use crate::extents::Extent;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupSave {
    format: u32,
    name: String,
    lus: Vec<LuSave>,
    deleted: Vec<LuSave>,
    options: OptionsSave,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    scrub: Option<ScrubSave>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ScrubSave {
    state: ScrubState,
    repair: bool,
    from: u64,
    next: u64,
    rate: Option<u64>,
    started: u64,
    ended: u64,
    list: Vec<BadSave>,
    more: u64,
    more_repaired: u64,
    unreadable: u64,
    rewritten: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BadSave {
    stripe: u64,
    at: u64,
    len: u64,
    slots: u64,
    repaired: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LuSave {
    uuid: LuUuid,
    name: String,
    depth: u16,
    /// Left out when it is 1.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    queues: u16,
    capacity: u64,
    extents: Vec<Extent>,
}

fn one() -> u16 {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde asks it")]
fn is_one(n: &u16) -> bool {
    *n == 1
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OptionsSave {
    rebuild_min_bytes: Option<u64>,
    rebuild_max_bytes: Option<u64>,
}

/// Only the version: a newer format may have any other field.
#[derive(Deserialize)]
struct VersionSave {
    format: u32,
}

pub(super) fn encode(config: &GroupConfig) -> Result<Vec<u8>, ConfigError> {
    let save = GroupSave {
        format: FORMAT,
        name: config.name.clone(),
        lus: config.lus.iter().map(LuSave::from).collect(),
        deleted: config.deleted.iter().map(LuSave::from).collect(),
        options: OptionsSave {
            rebuild_min_bytes: config.options.rebuild_min_bytes,
            rebuild_max_bytes: config.options.rebuild_max_bytes,
        },
        scrub: config.scrub.as_ref().map(ScrubSave::from),
    };
    serde_json::to_vec(&save).map_err(ConfigError::Json)
}

pub(super) fn decode(json: &[u8]) -> Result<GroupConfig, ConfigError> {
    let VersionSave { format } = serde_json::from_slice(json).map_err(ConfigError::Json)?;
    if format != FORMAT {
        return Err(ConfigError::Version { found: format });
    }
    let save: GroupSave = serde_json::from_slice(json).map_err(ConfigError::Json)?;
    Ok(GroupConfig {
        name: save.name,
        lus: save.lus.into_iter().map(LuConfig::from).collect(),
        deleted: save.deleted.into_iter().map(LuConfig::from).collect(),
        options: Options {
            rebuild_min_bytes: save.options.rebuild_min_bytes,
            rebuild_max_bytes: save.options.rebuild_max_bytes,
        },
        scrub: save.scrub.map(ScrubRecord::from),
    })
}

impl From<&ScrubRecord> for ScrubSave {
    fn from(scrub: &ScrubRecord) -> Self {
        let bad = |bad: &BadRecord| BadSave {
            stripe: bad.stripe,
            at: bad.at,
            len: bad.len,
            slots: bad.slots,
            repaired: bad.repaired,
        };
        Self {
            state: scrub.state,
            repair: scrub.repair,
            from: scrub.from,
            next: scrub.next,
            rate: scrub.rate,
            started: scrub.started,
            ended: scrub.ended,
            list: scrub.list.iter().map(bad).collect(),
            more: scrub.more,
            more_repaired: scrub.more_repaired,
            unreadable: scrub.unreadable,
            rewritten: scrub.rewritten,
        }
    }
}

impl From<ScrubSave> for ScrubRecord {
    fn from(save: ScrubSave) -> Self {
        let bad = |bad: BadSave| BadRecord {
            stripe: bad.stripe,
            at: bad.at,
            len: bad.len,
            slots: bad.slots,
            repaired: bad.repaired,
        };
        Self {
            state: save.state,
            repair: save.repair,
            from: save.from,
            next: save.next,
            rate: save.rate,
            started: save.started,
            ended: save.ended,
            list: save.list.into_iter().map(bad).collect(),
            more: save.more,
            more_repaired: save.more_repaired,
            unreadable: save.unreadable,
            rewritten: save.rewritten,
        }
    }
}

impl From<&LuConfig> for LuSave {
    fn from(lu: &LuConfig) -> Self {
        Self {
            uuid: lu.uuid,
            name: lu.name.clone(),
            depth: lu.depth,
            queues: lu.queues,
            capacity: lu.capacity,
            extents: lu.extents.clone(),
        }
    }
}

impl From<LuSave> for LuConfig {
    fn from(save: LuSave) -> Self {
        Self {
            uuid: save.uuid,
            name: save.name,
            depth: save.depth,
            queues: save.queues,
            capacity: save.capacity,
            extents: save.extents,
        }
    }
}
