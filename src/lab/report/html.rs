//! The report as one page that needs nothing beside it.
//!
//! It is written as XML is, each element closed, so that a test can read it; browsers take it as HTML.

use std::fmt::Write as _;

use super::charts::{Figure, dark_rules};
use super::document::{Block, Cell, Document, Kind, Table, Weight};
use super::escape::html;

/// The whole page.
pub(super) fn page(document: &Document) -> String {
    let mut page = String::new();
    let title = html(&document.title);
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{title}</title>\n<style>\n{STYLE}\
         @media screen and (prefers-color-scheme: dark) {{\n{}}}\n</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n",
        dark_rules("svg"),
    );
    let mut sections = document.blocks.iter().peekable();
    // What comes before the first section is read first; the contents follow.
    while let Some(block) = sections.next_if(|block| !matches!(block, Block::Section { .. })) {
        write_block(&mut page, block);
    }
    write_contents(&mut page, document);
    for block in sections {
        write_block(&mut page, block);
    }
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn write_contents(page: &mut String, document: &Document) {
    page.push_str("<nav aria-label=\"Contents\"><ul>\n");
    for block in &document.blocks {
        if let Block::Section { anchor, title } = block {
            let _ = writeln!(page, "<li><a href=\"#{}\">{}</a></li>", html(anchor), html(title));
        }
    }
    page.push_str("</ul></nav>\n");
}

fn write_block(page: &mut String, block: &Block) {
    let _ = match block {
        Block::Section { anchor, title } => writeln!(page, "<h2 id=\"{}\">{}</h2>", html(anchor), html(title)),
        Block::Heading(text) => writeln!(page, "<h3>{}</h3>", html(text)),
        Block::Paragraph(text) => writeln!(page, "<p>{}</p>", html(text)),
        Block::Notice(weight, text) => {
            let class = match weight {
                Weight::Good => "good",
                Weight::Known => "known",
                Weight::Grave => "grave",
            };
            writeln!(page, "<p class=\"notice {class}\">{}</p>", html(text))
        }
        Block::Table(table) => {
            write_table(page, table);
            Ok(())
        }
        Block::Figures(figures) => {
            page.push_str("<div class=\"figures\">\n");
            for figure in figures {
                write_figure(page, figure);
            }
            writeln!(page, "</div>")
        }
        Block::List(items) => {
            page.push_str("<ul>\n");
            for item in items {
                let _ = writeln!(page, "<li>{}</li>", html(item));
            }
            writeln!(page, "</ul>")
        }
    };
}

fn write_table(page: &mut String, table: &Table) {
    // A wide table is moved within its own frame; the frame takes the keyboard's focus for it.
    page.push_str("<div class=\"scroll\" tabindex=\"0\"><table>\n<thead><tr>");
    let class = |kind: Kind| match kind {
        Kind::Words => "",
        Kind::Number => " class=\"number\"",
    };
    for (index, column) in table.columns.iter().enumerate() {
        if index == 0 {
            let width = first_column(table);
            let title = html(&column.title);
            let _ = write!(page, "<th scope=\"col\" style=\"min-width:{width}ch\">{title}</th>");
            continue;
        }
        let _ = write!(
            page,
            "<th scope=\"col\"{}>{}</th>",
            class(column.is),
            html(&column.title)
        );
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in &table.rows {
        page.push_str("<tr>");
        for (index, (cell, column)) in row.iter().zip(&table.columns).enumerate() {
            if index == 0 {
                let _ = write!(page, "<th scope=\"row\">{}</th>", content(cell));
            } else {
                let _ = write!(page, "<td{}>{}</td>", class(column.is), content(cell));
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table></div>\n");
}

/// Letters that the names of the rows have room for. Where a table is too wide they would be broken at each hyphen; two lines are enough.
fn first_column(table: &Table) -> usize {
    let names = table.rows.iter().filter_map(|row| row.first());
    let longest = names.map(|cell| cell.text.chars().count()).max().unwrap_or(0);
    (longest / 2 + 3).clamp(7, 22)
}

fn content(cell: &Cell) -> String {
    let mut text = html(&cell.text);
    if cell.grave {
        text = format!("<strong class=\"grave\">{text}</strong>");
    }
    if let Some(small) = &cell.small {
        let _ = write!(text, "<small>{}</small>", html(small));
    }
    text
}

fn write_figure(page: &mut String, figure: &Figure) {
    let title = html(&figure.title);
    let picture = figure.picture.inline(&figure.title);
    if figure.picture.is_wide() {
        // The row is its own, and where that is too narrow it is moved within its frame instead of becoming unreadable.
        let _ = writeln!(
            page,
            "<figure class=\"wide\">\n<h4>{title}</h4>\n<div class=\"scroll\" tabindex=\"0\">{picture}</div>"
        );
    } else {
        let _ = writeln!(page, "<figure>\n<h4>{title}</h4>\n{picture}");
    }
    if !figure.caption.is_empty() {
        let _ = writeln!(page, "<figcaption>{}</figcaption>", html(&figure.caption));
    }
    page.push_str("</figure>\n");
}

const STYLE: &str = include_str!("page.css");
