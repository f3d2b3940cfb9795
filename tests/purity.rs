//! The invariants that the head of `src/lib.rs` promises, read from the sources.
//!
//! A small scanner takes comments, texts and test modules out of a file and lists every path that is left, absolute, with `use`
//! trees spelt out. It knows no macros and no glob imports of enums, which is enough: what it cannot see, a reader would not
//! call an import either.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What the pure core must not name, with the reason.
const IMPURE: &[(&str, &str)] = &[
    ("tokio", "a runtime"),
    ("tokio_util", "a runtime"),
    ("quinn", "sockets"),
    ("quinn_udp", "sockets"),
    ("rustls", "sockets"),
    ("governor", "a clock"),
    ("kvm_ioctls", "a hypervisor"),
    ("kvm_bindings", "a hypervisor"),
    ("rustix", "the system"),
    ("libc", "the system"),
    ("socket2", "sockets"),
    ("std::net", "sockets"),
    ("std::os", "the system"),
    ("std::fs", "files"),
    ("std::io", "files and streams"),
    ("std::env", "the environment"),
    ("std::process", "processes"),
    ("std::thread", "threads"),
    ("std::sync", "threads"),
    ("crossbeam", "threads"),
    ("std::time::Instant::now", "a clock"),
    ("Instant::now", "a clock"),
    ("std::time::SystemTime", "a clock"),
    ("SystemTime", "a clock"),
    ("jiff::Timestamp::now", "a clock"),
    ("Timestamp::now", "a clock"),
    ("jiff::Zoned", "a clock"),
    ("TimeZone::get", "files"),
    ("TimeZone::system", "the environment"),
    ("TimeZone::try_system", "the environment"),
    ("jiff::tz::db", "files"),
    ("jiff::tz::TimeZoneDatabase", "files"),
    ("rand", "randomness"),
    ("getrandom", "randomness"),
    ("aws_lc_rs", "randomness"),
];

/// What each part of `proto` may import of the others: the noun of the stage before it. Only `session` sees several stages.
const PROTO: &[(&str, &[&str])] = &[
    ("page", &[]),
    ("vmm_stream", &["page"]),
    (
        "reduce",
        &[
            "page",
            "vmm_stream::Record",
            "vmm_stream::PageRecord",
            "vmm_stream::PageKind",
            "vmm_stream::MAX_BLOCK_NAME",
            "vmm_stream::write_page_header",
        ],
    ),
    // It carries the messages of the ownership machines, and nothing else of any stage.
    ("wire", &["page", "ownership", "ownership::Message"]),
    ("session", &["page", "vmm_stream", "reduce", "wire"]),
    ("ownership", &["page"]),
    ("precopy", &["page"]),
    ("rate", &["page"]),
    ("disk", &[]),
];

/// What edges that know nothing of migrations may import of this crate.
const IGNORANT: &[(&str, &[&str])] = &[
    (
        "src/transport",
        &[
            "transport",
            "proto::page::ByteRate",
            "proto::rate",
            "store::fingerprint",
        ],
    ),
    ("src/shaper", &["shaper", "proto::page::ByteRate", "proto::rate"]),
];

/// Where `unsafe` may be.
const UNSAFE: &[&str] = &["src/wan/tun.rs", "src/wan/schedule.rs", "src/hypervisor/kvm/"];

#[test]
fn the_core_names_no_socket_file_thread_clock_or_random_source() {
    let found = violations("src/proto", |source| {
        source
            .paths
            .iter()
            .find_map(|path| impurity(path))
            .map(|(path, reason)| format!("{path} ({reason})"))
    });
    assert!(found.is_empty(), "src/proto is pure, but: {found:#?}");
}

#[test]
fn the_core_imports_nothing_of_the_edges() {
    let found = violations("src/proto", |source| {
        own_paths(source).find(|path| !within(path, "proto")).map(str::to_owned)
    });
    assert!(found.is_empty(), "src/proto stands alone, but: {found:#?}");
}

#[test]
fn a_stage_imports_only_the_noun_of_the_stage_before_it() {
    let known: BTreeSet<&str> = PROTO.iter().map(|(stage, _)| *stage).collect();
    let found = violations("src/proto", |source| {
        let stage = source.module.get(1)?.as_str();
        let Some((_, allowed)) = PROTO.iter().find(|(name, _)| *name == stage) else {
            return Some(format!("the stage {stage} is not in the table of tests/purity.rs"));
        };
        own_paths(source)
            .filter_map(|path| path.strip_prefix("proto::"))
            .filter(|path| known.contains(path.split("::").next().unwrap_or_default()) && !within(path, stage))
            .find(|path| !allowed.iter().any(|noun| permits(noun, path)))
            .map(str::to_owned)
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn transport_knows_no_pages_and_shaper_no_migrations() {
    for (place, allowed) in IGNORANT {
        let found = violations(place, |source| {
            own_paths(source)
                .find(|path| !allowed.iter().any(|may| within(path, may)))
                .map(str::to_owned)
        });
        assert!(found.is_empty(), "{found:#?}");
    }
}

#[test]
fn unsafe_is_only_where_it_is_allowed() {
    let found = violations("src", |source| {
        let allowed = UNSAFE
            .iter()
            .any(|place| source.file.to_string_lossy().starts_with(place));
        (!allowed && source.words.contains("unsafe")).then(|| "unsafe".to_owned())
    });
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn the_scanner_sees_what_it_must_and_nothing_else() {
    let source = Source::new(
        Path::new("src/proto/wire/frame.rs"),
        r##"
            //! std::fs in a comment
            use std::{io::Read, time::{Duration, Instant}};
            use super::super::page::{self, PageDigest as Digest};
            use crate::gateway::*;
            /* tokio::spawn /* nested */ std::net */
            const TEXT: &str = "quinn::Endpoint \" rustls::X";
            const RAW: &str = r#"libc::kill "quoted" "#;
            fn f<'a>(c: char) -> Instant { let _ = ['"', '\'', 'x']; rand::random(); Instant::now() }
            #[cfg(test)]
            mod tests { use std::thread; fn g() { let _ = "}"; } }
            fn after() { std::process::exit(1) }
        "##,
    );
    let paths: Vec<&str> = source.paths.iter().map(String::as_str).collect();
    assert_eq!(
        paths,
        [
            "Instant::now",
            "crate::gateway",
            "crate::proto::page",
            "crate::proto::page::PageDigest",
            "rand::random",
            "std::io::Read",
            "std::process::exit",
            "std::time::Duration",
            "std::time::Instant",
        ]
    );
    assert_eq!(impurity("rand::random"), Some(("rand::random", "randomness")));
    assert_eq!(impurity("random::rand"), None);
    assert!(!source.words.contains("thread") && source.words.contains("after"));
}

/// What `judge` says against each file of `place`, as `file: what`. A place without files is a mistake of this test.
fn violations(place: &str, judge: impl Fn(&Source) -> Option<String>) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join(place), &mut files);
    assert!(!files.is_empty(), "{place} has no sources");
    files
        .iter()
        .filter_map(|file| {
            let text = fs::read_to_string(file).expect("a source file can be read");
            let file = file.strip_prefix(root).expect("it is below the root");
            judge(&Source::new(file, &text)).map(|what| format!("{}: {what}", file.display()))
        })
        .collect()
}

/// Sources below `place`, without those of test modules.
fn collect(place: &Path, files: &mut Vec<PathBuf>) {
    if place.is_file() {
        files.push(place.to_owned());
        return;
    }
    for entry in fs::read_dir(place).unwrap_or_else(|error| panic!("{}: {error}", place.display())) {
        let path = entry.expect("a directory can be listed").path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let is_test = stem == "tests" || stem.ends_with("_tests");
        if !is_test && (path.is_dir() || path.extension().is_some_and(|extension| extension == "rs")) {
            collect(&path, files);
        }
    }
}

/// The path and the reason, where it is one that the core must not name.
fn impurity(path: &str) -> Option<(&str, &'static str)> {
    IMPURE
        .iter()
        .find(|(impure, _)| within(path, impure))
        .map(|(_, reason)| (path, *reason))
}

/// The paths of this crate that a file names, without `crate::`.
fn own_paths(source: &Source) -> impl Iterator<Item = &str> {
    source.paths.iter().filter_map(|path| path.strip_prefix("crate::"))
}

/// Whether `path` is `outer` or inside it.
fn within(path: &str, outer: &str) -> bool {
    path.strip_prefix(outer)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Whether the noun, a module or a single item, permits the path. A module that is named with items permits nothing else.
fn permits(noun: &str, path: &str) -> bool {
    within(path, noun) && (noun != "ownership" || path == noun)
}

/// What is left of a file without comments, texts and test modules.
struct Source {
    file: PathBuf,
    /// `["proto", "wire", "frame"]`
    module: Vec<String>,
    /// Every path of at least two names, absolute where it begins with `self`, `super` or `crate`.
    paths: BTreeSet<String>,
    /// Every word.
    words: BTreeSet<String>,
}

impl Source {
    fn new(file: &Path, text: &str) -> Self {
        let module: Vec<String> = file
            .with_extension("")
            .components()
            .skip(1)
            .map(|part| part.as_os_str().to_string_lossy().into_owned())
            .filter(|part| part != "mod" && part != "lib")
            .collect();
        let tokens = without_tests(tokens(text));
        let mut source = Self {
            file: file.to_owned(),
            module,
            paths: BTreeSet::new(),
            words: tokens.iter().filter(|token| is_word(token)).cloned().collect(),
        };
        let mut rest = tokens.as_slice();
        while let Some((token, after)) = rest.split_first() {
            rest = after;
            if token == "use" {
                source.tree(&[], &mut rest);
            } else if is_word(token) && after.first().is_some_and(|next| next == "::") {
                let mut path = vec![token.clone()];
                while let [separator, name, after @ ..] = rest
                    && separator == "::"
                    && is_word(name)
                {
                    path.push(name.clone());
                    rest = after;
                }
                source.add(&path);
            }
        }
        source
    }

    /// One tree of a `use`: a path, a list in braces, or `*`; leaves `rest` behind it.
    fn tree(&mut self, prefix: &[String], rest: &mut &[String]) {
        let mut path = prefix.to_vec();
        while let Some((token, after)) = rest.split_first() {
            *rest = after;
            match token.as_str() {
                "::" => {}
                "{" => {
                    while rest.first().is_some_and(|token| token != "}") {
                        self.tree(&path, rest);
                        if rest.first().is_some_and(|token| token == ",") {
                            *rest = &rest[1..];
                        }
                    }
                    *rest = rest.get(1..).unwrap_or_default();
                    return;
                }
                "self" if !path.is_empty() => {}
                "as" => *rest = rest.get(1..).unwrap_or_default(),
                word if is_word(word) => path.push(word.to_owned()),
                _ => {}
            }
            if rest.first().is_none_or(|next| [",", "}", ";"].contains(&next.as_str())) {
                break;
            }
        }
        self.add(&path);
    }

    fn add(&mut self, path: &[String]) {
        let mut absolute: Vec<&str> = Vec::new();
        let mut names = path.iter().map(String::as_str).peekable();
        match names.peek() {
            Some(&("self" | "super")) => {
                absolute.push("crate");
                absolute.extend(self.module.iter().map(String::as_str));
                // A file `x/mod.rs` is the module x, and so is `x.rs`.
                while let Some(name) = names.next_if(|name| ["self", "super"].contains(name)) {
                    if name == "super" {
                        absolute.pop();
                    }
                }
            }
            Some(&"Self") | None => return,
            Some(_) => {}
        }
        absolute.extend(names);
        if absolute.len() > 1 {
            self.paths.insert(absolute.join("::"));
        }
    }
}

fn is_word(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphabetic() || first == '_')
}

/// Words, `::` and single other characters; comments, texts and lifetimes are left out.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(length) = raw_text(rest) {
            length
        } else if first == '"' {
            quoted(rest, '"')
        } else if first == '\'' {
            // A lifetime has no second quote right behind its first character.
            let mut following = rest.chars().skip(1);
            match (following.next(), following.next()) {
                (Some('\\'), _) | (_, Some('\'')) => quoted(rest, '\''),
                _ => 1,
            }
        } else if is_word(rest) {
            let length = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            tokens.push(rest[..length].to_owned());
            length
        } else if rest.starts_with("::") {
            tokens.push("::".to_owned());
            2
        } else {
            if !first.is_whitespace() {
                tokens.push(first.to_string());
            }
            first.len_utf8()
        };
        rest = &rest[length..];
    }
    tokens
}

/// Length of the block comment at the start of `text`; they nest.
fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        if text[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if text[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    at
}

/// Length of the raw text (`r"…"`, `br#"…"#`) at the start of `text`.
fn raw_text(text: &str) -> Option<usize> {
    let prefix = ["r", "br", "cr"].iter().find(|prefix| {
        text.strip_prefix(**prefix)
            .is_some_and(|rest| rest.trim_start_matches('#').starts_with('"'))
    })?;
    let hashes = text[prefix.len()..].find('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let start = prefix.len() + hashes + 1;
    Some(
        text[start..]
            .find(&end)
            .map_or(text.len(), |found| start + found + end.len()),
    )
}

/// Length of the text or character in quotes at the start of `text`.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if !escaped && c == quote {
            return at + c.len_utf8();
        }
        escaped = !escaped && c == '\\';
    }
    text.len()
}

/// Takes out what follows `#[cfg(test)]`: an item up to its `;`, or up to the end of its braces.
fn without_tests(tokens: Vec<String>) -> Vec<String> {
    const ATTRIBUTE: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !tokens[at..].iter().take(ATTRIBUTE.len()).eq(ATTRIBUTE) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let mut depth = 0;
        at += ATTRIBUTE.len();
        while at < tokens.len() {
            match tokens[at].as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            let over = depth == 0 && ["}", ";"].contains(&tokens[at].as_str());
            at += 1;
            if over {
                break;
            }
        }
    }
    kept
}
