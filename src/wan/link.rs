//! Where a link that `netem-scripts/link` has set up keeps its things: the names of its namespaces, its state directory.
//!
//! ```text
//! X-a, X-b, X-wan                     network namespaces: site A, site B, the router between them
//! wan0                                the device in each site, 10.77.0.1/24 and fd77::1/64 at A, .2 and ::2 at B
//! to-a, to-b                          with netem: the router's devices
//! /run/longhaul-link/X/backend        netem or emulator
//!                      NAME.toml      the profile
//!                      seed, pid, control, log
//!                      address-a, address-b   of a site that has another than its first
//!                      settings  what netem has been told, once it is not the profile any more
//! ```

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::profile::{Profile, ProfileError};
use super::stats::Backend;

/// The device of the link in both sites.
pub const SITE_DEVICE: &str = "wan0";

/// Name of a link: 1 to 8 lower-case letters and digits, so that several can be up at once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkName(String);

/// An end of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Site {
    /// The end with 10.77.0.1.
    A,
    /// The end with 10.77.0.2.
    B,
}

/// A text is not the name of a link.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a link's name: take 1 to 8 lower-case letters and digits")]
pub struct InvalidLinkName(String);

/// A link that is up.
#[derive(Clone, Debug)]
pub struct Link {
    /// Its name.
    pub name: LinkName,
    /// What it is like.
    pub profile: Profile,
    /// What carries its packets.
    pub backend: Backend,
    /// Of its random numbers.
    pub seed: u64,
    /// Of sites A and B.
    pub addresses: [Ipv4Addr; 2],
}

/// A link cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No such link has been set up.
    #[error("no link {name} is up: run netem-scripts/link up --name {name} --profile NAME")]
    NotUp {
        /// The link's name.
        name: LinkName,
    },
    /// Its files are not what `netem-scripts/link` writes.
    #[error("the link {name} is half up: {} is missing or not valid; run netem-scripts/link down --name {name}", path.display())]
    Damaged {
        /// The link's name.
        name: LinkName,
        /// The file.
        path: PathBuf,
    },
    /// Its profile is not valid.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// A namespace cannot be entered.
    #[error("the network namespace {} cannot be entered", path.display())]
    Namespace {
        /// The namespace's file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Site {
    /// The other end.
    #[must_use]
    pub fn peer(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    /// The address of this end when the link comes up.
    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        match self {
            Self::A => Ipv4Addr::new(10, 77, 0, 1),
            Self::B => Ipv4Addr::new(10, 77, 0, 2),
        }
    }

    /// The router's device towards this end, with netem.
    pub(super) fn router_device(self) -> &'static str {
        match self {
            Self::A => "to-a",
            Self::B => "to-b",
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::A => "A",
            Self::B => "B",
        })
    }
}

impl LinkName {
    /// The network namespace of a site.
    #[must_use]
    pub fn site(&self, site: Site) -> String {
        match site {
            Site::A => format!("{self}-a"),
            Site::B => format!("{self}-b"),
        }
    }

    /// The network namespace between the sites.
    #[must_use]
    pub fn router(&self) -> String {
        format!("{self}-wan")
    }

    /// Where the link keeps its files.
    #[must_use]
    pub fn state_directory(&self) -> PathBuf {
        Path::new(STATE_ROOT).join(&self.0)
    }

    /// Where the address of a site stands that has another than its first.
    pub(super) fn address_file(&self, site: Site) -> PathBuf {
        self.state_directory().join(match site {
            Site::A => "address-a",
            Site::B => "address-b",
        })
    }

    /// The emulator's control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.state_directory().join("control")
    }
}

impl FromStr for LinkName {
    type Err = InvalidLinkName;

    fn from_str(text: &str) -> Result<Self, InvalidLinkName> {
        let plain = text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if plain && (1..=8).contains(&text.len()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidLinkName(text.to_owned()))
        }
    }
}

impl fmt::Display for LinkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Link {
    /// The link `name`, which `netem-scripts/link up` has set up.
    ///
    /// # Errors
    /// [`LinkError`] where it is not up, or only half.
    pub fn open(name: LinkName) -> Result<Self, LinkError> {
        let directory = name.state_directory();
        if !directory.is_dir() {
            return Err(LinkError::NotUp { name });
        }
        let read = |file: &str| {
            let path = directory.join(file);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok((text.trim().to_owned(), path)),
                Err(_) => Err(LinkError::Damaged {
                    name: name.clone(),
                    path,
                }),
            }
        };
        let (backend, path) = read("backend")?;
        let backend = match backend.as_str() {
            "netem" => Backend::Netem,
            "emulator" => Backend::Emulator,
            _ => return Err(LinkError::Damaged { name, path }),
        };
        let (seed, path) = read("seed")?;
        let seed = seed.parse().map_err(|_| LinkError::Damaged {
            name: name.clone(),
            path,
        })?;
        let (profile, _) = read("profile")?;
        let profile = Profile::read(&directory.join(profile))?;
        let address = |site: Site| {
            let text = std::fs::read_to_string(name.address_file(site)).unwrap_or_default();
            text.trim().parse().unwrap_or(site.address())
        };
        let addresses = [address(Site::A), address(Site::B)];
        Ok(Self {
            name,
            profile,
            backend,
            seed,
            addresses,
        })
    }

    /// The present address of a site.
    #[must_use]
    pub fn address(&self, site: Site) -> Ipv4Addr {
        match site {
            Site::A => self.addresses[0],
            Site::B => self.addresses[1],
        }
    }

    /// The process of its emulator, where it has one.
    pub(super) fn emulator(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.name.state_directory().join("pid")).ok()?;
        text.split_whitespace().next()?.parse().ok()
    }
}

/// Moves the calling thread, and the threads and processes that it starts from now on, into the network namespace `name`
/// of `ip netns`.
///
/// # Errors
/// [`LinkError::Namespace`] where it does not exist or the caller is not root.
pub fn enter_namespace(name: &str) -> Result<(), LinkError> {
    let path = Path::new("/run/netns").join(name);
    rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .and_then(|file| move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network)))
        .map_err(|error| LinkError::Namespace {
            path,
            source: error.into(),
        })
}

const STATE_ROOT: &str = "/run/longhaul-link";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_one_to_eight_plain_characters() {
        for good in ["lh", "a", "abcdefg8"] {
            assert_eq!(
                good.parse::<LinkName>().map(|name| name.to_string()),
                Ok(good.to_owned())
            );
        }
        for bad in ["", "abcdefghi", "A", "a-b", "a/b", "ä", ".."] {
            assert_eq!(bad.parse::<LinkName>(), Err(InvalidLinkName(bad.to_owned())));
        }
    }

    #[test]
    fn a_link_that_is_not_up_says_how_to_bring_it_up() {
        let name: LinkName = "notup".parse().expect("a name");
        let error = Link::open(name).expect_err("not up").to_string();
        assert!(error.contains("netem-scripts/link up --name notup"), "{error}");
    }

    #[test]
    fn a_namespace_that_does_not_exist_is_named() {
        let error = enter_namespace("no-such-namespace").expect_err("none").to_string();
        assert!(error.contains("/run/netns/no-such-namespace"), "{error}");
    }
}
