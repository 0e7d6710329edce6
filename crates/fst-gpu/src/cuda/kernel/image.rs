//! The compiled kernels: one fat binary for gathers, one for checksums and one for each pair of types.

use std::ffi::CStr;

use crate::cast::CastType;

/// A kernel that this crate ships.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// Strided rows of bytes into a dense destination.
    Gather,
    /// Many gathers in one launch.
    GatherBatch,
    /// Strided rows of `from` into a dense destination of `to`.
    Cast {
        /// Type of the source.
        from: CastType,
        /// Type of the destination.
        to: CastType,
    },
    /// Many casts of one pair of types in one launch.
    CastBatch {
        /// Type of the sources.
        from: CastType,
        /// Type of the destinations.
        to: CastType,
    },
    /// Sums of many buffers in one launch.
    Checksum,
}

impl Kernel {
    /// The name of the entry in its image, null-terminated for the driver, or `None` where there is no
    /// such kernel: the pair is not [`crate::cast::supported`], or is a type and itself (that is a
    /// [`Kernel::Gather`]).
    pub fn entry(self) -> Option<&'static CStr> {
        match self {
            Self::Gather => Some(c"fst_gather"),
            Self::GatherBatch => Some(c"fst_gather_batch"),
            Self::Checksum => Some(c"fst_checksum"),
            Self::Cast { from, to } => image(from, to).map(|image| image.entry),
            Self::CastBatch { from, to } => image(from, to).map(|image| image.batch_entry),
        }
    }

    /// The fat binary that holds the entry, as `cuModuleLoadData` takes it: machine code for compute
    /// capability 8, 9, 10 and 12, and PTX for others, which a driver compiles in a tenth of a second or
    /// more the first time. The single and the batch kernel of a kind share one: load it as a module once,
    /// by its address for instance.
    pub fn fatbin(self) -> Option<&'static [u8]> {
        match self {
            Self::Gather | Self::GatherBatch => Some(GATHER),
            Self::Checksum => Some(CHECKSUM),
            Self::Cast { from, to } | Self::CastBatch { from, to } => {
                image(from, to).map(|image| image.fatbin)
            }
        }
    }
}

/// Every kernel there is.
pub fn kernels() -> impl Iterator<Item = Kernel> {
    let casts = CASTS.iter().flat_map(|image| {
        let (from, to) = (image.from, image.to);
        [Kernel::Cast { from, to }, Kernel::CastBatch { from, to }]
    });
    [Kernel::Gather, Kernel::GatherBatch, Kernel::Checksum].into_iter().chain(casts)
}

struct Image {
    from: CastType,
    to: CastType,
    entry: &'static CStr,
    batch_entry: &'static CStr,
    fatbin: &'static [u8],
}

fn image(from: CastType, to: CastType) -> Option<&'static Image> {
    CASTS.iter().find(|image| (image.from, image.to) == (from, to))
}

/// A text with a null byte at its end, and none before it.
const fn terminated(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        // Evaluated by the compiler only.
        #[expect(clippy::panic)]
        Err(_) => panic!("null byte in a name"),
    }
}

macro_rules! text {
    ($($part:expr),+) => {
        const { terminated(concat!($($part,)+ "\0")) }
    };
}

/// Bytes at an address that suits the words in them.
#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

macro_rules! fatbin {
    ($($part:expr),+) => {{
        const IMAGE: &Aligned<[u8]> =
            &Aligned(*include_bytes!(concat!("../../../kernels/fatbin/", $($part,)+ ".fatbin")));
        &IMAGE.0
    }};
}

static GATHER: &[u8] = fatbin!("gather");
static CHECKSUM: &[u8] = fatbin!("checksum");

macro_rules! cast {
    ($from:ident $from_name:literal $to:ident $to_name:literal) => {
        Image {
            from: CastType::$from,
            to: CastType::$to,
            entry: text!("fst_cast_", $from_name, "_", $to_name),
            batch_entry: text!("fst_cast_batch_", $from_name, "_", $to_name),
            fatbin: fatbin!("cast_", $from_name, "_", $to_name),
        }
    };
}

#[rustfmt::skip]
static CASTS: [Image; 36] = [
    cast!(F64 "f64" F32 "f32"),
    cast!(F64 "f64" F16 "f16"),
    cast!(F64 "f64" BF16 "bf16"),
    cast!(F64 "f64" F8E4M3 "f8e4m3"),
    cast!(F64 "f64" F8E5M2 "f8e5m2"),
    cast!(F32 "f32" F64 "f64"),
    cast!(F32 "f32" F16 "f16"),
    cast!(F32 "f32" BF16 "bf16"),
    cast!(F32 "f32" F8E4M3 "f8e4m3"),
    cast!(F32 "f32" F8E5M2 "f8e5m2"),
    cast!(F16 "f16" F64 "f64"),
    cast!(F16 "f16" F32 "f32"),
    cast!(F16 "f16" BF16 "bf16"),
    cast!(F16 "f16" F8E4M3 "f8e4m3"),
    cast!(F16 "f16" F8E5M2 "f8e5m2"),
    cast!(BF16 "bf16" F64 "f64"),
    cast!(BF16 "bf16" F32 "f32"),
    cast!(BF16 "bf16" F16 "f16"),
    cast!(BF16 "bf16" F8E4M3 "f8e4m3"),
    cast!(BF16 "bf16" F8E5M2 "f8e5m2"),
    cast!(F8E4M3 "f8e4m3" F64 "f64"),
    cast!(F8E4M3 "f8e4m3" F32 "f32"),
    cast!(F8E4M3 "f8e4m3" F16 "f16"),
    cast!(F8E4M3 "f8e4m3" BF16 "bf16"),
    cast!(F8E4M3 "f8e4m3" F8E5M2 "f8e5m2"),
    cast!(F8E5M2 "f8e5m2" F64 "f64"),
    cast!(F8E5M2 "f8e5m2" F32 "f32"),
    cast!(F8E5M2 "f8e5m2" F16 "f16"),
    cast!(F8E5M2 "f8e5m2" BF16 "bf16"),
    cast!(F8E5M2 "f8e5m2" F8E4M3 "f8e4m3"),
    cast!(F8E8M0 "f8e8m0" F64 "f64"),
    cast!(F8E8M0 "f8e8m0" F32 "f32"),
    cast!(F8E8M0 "f8e8m0" F16 "f16"),
    cast!(F8E8M0 "f8e8m0" BF16 "bf16"),
    cast!(F8E8M0 "f8e8m0" F8E4M3 "f8e4m3"),
    cast!(F8E8M0 "f8e8m0" F8E5M2 "f8e5m2"),
];
