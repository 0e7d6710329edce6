//! Landing in place: host arenas in which every segment of a plan has its final position.
//!
//! [`Layout`] decides (pure); [`InPlace`] is the sink that lends the places out.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::buffer::{HUGE_PAGE, HostBuffer};
use crate::error::Error;
use crate::extent::Extent;
use crate::plan::{Block, ReadPlan};
use crate::sink::{Sink, SinkError, Target};

/// Where a segment lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Index of the arena.
    pub arena: usize,
    /// Offset in bytes of the segment's first byte from the arena's start.
    pub offset: u64,
}

/// The arenas that a plan's segments fill, and each segment's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    arenas: Vec<u64>,
    places: Vec<Place>,
}

impl Layout {
    /// Packs the plan's segments, in order, into arenas of at most `arena` bytes; a longer segment
    /// has an arena of its own.
    pub fn new(plan: &ReadPlan, arena: u64) -> Self {
        /// From this length on a segment starts at its file offset modulo a huge page, so that a
        /// block covers whole huge pages and no two workers fault the same one.
        const LARGE: u64 = 64 << 20;
        let huge = HUGE_PAGE as u64;
        let mut layout = Self {
            arenas: Vec::new(),
            places: Vec::new(),
        };
        for segment in plan.segments() {
            let at = |end: u64| match segment.len() {
                LARGE.. => {
                    let phase = segment.start % huge;
                    (end.saturating_sub(phase)).next_multiple_of(huge) + phase
                }
                _ => end.next_multiple_of(plan.limits().align),
            };
            let place = match layout.arenas.last_mut() {
                Some(end) if at(*end) + segment.len() <= arena => {
                    let offset = at(*end);
                    *end = offset + segment.len();
                    Place {
                        arena: layout.arenas.len() - 1,
                        offset,
                    }
                }
                _ => {
                    let offset = at(0);
                    layout.arenas.push(offset + segment.len());
                    Place {
                        arena: layout.arenas.len() - 1,
                        offset,
                    }
                }
            };
            layout.places.push(place);
        }
        layout
    }

    /// Length of each arena in bytes.
    pub fn arenas(&self) -> &[u64] {
        &self.arenas
    }

    /// Each segment's place, in the order of [`ReadPlan::segments`].
    pub fn places(&self) -> &[Place] {
        &self.places
    }

    /// Where the first byte of extent number `extent` lands. `None` for extents without bytes.
    pub fn extent(&self, plan: &ReadPlan, extent: u32) -> Option<Place> {
        let Extent { offset, len, .. } = *plan.extents().get(extent as usize)?;
        if len == 0 {
            return None;
        }
        let after = plan
            .segments()
            .partition_point(|s| s.extents.start <= extent);
        let index = after.checked_sub(1)?;
        let segment = plan.segments().get(index)?;
        if !segment.extents.contains(&extent) {
            return None;
        }
        let place = self.places.get(index)?;
        Some(Place {
            arena: place.arena,
            offset: place.offset + offset - segment.start,
        })
    }
}

/// Told when a block is in place, from reader threads.
pub type OnLanded<'a> = &'a (dyn Fn(&Block) + Send + Sync);

/// The sink of loads into host memory: each block of one plan has its place from the start.
pub struct InPlace<'a> {
    plan: &'a ReadPlan,
    layout: &'a Layout,
    arenas: Vec<Arc<HostBuffer>>,
    /// Per block of the plan: whether its place has been lent. Each is lent once, ever.
    lent: Vec<AtomicBool>,
    on_landed: Option<OnLanded<'a>>,
}

impl fmt::Debug for InPlace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InPlace")
            .field("arenas", &self.arenas)
            .finish_non_exhaustive()
    }
}

/// A block was handed to [`InPlace`] that it has no (more) place for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("block {index} at offset {offset} of file {file} has no place, or had it already")]
pub struct NoPlace {
    /// Index of the block.
    pub index: u32,
    /// Index of its file.
    pub file: u32,
    /// Its first byte in the file.
    pub offset: u64,
}

impl<'a> InPlace<'a> {
    /// Reserves the arenas of `layout`, which was made for `plan`.
    ///
    /// # Errors
    ///
    /// [`Error::Memory`].
    pub fn new(plan: &'a ReadPlan, layout: &'a Layout) -> Result<Self, Error> {
        let arenas = layout
            .arenas()
            .iter()
            .map(|len| {
                let bytes = usize::try_from(*len).map_err(|_| Error::Memory {
                    bytes: *len,
                    source: std::io::ErrorKind::OutOfMemory.into(),
                })?;
                Ok(Arc::new(HostBuffer::new(bytes)?))
            })
            .collect::<Result<_, Error>>()?;
        let lent = plan
            .blocks()
            .iter()
            .map(|_| AtomicBool::new(false))
            .collect();
        Ok(Self {
            plan,
            layout,
            arenas,
            lent,
            on_landed: None,
        })
    }

    /// Calls `hook` for each block that has landed, on the thread that read it.
    pub fn on_landed(mut self, hook: OnLanded<'a>) -> Self {
        self.on_landed = Some(hook);
        self
    }

    /// The arenas, to be read once the read is over.
    pub fn into_arenas(self) -> Vec<Arc<HostBuffer>> {
        self.arenas
    }

    /// The place of a block of this plan that was not lent before.
    fn place(&self, block: &Block) -> Option<Target> {
        let index = block.index as usize;
        if self.plan.blocks().get(index)? != block || self.lent[index].swap(true, Relaxed) {
            return None;
        }
        let segment = self.plan.segments().get(block.segment as usize)?;
        let place = self.layout.places().get(block.segment as usize)?;
        let arena = self.arenas.get(place.arena)?;
        let offset = usize::try_from(place.offset + (block.offset - segment.start)).ok()?;
        let capacity = arena.capacity().checked_sub(offset)?;
        let len = usize::try_from(block.len).ok()?;
        let ptr = NonNull::new(arena.as_ptr().as_ptr().wrapping_add(offset))?;
        (len <= capacity).then_some(Target {
            ptr,
            capacity: len,
            token: 0,
        })
    }
}

// SAFETY: every target is the place of one block of the plan, lent once in this value's life:
// `place` checks that the block is the plan's own, and the plan's segments lie apart in the layout
// and its blocks apart in their segment. The range was checked to lie in an arena that this value
// owns, and no slice of an arena is made before the read is over: the only way to them,
// `into_arenas`, takes the sink away from the readers that borrow it.
unsafe impl Sink for InPlace<'_> {
    fn reserve(&self, block: &Block, _wait: bool) -> Result<Option<Target>, SinkError> {
        let Block {
            index,
            file,
            offset,
            ..
        } = *block;
        self.place(block).map(Some).ok_or_else(|| {
            NoPlace {
                index,
                file,
                offset,
            }
            .into()
        })
    }

    fn landed(&self, block: &Block, _target: Target) -> Result<(), SinkError> {
        if let Some(hook) = self.on_landed {
            hook(block);
        }
        Ok(())
    }

    fn abandoned(&self, _block: &Block, _target: Target) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Limits;

    fn plan(lens: &[u64]) -> ReadPlan {
        let mut at = 0;
        let extents = lens.iter().map(|len| {
            at += 1 << 20;
            let extent = Extent {
                file: 0,
                offset: at + 100,
                len: *len,
            };
            at += len;
            extent
        });
        ReadPlan::new(extents.collect(), Limits::default()).unwrap()
    }

    #[test]
    fn segments_lie_apart_and_inside_their_arena() {
        let plan = plan(&[1, 5000, 100 << 20, 3 << 20, 0, 70 << 20, 300 << 20]);
        for arena in [1, 200 << 20, u64::MAX] {
            let layout = Layout::new(&plan, arena);
            let mut used: Vec<_> = plan.segments().iter().zip(layout.places()).collect();
            used.sort_by_key(|(_, place)| (place.arena, place.offset));
            for pair in used.windows(2) {
                let (segment, place) = pair[0];
                if place.arena == pair[1].1.arena {
                    assert!(place.offset + segment.len() <= pair[1].1.offset);
                }
            }
            for (segment, place) in used {
                assert_eq!(place.offset % 4096, segment.start % 4096);
                assert!(place.offset + segment.len() <= layout.arenas()[place.arena]);
                if segment.len() >= 64 << 20 {
                    assert_eq!(place.offset % (2 << 20), segment.start % (2 << 20));
                }
            }
            let seen: Vec<_> = (0..7).map(|i| layout.extent(&plan, i).is_some()).collect();
            assert_eq!(seen, [true, true, true, true, false, true, true]);
            assert_eq!(layout.extent(&plan, 0).unwrap().offset % 4096, 100);
        }
    }

    #[test]
    fn a_place_is_lent_once_and_to_its_plan_only() {
        let plan = plan(&[10]);
        let layout = Layout::new(&plan, u64::MAX);
        let sink = InPlace::new(&plan, &layout).unwrap();
        let mut foreign = plan.blocks()[0].clone();
        foreign.len *= 1000;
        assert!(sink.reserve(&foreign, true).is_err());
        assert!(sink.reserve(&plan.blocks()[0], true).unwrap().is_some());
        assert!(sink.reserve(&plan.blocks()[0], true).is_err());
    }
}
