//! Power cuts, see `tests/CUTS.md`.
//!
//!   lunar-cuts [OPTION..]     outside; without arguments 12 cuts. `--help` lists the options
//!   lunar-cuts guest DIR      inside the machine that is cut

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
