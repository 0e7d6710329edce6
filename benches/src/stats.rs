//! Medians, quartiles and paired ratios of small samples.

use serde::{Deserialize, Serialize};

/// Five numbers about a sample.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Smallest value.
    pub min: f64,
    /// First quartile.
    pub q1: f64,
    /// Median.
    pub median: f64,
    /// Third quartile.
    pub q3: f64,
    /// Largest value.
    pub max: f64,
    /// Number of values.
    pub n: usize,
}

/// Summarises a sample; `None` when it is empty.
#[must_use]
pub fn summary(values: &[f64]) -> Option<Summary> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (&min, &max) = (sorted.first()?, sorted.last()?);
    Some(Summary {
        min,
        q1: quantile(&sorted, 0.25),
        median: quantile(&sorted, 0.5),
        q3: quantile(&sorted, 0.75),
        max,
        n: sorted.len(),
    })
}

/// Linear interpolation between the two nearest ranks (type 7, as R and numpy do by default).
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let position = q * (sorted.len() - 1) as f64;
    let low = position.floor() as usize;
    let high = (low + 1).min(sorted.len() - 1);
    sorted[low] + (sorted[high] - sorted[low]) * (position - low as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_agree_with_numpy() {
        // numpy.percentile([3, 1, 4, 1, 5, 9], [25, 50, 75])
        let s = summary(&[3.0, 1.0, 4.0, 1.0, 5.0, 9.0]).unwrap();
        assert_eq!((s.min, s.q1, s.median, s.q3, s.max, s.n), (1.0, 1.5, 3.5, 4.75, 9.0, 6));
        assert_eq!(summary(&[2.0]).unwrap().median, 2.0);
        assert_eq!(summary(&[]), None);
    }
}
