//! What a column holds, and how it is written in JSON (RFC 7047 section 5.1).
//!
//! Used by rows, conditions and mutations. A single value is a set of one: the protocol writes
//! both, and a column's type says which is meant, so the two are the same here.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

/// The name of a row that the server has given it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uuid(pub [u8; 16]);

/// Text that is not a UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a UUID: {0:?}")]
pub struct NotAUuid(String);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&index) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = NotAUuid;

    fn from_str(text: &str) -> Result<Self, NotAUuid> {
        let refuse = || NotAUuid(text.chars().take(64).collect());
        let lengths = text.split('-').map(str::len);
        if !lengths.eq([8, 4, 4, 4, 12]) {
            return Err(refuse());
        }
        let digits: Option<Vec<u8>> = text
            .chars()
            .filter(|character| *character != '-')
            .map(|character| character.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
            .collect();
        let digits = digits.filter(|digits| digits.len() == 32).ok_or_else(refuse)?;
        let mut uuid = [0; 16];
        for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(uuid))
    }
}

/// One value.
#[derive(Debug, Clone, PartialEq)]
pub enum Atom {
    /// A whole number.
    Integer(i64),
    /// Any other number.
    Real(f64),
    /// Yes or no.
    Boolean(bool),
    /// Text.
    String(String),
    /// A row.
    Uuid(Uuid),
    /// A row that the same transaction inserts under this name.
    Named(String),
}

/// What a column holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Datum {
    /// A set; an optional column has none or one, an ordinary one has one.
    Set(Vec<Atom>),
    /// A map, in the order in which it came.
    Map(Vec<(Atom, Atom)>),
}

/// The columns of a row that were asked for, or are to be written.
pub type Row = BTreeMap<String, Datum>;

/// A value that RFC 7047 does not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Not an atom, set or map.
    #[error("not a value of OVSDB: {0}")]
    NotAValue(String),
    /// In a place where an object of columns was due.
    #[error("not a row of OVSDB: {0}")]
    NotARow(String),
}

/// Enough of a peer's value to recognise it in a log.
pub(crate) fn excerpt(value: &Value) -> String {
    value.to_string().chars().take(80).collect()
}

impl From<i64> for Atom {
    fn from(value: i64) -> Self {
        Self::Integer(value)
    }
}

impl From<bool> for Atom {
    fn from(value: bool) -> Self {
        Self::Boolean(value)
    }
}

impl From<&str> for Atom {
    fn from(value: &str) -> Self {
        Self::String(value.to_owned())
    }
}

impl From<String> for Atom {
    fn from(value: String) -> Self {
        Self::String(value)
    }
}

impl From<Uuid> for Atom {
    fn from(value: Uuid) -> Self {
        Self::Uuid(value)
    }
}

impl<T: Into<Atom>> From<T> for Datum {
    fn from(value: T) -> Self {
        Self::Set(vec![value.into()])
    }
}

impl Atom {
    /// The atom that `value` writes.
    ///
    /// # Errors
    /// When it writes none.
    pub fn from_json(value: &Value) -> Result<Self, ValueError> {
        let refuse = || ValueError::NotAValue(excerpt(value));
        match value {
            Value::Bool(value) => Ok(Self::Boolean(*value)),
            Value::String(text) => Ok(Self::String(text.clone())),
            Value::Number(number) => match number.as_i64() {
                Some(integer) => Ok(Self::Integer(integer)),
                None => number.as_f64().map(Self::Real).ok_or_else(refuse),
            },
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(tag), Value::String(text)] if tag == "uuid" => {
                    text.parse().map(Self::Uuid).map_err(|_| refuse())
                }
                [Value::String(tag), Value::String(text)] if tag == "named-uuid" => {
                    Ok(Self::Named(text.clone()))
                }
                _ => Err(refuse()),
            },
            Value::Null | Value::Object(_) => Err(refuse()),
        }
    }

    /// As it travels.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Integer(value) => json!(value),
            Self::Real(value) => json!(value),
            Self::Boolean(value) => json!(value),
            Self::String(value) => json!(value),
            Self::Uuid(uuid) => json!(["uuid", uuid.to_string()]),
            Self::Named(name) => json!(["named-uuid", name]),
        }
    }
}

impl Datum {
    /// An empty set: an optional column without a value.
    pub fn none() -> Self {
        Self::Set(Vec::new())
    }

    /// A map of texts, as `external_ids` and `other_config` are.
    pub fn texts<K: Into<String>, V: Into<String>>(
        pairs: impl IntoIterator<Item = (K, V)>,
    ) -> Self {
        let atom = |(key, value): (K, V)| (Atom::String(key.into()), Atom::String(value.into()));
        Self::Map(pairs.into_iter().map(atom).collect())
    }

    /// What `value` writes.
    ///
    /// # Errors
    /// When it is no atom, set or map.
    pub fn from_json(value: &Value) -> Result<Self, ValueError> {
        let refuse = || ValueError::NotAValue(excerpt(value));
        match value.as_array().map(Vec::as_slice) {
            Some([Value::String(tag), Value::Array(atoms)]) if tag == "set" => {
                atoms.iter().map(Atom::from_json).collect::<Result<_, _>>().map(Self::Set)
            }
            Some([Value::String(tag), Value::Array(pairs)]) if tag == "map" => {
                let pair = |pair: &Value| match pair.as_array().map(Vec::as_slice) {
                    Some([key, value]) => Ok((Atom::from_json(key)?, Atom::from_json(value)?)),
                    _ => Err(refuse()),
                };
                pairs.iter().map(pair).collect::<Result<_, _>>().map(Self::Map)
            }
            _ => Ok(Self::Set(vec![Atom::from_json(value)?])),
        }
    }

    /// As it travels.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Set(atoms) => match atoms.as_slice() {
                [atom] => atom.to_json(),
                atoms => json!(["set", atoms.iter().map(Atom::to_json).collect::<Vec<_>>()]),
            },
            Self::Map(pairs) => {
                let pair = |(key, value): &(Atom, Atom)| json!([key.to_json(), value.to_json()]);
                json!(["map", pairs.iter().map(pair).collect::<Vec<_>>()])
            }
        }
    }

    fn only(&self) -> Option<&Atom> {
        match self {
            Self::Set(atoms) => match atoms.as_slice() {
                [atom] => Some(atom),
                _ => None,
            },
            Self::Map(_) => None,
        }
    }

    /// The text, if it is exactly one.
    pub fn text(&self) -> Option<&str> {
        match self.only()? {
            Atom::String(text) => Some(text),
            _ => None,
        }
    }

    /// The whole number, if it is exactly one.
    pub fn integer(&self) -> Option<i64> {
        match self.only()? {
            Atom::Integer(integer) => Some(*integer),
            _ => None,
        }
    }

    /// The row, if it is exactly one.
    pub fn uuid(&self) -> Option<Uuid> {
        match self.only()? {
            Atom::Uuid(uuid) => Some(*uuid),
            _ => None,
        }
    }

    /// All rows of a set.
    pub fn uuids(&self) -> Vec<Uuid> {
        let Self::Set(atoms) = self else { return Vec::new() };
        let uuid = |atom: &Atom| if let Atom::Uuid(uuid) = atom { Some(*uuid) } else { None };
        atoms.iter().filter_map(uuid).collect()
    }

    /// The pairs of a map of texts; others are left out.
    pub fn text_map(&self) -> BTreeMap<&str, &str> {
        let Self::Map(pairs) = self else { return BTreeMap::new() };
        fn texts(pair: &(Atom, Atom)) -> Option<(&str, &str)> {
            match pair {
                (Atom::String(key), Atom::String(value)) => Some((key, value)),
                _ => None,
            }
        }
        pairs.iter().filter_map(texts).collect()
    }

    /// The pairs of a map from numbers to rows, as a QoS has its queues; others are left out.
    pub fn uuids_by_number(&self) -> BTreeMap<i64, Uuid> {
        let Self::Map(pairs) = self else { return BTreeMap::new() };
        let pair = |pair: &(Atom, Atom)| match pair {
            (Atom::Integer(number), Atom::Uuid(uuid)) => Some((*number, *uuid)),
            _ => None,
        };
        pairs.iter().filter_map(pair).collect()
    }
}

/// The row that an object of columns writes.
///
/// # Errors
/// When it is no object, or a column's value is none.
pub fn row_from_json(value: &Value) -> Result<Row, ValueError> {
    let object = value.as_object().ok_or_else(|| ValueError::NotARow(excerpt(value)))?;
    let column = |(name, value): (&String, &Value)| Ok((name.clone(), Datum::from_json(value)?));
    object.iter().map(column).collect()
}

/// As it travels.
pub fn row_to_json(row: &Row) -> Value {
    Value::Object(row.iter().map(|(name, datum)| (name.clone(), datum.to_json())).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn atom() -> impl Strategy<Value = Atom> {
        prop_oneof![
            any::<i64>().prop_map(Atom::Integer),
            any::<bool>().prop_map(Atom::Boolean),
            any::<String>().prop_map(Atom::String),
            any::<[u8; 16]>().prop_map(|bytes| Atom::Uuid(Uuid(bytes))),
            "[a-z]{1,8}".prop_map(Atom::Named),
        ]
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            prop_oneof![Just("set"), Just("map"), Just("uuid"), Just("é-é-é")]
                .prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop::collection::vec(inner, 0..4).prop_map(Value::from)
        })
    }

    proptest! {
        #[test]
        fn values_are_read_as_they_are_written(
            set in prop::collection::vec(atom(), 0..4),
            map in prop::collection::vec((atom(), atom()), 0..4),
        ) {
            for datum in [Datum::Set(set), Datum::Map(map)] {
                prop_assert_eq!(Datum::from_json(&datum.to_json()), Ok(datum));
            }
        }

        #[test]
        fn any_json_is_a_value_or_an_error(value in any_json()) {
            let _ = Datum::from_json(&value);
            let _ = row_from_json(&value);
        }

        #[test]
        fn any_text_is_a_uuid_or_an_error(text in "[0-9a-f-]{30,38}|.{0,40}") {
            if let Ok(uuid) = text.parse::<Uuid>() {
                prop_assert_eq!(uuid.to_string(), text.to_lowercase());
            }
        }
    }
}
