//! The driver's presence or absence on the machine itself, without the simulator: never a panic,
//! and an error that says what was looked for.

#![allow(clippy::panic)]

use fst_gpu::{CudaDevice, DRIVER_LIBRARIES, Error};

#[test]
fn absence_is_an_error_that_says_what_was_looked_for() {
    match CudaDevice::open(0) {
        Ok(device) => {
            println!("there is a device: {device:?}");
            assert!(CudaDevice::available());
        }
        Err(error) => {
            assert!(!CudaDevice::available());
            let text = error.to_string();
            println!("{text}");
            match error {
                Error::NoDriver { looked_for, reason } => {
                    assert_eq!(looked_for, DRIVER_LIBRARIES);
                    assert!(!reason.is_empty());
                    assert!(text.contains("libcuda.so.1"), "{text}");
                    assert!(CudaDevice::count().is_err());
                }
                // A driver with nothing behind it, as in some containers.
                Error::NoDevice { count: 0, .. }
                | Error::StubDriver { .. }
                | Error::Init { .. } => {}
                other => panic!("not about absence: {other:?}"),
            }
        }
    }
}

#[test]
fn a_bad_ordinal_is_an_error() {
    match CudaDevice::open(4096) {
        Err(Error::NoDevice { ordinal: 4096, count }) => assert!(count < 4096),
        Err(Error::NoDriver { .. } | Error::NoDevice { .. } | Error::Init { .. }) => {}
        other => panic!("{other:?}"),
    }
}
