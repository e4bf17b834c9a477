//! How a group comes to run: made new, or assembled from what its members say.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use lunar_api::target::MemberState;
use lunar_api::{ApiError, ErrorKind, History};

use crate::assembly::{self, Conditions, Present, SlotPlan};
use crate::background::RATE_MIN;
use crate::config::GroupConfig;
use crate::geometry::Geometry;
use crate::inflight::{self, InflightLog, Left};
use crate::label::read_superblock;
use crate::limits::MEMBERS_MAX;
use crate::member::Member;
use crate::parity;
use crate::pool::{BLOCK_MAX, Pool, Quota};
use crate::raid_group::{CreateSpec, Given, MemberPlace, Parts, RaidGroup, Rebuild, StartSpec};
use crate::reserve::{Reserve, lay_out, region_bytes};
use crate::stripe_table::StripeTable;
use crate::superblock::{ConfigVersion, Flags, GroupRecord, MemberEntry};
use crate::sync::Waiters;
use crate::traits::{Buf, Disk, DiskVerb, Env, Piece};

fn failed(what: &str, why: impl ToString) -> ApiError {
    ApiError::new(ErrorKind::Failed, what).because(why.to_string())
}

impl<E: Env> RaidGroup<E> {
    /// Writes superblocks and configuration to fresh members, and runs the group.
    ///
    /// # Crash  a member's superblock names the group only after its configuration is durable; members that were
    /// not reached stay free disks, and the group does not start without them
    /// # Errors  a level that cannot have so many members, a chunk that is none, disks that do not fit together
    pub async fn create(parts: Parts<E>, spec: CreateSpec) -> Result<Rc<Self>, ApiError> {
        let what = "the group could not be made";
        let refuse = |why: String| ApiError::new(ErrorKind::Usage, what).because(why);
        if parts.members.len() > MEMBERS_MAX {
            return Err(refuse(format!(
                "{} disks: a group has at most {MEMBERS_MAX}",
                parts.members.len()
            )));
        }
        let mut reserves: Vec<Reserve> = Vec::new();
        let (mut generation, mut logical_block) = (1, 512);
        for given in &parts.members {
            let size = given.disk.capacity();
            let reserve =
                lay_out(size).map_err(|error| refuse(format!("{}: {error}", given.path)))?;
            reserves.push(reserve);
            logical_block = logical_block.max(given.disk.logical_block());
            // A new group starts above whatever its disks said before.
            if let Ok(old) = read_superblock(&given.disk, &parts.pool).await {
                generation = generation.max(old.generation + 1);
            }
        }
        let n = u16::try_from(parts.members.len()).expect("MEMBERS_MAX is below 2^16");
        let bytes = crate::reserve::member_bytes(&reserves);
        let geometry = Geometry::new(spec.level, usize::from(n), spec.chunk, bytes)
            .map_err(|error| refuse(error.to_string()))?;
        let config = GroupConfig::new(&spec.name).map_err(|error| refuse(error.to_string()))?;
        let mut random = parts.random;
        let clean = spec.assume_clean || geometry.redundancy() == 0;
        let record = GroupRecord {
            uuid: spec.group,
            history: History::from_bytes(random()),
            parents: Vec::new(),
            flags: Flags {
                assume_clean: spec.assume_clean,
                ..Flags::default()
            },
            level: spec.level,
            chunk: geometry.chunk(),
            consistency: spec.consistency,
            logical_block,
            physical_block: 4096,
            member_bytes: geometry.member_bytes(),
            region_bytes: region_bytes(geometry.member_bytes()),
            synced_to: if clean { geometry.member_bytes() } else { 0 },
            log_lanes: 1,
            config: ConfigVersion::default(),
            members: parts
                .members
                .iter()
                .map(|m| MemberEntry {
                    disk: m.uuid,
                    state: MemberState::InSync,
                    rebuilt_to: 0,
                })
                .collect(),
        };
        let mut slots = Vec::new();
        for (given, reserve) in parts.members.into_iter().zip(reserves) {
            let place = MemberPlace {
                device_size: given.disk.capacity(),
                reserve,
            };
            slots.push(Some((given, place)));
        }
        let rest = Rest {
            system: parts.system,
            pool: parts.pool,
            clock: parts.clock,
            front: parts.front,
            random,
        };
        let group = Self::launch(
            rest,
            geometry,
            record,
            config.clone(),
            generation,
            slots,
            false,
        )
        .await;
        group.write_config(config).await?;
        if group.in_sync.get().count_ones() < u32::from(n) {
            return Err(failed(what, group.reason()));
        }
        group.log.begin();
        group.event("NewArray", None, &spec.name);
        Ok(group)
    }

    /// Assembles, replays what a dead predecessor had in flight, and runs the group.
    ///
    /// # Crash  replay writes what was being written, again: it may be repeated. The superblocks change only after
    /// it, and before anything is served
    /// # Errors  what `assembly` refuses, by name; an unreadable configuration
    pub async fn start(parts: Parts<E>, spec: StartSpec) -> Result<Rc<Self>, ApiError> {
        let what = "the group could not be started";
        let mut superblocks = Vec::new();
        let mut readable = Vec::new();
        let mut unreadable = Vec::new();
        for given in parts.members {
            match read_superblock(&given.disk, &parts.pool).await {
                Ok(superblock) => {
                    superblocks.push(superblock);
                    readable.push(given);
                }
                // A member that cannot say who it is, is one that is not there: the rules for that decide.
                Err(error) => unreadable.push(format!("{}: {}", given.path, chain(&error))),
            }
        }
        if readable.is_empty() {
            return Err(failed(what, unreadable.join("; ")));
        }
        let memory = parts.pool.whole().len() as u64;
        let generation = superblocks
            .iter()
            .map(|superblock| superblock.generation)
            .max();
        // A log of another time of the group says nothing about these disks.
        let left = inflight::read(&parts.pool, spec.group, memory)
            .filter(|left| generation.is_some_and(|generation| left.generation >= generation));
        let conditions = Conditions {
            witness: spec.witness,
            force: spec.force,
            process_death_only: left.is_some(),
        };
        let present: Vec<Present<'_>> = superblocks
            .iter()
            .zip(&readable)
            .map(|(superblock, given)| Present {
                superblock,
                path: &given.path,
            })
            .collect();
        let plan = assembly::assemble(spec.group, &present, conditions)
            .map_err(|error| error.to_api(&spec.group.to_string()))?;
        let mut random = parts.random;
        let record = plan
            .next_record(History::from_bytes(random()))
            .ok_or_else(|| failed(what, "its deciding superblock names no group"))?;
        // A stop in mid-publish leaves the newest state on some members only; whoever is missing at the next
        // start must not take it with him.
        let differs = |disk: usize| {
            let superblock = &superblocks[disk];
            superblock.generation != plan.superblock.generation
                || superblock
                    .member
                    .as_ref()
                    .is_none_or(|member| member.group != record)
        };
        let is_changed = plan.slots.iter().any(|slot| match slot {
            SlotPlan::InSync(disk) | SlotPlan::Rebuilding(disk) => differs(*disk),
            SlotPlan::Stale(_) | SlotPlan::Faulty | SlotPlan::Missing => false,
        });
        let geometry = record.geometry().map_err(|error| failed(what, error))?;
        let mut given: Vec<Option<Given<E::Disk>>> = readable.into_iter().map(Some).collect();
        let mut slots: Vec<Slot<E>> = Vec::new();
        for slot in &plan.slots {
            let index = match slot {
                SlotPlan::InSync(i) | SlotPlan::Rebuilding(i) => Some(*i),
                SlotPlan::Stale(_) | SlotPlan::Faulty | SlotPlan::Missing => None,
            };
            slots.push(index.and_then(|i| {
                let superblock = &superblocks[i];
                let reserve = Reserve {
                    layout: superblock.member.as_ref()?.layout,
                    data_bytes: record.member_bytes,
                    end_copy: superblock.end_copy,
                };
                let place = MemberPlace {
                    device_size: superblock.device_size,
                    reserve,
                };
                given[i].take().map(|given| (given, place))
            }));
        }
        drop(given);
        // Replay comes first: what is read from here on may take the memory that it writes from.
        let mut unreplayed = 0;
        if let Some(left) = &left {
            unreplayed = left.unreplayed | replay::<E>(&parts.pool, left, &slots).await;
            inflight::replayed(&parts.pool, unreplayed);
        }
        let config = read_config::<E>(&parts.pool, &geometry, &record, &slots, &plan.slots).await?;
        let rest = Rest {
            system: parts.system,
            pool: parts.pool,
            clock: parts.clock,
            front: parts.front,
            random,
        };
        let generation = plan.superblock.generation;
        let group = Self::launch(
            rest,
            geometry,
            record,
            config,
            generation,
            slots,
            left.is_some(),
        )
        .await;
        for reason in plan.reasons.iter().chain(&unreadable) {
            group.event("Assembled", None, reason);
        }
        if group.in_sync.get().count_ones() < u32::from(group.geometry.members()) {
            group.event("DegradedArray", None, &group.reason());
        }
        if is_changed {
            group.advance();
            group
                .publish()
                .await
                .map_err(|_| failed(what, "too few members took the superblock"))?;
        }
        if unreplayed != 0 {
            let why = "did not take what a dead process was writing";
            group
                .fail(unreplayed, why)
                .await
                .map_err(|_| failed(what, format!("a member {why}")))?;
            inflight::replayed(&group.pool, 0);
        }
        group.log.begin();
        if left.is_some() {
            group.event(
                "Recovered",
                None,
                "what the process that died was writing is written",
            );
        }
        Ok(group)
    }
}

/// What is left of the parts when the members are taken out.
struct Rest<E: Env> {
    system: lunar_api::SystemUuid,
    pool: Rc<Pool>,
    clock: E::Clock,
    front: E::Front,
    random: Box<dyn FnMut() -> [u8; 16]>,
}

/// A member that is there, and where its metadata lies.
type Slot<E> = Option<(Given<<E as Env>::Disk>, MemberPlace)>;

impl<E: Env> RaidGroup<E> {
    /// Puts a group together in memory. States are those of the record, but who is not there is not believed.
    /// `died`: a process of the group died here, and its log goes on.
    async fn launch(
        rest: Rest<E>,
        geometry: Geometry,
        record: GroupRecord,
        config: GroupConfig,
        generation: u64,
        slots: Vec<Slot<E>>,
        died: bool,
    ) -> Rc<Self> {
        let chunk = geometry.chunk();
        let (mut in_sync, mut rebuild) = (0, None);
        let mut members = Vec::new();
        let mut places = Vec::new();
        for (i, (slot, entry)) in (0u16..).zip(slots.into_iter().zip(&record.members)) {
            let mut state = entry.state;
            match slot {
                Some((given, place)) => {
                    match state {
                        MemberState::InSync => in_sync |= 1 << i,
                        MemberState::Rebuilding => {
                            let done = entry.rebuilt_to / chunk;
                            rebuild = Some(Rebuild {
                                slot: i,
                                done,
                                window: done,
                            });
                        }
                        MemberState::Faulty | MemberState::Missing => {}
                    }
                    let mut member = Member::new(i, given.uuid, given.path, state);
                    member.data_offset = place.reserve.layout.data_offset;
                    member.disk = Some(Rc::new(given.disk));
                    members.push(Rc::new(member));
                    places.push(Some(place));
                }
                None => {
                    if state != MemberState::Faulty {
                        state = MemberState::Missing;
                    }
                    let path = format!("(was disk {})", entry.disk);
                    members.push(Rc::new(Member::new(i, entry.disk, path, state)));
                    places.push(None);
                }
            }
        }
        let synced = record.synced_to / chunk;
        let meta = rest.pool.lease(Quota::Work, members.len() * 4096).await;
        let log = InflightLog::start(&rest.pool, record.uuid, generation, died);
        let lus = config.lus.clone();
        let group = Rc::new(Self {
            id: record.uuid,
            system: rest.system,
            geometry,
            pool: rest.pool,
            clock: rest.clock,
            front: rest.front,
            random: RefCell::new(rest.random),
            members: RefCell::new(members),
            places: RefCell::new(places),
            in_sync: Cell::new(in_sync),
            rebuild: Cell::new(rebuild),
            synced: Cell::new(synced),
            durable_synced: Cell::new(synced),
            durable_rebuild: Cell::new(rebuild.map_or(0, |rebuild| rebuild.done)),
            failed: Cell::new(false),
            dirty: Cell::new(record.flags.dirty),
            dirty_durable: Cell::new(record.flags.dirty),
            record: RefCell::new(record),
            rate_min: Cell::new(config.options.rebuild_min_bytes.unwrap_or(RATE_MIN)),
            rate_max: Cell::new(config.options.rebuild_max_bytes),
            config: RefCell::new(config),
            generation: Cell::new(generation),
            durable: Cell::new(generation),
            publishing: Cell::new(false),
            configuring: Cell::new(false),
            meta,
            changed: Waiters::default(),
            lus: RefCell::default(),
            stripes: StripeTable::new(),
            log,
            kept: RefCell::default(),
            requests: Cell::new(0),
            active_writes: Cell::new(0),
            turn: Cell::new(0),
            stopping: Cell::new(false),
            background_ended: Cell::new(false),
            sync_wanted: Cell::new(0),
            sync_status: RefCell::default(),
            events: RefCell::default(),
        });
        for lu in &lus {
            group.add_lu(lu);
        }
        group
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Reads the configuration from the first member that gives it whole.
async fn read_config<E: Env>(
    pool: &Rc<Pool>,
    geometry: &Geometry,
    record: &GroupRecord,
    slots: &[Slot<E>],
    plans: &[SlotPlan],
) -> Result<GroupConfig, ApiError> {
    let mut why = String::from("no member is there");
    let version = record.config;
    let bytes = usize::try_from(version.len).unwrap_or(usize::MAX);
    let len = bytes.next_multiple_of(4096);
    if len > BLOCK_MAX {
        return Err(failed(
            "the configuration could not be read",
            format!("it has {len} bytes"),
        ));
    }
    let lease = pool.lease(Quota::Work, len.max(1)).await;
    for (slot, plan) in slots.iter().zip(plans) {
        let (Some((given, place)), SlotPlan::InSync(_)) = (slot, plan) else {
            continue;
        };
        let at = place.reserve.layout.config[usize::from(version.current)].offset;
        let piece = Piece {
            offset: 0,
            len: u32::try_from(len).expect("at most 4 MiB"),
        };
        let read = given
            .disk
            .submit(DiskVerb::Read, at, len as u64, Buf::Pool(&lease), &[piece])
            .await;
        if let Err(error) = read {
            why = format!("{}: {error}", given.path);
            continue;
        }
        let mut json = vec![0; bytes];
        parity::copy_out(&mut json, lease.cells(0..bytes));
        match GroupConfig::decode(&json, &version, geometry) {
            Ok(config) => return Ok(config),
            Err(error) => why = format!("{}: {error}", given.path),
        }
    }
    Err(failed("the configuration could not be read", why))
}

/// Writes again what a dead predecessor was writing; returns the slots that did not take it, as bits.
async fn replay<E: Env>(pool: &Rc<Pool>, left: &Left, slots: &[Slot<E>]) -> u64 {
    let whole = pool.whole();
    let mut failed = 0;
    for segment in &left.segments {
        let Some(Some((given, _))) = slots.get(usize::from(segment.slot)) else {
            continue;
        };
        let piece = Piece {
            offset: segment.from,
            len: segment.len,
        };
        let len = u64::from(segment.len);
        let fits = segment
            .at
            .checked_add(len)
            .is_some_and(|end| end <= given.disk.capacity());
        let verb = DiskVerb::Write { fua: false };
        if !fits
            || given
                .disk
                .submit(verb, segment.at, len, Buf::Pool(&whole), &[piece])
                .await
                .is_err()
        {
            failed |= 1 << segment.slot;
        }
    }
    failed
}
