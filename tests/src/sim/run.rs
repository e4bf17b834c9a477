//! One run: a plan carried out, against the laws.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use lunar_api::target::{GroupStatus, LuSize, MemberState, Witness};
use lunar_api::{GroupUuid, LuUuid, SystemUuid};
use lunar_engine::geometry::Geometry;
use lunar_engine::pool::Pool;
use lunar_engine::raid_group::{CreateSpec, Given, Parts, RaidGroup, WORKERS};
use lunar_engine::traits::{Env, SECOND};

use super::disk::{Handle, SimDisk};
use super::host::{Host, Sent, Told};
use super::model::{Hole, Model};
use super::pages::Pages;
use super::plan::{Boot, Config, End, Plan, When};
use super::random::Random;
use super::states::Eye;
use super::tally::Tally;
use super::world::{SimClock, SimFront, SimMemory, World};

pub const SYSTEM: SystemUuid = SystemUuid::from_bytes([7; 16]);
pub const GROUP: GroupUuid = GroupUuid::from_bytes([9; 16]);
/// Bytes of a disk: the smallest, and one for a group that grows.
pub const DISK_BYTES: u64 = 64 << 20;
/// Virtual time in which a request is answered, a start is over.
pub const ANSWER_LIMIT: u64 = 900 * SECOND;
/// Virtual time in which background work ends.
pub const WORK_LIMIT: u64 = 4 * 3600 * SECOND;

/// The engine's kinds in this world.
#[derive(Debug)]
pub struct Sim;
impl Env for Sim {
    type Disk = Handle;
    type Clock = SimClock;
    type Front = SimFront;
}

/// A law of the simulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Law {
    /// A sector has what it may have.
    Data,
    /// Errors only where redundancy is exhausted.
    Errors,
    /// A group starts, or says a reason that is one.
    Starts,
    /// Requests and background work end.
    Ends,
    /// Where redundancy is whole, it fits.
    Fits,
    /// The engine's own assertions.
    Asserts,
    /// The same seed gives the same run.
    Repeats,
}

/// A law was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub law: Law,
    pub text: String,
}

impl Violation {
    pub fn new(law: Law, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { law, text }
    }
}

/// How a part of a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    On,
    /// The process or the power is to go down now.
    Down,
    /// Nothing can be done any more, and that is right.
    Over,
}

/// A run under way.
pub struct Run {
    pub plan: Plan,
    pub world: Rc<World>,
    pub eye: Rc<Eye>,
    pub random: Random,
    /// All disks that there have been, by number.
    pub disks: Vec<Rc<SimDisk>>,
    /// Disks that were replaced, or failed by hand: nobody puts them back.
    pub retired: Vec<u8>,
    pub geometry: Geometry,
    pub group: Option<Rc<RaidGroup<Sim>>>,
    pub memory: SimMemory,
    pub host: Host,
    pub tally: Tally,
    pub witness: Option<Witness>,
    /// Disk and state of each slot when it was looked at last.
    pub seats: Vec<(u8, MemberState)>,
    /// More has failed than redundancy has, since the last start.
    pub is_exhausted: bool,
    /// A member was not in sync since the last start: the disks may still say so.
    pub was_degraded: bool,
    /// Slots with bad-block lists when it was looked at last, as bits.
    pub listed: u64,
    /// Slots that were not there when it started without force: what they hold is proven to be right.
    pub proven: u64,
    /// The power went since all was synced.
    pub is_torn: bool,
    /// A start with other members than the last did not come to its end: sides may be apart.
    pub is_apart: bool,
    pub has_rotted: bool,
    /// Older copies of disks.
    pub copies: BTreeMap<u8, Pages>,
    /// A disk of which a copy is there too at the next start.
    pub twin: Option<u8>,
    /// Orders that are carried out.
    pub orders: Rc<Cell<u32>>,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

/// How a run ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub violation: Option<Violation>,
    pub hash: u64,
    pub tally: Tally,
}

/// What is planted in the disks of a run.
pub type Plant = fn(&Run);

/// Carries a plan out. `plant` is called when the disks are there, and after each that comes.
pub fn run(plan: &Plan, plant: Option<Plant>) -> Outcome {
    let mut run = match Run::new(plan, plant) {
        Ok(run) => run,
        Err(violation) => {
            return Outcome {
                violation: Some(violation),
                hash: 0,
                tally: Tally::new(),
            };
        }
    };
    let violation = run.all(plant).err();
    run.tally.events = run.world.happened.get();
    run.tally.requests = run.host.requests;
    run.tally.sharing = run.host.sharing;
    run.tally.exhausted = u64::from(run.is_exhausted);
    run.tally.ended();
    let hash = run.world.hash();
    run.group = None;
    run.world.clear();
    Outcome {
        violation,
        hash,
        tally: run.tally,
    }
}

fn uuid_of_lu(lu: usize) -> LuUuid {
    LuUuid::from_bytes([lu as u8 + 1; 16])
}

impl Run {
    fn new(plan: &Plan, plant: Option<Plant>) -> Result<Self, Violation> {
        let config = &plan.config;
        let world = World::new(plan.seed);
        world.is_loud.set(plan.is_loud);
        let eye = Rc::new(Eye::default());
        let geometry = Geometry::new(lunar_api::target::Level::Raid1, 2, 65536, 1 << 20)
            .expect("a shape until there is one");
        let mut run = Self {
            plan: plan.clone(),
            world,
            eye,
            random: Random::new(plan.seed, 3),
            disks: Vec::new(),
            retired: Vec::new(),
            geometry,
            group: None,
            memory: SimMemory::fresh(),
            host: Host::new(Vec::new()),
            tally: Tally::new(),
            witness: None,
            seats: Vec::new(),
            is_exhausted: false,
            was_degraded: false,
            listed: 0,
            proven: 0,
            is_torn: false,
            is_apart: false,
            has_rotted: false,
            copies: BTreeMap::new(),
            twin: None,
            orders: Rc::default(),
        };
        for i in 0..config.members {
            let fill = if config.is_clean { 0 } else { 0xA5 ^ i };
            run.add_disk(fill);
        }
        if let Some(plant) = plant {
            plant(&run);
        }
        run.create()?;
        Ok(run)
    }

    pub fn config(&self) -> &Config {
        &self.plan.config
    }

    /// A new disk; answers its number.
    pub fn add_disk(&mut self, fill: u8) -> u8 {
        let number = self.disks.len() as u8;
        let config = &self.plan.config;
        let pages = Pages::new(DISK_BYTES, fill);
        let disk = SimDisk::new(number, pages, config.speed, config.has_cache, &self.eye);
        disk.faults.no_zeroes.set(!config.has_zeroes);
        self.disks.push(disk);
        number
    }

    pub fn disk(&self, number: u8) -> &Rc<SimDisk> {
        &self.disks[usize::from(number)]
    }

    pub fn given(&self, number: u8) -> Given<Handle> {
        let disk = self.disk(number);
        Given {
            uuid: disk.uuid,
            path: format!("/dev/disk{number}"),
            disk: Handle::new(&self.world, disk),
        }
    }

    pub fn parts(&self, members: Vec<Given<Handle>>) -> Parts<Sim> {
        let world = Rc::clone(&self.world);
        Parts {
            system: SYSTEM,
            members,
            pool: Pool::new(Box::new(self.memory.clone())),
            clock: SimClock(Rc::clone(&self.world)),
            front: SimFront(Rc::clone(&self.world)),
            random: Box::new(move || {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&(world.random.next() | 1).to_le_bytes());
                bytes[8..].copy_from_slice(&world.random.next().to_le_bytes());
                bytes
            }),
        }
    }

    /// What a rim runs for a group.
    pub fn serve(&mut self, group: Rc<RaidGroup<Sim>>) {
        for _ in 0..WORKERS {
            self.world.spawn(Rc::clone(&group).worker());
        }
        self.world.spawn(Rc::clone(&group).background());
        self.world.spawn(Rc::clone(&group).watch());
        self.group = Some(group);
    }

    /// A future to its end, where no crash is planned.
    pub fn must<T: 'static>(
        &self,
        what: &str,
        future: impl Future<Output = T> + 'static,
    ) -> Result<T, Violation> {
        let done = self.world.block_on(ANSWER_LIMIT, future);
        done.ok_or_else(|| Violation::new(Law::Ends, format!("{what} does not end")))
    }

    fn create(&mut self) -> Result<(), Violation> {
        let config = self.config().clone();
        let members = (0..config.members).map(|i| self.given(i)).collect();
        let spec = CreateSpec {
            group: GROUP,
            name: "data".into(),
            level: config.level,
            chunk: config.chunk,
            consistency: config.consistency,
            assume_clean: config.is_clean,
        };
        let made = self.must("creation", RaidGroup::create(self.parts(members), spec))?;
        let refused = |error| Violation::new(Law::Starts, format!("not made: {error:?}"));
        let group = made.map_err(refused)?;
        self.serve(Rc::clone(&group));
        let status = group.status();
        let sizes: Vec<u64> = vec![status.member_bytes; usize::from(config.members)];
        self.geometry = match config.level {
            lunar_api::target::Level::Linear => Geometry::linear(&sizes),
            level => Geometry::new(level, sizes.len(), status.chunk, status.member_bytes),
        }
        .expect("the group has it");
        self.eye.know(self.geometry.clone());
        self.look(&status);
        self.set_rate();
        let mut models = Vec::new();
        for (i, bytes) in config.lus.iter().enumerate() {
            let (group, size) = (Rc::clone(&group), LuSize::Bytes(*bytes));
            let is_clean = config.is_clean;
            let made = self.must("a LU", async move {
                let name = format!("vol{i}");
                match is_clean {
                    true => group.lu_create(uuid_of_lu(i), &name, size, 64).await,
                    false => group.lu_create_zeroed(uuid_of_lu(i), &name, size, 64).await,
                }
            })?;
            let handle = made.map_err(refused)?;
            let group = self.group.as_ref().expect("it runs");
            let extents = group.lu_extents(handle).expect("just made");
            let geometry = self.geometry.clone();
            let hole = match self.plan.has_no_hole {
                true => Hole::None,
                false => Hole::of(self.plan.config.consistency),
            };
            models.push(Model::new(i, geometry, extents, hole));
        }
        self.host = Host::new(models);
        Ok(())
    }

    pub fn look(&mut self, status: &GroupStatus) {
        let number = |disk: lunar_api::DiskUuid| disk.to_bytes()[0].wrapping_sub(1);
        self.seats = status
            .members
            .iter()
            .map(|m| (number(m.disk), m.state))
            .collect();
        for member in status.all_members() {
            self.eye.seat(number(member.disk), member.slot);
        }
        self.witness = Some(Witness {
            history: status.history,
            generation: status.generation,
        });
    }

    /// Slots that are not in sync, as bits.
    pub fn not_in_sync(&self) -> u64 {
        let seats = self.seats.iter().enumerate();
        seats
            .filter(|(_, (_, state))| *state != MemberState::InSync)
            .fold(0, |set, (slot, _)| set | 1 << slot)
    }

    /// Slots that cannot be relied on, as bits: not in sync, or their disk is in trouble.
    pub fn troubled(&self) -> u64 {
        let mut set = self.not_in_sync() | self.listed;
        for (slot, (number, _)) in self.seats.iter().enumerate() {
            let Some(disk) = self.disks.get(usize::from(*number)) else {
                continue;
            };
            let faults = &disk.faults;
            let is_bad = faults.is_gone.get()
                || faults.hangs.get()
                || faults.is_failing.get()
                || !faults.bad.borrow().is_empty();
            set |= u64::from(is_bad) << slot;
        }
        set
    }

    /// These slots (as bits) are lost from here on.
    pub fn lose(&mut self, slots: u64) {
        let models = self.host.models.iter_mut();
        models.for_each(|model| model.lost(slots));
    }

    /// Looks at the group, and tells the models what follows.
    pub fn observe(&mut self) {
        let Some(group) = &self.group else { return };
        let status = group.status();
        let mut events = Vec::new();
        group.take_events(&mut events);
        for event in events {
            self.world
                .tell(|| format!("{}: {}", event.name, event.text));
        }
        let before = self.not_in_sync();
        self.look(&status);
        let has_list = status.members.iter().filter(|m| m.bad_blocks > 0);
        self.listed = has_list.fold(0, |set, member| set | 1 << member.slot);
        let now = self.not_in_sync();
        for (number, state) in &self.seats {
            if *state != MemberState::InSync {
                let faults = &self.disk(*number).faults;
                faults.is_unseen.set(false);
                faults.is_failing.set(false);
            }
        }
        self.proven &= now;
        self.was_degraded |= now != 0;
        let newly = now & !before;
        if newly != 0 {
            self.lose(newly);
        }
        if !self.geometry.survives(self.troubled()) {
            self.is_exhausted = true;
        }
        self.eye.watch(&status, &self.world);
        for (slot, (number, _)) in (0..).zip(self.seats.clone()) {
            let disk = Rc::clone(self.disk(number));
            let bad = disk.faults.bad.borrow();
            if let Some(start) = status.members.get(usize::from(slot)).map(|m| m.data_offset)
                && !bad.is_empty()
            {
                let models = self.host.models.iter_mut();
                models.for_each(|model| model.unreadable(slot, start, &bad));
            }
        }
        let is_synced = now == 0 && status.sync.is_none() && status.replacement.is_none();
        if is_synced {
            self.is_torn = false;
            self.host.models.iter_mut().for_each(Model::synced);
        }
    }

    /// Sends a request.
    pub fn send(&self, sent: &Sent) {
        let group = Rc::clone(self.group.as_ref().expect("it runs"));
        let (request, answer) = (sent.request(), Rc::clone(&sent.answer));
        let lu = sent.lu as u16;
        self.world.tell(|| {
            format!(
                "send {}: LU {lu} {:?} {:?} write {}",
                sent.tag, sent.kind, sent.sectors, sent.stamp
            )
        });
        self.world.spawn(async move {
            answer.set(Some(group.serve(lu, request).await));
        });
    }

    /// Takes in all answers that there are.
    pub fn harvest(&mut self) -> Result<(), Violation> {
        if self
            .host
            .sent
            .iter()
            .all(|sent| sent.answer.get().is_none())
        {
            return Ok(());
        }
        self.observe();
        let is_whole = self.not_in_sync() == 0;
        while let Some(told) = self.host.harvest(&self.world, is_whole) {
            self.judge(told)?;
        }
        Ok(())
    }

    /// Says whether what the host was told is right.
    pub fn judge(&mut self, told: Told) -> Result<(), Violation> {
        match told {
            Told::Answered => Ok(()),
            Told::Wrong(wrong) => {
                let (stripe, d, in_chunk) = self.host.models[wrong.lu].place(wrong.sector);
                let slot = self.geometry.copy(stripe, d, 0).slot;
                let place = format!(
                    "{wrong}: stripe {stripe}, data {d}, in slot {slot}, sector {in_chunk} of the chunk"
                );
                Err(Violation::new(Law::Data, place))
            }
            Told::Failed(kind, errno) => {
                self.tally.errors += 1;
                if self.is_exhausted {
                    return Ok(());
                }
                let reason = self.group.as_ref().map(|group| group.status().reason);
                Err(Violation::new(
                    Law::Errors,
                    format!("{kind:?} was answered {errno:?}, and redundancy is there: {reason:?}"),
                ))
            }
        }
    }

    /// Boot after boot, then the checks at the end.
    fn all(&mut self, plant: Option<Plant>) -> Result<(), Violation> {
        let boots = std::mem::take(&mut self.plan.boots);
        for (i, boot) in boots.iter().enumerate() {
            self.tally.boots += 1;
            self.world.tell(|| format!("boot {i}"));
            self.arm(boot);
            let mut way = Way::On;
            if i > 0 {
                way = self.start()?;
                if let Some(plant) = plant {
                    plant(self);
                }
            }
            if way == Way::On {
                way = self.load(boot)?;
            }
            match way {
                Way::Over => {
                    self.tally.given_up += 1;
                    return Ok(());
                }
                Way::On if i + 1 == boots.len() => return self.last_checks(),
                Way::On if boot.end == End::Stop => self.stop()?,
                Way::On | Way::Down => self.crash(boot.end)?,
            }
            for between in &boot.between {
                self.world.tell(|| format!("{between:?}"));
                self.between(*between);
            }
            if i + 1 == boots.len() {
                // The last one went down: all that is left is to see what is there.
                self.arm(&Boot {
                    when: When::Quiet,
                    ..boot.clone()
                });
                return match self.start()? {
                    Way::On => self.last_checks(),
                    Way::Over | Way::Down => Ok(()),
                };
            }
        }
        Ok(())
    }

    fn arm(&self, boot: &Boot) {
        self.world.crash_at.set(u64::MAX);
        self.eye.aim(None);
        match boot.when {
            When::Events(n) => self.world.crash_at.set(self.world.happened.get() + n),
            When::Arises(state, nth) => self.eye.aim(Some((state, nth))),
            When::Quiet => {}
        }
    }

    /// A clean stop; the group says so, or why not.
    fn stop(&mut self) -> Result<(), Violation> {
        let Some(group) = self.group.clone() else {
            return Ok(());
        };
        let limit = WORK_LIMIT;
        let stopped = self
            .world
            .block_on(limit, async move { group.stop(false).await });
        match stopped {
            None if self.world.is_down.get() => self.crash(End::Kill),
            None => Err(Violation::new(Law::Ends, "a stop does not end")),
            Some(Err(error)) if !self.is_exhausted => {
                Err(Violation::new(Law::Ends, format!("not stopped: {error:?}")))
            }
            Some(stopped) => {
                self.observe();
                if stopped.is_ok() {
                    // What was answered is durable now.
                    for model in &mut self.host.models {
                        let answers = model.answers();
                        model.flushed(answers);
                    }
                }
                self.end_process();
                if stopped.is_ok() {
                    self.memory = SimMemory::fresh();
                }
                Ok(())
            }
        }
    }

    fn end_process(&mut self) {
        for disk in &self.disks {
            disk.process_died(&self.world, &self.random);
            disk.faults.hangs.set(false);
            disk.faults.slow.set(0);
            disk.faults.write_errors.set(0);
            disk.faults.is_failing.set(false);
        }
        // Its destructors change its memory, which is not its successor's.
        self.memory = self.memory.left();
        self.group = None;
        if self.random.percent(30) {
            let number = self.random.index(self.disks.len()) as u8;
            self.copies.insert(number, self.disk(number).snapshot());
        }
        self.world.clear();
        self.orders = Rc::default();
    }

    /// The process dies, or the power goes.
    fn crash(&mut self, end: End) -> Result<(), Violation> {
        if self.group.is_some() {
            self.harvest()?;
            self.observe();
        }
        let status = self.group.as_ref().map(|group| group.status());
        let is_live = self.memory.has_live_entry();
        let states = self.eye.take(status.as_ref(), is_live);
        self.world.tell(|| format!("crash, {end:?}, in {states:?}"));
        self.tally.crashed(end, &states);
        self.world.trace(0xC0FFEE);
        if end == End::Power {
            for disk in &self.disks {
                disk.power_lost(&self.world, &self.random);
            }
            self.end_process();
            self.memory = SimMemory::fresh();
            self.host.power_lost();
            self.is_torn = true;
        } else {
            self.end_process();
        }
        Ok(())
    }

    /// Requests that a dead process did not answer are sent to its successor, as ublk does.
    pub fn send_again(&mut self) {
        let again: Vec<Sent> = self.host.sent.clone();
        for sent in again {
            self.send(&sent);
        }
    }
}

/// A future's value that comes later.
pub type Later<T> = Rc<RefCell<Option<T>>>;
