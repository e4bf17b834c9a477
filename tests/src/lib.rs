//! What the tests stand on that are no tests of one crate.
//!
//! `sim` is the simulator: it needs nothing. The end-to-end tests and benchmarks run as root in the lab's kernel (`fixtures/lab.sh`) or, with
//! `LUNAR_TEST_ON_HOST=1`, on the host's own, and drive Lunar by its command line alone.

pub mod bench;
pub mod cuts;
pub mod e2e;
pub mod sim;
