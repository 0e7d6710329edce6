#![no_main]

use std::sync::LazyLock;

use fst_fuzz::format::IndexFolder;

static FOLDER: LazyLock<IndexFolder> = LazyLock::new(IndexFolder::new);

libfuzzer_sys::fuzz_target!(|json: &[u8]| FOLDER.checkpoint_index(json));
