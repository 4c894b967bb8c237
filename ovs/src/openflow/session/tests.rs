//! The session, played through without a socket: every state with every kind of message, and any
//! order of things with what must hold after each.

use proptest::prelude::*;
use rust_openflow::flow::FlowMod;
use rust_openflow::multipart::{QueueStats, TableStats};
use rust_openflow::switch::{Port, PortReason, PortStatus};
use rust_openflow::{MacAddr, Match, PortNo, decode};

use super::*;
use crate::clock;

const SECOND: Duration = Duration::from_secs(1);

fn wire(xid: u32, message: &Message) -> BytesMut {
    let mut bytes = BytesMut::new();
    encode(xid, message, &mut bytes).unwrap();
    bytes
}

fn features() -> Features {
    Features { datapath_id: 7, buffers: 0, tables: 254, auxiliary: 0, capabilities: 0, reserved: 0 }
}

fn port_status() -> Message {
    let port = Port {
        port: PortNo(1),
        address: MacAddr([2; 6]),
        name: "p1".into(),
        config: 0,
        state: 0,
        current: 0,
        advertised: 0,
        supported: 0,
        peer: 0,
        current_speed: 0,
        max_speed: 0,
    };
    Message::PortStatus(PortStatus { reason: PortReason::Modify, port })
}

/// What the session has said since the last time, as (xid, message).
fn said(session: &mut Session) -> Vec<(u32, Message)> {
    let mut said = Vec::new();
    while let Some((header, message)) = decode(session.output()).unwrap() {
        said.push((header.xid, message));
    }
    said
}

fn told(session: &mut Session) -> Vec<Event> {
    std::iter::from_fn(|| session.next_event()).collect()
}

fn hello() -> Message {
    Message::Hello(Hello::offering(&[4]))
}

fn in_state(state: State, now: Instant) -> Session {
    let mut session = Session::new(Settings::default(), now);
    if state != State::Greeting {
        session.receive(now, &wire(1, &hello())).unwrap();
    }
    if state == State::Up || state == State::Closed {
        session.receive(now, &wire(2, &Message::FeaturesReply(features()))).unwrap();
    }
    if state == State::Closed {
        session.close();
    }
    said(&mut session);
    told(&mut session);
    session
}

#[test]
fn the_handshake_says_hello_asks_for_features_and_is_up() {
    let now = clock::now();
    let mut session = Session::new(Settings::default(), now);
    assert_eq!(said(&mut session), [(1, hello())]);
    session.receive(now, &wire(1, &hello())).unwrap();
    assert_eq!(said(&mut session), [(2, Message::FeaturesRequest)]);
    session.receive(now, &wire(2, &Message::FeaturesReply(features()))).unwrap();
    assert_eq!(told(&mut session), [Event::Up(features())]);
}

/// The picture above the session, pair by pair. `Err` stands for the end of the session.
#[test]
fn every_state_answers_every_kind_of_message() {
    let now = clock::now();
    let failure = Failure::new(0, 0);
    let messages = [
        hello(),
        Message::Hello(Hello { version: 1, bitmap: None }),
        Message::Error(failure),
        Message::FeaturesReply(features()),
        port_status(),
        Message::EchoRequest(Bytes::new()),
        Message::BarrierReply,
    ];
    let table = [
        (State::Greeting, ["Asking", "Err", "Err", "Err", "Err", "Greeting", "Err"]),
        (State::Asking, ["Err", "Err", "Err", "Up", "Asking", "Asking", "Err"]),
        (State::Up, ["Up"; 7]),
        (State::Closed, ["Closed"; 7]),
    ];
    for (state, row) in table {
        for (message, wanted) in messages.iter().zip(row) {
            let mut session = in_state(state, now);
            let result = session.receive(now, &wire(99, message));
            let became =
                if result.is_err() { "Err".into() } else { format!("{:?}", session.state) };
            assert_eq!(became, wanted, "{message:?} in {state:?}");
        }
    }
}

#[test]
fn a_switch_of_1_0_is_refused_with_what_to_do() {
    let mut session = in_state(State::Greeting, clock::now());
    let old = Message::Hello(Hello { version: 1, bitmap: None });
    let error = session.receive(clock::now(), &wire(5, &old)).unwrap_err();
    assert_eq!(error, SessionError::NoCommonVersion { theirs: vec![1] });
    assert_eq!(
        error.to_string(),
        "the switch speaks OpenFlow 1.0 and we speak 1.3: \
         ovs-vsctl set bridge BRIDGE protocols=OpenFlow13"
    );
    assert_eq!(said(&mut session), [(5, Message::Error(Failure::new(0, 0)))]);
}

#[test]
fn an_error_to_one_change_is_told_with_its_place_when_all_were_tried() {
    let now = clock::now();
    let mut session = in_state(State::Up, now);
    let flow = Message::FlowMod(FlowMod::add(1, 1, Match::any(), vec![]));
    let id = session.change(now, SECOND, &[flow.clone(), flow]).unwrap();
    let xids: Vec<_> = said(&mut session).into_iter().map(|(xid, _)| xid).collect();
    let failure = Failure::new(5, 1);
    session.receive(now, &wire(xids[1], &Message::Error(failure.clone()))).unwrap();
    assert_eq!(told(&mut session), []);
    session.receive(now, &wire(xids[2], &Message::BarrierReply)).unwrap();
    let refused = Err(RequestError::Refused { failure, index: 1 });
    assert_eq!(told(&mut session), [Event::Finished(id, refused)]);
}

#[test]
fn errors_and_answers_of_others_do_not_end_a_request() {
    let now = clock::now();
    let mut session = in_state(State::Up, now);
    let id = session.change(now, SECOND, &[]).unwrap();
    let foreign = Message::Error(Failure::new(1, 1));
    session.receive(now, &wire(4000, &foreign)).unwrap();
    session.receive(now, &wire(4001, &Message::BarrierReply)).unwrap();
    assert_eq!(told(&mut session), [Event::Asynchronous(foreign)]);
    session.receive(now, &wire(id.0, &Message::BarrierReply)).unwrap();
    assert_eq!(told(&mut session), [Event::Finished(id, Ok(Answer::Done))]);
}

#[test]
fn the_parts_of_an_answer_are_joined_up_to_a_limit() {
    let now = clock::now();
    let table = |table| TableStats { table, active: 0, lookups: 0, matched: 0 };
    let part =
        |number, flags| Message::MultipartReply { flags, reply: Reply::Table(vec![table(number)]) };
    let mut session = in_state(State::Up, now);
    let id = session.question(now, SECOND, Request::Table).unwrap();
    session.receive(now, &wire(id.0, &part(1, MORE))).unwrap();
    session.receive(now, &wire(id.0, &part(2, 0))).unwrap();
    let whole = Answer::Reply(Reply::Table(vec![table(1), table(2)]));
    assert_eq!(told(&mut session), [Event::Finished(id, Ok(whole))]);

    session.settings.parts_limit = 3;
    let id = session.question(now, SECOND, Request::Table).unwrap();
    for _ in 0..5 {
        session.receive(now, &wire(id.0, &part(1, MORE))).unwrap();
    }
    let refused = Err(RequestError::TooManyParts { limit: 3 });
    assert_eq!(told(&mut session), [Event::Finished(id, refused)]);
}

#[test]
fn an_answer_to_another_question_is_not_taken() {
    let now = clock::now();
    let mut session = in_state(State::Up, now);
    let id = session.question(now, SECOND, Request::Table).unwrap();
    let reply = Reply::Queue(Vec::<QueueStats>::new());
    session.receive(now, &wire(id.0, &Message::MultipartReply { flags: 0, reply })).unwrap();
    let refused = Err(RequestError::WrongAnswer { kind: 19 });
    assert_eq!(told(&mut session), [Event::Finished(id, refused)]);
}

#[test]
fn a_request_times_out_and_its_late_answer_is_ignored() {
    let now = clock::now();
    let mut session = in_state(State::Up, now);
    let id = session.change(now, SECOND, &[]).unwrap();
    assert_eq!(session.next_tick(), now + SECOND);
    session.tick(now + SECOND).unwrap();
    let late = Err(RequestError::TimedOut { within: SECOND });
    assert_eq!(told(&mut session), [Event::Finished(id, late)]);
    session.receive(now + SECOND, &wire(id.0, &Message::BarrierReply)).unwrap();
    assert_eq!(told(&mut session), []);
}

#[test]
fn a_silent_switch_is_probed_once_and_then_given_up() {
    let now = clock::now();
    let mut session = in_state(State::Up, now);
    session.tick(now + 5 * SECOND).unwrap();
    assert!(matches!(said(&mut session)[..], [(_, Message::EchoRequest(_))]));
    session.tick(now + 9 * SECOND).unwrap();
    let silent = SessionError::Silent { silent: 10 * SECOND };
    assert_eq!(session.tick(now + 10 * SECOND), Err(silent));
}

#[test]
fn a_handshake_does_not_take_for_ever() {
    let now = clock::now();
    let mut session = in_state(State::Asking, now);
    let slow = SessionError::SlowHandshake { within: 10 * SECOND };
    assert_eq!(session.tick(session.next_tick()), Err(slow));
}

#[test]
fn what_cannot_be_framed_ends_the_session_and_what_is_malformed_does_not() {
    let now = clock::now();
    let mut session = in_state(State::Up, now);
    let id = session.question(now, SECOND, Request::Table).unwrap();
    let mut cut = wire(id.0, &Message::MultipartReply { flags: 0, reply: Reply::Table(vec![]) });
    cut[3] = 12;
    cut.truncate(12);
    session.receive(now, &cut).unwrap();
    let events = told(&mut session);
    let wrong = Err(RequestError::WrongAnswer { kind: 19 });
    assert!(
        matches!(&events[..], [Event::Finished(_, result), Event::Skipped(_)] if *result == wrong)
    );
    let error = session.receive(now, &[4, 20, 0, 3, 0, 0, 0, 0]).unwrap_err();
    assert!(matches!(error, SessionError::Garbled(DecodeError::TooShort { .. })));
}

/// One thing that may happen.
#[derive(Debug, Clone)]
enum Step {
    Change(u8),
    Ask,
    Answer(u32, bool),
    Refuse(u32),
    Garbage(Vec<u8>),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0_u8..4).prop_map(Step::Change),
        Just(Step::Ask),
        (0_u32..60, any::<bool>()).prop_map(|(xid, more)| Step::Answer(xid, more)),
        (0_u32..60).prop_map(Step::Refuse),
        prop::collection::vec(any::<u8>(), 0..12).prop_map(Step::Garbage),
        (0_u64..4000).prop_map(Step::Wait),
    ]
}

proptest! {
    /// Whatever happens in whatever order, every request is finished exactly once.
    #[test]
    fn every_request_is_finished_exactly_once(steps in prop::collection::vec(step(), 1..60)) {
        let mut now = clock::now();
        let mut session = in_state(State::Up, now);
        let (mut asked, mut finished) = (Vec::new(), Vec::new());
        for step in steps {
            let flow = Message::FlowMod(FlowMod::add(1, 1, Match::any(), vec![]));
            let alive = match step {
                Step::Change(count) => {
                    let changes = vec![flow; count.into()];
                    asked.extend(session.change(now, SECOND, &changes));
                    Ok(())
                }
                Step::Ask => {
                    asked.extend(session.question(now, SECOND, Request::Table));
                    Ok(())
                }
                Step::Answer(xid, more) => {
                    let part = Message::MultipartReply {
                        flags: u16::from(more),
                        reply: Reply::Table(vec![]),
                    };
                    session.receive(now, &wire(xid, &part))
                        .and_then(|()| session.receive(now, &wire(xid + 1, &Message::BarrierReply)))
                }
                Step::Refuse(xid) => {
                    session.receive(now, &wire(xid, &Message::Error(Failure::new(5, 0))))
                }
                Step::Garbage(bytes) => session.receive(now, &bytes),
                Step::Wait(ms) => {
                    now += Duration::from_millis(ms);
                    session.tick(now)
                }
            };
            if alive.is_err() {
                break;
            }
            prop_assert!(session.owners.values().all(|owner| session.pending.contains_key(owner)));
        }
        session.close();
        for event in told(&mut session) {
            if let Event::Finished(id, _) = event {
                finished.push(id);
            }
        }
        finished.sort_unstable();
        asked.sort_unstable();
        prop_assert_eq!(asked, finished);
    }
}
