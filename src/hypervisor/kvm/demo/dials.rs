//! What the demo guest is told: how much it writes, how fast, where, and what its memory begins as.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::layout::{MAGIC, MOST_VCPUS, PARAMETERS, WORKING_SET, parameter};
use crate::hypervisor::kvm::memory::GuestRam;
use crate::proto::page::PAGE_SIZE;

/// The dials of the demo guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dials {
    /// Bytes that are written to, whole pages, at least one per vCPU and 16 MiB less than the memory at most.
    pub working_set_bytes: u64,
    /// Pages that each vCPU writes in a second, up to 1,000,000; 0: as many as it can.
    pub pages_per_second: u64,
    /// Percent of the writes that go to the first tenth of a vCPU's pages, the others to the rest, at random; 0: to
    /// each page in turn.
    pub skew_percent: u64,
    /// Bytes written into a page, 8 to 4096, in words of 8 that are spread over it.
    pub bytes_per_page: u64,
    /// What the pages begin as.
    pub content: Content,
    /// Percent of the pages that hold random bytes instead of text; 0 for other content.
    pub random_percent: u64,
    /// From one sign of life to the next, at least: a guest that waits looks a hundred times a second. Zero: it makes none.
    pub beat: Duration,
    /// Another one makes other content.
    pub seed: u64,
}

/// What the pages of the working set begin as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zero.
    Zero,
    /// Words of a language: compresses about as text does.
    Text,
    /// Random bytes: does not compress.
    Random,
}

/// A dial that is out of its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// The working set.
    #[error(
        "A working set of {bytes} bytes is not possible; whole pages of 4 KiB are, at least {vcpus} \
         and at most {room} bytes."
    )]
    WorkingSet {
        /// What was asked for.
        bytes: u64,
        /// vCPUs: each needs a page.
        vcpus: usize,
        /// Bytes that the memory has for it.
        room: u64,
    },
    /// The rate.
    #[error("{0} pages per second are not possible; 0 to {FASTEST} are.")]
    Rate(u64),
    /// The skew.
    #[error("A skew of {0} percent is not possible; 0 to 100 are.")]
    Skew(u64),
    /// The bytes per page.
    #[error("{0} bytes per page are not possible; 8 to {PAGE_SIZE} are.")]
    Bytes(u64),
    /// The share of random pages.
    #[error("{0} percent of random pages are not possible; 0 to 100 are, of pages that are text otherwise.")]
    Random(u64),
    /// The time between two signs of life.
    #[error(
        "A sign of life every {0:?} is not possible; from every {SHORTEST_BEAT:?} to every hour, or none (0s), is."
    )]
    Beat(Duration),
    /// The content.
    #[error("{0:?} is no content; zero, text and random are.")]
    Content(String),
}

impl Default for Dials {
    fn default() -> Self {
        Self {
            working_set_bytes: 16 << 20,
            pages_per_second: 1000,
            skew_percent: 0,
            bytes_per_page: 64,
            content: Content::Text,
            random_percent: 0,
            beat: Duration::from_millis(10),
            seed: 1,
        }
    }
}

impl Dials {
    /// Whether a guest of `vcpus` vCPUs and `memory_bytes` bytes can do that.
    ///
    /// # Errors
    /// The first dial that is out of its range.
    pub fn check(&self, memory_bytes: u64, vcpus: usize) -> Result<(), DialError> {
        let room = memory_bytes.saturating_sub(WORKING_SET);
        let page = PAGE_SIZE as u64;
        let bytes = self.working_set_bytes;
        if !bytes.is_multiple_of(page) || bytes > room || bytes / page < (vcpus as u64).max(1) {
            return Err(DialError::WorkingSet { bytes, vcpus, room });
        }
        if self.pages_per_second > FASTEST {
            return Err(DialError::Rate(self.pages_per_second));
        }
        if self.skew_percent > 100 {
            return Err(DialError::Skew(self.skew_percent));
        }
        if !(8..=page).contains(&self.bytes_per_page) {
            return Err(DialError::Bytes(self.bytes_per_page));
        }
        if self.random_percent > 100 || self.random_percent > 0 && self.content != Content::Text {
            return Err(DialError::Random(self.random_percent));
        }
        if self.beat > LONGEST_BEAT || !self.beat.is_zero() && self.beat < SHORTEST_BEAT {
            return Err(DialError::Beat(self.beat));
        }
        Ok(())
    }

    /// The dials of the guest that is in this memory, and its vCPUs. `None`: there is no demo guest.
    #[must_use]
    pub fn of(ram: &GuestRam) -> Option<(Dials, usize)> {
        let memory = ram.blocks().first().filter(|block| block.guest_address == 0)?;
        if memory.len <= PARAMETERS {
            return None;
        }
        let mut page = [0; PAGE_SIZE];
        ram.read(0, PARAMETERS / PAGE_SIZE as u64, &mut page);
        if word(&page, parameter::MAGIC) != MAGIC {
            return None;
        }
        let dials = Dials {
            working_set_bytes: word(&page, parameter::PAGES).checked_mul(PAGE_SIZE as u64)?,
            pages_per_second: word(&page, parameter::RATE),
            skew_percent: word(&page, parameter::SKEW_PERCENT),
            bytes_per_page: word(&page, parameter::BYTES),
            content: Content::numbered(word(&page, parameter::CONTENT))?,
            random_percent: word(&page, parameter::RANDOM_PERCENT),
            beat: Duration::from_nanos(word(&page, parameter::BEAT)),
            seed: word(&page, parameter::SEED),
        };
        let vcpus = usize::try_from(word(&page, parameter::VCPUS)).ok()?;
        let is_possible = (1..=MOST_VCPUS).contains(&vcpus) && dials.check(memory.len, vcpus).is_ok();
        is_possible.then_some((dials, vcpus))
    }

    /// The page of parameters of a guest of which the TSC has `tsc_hz` cycles in a second.
    pub(super) fn parameters(&self, vcpus: usize, tsc_hz: u64) -> [u8; PAGE_SIZE] {
        let mut page = [0; PAGE_SIZE];
        let mut set = |at: usize, value: u64| page[at..at + 8].copy_from_slice(&value.to_le_bytes());
        set(parameter::MAGIC, MAGIC);
        set(parameter::VCPUS, vcpus as u64);
        set(parameter::PAGES, self.pages());
        set(parameter::WORDS, self.words() as u64);
        set(parameter::STRIDE, self.stride() as u64);
        set(
            parameter::INTERVAL,
            tsc_hz.checked_div(self.pages_per_second).unwrap_or(0),
        );
        set(parameter::SECOND, tsc_hz);
        set(parameter::SKEW, (self.skew_percent << 16).div_ceil(100));
        set(parameter::SEED, self.seed);
        set(parameter::IS_BLANK, u64::from(self.content == Content::Zero));
        set(parameter::RATE, self.pages_per_second);
        set(parameter::SKEW_PERCENT, self.skew_percent);
        set(parameter::BYTES, self.bytes_per_page);
        set(parameter::CONTENT, self.content as u64);
        set(parameter::RANDOM_PERCENT, self.random_percent);
        // Less than 2^42, by the check.
        set(parameter::BEAT, self.beat.as_nanos() as u64);
        set(parameter::SIGN, (self.beat.as_secs_f64() * tsc_hz as f64) as u64);
        page
    }

    /// Pages of the working set.
    pub(super) fn pages(&self) -> u64 {
        self.working_set_bytes / PAGE_SIZE as u64
    }

    /// Words of 8 bytes that are written into a page, 1 to 512.
    pub(super) fn words(&self) -> usize {
        (self.bytes_per_page as usize / 8).clamp(1, PAGE_SIZE / 8)
    }

    /// Bytes from one of them to the next.
    pub(super) fn stride(&self) -> usize {
        PAGE_SIZE / 8 / self.words() * 8
    }
}

/// The 64 bits at `at`, which is inside of the page.
pub(super) fn word(page: &[u8; PAGE_SIZE], at: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[at..at + 8]);
    u64::from_le_bytes(bytes)
}

impl Content {
    fn numbered(number: u64) -> Option<Content> {
        [Content::Zero, Content::Text, Content::Random]
            .into_iter()
            .find(|&content| content as u64 == number)
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Content::Zero => "zero",
            Content::Text => "text",
            Content::Random => "random",
        })
    }
}

impl FromStr for Content {
    type Err = DialError;

    fn from_str(text: &str) -> Result<Self, DialError> {
        match text {
            "zero" => Ok(Content::Zero),
            "text" => Ok(Content::Text),
            "random" => Ok(Content::Random),
            _ => Err(DialError::Content(text.to_owned())),
        }
    }
}

/// More often, and the guest might come to nothing else.
const SHORTEST_BEAT: Duration = Duration::from_millis(1);
const LONGEST_BEAT: Duration = Duration::from_secs(3600);
/// Pages per second at most.
const FASTEST: u64 = 1_000_000;
