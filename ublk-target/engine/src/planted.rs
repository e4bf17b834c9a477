//! Bugs that are planted to see that the simulator finds them.
//!
//! Without the feature `planted` nothing can be planted, and every question here is the constant false: no build that serves
//! anything has the feature, nor any of these bugs. The simulator's table (`tests/src/sim/bugs.rs`) says how each shows itself.

macro_rules! bugs {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// A bug that can be planted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Bug { $($(#[$doc])* $name),* }

        impl Bug {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

bugs! {
    /// A write does not wait for its marks in the intent map.
    AckBeforeIntent,
    /// A page of a map goes to one member only.
    MapOnOneMember,
    /// Marks go without a flush before.
    UnmarkUnflushed,
    /// What is written while a member is away is not noted.
    MissedNotNoted,
    /// What was noted is forgotten by a start.
    MissedForgotten,
    /// A member that is caught up counts as done after its first region.
    CaughtUpEarly,
    /// Writes do not wait until it is durable that a member has left.
    DegradeNotDurable,
    /// The first write does not wait until the disks say dirty.
    DirtyNotDurable,
    /// An idle group is marked clean without a flush.
    CleanUnflushed,
    /// A member that the superblocks call stale is taken as it is.
    StaleMemberTaken,
    /// Of one history the lowest generation decides.
    OlderGenerationWins,
    /// A superblock is taken whatever its checksum says.
    TornSuperblockTaken,
    /// Superblocks are written without FUA.
    SuperblockWithoutFua,
    /// Dirty and degraded, parity is believed.
    WriteHoleAccepted,
    /// A stripe is given to the next before it is written.
    LockReleasedEarly,
    /// The in-flight log is written behind the data.
    LogAfterData,
    /// What a dead process was writing is not written again.
    ReplayForgotten,
    /// The cursor of a rebuild is ahead of it.
    CursorAhead,
    /// What is written below the cursor of a rebuild does not go to the member that is rebuilt.
    RebuildMissesWrites,
    /// A rebuild ends without a flush.
    SyncUnflushed,
    /// Redundancy that is not proven is believed.
    UnsyncedBelieved,
    /// A host's flush leaves out the first member.
    FlushSkipsMember,
    /// A host's FUA is taken for nothing.
    FuaIgnored,
    /// A discard leaves out the parity of its first stripe.
    DiscardWithoutParity,
    /// What changes parity is not logged.
    NotLogged,
    /// A unit of a log is written without FUA.
    LogWithoutFua,
    /// The next unit goes over one whose writes are not complete.
    UnitTooEarly,
    /// The next unit goes over one whose writes are not flushed.
    UnitUnflushed,
    /// What the logs have is not made right at a start.
    LogsNotReplayed,
    /// Of a log the older unit is replayed.
    OlderUnitReplayed,
    /// A payload is taken whatever its checksum says.
    TornUnitTaken,
    /// What the log of a member that comes back says is forgotten.
    ReturningLogForgotten,
    /// What is on a bad-block list is read as if it were not.
    ListedRead,
    /// A bad-block list is not written.
    ListNotDurable,
    /// What was written is taken off a list before it is flushed.
    OffListUnflushed,
}

#[cfg(feature = "planted")]
mod plant {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug in all groups of this thread, or none.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    pub(crate) fn is(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}
#[cfg(feature = "planted")]
pub use plant::plant;

#[cfg(feature = "planted")]
pub(crate) use plant::is;

#[cfg(not(feature = "planted"))]
pub(crate) const fn is(_: Bug) -> bool {
    false
}
