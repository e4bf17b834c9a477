//! Measures what the ring's loop can do by itself: member I/O per second without an engine above it.

use std::cell::Cell;
use std::error::Error;
use std::fs::File;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Args;
use lunar_engine::pool::{Pool, Quota};
use lunar_engine::traits::{Buf, Disk, DiskVerb, Piece};

use crate::buffers::{Mapping, PROBE_BYTES};
use crate::clock::Timers;
use crate::executor::Executor;
use crate::member_file::{MemberFile, POOL_BUFFER};
use crate::ring::Ring;

/// Options of `bench-loop`.
#[derive(Debug, Args)]
pub(crate) struct BenchLoop {
    /// Files or block devices; they are only read
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Reads in flight on each
    #[arg(long, default_value_t = 32)]
    depth: u32,
    /// Bytes of each read
    #[arg(long, default_value_t = 4096)]
    block: u32,
    #[arg(long, default_value_t = 5)]
    seconds: u64,
}

impl BenchLoop {
    /// Reads for the given time and prints reads per second and reads per turn.
    pub(crate) fn run(&self) -> Result<(), Box<dyn Error>> {
        let timers = Timers::new();
        let ring = Ring::new(Rc::clone(&timers))?;
        let executor = Executor::new();
        let memory = Mapping::anonymous(PROBE_BYTES)?;
        ring.add_memory(POOL_BUFFER, &memory)?;
        let pool = Pool::new(Box::new(memory));
        let reads = Rc::new(Cell::new(0_u64));
        let stop = Rc::new(Cell::new(false));
        for path in &self.paths {
            let file = File::options().read(true).open(path)?;
            let disk = Rc::new(MemberFile::new(&ring, file.into())?);
            let blocks = disk.capacity() / u64::from(self.block);
            if blocks == 0 {
                return Err(format!("{} is too small", path.display()).into());
            }
            for i in 0..self.depth {
                let (disk, pool, reads, stop) = (
                    Rc::clone(&disk),
                    Rc::clone(&pool),
                    Rc::clone(&reads),
                    Rc::clone(&stop),
                );
                let block = self.block;
                executor.spawn(async move {
                    let lease = pool.lease(Quota::Data, block as usize).await;
                    let mut random = u64::from(i) + 1;
                    while !stop.get() {
                        // xorshift64
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let at = random % blocks * u64::from(block);
                        let pieces = [Piece {
                            offset: 0,
                            len: block,
                        }];
                        let read = disk.submit(
                            DiskVerb::Read,
                            at,
                            u64::from(block),
                            Buf::Pool(&lease),
                            &pieces,
                        );
                        if let Err(error) = read.await {
                            eprintln!("read at {at}: {error}");
                            return;
                        }
                        reads.set(reads.get() + 1);
                    }
                });
            }
        }
        let start = Instant::now();
        let turns = ring.turns();
        while start.elapsed() < Duration::from_secs(self.seconds) && executor.len() > 0 {
            ring.turn(&executor);
        }
        let seconds = start.elapsed().as_secs_f64();
        stop.set(true);
        let turns = ring.turns() - turns;
        while executor.len() > 0 {
            ring.turn(&executor);
        }
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let (rate, batch) = (
            reads.get() as f64 / seconds,
            reads.get() as f64 / turns.max(1) as f64,
        );
        println!(
            "{rate:.0} reads/s of {} bytes, {batch:.1} a turn",
            self.block
        );
        Ok(())
    }
}
