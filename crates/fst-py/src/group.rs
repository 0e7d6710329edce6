//! Ranks that load together: what they tell each other goes over TCP, and tensors' bytes by callbacks of Python's,
//! which have a process group of PyTorch move them.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use fst::dist::group::{Control, Controlled, DEFAULT_DEADLINE, Group, Occupancy, Op, TcpControl};
use fst::dist::{DistError, GroupError, Space};
use fst::{LaunchEnv, Loader, Place, Preset, Topology};
use pyo3::prelude::*;

use crate::errors;
use crate::load::cuda;
use crate::shard::Shard;
use crate::wait::TICK;

/// How long word of a rank's failure may take after the process group has noticed it.
const WORD: Duration = Duration::from_secs(1);

/// One transfer, as Python sees it: whether this rank receives, the ranks at the other end, address and length.
type Transfer = (bool, Vec<u32>, u64, usize);

/// A rank whose bytes Python moves.
struct Carried {
    control: TcpControl,
    /// `start(transfers, done)` begins to move a batch out of and into memory of its own, and returns what `finish`
    /// takes to copy from there what has arrived, once `done` was called.
    carrier: Py<PyAny>,
    space: Space,
    occupancy: Occupancy,
}

impl fmt::Debug for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Carried({} of {}, {:?})", self.rank(), self.world_size(), self.space)
    }
}

/// Called by Python when a batch was moved, or with what went wrong.
#[pyclass(frozen, module = "fst._fst")]
struct Done(SyncSender<Option<String>>);

#[pymethods]
impl Done {
    fn __call__(&self, error: Option<String>) {
        // Nobody waits any more if the group has ended.
        let _ = self.0.try_send(error);
    }
}

impl Carried {
    /// Ends the group with this cause, unless it has ended with another.
    fn fail(&self, cause: &str) -> GroupError {
        self.control.abort(cause);
        self.control.failure().unwrap_or_else(|| unreachable!("it has just ended"))
    }

    /// Calls the carrier.
    fn call<T>(
        &self,
        call: impl FnOnce(Python<'_>, &Bound<'_, PyAny>) -> PyResult<T>,
    ) -> Result<T, GroupError> {
        let called = Python::try_attach(|py| {
            call(py, self.carrier.bind(py)).map_err(|error| error.to_string())
        });
        let called = called.unwrap_or_else(|| Err("the interpreter ends".to_owned()));
        called.map_err(|cause| self.fail(&cause))
    }

    /// Waits until the batch is moved.
    fn wait(&self, done: &Receiver<Option<String>>, peers: &[u32]) -> Result<(), GroupError> {
        let start = Instant::now();
        let _waiting = self.signs().wait(self.rank());
        loop {
            match done.recv_timeout(TICK) {
                Ok(None) => return Ok(()),
                Ok(Some(cause)) => return Err(self.explained(&cause)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.fail("the process group's thread has ended"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(error) = self.failure() {
                return Err(error);
            }
            let silent = self.signs().patience(peers, start, self.deadline());
            if let Err(Some(peer)) = silent {
                let deadline = self.deadline();
                return Err(self.fail(&format!("rank {peer} was silent for {deadline:?}")));
            }
        }
    }

    /// What the ranks tell of a failure that the process group has noticed first.
    fn explained(&self, cause: &str) -> GroupError {
        let start = Instant::now();
        while start.elapsed() < WORD {
            if let Some(error) = self.failure() {
                return error;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.fail(cause)
    }
}

impl Controlled for Carried {
    fn control(&self) -> &dyn Control {
        &self.control
    }
}

impl Group for Carried {
    fn reaches(&self, space: Space) -> bool {
        space == self.space
    }

    fn occupancy(&self) -> &Occupancy {
        &self.occupancy
    }

    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), GroupError> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let mut transfers: Vec<Transfer> = Vec::with_capacity(batch.len());
        for op in &batch {
            transfers.push(match op {
                Op::Send { to, data } => (false, vec![*to], data.addr(), data.len()),
                Op::Broadcast { data } => {
                    let others = (0..self.world_size()).filter(|other| *other != self.rank());
                    (false, others.collect(), data.addr(), data.len())
                }
                Op::Recv { from: peer, into } | Op::BroadcastFrom { root: peer, into } => {
                    (true, vec![*peer], into.addr(), into.len())
                }
                _ => return Err(self.fail("a transfer of an unknown kind")),
            });
        }
        transfers.retain(|(_, peers, _, len)| *len > 0 && !peers.is_empty());
        if transfers.is_empty() {
            return Ok(());
        }
        let peers: Vec<u32> = transfers.iter().flat_map(|(_, peers, ..)| peers.clone()).collect();
        let (tell, told) = sync_channel(1);
        // What moves lies in memory of the carrier's, so that `batch` is free whenever this returns.
        let moving = self.call(|py, carrier| {
            Ok(carrier.call_method1("start", (transfers, Py::new(py, Done(tell))?))?.unbind())
        })?;
        self.wait(&told, &peers)?;
        self.call(|_, carrier| carrier.call_method1("finish", (moving,)).map(drop))?;
        self.alive();
        Ok(())
    }
}

/// A rank of a group, and where its shards go: to the host, or to a CUDA device.
#[pyclass(frozen, module = "fst._fst")]
pub(crate) struct RankGroup {
    group: Arc<Carried>,
    topology: Topology,
    cuda: Option<usize>,
}

#[pymethods]
impl RankGroup {
    /// Meets the other ranks at an address and port of rank 0's, for a job of the same name. `nodes` tells by rank
    /// which are on one machine.
    #[new]
    #[pyo3(signature = (rank, nodes, meeting, carrier, cuda=None))]
    fn new(
        py: Python<'_>,
        rank: u32,
        nodes: Vec<u32>,
        meeting: (String, u16, String),
        carrier: Py<PyAny>,
        cuda: Option<usize>,
    ) -> PyResult<Self> {
        let (address, port, job) = meeting;
        let mut env = LaunchEnv::new(rank, nodes.len() as u32, address, port);
        env.job = job;
        let raised = |error: DistError| errors::raised(py, &error.into());
        let control = py.detach(|| TcpControl::from_env(&env, DEFAULT_DEADLINE));
        let control = control.map_err(|error| raised(error.into()))?;
        let assumed = Topology::one_node(nodes.len() as u32);
        let places = nodes.into_iter().map(|node| Place { node, storage: Some(0) }).collect();
        let topology = Topology::new(places, assumed.storages().to_vec(), assumed.links());
        let topology = topology.map_err(|error| raised(error.into()))?;
        let space = cuda.map_or(Space::Host, |ordinal| Space::Device(ordinal as u32));
        let group = Carried { control, carrier, space, occupancy: Occupancy::default() };
        Ok(Self { group: Arc::new(group), topology, cuda })
    }
}

/// What a load is asked for as one rank of several.
#[derive(FromPyObject)]
pub(crate) struct Ranks {
    #[pyo3(item)]
    group: Py<RankGroup>,
    #[pyo3(item)]
    shard: Rule,
}

/// What each rank keeps: a preset's name, or by tensor; of others everything.
#[derive(FromPyObject)]
enum Rule {
    Preset(String),
    Each(HashMap<String, Py<Shard>>),
}

impl Ranks {
    /// The loader as this rank's.
    pub(crate) fn apply(self, py: Python<'_>, loader: Loader) -> PyResult<Loader> {
        let RankGroup { group, topology, cuda: ordinal } = self.group.get();
        let mut loader = loader.group(group.clone()).topology(topology.clone());
        if let Some(ordinal) = ordinal {
            loader = loader.device(cuda(py, *ordinal)?);
        }
        Ok(match self.shard {
            Rule::Preset(name) => {
                let unknown = || {
                    let known = Preset::NAMES.join(", ");
                    errors::invalid(
                        py,
                        &format!("unknown preset {name:?}: expected one of {known}"),
                    )
                };
                loader.preset(Preset::named(&name).ok_or_else(unknown)?)
            }
            Rule::Each(shards) => {
                let own = |(name, shard): (String, Py<Shard>)| (name, shard.get().shard.clone());
                let shards: HashMap<String, fst::Shard> = shards.into_iter().map(own).collect();
                loader.shard(move |tensor| {
                    shards.get(tensor.name()).cloned().unwrap_or_else(fst::Shard::replicate)
                })
            }
        })
    }
}
