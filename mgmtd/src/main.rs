//! `mgmtd`: runs in the foreground, supervises ublk-target, serves `lunar`.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use lunar_api::SystemUuid;
use lunar_api::build::{Build, COMMIT};
use lunar_api::target::TARGET_API;
use mgmtd::daemon::{Config, Daemon};
use mgmtd::limits::HOOK_LIMIT;
use mgmtd::store;
use mgmtd::{
    holders, hooks, log, memory, notify, probe, returns, server, spares, supervisor, upgrade,
};
use tokio::signal::unix::{SignalKind, signal};

/// The management daemon of Lunar. Its end leaves the data path running; `lunar shutdown` stops all.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  mgmtd\n  mgmtd --state-dir /var/lib/lunar2 --system 2\n  mgmtd --hooks-dir /usr/local/lib/lunar-hooks --hook-limit 10\n  RUST_LOG=debug mgmtd"
)]
struct Args {
    /// Where the tables are kept; never on a LU of this Lunar
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where `lunar` finds it
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Number of this system, when a machine runs several
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..10000))]
    system: Option<u32>,
    /// The ublk-target to start; else the one beside this program
    #[arg(long, value_name = "PATH")]
    ublk_target: Option<PathBuf>,
    /// Folder of programs that are run with every event: PROGRAM EVENT GROUP [COMPONENT]
    #[arg(long, value_name = "DIR", default_value = "/etc/lunar/hooks.d")]
    hooks_dir: PathBuf,
    /// Seconds after which such a program is killed
    #[arg(long, value_name = "SECONDS", default_value_t = HOOK_LIMIT.as_secs(), value_parser = clap::value_parser!(u64).range(1..=3600))]
    hook_limit: u64,
    /// Print the manual page
    #[arg(long, hide = true, exclusive = true)]
    man: bool,
    /// Print what this build is, as JSON; do nothing
    #[arg(long)]
    build_info: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.man {
        return print_man();
    }
    if args.build_info {
        return print_build();
    }
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(log::Lines)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
    // Those that were started before it would not be protected.
    let unprotected = memory::protect();
    if let Err(error) = log::start() {
        eprintln!("mgmtd: no thread for the log: {error}");
    }
    for what in unprotected {
        tracing::warn!("if memory runs short while a LU is swapped to, mgmtd may hang: {what}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = runtime.map_err(|e| e.to_string()).and_then(|runtime| {
        let local = tokio::task::LocalSet::new();
        let result = local.block_on(&runtime, run(args));
        // A blocking open on a sick disk must not hold the exit up.
        runtime.shutdown_background();
        result
    });
    log::drain();
    match result {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(next)) => {
            let error = upgrade::become_it(&next);
            eprintln!("mgmtd: {}: {error}", next.display());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("mgmtd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn print_build() -> ExitCode {
    let build = Build {
        program: "mgmtd".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        commit: COMMIT.into(),
        protocol: TARGET_API,
        format_min: store::FORMAT,
        format_max: store::FORMAT,
    };
    let text = serde_json::to_string(&build).expect("it has numbers and texts only");
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn print_man() -> ExitCode {
    let mut command = Args::command();
    command.build();
    let see = ["lunar(1)".into(), "ublk-target(8)".into()];
    let page = mgmtd::manual::page(&command, "8", &see);
    match page.and_then(|page| std::io::stdout().write_all(&page)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn config(args: Args) -> Result<Config, String> {
    let system = args.system;
    let under =
        |base: &str| system.map_or(base.into(), |n| PathBuf::from(base).join(n.to_string()));
    let run_dir: PathBuf = under("/run/lunar");
    let beside = upgrade::own_path()
        .map_err(|e| e.to_string())?
        .with_file_name("ublk-target");
    Ok(Config {
        state_dir: args.state_dir.unwrap_or_else(|| under("/var/lib/lunar")),
        socket: args.socket.unwrap_or_else(|| run_dir.join("mgmtd.sock")),
        run_dir,
        system,
        target_bin: args.ublk_target.unwrap_or(beside),
        hooks_dir: args.hooks_dir,
        hook_limit: Duration::from_secs(args.hook_limit),
    })
}

/// Runs until its end; answers the mgmtd that it is to become, if that is why.
async fn run(args: Args) -> Result<Option<PathBuf>, String> {
    let config = config(args)?;
    let say = |what: &str, e: &dyn std::error::Error| {
        let source = e.source().map(|s| format!(": {s}")).unwrap_or_default();
        format!("{what}: {e}{source}")
    };
    std::fs::create_dir_all(&config.run_dir).map_err(|e| say("run directory", &e))?;
    if let Err(error) = memory::keep_in_memory(&config.run_dir) {
        let dir = config.run_dir.display();
        tracing::info!("{dir} may be swapped, which must not be to a LU: {error}");
    }
    std::fs::create_dir_all(&config.state_dir).map_err(|e| {
        let dir = config.state_dir.display();
        format!("state directory {dir}: {e}\nTry: mgmtd --state-dir DIR, as root, on a writable file system")
    })?;
    if let Some(lu) = holders::lies_on_ublk(&config.state_dir) {
        let dir = config.state_dir.display();
        return Err(format!(
            "{dir} lies on {lu}, a LU of Lunar itself\nTry: mgmtd --state-dir DIR elsewhere"
        ));
    }
    let fresh = SystemUuid::from_bytes(probe::random().map_err(|e| say("random numbers", &e))?);
    let dir = &config.state_dir;
    let (store, tables) = store::open_or_end(dir, fresh).map_err(|e| {
        let held = holders::openers(&dir.join(store::FILE).display().to_string()).join("; ");
        let held = if held.is_empty() {
            held
        } else {
            format!(" ({held})")
        };
        let what = store::one_line(&e);
        format!("tables: {what}{held}\nTry: {}", store::advice(&e, dir))
    })?;
    let listener = server::listen(&config.socket).map_err(|e| {
        let at = config.socket.display();
        format!("{at}: {e}\nTry: lunar status; to run a second system: mgmtd --system N")
    })?;
    let socket = config.socket.clone();
    let daemon = Daemon::new(config, store, tables);
    let mut term = signal(SignalKind::terminate()).map_err(|e| say("signals", &e))?;
    let mut int = signal(SignalKind::interrupt()).map_err(|e| say("signals", &e))?;
    tokio::task::spawn_local(server::serve(daemon.clone(), listener));
    tokio::spawn(hooks::follow(daemon.clone()));
    let mut supervisor = tokio::spawn(supervisor::supervise(daemon.clone()));
    tokio::spawn(spares::watch(daemon.clone()));
    tokio::spawn(returns::watch(daemon.clone()));
    tokio::spawn(memory::watch(daemon.clone()));
    tokio::select! {
        _ = term.recv() => tracing::info!("mgmtd ends, the data path stays up"),
        _ = int.recv() => tracing::info!("mgmtd ends, the data path stays up"),
        _ = daemon.stopped.notified() => {
            let limit = Duration::from_secs(10);
            let _ = tokio::time::timeout(limit, &mut supervisor).await;
            let _ = tokio::time::timeout(limit / 10, daemon.told.notified()).await;
            tracing::info!("everything is stopped");
        }
        _ = daemon.renewing.notified() => {
            let limit = Duration::from_secs(1);
            let _ = tokio::time::timeout(limit, daemon.told.notified()).await;
            // A change that has begun since is let end.
            let _turn = daemon.turn().await;
            tracing::info!("another mgmtd goes on");
            daemon.save().await.map_err(|e| e.to_string())?;
            drop(daemon.standby().take());
            return Ok(daemon.next());
        }
    }
    notify::notify("STOPPING=1");
    let _ = std::fs::remove_file(socket);
    daemon.save().await.map_err(|e| e.to_string())?;
    Ok(None)
}
