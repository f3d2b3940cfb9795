//! Tunnels: where streams of other programs begin and end.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::parse_socket_path;
use super::section::Section;
use super::units::parse_name;

/// A tunnel that begins here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entrance {
    /// Its name, the same at both sites.
    pub name: String,
    /// Where programs connect.
    pub listen: Place,
    /// The site where it ends.
    pub peer: String,
}

/// A tunnel that ends here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its name, the same at both sites.
    pub name: String,
    /// Where its streams go to.
    pub connect: Place,
    /// Sites from which they may come. Absent: any that is paired.
    pub from: Option<Vec<String>>,
}

/// A socket of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the file system.
    Unix(PathBuf),
    /// TCP.
    Tcp(SocketAddr),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return parse_socket_path(text).map(Self::Unix);
        }
        let address = text.parse().ok().filter(|address: &SocketAddr| address.port() > 0);
        address.map(Self::Tcp).ok_or_else(|| {
            "write the absolute path of a socket, or an IP address and a port, for example 127.0.0.1:16509".to_owned()
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Reads one `[[tunnel]]`: an entrance where it listens, an exit where it connects.
pub(super) fn read(mut section: Section<'_>, entrances: &mut Vec<Entrance>, exits: &mut Vec<Exit>) {
    let name = section.required("name", parse_name).unwrap_or_default();
    let listen = section.value("listen", Place::from_str);
    let peer = section.value("peer", parse_name);
    let connect = section.value("connect", Place::from_str);
    let from = section.texts("from");
    let (is_entrance, is_exit) = (section.states("listen"), section.states("connect"));
    if is_entrance == is_exit {
        let message = "state either `listen`, where it begins here, or `connect`, where it ends here";
        section.mistake(if is_exit { "connect" } else { "name" }, message);
    }
    if is_entrance && !section.states("peer") {
        section.mistake("listen", "needs `peer`, the site where the tunnel ends");
    }
    if !is_entrance && section.states("peer") {
        section.mistake(
            "peer",
            "is for a tunnel that begins here; where it ends here, `from` says whose streams are taken",
        );
    }
    if !is_exit && section.states("from") {
        section.mistake(
            "from",
            "is for a tunnel that ends here; where it begins here, `peer` says where it goes",
        );
    }
    if from.as_ref().is_some_and(Vec::is_empty) {
        section.mistake(
            "from",
            "names no site; without it, streams of every paired site are taken",
        );
    }
    for site in from.iter().flatten() {
        if let Err(error) = parse_name(site) {
            section.mistake("from", format!("{site:?}: {error}"));
        }
    }
    if !name.is_empty()
        && (is_entrance && entrances.iter().any(|entrance| entrance.name == name)
            || is_exit && exits.iter().any(|exit| exit.name == name))
    {
        section.mistake("name", format!("the tunnel {name:?} is there already"));
    }
    if let Some(other) = entrances
        .iter()
        .find(|entrance| Some(&entrance.listen) == listen.as_ref())
    {
        section.mistake("listen", format!("is where the tunnel {:?} listens", other.name));
    }
    section.finish();
    if let (Some(listen), Some(peer)) = (listen, peer) {
        entrances.push(Entrance {
            name: name.clone(),
            listen,
            peer,
        });
    }
    if let Some(connect) = connect {
        exits.push(Exit { name, connect, from });
    }
}
