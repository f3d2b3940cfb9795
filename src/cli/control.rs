//! Where the gateway's control socket is.

use std::path::PathBuf;

use super::Failure;
use crate::api::Client;
use crate::config::{Config, DEFAULT_SOCKET, Overrides};

/// Finds the gateway of this site.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Finding the gateway")]
pub(super) struct ControlArgs {
    /// Control socket of the gateway [default: that of --config, else /var/lib/longhaul/control.sock]
    #[arg(long, value_name = "PATH", env = "LONGHAUL_SOCKET")]
    socket: Option<PathBuf>,

    /// Configuration of the gateway, whose state_dir has the control socket.
    #[arg(long, value_name = "FILE", env = "LONGHAUL_CONFIG")]
    config: Option<PathBuf>,
}

impl ControlArgs {
    pub(super) fn client(&self) -> Result<Client, Failure> {
        let socket = match (&self.socket, &self.config) {
            (Some(socket), _) => socket.clone(),
            (None, Some(file)) => Config::load(file, &Overrides::default())
                .map_err(|error| Failure::no(error.to_string()))?
                .control_socket(),
            (None, None) => PathBuf::from(DEFAULT_SOCKET),
        };
        Ok(Client::new(&socket))
    }
}
