//! cuFile over `pread`: what a read returns is in device memory at once, however much queued work
//! still reads the bytes that were there.

use super::put;
use crate::codes::{ERROR_INVALID_CONTEXT, SUCCESS};
use crate::world::{World, enter, with};
use std::ffi::{c_int, c_void};

const DRIVER_NOT_INITIALIZED: i32 = 5001;
const IO_NOT_SUPPORTED: i32 = 5008;
const CUDA_DRIVER_ERROR: i32 = 5011;
const CUDA_POINTER_INVALID: i32 = 5012;
const CUDA_CONTEXT_MISMATCH: i32 = 5015;
const INVALID_FILE_TYPE: i32 = 5018;
const INVALID_VALUE: i32 = 5022;
const MEMORY_ALREADY_REGISTERED: i32 = 5023;
const MEMORY_NOT_REGISTERED: i32 = 5024;

/// `CUfileError_t`.
#[repr(C)]
pub struct Status {
    code: c_int,
    cuda: c_int,
}

/// `CUfileDescr_t`.
#[repr(C)]
pub struct Description {
    kind: u32,
    /// The union that follows holds a pointer too.
    _padding: u32,
    descriptor: c_int,
    _operations: *const c_void,
}

fn status(call: &'static str, f: impl FnOnce(&mut World) -> Result<(), i32>) -> Status {
    let code = enter(call, f);
    // A dead context's own error travels beside cuFile's.
    let cuda = if code == CUDA_DRIVER_ERROR { with(|w| w.here()).err().unwrap_or(0) } else { 0 };
    Status { code, cuda }
}

/// The device whose context is current; as cuFile's errors.
fn here(w: &World) -> Result<usize, i32> {
    w.here().map_err(|code| {
        if code == ERROR_INVALID_CONTEXT { CUDA_CONTEXT_MISMATCH } else { CUDA_DRIVER_ERROR }
    })
}

fn ready(w: &World) -> Result<(), i32> {
    if w.cufile_open { Ok(()) } else { Err(DRIVER_NOT_INITIALIZED) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileDriverOpen() -> Status {
    status("cuFileDriverOpen", |w| {
        w.cufile_open = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileGetVersion(version: *mut c_int) -> Status {
    status("cuFileGetVersion", |_| put(version, 1140))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileDriverGetProperties(properties: *mut [u64; 7]) -> Status {
    status("cuFileDriverGetProperties", |w| {
        ready(w)?;
        // Versions, two sizes, then status and control flags.
        put(properties, [0, 4, 16384, u64::from(w.cufile_flags), 0, 0, 0])
    })
}

/// For NVMe; other file systems have none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileDriverGetP2PFlags(target: c_int, flags: *mut u32) -> Status {
    status("cuFileDriverGetP2PFlags", |w| {
        ready(w)?;
        put(flags, if target == 4 { w.cufile_p2p } else { 0 })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileHandleRegister(
    handle: *mut u64,
    description: *mut Description,
) -> Status {
    status("cuFileHandleRegister", |w| {
        ready(w)?;
        // SAFETY: the caller gives a valid description.
        let Some(description) = (unsafe { description.as_ref() }) else {
            return Err(INVALID_VALUE);
        };
        if description.kind != 1 || description.descriptor < 0 {
            return Err(INVALID_FILE_TYPE);
        }
        let id = w.id();
        w.cufile_files.insert(id, description.descriptor);
        put(handle, id)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileHandleDeregister(handle: u64) {
    with(|w| {
        if w.cufile_files.remove(&handle).is_none() {
            w.violation(format!("cuFileHandleDeregister of unknown handle {handle:#x}"));
        }
    });
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileBufRegister(
    base: *const c_void,
    len: usize,
    _flags: c_int,
) -> Status {
    status("cuFileBufRegister", |w| {
        ready(w)?;
        let here = here(w)?;
        if w.memory.owner(base as u64, len) != Some(here) {
            return Err(CUDA_POINTER_INVALID);
        }
        match w.cufile_buffers.insert(base as u64, len) {
            None => Ok(()),
            Some(_) => Err(MEMORY_ALREADY_REGISTERED),
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileBufDeregister(base: *const c_void) -> Status {
    status("cuFileBufDeregister", |w| {
        let Some(len) = w.cufile_buffers.remove(&(base as u64)) else {
            w.violation("cuFileBufDeregister of memory not registered".into());
            return Err(MEMORY_NOT_REGISTERED);
        };
        if w.memory.owner(base as u64, len).is_none() {
            w.violation("device memory freed before cuFileBufDeregister".into());
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuFileRead(
    handle: u64,
    base: *mut c_void,
    len: usize,
    file_offset: i64,
    buffer_offset: i64,
) -> isize {
    let mut got = 0;
    let code = enter("cuFileRead", |w| {
        ready(w)?;
        let here = here(w)?;
        let descriptor = *w.cufile_files.get(&handle).ok_or(INVALID_VALUE)?;
        let to = base as u64 + buffer_offset as u64;
        if w.memory.owner(to, len) != Some(here) {
            return Err(CUDA_POINTER_INVALID);
        }
        // Nothing says what a read behind the end of a file gives: here it is an error.
        // SAFETY: a zeroed `stat` is valid, and is filled in.
        let end = unsafe {
            let mut stat: libc::stat = std::mem::zeroed();
            libc::fstat(descriptor, &mut stat);
            stat.st_size
        };
        if file_offset > 0 && file_offset >= end {
            return Err(IO_NOT_SUPPORTED);
        }
        let len = len.min(w.cufile_most);
        // Direct I/O asks for alignment of offset, length and memory; cuFile takes any, as here.
        let skip = file_offset as usize % 4096;
        let whole = (skip + len).next_multiple_of(4096);
        let mut bounce = vec![0u8; whole + 4096];
        let start = bounce.as_ptr().align_offset(4096);
        // SAFETY: the bounce memory has room for `whole` bytes from `start`, of which the wanted
        // ones start at `skip`; the device range was checked.
        unsafe {
            let from = bounce[start..].as_mut_ptr();
            got = libc::pread(descriptor, from.cast(), whole, file_offset - skip as i64);
            if got >= 0 {
                got = (got - skip as isize).clamp(0, len as isize);
                std::ptr::copy_nonoverlapping(from.add(skip), to as *mut u8, got as usize);
            }
        }
        Ok(())
    });
    if code == SUCCESS { got } else { -(code as isize) }
}
