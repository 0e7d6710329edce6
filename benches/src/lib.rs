//! Support for the benches of the workspace.
