//! The two tasks behind a monitor connection, and what they share with the client.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::events::{Event, Events, Listeners, RunHistory};
use super::scanner::ObjectScanner;
use super::{Drained, MESSAGE_LIMIT, QemuVersion, Replies};

/// What a command came back with.
pub(super) type Reply = Result<Value, Refusal>;

/// QEMU's error object.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) class: String,
    pub(super) description: String,
}

/// The first message of a monitor.
#[derive(Debug)]
pub(super) struct Greeting(pub(super) QemuVersion);

/// State shared by the client and its tasks. The lock is never held across an await.
#[derive(Debug, Default)]
pub(super) struct Shared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    replies: Replies,
    listeners: Listeners,
    lost: Option<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn subscribe(&self) -> Events {
        let mut state = self.state();
        let events = state.listeners.subscribe();
        if state.lost.is_some() {
            state.listeners.close();
        }
        events
    }

    pub(super) fn history(&self) -> RunHistory {
        self.state().listeners.history
    }

    pub(super) fn lost_reason(&self) -> Option<String> {
        self.state().lost.clone()
    }

    /// Ends everything that waits on this connection; the first reason stays.
    fn lose(&self, reason: String) {
        let mut state = self.state();
        if state.lost.is_none() {
            tracing::debug!(%reason, "monitor connection ended");
            state.lost = Some(reason);
        }
        state.replies.clear();
        state.listeners.close();
    }
}

/// A command under way. Dropping it forgets the command, and a late answer is then ignored.
#[derive(Debug)]
pub(super) struct Pending<'a> {
    shared: &'a Shared,
    id: u64,
    reply: oneshot::Receiver<Reply>,
}

impl<'a> Pending<'a> {
    /// Fails with the reason if the connection has ended.
    pub(super) fn register(shared: &'a Shared, id: u64) -> Result<impl Future<Output = Option<Reply>> + 'a, String> {
        let mut state = shared.state();
        if let Some(reason) = &state.lost {
            return Err(reason.clone());
        }
        let (sender, reply) = oneshot::channel();
        state.replies.insert(id, sender);
        let mut pending = Pending { shared, id, reply };
        Ok(async move { (&mut pending.reply).await.ok() })
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.shared.state().replies.remove(&self.id);
    }
}

/// Reads the socket and sorts what arrives.
#[derive(Debug)]
pub(super) struct Reader {
    stream: Arc<UnixStream>,
    shared: Arc<Shared>,
    scanner: ObjectScanner,
    greeting: Option<oneshot::Sender<Greeting>>,
    buffer: Vec<u8>,
}

impl Reader {
    pub(super) fn new(stream: Arc<UnixStream>, shared: Arc<Shared>, greeting: oneshot::Sender<Greeting>) -> Self {
        let scanner = ObjectScanner::new(MESSAGE_LIMIT);
        Self {
            stream,
            shared,
            scanner,
            greeting: Some(greeting),
            buffer: vec![0; READ_BYTES],
        }
    }

    /// Runs until the connection ends or the client is dropped.
    pub(super) async fn run(mut self, mut drains: mpsc::Receiver<oneshot::Sender<Drained>>) {
        let stream = Arc::clone(&self.stream);
        let reason = loop {
            let outcome = tokio::select! {
                ready = stream.readable() => match ready.and_then(|()| stream.try_read(&mut self.buffer)) {
                    Ok(length) => self.take(length),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
                    Err(error) => Err(error.to_string()),
                },
                request = drains.recv() => match request {
                    Some(answer) => self.drain(answer),
                    None => return,
                },
            };
            if let Err(reason) = outcome {
                break reason;
            }
        };
        self.shared.lose(reason);
    }

    /// Empties the socket without asking the reactor, whose knowledge of readiness may be older than the last event.
    fn drain(&mut self, answer: oneshot::Sender<Drained>) -> Result<(), String> {
        loop {
            match rustix::net::recv(&*self.stream, &mut self.buffer[..], rustix::net::RecvFlags::DONTWAIT) {
                Ok((_, length)) => self.take(length)?,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => return Err(error.to_string()),
            }
        }
        let drained = Drained {
            history: self.shared.history(),
            is_partial: self.scanner.is_inside_object(),
        };
        // A caller that gave up waiting needs no answer.
        let _ = answer.send(drained);
        Ok(())
    }

    /// Handles `length` bytes at the front of the buffer; 0 is the end of the connection.
    fn take(&mut self, length: usize) -> Result<(), String> {
        if length == 0 {
            return Err("the other side closed it".into());
        }
        self.scanner.feed(&self.buffer[..length]);
        while let Some(object) = self.scanner.next_object().map_err(|error| error.to_string())? {
            self.handle(&object)?;
        }
        Ok(())
    }

    fn handle(&mut self, object: &[u8]) -> Result<(), String> {
        let message = serde_json::from_slice(object).map_err(|error| format!("it sent malformed JSON ({error})"))?;
        let Value::Object(mut message) = message else {
            return Err("it sent something other than a JSON object".into());
        };
        if let Some(greeting) = self.greeting.take() {
            let version = greeting_version(&message).ok_or("its first message is no QMP greeting")?;
            // Nobody waits any more if connecting was given up; the client is gone then, and the task ends with it.
            let _ = greeting.send(Greeting(version));
            return Ok(());
        }
        if message.contains_key("event") {
            match Event::from_message(&mut message, object.len()) {
                Some(event) => {
                    tracing::trace!(name = %event.name, data = %event.data, "event");
                    self.shared.state().listeners.publish(&event);
                }
                None => return Err("it sent an event without a name".into()),
            }
            return Ok(());
        }
        let reply = match (message.remove("return"), message.get("error")) {
            (Some(value), _) => Ok(value),
            (None, Some(error)) => Err(Refusal {
                class: text_field(error, "class"),
                description: text_field(error, "desc"),
            }),
            (None, None) => return Err("it sent a message of an unknown kind".into()),
        };
        let Some(id) = message.get("id").and_then(Value::as_u64) else {
            return Err("it sent an answer without our id".into());
        };
        // An id that is not waited for belongs to a command whose deadline has passed.
        if let Some(waiting) = self.shared.state().replies.remove(&id) {
            let _ = waiting.send(reply);
        }
        Ok(())
    }
}

/// Writes commands until the client is dropped or the connection ends.
pub(super) async fn write(stream: Arc<UnixStream>, shared: Arc<Shared>, mut messages: mpsc::Receiver<Vec<u8>>) {
    while let Some(message) = messages.recv().await {
        let mut rest = &message[..];
        while !rest.is_empty() {
            match stream.writable().await.and_then(|()| stream.try_write(rest)) {
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return shared.lose(error.to_string()),
            }
        }
    }
}

fn greeting_version(message: &serde_json::Map<String, Value>) -> Option<QemuVersion> {
    let version = message.get("QMP")?.get("version")?.get("qemu")?;
    let number = |name: &str| u32::try_from(version.get(name)?.as_u64()?).ok();
    Some(QemuVersion {
        major: number("major")?,
        minor: number("minor")?,
        micro: number("micro")?,
    })
}

/// A string member of an error object, cut to a length that fits a sentence.
fn text_field(error: &Value, name: &str) -> String {
    let text = error.get(name).and_then(Value::as_str).unwrap_or("no text given");
    text.chars().take(REFUSAL_CHARACTERS).collect()
}

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;
/// Longest error text kept, in characters.
const REFUSAL_CHARACTERS: usize = 2000;
