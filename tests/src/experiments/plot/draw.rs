//! The lines and colours of a [`Plot`], as SVG and as PNG.
//!
//! Used by [`Plot::write`]. Letters come from a font inside of the program, so that a picture looks
//! the same on a machine without fonts. Colours are those of Okabe and Ito, which also those see who
//! do not tell red from green.

use std::sync::Once;

use epaint_default_fonts::UBUNTU_LIGHT;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;
use plotters::style::register_font;

use super::{Ground, Plot, PlotError, Point, Series, Shape, number};

/// In pixels.
const SIZE: (u32, u32) = (960, 600);
const MARGIN: u32 = 18;
const FONT: &str = "sans-serif";
const LETTER: u32 = 15;
const SMALL: u32 = 13;
/// As many letters of `SMALL` fit below a picture in one line, on average.
const LETTERS: usize = 140;
/// What all bars of one name take of its room.
const BARS: f64 = 0.76;
/// Half the width of an interval's ends, in parts of the ground.
const END: f64 = 0.006;
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(110, 110, 110),
];

/// A scale whose marks are ours: the library's own would stand between names.
struct Axis {
    low: f64,
    high: f64,
    marks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let part = (value - self.low) / (self.high - self.low);
        first + (part * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { vec![] } else { self.marks.clone() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

type Chart<'a, B> = ChartContext<'a, B, Cartesian2d<Axis, Axis>>;
type Drawn<B> = Result<(), DrawingAreaErrorKind<<B as DrawingBackend>::ErrorType>>;

/// The picture as the text of an SVG file.
pub(super) fn svg(plot: &Plot) -> Result<String, PlotError> {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
    draw(plot, &area).map_err(refused(plot))?;
    drop(area);
    Ok(text)
}

/// The picture as the bytes of a PNG file.
pub(super) fn png(plot: &Plot) -> Result<Vec<u8>, PlotError> {
    let mut pixels = vec![0; SIZE.0 as usize * SIZE.1 as usize * 3];
    let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
    draw(plot, &area).map_err(refused(plot))?;
    drop(area);
    packed(&pixels).map_err(|source| PlotError::Pack { plot: plot.name.clone(), source })
}

fn refused<E: std::fmt::Display>(plot: &Plot) -> impl FnOnce(E) -> PlotError {
    let plot = plot.name.clone();
    move |said| PlotError::Draw { plot, said: said.to_string() }
}

fn packed(pixels: &[u8]) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, SIZE.0, SIZE.1);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

/// The library asks for a font by its name.
fn letters_are_known() {
    static KNOWN: Once = Once::new();
    // A font that is none would make every text an error of its own.
    KNOWN.call_once(|| drop(register_font(FONT, FontStyle::Normal, UBUNTU_LIGHT)));
}

fn draw<B: DrawingBackend>(plot: &Plot, area: &DrawingArea<B, Shift>) -> Drawn<B> {
    letters_are_known();
    area.fill(&WHITE)?;
    let below = lines(&format!("Others show: {}", plot.others_show), LETTERS);
    let line_height = SMALL + 4;
    let room = MARGIN + line_height * below.len() as u32;
    let (upper, lower) = area.split_vertically(SIZE.1.saturating_sub(room));
    for (index, line) in below.into_iter().enumerate() {
        let at = (MARGIN as i32, (line_height * index as u32) as i32);
        lower.draw(&Text::new(line, at, (FONT, SMALL)))?;
    }
    let (x, y) = axes(plot);
    let mut chart = ChartBuilder::on(&upper)
        .caption(&plot.title, (FONT, LETTER + 6))
        .margin(MARGIN)
        .x_label_area_size(46)
        .y_label_area_size(70)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(plot.ground.label())
        .y_desc(&plot.height)
        .label_style((FONT, LETTER))
        .axis_desc_style((FONT, LETTER))
        .x_label_formatter(&|at| plot.ground.word(*at))
        .y_label_formatter(&|at| number(*at))
        .draw()?;
    all_series(plot, &mut chart)?;
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, LETTER))
        .draw()?;
    area.present()
}

fn all_series<B: DrawingBackend>(plot: &Plot, chart: &mut Chart<'_, B>) -> Drawn<B> {
    let bars = plot.series.iter().filter(|series| series.shape == Shape::Bars).count().max(1);
    let (left, right) = ground_range(plot);
    let end = (right - left) * END;
    let mut drawn_bars = 0;
    for (index, series) in plot.series.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        match series.shape {
            Shape::Bars => {
                let width = BARS * narrowest(plot) / bars as f64;
                let first = (drawn_bars as f64 - bars as f64 / 2.0) * width;
                draw_bars(series, colour, (first, width), end, chart)?;
                drawn_bars += 1;
            }
            Shape::Line => draw_line(series, colour, end, chart)?,
        }
    }
    Ok(())
}

fn draw_bars<B: DrawingBackend>(
    series: &Series,
    colour: RGBColor,
    (first, width): (f64, f64),
    end: f64,
    chart: &mut Chart<'_, B>,
) -> Drawn<B> {
    let bar = |point: &Point| {
        let corners = [(point.at + first, 0.0), (point.at + first + width * 0.94, point.median)];
        Rectangle::new(corners, colour.mix(0.75).filled())
    };
    chart
        .draw_series(series.points.iter().map(bar))?
        .label(&series.name)
        .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 16, y + 5)], colour.filled()));
    for point in &series.points {
        interval(point, point.at + first + width * 0.47, end, BLACK, chart)?;
    }
    Ok(())
}

fn draw_line<B: DrawingBackend>(
    series: &Series,
    colour: RGBColor,
    end: f64,
    chart: &mut Chart<'_, B>,
) -> Drawn<B> {
    let path = series.points.iter().map(|point| (point.at, point.median));
    chart
        .draw_series(LineSeries::new(path.clone(), colour.stroke_width(2)))?
        .label(&series.name)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(3)));
    chart.draw_series(path.map(|at| Circle::new(at, 4, colour.filled())))?;
    for point in &series.points {
        interval(point, point.at, end, colour, chart)?;
    }
    Ok(())
}

/// A line from the lower to the upper end, with a dash at both. What was quoted has none.
fn interval<B: DrawingBackend>(
    point: &Point,
    at: f64,
    end: f64,
    colour: RGBColor,
    chart: &mut Chart<'_, B>,
) -> Drawn<B> {
    if point.runs == 0 {
        return Ok(());
    }
    let (low, high) = point.interval;
    let dash = |height| vec![(at - end, height), (at + end, height)];
    let lines = [vec![(at, low), (at, high)], dash(low), dash(high)];
    chart.draw_series(lines.map(|line| PathElement::new(line, colour.stroke_width(1))))?;
    Ok(())
}

fn axes(plot: &Plot) -> (Axis, Axis) {
    let (left, right) = ground_range(plot);
    let marks = match &plot.ground {
        Ground::Names { names, .. } => (0..names.len()).map(|index| index as f64).collect(),
        Ground::Numbers { .. } => ticks(left, right),
    };
    let points = || plot.series.iter().flat_map(|series| &series.points);
    let highest = points().map(|p| p.interval.1.max(p.median)).fold(0.0, f64::max);
    let lowest = points().map(|p| p.interval.0.min(p.median)).fold(0.0, f64::min);
    // Room for the legend; and a range of nothing has no scale.
    let top = if highest > lowest { highest + (highest - lowest) * 0.18 } else { lowest + 1.0 };
    let height = Axis { low: lowest, high: top, marks: ticks(lowest, top) };
    (Axis { low: left, high: right, marks }, height)
}

fn ground_range(plot: &Plot) -> (f64, f64) {
    if let Ground::Names { names, .. } = &plot.ground {
        return (-0.5, names.len().max(1) as f64 - 0.5);
    }
    let places = plot.places();
    let (first, last) =
        (places.first().copied().unwrap_or(0.0), places.last().copied().unwrap_or(1.0));
    let bars = plot.series.iter().any(|series| series.shape == Shape::Bars);
    let margin = match bars {
        true => narrowest(plot) / 2.0,
        false if last > first => (last - first) * 0.04,
        false => 0.5,
    };
    (first - margin, last + margin)
}

/// The least distance of two places: bars must not lie over each other.
fn narrowest(plot: &Plot) -> f64 {
    if matches!(plot.ground, Ground::Names { .. }) {
        return 1.0;
    }
    let places = plot.places();
    let least = places.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::INFINITY, f64::min);
    if least.is_finite() { least } else { 1.0 }
}

/// Round numbers from `low` to `high`, four to ten of them: steps of 1, 2 or 5 times a power of ten.
pub(super) fn ticks(low: f64, high: f64) -> Vec<f64> {
    let range = high - low;
    if !range.is_finite() || range <= 0.0 {
        return vec![];
    }
    let power = 10_f64.powf((range / 5.0).log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = steps.into_iter().find(|step| range / step <= 9.0).unwrap_or(range);
    let first = (low / step).ceil() as i64;
    let last = (high / step).floor() as i64;
    (first..=last).map(|index| index as f64 * step).collect()
}

/// Words in lines of at most `letters`; a longer word has a line of its own.
pub(super) fn lines(text: &str, letters: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= letters => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
