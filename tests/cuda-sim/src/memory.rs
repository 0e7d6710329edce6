//! Simulated device memory (host memory at its own address, with poison) and pinned host ranges.

use crate::{FRESH, POISON};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, VecDeque};

/// Freed device memory is kept poisoned up to this many bytes, then really released.
const KEEP: usize = 64 << 20;

/// One allocation on a device.
struct Block {
    len: usize,
    device: usize,
}

/// The allocations of all devices, by address.
#[derive(Default)]
pub(crate) struct DeviceMemory {
    live: BTreeMap<u64, Block>,
    /// Freed and poisoned; a second free of one of these is a double free.
    freed: VecDeque<(u64, usize)>,
    kept: usize,
    /// Nobody writes or reads the bytes: they are left alone, and need no memory.
    pub(crate) untouched: bool,
}

/// Bytes in front of a small allocation: it is aligned to 256 bytes, as the programming guide promises,
/// and to no more. Large ones start on pages.
fn lead(len: usize) -> usize {
    if len < 1 << 20 { 256 } else { 0 }
}

fn layout(len: usize) -> Option<Layout> {
    Layout::from_size_align(len.max(1) + lead(len), 4096).ok()
}

fn release(address: u64, len: usize) {
    if let Some(layout) = layout(len) {
        // SAFETY: every address in `live` and `freed` lies so far behind what `alloc` gave with this
        // layout, and is in exactly one of the two.
        unsafe { dealloc((address as *mut u8).sub(lead(len)), layout) };
    }
}

impl DeviceMemory {
    /// `None` when the host itself has no memory.
    pub(crate) fn allocate(&mut self, device: usize, len: usize) -> Option<u64> {
        let layout = layout(len)?;
        // SAFETY: the layout's size is at least 1; the bytes are written within it.
        let address = unsafe {
            let p = alloc(layout);
            if p.is_null() {
                return None;
            }
            let p = p.add(lead(len));
            if !self.untouched {
                p.write_bytes(FRESH, len.max(1));
            }
            p as u64
        };
        self.live.insert(address, Block { len, device });
        Some(address)
    }

    /// Poisons and forgets; the freed length and device, or whether it is a double free.
    pub(crate) fn free(&mut self, address: u64) -> Result<(usize, usize), bool> {
        let Some(block) = self.live.remove(&address) else {
            return Err(self.freed.iter().any(|&(a, _)| a == address));
        };
        if self.untouched {
            release(address, block.len);
            return Ok((block.len, block.device));
        }
        // SAFETY: the block was live: `len` bytes at `address` are ours.
        unsafe { (address as *mut u8).write_bytes(POISON, block.len) };
        self.freed.push_back((address, block.len));
        self.kept += block.len;
        while self.kept > KEEP {
            let Some((old, len)) = self.freed.pop_front() else {
                break;
            };
            self.kept -= len;
            release(old, len);
        }
        Ok((block.len, block.device))
    }

    /// Device that owns `address..address + len`, all of it within one live allocation.
    pub(crate) fn owner(&self, address: u64, len: usize) -> Option<usize> {
        let (&base, block) = self.live.range(..=address).next_back()?;
        let end = address.checked_add(len as u64)?;
        (address < base + block.len.max(1) as u64 && end <= base + block.len as u64)
            .then_some(block.device)
    }

    /// Length of the live allocation that starts at `address`.
    pub(crate) fn len_at(&self, address: u64) -> Option<usize> {
        self.live.get(&address).map(|b| b.len)
    }

    /// Poisons and forgets all of a device.
    pub(crate) fn forget(&mut self, device: usize) {
        let all: Vec<u64> =
            self.live.iter().filter(|(_, b)| b.device == device).map(|(&a, _)| a).collect();
        for address in all {
            let _ = self.free(address);
        }
    }

    pub(crate) fn live(&self, device: usize) -> usize {
        self.live.values().filter(|b| b.device == device).count()
    }

    pub(crate) fn count(&self) -> usize {
        self.live.len()
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        for (address, block) in std::mem::take(&mut self.live) {
            release(address, block.len);
        }
        for (address, len) in std::mem::take(&mut self.freed) {
            release(address, len);
        }
    }
}

/// A pinned range of host memory.
struct Pinned {
    len: usize,
    device: usize,
    /// Allocated by the driver rather than registered by the caller.
    allocated: bool,
    /// A mapping of a file.
    file: bool,
}

/// The pinned ranges of the process.
#[derive(Default)]
pub(crate) struct HostMemory {
    ranges: BTreeMap<u64, Pinned>,
    /// A pageable range that a call now running writes before it returns.
    target: Option<(u64, usize)>,
}

/// How a host range lies to the pinned ones.
#[derive(PartialEq, Eq, Clone, Copy, Debug)]
pub(crate) enum HostKind {
    /// Wholly within one pinned range.
    Pinned,
    /// Touches none.
    Pageable,
    /// Partly pinned, which the driver refuses.
    Mixed,
}

impl HostMemory {
    pub(crate) fn allocate(&mut self, device: usize, len: usize) -> Option<u64> {
        let layout = Layout::from_size_align(len.max(1), 4096).ok()?;
        // SAFETY: size is at least 1; the fill stays within it.
        let address = unsafe {
            let p = alloc(layout);
            if p.is_null() {
                return None;
            }
            p.write_bytes(FRESH, len.max(1));
            p as u64
        };
        self.ranges.insert(address, Pinned { len, device, allocated: true, file: false });
        Some(address)
    }

    /// False when the range overlaps a pinned one.
    pub(crate) fn register(&mut self, device: usize, address: u64, len: usize, file: bool) -> bool {
        if self.kind(address, len) != HostKind::Pageable {
            return false;
        }
        self.ranges.insert(address, Pinned { len, device, allocated: false, file });
        true
    }

    /// The pinned range that holds an address.
    fn around(&self, address: u64) -> Option<&Pinned> {
        let (&base, range) = self.ranges.range(..=address).next_back()?;
        (address < base + range.len as u64).then_some(range)
    }

    /// Whether an address lies in a mapping of a file that is registered.
    pub(crate) fn is_file(&self, address: u64) -> bool {
        self.around(address).is_some_and(|range| range.file)
    }

    /// Whether an address lies in memory that was registered, rather than allocated by the driver.
    pub(crate) fn is_registered(&self, address: u64) -> bool {
        self.around(address).is_some_and(|range| !range.allocated)
    }

    /// Ends a pinned range that starts at `address`; its length, or `None` if there is none of
    /// that origin.
    pub(crate) fn remove(&mut self, address: u64, allocated: bool) -> Option<usize> {
        if self.ranges.get(&address)?.allocated != allocated {
            return None;
        }
        let range = self.ranges.remove(&address)?;
        if allocated && let Ok(layout) = Layout::from_size_align(range.len.max(1), 4096) {
            // SAFETY: allocated by `allocate` with this layout and removed just now.
            unsafe {
                (address as *mut u8).write_bytes(POISON, range.len);
                dealloc(address as *mut u8, layout);
            }
        }
        Some(range.len)
    }

    pub(crate) fn len_at(&self, address: u64) -> Option<usize> {
        self.ranges.get(&address).map(|r| r.len)
    }

    pub(crate) fn kind(&self, address: u64, len: usize) -> HostKind {
        let end = address.saturating_add(len as u64);
        let touching = self.ranges.range(..end).next_back();
        match touching {
            Some((&base, range)) if base + range.len as u64 > address => {
                if base <= address && end <= base + range.len as u64 {
                    HostKind::Pinned
                } else {
                    HostKind::Mixed
                }
            }
            _ => HostKind::Pageable,
        }
    }

    /// Names the pageable range that the call now running may write, or none.
    pub(crate) fn set_call_target(&mut self, target: Option<(u64, usize)>) {
        self.target = target;
    }

    pub(crate) fn call_target(&self) -> Option<(u64, usize)> {
        self.target
    }

    pub(crate) fn is_call_target(&self, address: u64, len: usize) -> bool {
        self.target.is_some_and(|(a, n)| a <= address && address + len as u64 <= a + n as u64)
    }

    /// Ends all pinning of a device. Memory that the driver allocated is not given back: its
    /// owner may not know yet.
    pub(crate) fn forget(&mut self, device: usize) {
        self.ranges.retain(|_, r| r.device != device);
    }

    pub(crate) fn live(&self, device: usize) -> usize {
        self.ranges.values().filter(|r| r.device == device).count()
    }

    pub(crate) fn count(&self) -> usize {
        self.ranges.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.ranges.values().map(|r| r.len).sum()
    }
}
