//! `import` and `config`: files are read and written here, where the person is.

use std::io::Write;
use std::path::{Path, PathBuf};

use lunar_api::mgmt::{self, Nothing, Request};
use lunar_api::rows::ConfigText;
use lunar_api::{ApiError, ErrorKind};
use serde_json::Value;

use crate::args::{Args, Config, Noun};
use crate::client::Client;
use crate::run::{absolute_path, change, flags, print};

/// Longest file: what mgmtd takes in one message, less its frame.
const FILE_MAX: u64 = 900 << 10;

pub(crate) fn run(args: &Args, client: &mut Client) -> Result<u8, ApiError> {
    match &args.noun {
        Noun::Import {
            paths,
            deleted,
            take,
        } => import(args, client, paths, *deleted, *take),
        Noun::Config {
            verb: Config::Save { file },
        } => save(args, client, file.as_deref()),
        Noun::Config {
            verb: Config::Load { file, create },
        } => load(args, client, file, *create),
        _ => Ok(2),
    }
}

fn import(
    args: &Args,
    client: &mut Client,
    paths: &[PathBuf],
    deleted: bool,
    take: bool,
) -> Result<u8, ApiError> {
    let paths: Vec<String> = paths.iter().map(|path| absolute_path(path)).collect();
    let (dry_run, yes) = flags(args);
    let ask = |yes| {
        Request::Import(mgmt::Import {
            paths: paths.clone(),
            deleted,
            take,
            dry_run,
            yes,
        })
    };
    change(args, client, "import", ask, yes)
}

fn save(args: &Args, client: &mut Client, file: Option<&Path>) -> Result<u8, ApiError> {
    let ConfigText { text } = client.call(&Request::ConfigSave(Nothing {}))?;
    let Some(path) = file else {
        let data: Value = serde_json::from_str(&text).unwrap_or_default();
        print(args, "config.save", data, || text.clone());
        return Ok(0);
    };
    if args.dry_run {
        println!("would write {} bytes to {}", text.len(), path.display());
        return Ok(0);
    }
    write(path, &text).map_err(|error| {
        ApiError::new(
            ErrorKind::Failed,
            format!("{} is not written", path.display()),
        )
        .because(error.to_string())
        .hint("lunar config save FILE, in a directory that you may write")
    })?;
    let said = format!("saved to {}\n", path.display());
    print(args, "config.save", path.display().to_string(), || said);
    Ok(0)
}

/// # Crash  a new file beside, durable, then renamed: the old one or the new one is there
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = std::fs::File::create(&new)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| file.sync_all());
    written.inspect_err(|_| drop(std::fs::remove_file(&new)))?;
    std::fs::rename(&new, path)?;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    std::fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

fn load(args: &Args, client: &mut Client, path: &Path, create: bool) -> Result<u8, ApiError> {
    let refuse = |why: String| {
        ApiError::new(
            ErrorKind::Usage,
            format!("{} cannot be loaded", path.display()),
        )
        .because(why)
        .hint("lunar config save FILE, which makes one")
    };
    let size = std::fs::metadata(path).map_err(|e| refuse(e.to_string()))?;
    if !size.is_file() || size.len() > FILE_MAX {
        return Err(refuse(format!("not a file of at most {FILE_MAX} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|e| refuse(e.to_string()))?;
    let (dry_run, yes) = flags(args);
    let ask = |yes| {
        Request::ConfigLoad(mgmt::ConfigLoad {
            text: text.clone(),
            create,
            dry_run,
            yes,
        })
    };
    change(args, client, "config.load", ask, yes)
}
