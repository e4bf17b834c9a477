//! What the engine was at when it was crashed, told from outside: by what is under way on the disks, and where there.
//!
//! A crash may be aimed: it comes when a state arises for the nth time.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use lunar_api::target::{GroupStatus, MemberState, ScrubState, SyncAction};
use lunar_engine::geometry::Geometry;
use lunar_engine::reserve::{Layout, lay_out};
use lunar_engine::superblock::{At, MemberEntry, Superblock, decode};
use lunar_engine::traits::DiskVerb;

use super::disk::{Flight, SimDisk};
use super::world::World;

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// A state of the engine that a crash may hit.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum State { $($(#[$doc])* $name),* }

        impl State {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];
        }
    };
}

states! {
    /// Data is being written, and nothing of its parity or of another copy is yet.
    DataWrite,
    /// Of a stripe data is written and parity is not, or the other way round.
    BetweenDataAndParity,
    /// One copy is written and another is not.
    BetweenCopies,
    /// The in-flight log has a live entry.
    LogLive,
    /// A page of the intent map with more marks.
    IntentSet,
    /// A page of the intent map with fewer marks.
    IntentCleared,
    /// A page of the missed map with more marks.
    MissedSet,
    /// A page of the missed map with fewer marks.
    MissedCleared,
    /// Superblocks that say for the first time that it is dirty.
    DirtyMark,
    /// Superblocks that say that it is clean.
    CleanMark,
    /// Superblocks that say that a member is not in sync any more.
    DegradeMark,
    /// Superblocks that say that a member is in sync again.
    InSyncMark,
    /// Superblocks of a new history.
    HistoryRenewed,
    /// Superblocks with another cursor.
    CursorSaved,
    /// Some members have a superblock of the new generation, others have not.
    GenerationBump,
    /// The first copy of a superblock, the second copy.
    FirstCopy,
    SecondCopy,
    /// A configuration.
    Configuration,
    Flush,
    Erase,
    /// Work in the background.
    Resync,
    Rebuild,
    CatchUp,
    Copying,
    Scrub,
    /// A start: it reads, it writes again what a dead process was writing, it writes superblocks.
    StartReads,
    StartReplays,
    StartPublishes,
    /// A log lane of a member.
    LaneWritten,
}

/// What a write in the data area is, of its stripe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Data(u16),
    Parity,
    Copy(u16),
}

#[derive(Debug)]
struct Open {
    disk: u8,
    at: u64,
    state: State,
    also: Vec<State>,
    /// In the data area: the stripe, bytes of the chunk, what it is there.
    part: Option<(u64, std::ops::Range<u64>, Role)>,
    is_half: bool,
}

/// Looks at what is under way.
#[derive(Default)]
pub struct Eye {
    geometry: RefCell<Option<Geometry>>,
    slots: RefCell<BTreeMap<u8, u16>>,
    open: RefCell<Vec<Open>>,
    /// A start is under way.
    pub is_start: Cell<bool>,
    aim: Cell<Option<(State, u64)>>,
}

impl std::fmt::Debug for Eye {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Eye")
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

impl Eye {
    pub fn know(&self, geometry: Geometry) {
        *self.geometry.borrow_mut() = Some(geometry);
    }

    /// A disk is in a slot.
    pub fn seat(&self, disk: u8, slot: u16) {
        self.slots.borrow_mut().insert(disk, slot);
    }

    /// The world goes down when this state arises for the nth time.
    pub fn aim(&self, at: Option<(State, u64)>) {
        self.aim.set(at);
    }

    /// What goes on in the background is looked at now and then.
    pub fn watch(&self, status: &GroupStatus, world: &World) {
        for state in background(status) {
            self.arises(state, world);
        }
    }

    fn arises(&self, state: State, world: &World) {
        if let Some((aimed, left)) = self.aim.get()
            && aimed == state
        {
            self.aim.set(Some((aimed, left.saturating_sub(1))));
            if left <= 1 {
                self.aim.set(None);
                world.is_down.set(true);
            }
        }
    }

    /// An I/O begins.
    pub fn submitted(&self, disk: &SimDisk, flight: &Flight, world: &World) {
        let Some(open) = self.classify(disk, flight, world) else {
            return;
        };
        for state in [open.state].iter().chain(&open.also) {
            self.arises(*state, world);
        }
        self.open.borrow_mut().push(open);
    }

    /// An I/O has ended.
    pub fn ended(&self, disk: &SimDisk, flight: &Flight, is_ok: bool, world: &World) {
        let mut open = self.open.borrow_mut();
        let is_it = |open: &Open| open.disk == disk.number && open.at == flight.at;
        let Some(i) = open.iter().position(is_it) else {
            return;
        };
        let ended = open.swap_remove(i);
        if let (Some((stripe, rows, role)), true) = (&ended.part, is_ok) {
            for other in open.iter_mut() {
                let Some((its, its_rows, its_role)) = &other.part else {
                    continue;
                };
                let meets = its == stripe && its_rows.start < rows.end && rows.start < its_rows.end;
                let half = match (role, its_role) {
                    (Role::Data(_), Role::Parity) | (Role::Parity, Role::Data(_)) => {
                        State::BetweenDataAndParity
                    }
                    (Role::Copy(_), Role::Copy(_)) => State::BetweenCopies,
                    _ => continue,
                };
                if meets && !other.is_half {
                    other.is_half = true;
                    self.arises(half, world);
                }
            }
        }
        if ended.state == State::FirstCopy && is_ok {
            let others = open
                .iter_mut()
                .filter(|other| other.state == State::FirstCopy);
            for other in others.filter(|other| !other.is_half) {
                other.is_half = true;
                self.arises(State::GenerationBump, world);
            }
        }
    }

    fn classify(&self, disk: &SimDisk, flight: &Flight, world: &World) -> Option<Open> {
        let one = |state, also| {
            Some(Open {
                disk: disk.number,
                at: flight.at,
                state,
                also,
                part: None,
                is_half: false,
            })
        };
        match flight.verb {
            DiskVerb::Flush => return one(State::Flush, Vec::new()),
            DiskVerb::Read => {
                return match self.is_start.get() {
                    true => one(State::StartReads, Vec::new()),
                    false => None,
                };
            }
            DiskVerb::WriteZeroes { .. } => return one(State::Erase, Vec::new()),
            DiskVerb::Write { .. } => {}
        }
        let reserve = lay_out(disk.len()).ok()?;
        let layout = reserve.layout;
        let within =
            |area: lunar_engine::reserve::Area| (area.offset..area.end()).contains(&flight.at);
        if flight.at == 4096 || flight.at == reserve.end_copy {
            let copy = match flight.at == 4096 {
                true => State::FirstCopy,
                false => State::SecondCopy,
            };
            let also = match self.is_start.get() {
                true => vec![State::StartPublishes],
                false => superblock_states(disk, flight, world),
            };
            return one(copy, also);
        }
        if within(layout.intent) {
            return one(
                map_state(
                    disk,
                    flight,
                    world,
                    [State::IntentSet, State::IntentCleared],
                ),
                Vec::new(),
            );
        }
        if within(layout.missed) {
            return one(
                map_state(
                    disk,
                    flight,
                    world,
                    [State::MissedSet, State::MissedCleared],
                ),
                Vec::new(),
            );
        }
        if within(layout.config[0]) || within(layout.config[1]) {
            return one(State::Configuration, Vec::new());
        }
        if within(layout.logs) {
            return one(State::LaneWritten, Vec::new());
        }
        self.data_state(disk, flight, &layout)
    }

    fn data_state(&self, disk: &SimDisk, flight: &Flight, layout: &Layout) -> Option<Open> {
        let geometry = self.geometry.borrow();
        let geometry = geometry.as_ref()?;
        let slot = self.slots.borrow().get(&disk.number).copied()?;
        let at = flight.at.checked_sub(layout.data_offset)?;
        let unit = geometry.stripe_on_member();
        let stripe = at / unit;
        let role = if geometry.is_mirrored() {
            Role::Copy(slot)
        } else if geometry.parities() == 0 {
            Role::Data(slot)
        } else {
            match geometry.part_of(stripe, slot) {
                part if part < geometry.data_slots() => Role::Data(part),
                _ => Role::Parity,
            }
        };
        let state = match self.is_start.get() {
            true => State::StartReplays,
            false => State::DataWrite,
        };
        let from = at % unit;
        Some(Open {
            disk: disk.number,
            at: flight.at,
            state,
            also: Vec::new(),
            part: Some((stripe, from..from + flight.len, role)),
            is_half: false,
        })
    }

    /// What it is at now; what is open is forgotten.
    pub fn take(&self, status: Option<&GroupStatus>, is_log_live: bool) -> Vec<State> {
        let mut found = Vec::new();
        for open in self.open.take() {
            found.push(open.state);
            found.extend(open.also);
            if open.state == State::FirstCopy && open.is_half {
                found.push(State::GenerationBump);
            }
            if let (true, Some((_, _, role))) = (open.is_half, &open.part) {
                found.push(match role {
                    Role::Copy(_) => State::BetweenCopies,
                    Role::Data(_) | Role::Parity => State::BetweenDataAndParity,
                });
            }
        }
        if is_log_live {
            found.push(State::LogLive);
        }
        if let Some(status) = status {
            found.extend(background(status));
        }
        found.sort_unstable();
        found.dedup();
        self.aim.set(None);
        found
    }
}

fn background(status: &GroupStatus) -> Vec<State> {
    let mut found = Vec::new();
    if let Some(sync) = &status.sync {
        found.push(match sync.action {
            SyncAction::Resync => State::Resync,
            SyncAction::Recover if sync.total < status.member_bytes => State::CatchUp,
            SyncAction::Recover => State::Rebuild,
            SyncAction::Replace => State::Copying,
        });
    }
    if status
        .scrub
        .as_ref()
        .is_some_and(|scrub| scrub.state == ScrubState::Running)
    {
        found.push(State::Scrub);
    }
    found
}

/// What is new in a superblock, beside its generation.
fn superblock_states(disk: &SimDisk, flight: &Flight, world: &World) -> Vec<State> {
    let at = At {
        offset: flight.at,
        device_size: disk.len(),
    };
    let mut old = [0; 4096];
    disk.read(flight.at, &mut old);
    let group = |superblock: Superblock| superblock.member.map(|member| member.group);
    let new = decode(&disk.bytes_of(flight, world), at);
    let new = new.ok().and_then(group);
    let (Some(old), Some(new)) = (decode(&old, at).ok().and_then(group), new) else {
        return Vec::new();
    };
    let any = |differ: fn(MemberState, MemberState) -> bool| {
        let mut pairs = old.members.iter().zip(&new.members);
        pairs.any(|(a, b)| a.state != b.state && differ(a.state, b.state))
    };
    let moved = |(a, b): (&MemberEntry, &MemberEntry)| a.rebuilt_to != b.rebuilt_to;
    let mut pairs = old.members.iter().zip(&new.members);
    let is_moved = pairs.any(moved) || old.synced_to != new.synced_to;
    let all = [
        (State::DegradeMark, any(|was, _| was == MemberState::InSync)),
        (State::InSyncMark, any(|_, is| is == MemberState::InSync)),
        (State::HistoryRenewed, old.history != new.history),
        (State::DirtyMark, !old.flags.dirty && new.flags.dirty),
        (State::CleanMark, old.flags.dirty && !new.flags.dirty),
        (State::CursorSaved, is_moved),
    ];
    let found = all.iter().filter(|(_, is_so)| *is_so);
    found.map(|(state, _)| *state).collect()
}

fn map_state(disk: &SimDisk, flight: &Flight, world: &World, [set, cleared]: [State; 2]) -> State {
    let mut old = vec![0; flight.len as usize];
    disk.read(flight.at, &mut old);
    let ones = |bytes: &[u8]| -> u32 {
        let sectors = bytes.chunks_exact(512);
        sectors
            .flat_map(|sector| &sector[32..])
            .map(|byte| byte.count_ones())
            .sum()
    };
    match ones(&disk.bytes_of(flight, world)) < ones(&old) {
        true => cleared,
        false => set,
    }
}
