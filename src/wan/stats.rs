//! What a link has carried, as JSON. Both backends report the same object.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lateness::LatenessSummary;

/// A link and what it has carried since it was set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkStats {
    /// Name of the link.
    pub name: String,
    /// Name of its profile.
    pub profile: String,
    /// What carries the packets.
    pub backend: Backend,
    /// Of the random numbers; the kernel's netem has none that is stated.
    pub seed: Option<u64>,
    /// From site A to site B.
    pub ab: DirectionStats,
    /// From site B to site A.
    pub ba: DirectionStats,
    /// How the emulator fared.
    pub emulator: Option<EmulatorStats>,
    /// Why figures measured across this link until now are not to be used. Nothing, where they are.
    pub fault: Option<String>,
}

/// What carries the packets of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// `tc netem` of the kernel.
    Netem,
    /// This program.
    Emulator,
}

/// One direction: datagrams as a wire would carry them, and their IP bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectionStats {
    /// What the site sent into the link: the wire bytes of a transfer.
    pub offered: Traffic,
    /// What the link handed to the other site.
    pub delivered: Traffic,
    /// What it did not hand over, by cause.
    pub dropped: Drops,
    /// Copies that the link made, beside what was offered. Nothing where the kernel does not count them.
    pub duplicated: Option<Traffic>,
    /// What took the shorter way and overtook others. Nothing where the kernel does not count them.
    pub overtaking: Option<Traffic>,
    /// What is on its way: queued or delayed.
    pub in_flight_bytes: u64,
}

/// Datagrams and their IP bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Datagrams; of a train, each segment.
    pub packets: u64,
    /// IP headers included, Ethernet framing not.
    pub bytes: u64,
}

/// Datagrams that did not pass. Those of the first five causes are the link's doing, the others a fault of the harness.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drops {
    /// While the direction was cut.
    pub outage: Dropped,
    /// Longer than the MTU.
    pub mtu: Dropped,
    /// Named by a script or lost in a burst that was asked for.
    pub script: Dropped,
    /// Taken by the loss model; with netem, by a cut too.
    pub loss: Dropped,
    /// Found the bottleneck's queue full.
    pub queue: Dropped,
    /// Found the emulator's memory full.
    pub overrun: Dropped,
    /// Dropped by the site's device before the link saw them; not among the offered.
    pub ingress: Dropped,
    /// Refused by the other site's device.
    pub egress: Dropped,
}

/// Dropped datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// How many.
    pub packets: u64,
    /// Their IP bytes, where they are known: the kernel counts only packets.
    pub bytes: Option<u64>,
}

impl Default for Dropped {
    fn default() -> Self {
        Self {
            packets: 0,
            bytes: Some(0),
        }
    }
}

/// How the emulator fared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmulatorStats {
    /// How late due packets were handed over.
    pub lateness: LatenessSummary,
    /// CPU time since the start.
    pub cpu_seconds: f64,
    /// Time since the start.
    pub wall_seconds: f64,
    /// How it is scheduled.
    pub scheduling: Scheduling,
}

/// How the emulator's thread is scheduled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheduling {
    /// Before all ordinary threads.
    Fifo,
    /// With the best nice value.
    Nice,
    /// As any other.
    Ordinary,
}

impl Traffic {
    pub(super) fn add(&mut self, bytes: u64) {
        self.packets += 1;
        self.bytes += bytes;
    }
}

impl Dropped {
    /// Packets whose bytes nobody counted.
    pub(super) fn uncounted(packets: u64) -> Self {
        Self {
            packets,
            bytes: if packets == 0 { Some(0) } else { None },
        }
    }

    pub(super) fn add(&mut self, packets: u64, bytes: u64) {
        self.packets += packets;
        self.bytes = self.bytes.map(|sum| sum + bytes);
    }
}

impl LinkStats {
    /// Why these figures, of a link of this RTT, are not to be used, where there is a reason.
    pub(super) fn judge(&self, rtt: Duration) -> Option<String> {
        for (direction, stats) in [("A to B", &self.ab), ("B to A", &self.ba)] {
            let faults = [
                (stats.dropped.overrun, "the emulator's memory was full for"),
                (stats.dropped.ingress, "the sending site's device dropped"),
                (stats.dropped.egress, "the receiving site's device refused"),
            ];
            for (dropped, fault) in faults {
                if dropped.packets > 0 {
                    return Some(format!("{fault} {} packets from {direction}", dropped.packets));
                }
            }
        }
        let lateness = self.emulator.as_ref()?.lateness;
        let most = MAX_LATENESS_US.max(MAX_LATENESS_OF_RTT * rtt.as_secs_f64() * 1e6);
        (lateness.p99_us > most).then(|| {
            format!(
                "the emulator was late: p99 {} us, at most {most} us are allowed",
                lateness.p99_us
            )
        })
    }
}

/// A p99 beyond this shows in the measured delay; an idle machine stays below 300 us at any profile.
pub(super) const MAX_LATENESS_US: f64 = 500.0;
/// A hundredth of the RTT in a hundredth of the packets is less than the jitter of any real link of that length.
const MAX_LATENESS_OF_RTT: f64 = 0.01;

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    fn stats() -> LinkStats {
        LinkStats {
            name: "lh".to_owned(),
            profile: "lan".to_owned(),
            backend: Backend::Emulator,
            seed: Some(1),
            ab: DirectionStats::default(),
            ba: DirectionStats::default(),
            emulator: Some(EmulatorStats {
                lateness: LatenessSummary {
                    p99_us: MAX_LATENESS_US,
                    ..LatenessSummary::default()
                },
                cpu_seconds: 0.0,
                wall_seconds: 1.0,
                scheduling: Scheduling::Fifo,
            }),
            fault: None,
        }
    }

    #[test]
    fn losses_of_the_link_are_no_fault_and_those_of_the_harness_are() {
        let mut link = stats();
        for drops in [
            &mut link.ab.dropped.loss,
            &mut link.ab.dropped.script,
            &mut link.ab.dropped.queue,
            &mut link.ba.dropped.outage,
        ] {
            drops.add(1, 1500);
        }
        assert_eq!(link.judge(SHORT), None);
        let faults: [fn(&mut DirectionStats) -> &mut Dropped; 3] = [
            |ab| &mut ab.dropped.overrun,
            |ab| &mut ab.dropped.ingress,
            |ab| &mut ab.dropped.egress,
        ];
        for fault in faults {
            let mut link = stats();
            fault(&mut link.ba).add(1, 1500);
            assert!(
                link.judge(SHORT)
                    .is_some_and(|text| text.contains("1 packets from B to A"))
            );
        }
    }

    #[test]
    fn a_late_emulator_is_a_fault() {
        let mut link = stats();
        assert_eq!(link.judge(SHORT), None, "at the limit");
        link.emulator.as_mut().expect("an emulator").lateness.p99_us += 0.1;
        assert!(link.judge(SHORT).is_some_and(|text| text.contains("late")));
        assert_eq!(link.judge(Duration::from_millis(150)), None, "1 500 us");
    }

    #[test]
    fn the_json_has_the_documented_names() {
        let json = serde_json::to_value(stats()).expect("plain data");
        assert_eq!(json["backend"], "emulator");
        assert_eq!(json["emulator"]["scheduling"], "fifo");
        for path in [
            "/ab/offered/bytes",
            "/ba/delivered/packets",
            "/ab/dropped/loss/bytes",
            "/ab/in_flight_bytes",
        ] {
            assert_eq!(json.pointer(path), Some(&serde_json::json!(0)), "{path}");
        }
        assert_eq!(
            serde_json::from_value::<LinkStats>(json).expect("the same shape"),
            stats()
        );
    }
}
