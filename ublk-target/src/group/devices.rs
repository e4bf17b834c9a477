//! The kernel devices of a group's LUs: made, recovered, resized and taken away.

use std::rc::Rc;
use std::sync::Arc;

use lunar_api::target::LuStatus;
use lunar_api::{ApiError, ErrorKind, LuUuid};

use lunar_engine::config::Queues;

use super::queue_lanes::DETACH_LIMIT;
use super::{Group, lock};
use crate::control::api_error;
use crate::crew;
use crate::owner::Local;
use crate::ublk::lifecycle::{Info, LifecycleError};
use crate::ublk::{Geometry, identity};

/// LUs brought up or taken down at a time: each waits for a handful of control commands, which wait for the kernel.
pub(super) const LUS_AT_ONCE: usize = 32;
/// What the rim knows of a LU.
#[derive(Debug, Clone, Default)]
pub(super) struct Path {
    /// N of /dev/ublkbN.
    pub(super) number: Option<u32>,
    /// Queues that it has.
    pub(super) queues: u16,
    /// The kernel can change its size while it is in use.
    pub(super) can_resize: bool,
    /// The one that it had last: it gets it again if it is free.
    pub(super) last: Option<u32>,
    /// Why it is not up.
    pub(super) problem: String,
}

impl Group {
    /// Brings every LU up, each on the kernel device that bears its identity if there is one.
    pub(super) fn bring_up(&self, devices: &[u32]) -> Result<(), ApiError> {
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

    pub(super) fn up_or_say(&self, lu: LuUuid, known: Option<Info>) {
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
    pub(super) fn up(&self, lu: LuUuid, known: Option<Info>) -> Result<(), ApiError> {
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

    /// Has the kernel's device be as large as the LU.
    pub(super) fn fit(&self, lu: LuUuid, number: u32) -> Result<(), ApiError> {
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

    pub(super) fn detach(&self, lu: LuUuid) -> Result<(), ApiError> {
        self.detach_beside(lu)?;
        self.owner()?
            .call_within(Some(DETACH_LIMIT), async move |local: Rc<Local>| {
                local.detach(lu).await
            })
    }

    /// Takes the device of a LU away, unless somebody holds it.
    pub(super) fn down(&self, lu: LuUuid) -> Result<(), ApiError> {
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
}
