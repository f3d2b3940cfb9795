//! The end of a link test that sends the lanes and reports.

use std::time::Duration;

use bytes::Bytes;

use super::findings::{Findings, findings};
use crate::api::{self, LinkTest, LinkTestRequest, Refusal, RefusalKind, RoundTrips};
use crate::gateway::channel::{Channel, ChannelError};
use crate::gateway::forecasting::{Forecasting, Sample};
use crate::gateway::links::Link;
use crate::gateway::outbound::UNKNOWN_RATE;
use crate::gateway::{Core, clock, random};
use crate::hypervisor::qemu::DirtyRate;
use crate::migrate::{FIRST_PASS_RATIO, RESEND_RATIO};
use crate::proto::page::{ByteRate, MigrationId};
use crate::proto::precopy::{Backlog, Budget, FixedCosts, ForecastInput};
use crate::proto::rate::{Class, Weight};
use crate::proto::session::connection_of;
use crate::proto::wire::message::Reply;
use crate::proto::wire::{Frame, FrameHeader, FrameKind, Request, TestMessage, hello};
use crate::shaper::Flow;
use crate::transport::tuning::stream_rate;
use crate::transport::{ConnectionMeasures, LaneError, send_lane};

/// Shortest and longest time to fill the link for.
const SECONDS: std::ops::RangeInclusive<f64> = 1.0..=600.0;

const IDLE_PINGS: u64 = 20;
const BETWEEN_PINGS: Duration = Duration::from_millis(50);

/// Counts that a sink may send, of which it says ten.
const COUNTS_A_SECOND: usize = 20;

/// Content of the lanes: long enough that no compression between the sites finds its repetition.
const CONTENT_BYTES: usize = 8 << 20;

/// By how much later each pass through the content begins, so that no two lanes are the same for long.
const STEP: usize = 4096;

/// The controller and the receiver's buffers have settled by then, however short the link.
const SETTLES: Duration = Duration::from_millis(500);

/// Measures the link to a peer.
///
/// # Errors
/// The request makes no sense here, the peer cannot be reached, or the link broke meanwhile.
pub(in crate::gateway) async fn run(core: &Core, request: &LinkTestRequest) -> Result<LinkTest, Refusal> {
    if !SECONDS.contains(&request.seconds) {
        let (least, most) = (SECONDS.start(), SECONDS.end());
        return Err(Refusal::new(
            RefusalKind::Invalid,
            format!("a link is tested for {least} to {most} s"),
        ));
    }
    let unavailable = |reason: String| Refusal::new(RefusalKind::Unavailable, reason);
    let link = core
        .links
        .link(&request.peer)
        .await
        .map_err(|error| unavailable(error.to_string()))?;
    if link.agreement().version < hello::LINK_TESTS {
        return Err(Refusal::new(
            RefusalKind::Conflict,
            format!("{} runs a release without link tests: update it", request.peer),
        ));
    }
    let broke = |error: FillError| unavailable(format!("the link to {} was not tested: {error}", request.peer));
    let patience = core.links.patience(&request.peer);
    let idle = pings(&link, patience).await.map_err(broke)?;
    let time = Duration::from_secs_f64(request.seconds);
    let filled = fill(&link, time, patience).await.map_err(broke)?;
    Ok(report(core, request, &link, &idle, &filled))
}

/// Times there and back on a link that carries nothing else of ours.
async fn pings(link: &Link, patience: Duration) -> Result<Vec<Duration>, FillError> {
    let mut times = Vec::new();
    for number in 0..IDLE_PINGS {
        times.push(in_time(patience, ping(link, number)).await?);
        tokio::time::sleep(BETWEEN_PINGS).await;
    }
    Ok(times)
}

async fn ping(link: &Link, number: u64) -> Result<Duration, ChannelError> {
    let began = clock::now();
    match Channel::ask(link.control(), &Request::Ping(number)).await? {
        Reply::Pong(answer) if answer == number => Ok(clock::now().saturating_duration_since(began)),
        _ => Err(ChannelError::Closed),
    }
}

/// What came of filling the link.
struct Filled {
    /// What arrived by when, by the sink's clock.
    arrived: Vec<Arrived>,
    /// Round trips beside the lanes.
    round_trips: Vec<Duration>,
    /// Of the bulk connections, before and at the end.
    before: ConnectionMeasures,
    after: ConnectionMeasures,
}

#[derive(Clone, Copy, Debug, Default)]
struct Arrived {
    at: Duration,
    lane_bytes: u64,
}

async fn fill(link: &Link, time: Duration, patience: Duration) -> Result<Filled, FillError> {
    let test = MigrationId(random::bytes());
    let mut channel = Channel::open(link.control(), &Request::Test { test }).await?;
    // Once it has counted, the sink is there.
    let first = next_count(&mut channel, Arrived::default());
    let mut arrived = vec![in_time(patience, first).await?];
    let most_counts = COUNTS_A_SECOND * (time.as_secs() as usize + 1);
    let mut round_trips = Vec::new();
    let before = link.bulk().stats();
    let mut flow = link.turns().join(Class::Background, Weight::MIN);
    let counting = async {
        while let Some(last) = arrived.last().filter(|_| arrived.len() < most_counts) {
            arrived.push(next_count(&mut channel, *last).await?);
        }
        Err(FillError::Counts)
    };
    let pinging = async {
        loop {
            round_trips.push(ping(link, round_trips.len() as u64).await?);
            if let Some(goodput) = link.goodput() {
                link.ask(clock::now(), test, goodput);
            }
            tokio::time::sleep(BETWEEN_PINGS).await;
        }
    };
    tokio::select! {
        error = send(link, &mut flow, test) => return Err(error.into()),
        error = counting => return error,
        error = pinging => return error,
        () = tokio::time::sleep(time) => {}
    }
    let after = link.bulk().stats();
    channel.sender.finish();
    Ok(Filled {
        arrived,
        round_trips,
        before,
        after,
    })
}

/// Sends lanes until the connection fails. What does not compress between the sites is sent, as the pages of a guest may not either.
async fn send(link: &Link, flow: &mut Flow, test: MigrationId) -> LaneError {
    let mut content = vec![0; CONTENT_BYTES];
    blake3::Hasher::new().update(&test.0).finalize_xof().fill(&mut content);
    let content = Bytes::from(content);
    let (mut offset, mut pass) = (0, 0);
    for sequence in 0.. {
        let rate = link.goodput().unwrap_or(UNKNOWN_RATE);
        let bytes = Backlog::at(rate, 1.0).read_bytes as usize;
        if offset + bytes > content.len() {
            pass += 1;
            offset = pass * STEP % (content.len() / 2);
        }
        let frame = Frame {
            header: FrameHeader {
                kind: FrameKind::Plain,
                last: false,
                held: false,
                migration: test,
                epoch: 0,
                sequence,
                stream_offset: 0,
                stream_bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
            },
            payload: content.slice(offset..offset + bytes),
        };
        offset += bytes;
        let _turn = flow.turn(frame.lane_bytes()).await;
        let header = frame.encode_header();
        let bulk = link.bulk();
        let connection = &bulk[connection_of(sequence, bulk.len())];
        if let Err(error) = send_lane(connection, &mut [header, frame.payload]).await {
            return error;
        }
    }
    unreachable!("a test ends before it has sent 2^64 lanes")
}

/// The next count, which is not less than the one before it.
async fn next_count(channel: &mut Channel, last: Arrived) -> Result<Arrived, FillError> {
    match channel.receiver.receive().await? {
        Some(TestMessage::Arrived { lane_bytes, micros, .. }) => {
            let at = Duration::from_micros(micros);
            if at < last.at || lane_bytes < last.lane_bytes {
                return Err(FillError::Counts);
            }
            Ok(Arrived { at, lane_bytes })
        }
        Some(TestMessage::Refused(reason)) => Err(FillError::Refused(reason)),
        None => Err(ChannelError::Closed.into()),
    }
}

#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Lane(#[from] LaneError),
    #[error("{0}")]
    Refused(String),
    #[error("the peer did not answer within {0:?}")]
    Silent(Duration),
    #[error("the peer counts what arrives in a way that cannot be")]
    Counts,
}

async fn in_time<T, E: Into<FillError>>(
    patience: Duration,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, FillError> {
    match tokio::time::timeout(patience, answer).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(_) => Err(FillError::Silent(patience)),
    }
}

fn report(core: &Core, request: &LinkTestRequest, link: &Link, idle: &[Duration], filled: &Filled) -> LinkTest {
    let idle = RoundTrips::of(idle);
    let loaded = RoundTrips::of(&filled.round_trips);
    let rtt = Duration::from_secs_f64(idle.median_seconds);
    let goodput = steady(&filled.arrived, rtt);
    let Filled { before, after, .. } = filled;
    let sent = after.sent_packets - before.sent_packets;
    let loss = (after.lost_packets - before.lost_packets) as f64 / sent.max(1) as f64;
    let achievable = link
        .capacity()
        .map(|capacity| stream_rate(capacity, after.mtu, link.header_bytes(), loss));
    let found = Findings {
        configured_rtt: core.links.configured_rtt(&request.peer),
        rtt,
        queue: Duration::from_secs_f64((loaded.median_seconds - idle.median_seconds).max(0.0)),
        loss,
        capacity: link.capacity(),
        rate: after.rate,
        goodput,
        achievable,
        mtu: after.mtu,
        migrations: core.registry.open_to(&request.peer),
    };
    LinkTest {
        peer: request.peer.clone(),
        seconds: request.seconds,
        idle,
        loaded,
        lost_share: loss,
        mtu_bytes: after.mtu,
        capacity_bytes_per_second: link.capacity().map(|rate| rate.0),
        rate_bytes_per_second: after.rate.map(|rate| rate.0),
        goodput_bytes_per_second: goodput.0,
        achievable_bytes_per_second: achievable.map(|rate| rate.0),
        wire_bytes: after.wire_bytes_sent - before.wire_bytes_sent,
        findings: findings(&found),
        forecast: request
            .memory_bytes
            .filter(|_| goodput.0 > 0)
            .map(|memory| forecast(core, request, memory, goodput, rtt)),
    }
}

/// Lane bytes a second once the pipe was full: without the first round trip in which anything arrived.
fn steady(arrived: &[Arrived], rtt: Duration) -> ByteRate {
    let rate = |from: &Arrived, to: &Arrived| {
        let time = to.at.saturating_sub(from.at).as_secs_f64();
        ByteRate(((to.lane_bytes - from.lane_bytes) as f64 / time.max(1e-3)) as u64)
    };
    let (Some(first), Some(last)) = (arrived.iter().find(|count| count.lane_bytes > 0), arrived.last()) else {
        return ByteRate(0);
    };
    let full = arrived.iter().find(|count| count.at >= first.at + rtt.max(SETTLES));
    match full {
        Some(full) if full.at < last.at => rate(full, last),
        _ => rate(&arrived[0], last),
    }
}

/// What a migration of a guest like this would take, with the terms that hold here.
fn forecast(core: &Core, request: &LinkTestRequest, memory: u64, goodput: ByteRate, rtt: Duration) -> api::Forecast {
    let limit = core.config.migration.downtime_limit;
    let budget = match Budget::new(limit, &FixedCosts::on_path(rtt, Some(goodput))) {
        Ok(budget) => budget,
        Err(error) => {
            return api::Forecast {
                reason: error.to_string(),
                ..api::Forecast::default()
            };
        }
    };
    let known = ForecastInput {
        used_bytes: memory,
        total_bytes: memory,
        disk_bytes: 0,
        dirty_rate: ByteRate(0),
        goodput: core.config.migration.rate.map_or(goodput, |cap| cap.min(goodput)),
        rtt,
        first_pass_ratio: FIRST_PASS_RATIO,
        resend_ratio: RESEND_RATIO,
        budget,
    };
    let dirty = DirtyRate {
        bytes_per_second: request.dirty_bytes_per_second,
        sampled_bytes: memory,
    };
    Forecasting::new(known, Sample::of(dirty)).forecast()
}

impl RoundTrips {
    fn of(times: &[Duration]) -> Self {
        let mut sorted: Vec<f64> = times.iter().map(Duration::as_secs_f64).collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = sorted.len().saturating_sub(1);
            sorted
                .get((last as f64 * share).round() as usize)
                .copied()
                .unwrap_or_default()
        };
        let steps = times.windows(2).map(|pair| pair[1].abs_diff(pair[0]).as_secs_f64());
        Self {
            least_seconds: at(0.0),
            median_seconds: at(0.5),
            p99_seconds: at(0.99),
            jitter_seconds: steps.sum::<f64>() / times.len().saturating_sub(1).max(1) as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(millis: u64, lane_bytes: u64) -> Arrived {
        Arrived {
            at: Duration::from_millis(millis),
            lane_bytes,
        }
    }

    #[test]
    fn goodput_is_that_of_the_full_pipe() {
        let rtt = Duration::from_millis(150);
        let mut arrived = vec![count(0, 0), count(100, 0), count(200, 10_000)];
        arrived.extend((3..=30).map(|step| count(step * 100, 10_000 + (step - 2) * 1_000_000)));
        assert_eq!(steady(&arrived, rtt), ByteRate(10_000_000));
        assert_eq!(steady(&arrived[..2], rtt), ByteRate(0));
        assert_eq!(
            steady(&arrived[..3], rtt),
            ByteRate(50_000),
            "too short to leave out anything"
        );
    }

    #[test]
    fn round_trips_are_summed_up_with_the_mean_step_between_them_as_jitter() {
        let times = [10, 14, 12, 12].map(Duration::from_millis);
        let trips = RoundTrips::of(&times);
        assert_eq!((trips.least_seconds, trips.p99_seconds), (0.010, 0.014));
        assert!((trips.jitter_seconds - 0.002).abs() < 1e-9, "{trips:?}");
        assert_eq!(RoundTrips::of(&[]), RoundTrips::default());
    }
}
