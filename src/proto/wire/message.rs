//! Messages on channels of the control connection.
//!
//! ```text
//! channel:  source                                   destination
//!           Request ─────────────────────────────▶             one request opens a channel
//!           Hello                                   ─▶ Reply::Hello
//!           Check(Offer)                            ─▶ Reply::Checked
//!           Open(Offer) | Open… | Attach                    ─▶ SessionMessage::Accepted… | Refused, then both ways until closed
//!           Test                                    ─▶ TestMessage, ten times a second until closed
//! channel:  destination                              source
//!           Drives                                  ─▶ Reply::Drives
//! ```
//!
//! A message is a 32-bit little-endian length and that many bytes in postcard's encoding (version 1 of its wire format). Each
//! message is defined once, here; a new one is added at the end of its enum and the version in [`super::hello`] raised.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::hello::Hello;
use crate::proto::ownership;
use crate::proto::page::{ImageDigest, MigrationId};

/// Most bytes of one message. The largest is an offer with its inventory.
pub const MAX_MESSAGE: usize = 512 << 10;

/// Opens a channel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First on every control connection; since version 7 also later.
    Hello(Hello),
    /// Would this migration be accepted? Nothing is kept or started.
    Check(Offer),
    /// Begin this migration; the channel becomes its session.
    Open(Offer),
    /// Go on with a migration on a new channel: its stream, or only the question of who owns the VM.
    Attach {
        /// The migration.
        migration: MigrationId,
        /// Incarnation of the stream that begins now; every frame of an older one is refused. `None`: the source was restarted
        /// and has no stream any more.
        epoch: Option<u32>,
    },
    /// Measures the way there and back; the answer is the same number.
    Ping(u64),
    /// A destination that has heard nothing for a while: does the source still drive this migration?
    Drives {
        /// The migration.
        migration: MigrationId,
    },
    /// Counts lanes of this name and throws them away, until the channel is finished. Since version 3.
    Test {
        /// In the place of a migration in the lanes' frames.
        test: MigrationId,
    },
    /// As `Open`; and the session may begin with an image that the destination has too. Since version 5.
    OpenKnowing {
        /// The migration.
        offer: Offer,
        /// Images at the source, the best first. At most [`MOST_OFFERED`](crate::store::pages::MOST_OFFERED) are looked for.
        images: Vec<KnownImage>,
    },
    /// Begin a stream of another program; the channel becomes its session. Since version 8.
    Tunnel(TunnelOffer),
    /// Go on with such a stream on a new channel. Since version 8.
    AttachTunnel {
        /// The stream.
        stream: MigrationId,
        /// Incarnation of the stream that begins now.
        epoch: u32,
    },
    /// As `Check`, of a VM whose disks are copied with it. Since version 9.
    CheckWithDisks {
        /// The migration.
        offer: Offer,
        /// Its disks.
        disks: Vec<OfferedDisk>,
    },
    /// As `OpenKnowing`, of a VM whose disks are copied with it: once it is accepted, `Disks` follows on another channel. Since version 9.
    OpenWithDisks {
        /// The migration.
        offer: Offer,
        /// As in `OpenKnowing`.
        images: Vec<KnownImage>,
        /// At most [`MAX_DISKS`](crate::proto::disk::stream::MAX_DISKS). Their places in the list are their numbers.
        disks: Vec<OfferedDisk>,
    },
    /// Begin the stream of a migration's disks ([`disk::stream`](crate::proto::disk::stream)), which is carried like a tunnel's. Since version 9.
    Disks {
        /// The migration.
        migration: MigrationId,
        /// How it is carried; the tunnel's name is empty.
        stream: TunnelOffer,
    },
    /// As `Check`, of a VM that is off. Since version 11.
    CheckCold(ColdOffer),
    /// As `OpenWithDisks`, of a VM that is off: its disks are all that there is. Since version 11.
    OpenCold(ColdOffer),
    /// As what is in it, with disks put where the source's operator wants them. Since version 12.
    Placed {
        /// What is asked.
        request: Placeable,
        /// At most one for each disk.
        places: Vec<DiskPlace>,
    },
}

/// Requests that come with disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placeable {
    /// As `CheckWithDisks`.
    Check {
        /// The migration.
        offer: Offer,
        /// Its disks.
        disks: Vec<OfferedDisk>,
    },
    /// As `OpenWithDisks`.
    Open {
        /// The migration.
        offer: Offer,
        /// As in `OpenKnowing`.
        images: Vec<KnownImage>,
        /// As in `OpenWithDisks`.
        disks: Vec<OfferedDisk>,
    },
    /// As `CheckCold`.
    CheckCold(ColdOffer),
    /// As `OpenCold`.
    OpenCold(ColdOffer),
}

impl Request {
    /// The same with disks put elsewhere, where it comes with any.
    #[must_use]
    pub fn with_places(self, places: Vec<DiskPlace>) -> Self {
        if places.is_empty() {
            return self;
        }
        let request = match self {
            Self::CheckWithDisks { offer, disks } => Placeable::Check { offer, disks },
            Self::OpenWithDisks { offer, images, disks } => Placeable::Open { offer, images, disks },
            Self::CheckCold(offer) => Placeable::CheckCold(offer),
            Self::OpenCold(offer) => Placeable::OpenCold(offer),
            other => return other,
        };
        Self::Placed { request, places }
    }
}

/// Where a disk is put at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPlace {
    /// The disk, as people call it or as the inventory names it.
    pub disk: String,
    /// A pool of the destination and a file in it: `POOL/FILE`.
    pub place: String,
}

/// The migration of a VM that is off.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColdOffer {
    /// Drawn by the source, never reused.
    pub migration: MigrationId,
    /// Name of the VM, the same in both gateways' configuration.
    pub vm: String,
    /// As in `OpenWithDisks`; at least one.
    pub disks: Vec<OfferedDisk>,
}

/// A disk of a VM that is to be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedDisk {
    /// As the inventory names it. At most 256 bytes.
    pub name: String,
    /// What the guest sees, bytes.
    pub size_bytes: u64,
    /// What its image takes at the source, bytes: room that the destination needs.
    pub allocated_bytes: u64,
}

/// A stream of a program that connected at the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelOffer {
    /// In the place of a migration, on channels and in the lanes' frames. Drawn by the source, never reused.
    pub stream: MigrationId,
    /// Name of the tunnel, the same in both gateways' configuration.
    pub tunnel: String,
    /// Bytes of frames that may be on the way: at most the agreed window.
    pub window_bytes: u64,
    /// Chunks in the session dictionary: at most the agreed limit of pages, and 2^16.
    pub dictionary_pages: u32,
}

/// The memory of a VM, as an earlier migration left it at both sites.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownImage {
    /// The migration that left it.
    pub id: MigrationId,
    /// Of what is in it.
    pub digest: ImageDigest,
}

/// Answer to a request that opens no session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The other side's hello.
    Hello(Hello),
    /// Everything that speaks against the migration, in sentences; empty: it would be accepted.
    Checked(Vec<String>),
    /// The request cannot be served: a sentence for the operator.
    Refused(String),
    /// The number of the ping.
    Pong(u64),
    /// No: it has nothing open of that name, so there is no PERMIT that the destination has not answered, and there will be none.
    Drives(bool),
    /// As `Drives(false)`, and another migration of the same VM to the same place has begun, or is likely to: what has arrived of disks is worth
    /// keeping. Since version 10.
    Followed,
}

/// On the channel of a link test, from its destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TestMessage {
    /// What has arrived so far. The first one says that lanes may come.
    Arrived {
        /// Lanes.
        lanes: u64,
        /// Their bytes.
        lane_bytes: u64,
        /// Time since the first one of these messages, by the destination's clock.
        micros: u64,
    },
    /// The link cannot be tested now, with a sentence for the operator.
    Refused(String),
}

/// A migration, as the source describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Drawn by the source, never reused.
    pub migration: MigrationId,
    /// Name of the VM, the same in both gateways' configuration.
    pub vm: String,
    /// The machine at the source (`hypervisor::qemu::Inventory` as JSON): compared with the one at the destination.
    pub inventory: String,
    /// Whether the guest ran when the migration began; one that was paused stays paused.
    pub was_running: bool,
    /// Whether the vmm stream is reduced or carried as it is.
    pub reduce: bool,
    /// Pages that the source would like in the session dictionary; the smaller of this and the agreed limit is used.
    pub dictionary_pages: u32,
    /// Regions of 4 MiB of guest memory whose pages the dictionary remembers.
    pub regions: u32,
}

/// On the channel of a session, both ways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionMessage {
    /// Destination: its vmm waits for the stream; send.
    Accepted {
        /// Where the frames begin: 0, or what is missing first after a cut.
        held: Held,
    },
    /// Destination: no, with a sentence for the operator.
    Refused {
        /// Why.
        reason: String,
    },
    /// Destination: the decoder has restored everything before `held.next`.
    Ack {
        /// What is held.
        held: Held,
        /// Stream bytes that the destination's vmm has taken.
        vmm_bytes: u64,
        /// Bytes of frames that have arrived in order and wait for the decoder or the vmm: a queue like the source's own, and
        /// counted with it.
        queued_bytes: u64,
    },
    /// Destination: this migration cannot succeed any more; the source stays where it is.
    Failed {
        /// Why.
        reason: String,
    },
    /// Source: stop, the VM stays at the source.
    Cancel {
        /// Why.
        reason: String,
    },
    /// Either: who may run the VM.
    Ownership(ownership::Message),
    /// Destination: the vmm has loaded the whole stream, or a tunnel's program has been given all of it and had its answers taken.
    Loaded,
    /// Destination: as `Accepted` at the beginning; and both begin with the pages of this image, one of those that were offered. Since version 5.
    AcceptedKnowing {
        /// The image.
        image: MigrationId,
    },
    /// Destination of a tunnel's stream: its program has written this. Since version 8.
    Answer {
        /// Bytes that it had written before.
        offset: u64,
        /// At most 16 KiB. None: it has ended, which takes one offset like a byte.
        bytes: Vec<u8>,
    },
    /// Source of a tunnel's stream: its program has taken all answers before this offset. Since version 8.
    AnswersTaken {
        /// The first one that it has not.
        until: u64,
    },
}

/// What a destination holds of a migration's frames: all before `next`, and some after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The first frame that is missing.
    pub next: u64,
    /// Frames after it that have arrived, as ranges `first..end`, ascending and apart. What is not told is sent again.
    pub beyond: Vec<(u64, u64)>,
}

/// The bytes of `message` on a channel.
///
/// # Errors
/// [`MessageError::TooLong`] where it would exceed [`MAX_MESSAGE`].
pub fn encode<M: Serialize>(message: &M) -> Result<Bytes, MessageError> {
    let body = postcard::to_allocvec(message).map_err(|_| MessageError::Malformed)?;
    if body.len() > MAX_MESSAGE {
        return Err(MessageError::TooLong { len: body.len() });
    }
    let mut out = BytesMut::with_capacity(4 + body.len());
    out.put_u32_le(u32::try_from(body.len()).map_err(|_| MessageError::TooLong { len: body.len() })?);
    out.put_slice(&body);
    Ok(out.freeze())
}

/// Takes the next message off the front of `received`; `None` where more bytes are needed.
///
/// # Errors
/// [`MessageError`] where the bytes are not a message of this version.
pub fn decode<M: DeserializeOwned>(received: &mut BytesMut) -> Result<Option<M>, MessageError> {
    let Some(prefix) = received.get(..4) else {
        return Ok(None);
    };
    let len = u32::from_le_bytes(prefix.try_into().expect("four bytes were taken")) as usize;
    if len > MAX_MESSAGE {
        return Err(MessageError::TooLong { len });
    }
    if received.len() < 4 + len {
        return Ok(None);
    }
    received.advance(4);
    let body = received.split_to(len);
    match postcard::take_from_bytes(&body) {
        Ok((message, [])) => Ok(Some(message)),
        _ => Err(MessageError::Malformed),
    }
}

/// Bytes on a channel are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Over the limit.
    #[error("a message of {len} bytes is over the limit of {MAX_MESSAGE}")]
    TooLong {
        /// Length stated.
        len: usize,
    },
    /// Not the encoding of any message of this version.
    #[error("a message does not follow the wire format")]
    Malformed,
    /// The channel ended in the middle of a message.
    #[error("the channel ended in the middle of a message")]
    Truncated,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_survive_any_slicing_of_the_channel() {
        let messages = [
            SessionMessage::Ack {
                held: Held {
                    next: 7,
                    beyond: vec![(9, 12)],
                },
                vmm_bytes: 1 << 40,
                queued_bytes: 9,
            },
            SessionMessage::Refused {
                reason: "no room".into(),
            },
            SessionMessage::Loaded,
        ];
        let bytes: Vec<u8> = messages.iter().flat_map(|message| encode(message).unwrap()).collect();
        for step in 1..bytes.len() {
            let mut received = BytesMut::new();
            let mut decoded = Vec::new();
            for chunk in bytes.chunks(step) {
                received.extend_from_slice(chunk);
                while let Some(message) = decode::<SessionMessage>(&mut received).unwrap() {
                    decoded.push(message);
                }
            }
            assert_eq!(decoded, messages);
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_the_bytes_come() {
        let mut received = BytesMut::from(&(MAX_MESSAGE as u32 + 1).to_le_bytes()[..]);
        assert_eq!(
            decode::<SessionMessage>(&mut received),
            Err(MessageError::TooLong { len: MAX_MESSAGE + 1 })
        );
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), honest_len in any::<bool>()) {
            let mut received = BytesMut::new();
            if honest_len {
                received.put_u32_le(bytes.len() as u32);
            }
            received.extend_from_slice(&bytes);
            let _ = decode::<Request>(&mut received.clone());
            let _ = decode::<Reply>(&mut received.clone());
            let _ = decode::<SessionMessage>(&mut received);
        }
    }
}
