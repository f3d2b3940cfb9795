//! A profile as assignments that `netem-scripts/link` evaluates: what `ip` and `tc` have to be told.

use std::time::Duration;

use super::loss::Loss;
use super::model::ETHERNET_OVERHEAD;
use super::profile::Profile;

/// One assignment a line. All values are numbers and words of ours, quoted.
pub(super) fn assignments(profile: &Profile) -> String {
    let wire = u64::from(profile.mtu_bytes + ETHERNET_OVERHEAD);
    let in_flight = profile.rate.bytes_in(profile.one_way_delay() + profile.queue);
    let values = [
        ("LINK_MTU", profile.mtu_bytes.to_string()),
        (
            "LINK_DEVICE_QUEUE",
            (profile.rate.bytes_in(DEVICE_QUEUE) / wire)
                .max(MIN_DEVICE_QUEUE)
                .to_string(),
        ),
        ("LINK_DELAY", format!("{}us", profile.one_way_delay().as_micros())),
        ("LINK_RATE", format!("{}bit", u128::from(profile.rate.0) * 8)),
        ("LINK_QUEUE_BYTES", profile.queue_bytes().to_string()),
        // netem counts packets, in its delay line too: as if all were small.
        (
            "LINK_NETEM_LIMIT",
            (in_flight / SMALL_PACKET_BYTES).clamp(10_000, 4_000_000).to_string(),
        ),
        (
            "LINK_BURST_BYTES",
            profile
                .rate
                .bytes_in(BURST)
                .max(MIN_BURST_BYTES)
                .max(2 * wire)
                .to_string(),
        ),
        ("LINK_NETEM_LOSS", netem_loss(&profile.loss)),
        (
            "LINK_JITTER_US",
            profile
                .jitter
                .map_or(0, |jitter| jitter.deviation.as_micros())
                .to_string(),
        ),
    ];
    values
        .iter()
        .map(|(name, value)| format!("{name}='{value}'\n"))
        .collect()
}

fn netem_loss(loss: &Loss) -> String {
    // tc takes six decimals and stores 32 bits.
    let percent = |chance: super::random::Probability| format!("{:.6}%", chance.value() * 100.0);
    match loss {
        Loss::None => String::new(),
        Loss::Bernoulli(chance) => format!("loss random {}", percent(*chance)),
        Loss::GilbertElliott(model) => format!(
            "loss gemodel {} {} {} {}",
            percent(model.to_bad),
            percent(model.to_good),
            percent(model.loss_in_bad),
            percent(model.loss_in_good)
        ),
    }
}

/// A TUN device drops silently when its queue is full; the emulator reads it at least each 10 ms on a busy machine.
const DEVICE_QUEUE: Duration = Duration::from_millis(10);
const MIN_DEVICE_QUEUE: u64 = 5000;
const SMALL_PACKET_BYTES: u64 = 64;
/// Of the token bucket: 2 ms at the rate let a busy machine's timers be late without loss of rate.
const BURST: Duration = Duration::from_millis(2);
/// Ten full packets, a train of QUIC. With 5000 bytes a starved kernel passed 15 of 20 Mbit/s (user-mode Linux, 2026-11-23).
const MIN_BURST_BYTES: u64 = 16_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::ByteRate;
    use crate::wan::loss::GilbertElliott;
    use crate::wan::random::Probability;

    fn profile() -> Profile {
        Profile {
            name: "test".to_owned(),
            rtt: Duration::from_millis(150),
            rate: ByteRate::from_bits_per_second(1_000_000_000),
            queue: Duration::from_millis(50),
            loss: Loss::Bernoulli(Probability::new(0.001).expect("a probability")),
            jitter: None,
            mtu_bytes: 1500,
        }
    }

    #[test]
    fn tc_is_told_what_the_profile_says() {
        insta::assert_snapshot!(assignments(&profile()), @r"
        LINK_MTU='1500'
        LINK_DEVICE_QUEUE='5000'
        LINK_DELAY='75000us'
        LINK_RATE='1000000000bit'
        LINK_QUEUE_BYTES='6250000'
        LINK_NETEM_LIMIT='244140'
        LINK_BURST_BYTES='250000'
        LINK_NETEM_LOSS='loss random 0.100000%'
        LINK_JITTER_US='0'
        ");
    }

    #[test]
    fn the_limit_holds_more_packets_than_can_be_in_flight() {
        // 1000 packets, netem's default, would cut 1 Gbit/s at 75 ms to 160 Mbit/s.
        let text = assignments(&Profile {
            rtt: Duration::from_millis(600),
            ..profile()
        });
        assert!(text.contains("LINK_NETEM_LIMIT='683593'"), "{text}");
    }

    #[test]
    fn bursts_and_no_loss_have_their_own_words() {
        let chance = |value| Probability::new(value).expect("a probability");
        let loss = Loss::GilbertElliott(GilbertElliott {
            to_bad: chance(0.000_2),
            to_good: chance(0.2),
            loss_in_bad: Probability::ALWAYS,
            loss_in_good: Probability::NEVER,
        });
        assert_eq!(
            netem_loss(&loss),
            "loss gemodel 0.020000% 20.000000% 100.000000% 0.000000%"
        );
        assert_eq!(netem_loss(&Loss::None), "");
    }
}
