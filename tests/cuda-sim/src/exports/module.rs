//! Modules and launches: PTX (of a fat binary, too) gives names and parameter sizes, host functions do the
//! work.

use super::{api, put};
use crate::codes::*;
use crate::fatbin;
use crate::queue::{HostKernel, Work};
use crate::world::{Outcome, World};
use std::ffi::{CStr, c_char, c_void};

fn load(w: &mut World, out: *mut u64, image: *const c_void) -> Outcome {
    let here = w.here()?;
    if image.is_null() {
        return Err(ERROR_INVALID_VALUE);
    }
    // SAFETY: PTX is NUL-terminated, and one of ours is longer than a fat binary's header; as the API asks.
    let header = unsafe { std::slice::from_raw_parts(image.cast::<u8>(), 16) };
    let (text, compiled) = match fatbin::len(header) {
        Some(_) if !image.addr().is_multiple_of(8) => return Err(ERROR_INVALID_VALUE),
        Some(len) => {
            // SAFETY: the length that the header says.
            let bytes = unsafe { std::slice::from_raw_parts(image.cast::<u8>(), len) };
            let images = fatbin::images(bytes).ok_or(ERROR_INVALID_IMAGE)?;
            let fits = |image: &fatbin::Image| {
                let (has, wants) = (w.capability, image.architecture);
                image.is_code && has / 10 == wants / 10 && has >= wants
            };
            let compiled = images.iter().any(fits);
            let ptx = images.into_iter().find(|image| !image.is_code);
            (ptx.ok_or(ERROR_NO_BINARY_FOR_GPU)?.bytes, compiled)
        }
        None => {
            // SAFETY: PTX text, NUL-terminated, as the API asks.
            (unsafe { CStr::from_ptr(image.cast::<c_char>()) }.to_bytes().to_vec(), false)
        }
    };
    let text = std::str::from_utf8(&text).map_err(|_| ERROR_INVALID_PTX)?;
    let entries = crate::ptx::entries(text).ok_or(ERROR_INVALID_PTX)?;
    let id = w.id();
    let kibibytes = (text.len() as u64) >> 10;
    let costs = &w.clock.costs;
    w.clock.spend(if compiled { costs.module } else { kibibytes * costs.jit_kib });
    w.compiled_here += u64::from(!compiled);
    w.modules.insert(id, (here, entries));
    put(out, id)
}

/// The host function for an entry, from the added libraries, then from the process.
fn kernel(w: &World, name: &str) -> Option<HostKernel> {
    let symbol = format!("fst_sim_kernel_{name}\0");
    for library in &w.kernel_libraries {
        // SAFETY: symbols of this name have this signature by the contract in the crate's docs.
        if let Ok(f) = unsafe { library.get::<HostKernel>(symbol.as_bytes()) } {
            return Some(*f);
        }
    }
    // SAFETY: a NUL-terminated name; the symbol's signature as above.
    unsafe {
        let f = libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr().cast());
        (!f.is_null()).then(|| std::mem::transmute::<*mut c_void, HostKernel>(f))
    }
}

api! {
    fn cuModuleLoadData(module: *mut u64, image: *const c_void) |w| { load(w, module, image) }
    fn cuModuleLoadDataEx(
        module: *mut u64,
        image: *const c_void,
        _count: u32,
        _options: *mut c_void,
        _values: *mut *mut c_void,
    ) |w| {
        load(w, module, image)
    }
    fn cuModuleUnload(module: u64) |w| {
        w.here()?;
        w.modules.remove(&module).ok_or(ERROR_INVALID_HANDLE)?;
        w.functions.retain(|_, (m, _)| *m != module);
        Ok(())
    }
    fn cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) |w| {
        w.here()?;
        // SAFETY: a NUL-terminated name, as the API asks.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        let (_, entries) = w.modules.get(&module).ok_or(ERROR_INVALID_HANDLE)?;
        if !entries.contains_key(&name) {
            return Err(ERROR_NOT_FOUND);
        }
        if kernel(w, &name).is_none() {
            w.violation(format!("no host function fst_sim_kernel_{name} for the entry {name}"));
            return Err(ERROR_NOT_FOUND);
        }
        let id = w.id();
        w.functions.insert(id, (module, name));
        put(function, id)
    }
    fn cuFuncSetAttribute(_function: u64, _attribute: i32, _value: i32) |w| {
        w.here()?;
        Ok(())
    }
    fn cuFuncGetAttribute(value: *mut i32, _attribute: i32, _function: u64) |w| {
        w.here()?;
        put(value, 0)
    }
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut i32,
        _function: u64,
        _threads: i32,
        _shared: usize,
    ) |w| {
        w.here()?;
        put(blocks, 2)
    }
    fn cuLaunchKernel(
        function: u64,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        _shared: u32,
        stream: u64,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) |w| {
        let stream = w.stream(stream)?;
        let (module, name) = w.functions.get(&function).cloned().ok_or(ERROR_INVALID_HANDLE)?;
        let kernel = kernel(w, &name).ok_or(ERROR_NOT_FOUND)?;
        let sizes = &w.modules.get(&module).ok_or(ERROR_INVALID_HANDLE)?.1[&name];
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        if grid.contains(&0) || block.contains(&0) || grid_y > 65535 || grid_z > 65535 {
            return Err(ERROR_INVALID_VALUE);
        }
        if block.iter().map(|&n| u64::from(n)).product::<u64>() > 1024 {
            return Err(ERROR_INVALID_VALUE);
        }
        if !extra.is_null() || (params.is_null() && !sizes.is_empty()) {
            return Err(ERROR_INVALID_VALUE);
        }
        let params = sizes
            .iter()
            .enumerate()
            .map(|(i, &size)| {
                // SAFETY: the caller gives one pointer per parameter of the entry, each to at
                // least the size that the entry declares.
                unsafe {
                    std::slice::from_raw_parts((*params.add(i)).cast::<u8>(), size).to_vec()
                }
            })
            .collect();
        w.clock.spend(w.clock.costs.launch);
        w.enqueue(stream, Work::Launch { kernel, grid, block, params });
        Ok(())
    }
}
