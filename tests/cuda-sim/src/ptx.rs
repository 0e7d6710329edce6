//! The little of PTX that a launch needs: entry names and the size of each parameter.

use std::collections::HashMap;

/// Entry name -> parameter sizes in bytes, or `None` if the text is no PTX.
pub(crate) fn entries(text: &str) -> Option<HashMap<String, Vec<usize>>> {
    if !text.contains(".version") || !text.contains(".target") {
        return None;
    }
    let mut entries = HashMap::new();
    for (at, _) in text.match_indices(".entry") {
        let rest = &text[at + ".entry".len()..];
        let end = rest.find('{').unwrap_or(rest.len());
        let head = &rest[..end];
        let (name, params) = match head.split_once('(') {
            Some((name, rest)) => (name, rest.split(')').next().unwrap_or("")),
            None => (head, ""),
        };
        let sizes = params.split(',').filter_map(parameter).collect();
        entries.insert(name.trim().to_owned(), sizes);
    }
    Some(entries)
}

/// Size of one `.param` declaration.
fn parameter(text: &str) -> Option<usize> {
    let mut size = None;
    for word in text.split_whitespace() {
        size = size.or(match word {
            ".u8" | ".s8" | ".b8" => Some(1),
            ".u16" | ".s16" | ".b16" | ".f16" => Some(2),
            ".u32" | ".s32" | ".b32" | ".f32" => Some(4),
            ".u64" | ".s64" | ".b64" | ".f64" => Some(8),
            _ => None,
        });
    }
    let count = text
        .split_once('[')
        .and_then(|(_, n)| n.split(']').next()?.trim().parse::<usize>().ok())
        .unwrap_or(1);
    Some(size? * count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_entries_and_sizes() {
        let text = ".version 8.0\n.target sm_70\n.visible .entry cast(\n\t.param .u64 cast_param_0,\n\
                    \t.param .u32 cast_param_1,\n .param .align 8 .b8 cast_param_2[24]\n)\n{ ret; }\n\
                    .visible .entry none()\n{ ret; }";
        let entries = entries(text).unwrap();
        assert_eq!(entries["cast"], [8, 4, 24]);
        assert_eq!(entries["none"], [0usize; 0]);
    }
}
