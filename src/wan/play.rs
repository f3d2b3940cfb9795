//! Plays a time line on a link: does each step when it is due, and takes back what it has begun when it is stopped.

use std::io;
use std::time::Duration;

use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::clock;
use super::controls::{Controls, ControlsError};
use super::event::Event;
use super::link::Link;
use super::timeline::{Deed, Step, steps};

/// A step that was done.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Played {
    /// When it was due, from the start.
    pub at_seconds: f64,
    /// How much later it was done. Timers here have a resolution of a millisecond.
    pub late_seconds: f64,
    /// The number of its event, from 1.
    pub event: usize,
    /// What was done, in words.
    pub did: String,
}

/// How a time line ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All of it was played.
    Played,
    /// A signal stopped it; what it had begun for a time is taken back.
    Stopped,
}

/// A time line cannot be played.
#[derive(Debug, thiserror::Error)]
pub enum PlayError {
    /// The link refused a step.
    #[error(transparent)]
    Controls(#[from] ControlsError),
    /// There is no way to wait.
    #[error("the time line cannot be timed")]
    Runtime(#[source] io::Error),
}

/// Plays `events` on `link` from now on, and tells of each step. Returns when the last is over, or after SIGTERM or SIGINT.
///
/// # Errors
/// [`PlayError`], after what was begun for a time has been taken back as far as the link allows.
pub fn play(link: &Link, events: &[Event], tell: impl FnMut(Played)) -> Result<Ending, PlayError> {
    let controls = Controls::open(link)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(PlayError::Runtime)?;
    runtime.block_on(perform(controls, events, tell))
}

async fn perform(mut controls: Controls, events: &[Event], mut tell: impl FnMut(Played)) -> Result<Ending, PlayError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(PlayError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(PlayError::Runtime)?;
    let steps = steps(controls.settings(), events);
    let start = clock::now();
    for (index, step) in steps.iter().enumerate() {
        let wait = (start + step.at).saturating_duration_since(clock::now());
        // A step that is due is done even where a signal waits: a stop takes it back then.
        let stopped = wait > Duration::ZERO
            && tokio::select! {
                () = tokio::time::sleep(wait) => false,
                _ = terminate.recv() => true,
                _ = interrupt.recv() => true,
            };
        if stopped {
            take_back(&mut controls, &steps, index)?;
            return Ok(Ending::Stopped);
        }
        let late = clock::now().saturating_duration_since(start + step.at);
        if let Err(error) = controls.perform(&step.deed) {
            // The cause is the error to report, whatever becomes of the others.
            let _ = take_back(&mut controls, &steps, index);
            return Err(error.into());
        }
        tell(Played {
            at_seconds: step.at.as_secs_f64(),
            late_seconds: late.as_secs_f64(),
            event: step.event + 1,
            did: step.deed.to_string(),
        });
    }
    Ok(Ending::Played)
}

/// Does the ends of what has begun before step `next`. All are tried; the first failure is returned.
fn take_back(controls: &mut Controls, steps: &[Step], next: usize) -> Result<(), ControlsError> {
    let mut result = Ok(());
    for step in ends_to_come(steps, next) {
        let done = match step.deed {
            Deed::Restore { directions } => controls.end_cut(directions),
            _ => controls.perform(&step.deed),
        };
        result = result.and(done);
    }
    result
}

/// The ends, from step `next` on, of events that have begun before it.
fn ends_to_come(steps: &[Step], next: usize) -> impl Iterator<Item = &Step> {
    let has_begun = move |step: &&Step| steps[..next].iter().any(|begun| begun.event == step.event);
    steps[next..].iter().filter(|step| step.is_end).filter(has_begun)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::change::{Change, Directions};
    use crate::wan::event::Happening;
    use crate::wan::model::tests::settings;

    #[test]
    fn a_time_line_that_is_stopped_takes_back_what_has_begun_and_nothing_else() {
        let seconds = Duration::from_secs;
        let rate = |at: u64, text: &str, length: Option<u64>| Event {
            at: seconds(at),
            happening: Happening::Change {
                directions: Directions::Ab,
                change: Change::parse("rate", text).expect("a rate"),
                length: length.map(seconds),
            },
        };
        let cut = Event {
            at: seconds(2),
            happening: Happening::Cut {
                directions: Directions::Ba,
                length: seconds(10),
            },
        };
        let events = [
            rate(0, "10mbit", None),
            rate(1, "20mbit", Some(5)),
            cut,
            rate(8, "5mbit", Some(1)),
        ];
        let steps = steps(&[settings(), settings()], &events);
        let ends = |next| -> Vec<String> { ends_to_come(&steps, next).map(|step| step.deed.to_string()).collect() };
        assert_eq!(ends(1), Vec::<String>::new(), "a change for good stays");
        assert_eq!(ends(3), ["rate 10mbit ab", "end of the cut ba"]);
        assert_eq!(ends(4), ["end of the cut ba"], "the rate is back already");
        assert_eq!(ends(steps.len()), Vec::<String>::new());
    }
}
