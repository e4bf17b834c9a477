//! What people do to a running group: LUs, names, members, stop.

use std::rc::Rc;

use lunar_api::target::{DeletedLu, FailCause, LuSize, MemberState, ZeroStatus};
use lunar_api::{ApiError, DiskUuid, ErrorKind, LuUuid};

use crate::bad_blocks::{List, read_list};
use crate::config::{ConfigError, GroupConfig, LuConfig, Queues};
use crate::label::read_superblock;
use crate::lanes::Lane;
use crate::limits::CONFIG_PIECE;
use crate::member::{META_BYTES, Member};
use crate::parity;
use crate::pool::{Lease, Quota};
use crate::raid_group::{EIO, Errno, Fill, Given, Lu, MemberPlace, RaidGroup, Rebuild, WORKERS};
use crate::regions::MapsTurn;
use crate::replay::read_log;
use crate::reserve::{Reserve, lay_out};
use crate::serve::bits;
use crate::traits::{Buf, Clock, Disk, DiskVerb, Env, MILLISECOND, Piece, SECOND, Tick};

fn failed(what: &str, why: impl ToString) -> ApiError {
    ApiError::new(ErrorKind::Failed, what).because(why.to_string())
}

/// Bytes of a new LU that are zeroed between two looks at whether to go on.
const ZEROED_AT_ONCE: u64 = 128 << 20;

/// A LU that is zeroed before it is there.
#[derive(Debug)]
pub(crate) struct Zeroing {
    lu: LuConfig,
    /// Bytes of it.
    done: u64,
    begun: Tick,
}

impl<E: Env> RaidGroup<E> {
    /// Makes a LU durable; the rim then makes its device.
    ///
    /// # Crash  the new configuration is durable on every member before the superblocks point to it: the LU is
    /// there with all its extents, or not at all
    pub async fn lu_create(
        &self,
        uuid: LuUuid,
        name: &str,
        size: LuSize,
        queues: impl Into<Queues>,
    ) -> Result<u16, ApiError> {
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        let lu = self.cut_lu(&mut config, uuid, name, size, queues.into())?;
        self.write_config(config).await?;
        let handle = self.add_lu(&lu);
        Ok(handle)
    }

    /// Makes a LU that reads as zero; meanwhile the configuration may change otherwise.
    ///
    /// # Crash  the LU is not there until all of it is zeroed, and that durable. Deleted ones that had its space are
    /// forgotten before
    /// # Errors  the group stops or fails meanwhile; its name is taken meanwhile
    pub async fn lu_create_zeroed(
        &self,
        uuid: LuUuid,
        name: &str,
        size: LuSize,
        queues: impl Into<Queues>,
    ) -> Result<u16, ApiError> {
        let turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        let deleted = config.deleted.len();
        let lu = self.cut_lu(&mut config, uuid, name, size, queues.into())?;
        if config.deleted.len() < deleted {
            config.lus.retain(|other| other.uuid != uuid);
            self.write_config(config).await?;
        }
        self.zeroing.borrow_mut().push(Zeroing {
            lu: lu.clone(),
            done: 0,
            begun: self.clock.now(),
        });
        drop(turn);
        let made = self.zero_and_add(&lu).await;
        let mut zeroing = self.zeroing.borrow_mut();
        zeroing.retain(|other| other.lu.uuid != uuid);
        made
    }

    async fn zero_and_add(&self, lu: &LuConfig) -> Result<u16, ApiError> {
        let what = format!("LU `{}` could not be made", lu.name);
        let zeroed = self.zero_lu(lu).await;
        let _turn = self.configure().await;
        if self.stopping.get() {
            return Err(failed(&what, "its group stops"));
        }
        zeroed.map_err(|_| failed(&what, "its space could not be zeroed"))?;
        let mut config = self.config.borrow().clone();
        config.lus.push(lu.clone());
        self.write_config(config).await?;
        Ok(self.add_lu(lu))
    }

    /// How far those LUs are that are zeroed.
    pub(crate) fn zeroing_status(&self) -> Vec<ZeroStatus> {
        let now = self.clock.now();
        let status = |one: &Zeroing| {
            let took = u128::from(now.0.saturating_sub(one.begun.0)).max(1);
            let rate = u128::from(one.done) * u128::from(SECOND) / took;
            ZeroStatus {
                name: one.lu.name.clone(),
                done: one.done,
                total: one.lu.capacity,
                rate: u64::try_from(rate).unwrap_or(u64::MAX),
            }
        };
        self.zeroing.borrow().iter().map(status).collect()
    }

    async fn zero_lu(&self, lu: &LuConfig) -> Result<(), Errno> {
        let lu = Lu::new(u16::MAX, lu);
        let mut at = 0;
        while at < lu.capacity {
            if self.stopping.get() || self.failed.get() {
                return Err(EIO);
            }
            let len = ZEROED_AT_ONCE.min(lu.capacity - at);
            self.zero(&lu, at, len).await?;
            at += len;
            let mut zeroing = self.zeroing.borrow_mut();
            if let Some(own) = zeroing.iter_mut().find(|own| own.lu.uuid == lu.uuid) {
                own.done = at;
            }
        }
        self.flush().await
    }

    /// Puts a new LU into a configuration.
    fn cut_lu(
        &self,
        config: &mut GroupConfig,
        uuid: LuUuid,
        name: &str,
        size: LuSize,
        queues: Queues,
    ) -> Result<LuConfig, ApiError> {
        let make = |config: &mut GroupConfig| {
            let made = config.create_lu(&self.geometry, uuid, name, size, queues);
            made.cloned()
        };
        self.beside_zeroing(config, make)
            .map_err(|error| failed(&format!("LU `{name}` could not be made"), error))
    }

    /// Changes a configuration so that it takes no space or name of the LUs that are being zeroed.
    fn beside_zeroing<T>(
        &self,
        config: &mut GroupConfig,
        change: impl FnOnce(&mut GroupConfig) -> T,
    ) -> T {
        let zeroing = self.zeroing.borrow();
        config.lus.extend(zeroing.iter().map(|one| one.lu.clone()));
        let result = change(config);
        let is_zeroing = |lu: &LuConfig| zeroing.iter().any(|one| one.lu.uuid == lu.uuid);
        config.lus.retain(|lu| !is_zeroing(lu));
        result
    }

    pub(crate) fn add_lu(&self, lu: &LuConfig) -> u16 {
        let mut lus = self.lus.borrow_mut();
        let at = lus.iter().position(Option::is_none).unwrap_or(lus.len());
        let handle = u16::try_from(at).expect("LU_MAX is below 2^16");
        let lu = Rc::new(Lu::new(handle, lu));
        if at == lus.len() {
            lus.push(Some(lu));
        } else {
            lus[at] = Some(lu);
        }
        drop(lus);
        self.make_room();
        handle
    }

    /// Makes room for every request that the LUs can have in flight.
    fn make_room(&self) {
        let lus = self.lus.borrow();
        let requests = |lu: &Rc<Lu>| usize::from(lu.depth) * usize::from(lu.queues.get());
        let all: usize = lus.iter().flatten().map(requests).sum();
        self.stripes.reserve(512 + all);
        self.changed.reserve(all + WORKERS);
        self.pool.reserve(all + WORKERS);
        self.log.reserve(WORKERS);
    }

    /// Gives a LU whose device is down another number of queues.
    ///
    /// # Crash  it has the old number or the new one
    pub async fn lu_set_queues(&self, uuid: LuUuid, count: u16) -> Result<(), ApiError> {
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        config
            .set_queues(uuid, count)
            .map_err(|error| failed("the LU could not be changed", error))?;
        self.write_config(config).await?;
        let lus = self.lus.borrow();
        if let Some(lu) = lus.iter().flatten().find(|lu| lu.uuid == uuid) {
            lu.queues.set(count);
        }
        drop(lus);
        self.make_room();
        Ok(())
    }

    /// Gives a LU more space; the rim then tells queue threads and the kernel. Answers its handle.
    ///
    /// # Crash  it has the old size or the new one, which is durable before anybody can reach the new space: the device
    /// is the smaller one until the rim has made it larger, at the latest when it is recovered
    /// # Errors  less than it has; not so much free
    pub async fn lu_resize(&self, uuid: LuUuid, size: LuSize) -> Result<u16, ApiError> {
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        let resize = |config: &mut GroupConfig| {
            let grown = config.resize_lu(&self.geometry, uuid, size);
            grown.cloned()
        };
        let grown = self.beside_zeroing(&mut config, resize).map_err(|error| {
            let kind = match error {
                ConfigError::Shrink { .. } => ErrorKind::Refused,
                _ => ErrorKind::Failed,
            };
            ApiError::new(kind, "the LU was not resized").because(error.to_string())
        })?;
        let running = || {
            self.lus
                .borrow()
                .iter()
                .flatten()
                .find(|lu| lu.uuid == uuid)
                .cloned()
        };
        let missing = || failed("the LU was not resized", "it does not run");
        let handle = running().ok_or_else(missing)?.handle;
        if config != *self.config.borrow() {
            self.write_config(config).await?;
        } else {
            // One before may have ended with an error, and is done.
            self.publish()
                .await
                .map_err(|_| failed("the LU was not resized", "too few members took it"))?;
        }
        let old = running().ok_or_else(missing)?;
        if old.capacity != grown.capacity {
            self.lus.borrow_mut()[usize::from(handle)] = Some(Rc::new(Lu {
                counters: Rc::clone(&old.counters),
                ..Lu::new(handle, &grown)
            }));
        }
        Ok(handle)
    }

    /// Forgets a LU whose device is gone.
    pub async fn lu_delete(&self, uuid: LuUuid) -> Result<(), ApiError> {
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        config
            .delete_lu(uuid)
            .map_err(|error| failed("the LU could not be deleted", error))?;
        self.write_config(config).await?;
        for place in self.lus.borrow_mut().iter_mut() {
            if place.as_ref().is_some_and(|lu| lu.uuid == uuid) {
                *place = None;
            }
        }
        Ok(())
    }

    /// Brings a deleted LU back; the rim then makes its device.
    ///
    /// # Crash  as of [`Self::lu_create`]
    /// # Errors  its space was needed since, or another LU has its name
    pub async fn lu_undelete(&self, uuid: LuUuid) -> Result<u16, ApiError> {
        let what = "the LU could not be brought back";
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        let undelete = |config: &mut GroupConfig| config.undelete_lu(uuid).cloned();
        let lu =
            self.beside_zeroing(&mut config, undelete)
                .map_err(|error| {
                    let refused = failed(what, &error);
                    match error {
                        ConfigError::NameTaken { name } => refused
                            .hint(format!("lunar lu rename {name} OTHER, then the same again")),
                        _ => refused,
                    }
                })?;
        self.write_config(config).await?;
        Ok(self.add_lu(&lu))
    }

    /// Deleted LUs that can come back, oldest first.
    pub fn deleted_lus(&self) -> Vec<DeletedLu> {
        let config = self.config.borrow();
        let deleted = config.deleted.iter().map(|lu| DeletedLu {
            lu: lu.uuid,
            name: lu.name.clone(),
            capacity: lu.capacity,
        });
        deleted.collect()
    }

    /// Renames a LU.
    pub async fn lu_rename(&self, uuid: LuUuid, name: &str) -> Result<(), ApiError> {
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        config
            .rename_lu(uuid, name)
            .map_err(|error| failed("the LU could not be renamed", error))?;
        self.write_config(config).await?;
        for lu in self
            .lus
            .borrow()
            .iter()
            .flatten()
            .filter(|lu| lu.uuid == uuid)
        {
            name.clone_into(&mut lu.name.borrow_mut());
        }
        Ok(())
    }

    /// Renames the group.
    pub async fn rename(&self, name: &str) -> Result<(), ApiError> {
        let _turn = self.configure().await;
        let mut config = self.config.borrow().clone();
        config
            .rename(name)
            .map_err(|error| failed("the group could not be renamed", error))?;
        self.write_config(config).await
    }

    /// One change of configuration at a time.
    pub(crate) async fn configure(&self) -> Turn<'_, E> {
        self.changed
            .until(|| (!self.configuring.replace(true)).then_some(()))
            .await;
        Turn(self)
    }

    pub(crate) fn free_bytes(&self) -> u64 {
        let taken: u64 = self
            .zeroing
            .borrow()
            .iter()
            .map(|one| one.lu.capacity)
            .sum();
        let free = self.config.borrow().free_bytes(&self.geometry);
        free.saturating_sub(taken)
    }

    /// Writes a configuration to the slot that does not count, then makes it count.
    pub(crate) async fn write_config(&self, config: GroupConfig) -> Result<(), ApiError> {
        let what = "the change could not be made durable";
        let current = self.record.borrow().config.current;
        let (json, version) = config
            .encode(&self.geometry, 1 - current, self.generation.get() + 1)
            .map_err(|why| failed(what, why))?;
        let slots = self.in_sync.get() | self.rebuilding().map_or(0, |slot| 1 << slot);
        let members: Vec<_> = bits(slots).map(|slot| self.member(slot)).collect();
        let bad = self
            .put_config(&json, version.current, &members)
            .await
            .map_err(|why| failed(what, why))?;
        if bad != 0 {
            self.fail(bad, FailCause::Writes, "configuration could not be written")
                .await
                .map_err(|_| failed(what, "too few members took it"))?;
        }
        if let Some(copying) = self.copying() {
            let to = [Rc::clone(&copying.to)];
            if self.put_config(&json, version.current, &to).await != Ok(0) {
                self.drop_copy("configuration could not be written");
            }
        }
        self.record.borrow_mut().config = version;
        *self.config.borrow_mut() = config;
        self.advance();
        self.publish()
            .await
            .map_err(|_| failed(what, "too few members took the superblock"))
    }

    async fn config_memory(&self, bytes: usize) -> Result<Lease, String> {
        let leased = self.lease(Quota::Work, bytes).await;
        leased.map_err(|_| "the group failed, and no memory is left".to_owned())
    }

    /// Writes JSON to configuration slot `which` of some members; returns those that did not take it.
    async fn put_config(
        &self,
        json: &[u8],
        which: u8,
        members: &[Rc<Member<E::Disk>>],
    ) -> Result<u64, String> {
        // All that can be refused comes before the first I/O.
        let len = json.len().next_multiple_of(4096) as u64;
        let mut areas = Vec::new();
        for member in members {
            let Some(place) = &member.place else { continue };
            let area = place.reserve.layout.config[usize::from(which)];
            if area.len < len {
                return Err(format!(
                    "a configuration of {len} bytes does not fit the {} of slot {}",
                    area.len, member.slot
                ));
            }
            areas.push((member, area.offset));
        }
        // Leased before anything is held that a stripe worker could wait for.
        let mut lease = self.config_memory(CONFIG_PIECE).await?;
        let mut bad = 0u64;
        for (part, start) in json.chunks(CONFIG_PIECE).zip((0..).step_by(CONFIG_PIECE)) {
            let len = part.len().next_multiple_of(4096);
            parity::zero(lease.cells(0..len));
            parity::copy_in(lease.cells(0..part.len()), part);
            let piece = Piece {
                offset: 0,
                len: u32::try_from(len).expect("at most CONFIG_PIECE"),
            };
            let verb = DiskVerb::Write { fua: true };
            let ios: Vec<_> = areas
                .iter()
                .filter(|(member, _)| bad & 1 << member.slot == 0)
                .map(|(member, at)| {
                    let buf = Buf::Pool(&lease);
                    let io = member.submit_meta(verb, at + start, len as u64, buf, &[piece]);
                    (member.slot, io)
                })
                .collect();
            for (slot, io) in ios {
                if io.await.is_err() {
                    bad |= 1 << slot;
                }
            }
            if bad != 0 {
                // The memory of what was given up is not ours to fill again.
                lease = self.config_memory(CONFIG_PIECE).await?;
            }
        }
        Ok(bad)
    }

    /// Fails a member by hand.
    ///
    /// # Errors  `NoRedundancy` where data would be lost
    pub async fn member_fail(&self, disk: DiskUuid, why: &str) -> Result<(), ApiError> {
        if self
            .copying()
            .is_some_and(|copying| copying.to.uuid == disk)
        {
            self.drop_copy(why);
            return self
                .publish()
                .await
                .map_err(|_| failed("that is not durable", "too few members took it"));
        }
        let slot = self.slot_of(disk)?;
        let state = self.member(slot).state.get();
        if matches!(state, MemberState::Faulty | MemberState::Missing) {
            return Ok(());
        }
        if state == MemberState::InSync && !self.can_lose(1 << slot) {
            return Err(
                ApiError::new(ErrorKind::NoRedundancy, "the disk was not failed")
                    .because("without it data would be lost: the group has no redundancy left")
                    .hint("lunar status"),
            );
        }
        self.fail_now(1 << slot, FailCause::Hand, why);
        self.publish().await.map_err(|_| {
            failed(
                "the disk is failed, but that is not durable",
                "too few members took it",
            )
        })
    }

    fn slot_of(&self, disk: DiskUuid) -> Result<u16, ApiError> {
        let members = self.members.borrow();
        members
            .iter()
            .find(|member| member.uuid == disk)
            .map(|member| member.slot)
            .ok_or_else(|| {
                ApiError::new(ErrorKind::Usage, "the disk is not a member of this group")
            })
    }

    /// Puts a disk into a slot that is faulty or missing; the rebuild starts by itself.
    ///
    /// # Crash  the configuration is on the new member before any superblock names it
    /// # Errors  a disk or a slot that will not do; then nothing of the group has changed
    pub async fn member_replace(
        &self,
        slot: u16,
        with: Given<E::Disk>,
        fill: Fill,
    ) -> Result<(), ApiError> {
        let what = "the disk was not put into the group";
        let refuse = |why: String| ApiError::new(ErrorKind::Usage, what).because(why);
        let _turn = self.configure().await;
        if usize::from(slot) >= self.members.borrow().len() {
            return Err(refuse(format!("there is no slot {slot}")));
        }
        let is_out = || {
            let state = self.member(slot).state.get();
            matches!(state, MemberState::Faulty | MemberState::Missing)
        };
        let is_copied = !is_out();
        if self.geometry.redundancy() == 0 && !is_copied {
            return Err(refuse("the group has no redundancy to fill it from".into()));
        }
        if let Some(copying) = self.copying() {
            let why = format!("slot {} is being copied; one after the other", copying.slot);
            return Err(refuse(why).hint("lunar job list"));
        }
        if let Some(other) = self.rebuilding() {
            return Err(refuse(format!(
                "slot {other} is being rebuilt; one after the other"
            ))
            .hint("lunar job list"));
        }
        if let Some(twin) = self
            .members
            .borrow()
            .iter()
            .find(|m| (m.slot != slot || is_copied) && m.uuid == with.uuid)
        {
            return Err(refuse(format!("it is in slot {} already", twin.slot)));
        }
        let serves = || match self.failed.get() || self.stopping.get() {
            true => Err(ApiError::new(ErrorKind::NoService, what).because(self.reason())),
            false => Ok(()),
        };
        serves()?;
        let size = with.disk.capacity();
        let needed = self.geometry.data_bytes(slot);
        let returns = match fill {
            Fill::Missed | Fill::OnlyMissed if !is_copied => self.returns_to(slot, &with).await,
            _ => None,
        };
        // What its log says that it misses is noted before that is emptied.
        let returns = match (returns, &self.lanes) {
            (Some(place), Some(_)) => self.note_log(&with, &place).await?.then_some(place),
            (returns, _) => returns,
        };
        let mut list = None;
        if let Some(place) = &returns
            && self.member(slot).bad.is_listed.get()
        {
            list = self.list_on(&with, place).await?;
        }
        // Without it nobody knows what of it is data.
        let returns = returns.filter(|_| list.is_some() || !self.member(slot).bad.is_listed.get());
        if fill == Fill::OnlyMissed && returns.is_none() {
            return Err(refuse("it is not known what it has missed".into()));
        }
        let place = match &returns {
            Some(place) => place.clone(),
            None => MemberPlace {
                device_size: size,
                reserve: lay_out(size).map_err(|error| refuse(error.to_string()))?,
            },
        };
        let reserve = &place.reserve;
        if reserve.data_bytes < needed {
            return Err(refuse(format!(
                "it has room for {} bytes of data, the group needs {}",
                reserve.data_bytes, needed
            )));
        }
        let block = self.record.borrow().logical_block;
        if with.disk.logical_block() > block {
            return Err(refuse(format!(
                "its logical block is {} bytes, the group's is {block}",
                with.disk.logical_block()
            )));
        }
        let version = self.record.borrow().config;
        // The same bytes as on the others.
        let encoded =
            self.config
                .borrow()
                .encode(&self.geometry, version.current, version.generation);
        let (json, encoded) = encoded.map_err(|error| failed(what, error))?;
        if encoded != version {
            return Err(failed(
                what,
                "the configuration in memory is not the one on the disks",
            ));
        }
        let memory = |bytes| async move {
            let leased = self.config_memory(bytes).await;
            leased.map_err(|why| failed(what, why))
        };
        let meta = memory(META_BYTES).await?;
        let state = MemberState::Rebuilding;
        let member = Rc::new(Member::present(slot, state, (with, place), meta));
        if let Some(list) = list {
            member.bad.load(list);
            self.has_bad.set(true);
        }
        if self.lanes.is_some() {
            let pages = memory(Lane::PAGES).await?;
            member.lane.replace(Some(Lane::new(pages, 0)));
        }
        if returns.is_some() {
            member.left_at.set(self.member(slot).left_at.get());
        }
        let bad = self
            .put_config(&json, version.current, &[Rc::clone(&member)])
            .await;
        match bad {
            Ok(0) => {}
            Ok(_) => return Err(failed(what, "it does not take writes")),
            Err(why) => return Err(failed(what, why)),
        }
        // Leased before: who writes maps waits for disks only. No map is written until it is a member.
        let pages = memory(CONFIG_PIECE).await?;
        let turn = self.maps_turn().await;
        if let Some(turn) = &turn
            && self.put_maps(turn, &pages, &[Rc::clone(&member)]).await != 0
        {
            return Err(failed(what, "it does not take writes"));
        }
        drop(pages);
        if !self.empty_log(&member).await {
            return Err(failed(what, "it does not take writes"));
        }
        serves()?;
        if is_copied {
            if is_out() {
                return Err(failed(
                    what,
                    "the disk that it was to be copied from has failed",
                ));
            }
            return self.replace_by_copy(slot, member, turn).await;
        }
        self.members.borrow_mut()[usize::from(slot)] = member;
        self.durable_rebuild.set(0);
        // What a resync left out stays to be done.
        if let Some(first) = std::mem::take(&mut *self.holes.borrow_mut()).first() {
            self.synced.set(self.synced.get().min(*first));
        }
        self.views.advance();
        // A sync that still runs is about another disk: from here on it counts nothing as done.
        self.want_sync();
        if let Some(maps) = &self.maps {
            maps.begin_behind();
        }
        self.rebuild.set(Some(match returns {
            Some(_) => Rebuild::catching_up(slot),
            None => Rebuild::new(slot, 0),
        }));
        drop(turn);
        self.advance();
        self.publish()
            .await
            .map_err(|_| failed(what, "too few members took the superblock"))?;
        // A small one may be filled already.
        match self.member(slot).state.get() {
            MemberState::Rebuilding | MemberState::InSync => Ok(()),
            _ => Err(failed(what, "it does not take writes")),
        }
    }

    /// Where the data lies on a disk that was in this slot, and of which it is known what it has missed since. None: it is
    /// filled from the start.
    async fn returns_to(&self, slot: u16, with: &Given<E::Disk>) -> Option<MemberPlace> {
        let old = self.member(slot);
        let left_at = old.left_at.get();
        if left_at == 0 || with.uuid != old.uuid {
            return None;
        }
        let said = read_superblock(&with.disk, &self.pool).await.ok()?;
        let member = said.member?;
        let record = self.record.borrow();
        let (was, is) = (&member.group.history, &record.history);
        // Of another history it may have what nobody else was told of; below `left_at` it is an older copy of itself.
        let is_ours = was == is || record.parents.contains(was);
        let is_it = said.system == self.system
            && said.disk == with.uuid
            && member.group.uuid == self.id
            && member.slot == slot
            && member.group.member_bytes == record.member_bytes;
        (is_it && is_ours && said.generation >= left_at).then(|| MemberPlace {
            device_size: said.device_size,
            reserve: Reserve {
                layout: member.layout,
                data_bytes: self.geometry.data_bytes(slot),
                end_copy: said.end_copy,
            },
        })
    }

    /// Reads the bad-block list of a member that is back.
    async fn list_on(
        &self,
        with: &Given<E::Disk>,
        place: &MemberPlace,
    ) -> Result<Option<List>, ApiError> {
        let memory = self.config_memory(CONFIG_PIECE).await;
        let memory = memory.map_err(|why| failed("the disk was not put into the group", why))?;
        let (area, whose) = (place.reserve.layout.bad_blocks, (self.id, with.uuid));
        Ok(read_list(&with.disk, area, whose, (&memory, 0)).await)
    }

    /// Notes what a member that is back was to have the parity of as it left; false if its log cannot be read.
    async fn note_log(&self, with: &Given<E::Disk>, place: &MemberPlace) -> Result<bool, ApiError> {
        let what = "the disk was not put into the group";
        let memory = self.config_memory(CONFIG_PIECE).await;
        let memory = memory.map_err(|why| failed(what, why))?;
        let (at, scratch) = (place.reserve.layout.logs.offset, (&memory, 0..CONFIG_PIECE));
        let log = read_log(&with.disk, at, self.id, &scratch, true).await;
        if log.newest.is_none() {
            return Ok(false);
        }
        if let Some(maps) = &self.maps {
            maps.note_missed(|missed| log.mark(&self.record.borrow(), missed));
        }
        let noted = self.write_maps().await;
        noted.map_err(|_| failed(what, "too few members are left"))?;
        Ok(true)
    }

    /// Has a disk filled by copying the one in a slot, which stays until it is whole.
    async fn replace_by_copy(
        &self,
        slot: u16,
        member: Rc<Member<E::Disk>>,
        turn: Option<MapsTurn<'_>>,
    ) -> Result<(), ApiError> {
        let what = "the disk was not put into the group";
        let (uuid, path) = (member.uuid, member.path.clone());
        self.begin_copy(slot, member, 0);
        drop(turn);
        self.advance();
        self.publish()
            .await
            .map_err(|_| failed(what, "too few members took the superblock"))?;
        let is_there = |m: &Member<E::Disk>| m.uuid == uuid;
        let copied = self.copying().is_some_and(|copying| is_there(&copying.to));
        // Or it has the slot already: the copy was short, or the other disk has failed.
        match copied || is_there(&self.member(slot)) {
            true => Ok(()),
            false => Err(failed(what, format!("{path} does not take writes"))),
        }
    }

    /// Ends background work, flushes and marks the group clean. Fronts are stopped before. With `delete`, marks
    /// it deleted.
    ///
    /// # Crash  everything is flushed before the clean mark; without the mark the group is dirty, no more
    pub async fn stop(&self, delete: bool) -> Result<(), ApiError> {
        let what = "the group was not stopped cleanly";
        self.stopping.set(true);
        self.changed.wake_all();
        self.changed
            .until(|| self.background_ended.get().then_some(()))
            .await;
        while self.active_writes.get() > 0
            || !self.stripes.is_idle()
            || !self.zeroing.borrow().is_empty()
        {
            self.clock.sleep(MILLISECOND).await;
        }
        let mut result = self
            .flush_members()
            .await
            .map_err(|_| failed(what, "a member could not be flushed"));
        if result.is_ok() && !self.failed.get() {
            self.dirty.set(false);
            self.record.borrow_mut().flags.deleted |= delete;
            if let Some(copying) = self.copying() {
                match copying.to.to_blame.get() {
                    true => self.drop_copy("write failed"),
                    false => self.copied_to.set(self.copied_until(&copying)),
                }
            }
            self.advance();
            result = self
                .publish()
                .await
                .map_err(|_| failed(what, "too few members took the superblock"));
        }
        if result.is_ok() && !self.failed.get() {
            self.log.end();
        }
        self.stripes.stop();
        result
    }
}

/// Holds the right to change the configuration.
pub(crate) struct Turn<'a, E: Env>(&'a RaidGroup<E>);

impl<E: Env> Drop for Turn<'_, E> {
    fn drop(&mut self) {
        self.0.configuring.set(false);
        self.0.changed.wake_all();
    }
}
