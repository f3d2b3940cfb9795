//! The guest's signs of life, told on a socket, and answers to whoever asks there whether its memory is right.
//!
//! ```text
//! ▶ beat SIGNS WRITTEN CHECKED BAD        each time the guest makes a sign; numbers of all its vCPUs
//! ◀ verify TOKEN                          every page of the working set is looked at, while the guest is held
//! ▶ verified TOKEN PAGES BAD WRITTEN
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use super::Counters;
use super::check::{CheckError, verify};
use super::dials::Dials;
use super::machine::Machine;
use crate::hypervisor::kvm::memory::GuestRam;
use crate::hypervisor::kvm::monitor::listener::{ListenError, Listener};

/// Whoever listens. Dropping it closes the socket and removes it.
pub(super) struct Heartbeat {
    listener: Arc<Listener>,
    told: Arc<Told>,
    acceptor: Option<JoinHandle<()>>,
}

/// Shared by those who tell and those who are told.
pub(super) struct Told {
    ram: GuestRam,
    clients: Mutex<Vec<Client>>,
    is_over: AtomicBool,
}

/// One who listens, by a number of its own.
struct Client(u64, UnixStream);

impl Heartbeat {
    /// Serves `path`. The guest is held where somebody asks for a look at its memory.
    pub(super) fn serve(path: &Path, ram: GuestRam, machine: Weak<Machine>) -> Result<Self, ListenError> {
        let listener = Arc::new(Listener::new(path)?);
        let told = Arc::new(Told {
            ram,
            clients: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        let (accepting, telling) = (Arc::clone(&listener), Arc::clone(&told));
        let thread = Builder::new().name("heartbeat".to_owned());
        let acceptor = thread.spawn(move || accept(&accepting, &telling, &machine));
        let acceptor = acceptor.map_err(|source| ListenError::System {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            listener,
            told,
            acceptor: Some(acceptor),
        })
    }

    pub(super) fn told(&self) -> Arc<Told> {
        Arc::clone(&self.told)
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        self.told.is_over.store(true, Ordering::SeqCst);
        self.listener.close();
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        // Nobody comes any more; their threads end by this.
        self.told.lock().iter().for_each(Client::close);
    }
}

impl Told {
    /// The guest has made a sign of life. Does not wait: one who does not read is let go.
    pub(super) fn sign(&self) {
        let mut clients = self.lock();
        if clients.is_empty() {
            return;
        }
        let Counters {
            signs, pages, errors, ..
        } = Counters::of(&self.ram);
        let line = format!("beat {signs} {pages} {pages} {errors}\n");
        for client in clients.iter_mut() {
            client.tell(&line);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Client>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a look at the guest's memory finds.
    fn verified(&self, token: u64, machine: &Machine) -> String {
        let _held = machine.hold();
        let Counters { pages, errors, .. } = Counters::of(&self.ram);
        let looked = match Dials::of(&self.ram) {
            Some((dials, _)) => verify(&self.ram, &dials),
            None => Err(CheckError::NoGuest),
        };
        let (checked, bad) = match looked {
            Ok(checked) => (checked, errors),
            Err(error) => {
                tracing::error!("{error}");
                (0, errors.wrapping_add(1))
            }
        };
        format!("verified {token} {checked} {bad} {pages}\n")
    }
}

impl Client {
    /// Ends where not all of it is taken at once: what comes after half a line would be misread.
    fn tell(&mut self, line: &str) {
        let told = self.1.write(line.as_bytes());
        if !told.is_ok_and(|written| written == line.len()) {
            self.close();
        }
    }

    fn close(&self) {
        // It fails where it has gone.
        let _ = self.1.shutdown(Shutdown::Both);
    }
}

fn accept(listener: &Listener, told: &Arc<Told>, machine: &Weak<Machine>) {
    let mut number = 0;
    while !told.is_over.load(Ordering::SeqCst) {
        let Ok(client) = listener.accept() else {
            // There may be no descriptor left for a while.
            std::thread::park_timeout(ACCEPT_PAUSE);
            continue;
        };
        let Ok((reader, teller)) = split(&client) else { continue };
        number += 1;
        {
            let mut clients = told.lock();
            if clients.len() == MOST_CLIENTS {
                tracing::warn!("the guest's signs of life have as many listeners as they may have");
                continue;
            }
            clients.push(Client(number, teller));
        }
        let (telling, machine) = (Arc::clone(told), Weak::clone(machine));
        let thread = Builder::new().name("heartbeat client".to_owned());
        let serve = move || {
            answer(reader, &telling, &machine, number);
            telling.lock().retain(|client| client.0 != number);
        };
        if let Err(error) = thread.spawn(serve) {
            tracing::warn!(%error, "nobody answers a listener to the guest's signs of life");
            told.lock().retain(|client| client.0 != number);
        }
    }
}

/// A socket to read from, and one that never waits to be written to.
fn split(client: &UnixStream) -> io::Result<(UnixStream, UnixStream)> {
    client.set_nonblocking(true)?;
    Ok((client.try_clone()?, client.try_clone()?))
}

/// Answers a client until it goes.
fn answer(reader: UnixStream, told: &Told, machine: &Weak<Machine>, number: u64) {
    let mut reader = BufReader::new(Waiting(reader));
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = reader.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line);
        if !matches!(read, Ok(1..)) || line.last() != Some(&b'\n') {
            return;
        }
        let asked = std::str::from_utf8(&line)
            .ok()
            .and_then(|line| line.trim_end().strip_prefix("verify "));
        let Some(token) = asked.and_then(|token| token.parse().ok()) else {
            continue;
        };
        let Some(machine) = machine.upgrade() else { return };
        let answer = told.verified(token, &machine);
        let mut clients = told.lock();
        if let Some(client) = clients.iter_mut().find(|client| client.0 == number) {
            client.tell(&answer);
        }
    }
}

/// Waits for what there is to read on a socket that does not wait.
struct Waiting(UnixStream);

impl Read for Waiting {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        use rustix::event::{PollFd, PollFlags, poll};
        loop {
            match self.0.read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// After a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const MOST_CLIENTS: usize = 16;
const LONGEST_LINE: u64 = 100;
