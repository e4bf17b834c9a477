//! `lunar`: the command line. It asks mgmtd and prints; it decides nothing.

#![forbid(unsafe_code)]

mod args;
mod client;
mod import;
mod run;
mod show;

use std::process::ExitCode;

use clap::Parser;
use lunar_api::ApiError;

fn main() -> ExitCode {
    // A reader that goes away (`| head`) ends us without a message, like any other tool.
    std::panic::set_hook(Box::new(|info| {
        if !info.to_string().contains("Broken pipe") {
            eprintln!("lunar: {info}");
        }
        std::process::exit(1);
    }));
    let args = args::Args::parse();
    match run::run(&args) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&error);
            ExitCode::from(error.kind.exit_code())
        }
    }
}

/// What, why, and what to type.
fn complain(error: &ApiError) {
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
