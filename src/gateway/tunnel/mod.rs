//! Streams of other programs, from a place at one site to a place at another: of a hypervisor that we do not know, or of anything else.
//!
//! ```text
//! program ─▶ entrance ─▶ chunks, dictionary, frames ══ lanes ══▶ frames ─▶ exit ─▶ program
//!         ◀──────────────── answers: messages on the channel ◀──────────────────
//! ```
//!
//! The disks of a migration go the same way, with the tasks that read and write them ([`disks`](super::disks)) in the place of programs.
//!
//! Each connection is a session as a migration has one, with a dictionary of its own, and survives cuts like one. Both ends of it may be
//! closed apart, as in TCP. Nothing is known of what is in it: that a VM runs in one place is left to the programs.

mod answers;
mod entrance;
mod exit;
mod program;

use std::sync::Arc;

use tokio::sync::Semaphore;

use super::Core;
use crate::config::{Config, Place};
pub(super) use entrance::carry_disks;
pub(super) use exit::{attach, open, open_disks};
use program::Listener;

/// The places where programs connect.
#[derive(Debug)]
pub(super) struct Entrances(Vec<Entrance>);

#[derive(Debug)]
struct Entrance {
    tunnel: String,
    peer: String,
    listener: Listener,
}

impl Entrances {
    /// Listens at all of them.
    ///
    /// # Errors
    /// [`ListenError`]: nothing is listened to then.
    pub(super) async fn bind(config: &Config) -> Result<Self, ListenError> {
        let mut entrances = Vec::new();
        for entrance in &config.entrances {
            let listener = Listener::bind(&entrance.listen).await.map_err(|source| ListenError {
                tunnel: entrance.name.clone(),
                place: entrance.listen.clone(),
                source,
            })?;
            entrances.push(Entrance {
                tunnel: entrance.name.clone(),
                peer: entrance.peer.clone(),
                listener,
            });
        }
        Ok(Self(entrances))
    }

    /// Carries what connects, until it is dropped.
    pub(super) async fn serve(self, core: Arc<Core>) {
        let each = self.0.into_iter().map(|entrance| entrance.serve(Arc::clone(&core)));
        each.collect::<tokio::task::JoinSet<()>>().join_all().await;
    }
}

impl Entrance {
    async fn serve(self, core: Arc<Core>) {
        let openings = Arc::new(Semaphore::new(OPENINGS));
        loop {
            let opening = Arc::clone(&openings).acquire_owned().await;
            let opening = opening.expect("the semaphore is never closed");
            let program = self.listener.accept().await;
            let (core, tunnel, peer) = (Arc::clone(&core), self.tunnel.clone(), self.peer.clone());
            tokio::spawn(entrance::carry(core, tunnel, peer, program, opening));
        }
    }
}

/// Programs cannot connect where the configuration says.
#[derive(Debug, thiserror::Error)]
#[error("the tunnel {tunnel} cannot listen at {place}: {source}")]
pub struct ListenError {
    tunnel: String,
    place: Place,
    source: std::io::Error,
}

/// Chunks that a stream remembers: 170 MB of it.
const MOST_CHUNKS: u32 = 1 << 16;

/// Bytes of frames on the way: 1.8 Gbit/s over 150 ms.
const WINDOW: u64 = 32 << 20;

/// Open streams with one peer at each end. Each has a channel, of which a connection has 64 at a time, and migrations need some.
const STREAMS: usize = 32;

/// Programs at one entrance for which the peer is asked. Others wait to be accepted.
const OPENINGS: usize = 16;
