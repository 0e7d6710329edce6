//! Streams and events.

use super::{api, put};
use crate::codes::*;
use crate::queue::{Stream, Work};
use crate::world::{Event, Outcome, World, enter};
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

fn create(w: &mut World, out: *mut u64, flags: u32) -> Outcome {
    let here = w.here()?;
    let id = w.id();
    w.clock.spend(w.clock.costs.stream);
    w.streams.insert(id, Stream::new(here, false, flags & 1 == 0));
    put(out, id)
}

fn event(w: &mut World, handle: u64) -> Result<Event, i32> {
    if let Some(&event) = w.events.get(&handle) {
        return Ok(event);
    }
    w.violation(format!("event {handle:#x} does not exist"));
    Err(ERROR_INVALID_HANDLE)
}

api! {
    fn cuStreamCreate(stream: *mut u64, flags: u32) |w| { create(w, stream, flags) }
    fn cuStreamCreateWithPriority(stream: *mut u64, flags: u32, _priority: i32) |w| {
        create(w, stream, flags)
    }
    fn cuStreamDestroy_v2(stream: u64) |w| {
        // Returns at once; what is queued stays queued.
        let id = w.stream(stream)?;
        if let Some(s) = w.streams.get_mut(&id) {
            if s.legacy {
                return Err(ERROR_INVALID_HANDLE);
            }
            s.destroyed = true;
            if s.queued == s.done {
                w.streams.remove(&id);
            }
        }
        Ok(())
    }
    fn cuStreamWaitEvent(stream: u64, handle: u64, _flags: u32) |w| {
        let id = w.stream(stream)?;
        if let Some((stream, upto)) = event(w, handle)?.record {
            w.enqueue(id, Work::Wait { stream, upto });
        }
        Ok(())
    }
    fn cuEventCreate(out: *mut u64, _flags: u32) |w| {
        let device = w.here()?;
        let id = w.id();
        w.clock.spend(w.clock.costs.event);
        w.events.insert(id, Event { device, record: None, queries: 0 });
        put(out, id)
    }
    fn cuEventDestroy_v2(handle: u64) |w| {
        w.here()?;
        event(w, handle)?;
        w.events.remove(&handle);
        Ok(())
    }
    fn cuEventRecord(handle: u64, stream: u64) |w| {
        let id = w.stream(stream)?;
        let device = event(w, handle)?.device;
        if w.streams.get(&id).is_none_or(|s| s.device != device) {
            w.violation("event recorded on a stream of another device".into());
            return Err(ERROR_INVALID_HANDLE);
        }
        let position = w.enqueue(id, Work::Record);
        w.events.insert(handle, Event { device, record: Some((id, position)), queries: 0 });
        Ok(())
    }
    fn cuEventQuery(handle: u64) |w| {
        w.here()?;
        let Some((stream, upto)) = event(w, handle)?.record else { return Ok(()) };
        let patience = w.patience;
        if w.takes_longer(stream, upto) {
            return Err(ERROR_NOT_READY);
        }
        if w.streams.get(&stream).is_some_and(|s| s.done < upto)
            && let Some(e) = w.events.get_mut(&handle)
        {
            e.queries += 1;
            if e.queries <= patience {
                return Err(ERROR_NOT_READY);
            }
        }
        w.drain(stream, upto)
    }
    fn cuEventSynchronize(handle: u64) |w| {
        w.here()?;
        match event(w, handle)?.record {
            Some((stream, upto)) => w.drain(stream, upto),
            None => Ok(()),
        }
    }
    fn cuEventElapsedTime(milliseconds: *mut f32, start: u64, end: u64) |w| {
        event(w, start)?;
        event(w, end)?;
        put(milliseconds, 1.0)
    }
}

/// Whether another library's work on a stream is done; see [`crate::control::fst_sim_stream_hook`].
pub(crate) type StreamHook = extern "C" fn(*mut c_void) -> i32;

static HOOK: Mutex<Option<StreamHook>> = Mutex::new(None);

pub(crate) fn set_stream_hook(hook: Option<StreamHook>) {
    *HOOK.lock().unwrap_or_else(PoisonError::into_inner) = hook;
}

/// Asked outside of the world's lock.
fn others_done(stream: u64) -> bool {
    let hook = *HOOK.lock().unwrap_or_else(PoisonError::into_inner);
    hook.is_none_or(|hook| hook(stream as *mut c_void) != 0)
}

/// Waits for the stream, and for what other libraries have on it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: u64) -> i32 {
    let code = enter("cuStreamSynchronize", |w| {
        let id = w.stream(stream)?;
        let upto = w.streams.get(&id).map_or(0, |s| s.queued);
        w.drain(id, upto)
    });
    while code == SUCCESS && !others_done(stream) {
        std::thread::yield_now();
    }
    code
}

/// Whether the stream is done, and what other libraries have on it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: u64) -> i32 {
    let code = enter("cuStreamQuery", |w| {
        let id = w.stream(stream)?;
        let patience = w.patience;
        let upto = w.streams.get(&id).map_or(0, |s| s.queued);
        if w.takes_longer(id, upto) {
            return Err(ERROR_NOT_READY);
        }
        let Some(s) = w.streams.get_mut(&id) else { return Ok(()) };
        if s.done < upto {
            s.queries += 1;
            if s.queries <= patience {
                return Err(ERROR_NOT_READY);
            }
        }
        w.drain(id, upto)
    });
    if code == SUCCESS && !others_done(stream) { ERROR_NOT_READY } else { code }
}

/// The newer name of the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventElapsedTime_v2(milliseconds: *mut f32, a: u64, b: u64) -> i32 {
    // SAFETY: same contract.
    unsafe { cuEventElapsedTime(milliseconds, a, b) }
}
