//! `fst doctor`: what this machine offers to a load, and which way a load of a path would take.

use fst::gpu::cufile::GdsMode;
use fst::io::mount::{FileSystem, Place};
use fst::{CudaReport, DirectIo, Doctor, HugePages, Measurement, PathReport};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::failure::Failure;
use crate::hub;
use crate::text::{self, Align, GOOD, HEADING, MISSING, Table, counted, styled, visible};

/// How much of a checkpoint is read to measure an engine.
const MEASURED_BYTES: u64 = 1_000_000_000;

/// Where to get NCCL.
const GET_NCCL: &str = "ranks on GPUs need it: NVIDIA's package libnccl2, or PyPI's \
                        nvidia-nccl-cu12 with its nvidia/nccl/lib in LD_LIBRARY_PATH";

#[derive(Serialize)]
struct Report<'d> {
    kernel: &'d str,
    cores: usize,
    memory: Option<Memory>,
    for_a_load: Option<ForALoad>,
    huge_pages: &'static str,
    io_uring: Offer<'d>,
    auto: Auto<'d>,
    cuda: CudaJson<'d>,
    gds: GdsJson<'d>,
    nccl: LibraryJson<'d>,
    path: Option<PathJson<'d>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Vec<MeasuredJson>>,
}

#[derive(Serialize)]
struct CudaJson<'d> {
    devices: Vec<DeviceJson<'d>>,
    reason: Option<String>,
}

#[derive(Serialize)]
struct DeviceJson<'d> {
    device: String,
    name: &'d str,
    memory: Option<Memory>,
    driver: Option<&'d str>,
}

#[derive(Serialize)]
struct GdsJson<'d> {
    mode: &'static str,
    nvidia_fs: bool,
    library: Option<&'d str>,
    reason: Option<String>,
}

#[derive(Serialize)]
struct LibraryJson<'d> {
    library: Option<&'d str>,
    reason: Option<String>,
}

#[derive(Serialize)]
struct MeasuredJson {
    engine: &'static str,
    device: String,
    gb_per_s: Option<f64>,
    resident: f64,
    error: Option<String>,
}

#[derive(Serialize)]
struct Memory {
    total: u64,
    available: u64,
}

/// Memory that a load can fill, and what leaves no more.
#[derive(Serialize)]
struct ForALoad {
    available: u64,
    limit: String,
}

/// Something that is there, or why it is not.
#[derive(Serialize)]
struct Offer<'d> {
    available: bool,
    reason: Option<&'d str>,
}

#[derive(Serialize)]
struct Auto<'d> {
    engine: &'static str,
    reason: &'d str,
}

#[derive(Serialize)]
struct FileSystemJson<'d> {
    kind: &'d str,
    /// `local`, `network`, `memory` or `program` (FUSE).
    place: &'static str,
    compressed: bool,
}

#[derive(Serialize)]
struct PathJson<'d> {
    path: String,
    files: usize,
    bytes: u64,
    resident_bytes: Option<u64>,
    file_system: Option<FileSystemJson<'d>>,
    direct_io: String,
    verdict: &'d str,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let path = args.path.as_deref().map(hub::resolve).transpose()?;
    let doctor = Doctor::examine(path.as_deref()).map_err(Failure::of)?;
    let measured = args.measure.as_deref().map(hub::resolve).transpose()?;
    let measured = measured.map(|path| Doctor::measure(&path, MEASURED_BYTES));
    let measured = measured.transpose().map_err(Failure::of)?;
    if args.json {
        let report = Report::of(&doctor, measured.as_deref());
        return text::print_json(&report).map_err(Failure::output);
    }
    let mut out = render(&doctor);
    if let Some(measured) = &measured {
        out += &render_measured(measured);
    }
    text::print(&out).map_err(Failure::output)
}

impl<'d> Report<'d> {
    fn of(doctor: &'d Doctor, measured: Option<&[Measurement]>) -> Self {
        Self {
            kernel: &doctor.kernel,
            cores: doctor.cores,
            memory: doctor.memory.map(|(total, available)| Memory { total, available }),
            for_a_load: doctor.available.as_ref().map(|available| ForALoad {
                available: available.bytes,
                limit: available.limit.to_string(),
            }),
            huge_pages: match doctor.huge_pages {
                HugePages::Always => "always",
                HugePages::OnRequest => "on request",
                HugePages::Never => "never",
                _ => "unknown",
            },
            io_uring: Offer {
                available: doctor.io_uring_refusal.is_none(),
                reason: doctor.io_uring_refusal.as_deref(),
            },
            auto: Auto { engine: doctor.auto.used.as_str(), reason: &doctor.auto.reason },
            cuda: CudaJson {
                devices: doctor.cuda.iter().flatten().map(DeviceJson::of).collect(),
                reason: doctor.cuda.as_ref().err().map(ToString::to_string),
            },
            gds: GdsJson {
                mode: gds_mode(&doctor.gds.mode).0,
                nvidia_fs: doctor.gds.nvidia_fs,
                library: doctor.gds.library.as_deref(),
                reason: gds_mode(&doctor.gds.mode).1,
            },
            nccl: LibraryJson {
                library: doctor.nccl.as_deref().ok(),
                reason: doctor.nccl.as_ref().err().map(ToString::to_string),
            },
            measured: measured.map(|all| all.iter().map(MeasuredJson::of).collect()),
            path: doctor.path.as_ref().map(|path| PathJson {
                path: path.path.display().to_string(),
                files: path.files,
                bytes: path.bytes,
                resident_bytes: path.resident_bytes,
                file_system: path.file_system.as_ref().map(FileSystemJson::of),
                direct_io: path.direct_io.to_string(),
                verdict: &path.verdict,
            }),
        }
    }
}

impl<'d> DeviceJson<'d> {
    fn of(device: &'d CudaReport) -> Self {
        Self {
            device: format!("cuda:{}", device.ordinal),
            name: &device.name,
            memory: device.memory.map(|(total, available)| Memory { total, available }),
            driver: device.driver.as_deref(),
        }
    }
}

impl<'d> FileSystemJson<'d> {
    fn of(there: &'d FileSystem) -> Self {
        let place = match there.place {
            Place::Local => "local",
            Place::Network => "network",
            Place::Memory => "memory",
            Place::Program => "program",
            _ => "unknown",
        };
        Self { kind: &there.kind, place, compressed: there.compressed }
    }
}

impl MeasuredJson {
    fn of(measured: &Measurement) -> Self {
        Self {
            engine: measured.engine.as_str(),
            device: measured.device.to_string(),
            gb_per_s: measured.gb_per_s.as_ref().ok().copied(),
            resident: measured.resident,
            error: measured.gb_per_s.as_ref().err().map(ToString::to_string),
        }
    }
}

/// The mode's name, and why it is no better.
fn gds_mode(mode: &GdsMode) -> (&'static str, Option<String>) {
    match mode {
        GdsMode::Direct => ("direct", None),
        GdsMode::Compatibility => {
            let why = "cuFile would run in compatibility mode, through host memory: auto never \
                       takes it";
            ("compatibility", Some(why.to_owned()))
        }
        GdsMode::Unavailable(error) => ("unavailable", Some(error.to_string())),
        _ => ("unknown", None),
    }
}

fn render_measured(measured: &[Measurement]) -> String {
    let mut rates = Table::new(&[Align::Left, Align::Left, Align::Left]);
    for one in measured {
        let rate = match &one.gb_per_s {
            Ok(rate) => format!("{rate:.2} GB/s, {:.0}% cached", one.resident * 100.0),
            Err(error) => missing(&visible(&error.to_string())),
        };
        rates.row([one.engine.to_string(), one.device.to_string(), rate]);
    }
    format!("\n{}\n{}", styled(HEADING, "Measured"), rates.render())
}

fn render(doctor: &Doctor) -> String {
    let mut facts = Table::new(&[Align::Left, Align::Left]);
    let mut fact = |name: &str, what: String| facts.row([name.to_owned(), what]);
    fact("kernel", format!("Linux {}", doctor.kernel));
    fact("cores", text::count(doctor.cores as u64));
    if let Some((total, available)) = doctor.memory {
        let (total, available) = (text::bytes(total), text::bytes(available));
        fact("memory", format!("{total}, {available} available"));
    }
    if let Some(available) = &doctor.available {
        let limit = visible(&available.limit.to_string());
        fact("for a load", format!("{} ({limit})", text::bytes(available.bytes)));
    }
    fact(
        "huge pages",
        match doctor.huge_pages {
            HugePages::Always => good("for all memory"),
            HugePages::OnRequest => good("for memory that asks, as fst's does"),
            HugePages::Never => missing("switched off; the first touch of memory will be slow"),
            _ => missing("the kernel does not say"),
        },
    );
    fact(
        "io_uring",
        match &doctor.io_uring_refusal {
            None => good("available"),
            Some(reason) => missing(&visible(reason)),
        },
    );
    fact("engine", format!("auto takes {}: {}", doctor.auto.used, visible(&doctor.auto.reason)));
    match &doctor.cuda {
        Err(error) => fact("CUDA", absent(&error.to_string())),
        Ok(devices) if devices.is_empty() => fact("CUDA", missing("a driver, but no device")),
        Ok(devices) => {
            for device in devices {
                let memory = device.memory.map_or(String::new(), |(total, free)| {
                    format!(", {} with {} free", text::bytes(total), text::bytes(free))
                });
                let driver = device
                    .driver
                    .as_ref()
                    .map_or(String::new(), |version| format!(", driver for CUDA {version}"));
                let what = format!("{}{memory}{driver}", visible(&device.name));
                fact(&format!("cuda:{}", device.ordinal), good(&what));
            }
        }
    }
    fact(
        "GDS",
        match gds_mode(&doctor.gds.mode) {
            (mode, None) => good(mode),
            (_, Some(why)) => absent(&why),
        },
    );
    fact(
        "NCCL",
        match &doctor.nccl {
            Ok(library) => good(library),
            // Who has no GPU does not miss it.
            Err(error) if doctor.cuda.as_ref().is_ok_and(|devices| !devices.is_empty()) => {
                format!("{}; {GET_NCCL}", absent(&error.to_string()))
            }
            Err(error) => absent(&error.to_string()),
        },
    );
    let mut out = format!("{}\n{}", styled(HEADING, "This machine"), facts.render());
    if let Some(path) = &doctor.path {
        out += &render_path(path);
    }
    out
}

fn render_path(path: &PathReport) -> String {
    let mut facts = Table::new(&[Align::Left, Align::Left]);
    let mut fact = |name: &str, what: String| facts.row([name.to_owned(), what]);
    let size = text::bytes(path.bytes);
    fact("size", format!("{size} in {}", counted(path.files as u64, "file")));
    fact(
        "cached",
        match path.resident_bytes {
            Some(resident) => format!("{} in the page cache", text::bytes(resident)),
            None => missing("the system does not tell"),
        },
    );
    fact(
        "storage",
        match &path.file_system {
            Some(there) if there.place == Place::Local && !there.compressed => {
                good(&visible(&there.to_string()))
            }
            Some(there) => missing(&visible(&there.to_string())),
            None => missing("the system does not tell"),
        },
    );
    let direct = visible(&path.direct_io.to_string());
    fact(
        "direct I/O",
        match path.direct_io {
            DirectIo::Available { .. } => good(&direct),
            _ => missing(&direct),
        },
    );
    fact("a load", visible(&path.verdict));
    let heading = styled(HEADING, visible(&path.path.display().to_string()));
    format!("\n{heading}\n{}", facts.render())
}

fn good(what: &str) -> String {
    styled(GOOD, what)
}

/// What is missing, in short where it is just not installed: the dynamic linker's words then say no more.
fn absent(what: &str) -> String {
    let looked_for = what.split_once("looked for ").filter(|_| what.contains("No such file"));
    let names = looked_for.and_then(|(_, rest)| rest.split([':', ';']).next());
    match names {
        Some(names) => missing(&visible(&format!("not installed: looked for {names}"))),
        None => missing(&visible(what)),
    }
}

fn missing(what: &str) -> String {
    styled(MISSING, what)
}
