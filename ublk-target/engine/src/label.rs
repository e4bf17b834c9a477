//! Superblocks of disks that no running group holds: read, label, wipe.

use std::rc::Rc;

use lunar_api::target::{Label, Probe};
use lunar_api::{ApiError, DiskUuid, ErrorKind, GroupUuid, History, SystemUuid};

use crate::config::GroupConfig;
use crate::parity;
use crate::pool::{Lease, Pool, Quota};
use crate::raid_group::EIO;
use crate::reserve::{end_copy_at, lay_out};
use crate::start::read_pieces;
use crate::superblock::{At, BYTES, Copy, Superblock, SuperblockError, choose, decode};
use crate::traits::{Buf, Disk, DiskError, DiskVerb, Piece};

/// Why a disk's superblock could not be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LabelError {
    /// The disk answered an error.
    #[error("the disk cannot be read")]
    Read(#[source] DiskError),
    /// What is there is not to be believed.
    #[error("the superblock is not valid")]
    Invalid(#[source] SuperblockError),
    /// Nothing of Lunar is there.
    #[error("the disk carries no Lunar superblock")]
    None,
}

const PIECE: Piece = Piece {
    offset: 0,
    len: 4096,
};

/// Where in a lease a superblock is read to.
pub(crate) type Place<'a> = (&'a Lease, usize);

async fn read_at<D: Disk>(
    disk: &D,
    at: u64,
    (lease, to): Place<'_>,
) -> Result<[u8; BYTES], DiskError> {
    let piece = Piece {
        offset: u32::try_from(to).expect("memories are below 4 GiB"),
        ..PIECE
    };
    disk.submit(DiskVerb::Read, at, BYTES as u64, Buf::Pool(lease), &[piece])
        .await?;
    let mut bytes = [0; BYTES];
    parity::copy_out(&mut bytes, lease.cells(to..to + BYTES));
    Ok(bytes)
}

/// Reads both copies of a disk's superblock and takes the newer.
///
/// # Errors  `None` where nothing of Lunar is, `Read` where that cannot be said, else why neither copy is believed
pub async fn read_superblock<D: Disk>(disk: &D, pool: &Rc<Pool>) -> Result<Superblock, LabelError> {
    let lease = pool.lease(Quota::Work, BYTES).await;
    read_superblock_to(disk, (&lease, 0)).await
}

/// As [`read_superblock`], with memory of the caller.
pub(crate) async fn read_superblock_to<D: Disk>(
    disk: &D,
    to: Place<'_>,
) -> Result<Superblock, LabelError> {
    match choose(read_copies(disk, to).await?) {
        Ok(superblock) => Ok(superblock),
        Err(SuperblockError::NotLunar) => Err(LabelError::None),
        Err(SuperblockError::Unreadable { errno }) => {
            Err(LabelError::Read(DiskError::Errno(errno)))
        }
        Err(error) => Err(LabelError::Invalid(error)),
    }
}

type Copies = [Result<Superblock, SuperblockError>; 2];

async fn read_copies<D: Disk>(disk: &D, to: Place<'_>) -> Result<Copies, LabelError> {
    let size = disk.capacity();
    if size < 2 * BYTES as u64 {
        return Err(LabelError::None);
    }
    let start_at = 4096;
    let first = read_at(disk, start_at, to).await;
    let start = match &first {
        Ok(bytes) => decode(
            bytes,
            At {
                offset: start_at,
                device_size: size,
            },
        ),
        Err(error) => Err(unreadable(*error)),
    };
    let end_at = match &start {
        Ok(superblock) => superblock.end_copy,
        Err(_) => match end_copy_at(size) {
            Ok(at) => at,
            Err(_) => return Err(LabelError::None),
        },
    };
    let end = match read_at(disk, end_at, to).await {
        Ok(bytes) => decode(
            &bytes,
            At {
                offset: end_at,
                device_size: size,
            },
        ),
        Err(error) => Err(unreadable(error)),
    };
    Ok([start, end])
}

fn unreadable(error: DiskError) -> SuperblockError {
    SuperblockError::Unreadable {
        errno: match error {
            DiskError::Errno(errno) => errno,
            DiskError::Short(_) | DiskError::Abandoned => EIO.0,
        },
    }
}

/// Reads what a disk carries.
pub async fn probe<D: Disk>(disk: &D, path: &str, pool: &Rc<Pool>) -> Probe {
    let copies = {
        let lease = pool.lease(Quota::Work, BYTES).await;
        read_copies(disk, (&lease, 0)).await
    };
    let copies = copies.unwrap_or([
        Err(SuperblockError::NotLunar),
        Err(SuperblockError::NotLunar),
    ]);
    let damaged = damaged(&copies);
    let (label, problem) = match choose(copies) {
        Ok(superblock) => {
            let mut label = short(&superblock);
            label.group_name = name_of(disk, pool, &superblock).await.unwrap_or_default();
            label.damaged = damaged;
            (Some(label), None)
        }
        Err(SuperblockError::NotLunar) => (None, None),
        Err(cause @ SuperblockError::Unreadable { .. }) => {
            (None, Some(format!("cannot be read: {cause}")))
        }
        Err(cause) => (None, Some(format!("superblock not valid: {cause}"))),
    };
    let (capacity, logical_block) = (disk.capacity(), disk.logical_block());
    Probe {
        path: path.to_owned(),
        capacity,
        data_bytes: lay_out(capacity).map_or(0, |reserve| reserve.data_bytes),
        logical_block,
        label,
        problem,
    }
}

/// What is wrong with the copy that does not count.
fn damaged(copies: &Copies) -> Option<String> {
    (0..).zip(copies).find_map(|(i, copy)| {
        let cause = copy.as_ref().err()?;
        Some(format!(
            "copy {i} of its superblock is damaged ({cause}), copy {} counts",
            1 - i
        ))
    })
}

/// The name of the group, which stands in the configuration.
async fn name_of<D: Disk>(disk: &D, pool: &Rc<Pool>, block: &Superblock) -> Option<String> {
    let member = block.member.as_ref()?;
    let version = member.group.config;
    let geometry = member.group.geometry().ok()?;
    let at = member.layout.config[usize::from(version.current)].offset;
    let json = read_pieces(pool, disk, at, usize::try_from(version.len).ok()?).await;
    let config = GroupConfig::decode(&json.ok()?, &version, &geometry).ok()?;
    Some(config.name)
}

fn short(superblock: &Superblock) -> Label {
    let group = superblock.member.as_ref().map(|member| &member.group);
    Label {
        system: superblock.system,
        disk: superblock.disk,
        group: group.map_or(GroupUuid::NIL, |group| group.uuid),
        group_name: String::new(),
        level: group.map(|group| group.level),
        slots: group.map_or(0, |group| {
            u16::try_from(group.members.len()).unwrap_or(u16::MAX)
        }),
        slot: superblock.member.as_ref().map(|member| member.slot),
        history: group.map_or(History::NIL, |group| group.history),
        generation: superblock.generation,
        members: group.map_or(Vec::new(), |group| {
            group.members.iter().map(|m| m.disk).collect()
        }),
        replacement: group
            .and_then(|group| group.replacement)
            .map(|new| new.disk),
        deleted: group.is_some_and(|group| group.flags.deleted),
        damaged: None,
    }
}

/// Writes the label of a free disk: a superblock without a group.
///
/// # Crash  copy 0 is durable before copy 1 is begun: the disk is what it was, or labelled
/// # Errors  a disk that is too small, or does not take the writes
pub async fn label<D: Disk>(
    disk: &D,
    pool: &Rc<Pool>,
    system: SystemUuid,
    uuid: DiskUuid,
) -> Result<(), ApiError> {
    let failed = |cause: String| {
        ApiError::new(ErrorKind::Failed, "the disk could not be labelled").because(cause)
    };
    let reserve = lay_out(disk.capacity()).map_err(|error| failed(error.to_string()))?;
    let generation = match read_superblock(disk, pool).await {
        Ok(old) => old.generation + 1,
        Err(_) => 1,
    };
    let block = Superblock {
        system,
        disk: uuid,
        device_size: disk.capacity(),
        end_copy: reserve.end_copy,
        generation,
        member: None,
    };
    write_both(disk, pool, &block).await.map_err(failed)
}

/// Marks a member of a group that does not run as one of a deleted group: its disk is free for reuse.
///
/// # Crash  copy 0 is durable before copy 1 is begun: the disk is what it was, or deleted
/// # Errors  the disk is no member of that group, or does not take the writes
pub async fn mark_deleted<D: Disk>(
    disk: &D,
    pool: &Rc<Pool>,
    group: GroupUuid,
) -> Result<(), ApiError> {
    let failed = |cause: String| {
        ApiError::new(ErrorKind::Failed, "the disk could not be marked deleted").because(cause)
    };
    let mut block = read_superblock(disk, pool)
        .await
        .map_err(|error| failed(error.to_string()))?;
    match &mut block.member {
        Some(member) if member.group.uuid == group => member.group.flags.deleted = true,
        Some(_) | None => return Err(failed("it is no member of that group".into())),
    }
    block.generation += 1;
    write_both(disk, pool, &block).await.map_err(failed)
}

/// Has a member of a group, or a free disk, belong to another system; returns whether it had to be written.
///
/// # Crash  copy 0 is durable before copy 1 is begun: the disk is of the one or of the other. Members are written from
/// the highest generation down: no generation is ever there with two contents
/// # Errors  it is of neither system or of another group, or does not take the writes
pub async fn adopt<D: Disk>(
    disk: &D,
    pool: &Rc<Pool>,
    group: GroupUuid,
    from: SystemUuid,
    to: SystemUuid,
) -> Result<bool, ApiError> {
    let failed = |cause: String| {
        ApiError::new(ErrorKind::Failed, "the disk could not be taken over").because(cause)
    };
    let mut block = read_superblock(disk, pool)
        .await
        .map_err(|error| failed(error.to_string()))?;
    let found = block
        .member
        .as_ref()
        .map_or(GroupUuid::NIL, |m| m.group.uuid);
    if found != group {
        return Err(failed(format!(
            "it is of group {found} now, no longer of {group}"
        )));
    }
    if block.system == to {
        return Ok(false);
    }
    if block.system != from {
        return Err(failed(format!("it is of system {} now", block.system)));
    }
    block.system = to;
    block.generation += 1;
    write_both(disk, pool, &block).await.map_err(failed)?;
    Ok(true)
}

/// Writes both copies, the first one durable before the second is begun.
async fn write_both<D: Disk>(disk: &D, pool: &Rc<Pool>, block: &Superblock) -> Result<(), String> {
    let lease = pool.lease(Quota::Work, BYTES).await;
    for copy in Copy::BOTH {
        let mut bytes = [0; BYTES];
        block
            .encode(copy, &mut bytes)
            .map_err(|error| error.to_string())?;
        parity::copy_in(lease.cells(0..BYTES), &bytes);
        let verb = DiskVerb::Write { fua: true };
        let (at, len) = (block.copy_at(copy), BYTES as u64);
        disk.submit(verb, at, len, Buf::Pool(&lease), &[PIECE])
            .await
            .map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Overwrites both superblocks.
///
/// # Crash  copy 1 goes first: a disk that still says anything says it by copy 0
pub async fn wipe<D: Disk>(disk: &D, pool: &Rc<Pool>) -> Result<(), ApiError> {
    let failed = |cause: String| {
        ApiError::new(ErrorKind::Failed, "the disk could not be wiped").because(cause)
    };
    let end = match read_superblock(disk, pool).await {
        Ok(superblock) => superblock.end_copy,
        Err(_) => end_copy_at(disk.capacity()).map_err(|error| failed(error.to_string()))?,
    };
    let lease = pool.lease(Quota::Work, BYTES).await;
    parity::copy_in(lease.cells(0..BYTES), &[0; BYTES]);
    for at in [end, 4096] {
        let verb = DiskVerb::Write { fua: true };
        disk.submit(verb, at, BYTES as u64, Buf::Pool(&lease), &[PIECE])
            .await
            .map_err(|error| failed(error.to_string()))?;
    }
    Ok(())
}
