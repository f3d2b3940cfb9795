//! Listens to the guest's signs of life at one QEMU, and asks the guest whether its memory is intact.
//!
//! The guest counts its signs of life for ever, wherever it runs. So their times on the host's one clock give the downtime
//! as it is seen from outside, and their numbers prove that the guest ran in one place only: the first number at the
//! destination follows the last one at the source.

use std::io::{BufRead, BufReader};
use std::net::Shutdown;
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;

use super::application::{Window, Windows};

/// One sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// When the host read it (CLOCK_MONOTONIC).
    pub at: Instant,
    /// Its number: grows by one, for ever.
    pub sequence: u64,
    /// Pages rewritten so far.
    pub writes: u64,
    /// Pages verified so far.
    pub checked: u64,
    /// Verified pages that were damaged.
    pub bad: u64,
}

/// The guest's answer to a `verify`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Pages that were read.
    pub pages: u64,
    /// How many of them were not as they must be.
    pub bad: u64,
    /// Pages rewritten so far.
    pub writes: u64,
}

impl Verified {
    /// Every page was as it must be.
    #[must_use]
    pub fn is_intact(&self) -> bool {
        self.bad == 0 && self.pages > 0
    }
}

/// What was heard at one QEMU so far.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Pages of the working set, once it is filled; only heard where the guest boots.
    pub ready: Option<u64>,
    /// The first sign of life.
    pub first: Option<Beat>,
    /// The latest sign of life.
    pub last: Option<Beat>,
    /// Longest time between two signs of life here.
    pub longest_pause: Duration,
    /// Signs of life whose number did not follow the one before.
    pub out_of_order: u64,
    /// Lines that say nothing known; one that migration cut in two is expected.
    pub fragments: u64,
    /// What the guest's application did, where there is one.
    pub windows: Windows,
    /// QEMU has closed the channel.
    pub ended: bool,
    verified: Option<(u64, Verified)>,
    told: Option<(u64, Answer)>,
}

/// What the guest's application answers, or why it did not do what it was told.
type Answer = Result<String, String>;

/// The channel to the guest at one QEMU. Closed when dropped.
#[derive(Debug)]
pub struct Heartbeat {
    path: PathBuf,
    heard: watch::Receiver<Heard>,
    stream: BlockingStream,
    writer: UnixStream,
    token: u64,
}

impl Heartbeat {
    /// Connects to the virtio port's socket at `path`, as soon as a QEMU serves it.
    ///
    /// # Errors
    /// [`HeartbeatError::Unconnected`] where nobody served the socket within `patience`.
    pub async fn connect(path: &Path, patience: Duration) -> Result<Self, HeartbeatError> {
        let unconnected = |source| HeartbeatError::Unconnected {
            path: path.to_owned(),
            source,
        };
        let deadline = tokio::time::Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(error) if tokio::time::Instant::now() > deadline => return Err(unconnected(error)),
                Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
            }
        };
        let stream = stream.into_std().map_err(unconnected)?;
        let writer = stream.try_clone().and_then(UnixStream::from_std).map_err(unconnected)?;
        // The reader has a thread of its own, so that its times do not wait for other tasks.
        let reader = stream.try_clone().map_err(unconnected)?;
        let (sender, heard) = watch::channel(Heard::default());
        std::thread::Builder::new()
            .name("heartbeat".to_owned())
            .spawn(move || listen(reader, &sender))
            .map_err(unconnected)?;
        Ok(Self {
            path: path.to_owned(),
            heard,
            stream,
            writer,
            token: 0,
        })
    }

    /// What was heard so far.
    #[must_use]
    pub fn heard(&self) -> Heard {
        self.heard.borrow().clone()
    }

    /// Waits until `condition` holds for what was heard.
    ///
    /// # Errors
    /// [`HeartbeatError::Silent`] where it did not hold within `patience`, [`HeartbeatError::Ended`] where it never will.
    pub async fn wait_for(
        &mut self,
        what: &'static str,
        patience: Duration,
        mut condition: impl FnMut(&Heard) -> bool,
    ) -> Result<Heard, HeartbeatError> {
        let waited = timeout(patience, self.heard.wait_for(|heard| condition(heard) || heard.ended)).await;
        let heard = waited.map(|heard| heard.map(|heard| heard.clone()).unwrap_or_default());
        let path = self.path.clone();
        match heard {
            Ok(heard) if condition(&heard) => Ok(heard),
            Ok(_) => Err(HeartbeatError::Ended { path, what }),
            Err(_) => Err(HeartbeatError::Silent {
                path,
                what,
                patience,
                heard: Box::new(self.heard()),
            }),
        }
    }

    /// Waits for the first sign of life here.
    ///
    /// # Errors
    /// As [`Heartbeat::wait_for`].
    pub async fn first(&mut self, patience: Duration) -> Result<Beat, HeartbeatError> {
        let heard = self
            .wait_for("a sign of life", patience, |heard| heard.first.is_some())
            .await?;
        Ok(heard.first.expect("the condition was that there is one"))
    }

    /// Has the guest read every page of its working set, and returns what it found.
    ///
    /// # Errors
    /// [`HeartbeatError::Unwritable`] where the guest cannot be asked; as [`Heartbeat::wait_for`] where it does not answer.
    pub async fn verify(&mut self, patience: Duration) -> Result<Verified, HeartbeatError> {
        let token = self.next_token();
        self.ask(&format!("verify {token}\n")).await?;
        let is_answer = |heard: &Heard| heard.verified.is_some_and(|(answered, _)| answered == token);
        let heard = self.wait_for("the answer to verify", patience, is_answer).await?;
        Ok(heard.verified.expect("the condition was that there is one").1)
    }

    /// Tells the guest's application something, which ends its load, and returns what it answers. What there is to tell is the application's.
    ///
    /// # Errors
    /// As [`Heartbeat::verify`]; [`HeartbeatError::Declined`] where it could not do it.
    pub async fn tell(&mut self, word: &'static str, patience: Duration) -> Result<String, HeartbeatError> {
        let token = self.next_token();
        self.ask(&format!("tell {token} {word}\n")).await?;
        let is_answer = |heard: &Heard| heard.told.as_ref().is_some_and(|(answered, _)| *answered == token);
        let heard = self.wait_for("the application's answer", patience, is_answer).await?;
        let (_, answer) = heard.told.expect("the condition was that there is one");
        answer.map_err(|said| HeartbeatError::Declined { word, said })
    }

    /// Tells it something and does not wait for an answer, as where there will be none.
    ///
    /// # Errors
    /// [`HeartbeatError::Unwritable`].
    pub async fn tell_the_end(&mut self, word: &'static str) -> Result<(), HeartbeatError> {
        let token = self.next_token();
        self.ask(&format!("tell {token} {word}\n")).await
    }

    /// The guest may have answered an earlier question elsewhere: the host's process id makes the token this one's.
    fn next_token(&mut self) -> u64 {
        self.token += 1;
        u64::from(std::process::id()) << 32 | self.token
    }

    async fn ask(&mut self, question: &str) -> Result<(), HeartbeatError> {
        let unwritable = |source| HeartbeatError::Unwritable {
            path: self.path.clone(),
            source,
        };
        self.writer.write_all(question.as_bytes()).await.map_err(unwritable)
    }

    /// Waits until QEMU has closed the channel and serves its socket no more, which it does when it ends; the next QEMU may
    /// then have the same path.
    ///
    /// # Errors
    /// [`HeartbeatError::Silent`] where it did not within `patience`.
    pub async fn ended(&mut self, patience: Duration) -> Result<Heard, HeartbeatError> {
        let what = "the end of QEMU";
        let deadline = tokio::time::Instant::now() + patience;
        let heard = self.wait_for(what, patience, |heard| heard.ended).await?;
        // A QEMU that ends closes its connections a moment before it stops taking new ones.
        while UnixStream::connect(&self.path).await.is_ok() {
            if tokio::time::Instant::now() > deadline {
                return Err(HeartbeatError::Silent {
                    path: self.path.clone(),
                    what,
                    patience,
                    heard: Box::new(heard),
                });
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(heard)
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        // Ends the reader's thread; a socket that is closed already needs nothing.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// What the numbers of the signs of life say about one move.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Crossing {
    /// From the last sign of life at the source to the first at the destination.
    pub downtime: Duration,
    /// First number at the destination less the one after the last at the source: 0 is a perfect handover. One line may
    /// be lost or repeated in flight; anything else means that the guest ran twice, or an older state of it.
    pub sequence_error: i64,
}

impl Crossing {
    /// From the last beat at the source to the first at the destination. `None` where the guest was heard at the source
    /// after it was heard at the destination.
    #[must_use]
    pub fn between(last: Beat, first: Beat) -> Option<Self> {
        let downtime = first.at.checked_duration_since(last.at)?;
        let difference = i128::from(first.sequence) - i128::from(last.sequence) - 1;
        let limit = |value: i128| i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX });
        Some(Self {
            downtime,
            sequence_error: limit(difference),
        })
    }

    /// The guest ran once, and went on where it was stopped.
    #[must_use]
    pub fn is_seamless(&self) -> bool {
        self.sequence_error.unsigned_abs() <= 1
    }
}

/// Reads lines until the socket is closed.
fn listen(stream: BlockingStream, sender: &watch::Sender<Heard>) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while let Ok(true) = read_line(&mut reader, &mut line) {
        let at = now();
        let said = parse(&line, at);
        line.clear();
        sender.send_modify(|heard| heard.note(said));
    }
    sender.send_modify(|heard| heard.ended = true);
}

/// Reads up to and with a line feed; false at the end of the stream. A line of more than [`LINE_BYTES`] is cut there.
fn read_line(reader: &mut BufReader<BlockingStream>, line: &mut Vec<u8>) -> std::io::Result<bool> {
    loop {
        let available = match reader.fill_buf() {
            Ok(available) => available,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                // The runtime's half of the socket needs it to be non-blocking.
                wait_readable(reader.get_ref())?;
                continue;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if available.is_empty() {
            return Ok(false);
        }
        let end = available.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(available.len(), |end| end + 1);
        let room = LINE_BYTES.saturating_sub(line.len());
        line.extend_from_slice(&available[..taken.min(room)]);
        reader.consume(taken);
        if end.is_some() {
            return Ok(true);
        }
    }
}

fn wait_readable(stream: &BlockingStream) -> std::io::Result<()> {
    use rustix::event::{PollFd, PollFlags, poll};
    let mut descriptors = [PollFd::new(stream, PollFlags::IN)];
    match poll(&mut descriptors, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What one line says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    Ready(u64),
    Beat(Beat),
    Work(Window),
    Verified(u64, Verified),
    Told(u64, Answer),
    Fragment,
}

fn parse(line: &[u8], at: Instant) -> Said {
    let Ok(line) = std::str::from_utf8(line) else {
        return Said::Fragment;
    };
    // Without its line feed a number may lack its last digits.
    let Some(line) = line.strip_suffix('\n') else {
        return Said::Fragment;
    };
    if let Some(work) = line.strip_prefix("work ") {
        return Window::parse(work, at).map_or(Said::Fragment, Said::Work);
    }
    if let Some(told) = line.strip_prefix("told ") {
        return parse_answer(told).map_or(Said::Fragment, |(token, answer)| Said::Told(token, answer));
    }
    let mut words = line.split(' ');
    let kind = words.next();
    let numbers: Option<Vec<u64>> = words.map(|word| word.parse().ok()).collect();
    match (kind, numbers.as_deref()) {
        (Some("ready"), Some(&[pages])) => Said::Ready(pages),
        (Some("beat"), Some(&[sequence, writes, checked, bad])) => Said::Beat(Beat {
            at,
            sequence,
            writes,
            checked,
            bad,
        }),
        (Some("verified"), Some(&[token, pages, bad, writes])) => {
            Said::Verified(token, Verified { pages, bad, writes })
        }
        _ => Said::Fragment,
    }
}

/// `TOKEN ok WORDS` or `TOKEN failed WORDS`.
fn parse_answer(told: &str) -> Option<(u64, Answer)> {
    let (token, answer) = told.split_once(' ')?;
    let (outcome, words) = answer.split_once(' ')?;
    let answer = match outcome {
        "ok" => Ok(words.to_owned()),
        "failed" => Err(words.to_owned()),
        _ => return None,
    };
    Some((token.parse().ok()?, answer))
}

impl Heard {
    fn note(&mut self, said: Said) {
        match said {
            Said::Ready(pages) => self.ready = Some(pages),
            Said::Verified(token, verified) => self.verified = Some((token, verified)),
            Said::Told(token, answer) => self.told = Some((token, answer)),
            Said::Work(window) => self.windows.push(window),
            Said::Fragment => self.fragments += 1,
            Said::Beat(beat) => {
                if let Some(last) = self.last {
                    self.longest_pause = self.longest_pause.max(beat.at.saturating_duration_since(last.at));
                    self.out_of_order += u64::from(last.sequence.checked_add(1) != Some(beat.sequence));
                }
                self.first.get_or_insert(beat);
                self.last = Some(beat);
            }
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the clock that downtime is measured with is read here"
)]
fn now() -> Instant {
    Instant::now()
}

/// A sign of life has at most 100 bytes; what an application did names a class of length for each of its operations at worst.
const LINE_BYTES: usize = 8 << 10;

/// The guest cannot be heard.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatError {
    /// No QEMU served the socket.
    #[error("nobody serves the guest's port at {}: {source}", path.display())]
    Unconnected {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The guest cannot be asked.
    #[error("the guest's port at {} takes no question: {source}", path.display())]
    Unwritable {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The application could not do what it was told.
    #[error("the guest's application was told to {word} and could not: {said}")]
    Declined {
        /// What it was told.
        word: &'static str,
        /// Why not.
        said: String,
    },
    /// What was waited for did not come in time.
    #[error("waited {patience:?} for {what} of the guest at {}; heard so far: {heard:?}", path.display())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// What was waited for.
        what: &'static str,
        /// How long.
        patience: Duration,
        /// What was heard.
        heard: Box<Heard>,
    },
    /// QEMU ended before what was waited for came.
    #[error("QEMU closed the guest's port at {} before {what} came", path.display())]
    Ended {
        /// The socket.
        path: PathBuf,
        /// What was waited for.
        what: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn beat(at: Instant, sequence: u64) -> Beat {
        Beat {
            at,
            sequence,
            writes: 0,
            checked: 0,
            bad: 0,
        }
    }

    #[test]
    fn a_line_that_migration_cut_in_two_is_no_sign_of_life() {
        let at = now();
        let whole = b"beat 1234 5 6 0\n";
        assert_eq!(
            parse(whole, at),
            Said::Beat(Beat {
                at,
                sequence: 1234,
                writes: 5,
                checked: 6,
                bad: 0
            })
        );
        for cut in 1..whole.len() {
            assert_eq!(parse(&whole[..cut], at), Said::Fragment, "the first {cut} bytes");
            assert_eq!(parse(&whole[cut..], at), Said::Fragment, "from byte {cut} on");
        }
    }

    #[test]
    fn a_handover_may_lose_or_repeat_one_line_and_no_more() {
        let last = now();
        let first = last + Duration::from_millis(180);
        for (sequence, error, seamless) in [
            (98, -2, false),
            (99, -1, true),
            (100, 0, true),
            (101, 1, true),
            (102, 2, false),
        ] {
            let crossing = Crossing::between(beat(last, 99), beat(first, sequence)).unwrap();
            assert_eq!(crossing.sequence_error, error);
            assert_eq!(crossing.is_seamless(), seamless, "{sequence} after 99");
            assert_eq!(crossing.downtime, Duration::from_millis(180));
        }
    }

    #[test]
    fn a_guest_heard_at_the_source_after_the_destination_is_no_crossing() {
        let at = now();
        assert_eq!(
            Crossing::between(beat(at + Duration::from_millis(1), 5), beat(at, 6)),
            None
        );
    }

    #[test]
    fn an_answer_says_what_was_done_or_why_it_was_not() {
        let parsed = |line: &[u8]| parse(line, now());
        assert_eq!(
            parsed(b"told 7 ok blocks 9 bad 0\n"),
            Said::Told(7, Ok("blocks 9 bad 0".to_owned()))
        );
        assert_eq!(parsed(b"told 8 ok \n"), Said::Told(8, Ok(String::new())));
        assert_eq!(
            parsed(b"told 9 failed no disk\n"),
            Said::Told(9, Err("no disk".to_owned()))
        );
        for wrong in [&b"told 7\n"[..], b"told 7 ok\n", b"told x ok y\n", b"told 7 maybe y\n"] {
            assert_eq!(parsed(wrong), Said::Fragment);
        }
    }

    #[test]
    fn numbers_that_jump_are_counted() {
        let (mut heard, at) = (Heard::default(), now());
        for sequence in [7, 8, 10, 11, 11, 12] {
            heard.note(Said::Beat(beat(at, sequence)));
        }
        assert_eq!(heard.out_of_order, 2);
        assert_eq!((heard.first.unwrap().sequence, heard.last.unwrap().sequence), (7, 12));
    }
}
