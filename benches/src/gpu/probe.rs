//! What decides how a load to a device should go, asked of the machine before anything is measured: seconds
//! each, so that they are known even if all else is cut off.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use cudarc::driver::{result, sys};
use fst::Device;
use fst::gpu::cast::CastType;
use fst::gpu::kernel::Kernel;
use fst::gpu::{CudaDevice, HostAccess, PinnedRing, RegisteredHost, RingOptions};
use fst::io::HostBuffer;
use memmap2::Mmap;

use super::measure::pinned_rate;

/// Bytes that are registered at once.
const REGISTERED: usize = 16 << 20;

/// Attributes that ways depend on, by the numbers of `CUdevice_attribute`.
const ATTRIBUTES: [(&str, sys::CUdevice_attribute); 6] = {
    use sys::CUdevice_attribute as A;
    [
        (
            "91, host pointers for registered memory",
            A::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM,
        ),
        ("113, read-only registration", A::CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED),
        ("18, integrated", A::CU_DEVICE_ATTRIBUTE_INTEGRATED),
        ("88, pageable memory access", A::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS),
        (
            "100, by the host's page tables",
            A::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES,
        ),
        ("40, copy engines", A::CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT),
    ]
};

/// Prints what there is, a line for each question as soon as it is answered; `folder` is on the file system
/// whose mappings are registered.
///
/// # Errors
/// No device, or a file that cannot be written. What the driver refuses is an answer.
pub fn run(folder: &Path) -> Result<()> {
    let modules = if Path::new("/proc/modules").exists() { "there" } else { "missing" };
    println!("/proc/modules: {modules}");
    let began = Instant::now();
    let device = Device::cuda(0)?;
    println!("context: {:.1} ms", ms(began));
    let device = device.as_cuda().context("not a CUDA device")?.clone();
    {
        let _current = device.make_current()?;
        let handle = result::device::get(device.ordinal() as i32)?;
        for (name, attribute) in ATTRIBUTES {
            // SAFETY: the driver is initialised, and the device is open.
            let value = unsafe { result::device::get_attribute(handle, attribute) };
            println!("attribute {name}: {value:?}");
        }
    }
    kernels(&device);
    anonymous(&device)?;
    mapping(&device, folder)?;
    let began = Instant::now();
    let ring = PinnedRing::new(&device, RingOptions::default())?;
    while ring.try_acquire()?.is_none() {
        std::thread::yield_now();
    }
    let first = ms(began);
    ring.wait_until_pinned();
    println!(
        "a ring of {} MiB: first block {first:.2} ms, all {:.2} ms",
        ring.pinned_bytes() >> 20,
        ms(began)
    );
    println!("pinned copies: {:.1} GB/s", pinned_rate(&device, 256 << 20)? / 1e9);
    Ok(())
}

fn ms(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

/// Loading a module; from PTX where `CUDA_FORCE_PTX_JIT` is set.
fn kernels(device: &CudaDevice) {
    let forced = std::env::var_os("CUDA_FORCE_PTX_JIT").is_some();
    let from = if forced { "from PTX" } else { "as shipped" };
    let cast = Kernel::Cast { from: CastType::BF16, to: CastType::F32 };
    for (name, kernel) in [("gather", Kernel::GatherBatch), ("cast BF16 to F32", cast)] {
        let began = Instant::now();
        let loaded = device.prepare(kernel);
        println!("kernel {name}, {from}: {:.2} ms{}", ms(began), said(&loaded));
    }
}

fn said<T>(result: &fst::gpu::Result<T>) -> String {
    result.as_ref().err().map_or_else(String::new, |error| format!(", {error}"))
}

/// Fresh memory on huge pages, faulted in before.
fn anonymous(device: &CudaDevice) -> Result<()> {
    for _ in 0..3 {
        let buffer = HostBuffer::new(REGISTERED)?;
        let start = buffer.as_ptr();
        buffer.populate(0, REGISTERED);
        register(device, "huge pages", start, HostAccess::ReadWrite, Arc::new(buffer));
    }
    Ok(())
}

/// A file's pages, out of the page cache.
fn mapping(device: &CudaDevice, folder: &Path) -> Result<()> {
    let path = folder.join("probe");
    let mut file = File::create(&path)?;
    file.write_all(&vec![1; REGISTERED])?;
    for _ in 0..3 {
        // SAFETY: a file of this process's own, that nobody changes.
        let map = unsafe { Mmap::map(&File::open(&path)?)? };
        let start = NonNull::from(&map[0]);
        register(device, "a file's mapping", start, HostAccess::ReadOnly, Arc::new(map));
    }
    std::fs::remove_file(&path)?;
    Ok(())
}

fn register(
    device: &CudaDevice,
    what: &str,
    start: NonNull<u8>,
    access: HostAccess,
    owner: Arc<dyn std::any::Any + Send + Sync>,
) {
    let began = Instant::now();
    // SAFETY: the owner keeps these bytes mapped.
    let registered = unsafe { RegisteredHost::new(device, start, REGISTERED, access, owner) };
    let (took, text) = (ms(began), said(&registered));
    let began = Instant::now();
    drop(registered);
    println!(
        "16 MiB of {what}: registered in {took:.2} ms, given back in {:.2} ms{text}",
        ms(began)
    );
}
