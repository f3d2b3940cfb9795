//! A client of the guest's database that keeps a log of its own, outside the guest: what the database has acknowledged as committed.
//!
//! It commits numbered rows by TCP, one after the other, and writes each number down when the server has answered. Since it asks the next one
//! only then, at most one number is in doubt. Later every number of the log has to be in the table.
//!
//! Like a prober it has to be in the client's namespace as a whole process: [`Ledger`] starts this program again in there, as
//! `longhaul lab commits`. That prints a line of JSON once the first row is committed, and one when its standard input ends.

use std::collections::BTreeSet;
use std::io::{BufWriter, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use crate::hypervisor::process::WITH_ITS_PARENT;
use crate::lab::error::LabError;
use crate::lab::prober::monotonic;

#[path = "../../../netem-scripts/guest-src/sql.rs"]
mod sql;

/// Commits numbered rows in the guest's database until its own standard input ends, and logs which were acknowledged; or checks that log
/// against the database.
#[derive(Clone, Debug, clap::Args)]
pub struct CommitsArgs {
    /// Address of the guest.
    #[arg(long, value_name = "IPV4")]
    pub address: Ipv4Addr,
    /// The log: a line for each number, with the time of its acknowledgement.
    #[arg(long, value_name = "FILE")]
    pub log: PathBuf,
    /// Commit nothing: read the log, and everything in the database.
    #[arg(long)]
    pub check: bool,
}

/// What was committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Committed {
    /// Rows whose commit was acknowledged; they have the numbers from 1.
    pub(super) acknowledged: u64,
    /// The longest time between two acknowledgements.
    pub(super) longest_pause_seconds: f64,
}

/// What the database holds, compared with the log and with itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Verdict {
    /// Numbers in the log.
    pub(super) acknowledged: u64,
    /// Of them, how many are not in the database, or not as they were written.
    pub(super) lost: u64,
    /// Numbers in the database that were never acknowledged: the one in doubt when the client ended, at most.
    pub(super) unacknowledged: u64,
    /// Sums of the balances of accounts, tellers and branches, and of what was ever added to them. pgbench keeps them equal.
    pub(super) balances: [i64; 4],
    /// Transactions that pgbench's history has.
    pub(super) history: u64,
    /// Indexes that amcheck found to agree with their tables, every row of them.
    pub(super) indexes: u64,
    /// What amcheck found wrong in tables.
    pub(super) bad_rows: u64,
}

impl Verdict {
    /// Whether the balances are those of whole transactions.
    pub(super) fn is_balanced(&self) -> bool {
        self.balances.iter().all(|sum| *sum == self.balances[0])
    }
}

/// What the process prints.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Line {
    /// The first row is committed.
    Ready,
    /// The end of committing.
    Committed(Committed),
    /// The end of checking.
    Checked(Box<Verdict>),
}

/// The client at work in its namespace. Killed when dropped.
#[derive(Debug)]
pub(super) struct Ledger {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Ledger {
    /// Starts `longhaul` (a path of this program) as a client of `address` in `namespace`, and waits for its first commit.
    pub(super) async fn begin(
        longhaul: &str,
        namespace: &str,
        address: Ipv4Addr,
        log: &Path,
    ) -> Result<Self, LabError> {
        let mut ledger = Self::start(longhaul, namespace, address, log, false)?;
        match ledger.line(PATIENCE).await? {
            Line::Ready => Ok(ledger),
            _ => Err(unexpected()),
        }
    }

    /// Ends the commits; no row is in doubt then.
    pub(super) async fn end(mut self) -> Result<Committed, LabError> {
        drop(self.input);
        let line = next(&mut self.output, PATIENCE).await?;
        self.child.wait().await.map_err(unstarted)?;
        match line {
            Line::Committed(committed) => Ok(committed),
            _ => Err(unexpected()),
        }
    }

    /// Compares the log with the database, and the database with itself.
    pub(super) async fn check(
        longhaul: &str,
        namespace: &str,
        address: Ipv4Addr,
        log: &Path,
    ) -> Result<Verdict, LabError> {
        let mut checking = Self::start(longhaul, namespace, address, log, true)?;
        let line = checking.line(CHECK).await?;
        checking.child.wait().await.map_err(unstarted)?;
        match line {
            Line::Checked(verdict) => Ok(*verdict),
            _ => Err(unexpected()),
        }
    }

    fn start(
        longhaul: &str,
        namespace: &str,
        address: Ipv4Addr,
        log: &Path,
        only_check: bool,
    ) -> Result<Self, LabError> {
        let mut child = Command::new("ip")
            .args(["netns", "exec", namespace])
            .args(WITH_ITS_PARENT)
            .args([longhaul, "lab", "commits", "--address", &address.to_string(), "--log"])
            .arg(log)
            .args(only_check.then_some("--check"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for the lab, which then ends it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(unstarted)?;
        let input = child.stdin.take().expect("the input is a pipe");
        let output = child.stdout.take().expect("the output is a pipe");
        Ok(Self {
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    async fn line(&mut self, patience: Duration) -> Result<Line, LabError> {
        next(&mut self.output, patience).await
    }
}

async fn next(output: &mut Lines<BufReader<ChildStdout>>, patience: Duration) -> Result<Line, LabError> {
    let line = timeout(patience, output.next_line()).await;
    let line = line.map_err(|_| LabError::Client {
        said: format!("it said nothing for {} s", patience.as_secs()),
    })?;
    let line = line.map_err(unstarted)?.ok_or_else(|| LabError::Client {
        said: "it ended; its reason is above".to_owned(),
    })?;
    serde_json::from_str(&line).map_err(|_| LabError::Client { said: line })
}

fn unstarted(source: std::io::Error) -> LabError {
    LabError::Client {
        said: format!("it cannot be run: {source}"),
    }
}

fn unexpected() -> LabError {
    LabError::Client {
        said: "it said something out of turn".to_owned(),
    }
}

/// `longhaul lab commits`. Exit code 0: done; 1: the database failed it.
pub(in crate::lab) async fn run(args: CommitsArgs) -> u8 {
    let work = move || if args.check { check(&args) } else { commit(&args) };
    let done = tokio::task::spawn_blocking(work).await;
    match done.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(line) => {
            print(&line);
            0
        }
        Err(problem) => {
            eprintln!("longhaul: the client of the database: {problem}");
            1
        }
    }
}

fn print(line: &Line) {
    let text = serde_json::to_string(line).expect("a line of the client is JSON");
    // A reader that has gone is no reason to end otherwise.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Begins a session as soon as the server takes one.
fn connect(address: Ipv4Addr) -> Result<sql::Session<TcpStream>, String> {
    let server = SocketAddr::from((address, PORT));
    let deadline = monotonic() + PATIENCE;
    loop {
        let begun = TcpStream::connect_timeout(&server, SILENCE)
            .and_then(|stream| {
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(CHECK))?;
                Ok(stream)
            })
            .map_err(|error| format!("{server}: {error}"))
            .and_then(sql::Session::begin);
        match begun {
            Err(error) if monotonic() > deadline || !is_too_early(&error) => return Err(error),
            Err(_) => {
                wait_for_the_end(PACE);
            }
            Ok(session) => return Ok(session),
        }
    }
}

/// Nobody listens, or says that it does not take sessions yet.
fn is_too_early(error: &str) -> bool {
    error.contains(sql::STARTING) || !error.contains("postgres answers")
}

/// Commits until standard input ends.
fn commit(args: &CommitsArgs) -> Result<Line, String> {
    let unwritable = |error| format!("{}: {error}", args.log.display());
    let mut log = BufWriter::new(std::fs::File::create(&args.log).map_err(unwritable)?);
    let mut session = connect(args.address)?;
    session.query(&format!(
        "CREATE TABLE {TABLE} (number bigint PRIMARY KEY, digest text NOT NULL)"
    ))?;
    let mut committed = Committed::default();
    let mut previous = None;
    loop {
        let number = committed.acknowledged + 1;
        session
            .query(&format!("INSERT INTO {TABLE} VALUES ({number}, md5('{number}'))"))
            .map_err(|error| format!("the commit of number {number}: {error}"))?;
        let now = monotonic().as_secs_f64();
        writeln!(log, "{number} {now:.6}")
            .and_then(|()| log.flush())
            .map_err(unwritable)?;
        committed.acknowledged = number;
        let pause = previous.map_or(0.0, |previous| now - previous);
        committed.longest_pause_seconds = committed.longest_pause_seconds.max(pause);
        previous = Some(now);
        if number == 1 {
            print(&Line::Ready);
        }
        if wait_for_the_end(PACE) {
            return Ok(Line::Committed(committed));
        }
    }
}

/// Whether standard input ended within `patience`; otherwise that has passed.
fn wait_for_the_end(patience: Duration) -> bool {
    let input = std::io::stdin();
    let mut descriptors = [PollFd::new(&input, PollFlags::IN)];
    let patience = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(patience.subsec_nanos()),
    };
    poll(&mut descriptors, Some(&patience)).is_ok_and(|ready| ready > 0)
}

/// Reads the log and the database.
fn check(args: &CommitsArgs) -> Result<Line, String> {
    let text = std::fs::read_to_string(&args.log).map_err(|error| format!("{}: {error}", args.log.display()))?;
    let log: BTreeSet<u64> = text.lines().filter_map(number_of).collect();
    let mut session = connect(args.address)?;
    let rows = session.query(&format!("SELECT number FROM {TABLE} WHERE digest = md5(number::text)"))?;
    let table: BTreeSet<u64> = rows.iter().filter_map(|row| row.first()?.parse().ok()).collect();
    let sums = session.query(
        "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
         (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history), \
         (SELECT count(*) FROM pgbench_history)",
    )?;
    let sums: Option<Vec<i64>> = sums
        .first()
        .and_then(|row| row.iter().map(|value| value.parse().ok()).collect());
    let Some(&[accounts, tellers, branches, history, transactions]) = sums.as_deref() else {
        return Err("the balances are no five numbers".to_owned());
    };
    session.query("CREATE EXTENSION IF NOT EXISTS amcheck")?;
    // An index that does not agree with its table is an error of the statement.
    let indexes = session.query(
        "SELECT bt_index_check(index => i.oid, heapallindexed => true) FROM pg_class i JOIN pg_am a ON a.oid = i.relam \
         WHERE a.amname = 'btree' AND i.relkind = 'i' AND i.relpersistence = 'p'",
    )?;
    let bad_rows = session.query(
        "SELECT t.relname, v.msg FROM pg_class t, LATERAL verify_heapam(t.oid) v \
         WHERE t.relkind IN ('r', 't', 'm') AND t.relpersistence = 'p'",
    )?;
    Ok(Line::Checked(Box::new(Verdict {
        acknowledged: log.len() as u64,
        lost: log.difference(&table).count() as u64,
        unacknowledged: table.difference(&log).count() as u64,
        balances: [accounts, tellers, branches, history],
        history: transactions.unsigned_abs(),
        indexes: indexes.len() as u64,
        bad_rows: bad_rows.len() as u64,
    })))
}

fn number_of(line: &str) -> Option<u64> {
    line.split(' ').next()?.parse().ok()
}

const PORT: u16 = 5432;
const TABLE: &str = "acknowledged_outside";
/// Between an acknowledgement and the next row: the database is pgbench's.
const PACE: Duration = Duration::from_millis(20);
/// How long a server may be silent that is asked for a session.
const SILENCE: Duration = Duration::from_secs(1);
/// Until the database is filled, which takes a minute or two under TCG.
const PATIENCE: Duration = Duration::from_secs(300);
/// Reading all of the database takes some seconds under TCG.
const CHECK: Duration = Duration::from_secs(300);
