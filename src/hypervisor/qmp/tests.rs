//! The client against a monitor that a test plays by hand.

use super::*;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

const SOON: Duration = Duration::from_secs(10);
const GREETING: &[u8] =
    b"{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}}, \"capabilities\": [\"oob\"]}}\r\n";

/// A listening socket in a directory of its own.
fn monitor() -> (tempfile::TempDir, PathBuf, UnixListener) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    (directory, path, listener)
}

/// Accepts a client, greets it, and answers `qmp_capabilities`.
async fn greet(listener: &UnixListener) -> BufReader<UnixStream> {
    let (mut stream, _) = listener.accept().await.unwrap();
    stream.write_all(GREETING).await.unwrap();
    let mut stream = BufReader::new(stream);
    let (command, id) = command(&mut stream).await;
    assert_eq!(command, "qmp_capabilities");
    stream
        .write_all(format!("{{\"return\": {{}}, \"id\": {id}}}\r\n").as_bytes())
        .await
        .unwrap();
    stream
}

/// The next command and its id.
async fn command(stream: &mut BufReader<UnixStream>) -> (String, u64) {
    let mut line = String::new();
    stream.read_line(&mut line).await.unwrap();
    let message: Value = serde_json::from_str(&line).unwrap();
    (
        message["execute"].as_str().unwrap().to_owned(),
        message["id"].as_u64().unwrap(),
    )
}

/// A client in command mode, and the other end of its connection.
pub(crate) async fn connected() -> (tempfile::TempDir, QmpClient, BufReader<UnixStream>) {
    let (directory, path, listener) = monitor();
    let (client, stream) = tokio::join!(QmpClient::connect(&path, SOON), greet(&listener));
    (directory, client.unwrap(), stream)
}

#[tokio::test]
async fn version_and_process_are_known_after_connecting() {
    let (_directory, client, _stream) = connected().await;
    assert_eq!(
        client.version(),
        QemuVersion {
            major: 10,
            minor: 0,
            micro: 2
        }
    );
    assert_eq!(client.peer_pid(), std::process::id());
}

#[tokio::test]
async fn answers_are_matched_by_id_in_whatever_order_they_come() {
    let (_directory, client, mut stream) = connected().await;
    let answer = async {
        let (first, second) = (command(&mut stream).await, command(&mut stream).await);
        for (name, id) in [second, first] {
            let answer = json!({"return": name, "id": id}).to_string();
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    };
    let (one, two, ()) = tokio::join!(
        client.execute("one", json!({})),
        client.execute("two", json!({})),
        answer
    );
    assert_eq!(one.unwrap(), json!("one"));
    assert_eq!(two.unwrap(), json!("two"));
}

#[tokio::test]
async fn a_refusal_carries_qemus_words() {
    let (_directory, client, mut stream) = connected().await;
    let answer = async {
        let (_, id) = command(&mut stream).await;
        let answer = json!({"error": {"class": "GenericError", "desc": "no such disk"}, "id": id}).to_string();
        stream.write_all(answer.as_bytes()).await.unwrap();
    };
    let (result, ()) = tokio::join!(client.execute("blockdev-del", json!({})), answer);
    let error = result.unwrap_err();
    assert!(error.is_refusal());
    assert_eq!(error.to_string(), "QEMU refused `blockdev-del`: no such disk");
}

#[tokio::test]
async fn a_command_without_an_answer_ends_at_its_deadline_and_its_late_answer_is_ignored() {
    let (_directory, client, mut stream) = connected().await;
    let slow = client.execute_within("slow", json!({}), Duration::from_millis(1)).await;
    assert!(matches!(slow, Err(QmpError::Deadline { .. })), "{slow:?}");
    let answer = async {
        let (_, slow) = command(&mut stream).await;
        let (_, next) = command(&mut stream).await;
        let answers = format!("{{\"return\": 1, \"id\": {slow}}} {{\"return\": 2, \"id\": {next}}}");
        stream.write_all(answers.as_bytes()).await.unwrap();
    };
    let (next, ()) = tokio::join!(client.execute("next", json!({})), answer);
    assert_eq!(next.unwrap(), json!(2));
}

#[tokio::test]
async fn unknown_events_are_passed_on_in_order() {
    let (_directory, client, mut stream) = connected().await;
    let mut events = client.events();
    for name in ["STOP", "NEVER_HEARD_OF", "RESUME"] {
        let event = json!({"event": name, "data": {"x": 1}, "timestamp": {"seconds": 1, "microseconds": 2}});
        stream.write_all(event.to_string().as_bytes()).await.unwrap();
    }
    for name in ["STOP", "NEVER_HEARD_OF", "RESUME"] {
        assert_eq!(
            events.next().await,
            Ok(Event {
                name: name.into(),
                data: json!({"x": 1})
            })
        );
    }
    assert_eq!(
        client.run_history(),
        RunHistory {
            stops: 1,
            resumes: 1,
            resumed_last: true
        }
    );
}

#[tokio::test]
async fn a_drain_counts_what_the_socket_holds_and_notices_a_cut_message() {
    let (_directory, client, mut stream) = connected().await;
    stream
        .write_all(b"{\"event\": \"STOP\"} {\"event\": \"RESUME\"} {\"event\": \"ST")
        .await
        .unwrap();
    let drained = client.drain().await.unwrap();
    assert_eq!(
        drained.history,
        RunHistory {
            stops: 1,
            resumes: 1,
            resumed_last: true
        }
    );
    assert!(drained.is_partial);
}

#[tokio::test]
async fn the_end_of_the_connection_reaches_commands_and_listeners() {
    let (_directory, client, stream) = connected().await;
    let mut events = client.events();
    let (result, ()) = tokio::join!(client.execute("query-status", json!({})), async { drop(stream) });
    assert!(matches!(result, Err(QmpError::Lost { .. })), "{result:?}");
    assert_eq!(events.next().await, Err(EventsEnd::Closed));
    assert!(matches!(
        client.execute("query-status", json!({})).await,
        Err(QmpError::Lost { .. })
    ));
    assert_eq!(client.events().next().await, Err(EventsEnd::Closed));
}

#[tokio::test]
async fn a_monitor_without_a_greeting_is_called_busy() {
    let (_directory, path, _listener) = monitor();
    let error = QmpClient::connect(&path, Duration::from_millis(50)).await.unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
}

#[tokio::test]
async fn a_full_backlog_is_called_busy_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp");
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    socket.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let _waiting = UnixStream::connect(&path).await.unwrap();
    let error = QmpClient::connect(&path, SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
}

#[tokio::test]
async fn missing_and_stale_sockets_are_told_apart() {
    let (_directory, path, listener) = monitor();
    drop(listener);
    let error = QmpClient::connect(&path, SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::NotListening { .. }), "{error}");
    let error = QmpClient::connect(&path.with_extension("no"), SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::NoSocket { .. }), "{error}");
}

#[tokio::test]
async fn what_does_not_speak_qmp_is_named_so() {
    for (text, part) in [
        (
            &b"QEMU 10.0.2 monitor - type 'help'\r\n(qemu) "[..],
            "QEMU 10.0.2 monitor",
        ),
        (b"{\"hello\": 1}", "no QMP greeting"),
        (
            b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": -1}}}}",
            "no QMP greeting",
        ),
        (b"{\"QMP\": oops}", "malformed JSON"),
        (b"", "closed"),
    ] {
        let (_directory, path, listener) = monitor();
        let play = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(text).await.unwrap();
        };
        let (result, ()) = tokio::join!(QmpClient::connect(&path, SOON), play);
        let error = result.unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn an_endless_message_ends_the_connection_at_the_limit() {
    let (_directory, client, mut stream) = connected().await;
    let flood = async {
        stream.write_all(b"{\"return\": \"").await.unwrap();
        let block = vec![b'x'; 1 << 16];
        while stream.write_all(&block).await.is_ok() {}
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    };
    let check = async {
        let error = client
            .execute_within("query-status", json!({}), SOON)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("more than 4194304 bytes"), "{error}");
        drop(client);
    };
    tokio::join!(flood, check);
}

#[tokio::test]
async fn a_deeply_nested_message_is_refused_without_harm() {
    let (_directory, client, mut stream) = connected().await;
    let mut bomb = "{\"a\":".repeat(100_000).into_bytes();
    bomb.extend(std::iter::repeat_n(b'}', 100_000));
    stream.write_all(&bomb).await.unwrap();
    let error = client.execute("query-status", json!({})).await.unwrap_err();
    assert!(error.to_string().contains("malformed JSON"), "{error}");
}
