//! The clock: what calls, copies and kernels cost. Off unless asked for, so that tests stay fast.
//!
//! While it runs, a call returns only when its cost has passed, work queued on streams ends at a time of
//! its own, queries answer "not ready" until then and synchronising calls sleep. Costs are in simulated
//! nanoseconds; one of these takes [`Clock::scale`] real ones, so that a machine with few cores can stand
//! for one with many. Costs are estimates of the order that drivers show, to find what a load waits for:
//! they say nothing about a particular GPU.

use std::collections::HashMap;
use std::time::{Duration, Instant};

macro_rules! costs {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// What things cost, in nanoseconds unless it says otherwise.
        pub(crate) struct Costs {
            $($(#[$doc])* pub(crate) $name: u64,)*
        }

        impl Default for Costs {
            fn default() -> Self {
                Self { $($name: $value,)* }
            }
        }

        impl Costs {
            /// Changes the cost `cost_NAME`; false if there is none of that name.
            pub(crate) fn set(&mut self, name: &str, value: u64) -> bool {
                match name {
                    $(concat!("cost_", stringify!($name)) => self.$name = value,)*
                    _ => return false,
                }
                true
            }
        }
    };
}

costs! {
    /// Any call of the driver.
    call = 200,
    /// Making a device's primary context.
    context = 200_000_000,
    /// Registering or allocating pinned memory, beside its pages.
    pin = 20_000,
    /// Pinning a mebibyte.
    pin_mib = 60_000,
    /// Unpinning, likewise.
    unpin = 20_000,
    unpin_mib = 20_000,
    /// Allocating device memory, beside its pages.
    allocate = 50_000,
    /// Mapping a mebibyte of device memory.
    allocate_mib = 500,
    /// Freeing device memory.
    free = 50_000,
    /// Compiling a kibibyte of PTX: a tenth of a second for a cast, a quarter for the gathers.
    jit_kib = 4_000_000,
    /// Loading a module that need not be compiled.
    module = 300_000,
    /// Making a stream.
    stream = 20_000,
    /// Making an event.
    event = 500,
    /// Queueing a copy or a fill.
    copy = 2_000,
    /// Each further copy of a call for many.
    copy_more = 200,
    /// Queueing a launch.
    launch = 3_000,
    /// From the end of what work waits for to its beginning.
    start = 1_500,
    /// The least that a copy takes of its engine.
    transfer = 500,
    /// The least that a kernel takes.
    kernel = 5_000,
    /// Bytes a second between host and device, each way.
    link = 50_000_000_000,
    /// Bytes a second within a device.
    memory = 1_000_000_000_000,
}

/// What runs one piece of work at a time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Engine {
    ToDevice,
    ToHost,
    Within,
    Kernels,
}

/// A call that took long.
pub(crate) struct Span {
    pub(crate) call: &'static str,
    pub(crate) thread: String,
    pub(crate) began: u64,
    pub(crate) ended: u64,
}

/// Calls that cost so many nanoseconds are kept as spans.
const LONG: u64 = 10_000;

#[derive(Default)]
pub(crate) struct Clock {
    /// Real nanoseconds in a simulated one; without, the clock stands.
    scale: Option<f64>,
    began: Option<Instant>,
    pub(crate) costs: Costs,
    /// When each engine of a device is free.
    free: HashMap<(usize, Engine), u64>,
    /// What the call now running costs beside `call`.
    spent: u64,
    pub(crate) spans: Vec<Span>,
    /// When the first copy to a device began and the last one ends.
    pub(crate) copies: Option<(u64, u64)>,
    /// How long copies to devices take together.
    pub(crate) link_busy: u64,
}

impl Clock {
    /// Starts the clock, or stops it for a scale of 0.
    pub(crate) fn run(&mut self, scale: f64) {
        let scale = (scale > 0.0).then_some(scale);
        let began = scale.map(|_| Instant::now());
        *self = Self { scale, began, costs: std::mem::take(&mut self.costs), ..Self::default() };
    }

    /// Simulated nanoseconds since the clock was started; `None` while it stands.
    pub(crate) fn now(&self) -> Option<u64> {
        let (scale, began) = (self.scale?, self.began?);
        Some((began.elapsed().as_nanos() as f64 / scale) as u64)
    }

    /// The moment at which a simulated time is reached.
    pub(crate) fn moment(&self, time: u64) -> Option<Instant> {
        let (scale, began) = (self.scale?, self.began?);
        began.checked_add(Duration::from_nanos((time as f64 * scale) as u64))
    }

    /// Makes the call now running cost more.
    pub(crate) fn spend(&mut self, cost: u64) {
        self.spent += cost;
    }

    /// Makes the call now running cost `first`, and `more` for each further time.
    pub(crate) fn spend_each(&mut self, first: u64, more: u64) {
        self.spent += if self.spent == 0 { first } else { more };
    }

    /// Makes the call now running cost more, by the bytes that it pins or maps.
    pub(crate) fn spend_on(&mut self, cost: u64, per_mib: u64, bytes: usize) {
        self.spent += cost + (bytes as u64).div_ceil(1 << 20) * per_mib;
    }

    /// Ends a call that began at `began`: when it may return.
    pub(crate) fn end(&mut self, call: &'static str, began: Option<u64>) -> Option<Instant> {
        let cost = std::mem::take(&mut self.spent) + self.costs.call;
        let began = began?;
        let ended = began + cost;
        if cost >= LONG {
            self.spans.push(Span { call, thread: thread_name(), began, ended });
        }
        self.moment(ended)
    }

    /// Gives work to an engine that cannot begin before `ready`; when it ends.
    pub(crate) fn schedule(
        &mut self,
        device: usize,
        engine: Engine,
        bytes: u64,
        ready: u64,
    ) -> u64 {
        let Some(now) = self.now() else { return 0 };
        let (rate, least) = match engine {
            Engine::ToDevice | Engine::ToHost => (self.costs.link, self.costs.transfer),
            Engine::Within => (self.costs.memory, self.costs.transfer),
            Engine::Kernels => (self.costs.memory, self.costs.kernel),
        };
        let free = self.free.entry((device, engine)).or_default();
        // An engine that is busy has its next work prepared; one that stands still has to be started.
        let begins = (*free).max(ready.max(now) + self.costs.start);
        let bytes_take = (u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1))) as u64;
        let takes = bytes_take.max(least);
        *free = begins + takes;
        if engine == Engine::ToDevice {
            let (first, last) = self.copies.get_or_insert((begins, 0));
            (*first, *last) = ((*first).min(begins), (*last).max(begins + takes));
            self.link_busy += takes;
        }
        begins + takes
    }
}

/// The calling thread's name, whichever copy of the standard library gave it.
fn thread_name() -> String {
    let mut name = [0u8; 16];
    // SAFETY: the buffer has the 16 bytes that the call may write.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(name).replace(' ', "-")
}

/// Waits for a moment: asleep as long as sleeping is exact enough.
pub(crate) fn wait_until(moment: Instant) {
    const INEXACT: Duration = Duration::from_micros(80);
    let left = moment.saturating_duration_since(Instant::now());
    if left > INEXACT {
        std::thread::sleep(left - INEXACT);
    }
    while Instant::now() < moment {
        std::hint::spin_loop();
    }
}
