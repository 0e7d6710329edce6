//! The way to the driver: presence, needed symbols, version, and error codes as integers.
//!
//! cudarc panics when the library or a symbol is missing, so [`driver`] looks for the library under
//! the names that cudarc tries and for every symbol that this crate calls, before the first call.
//! After that, cudarc's `sys` functions (which resolve by the same names) cannot panic. Functions
//! whose name or signature depends on the CUDA version are looked up here by name.

use crate::error::{Code, CudaVersion, Error, Result};
use cudarc::driver::sys::{self, CUresult};
use libloading::Library;
use std::ffi::{CStr, c_char};
use std::mem::ManuallyDrop;
use std::sync::OnceLock;

/// The names under which the driver library is looked for; the first one that opens is used, by
/// cudarc too.
pub const DRIVER_LIBRARIES: [&str; 2] = ["libcuda.so", "libcuda.so.1"];

/// The least CUDA version that the driver must offer (series 525).
pub const LEAST_CUDA: CudaVersion = CudaVersion { major: 12, minor: 0 };

/// Every function that this crate calls through cudarc.
const NEEDED: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuGetErrorName",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetAttribute",
    "cuDeviceGetPCIBusId",
    "cuDeviceGetUuid_v2",
    "cuDeviceTotalMem_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuCtxSynchronize",
    "cuCtxEnablePeerAccess",
    "cuDeviceCanAccessPeer",
    "cuMemGetInfo_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyPeerAsync",
    "cuMemcpy2DAsync_v2",
    "cuMemsetD8Async",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
    "cuStreamQuery",
    "cuStreamWaitEvent",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuModuleGetFunction",
    "cuLaunchKernel",
];

/// `CUmemcpyAttributes`: 24 bytes in every version that has it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct BatchAttributes {
    /// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`: sources are read in stream order.
    pub(crate) source_order: u32,
    /// Kind and number of the source's location: a hint for managed memory only.
    pub(crate) source_hint: [u32; 2],
    /// The same for the destination.
    pub(crate) destination_hint: [u32; 2],
    pub(crate) flags: u32,
}

type BatchFirst = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut BatchAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> u32;
type BatchSecond = unsafe extern "C" fn(
    *mut u64,
    *mut u64,
    *mut usize,
    usize,
    *mut BatchAttributes,
    *mut usize,
    usize,
    sys::CUstream,
) -> u32;

/// `cuMemcpyBatchAsync` in the form that the driver has.
#[derive(Clone, Copy)]
enum Batch {
    /// CUDA 12.8: reports the failing index.
    First(BatchFirst),
    /// CUDA 13.0 (`_v2`): does not.
    Second(BatchSecond),
}

/// The driver, found complete and initialised.
pub(crate) struct Driver {
    /// The name under which it was opened.
    pub(crate) library: &'static str,
    pub(crate) version: CudaVersion,
    batch: Option<Batch>,
    /// Open for the rest of the process: cudarc and the function pointers above rely on it.
    _library: ManuallyDrop<Library>,
}

impl Driver {
    /// A code that came as an integer, with the driver's name for it.
    fn code(&self, number: u32) -> Code {
        // SAFETY: `cuGetErrorName` has this signature in every driver; it was there at the start.
        unsafe {
            match self._library.get(b"cuGetErrorName\0") {
                Ok(name) => named(number, *name),
                Err(_) => Code { number, name: String::new() },
            }
        }
    }
}

static DRIVER: OnceLock<Driver> = OnceLock::new();

/// The driver, or why there is none. Only success is remembered.
pub(crate) fn driver() -> Result<&'static Driver> {
    if let Some(driver) = DRIVER.get() {
        return Ok(driver);
    }
    let found = open(&DRIVER_LIBRARIES)?;
    Ok(DRIVER.get_or_init(|| found))
}

fn open(names: &'static [&'static str]) -> Result<Driver> {
    let mut reason = String::new();
    for name in names {
        // SAFETY: loading a library runs its initialisers; the driver's are meant to run in any
        // process.
        match unsafe { Library::new(*name) } {
            Ok(library) => return check(name, library),
            Err(e) => {
                reason = match std::error::Error::source(&e) {
                    Some(source) => source.to_string(),
                    None => e.to_string(),
                }
            }
        }
    }
    Err(Error::NoDriver { looked_for: names.to_vec(), reason })
}

fn check(name: &'static str, library: Library) -> Result<Driver> {
    let file = name;
    let library = ManuallyDrop::new(library);
    for symbol in NEEDED {
        // SAFETY: the symbol is only looked for.
        if unsafe { library.get::<unsafe extern "C" fn()>(symbol.as_bytes()) }.is_err() {
            return Err(Error::MissingSymbol {
                library: name.to_owned(),
                symbol: (*symbol).to_owned(),
            });
        }
    }
    // SAFETY: the signatures are those of the CUDA 12.8 and 13.0 driver API references.
    let batch = unsafe {
        if let Ok(f) = library.get::<BatchSecond>(b"cuMemcpyBatchAsync_v2\0") {
            Some(Batch::Second(*f))
        } else {
            library.get::<BatchFirst>(b"cuMemcpyBatchAsync\0").ok().map(|f| Batch::First(*f))
        }
    };
    // SAFETY: `cuDriverGetVersion(int *)` and `cuInit(unsigned)` exist in every driver; codes are
    // taken as integers since this is the first contact with an unknown driver.
    let (version, init) = unsafe {
        let mut encoded = 0i32;
        let version: libloading::Symbol<'_, unsafe extern "C" fn(*mut i32) -> u32> = library
            .get(b"cuDriverGetVersion\0")
            .map_err(|_| missing(name, "cuDriverGetVersion"))?;
        let init: libloading::Symbol<'_, unsafe extern "C" fn(u32) -> u32> =
            library.get(b"cuInit\0").map_err(|_| missing(name, "cuInit"))?;
        let name: libloading::Symbol<'_, unsafe extern "C" fn(u32, *mut *const c_char) -> u32> =
            library.get(b"cuGetErrorName\0").map_err(|_| missing(name, "cuGetErrorName"))?;
        let error = |call, number| match number {
            // CUDA_ERROR_STUB_LIBRARY. cudarc opens the library under the same names and would call
            // the stub, whatever else is found here.
            34 => Error::StubDriver { library: file.to_owned() },
            _ => Error::Init { call, code: named(number, *name) },
        };
        match version(&mut encoded) {
            0 => {}
            number => return Err(error("cuDriverGetVersion", number)),
        }
        let version = decoded(encoded);
        if version < LEAST_CUDA {
            return Err(Error::DriverTooOld { found: version, needed: LEAST_CUDA });
        }
        (
            version,
            match init(0) {
                0 => Ok(()),
                // CUDA_ERROR_NO_DEVICE: there is a driver, without a device.
                100 => Err(Error::NoDevice { ordinal: 0, count: 0 }),
                number => Err(error("cuInit", number)),
            },
        )
    };
    init?;
    Ok(Driver { library: name, version, batch, _library: library })
}

/// A version as the driver encodes it, 1000 x major + 10 x minor.
fn decoded(version: i32) -> CudaVersion {
    let version = version.max(0) as u32;
    CudaVersion { major: version / 1000, minor: version % 1000 / 10 }
}

fn missing(library: &str, symbol: &str) -> Error {
    Error::MissingSymbol { library: library.to_owned(), symbol: symbol.to_owned() }
}

/// # Safety
///
/// `get_name` is the driver's `cuGetErrorName`.
unsafe fn named(
    number: u32,
    get_name: unsafe extern "C" fn(u32, *mut *const c_char) -> u32,
) -> Code {
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: a valid out pointer; the driver answers with a static string or null.
    let name = unsafe {
        if get_name(number, &mut text) == 0 && !text.is_null() {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            String::new()
        }
    };
    Code { number, name }
}

/// The code of a failed call, with the driver's name for it.
pub(crate) fn code(result: CUresult) -> Code {
    let number = result as u32;
    DRIVER.get().map_or(Code { number, name: String::new() }, |driver| driver.code(number))
}

impl Error {
    /// What cudarc's own calls on a device answered.
    pub fn of_cudarc(error: cudarc::driver::DriverError, device: usize) -> Self {
        Self::Driver { call: "a call of cudarc's", device, code: code(error.0) }
    }
}

/// Turns a result into an error that names call and device.
pub(crate) fn checked(result: CUresult, call: &'static str, device: usize) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(Error::Driver { call, device, code: code(result) })
}

/// Whether the driver has a call for many copies at once (CUDA 12.8 and later).
pub(crate) fn has_batch() -> bool {
    DRIVER.get().is_some_and(|d| d.batch.is_some())
}

/// A plain copy: source, destination, bytes.
pub(crate) type Run = (u64, u64, u64);

/// Queues many copies by one call; sources count from `base`. `Ok(false)`: the driver has no such call, or
/// does not take these copies by it. They may then be queued one by one: to copy the same bytes twice does
/// no harm.
///
/// # Safety
///
/// As for `cuMemcpyAsync` of each copy; there is one.
pub(crate) unsafe fn copy_batch(
    base: u64,
    runs: &[Run],
    stream: sys::CUstream,
    device: usize,
) -> Result<bool> {
    let Some(driver) = DRIVER.get() else { return Ok(false) };
    let Some(batch) = driver.batch else { return Ok(false) };
    let mut sources: Vec<u64> = runs.iter().map(|run| base + run.0).collect();
    let mut destinations: Vec<u64> = runs.iter().map(|run| run.1).collect();
    let mut sizes: Vec<usize> = runs.iter().map(|run| run.2 as usize).collect();
    let mut attributes = BatchAttributes {
        source_order: 1,
        source_hint: [0; 2],
        destination_hint: [0; 2],
        flags: 0,
    };
    let mut first = 0usize;
    let mut failed = usize::MAX;
    let (d, s, n, count) =
        (destinations.as_mut_ptr(), sources.as_mut_ptr(), sizes.as_mut_ptr(), sizes.len());
    // SAFETY: the arrays hold `count` entries; one set of attributes applies from index 0 on.
    let number = unsafe {
        match batch {
            Batch::First(f) => {
                f(d, s, n, count, &mut attributes, &mut first, 1, &mut failed, stream)
            }
            Batch::Second(f) => f(d, s, n, count, &mut attributes, &mut first, 1, stream),
        }
    };
    match number {
        0 => Ok(true),
        // CUDA_ERROR_INVALID_VALUE: some kind of memory that the call does not take, or our mistake;
        // then the single copies say so. CUDA_ERROR_NOT_SUPPORTED.
        1 | 801 => Ok(false),
        _ => Err(Error::Driver { call: "cuMemcpyBatchAsync", device, code: driver.code(number) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absence_says_what_was_looked_for() {
        let Err(error) = open(&["libfst-no-such-driver.so", "libfst-none.so.1"]) else {
            panic!("opened a library that does not exist");
        };
        let text = error.to_string();
        assert!(text.contains("libfst-no-such-driver.so, libfst-none.so.1"), "{text}");
        assert!(text.contains("No such file"), "{text}");
    }

    #[test]
    fn another_library_is_no_driver() {
        let Err(error) = open(&["libc.so.6"]) else { panic!("took libc for the driver") };
        assert_eq!(
            error,
            Error::MissingSymbol { library: "libc.so.6".into(), symbol: "cuInit".into() }
        );
    }

    #[test]
    fn a_stub_is_called_one() {
        let folder = std::env::temp_dir().join(format!("fst-stub-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (source, stub) = (folder.join("stub.c"), folder.join("libcuda.so"));
        let functions = NEEDED.iter().map(|name| format!("int {name}(void) {{ return 34; }}\n"));
        std::fs::write(&source, functions.collect::<String>()).unwrap();
        let mut compiler = std::process::Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).args([&stub, &source]);
        assert!(compiler.status().unwrap().success());
        let name: &'static str = Box::leak(stub.to_str().unwrap().into());
        let Err(error) = open(Box::leak(Box::new([name]))) else { panic!("took a stub") };
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(error, Error::StubDriver { library: name.to_owned() });
        assert!(error.to_string().contains("stub"), "{error}");
    }

    #[test]
    fn versions_decode_and_compare() {
        let v = decoded(12040);
        assert_eq!((v.major, v.minor), (12, 4));
        assert!(decoded(11080) < LEAST_CUDA);
        assert!(decoded(12000) >= LEAST_CUDA);
    }
}
