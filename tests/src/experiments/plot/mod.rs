//! A figure: named series of medians with their intervals, written as a table, an SVG and a PNG.
//!
//! Made by the experiments out of their records ([`super::plots`]), written beside the record by the
//! program `lifeboat-experiment`. What the paper found is printed below what was measured, because
//! one without the other says little. Here are the data, the table and the files; `draw` has the
//! lines and colours. Deliberately not here: means and trends, which nobody measured.

mod draw;

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use lifeboat_lab::experiment::Record;
use lifeboat_lab::experiment::statistics::{median, median_interval};

/// A plot that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The file cannot be written.
    #[error("cannot write {}", .file.display())]
    Write {
        /// Which.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The drawing library refused.
    #[error("cannot draw {plot}: {said}")]
    Draw {
        /// The plot's name.
        plot: String,
        /// Its words.
        said: String,
    },
    /// The picture cannot be packed.
    #[error("cannot pack the picture of {plot}")]
    Pack {
        /// The plot's name.
        plot: String,
        /// What the encoder said.
        #[source]
        source: png::EncodingError,
    },
}

/// One figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Plot {
    /// Its files' name without an ending: `solive-6-time`.
    pub name: String,
    /// Its headline.
    pub title: String,
    /// What the paper or the peer found, where a reader compares.
    pub others_show: String,
    /// What lies below it.
    pub ground: Ground,
    /// What its height is, with the unit.
    pub height: String,
    /// What is drawn, in the order of the legend.
    pub series: Vec<Series>,
}

/// What lies below a figure, from left to right.
#[derive(Debug, Clone, PartialEq)]
pub enum Ground {
    /// Names; a point's `at` counts them from 0.
    Names {
        /// What they are.
        label: String,
        /// The names.
        names: Vec<String>,
    },
    /// Numbers.
    Numbers {
        /// What they are, with the unit.
        label: String,
    },
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A bar from zero for each point; several series stand side by side.
    Bars,
    /// A line through its points.
    Line,
}

/// Medians that belong together.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// How it is drawn.
    pub shape: Shape,
    /// From left to right.
    pub points: Vec<Point>,
}

/// A median.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Where on the ground.
    pub at: f64,
    /// How high.
    pub median: f64,
    /// Where the true median lies (95 %, or the whole range of fewer than 6 runs).
    pub interval: (f64, f64),
    /// Of how many runs; 0 where it was not measured but quoted.
    pub runs: usize,
}

impl Ground {
    /// Named points.
    #[must_use]
    pub fn names(label: &str, names: &[&str]) -> Self {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        Self::Names { label: label.to_owned(), names }
    }

    /// Numbers.
    #[must_use]
    pub fn numbers(label: &str) -> Self {
        Self::Numbers { label: label.to_owned() }
    }

    fn label(&self) -> &str {
        match self {
            Self::Names { label, .. } | Self::Numbers { label } => label,
        }
    }

    fn word(&self, at: f64) -> String {
        match self {
            Self::Names { names, .. } => names.get(at as usize).cloned().unwrap_or_default(),
            Self::Numbers { .. } => number(at),
        }
    }
}

impl Series {
    /// One figure of a record, for the cases that lie on the ground at these places. A case without
    /// a sample has no point.
    #[must_use]
    pub fn of(
        record: &Record,
        name: &str,
        shape: Shape,
        figure: &str,
        cases: &[(f64, &str)],
    ) -> Self {
        let point = |&(at, case): &(f64, &str)| Point::of(at, &record.figures(case, figure));
        Self { name: name.to_owned(), shape, points: cases.iter().filter_map(point).collect() }
    }
}

impl Point {
    /// The median of these samples; `None` without any.
    #[must_use]
    pub fn of(at: f64, samples: &[f64]) -> Option<Self> {
        let interval = median_interval(samples)?;
        let (median, runs) = (median(samples)?, samples.len());
        Some(Self { at, median, interval: (interval.low, interval.high), runs })
    }

    /// A figure that a paper prints: no interval, no runs.
    #[must_use]
    pub const fn quoted(at: f64, figure: f64) -> Self {
        Self { at, median: figure, interval: (figure, figure), runs: 0 }
    }
}

impl Plot {
    /// Writes `NAME.md` (the table), `NAME.svg` and `NAME.png` into a folder that is there, and says
    /// which files these are.
    ///
    /// # Errors
    /// When a file cannot be written, or the drawing library refuses.
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>, PlotError> {
        let files = [
            (folder.join(format!("{}.md", self.name)), self.table().into_bytes()),
            (folder.join(format!("{}.svg", self.name)), draw::svg(self)?.into_bytes()),
            (folder.join(format!("{}.png", self.name)), draw::png(self)?),
        ];
        let write = |(file, content): (PathBuf, Vec<u8>)| match fs::write(&file, content) {
            Ok(()) => Ok(file),
            Err(source) => Err(PlotError::Write { file, source }),
        };
        files.into_iter().map(write).collect()
    }

    /// The same as a Markdown table: a line for each place on the ground, a column for each series.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("{}: {}\n\n| {} |", self.title, self.height, self.ground.label());
        for series in &self.series {
            // Writing to a String cannot fail.
            let _ = write!(text, " {} |", series.name);
        }
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(self.series.len()));
        text.push('\n');
        for at in self.places() {
            let _ = write!(text, "| {} |", self.ground.word(at));
            for series in &self.series {
                let point = series.points.iter().find(|point| point.at == at);
                let _ = write!(text, " {} |", point.map_or_else(String::new, cell));
            }
            text.push('\n');
        }
        let _ = writeln!(text, "\nOthers show: {}", self.others_show);
        text
    }

    /// Every place that some series has a point at, from left to right.
    fn places(&self) -> Vec<f64> {
        let points = self.series.iter().flat_map(|series| &series.points);
        let mut places: Vec<f64> = points.map(|point| point.at).collect();
        places.sort_by(f64::total_cmp);
        places.dedup();
        places
    }
}

fn cell(point: &Point) -> String {
    if point.runs == 0 {
        return number(point.median);
    }
    let (low, high) = point.interval;
    format!("{} ({} .. {}; {})", number(point.median), number(low), number(high), point.runs)
}

/// Four significant digits, and none that say nothing.
fn number(value: f64) -> String {
    let digits = if value == 0.0 { 0 } else { 3 - value.abs().log10().floor() as i32 };
    let text = format!("{value:.*}", digits.clamp(0, 6) as usize);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests;
