//! Tensors as they land.

use std::sync::{Mutex, PoisonError};

use fst::{AvailableMemory, Device, Loading};
use pyo3::prelude::*;

use crate::checkpoint::Checkpoint;
use crate::errors;
use crate::frameworks::Framework;
use crate::group::Ranks;
use crate::load::{Options, is_over};
use crate::wait::{Attention, TICK};

/// Stands for a stream without a budget.
const NO_BUDGET: u64 = u64::MAX;

/// The budget of a stream when none was given, in bytes.
fn default_budget() -> u64 {
    let available = AvailableMemory::now().map_or(u64::MAX, |available| available.bytes);
    (2 << 30).min(available / 2)
}

/// An iterator over names and tensors.
#[pyclass(frozen, weakref, module = "fst")]
pub(crate) struct Stream {
    checkpoint: Py<Checkpoint>,
    framework: Framework,
    state: Mutex<State>,
}

enum State {
    Idle(Box<Running>),
    /// A thread waits for the next tensor.
    Busy,
    Over,
}

struct Running {
    loading: Loading,
    attention: Attention,
}

#[pymethods]
impl Stream {
    #[new]
    #[pyo3(signature = (checkpoint, framework, options, memory_budget, in_order, progress=None, ranks=None))]
    #[expect(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        checkpoint: Py<Checkpoint>,
        framework: &str,
        options: Options,
        memory_budget: Option<u64>,
        in_order: bool,
        progress: Option<Py<PyAny>>,
        ranks: Option<Ranks>,
    ) -> PyResult<Self> {
        let framework = Framework::parse(py, framework)?;
        let mut loader = options.loader(py)?.device(Device::host());
        // Ranks have none: one that is given is refused when they start.
        let budget = memory_budget.or_else(|| ranks.is_none().then(default_budget));
        if let Some(budget) = budget.filter(|budget| *budget != NO_BUDGET) {
            loader = loader.memory_budget(budget);
        }
        if let Some(ranks) = ranks {
            loader = ranks.apply(py, loader)?;
        }
        let (loader, attention) = Attention::new(loader.in_order(in_order), progress);
        let source = &checkpoint.get().source;
        let started = py.detach(|| loader.start(&source.checkpoint));
        let loading = started.map_err(|error| source.raised(py, &error))?;
        let state = State::Idle(Box::new(Running { loading, attention }));
        Ok(Self { checkpoint, framework, state: Mutex::new(state) })
    }

    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    fn __next__<'py>(&self, py: Python<'py>) -> PyResult<Option<(String, Bound<'py, PyAny>)>> {
        let mut running = match self.enter(State::Busy) {
            State::Idle(running) => running,
            State::Busy => return Err(errors::failed(py, "another thread waits for this stream")),
            State::Over => {
                self.enter(State::Over);
                return Ok(None);
            }
        };
        let next = self.next_of(py, &mut running);
        let goes_on = match &next {
            Ok(next) => next.is_some(),
            // What is held fills the budget: the stream goes on when some of it is gone.
            Err(error) => is_stall(py, error),
        };
        if goes_on {
            self.enter(State::Idle(running));
        } else {
            self.enter(State::Over);
            py.detach(|| drop(running));
        }
        next
    }

    /// Ends the load.
    fn close(&self, py: Python<'_>) {
        let before = self.enter(State::Over);
        py.detach(|| drop(before));
    }

    /// Tensors that are still to come.
    fn __length_hint__(&self) -> usize {
        match &*self.state.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Idle(running) => running.loading.remaining(),
            State::Busy | State::Over => 0,
        }
    }
}

impl Drop for Stream {
    /// What the load still does may need the interpreter.
    fn drop(&mut self) {
        let state = self.enter(State::Over);
        let _ = Python::try_attach(|py| py.detach(|| drop(state)));
    }
}

impl Stream {
    /// Sets the state, and returns the one before.
    fn enter(&self, state: State) -> State {
        std::mem::replace(&mut *self.state.lock().unwrap_or_else(PoisonError::into_inner), state)
    }

    fn next_of<'py>(
        &self,
        py: Python<'py>,
        running: &mut Running,
    ) -> PyResult<Option<(String, Bound<'py, PyAny>)>> {
        let Running { loading, attention } = running;
        let source = &self.checkpoint.get().source;
        loop {
            attention.pay(py)?;
            match py.detach(|| loading.next_timeout(TICK)) {
                Ok(Some(tensor)) => {
                    let name = tensor.name().to_owned();
                    return Ok(Some((name, self.framework.wrap(py, tensor)?)));
                }
                Ok(None) if is_over(loading) => {
                    attention.tell(py)?;
                    return Ok(None);
                }
                Ok(None) => {}
                Err(fst::Error::Stalled { budget, waited }) => {
                    let error = fst::Error::Stalled { budget, waited };
                    return Err(errors::stalled(py, &error));
                }
                Err(error) => return Err(source.raised(py, &error)),
            }
        }
    }
}

fn is_stall(py: Python<'_>, error: &PyErr) -> bool {
    let class = py.import("fst._errors").and_then(|module| module.getattr("FstTimeoutError"));
    class.is_ok_and(|class| error.matches(py, class).unwrap_or(false))
}
