//! Cuts a byte stream into top-level JSON objects.
//!
//! QEMU usually sends one object a line, but spreads it over many lines when the monitor was created with `pretty=on`, so
//! lines are not the unit: braces are. Each byte is looked at once, and an object longer than the limit is refused before
//! more of it is stored.

use bytes::{Bytes, BytesMut};

/// Takes bytes in any slicing and gives back whole objects.
#[derive(Debug)]
pub(super) struct ObjectScanner {
    buffer: BytesMut,
    /// How much of `buffer` was looked at; always inside the current object.
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    limit: usize,
}

/// Why the stream is not a sequence of JSON objects.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ScanError {
    #[error("it sent {0:?} where a JSON object was due")]
    NotAnObject(String),
    #[error("it sent a message of more than {0} bytes")]
    TooLong(usize),
}

impl ObjectScanner {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            scanned: 0,
            depth: 0,
            in_string: false,
            escaped: false,
            limit,
        }
    }

    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole object, or `None` until more bytes are fed.
    pub(super) fn next_object(&mut self) -> Result<Option<Bytes>, ScanError> {
        if self.depth == 0 {
            let blank = self.buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let _ = self.buffer.split_to(blank);
            match self.buffer.first() {
                None => return Ok(None),
                Some(b'{') => {}
                Some(_) => return Err(ScanError::NotAnObject(self.opening())),
            }
        }
        while let Some(&byte) = self.buffer.get(self.scanned) {
            self.scanned += 1;
            if self.scanned > self.limit {
                return Err(ScanError::TooLong(self.limit));
            }
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.in_string = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' => self.depth += 1,
                b'}' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        let end = std::mem::take(&mut self.scanned);
                        return Ok(Some(self.buffer.split_to(end).freeze()));
                    }
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// Whether an object has begun and its end has not arrived.
    pub(super) fn is_inside_object(&self) -> bool {
        self.depth > 0
    }

    /// The first characters of what is buffered, for an error text.
    fn opening(&self) -> String {
        let shown = &self.buffer[..self.buffer.len().min(40)];
        String::from_utf8_lossy(shown).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(scanner: &mut ObjectScanner) -> Vec<Bytes> {
        std::iter::from_fn(|| scanner.next_object().unwrap()).collect()
    }

    #[test]
    fn braces_and_quotes_inside_strings_do_not_end_an_object() {
        let text = br#"{"a": "}\"{\\"} {"b": {"c": "{"}}"#;
        let mut scanner = ObjectScanner::new(100);
        scanner.feed(text);
        assert_eq!(
            all(&mut scanner),
            [&br#"{"a": "}\"{\\"}"#[..], &br#"{"b": {"c": "{"}}"#[..]]
        );
        assert!(!scanner.is_inside_object());
    }

    #[test]
    fn an_object_spread_over_lines_is_one_object() {
        let mut scanner = ObjectScanner::new(100);
        scanner.feed(b"\r\n{\r\n    \"a\": 1\r\n}\r\n{");
        assert_eq!(all(&mut scanner), [&b"{\r\n    \"a\": 1\r\n}"[..]]);
        assert!(scanner.is_inside_object());
    }

    #[test]
    fn what_is_no_object_is_quoted_in_the_error() {
        let mut scanner = ObjectScanner::new(100);
        scanner.feed(b"QEMU 10.0.2 monitor - type 'help' for more information\r\n(qemu) ");
        let error = scanner.next_object().unwrap_err();
        assert_eq!(
            error,
            ScanError::NotAnObject("QEMU 10.0.2 monitor - type 'help' for mo".into())
        );
    }

    #[test]
    fn an_object_of_the_limit_passes_and_one_byte_more_does_not() {
        let object = br#"{"a": 12345}"#;
        let mut scanner = ObjectScanner::new(object.len());
        scanner.feed(object);
        assert_eq!(all(&mut scanner).len(), 1);
        let mut scanner = ObjectScanner::new(object.len() - 1);
        scanner.feed(object);
        assert_eq!(scanner.next_object(), Err(ScanError::TooLong(object.len() - 1)));
    }

    proptest! {
        #[test]
        fn any_slicing_gives_the_same_objects(cuts in proptest::collection::vec(1usize..9, 1..60)) {
            let text = br#"{"QMP": {"v": [1, {"x": "}"}]}} {} {"return": {}, "id": 7}"#;
            let mut scanner = ObjectScanner::new(1000);
            let mut objects = Vec::new();
            let mut rest = &text[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                scanner.feed(now);
                objects.append(&mut all(&mut scanner));
                rest = later;
                if rest.is_empty() { break; }
            }
            prop_assert_eq!(objects.len(), 3);
            prop_assert_eq!(&objects[2][..], br#"{"return": {}, "id": 7}"#);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut scanner = ObjectScanner::new(64);
            scanner.feed(&bytes);
            while let Ok(Some(object)) = scanner.next_object() {
                prop_assert!(object.len() <= 64);
            }
        }
    }
}
