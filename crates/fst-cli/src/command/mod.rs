//! One file per command: what it asks of the library and what it prints.

pub(crate) mod doctor;
pub(crate) mod inspect;
pub(crate) mod load;
pub(crate) mod manual;
pub(crate) mod plan;
pub(crate) mod sum;
pub(crate) mod synth;
