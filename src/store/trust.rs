//! Whom this site trusts, kept in `state_dir/trust.json`: peer name → fingerprint, address, when and how it was paired.
//!
//! Pairing writes it, nobody else. The file is replaced as a whole: written beside, synced, renamed over, directory
//! synced; so a crash leaves the old trust or the new, never half of it. What is only in memory is never trusted: a
//! change counts once it is on the disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::file::replace_file;
pub use super::fingerprint::{Fingerprint, InvalidFingerprint};
use crate::config::units::{PeerAddress, parse_name};

/// One trusted peer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrustedPeer {
    /// SHA-256 of its public key.
    pub fingerprint: Fingerprint,
    /// Where it is called; `None` where it did not say and nobody typed it.
    pub address: Option<PeerAddress>,
    /// When it was paired, in seconds since 1970 UTC.
    pub paired_at: u64,
    /// How trust was made.
    pub by: PairedBy,
}

/// How trust was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairedBy {
    /// It used an invitation of this site.
    Invited,
    /// This site used an invitation of it.
    Accepted,
    /// A person compared fingerprints.
    Fingerprint,
}

/// The trusted peers, as they are on the disk. Shared by all who look; a change holds the others up while it is synced.
#[derive(Debug)]
pub struct TrustStore {
    path: PathBuf,
    peers: Mutex<BTreeMap<String, TrustedPeer>>,
}

impl TrustStore {
    /// Reads the trust of `state_dir`. Without a file nobody is trusted.
    ///
    /// # Errors
    /// [`TrustError`] where the file cannot be read, is damaged, or could be written by other users.
    pub fn load(state_dir: &Path) -> Result<Self, TrustError> {
        let path = state_dir.join(FILE_NAME);
        let peers = Mutex::new(read(&path)?);
        Ok(Self { path, peers })
    }

    /// Reads the file again. On an error, what was known stays.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn reload(&self) -> Result<(), TrustError> {
        *self.lock() = read(&self.path)?;
        Ok(())
    }

    /// The peer of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<TrustedPeer> {
        self.lock().get(name).cloned()
    }

    /// The name of the peer with that key.
    #[must_use]
    pub fn name_of(&self, fingerprint: &Fingerprint) -> Option<String> {
        name_of(&self.lock(), fingerprint).map(str::to_owned)
    }

    /// Every peer by name.
    #[must_use]
    pub fn peers(&self) -> BTreeMap<String, TrustedPeer> {
        self.lock().clone()
    }

    /// Whether [`add`](Self::add) would take this name for this key, without adding it.
    ///
    /// # Errors
    /// [`TrustError::BadName`], [`TrustError::NameTaken`], [`TrustError::KeyKnown`] or [`TrustError::Full`].
    pub fn may_add(&self, name: &str, fingerprint: &Fingerprint) -> Result<(), TrustError> {
        may_add(&self.lock(), name, fingerprint)
    }

    /// Trusts `peer` as `name`, durably. The same name with the same key again updates the rest of it. Blocks for a
    /// sync.
    ///
    /// # Errors
    /// [`TrustError::NameTaken`] where the name has another key: an invitation must not replace a peer; unpair it
    /// first. Other variants where the name is invalid, the key has another name, or the file cannot be written; then
    /// nothing has changed.
    pub fn add(&self, name: &str, peer: TrustedPeer) -> Result<(), TrustError> {
        let mut current = self.lock();
        may_add(&current, name, &peer.fingerprint)?;
        let mut peers = current.clone();
        peers.insert(name.to_owned(), peer);
        *current = self.replace(peers)?;
        Ok(())
    }

    /// Trusts `name` no more, durably, and gives back what was known of it. `None` where it was not trusted. Blocks for
    /// a sync.
    ///
    /// # Errors
    /// [`TrustError::Io`] where the file cannot be written; then nothing has changed.
    pub fn remove(&self, name: &str) -> Result<Option<TrustedPeer>, TrustError> {
        let mut current = self.lock();
        let mut peers = current.clone();
        let removed = peers.remove(name);
        if removed.is_some() {
            *current = self.replace(peers)?;
        }
        Ok(removed)
    }

    /// Makes the file say `peers`.
    fn replace(&self, peers: BTreeMap<String, TrustedPeer>) -> Result<BTreeMap<String, TrustedPeer>, TrustError> {
        let contents = Contents {
            version: VERSION,
            peers,
        };
        let mut text = serde_json::to_vec_pretty(&contents).expect("names are texts and the rest is plain data");
        text.push(b'\n');
        replace_file(&self.path, &text).map_err(|source| TrustError::Io {
            path: self.path.clone(),
            source,
        })?;
        Ok(contents.peers)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, TrustedPeer>> {
        // It is only ever replaced as a whole.
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name_of<'a>(peers: &'a BTreeMap<String, TrustedPeer>, fingerprint: &Fingerprint) -> Option<&'a str> {
    peers
        .iter()
        .find(|(_, peer)| peer.fingerprint == *fingerprint)
        .map(|(name, _)| name.as_str())
}

fn may_add(peers: &BTreeMap<String, TrustedPeer>, name: &str, fingerprint: &Fingerprint) -> Result<(), TrustError> {
    if parse_name(name).is_err() {
        return Err(TrustError::BadName { name: name.to_owned() });
    }
    match peers.get(name) {
        Some(known) if known.fingerprint != *fingerprint => {
            return Err(TrustError::NameTaken {
                name: name.to_owned(),
                fingerprint: known.fingerprint,
            });
        }
        Some(_) => return Ok(()),
        None => {}
    }
    if let Some(other) = name_of(peers, fingerprint) {
        return Err(TrustError::KeyKnown {
            name: name.to_owned(),
            other: other.to_owned(),
        });
    }
    if peers.len() >= MAX_PEERS {
        Err(TrustError::Full)
    } else {
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    peers: BTreeMap<String, TrustedPeer>,
}

fn read(path: &Path) -> Result<BTreeMap<String, TrustedPeer>, TrustError> {
    let io = |source| TrustError::Io {
        path: path.to_owned(),
        source,
    };
    let damaged = |reason: String| TrustError::Damaged {
        path: path.to_owned(),
        reason,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(io(error)),
    };
    let metadata = file.metadata().map_err(io)?;
    if metadata.permissions().mode() & 0o022 != 0 {
        return Err(TrustError::Exposed { path: path.to_owned() });
    }
    let mut text = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(io)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(damaged(format!("it has more than {MAX_FILE_BYTES} bytes")));
    }
    let contents: Contents = serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
    if contents.version != VERSION {
        return Err(damaged(format!(
            "it has version {}, this program knows {VERSION}",
            contents.version
        )));
    }
    if contents.peers.len() > MAX_PEERS {
        return Err(damaged(format!("it has more than {MAX_PEERS} peers")));
    }
    let mut keys = std::collections::HashSet::new();
    for (name, peer) in &contents.peers {
        if parse_name(name).is_err() {
            return Err(damaged(format!("{name:?} is not the name of a peer")));
        }
        if !keys.insert(peer.fingerprint) {
            return Err(damaged(format!("{name:?} has the key of another peer")));
        }
    }
    Ok(contents.peers)
}

/// Trust cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The file cannot be read or written.
    #[error("the trust store {} cannot be read or written: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not what this program writes.
    #[error("the trust store {} is damaged: {reason}; restore it, or remove it and pair again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Others could add themselves.
    #[error("the trust store {} can be written by other users; check it, then chmod 600 it", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
    },
    /// No name of a site.
    #[error("{name:?} cannot be the name of a peer")]
    BadName {
        /// What was given.
        name: String,
    },
    /// The name belongs to another key.
    #[error(
        "a peer {name:?} is paired already with the key {fingerprint}; if it is to be replaced, run `longhaul unpair {name}` first"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// The key it has.
        fingerprint: Fingerprint,
    },
    /// The key belongs to another name.
    #[error("the key of {name:?} is trusted already as {other:?}; run `longhaul unpair {other}` first")]
    KeyKnown {
        /// The name that was given.
        name: String,
        /// The name it has.
        other: String,
    },
    /// The bound on peers is reached.
    #[error("there are {MAX_PEERS} peers already, which is the most that a gateway keeps")]
    Full,
}

const FILE_NAME: &str = "trust.json";
const VERSION: u32 = 1;

/// Far above any mesh of sites; bounds the file.
const MAX_PEERS: usize = 1024;

/// An entry has less than 700 bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(byte: u8) -> TrustedPeer {
        TrustedPeer {
            fingerprint: Fingerprint([byte; 32]),
            address: Some("gw.example.net:4646".parse().unwrap()),
            paired_at: 1_700_000_000,
            by: PairedBy::Invited,
        }
    }

    #[test]
    fn trust_survives_a_restart_and_only_the_owner_can_read_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = TrustStore::load(directory.path()).unwrap();
        assert_eq!(store.peers().len(), 0);
        store.add("tokyo", peer(1)).unwrap();
        store
            .add(
                "oslo",
                TrustedPeer {
                    address: None,
                    ..peer(2)
                },
            )
            .unwrap();

        let again = TrustStore::load(directory.path()).unwrap();
        assert_eq!(again.get("tokyo"), Some(peer(1)));
        assert_eq!(again.name_of(&Fingerprint([2; 32])), Some("oslo".to_owned()));
        let mode = std::fs::metadata(directory.path().join(FILE_NAME))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);

        assert_eq!(again.remove("tokyo").unwrap(), Some(peer(1)));
        assert_eq!(again.remove("tokyo").unwrap(), None);
        store.reload().unwrap();
        assert_eq!(store.peers().into_keys().collect::<Vec<_>>(), ["oslo"]);
    }

    #[test]
    fn a_name_keeps_its_key_and_a_key_its_name_until_unpaired() {
        let directory = tempfile::tempdir().unwrap();
        let store = TrustStore::load(directory.path()).unwrap();
        store.add("tokyo", peer(1)).unwrap();
        store
            .add(
                "tokyo",
                TrustedPeer {
                    paired_at: 1,
                    ..peer(1)
                },
            )
            .unwrap();
        assert_eq!(store.get("tokyo").unwrap().paired_at, 1);
        assert!(matches!(store.add("tokyo", peer(2)), Err(TrustError::NameTaken { .. })));
        assert!(matches!(store.add("osaka", peer(1)), Err(TrustError::KeyKnown { .. })));
        assert!(matches!(store.add("../etc", peer(3)), Err(TrustError::BadName { .. })));
        store.remove("tokyo").unwrap();
        store.add("tokyo", peer(2)).unwrap();
    }

    #[test]
    fn a_damaged_or_exposed_file_trusts_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE_NAME);
        let store = TrustStore::load(directory.path()).unwrap();
        store.add("tokyo", peer(1)).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();

        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o620)).unwrap();
        assert!(matches!(
            TrustStore::load(directory.path()),
            Err(TrustError::Exposed { .. })
        ));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();

        let other_version = good.replace("\"version\": 1", "\"version\": 2");
        let other_name = good.replace("tokyo", "to kyo");
        for bad in ["", "{}", &good[..good.len() / 2], &other_version, &other_name] {
            std::fs::write(&path, bad).unwrap();
            assert!(
                matches!(TrustStore::load(directory.path()), Err(TrustError::Damaged { .. })),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_change_that_cannot_be_written_is_not_trusted() {
        let directory = tempfile::tempdir().unwrap();
        let store = TrustStore::load(&directory.path().join("missing")).unwrap();
        assert!(matches!(store.add("tokyo", peer(1)), Err(TrustError::Io { .. })));
        assert_eq!(store.get("tokyo"), None);
    }

    #[test]
    fn what_a_crash_left_beside_the_file_is_no_obstacle() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("trust.json.new"), "half").unwrap();
        let store = TrustStore::load(directory.path()).unwrap();
        store.add("tokyo", peer(1)).unwrap();
        assert_eq!(TrustStore::load(directory.path()).unwrap().peers().len(), 1);
    }
}
