//! A monitor of a third party: one command at a time, on a connection of its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::PATIENCE;

/// Runs a command and returns what it returns; `None` where nobody answers or it is refused.
pub(crate) fn ask(socket: &Path, command: &str, arguments: &Value) -> Option<Value> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let nothing = json!({});
    let mut last = None;
    for (command, arguments) in [("qmp_capabilities", &nothing), (command, arguments)] {
        let request = json!({ "execute": command, "arguments": arguments });
        stream.write_all(format!("{request}\n").as_bytes()).ok()?;
        last = loop {
            let value: Value = serde_json::from_str(&lines.next()?.ok()?).ok()?;
            if value.get("error").is_some() {
                return None;
            }
            if let Some(value) = value.get("return") {
                break Some(value.clone());
            }
        };
    }
    last
}
