//! The extension module of the Python package `fst`: what is better done in Rust than in Python. What users see
//! is in `python/fst`.

mod checkpoint;
mod dtypes;
mod errors;
mod frameworks;
mod group;
mod load;
mod raw;
mod report;
mod session;
mod shard;
mod spec;
mod stream;
mod wait;
mod write;

use pyo3::prelude::*;

#[pymodule]
fn _fst(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<checkpoint::Checkpoint>()?;
    module.add_class::<checkpoint::Info>()?;
    module.add_class::<frameworks::HostMemory>()?;
    module.add_class::<group::RankGroup>()?;
    module.add_class::<report::Report>()?;
    module.add_class::<session::Session>()?;
    module.add_class::<shard::Shard>()?;
    module.add_class::<stream::Stream>()?;
    module.add_class::<wait::Progress>()?;
    module.add_function(wrap_pyfunction!(load::load, module)?)?;
    module.add_function(wrap_pyfunction!(load::load_into, module)?)?;
    module.add_function(wrap_pyfunction!(load::planned, module)?)?;
    module.add_function(wrap_pyfunction!(raw::parse, module)?)?;
    module.add_function(wrap_pyfunction!(write::file_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(write::write_file, module)?)?;
    Ok(())
}
