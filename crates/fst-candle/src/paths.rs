//! What a checkpoint can be opened from.

use std::path::{Path, PathBuf};

use fst::Checkpoint;

mod sealed {
    pub trait Sealed {}
}

/// One path (a `.safetensors` file, its index, or a folder that holds either), several files that are one
/// checkpoint, or a [`Checkpoint`] that is open already.
pub trait Paths: sealed::Sealed {
    #[doc(hidden)]
    fn open(self) -> fst::Result<Checkpoint>;
}

macro_rules! one {
    ($($ty:ty),*) => {
        $(
            impl sealed::Sealed for $ty {}
            impl Paths for $ty {
                fn open(self) -> fst::Result<Checkpoint> {
                    Ok(Checkpoint::open(self)?)
                }
            }
        )*
    };
}

one!(&str, String, &String, &Path, PathBuf, &PathBuf);

macro_rules! several {
    ($([$($generics:tt)*] $ty:ty),*) => {
        $(
            impl<$($generics)*> sealed::Sealed for $ty {}
            impl<$($generics)*> Paths for $ty {
                fn open(self) -> fst::Result<Checkpoint> {
                    Ok(Checkpoint::open_all(self)?)
                }
            }
        )*
    };
}

several!([P: AsRef<Path>] &[P], [P: AsRef<Path>] Vec<P>, [P: AsRef<Path>] &Vec<P>,
    [P: AsRef<Path>, const N: usize] [P; N], [P: AsRef<Path>, const N: usize] &[P; N]);

impl sealed::Sealed for &Checkpoint {}
impl Paths for &Checkpoint {
    fn open(self) -> fst::Result<Checkpoint> {
        Ok(self.clone())
    }
}

impl sealed::Sealed for Checkpoint {}
impl Paths for Checkpoint {
    fn open(self) -> fst::Result<Checkpoint> {
        Ok(self)
    }
}
