//! What selections come to, held to a search over all tensors.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::fs;

use fst_format::{
    Checkpoint, Dtype, Layout, PatternError, Planned, Request, SelectError, Selection, SliceError,
};
use tempfile::TempDir;

/// A checkpoint of one file, whose tensors' bytes are a hole.
fn checkpoint(tensors: &[(&str, Dtype, &[usize])]) -> (TempDir, Checkpoint) {
    let mut layout = Layout::new();
    for (name, dtype, shape) in tensors {
        layout.tensor(*name, *dtype, shape).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let header = layout.header_bytes().unwrap();
    fs::write(&path, &header).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(header.len() as u64 + layout.data_len()).unwrap();
    let opened = Checkpoint::open(&path).unwrap();
    (folder, opened)
}

fn small() -> (TempDir, Checkpoint) {
    checkpoint(&[
        ("a.w", Dtype::BF16, &[4, 6]),
        ("a.ids", Dtype::I64, &[3]),
        ("b.w", Dtype::F32, &[2, 2]),
        ("b.q", Dtype::F4, &[8, 4]),
    ])
}

fn names(planned: &[Planned]) -> Vec<&str> {
    planned.iter().map(Planned::name).collect()
}

fn any(_: Dtype, _: Dtype) -> bool {
    true
}

#[test]
fn selections_come_in_the_order_of_the_file() {
    let (_folder, checkpoint) = small();
    let in_file: Vec<_> = checkpoint.tensors().iter().map(|tensor| tensor.name()).collect();
    let resolve = |selection: Selection| selection.resolve(&checkpoint, &any).unwrap();
    assert_eq!(names(&resolve(Selection::new())), in_file);
    let sorted = |wanted: &[&str]| -> Vec<&str> {
        in_file.iter().copied().filter(|name| wanted.contains(name)).collect()
    };
    let some = resolve(Selection::new().select("b.*").select("*.ids"));
    assert_eq!(names(&some), sorted(&["b.w", "b.q", "a.ids"]));
    let floats = Selection::new().select_with(|tensor| tensor.dtype().is_float());
    assert_eq!(names(&resolve(floats.clone())), sorted(&["a.w", "b.w", "b.q"]));
    assert_eq!(names(&resolve(floats.select("a.*"))), ["a.w"]);
    for wanted in [["a.w", "b.w"], ["b.w", "a.w"]] {
        assert_eq!(names(&resolve(Selection::new().request(wanted))), sorted(&wanted));
    }
    let none: [&str; 0] = [];
    assert!(resolve(Selection::new().request(none)).is_empty());

    // Requests have their own ways, patterns add to them what was not requested.
    let selection = Selection::new()
        .dtype(Dtype::F16)
        .slice("a.w", 0, 0..1)
        .slice("b.w", 1, 1..2)
        .request([Request::new("b.w").slice(0, 0..1).dtype(Dtype::F64).named("c")])
        .select("?.w");
    let planned = resolve(selection);
    let all = |one: &Planned| {
        (one.name().to_owned(), one.dtype(), one.shape().to_vec(), one.source_len(), one.byte_len())
    };
    let mut found: Vec<_> = planned.iter().map(all).collect();
    found.sort();
    let expected = [
        ("a.w".to_owned(), Dtype::F16, vec![1, 6], 12, 12),
        ("c".to_owned(), Dtype::F64, vec![1, 2], 8, 16),
    ];
    assert_eq!(found, expected);
    // Only floating-point types are converted.
    let ids = Selection::new().dtype(Dtype::F16).request(["a.ids"]);
    assert_eq!(resolve(ids)[0].conversion(), None);
}

#[test]
fn patterns_that_need_not_match_may_match_nothing() {
    let (_folder, checkpoint) = small();
    let resolve = |selection: Selection| selection.resolve(&checkpoint, &any);
    assert!(resolve(Selection::new().select_optional("c.*")).unwrap().is_empty());
    let planned = resolve(Selection::new().select_optional("c.*").select("*.ids")).unwrap();
    assert_eq!(names(&planned), ["a.ids"]);
    let error = resolve(Selection::new().select("c.*").select_optional("a.*")).unwrap_err();
    assert_eq!(error, SelectError::NoMatch { pattern: "c.*".into() });
    let error = resolve(Selection::new().select_optional("c.[")).unwrap_err();
    let source = PatternError::UnclosedBracket { at: 2 };
    assert_eq!(error, SelectError::Pattern { pattern: "c.[".into(), source });
}

#[test]
fn what_does_not_suit_the_checkpoint_is_named() {
    let (_folder, checkpoint) = small();
    let refused = |selection: Selection| {
        selection.resolve(&checkpoint, &|from, _| from != Dtype::F4).unwrap_err()
    };
    let tensor = |name: &str| name.to_owned();
    let unknown = || SelectError::UnknownTensor { name: tensor("x") };
    assert_eq!(refused(Selection::new().request(["a.w", "x"])), unknown());
    assert_eq!(refused(Selection::new().slice("x", 0, 0..1)), unknown());
    let error = refused(Selection::new().request(["a.w", "a.w"]));
    assert_eq!(error, SelectError::RequestedTwice { tensor: tensor("a.w") });
    let error = refused(Selection::new().request([Request::new("a.w").named("b.w"), "b.w".into()]));
    assert_eq!(error, SelectError::NamedTwice { name: tensor("b.w") });
    let error = refused(Selection::new().select("b.*").slice("a.w", 0, 0..1));
    assert_eq!(error, SelectError::SliceNotSelected { tensor: tensor("a.w") });
    let error = refused(Selection::new().dtype(Dtype::F32));
    let cast = SelectError::Cast { tensor: tensor("b.q"), from: Dtype::F4, to: Dtype::F32 };
    assert_eq!(error, cast);
    let error = refused(Selection::new().slice("a.w", 1, 2..7));
    let out = SliceError::OutOfRange { tensor: tensor("a.w"), dim: 1, range: 2..7, len: 6 };
    assert_eq!(error, SelectError::Slice(out));
    // Each cut is on a byte, but for the last.
    let error = refused(Selection::new().slice("b.q", 1, 2..4).slice("b.q", 1, 0..1));
    assert!(matches!(error, SelectError::Slice(SliceError::PartialByte { bit: 4, .. })), "{error}");
    let many = (0..300).fold(Request::new("a.w"), |request, _| request.slice(0, 0..usize::MAX));
    assert!(matches!(refused(Selection::new().request([many])), SelectError::Slice(_)));
}

#[test]
fn exact_names_are_looked_up_and_not_searched_for() {
    let tensors: Vec<String> = (0..100_000).map(|index| format!("layers.{index}.w")).collect();
    let tensors: Vec<_> =
        tensors.iter().map(|name| (name.as_str(), Dtype::BF16, &[1usize][..])).collect();
    let (_folder, checkpoint) = checkpoint(&tensors);
    // Whoever looks at a tensor asks whether it can be converted.
    let asked = Cell::new(0);
    let converts = |_, _| {
        asked.set(asked.get() + 1);
        true
    };
    let wanted = ["layers.99999.w", "layers.3.w", "layers.50000.w"];
    let selection = Selection::new().dtype(Dtype::F32).request(wanted);
    assert_eq!(selection.resolve(&checkpoint, &converts).unwrap().len(), 3);
    assert_eq!(asked.take(), 3);
    let owned = wanted.map(str::to_owned);
    let selection = Selection::new().dtype(Dtype::F32).of_names(owned.iter());
    assert_eq!(selection.resolve(&checkpoint, &converts).unwrap().len(), 3);
    assert_eq!(asked.take(), 3);
    let all = Selection::new().dtype(Dtype::F32).resolve(&checkpoint, &converts).unwrap();
    assert_eq!((all.len(), asked.take()), (100_000, 100_000));
    let request = Request::new("layers.4.w").slice(0, 0..1);
    let one = Selection::new().resolve_one(&checkpoint, &request, &any).unwrap();
    assert_eq!(one.contiguous(), Some(one.source().file_range()));
}
