//! Every limit of mgmtd, with the arithmetic that gave it.

use std::time::Duration;

/// Longest wait for one answer of ublk-target.
pub const CALL_LIMIT: Duration = Duration::from_secs(60);
/// Long requests at once: ublk-target takes 16 connections, and others need some.
pub const APART_MAX: usize = 4;
/// Longest wait for a new LU to be zeroed: 60 TB at 100 MB/s.
pub const ZERO_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Longest wait for the state of ublk-target in a read verb; then the last known state is told.
pub const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for a dead process's I/O to let go of a disk (design.md §3).
pub const REOPEN_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for a disk to open for a look; a sick one is then named and left out.
pub const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Pause between two tries to open a disk exclusively.
pub const REOPEN_PAUSE: Duration = Duration::from_millis(20);
/// Pause between two looks whether a slot wants a spare; what happens in between rings at once.
pub const SPARES_PAUSE: Duration = Duration::from_secs(5);
/// Times that a disk which went away is put back by itself within [`RETURNS_WINDOW`]; then somebody has to look at it.
pub const RETURNS_MAX: usize = 3;
/// Milliseconds for which a return counts.
pub const RETURNS_WINDOW: u64 = 3600 * 1000;
/// Pause between two looks whether a disk is back; what happens in between rings at once.
pub const RETURNS_PAUSE: Duration = Duration::from_secs(3);
/// A disk that hung when it was looked at is left alone for so long.
pub const HANGS_PAUSE: Duration = Duration::from_secs(60);
/// Pause between two looks whether a group's disks, all held, are let go of.
pub const HELD_PAUSE: Duration = Duration::from_secs(1);
/// Longest wait for ublk-target to give all devices up and close its groups; a device may take 5 s until nothing is in
/// flight. Then it is killed: I/O stands still meanwhile.
pub const HAND_OVER_LIMIT: Duration = Duration::from_secs(15);
/// Longest wait for another change to end.
pub const INTENT_LIMIT: Duration = Duration::from_secs(60);
/// Longest run of blkid or wipefs; a healthy disk answers in milliseconds.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// Longest wait for a ublk-target that is to wait for another's death to have its memory: others have to be swapped out for it.
pub const STANDBY_LIMIT: Duration = Duration::from_secs(120);
/// After one that could not be had, the next.
pub const STANDBY_PAUSE: Duration = Duration::from_secs(60);
/// Longest wait for a new ublk-target to accept its first connection.
pub const START_LIMIT: Duration = Duration::from_secs(20);

/// Open connections; the next one is told so and closed.
pub const CONNECTIONS_MAX: usize = 256;
/// Connections of one uid other than root: three quarters, so that nobody locks root out.
pub const CONNECTIONS_USER_MAX: usize = CONNECTIONS_MAX / 4 * 3;
/// From here on idle connections are dropped.
pub const CONNECTIONS_NEAR: usize = CONNECTIONS_MAX / 8 * 7;
/// A connection without a request for so long is idle.
pub const IDLE_LIMIT: Duration = Duration::from_secs(300);
/// A connection that has begun a message, or does not read its answer, has so long for it.
pub const MESSAGE_LIMIT: Duration = Duration::from_secs(30);

/// Smallest disk.
pub const DISK_MIN: u64 = 64 << 20;
/// Most paths in one `disk add`: one descriptor each in a packet.
pub const PATHS_MAX: usize = 128;
/// Files looked at in one directory when a disk is searched.
pub const SEARCH_MAX: usize = 1024;
/// Longest run of a hook, unless mgmtd is told another.
pub const HOOK_LIMIT: Duration = Duration::from_secs(30);
/// Events whose hooks run at once; the next wait.
pub const HOOKS_AT_ONCE: usize = 4;
/// Events kept.
pub const EVENTS_MAX: usize = 5000;
/// Rows kept for later when the state directory takes none.
pub const WRITES_MAX: usize = 10_000;
/// Highest number that a configuration file may give to a disk, group or LU: later ones get higher ones.
pub const NUMBER_MAX: u32 = 1_000_000;
/// Saved configurations kept in the state directory.
pub const ARCHIVE_MAX: usize = 20;
/// Ended jobs kept.
pub const JOBS_MAX: usize = 500;
/// Deaths of ublk-target in a minute before restarts are slowed down.
pub const DEATHS_MAX: usize = 5;
/// Crashes in one group within [`CRASH_WINDOW`] that quarantine it.
pub const CRASHES_MAX: usize = 2;
/// How long a crash counts.
pub const CRASH_WINDOW: Duration = Duration::from_secs(60);
/// Longest pause before a restart.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Most requests in flight of a LU (ublk's limit is 4096).
pub const DEPTH_MAX: u16 = 1024;
/// Default requests in flight of a LU.
pub const DEPTH: u16 = 128;
/// Most queues of a LU; the kernel makes at most one for each CPU.
pub const QUEUES_MAX: u16 = 64;
/// Default chunk.
pub const CHUNK: u64 = 64 << 10;
