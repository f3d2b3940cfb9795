//! The lab's file: one JSON object a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::{Path, PathBuf};

use super::charts::thin;
use crate::lab::record::{Frontier, Record, RecordError, Run};

/// Everything that a file tells.
#[derive(Debug, Default)]
pub(in crate::lab) struct Records {
    pub(in crate::lab) runs: Vec<Run>,
    pub(in crate::lab) frontiers: Vec<Frontier>,
}

/// The file cannot be read, or is not what the lab writes.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("cannot open {}: {source}", file.display())]
    Open { file: PathBuf, source: std::io::Error },
    #[error("cannot read line {line} of {}: {source}", file.display())]
    Read {
        file: PathBuf,
        line: u64,
        source: std::io::Error,
    },
    #[error("line {line} of {} is longer than {MAX_LINE_BYTES} bytes: no run is that long", file.display())]
    TooLong { file: PathBuf, line: u64 },
    #[error("line {line} of {} is not a record of the lab: {problem}", file.display())]
    Line { file: PathBuf, line: u64, problem: String },
    #[error("{} holds no record: there is nothing to report", file.display())]
    Empty { file: PathBuf },
}

/// Reads every record of `file`. Empty lines are passed over. Courses are thinned to what a picture can show, so that
/// thousands of runs fit into memory.
///
/// # Errors
/// [`ReadError`] names the first line that is wrong: a report of the rest would look complete and not be.
pub(in crate::lab) fn read(file: &Path) -> Result<Records, ReadError> {
    let opened = File::open(file).map_err(|source| ReadError::Open {
        file: file.to_owned(),
        source,
    })?;
    let mut reader = BufReader::new(opened);
    let mut records = Records::default();
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let read = reader
            .by_ref()
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut text)
            .map_err(|source| ReadError::Read {
                file: file.to_owned(),
                line,
                source,
            })?;
        if read == 0 {
            break;
        }
        if read as u64 > MAX_LINE_BYTES {
            return Err(ReadError::TooLong {
                file: file.to_owned(),
                line,
            });
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        match Record::parse(&text) {
            Ok(Record::Run(mut run)) => {
                thin(&mut run.timeline);
                records.runs.push(*run);
            }
            Ok(Record::Frontier(frontier)) => records.frontiers.push(frontier),
            Err(error) => {
                return Err(ReadError::Line {
                    file: file.to_owned(),
                    line,
                    problem: problem(&error),
                });
            }
        }
    }
    if records.runs.is_empty() && records.frontiers.is_empty() {
        return Err(ReadError::Empty { file: file.to_owned() });
    }
    Ok(records)
}

/// The parser counts lines within what it was given, which is always one: only its column says something.
fn problem(error: &RecordError) -> String {
    match error {
        RecordError::Json(source) => {
            let said = source.to_string();
            let what = said.split(" at line ").next().unwrap_or_default();
            format!("{what}, at column {}", source.column())
        }
        RecordError::Kind { .. } => error.to_string(),
    }
}

/// A course of an hour, sampled ten times a second, takes about 8 MB.
const MAX_LINE_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Records, ReadError> {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("runs.jsonl");
        std::fs::write(&file, text).unwrap();
        read(&file)
    }

    fn run() -> String {
        serde_json::to_string(&crate::lab::report::samples::run("longhaul", 1)).unwrap()
    }

    #[test]
    fn an_empty_file_is_refused() {
        for text in ["", "\n\n  \n"] {
            assert!(matches!(read_text(text), Err(ReadError::Empty { .. })));
        }
    }

    #[test]
    fn a_line_that_does_not_parse_is_named_by_its_number() {
        let run = run();
        // Cut short, as by a full disk.
        let text = format!("{run}\n\n{}\n{run}\n", &run[..run.len() / 2]);
        let error = read_text(&text).unwrap_err();
        assert!(matches!(error, ReadError::Line { line: 3, .. }), "{error}");
        assert!(error.to_string().starts_with("line 3 of "), "{error}");
    }

    #[test]
    fn a_field_that_lacks_is_named() {
        let error = read_text("{\"engine\":\"longhaul\"}\n").unwrap_err().to_string();
        assert!(
            error.contains("line 1 of ") && error.contains("missing field"),
            "{error}"
        );
        assert!(!error.contains("at line 1"), "{error}");
    }

    #[test]
    fn the_last_line_needs_no_end() {
        let read = read_text(&format!("{}\n{}", run(), run())).unwrap();
        assert_eq!(read.runs.len(), 2);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = read(Path::new("/nowhere/runs.jsonl")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/runs.jsonl"), "{error}");
    }
}
