//! NVIDIA GPUDirect Storage: reads from storage into device memory through cuFile.
//!
//! The library is opened at run time under the names that installations and wheels give it. Its
//! functions follow NVIDIA's "cuFile API Reference Guide" (`cufile.h`); codes are kept as integers.
//! Without the `nvidia-fs` kernel module cuFile may still work in its compatibility mode, where it
//! reads into host memory and copies: then the pinned pipeline is the faster way, and
//! [`GdsStatus`] says so.

mod kernel;
mod read;
mod status;

pub use read::{GdsOptions, GdsStats, read};

use crate::cuda::buffer::device::DeviceArena;
use crate::cuda::device::CudaDevice;
use crate::cufile::CuFileError;
use crate::error::Error;
use libloading::Library;
use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::OnceLock;

/// The names under which cuFile is looked for.
pub const CUFILE_LIBRARIES: [&str; 2] = ["libcufile.so.0", "libcufile.so"];

/// Whether `cuFileBufRegister` refuses with this code memory that cuFile can still read into by way
/// of its own.
fn is_no_room(code: i32) -> bool {
    matches!(
        code,
        // An unsupported limit, I/O or device; invalid memory type, mapping size or range; not pinned.
        5003 | 5008 | 5009 | 5013 | 5016 | 5017 | 5036
        // The module's ioctl; internal errors, which a failed mapping is one of; no memory;
        // registration itself.
        | 5010 | 5030 | 5043 | 5045
    )
}

/// `CUfileError_t`, returned in a register.
#[repr(C)]
#[derive(Clone, Copy)]
struct Status {
    code: c_int,
    cuda: c_int,
}

/// `CUfileDescr_t`.
#[repr(C)]
struct Description {
    /// 1: a file descriptor.
    kind: c_uint,
    descriptor: DescriptorUnion,
    operations: *const c_void,
}

/// The union of a descriptor and a Windows handle.
#[repr(C)]
union DescriptorUnion {
    descriptor: c_int,
    _handle: *mut c_void,
}

/// `CUfileDrvProps_t`, with room for what later versions append.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Properties {
    major: c_uint,
    minor: c_uint,
    poll_threshold: usize,
    max_direct: usize,
    status_flags: c_uint,
    control_flags: c_uint,
    feature_flags: c_uint,
    max_cache: c_uint,
    buffer_cache: c_uint,
    max_pinned: c_uint,
    max_batch: c_uint,
    batch_timeout: c_uint,
    _later: [u64; 8],
}

type Handle = *mut c_void;

/// cuFile, open for the rest of the process.
pub struct CuFile {
    library: String,
    driver_open: unsafe extern "C" fn() -> Status,
    properties: unsafe extern "C" fn(*mut Properties) -> Status,
    handle_register: unsafe extern "C" fn(*mut Handle, *mut Description) -> Status,
    handle_deregister: unsafe extern "C" fn(Handle),
    buffer_register: unsafe extern "C" fn(*const c_void, usize, c_int) -> Status,
    buffer_deregister: unsafe extern "C" fn(*const c_void) -> Status,
    read: unsafe extern "C" fn(Handle, *mut c_void, usize, i64, i64) -> isize,
    version: Option<unsafe extern "C" fn(*mut c_int) -> Status>,
    /// Since cuFile 1.16.
    p2p_flags: Option<unsafe extern "C" fn(c_int, *mut c_uint) -> Status>,
    /// The pointers above lead into it.
    _library: ManuallyDrop<Library>,
}

static CUFILE: OnceLock<CuFile> = OnceLock::new();

impl fmt::Debug for CuFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CuFile").field("library", &self.library).finish_non_exhaustive()
    }
}

fn check(status: Status, call: &'static str) -> Result<(), CuFileError> {
    match status.code {
        0 => Ok(()),
        code => Err(CuFileError::Call { call, code, cuda: status.cuda }),
    }
}

impl CuFile {
    /// Opens cuFile and its driver; once, and then the same one for the rest of the process.
    ///
    /// # Errors
    ///
    /// [`CuFileError::NotFound`], [`CuFileError::MissingSymbol`]; [`CuFileError::NoModuleList`],
    /// [`CuFileError::NoDeviceNode`] and [`CuFileError::Device`] where its driver must not be opened;
    /// [`CuFileError::Call`].
    pub fn open() -> Result<&'static Self, CuFileError> {
        Self::open_named(&CUFILE_LIBRARIES, Some(Path::new("/")))
    }

    /// The same with the library at `path`, for one that the system's search does not find. The
    /// first opening of the process decides.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn open_at(path: &Path) -> Result<&'static Self, CuFileError> {
        Self::open_named(&[&path.to_string_lossy()], Some(Path::new("/")))
    }

    /// The same with a simulated library, which needs nothing of the kernel, for tests.
    #[doc(hidden)]
    pub fn open_simulated(path: &Path) -> Result<&'static Self, CuFileError> {
        Self::open_named(&[&path.to_string_lossy()], None)
    }

    fn open_named(names: &[&str], root: Option<&Path>) -> Result<&'static Self, CuFileError> {
        if let Some(open) = CUFILE.get() {
            return Ok(open);
        }
        let found = Self::look_for(names)?;
        root.map_or(Ok(()), kernel::check)?;
        if CudaDevice::count()? == 0 {
            return Err(Error::NoDevice { ordinal: 0, count: 0 }.into());
        }
        // SAFETY: the function as declared in cufile.h. Opening twice, by another user of the
        // library in this process too, is counted there.
        let opened = kernel::keeping_descriptor_0(|| unsafe { (found.driver_open)() });
        match check(opened, "cuFileDriverOpen") {
            Ok(()) | Err(CuFileError::Call { code: 5026, .. }) => {}
            Err(error) => return Err(error),
        }
        Ok(CUFILE.get_or_init(|| found))
    }

    fn look_for(names: &[&str]) -> Result<Self, CuFileError> {
        let mut reason = String::new();
        for name in names {
            // SAFETY: loading runs the library's initialisers, which are meant for any process.
            match unsafe { Library::new(*name) } {
                // SAFETY: signatures as declared in cufile.h.
                Ok(library) => return unsafe { Self::bind(name, library) },
                Err(e) => {
                    reason = std::error::Error::source(&e)
                        .map_or_else(|| e.to_string(), ToString::to_string);
                }
            }
        }
        let looked_for = names.iter().map(|n| (*n).to_owned()).collect();
        Err(CuFileError::NotFound { looked_for, reason })
    }

    /// # Safety
    ///
    /// Symbols of these names in `library` have cufile.h's signatures.
    unsafe fn bind(name: &str, library: Library) -> Result<Self, CuFileError> {
        let library = ManuallyDrop::new(library);
        macro_rules! symbol {
            ($symbol:literal) => {
                // SAFETY: the caller's contract.
                *unsafe { library.get($symbol.as_bytes()) }.map_err(|_| {
                    CuFileError::MissingSymbol { library: name.to_owned(), symbol: $symbol }
                })?
            };
        }
        Ok(Self {
            library: name.to_owned(),
            driver_open: symbol!("cuFileDriverOpen"),
            properties: symbol!("cuFileDriverGetProperties"),
            handle_register: symbol!("cuFileHandleRegister"),
            handle_deregister: symbol!("cuFileHandleDeregister"),
            buffer_register: symbol!("cuFileBufRegister"),
            buffer_deregister: symbol!("cuFileBufDeregister"),
            read: symbol!("cuFileRead"),
            // SAFETY: the caller's contract.
            version: unsafe { library.get(b"cuFileGetVersion\0") }.ok().map(|f| *f),
            // SAFETY: as above.
            p2p_flags: unsafe { library.get(b"cuFileDriverGetP2PFlags\0") }.ok().map(|f| *f),
            _library: library,
        })
    }

    /// The name under which the library was opened.
    pub fn library(&self) -> &str {
        &self.library
    }

    /// The library's version, as 1.14, where it tells.
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut encoded = 0;
        // SAFETY: a valid out pointer.
        let status = unsafe { (self.version?)(&mut encoded) };
        let encoded = u32::try_from(encoded).ok()?;
        (status.code == 0).then_some((encoded / 1000, encoded % 1000 / 10))
    }

    fn driver_properties(&self) -> Result<Properties, CuFileError> {
        let mut properties = Properties::default();
        // SAFETY: room for every version's structure.
        check(unsafe { (self.properties)(&mut properties) }, "cuFileDriverGetProperties")?;
        Ok(properties)
    }

    /// Whether NVMe drives and the device reach each other through the kernel alone, without
    /// `nvidia-fs`.
    fn has_p2p(&self, properties: &Properties) -> bool {
        /// `CU_FILE_NVME_SUPPORTED`
        const NVME: c_int = 4;
        /// `CU_FILE_P2P_FLAG_PCI_P2PDMA` and `CU_FILE_P2P_FLAG_C2C`
        const MODES: c_uint = 1 << 0 | 1 << 3;
        /// `CU_FILE_NVME_P2P_SUPPORTED`, to be looked at in older versions only.
        const OLD_FLAG: c_uint = 1 << 11;
        match self.p2p_flags {
            Some(p2p_flags) => {
                let mut flags = 0;
                // SAFETY: a valid out pointer.
                unsafe { p2p_flags(NVME, &mut flags) }.code == 0 && flags & MODES != 0
            }
            None => properties.status_flags & OLD_FLAG != 0,
        }
    }

    /// Registers an open file; one opened with `O_DIRECT` can be read without the page cache.
    ///
    /// # Errors
    ///
    /// [`CuFileError::Call`].
    pub fn register_file<'a>(&'static self, file: &'a File) -> Result<GdsFile<'a>, CuFileError> {
        let mut handle = std::ptr::null_mut();
        let mut description = Description {
            kind: 1,
            descriptor: DescriptorUnion { descriptor: file.as_raw_fd() },
            operations: std::ptr::null(),
        };
        // SAFETY: a valid description and out pointer; the descriptor stays open as long as the
        // handle, which borrows the file.
        let status = unsafe { (self.handle_register)(&mut handle, &mut description) };
        check(status, "cuFileHandleRegister")?;
        Ok(GdsFile { cufile: self, handle, _file: file })
    }

    /// Registers an arena, so that reads into it need no mapping of their own.
    ///
    /// # Errors
    ///
    /// [`CuFileError::Call`].
    pub fn register_arena(&'static self, arena: &DeviceArena) -> Result<GdsArena, CuFileError> {
        let _current = arena.device().make_current()?;
        let address = arena.address() as usize as *const c_void;
        // SAFETY: a live allocation of that length, kept by the result.
        let status = unsafe { (self.buffer_register)(address, arena.len() as usize, 0) };
        check(status, "cuFileBufRegister")?;
        Ok(GdsArena { cufile: self, arena: arena.clone(), registered: true })
    }

    /// [`register_arena`](Self::register_arena), or the arena as it is where device memory cannot be
    /// registered, or no more of it: cuFile then goes by way of memory of its own.
    ///
    /// # Errors
    ///
    /// [`CuFileError::Call`] for other reasons.
    pub fn lend_arena(&'static self, arena: &DeviceArena) -> Result<GdsArena, CuFileError> {
        match self.register_arena(arena) {
            Err(CuFileError::Call { code, .. }) if is_no_room(code) => {
                Ok(GdsArena { cufile: self, arena: arena.clone(), registered: false })
            }
            registered => registered,
        }
    }
}

/// A file registered with cuFile.
pub struct GdsFile<'a> {
    cufile: &'static CuFile,
    /// From `cuFileHandleRegister`, deregistered on drop.
    handle: Handle,
    _file: &'a File,
}

// SAFETY: cuFile's handles may be used from any thread, several at once.
unsafe impl Send for GdsFile<'_> {}
// SAFETY: as above.
unsafe impl Sync for GdsFile<'_> {}

impl fmt::Debug for GdsFile<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GdsFile").field("file", &self._file).finish_non_exhaustive()
    }
}

impl GdsFile<'_> {
    /// Reads `len` bytes from `offset` of the file to `place` of the arena. Fewer come only where
    /// the file ends; the number that came.
    ///
    /// # Errors
    ///
    /// As for [`read_needed`](Self::read_needed).
    pub fn read(
        &self,
        arena: &GdsArena,
        place: u64,
        offset: u64,
        len: u64,
    ) -> Result<u64, CuFileError> {
        self.read_needed(arena, place, offset, len, len)
    }

    /// [`read`](Self::read), content with the first `needed` bytes: asks for whole `len`, as alignment
    /// wants it, but not again for what may lie behind the end of the file.
    ///
    /// The bytes are there when this returns. Work queued earlier on the same bytes of the arena
    /// must be finished.
    ///
    /// # Errors
    ///
    /// [`CuFileError::Read`], [`CuFileError::Call`], or a range outside the arena.
    pub fn read_needed(
        &self,
        arena: &GdsArena,
        place: u64,
        offset: u64,
        len: u64,
        needed: u64,
    ) -> Result<u64, CuFileError> {
        arena.arena.range(place, len)?;
        let _current = arena.arena.device().make_current()?;
        let base = arena.arena.address() as usize as *mut c_void;
        let mut done = 0;
        while done < needed.min(len) {
            // SAFETY: a live handle, and a range of a live allocation, checked above.
            let got = unsafe {
                (self.cufile.read)(
                    self.handle,
                    base,
                    (len - done) as usize,
                    (offset + done) as i64,
                    (place + done) as i64,
                )
            };
            match got {
                0 => break,
                1.. => done += got as u64,
                -1 => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() == std::io::ErrorKind::Interrupted {
                        continue;
                    }
                    let errno = error.raw_os_error().unwrap_or(0);
                    return Err(CuFileError::Read { offset: offset + done, errno });
                }
                _ => {
                    let code = i32::try_from(got.unsigned_abs()).unwrap_or(i32::MAX);
                    return Err(CuFileError::Call { call: "cuFileRead", code, cuda: 0 });
                }
            }
        }
        Ok(done)
    }
}

impl Drop for GdsFile<'_> {
    fn drop(&mut self) {
        // SAFETY: registered once, deregistered once; reads borrow this value.
        unsafe { (self.cufile.handle_deregister)(self.handle) };
    }
}

/// An arena for cuFile to read into, registered with it where that is possible.
#[derive(Debug)]
pub struct GdsArena {
    cufile: &'static CuFile,
    arena: DeviceArena,
    registered: bool,
}

impl GdsArena {
    /// The arena.
    pub fn arena(&self) -> &DeviceArena {
        &self.arena
    }
}

impl Drop for GdsArena {
    fn drop(&mut self) {
        if self.registered
            && let Ok(_current) = self.arena.device().make_current()
        {
            // SAFETY: registered once, deregistered once.
            let _ = unsafe {
                (self.cufile.buffer_deregister)(self.arena.address() as usize as *const c_void)
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absence_says_what_was_looked_for() {
        let error = CuFile::look_for(&["libfst-no-cufile.so.0"]).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("libfst-no-cufile.so.0") && text.contains("No such file"), "{text}");
        let error = CuFile::look_for(&["libc.so.6"]).unwrap_err();
        assert_eq!(
            error,
            CuFileError::MissingSymbol { library: "libc.so.6".into(), symbol: "cuFileDriverOpen" }
        );
    }

    #[test]
    fn memory_that_is_refused_is_told_from_other_failures() {
        assert!([5003, 5010, 5030, 5036, 5043, 5045].into_iter().all(is_no_room));
        assert!(![5001, 5011, 5015, 5044].into_iter().any(is_no_room));
        let error = CuFileError::Call { call: "cuFileBufRegister", code: 5045, cuda: 0 };
        assert!(error.to_string().contains("device memory could not be registered"), "{error}");
    }

    #[test]
    fn layouts_are_those_of_the_header() {
        assert_eq!(size_of::<Description>(), 24);
        assert_eq!(std::mem::offset_of!(Properties, status_flags), 24);
        assert_eq!(std::mem::offset_of!(Properties, feature_flags), 32);
    }
}
