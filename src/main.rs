//! The `longhaul` command.

use std::process::ExitCode;

use clap::Parser;
use longhaul::lab::LabCommand;

/// Moves running virtual machines between continents.
#[derive(Parser)]
enum Command {
    /// Measurements and demonstrations on this machine.
    #[command(subcommand)]
    Lab(LabCommand),
}

#[tokio::main]
async fn main() -> ExitCode {
    let Command::Lab(lab) = Command::parse();
    ExitCode::from(lab.run().await)
}
