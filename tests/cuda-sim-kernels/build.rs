//! Compiles `crates/fst-gpu/kernels/host/kernels.cpp`, all kernels for the host: into this crate,
//! and as a shared library for the simulated driver.

use std::path::Path;
use std::process::{Command, exit};

fn main() {
    let kernels = "../../crates/fst-gpu/kernels";
    println!("cargo:rerun-if-changed={kernels}");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").pic(true);
    build.file(format!("{kernels}/host/kernels.cpp"));
    // Unoptimised byte loops would dominate the tests.
    build.opt_level(2);
    // What devices do not fuse, the host may not either.
    build.flag_if_supported("-ffp-contract=off");
    let objects = build.compile_intermediates();
    let mut archive = cc::Build::new();
    archive.cpp(true).objects(&objects).compile("fst_sim_kernels");

    let folder = std::env::var_os("OUT_DIR").unwrap_or_default();
    let library = Path::new(&folder).join("libfst_sim_kernels.so");
    let mut link = Command::new(build.get_compiler().path());
    link.arg("-shared").arg("-o").arg(library).args(&objects);
    if !link.status().is_ok_and(|status| status.success()) {
        println!("cargo:error=linking failed: {link:?}");
        exit(1);
    }
}
