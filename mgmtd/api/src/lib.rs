//! Ids, units, tables, requests and replies of Lunar: the words that its processes share.
//!
//! Serde only: no system calls, no clock, no threads. `ids` and `units` are the newtypes, `target` is
//! what mgmtd and ublk-target say to each other, `mgmt` what mgmtd is asked, `rows` the tables it answers
//! with, `error` the one error that crosses a socket, `build` what programs say of themselves.

#![forbid(unsafe_code)]

pub mod breadcrumb;
pub mod build;
pub mod error;
pub mod ids;
pub mod mgmt;
pub mod rows;
pub mod target;
pub mod units;

pub use error::{ApiError, ErrorKind};
pub use ids::{DiskUuid, GroupUuid, History, LuUuid, SystemUuid};
