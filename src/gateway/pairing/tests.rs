//! The drivers over real connections on loopback.

use std::net::{Ipv4Addr, SocketAddr};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;

use super::*;

/// One gateway: an endpoint of its own and its trust.
struct Site {
    local: Local,
    trust: Arc<TrustStore>,
    invitations: Mutex<Invitations>,
    endpoint: quinn::Endpoint,
    certificate: CertificateDer<'static>,
    _directory: TempDir,
}

fn site(name: &str, key: u8) -> Site {
    let certified = rcgen::generate_simple_self_signed(vec!["gateway".to_owned()]).unwrap();
    let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der()));
    let certificate = certified.cert.der().clone();
    let server = quinn::ServerConfig::with_single_cert(vec![certificate.clone()], private).unwrap();
    let directory = tempfile::tempdir().unwrap();
    Site {
        // The transport reads fingerprints off certificates; here they are given.
        local: Local {
            site: name.to_owned(),
            fingerprint: Fingerprint([key; 32]),
            address: None,
        },
        trust: Arc::new(TrustStore::load(directory.path()).unwrap()),
        invitations: Mutex::default(),
        endpoint: quinn::Endpoint::server(server, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap(),
        certificate,
        _directory: directory,
    }
}

/// A connection from `joiner` to `inviter`, both ends.
async fn connect(joiner: &Site, inviter: &Site) -> (quinn::Connection, quinn::Connection) {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(inviter.certificate.clone()).unwrap();
    let config = quinn::ClientConfig::with_root_certificates(Arc::new(roots)).unwrap();
    let address = inviter.endpoint.local_addr().unwrap();
    let connecting = joiner.endpoint.connect_with(config, address, "gateway").unwrap();
    let accepting = async { inviter.endpoint.accept().await.unwrap().await };
    let (theirs, ours) = tokio::join!(connecting, accepting);
    (theirs.unwrap(), ours.unwrap())
}

#[test]
fn a_code_is_valid_for_a_day_and_not_longer() {
    let frankfurt = Local {
        site: "frankfurt".to_owned(),
        fingerprint: Fingerprint([1; 32]),
        address: None,
    };
    let address = || "frankfurt.example.net".parse().unwrap();
    let invitations = Mutex::default();
    assert!(invite(&invitations, &frankfurt, address(), MAX_VALIDITY).is_ok());
    let longer = MAX_VALIDITY + Duration::from_secs(1);
    let error = invite(&invitations, &frankfurt, address(), longer).unwrap_err();
    assert!(error.to_string().contains("24h"), "{error}");
}

/// `joiner` uses `code` at `inviter`.
async fn pair(
    joiner: &Site,
    inviter: &Site,
    code: &InviteCode,
) -> (Result<Paired, PairingError>, Result<Paired, PairingError>) {
    let (theirs, ours) = connect(joiner, inviter).await;
    let joining = async {
        let result = join(&theirs, code, &joiner.local, inviter.local.fingerprint, &joiner.trust).await;
        theirs.close(0_u32.into(), b"");
        result
    };
    let answering = answer(
        &ours,
        &inviter.invitations,
        &inviter.local,
        joiner.local.fingerprint,
        &inviter.trust,
    );
    tokio::join!(joining, answering)
}

fn invite_by(inviter: &Site) -> InviteCode {
    let address = "gw.example.net:4646".parse().unwrap();
    let code = invite(
        &inviter.invitations,
        &inviter.local,
        address,
        exchange::DEFAULT_VALIDITY,
    )
    .unwrap();
    // As it travels.
    code.to_string().parse().unwrap()
}

#[tokio::test]
async fn a_code_makes_both_sites_trust_each_other_durably() {
    let (frankfurt, tokyo) = (site("frankfurt", 1), site("tokyo", 2));
    let code = invite_by(&frankfurt);
    let (joined, answered) = pair(&tokyo, &frankfurt, &code).await;
    assert_eq!(joined.unwrap().peer, "frankfurt");
    assert_eq!(answered.unwrap().peer, "tokyo");
    tokyo.trust.reload().unwrap();
    frankfurt.trust.reload().unwrap();
    let at_tokyo = tokyo.trust.get("frankfurt").unwrap();
    assert_eq!(
        (at_tokyo.fingerprint, at_tokyo.by),
        (Fingerprint([1; 32]), PairedBy::Accepted)
    );
    assert_eq!(at_tokyo.address, Some("gw.example.net:4646".parse().unwrap()));
    let at_frankfurt = frankfurt.trust.get("tokyo").unwrap();
    assert_eq!(
        (at_frankfurt.fingerprint, at_frankfurt.by),
        (Fingerprint([2; 32]), PairedBy::Invited)
    );

    // Tokyo missed the answer, say: the same code again does no harm. Another gateway gets nothing with it.
    let (joined, answered) = pair(&tokyo, &frankfurt, &code).await;
    assert!(joined.is_ok() && answered.is_ok());
    let osaka = site("osaka", 3);
    let (joined, answered) = pair(&osaka, &frankfurt, &code).await;
    assert!(matches!(
        joined,
        Err(PairingError::Join(JoinError::Refused {
            reason: Reason::Used,
            ..
        }))
    ));
    assert!(matches!(answered, Err(PairingError::Denied(Reason::Used))));
    assert!(osaka.trust.peers().is_empty());
    assert_eq!(frankfurt.trust.peers().len(), 1);
}

#[tokio::test]
async fn an_invitation_does_not_replace_a_peer_that_is_paired() {
    let (frankfurt, tokyo, impostor) = (site("frankfurt", 1), site("tokyo", 2), site("tokyo", 3));
    let (joined, _) = pair(&tokyo, &frankfurt, &invite_by(&frankfurt)).await;
    joined.unwrap();
    let (joined, answered) = pair(&impostor, &frankfurt, &invite_by(&frankfurt)).await;
    assert!(matches!(
        joined,
        Err(PairingError::Join(JoinError::Refused {
            reason: Reason::NameTaken,
            ..
        }))
    ));
    assert!(matches!(
        answered,
        Err(PairingError::Trust(TrustError::NameTaken { .. }))
    ));
    assert_eq!(
        frankfurt.trust.get("tokyo").unwrap().fingerprint,
        tokyo.local.fingerprint
    );
    assert!(impostor.trust.peers().is_empty());
}

#[tokio::test]
async fn a_peer_that_sends_too_much_is_dropped_and_not_trusted() {
    let (frankfurt, tokyo) = (site("frankfurt", 1), site("tokyo", 2));
    let _ = invite_by(&frankfurt);
    let (theirs, ours) = connect(&tokyo, &frankfurt).await;
    let flooding = async {
        let (mut sender, _receiver) = theirs.open_bi().await.unwrap();
        // The other side stops reading; how far this gets does not matter.
        let _ = sender.write_all(&vec![0; MAX_MESSAGE_BYTES + 1]).await;
        let _ = sender.finish();
        let _ = sender.stopped().await;
    };
    let answering = answer(
        &ours,
        &frankfurt.invitations,
        &frankfurt.local,
        tokyo.local.fingerprint,
        &frankfurt.trust,
    );
    let ((), answered) = tokio::join!(flooding, answering);
    assert!(matches!(answered, Err(PairingError::Connection { .. })));
    assert!(frankfurt.trust.peers().is_empty());
}

#[tokio::test]
async fn trust_that_cannot_be_kept_is_refused_before_anything_is_sent() {
    let (frankfurt, tokyo) = (site("frankfurt", 1), site("tokyo", 2));
    trust_by_fingerprint(&tokyo.trust, "frankfurt", Fingerprint([9; 32]), None)
        .await
        .unwrap();
    let code = invite_by(&frankfurt);
    let (theirs, _ours) = connect(&tokyo, &frankfurt).await;
    let joined = join(&theirs, &code, &tokyo.local, frankfurt.local.fingerprint, &tokyo.trust).await;
    assert!(matches!(joined, Err(PairingError::Trust(TrustError::NameTaken { .. }))));
}
