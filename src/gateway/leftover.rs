//! What a stream that has ended still holds: for the page store, or only until its memory may be given back.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;

use crate::proto::reduce::{KeptPages, PageShelf, Reducer};
use crate::proto::session::Decoder;

/// What a session leaves, wherever it kept it.
pub(crate) type Kept = KeptPages<Box<dyn PageShelf + Send>>;

/// A stream that has ended, with everything that its threads held. What is for the next one is only put together when the VM runs, and memory not
/// given back before somebody else takes it or [`MEMORY_HELD`] has passed: hundreds of megabytes take 40 ms (2026-11-28), for which a guest would
/// stand still.
pub(crate) struct Leftover(Option<Remains>);

/// Puts together what is kept; `None` where not all of it was.
pub(crate) type Keeping = Box<dyn FnOnce() -> Option<Kept> + Send>;

enum Remains {
    ToKeep(Keeping),
    Memory(Box<dyn Any + Send>),
}

impl Leftover {
    /// Of a source.
    pub(crate) fn of_reducer(reducer: Reducer) -> Self {
        Self(Some(if reducer.keeps() {
            Remains::ToKeep(Box::new(move || reducer.into_kept()))
        } else {
            Remains::Memory(Box::new(reducer))
        }))
    }

    /// Of a destination. `keeps`: its pages are for the next session.
    pub(crate) fn of_decoder<S: PageShelf + Send + 'static>(decoder: Decoder<S>, keeps: bool) -> Self {
        Self(Some(if keeps {
            Remains::ToKeep(Box::new(move || {
                let kept = decoder.into_kept()?;
                Some(Kept {
                    shelf: Box::new(kept.shelf),
                    places: kept.places,
                })
            }))
        } else {
            Remains::Memory(Box::new(decoder))
        }))
    }

    /// What puts together what is kept, or what is only memory.
    pub(crate) fn split(mut self) -> (Option<Keeping>, Option<Box<dyn Any + Send>>) {
        match self.0.take() {
            Some(Remains::ToKeep(keeping)) => (Some(keeping), None),
            Some(Remains::Memory(memory)) => (None, Some(memory)),
            None => (None, None),
        }
    }
}

impl Drop for Leftover {
    /// Not on a thread that others wait for.
    fn drop(&mut self) {
        if let (Some(remains), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(remains));
        }
    }
}

impl std::fmt::Debug for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Leftover")
    }
}

/// Where a stream's thread puts what it leaves, for the driver.
#[derive(Debug, Default)]
pub(crate) struct LeftoverSlot(Arc<Mutex<Option<Leftover>>>);

/// By then a guest runs or is in doubt, where a moment more does not matter and others may need the memory.
const MEMORY_HELD: Duration = Duration::from_secs(5);

impl LeftoverSlot {
    /// What is only memory is held for [`MEMORY_HELD`] at most.
    pub(crate) fn put(&self, leftover: Leftover) {
        let is_memory = matches!(leftover.0, Some(Remains::Memory(_)));
        *self.slot() = Some(leftover);
        if let (true, Ok(runtime)) = (is_memory, Handle::try_current()) {
            let slot = Arc::downgrade(&self.0);
            runtime.spawn(async move {
                tokio::time::sleep(MEMORY_HELD).await;
                if let Some(slot) = slot.upgrade() {
                    drop(Self(slot).take());
                }
            });
        }
    }

    pub(crate) fn take(&self) -> Option<Leftover> {
        self.slot().take()
    }

    fn slot(&self) -> MutexGuard<'_, Option<Leftover>> {
        // It is there or not: always consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
