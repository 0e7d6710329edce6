//! A group of ranks in one process, one thread each.
//!
//! A send posts the address of its bytes; the receiver copies them itself and releases the sender. Of
//! several ranks each copies what it receives, so copies run in parallel and only bookkeeping
//! is behind the lock.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Control, DEFAULT_DEADLINE, Group, Occupancy, Op, Signs, check_peers};
use crate::error::GroupError;
use crate::memory::{Dst, Space, Src};

/// A copy that failed, as told by the [`Copier`].
pub type CopyError = Box<dyn std::error::Error + Send + Sync>;

/// Copies between the memories of a process's ranks.
pub trait Copier: Send + Sync {
    /// Whether copies can begin and end in memory of `space`.
    fn reaches(&self, space: Space) -> bool;

    /// Copies `src` to `dst`, which are equally long, and returns when that is done.
    ///
    /// # Errors
    /// The copy failed, or this copier does not reach one of the two.
    fn copy(&self, src: Src<'_>, dst: Dst<'_>) -> Result<(), CopyError>;

    /// Makes several copies and returns when all are done; also after an error none is under way any
    /// more. Copiers that can wait for many at once do.
    ///
    /// # Errors
    /// The positions of those among which one failed, and why. Who waits for many at once may know
    /// no better.
    fn copy_all(&self, copies: Vec<(Src<'_>, Dst<'_>)>) -> Result<(), (Vec<usize>, CopyError)> {
        let copy = |(at, (src, dst))| self.copy(src, dst).map_err(|error| (vec![at], error));
        copies.into_iter().enumerate().try_for_each(copy)
    }
}

/// Copies between host memory only.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostCopier;

#[derive(Debug, thiserror::Error)]
#[error("no copy from {from:?} to {to:?}: host memory only")]
struct NotHost {
    from: Space,
    to: Space,
}

impl Copier for HostCopier {
    fn reaches(&self, space: Space) -> bool {
        space == Space::Host
    }

    fn copy(&self, src: Src<'_>, mut dst: Dst<'_>) -> Result<(), CopyError> {
        match src.host() {
            Some(bytes) if dst.fill_host(bytes) => Ok(()),
            _ => Err(Box::new(NotHost { from: src.space(), to: dst.space() })),
        }
    }
}

/// Bytes that wait for their receiver. The address stays valid until the post is withdrawn or `done`:
/// the sender's call does not return before.
#[derive(Debug)]
struct Post {
    id: u64,
    addr: u64,
    len: usize,
    space: Space,
}

#[derive(Debug)]
struct Gather {
    messages: Vec<Option<Vec<u8>>>,
    unread: u32,
}

#[derive(Debug, Default)]
struct State {
    /// By (sender, receiver), in the order of sending.
    posts: HashMap<(u32, u32), VecDeque<Post>>,
    /// Posts not yet copied, and their receivers, by sender.
    open: Vec<Vec<(u64, u32)>>,
    next_id: u64,
    gathers: HashMap<u64, Gather>,
    failure: Option<GroupError>,
    /// Ranks whose handles are gone.
    left: Vec<bool>,
}

struct Shared {
    state: Mutex<State>,
    /// One for each rank: something that it waits for may have happened.
    wake: Vec<Condvar>,
    copier: Box<dyn Copier>,
    deadline: Duration,
    signs: Signs,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A rank that panics does so outside of the lock's sections, or between whole updates.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, state: &mut State, error: GroupError) -> GroupError {
        let error = state.failure.get_or_insert(error).clone();
        self.wake.iter().for_each(Condvar::notify_all);
        error
    }
}

/// One rank of a group within this process. Dropping it, by a panic too, is noticed by ranks that wait
/// for it.
pub struct LocalGroup {
    shared: Arc<Shared>,
    rank: u32,
    world: u32,
    gathers: Mutex<u64>,
    occupancy: Occupancy,
}

impl std::fmt::Debug for LocalGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LocalGroup({} of {})", self.rank, self.world)
    }
}

impl LocalGroup {
    /// The handles of `world` ranks on host memory, with the usual deadline.
    #[must_use]
    pub fn host(world: u32) -> Vec<Self> {
        Self::with(world, HostCopier, DEFAULT_DEADLINE)
    }

    /// The handles of `world` ranks whose memory `copier` reaches, and which end the group once a rank that
    /// they wait for has been silent for `deadline`.
    #[must_use]
    pub fn with(world: u32, copier: impl Copier + 'static, deadline: Duration) -> Vec<Self> {
        let ranks = world as usize;
        let state =
            State { open: vec![Vec::new(); ranks], left: vec![false; ranks], ..State::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: (0..world).map(|_| Condvar::new()).collect(),
            copier: Box::new(copier),
            deadline,
            signs: Signs::new(world),
        });
        let handle = |rank| Self {
            shared: shared.clone(),
            rank,
            world,
            gathers: Mutex::new(0),
            occupancy: Occupancy::default(),
        };
        (0..world).map(handle).collect()
    }

    /// Waits for this rank's condition or the deadline; `waiting` tells for which ranks.
    fn wait<'s>(
        &self,
        mut state: MutexGuard<'s, State>,
        start: Instant,
        op: &'static str,
        waiting: impl Fn(&State) -> Vec<u32>,
    ) -> Result<MutexGuard<'s, State>, GroupError> {
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let peers = waiting(&state);
        if let Some(&rank) = peers.iter().find(|&&rank| state.left[rank as usize]) {
            let cause = "it left the group".to_owned();
            return Err(self.shared.fail(&mut state, GroupError::Lost { rank, cause }));
        }
        let (rank, waited) = (self.rank, self.shared.deadline);
        let left = self.shared.signs.patience(&peers, start, waited).map_err(|waiting_for| {
            self.shared.fail(&mut state, GroupError::Deadline { op, rank, waiting_for, waited })
        })?;
        let wake = &self.shared.wake[self.rank as usize];
        let (state, _) = wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        Ok(state)
    }

    /// Copies what has arrived: from whom, where to, and where it lies.
    fn receive(&self, ready: Vec<(u32, Dst<'_>, Post)>) -> Result<(), GroupError> {
        let mut copies = Vec::with_capacity(ready.len());
        let mut sources = Vec::with_capacity(ready.len());
        for (from, dst, post) in ready {
            if post.len != dst.len() {
                let (sent, expected) = (post.len, dst.len());
                return Err(GroupError::Size { from, to: self.rank, sent, expected });
            }
            // SAFETY: the sender waits for `release` before its bytes may change or go.
            let src = unsafe { Src::from_addr(post.addr, post.len, post.space) };
            sources.push((from, post.len));
            copies.push((src, dst));
        }
        self.shared.copier.copy_all(copies).map_err(|(at, error)| {
            let (to, source) = (self.rank, error.into());
            let failed = at.iter().filter_map(|at| sources.get(*at));
            let bytes = failed.clone().map(|(_, bytes)| *bytes).sum();
            let mut from: Vec<u32> = failed.map(|(from, _)| *from).collect();
            from.sort_unstable();
            from.dedup();
            match from[..] {
                [from] => GroupError::Copy { from, to, bytes, source },
                _ => GroupError::Copies { from, to, bytes, source },
            }
        })
    }

    /// Tells the sender that its bytes are copied (or will not be).
    fn release(&self, state: &mut State, from: u32, id: u64) {
        let open = &mut state.open[from as usize];
        open.retain(|&(other, _)| other != id);
        if open.is_empty() {
            self.shared.wake[from as usize].notify_all();
        }
    }

    /// Takes back this rank's posts that nobody copies and waits for those being copied.
    fn withdraw(&self) {
        let mut state = self.shared.lock();
        let mut back = Vec::new();
        for ((from, _), posts) in &mut state.posts {
            if *from == self.rank {
                back.extend(posts.drain(..).map(|post| post.id));
            }
        }
        state.open[self.rank as usize].retain(|(id, _)| !back.contains(id));
        while !state.open[self.rank as usize].is_empty() {
            let wake = &self.shared.wake[self.rank as usize];
            state = wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self, mut receives: Vec<(u32, Option<Dst<'_>>)>) -> Result<(), GroupError> {
        let mut start = Instant::now();
        let mut state = self.shared.lock();
        let mut left = receives.len();
        loop {
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            // Whatever has arrived, in the order of each sender.
            let mut blocked: Vec<u32> = Vec::new();
            let mut ready = Vec::new();
            for (from, into) in receives.iter_mut().filter(|(_, into)| into.is_some()) {
                if blocked.contains(from) {
                    continue;
                }
                let posts = state.posts.get_mut(&(*from, self.rank));
                match posts.and_then(VecDeque::pop_front) {
                    Some(post) => ready.extend(into.take().map(|into| (*from, into, post))),
                    None => blocked.push(*from),
                }
            }
            if !ready.is_empty() {
                drop(state);
                left -= ready.len();
                let posts = ready.iter().map(|(from, _, post)| (*from, post.id)).collect();
                let guard = Release { group: self, posts };
                // A failure is told before the senders are released, so that they see it too.
                let copied = self.receive(ready).map_err(|error| {
                    let mut state = self.shared.lock();
                    self.shared.fail(&mut state, error)
                });
                drop(guard);
                copied?;
                self.alive();
                start = Instant::now();
                state = self.shared.lock();
                continue;
            }
            if left == 0 && state.open[self.rank as usize].is_empty() {
                return Ok(());
            }
            state = self.wait(state, start, "exchange", |state| {
                let open = state.open[self.rank as usize].iter().map(|&(_, to)| to);
                blocked.iter().copied().chain(open).collect()
            })?;
        }
    }
}

/// Releases senders also when the copier panics.
struct Release<'a> {
    group: &'a LocalGroup,
    /// Sender and post.
    posts: Vec<(u32, u64)>,
}

impl Drop for Release<'_> {
    fn drop(&mut self) {
        let mut state = self.group.shared.lock();
        for &(from, id) in &self.posts {
            self.group.release(&mut state, from, id);
        }
    }
}

impl Control for LocalGroup {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world
    }

    fn deadline(&self) -> Duration {
        self.shared.deadline
    }

    fn signs(&self) -> &Signs {
        &self.shared.signs
    }

    fn gather_messages(&self, message: &[u8]) -> Result<Vec<Vec<u8>>, GroupError> {
        let mut turn = self.gathers.lock().unwrap_or_else(PoisonError::into_inner);
        let _waiting = self.shared.signs.wait(self.rank);
        *turn += 1;
        let (start, turn, world) = (Instant::now(), *turn, self.world as usize);
        let mut state = self.shared.lock();
        if let Some(error) = &state.failure {
            return Err(error.clone());
        }
        let fresh = || Gather { messages: vec![None; world], unread: self.world };
        let gather = state.gathers.entry(turn).or_insert_with(fresh);
        gather.messages[self.rank as usize] = Some(message.to_vec());
        if gather.messages.iter().all(Option::is_some) {
            self.shared.wake.iter().for_each(Condvar::notify_all);
        }
        let missing = |state: &State| -> Vec<u32> {
            let gather = state.gathers.get(&turn);
            let messages = gather.map_or(&[][..], |gather| &gather.messages);
            (0u32..).zip(messages).filter(|(_, m)| m.is_none()).map(|(rank, _)| rank).collect()
        };
        // A gathering that all have joined is complete even if the group fails meanwhile: all ranks
        // see the same outcome.
        while !missing(&state).is_empty() {
            state = self.wait(state, start, "gather", missing)?;
        }
        let Some(gather) = state.gathers.get_mut(&turn) else {
            return Ok(Vec::new());
        };
        gather.unread -= 1;
        let messages = match gather.unread {
            0 => state.gathers.remove(&turn).map(|gather| gather.messages).unwrap_or_default(),
            _ => gather.messages.clone(),
        };
        Ok(messages.into_iter().flatten().collect())
    }

    fn abort(&self, cause: &str) {
        let mut state = self.shared.lock();
        let error = GroupError::Aborted { rank: self.rank, cause: cause.to_owned() };
        self.shared.fail(&mut state, error);
    }

    fn failure(&self) -> Option<GroupError> {
        self.shared.lock().failure.clone()
    }
}

impl Group for LocalGroup {
    fn reaches(&self, space: Space) -> bool {
        self.shared.copier.reaches(space)
    }

    fn occupancy(&self) -> &Occupancy {
        &self.occupancy
    }

    fn exchange(&self, batch: Vec<Op<'_>>) -> Result<(), GroupError> {
        check_peers(&batch, self.rank, self.world)?;
        /// Posts must not outlive the borrow of their bytes, however this call ends.
        struct Withdraw<'a>(&'a LocalGroup);
        impl Drop for Withdraw<'_> {
            fn drop(&mut self) {
                self.0.withdraw();
            }
        }
        let mut receives = Vec::new();
        let _waiting = self.shared.signs.wait(self.rank);
        let _withdraw = Withdraw(self);
        {
            let mut guard = self.shared.lock();
            let state = &mut *guard;
            if let Some(error) = &state.failure {
                return Err(error.clone());
            }
            let mut post = |to: u32, data: Src<'_>| {
                state.next_id += 1;
                let id = state.next_id;
                let (addr, len, space) = (data.addr(), data.len(), data.space());
                let posts = state.posts.entry((self.rank, to)).or_default();
                posts.push_back(Post { id, addr, len, space });
                state.open[self.rank as usize].push((id, to));
                self.shared.wake[to as usize].notify_all();
            };
            for op in batch {
                match op {
                    Op::Send { to, data } => post(to, data),
                    Op::Broadcast { data } => {
                        (0..self.world).filter(|&to| to != self.rank).for_each(|to| post(to, data));
                    }
                    Op::Recv { from, into } | Op::BroadcastFrom { root: from, into } => {
                        receives.push((from, Some(into)));
                    }
                }
            }
        }
        self.run(receives)
    }
}

impl Drop for LocalGroup {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.left[self.rank as usize] = true;
        if std::thread::panicking() {
            let cause = "its thread panicked".to_owned();
            self.shared.fail(&mut state, GroupError::Lost { rank: self.rank, cause });
        }
        self.shared.wake.iter().for_each(Condvar::notify_all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Says which of the copies may have failed.
    struct Refuses(Vec<usize>);

    impl Copier for Refuses {
        fn reaches(&self, _: Space) -> bool {
            true
        }

        fn copy(&self, _: Src<'_>, _: Dst<'_>) -> Result<(), CopyError> {
            Err("no".into())
        }

        fn copy_all(&self, _: Vec<(Src<'_>, Dst<'_>)>) -> Result<(), (Vec<usize>, CopyError)> {
            Err((self.0.clone(), "no".into()))
        }
    }

    #[test]
    fn a_failed_copy_names_its_sender_and_no_other() {
        let said = |positions: &[usize]| {
            let group = &LocalGroup::with(4, Refuses(positions.to_vec()), DEFAULT_DEADLINE)[0];
            let sent = [0u8; 3];
            let mut into = [[0u8; 3]; 4];
            let post = || Post { id: 0, addr: sent.as_ptr() as u64, len: 3, space: Space::Host };
            let ready = [1, 3, 2, 3].into_iter().zip(&mut into);
            let ready = ready.map(|(from, into)| (from, Dst::from(&mut into[..]), post()));
            group.receive(ready.collect()).unwrap_err().to_string()
        };
        assert_eq!(said(&[2]), "copy of 3 bytes from rank 2 to rank 0: no");
        assert_eq!(said(&[1, 3]), "copy of 6 bytes from rank 3 to rank 0: no");
        assert_eq!(
            said(&[0, 1, 2, 3]),
            "copies of 12 bytes in all from ranks 1, 2, 3 to rank 0: one of them failed: no"
        );
    }
}
