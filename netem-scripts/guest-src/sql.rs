//! Asks PostgreSQL by its simple query protocol (version 3.0). The server trusts who asks. The guest's load uses it, and the lab's client
//! outside the guest (src/lab/disks/client.rs).

use std::io::{BufReader, Read, Write};

/// A session on a stream to a server.
pub(crate) struct Session<S> {
    stream: BufReader<S>,
}

/// One row of an answer; NULL is empty.
pub(crate) type Row = Vec<String>;

impl<S: Read + Write> Session<S> {
    /// Logs in as the user `postgres` and waits until the server takes queries.
    ///
    /// # Errors
    /// What the server answers; the text has [`STARTING`] where it is not ready yet.
    pub(crate) fn begin(stream: S) -> Result<Self, String> {
        let mut session = Self {
            stream: BufReader::new(stream),
        };
        let parameters = b"user\0postgres\0database\0postgres\0\0";
        let mut message = (parameters.len() as u32 + 8).to_be_bytes().to_vec();
        message.extend(196_608_u32.to_be_bytes());
        message.extend(parameters);
        session.send(&message)?;
        session.until_ready()?;
        Ok(session)
    }

    /// Asks one statement and returns the rows of its answer.
    ///
    /// # Errors
    /// What the server answers, or that it does not.
    pub(crate) fn query(&mut self, statement: &str) -> Result<Vec<Row>, String> {
        let mut message = vec![b'Q'];
        message.extend((statement.len() as u32 + 5).to_be_bytes());
        message.extend(statement.as_bytes());
        message.push(0);
        self.send(&message)?;
        self.until_ready()
    }

    fn send(&mut self, message: &[u8]) -> Result<(), String> {
        self.stream.get_mut().write_all(message).map_err(broken)
    }

    /// Reads messages up to ReadyForQuery.
    fn until_ready(&mut self) -> Result<Vec<Row>, String> {
        let (mut rows, mut error) = (Vec::new(), None);
        loop {
            let mut head = [0; 5];
            match self.stream.read_exact(&mut head) {
                Ok(()) => {}
                Err(problem) => return Err(error.unwrap_or_else(|| broken(problem))),
            }
            let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
            let length = length.checked_sub(4).filter(|&length| length <= LONGEST);
            let mut body = vec![0; length.ok_or("postgres sends a message of no possible length")?];
            self.stream.read_exact(&mut body).map_err(broken)?;
            match head[0] {
                b'Z' => return error.map_or(Ok(rows), Err),
                b'E' => {
                    let text = String::from_utf8_lossy(&body).replace(['\0', '\n'], " ");
                    error = Some(format!("postgres answers: {text}"));
                }
                b'D' => rows.push(row(&body).ok_or("postgres sends a row that is none")?),
                _ => {}
            }
        }
    }
}

/// The values of a DataRow: how many, and each with its length before it.
fn row(body: &[u8]) -> Option<Row> {
    let (count, mut rest) = body.split_first_chunk()?;
    let mut values = Vec::new();
    for _ in 0..u16::from_be_bytes(*count) {
        let (length, after) = rest.split_first_chunk()?;
        // NULL has a length of -1.
        let length = usize::try_from(i32::from_be_bytes(*length)).unwrap_or(0);
        values.push(String::from_utf8_lossy(after.get(..length)?).into_owned());
        rest = &after[length..];
    }
    Some(values)
}

fn broken(error: std::io::Error) -> String {
    format!("postgres does not answer: {error}")
}

/// The code of a server that cannot take sessions yet (`cannot_connect_now`).
pub(crate) const STARTING: &str = "57P03";
/// Of a message; no answer that is asked for here is nearly as long.
const LONGEST: usize = 1 << 20;
