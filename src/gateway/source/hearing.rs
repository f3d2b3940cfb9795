//! What a source's driver is told, by the stream, the peer and the vmm, and what it makes of it.

use super::SourceDriver;
use super::before_switchover::Hold;
use crate::api::Phase;
use crate::gateway::again;
use crate::gateway::clock;
use crate::gateway::contact::ContactEvent;
use crate::gateway::outbound::StreamEnd;
use crate::gateway::source_vmm::VmEvent;
use crate::proto::ownership::{Message, SourceEvent, StreamSum};
use crate::proto::wire::SessionMessage;

impl SourceDriver {
    pub(super) fn on_stream_end(&mut self, ended: StreamEnd) {
        match ended {
            // What has not been let by must not be handed over.
            StreamEnd::Eof(_) if !matches!(self.hold, Hold::Open) => {
                self.fail(format!(
                    "the hypervisor sent all of {} before the hook before_switchover had succeeded",
                    self.entry.vm
                ));
                self.feed(&SourceEvent::Cancel);
            }
            StreamEnd::Eof(summary) => {
                let sum = StreamSum {
                    digest: summary.digest,
                    length: summary.bytes,
                };
                if let Some(stream) = &mut self.stream {
                    stream.sum = Some(sum);
                }
                self.show(Phase::StopAndCopy, None);
                self.feed(&SourceEvent::StreamEnded(sum));
            }
            StreamEnd::Failed(error) => {
                self.fail(format!("the hypervisor's migration stream failed: {error}"));
                self.feed(&SourceEvent::MigrateFailed);
            }
            StreamEnd::Stopped => {}
        }
    }

    pub(super) async fn on_contact(&mut self, event: ContactEvent) {
        match event {
            ContactEvent::Made { link, channel, held } => {
                self.lost_contact = None;
                if std::mem::take(&mut self.silence_told) {
                    self.entry.clear_advice();
                }
                // Before the channel is heard: what it acknowledges is of the new incarnation.
                let left = self.link.as_ref().map_or(0, |link| link.bulk_left());
                let resumed = self.stream.as_ref().map(|stream| {
                    let epoch = stream.outbound.epoch() + 1;
                    stream
                        .outbound
                        .resume(epoch, &held, left.saturating_sub(stream.left_before))
                });
                self.contact.adopt(channel);
                self.feed(&SourceEvent::Contact {
                    journal: link.peer_journal(),
                });
                match resumed {
                    Some(Ok(())) => self.start_sending(&link),
                    Some(Err(error)) => {
                        self.fail(format!("the stream cannot go on after the cut: {error}"));
                        self.feed(&SourceEvent::Cancel);
                    }
                    None => {}
                }
                self.earlier_wire_bytes = self.wire_bytes();
                if let Some(copying) = &mut self.copying {
                    copying.set_wire_at_start(link.wire_bytes());
                }
                self.link = Some(link);
            }
            ContactEvent::Message { channel, message } if self.contact.is_current(channel) => {
                self.on_message(message).await;
            }
            ContactEvent::Lost { channel, reason, .. }
                if self.contact.is_current(channel) || !self.contact.is_made() =>
            {
                self.contact.drop_channel();
                if self.machine.outcome().is_none() && self.lost_contact.is_none() {
                    tracing::warn!(migration = %self.entry.migration, peer = self.entry.peer, "contact lost: {reason}");
                    self.look_for_peer();
                }
            }
            ContactEvent::Impossible { reason } => {
                self.fail(reason);
                self.feed(&SourceEvent::Cancel);
            }
            ContactEvent::Message { .. }
            | ContactEvent::Lost { .. }
            | ContactEvent::Refused { .. }
            | ContactEvent::GivenUp { .. } => {}
        }
    }

    async fn on_message(&mut self, message: SessionMessage) {
        match message {
            SessionMessage::Failed { reason } => self.fail(reason),
            SessionMessage::Ownership(message) => {
                match &message {
                    Message::Running => self.resumed_at = self.resumed_at.or(Some(clock::now())),
                    Message::Aborted { reason } => {
                        // What was noticed here first is the cause of it.
                        self.undone_by_restart =
                            again::is_restart(*reason) && (self.undone_by_restart || self.reason.is_none());
                        self.fail(reason.to_string());
                    }
                    Message::Reverted => {
                        self.undone_by_restart = false;
                        self.fail("the destination's hypervisor refused to start the VM and gave it back".to_owned());
                    }
                    _ => {}
                }
                self.feed(&SourceEvent::Received(message));
            }
            // Heard by the stream itself.
            SessionMessage::Ack { .. } | SessionMessage::Loaded => {}
            SessionMessage::Accepted { .. }
            | SessionMessage::AcceptedKnowing { .. }
            | SessionMessage::Refused { .. }
            | SessionMessage::Cancel { .. }
            | SessionMessage::Answer { .. }
            | SessionMessage::AnswersTaken { .. } => {
                tracing::debug!(migration = %self.entry.migration, "the peer said what only opens or ends a session");
            }
        }
    }

    pub(super) async fn on_vm_event(&mut self, event: VmEvent) {
        match event {
            VmEvent::Stopped => {
                if self.stopped_at.is_none() && self.stream.is_some() {
                    self.stopped_at = Some(clock::now());
                    self.entry.share.set_urgent(true);
                    self.set_guest_stands(true);
                    self.show(Phase::Switchover, None);
                }
            }
            VmEvent::Resumed => {
                self.stopped_at = None;
                self.entry.share.set_urgent(false);
                self.set_guest_stands(false);
                self.feed(&SourceEvent::VmmRunning);
            }
            VmEvent::Deaf => {
                if self.vmm.is_dead() {
                    self.fail("the hypervisor's process at the source died".to_owned());
                    self.feed(&SourceEvent::VmmDead);
                }
            }
            VmEvent::PreSwitchover => self.finish_disks().await,
            VmEvent::Other => {}
        }
    }

    fn set_guest_stands(&self, stands: bool) {
        if let Some(stream) = &self.stream {
            stream.outbound.set_guest_stands(stands);
        }
    }
}
