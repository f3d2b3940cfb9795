//! Disks, servers and connections that fail.

use std::time::Duration;

use longhaul::hypervisor::nbd::{NbdClient, NbdError};
use longhaul::proto::disk::nbd::{ErrorNumber, MetaContext, Reading, RequestError};
use rustix::process::Signal;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::qemu::{Qemu, SIZE, SOON, joined};
use crate::{pattern, qemu_or_return, write};

/// A disk whose bytes from 1 MiB on cannot be read for one sector, with its export.
async fn with_bad_sector(qemu: &Qemu) -> NbdClient {
    qemu.add_disk("disk", "raw", SIZE).await;
    let writer = qemu.add_writer("disk").await;
    write(&writer, 0..2 << 20, 6).await;
    writer.close(SOON).await.unwrap();
    qemu.remove_export("writer").await;
    let error = json!({ "event": "none", "iotype": "read", "errno": 5, "sector": (1 << 20) / 512, "once": false });
    let node = json!({ "driver": "blkdebug", "node-name": "bad", "image": "disk", "inject-error": [error] });
    qemu.run("blockdev-add", node).await;
    qemu.add_export("bad", &[]).await;
    qemu.client("bad", vec![]).await
}

#[tokio::test]
async fn a_read_error_names_its_bytes_and_the_connection_goes_on() {
    let qemu = Qemu::start(&qemu_or_return!()).await;
    let client = with_bad_sector(&qemu).await;
    let (before, bad, after) = tokio::join!(
        client.read(0, 1 << 20, Reading::Whole),
        client.read(1 << 20, 65536, Reading::Whole),
        client.read((1 << 20) + 65536, 65536, Reading::Whole),
    );
    assert_eq!(joined(&before.unwrap()), pattern(1 << 20, 6));
    assert_eq!(joined(&after.unwrap()).len(), 65536);
    let error = bad.unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("The export \"bad\" could not read 65536 bytes at byte 1048576: the disk could not be read"),
        "{text}"
    );
    assert!(matches!(error, NbdError::Failed { failure, .. } if failure.number == ErrorNumber::IO));
    let again = client.read(0, 4096, Reading::Sparse).await.unwrap();
    assert_eq!(joined(&again), pattern(4096, 6));
}

#[tokio::test]
async fn a_sparse_read_that_fails_costs_the_connection_and_says_so() {
    let qemu = Qemu::start(&qemu_or_return!()).await;
    let client = with_bad_sector(&qemu).await;
    let error = client.read(1 << 20, 65536, Reading::Sparse).await.unwrap_err();
    assert!(
        matches!(&error, NbdError::Lost { export, .. } if export == "bad"),
        "{error}"
    );
    assert!(error.to_string().contains("a sparse read fails"), "{error}");
    let again = client.read(0, 4096, Reading::Sparse).await.unwrap_err();
    assert_eq!(again.to_string(), error.to_string());
    // The export is still there for who connects anew.
    let client = qemu.client("bad", vec![]).await;
    assert!(client.read(0, 4096, Reading::Whole).await.is_ok());
}

#[tokio::test]
async fn a_qemu_that_is_killed_fails_all_that_waits_with_the_name_of_export_and_socket() {
    let qemu = Qemu::start(&qemu_or_return!()).await;
    qemu.add_disk("disk", "raw", SIZE).await;
    let client = qemu.add_writer("disk").await;
    qemu.signal(Signal::STOP);
    let waiting = async {
        tokio::join!(
            client.read(0, 4096, Reading::Whole),
            client.write(0, pattern(1 << 20, 1)),
            client.flush(),
            client.block_status(0..SIZE),
        )
    };
    let killing = async { qemu.signal(Signal::KILL) };
    let ((read, write, flush, status), ()) = tokio::join!(waiting, killing);
    let errors = [
        read.unwrap_err(),
        write.unwrap_err(),
        flush.unwrap_err(),
        status.unwrap_err(),
        client.flush().await.unwrap_err(),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(matches!(error, NbdError::Lost { .. }), "{text}");
        let socket = qemu.socket();
        assert!(
            text.contains("\"writer\"") && text.contains(socket.to_str().unwrap()),
            "{text}"
        );
    }
}

#[tokio::test]
async fn what_cannot_be_opened_is_refused_with_the_servers_words() {
    let qemu = Qemu::start(&qemu_or_return!()).await;
    let error = qemu.connect("disk", vec![]).await.unwrap_err();
    assert!(matches!(error, NbdError::Handshake { .. }));
    let text = error.to_string();
    assert!(
        text.contains("there is no export \"disk\" (export 'disk' not present)"),
        "{text}"
    );

    qemu.add_disk("disk", "qcow2", SIZE).await;
    qemu.add_export("disk", &[]).await;
    let bitmap = MetaContext::DirtyBitmap("round-1".into());
    let text = qemu.connect("disk", vec![bitmap]).await.unwrap_err().to_string();
    assert!(
        text.contains("does not have the metadata context qemu:dirty-bitmap:round-1"),
        "{text}"
    );

    let client = qemu.client("disk", vec![]).await;
    let error = client.write(0, pattern(512, 1)).await.unwrap_err();
    assert!(matches!(
        error,
        NbdError::Request {
            source: RequestError::NotOffered { .. },
            ..
        }
    ));
    let most = client.request_limit();
    assert!(client.read(0, most, Reading::Sparse).await.is_ok());
    let error = client.read(0, most + 512, Reading::Sparse).await.unwrap_err();
    assert!(matches!(
        error,
        NbdError::Request {
            source: RequestError::TooLong { .. },
            ..
        }
    ));
}

#[tokio::test]
async fn sockets_behind_which_nobody_speaks_nbd_are_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let connect = async |deadline| NbdClient::connect(&path, "disk", vec![], deadline).await.unwrap_err();
    assert!(matches!(connect(SOON).await, NbdError::Connect { .. }));
    let listener = UnixListener::bind(&path).unwrap();
    let mute = connect(Duration::from_millis(50)).await;
    assert!(matches!(mute, NbdError::Deadline { .. }), "{mute}");
    drop(listener.accept().await.unwrap());
    let (closed, _) = tokio::join!(connect(SOON), async { drop(listener.accept().await.unwrap()) });
    assert!(matches!(closed, NbdError::Lost { .. }), "{closed}");
    let (other, _) = tokio::join!(connect(SOON), async {
        let stream = listener.accept().await.unwrap().0;
        stream.writable().await.unwrap();
        stream.try_write(b"{\"QMP\": {\"version\": {}}}").unwrap();
        stream
    });
    assert!(other.to_string().contains("does not speak NBD"), "{other}");
}

/// What a server says until it is ready, all at once: an export of 1 MiB, with structured replies.
fn handshake() -> Vec<u8> {
    let mut said = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let export = [&b"\0\0"[..], &(1_u64 << 20).to_be_bytes(), &[0, 0x05]].concat();
    let replies: [(u32, u32, &[u8]); 4] = [(11, 0x8000_0001, b""), (8, 1, b""), (7, 3, &export), (7, 1, b"")];
    for (option, kind, data) in replies {
        said.extend(0x0003_e889_0455_65a9_u64.to_be_bytes());
        for word in [option, kind, u32::try_from(data.len()).unwrap()] {
            said.extend(word.to_be_bytes());
        }
        said.extend(data);
    }
    said
}

/// A client of a server that the test plays.
async fn played() -> (NbdClient, UnixStream) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = async {
        let mut stream = listener.accept().await.unwrap().0;
        stream.write_all(&handshake()).await.unwrap();
        // Flags, the two options without data, and NBD_OPT_GO.
        let mut options = [0; 4 + 16 + 16 + 16 + 12];
        stream.read_exact(&mut options).await.unwrap();
        stream
    };
    let (client, stream) = tokio::join!(NbdClient::connect(&path, "disk", vec![], SOON), server);
    (client.unwrap(), stream)
}

/// A reply without chunks.
fn done(cookie: u64) -> Vec<u8> {
    [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &cookie.to_be_bytes()].concat()
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_fails_all_that_waits_with_what_it_did() {
    let (client, mut stream) = played().await;
    let breaking = async {
        stream.read_exact(&mut [0; 2 * 28]).await.unwrap();
        // The first is answered; of the rest nothing can be understood any more.
        stream.write_all(&[done(1), done(77)].concat()).await.unwrap();
    };
    let (first, second, ()) = tokio::join!(client.flush(), client.flush(), breaking);
    first.unwrap();
    let text = second.unwrap_err().to_string();
    assert!(text.contains("cookie 77 that is not open"), "{text}");
    assert_eq!(client.flush().await.unwrap_err().to_string(), text);
}

#[tokio::test]
async fn who_gives_up_a_request_leaves_the_others_theirs() {
    let (client, mut stream) = played().await;
    let mut request = [0; 28];
    tokio::select! {
        biased;
        _ = client.flush() => panic!("nobody answered"),
        read = stream.read_exact(&mut request) => drop(read.unwrap()),
    }
    let answering = async {
        stream.read_exact(&mut [0; 28]).await.unwrap();
        stream.write_all(&[done(1), done(2)].concat()).await.unwrap();
    };
    let (kept, ()) = tokio::join!(client.flush(), answering);
    kept.unwrap();
    // A goodbye is said when nothing is open.
    let parting = async {
        let mut disconnect = [0; 28];
        stream.read_exact(&mut disconnect).await.unwrap();
        assert_eq!(disconnect[6..8], [0, 2]);
        drop(stream);
    };
    let (closed, ()) = tokio::join!(client.close(SOON), parting);
    closed.unwrap();
}
