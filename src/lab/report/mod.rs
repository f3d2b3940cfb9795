//! The report of the lab: its records as a page, and the same as Markdown with pictures beside it.
//!
//! ```text
//! records ── standing: which runs may be in a figure
//!    └─ summary ── statistics ──┬─ overview, results, applications, aside, setting ─┬─ content ── document ──┬─ html
//!                               └─ charts ──────────────────────────────────────────┘                        └─ markdown
//! ```
//!
//! It measures nothing and judges nothing anew: [`record`](super::record) is its only input. A run that is not usable is in no figure but is
//! listed; a run that was stopped is a bound and never a value.

mod applications;
mod aside;
mod charts;
mod content;
mod document;
mod escape;
mod html;
mod markdown;
mod overview;
mod quantity;
mod read;
mod results;
#[cfg(test)]
pub(in crate::lab) mod samples;
mod setting;
mod standing;
mod statistics;
mod summary;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use clap::Args;

use self::document::{Block, Document};
pub use self::read::ReadError;
pub(super) use self::read::read;
use super::record::{Frontier, Run};

/// Makes a report of what the lab measured: DIR/index.html, and DIR/report.md with its pictures.
#[derive(Clone, Debug, Args)]
pub struct ReportArgs {
    /// What the lab wrote: one JSON object a line.
    #[arg(value_name = "RUNS.jsonl")]
    pub runs: PathBuf,
    /// Directory to write to; made where it is not there.
    #[arg(long, value_name = "DIR")]
    pub report: PathBuf,
}

impl ReportArgs {
    /// Writes the report and returns the exit code.
    pub(super) fn run(&self) -> u8 {
        match self.write() {
            Ok(()) => {
                println!("{}", self.report.join(PAGE).display());
                0
            }
            Err(error) => {
                eprintln!("longhaul: {error}");
                2
            }
        }
    }

    fn write(&self) -> Result<(), ReportError> {
        let records = read(&self.runs)?;
        write(&records.runs, &records.frontiers, &self.report)
    }
}

/// No report was made, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("cannot write {}: {source}", file.display())]
    Write { file: PathBuf, source: io::Error },
}

/// Writes the report of `runs` and `frontiers` into `directory`, which is made where it is not there. Files of the same names are
/// replaced, others are left alone. Runs are in the order of the plan: profiles and engines appear as they are met first.
///
/// # Errors
/// [`ReportError::Write`] names the file.
pub fn write(runs: &[Run], frontiers: &[Frontier], directory: &Path) -> Result<(), ReportError> {
    let document = content::document(runs, frontiers);
    let put = |file: PathBuf, text: &str| fs::write(&file, text).map_err(|source| ReportError::Write { file, source });
    fs::create_dir_all(directory).map_err(|source| ReportError::Write {
        file: directory.to_owned(),
        source,
    })?;
    let names = file_names(&document);
    for (figure, name) in figures(&document).zip(&names) {
        put(directory.join(name), &figure.picture.file(&figure.title))?;
    }
    let mut names = names.into_iter();
    let text = markdown::text(&document, |_| names.next().unwrap_or_default());
    put(directory.join("report.md"), &text)?;
    put(directory.join(PAGE), &html::page(&document))
}

fn figures(document: &Document) -> impl Iterator<Item = &charts::Figure> {
    document.blocks.iter().flat_map(|block| match block {
        Block::Figures(figures) => figures.as_slice(),
        _ => &[],
    })
}

/// Of the pictures in their order. Names that differ only in what a file's name cannot have get a number.
fn file_names(document: &Document) -> Vec<String> {
    let mut taken = HashSet::new();
    figures(document)
        .map(|figure| {
            let numbered = (2..).map(|number| format!("{}-{number}.svg", figure.name));
            std::iter::once(format!("{}.svg", figure.name))
                .chain(numbered)
                .find(|name| taken.insert(name.clone()))
                .unwrap_or_default()
        })
        .collect()
}

const PAGE: &str = "index.html";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::record::{Application, Outcome, Work};

    /// Two guests on two links by three engines, with everything that can be odd about a run.
    fn plan() -> (Vec<Run>, Vec<Frontier>) {
        let work = Work {
            operations_per_second: 900.0,
            p99_seconds: 0.004,
        };
        let mut runs = Vec::new();
        for (profile, rtt, loss) in [
            ("metro", 0.01, 0.0),
            ("intercontinental", 0.15, 0.001),
            ("lossy", 0.15, 0.01),
        ] {
            for engine in ["longhaul", "qemu-tcp-cubic-default", "qemu-multifd-zstd"] {
                for repetition in 1..=4 {
                    let mut run = samples::run(engine, repetition);
                    run.profile = profile.to_owned();
                    run.setting.link_rtt_seconds = Some(rtt);
                    run.setting.link_loss_fraction = Some(loss);
                    run.setting.link_rate_bits_per_second = Some(1e9);
                    run.application = Some(Application {
                        name: "redis".to_owned(),
                        before: work,
                        during: work,
                        after: work,
                    });
                    if engine == "qemu-tcp-cubic-default" && rtt > 0.1 {
                        run.outcome = Outcome::NotFinished;
                    }
                    runs.push(run);
                }
            }
        }
        runs[0].usable = false;
        runs[0].reason = Some("starved of CPU".to_owned());
        let mut unavailable = samples::run("cloud-hypervisor", 1);
        unavailable.outcome = Outcome::Unavailable;
        unavailable.reason = Some("needs /dev/kvm".to_owned());
        runs.push(unavailable);
        (
            runs,
            vec![samples::frontier("longhaul"), samples::frontier("qemu-multifd-zstd")],
        )
    }

    struct Written {
        page: String,
        markdown: String,
        pictures: Vec<(String, String)>,
    }

    fn write_all(runs: &[Run], frontiers: &[Frontier]) -> Written {
        let directory = tempfile::tempdir().unwrap();
        let report = directory.path().join("deep/report");
        write(runs, frontiers, &report).unwrap();
        let mut pictures = Vec::new();
        for entry in fs::read_dir(&report).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "svg") {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                pictures.push((name, fs::read_to_string(path).unwrap()));
            }
        }
        Written {
            page: fs::read_to_string(report.join("index.html")).unwrap(),
            markdown: fs::read_to_string(report.join("report.md")).unwrap(),
            pictures,
        }
    }

    /// Panics unless every element is closed in its order, every attribute is quoted and every `&` begins an entity. Style sheets
    /// are passed over, as HTML does.
    #[track_caller]
    fn assert_well_formed(text: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find('<') {
            let (between, tag) = rest.split_at(start);
            assert_text(between);
            let end = tag.find('>').unwrap_or_else(|| panic!("no end of {:.60}", tag));
            let inside = &tag[1..end];
            rest = &tag[end + 1..];
            if inside.starts_with('!') {
                continue;
            }
            if let Some(name) = inside.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "before {:.80}", rest);
                continue;
            }
            let inside_open = inside.strip_suffix('/');
            let name = assert_attributes(inside_open.unwrap_or(inside));
            if inside_open.is_none() {
                open.push(name);
            }
            if name == "style" {
                rest = &rest[rest.find("</style").unwrap()..];
            }
        }
        assert_text(rest);
        assert!(open.is_empty(), "not closed: {open:?}");
    }

    #[track_caller]
    fn assert_text(text: &str) {
        assert!(!text.contains('>'), "a lone > in {:.80}", text);
        assert!(
            !text
                .chars()
                .any(|character| character.is_control() && character != '\n'),
            "{:.80}",
            text
        );
        for (at, _) in text.match_indices('&') {
            let entity = text[at..].split(';').next().unwrap();
            assert!(
                ["&amp", "&lt", "&gt", "&quot", "&apos", "&#39"].contains(&entity),
                "{entity:.20}"
            );
        }
    }

    /// Returns the element's name.
    #[track_caller]
    fn assert_attributes(inside: &str) -> &str {
        let (name, mut rest) = inside.split_once(' ').unwrap_or((inside, ""));
        assert!(
            !name.is_empty() && name.chars().all(|character| character.is_ascii_alphanumeric()),
            "<{inside:.60}>"
        );
        while !rest.trim().is_empty() {
            let (attribute, value) = rest
                .split_once("=\"")
                .unwrap_or_else(|| panic!("unquoted in <{inside:.80}>"));
            assert!(
                attribute
                    .trim()
                    .chars()
                    .all(|letter| letter.is_ascii_alphabetic() || letter == '-' || letter.is_ascii_digit()),
                "{attribute}"
            );
            let (value, after) = value
                .split_once('"')
                .unwrap_or_else(|| panic!("no end in <{inside:.80}>"));
            assert_text(value);
            rest = after;
        }
        name
    }

    #[test]
    fn the_page_and_its_pictures_are_well_formed() {
        let (runs, frontiers) = plan();
        let written = write_all(&runs, &frontiers);
        assert_well_formed(&written.page);
        assert!(written.pictures.len() > 10);
        for (_, picture) in &written.pictures {
            assert_well_formed(picture);
        }
    }

    #[test]
    fn every_engine_profile_and_guest_appears() {
        let (runs, frontiers) = plan();
        let written = write_all(&runs, &frontiers);
        for run in &runs {
            for name in [&run.engine, &run.profile, &run.guest] {
                assert!(written.page.contains(name.as_str()), "{name}");
                assert!(written.markdown.contains(name.as_str()), "{name}");
            }
        }
        assert!(written.page.contains("needs /dev/kvm") && written.markdown.contains("starved of CPU"));
    }

    #[test]
    fn names_that_are_markup_are_text_everywhere() {
        const NAME: &str = "<script>alert(\"&\")</script>|x";
        let (mut runs, mut frontiers) = plan();
        for run in &mut runs {
            run.engine = format!("{NAME}{}", run.engine);
            run.profile = format!("{NAME}{}", run.profile);
            run.guest = NAME.to_owned();
            run.reason = Some(NAME.to_owned());
            run.setting.kernel = format!("{NAME}\u{1b}[2J");
            run.setting.tcp.insert(NAME.to_owned(), NAME.into());
            for moment in &mut run.timeline {
                moment.phase = NAME.to_owned();
            }
        }
        for frontier in &mut frontiers {
            frontier.engine = NAME.to_owned();
        }
        let written = write_all(&runs, &frontiers);
        assert_well_formed(&written.page);
        assert!(!written.page.contains("<script") && !written.markdown.contains("<script"));
        for (name, picture) in &written.pictures {
            assert!(!picture.contains("<script"), "{name}");
            assert_well_formed(picture);
        }
    }

    #[test]
    fn markdown_names_pictures_that_are_there_and_has_even_tables() {
        let (runs, frontiers) = plan();
        let written = write_all(&runs, &frontiers);
        let names: HashSet<&str> = written.pictures.iter().map(|(name, _)| name.as_str()).collect();
        let mut shown = 0;
        let mut columns = None;
        for line in written.markdown.lines() {
            if let Some((_, file)) = line.rsplit_once("](").filter(|_| line.starts_with("![")) {
                assert!(names.contains(file.trim_end_matches(')')), "{line}");
                shown += 1;
            }
            let cells = line.replace("\\|", "").matches('|').count();
            columns = line.starts_with('|').then(|| *columns.get_or_insert(cells));
            assert!(columns.is_none_or(|columns| columns == cells), "{line}");
        }
        assert_eq!(shown, names.len());
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let (runs, frontiers) = plan();
        let page = write_all(&runs, &frontiers).page;
        for other in ["http:", "https:", "src=", "url(", "@import", "<link"] {
            assert!(!page.contains(other), "{other}");
        }
    }

    #[test]
    fn frontiers_alone_make_a_report() {
        let written = write_all(&[], &[samples::frontier("longhaul")]);
        assert_well_formed(&written.page);
        assert!(written.page.contains("Convergence frontier"));
    }

    #[test]
    fn frontiers_are_compared_with_ours_and_say_why_they_end() {
        let mut ours = samples::frontier("longhaul");
        ours.converges_pages_per_second = Some(48_000);
        ours.fails_pages_per_second = None;
        ours.limit = Some("the guest writes no faster".to_owned());
        let written = write_all(&[], &[ours, samples::frontier("qemu-xbzrle")]);
        for text in [
            "at least 3.0 times as many",
            "ended since the guest writes no faster",
            "6 moves",
        ] {
            assert!(written.markdown.contains(text) && written.page.contains(text), "{text}");
        }
    }

    #[test]
    fn pictures_whose_names_are_alike_do_not_replace_each_other() {
        let mut runs = vec![samples::run("a b", 1), samples::run("a.b", 1), samples::run("…", 1)];
        runs[2].guest = "…".to_owned();
        let written = write_all(&runs, &[]);
        let timelines = written
            .pictures
            .iter()
            .filter(|(name, _)| name.starts_with("timeline-intercontinental-small-a-b"));
        assert_eq!(timelines.count(), 2);
    }

    #[test]
    fn thousands_of_runs_are_one_report() {
        let (some, frontiers) = plan();
        let runs: Vec<Run> = some.iter().cycle().take(5_000).cloned().collect();
        let written = write_all(&runs, &frontiers);
        assert!(written.page.len() < 2_000_000, "{} bytes", written.page.len());
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = write(&[], &[samples::frontier("longhaul")], &file.join("report")).unwrap_err();
        assert!(error.to_string().contains("file/report"), "{error}");
    }
}
