//! Proves that the disks of the lab do what the cuts rely on: what was flushed stays, what was not may go.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lunar_disks::{Fate, Server, Verb, Verdict};

use super::host::{Machine, folder};
use crate::e2e::shell::{Failure, pause};

const BYTES: u64 = 16 << 20;
const BLOCK: u64 = 4096;

/// Runs them all, a line for each. Returns the exit code.
pub(super) fn main() -> i32 {
    type Check = fn(&Path) -> Result<(), Failure>;
    let checks: [(&str, Check); 5] = [
        ("disks_flushed_and_fua_writes_survive_a_cut", flushed),
        (
            "disks_unflushed_writes_are_lost_or_kept_as_drawn",
            unflushed,
        ),
        ("disks_freeze_where_they_are_told_to", frozen),
        ("disks_taken_away_are_not_there", taken_away),
        ("disks_planted_bug_loses_what_was_flushed", planted),
    ];
    let mut code = 0;
    for (name, check) in checks {
        let done = folder("disks").and_then(|dir| {
            let done = check(&dir);
            let _ = fs::remove_dir_all(&dir);
            done
        });
        match done {
            Ok(()) => println!("test {name} ... ok"),
            Err(why) => {
                println!("{why}\ntest {name} ... FAILED");
                code = 1;
            }
        }
    }
    code
}

fn serve(dir: &Path, disks: usize) -> Result<Server, Failure> {
    Server::start(&dir.join("disks"), &vec![BYTES; disks]).map_err(|error| error.to_string())
}

fn done_file(dir: &Path) -> PathBuf {
    dir.join("share/done")
}

/// Writes blocks of the letter A at these blocks of /dev/ubda, by `dd` with these flags; then says so, and hangs.
fn write(dir: &Path, writes: &[(u64, &str)]) -> Result<Machine, Failure> {
    let done = done_file(dir);
    let _ = fs::remove_file(&done);
    let mut script = "tr '\\0' A < /dev/zero | head -c 4096 > /tmp/a".to_owned();
    for (block, flags) in writes {
        script += &format!("; dd if=/tmp/a of=/dev/ubda bs=4096 seek={block} status=none {flags}");
    }
    script += &format!(
        "; echo \"$LAB_DISKS\" > {}; sync; sleep 100",
        done.display()
    );
    Machine::boot(dir, &["sh", "-c", &script])
}

fn wait_done(dir: &Path, machine: &mut Machine) -> Result<String, Failure> {
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        let text = fs::read_to_string(done_file(dir)).unwrap_or_default();
        if text.ends_with('\n') {
            return Ok(text);
        }
        if !machine.is_up()? || Instant::now() > limit {
            let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
            return Err(format!("the writes did not come to an end: {log}"));
        }
        pause(20);
    }
}

/// Boots, writes, and cuts the power.
fn write_and_cut(
    dir: &Path,
    server: &Server,
    writes: &[(u64, &str)],
    fate: Fate,
) -> Result<String, Failure> {
    let mut machine = write(dir, writes)?;
    let said = wait_done(dir, &mut machine)?;
    machine.cut()?;
    server
        .cut(1, Some(fate))
        .map_err(|error| error.to_string())?;
    Ok(said)
}

/// The blocks of a disk that have the letter, of the first 64.
fn written(server: &Server, disk: usize) -> Result<Vec<u64>, Failure> {
    let mut blocks = Vec::new();
    for block in 0..64 {
        let mut bytes = [0; 4096];
        let read = server.peek(disk, block * BLOCK, &mut bytes);
        read.map_err(|error| error.to_string())?;
        if bytes == [b'A'; 4096] {
            blocks.push(block);
        } else if bytes != [0; 4096] {
            return Err(format!("block {block} is neither written nor empty"));
        }
    }
    Ok(blocks)
}

fn expect(what: &str, found: &[u64], wanted: &[u64]) -> Result<(), Failure> {
    if found == wanted {
        return Ok(());
    }
    Err(format!(
        "{what}: blocks {found:?} are there, not {wanted:?}"
    ))
}

const DIRECT: &str = "oflag=direct";
const FLUSH: &str = "oflag=direct conv=fsync";
const FUA: &str = "oflag=direct,dsync";

/// Given writes, a FLUSH, one with FUA and more writes, when the power goes and nothing else is kept, then what the
/// FLUSH and the FUA cover is there.
fn flushed(dir: &Path) -> Result<(), Failure> {
    let server = serve(dir, 1)?;
    let writes = [(1, DIRECT), (2, FLUSH), (3, FUA), (4, DIRECT)];
    write_and_cut(dir, &server, &writes, Fate::DropsAll)?;
    expect("flushed", &written(&server, 0)?, &[1, 2, 3])
}

/// Given writes without a FLUSH, then they are lost, or kept, as is drawn.
fn unflushed(dir: &Path) -> Result<(), Failure> {
    let server = serve(dir, 1)?;
    write_and_cut(dir, &server, &[(1, DIRECT), (2, DIRECT)], Fate::DropsAll)?;
    expect("dropped", &written(&server, 0)?, &[])?;
    write_and_cut(dir, &server, &[(1, DIRECT), (2, DIRECT)], Fate::KeepsAll)?;
    expect("kept", &written(&server, 0)?, &[1, 2])
}

/// Given a trap on the second of three writes, then the third is never done.
fn frozen(dir: &Path) -> Result<(), Failure> {
    let server = serve(dir, 1)?;
    server.set_trap(Some(Box::new(|event| match event.verb {
        Verb::Write { at, .. } if at == 2 * BLOCK => Verdict::FreezeAfter,
        _ => Verdict::Go,
    })));
    let mut machine = write(dir, &[(1, DIRECT), (2, DIRECT), (3, DIRECT)])?;
    if !server.wait_frozen(Duration::from_secs(60)) {
        return Err("the trap did not close".to_owned());
    }
    pause(300);
    let done = done_file(dir).exists();
    machine.cut()?;
    let cut = server.cut(1, Some(Fate::KeepsAll));
    cut.map_err(|error| error.to_string())?;
    if done {
        return Err("it went on".to_owned());
    }
    expect("frozen", &written(&server, 0)?, &[1, 2])
}

/// Given a disk that was taken away, then the others are where they were, without it.
fn taken_away(dir: &Path) -> Result<(), Failure> {
    let server = serve(dir, 3)?;
    server.lose(1).map_err(|error| error.to_string())?;
    let said = write_and_cut(dir, &server, &[(1, FLUSH)], Fate::DropsAll)?;
    if said.trim() == "/dev/ubda /dev/ubdc" {
        Ok(())
    } else {
        Err(format!("disks are {said}"))
    }
}

/// Given a disk that FLUSH is planted not to reach, then what was flushed is lost.
fn planted(dir: &Path) -> Result<(), Failure> {
    let server = serve(dir, 1)?;
    server.plant(Some(Box::new(|_, at| at == BLOCK)));
    write_and_cut(dir, &server, &[(1, FLUSH), (2, FUA)], Fate::DropsAll)?;
    expect("planted", &written(&server, 0)?, &[2])
}
