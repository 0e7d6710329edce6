//! Takes the simulator (or the real driver) for a test, and makes bytes to move.

use cuda_sim::{Guard, Sim};

/// Memory of a simulated device, unless a test asks for another size.
pub(crate) const MEMORY: u64 = 256 << 20;

/// A test's machine.
pub(crate) struct Machine {
    sim: Option<Guard>,
}

/// Whether tests are to use the machine's own driver.
fn real() -> bool {
    std::env::var_os("FST_TEST_REAL_CUDA").is_some_and(|v| v == "1")
}

/// A machine for a test that can run on real hardware as well.
pub(crate) fn machine() -> Machine {
    if real() {
        return Machine { sim: None };
    }
    Machine { sim: Some(Sim::load().expect("the simulator").exclusive(1, MEMORY)) }
}

/// A simulated machine, for a test that needs one; `None` (said aloud) on real hardware.
pub(crate) fn simulated(devices: u64, memory: u64) -> Option<Guard> {
    if real() {
        println!("SKIPPED: needs the simulated driver");
        return None;
    }
    Some(Sim::load().expect("the simulator").exclusive(devices, memory))
}

impl Machine {
    /// The simulator, if this is one.
    pub(crate) fn sim(&self) -> Option<&Guard> {
        self.sim.as_ref()
    }
}

/// Bytes that differ with position and seed.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
