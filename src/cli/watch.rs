//! Looks on at a migration until its report: shows progress, passes Ctrl-C on, waits for a gateway that restarts.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::output::OutputArgs;
use super::progress::Display;
use super::{Failure, report};
use crate::api::{Cancellation, Client, ClientError, Event, Following, Phase, RefusalKind, Where};
use crate::config::units::parse_duration;
use crate::proto::page::MigrationId;

/// What Ctrl-C means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interrupt {
    /// The migration is cancelled.
    Cancels,
    /// Only the looking on ends.
    Detaches,
}

/// How long a gateway may be away.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct PatienceArgs {
    /// How long to wait for a gateway that went away, before saying that it is not known where the VM is.
    #[arg(long = "wait-for-gateway", value_name = "DURATION", value_parser = parse_duration, default_value = "60s")]
    wait: Duration,
}

/// The signals that concern a migration. Created before it starts, so that none is missed.
#[derive(Debug)]
pub(super) struct Signals {
    interrupt: Signal,
    hangup: Signal,
    terminate: Signal,
}

impl Signals {
    pub(super) fn listen() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(|error| Failure::no(format!("cannot listen to signals: {error}")));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.interrupt.recv() => Told::Interrupt,
            _ = self.hangup.recv() => Told::Leave,
            _ = self.terminate.recv() => Told::Leave,
        }
    }
}

/// What a signal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// Ctrl-C.
    Interrupt,
    /// The terminal is lost, or the command is to end.
    Leave,
}

/// Looks on until the migration has ended, and gives the exit code that says where the VM is.
pub(super) async fn watch(
    client: Client,
    migration: MigrationId,
    mut signals: Signals,
    interrupt: Interrupt,
    patience: PatienceArgs,
    output: OutputArgs,
) -> Result<u8, Failure> {
    let mut display = Display::on_stderr();
    let mut watcher = Watcher {
        client: client.clone(),
        migration,
        following: None,
        tries: 0,
        is_absent: false,
        seen: false,
        patience,
    };
    let (answers, mut answer) = mpsc::channel(1);
    let (mut cancelling, mut wanted_to_stay) = (false, false);
    loop {
        tokio::select! {
            event = watcher.next(&display) => match event? {
                Event::Progress(progress) => display.progress(&progress),
                Event::Notice(text) => display.notice(&text),
                Event::Report(report) => {
                    if let Some(next) = report.continued_as {
                        display.notice(&format!("{}; begun again as migration {next}", report.reason));
                        display.begin_again();
                        watcher.turn_to(next);
                        cancelling = wanted_to_stay;
                        if wanted_to_stay {
                            // It was asked for before this one was there.
                            request_cancel(&client, next, &answers);
                        }
                        continue;
                    }
                    display.clear();
                    output.result(&*report, report::text);
                    return Ok(report.outcome.vm_is().exit_code());
                }
            },
            Some(()) = signals.interrupt.recv() => match (interrupt, cancelling) {
                (Interrupt::Detaches, _) => return Err(detached(&display, watcher.migration)),
                (Interrupt::Cancels, true) => display.notice("it is already being cancelled"),
                (Interrupt::Cancels, false) => {
                    (cancelling, wanted_to_stay) = (true, true);
                    display.notice("cancelling; the VM stays at the source");
                    request_cancel(&client, watcher.migration, &answers);
                }
            },
            Some((of, answer)) = answer.recv() => match answer {
                // Of the one before.
                _ if of != watcher.migration => {}
                Ok(Cancellation::Requested) => {}
                Ok(Cancellation::AlreadyRequested) => display.notice("it was already being cancelled"),
                Err(error) => {
                    // A later Ctrl-C may ask again.
                    cancelling = false;
                    display.notice(&format!("not cancelled: {error}"));
                }
            },
            Some(()) = signals.hangup.recv() => return Err(detached(&display, watcher.migration)),
            Some(()) = signals.terminate.recv() => return Err(detached(&display, watcher.migration)),
        }
    }
}

/// Whoever waits for signals does not wait for the answer.
fn request_cancel(client: &Client, migration: MigrationId, answers: &mpsc::Sender<Answer>) {
    let (client, answers) = (client.clone(), answers.clone());
    tokio::spawn(async move { answers.send((migration, client.cancel(migration).await)).await });
}

/// What was said to a cancellation, and of which migration.
type Answer = (MigrationId, Result<Cancellation, ClientError>);

fn detached(display: &Display, migration: MigrationId) -> Failure {
    display.clear();
    Failure::unknown(format!(
        "detached; the migration goes on, `longhaul attach {migration}` shows it again"
    ))
}

/// Follows one migration across restarts of the gateway.
struct Watcher {
    client: Client,
    migration: MigrationId,
    following: Option<Following>,
    /// Tries to hear of the migration since the gateway last told something.
    tries: u32,
    /// It has been said that the gateway is gone.
    is_absent: bool,
    /// Whether the gateway has ever answered.
    seen: bool,
    patience: PatienceArgs,
}

impl Watcher {
    /// From now on another one is followed, which the gateway has begun in place of the one before.
    fn turn_to(&mut self, migration: MigrationId) {
        (self.migration, self.following) = (migration, None);
        (self.tries, self.is_absent) = (0, false);
    }

    /// The next event. Cancel-safe: what has been tried is kept in `self`.
    async fn next(&mut self, display: &Display) -> Result<Event, Failure> {
        loop {
            if let Some(following) = &mut self.following {
                match following.next().await {
                    Ok(Some(event)) => {
                        (self.tries, self.is_absent) = (0, false);
                        return Ok(event);
                    }
                    Ok(None) => {
                        self.following = None;
                        if let Some(event) = self.ended().await? {
                            return Ok(event);
                        }
                        self.note_absence(display);
                    }
                    Err(ClientError::Lost { .. }) => {
                        self.following = None;
                        self.note_absence(display);
                    }
                    Err(error) => return Err(self.lost_sight(&error)),
                }
            }
            if self.tries > 0 {
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
            self.tries += 1;
            match self.client.follow(self.migration).await {
                Ok(_) if self.is_out_of_patience() => {
                    return Err(self.lost_sight(&"the gateway answers and tells nothing of the migration"));
                }
                Ok(following) => {
                    self.following = Some(following);
                    self.seen = true;
                }
                Err(error @ ClientError::Refused(_)) if !self.seen => return Err(error.into()),
                Err(ClientError::Refused(refusal)) if refusal.kind == RefusalKind::NotFound => {
                    return Err(self.never_begun());
                }
                Err(ClientError::Refused(refusal)) if refusal.kind != RefusalKind::Unavailable => {
                    return Err(self.lost_sight(&refusal));
                }
                Err(error) if !self.seen || self.is_out_of_patience() => {
                    return Err(self.lost_sight(&error));
                }
                Err(_) => {}
            }
        }
    }

    /// Its stream has ended without a report: because the gateway stops, or because the migration has ended. The status tells.
    async fn ended(&self) -> Result<Option<Event>, Failure> {
        let Ok(status) = self.client.status(self.migration).await else {
            return Ok(None);
        };
        match status.report {
            Some(report) => Ok(Some(Event::Report(Box::new(report)))),
            None if status.summary.phase == Phase::Done => {
                let advice = status.advice.unwrap_or_else(|| "look where the VM runs".to_owned());
                Err(Failure::unknown(format!(
                    "migration {} is over and left no report: {advice}",
                    self.migration
                )))
            }
            None => Ok(None),
        }
    }

    /// Says once, until it is heard of again, that the gateway is gone.
    fn note_absence(&mut self, display: &Display) {
        if !std::mem::replace(&mut self.is_absent, true) {
            display.notice("the gateway went away; waiting for it to come back");
        }
    }

    fn is_out_of_patience(&self) -> bool {
        RETRY_INTERVAL * self.tries > self.patience.wait
    }

    /// A gateway records that a migration begins before it touches the VM, and remembers what it has recorded.
    fn never_begun(&self) -> Failure {
        Failure {
            code: Where::Source.exit_code(),
            message: format!(
                "the gateway was restarted before migration {} had begun: the VM was not touched and runs where it was",
                self.migration
            ),
        }
    }

    fn lost_sight(&self, error: &dyn std::fmt::Display) -> Failure {
        Failure::unknown(format!(
            "where the VM is cannot be told: {error}; once the gateway runs it finishes or undoes the migration by itself, and `longhaul attach {}` tells",
            self.migration
        ))
    }
}

/// Often enough that a restart of a few seconds is hardly noticed.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);
