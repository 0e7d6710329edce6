//! Initialisation, devices, contexts, errors.

use super::{api, put};
use crate::codes::*;
use std::ffi::{c_char, c_void};

/// Writes `text` and a NUL, cut to `len` bytes.
fn put_text(to: *mut c_char, len: i32, text: &str) -> Result<(), i32> {
    if to.is_null() || len <= 0 {
        return Err(ERROR_INVALID_VALUE);
    }
    let n = text.len().min(len as usize - 1);
    // SAFETY: the caller gives `len` bytes at `to`; n + 1 <= len.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast::<u8>(), n);
        to.add(n).write(0);
    }
    Ok(())
}

api! {
    fn cuInit(_flags: u32) |w| {
        if w.devices.is_empty() {
            return Err(ERROR_NO_DEVICE);
        }
        w.initialised = true;
        Ok(())
    }
    fn cuDriverGetVersion(version: *mut i32) |w| { put(version, w.driver_version) }
    fn cuDeviceGetCount(count: *mut i32) |w| { put(count, w.devices.len() as i32) }
    fn cuDeviceGet(device: *mut i32, ordinal: i32) |w| {
        w.device(ordinal)?;
        put(device, ordinal)
    }
    fn cuDeviceGetName(name: *mut c_char, len: i32, device: i32) |w| {
        w.device(device)?;
        put_text(name, len, "Simulated GPU")
    }
    fn cuDeviceGetPCIBusId(id: *mut c_char, len: i32, device: i32) |w| {
        w.device(device)?;
        put_text(id, len, &format!("FFFF:{device:02X}:00.0"))
    }
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: i32) |w| {
        w.device(device)?;
        put(uuid, [device as u8 + 1; 16])
    }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) |w| {
        w.device(device)?;
        put(bytes, w.memory_limit as usize)
    }
    fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) |w| {
        w.device(device)?;
        put(value, match attribute {
            1 => 1024,                                  // MAX_THREADS_PER_BLOCK
            2..=4 => 1024,                              // MAX_BLOCK_DIM
            5 => i32::MAX,                              // MAX_GRID_DIM_X
            6 | 7 => 65535,                             // MAX_GRID_DIM_Y, _Z
            8 => 49152,                                 // MAX_SHARED_MEMORY_PER_BLOCK
            10 => 32,                                   // WARP_SIZE
            11 => i32::MAX,                             // MAX_PITCH
            16 => 4,                                    // MULTIPROCESSOR_COUNT
            18 => w.integrated as i32,                  // INTEGRATED
            19 => 1,                                    // CAN_MAP_HOST_MEMORY
            34 => device,                               // PCI_DEVICE_ID
            39 => 1536,                                 // MAX_THREADS_PER_MULTIPROCESSOR
            40 => 2,                                    // ASYNC_ENGINE_COUNT
            41 => 1,                                    // UNIFIED_ADDRESSING
            75 => (w.capability / 10) as i32,           // COMPUTE_CAPABILITY_MAJOR
            76 => (w.capability % 10) as i32,           // COMPUTE_CAPABILITY_MINOR
            88 | 100 => (w.integrated || w.coherent) as i32, // PAGEABLE_MEMORY_ACCESS, _USES_HOST_PAGE_TABLES
            91 => w.host_pointers as i32,               // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
            99 => 1,                                    // HOST_REGISTER_SUPPORTED
            113 => w.read_only_register as i32,         // READ_ONLY_HOST_REGISTER_SUPPORTED
            115 => 1,                                   // MEMORY_POOLS_SUPPORTED
            _ => 0,
        })
    }
    fn cuDevicePrimaryCtxRetain(context: *mut u64, device: i32) |w| {
        let handle = w.retain(device)?;
        put(context, handle)
    }
    fn cuDevicePrimaryCtxRelease_v2(device: i32) |w| { w.release(device) }
    fn cuDevicePrimaryCtxGetState(device: i32, flags: *mut u32, active: *mut i32) |w| {
        let alive = w.device(device)?.context != 0;
        put(flags, 0)?;
        put(active, alive as i32)
    }
    fn cuCtxPushCurrent_v2(context: u64) |w| { w.push(context) }
    fn cuCtxPopCurrent_v2(context: *mut u64) |w| {
        let old = w.pop()?;
        if context.is_null() { Ok(()) } else { put(context, old) }
    }
    fn cuCtxSetCurrent(context: u64) |w| {
        w.set_current(context);
        Ok(())
    }
    fn cuCtxGetCurrent(context: *mut u64) |w| { put(context, w.current().unwrap_or(0)) }
    fn cuCtxGetDevice(device: *mut i32) |w| {
        let here = w.here()?;
        put(device, here as i32)
    }
    fn cuCtxSynchronize() |w| {
        let here = w.here()?;
        w.drain_device(here)
    }
    fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) |w| {
        w.here()?;
        put(least, 0)?;
        put(greatest, -5)
    }
    fn cuDeviceCanAccessPeer(can: *mut i32, device: i32, peer: i32) |w| {
        w.device(device)?;
        w.device(peer)?;
        put(can, (device != peer) as i32)
    }
    fn cuCtxEnablePeerAccess(peer: u64, flags: u32) |w| {
        let here = w.here()?;
        let peer = w.devices.iter().position(|d| d.context == peer && peer != 0);
        let peer = peer.filter(|peer| *peer != here).ok_or(ERROR_INVALID_CONTEXT)?;
        if flags != 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        if w.peers.insert((here, peer)) { Ok(()) } else { Err(ERROR_PEER_ACCESS_ALREADY_ENABLED) }
    }
}

/// Name of a code, from a static table: counts as no call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: i32, text: *mut *const c_char) -> i32 {
    let name = NAMES.iter().find(|(c, _)| *c == code).map(|(_, name)| name.as_ptr());
    match put(text, name.unwrap_or(std::ptr::null())) {
        Ok(()) if name.is_some() => SUCCESS,
        _ => ERROR_INVALID_VALUE,
    }
}

/// The same text as the name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(code: i32, text: *mut *const c_char) -> i32 {
    // SAFETY: same contract.
    unsafe { cuGetErrorName(code, text) }
}

/// Entry points by name: those of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetProcAddress_v2(
    _symbol: *const c_char,
    function: *mut *mut c_void,
    _version: i32,
    _flags: u64,
    _status: *mut i32,
) -> i32 {
    let _ = put(function, std::ptr::null_mut());
    ERROR_NOT_FOUND
}
