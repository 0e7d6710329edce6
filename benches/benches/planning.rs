//! Planning time, and what plans promise at scale.
//!
//! `cargo bench --bench planning` times the planner. With `-- --simulate` it prints instead, for three
//! large checkpoints on 8, 64 and 512 ranks, the bytes that ranks move and the predicted seconds
//! against simpler ways.

use std::sync::Arc;
use std::time::Instant;

use fst_dist::{
    Experts, Links, Plan, Planner, Preset, RankLoad, Shard, Storage, TensorDesc, Topology,
};

fn main() {
    if std::env::args().any(|arg| arg == "--simulate") {
        simulate();
    } else {
        divan::main();
    }
}

/// A checkpoint under construction: tensors in the order of its files, 4.5 GB a file.
#[derive(Default)]
struct Layout {
    tensors: Vec<TensorDesc>,
    shard: u32,
    end: u64,
}

impl Layout {
    fn add(&mut self, name: String, bits: u32, shape: &[u64]) {
        let len = shape.iter().product::<u64>() * u64::from(bits) / 8;
        if self.end > 4_500_000_000 {
            (self.shard, self.end) = (self.shard + 1, 4096);
        }
        let file_range = self.end..self.end + len;
        self.end += len;
        let (shape, shard) = (shape.to_vec(), self.shard);
        self.tensors.push(TensorDesc { name, bits, shape, shard, file_range });
    }
}

/// Llama-2-70b: 723 tensors, bf16.
fn llama_70b() -> Arc<[TensorDesc]> {
    let mut layout = Layout::default();
    layout.add("model.embed_tokens.weight".into(), 16, &[32000, 8192]);
    for layer in 0..80 {
        let mut add = |name: &str, shape: &[u64]| {
            layout.add(format!("model.layers.{layer}.{name}.weight"), 16, shape);
        };
        add("input_layernorm", &[8192]);
        add("mlp.down_proj", &[8192, 28672]);
        add("mlp.gate_proj", &[28672, 8192]);
        add("mlp.up_proj", &[28672, 8192]);
        add("post_attention_layernorm", &[8192]);
        add("self_attn.k_proj", &[1024, 8192]);
        add("self_attn.o_proj", &[8192, 8192]);
        add("self_attn.q_proj", &[8192, 8192]);
        add("self_attn.v_proj", &[1024, 8192]);
    }
    layout.add("model.norm.weight".into(), 16, &[8192]);
    layout.add("lm_head.weight".into(), 16, &[32000, 8192]);
    layout.tensors.into()
}

/// Bloom-176b: 70 layers, bf16.
fn bloom_176b() -> Arc<[TensorDesc]> {
    let hidden = 14336;
    let mut layout = Layout::default();
    let norm = |layout: &mut Layout, name: &str| {
        layout.add(format!("{name}.weight"), 16, &[hidden]);
        layout.add(format!("{name}.bias"), 16, &[hidden]);
    };
    layout.add("word_embeddings.weight".into(), 16, &[250_880, hidden]);
    norm(&mut layout, "word_embeddings_layernorm");
    for layer in 0..70 {
        norm(&mut layout, &format!("h.{layer}.input_layernorm"));
        norm(&mut layout, &format!("h.{layer}.post_attention_layernorm"));
        let mut linear = |name: &str, rows: u64, columns: u64| {
            layout.add(format!("h.{layer}.{name}.weight"), 16, &[rows, columns]);
            layout.add(format!("h.{layer}.{name}.bias"), 16, &[rows]);
        };
        linear("self_attention.query_key_value", 3 * hidden, hidden);
        linear("self_attention.dense", hidden, hidden);
        linear("mlp.dense_h_to_4h", 4 * hidden, hidden);
        linear("mlp.dense_4h_to_h", hidden, 4 * hidden);
    }
    norm(&mut layout, "ln_f");
    layout.tensors.into()
}

/// A 671-billion-parameter mixture of experts (DeepSeek-V3): fp8 with block scales, 61 layers and
/// 256 experts.
fn moe_671b() -> Arc<[TensorDesc]> {
    let hidden = 7168;
    let mut layout = Layout::default();
    let linear = |layout: &mut Layout, name: String, rows: u64, columns: u64| {
        layout.add(format!("{name}.weight"), 8, &[rows, columns]);
        let scales = [rows.div_ceil(128), columns.div_ceil(128)];
        layout.add(format!("{name}.weight_scale_inv"), 32, &scales);
    };
    layout.add("model.embed_tokens.weight".into(), 16, &[129_280, hidden]);
    for layer in 0..61 {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        layout.add(name("input_layernorm.weight"), 16, &[hidden]);
        layout.add(name("post_attention_layernorm.weight"), 16, &[hidden]);
        layout.add(name("self_attn.q_a_layernorm.weight"), 16, &[1536]);
        layout.add(name("self_attn.kv_a_layernorm.weight"), 16, &[512]);
        linear(&mut layout, name("self_attn.q_a_proj"), 1536, hidden);
        linear(&mut layout, name("self_attn.q_b_proj"), 24576, 1536);
        linear(&mut layout, name("self_attn.kv_a_proj_with_mqa"), 576, hidden);
        linear(&mut layout, name("self_attn.kv_b_proj"), 32768, 512);
        linear(&mut layout, name("self_attn.o_proj"), hidden, 16384);
        if layer >= 3 {
            layout.add(name("mlp.gate.weight"), 16, &[256, hidden]);
            layout.add(name("mlp.gate.e_score_correction_bias"), 32, &[256]);
        }
        let mut mlp = |prefix: String, inner: u64| {
            linear(&mut layout, format!("{prefix}.gate_proj"), inner, hidden);
            linear(&mut layout, format!("{prefix}.up_proj"), inner, hidden);
            linear(&mut layout, format!("{prefix}.down_proj"), hidden, inner);
        };
        if layer < 3 {
            mlp(name("mlp"), 18432);
        } else {
            (0..256).for_each(|expert| mlp(name(&format!("mlp.experts.{expert}")), 2048));
            mlp(name("mlp.shared_experts"), 2048);
        }
    }
    layout.add("model.norm.weight".into(), 16, &[hidden]);
    layout.add("lm_head.weight".into(), 16, &[129_280, hidden]);
    layout.tensors.into()
}

/// Qwen3-30B-A3B: 18,867 tensors, bf16.
fn moe_30b() -> Arc<[TensorDesc]> {
    let mut layout = Layout::default();
    layout.add("model.embed_tokens.weight".into(), 16, &[151_936, 2048]);
    for layer in 0..48 {
        let mut add = |name: &str, shape: &[u64]| {
            layout.add(format!("model.layers.{layer}.{name}.weight"), 16, shape);
        };
        add("input_layernorm", &[2048]);
        add("post_attention_layernorm", &[2048]);
        add("mlp.gate", &[128, 2048]);
        for expert in 0..128 {
            add(&format!("mlp.experts.{expert}.down_proj"), &[2048, 768]);
            add(&format!("mlp.experts.{expert}.gate_proj"), &[768, 2048]);
            add(&format!("mlp.experts.{expert}.up_proj"), &[768, 2048]);
        }
        add("self_attn.k_norm", &[128]);
        add("self_attn.k_proj", &[512, 2048]);
        add("self_attn.o_proj", &[2048, 4096]);
        add("self_attn.q_norm", &[128]);
        add("self_attn.q_proj", &[4096, 2048]);
        add("self_attn.v_proj", &[512, 2048]);
    }
    layout.add("model.norm.weight".into(), 16, &[2048]);
    layout.add("lm_head.weight".into(), 16, &[151_936, 2048]);
    layout.tensors.into()
}

/// 100,000 tensors of which no two are alike.
fn all_different() -> Arc<[TensorDesc]> {
    let mut layout = Layout::default();
    for index in 0..100_000u64 {
        layout.add(format!("tensor.{index}"), 16, &[513 + index % 1000, 1024 + index / 1000]);
    }
    layout.tensors.into()
}

fn plan(tensors: &Arc<[TensorDesc]>, preset: &Preset, topology: &Topology) -> Plan {
    let rules = preset.rules(tensors.iter(), topology.world());
    let planner = Planner::new(topology.clone());
    match planner.plan(tensors.clone(), |tensor| rules.shard(tensor)) {
        Ok(plan) => plan,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    }
}

#[divan::bench(args = [8, 64, 512], sample_count = 10)]
fn llama_70b_ranks(bencher: divan::Bencher<'_, '_>, world: u32) {
    let (tensors, topology) = (llama_70b(), Topology::one_node(world));
    bencher.bench(|| plan(&tensors, &Preset::llama(), &topology));
}

#[divan::bench(args = [8, 64, 512], sample_count = 10)]
fn moe_30b_ranks(bencher: divan::Bencher<'_, '_>, world: u32) {
    let (tensors, topology) = (moe_30b(), Topology::one_node(world));
    bencher.bench(|| plan(&tensors, &Preset::moe(), &topology));
}

#[divan::bench(args = [8, 64, 512], sample_count = 10)]
fn moe_671b_ranks(bencher: divan::Bencher<'_, '_>, world: u32) {
    let (tensors, topology) = (moe_671b(), Topology::one_node(world));
    bencher.bench(|| plan(&tensors, &Preset::moe(), &topology));
}

#[divan::bench(args = [8, 512], sample_count = 3)]
fn all_different_ranks(bencher: divan::Bencher<'_, '_>, world: u32) {
    let (tensors, topology) = (all_different(), Topology::one_node(world));
    let planner = Planner::new(topology);
    bencher.bench(|| {
        let split = |tensor: &TensorDesc| Shard::split(tensor.shape[0] as usize % 2);
        planner.plan(tensors.clone(), split).map(|plan| plan.digest())
    });
}

/// What one rank derives from the plan: its outputs, direct reads and every message of its rounds.
#[divan::bench(args = [8, 512], sample_count = 3)]
fn moe_671b_one_rank(bencher: divan::Bencher<'_, '_>, world: u32) {
    let plan = plan(&moe_671b(), &Preset::moe(), &Topology::one_node(world));
    bencher.bench(|| {
        let view = plan.rank(world / 2);
        let mut bytes: u64 = view.direct_reads().map(|read| read.copies.len() as u64).sum();
        for round in view.rounds() {
            for piece in (0..world).flat_map(|rank| round.unit(rank)) {
                let part = view.geometry(piece.tensor);
                bytes += part.map_or(0, |(_, geometry)| geometry.kept_in(&piece.range));
            }
        }
        bytes
    });
}

/// Bytes moved and predicted seconds, as a table.
fn simulate() {
    let links = Links { node_bytes_per_s: 100e9, net_bytes_per_s: 25e9, latency_s: 20e-6 };
    let storage = |bytes_per_s: f64, rank_bytes_per_s: f64| Storage {
        bytes_per_s,
        rank_bytes_per_s,
        requests_per_s: 500e3,
    };
    println!(
        "Nodes of 8 ranks. Links: 100 GB/s per rank within a node, 25 GB/s per rank between nodes.\n\
         Storage shared: 10 GB/s for all ranks together, 5 GB/s for one. Storage per node: 25 GB/s\n\
         for its ranks together, 12 GB/s for one. Bytes of the rank that has most.\n"
    );
    println!(
        "| checkpoint | ranks | storage | planning ms | read, GB | read / checkpoint | read by a rank, \
         GB | received, GB | kept, GB | predicted s | bound | each reads its own, s | broadcast all, \
         s | each reads all, s |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    let split = Preset::moe().experts(Experts::Split);
    let cases = [
        ("llama-70b", llama_70b(), Preset::llama()),
        ("bloom-176b", bloom_176b(), Preset::bloom()),
        ("MoE 671B, experts on ranks", moe_671b(), Preset::moe()),
        ("MoE 671B, experts split", moe_671b(), split),
    ];
    for (name, tensors, preset) in cases {
        for world in [8, 64, 512] {
            let shared = Topology::shared_storage(world / 8, 8).with_storage(storage(10e9, 5e9));
            let local = Topology::local_storage(world / 8, 8).with_storage(storage(25e9, 12e9));
            for (kind, topology) in [("shared", shared), ("per node", local)] {
                let topology = topology.with_links(links);
                let start = Instant::now();
                let plan = plan(&tensors, &preset, &topology);
                let ms = start.elapsed().as_secs_f64() * 1e3;
                let gb = |bytes: u64| bytes as f64 / 1e9;
                let most =
                    |f: fn(&RankLoad) -> u64| gb(plan.loads().iter().map(f).max().unwrap_or(0));
                let read: u64 = plan.loads().iter().map(RankLoad::read).sum();
                println!(
                    "| {name} | {world} | {kind} | {ms:.1} | {:.1} | {:.3} | {:.2} | {:.2} | {:.2} | \
                     {:.2} | {} | {:.2} | {:.2} | {:.2} |",
                    gb(read),
                    read as f64 / plan.checkpoint_bytes() as f64,
                    most(RankLoad::read),
                    most(|load| load.received),
                    most(|load| load.kept),
                    plan.predict().seconds(),
                    plan.predict().bound(),
                    plan.predict_each_reads_own().seconds(),
                    plan.predict_broadcast_everything().seconds(),
                    plan.predict_everyone_reads_all().seconds(),
                );
            }
        }
    }
}
