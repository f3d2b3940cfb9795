//! A channel of the control connection: messages both ways on one QUIC stream.

use bytes::BytesMut;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::proto::wire::message::{self, MessageError};
use crate::transport::{Doubling, PeerConnection};

/// One end of a channel. Dropping it ends both directions.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) sender: ChannelSender,
    pub(crate) receiver: ChannelReceiver,
}

/// The half that sends.
#[derive(Debug)]
pub(crate) struct ChannelSender {
    stream: quinn::SendStream,
    doubling: Doubling,
}

/// The half that receives.
#[derive(Debug)]
pub(crate) struct ChannelReceiver {
    stream: quinn::RecvStream,
    received: BytesMut,
}

impl Channel {
    pub(crate) fn new(connection: &PeerConnection, sender: quinn::SendStream, receiver: quinn::RecvStream) -> Self {
        Self {
            sender: ChannelSender {
                stream: sender,
                doubling: connection.doubling(),
            },
            receiver: ChannelReceiver {
                stream: receiver,
                received: BytesMut::new(),
            },
        }
    }

    /// Opens a channel with its first message.
    ///
    /// # Errors
    /// [`ChannelError`] where the connection is gone.
    pub(crate) async fn open<M: Serialize>(connection: &PeerConnection, first: &M) -> Result<Self, ChannelError> {
        let (sender, receiver) = connection.open_bi().await?;
        let mut channel = Self::new(connection, sender, receiver);
        channel.sender.send(first).await?;
        Ok(channel)
    }

    /// Asks one thing on a channel of its own and waits for the answer.
    ///
    /// # Errors
    /// [`ChannelError`] where the connection is gone or the answer is not one.
    pub(crate) async fn ask<Q: Serialize, A: DeserializeOwned>(
        connection: &PeerConnection,
        question: &Q,
    ) -> Result<A, ChannelError> {
        let mut channel = Self::open(connection, question).await?;
        channel.receiver.receive().await?.ok_or(ChannelError::Closed)
    }
}

impl ChannelSender {
    /// Sends one message. Not cancel-safe: a message that was cut in half ends the channel.
    pub(crate) async fn send<M: Serialize>(&mut self, message: &M) -> Result<(), ChannelError> {
        let bytes = message::encode(message)?;
        self.stream.write_chunk(bytes).await?;
        Ok(())
    }

    /// For a message that somebody waits for, or that what follows must not wait for.
    pub(crate) fn doubling(&self) -> &Doubling {
        &self.doubling
    }

    /// What is sent here waits for what others send on the connection.
    pub(crate) fn wait_for_others(&self) {
        // An error here says that the stream is closed already: nothing is sent on it.
        let _ = self.stream.set_priority(-1);
    }

    /// Nothing follows; what was sent still arrives.
    pub(crate) fn finish(&mut self) {
        // An error here says that the stream is closed already, which is what was asked for.
        let _ = self.stream.finish();
    }
}

impl ChannelReceiver {
    /// The next message; `None` where the peer has finished. Cancel-safe: bytes that were read are kept.
    pub(crate) async fn receive<M: DeserializeOwned>(&mut self) -> Result<Option<M>, ChannelError> {
        loop {
            if let Some(message) = message::decode(&mut self.received)? {
                return Ok(Some(message));
            }
            match self.stream.read_chunk(message::MAX_MESSAGE, true).await? {
                Some(chunk) => self.received.extend_from_slice(&chunk.bytes),
                None if self.received.is_empty() => return Ok(None),
                None => return Err(MessageError::Truncated.into()),
            }
        }
    }
}

/// A channel cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelError {
    /// The connection is lost or was closed.
    #[error("the connection to the peer is lost: {0}")]
    Connection(#[from] quinn::ConnectionError),
    /// The peer does not take messages any more.
    #[error("the peer ended the channel: {0}")]
    Write(#[from] quinn::WriteError),
    /// The peer does not read what is sent.
    #[error("the peer does not read what is sent to it")]
    NotRead,
    /// The peer does not send messages any more.
    #[error("the peer ended the channel: {0}")]
    Read(#[from] quinn::ReadError),
    /// What came is not a message.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The peer finished without the answer.
    #[error("the peer ended the channel without an answer")]
    Closed,
}
