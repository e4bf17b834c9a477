//! Why a group does not start, and what to type next.

use lunar_api::target::Witness;
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, History};

use crate::geometry::GeometryError;

/// One side of a split group, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    pub history: History,
    /// Its highest generation.
    pub generation: u64,
    /// The disks that say so.
    pub paths: Vec<String>,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let paths = self.paths.join(", ");
        write!(
            f,
            "history {} (generation {}) on {paths}",
            self.history, self.generation
        )
    }
}

/// Why a group does not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AssemblyError {
    #[error("none of its members is there")]
    NobodyThere,
    #[error("{path} is not a member of group {group}")]
    NotOfGroup { path: String, group: GroupUuid },
    #[error("{a} and {b} both say that they are disk {disk}: one is a copy of the other")]
    DuplicateDisk {
        disk: DiskUuid,
        a: String,
        b: String,
    },
    #[error("the group was deleted")]
    Deleted,
    #[error("disk {disk} is not there, so its side cannot be kept")]
    KeptNotThere { disk: DiskUuid },
    #[error("the members were written apart from each other: {a}; {b}")]
    Split { a: Side, b: Side },
    #[error("{a} and {b} both have generation {generation}, but they differ")]
    Differ {
        a: String,
        b: String,
        generation: u64,
    },
    #[error(
        "the disks are older than what was seen last: they say {found}, seen was history {} (generation {})",
        witness.history, witness.generation
    )]
    OlderThanWitness { found: Side, witness: Witness },
    #[error("{} of {members} members are not there or not in sync, {allowed}: {}",
        lost.len(), lost.join("; "))]
    TooFew {
        members: u16,
        /// How many may be, or which.
        allowed: String,
        lost: Vec<String>,
    },
    #[error(
        "it was not stopped cleanly and is degraded ({}): what was being written then may have spoilt, on the \
         missing member, data that nobody wrote", lost.join("; ")
    )]
    DirtyDegraded { lost: Vec<String> },
    #[error("its superblock describes no possible group")]
    Geometry(#[source] GeometryError),
}

impl AssemblyError {
    /// Returns what kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NobodyThere | Self::Deleted => ErrorKind::NoService,
            Self::NotOfGroup { .. } | Self::KeptNotThere { .. } => ErrorKind::Usage,
            Self::TooFew { .. } => ErrorKind::NoRedundancy,
            Self::DuplicateDisk { .. }
            | Self::Split { .. }
            | Self::Differ { .. }
            | Self::OlderThanWitness { .. }
            | Self::DirtyDegraded { .. } => ErrorKind::Refused,
            Self::Geometry(_) => ErrorKind::Failed,
        }
    }

    /// Returns what to type next, where `group` is the group as the person called it.
    pub fn hint(&self, group: &str) -> Option<String> {
        match self {
            Self::NobodyThere | Self::TooFew { .. } => Some(format!(
                "connect the missing disks, then: lunar group start {group}"
            )),
            Self::DuplicateDisk { .. } => Some(format!(
                "take the copy away, then: lunar group start {group}"
            )),
            Self::Deleted => Some("lunar import --deleted PATH..".to_owned()),
            Self::Split { .. } | Self::Differ { .. } => {
                Some(format!("lunar group resolve {group} --keep DISK"))
            }
            Self::OlderThanWitness { .. } => Some(format!(
                "connect the newer disks; or, to go on with the older data: lunar group start {group} --force"
            )),
            Self::DirtyDegraded { .. } => Some(format!(
                "connect the missing disk; or, to accept the damage: lunar group start {group} --force"
            )),
            Self::KeptNotThere { .. } => Some("lunar disk list".to_owned()),
            Self::NotOfGroup { .. } | Self::Geometry(_) => None,
        }
    }

    /// Returns the error for the socket: what, why, and what to type next.
    pub fn to_api(&self, group: &str) -> ApiError {
        let message = format!("group {group} does not start");
        let mut error = ApiError::new(self.kind(), message).because(self.to_string());
        if let Self::Geometry(source) = self {
            error = error.because(source.to_string());
        }
        match self.hint(group) {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}
