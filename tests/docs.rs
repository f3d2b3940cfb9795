//! What the pages say is there is there: links, commands with their flags, metrics.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use longhaul::metrics::SERIES;

const PAGES: [&str; 7] = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/lab.md",
    "docs/operators-guide.md",
    "docs/ownership.md",
    "docs/transport.md",
    "docs/wire-format.md",
];

#[test]
fn every_link_leads_to_a_file() {
    let mut broken = Vec::new();
    for page in PAGES {
        let text = read(page);
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap();
            let place = root().join(page).parent().unwrap().join(file);
            if !target.contains("://") && !file.is_empty() && !place.exists() {
                broken.push(format!("{page}: {target}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// In the pages, and in what the program itself tells operators to run.
#[test]
fn every_command_and_flag_that_is_named_exists() {
    let mut helps = BTreeMap::new();
    let mut wrong = Vec::new();
    let mut seen = 0;
    for file in PAGES.map(PathBuf::from).into_iter().chain(sources()) {
        for (verb, flags) in commands(&read(&file)) {
            let known = helps.entry(verb.clone()).or_insert_with(|| help(&verb));
            let Some(known) = known else {
                wrong.push(format!("{}: longhaul {verb}", file.display()));
                continue;
            };
            for flag in flags {
                seen += 1;
                if !known.contains(&flag) {
                    wrong.push(format!("{}: longhaul {verb} {flag}", file.display()));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 20, "only {seen} flags were found: the test does not see them");
}

#[test]
fn the_guide_has_a_row_for_each_metric_and_no_other() {
    let guide = read("docs/operators-guide.md");
    let (_, section) = guide.split_once("## Metrics and alerts").unwrap();
    let documented: BTreeSet<&str> = section
        .lines()
        .filter(|line| line.starts_with("| `longhaul_"))
        .flat_map(|line| line.split('|').nth(1).unwrap().split('`'))
        .filter(|name| name.starts_with("longhaul_"))
        .collect();
    let exported: BTreeSet<&str> = SERIES.iter().map(|series| series.name).collect();
    assert_eq!(documented, exported);
}

#[test]
fn an_alert_names_only_series_that_are_exported() {
    let alerts = read("config/longhaul-alerts.yml");
    let named: BTreeSet<&str> = alerts
        .lines()
        .filter(|line| line.trim_start().starts_with("expr:"))
        .flat_map(|line| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter(|word| word.starts_with("longhaul_"))
        .collect();
    let exported: BTreeSet<&str> = SERIES.iter().map(|series| series.name).collect();
    assert!(named.len() > 2 && named.is_subset(&exported), "{named:?}");
}

/// `longhaul VERB … --flag …` wherever it stands in a text: a name and the flags behind it, up to what ends a command.
fn commands(text: &str) -> Vec<(String, Vec<String>)> {
    // A text in the sources may go on in the next line.
    let joined: String = text.split("\\\n").map(str::trim_start).collect();
    let ends = |c: char| "`\n\";:,()|…>#".contains(c);
    let mut found = Vec::new();
    for rest in joined.split("longhaul ").skip(1) {
        let command = rest.split(ends).next().unwrap();
        // `[--flag VALUE]` in a synopsis.
        let mut words = command.split([' ', '[', ']', '<']).filter(|word| !word.is_empty());
        let Some(verb) = words.next().filter(|verb| VERBS.contains(verb)) else {
            continue;
        };
        // The lab has verbs of its own.
        let verb = match verb {
            "lab" => format!("lab {}", words.next().unwrap_or_default()),
            _ => verb.to_owned(),
        };
        let flags = words
            .filter(|word| {
                word.strip_prefix("--")
                    .is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
            })
            .map(|word| word.split('=').next().unwrap().trim_end_matches('.').to_owned());
        found.push((verb, flags.collect()));
    }
    found
}

/// Words behind `longhaul ` that are meant as verbs; `journal` and the like must not come back without their command.
const VERBS: [&str; 16] = [
    "gateway",
    "check-config",
    "migrate",
    "move-disk",
    "list",
    "status",
    "attach",
    "cancel",
    "resolve",
    "pair",
    "peers",
    "unpair",
    "fingerprint",
    "journal",
    "lab",
    "wan-emulator",
];

/// Every flag of a verb; nothing where there is no such verb.
fn help(verb: &str) -> Option<BTreeSet<String>> {
    let output = Command::new(env!("CARGO_BIN_EXE_longhaul"))
        .args(verb.split_whitespace())
        .arg("--help")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let flags = text
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '-')
        .filter(|word| word.starts_with("--"));
    output.status.success().then(|| flags.map(str::to_owned).collect())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: impl AsRef<Path>) -> String {
    let file = root().join(file);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The program's sources and its shipped configuration.
fn sources() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut places = vec![root().join("src"), root().join("config")];
    while let Some(place) = places.pop() {
        for entry in std::fs::read_dir(place).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                places.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files
}
