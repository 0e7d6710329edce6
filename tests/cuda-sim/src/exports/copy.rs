//! Copies and fills.

use super::api;
use crate::codes::*;
use crate::memory::HostKind;
use crate::queue::{Shape, Source, Work};
use crate::world::{Outcome, World};
use std::ffi::c_void;

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct Copy2d {
    src_x: usize,
    src_y: usize,
    src_type: u32,
    src_host: u64,
    src_device: u64,
    src_array: u64,
    src_pitch: usize,
    dst_x: usize,
    dst_y: usize,
    dst_type: u32,
    dst_host: u64,
    dst_device: u64,
    dst_array: u64,
    dst_pitch: usize,
    width: usize,
    height: usize,
}

/// `CUmemcpyAttributes`.
#[repr(C)]
pub struct BatchAttributes {
    source_order: u32,
    /// Kinds and numbers of locations: for managed memory only.
    _hints: [u32; 4],
    flags: u32,
}

/// Copies of up to so many bytes may be made by the driver itself, as from pageable memory they are.
const MOST_BY_DRIVER: usize = 64 << 10;

/// What an address must be for a call.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Host,
    Device,
    Any,
}

/// Whether an address is on a device (else host), checked against what the call asks for.
fn on_device(w: &World, side: Side, address: u64, len: usize) -> Result<bool, i32> {
    let device = w.memory.owner(address, len.max(1)).is_some();
    match side {
        Side::Device if !device => Err(ERROR_INVALID_VALUE),
        Side::Host if device => Err(ERROR_INVALID_VALUE),
        _ => Ok(device),
    }
}

/// Queues a copy; runs it at once where the call may not return before it has run.
fn copy(
    w: &mut World,
    (dst, dst_side): (u64, Side),
    (src, src_side): (u64, Side),
    shape: Shape,
    stream: u64,
    synchronous: bool,
) -> Outcome {
    let stream = w.stream(stream)?;
    if shape.width == 0 || shape.rows == 0 {
        return Ok(());
    }
    let mut must_finish = synchronous;
    let mut target = None;
    if !on_device(w, dst_side, dst, shape.dst_span())? {
        match w.host.kind(dst, shape.dst_span()) {
            HostKind::Pinned => {}
            // A copy to pageable memory returns only once it has completed.
            HostKind::Pageable => {
                must_finish = true;
                target = Some((dst, shape.dst_span()));
            }
            HostKind::Mixed => return Err(ERROR_INVALID_VALUE),
        }
    }
    if w.host.is_file(src) && shape.width <= MOST_BY_DRIVER {
        w.violation(format!(
            "{} bytes copied straight out of a file's mapping: a driver may read so few itself, and \
             meets a signal where the file was cut off",
            shape.width
        ));
    }
    let source = if on_device(w, src_side, src, shape.src_span())? {
        Source::Live(src)
    } else {
        match w.host.kind(src, shape.src_span()) {
            HostKind::Pinned => Source::Live(src),
            HostKind::Mixed => return Err(ERROR_INVALID_VALUE),
            HostKind::Pageable => {
                let mut bytes = vec![0; shape.src_span()];
                // SAFETY: the caller gives `src_span` readable bytes at `src`.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        src as *const u8,
                        bytes.as_mut_ptr(),
                        bytes.len(),
                    );
                }
                Source::Snapshot { bytes, address: src }
            }
        }
    };
    w.clock.spend_each(w.clock.costs.copy, w.clock.costs.copy_more);
    let position = w.enqueue(stream, Work::Copy { dst, src: source, shape });
    if must_finish {
        w.host.set_call_target(target);
        let result = w.drain(stream, position);
        w.host.set_call_target(None);
        return result;
    }
    Ok(())
}

fn set(w: &mut World, dst: u64, value: u8, len: usize, stream: u64) -> Result<(u64, u64), i32> {
    let stream = w.stream(stream)?;
    if len > 0 {
        on_device(w, Side::Device, dst, len)?;
    }
    w.clock.spend(w.clock.costs.copy);
    Ok((stream, w.enqueue(stream, Work::Set { dst, value, len })))
}

fn copy_2d(w: &mut World, c: *const Copy2d, stream: u64, synchronous: bool) -> Outcome {
    // SAFETY: the caller gives a valid description.
    let Some(c) = (unsafe { c.as_ref() }) else {
        return Err(ERROR_INVALID_VALUE);
    };
    let side = |kind: u32, host: u64, device: u64| match kind {
        1 => Ok((host, Side::Host)),
        2 => Ok((device, Side::Device)),
        4 => Ok((device, Side::Any)),
        _ => Err(ERROR_INVALID_VALUE),
    };
    let (src, src_side) = side(c.src_type, c.src_host, c.src_device)?;
    let (dst, dst_side) = side(c.dst_type, c.dst_host, c.dst_device)?;
    let pitch = |pitch: usize| if pitch == 0 { c.width } else { pitch };
    let (src_pitch, dst_pitch) = (pitch(c.src_pitch), pitch(c.dst_pitch));
    let most = i32::MAX as usize;
    if c.width + c.src_x > src_pitch || c.width + c.dst_x > dst_pitch {
        return Err(ERROR_INVALID_VALUE);
    }
    if src_pitch > most || dst_pitch > most {
        return Err(ERROR_INVALID_VALUE);
    }
    // Within a device only the pitches of cuMemAllocPitch are sure to do.
    let within = c.src_type == 2 && c.dst_type == 2 && c.height > 1;
    if within && (src_pitch % 512 != 0 || dst_pitch % 512 != 0) {
        return Err(ERROR_INVALID_VALUE);
    }
    let shape = Shape { width: c.width, rows: c.height, src_pitch, dst_pitch };
    let src = src + (c.src_y * src_pitch + c.src_x) as u64;
    let dst = dst + (c.dst_y * dst_pitch + c.dst_x) as u64;
    copy(w, (dst, dst_side), (src, src_side), shape, stream, synchronous)
}

/// The arrays of a batch: destinations, sources, sizes, and their length.
type Arrays = (*const u64, *const u64, *const usize, usize);

fn batch(
    w: &mut World,
    (dsts, srcs, sizes, count): Arrays,
    attributes: *const BatchAttributes,
    firsts: *const usize,
    attribute_count: usize,
    stream: u64,
) -> Outcome {
    if !w.batch_copies {
        return Err(ERROR_NOT_SUPPORTED);
    }
    // The legacy stream is refused, by either of its names, and every copy needs an attribute.
    if stream <= 1 || count == 0 || attribute_count == 0 || attribute_count > count {
        return Err(ERROR_INVALID_VALUE);
    }
    for i in 0..attribute_count {
        // SAFETY: the caller gives `attribute_count` entries in both arrays.
        let (attributes, first, before) = unsafe {
            let before = if i == 0 { 0 } else { *firsts.add(i - 1) };
            (&*attributes.add(i), *firsts.add(i), before)
        };
        let in_order = if i == 0 { first == 0 } else { first > before && first < count };
        if !in_order || !(1..=3).contains(&attributes.source_order) || attributes.flags > 1 {
            return Err(ERROR_INVALID_VALUE);
        }
    }
    for i in 0..count {
        // SAFETY: the caller gives `count` entries in each array.
        let (dst, src, len) = unsafe { (*dsts.add(i), *srcs.add(i), *sizes.add(i)) };
        if len == 0 {
            return Err(ERROR_INVALID_VALUE);
        }
        // Addresses are taken as the device's own.
        if !w.host_pointers && [dst, src].iter().any(|address| w.host.is_registered(*address)) {
            let here = w.here()?;
            w.devices[here].error = Some(ERROR_ILLEGAL_ADDRESS);
            return Ok(());
        }
        copy(w, (dst, Side::Any), (src, Side::Any), Shape::flat(len), stream, false)?;
    }
    Ok(())
}

api! {
    fn cuMemcpyHtoD_v2(dst: u64, src: *const c_void, len: usize) |w| {
        copy(w, (dst, Side::Device), (src as u64, Side::Host), Shape::flat(len), 0, true)
    }
    fn cuMemcpyDtoH_v2(dst: *mut c_void, src: u64, len: usize) |w| {
        copy(w, (dst as u64, Side::Host), (src, Side::Device), Shape::flat(len), 0, true)
    }
    fn cuMemcpyDtoD_v2(dst: u64, src: u64, len: usize) |w| {
        // Not synchronous with the host.
        copy(w, (dst, Side::Device), (src, Side::Device), Shape::flat(len), 0, false)
    }
    fn cuMemcpy(dst: u64, src: u64, len: usize) |w| {
        copy(w, (dst, Side::Any), (src, Side::Any), Shape::flat(len), 0, true)
    }
    fn cuMemcpyAsync(dst: u64, src: u64, len: usize, stream: u64) |w| {
        copy(w, (dst, Side::Any), (src, Side::Any), Shape::flat(len), stream, false)
    }
    fn cuMemcpyHtoDAsync_v2(dst: u64, src: *const c_void, len: usize, stream: u64) |w| {
        copy(w, (dst, Side::Device), (src as u64, Side::Host), Shape::flat(len), stream, false)
    }
    fn cuMemcpyDtoHAsync_v2(dst: *mut c_void, src: u64, len: usize, stream: u64) |w| {
        copy(w, (dst as u64, Side::Host), (src, Side::Device), Shape::flat(len), stream, false)
    }
    fn cuMemcpyDtoDAsync_v2(dst: u64, src: u64, len: usize, stream: u64) |w| {
        copy(w, (dst, Side::Device), (src, Side::Device), Shape::flat(len), stream, false)
    }
    fn cuMemcpyPeerAsync(dst: u64, to: u64, src: u64, from: u64, len: usize, stream: u64) |w| {
        for (address, context) in [(dst, to), (src, from)] {
            let owner = w.memory.owner(address, len.max(1)).ok_or(ERROR_INVALID_VALUE)?;
            if w.devices[owner].context != context {
                return Err(ERROR_INVALID_CONTEXT);
            }
        }
        copy(w, (dst, Side::Device), (src, Side::Device), Shape::flat(len), stream, false)
    }
    fn cuMemcpy2DAsync_v2(description: *const Copy2d, stream: u64) |w| {
        copy_2d(w, description, stream, false)
    }
    fn cuMemcpy2D_v2(description: *const Copy2d) |w| { copy_2d(w, description, 0, true) }
    fn cuMemcpyBatchAsync(
        dsts: *const u64,
        srcs: *const u64,
        sizes: *const usize,
        count: usize,
        attributes: *const BatchAttributes,
        firsts: *const usize,
        attribute_count: usize,
        failed: *mut usize,
        stream: u64,
    ) |w| {
        if !failed.is_null() {
            super::put(failed, usize::MAX)?;
        }
        batch(w, (dsts, srcs, sizes, count), attributes, firsts, attribute_count, stream)
    }
    fn cuMemcpyBatchAsync_v2(
        dsts: *const u64,
        srcs: *const u64,
        sizes: *const usize,
        count: usize,
        attributes: *const BatchAttributes,
        firsts: *const usize,
        attribute_count: usize,
        stream: u64,
    ) |w| {
        batch(w, (dsts, srcs, sizes, count), attributes, firsts, attribute_count, stream)
    }
    fn cuMemsetD8_v2(dst: u64, value: u8, len: usize) |w| {
        set(w, dst, value, len, 0).map(|_| ())
    }
    fn cuMemsetD8Async(dst: u64, value: u8, len: usize, stream: u64) |w| {
        set(w, dst, value, len, stream).map(|_| ())
    }
}
