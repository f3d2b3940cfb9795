//! A direction's settings in the words of `tc`: a netem queue for delay and loss, and the bottleneck as its child.

use std::time::Duration;

use super::loss::Loss;
use super::model::{ETHERNET_OVERHEAD, LinkSettings};
use super::profile::Profile;
use super::random::Probability;

/// What follows `tc qdisc add dev D root handle 1: `. All options, as netem forgets those that a change does not name.
pub(super) fn netem(settings: &LinkSettings, is_cut: bool) -> String {
    let in_flight = settings
        .rate
        .bytes_in(settings.one_way_delay)
        .saturating_add(settings.queue_bytes);
    // netem counts packets, in its delay line too: as if all were small.
    let limit = (in_flight / SMALL_PACKET_BYTES).clamp(10_000, 4_000_000);
    let loss = if is_cut {
        Loss::Bernoulli(Probability::ALWAYS)
    } else {
        settings.loss
    };
    let mut words = format!(
        "netem limit {limit} delay {}us{}",
        settings.one_way_delay.as_micros(),
        netem_loss(&loss)
    );
    if settings.duplication != Probability::NEVER {
        words += &format!(" duplicate {}", percent(settings.duplication));
    }
    if let Some(reordering) = settings.reordering {
        words += &format!(" reorder {}", percent(reordering.share));
    }
    words
}

/// What follows `tc qdisc add dev D parent 1:1 handle 10: `.
pub(super) fn bottleneck(settings: &LinkSettings) -> String {
    let wire = u64::from(settings.mtu_bytes + ETHERNET_OVERHEAD);
    let burst = settings.rate.bytes_in(BURST).max(MIN_BURST_BYTES).max(2 * wire);
    format!(
        "tbf rate {}bit burst {burst} limit {}",
        u128::from(settings.rate.0) * 8,
        settings.queue_bytes
    )
}

/// Why netem cannot be such a link, if it cannot.
pub(super) fn refusal(settings: &LinkSettings) -> Option<&'static str> {
    if settings.jitter.is_some() {
        Some("netem would reorder packets to vary their delay")
    } else if !settings.lost.is_empty() {
        Some("netem cannot lose packets by number")
    } else if settings
        .reordering
        .is_some_and(|reordering| reordering.lead < settings.one_way_delay)
    {
        Some("netem lets packets overtake by the whole delay only")
    } else if settings.reordering.is_some() && settings.one_way_delay == Duration::ZERO {
        Some("netem reorders nothing without a delay")
    } else {
        None
    }
}

/// Why netem cannot be a link of this profile at all times, if it cannot.
pub(super) fn refusal_of(profile: &Profile) -> Option<&'static str> {
    let bursts = profile
        .events
        .iter()
        .any(|event| matches!(event.happening, super::event::Happening::Lose { .. }));
    if bursts {
        return Some(NO_BURSTS);
    }
    profile.states().iter().find_map(refusal)
}

fn netem_loss(loss: &Loss) -> String {
    match loss {
        Loss::None => String::new(),
        Loss::Bernoulli(chance) => format!(" loss random {}", percent(*chance)),
        Loss::GilbertElliott(model) => format!(
            " loss gemodel {} {} {} {}",
            percent(model.to_bad),
            percent(model.to_good),
            percent(model.loss_in_bad),
            percent(model.loss_in_good)
        ),
    }
}

/// tc takes six decimals and stores 32 bits.
fn percent(chance: Probability) -> String {
    format!("{:.6}%", chance.value() * 100.0)
}

/// Why netem does not lose the next so many.
pub(super) const NO_BURSTS: &str = "netem cannot lose a number of packets";
const SMALL_PACKET_BYTES: u64 = 64;
/// Of the token bucket: 2 ms at the rate let a busy machine's timers be late without loss of rate.
const BURST: Duration = Duration::from_millis(2);
/// Ten full packets, a train of QUIC. With 5000 bytes a starved kernel passed 15 of 20 Mbit/s (user-mode Linux, 2026-11-23).
const MIN_BURST_BYTES: u64 = 16_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::change::Change;
    use crate::wan::model::tests::settings;

    fn changed(key: &str, value: &str) -> LinkSettings {
        Change::parse(key, value).expect("valid").apply(&settings())
    }

    #[test]
    fn tc_is_told_all_that_netem_can() {
        assert_eq!(netem(&settings(), false), "netem limit 244140 delay 75000us");
        assert_eq!(
            bottleneck(&settings()),
            "tbf rate 1000000000bit burst 250000 limit 6250000"
        );
        for (key, value, words) in [
            ("loss", "0.1%", " loss random 0.100000%"),
            (
                "gilbert_elliott",
                "0.02%/20%",
                " loss gemodel 0.020000% 20.000000% 100.000000% 0.000000%",
            ),
            ("duplication", "0.1%", " duplicate 0.100000%"),
            ("reordering", "1%", " reorder 1.000000%"),
        ] {
            let told = netem(&changed(key, value), false);
            assert_eq!(told, format!("netem limit 244140 delay 75000us{words}"));
        }
    }

    #[test]
    fn a_cut_is_the_loss_of_everything_whatever_else_is_lost() {
        let told = netem(&changed("loss", "0.1%"), true);
        assert!(told.ends_with("delay 75000us loss random 100.000000%"), "{told}");
    }

    #[test]
    fn the_limit_holds_more_packets_than_can_be_in_flight() {
        // 1000 packets, netem's default, would cut 1 Gbit/s at 75 ms to 160 Mbit/s.
        let told = netem(&changed("rtt", "600ms"), false);
        assert!(told.starts_with("netem limit 683593 "), "{told}");
    }

    #[test]
    fn what_netem_cannot_do_is_refused_and_what_it_can_is_not() {
        for (key, value) in [("jitter", "1ms"), ("reordering", "1%/2ms")] {
            assert!(refusal(&changed(key, value)).is_some(), "{key}");
        }
        for (key, value) in [
            ("reordering", "1%"),
            ("reordering", "1%/75ms"),
            ("duplication", "1%"),
            ("loss", "1%"),
        ] {
            assert_eq!(refusal(&changed(key, value)), None, "{key}");
        }
        let lost = LinkSettings {
            lost: "1".parse().expect("a number"),
            ..settings()
        };
        assert!(refusal(&lost).is_some());
    }
}
