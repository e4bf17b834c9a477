//! Every limit of the engine, with the arithmetic that gave it.

use lunar_api::units::{KIB, MIB};

use crate::traits::{MILLISECOND, SECOND};

/// Most members of a group: 64 slots of 32 bytes are the second half of the 4 KiB superblock.
pub const MEMBERS_MAX: usize = lunar_api::target::MEMBERS_MAX;

/// Smallest unit the engine reads or writes on a member, in bytes: a page, and the physical block of every
/// disk made today. What is smaller is read, merged and written back.
pub const GRAIN: u64 = 4 * KIB;

/// Smallest chunk, in bytes: one grain.
pub const CHUNK_MIN: u64 = GRAIN;
/// Largest chunk, in bytes: a 64-member stripe is then 63 MiB, and a row of it still 63 grains.
pub const CHUNK_MAX: u64 = MIB;
/// Stripe of a raid1, in bytes. raid1 has no chunk; this is the granule of its locks and its sync.
pub const RAID1_STRIPE: u64 = 64 * KIB;
/// Stripe of a linear group, in bytes: it has no chunk; data areas and extents are whole MiB.
pub const LINEAR_STRIPE: u64 = MIB;
/// Largest data area in a linear group, in bytes: a superblock has 32 bits for its MiB.
pub const LINEAR_MEMBER_MAX: u64 = u32::MAX as u64 * MIB;

/// Longest host read or write, in bytes. The kernel cuts a longer one, and what it has to cut it does not submit at
/// once (`bio_split_rw` answers EAGAIN to `REQ_NOWAIT`, which every io_uring request has): it goes to a worker thread
/// of the application, one after the other. So 512 KiB made reads of 1 MiB 4.6 times slower than reads of 512 KiB.
/// 1 MiB is what applications ask for at most by habit, and the most of other ublk servers.
pub const MAX_IO: u64 = MIB;
/// Private memory of a group, in bytes: 16 requests of `MAX_IO`, and 8 MiB for old data and parity of the stripes that
/// are worked on (1 MiB a pass); or 1200 requests of 4 KiB with five buffers each. Reads and raid0 take none of it.
/// With depth 128 a group stays under 64 MiB resident.
pub const POOL_BYTES: u64 = 24 * MIB;

/// Smallest member, in bytes: below it the 6 MiB reserve would be more than 1/10.
pub const MEMBER_MIN: u64 = 64 * MIB;
/// Largest member, in bytes: 64 members of 2^57 are 2^63, so that every address of a group fits.
pub const MEMBER_BYTES_MAX: u64 = 1 << 57;

/// Smallest reserve of a member, in bytes.
pub const RESERVE_MIN: u64 = 6 * MIB;
/// The reserve is at most this part of the disk (where that is above `RESERVE_MIN`).
pub const RESERVE_PART: u64 = 32;

/// A configuration slot when a group is made, in bytes: 1000 LUs of a dozen extents.
pub const CONFIG_SLOT_MIN: u64 = MIB;
/// Largest configuration, in bytes: [`LU_MAX`] and [`DELETED_MAX`] LUs with up to 230 bytes of JSON each are 1.0 MB,
/// [`EXTENTS_MAX`] extents with up to 52 bytes each (addresses of 16 digits) are 3.4 MB; and it is a power of two.
pub const CONFIG_MAX: u64 = 8 * MIB;

/// A configuration is written and read by so many bytes at once: it must not need more memory in one piece than
/// stripe work does, and at 8 MiB takes 128 turns.
pub const CONFIG_PIECE: usize = 64 * 1024;

/// Most stripes that a sync leaves out because nobody can read them; with more it stops, for then it is not a sector
/// that is bad but a member. 1024 chunks are up to 1 GiB.
pub const HOLES_MAX: usize = 1024;

/// Read errors of a member that were repaired lately before it is failed, unless a group is told another number: md's
/// `max_corrected_read_errors`.
pub const READ_ERRORS_MAX: u32 = 20;
/// After so long those that count are halved, as md does.
pub const STRIKES_HALVE_AFTER: u64 = 3600 * SECOND;

/// Between two looks at what is in flight while there is work: 100 of them are a window, 20 wake-ups a second cost 0.1 %
/// of a CPU that is busy anyway.
pub const SPEED_SAMPLE: u64 = 50 * MILLISECOND;
/// Members are compared over so long.
pub const SPEED_WINDOW: u64 = 5 * SECOND;
/// Windows in a row after which a disk is named slow, or well again: 20 s, longer than a disk's own error recovery (7 s
/// with TLER) and than a cache that is written back.
pub const SLOW_WINDOWS: u32 = 4;
/// A window with fewer I/Os says nothing of a member.
pub const SLOW_IOS_MIN: u64 = 16;
/// So many times as long as the median of its peers.
pub const SLOW_TIMES: u64 = 8;
/// Nobody is slow who takes less for an I/O: a disk that turns takes half of it.
pub const SLOW_LATENCY_MIN: u64 = 20 * MILLISECOND;

/// Most bad stripes that a scrub lists; the others are counted. 128 of up to 400 bytes of JSON are 51 KB, in the
/// configuration of every member and in every answer about the group.
pub const SCRUB_LIST_MAX: usize = 128;

/// Most LUs of a group; ublk has 2^20 devices, a person has patience for fewer.
pub const LU_MAX: usize = 4096;
/// Most extents of all LUs of a group, deleted ones too.
pub const EXTENTS_MAX: usize = 65_536;
/// Most deleted LUs that are remembered; the oldest go first.
pub const DELETED_MAX: usize = 256;
/// Longest name of a group or LU, in bytes.
pub const NAME_MAX: usize = 64;
/// Deepest queue of a LU: ublk's UBLK_MAX_QUEUE_DEPTH.
pub const DEPTH_MAX: u16 = 4096;

/// Most queues of a LU; the kernel makes no more than the machine has CPUs.
pub const QUEUES_MAX: u16 = 64;

/// Regions of an intent or missed map: 2^20 bits are 128 KiB a map.
pub const REGIONS_MAX: u64 = 1 << 20;
/// Regions that a group is given where they are large enough: its marks are three pages, and it may grow sixteenfold.
pub const REGIONS_WANTED: u64 = 1 << 16;
/// Smallest region of a map, in bytes.
pub const REGION_MIN: u64 = MIB;

/// Generations that a member may be ahead of all others: the changes of state that one update of the superblocks has together.
/// Each is of a member, a cursor or a mark; far fewer than this are ever waiting.
pub const AHEAD_MAX: u64 = 1024;
/// Former histories a superblock remembers.
pub const PARENTS_MAX: usize = 8;

/// Smallest unit of a LU, in bytes; the unit of a group is the next multiple of its stripe.
pub const EXTENT_MIN: u64 = MIB;
