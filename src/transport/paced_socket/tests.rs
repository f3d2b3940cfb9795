use std::future::poll_fn;
use std::sync::atomic::AtomicBool;

use super::*;

const PEER: &str = "192.0.2.1:7000";
const SEGMENT: usize = 1452;
const TRAIN: usize = 10 * SEGMENT;
const TRAIN_ON_WIRE: u64 = (TRAIN + 10 * 42) as u64;

/// Takes everything, unless it is told to be full.
#[derive(Debug, Default)]
struct Wire {
    sent: Mutex<Vec<(Instant, SocketAddr, u64)>>,
    full: AtomicBool,
}

impl Wire {
    fn bytes(&self) -> u64 {
        self.sent.lock().unwrap().iter().map(|(_, _, bytes)| bytes).sum()
    }
}

#[derive(Debug)]
struct AlwaysWritable;

impl UdpPoller for AlwaysWritable {
    fn poll_writable(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for Wire {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(AlwaysWritable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.sent
            .lock()
            .unwrap()
            .push((now(), transmit.destination, link_bytes(transmit)));
        Ok(())
    }

    fn poll_recv(&self, _: &mut Context<'_>, _: &mut [IoSliceMut<'_>], _: &mut [RecvMeta]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(SocketAddr::from(([127, 0, 0, 1], 1)))
    }

    fn max_transmit_segments(&self) -> usize {
        64
    }
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn transmit(destination: SocketAddr, contents: &[u8]) -> Transmit<'_> {
    Transmit {
        destination,
        ecn: None,
        contents,
        segment_size: Some(SEGMENT),
        src_ip: None,
    }
}

fn unlimited() -> Arc<SharedBucket> {
    Arc::default()
}

fn limited(bits: u64) -> Arc<SharedBucket> {
    Arc::new(SharedBucket::new(Some(ByteRate::from_bits_per_second(bits))))
}

/// A socket whose link is not limited.
fn unlinked(inner: Arc<dyn AsyncUdpSocket>) -> Arc<PacedSocket> {
    PacedSocket::new(inner, Arc::default(), Route::of_strangers(unlimited(), unlimited()))
}

fn paced(route: Route) -> (Arc<Wire>, Arc<PacedSocket>) {
    let wire = Arc::new(Wire::default());
    let socket = unlinked(wire.clone());
    socket.set_only_route(Arc::new(route));
    (wire, socket)
}

/// Sends as quinn's connection driver does: ask, try, and ask again where the attempt is refused.
async fn drive(socket: &Arc<PacedSocket>, destination: SocketAddr, length: usize, until: tokio::time::Instant) {
    let contents = vec![0; length];
    let mut poller = socket.clone().create_io_poller();
    while tokio::time::Instant::now() < until {
        if tokio::time::timeout_at(until, poll_fn(|cx| poller.as_mut().poll_writable(cx)))
            .await
            .is_err()
        {
            return;
        }
        match socket.try_send(&transmit(destination, &contents)) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
        }
    }
}

fn in_time(seconds: u64) -> tokio::time::Instant {
    tokio::time::Instant::now() + Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn ten_seconds_of_sending_carry_the_rate_exactly_headers_included() {
    for bits in [50_000_000, 100_000_000, 1_000_000_000] {
        let (wire, socket) = paced(Route::new(Priority::Bulk, None, limited(bits), unlimited()));
        drive(&socket, address(PEER), TRAIN, in_time(10)).await;
        let fair = ByteRate::from_bits_per_second(bits).bytes_in(Duration::from_secs(10));
        let slack = ByteRate::from_bits_per_second(bits).bytes_in(Duration::from_millis(4)) + TRAIN_ON_WIRE;
        assert!(
            wire.bytes().abs_diff(fair) <= slack,
            "{} of {fair} at {bits}",
            wire.bytes()
        );
    }
}

#[tokio::test(start_paused = true)]
async fn the_wire_never_sees_more_than_a_few_milliseconds_at_once() {
    let rate = ByteRate::from_bits_per_second(1_000_000_000);
    let (wire, socket) = paced(Route::new(Priority::Bulk, None, limited(1_000_000_000), unlimited()));
    drive(&socket, address(PEER), TRAIN, in_time(2)).await;
    let sent = wire.sent.lock().unwrap();
    let start = sent[0].0;
    let mut windows = HashMap::<u128, u64>::new();
    for (time, _, bytes) in &*sent {
        *windows.entry((*time - start).as_millis() / 5).or_default() += bytes;
    }
    // 5 ms, the burst before and the train that ends in debt.
    let most = rate.bytes_in(Duration::from_millis(5 + 2)) + TRAIN_ON_WIRE;
    assert!(
        windows.values().all(|bytes| *bytes <= most),
        "{:?} > {most}",
        windows.values().max()
    );
}

#[tokio::test(start_paused = true)]
async fn the_lowest_of_the_three_rates_holds() {
    for (own, peer, link) in [(10, 20, 30), (30, 10, 20), (20, 30, 10)] {
        let own = Arc::new(LinkRate::new(ByteRate::from_bits_per_second(own * 1_000_000)));
        let route = Route::new(
            Priority::Bulk,
            Some(own),
            limited(peer * 1_000_000),
            limited(link * 1_000_000),
        );
        let (wire, socket) = paced(route);
        drive(&socket, address(PEER), TRAIN, in_time(10)).await;
        let fair = 10 * 1_250_000;
        assert!(wire.bytes().abs_diff(fair) < fair / 100, "{} of {fair}", wire.bytes());
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_of_the_controllers_rate_is_followed_at_once() {
    let own = Arc::new(LinkRate::new(ByteRate(10_000_000)));
    let (wire, socket) = paced(Route::new(Priority::Bulk, Some(own.clone()), unlimited(), unlimited()));
    drive(&socket, address(PEER), TRAIN, in_time(10)).await;
    let before = wire.bytes();
    own.set_capacity(Some(ByteRate(1_000_000)));
    drive(&socket, address(PEER), TRAIN, in_time(10)).await;
    let after = wire.bytes() - before;
    assert!(after <= 10_000_000 + 100_000, "{after} bytes in 10 s at 1 MB/s");
}

#[tokio::test(start_paused = true)]
async fn acknowledgements_do_not_wait_for_a_rate_that_was_found_and_full_packets_do() {
    for (size, waits) in [(500, false), (1452, true)] {
        let own = Arc::new(LinkRate::found(ByteRate(10_000)));
        let (_, socket) = paced(Route::new(Priority::Bulk, Some(own), unlimited(), unlimited()));
        let packet = vec![0; size];
        let refused = (0..100).any(|_| socket.try_send(&transmit(address(PEER), &packet)).is_err());
        assert_eq!(refused, waits, "{size} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn control_passes_where_bulk_waits_and_what_it_sends_is_taken_from_bulk() {
    let peer = limited(100_000_000);
    let (bulk_wire, bulk) = paced(Route::new(Priority::Bulk, None, peer.clone(), unlimited()));
    let (control_wire, control) = paced(Route::new(Priority::Control, None, peer, unlimited()));
    let end = in_time(10);
    let sending_bulk = tokio::spawn(async move { drive(&bulk, address(PEER), TRAIN, end).await });
    let message = vec![0; 100];
    let mut messages = 0;
    while tokio::time::Instant::now() < end {
        control
            .try_send(&transmit(address(PEER), &message))
            .expect("control never waits for bulk");
        messages += 1;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    sending_bulk.await.unwrap();
    assert_eq!(control_wire.bytes(), messages * 142);
    let total = control_wire.bytes() + bulk_wire.bytes();
    assert!(total <= 125_000_000 + 200_000, "{total}");
    assert!(total >= 125_000_000 - 200_000, "{total}");
}

#[tokio::test(start_paused = true)]
async fn on_a_shared_socket_each_peer_has_its_own_rate_and_strangers_none() {
    let wire = Arc::new(Wire::default());
    let socket = unlinked(wire.clone());
    let [slow, fast, stranger] = ["192.0.2.1:1", "[2001:db8::1]:1", "192.0.2.9:1"].map(address);
    let routes = [(slow, 8_000_000), (fast, 80_000_000)].map(|(peer, bits)| {
        (
            peer,
            Arc::new(Route::new(Priority::Bulk, None, limited(bits), unlimited())),
        )
    });
    // A dual-stack socket names IPv4 peers in this way.
    let mapped = address("[::ffff:192.0.2.1]:1");
    socket.add_route(mapped, &routes[0].1);
    socket.add_route(fast, &routes[1].1);
    let end = in_time(10);
    let drives = [mapped, fast].map(|peer| {
        let socket = socket.clone();
        tokio::spawn(async move { drive(&socket, peer, TRAIN, end).await })
    });
    for drive in drives {
        drive.await.unwrap();
    }
    for (peer, fair) in [(mapped, 10_000_000), (fast, 100_000_000)] {
        let sent = wire
            .sent
            .lock()
            .unwrap()
            .iter()
            .filter(|sent| sent.1 == peer)
            .map(|sent| sent.2)
            .sum::<u64>();
        assert!(sent.abs_diff(fair) < fair / 50, "{sent} of {fair} to {peer}");
    }
    for _ in 0..1000 {
        socket
            .try_send(&transmit(stranger, &[0; TRAIN]))
            .expect("handshakes of strangers are not paced");
    }
}

#[test]
fn a_route_moves_with_its_peer_but_never_to_where_another_is() {
    let socket = unlinked(Arc::new(Wire::default()));
    let [first, second, third] = ["192.0.2.1:1", "192.0.2.2:1", "192.0.2.3:1"].map(address);
    let [one, two] = [(); 2].map(|()| Arc::new(Route::new(Priority::Bulk, None, unlimited(), unlimited())));
    let at = |peer, route: &Arc<Route>| Arc::ptr_eq(&socket.route(peer), route);
    socket.add_route(first, &one);
    socket.add_route(second, &two);
    assert!(!socket.move_route(second, &one));
    assert!(at(first, &one) && at(second, &two));
    assert!(socket.move_route(third, &one));
    assert!(at(third, &one) && at(first, &socket.strangers));
    socket.remove_route(&two);
    assert!(at(third, &one) && at(second, &socket.strangers));
    assert!(socket.move_route(second, &one));
    assert!(at(second, &one) && at(third, &socket.strangers));
}

#[tokio::test(start_paused = true)]
async fn packets_to_strangers_are_told_of_and_take_no_more_than_is_set_aside_for_them() {
    let (wire, link) = (Arc::new(Wire::default()), limited(160_000_000));
    let strangers = Route::of_strangers(limited(8_000_000), link);
    let socket = PacedSocket::new(wire.clone(), Arc::default(), strangers);
    let strange = socket.strange();
    let told = strange.notified();
    drive(&socket, address(PEER), TRAIN, in_time(10)).await;
    tokio::time::timeout(Duration::ZERO, told)
        .await
        .expect("the first packet told");
    assert!(wire.bytes().abs_diff(10_000_000) <= 100_000, "{}", wire.bytes());
}

#[test]
fn a_controller_that_takes_over_has_the_capacity_that_was_set_before() {
    let [before, after] = [10_000_000, 20_000_000].map(|rate| Arc::new(LinkRate::new(ByteRate(rate))));
    let route = Route::new(Priority::Bulk, Some(before), unlimited(), unlimited());
    route.set_capacity(Some(ByteRate(1_000_000)));
    route.adopt(&after);
    assert!(route.rate().is_some_and(|rate| Arc::ptr_eq(&rate, &after)));
    assert_eq!(after.rate(), ByteRate(1_000_000));
    route.set_capacity(Some(ByteRate(3_000_000)));
    route.adopt(&after);
    assert_eq!(after.rate(), ByteRate(3_000_000));
}

#[tokio::test(start_paused = true)]
async fn what_the_kernel_does_not_take_is_not_charged() {
    let (wire, socket) = paced(Route::new(Priority::Bulk, None, limited(1_000_000), unlimited()));
    wire.full.store(true, Ordering::Relaxed);
    for _ in 0..1000 {
        assert!(socket.try_send(&transmit(address(PEER), &[0; TRAIN])).is_err());
    }
    wire.full.store(false, Ordering::Relaxed);
    socket
        .try_send(&transmit(address(PEER), &[0; TRAIN]))
        .expect("there is credit still");
}

#[tokio::test(start_paused = true)]
async fn waits_are_counted_once_each_with_their_time() {
    let route = Arc::new(Route::new(Priority::Bulk, None, limited(8_000_000), unlimited()));
    let wire = Arc::new(Wire::default());
    let socket = unlinked(wire);
    socket.set_only_route(route.clone());
    drive(&socket, address(PEER), TRAIN, in_time(10)).await;
    let (waits, time) = (route.counters().waits(), route.counters().wait_time());
    // 1 MB/s in trains of 14.8 kB: one wait for each, and nearly all the time is spent waiting.
    assert!((600..=700).contains(&waits), "{waits} waits");
    assert!(
        time >= Duration::from_millis(9_900) && time <= Duration::from_secs(10),
        "{time:?}"
    );
}

#[test]
fn as_many_datagrams_as_were_asked_for_are_sent_twice_and_charged_twice_but_no_trains() {
    let bucket = limited(1_000_000_000);
    let route = Arc::new(Route::new(Priority::Control, None, bucket, unlimited()));
    let wire = Arc::new(Wire::default());
    let socket = unlinked(wire.clone());
    socket.set_only_route(Arc::clone(&route));
    let send = |length: usize| {
        let before = wire.sent.lock().unwrap().len();
        socket.try_send(&transmit(address(PEER), &vec![0; length])).unwrap();
        wire.sent.lock().unwrap().len() - before
    };
    assert_eq!(send(100), 1);
    route.send_twice(2);
    assert_eq!([send(TRAIN), send(100), send(SEGMENT), send(100)], [1, 2, 2, 1]);
    assert_eq!(wire.bytes(), TRAIN_ON_WIRE + 4 * 142 + 2 * (SEGMENT as u64 + 42));
}

#[test]
fn headers_are_42_bytes_a_datagram_over_ipv4_and_62_over_ipv6() {
    for (peer, header) in [
        ("192.0.2.1:1", 42),
        ("[::ffff:192.0.2.1]:1", 42),
        ("[2001:db8::1]:1", 62),
    ] {
        let on_wire = |length, segment_size| {
            let contents = vec![0; length];
            link_bytes(&Transmit {
                destination: address(peer),
                ecn: None,
                contents: &contents,
                segment_size,
                src_ip: None,
            })
        };
        assert_eq!(on_wire(100, None), 100 + header);
        assert_eq!(
            on_wire(2 * SEGMENT + 1, Some(SEGMENT)),
            2 * SEGMENT as u64 + 1 + 3 * header
        );
        assert_eq!(on_wire(2 * SEGMENT, Some(SEGMENT)), 2 * SEGMENT as u64 + 2 * header);
    }
}

#[test]
fn a_train_fits_into_one_send_and_lasts_a_millisecond_at_most_whatever_the_packets() {
    let largest = Arc::<LargestDatagram>::default();
    let socket = PacedSocket::new(
        Arc::new(Wire::default()),
        largest.clone(),
        Route::of_strangers(unlimited(), unlimited()),
    );
    let route = |bits| Arc::new(Route::new(Priority::Bulk, None, limited(bits), unlimited()));
    assert_eq!(socket.max_transmit_segments(), 45);
    socket.set_only_route(route(100_000_000));
    assert_eq!(socket.max_transmit_segments(), 8);
    largest.grow(MAX_UDP_PAYLOAD);
    assert_eq!(socket.max_transmit_segments(), 1);
    socket.set_only_route(route(1_000_000_000));
    assert_eq!(socket.max_transmit_segments(), 7);
    assert_eq!(
        socket.max_receive_segments(),
        1,
        "a socket without GRO needs no room for it"
    );
}

#[tokio::test]
async fn a_task_that_used_up_its_budget_may_still_send() {
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = unlinked(quinn::Runtime::wrap_udp_socket(&quinn::TokioRuntime, udp).unwrap());
    let mut poller = socket.create_io_poller();
    poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.unwrap();

    let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
    for event in 0..1_000 {
        sender.send(event).unwrap();
    }
    tokio::spawn(async move {
        poll_fn(|cx| {
            while events.poll_recv(cx).is_ready() {}
            assert!(!events.is_empty(), "the budget ends before the events do");
            assert!(poller.as_mut().poll_writable(cx).is_ready());
            Poll::Ready(())
        })
        .await;
    })
    .await
    .unwrap();
}
