//! What is said to the sessions of a monitor: answers to one, events to all.
//!
//! Saying never waits. What a socket does not take is kept up to a bound, and a session that exceeds it is ended: who
//! does not read must not hold up the guest or anybody else. What must not be missed (`RESUME`) is in the sockets when
//! the call returns, or the session has ended, which its reader sees behind what it was told before.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendFlags, send};

/// All sessions.
#[derive(Debug, Default)]
pub(super) struct Hub {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sessions: HashMap<u64, Outgoing>,
    next: u64,
    is_closed: bool,
}

/// What is on its way to one session.
#[derive(Debug)]
struct Outgoing {
    socket: Arc<UnixStream>,
    rest: VecDeque<u8>,
    wake: Arc<OwnedFd>,
    hears_events: bool,
}

/// A session's place.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) id: u64,
    /// Readable when something is left to be written.
    pub(super) wake: Arc<OwnedFd>,
}

/// Whether an event may be late at those who do not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// It may wait in this process.
    Eventual,
    /// It is in the socket, or the session ends.
    Now,
}

impl Hub {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a session in. `None`: there are too many, or the monitor has been closed.
    pub(super) fn join(&self, socket: &Arc<UnixStream>) -> Option<Member> {
        let mut inner = self.lock();
        if inner.is_closed || inner.sessions.len() >= MOST_SESSIONS {
            return None;
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()?;
        let wake = Arc::new(wake);
        inner.next += 1;
        let id = inner.next;
        let outgoing = Outgoing {
            socket: Arc::clone(socket),
            rest: VecDeque::new(),
            wake: Arc::clone(&wake),
            hears_events: false,
        };
        inner.sessions.insert(id, outgoing);
        Some(Member { id, wake })
    }

    /// From now on it hears events.
    pub(super) fn hear_events(&self, id: u64) {
        if let Some(session) = self.lock().sessions.get_mut(&id) {
            session.hears_events = true;
        }
    }

    /// Says something to one session.
    pub(super) fn say(&self, id: u64, message: &[u8]) {
        let mut inner = self.lock();
        if let Some(session) = inner.sessions.get_mut(&id)
            && !session.push(message, Delivery::Eventual)
        {
            inner.end(id);
        }
    }

    /// Says something to all sessions that hear events.
    pub(super) fn tell(&self, message: &[u8], delivery: Delivery) {
        let mut inner = self.lock();
        inner.sessions.retain(|_, session| {
            let stays = !session.hears_events || session.push(message, delivery);
            if !stays {
                session.end();
            }
            stays
        });
    }

    /// Writes what the socket takes now, and gives back whether something is left.
    pub(super) fn flush(&self, id: u64) -> bool {
        let mut inner = self.lock();
        let Some(session) = inner.sessions.get_mut(&id) else {
            return false;
        };
        if session.flush() {
            return !session.rest.is_empty();
        }
        inner.end(id);
        false
    }

    /// Ends a session. Fine if it has ended.
    pub(super) fn leave(&self, id: u64) {
        self.lock().end(id);
    }

    /// Ends all, and takes no more in.
    pub(super) fn close(&self) {
        let mut inner = self.lock();
        inner.is_closed = true;
        inner.sessions.drain().for_each(|(_, session)| session.end());
    }
}

impl Inner {
    fn end(&mut self, id: u64) {
        if let Some(session) = self.sessions.remove(&id) {
            session.end();
        }
    }
}

impl Outgoing {
    /// Gives back whether the session may go on.
    fn push(&mut self, message: &[u8], delivery: Delivery) -> bool {
        if self.rest.len() + message.len() > MOST_WAITING_BYTES {
            return false;
        }
        self.rest.extend(message);
        if !self.flush() {
            return false;
        }
        if self.rest.is_empty() {
            return true;
        }
        // It cannot fail before it was written 2^64 times and never read.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        delivery == Delivery::Eventual
    }

    /// Gives back whether the socket is still there.
    fn flush(&mut self) -> bool {
        while !self.rest.is_empty() {
            let (front, _) = self.rest.as_slices();
            match send(&*self.socket, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(written) => drop(self.rest.drain(..written)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => break,
                Err(_) => return false,
            }
        }
        true
    }

    fn end(&self) {
        // It fails where the other side has gone already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Sessions at a time.
const MOST_SESSIONS: usize = 32;
/// Bytes that may wait for one session beside what its socket holds.
const MOST_WAITING_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn session(hub: &Hub) -> (u64, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let member = hub.join(&Arc::new(ours)).unwrap();
        hub.hear_events(member.id);
        (member.id, theirs)
    }

    /// Says so much that the socket is full and something waits.
    fn fill(hub: &Hub, id: u64) -> usize {
        let mut said = 0;
        while !hub.flush(id) {
            hub.say(id, &[b' '; 4096]);
            said += 4096;
        }
        said
    }

    #[test]
    fn who_does_not_read_is_dropped_at_the_bound_and_holds_up_nobody() {
        let hub = Hub::default();
        let (slow, mut to_slow) = session(&hub);
        let (_, mut to_other) = session(&hub);
        fill(&hub, slow);
        let mut told = 0;
        while hub.lock().sessions.contains_key(&slow) {
            hub.tell(&[b'e'; 1000], Delivery::Eventual);
            told += 1000;
            let mut heard = [0; 1000];
            to_other.read_exact(&mut heard).unwrap();
            assert!(told <= MOST_WAITING_BYTES + 1000);
        }
        // What it was told before is there, and then the end.
        assert!(to_slow.read_to_end(&mut Vec::new()).unwrap() > 0);
    }

    #[test]
    fn what_must_be_heard_now_is_in_the_socket_or_the_session_has_ended() {
        let hub = Hub::default();
        let (slow, mut to_slow) = session(&hub);
        let (other, mut to_other) = session(&hub);
        let said = fill(&hub, slow);
        hub.tell(b"RESUME", Delivery::Now);
        to_other.set_nonblocking(true).unwrap();
        let mut heard = [0; 6];
        to_other.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"RESUME");
        let mut all = Vec::new();
        to_slow.read_to_end(&mut all).unwrap();
        assert!(all.len() < said + 6);
        assert!(hub.lock().sessions.contains_key(&other));
        assert!(!hub.lock().sessions.contains_key(&slow));
    }

    #[test]
    fn so_many_sessions_and_no_more() {
        let hub = Hub::default();
        let mut ends: Vec<_> = (0..MOST_SESSIONS).map(|_| session(&hub)).collect();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let ours = Arc::new(ours);
        assert!(hub.join(&ours).is_none());
        let (id, _end) = ends.pop().unwrap();
        hub.leave(id);
        assert!(hub.join(&ours).is_some());
        hub.close();
        hub.leave(id);
        assert!(hub.join(&ours).is_none());
    }
}
