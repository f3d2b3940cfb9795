//! What was found: for programs as JSON, for people as tables.

use std::fmt;
use std::path::Path;

use serde::Serialize;

use super::course::Course;
use super::{DiskPassArgs, Format};
use crate::lab::link::Carried;
use crate::lab::record::Ends;
use crate::lab::table::{Table, median, megabytes, or_dash, seconds};
use crate::lab::usage::Usage;

/// Everything that one run found.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    /// The link.
    pub(super) profile: String,
    pub(super) disk_bytes: u64,
    /// Of the image at the destination.
    pub(super) format: Format,
    pub(super) seed: u64,
    pub(super) passes: Vec<Pass>,
    pub(super) kills: Vec<Kill>,
    pub(super) on_base: Vec<OnBase>,
    pub(super) cold: Vec<Cold>,
    /// Why the run ended early; absent where it did not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
}

/// Who copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum By {
    Gateways,
    Mirror,
}

/// The whole disk once.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Pass {
    pub(super) by: By,
    pub(super) repetition: u32,
    /// From its beginning until everything is durable at the destination.
    pub(super) seconds: f64,
    /// Bytes of the disk, over the whole pass.
    pub(super) bytes_per_second: f64,
    /// The same from a fifth to four fifths of them.
    pub(super) middle_bytes_per_second: Option<f64>,
    /// Payload of a link test by the same gateways on the same link, just before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_test_bytes_per_second: Option<f64>,
    /// IP bytes to the destination.
    pub(super) forward_bytes: u64,
    /// IP bytes to the source.
    pub(super) backward_bytes: u64,
    /// Of gateways and QEMUs; not of the link's emulator.
    pub(super) cpu_seconds: Ends<f64>,
    /// Share of its time for which the process that waited most waited for a CPU that others had.
    pub(super) waited_share: Option<f64>,
    /// What differs between both images; absent where they are equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) difference: Option<String>,
    /// Why the link was not what its profile says; absent where it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_fault: Option<String>,
}

/// A disk whose base image the destination has.
#[derive(Clone, Debug, Serialize)]
pub(super) struct OnBase {
    pub(super) repetition: u32,
    pub(super) disk_bytes: u64,
    /// Of blocks of 4 KiB that are otherwise than in the base.
    pub(super) changed_bytes: u64,
    pub(super) seconds: f64,
    /// IP bytes to the destination, until everything is durable there.
    pub(super) forward_bytes: u64,
    /// IP bytes to the source: digests of what the destination has, and acknowledgements.
    pub(super) backward_bytes: u64,
    /// Bytes of frames with what is on the disk.
    pub(super) frame_bytes: u64,
    /// Bytes that did not cross.
    pub(super) same_bytes: u64,
    /// What the image at the destination takes beside its base.
    pub(super) image_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) difference: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_fault: Option<String>,
}

/// A pass during which a gateway was killed.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Kill {
    /// Whose.
    pub(super) gateway: &'static str,
    /// Since the pass began.
    pub(super) at_seconds: f64,
    /// Until there was a gateway again.
    pub(super) away_seconds: f64,
    /// Of the disk, before the kill.
    pub(super) read_bytes: u64,
    pub(super) disk_bytes: u64,
    /// Migrations that began in the place of an undone one.
    pub(super) begun_again: usize,
    /// IP bytes to the destination, of all attempts.
    pub(super) forward_bytes: u64,
    /// IP bytes to the source.
    pub(super) backward_bytes: u64,
    /// What `forward_bytes` is above that of a pass that nobody disturbed.
    pub(super) sent_twice_bytes: u64,
    /// What the last attempt read and did not send.
    pub(super) same_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) difference: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_fault: Option<String>,
}

/// A VM that was off, and whose disk became another format.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cold {
    /// Format at the source.
    pub(super) from: &'static str,
    /// Format at the destination.
    pub(super) to: &'static str,
    pub(super) disk_bytes: u64,
    /// Of the disk, which is zero but for these.
    pub(super) used_bytes: u64,
    /// From the request to the end.
    pub(super) seconds: f64,
    /// Of what is in use, over all of that.
    pub(super) bytes_per_second: f64,
    /// As in [`Pass`].
    pub(super) link_test_bytes_per_second: f64,
    /// IP bytes to the destination.
    pub(super) forward_bytes: u64,
    /// IP bytes to the source.
    pub(super) backward_bytes: u64,
    /// What the image at the destination takes.
    pub(super) image_bytes: u64,
    /// As in [`Pass`].
    pub(super) cpu_seconds: Ends<f64>,
    pub(super) waited_share: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) difference: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) link_fault: Option<String>,
}

impl Pass {
    pub(super) fn of(
        by: By,
        repetition: u32,
        disk_bytes: u64,
        course: &Course,
        [before, after]: [&Carried; 2],
        usage: &Usage,
        content: Result<(), String>,
    ) -> Self {
        let [forward_bytes, backward_bytes] = after.since(before);
        Self {
            by,
            repetition,
            seconds: course.seconds(),
            bytes_per_second: disk_bytes as f64 / course.seconds(),
            middle_bytes_per_second: course.middle_bytes_per_second(),
            link_test_bytes_per_second: None,
            forward_bytes,
            backward_bytes,
            cpu_seconds: usage.cpu_seconds,
            waited_share: usage.waited_for_others(),
            difference: content.err(),
            link_fault: None,
        }
    }

    /// Of what the link test got across.
    fn share_of_link(&self, rate: impl Fn(&Self) -> Option<f64>) -> Option<f64> {
        Some(rate(self)? / self.link_test_bytes_per_second?)
    }
}

impl OnBase {
    /// Bytes to the destination for a byte that is otherwise.
    fn forward_ratio(&self) -> f64 {
        self.forward_bytes as f64 / self.changed_bytes as f64
    }

    /// The same of both directions.
    fn ratio(&self) -> f64 {
        (self.forward_bytes + self.backward_bytes) as f64 / self.changed_bytes as f64
    }
}

impl Kill {
    /// Of the disk.
    fn share_sent_twice(&self) -> f64 {
        self.sent_twice_bytes as f64 / self.disk_bytes as f64
    }
}

impl Report {
    pub(super) fn new(args: &DiskPassArgs) -> Self {
        Self {
            profile: args.profile.clone(),
            disk_bytes: args.disk_mb << 20,
            format: args.format,
            seed: args.seed,
            passes: Vec::new(),
            kills: Vec::new(),
            on_base: Vec::new(),
            cold: Vec::new(),
            problem: None,
        }
    }

    /// It was measured to the end, and every disk arrived as it was.
    pub(super) fn is_right(&self) -> bool {
        self.problem.is_none() && self.differences().next().is_none()
    }

    fn differences(&self) -> impl Iterator<Item = &str> {
        let passes = self.passes.iter().map(|pass| &pass.difference);
        let kills = self.kills.iter().map(|kill| &kill.difference);
        let on_base = self.on_base.iter().map(|on_base| &on_base.difference);
        let cold = self.cold.iter().map(|cold| &cold.difference);
        passes
            .chain(kills)
            .chain(on_base)
            .chain(cold)
            .flatten()
            .map(String::as_str)
    }

    fn by(&self, by: By) -> impl Iterator<Item = &Pass> + Clone {
        self.passes.iter().filter(move |pass| pass.by == by)
    }

    /// IP bytes to the destination of a pass that nobody disturbs: the median of the gateways'.
    pub(super) fn undisturbed_bytes(&self) -> Option<u64> {
        Some(median(self.by(By::Gateways).map(|pass| pass.forward_bytes as f64))? as u64)
    }

    pub(super) fn write_json(&self, file: &Path) -> std::io::Result<()> {
        let text = serde_json::to_string_pretty(self).expect("a report is plain data");
        std::fs::write(file, text + "\n")
    }

    fn rates(&self) -> Table {
        let mut table = Table::new(&[
            "first pass",
            "passes",
            "time",
            "rate",
            "in the middle",
            "of the link test",
            "in the middle",
            "to B",
            "to A",
            "CPU at A",
            "at B",
            "late link",
        ]);
        for by in [By::Gateways, By::Mirror] {
            let passes = self.by(by);
            let count = passes.clone().count();
            if count == 0 {
                continue;
            }
            let of = |figure: fn(&Pass) -> Option<f64>| median(passes.clone().filter_map(figure));
            table.row([
                by.to_string(),
                count.to_string(),
                or_dash(of(|pass| Some(pass.seconds)), seconds),
                or_dash(of(|pass| Some(pass.bytes_per_second)), rate),
                or_dash(of(|pass| pass.middle_bytes_per_second), rate),
                or_dash(
                    of(|pass| pass.share_of_link(|pass| Some(pass.bytes_per_second))),
                    percent,
                ),
                or_dash(
                    of(|pass| pass.share_of_link(|pass| pass.middle_bytes_per_second)),
                    percent,
                ),
                or_dash(of(|pass| Some(pass.forward_bytes as f64)), megabytes),
                or_dash(of(|pass| Some(pass.backward_bytes as f64)), megabytes),
                or_dash(of(|pass| Some(pass.cpu_seconds.source)), seconds),
                or_dash(of(|pass| Some(pass.cpu_seconds.destination)), seconds),
                passes.filter(|pass| pass.link_fault.is_some()).count().to_string(),
            ]);
        }
        table
    }

    /// How much faster the gateways are than the mirror.
    fn beside_mirror(&self) -> Option<f64> {
        let rate = |by| median(self.by(by).map(|pass| pass.bytes_per_second));
        Some(rate(By::Gateways)? / rate(By::Mirror)?)
    }

    fn bases(&self) -> Table {
        let mut table = Table::new(&[
            "on a base",
            "time",
            "blocks that changed",
            "to B",
            "of changed",
            "frames",
            "to A",
            "both, of changed",
            "image at B",
            "late link",
        ]);
        for on_base in &self.on_base {
            table.row([
                on_base.repetition.to_string(),
                seconds(on_base.seconds),
                megabytes(on_base.changed_bytes as f64),
                megabytes(on_base.forward_bytes as f64),
                format!("{:.3}", on_base.forward_ratio()),
                megabytes(on_base.frame_bytes as f64),
                megabytes(on_base.backward_bytes as f64),
                format!("{:.3}", on_base.ratio()),
                megabytes(on_base.image_bytes as f64),
                if on_base.link_fault.is_some() { "yes" } else { "no" }.to_owned(),
            ]);
        }
        table
    }

    fn cold(&self) -> Table {
        let mut table = Table::new(&[
            "off",
            "disk",
            "in use",
            "time",
            "rate",
            "of the link test",
            "to B",
            "to A",
            "image at B",
            "CPU at A",
            "at B",
            "late link",
        ]);
        for cold in &self.cold {
            table.row([
                format!("{} to {}", cold.from, cold.to),
                megabytes(cold.disk_bytes as f64),
                megabytes(cold.used_bytes as f64),
                seconds(cold.seconds),
                rate(cold.bytes_per_second),
                percent(cold.bytes_per_second / cold.link_test_bytes_per_second),
                megabytes(cold.forward_bytes as f64),
                megabytes(cold.backward_bytes as f64),
                megabytes(cold.image_bytes as f64),
                seconds(cold.cpu_seconds.source),
                seconds(cold.cpu_seconds.destination),
                if cold.link_fault.is_some() { "yes" } else { "no" }.to_owned(),
            ]);
        }
        table
    }

    fn killed(&self) -> Table {
        let mut table = Table::new(&[
            "killed at",
            "after",
            "read by then",
            "away",
            "begun again",
            "to B",
            "sent twice",
            "of the disk",
            "to A",
            "not sent again",
            "images",
        ]);
        for kill in &self.kills {
            table.row([
                kill.gateway.to_owned(),
                seconds(kill.at_seconds),
                percent(kill.read_bytes as f64 / kill.disk_bytes as f64),
                seconds(kill.away_seconds),
                kill.begun_again.to_string(),
                megabytes(kill.forward_bytes as f64),
                megabytes(kill.sent_twice_bytes as f64),
                percent(kill.share_sent_twice()),
                megabytes(kill.backward_bytes as f64),
                megabytes(kill.same_bytes as f64),
                if kill.difference.is_some() { "differ" } else { "equal" }.to_owned(),
            ]);
        }
        table
    }

    fn most_sent_twice(&self) -> Option<f64> {
        self.kills.iter().map(Kill::share_sent_twice).reduce(f64::max)
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Gateways => "longhaul",
            Self::Mirror => "QEMU mirror, TCP BBR tuned",
        })
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}, {}",
            self.by,
            seconds(self.seconds),
            rate(self.bytes_per_second)
        )?;
        match self.share_of_link(|pass| Some(pass.bytes_per_second)) {
            Some(share) => write!(f, ", {} of the link test", percent(share)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for OnBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ratio, changed) = (self.forward_ratio(), megabytes(self.changed_bytes as f64));
        write!(f, "on a base: {ratio:.3} x {changed} to B")
    }
}

impl fmt::Display for Cold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (time, rate) = (seconds(self.seconds), rate(self.bytes_per_second));
        write!(f, "off, {} to {}: {time}, {rate}", self.from, self.to)
    }
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, twice) = (seconds(self.at_seconds), percent(self.share_sent_twice()));
        write!(
            f,
            "the gateway of {} killed after {at}: {twice} of the disk sent twice",
            self.gateway
        )
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: a disk of {} that nothing compresses, to an image of {}",
            self.profile,
            megabytes(self.disk_bytes as f64),
            self.format.name()
        )?;
        if !self.passes.is_empty() {
            write!(f, "\n{}", self.rates())?;
        }
        if let Some(times) = self.beside_mirror() {
            writeln!(f, "longhaul's rate is {times:.2} x that of the mirror")?;
        }
        if !self.on_base.is_empty() {
            write!(f, "\n{}", self.bases())?;
        }
        if !self.cold.is_empty() {
            write!(f, "\n{}", self.cold())?;
        }
        if !self.kills.is_empty() {
            write!(f, "\n{}", self.killed())?;
        }
        if let Some(most) = self.most_sent_twice() {
            writeln!(f, "at most {} of the disk was sent twice", percent(most))?;
        }
        for difference in self.differences() {
            writeln!(f, "the images differ: {difference}")?;
        }
        if let Some(problem) = &self.problem {
            writeln!(f, "ended early: {problem}")?;
        }
        Ok(())
    }
}

fn rate(bytes_per_second: f64) -> String {
    format!("{:.1} Mbit/s", bytes_per_second * 8.0 / 1e6)
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(by: By, seconds: f64, forward_bytes: u64) -> Pass {
        Pass {
            by,
            repetition: 1,
            seconds,
            bytes_per_second: 100.0 / seconds,
            middle_bytes_per_second: None,
            link_test_bytes_per_second: Some(20.0),
            forward_bytes,
            backward_bytes: 0,
            cpu_seconds: Ends {
                source: 0.0,
                destination: 0.0,
            },
            waited_share: None,
            difference: None,
            link_fault: None,
        }
    }

    fn kill(sent_twice_bytes: u64) -> Kill {
        Kill {
            gateway: "A",
            at_seconds: 1.0,
            away_seconds: 1.0,
            read_bytes: 50,
            disk_bytes: 1000,
            begun_again: 1,
            forward_bytes: 0,
            backward_bytes: 0,
            sent_twice_bytes,
            same_bytes: 0,
            difference: None,
            link_fault: None,
        }
    }

    fn report() -> Report {
        Report {
            profile: "lan".to_owned(),
            disk_bytes: 100,
            format: Format::Raw,
            seed: 1,
            passes: Vec::new(),
            kills: Vec::new(),
            on_base: Vec::new(),
            cold: Vec::new(),
            problem: None,
        }
    }

    #[test]
    fn the_mirror_is_no_pass_that_kills_are_measured_against() {
        let mut report = report();
        assert_eq!(report.undisturbed_bytes(), None);
        report.passes.push(pass(By::Mirror, 50.0, 500));
        assert_eq!(report.undisturbed_bytes(), None);
        for (seconds, bytes) in [(10.0, 110), (30.0, 130), (11.0, 112)] {
            report.passes.push(pass(By::Gateways, seconds, bytes));
        }
        assert_eq!(report.undisturbed_bytes(), Some(112));
        let times = report.beside_mirror().unwrap();
        assert!((times - 50.0 / 11.0).abs() < 1e-9, "{times}");
    }

    #[test]
    fn shares_are_of_the_link_test_of_the_changed_blocks_and_of_the_disk() {
        let pass = pass(By::Gateways, 10.0, 110);
        assert_eq!(pass.share_of_link(|pass| Some(pass.bytes_per_second)), Some(0.5));
        assert_eq!(pass.share_of_link(|pass| pass.middle_bytes_per_second), None);
        let on_base = OnBase {
            repetition: 1,
            disk_bytes: 1000,
            changed_bytes: 100,
            seconds: 1.0,
            forward_bytes: 105,
            backward_bytes: 20,
            frame_bytes: 101,
            same_bytes: 900,
            image_bytes: 128,
            difference: None,
            link_fault: None,
        };
        assert!((on_base.forward_ratio() - 1.05).abs() < 1e-9);
        assert!((on_base.ratio() - 1.25).abs() < 1e-9);
        let mut report = report();
        report.kills = vec![kill(5), kill(20), kill(0)];
        assert_eq!(report.most_sent_twice(), Some(0.02));
    }

    #[test]
    fn an_image_that_differs_is_not_right_whatever_was_measured() {
        let mut report = report();
        report.kills.push(kill(0));
        assert!(report.is_right());
        report.kills[0].difference = Some("Content mismatch at offset 0!".to_owned());
        assert!(!report.is_right());
        assert!(report.to_string().contains("the images differ: Content mismatch"));
    }
}
