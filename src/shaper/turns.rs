//! Turns of the flows that share a link: the [`Scheduler`] on tokio's tasks.
//!
//! A flow that has had its turn asks for the next one a moment later. Were the turn passed on in that moment, two flows would always
//! alternate, whatever their weights. So the turn waits for a flow to which it is owed, but not for long: it may have nothing more to send
//! (anticipatory scheduling, Iyer and Druschel, 2001).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

use super::Shaper;
use crate::proto::rate::{Class, FlowId, Scheduler, Weight};

/// The turn waits so long for a flow that is owed it. Less than the limit saves up (5 ms), so that no rate is lost.
const PATIENCE: Duration = Duration::from_millis(1);

/// The turns of one link, and the limit of what passes in all of them.
#[derive(Debug)]
pub struct Turns {
    limit: Shaper,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    scheduler: Scheduler,
    /// Somebody has the turn.
    taken: bool,
    /// The flow that the turn waits for.
    awaited: Option<FlowId>,
    /// Counts what was waited for.
    waits: u64,
    waiting: HashMap<FlowId, oneshot::Sender<()>>,
}

/// A flow on a link, until it is dropped.
#[derive(Debug)]
pub struct Flow {
    turns: Arc<Turns>,
    id: FlowId,
}

/// Class and weight of a [`Flow`].
#[derive(Clone, Debug)]
pub struct Terms {
    turns: Arc<Turns>,
    id: FlowId,
}

/// The right to put what was asked for on the link. The next flow has its turn when this is dropped.
#[derive(Debug)]
pub struct Turn<'a>(&'a Flow);

impl Turns {
    /// Turns of which all together pass at the rate of `limit`.
    #[must_use]
    pub fn new(limit: Shaper) -> Arc<Self> {
        Arc::new(Self {
            limit,
            state: Mutex::default(),
        })
    }

    /// What passes in all turns together.
    #[must_use]
    pub fn limit(&self) -> &Shaper {
        &self.limit
    }

    /// A flow more.
    #[must_use]
    pub fn join(self: &Arc<Self>, class: Class, weight: Weight) -> Flow {
        let id = self.state().scheduler.join(class, weight);
        Flow {
            turns: Arc::clone(self),
            id,
        }
    }

    /// The turn of this flow is over.
    fn release(self: &Arc<Self>, flow: FlowId) {
        let mut state = self.state();
        state.taken = false;
        if !state.scheduler.is_owed(flow) {
            return state.pass_on();
        }
        state.awaited = Some(flow);
        state.waits += 1;
        let (turns, wait) = (Arc::clone(self), state.waits);
        drop(state);
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            let mut state = turns.state();
            if state.waits == wait {
                state.awaited = None;
                state.pass_on();
            }
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whole after every statement.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Gives the turn to whose it is, unless somebody has it or it waits for one to whom it is owed.
    fn pass_on(&mut self) {
        if self.awaited.is_some_and(|flow| self.scheduler.is_owed(flow)) {
            return;
        }
        self.awaited = None;
        while !self.taken {
            let Some(next) = self.scheduler.serve() else { return };
            // Who gave up waiting has no one to hear it.
            self.taken = self
                .waiting
                .remove(&next)
                .is_some_and(|waiting| waiting.send(()).is_ok());
        }
    }
}

impl Flow {
    /// Waits for the flow's turn to send `bytes`, and for the link's limit to let them pass. A caller that gives up has asked for nothing.
    pub async fn turn(&mut self, bytes: u64) -> Turn<'_> {
        let granted = {
            let (sender, granted) = oneshot::channel();
            let mut state = self.turns.state();
            state.waiting.insert(self.id, sender);
            state.scheduler.ask(self.id, bytes);
            state.awaited = state.awaited.filter(|awaited| *awaited != self.id);
            state.pass_on();
            granted
        };
        let turn = Waiting { flow: self, granted }.granted().await;
        self.turns.limit.admit(bytes).await;
        turn
    }

    /// Class and weight, to be changed while the flow is in use.
    #[must_use]
    pub fn terms(&self) -> Terms {
        Terms {
            turns: Arc::clone(&self.turns),
            id: self.id,
        }
    }
}

impl Terms {
    /// Class and weight from now on, also of what waits. Of no effect once the flow is dropped.
    pub fn set(&self, class: Class, weight: Weight) {
        let mut state = self.turns.state();
        state.scheduler.set(self.id, class, weight);
        state.pass_on();
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        let mut state = self.turns.state();
        state.scheduler.leave(self.id);
        state.waiting.remove(&self.id);
        state.pass_on();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.turns.release(self.0.id);
    }
}

/// A turn that is waited for. Where the caller gives up, it is asked for no more, or passed on if it has come.
struct Waiting<'a> {
    flow: &'a Flow,
    granted: oneshot::Receiver<()>,
}

impl<'a> Waiting<'a> {
    async fn granted(mut self) -> Turn<'a> {
        let granted = (&mut self.granted).await;
        debug_assert!(
            granted.is_ok(),
            "the flow is borrowed, so nobody drops its sender or asks anew"
        );
        Turn(self.flow)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.flow.turns.state();
        if state.waiting.remove(&self.flow.id).is_some() {
            state.scheduler.withdraw(self.flow.id);
        } else if self.granted.try_recv().is_ok() {
            state.taken = false;
            state.pass_on();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::proto::page::ByteRate;

    const RATE: ByteRate = ByteRate(12_500_000);
    const FRAME: u64 = 60_000;

    fn weight(weight: u32) -> Weight {
        Weight::new(weight).unwrap()
    }

    /// Always has a frame to send, and notes when each was let pass.
    fn greedy(mut flow: Flow) -> Arc<Mutex<Vec<Instant>>> {
        let passed = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&passed);
        tokio::spawn(async move {
            loop {
                let turn = flow.turn(FRAME).await;
                noted.lock().unwrap().push(Instant::now());
                drop(turn);
                tokio::task::yield_now().await;
            }
        });
        passed
    }

    fn between(passed: &Mutex<Vec<Instant>>, from: Instant, to: Instant) -> u64 {
        let passed = passed.lock().unwrap();
        passed.iter().filter(|at| (from..to).contains(at)).count() as u64 * FRAME
    }

    #[tokio::test(start_paused = true)]
    async fn two_migrations_share_three_to_one_also_where_one_starts_late() {
        let turns = Turns::new(Shaper::new(Some(RATE)));
        let start = Instant::now();
        let heavy = greedy(turns.join(Class::Migration, weight(3)));
        tokio::time::sleep(Duration::from_secs(5)).await;
        let light = greedy(turns.join(Class::Migration, weight(1)));
        tokio::time::sleep(Duration::from_secs(10)).await;
        let both = start + Duration::from_secs(5)..Instant::now();
        let alone = between(&heavy, start, both.start) as f64 / RATE.bytes_in(Duration::from_secs(5)) as f64;
        assert!((0.99..1.02).contains(&alone), "{alone}");
        let shares = [&heavy, &light].map(|passed| between(passed, both.start, both.end) as f64);
        let ratio = shares[0] / shares[1];
        assert!((2.95..3.05).contains(&ratio), "{ratio}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_stands_still_waits_for_one_frame_at_most() {
        let turns = Turns::new(Shaper::new(Some(RATE)));
        let _others: Vec<_> = (0..5)
            .map(|_| greedy(turns.join(Class::Migration, weight(100))))
            .collect();
        let mut flow = turns.join(Class::Migration, weight(1));
        tokio::time::sleep(Duration::from_secs(1)).await;
        flow.terms().set(Class::StopAndCopy, weight(1));
        let before = Instant::now();
        let _turn = flow.turn(FRAME).await;
        let waited = before.elapsed();
        assert!(
            waited <= RATE.time_for(2 * FRAME) + Duration::from_millis(5),
            "{waited:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_flow_with_nothing_more_to_send_is_not_waited_for() {
        let turns = Turns::new(Shaper::new(Some(RATE)));
        let mut heavy = turns.join(Class::Migration, weight(1_000));
        drop(heavy.turn(FRAME).await);
        let light = greedy(turns.join(Class::Migration, weight(1)));
        let start = Instant::now();
        tokio::time::sleep(Duration::from_secs(1)).await;
        drop(heavy.turn(FRAME).await);
        tokio::time::sleep(Duration::from_secs(4)).await;
        let used = between(&light, start, Instant::now()) as f64 / RATE.bytes_in(Duration::from_secs(5)) as f64;
        assert!(used > 0.98, "{used}");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_gives_up_waiting_holds_up_nobody() {
        let turns = Turns::new(Shaper::new(None));
        let mut holder = turns.join(Class::Migration, weight(1));
        let turn = holder.turn(1).await;
        let mut hasty = turns.join(Class::Migration, weight(1));
        let given_up = tokio::time::timeout(Duration::from_millis(5), hasty.turn(1))
            .await
            .is_err();
        assert!(given_up);
        let mut unlucky = turns.join(Class::Migration, weight(1));
        {
            let waiting = unlucky.turn(1);
            tokio::pin!(waiting);
            assert!(
                tokio::time::timeout(Duration::from_millis(5), &mut waiting)
                    .await
                    .is_err()
            );
            drop(turn);
            // It is granted now, and given up before that is seen.
        }
        let next = tokio::time::timeout(Duration::from_secs(1), hasty.turn(1)).await;
        assert!(next.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_flow_that_ends_with_its_turn_passes_it_on() {
        let turns = Turns::new(Shaper::new(Some(ByteRate(1))));
        let mut slow = turns.join(Class::Migration, weight(1));
        let stuck = tokio::spawn(async move {
            slow.turn(100_000).await;
        });
        tokio::time::sleep(Duration::from_secs(1)).await;
        stuck.abort();
        let _ = stuck.await;
        turns.limit().set_rate(None);
        let mut next = turns.join(Class::Migration, weight(1));
        assert!(tokio::time::timeout(Duration::from_secs(1), next.turn(1)).await.is_ok());
    }
}
