//! What a load did, for Python.

use fst::LoadReport;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// What a load did, and how long each part of it took.
#[pyclass(frozen, module = "fst")]
#[derive(Debug)]
pub(crate) struct Report {
    report: LoadReport,
}

impl Report {
    pub(crate) fn of(report: LoadReport) -> Self {
        Self { report }
    }
}

#[pymethods]
impl Report {
    /// Tensors loaded.
    #[getter]
    fn tensors(&self) -> usize {
        self.report.tensors
    }

    /// Bytes of the loaded tensors.
    #[getter]
    fn bytes(&self) -> u64 {
        self.report.bytes
    }

    /// Bytes of the files that were read.
    #[getter]
    fn bytes_read(&self) -> u64 {
        self.report.bytes_read
    }

    /// Wall-clock seconds.
    #[getter]
    fn seconds(&self) -> f64 {
        self.report.seconds
    }

    /// Bytes loaded per second, in units of 1e9.
    #[getter]
    fn gb_per_s(&self) -> f64 {
        self.report.gb_per_s()
    }

    /// The engine that was used.
    #[getter]
    fn engine(&self) -> String {
        self.report.engine.used.to_string()
    }

    /// Seconds by stage. Stages with a dot are parts of the one in front of it, added up over threads.
    #[getter]
    fn stages<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stages = PyDict::new(py);
        for stage in &self.report.stages {
            stages.set_item(stage.name, stage.seconds)?;
        }
        Ok(stages)
    }

    fn __repr__(&self) -> String {
        let LoadReport { tensors, bytes, seconds, .. } = &self.report;
        let rate = self.report.gb_per_s();
        format!(
            "Report(tensors={tensors}, bytes={bytes}, seconds={seconds:.3}, gb_per_s={rate:.2})"
        )
    }
}
