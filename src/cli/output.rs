//! Where words go: results to stdout, everything else to stderr. A reader that has gone (a closed pipe, a lost
//! terminal) is no reason to stop: what the verb does matters more than what it says.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use serde::Serialize;

/// How a result is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    /// For people; may change.
    Text,
    /// For programs; names are stable.
    Json,
}

/// `--output` of every verb with a result.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct OutputArgs {
    /// How the result is written to stdout; json is stable and for scripts.
    #[arg(long = "output", value_name = "FORMAT", value_enum, default_value_t = Format::Text)]
    pub(super) format: Format,
}

impl OutputArgs {
    /// Writes a result: as JSON in one line, or as the text that `text` makes of it.
    pub(super) fn result<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) {
        match self.format {
            Format::Text => result(&text(value)),
            Format::Json => result(&serde_json::to_string(value).expect("a result is plain data")),
        }
    }
}

/// Writes a result to stdout.
pub(super) fn result(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{}", text.trim_end_matches('\n'));
    let _ = stdout.flush();
}

/// Writes a line to stderr.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Columns of the width of their longest cell, two blanks between them.
pub(super) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in std::iter::once(head.map(str::to_owned)).chain(rows.iter().cloned()) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Bytes with a decimal unit: `91.2 MB`.
pub(super) fn bytes(bytes: u64) -> String {
    for (unit, size) in [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)] {
        if bytes as f64 >= size {
            return format!("{:.1} {unit}", bytes as f64 / size);
        }
    }
    format!("{bytes} B")
}

/// A wire rate, in bits as links are rated: `745 Mbit/s`.
pub(super) fn wire_rate(bytes_per_second: f64) -> String {
    let bits = bytes_per_second * 8.0;
    match bits {
        bits if bits >= 9.995e8 => format!("{:.2} Gbit/s", bits / 1e9),
        bits if bits >= 1e6 => format!("{:.0} Mbit/s", bits / 1e6),
        bits => format!("{:.0} kbit/s", bits / 1e3),
    }
}

/// A time as people say it: `210 ms`, `12.3 s`, `4 min 5 s`, `2 h 3 min`. What is not a time is `unknown`.
pub(super) fn seconds(seconds: f64) -> String {
    let Ok(time) = Duration::try_from_secs_f64(seconds) else {
        return "unknown".to_owned();
    };
    let whole = time.as_secs();
    match time {
        time if time < Duration::from_secs(1) => format!("{} ms", time.as_millis()),
        time if time < Duration::from_secs(60) => format!("{:.1} s", time.as_secs_f64()),
        time if time < Duration::from_secs(3600) => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_well() {
        assert_eq!([bytes(0), bytes(999), bytes(91_240_000)], ["0 B", "999 B", "91.2 MB"]);
        assert_eq!(
            [wire_rate(93_125_000.0), wire_rate(1.25e8)],
            ["745 Mbit/s", "1.00 Gbit/s"]
        );
        assert_eq!(
            [seconds(0.21), seconds(12.34), seconds(245.0), seconds(7380.0)],
            ["210 ms", "12.3 s", "4 min 5 s", "2 h 3 min"]
        );
        assert_eq!(
            [seconds(f64::NAN), seconds(-1.0), seconds(f64::INFINITY)],
            ["unknown"; 3]
        );
    }

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let text = table(
            ["NAME", "X"],
            &[["a".into(), "1".into()], ["längstes".into(), "2".into()]],
        );
        assert_eq!(text, "NAME      X\na         1\nlängstes  2\n");
    }
}
