//! One running group as the control side sees it: its owner thread and the devices of its LUs.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lunar_api::target::{
    GroupStatus, LuSize, LuStatus, MemberSpec, ScrubOrder, TargetAnswer, TargetReply, TargetRequest,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, LuUuid, SystemUuid};
use lunar_engine::config::Queues;
use lunar_engine::raid_group::{CreateSpec, Given, Parts, RaidGroup, StartSpec};

use crate::allocations;
use crate::buffers::{Mapping, PROBE_BYTES};
use crate::control::api_error;
use crate::crew;
use crate::forward::Places;
use crate::groups::{Common, open};
use crate::owner::{self, Local, Owner};
use crate::queue::{self, QueueThread, Report};
use crate::thread::Thread;
use crate::ublk::device::Shape;
use crate::ublk::lifecycle::{Info, Lifecycle, LifecycleError};
use crate::ublk::{Geometry, identity};

/// How long the tags of a stopped device may take to come back: member I/O in flight ends or is given up.
const DETACH_LIMIT: Duration = Duration::from_secs(60);
/// LUs brought up or taken down at a time: each waits for a handful of control commands, which wait for the kernel.
const LUS_AT_ONCE: usize = 32;
/// Most requests of a LU at a time.
const DEPTH_MAX: u16 = 1024;

/// What the rim knows of a LU.
#[derive(Debug, Clone, Default)]
struct Path {
    /// N of /dev/ublkbN.
    number: Option<u32>,
    /// Queues that it has.
    queues: u16,
    /// The kernel can change its size while it is in use.
    can_resize: bool,
    /// The one that it had last: it gets it again if it is free.
    last: Option<u32>,
    /// Why it is not up.
    problem: String,
}

/// A queue thread, and the LUs that it serves a queue of.
#[derive(Debug)]
struct QueueLane {
    /// Which queue of a LU it serves.
    queue: u16,
    /// Never that of another.
    number: u64,
    thread: Arc<QueueThread>,
    lus: BTreeSet<LuUuid>,
}

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

/// Numbers of queue threads.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn usage(what: impl Into<String>) -> ApiError {
    ApiError::new(ErrorKind::Usage, what)
}

/// How a group comes to be.
enum Spec {
    Create(CreateSpec),
    /// With the bounds of its rebuilds.
    Start(StartSpec, (Option<u64>, Option<u64>)),
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
            } => {
                let spec = StartSpec {
                    group,
                    force,
                    witness,
                    without,
                    keep,
                    undelete,
                };
                let rates = (rebuild_min_bytes, rebuild_max_bytes);
                (group, Spec::Start(spec, rates), members, ublk_devices)
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
        let owner = owner::spawn(
            &name,
            Some(uuid),
            move || Mapping::of_file(&file.into()),
            events,
        )?;
        let begun = owner
            .call(async move |local| begin_group(local, system, spec, members, fds).await)
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
        let owner = owner::spawn("quarantine", None, memory, |_| ())?;
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
        let _held = lock(&self.change);
        let up: Vec<(LuUuid, u32)> = {
            let paths = lock(&self.paths);
            let number = |(lu, path): (&LuUuid, &Path)| Some((*lu, path.number?));
            paths.iter().filter_map(number).collect()
        };
        crew::try_each(&up, LUS_AT_ONCE, |(lu, number)| {
            let what = "a quarantined device cannot be given up";
            (self.lifecycle().quiesce(*number))
                .map_err(|error| api_error(ErrorKind::Failed, what, &error))?;
            self.detach(*lu)
        })?;
        let owner = lock(&self.owner).take();
        if let Some(owner) = owner {
            Thread::end_when_last(owner);
        }
        Ok(())
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

    pub(crate) fn set(self: Arc<Self>, min: Option<u64>, max: Option<u64>) -> TargetReply {
        self.change(async move |group| {
            group.set_rebuild_rate(min, max);
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
                group.member_replace(slot, given).await
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

    /// Tells queue threads that a LU has grown.
    fn grow_beside(&self, lu: LuUuid, handle: u16) -> Result<(), ApiError> {
        let missing = move || ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}"));
        let extents =
            self.change(async move |group: Rc<_>| group.lu_extents(handle).ok_or_else(missing))?;
        let lanes = lock(&self.queues);
        let serving = lanes.iter().filter(|lane| lane.lus.contains(&lu));
        let threads: Vec<_> = serving.map(|lane| Arc::clone(&lane.thread)).collect();
        drop(lanes);
        for thread in threads {
            let extents = extents.clone();
            thread.call(async move |queue: Rc<queue::Queue>| queue.grow(lu, extents))?;
        }
        Ok(())
    }

    /// Has the kernel's device be as large as the LU.
    fn fit(&self, lu: LuUuid, number: u32) -> Result<(), ApiError> {
        let lus = self.lus()?;
        let found = lus.iter().find(|(_, status)| status.lu == lu);
        let Some((_, LuStatus { capacity, .. })) = found else {
            return Ok(());
        };
        let resized = self.lifecycle().resize(number, *capacity);
        let problem = match &resized {
            Ok(_) => String::new(),
            Err(error) => format!("its device may have its old size: {error}"),
        };
        if let Ok(true) = resized {
            tracing::info!(%lu, number, capacity, "a LU has grown");
        }
        if let Some(path) = lock(&self.paths).get_mut(&lu) {
            path.problem = problem;
        }
        resized.map(drop).map_err(|error| {
            let what = "the LU has its new size, but its device may have the old one";
            api_error(ErrorKind::Failed, what, &error).hint("the same command again")
        })
    }

    fn lus(&self) -> Result<Vec<(u16, LuStatus)>, ApiError> {
        if let Some(seen) = &self.quarantine {
            return Ok((0..).zip(seen.lus.iter().cloned()).collect());
        }
        self.change(async |group: Rc<_>| Ok(group.lus()))
    }

    /// Brings every LU up, each on the kernel device that bears its identity if there is one.
    fn bring_up(&self, devices: &[u32]) -> Result<(), ApiError> {
        let lus = self.lus()?;
        let known = if lus.is_empty() {
            Vec::new()
        } else {
            self.known(devices)
        };
        crew::each(&lus, LUS_AT_ONCE, |(_, status)| {
            let mark = identity(status.lu);
            let info = known.iter().find(|info| info.identity == mark).copied();
            self.up_or_say(status.lu, info);
        });
        Ok(())
    }

    fn known(&self, devices: &[u32]) -> Vec<Info> {
        self.lifecycle().infos(devices).unwrap_or_else(|error| {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(
                error,
                "kernel devices cannot be looked at and are left alone"
            );
            Vec::new()
        })
    }

    fn up_or_say(&self, lu: LuUuid, known: Option<Info>) {
        if let Err(error) = self.up(lu, known) {
            let problem = std::iter::once(error.message)
                .chain(error.causes)
                .collect::<Vec<_>>()
                .join(": ");
            tracing::error!(%lu, problem, "a LU is not up");
            lock(&self.paths).insert(
                lu,
                Path {
                    number: known.map(|info| info.number),
                    queues: 0,
                    can_resize: false,
                    last: None,
                    problem,
                },
            );
        }
    }

    /// Makes or recovers the device of a LU.
    fn up(&self, lu: LuUuid, known: Option<Info>) -> Result<(), ApiError> {
        if let Some(why) = crate::ublk::bad_kernel(&self.common.features.kernel) {
            return Err(ApiError::new(ErrorKind::NoService, "no device can be made").because(why));
        }
        let kernel = self.lifecycle();
        let say = |what: &'static str| {
            move |error: LifecycleError| api_error(ErrorKind::Failed, what, &error)
        };
        if self.is_quarantined() && known.is_none_or(|info| info.is_dead()) {
            let what = "its group is quarantined, and it had no device";
            return Err(ApiError::new(ErrorKind::NoService, what));
        }
        let again = match known {
            Some(info) if info.is_dead() => {
                kernel
                    .delete(info.number)
                    .map_err(say("a dead device cannot be deleted"))?;
                Some(info.number)
            }
            Some(info) => {
                kernel
                    .begin_recovery(info.number)
                    .map_err(say("the device cannot be recovered"))?;
                self.serve(lu, info)?;
                kernel
                    .end_recovery(info.number)
                    .map_err(say("the device cannot be recovered"))?;
                self.is_up(lu, info);
                // Who died may have been about to.
                if !self.is_quarantined()
                    && let Err(error) = self.fit(lu, info.number)
                {
                    tracing::error!(%lu, %error, causes = ?error.causes, "a device has the wrong size");
                }
                return Ok(());
            }
            None => lock(&self.paths).get(&lu).and_then(|path| path.last),
        };
        let group = self.status()?;
        let found = group.lus.iter().find(|status| status.lu == lu);
        let status = found
            .ok_or_else(|| ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}")))?;
        let (mask, unmaps) = (self.owner()?)
            .call(async |local: Rc<Local>| (local.dma_mask.get(), local.unmaps.get()))?;
        let geometry = Geometry::of(&group, status.capacity, unmaps, mask);
        let queues = Queues {
            count: status.queues,
            depth: status.depth,
        };
        let info = kernel
            .add(again, identity(lu), queues, &geometry)
            .map_err(say("the device cannot be made"))?;
        let started = self.serve(lu, info).and_then(|()| {
            kernel
                .start(info.number)
                .map_err(say("the device cannot be started"))
        });
        if let Err(error) = started {
            self.undo(lu, info.number);
            return Err(error);
        }
        self.is_up(lu, info);
        Ok(())
    }

    fn is_up(&self, lu: LuUuid, info: Info) {
        let number = info.number;
        tracing::info!(%lu, number, "a LU is up");
        lock(&self.paths).insert(
            lu,
            Path {
                number: Some(number),
                queues: info.queues,
                can_resize: info.can_resize(),
                last: Some(number),
                problem: String::new(),
            },
        );
    }

    /// Takes a device away that was never started.
    fn undo(&self, lu: LuUuid, number: u32) {
        let kernel = self.lifecycle();
        // Before it is started its tags come back when it is stopped, as afterwards.
        let undone = kernel
            .stop(number)
            .map_err(|error| api_error(ErrorKind::Failed, "it cannot be stopped", &error))
            .and_then(|()| self.detach(lu))
            .and_then(|()| {
                let deleted = kernel.delete(number);
                deleted
                    .map_err(|error| api_error(ErrorKind::Failed, "it cannot be deleted", &error))
            });
        if let Err(error) = undone {
            tracing::error!(%lu, number, %error, causes = ?error.causes, "a half-made device stays");
        }
    }

    fn serve(&self, lu: LuUuid, info: Info) -> Result<(), ApiError> {
        let opened = self.lifecycle().open(info.number);
        let file =
            opened.map_err(|e| api_error(ErrorKind::Failed, "the device cannot be served", &e))?;
        let shape = info.shape(&self.common.features);
        let file = Arc::new(file);
        let owner = self.owner()?;
        if self.is_quarantined() {
            let attach = async move |local: Rc<Local>| {
                (0..shape.queues).try_for_each(|queue| {
                    local.attach_refusing(lu, Arc::clone(&file), shape, queue)
                })
            };
            return owner.call(attach).flatten();
        }
        let handle = self.handle(lu)?;
        for queue in 1..shape.queues {
            self.serve_beside((lu, handle), (Arc::clone(&file), shape, queue))?;
        }
        owner
            .call(async move |local: Rc<Local>| local.attach(lu, handle, file, shape, 0))
            .flatten()
    }

    /// Serves a queue of a device on a queue thread.
    fn serve_beside(
        &self,
        (lu, handle): (LuUuid, u16),
        (file, shape, queue): (Arc<OwnedFd>, Shape, u16),
    ) -> Result<(), ApiError> {
        let (owner, thread) = (self.owner()?, self.queue_thread(queue, lu)?);
        let places = Places::new(shape.depth);
        let own = thread.call(async move |queue| queue.prepare(lu, shape.depth));
        let (own, of_line, there) = (own.flatten()?, Arc::clone(&file), Arc::clone(&places));
        let (to, extents) = owner
            .call(async move |local: Rc<Local>| {
                let missing =
                    || ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}"));
                let extents = local.group()?.lu_extents(handle).ok_or_else(missing)?;
                let device = (of_line, shape, queue);
                let to = local.open_line((lu, handle), device, (own, &there))?;
                Ok((to, extents))
            })
            .flatten()?;
        thread
            .call(async move |thread: Rc<queue::Queue>| {
                let (lu, device) = ((lu, handle, extents), (file, shape, queue));
                thread.attach(lu, device, (to, places))
            })
            .flatten()
    }

    /// The thread for a queue, which has a LU more now.
    fn queue_thread(&self, queue: u16, lu: LuUuid) -> Result<Arc<QueueThread>, ApiError> {
        let mut lanes = lock(&self.queues);
        if let Some(lane) = lanes.iter_mut().find(|lane| lane.queue == queue) {
            lane.lus.insert(lu);
            return Ok(Arc::clone(&lane.thread));
        }
        let owner = self.owner()?;
        let name = format!("q{queue}-{:.8}", self.uuid.to_string());
        let thread = queue::spawn(&name, self.uuid)?;
        let requests = thread.call(async |queue: Rc<queue::Queue>| queue.requests())?;
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (door, own) = (thread.door(), owner.door());
        let known = owner
            .call(async move |local: Rc<Local>| local.add_reader(number, door, requests, &own))
            .flatten();
        if let Err(error) = known {
            thread.end();
            return Err(error);
        }
        let thread = Arc::new(thread);
        lanes.push(QueueLane {
            queue,
            number,
            thread: Arc::clone(&thread),
            lus: BTreeSet::from([lu]),
        });
        Ok(thread)
    }

    /// Waits until queue threads have let go of a LU; those that have none left end.
    fn detach_beside(&self, lu: LuUuid) -> Result<(), ApiError> {
        let threads: Vec<Arc<QueueThread>> = lock(&self.queues)
            .iter()
            .filter(|lane| lane.lus.contains(&lu))
            .map(|lane| Arc::clone(&lane.thread))
            .collect();
        for thread in threads {
            let counters = thread
                .call_within(Some(DETACH_LIMIT), async move |queue: Rc<queue::Queue>| {
                    queue.detach(lu).await
                })?;
            let served = Report {
                lus: BTreeMap::from([(lu, counters)]),
                ..Report::default()
            };
            lock(&self.past).add(&served);
        }
        let mut lanes = lock(&self.queues);
        lanes.iter_mut().for_each(|lane| {
            lane.lus.remove(&lu);
        });
        let (idle, busy) = std::mem::take(&mut *lanes)
            .into_iter()
            .partition(|lane: &QueueLane| lane.lus.is_empty());
        *lanes = busy;
        drop(lanes);
        for QueueLane { number, thread, .. } in idle {
            let report = thread.call(async |queue: Rc<queue::Queue>| queue.report())?;
            self.owner()?
                .call(async move |local: Rc<Local>| local.remove_reader(number))?;
            lock(&self.past).add(&report);
            Thread::end_when_last(thread);
        }
        Ok(())
    }

    /// What all queue threads did.
    fn served_beside(&self) -> Result<Report, ApiError> {
        let mut all = lock(&self.past).clone();
        let threads: Vec<_> = {
            let lanes = lock(&self.queues);
            lanes.iter().map(|lane| Arc::clone(&lane.thread)).collect()
        };
        for thread in threads {
            let report = thread.call(async |queue: Rc<queue::Queue>| queue.report())?;
            all.add(&report);
            all.problems.extend(report.problems);
        }
        Ok(all)
    }

    fn handle(&self, lu: LuUuid) -> Result<u16, ApiError> {
        let lus = self.lus()?;
        let found = lus.iter().find(|(_, status)| status.lu == lu);
        let missing = || ApiError::new(ErrorKind::NoService, format!("there is no LU {lu}"));
        Ok(found.ok_or_else(missing)?.0)
    }

    fn detach(&self, lu: LuUuid) -> Result<(), ApiError> {
        self.detach_beside(lu)?;
        self.owner()?
            .call_within(Some(DETACH_LIMIT), async move |local: Rc<Local>| {
                local.detach(lu).await
            })
    }

    /// Takes the device of a LU away, unless somebody holds it.
    fn down(&self, lu: LuUuid) -> Result<(), ApiError> {
        let Some(number) = lock(&self.paths).get(&lu).and_then(|path| path.number) else {
            return Ok(());
        };
        let kernel = self.lifecycle();
        kernel.stop(number).map_err(|error| match error {
            LifecycleError::Held(_) => ApiError::new(ErrorKind::Busy, error.to_string()).hint(
                format!("findmnt -S /dev/ublkb{number}; fuser -v /dev/ublkb{number}"),
            ),
            error => api_error(ErrorKind::Failed, "the device cannot be stopped", &error),
        })?;
        self.detach(lu)?;
        kernel.delete(number).map_err(|error| {
            api_error(ErrorKind::Failed, "the device cannot be deleted", &error)
        })?;
        let problem = "its device is stopped".into();
        lock(&self.paths).insert(
            lu,
            Path {
                number: None,
                queues: 0,
                can_resize: false,
                last: Some(number),
                problem,
            },
        );
        Ok(())
    }

    /// Takes the devices of all LUs away, several at a time; once one is held no other is begun.
    pub(crate) fn lus_down(&self) -> Result<(), ApiError> {
        let _held = lock(&self.change);
        crew::try_each(&self.lus()?, LUS_AT_ONCE, |(_, status)| {
            self.down(status.lu)
        })
    }

    /// Brings the LUs up that [`Group::lus_down`] took down.
    pub(crate) fn lus_up(&self) {
        let _held = lock(&self.change);
        let down: Vec<LuUuid> = {
            let paths = lock(&self.paths);
            paths
                .iter()
                .filter(|(_, path)| path.number.is_none())
                .map(|(lu, _)| *lu)
                .collect()
        };
        crew::each(&down, LUS_AT_ONCE, |lu| self.up_or_say(*lu, None));
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
    local: Rc<Local>,
    system: SystemUuid,
    spec: Spec,
    members: Vec<MemberSpec>,
    fds: Vec<OwnedFd>,
) -> Result<(), ApiError> {
    let given: Result<Vec<_>, ApiError> = members
        .into_iter()
        .zip(fds)
        .map(|(member, fd)| {
            let disk = open(&local, &member.path, fd)?;
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
    let group = match spec {
        Spec::Create(spec) => RaidGroup::create(parts, spec).await?,
        Spec::Start(spec, (min, max)) => {
            let group = RaidGroup::start(parts, spec).await?;
            group.set_rebuild_rate(min, max);
            group
        }
    };
    local.adopt(group);
    Ok(())
}
