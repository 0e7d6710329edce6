//! Tables of aligned columns without lines, indented by two spaces.

/// On which side of its column a cell stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// No column is cut to fewer characters.
const NARROWEST: usize = 12;

fn width_of(cell: &str) -> usize {
    cell.chars().count()
}

/// Rows of cells.
#[derive(Debug)]
pub(crate) struct Table {
    columns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with columns aligned like this.
    pub(crate) fn new(columns: &[Align]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// Keeps only this many rows, and a remark on those left out.
    pub(crate) fn at_most(mut self, rows: usize, remark: impl Fn(usize) -> String) -> Self {
        if self.rows.len() > rows {
            let left_out = self.rows.split_off(rows).len();
            self.rows.push(vec![remark(left_out)]);
        }
        self
    }

    /// Cuts the cells of the widest column, in their middles, so that rows have no more than this many
    /// characters if that can be; for cells without colours.
    pub(crate) fn fit(mut self, most: usize) -> Self {
        let widths = self.widths();
        let excess = (widths.iter().sum::<usize>() + 2 * widths.len()).saturating_sub(most);
        if let Some((column, width)) =
            widths.into_iter().enumerate().max_by_key(|(_, width)| *width)
        {
            let room = width.saturating_sub(excess).max(NARROWEST);
            self.rows.iter_mut().filter_map(|row| row.get_mut(column)).for_each(|cell| {
                let count = width_of(cell);
                if count > room {
                    let head = room / 2;
                    let tail = cell.chars().skip(count - (room - head - 1));
                    *cell = cell.chars().take(head).chain(['\u{2026}']).chain(tail).collect();
                }
            });
        }
        self
    }

    fn widths(&self) -> Vec<usize> {
        let cells = |column: usize| self.rows.iter().filter_map(move |row| row.get(column));
        let widest = |column| cells(column).map(|cell| width_of(cell)).max().unwrap_or(0);
        (0..self.columns.len()).map(widest).collect()
    }

    /// The table as text: one line per row.
    pub(crate) fn render(&self) -> String {
        let widths = self.widths();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, &align), &column_width) in row.iter().zip(&self.columns).zip(&widths) {
                let padding = " ".repeat(column_width - width_of(cell));
                line.push_str("  ");
                match align {
                    Align::Left => line.extend([cell.as_str(), &padding]),
                    Align::Right => line.extend([padding.as_str(), cell]),
                }
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&[Align::Left, Align::Right, Align::Left]);
        table.row(["a", "10", "x"].map(String::from));
        table.row(["longer", "7", ""].map(String::from));
        table.row(["ä", "100"].map(String::from));
        assert_eq!(table.render(), "  a        10  x\n  longer    7\n  ä       100\n");
    }

    #[test]
    fn wide_and_long_tables_are_cut() {
        let mut table = Table::new(&[Align::Left, Align::Right]);
        for layer in 0..5 {
            table.row([format!("model.layers.{layer}.q_proj.weight"), "1 B".to_owned()]);
        }
        let cut = table.at_most(1, |left_out| format!("{left_out} more")).fit(27).render();
        assert_eq!(cut, "  model.laye\u{2026}oj.weight  1 B\n  4 more\n");
        let mut narrow = Table::new(&[Align::Left]);
        narrow.row(["a name of some length".to_owned()]);
        assert_eq!(narrow.fit(3).render(), "  a name\u{2026}ength\n");
    }
}
