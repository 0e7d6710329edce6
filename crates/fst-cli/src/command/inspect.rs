//! `fst inspect`: what a checkpoint holds, from its headers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fst::{Checkpoint, Dtype, Metadata, TensorInfo};
use serde::Serialize;

use crate::args::InspectArgs;
use crate::failure::Failure;
use crate::reading;
use crate::text::{self, Align, HEADING, Table, counted, styled, summarize, visible};

/// More tensors than this are summarized unless all are asked for.
const LISTED: usize = 50;

/// More rows than this are cut off elsewhere, unless all are asked for: of a checkpoint as published, every
/// pattern of names, and the files of all but a few.
const ROWS: usize = 200;

/// The longest metadata value shown to people, in characters.
const METADATA_SHOWN: usize = 100;

#[derive(Serialize)]
struct Report<'c> {
    tensors: Vec<TensorReport<'c>>,
    dtypes: Vec<DtypeReport>,
    files: Vec<FileReport<'c>>,
    metadata: &'c Metadata,
    total: Total,
    /// What may not be meant.
    notices: Vec<String>,
}

#[derive(Serialize)]
struct TensorReport<'c> {
    name: &'c str,
    dtype: &'static str,
    shape: &'c [usize],
    bytes: u64,
    /// Position in `files`.
    file: usize,
    /// From the start of the file.
    offset: u64,
}

#[derive(Serialize)]
struct DtypeReport {
    dtype: &'static str,
    tensors: u64,
    elements: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct FileReport<'c> {
    path: String,
    /// Length of the file, header included.
    bytes: u64,
    /// How many of its tensors were selected, and their bytes.
    tensors: u64,
    tensor_bytes: u64,
    data_start: u64,
    metadata: &'c Metadata,
}

/// Of what was selected.
#[derive(Serialize)]
struct Total {
    tensors: u64,
    elements: u64,
    bytes: u64,
    files: u64,
}

pub(crate) fn run(args: &InspectArgs) -> Result<(), Failure> {
    let checkpoint = reading::open(&args.paths, &args.select.options())?;
    let chosen = reading::selected(&checkpoint, &args.select)
        .map_err(|error| reading::failure(&args.paths, &checkpoint, &error))?;
    let report = Report::of(&checkpoint, &chosen);
    if args.json {
        return text::print_json(&report).map_err(Failure::output);
    }
    let whole = (chosen.len() < checkpoint.tensors().len()).then_some(&checkpoint);
    text::print(&report.render(&args.paths, args.all, whole)).map_err(Failure::output)
}

impl<'c> Report<'c> {
    fn of(checkpoint: &'c Checkpoint, chosen: &'c [TensorInfo]) -> Self {
        let mut dtypes: BTreeMap<Dtype, DtypeReport> = BTreeMap::new();
        for tensor in chosen {
            let dtype = tensor.dtype();
            let sums = dtypes.entry(dtype).or_insert_with(|| DtypeReport {
                dtype: dtype.as_str(),
                tensors: 0,
                elements: 0,
                bytes: 0,
            });
            sums.tensors += 1;
            sums.elements += tensor.elements();
            sums.bytes += tensor.byte_len();
        }
        // The dtype that fills the checkpoint comes first.
        let mut dtypes: Vec<DtypeReport> = dtypes.into_values().collect();
        dtypes.sort_by_key(|sums| std::cmp::Reverse(sums.bytes));
        // Files of which something was selected, and where they stand among these.
        let all = chosen.len() == checkpoint.tensors().len();
        let mut files: Vec<FileReport<'c>> = Vec::new();
        let mut places = vec![0; checkpoint.shards().len()];
        let mut sums = vec![(0, 0); checkpoint.shards().len()];
        for tensor in chosen {
            let (tensors, bytes) = &mut sums[tensor.shard()];
            (*tensors, *bytes) = (*tensors + 1, *bytes + tensor.byte_len());
        }
        for (index, (shard, (tensors, tensor_bytes))) in
            checkpoint.shards().iter().zip(sums).enumerate()
        {
            if tensors > 0 || all {
                places[index] = files.len();
                files.push(FileReport {
                    path: shard.path().display().to_string(),
                    bytes: shard.len(),
                    tensors,
                    tensor_bytes,
                    data_start: shard.data_start(),
                    metadata: shard.metadata(),
                });
            }
        }
        let tensors: Vec<TensorReport<'c>> = chosen
            .iter()
            .map(|tensor| TensorReport {
                name: tensor.name(),
                dtype: tensor.dtype().as_str(),
                shape: tensor.shape(),
                bytes: tensor.byte_len(),
                file: places[tensor.shard()],
                offset: tensor.file_range().start,
            })
            .collect();
        let total = Total {
            tensors: tensors.len() as u64,
            elements: dtypes.iter().map(|sums| sums.elements).sum(),
            bytes: dtypes.iter().map(|sums| sums.bytes).sum(),
            files: files.len() as u64,
        };
        let notices = checkpoint.notices().iter().map(ToString::to_string).collect();
        Report { tensors, dtypes, files, metadata: checkpoint.metadata(), total, notices }
    }

    /// The report for people; `whole` is the checkpoint of which this is a part.
    fn render(&self, paths: &[PathBuf], all: bool, whole: Option<&Checkpoint>) -> String {
        let mut out = String::new();
        let names: Vec<String> =
            paths.iter().map(|path| visible(&path.display().to_string())).collect();
        out += &format!("{}\n", styled(HEADING, names.join(" ")));
        let Total { tensors, elements, bytes, files } = self.total;
        out += &format!(
            "  {}, {} elements, {} in {}\n",
            counted(tensors, "tensor"),
            text::count(elements),
            text::bytes(bytes),
            counted(files, "file")
        );
        if let Some(whole) = whole {
            out += &format!(
                "  of {}, {} in {}\n",
                counted(whole.tensors().len() as u64, "tensor"),
                text::bytes(whole.byte_len()),
                counted(whole.shards().len() as u64, "file")
            );
        }
        if !self.notices.is_empty() {
            let mut table = Table::new(&[Align::Left]);
            for notice in &self.notices {
                table.row([visible(notice)]);
            }
            out += &section("Notices", table, usize::MAX);
        }
        let rows = if all { usize::MAX } else { ROWS };
        out += &section("Dtypes", self.dtype_table(), rows);
        out += &section("Files", self.file_table(whole.is_some()), rows);
        if !self.metadata.is_empty() {
            out += &section("Metadata", self.metadata_table(), rows);
        }
        if all || self.tensors.len() <= LISTED {
            out += &section("Tensors", self.tensor_table(), rows);
        } else {
            out += &section("Tensors by name (--all lists each)", self.pattern_table(), rows);
        }
        out
    }

    fn dtype_table(&self) -> Table {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Right, Align::Right]);
        for sums in &self.dtypes {
            table.row([
                sums.dtype.to_owned(),
                counted(sums.tensors, "tensor"),
                format!("{} elements", text::count(sums.elements)),
                text::bytes(sums.bytes),
            ]);
        }
        table
    }

    fn file_table(&self, selected: bool) -> Table {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Right]);
        for file in &self.files {
            let tensors = counted(file.tensors, "tensor");
            let bytes = if selected { file.tensor_bytes } else { file.bytes };
            table.row([visible(&file.path), tensors, text::bytes(bytes)]);
        }
        table
    }

    fn metadata_table(&self) -> Table {
        let mut table = Table::new(&[Align::Left, Align::Left]);
        for (key, value) in self.metadata.iter() {
            let mut shown = visible(&value.chars().take(METADATA_SHOWN).collect::<String>());
            if value.chars().nth(METADATA_SHOWN).is_some() {
                shown.push_str("...");
            }
            table.row([visible(key), shown]);
        }
        table
    }

    fn tensor_table(&self) -> Table {
        let mut table = Table::new(&[Align::Left, Align::Left, Align::Left, Align::Right]);
        for tensor in &self.tensors {
            table.row([
                visible(tensor.name),
                tensor.dtype.to_owned(),
                shape(tensor.shape),
                text::bytes(tensor.bytes),
            ]);
        }
        table
    }

    fn pattern_table(&self) -> Table {
        let mut table =
            Table::new(&[Align::Left, Align::Right, Align::Left, Align::Left, Align::Right]);
        let named = self
            .tensors
            .iter()
            .map(|tensor| (tensor.name, (tensor.dtype, tensor.shape, tensor.bytes)));
        for pattern in summarize(named) {
            let (dtype, dims, bytes) = pattern.key;
            table.row([
                visible(&pattern.name),
                format!("{} x", text::count(pattern.count)),
                dtype.to_owned(),
                shape(dims),
                text::bytes(bytes.saturating_mul(pattern.count)),
            ]);
        }
        table
    }
}

fn section(title: &str, table: Table, rows: usize) -> String {
    let more =
        |left_out| format!("... and {} more (--all lists each)", text::count(left_out as u64));
    let table = table.at_most(rows, more);
    let table = match text::width() {
        Some(width) => table.fit(width),
        None => table,
    };
    format!("\n{}\n{}", styled(HEADING, title), table.render())
}

fn shape(dims: &[usize]) -> String {
    format!("[{}]", dims.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
}
