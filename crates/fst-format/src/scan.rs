//! A scanner of plain JSON: what writers of checkpoints write.
//!
//! Headers and indices of large models are megabytes of one shape, over and over, of which serde
//! sees every token twice. This scanner goes over the bytes once. It knows less than JSON: strings
//! without escapes, whole numbers. Whoever uses it takes `None` for "not plain" and reads the text
//! again with serde_json, whose verdict and whose words for errors count. So all that must hold
//! here is that a text which the scanner accepts means the same to serde_json.

use std::ops::Range;

use serde::Deserialize;

/// A place in a text.
pub(crate) struct Scanner<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Scanner<'t> {
    pub(crate) fn new(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    fn rest(&self) -> &'t [u8] {
        &self.text.as_bytes()[self.at..]
    }

    /// Goes over white space.
    fn skip_space(&mut self) {
        let space = |byte: &&u8| matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
        self.at += self.rest().iter().take_while(space).count();
    }

    /// Takes this byte, with white space before it.
    pub(crate) fn take(&mut self, byte: u8) -> bool {
        if self.rest().first() != Some(&byte) {
            self.skip_space();
        }
        let found = self.rest().first() == Some(&byte);
        self.at += usize::from(found);
        found
    }

    /// Takes this byte, or is not plain.
    pub(crate) fn expect(&mut self, byte: u8) -> Option<()> {
        self.take(byte).then_some(())
    }

    /// Takes the comma before another item, or `close`: whether there is another item.
    pub(crate) fn another(&mut self, close: u8) -> Option<bool> {
        if self.take(b',') { Some(true) } else { self.expect(close).map(|()| false) }
    }

    /// Takes this text, with white space before it.
    pub(crate) fn take_text(&mut self, text: &str) -> bool {
        if !self.rest().starts_with(text.as_bytes()) {
            self.skip_space();
        }
        let found = self.rest().starts_with(text.as_bytes());
        self.at += if found { text.len() } else { 0 };
        found
    }

    /// A string without escapes, as its place in the text.
    pub(crate) fn string(&mut self) -> Option<Range<usize>> {
        self.expect(b'"')?;
        let start = self.at;
        let mut chunks = self.rest().chunks_exact(8);
        for chunk in &mut chunks {
            let special = special_bytes(u64::from_le_bytes(chunk.try_into().ok()?));
            if special != 0 {
                self.at += special.trailing_zeros() as usize / 8;
                return self.end_string(start);
            }
            self.at += 8;
        }
        self.at += chunks.remainder().iter().take_while(|byte| !is_special(**byte)).count();
        self.end_string(start)
    }

    fn end_string(&mut self, start: usize) -> Option<Range<usize>> {
        let end = self.at;
        (self.rest().first() == Some(&b'"')).then(|| {
            self.at += 1;
            start..end
        })
    }

    /// The text of a place.
    pub(crate) fn text(&self, range: Range<usize>) -> &'t str {
        &self.text[range]
    }

    /// A whole number that is not negative.
    pub(crate) fn number(&mut self) -> Option<u64> {
        self.skip_space();
        let rest = self.rest();
        let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let leading_zero = digits > 1 && rest[0] == b'0';
        // 19 digits fit; a number that goes on as a fraction or a power does not end in `,` or `]`.
        if !(1..=19).contains(&digits) || leading_zero {
            return None;
        }
        self.at += digits;
        Some(rest[..digits].iter().fold(0, |sum, byte| sum * 10 + u64::from(byte - b'0')))
    }

    /// Any value, as serde_json reads it.
    pub(crate) fn value<T: Deserialize<'t>>(&mut self) -> Option<T> {
        let mut values = serde_json::Deserializer::from_str(&self.text[self.at..]).into_iter();
        let value = values.next()?.ok()?;
        self.at += values.byte_offset();
        Some(value)
    }

    /// Nothing but white space is left.
    pub(crate) fn end(mut self) -> Option<()> {
        self.skip_space();
        self.rest().is_empty().then_some(())
    }
}

/// Whether a string cannot go on behind this byte as if it were plain.
fn is_special(byte: u8) -> bool {
    matches!(byte, b'"' | b'\\' | 0..0x20)
}

/// The lowest set bit is in the first byte that is special; higher ones may be false.
fn special_bytes(chunk: u64) -> u64 {
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    const HIGHS: u64 = ONES << 7;
    // Lowest byte below `n`, for n up to 128, is the lowest byte of which this borrows.
    let below = |bytes: u64, n: u64| bytes.wrapping_sub(ONES * n) & !bytes & HIGHS;
    let equal = |byte: u8| below(chunk ^ (ONES * u64::from(byte)), 1);
    equal(b'"') | equal(b'\\') | below(chunk, 0x20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_special_byte_is_found_in_any_place() {
        for special in 0..=255u8 {
            for place in 0..8 {
                for other in [b'a', b'!', b'#', b'[', b']', b' ', 0x80, 0xFF, 0xA2] {
                    let mut bytes = [other; 8];
                    bytes[place] = special;
                    let found = special_bytes(u64::from_le_bytes(bytes)).trailing_zeros() / 8;
                    let first = bytes.iter().position(|byte| is_special(*byte)).unwrap_or(8);
                    assert_eq!(found as usize, first, "{bytes:x?}");
                }
            }
        }
    }

    #[test]
    fn strings_end_where_they_end() {
        for len in 0..40 {
            for rest in 0..10 {
                let name = "é".repeat(len / 2) + &"x".repeat(len % 2);
                let text = format!("\"{name}\"{}", "y".repeat(rest));
                let mut scanner = Scanner::new(&text);
                let range = scanner.string().unwrap();
                assert_eq!(scanner.text(range), name);
                assert_eq!(scanner.rest().len(), rest);
            }
        }
        for text in ["", "\"", "\"abc", "\"a\\nb\"", "\"a\nb\"", "abc\"", "\"0123456789\\\""] {
            assert_eq!(Scanner::new(text).string(), None, "{text}");
        }
    }

    #[test]
    fn numbers_are_those_of_json() {
        for text in ["0", "7", "10", " 42", "9999999999999999999"] {
            assert_eq!(Scanner::new(text).number(), text.trim().parse().ok(), "{text}");
        }
        for text in ["", "-1", "+1", "01", "00", "x", "99999999999999999999", "\"1\""] {
            assert_eq!(Scanner::new(text).number(), None, "{text}");
        }
    }
}
