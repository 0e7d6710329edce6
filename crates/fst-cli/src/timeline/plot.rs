//! Throughput over time as an SVG: one line for each way that bytes took, and one for all.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use fst::LoadReport;
use plotters::prelude::*;

use super::rates::{Transfer, rates};
use super::trace::way;
use crate::text;

const SIZE: (u32, u32) = (960, 420);
const BINS: usize = 120;

/// Distinguishable also for the colour-blind (Okabe and Ito).
const COLOURS: [RGBColor; 5] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0x56, 0xb4, 0xe9),
];

/// What moved, by the name that it has in the drawing.
fn transfers(report: &LoadReport) -> BTreeMap<&'static str, Vec<Transfer>> {
    let mut by_way: BTreeMap<&'static str, Vec<Transfer>> = BTreeMap::new();
    for event in &report.events {
        let transfer =
            Transfer { start: event.start, duration: event.duration, bytes: event.bytes };
        by_way.entry(way(event.stage)).or_default().push(transfer);
    }
    // Of what has no blocks, such as bringing in a mapping, only the whole is known.
    let mut began = 0.0;
    for stage in report.stages.iter().filter(|stage| stage.part_of().is_none()) {
        let time = |seconds| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        if stage.bytes > 0 && !matches!(stage.name, "read" | "map") {
            let (start, duration) = (time(began), time(stage.seconds));
            let transfer = Transfer { start, duration, bytes: stage.bytes };
            by_way.entry(stage.name).or_default().push(transfer);
        }
        began += stage.seconds;
    }
    by_way
}

/// The drawing.
pub(crate) fn svg(report: &LoadReport) -> Result<String, Box<dyn Error>> {
    let mut out = String::new();
    let total = report.seconds.max(1e-6);
    let lines: Vec<(&str, Vec<f64>)> = transfers(report)
        .into_iter()
        .map(|(name, moved)| (name, rates(moved, total, BINS).iter().map(|r| r / 1e9).collect()))
        .collect();
    let top = lines.iter().flat_map(|(_, rates)| rates).copied().fold(0.0, f64::max).max(1e-6);
    let area = SVGBackend::with_string(&mut out, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut title = format!("{} in {}", text::bytes(report.bytes), text::seconds(report.seconds));
    // What is mapped is not moved.
    if report.stage("map").is_none() {
        title += &format!(": {}", text::rate(report.gb_per_s()));
    }
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..total * 1e3, 0.0..top * 1.1)?;
    chart
        .configure_mesh()
        .x_desc("ms since the load began")
        .y_desc("GB/s")
        .label_style(("sans-serif", 12))
        .light_line_style(WHITE)
        .draw()?;
    let middle = |bin: usize| (bin as f64 + 0.5) / BINS as f64 * total * 1e3;
    for ((name, rates), colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let points = rates.iter().enumerate().map(|(bin, rate)| (middle(bin), *rate));
        chart
            .draw_series(LineSeries::new(points, colour.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 14, y + 4)], colour.filled()));
    }
    if !lines.is_empty() {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .label_font(("sans-serif", 13))
            .draw()?;
    }
    area.present()?;
    drop(chart);
    drop(area);
    Ok(out)
}
