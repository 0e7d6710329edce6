//! Draws a section of the results: one bar a contender, with its spread.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::contender::{OURS, Op};
use crate::page_cache::CacheState;
use crate::report::{Results, Row};

const WIDTH: u32 = 860;
const ROW: u32 = 26;
const LEFT: u32 = 230;

/// An SVG drawing of medians with minimum and maximum.
///
/// # Errors
/// Errors of the drawing library.
pub fn svg(results: &Results, workload: &str, state: CacheState) -> Result<String> {
    let rows = results.rows(workload, state);
    let open = results.runs.iter().any(|r| r.workload == workload && r.op == Op::Open);
    let mut text = String::new();
    draw(&mut text, &rows, open, &format!("{workload}, {}", state.name()))
        .map_err(|error| anyhow!("drawing {workload}: {error}"))?;
    Ok(text)
}

/// Low, median and high of a row in the drawing's unit.
fn values(row: &Row, open: bool) -> (f64, f64, f64) {
    let s = row.seconds;
    if open {
        (s.min * 1e3, s.median * 1e3, s.max * 1e3)
    } else {
        let gb = row.bytes as f64 / 1e9;
        (gb / s.max, gb / s.median, gb / s.min)
    }
}

fn draw(
    text: &mut String,
    rows: &[Row],
    open: bool,
    title: &str,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let height = ROW * rows.len() as u32 + 90;
    let area = SVGBackend::with_string(text, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let top = rows.iter().map(|row| values(row, open).2).fold(0.0, f64::max).max(1e-9) * 1.05;
    let unit = if open { "ms (less is better)" } else { "GB/s" };
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin_right(20)
        .x_label_area_size(44)
        .y_label_area_size(LEFT)
        .build_cartesian_2d(0.0..top, 0.0..rows.len() as f64)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc(unit)
        .label_style(("sans-serif", 13))
        .draw()?;
    for (i, row) in rows.iter().enumerate() {
        let y = (rows.len() - 1 - i) as f64;
        let (low, median, high) = values(row, open);
        let ours =
            row.label == OURS || row.label.starts_with("fst/") || row.label.starts_with("fst-");
        let colour = if ours { RGBColor(0xc8, 0x50, 0x1e) } else { RGBColor(0x7a, 0x94, 0xb8) };
        chart.draw_series([
            Rectangle::new([(0.0, y + 0.15), (median, y + 0.85)], colour.filled()),
            Rectangle::new([(low, y + 0.47), (high, y + 0.53)], BLACK.filled()),
        ])?;
        let (_, pixel) = chart.backend_coord(&(0.0, y + 0.5));
        let style =
            ("sans-serif", 13).into_text_style(&area).pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Right,
                plotters::style::text_anchor::VPos::Center,
            ));
        area.draw(&Text::new(
            format!("{}  {median:.2}", row.label),
            (LEFT as i32 - 8, pixel),
            style,
        ))?;
    }
    area.present()?;
    Ok(())
}
