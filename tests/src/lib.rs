//! Tests across the crates of the workspace; see the folder `tests` of this package.
