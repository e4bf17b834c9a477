//! One running group as the control side sees it: its owner thread and the devices of its LUs.

mod devices;
mod queue_lanes;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lunar_api::target::{
    GroupStatus, LuSize, LuStatus, MemberSpec, ScrubOrder, TargetAnswer, TargetReply, TargetRequest,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, LuUuid, SystemUuid};
use lunar_engine::config::Queues;
use lunar_engine::raid_group::{CreateSpec, Fill, Given, Parts, RaidGroup, StartSpec};

use self::devices::{LUS_AT_ONCE, Path};
use self::queue_lanes::QueueLane;
use crate::allocations;
use crate::buffers::{Mapping, PROBE_BYTES};
use crate::control::api_error;
use crate::crew;
use crate::groups::{Common, open};
use crate::owner::{self, Local, Owner, World};
use crate::queue::Report;
use crate::thread::Thread;
use crate::ublk::lifecycle::Lifecycle;

/// Most requests of a LU at a time.
const DEPTH_MAX: u16 = 1024;

/// A group that runs.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) uuid: GroupUuid,
    common: Arc<Common>,
    /// None once it has stopped.
    owner: Mutex<Option<Arc<Owner>>>,
    paths: Mutex<BTreeMap<LuUuid, Path>>,
    /// For the second and later queues of LUs, in order.
    queues: Mutex<Vec<QueueLane>>,
    /// What queue threads did that have ended.
    past: Mutex<Report>,
    /// The group as it was seen last, when its devices only answer EIO.
    quarantine: Option<GroupStatus>,
    /// Held by whoever changes something.
    change: Mutex<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn usage(what: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Usage, what)
}

/// How a group comes to be.
enum Spec {
    Create(CreateSpec),
    Start(StartSpec, Tunables),
}

/// What of a group is not on its disks; none: it stays as it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tunables {
    /// Bytes a second of its rebuilds, least and most.
    pub(crate) rates: (Option<u64>, Option<u64>),
    pub(crate) read_errors_max: Option<u32>,
}

impl Tunables {
    fn give(self, group: &RaidGroup<World>) {
        group.set_rebuild_rate(self.rates.0, self.rates.1);
        if let Some(most) = self.read_errors_max {
            group.set_read_errors_max(most);
        }
    }
}

impl Group {
    /// Creates or starts the group of a request, and brings its LUs up.
    pub(crate) fn begin(
        common: &Arc<Common>,
        request: TargetRequest,
        mut fds: Vec<OwnedFd>,
        system: SystemUuid,
    ) -> Result<Self, ApiError> {
        let (uuid, spec, members, devices) = match request {
            TargetRequest::GroupCreate {
                group,
                name,
                level,
                chunk,
                consistency,
                assume_clean,
                members,
            } => {
                let spec = CreateSpec {
                    group,
                    name,
                    level,
                    chunk,
                    consistency,
                    assume_clean,
                };
                (group, Spec::Create(spec), members, Vec::new())
            }
            TargetRequest::GroupStart {
                group,
                force,
                members,
                ublk_devices,
                witness,
                without,
                keep,
                undelete,
                rebuild_min_bytes,
                rebuild_max_bytes,
                read_errors_max,
            } => {
                let spec = StartSpec {
                    group,
                    force,
                    witness,
                    without,
                    keep,
                    undelete,
                };
                let tunables = Tunables {
                    rates: (rebuild_min_bytes, rebuild_max_bytes),
                    read_errors_max,
                };
                (group, Spec::Start(spec, tunables), members, ublk_devices)
            }
            _ => return Err(usage("this request begins no group")),
        };
        if fds.len() != members.len() + 1 {
            return Err(usage(format!(
                "{} members and the in-flight file need as many descriptors, {} came",
                members.len(),
                fds.len()
            )));
        }
        let file = fds.pop().expect("counted above");
        let events = {
            let common = Arc::clone(common);
            move |happened| common.events.push(happened)
        };
        let name = format!("g-{:.8}", uuid.to_string());
        let owner = owner::spawn(&name, Some(uuid), move || Mapping::of_file(&file.into()))?;
        let begun = owner
            .call(async move |local| {
                let group = begin_group(&local, system, spec, members, fds).await?;
                local.adopt(group, events);
                Ok(())
            })
            .flatten();
        if let Err(error) = begun {
            owner.end();
            return Err(error);
        }
        let group = Self {
            uuid,
            common: Arc::clone(common),
            owner: Mutex::new(Some(Arc::new(owner))),
            paths: Mutex::default(),
            queues: Mutex::default(),
            past: Mutex::default(),
            quarantine: None,
            change: Mutex::default(),
        };
        group.bring_up(&devices)?;
        Ok(group)
    }

    /// Recovers the devices of a group and answers EIO on them. No member is opened.
    pub(crate) fn quarantine(
        common: &Arc<Common>,
        seen: GroupStatus,
        devices: &[u32],
    ) -> Result<Self, ApiError> {
        let memory = || Mapping::anonymous(PROBE_BYTES);
        let owner = owner::spawn("quarantine", None, memory)?;
        tracing::warn!(group = %seen.group, reason = seen.reason, "a group is quarantined");
        let group = Self {
            uuid: seen.group,
            common: Arc::clone(common),
            owner: Mutex::new(Some(Arc::new(owner))),
            paths: Mutex::default(),
            queues: Mutex::default(),
            past: Mutex::default(),
            quarantine: Some(seen),
            change: Mutex::default(),
        };
        group.bring_up(devices)?;
        Ok(group)
    }

    pub(crate) fn is_quarantined(&self) -> bool {
        self.quarantine.is_some()
    }

    /// What a quarantine is made of: the group as seen, and its devices.
    pub(crate) fn quarantined(&self) -> Option<(GroupStatus, Vec<u32>)> {
        let devices = lock(&self.paths)
            .values()
            .filter_map(|path| path.number)
            .collect();
        self.quarantine.clone().map(|seen| (seen, devices))
    }

    /// Gives the devices up, so that they can be recovered by who serves them for real.
    pub(crate) fn leave_quarantine(&self) -> Result<(), ApiError> {
        self.quiesce()?;
        let owner = lock(&self.owner).take();
        if let Some(owner) = owner {
            Thread::end_when_last(owner);
        }
        Ok(())
    }

    /// Takes the devices back from the kernel: what is in flight ends, what comes waits for whoever recovers them. Answers
    /// how many there are.
    pub(crate) fn quiesce(&self) -> Result<u32, ApiError> {
        let _held = lock(&self.change);
        let up: Vec<(LuUuid, u32)> = {
            let paths = lock(&self.paths);
            let number = |(lu, path): (&LuUuid, &Path)| Some((*lu, path.number?));
            paths.iter().filter_map(number).collect()
        };
        crew::try_each(&up, LUS_AT_ONCE, |(lu, number)| {
            let what = "a device cannot be given up";
            (self.lifecycle().quiesce(*number))
                .map_err(|error| api_error(ErrorKind::Failed, what, &error))?;
            self.detach(*lu)
        })?;
        Ok(u32::try_from(up.len()).unwrap_or(u32::MAX))
    }

    /// Refuses what needs the members.
    fn check_open(&self) -> Result<(), ApiError> {
        match &self.quarantine {
            None => Ok(()),
            Some(seen) => {
                let what = format!("group {} is quarantined", seen.name);
                Err(ApiError::new(ErrorKind::NoService, what)
                    .because(seen.reason.clone())
                    .hint(format!("lunar group start {} --again", seen.name)))
            }
        }
    }

    fn owner(&self) -> Result<Arc<Owner>, ApiError> {
        let owner = lock(&self.owner).clone();
        owner.ok_or_else(|| ApiError::new(ErrorKind::NoService, "the group has stopped"))
    }

    fn lifecycle(&self) -> Lifecycle<'_> {
        Lifecycle {
            helper: &self.common.helper,
            features: &self.common.features,
        }
    }

    /// Asks the engine something that may change the group.
    fn change<T: Send + 'static>(
        &self,
        ask: impl AsyncFnOnce(Rc<RaidGroup<crate::owner::World>>) -> Result<T, ApiError>
        + Send
        + 'static,
    ) -> Result<T, ApiError> {
        self.check_open()?;
        self.owner()?
            .call(async move |local| {
                let group = Rc::clone(local.group()?);
                ask(group).await
            })
            .flatten()
    }

    /// The group's status with the rim's part filled in.
    pub(crate) fn status(&self) -> Result<GroupStatus, ApiError> {
        let seen = self.quarantine.clone();
        let (mut status, served) = self
            .owner()?
            .call(async move |local: Rc<Local>| {
                let mut status = match seen {
                    Some(seen) => seen,
                    None => local.group()?.status(),
                };
                status.allocations = allocations::count();
                Ok((status, local.attached.problems()))
            })
            .flatten()?;
        let beside = self.served_beside()?;
        status.allocations += beside.allocations;
        for member in &mut status.members {
            if let Some(more) = beside.members.get(&member.disk) {
                member.reads += more.reads;
                member.writes += more.writes;
                member.read_bytes += more.read_bytes;
                member.write_bytes += more.write_bytes;
                member.read_errors += more.read_errors;
                member.write_errors += more.write_errors;
            }
        }
        let paths = lock(&self.paths);
        for lu in &mut status.lus {
            if let Some(more) = beside.lus.get(&lu.lu) {
                lu.counters += *more;
            }
            if let Some(path) = paths.get(&lu.lu) {
                lu.ublk = path.number;
                lu.queues_served = path.queues;
                lu.problem.clone_from(&path.problem);
            }
            if self.is_quarantined() && lu.problem.is_empty() {
                lu.problem = "quarantined: every request is answered EIO".into();
            }
            if lu.problem.is_empty()
                && let Some(problem) = served.get(&lu.lu).or(beside.problems.get(&lu.lu))
            {
                lu.problem.clone_from(problem);
            }
        }
        status.zero_copy = self.common.features.zero_copy;
        Ok(status)
    }

    /// The answer of requests that change the group.
    pub(crate) fn answer(self: Arc<Self>) -> TargetReply {
        Ok(TargetAnswer::Group {
            group: Box::new(self.status()?),
        })
    }

    fn lu_answer(&self, lu: LuUuid) -> TargetReply {
        let found = self
            .status()?
            .lus
            .into_iter()
            .find(|status| status.lu == lu);
        let lu = found
            .ok_or_else(|| ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}")))?;
        Ok(TargetAnswer::Lu { lu: Box::new(lu) })
    }

    pub(crate) fn rename(self: Arc<Self>, name: String) -> TargetReply {
        let _held = lock(&self.change);
        self.change(async move |group| group.rename(&name).await)?;
        Arc::clone(&self).answer()
    }

    pub(crate) fn set(self: Arc<Self>, tunables: Tunables) -> TargetReply {
        self.change(async move |group| {
            tunables.give(&group);
            Ok(())
        })?;
        self.answer()
    }

    pub(crate) fn scrub(self: Arc<Self>, order: ScrubOrder) -> TargetReply {
        let _held = lock(&self.change);
        self.change(async move |group| group.scrub(order).await)?;
        Arc::clone(&self).answer()
    }

    pub(crate) fn grow(self: Arc<Self>) -> TargetReply {
        let _held = lock(&self.change);
        self.change(async move |group| group.grow().await)?;
        Arc::clone(&self).answer()
    }

    pub(crate) fn member_fail(self: Arc<Self>, disk: DiskUuid) -> TargetReply {
        let _held = lock(&self.change);
        self.change(async move |group| group.member_fail(disk, "failed by hand").await)?;
        Arc::clone(&self).answer()
    }

    pub(crate) fn member_replace(
        self: Arc<Self>,
        slot: u16,
        member: MemberSpec,
        fill: Fill,
        fd: OwnedFd,
    ) -> TargetReply {
        let _held = lock(&self.change);
        self.check_open()?;
        self.owner()?
            .call(async move |local| {
                let disk = open(&local, &member.path, fd)?;
                let given = Given {
                    uuid: member.disk,
                    path: member.path,
                    disk,
                };
                let group = Rc::clone(local.group()?);
                group.member_replace(slot, given, fill).await
            })
            .flatten()?;
        Arc::clone(&self).answer()
    }

    pub(crate) fn lu_create(
        self: Arc<Self>,
        lu: LuUuid,
        name: String,
        (size, zero): (LuSize, bool),
        queues: Queues,
    ) -> TargetReply {
        if !(1..=DEPTH_MAX).contains(&queues.depth) {
            return Err(usage(format!(
                "a depth of {}; 1 to {DEPTH_MAX} can be served",
                queues.depth
            )));
        }
        let _held = match zero {
            true => {
                // It may take hours: everything else goes on, a disk may have to be replaced.
                self.change(async move |group| {
                    group.lu_create_zeroed(lu, &name, size, queues).await
                })?;
                lock(&self.change)
            }
            false => {
                let held = lock(&self.change);
                self.change(async move |group| group.lu_create(lu, &name, size, queues).await)?;
                held
            }
        };
        if let Err(error) = self.up(lu, None) {
            // Nothing is left of what could not be shown.
            if let Err(left) = self.change(async move |group| group.lu_delete(lu).await) {
                tracing::error!(%lu, %left, "a LU without a device stays");
            }
            lock(&self.paths).remove(&lu);
            return Err(error);
        }
        self.lu_answer(lu)
    }

    pub(crate) fn lu_delete(self: Arc<Self>, lu: LuUuid) -> TargetReply {
        let _held = lock(&self.change);
        self.check_open()?;
        self.down(lu)?;
        if let Err(error) = self.change(async move |group| group.lu_delete(lu).await) {
            self.up_or_say(lu, None);
            return Err(error);
        }
        lock(&self.paths).remove(&lu);
        lock(&self.past).lus.remove(&lu);
        Ok(TargetAnswer::Done)
    }

    pub(crate) fn lu_undelete(self: Arc<Self>, lu: LuUuid) -> TargetReply {
        let _held = lock(&self.change);
        self.change(async move |group| group.lu_undelete(lu).await)?;
        // It is durable: without a device it stays, and says why.
        self.up_or_say(lu, None);
        self.lu_answer(lu)
    }

    pub(crate) fn deleted_lus(&self) -> TargetReply {
        let lus = self.change(async |group: Rc<_>| Ok(group.deleted_lus()))?;
        Ok(TargetAnswer::Deleted { lus })
    }

    pub(crate) fn lu_rename(self: Arc<Self>, lu: LuUuid, name: String) -> TargetReply {
        let _held = lock(&self.change);
        self.change(async move |group| group.lu_rename(lu, &name).await)?;
        self.lu_answer(lu)
    }

    /// Makes the device of a LU anew, of so many queues.
    pub(crate) fn lu_set(self: Arc<Self>, lu: LuUuid, count: u16) -> TargetReply {
        let _held = lock(&self.change);
        self.check_open()?;
        self.down(lu)?;
        let changed = self.change(async move |group| group.lu_set_queues(lu, count).await);
        // Up again in any case.
        self.up(lu, None)?;
        changed?;
        self.lu_answer(lu)
    }

    /// Gives a LU more space: on the disks, then in every thread that serves it, then in the kernel. Its device stays,
    /// and in use, where the kernel can resize it; else it is made anew if nobody holds it.
    ///
    /// # Crash  as of `RaidGroup::lu_resize`; a device that is recovered gets the size that the disks say
    pub(crate) fn lu_resize(self: Arc<Self>, lu: LuUuid, size: LuSize) -> TargetReply {
        let _held = lock(&self.change);
        self.check_open()?;
        let path = lock(&self.paths).get(&lu).cloned().unwrap_or_default();
        let is_online = path.number.is_none() || path.can_resize;
        if !is_online {
            self.down(lu)?;
        }
        let resized = self.change(async move |group| group.lu_resize(lu, size).await);
        if !is_online {
            // Up again in any case.
            self.up(lu, None)?;
        }
        let handle = resized?;
        if is_online {
            self.grow_beside(lu, handle)?;
            if let Some(number) = path.number {
                self.fit(lu, number)?;
            }
        }
        self.lu_answer(lu)
    }

    fn lus(&self) -> Result<Vec<(u16, LuStatus)>, ApiError> {
        if let Some(seen) = &self.quarantine {
            return Ok((0..).zip(seen.lus.iter().cloned()).collect());
        }
        self.change(async |group: Rc<_>| Ok(group.lus()))
    }

    fn handle(&self, lu: LuUuid) -> Result<u16, ApiError> {
        let lus = self.lus()?;
        let found = lus.iter().find(|(_, status)| status.lu == lu);
        let missing = || ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}"));
        Ok(found.ok_or_else(missing)?.0)
    }

    /// Stops the group, whose LUs are down, and its thread; its members are closed when this returns.
    pub(crate) fn stop(&self, delete: bool) -> Result<(), ApiError> {
        let _held = lock(&self.change);
        match (&self.quarantine, delete) {
            (Some(_), false) => {}
            _ => self.change(async move |group| group.stop(delete).await)?,
        }
        let owner = lock(&self.owner).take();
        if let Some(owner) = owner {
            // A status request may still look at it; it lets go soon.
            Thread::end_when_last(owner);
        }
        Ok(())
    }
}

async fn begin_group(
    local: &Rc<Local>,
    system: SystemUuid,
    spec: Spec,
    members: Vec<MemberSpec>,
    fds: Vec<OwnedFd>,
) -> Result<Rc<RaidGroup<World>>, ApiError> {
    let given: Result<Vec<_>, ApiError> = members
        .into_iter()
        .zip(fds)
        .map(|(member, fd)| {
            let disk = open(local, &member.path, fd)?;
            Ok(Given {
                uuid: member.disk,
                path: member.path,
                disk,
            })
        })
        .collect();
    let parts = Parts {
        system,
        members: given?,
        pool: Rc::clone(&local.pool),
        clock: local.clock.clone(),
        front: local.front(),
        random: local.random()?,
    };
    match spec {
        Spec::Create(spec) => RaidGroup::create(parts, spec).await,
        Spec::Start(spec, tunables) => {
            let group = RaidGroup::start(parts, spec).await?;
            tunables.give(&group);
            Ok(group)
        }
    }
}
