//! Errors as candle's.

use std::any::Any;

use candle_core::{DType, Error, Shape};
use fst::Dtype;

/// An error of fst's as candle's, with its text: file, tensor and place.
pub(crate) fn wrapped(error: impl Into<fst::Error>) -> Error {
    Error::wrap(error.into())
}

/// Reading cannot start: of too little memory, in terms of what this crate offers.
pub(crate) fn start(error: fst::Error) -> Error {
    match error {
        fst::Error::Memory { needed, available, limit } => Error::msg(format!(
            "{needed} bytes of host memory are needed for all tensors, and {available} are available \
             ({limit}): say by `Weights::read_ahead` which the model wants, or set a `Weights::budget`"
        )),
        error => wrapped(error),
    }
}

/// There is no tensor of this name, as candle says it.
pub(crate) fn unknown(name: &str) -> Error {
    Error::CannotFindTensor { path: name.to_owned() }.bt()
}

/// The tensor has another shape than the model expects, as candle says it.
pub(crate) fn shape(name: &str, expected: Shape, got: &[usize]) -> Error {
    let (msg, got) = (format!("shape mismatch for {name}"), Shape::from(got));
    Error::UnexpectedShape { msg, expected, got }.bt()
}

/// candle has no place for elements of this type.
pub(crate) fn no_dtype(found: Dtype, name: &str, asked: Option<DType>) -> Error {
    let convert = match asked {
        Some(asked) => format!(" and which is not converted to {}", asked.as_str()),
        None => String::new(),
    };
    Error::msg(format!("tensor {name:?} holds {found}, which candle has no type for{convert}"))
}

/// A thread that reads panicked: in a closure that was given to it, most likely.
pub(crate) fn panicked(panic: &(dyn Any + Send)) -> fst::Error {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let message = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
    fst::Error::Panicked { message }
}

/// The text of an error, without a backtrace: for those who get it again.
pub(crate) fn text(error: Error) -> String {
    match error {
        Error::WithBacktrace { inner, .. } => inner.to_string(),
        error => error.to_string(),
    }
}
