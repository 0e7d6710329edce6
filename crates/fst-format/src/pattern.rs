//! Patterns that choose tensors by their names: globs, and ranges of numbers in braces. Pure.

use std::fmt;
use std::str::FromStr;

use fast_glob::ErrorKind;

/// A pattern for tensors' names.
///
/// `*` stands for any text, `/` and the empty text included (`**` is the same), `?` for a character, `[a-z]` for one of several, `{a,b}` for one of the
/// alternatives; an alternative `5..11` stands for the numbers from 5 to 11, so that
/// `model.layers.{0,5..11}.*` are seven layers. `\` before such a character takes it as it is, and
/// `!` at the start means what does not match.
///
/// ```
/// use fst_format::Pattern;
///
/// let pattern: Pattern = "layers.{0,5..11}.*".parse()?;
/// assert!(pattern.matches("layers.10.mlp.weight") && !pattern.matches("layers.1.mlp.weight"));
/// assert!("layers.{5..11.*".parse::<Pattern>().is_err());
/// # Ok::<(), fst_format::PatternError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: String,
    /// The same without ranges, and with [`SLASH`] for `/`.
    glob: String,
}

/// Stands for `/` in globs and in the names that they are compared with, for a glob's `*` ends at a `/`:
/// a tensor's name is no path. A control character, which names have no use for.
const SLASH: char = '\u{1f}';

/// Why a text is no pattern. Places are bytes from its start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PatternError {
    /// A brace without its end.
    #[error("the {{ at byte {at} is never closed")]
    UnclosedBrace {
        /// Where it is.
        at: usize,
    },
    /// A bracket without its end.
    #[error("the [ at byte {at} is never closed")]
    UnclosedBracket {
        /// Where it is.
        at: usize,
    },
    /// Nothing follows a backslash.
    #[error("nothing follows the \\ at byte {at}")]
    TrailingBackslash {
        /// Where it is.
        at: usize,
    },
    /// More braces than can be handled, within or behind each other.
    #[error("the {{ at byte {at} is one too many")]
    TooManyBraces {
        /// Where the first one too many is.
        at: usize,
    },
    /// A range that is not one from a number to a higher one.
    #[error(
        "{found:?} at byte {at} is no range: expected two numbers without leading zeros, the lower \
         one first, such as 0..11"
    )]
    Range {
        /// Where it starts.
        at: usize,
        /// What is there.
        found: String,
    },
    /// A range of characters in brackets that ends before it starts.
    #[error("{found:?} at byte {at} is no range: the lower character comes first, such as a-z")]
    BackwardRange {
        /// Where it starts.
        at: usize,
        /// What is there.
        found: String,
    },
    /// Something else.
    #[error("it makes no sense from byte {at} on")]
    Other {
        /// Where that starts.
        at: usize,
    },
}

impl Pattern {
    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether a tensor of this name is meant.
    pub fn matches(&self, name: &str) -> bool {
        match name {
            // No glob matches an empty text: what matches it matches one more character followed by the same.
            "" => fast_glob::glob_match(format!("{}_", self.glob), "_"),
            _ if name.contains('/') => {
                fast_glob::glob_match(&self.glob, name.replace('/', SLASH.encode_utf8(&mut [0; 4])))
            }
            _ => fast_glob::glob_match(&self.glob, name),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        fast_glob::validate(text).map_err(|error| {
            let at = error.index;
            match error.kind {
                ErrorKind::UnclosedBrace => PatternError::UnclosedBrace { at },
                ErrorKind::UnclosedBracket => PatternError::UnclosedBracket { at },
                ErrorKind::TrailingBackslash => PatternError::TrailingBackslash { at },
                ErrorKind::BraceNestingTooDeep | ErrorKind::TooManyBraceGroups => {
                    PatternError::TooManyBraces { at }
                }
                _ => PatternError::Other { at },
            }
        })?;
        Ok(Self { text: text.to_owned(), glob: without_ranges(text)? })
    }
}

/// The glob in which each range is written as alternatives of digits, of which there are few: names
/// are matched by the thousand. `text` is a valid glob.
fn without_ranges(text: &str) -> Result<String, PatternError> {
    let mut glob = String::with_capacity(text.len());
    let mut depth = 0usize;
    // Where the alternative starts that holds nothing special so far.
    let mut plain: Option<usize> = None;
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        if matches!(character, ',' | '}')
            && let Some(start) = plain.filter(|_| depth > 0)
            && let Some(range) = range(&text[start..at], start)?
        {
            glob.truncate(glob.len() - (at - start));
            glob.push_str(&range.join(","));
        }
        glob.push(slash(character));
        match character {
            '{' => (depth, plain) = (depth + 1, Some(at + 1)),
            // Behind a group within a group the alternative goes on, and is not plain.
            '}' => (depth, plain) = (depth.saturating_sub(1), None),
            ',' => plain = Some(at + 1),
            '\\' => {
                plain = None;
                glob.extend(characters.next().map(|(_, escaped)| slash(escaped)));
            }
            '[' => {
                plain = None;
                copy_class(&mut characters, &mut glob)?;
            }
            _ => {}
        }
    }
    Ok(glob)
}

/// What a character of a pattern is in its glob.
fn slash(character: char) -> char {
    if character == '/' { SLASH } else { character }
}

/// Copies what follows a `[`, to the `]` that ends it: not one that comes first, or is escaped.
fn copy_class(
    characters: &mut std::str::CharIndices<'_>,
    glob: &mut String,
) -> Result<(), PatternError> {
    let (mut any, mut escaped) = (false, false);
    // The character before, and whether a `-` behind it makes a range of it and the one after.
    let (mut before, mut dash): (Option<(usize, char)>, bool) = (None, false);
    let mut has_slash = false;
    for (index, (at, character)) in characters.by_ref().enumerate() {
        match character {
            '^' | '!' if index == 0 => {
                glob.push(character);
                continue;
            }
            '\\' if !escaped => {
                glob.push(character);
                (escaped, any) = (true, true);
                continue;
            }
            ']' if any && !escaped => {
                if has_slash {
                    glob.push(SLASH);
                }
                glob.push(character);
                return Ok(());
            }
            '-' if !escaped && before.is_some() && !dash => dash = true,
            _ => {
                let from = before.filter(|_| dash);
                if let Some((start, low)) = from {
                    if low > character {
                        let found = format!("{low}-{character}");
                        return Err(PatternError::BackwardRange { at: start, found });
                    }
                    has_slash |= low <= '/' && character >= '/';
                }
                has_slash |= character == '/';
                (before, dash) = (from.is_none().then_some((at, character)), false);
            }
        }
        glob.push(character);
        (escaped, any) = (false, true);
    }
    Ok(())
}

/// What a range stands for; `None` for an alternative that is none.
fn range(text: &str, at: usize) -> Result<Option<Vec<String>>, PatternError> {
    let Some((from, to)) = text.split_once("..") else { return Ok(None) };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(from) || !digits(to) {
        return Ok(None);
    }
    let number = |text: &str| -> Option<u64> {
        text.parse().ok().filter(|number: &u64| number.to_string() == text)
    };
    match number(from).zip(number(to)) {
        Some((from, to)) if from <= to => Ok(Some(numbers(from, to))),
        _ => Err(PatternError::Range { at, found: text.to_owned() }),
    }
}

/// Globs of digits that match the numbers `from..=to` and nothing else.
fn numbers(from: u64, to: u64) -> Vec<String> {
    let mut globs = Vec::new();
    let mut low = from;
    loop {
        // The highest number of as many digits.
        let most = 10u64.checked_pow(low.to_string().len() as u32).map_or(u64::MAX, |n| n - 1);
        let high = most.min(to);
        cover(String::new(), low.to_string().as_bytes(), high.to_string().as_bytes(), &mut globs);
        if high == to {
            return globs;
        }
        low = high + 1;
    }
}

/// Globs for `low..=high`, which have equally many digits, behind `prefix`.
fn cover(mut prefix: String, low: &[u8], high: &[u8], globs: &mut Vec<String>) {
    let (Some((&a, low)), Some((&b, high))) = (low.split_first(), high.split_first()) else {
        return globs.push(prefix);
    };
    if a == b {
        prefix.push(char::from(a));
        return cover(prefix, low, high, globs);
    }
    let whole_low = low.iter().all(|digit| *digit == b'0');
    let whole_high = high.iter().all(|digit| *digit == b'9');
    if !whole_low {
        cover(format!("{prefix}{}", char::from(a)), low, &vec![b'9'; low.len()], globs);
    }
    // First digits behind which any digits may follow.
    let (first, last) = (a + u8::from(!whole_low), b - u8::from(!whole_high));
    if first <= last {
        let any = "[0-9]".repeat(low.len());
        globs.push(match first == last {
            true => format!("{prefix}{}{any}", char::from(first)),
            false => format!("{prefix}[{}-{}]{any}", char::from(first), char::from(last)),
        });
    }
    if !whole_high {
        cover(format!("{prefix}{}", char::from(b)), &vec![b'0'; high.len()], high, globs);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_are_their_numbers_and_nothing_else() {
        let mut bounds: Vec<(u64, u64)> =
            (0..=125).flat_map(|from| (from..=125).map(move |to| (from, to))).collect();
        bounds.extend([(7, 1205), (98, 10_001), (999, 1000), (1000, 1999), (0, 99_999)]);
        for (from, to) in bounds {
            let pattern = pattern(&format!("h.{{{from}..{to}}}.w"));
            let around =
                (0..=130).chain([from.saturating_sub(1), from, to - 1.min(to), to, to + 1]);
            for number in around {
                let matches = pattern.matches(&format!("h.{number}.w"));
                assert_eq!(matches, (from..=to).contains(&number), "{number} in {pattern}");
            }
            assert!(!pattern.matches("h..w") && !pattern.matches(&format!("h.0{to}.w")));
        }
        let all = pattern("{0..18446744073709551615}");
        assert!(all.matches("18446744073709551615") && all.matches("0") && all.matches("987"));
        assert!(!all.matches("18446744073709551616"));
    }

    #[test]
    fn ranges_stand_beside_other_alternatives() {
        let some = pattern("l.{0,2,5..9,x*}.{w,b}");
        for name in ["l.0.w", "l.2.b", "l.7.w", "l.xyz.b"] {
            assert!(some.matches(name), "{name}");
        }
        for name in ["l.1.w", "l.4.w", "l.10.w", "l.5..9.w", "l.7.c"] {
            assert!(!some.matches(name), "{name}");
        }
        let nested = pattern("{a.{1..3},b.{2..12,[0-9]x}}.w");
        for name in ["a.3.w", "b.12.w", "b.5x.w"] {
            assert!(nested.matches(name), "{name}");
        }
        assert!(!nested.matches("a.4.w") && !nested.matches("b.1.w"));
    }

    #[test]
    fn what_looks_like_a_range_elsewhere_stays_text() {
        assert!(pattern("a.0..11").matches("a.0..11"));
        assert!(pattern("{a..c}").matches("a..c"));
        assert!(pattern(r"\{0..11\}").matches("{0..11}"));
        assert!(pattern(r"{\0..1}").matches("0..1"));
        assert!(pattern("[]{0..3}]x").matches("{x") && pattern("[]{0..3}]x").matches("]x"));
        assert!(pattern(r"[\]{0..3}]x").matches("{x") && !pattern(r"[\]{0..3}]x").matches("2x"));
        assert!(pattern("!h.{0..3}").matches("h.4") && !pattern("!h.{0..3}").matches("h.3"));
    }

    #[test]
    fn names_are_no_paths() {
        for text in [
            "*",
            "**",
            "?*",
            "enc*",
            "encoder/*",
            "encoder/**",
            "*/k*l",
            "*s_[0-9]/*",
            "encoder[!a]*",
        ] {
            assert!(pattern(text).matches("encoder/layers_0/kernel"), "{text}");
        }
        for text in ["e/*", "*kernel/", "encoder.*", "!*", "encoder[!/]*", "encoder[!.-0]*"] {
            assert!(!pattern(text).matches("encoder/layers_0/kernel"), "{text}");
        }
        assert!(pattern("a[/]b").matches("a/b") && pattern("a[.-9]b").matches("a/b"));
        assert!(pattern("a\\/b").matches("a/b") && pattern("a?b").matches("a/b"));
        for (text, matches) in
            [("*", true), ("**", true), ("?", false), ("a", false), ("{a,}", true), ("!a", true)]
        {
            assert_eq!(pattern(text).matches(""), matches, "{text}");
        }
        assert!(pattern("*").matches("\u{65e5}\u{672c}") && pattern("*").matches("a{b}"));
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        use PatternError::{
            Range, TooManyBraces, TrailingBackslash, UnclosedBrace, UnclosedBracket,
        };
        let error = |text: &str| text.parse::<Pattern>().unwrap_err();
        assert_eq!(error("a.{0..3"), UnclosedBrace { at: 2 });
        assert_eq!(error("a.[0-3"), UnclosedBracket { at: 2 });
        assert_eq!(error(r"a.\"), TrailingBackslash { at: 2 });
        assert_eq!(error(&"{a}".repeat(11)), TooManyBraces { at: 30 });
        for (text, at, found) in [
            ("h.{3..1}", 3, "3..1"),
            ("h.{0,..}", 5, ".."),
            ("h.{1..}", 3, "1.."),
            ("h.{00..11}", 3, "00..11"),
            ("h.{0..99999999999999999999}", 3, "0..99999999999999999999"),
        ] {
            assert_eq!(error(text), Range { at, found: found.to_owned() }, "{text}");
        }
        for (text, at, found) in [("a[z-a]", 2, "z-a"), ("[!0-9b-a]", 5, "b-a")] {
            let found = found.to_owned();
            assert_eq!(error(text), PatternError::BackwardRange { at, found }, "{text}");
        }
        for text in ["[a-]", "[-a]", "[a-b-a]", r"[\]-a]"] {
            assert!(text.parse::<Pattern>().is_ok(), "{text}");
        }
        let told = error("a.{0..3").to_string();
        assert_eq!(told, "the { at byte 2 is never closed");
    }
}
