//! The JSON of a configuration, apart from the live types: a new field there is no new format by accident.

use lunar_api::LuUuid;
use serde::{Deserialize, Serialize};

use super::{ConfigError, FORMAT, GroupConfig, LuConfig, Options};
use crate::extents::Extent;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupSave {
    format: u32,
    name: String,
    lus: Vec<LuSave>,
    deleted: Vec<LuSave>,
    options: OptionsSave,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LuSave {
    uuid: LuUuid,
    name: String,
    depth: u16,
    capacity: u64,
    extents: Vec<Extent>,
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
    })
}

impl From<&LuConfig> for LuSave {
    fn from(lu: &LuConfig) -> Self {
        Self {
            uuid: lu.uuid,
            name: lu.name.clone(),
            depth: lu.depth,
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
            capacity: save.capacity,
            extents: save.extents,
        }
    }
}
