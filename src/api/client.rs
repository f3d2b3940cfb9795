//! The client side of the control socket: one connection for each request.

use std::io;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::link_test::{LinkTest, LinkTestRequest};
use super::move_disk::{DiskOfVm, MoveDiskEvent, MoveDiskPlan, MoveDiskRequest};
use super::types::{
    AcceptInvite, Adjustment, Cancellation, DryRun, Event, Identity, Invitation, InviteRequest, Limits,
    MigrationStatus, MigrationSummary, PairByFingerprint, Paired, PeerStatus, Refusal, Resolution, ResolveRequest,
    StartRequest, Started, Switchover,
};
use crate::proto::page::MigrationId;

/// Talks to the gateway on one control socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client of the gateway on `socket`. Connects with each request, not here.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    /// Starts a migration.
    ///
    /// # Errors
    /// [`ClientError`], as every request.
    pub async fn start(&self, request: &StartRequest) -> Result<Started, ClientError> {
        self.ask(Method::POST, "/v1/migrations", Some(request)).await
    }

    /// Makes every check and a forecast; nothing moves.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn check(&self, request: &StartRequest) -> Result<DryRun, ClientError> {
        self.ask(Method::POST, "/v1/migrations/check", Some(request)).await
    }

    /// Every migration that is remembered.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn list(&self) -> Result<Vec<MigrationSummary>, ClientError> {
        self.ask(Method::GET, "/v1/migrations", NOTHING).await
    }

    /// Everything that is known of one migration.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn status(&self, migration: MigrationId) -> Result<MigrationStatus, ClientError> {
        self.ask(Method::GET, &format!("/v1/migrations/{migration}"), NOTHING)
            .await
    }

    /// Cancels a migration.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn cancel(&self, migration: MigrationId) -> Result<Cancellation, ClientError> {
        self.ask(Method::POST, &format!("/v1/migrations/{migration}/cancel"), NOTHING)
            .await
    }

    /// Lets a migration go on that waits with its disks copied.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn switch_over(&self, migration: MigrationId) -> Result<Switchover, ClientError> {
        let path = format!("/v1/migrations/{migration}/switchover");
        self.ask(Method::POST, &path, NOTHING).await
    }

    /// Changes what a migration may take of its link.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn adjust(&self, migration: MigrationId, adjustment: &Adjustment) -> Result<Limits, ClientError> {
        let path = format!("/v1/migrations/{migration}/limits");
        self.ask(Method::POST, &path, Some(adjustment)).await
    }

    /// Looks on until a migration has ended.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn follow(&self, migration: MigrationId) -> Result<Following, ClientError> {
        let path = format!("/v1/migrations/{migration}/events");
        self.events(Method::GET, &path, NOTHING).await
    }

    /// Moves a disk within the site, and looks on. Dropping it ends the looking on only.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn move_disk(&self, request: &MoveDiskRequest) -> Result<Following<MoveDiskEvent>, ClientError> {
        self.events(Method::POST, "/v1/disk-moves", Some(request)).await
    }

    /// Makes every check of such a move; nothing is made.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn check_move_disk(&self, request: &MoveDiskRequest) -> Result<MoveDiskPlan, ClientError> {
        self.ask(Method::POST, "/v1/disk-moves/check", Some(request)).await
    }

    /// Looks on until a move has ended.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn follow_move_disk(&self, of: &DiskOfVm) -> Result<Following<MoveDiskEvent>, ClientError> {
        self.events(Method::POST, "/v1/disk-moves/follow", Some(of)).await
    }

    /// Cancels a move.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn cancel_move_disk(&self, of: &DiskOfVm) -> Result<Cancellation, ClientError> {
        self.ask(Method::POST, "/v1/disk-moves/cancel", Some(of)).await
    }

    /// States where a VM is that is in doubt.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn resolve(&self, request: &ResolveRequest) -> Result<Resolution, ClientError> {
        self.ask(Method::POST, "/v1/resolve", Some(request)).await
    }

    /// Measures the link to a peer; takes as long as is asked for. Dropping it ends the test.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn test_link(&self, request: &LinkTestRequest) -> Result<LinkTest, ClientError> {
        self.ask(Method::POST, "/v1/link-tests", Some(request)).await
    }

    /// Every peer that is configured or paired.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn peers(&self) -> Result<Vec<PeerStatus>, ClientError> {
        self.ask(Method::GET, "/v1/peers", NOTHING).await
    }

    /// Makes a code for the other site.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn invite(&self, request: &InviteRequest) -> Result<Invitation, ClientError> {
        self.ask(Method::POST, "/v1/invitations", Some(request)).await
    }

    /// Uses a code from the other site.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn accept_invite(&self, request: &AcceptInvite) -> Result<Paired, ClientError> {
        self.ask(Method::POST, "/v1/invitations/accept", Some(request)).await
    }

    /// Trusts a peer whose fingerprint a person has compared.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn pair_by_fingerprint(&self, request: &PairByFingerprint) -> Result<Paired, ClientError> {
        self.ask(Method::POST, "/v1/peers", Some(request)).await
    }

    /// Trusts a peer no more. `peer` must be a valid name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn unpair(&self, peer: &str) -> Result<(), ClientError> {
        self.ask(Method::DELETE, &format!("/v1/peers/{peer}"), NOTHING).await
    }

    /// Who this gateway is.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn identity(&self) -> Result<Identity, ClientError> {
        self.ask(Method::GET, "/v1/identity", NOTHING).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        request: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let body = self.send(method, path, request).await?;
        let bytes = self.read_all(body).await?;
        serde_json::from_slice(&bytes).map_err(|error| self.garbled(error.to_string()))
    }

    async fn events<T>(
        &self,
        method: Method,
        path: &str,
        request: Option<&impl Serialize>,
    ) -> Result<Following<T>, ClientError> {
        Ok(Following {
            body: self.send(method, path, request).await?,
            pending: BytesMut::new(),
            socket: self.socket.clone(),
            events: PhantomData,
        })
    }

    /// The body of a successful answer.
    async fn send(
        &self,
        method: Method,
        path: &str,
        request: Option<&impl Serialize>,
    ) -> Result<Incoming, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| ClientError::Unreachable {
                socket: self.socket.clone(),
                source,
            })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.lost(&error))?;
        // Ends when the sender and the body are dropped; its error also comes out at whichever of them is waited for.
        tokio::spawn(connection);
        let body = match request {
            Some(request) => serde_json::to_vec(request).expect("a request is plain data"),
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "longhaul")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.garbled(error.to_string()))?;
        let response: Response<Incoming> = sender.send_request(request).await.map_err(|error| self.lost(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response.into_body());
        }
        let bytes = self.read_all(response.into_body()).await?;
        match serde_json::from_slice::<Refusal>(&bytes) {
            Ok(refusal) => Err(ClientError::Refused(refusal)),
            Err(_) => Err(self.garbled(format!("it answered with status {status}"))),
        }
    }

    async fn read_all(&self, body: Incoming) -> Result<Bytes, ClientError> {
        match Limited::new(body, MAX_ANSWER_BYTES).collect().await {
            Ok(collected) => Ok(collected.to_bytes()),
            Err(error) => match error.downcast::<hyper::Error>() {
                Ok(error) => Err(self.lost(&error)),
                Err(error) => Err(self.garbled(error.to_string())),
            },
        }
    }

    fn lost(&self, error: &hyper::Error) -> ClientError {
        ClientError::Lost {
            socket: self.socket.clone(),
            reason: error.to_string(),
        }
    }

    fn garbled(&self, reason: String) -> ClientError {
        ClientError::Garbled {
            socket: self.socket.clone(),
            reason,
        }
    }
}

/// The events of one migration, or of one move of a disk.
#[derive(Debug)]
pub struct Following<T = Event> {
    body: Incoming,
    pending: BytesMut,
    socket: PathBuf,
    events: PhantomData<T>,
}

impl<T: DeserializeOwned> Following<T> {
    /// The next event; `None` where the gateway has stopped telling, after the report or because it stops itself.
    /// Cancel-safe.
    ///
    /// # Errors
    /// [`ClientError::Lost`] where the gateway has gone, [`ClientError::Garbled`] for what is no event.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line = self.pending.split_to(end + 1);
                return match serde_json::from_slice(&line) {
                    Ok(event) => Ok(Some(event)),
                    Err(error) => Err(self.garbled(error.to_string())),
                };
            }
            if self.pending.len() > MAX_LINE_BYTES {
                return Err(self.garbled(format!("an event has more than {MAX_LINE_BYTES} bytes")));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.pending.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    return Err(ClientError::Lost {
                        socket: self.socket.clone(),
                        reason: error.to_string(),
                    });
                }
                None => return Ok(None),
            }
        }
    }

    fn garbled(&self, reason: String) -> ClientError {
        ClientError::Garbled {
            socket: self.socket.clone(),
            reason,
        }
    }
}

/// A request was not carried out, or nobody knows.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// There was no gateway to ask: nothing has happened.
    #[error("{}", unreachable(socket, source))]
    Unreachable {
        /// Where one was looked for.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The gateway went away before it answered: what was asked for may have happened.
    #[error("the gateway on {} went away before it answered: {reason}", socket.display())]
    Lost {
        /// Its socket.
        socket: PathBuf,
        /// What was seen.
        reason: String,
    },
    /// What answered does not speak our language.
    #[error("what answered on {} is not a gateway of this version: {reason}", socket.display())]
    Garbled {
        /// Its socket.
        socket: PathBuf,
        /// What was seen.
        reason: String,
    },
    /// The gateway said no: nothing has happened.
    #[error(transparent)]
    Refused(#[from] Refusal),
}

fn unreachable(socket: &Path, source: &io::Error) -> String {
    let socket = socket.display();
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            format!(
                "no gateway runs on the control socket {socket}; start `longhaul gateway`, or say where it is by --socket or --config"
            )
        }
        io::ErrorKind::PermissionDenied => {
            format!("the control socket {socket} is for root and the user of the gateway; run this as one of them")
        }
        _ => format!("cannot connect to the control socket {socket}: {source}"),
    }
}

const NOTHING: Option<&()> = None;

/// A list of thousands of migrations fits.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// A report of thousands of rounds fits.
const MAX_LINE_BYTES: usize = 4 << 20;
