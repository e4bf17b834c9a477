//! ublk-target: the process that owns RAID groups and serves their LUs as ublk devices.
//!
//! mgmtd starts it with a listening control socket; see `lunar_api::target` for what is said on it. By hand
//! only `bench-loop` is of use.

#![deny(unsafe_op_in_unsafe_fn)]

mod allocations;
mod bench_loop;
mod breadcrumb;
mod buffers;
mod build;
mod clock;
mod control;
mod control_helper;
mod crew;
mod events;
mod executor;
mod forward;
mod group;
mod groups;
mod log;
mod member_file;
mod op;
mod owner;
mod queue;
mod ring;
mod sandbox;
mod socket;
mod standby;
mod thread;
mod ublk;

use std::error::Error;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, CommandFactory, Parser, Subcommand};
use lunar_api::breadcrumb::{FILE, STANDBY_FILE};
use nix::sys::signal::{SigSet, Signal};
use tracing_subscriber::EnvFilter;

use crate::groups::{Common, Groups};

#[global_allocator]
static ALLOCATOR: allocations::Counting = allocations::Counting;

/// Owns RAID groups and serves their LUs as ublk devices. Started by mgmtd.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    /// Print the manual page
    #[arg(long, hide = true, exclusive = true)]
    man: bool,
    /// Print what this build is, as JSON
    #[arg(long, exclusive = true)]
    build_info: bool,
    #[command(flatten)]
    serve: Option<Serve>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct Serve {
    /// Descriptor of a listening SOCK_SEQPACKET Unix socket
    #[arg(long, value_name = "N")]
    listen_fd: RawFd,
    /// An existing folder of its own
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
    /// Takes so much memory for what it will serve, and waits to take another's place: its first connection is told when it is
    /// ready, and as long as there is no second one, the end of that is its own
    #[arg(long, value_name = "BYTES")]
    standby: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measures the ring's loop alone: random reads of files or block devices
    BenchLoop(bench_loop::BenchLoop),
    /// Says of each disk whether this build could serve it, as JSON; reads only, also what another serves
    CanRead(build::CanRead),
    /// Takes devices from a server that is to be killed: what is in flight ends, what comes waits
    Quiesce(build::Quiesce),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.man {
        let man = clap_mangen::Man::new(Cli::command()).section("8");
        return match man.render(&mut std::io::stdout()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        };
    }
    // Started by the path of an open file it would be called by that file's number.
    let _ = nix::sys::prctl::set_name(c"ublk-target");
    // To stderr: mgmtd or journald keeps it, never a file on a LU.
    tracing_subscriber::fmt()
        .with_env_filter(
            EnvFilter::try_from_env("LUNAR_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .with_writer(log::Lines)
        .with_ansi(false)
        .init();
    let done = match (cli.command, cli.serve) {
        _ if cli.build_info => build::print_info(),
        (Some(Command::CanRead(ask)), _) => ask.run(),
        (Some(Command::Quiesce(ask)), _) => ask.run(),
        (Some(Command::BenchLoop(bench)), _) => bench.run(),
        (None, Some(serve)) => run(&serve),
        (None, None) => {
            eprintln!("ublk-target is started by mgmtd. Try: ublk-target --help");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            eprintln!("ublk-target: {text}");
            ExitCode::FAILURE
        }
    }
}

fn run(serve: &Serve) -> Result<(), Box<dyn Error>> {
    if serve.listen_fd < 3 {
        return Err("--listen-fd is the number of a listening socket".into());
    }
    // A panic on any thread ends the process: recovery is better than a device that nobody serves.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        report(info);
        std::process::abort();
    }));
    let helper = become_server(serve)?;
    let listener = socket::inherited(serve.listen_fd);
    let helper = helper.attend()?;
    log::start()?;
    let kernel = nix::sys::utsname::uname()?
        .release()
        .to_string_lossy()
        .into_owned();
    let bits = ublk::lifecycle::get_features(&helper).map_err(|error| match error.errno() {
        Some(libc::ENOENT) => "there is no /dev/ublk-control (modprobe ublk_drv)".to_owned(),
        _ => format!("GET_FEATURES: {error}"),
    });
    let features = ublk::features(&kernel, bits);
    for note in &features.notes {
        tracing::warn!("{note}");
    }
    let groups = Groups::new(Common {
        features,
        helper,
        events: events::Events::default(),
    });
    watch_signals(Arc::clone(&groups))?;
    let ready = control::Ready::start(&groups);
    if serve.standby.is_some() && !standby::wait(&listener)? {
        tracing::info!("not needed: whoever started it is gone");
        std::process::exit(0);
    }
    ready.listen(&listener);
    Ok(())
}

/// Everything a process does once, in the order that it must be done in.
fn become_server(serve: &Serve) -> Result<control_helper::Forked, sandbox::SandboxError> {
    let crumbs = match serve.standby {
        Some(_) => STANDBY_FILE,
        None => FILE,
    };
    sandbox::block_signals()?;
    sandbox::raise_limits()?;
    let crumbs = breadcrumb::open(&serve.run_dir.join(crumbs));
    sandbox::step("the breadcrumb file", crumbs)?;
    sandbox::detach_mounts(&serve.run_dir)?;
    let helper = control_helper::fork_helper()?;
    sandbox::lock_memory()?;
    if let Some(bytes) = serve.standby {
        sandbox::take_memory(bytes);
    }
    Ok(helper)
}

/// SIGTERM and SIGINT end the process only if nobody holds a LU.
fn watch_signals(groups: Arc<Groups>) -> std::io::Result<()> {
    let watch = move || {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        while set.wait().is_ok() {
            match groups.shutdown() {
                Ok(()) => {
                    log::drain();
                    std::process::exit(0)
                }
                Err(error) => {
                    tracing::warn!(%error, causes = ?error.causes, "going on after a signal to end")
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .stack_size(256 << 10)
        .spawn(watch)?;
    Ok(())
}
