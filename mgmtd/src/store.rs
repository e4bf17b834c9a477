//! The tables on disk: redb in the state directory.
//!
//! # Crash
//! One transaction a change, durable when `write` returns; a crash before that leaves the old rows. Start-up
//! reads the disks first and corrects the rows from them, so a lost row costs a number, never data.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use lunar_api::SystemUuid;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;

use crate::tables::{Kind, Tables, Write};

/// Longest wait for the lock of one that has died.
const LOCK_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);
const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
/// Version of the saved rows.
pub const FORMAT: u32 = 1;
const VERSION: &str = "1";

fn definition(kind: Kind) -> TableDefinition<'static, u64, &'static str> {
    TableDefinition::new(match kind {
        Kind::Disks => "disks",
        Kind::Groups => "groups",
        Kind::Lus => "lus",
        Kind::Jobs => "jobs",
        Kind::Events => "events",
    })
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot open {path}")]
    Open {
        path: PathBuf,
        #[source]
        source: redb::DatabaseError,
    },
    #[error("cannot make {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the identity of the system in {path}")]
    Identity {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("a transaction failed")]
    Transaction(#[source] Box<redb::TransactionError>),
    #[error("a table failed")]
    Table(#[source] redb::TableError),
    #[error("reading or writing a row failed")]
    Storage(#[source] redb::StorageError),
    #[error("a commit failed")]
    Commit(#[source] redb::CommitError),
    #[error("row {key} of {table} is not what this version saves")]
    Row {
        table: String,
        key: u64,
        #[source]
        source: serde_json::Error,
    },
    #[error("it was written by version {found}, this is {VERSION}")]
    Version { found: String },
}

/// The open store.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
    /// None: an error closed it, and it is opened again by the next write.
    db: Arc<Mutex<Option<Database>>>,
}

/// An error and its causes in one line.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text += &format!(": {more}");
        }
        source = cause.source();
    }
    text
}

/// Name of the file in the state directory.
pub const FILE: &str = "lunar.redb";
/// Beside it: the identity of the system, so that the disks are still ours when the tables are lost.
const IDENTITY: &str = "system";

/// What a person does about a file whose content is not right.
fn damaged(dir: &Path) -> String {
    let path = dir.join(FILE);
    let at = path.display();
    format!(
        "mv {at} {at}.bad, then start mgmtd again: groups and LUs come back from the disks, numbers and roles from \
         its archive where that is there; jobs and events are lost"
    )
}

/// Opens the store as [`Store::open`] does. redb panics on some files that rotted: then that is said, with what to do, and
/// the process ends.
///
/// # Errors  those of [`Store::open`]
pub fn open_or_end(dir: &Path, fresh: SystemUuid) -> Result<(Store, Tables), StoreError> {
    let at = dir.to_owned();
    std::panic::set_hook(Box::new(move |panic| {
        let (path, advice) = (at.join(FILE), damaged(&at));
        eprintln!(
            "mgmtd: tables: {} is damaged: {panic}\nTry: {advice}",
            path.display()
        );
        std::process::exit(1);
    }));
    let opened = Store::open(dir, fresh);
    drop(std::panic::take_hook());
    opened
}

/// What a person does about a store that does not open.
pub fn advice(error: &StoreError, dir: &Path) -> String {
    let io = |e: &redb::StorageError| match e {
        redb::StorageError::Io(e) => Some(e.kind()),
        _ => None,
    };
    let kind = match error {
        StoreError::Open { source, .. } => match source {
            redb::DatabaseError::DatabaseAlreadyOpen => {
                return "end the other mgmtd, or give this one another --state-dir and --system"
                    .into();
            }
            redb::DatabaseError::Storage(e) => io(e),
            _ => None,
        },
        StoreError::Directory { source, .. } | StoreError::Identity { source, .. } => {
            Some(source.kind())
        }
        StoreError::Storage(e) => io(e),
        StoreError::Version { .. } => return "the mgmtd of that version".into(),
        _ => None,
    };
    match kind {
        Some(std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) => {
            format!("make room: df {}", dir.display())
        }
        Some(std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem) => {
            format!(
                "run mgmtd as root on a writable directory: ls -ld {}",
                dir.display()
            )
        }
        _ => damaged(dir),
    }
}

impl Store {
    /// Opens or makes the store and reads everything. `fresh` is the system's identity if there is none yet.
    ///
    /// # Errors  not readable, in use by another mgmtd, of another version
    pub fn open(dir: &Path, fresh: SystemUuid) -> Result<(Self, Tables), StoreError> {
        let at = |source| StoreError::Directory {
            path: dir.into(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(at)?;
        let path = dir.join(FILE);
        let db = checked(&path)?;
        let fresh = identity(dir)?.unwrap_or(fresh);
        let system = meta(&db, fresh)?;
        keep_identity(dir, system)?;
        let store = Self {
            path,
            db: Arc::new(Mutex::new(Some(db))),
        };
        let mut tables = Tables::default();
        tables.system = system;
        store.read(Kind::Disks, |n, row| {
            tables.disks.insert(n, row);
        })?;
        store.read(Kind::Groups, |n, row| {
            tables.groups.insert(n, row);
        })?;
        store.read(Kind::Lus, |n, row| {
            tables.lus.insert(n, row);
        })?;
        store.read(Kind::Jobs, |n, row| {
            tables.jobs.insert(n, row);
        })?;
        store.read(Kind::Events, |_, row| tables.events.push_back(row))?;
        Ok((store, tables))
    }

    /// Has the state directory belong to another system. Blocks.
    ///
    /// # Crash  the commit decides; the file beside it follows at the next start
    /// # Errors  the disk of the state directory failed
    pub fn set_system(&self, dir: &Path, system: SystemUuid) -> Result<(), StoreError> {
        {
            let mut place = self.db.lock().unwrap_or_else(PoisonError::into_inner);
            let db = match place.take() {
                Some(db) => db,
                None => open(&self.path)?,
            };
            let txn = db
                .begin_write()
                .map_err(|e| StoreError::Transaction(Box::new(e)))?;
            {
                let mut meta = txn.open_table(META).map_err(StoreError::Table)?;
                put(&mut meta, "system", &system.to_string())?;
            }
            txn.commit().map_err(StoreError::Commit)?;
            *place = Some(db);
        }
        keep_identity(dir, system)
    }

    fn closed() -> StoreError {
        StoreError::Storage(redb::StorageError::Corrupted("it is closed".into()))
    }

    fn read<T: DeserializeOwned>(
        &self,
        kind: Kind,
        mut each: impl FnMut(u32, T),
    ) -> Result<(), StoreError> {
        let db = self.db.lock().unwrap_or_else(PoisonError::into_inner);
        let txn = db
            .as_ref()
            .ok_or_else(Self::closed)?
            .begin_read()
            .map_err(|e| StoreError::Transaction(Box::new(e)))?;
        let table = txn
            .open_table(definition(kind))
            .map_err(StoreError::Table)?;
        for row in table.iter().map_err(StoreError::Storage)? {
            let (key, value) = row.map_err(StoreError::Storage)?;
            let row = serde_json::from_str(value.value()).map_err(|source| StoreError::Row {
                table: format!("{kind:?}"),
                key: key.value(),
                source,
            })?;
            each(u32::try_from(key.value()).unwrap_or(u32::MAX), row);
        }
        Ok(())
    }

    /// Makes rows durable, all or none. Blocks.
    ///
    /// # Errors  the disk of the state directory failed
    pub fn write(&self, writes: &[Write]) -> Result<(), StoreError> {
        if writes.is_empty() {
            return Ok(());
        }
        let mut place = self.db.lock().unwrap_or_else(PoisonError::into_inner);
        let db = match place.take() {
            Some(db) => db,
            None => open(&self.path)?,
        };
        Self::commit(&db, writes)?;
        // Only now: after an error it takes nothing more until it is opened anew.
        *place = Some(db);
        Ok(())
    }

    fn commit(db: &Database, writes: &[Write]) -> Result<(), StoreError> {
        let txn = db
            .begin_write()
            .map_err(|e| StoreError::Transaction(Box::new(e)))?;
        for write in writes {
            let mut table = txn
                .open_table(definition(write.kind))
                .map_err(StoreError::Table)?;
            match &write.value {
                Some(value) => table.insert(write.key, value.as_str()).map(drop),
                None => table.remove(write.key).map(drop),
            }
            .map_err(StoreError::Storage)?;
        }
        txn.commit().map_err(StoreError::Commit)
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    Database::create(path).map_err(|source| StoreError::Open {
        path: path.into(),
        source,
    })
}

/// As [`open`]. An mgmtd that was killed while it started a process has its lock until that one's program runs.
fn open_patiently(path: &Path) -> Result<Database, StoreError> {
    let begun = std::time::Instant::now();
    loop {
        match open(path) {
            Err(StoreError::Open {
                source: redb::DatabaseError::DatabaseAlreadyOpen,
                ..
            }) if begun.elapsed() < LOCK_PATIENCE => {}
            result => return result,
        }
        // Before anything else of mgmtd runs.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(LOCK_PATIENCE / 50);
    }
}

/// Opens the file when mgmtd starts: every page of it is compared with its checksum first. What is read from a damaged one
/// could be anything.
fn checked(path: &Path) -> Result<Database, StoreError> {
    let mut db = open_patiently(path)?;
    let is_sound = db.check_integrity().map_err(|source| StoreError::Open {
        path: path.into(),
        source,
    })?;
    if !is_sound {
        tracing::warn!(path = %path.display(), "the tables were damaged, and are as of an earlier change");
    }
    Ok(db)
}

fn identity(dir: &Path) -> Result<Option<SystemUuid>, StoreError> {
    let path = dir.join(IDENTITY);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(StoreError::Identity { path, source }),
    }
}

/// # Crash  a new file beside, durable, then renamed, then the directory: the old one or the new one is there
fn keep_identity(dir: &Path, system: SystemUuid) -> Result<(), StoreError> {
    if identity(dir)? == Some(system) {
        return Ok(());
    }
    let path = dir.join(IDENTITY);
    let new = dir.join("system.new");
    let write = || {
        let mut file = std::fs::File::create(&new)?;
        std::io::Write::write_all(&mut file, format!("{system}\n").as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &path)?;
        std::fs::File::open(dir)?.sync_all()
    };
    write().map_err(|source| StoreError::Identity {
        path: path.clone(),
        source,
    })
}

fn meta(db: &Database, fresh: SystemUuid) -> Result<SystemUuid, StoreError> {
    let txn = db
        .begin_write()
        .map_err(|e| StoreError::Transaction(Box::new(e)))?;
    let mut system = fresh;
    {
        let mut meta = txn.open_table(META).map_err(StoreError::Table)?;
        let version = get(&meta, "version")?;
        match version {
            None => put(&mut meta, "version", VERSION)?,
            Some(found) if found != VERSION => return Err(StoreError::Version { found }),
            Some(_) => {}
        }
        match get(&meta, "system")?.and_then(|text| text.parse().ok()) {
            Some(known) => system = known,
            None => put(&mut meta, "system", &fresh.to_string())?,
        }
        for kind in [
            Kind::Disks,
            Kind::Groups,
            Kind::Lus,
            Kind::Jobs,
            Kind::Events,
        ] {
            txn.open_table(definition(kind))
                .map_err(StoreError::Table)?;
        }
    }
    txn.commit().map_err(StoreError::Commit)?;
    Ok(system)
}

fn get(
    meta: &redb::Table<'_, &'static str, &'static str>,
    key: &'static str,
) -> Result<Option<String>, StoreError> {
    let found = meta.get(key).map_err(StoreError::Storage)?;
    Ok(found.map(|v| v.value().to_string()))
}

fn put(
    meta: &mut redb::Table<'_, &'static str, &'static str>,
    key: &'static str,
    value: &str,
) -> Result<(), StoreError> {
    meta.insert(key, value)
        .map(drop)
        .map_err(StoreError::Storage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lunar_api::{GroupUuid, LuUuid};

    #[test]
    fn open_again_finds_the_rows() {
        let dir = std::env::temp_dir().join(format!("lunar-store-{}", std::process::id()));
        let first = SystemUuid::from_bytes([7; 16]);
        let (store, mut tables) = Store::open(&dir, first).unwrap();
        let group = GroupUuid::from_bytes([1; 16]);
        tables.number_group(group, "data");
        tables.number_lu(LuUuid::from_bytes([2; 16]), group, "vol");
        store.write(&tables.take_writes()).unwrap();
        tables.drop_lu(1);
        store.write(&tables.take_writes()).unwrap();
        drop(store);
        let (_, again) = Store::open(&dir, SystemUuid::from_bytes([8; 16])).unwrap();
        assert_eq!(again.system, first);
        assert_eq!(again.groups, tables.groups);
        assert!(again.lus.is_empty());
        // The tables are lost, the disks are still ours.
        drop(again);
        std::fs::remove_file(dir.join(FILE)).unwrap();
        let (_, anew) = Store::open(&dir, SystemUuid::from_bytes([8; 16])).unwrap();
        assert_eq!((anew.system, anew.groups.len()), (first, 0));
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn open_of_a_damaged_file_says_what_to_do() {
        let dir = std::env::temp_dir().join(format!("lunar-damaged-{}", std::process::id()));
        let system = SystemUuid::from_bytes([7; 16]);
        let (store, mut tables) = Store::open(&dir, system).unwrap();
        tables.number_group(GroupUuid::from_bytes([1; 16]), "data");
        store.write(&tables.take_writes()).unwrap();
        drop(store);
        let whole = std::fs::read(dir.join(FILE)).unwrap();
        for len in [1, 100, 4096, whole.len() / 2] {
            std::fs::write(dir.join(FILE), &whole[..len]).unwrap();
            let error = Store::open(&dir, system).unwrap_err();
            let advice = advice(&error, &dir);
            assert!(
                advice.starts_with("mv ") && advice.contains("disks"),
                "{len}: {advice}"
            );
        }
        // Bytes that rotted: refused, or read as they were.
        let mut refused = 0;
        for page in 0..20 {
            let mut bad = whole.clone();
            for byte in &mut bad[page * 4096 + 64..][..512] {
                *byte = byte.wrapping_mul(31).wrapping_add(97);
            }
            std::fs::write(dir.join(FILE), &bad).unwrap();
            match std::panic::catch_unwind(|| Store::open(&dir, system)) {
                // `open_or_end` tells of it.
                Err(_) => {}
                Ok(Err(error)) => {
                    refused += 1;
                    let advice = advice(&error, &dir);
                    assert!(advice.starts_with("mv "), "page {page}: {advice}");
                }
                Ok(Ok((_, again))) => assert_eq!(again.groups, tables.groups, "page {page}"),
            }
        }
        assert!(refused > 0, "no page was looked at");
        std::fs::write(dir.join(FILE), &whole).unwrap();
        let held = Store::open(&dir, system).unwrap();
        let error = Store::open(&dir, system).unwrap_err();
        assert!(advice(&error, &dir).contains("other mgmtd"), "{error}");
        drop(held);
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
