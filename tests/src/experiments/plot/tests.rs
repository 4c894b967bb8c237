//! Tests of figures: the table to the letter, the pictures by what is in them.

use lifeboat_lab::experiment::{Machine, Record, Sample};

use super::draw::{lines, ticks};
use super::*;

fn record() -> Record {
    let sample = |case: &str, run, seconds| Sample {
        case: case.to_owned(),
        run,
        figures: [("seconds", seconds)].into(),
    };
    Record {
        name: "x".to_owned(),
        question: String::new(),
        others_show: String::new(),
        quick: true,
        began_unix: 0,
        machine: Machine {
            cpu: String::new(),
            cpus: 0,
            memory_bytes: 0,
            kernel: String::new(),
            qemu: String::new(),
            open_vswitch: String::new(),
            load_percent_before: 0,
        },
        parameters: serde_json::Value::Null,
        samples: vec![sample("a", 0, 20.0), sample("a", 1, 30.0), sample("b", 0, 41.5)],
        checks: vec![],
    }
}

fn plot(shape: Shape) -> Plot {
    let cases = [(0.0, "a"), (1.0, "b"), (2.0, "never run")];
    let ours = Series::of(&record(), "ours", shape, "seconds", &cases);
    let theirs = Series {
        name: "theirs".to_owned(),
        shape: Shape::Line,
        points: vec![Point::quoted(0.0, 13.0)],
    };
    Plot {
        name: "x-time".to_owned(),
        title: "How long".to_owned(),
        others_show: "13 s".to_owned(),
        ground: Ground::names("case", &["first", "second", "third"]),
        height: "seconds".to_owned(),
        series: vec![ours, theirs],
    }
}

#[test]
fn the_table_has_medians_with_intervals_and_leaves_out_what_was_not_measured() {
    assert_eq!(
        plot(Shape::Bars).table(),
        "How long: seconds\n\n| case | ours | theirs |\n|---|---|---|\n\
         | first | 25 (20 .. 30; 2) | 13 |\n| second | 41.5 (41.5 .. 41.5; 1) |  |\n\n\
         Others show: 13 s\n"
    );
}

#[test]
fn three_files_are_written_and_the_picture_says_what_it_shows() {
    let folder = tempfile::tempdir().unwrap();
    for shape in [Shape::Bars, Shape::Line] {
        let files = plot(shape).write(folder.path()).unwrap();
        assert_eq!(files.len(), 3);
        let svg = fs::read_to_string(folder.path().join("x-time.svg")).unwrap();
        for said in ["How long", "second", "ours", "theirs", "Others show: 13 s"] {
            assert!(svg.contains(said), "{said}");
        }
        let png = fs::read(folder.path().join("x-time.png")).unwrap();
        let mut reader = png::Decoder::new(io::Cursor::new(png)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let dark = pixels.chunks(3).filter(|rgb| rgb.iter().all(|part| *part < 100)).count();
        assert!(dark > 500, "there are letters and axes: {dark} dark pixels");
    }
}

#[test]
fn a_plot_of_nothing_is_drawn_as_nothing() {
    let folder = tempfile::tempdir().unwrap();
    for ground in [Ground::names("case", &[]), Ground::numbers("seconds")] {
        let empty = Plot { ground, series: vec![], ..plot(Shape::Line) };
        empty.write(folder.path()).unwrap();
    }
    let missing = plot(Shape::Bars).write(&folder.path().join("not there")).unwrap_err();
    assert!(missing.to_string().starts_with("cannot write "), "{missing}");
}

#[test]
fn ticks_are_round() {
    assert_eq!(ticks(0.0, 100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
    assert_eq!(ticks(0.0, 7.3).len(), 8);
    assert_eq!(ticks(-0.5, 0.5), [-0.4, -0.2, 0.0, 0.2, 0.4]);
    assert!(ticks(1.0, 1.0).is_empty() && ticks(0.0, f64::NAN).is_empty());
    for high in [0.001, 0.9, 3.0, 44.0, 5e9] {
        assert!((4..=10).contains(&ticks(0.0, high).len()), "{high}: {:?}", ticks(0.0, high));
    }
}

#[test]
fn long_sentences_are_broken_between_words() {
    assert_eq!(lines("one two three", 7), ["one two", "three"]);
    assert_eq!(lines("unbreakable a", 3), ["unbreakable", "a"]);
    assert!(lines("", 3).is_empty());
}
