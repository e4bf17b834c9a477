//! What the verbs do: one file per resource. Each resolves its arguments, checks, plans, then carries out.

mod admission;
pub mod config;
pub mod disk;
pub mod group;
pub mod import;
pub mod lu;
pub mod state;
pub mod upgrade;

use lunar_api::mgmt::Request;
use lunar_api::target::GroupStatus;
use lunar_api::{ApiError, ErrorKind};
use serde_json::Value;

use crate::daemon::Daemon;
use crate::devnodes;
use crate::holders;
use crate::views::View;

/// Carries out one request and gives the parameters of its answer.
///
/// # Errors  what the verb answers
pub async fn answer(daemon: &Daemon, request: Request) -> Result<Value, ApiError> {
    match request {
        Request::Status(ask) => json(state::status(daemon, ask).await?),
        Request::Events(ask) => json(state::events(daemon, ask).await?),
        Request::EventsTest(ask) => json(state::events_test(daemon, ask)?),
        Request::Doctor(_) => json(state::doctor(daemon).await?),
        Request::Metrics(_) => json(state::metrics(daemon).await?),
        Request::Stat(_) => json(state::stat(daemon).await?),
        Request::Report(_) => json(state::report(daemon).await?),
        Request::JobList(_) => json(state::job_list(daemon).await?),
        Request::JobShow(ask) => json(state::job_show(daemon, ask.job).await?),
        Request::JobCancel(ask) => json(state::job_cancel(daemon, ask).await?),
        Request::PathList(_) => json(state::path_list(daemon).await?),
        Request::Shutdown(ask) => json(state::shutdown(daemon, ask).await?),
        Request::Upgrade(ask) => json(upgrade::upgrade(daemon, ask).await?),
        Request::Import(ask) => json(import::import(daemon, ask).await?),
        Request::ConfigSave(_) => json(config::save(daemon).await?),
        Request::ConfigLoad(ask) => json(config::load(daemon, ask).await?),
        Request::DiskList(_) => json(disk::list(daemon).await?),
        Request::DiskShow(ask) => json(disk::show(daemon, &ask.name).await?),
        Request::DiskAdd(ask) => json(disk::add(daemon, ask).await?),
        Request::DiskLocate(ask) => json(disk::locate(daemon, ask).await?),
        Request::DiskFail(ask) => json(disk::fail(daemon, ask).await?),
        Request::DiskReplace(ask) => json(disk::replace(daemon, ask).await?),
        Request::DiskRemove(ask) => json(disk::remove(daemon, ask).await?),
        Request::GroupList(_) => json(group::list(daemon).await?),
        Request::GroupShow(ask) => json(group::show(daemon, &ask.name).await?),
        Request::GroupCreate(ask) => json(group::create(daemon, ask).await?),
        Request::GroupSet(ask) => json(group::set(daemon, ask).await?),
        Request::GroupScrub(ask) => json(group::scrub(daemon, ask).await?),
        Request::GroupStart(ask) => json(group::start(daemon, ask).await?),
        Request::GroupResolve(ask) => json(import::resolve(daemon, ask).await?),
        Request::GroupStop(ask) => json(group::stop(daemon, ask).await?),
        Request::GroupGrow(ask) => json(group::grow(daemon, ask).await?),
        Request::GroupRename(ask) => json(group::rename(daemon, ask).await?),
        Request::GroupDelete(ask) => json(group::delete(daemon, ask).await?),
        Request::LuList(_) => json(lu::list(daemon).await?),
        Request::LuShow(ask) => json(lu::show(daemon, &ask.name).await?),
        Request::LuCreate(ask) => json(lu::create(daemon, ask).await?),
        Request::LuRename(ask) => json(lu::rename(daemon, ask).await?),
        Request::LuSet(ask) => json(lu::set(daemon, ask).await?),
        Request::LuResize(ask) => json(lu::resize(daemon, ask).await?),
        Request::LuDelete(ask) => json(lu::delete(daemon, ask).await?),
    }
}

fn json<T: serde::Serialize>(reply: T) -> Result<Value, ApiError> {
    serde_json::to_value(reply).map_err(|e| {
        ApiError::new(ErrorKind::Failed, "the answer cannot be written").because(e.to_string())
    })
}

/// Takes the present moment; what ublk-target does not tell is as last seen.
pub async fn view(daemon: &Daemon) -> View {
    if !daemon.is_stopping() {
        let _ = daemon.refresh().await;
    }
    last_view(daemon)
}

/// Takes what was last seen.
pub fn last_view(daemon: &Daemon) -> View {
    let tables = daemon.tables().clone();
    let live = daemon.live().clone();
    let nodes = devnodes::node_dir(daemon.config.system)
        .display()
        .to_string();
    View {
        tables,
        live,
        nodes,
    }
}

/// Refuses if anybody holds a LU of the group.
///
/// # Errors  `Busy`, with the holders
pub fn check_not_held(group: &GroupStatus, what: &str) -> Result<(), ApiError> {
    let held = group.lus.iter().filter_map(|lu| Some((&lu.name, lu.ublk?)));
    let mut error = ApiError::new(ErrorKind::Busy, format!("{what}: in use"));
    let look = holders::Look::now();
    for (name, ublk) in held {
        for holder in look.of_ublk(ublk) {
            if let Some(at) = holder
                .strip_prefix("mounted at ")
                .filter(|_| error.hint.is_none())
            {
                error = error.hint(format!("umount {at}"));
            }
            error = error.because(format!("LU {name} (/dev/ublkb{ublk}) is {holder}"));
        }
    }
    if error.causes.is_empty() {
        Ok(())
    } else {
        Err(error)
    }
}

/// Adds to ublk-target's "busy" the processes that have the devices open.
pub fn name_openers(mut error: ApiError, ublks: &[u32]) -> ApiError {
    if error.kind == ErrorKind::Busy {
        for ublk in ublks {
            error
                .causes
                .extend(holders::openers(&format!("/dev/ublkb{ublk}")));
        }
        if error.hint.is_none() {
            error = error.hint("end what holds it, then the same command again");
        }
    }
    error
}
