//! The server side of the control socket: one route for each [`Command`], and the socket itself.
//!
//! A live gateway is known by the lock it holds beside its socket, not by an answer: a hung gateway keeps its socket,
//! and the socket of a dead one is replaced in one step, so that no client ever finds none.

use std::fs::{File, OpenOptions, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use axum::body::{Body, Bytes};
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, Path as UrlPath, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use http_body_util::BodyExt as _;
use serde::Serialize;
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use super::types::{Refusal, RefusalKind};
use super::{Command, Reply};
use crate::proto::page::MigrationId;

/// The control socket of a gateway that runs. Dropping it removes the socket.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    place: Place,
}

/// Removed on drop; the lock is held until then, and the lock file stays, since removing it would race with the next
/// holder.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    _lock: File,
}

impl ControlSocket {
    /// Listens on `path` with mode 0600, in the place of the socket of a dead gateway. Must be called within a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`BindError::InUse`] where another gateway runs on it, [`BindError::Occupied`] where something else is there,
    /// [`BindError::Io`] otherwise.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        let io = |source| BindError::Io {
            path: path.to_owned(),
            source,
        };
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(beside(path, "lock"))
            .map_err(io)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(BindError::InUse { path: path.to_owned() }),
            Err(error) => return Err(io(error.into())),
        }
        match std::fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(BindError::Occupied { path: path.to_owned() });
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        // Bound under another name and renamed: nobody can connect before the mode is set.
        let new = beside(path, "new");
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&new).map_err(io)?;
        std::fs::set_permissions(&new, Permissions::from_mode(0o600)).map_err(io)?;
        std::fs::rename(&new, path).map_err(io)?;
        Ok(Self {
            listener,
            place: Place {
                path: path.to_owned(),
                _lock: lock,
            },
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.place.path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    path.with_extension(format!("sock.{suffix}"))
}

/// Answers requests on `socket` by `commands` until `shutdown`. Requests that are under way are answered; those who
/// follow a migration are let go when the gateway drops their sender.
///
/// # Errors
/// Those of the listener, where it cannot go on.
pub async fn serve(
    socket: ControlSocket,
    commands: mpsc::Sender<Command>,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let ControlSocket { listener, place } = socket;
    let routes = routes(commands).into_make_service_with_connect_info::<Asker>();
    let served = axum::serve(listener, routes).with_graceful_shutdown(shutdown).await;
    drop(place);
    served
}

/// Who asks, for the record: the name of a user, or its number.
#[derive(Clone, Debug)]
struct Asker(String);

impl Connected<IncomingStream<'_, UnixListener>> for Asker {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(match stream.io().peer_cred() {
            Ok(credentials) => user(credentials.uid()),
            Err(_) => "an unknown user".to_owned(),
        })
    }
}

fn user(id: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    // passwd(5): name, password, id, and more.
    let name = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id) && name.len() <= MAX_NAME_BYTES).then_some(name)
    });
    name.map_or_else(|| format!("uid {id}"), str::to_owned)
}

fn routes(commands: mpsc::Sender<Command>) -> Router {
    Router::new()
        .route("/v1/identity", get(identity))
        .route("/v1/migrations", get(list).post(start))
        .route("/v1/migrations/check", post(check))
        .route("/v1/migrations/{id}", get(status))
        .route("/v1/migrations/{id}/events", get(follow))
        .route("/v1/migrations/{id}/cancel", post(cancel))
        .route("/v1/migrations/{id}/switchover", post(switch_over))
        .route("/v1/migrations/{id}/limits", post(adjust))
        .route("/v1/resolve", post(resolve))
        .route("/v1/link-tests", post(test_link))
        .route("/v1/disk-moves", post(move_disk))
        .route("/v1/disk-moves/check", post(check_move_disk))
        .route("/v1/disk-moves/follow", post(follow_move_disk))
        .route("/v1/disk-moves/cancel", post(cancel_move_disk))
        .route("/v1/peers", get(peers).post(pair_by_fingerprint))
        .route("/v1/peers/{name}", delete(unpair))
        .route("/v1/invitations", post(invite))
        .route("/v1/invitations/accept", post(accept_invite))
        .fallback(|| async {
            Refusal::new(
                RefusalKind::NotFound,
                "there is no such path in this version of the API",
            )
        })
        .layer(DefaultBodyLimit::max(MAX_REQUEST_BYTES))
        .with_state(Commands(commands))
}

#[derive(Clone)]
struct Commands(mpsc::Sender<Command>);

impl Commands {
    /// Puts a command to the gateway and waits for its answer.
    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refusal> {
        let stopping = || {
            Refusal::new(
                RefusalKind::Unavailable,
                "the gateway is stopping and takes no more requests",
            )
        };
        let (reply, answer) = Reply::channel();
        self.0.send(command(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    async fn answer<T: Serialize>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<Json<T>, Refusal> {
        self.ask(command).await.map(Json)
    }
}

async fn identity(State(commands): State<Commands>) -> impl IntoResponse {
    commands.answer(|reply| Command::Identity { reply }).await
}

async fn list(State(commands): State<Commands>) -> impl IntoResponse {
    commands.answer(|reply| Command::List { reply }).await
}

async fn start(State(commands): State<Commands>, Request(request): Request<super::StartRequest>) -> impl IntoResponse {
    commands.answer(|reply| Command::Start { request, reply }).await
}

async fn check(State(commands): State<Commands>, Request(request): Request<super::StartRequest>) -> impl IntoResponse {
    commands.answer(|reply| Command::Check { request, reply }).await
}

async fn status(State(commands): State<Commands>, UrlPath(id): UrlPath<String>) -> Result<impl IntoResponse, Refusal> {
    let migration = parse_id(&id)?;
    commands.answer(|reply| Command::Status { migration, reply }).await
}

async fn cancel(State(commands): State<Commands>, UrlPath(id): UrlPath<String>) -> Result<impl IntoResponse, Refusal> {
    let migration = parse_id(&id)?;
    commands.answer(|reply| Command::Cancel { migration, reply }).await
}

async fn switch_over(
    State(commands): State<Commands>,
    UrlPath(id): UrlPath<String>,
) -> Result<impl IntoResponse, Refusal> {
    let migration = parse_id(&id)?;
    commands.answer(|reply| Command::SwitchOver { migration, reply }).await
}

async fn adjust(
    State(commands): State<Commands>,
    UrlPath(id): UrlPath<String>,
    Request(adjustment): Request<super::Adjustment>,
) -> Result<impl IntoResponse, Refusal> {
    let migration = parse_id(&id)?;
    let command = |reply| Command::Adjust {
        migration,
        adjustment,
        reply,
    };
    commands.answer(command).await
}

async fn follow(State(commands): State<Commands>, UrlPath(id): UrlPath<String>) -> Result<Response, Refusal> {
    let migration = parse_id(&id)?;
    let events = commands.ask(|reply| Command::Follow { migration, reply }).await?;
    Ok(lines(events))
}

async fn resolve(
    State(commands): State<Commands>,
    ConnectInfo(Asker(by)): ConnectInfo<Asker>,
    Request(request): Request<super::ResolveRequest>,
) -> impl IntoResponse {
    commands.answer(|reply| Command::Resolve { request, by, reply }).await
}

async fn test_link(
    State(commands): State<Commands>,
    Request(request): Request<super::LinkTestRequest>,
) -> impl IntoResponse {
    commands.answer(|reply| Command::TestLink { request, reply }).await
}

async fn move_disk(
    State(commands): State<Commands>,
    Request(request): Request<super::MoveDiskRequest>,
) -> Result<Response, Refusal> {
    let command = |reply| Command::MoveDisk { request, reply };
    Ok(lines(commands.ask(command).await?))
}

async fn check_move_disk(
    State(commands): State<Commands>,
    Request(request): Request<super::MoveDiskRequest>,
) -> impl IntoResponse {
    commands.answer(|reply| Command::CheckMoveDisk { request, reply }).await
}

async fn follow_move_disk(
    State(commands): State<Commands>,
    Request(of): Request<super::DiskOfVm>,
) -> Result<Response, Refusal> {
    let command = |reply| Command::FollowMoveDisk { of, reply };
    Ok(lines(commands.ask(command).await?))
}

async fn cancel_move_disk(
    State(commands): State<Commands>,
    Request(of): Request<super::DiskOfVm>,
) -> impl IntoResponse {
    commands.answer(|reply| Command::CancelMoveDisk { of, reply }).await
}

async fn peers(State(commands): State<Commands>) -> impl IntoResponse {
    commands.answer(|reply| Command::Peers { reply }).await
}

async fn pair_by_fingerprint(
    State(commands): State<Commands>,
    Request(request): Request<super::PairByFingerprint>,
) -> impl IntoResponse {
    commands
        .answer(|reply| Command::PairByFingerprint { request, reply })
        .await
}

async fn unpair(State(commands): State<Commands>, UrlPath(peer): UrlPath<String>) -> impl IntoResponse {
    commands.answer(|reply| Command::Unpair { peer, reply }).await
}

async fn invite(
    State(commands): State<Commands>,
    Request(request): Request<super::InviteRequest>,
) -> impl IntoResponse {
    commands.answer(|reply| Command::Invite { request, reply }).await
}

async fn accept_invite(
    State(commands): State<Commands>,
    Request(request): Request<super::AcceptInvite>,
) -> impl IntoResponse {
    commands.answer(|reply| Command::AcceptInvite { request, reply }).await
}

fn parse_id(text: &str) -> Result<MigrationId, Refusal> {
    text.parse()
        .map_err(|_| Refusal::new(RefusalKind::Invalid, "the id of a migration has 32 hexadecimal digits"))
}

/// A JSON body whose mistakes are told as a [`Refusal`].
struct Request<T>(T);

impl<S, T> FromRequest<S> for Request<T>
where
    Json<T>: FromRequest<S, Rejection = JsonRejection>,
    S: Send + Sync,
{
    type Rejection = Refusal;

    async fn from_request(request: axum::extract::Request, state: &S) -> Result<Self, Refusal> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(Refusal::new(RefusalKind::Invalid, rejection.body_text())),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = match self.kind {
            RefusalKind::Invalid => StatusCode::BAD_REQUEST,
            RefusalKind::NotFound => StatusCode::NOT_FOUND,
            RefusalKind::Conflict => StatusCode::CONFLICT,
            RefusalKind::Refused => StatusCode::UNPROCESSABLE_ENTITY,
            RefusalKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            RefusalKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        (status, Json(self)).into_response()
    }
}

fn lines<T: Serialize + Send + 'static>(events: mpsc::Receiver<T>) -> Response {
    let body = Body::new(Lines(events).boxed_unsync());
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// Events as lines of JSON. It ends when the gateway drops the sender.
struct Lines<T>(mpsc::Receiver<T>);

impl<T: Serialize> axum::body::HttpBody for Lines<T> {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(context).map(|event| {
            let mut line = serde_json::to_vec(&event?).expect("an event is plain data");
            line.push(b'\n');
            Some(Ok(hyper::body::Frame::data(line.into())))
        })
    }
}

/// The control socket cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another gateway runs.
    #[error("another gateway runs on the control socket {}; stop it, or give this one another state_dir", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket has its name.
    #[error("{} exists and is not a socket; move it away", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on the control socket {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// useradd(8) takes no longer ones.
const MAX_NAME_BYTES: usize = 32;

/// The largest request is an invitation code with its quotes.
const MAX_REQUEST_BYTES: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_known_by_name_or_else_by_number() {
        assert_eq!(user(0), "root");
        assert_eq!(user(u32::MAX - 1), "uid 4294967294");
    }

    #[tokio::test]
    async fn a_second_gateway_is_refused_and_a_dead_ones_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        let first = ControlSocket::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(ControlSocket::bind(&path), Err(BindError::InUse { .. })));
        drop(first);
        assert!(!path.exists());

        // A killed gateway leaves its socket behind without the lock.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let second = ControlSocket::bind(&path).unwrap();
        std::os::unix::net::UnixStream::connect(second.path()).unwrap();
    }

    #[tokio::test]
    async fn a_file_in_the_place_of_the_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("control.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(BindError::Occupied { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }
}
