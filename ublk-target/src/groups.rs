//! All groups of this process, and the disks that are in none.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::channel::Receiver;
use lunar_api::target::{
    Features, GroupStatus, MemberSpec, Probe, TargetAnswer, TargetReply, TargetRequest,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, SystemUuid};
use lunar_engine::label;
use lunar_engine::pool::Pool;

use crate::buffers::{Mapping, PROBE_BYTES};
use crate::control::api_error;
use crate::control_helper::ControlHelper;
use crate::crew;
use crate::events::Events;
use crate::group::Group;
use crate::member_file::MemberFile;
use crate::owner::{self, Local, Owner};

/// Groups whose LUs go down at a time, each with several.
const GROUPS_AT_ONCE: usize = 4;

/// Longest time that a disk may take to say what it carries; a sleeping disk spins up in less.
const PROBE_LIMIT: Duration = Duration::from_secs(12);
/// Longest time that labelling or wiping a disk may take; mgmtd waits a minute.
const DISK_LIMIT: Duration = Duration::from_secs(40);
/// Hanging requests of one probe thread: their leases of 4 KiB are half of its memory for such.
const STUCK_MAX: usize = 64;

/// What every group uses.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) features: Features,
    pub(crate) helper: ControlHelper,
    pub(crate) events: Events,
}

/// The thread for disks without a group.
#[derive(Debug)]
struct Probing {
    owner: Owner,
    /// Requests to it that did not end in time.
    stuck: usize,
}

/// The groups that run.
#[derive(Debug)]
pub(crate) struct Groups {
    common: Arc<Common>,
    /// None: nobody has said yet.
    system: Mutex<Option<SystemUuid>>,
    /// None: it is being started or stopped.
    groups: Mutex<BTreeMap<GroupUuid, Option<Arc<Group>>>>,
    /// Reads and labels disks that are in no group.
    probe: Mutex<Option<Probing>>,
}

type Map = BTreeMap<GroupUuid, Option<Arc<Group>>>;

fn changing(group: GroupUuid) -> ApiError {
    ApiError::new(
        ErrorKind::Busy,
        format!("group {group} is being started or stopped"),
    )
}

impl Groups {
    /// None runs yet.
    pub(crate) fn new(common: Common) -> Arc<Self> {
        Arc::new(Self {
            common: Arc::new(common),
            system: Mutex::default(),
            groups: Mutex::default(),
            probe: Mutex::default(),
        })
    }

    fn map(&self) -> std::sync::MutexGuard<'_, Map> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the system that this process belongs to: for as long as it has any group.
    pub(crate) fn set_system(&self, system: SystemUuid) -> Result<(), ApiError> {
        let map = self.map();
        let mut known = self.system.lock().unwrap_or_else(PoisonError::into_inner);
        let first = *known.get_or_insert(system);
        if first == system || map.is_empty() {
            *known = Some(system);
            return Ok(());
        }
        let what = format!("this process belongs to system {first}, not {system}");
        Err(ApiError::new(ErrorKind::Usage, what))
    }

    /// Refuses to write for a system that this process has left since a connection said hello.
    pub(crate) fn check_system(&self, system: SystemUuid) -> Result<(), ApiError> {
        let known = *self.system.lock().unwrap_or_else(PoisonError::into_inner);
        if known == Some(system) {
            return Ok(());
        }
        let what = format!("this connection said hello for system {system}, which is past");
        Err(ApiError::new(ErrorKind::Usage, what))
    }

    pub(crate) fn features(&self) -> &Features {
        &self.common.features
    }

    pub(crate) fn events(&self) -> &Events {
        &self.common.events
    }

    /// A group that runs.
    pub(crate) fn get(&self, group: GroupUuid) -> Result<Arc<Group>, ApiError> {
        match self.map().get(&group) {
            Some(Some(found)) => Ok(Arc::clone(found)),
            Some(None) => Err(changing(group)),
            None => Err(ApiError::new(
                ErrorKind::NoService,
                format!("group {group} does not run"),
            )),
        }
    }

    /// Creates or starts a group. One that runs already is answered as it is.
    pub(crate) fn begin(
        &self,
        request: TargetRequest,
        fds: Vec<OwnedFd>,
        system: SystemUuid,
    ) -> TargetReply {
        let (TargetRequest::GroupCreate { group: uuid, .. }
        | TargetRequest::GroupStart { group: uuid, .. }) = &request
        else {
            unreachable!("the two that begin a group");
        };
        let uuid = *uuid;
        let quarantined = match self.map().entry(uuid) {
            std::collections::btree_map::Entry::Occupied(mut there) => match there.get_mut() {
                None => return Err(changing(uuid)),
                Some(group) if group.is_quarantined() => there.get_mut().take(),
                Some(group) => return Arc::clone(group).answer(),
            },
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(None);
                None
            }
        };
        if let Some(group) = &quarantined
            && let Err(error) = group.leave_quarantine()
        {
            self.map().insert(uuid, quarantined);
            return Err(error);
        }
        match Group::begin(&self.common, request, fds, system) {
            Ok(group) => {
                let group = Arc::new(group);
                self.map().insert(uuid, Some(Arc::clone(&group)));
                group.answer()
            }
            Err(error) => {
                self.map().remove(&uuid);
                // Its devices must have somebody who answers.
                if let Some((seen, devices)) = quarantined.and_then(|group| group.quarantined())
                    && let Err(error) = self.quarantine(seen, &devices)
                {
                    tracing::error!(%error, "devices of a quarantined group answer nothing");
                }
                Err(error)
            }
        }
    }

    /// Takes the devices of a group that makes the process crash, and answers EIO; its members stay closed.
    pub(crate) fn quarantine(&self, seen: GroupStatus, devices: &[u32]) -> TargetReply {
        let uuid = seen.group;
        match self.map().entry(uuid) {
            std::collections::btree_map::Entry::Occupied(there) => match there.get() {
                Some(group) => return Arc::clone(group).answer(),
                None => return Err(changing(uuid)),
            },
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(None);
            }
        }
        let group = Group::quarantine(&self.common, seen, devices).map(Arc::new);
        match &group {
            Ok(group) => self.map().insert(uuid, Some(Arc::clone(group))),
            Err(_) => self.map().remove(&uuid),
        };
        group?.answer()
    }

    /// Stops a group, for good with `delete`.
    pub(crate) fn end(&self, uuid: GroupUuid, delete: bool) -> TargetReply {
        let group = match self.map().get_mut(&uuid) {
            Some(place) => place.take().ok_or_else(|| changing(uuid))?,
            None if delete => {
                return Err(ApiError::new(
                    ErrorKind::NoService,
                    format!("group {uuid} does not run"),
                ));
            }
            // Said twice.
            None => return Ok(TargetAnswer::Done),
        };
        match group.lus_down().and_then(|()| group.stop(delete)) {
            Ok(()) => {
                self.map().remove(&uuid);
                Ok(TargetAnswer::Done)
            }
            Err(error) => {
                group.lus_up();
                self.map().insert(uuid, Some(group));
                Err(error)
            }
        }
    }

    /// Everything there is to tell.
    pub(crate) fn status(&self) -> TargetReply {
        let groups: Vec<_> = self.map().values().flatten().map(Arc::clone).collect();
        let groups = groups
            .iter()
            .map(|group| group.status())
            .collect::<Result<_, _>>()?;
        Ok(TargetAnswer::Status {
            groups,
            features: self.common.features.clone(),
        })
    }

    /// Stops everything, or nothing: first the LUs of all groups, and if one is held all come up again.
    pub(crate) fn shutdown(&self) -> Result<(), ApiError> {
        let groups = {
            let mut map = self.map();
            if let Some((uuid, _)) = map.iter().find(|(_, group)| group.is_none()) {
                return Err(changing(*uuid));
            }
            let all: Vec<_> = map.values_mut().filter_map(Option::take).collect();
            all
        };
        let put_back = |from: &[Arc<Group>]| {
            for group in from {
                group.lus_up();
                self.map().insert(group.uuid, Some(Arc::clone(group)));
            }
        };
        if let Err(error) = crew::try_each(&groups, GROUPS_AT_ONCE, |group| group.lus_down()) {
            put_back(&groups);
            return Err(error);
        }
        for (i, group) in groups.iter().enumerate() {
            if let Err(error) = group.stop(false) {
                put_back(&groups[i..]);
                return Err(error);
            }
            self.map().remove(&group.uuid);
        }
        Ok(())
    }

    /// Quiesces the devices of every group, then closes the groups. They stay in the map, so that nobody who asks
    /// meanwhile takes them for gone. After an error some stand still: there is no way back but the end of the process.
    pub(crate) fn hand_over(&self) -> TargetReply {
        let groups = {
            let map = self.map();
            if let Some((uuid, _)) = map.iter().find(|(_, group)| group.is_none()) {
                return Err(changing(*uuid));
            }
            map.values().flatten().map(Arc::clone).collect::<Vec<_>>()
        };
        let begun = Instant::now();
        let since = || u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let lus = AtomicU32::new(0);
        crew::try_each(&groups, GROUPS_AT_ONCE, |group| {
            group.quiesce().map(|count| {
                lus.fetch_add(count, Ordering::Relaxed);
            })
        })?;
        let quiesced_ms = since();
        crew::try_each(&groups, GROUPS_AT_ONCE, |group| group.stop(false))?;
        Ok(TargetAnswer::HandedOver {
            lus: lus.into_inner(),
            quiesced_ms,
            closed_ms: since(),
        })
    }

    /// Asks the thread for disks without a group, starting it if need be.
    fn ask_probe<T: Send + 'static, F: Future<Output = T> + 'static>(
        &self,
        ask: impl FnOnce(Rc<Local>) -> F + Send + 'static,
    ) -> Result<Receiver<T>, ApiError> {
        let mut place = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
        // Each that hangs keeps a piece of the thread's memory: in time another thread takes over.
        if place.as_ref().is_some_and(|probe| probe.stuck >= STUCK_MAX)
            && let Some(probe) = place.take()
        {
            probe.owner.leave();
        }
        let probe = match place.take() {
            Some(probe) => probe,
            None => Probing {
                owner: owner::spawn("probe", None, || Mapping::anonymous(PROBE_BYTES))?,
                stuck: 0,
            },
        };
        let answer = probe.owner.ask(ask);
        *place = Some(probe);
        answer
    }

    /// Waits for an answer of the thread for disks without a group; None: not in time. What was asked goes on.
    fn probe_answer<T>(&self, answer: &Receiver<T>, deadline: Instant) -> Option<T> {
        let answer = answer.recv_deadline(deadline).ok();
        if answer.is_none() {
            let mut place = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(probe) = place.as_mut() {
                probe.stuck += 1;
            }
        }
        answer
    }

    /// Reads what disks carry: side by side, each with its own problem. One that hangs holds up no other.
    pub(crate) fn probe(&self, paths: Vec<String>, fds: Vec<OwnedFd>) -> TargetReply {
        if paths.len() != fds.len() {
            let what = format!("{} paths, but {} descriptors", paths.len(), fds.len());
            return Err(ApiError::new(ErrorKind::Usage, what));
        }
        let mut asked = Vec::with_capacity(paths.len());
        for (path, fd) in paths.into_iter().zip(fds) {
            let named = path.clone();
            let answer = self.ask_probe(async move |local| match open(&local, &path, fd) {
                Ok(disk) => {
                    let probe = label::probe(&disk, &path, &local.pool);
                    local.counted(probe).await
                }
                Err(error) => unusable(path, one_line(&error)),
            })?;
            asked.push((named, answer));
        }
        let deadline = Instant::now() + PROBE_LIMIT;
        let disks = asked.into_iter().map(|(path, answer)| {
            self.probe_answer(&answer, deadline).unwrap_or_else(|| {
                let seconds = PROBE_LIMIT.as_secs();
                unusable(
                    path,
                    format!("cannot be read: no answer in {seconds} s, its I/O hangs"),
                )
            })
        });
        Ok(TargetAnswer::Probed {
            disks: disks.collect(),
        })
    }

    /// Does something with one disk that is in no group.
    fn with_disk(
        &self,
        path: String,
        fd: OwnedFd,
        work: impl AsyncFnOnce(&MemberFile, &Rc<Pool>) -> Result<(), ApiError> + Send + 'static,
    ) -> TargetReply {
        let named = path.clone();
        let answer = self.ask_probe(async move |local| {
            let disk = open(&local, &path, fd)?;
            local.counted(work(&disk, &local.pool)).await
        })?;
        self.probe_answer(&answer, Instant::now() + DISK_LIMIT)
            .unwrap_or_else(|| {
                let what = format!("{named} does not answer");
                let why = format!("its I/O hangs since {} s", DISK_LIMIT.as_secs());
                Err(ApiError::new(ErrorKind::Failed, what)
                    .because(why)
                    .hint("dmesg | tail"))
            })?;
        Ok(TargetAnswer::Done)
    }

    /// Labels a free disk.
    pub(crate) fn label(
        &self,
        path: String,
        fd: OwnedFd,
        system: SystemUuid,
        uuid: DiskUuid,
    ) -> TargetReply {
        self.with_disk(path, fd, async move |disk, pool| {
            label::label(disk, pool, system, uuid).await
        })
    }

    /// Overwrites the superblocks of a disk.
    pub(crate) fn wipe(&self, path: String, fd: OwnedFd) -> TargetReply {
        self.with_disk(path, fd, async |disk, pool| label::wipe(disk, pool).await)
    }

    /// Has members of a group that does not run belong to this system, one after the other.
    pub(crate) fn adopt(
        &self,
        uuid: GroupUuid,
        from: SystemUuid,
        to: SystemUuid,
        members: Vec<MemberSpec>,
        fds: Vec<OwnedFd>,
    ) -> TargetReply {
        self.check_stopped(uuid, &members, &fds)?;
        for (member, fd) in members.into_iter().zip(fds) {
            self.with_disk(member.path, fd, async move |disk, pool| {
                label::adopt(disk, pool, uuid, from, to).await.map(drop)
            })?;
        }
        Ok(TargetAnswer::Done)
    }

    fn check_stopped(
        &self,
        uuid: GroupUuid,
        members: &[MemberSpec],
        fds: &[OwnedFd],
    ) -> Result<(), ApiError> {
        if members.len() != fds.len() {
            let what = format!("{} members, but {} descriptors", members.len(), fds.len());
            return Err(ApiError::new(ErrorKind::Usage, what));
        }
        if self.map().contains_key(&uuid) {
            let what = format!("group {uuid} runs, or is being started or stopped");
            return Err(ApiError::new(ErrorKind::Busy, what));
        }
        Ok(())
    }

    /// Marks the superblocks of members of a group that does not run deleted.
    pub(crate) fn erase(
        &self,
        uuid: GroupUuid,
        members: Vec<MemberSpec>,
        fds: Vec<OwnedFd>,
    ) -> TargetReply {
        self.check_stopped(uuid, &members, &fds)?;
        for (member, fd) in members.into_iter().zip(fds) {
            self.with_disk(member.path, fd, async move |disk, pool| {
                label::mark_deleted(disk, pool, uuid).await
            })?;
        }
        Ok(TargetAnswer::Done)
    }
}

/// An error in one line.
fn one_line(error: &ApiError) -> String {
    let parts: Vec<&str> = std::iter::once(&error.message)
        .chain(&error.causes)
        .map(String::as_str)
        .collect();
    parts.join(": ")
}

/// What is said of a disk that nothing could be read from.
fn unusable(path: String, problem: String) -> Probe {
    Probe {
        path,
        capacity: 0,
        data_bytes: 0,
        logical_block: 0,
        label: None,
        problem: Some(problem),
    }
}

/// Takes a disk onto a thread's ring.
pub(crate) fn open(local: &Local, path: &str, fd: OwnedFd) -> Result<MemberFile, ApiError> {
    let disk = MemberFile::new(&local.ring, fd)
        .map_err(|error| api_error(ErrorKind::Failed, &format!("{path} cannot be used"), &error))?;
    local.dma_mask.set(local.dma_mask.get() | disk.dma_mask());
    local.unmaps.set(local.unmaps.get() && disk.unmaps());
    Ok(disk)
}
