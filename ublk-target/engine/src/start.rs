//! How a group comes to run: made new, or assembled from what its members say.

use std::rc::Rc;

use lunar_api::target::{Consistency, FailCause, Level, MemberState};
use lunar_api::{ApiError, DiskUuid, ErrorKind, History};

use crate::assembly::{self, Conditions, Plan, Present, SlotPlan};
use crate::config::GroupConfig;
use crate::geometry::{Geometry, GeometryError};
use crate::inflight::{self, Left};
use crate::label::{read_superblock, read_superblock_to};
use crate::launch::{LogsFound, Said, Seated, Slot, split};
use crate::limits::{CONFIG_PIECE, MEMBERS_MAX};
use crate::parity;
use crate::planted::{self, Bug};
use crate::pool::{Lease, Pool, Quota};
use crate::raid_group::{CreateSpec, Given, MemberPlace, Parts, RaidGroup, StartSpec};
use crate::regions::MapsFound;
use crate::replay::{self, MemberLog};
use crate::reserve::{Reserve, lay_out, region_bytes};
use crate::serve::bits;
use crate::superblock::{BYTES, ConfigVersion, Flags, GroupRecord, MemberEntry, Superblock};
use crate::traits::{Buf, Disk, DiskError, DiskVerb, Env, Piece};

mod found;
use found::{
    find_lists, find_maps, is_listed, logs_found, mark_logged, read_list_of, read_log_of, read_maps,
};

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
        let (members, mut rest) = split(parts);
        if members.len() > MEMBERS_MAX {
            return Err(refuse(format!(
                "{} disks: a group has at most {MEMBERS_MAX}",
                members.len()
            )));
        }
        let mut reserves: Vec<Reserve> = Vec::new();
        let (mut generation, mut logical_block) = (1, 512);
        for given in &members {
            let size = given.disk.capacity();
            let reserve =
                lay_out(size).map_err(|error| refuse(format!("{}: {error}", given.path)))?;
            reserves.push(reserve);
            logical_block = logical_block.max(given.disk.logical_block());
            // A new group starts above whatever its disks said before.
            if let Ok(old) = read_superblock(&given.disk, &rest.pool).await {
                generation = generation.max(old.generation + 1);
            }
        }
        let n = u16::try_from(members.len()).expect("MEMBERS_MAX is below 2^16");
        let geometry = shape(&spec, &reserves).map_err(|error| refuse(error.to_string()))?;
        let config = GroupConfig::new(&spec.name).map_err(|error| refuse(error.to_string()))?;
        if !spec.level.allows(spec.consistency) {
            let why = match spec.consistency {
                Consistency::None | Consistency::Bitmap => "no redundancy to be made right again",
                Consistency::Ppl => "no single parity to be logged",
                Consistency::Journal => "no two parities to be logged",
            };
            let why = format!("a {:?} has {why}", spec.level);
            return Err(refuse(why.to_lowercase()).hint("leave --consistency away"));
        }
        let clean = spec.assume_clean || geometry.redundancy() == 0;
        let record = GroupRecord {
            uuid: spec.group,
            history: History::from_bytes((rest.random)()),
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
            maps: geometry.redundancy() > 0,
            region_bytes: region_bytes(geometry.member_bytes()),
            synced_to: if clean { geometry.member_bytes() } else { 0 },
            log_lanes: 1,
            config: ConfigVersion::default(),
            floor: 0,
            members: members
                .iter()
                .zip(0..n)
                .map(|(m, slot)| MemberEntry {
                    disk: m.uuid,
                    state: MemberState::InSync,
                    rebuilt_to: 0,
                    left_at: 0,
                    data_bytes: match spec.level {
                        Level::Linear => geometry.data_bytes(slot),
                        _ => 0,
                    },
                    has_bad_blocks: false,
                })
                .collect(),
            replacement: None,
        };
        let mut slots = Vec::new();
        for (given, reserve) in members.into_iter().zip(reserves) {
            let place = MemberPlace {
                device_size: given.disk.capacity(),
                reserve,
            };
            slots.push(Some((given, place)));
        }
        let maps = record.maps.then(|| MapsFound::none(&record));
        let said = Said {
            geometry,
            record,
            config: config.clone(),
            generation,
            maps,
            logs: LogsFound::default(),
            bad: vec![None; usize::from(n)],
            died: false,
        };
        let group = Self::launch(rest, said, Seated { slots, new: None }).await;
        for slot in 0..n {
            if !group.empty_log(&group.member(slot)).await {
                return Err(failed(what, "a disk does not take writes"));
            }
        }
        if let Some(turn) = group.maps_turn().await {
            let lease = group.pool.lease(Quota::Work, CONFIG_PIECE).await;
            let members = group.members.borrow().clone();
            if group.put_maps(&turn, &lease, &members).await != 0 {
                return Err(failed(what, "a disk does not take writes"));
            }
        }
        group.write_config(config).await?;
        if group.in_sync.get().count_ones() < u32::from(n) {
            return Err(failed(what, group.reason()));
        }
        group.log.begin();
        group.event("NewArray", None, &format!("group {} was made", spec.name));
        Ok(group)
    }

    /// Assembles, replays what a dead predecessor had in flight, and runs the group. Members of
    /// `StartSpec::without` are not there, whatever they say: a dead predecessor may still write to them.
    ///
    /// # Crash  replay writes what was being written, again: it may be repeated. The superblocks change only after
    /// it, and before anything is served
    /// # Errors  what `assembly` refuses, by name; an unreadable configuration
    pub async fn start(parts: Parts<E>, spec: StartSpec) -> Result<Rc<Self>, ApiError> {
        let what = "the group could not be started";
        let (members, mut rest) = split(parts);
        let whole = rest.pool.whole();
        let memory = whole.len() as u64;
        // What is replayed from is not read into, not even by a start that dies before its replay.
        let page = match inflight::read(&rest.pool, spec.group, memory) {
            Some(left) => left
                .spare_page(memory)
                .ok_or_else(|| failed(what, "its in-flight log names all of its memory"))?,
            None => rest.pool.lease(Quota::Work, BYTES).await.start(),
        };
        let mut superblocks = Vec::new();
        let mut readable = Vec::new();
        let mut unreadable = Vec::new();
        for given in members {
            if spec.without.contains(&given.uuid) {
                continue;
            }
            match read_superblock_to(&given.disk, (&whole, page)).await {
                Ok(superblock) if spec.without.contains(&superblock.disk) => {}
                // Its first superblock written here would take it away from the other, unasked.
                Ok(superblock) if superblock.system != rest.system => {
                    return Err(foreign(&given.path, &superblock));
                }
                // It has left since whoever hands it in saw it last.
                Ok(superblock) if superblock.is_free() => {
                    unreadable.push(format!("{}: it is a free disk now", given.path));
                }
                Ok(superblock) => {
                    superblocks.push(superblock);
                    readable.push(given);
                }
                // A member that cannot say who it is, is one that is not there: the rules for that decide.
                Err(error) => unreadable.push(format!("{}: {}", given.path, chain(&error))),
            }
        }
        if readable.is_empty() {
            unreadable.extend(spec.without.iter().map(left_out));
            return Err(failed(what, unreadable.join("; ")));
        }
        let generation = superblocks
            .iter()
            .map(|superblock| superblock.generation)
            .max();
        if !spec.force
            && let Some(generation) = generation
        {
            inflight::check_version(&rest.pool, spec.group, generation).map_err(|error| {
                ApiError::new(ErrorKind::Refused, what)
                    .because(error.to_string())
                    .hint(format!(
                        "start it with the Lunar that wrote it; or, as after a power loss: lunar group start {} --force",
                        spec.group
                    ))
            })?;
        }
        // A log of another time of the group says nothing about these disks.
        let left = inflight::read(&rest.pool, spec.group, memory)
            .filter(|left| generation.is_some_and(|generation| left.generation >= generation));
        // After a power loss nothing of the memory is needed.
        let leased = match left {
            Some(_) => None,
            None => Some(rest.pool.lease(Quota::Work, CONFIG_PIECE).await),
        };
        let scratch = match &leased {
            Some(lease) => (lease, 0..CONFIG_PIECE),
            None => (&whole, page..page + BYTES),
        };
        let mut maps = Vec::new();
        let mut logs = Vec::new();
        let mut lists = Vec::new();
        for (superblock, given) in superblocks.iter().zip(&readable) {
            maps.push(read_maps(superblock, &given.disk, (&whole, page)).await);
            logs.push(read_log_of(superblock, &given.disk, &scratch, left.is_none()).await);
            lists.push(match is_listed(superblock.disk, &superblocks) {
                true => read_list_of(superblock, &given.disk, (&whole, page)).await,
                false => None,
            });
        }
        drop(leased);
        let conditions = Conditions {
            witness: spec.witness,
            force: spec.force,
            process_death_only: left.is_some(),
            keep: spec.keep,
            undelete: spec.undelete,
        };
        let present: Vec<Present<'_>> = superblocks
            .iter()
            .zip(&readable)
            .zip(maps.iter().zip(&logs).zip(&lists))
            .map(|((superblock, given), ((maps, log), list))| Present {
                superblock,
                path: &given.path,
                is_marked: maps.as_ref().is_none_or(|maps| !maps.intent.is_empty()),
                is_log_lost: log.newest.is_none(),
                is_list_lost: list.is_none(),
            })
            .collect();
        let plan = assembly::assemble(spec.group, &present, conditions)
            .map_err(|error| error.to_api(&spec.group.to_string()))?;
        let record = plan
            .next_record(History::from_bytes((rest.random)()))
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
        let is_changed = plan
            .slots
            .iter()
            .filter_map(|slot| slot.used())
            .chain(plan.replacement)
            .any(differs);
        let used = plan.slots.iter().filter_map(|slot| slot.used());
        let used = used.chain(plan.replacement);
        let floor = used.map(|disk| superblocks[disk].generation).min();
        let geometry = record.geometry().map_err(|error| failed(what, error))?;
        let without: Vec<_> = spec
            .without
            .iter()
            .filter(|disk| record.slot_of(**disk).is_some())
            .map(left_out)
            .collect();
        let mut found = find_maps(&plan, &record, maps);
        if let Some(found) = &mut found {
            mark_logged(&plan, &record, &logs, found);
        }
        let logs: Vec<(u16, MemberLog)> = (0..)
            .zip(&plan.slots)
            .filter_map(|(slot, plan)| Some((slot, logs[plan.used()?].clone())))
            .collect();
        let bad = find_lists(&plan, &record, lists);
        let seated = seat(&plan, readable, &superblocks, &record);
        // Replay comes first: what is read from here on may take the memory that it writes from.
        let (mut unreplayed, mut torn) = (0, Vec::new());
        if let Some(left) = &left {
            unreplayed =
                left.unreplayed | replay(&rest.pool, left, page, &record, &seated.slots).await;
            inflight::replayed(&rest.pool, unreplayed);
        } else if record.consistency.has_log() && record.flags.dirty {
            let replayed = replay::replay(&rest.pool, &record, (&seated.slots, &bad), &logs).await;
            (unreplayed, torn) = (replayed.failed, replayed.torn);
        }
        let config =
            read_config(&rest.pool, &geometry, &record, &seated.slots, &plan.slots).await?;
        let generation = plan.generation;
        let said = Said {
            logs: logs_found(&logs, &record),
            geometry,
            record,
            config,
            generation,
            maps: found,
            bad,
            died: left.is_some(),
        };
        let group = Self::launch(rest, said, seated).await;
        group.floor.set(floor.unwrap_or(0).min(generation));
        for reason in plan.reasons.iter().chain(&unreadable).chain(&without) {
            group.event("Assembled", None, reason);
        }
        if let Some(text) = group.unsynced_text() {
            group.event("Assembled", None, &text);
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
        for (slot, at) in torn {
            let listed = group.list_blocks(slot, &[at]).await;
            listed.map_err(|_| failed(what, "too few members took their bad-block lists"))?;
        }
        // Not before: what a log said has to be durable, and what was lost with one.
        for slot in bits(group.geometry.slots()) {
            let member = group.member(slot);
            let log = logs.iter().find(|(of, _)| *of == slot);
            let is_lost = log.is_some_and(|(_, log)| log.newest.is_none());
            let is_filled = group.rebuilding() == Some(slot) && member.left_at.get() != 0;
            let twin = member.twin.borrow().as_ref().map(|t| Rc::clone(&t.member));
            if (is_lost || is_filled) && !group.empty_log(&member).await {
                unreplayed |= 1 << slot;
            }
            if let Some(twin) = twin
                && !group.empty_log(&twin).await
            {
                group.drop_copy("its log could not be written");
            }
        }
        let known = left.as_ref().map_or(0, |left| left.unreplayed);
        for (slots, why) in [
            (
                known,
                "had failed when ublk-target ended; what it was told last may be lost",
            ),
            (unreplayed & !known, "did not take what was being written"),
        ] {
            for slot in bits(slots) {
                group.member(slot).to_blame.set(true);
            }
            group
                .fail(slots, FailCause::Writes, why)
                .await
                .map_err(|_| failed(what, format!("a member {why}")))?;
        }
        if unreplayed != 0 {
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

fn foreign(path: &str, superblock: &Superblock) -> ApiError {
    ApiError::new(ErrorKind::Refused, "the group could not be started")
        .because(format!(
            "{path} belongs to Lunar system {}",
            superblock.system
        ))
        .hint("lunar import --take PATH.., all its disks, if that system is to lose the group")
}

/// Brings every member that is used to its slot, and the one that is to replace another beside it; the others are let
/// go of.
fn seat<D>(
    plan: &Plan,
    given: Vec<Given<D>>,
    superblocks: &[Superblock],
    record: &GroupRecord,
) -> Seated<D> {
    let mut given: Vec<Option<Given<D>>> = given.into_iter().map(Some).collect();
    let mut seat = |i: usize, slot: usize| {
        let superblock = &superblocks[i];
        let reserve = Reserve {
            layout: superblock.member.as_ref()?.layout,
            data_bytes: record.data_bytes(slot),
            end_copy: superblock.end_copy,
        };
        let place = MemberPlace {
            device_size: superblock.device_size,
            reserve,
        };
        given[i].take().map(|given| (given, place))
    };
    let slots = plan
        .slots
        .iter()
        .enumerate()
        .map(|(slot, plan)| plan.used().and_then(|i| seat(i, slot)))
        .collect();
    // The cursor of the superblock that decided: the next one says 0.
    let said = plan.superblock.member.as_ref();
    let new = plan
        .replacement
        .zip(said.and_then(|member| member.group.replacement))
        .map(|(i, new)| (seat(i, usize::from(new.slot)), new));
    Seated { slots, new }
}

/// The shape of a new group: all members alike as large as the smallest allows, or, linear, each as it is.
fn shape(spec: &CreateSpec, reserves: &[Reserve]) -> Result<Geometry, GeometryError> {
    if spec.level == Level::Linear {
        let sizes: Vec<u64> = reserves.iter().map(|reserve| reserve.data_bytes).collect();
        return Geometry::linear(&sizes);
    }
    let bytes = crate::reserve::member_bytes(reserves);
    let unit = Geometry::member_unit(spec.level, reserves.len(), spec.chunk).max(1);
    Geometry::new(spec.level, reserves.len(), spec.chunk, bytes / unit * unit)
}

fn left_out(disk: &DiskUuid) -> String {
    format!("disk {disk} was left out, as asked: it is stale from now on")
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
async fn read_config<D: Disk>(
    pool: &Rc<Pool>,
    geometry: &Geometry,
    record: &GroupRecord,
    slots: &[Slot<D>],
    plans: &[SlotPlan],
) -> Result<GroupConfig, ApiError> {
    let mut why = String::from("no member is there");
    let version = record.config;
    let bytes = usize::try_from(version.len).expect("checked: at most CONFIG_MAX");
    for (slot, plan) in slots.iter().zip(plans) {
        let (Some((given, place)), SlotPlan::InSync(_)) = (slot, plan) else {
            continue;
        };
        let at = place.reserve.layout.config[usize::from(version.current)].offset;
        let json = match read_pieces(pool, &given.disk, at, bytes).await {
            Ok(json) => json,
            Err(error) => {
                why = format!("{}: {error}", given.path);
                continue;
            }
        };
        match GroupConfig::decode(&json, &version, geometry) {
            Ok(config) => return Ok(config),
            Err(error) => why = format!("{}: {error}", given.path),
        }
    }
    Err(failed("the configuration could not be read", why))
}

pub(crate) async fn read_pieces<D: Disk>(
    pool: &Rc<Pool>,
    disk: &D,
    at: u64,
    bytes: usize,
) -> Result<Vec<u8>, DiskError> {
    let mut json = vec![0; bytes];
    let most = bytes.next_multiple_of(BYTES).clamp(BYTES, CONFIG_PIECE);
    let lease = pool.lease(Quota::Work, most).await;
    for (part, start) in json.chunks_mut(most).zip((0..).step_by(most)) {
        let piece = Piece {
            offset: 0,
            len: u32::try_from(part.len().next_multiple_of(4096)).expect("at most CONFIG_PIECE"),
        };
        let (buf, len) = (Buf::Pool(&lease), u64::from(piece.len));
        disk.submit(DiskVerb::Read, at + start, len, buf, &[piece])
            .await?;
        parity::copy_out(part, lease.cells(0..part.len()));
    }
    Ok(json)
}

/// Writes again what a dead predecessor was writing; returns the slots that did not take it, as bits. Those of disks
/// that are not there are among them: they count until the superblocks say that they are not.
async fn replay<D: Disk>(
    pool: &Rc<Pool>,
    left: &Left,
    page: usize,
    record: &GroupRecord,
    slots: &[Slot<D>],
) -> u64 {
    if planted::is(Bug::ReplayForgotten) {
        return 0;
    }
    let whole = pool.whole();
    let mut failed = 0;
    for segment in &left.segments {
        // A disk that has left its slot has missed more than this.
        let Some(slot) = record.slot_of(segment.disk) else {
            continue;
        };
        let seated = slots.get(slot).and_then(Option::as_ref);
        let Some((given, _)) = seated.filter(|(given, _)| given.uuid == segment.disk) else {
            failed |= 1 << slot;
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
        let is_done = fits
            && if segment.from == inflight::ZEROES {
                replay_zeroes(&given.disk, segment.at, len, (&whole, page)).await
            } else {
                let verb = DiskVerb::Write { fua: false };
                let io = given
                    .disk
                    .submit(verb, segment.at, len, Buf::Pool(&whole), &[piece]);
                io.await.is_ok()
            };
        if !is_done {
            failed |= 1 << slot;
        }
    }
    failed
}

/// Zeroes a range; where the disk does not do that itself, from a page of memory that nothing else is in.
async fn replay_zeroes<D: Disk>(
    disk: &D,
    at: u64,
    len: u64,
    (whole, page): (&Lease, usize),
) -> bool {
    let verb = DiskVerb::WriteZeroes { unmap: false };
    match disk.submit(verb, at, len, Buf::None, &[]).await {
        Ok(()) => return true,
        Err(DiskError::Errno(_)) => {}
        Err(_) => return false,
    }
    parity::zero(whole.cells(page..page + BYTES));
    for start in (0..len).step_by(BYTES) {
        let piece = Piece {
            offset: u32::try_from(page).expect("the memory is below 4 GiB"),
            len: u32::try_from(BYTES as u64).expect("4096"),
        };
        let verb = DiskVerb::Write { fua: false };
        let io = disk.submit(verb, at + start, BYTES as u64, Buf::Pool(whole), &[piece]);
        if io.await.is_err() {
            return false;
        }
    }
    true
}
