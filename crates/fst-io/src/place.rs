//! Landing in place: host arenas in which every segment of a plan has its final position.
//!
//! [`Layout`] decides (pure); [`InPlace`] is the sink that lends the places out.

use std::fmt;
use std::ptr::NonNull;

use crate::arenas::{Arenas, OnArena};
use crate::budget::Budget;
use crate::buffer::{HUGE_PAGE, HostBuffer};
use crate::extent::Extent;
use crate::ledger::Ledger;
use crate::plan::{Block, ReadPlan};
use crate::sink::{Sink, SinkError, Target};

pub use crate::ledger::NoPlace;

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
    /// What it was made with.
    limit: u64,
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
        let mut layout = Self { limit: arena, arenas: Vec::new(), places: Vec::new() };
        for segment in plan.segments() {
            let at = |end: u64| match segment.len() {
                LARGE.. => {
                    let phase = segment.start % huge;
                    end.saturating_sub(phase).checked_next_multiple_of(huge)?.checked_add(phase)
                }
                _ => end.checked_next_multiple_of(plan.limits().align),
            };
            // Where the segment starts and ends behind what lies there already, if it fits.
            let behind = layout.arenas.last().and_then(|end| {
                let offset = at(*end)?;
                Some((offset, offset.checked_add(segment.len()).filter(|end| *end <= arena)?))
            });
            let place = match (layout.arenas.last_mut(), behind) {
                (Some(last), Some((offset, end))) => {
                    *last = end;
                    Place { arena: layout.arenas.len() - 1, offset }
                }
                _ => {
                    // Extents end within 63 bits.
                    let offset = at(0).unwrap_or(0);
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

/// Told when a block is in place, from reader threads.
pub type OnLanded<'a> = &'a (dyn Fn(&Block) + Send + Sync);

/// The sink of loads into host memory: each block of one plan has its place from the start.
///
/// An arena is reserved when its first block is read, within the budget if there is one, and
/// handed over when its last block has landed.
pub struct InPlace<'a> {
    ledger: Ledger<'a>,
    /// `None` if it is another plan's.
    layout: Option<&'a Layout>,
    arenas: Arenas<'a>,
    on_landed: Option<OnLanded<'a>>,
}

impl fmt::Debug for InPlace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InPlace").field("arenas", &self.arenas).finish_non_exhaustive()
    }
}

/// The layout given to [`InPlace`] was made for another plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the layout was made for another plan: make one with `Layout::new` for the plan that is read"
)]
pub struct ForeignLayout;

impl<'a> InPlace<'a> {
    /// A sink for `plan`, whose arenas are those of `layout`, made for an equal plan: with another's the
    /// read ends with [`ForeignLayout`]. Every arena
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
            ledger: Ledger::new(plan),
            layout: (*layout == Layout::new(plan, layout.limit)).then_some(layout),
            arenas: Arenas::new(arenas, budget, on_arena),
            on_landed: None,
        }
    }

    /// Has the process keep the memory, as [`Arenas::keeping`] does.
    #[must_use]
    pub fn keeping(mut self, most: u64) -> Self {
        self.arenas = self.arenas.keeping(most);
        self
    }

    /// Calls `hook` for each block that has landed, on the thread that read it.
    pub fn on_landed(mut self, hook: OnLanded<'a>) -> Self {
        self.on_landed = Some(hook);
        self
    }

    /// Where a block's segment lies.
    fn place(&self, block: &Block) -> Result<Place, SinkError> {
        let layout = self.layout.ok_or(ForeignLayout)?;
        let place = layout.places().get(block.segment as usize);
        Ok(*place.ok_or_else(|| NoPlace::of(block))?)
    }

    /// A block's memory in its arena.
    fn memory(&self, block: &Block, place: Place, arena: &HostBuffer) -> Option<NonNull<u8>> {
        let segment = self.ledger.plan().segments().get(block.segment as usize)?;
        let within = block.offset.checked_sub(segment.start)?;
        let offset = usize::try_from(place.offset.checked_add(within)?).ok()?;
        let end = offset.checked_add(usize::try_from(block.len).ok()?)?;
        let ptr = NonNull::new(arena.as_ptr().as_ptr().wrapping_add(offset))?;
        (end <= arena.capacity()).then_some(ptr)
    }
}

// SAFETY: every target is the place of one block of the plan, lent once in this value's life: the
// ledger checks that the block is the plan's own and free. The layout is the plan's own, too, so that
// the plan's segments lie apart in it; its blocks lie apart in their segment. `memory` checks that
// the range lies in the arena, of which the target has a share. Nobody else sees an arena before all
// its blocks have landed: that is when no block of it is on loan any more.
unsafe impl Sink for InPlace<'_> {
    fn reserve(&self, block: &Block, wait: bool) -> Result<Option<Target>, SinkError> {
        self.ledger.free(block)?;
        let place = self.place(block)?;
        let Some(arena) = self.arenas.get(place.arena, wait)? else { return Ok(None) };
        let ptr = self.memory(block, place, &arena).ok_or_else(|| NoPlace::of(block))?;
        let (offset, len) =
            (ptr.as_ptr() as usize - arena.as_ptr().as_ptr() as usize, block.len as usize);
        arena.prepare(offset, len);
        // SAFETY: see the comment on the implementation.
        let target = unsafe { self.ledger.lend(block, ptr, len, 0) }?;
        let target = if arena.is_backed(offset, len) { target } else { target.fresh() };
        Ok(Some(target.owned_by(arena)))
    }

    fn prefer(&self, block: &Block) -> Result<bool, SinkError> {
        self.arenas.prefer(self.place(block)?.arena)
    }

    fn landed(&self, block: &Block, target: Target) -> Result<(), SinkError> {
        self.ledger.landed(block, &target)?;
        // Its share of the arena ends before somebody takes the arena over.
        drop(target);
        let place = self.place(block)?;
        if let Some(hook) = self.on_landed {
            hook(block);
        }
        // SAFETY: the block has landed, once; its target came back, and is not lent again.
        unsafe { self.arenas.fill(place.arena, 1) }
    }

    fn abandoned(&self, _block: &Block, _target: Target) {}

    fn end(&self) {
        self.arenas.wake();
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
