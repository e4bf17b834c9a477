//! The private memory of a group: a locked mapping, of the in-flight file or of nothing.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use lunar_engine::pool::PREFIX;
use lunar_engine::traits::Memory;
use memmap2::{MmapOptions, MmapRaw};

/// Bytes for requests and stripes in flight: 128 requests of 64 KiB and twice as much for their stripes.
pub(crate) const POOL_BYTES: usize = 24 << 20;
/// Bytes of the in-flight file.
pub(crate) const FILE_BYTES: usize = PREFIX + POOL_BYTES;
/// Bytes of the memory that probes and labels use: the least that a pool takes.
pub(crate) const PROBE_BYTES: usize = PREFIX + 2 * lunar_engine::pool::BLOCK_MAX;

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BufferError {
    #[error("the in-flight file cannot be set to {FILE_BYTES} bytes")]
    Size(#[source] io::Error),
    #[error("{0} bytes of memory cannot be mapped")]
    Map(usize, #[source] io::Error),
    #[error("{0} bytes of memory cannot be locked (RLIMIT_MEMLOCK)")]
    Lock(usize, #[source] io::Error),
}

/// A locked mapping, shared by the pool and the ring.
#[derive(Debug, Clone)]
pub(crate) struct Mapping(Rc<MmapRaw>);

impl Mapping {
    /// Maps the in-flight file. Its content is kept if it has the right size, else it starts as zeroes.
    pub(crate) fn of_file(file: &File) -> Result<Self, BufferError> {
        let size = file.metadata().map_err(BufferError::Size)?.len();
        if size != FILE_BYTES as u64 {
            file.set_len(0).map_err(BufferError::Size)?;
            file.set_len(FILE_BYTES as u64).map_err(BufferError::Size)?;
        }
        let map = MmapOptions::new()
            .len(FILE_BYTES)
            .map_raw(file)
            .map_err(|e| BufferError::Map(FILE_BYTES, e))?;
        Self::locked(map)
    }

    /// Maps anonymous memory.
    pub(crate) fn anonymous(bytes: usize) -> Result<Self, BufferError> {
        let map = MmapOptions::new()
            .len(bytes)
            .map_anon()
            .map_err(|e| BufferError::Map(bytes, e))?;
        Self::locked(MmapRaw::from(map))
    }

    fn locked(map: MmapRaw) -> Result<Self, BufferError> {
        map.lock().map_err(|e| BufferError::Lock(map.len(), e))?;
        Ok(Self(Rc::new(map)))
    }

    /// First byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Memory for Mapping {
    fn bytes(&self) -> usize {
        self.len()
    }

    fn cells(&self, range: Range<usize>) -> &[Cell<u8>] {
        assert!(
            range.start <= range.end && range.end <= self.len(),
            "{range:?} of {} bytes",
            self.len()
        );
        // SAFETY: the range lies in the mapping, which lives as long as self; bytes have no alignment and
        // every value is valid; cells allow for writes by others on this thread. The kernel writes only where
        // an operation is in flight, whose lease nobody reads meanwhile.
        unsafe {
            let start = self.as_ptr().add(range.start).cast::<Cell<u8>>();
            std::slice::from_raw_parts(start, range.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_of_right_size_keeps_its_content() {
        let path = std::env::temp_dir().join(format!("lunar-in-flight-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        file.set_len(10).unwrap();
        let map = Mapping::of_file(&file).unwrap();
        assert!(map.cells(0..PREFIX).iter().all(|c| c.get() == 0));
        map.cells(5..6)[0].set(7);
        drop(map);
        let map = Mapping::of_file(&file).unwrap();
        assert_eq!(map.cells(5..6)[0].get(), 7);
        std::fs::remove_file(path).unwrap();
    }
}
