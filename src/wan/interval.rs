//! Which counts a link may show that does what it is asked: the central 99.9 % of their distribution.

use super::loss::{GilbertElliott, Loss};
use super::random::Probability;

/// How many of `sent` datagrams may be lost.
///
/// Losses in bursts are not independent, so the binomial interval would be far too narrow: bursts of five triple the
/// spread. Where few are expected the distribution is skewed as well, and is computed exactly, datagram by datagram; beyond
/// that it is the normal one, with the variance of the process.
pub(super) fn losses(loss: &Loss, sent: u64) -> (f64, f64) {
    match loss {
        Loss::None => (0.0, 0.0),
        Loss::Bernoulli(chance) => binomial(sent, chance.value()),
        Loss::GilbertElliott(model) => bursts(model, loss.mean(), sent),
    }
}

/// How many of `count` may be hit that are each hit with `chance`, independently. Exact where few are expected, and by its
/// normal form beyond.
pub(super) fn binomial(count: u64, chance: f64) -> (f64, f64) {
    let count = count as f64;
    let mean = count * chance;
    if mean > 500.0 || chance >= 0.5 {
        let spread = SIGMAS * (mean * (1.0 - chance)).sqrt();
        return ((mean - spread).max(0.0), (mean + spread).min(count));
    }
    let mut probability = (count * (-chance).ln_1p()).exp();
    let (mut hits, mut sum, mut least) = (0.0, probability, None);
    loop {
        if least.is_none() && sum > TAIL {
            least = Some(hits);
        }
        if sum >= 1.0 - TAIL || hits >= count {
            return (least.unwrap_or(hits), hits);
        }
        probability *= (count - hits) / (hits + 1.0) * chance / (1.0 - chance);
        hits += 1.0;
        sum += probability;
    }
}

/// The chance that a lost datagram is followed by a lost one, where the model has a simple one. Runs of lost datagrams are
/// then 1 / (1 - chance) long on average.
pub(super) fn goes_on(loss: &Loss) -> Option<f64> {
    match loss {
        Loss::None => None,
        Loss::Bernoulli(chance) => Some(chance.value()),
        Loss::GilbertElliott(model)
            if model.loss_in_bad == Probability::ALWAYS && model.loss_in_good == Probability::NEVER =>
        {
            Some(1.0 - model.to_good.value())
        }
        Loss::GilbertElliott(_) => None,
    }
}

/// How long the runs of `lost` datagrams may be on average, each of which is followed by a lost one with `goes_on`.
pub(super) fn mean_run(lost: u64, goes_on: f64) -> (f64, f64) {
    let (least, most) = binomial(lost, goes_on);
    let run = |followed: f64| lost as f64 / (lost as f64 - followed).max(1.0);
    (run(least), run(most))
}

/// The variance of the number of losses is n m (1 - m) + 2 n b (1 - b) d^2 l / (1 - l): the binomial's, and the covariances
/// of all pairs. m is the mean loss, b the share of the bad state, d the difference between the losses of both states, and
/// l = 1 - p - r how much of the state is left one datagram later.
fn bursts(model: &GilbertElliott, mean: f64, sent: u64) -> (f64, f64) {
    let count = sent as f64;
    let memory = 1.0 - model.to_bad.value() - model.to_good.value();
    let bad = model.share_of_bad();
    let difference = model.loss_in_bad.value() - model.loss_in_good.value();
    let covariances = 2.0 * bad * (1.0 - bad) * difference.powi(2) * memory / (1.0 - memory);
    let variance = count * (mean * (1.0 - mean) + covariances);
    let expected = count * mean;
    let most = expected + EXACT_SIGMAS * variance.sqrt() + 50.0;
    if most * count <= EXACT_STEPS {
        return exact_bursts(model, sent, most as usize);
    }
    let spread = SIGMAS * variance.sqrt();
    ((expected - spread).max(0.0), (expected + spread).min(count))
}

/// The distribution itself: how probable are k losses and either state, after each datagram. `most` losses hold nearly all
/// of it.
fn exact_bursts(model: &GilbertElliott, sent: u64, most: usize) -> (f64, f64) {
    let [to_bad, to_good] = [model.to_bad.value(), model.to_good.value()];
    let [lost_good, lost_bad] = [model.loss_in_good.value(), model.loss_in_bad.value()];
    let (mut good, mut bad) = (vec![0.0; most + 1], vec![0.0; most + 1]);
    // The check does not know in which state the link is.
    (good[0], bad[0]) = (1.0 - model.share_of_bad(), model.share_of_bad());
    for _ in 0..sent {
        // Of the states before this datagram, with one loss less.
        let (mut good_before, mut bad_before) = (0.0, 0.0);
        for (good, bad) in good.iter_mut().zip(&mut bad) {
            let in_good = *good * (1.0 - lost_good) + good_before * lost_good;
            let in_bad = *bad * (1.0 - lost_bad) + bad_before * lost_bad;
            (good_before, bad_before) = (*good, *bad);
            *good = in_good * (1.0 - to_bad) + in_bad * to_good;
            *bad = in_bad * (1.0 - to_good) + in_good * to_bad;
        }
    }
    let (mut sum, mut least) = (0.0, None);
    for (losses, (good, bad)) in good.iter().zip(&bad).enumerate() {
        sum += good + bad;
        if least.is_none() && sum > TAIL {
            least = Some(losses as f64);
        }
        if sum >= 1.0 - TAIL {
            return (least.unwrap_or(0.0), losses as f64);
        }
    }
    (least.unwrap_or(0.0), most as f64)
}

/// Two-sided 99.9 % of the normal distribution.
const SIGMAS: f64 = 3.29;
const TAIL: f64 = 0.0005;
/// Beyond them lies less than a millionth also of a skewed distribution of some ten bursts.
const EXACT_SIGMAS: f64 = 10.0;
/// About half a second.
const EXACT_STEPS: f64 = 4e8;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wan::loss::LossProcess;
    use crate::wan::random::Random;

    fn chance(value: f64) -> Probability {
        Probability::new(value).expect("a probability")
    }

    fn model(p: f64, r: f64, in_bad: f64, in_good: f64) -> GilbertElliott {
        GilbertElliott {
            to_bad: chance(p),
            to_good: chance(r),
            loss_in_bad: chance(in_bad),
            loss_in_good: chance(in_good),
        }
    }

    #[test]
    fn the_interval_of_a_rare_loss_is_the_exact_binomial_one() {
        // Poisson with mean 14.8: P(X <= 3) = 0.0003, P(X <= 4) = 0.0011; P(X > 29) = 0.0004, P(X > 28) = 0.0008.
        assert_eq!(binomial(148_000, 0.0001), (4.0, 29.0));
        assert_eq!(binomial(100, 0.0), (0.0, 0.0));
        assert_eq!(losses(&Loss::None, 1000), (0.0, 0.0));
    }

    #[test]
    fn both_forms_of_the_interval_agree_where_they_meet() {
        let (low, high) = binomial(499_000, 0.001);
        let spread = SIGMAS * (499.0_f64 * 0.999).sqrt();
        assert!(
            (low - (499.0 - spread)).abs() < 3.0 && (high - (499.0 + spread)).abs() < 3.0,
            "{low} to {high}"
        );
    }

    #[test]
    fn a_process_without_memory_has_the_binomial_interval() {
        // p + r = 1: the state says nothing about the next one.
        let model = model(0.01, 0.99, 1.0, 0.0);
        let (low, high) = exact_bursts(&model, 20_000, 500);
        assert_eq!(binomial(20_000, 0.01), (low, high));
    }

    #[test]
    fn bursts_widen_the_interval_and_skew_it() {
        let bursty = Loss::GilbertElliott(model(0.000_2, 0.2, 1.0, 0.0));
        let (low, high) = losses(&bursty, 150_000);
        let (flat_low, flat_high) = binomial(150_000, bursty.mean());
        assert!((high - low) / (flat_high - flat_low) > 2.7, "{low} to {high}");
        let expected = 150_000.0 * bursty.mean();
        assert!(
            high - expected > 1.2 * (expected - low),
            "{low} to {high} about {expected}"
        );
        assert_eq!(goes_on(&bursty), Some(0.8));
    }

    #[test]
    fn few_losses_may_be_neighbours_by_chance_and_many_may_not() {
        // Of seven losses at 0.1 % two are neighbours in 0.7 % of all cases, of which three are beyond 0.05 %.
        assert_eq!(mean_run(7, 0.001), (1.0, 7.0 / 6.0));
        let (least, most) = mean_run(100_000, 0.001);
        assert!(least > 1.0 && most < 1.0015, "{least} to {most}");
        let (least, most) = mean_run(150, 0.8);
        assert!(least < 3.6 && most > 7.5, "thirty bursts: {least} to {most}");
    }

    #[test]
    fn the_exact_interval_and_the_normal_one_agree_where_there_are_many_bursts() {
        for model in [model(0.01, 0.1, 1.0, 0.0), model(0.02, 0.1, 0.5, 0.01)] {
            let mean = Loss::GilbertElliott(model).mean();
            let (low, high) = exact_bursts(&model, 40_000, 8_000);
            // Beyond what is computed exactly.
            let (far_low, far_high) = bursts(&model, mean, 4_000_000);
            let spread = |low: f64, high: f64| high - low;
            let scaled = spread(far_low, far_high) / 100.0_f64.sqrt();
            assert!(
                (spread(low, high) / scaled - 1.0).abs() < 0.03,
                "{low} to {high}, {scaled}"
            );
        }
    }

    #[test]
    fn the_interval_holds_nearly_all_runs_of_the_process_and_not_all_the_more() {
        let loss = Loss::GilbertElliott(model(0.001, 0.2, 0.9, 0.0));
        let (low, high) = losses(&loss, 20_000);
        let mut outside = 0;
        for seed in 0..2_000 {
            let mut process = LossProcess::new(loss, Random::new(seed, 0));
            let lost = (0..20_000).filter(|_| process.loses()).count() as f64;
            outside += u32::from(!(low..=high).contains(&lost));
        }
        // Two expected; ten are beyond all chance, and an interval of 99 % would show about twenty.
        assert!(outside < 10, "{outside} of 2000 outside {low} to {high}");
        let narrower = binomial(20_000, loss.mean());
        assert!(narrower.0 > low && narrower.1 < high);
    }
}
