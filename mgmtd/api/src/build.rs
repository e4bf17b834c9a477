//! What a program says of itself, so that one build can be told from another before it is started.
//!
//! `ublk-target --build-info` and `mgmtd --build-info` print [`Build`], `ublk-target can-read PATH..` prints [`Reading`]s.
//! A later build may say more: unknown fields are passed over here.

use serde::{Deserialize, Serialize};

/// The commit that was built, where whoever built it set `LUNAR_COMMIT`; else empty.
pub const COMMIT: &str = match option_env!("LUNAR_COMMIT") {
    Some(commit) => commit,
    None => "",
};

/// A build of one program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Build {
    pub program: String,
    pub version: String,
    pub commit: String,
    /// Version of the protocol between mgmtd and ublk-target.
    pub protocol: u32,
    /// Formats that it reads: of disks (ublk-target), of tables (mgmtd).
    pub format_min: u32,
    /// The newest of them, which it writes.
    pub format_max: u32,
}

/// Whether a build can serve what a disk carries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    pub path: String,
    /// Why not; none: it can, or nothing of Lunar is there.
    pub problem: Option<String>,
}
