//! Folders of checkpoints as people have them, seen in the wild, and what `fst inspect` makes of each.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use crate::fixture::{Folder, run};

/// Writes a file whose tensors are two `F32` each.
fn file(path: &Path, names: &[&str], metadata: Option<Value>) {
    let mut header = serde_json::Map::new();
    if let Some(metadata) = metadata {
        header.insert("__metadata__".to_owned(), metadata);
    }
    for (place, name) in names.iter().enumerate() {
        let offsets = [place * 8, place * 8 + 8];
        let entry = json!({"dtype": "F32", "shape": [2], "data_offsets": offsets});
        header.insert((*name).to_owned(), entry);
    }
    let text = Value::from(header).to_string();
    let len = (text.len() as u64).to_le_bytes();
    raw(path, &[&len, text.as_bytes(), &vec![0; names.len() * 8]].concat());
}

fn raw(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn index(path: &Path, map: &[(&str, &str)]) {
    let map: serde_json::Map<String, Value> =
        map.iter().map(|(name, file)| ((*name).to_owned(), (*file).into())).collect();
    raw(path, json!({"metadata": {"total_size": "16"}, "weight_map": map}).to_string().as_bytes());
}

fn shard(number: usize, of: usize) -> String {
    format!("model-{number:05}-of-{of:05}.safetensors")
}

/// What a folder is to give.
enum Want {
    /// These tensors, sorted.
    Tensors(&'static [&'static str]),
    /// Exit status 1 and a line with these words in it.
    Error(&'static [&'static str]),
}
use Want::{Error, Tensors};

/// Makes the folder with `make`, opens `path` in it with `flags`, and looks at what comes of it.
fn check(name: &str, want: &Want, path: &str, flags: &[&str], make: impl FnOnce(&Path)) {
    let folder = Folder::new();
    let top = folder.join(name);
    fs::create_dir(&top).unwrap();
    make(&top);
    let path = top.join(path);
    let run = run([&["inspect", "--json", path.to_str().unwrap()], flags].concat());
    match want {
        Tensors(want) => {
            assert_eq!((run.status, run.stderr.as_str()), (0, ""), "{name}");
            let json: Value = serde_json::from_str(&run.stdout).unwrap();
            let tensors = json["tensors"].as_array().unwrap().iter();
            let mut found: Vec<&str> = tensors.map(|t| t["name"].as_str().unwrap()).collect();
            found.sort_unstable();
            assert_eq!(found, *want, "{name}");
        }
        Error(words) => {
            assert_eq!(run.status, 1, "{name}: {}", run.stdout);
            // The words are not to come from the path.
            let told = run.stderr.replace(path.to_str().unwrap(), "");
            for word in *words {
                assert!(told.contains(word), "{name}: no {word:?} in {told:?}");
            }
        }
    }
}

#[test]
fn variants_are_found_by_files_and_indices_of_either_name() {
    let variant = |files: &'static str, index_name: &'static str| {
        move |top: &Path| {
            let files = [1, 2].map(|i| files.replace('#', &format!("{i:05}-of-00002")));
            file(&top.join(&files[0]), &["a"], None);
            file(&top.join(&files[1]), &["b"], None);
            if !index_name.is_empty() {
                index(&top.join(index_name), &[("a", &files[0]), ("b", &files[1])]);
            }
        }
    };
    let want = Tensors(&["a", "b"]);
    let fp16 = "model.safetensors.index.fp16.json";
    let of_diffusers = "unet.safetensors.fp16.index.json";
    for path in ["", fp16] {
        check("transformers", &want, path, &[], variant("model.fp16-#.safetensors", fp16));
    }
    for path in ["", of_diffusers] {
        check("diffusers", &want, path, &[], variant("unet.fp16-#.safetensors", of_diffusers));
    }
    check("no-index", &want, "", &[], variant("unet-#.fp16.safetensors", ""));
    check("plain", &Tensors(&["plain"]), "", &[], |top| {
        file(&top.join("unet.safetensors"), &["plain"], None);
        file(&top.join("unet.fp16.safetensors"), &["half"], None);
    });
}

#[test]
fn sets_are_numbered_from_0_or_1_and_complete() {
    for (numbers, of) in [(0..3, 2), (0..3, 3), (1..4, 3)] {
        check("set", &Tensors(&["a", "b", "c"]), "", &[], |top| {
            for (number, name) in numbers.zip(["a", "b", "c"]) {
                file(&top.join(shard(number, of)), &[name], None);
            }
        });
    }
    check("incomplete", &Error(&["00002-of-00003"]), "", &[], |top| {
        file(&top.join(shard(1, 3)), &["a"], None);
        file(&top.join(shard(3, 3)), &["c"], None);
    });
    check("two-splits", &Error(&["-of-00004", "-of-00008", "name one"]), "", &[], |top| {
        for of in [4, 8] {
            for number in 1..=of {
                file(&top.join(shard(number, of)), &[&format!("t{of}.{number}")], None);
            }
        }
    });
    check("twice", &Error(&["tensor \"w\""]), "", &[], |top| {
        file(&top.join(shard(1, 2)), &["a", "w"], None);
        file(&top.join(shard(2, 2)), &["b", "w"], None);
    });
}

#[test]
fn what_stands_beside_a_checkpoint_is_no_part_of_it() {
    let apple_double = [&b"\0\x05\x16\x07\0\x02\0\0Mac OS X        "[..], &[0; 200]].concat();
    let set = |top: &Path| {
        file(&top.join(shard(1, 2)), &["a"], None);
        file(&top.join(shard(2, 2)), &["b"], None);
    };
    check("apple-shards", &Tensors(&["a", "b"]), "", &[], |top| {
        set(top);
        raw(&top.join(format!("._{}", shard(1, 2))), &apple_double);
    });
    check("apple-single", &Tensors(&["a"]), "", &[], |top| {
        file(&top.join("weights.safetensors"), &["a"], None);
        raw(&top.join("._weights.safetensors"), &apple_double);
    });
    for with_index in [true, false] {
        check("consolidated", &Tensors(&["a", "b"]), "", &[], |top| {
            set(top);
            file(&top.join("consolidated.safetensors"), &["tok"], None);
            file(&top.join("adapter_model.safetensors"), &["lora"], None);
            if with_index {
                let map = [("a", &*shard(1, 2)), ("b", &*shard(2, 2))];
                index(&top.join("model.safetensors.index.json"), &map);
            }
        });
    }
}

#[test]
fn an_index_says_who_owns_a_tensor() {
    check("overlay", &Tensors(&["a", "b", "w"]), "", &[], |top| {
        let overlay = "model-overlay-00001.safetensors";
        file(&top.join(shard(1, 2)), &["a", "w"], None);
        file(&top.join(shard(2, 2)), &["b"], None);
        file(&top.join(overlay), &["w"], None);
        let map = [("a", &*shard(1, 2)), ("b", &*shard(2, 2)), ("w", overlay)];
        index(&top.join("model.safetensors.index.json"), &map);
    });
    let lacking = |top: &Path| {
        let one = shard(1, 1);
        file(&top.join(&one), &["a"], None);
        let map = [("a", &*one), ("lm_head.weight", &*one)];
        index(&top.join("model.safetensors.index.json"), &map);
    };
    let words = &["lm_head.weight", "model-00001-of-00001.safetensors"];
    check("lacking", &Error(words), "", &[], lacking);
    check("allowed", &Tensors(&["a"]), "", &["--allow-missing"], lacking);
}

#[test]
fn links_lead_to_snapshots_or_are_called_dangling() {
    let hub = |main: &'static str, snapshots: &'static [&'static str]| {
        move |top: &Path| {
            if !main.is_empty() {
                raw(&top.join("refs/main"), main.as_bytes());
            }
            file(&top.join("blobs/feedbeef"), &["a"], None);
            for snapshot in snapshots {
                let folder = top.join("snapshots").join(snapshot);
                fs::create_dir_all(&folder).unwrap();
                symlink("../../blobs/feedbeef", folder.join("model.safetensors")).unwrap();
            }
        }
    };
    let (name, want) = ("models--org--name", Tensors(&["a"]));
    check(name, &want, "", &[], hub("0123abcd", &["0123abcd", "beef"]));
    check(name, &want, "", &[], hub("", &["0123abcd"]));
    check(name, &Error(&["0123abcd, beef"]), "", &[], hub("", &["0123abcd", "beef"]));
    check(name, &Error(&["0123abcd, beef"]), "", &[], hub("../blobs", &["0123abcd", "beef"]));
    check("dangling", &Error(&["link to ../blobs/gone", "model.safetensors"]), "", &[], |top| {
        symlink("../blobs/gone", top.join("model.safetensors")).unwrap();
    });
}

#[test]
fn other_formats_are_called_by_their_names() {
    let pickle = [&b"PK\x03\x04"[..], &[0; 60], b"archive/data.pkl"].concat();
    for (path, bytes, word) in [
        (
            "lfs.safetensors",
            &b"version https://git-lfs.github.com/spec/v1\nsize 12345\n"[..],
            "Git LFS",
        ),
        ("page.safetensors", b"<!doctype html><html>Access denied</html>", "HTML"),
        ("config.json", br#"{"architectures": ["LlamaForCausalLM"]}"#, "JSON"),
        ("zip.safetensors", &pickle, "PyTorch"),
        ("g.safetensors", &[&b"GGUF\x03\0\0\0"[..], &[0; 64]].concat(), "GGUF"),
    ] {
        let word: &'static [&'static str] = Box::leak(Box::new([word]));
        check("other", &Error(word), path, &[], |top| raw(&top.join(path), bytes));
    }
    check("empty-metadata", &Tensors(&["a"]), "", &[], |top| {
        file(&top.join("model.safetensors"), &["a"], Some(json!({})));
    });
}

#[test]
fn a_star_matches_every_name() {
    let names = &["", "a{b}", "encoder.x", "encoder/layers_0/kernel", "\u{65e5}\u{672c}"];
    check("star", &Tensors(names), "", &["--select", "*"], |top| {
        file(&top.join("model.safetensors"), names, None);
    });
}
