//! A plan as its author writes it, checked as a whole.
//!
//! ```toml
//! title = "What it is for"
//! profiles = ["intercontinental"]            # of config/lab/profiles, or files
//! engines = ["longhaul", "qemu-tcp-bbr-tuned"]
//! qemu = ["stable"]                          # stable, backports or a program
//! seeds = [1]                                # of the guest's pages and the link's losses
//! repetitions = 3                            # of every combination
//! time_limit = "60s"                         # then a move has not finished
//!
//! [guest.default]                            # dials, as `longhaul lab guest --help` tells them
//! memory_mb = 512
//!
//! [frontier]                                 # the highest dirty rate that still converges, for each engine
//! profile = "intercontinental-100m"
//! guest = "default"
//! engines = ["longhaul", "qemu-multifd-zstd"]
//! from_pages_per_second = 1_000
//! to_pages_per_second = 64_000
//! factor = 1.25                              # the answer is known as well as this
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::config::units::parse_duration;
use crate::lab::engine::Engine;
use crate::lab::guest::GuestDials;
use crate::wan::{Profile, ProfileError};

/// What is to be measured.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) title: String,
    pub(super) links: Vec<PlannedLink>,
    pub(super) guests: BTreeMap<String, GuestDials>,
    pub(super) engines: Vec<Engine>,
    pub(super) qemus: Vec<String>,
    pub(super) seeds: Vec<u64>,
    pub(super) repetitions: u32,
    pub(super) time_limit: Duration,
    pub(super) frontier: Option<FrontierPlan>,
}

/// A link that a plan names.
#[derive(Clone, Debug)]
pub(super) struct PlannedLink {
    /// The profile's file, as the script that makes the link takes it.
    pub(super) file: PathBuf,
    pub(super) profile: Profile,
}

/// A search for the highest dirty rate that still converges.
#[derive(Clone, Debug)]
pub(super) struct FrontierPlan {
    pub(super) link: PlannedLink,
    /// Name of the guest, and its dials but for the rate.
    pub(super) guest: (String, GuestDials),
    pub(super) engines: Vec<Engine>,
    pub(super) from_pages_per_second: u64,
    pub(super) to_pages_per_second: u64,
    /// Between a rate that converges and one that does not.
    pub(super) factor: f64,
}

/// A plan cannot be used.
#[derive(Debug, thiserror::Error)]
pub(in crate::lab) enum PlanError {
    /// It cannot be read.
    #[error("the plan {} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has a key that does not exist, or lacks one.
    #[error("the plan {} is not valid: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The parser's words.
        message: String,
    },
    /// Values that cannot be measured, all of them.
    #[error("the plan {} is not valid:\n  {}", path.display(), mistakes.join("\n  "))]
    Values {
        /// The file.
        path: PathBuf,
        /// A sentence for each.
        mistakes: Vec<String>,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanFile {
    title: String,
    #[serde(default)]
    profiles: Vec<String>,
    #[serde(default)]
    engines: Vec<Engine>,
    #[serde(default = "stable")]
    qemu: Vec<String>,
    #[serde(default = "one_seed")]
    seeds: Vec<u64>,
    #[serde(default = "once")]
    repetitions: u32,
    time_limit: String,
    #[serde(default)]
    guest: BTreeMap<String, GuestDials>,
    frontier: Option<FrontierTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FrontierTable {
    profile: String,
    guest: String,
    engines: Vec<Engine>,
    from_pages_per_second: u64,
    to_pages_per_second: u64,
    #[serde(default = "usual_factor")]
    factor: f64,
}

fn stable() -> Vec<String> {
    vec!["stable".to_owned()]
}

fn one_seed() -> Vec<u64> {
    vec![1]
}

fn once() -> u32 {
    1
}

fn usual_factor() -> f64 {
    1.25
}

impl Plan {
    /// Reads the plan `path`, whose profiles are in `profiles`.
    pub(super) fn read(path: &Path, profiles: &Path) -> Result<Self, PlanError> {
        let text = std::fs::read_to_string(path).map_err(|source| PlanError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        let file: PlanFile = toml::from_str(&text).map_err(|error| PlanError::Syntax {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        file.check(profiles).map_err(|mistakes| PlanError::Values {
            path: path.to_owned(),
            mistakes,
        })
    }

    /// What results call a guest: beside other QEMUs it has its own's name, since figures of two are never of one cell.
    pub(super) fn guest_on(&self, guest: &str, qemu: &str) -> String {
        match self.qemus.len() {
            1 => guest.to_owned(),
            _ => format!("{guest} on {qemu}"),
        }
    }

    /// Moves that the matrix has.
    pub(super) fn moves(&self) -> usize {
        self.links.len()
            * self.guests.len()
            * self.engines.len()
            * self.qemus.len()
            * self.seeds.len()
            * self.repetitions as usize
    }
}

impl PlanFile {
    fn check(self, directory: &Path) -> Result<Plan, Vec<String>> {
        let mut mistakes = Vec::new();
        let mut require = |holds: bool, text: &str| {
            if !holds {
                mistakes.push(text.to_owned());
            }
        };
        let has_matrix = !self.profiles.is_empty() || !self.engines.is_empty();
        require(
            has_matrix || self.frontier.is_some(),
            "there is nothing to measure: name profiles and engines, or a frontier",
        );
        require(
            self.profiles.is_empty() == self.engines.is_empty(),
            "profiles and engines go together: name at least one of each",
        );
        require(
            !self.guest.is_empty(),
            "there is no guest: add a section such as [guest.default]",
        );
        require(!self.seeds.is_empty(), "seeds: name at least one");
        require(!self.qemu.is_empty(), "qemu: name at least one");
        require((1..=1000).contains(&self.repetitions), "repetitions: take 1 to 1000");
        require(
            self.guest
                .values()
                .all(|dials| dials.working_set_mb + 64 <= dials.memory_mb),
            "a guest's working_set_mb needs 64 MiB of memory_mb beside it, for its kernel",
        );
        for (name, dials) in &self.guest {
            if let Err(error) = dials.check() {
                mistakes.push(format!("guest.{name}: {error}"));
            }
        }
        let time_limit = parse_duration(&self.time_limit).unwrap_or_else(|error| {
            mistakes.push(format!("time_limit: {error}"));
            Duration::ZERO
        });
        let mut link = |name: &String| match PlannedLink::find(directory, name) {
            Ok(link) => Some(link),
            Err(error) => {
                mistakes.push(error.to_string());
                None
            }
        };
        let links = self.profiles.iter().filter_map(&mut link).collect();
        let frontier = self.frontier.map(|table| (link(&table.profile), table));
        let frontier = frontier.and_then(|(link, table)| table.check(link, &self.guest, &mut mistakes));
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        Ok(Plan {
            title: self.title,
            links,
            guests: self.guest,
            engines: self.engines,
            qemus: self.qemu,
            seeds: self.seeds,
            repetitions: self.repetitions,
            time_limit,
            frontier,
        })
    }
}

impl PlannedLink {
    fn find(directory: &Path, name: &str) -> Result<Self, ProfileError> {
        let profile = Profile::find(directory, name)?;
        let file = if name.ends_with(".toml") {
            PathBuf::from(name)
        } else {
            directory.join(format!("{name}.toml"))
        };
        let file = std::path::absolute(&file).unwrap_or(file);
        Ok(Self { file, profile })
    }
}

impl FrontierTable {
    fn check(
        self,
        link: Option<PlannedLink>,
        guests: &BTreeMap<String, GuestDials>,
        mistakes: &mut Vec<String>,
    ) -> Option<FrontierPlan> {
        if self.engines.is_empty() {
            mistakes.push("frontier.engines: name at least one".to_owned());
        }
        if self.from_pages_per_second == 0 || self.to_pages_per_second <= self.from_pages_per_second {
            mistakes.push("frontier: from_pages_per_second must be above 0 and below to_pages_per_second".to_owned());
        }
        if !(1.05..=10.0).contains(&self.factor) {
            mistakes.push("frontier.factor: take 1.05 to 10".to_owned());
        }
        let guest = guests.get(&self.guest);
        if guest.is_none() {
            mistakes.push(format!("frontier.guest: there is no [guest.{}]", self.guest));
        }
        Some(FrontierPlan {
            link: link?,
            guest: (self.guest, guest?.clone()),
            engines: self.engines,
            from_pages_per_second: self.from_pages_per_second,
            to_pages_per_second: self.to_pages_per_second,
            factor: self.factor,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Result<Plan, Vec<String>> {
        let profiles = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/lab/profiles");
        toml::from_str::<PlanFile>(text).unwrap().check(&profiles)
    }

    #[test]
    fn every_plan_that_is_shipped_can_be_used() {
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/lab");
        let mut plans = 0;
        for entry in std::fs::read_dir(&lab).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                Plan::read(&path, &lab.join("profiles")).unwrap();
                plans += 1;
            }
        }
        assert!(plans > 1);
    }

    #[test]
    fn every_mistake_is_told_at_once() {
        let mistakes = plan(
            "title = 'x'\nprofiles = ['moon']\nengines = ['longhaul']\nseeds = []\nrepetitions = 0\ntime_limit = '5'\n\
             [guest.small]\nmemory_mb = 64\nworking_set_mb = 64\n\
             [frontier]\nprofile = 'lan'\nguest = 'big'\nengines = []\nfrom_pages_per_second = 5\nto_pages_per_second = 5\n",
        )
        .unwrap_err();
        for word in [
            "moon",
            "seeds",
            "repetitions",
            "time_limit",
            "working_set_mb",
            "frontier.engines",
            "guest.big",
            "from_pages",
        ] {
            assert!(mistakes.iter().any(|text| text.contains(word)), "{word}: {mistakes:?}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused() {
        assert!(toml::from_str::<PlanFile>("title = 'x'\ntime_limit = '1s'\nengine = ['longhaul']").is_err());
    }
}
