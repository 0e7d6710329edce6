//! `fst plan`: what each rank of several would read, send and receive, and how long that should take.
use fst::dist::{Choice, MeasuredRates, Prediction, RankLoad};
use fst::{Checkpoint, Loader, Plan, Storage, Topology};
use serde::Serialize;

use crate::args::PlanArgs;
use crate::failure::Failure;
use crate::ranks;
use crate::reading;
use crate::text::{self, Align, FAINT, HEADING, RESULT, Table, counted, styled, visible};

/// Ranks that the table lists one by one; of more, the ends.
const LISTED: usize = 16;

/// The most that is read to measure a rate.
const MEASURED_BYTES: u64 = 1_000_000_000;

/// The rates of a plan, and where they are from.
#[derive(Serialize)]
struct Rates {
    storage: Rate,
    node_link: Rate,
    net_link: Rate,
    #[serde(skip_serializing_if = "Option::is_none")]
    measured: Option<Measured>,
}

#[derive(Serialize)]
struct Rate {
    gb_per_s: f64,
    /// `given`, `measured`, `page cache` (measured, but of files that were in memory) or `default`.
    source: &'static str,
}

/// How rates were measured.
#[derive(Serialize)]
struct Measured {
    engine: &'static str,
    read_bytes: u64,
    /// Share of the files' bytes that the page cache held.
    resident: Option<f64>,
    copy_ranks: u32,
}

#[derive(Serialize)]
struct Report {
    tensors: usize,
    bytes: u64,
    world: u32,
    nodes: u32,
    preset: &'static str,
    digest: String,
    planning_seconds: f64,
    rates: Rates,
    /// Staging of each rank, at most.
    staging_bytes: u64,
    predicted: Predicted,
    /// The same load in simpler ways.
    alternatives: Alternatives,
    totals: Figures,
    ranks: Vec<Figures>,
    choices: Vec<Way>,
}

#[derive(Serialize, Default)]
struct Figures {
    #[serde(skip_serializing_if = "Option::is_none")]
    rank: Option<u32>,
    kept: u64,
    read: u64,
    sent: u64,
    received: u64,
}

#[derive(Serialize)]
struct Predicted {
    seconds: f64,
    bound: &'static str,
    storage_seconds: f64,
    reading_seconds: f64,
    link_seconds: f64,
}

#[derive(Serialize)]
struct Alternatives {
    each_reads_its_own: Predicted,
    everyone_reads_all: Predicted,
    broadcast_everything: Predicted,
}

/// Tensors of one choice.
#[derive(Serialize)]
struct Way {
    choice: &'static str,
    tensors: u64,
    bytes: u64,
}

impl From<Prediction> for Predicted {
    fn from(prediction: Prediction) -> Self {
        Self {
            seconds: prediction.seconds(),
            bound: prediction.bound(),
            storage_seconds: prediction.storage_s,
            reading_seconds: prediction.read_s,
            link_seconds: prediction.link_s,
        }
    }
}

impl Figures {
    fn of(rank: Option<u32>, load: &RankLoad) -> Self {
        let (kept, read) = (load.kept, load.read());
        Self { rank, kept, read, sent: load.sent, received: load.received }
    }

    fn add(self, other: &Self) -> Self {
        Self {
            rank: None,
            kept: self.kept + other.kept,
            read: self.read + other.read,
            sent: self.sent + other.sent,
            received: self.received + other.received,
        }
    }
}

pub(crate) fn run(args: &PlanArgs) -> Result<(), Failure> {
    check(args)?;
    let checkpoint = reading::open_and_warn(&args.paths, &args.select.options())?;
    let preset = ranks::preset(&checkpoint, &args.rule, &args.paths, args.world)?;
    let measured = measure(args, &checkpoint)?;
    let topology = topology(args, measured.as_ref());
    let name = preset.name();
    let began = std::time::Instant::now();
    let plan = reading::select(Loader::new(), &args.select)
        .topology(topology)
        .preset(preset)
        .rank_plan(&checkpoint)
        .map_err(|error| reading::failure(&args.paths, &checkpoint, &error))?;
    let planning_seconds = began.elapsed().as_secs_f64();
    let rates = rates(args, plan.topology(), measured.as_ref());
    let report = report(&plan, args.nodes, name, planning_seconds, rates);
    if args.json {
        return text::print_json(&report).map_err(Failure::output);
    }
    text::print(&render(&report, args)).map_err(Failure::output)
}

/// Refuses numbers of nodes and rates that make no sense.
fn check(args: &PlanArgs) -> Result<(), Failure> {
    let (world, nodes) = (args.world, args.nodes);
    if !world.is_multiple_of(nodes) {
        return Err(Failure::usage(format!("--world {world} is no multiple of --nodes {nodes}")));
    }
    for (flag, rate) in [
        ("--storage-gb-s", args.storage_gb_s),
        ("--link-gb-s", args.link_gb_s),
        ("--net-gb-s", args.net_gb_s),
    ] {
        let sound = |rate: f64| rate > 0.0 && (rate * 1e9).is_normal();
        if let Some(rate) = rate.filter(|rate| !sound(*rate)) {
            let what = "a rate is a number of GB/s above zero";
            return Err(Failure::usage(format!("{flag} {rate}: {what}")));
        }
    }
    Ok(())
}

/// What is measured, if anything is wanted that is not given.
fn measure(args: &PlanArgs, checkpoint: &Checkpoint) -> Result<Option<MeasuredRates>, Failure> {
    if !args.measure || (args.storage_gb_s.is_some() && args.link_gb_s.is_some()) {
        return Ok(None);
    }
    MeasuredRates::measure(checkpoint, MEASURED_BYTES, args.world / args.nodes)
        .map(Some)
        .map_err(|error| reading::failure(&args.paths, checkpoint, &error))
}

/// The ranks' places; given rates go before measured ones.
fn topology(args: &PlanArgs, measured: Option<&MeasuredRates>) -> Topology {
    let per_node = args.world / args.nodes;
    let mut topology = match args.local_storage {
        true => Topology::local_storage(args.nodes, per_node),
        false => Topology::shared_storage(args.nodes, per_node),
    };
    if let Some(measured) = measured {
        topology = measured.apply(topology);
    }
    if let Some(rate) = args.storage_gb_s {
        topology = topology.with_storage(Storage::with_rate(rate * 1e9));
    }
    let mut links = topology.links();
    links.node_bytes_per_s = args.link_gb_s.map_or(links.node_bytes_per_s, |rate| rate * 1e9);
    links.net_bytes_per_s = args.net_gb_s.map_or(links.net_bytes_per_s, |rate| rate * 1e9);
    topology.with_links(links)
}

/// The rates of `topology`, with their sources.
fn rates(args: &PlanArgs, topology: &Topology, measured: Option<&MeasuredRates>) -> Rates {
    let rate = |bytes_per_s: f64, given: Option<f64>, measured: bool| {
        let source = match given {
            Some(_) => "given",
            None if measured => "measured",
            None => "default",
        };
        Rate { gb_per_s: bytes_per_s / 1e9, source }
    };
    let storage = topology.storages().first().map_or(0.0, |storage| storage.bytes_per_s);
    let read = measured.is_some_and(|measured| measured.read_bytes > 0);
    let mut storage = rate(storage, args.storage_gb_s, read);
    if storage.source == "measured"
        && measured.and_then(|measured| measured.resident).is_some_and(|share| share >= 0.5)
    {
        storage.source = "page cache";
    }
    let links = topology.links();
    Rates {
        storage,
        node_link: rate(links.node_bytes_per_s, args.link_gb_s, measured.is_some()),
        net_link: rate(links.net_bytes_per_s, args.net_gb_s, false),
        measured: measured.map(|measured| Measured {
            engine: measured.engine.as_str(),
            read_bytes: measured.read_bytes,
            resident: measured.resident,
            copy_ranks: measured.copy_ranks,
        }),
    }
}

fn report(
    plan: &Plan,
    nodes: u32,
    preset: &'static str,
    planning_seconds: f64,
    rates: Rates,
) -> Report {
    let ranks: Vec<Figures> =
        (0..).zip(plan.loads()).map(|(rank, load)| Figures::of(Some(rank), load)).collect();
    let totals = ranks.iter().fold(Figures::default(), Figures::add);
    Report {
        tensors: plan.tensors().len(),
        bytes: plan.checkpoint_bytes(),
        world: plan.world(),
        nodes,
        preset,
        digest: plan.digest().to_string(),
        planning_seconds,
        rates,
        staging_bytes: plan.staging_bytes(),
        predicted: plan.predict().into(),
        alternatives: Alternatives {
            each_reads_its_own: plan.predict_each_reads_own().into(),
            everyone_reads_all: plan.predict_everyone_reads_all().into(),
            broadcast_everything: plan.predict_broadcast_everything().into(),
        },
        totals,
        ranks,
        choices: choices(plan),
    }
}

fn choices(plan: &Plan) -> Vec<Way> {
    let mut ways: Vec<Way> = Vec::new();
    for class in plan.classes() {
        let choice = match class.choice {
            Choice::Nothing => "nothing",
            Choice::Direct => "direct",
            Choice::Scatter => "scatter",
            Choice::Broadcast => "broadcast",
            _ => "other",
        };
        let (tensors, bytes) = (class.tensors, class.tensors * class.bytes);
        match ways.iter_mut().find(|way| way.choice == choice) {
            Some(way) => (way.tensors, way.bytes) = (way.tensors + tensors, way.bytes + bytes),
            None => ways.push(Way { choice, tensors, bytes }),
        }
    }
    ways.sort_by_key(|way| std::cmp::Reverse(way.bytes));
    ways
}

/// What a choice means, for people.
fn meaning(choice: &str) -> &'static str {
    match choice {
        "nothing" => "kept by nobody, not read",
        "direct" => "each rank reads the part that it keeps",
        "scatter" => "read once, each rank receives the part that it keeps",
        "broadcast" => "read once, all ranks receive all of it",
        _ => "",
    }
}

fn render(report: &Report, args: &PlanArgs) -> String {
    let paths: Vec<String> =
        args.paths.iter().map(|path| visible(&path.display().to_string())).collect();
    let mut out = format!("{}\n", styled(HEADING, paths.join(" ")));
    out += &format!(
        "  {}, {} for {} on {} (preset {}): {}, bound by {}\n",
        counted(report.tensors as u64, "tensor"),
        text::bytes(report.bytes),
        counted(u64::from(report.world), "rank"),
        counted(u64::from(report.nodes), "node"),
        report.preset,
        styled(RESULT, text::seconds(report.predicted.seconds)),
        report.predicted.bound
    );
    let rate = |rate: &Rate| format!("{} ({})", text::rate(rate.gb_per_s), rate.source);
    let rates = format!(
        "  at {} per storage, {} per link in a node, {} between nodes; planned in {}",
        rate(&report.rates.storage),
        rate(&report.rates.node_link),
        rate(&report.rates.net_link),
        text::seconds(report.planning_seconds)
    );
    out += &format!("{}\n", styled(FAINT, rates));
    if let Some(measured) = &report.rates.measured {
        out += &format!("{}\n", styled(FAINT, how(&report.rates, measured)));
    }
    out += "\n";
    out += &rank_table(report).render();

    out += &format!("\n{}\n", styled(HEADING, "Ways"));
    let mut table = Table::new(&[Align::Left, Align::Right, Align::Right, Align::Left]);
    for way in &report.choices {
        table.row([
            way.choice.replace('_', " "),
            counted(way.tensors, "tensor"),
            text::bytes(way.bytes),
            meaning(way.choice).to_owned(),
        ]);
    }
    out += &table.render();

    out += &format!("\n{}\n", styled(HEADING, "Predicted"));
    let mut table = Table::new(&[Align::Left, Align::Right, Align::Left]);
    let others = &report.alternatives;
    for (name, predicted) in [
        ("this plan", &report.predicted),
        ("each rank reads its own part", &others.each_reads_its_own),
        ("each byte read once, broadcast to all", &others.broadcast_everything),
        ("every rank reads everything", &others.everyone_reads_all),
    ] {
        let bound = format!("bound by {}", predicted.bound);
        table.row([name.to_owned(), text::seconds(predicted.seconds), bound]);
    }
    out += &table.render();
    let staging = text::bytes(report.staging_bytes);
    out +=
        &format!("\n  staging of each rank: {staging} at most; digest {}\n", &report.digest[..16]);
    out
}

/// How rates were measured, for people.
fn how(rates: &Rates, measured: &Measured) -> String {
    let mut ways = Vec::new();
    let resident = measured.resident.map_or(String::new(), |resident| {
        format!(", {:.0}% of the files in the page cache", resident * 100.0)
    });
    let (bytes, engine) = (text::bytes(measured.read_bytes), measured.engine);
    let reader = format!("by one reader of {bytes} ({engine}{resident})");
    match rates.storage.source {
        "measured" => ways.push(format!("storage {reader}")),
        "page cache" => ways.push(format!(
            "memory {reader}; for storage give --storage-gb-s, or measure files that are not cached"
        )),
        _ => {}
    }
    if rates.node_link.source == "measured" {
        let ranks = counted(u64::from(measured.copy_ranks), "rank");
        ways.push(format!("links by copies between {ranks} in host memory"));
    }
    format!("  measured: {}", ways.join(", "))
}

fn rank_table(report: &Report) -> Table {
    let mut table = Table::new(&[Align::Right; 5]);
    table.row(["rank", "keeps", "reads", "sends", "receives"].map(str::to_owned));
    let cells = |name: String, figures: &Figures| {
        let Figures { kept, read, sent, received, .. } = *figures;
        let [kept, read, sent, received] = [kept, read, sent, received].map(text::bytes);
        [name, kept, read, sent, received]
    };
    let count = report.ranks.len();
    let shown = |index: usize| count <= LISTED || index < LISTED - 1 || index + 1 == count;
    for (index, figures) in report.ranks.iter().enumerate() {
        if shown(index) {
            table.row(cells(index.to_string(), figures));
        } else if shown(index - 1) {
            table.row(["...".to_owned()]);
        }
    }
    table.row(cells("all".to_owned(), &report.totals));
    table
}
