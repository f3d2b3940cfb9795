//! The largest packets that a path carries are found, and found anew where it stops to carry them.

use std::time::Duration;

use longhaul::wan::LinkSettings;

use super::{Connected, SEED, achievable, link_of, mbit};

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn jumbo_frames_are_found_and_used_and_common_ones_cost_nothing() {
    for (mtu_bytes, payload, least) in [(1500, 1452..=1472, 0.98), (9000, 8952..=8972, 0.98)] {
        let link = LinkSettings {
            mtu_bytes,
            ..link_of(mbit(100), 0.1)
        };
        let connected = Connected::over(link.clone(), link.rate).await;
        let bulk = connected.send_bulk();
        tokio::time::sleep(8 * SECOND).await;
        let start = bulk.arrived_between(Duration::ZERO, 4 * SECOND) as f64 / achievable(&link, 4 * SECOND);
        let share = bulk.arrived_between(4 * SECOND, 8 * SECOND) as f64 / achievable(&link, 4 * SECOND);
        let measures = connected.from.bulk.stats();
        eprintln!(
            "MTU {mtu_bytes}, seed {SEED}: payloads of {}, {start:.4} in the first 4 s, then {share:.4} of what the link carries",
            measures.mtu
        );
        assert!(payload.contains(&measures.mtu), "{}", measures.mtu);
        assert_eq!(measures.black_holes, 0);
        assert!(
            share >= least && start >= 0.95,
            "MTU {mtu_bytes}: {start}, then {share}"
        );
        bulk.complete().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_path_that_stops_to_carry_full_packets_is_filled_with_smaller_ones() {
    for (before, after) in [(1500, 1300), (9000, 1500)] {
        let mut link = LinkSettings {
            mtu_bytes: before,
            ..link_of(mbit(100), 0.0)
        };
        let connected = Connected::over(link.clone(), link.rate).await;
        let bulk = connected.send_bulk();
        tokio::time::sleep(5 * SECOND).await;
        connected.link.change(0, |settings| settings.mtu_bytes = after);
        tokio::time::sleep(9 * SECOND).await;
        link.mtu_bytes = 1228;
        let each: Vec<String> = (10..28)
            .map(|half| {
                let at = SECOND / 2 * half;
                let arrived = bulk.arrived_between(at, at + SECOND / 2) as f64;
                format!("{:.2}", arrived / achievable(&link, SECOND / 2))
            })
            .collect();
        let share = bulk.arrived_between(11 * SECOND, 14 * SECOND) as f64 / achievable(&link, 3 * SECOND);
        let measures = connected.from.bulk.stats();
        eprintln!(
            "MTU {before} falls to {after}, seed {SEED}: {} black holes, payloads of {}, {share:.4} from 6 s after it on; each half second after: {each:?}",
            measures.black_holes, measures.mtu
        );
        assert_eq!(measures.black_holes, 1);
        assert!(share >= 0.95, "{share}");
        bulk.complete().await;
    }
}
