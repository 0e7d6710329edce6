//! One load at a time through a group, on all of its ranks.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Group;
use crate::error::GroupError;

/// Whether a load has a handle of a group, and which loads to come are refused.
#[derive(Debug, Default)]
pub struct Occupancy {
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    load: Option<Load>,
    /// So many loads to come are refused, as this other rank has refused them.
    owed: u32,
    refuser: u32,
}

/// A load that has the handle.
#[derive(Debug, Default)]
struct Load {
    /// Loads that were refused meanwhile.
    refused: u32,
    /// The other ranks learn of these now: there are to be no more.
    ends: bool,
}

impl Occupancy {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A group taken by one load; others can take it when this is dropped. A panic ends the group, so that the
/// other ranks do not wait.
#[derive(Debug)]
pub struct Occupied<'g>(&'g (dyn Group + 'g));

impl<'g> std::ops::Deref for Occupied<'g> {
    type Target = dyn Group + 'g;

    fn deref(&self) -> &Self::Target {
        self.0
    }
}

impl Drop for Occupied<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort("its load panicked");
        }
        let occupancy = self.0.occupancy();
        occupancy.lock().load = None;
        occupancy.freed.notify_all();
    }
}

impl dyn Group + '_ {
    /// Takes the group for one load: the messages of two at once would be taken for each other's.
    ///
    /// # Errors
    /// [`GroupError::Busy`] while another load has it, on this rank or, as [`Occupied::end`] tells, on
    /// another. The group is as good as before.
    pub fn occupy(&self) -> Result<Occupied<'_>, GroupError> {
        let occupancy = self.occupancy();
        let mut state = occupancy.lock();
        // Not for long: for the other ranks to end that load.
        while state.load.as_ref().is_some_and(|load| load.ends) {
            state = occupancy.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(load) = &mut state.load {
            load.refused = load.refused.saturating_add(1);
            return Err(GroupError::Busy { rank: self.rank() });
        }
        if let Some(owed) = state.owed.checked_sub(1) {
            state.owed = owed;
            return Err(GroupError::Busy { rank: state.refuser });
        }
        state.load = Some(Load::default());
        drop(state);
        Ok(Occupied(self))
    }
}

impl Occupied<'_> {
    /// Ends the load, once all ranks do. A load that one of them has refused meanwhile is refused by all: the
    /// others would wait for that rank.
    ///
    /// # Errors
    /// As for [`gather_messages`](super::Control::gather_messages).
    pub fn end(self) -> Result<(), GroupError> {
        let own = match &mut self.occupancy().lock().load {
            Some(load) => {
                load.ends = true;
                load.refused
            }
            None => 0,
        };
        let all = self.gather_messages(&own.to_le_bytes())?;
        let refused = |message: &Vec<u8>| <[u8; 4]>::try_from(&message[..]).map(u32::from_le_bytes);
        let all = (0u32..).zip(all.iter().map(|message| refused(message).unwrap_or(0)));
        if let Some((rank, most)) = all.max_by_key(|(_, refused)| *refused) {
            let mut state = self.occupancy().lock();
            (state.owed, state.refuser) = (most.saturating_sub(own), rank);
        }
        Ok(())
    }
}
