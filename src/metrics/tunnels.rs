//! What a stream beside the migrations' own counts, it counts for the gateway: all of a kind together.

use std::sync::Arc;

use super::{Direction, Metrics};
use crate::api::Role;

/// A stream that is open, until the handle is dropped. What it is told are sums since the stream began.
#[derive(Debug)]
pub struct TunnelStream {
    metrics: Arc<Metrics>,
    role: Role,
    carries: Carries,
    said: u64,
    answered: u64,
    frames: u64,
}

/// What a stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carries {
    /// Another program's bytes.
    Program,
    /// The disks of a VM that migrates.
    Disks,
}

impl Metrics {
    /// A stream begins.
    #[must_use]
    pub fn tunnel_stream(self: &Arc<Self>, role: Role, carries: Carries) -> TunnelStream {
        if carries == Carries::Program {
            self.tunnel_streams[role as usize].inc();
        }
        TunnelStream {
            metrics: Arc::clone(self),
            role,
            carries,
            said: 0,
            answered: 0,
            frames: 0,
        }
    }
}

impl TunnelStream {
    /// Bytes of the stream, in from its program or out to it.
    pub fn said(&mut self, direction: Direction, bytes: u64) {
        let all = match self.carries {
            Carries::Program => &self.metrics.tunnel_bytes,
            Carries::Disks => &self.metrics.disk_bytes,
        };
        all[direction as usize].inc_by(more(&mut self.said, bytes));
    }

    /// Bytes of the way back.
    pub fn answered(&mut self, direction: Direction, bytes: u64) {
        if self.carries == Carries::Program {
            self.metrics.tunnel_bytes[direction as usize].inc_by(more(&mut self.answered, bytes));
        }
    }

    /// Bytes of frames.
    pub fn frames(&mut self, direction: Direction, bytes: u64) {
        let all = match self.carries {
            Carries::Program => &self.metrics.tunnel_frame_bytes,
            Carries::Disks => &self.metrics.disk_frame_bytes,
        };
        all[direction as usize].inc_by(more(&mut self.frames, bytes));
    }
}

impl Drop for TunnelStream {
    fn drop(&mut self) {
        if self.carries == Carries::Program {
            self.metrics.tunnel_streams[self.role as usize].dec();
        }
    }
}

fn more(before: &mut u64, now: u64) -> u64 {
    now.saturating_sub(std::mem::replace(before, now))
}
