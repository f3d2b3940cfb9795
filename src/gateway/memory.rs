//! The memory budget, shared out to the migrations that are open, at both ends.
//!
//! ```text
//! source:       window + regions x 4.2 KiB + slots x 24.5 B + work + zstd                + copies of pages
//! destination:  window + regions x 4.2 KiB + slots x 16 B   + work + zstd + device state + pages of the dictionary
//! ```
//!
//! With a page store each slot takes 86 B more, and 4 MiB. Everything but the pages is what a migration may come to hold and is reserved in full. The destination's pages are a quarter of what is left
//! then, the others are in the spill file. The source's copies are half of it, and nothing that two more migrations of the same size would need: a page without a copy goes as a
//! literal when it is sent again, and a migration without memory does not start. A migration that finds too little is refused before anything moves. Worked example at the
//! default of 512 MiB and a window of 64 MiB (1 Gbit/s, 150 ms): [`tests`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::config::Config;
use crate::proto::page::{ByteRate, PAGE_SIZE};
use crate::proto::reduce::{DictionaryLimits, MAX_CODERS};
use crate::proto::wire::Limits;
use crate::proto::wire::hello::MIN_WINDOW;

/// Rate that windows are made for where none is configured.
const ASSUMED_RATE: ByteRate = ByteRate::from_bits_per_second(1_000_000_000);

/// Most pages in a session dictionary: 4 GiB in memory and spill file together.
const MOST_DICTIONARY_PAGES: u64 = 1 << 20;

/// Pages of a dictionary that are always in memory: 4 MiB.
pub(crate) const LEAST_PAGES: u64 = 1 << 10;

/// A region of the table that says which slot a page was last sent from, with its entry in the index of regions.
const REGION_BYTES: u64 = 4096 + 128;

/// A slot at the source, in tenths of a byte: a digest of 16 bytes, 9/10 of an entry of 4, and where its copy is.
const SOURCE_SLOT_TENTHS: u64 = 245;

/// A slot at the destination: the tag that opens a page in the spill file.
const DESTINATION_SLOT: u64 = 16;

/// Batches that are encoded or restored, frames that wait for the vmm, and those kept for repairs.
const WORK: u64 = 8 << 20;

/// What zstd holds to compress: of the first coder, and of each other one, with the drafts on their way to it and back.
const ZSTD_AT_SOURCE: u64 = 8 << 20;
const ZSTD_MORE_AT_SOURCE: u64 = 6 << 20;

/// What it holds to restore what one coder has made, and as many as there may be.
const ZSTD_OF_A_CODER: u64 = 5 << 20;
const ZSTD_AT_DESTINATION: u64 = ZSTD_OF_A_CODER + (MAX_CODERS as u64 - 1) * (3 << 19);

/// A page that is copied, and where it is.
const COPY_BYTES: u64 = PAGE_SIZE as u64 + 40;

/// A page of an image while a session begins with it: its digest, its place, and both as they lie in the file. At the source also the digest of a page
/// in its spill file; when an image is written the window is free, and holds what that takes.
const STORE_SLOT: u64 = 86;

/// Pages at the source before they are spilled.
const STORE_WORK: u64 = super::keeping::PAGES_AT_SOURCE as u64 * PAGE_SIZE as u64;

/// Device state that the destination holds back until ownership has moved.
const DEVICE_STATE: u64 = 32 << 20;

/// What is left of the budget.
#[derive(Debug)]
pub(crate) struct MemoryBudget {
    total: u64,
    left: Arc<AtomicU64>,
    /// What streams of tunnels hold.
    streams: Arc<AtomicU64>,
}

/// Memory that one migration holds until this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    bytes: u64,
    pages: u64,
    left: Arc<AtomicU64>,
    /// What of it streams of tunnels hold, and where that is counted.
    of_streams: Option<(u64, Arc<AtomicU64>)>,
}

/// What one end of a migration may come to hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    bytes: u64,
    least_pages: u64,
    most_pages: u64,
    /// Pages take one part in so many of what is left.
    share: u64,
    /// So many more migrations of this size must find memory.
    spare: u64,
    /// Held for the page store.
    store_bytes: u64,
    page_bytes: u64,
}

impl Need {
    /// At the source, with this session window and so many coders. `deltas`: the peer can take what changed in a page.
    pub(crate) fn at_source(window_bytes: u64, dictionary: DictionaryLimits, deltas: bool, coders: usize) -> Self {
        Self {
            bytes: common(window_bytes, dictionary)
                + u64::from(dictionary.slots()) * SOURCE_SLOT_TENTHS / 10
                + ZSTD_AT_SOURCE
                + (coders as u64 - 1) * ZSTD_MORE_AT_SOURCE,
            least_pages: 0,
            most_pages: if deltas { dictionary.slots().into() } else { 0 },
            share: 2,
            spare: 2,
            store_bytes: 0,
            page_bytes: COPY_BYTES,
        }
    }

    /// At the destination, with this session window.
    pub(crate) fn at_destination(window_bytes: u64, dictionary: DictionaryLimits) -> Self {
        let slots = u64::from(dictionary.slots());
        Self {
            bytes: common(window_bytes, dictionary) + slots * DESTINATION_SLOT + ZSTD_AT_DESTINATION + DEVICE_STATE,
            least_pages: LEAST_PAGES.min(slots),
            most_pages: slots,
            share: 4,
            spare: 0,
            store_bytes: 0,
            page_bytes: PAGE_SIZE as u64,
        }
    }

    /// At the source of a tunnel's stream, which has one coder.
    pub(crate) fn at_entrance(window_bytes: u64, dictionary: DictionaryLimits) -> Self {
        Self::at_source(window_bytes, dictionary, false, 1)
    }

    /// At the destination of a tunnel's stream, of which nothing is held back: most of its pages are in the spill file.
    pub(crate) fn at_exit(window_bytes: u64, dictionary: DictionaryLimits) -> Self {
        let slots = u64::from(dictionary.slots());
        Self {
            bytes: common(window_bytes, dictionary) + slots * DESTINATION_SLOT + ZSTD_OF_A_CODER,
            most_pages: LEAST_PAGES.min(slots),
            ..Self::at_destination(window_bytes, dictionary)
        }
    }

    /// The same where the site has a page store.
    pub(crate) fn with_store(mut self, has_store: bool, dictionary: DictionaryLimits) -> Self {
        if has_store {
            self.store_bytes = u64::from(dictionary.slots()) * STORE_SLOT + STORE_WORK;
        }
        self
    }

    /// Bytes, and pages or copies of the dictionary among them, with `left` of the budget; `None` where that is too little.
    fn of(self, left: u64) -> Option<(u64, u64)> {
        let all = self.bytes + self.store_bytes;
        let rest = left.checked_sub(all)?;
        let page = self.page_bytes;
        let free = rest.saturating_sub(self.spare * self.bytes).min(rest / self.share);
        let pages = (free / page).clamp(self.least_pages, self.most_pages);
        (pages * page <= rest).then_some((all + pages * page, pages))
    }

    fn least_bytes(self) -> u64 {
        self.bytes + self.store_bytes + self.least_pages * self.page_bytes
    }
}

fn common(window_bytes: u64, dictionary: DictionaryLimits) -> u64 {
    window_bytes
        .saturating_add(u64::from(dictionary.regions()) * REGION_BYTES)
        .saturating_add(WORK)
}

impl MemoryBudget {
    pub(crate) fn new(total: u64) -> Self {
        Self {
            total,
            left: Arc::new(AtomicU64::new(total)),
            streams: Arc::default(),
        }
    }

    /// What this gateway can hold for one migration. The window is 4 BDP of the longest and fattest path that is configured, since a lost
    /// packet is repaired two round trips after it was first sent and what is behind it waits, within an eighth of the budget. The
    /// dictionary's digests are another eighth at most.
    pub(crate) fn limits(&self, config: &Config) -> Limits {
        let bdp = |rate: Option<ByteRate>, rtt: Duration| rate.unwrap_or(ASSUMED_RATE).bytes_in(rtt);
        let link = &config.link;
        let wanted = config
            .peers
            .iter()
            .map(|peer| bdp(peer.rate.or(link.rate), peer.rtt.unwrap_or(link.rtt)))
            .fold(bdp(link.rate, link.rtt), u64::max)
            .saturating_mul(4);
        let slots = (self.total / 8 * 10 / SOURCE_SLOT_TENTHS).min(MOST_DICTIONARY_PAGES);
        Limits {
            window_bytes: wanted.clamp(MIN_WINDOW, (self.total / 8).max(MIN_WINDOW)),
            dictionary_pages: u32::try_from(slots).expect("2^20 fits"),
        }
    }

    /// Memory for one end of a migration.
    ///
    /// # Errors
    /// [`NoMemory`] where too little is left.
    pub(crate) fn reserve(&self, need: Need) -> Result<Reservation, NoMemory> {
        let before = self
            .left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| {
                need.of(left).map(|(bytes, _)| left - bytes)
            })
            .map_err(|left| NoMemory {
                needed_mib: need.least_bytes().div_ceil(1 << 20),
                left_mib: left >> 20,
                total_mib: self.total >> 20,
            })?;
        let (bytes, pages) = need.of(before).expect("it was just found to fit");
        Ok(Reservation {
            bytes,
            pages,
            left: Arc::clone(&self.left),
            of_streams: None,
        })
    }

    /// Memory for one end of a tunnel's stream. All of them have half of the budget, where migrations leave it.
    ///
    /// # Errors
    /// [`NoRoomForStream`].
    pub(crate) fn reserve_for_stream(&self, need: Need) -> Result<Reservation, NoRoomForStream> {
        let bytes = need.least_bytes();
        self.streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |held| {
                Some(held + bytes).filter(|all| *all <= self.total / 2)
            })
            .map_err(|held| NoRoomForStream::Half {
                needed_mib: bytes.div_ceil(1 << 20),
                held_mib: held >> 20,
                total_mib: self.total >> 20,
            })?;
        let reserved = self.reserve(need);
        match reserved {
            Ok(mut reservation) => {
                reservation.of_streams = Some((bytes, Arc::clone(&self.streams)));
                Ok(reservation)
            }
            Err(error) => {
                self.streams.fetch_sub(bytes, Ordering::AcqRel);
                Err(error.into())
            }
        }
    }
}

impl Reservation {
    /// Gives back what is not needed after all where `most` was reserved and it came to `need`. Pages or copies stay as many.
    pub(crate) fn shrink(&mut self, most: Need, need: Need) {
        let of = |need: Need| need.bytes + need.store_bytes;
        let spared = of(most).saturating_sub(of(need)).min(self.bytes);
        self.bytes -= spared;
        self.left.fetch_add(spared, Ordering::AcqRel);
    }

    /// Pages of the dictionary that may be kept in memory, or copied.
    pub(crate) fn pages(&self) -> u32 {
        u32::try_from(self.pages).unwrap_or(u32::MAX)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.left.fetch_add(self.bytes, Ordering::AcqRel);
        if let Some((bytes, streams)) = self.of_streams.take() {
            streams.fetch_sub(bytes, Ordering::AcqRel);
        }
    }
}

/// The budget has too little left for one more migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the migration needs {needed_mib} MiB of memory in the gateway and {left_mib} MiB of {total_mib} MiB are left: wait for \
     another migration to end, or raise memory_budget"
)]
pub(crate) struct NoMemory {
    needed_mib: u64,
    left_mib: u64,
    total_mib: u64,
}

/// A tunnel's stream finds no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoRoomForStream {
    #[error(
        "a tunnel's stream needs {needed_mib} MiB of memory in the gateway, and others have {held_mib} MiB of the half of {total_mib} MiB that \
         streams may have: close some, or raise memory_budget"
    )]
    Half {
        needed_mib: u64,
        held_mib: u64,
        total_mib: u64,
    },
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const WINDOW: u64 = 64 * MIB;

    /// The dictionary of a guest with so much memory, as its source asks for it.
    fn dictionary(guest_bytes: u64) -> DictionaryLimits {
        let slots = (guest_bytes / PAGE_SIZE as u64 * 5 / 4).min(MOST_DICTIONARY_PAGES);
        let regions = guest_bytes / (4 * MIB) + 64;
        DictionaryLimits::new(slots as u32, regions as u32).unwrap()
    }

    fn left(budget: &MemoryBudget) -> u64 {
        budget.left.load(Ordering::Relaxed)
    }

    #[test]
    fn streams_of_tunnels_leave_half_of_the_budget_to_migrations() {
        let budget = MemoryBudget::new(512 * MIB);
        let guest = dictionary(1 << 30);
        let dictionary = DictionaryLimits::new(1 << 16, 0).unwrap();
        let need = Need::at_exit(32 * MIB, dictionary);
        let streams: Vec<_> = std::iter::from_fn(|| budget.reserve_for_stream(need).ok()).collect();
        assert_eq!(streams.len(), 5);
        assert!(left(&budget) >= 256 * MIB);
        drop(streams);
        assert_eq!(left(&budget), 512 * MIB);
        let migration = Need::at_destination(WINDOW, guest);
        let migrations = [migration, migration].map(|need| budget.reserve(need).unwrap());
        assert!(left(&budget) < 256 * MIB);
        let stream = budget.reserve_for_stream(need).unwrap();
        assert!(budget.reserve_for_stream(Need::at_exit(256 * MIB, dictionary)).is_err());
        drop((migrations, stream));
        assert_eq!(
            std::iter::from_fn(|| budget.reserve_for_stream(need).ok())
                .take(9)
                .collect::<Vec<_>>()
                .len(),
            5
        );
    }

    #[test]
    fn what_a_smaller_dictionary_spares_is_given_back_at_once_and_not_twice() {
        let budget = MemoryBudget::new(512 * MIB);
        let [most, need] = [2 << 30, 1 << 30].map(|guest| {
            let dictionary = dictionary(guest);
            Need::at_source(WINDOW, dictionary, true, 1).with_store(true, dictionary)
        });
        let mut held = budget.reserve(most).unwrap();
        let before = left(&budget);
        held.shrink(most, need);
        assert_eq!(left(&budget) - before, most.least_bytes() - need.least_bytes());
        drop(held);
        assert_eq!(left(&budget), 512 * MIB);
    }

    #[test]
    fn the_default_budget_takes_a_guest_of_4_gib_and_keeps_an_eighth_of_it_for_pages() {
        let budget = MemoryBudget::new(512 * MIB);
        let need = Need::at_destination(WINDOW, dictionary(4 << 30));
        // 64 window + 4.5 table + 16 digests + 8 work + 9.5 zstd + 32 device state.
        assert_eq!(need.bytes / MIB, 133);
        let held = budget.reserve(need).unwrap();
        assert_eq!(u64::from(held.pages()) * PAGE_SIZE as u64 / MIB, 94);
        let source = Need::at_source(WINDOW, dictionary(4 << 30), true, 1);
        assert_eq!(source.bytes / MIB, 108);
        let sending = budget
            .reserve(source)
            .expect("it may send one of that size at the same time");
        assert_eq!(sending.pages(), 0, "two more of it would find nothing");
    }

    #[test]
    fn the_default_budget_takes_three_guests_of_1_gib_and_says_why_not_the_fourth() {
        let budget = MemoryBudget::new(512 * MIB);
        let need = Need::at_destination(WINDOW, dictionary(1 << 30));
        let held: Vec<Reservation> = (0..3).map(|_| budget.reserve(need).unwrap()).collect();
        let pages: Vec<u64> = held.iter().map(|held| held.pages * PAGE_SIZE as u64 / MIB).collect();
        assert_eq!(pages, [98, 43, 4]);
        let refused = budget.reserve(need).unwrap_err();
        assert_eq!((refused.needed_mib, refused.left_mib), (124, 6));
        assert!(refused.to_string().contains("raise memory_budget"), "{refused}");
        drop(held);
        assert_eq!(left(&budget), 512 * MIB);
    }

    #[test]
    fn the_default_budget_sends_three_guests_of_1_gib_at_a_time_and_copies_what_they_leave() {
        let budget = MemoryBudget::new(512 * MIB);
        let need = Need::at_source(WINDOW, dictionary(1 << 30), true, 1);
        let held: Vec<Reservation> = (0..3).map(|_| budget.reserve(need).unwrap()).collect();
        let pages: Vec<u64> = held.iter().map(|held| held.pages * PAGE_SIZE as u64 / MIB).collect();
        assert_eq!(pages, [209, 0, 0]);
        drop(held);
        let plain = Need::at_source(WINDOW, dictionary(1 << 30), false, 1);
        assert_eq!(
            budget.reserve(plain).unwrap().pages(),
            0,
            "a peer without deltas needs no copies"
        );
    }

    #[test]
    fn a_page_store_takes_its_memory_and_leaves_some_for_copies() {
        let budget = MemoryBudget::new(512 * MIB);
        let dictionary = dictionary(2 << 30);
        let need = Need::at_source(WINDOW, dictionary, true, 1).with_store(true, dictionary);
        assert_eq!(need.store_bytes / MIB, 57);
        let held = budget.reserve(need).unwrap();
        let copies = held.pages * PAGE_SIZE as u64 / MIB;
        assert!((130..180).contains(&copies), "{copies}");
    }

    #[test]
    fn the_last_byte_can_be_had_and_not_one_more() {
        let need = Need::at_destination(MIN_WINDOW, dictionary(1 << 30));
        assert!(MemoryBudget::new(need.least_bytes()).reserve(need).is_ok());
        let budget = MemoryBudget::new(need.least_bytes() - 1);
        assert!(budget.reserve(need).is_err());
        assert_eq!(left(&budget), need.least_bytes() - 1, "a refusal holds nothing");
    }

    #[test]
    fn what_migrations_hold_never_exceeds_the_budget_and_comes_back() {
        let budget = MemoryBudget::new(512 * MIB);
        let mut held = Vec::new();
        while let Ok(reservation) = budget.reserve(Need::at_destination(MIN_WINDOW, dictionary(1 << 30))) {
            held.push(reservation);
        }
        let sum: u64 = held.iter().map(|reservation| reservation.bytes).sum();
        assert!(
            held.len() > 3 && sum + left(&budget) == 512 * MIB,
            "{} {sum}",
            held.len()
        );
        drop(held);
        assert_eq!(left(&budget), 512 * MIB);
    }

    #[test]
    fn regions_that_no_guest_here_has_are_beyond_the_budget() {
        let regions = DictionaryLimits::new(1, DictionaryLimits::MAX_REGIONS).unwrap();
        let budget = MemoryBudget::new(512 * MIB);
        assert!(budget.reserve(Need::at_destination(MIN_WINDOW, regions)).is_err());
    }

    #[test]
    fn a_gigabit_at_150_ms_gets_four_bdp_unless_the_budget_is_small() {
        let config = Config::for_site("here");
        let limits = |budget| MemoryBudget::new(budget).limits(&config);
        assert_eq!(limits(1 << 30).window_bytes, 75_000_000);
        assert_eq!(limits(512 * MIB).window_bytes, 64 * MIB);
        assert_eq!(limits(MIB).window_bytes, MIN_WINDOW);
        assert_eq!(u64::from(limits(512 * MIB).dictionary_pages), MOST_DICTIONARY_PAGES);
        assert_eq!(limits(64 * MIB).dictionary_pages, 342_392);
    }

    #[test]
    fn windows_are_made_for_the_peer_with_the_largest_bdp() {
        let mut config = Config::for_site("here");
        let budget = MemoryBudget::new(4 << 30);
        let peer = |rate, rtt_ms| crate::config::Peer {
            name: "far".to_owned(),
            address: None,
            second_address: None,
            rate,
            calendar: crate::proto::rate::Calendar::default(),
            rtt: Some(Duration::from_millis(rtt_ms)),
            bulk_connections: None,
        };
        config.peers = vec![peer(None, 300), peer(Some(ByteRate(1_000_000)), 600)];
        assert_eq!(budget.limits(&config).window_bytes, 150_000_000);
        config.peers = vec![peer(None, 10)];
        assert_eq!(budget.limits(&config).window_bytes, 75_000_000);
    }
}
