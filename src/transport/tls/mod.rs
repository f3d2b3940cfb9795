//! The TLS of gateway to gateway: 1.3 only, a post-quantum group first, no 0-RTT, no resumption, both sides by pinned key.
//!
//! One certificate proves one thing here: that the other end holds the private key which this site paired with. Names,
//! chains and authorities play no part, so exactly one self-signed certificate is expected. What a connection is for is told by
//! its ALPN, so that a pairing peer, who is still unknown, can never reach anything but pairing.
//!
//! Resumption is off because a resumed session skips the certificate, and so the question whether the peer is still trusted.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn_proto::crypto;
use quinn_proto::transport_parameters::TransportParameters;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error as TlsError, OtherError, SignatureScheme,
};

use super::bundle::{self, Bundle};
use super::identity::Identity;
use super::trust::{Fingerprint, TrustAnchors};

/// What a connection is for; its ALPN on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConnectionKind {
    /// Commands, acknowledgements, heartbeats: little data that must never wait.
    Control,
    /// Lanes of guest data.
    Bulk,
    /// The introduction of two gateways by an invitation.
    Pairing,
}

impl ConnectionKind {
    /// The ALPN protocol id; that of a [`Bundle`]'s connections is another. The number rises with a change that older gateways cannot speak.
    #[must_use]
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Self::Control => b"longhaul-control/1",
            Self::Bulk => b"longhaul-bulk/1",
            Self::Pairing => b"longhaul-pair/1",
        }
    }

    /// What the peer and we agreed on in the handshake, and the connections that the peer makes together with this one.
    pub(super) fn of_handshake(data: Option<Box<dyn Any>>) -> Option<(Self, Bundle)> {
        let data = data?.downcast::<HandshakeData>().ok()?;
        let protocol = data.protocol?;
        if protocol == bundle::ALPN {
            return Some((Self::Bulk, Bundle::named(&data.server_name?)?));
        }
        [Self::Control, Self::Bulk, Self::Pairing]
            .into_iter()
            .find(|kind| kind.alpn() == protocol)
            .map(|kind| (kind, Bundle::alone()))
    }
}

/// The ways in which a certificate is refused; becomes the reason in the peer's log or in ours.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("the gateway's key {0} is not trusted here; pair the two gateways")]
    Unknown(Fingerprint),
    #[error("the gateway showed the key {shown} and not {expected}")]
    AnotherKey { shown: Fingerprint, expected: Fingerprint },
    #[error("a gateway shows exactly one certificate, not a chain")]
    Chain,
}

impl From<Refusal> for TlsError {
    fn from(refusal: Refusal) -> Self {
        CertificateError::Other(OtherError(Arc::new(refusal))).into()
    }
}

/// Clocks of two sites may differ by this much before a certificate counts as not yet valid or expired.
const CLOCK_ALLOWANCE: Duration = Duration::from_secs(3600);

/// TLS for a connection that this site opens as `kind`, to the gateway that owns `expected`. With `trust`, the key must
/// also be trusted at the time of the handshake; a pairing has none. One of several in a `bundle` says so.
pub(super) fn client(
    identity: Arc<Identity>,
    kind: ConnectionKind,
    expected: Fingerprint,
    trust: Option<Arc<TrustAnchors>>,
    bundle: Bundle,
) -> Result<QuicClientConfig, TlsError> {
    let mut config = client_config(identity, kind, expected, trust)?;
    if !bundle.is_alone() {
        config.alpn_protocols = vec![bundle::ALPN.to_vec()];
        config.enable_sni = true;
    }
    Ok(config
        .try_into()
        .expect("the provider has the QUIC initial cipher suite"))
}

fn client_config(
    identity: Arc<Identity>,
    kind: ConnectionKind,
    expected: Fingerprint,
    trust: Option<Arc<TrustAnchors>>,
) -> Result<rustls::ClientConfig, TlsError> {
    let provider = provider();
    let verifier = PinnedServer {
        expected,
        trust,
        algorithms: provider.signature_verification_algorithms,
    };
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(OwnCertificate(identity)));
    config.alpn_protocols = vec![kind.alpn().to_vec()];
    config.enable_early_data = false;
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// TLS for connections that peers open to this site.
///
/// A key that is not trusted gets no further than the handshake, with one exception: while `invitation` is set, a client
/// that offers [`ConnectionKind::Pairing`] and nothing else completes it, and the caller reads its fingerprint.
pub(super) struct ServerTls {
    identity: Arc<Identity>,
    trust: Arc<TrustAnchors>,
    invitation: Arc<AtomicBool>,
    kinds: Vec<ConnectionKind>,
    provider: Arc<CryptoProvider>,
    /// Answers what does not belong to one handshake.
    shared: Arc<QuicServerConfig>,
}

impl ServerTls {
    pub(super) fn new(
        identity: Arc<Identity>,
        trust: Arc<TrustAnchors>,
        invitation: Arc<AtomicBool>,
        kinds: Vec<ConnectionKind>,
    ) -> Result<Self, TlsError> {
        let provider = provider();
        let config = server_config(&provider, &identity, &trust, &invitation, &kinds)?;
        let shared = Arc::new(into_quic(config));
        Ok(Self {
            identity,
            trust,
            invitation,
            kinds,
            provider,
            shared,
        })
    }
}

impl crypto::ServerConfig for ServerTls {
    fn initial_keys(
        &self,
        version: u32,
        dst_cid: &quinn_proto::ConnectionId,
    ) -> Result<crypto::Keys, crypto::UnsupportedVersion> {
        self.shared.initial_keys(version, dst_cid)
    }

    fn retry_tag(&self, version: u32, orig_dst_cid: &quinn_proto::ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.shared.retry_tag(version, orig_dst_cid, packet)
    }

    /// rustls tells the certificate verifier nothing about the ClientHello. So each handshake gets a resolver and a
    /// verifier of its own, which share what the client offered.
    fn start_session(self: Arc<Self>, version: u32, params: &TransportParameters) -> Box<dyn crypto::Session> {
        let config = server_config(
            &self.provider,
            &self.identity,
            &self.trust,
            &self.invitation,
            &self.kinds,
        )
        .expect("the same configuration was accepted when this was built");
        Arc::new(into_quic(config)).start_session(version, params)
    }
}

/// The configuration of one handshake.
fn server_config(
    provider: &Arc<CryptoProvider>,
    identity: &Arc<Identity>,
    trust: &Arc<TrustAnchors>,
    invitation: &Arc<AtomicBool>,
    kinds: &[ConnectionKind],
) -> Result<rustls::ServerConfig, TlsError> {
    let offers_only_pairing = Arc::new(AtomicBool::new(false));
    let verifier = PinnedClient {
        trust: trust.clone(),
        invitation: invitation.clone(),
        offers_only_pairing: offers_only_pairing.clone(),
        algorithms: provider.signature_verification_algorithms,
    };
    let resolver = OfferReader {
        certificate: OwnCertificate(identity.clone()),
        offers_only_pairing,
    };
    let mut config = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = kinds.iter().map(|kind| kind.alpn().to_vec()).collect();
    if kinds.contains(&ConnectionKind::Bulk) {
        config.alpn_protocols.push(bundle::ALPN.to_vec());
    }
    config.max_early_data_size = 0;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

fn into_quic(config: rustls::ServerConfig) -> QuicServerConfig {
    config
        .try_into()
        .expect("the provider has the QUIC initial cipher suite")
}

/// aws-lc-rs with the post-quantum hybrid first; AES-128 first, since the packet cipher is the largest part of our CPU time
/// that can be chosen.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::{cipher_suite, kx_group};
    Arc::new(CryptoProvider {
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519],
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..aws_lc_rs::default_provider()
    })
}

/// Shows this site's certificate as it is at the time of the handshake.
#[derive(Debug)]
struct OwnCertificate(Arc<Identity>);

impl ResolvesClientCert for OwnCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.certified())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// [`OwnCertificate`] at the server, which also notes what the client offers.
#[derive(Debug)]
struct OfferReader {
    certificate: OwnCertificate,
    offers_only_pairing: Arc<AtomicBool>,
}

impl ResolvesServerCert for OfferReader {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let only_pairing = hello.alpn().is_some_and(|mut offered| {
            offered.next() == Some(ConnectionKind::Pairing.alpn()) && offered.next().is_none()
        });
        self.offers_only_pairing.store(only_pairing, Ordering::Relaxed);
        Some(self.certificate.0.certified())
    }
}

#[derive(Debug)]
struct PinnedServer {
    expected: Fingerprint,
    trust: Option<Arc<TrustAnchors>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let shown = check(end_entity, intermediates, now)?;
        if shown != self.expected {
            return Err(Refusal::AnotherKey {
                shown,
                expected: self.expected,
            }
            .into());
        }
        if self.trust.as_ref().is_some_and(|trust| !trust.contains(&shown)) {
            return Err(Refusal::Unknown(shown).into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("QUIC has no TLS 1.2".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct PinnedClient {
    trust: Arc<TrustAnchors>,
    invitation: Arc<AtomicBool>,
    offers_only_pairing: Arc<AtomicBool>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientCertVerifier for PinnedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        let shown = check(end_entity, intermediates, now)?;
        let invited = self.offers_only_pairing.load(Ordering::Relaxed) && self.invitation.load(Ordering::Acquire);
        if invited || self.trust.contains(&shown) {
            return Ok(ClientCertVerified::assertion());
        }
        Err(Refusal::Unknown(shown).into())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(TlsError::General("QUIC has no TLS 1.2".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// One self-signed certificate that is valid now; the fingerprint of its key.
fn check(
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<Fingerprint, TlsError> {
    if !intermediates.is_empty() {
        return Err(Refusal::Chain.into());
    }
    let (rest, certificate) =
        x509_parser::parse_x509_certificate(end_entity).map_err(|_| CertificateError::BadEncoding)?;
    if !rest.is_empty() {
        return Err(CertificateError::BadEncoding.into());
    }
    if certificate.issuer().as_raw() != certificate.subject().as_raw() {
        return Err(Refusal::Chain.into());
    }
    let allowance = i64::try_from(CLOCK_ALLOWANCE.as_secs()).unwrap_or(0);
    let now = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    let validity = certificate.validity();
    if now.saturating_add(allowance) < validity.not_before.timestamp() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now.saturating_sub(allowance) > validity.not_after.timestamp() {
        return Err(CertificateError::Expired.into());
    }
    Ok(Fingerprint::of_public_key(certificate.public_key().raw))
}

/// The key that the other end of a connection proved to hold.
pub(super) fn peer_fingerprint(identity: Option<Box<dyn Any>>) -> Option<Fingerprint> {
    let chain = identity?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    let (_, certificate) = x509_parser::parse_x509_certificate(chain.first()?).ok()?;
    Some(Fingerprint::of_public_key(certificate.public_key().raw))
}

#[cfg(test)]
mod tests;
