//! Summarizes long lists of tensors: names that differ in numbers only become one pattern, such as
//! `model.layers.{0..31}.mlp.up_proj.weight`.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;

/// Tensors of one dtype and shape whose names differ only in their numbers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Pattern<K> {
    /// The common name, numbers as ranges.
    pub(crate) name: String,
    /// What the tensors have in common besides.
    pub(crate) key: K,
    /// How many tensors these are.
    pub(crate) count: u64,
}

struct Group<K> {
    key: K,
    /// The text between the numbers.
    text: Vec<String>,
    /// The values that each number takes.
    numbers: Vec<BTreeSet<u64>>,
    count: u64,
}

/// Groups names with equal keys, in the order in which groups first appear.
pub(crate) fn summarize<'n, K: Clone + Eq + std::hash::Hash>(
    names: impl IntoIterator<Item = (&'n str, K)>,
) -> Vec<Pattern<K>> {
    let mut groups: Vec<Group<K>> = Vec::new();
    let mut index: HashMap<(Vec<String>, K), usize> = HashMap::new();
    for (name, key) in names {
        let (text, numbers) = split(name);
        let at = *index.entry((text.clone(), key.clone())).or_insert_with(|| {
            let values = vec![BTreeSet::new(); numbers.len()];
            groups.push(Group { key, text, numbers: values, count: 0 });
            groups.len() - 1
        });
        let group = &mut groups[at];
        group.count += 1;
        for (values, number) in group.numbers.iter_mut().zip(numbers) {
            values.insert(number);
        }
    }
    groups
        .into_iter()
        .map(|group| Pattern { name: group.name(), key: group.key, count: group.count })
        .collect()
}

/// A name's dotted parts that are numbers, and the text around them: one piece more.
fn split(name: &str) -> (Vec<String>, Vec<u64>) {
    let mut text = vec![String::new()];
    let mut numbers = Vec::new();
    for (index, part) in name.split('.').enumerate() {
        if index > 0 {
            text.last_mut().into_iter().for_each(|t| t.push('.'));
        }
        match part.parse::<u64>() {
            // `007` and `+7` are not how 7 is written.
            Ok(number) if number.to_string() == part => {
                numbers.push(number);
                text.push(String::new());
            }
            _ => text.last_mut().into_iter().for_each(|t| t.push_str(part)),
        }
    }
    (text, numbers)
}

impl<K> Group<K> {
    fn name(&self) -> String {
        let mut name = String::new();
        for (index, text) in self.text.iter().enumerate() {
            name.push_str(text);
            if let Some(values) = self.numbers.get(index) {
                name.push_str(&range(values));
            }
        }
        name
    }
}

/// More runs of numbers than this are a `*`.
const MOST_RUNS: usize = 8;

/// `7`, `{0..31}`, or `{0,2,5..9}` where numbers are missing: what `--select` takes.
fn range(values: &BTreeSet<u64>) -> String {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for &value in values {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(value) => *last = value,
            _ => runs.push((value, value)),
        }
    }
    if let [(first, last)] = runs[..]
        && first == last
    {
        return first.to_string();
    }
    if runs.len() > MOST_RUNS {
        return "*".to_owned();
    }
    let mut text = String::from("{");
    for (index, (first, last)) in runs.iter().enumerate() {
        if index > 0 {
            text.push(',');
        }
        // Writing to a `String` cannot fail.
        let _ = match first == last {
            true => write!(text, "{first}"),
            false => write!(text, "{first}..{last}"),
        };
    }
    text.push('}');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<(String, u64)> {
        let named = list.iter().map(|&name| (name, ()));
        summarize(named).into_iter().map(|p| (p.name, p.count)).collect()
    }

    #[test]
    fn numbers_become_ranges() {
        assert_eq!(
            names(&["embed", "l.0.w", "l.0.b", "l.1.w", "l.1.b", "l.2.w"]),
            [("embed".into(), 1), ("l.{0..2}.w".into(), 3), ("l.{0..1}.b".into(), 2)]
        );
        assert_eq!(
            names(&["l.0.e.0.w", "l.0.e.1.w", "l.3.e.0.w", "l.3.e.1.w"]),
            [("l.{0,3}.e.{0..1}.w".into(), 4)]
        );
    }

    #[test]
    fn a_number_alone_stays_a_number_and_words_stay_words() {
        assert_eq!(names(&["h.7.w"]), [("h.7.w".into(), 1)]);
        assert_eq!(names(&["q2.w", "q3.w"]), [("q2.w".into(), 1), ("q3.w".into(), 1)]);
        assert_eq!(names(&["h.01.w", "h.1.w"]), [("h.01.w".into(), 1), ("h.1.w".into(), 1)]);
        assert_eq!(names(&["", "0", "1"]), [(String::new(), 1), ("{0..1}".into(), 2)]);
    }

    #[test]
    fn many_gaps_are_cut_short() {
        let list: Vec<String> = (0..9).map(|n| format!("h.{}.w", 2 * n)).collect();
        let list: Vec<&str> = list.iter().map(String::as_str).collect();
        assert_eq!(names(&list[..8]), [("h.{0,2,4,6,8,10,12,14}.w".into(), 8)]);
        assert_eq!(names(&list), [("h.*.w".into(), 9)]);
    }

    #[test]
    fn shapes_are_kept_apart() {
        let patterns = summarize([("h.0.w", 1), ("h.1.w", 2), ("h.2.w", 1)]);
        assert_eq!(patterns.len(), 2);
        assert_eq!((patterns[0].name.as_str(), patterns[0].count), ("h.{0,2}.w", 2));
    }
}
