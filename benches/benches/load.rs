//! `cargo bench -p fst-benches --bench load -- --help`

fn main() -> anyhow::Result<()> {
    fst_benches::app::main(env!("CARGO_BIN_EXE_fst-bench-contender"))
}
