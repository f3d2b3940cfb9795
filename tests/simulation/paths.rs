//! Paths that lose in bursts, reorder, jitter, double and fall silent: everything arrives whole, and the link is full again soon after.

use std::time::{Duration, SystemTime};

use longhaul::transport::tuning::LANE_BYTES;
use longhaul::transport::{CERTIFICATE_LIFETIME, PeerConnection, RENEW_BEFORE_EXPIRY};
use longhaul::wan::{GilbertElliott, Jitter, LinkSettings, Loss, Probability, Reordering};

use super::{Connected, RTT, SEED, SimulatedLink, achievable, dial, link_of, mbit, site, site_with};

const SECOND: Duration = Duration::from_secs(1);

fn share(value: f64) -> Probability {
    Probability::new(value).unwrap()
}

fn clean() -> LinkSettings {
    link_of(mbit(100), 0.0)
}

/// The share of what the link can carry that arrives from the 2nd to the 10th second; all of it whole.
async fn steady_share(what: &str, link: LinkSettings) -> f64 {
    let connected = Connected::over(link.clone(), link.rate).await;
    let bulk = connected.send_bulk();
    tokio::time::sleep(10 * SECOND).await;
    let share = bulk.arrived_between(2 * SECOND, 10 * SECOND) as f64 / achievable(&link, 8 * SECOND);
    let measures = connected.from.bulk.stats();
    eprintln!(
        "{what}, seed {SEED}: {share:.4} of what the link carries, {} of {} packets found lost",
        measures.lost_packets, measures.sent_packets
    );
    bulk.complete().await;
    share
}

/// The share of what the link can carry that arrives in this time since the beginning, while `event` happens 4 s after it.
async fn share_after(what: &str, begin: Duration, end: Duration, event: impl FnOnce(&Connected)) -> f64 {
    let link = clean();
    let connected = Connected::over(link.clone(), link.rate).await;
    let bulk = connected.send_bulk();
    tokio::time::sleep(4 * SECOND).await;
    event(&connected);
    tokio::time::sleep(end - 4 * SECOND).await;
    let share = bulk.arrived_between(begin, end) as f64 / achievable(&link, end - begin);
    let each: Vec<String> = (8..2 * end.as_secs() as u32)
        .map(|half| {
            let at = SECOND / 2 * half;
            let arrived = bulk.arrived_between(at, at + SECOND / 2) as f64;
            format!("{:.2}", arrived / achievable(&link, SECOND / 2))
        })
        .collect();
    eprintln!("{what}, seed {SEED}: {share:.4} from {begin:?} to {end:?}; each half second after: {each:?}");
    bulk.complete().await;
    share
}

#[tokio::test(start_paused = true)]
async fn loss_in_bursts_costs_no_more_than_what_is_lost() {
    let bursts = GilbertElliott {
        to_bad: share(0.001),
        to_good: share(0.1),
        loss_in_bad: share(1.0),
        loss_in_good: Probability::NEVER,
    };
    let link = LinkSettings {
        loss: Loss::GilbertElliott(bursts),
        ..clean()
    };
    let share = steady_share("1 % lost in bursts of 10", link).await;
    assert!(share >= 0.97, "{share}");
}

#[tokio::test(start_paused = true)]
async fn packets_that_overtake_others_do_not_make_them_lost() {
    for (overtaking, lead) in [(0.05, 1), (0.01, 10), (0.1, 10)] {
        let lead = Duration::from_millis(lead);
        let reordering = Reordering {
            share: share(overtaking),
            lead,
        };
        let link = LinkSettings {
            reordering: Some(reordering),
            ..clean()
        };
        let share = steady_share(&format!("{overtaking} of the packets {lead:?} ahead"), link).await;
        assert!(share >= 0.97, "{overtaking} {lead:?} ahead: {share}");
    }
}

#[tokio::test(start_paused = true)]
async fn jitter_is_not_taken_for_a_queue() {
    for (deviation, correlation) in [(2, 20), (5, 100), (5, 1000)] {
        let jitter = Jitter {
            deviation: Duration::from_millis(deviation),
            correlation_time: Duration::from_millis(correlation),
        };
        let link = LinkSettings {
            jitter: Some(jitter),
            ..clean()
        };
        let share = steady_share(&format!("{deviation} ms of jitter over {correlation} ms"), link).await;
        assert!(share >= 0.95, "{jitter:?}: {share}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_fifth_of_all_packets_that_come_twice_takes_its_part_of_the_link_and_no_more() {
    let link = LinkSettings {
        duplication: share(0.2),
        ..clean()
    };
    let share = 1.2 * steady_share("20 % doubled", link).await;
    assert!(share >= 0.9, "{share} of what the copies leave");
}

#[tokio::test(start_paused = true)]
async fn a_silence_of_both_directions_is_survived_and_the_link_filled_again() {
    let share = share_after("1.5 s of silence", 8 * SECOND, 12 * SECOND, |connected| {
        for site in [0, 1] {
            connected.link.cut(site, SECOND * 3 / 2);
        }
    })
    .await;
    assert!(share >= 0.95, "{share}");
}

#[tokio::test(start_paused = true)]
async fn a_silence_of_one_direction_is_survived_and_the_link_filled_again() {
    for (site, what) in [(0, "1.5 s without data"), (1, "1.5 s without acknowledgements")] {
        let share = share_after(what, 8 * SECOND, 12 * SECOND, |connected| {
            connected.link.cut(site, SECOND * 3 / 2);
        })
        .await;
        assert!(share >= 0.95, "{what}: {share}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_receiver_that_stops_reading_holds_back_the_sender_and_not_control() {
    let link = clean();
    let simulated = SimulatedLink::new(link.clone(), SEED);
    let knows_its_link = site_with(&simulated, 1, SystemTime::now(), |settings| {
        settings.link = Some(link.rate);
    });
    let sites = [site(&simulated, 0), knows_its_link];
    let connected = Connected::between(simulated, sites, Some(link.rate), RTT).await;
    let bulk = connected.send_bulk();
    tokio::time::sleep(2 * SECOND).await;
    bulk.pause(true);
    let p99 = connected.control_delay(5 * SECOND).await;
    let held = bulk.held();
    bulk.pause(false);
    tokio::time::sleep(4 * SECOND).await;
    let share = bulk.arrived_between(9 * SECOND, 11 * SECOND) as f64 / achievable(&link, 2 * SECOND);
    // Four times what flies at either end, as src/transport/tuning.rs derives it.
    let windows = 2 * 4 * link.rate.bytes_in(RTT);
    eprintln!(
        "5 s without reading, seed {SEED}: {held} bytes held of {windows}, then {share:.4} of what the link carries"
    );
    assert!(held <= windows + LANE_BYTES as u64, "{held} bytes are held");
    assert!(p99 <= RTT / 2 + Duration::from_millis(10), "{p99:?}");
    assert!(share >= 0.97, "{share}");
    bulk.complete().await;
}

#[tokio::test(start_paused = true)]
#[expect(clippy::disallowed_methods, reason = "certificates end by the wall clock")]
async fn a_certificate_is_renewed_while_data_flows_and_only_new_connections_show_it() {
    let hour = Duration::from_secs(3600);
    let now = SystemTime::now();
    let link = clean();
    let simulated = SimulatedLink::new(link.clone(), SEED);
    let almost_due = now - (CERTIFICATE_LIFETIME - RENEW_BEFORE_EXPIRY) + hour;
    let sites = [site(&simulated, 0), site_with(&simulated, 1, almost_due, |_| {})];
    let connected = Connected::between(simulated, sites, Some(link.rate), RTT).await;
    let bulk = connected.send_bulk();
    tokio::time::sleep(2 * SECOND).await;
    assert!(connected.sites[1].identity.renew_if_due(now + 2 * hour).unwrap());
    let (second, _to) = dial(&connected.sites, Some(link.rate), RTT, 1).await;
    tokio::time::sleep(2 * SECOND).await;
    let share = bulk.arrived_between(2 * SECOND, 4 * SECOND) as f64 / achievable(&link, 2 * SECOND);
    eprintln!("certificate renewed, seed {SEED}: {share:.4} of what the link carries");
    assert!(share >= 0.97, "{share}");
    assert_ne!(certificate(&connected.from.bulk[0]), certificate(&second.bulk[0]));
    assert_eq!(connected.from.bulk[0].fingerprint(), second.bulk[0].fingerprint());
    bulk.complete().await;
}

/// What the peer showed.
fn certificate(connection: &PeerConnection) -> Vec<u8> {
    let identity = connection.peer_identity().unwrap();
    let chain = identity
        .downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>()
        .unwrap();
    chain[0].to_vec()
}
