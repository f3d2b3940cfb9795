//! Events of a monitor, in order, to any number of listeners.
//!
//! A listener's queue is bounded. Ordinary events (a guest can cause many) are dropped when a quarter of it is in use;
//! those that tell where the guest is (`STOP`, `RESUME`, `MIGRATION`, `SHUTDOWN`, …) may fill it, and when even these do
//! not fit, the listener is told that it lost some: silence never means that nothing happened. Beside the queues the
//! connection itself counts `STOP` and `RESUME`, so the rule "not resumed since" does not depend on any listener.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;
use tokio::sync::mpsc;

/// One event as QEMU names it (`qapi/*.json`).
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// QEMU's name, for example `MIGRATION`; at most [`NAME_LIMIT`] characters.
    pub name: String,
    /// Its data; `Null` if it had none or more than [`DATA_LIMIT`] bytes.
    pub data: Value,
}

/// What the monitor has said about the vCPUs since the connection exists. `STOP` and `RESUME` are sent before vCPUs
/// start and after they have stopped, so an unchanged `resumes` means that no vCPU was started in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunHistory {
    /// Number of `STOP` events.
    pub stops: u64,
    /// Number of `RESUME` events.
    pub resumes: u64,
    /// Whether the latest of the two was `RESUME`; false before the first.
    pub resumed_last: bool,
}

/// A listener's queue. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Events {
    queue: mpsc::Receiver<Event>,
    lagged: Arc<AtomicBool>,
}

/// Why no more events come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventsEnd {
    /// The listener read too slowly, and events that matter did not fit any more. What is known of the guest from
    /// earlier events is stale: ask by command, then subscribe again.
    #[error("The monitor's events were not read fast enough, and some that matter were lost.")]
    Lagged,
    /// The connection is closed.
    #[error("The monitor connection has ended.")]
    Closed,
}

impl Events {
    /// The next event. Cancel safe.
    pub async fn next(&mut self) -> Result<Event, EventsEnd> {
        match self.queue.recv().await {
            Some(event) => Ok(event),
            None if self.lagged.load(Ordering::Acquire) => Err(EventsEnd::Lagged),
            None => Err(EventsEnd::Closed),
        }
    }
}

impl Event {
    /// Takes an event message apart; `wire_length` is the length of the whole message in bytes.
    pub(super) fn from_message(message: &mut serde_json::Map<String, Value>, wire_length: usize) -> Option<Event> {
        let name = message.get("event")?.as_str()?;
        let name = name.chars().take(NAME_LIMIT).collect();
        let data = match message.remove("data") {
            Some(data) if wire_length <= DATA_LIMIT => data,
            _ => Value::Null,
        };
        Some(Event { name, data })
    }

    fn tells_where_the_guest_is(&self) -> bool {
        matches!(
            self.name.as_str(),
            "STOP" | "RESUME" | "SHUTDOWN" | "RESET" | "POWERDOWN" | "MIGRATION" | "MIGRATION_PASS" | "GUEST_PANICKED"
        )
    }
}

/// The sending side: all listeners of one connection.
#[derive(Debug, Default)]
pub(super) struct Listeners {
    list: Vec<(mpsc::Sender<Event>, Arc<AtomicBool>)>,
    pub(super) history: RunHistory,
}

impl Listeners {
    pub(super) fn subscribe(&mut self) -> Events {
        let (sender, queue) = mpsc::channel(QUEUE_EVENTS);
        let lagged = Arc::new(AtomicBool::new(false));
        self.list.push((sender, Arc::clone(&lagged)));
        Events { queue, lagged }
    }

    pub(super) fn publish(&mut self, event: &Event) {
        match event.name.as_str() {
            "STOP" => {
                self.history.stops += 1;
                self.history.resumed_last = false;
            }
            "RESUME" => {
                self.history.resumes += 1;
                self.history.resumed_last = true;
            }
            _ => {}
        }
        self.list.retain(|(sender, lagged)| {
            if !event.tells_where_the_guest_is() && sender.capacity() <= QUEUE_EVENTS - ORDINARY_EVENTS {
                return !sender.is_closed();
            }
            match sender.try_send(event.clone()) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    lagged.store(true, Ordering::Release);
                    false
                }
                Err(mpsc::error::TrySendError::Closed(_)) => false,
            }
        });
    }

    /// Ends every subscription.
    pub(super) fn close(&mut self) {
        self.list.clear();
    }
}

/// Longest event name kept, in characters; QEMU's longest is under 40.
pub const NAME_LIMIT: usize = 64;
/// Longest event message whose data is kept, in bytes. It bounds a listener's queue to 4 MiB.
pub const DATA_LIMIT: usize = 4096;
/// Events in a listener's queue; about 500 migrations' worth of status changes.
const QUEUE_EVENTS: usize = 1024;
/// Share of the queue that ordinary events may use.
const ORDINARY_EVENTS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str) -> Event {
        Event {
            name: name.into(),
            data: Value::Null,
        }
    }

    #[tokio::test]
    async fn ordinary_events_never_push_out_those_that_tell_where_the_guest_is() {
        let mut listeners = Listeners::default();
        let mut events = listeners.subscribe();
        for _ in 0..5000 {
            listeners.publish(&event("RTC_CHANGE"));
        }
        listeners.publish(&event("STOP"));
        for _ in 0..ORDINARY_EVENTS {
            assert_eq!(events.next().await, Ok(event("RTC_CHANGE")));
        }
        assert_eq!(events.next().await, Ok(event("STOP")));
    }

    #[tokio::test]
    async fn a_listener_that_lost_an_important_event_is_told_so_after_what_it_has() {
        let mut listeners = Listeners::default();
        let mut events = listeners.subscribe();
        for _ in 0..=QUEUE_EVENTS {
            listeners.publish(&event("STOP"));
        }
        for _ in 0..QUEUE_EVENTS {
            assert_eq!(events.next().await, Ok(event("STOP")));
        }
        assert_eq!(events.next().await, Err(EventsEnd::Lagged));
        assert_eq!(listeners.history.stops, QUEUE_EVENTS as u64 + 1);
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_not_reported_as_a_loss() {
        let mut listeners = Listeners::default();
        let mut events = listeners.subscribe();
        listeners.publish(&event("RESUME"));
        listeners.close();
        assert_eq!(events.next().await, Ok(event("RESUME")));
        assert_eq!(events.next().await, Err(EventsEnd::Closed));
        assert!(listeners.history.resumed_last);
    }

    #[test]
    fn data_longer_than_the_limit_is_dropped_and_the_event_kept() {
        let mut message = serde_json::json!({"event": "X", "data": {"a": 1}});
        let map = message.as_object_mut().unwrap();
        assert_eq!(Event::from_message(map, DATA_LIMIT + 1), Some(event("X")));
    }
}
