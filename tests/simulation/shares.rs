//! Two flows on one link, by weight.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use longhaul::proto::page::ByteRate;
use longhaul::proto::rate::{Class, Weight};
use longhaul::shaper::{Shaper, Turns};
use longhaul::transport::{next_chunk, send_lane};
use tokio::time::Instant;

use super::{Connected, SEED, link_of, mbit};

/// When how many bytes of a flow arrived.
type Arrived = Arc<Mutex<Vec<(Instant, u64)>>>;

/// Bytes of a lane: 5 ms of the link, as the gateway makes them.
const LANE: usize = 64 * 1024;

#[tokio::test(start_paused = true)]
async fn two_migrations_share_three_to_one_also_where_one_starts_late() {
    let rate = mbit(100);
    let connected = Connected::over(link_of(rate, 0.1), rate).await;
    let admitted = ByteRate(connected.from.goodput().unwrap().0 / 200 * 199);
    let turns = Turns::new(Shaper::new(Some(admitted)));
    let arrived: [Arrived; 2] = Default::default();
    let begin = |number: u8, weight: u32| {
        let mut flow = turns.join(Class::Migration, Weight::new(weight).unwrap());
        let (bulk, content) = (connected.from.bulk[0].clone(), Bytes::from(vec![number; LANE]));
        tokio::spawn(async move {
            loop {
                let _turn = flow.turn(LANE as u64).await;
                if send_lane(&bulk, &mut [content.clone()]).await.is_err() {
                    return;
                }
            }
        });
    };
    let (bulk, counts) = (connected.to.bulk[0].clone(), arrived.clone());
    tokio::spawn(async move {
        while let Ok(mut lane) = bulk.accept_uni().await {
            let counts = counts.clone();
            tokio::spawn(async move {
                while let Ok(Some((_, chunk))) = next_chunk(&mut lane, LANE).await {
                    let count = &counts[usize::from(chunk[0])];
                    count.lock().unwrap().push((Instant::now(), chunk.len() as u64));
                }
            });
        }
    });
    begin(0, 1);
    tokio::time::sleep(Duration::from_secs(3)).await;
    begin(1, 3);
    // What was on the way when the second began has arrived by then.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let both = Instant::now();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let shares = arrived.map(|count| {
        let count = count.lock().unwrap();
        let since = count.iter().filter(|(at, _)| *at >= both);
        since.map(|(_, bytes)| *bytes).sum::<u64>() as f64
    });
    let share = shares[1] / (shares[0] + shares[1]);
    eprintln!("the late one of weight 3 beside 1, seed {SEED}: {share:.4} of what arrives");
    assert!((share / 0.75 - 1.0).abs() <= 0.05, "{share}");
}
