//! The exchanging thread: each round's own part to its place, the rest to and from the others.

use std::sync::mpsc::{Receiver, Sender};
use std::time::Instant;

use super::reading::Filled;
use super::{ExchangeReport, Landing, Region};
use crate::backend::{Backend, CopyAt};
use crate::error::ExchangeError;
use crate::group::{Group, Op};
use crate::memory::{Dst, Src};
use crate::rank::{RankPlan, Round};
use crate::schedule::LineKind;
use crate::tensor::Strided;

pub(super) struct Trading<'a> {
    pub(super) view: &'a RankPlan<'a>,
    pub(super) group: &'a dyn Group,
    pub(super) backend: &'a dyn Backend,
    pub(super) outputs: &'a [Region],
    pub(super) landing: &'a Landing<'a>,
    /// Staging for packed messages and for messages to unpack.
    pub(super) pack: u64,
    pub(super) receive: u64,
    pub(super) report: ExchangeReport,
}

impl Trading<'_> {
    pub(super) fn run(
        &mut self,
        fills: &Receiver<Filled<'_>>,
        free: Sender<u64>,
    ) -> Result<(), ExchangeError> {
        for round in self.view.rounds() {
            let mut filled = None;
            if round.unit_bytes(round.rank()) > 0 {
                let start = Instant::now();
                // The reading thread ends early on an error only, which it tells itself.
                let Ok(unit) = fills.recv() else { return Ok(()) };
                let Filled { block, addr, bytes } = unit;
                bytes.wait(self.view)?;
                self.report.wait += start.elapsed();
                self.keep(&round, addr)?;
                filled = Some((block, addr));
            }
            let addr = filled.map(|(_, addr)| addr);
            match round.kind() {
                LineKind::Broadcast => self.broadcast(&round, addr)?,
                LineKind::Scatter => self.scatter(&round, addr)?,
            }
            if let Some((block, _)) = filled {
                // The reading thread may be done and gone.
                let _ = free.send(block);
            }
        }
        Ok(())
    }

    /// Moves what this rank keeps of its own unit to its place.
    fn keep(&mut self, round: &Round<'_>, addr: u64) -> Result<(), ExchangeError> {
        let mut copies = Vec::new();
        let mut at = addr;
        for piece in round.unit(round.rank()) {
            if let Some((output, geometry)) = self.view.geometry(piece.tensor) {
                let base = self.outputs[output as usize].addr;
                geometry.copies(&piece.range, |copy| {
                    let src = at + copy.src - piece.range.start;
                    copies.push(at_addresses(copy, src, base + copy.dst));
                });
            }
            at += piece.range.end - piece.range.start;
        }
        self.copy(&copies)
    }

    /// Where the bytes that this rank receives of another's unit go, in the order of the message.
    fn incoming(&self, round: &Round<'_>, from: u32) -> Message {
        let mut message = Message::default();
        for piece in round.unit(from) {
            if let Some((output, geometry)) = self.view.geometry(piece.tensor) {
                let base = self.outputs[output as usize].addr;
                geometry.copies(&piece.range, |copy| {
                    message.push(base + copy.dst, copy.len, copy.count, copy.dst_stride);
                });
            }
        }
        message
    }

    /// Where the bytes that `to` receives of this rank's unit (at `addr`) are.
    fn outgoing(&self, round: &Round<'_>, addr: u64, to: u32) -> Message {
        let mut message = Message::default();
        let mut at = addr;
        for piece in round.unit(round.rank()) {
            let geometry = self.view.plan().geometry(piece.tensor, to);
            geometry.copies(&piece.range, |copy| {
                let src = at + copy.src - piece.range.start;
                message.push(src, copy.len, copy.count, copy.src_stride);
            });
            at += piece.range.end - piece.range.start;
        }
        message
    }

    fn scatter(&mut self, round: &Round<'_>, addr: Option<u64>) -> Result<(), ExchangeError> {
        let (world, rank) = (u64::from(self.view.plan().world()), u64::from(round.rank()));
        let buffers = self.view.plan().buffers();
        let peers = buffers.receive_blocks as usize;
        // Each step is a permutation: nobody gets more than its part at a time.
        let shifts: Vec<u64> = (1..world).collect();
        for shifts in shifts.chunks(peers) {
            let (mut batch, mut packs, mut unpacks) = (Vec::new(), Vec::new(), Vec::new());
            let mut pack = self.pack;
            for (index, shift) in shifts.iter().enumerate() {
                let to = ((rank + shift) % world) as u32;
                if let Some(addr) = addr {
                    let message = self.outgoing(round, addr, to);
                    let bytes = message.bytes;
                    let data = match message.contiguous() {
                        Some(start) => start,
                        None => {
                            message.pack(pack, &mut packs);
                            pack += bytes;
                            pack - bytes
                        }
                    };
                    if bytes > 0 {
                        batch.push(Op::Send { to, data: self.src(data, bytes) });
                    }
                    self.report.sent_bytes += bytes;
                }
                let from = ((rank + world - shift) % world) as u32;
                let message = self.incoming(round, from);
                let staged = self.receive + index as u64 * buffers.block;
                if let Some(into) = self.receive_into(&message, staged, &mut unpacks) {
                    batch.push(Op::Recv { from, into });
                }
            }
            self.trade(&packs, batch, &unpacks)?;
        }
        Ok(())
    }

    fn broadcast(&mut self, round: &Round<'_>, addr: Option<u64>) -> Result<(), ExchangeError> {
        let buffers = self.view.plan().buffers();
        let world = self.view.plan().world();
        let others = u64::from(world - 1);
        let roots: Vec<u32> = (0..world).filter(|&root| round.unit_bytes(root) > 0).collect();
        for roots in roots.chunks(buffers.receive_blocks as usize) {
            let (mut batch, mut unpacks) = (Vec::new(), Vec::new());
            for (index, &root) in roots.iter().enumerate() {
                let bytes = round.unit_bytes(root);
                if root == round.rank()
                    && let Some(addr) = addr
                {
                    batch.push(Op::Broadcast { data: self.src(addr, bytes) });
                    self.report.sent_bytes += bytes * others;
                    continue;
                }
                let message = self.incoming(round, root);
                let staged = self.receive + index as u64 * buffers.block;
                if let Some(into) = self.receive_into(&message, staged, &mut unpacks) {
                    batch.push(Op::BroadcastFrom { root, into });
                }
            }
            self.trade(&[], batch, &unpacks)?;
        }
        Ok(())
    }

    fn src<'m>(&self, addr: u64, bytes: u64) -> Src<'m> {
        // SAFETY: a part of a filled block, or of the pack buffer which `trade` fills first; neither is
        // written before the batch is done.
        unsafe { Src::from_addr(addr, bytes as usize, self.backend.space()) }
    }

    /// The memory to receive a message into: its place, or `staged` to be unpacked from.
    fn receive_into<'m>(
        &mut self,
        message: &Message,
        staged: u64,
        unpacks: &mut Vec<CopyAt>,
    ) -> Option<Dst<'m>> {
        if message.bytes == 0 {
            return None;
        }
        self.report.received_bytes += message.bytes;
        let addr = message.contiguous().unwrap_or_else(|| {
            message.unpack(staged, unpacks);
            staged
        });
        // SAFETY: a part of the outputs that the plan gives to this message alone, or a block of the
        // receive buffer used once in a batch.
        Some(unsafe { Dst::from_addr(addr, message.bytes as usize, self.backend.space()) })
    }

    fn trade(
        &mut self,
        packs: &[CopyAt],
        batch: Vec<Op<'_>>,
        unpacks: &[CopyAt],
    ) -> Result<(), ExchangeError> {
        self.copy(packs)?;
        let start = Instant::now();
        // What goes through staging memory lands when it is unpacked.
        let received: Vec<(u64, usize)> = batch.iter().filter_map(into_of).collect();
        if !batch.is_empty() {
            self.group.exchange(batch)?;
        }
        self.report.exchange += start.elapsed();
        received.iter().for_each(|(addr, len)| self.landing.add(*addr, *len as u64));
        self.copy(unpacks)
    }

    fn copy(&mut self, copies: &[CopyAt]) -> Result<(), ExchangeError> {
        if copies.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        // SAFETY: between this thread's blocks and buffers and parts of the outputs that the plan
        // gives to them alone.
        let copied = unsafe { self.backend.copy(copies) };
        self.report.copy += start.elapsed();
        copied.map_err(|source| ExchangeError::Copy { rank: self.view.rank(), source })?;
        self.landing.copied(copies);
        Ok(())
    }
}

/// Where an operation receives.
fn into_of(op: &Op<'_>) -> Option<(u64, usize)> {
    match op {
        Op::Recv { into, .. } | Op::BroadcastFrom { into, .. } => Some((into.addr(), into.len())),
        _ => None,
    }
}

fn at_addresses(copy: Strided, src: u64, dst: u64) -> CopyAt {
    let Strided { len, count, src_stride, dst_stride, .. } = copy;
    CopyAt { src, dst, len, count, src_stride, dst_stride }
}

/// The pieces of a message in one rank's memory, in the order of its bytes.
#[derive(Debug, Default)]
struct Message {
    /// Address, length, count and stride.
    pieces: Vec<(u64, u64, u64, u64)>,
    bytes: u64,
}

impl Message {
    fn push(&mut self, addr: u64, len: u64, count: u64, stride: u64) {
        self.bytes += len * count;
        let (len, count, stride) = if count > 1 && stride == len {
            (len * count, 1, len * count)
        } else {
            (len, count, stride)
        };
        match self.pieces.last_mut() {
            Some((last, last_len, 1, _)) if count == 1 && *last + *last_len == addr => {
                *last_len += len;
            }
            _ => self.pieces.push((addr, len, count, stride)),
        }
    }

    fn contiguous(&self) -> Option<u64> {
        match self.pieces[..] {
            [(addr, _, 1, _)] => Some(addr),
            _ => None,
        }
    }

    fn pack(&self, mut to: u64, copies: &mut Vec<CopyAt>) {
        for &(src, len, count, src_stride) in &self.pieces {
            copies.push(CopyAt { src, dst: to, len, count, src_stride, dst_stride: len });
            to += len * count;
        }
    }

    fn unpack(&self, mut from: u64, copies: &mut Vec<CopyAt>) {
        for &(dst, len, count, dst_stride) in &self.pieces {
            copies.push(CopyAt { src: from, dst, len, count, src_stride: len, dst_stride });
            from += len * count;
        }
    }
}
