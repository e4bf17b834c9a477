//! Bad input: a clear answer, the right exit code, and nothing lost.

use super::rig::Rig;
use super::shell::{Failure, sh, sh_in};
use super::{Test, add, ensure};

pub(super) fn tests(to: &mut Vec<Test>) {
    add(
        to,
        "hostile_commands_answer_with_code_cause_and_try",
        commands,
    );
    add(to, "hostile_socket_bytes_and_idle_connections", socket);
}

/// Given a running group, when senseless or dangerous commands are given, then each has its exit code, a cause, a
/// `Try:` line, and `status --json` is as before.
fn commands() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &["--level", "raid5", "--assume-clean"])?;
    sh("truncate -s 0 /tmp/empty; truncate -s 1M /tmp/small; mkdir -p /tmp/dir
        truncate -s 100M /tmp/foreign; mkfs.ext4 -q -F /tmp/foreign
        mkfs.ext4 -q -F /dev/ram7; mkdir -p /mnt/held; mount /dev/ram7 /mnt/held; ln -sf /dev/ram0 /tmp/alias")?;
    let before = rig.json(&["status"])?;
    let table: &[(&[&str], i32, &str)] = &[
        (&["frobnicate"], 2, ""),
        (&["disk", "add", "/dev/nonexistent"], 2, "/dev/nonexistent"),
        (&["disk", "add", "/tmp/empty"], 2, "empty"),
        (&["disk", "add", "/tmp/small"], 2, "64"),
        (&["disk", "add", "/tmp/dir"], 2, "dir"),
        (&["disk", "add", "/tmp/foreign"], 6, "ext4"),
        (&["disk", "add", "/tmp/foreign", "--force=xfs"], 6, "ext4"),
        (&["disk", "add", "/dev/ram7"], 7, "/mnt/held"),
        (&["disk", "add", "/dev/ram8", "/dev/ram8"], 2, "twice"),
        (
            &[
                "group", "create", "two", "--level", "raid5", "--disks", "1,2,3",
            ],
            7,
            "data",
        ),
        (
            &[
                "group", "create", "two", "--level", "raid9", "--disks", "1,2,3",
            ],
            2,
            "raid9",
        ),
        (
            &[
                "group", "create", "data", "--level", "raid0", "--disks", "9",
            ],
            2,
            "",
        ),
        (
            &["lu", "create", "vol", "--group", "data", "--size", "1MiB"],
            2,
            "vol",
        ),
        (
            &[
                "lu", "create", "huge", "--group", "data", "--size", "100TiB",
            ],
            2,
            "",
        ),
        (
            &[
                "lu", "create", "bad/name", "--group", "data", "--size", "1MiB",
            ],
            2,
            "bad/name",
        ),
        (&["lu", "delete", "nosuch", "--yes"], 2, "nosuch"),
        (&["group", "delete", "data"], 6, ""),
        (&["disk", "replace", "1", "2"], 7, "data"),
    ];
    for (args, code, contains) in table {
        let output = rig.run(args)?;
        let line = format!(
            "lunar {}: exit {}: {}",
            args.join(" "),
            output.code,
            output.stderr
        );
        ensure(output.code == *code, || format!("expected {code}: {line}"))?;
        ensure(output.stderr.contains(contains), || {
            format!("expected `{contains}`: {line}")
        })?;
        ensure(
            output.code == 2 && output.stderr.contains("--help") || output.stderr.contains("Try:"),
            || format!("no `Try:`: {line}"),
        )?;
        let now = rig.json(&["status"])?;
        ensure(now == before, || format!("status changed after: {line}"))?;
    }
    sh("umount /mnt/held")?;
    Ok(())
}

/// Given hostile bytes and 900 idle connections on the socket, when root asks, then it is answered.
fn socket() -> Result<(), Failure> {
    let rig = Rig::new()?;
    rig.array("ram", 3, 256, &["--level", "raid5", "--assume-clean"])?;
    let path = "/run/lunar/mgmtd.sock";
    let connect =
        || std::os::unix::net::UnixStream::connect(path).map_err(|error| error.to_string());
    for bytes in [
        &b"\0\0\0"[..],
        b"{}\0",
        b"{\"method\":1}\0",
        b"\xff\xfe\0",
        b"GET / HTTP/1.1\r\n\r\n\0",
    ] {
        use std::io::Write;
        let _ = connect()?.write_all(bytes);
        rig.lunar(&["status"])?;
    }
    {
        use std::io::Write;
        let mut endless = connect()?;
        let junk = vec![b'x'; 1 << 16];
        for _ in 0..64 {
            if endless.write_all(&junk).is_err() {
                break;
            }
        }
    }
    let mut idle = Vec::new();
    for _ in 0..900 {
        match connect() {
            Ok(stream) => idle.push(stream),
            Err(_) => break,
        }
    }
    rig.lunar(&["status"])?;
    sh_in(
        &format!(
            "dd if=/dev/urandom of={} bs=1M count=8 oflag=direct 2>/dev/null",
            rig.device()?
        ),
        30,
    )?;
    Ok(())
}
