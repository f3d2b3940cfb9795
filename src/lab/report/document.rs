//! The report before it is HTML or Markdown: both say the same because both are written from this.
//!
//! All text is as it was found; whoever writes it escapes it.

use super::charts::Figure;

/// A whole report.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) title: String,
    pub(super) blocks: Vec<Block>,
}

#[derive(Debug)]
pub(super) enum Block {
    /// Of a section. It is in the table of contents, which leads to its anchor.
    Section {
        anchor: &'static str,
        title: &'static str,
    },
    /// Within a section.
    Heading(String),
    Paragraph(String),
    /// Something that a reader must not miss.
    Notice(Weight, String),
    Table(Table),
    /// Pictures that belong beside each other.
    Figures(Vec<Figure>),
    List(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weight {
    /// As it should be.
    Good,
    /// To be known before the figures are read.
    Known,
    /// Not as it should be.
    Grave,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) columns: Vec<Column>,
    pub(super) rows: Vec<Vec<Cell>>,
}

#[derive(Debug)]
pub(super) struct Column {
    pub(super) title: String,
    pub(super) is: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Words,
    Number,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    pub(super) text: String,
    /// Said more quietly.
    pub(super) small: Option<String>,
    pub(super) grave: bool,
}

impl Cell {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            ..Self::default()
        }
    }

    /// What was not measured.
    pub(super) fn nothing() -> Self {
        Self::new(NOTHING)
    }

    pub(super) fn small(self, small: Option<String>) -> Self {
        Self { small, ..self }
    }
}

impl Table {
    pub(super) fn new(columns: impl IntoIterator<Item = (impl Into<String>, Kind)>) -> Self {
        let column = |(title, is): (_, Kind)| Column {
            title: Into::<String>::into(title),
            is,
        };
        Self {
            columns: columns.into_iter().map(column).collect(),
            rows: Vec::new(),
        }
    }

    /// The table without columns in which nothing was measured.
    pub(super) fn without_empty_columns(mut self) -> Self {
        let empty = |column: usize| {
            self.rows
                .iter()
                .all(|row| row.get(column).is_none_or(|cell| *cell == Cell::nothing()))
        };
        let kept: Vec<bool> = (0..self.columns.len())
            .map(|column| column == 0 || !empty(column))
            .collect();
        let mut keep = kept.iter();
        self.columns.retain(|_| *keep.next().unwrap_or(&true));
        for row in &mut self.rows {
            let mut keep = kept.iter();
            row.retain(|_| *keep.next().unwrap_or(&true));
        }
        self
    }
}

const NOTHING: &str = "–";
