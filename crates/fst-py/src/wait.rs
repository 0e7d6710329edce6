//! Waiting for work without holding the interpreter: signals are looked at and progress is told meanwhile.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use fst::{CancelToken, Error, Loader};
use pyo3::prelude::*;

use crate::errors;

/// How often signals are looked at and progress is told.
pub(crate) const TICK: Duration = Duration::from_millis(50);

/// How far a load is.
#[pyclass(frozen, module = "fst")]
#[derive(Debug)]
pub(crate) struct Progress {
    #[pyo3(get)]
    bytes_done: u64,
    #[pyo3(get)]
    bytes_total: u64,
    #[pyo3(get)]
    tensors_total: usize,
    #[pyo3(get)]
    seconds: f64,
}

#[pymethods]
impl Progress {
    fn __repr__(&self) -> String {
        let Self { bytes_done, bytes_total, .. } = self;
        format!("Progress(bytes_done={bytes_done}, bytes_total={bytes_total})")
    }
}

/// What goes on beside a wait: signals, and the caller's hook, which is called by the thread that waits, so that
/// its exceptions end the load.
pub(crate) struct Attention {
    hook: Option<Py<PyAny>>,
    last: Arc<Mutex<Option<fst::Progress>>>,
    looked: Instant,
}

impl Attention {
    /// For a load by `loader`, whose progress is told to `hook`.
    pub(crate) fn new(loader: Loader, hook: Option<Py<PyAny>>) -> (Loader, Self) {
        let last = Arc::new(Mutex::new(None));
        let loader = match &hook {
            Some(_) => {
                let last = last.clone();
                loader.on_progress(move |progress| {
                    *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(*progress);
                })
            }
            None => loader,
        };
        (loader, Self { hook, last, looked: Instant::now() })
    }

    /// For work that has nothing to tell.
    pub(crate) fn to_signals() -> Self {
        Self { hook: None, last: Arc::default(), looked: Instant::now() }
    }

    /// Looks at signals and tells progress, if that is due.
    pub(crate) fn pay(&mut self, py: Python<'_>) -> PyResult<()> {
        if self.looked.elapsed() < TICK {
            return Ok(());
        }
        self.looked = Instant::now();
        py.check_signals()?;
        self.tell(py)
    }

    /// Tells the progress that was not told yet.
    pub(crate) fn tell(&mut self, py: Python<'_>) -> PyResult<()> {
        let Some(hook) = &self.hook else { return Ok(()) };
        let new = self.last.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(new) = new else { return Ok(()) };
        let progress = Progress {
            bytes_done: new.bytes_done,
            bytes_total: new.bytes_total,
            tensors_total: new.tensors_total,
            seconds: new.elapsed.as_secs_f64(),
        };
        hook.call1(py, (progress,)).map(drop)
    }
}

/// Runs `work` on another thread while this one looks at signals. An exception of a signal's handler or of the
/// hook uses `cancel`, which ends the work, and is returned once it has ended: what it borrows is free then.
pub(crate) fn interruptible<T: Send>(
    py: Python<'_>,
    cancel: &CancelToken,
    mut attention: Attention,
    work: impl FnOnce() -> T + Send,
) -> PyResult<T> {
    let attention = &mut attention;
    let (done, raised) = py.detach(|| {
        let mut raised = None;
        let done = std::thread::scope(|scope| {
            let (send, receive) = sync_channel(1);
            let worker = std::thread::Builder::new().name("fst-py".to_owned());
            let worker = worker.spawn_scoped(scope, move || {
                // The receiver waits for it.
                let _ = send.send(work());
            });
            worker.ok()?;
            loop {
                match receive.recv_timeout(TICK) {
                    Ok(done) => return Some(done),
                    Err(RecvTimeoutError::Disconnected) => return None,
                    Err(RecvTimeoutError::Timeout) if raised.is_some() => {}
                    Err(RecvTimeoutError::Timeout) => {
                        if let Err(error) = Python::attach(|py| attention.pay(py)) {
                            raised = Some(error);
                            cancel.cancel();
                        }
                    }
                }
            }
        });
        (done, raised)
    });
    if let Some(error) = raised {
        return Err(error);
    }
    attention.tell(py)?;
    done.ok_or_else(|| errors::failed(py, "no thread could be started for the work"))
}

/// The result of work of a load.
pub(crate) fn loaded<T: Send>(
    py: Python<'_>,
    cancel: &CancelToken,
    attention: Attention,
    work: impl FnOnce() -> Result<T, Error> + Send,
) -> PyResult<Result<T, Error>> {
    interruptible(py, cancel, attention, work)
}
