//! Device memory and pinned host memory.

use super::{api, put};
use crate::codes::*;
use crate::queue::Work;
use crate::world::{Outcome, World};
use std::ffi::c_void;

/// `cuMemHostRegister`'s CU_MEMHOSTREGISTER_READ_ONLY.
const READ_ONLY: u32 = 8;

fn allocate(w: &mut World, out: *mut u64, len: usize) -> Outcome {
    let here = w.here()?;
    if len == 0 {
        return Err(ERROR_INVALID_VALUE);
    }
    let taken = w.taken(len);
    if w.devices[here].used + taken > w.memory_limit {
        return Err(ERROR_OUT_OF_MEMORY);
    }
    let address = w.memory.allocate(here, len).ok_or(ERROR_OUT_OF_MEMORY)?;
    w.devices[here].used += taken;
    w.clock.spend_on(w.clock.costs.allocate, w.clock.costs.allocate_mib, len);
    put(out, address)
}

/// Faults pages in as pinning does: pages behind the end of a file that shrank are refused, without
/// a signal.
fn populate(address: u64, len: usize) -> bool {
    // SAFETY: asks for a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let start = address / page * page;
    let len = (address + len as u64 - start) as usize;
    // SAFETY: advice that faults pages in and changes nothing else.
    let done = unsafe { libc::madvise(start as *mut c_void, len, libc::MADV_POPULATE_READ) };
    // Kernels before 5.14 do not know the advice.
    done == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL)
}

/// Whether the mapping around an address may be written, and whether it is a file's. From
/// `/proc/self/maps`, whose lines are as `START-END PERMS OFFSET DEV INODE [PATH]`.
fn mapping(address: u64) -> (bool, bool) {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    for line in maps.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some((start, end)) = words.next().and_then(|range| range.split_once('-')) else {
            continue;
        };
        let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
        if (number(start)..number(end)).contains(&address) {
            let perms = words.next().unwrap_or_default();
            let inode = words.nth(2).unwrap_or("0");
            return (perms.contains('w'), inode != "0");
        }
    }
    (true, false)
}

api! {
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |w| {
        let here = w.here()?;
        put(free, (w.memory_limit - w.devices[here].used) as usize)?;
        put(total, w.memory_limit as usize)
    }
    fn cuMemAlloc_v2(address: *mut u64, len: usize) |w| { allocate(w, address, len) }
    fn cuMemAllocAsync(address: *mut u64, len: usize, stream: u64) |w| {
        w.stream(stream)?;
        allocate(w, address, len)
    }
    fn cuMemFree_v2(address: u64) |w| {
        w.here()?;
        if address == 0 {
            return Ok(());
        }
        if let Some(len) = w.memory.len_at(address) {
            w.check_unused("cuMemFree", address, len);
        }
        match w.memory.free(address) {
            Ok((len, device)) => {
                w.devices[device].used -= w.taken(len);
                w.clock.spend(w.clock.costs.free);
                Ok(())
            }
            Err(twice) => {
                let what = if twice { "double free" } else { "free of memory never allocated" };
                w.violation(format!("{what}: cuMemFree({address:#x})"));
                Err(ERROR_INVALID_VALUE)
            }
        }
    }
    fn cuMemFreeAsync(address: u64, stream: u64) |w| {
        let stream = w.stream(stream)?;
        if w.memory.len_at(address).is_none() {
            w.violation(format!("cuMemFreeAsync({address:#x}) of memory not allocated"));
            return Err(ERROR_INVALID_VALUE);
        }
        w.enqueue(stream, Work::Free { address });
        Ok(())
    }
    fn cuMemHostAlloc(out: *mut u64, len: usize, _flags: u32) |w| {
        let here = w.here()?;
        if len == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        let address = w.host.allocate(here, len).ok_or(ERROR_OUT_OF_MEMORY)?;
        w.clock.spend_on(w.clock.costs.pin, w.clock.costs.pin_mib, len);
        put(out, address)
    }
    fn cuMemFreeHost(p: *mut c_void) |w| {
        w.here()?;
        let address = p as u64;
        if let Some(len) = w.host.len_at(address) {
            w.clock.spend_on(w.clock.costs.unpin, w.clock.costs.unpin_mib, len);
            w.check_unused("cuMemFreeHost", address, len);
        }
        if w.host.remove(address, true).is_none() {
            w.violation(format!("cuMemFreeHost({address:#x}) of memory not allocated by the driver"));
            return Err(ERROR_INVALID_VALUE);
        }
        Ok(())
    }
    fn cuMemHostRegister_v2(p: *mut c_void, len: usize, flags: u32) |w| {
        let here = w.here()?;
        if len == 0 || p.is_null() {
            return Err(ERROR_INVALID_VALUE);
        }
        if flags & READ_ONLY != 0 && !w.read_only_register {
            return Err(ERROR_NOT_SUPPORTED);
        }
        w.clock.spend_on(w.clock.costs.pin, w.clock.costs.pin_mib, len);
        if !populate(p as u64, len) {
            return Err(ERROR_INVALID_VALUE);
        }
        let (writable, file) = mapping(p as u64);
        if file && let Some(code) = w.injected("register:file", Some(here)) {
            return Err(code);
        }
        // What the process itself may not write is for reading only.
        if !writable && flags & READ_ONLY == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        if w.host.register(here, p as u64, len, file) {
            Ok(())
        } else {
            Err(ERROR_HOST_MEMORY_ALREADY_REGISTERED)
        }
    }
    fn cuMemHostUnregister(p: *mut c_void) |w| {
        w.here()?;
        let address = p as u64;
        if let Some(len) = w.host.len_at(address) {
            w.clock.spend_on(w.clock.costs.unpin, w.clock.costs.unpin_mib, len);
            w.check_unused("cuMemHostUnregister", address, len);
        }
        if w.host.remove(address, false).is_none() {
            w.violation(format!("cuMemHostUnregister({address:#x}) of memory not registered"));
            return Err(ERROR_HOST_MEMORY_NOT_REGISTERED);
        }
        Ok(())
    }
    fn cuMemHostGetDevicePointer_v2(out: *mut u64, p: *mut c_void, _flags: u32) |w| {
        w.here()?;
        put(out, p as u64)
    }
    fn cuPointerGetAttribute(out: *mut c_void, attribute: i32, address: u64) |w| {
        let device = w.memory.owner(address, 1);
        let pinned = w.host.kind(address, 1) == crate::memory::HostKind::Pinned;
        if device.is_none() && !pinned {
            return Err(ERROR_INVALID_VALUE);
        }
        match attribute {
            2 => put(out.cast::<u32>(), if device.is_some() { 2 } else { 1 }), // MEMORY_TYPE
            9 => put(out.cast::<i32>(), device.map_or(-2, |d| d as i32)),      // DEVICE_ORDINAL
            _ => Err(ERROR_NOT_SUPPORTED),
        }
    }
}
