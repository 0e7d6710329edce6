//! Which way each class of tensors takes, and how much every rank reads.
//!
//! Tensors of equal shape, width and specification form a class; a class is priced and decided once,
//! so the work grows with tensors plus classes times ranks, and memory with tensors alone. A class's
//! ranks are kept as runs of ranks that keep equally much (one or two runs for the usual splits).

use crate::resolved::Resolved;
use crate::topology::Topology;

/// How the bytes of a tensor come to the ranks that keep them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Choice {
    /// Nobody keeps it: nothing is read.
    Nothing,
    /// Each rank reads the part that it keeps.
    Direct,
    /// Each byte is read by one rank of the world, which sends every other rank what it keeps.
    Scatter,
    /// Each byte is read by one rank of the world and goes to all.
    Broadcast,
}

/// Predicted seconds for one tensor, by choice, with all ranks equally busy; `None` where a choice is
/// not open to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Costs {
    /// Each rank reads its own part.
    pub direct: Option<f64>,
    /// Read once by the world, then scattered, or broadcast if all ranks keep all of it.
    pub once: Option<f64>,
}

/// Ranks up to `end` (from the previous span's end) that keep equally much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) end: u32,
    /// Bytes kept by each of them.
    pub(crate) kept: u64,
    /// Bytes and requests of each, were it to read its part directly.
    pub(crate) read: u64,
    pub(crate) requests: u64,
    /// Bytes of the longest piece of a file that such a read takes through a block, as rows with the
    /// gaps between them; 0 if all goes straight to its place.
    pub(crate) staged: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Class {
    pub(crate) resolved: Resolved,
    /// How many tensors there are of it.
    pub(crate) tensors: u64,
    /// Bytes of one tensor.
    pub(crate) bytes: u64,
    pub(crate) profile: Vec<Span>,
    /// Bytes of one tensor kept by all ranks together.
    pub(crate) kept: u64,
    pub(crate) choice: Choice,
    pub(crate) costs: Costs,
}

/// Bytes of one direct read request, when pieces are longer.
const REQUEST: u64 = 1 << 20;

impl Class {
    pub(crate) fn new(resolved: Resolved, gap: u64) -> Self {
        let profile = profile(&resolved, gap);
        let mut start = 0;
        let mut kept = 0;
        for span in &profile {
            kept += u64::from(span.end - start) * span.kept;
            start = span.end;
        }
        let bytes = resolved.outer * resolved.row_bytes();
        let (choice, costs) = (Choice::Nothing, Costs::default());
        Self { resolved, tensors: 0, bytes, profile, kept, choice, costs }
    }

    /// Bytes of one tensor that `rank` keeps.
    pub(crate) fn kept_by(&self, rank: u32) -> u64 {
        let index = self.profile.partition_point(|span| span.end <= rank);
        self.profile.get(index).map_or(0, |span| span.kept)
    }

    /// The longest piece that any rank would read through a block, were it to read directly.
    pub(crate) fn staged(&self) -> u64 {
        self.profile.iter().map(|span| span.staged).max().unwrap_or(0)
    }

    /// The same of one rank.
    pub(crate) fn staged_by(&self, rank: u32) -> u64 {
        let index = self.profile.partition_point(|span| span.end <= rank);
        self.profile.get(index).map_or(0, |span| span.staged)
    }

    fn reads(&self) -> (u64, u64) {
        let (mut start, mut bytes, mut requests) = (0, 0, 0);
        for span in &self.profile {
            let ranks = u64::from(span.end - start);
            bytes += ranks * span.read;
            requests += ranks * span.requests;
            start = span.end;
        }
        (bytes, requests)
    }
}

fn profile(resolved: &Resolved, gap: u64) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let (rows, row) = (resolved.outer, resolved.row_bytes());
    let mut start = 0;
    for end in resolved.runs() {
        let mut span = Span { end, kept: 0, read: 0, requests: 0, staged: 0 };
        resolved.ranges(start, |range| {
            let len = resolved.bytes_along(range.end - range.start);
            if len == 0 || rows == 0 {
                return;
            }
            span.kept += rows * len;
            let (read, requests) = direct_cost(rows, row, len, gap);
            span.read += read;
            span.requests += requests;
            if rows > 1 && row - len <= gap {
                span.staged = span.staged.max((rows - 1) * row + len);
            }
        });
        start = end;
        spans.push(span);
    }
    spans
}

/// Bytes and requests of reading `len` bytes of each of `rows` rows, gaps of up to `gap` read along.
fn direct_cost(rows: u64, row: u64, len: u64, gap: u64) -> (u64, u64) {
    if row - len <= gap {
        let read = (rows - 1) * row + len;
        (read, read.div_ceil(REQUEST))
    } else {
        (rows * len, rows * len.div_ceil(REQUEST))
    }
}

/// Rates of the whole world, as used to price a class.
struct Model {
    world: f64,
    read_rate: f64,
    request_rate: f64,
    /// Average share of a rank's peers that are on its node.
    near: f64,
    links: crate::topology::Links,
}

impl Model {
    fn new(topology: &Topology) -> Self {
        let near = topology.same_node();
        Self {
            world: f64::from(topology.world()),
            read_rate: topology.read_rates().iter().sum(),
            request_rate: topology.storages().iter().map(|s| s.requests_per_s).sum(),
            near: near.iter().sum::<f64>() / near.len().max(1) as f64,
            links: topology.links(),
        }
    }

    fn read(&self, bytes: u64, requests: u64) -> f64 {
        (bytes as f64 / self.read_rate).max(requests as f64 / self.request_rate)
    }

    /// Seconds to receive `bytes`.
    fn receive(&self, bytes: f64) -> f64 {
        bytes * self.near / self.links.node_bytes_per_s
            + bytes * (1.0 - self.near) / self.links.net_bytes_per_s
    }

    /// Seconds to broadcast so that each rank receives `bytes`: across nodes each byte travels once per
    /// node, its ranks sharing the work.
    fn broadcast(&self, bytes: f64) -> f64 {
        let on_node = self.near * (self.world - 1.0) + 1.0;
        bytes / self.links.node_bytes_per_s
            + bytes * (1.0 - self.near) / on_node / self.links.net_bytes_per_s
    }

    fn price(&self, class: &Class, direct_open: bool) -> Costs {
        let once_requests = class.bytes.div_ceil(REQUEST);
        let (read, requests) = class.reads();
        let direct = direct_open.then(|| self.read(read, requests));
        let own = 1.0 - 1.0 / self.world;
        let link = if class.resolved.is_replicated() {
            self.broadcast(class.bytes as f64 * own)
        } else {
            self.receive(class.kept as f64 * own / self.world)
        };
        let once = self.read(class.bytes, once_requests).max(link);
        Costs { direct, once: (self.world > 1.0).then_some(once) }
    }
}

/// Decides every class and spreads the reading: by rank, the share of what the world reads once.
pub(crate) fn decide(classes: &mut [Class], topology: &Topology) -> Vec<f64> {
    let model = Model::new(topology);
    let blind: Vec<u32> = (0u32..)
        .zip(topology.places())
        .filter_map(|(rank, place)| place.storage.is_none().then_some(rank))
        .collect();
    for class in classes.iter_mut() {
        let direct_open = blind.iter().all(|&rank| class.kept_by(rank) == 0);
        class.costs = model.price(class, direct_open);
        class.choice = choose(class);
    }
    let rates = topology.read_rates();
    // Classes were priced one by one; together other ways may suit some of them better. Searching from
    // the ends as well finds mixtures that no single step from the middle leads to.
    let mut best = improve(classes, &rates, &model);
    let priced: Vec<Choice> = classes.iter().map(|class| class.choice).collect();
    let mut chosen = priced;
    let ends: [fn(&Class) -> Option<Choice>; 2] =
        [|class| open_choices(class).next(), |class| open_choices(class).last()];
    for end in ends {
        for class in classes.iter_mut() {
            class.choice = end(class).unwrap_or(Choice::Nothing);
        }
        let time = improve(classes, &rates, &model);
        if time < best * 0.99 {
            best = time;
            chosen = classes.iter().map(|class| class.choice).collect();
        }
    }
    for (class, choice) in classes.iter_mut().zip(chosen) {
        class.choice = choice;
    }
    Balance::new(classes, &rates).quotas()
}

/// Changes choices one at a time as long as that brings the finish forward; its predicted seconds.
fn improve(classes: &mut [Class], rates: &[f64], model: &Model) -> f64 {
    let balance = Balance::new(classes, rates);
    let best = balance.finish_time(model);
    let mut search = Search { balance, best, model };
    let mut heavy: Vec<usize> = (0..classes.len()).collect();
    heavy.sort_by_key(|&index| (u64::MAX - classes[index].bytes * classes[index].tensors, index));
    heavy.truncate(32);
    for _ in 0..4 {
        let mut improved = false;
        for &index in &heavy {
            let choices: Vec<Choice> = open_choices(&classes[index]).collect();
            for choice in choices {
                improved |= search.attempt(&mut classes[index], choice, 0.99);
            }
        }
        if !improved {
            break;
        }
    }
    // A rank that would read more than its fair part gives its largest class to all.
    for _ in 0..64 {
        let Some(index) = search.balance.heaviest(classes) else { break };
        let choice = once(&classes[index]);
        if !search.attempt(&mut classes[index], choice, 0.999) {
            break;
        }
    }
    search.best
}

struct Search<'a> {
    balance: Balance<'a>,
    best: f64,
    model: &'a Model,
}

impl Search<'_> {
    /// Changes a choice if that takes the finish below `gain` times the best.
    fn attempt(&mut self, class: &mut Class, choice: Choice, gain: f64) -> bool {
        let before = class.choice;
        if before == choice {
            return false;
        }
        self.balance.add(class, -1.0);
        class.choice = choice;
        self.balance.add(class, 1.0);
        let time = self.balance.finish_time(self.model);
        if time < self.best * gain {
            self.best = time;
            return true;
        }
        self.balance.add(class, -1.0);
        class.choice = before;
        self.balance.add(class, 1.0);
        false
    }
}

/// The choices that a class can take and their costs, the one that moves least first.
fn open_ways(class: &Class) -> impl Iterator<Item = (f64, Choice)> + use<> {
    let ways = [(class.costs.direct, Choice::Direct), (class.costs.once, once(class))];
    let kept = class.kept > 0;
    ways.into_iter().filter_map(move |(cost, choice)| Some((cost.filter(|_| kept)?, choice)))
}

fn open_choices(class: &Class) -> impl Iterator<Item = Choice> + use<> {
    open_ways(class).map(|(_, choice)| choice)
}

fn once(class: &Class) -> Choice {
    if class.resolved.is_replicated() { Choice::Broadcast } else { Choice::Scatter }
}

/// The cheapest choice; what moves least bytes unless another is 1% better.
fn choose(class: &Class) -> Choice {
    let mut best = (f64::INFINITY, if class.kept > 0 { Choice::Direct } else { Choice::Nothing });
    for (seconds, choice) in open_ways(class) {
        if seconds < best.0 * 0.99 {
            best = (seconds, choice);
        }
    }
    best.1
}

/// Sums over all classes, by rank.
struct Balance<'a> {
    rates: &'a [f64],
    /// Bytes each rank reads directly, and keeps of what is read once.
    direct: Vec<f64>,
    kept_once: Vec<f64>,
    /// Bytes read once.
    world: f64,
}

impl<'a> Balance<'a> {
    fn new(classes: &[Class], rates: &'a [f64]) -> Self {
        let zero = vec![0.0; rates.len() + 1];
        let mut sums = Self { rates, direct: zero.clone(), kept_once: zero, world: 0.0 };
        // Differences first: a span costs two additions, however many ranks it has.
        for class in classes {
            let list = match class.choice {
                Choice::Direct => &mut sums.direct,
                Choice::Nothing => continue,
                _ => &mut sums.kept_once,
            };
            let mut start = 0;
            for span in &class.profile {
                let bytes = if class.choice == Choice::Direct { span.read } else { span.kept };
                let bytes = (bytes * class.tensors) as f64;
                list[start as usize] += bytes;
                list[span.end as usize] -= bytes;
                start = span.end;
            }
            sums.add_once(class, 1.0);
        }
        for list in [&mut sums.direct, &mut sums.kept_once] {
            for rank in 1..list.len() {
                list[rank] += list[rank - 1];
            }
            list.pop();
            // Sums of differences may leave a rest of rounding.
            list.iter_mut().for_each(|bytes| *bytes = bytes.max(0.0));
        }
        sums
    }

    fn add_once(&mut self, class: &Class, sign: f64) {
        if matches!(class.choice, Choice::Scatter | Choice::Broadcast) {
            self.world += sign * (class.bytes * class.tensors) as f64;
        }
    }

    fn add(&mut self, class: &Class, sign: f64) {
        let mut start = 0;
        for span in &class.profile {
            for rank in start as usize..span.end as usize {
                let tensors = sign * class.tensors as f64;
                match class.choice {
                    Choice::Nothing => {}
                    Choice::Direct => self.direct[rank] += tensors * span.read as f64,
                    _ => self.kept_once[rank] += tensors * span.kept as f64,
                }
            }
            start = span.end;
        }
        self.add_once(class, sign);
    }

    /// The class with most direct bytes on the most loaded rank, if that rank has more than its part.
    fn heaviest(&self, classes: &[Class]) -> Option<usize> {
        let time = |rank: usize| match self.rates[rank] {
            rate if rate > 0.0 => self.direct[rank] / rate,
            _ => 0.0,
        };
        let most = (0..self.rates.len()).max_by(|&a, &b| time(a).total_cmp(&time(b)))?;
        let mean = self.direct.iter().sum::<f64>() / self.rates.iter().sum::<f64>();
        if time(most) <= mean * 1.05 {
            return None;
        }
        let bytes = |class: &Class| {
            let span = class.profile.partition_point(|span| span.end as usize <= most);
            class.profile.get(span).map_or(0, |span| span.read * class.tensors)
        };
        let direct = |(_, class): &(usize, &Class)| {
            class.choice == Choice::Direct && class.costs.once.is_some() && bytes(class) > 0
        };
        let open = classes.iter().enumerate().filter(direct);
        open.max_by_key(|(index, class)| (bytes(class), usize::MAX - index)).map(|(index, _)| index)
    }

    fn quotas(&self) -> Vec<f64> {
        fill(&self.direct, self.rates, self.world)
    }

    /// Predicted seconds of the whole, near enough to compare choices.
    fn finish_time(&self, model: &Model) -> f64 {
        let mut worst = 0.0f64;
        for ((rank, &rate), quota) in self.rates.iter().enumerate().zip(self.quotas()) {
            if rate > 0.0 {
                worst = worst.max((self.direct[rank] + quota * self.world) / rate);
            }
            worst = worst.max(model.receive(self.kept_once[rank] * (1.0 - quota)));
        }
        worst
    }
}

/// Shares (adding up to one) of `bytes` for each rank such that all finish reading together, as far as
/// what they read already allows.
fn fill(load: &[f64], rates: &[f64], bytes: f64) -> Vec<f64> {
    let time = |rank: usize| load[rank] / rates[rank];
    let mut order: Vec<usize> = (0..rates.len()).filter(|&rank| rates[rank] > 0.0).collect();
    order.sort_by(|&a, &b| time(a).total_cmp(&time(b)).then(a.cmp(&b)));
    // Raise the level until the next rank joins or the bytes are placed.
    let (mut rates_below, mut placed, mut level) = (0.0, 0.0, 0.0);
    for (index, &rank) in order.iter().enumerate() {
        let start = time(rank);
        if index > 0 {
            let room = (start - level) * rates_below;
            if placed + room >= bytes {
                break;
            }
            placed += room;
        }
        level = start;
        rates_below += rates[rank];
    }
    if rates_below > 0.0 {
        level += (bytes - placed) / rates_below;
    }
    let quota = |rank: usize| match rates[rank] {
        rate if rate > 0.0 => ((level - time(rank)) * rate).max(0.0),
        _ => 0.0,
    };
    let quotas: Vec<f64> = (0..rates.len()).map(quota).collect();
    // With nothing to place any shares do, but they must add up.
    let shares = if quotas.iter().any(|&quota| quota > 0.0) { &quotas[..] } else { rates };
    let total: f64 = shares.iter().sum();
    shares.iter().map(|share| share / total).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shard::Shard;
    use crate::topology::{Links, Storage};

    #[test]
    fn filling_levels_what_ranks_read() {
        let load = [10.0, 0.0, 4.0, 0.0];
        // The third rank reads at half the rate; the fourth not at all.
        let rates = [1.0, 1.0, 0.5, 0.0];
        let shares = fill(&load, &rates, 9.0);
        // Levels: rank 1 to 8 s takes 8, then ranks 1 and 2 share the last byte 2:1.
        let expect = [0.0, 8.0 + 2.0 / 3.0, 1.0 / 3.0, 0.0];
        for (share, expect) in shares.iter().zip(expect) {
            assert!((share * 9.0 - expect).abs() < 1e-9, "{shares:?}");
        }
    }

    /// Tries every choice of every class.
    fn best_time(classes: &mut [Class], topology: &Topology) -> f64 {
        let model = Model::new(topology);
        let rates = topology.read_rates();
        let open: Vec<Vec<Choice>> =
            classes.iter().map(|class| open_choices(class).collect()).collect();
        let count: usize = open.iter().map(Vec::len).product();
        let mut best = f64::INFINITY;
        for mut number in 0..count {
            for (class, open) in classes.iter_mut().zip(&open) {
                class.choice = open[number % open.len()];
                number /= open.len();
            }
            best = best.min(Balance::new(classes, &rates).finish_time(&model));
        }
        best
    }

    proptest! {
        /// Deciding class by class is near the best of all combinations.
        #[test]
        fn decisions_are_near_the_best_of_all(
            specs in proptest::collection::vec((0u32..6, 1u64..2000, 1u64..200), 1..6),
            storage in prop_oneof![Just(1e9), Just(1e10), Just(1e11)],
            links in prop_oneof![Just(1e9), Just(1e10), Just(1e11)],
            nodes in 1u32..3,
            local in any::<bool>(),
        ) {
            let topology = match local {
                true => Topology::local_storage(nodes, 4),
                false => Topology::shared_storage(nodes, 4),
            };
            let links = Links { node_bytes_per_s: links, net_bytes_per_s: links / 4.0, latency_s: 0.0 };
            let topology = topology.with_storage(Storage::with_rate(storage)).with_links(links);
            let world = topology.world();
            let mut classes: Vec<Class> = specs.iter().map(|&(kind, rows, tensors)| {
                let shard = match kind {
                    0 => Shard::replicate(),
                    1 => Shard::split(0),
                    2 | 3 => Shard::split(1),
                    _ => Shard::keep_on(kind % world),
                };
                let resolved = Resolved::new(&shard, 16, &[rows, 4096], world).unwrap();
                let mut class = Class::new(resolved, topology.coalesce_gap());
                class.tensors = tensors;
                class
            }).collect();
            decide(&mut classes, &topology);
            let rates = topology.read_rates();
            let found = Balance::new(&classes, &rates)
                .finish_time(&Model::new(&topology));
            let chosen: Vec<Choice> = classes.iter().map(|class| class.choice).collect();
            let best = best_time(&mut classes, &topology);
            prop_assert!(found <= best * 1.3, "{found} against {best}: {chosen:?}");
        }
    }
}
