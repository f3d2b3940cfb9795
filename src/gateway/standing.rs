//! Links that stand ready: to every paired peer that has an address, from the start on, so that a migration does not begin with dialling.
//!
//! ```text
//! every second ─▶ a peer without a link: dialled, again and again where it does not answer
//!              ─▶ a link that nobody uses, whose agreement is old: both ends say hello again
//! ```
//!
//! What is agreed on follows from the room that a destination has, which changes. A session goes by one agreement at both ends: while one is being
//! opened ([`Standing::hold`]) nobody says hello, and one that is opened meanwhile waits for the answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};
use tokio::task::JoinSet;

use super::links::Kept;
use super::registry::Entry;
use super::{Core, clock};
use crate::api::Role;
use crate::proto::wire::hello::Agreement;

/// Between two looks at the links.
const LOOK: Duration = Duration::from_secs(1);

/// An agreement that is older is made anew.
const OLD: Duration = Duration::from_secs(30);

/// First and longest pause before a peer that did not answer is called again.
const RETRY_FIRST: Duration = Duration::from_secs(2);
const RETRY_LONGEST: Duration = Duration::from_secs(60);

/// A link that lives shorter is as good as none: its peer is called again after a pause.
const LASTING: Duration = Duration::from_secs(10);

/// What both ends of a link agreed on.
#[derive(Debug)]
pub(crate) struct Standing {
    agreed: Mutex<(Agreement, Instant)>,
    opening: Arc<RwLock<()>>,
}

/// While it exists the agreement stays as it is.
pub(crate) type Held = OwnedRwLockReadGuard<()>;

impl Standing {
    pub(crate) fn new(agreement: Agreement, now: Instant) -> Self {
        Self {
            agreed: Mutex::new((agreement, now)),
            opening: Arc::default(),
        }
    }

    pub(crate) fn agreement(&self) -> Agreement {
        self.agreed().0
    }

    pub(crate) fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.agreed().1)
    }

    /// For whoever opens a session: until the peer has answered.
    pub(crate) async fn hold(&self) -> Held {
        Arc::clone(&self.opening).read_owned().await
    }

    /// For whoever says hello again; `None` while a session is being opened.
    pub(crate) fn renew(&self) -> Option<OwnedRwLockWriteGuard<()>> {
        Arc::clone(&self.opening).try_write_owned().ok()
    }

    pub(crate) fn set(&self, agreement: Agreement, now: Instant) {
        *self.agreed() = (agreement, now);
    }

    fn agreed(&self) -> std::sync::MutexGuard<'_, (Agreement, Instant)> {
        // Whole after every statement.
        self.agreed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When a peer that did not answer, or whose link did not last, is called again.
#[derive(Clone, Copy, Debug)]
struct Silent {
    due: Instant,
    pause: Duration,
}

impl Silent {
    /// After one more attempt.
    fn after(before: Option<Self>, now: Instant) -> Self {
        let pause = before.map_or(RETRY_FIRST, |before| (before.pause * 2).min(RETRY_LONGEST));
        Self {
            due: now + pause,
            pause,
        }
    }
}

/// Keeps links to the peers for as long as the gateway runs.
pub(crate) async fn keep(core: Arc<Core>) {
    let mut silent: HashMap<String, Silent> = HashMap::new();
    loop {
        let peers = core.links.peers_with_address();
        silent.retain(|peer, _| peers.contains(peer));
        let now = clock::now();
        let open = core.registry.open();
        let mut attempts = JoinSet::new();
        for peer in peers {
            // A source that has lost its peer looks for it itself.
            let looks = |entry: &Arc<Entry>| entry.peer == peer && entry.role == Role::Source && !entry.needs_person();
            let may_dial = silent.get(&peer).is_none_or(|silent| silent.due <= now) && !open.iter().any(looks);
            let links = Arc::clone(&core.links);
            attempts.spawn(async move {
                let kept = links.keep(&peer, OLD, may_dial).await;
                (peer, kept)
            });
        }
        while let Some(attempt) = attempts.join_next().await {
            let (peer, kept) = attempt.expect("keeping a link is not aborted and does not panic");
            match kept {
                Ok(Kept::Missing) => {}
                Ok(Kept::Ready(since)) if since < LASTING => {}
                Ok(Kept::Ready(_)) => drop(silent.remove(&peer)),
                Ok(Kept::Made) => {
                    let next = Silent::after(silent.get(&peer).copied(), clock::now());
                    silent.insert(peer, next);
                }
                Err(error) => {
                    if silent.contains_key(&peer) {
                        tracing::debug!(peer, "no link: {error}");
                    } else {
                        tracing::info!(peer, "no link, which is tried again: {error}");
                    }
                    let next = Silent::after(silent.get(&peer).copied(), clock::now());
                    silent.insert(peer, next);
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "an arbitrary instant to count from")]
mod tests {
    use super::*;
    use crate::proto::wire::Limits;

    fn agreement(dictionary_pages: u32) -> Agreement {
        Agreement {
            version: 7,
            limits: Limits {
                window_bytes: 1,
                dictionary_pages,
            },
        }
    }

    #[tokio::test]
    async fn nobody_says_hello_while_a_session_is_opened_and_none_is_opened_before_the_answer() {
        let now = Instant::now();
        let standing = Standing::new(agreement(1), now);
        let held = standing.hold().await;
        assert!(standing.renew().is_none());
        drop(held);
        let renewing = standing.renew().unwrap();
        let mut opening = std::pin::pin!(standing.hold());
        assert!(futures_poll(opening.as_mut()).await.is_none());
        standing.set(agreement(2), now + OLD);
        drop(renewing);
        let _held = opening.await;
        assert_eq!(standing.agreement(), agreement(2));
        assert_eq!(standing.age(now + OLD + LOOK), LOOK);
    }

    /// What a future gives at once.
    async fn futures_poll<F: Future>(mut future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        std::future::poll_fn(|context| {
            std::task::Poll::Ready(match future.as_mut().poll(context) {
                std::task::Poll::Ready(output) => Some(output),
                std::task::Poll::Pending => None,
            })
        })
        .await
    }

    #[test]
    fn a_peer_that_stays_silent_is_called_once_a_minute_in_the_end() {
        let mut now = Instant::now();
        let mut silent = None;
        let mut pauses = Vec::new();
        for _ in 0..7 {
            let next = Silent::after(silent, now);
            pauses.push((next.due - now).as_secs());
            now = next.due;
            silent = Some(next);
        }
        assert_eq!(pauses, [2, 4, 8, 16, 32, 60, 60]);
    }
}
