//! Who this site is: one ECDSA P-256 key for ever, and a self-signed certificate that renews itself around it.
//!
//! ```text
//! state_dir/identity.key   PKCS#8, PEM, 0600: created once, never replaced
//! state_dir/identity.crt   PEM, 0600: replaced when less than 30 of its 90 days are left
//! ```
//!
//! Peers pin the key ([`Fingerprint`]), so a renewal needs no action from anybody. Everything about the certificate can be
//! rebuilt from the key: a missing, damaged or foreign certificate file is replaced, a damaged key is an error.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, PublicKeyData};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::{CertifiedKey, SigningKey};

use super::trust::Fingerprint;

/// How long a certificate is valid.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(90 * 24 * 3600);

/// A certificate with less than this left is replaced.
pub const RENEW_BEFORE_EXPIRY: Duration = Duration::from_secs(30 * 24 * 3600);

/// Certificates start this much in the past, for peers whose clock is behind.
const BACKDATE: Duration = Duration::from_secs(24 * 3600);

/// Larger than any file this module writes.
const FILE_LIMIT: u64 = 64 * 1024;

const KEY_FILE: &str = "identity.key";
const CERTIFICATE_FILE: &str = "identity.crt";

/// The site's key with its current certificate. Handshakes read the certificate without a lock.
#[derive(Debug)]
pub struct Identity {
    key: KeyPair,
    signing_key: Arc<dyn SigningKey>,
    fingerprint: Fingerprint,
    current: ArcSwap<Current>,
    directory: PathBuf,
}

#[derive(Debug)]
struct Current {
    certified: Arc<CertifiedKey>,
    expires: SystemTime,
}

impl Identity {
    /// Loads the identity in `state_dir`, or creates it there. Creates the directory (0700) if it does not exist. Two
    /// processes that do this at the same time end with the same key.
    ///
    /// # Errors
    /// [`IdentityError`] where a file cannot be read or written, where the key is damaged, or where other users may read it.
    pub fn load_or_create(state_dir: &Path, now: SystemTime) -> Result<Arc<Self>, IdentityError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(|source| IdentityError::Io {
                path: state_dir.to_owned(),
                source,
            })?;
        let key_path = state_dir.join(KEY_FILE);
        let key_pem = match read_private(&key_path)? {
            Some(pem) => pem,
            None => create_key(&key_path)?,
        };
        let bad_key = |reason: String| IdentityError::BadKey {
            path: key_path.clone(),
            reason,
        };
        let key = KeyPair::from_pkcs8_pem_and_sign_algo(&key_pem, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(|error| bad_key(error.to_string()))?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let signing_key =
            rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&der).map_err(|error| bad_key(error.to_string()))?;
        let fingerprint = Fingerprint::of_public_key(&key.subject_public_key_info());

        let stored = load_certificate(&state_dir.join(CERTIFICATE_FILE), fingerprint);
        let (der, expires) = match stored {
            Some((der, expires)) if expires > now + RENEW_BEFORE_EXPIRY => (der, expires),
            _ => issue(&key, state_dir, now)?,
        };
        let certified = Arc::new(CertifiedKey::new(vec![der], signing_key.clone()));
        let current = ArcSwap::from_pointee(Current { certified, expires });
        Ok(Arc::new(Self {
            key,
            signing_key,
            fingerprint,
            current,
            directory: state_dir.to_owned(),
        }))
    }

    /// What peers pin.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// When the current certificate ends.
    #[must_use]
    pub fn expires(&self) -> SystemTime {
        self.current.load().expires
    }

    /// Replaces the certificate if less than [`RENEW_BEFORE_EXPIRY`] is left, and says whether it did. The key and so the
    /// fingerprint stay; new handshakes show the new certificate, connections that exist are not disturbed.
    ///
    /// # Errors
    /// [`IdentityError`] where the new certificate cannot be made or written; the old one stays in use then.
    pub fn renew_if_due(&self, now: SystemTime) -> Result<bool, IdentityError> {
        if self.expires() > now + RENEW_BEFORE_EXPIRY {
            return Ok(false);
        }
        let (der, expires) = issue(&self.key, &self.directory, now)?;
        let certified = Arc::new(CertifiedKey::new(vec![der], self.signing_key.clone()));
        self.current.store(Arc::new(Current { certified, expires }));
        Ok(true)
    }

    /// A secret of this site for one purpose, the same at every start.
    pub(super) fn derived_secret(&self, purpose: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("longhaul 2026-11 transport secret of a site");
        hasher.update(&self.key.serialize_der());
        hasher.update(purpose.as_bytes());
        *hasher.finalize().as_bytes()
    }

    /// Key and certificate as handshakes show them.
    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        self.current.load().certified.clone()
    }
}

/// The identity of this site cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file or the directory cannot be read or written.
    #[error("the identity file {} cannot be read or written: {source}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The key file holds something else.
    #[error(
        "the identity key {} is damaged ({reason}); restore it from a backup, or remove it to become a new site that \
         every peer must pair with again",
        path.display()
    )]
    BadKey {
        /// Which file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// Other users of the machine may read the key.
    #[error("the identity key {} can be read by other users (mode {mode:04o}); run chmod 600 on it", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A certificate could not be made from the key.
    #[error("no certificate could be made from the identity key: {reason}")]
    Issue {
        /// Why.
        reason: String,
    },
}

/// Creates the key file unless another process was faster, and returns what the file holds then.
fn create_key(path: &Path) -> Result<String, IdentityError> {
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|error| IdentityError::Issue {
        reason: error.to_string(),
    })?;
    write_private(path, key.serialize_pem().as_bytes(), Publish::IfAbsent)?;
    read_private(path)?.ok_or_else(|| IdentityError::Io {
        path: path.to_owned(),
        source: io::ErrorKind::NotFound.into(),
    })
}

/// Makes a certificate that starts a day ago and ends [`CERTIFICATE_LIFETIME`] from `now`, and stores it.
fn issue(
    key: &KeyPair,
    directory: &Path,
    now: SystemTime,
) -> Result<(CertificateDer<'static>, SystemTime), IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "longhaul gateway");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    // X.509 has whole seconds.
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let now = UNIX_EPOCH + Duration::from_secs(seconds);
    let expires = now + CERTIFICATE_LIFETIME;
    params.not_before = now.checked_sub(BACKDATE).unwrap_or(now).into();
    params.not_after = expires.into();
    let certificate = params.self_signed(key).map_err(|error| IdentityError::Issue {
        reason: error.to_string(),
    })?;
    write_private(
        &directory.join(CERTIFICATE_FILE),
        certificate.pem().as_bytes(),
        Publish::Replace,
    )?;
    Ok((certificate.der().clone(), expires))
}

/// The stored certificate and its end, if it is a certificate of this key.
fn load_certificate(path: &Path, key: Fingerprint) -> Option<(CertificateDer<'static>, SystemTime)> {
    let pem = read_bounded(File::open(path).ok()?).ok()?;
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (rest, parsed) = x509_parser::parse_x509_certificate(&der).ok()?;
    let expires = u64::try_from(parsed.validity().not_after.timestamp()).ok()?;
    let belongs = rest.is_empty() && Fingerprint::of_public_key(parsed.public_key().raw) == key;
    belongs.then(|| (der.clone(), UNIX_EPOCH + Duration::from_secs(expires)))
}

/// The content of a file that only its owner may read, or `None` where there is no such file.
fn read_private(path: &Path) -> Result<Option<String>, IdentityError> {
    let failed = |source| IdentityError::Io {
        path: path.to_owned(),
        source,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(failed(source)),
    };
    let mode = file.metadata().map_err(failed)?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    read_bounded(file).map(Some).map_err(failed)
}

fn read_bounded(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(FILE_LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

enum Publish {
    IfAbsent,
    Replace,
}

/// Writes a 0600 file so that a reader, or a restart after a power cut, sees it whole or not at all.
fn write_private(path: &Path, content: &[u8], publish: Publish) -> Result<(), IdentityError> {
    let failed = |source| IdentityError::Io {
        path: path.to_owned(),
        source,
    };
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        match publish {
            Publish::Replace => fs::rename(&temporary, path)?,
            Publish::IfAbsent => match fs::hard_link(&temporary, path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                _ => fs::remove_file(&temporary)?,
            },
        }
        path.parent()
            .map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn at(days: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs((20_000 + days) * 24 * 3600)
    }

    #[test]
    fn the_key_is_private_and_survives_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("new").join("state");
        let first = Identity::load_or_create(&state, at(0)).unwrap();
        for file in [KEY_FILE, CERTIFICATE_FILE] {
            assert_eq!(
                fs::metadata(state.join(file)).unwrap().permissions().mode() & 0o777,
                0o600,
                "{file}"
            );
        }
        let second = Identity::load_or_create(&state, at(59)).unwrap();
        assert_eq!(first.fingerprint(), second.fingerprint());
        assert_eq!(
            first.certified().cert,
            second.certified().cert,
            "not due, so not renewed"
        );
        assert_eq!(fs::read_dir(&state).unwrap().count(), 2, "no temporary file stays");
    }

    #[test]
    fn a_certificate_is_renewed_below_30_days_and_not_above_with_the_same_key() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(dir.path(), at(0)).unwrap();
        let (key, certificate) = (identity.fingerprint(), identity.certified().cert.clone());
        assert!(!identity.renew_if_due(at(59)).unwrap());
        assert_eq!(identity.certified().cert, certificate);
        assert!(identity.renew_if_due(at(60)).unwrap());
        assert_ne!(identity.certified().cert, certificate);
        assert_eq!((identity.fingerprint(), identity.expires()), (key, at(150)));
        assert_eq!(
            Identity::load_or_create(dir.path(), at(61)).unwrap().expires(),
            at(150),
            "the renewal is stored"
        );
    }

    #[test]
    fn a_damaged_or_foreign_certificate_is_replaced_and_a_damaged_key_is_not() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let identity = Identity::load_or_create(dir.path(), at(0)).unwrap();
        Identity::load_or_create(other.path(), at(0)).unwrap();
        fs::copy(other.path().join(CERTIFICATE_FILE), dir.path().join(CERTIFICATE_FILE)).unwrap();
        let again = Identity::load_or_create(dir.path(), at(1)).unwrap();
        assert_eq!((again.fingerprint(), again.expires()), (identity.fingerprint(), at(91)));

        fs::write(
            dir.path().join(KEY_FILE),
            "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        )
        .unwrap();
        let error = Identity::load_or_create(dir.path(), at(1)).unwrap_err();
        assert!(matches!(error, IdentityError::BadKey { .. }), "{error}");
    }

    #[test]
    fn a_key_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Identity::load_or_create(dir.path(), at(0)).unwrap();
        let key = dir.path().join(KEY_FILE);
        fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
        let error = Identity::load_or_create(dir.path(), at(0)).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o400)).unwrap();
        Identity::load_or_create(dir.path(), at(0)).unwrap();
    }

    #[test]
    fn processes_that_create_the_identity_together_agree_on_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(KEY_FILE);
        let (one, two) = (create_key(&path).unwrap(), create_key(&path).unwrap());
        assert_eq!(one, two);
    }
}
