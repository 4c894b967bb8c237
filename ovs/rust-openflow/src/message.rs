//! All messages, and the two verbs: [`decode`] and [`encode`].
//!
//! Used by sessions. A message is framed by its header's length, judged first; then its body is
//! read from exactly those bytes. What follows a body that needs fewer is ignored, as later minor
//! versions may append fields.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::failure::Failure;
use crate::flow::{FlowMod, FlowRemoved};
use crate::header::{DecodeError, EncodeError, HEADER_LENGTH, Header, MESSAGE_LIMIT, VERSION};
use crate::hello::Hello;
use crate::meter::MeterMod;
use crate::multipart::{Reply, Request};
use crate::packet::{PacketIn, PacketOut};
use crate::switch::{Config, Features, PortStatus, Role};
use crate::wire::{BodyError, Reader, Wire};

/// A message of OpenFlow 1.3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// The first message of either side.
    Hello(Hello),
    /// The other side could not do what a message asked.
    Error(Failure),
    /// Are you there? With any bytes.
    EchoRequest(Bytes),
    /// Yes; with the same bytes.
    EchoReply(Bytes),
    /// Who are you?
    FeaturesRequest,
    /// The answer.
    FeaturesReply(Features),
    /// How are you set?
    GetConfigRequest,
    /// The answer.
    GetConfigReply(Config),
    /// Be set like this.
    SetConfig(Config),
    /// A packet for the controller.
    PacketIn(PacketIn),
    /// A flow is gone.
    FlowRemoved(FlowRemoved),
    /// A port has changed.
    PortStatus(PortStatus),
    /// Send this packet.
    PacketOut(PacketOut),
    /// Change flows.
    FlowMod(FlowMod),
    /// A question.
    MultipartRequest {
        /// [`crate::multipart::MORE`] or 0.
        flags: u16,
        /// Which.
        request: Request,
    },
    /// An answer, or a part of one.
    MultipartReply {
        /// [`crate::multipart::MORE`] or 0.
        flags: u16,
        /// Which.
        reply: Reply,
    },
    /// Answer when all before this is done.
    BarrierRequest,
    /// It is.
    BarrierReply,
    /// Let me be this.
    RoleRequest(Role),
    /// You are this.
    RoleReply(Role),
    /// Change a meter.
    MeterMod(MeterMod),
    /// Of a type that has no name here; kept as it came.
    Other {
        /// Message type.
        kind: u8,
        /// Everything behind the header.
        body: Bytes,
    },
}

/// Takes the message at the front of `buffer`, once all of it has arrived.
///
/// # Errors
/// [`DecodeError::is_fatal`] tells whether the stream can be followed any further. After an error
/// that is not fatal the message has been taken from the buffer, and the next call reads the next.
pub fn decode(buffer: &mut BytesMut) -> Result<Option<(Header, Message)>, DecodeError> {
    decode_within(MESSAGE_LIMIT, buffer)
}

/// [`decode`], with a limit in bytes of its own. A message that states more is an error as soon
/// as its header has arrived.
///
/// # Errors
/// As those of [`decode`].
pub fn decode_within(
    limit: usize,
    buffer: &mut BytesMut,
) -> Result<Option<(Header, Message)>, DecodeError> {
    let Some(header) = Header::peek(buffer) else { return Ok(None) };
    let (kind, xid) = (header.kind, header.xid);
    let length = usize::from(header.length);
    if length < HEADER_LENGTH {
        return Err(DecodeError::TooShort { kind, length: header.length });
    }
    if length > limit {
        return Err(DecodeError::TooLong { kind, length: header.length, limit });
    }
    if buffer.len() < length {
        return Ok(None);
    }
    let mut frame = buffer.split_to(length);
    frame.advance(HEADER_LENGTH);
    // Every version's HELLO, and the error that refuses ours, look the same.
    let every_version = kind <= 1;
    if header.version != VERSION && !every_version {
        return Err(DecodeError::Version { version: header.version, kind, xid });
    }
    let message = Message::get(&header, &mut Reader::new(&frame))
        .map_err(|source| DecodeError::Body { kind, xid, source })?;
    Ok(Some((header, message)))
}

/// Appends a message to `buffer`.
///
/// # Errors
/// When it does not fit a message's 16-bit length; `buffer` is then as it was.
pub fn encode(xid: u32, message: &Message, buffer: &mut BytesMut) -> Result<(), EncodeError> {
    let start = buffer.len();
    let version = if let Message::Hello(hello) = message { hello.version } else { VERSION };
    let mut header = Header { version, kind: message.kind(), length: 0, xid };
    header.put(buffer);
    message.put_body(buffer);
    let length = buffer.len() - start;
    match u16::try_from(length) {
        Ok(fitting) => header.length = fitting,
        Err(_) => {
            buffer.truncate(start);
            return Err(EncodeError::TooLong { length });
        }
    }
    buffer[start + 2..start + 4].copy_from_slice(&header.length.to_be_bytes());
    Ok(())
}

impl Message {
    /// The number of the message type (section A.1).
    pub fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 0,
            Self::Error(_) => 1,
            Self::EchoRequest(_) => 2,
            Self::EchoReply(_) => 3,
            Self::FeaturesRequest => 5,
            Self::FeaturesReply(_) => 6,
            Self::GetConfigRequest => 7,
            Self::GetConfigReply(_) => 8,
            Self::SetConfig(_) => 9,
            Self::PacketIn(_) => 10,
            Self::FlowRemoved(_) => 11,
            Self::PortStatus(_) => 12,
            Self::PacketOut(_) => 13,
            Self::FlowMod(_) => 14,
            Self::MultipartRequest { .. } => 18,
            Self::MultipartReply { .. } => 19,
            Self::BarrierRequest => 20,
            Self::BarrierReply => 21,
            Self::RoleRequest(_) => 24,
            Self::RoleReply(_) => 25,
            Self::MeterMod(_) => 29,
            Self::Other { kind, .. } => *kind,
        }
    }

    /// A question without flags.
    pub fn question(request: Request) -> Self {
        Self::MultipartRequest { flags: 0, request }
    }

    fn get(header: &Header, body: &mut Reader<'_>) -> Result<Self, BodyError> {
        Ok(match header.kind {
            0 => Self::Hello(Hello::get(header.version, body)?),
            1 => Self::Error(body.get()?),
            2 => Self::EchoRequest(body.rest()),
            3 => Self::EchoReply(body.rest()),
            5 => Self::FeaturesRequest,
            6 => Self::FeaturesReply(body.get()?),
            7 => Self::GetConfigRequest,
            8 => Self::GetConfigReply(body.get()?),
            9 => Self::SetConfig(body.get()?),
            10 => Self::PacketIn(body.get()?),
            11 => Self::FlowRemoved(body.get()?),
            12 => Self::PortStatus(body.get()?),
            13 => Self::PacketOut(body.get()?),
            14 => Self::FlowMod(body.get()?),
            18 => {
                let (kind, flags) = multipart_head(body)?;
                Self::MultipartRequest { flags, request: Request::get(kind, body)? }
            }
            19 => {
                let (kind, flags) = multipart_head(body)?;
                Self::MultipartReply { flags, reply: Reply::get(kind, body)? }
            }
            20 => Self::BarrierRequest,
            21 => Self::BarrierReply,
            24 => Self::RoleRequest(body.get()?),
            25 => Self::RoleReply(body.get()?),
            29 => Self::MeterMod(body.get()?),
            kind => Self::Other { kind, body: body.rest() },
        })
    }

    fn put_body(&self, out: &mut BytesMut) {
        match self {
            Self::Hello(hello) => hello.put(out),
            Self::Error(failure) => failure.put(out),
            Self::EchoRequest(data) | Self::EchoReply(data) => out.put_slice(data),
            Self::FeaturesRequest
            | Self::GetConfigRequest
            | Self::BarrierRequest
            | Self::BarrierReply => {}
            Self::FeaturesReply(features) => features.put(out),
            Self::GetConfigReply(config) | Self::SetConfig(config) => config.put(out),
            Self::PacketIn(packet) => packet.put(out),
            Self::FlowRemoved(removed) => removed.put(out),
            Self::PortStatus(status) => status.put(out),
            Self::PacketOut(packet) => packet.put(out),
            Self::FlowMod(change) => change.put(out),
            Self::MultipartRequest { flags, request } => {
                put_multipart_head(request.kind(), *flags, out);
                request.put(out);
            }
            Self::MultipartReply { flags, reply } => {
                put_multipart_head(reply.kind(), *flags, out);
                reply.put(out);
            }
            Self::RoleRequest(role) | Self::RoleReply(role) => role.put(out),
            Self::MeterMod(change) => change.put(out),
            Self::Other { body, .. } => out.put_slice(body),
        }
    }
}

fn multipart_head(body: &mut Reader<'_>) -> Result<(u16, u16), BodyError> {
    let head = (body.get()?, body.get()?);
    body.skip(4)?;
    Ok(head)
}

fn put_multipart_head(kind: u16, flags: u16, out: &mut BytesMut) {
    out.put_u16(kind);
    out.put_u16(flags);
    out.put_u32(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_when_its_last_byte_is_there() {
        let whole = [4, 2, 0, 11, 0, 0, 0, 9, 1, 2, 3];
        let mut buffer = BytesMut::new();
        for byte in &whole[..10] {
            buffer.put_u8(*byte);
            assert_eq!(decode(&mut buffer), Ok(None));
        }
        buffer.put_slice(&[3, 4, 20]);
        let (header, message) = decode(&mut buffer).unwrap().unwrap();
        assert_eq!(header.xid, 9);
        assert_eq!(message, Message::EchoRequest(Bytes::from_static(&[1, 2, 3])));
        assert_eq!(&buffer[..], [4, 20]);
    }

    #[test]
    fn lengths_are_judged_before_the_body_arrives() {
        let short = DecodeError::TooShort { kind: 2, length: 7 };
        assert_eq!(decode(&mut BytesMut::from(&[4, 2, 0, 7, 0, 0, 0, 1][..])), Err(short.clone()));
        let long = DecodeError::TooLong { kind: 2, length: 4096, limit: 1024 };
        let mut buffer = BytesMut::from(&[4, 2, 16, 0, 0, 0, 0, 1][..]);
        assert_eq!(decode_within(1024, &mut buffer), Err(long.clone()));
        assert!(short.is_fatal() && long.is_fatal());
    }

    #[test]
    fn a_bad_body_is_skipped_and_the_next_message_read() {
        let mut buffer = BytesMut::from(&[4, 6, 0, 8, 0, 0, 0, 1, 4, 21, 0, 8, 0, 0, 0, 2][..]);
        let error = decode(&mut buffer).unwrap_err();
        assert!(matches!(error, DecodeError::Body { kind: 6, xid: 1, .. }) && !error.is_fatal());
        assert_eq!(decode(&mut buffer).unwrap().unwrap().1, Message::BarrierReply);
    }

    #[test]
    fn other_versions_may_say_hello_and_nothing_else() {
        let mut buffer = BytesMut::from(&[1, 0, 0, 8, 0, 0, 0, 1, 1, 5, 0, 8, 0, 0, 0, 2][..]);
        let hello = Hello { version: 1, bitmap: None };
        assert_eq!(decode(&mut buffer).unwrap().unwrap().1, Message::Hello(hello));
        let refused = DecodeError::Version { version: 1, kind: 5, xid: 2 };
        assert_eq!(decode(&mut buffer), Err(refused));
    }

    #[test]
    fn what_does_not_fit_is_not_sent() {
        let mut buffer = BytesMut::from(&b"before"[..]);
        let huge = Message::EchoRequest(Bytes::from(vec![0; MESSAGE_LIMIT]));
        let length = MESSAGE_LIMIT + HEADER_LENGTH;
        assert_eq!(encode(1, &huge, &mut buffer), Err(EncodeError::TooLong { length }));
        assert_eq!(&buffer[..], b"before");
    }
}
