//! Ranks' loads out of files into host memory, against a slow and obvious way to cut and convert.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use fst_dist::group::Control;
use fst_dist::{
    Cast, Fingerprint, Group, LoadTarget, LocalGroup, Plan, Planner, RankError, RankFiles, Shard,
    ShardLoad, TensorDesc, Topology,
};
use fst_gpu::Filled;
use fst_gpu::cast::CastType;
use fst_io::watch::Watch;
use fst_io::{ReadOptions, SourceFile};

const WORLD: u32 = 3;
const HEADER: u64 = 1000;

/// Two files of tensors of 16-bit elements, removed in the end.
struct Files(PathBuf, Vec<TensorDesc>, [Vec<u8>; 2]);

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Files {
    fn new(name: &str) -> Self {
        let folder = std::env::temp_dir().join(format!("fst-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut bytes = [vec![0; HEADER as usize], vec![0; HEADER as usize]];
        let mut tensors = Vec::new();
        // Long enough to be read in place, with ragged ends; short; empty; of no elements for some ranks.
        let shapes = [[1500, 1001], [7, 33], [0, 5], [2, 2048], [900, 900], [64, 1]];
        for (index, shape) in shapes.into_iter().enumerate() {
            let (file, name) = (&mut bytes[index % 2], format!("t{index}"));
            let start = file.len() as u64;
            // No element is infinite or no number.
            file.extend(
                (0..shape[0] * shape[1]).flat_map(|i| ((i * 31) as u16 & 0x3fff).to_le_bytes()),
            );
            let (shard, file_range) = ((index % 2) as u32, start..file.len() as u64);
            tensors.push(TensorDesc { name, bits: 16, shape: shape.to_vec(), shard, file_range });
        }
        for (index, bytes) in bytes.iter().enumerate() {
            std::fs::write(folder.join(index.to_string()), bytes).unwrap();
        }
        Self(folder, tensors, bytes)
    }

    fn open(&self) -> Vec<SourceFile> {
        (0..2).map(|n| SourceFile::open(&self.0.join(n.to_string()), None).unwrap()).collect()
    }

    fn plan(&self) -> Plan {
        let shard = |tensor: &TensorDesc| match &tensor.name[..] {
            "t0" | "t1" | "t2" => Shard::split(0),
            "t3" | "t4" => Shard::split(1),
            _ => Shard::replicate(),
        };
        let planner = Planner::new(Topology::one_node(WORLD));
        planner.plan(self.1.clone(), shard).unwrap()
    }

    /// What a rank keeps of a tensor.
    fn kept(&self, tensor: usize, rank: u64) -> Vec<u8> {
        let TensorDesc { shape, file_range, shard, .. } = &self.1[tensor];
        let bytes = &self.2[*shard as usize][file_range.start as usize..file_range.end as usize];
        let part = |extent: u64| {
            let each = extent.div_ceil(WORLD.into());
            (rank * each).min(extent)..((rank + 1) * each).min(extent)
        };
        let (rows, columns) = match tensor {
            0..=2 => (part(shape[0]), 0..shape[1]),
            3 | 4 => (0..shape[0], part(shape[1])),
            _ => (0..shape[0], 0..shape[1]),
        };
        let row = |row: u64| {
            let at = |column: u64| ((row * shape[1] + column) * 2) as usize;
            bytes[at(columns.start)..at(columns.end)].to_vec()
        };
        rows.flat_map(row).collect()
    }
}

/// What one rank's outputs hold, and what conversions made.
fn load(
    files: &Files,
    plan: &Plan,
    group: &dyn Group,
    casts: &[Option<Cast>],
) -> Result<(Vec<Vec<u8>>, u64), RankError> {
    let view = plan.rank(group.rank());
    let (open, watch) = (files.open(), Watch::new(Arc::new(AtomicBool::new(false))));
    let options = ReadOptions::default();
    let number = [Some(0), Some(1)];
    let sources = RankFiles { files: &open, number: &number, options, watch: &watch };
    let group = group.occupy()?;
    let load = ShardLoad::reserve(&view, casts, LoadTarget::Host, &group, true)?;
    let shards = Mutex::new(vec![None; view.outputs().len()]);
    let deliver = |output: usize, filled| {
        let Filled::Host(piece) = filled else { panic!("{filled:?}") };
        let before = shards.lock().unwrap()[output].replace(piece.to_vec());
        assert!(before.is_none(), "output {output} came twice");
    };
    let arrived = load.exchange(&group, sources, &|| false, &deliver)?;
    assert!(!arrived.reads().is_empty());
    // What is not converted has come by now.
    let is_cast = |tensor: u32| casts.get(tensor as usize).copied().flatten().is_some();
    for (shard, output) in shards.lock().unwrap().iter().zip(view.outputs()) {
        assert_eq!(shard.is_some(), !is_cast(output.tensors[0]), "{}", output.name);
    }
    let made = arrived.convert(&|| group.alive(), &deliver)?;
    group.end()?;
    let shards = shards.into_inner().unwrap();
    Ok((shards.into_iter().map(Option::unwrap).collect(), made))
}

fn on_ranks<T: Send>(run: impl Fn(LocalGroup) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let run = &run;
        let ranks =
            LocalGroup::host(WORLD).into_iter().map(|group| scope.spawn(move || run(group)));
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn ranks_keep_and_convert_what_they_are_to() {
    let files = Files::new("shards");
    let plan = files.plan();
    let cast = Some((CastType::BF16, CastType::F32));
    // The last tensor is beyond the list: it is not converted.
    let casts = [None, cast, cast, None, cast];
    let all = on_ranks(|group| load(&files, &plan, &group, &casts).unwrap());
    for (rank, (outputs, made)) in (0..).zip(all) {
        let view = plan.rank(rank);
        assert_eq!(outputs.len(), view.outputs().len());
        let mut converted = 0;
        for (found, output) in outputs.iter().zip(view.outputs()) {
            let tensor = output.tensors[0] as usize;
            let mut expected = files.kept(tensor, rank.into());
            if casts.get(tensor).copied().flatten().is_some() {
                // The upper half of the wider type.
                expected = expected.chunks(2).flat_map(|e| [0, 0, e[0], e[1]]).collect();
                converted += expected.len() as u64;
            }
            assert!(*found == expected, "rank {rank}, {}", output.name);
        }
        // Each starts aligned in the arena of what is converted.
        assert!((converted..converted + 3 * 64).contains(&made), "{made} for {converted}");
    }
}

#[test]
fn conversions_of_other_elements_are_refused_and_all_ranks_learn_of_it() {
    let files = Files::new("refused");
    let plan = files.plan();
    let wrong = [Some((CastType::F32, CastType::F16))];
    let told = on_ranks(|group| {
        let casts = if group.rank() == 1 { &wrong[..] } else { &[] };
        let error = load(&files, &plan, &group, casts).unwrap_err();
        // As its caller does: others wait.
        group.abort(&error.to_string());
        error.to_string()
    });
    for (rank, told) in told.iter().enumerate() {
        assert!(told.contains("t0, which has elements of 16 bits"), "rank {rank}: {told}");
    }
}

#[test]
fn fingerprints_differ_where_files_do() {
    let files = Files::new("fingerprint");
    let of = |files: &[SourceFile]| {
        let mut fingerprint = Fingerprint::new(files.len(), b"types".to_vec());
        files.iter().for_each(|file| fingerprint.add(file).unwrap());
        fingerprint.into_bytes()
    };
    let before = of(&files.open());
    assert_eq!(of(&files.open()), before);
    // The last byte is always among those that are looked at.
    let mut bytes = files.2[1].clone();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(files.0.join("new"), bytes).unwrap();
    std::fs::rename(files.0.join("new"), files.0.join("1")).unwrap();
    assert_ne!(of(&files.open()), before);
}
