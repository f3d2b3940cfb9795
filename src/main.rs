//! The `longhaul` command.

use std::error::Error as _;
use std::process::ExitCode;

use clap::Parser as _;

#[derive(clap::Parser)]
#[command(version, about)]
enum Verb {
    WanEmulator(longhaul::wan::EmulatorArgs),
}

fn main() -> ExitCode {
    let Verb::WanEmulator(args) = Verb::parse();
    longhaul::wan::run(args).unwrap_or_else(|error| {
        eprint!("longhaul: {error}");
        let mut cause = error.source();
        while let Some(source) = cause {
            eprint!(": {source}");
            cause = source.source();
        }
        eprintln!();
        ExitCode::from(2)
    })
}
