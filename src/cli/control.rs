//! Where the gateway's control socket is.

use std::path::{Path, PathBuf};

use super::Failure;
use crate::api::Client;
use crate::config::{DEFAULT_PATH, DEFAULT_STATE_DIR, control_socket_in, stated_state_dir};

/// Finds the gateway of this site.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Finding the gateway")]
pub(super) struct ControlArgs {
    /// Control socket of the gateway [default: the one in its state_dir]
    #[arg(long, value_name = "PATH", env = "LONGHAUL_SOCKET")]
    socket: Option<PathBuf>,

    /// Directory of the gateway that has the control socket [default: state_dir of its configuration]
    #[arg(long, value_name = "DIRECTORY", env = "LONGHAUL_STATE_DIR")]
    state_dir: Option<PathBuf>,

    /// Configuration of the gateway, of which only state_dir is read [default: /etc/longhaul/gateway.toml if it is there]
    #[arg(long, value_name = "FILE", env = "LONGHAUL_CONFIG")]
    config: Option<PathBuf>,
}

impl ControlArgs {
    pub(super) fn client(&self) -> Result<Client, Failure> {
        if let Some(socket) = &self.socket {
            return Ok(Client::new(socket));
        }
        let state_dir = match &self.state_dir {
            Some(state_dir) => state_dir.clone(),
            None => self.configured()?.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR)),
        };
        Ok(Client::new(&control_socket_in(&state_dir)))
    }

    /// As the gateway would read it. The default file need not be there, nor be readable for who runs this.
    fn configured(&self) -> Result<Option<PathBuf>, Failure> {
        match &self.config {
            Some(file) => stated_state_dir(file).map_err(|error| Failure::no(error.to_string())),
            None => Ok(stated_state_dir(Path::new(DEFAULT_PATH)).ok().flatten()),
        }
    }
}
