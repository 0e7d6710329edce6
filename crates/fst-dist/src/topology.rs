//! Where the ranks are: which share a node, which share storage, and the rates of both.
//!
//! Rates steer choices and predictions only; a plan made with wrong rates is slower, never wrong.

use crate::error::PlanError;

/// A file store that one or more ranks read from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Storage {
    /// Bytes per second that all its ranks together can read.
    pub bytes_per_s: f64,
    /// Bytes per second that one rank alone can read.
    pub rank_bytes_per_s: f64,
    /// Reads per second that all its ranks together can ask for.
    pub requests_per_s: f64,
}

impl Storage {
    /// Storage that a single rank can saturate, with 200,000 requests per second.
    #[must_use]
    pub fn with_rate(bytes_per_s: f64) -> Self {
        Self { bytes_per_s, rank_bytes_per_s: bytes_per_s, requests_per_s: 200e3 }
    }
}

/// Rates between ranks, each for one rank and one direction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Links {
    /// Bytes per second to ranks of the same node.
    pub node_bytes_per_s: f64,
    /// Bytes per second to ranks of other nodes.
    pub net_bytes_per_s: f64,
    /// Seconds from posting a message to its first byte.
    pub latency_s: f64,
}

/// The place of one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node; ranks of equal node reach each other at `node_bytes_per_s`.
    pub node: u32,
    /// Which storage it reads from; `None` if it cannot read the checkpoint at all.
    pub storage: Option<u32>,
}

/// The ranks with their places, storage and links.
#[derive(Clone, Debug, PartialEq)]
pub struct Topology {
    places: Vec<Place>,
    storages: Vec<Storage>,
    links: Links,
}

/// Rates assumed where nothing was measured: a good NVMe drive, and memory copies within a host.
const STORAGE: Storage = Storage { bytes_per_s: 6e9, rank_bytes_per_s: 6e9, requests_per_s: 400e3 };
const LINKS: Links = Links { node_bytes_per_s: 20e9, net_bytes_per_s: 10e9, latency_s: 20e-6 };

impl Topology {
    /// `world` ranks on one node with one storage, at assumed rates (6 GB/s storage, 20 GB/s links).
    #[must_use]
    pub fn one_node(world: u32) -> Self {
        let places = vec![Place { node: 0, storage: Some(0) }; world as usize];
        Self { places, storages: vec![STORAGE], links: LINKS }
    }

    /// `nodes` nodes of `per_node` ranks that share one storage.
    #[must_use]
    pub fn shared_storage(nodes: u32, per_node: u32) -> Self {
        let place = |node| Place { node, storage: Some(0) };
        Self { places: spread(nodes, per_node, place), storages: vec![STORAGE], links: LINKS }
    }

    /// `nodes` nodes of `per_node` ranks, each node with the checkpoint on storage of its own.
    #[must_use]
    pub fn local_storage(nodes: u32, per_node: u32) -> Self {
        let places = spread(nodes, per_node, |node| Place { node, storage: Some(node) });
        Self { places, storages: vec![STORAGE; nodes as usize], links: LINKS }
    }

    /// Any arrangement.
    ///
    /// # Errors
    /// No ranks, no rank with storage, a storage that is not in the list, or a rate that is not positive.
    pub fn new(
        places: Vec<Place>,
        storages: Vec<Storage>,
        links: Links,
    ) -> Result<Self, PlanError> {
        let topology = Self { places, storages, links };
        topology.check()?;
        Ok(topology)
    }

    /// Replace the rates of every storage.
    #[must_use]
    pub fn with_storage(mut self, storage: Storage) -> Self {
        self.storages.fill(storage);
        self
    }

    /// Replace the rates of the links.
    #[must_use]
    pub fn with_links(mut self, links: Links) -> Self {
        self.links = links;
        self
    }

    /// How many ranks there are.
    #[must_use]
    pub fn world(&self) -> u32 {
        self.places.len() as u32
    }

    /// The places, by rank.
    #[must_use]
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// The storages, as the places number them.
    #[must_use]
    pub fn storages(&self) -> &[Storage] {
        &self.storages
    }

    /// How many ranks are on the node of `rank`, itself included.
    #[must_use]
    pub fn neighbours(&self, rank: u32) -> u32 {
        let node = |place: &Place| place.node;
        let own = self.places.get(rank as usize).map(node);
        self.places.iter().filter(|place| Some(node(place)) == own).count().max(1) as u32
    }

    /// The links.
    #[must_use]
    pub fn links(&self) -> Links {
        self.links
    }

    pub(crate) fn check(&self) -> Result<(), PlanError> {
        if self.places.is_empty() {
            return Err(PlanError::NoRanks);
        }
        for (rank, place) in self.places.iter().enumerate() {
            if let Some(storage) = place.storage
                && storage as usize >= self.storages.len()
            {
                let storages = self.storages.len();
                return Err(PlanError::UnknownStorage { rank: rank as u32, storage, storages });
            }
        }
        if self.places.iter().all(|place| place.storage.is_none()) {
            return Err(PlanError::NoReader);
        }
        let check = |what, rate: f64| {
            let sound = rate.is_finite() && rate > 0.0;
            if sound { Ok(()) } else { Err(PlanError::Rate { what, rate }) }
        };
        for storage in &self.storages {
            check("storage bytes per second", storage.bytes_per_s)?;
            check("storage bytes per second of one rank", storage.rank_bytes_per_s)?;
            check("storage requests per second", storage.requests_per_s)?;
        }
        check("link bytes per second within a node", self.links.node_bytes_per_s)?;
        check("link bytes per second between nodes", self.links.net_bytes_per_s)?;
        check("link latency", self.links.latency_s + f64::MIN_POSITIVE)
    }

    /// For each rank the bytes per second that it reads while all others read too; zero without storage.
    pub(crate) fn read_rates(&self) -> Vec<f64> {
        let mut readers = vec![0u32; self.storages.len()];
        for storage in self.places.iter().filter_map(|place| place.storage) {
            readers[storage as usize] += 1;
        }
        let rate = |place: &Place| {
            let Some(index) = place.storage else {
                return 0.0;
            };
            let storage = self.storages[index as usize];
            storage.rank_bytes_per_s.min(storage.bytes_per_s / f64::from(readers[index as usize]))
        };
        self.places.iter().map(rate).collect()
    }

    /// For each rank the share of the others that is on its node.
    pub(crate) fn same_node(&self) -> Vec<f64> {
        let mut counts = std::collections::HashMap::new();
        for place in &self.places {
            *counts.entry(place.node).or_insert(0u32) += 1;
        }
        let others = (f64::from(self.world()) - 1.0).max(1.0);
        let near = |place: &Place| counts.get(&place.node).copied().unwrap_or(0).saturating_sub(1);
        self.places.iter().map(|place| f64::from(near(place)) / others).collect()
    }

    /// The gap between two wanted pieces that costs as much to read as a further request.
    pub(crate) fn coalesce_gap(&self) -> u64 {
        let gap = |storage: &Storage| (storage.bytes_per_s / storage.requests_per_s) as u64;
        self.storages.iter().map(gap).max().unwrap_or(0).min(1 << 20)
    }
}

fn spread(nodes: u32, per_node: u32, place: impl Fn(u32) -> Place) -> Vec<Place> {
    (0..nodes).flat_map(|node| std::iter::repeat_n(place(node), per_node as usize)).collect()
}
