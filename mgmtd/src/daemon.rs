//! The daemon's state: tables, what ublk-target last said, and the connections to it.
//!
//! # Concurrency
//! One thread. The std mutexes are never held across an await. Changing verbs hold `intent` one at a time;
//! reads use their own connection and never wait for a change.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lunar_api::rows::Stranger;
use lunar_api::target::{
    Features, GroupState, GroupStatus, LuStatus, Probe, TARGET_API, TargetAnswer, TargetRequest,
    Witness,
};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, LuUuid, SystemUuid};

use crate::config_file::{self, ConfigFile};
use crate::limits::{APART_MAX, CALL_LIMIT, INTENT_LIMIT, STATUS_LIMIT};
use crate::link::{Link, unexpected};
use crate::standby::Standby;
use crate::store::{self, Store};
use crate::tables::{EventSave, Kind, Tables, Write};
use crate::upgrade::Turn;
use crate::{devnodes, hardware, jobs, probe};

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Config {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub socket: PathBuf,
    pub system: Option<u32>,
    pub target_bin: PathBuf,
    /// Programs run when something happens.
    pub hooks_dir: PathBuf,
    pub hook_limit: Duration,
}

/// What was last seen; nothing of it is saved.
#[derive(Debug, Default, Clone)]
pub struct Live {
    /// mgmtd has just started: not every disk was looked at, not every group was started.
    pub starting: bool,
    pub groups: BTreeMap<GroupUuid, GroupStatus>,
    pub features: Features,
    pub target_pid: Option<u32>,
    pub target_version: String,
    /// Model and serial of disks, remembered when they are gone.
    pub labels: BTreeMap<DiskUuid, String>,
    /// What the disks carried when they were last probed.
    pub probes: BTreeMap<DiskUuid, Probe>,
    /// Paths that could not be read when they were last probed, and why.
    pub bad_paths: BTreeMap<String, String>,
    /// Disks with a Lunar superblock that are left alone.
    pub strangers: Vec<Stranger>,
    /// Why the tables could not be saved last; empty: they are.
    pub unsaved: String,
    /// Groups that would leave disks behind if they started, and why.
    pub barred: BTreeMap<GroupUuid, Problem>,
    /// Groups that ublk-target crashes by, and how.
    pub quarantined: BTreeMap<GroupUuid, String>,
    /// Why a group is not started.
    pub problems: BTreeMap<GroupUuid, Problem>,
}

/// Why a group is not started.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Problem {
    pub why: String,
    /// What to type about it; empty: a plain start.
    pub action: String,
}

impl From<&ApiError> for Problem {
    fn from(error: &ApiError) -> Self {
        let why = std::iter::once(&error.message).chain(&error.causes);
        Self {
            why: why.map(String::as_str).collect::<Vec<_>>().join(": "),
            action: error.hint.clone().unwrap_or_default(),
        }
    }
}

/// Whom an event is about.
#[derive(Debug, Default, Clone, Copy)]
pub struct About {
    pub group: Option<GroupUuid>,
    pub disk: Option<DiskUuid>,
    pub lu: Option<LuUuid>,
}

impl About {
    /// About a group.
    pub fn group(group: GroupUuid) -> Self {
        Self {
            group: Some(group),
            ..Self::default()
        }
    }

    /// About a disk.
    pub fn disk(disk: DiskUuid) -> Self {
        Self {
            disk: Some(disk),
            ..Self::default()
        }
    }
}

/// The daemon.
#[derive(Debug)]
pub struct Daemon {
    pub config: Config,
    /// Since when this mgmtd runs.
    pub started: std::time::Instant,
    store: Store,
    tables: Mutex<Tables>,
    live: Mutex<Live>,
    saving: tokio::sync::Mutex<()>,
    /// The configuration that the archive has.
    archived: Mutex<Option<ConfigFile>>,
    pub intent: tokio::sync::Mutex<()>,
    control: tokio::sync::Mutex<Option<Link>>,
    reading: tokio::sync::Mutex<Option<Link>>,
    /// Who may ask what takes long.
    apart: tokio::sync::Semaphore,
    /// Rings whenever an event was added.
    pub rang: tokio::sync::Notify,
    /// `lunar shutdown` has begun: a death of ublk-target is no failure.
    pub stopping: AtomicBool,
    /// Groups are being brought back after a death: those that are not yet keep their device links.
    pub recovering: AtomicBool,
    /// The next ublk-target, while memory may be too short to start one.
    standby: Mutex<Option<Standby>>,
    /// The ublk-target to start.
    target_bin: Mutex<PathBuf>,
    /// An upgrade of it that is under way.
    upgrade: Mutex<Option<Turn>>,
    /// The file of a ublk-target that may have to be started again.
    kept: Mutex<Option<std::fs::File>>,
    /// The mgmtd that this one is to become.
    next: Mutex<Option<PathBuf>>,
    /// Rings when there is one.
    pub renewing: tokio::sync::Notify,
    /// Rings when all has been stopped.
    pub stopped: tokio::sync::Notify,
    /// Rings when the client that asked for the end of this mgmtd has its answer.
    pub told: tokio::sync::Notify,
}

impl Daemon {
    /// Puts the parts together.
    pub fn new(config: Config, store: Store, mut tables: Tables) -> Arc<Self> {
        let archived = config_file::newest(&config.state_dir);
        if let Some((path, file)) = &archived
            && config_file::refill(&mut tables, file)
        {
            let path = path.display();
            tracing::warn!(%path, "the tables were lost: numbers and roles are those of the archive");
        }
        let archived = archived.map(|(_, file)| file);
        Arc::new(Self {
            standby: Mutex::default(),
            target_bin: Mutex::new(config.target_bin.clone()),
            upgrade: Mutex::default(),
            kept: Mutex::default(),
            next: Mutex::default(),
            renewing: tokio::sync::Notify::new(),
            config,
            started: std::time::Instant::now(),
            store,
            tables: Mutex::new(tables),
            live: Mutex::new(Live {
                starting: true,
                ..Live::default()
            }),
            saving: tokio::sync::Mutex::default(),
            archived: Mutex::new(archived),
            intent: tokio::sync::Mutex::default(),
            control: tokio::sync::Mutex::default(),
            reading: tokio::sync::Mutex::default(),
            apart: tokio::sync::Semaphore::new(APART_MAX),
            rang: tokio::sync::Notify::new(),
            stopping: AtomicBool::new(false),
            recovering: AtomicBool::new(false),
            stopped: tokio::sync::Notify::new(),
            told: tokio::sync::Notify::new(),
        })
    }

    /// The tables.
    pub fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables
            .lock()
            .expect("nobody panics while holding it: panic is abort")
    }

    /// What was last seen.
    pub fn live(&self) -> MutexGuard<'_, Live> {
        self.live
            .lock()
            .expect("nobody panics while holding it: panic is abort")
    }

    /// The ublk-target to start.
    pub fn target_bin(&self) -> MutexGuard<'_, PathBuf> {
        self.target_bin
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The ublk-target that waits to take the place of the one that serves.
    pub fn standby(&self) -> MutexGuard<'_, Option<Standby>> {
        self.standby.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The upgrade that is under way.
    pub fn upgrade(&self) -> MutexGuard<'_, Option<Turn>> {
        self.upgrade.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a program's file open for as long as it may have to be started again.
    pub fn keep(&self, file: std::fs::File) {
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    }

    /// Has this mgmtd become another one, once its client has its answer.
    pub fn renew(&self, program: PathBuf) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some(program);
        self.renewing.notify_one();
    }

    /// The mgmtd that this one is to become.
    pub fn next(&self) -> Option<PathBuf> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.clone()
    }

    /// Waits for its turn to change something.
    ///
    /// # Errors  `Busy` if another change takes too long
    pub async fn turn(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, ApiError> {
        tokio::time::timeout(INTENT_LIMIT, self.intent.lock())
            .await
            .map_err(|_| {
                ApiError::new(ErrorKind::Busy, "another change is still running")
                    .because(format!("it has not ended in {} s", INTENT_LIMIT.as_secs()))
                    .hint("lunar events")
            })
    }

    /// Makes the tables durable.
    ///
    /// # Errors  the disk of the state directory failed
    pub async fn save(&self) -> Result<(), ApiError> {
        let _one = self.saving.lock().await;
        let writes = self.tables().take_writes();
        if writes.is_empty() {
            return Ok(());
        }
        let (store, rows) = (self.store.clone(), writes.clone());
        let result = tokio::task::spawn_blocking(move || store.write(&rows)).await;
        let result = match result {
            Ok(Ok(())) => {
                self.live().unsaved.clear();
                let told = |w: &Write| matches!(w.kind, Kind::Disks | Kind::Groups | Kind::Lus);
                if writes.iter().any(told) {
                    self.archive().await;
                }
                return Ok(());
            }
            Ok(Err(error)) => store::one_line(&error),
            Err(error) => error.to_string(),
        };
        self.live().unsaved.clone_from(&result);
        // They are kept and go with the next: what was done stays done, and the data path needs none of it.
        self.tables().put_back(writes);
        let dir = self.config.state_dir.display();
        Err(
            ApiError::new(ErrorKind::Failed, "the tables could not be saved")
                .because(result)
                .because(
                    "what the command did is done; it is saved with the next change that can be",
                )
                .hint(format!("df {dir}; then: lunar status")),
        )
    }

    /// The configuration now.
    pub fn config_now(&self) -> ConfigFile {
        let view = crate::api::last_view(self);
        let before = self.archived.lock().unwrap_or_else(PoisonError::into_inner);
        ConfigFile::of(&view, before.as_ref())
    }

    /// Keeps a copy of the configuration if it has changed. Nothing waits for it to work: the tables have it too.
    async fn archive(&self) {
        let now = self.config_now();
        {
            let before = self.archived.lock().unwrap_or_else(PoisonError::into_inner);
            if before.as_ref() == Some(&now) || now.disks.is_empty() && before.is_none() {
                return;
            }
        }
        let (dir, file) = (self.config.state_dir.clone(), now.clone());
        let kept = tokio::task::spawn_blocking(move || config_file::archive(&dir, &file)).await;
        match kept {
            Ok(Ok(())) => {
                *self.archived.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
            }
            Ok(Err(error)) => tracing::warn!(%error, "the configuration was not archived"),
            Err(error) => tracing::warn!(%error, "the configuration was not archived"),
        }
    }

    /// Becomes another system: this one is new, and has nothing.
    ///
    /// # Crash  the state directory says it first; whatever else knows it is asked again
    /// # Errors  the state directory takes no write, or ublk-target has groups
    pub async fn become_system(&self, system: SystemUuid) -> Result<(), ApiError> {
        let (store, dir) = (self.store.clone(), self.config.state_dir.clone());
        let at = dir.clone();
        let kept = tokio::task::spawn_blocking(move || store.set_system(&at, system)).await;
        let kept = kept.map_err(|e| e.to_string());
        let why = match kept {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(store::one_line(&error)),
            Err(error) => Some(error),
        };
        if let Some(why) = why {
            let what = "the identity of the system could not be saved";
            return Err(ApiError::new(ErrorKind::Failed, what)
                .because(why)
                .hint(format!("df {0}; ls -ld {0}", dir.display())));
        }
        self.tables().system = system;
        // Connections said hello for the one before.
        *self.control.lock().await = None;
        *self.reading.lock().await = None;
        self.refresh().await
    }

    /// Records an event; it becomes durable with the next `save`.
    pub fn event(&self, name: &str, about: About, text: impl Into<String>) {
        let text = text.into();
        tracing::info!(event = name, "{text}");
        let About { group, disk, lu } = about;
        let (number, time, name) = (0, probe::now_ms(), name.to_string());
        self.tables().push_event(EventSave {
            number,
            time,
            name,
            group,
            disk,
            lu,
            text,
        });
        self.rang.notify_waiters();
    }

    /// Forgets the connections to a dead ublk-target.
    pub async fn disconnect(&self) {
        *self.control.lock().await = None;
        *self.reading.lock().await = None;
        self.live().target_pid = None;
    }

    /// Sends an intent to ublk-target; the descriptors are closed here before the answer is looked at.
    ///
    /// # Errors  `Unreachable`, or what ublk-target answered
    pub async fn ask(
        &self,
        request: &TargetRequest,
        fds: Vec<OwnedFd>,
    ) -> Result<TargetAnswer, ApiError> {
        self.ask_on(&self.control, request, fds, CALL_LIMIT).await
    }

    /// As [`Self::ask`], of what may take long: on a connection of its own, so that it keeps nobody waiting.
    ///
    /// # Errors  as of [`Self::ask`]
    pub async fn ask_apart(
        &self,
        request: &TargetRequest,
        limit: Duration,
    ) -> Result<TargetAnswer, ApiError> {
        let turn = self.apart.acquire().await;
        let mut link = self.hello(STATUS_LIMIT).await?;
        let reply = link.call(request, &[], limit).await;
        drop(turn);
        reply?
    }

    async fn ask_on(
        &self,
        slot: &tokio::sync::Mutex<Option<Link>>,
        request: &TargetRequest,
        fds: Vec<OwnedFd>,
        limit: Duration,
    ) -> Result<TargetAnswer, ApiError> {
        let held = tokio::time::timeout(limit, slot.lock()).await;
        let mut held = held.map_err(|_| {
            ApiError::new(
                ErrorKind::Unreachable,
                "ublk-target is busy with another request",
            )
        })?;
        let mut link = match held.take() {
            Some(link) => link,
            None => self.hello(limit).await?,
        };
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let reply = link.call(request, &raw, limit).await;
        drop(fds);
        let reply = reply?;
        // Only now: after a failure of the connection its answers would be out of step.
        *held = Some(link);
        reply
    }

    /// Connects and agrees on the protocol.
    ///
    /// # Errors  `Unreachable` if no ublk-target listens, `Failed` if it speaks another protocol
    pub async fn hello(&self, limit: Duration) -> Result<Link, ApiError> {
        let path = self.config.run_dir.join("target.sock");
        let mut link = Link::connect(&path).map_err(|e| {
            ApiError::new(ErrorKind::Unreachable, "ublk-target is not running")
                .because(format!("{}: {e}", path.display()))
                .hint("lunar events")
        })?;
        let system = self.tables().system;
        let hello = TargetRequest::Hello {
            api: TARGET_API,
            system,
        };
        match link.call(&hello, &[], limit).await?? {
            TargetAnswer::Hello {
                api: TARGET_API,
                pid,
                features,
                version,
            } => {
                let mut live = self.live();
                live.target_pid = Some(pid);
                live.target_version = version;
                live.features = features;
            }
            other => return Err(unexpected(&other)),
        }
        Ok(link)
    }

    /// Reads the state of everything from ublk-target and corrects the tables from it.
    ///
    /// # Errors  `Unreachable`; what was last seen stays
    pub async fn refresh(&self) -> Result<(), ApiError> {
        let answer = self
            .ask_on(
                &self.reading,
                &TargetRequest::Status,
                Vec::new(),
                STATUS_LIMIT,
            )
            .await?;
        let TargetAnswer::Status { groups, features } = answer else {
            return Err(unexpected(&answer));
        };
        {
            let mut live = self.live();
            live.features = features;
            live.groups = groups.into_iter().map(|g| (g.group, g)).collect();
            let quarantined = |g: &&GroupStatus| g.state == GroupState::Quarantined;
            let known: Vec<_> = live.groups.values().filter(quarantined).cloned().collect();
            for group in known {
                live.quarantined.insert(group.group, group.reason);
            }
        }
        self.absorb().await
    }

    /// Takes one group as ublk-target answered it.
    ///
    /// # Errors  the tables cannot be saved
    pub async fn absorb_group(&self, group: GroupStatus) -> Result<(), ApiError> {
        {
            let mut live = self.live();
            live.problems.remove(&group.group);
            live.groups.insert(group.group, group);
        }
        self.absorb().await
    }

    /// Corrects numbers, witnesses, jobs and device nodes from what was last seen.
    ///
    /// # Errors  the tables cannot be saved
    pub async fn absorb(&self) -> Result<(), ApiError> {
        let groups: Vec<GroupStatus> = self.live().groups.values().cloned().collect();
        {
            let mut tables = self.tables();
            for group in &groups {
                number(&mut tables, group);
            }
            jobs::derive(&mut tables, &groups, probe::now_ms());
        }
        // LUs stand still, and the save may have to wait for memory that only they give back: what is seen now is saved
        // when they are up.
        if self.recovering.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.learn_labels();
        self.sync_nodes();
        self.save().await
    }

    fn learn_labels(&self) {
        let disks: Vec<_> = self.tables().disks.values().cloned().collect();
        for disk in disks {
            let known = self.live().labels.contains_key(&disk.uuid);
            if !known {
                let label = hardware::label(&disk.path);
                self.live().labels.insert(disk.uuid, label);
            }
        }
    }

    fn sync_nodes(&self) {
        // Devices come back under their numbers: a link taken away meanwhile would fail whoever opens it.
        if self.recovering.load(Ordering::Relaxed) {
            return;
        }
        let mut want = BTreeMap::new();
        let mut lus = self.lus();
        // Of two with one name the one that was here first keeps it.
        lus.sort_by_key(|lu| self.tables().lu(lu.lu).map(|l| l.number));
        for lu in lus {
            if let Some(ublk) = lu.ublk {
                want.entry(lu.name).or_insert(ublk);
            }
        }
        let dir = devnodes::node_dir(self.config.system);
        if let Err(error) = devnodes::sync_nodes(&dir, &want) {
            tracing::warn!(%error, dir = %dir.display(), "device links could not be made");
        }
    }

    /// Every LU that was last seen.
    pub fn lus(&self) -> Vec<LuStatus> {
        self.live()
            .groups
            .values()
            .flat_map(|g| g.lus.clone())
            .collect()
    }

    /// Whether the data path is being stopped for good.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Disks in groups that are up: ublk-target holds them.
    pub fn held_disks(&self) -> BTreeSet<DiskUuid> {
        let live = self.live();
        live.groups
            .values()
            .flat_map(|g| g.all_members())
            .map(|m| m.disk)
            .collect()
    }
}

/// Gives numbers to a group and its LUs, records its witness, and drops LUs that are gone.
fn number(tables: &mut Tables, group: &GroupStatus) {
    let n = tables.number_group(group.group, &group.name);
    let mut row = tables.groups[&n].clone();
    row.witness = Some(Witness {
        history: group.history,
        generation: group.generation,
    });
    tables.put_group(row);
    for lu in &group.lus {
        tables.number_lu(lu.lu, group.group, &lu.name);
    }
    let gone: Vec<u32> = tables
        .lus
        .values()
        .filter(|l| l.group == group.group && !group.lus.iter().any(|s| s.lu == l.uuid))
        .map(|l| l.number)
        .collect();
    for lu in gone {
        tables.drop_lu(lu);
    }
}
