//! All groups of this process, and the disks that are in none.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use lunar_api::target::{Features, Probe, TargetAnswer, TargetReply, TargetRequest};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, SystemUuid};
use lunar_engine::label;
use lunar_engine::traits::{Clock, MILLISECOND, SECOND};

use crate::buffers::{Mapping, PROBE_BYTES};
use crate::control::api_error;
use crate::control_helper::ControlHelper;
use crate::events::Events;
use crate::group::Group;
use crate::member_file::MemberFile;
use crate::owner::{Local, Owner};

/// How long a disk may take to say what it carries, in ns; mgmtd waits for an answer longer than this.
const PROBE_LIMIT: u64 = 10 * SECOND;

/// What every group uses.
#[derive(Debug)]
pub(crate) struct Common {
    pub(crate) features: Features,
    pub(crate) helper: ControlHelper,
    pub(crate) events: Events,
}

/// The groups that run.
#[derive(Debug)]
pub(crate) struct Groups {
    common: Arc<Common>,
    system: OnceLock<SystemUuid>,
    /// None: it is being started or stopped.
    groups: Mutex<BTreeMap<GroupUuid, Option<Arc<Group>>>>,
    /// Reads and labels disks that are in no group.
    probe: Mutex<Option<Owner>>,
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
            system: OnceLock::new(),
            groups: Mutex::default(),
            probe: Mutex::default(),
        })
    }

    fn map(&self) -> std::sync::MutexGuard<'_, Map> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the system that this process belongs to; for good.
    pub(crate) fn set_system(&self, system: SystemUuid) -> Result<(), ApiError> {
        let first = *self.system.get_or_init(|| system);
        if first == system {
            return Ok(());
        }
        let what = format!("this process belongs to system {first}, not {system}");
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
        match self.map().entry(uuid) {
            std::collections::btree_map::Entry::Occupied(there) => match there.get() {
                Some(group) => return Arc::clone(group).answer(),
                None => return Err(changing(uuid)),
            },
            std::collections::btree_map::Entry::Vacant(place) => {
                place.insert(None);
            }
        }
        match Group::begin(&self.common, request, fds, system) {
            Ok(group) => {
                let group = Arc::new(group);
                self.map().insert(uuid, Some(Arc::clone(&group)));
                group.answer()
            }
            Err(error) => {
                self.map().remove(&uuid);
                Err(error)
            }
        }
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
        if let Err(error) = groups.iter().try_for_each(|group| group.lus_down()) {
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

    /// Asks the thread for disks without a group, starting it if need be. One request at a time.
    fn with_probe<T>(
        &self,
        ask: impl FnOnce(&Owner) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let mut probe = self.probe.lock().unwrap_or_else(PoisonError::into_inner);
        let owner = match probe.take() {
            Some(owner) => owner,
            None => Owner::spawn("probe", || Mapping::anonymous(PROBE_BYTES), |_| ())?,
        };
        let answer = ask(&owner);
        *probe = Some(owner);
        answer
    }

    /// Reads what disks carry, side by side. One that does not answer in time is left out: a disk that hangs must
    /// not keep the others from starting.
    pub(crate) fn probe(&self, paths: Vec<String>, fds: Vec<OwnedFd>) -> TargetReply {
        if paths.len() != fds.len() {
            let what = format!("{} paths, but {} descriptors", paths.len(), fds.len());
            return Err(ApiError::new(ErrorKind::Usage, what));
        }
        let disks = self.with_probe(|owner| {
            owner.call(async move |local| probe_all(&local, paths, fds).await)
        })?;
        Ok(TargetAnswer::Probed { disks: disks? })
    }

    /// Labels a free disk.
    pub(crate) fn label(
        &self,
        path: String,
        fd: OwnedFd,
        system: SystemUuid,
        uuid: DiskUuid,
    ) -> TargetReply {
        self.with_probe(|owner| {
            owner.call(async move |local| {
                let disk = open(&local, &path, fd)?;
                label::label(&disk, &local.pool, system, uuid).await
            })?
        })?;
        Ok(TargetAnswer::Done)
    }

    /// Overwrites the superblocks of a disk.
    pub(crate) fn wipe(&self, path: String, fd: OwnedFd) -> TargetReply {
        self.with_probe(|owner| {
            owner.call(async move |local| {
                let disk = open(&local, &path, fd)?;
                label::wipe(&disk, &local.pool).await
            })?
        })?;
        Ok(TargetAnswer::Done)
    }
}

/// Probes disks on a thread; what hangs goes on there until the kernel answers, with its descriptor.
async fn probe_all(
    local: &Rc<Local>,
    paths: Vec<String>,
    fds: Vec<OwnedFd>,
) -> Result<Vec<Probe>, ApiError> {
    let found: Rc<RefCell<Vec<Option<Probe>>>> = Rc::new(RefCell::new(vec![None; paths.len()]));
    for (i, (path, fd)) in paths.iter().zip(fds).enumerate() {
        let disk = open(local, path, fd)?;
        let (path, pool, found) = (path.clone(), Rc::clone(&local.pool), Rc::clone(&found));
        local.executor.spawn(async move {
            let probe = label::probe(&disk, &path, &pool).await;
            if let Some(place) = found.borrow_mut().get_mut(i) {
                *place = Some(probe);
            }
        });
    }
    let end = local.clock.now().0 + PROBE_LIMIT;
    while found.borrow().iter().any(Option::is_none) && local.clock.now().0 < end {
        local.clock.sleep(MILLISECOND).await;
    }
    let found = found.take();
    for (path, _) in paths
        .iter()
        .zip(&found)
        .filter(|(_, probe)| probe.is_none())
    {
        tracing::warn!(path, "a disk does not answer and is left out");
    }
    Ok(found.into_iter().flatten().collect())
}

/// Takes a disk onto a thread's ring.
pub(crate) fn open(local: &Local, path: &str, fd: OwnedFd) -> Result<MemberFile, ApiError> {
    MemberFile::new(&local.ring, fd)
        .map_err(|error| api_error(ErrorKind::Failed, &format!("{path} cannot be used"), &error))
}
