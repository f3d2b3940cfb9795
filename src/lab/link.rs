//! The emulated link between two sites, as `netem-scripts/link` makes it: namespaces `NAME-a` and `NAME-b`, in each the
//! device `wan0` with the addresses [`ADDRESS_A`] and [`ADDRESS_B`].

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::process::{Process, ProcessError, run};

/// Address of site A on the link.
pub const ADDRESS_A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
/// Address of site B on the link.
pub const ADDRESS_B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));

/// Where links that are up have their files.
const STATE: &str = "/run/longhaul-link";

/// A link that is up until [`Link::down`].
#[derive(Clone, Debug)]
pub(super) struct Link {
    script: PathBuf,
    name: String,
    /// The program that emulates the link where the kernel cannot, and its place in the script's environment.
    program: String,
}

/// What a link has carried.
#[derive(Clone, Debug)]
pub(super) struct Carried {
    /// IP bytes that site A and site B have put onto it, lost ones included.
    pub(super) offered: [u64; 2],
    /// `netem` or `emulator`.
    pub(super) backend: String,
    /// Why figures measured across it are not to be used. Nothing, where they are.
    pub(super) fault: Option<String>,
}

impl Carried {
    /// IP bytes of site A and of site B after those that were carried before.
    pub(super) fn since(&self, before: &Self) -> [u64; 2] {
        [0, 1].map(|way| self.offered[way].saturating_sub(before.offered[way]))
    }

    /// IP bytes of both directions.
    pub(super) fn wire_bytes(&self) -> u64 {
        let [a, b] = self.offered;
        a.saturating_add(b)
    }
}

impl Link {
    /// The link `name`, whether it is up or not.
    pub(super) fn named(script: &Path, name: &str) -> Self {
        // Where this program's path is not known the script uses the release build.
        let program = std::env::current_exe().unwrap_or_default().display().to_string();
        Self {
            script: script.to_owned(),
            name: name.to_owned(),
            program: format!("LONGHAUL_BIN={program}"),
        }
    }

    /// Makes the link `profile` (a name or a file), whose losses follow `seed`.
    pub(super) async fn up(&self, profile: &str, seed: u64) -> Result<(), LinkError> {
        let seed = seed.to_string();
        self.script(&["up", "--profile", profile, "--name", &self.name, "--seed", &seed])
            .await?;
        Ok(())
    }

    /// The same, by the emulator also where the kernel could do it: it can be cut at once ([`Link::control`]).
    pub(super) async fn up_emulated(&self, profile: &str, seed: u64) -> Result<(), LinkError> {
        let seed = seed.to_string();
        let link = ["up", "--profile", profile, "--name", &self.name, "--seed", &seed];
        self.script(&[&link[..], &["--backend", "emulator"]].concat()).await?;
        Ok(())
    }

    /// Where the emulator of the link takes commands.
    pub(super) fn control(&self) -> PathBuf {
        Path::new(STATE).join(&self.name).join("control")
    }

    /// Removes the link and its namespaces.
    pub(super) async fn down(&self) -> Result<(), LinkError> {
        self.script(&["down", "--name", &self.name]).await?;
        Ok(())
    }

    /// Starts the time line of the profile's events, which goes on until it is over or the process is killed.
    pub(super) fn play(&self, log: &Path) -> Result<Process, LinkError> {
        let argv = [
            "env",
            &self.program,
            &self.script.display().to_string(),
            "play",
            "--name",
            &self.name,
        ];
        Ok(Process::spawn(
            "the link's events",
            None,
            &argv.map(str::to_owned),
            log,
        )?)
    }

    /// Whether anything of the link exists, also of one that is half made.
    pub(super) fn is_there(&self) -> bool {
        let namespace = |end: &str| PathBuf::from(format!("/run/netns/{}-{end}", self.name));
        let state = Path::new(STATE).join(&self.name);
        state.exists() || ["a", "b", "wan"].iter().any(|end| namespace(end).exists())
    }

    pub(super) fn namespace_a(&self) -> String {
        format!("{}-a", self.name)
    }

    pub(super) fn namespace_b(&self) -> String {
        format!("{}-b", self.name)
    }

    /// What the link has carried since it is up.
    pub(super) async fn carried(&self) -> Result<Carried, LinkError> {
        let shown = self.script(&["show", "--name", &self.name]).await?;
        let unreadable = || LinkError::Unreadable { shown: shown.clone() };
        let value: Value = serde_json::from_str(&shown).map_err(|_| unreadable())?;
        let offered = |direction: &str| value[direction]["offered"]["bytes"].as_u64().ok_or_else(unreadable);
        Ok(Carried {
            offered: [offered("ab")?, offered("ba")?],
            backend: value["backend"].as_str().unwrap_or("unknown").to_owned(),
            fault: value["fault"].as_str().map(str::to_owned),
        })
    }

    async fn script(&self, arguments: &[&str]) -> Result<String, LinkError> {
        let script = self.script.display().to_string();
        let argv: Vec<&str> = ["env", &self.program, &script]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        Ok(run(&argv).await?)
    }
}

/// The link cannot be made, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The script failed.
    #[error(transparent)]
    Script(#[from] ProcessError),
    /// The script shows no counters.
    #[error("the link shows no counters of IP bytes: {shown}")]
    Unreadable {
        /// What it shows.
        shown: String,
    },
}
