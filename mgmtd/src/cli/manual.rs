//! The manual pages and completions: made from the command tree, never by hand.

use std::io::Write;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_complete::env::Shells;
use lunar_api::{ApiError, ErrorKind};

use crate::args::{Args, Shell};

/// The command tree with every name filled in.
pub(crate) fn tree() -> Command {
    let mut tree = Args::command().disable_help_subcommand(true);
    tree.build();
    tree
}

/// Name and text of the page of every command in the tree.
pub(crate) fn pages() -> std::io::Result<Vec<(String, Vec<u8>)>> {
    fn add(command: &Command, out: &mut Vec<(String, Vec<u8>)>) -> std::io::Result<()> {
        let name = command.get_display_name().unwrap_or(command.get_name());
        let above = name
            .rsplit_once('-')
            .map(|(above, _)| format!("{above}(1)"));
        let daemons = ["mgmtd(8)".to_string(), "ublk-target(8)".to_string()];
        let see: Vec<String> = match above {
            Some(above) => vec![above],
            None => daemons.into(),
        };
        let text = mgmtd::manual::page(command, "1", &see)?;
        out.push((format!("{name}.1"), text));
        command
            .get_subcommands()
            .try_for_each(|verb| add(verb, out))
    }
    let mut out = Vec::new();
    add(&tree(), &mut out)?;
    Ok(out)
}

/// Writes the pages into a folder.
pub(crate) fn write_pages(dir: &Path) -> Result<(), ApiError> {
    let written = std::fs::create_dir_all(dir).and_then(|()| {
        let pages = pages()?;
        let mut written = pages.iter();
        written.try_for_each(|(name, text)| std::fs::write(dir.join(name), text))
    });
    written.map_err(|e| {
        ApiError::new(ErrorKind::Failed, "the manual pages are not written")
            .because(format!("{}: {e}", dir.display()))
            .hint("lunar man --out DIR, where you may write")
    })
}

/// Prints what a shell needs; it then asks this program for every completion.
pub(crate) fn completions(shell: Shell) -> Result<(), ApiError> {
    let name = match shell {
        Shell::Bash => "bash",
        Shell::Zsh => "zsh",
        Shell::Fish => "fish",
    };
    let mut out = Vec::new();
    let shells = Shells::builtins();
    let completer = shells.completer(name).expect("one of the built-in shells");
    completer
        .write_registration("COMPLETE", "lunar", "lunar", "lunar", &mut out)
        .and_then(|()| std::io::stdout().write_all(&out))
        .map_err(|e| {
            ApiError::new(ErrorKind::Failed, "the completions are not written")
                .because(e.to_string())
        })
}
