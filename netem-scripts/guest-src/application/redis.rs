//! Redis with 48 MiB of values. An operation is a GET or a SET, in turn, of one value of 1 KiB under an evenly drawn key.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use super::{Load, broken, connect, serve};
use crate::content::{PADDING, Random, Vocabulary};

pub(super) struct Redis {
    stream: BufReader<UnixStream>,
    random: Random,
    vocabulary: Vocabulary,
    is_write_next: bool,
}

impl Redis {
    pub(super) fn start() -> Result<Self, String> {
        let mut server = serve(Command::new("redis-server").args([
            "--port",
            "0",
            "--unixsocket",
            SOCKET,
            "--save",
            "",
            "--appendonly",
            "no",
            "--loglevel",
            "warning",
        ]))?;
        let stream = connect(&mut server, Path::new(SOCKET))?;
        let mut random = Random(SEED);
        let mut redis = Self {
            stream: BufReader::new(stream),
            vocabulary: Vocabulary::new(&mut random),
            random,
            is_write_next: false,
        };
        for first in (0..KEYS).step_by(BATCH) {
            let batch = first..KEYS.min(first + BATCH as u64);
            let mut requests = Vec::new();
            for key in batch.clone() {
                requests.extend(redis.set(key));
            }
            redis.stream.get_mut().write_all(&requests).map_err(broken("redis"))?;
            for _ in batch {
                redis.reply()?;
            }
        }
        Ok(redis)
    }

    /// A SET of a fresh value.
    fn set(&mut self, key: u64) -> Vec<u8> {
        let mut value = [0; VALUE_BYTES + PADDING];
        self.vocabulary.write(&mut self.random, &mut value);
        let mut request = format!("*3\r\n$3\r\nSET\r\n$12\r\nkey:{key:08}\r\n${VALUE_BYTES}\r\n").into_bytes();
        request.extend_from_slice(&value[..VALUE_BYTES]);
        request.extend_from_slice(b"\r\n");
        request
    }

    /// Reads one reply of the kinds that GET and SET have.
    fn reply(&mut self) -> Result<(), String> {
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(broken("redis"))?;
        let line = line.trim_end();
        if line == "+OK" {
            return Ok(());
        }
        let length = line.strip_prefix('$').and_then(|length| length.parse::<usize>().ok());
        if length != Some(VALUE_BYTES) {
            return Err(format!("redis answers: {line}"));
        }
        let mut value = [0; VALUE_BYTES + 2];
        self.stream.read_exact(&mut value).map_err(broken("redis"))
    }
}

impl Load for Redis {
    fn operate(&mut self) -> Result<(), String> {
        let key = self.random.below(KEYS);
        let request = if self.is_write_next {
            self.set(key)
        } else {
            format!("*2\r\n$3\r\nGET\r\n$12\r\nkey:{key:08}\r\n").into_bytes()
        };
        self.is_write_next = !self.is_write_next;
        self.stream.get_mut().write_all(&request).map_err(broken("redis"))?;
        self.reply()
    }
}

const SOCKET: &str = "/run/redis.sock";
const SEED: u64 = 1;
const KEYS: u64 = 48 << 10;
const VALUE_BYTES: usize = 1 << 10;
/// Values that are set at once when the server is filled.
const BATCH: usize = 64;
