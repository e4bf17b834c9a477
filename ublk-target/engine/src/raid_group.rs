//! A RAID group, served by its owner thread.

use std::rc::Rc;

use lunar_api::target::{
    Consistency, GroupStatus, Level, LuSize, LuStatus, Probe, TargetEvent, Witness,
};
use lunar_api::{ApiError, DiskUuid, GroupUuid, LuUuid, SystemUuid};

use crate::pool::Pool;
use crate::traits::{Disk, Env, HostRequest};

/// A member as the rim hands it in.
#[derive(Debug)]
pub struct Given<D> {
    pub uuid: DiskUuid,
    /// For messages.
    pub path: String,
    pub disk: D,
}

/// What a group needs from the rim.
pub struct Parts<E: Env> {
    pub system: SystemUuid,
    pub members: Vec<Given<E::Disk>>,
    /// Over the in-flight file; its content is what a dead predecessor left, or zeroes.
    pub pool: Rc<Pool>,
    pub clock: E::Clock,
    pub front: E::Front,
    /// Gives random 128 bits.
    pub random: Box<dyn FnMut() -> [u8; 16]>,
}

/// How to make a group; member i of the parts is slot i.
#[derive(Debug)]
pub struct CreateSpec {
    pub group: GroupUuid,
    pub name: String,
    pub level: Level,
    pub chunk: u64,
    pub consistency: Consistency,
    pub assume_clean: bool,
}

/// How to start a group.
#[derive(Debug)]
pub struct StartSpec {
    pub group: GroupUuid,
    pub force: bool,
    pub witness: Option<Witness>,
}

/// Answer to a host request that failed: a positive errno (EIO, ENOSPC, EINVAL, EOPNOTSUPP; never EAGAIN).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// A running group. Every method is called on its owner thread.
pub struct RaidGroup<E: Env> {
    parts: Parts<E>,
}

/// Tasks of `worker` that a rim spawns for a group.
pub const WORKERS: usize = 64;

impl<E: Env> RaidGroup<E> {
    /// Writes superblocks and configuration to fresh members, and runs the group.
    pub async fn create(_parts: Parts<E>, _spec: CreateSpec) -> Result<Rc<Self>, ApiError> {
        unimplemented!()
    }
    /// Assembles, replays what a dead predecessor had in flight, and runs the group.
    pub async fn start(_parts: Parts<E>, _spec: StartSpec) -> Result<Rc<Self>, ApiError> {
        unimplemented!()
    }
    /// Serves one host request to its end. `lu` is the handle of `lu_handle`. Allocates nothing.
    pub async fn serve(&self, _lu: u16, _request: HostRequest) -> Result<(), Errno> {
        unimplemented!()
    }
    /// Works off stripe operations; the rim spawns [`WORKERS`] of them. Ends when the group has stopped.
    pub async fn worker(self: Rc<Self>) {
        unimplemented!()
    }
    /// Resync, rebuild, watching for members that do not answer; the rim spawns one. Ends when the group has stopped.
    pub async fn background(self: Rc<Self>) {
        unimplemented!()
    }
    /// LUs in order of handle, deleted ones left out.
    pub fn lus(&self) -> Vec<(u16, LuStatus)> {
        unimplemented!()
    }
    /// Makes a LU durable; the rim then makes its device.
    pub async fn lu_create(
        &self,
        _lu: LuUuid,
        _name: &str,
        _size: LuSize,
        _depth: u16,
    ) -> Result<u16, ApiError> {
        unimplemented!()
    }
    /// Forgets a LU whose device is gone.
    pub async fn lu_delete(&self, _lu: LuUuid) -> Result<(), ApiError> {
        unimplemented!()
    }
    pub async fn lu_rename(&self, _lu: LuUuid, _name: &str) -> Result<(), ApiError> {
        unimplemented!()
    }
    pub async fn rename(&self, _name: &str) -> Result<(), ApiError> {
        unimplemented!()
    }
    pub async fn member_fail(&self, _disk: DiskUuid, _why: &str) -> Result<(), ApiError> {
        unimplemented!()
    }
    pub async fn member_replace(&self, _slot: u16, _with: Given<E::Disk>) -> Result<(), ApiError> {
        unimplemented!()
    }
    pub fn set_rebuild_rate(&self, _min: Option<u64>, _max: Option<u64>) {
        unimplemented!()
    }
    /// Ends background work, flushes and marks the group clean. Fronts are stopped before. With `delete`, marks it deleted.
    pub async fn stop(&self, _delete: bool) -> Result<(), ApiError> {
        unimplemented!()
    }
    /// Everything about it; `ublk` and `problem` of the LUs are the rim's to fill.
    pub fn status(&self) -> GroupStatus {
        unimplemented!()
    }
    /// Moves what happened since the last call to `to` (seq 0: the rim numbers them).
    pub fn take_events(&self, _to: &mut Vec<TargetEvent>) {
        unimplemented!()
    }
}

/// Reads what a disk carries.
pub async fn probe<D: Disk>(_disk: &D, _path: &str, _pool: &Rc<Pool>) -> Probe {
    unimplemented!()
}
/// Writes the label of a free disk.
pub async fn label<D: Disk>(
    _disk: &D,
    _pool: &Rc<Pool>,
    _system: SystemUuid,
    _uuid: DiskUuid,
) -> Result<(), ApiError> {
    unimplemented!()
}
/// Overwrites both superblocks.
pub async fn wipe<D: Disk>(_disk: &D, _pool: &Rc<Pool>) -> Result<(), ApiError> {
    unimplemented!()
}
