//! Who sends next on a link that several flows share.
//!
//! ```text
//! control          has a connection and a socket of its own, and never stands here
//! stop-and-copy    before everything else: a guest stands still
//! migration        by weight
//! background       only when nobody above wants to send
//! ```
//!
//! Within a class it is start-time fair queueing (Goyal, Vin, Cheng, 1996): each request starts at the later of the class's clock and of its
//! flow's own last end, ends `bytes / weight` later, and the earliest start goes first. The class's clock is the start of what was served
//! last, so a flow that was idle or comes late has no claim on what it did not ask for, and two that always ask share by their weights to
//! within one request of each.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

/// Classes in their order: what stands further up goes first, always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// The rest of a guest that stands still, or is about to.
    StopAndCopy,
    /// A guest that runs.
    Migration,
    /// Nobody waits for it.
    Background,
}

/// A flow's share beside others of its class.
pub type Weight = NonZeroU32;

/// Names a flow of one [`Scheduler`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(u64);

/// See the head of this file. Each flow asks for one thing at a time.
#[derive(Debug, Default)]
pub struct Scheduler {
    flows: BTreeMap<FlowId, Flow>,
    clocks: [Virtual; 3],
    next: u64,
}

/// Bytes over weight, in parts of 2⁻³².
type Virtual = u128;

#[derive(Debug)]
struct Flow {
    class: Class,
    weight: Weight,
    /// Where its last request ended on the clock of its class.
    end: Virtual,
    asks: Option<Ask>,
}

#[derive(Clone, Copy, Debug)]
struct Ask {
    bytes: u64,
    start: Virtual,
    /// Earlier ones first where the start is the same.
    order: u64,
}

impl Scheduler {
    /// A flow more, which asks for nothing yet.
    pub fn join(&mut self, class: Class, weight: Weight) -> FlowId {
        let id = FlowId(self.number());
        let flow = Flow {
            class,
            weight,
            end: self.clocks[class as usize],
            asks: None,
        };
        self.flows.insert(id, flow);
        id
    }

    /// The flow asks for nothing any more.
    pub fn leave(&mut self, id: FlowId) {
        self.flows.remove(&id);
    }

    /// The flow would send so many bytes next, instead of what it asked for before.
    pub fn ask(&mut self, id: FlowId, bytes: u64) {
        let order = self.number();
        if let Some(start) = self.flows.get(&id).map(|flow| self.start(flow))
            && let Some(flow) = self.flows.get_mut(&id)
        {
            flow.asks = Some(Ask { bytes, start, order });
        }
    }

    /// The flow would send nothing for now.
    pub fn withdraw(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.get_mut(&id) {
            flow.asks = None;
        }
    }

    /// Class and weight from now on, for what it has asked for too.
    pub fn set(&mut self, id: FlowId, class: Class, weight: Weight) {
        let Some(flow) = self.flows.get_mut(&id) else { return };
        flow.weight = weight;
        if flow.class != class {
            flow.class = class;
            flow.end = self.clocks[class as usize];
            if let Some(ask) = &mut flow.asks {
                ask.start = flow.end;
            }
        }
    }

    /// Whether a flow that asks for nothing now would be served before all that do, if it asked.
    #[must_use]
    pub fn is_owed(&self, id: FlowId) -> bool {
        match (self.flows.get(&id), self.first()) {
            (Some(flow), Some((class, ask, _))) => (flow.class, self.start(flow)) < (class, ask.start),
            _ => false,
        }
    }

    /// Serves whose turn it is, if anybody asks.
    pub fn serve(&mut self) -> Option<FlowId> {
        let (class, ask, id) = self.first()?;
        let flow = self.flows.get_mut(&id)?;
        flow.asks = None;
        flow.end = ask.start + (Virtual::from(ask.bytes) << 32) / Virtual::from(flow.weight.get());
        self.clocks[class as usize] = ask.start;
        Some(id)
    }

    fn first(&self) -> Option<(Class, Ask, FlowId)> {
        let asking = self
            .flows
            .iter()
            .filter_map(|(id, flow)| Some((flow.class, flow.asks?, *id)));
        asking.min_by_key(|(class, ask, _)| (*class, ask.start, ask.order))
    }

    fn start(&self, flow: &Flow) -> Virtual {
        self.clocks[flow.class as usize].max(flow.end)
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn weight(weight: u32) -> Weight {
        Weight::new(weight).unwrap()
    }

    /// Serves `rounds` times flows that always ask, each for the next of its sizes; what each got.
    fn serve(scheduler: &mut Scheduler, flows: &[(FlowId, Vec<u64>)], rounds: usize) -> Vec<u64> {
        let mut got = vec![0; flows.len()];
        let mut turns = vec![0; flows.len()];
        let size = |at: usize, turn: usize| flows[at].1[turn % flows[at].1.len()];
        for (at, (id, _)) in flows.iter().enumerate() {
            scheduler.ask(*id, size(at, 0));
        }
        for _ in 0..rounds {
            let served = scheduler.serve().unwrap();
            let at = flows.iter().position(|(id, _)| *id == served).unwrap();
            got[at] += size(at, turns[at]);
            turns[at] += 1;
            scheduler.ask(served, size(at, turns[at]));
        }
        got
    }

    #[test]
    fn weights_of_three_to_one_share_three_to_one() {
        let mut scheduler = Scheduler::default();
        let flows = [3, 1].map(|share| (scheduler.join(Class::Migration, weight(share)), vec![100_000]));
        let got = serve(&mut scheduler, &flows, 400);
        assert_eq!(got, [30_000_000, 10_000_000]);
    }

    #[test]
    fn a_flow_that_comes_late_or_was_idle_gets_its_share_from_then_on_and_nothing_for_before() {
        let mut scheduler = Scheduler::default();
        let early = (scheduler.join(Class::Migration, weight(1)), vec![1_000]);
        let idle = scheduler.join(Class::Migration, weight(1));
        serve(&mut scheduler, std::slice::from_ref(&early), 1_000);
        let late = scheduler.join(Class::Migration, weight(1));
        let flows = [early, (idle, vec![1_000]), (late, vec![1_000])];
        let got = serve(&mut scheduler, &flows, 300);
        assert!(got.iter().all(|got| got.abs_diff(100_000) <= 1_000), "{got:?}");
    }

    #[test]
    fn a_guest_that_stands_still_goes_before_any_weight_and_background_behind() {
        let mut scheduler = Scheduler::default();
        let background = scheduler.join(Class::Background, weight(1_000));
        let migration = scheduler.join(Class::Migration, weight(1_000));
        let last = scheduler.join(Class::StopAndCopy, weight(1));
        for flow in [background, migration, last] {
            scheduler.ask(flow, 1);
        }
        let order: Vec<FlowId> = std::iter::from_fn(|| scheduler.serve()).collect();
        assert_eq!(order, [last, migration, background]);
    }

    #[test]
    fn a_flow_that_waits_already_is_served_by_its_new_class() {
        let mut scheduler = Scheduler::default();
        let [one, two] = [1, 1].map(|share| scheduler.join(Class::Migration, weight(share)));
        scheduler.ask(one, 1_000);
        scheduler.ask(two, 1_000);
        scheduler.set(two, Class::StopAndCopy, weight(1));
        assert_eq!(scheduler.serve(), Some(two));
    }

    #[test]
    fn a_flow_that_was_served_is_owed_more_until_it_had_its_share() {
        let mut scheduler = Scheduler::default();
        let heavy = scheduler.join(Class::Migration, weight(3));
        let light = scheduler.join(Class::Migration, weight(1));
        scheduler.ask(heavy, 300);
        assert_eq!(scheduler.serve(), Some(heavy));
        assert!(!scheduler.is_owed(heavy), "nobody else asks");
        scheduler.ask(light, 300);
        assert!(!scheduler.is_owed(heavy), "one comes later");
        assert_eq!(scheduler.serve(), Some(light));
        scheduler.ask(light, 300);
        assert!(scheduler.is_owed(heavy), "two more of its requests fit in before");
    }

    #[test]
    fn who_withdrew_or_left_is_not_served() {
        let mut scheduler = Scheduler::default();
        let [one, two] = [1, 1].map(|share| scheduler.join(Class::Migration, weight(share)));
        scheduler.ask(one, 1);
        scheduler.ask(two, 1);
        scheduler.withdraw(one);
        scheduler.leave(two);
        assert_eq!(scheduler.serve(), None);
    }

    proptest! {
        #[test]
        fn whoever_always_asks_gets_its_share_to_within_one_request_of_each(
            flows in prop::collection::vec((1_u32..100, prop::collection::vec(1_u64..600_000, 1..5)), 2..6),
        ) {
            let mut scheduler = Scheduler::default();
            let total: u64 = flows.iter().map(|(share, _)| u64::from(*share)).sum();
            let shares: Vec<u32> = flows.iter().map(|(share, _)| *share).collect();
            let flows: Vec<_> = flows
                .into_iter()
                .map(|(share, sizes)| (scheduler.join(Class::Migration, weight(share)), sizes))
                .collect();
            let got = serve(&mut scheduler, &flows, 2_000);
            let all: u64 = got.iter().sum();
            let largest = flows.iter().flat_map(|(_, sizes)| sizes).max().unwrap();
            for (at, share) in shares.iter().enumerate() {
                // Per unit of weight nobody is ahead or behind by more than the largest request of one unit.
                let fair = all * u64::from(*share) / total;
                let slack = largest * (u64::from(*share) + flows.len() as u64 + 1);
                prop_assert!(got[at].abs_diff(fair) <= slack, "{got:?} of {shares:?}");
            }
        }
    }
}
