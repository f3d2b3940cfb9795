//! One client of a monitor: greeting, negotiation, commands in order.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, recv};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::commands::{Refusal, execute};
use super::control::Control;
use super::hub::{Hub, Member};
use super::inventory::version;

/// Serves a client until it goes, breaks the protocol, or is dropped.
pub(super) fn serve(control: &Arc<Control>, socket: &Arc<UnixStream>, member: &Member) {
    let hub = &control.hub;
    let say = |message: &Value| hub.say(member.id, &line(message));
    say(&json!({ "QMP": { "version": version(), "capabilities": [] } }));
    let mut reader = Reader::new(socket, hub, member);
    let mut has_negotiated = false;
    loop {
        let message = match reader.next_message() {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(refusal) => {
                say(&refusal.answer());
                break;
            }
        };
        let (command, id) = Command::of(message);
        let is_quit = command.as_ref().is_ok_and(|command| command.name == "quit");
        let outcome = command.and_then(|command| match (command.name.as_str(), has_negotiated) {
            ("qmp_capabilities", false) => {
                command.check_negotiation()?;
                has_negotiated = true;
                hub.hear_events(member.id);
                Ok(json!({}))
            }
            ("qmp_capabilities", true) => Err(Refusal::no_command("The capabilities were negotiated already.")),
            (_, false) => Err(Refusal::no_command(
                "Capabilities are negotiated first, with qmp_capabilities.",
            )),
            (name, true) => execute(control, name, command.arguments),
        });
        let has_quit = is_quit && outcome.is_ok();
        let mut answer = match outcome {
            Ok(value) => json!({ "return": value }),
            Err(refusal) => refusal.answer(),
        };
        if let Some(id) = id {
            answer["id"] = id;
        }
        say(&answer);
        if has_quit {
            control.vmm.quit();
            break;
        }
    }
    hub.leave(member.id);
}

/// A message as it goes over the socket.
pub(super) fn line(message: &Value) -> Vec<u8> {
    let mut line = message.to_string().into_bytes();
    line.extend(b"\r\n");
    line
}

/// What a client wants.
struct Command {
    name: String,
    arguments: Map<String, Value>,
}

impl Command {
    /// And the id that its answer has to have.
    fn of(message: Value) -> (Result<Self, Refusal>, Option<Value>) {
        let Value::Object(mut members) = message else {
            return (Err(Refusal::generic("A command is a JSON object.")), None);
        };
        let id = members.remove("id");
        (Self::of_members(members), id)
    }

    fn of_members(mut members: Map<String, Value>) -> Result<Self, Refusal> {
        let Some(Value::String(name)) = members.remove("execute") else {
            return Err(Refusal::generic("A command has a text `execute`."));
        };
        let arguments = match members.remove("arguments") {
            None => Map::new(),
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Refusal::generic("The `arguments` of a command are a JSON object.")),
        };
        if !members.is_empty() {
            return Err(Refusal::generic("A command has `execute`, `arguments` and `id` only."));
        }
        Ok(Self { name, arguments })
    }

    fn check_negotiation(&self) -> Result<(), Refusal> {
        let is_nothing = |wanted: &Value| wanted.as_array().is_some_and(Vec::is_empty);
        match self
            .arguments
            .iter()
            .all(|(name, value)| name == "enable" && is_nothing(value))
        {
            true => Ok(()),
            false => Err(Refusal::generic(
                "This monitor has no capability that could be enabled.",
            )),
        }
    }
}

/// Reads a client's socket, and writes meanwhile what is left for it.
struct Reader<'a> {
    socket: &'a UnixStream,
    hub: &'a Hub,
    id: u64,
    wake: &'a OwnedFd,
    buffer: Vec<u8>,
    /// What of the buffer was read and not taken.
    filled: std::ops::Range<usize>,
    /// Bytes of the message under way.
    taken: usize,
}

impl<'a> Reader<'a> {
    fn new(socket: &'a UnixStream, hub: &'a Hub, member: &'a Member) -> Self {
        Self {
            socket,
            hub,
            id: member.id,
            wake: &member.wake,
            buffer: vec![0; READ_BYTES],
            filled: 0..0,
            taken: 0,
        }
    }

    /// `None` at the end. After an error nothing can be read any more.
    fn next_message(&mut self) -> Result<Option<Value>, Refusal> {
        self.taken = 0;
        // An object ends with its brace, so nothing beyond it was taken, and the next message may have a deserializer
        // of its own.
        let mut json = serde_json::Deserializer::from_reader(&mut *self);
        match Value::deserialize(&mut json) {
            Ok(message) => Ok(Some(message)),
            Err(error) if error.is_eof() => Ok(None),
            Err(error) if error.is_io() && self.taken <= MESSAGE_LIMIT => Ok(None),
            Err(error) => Err(Refusal::generic(&format!("That is no JSON: {error}."))),
        }
    }

    /// Waits until something can be read, and reads it; 0 bytes at the end.
    fn fill(&mut self) -> io::Result<usize> {
        loop {
            let mut wanted = PollFlags::IN;
            if self.hub.flush(self.id) {
                wanted |= PollFlags::OUT;
            }
            let mut descriptors = [PollFd::new(self.socket, wanted), PollFd::new(self.wake, PollFlags::IN)];
            match poll(&mut descriptors, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // Without anything in it this fails at once.
            let _ = rustix::io::read(self.wake, &mut [0; 8]);
            match recv(self.socket, &mut self.buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, length)) => return Ok(length),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.filled.is_empty() {
            self.filled = 0..self.fill()?;
        }
        let length = into.len().min(self.filled.len());
        let from = self.filled.start;
        into[..length].copy_from_slice(&self.buffer[from..from + length]);
        self.filled.start += length;
        self.taken += length;
        if self.taken > MESSAGE_LIMIT {
            return Err(io::Error::other(format!("it has more than {MESSAGE_LIMIT} bytes")));
        }
        Ok(length)
    }
}

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;
/// Longest message, bytes, blanks before it included.
const MESSAGE_LIMIT: usize = 1 << 20;
