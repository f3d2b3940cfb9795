//! The report as Markdown; its pictures are files beside it.

use std::fmt::Write as _;

use super::document::{Block, Cell, Document, Kind, Table, Weight};
use super::escape::markdown;

/// The whole text. `file` tells the name of a picture's file.
pub(super) fn text(document: &Document, mut file: impl FnMut(&super::charts::Figure) -> String) -> String {
    let mut text = format!("# {}\n", markdown(&document.title));
    for block in &document.blocks {
        text.push('\n');
        let _ = match block {
            Block::Section { title, .. } => writeln!(text, "## {}", markdown(title)),
            Block::Heading(heading) => writeln!(text, "### {}", markdown(heading)),
            Block::Paragraph(paragraph) => writeln!(text, "{}", markdown(paragraph)),
            Block::Notice(Weight::Good, notice) => writeln!(text, "> {}", markdown(notice)),
            Block::Notice(Weight::Known, notice) => writeln!(text, "> **Note:** {}", markdown(notice)),
            Block::Notice(Weight::Grave, notice) => writeln!(text, "> **Warning:** {}", markdown(notice)),
            Block::Table(table) => {
                write_table(&mut text, table);
                Ok(())
            }
            Block::Figures(figures) => {
                for (index, figure) in figures.iter().enumerate() {
                    let title = markdown(&figure.title);
                    let gap = if index == 0 { "" } else { "\n" };
                    let _ = writeln!(text, "{gap}**{title}**\n\n![{title}]({})", file(figure));
                    if !figure.caption.is_empty() {
                        let _ = writeln!(text, "\n{}", markdown(&figure.caption));
                    }
                }
                Ok(())
            }
            Block::List(items) => {
                for item in items {
                    let _ = writeln!(text, "- {}", markdown(item));
                }
                Ok(())
            }
        };
    }
    text
}

fn write_table(text: &mut String, table: &Table) {
    let mut line = |cells: Vec<String>| {
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    line(table.columns.iter().map(|column| markdown(&column.title)).collect());
    let rule = |kind: Kind| match kind {
        Kind::Words => "---".to_owned(),
        Kind::Number => "---:".to_owned(),
    };
    line(table.columns.iter().map(|column| rule(column.is)).collect());
    for row in &table.rows {
        line(row.iter().map(content).collect());
    }
}

fn content(cell: &Cell) -> String {
    let mut text = markdown(&cell.text);
    if cell.grave {
        text = format!("**{text}**");
    }
    if let Some(small) = &cell.small {
        let _ = write!(text, " ({})", markdown(small));
    }
    text
}
