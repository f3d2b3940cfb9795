//! A wall clock for one process, which is moved while it runs.
//!
//! The host has one wall clock, and a time namespace only others than that. libfaketime stands between a program and the C library instead: it
//! reads a file at every question for the time and adds what it says. The monotonic clock is let be, since nobody can set that one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The clock of processes that were started with [`Clock::environment`].
#[derive(Clone, Debug)]
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

/// Which way a clock is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Jump {
    /// By a day.
    Ahead,
    /// By a day.
    Back,
}

impl Clock {
    /// One that is right, and whose file is in `directory`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn right(library: PathBuf, directory: &Path) -> std::io::Result<Self> {
        let clock = Self {
            library,
            file: directory.join("clock"),
        };
        clock.say("+0")?;
        Ok(clock)
    }

    /// Moves it away from the right time.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn jump(&self, jump: Jump) -> std::io::Result<()> {
        self.say(match jump {
            Jump::Ahead => "+1d",
            Jump::Back => "-1d",
        })
    }

    /// Variables of the environment of whoever goes by this clock. [`PRELOAD`] is taken away from those that it starts and that do not.
    #[must_use]
    pub fn environment(&self) -> [(&'static str, String); 4] {
        [
            (PRELOAD, self.library.display().to_string()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }

    /// A reader never sees half of it.
    fn say(&self, what: &str) -> std::io::Result<()> {
        let new = self.file.with_extension("new");
        std::fs::write(&new, what)?;
        std::fs::rename(new, &self.file)
    }
}

impl Jump {
    /// Both ways.
    pub const BOTH: [Self; 2] = [Self::Ahead, Self::Back];
}

impl fmt::Display for Jump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ahead => "ahead",
            Self::Back => "back",
        })
    }
}

/// Where distributions put libfaketime, in the build for programs with threads; `None`: it is not installed.
#[must_use]
pub fn library() -> Option<PathBuf> {
    let places = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let places = places
        .map(|entry| entry.path())
        .chain(["/usr/lib", "/usr/lib64"].map(PathBuf::from));
    places
        .map(|place| place.join("faketime/libfaketimeMT.so.1"))
        .find(|library| library.is_file())
}

/// Removes what the library keeps in shared memory for a process that was started with a [`Clock`] and killed: one that ends by itself does so
/// itself. Nothing, where there is nothing.
pub fn forget(process: u32) {
    for name in [format!("faketime_shm_{process}"), format!("sem.faketime_sem_{process}")] {
        let _ = std::fs::remove_file(Path::new("/dev/shm").join(name));
    }
}

/// Whether times that follow one another in a log have once moved that way by most of a day.
#[must_use]
pub fn has_jumped(log: &str, jump: Jump) -> bool {
    let times: Vec<jiff::Timestamp> = log
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().next()?.parse().ok())
        .collect();
    times.windows(2).any(|pair| {
        let step = match jump {
            Jump::Ahead => pair[1].duration_since(pair[0]),
            Jump::Back => pair[0].duration_since(pair[1]),
        };
        step.as_secs() > i64::try_from(MOST_OF_A_DAY.as_secs()).unwrap_or(i64::MAX)
    })
}

/// The variable by which the library comes into a process.
pub const PRELOAD: &str = "LD_PRELOAD";
const MOST_OF_A_DAY: Duration = Duration::from_secs(23 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_shows_which_way_its_clock_was_moved() {
        let log = |times: [&str; 2]| {
            times
                .map(|time| format!("{time}  INFO it goes on\nand a line without a time\n"))
                .concat()
        };
        let ahead = log(["2026-11-28T10:00:00.5Z", "2026-11-29T10:00:01Z"]);
        let back = log(["2026-11-28T10:00:00.5Z", "2026-11-27T10:00:01Z"]);
        let right = log(["2026-11-28T10:00:00Z", "2026-11-28T11:00:00Z"]);
        assert!(has_jumped(&ahead, Jump::Ahead) && !has_jumped(&ahead, Jump::Back));
        assert!(has_jumped(&back, Jump::Back) && !has_jumped(&back, Jump::Ahead));
        assert!(!has_jumped(&right, Jump::Ahead) && !has_jumped(&right, Jump::Back));
        assert!(!has_jumped("", Jump::Ahead));
    }
}
