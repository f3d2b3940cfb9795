//! The emulated link between two sites, as `netem-scripts/link` makes it: namespaces `NAME-a` and `NAME-b`, in each the
//! device `wan0` with the addresses [`ADDRESS_A`] and [`ADDRESS_B`].

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::process::{ProcessError, run};

/// Address of site A on the link.
pub const ADDRESS_A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));
/// Address of site B on the link.
pub const ADDRESS_B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));

/// A link that is up until [`Link::down`].
#[derive(Clone, Debug)]
pub(super) struct Link {
    script: PathBuf,
    name: String,
}

impl Link {
    /// The link `name`, whether it is up or not.
    pub(super) fn named(script: &Path, name: &str) -> Self {
        Self {
            script: script.to_owned(),
            name: name.to_owned(),
        }
    }

    /// Makes the link.
    pub(super) async fn up(&self, profile: &str) -> Result<(), LinkError> {
        self.script(&["up", "--profile", profile, "--name", &self.name]).await?;
        Ok(())
    }

    /// Removes the link and its namespaces.
    pub(super) async fn down(&self) -> Result<(), LinkError> {
        self.script(&["down", "--name", &self.name]).await?;
        Ok(())
    }

    pub(super) fn namespace_a(&self) -> String {
        format!("{}-a", self.name)
    }

    pub(super) fn namespace_b(&self) -> String {
        format!("{}-b", self.name)
    }

    /// IP bytes that both sites have put onto the link since it is up, lost ones included.
    pub(super) async fn wire_bytes(&self) -> Result<u64, LinkError> {
        let shown = self.script(&["show", "--name", &self.name]).await?;
        let unreadable = || LinkError::Unreadable { shown: shown.clone() };
        let value: Value = serde_json::from_str(&shown).map_err(|_| unreadable())?;
        let direction = |name: &str| value[name]["ip_bytes"].as_u64().ok_or_else(unreadable);
        Ok(direction("a_to_b")? + direction("b_to_a")?)
    }

    async fn script(&self, arguments: &[&str]) -> Result<String, LinkError> {
        let script = self.script.display().to_string();
        let argv: Vec<&str> = std::iter::once(script.as_str())
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
