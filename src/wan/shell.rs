//! A profile as assignments that `netem-scripts/link` evaluates: what `ip` and `tc` have to be told.

use std::time::Duration;

use super::model::ETHERNET_OVERHEAD;
use super::profile::Profile;
use super::tc;

/// One assignment a line. All values are numbers and words of ours, quoted.
pub(super) fn assignments(profile: &Profile) -> String {
    let wire = u64::from(profile.mtu_bytes + ETHERNET_OVERHEAD);
    let direction = profile.direction();
    let values = [
        ("LINK_MTU", profile.mtu_bytes.to_string()),
        (
            "LINK_DEVICE_QUEUE",
            (profile.rate.bytes_in(DEVICE_QUEUE) / wire)
                .max(MIN_DEVICE_QUEUE)
                .to_string(),
        ),
        ("LINK_NETEM", tc::netem(&direction, false)),
        ("LINK_BOTTLENECK", tc::bottleneck(&direction)),
        ("LINK_NOT_NETEM", tc::refusal_of(profile).unwrap_or_default().to_owned()),
    ];
    values
        .iter()
        .map(|(name, value)| format!("{name}='{value}'\n"))
        .collect()
}

/// A TUN device drops silently when its queue is full; the emulator reads it at least each 10 ms on a busy machine.
const DEVICE_QUEUE: Duration = Duration::from_millis(10);
const MIN_DEVICE_QUEUE: u64 = 5000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::page::ByteRate;
    use crate::wan::event::{Event, Happening};
    use crate::wan::loss::Loss;
    use crate::wan::ordinals::Ordinals;
    use crate::wan::random::Probability;

    fn profile() -> Profile {
        Profile {
            name: "test".to_owned(),
            rtt: Duration::from_millis(150),
            rate: ByteRate::from_bits_per_second(1_000_000_000),
            queue: Duration::from_millis(50),
            loss: Loss::Bernoulli(Probability::new(0.001).expect("a probability")),
            lost: Ordinals::default(),
            jitter: None,
            reordering: None,
            duplication: Probability::NEVER,
            mtu_bytes: 1500,
            events: Vec::new(),
        }
    }

    #[test]
    fn the_script_is_told_what_the_profile_says() {
        insta::assert_snapshot!(assignments(&profile()), @r"
        LINK_MTU='1500'
        LINK_DEVICE_QUEUE='5000'
        LINK_NETEM='netem limit 244140 delay 75000us loss random 0.100000%'
        LINK_BOTTLENECK='tbf rate 1000000000bit burst 250000 limit 6250000'
        LINK_NOT_NETEM=''
        ");
    }

    #[test]
    fn an_event_that_netem_cannot_play_keeps_the_whole_link_off_it() {
        let mut profile = profile();
        profile.events.push(Event {
            at: Duration::ZERO,
            happening: Happening::Lose {
                directions: crate::wan::change::Directions::Both,
                datagrams: 1,
            },
        });
        assert!(assignments(&profile).contains("LINK_NOT_NETEM='netem cannot"));
    }
}
