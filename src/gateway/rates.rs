//! Rates by calendar: what holds now is told to the transport, about once a second.
//!
//! ```text
//! wall clock ─▶ calendars of link and peers ─▶ bucket of the link, buckets of peers, capacities of controllers ─▶ admission
//! ```
//!
//! A rate that falls holds with the next packet. One that rises is there at once for a controller that was at its capacity, and is
//! approached by one that had braked.
//!
//! What holds follows from the time alone, and is told each time and not only when it changes. So a wall clock that is set, by NTP or a
//! person, and a host that was suspended need no care: a second later holds what the clock then shows. Nor does a connection
//! that was made just when a rate changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::{Core, clock};
use crate::config::Config;
use crate::proto::page::ByteRate;
use crate::proto::rate::Calendar;
use crate::store::trust::TrustStore;
use crate::transport::Transport;

/// Keeps the rates of the gateway at what its calendars say. Ends at once where there are none.
pub(crate) async fn follow(core: Arc<Core>, mut rates: Rates, every: Duration) {
    while core.config.has_calendar() {
        tokio::time::sleep(every).await;
        rates.apply(&core.config, &core.transport, &core.trust, clock::timestamp());
    }
}

/// Rates that calendars have set so far.
#[derive(Debug, Default)]
pub(crate) struct Rates {
    link: Option<ByteRate>,
    peers: BTreeMap<String, ByteRate>,
}

/// A rate that was another before.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    /// `None`: of the link.
    peer: Option<String>,
    rate: ByteRate,
    /// When its calendar changes it again, on the clocks of the site.
    until: Option<String>,
}

impl Rates {
    /// Makes what holds at `now` hold, where anything is in a calendar.
    pub(crate) fn apply(&mut self, config: &Config, transport: &Transport, trust: &TrustStore, now: Timestamp) {
        if !config.has_calendar() {
            return;
        }
        transport.set_link_rate(config.link_rate_at(now));
        for peer in trust.peers().keys() {
            transport.set_peer_rate(peer, config.peer_rate_at(peer, now));
        }
        for Change { peer, rate, until } in self.changes(config, now) {
            let until = until.unwrap_or_else(|| "ever".to_owned());
            match peer {
                None => tracing::info!(%rate, until, "the link has another rate by its calendar"),
                Some(peer) => tracing::info!(peer, %rate, until, "a peer has another rate by its calendar"),
            }
        }
    }

    /// Rates of calendars that have changed since this was last asked, all of them the first time.
    fn changes(&mut self, config: &Config, now: Timestamp) -> Vec<Change> {
        let mut changes = Vec::new();
        let until = |calendar: &Calendar| calendar.next_change(now).map(|at| calendar.shown(at));
        let calendar = &config.link.calendar;
        if let Some(rate) = config.link_rate_at(now).filter(|_| !calendar.is_empty())
            && self.link.replace(rate) != Some(rate)
        {
            changes.push(Change {
                peer: None,
                rate,
                until: until(calendar),
            });
        }
        for peer in config.peers.iter().filter(|peer| !peer.calendar.is_empty()) {
            if let Some(rate) = config.peer_rate_at(&peer.name, now)
                && self.peers.insert(peer.name.clone(), rate) != Some(rate)
            {
                changes.push(Change {
                    peer: Some(peer.name.clone()),
                    rate,
                    until: until(&peer.calendar),
                });
            }
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn config() -> Config {
        let text = r#"
            site = "a"
            [link]
            rate = "1gbit"
            time_zone = "Europe/Berlin"
            [[link.calendar]]
            days = "mon-fri"
            hours = "08:00-18:00"
            rate = "200mbit"
            [[peer]]
            name = "tokyo"
            rate = "400mbit"
            [[peer.calendar]]
            days = "daily"
            hours = "17:00-19:00"
            rate = "100mbit"
        "#;
        Config::parse(text, &Overrides::default()).unwrap()
    }

    #[test]
    fn a_peer_has_the_least_of_its_own_rate_and_the_links() {
        let config = config();
        for (time, link, tokyo) in [
            ("2026-11-23T06:59:59Z", 1000, 400),
            ("2026-11-23T07:00:00Z", 200, 200),
            ("2026-11-23T16:00:00Z", 200, 100),
            ("2026-11-23T17:00:00Z", 1000, 100),
            ("2026-11-23T18:00:00Z", 1000, 400),
        ] {
            let megabit = |value: u64| Some(ByteRate::from_bits_per_second(value * 1_000_000));
            let now = at(time);
            assert_eq!(config.link_rate_at(now), megabit(link), "{time}");
            assert_eq!(config.peer_rate_at("tokyo", now), megabit(tokyo), "{time}");
            assert_eq!(config.peer_rate_at("oslo", now), megabit(link), "{time}");
        }
    }

    #[test]
    fn a_change_is_told_once_with_its_end_whatever_the_clock_does_in_between() {
        let (config, mut rates) = (config(), Rates::default());
        let mut told = |time: &str| -> Vec<String> {
            let changes = rates.changes(&config, at(time)).into_iter();
            let name = |peer: Option<String>| peer.unwrap_or_else(|| "link".to_owned());
            changes
                .map(|change| {
                    format!(
                        "{} {} {}",
                        name(change.peer),
                        change.rate,
                        change.until.unwrap_or_default()
                    )
                })
                .collect()
        };
        assert_eq!(
            told("2026-11-23T06:59:59Z"),
            [
                "link 1gbit 2026-11-23 08:00 +01:00",
                "tokyo 400mbit 2026-11-23 17:00 +01:00"
            ]
        );
        assert!(told("2026-11-23T06:59:59Z").is_empty());
        let by_day = [
            "link 200mbit 2026-11-23 18:00 +01:00",
            "tokyo 200mbit 2026-11-23 17:00 +01:00",
        ];
        assert_eq!(told("2026-11-23T07:00:00Z"), by_day);
        assert!(told("2026-11-23T07:00:01Z").is_empty());
        // Set back by NTP, and forward again.
        assert_eq!(told("2026-11-23T06:59:58Z").len(), 2);
        assert_eq!(told("2026-11-23T07:00:02Z"), by_day);
        // A host that was suspended over the weekend.
        assert_eq!(told("2026-11-28T16:30:00Z").len(), 2);
    }
}
