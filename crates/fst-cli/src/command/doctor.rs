//! `fst doctor`: what this machine offers to a load, and which way a load of a path would take.

use fst::{DirectIo, Doctor, HugePages, PathReport};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::failure::Failure;
use crate::text::{self, Align, GOOD, HEADING, MISSING, Table, counted, styled, visible};

#[derive(Serialize)]
struct Report<'d> {
    kernel: &'d str,
    cores: usize,
    memory: Option<Memory>,
    huge_pages: &'static str,
    io_uring: Offer<'d>,
    auto: Auto<'d>,
    path: Option<PathJson<'d>>,
}

#[derive(Serialize)]
struct Memory {
    total: u64,
    available: u64,
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
struct PathJson<'d> {
    path: String,
    files: usize,
    bytes: u64,
    resident_bytes: Option<u64>,
    direct_io: String,
    verdict: &'d str,
}

pub(crate) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let doctor = Doctor::examine(args.path.as_deref()).map_err(Failure::of)?;
    if args.json {
        return text::print_json(&Report::of(&doctor)).map_err(Failure::output);
    }
    text::print(&render(&doctor)).map_err(Failure::output)
}

impl<'d> Report<'d> {
    fn of(doctor: &'d Doctor) -> Self {
        Self {
            kernel: &doctor.kernel,
            cores: doctor.cores,
            memory: doctor.memory.map(|(total, available)| Memory { total, available }),
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
            path: doctor.path.as_ref().map(|path| PathJson {
                path: path.path.display().to_string(),
                files: path.files,
                bytes: path.bytes,
                resident_bytes: path.resident_bytes,
                direct_io: path.direct_io.to_string(),
                verdict: &path.verdict,
            }),
        }
    }
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

fn missing(what: &str) -> String {
    styled(MISSING, what)
}
