//! The deterministic simulator: the real engine on simulated disks, one seed one run.
//!
//! ```text
//! seed -> plan ------> run: boots, each with a load, deeds, and a crash ------> checks at the end
//!                       |                                                  |
//!                     host (requests) <-> engine <-> disks (cache, faults)   model (what each sector may have)
//! ```
//! Laws: no acknowledged write is lost while redundancy allows (flushed ones by no power cut either); no stale data is served
//! as good; a sector that nobody wrote never changes; errors only where redundancy is exhausted; background work ends; every
//! refusal to start is one that has a reason. `model` says what is exempt, exactly.

#![allow(
    clippy::cast_possible_truncation,
    reason = "sizes and counts of a simulation are far below 2^32"
)]

mod boot;
#[cfg(feature = "planted")]
pub mod bugs;
mod check;
pub mod disk;
pub mod host;
pub mod model;
pub mod pages;
pub mod plan;
pub mod random;
pub mod run;
pub mod shrink;
pub mod states;
pub mod sweep;
pub mod tally;
pub mod world;
