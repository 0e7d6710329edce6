//! `NAME:DIM:START..END`, the way the command line names a slice of a tensor.

use std::ops::Range;
use std::str::FromStr;

/// A slice as asked for; whether the tensor has it shows when the checkpoint is open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SliceArg {
    pub(crate) name: String,
    pub(crate) dim: usize,
    pub(crate) range: Range<usize>,
}

impl FromStr for SliceArg {
    type Err = &'static str;

    /// Reads from the right, because names may hold colons.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "expected NAME:DIM:START..END, such as lm_head.weight:0:0..1000";
        let mut parts = text.rsplitn(3, ':');
        let (Some(range), Some(dim), Some(name)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(FORM);
        };
        let (start, end) = range.split_once("..").ok_or(FORM)?;
        let number = |text: &str| text.parse::<usize>().map_err(|_| FORM);
        let range = number(start)?..number(end)?;
        if range.start > range.end {
            return Err("the slice ends before it starts");
        }
        Ok(Self { name: name.to_owned(), dim: number(dim)?, range })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_read_from_the_right() {
        let slice: SliceArg = "a:b.weight:1:16..32".parse().unwrap();
        assert_eq!(slice, SliceArg { name: "a:b.weight".into(), dim: 1, range: 16..32 });
        let empty: SliceArg = ":0:0..0".parse().unwrap();
        assert_eq!(empty, SliceArg { name: String::new(), dim: 0, range: 0..0 });
    }

    #[test]
    fn other_forms_are_refused() {
        for text in
            ["", "w", "w:0", "w:0:1", "w:0:1..", "w:0:..1", "w:x:0..1", "w:0:-1..1", "w:0:2..1"]
        {
            assert!(text.parse::<SliceArg>().is_err(), "{text}");
        }
    }
}
