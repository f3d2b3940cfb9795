//! Drives a QEMU of the lab by QMP: one command at a time, events passed over. For the baselines, in which plain QEMU
//! migrates without a gateway.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

/// A QMP connection. QEMU serves one at a time on a socket.
#[derive(Debug)]
pub(super) struct Monitor {
    path: PathBuf,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Monitor {
    /// Connects as soon as a QEMU serves the socket, and leaves the negotiation mode.
    pub(super) async fn connect(path: &Path, patience: Duration) -> Result<Self, MonitorError> {
        let deadline = tokio::time::Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path).await {
                Ok(stream) => break stream,
                Err(source) if tokio::time::Instant::now() > deadline => {
                    return Err(MonitorError::Broken {
                        path: path.to_owned(),
                        source,
                    });
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let (reader, writer) = stream.into_split();
        let mut monitor = Self {
            path: path.to_owned(),
            reader: BufReader::new(reader),
            writer,
        };
        monitor.execute("qmp_capabilities", json!({})).await?;
        Ok(monitor)
    }

    /// Runs one command and returns what it returned.
    pub(super) async fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value, MonitorError> {
        let mut request = json!({ "execute": command });
        if arguments.as_object().is_some_and(|arguments| !arguments.is_empty()) {
            request["arguments"] = arguments;
        }
        let path = self.path.clone();
        let late = |_| MonitorError::Late {
            path: self.path.clone(),
            command,
        };
        timeout(ANSWER, Self::exchange(&mut self.reader, &mut self.writer, &request))
            .await
            .map_err(late)?
            .map_err(|source| MonitorError::Broken {
                path: path.clone(),
                source,
            })?
            .map_err(|said| MonitorError::Refused { path, command, said })
    }

    async fn exchange(
        reader: &mut BufReader<OwnedReadHalf>,
        writer: &mut OwnedWriteHalf,
        request: &Value,
    ) -> std::io::Result<Result<Value, String>> {
        writer.write_all(format!("{request}\n").as_bytes()).await?;
        let mut line = String::new();
        loop {
            line.clear();
            if reader.read_line(&mut line).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                return Ok(Err(error["desc"].as_str().unwrap_or("no reason given").to_owned()));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(Ok(value.take()));
            }
        }
    }
}

/// QEMU answers these commands at once; one that is busy with a migration's last step takes a moment.
const ANSWER: Duration = Duration::from_secs(20);

/// A QEMU of the lab cannot be driven.
#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    /// The connection cannot be made or is broken.
    #[error("no QMP at {}: {source}", path.display())]
    Broken {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// QEMU does not answer.
    #[error("QEMU at {} did not answer {command}", path.display())]
    Late {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: &'static str,
    },
    /// QEMU refused.
    #[error("QEMU at {} refused {command}: {said}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: &'static str,
        /// Its words.
        said: String,
    },
}
