//! Certificates for QEMU's own TLS: an authority, a server and a client, as files that `tls-creds-x509` reads.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use serde_json::{Value, json};

/// Name of the credentials in each QEMU.
pub(super) const CREDENTIALS: &str = "tls0";
/// What the server's certificate says.
pub(super) const HOSTNAME: &str = "destination";

/// Arguments of `object-add` for a QEMU whose certificates are in `directory`.
pub(super) fn credentials(directory: &Path, endpoint: &str) -> Value {
    json!({
        "qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": directory.display().to_string(), "endpoint": endpoint,
        "verify-peer": true,
    })
}

/// Makes an authority and writes its certificate, and those of a server and a client, into each directory.
///
/// # Errors
/// A sentence.
pub(super) fn write_certificates(directories: &[&Path]) -> Result<(), String> {
    let files = make().map_err(|error| format!("no certificates can be made: {error}"))?;
    for directory in directories {
        for (name, text) in &files {
            let path = directory.join(name);
            let written = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&path)
                .and_then(|mut file| file.write_all(text.as_bytes()));
            written.map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        }
    }
    Ok(())
}

/// Names as QEMU looks for them (docs/system/tls.rst), and contents.
fn make() -> Result<Vec<(String, String)>, rcgen::Error> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let authority_key = KeyPair::generate()?;
    let authority_certificate = authority.self_signed(&authority_key)?;
    let issuer = Issuer::new(authority, authority_key);
    let mut files = vec![("ca-cert.pem".to_owned(), authority_certificate.pem())];
    for (name, purpose) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let mut params = CertificateParams::new(vec![HOSTNAME.to_owned()])?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &issuer)?;
        files.push((format!("{name}-cert.pem"), certificate.pem()));
        files.push((format!("{name}-key.pem"), key.serialize_pem()));
    }
    Ok(files)
}
