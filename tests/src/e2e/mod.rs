//! A running Lunar, member disks that can be made to fail, commands with limits, and the tests that use them.

pub mod rig;
pub mod shell;

pub(crate) mod blocks;
mod cli;
mod concurrent;
mod config;
mod crash;
mod data;
mod deaths;
mod discard;
mod disks;
mod failing;
mod grow;
mod health;
mod hostile;
mod import;
mod layout;
mod levels;
mod life;
mod manage;
pub mod memory;
mod metadata;
mod queues;
mod replace;
mod resize;
mod scrub;
mod spares;
mod upgrade;

use std::sync::{Mutex, PoisonError};

use shell::Failure;

/// A test with its name.
pub type Test = (String, Box<dyn FnOnce() -> Result<(), Failure> + Send>);

/// All of them, in the order of running.
pub fn tests() -> Vec<Test> {
    let mut all = Vec::new();
    data::tests(&mut all);
    discard::tests(&mut all);
    failing::tests(&mut all);
    health::tests(&mut all);
    concurrent::tests(&mut all);
    layout::tests(&mut all);
    levels::tests(&mut all);
    life::tests(&mut all);
    hostile::tests(&mut all);
    manage::tests(&mut all);
    cli::tests(&mut all);
    queues::tests(&mut all);
    scrub::tests(&mut all);
    replace::tests(&mut all);
    resize::tests(&mut all);
    grow::tests(&mut all);
    spares::tests(&mut all);
    import::tests(&mut all);
    config::tests(&mut all);
    crash::tests(&mut all);
    upgrade::tests(&mut all);
    memory::tests(&mut all);
    metadata::tests(&mut all);
    deaths::tests(&mut all);
    all
}

/// The start of names of tests that only a long run has: the rest of a matrix whose corners always run.
pub const LONG: &str = "long_";

/// What tests have measured and nothing is asserted of: told in the end, as a test's own line is not to be broken.
static FIGURES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps a line of what was measured, for the end.
pub fn figure(line: String) {
    let mut figures = FIGURES.lock().unwrap_or_else(PoisonError::into_inner);
    figures.push(line);
}

/// Lines of what was measured.
pub fn figures() -> Vec<String> {
    std::mem::take(&mut *FIGURES.lock().unwrap_or_else(PoisonError::into_inner))
}

fn add(
    to: &mut Vec<Test>,
    name: impl Into<String>,
    test: impl FnOnce() -> Result<(), Failure> + Send + 'static,
) {
    to.push((name.into(), Box::new(test)));
}

/// Fails with a text unless `what` holds.
fn ensure(what: bool, why: impl FnOnce() -> String) -> Result<(), Failure> {
    if what { Ok(()) } else { Err(why()) }
}
