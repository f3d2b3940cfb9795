//! Where literal bytes go: into groups that are compressed, or beside them where compressing has lately not paid.

use crate::proto::page::PAGE_SIZE;

use super::effort::Effort;
use super::group::{GROUP_BYTES, Trial};

/// Where literal bytes come from. What was incompressible is remembered by origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Bytes of the stream that are not pages.
    Opaque,
    /// What changed in pages.
    Edits,
    /// Pages of a region that nobody remembers.
    Unremembered,
    /// Pages of this region.
    Region(u32),
}

/// Gathers literal bytes into groups, by what earlier groups came to.
pub(super) struct Packer {
    trial: Trial,
    literals: Literals,
    patience: Patience,
    /// What a page has taken of late.
    page_bytes: usize,
}

/// The literal bytes of a batch, in groups that are not coded yet.
#[derive(Debug, Default)]
pub(super) struct Literals {
    /// Of all groups. All are full but the last.
    pub(super) content: Vec<u8>,
    pub(super) groups: Vec<GroupOrigins>,
}

/// What a group has been made of.
#[derive(Debug, Default)]
pub(super) struct GroupOrigins {
    /// Pages that begin in it.
    pub(super) pages: u64,
    /// Bytes in it by origin.
    shares: Vec<(Origin, usize)>,
}

/// What a group came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Verdict {
    pub(super) content: usize,
    pub(super) coded: usize,
    /// Whether compressing it made it smaller by what undoing it is worth.
    pub(super) pays: bool,
}

impl Literals {
    pub(super) fn clear(&mut self) {
        self.content.clear();
        self.groups.clear();
    }

    fn push(&mut self, origin: Origin, mut content: &[u8]) {
        while !content.is_empty() {
            if self.content.len() == self.groups.len() * GROUP_BYTES {
                self.groups.push(GroupOrigins::default());
            }
            let room = self.groups.len() * GROUP_BYTES - self.content.len();
            let head = content
                .split_off(..content.len().min(room))
                .expect("it is no longer than what is there");
            self.content.extend_from_slice(head);
            let shares = &mut self.groups.last_mut().expect("there is one with room").shares;
            match shares.last_mut() {
                Some((last, bytes)) if *last == origin => *bytes += head.len(),
                _ => shares.push((origin, head.len())),
            }
        }
    }
}

impl Packer {
    pub(super) fn new() -> Self {
        Self {
            trial: Trial::new(),
            literals: Literals::default(),
            patience: Patience::default(),
            page_bytes: PAGE_SIZE / 2,
        }
    }

    /// The codec is another one from now on. A stronger one may do what the weaker could not.
    pub(super) fn set_effort(&mut self, before: Effort, effort: Effort) {
        if effort > before {
            self.patience = Patience::default();
        }
        self.patience.trial_tells = effort == Effort::LEAST;
    }

    /// About how many bytes a page of `origin` takes as a literal, by those of late.
    pub(super) fn expected_page(&self, origin: Origin) -> usize {
        if self.patience.is_over(origin) {
            PAGE_SIZE
        } else {
            self.page_bytes
        }
    }

    /// Whether `content` (at most a page) is worth packing.
    pub(super) fn is_worth_packing(&mut self, origin: Origin, content: &[u8]) -> bool {
        match self.patience.next(origin) {
            Attempt::Pack => true,
            Attempt::Skip => false,
            // A page's edits are too few to be judged by themselves.
            Attempt::Probe if origin == Origin::Edits => {
                self.patience.learn(origin, true);
                true
            }
            Attempt::Probe => {
                let pays = self.trial.pays(content);
                self.patience.learn(origin, pays);
                pays
            }
        }
    }

    pub(super) fn push_page(&mut self, origin: Origin, content: &[u8]) {
        let begins = self.literals.content.len() / GROUP_BYTES;
        self.push(origin, content);
        self.literals.groups[begins].pages += 1;
    }

    pub(super) fn push(&mut self, origin: Origin, content: &[u8]) {
        self.literals.push(origin, content);
    }

    /// Ends the batch's packing. The next one takes the memory of `spare`.
    pub(super) fn finish(&mut self, mut spare: Literals) -> Literals {
        spare.clear();
        std::mem::replace(&mut self.literals, spare)
    }

    /// Takes in what a group came to.
    pub(super) fn learn(&mut self, origins: &GroupOrigins, verdict: Verdict) {
        if origins.pages > 0 {
            let page_bytes = (PAGE_SIZE * verdict.coded / verdict.content).min(PAGE_SIZE);
            self.page_bytes = (3 * self.page_bytes + page_bytes) / 4;
        }
        // A small group says nothing: the tail of a batch, or a few headers. Nor does a share too small to have decided its group about its origin.
        if verdict.content < TELLING_BYTES {
            return;
        }
        self.patience.expect(verdict.pays);
        for &(origin, bytes) in &origins.shares {
            let telling = if origin == Origin::Edits { 2 } else { 8 };
            if bytes * telling < verdict.content {
                continue;
            }
            if verdict.pays {
                self.patience.meet(origin);
            } else {
                self.patience.learn(origin, false);
            }
        }
    }
}

/// Groups shorter than this teach nothing.
const TELLING_BYTES: usize = 4096;

/// Remembers by origin that compressing did not pay, and tries again now and then.
#[derive(Debug)]
struct Patience {
    /// By origin: 0 pack, 1 probe, n skip n - 1 times before the next probe.
    countdowns: Vec<u8>,
    /// A page that is tried by itself is tried with the codec that is used.
    trial_tells: bool,
    /// The last groups did not pay. What they came to is known some batches later, and a region is soon over: then the first page of a new one is
    /// tried by itself.
    doubts: bool,
}

enum Attempt {
    Pack,
    Skip,
    Probe,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            countdowns: Vec::new(),
            trial_tells: true,
            doubts: false,
        }
    }
}

impl Patience {
    fn next(&mut self, origin: Origin) -> Attempt {
        let cell = cell(origin);
        if self.countdowns.len() <= cell {
            self.countdowns.resize(cell + 1, UNKNOWN);
        }
        let countdown = &mut self.countdowns[cell];
        match *countdown {
            UNKNOWN if self.doubts && self.trial_tells => Attempt::Probe,
            UNKNOWN | 0 => Attempt::Pack,
            1 => Attempt::Probe,
            _ => {
                *countdown -= 1;
                Attempt::Skip
            }
        }
    }

    fn is_over(&self, origin: Origin) -> bool {
        self.countdowns
            .get(cell(origin))
            .is_some_and(|&countdown| countdown != UNKNOWN && countdown > 0)
    }

    /// A group of the origin has paid. What did not pay since is still remembered.
    fn meet(&mut self, origin: Origin) {
        if let Some(countdown) = self.countdowns.get_mut(cell(origin))
            && *countdown == UNKNOWN
        {
            *countdown = 0;
        }
    }

    /// Whether the last groups paid.
    fn expect(&mut self, pays: bool) {
        self.doubts = !pays;
    }

    fn learn(&mut self, origin: Origin, pays: bool) {
        let cell = cell(origin);
        if self.countdowns.len() <= cell {
            self.countdowns.resize(cell + 1, UNKNOWN);
        }
        self.countdowns[cell] = if pays { 0 } else { PROBE_EVERY };
    }
}

fn cell(origin: Origin) -> usize {
    match origin {
        Origin::Opaque => 0,
        Origin::Edits => 1,
        Origin::Unremembered => 2,
        Origin::Region(region) => 3 + region as usize,
    }
}

/// One literal in this many of an incompressible origin is tried again.
const PROBE_EVERY: u8 = 32;

/// Nothing has been tried.
const UNKNOWN: u8 = u8::MAX;

#[cfg(test)]
mod tests {
    use super::super::group::Encoder;
    use super::*;

    fn noise(seed: u64) -> Vec<u8> {
        let mut state = seed;
        std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .take(PAGE_SIZE)
        .collect()
    }

    /// Ends the batch, and takes in what its groups come to with lz4.
    fn settle(packer: &mut Packer) {
        let literals = packer.finish(Literals::default());
        let mut encoder = Encoder::new(0);
        for (content, origins) in literals.content.chunks(GROUP_BYTES).zip(&literals.groups) {
            let mut coded = Vec::new();
            let pays = encoder.encode(Effort::LEAST, content, &mut coded);
            let verdict = Verdict {
                content: content.len(),
                coded: coded.len(),
                pays,
            };
            packer.learn(origins, verdict);
        }
    }

    /// A batch of one group of this region, which does not pay.
    fn disappoint(packer: &mut Packer, region: u32) {
        for seed in 0..32 {
            packer.push_page(Origin::Region(region), &noise(seed));
        }
        settle(packer);
    }

    #[test]
    fn what_did_not_pay_is_skipped_and_probed_once_in_32() {
        let mut packer = Packer::new();
        let mut packed = Vec::new();
        for seed in 0..96 {
            let page = noise(seed);
            let pack = packer.is_worth_packing(Origin::Region(0), &page);
            packed.push(pack);
            if pack {
                packer.push_page(Origin::Region(0), &page);
            }
            if seed == 31 {
                settle(&mut packer);
            }
        }
        assert!(packed[..32].iter().all(|&pack| pack), "the first group is tried");
        assert!(packed[32..].iter().all(|&pack| !pack), "nothing after it is");
        // The 64 skipped so far hold two probes, which did not pay either: 31 skips are to come before the next.
        let text = vec![7; PAGE_SIZE];
        let after: Vec<bool> = (0..40)
            .map(|_| packer.is_worth_packing(Origin::Region(0), &text))
            .collect();
        assert_eq!(after.iter().position(|&pack| pack), Some(31));
        assert!(after[31..].iter().all(|&pack| pack));
        assert!(
            packer.is_worth_packing(Origin::Region(1), &text),
            "another region has its own memory"
        );
        assert!(
            !packer.is_worth_packing(Origin::Region(2), &noise(0)),
            "but is tried before it is packed, where the last group did not pay"
        );
        packer.push_page(Origin::Region(1), &text);
        settle(&mut packer);
        assert!(packer.is_worth_packing(Origin::Region(3), &noise(0)));
        disappoint(&mut packer, 4);
        assert!(
            packer.is_worth_packing(Origin::Region(1), &noise(0)),
            "it has paid before"
        );
        assert!(!packer.is_worth_packing(Origin::Region(5), &noise(0)));
        packer.set_effort(Effort::LEAST, Effort::MOST);
        disappoint(&mut packer, 6);
        assert!(
            packer.is_worth_packing(Origin::Region(7), &noise(0)),
            "what lz4 does to a page does not tell what zstd does to a group"
        );
    }

    #[test]
    fn a_small_share_of_an_incompressible_group_is_not_judged() {
        let mut packer = Packer::new();
        packer.push(Origin::Opaque, &[7; 100]);
        for seed in 0..40 {
            packer.push_page(Origin::Region(0), &noise(seed));
        }
        settle(&mut packer);
        assert!(packer.is_worth_packing(Origin::Opaque, &[7; 100]));
        assert!(!packer.is_worth_packing(Origin::Region(0), &noise(1)));
    }

    #[test]
    fn pages_are_counted_in_the_group_in_which_they_begin() {
        let mut packer = Packer::new();
        packer.push(Origin::Opaque, &[1; 5]);
        for seed in 0..32 {
            packer.push_page(Origin::Region(0), &noise(seed));
        }
        packer.push(Origin::Region(0), &[0; GROUP_BYTES - PAGE_SIZE]);
        packer.push_page(Origin::Region(0), &[2; PAGE_SIZE]);
        let literals = packer.finish(Literals::default());
        assert_eq!(literals.content.len(), 5 + 33 * PAGE_SIZE + GROUP_BYTES - PAGE_SIZE);
        let pages: Vec<u64> = literals.groups.iter().map(|group| group.pages).collect();
        assert_eq!(pages, [32, 1, 0]);
    }
}
