//! Landing in place: host arenas in which every segment of a plan has its final position.
//!
//! [`Layout`] decides (pure); [`InPlace`] is the sink that lends the places out.

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::arenas::{Arenas, OnArena};
use crate::budget::Budget;
use crate::buffer::{HUGE_PAGE, HostBuffer};
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
        let mut layout = Self { arenas: Vec::new(), places: Vec::new() };
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
                    Place { arena: layout.arenas.len() - 1, offset }
                }
                _ => {
                    let offset = at(0);
                    layout.arenas.push(offset + segment.len());
                    Place { arena: layout.arenas.len() - 1, offset }
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
        let after = plan.segments().partition_point(|s| s.extents.start <= extent);
        let index = after.checked_sub(1)?;
        let segment = plan.segments().get(index)?;
        if !segment.extents.contains(&extent) {
            return None;
        }
        let place = self.places.get(index)?;
        Some(Place { arena: place.arena, offset: place.offset + offset - segment.start })
    }
}

const FREE: u8 = 0;
const LENT: u8 = 1;
const LANDED: u8 = 2;

/// Told when a block is in place, from reader threads.
pub type OnLanded<'a> = &'a (dyn Fn(&Block) + Send + Sync);

/// The sink of loads into host memory: each block of one plan has its place from the start.
///
/// An arena is reserved when its first block is read, within the budget if there is one, and
/// handed over when its last block has landed.
pub struct InPlace<'a> {
    plan: &'a ReadPlan,
    layout: &'a Layout,
    arenas: Arenas<'a>,
    /// Per block of the plan: [`FREE`], then [`LENT`] once, then [`LANDED`].
    state: Vec<AtomicU8>,
    on_landed: Option<OnLanded<'a>>,
}

impl fmt::Debug for InPlace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InPlace").field("arenas", &self.arenas).finish_non_exhaustive()
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
    /// A sink for `plan`, whose arenas are those of `layout`, made for the same plan. Every arena
    /// goes to `on_arena` once, when it is complete. With a budget, the arenas that live at once,
    /// here or with whoever holds them, stay within it; one that is larger ends the read.
    pub fn new(
        plan: &'a ReadPlan,
        layout: &'a Layout,
        budget: Option<&'a Budget>,
        on_arena: OnArena<'a>,
    ) -> Self {
        let mut arenas: Vec<_> = layout.arenas().iter().map(|len| (*len, 0)).collect();
        for (segment, place) in plan.segments().iter().zip(layout.places()) {
            arenas[place.arena].1 += segment.blocks.len() as u64;
        }
        Self {
            plan,
            layout,
            arenas: Arenas::new(arenas, budget, on_arena),
            state: plan.blocks().iter().map(|_| AtomicU8::new(FREE)).collect(),
            on_landed: None,
        }
    }

    /// Calls `hook` for each block that has landed, on the thread that read it.
    pub fn on_landed(mut self, hook: OnLanded<'a>) -> Self {
        self.on_landed = Some(hook);
        self
    }

    fn arena_of(&self, block: &Block) -> Option<usize> {
        Some(self.layout.places().get(block.segment as usize)?.arena)
    }

    /// The place of a block in its arena.
    fn place(&self, block: &Block, arena: &HostBuffer) -> Option<Target> {
        let segment = self.plan.segments().get(block.segment as usize)?;
        let place = self.layout.places().get(block.segment as usize)?;
        let offset = usize::try_from(place.offset + (block.offset - segment.start)).ok()?;
        let capacity = arena.capacity().checked_sub(offset)?;
        let len = usize::try_from(block.len).ok()?;
        let ptr = NonNull::new(arena.as_ptr().as_ptr().wrapping_add(offset))?;
        if len > capacity {
            return None;
        }
        // SAFETY: the range lies in the arena, and is this block's alone; `Sink` below says why
        // it stays so.
        Some(unsafe { Target::new(ptr, len, 0) }.fresh())
    }
}

// SAFETY: every target is the place of one block of the plan, lent once in this value's life:
// `reserve` checks that the block is the plan's own and `FREE`; the plan's segments
// lie apart in the layout, and its blocks apart in their segment. `place` checks that the range
// lies in the arena. The arena cannot go before its blocks have landed: `arenas` holds it until
// then, and readers borrow this value. Nobody else sees an arena before that, when no
// block of it is on loan any more.
unsafe impl Sink for InPlace<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        let Block { index, file, offset, .. } = *block;
        let no_place = || NoPlace { index, file, offset };
        if self.plan.blocks().get(index as usize) != Some(block) {
            return Err(no_place().into());
        }
        let arena = self.arena_of(block).ok_or_else(no_place)?;
        let state = &self.state[index as usize];
        if state.load(Relaxed) != FREE {
            return Err(no_place().into());
        }
        let Some(arena) = self.arenas.get(arena, wait)? else {
            return Ok(None);
        };
        if state.compare_exchange(FREE, LENT, Relaxed, Relaxed).is_err() {
            return Err(no_place().into());
        }
        self.place(block, &arena).map(Some).ok_or_else(|| no_place().into())
    }

    fn landed(&self, block: &Block, _target: Target) -> Result<(), SinkError> {
        let Block { index, file, offset, .. } = *block;
        let landed = self
            .state
            .get(index as usize)
            .is_some_and(|state| state.compare_exchange(LENT, LANDED, Relaxed, Relaxed).is_ok());
        let Some(index) = self.arena_of(block).filter(|_| landed) else {
            return Err(NoPlace { index, file, offset }.into());
        };
        if let Some(hook) = self.on_landed {
            hook(block);
        }
        // SAFETY: the block went from `LENT` to `LANDED`, once; its target came back, and is not
        // lent again.
        unsafe { self.arenas.fill(index, 1) }
    }

    fn abandoned(&self, _block: &Block, _target: Target) {}

    fn end(&self) {
        self.arenas.wake();
    }

    fn lost(&self, block: &Block, target: Target) -> Option<Target> {
        // The arena lacks this block, and is therefore never handed over.
        let leaked = self.arena_of(block).is_some_and(|arena| self.arenas.leak(arena));
        (!leaked).then_some(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arenas::OverBudget;
    use crate::plan::Limits;

    fn plan(lens: &[u64]) -> ReadPlan {
        let mut at = 0;
        let extents = lens.iter().map(|len| {
            at += 1 << 20;
            let extent = Extent { file: 0, offset: at + 100, len: *len };
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
        let sink = InPlace::new(&plan, &layout, None, &|_, _| Ok(()));
        let mut foreign = plan.blocks()[0].clone();
        foreign.len *= 1000;
        assert!(sink.reserve(&foreign, true).is_err());
        assert!(sink.reserve(&plan.blocks()[0], true).unwrap().is_some());
        assert!(sink.reserve(&plan.blocks()[0], true).is_err());
        let budget = Budget::new(100);
        let sink = InPlace::new(&plan, &layout, Some(&budget), &|_, _| Ok(()));
        let error = sink.reserve(&plan.blocks()[0], true).unwrap_err();
        assert!(error.is::<OverBudget>(), "{error}");
    }
}
