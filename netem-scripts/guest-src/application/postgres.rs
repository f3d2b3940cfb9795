//! PostgreSQL with the tables that pgbench makes, of scale 2 (200 000 accounts, 30 MB). An operation is pgbench's own transaction, "TPC-B (sort
//! of)", of seven statements. It is asked by this program and not by pgbench, which tells of single transactions only through a buffer.

use std::io::{BufReader, Read, Write};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Load, broken, complete, connect, serve};
use crate::content::Random;

pub(super) struct Postgres {
    stream: BufReader<UnixStream>,
    random: Random,
}

impl Postgres {
    pub(super) fn start() -> Result<Self, String> {
        let programs = programs()?;
        // The server refuses to run as root.
        for directory in [DATA, SOCKETS] {
            std::fs::create_dir_all(directory)
                .and_then(|()| chown(directory, Some(USER), Some(USER)))
                .map_err(|error| format!("{directory}: {error}"))?;
        }
        let as_user = |name: &str| {
            let mut command = Command::new(programs.join(name));
            // Without TZ initdb compares the clock with every zone there is.
            command
                .uid(USER)
                .gid(USER)
                .current_dir("/")
                .env("TZ", "UTC")
                .env("LC_ALL", "C");
            command
        };
        complete(as_user("initdb").args(["-D", DATA, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]))?;
        let mut server = serve(as_user("postgres").args(["-D", DATA, "-c", "listen_addresses="]).args([
            "-c",
            "unix_socket_directories=/run/postgresql",
            "-c",
            "shared_buffers=48MB",
            // The image has no LLVM.
            "-c",
            "jit=off",
        ]))?;
        let socket = Path::new(SOCKETS).join(".s.PGSQL.5432");
        // Ready is who answers a start-up with that; one that still starts says so and closes.
        loop {
            let stream = connect(&mut server, &socket)?;
            let mut postgres = Self {
                stream: BufReader::new(stream),
                random: Random(SEED),
            };
            match postgres.log_in() {
                Ok(()) => break,
                Err(error) if error.contains("57P03") => std::thread::sleep(std::time::Duration::from_millis(50)),
                Err(error) => return Err(error),
            }
        }
        complete(as_user("pgbench").args([
            "-i",
            "-q",
            "-s",
            &SCALE.to_string(),
            "-h",
            SOCKETS,
            "-U",
            "postgres",
            "postgres",
        ]))?;
        let mut postgres = Self {
            stream: BufReader::new(connect(&mut server, &socket)?),
            random: Random(SEED),
        };
        postgres.log_in()?;
        Ok(postgres)
    }

    /// The start-up message of protocol 3.0, and what follows until the server takes queries.
    fn log_in(&mut self) -> Result<(), String> {
        let parameters = b"user\0postgres\0database\0postgres\0\0";
        let mut message = (parameters.len() as u32 + 8).to_be_bytes().to_vec();
        message.extend(196_608_u32.to_be_bytes());
        message.extend(parameters);
        self.stream.get_mut().write_all(&message).map_err(broken("postgres"))?;
        self.until_ready()
    }

    /// Asks one statement by the simple query protocol.
    fn query(&mut self, statement: &str) -> Result<(), String> {
        let mut message = vec![b'Q'];
        message.extend((statement.len() as u32 + 5).to_be_bytes());
        message.extend(statement.as_bytes());
        message.push(0);
        self.stream.get_mut().write_all(&message).map_err(broken("postgres"))?;
        self.until_ready()
    }

    /// Reads messages up to ReadyForQuery.
    fn until_ready(&mut self) -> Result<(), String> {
        let mut error = None;
        loop {
            let mut head = [0; 5];
            match self.stream.read_exact(&mut head) {
                Ok(()) => {}
                Err(problem) => return Err(error.unwrap_or_else(|| broken("postgres")(problem))),
            }
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let mut body = vec![0; length.saturating_sub(4)];
            self.stream.read_exact(&mut body).map_err(broken("postgres"))?;
            match head[0] {
                b'Z' => return error.map_or(Ok(()), Err),
                b'E' => {
                    error = Some(format!(
                        "postgres answers: {}",
                        String::from_utf8_lossy(&body).replace('\0', " ")
                    ))
                }
                _ => {}
            }
        }
    }
}

impl Load for Postgres {
    fn operate(&mut self) -> Result<(), String> {
        let account = 1 + self.random.below(100_000 * SCALE);
        let teller = 1 + self.random.below(10 * SCALE);
        let branch = 1 + self.random.below(SCALE);
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
            self.query(&statement)?;
        }
        Ok(())
    }
}

/// The directory of the server's programs, whatever its version is.
fn programs() -> Result<PathBuf, String> {
    let versions =
        std::fs::read_dir("/usr/lib/postgresql").map_err(|error| format!("PostgreSQL is missing: {error}"))?;
    let mut found = versions.flatten().map(|version| version.path().join("bin"));
    found.next().ok_or("PostgreSQL is missing".to_owned())
}

const DATA: &str = "/var/lib/postgresql/data";
const SOCKETS: &str = "/run/postgresql";
/// As in /etc/passwd, which netem-scripts/guest writes.
const USER: u32 = 100;
const SEED: u64 = 1;
const SCALE: u64 = 2;
