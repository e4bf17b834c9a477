//! A RAID group, served by its owner thread.
//!
//! Everything here is plain single-thread data: the owner thread polls the futures, nobody else looks. The
//! parts: `serve` (host requests), `stripe_ops` (what is done to a stripe), `publish` (superblocks),
//! `background` (resync, rebuild), `start` (create, assemble), `control` (LUs, members, stop).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use lunar_api::target::{
    Consistency, GroupStatus, Level, LuCounters, LuStatus, MemberStatus, SyncStatus, TargetEvent,
    Witness,
};
use lunar_api::{DiskUuid, GroupUuid, History, LuUuid, SystemUuid};

use crate::config::{GroupConfig, LuConfig, ScrubRecord};
use crate::control::Zeroing;
use crate::copying::Copying;
use crate::extents::ExtentMap;
use crate::geometry::{Geometry, Piece};
use crate::growing::Shape;
use crate::inflight::InflightLog;
use crate::lanes::Lanes;
use crate::limits::GRAIN;
use crate::member::{Member, add};
use crate::planted::{self, Bug};
use crate::pool::{Closed, Lease, Pool, Quota};
use crate::regions::Maps;
use crate::reserve::Reserve;
use crate::stripe_ops::scrub::Finding;
use crate::stripe_table::StripeTable;
use crate::superblock::GroupRecord;
use crate::sync::Waiters;
use crate::traits::{Clock, Env, Tick};
use crate::view::Views;

/// How much of a disk is written that takes a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// What it has missed, if it was in the slot before and that is known; else all.
    Missed,
    /// What it has missed; refused where that is not known.
    OnlyMissed,
    All,
}

/// A member as the rim hands it in.
#[derive(Debug)]
pub struct Given<D> {
    pub uuid: DiskUuid,
    /// For messages.
    pub path: String,
    pub disk: D,
}

/// What a group needs from the rim.
pub struct Parts<E: Env> {
    pub system: SystemUuid,
    pub members: Vec<Given<E::Disk>>,
    /// Over the in-flight file; its content is what a dead predecessor left, or zeroes.
    pub pool: Rc<Pool>,
    pub clock: E::Clock,
    pub front: E::Front,
    /// Gives random 128 bits.
    pub random: Box<dyn FnMut() -> [u8; 16]>,
}

impl<E: Env> fmt::Debug for Parts<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parts")
            .field("system", &self.system)
            .finish_non_exhaustive()
    }
}

/// How to make a group; member i of the parts is slot i.
#[derive(Debug)]
pub struct CreateSpec {
    pub group: GroupUuid,
    pub name: String,
    pub level: Level,
    pub chunk: u64,
    pub consistency: Consistency,
    pub assume_clean: bool,
}

/// How to start a group.
#[derive(Debug)]
pub struct StartSpec {
    pub group: GroupUuid,
    pub force: bool,
    pub witness: Option<Witness>,
    /// Members to leave out, because they are still busy or do not answer: the group starts as if they were
    /// missing, and says so durably before it serves anything.
    pub without: Vec<DiskUuid>,
    /// Of members that were written apart from each other the side of this disk goes on; the others are stale.
    pub keep: Option<DiskUuid>,
    /// A group that was deleted comes back.
    pub undelete: bool,
}

/// Answer to a host request that failed: a positive errno (EIO, ENOSPC, EINVAL; never EAGAIN).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// Redundancy is exhausted, or the request is beyond the LU.
pub const EIO: Errno = Errno(5);

/// Tasks of `worker` that a rim spawns for a group.
pub const WORKERS: usize = 64;

/// A slot that is being filled.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rebuild {
    pub slot: u16,
    /// Stripes below were rebuilt before this process began; from here on every row is read and written.
    pub from: u64,
    /// Stripes below are right on it: they are read there.
    pub done: u64,
    /// Stripes below may be under work: writes go there too.
    pub window: u64,
    /// It has all but what it missed while it was away: only that is filled, and it is not read before the end.
    pub catches_up: bool,
}

impl Rebuild {
    /// Of a disk of which so many stripes are right.
    pub(crate) fn new(slot: u16, done: u64) -> Self {
        Self {
            slot,
            from: done,
            done,
            window: done,
            catches_up: false,
        }
    }

    /// Of a disk that has been away.
    pub(crate) fn catching_up(slot: u16) -> Self {
        Self {
            window: u64::MAX,
            catches_up: true,
            ..Self::new(slot, 0)
        }
    }
}

/// Counters of a LU, as cells.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub reads: Cell<u64>,
    pub writes: Cell<u64>,
    pub flushes: Cell<u64>,
    pub discards: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub write_bytes: Cell<u64>,
    pub errors: Cell<u64>,
    pub zero_copy: Cell<u64>,
    pub user_copy: Cell<u64>,
    pub bounced: Cell<u64>,
    pub range_lock_waits: Cell<u64>,
    pub full_stripe_writes: Cell<u64>,
    pub reconstruct_writes: Cell<u64>,
    pub read_modify_writes: Cell<u64>,
    pub degraded_reads: Cell<u64>,
    pub merged: Cell<u64>,
}

impl Counters {
    pub(crate) fn get(&self) -> LuCounters {
        LuCounters {
            reads: self.reads.get(),
            writes: self.writes.get(),
            flushes: self.flushes.get(),
            discards: self.discards.get(),
            read_bytes: self.read_bytes.get(),
            write_bytes: self.write_bytes.get(),
            errors: self.errors.get(),
            zero_copy: self.zero_copy.get(),
            user_copy: self.user_copy.get(),
            bounced: self.bounced.get(),
            range_lock_waits: self.range_lock_waits.get(),
            full_stripe_writes: self.full_stripe_writes.get(),
            reconstruct_writes: self.reconstruct_writes.get(),
            read_modify_writes: self.read_modify_writes.get(),
            degraded_reads: self.degraded_reads.get(),
            merged: self.merged.get(),
        }
    }
}

/// A LU of a running group; one that has grown is another, and requests from before end as they began.
#[derive(Debug)]
pub(crate) struct Lu {
    pub handle: u16,
    pub uuid: LuUuid,
    pub name: RefCell<String>,
    pub capacity: u64,
    pub depth: u16,
    pub queues: Cell<u16>,
    pub extents: ExtentMap,
    pub counters: Rc<Counters>,
}

impl Lu {
    pub(crate) fn new(handle: u16, lu: &LuConfig) -> Self {
        Self {
            handle,
            uuid: lu.uuid,
            name: RefCell::new(lu.name.clone()),
            capacity: lu.capacity,
            depth: lu.depth,
            queues: Cell::new(lu.queues),
            extents: lu.map(),
            counters: Rc::default(),
        }
    }

    /// Where byte `at` of the LU is in the group, and how many bytes follow there.
    ///
    /// # Panics  if `at` is beyond the LU: requests are checked when they arrive
    pub(crate) fn resolve(&self, at: u64) -> (u64, u64) {
        self.extents
            .resolve(at)
            .expect("requests lie within the LU")
    }

    /// As [`ExtentMap::pieces`].
    pub(crate) fn pieces(
        &self,
        geometry: &Geometry,
        at: u64,
        len: u64,
    ) -> impl Iterator<Item = Piece> {
        self.extents.pieces(geometry, at, len)
    }
}

/// Where the metadata of a member lies.
#[derive(Debug, Clone)]
pub(crate) struct MemberPlace {
    pub device_size: u64,
    pub reserve: Reserve,
}

/// A running group. Every method is called on its owner thread.
pub struct RaidGroup<E: Env> {
    pub(crate) id: GroupUuid,
    pub(crate) system: SystemUuid,
    pub(crate) geometry: Shape,
    pub(crate) pool: Rc<Pool>,
    pub(crate) clock: E::Clock,
    pub(crate) front: E::Front,
    pub(crate) random: RefCell<Box<dyn FnMut() -> [u8; 16]>>,

    pub(crate) members: RefCell<Vec<Rc<Member<E::Disk>>>>,
    /// Slots that hold what they should, as bits.
    pub(crate) in_sync: Cell<u64>,
    pub(crate) rebuild: Cell<Option<Rebuild>>,
    /// Stripes below have right redundancy.
    pub(crate) synced: Cell<u64>,
    /// What the superblocks say of both, in stripes.
    pub(crate) durable_synced: Cell<u64>,
    pub(crate) durable_rebuild: Cell<u64>,
    /// Redundancy is exhausted: nothing more is written.
    pub(crate) failed: Cell<bool>,
    /// A member has bad blocks, or had since the start.
    pub(crate) has_bad: Cell<bool>,
    /// Bad-block lists are being written.
    pub(crate) is_listing: Cell<bool>,

    pub(crate) record: RefCell<GroupRecord>,
    pub(crate) config: RefCell<GroupConfig>,
    pub(crate) generation: Cell<u64>,
    pub(crate) durable: Cell<u64>,
    /// The history that the disks say with it.
    pub(crate) durable_history: Cell<History>,
    /// What every member in sync or rebuilding says at least on its disk.
    pub(crate) floor: Cell<u64>,
    pub(crate) publishing: Cell<bool>,
    pub(crate) configuring: Cell<bool>,
    pub(crate) dirty: Cell<bool>,
    pub(crate) dirty_durable: Cell<bool>,
    /// `durable`, `publishing`, `configuring`, `background_ended`, `erasing` changed.
    pub(crate) changed: Waiters,

    pub(crate) lus: RefCell<Vec<Option<Rc<Lu>>>>,
    pub(crate) stripes: StripeTable,
    /// None where there is no redundancy, and of a group from before there were maps.
    pub(crate) maps: Option<Maps>,
    pub(crate) log: InflightLog,
    /// The logs on the members, where the policy has them.
    pub(crate) lanes: Option<Lanes>,
    /// Members that were given up while I/O of theirs was not over; they hold memory until it is.
    pub(crate) hung: RefCell<Vec<Rc<E::Disk>>>,
    /// What entries of the log name that stay for a successor.
    pub(crate) kept: RefCell<Vec<Lease>>,
    pub(crate) requests: Cell<u64>,
    pub(crate) active_writes: Cell<u64>,
    /// Requests that erase now.
    pub(crate) erasing: Cell<u32>,
    /// LUs that are zeroed before they are there: their space is taken.
    pub(crate) zeroing: RefCell<Vec<Zeroing>>,
    /// Writes without redundancy under way that take no stripe.
    pub(crate) plain_writes: Cell<u64>,
    /// When a copy that could not go on is tried again, unless there is new work before.
    pub(crate) copy_retry: Cell<(Tick, u64)>,
    /// A disk that is filled to replace another.
    pub(crate) copying: RefCell<Option<Rc<Copying<E::Disk>>>>,
    /// What the superblocks say of it, in bytes of the slot: 0 but after a clean stop.
    pub(crate) copied_to: Cell<u64>,
    /// A disk has taken a slot in memory, and the superblocks may name the one before.
    pub(crate) is_handed_over: Cell<bool>,
    pub(crate) turn: Cell<u32>,
    pub(crate) stopping: Cell<bool>,
    pub(crate) background_ended: Cell<bool>,
    /// Counts what makes background work look anew.
    pub(crate) sync_wanted: Cell<u64>,
    /// Stripes that the sync under way had to leave out: the slot that is rebuilt is not right there, or redundancy.
    pub(crate) holes: RefCell<BTreeSet<u64>>,
    pub(crate) sync_status: RefCell<Option<SyncStatus>>,
    /// A sync that could not go on waits so long, unless this much was wanted by then.
    pub(crate) sync_retry: Cell<(Tick, u64)>,
    /// The scrub that runs, or the last one; the configuration has what is durable of it.
    pub(crate) scrub: RefCell<Option<ScrubRecord>>,
    /// Counts what was ordered of scrubs.
    pub(crate) scrub_orders: Cell<u64>,
    /// What workers found, by stripe, until the scrub has taken it.
    pub(crate) scrub_found: RefCell<BTreeMap<u64, Finding>>,
    pub(crate) scrub_rate: Cell<u64>,
    pub(crate) rate_min: Cell<u64>,
    pub(crate) rate_max: Cell<Option<u64>>,
    /// Read errors of a member that may be repaired lately; 0: any number.
    pub(crate) read_errors_max: Cell<u32>,
    pub(crate) events: RefCell<Vec<TargetEvent>>,
    /// Woken by each of them.
    pub(crate) happened: Waiters,
    pub(crate) views: Views,
}

impl<E: Env> fmt::Debug for RaidGroup<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RaidGroup")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl<E: Env> RaidGroup<E> {
    /// The group's name for ever.
    pub fn id(&self) -> GroupUuid {
        self.id
    }

    /// Slots whose chunk of this stripe can be believed, as bits.
    pub(crate) fn readable(&self, stripe: u64) -> u64 {
        match self.rebuild.get() {
            Some(rebuild)
                if stripe < rebuild.done && !rebuild.catches_up && !self.is_hole(stripe) =>
            {
                self.in_sync.get() | 1 << rebuild.slot
            }
            _ => self.in_sync.get(),
        }
    }

    /// Slots that a write of this stripe goes to, as bits.
    pub(crate) fn writable(&self, stripe: u64) -> u64 {
        match self.rebuild.get() {
            Some(_) if planted::is(Bug::RebuildMissesWrites) => self.in_sync.get(),
            Some(rebuild) if stripe < rebuild.window => self.in_sync.get() | 1 << rebuild.slot,
            _ => self.in_sync.get(),
        }
    }

    /// Private memory; EIO if the group failed and has none left.
    pub(crate) async fn lease(&self, quota: Quota, len: usize) -> Result<Lease, Errno> {
        let leased = self.pool.lease_if_open(quota, len).await;
        leased.map_err(|Closed| EIO)
    }

    /// Redundancy is exhausted: from now on writes are answered EIO.
    pub(crate) fn set_failed(&self) {
        self.failed.set(true);
        self.pool.close();
    }

    fn is_hole(&self, stripe: u64) -> bool {
        let holes = self.holes.borrow();
        !holes.is_empty() && holes.contains(&stripe)
    }

    /// Says whether the redundancy of a stripe is right where nobody is writing.
    pub(crate) fn is_synced(&self, stripe: u64) -> bool {
        let is_proven =
            stripe < self.synced.get() && !self.is_hole(stripe) && !self.is_unsynced(stripe);
        is_proven || planted::is(Bug::UnsyncedBelieved)
    }

    pub(crate) fn rebuilding(&self) -> Option<u16> {
        self.rebuild.get().map(|rebuild| rebuild.slot)
    }

    pub(crate) fn lu(&self, handle: u16) -> Option<Rc<Lu>> {
        self.lus
            .borrow()
            .get(usize::from(handle))
            .cloned()
            .flatten()
    }

    /// LUs in order of handle, deleted ones left out.
    pub fn lus(&self) -> Vec<(u16, LuStatus)> {
        let lus = self.lus.borrow();
        lus.iter()
            .flatten()
            .map(|lu| (lu.handle, self.lu_status(lu)))
            .collect()
    }

    pub(crate) fn lu_status(&self, lu: &Lu) -> LuStatus {
        LuStatus {
            lu: lu.uuid,
            name: lu.name.borrow().clone(),
            group: self.id,
            capacity: lu.capacity,
            depth: lu.depth,
            queues: lu.queues.get(),
            queues_served: 0,
            ublk: None,
            problem: String::new(),
            counters: lu.counters.get(),
        }
    }

    /// Everything about it; `ublk` and `problem` of the LUs are the rim's to fill, `zero_copy` and `allocations` too.
    pub fn status(&self) -> GroupStatus {
        let record = self.record.borrow();
        let config = self.config.borrow();
        let now = self.clock.now();
        GroupStatus {
            group: self.id,
            name: config.name.clone(),
            level: self.geometry.level(),
            chunk: self.geometry.chunk(),
            stripe_bytes: self.geometry.stripe_bytes(),
            can_lose: self.geometry.margin(!self.told_in_sync()),
            consistency: record.consistency,
            state: self.group_state(),
            reason: self.reason(),
            history: self.durable_history.get(),
            generation: self.durable.get(),
            capacity: self.geometry.capacity(),
            capacity_max: self.capacity_max(),
            free: self.free_bytes(),
            member_bytes: self.geometry.member_bytes(),
            logical_block: record.logical_block,
            members: self
                .members
                .borrow()
                .iter()
                .map(|member| MemberStatus {
                    state: self.told_state(member),
                    ..member.status(now)
                })
                .collect(),
            lus: self.lus().into_iter().map(|(_, status)| status).collect(),
            replacement: self.copying().map(|copying| copying.to.status(now)),
            sync: self
                .sync_status
                .borrow()
                .clone()
                .or_else(|| self.waiting_sync()),
            scrub: self.scrub_status(),
            zeroing: self.zeroing_status(),
            read_errors_max: self.read_errors_max.get(),
            zero_copy: false,
            allocations: 0,
        }
    }

    pub(crate) fn event(&self, name: &str, slot: Option<u16>, text: &str) {
        let disk = slot.map(|slot| self.members.borrow()[usize::from(slot)].uuid);
        self.event_of(name, disk, text);
    }

    /// What happens to a disk that may have no slot yet.
    pub(crate) fn event_of(&self, name: &str, disk: Option<DiskUuid>, text: &str) {
        self.events.borrow_mut().push(TargetEvent {
            seq: 0,
            name: name.to_owned(),
            group: Some(self.id),
            disk,
            lu: None,
            text: text.to_owned(),
        });
        self.happened.wake_all();
    }

    pub(crate) fn note_repaired(&self, slot: u16, at: u64, len: u64) {
        let member = self.member(slot);
        add(&member.repaired, len.div_ceil(GRAIN));
        member.strikes.add(self.clock.now(), at);
        let text = format!(
            "{len} bytes at byte {at} of the data of slot {slot} were read from redundancy and rewritten"
        );
        self.event("ReadErrorRepaired", Some(slot), &text);
    }

    /// Waits until something happened that `take_events` gives.
    pub async fn wait_events(&self) {
        let any = || (!self.events.borrow().is_empty()).then_some(());
        self.happened.until(any).await;
    }

    /// Moves what happened since the last call to `to` (seq 0: the rim numbers them).
    pub fn take_events(&self, to: &mut Vec<TargetEvent>) {
        to.append(&mut self.events.borrow_mut());
    }

    /// A member with more read errors lately is failed, even if all were repaired; 0: never.
    pub fn set_read_errors_max(&self, most: u32) {
        self.read_errors_max.set(most);
    }

    /// Bounds in bytes a second of a member: what a sync may take while the host works, and at all.
    pub fn set_rebuild_rate(&self, min: Option<u64>, max: Option<u64>) {
        if let Some(min) = min {
            self.rate_min.set(min.max(1 << 20));
        }
        if max.is_some() {
            self.rate_max.set(max.map(|max| max.max(1 << 20)));
        }
    }
}
