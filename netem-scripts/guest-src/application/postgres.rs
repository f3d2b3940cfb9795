//! PostgreSQL with the tables that pgbench makes, of scale 2 (200 000 accounts, 30 MB). An operation is pgbench's own transaction, "TPC-B (sort
//! of)", of seven statements. It is asked by this program and not by pgbench, which tells of single transactions only through a buffer.
//!
//! Where the machine has a disk, the data is on it, with checksums and five times the accounts, and clients of the guest's network are
//! served too. It can then be told to rest and to wake ([`Postgres::obey`]), so that what is on the disk can be looked at.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use super::{Load, complete, connect, output, serve};
use crate::content::Random;
use crate::sql::{STARTING, Session};

pub(super) struct Postgres {
    programs: PathBuf,
    /// The data is on it, and outlives the server.
    has_disk: bool,
    /// `None`: stopped.
    running: Option<(Child, Session<UnixStream>)>,
    random: Random,
    scale: u64,
    /// Transactions whose end was acknowledged.
    acknowledged: u64,
}

impl Postgres {
    pub(super) fn start() -> Result<Self, String> {
        let has_disk = Path::new(DISK).exists();
        let mut postgres = Self {
            programs: programs()?,
            has_disk,
            running: None,
            random: Random(SEED),
            scale: if has_disk { SCALE_ON_DISK } else { SCALE },
            acknowledged: 0,
        };
        std::fs::create_dir_all(HOME).map_err(|error| format!("{HOME}: {error}"))?;
        if has_disk {
            mount()?;
        }
        // The server refuses to run as root.
        for directory in [DATA, SOCKETS] {
            std::fs::create_dir_all(directory)
                .and_then(|()| chown(directory, Some(USER), Some(USER)))
                .map_err(|error| format!("{directory}: {error}"))?;
        }
        let lasting = if has_disk { "--data-checksums" } else { "--no-sync" };
        let initdb = ["-D", DATA, "-U", "postgres", "-A", "trust", "-E", "UTF8", lasting];
        complete(postgres.command("initdb").args(initdb))?;
        if has_disk {
            admit_clients()?;
        }
        postgres.serve()?;
        let scale = postgres.scale.to_string();
        let fill = ["-i", "-q", "-s", &scale, "-h", SOCKETS, "-U", "postgres", "postgres"];
        complete(postgres.command("pgbench").args(fill))?;
        Ok(postgres)
    }

    /// A program of PostgreSQL, as its user.
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        // Without TZ initdb compares the clock with every zone there is.
        command
            .uid(USER)
            .gid(USER)
            .current_dir("/")
            .env("TZ", "UTC")
            .env("LC_ALL", "C");
        command
    }

    /// Starts the server and begins a session as soon as it takes one.
    fn serve(&mut self) -> Result<(), String> {
        // Who comes by the network finds what is on the disk.
        let addresses = if self.has_disk {
            "listen_addresses=*"
        } else {
            "listen_addresses="
        };
        let mut server = serve(self.command("postgres").args(["-D", DATA, "-c", addresses]).args([
            "-c",
            "unix_socket_directories=/run/postgresql",
            "-c",
            "shared_buffers=48MB",
            // The image has no LLVM.
            "-c",
            "jit=off",
        ]))?;
        let socket = Path::new(SOCKETS).join(".s.PGSQL.5432");
        let session = loop {
            match Session::begin(connect(&mut server, &socket)?) {
                Ok(session) => break session,
                Err(error) if error.contains(STARTING) => std::thread::sleep(Duration::from_millis(50)),
                Err(error) => return Err(error),
            }
        };
        self.running = Some((server, session));
        Ok(())
    }

    /// Stops the server and takes the disk away from the file system, which has then written everything.
    fn rest(&mut self) -> Result<String, String> {
        let (mut server, session) = self.running.take().ok_or("the server is stopped already")?;
        drop(session);
        complete(
            self.command("pg_ctl")
                .args(["stop", "-D", DATA, "-m", "fast", "-w", "-t", "300"]),
        )?;
        let ended = server.wait().map_err(|error| format!("the server: {error}"))?;
        if !ended.success() {
            return Err(format!("the server ended: {ended}"));
        }
        complete(Command::new("/bin/busybox").args(["umount", HOME]))?;
        Ok(format!("transactions {}", self.acknowledged))
    }

    /// Reads everything again from the disk, checksums first, and serves it.
    fn wake(&mut self) -> Result<String, String> {
        mount()?;
        let said = output(self.command("pg_checksums").args(["--check", "-D", DATA]))?;
        let number = |name: &str| {
            let value = said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.map(str::trim).ok_or(format!("pg_checksums says no {name}"))
        };
        let (blocks, bad) = (number("Blocks scanned")?, number("Bad checksums")?);
        self.serve()?;
        Ok(format!("blocks {blocks} bad {bad}"))
    }
}

impl Load for Postgres {
    fn operate(&mut self) -> Result<(), String> {
        let (_, session) = self.running.as_mut().ok_or("the server is stopped")?;
        let account = 1 + self.random.below(100_000 * self.scale);
        let teller = 1 + self.random.below(10 * self.scale);
        let branch = 1 + self.random.below(self.scale);
        let delta = self.random.below(10_001) as i64 - 5_000;
        for statement in [
            "BEGIN".to_owned(),
            format!("UPDATE pgbench_accounts SET abalance = abalance + {delta} WHERE aid = {account}"),
            format!("SELECT abalance FROM pgbench_accounts WHERE aid = {account}"),
            format!("UPDATE pgbench_tellers SET tbalance = tbalance + {delta} WHERE tid = {teller}"),
            format!("UPDATE pgbench_branches SET bbalance = bbalance + {delta} WHERE bid = {branch}"),
            format!(
                "INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) \
                 VALUES ({teller}, {branch}, {account}, {delta}, CURRENT_TIMESTAMP)"
            ),
            "END".to_owned(),
        ] {
            session.query(&statement)?;
        }
        self.acknowledged += 1;
        Ok(())
    }

    /// `rest`: the database is on the disk and nothing writes there; `wake`: it is served again, by what is on the disk; `end`: the machine is
    /// switched off.
    fn obey(&mut self, word: &str) -> Result<String, String> {
        match word {
            "rest" if self.has_disk => self.rest(),
            "wake" if self.has_disk => self.wake(),
            "end" => complete(Command::new("/bin/busybox").args(["poweroff", "-f"])).map(|()| String::new()),
            _ => Err(format!("there is no {word} here")),
        }
    }
}

/// The directory of the server's programs, whatever its version is.
fn programs() -> Result<PathBuf, String> {
    let versions =
        std::fs::read_dir("/usr/lib/postgresql").map_err(|error| format!("PostgreSQL is missing: {error}"))?;
    let mut found = versions.flatten().map(|version| version.path().join("bin"));
    found.next().ok_or("PostgreSQL is missing".to_owned())
}

/// Mounts the disk, which outside has made a file system.
fn mount() -> Result<(), String> {
    complete(Command::new("/bin/busybox").args(["mount", "-t", "ext4", DISK, HOME]))
}

/// Lets who is in the guest's own network in.
fn admit_clients() -> Result<(), String> {
    let file = format!("{DATA}/pg_hba.conf");
    let added = OpenOptions::new()
        .append(true)
        .open(&file)
        .and_then(|mut rules| rules.write_all(b"host all all samenet trust\n"));
    added.map_err(|error| format!("{file}: {error}"))
}

const DISK: &str = "/dev/vda";
const HOME: &str = "/var/lib/postgresql";
const DATA: &str = "/var/lib/postgresql/data";
const SOCKETS: &str = "/run/postgresql";
/// As in /etc/passwd, which netem-scripts/guest writes.
const USER: u32 = 100;
const SEED: u64 = 1;
const SCALE: u64 = 2;
/// 500 000 accounts: what is on a disk need not fit into the server's own memory.
const SCALE_ON_DISK: u64 = 5;
