//! Gives the shared library NCCL's SONAME: once it is open, a later `dlopen("libnccl.so.2")` in the same
//! process finds it by that name.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libnccl.so.2");
    println!("cargo:rerun-if-changed=build.rs");
}
