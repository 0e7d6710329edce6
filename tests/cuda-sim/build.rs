//! Gives the shared library the driver's SONAME: once it is open, a later `dlopen("libcuda.so")`
//! in the same process finds it by that name.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo:rerun-if-changed=build.rs");
}
