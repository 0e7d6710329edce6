//! Headers against the official parser: what it accepts, we accept with the same tensors; what it
//! refuses, we refuse. The one wanted difference is a tensor's name that appears twice.
//!
//! Thousands of headers are derived from sound ones by changes of bytes, of JSON structure and of
//! numbers. Seeds are fixed, so a failure repeats.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fst_format::{Decoded, Header, HeaderDecoder, HeaderError, MAX_HEADER_LEN};
use safetensors::SafeTensors;

#[path = "format_support/rng.rs"]
mod rng;

use rng::Rng;

/// A file of this header with `data_len` bytes behind it.
fn file(json: &[u8], data_len: usize) -> Vec<u8> {
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(json);
    file.resize(file.len() + data_len, 0);
    file
}

/// What both readers tell of a file: by name the dtype, shape and offsets.
type Table = BTreeMap<String, (String, Vec<usize>, usize, usize)>;
type Accepted = (Table, Option<BTreeMap<String, String>>);

fn official(file: &[u8]) -> Option<Accepted> {
    // The official parser overflows where sums pass `usize`, which is a panic in debug builds.
    let parsed = catch_unwind(AssertUnwindSafe(|| SafeTensors::read_metadata(file)));
    let (_, metadata) = parsed.ok()?.ok()?;
    let table = metadata
        .tensors()
        .into_iter()
        .map(|(name, t)| {
            let (begin, end) = t.data_offsets;
            (name, (t.dtype.to_string(), t.shape.clone(), begin, end))
        })
        .collect();
    let own = metadata.metadata().clone().map(|m| m.into_iter().collect::<BTreeMap<_, _>>());
    Some((table, own))
}

fn ours(file: &[u8]) -> Result<Header, HeaderError> {
    match HeaderDecoder::new(file.len() as u64)?.decode(file)? {
        Decoded::Header(header) => Ok(header),
        Decoded::Need(range) => panic!("asks for {range:?} of a complete file"),
    }
}

/// The decoder fed from nothing, as a reader does it.
fn ours_in_steps(file: &[u8]) -> Result<Header, HeaderError> {
    let decoder = HeaderDecoder::new(file.len() as u64)?;
    let mut have = 0;
    for _ in 0..3 {
        match decoder.decode(&file[..have])? {
            Decoded::Header(header) => return Ok(header),
            Decoded::Need(range) => {
                assert_eq!(range.start, have as u64);
                assert!(range.end > range.start && range.end <= file.len() as u64);
                have = range.end as usize;
            }
        }
    }
    panic!("asked three times");
}

/// Counts of a run, to see that it tested both sides.
#[derive(Default, Debug)]
struct Tally {
    accepted: usize,
    refused: usize,
    repeated: usize,
}

/// Compares both parsers on one file.
fn compare(file: &[u8], tally: &mut Tally) {
    let shown = || String::from_utf8_lossy(&file[..file.len().min(2000)]).into_owned();
    let ours = ours(file);
    let steps = ours_in_steps(file);
    assert_eq!(
        ours.as_ref().map(Header::len).map_err(ToString::to_string),
        steps.as_ref().map(Header::len).map_err(ToString::to_string),
    );
    match (official(file), ours) {
        (Some((table, own)), Ok(header)) => {
            tally.accepted += 1;
            let names: Vec<&str> = header.tensors().map(|t| t.name()).collect();
            let start = header.data_start() as usize;
            assert_eq!(file.len(), start + header.data_len() as usize);
            let found: Table = header
                .tensors()
                .map(|t| {
                    let (range, in_file) = (t.data_range(), t.file_range());
                    assert_eq!(in_file.start, range.start + start as u64);
                    let (begin, end) = (range.start as usize, range.end as usize);
                    let entry = (t.dtype().to_string(), t.shape().to_vec(), begin, end);
                    (t.name().to_owned(), entry)
                })
                .collect();
            assert_eq!(found, table, "{}", shown());
            assert_eq!(names.len(), found.len());
            let read =
                header.metadata().iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
            assert_eq!(own.unwrap_or_default(), read, "{}", shown());
            for (i, name) in names.iter().enumerate() {
                let by_name = header.get(name).unwrap();
                assert_eq!(by_name.data_range(), header.tensor(i).unwrap().data_range());
            }
        }
        (None, Err(_)) => tally.refused += 1,
        (_, Err(HeaderError::RepeatedTensor { .. })) => tally.repeated += 1,
        (Some(_), Err(error)) => panic!("only we refuse: {error}\n{}", shown()),
        (None, Ok(_)) => panic!("only we accept:\n{}", shown()),
    }
}

/// Sound headers to start from, with the length of their data.
fn seeds() -> Vec<(String, usize)> {
    let mut seeds: Vec<(String, usize)> = [
        ("{}", 0),
        (r#"{"__metadata__":null}"#, 0),
        (r#"{"__metadata__":{"format":"pt","k":"v"}}"#, 0),
        (r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#, 24),
        (r#"{"s":{"dtype":"I64","shape":[],"data_offsets":[0,8]}}"#, 8),
        (r#" {"a":{"dtype":"F4","shape":[2,3],"data_offsets":[0,3]}}  "#, 3),
        (r#"{"a":["BF16",[4],[0,8]],"b":{"dtype":{"U8":null},"shape":[1],"data_offsets":[8,9]}}"#, 9),
        (
            r#"{"e":{"dtype":"F32","shape":[0,7],"data_offsets":[4,4]},"b":{"shape":[4],"data_offsets":[0,4],"dtype":"BOOL"}}"#,
            4,
        ),
        (
            r#"{"x":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3],"extra":{"n":[1.5e3,-2,true,null,"\u00e9\ud83d\ude00"]}},"__metadata__":{"a":"b"}}"#,
            3,
        ),
        (
            r#"{"\u0061\n":{"dtype":"C64","shape":[1],"data_offsets":[0,8]},"é😀":{"dtype":"F8_E8M0","shape":[2,1],"data_offsets":[8,10]}}"#,
            10,
        ),
    ]
    .iter()
    .map(|&(json, len)| (json.to_owned(), len))
    .collect();
    // What the official writer makes, of every dtype.
    let dtypes = fst_format::Dtype::ALL;
    let data = [0u8; 64];
    let views = dtypes.iter().map(|dtype| {
        let theirs: safetensors::Dtype = serde_json::from_str(&format!("\"{dtype}\"")).unwrap();
        let len = 4 * dtype.bits() as usize / 8;
        let view = safetensors::tensor::TensorView::new(theirs, vec![2, 2], &data[..len]).unwrap();
        (format!("layers.{dtype}.weight"), view)
    });
    let all = safetensors::serialize(views, None).unwrap();
    let header_len = u64::from_le_bytes(*all.first_chunk().unwrap()) as usize;
    let json = String::from_utf8(all[8..8 + header_len].to_vec()).unwrap();
    seeds.push((json, all.len() - 8 - header_len));
    seeds
}

const NUMBERS: &[&str] = &[
    "0",
    "1",
    "2",
    "3",
    "7",
    "8",
    "9",
    "-0",
    "-1",
    "00",
    "01",
    "+1",
    "0.0",
    "1.0",
    "1e0",
    "1E2",
    "1e",
    "1.",
    ".5",
    "1e400",
    "-1e400",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "2305843009213693951",
    "2305843009213693952",
    "4611686018427387904",
    "99999999999999999999999999999999999999999999",
    "null",
    "true",
    "\"1\"",
    "[]",
    "[1]",
    "{}",
    "NaN",
    "Infinity",
    "0x10",
];

const VALUES: &[&str] = &[
    "null",
    "true",
    "0",
    "-1",
    "1.5",
    "1e999",
    "\"\"",
    "\"F32\"",
    "\"BF16\"",
    "\"f32\"",
    "\"\\ud800\"",
    "\"\\ud83d\\ude00\"",
    "\"\\u0000\"",
    "\"\\x\"",
    "\"\t\"",
    "[]",
    "{}",
    "[0,0]",
    "[0,4]",
    "[0,8]",
    "[8,0]",
    "[1,2,3]",
    "[[0,8]]",
    "{\"F32\":null}",
    "{\"F32\":{}}",
    "{\"F32\":[]}",
    "{\"F32\":0}",
    "{\"F32\":null,\"F32\":null}",
    "{\"F32\":null,\"U8\":null}",
    "{\"F\\u00332\":null}",
    "{\"a\":\"b\"}",
    "{\"a\":\"b\",\"a\":\"c\"}",
    "{\"a\":1}",
    "{\"a\":null}",
    "[\"F32\",[2],[0,8]]",
    "[\"F32\",[2]]",
    "[\"F32\",[2],[0,8],0]",
    "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}",
    "{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}",
    "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"shape\":[4]}",
    "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"x\":1,\"x\":2}",
    "{\"d\\u0074ype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}",
];

/// The spans of numbers, of whole values, and of members (`"key":value`) in sound JSON.
struct Spans {
    numbers: Vec<(usize, usize)>,
    values: Vec<(usize, usize)>,
    members: Vec<(usize, usize)>,
}

/// Finds the spans by one pass over text that is known to be JSON.
fn spans(json: &[u8]) -> Spans {
    let mut spans = Spans { numbers: vec![], values: vec![], members: vec![] };
    value(json, skip_space(json, 0), &mut spans);
    return spans;

    fn skip_space(json: &[u8], mut at: usize) -> usize {
        while json.get(at).is_some_and(u8::is_ascii_whitespace) {
            at += 1;
        }
        at
    }

    /// Returns the end of the value that starts at `at`.
    fn value(json: &[u8], at: usize, spans: &mut Spans) -> usize {
        let end = match json[at] {
            b'"' => string(json, at),
            open @ (b'{' | b'[') => {
                let mut at = skip_space(json, at + 1);
                while !matches!(json[at], b'}' | b']') {
                    let start = at;
                    if open == b'{' {
                        at = skip_space(json, string(json, at));
                        at = skip_space(json, at + 1);
                    }
                    at = value(json, at, spans);
                    if open == b'{' {
                        spans.members.push((start, at));
                    }
                    at = skip_space(json, at);
                    if json[at] == b',' {
                        at = skip_space(json, at + 1);
                    }
                }
                at + 1
            }
            first => {
                let len = json[at..].iter().take_while(|b| !b",]} \n".contains(b)).count();
                if first == b'-' || first.is_ascii_digit() {
                    spans.numbers.push((at, at + len));
                }
                at + len
            }
        };
        spans.values.push((at, end));
        end
    }

    fn string(json: &[u8], at: usize) -> usize {
        let mut at = at + 1;
        while json[at] != b'"' {
            at += if json[at] == b'\\' { 2 } else { 1 };
        }
        at + 1
    }
}

fn replace(json: &mut Vec<u8>, (start, end): (usize, usize), with: &[u8]) {
    json.splice(start..end, with.iter().copied());
}

fn pick<'a>(rng: &mut Rng, from: &[&'a str]) -> &'a str {
    from[rng.below(from.len())]
}

fn number(rng: &mut Rng) -> String {
    if rng.below(4) == 0 {
        // Next to powers of two, where products and sums start to overflow.
        let power = 1u128 << rng.below(66);
        (power + rng.below(3) as u128).saturating_sub(1).to_string()
    } else {
        pick(rng, NUMBERS).to_owned()
    }
}

/// One change of bytes, structure or numbers.
fn mutate(json: &mut Vec<u8>, rng: &mut Rng) {
    let whole = serde_json::from_slice::<serde::de::IgnoredAny>(json).is_ok();
    match rng.below(if whole { 9 } else { 3 }) {
        0 if !json.is_empty() => {
            let at = rng.below(json.len());
            json[at] = rng.next() as u8;
        }
        1 => {
            let at = rng.below(json.len() + 1);
            json.insert(at, *b"{}[]\",:0 1\\/\n\t-e.\x00\xff".get(rng.below(20)).unwrap_or(&b' '));
        }
        2 if !json.is_empty() => {
            json.remove(rng.below(json.len()));
        }
        3 | 4 => {
            let found = spans(json).numbers;
            if !found.is_empty() {
                replace(json, found[rng.below(found.len())], number(rng).as_bytes());
            }
        }
        5 => {
            let found = spans(json).values;
            replace(json, found[rng.below(found.len())], pick(rng, VALUES).as_bytes());
        }
        6 => {
            // A member twice, perhaps in another object.
            let found = spans(json).members;
            if !found.is_empty() {
                let (start, end) = found[rng.below(found.len())];
                let copy = [&json[start..end], b","].concat();
                let (to, _) = found[rng.below(found.len())];
                replace(json, (to, to), &copy);
            }
        }
        7 => {
            // A value into the place of another.
            let found = spans(json).values;
            let (start, end) = found[rng.below(found.len())];
            let copy = json[start..end].to_vec();
            replace(json, found[rng.below(found.len())], &copy);
        }
        8 => {
            // A member more, at the front of an object.
            let found = spans(json).members;
            if !found.is_empty() {
                let (at, _) = found[rng.below(found.len())];
                let key = pick(
                    rng,
                    &[
                        "__metadata__",
                        "dtype",
                        "shape",
                        "data_offsets",
                        "x",
                        "",
                        "\\u0064type",
                        "__metad\\u0061ta__",
                    ],
                );
                let member = format!("\"{key}\":{},", pick(rng, VALUES));
                replace(json, (at, at), member.as_bytes());
            }
        }
        _ => {}
    }
}

/// Keeps the official parser's overflow panics, which are expected, off the test's output.
fn silence_panics_of_the_official_parser() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let shown = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.location().is_some_and(|l| l.file().contains("safetensors-")) {
                shown(info);
            }
        }));
    });
}

#[test]
fn mutated_headers_are_judged_as_by_the_official_parser() {
    silence_panics_of_the_official_parser();
    let seeds = seeds();
    let mut rng = Rng(1);
    let mut tally = Tally::default();
    for (json, data_len) in &seeds {
        compare(&file(json.as_bytes(), *data_len), &mut tally);
    }
    assert_eq!((tally.accepted, tally.refused), (seeds.len(), 0), "seeds are sound");
    for round in 0..60_000 {
        let (json, data_len) = &seeds[round % seeds.len()];
        let mut json = json.clone().into_bytes();
        for _ in 0..1 + rng.below(6) / 3 {
            mutate(&mut json, &mut rng);
        }
        let data_len = match rng.below(12) {
            0 => data_len + 1,
            1 => data_len.saturating_sub(1),
            2 => rng.below(64),
            _ => *data_len,
        };
        let mut file = file(&json, data_len);
        match rng.below(40) {
            0 => file.truncate(rng.below(file.len())),
            1 => {
                let len = number(&mut rng).parse::<u64>().unwrap_or(u64::MAX);
                file[..8].copy_from_slice(&len.to_le_bytes());
            }
            2 => {
                let n = u64::from_le_bytes(*file.first_chunk().unwrap());
                let len = n.wrapping_add(rng.below(5) as u64).wrapping_sub(2);
                file[..8].copy_from_slice(&len.to_le_bytes());
            }
            _ => {}
        }
        compare(&file, &mut tally);
    }
    // The mutations must reach both sides, or the comparison says little.
    assert!(tally.accepted > 5_000 && tally.refused > 20_000, "{tally:?}");
    assert!(tally.repeated > 100, "{tally:?}");
}

#[test]
fn offsets_and_shapes_at_the_edges_are_judged_as_by_the_official_parser() {
    silence_panics_of_the_official_parser();
    let edges = [
        0,
        1,
        2,
        7,
        8,
        9,
        u64::from(u32::MAX),
        1 << 32,
        (1 << 61) - 1,
        1 << 61,
        1 << 62,
        i64::MAX as u64,
        1 << 63,
        u64::MAX - 8,
        u64::MAX - 1,
        u64::MAX,
    ];
    let mut tally = Tally::default();
    for dtype in ["F4", "F6_E3M2", "U8", "F64"] {
        for a in edges {
            for b in edges {
                for data_len in [0, 1, 8] {
                    let entry = format!(
                        r#"{{"t":{{"dtype":"{dtype}","shape":[{a},{b}],"data_offsets":[0,{data_len}]}}}}"#
                    );
                    compare(&file(entry.as_bytes(), data_len), &mut tally);
                }
                let entry = format!(
                    r#"{{"t":{{"dtype":"{dtype}","shape":[1],"data_offsets":[{a},{b}]}}}}"#
                );
                compare(&file(entry.as_bytes(), 8), &mut tally);
                // A second tensor makes the sum pass what the first one alone does not.
                let entry = format!(
                    r#"{{"t":{{"dtype":"U8","shape":[{a}],"data_offsets":[0,{a}]}},"u":{{"dtype":"{dtype}","shape":[{b}],"data_offsets":[{a},{b}]}}}}"#
                );
                compare(&file(entry.as_bytes(), 8), &mut tally);
            }
        }
    }
    assert!(tally.accepted > 50 && tally.refused > 1_000, "{tally:?}");
}

#[test]
fn sums_that_pass_u64_are_refused() {
    // Nine tensors of 2^61 - 1 bytes, made to end where the file's length wraps around.
    let size = (1u64 << 61) - 1;
    let mut json = String::from("{");
    let mut begin = 0u64;
    for i in 0..8 {
        json += &format!(
            r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{begin},{}]}},"#,
            begin + size
        );
        begin += size;
    }
    let rest = u64::MAX - begin;
    json += &format!(
        r#""t8":{{"dtype":"U8","shape":[{rest}],"data_offsets":[{begin},{}]}}}}"#,
        u64::MAX
    );
    let refused = Header::parse(json.as_bytes(), 0).unwrap_err();
    assert!(matches!(refused, HeaderError::Truncated { .. }), "{refused}");
    let refused = Header::parse(json.as_bytes(), u64::MAX).unwrap_err();
    assert!(matches!(refused, HeaderError::FileTooLong { .. }), "{refused}");
}

#[test]
fn nesting_bombs_end_in_errors() {
    let mut tally = Tally::default();
    for depth in [1, 50, 120, 124, 125, 126, 127, 128, 129, 1_000, 200_000] {
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            let inner = if open == "[" { "" } else { "0" };
            let bomb = format!("{}{inner}{}", open.repeat(depth), close.repeat(depth));
            for json in [
                bomb.clone(),
                open.repeat(depth),
                format!(r#"{{"t":{bomb}}}"#),
                format!(r#"{{"__metadata__":{bomb}}}"#),
                format!(r#"{{"t":{{"dtype":{bomb},"shape":[1],"data_offsets":[0,1]}}}}"#),
                format!(r#"{{"t":{{"dtype":"U8","shape":{bomb},"data_offsets":[0,1]}}}}"#),
                format!(r#"{{"t":{{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{bomb}}}}}"#),
                format!(
                    r#"{{"t":{{"dtype":"U8","shape":[1],"x":{},"data_offsets":[0,1]}}}}"#,
                    open.repeat(depth)
                ),
            ] {
                compare(&file(json.as_bytes(), 1), &mut tally);
            }
        }
    }
    // Unknown fields may be deep, up to the parser's limit.
    assert!(tally.accepted > 8 && tally.refused > 100, "{tally:?}");
}

#[test]
fn header_lengths_are_judged_as_by_the_official_parser() {
    let mut tally = Tally::default();
    for len in 0..8 {
        compare(&vec![0; len], &mut tally);
    }
    for claimed in [0, 1, 2, 3, MAX_HEADER_LEN, MAX_HEADER_LEN + 1, u64::MAX - 7, u64::MAX] {
        let mut bytes = claimed.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        compare(&bytes, &mut tally);
    }
    assert_eq!(tally.accepted, 1);
    // The limit itself, in full: padding counts.
    for (len, sound) in [(MAX_HEADER_LEN, true), (MAX_HEADER_LEN + 1, false)] {
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        bytes.resize(8 + len as usize, b' ');
        assert_eq!(official(&bytes).is_some(), sound);
        assert_eq!(ours(&bytes).is_ok(), sound);
    }
}

#[test]
fn repeated_names_are_refused_however_they_are_written() {
    let entry = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
    let empty = r#"{"dtype":"U8","shape":[0],"data_offsets":[1,1]}"#;
    for json in [
        format!(r#"{{"a":{entry},"a":{entry}}}"#),
        format!(r#"{{"a":{entry},"a":{empty}}}"#),
        format!(r#"{{"a":{entry},"b":{empty},"\u0061":{empty}}}"#),
    ] {
        let error = Header::parse(json.as_bytes(), 1).unwrap_err();
        assert!(
            matches!(&error, HeaderError::RepeatedTensor { tensor } if tensor == "a"),
            "{error}"
        );
    }
}

/// `text` with every `@N`, a place in the data, as the offset in a file whose data is at `start`.
fn in_file(text: &str, start: usize) -> String {
    let mut parts = text.split('@');
    let mut out = parts.next().unwrap().to_owned();
    for part in parts {
        let digits = part.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = part.split_at(digits);
        out += &format!("{}{rest}", start + number.parse::<usize>().unwrap());
    }
    out
}

#[test]
fn errors_name_the_tensor_the_bytes_and_the_rule() {
    let t = |name: &str, dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    for (json, data_len, expected) in [
        (
            format!("{{{},{}}}", t("a", "U8", "[4]", 0, 4), t("b", "U8", "[4]", 6, 10)),
            10,
            r#"tensor "b" at bytes @6..@10: bytes @4..@6 before it belong to no tensor"#,
        ),
        (
            format!("{{{},{}}}", t("a", "U8", "[4]", 0, 4), t("b", "U8", "[4]", 2, 6)),
            6,
            r#"tensor "b" at bytes @2..@6 overlaps tensor "a" at bytes @0..@4"#,
        ),
        (
            format!("{{{}}}", t("a", "F32", "[2, 3]", 0, 20)),
            20,
            r#"tensor "a" at bytes @0..@20: F32 [2, 3] needs 24 bytes, found 20"#,
        ),
        (
            format!("{{{}}}", t("a", "F4", "[3]", 0, 2)),
            2,
            r#"tensor "a": F4 [3] is 12 bits, not whole bytes"#,
        ),
        (
            format!("{{{}}}", t("a", "U8", "[4]", 0, 4)),
            5,
            "bytes @4..@5 after the last tensor belong to no tensor",
        ),
        (
            format!("{{{}}}", t("a", "U8", "[4]", 0, 4)),
            3,
            r#"file of @3 bytes is 1 byte shorter than its header says, as after an interrupted download; the first tensor that is not all there is "a" at bytes @0..@4"#,
        ),
        (
            format!("{{{}}}", t("a", "U8", "[4]", 4, 0)),
            4,
            r#"tensor "a": data_offsets [4, 0] end before they begin"#,
        ),
        (format!("{{{}}}", t("a", "F16 ", "[4]", 0, 8)), 8, r#"tensor "a": unknown dtype "F16 ""#),
        (
            r#"{"a":{"dtype":"U8","data_offsets":[0,1]}}"#.to_owned(),
            1,
            r#"tensor "a": no field "shape""#,
        ),
        (
            r#"{"a":{"dtype":"U8","dtype":"U8"}}"#.to_owned(),
            1,
            r#"tensor "a": field "dtype" twice"#,
        ),
        (
            format!("{{{}}}", t("a", "U8", "[18446744073709551615, 2]", 0, 1)),
            1,
            r#"tensor "a": size of U8 [18446744073709551615, 2] overflows"#,
        ),
        (
            r#"{"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}"#.to_owned(),
            1,
            r#"tensor "a": invalid header JSON near byte 39: invalid type: floating point `1.5`, expected usize at line 1 column 31"#,
        ),
        (
            r#"{"__metadata__":{},"__metadata__":{}}"#.to_owned(),
            0,
            r#""__metadata__" is declared twice"#,
        ),
    ] {
        let error = Header::parse(json.as_bytes(), data_len).unwrap_err();
        assert_eq!(error.to_string(), in_file(expected, 8 + json.len()), "{json}");
    }
    let error = Header::parse(b"{\"a\xff\"}", 0).unwrap_err();
    assert_eq!(error.to_string(), "header is not UTF-8 at byte 11");
}
