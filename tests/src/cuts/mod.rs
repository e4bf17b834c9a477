//! Power cuts: a kernel with Lunar in it is killed, its disks keep what was flushed and a drawn part of the rest, and
//! the next kernel must find all that was promised.
//!
//! `host` is outside and draws everything from a seed; `guest` runs inside, checks what the last cut left, and then
//! writes until it is cut. What a writer was told goes out into a folder of the host before it goes on (`witness`), so
//! that the promise outlives the kernel. `model` says which values each place may have.

pub mod guest;
pub mod host;
mod job;
mod model;
mod places;
mod selftest;
mod stamp;
mod traps;
mod witness;
mod writers;
