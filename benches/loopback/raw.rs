//! What lanes are compared with: one stream of stock quinn, and TCP with TLS, both as bare as can be.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Endpoint, ServerConfig, TransportConfig, VarInt};
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::{PrivateKeyDer, ServerName};

use super::anyone::Anyone;

const WINDOW: u32 = 64 << 20;

/// Sends `bytes` on one stream of stock quinn; its windows are large, everything else is as it comes.
pub(crate) struct RawQuinn {
    server: Endpoint,
    client: Endpoint,
}

impl RawQuinn {
    pub(crate) fn new() -> Self {
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let (server_tls, client_tls) = tls(b"raw");
        let mut server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server_tls).unwrap()));
        server.transport_config(transport());
        let mut client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(client_tls).unwrap()));
        client.transport_config(transport());
        let mut dialler = Endpoint::client(any).unwrap();
        dialler.set_default_client_config(client);
        Self {
            server: Endpoint::server(server, any).unwrap(),
            client: dialler,
        }
    }

    pub(crate) async fn connect(&self) -> (quinn::Connection, quinn::Connection) {
        let address = self.server.local_addr().unwrap();
        let (from, to) = tokio::join!(
            async { self.client.connect(address, NAME).unwrap().await.unwrap() },
            async { self.server.accept().await.unwrap().await.unwrap() }
        );
        (from, to)
    }
}

/// One stream with all of `times` pieces of `data`.
pub(crate) async fn send_stream(from: &quinn::Connection, to: &quinn::Connection, data: &Bytes, times: u64) {
    let sending = async {
        let mut stream = from.open_uni().await.unwrap();
        for _ in 0..times {
            stream.write_chunk(data.clone()).await.unwrap();
        }
        stream.finish().unwrap();
        stream.stopped().await.unwrap();
    };
    let receiving = async {
        let mut stream = to.accept_uni().await.unwrap();
        let mut received = 0;
        while let Some(chunk) = stream.read_chunk(1 << 20, true).await.unwrap() {
            received += chunk.bytes.len() as u64;
        }
        assert_eq!(received, times * data.len() as u64);
    };
    tokio::join!(sending, receiving);
}

/// The same over TCP with TLS, a thread at each end.
pub(crate) fn send_tls(data: &Bytes, times: u64) -> std::time::Duration {
    let (server_tls, client_tls) = tls(b"tcp");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let total = times * data.len() as u64;
    let receiver = std::thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let connection = rustls::ServerConnection::new(server_tls).unwrap();
        let mut stream = rustls::StreamOwned::new(connection, socket);
        let mut buffer = vec![0; 1 << 20];
        let mut left = total;
        while left > 0 {
            left -= stream.read(&mut buffer).unwrap() as u64;
        }
        stream.write_all(b"!").unwrap();
    });
    let connection = rustls::ClientConnection::new(client_tls, ServerName::try_from(NAME).unwrap()).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, TcpStream::connect(address).unwrap());
    // The handshake is no part of it.
    stream.flush().unwrap();
    let began = std::time::Instant::now();
    for _ in 0..times {
        stream.write_all(data).unwrap();
    }
    stream.read_exact(&mut [0]).unwrap();
    let took = began.elapsed();
    receiver.join().unwrap();
    took
}

const NAME: &str = "localhost";

fn transport() -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .send_window(WINDOW.into())
        .receive_window(VarInt::from_u32(WINDOW))
        .stream_receive_window(VarInt::from_u32(WINDOW));
    Arc::new(config)
}

fn tls(protocol: &[u8]) -> (Arc<rustls::ServerConfig>, Arc<rustls::ClientConfig>) {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new([NAME.to_owned()])
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let chain = vec![certificate.der().clone()];
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    server.alpn_protocols = vec![protocol.to_vec()];
    let mut client = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    client.alpn_protocols = vec![protocol.to_vec()];
    (Arc::new(server), Arc::new(client))
}
