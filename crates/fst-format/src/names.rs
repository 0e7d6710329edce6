//! A table from names to small indices that holds no names itself.
//!
//! Names live in headers, once; the table stores four bytes per name and asks its owner for the
//! text. One hash function serves the whole process, seeded at random so that names chosen by an
//! attacker do not collide on purpose.

use std::hash::BuildHasher;
use std::sync::LazyLock;

use hashbrown::hash_table::Entry;
use hashbrown::{DefaultHashBuilder, HashTable};

static HASHER: LazyLock<DefaultHashBuilder> = LazyLock::new(DefaultHashBuilder::default);

/// Indices by name.
#[derive(Clone, Default)]
pub(crate) struct NameTable {
    indices: HashTable<u32>,
}

impl NameTable {
    /// An empty table with room for `capacity` names.
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self { indices: HashTable::with_capacity(capacity) }
    }

    /// Adds `index` under its name, or returns the index that has the same name already.
    pub(crate) fn insert<'n>(
        &mut self,
        index: u32,
        name_of: impl Fn(u32) -> &'n str,
    ) -> Result<(), u32> {
        let hasher = &*HASHER;
        let name = name_of(index);
        let slot = self.indices.entry(
            hasher.hash_one(name),
            |&other| name_of(other) == name,
            |&other| hasher.hash_one(name_of(other)),
        );
        match slot {
            Entry::Occupied(other) => Err(*other.get()),
            Entry::Vacant(slot) => {
                slot.insert(index);
                Ok(())
            }
        }
    }

    /// The index of `name`.
    pub(crate) fn get<'n>(&self, name: &str, name_of: impl Fn(u32) -> &'n str) -> Option<u32> {
        self.indices.find(HASHER.hash_one(name), |&index| name_of(index) == name).copied()
    }
}
