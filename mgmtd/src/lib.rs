//! The management daemon of Lunar: tables, supervision of ublk-target, and the socket.
//!
//! Owns what no disk carries: numbers, paths, roles, jobs, events. Must never decide where bytes are, never
//! send a member state downwards, and never keep a disk open. Pure parts (`names`, `tables`, `planner`,
//! `views`, `text`) do no I/O; everything else is the rim.

#![forbid(unsafe_code)]

pub mod api;
pub mod boot;
pub mod config_file;
pub mod daemon;
pub mod devnodes;
pub mod doctor;
pub mod hardware;
pub mod holders;
pub mod hooks;
pub mod import_plan;
pub mod jobs;
pub mod limits;
pub mod link;
pub mod log;
pub mod manual;
pub mod memory;
pub mod metrics;
pub mod names;
pub mod notify;
pub mod opener;
pub mod planner;
pub mod probe;
pub mod quarantine;
pub mod resolve;
pub mod returns;
pub mod server;
pub mod sightings;
pub mod signature;
pub mod spares;
pub mod standby;
pub mod store;
pub mod supervisor;
pub mod tables;
pub mod text;
pub mod upgrade;
pub mod varlink;
pub mod views;
