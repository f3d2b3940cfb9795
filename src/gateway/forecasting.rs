//! What a migration is forecast to take, from what is known before it and a sample of what its guest writes.
//!
//! The sample takes a second. Copying does not wait for it: the forecast is made while the first round is on its way, from the
//! figures of before.

use std::time::Instant;

use crate::api;
use crate::hypervisor::qemu::{DirtyRate, DirtyRateSample};
use crate::proto::page::ByteRate;
use crate::proto::precopy::{Forecast, ForecastInput};

/// The forecast of one migration, made as soon as the sample is there.
#[derive(Debug)]
pub(crate) struct Forecasting {
    /// All but the dirty rate.
    known: ForecastInput,
    sample: Sample,
}

/// What is known of what the guest writes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Sample {
    /// The hypervisor is at it.
    UnderWay(DirtyRateSample),
    /// It came to this.
    Taken(DirtyRate),
    /// The hypervisor cannot say.
    Unknown,
}

impl Sample {
    /// What the hypervisor measured; it leaves out small guests.
    pub(crate) fn of(rate: DirtyRate) -> Self {
        if rate.sampled_bytes > 0 {
            Self::Taken(rate)
        } else {
            Self::Unknown
        }
    }
}

impl Forecasting {
    pub(crate) fn new(known: ForecastInput, sample: Sample) -> Self {
        Self { known, sample }
    }

    /// The sample the hypervisor should be asked about by now.
    pub(crate) fn due(&self, now: Instant) -> Option<DirtyRateSample> {
        match self.sample {
            Sample::UnderWay(sample) if sample.is_due(now) => Some(sample),
            _ => None,
        }
    }

    /// The sample has been asked for.
    pub(crate) fn set_sample(&mut self, sample: Sample) {
        self.sample = sample;
    }

    /// Seconds of that which are not for disks.
    pub(crate) fn seconds_beside_disks(&self) -> f64 {
        let known = ForecastInput {
            disk_bytes: 0,
            ..self.known
        };
        Self::new(known, self.sample).forecast().total_seconds
    }

    /// The forecast from what is known by now.
    pub(crate) fn forecast(&self) -> api::Forecast {
        let sampled = match self.sample {
            Sample::Taken(rate) => Some(ByteRate(rate.bytes_per_second)),
            Sample::UnderWay(_) | Sample::Unknown => None,
        };
        let dirty_rate = sampled.unwrap_or(ByteRate(0));
        let forecast = Forecast::of(&ForecastInput {
            dirty_rate,
            ..self.known
        });
        let mut reason = match (forecast.reason, self.sample) {
            (Some(reason), _) => reason,
            (None, Sample::Taken(_)) => format!(
                "the guest writes {:.1} MB/s and the link carries more",
                dirty_rate.0 as f64 / 1e6
            ),
            (None, Sample::UnderWay(_)) => {
                "the VM had moved before it was known what the guest writes, which is taken for nothing here".to_owned()
            }
            (None, Sample::Unknown) => {
                "what the guest writes could not be sampled, and is taken for nothing here".to_owned()
            }
        };
        if self.known.disk_bytes > 0 {
            let disk_mib = self.known.disk_bytes >> 20;
            reason += &format!("; {disk_mib} MiB of disks are counted as they are, and come before");
        }
        api::Forecast {
            total_seconds: forecast.total.as_secs_f64(),
            wire_bytes: forecast.wire_bytes,
            downtime_seconds: forecast.downtime.as_secs_f64(),
            dirty_bytes_per_second: dirty_rate.0 as f64,
            dirty_rate_known: sampled.is_some(),
            converges: forecast.converges,
            reason,
        }
    }
}
