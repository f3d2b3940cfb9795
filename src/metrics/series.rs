//! Every series of the gateway, once: name, kind, labels, help.
//!
//! A label is either a closed list of words from our code or the name of a peer; never a VM, an address or the text of
//! an error. Counters count bytes, pages and seconds; rates are the monitoring system's to take. The sum over a label
//! makes sense for each of them.

/// What a series is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; starts at zero with the process. Its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts of observations up to each edge, with their sum.
    Histogram,
}

/// What a label can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// One of these words.
    Closed(&'static [&'static str]),
    /// The name of a paired or configured peer.
    Peer,
    /// The version of this program.
    Version,
}

/// One series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Series {
    /// Name as it is scraped; the unit ends it, before `_total`.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [(&'static str, Values)],
    /// One sentence.
    pub help: &'static str,
}

const DIRECTION: (&str, Values) = ("direction", Values::Closed(&["in", "out"]));
const PEER: (&str, Values) = ("peer", Values::Peer);
const ROLE: (&str, Values) = ("role", Values::Closed(&["source", "destination"]));

const fn counter(name: &'static str, labels: &'static [(&'static str, Values)], help: &'static str) -> Series {
    Series {
        name,
        kind: Kind::Counter,
        labels,
        help,
    }
}

const fn gauge(name: &'static str, labels: &'static [(&'static str, Values)], help: &'static str) -> Series {
    Series {
        name,
        kind: Kind::Gauge,
        labels,
        help,
    }
}

const fn histogram(name: &'static str, help: &'static str) -> Series {
    Series {
        name,
        kind: Kind::Histogram,
        labels: &[],
        help,
    }
}

pub(super) const BUILD_INFO: Series = gauge(
    "longhaul_build_info",
    &[("version", Values::Version)],
    "Always 1, with the version of the program",
);
pub(super) const VMM_BYTES: Series = counter(
    "longhaul_vmm_bytes_total",
    &[DIRECTION],
    "Bytes of vmm streams, in from a hypervisor or out to one",
);
pub(super) const FRAME_BYTES: Series = counter(
    "longhaul_frame_bytes_total",
    &[DIRECTION],
    "Bytes of frames after reduction, in from a peer before they are restored or out to one",
);
pub(super) const WAN_BYTES: Series = counter(
    "longhaul_wan_bytes_total",
    &[PEER, DIRECTION],
    "IP bytes exchanged with a peer, headers and repairs included",
);
pub(super) const PAGES: Series = counter(
    "longhaul_pages_total",
    &[(
        "encoding",
        Values::Closed(&["zero", "same", "reference", "delta", "literal", "raw"]),
    )],
    "Pages sent by this gateway as a source, by how they were sent",
);
pub(super) const ROUNDS: Series = counter("longhaul_rounds_total", &[], "Rounds of pre-copy that have ended");
pub(super) const ROUND_DURATION: Series =
    histogram("longhaul_round_duration_seconds", "How long a round of pre-copy took");
pub(super) const DIRTY_RATE: Series = gauge(
    "longhaul_dirty_rate_bytes_per_second",
    &[],
    "What the guests that are leaving dirty, as the migration policy sees it, all together",
);
pub(super) const EXPECTED_DOWNTIME: Series = gauge(
    "longhaul_expected_downtime_seconds",
    &[],
    "Downtime if the guests that are leaving were paused now, the longest of them",
);
pub(super) const DOWNTIME: Series = histogram(
    "longhaul_downtime_seconds",
    "From the pause at the source to the resume at the destination",
);
pub(super) const QUEUE_BYTES: Series = gauge(
    "longhaul_queue_bytes",
    &[(
        "stage",
        Values::Closed(&["reduce", "frames", "transport", "restore", "vmm"]),
    )],
    "Bytes that wait at a stage; what waits before the WAN lengthens the downtime",
);
pub(super) const SHAPER_WAIT: Series = counter(
    "longhaul_shaper_wait_seconds_total",
    &[],
    "Time for which data waited because a configured rate was used up",
);
pub(super) const LINK_RATE: Series = gauge(
    "longhaul_link_rate_bytes_per_second",
    &[],
    "Rate of the link that holds now, by its calendar; 0 where none is configured",
);
pub(super) const PEER_RATE: Series = gauge(
    "longhaul_peer_rate_bytes_per_second",
    &[PEER],
    "Cap towards a peer that holds now, by calendar; 0 where none is configured",
);
pub(super) const CONTROLLER_RATE: Series = gauge(
    "longhaul_controller_rate_bytes_per_second",
    &[PEER],
    "Wire rate that the link controller allows towards a peer",
);
pub(super) const PEER_CONNECTED: Series = gauge(
    "longhaul_peer_connected",
    &[PEER],
    "1 while there is a control connection to the peer, else 0",
);
pub(super) const PEER_MIGRATIONS: Series = gauge(
    "longhaul_peer_open_migrations",
    &[PEER],
    "Migrations with the peer that are not over, at either end, those that wait for a person included",
);
pub(super) const PEER_RTT: Series = gauge(
    "longhaul_peer_rtt_seconds",
    &[PEER],
    "Smoothed RTT of the control connection to a peer",
);
pub(super) const PACKETS_SENT: Series = counter("longhaul_packets_sent_total", &[PEER], "UDP datagrams sent to a peer");
pub(super) const PACKETS_LOST: Series = counter(
    "longhaul_packets_lost_total",
    &[PEER],
    "UDP datagrams sent to a peer and declared lost",
);
pub(super) const CONNECTS: Series = counter(
    "longhaul_peer_connects_total",
    &[PEER],
    "Connections to a peer that were made, the first and every later one",
);
pub(super) const MIGRATIONS: Series = counter(
    "longhaul_migrations_total",
    &[
        ROLE,
        (
            "outcome",
            Values::Closed(&["completed", "failed", "cancelled", "refused", "in_doubt", "vm_died"]),
        ),
    ],
    "Migrations that have ended, by which end this gateway was and how they ended",
);
pub(super) const ACTIVE: Series = gauge("longhaul_migrations_active", &[ROLE], "Migrations that run now");
pub(super) const IN_DOUBT: Series = gauge(
    "longhaul_migrations_in_doubt",
    &[],
    "Migrations whose VM is paused until a person or the peer decides",
);
pub(super) const PHASE_SECONDS: Series = counter(
    "longhaul_phase_seconds_total",
    &[(
        "phase",
        Values::Closed(&[
            "checking",
            "preparing",
            "disks",
            "precopy",
            "switchover",
            "stop_and_copy",
            "committing",
            "finishing",
        ]),
    )],
    "Time that migrations spent in a phase, on the side of the source",
);
pub(super) const STORE_BYTES: Series = gauge("longhaul_store_bytes", &[], "What the page store takes on the disk");
pub(super) const STORE_IMAGES: Series = gauge(
    "longhaul_store_images",
    &[],
    "Images in the page store: memory of VMs that have moved, and seeds",
);
pub(super) const KNOWN_PAGES: Series = counter(
    "longhaul_known_pages_total",
    &[],
    "Pages and blocks of disks that both sites had when a migration began, at the source",
);
pub(super) const JOURNAL_ERRORS: Series = counter(
    "longhaul_journal_errors_total",
    &[],
    "Records that the ownership journal could not make durable",
);
pub(super) const HOOKS: Series = counter(
    "longhaul_hooks_total",
    &[
        (
            "hook",
            Values::Closed(&["pre_check", "before_switchover", "after_activation", "after_failure"]),
        ),
        ("result", Values::Closed(&["ok", "failed"])),
    ],
    "Hooks that have ended, by which and whether with success",
);
pub(super) const TUNNEL_STREAMS: Series = gauge(
    "longhaul_tunnel_streams",
    &[ROLE],
    "Streams of other programs that are open now, by which end this gateway is",
);
pub(super) const TUNNEL_BYTES: Series = counter(
    "longhaul_tunnel_bytes_total",
    &[DIRECTION],
    "Bytes of tunnels, answers included, in from programs or out to them",
);
pub(super) const TUNNEL_FRAME_BYTES: Series = counter(
    "longhaul_tunnel_frame_bytes_total",
    &[DIRECTION],
    "Bytes of frames that these take after reduction, without answers, in from a peer or out to one",
);

pub(super) const DISK_BYTES: Series = counter(
    "longhaul_disk_bytes_total",
    &[DIRECTION],
    "Bytes of disks that are copied with their VMs, with what says where they belong: in from images or out to them",
);
pub(super) const DISK_FRAME_BYTES: Series = counter(
    "longhaul_disk_frame_bytes_total",
    &[DIRECTION],
    "Bytes of frames that these take after reduction, in from a peer or out to one",
);

/// All of them.
pub const SERIES: &[Series] = &[
    BUILD_INFO,
    VMM_BYTES,
    FRAME_BYTES,
    WAN_BYTES,
    PAGES,
    ROUNDS,
    ROUND_DURATION,
    DIRTY_RATE,
    EXPECTED_DOWNTIME,
    DOWNTIME,
    QUEUE_BYTES,
    SHAPER_WAIT,
    LINK_RATE,
    PEER_RATE,
    CONTROLLER_RATE,
    PEER_CONNECTED,
    PEER_MIGRATIONS,
    PEER_RTT,
    PACKETS_SENT,
    PACKETS_LOST,
    CONNECTS,
    MIGRATIONS,
    ACTIVE,
    IN_DOUBT,
    PHASE_SECONDS,
    STORE_BYTES,
    STORE_IMAGES,
    KNOWN_PAGES,
    JOURNAL_ERRORS,
    HOOKS,
    TUNNEL_STREAMS,
    TUNNEL_BYTES,
    TUNNEL_FRAME_BYTES,
    DISK_BYTES,
    DISK_FRAME_BYTES,
];

/// Upper edges of the downtime, in seconds: 0.3 is the limit that matters on one ocean, 0.5 the default.
pub(super) const DOWNTIME_EDGES: [f64; 14] = [
    0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 2.0, 5.0, 30.0,
];

/// Upper edges of a round, in seconds: from the last small ones to the first pass of a large guest.
pub(super) const ROUND_EDGES: [f64; 12] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0];
