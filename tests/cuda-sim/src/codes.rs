//! The `CUresult` values that the simulator returns or that tests inject, as plain integers.

macro_rules! codes {
    ($($name:ident = $value:literal),* $(,)?) => {
        $(#[doc = concat!("`CUDA_", stringify!($name), "`")] pub const $name: i32 = $value;)*
        pub(crate) const NAMES: &[(i32, &core::ffi::CStr)] = &[$(($value, {
            match core::ffi::CStr::from_bytes_with_nul(concat!("CUDA_", stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => c"CUDA_ERROR_UNKNOWN",
            }
        })),*];
    };
}

codes! {
    SUCCESS = 0,
    ERROR_INVALID_VALUE = 1,
    ERROR_OUT_OF_MEMORY = 2,
    ERROR_NOT_INITIALIZED = 3,
    ERROR_NO_DEVICE = 100,
    ERROR_INVALID_DEVICE = 101,
    ERROR_INVALID_IMAGE = 200,
    ERROR_INVALID_CONTEXT = 201,
    ERROR_NO_BINARY_FOR_GPU = 209,
    ERROR_INVALID_PTX = 218,
    ERROR_INVALID_HANDLE = 400,
    ERROR_NOT_FOUND = 500,
    ERROR_NOT_READY = 600,
    ERROR_ILLEGAL_ADDRESS = 700,
    ERROR_PEER_ACCESS_ALREADY_ENABLED = 704,
    ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    ERROR_LAUNCH_FAILED = 719,
    ERROR_NOT_SUPPORTED = 801,
    ERROR_UNKNOWN = 999,
}
