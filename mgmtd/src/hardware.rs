//! What the machine says about a disk: model, serial, sizes, cache, links, its slot in an enclosure and the LED there.
//!
//! From /sys and udev's database; `root` is `/`, or a tree of a test.

use std::io;
use std::path::{Path, PathBuf};

use lunar_api::rows::Led;

use crate::probe::{Identity, identify, major_minor, names};

/// Facts about one disk; what is not known is empty.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hardware {
    pub model: String,
    pub serial: String,
    /// Other names of it that last, by-id first.
    pub links: Vec<String>,
    pub logical_block: Option<u32>,
    pub physical_block: Option<u32>,
    /// `write back` (volatile) or `write through`.
    pub write_cache: String,
    /// Its place in an enclosure.
    pub slot: Option<Slot>,
}

/// A place in an enclosure.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    pub name: String,
    /// Directory of the place in /sys.
    path: PathBuf,
}

/// Reads what is known about the disk that a path leads to; about a file that is nothing.
pub fn of(path: &Path) -> Hardware {
    match identify(path) {
        Ok(Identity::Block(dev)) => Hardware {
            links: links(path),
            ..of_number(Path::new("/"), &major_minor(dev))
        },
        _ => Hardware::default(),
    }
}

/// `MODEL (serial S)` of a device, as a label on the disk says it; empty if it does not tell. Never asks a file system.
pub fn label(path: &str) -> String {
    let found = match identify_device(path) {
        Some(dev) => of_number(Path::new("/"), &major_minor(dev)),
        None => Hardware::default(),
    };
    match (found.model.as_str(), found.serial.as_str()) {
        ("", "") => String::new(),
        (model, "") => model.into(),
        ("", serial) => format!("serial {serial}"),
        (model, serial) => format!("{model} (serial {serial})"),
    }
}

/// A file's file system may hang; /dev does not.
fn identify_device(path: &str) -> Option<u64> {
    match path.starts_with("/dev/").then(|| identify(Path::new(path))) {
        Some(Ok(Identity::Block(dev))) => Some(dev),
        _ => None,
    }
}

/// As [`of`], by device number.
fn of_number(root: &Path, number: &str) -> Hardware {
    let sys = root.join("sys/dev/block").join(number);
    let Ok(own) = std::fs::canonicalize(sys) else {
        return Hardware::default();
    };
    // Of a partition the disk that it is on is asked.
    let disk = match own.join("partition").exists() {
        true => own.parent().map_or(own.clone(), Path::to_path_buf),
        false => own.clone(),
    };
    let whole = read(&disk.join("dev"));
    let udev = std::fs::read_to_string(root.join(format!("run/udev/data/b{whole}")));
    let udev = udev.unwrap_or_default();
    let property = |key: &str| {
        let line = udev.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_default().trim().to_string()
    };
    let first = |list: [String; 3]| list.into_iter().find(|text| !text.is_empty());
    let number = |file: &str| read(&disk.join("queue").join(file)).parse().ok();
    Hardware {
        model: first([
            read(&disk.join("device/model")),
            property("E:ID_MODEL="),
            String::new(),
        ])
        .unwrap_or_default(),
        serial: first([
            property("E:ID_SERIAL_SHORT="),
            read(&disk.join("device/serial")),
            read(&disk.join("serial")),
        ])
        .unwrap_or_default(),
        links: Vec::new(),
        logical_block: number("logical_block_size"),
        physical_block: number("physical_block_size"),
        write_cache: read(&disk.join("queue/write_cache")),
        slot: slot(&disk),
    }
}

fn read(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.trim().to_string()
}

/// The kernel's enclosure class puts a link `enclosure_device:NAME` beside the disk.
fn slot(disk: &Path) -> Option<Slot> {
    let device = disk.join("device");
    let entries = names(&device.display().to_string());
    entries.iter().find_map(|entry| {
        let name = entry.strip_prefix("enclosure_device:")?.to_string();
        let path = std::fs::canonicalize(device.join(entry)).ok()?;
        Some(Slot { name, path })
    })
}

/// Names in /dev/disk/by-* that lead to the disk.
fn links(path: &Path) -> Vec<String> {
    let Ok(real) = std::fs::canonicalize(path) else {
        return Vec::new();
    };
    let mut out = vec![real.display().to_string()];
    for kind in ["by-id", "by-path", "by-partlabel", "by-partuuid"] {
        let dir = format!("/dev/disk/{kind}");
        for name in names(&dir) {
            let link = format!("{dir}/{name}");
            if std::fs::canonicalize(&link).is_ok_and(|to| to == real) {
                out.push(link);
            }
        }
    }
    out
}

impl Slot {
    /// What the LED that helps to find the disk does.
    pub fn led(&self) -> Led {
        match read(&self.path.join("locate")).as_str() {
            "1" => Led::On,
            "0" => Led::Off,
            _ => Led::None,
        }
    }

    /// Lights the LED, or puts it out.
    ///
    /// # Errors  the enclosure does not take it
    pub fn light(&self, on: bool) -> io::Result<()> {
        std::fs::write(self.path.join("locate"), if on { "1" } else { "0" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A /sys with a SCSI disk in slot 7 of an enclosure, and its first partition.
    fn tree() -> PathBuf {
        let root = std::env::temp_dir().join(format!("lunar-sys-{}", std::process::id()));
        let disk = root.join("sys/devices/host0/block/sda");
        for (file, text) in [
            ("dev", "8:0\n"),
            ("queue/logical_block_size", "512\n"),
            ("queue/physical_block_size", "4096\n"),
            ("queue/write_cache", "write back\n"),
            ("device/model", "ST4000VN008     \n"),
            ("sda1/dev", "8:1\n"),
            ("sda1/partition", "1\n"),
            ("../../../enclosure/slot7/locate", "0\n"),
        ] {
            let path = disk.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let link = |to: &str, at: PathBuf| {
            std::fs::create_dir_all(at.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(to, at).unwrap();
        };
        link(
            "../../../../enclosure/slot7",
            disk.join("device/enclosure_device:Slot 07"),
        );
        link(
            "../../devices/host0/block/sda",
            root.join("sys/dev/block/8:0"),
        );
        link(
            "../../devices/host0/block/sda/sda1",
            root.join("sys/dev/block/8:1"),
        );
        std::fs::create_dir_all(root.join("run/udev/data")).unwrap();
        let udev = "S:disk/by-id/x\nE:ID_SERIAL_SHORT=Z1F0A\nE:ID_MODEL=other\n";
        std::fs::write(root.join("run/udev/data/b8:0"), udev).unwrap();
        root
    }

    /// Given a disk or a partition of it, then its model, serial, sizes and slot are told, and the LED obeys.
    #[test]
    fn of_number_reads_the_disk_of_a_partition() {
        let root = tree();
        for number in ["8:0", "8:1"] {
            let found = of_number(&root, number);
            assert_eq!(found.model, "ST4000VN008", "{number}");
            assert_eq!(found.serial, "Z1F0A");
            assert_eq!(found.write_cache, "write back");
            assert_eq!(
                (found.logical_block, found.physical_block),
                (Some(512), Some(4096))
            );
            let slot = found.slot.unwrap();
            assert_eq!((slot.name.as_str(), slot.led()), ("Slot 07", Led::Off));
            slot.light(true).unwrap();
            assert_eq!(slot.led(), Led::On);
            slot.light(false).unwrap();
        }
        assert_eq!(of_number(&root, "9:9"), Hardware::default());
        std::fs::remove_dir_all(&root).unwrap();
    }
}
