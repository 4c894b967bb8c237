//! The client's report as JSON text. Pure; the client writes it to its file.
//!
//! Read by `lab/demo`, the tests and the experiments. Written by hand because this program is
//! also the guest's and stays small; the only strings in it are names that `params` has
//! restricted to harmless characters. Times are Unix milliseconds; lengths are
//! milliseconds with one decimal.

use std::fmt::Write as _;
use std::time::Duration;

use crate::gaps::{Gap, Gaps};
use crate::peer::Peer;

/// A guest's row in the report.
#[derive(Debug)]
pub(crate) struct Row<'a> {
    /// Its name.
    pub(crate) name: &'a str,
    /// What was seen of it.
    pub(crate) peer: &'a Peer,
    /// Bytes of traffic sent to it (role NI).
    pub(crate) traffic_sent: u64,
}

/// Everything that a report says.
#[derive(Debug)]
pub(crate) struct Report<'a> {
    /// True for the last report of a run.
    pub(crate) last: bool,
    /// Now, on the client's monotonic clock.
    pub(crate) now: Duration,
    /// The Unix time at which that clock started.
    pub(crate) epoch: Duration,
    /// Time between two heartbeats.
    pub(crate) interval: Duration,
    /// Gaps longer than this are listed.
    pub(crate) threshold: Duration,
    /// Bytes that came from guests of role NO.
    pub(crate) sink_received: u64,
    /// The client's own stalls: a gap that coincides with one is the client's, not the guest's.
    pub(crate) stalls: &'a Gaps,
    /// The guests.
    pub(crate) rows: Vec<Row<'a>>,
}

/// Silence on the checked stream after which it no longer counts as alive.
const STREAM_ALIVE: Duration = Duration::from_secs(2);
/// The same for heartbeats.
const GUEST_ALIVE: Duration = Duration::from_secs(1);

impl Report<'_> {
    /// The report as one line of JSON.
    pub(crate) fn to_json(&self) -> String {
        let mut text = format!(
            "{{\"final\":{},\"started_ms\":{},\"now_ms\":{},\"interval_ms\":{},\
             \"threshold_ms\":{},\"sink_bytes\":{},\"client_stalls\":{},\"guests\":[",
            self.last,
            self.epoch.as_millis(),
            (self.epoch + self.now).as_millis(),
            self.interval.as_millis(),
            self.threshold.as_millis(),
            self.sink_received,
            self.gap_list(self.stalls.kept()),
        );
        for (index, row) in self.rows.iter().enumerate() {
            text.push_str(if index == 0 { "" } else { "," });
            self.guest(&mut text, row);
        }
        text.push_str("]}\n");
        text
    }

    fn guest(&self, text: &mut String, row: &Row<'_>) {
        let peer = row.peer;
        let silent = peer.gaps.silent_for(self.now);
        let stream_silent = peer.stream_last.map(|at| self.now.saturating_sub(at));
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "{{\"name\":\"{}\",\"alive\":{},\"sent\":{},\"answered\":{},\"before_first\":{},\
             \"lost\":{},\"repeated\":{},\"ticks_went_backwards\":{},\"silent_ms\":{},\
             \"longest_gap_ms\":{},\"gap_count\":{},\"gaps\":{},\"corrupt\":{},\
             \"guest_errors\":{},\"stream\":{{\"alive\":{},\"bytes\":{},\"errors\":{},\
             \"lost_connections\":{}}},\"traffic_sent_bytes\":{},\"boot_ids\":[{}],\
             \"tick\":{},\"writes\":{},\"checked\":{}}}",
            row.name,
            silent.is_some_and(|silent| silent < GUEST_ALIVE),
            peer.asked,
            peer.answered,
            peer.before_first,
            peer.lost(),
            peer.repeated,
            peer.went_back,
            silent.map_or("null".to_owned(), millis),
            millis(peer.gaps.longest()),
            peer.gaps.count(),
            self.gap_list(peer.gaps.kept()),
            peer.corrupt(),
            peer.guest_errors,
            stream_silent.is_some_and(|silent| silent < STREAM_ALIVE),
            peer.stream_bytes,
            peer.stream_errors,
            peer.stream_lost,
            row.traffic_sent,
            boot_ids(peer),
            peer.last().map_or(0, |last| last.tick),
            peer.last().map_or(0, |last| last.writes),
            peer.last().map_or(0, |last| last.checked),
        );
    }

    fn gap_list(&self, gaps: &[Gap]) -> String {
        let one = |gap: &Gap| {
            let start = (self.epoch + gap.start).as_millis();
            format!("{{\"start_ms\":{start},\"length_ms\":{}}}", millis(gap.length))
        };
        format!("[{}]", gaps.iter().map(one).collect::<Vec<_>>().join(","))
    }
}

fn boot_ids(peer: &Peer) -> String {
    let hex = |id: &[u8; 16]| id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    peer.boot_ids.iter().map(|id| format!("\"{}\"", hex(id))).collect::<Vec<_>>().join(",")
}

fn millis(length: Duration) -> String {
    format!("{:.1}", length.as_secs_f64() * 1000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heartbeat::Answer;

    #[test]
    fn the_report_has_exactly_this_form() {
        let ms = Duration::from_millis;
        let mut peer = Peer::new(ms(50));
        peer.next_question();
        peer.next_question();
        let answer = |sequence| Answer { sequence, tick: sequence, ..Answer::default() };
        peer.answered(ms(100), answer(1));
        peer.answered(ms(300), answer(2));
        peer.streamed(ms(300), 40);
        let report = Report {
            last: true,
            now: ms(310),
            epoch: Duration::from_secs(1000),
            interval: ms(10),
            threshold: ms(50),
            sink_received: 7,
            stalls: &Gaps::new(ms(50)),
            rows: vec![Row { name: "web", peer: &peer, traffic_sent: 0 }],
        };
        let expected = "{\"final\":true,\"started_ms\":1000000,\"now_ms\":1000310,\
            \"interval_ms\":10,\"threshold_ms\":50,\"sink_bytes\":7,\"client_stalls\":[],\
            \"guests\":[{\"name\":\"web\",\"alive\":true,\"sent\":2,\"answered\":2,\
            \"before_first\":0,\"lost\":0,\"repeated\":0,\"ticks_went_backwards\":0,\"silent_ms\":10.0,\
            \"longest_gap_ms\":200.0,\"gap_count\":1,\"gaps\":[{\"start_ms\":1000100,\
            \"length_ms\":200.0}],\"corrupt\":false,\"guest_errors\":0,\"stream\":\
            {\"alive\":true,\"bytes\":40,\"errors\":0,\"lost_connections\":0},\
            \"traffic_sent_bytes\":0,\"boot_ids\":[\"00000000000000000000000000000000\"],\
            \"tick\":2,\"writes\":0,\"checked\":0}]}\n";
        assert_eq!(report.to_json(), expected);
    }
}
