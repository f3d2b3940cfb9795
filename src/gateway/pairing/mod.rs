//! Pairing: two gateways come to trust each other by a code that a person carried from one to the other.
//!
//! Here are the two drivers, over a QUIC connection with the ALPN `longhaul-pair/1` whose TLS checked both keys but
//! trusts neither; what is judged is in [`exchange`]. One bidirectional stream carries one request and one answer. The
//! inviting side trusts first, since the other has proved itself by then; when the answer is lost, the same gateway
//! asks again with the same code.

pub mod code;
pub mod exchange;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

pub use self::code::{InvalidCode, InviteCode, Secret};
use self::exchange::{Binding, Invitations, Joiner, Joining, MAX_MESSAGE_BYTES, MAX_VALIDITY, Reason, refuse};
pub use self::exchange::{JoinError, TooManyInvitations};
use crate::api::Paired;
use crate::config::PeerAddress;
use crate::config::units::show_duration;
use crate::store::trust::{Fingerprint, PairedBy, TrustError, TrustStore, TrustedPeer};

/// Who this gateway is, while it pairs.
#[derive(Clone, Debug)]
pub struct Local {
    /// Name of its site.
    pub site: String,
    /// Of its public key.
    pub fingerprint: Fingerprint,
    /// Where others reach it, if it knows.
    pub address: Option<PeerAddress>,
}

/// Makes a code for another site, which reaches us at `address`; it is good for `valid_for`, at most [`MAX_VALIDITY`].
///
/// # Errors
/// [`InviteError`] where that is too long, there are too many invitations, or no randomness.
pub fn invite(
    invitations: &Mutex<Invitations>,
    local: &Local,
    address: PeerAddress,
    valid_for: Duration,
) -> Result<InviteCode, InviteError> {
    if valid_for > MAX_VALIDITY {
        return Err(InviteError::TooLong);
    }
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|error| InviteError::NoRandomness {
        reason: error.to_string(),
    })?;
    let secret = Secret(secret);
    lock(invitations).add(now(), secret, valid_for)?;
    Ok(InviteCode {
        site: local.site.clone(),
        address,
        fingerprint: local.fingerprint,
        secret,
        expires_at: seconds_since_1970().saturating_add(valid_for.as_secs()),
    })
}

/// Answers a gateway with the key `theirs` that connected to pair, and trusts it if it was invited.
///
/// # Errors
/// [`PairingError`]; it is not trusted then, unless only the answer was lost ([`PairingError::Connection`] after it was
/// stored), and it has been told why.
pub async fn answer(
    connection: &quinn::Connection,
    invitations: &Mutex<Invitations>,
    local: &Local,
    theirs: Fingerprint,
    trust: &Arc<TrustStore>,
) -> Result<Paired, PairingError> {
    within_deadline(async {
        let binding = Binding {
            exporter: exporter(connection)?,
            inviter: local.fingerprint,
            joiner: theirs,
        };
        let (mut sender, mut receiver) = connection.accept_bi().await.map_err(PairingError::connection)?;
        let request = receiver
            .read_to_end(MAX_MESSAGE_BYTES)
            .await
            .map_err(PairingError::connection)?;
        let verdict = lock(invitations).verify(now(), &request, &binding, &local.site);
        let (answer, result) = match admit(verdict, theirs, trust).await {
            Ok((joiner, paired)) => (joiner.accept(), Ok(paired)),
            Err(error) => (refuse(error.reason()), Err(error)),
        };
        sender.write_all(&answer).await.map_err(PairingError::connection)?;
        sender.finish().map_err(PairingError::connection)?;
        // The caller drops the connection; what is not yet delivered would be lost with it.
        let _ = sender.stopped().await;
        result
    })
    .await
}

/// Uses `code` on a connection to the gateway with the key `theirs`, and trusts it if it proves to have invited us.
///
/// # Errors
/// [`PairingError`]; it is not trusted here then.
pub async fn join(
    connection: &quinn::Connection,
    code: &InviteCode,
    local: &Local,
    theirs: Fingerprint,
    trust: &Arc<TrustStore>,
) -> Result<Paired, PairingError> {
    if code.site == local.site || code.fingerprint == local.fingerprint {
        return Err(PairingError::Denied(Reason::SameSite));
    }
    // Before the other side trusts us: afterwards it would be too late to find that we cannot trust it.
    trust.may_add(&code.site, &theirs)?;
    within_deadline(async {
        let binding = Binding {
            exporter: exporter(connection)?,
            inviter: theirs,
            joiner: local.fingerprint,
        };
        let (joining, request) = Joining::begin(code, binding, &local.site, local.address.as_ref())?;
        let (mut sender, mut receiver) = connection.open_bi().await.map_err(PairingError::connection)?;
        sender.write_all(&request).await.map_err(PairingError::connection)?;
        sender.finish().map_err(PairingError::connection)?;
        let answer = receiver
            .read_to_end(MAX_MESSAGE_BYTES)
            .await
            .map_err(PairingError::connection)?;
        joining.conclude(&answer)?;
        keep(
            trust,
            &code.site,
            theirs,
            Some(code.address.clone()),
            PairedBy::Accepted,
        )
        .await
    })
    .await
}

/// Trusts a peer whose fingerprint a person has compared.
///
/// # Errors
/// [`PairingError::Trust`]; it is not trusted then.
pub async fn trust_by_fingerprint(
    trust: &Arc<TrustStore>,
    peer: &str,
    fingerprint: Fingerprint,
    address: Option<PeerAddress>,
) -> Result<Paired, PairingError> {
    keep(trust, peer, fingerprint, address, PairedBy::Fingerprint).await
}

async fn admit(
    verdict: Result<Joiner, Reason>,
    theirs: Fingerprint,
    trust: &Arc<TrustStore>,
) -> Result<(Joiner, Paired), PairingError> {
    let joiner = verdict.map_err(PairingError::Denied)?;
    let paired = keep(trust, &joiner.site, theirs, joiner.address.clone(), PairedBy::Invited).await?;
    Ok((joiner, paired))
}

/// Trust counts once it is on the disk, which takes a sync.
async fn keep(
    trust: &Arc<TrustStore>,
    name: &str,
    fingerprint: Fingerprint,
    address: Option<PeerAddress>,
    by: PairedBy,
) -> Result<Paired, PairingError> {
    let peer = TrustedPeer {
        fingerprint,
        address: address.clone(),
        paired_at: seconds_since_1970(),
        by,
    };
    let (trust, name) = (Arc::clone(trust), name.to_owned());
    let stored = tokio::task::spawn_blocking(move || trust.add(&name, peer).map(|()| name)).await;
    let name = stored.expect("adding trust does not panic and is not cancelled")?;
    Ok(Paired {
        peer: name,
        fingerprint,
        address: address.map(|address| address.to_string()),
        by,
    })
}

async fn within_deadline<T>(pairing: impl Future<Output = Result<T, PairingError>>) -> Result<T, PairingError> {
    tokio::time::timeout(DEADLINE, pairing)
        .await
        .unwrap_or(Err(PairingError::Silent))
}

fn exporter(connection: &quinn::Connection) -> Result<[u8; 32], PairingError> {
    let mut exporter = [0; 32];
    connection
        .export_keying_material(&mut exporter, EXPORTER_LABEL, b"")
        .map_err(|_| PairingError::Connection {
            reason: "TLS exports no keying material".to_owned(),
        })?;
    Ok(exporter)
}

fn lock(invitations: &Mutex<Invitations>) -> std::sync::MutexGuard<'_, Invitations> {
    // Each change is made as a whole or not at all.
    invitations.lock().unwrap_or_else(PoisonError::into_inner)
}

#[expect(clippy::disallowed_methods, reason = "the edge of pairing reads the clock")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "the edge of pairing reads the clock")]
fn seconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// There is no invitation.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    /// It was asked to be valid for more than [`MAX_VALIDITY`].
    #[error("a code can be valid for {} at most", show_duration(MAX_VALIDITY))]
    TooLong,
    /// There are enough.
    #[error(transparent)]
    TooMany(#[from] TooManyInvitations),
    /// The system gives no random bytes.
    #[error("no invitation was made, because the system gives no random bytes: {reason}")]
    NoRandomness {
        /// What the system said.
        reason: String,
    },
}

/// Two gateways do not trust each other.
#[derive(Debug, thiserror::Error)]
pub enum PairingError {
    /// We refuse the other side.
    #[error("a gateway that wants to pair was refused: {0}")]
    Denied(Reason),
    /// The other side refuses, or is not who it should be.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Trust cannot be kept.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The connection broke.
    #[error("the connection broke while pairing: {reason}; try the same code again")]
    Connection {
        /// What was seen.
        reason: String,
    },
    /// The other side said nothing in time.
    #[error("the other gateway said nothing for {} seconds; try the same code again", DEADLINE.as_secs())]
    Silent,
}

impl PairingError {
    fn connection(error: impl std::fmt::Display) -> Self {
        Self::Connection {
            reason: error.to_string(),
        }
    }

    /// What the other side is told.
    fn reason(&self) -> Reason {
        match self {
            Self::Denied(reason) => *reason,
            Self::Trust(TrustError::NameTaken { .. } | TrustError::KeyKnown { .. }) => Reason::NameTaken,
            Self::Trust(_) | Self::Join(_) | Self::Connection { .. } | Self::Silent => Reason::NotStored,
        }
    }
}

const EXPORTER_LABEL: &[u8] = b"EXPORTER-longhaul-pair/1";

/// Two round trips, two syncs, and a retransmission, many times over.
const DEADLINE: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests;
