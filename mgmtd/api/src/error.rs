//! The one error that crosses a socket: what, why, and what to type next.

use serde::{Deserialize, Serialize};

/// What kind of failure it is; the exit code of the command line follows from it alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// It was tried and failed (exit 1).
    Failed,
    /// The request makes no sense: unknown verb, field, name, or a value out of range (exit 2).
    Usage,
    /// Redundancy is missing for it (exit 3).
    NoRedundancy,
    /// What it concerns gives no service (exit 4).
    NoService,
    /// The daemon, or ublk-target behind it, cannot be reached (exit 5).
    Unreachable,
    /// Refused because data would die (exit 6).
    Refused,
    /// In use, or held elsewhere; the holder is named (exit 7).
    Busy,
}

impl ErrorKind {
    /// Returns the exit code of design.md §7.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NoRedundancy => 3,
            Self::NoService => 4,
            Self::Unreachable => 5,
            Self::Refused => 6,
            Self::Busy => 7,
        }
    }
}

/// An answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[error("{message}")]
#[serde(deny_unknown_fields)]
pub struct ApiError {
    /// Decides the exit code.
    pub kind: ErrorKind,
    /// What could not be done, in one sentence without a full stop.
    pub message: String,
    /// Why, outermost first.
    #[serde(default)]
    pub causes: Vec<String>,
    /// What to type next, as a command line, when there is something to type.
    #[serde(default, rename = "try")]
    pub hint: Option<String>,
}

impl ApiError {
    /// Makes an error without causes and hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            causes: Vec::new(),
            hint: None,
        }
    }

    /// Adds a cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// Sets what to type next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
