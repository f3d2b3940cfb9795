//! What a migration may take of the link it uses: its own limit, and its class and weight beside others. They outlive a link, and may
//! change at any time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::proto::page::ByteRate;
use crate::proto::rate::{Class, Weight};
use crate::shaper::{Flow, Shaper, Terms, Turns};

/// Flows whose terms are changed: two streams, on the link that is used now and on the one before.
const NEWEST: usize = 4;

/// See the head of this file.
#[derive(Debug)]
pub(crate) struct Share {
    limit: Shaper,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    class: Class,
    weight: Weight,
    /// Of the newest flows: of memory and of disks, before and after a cut. Those of flows that are gone have no effect.
    terms: VecDeque<Terms>,
}

impl Default for Share {
    /// No limit, a weight of 1.
    fn default() -> Self {
        Self {
            limit: Shaper::new(None),
            state: Mutex::new(State {
                class: Class::Migration,
                weight: Weight::MIN,
                terms: VecDeque::new(),
            }),
        }
    }
}

impl Share {
    /// The migration's own limit.
    pub(crate) fn limit(&self) -> &Shaper {
        &self.limit
    }

    /// A flow of it on a link.
    pub(crate) fn join(&self, turns: &Arc<Turns>) -> Flow {
        let mut state = self.state();
        let flow = turns.join(state.class, state.weight);
        state.terms.truncate(NEWEST - 1);
        state.terms.push_front(flow.terms());
        flow
    }

    /// Whether the rest of its guest goes before everything else.
    pub(crate) fn set_urgent(&self, urgent: bool) {
        let class = if urgent { Class::StopAndCopy } else { Class::Migration };
        self.change(|state| state.class = class);
    }

    pub(crate) fn set_weight(&self, weight: Weight) {
        self.change(|state| state.weight = weight);
    }

    pub(crate) fn set_rate(&self, rate: Option<ByteRate>) {
        self.limit.set_rate(rate);
    }

    pub(crate) fn weight(&self) -> Weight {
        self.state().weight
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        let before = (state.class, state.weight);
        change(&mut state);
        if before != (state.class, state.weight) {
            for terms in &state.terms {
                terms.set(state.class, state.weight);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
