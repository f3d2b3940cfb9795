//! The exchange as arithmetic: bytes, times and fingerprints in, bytes and verdicts out.
//!
//! ```text
//!   joins (B)                                             invited (A)
//!   Request{invitation, site, address, proof B}  ──────▶  one of our invitations? proof right? not used?
//!   proof right?  ◀──────  Accepted{proof A}               B is trusted
//!   A is trusted
//! ```
//!
//! A proof is a BLAKE3 keyed by the secret over the channel binding of the TLS connection, both fingerprints, both
//! names and B's address, so it is good for this connection between these keys only, and neither side can be made to
//! say the other's proof. The secret itself never travels. An answer that is lost does no harm: the same B may ask
//! again until the invitation expires, or A trusts it no more.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::code::{InviteCode, Secret};
use crate::config::units::{PeerAddress, parse_name};
use crate::store::trust::Fingerprint;

/// What one connection is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Keying material that TLS exported for pairing (RFC 8446, 7.5), the same at both ends of one connection and
    /// nowhere else.
    pub exporter: [u8; 32],
    /// Key of the gateway that invites.
    pub inviter: Fingerprint,
    /// Key of the gateway that joins.
    pub joiner: Fingerprint,
}

/// A gateway that proved to be invited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joiner {
    /// The name its site gives itself.
    pub site: String,
    /// Where it says it is called.
    pub address: Option<PeerAddress>,
    /// Our own proof for it.
    proof: [u8; 32],
}

impl Joiner {
    /// The answer to it. Only once it is trusted: it trusts us when it reads this.
    #[must_use]
    pub fn accept(&self) -> Vec<u8> {
        encode(&Answer::Accepted(self.proof))
    }
}

/// The invitations of this gateway that have not expired. In memory only: a restart voids them.
#[derive(Debug, Default)]
pub struct Invitations {
    open: Vec<Invitation>,
}

#[derive(Debug)]
struct Invitation {
    id: [u8; 16],
    secret: Secret,
    expires: Instant,
    failed_tries: u32,
    used_by: Option<Fingerprint>,
}

impl Invitations {
    /// Takes up the invitation with that secret, which must be fresh random bits.
    ///
    /// # Errors
    /// [`TooManyInvitations`] where there are [`MAX_INVITATIONS`] already.
    pub fn add(&mut self, now: Instant, secret: Secret, valid_for: Duration) -> Result<(), TooManyInvitations> {
        self.expire(now);
        if self.open.len() >= MAX_INVITATIONS {
            return Err(TooManyInvitations);
        }
        let expires = now + valid_for.min(MAX_VALIDITY);
        self.open.push(Invitation {
            id: id_of(&secret),
            secret,
            expires,
            failed_tries: 0,
            used_by: None,
        });
        Ok(())
    }

    /// Until when a gateway that is not trusted may connect to pair; `None` where nobody is invited.
    pub fn open_until(&mut self, now: Instant) -> Option<Instant> {
        self.expire(now);
        self.open.iter().map(|invitation| invitation.expires).max()
    }

    /// Judges the request of a gateway that wants to join us, at `our_site`. A joiner that is given back has used the
    /// invitation; it must be trusted before it is answered by [`Joiner::accept`].
    ///
    /// # Errors
    /// The [`Reason`] to answer with ([`refuse`]).
    pub fn verify(
        &mut self,
        now: Instant,
        request: &[u8],
        binding: &Binding,
        our_site: &str,
    ) -> Result<Joiner, Reason> {
        self.expire(now);
        let request: Request<'_> = exactly(request).ok_or(Reason::Malformed)?;
        let site = parse_name(request.site).map_err(|_| Reason::Malformed)?;
        let address = match request.address {
            "" => None,
            text => Some(text.parse().map_err(|_| Reason::Malformed)?),
        };
        // The id says nothing of the secret, so it may be compared in any time.
        let found = self
            .open
            .iter()
            .position(|invitation| invitation.id == request.invitation);
        let place = found.ok_or(Reason::NotInvited)?;
        let invitation = &mut self.open[place];
        let names = Names {
            inviter: our_site,
            joiner: request.site,
            address: request.address,
        };
        // blake3::Hash compares in constant time.
        if proof(&invitation.secret, Role::Joiner, binding, &names) != blake3::Hash::from_bytes(request.proof) {
            invitation.failed_tries += 1;
            if invitation.failed_tries >= MAX_FAILED_TRIES {
                self.open.remove(place);
            }
            return Err(Reason::WrongProof);
        }
        if binding.joiner == binding.inviter || site == our_site {
            return Err(Reason::SameSite);
        }
        if invitation.used_by.is_some_and(|other| other != binding.joiner) {
            return Err(Reason::Used);
        }
        invitation.used_by = Some(binding.joiner);
        let proof = *proof(&invitation.secret, Role::Inviter, binding, &names).as_bytes();
        Ok(Joiner { site, address, proof })
    }

    /// The gateway with this key is not trusted any more: what it has used does not let it in again.
    pub fn withdraw(&mut self, joiner: &Fingerprint) {
        self.open
            .retain(|invitation| invitation.used_by.as_ref() != Some(joiner));
    }

    fn expire(&mut self, now: Instant) {
        self.open.retain(|invitation| invitation.expires > now);
    }
}

/// The answer to a gateway that is not let in.
#[must_use]
pub fn refuse(reason: Reason) -> Vec<u8> {
    encode(&Answer::Refused(reason))
}

/// This gateway on its way into a site that invited it: the request is sent, the answer is awaited.
#[derive(Debug)]
pub struct Joining<'a> {
    code: &'a InviteCode,
    binding: Binding,
    site: &'a str,
    address: String,
}

impl<'a> Joining<'a> {
    /// Begins with the code of the other site, as `site`, which others reach at `address`. Gives the request to send.
    ///
    /// # Errors
    /// [`JoinError::WrongKey`] where the connection leads to another gateway than the code names; nothing must be sent
    /// then.
    pub fn begin(
        code: &'a InviteCode,
        binding: Binding,
        site: &'a str,
        address: Option<&PeerAddress>,
    ) -> Result<(Self, Vec<u8>), JoinError> {
        if binding.inviter != code.fingerprint {
            return Err(JoinError::WrongKey {
                found: binding.inviter,
                expected: code.fingerprint,
            });
        }
        let joining = Self {
            code,
            binding,
            site,
            address: address.map(ToString::to_string).unwrap_or_default(),
        };
        let request = Request {
            invitation: id_of(&code.secret),
            site,
            address: &joining.address,
            proof: *joining.proof(Role::Joiner).as_bytes(),
        };
        let bytes = encode(&request);
        Ok((joining, bytes))
    }

    /// Ends with the other side's answer. `Ok`: it proved that it knows the secret, and trusts us; it is to be trusted.
    ///
    /// # Errors
    /// [`JoinError`]; it must not be trusted then.
    pub fn conclude(self, answer: &[u8]) -> Result<(), JoinError> {
        match exactly(answer) {
            Some(Answer::Accepted(proof)) if self.proof(Role::Inviter) == blake3::Hash::from_bytes(proof) => Ok(()),
            Some(Answer::Accepted(_)) => Err(JoinError::WrongProof),
            Some(Answer::Refused(reason)) => Err(JoinError::Refused {
                site: self.code.site.clone(),
                reason,
            }),
            None => Err(JoinError::Malformed),
        }
    }

    fn proof(&self, role: Role) -> blake3::Hash {
        let names = Names {
            inviter: &self.code.site,
            joiner: self.site,
            address: &self.address,
        };
        proof(&self.code.secret, role, &self.binding, &names)
    }
}

/// Whose proof it is.
#[derive(Clone, Copy)]
enum Role {
    Joiner = 1,
    Inviter = 2,
}

/// What the two sites call themselves.
struct Names<'a> {
    inviter: &'a str,
    joiner: &'a str,
    address: &'a str,
}

fn proof(secret: &Secret, role: Role, binding: &Binding, names: &Names<'_>) -> blake3::Hash {
    let key = blake3::derive_key("longhaul pairing version 1: proofs", &secret.0);
    let mut hasher = blake3::Hasher::new_keyed(&key);
    hasher.update(&[role as u8]);
    hasher.update(&binding.exporter);
    hasher.update(&binding.inviter.0);
    hasher.update(&binding.joiner.0);
    for name in [names.inviter, names.joiner, names.address] {
        // Each with its length, so that no two triples look alike.
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
    }
    hasher.finalize()
}

/// Names an invitation without giving its secret away.
fn id_of(secret: &Secret) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&blake3::derive_key("longhaul pairing version 1: id of an invitation", &secret.0)[..16]);
    id
}

#[derive(Serialize, Deserialize)]
struct Request<'a> {
    invitation: [u8; 16],
    site: &'a str,
    /// Empty where there is none.
    address: &'a str,
    proof: [u8; 32],
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Accepted([u8; 32]),
    Refused(Reason),
}

/// Why a gateway is not let in. The order is that of the wire; new ones come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Reason {
    /// The request is none.
    #[error("it did not understand the request")]
    Malformed,
    /// No such invitation.
    #[error("the invitation has expired, or its gateway was restarted; ask for a new one")]
    NotInvited,
    /// The proof does not fit to secret, connection and names.
    #[error("the proof of the invitation is wrong; ask for a new one")]
    WrongProof,
    /// Another gateway used it.
    #[error(
        "the invitation was used by another gateway; if that was not yours, unpair it there, and ask for a new one"
    )]
    Used,
    /// A gateway cannot pair with itself, nor with a site of its own name.
    #[error("both sites have the same name or key; give each its own `site`")]
    SameSite,
    /// It cannot be trusted under its name.
    #[error("another gateway is paired there under the name of this site; run `longhaul unpair` there first")]
    NameTaken,
    /// The other side could not keep its trust.
    #[error("it could not write its trust store; its log says why")]
    NotStored,
}

/// The other site cannot be trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// Someone else answered at its address.
    #[error(
        "the gateway that answered has the key {found}, the invitation names {expected}: it is not the one that invited"
    )]
    WrongKey {
        /// Who answered.
        found: Fingerprint,
        /// Who invited.
        expected: Fingerprint,
    },
    /// It does not know the secret.
    #[error("the gateway that answered does not know the invitation that it made: it is not trusted")]
    WrongProof,
    /// It said no.
    #[error("{site} refuses: {reason}")]
    Refused {
        /// Which site.
        site: String,
        /// Why.
        reason: Reason,
    },
    /// Its answer is none.
    #[error("the answer of the other gateway makes no sense: it is not trusted")]
    Malformed,
}

/// There are enough invitations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {MAX_INVITATIONS} invitations that have not expired; use them or wait")]
pub struct TooManyInvitations;

/// The value that `bytes` are, and nothing else.
fn exactly<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    postcard::take_from_bytes(bytes)
        .ok()
        .and_then(|(value, rest)| rest.is_empty().then_some(value))
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(message).expect("a vector takes any message")
}

/// The longest message: a request with the longest name and address has less than 400 bytes.
pub const MAX_MESSAGE_BYTES: usize = 512;

/// Bounds what invitations occupy.
pub const MAX_INVITATIONS: usize = 16;

/// Guessing 256 bits is hopeless anyway; this tells a person that someone tries.
const MAX_FAILED_TRIES: u32 = 5;

/// A code that lies around longer is a key under the mat.
pub const MAX_VALIDITY: Duration = Duration::from_secs(24 * 3600);

/// How long an invitation is valid when nothing else is said.
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(600);

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
