//! A load's timeline: every read with its start and length, as a trace and as a drawing.

mod plot;
mod rates;
mod trace;

use std::path::Path;

use fst::LoadReport;

use crate::failure::Failure;
use crate::output;

/// Writes a report's timeline for `chrome://tracing` and Perfetto.
pub(crate) fn write_trace(report: &LoadReport, path: &Path) -> Result<(), Failure> {
    output::write(path, trace::json(report))
}

/// Draws a report's throughput over time.
pub(crate) fn write_plot(report: &LoadReport, path: &Path) -> Result<(), Failure> {
    let svg = plot::svg(report).map_err(|error| Failure::at(path, error))?;
    output::write(path, svg)
}
