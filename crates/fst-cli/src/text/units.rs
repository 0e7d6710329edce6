//! Figures with units, in the sizes people think in. GB are 10^9 bytes, as on drives and in reports.

/// `13.48 GB`, `4.1 kB`, `12 B`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1000.0;
    let mut unit = 0;
    // 999.95 would be shown as 1000.0.
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = if unit >= 2 { 2 } else { 1 };
    format!("{value:.decimals$} {}", UNITS[unit])
}

/// `3.21 GB/s`.
pub(crate) fn rate(gb_per_s: f64) -> String {
    if gb_per_s.is_finite() { format!("{gb_per_s:.2} GB/s") } else { "-".to_owned() }
}

/// `1.43 s`, `312 ms`, `48 us`.
pub(crate) fn seconds(seconds: f64) -> String {
    if seconds >= 120.0 {
        format!("{:.0} min {:02.0} s", (seconds / 60.0).floor(), seconds % 60.0)
    } else if seconds >= 1.0 {
        format!("{seconds:.2} s")
    } else if seconds >= 0.001 {
        format!("{:.0} ms", seconds * 1e3)
    } else {
        format!("{:.0} us", seconds * 1e6)
    }
}

/// `18,867`.
pub(crate) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// `1 tensor`, `323 tensors`.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", count(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short_and_right() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(4096), "4.1 kB");
        assert_eq!(bytes(999_960), "1.0 MB");
        assert_eq!(bytes(13_476_835_328), "13.48 GB");
        assert_eq!(bytes(u64::MAX), "18446.74 PB");
        assert_eq!(rate(3.214), "3.21 GB/s");
        assert_eq!(rate(f64::INFINITY), "-");
        assert_eq!(seconds(4.321), "4.32 s");
        assert_eq!(seconds(0.3124), "312 ms");
        assert_eq!(seconds(0.000_048), "48 us");
        assert_eq!(seconds(185.0), "3 min 05 s");
        assert_eq!(count(7), "7");
        assert_eq!(count(91_991), "91,991");
        assert_eq!(count(1_000_000), "1,000,000");
    }
}
