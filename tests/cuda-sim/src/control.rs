//! What tests steer: reset, failures, settings, the report. Exported under `fst_sim_*`, since the
//! simulator's state lives in the shared library and not in the test's own copy of this crate.

#![allow(unreachable_pub, clippy::missing_safety_doc)]

use crate::clock::Span;
use crate::world::{Fault, with};
use std::ffi::{CStr, c_char};
use std::fmt::Write as _;

unsafe fn text(p: *const c_char) -> String {
    // SAFETY: callers pass NUL-terminated strings.
    unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
}

/// A fresh machine with this many devices of this many bytes.
#[unsafe(no_mangle)]
pub extern "C" fn fst_sim_reset(devices: u64, memory: u64) {
    crate::exports::set_stream_hook(None);
    with(|w| w.reset(devices, memory));
}

/// Makes the `nth` use from now on of `call` return `code`. Besides exported names, `run:copy` and
/// `run:launch` fail when the work runs, and stick to the context as the driver's errors do. With
/// `@DEVICE` behind the name only uses on that device count.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fst_sim_fail(call: *const c_char, nth: u64, code: i32) {
    // SAFETY: the caller's contract.
    let call = unsafe { text(call) };
    with(|w| {
        let used = w.used(&call);
        w.faults.push(Fault { call, nth: used + nth, code });
    });
}

/// Uses of `call` since the reset.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fst_sim_calls(call: *const c_char) -> u64 {
    // SAFETY: the caller's contract.
    let call = unsafe { text(call) };
    with(|w| w.used(&call))
}

/// Has `hook` asked, once the driver's own work on a stream is done, whether that of another library on
/// the stream is done too (0 if not): a library that is simulated as well, and gives its work to
/// streams of this one. No hook after a reset.
#[unsafe(no_mangle)]
pub extern "C" fn fst_sim_stream_hook(hook: crate::exports::StreamHook) {
    crate::exports::set_stream_hook(Some(hook));
}

/// Changes a setting; false if there is none of that name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fst_sim_set(name: *const c_char, value: i64) -> bool {
    // SAFETY: the caller's contract.
    let name = unsafe { text(name) };
    with(|w| w.set(&name, value))
}

/// Adds a library of host kernels; false if it does not open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fst_sim_add_kernels(path: *const c_char) -> bool {
    // SAFETY: the caller's contract.
    let path = unsafe { text(path) };
    // SAFETY: a library of kernels has no initialisers that matter.
    let Ok(library) = (unsafe { libloading::Library::new(path) }) else {
        return false;
    };
    with(|w| w.kernel_libraries.push(library));
    true
}

/// The report: lines of `name value`, `span CALL THREAD BEGAN ENDED` and `violation text`.
fn report() -> String {
    with(|w| {
        let mut out = String::new();
        let live = w.streams.values().filter(|s| !s.legacy && !s.destroyed).count();
        let contexts: u64 = w.devices.iter().map(|d| d.retained).sum();
        let _ = writeln!(out, "arrays {}", w.memory.count());
        let _ = writeln!(out, "device_bytes {}", w.devices.iter().map(|d| d.used).sum::<u64>());
        let _ = writeln!(out, "pinned_ranges {}", w.host.count());
        let _ = writeln!(out, "pinned_bytes {}", w.host.bytes());
        let _ = writeln!(out, "streams {live}");
        let _ = writeln!(out, "events {}", w.events.len());
        let _ = writeln!(out, "modules {}", w.modules.len());
        let _ = writeln!(out, "cufile_files {}", w.cufile_files.len());
        let _ = writeln!(out, "cufile_buffers {}", w.cufile_buffers.len());
        let _ = writeln!(out, "contexts {contexts}");
        let _ = writeln!(out, "pending {}", w.pending(None));
        let _ = writeln!(out, "copied_bytes {}", w.copied_bytes);
        let _ = writeln!(out, "compiled_here {}", w.compiled_here);
        if let Some(now) = w.clock.now() {
            let (first, last) = w.clock.copies.unwrap_or_default();
            let _ = writeln!(out, "clock_ns {now}");
            let _ = writeln!(out, "first_copy_ns {first}");
            let _ = writeln!(out, "last_copy_ns {last}");
            let _ = writeln!(out, "link_busy_ns {}", w.clock.link_busy);
        }
        for Span { call, thread, began, ended } in &w.clock.spans {
            let _ = writeln!(out, "span {call} {thread} {began} {ended}");
        }
        for violation in &w.violations {
            let _ = writeln!(out, "violation {violation}");
        }
        out
    })
}

/// Writes the report to the file that `FST_SIM_REPORT` names.
pub(crate) extern "C" fn report_at_exit() {
    if let Some(path) = std::env::var_os("FST_SIM_REPORT") {
        let _ = std::fs::write(path, report());
    }
}

/// Writes the report into `to`; returns its length, also when that is more than `len` (then nothing
/// is written).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fst_sim_report(to: *mut u8, len: usize) -> usize {
    let report = report();
    if report.len() <= len {
        // SAFETY: the caller gives `len` bytes at `to`.
        unsafe { std::ptr::copy_nonoverlapping(report.as_ptr(), to, report.len()) };
    }
    report.len()
}
