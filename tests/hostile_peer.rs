//! A paired peer that does not keep to the protocol. It is authenticated, not trusted: what it sends costs it the connection or
//! the migration, and the gateway nothing.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "tests read the clock, and fail by panicking"
)]

#[path = "common/anyone.rs"]
mod anyone;
mod common;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyone::Anyone;
use bytes::{Bytes, BytesMut};
use common::guest::Machine;
use common::{Rig, Site, need, qemu, until};
use longhaul::hypervisor::qemu::SourceVm;
use longhaul::proto::ownership::{AbortReason, Doubt, Message, Permit, StreamSum};
use longhaul::proto::page::{JournalId, MigrationId, StreamDigest};
use longhaul::proto::reduce::{DictionaryLimits, Reducer};
use longhaul::proto::session::{EncodedFrame, Encoder};
use longhaul::proto::wire::frame::FrameHeader;
use longhaul::proto::wire::message::{self, MAX_MESSAGE, Offer, Reply};
use longhaul::proto::wire::{Frame, FrameKind, Hello, Limits, MAX_PAYLOAD, Request, SessionMessage};
use longhaul::transport::{
    CloseCode, Identity, PeerConnection, PeerLink, PeerTarget, Transport, TransportSettings, TrustAnchors, send_lane,
};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint, RecvStream, SendStream};
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use serde::de::DeserializeOwned;

const RTT: Duration = Duration::from_millis(10);
/// All that a guest of 64 MiB has.
const REGIONS: u32 = 80;
const JOURNAL: JournalId = JournalId([0x11; 16]);

/// A site that consists of a transport alone and says what a test wants it to.
struct Stranger {
    transport: Transport,
    target: PeerTarget,
    state_dir: tempfile::TempDir,
}

impl Stranger {
    /// Paired with the gateway of `site`, both ways, by fingerprints.
    fn paired_with(site: &Site) -> Self {
        let state_dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(state_dir.path(), SystemTime::now()).unwrap();
        let trust = Arc::new(TrustAnchors::default());
        let mut settings = TransportSettings::new("127.0.0.1:0".parse().unwrap());
        settings.rtt = RTT;
        let transport = Transport::bind(settings, Arc::clone(&identity), Arc::clone(&trust)).unwrap();
        let own = identity.fingerprint().to_string();
        let address = transport.control_address().to_string();
        let paired = site.run(&["pair", "--peer", "a", "--fingerprint", &own, "--address", &address]);
        assert_eq!(paired.code, Some(0), "{paired:?}");
        let theirs = site.run(&["fingerprint"]).stdout.trim().to_owned();
        let fingerprint = theirs.parse().unwrap_or_else(|error| panic!("{error}: {theirs}"));
        trust.insert(fingerprint, "b");
        let target = PeerTarget {
            name: "b".to_owned(),
            control_address: format!("127.0.0.1:{}", site.port()).parse().unwrap(),
            bulk_address: None,
            fingerprint,
            rate: None,
            rate_now: None,
            rtt: RTT,
            bulk_connections: None,
        };
        Self {
            transport,
            target,
            state_dir,
        }
    }

    /// An endpoint for bulk connections that say whatever a test wants them to, and the bulk address of the other gateway.
    fn bulk_by_hand(&self) -> (Endpoint, SocketAddr) {
        let file = |name| self.state_dir.path().join(name);
        let certificate = CertificateDer::from_pem_file(file("identity.crt")).unwrap();
        let key = PrivateKeyDer::from_pem_file(file("identity.key")).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
            .with_client_auth_cert(vec![certificate], key)
            .unwrap();
        tls.alpn_protocols = vec![b"longhaul-bulk/2".to_vec()];
        let mut endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let tls = QuicClientConfig::try_from(tls).unwrap();
        endpoint.set_default_client_config(ClientConfig::new(Arc::new(tls)));
        let mut address = self.target.control_address;
        address.set_port(address.port() + 1);
        (endpoint, address)
    }

    async fn dial(&self) -> PeerLink {
        soon(self.transport.dial(&self.target)).await.unwrap()
    }

    /// A link on which both have said hello.
    async fn link(&self, journal: JournalId) -> PeerLink {
        let link = self.dial().await;
        let limits = Limits {
            window_bytes: 8 << 20,
            dictionary_pages: 1 << 16,
        };
        let mut channel = Channel::open(&link.control, &Request::Hello(Hello::new("a".into(), journal, limits))).await;
        match channel.receive().await {
            Some(Reply::Hello(_)) => link,
            other => panic!("no hello: {other:?}"),
        }
    }
}

/// Waits for what must happen, and fails if it does not.
#[track_caller]
fn soon<T>(future: impl Future<Output = T>) -> impl Future<Output = T> {
    let caller = std::panic::Location::caller();
    async move {
        let done = tokio::time::timeout(Duration::from_secs(60), future).await;
        done.unwrap_or_else(|_| panic!("nothing happened at {caller}"))
    }
}

struct Channel {
    sender: SendStream,
    receiver: RecvStream,
    received: BytesMut,
}

impl Channel {
    async fn open<M: Serialize>(connection: &PeerConnection, first: &M) -> Self {
        let (sender, receiver) = soon(connection.open_bi()).await.unwrap();
        let mut channel = Self {
            sender,
            receiver,
            received: BytesMut::new(),
        };
        channel.send(first).await;
        channel
    }

    async fn send<M: Serialize>(&mut self, message: &M) {
        self.sender.write_all(&message::encode(message).unwrap()).await.unwrap();
    }

    /// The next message; `None` where the gateway has ended the channel.
    async fn receive<M: DeserializeOwned>(&mut self) -> Option<M> {
        loop {
            if let Some(message) = message::decode(&mut self.received).unwrap() {
                return Some(message);
            }
            let chunk = soon(self.receiver.read_chunk(MAX_MESSAGE, true)).await.ok()??;
            self.received.extend_from_slice(&chunk.bytes);
        }
    }

    /// Everything up to the first message about who owns the VM.
    async fn ownership(&mut self) -> Option<Message> {
        loop {
            match self.receive().await? {
                SessionMessage::Ownership(message) => return Some(message),
                _ => continue,
            }
        }
    }
}

/// A gateway that receives, a hypervisor whose VM is offered to it, and a stranger that offers.
struct Scene {
    rig: Rig,
    stranger: Stranger,
    inventory: String,
}

impl Scene {
    async fn set() -> Self {
        let mut rig = Rig::apart(&[("vm", Machine::firmware())], |_, b| {
            b.memory_budget = "64mib".to_owned();
        });
        rig.b.start();
        rig.a.boot("vm");
        let qmp = rig.a.plan().vm("vm").qmp.clone();
        let vm = SourceVm::connect(&qmp, Duration::from_secs(30)).await.unwrap();
        let inventory = serde_json::to_string(&vm.inventory().await.unwrap()).unwrap();
        let stranger = Stranger::paired_with(&rig.b);
        Self {
            rig,
            stranger,
            inventory,
        }
    }

    fn offer(&self, number: u8) -> Offer {
        Offer {
            migration: MigrationId([number; 16]),
            vm: "vm".to_owned(),
            inventory: self.inventory.clone(),
            was_running: true,
            reduce: true,
            dictionary_pages: 1 << 14,
            regions: REGIONS,
        }
    }

    /// A migration that the gateway waits for.
    async fn open(&self, number: u8) -> (PeerLink, Channel) {
        let link = self.stranger.link(JOURNAL).await;
        let mut channel = Channel::open(&link.control, &Request::Open(self.offer(number))).await;
        match channel.receive().await {
            Some(SessionMessage::Accepted { .. }) => (link, channel),
            other => panic!("the offer was not taken: {other:?}"),
        }
    }

    /// Nothing of a migration is left at B, and its gateway serves.
    #[track_caller]
    fn assert_clean(&self) {
        until("no hypervisor is left at b", || self.rig.b.hypervisors("vm").is_empty());
        until("nothing but durable files at b", || self.rig.b.leftovers().is_empty());
        assert_eq!(self.rig.b.run(&["list"]).code, Some(0));
    }
}

fn header(number: u8) -> FrameHeader {
    FrameHeader {
        kind: FrameKind::Plain,
        last: false,
        held: false,
        migration: MigrationId([number; 16]),
        epoch: 0,
        sequence: 0,
        stream_offset: 0,
        stream_bytes: 4,
    }
}

async fn send(link: &PeerLink, lane: Bytes) {
    soon(send_lane(&link.bulk[0], &mut [lane])).await.unwrap();
}

fn lane(header: FrameHeader, payload: &[u8]) -> Bytes {
    let frame = Frame {
        header,
        payload: Bytes::copy_from_slice(payload),
    };
    [frame.encode_header(), frame.payload].concat().into()
}

async fn assert_closed(connection: &quinn::Connection) {
    assert_closed_with(CloseCode::Protocol, connection).await;
}

async fn assert_closed_with(code: CloseCode, connection: &quinn::Connection) {
    assert_error(code, &soon(connection.closed()).await);
}

#[track_caller]
fn assert_error(code: CloseCode, error: &ConnectionError) {
    match error {
        ConnectionError::ApplicationClosed(close) => assert_eq!(close.error_code, code.into(), "{close:?}"),
        // Where the machine is busy, a reset hides the reason that came before it.
        ConnectionError::Reset => {}
        other => panic!("closed by {other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_message_cost_the_connection_and_nothing_else() {
    let mut rig = Rig::apart(&[], |_, _| {});
    rig.b.start();
    let stranger = Stranger::paired_with(&rig.b);
    let too_long = (MAX_MESSAGE as u32 + 1).to_le_bytes().to_vec();
    let malformed = [&6_u32.to_le_bytes()[..], b"\xff\xff\xff\xff\xff\xff"].concat();
    let cut_short = [&100_u32.to_le_bytes()[..], b"only this"].concat();
    for bytes in [too_long, malformed, cut_short] {
        let link = stranger.dial().await;
        let (mut sender, _receiver) = soon(link.control.open_bi()).await.unwrap();
        sender.write_all(&bytes).await.unwrap();
        let _ = sender.finish();
        assert_closed(&link.control).await;
    }
    drop(stranger.link(JOURNAL).await);
    assert_eq!(rig.b.run(&["list"]).code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_out_of_turn_are_refused_in_words() {
    let mut rig = Rig::apart(&[], |_, _| {});
    rig.b.start();
    let stranger = Stranger::paired_with(&rig.b);
    let link = stranger.dial().await;
    let mut channel = Channel::open(&link.control, &Request::Ping(7)).await;
    assert!(matches!(channel.receive().await, Some(Reply::Refused(reason)) if reason.contains("hello")));

    // A version that does not exist yet, and limits that cannot carry a frame.
    let limits = |window_bytes| Limits {
        window_bytes,
        dictionary_pages: 0,
    };
    let mut future = Hello::new("a".into(), JOURNAL, limits(64 << 20));
    (future.oldest_version, future.newest_version) = (7000, 7001);
    for (hello, word) in [
        (future, "upgrade"),
        (Hello::new("a".into(), JOURNAL, limits(1)), "memory_budget"),
    ] {
        let link = stranger.dial().await;
        let mut channel = Channel::open(&link.control, &Request::Hello(hello)).await;
        match channel.receive().await {
            Some(Reply::Refused(reason)) => assert!(reason.contains(word), "{reason}"),
            other => panic!("not refused: {other:?}"),
        }
    }

    // Before version 7 a hello comes once.
    let link = stranger.dial().await;
    let mut old = Hello::new("a".into(), JOURNAL, limits(64 << 20));
    old.newest_version = 6;
    let mut channel = Channel::open(&link.control, &Request::Hello(old.clone())).await;
    assert!(matches!(channel.receive().await, Some(Reply::Hello(_))));
    let mut channel = Channel::open(&link.control, &Request::Hello(old)).await;
    assert!(matches!(channel.receive().await, Some(Reply::Refused(reason)) if reason.contains("twice")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hello_may_come_again_and_another_gateways_may_not() {
    let mut rig = Rig::apart(&[], |_, _| {});
    rig.b.start();
    let stranger = Stranger::paired_with(&rig.b);
    let link = stranger.link(JOURNAL).await;
    let limits = |window_bytes| Limits {
        window_bytes,
        dictionary_pages: 9,
    };
    let say = async |journal, limits| {
        let hello = Request::Hello(Hello::new("a".into(), journal, limits));
        Channel::open(&link.control, &hello).await.receive().await
    };
    for _ in 0..3 {
        assert!(matches!(say(JOURNAL, limits(64 << 20)).await, Some(Reply::Hello(_))));
    }
    for (journal, window, word) in [(JournalId([9; 16]), 64 << 20, "another"), (JOURNAL, 1, "memory_budget")] {
        match say(journal, limits(window)).await {
            Some(Reply::Refused(reason)) => assert!(reason.contains(word), "{reason}"),
            other => panic!("not refused: {other:?}"),
        }
    }
    let mut channel = Channel::open(&link.control, &Request::Ping(7)).await;
    assert_eq!(channel.receive().await, Some(Reply::Pong(7)));
}

#[tokio::test(flavor = "multi_thread")]
async fn channels_whose_request_never_comes_hold_up_no_other() {
    let mut rig = Rig::apart(&[], |_, _| {});
    rig.b.start();
    let stranger = Stranger::paired_with(&rig.b);
    let link = stranger.link(JOURNAL).await;
    // One after the other they would take the gateway's patience longer than this test's.
    let mut silent = Vec::new();
    for _ in 0..8 {
        let (mut sender, receiver) = soon(link.control.open_bi()).await.unwrap();
        sender.write_all(&[5, 0]).await.unwrap();
        silent.push((sender, receiver));
    }
    let mut channel = Channel::open(&link.control, &Request::Ping(7)).await;
    assert_eq!(channel.receive().await, Some(Reply::Pong(7)));
}

#[tokio::test(flavor = "multi_thread")]
async fn offers_that_cannot_be_are_refused_and_start_nothing() {
    need!(qemu());
    let scene = Scene::set().await;
    let link = scene.stranger.link(JOURNAL).await;
    let good = scene.offer(1);
    let offers = [
        Offer {
            vm: "vm\0\n".to_owned(),
            ..good.clone()
        },
        Offer {
            inventory: "{}".to_owned(),
            ..good.clone()
        },
        Offer {
            inventory: format!("[{}]", "[".repeat(100_000)),
            ..good.clone()
        },
        Offer {
            regions: u32::MAX,
            ..good.clone()
        },
        Offer {
            regions: REGIONS + 1,
            ..good.clone()
        },
    ];
    for offer in offers {
        for request in [Request::Open(offer.clone()), Request::Check(offer.clone())] {
            let is_check = matches!(request, Request::Check(_));
            let mut channel = Channel::open(&link.control, &request).await;
            if is_check {
                match channel.receive().await {
                    Some(Reply::Checked(against)) => assert!(!against.is_empty()),
                    other => panic!("not checked: {other:?}"),
                }
            } else {
                match channel.receive().await {
                    Some(SessionMessage::Refused { reason }) => assert!(!reason.is_empty()),
                    other => panic!("not refused: {other:?}"),
                }
            }
        }
    }
    scene.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_that_are_no_frames_cost_the_connection() {
    need!(qemu());
    let scene = Scene::set().await;
    let honest = lane(header(2), b"abcd");
    let changed = |at: usize, value: u8| {
        let mut bytes = honest.to_vec();
        bytes[at] = value;
        Bytes::from(bytes)
    };
    let lanes = [
        ("cut short", honest.slice(..20)),
        ("another magic", changed(0, 0)),
        ("another version", changed(1, 9)),
        ("unknown kind", changed(2, 77)),
        ("unknown flags", changed(3, 0xf0)),
        ("a longer payload than there is", changed(4, 200)),
        ("a sequence beyond any stream", changed(39, 0x80)),
        ("an offset beyond any stream", changed(47, 0x80)),
        (
            "a repair that is longer than its head makes it",
            lane(
                FrameHeader {
                    kind: FrameKind::Repair,
                    stream_bytes: 0,
                    ..header(2)
                },
                &[&[1, 11, 1, 0][..], &[0; 8], &[48, 0, 0, 0], &[0; 4], &[0; 2049]].concat(),
            ),
        ),
        ("longer than any frame", vec![0x4c; MAX_PAYLOAD + 4096].into()),
        (
            "beyond the window",
            lane(
                FrameHeader {
                    sequence: 1 << 40,
                    ..header(2)
                },
                &vec![7; 1 << 20],
            ),
        ),
    ];
    let (link, mut channel) = scene.open(2).await;
    for (what, bytes) in lanes {
        let link = scene.stranger.link(JOURNAL).await;
        println!("{what}");
        // Where one frame is not too much for the window, enough of them are.
        for turn in 0..12_u64 {
            let mut bytes = bytes.to_vec();
            if what == "beyond the window" {
                bytes[32..40].copy_from_slice(&((1_u64 << 40) + turn).to_le_bytes());
            }
            if send_lane(&link.bulk[0], &mut [bytes.into()]).await.is_err() {
                break;
            }
        }
        assert_closed(&link.bulk[0]).await;
    }
    channel.send(&SessionMessage::Ownership(Message::Cancel)).await;
    let aborted = Message::Aborted {
        reason: AbortReason::Cancelled,
    };
    assert_eq!(channel.ownership().await, Some(aborted));
    drop(link);
    scene.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_has_one_bulk_connection_and_lanes_of_nobody_are_not_waited_for() {
    let mut rig = Rig::apart(&[], |_, _| {});
    rig.b.start();
    let stranger = Stranger::paired_with(&rig.b);
    let older = stranger.link(JOURNAL).await;
    let newer = stranger.link(JOURNAL).await;
    assert_closed_with(CloseCode::Replaced, &older.bulk[0]).await;
    assert!(older.control.close_reason().is_none());

    // The header says which migration it is of; what follows it never comes.
    let whole = lane(
        FrameHeader {
            stream_bytes: 1 << 20,
            ..header(2)
        },
        &vec![7; 1 << 20],
    );
    let mut lane = soon(newer.bulk[0].open_uni()).await.unwrap();
    lane.write_all(&whole[..1000]).await.unwrap();
    assert!(soon(lane.stopped()).await.unwrap().is_some());
    assert!(newer.bulk[0].close_reason().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ninth_bulk_connection_of_a_link_is_refused_and_one_of_another_link_ends_the_eight() {
    let mut rig = Rig::apart(&[], |_, _| {});
    rig.b.start();
    let stranger = Stranger::paired_with(&rig.b);
    let (endpoint, address) = stranger.bulk_by_hand();
    let connect = async |name: &str| soon(endpoint.connect(address, name).unwrap()).await.unwrap();
    let mut nine = Vec::new();
    for _ in 0..9 {
        nine.push(connect("0123456789abcdef.8.bulk.invalid").await);
    }
    // Which of them the gateway takes for the last is its own affair.
    let refused = || nine.iter().filter_map(|connection| connection.close_reason());
    until("one is refused", || refused().next().is_some());
    // More at a time are no link.
    let more = connect("0123456789abcdef.9.bulk.invalid").await;
    soon(more.closed()).await;
    let refused: Vec<ConnectionError> = refused().collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_error(CloseCode::Refused, &refused[0]);

    nine.retain(|connection| connection.close_reason().is_none());
    let other = connect("0123456789abcdef.2.bulk.invalid").await;
    for connection in &nine {
        assert_closed_with(CloseCode::Replaced, connection).await;
    }
    assert!(other.close_reason().is_none());
    assert_eq!(rig.b.run(&["list"]).code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_unfinished_on_several_bulk_connections_counts_together() {
    need!(qemu());
    let mut scene = Scene::set().await;
    scene.stranger.target.bulk_connections = Some(3);
    let (link, mut channel) = scene.open(3).await;
    // The gateway's window is 5 MB, of which a peer with one migration may leave three unfinished.
    let whole = lane(
        FrameHeader {
            stream_bytes: 1 << 20,
            ..header(3)
        },
        &vec![7; 1 << 20],
    );
    let mut unfinished = Vec::new();
    for connection in &*link.bulk {
        for _ in 0..6 {
            let Ok(mut lane) = soon(connection.open_uni()).await else {
                break;
            };
            let _ = soon(lane.write_all(&whole[..whole.len() - 1])).await;
            unfinished.push(lane);
        }
    }
    assert_error(CloseCode::Protocol, &soon(link.bulk.broken()).await);
    channel.send(&SessionMessage::Ownership(Message::Cancel)).await;
    let aborted = Message::Aborted {
        reason: AbortReason::Cancelled,
    };
    assert_eq!(channel.ownership().await, Some(aborted));
    drop((link, unfinished));
    scene.assert_clean();
}

/// Frames of a stream in which pages come twice, so that later ones refer to earlier ones.
fn frames_with_references() -> Vec<EncodedFrame> {
    let mut stream = b"QEVM\0\0\0\x03".to_vec();
    // START of "ram" version 4, one block of 1 MiB; then pages of it, twice.
    let section = |kind: u8, out: &mut Vec<u8>| {
        out.push(kind);
        out.extend(2_u32.to_be_bytes());
    };
    section(1, &mut stream);
    stream.extend(b"\x03ram");
    stream.extend(0_u32.to_be_bytes());
    stream.extend(4_u32.to_be_bytes());
    stream.extend(((1_u64 << 20) | 4).to_be_bytes());
    stream.extend(b"\x06pc.ram");
    stream.extend((1_u64 << 20).to_be_bytes());
    stream.extend(16_u64.to_be_bytes());
    stream.push(0x7e);
    stream.extend(2_u32.to_be_bytes());
    for round in 0..2_u64 {
        section(2, &mut stream);
        for page in 0..64_u64 {
            let at = (page + round * 64) << 12;
            stream.extend((at | 8).to_be_bytes());
            stream.extend(b"\x06pc.ram");
            let seed = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
            stream.extend((0..512_u64).flat_map(|word| (seed.wrapping_mul(word + 1)).rotate_left(17).to_le_bytes()));
        }
        stream.extend(16_u64.to_be_bytes());
        stream.push(0x7e);
        stream.extend(2_u32.to_be_bytes());
    }
    let limits = DictionaryLimits::new(1 << 14, REGIONS).unwrap();
    let mut encoder = Encoder::new(Some(Reducer::new(limits, limits.slots())));
    let mut frames = Vec::new();
    // Cut between the rounds, so that the second one makes payloads of its own.
    let middle = stream.len() / 2;
    encoder.feed(&stream[..middle], &mut frames);
    encoder.feed(&stream[middle..], &mut frames);
    let (_, pages) = encoder.finish(&mut frames);
    assert!(pages.reference > 0, "the second round refers to the first: {pages:?}");
    frames
}

#[tokio::test(flavor = "multi_thread")]
async fn payloads_that_cannot_be_restored_abort_the_migration_and_end_its_hypervisor() {
    need!(qemu());
    let scene = Scene::set().await;
    let reduced = frames_with_references()
        .into_iter()
        .filter(|frame| frame.kind == FrameKind::Reduced)
        .collect::<Vec<_>>();
    let later = reduced.last().unwrap();
    let payloads = [
        ("noise", Bytes::from(vec![0xa5; 5000]), 4096),
        ("nothing", Bytes::new(), 4096),
        (
            "a reference to what was never sent",
            later.payload.clone(),
            later.stream_bytes,
        ),
        (
            "less than it says",
            reduced[0].payload.clone(),
            reduced[0].stream_bytes - 1,
        ),
    ];
    for (number, (what, payload, stream_bytes)) in (10..).zip(payloads) {
        println!("{what}");
        let (link, mut channel) = scene.open(number).await;
        let header = FrameHeader {
            kind: FrameKind::Reduced,
            stream_bytes,
            ..header(number)
        };
        send(&link, lane(header, &payload)).await;
        let aborted = Message::Aborted {
            reason: AbortReason::LoadFailed,
        };
        assert_eq!(channel.ownership().await, Some(aborted), "{what}");
        scene.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permit_for_other_bytes_runs_nothing() {
    need!(qemu());
    let scene = Scene::set().await;
    let (link, mut channel) = scene.open(30).await;
    let stream = b"QEVM\0\0\0\x03 and then nothing that a hypervisor could load";
    let header = FrameHeader {
        last: true,
        stream_bytes: stream.len() as u32,
        ..header(30)
    };
    send(&link, lane(header, stream)).await;
    let journal = scene.rig.b.state_dir().join("journal");
    let destination_journal = longhaul::store::journal::read_only(&journal).unwrap().id;
    let permit = Permit {
        stream: StreamSum {
            digest: StreamDigest([0xee; 32]),
            length: stream.len() as u64,
        },
        was_running: true,
        destination_journal,
    };
    channel.send(&SessionMessage::Ownership(Message::Permit(permit))).await;
    let aborted = Message::Aborted {
        reason: AbortReason::StreamDiffers,
    };
    assert_eq!(channel.ownership().await, Some(aborted));
    scene.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_comes_back_with_another_journal_is_not_believed() {
    need!(qemu());
    let scene = Scene::set().await;
    let (link, channel) = scene.open(40).await;
    let other = scene.stranger.link(JournalId([0x22; 16])).await;
    let attach = Request::Attach {
        migration: MigrationId([40; 16]),
        epoch: None,
    };
    let mut attached = Channel::open(&other.control, &attach).await;
    let answer = attached.ownership().await;
    assert!(
        matches!(
            answer,
            Some(
                Message::Aborted {
                    reason: AbortReason::JournalChanged
                } | Message::InDoubt {
                    doubt: Doubt::JournalChanged
                }
            )
        ),
        "{answer:?}"
    );
    drop((link, channel));
    scene.assert_clean();
}
