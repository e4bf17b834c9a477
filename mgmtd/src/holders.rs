//! Who holds a block device: mounts, swap, devices stacked on it, processes. The parsers are pure.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::probe::{major_minor, names};

/// What is mounted and swapped on now: read once, asked about many devices.
#[derive(Debug)]
pub struct Look {
    mountinfos: Vec<String>,
    swaps: String,
}

impl Look {
    /// Reads it.
    pub fn now() -> Self {
        Self {
            mountinfos: mountinfos(),
            swaps: std::fs::read_to_string("/proc/swaps").unwrap_or_default(),
        }
    }

    /// Lists who holds the device with this number, a line each; empty: nobody that can be seen.
    pub fn of_block(&self, dev: u64, node: &str) -> Vec<String> {
        let mut out = BTreeSet::new();
        self.collect(dev, node, &mut out);
        let sys = format!("/sys/dev/block/{}", major_minor(dev));
        let own = std::fs::canonicalize(&sys).ok();
        let own = own
            .as_deref()
            .and_then(|p| p.file_name())
            .map(|n| n.to_string_lossy().into_owned());
        for part in own.iter().flat_map(|own| {
            names(&sys)
                .into_iter()
                .filter(move |part| part.starts_with(own.as_str()))
        }) {
            let part_node = format!("/dev/{part}");
            if let Ok(meta) = std::fs::metadata(&part_node) {
                self.collect(meta.rdev(), &part_node, &mut out);
            }
        }
        out.into_iter().collect()
    }

    /// Holders of a LU's device.
    pub fn of_ublk(&self, ublk: u32) -> Vec<String> {
        let node = format!("/dev/ublkb{ublk}");
        let Ok(meta) = std::fs::metadata(&node) else {
            return Vec::new();
        };
        self.of_block(meta.rdev(), &node)
    }

    fn collect(&self, dev: u64, node: &str, out: &mut BTreeSet<String>) {
        let number = major_minor(dev);
        for text in &self.mountinfos {
            out.extend(
                mounts_of(text, &number, node)
                    .into_iter()
                    .map(|at| format!("mounted at {at}")),
            );
        }
        for holder in names(&format!("/sys/dev/block/{number}/holders")) {
            out.insert(format!("{node} is used by /dev/{holder}"));
        }
        for path in swaps_of(&self.swaps) {
            if std::fs::metadata(&path).is_ok_and(|meta| meta.rdev() == dev) {
                out.insert(format!("{node} is swap space"));
            }
        }
    }
}

/// Every mount table of this machine once: our own and those of other mount namespaces.
fn mountinfos() -> Vec<String> {
    let mut seen = BTreeSet::new();
    let mut out = Vec::new();
    let pids = names("/proc")
        .into_iter()
        .filter(|name| name.parse::<u32>().is_ok());
    for pid in std::iter::once("self".to_string()).chain(pids) {
        let Ok(space) = std::fs::read_link(format!("/proc/{pid}/ns/mnt")) else {
            continue;
        };
        if seen.insert(space) {
            out.extend(std::fs::read_to_string(format!("/proc/{pid}/mountinfo")));
        }
    }
    out
}

/// Mount points of one device in a mountinfo text, by number or (btrfs) by source.
pub fn mounts_of(mountinfo: &str, number: &str, node: &str) -> Vec<String> {
    let mut out = Vec::new();
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let Some(dash) = fields.iter().position(|f| *f == "-") else {
            continue;
        };
        let source = fields.get(dash + 2).copied().unwrap_or_default();
        let same = source == node
            || (source.starts_with("/dev/lunar/")
                && std::fs::canonicalize(source).is_ok_and(|to| to == Path::new(node)));
        if (fields.get(2) == Some(&number) || same) && fields.len() > 4 {
            out.push(unescape(fields[4]));
        }
    }
    out
}

/// Devices and files in a /proc/swaps text.
pub fn swaps_of(swaps: &str) -> Vec<String> {
    swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(unescape)
        .collect()
}

/// Undoes the octal escapes of mountinfo: `\040` is a space.
fn unescape(text: &str) -> String {
    let mut out = Vec::new();
    let bytes = text.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = text
            .get(at + 1..at + 4)
            .and_then(|code| u8::from_str_radix(code, 8).ok());
        match code {
            Some(byte) if bytes[at] == b'\\' => {
                out.push(byte);
                at += 4;
            }
            _ => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Processes that have a device open, for the message after somebody answered "busy".
pub fn openers(node: &str) -> Vec<String> {
    let mut out = Vec::new();
    for pid in names("/proc")
        .into_iter()
        .filter(|name| name.parse::<u32>().is_ok())
    {
        let fds = names(&format!("/proc/{pid}/fd"));
        let holds = |fd: &String| {
            std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).is_ok_and(|to| to == Path::new(node))
        };
        if fds.iter().any(holds) {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            out.push(format!("{node} is open in process {pid} ({})", name.trim()));
        }
    }
    out
}

/// Whether a directory lies on a ublk device (or on something stacked on one).
pub fn lies_on_ublk(directory: &Path) -> Option<String> {
    let meta = std::fs::metadata(directory).ok()?;
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    if let Some(found) = ublk_below(&major_minor(meta.dev()), 8) {
        return Some(found);
    }
    // btrfs shows an anonymous number: find the mount by its path instead.
    let real = std::fs::canonicalize(directory).ok()?;
    let mut best: Option<(usize, String)> = None;
    for line in mountinfo.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let dash = fields.iter().position(|f| *f == "-")?;
        let at = unescape(fields.get(4)?);
        if real.starts_with(&at) && best.as_ref().is_none_or(|(len, _)| at.len() >= *len) {
            best = Some((
                at.len(),
                fields
                    .get(dash + 2)
                    .copied()
                    .unwrap_or_default()
                    .to_string(),
            ));
        }
    }
    let source = std::fs::metadata(best?.1).ok().filter(|m| m.rdev() != 0)?;
    ublk_below(&major_minor(source.rdev()), 8)
}

fn ublk_below(number: &str, depth: u32) -> Option<String> {
    let sys = std::fs::canonicalize(format!("/sys/dev/block/{number}")).ok()?;
    if let Some(part) = sys
        .iter()
        .find(|part| part.to_string_lossy().starts_with("ublkb"))
    {
        return Some(format!("/dev/{}", part.to_string_lossy()));
    }
    if depth == 0 {
        return None;
    }
    names(&sys.join("slaves").to_string_lossy())
        .iter()
        .find_map(|slave| {
            let dev = std::fs::read_to_string(format!("/sys/class/block/{slave}/dev")).ok()?;
            ublk_below(dev.trim(), depth - 1)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_finds_by_number_and_by_source() {
        let text = "36 35 259:1 / /mnt/a\\040b rw - ext4 /dev/ublkb0 rw\n\
                    37 35 0:44 / /srv rw shared:1 - btrfs /dev/ublkb1 rw\n\
                    38 35 0:5 / /proc rw - proc proc rw\n";
        assert_eq!(mounts_of(text, "259:1", "/dev/x"), ["/mnt/a b"]);
        assert_eq!(mounts_of(text, "259:9", "/dev/ublkb1"), ["/srv"]);
        assert!(mounts_of(text, "1:1", "/dev/y").is_empty());
    }

    #[test]
    fn swaps_of_skips_the_head() {
        let text = "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n";
        assert_eq!(swaps_of(text), ["/dev/sda2"]);
    }
}
