//! Others at the same bottleneck.

use super::*;

#[test]
fn two_that_probe_come_to_share() {
    for (rtt, buffer) in [(50, 50), (20, 10), (150, 5)] {
        let mut link = probed(ms(rtt), ms(buffer), 0.0);
        link.run(2 * SECOND);
        let now = link.now;
        link = link.with(Sender::probe(ms(rtt), now), ms(rtt));
        link.run(70 * SECOND);
        let shares = link.run(30 * SECOND);
        let ratio = shares[0] / shares[1];
        assert!((0.5..=2.0).contains(&ratio), "{rtt} ms, buffer {buffer} ms: {shares:?}");
        assert!(
            shares[0] + shares[1] >= 0.88,
            "{rtt} ms, buffer {buffer} ms: {shares:?}"
        );
    }
}

#[test]
fn neither_it_nor_cubic_starves_the_other() {
    for (rtt, buffer) in [(150, 50), (150, 300), (20, 50), (20, 200)] {
        let now = origin();
        let link = Bottleneck::new(megabit(100), ms(buffer), 0.0, now);
        let mut link = link.with(Sender::cubic(), ms(rtt));
        link.run(10 * SECOND);
        let now = link.now;
        link = link.with(Sender::probe(ms(rtt), now), ms(rtt));
        link.run(30 * SECOND);
        let shares = link.run(50 * SECOND);
        assert!(
            shares.iter().all(|share| *share >= 0.18),
            "{rtt} ms, buffer {buffer} ms: {shares:?}"
        );
    }
}

#[test]
fn what_a_constant_flow_leaves_is_used_and_taken_back_when_it_ends() {
    for buffer in [5, 50, 300] {
        let constant = Sender::Constant {
            rate: megabit(50),
            from: 10 * SECOND,
            to: 30 * SECOND,
        };
        let mut link = probed(RTT, ms(buffer), 0.0).with(constant, RTT);
        link.run(15 * SECOND);
        let beside = link.run(15 * SECOND)[0];
        assert!((0.42..=0.56).contains(&beside), "buffer {buffer} ms: {beside}");
        assert!(link.longest_queue <= 2 * RTT, "{:?}", link.longest_queue);
        link.run(6 * SECOND);
        let alone = link.run(4 * SECOND)[0];
        assert!(alone >= 0.95, "buffer {buffer} ms: {alone}");
    }
}
