//! Several senders at one bottleneck in virtual time: a rate, a drop-tail buffer, random loss before it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::super::*;
use super::{MTU, PACKET};

/// Who sends.
pub(super) enum Sender {
    Probe(Box<ProbeController>),
    /// RFC 9438 without its start-up of HyStart: window in packets, its plateau and when it was cut.
    Cubic {
        window: f64,
        plateau: f64,
        cut: Option<Instant>,
    },
    /// In these times since the beginning.
    Constant {
        rate: ByteRate,
        from: Duration,
        to: Duration,
    },
}

pub(super) struct Flow {
    pub(super) sender: Sender,
    /// Its path is so long there and back.
    pub(super) rtt: Duration,
    /// It has a packet to send only so often, where that is less than it may send.
    pub(super) source: ByteRate,
    pub(super) in_flight: u64,
    pub(super) delivered: u64,
    pub(super) lost: u64,
    latest_rtt: Duration,
    next: Instant,
}

pub(super) struct Bottleneck {
    pub(super) rate: ByteRate,
    pub(super) buffer: Duration,
    pub(super) loss: f64,
    /// Packets that wait longer are marked.
    pub(super) mark_above: Option<Duration>,
    pub(super) flows: Vec<Flow>,
    pub(super) longest_queue: Duration,
    pub(super) now: Instant,
    began: Instant,
    busy_until: Instant,
    random: u64,
    events: BinaryHeap<Reverse<Outcome>>,
    number: u64,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Outcome {
    at: Instant,
    number: u64,
    flow: usize,
    sent: Instant,
    lost: bool,
    marked: bool,
}

impl Sender {
    pub(super) fn probe(rtt: Duration, now: Instant) -> Self {
        Self::Probe(Box::new(ProbeController::new(rtt, MTU, now)))
    }

    pub(super) fn cubic() -> Self {
        Self::Cubic {
            window: 10.0,
            plateau: f64::MAX,
            cut: None,
        }
    }
}

impl Bottleneck {
    pub(super) fn new(rate: ByteRate, buffer: Duration, loss: f64, now: Instant) -> Self {
        Self {
            rate,
            buffer,
            loss,
            mark_above: None,
            flows: Vec::new(),
            longest_queue: Duration::ZERO,
            now,
            began: now,
            busy_until: now,
            random: 0x9e37_79b9_7f4a_7c15,
            events: BinaryHeap::new(),
            number: 0,
        }
    }

    pub(super) fn with(mut self, sender: Sender, rtt: Duration) -> Self {
        self.flows.push(Flow {
            sender,
            rtt,
            source: ByteRate(u64::MAX / 4),
            in_flight: 0,
            delivered: 0,
            lost: 0,
            latest_rtt: rtt,
            next: self.now,
        });
        self
    }

    pub(super) fn probing(&mut self, flow: usize) -> &mut ProbeController {
        match &mut self.flows[flow].sender {
            Sender::Probe(controller) => controller,
            _ => panic!("flow {flow} is another"),
        }
    }

    /// Goes on for `time`; the share of the bottleneck that each flow had of it.
    pub(super) fn run(&mut self, time: Duration) -> Vec<f64> {
        let end = self.now + time;
        let before: Vec<u64> = self.flows.iter().map(|flow| flow.delivered).collect();
        self.longest_queue = Duration::ZERO;
        loop {
            let sending = (0..self.flows.len()).min_by_key(|flow| self.flows[*flow].next);
            let sends_at = sending.map(|flow| self.flows[flow].next);
            let arrives_at = self.events.peek().map(|Reverse(outcome)| outcome.at);
            let Some(at) = [sends_at, arrives_at]
                .into_iter()
                .flatten()
                .min()
                .filter(|at| *at < end)
            else {
                break;
            };
            self.now = self.now.max(at);
            if arrives_at == Some(at) {
                let Reverse(outcome) = self.events.pop().unwrap();
                self.arrive(&outcome);
            } else if let Some(flow) = sending {
                self.send(flow);
            }
        }
        self.now = end;
        let fair = self.rate.bytes_in(time) as f64;
        let shares = self.flows.iter().zip(before);
        shares
            .map(|(flow, before)| (flow.delivered - before) as f64 / fair)
            .collect()
    }

    fn send(&mut self, number: usize) {
        let (now, since, jitter) = (self.now, self.now - self.began, self.chance());
        let flow = &mut self.flows[number];
        let (window, rate) = match &mut flow.sender {
            Sender::Probe(controller) => (controller.window(), controller.rate()),
            Sender::Cubic { window, .. } => {
                let window = (*window * f64::from(MTU)) as u64;
                let srtt = flow.latest_rtt.as_secs_f64().max(1e-6);
                (window, ByteRate((window as f64 * 1.25 / srtt) as u64))
            }
            Sender::Constant { rate, from, to } => (if (*from..*to).contains(&since) { u64::MAX } else { 0 }, *rate),
        };
        // Else drop-tail takes every packet of one flow and none of the other, as it never does outside of a simulation.
        let apart = rate.min(flow.source).time_for(PACKET).min(Duration::from_secs(1));
        flow.next = now + apart.mul_f64(0.5 + jitter).max(Duration::from_nanos(1));
        if flow.in_flight + u64::from(MTU) > window {
            flow.next = flow.next.max(now + Duration::from_micros(100));
            return;
        }
        if let Sender::Probe(controller) = &mut flow.sender {
            controller.on_sent(now);
        }
        flow.in_flight += u64::from(MTU);
        let rtt = flow.rtt;
        let chance = self.chance();
        let starts = self.busy_until.max(now);
        let lost = chance < self.loss || starts - now > self.buffer;
        if !lost {
            self.busy_until = starts + self.rate.time_for(PACKET);
        }
        self.longest_queue = self.longest_queue.max(self.busy_until - now.min(self.busy_until));
        self.number += 1;
        self.events.push(Reverse(Outcome {
            at: starts + self.rate.time_for(PACKET) + rtt,
            number: self.number,
            flow: number,
            sent: now,
            lost,
            marked: self.mark_above.is_some_and(|above| starts - now > above),
        }));
    }

    fn chance(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// An acknowledgement, or what shows a loss, is back at the sender.
    fn arrive(&mut self, outcome: &Outcome) {
        let (now, sent, bytes) = (self.now, outcome.sent, u64::from(MTU));
        let flow = &mut self.flows[outcome.flow];
        flow.in_flight -= bytes;
        let limited = flow.source.0 < u64::MAX / 4;
        if outcome.lost {
            flow.lost += PACKET;
        } else {
            flow.delivered += PACKET;
            flow.latest_rtt = now - sent;
        }
        let trip = RoundTrip { sent, now };
        match &mut flow.sender {
            Sender::Probe(controller) => {
                if outcome.lost {
                    controller.on_loss(trip, bytes);
                } else {
                    controller.on_ack(trip, bytes);
                    let limited = limited && controller.rate() > flow.source;
                    controller.on_end_acks(now, flow.in_flight, limited);
                    if outcome.marked {
                        controller.on_ecn(trip);
                    }
                }
            }
            Sender::Cubic { window, plateau, cut } => {
                if outcome.lost {
                    if cut.is_none_or(|cut| sent >= cut) {
                        *plateau = *window;
                        *window = (*window * 0.7).max(2.0);
                        *cut = Some(now);
                    }
                } else if let Some(cut) = cut {
                    let rtt = (now - sent).as_secs_f64();
                    let time = (now - *cut).as_secs_f64() + rtt;
                    let target = 0.4 * (time - (*plateau * 0.3 / 0.4).cbrt()).powi(3) + *plateau;
                    // As Reno would, where that is more.
                    let reno = *plateau * 0.7 + 0.53 * time / rtt;
                    let target = target.max(reno).min(*window * 1.5);
                    *window += ((target - *window) / *window).max(0.0);
                } else {
                    *window += 1.0;
                }
            }
            Sender::Constant { .. } => {}
        }
    }
}
