//! The simulated machine: devices, contexts, streams, events, memory, faults and what went wrong.

use crate::clock::{Clock, wait_until};
use crate::codes::*;
use crate::memory::{DeviceMemory, HostMemory};
use crate::queue::Stream;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a driver call comes to: a `CUresult` that is not success as the error.
pub(crate) type Outcome = Result<(), i32>;

/// One device and its primary context.
#[derive(Default)]
pub(crate) struct Device {
    /// Retains of the primary context that were not released.
    pub(crate) retained: u64,
    /// The context's handle while it lives, else 0.
    pub(crate) context: u64,
    /// Id of the context's legacy default stream.
    pub(crate) legacy: u64,
    /// A sticky error: every later call in the context returns it.
    pub(crate) error: Option<i32>,
    /// Bytes allocated.
    pub(crate) used: u64,
}

/// The state recorded by the last `cuEventRecord` of an event.
#[derive(Clone, Copy, Default)]
pub(crate) struct Event {
    pub(crate) device: usize,
    /// Stream and position in it; `None` before the first record.
    pub(crate) record: Option<(u64, u64)>,
    /// Queries answered with "not ready" since the record.
    pub(crate) queries: u32,
}

/// Work of a stream, up to a position, that is not over yet.
pub(crate) struct Due {
    pub(crate) stream: u64,
    pub(crate) upto: u64,
    /// The pageable memory that the call writes.
    pub(crate) target: Option<(u64, usize)>,
}

/// A failure to inject: the `nth` use (from 1) of `call` returns `code`.
pub(crate) struct Fault {
    pub(crate) call: String,
    pub(crate) nth: u64,
    pub(crate) code: i32,
}

/// Everything.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) ready: bool,
    pub(crate) initialised: bool,
    pub(crate) devices: Vec<Device>,
    pub(crate) memory_limit: u64,
    /// What allocations of a mebibyte and more take is a multiple of this many bytes.
    pub(crate) allocation_unit: u64,
    pub(crate) driver_version: i32,
    pub(crate) read_only_register: bool,
    pub(crate) batch_copies: bool,
    /// The device knows registered memory by the host's addresses.
    pub(crate) host_pointers: bool,
    /// The device has no memory but the host's; it has some, and reads the host's too.
    pub(crate) integrated: bool,
    pub(crate) coherent: bool,
    /// Compute capability, such as 80 for 8.0.
    pub(crate) capability: u32,
    /// Modules that had to be compiled from PTX.
    pub(crate) compiled_here: u64,
    /// "Not ready" answers before a query lets the work run.
    pub(crate) patience: u32,
    pub(crate) streams: BTreeMap<u64, Stream>,
    pub(crate) events: HashMap<u64, Event>,
    pub(crate) memory: DeviceMemory,
    pub(crate) host: HostMemory,
    /// Module handle -> device, entries with the sizes of their parameters.
    pub(crate) modules: HashMap<u64, (usize, HashMap<String, Vec<usize>>)>,
    /// Function handle -> module, entry name.
    pub(crate) functions: HashMap<u64, (u64, String)>,
    /// cuFile's driver is open.
    pub(crate) cufile_open: bool,
    /// cuFile's handles and their descriptors.
    pub(crate) cufile_files: HashMap<u64, i32>,
    /// Device memory registered with cuFile: address -> length.
    pub(crate) cufile_buffers: HashMap<u64, usize>,
    /// The most that one cuFileRead moves, for short reads.
    pub(crate) cufile_most: usize,
    /// Status flags of cuFile's driver.
    pub(crate) cufile_flags: u32,
    /// How NVMe drives and devices reach each other, as `CUfileP2PFlags_t`.
    pub(crate) cufile_p2p: u32,
    /// Peers that contexts may access: device, peer.
    pub(crate) peers: HashSet<(usize, usize)>,
    pub(crate) kernel_libraries: Vec<libloading::Library>,
    pub(crate) faults: Vec<Fault>,
    pub(crate) calls: HashMap<&'static str, u64>,
    /// The same by device: that of the current context, or that which runs the work.
    pub(crate) device_calls: HashMap<(&'static str, usize), u64>,
    pub(crate) violations: Vec<String>,
    pub(crate) copied_bytes: u64,
    /// Work takes its time and moves nothing; device memory has no bytes of its own.
    pub(crate) discard: bool,
    pub(crate) clock: Clock,
    /// What the call now running has to wait for before it returns.
    pub(crate) due: Vec<Due>,
    next_id: u64,
}

thread_local! {
    /// The calling thread's stack of contexts.
    static CONTEXTS: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

static WORLD: Mutex<Option<Box<World>>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Box<World>>> {
    WORLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `f` on the world, which is made from the environment at first.
pub(crate) fn with<T>(f: impl FnOnce(&mut World) -> T) -> T {
    let mut guard = lock();
    let world = guard.get_or_insert_with(Box::default);
    if !world.ready {
        if std::env::var_os("FST_SIM_REPORT").is_some() {
            // SAFETY: registers a function without arguments.
            unsafe { libc::atexit(crate::control::report_at_exit) };
        }
        world.reset(env_number("FST_SIM_DEVICES", 1), env_number("FST_SIM_MEMORY", 1 << 30));
    }
    f(world)
}

/// One driver call: counts it, injects a failure where asked, runs it.
pub(crate) fn enter(call: &'static str, f: impl FnOnce(&mut World) -> Outcome) -> i32 {
    let (mut outcome, due, until) = with(|world| {
        let began = world.clock.now();
        let context = world.current();
        let device = world.devices.iter().position(|d| Some(d.context) == context);
        let outcome = match world.injected(call, device) {
            Some(code) => Err(code),
            None => f(world),
        };
        let due = std::mem::take(&mut world.due);
        let ends =
            due.iter().filter_map(|due| world.clock.moment(world.ends(due.stream, due.upto)));
        let ends = ends.max();
        (outcome, due, world.clock.end(call, began).max(ends))
    });
    // Others go on meanwhile.
    if let Some(until) = until {
        wait_until(until);
    }
    if !due.is_empty() {
        with(|world| {
            for Due { stream, upto, target } in due {
                world.host.set_call_target(target);
                outcome = outcome.and(world.run_to(stream, upto));
                world.host.set_call_target(None);
            }
        });
    }
    outcome.map_or_else(|code| code, |()| SUCCESS)
}

fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

impl World {
    /// What an allocation takes of a device's memory.
    pub(crate) fn taken(&self, len: usize) -> u64 {
        let unit = if len < 1 << 20 { 1 } else { self.allocation_unit };
        (len as u64).next_multiple_of(unit)
    }

    /// Back to a fresh machine. Memory of the old one is released.
    pub(crate) fn reset(&mut self, devices: u64, memory: u64) {
        let libraries = std::mem::take(&mut self.kernel_libraries);
        let next_id = self.next_id.max(0x1000);
        *self = World {
            ready: true,
            // A process initialises the driver once.
            initialised: self.initialised,
            memory_limit: memory,
            allocation_unit: 1,
            driver_version: 13000,
            read_only_register: true,
            batch_copies: true,
            host_pointers: true,
            capability: 80,
            patience: 2,
            cufile_open: self.cufile_open,
            cufile_most: usize::MAX,
            devices: (0..devices).map(|_| Device::default()).collect(),
            kernel_libraries: libraries,
            next_id,
            ..World::default()
        };
        if self.kernel_libraries.is_empty()
            && let Some(path) = std::env::var_os("FST_SIM_KERNELS")
        {
            // SAFETY: a library of kernels has no initialisers that matter.
            match unsafe { libloading::Library::new(path) } {
                Ok(library) => self.kernel_libraries.push(library),
                Err(e) => self.violation(format!("FST_SIM_KERNELS: {e}")),
            }
        }
        for item in std::env::var("FST_SIM_SET").unwrap_or_default().split(',') {
            if let Some((name, Ok(value))) = item.split_once(':').map(|(n, v)| (n, v.parse()))
                && !self.set(name, value)
            {
                self.violation(format!("FST_SIM_SET: there is no setting {name}"));
            }
        }
        for item in std::env::var("FST_SIM_FAIL").unwrap_or_default().split(',') {
            let mut parts = item.split(':');
            if let (Some(call), Some(Ok(nth)), Some(Ok(code))) =
                (parts.next(), parts.next().map(str::parse), parts.next().map(str::parse))
            {
                self.faults.push(Fault { call: call.to_owned(), nth, code });
            }
        }
    }

    /// Changes a setting; false if there is none of that name.
    pub(crate) fn set(&mut self, name: &str, value: i64) -> bool {
        match name {
            "driver_version" => self.driver_version = value as i32,
            "read_only_register" => self.read_only_register = value != 0,
            "allocation_unit" => self.allocation_unit = value as u64,
            "host_pointers" => self.host_pointers = value != 0,
            "batch_copies" => self.batch_copies = value != 0,
            "cufile_most" => self.cufile_most = value as usize,
            "cufile_flags" => self.cufile_flags = value as u32,
            "cufile_p2p" => self.cufile_p2p = value as u32,
            "integrated" => self.integrated = value != 0,
            "coherent" => self.coherent = value != 0,
            "capability" => self.capability = value as u32,
            "patience" => self.patience = value as u32,
            "discard" => (self.discard, self.memory.untouched) = (value != 0, value != 0),
            "clock_percent" => self.clock.run(value as f64 / 100.0),
            _ => return self.clock.costs.set(name, value as u64),
        }
        true
    }

    /// Counts a use of `call`, on a device where one is concerned; the code to fail with if this use
    /// is to fail.
    pub(crate) fn injected(&mut self, call: &'static str, device: Option<usize>) -> Option<i32> {
        let count = self.calls.entry(call).or_default();
        *count += 1;
        let count = *count;
        let mut hits = self.faults.iter().filter(|f| f.call == call && f.nth == count);
        let hit = hits.next().map(|f| f.code);
        let Some(device) = device else { return hit };
        let here = self.device_calls.entry((call, device)).or_default();
        *here += 1;
        let (name, here) = (format!("{call}@{device}"), *here);
        let mut hits = self.faults.iter().filter(|f| f.call == name && f.nth == here);
        hit.or(hits.next().map(|f| f.code))
    }

    /// Uses so far of a call, or of one on a device (`NAME@DEVICE`).
    pub(crate) fn used(&self, call: &str) -> u64 {
        if let Some((call, device)) = call.split_once('@') {
            let device: Option<usize> = device.parse().ok();
            let hit = self.device_calls.iter().find(|((c, d), _)| *c == call && Some(*d) == device);
            return hit.map_or(0, |(_, n)| *n);
        }
        self.calls.iter().find(|(name, _)| **name == call).map_or(0, |(_, n)| *n)
    }

    pub(crate) fn violation(&mut self, text: String) {
        self.violations.push(text);
    }

    pub(crate) fn id(&mut self) -> u64 {
        self.next_id += 0x10;
        self.next_id
    }

    /// The device with this number.
    pub(crate) fn device(&mut self, device: i32) -> Result<&mut Device, i32> {
        if !self.initialised {
            return Err(ERROR_NOT_INITIALIZED);
        }
        usize::try_from(device)
            .ok()
            .and_then(|d| self.devices.get_mut(d))
            .ok_or(ERROR_INVALID_DEVICE)
    }

    pub(crate) fn retain(&mut self, device: i32) -> Result<u64, i32> {
        let (context, legacy) = (self.id(), self.id());
        let index = device as usize;
        let device = self.device(device)?;
        device.retained += 1;
        if device.context == 0 {
            device.context = context;
            device.legacy = legacy;
            device.error = None;
            self.clock.spend(self.clock.costs.context);
            self.streams.insert(legacy, Stream::new(index, true, true));
        }
        Ok(self.devices[index].context)
    }

    pub(crate) fn release(&mut self, device: i32) -> Outcome {
        let index = device as usize;
        let state = self.device(device)?;
        if state.retained == 0 {
            self.violation(format!("primary context of device {index} released too often"));
            return Err(ERROR_INVALID_CONTEXT);
        }
        state.retained -= 1;
        if state.retained > 0 {
            return Ok(());
        }
        state.context = 0;
        let legacy = state.legacy;
        let died = state.error.take().is_some();
        self.peers.retain(|&(device, peer)| device != index && peer != index);
        if died {
            // What a dead context held goes with it, as the driver has it.
            self.devices[index].used = 0;
            self.memory.forget(index);
            self.host.forget(index);
            self.modules.retain(|_, (device, _)| *device != index);
            self.streams.retain(|_, s| s.device != index);
            self.events.retain(|_, e| e.device != index);
            return Ok(());
        }
        let pending = self.pending(Some(index));
        if pending > 0 {
            self.violation(format!("context {index} destroyed with {pending} operations pending"));
        }
        if let Some(stream) = self.streams.remove(&legacy) {
            drop(stream);
        }
        let streams = self.streams.values().filter(|s| s.device == index && !s.destroyed).count();
        let events = self.events.values().filter(|e| e.device == index).count();
        let (arrays, host) = (self.memory.live(index), self.host.live(index));
        if streams + events + arrays + host > 0 {
            self.violation(format!(
                "context {index} destroyed with {arrays} device allocations, {host} pinned ranges, \
                 {streams} streams, {events} events alive"
            ));
        }
        self.streams.retain(|_, s| s.device != index);
        self.events.retain(|_, e| e.device != index);
        Ok(())
    }

    /// The context current to the calling thread.
    pub(crate) fn current(&self) -> Option<u64> {
        CONTEXTS.with_borrow(|stack| stack.last().copied()).filter(|&c| c != 0)
    }

    pub(crate) fn push(&self, context: u64) -> Outcome {
        if context == 0 || !self.devices.iter().any(|device| device.context == context) {
            return Err(ERROR_INVALID_CONTEXT);
        }
        CONTEXTS.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    }

    pub(crate) fn pop(&self) -> Result<u64, i32> {
        CONTEXTS.with_borrow_mut(Vec::pop).ok_or(ERROR_INVALID_CONTEXT)
    }

    pub(crate) fn set_current(&self, context: u64) {
        CONTEXTS.with_borrow_mut(|stack| {
            stack.pop();
            stack.push(context);
        });
    }

    /// Number of the device whose context is current and healthy.
    pub(crate) fn here(&self) -> Result<usize, i32> {
        if !self.initialised {
            return Err(ERROR_NOT_INITIALIZED);
        }
        let context = self.current().ok_or(ERROR_INVALID_CONTEXT)?;
        let index =
            self.devices.iter().position(|d| d.context == context).ok_or(ERROR_INVALID_CONTEXT)?;
        self.devices[index].error.map_or(Ok(index), Err)
    }

    /// Operations queued and not run, of one device or of all.
    pub(crate) fn pending(&self, device: Option<usize>) -> usize {
        self.streams
            .values()
            .filter(|s| device.is_none_or(|d| s.device == d))
            .map(|s| s.work_pending())
            .sum()
    }
}
