//! Power cuts, see `lunar_tests::cuts`. Run by `tests/run.sh cuts`.
//!
//!   lunar-cuts [--cuts N] [--seed S] [--set N] [--filter NAME]   runs
//!   lunar-cuts guest DIR                                         inside the machine

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, dir] = &args[..]
        && verb == "guest"
    {
        let ended = lunar_tests::cuts::guest::main(std::path::Path::new(dir));
        std::process::exit(i32::from(ended.is_err()));
    }
    std::process::exit(lunar_tests::cuts::host::main(&args));
}
