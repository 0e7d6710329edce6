//! Byte ranges of objects: in S3 and what speaks its protocol, Google Cloud Storage, Azure, the Hugging Face
//! hub, and of files on web servers.
//!
//! ```text
//! URL ──Object::open──▶ Object + its first bytes ──Object::read──▶ bytes of a range, in order
//! ```
//!
//! Everything here blocks the calling thread, which copies what arrives itself; a thread or two of this
//! crate's own move bytes between sockets and memory. Servers and networks are not to be trusted: what
//! [`Object::read`] hands out are bytes of the very object that was opened, by what its server says of it
//! (length, `ETag`, version, time), at the place that was asked for, or there is an error. A transfer that
//! breaks, stalls or drips goes on where it stopped, within the bounds of [`Settings`].
//!
//! ```no_run
//! use fst_object::{Object, Settings};
//!
//! let never = || false;
//! let (object, head) = Object::open("s3://bucket/model.safetensors", 8, &Settings::default(), &never)?;
//! println!("{} has {} bytes, the first are {head:?}", object.url(), object.len());
//! let mut tail = Vec::<u8>::new();
//! object.read(object.len() - 100..object.len(), &mut |bytes| tail.extend(bytes), &never)?;
//! # Ok::<(), fst_object::Error>(())
//! ```
//!
//! This crate knows nothing of checkpoints. It writes nothing, unless it is given a [`Cache`] to copy objects into.

mod cache;
mod error;
mod fetch;
mod hub;
mod location;
mod object;
mod profile;
mod ranges;
mod runtime;
mod settings;
mod store;
mod transport;

pub use cache::{Cache, CacheReport};
pub use error::{Cause, Difference, Error};
pub use hub::hub_parts;
pub use location::is_url;
pub use object::{Identity, Listing, Object, list};
pub use settings::{Counters, Settings};
