//! The two text formats: OpenMetrics for whom asks for it, and Prometheus 0.0.4 for everyone else.
//!
//! They differ, as far as we use them, in how a counter is announced (`# TYPE x counter` with the sample `x_total`,
//! against `# TYPE x_total counter`) and in the lines `# UNIT` and `# EOF`.

use std::fmt;

use prometheus_client::encoding::text::encode;

use super::{Kind, Metrics, SERIES};

impl Metrics {
    /// All series as OpenMetrics 1.0.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn openmetrics(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }

    /// All series in the Prometheus text format 0.0.4.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn prometheus(&self) -> Result<String, fmt::Error> {
        let openmetrics = self.openmetrics()?;
        let mut text = String::with_capacity(openmetrics.len() + 512);
        for line in openmetrics.lines() {
            if line.starts_with("# EOF") || line.starts_with("# UNIT") {
                continue;
            }
            match announced_counter(line) {
                Some((keyword, name, rest)) => {
                    text.push_str(&format!("# {keyword} {name} {rest}"));
                }
                None => text.push_str(line),
            }
            text.push('\n');
        }
        Ok(text)
    }
}

/// Keyword, full name and rest of a line that announces a counter.
fn announced_counter(line: &str) -> Option<(&str, &'static str, &str)> {
    let (keyword, rest) = line.strip_prefix("# ")?.split_once(' ')?;
    let (short, rest) = rest.split_once(' ')?;
    let series = SERIES
        .iter()
        .find(|series| series.kind == Kind::Counter && series.name.strip_suffix("_total") == Some(short))?;
    Some((keyword, series.name, rest))
}
