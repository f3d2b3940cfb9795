//! Two sites' transports over real UDP on loopback.
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests read the clock, and fail by panicking"
)]

use std::collections::HashSet;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use longhaul::proto::page::ByteRate;
use longhaul::transport::tuning::{LANE_BYTES, MAX_UDP_PAYLOAD};
use longhaul::transport::{
    BindError, CloseCode, ConnectionKind, DialCause, Incoming, LaneError, PeerConnection, PeerLink, PeerTarget,
    Transport, TransportSettings, Udp, read_lane, send_lane,
};
use quinn::ConnectionError;
use transport_site::{Site, accept_link};

mod transport_site;

const RTT: Duration = Duration::from_millis(5);

fn site() -> Site {
    site_with(SystemTime::now(), |_| {})
}

fn site_with(created: SystemTime, change: impl FnOnce(&mut TransportSettings)) -> Site {
    let mut settings = TransportSettings::new("127.0.0.1:0".parse().unwrap());
    settings.rtt = RTT;
    change(&mut settings);
    Site::on(Arc::new(Udp), created, settings)
}

impl Site {
    async fn accepts(&self) -> Incoming {
        soon(self.transport.accept()).await.expect("the transport runs")
    }

    async fn accepts_link(&self, bulk_connections: u8) -> PeerLink {
        soon(accept_link(&self.transport, bulk_connections)).await
    }
}

fn paired() -> (Site, Site) {
    let (tokyo, oslo) = (site(), site());
    tokyo.trusts(&oslo, "oslo");
    oslo.trusts(&tokyo, "tokyo");
    (tokyo, oslo)
}

/// Waits for what must happen, and fails if it does not.
#[track_caller]
fn soon<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let done = tokio::time::timeout(Duration::from_secs(30), future).await;
        done.unwrap_or_else(|_| panic!("nothing happened at {caller}"))
    }
}

/// Waits until the peer closed `connection`, and checks the reason that it gave. quinn forgets a connection three probe timeouts
/// after closing it, some 30 ms on loopback; where the machine gives it no time before, a reset follows the reason at once and hides it.
#[track_caller]
fn closed_by_peer(connection: &PeerConnection, code: CloseCode, reason: &str) -> impl Future<Output = ()> {
    let (closed, reason) = (soon(connection.closed()), reason.to_owned());
    async move {
        match closed.await {
            ConnectionError::ApplicationClosed(close) => {
                assert_eq!((close.error_code, &close.reason[..]), (code.into(), reason.as_bytes()));
            }
            ConnectionError::Reset => {}
            other => panic!("closed by {other}"),
        }
    }
}

async fn link(from: &Site, to: &Site, rate: Option<ByteRate>) -> (PeerLink, PeerLink) {
    link_of_several(from, to, rate, 1).await
}

async fn link_of_several(from: &Site, to: &Site, rate: Option<ByteRate>, bulk_connections: u8) -> (PeerLink, PeerLink) {
    let target = PeerTarget {
        bulk_connections: Some(bulk_connections),
        ..to.as_target("oslo", rate, RTT)
    };
    let accept = to.accepts_link(bulk_connections);
    let (dialled, accepted) = soon(async { tokio::join!(from.transport.dial(&target), accept) }).await;
    (dialled.unwrap(), accepted)
}

/// Bytes that no two lanes share, so that a mix-up shows.
fn lane_content(lane: u32, length: usize) -> Bytes {
    let mut content = vec![0; length];
    blake3::Hasher::new()
        .update(&lane.to_be_bytes())
        .finalize_xof()
        .fill(&mut content);
    content[..4].copy_from_slice(&lane.to_be_bytes());
    content.into()
}

async fn transfer(from: &PeerLink, to: &PeerLink, lanes: u32) {
    let receive = async {
        let mut seen = vec![false; lanes as usize];
        for _ in 0..lanes {
            let lane = to.bulk[0].accept_uni().await.unwrap();
            let data = read_lane(lane, LANE_BYTES).await.unwrap();
            let number = u32::from_be_bytes(data[..4].try_into().unwrap());
            assert!(
                data == lane_content(number, LANE_BYTES),
                "lane {number} arrived altered"
            );
            assert!(
                !std::mem::replace(&mut seen[number as usize], true),
                "lane {number} arrived twice"
            );
        }
    };
    let send = async {
        for number in 0..lanes {
            send_lane(&from.bulk[0], &mut [lane_content(number, LANE_BYTES)])
                .await
                .unwrap();
        }
    };
    soon(async { tokio::join!(receive, send) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_paired_sites_connect_and_know_each_other_by_name() {
    let (tokyo, oslo) = paired();
    let (dialled, accepted) = link(&tokyo, &oslo, None).await;
    assert_eq!(
        (dialled.control.peer(), accepted.control.peer()),
        (Some("oslo"), Some("tokyo"))
    );
    assert_eq!(accepted.bulk[0].fingerprint(), tokyo.identity.fingerprint());
    assert_ne!(
        accepted.control.remote_address(),
        accepted.bulk[0].remote_address(),
        "each on a socket of its own"
    );

    let (mut send, _recv) = soon(dialled.control.open_bi()).await.unwrap();
    send.write_all(b"hello").await.unwrap();
    let (_, mut at_oslo) = soon(accepted.control.accept_bi()).await.unwrap();
    let mut hello = [0; 5];
    soon(at_oslo.read_exact(&mut hello)).await.unwrap();
    assert_eq!(&hello, b"hello");
    drop(send);

    dialled.close(CloseCode::Draining, "until tomorrow");
    closed_by_peer(&accepted.control, CloseCode::Draining, "until tomorrow").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_lane_of_a_large_transfer_arrives_with_equal_bytes_in_both_modes() {
    let (tokyo, oslo) = paired();
    for rate in [None, Some(ByteRate::from_bits_per_second(400_000_000))] {
        let (dialled, accepted) = link(&tokyo, &oslo, rate).await;
        transfer(&dialled, &accepted, 64).await;
        let sent = dialled.stats();
        assert!(sent.bulk.wire_bytes_sent > 64 * LANE_BYTES as u64);
        // A busy machine may look like a queue, and then the controller brakes.
        assert!(sent.bulk.rate.is_some() && rate.is_none_or(|rate| sent.bulk.rate <= Some(rate)));
        assert_eq!(
            dialled.goodput().is_some(),
            rate.is_some(),
            "a rate that was found is no promise"
        );
        assert_eq!(
            sent.wire_bytes(),
            sent.control.wire_bytes_sent
                + sent.control.wire_bytes_received
                + sent.bulk.wire_bytes_sent
                + sent.bulk.wire_bytes_received
        );
        // Whatever one side sent and did not lose, the other received: both count the same headers.
        let received = accepted.stats().bulk.wire_bytes_received;
        assert!(received <= sent.bulk.wire_bytes_sent && received > 64 * LANE_BYTES as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_bulk_connections_are_known_to_belong_together_and_have_the_capacity_of_one() {
    let (tokyo, oslo) = paired();
    let rate = ByteRate::from_bits_per_second(400_000_000);
    let (dialled, accepted) = link_of_several(&tokyo, &oslo, Some(rate), 4).await;
    let bundle = dialled.bulk[0].bundle();
    assert_eq!((bundle.connections(), dialled.bulk.len()), (4, 4));
    let ports: HashSet<SocketAddr> = accepted.bulk.iter().map(|bulk| bulk.remote_address()).collect();
    assert_eq!(ports.len(), 4, "each on a socket of its own");
    let mut all = dialled.bulk.iter().chain(accepted.bulk.iter());
    assert!(all.all(|bulk| bulk.bundle() == bundle));
    assert_eq!(dialled.capacity(), Some(rate));
    for connection in &*dialled.bulk {
        send_lane(connection, &mut [lane_content(7, LANE_BYTES)]).await.unwrap();
    }
    for connection in &*accepted.bulk {
        let lane = soon(connection.accept_uni()).await.unwrap();
        assert!(soon(read_lane(lane, LANE_BYTES)).await.unwrap() == lane_content(7, LANE_BYTES));
    }
    let sent: u64 = dialled.bulk.iter().map(|bulk| bulk.stats().wire_bytes_sent).sum();
    assert!(dialled.stats().bulk.wire_bytes_sent >= sent && sent > LANE_BYTES as u64);

    let (other, _accepted) = link_of_several(&tokyo, &oslo, Some(rate), 4).await;
    assert_ne!(other.bulk[0].bundle(), bundle);
    accepted.bulk[2].close_with(CloseCode::Draining, "one of them");
    soon(dialled.bulk.broken()).await;
    assert!(!dialled.bulk.is_whole() && other.bulk.is_whole());
}

/// A train of ten such packets is more than one `sendmsg` takes, and quinn takes the refusal for a loss.
#[tokio::test(flavor = "multi_thread")]
async fn jumbo_frames_are_found_on_loopback_and_leave_in_trains_that_the_kernel_takes() {
    let (tokyo, oslo) = paired();
    let rate = Some(ByteRate::from_bits_per_second(400_000_000));
    let (dialled, accepted) = link(&tokyo, &oslo, rate).await;
    soon(async {
        while dialled.stats().bulk.mtu < MAX_UDP_PAYLOAD {
            transfer(&dialled, &accepted, 8).await;
        }
    })
    .await;
    let before = dialled.stats().bulk;
    transfer(&dialled, &accepted, 64).await;
    let after = dialled.stats().bulk;
    let sent = after.sent_packets - before.sent_packets;
    let lost = after.lost_packets - before.lost_packets;
    assert!(lost * 10 < sent, "{lost} of {sent} packets are lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_not_trusted_there_is_told_so() {
    let (tokyo, oslo) = paired();
    oslo.trust.remove("tokyo");
    let error = soon(tokyo.transport.dial(&oslo.as_target("oslo", None, RTT)))
        .await
        .unwrap_err();
    assert!(matches!(error.cause, DialCause::NotTrustedThere { .. }), "{error}");
    assert!(error.to_string().contains("pair them again"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_another_key_is_not_talked_to() {
    let (tokyo, oslo) = paired();
    let impostor = site();
    impostor.trusts(&tokyo, "tokyo");
    let target = PeerTarget {
        fingerprint: oslo.identity.fingerprint(),
        ..impostor.as_target("oslo", None, RTT)
    };
    let error = soon(tokyo.transport.dial(&target)).await.unwrap_err();
    assert!(matches!(error.cause, DialCause::NotThePeer { .. }), "{error}");
    assert!(
        error.to_string().contains(&impostor.identity.fingerprint().to_string()),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unpairing_closes_what_is_open_and_keeps_the_peer_out() {
    let (tokyo, oslo) = paired();
    let (dialled, _accepted) = link(&tokyo, &oslo, None).await;
    assert!(oslo.trust.remove("tokyo"));
    assert_eq!(
        oslo.transport
            .close_peer("tokyo", CloseCode::Unpaired, "unpaired by the operator"),
        2
    );
    for connection in [&dialled.control, &dialled.bulk[0]] {
        closed_by_peer(connection, CloseCode::Unpaired, "unpaired by the operator").await;
    }
    let error = soon(tokyo.transport.dial(&oslo.as_target("oslo", None, RTT)))
        .await
        .unwrap_err();
    assert!(matches!(error.cause, DialCause::NotTrustedThere { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_pairs_only_while_invited() {
    let (tokyo, oslo) = (site(), site());
    let (address, key) = (oslo.transport.control_address(), oslo.identity.fingerprint());
    let error = soon(tokyo.transport.dial_to_pair(address, key)).await.unwrap_err();
    assert!(matches!(error.cause, DialCause::NotTrustedThere { .. }), "{error}");

    oslo.transport.set_invitation(true);
    let (dialled, accepted) =
        soon(async { tokio::join!(tokyo.transport.dial_to_pair(address, key), oslo.accepts()) }).await;
    dialled.unwrap();
    assert_eq!((accepted.kind, accepted.peer), (ConnectionKind::Pairing, None));
    assert_eq!(accepted.fingerprint, tokyo.identity.fingerprint());

    oslo.transport.set_invitation(false);
    assert!(soon(tokyo.transport.dial_to_pair(address, key)).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_needs_no_new_pairing() {
    let tokyo = site();
    // The transport renews on its first check, right after it starts.
    let oslo = site_with(SystemTime::now() - Duration::from_secs(85 * 24 * 3600), |_| {});
    tokyo.trusts(&oslo, "oslo");
    oslo.trusts(&tokyo, "tokyo");
    soon(async {
        while oslo.identity.expires() < SystemTime::now() + Duration::from_secs(80 * 24 * 3600) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    link(&tokyo, &oslo, None).await;
}

#[tokio::test]
async fn a_second_gateway_on_the_same_port_is_told_why_it_cannot_start() {
    let oslo = site();
    let mut settings = TransportSettings::new(oslo.transport.control_address());
    settings.bulk_address = Some("127.0.0.1:0".parse().unwrap());
    let error = Transport::bind(settings, oslo.identity.clone(), oslo.trust.clone()).unwrap_err();
    assert!(matches!(error, BindError::InUse { .. }), "{error}");
    assert!(error.to_string().contains("another gateway"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_where_nobody_listens_is_reported_as_no_answer() {
    let (tokyo, oslo) = (
        site_with(SystemTime::now(), |settings| {
            settings.idle_timeout = Duration::from_secs(1)
        }),
        site(),
    );
    tokyo.trusts(&oslo, "oslo");
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = silent.local_addr().unwrap();
    let target = PeerTarget {
        control_address: address,
        bulk_address: Some(address),
        ..oslo.as_target("oslo", None, RTT)
    };
    let error = soon(tokyo.transport.dial(&target)).await.unwrap_err();
    assert!(matches!(error.cause, DialCause::NoAnswer), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_begins_at_the_rate_that_holds_now_and_follows_it() {
    let (tokyo, oslo) = paired();
    let (most, less) = (ByteRate(10_000_000), ByteRate(2_000_000));
    let target = PeerTarget {
        rate_now: Some(less),
        ..oslo.as_target("oslo", Some(most), RTT)
    };
    let link = soon(tokyo.transport.dial(&target)).await.unwrap();
    assert_eq!(link.capacity(), Some(less));
    tokyo.transport.set_peer_rate("oslo", Some(most));
    assert_eq!(link.capacity(), Some(most));
    let site = ByteRate(1_000_000);
    tokyo.transport.set_link_rate(Some(site));
    let link = soon(tokyo.transport.dial(&target)).await.unwrap();
    assert_eq!(link.capacity(), Some(site), "the link of the site carries no more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_longer_than_agreed_is_refused_without_being_kept() {
    let (tokyo, oslo) = paired();
    let (dialled, accepted) = link(&tokyo, &oslo, None).await;
    send_lane(&dialled.bulk[0], &mut [Bytes::from(vec![7; 1001])])
        .await
        .unwrap();
    let lane = soon(accepted.bulk[0].accept_uni()).await.unwrap();
    assert!(soon(read_lane(lane, 1000)).await.is_err());
    send_lane(&dialled.bulk[0], &mut [Bytes::from(vec![7; 1000])])
        .await
        .unwrap();
    let lane = soon(accepted.bulk[0].accept_uni()).await.unwrap();
    assert_eq!(soon(read_lane(lane, 1000)).await.unwrap().len(), 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutting_down_tells_the_peers_and_ends_accept() {
    let (tokyo, oslo) = paired();
    let (dialled, _accepted) = link(&tokyo, &oslo, None).await;
    soon(oslo.transport.shutdown(CloseCode::Draining, "restarting")).await;
    closed_by_peer(&dialled.control, CloseCode::Draining, "restarting").await;
    assert!(soon(oslo.transport.accept()).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_whose_sender_gave_up_never_looks_whole() {
    let (tokyo, oslo) = paired();
    let (dialled, accepted) = link(&tokyo, &oslo, None).await;
    // Nobody reads, so a lane longer than the peer's window stays unfinished.
    let endless = Bytes::from(vec![7; 64 * LANE_BYTES]);
    let mut endless = [endless];
    let mut sending = Box::pin(send_lane(&dialled.bulk[0], &mut endless));
    let lane = soon(async {
        tokio::select! {
            _ = &mut sending => panic!("the window ended"),
            lane = accepted.bulk[0].accept_uni() => lane.unwrap(),
        }
    })
    .await;
    drop(sending);
    assert!(matches!(
        soon(read_lane(lane, 64 * LANE_BYTES)).await,
        Err(LaneError::Stopped)
    ));
}
