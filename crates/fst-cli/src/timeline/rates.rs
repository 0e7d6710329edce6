//! Bytes per second over time, from reads that overlap. Pure.

use std::time::Duration;

/// Something that brought `bytes` between `start` and `start + duration`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    pub(crate) start: Duration,
    pub(crate) duration: Duration,
    pub(crate) bytes: u64,
}

/// Bytes per second in each of `bins` equal parts of `total` seconds. Each transfer's bytes count as
/// spread evenly over its time.
pub(crate) fn rates(
    transfers: impl IntoIterator<Item = Transfer>,
    total: f64,
    bins: usize,
) -> Vec<f64> {
    let mut sums = vec![0.0; bins];
    if bins == 0 || total <= 0.0 {
        return sums;
    }
    let width = total / bins as f64;
    for Transfer { start, duration, bytes } in transfers {
        // A copy that takes no measurable time still belongs somewhere.
        let (start, length) = (start.as_secs_f64(), duration.as_secs_f64().max(1e-9));
        let end = start + length;
        let first = ((start / width) as usize).min(bins - 1);
        let last = ((end / width) as usize).min(bins - 1);
        for (bin, sum) in sums.iter_mut().enumerate().take(last + 1).skip(first) {
            let (from, to) = (bin as f64 * width, (bin + 1) as f64 * width);
            // What lies past the end counts in the last part.
            let to = if bin == bins - 1 { to.max(end) } else { to };
            *sum += bytes as f64 * ((to.min(end) - from.max(start)).max(0.0) / length);
        }
    }
    sums.iter().map(|bytes| bytes / width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(start: u64, duration: u64, bytes: u64) -> Transfer {
        let ms = Duration::from_millis;
        Transfer { start: ms(start), duration: ms(duration), bytes }
    }

    #[test]
    fn bytes_are_spread_over_their_time_and_none_is_lost() {
        let all = [transfer(0, 100, 100), transfer(50, 100, 200), transfer(180, 0, 7)];
        let got = rates(all, 0.2, 4);
        let want = [1000.0, 1000.0 + 2000.0, 2000.0, 7.0 / 0.05];
        assert!(got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-3), "{got:?}");
        for bins in [1, 3, 64, 1000] {
            let sum: f64 = rates(all, 0.2, bins).iter().map(|rate| rate * 0.2 / bins as f64).sum();
            assert!((sum - 307.0).abs() < 1e-6, "{bins}: {sum}");
        }
        let late = rates([transfer(190, 100, 10)], 0.2, 2);
        assert!((late[1] - 100.0).abs() < 1e-6, "{late:?}");
        assert_eq!(rates(all, 0.0, 2), [0.0, 0.0]);
    }
}
