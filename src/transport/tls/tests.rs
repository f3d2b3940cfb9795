use std::time::{SystemTime, UNIX_EPOCH};

use rustls::quic::{ClientConnection, ServerConnection, Version};
use rustls::{AlertDescription, NamedGroup, Side};

use super::*;

#[expect(clippy::disallowed_methods, reason = "rustls reads the wall clock in a handshake")]
fn today() -> SystemTime {
    SystemTime::now()
}

struct Site {
    _state_dir: tempfile::TempDir,
    identity: Arc<Identity>,
    trust: Arc<TrustAnchors>,
    invitation: Arc<AtomicBool>,
}

impl Site {
    fn new() -> Self {
        Self::created_at(today())
    }

    fn created_at(now: SystemTime) -> Self {
        let state_dir = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(state_dir.path(), now).unwrap();
        Self {
            _state_dir: state_dir,
            identity,
            trust: Arc::default(),
            invitation: Arc::default(),
        }
    }

    fn server(&self, kinds: &[ConnectionKind]) -> rustls::ServerConfig {
        server_config(&provider(), &self.identity, &self.trust, &self.invitation, kinds).unwrap()
    }

    fn client(&self, kind: ConnectionKind, server: &Site) -> rustls::ClientConfig {
        let trust = (kind != ConnectionKind::Pairing).then(|| self.trust.clone());
        client_config(self.identity.clone(), kind, server.identity.fingerprint(), trust).unwrap()
    }
}

/// Two sites that trust each other.
fn paired() -> (Site, Site) {
    let (server, client) = (Site::new(), Site::new());
    server.trust.insert(client.identity.fingerprint(), "client");
    client.trust.insert(server.identity.fingerprint(), "server");
    (server, client)
}

/// A whole handshake in memory; what each side ended with.
fn handshake(
    server: rustls::ServerConfig,
    client: rustls::ClientConfig,
) -> (ServerConnection, ClientConnection, Result<(), (Side, TlsError)>) {
    let mut server = ServerConnection::new(Arc::new(server), Version::V1, vec![]).unwrap();
    let name = ServerName::try_from("gateway.invalid").unwrap();
    let mut client = ClientConnection::new(Arc::new(client), Version::V1, name, vec![]).unwrap();
    // One call writes what one key protects, so each piece is delivered before the next is written.
    loop {
        let (mut from_client, mut from_server) = (Vec::new(), Vec::new());
        let more = client.write_hs(&mut from_client).is_some();
        if let Err(error) = server.read_hs(&from_client) {
            return (server, client, Err((Side::Server, error)));
        }
        let more = server.write_hs(&mut from_server).is_some() || more;
        if let Err(error) = client.read_hs(&from_server) {
            return (server, client, Err((Side::Client, error)));
        }
        if from_client.is_empty() && from_server.is_empty() && !more {
            break;
        }
    }
    (server, client, Ok(()))
}

const KINDS: &[ConnectionKind] = &[ConnectionKind::Control, ConnectionKind::Pairing];

#[test]
fn a_handshake_negotiates_the_post_quantum_group_and_no_early_data() {
    let (server, client) = paired();
    let (server_end, client_end, result) =
        handshake(server.server(KINDS), client.client(ConnectionKind::Control, &server));
    result.unwrap();
    for group in [
        server_end.negotiated_key_exchange_group(),
        client_end.negotiated_key_exchange_group(),
    ] {
        assert_eq!(group.map(|group| group.name()), Some(NamedGroup::X25519MLKEM768));
    }
    assert_eq!(server_end.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(client_end.alpn_protocol(), Some(ConnectionKind::Control.alpn()));
    assert!(client_end.zero_rtt_keys().is_none() && server_end.zero_rtt_keys().is_none());
    assert!(!client_end.is_early_data_accepted());
}

#[test]
fn a_second_connection_resumes_nothing_and_sends_no_early_data() {
    let (server, client) = paired();
    let (server_config, client_config) = (server.server(KINDS), client.client(ConnectionKind::Control, &server));
    for _ in 0..2 {
        let (server_end, client_end, result) = handshake(server_config.clone(), client_config.clone());
        result.unwrap();
        assert!(client_end.zero_rtt_keys().is_none() && server_end.zero_rtt_keys().is_none());
        assert_eq!(client_end.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

#[test]
fn a_server_refuses_a_client_it_does_not_know() {
    let (server, client) = paired();
    server.trust.remove("client");
    let (end, _, result) = handshake(server.server(KINDS), client.client(ConnectionKind::Control, &server));
    let (side, error) = result.unwrap_err();
    assert_eq!(side, Side::Server);
    assert!(
        error.to_string().contains(&client.identity.fingerprint().to_string()),
        "{error}"
    );
    assert_eq!(end.alert(), Some(AlertDescription::CertificateUnknown));
}

#[test]
fn a_client_refuses_a_server_with_another_key_or_one_it_no_longer_trusts() {
    let (server, client) = paired();
    let elsewhere = Site::new();
    client.trust.insert(elsewhere.identity.fingerprint(), "elsewhere");
    let (_, _, result) = handshake(server.server(KINDS), client.client(ConnectionKind::Control, &elsewhere));
    assert!(matches!(result, Err((Side::Client, _))), "{result:?}");

    client.trust.remove("server");
    let (_, _, result) = handshake(server.server(KINDS), client.client(ConnectionKind::Control, &server));
    assert!(matches!(result, Err((Side::Client, _))), "{result:?}");
}

#[test]
fn an_unknown_client_gets_in_only_to_pair_and_only_while_invited() {
    let (server, client) = (Site::new(), Site::new());
    client.trust.insert(server.identity.fingerprint(), "server");
    let attempt = |kind| handshake(server.server(KINDS), client.client(kind, &server)).2;

    assert!(
        matches!(attempt(ConnectionKind::Pairing), Err((Side::Server, _))),
        "nobody was invited"
    );
    server.invitation.store(true, Ordering::Release);
    attempt(ConnectionKind::Pairing).unwrap();
    assert!(
        matches!(attempt(ConnectionKind::Control), Err((Side::Server, _))),
        "an invitation is for pairing only"
    );
    assert!(
        matches!(attempt(ConnectionKind::Bulk), Err((Side::Server, _))),
        "this endpoint has no bulk"
    );

    let mut both = client.client(ConnectionKind::Pairing, &server);
    both.alpn_protocols.push(ConnectionKind::Control.alpn().to_vec());
    let (_, _, result) = handshake(server.server(KINDS), both);
    assert!(
        matches!(result, Err((Side::Server, _))),
        "offering more than pairing is refused"
    );

    server.invitation.store(false, Ordering::Release);
    assert!(attempt(ConnectionKind::Pairing).is_err());
}

#[test]
fn a_client_without_alpn_is_refused() {
    let (server, client) = paired();
    let mut config = client.client(ConnectionKind::Control, &server);
    config.alpn_protocols.clear();
    let (_, _, result) = handshake(server.server(KINDS), config);
    assert!(result.is_err());
}

#[test]
fn renewal_of_a_certificate_keeps_the_trust() {
    let client = Site::new();
    let server = Site::created_at(today() - Duration::from_secs(80 * 24 * 3600));
    server.trust.insert(client.identity.fingerprint(), "client");
    client.trust.insert(server.identity.fingerprint(), "server");
    let config = server.server(KINDS);
    let shown = |config: &rustls::ServerConfig| {
        let (_, end, result) = handshake(config.clone(), client.client(ConnectionKind::Control, &server));
        result.unwrap();
        end.peer_certificates().unwrap()[0].clone().into_owned()
    };
    let before = shown(&config);
    assert!(server.identity.renew_if_due(today()).unwrap());
    assert_ne!(shown(&config), before, "the next handshake shows the new certificate");
}

#[test]
fn a_certificate_is_accepted_up_to_the_clock_allowance_outside_its_dates_and_not_beyond() {
    let start = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let certificate = Site::created_at(start).identity.certified();
    let day = Duration::from_secs(24 * 3600);
    let checked = |now: SystemTime| {
        let now = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap());
        check(&certificate.cert[0], &[], now).map(|_| ())
    };
    let second = Duration::from_secs(1);
    assert_eq!(checked(start - day - CLOCK_ALLOWANCE), Ok(()));
    assert_eq!(
        checked(start - day - CLOCK_ALLOWANCE - second),
        Err(CertificateError::NotValidYet.into())
    );
    assert_eq!(checked(start + 90 * day + CLOCK_ALLOWANCE), Ok(()));
    assert_eq!(
        checked(start + 90 * day + CLOCK_ALLOWANCE + second),
        Err(CertificateError::Expired.into())
    );
}

#[test]
fn a_chain_and_garbage_are_refused() {
    let own = Site::new().identity.certified();
    let now = UnixTime::since_unix_epoch(today().duration_since(UNIX_EPOCH).unwrap());
    assert!(check(&own.cert[0], &own.cert, now).is_err());
    for length in [0, 1, 10, own.cert[0].len() - 1] {
        let cut = CertificateDer::from(own.cert[0][..length].to_vec());
        assert_eq!(check(&cut, &[], now), Err(CertificateError::BadEncoding.into()));
    }
}
