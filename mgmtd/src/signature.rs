//! Foreign data on a disk: what `blkid -p` and `wipefs -n` see. The parsers are pure.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;

use lunar_api::{ApiError, ErrorKind};
use serde::Deserialize;
use tokio::process::Command;

use crate::limits::COMMAND_LIMIT;

/// The name of our own superblock as a signature.
pub const LUNAR: &str = "lunar_member";

/// Lists the signatures on a path, each once.
///
/// # Errors  a command is not there, fails, or does not end in its limit: then nothing is known, so refuse
pub async fn find(path: &Path) -> Result<BTreeSet<String>, ApiError> {
    let blkid = run("blkid", &["-p", "-o", "export"], path, &[0, 2, 8]).await?;
    let mut found = parse_blkid(&blkid.1, blkid.0);
    let wipefs = run("wipefs", &["-n", "-J"], path, &[0]).await?;
    found.extend(parse_wipefs(&wipefs.1).map_err(|e| {
        ApiError::new(ErrorKind::Failed, "the output of wipefs is not understood")
            .because(e.to_string())
    })?);
    // A GPT has a protective MBR in sector 0: one thing, not two.
    if found.contains("gpt") {
        found.remove("PMBR");
        found.remove("dos");
    }
    Ok(found)
}

/// Erases the signatures of one kind.
///
/// # Errors  wipefs failed
pub async fn erase(path: &Path, signature: &str) -> Result<(), ApiError> {
    let mut types = signature.to_string();
    if signature == "gpt" {
        types.push_str(",PMBR,dos");
    }
    run("wipefs", &["-a", "-t", &types], path, &[0])
        .await
        .map(drop)
}

async fn run(
    program: &str,
    args: &[&str],
    path: &Path,
    fine: &[i32],
) -> Result<(i32, String), ApiError> {
    let what = || {
        ApiError::new(
            ErrorKind::Failed,
            format!("cannot look at {}", path.display()),
        )
    };
    let mut command = Command::new(program);
    // sbin is not in everybody's PATH.
    let search = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin:/usr/bin:/bin";
    command.env("PATH", search).env("LC_ALL", "C");
    command.args(args).arg("--").arg(path);
    command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let output = tokio::time::timeout(COMMAND_LIMIT, command.output())
        .await
        .map_err(|_| {
            let limit = COMMAND_LIMIT.as_secs();
            what().because(format!(
                "{program} did not end in {limit} s: the disk does not answer"
            ))
        })?;
    let output = output.map_err(|e| {
        what()
            .because(format!("{program}: {e}"))
            .hint("apt install util-linux")
    })?;
    let code = output.status.code().unwrap_or(-1);
    if !fine.contains(&code) {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(what().because(format!("{program} ended with {code}: {said}")));
    }
    Ok((code, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Reads `blkid -p -o export`; its exit code 8 says that several things are there.
pub fn parse_blkid(text: &str, code: i32) -> BTreeSet<String> {
    let mut found: BTreeSet<String> = text
        .lines()
        .filter_map(|line| {
            line.strip_prefix("TYPE=")
                .or_else(|| line.strip_prefix("PTTYPE="))
        })
        .map(String::from)
        .collect();
    if code == 8 && found.is_empty() {
        found.insert("ambivalent".into());
    }
    found
}

/// Reads `wipefs -n -J`; no output at all means nothing found.
///
/// # Errors  not the JSON that wipefs writes
pub fn parse_wipefs(text: &str) -> Result<BTreeSet<String>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Found {
        #[serde(rename = "type")]
        kind: Option<String>,
    }
    #[derive(Deserialize)]
    struct Output {
        signatures: Vec<Found>,
    }
    if text.trim().is_empty() {
        return Ok(BTreeSet::new());
    }
    let output: Output = serde_json::from_str(text)?;
    Ok(output
        .signatures
        .into_iter()
        .map(|s| s.kind.unwrap_or("unknown".into()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_blkid_takes_types() {
        let found = parse_blkid("DEVNAME=/dev/a\nUUID=1\nTYPE=ext4\nPTTYPE=dos\n", 0);
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["dos", "ext4"]);
        assert!(parse_blkid("", 2).is_empty());
        assert!(parse_blkid("", 8).contains("ambivalent"));
    }

    #[test]
    fn parse_wipefs_takes_types() {
        let text = r#"{"signatures":[{"device":"a","offset":"0x438","type":"ext4","uuid":"1","label":null}]}"#;
        assert!(parse_wipefs(text).unwrap().contains("ext4"));
        assert!(parse_wipefs("").unwrap().is_empty());
        assert!(parse_wipefs("x").is_err());
    }
}
