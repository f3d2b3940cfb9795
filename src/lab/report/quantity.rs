//! Numbers for people: three significant digits and a unit.

/// What a number counts, in its base unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quantity {
    Seconds,
    Bytes,
    BitsPerSecond,
    PagesPerSecond,
    OperationsPerSecond,
    /// 0..=1, shown in percent.
    Share,
    /// How many times as much.
    Times,
    /// CPU seconds for a GiB of guest memory.
    CpuPerGib,
    /// Things that are counted: exact where they are whole.
    Count,
}

/// A unit that is written behind a number: from `from` base units on, `size` of them are one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    from: f64,
    pub(super) size: f64,
    pub(super) name: &'static str,
}

const fn unit(from: f64, size: f64, name: &'static str) -> Unit {
    Unit { from, size, name }
}

/// A unit that is used for every size.
const fn only(name: &'static str) -> [Unit; 1] {
    [unit(0.0, 1.0, name)]
}

const SECONDS: [Unit; 5] = [
    unit(0.0, 1e-6, "µs"),
    unit(1e-3, 1e-3, "ms"),
    unit(1.0, 1.0, "s"),
    unit(1_000.0, 60.0, "min"),
    unit(36_000.0, 3_600.0, "h"),
];
const BYTES: [Unit; 5] = [
    unit(0.0, 1.0, "B"),
    unit(1e3, 1e3, "kB"),
    unit(1e6, 1e6, "MB"),
    unit(1e9, 1e9, "GB"),
    unit(1e12, 1e12, "TB"),
];
const BITS_PER_SECOND: [Unit; 4] = [
    unit(0.0, 1.0, "bit/s"),
    unit(1e3, 1e3, "kbit/s"),
    unit(1e6, 1e6, "Mbit/s"),
    unit(1e9, 1e9, "Gbit/s"),
];
const PAGES_PER_SECOND: [Unit; 1] = only("pages/s");
const OPERATIONS_PER_SECOND: [Unit; 1] = only("/s");
const SHARE: [Unit; 1] = [unit(0.0, 0.01, "%")];
const NONE: [Unit; 1] = only("");

impl Quantity {
    fn units(self) -> &'static [Unit] {
        match self {
            Self::Seconds => &SECONDS,
            Self::Bytes => &BYTES,
            Self::BitsPerSecond => &BITS_PER_SECOND,
            Self::PagesPerSecond => &PAGES_PER_SECOND,
            Self::OperationsPerSecond => &OPERATIONS_PER_SECOND,
            Self::Share => &SHARE,
            Self::Times | Self::CpuPerGib | Self::Count => &NONE,
        }
    }

    /// The unit in which `value` reads best.
    pub(super) fn unit(self, value: f64) -> Unit {
        let units = self.units();
        let rounded = three_digits(value);
        let base = units.iter().find(|unit| unit.size == 1.0).unwrap_or(&units[0]);
        if rounded == 0.0 {
            return *base;
        }
        *units.iter().rev().find(|unit| rounded >= unit.from).unwrap_or(base)
    }

    /// `value` with its unit: `1.98 s`, `88.1 MB`.
    pub(super) fn show(self, value: f64) -> String {
        let unit = self.unit(value);
        self.with_unit(self.digits(value / unit.size), unit)
    }

    /// Two values in one unit: `1.92–2.31 s`; one where both are shown alike.
    pub(super) fn show_range(self, low: f64, high: f64) -> String {
        let unit = self.unit(high);
        let (low, high) = (self.digits(low / unit.size), self.digits(high / unit.size));
        let both = if low == high { low } else { format!("{low}–{high}") };
        self.with_unit(both, unit)
    }

    /// As [`Self::show`], with no zeros at the end: for an axis, where digits say nothing of precision.
    pub(super) fn tick(self, value: f64) -> String {
        let unit = self.unit(value);
        self.with_unit(short(value / unit.size), unit)
    }

    fn digits(self, value: f64) -> String {
        match self {
            Self::Count | Self::PagesPerSecond if value.fract() == 0.0 => grouped(value),
            Self::Count => format!("{value:.1}"),
            _ => digits(value),
        }
    }

    fn with_unit(self, number: String, unit: Unit) -> String {
        match (self, unit.name) {
            (Self::Times, _) => format!("{number}×"),
            (_, "") => number,
            // Not to be broken between the two.
            (_, name) => format!("{number}\u{a0}{name}"),
        }
    }
}

/// A number with three significant digits, those at the end included: `1.98`, `10.0`, `1 230`.
fn digits(value: f64) -> String {
    let value = three_digits(value);
    if value >= 1_000.0 {
        return grouped(value);
    }
    let decimals = if value == 0.0 { 0 } else { 2 - magnitude(value) };
    format!("{value:.*}", usize::try_from(decimals).unwrap_or(0))
}

/// A number without what is not needed: `0.5`, `10`.
pub(super) fn short(value: f64) -> String {
    let text = digits(value);
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// A whole number, its thousands apart.
pub(super) fn grouped(value: f64) -> String {
    let plain = format!("{value:.0}");
    if plain.len() <= 4 {
        return plain;
    }
    let mut text = String::with_capacity(plain.len() * 2);
    for (index, digit) in plain.chars().enumerate() {
        if index > 0 && (plain.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// Rounded first, so that the unit is that of what is shown: 999.9 kB is 1.00 MB.
fn three_digits(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return 0.0;
    }
    let scale = 10f64.powi(2 - magnitude(value));
    if !scale.is_finite() || scale == 0.0 {
        return 0.0;
    }
    (value * scale).round() / scale
}

/// Power of ten of the first digit.
fn magnitude(value: f64) -> i32 {
    // A double has no more than 10^308; the cast saturates.
    value.abs().log10().floor() as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_digits_and_the_unit_that_suits_them() {
        let shown = [
            Quantity::Seconds.show(1.984),
            Quantity::Seconds.show(0.1866),
            Quantity::Seconds.show(0.9999),
            Quantity::Seconds.show(154.2),
            Quantity::Seconds.show(3_000.0),
            Quantity::Bytes.show(88_123_456.0),
            Quantity::Bytes.show(999_900.0),
            Quantity::BitsPerSecond.show(1e9),
            Quantity::Share.show(0.943),
            Quantity::Share.show(0.0001),
            Quantity::Times.show(12.34),
            Quantity::Count.show(2.5),
            Quantity::Count.show(262_144.0),
        ];
        let expected = [
            "1.98 s",
            "187 ms",
            "1.00 s",
            "154 s",
            "50.0 min",
            "88.1 MB",
            "1.00 MB",
            "1.00 Gbit/s",
            "94.3 %",
            "0.0100 %",
            "12.3×",
            "2.5",
            "262 144",
        ];
        assert_eq!(shown.map(|text| text.replace(['\u{a0}', '\u{202f}'], " ")), expected);
    }

    #[test]
    fn a_range_has_one_unit() {
        assert_eq!(Quantity::Seconds.show_range(0.9, 2.31), "0.900–2.31\u{a0}s");
        assert_eq!(Quantity::Bytes.show_range(420.1e6, 420.2e6), "420\u{a0}MB");
    }

    #[test]
    fn ticks_have_no_zeros_at_the_end() {
        assert_eq!(Quantity::Seconds.tick(0.2), "200\u{a0}ms");
        assert_eq!(Quantity::Seconds.tick(10.0), "10\u{a0}s");
        assert_eq!(Quantity::Share.tick(0.0001), "0.01\u{a0}%");
        assert_eq!(Quantity::Seconds.tick(0.0), "0\u{a0}s");
    }

    #[test]
    fn what_is_absurd_is_still_written() {
        for value in [0.0, f64::MIN_POSITIVE, 1e-300, 1e300, f64::MAX, f64::INFINITY, f64::NAN] {
            for quantity in [Quantity::Seconds, Quantity::Bytes, Quantity::Share, Quantity::Count] {
                assert!(!quantity.show(value).is_empty());
                assert!(!quantity.tick(value).is_empty());
            }
        }
    }
}
