//! A transport of one's own: a group whose bytes travel through channels, as they would over a network that fst does
//! not know. What is not about moving bytes (who the ranks are, small messages, failures) is left to a group that
//! exists; `TcpControl` would be one for several processes.
//!
//! `cargo run -p fst-dist --example transport`

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use fst_dist::group::{Control, Controlled, Group, LocalGroup, Occupancy, Op};
use fst_dist::{
    Cause, Dst, GroupError, Planner, ReadInto, Reader, Shard, Space, Src, TensorDesc, Topology,
    load_host,
};

/// One rank's end of the channels.
#[derive(Debug)]
struct Channels {
    control: LocalGroup,
    /// By rank.
    to: Vec<Sender<Vec<u8>>>,
    /// By rank.
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
    sent: AtomicU64,
}

impl Channels {
    /// The ends of `world` ranks.
    fn all(world: u32) -> Vec<Self> {
        let end = |control| Self { control, to: Vec::new(), from: Vec::new(), sent: 0.into() };
        let mut ends: Vec<Self> = LocalGroup::host(world).into_iter().map(end).collect();
        for to in 0..ends.len() {
            for from in 0..ends.len() {
                let (sender, receiver) = channel();
                ends[from].to.push(sender);
                ends[to].from.push(Mutex::new(receiver));
            }
        }
        ends
    }

    /// Ends the group with this cause, unless it has ended with another.
    fn fail(&self, cause: &str) -> GroupError {
        self.control.abort(cause);
        self.control.failure().unwrap_or_else(|| unreachable!("it has just ended"))
    }

    fn send(&self, to: u32, data: Src<'_>) -> Result<(), GroupError> {
        let bytes = data.host().ok_or_else(|| self.fail("bytes on a device"))?;
        self.sent.fetch_add(bytes.len() as u64, Relaxed);
        // The receiver may have ended: whoever waits for it learns why.
        let _ = self.to[to as usize].send(bytes.to_vec());
        Ok(())
    }

    fn recv(&self, from: u32, mut into: Dst<'_>) -> Result<(), GroupError> {
        let began = Instant::now();
        let receiver = self.from[from as usize].lock().unwrap_or_else(|e| e.into_inner());
        loop {
            match receiver.recv_timeout(Duration::from_millis(20)) {
                Ok(bytes) if into.fill_host(&bytes) => return Ok(()),
                Ok(_) => return Err(self.fail("a message of another length")),
                Err(RecvTimeoutError::Timeout) if began.elapsed() < self.deadline() => {
                    self.failure().map_or(Ok(()), Err)?;
                }
                Err(_) => return Err(self.fail("a message did not come")),
            }
        }
    }
}

impl Controlled for Channels {
    fn control(&self) -> &dyn Control {
        &self.control
    }
}

impl Group for Channels {
    fn reaches(&self, space: Space) -> bool {
        space == Space::Host
    }

    fn occupancy(&self) -> &Occupancy {
        self.control.occupancy()
    }

    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), GroupError> {
        // Channels hold what is sent: with a transport that does not, both must go on at the same time.
        let mut receive = Vec::new();
        for op in batch {
            match op {
                Op::Send { to, data } => self.send(to, data)?,
                Op::Recv { from, into } => receive.push((from, into)),
                Op::Broadcast { data } => {
                    let others = (0..self.world_size()).filter(|rank| *rank != self.rank());
                    others.into_iter().try_for_each(|rank| self.send(rank, data))?;
                }
                Op::BroadcastFrom { root, into } => receive.push((root, into)),
                _ => return Err(self.fail("an operation of another version")),
            }
        }
        receive.into_iter().try_for_each(|(from, into)| self.recv(from, into))
    }
}

/// A file whose bytes count up.
struct Counting;

impl Reader for Counting {
    fn read(&self, ranges: &mut [ReadInto<'_>]) -> Result<(), (usize, Cause)> {
        for range in ranges {
            let start = range.offset;
            (start..).zip(range.into.iter_mut()).for_each(|(at, byte)| *byte = at as u8);
        }
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    const WORLD: u32 = 4;
    let tensor = |name: &str, start: u64| TensorDesc {
        name: name.into(),
        bits: 8,
        shape: vec![1024, 1024],
        shard: 0,
        file_range: start..start + (1 << 20),
    };
    let tensors = vec![tensor("q_proj", 0), tensor("o_proj", 1 << 20), tensor("norm", 2 << 20)];
    let plan =
        Planner::new(Topology::one_node(WORLD)).plan(tensors, |tensor| match &*tensor.name {
            "q_proj" => Shard::split(0),
            "o_proj" => Shard::split(1),
            _ => Shard::replicate(),
        })?;
    let groups = Channels::all(WORLD);
    let firsts = std::thread::scope(|scope| {
        let plan = &plan;
        let rank = |group: &Channels| {
            let view = plan.rank(group.rank());
            let outputs = view.outputs().iter().map(|output| vec![0; output.bytes as usize]);
            let mut outputs: Vec<Vec<u8>> = outputs.collect();
            let mut memory: Vec<&mut [u8]> =
                outputs.iter_mut().map(|bytes| &mut bytes[..]).collect();
            load_host(&view, group, Counting, &mut memory)?;
            Ok::<_, fst_dist::ExchangeError>(outputs)
        };
        let ranks: Vec<_> = groups.iter().map(|group| scope.spawn(move || rank(group))).collect();
        let join = |rank: std::thread::ScopedJoinHandle<'_, _>| {
            rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        ranks.into_iter().map(join).collect::<Result<Vec<_>, _>>()
    })?;
    for (group, outputs) in groups.iter().zip(firsts) {
        // Row 0 of o_proj, from this rank's first column on.
        let right = (0..256).all(|column| outputs[1][column] == column as u8);
        println!("rank {}: sent {} bytes, right: {right}", group.rank(), group.sent.load(Relaxed));
        assert!(right);
    }
    Ok(())
}
