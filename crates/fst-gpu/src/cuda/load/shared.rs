//! Loads to devices that have no memory but the host's: pieces are read, cut and converted into host memory,
//! which the device then reads where it is.

use std::sync::Arc;

use fst_io::watch::Watch;
use fst_io::{Budget, ReadOptions, ReadStats, SourceFile};

use super::{CudaMemory, Result, host_options};
use crate::cuda::buffer::device::{DEVICE_ALIGN, DeviceArena};
use crate::cuda::device::CudaDevice;
use crate::device_copy::{DeviceCopy, DeviceOptions};
use crate::host::HostLoad;
use crate::load::{ArenaOptions, Deliver, Filled, PieceLoad};
use crate::piece::Piece;

#[derive(Debug)]
pub(super) struct SharedLoad {
    /// For each piece, the device that it is for, unless that is the host.
    devices: Vec<Option<CudaDevice>>,
    load: HostLoad,
    options: DeviceOptions,
}

impl SharedLoad {
    pub(super) fn new(
        files: Arc<Vec<SourceFile>>,
        pieces: Vec<Piece>,
        devices: &[Option<CudaDevice>],
        arenas: ArenaOptions,
        options: DeviceOptions,
    ) -> Result<Self> {
        // Where they lie in the file, few pieces have the alignment that kernels want.
        let aligned = |piece: &Piece| {
            piece.unchanged().is_some_and(|range| range.start.is_multiple_of(DEVICE_ALIGN))
        };
        let all = pieces.iter().all(|piece| piece.is_empty() || aligned(piece));
        let in_place = |piece: &Piece| all && aligned(piece);
        let device = |piece: &Piece| devices.get(piece.device as usize).cloned().flatten();
        let devices = pieces.iter().map(device).collect();
        let load = HostLoad::with(files, pieces, arenas.bytes.max(1), DEVICE_ALIGN, in_place)?;
        Ok(Self { devices, load: load.keeping(arenas.keep), options })
    }
}

impl PieceLoad for SharedLoad {
    fn files(&self) -> &[SourceFile] {
        self.load.files()
    }

    fn bytes_read(&self) -> u64 {
        self.load.bytes_read()
    }

    fn least_memory(&self, in_order: bool) -> u64 {
        self.load.least_memory(in_order)
    }

    fn scratch(&self, read: &ReadOptions, budget: bool) -> u64 {
        self.load.scratch(read, budget)
    }

    fn host_memory(&self, read: &ReadOptions, budget: Option<u64>) -> u64 {
        self.load.host_memory(read, budget)
    }

    fn check_memory(&self, read: &ReadOptions, host: bool) -> Result<()> {
        self.load.check_memory(read, host)
    }

    fn prefer(&self, index: usize, watch: &Watch) {
        self.load.prefer(index, watch);
    }

    fn device_copy(&self) -> Option<DeviceCopy> {
        let reason = "the device has no memory but the host's".to_owned();
        Some(DeviceCopy { asked: self.options.cached, reason, ..DeviceCopy::default() })
    }

    fn run(
        &self,
        options: &ReadOptions,
        budget: Option<&Budget>,
        watch: &Watch,
        deliver: Deliver<'_>,
    ) -> Result<Vec<ReadStats>> {
        let hand_over = |index: usize, filled: Filled| {
            let device = self.devices.get(index).and_then(Option::as_ref);
            let (filled, device) = match (filled, device) {
                (Filled::Host(bytes), Some(device)) => (bytes, device),
                (filled, _) => return deliver(index, filled),
            };
            let memory = CudaMemory::new(DeviceArena::on_host(device, filled));
            deliver(index, Filled::Cuda { memory, offset: 0 })
        };
        self.load.run(&host_options(options), budget, watch, &hand_over)
    }
}
