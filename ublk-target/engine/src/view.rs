//! What queue threads serve by themselves: reads that healthy members answer, and writes that nobody has to plan.
//!
//! A queue thread looks at a [`GroupView`], a picture of the group that never changes, and forwards to the owner
//! whatever the picture does not settle. The owner makes a new picture when the group changes, and relies on a change
//! only when every queue thread has confirmed it (`Views`).
//!
//! Where there is no redundancy queue threads write too; there a picture is confirmed when no write is under way that an
//! earlier one allowed.
//!
//! Invariant: no write is acknowledged that a member has missed while a queue thread may still begin a read there. A
//! read that was begun before is as old as its request: the host cannot tell it from one that was served at once.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrayvec::ArrayVec;
use lunar_api::DiskUuid;
use lunar_api::target::LuCounters;

use crate::extents::ExtentMap;
use crate::geometry::{Geometry, Piece, Spot};
use crate::limits::MEMBERS_MAX;
use crate::member::add;
use crate::raid_group::{Counters, EIO, Errno, RaidGroup};
use crate::serve::{IOS_MAX, Run, Runs, request_piece};
use crate::sync::{Waiters, join_all};
use crate::traits::{Buf, Disk, DiskVerb, Env, HostRequest, HostVerb};

/// A picture of a group.
#[derive(Debug, Clone)]
pub struct GroupView {
    /// Later pictures have higher numbers.
    pub version: u64,
    geometry: Geometry,
    /// Slots that hold what they should on every stripe, as bits.
    readable: u64,
    /// Mirrors are equal on the stripes below.
    synced: u64,
    /// Writes are the owner's business: a member is being replaced, and what is written to it goes to two disks.
    is_copied: bool,
    /// By slot: the disk, and the bytes from its start to the group's data.
    members: Vec<(DiskUuid, u64)>,
}

impl GroupView {
    /// Where a piece of a read is, if this picture settles it; `turn` spreads reads over copies.
    fn source(&self, piece: &Piece, turn: u32) -> Option<Spot> {
        let is_readable = |slot: u16| self.readable & 1 << slot != 0;
        if !self.geometry.is_mirrored() {
            let own = Spot {
                slot: piece.slot,
                member_at: piece.member_at,
            };
            return is_readable(own.slot).then_some(own);
        }
        // Where copies differ one of them is right for all: the owner's choice.
        if piece.stripe >= self.synced {
            return None;
        }
        let copies = || {
            let all = self.geometry.copies(piece.stripe, piece.data);
            all.filter(|spot| is_readable(spot.slot))
        };
        let nth = (turn as usize).checked_rem(copies().count())?;
        copies().nth(nth).map(|copy| Spot {
            slot: copy.slot,
            member_at: copy.member_at + u64::from(piece.in_chunk),
        })
    }
}

/// Who follows the pictures of a group, and how far they are.
#[derive(Debug)]
pub(crate) struct Views {
    wanted: Cell<u64>,
    confirmed: Cell<u64>,
    changed: Waiters,
    /// Requests that each queue thread served.
    requests: RefCell<Vec<Arc<AtomicU64>>>,
}

impl Views {
    pub(crate) fn new() -> Self {
        Self {
            wanted: Cell::new(1),
            // Nobody follows.
            confirmed: Cell::new(u64::MAX),
            changed: Waiters::default(),
            requests: RefCell::default(),
        }
    }

    /// The picture has to be taken anew.
    pub(crate) fn advance(&self) {
        self.wanted.set(self.wanted.get() + 1);
        self.changed.wake_all();
    }

    /// The picture that is to be had.
    pub(crate) fn version(&self) -> u64 {
        self.wanted.get()
    }

    /// Waits until nobody looks at a picture from before the present state.
    pub(crate) async fn confirmed(&self) {
        let wanted = self.wanted.get();
        let is_there = || (self.confirmed.get() >= wanted).then_some(());
        self.changed.until(is_there).await;
    }
}

impl<E: Env> RaidGroup<E> {
    /// Takes the picture of the present state, and the disks it speaks of, by slot.
    pub fn view(&self) -> (GroupView, Vec<Option<Rc<E::Disk>>>) {
        let members = self.members.borrow();
        let first_hole = self.holes.borrow().first().copied();
        let doubted = first_hole.into_iter().chain(self.first_unsynced());
        let view = GroupView {
            version: self.views.wanted.get(),
            geometry: Geometry::clone(&self.geometry),
            // What has bad blocks is read by the owner, who knows which.
            readable: self.in_sync.get()
                & !members
                    .iter()
                    .fold(0, |set, member| match member.bad.is_empty() {
                        true => set,
                        false => set | 1 << member.slot,
                    }),
            synced: doubted.fold(self.synced.get(), u64::min),
            is_copied: members.iter().any(|member| member.twin.borrow().is_some()),
            members: members
                .iter()
                .map(|member| (member.uuid, member.data_offset))
                .collect(),
        };
        let disks = members.iter().map(|member| {
            let is_readable = view.readable & 1 << member.slot != 0;
            member.disk.borrow().clone().filter(|_| is_readable)
        });
        let disks = disks.collect();
        (view, disks)
    }

    /// Waits for a picture later than `version`.
    pub async fn view_after(&self, version: u64) {
        let views = &self.views;
        let is_later = || (views.wanted.get() > version).then_some(());
        views.changed.until(is_later).await;
    }

    /// Every thread that follows has picture `version` or a later one; `u64::MAX` when nobody follows any more.
    pub fn view_confirmed(&self, version: u64) {
        self.views.confirmed.set(version);
        self.views.changed.wake_all();
    }

    /// Requests of all LUs since the start, those too that queue threads served.
    pub(crate) fn requests_seen(&self) -> u64 {
        let followed = self.views.requests.borrow();
        let theirs = followed.iter().map(|count| count.load(Ordering::Relaxed));
        self.requests.get() + theirs.sum::<u64>()
    }

    /// A queue thread begins to serve, and counts its requests here.
    pub fn follow(&self, requests: Arc<AtomicU64>) {
        self.views.requests.borrow_mut().push(requests);
    }

    /// That queue thread has ended.
    pub fn unfollow(&self, requests: &Arc<AtomicU64>) {
        let mut followed = self.views.requests.borrow_mut();
        followed.retain(|count| !Arc::ptr_eq(count, requests));
        add(&self.requests, requests.load(Ordering::Relaxed));
    }

    /// Where the bytes of a LU are, for queue threads.
    pub fn lu_extents(&self, lu: u16) -> Option<ExtentMap> {
        self.lu(lu).map(|lu| lu.extents.clone())
    }
}

/// How a queue thread ended a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    Done(Result<(), Errno>),
    /// It is the owner's to serve, by way of private memory; these slots, as bits, just failed to read it. Nothing of
    /// it is in flight.
    Forward {
        failed: u64,
    },
}

/// A LU as a queue thread has it.
#[derive(Debug)]
pub struct QueueLu {
    extents: RefCell<Rc<ExtentMap>>,
    counters: Counters,
}

impl QueueLu {
    pub fn new(extents: ExtentMap) -> Self {
        Self {
            extents: RefCell::new(Rc::new(extents)),
            counters: Counters::default(),
        }
    }

    /// The LU has grown. What lies behind the end that is known here is the owner's to serve.
    pub fn grow(&self, extents: ExtentMap) {
        *self.extents.borrow_mut() = Rc::new(extents);
    }

    /// What was served here; what was forwarded the owner counts.
    pub fn counters(&self) -> LuCounters {
        self.counters.get()
    }
}

/// What a queue thread did on a member.
#[derive(Debug, Default)]
pub struct MemberCounts {
    pub disk: DiskUuid,
    pub reads: Cell<u64>,
    pub writes: Cell<u64>,
    pub read_bytes: Cell<u64>,
    pub write_bytes: Cell<u64>,
    pub read_errors: Cell<u64>,
    pub write_errors: Cell<u64>,
}

/// A picture with what it needs on this thread.
struct Loaded<D> {
    view: Arc<GroupView>,
    disks: Vec<Option<Rc<D>>>,
    counts: Vec<Rc<MemberCounts>>,
}

/// Serves requests on a queue thread; plain data of that thread.
pub struct QueueServer<D> {
    loaded: RefCell<Option<Rc<Loaded<D>>>>,
    /// Pictures from before by which requests are still being served.
    left: RefCell<Vec<Rc<Loaded<D>>>>,
    turn: Cell<u32>,
    /// Written by this thread alone, for the owner to see.
    requests: Arc<AtomicU64>,
}

impl<D> fmt::Debug for QueueServer<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueueServer").finish_non_exhaustive()
    }
}

impl<D> Default for QueueServer<D> {
    fn default() -> Self {
        Self {
            loaded: RefCell::default(),
            left: RefCell::default(),
            turn: Cell::default(),
            requests: Arc::default(),
        }
    }
}

type Ios<D> = ArrayVec<(u16, Option<<D as Disk>::Io>), IOS_MAX>;

impl<D: Disk> QueueServer<D> {
    /// Looks at another picture from now on; `disks` are its members on this thread, by slot.
    pub fn load(&self, view: Arc<GroupView>, disks: Vec<Option<Rc<D>>>) {
        let old = self.counts();
        let counts = view.members.iter().map(|(disk, _)| {
            let kept = old.iter().find(|counts| counts.disk == *disk);
            kept.cloned().unwrap_or_else(|| {
                Rc::new(MemberCounts {
                    disk: *disk,
                    ..MemberCounts::default()
                })
            })
        });
        let counts = counts.collect();
        let loaded = Rc::new(Loaded {
            view,
            disks,
            counts,
        });
        let left = self.loaded.borrow_mut().replace(loaded);
        self.left.borrow_mut().extend(left);
    }

    /// No write is under way that was begun by an earlier picture: this one can be confirmed. Reads are as old as
    /// their request and keep nobody waiting, and writes are begun here only where there is no redundancy.
    pub fn is_settled(&self) -> bool {
        let mut left = self.left.borrow_mut();
        left.retain(|one| one.view.geometry.redundancy() == 0 && Rc::strong_count(one) > 1);
        left.is_empty()
    }

    /// What was done on the members, by slot.
    pub fn counts(&self) -> Vec<Rc<MemberCounts>> {
        let loaded = self.loaded.borrow();
        loaded
            .as_ref()
            .map_or_else(Vec::new, |loaded| loaded.counts.clone())
    }

    /// Looks at the members on this thread, and finds the first that is looked for.
    pub fn find_disk(&self, mut look: impl FnMut(&D) -> bool) -> Option<Rc<D>> {
        let loaded = self.loaded.borrow();
        let mut disks = loaded
            .iter()
            .flat_map(|loaded| loaded.disks.iter().flatten());
        disks.find(|disk| look(disk)).cloned()
    }

    /// Requests served here, in all; this thread keeps it up to date.
    pub fn requests(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.requests)
    }

    /// Serves a request to its end, or says that the owner has to. Allocates nothing.
    ///
    /// # Crash  as the owner's service of it: a write comes here only where members have no redundancy
    pub async fn serve(&self, lu: &QueueLu, request: HostRequest) -> Served {
        const FORWARD: Served = Served::Forward { failed: 0 };
        let loaded = match &*self.loaded.borrow() {
            Some(loaded) => Rc::clone(loaded),
            None => return FORWARD,
        };
        let (view, redundancy) = (&loaded.view, loaded.view.geometry.redundancy());
        let verb = match request.verb {
            HostVerb::Read => DiskVerb::Read,
            HostVerb::Write { fua } if redundancy == 0 && !view.is_copied => {
                DiskVerb::Write { fua }
            }
            _ => return FORWARD,
        };
        let extents = Rc::clone(&lu.extents.borrow());
        let end = request.at.checked_add(request.len);
        let fits = end.is_some_and(|end| end <= extents.capacity());
        if !request.zero_copy || !fits {
            return FORWARD;
        }
        let turn = self.turn.get().wrapping_add(1);
        self.turn.set(turn);
        // Before the first I/O: what is in flight cannot be forwarded.
        let mut pieces = extents.pieces(&view.geometry, request.at, request.len);
        let is_here = |spot: Spot| loaded.disks[usize::from(spot.slot)].is_some();
        if !pieces.all(|piece| view.source(&piece, turn).is_some_and(is_here)) {
            return FORWARD;
        }
        let failed = self.transfer(&loaded, &extents, &request, verb, turn).await;
        if failed != 0 && redundancy > 0 {
            return Served::Forward { failed };
        }
        let requests = self.requests.load(Ordering::Relaxed);
        self.requests.store(requests + 1, Ordering::Relaxed);
        let counters = &lu.counters;
        add(&counters.zero_copy, 1);
        match verb {
            DiskVerb::Read => {
                add(&counters.reads, 1);
                add(&counters.read_bytes, request.len);
            }
            _ => {
                add(&counters.writes, 1);
                add(&counters.write_bytes, request.len);
            }
        }
        if failed == 0 {
            return Served::Done(Ok(()));
        }
        add(&counters.errors, 1);
        Served::Done(Err(EIO))
    }

    async fn transfer(
        &self,
        loaded: &Loaded<D>,
        extents: &ExtentMap,
        request: &HostRequest,
        verb: DiskVerb,
        turn: u32,
    ) -> u64 {
        let (mut runs, mut ios) = (Runs::new(), Ios::<D>::new());
        let mut failed = 0;
        let view = &loaded.view;
        for piece in extents.pieces(&view.geometry, request.at, request.len) {
            let spot = view.source(&piece, turn).expect("looked at before");
            if let Some(run) = runs.add(spot.slot, spot.member_at, request_piece(&piece)) {
                failed |= loaded.start(&run, request, verb, &mut ios).await;
            }
        }
        while let Some(run) = runs.next() {
            failed |= loaded.start(&run, request, verb, &mut ios).await;
        }
        failed | loaded.join(verb, &mut ios).await
    }
}

impl<D: Disk> Loaded<D> {
    /// Starts an I/O. Answers the slots that failed, if it had to wait for others.
    async fn start(
        &self,
        run: &Run,
        request: &HostRequest,
        verb: DiskVerb,
        ios: &mut Ios<D>,
    ) -> u64 {
        let slot = usize::from(run.slot);
        let disk = self.disks[slot].as_ref().expect("looked at before");
        let failed = match ios.is_full() {
            true => self.join(verb, ios).await,
            false => 0,
        };
        let counts = &self.counts[slot];
        let (count, bytes) = match verb {
            DiskVerb::Read => (&counts.reads, &counts.read_bytes),
            _ => (&counts.writes, &counts.write_bytes),
        };
        add(count, 1);
        add(bytes, run.len);
        let buf = match run.len == request.len {
            true => Buf::Answer(request.id),
            false => Buf::Request(request.id),
        };
        let at = self.view.members[slot].1 + run.at;
        let io = disk.submit(verb, at, run.len, buf, &run.pieces);
        ios.push((run.slot, Some(io)));
        failed
    }

    async fn join(&self, verb: DiskVerb, ios: &mut Ios<D>) -> u64 {
        let mut failed = 0;
        join_all(ios, |slot, result| {
            if result.is_err() {
                failed |= 1 << slot;
                let counts = &self.counts[usize::from(slot)];
                match verb {
                    DiskVerb::Read => add(&counts.read_errors, 1),
                    _ => add(&counts.write_errors, 1),
                }
            }
        })
        .await;
        failed
    }
}

const _: () = assert!(MEMBERS_MAX <= 64, "slots are bits");

#[cfg(test)]
mod tests {
    use lunar_api::target::Level;

    use super::*;

    fn view(level: Level, readable: u64, synced: u64) -> GroupView {
        GroupView {
            version: 1,
            geometry: Geometry::new(level, 4, 65536, 1 << 20).unwrap(),
            readable,
            synced,
            is_copied: false,
            members: vec![(DiskUuid::NIL, 0); 4],
        }
    }

    fn slot_of(view: &GroupView, at: u64, turn: u32) -> Option<u16> {
        view.source(&piece(view, at), turn).map(|spot| spot.slot)
    }

    fn piece(view: &GroupView, at: u64) -> Piece {
        view.geometry.pieces(at, 512).next().unwrap()
    }

    #[test]
    fn source_is_a_readable_member_or_the_owners_business() {
        let healthy = view(Level::Raid5, 0b1111, 0);
        let first = piece(&healthy, 0);
        assert_eq!(slot_of(&healthy, 0, 7), Some(first.slot));
        let degraded = view(Level::Raid5, 0b1111 & !(1 << first.slot), 16);
        assert_eq!(slot_of(&degraded, 0, 7), None);
        let other = piece(&degraded, 65536);
        assert_eq!(slot_of(&degraded, 65536, 7), Some(other.slot));
    }

    #[test]
    fn source_goes_round_copies_that_are_equal() {
        let mirrors = view(Level::Raid1, 0b1010, 3);
        let chosen: Vec<_> = (0..4)
            .map(|turn| slot_of(&mirrors, 2 * 65536, turn))
            .collect();
        assert_eq!(chosen, [Some(1), Some(3), Some(1), Some(3)]);
        assert_eq!(slot_of(&mirrors, 3 * 65536, 0), None);
        assert_eq!(slot_of(&view(Level::Raid1, 0, 3), 2 * 65536, 0), None);
        let pairs = view(Level::Raid10, 0b1101, 3);
        let chosen: Vec<_> = [0, 65536]
            .iter()
            .flat_map(|at| (0..2).map(|turn| slot_of(&pairs, *at, turn)))
            .collect();
        assert_eq!(chosen, [Some(0), Some(0), Some(2), Some(3)]);
    }
}
