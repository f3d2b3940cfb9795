//! nginx with 256 files of text, of 4 to 64 KiB. An operation is a GET of one of them, evenly drawn, on a connection that stays open.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use super::{Load, broken, connect, serve};
use crate::content::{PADDING, Random, Vocabulary};

pub(super) struct Nginx {
    stream: BufReader<UnixStream>,
    random: Random,
    body: Vec<u8>,
}

impl Nginx {
    pub(super) fn start() -> Result<Self, String> {
        let mut random = Random(SEED);
        let vocabulary = Vocabulary::new(&mut random);
        let made = |error| format!("the files to serve cannot be made: {error}");
        std::fs::create_dir_all("/srv").map_err(made)?;
        for number in 0..FILES {
            let length = (4 + random.below(61) as usize) << 10;
            let mut text = vec![0; length + PADDING];
            vocabulary.write(&mut random, &mut text);
            std::fs::write(format!("/srv/{number}"), &text[..length]).map_err(made)?;
        }
        std::fs::write(CONFIGURATION_FILE, CONFIGURATION).map_err(made)?;
        let mut server = serve(Command::new("nginx").args(["-c", CONFIGURATION_FILE]))?;
        let stream = connect(&mut server, Path::new(SOCKET))?;
        Ok(Self {
            stream: BufReader::new(stream),
            random,
            body: Vec::new(),
        })
    }
}

impl Load for Nginx {
    fn operate(&mut self) -> Result<(), String> {
        let number = self.random.below(FILES);
        let request = format!("GET /{number} HTTP/1.1\r\nHost: guest\r\n\r\n");
        self.stream
            .get_mut()
            .write_all(request.as_bytes())
            .map_err(broken("nginx"))?;
        let (mut status, mut length) = (String::new(), 0);
        self.stream.read_line(&mut status).map_err(broken("nginx"))?;
        if status.split(' ').nth(1) != Some("200") {
            return Err(format!("nginx answers: {}", status.trim_end()));
        }
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line).map_err(broken("nginx"))?;
            match line.trim_end().split_once(": ") {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse().map_err(|_| format!("nginx answers: {line}"))?;
                }
                Some(_) => {}
                None => break,
            }
        }
        self.body.resize(length, 0);
        self.stream.read_exact(&mut self.body).map_err(broken("nginx"))
    }
}

const CONFIGURATION: &str = "user root root;
daemon off;
worker_processes 1;
pid /run/nginx.pid;
error_log stderr error;
events { worker_connections 64; }
http {
    access_log off;
    sendfile on;
    keepalive_requests 1000000000;
    keepalive_time 1000h;
    server {
        listen unix:/run/nginx.sock;
        root /srv;
    }
}
";
const CONFIGURATION_FILE: &str = "/run/nginx.conf";
const SOCKET: &str = "/run/nginx.sock";
const SEED: u64 = 1;
const FILES: u64 = 256;
