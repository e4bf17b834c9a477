//! `lunar`: the command line. It asks mgmtd and prints; it decides nothing.

#![forbid(unsafe_code)]

mod args;
mod client;
mod complete;
mod import;
mod manual;
mod run;
mod show;
mod stat;
mod upgrade;
mod zeroing;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use lunar_api::ApiError;

fn main() -> ExitCode {
    // A reader that goes away (`| head`) ends us without a message, like any other tool.
    std::panic::set_hook(Box::new(|info| {
        if !info.to_string().contains("Broken pipe") {
            eprintln!("lunar: {info}");
        }
        std::process::exit(1);
    }));
    // Asked by a shell for completions: prints them and ends.
    clap_complete::CompleteEnv::with_factory(args::Args::command).complete();
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => return misused(&error),
    };
    match run::run(&args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error, args.json);
            ExitCode::from(error.kind.exit_code())
        }
    }
}

/// Says what was typed wrong, or what was asked for (help, version).
fn misused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr()
        || error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        error.exit();
    }
    let mut tree = &manual::tree();
    let mut words = vec!["lunar".to_string()];
    for word in std::env::args().skip(1) {
        if let Some(verb) = tree.find_subcommand(&word) {
            tree = verb;
            words.push(word);
        }
    }
    let said = error.render().to_string();
    let said = said
        .split("\nFor more information")
        .next()
        .unwrap_or_default();
    eprintln!("lunar: {}", said.trim_start_matches("error: ").trim_end());
    eprintln!("Try: {} --help", words.join(" "));
    ExitCode::from(2)
}

/// What, why, and what to type; with `--json` as an object.
fn complain(error: &ApiError, json: bool) {
    if json {
        let whole = serde_json::json!({"schema": "lunar.error/1", "data": error});
        eprintln!("{whole}");
        return;
    }
    eprintln!("lunar: {}", error.message);
    for cause in &error.causes {
        eprintln!("  because: {cause}");
    }
    eprintln!(
        "Try: {}",
        error
            .hint
            .as_deref()
            .unwrap_or("lunar status; lunar events")
    );
}
