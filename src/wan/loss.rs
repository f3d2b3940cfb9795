//! Which datagrams the link loses: each on its own (Bernoulli), or in bursts (Gilbert-Elliott, as `tc netem` does it).

use serde::{Deserialize, Serialize};

use super::random::{Probability, Random};

/// How datagrams are lost.
#[derive(Clone, Copy, Debug, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// None is.
    #[default]
    None,
    /// Each with the same probability, independent of the others.
    Bernoulli(Probability),
    /// In bursts.
    GilbertElliott(GilbertElliott),
}

/// Two states, good and bad, with a loss probability each. A datagram draws its fate in the state it finds; the state
/// changes at each datagram. `tc netem loss gemodel p r 1-h 1-k` (Salsano, Ludovici and Ordine, 2009).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GilbertElliott {
    /// From good to bad, per datagram: `p`.
    pub to_bad: Probability,
    /// From bad to good, per datagram: `r`. Bursts last 1 / r datagrams on average.
    pub to_good: Probability,
    /// A datagram in the bad state is lost: `1-h`.
    pub loss_in_bad: Probability,
    /// A datagram in the good state is lost: `1-k`.
    pub loss_in_good: Probability,
}

impl Loss {
    /// The share of datagrams lost in the long run, 0 to 1.
    #[must_use]
    pub fn mean(&self) -> f64 {
        match self {
            Self::None => 0.0,
            Self::Bernoulli(chance) => chance.value(),
            Self::GilbertElliott(model) => {
                let bad = model.share_of_bad();
                bad * model.loss_in_bad.value() + (1.0 - bad) * model.loss_in_good.value()
            }
        }
    }
}

impl GilbertElliott {
    /// The share of datagrams that find the bad state: p / (p + r), 0 to 1.
    #[must_use]
    pub fn share_of_bad(&self) -> f64 {
        let (to_bad, to_good) = (self.to_bad.value(), self.to_good.value());
        if to_bad + to_good == 0.0 {
            0.0
        } else {
            to_bad / (to_bad + to_good)
        }
    }
}

/// A loss model at work: its state and its random numbers.
#[derive(Clone, Debug)]
pub(super) struct LossProcess {
    model: Loss,
    bad: bool,
    random: Random,
}

impl LossProcess {
    pub(super) fn new(model: Loss, random: Random) -> Self {
        Self {
            model,
            bad: false,
            random,
        }
    }

    /// Draws the fate of the next datagram: true when it is lost.
    pub(super) fn loses(&mut self) -> bool {
        match &self.model {
            Loss::None => false,
            Loss::Bernoulli(chance) => self.random.hit(*chance),
            Loss::GilbertElliott(model) => {
                let (change, fate) = match self.bad {
                    true => (model.to_good, model.loss_in_bad),
                    false => (model.to_bad, model.loss_in_good),
                };
                self.bad ^= self.random.hit(change);
                self.random.hit(fate)
            }
        }
    }

    /// Goes on with another model, in its good state, and the same random numbers.
    pub(super) fn change(&mut self, model: Loss) {
        self.model = model;
        self.bad = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chance(percent: f64) -> Probability {
        Probability::new(percent / 100.0).expect("a percentage")
    }

    fn fates(model: Loss, seed: u64, count: usize) -> Vec<bool> {
        let mut process = LossProcess::new(model, Random::new(seed, 0));
        (0..count).map(|_| process.loses()).collect()
    }

    fn share(fates: &[bool]) -> f64 {
        fates.iter().filter(|lost| **lost).count() as f64 / fates.len() as f64
    }

    fn mean_run(fates: &[bool]) -> f64 {
        let runs = fates.windows(2).filter(|pair| pair[1] && !pair[0]).count() + usize::from(fates[0]);
        fates.iter().filter(|lost| **lost).count() as f64 / runs as f64
    }

    #[test]
    fn bernoulli_loss_stays_within_four_sigma_of_its_binomial() {
        let count = 1_000_000;
        for (percent, seed) in [(0.01, 1), (0.1, 2), (1.0, 3), (10.0, 4), (50.0, 5)] {
            let p = percent / 100.0;
            let sigma = (p * (1.0 - p) / count as f64).sqrt();
            let seen = share(&fates(Loss::Bernoulli(chance(percent)), seed, count));
            assert!((seen - p).abs() < 4.0 * sigma, "{percent} % asked, {seen} seen");
        }
    }

    #[test]
    fn bernoulli_losses_do_not_come_in_bursts() {
        let run = mean_run(&fates(Loss::Bernoulli(chance(1.0)), 6, 1_000_000));
        assert!((1.0..1.04).contains(&run), "1 / (1 - p) = 1.01 expected, {run} seen");
    }

    #[test]
    fn gilbert_elliott_loses_in_bursts_of_one_over_r() {
        let model = GilbertElliott {
            to_bad: chance(0.1),
            to_good: chance(20.0),
            loss_in_bad: Probability::ALWAYS,
            loss_in_good: Probability::NEVER,
        };
        let loss = Loss::GilbertElliott(model);
        let fates = fates(loss, 7, 4_000_000);
        // 0.4975 % in bursts of 5: about 4000 bursts, so 4 sigma are 6.3 % of the burst length and 8.5 % of the share.
        assert!((loss.mean() - 0.001 / 0.201).abs() < 1e-12);
        assert!((share(&fates) / loss.mean() - 1.0).abs() < 0.085, "{}", share(&fates));
        assert!((mean_run(&fates) / 5.0 - 1.0).abs() < 0.063, "{}", mean_run(&fates));
    }

    #[test]
    fn gilbert_elliott_honours_the_loss_of_both_states() {
        let model = Loss::GilbertElliott(GilbertElliott {
            to_bad: chance(5.0),
            to_good: chance(15.0),
            loss_in_bad: chance(40.0),
            loss_in_good: chance(2.0),
        });
        let seen = share(&fates(model, 8, 2_000_000));
        assert!((model.mean() - 0.115).abs() < 1e-12);
        assert!((seen / 0.115 - 1.0).abs() < 0.02, "{seen}");
    }
}
