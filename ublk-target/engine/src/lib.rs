//! The storage array itself, pure: no system calls, no clock, no threads, no randomness of its own.
//!
//! The rim (`ublk-target`) and the simulator (`tests`) hand in disks, memory, a clock and requests by the
//! traits of [`traits`], and poll the futures on one thread: the same code runs on both.

#![deny(unsafe_code)]

pub mod assembly;
mod background;
pub mod bad_blocks;
pub mod config;
mod control;
mod copying;
pub mod extents;
pub mod geometry;
pub mod gf;
mod growing;
mod health;
mod inflight;
pub mod label;
mod lanes;
mod launch;
pub mod limits;
mod member;
pub mod parity;
pub mod plan;
pub mod planted;
pub mod pool;
pub mod ppl;
mod publish;
pub mod raid_group;
pub mod recipe;
pub mod region_map;
mod regions;
mod replay;
pub mod reserve;
mod scrub;
mod serve;
mod start;
mod stripe_ops;
mod stripe_table;
pub mod superblock;
pub mod sync;
pub mod traits;
pub mod view;
mod watching;
