//! Reads one table of the configuration key by key, collects every mistake with its key and line, and knows which keys
//! were asked for, so that all others are unknown.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Values that flags and the environment put over the file: dotted key → text.
#[derive(Clone, Debug, Default)]
pub struct Overrides(BTreeMap<&'static str, String>);

impl Overrides {
    /// Puts `value` over the key `key` (dotted, as in `link.rate`); `None` leaves the file's value.
    pub fn set(&mut self, key: &'static str, value: Option<&str>) {
        if let Some(value) = value {
            self.0.insert(key, value.to_owned());
        }
    }
}

/// One mistake in a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line of the file, from 1; `None` where the value came from a flag or the environment, or is missing.
    pub line: Option<usize>,
    /// Dotted key, with the number of the entry for lists of tables: `vm[2].qmp`. Empty for mistakes of syntax.
    pub key: String,
    /// What is wrong with it and what to write instead.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// What all sections of one file share.
pub(super) struct Source<'a> {
    text: &'a str,
    overrides: &'a Overrides,
    problems: RefCell<Vec<Problem>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(text: &'a str, overrides: &'a Overrides) -> Self {
        Self {
            text,
            overrides,
            problems: RefCell::default(),
        }
    }

    /// The whole file as a table, or every mistake of its syntax.
    pub(super) fn top(&'a self) -> Result<Section<'a>, Vec<Problem>> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        if errors.is_empty() {
            return Ok(Section {
                source: self,
                path: String::new(),
                offset: 0,
                table: table.into_inner(),
                asked: Vec::new(),
                lines: BTreeMap::new(),
            });
        }
        let problem = |error: &toml::de::Error| Problem {
            line: error.span().map(|span| self.line(span.start)),
            key: self.repeated_key(error),
            message: error.message().to_owned(),
        };
        Err(errors.iter().map(problem).collect())
    }

    /// Every mistake so far, in the order of the file.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|problem| problem.line.unwrap_or(usize::MAX));
        problems
    }

    /// The key that is there twice, where that is the mistake; toml says only where it is.
    fn repeated_key(&self, error: &toml::de::Error) -> String {
        let span = error.span().filter(|_| error.message() == "duplicate key");
        let key = span.and_then(|span| self.text.get(span)).unwrap_or_default();
        key.trim().to_owned()
    }

    fn line(&self, offset: usize) -> usize {
        self.text.as_bytes()[..offset.min(self.text.len())]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            + 1
    }

    fn add(&self, line: Option<usize>, key: String, message: String) {
        self.problems.borrow_mut().push(Problem { line, key, message });
    }
}

/// One table of the file. Take every key that exists, then [`finish`](Section::finish).
pub(super) struct Section<'a> {
    source: &'a Source<'a>,
    path: String,
    offset: usize,
    table: DeTable<'a>,
    asked: Vec<&'static str>,
    /// Where the values stood that have been taken.
    lines: BTreeMap<&'static str, usize>,
}

impl<'a> Section<'a> {
    /// The value of `key` as `parse` reads it, from a flag or the environment before the file. `None` where it is
    /// absent or wrong; what is wrong is recorded.
    pub(super) fn value<T, E: fmt::Display>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let in_file = self.take(key);
        let path = self.key(key);
        if let Some(text) = self.source.overrides.0.get(path.as_str()) {
            return parse(text)
                .map_err(|error| {
                    let flag = key_as_flag(&path);
                    let message = format!("{text:?} from --{flag} or its environment variable: {error}");
                    self.source.add(None, path, message);
                })
                .ok();
        }
        let value = in_file?;
        let line = Some(self.source.line(value.span().start));
        let Some(text) = value.get_ref().as_str() else {
            let message = format!("expected a text in quotes, found {}", kind(value.get_ref()));
            self.source.add(line, path, message);
            return None;
        };
        parse(text)
            .map_err(|error| self.source.add(line, path, format!("{text:?}: {error}")))
            .ok()
    }

    /// As [`value`](Section::value), for a key that has no default.
    pub(super) fn required<T, E: fmt::Display>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, E>,
    ) -> Option<T> {
        let path = self.key(key);
        if !self.table.contains_key(key) && !self.source.overrides.0.contains_key(path.as_str()) {
            self.asked.push(key);
            self.source
                .add(self.line(), path, "is missing and has no default".to_owned());
            return None;
        }
        self.value(key, parse)
    }

    /// A list of texts.
    pub(super) fn texts(&mut self, key: &'static str) -> Option<Vec<String>> {
        let value = self.take(key)?;
        let line = Some(self.source.line(value.span().start));
        let texts = value.get_ref().as_array().and_then(|items| {
            items
                .iter()
                .map(|item| item.get_ref().as_str().map(str::to_owned))
                .collect()
        });
        if texts.is_none() {
            self.source.add(
                line,
                self.key(key),
                "expected a list of texts, for example [\"a\", \"b\"]".to_owned(),
            );
        }
        texts
    }

    /// The table `[key]`, empty where it is absent.
    pub(super) fn section(&mut self, key: &'static str) -> Section<'a> {
        let path = self.key(key);
        let (offset, table) = match self.take(key) {
            None => (0, DeTable::new()),
            Some(value) => {
                let offset = value.span().start;
                match value.into_inner() {
                    DeValue::Table(table) => (offset, table),
                    other => {
                        let message = format!("expected the table [{path}], found {}", kind(&other));
                        self.source.add(Some(self.source.line(offset)), path.clone(), message);
                        (offset, DeTable::new())
                    }
                }
            }
        };
        Section {
            source: self.source,
            path,
            offset,
            table,
            asked: Vec::new(),
            lines: BTreeMap::new(),
        }
    }

    /// The tables `[[key]]`, in the order of the file.
    pub(super) fn sections(&mut self, key: &'static str) -> Vec<Section<'a>> {
        let path = self.key(key);
        let Some(value) = self.take(key) else { return Vec::new() };
        let line = Some(self.source.line(value.span().start));
        let DeValue::Array(items) = value.into_inner() else {
            self.source.add(
                line,
                path.clone(),
                format!("write each one as a table of its own, under [[{path}]]"),
            );
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (number, item) in items.into_iter().enumerate() {
            let offset = item.span().start;
            let path = format!("{path}[{}]", number + 1);
            match item.into_inner() {
                DeValue::Table(table) => {
                    sections.push(Section {
                        source: self.source,
                        path,
                        offset,
                        table,
                        asked: Vec::new(),
                        lines: BTreeMap::new(),
                    });
                }
                other => {
                    let message = format!("expected a table, found {}", kind(&other));
                    self.source.add(Some(self.source.line(offset)), path, message);
                }
            }
        }
        sections
    }

    /// Whether the file has `key`, which was taken, be it right or wrong.
    pub(super) fn states(&self, key: &str) -> bool {
        self.lines.contains_key(key)
    }

    /// Records a mistake that only shows when several values are seen together.
    pub(super) fn mistake(&self, key: &str, message: impl Into<String>) {
        let line = self.lines.get(key).copied().or_else(|| self.line());
        self.source.add(line, self.key(key), message.into());
    }

    /// Whatever was not asked for is unknown.
    pub(super) fn finish(self) {
        for (key, value) in self.table.iter() {
            let known = self.asked.join(", ");
            let line = Some(self.source.line(key.span().start.min(value.span().start)));
            let message = format!("is not a key of this file; known here: {known}");
            self.source.add(line, self.key(key.get_ref()), message);
        }
    }

    fn take(&mut self, key: &'static str) -> Option<Spanned<DeValue<'a>>> {
        self.asked.push(key);
        let value = self.table.remove(key)?;
        self.lines.insert(key, self.source.line(value.span().start));
        Some(value)
    }

    fn key(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// Line of the table's head; `None` for the file itself and for tables that are absent.
    fn line(&self) -> Option<usize> {
        (self.offset > 0).then(|| self.source.line(self.offset))
    }
}

/// The text under `key` at the top of a file that may be full of mistakes.
pub(super) fn stated_text(text: &str, key: &str) -> Option<String> {
    let (table, _) = DeTable::parse_recoverable(text);
    table.get_ref().get(key)?.get_ref().as_str().map(str::to_owned)
}

/// The flag that stands for a key: `link.rate` → `link-rate`.
fn key_as_flag(key: &str) -> String {
    key.replace(['.', '_'], "-")
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a number without quotes and unit",
        DeValue::Float(_) => "a number without quotes and unit",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}
