//! The tables on disk: redb in the state directory.
//!
//! # Crash
//! One transaction a change, durable when `write` returns; a crash before that leaves the old rows. Start-up
//! reads the disks first and corrects the rows from them, so a lost row costs a number, never data.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lunar_api::SystemUuid;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::de::DeserializeOwned;

use crate::tables::{Kind, Tables, Write};

const META: TableDefinition<'_, &str, &str> = TableDefinition::new("meta");
/// Version of the saved rows.
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
    db: Arc<Database>,
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
        let path = dir.join("lunar.redb");
        let db = Database::create(&path).map_err(|source| StoreError::Open { path, source })?;
        let store = Self { db: Arc::new(db) };
        let system = store.meta(fresh)?;
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

    fn meta(&self, fresh: SystemUuid) -> Result<SystemUuid, StoreError> {
        let txn = self
            .db
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

    fn read<T: DeserializeOwned>(
        &self,
        kind: Kind,
        mut each: impl FnMut(u32, T),
    ) -> Result<(), StoreError> {
        let txn = self
            .db
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
        let txn = self
            .db
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
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
