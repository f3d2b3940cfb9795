//! Names and reasons come from files and other programs: here they become text that cannot be taken for markup.

/// Text in HTML and SVG, between tags and in quoted attributes.
pub(super) fn html(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 8);
    for character in text.chars().map(visible) {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// Text in one line of Markdown, in a cell of a table too.
pub(super) fn markdown(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 8);
    for character in text.chars().map(visible) {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' | '$' | '#' | '!' => {
                escaped.push('\\');
                escaped.push(character);
            }
            other => escaped.push(other),
        }
    }
    escaped
}

/// Text for a picture, whose drawing library does the rest: no character that XML forbids.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(visible).collect()
}

/// Part of a file's name.
pub(super) fn slug(text: &str) -> String {
    let mut slug = String::new();
    for character in text.chars().take(MAX_SLUG) {
        if character.is_ascii_alphanumeric() {
            slug.push(character.to_ascii_lowercase());
        } else if !slug.ends_with('-') {
            slug.push('-');
        }
    }
    slug.trim_matches('-').to_owned()
}

/// File names of 255 bytes are common; a number and an ending follow.
const MAX_SLUG: usize = 80;

/// XML has no control characters, and those that turn the direction of writing could make a line read as another.
fn visible(character: char) -> char {
    match character {
        '\n' | '\r' | '\t' => ' ',
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{fffe}' | '\u{ffff}' => '\u{fffd}',
        control if control.is_control() => '\u{fffd}',
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_markup_name_is_escaped() {
        let name = "<script>alert('1')</script> & \"more\"";
        assert_eq!(
            html(name),
            "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;more&quot;"
        );
        assert_eq!(
            markdown("a|b *c* [d](e) <f>\n# g"),
            r"a\|b \*c\* \[d\](e) &lt;f&gt; \# g"
        );
    }

    #[test]
    fn what_xml_forbids_is_replaced() {
        assert_eq!(html("a\0b\u{1b}[31m\u{202e}c"), "a\u{fffd}b\u{fffd}[31m\u{fffd}c");
        assert_eq!(plain("a\u{7}\tb"), "a\u{fffd} b");
    }

    #[test]
    fn a_file_name_cannot_lead_out_of_its_directory() {
        assert_eq!(slug("../../etc/Passwd"), "etc-passwd");
        assert_eq!(slug("…"), "");
        assert!(slug(&"x".repeat(1_000)).len() <= MAX_SLUG);
    }
}
