//! What an operator should know of a link that was tested, in sentences that say what to do.

use std::time::Duration;

use crate::config::units::show_duration;
use crate::proto::page::ByteRate;
use crate::transport::tuning::COMMON_UDP_PAYLOAD;

/// What was measured, and what was configured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Findings {
    pub(super) configured_rtt: Duration,
    pub(super) rtt: Duration,
    /// By how much round trips grew while the link was filled.
    pub(super) queue: Duration,
    pub(super) loss: f64,
    /// As configured.
    pub(super) capacity: Option<ByteRate>,
    /// At which the controller sent in the end.
    pub(super) rate: Option<ByteRate>,
    pub(super) goodput: ByteRate,
    /// What a link of this capacity and loss carries at most.
    pub(super) achievable: Option<ByteRate>,
    pub(super) mtu: u16,
    /// That ran beside the test.
    pub(super) migrations: usize,
}

/// A link that carries less than this share of what it should is worth a sentence.
const GOOD: f64 = 0.95;

/// More than random loss on a long link; the controller brakes from 5 % on.
const MUCH_LOSS: f64 = 0.03;

/// A guest's pause grows by the queue.
const LONG_QUEUE: Duration = Duration::from_millis(30);

/// Empty: as configured.
pub(super) fn findings(found: &Findings) -> Vec<String> {
    let mut sentences = Vec::new();
    let mut say = |sentence: String| sentences.push(sentence);
    if found.migrations > 0 {
        say(format!(
            "{} migrations to this peer went first: these are the figures of what they left",
            found.migrations
        ));
    }
    if found.rtt > found.configured_rtt.mul_f64(1.2) + Duration::from_millis(1) {
        say(format!(
            "the round trip takes {}, configured are {}: set rtt to what was measured, or windows are too small for the link",
            show_duration(millis(found.rtt)),
            show_duration(found.configured_rtt)
        ));
    }
    match (found.capacity, found.achievable) {
        (None, _) => say(format!(
            "no rate is configured, so the capacity was probed for: if the link is yours alone, set link.rate (lane bytes came at {})",
            found.goodput
        )),
        (Some(capacity), Some(achievable)) if (found.goodput.0 as f64) < GOOD * achievable.0 as f64 => {
            match found.rate.filter(|rate| (rate.0 as f64) < GOOD * capacity.0 as f64) {
                Some(rate) => say(format!(
                    "the link carries less than is configured: the controller went down from {capacity} to {rate}; set link.rate to what \
                     the link has"
                )),
                None => say(format!(
                    "{} arrived of the {achievable} that this link carries: look at the CPU of both gateways and at \
                     net.core.rmem_max (the gateways' logs say where a socket buffer is too small)",
                    found.goodput
                )),
            }
        }
        _ => {}
    }
    if found.loss > MUCH_LOSS {
        say(format!(
            "{:.1} % of the packets were lost: more than random loss on a healthy link; a policer or a full queue on the way drops them",
            found.loss * 100.0
        ));
    }
    if found.queue > LONG_QUEUE {
        say(format!(
            "{} of queue stood in the path while it was filled, and a guest's pause grows by it: somebody else fills the link, or \
             link.rate is above what it has",
            show_duration(millis(found.queue))
        ));
    }
    if found.mtu < COMMON_UDP_PAYLOAD {
        say(format!(
            "the path takes packets of {} bytes only, so more of the link goes into headers: look for a tunnel on the way",
            found.mtu + 28
        ));
    }
    sentences
}

fn millis(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Findings {
        Findings {
            configured_rtt: Duration::from_millis(150),
            rtt: Duration::from_micros(150_300),
            queue: Duration::from_millis(2),
            loss: 0.01,
            capacity: Some(ByteRate(12_500_000)),
            rate: Some(ByteRate(12_500_000)),
            goodput: ByteRate(11_600_000),
            achievable: Some(ByteRate(11_700_000)),
            mtu: COMMON_UDP_PAYLOAD,
            migrations: 0,
        }
    }

    #[test]
    fn a_link_that_is_as_configured_needs_no_words() {
        assert_eq!(findings(&healthy()), Vec::<String>::new());
    }

    #[test]
    fn each_thing_that_is_off_is_said_with_what_to_do() {
        let h = healthy();
        for (found, words) in [
            (Findings { migrations: 2, ..h }, "2 migrations"),
            (
                Findings {
                    rtt: Duration::from_millis(230),
                    ..h
                },
                "takes 230ms, configured are 150ms",
            ),
            (
                Findings {
                    capacity: None,
                    achievable: None,
                    ..h
                },
                "set link.rate",
            ),
            (
                Findings {
                    goodput: ByteRate(6_000_000),
                    rate: Some(ByteRate(6_500_000)),
                    ..h
                },
                "less than is configured",
            ),
            (
                Findings {
                    goodput: ByteRate(6_000_000),
                    ..h
                },
                "net.core.rmem_max",
            ),
            (Findings { loss: 0.04, ..h }, "4.0 % of the packets"),
            (
                Findings {
                    queue: Duration::from_millis(45),
                    ..h
                },
                "45ms of queue",
            ),
            (Findings { mtu: 1300, ..h }, "packets of 1328 bytes"),
        ] {
            let sentences = findings(&found);
            assert_eq!(sentences.len(), 1, "{sentences:?}");
            assert!(sentences[0].contains(words), "{sentences:?}");
        }
    }
}
