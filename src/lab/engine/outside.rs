//! What goes on around a move: a client of the guest, an application's own account of its work, and what happens to the link.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::lab::application::Windows;
use crate::lab::error::LabError;
use crate::lab::guest::Workload;
use crate::lab::heartbeat::Heartbeat;
use crate::lab::link::Link;
use crate::lab::prober::{Prober, monotonic};
use crate::lab::process::Process;
use crate::lab::record::Application;

use super::Moved;

/// Who looks on, and what is done to the link.
#[derive(Clone, Debug, Default)]
pub(in crate::lab) struct Outside {
    /// Of a guest with a network.
    pub(in crate::lab) client: Option<Client>,
    /// What the guest runs.
    pub(in crate::lab) application: Workload,
    /// The link whose time line begins with the command, and where what is said of it goes.
    pub(in crate::lab) events: Option<(Link, PathBuf)>,
}

/// A client of the guest.
#[derive(Clone, Debug)]
pub(in crate::lab) struct Client {
    /// The program that is the client.
    pub(in crate::lab) longhaul: String,
    /// The client's namespace.
    pub(in crate::lab) namespace: String,
    /// The guest's address.
    pub(in crate::lab) guest: Ipv4Addr,
}

/// Looking on, from before the command.
pub(super) struct Watching {
    prober: Option<Prober>,
    application: Workload,
    since: Duration,
    /// Ends with the move.
    _events: Option<Process>,
}

impl Outside {
    /// Begins to look at a guest that is at work, and returns once everything answers.
    pub(super) async fn begin(&self, at_source: &mut Heartbeat) -> Result<Watching, LabError> {
        let prober = match &self.client {
            Some(client) => {
                let mut prober = Prober::start(&client.longhaul, &client.namespace, client.guest)?;
                prober.ready(PATIENCE).await?;
                Some(prober)
            }
            None => None,
        };
        if self.application != Workload::None {
            work(at_source).await?;
        }
        let events = match &self.events {
            Some((link, log)) => Some(link.play(log)?),
            None => None,
        };
        Ok(Watching {
            prober,
            application: self.application,
            since: monotonic(),
            _events: events,
        })
    }
}

impl Watching {
    /// The guest has arrived: what was seen of the move that was asked for at `command`.
    pub(super) async fn end(
        self,
        at_source: &Windows,
        at_destination: &mut Heartbeat,
        [command, arrival]: [Instant; 2],
        moved: &mut Moved,
    ) -> Result<(), LabError> {
        if self.application != Workload::None {
            work(at_destination).await?;
            moved.application = self.application(at_source, at_destination, command, arrival);
        }
        if let Some(prober) = self.prober {
            let probed = prober.finish().await?;
            moved.blackout_seconds = probed.blackout_seconds(self.since);
            if let Ok(probed) = serde_json::to_value(&probed) {
                moved.report.insert("probed".to_owned(), probed);
            }
        }
        Ok(())
    }

    fn application(
        &self,
        at_source: &Windows,
        at_destination: &Heartbeat,
        command: Instant,
        arrival: Instant,
    ) -> Option<Application> {
        let course = at_source.joined(&at_destination.heard().windows);
        course.around(self.application, command, arrival)
    }
}

/// Waits until the application has worked for a while.
async fn work(heartbeat: &mut Heartbeat) -> Result<(), LabError> {
    let heard = |heartbeat: &Heartbeat| heartbeat.heard().windows.iter().count();
    let enough = heard(heartbeat) + WINDOWS;
    heartbeat
        .wait_for("the application's work", PATIENCE, |heard| {
            heard.windows.iter().count() >= enough
        })
        .await?;
    Ok(())
}

/// Windows of the application before the command and after the arrival: about five seconds.
const WINDOWS: usize = 20;
/// An application starts within a minute or two under TCG.
const PATIENCE: Duration = Duration::from_secs(300);
