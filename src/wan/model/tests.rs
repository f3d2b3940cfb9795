use super::*;

const MS: Duration = Duration::from_millis(1);

/// 150 ms RTT, 1 Gbit/s, 50 ms of queue: 6.25 MB.
pub(in crate::wan) fn settings() -> LinkSettings {
    LinkSettings {
        one_way_delay: 75 * MS,
        rate: ByteRate::from_bits_per_second(1_000_000_000),
        queue_bytes: 6_250_000,
        overhead_bytes: ETHERNET_OVERHEAD,
        mtu_bytes: 1500,
        loss: Loss::None,
        lost: Ordinals::default(),
        jitter: None,
        reordering: None,
        duplication: Probability::NEVER,
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "an Instant has no other source; the tests only add to it"
)]
fn start() -> Instant {
    Instant::now()
}

fn delivery(fate: Fate) -> Instant {
    match fate.verdict {
        Verdict::Deliver { at } => at,
        other => panic!("not delivered in order: {other:?}"),
    }
}

fn chance(value: f64) -> Probability {
    Probability::new(value).expect("a probability")
}

fn passes(fate: Fate) -> bool {
    matches!(fate.verdict, Verdict::Deliver { .. })
}

fn dropped(cause: DropCause) -> Fate {
    Fate {
        verdict: Verdict::Drop(cause),
        copy: None,
    }
}

#[test]
fn a_lone_datagram_takes_its_line_time_and_the_delay() {
    let begin = start();
    let mut link = LinkModel::new(settings(), 1, 0, begin);
    // 1250 bytes with the overhead are 10 microseconds at 1 Gbit/s.
    let at = delivery(link.offer(begin, 1250 - ETHERNET_OVERHEAD));
    assert_eq!(at - begin, 75 * MS + Duration::from_micros(10));
}

#[test]
fn the_rate_is_exact_to_a_nanosecond_after_a_hundred_thousand_datagrams() {
    let begin = start();
    for bits in [1_000_000_000, 999_999_937, 50_000_000, 9_999_999_991_u64] {
        let rate = ByteRate(bits / 8);
        let mut link = LinkModel::new(
            LinkSettings {
                rate,
                queue_bytes: 1 << 30,
                ..settings()
            },
            1,
            0,
            begin,
        );
        let count = 100_000_u64;
        let mut last = begin;
        for index in 0..count {
            // Offered as soon as there is room, so the bottleneck never idles.
            let now = (last.max(begin + 75 * MS) - 75 * MS).max(begin);
            last = delivery(link.offer(now, if index % 2 == 0 { 52 } else { 1500 }));
        }
        let bytes = count / 2 * u64::from(52 + 1500 + 2 * ETHERNET_OVERHEAD);
        let exact = Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate.0)) as u64);
        let off = (last - begin).abs_diff(exact + 75 * MS);
        assert!(off <= Duration::from_nanos(1), "{bits} bit/s is off by {off:?}");
    }
}

#[test]
fn a_busy_bottleneck_carries_the_remainder_of_every_division() {
    let begin = start();
    // 7 bytes per second: each byte takes 142857142.857... nanoseconds.
    let settings = LinkSettings {
        rate: ByteRate(7),
        queue_bytes: 70_000,
        overhead_bytes: 0,
        ..settings()
    };
    let mut link = LinkModel::new(settings, 1, 0, begin);
    let last = (0..70).map(|_| delivery(link.offer(begin, 1))).last().expect("seventy");
    assert_eq!(last - begin, Duration::from_secs(10) + 75 * MS);
}

#[test]
fn the_queue_holds_its_bytes_and_not_one_datagram_more() {
    let begin = start();
    let mut link = LinkModel::new(settings(), 1, 0, begin);
    // 6 250 000 bytes of queue are 4128 full datagrams of 1514 bytes, and 208 bytes that hold no other.
    let mut accepted = 0;
    while passes(link.offer(begin, 1500)) {
        accepted += 1;
    }
    assert_eq!(accepted, 4128);
    assert_eq!(link.queued_bytes(begin), 4128 * 1514);
    assert_eq!(link.offer(begin, 1500), dropped(DropCause::Queue));
    assert!(passes(link.offer(begin, 208 - ETHERNET_OVERHEAD)));
    assert_eq!(link.offer(begin, 1), dropped(DropCause::Queue));
    // One line time later there is room for exactly one.
    let later = begin + Duration::from_nanos(1514 * 8);
    assert!(passes(link.offer(later, 1500)));
    assert_eq!(link.offer(later, 1500), dropped(DropCause::Queue));
}

#[test]
fn a_full_queue_adds_its_depth_to_the_delay() {
    let begin = start();
    let mut link = LinkModel::new(settings(), 1, 0, begin);
    let mut last = begin;
    while let Verdict::Deliver { at } = link.offer(begin, 1500).verdict {
        last = at;
    }
    let waited = last - begin - 75 * MS;
    assert!(waited <= 50 * MS && waited > 49 * MS, "{waited:?}");
}

#[test]
fn a_datagram_of_the_mtu_passes_and_one_byte_more_does_not() {
    let begin = start();
    let mut link = LinkModel::new(settings(), 1, 0, begin);
    assert!(passes(link.offer(begin, 1500)));
    assert_eq!(link.offer(begin, 1501), dropped(DropCause::Mtu));
}

#[test]
fn a_cut_takes_what_enters_in_its_window_and_nothing_else() {
    let begin = start();
    let mut link = LinkModel::new(settings(), 1, 0, begin);
    link.cut(begin + 10 * MS, 20 * MS);
    let fate = |link: &mut LinkModel, ms: u32| passes(link.offer(begin + ms * MS, 100));
    assert!(fate(&mut link, 9));
    assert!(!fate(&mut link, 10));
    assert!(!fate(&mut link, 29));
    assert!(fate(&mut link, 30));
    link.cut(begin + 40 * MS, Duration::from_secs(3600));
    link.restore();
    assert!(fate(&mut link, 41));
}

#[test]
fn loss_takes_no_time_at_the_bottleneck() {
    let begin = start();
    let mut link = LinkModel::new(
        LinkSettings {
            loss: Loss::Bernoulli(Probability::ALWAYS),
            ..settings()
        },
        1,
        0,
        begin,
    );
    assert_eq!(link.offer(begin, 1500), dropped(DropCause::Loss));
    assert_eq!(link.queued_bytes(begin), 0);
}

#[test]
fn order_is_kept_under_jitter_and_when_the_delay_falls() {
    let begin = start();
    let jitter = Some(Jitter {
        deviation: 5 * MS,
        correlation_time: 20 * MS,
    });
    let mut link = LinkModel::new(LinkSettings { jitter, ..settings() }, 9, 0, begin);
    let mut last = begin;
    for index in 0..100_000_u32 {
        let now = begin + index * Duration::from_micros(20);
        if index == 50_000 {
            link.change(LinkSettings {
                one_way_delay: MS,
                ..link.settings().clone()
            });
        }
        let at = delivery(link.offer(now, 100));
        assert!(at >= last && at >= now);
        last = at;
    }
    assert!(
        last - begin < Duration::from_secs(2) + 40 * MS,
        "the shorter delay is in force"
    );
}

#[test]
fn jitter_has_the_asked_mean_and_deviation() {
    let begin = start();
    let jitter = Some(Jitter {
        deviation: 3 * MS,
        correlation_time: 20 * MS,
    });
    let mut link = LinkModel::new(LinkSettings { jitter, ..settings() }, 10, 0, begin);
    let (mut sum, mut squares) = (0.0, 0.0);
    let count = 20_000;
    for index in 0..count {
        // 200 ms apart: ten correlation times, so the samples are independent and none waits for the one before.
        let now = begin + index * 200 * MS;
        let ms = (delivery(link.offer(now, 100)) - now).as_secs_f64() * 1000.0;
        sum += ms;
        squares += ms * ms;
    }
    let mean = sum / f64::from(count);
    let deviation = (squares / f64::from(count) - mean * mean).sqrt();
    assert!((mean - 75.0).abs() < 0.1, "{mean}");
    assert!((deviation - 3.0).abs() < 0.1, "{deviation}");
}

#[test]
fn one_seed_gives_the_same_verdicts_and_the_directions_differ() {
    let begin = start();
    let fates = |seed, stream| {
        let loss = Loss::Bernoulli(chance(0.5));
        let mut link = LinkModel::new(LinkSettings { loss, ..settings() }, seed, stream, begin);
        (0..64).map(|_| link.offer(begin, 100)).collect::<Vec<_>>()
    };
    assert_eq!(fates(5, 0), fates(5, 0));
    assert_ne!(fates(5, 0), fates(5, 1));
    assert_ne!(fates(5, 0), fates(6, 0));
}

#[test]
fn a_rate_step_takes_hold_for_the_next_datagram() {
    let begin = start();
    let mut link = LinkModel::new(settings(), 1, 0, begin);
    link.change(LinkSettings {
        rate: ByteRate::from_bits_per_second(10_000_000),
        ..settings()
    });
    let at = delivery(link.offer(begin, 1250 - ETHERNET_OVERHEAD));
    assert_eq!(at - begin, 76 * MS);
}

#[test]
fn the_share_that_overtakes_arrives_its_lead_earlier_and_the_others_keep_their_order() {
    let begin = start();
    let reordering = Some(Reordering {
        share: chance(0.1),
        lead: 2 * MS,
    });
    let mut link = LinkModel::new(
        LinkSettings {
            reordering,
            ..settings()
        },
        11,
        0,
        begin,
    );
    let line_time = Duration::from_nanos(1514 * 8);
    let (mut overtaking, mut last, mut last_overtaking) = (0, begin, begin);
    for index in 0..100_000_u32 {
        let now = begin + index * Duration::from_micros(20);
        match link.offer(now, 1500).verdict {
            Verdict::Deliver { at } => {
                assert_eq!(at - now, 75 * MS + line_time);
                assert!(at >= last);
                last = at;
            }
            Verdict::Overtake { at } => {
                assert_eq!(at - now, 73 * MS + line_time);
                assert!(at >= last_overtaking);
                last_overtaking = at;
                overtaking += 1;
            }
            Verdict::Drop(cause) => panic!("dropped: {cause:?}"),
        }
    }
    // Binomial: deviation 95.
    assert!((9_620..=10_380).contains(&overtaking), "{overtaking}");
}

#[test]
fn a_lead_beyond_the_delay_is_no_delay_and_never_a_time_before_the_bottleneck() {
    let begin = start();
    let reordering = Some(Reordering {
        share: Probability::ALWAYS,
        lead: Duration::MAX,
    });
    let mut link = LinkModel::new(
        LinkSettings {
            reordering,
            ..settings()
        },
        1,
        0,
        begin,
    );
    let at = begin + Duration::from_nanos(1514 * 8);
    assert_eq!(link.offer(begin, 1500).verdict, Verdict::Overtake { at });
}

#[test]
fn a_copy_passes_the_bottleneck_right_behind_its_datagram() {
    let begin = start();
    let duplication = Probability::ALWAYS;
    let mut link = LinkModel::new(
        LinkSettings {
            duplication,
            ..settings()
        },
        1,
        0,
        begin,
    );
    let line_time = Duration::from_nanos(1514 * 8);
    let first = begin + 75 * MS + line_time;
    assert_eq!(
        link.offer(begin, 1500),
        Fate {
            verdict: Verdict::Deliver { at: first },
            copy: Some(Verdict::Deliver { at: first + line_time })
        }
    );
    assert_eq!(link.queued_bytes(begin), 2 * 1514);
}

#[test]
fn a_share_of_those_that_pass_is_doubled_and_no_lost_one_is() {
    let begin = start();
    let settings = LinkSettings {
        loss: Loss::Bernoulli(chance(0.5)),
        duplication: chance(0.02),
        ..settings()
    };
    let mut link = LinkModel::new(settings, 12, 0, begin);
    let (mut passed, mut copies) = (0_u32, 0_u32);
    for index in 0..200_000_u32 {
        let fate = link.offer(begin + index * Duration::from_micros(30), 1500);
        passed += u32::from(passes(fate));
        copies += u32::from(fate.copy.is_some());
        assert!(passes(fate) || fate.copy.is_none());
    }
    // 2 % of 100 000: deviation 44, and that of `passed` adds 4.
    assert!((99_100..=100_900).contains(&passed), "{passed}");
    assert!((1_820..=2_180).contains(&copies), "{copies}");
}

#[test]
fn reordering_and_copies_do_not_change_which_datagrams_are_lost() {
    let begin = start();
    let plain = LinkSettings {
        loss: Loss::Bernoulli(chance(0.1)),
        ..settings()
    };
    let lost = |settings: &LinkSettings| -> Vec<u32> {
        let mut link = LinkModel::new(settings.clone(), 13, 0, begin);
        let mut is_lost = |index: &u32| {
            let now = begin + *index * Duration::from_micros(40);
            link.offer(now, 1500) == dropped(DropCause::Loss)
        };
        (0..5_000).filter(|index| is_lost(index)).collect()
    };
    let busy = LinkSettings {
        duplication: chance(0.3),
        reordering: Some(Reordering {
            share: chance(0.3),
            lead: MS,
        }),
        ..plain.clone()
    };
    assert!(lost(&plain).len() > 400);
    assert_eq!(lost(&plain), lost(&busy));
}

#[test]
fn a_script_loses_the_numbers_it_names_and_no_other() {
    let begin = start();
    let lost = "2, 5-7".parse().expect("numbers");
    let mut link = LinkModel::new(LinkSettings { lost, ..settings() }, 1, 0, begin);
    let gone: Vec<u32> = (1..=10)
        .filter(|_| link.offer(begin, 100) == dropped(DropCause::Script))
        .collect();
    assert_eq!(gone, [2, 5, 6, 7]);
}

#[test]
fn a_burst_loses_the_next_datagrams_and_the_one_behind_them_passes() {
    let begin = start();
    let mut link = LinkModel::new(settings(), 1, 0, begin);
    assert!(passes(link.offer(begin, 100)));
    link.lose(3);
    let fates: Vec<bool> = (0..5).map(|_| passes(link.offer(begin, 100))).collect();
    assert_eq!(fates, [false, false, false, true, true]);
}

#[test]
fn settings_survive_json() {
    let all = LinkSettings {
        loss: Loss::Bernoulli(chance(0.1)),
        lost: "3-4".parse().expect("numbers"),
        jitter: Some(Jitter {
            deviation: MS,
            correlation_time: 200 * MS,
        }),
        reordering: Some(Reordering {
            share: chance(0.01),
            lead: Duration::MAX,
        }),
        duplication: chance(0.001),
        ..settings()
    };
    let json = serde_json::to_string(&all).expect("plain data");
    assert_eq!(serde_json::from_str::<LinkSettings>(&json).expect("the same"), all);
}
