//! The exported driver API. Each function follows NVIDIA's "CUDA Driver API" reference; where the
//! reference leaves room, the least obliging choice is taken.

#![allow(
    non_snake_case,
    missing_docs,
    unreachable_pub,
    clippy::too_many_arguments,
    clippy::missing_safety_doc
)]

mod copy;
mod cufile;
mod device;
mod memory;
mod module;
mod stream;

pub(crate) use stream::{StreamHook, set_stream_hook};

/// Defines exported driver functions: the body runs on the world, under its lock, after the call
/// was counted and not chosen to fail.
macro_rules! api {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) |$world:ident| $body:block)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> i32 {
            $crate::world::enter(stringify!($name), |$world| $body)
        }
    )*};
}
pub(crate) use api;

/// Writes a result through an out pointer.
pub(crate) fn put<T>(to: *mut T, value: T) -> crate::world::Outcome {
    if to.is_null() {
        return Err(crate::codes::ERROR_INVALID_VALUE);
    }
    // SAFETY: not null, and the API asks callers for valid out pointers.
    unsafe { to.write(value) };
    Ok(())
}
