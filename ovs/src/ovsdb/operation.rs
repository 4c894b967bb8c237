//! The operations of a transaction and what comes of them (RFC 7047 section 5.2).
//!
//! Used through [`super::Client::transact`]. A transaction is all or nothing: one operation's
//! error undoes the others.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::value::{Datum, Row, Uuid, ValueError, excerpt, row_from_json, row_to_json};

/// Which rows: those for which `column function value` holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Condition {
    /// Name of a column; `_uuid` is the row itself.
    pub column: String,
    /// `==`, `!=`, `<`, `<=`, `>`, `>=`, `includes`, `excludes`.
    pub function: &'static str,
    /// With what.
    pub value: Datum,
}

impl Condition {
    /// Rows whose column is this.
    pub fn is(column: &str, value: impl Into<Datum>) -> Self {
        Self { column: column.to_owned(), function: "==", value: value.into() }
    }

    /// This one row.
    pub fn row(uuid: Uuid) -> Self {
        Self::is("_uuid", uuid)
    }

    /// Rows whose column includes all of this.
    pub fn includes(column: &str, value: Datum) -> Self {
        Self { column: column.to_owned(), function: "includes", value }
    }

    fn to_json(&self) -> Value {
        json!([self.column, self.function, self.value.to_json()])
    }
}

/// A change of a column that depends on what it holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Mutation {
    /// Name of the column.
    pub column: String,
    /// `+=`, `-=`, `*=`, `/=`, `%=`, `insert`, `delete`.
    pub mutator: &'static str,
    /// With what.
    pub value: Datum,
}

/// One operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    /// Adds a row.
    Insert {
        /// To this table.
        table: String,
        /// With these columns; others get their defaults.
        row: Row,
        /// The name by which this transaction's other operations call it.
        name: Option<String>,
    },
    /// Reads rows.
    Select {
        /// Of this table.
        table: String,
        /// That meet all of these.
        conditions: Vec<Condition>,
        /// Only these columns.
        columns: Vec<String>,
    },
    /// Writes columns.
    Update {
        /// Of this table.
        table: String,
        /// Of rows that meet all of these.
        conditions: Vec<Condition>,
        /// These.
        row: Row,
    },
    /// Changes columns by what they hold.
    Mutate {
        /// Of this table.
        table: String,
        /// Of rows that meet all of these.
        conditions: Vec<Condition>,
        /// So.
        mutations: Vec<Mutation>,
    },
    /// Deletes rows.
    Delete {
        /// Of this table.
        table: String,
        /// That meet all of these.
        conditions: Vec<Condition>,
    },
    /// Holds the transaction until rows are (or are not) these; error `timed out` when not in
    /// time. With no time it is a condition of the transaction.
    Wait {
        /// In this table.
        table: String,
        /// Rows that meet all of these.
        conditions: Vec<Condition>,
        /// In these columns
        columns: Vec<String>,
        /// are equal (or not)
        equal: bool,
        /// to these.
        rows: Vec<Row>,
        /// For so long.
        within: Duration,
    },
    /// Text for the server's log.
    Comment(String),
    /// Undoes the transaction; for trying it out.
    Abort,
}

fn conditions_json(conditions: &[Condition]) -> Value {
    conditions.iter().map(Condition::to_json).collect()
}

impl Operation {
    /// Reads columns of one table.
    pub fn select(table: &str, conditions: Vec<Condition>, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|column| (*column).to_owned()).collect();
        Self::Select { table: table.to_owned(), conditions, columns }
    }

    /// As it travels.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Insert { table, row, name } => {
                let mut object = json!({"op": "insert", "table": table, "row": row_to_json(row)});
                if let Some(name) = name {
                    object["uuid-name"] = json!(name);
                }
                object
            }
            Self::Select { table, conditions, columns } => json!({
                "op": "select", "table": table, "where": conditions_json(conditions), "columns": columns,
            }),
            Self::Update { table, conditions, row } => json!({
                "op": "update", "table": table, "where": conditions_json(conditions), "row": row_to_json(row),
            }),
            Self::Mutate { table, conditions, mutations } => {
                let mutation = |change: &Mutation| {
                    json!([change.column, change.mutator, change.value.to_json()])
                };
                let mutations: Value = mutations.iter().map(mutation).collect();
                json!({
                    "op": "mutate", "table": table, "where": conditions_json(conditions),
                    "mutations": mutations,
                })
            }
            Self::Delete { table, conditions } => {
                json!({"op": "delete", "table": table, "where": conditions_json(conditions)})
            }
            Self::Wait { table, conditions, columns, equal, rows, within } => json!({
                "op": "wait", "table": table, "where": conditions_json(conditions), "columns": columns,
                "until": if *equal { "==" } else { "!=" },
                "rows": rows.iter().map(row_to_json).collect::<Vec<_>>(),
                "timeout": u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
            }),
            Self::Comment(comment) => json!({"op": "comment", "comment": comment}),
            Self::Abort => json!({"op": "abort"}),
        }
    }
}

/// What came of one operation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Outcome {
    /// Rows that a select has read.
    pub rows: Vec<Row>,
    /// Rows that an update, mutate or delete has met.
    pub count: u64,
    /// The row that an insert has made.
    pub uuid: Option<Uuid>,
}

/// Why a transaction has changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransactError {
    /// The database refuses one of the operations, or (index = their number) the whole.
    #[error("the database refuses operation {index}: {error} ({details})")]
    Refused {
        /// Which operation, from 0.
        index: usize,
        /// The kind of error, such as `constraint violation`.
        error: String,
        /// What it says beside.
        details: String,
    },
    /// An answer that does not fit the question.
    #[error("the database answers a transaction with {excerpt}")]
    Malformed {
        /// Its beginning.
        excerpt: String,
    },
    /// A row in the answer that is none.
    #[error("the database answers with an unreadable row")]
    Value(#[from] ValueError),
}

impl TransactError {
    /// Whether a [`Operation::Wait`] was not met in its time.
    pub fn is_timed_out(&self) -> bool {
        matches!(self, Self::Refused { error, .. } if error == "timed out")
    }
}

fn text_of(object: &Map<String, Value>, key: &str) -> String {
    object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// What came of a transaction of `count` operations.
///
/// # Errors
/// The first error that the answer tells; nothing has been changed then.
pub fn outcomes(count: usize, result: &Value) -> Result<Vec<Outcome>, TransactError> {
    let malformed = || TransactError::Malformed { excerpt: excerpt(result) };
    let results = result.as_array().ok_or_else(malformed)?;
    for (index, result) in results.iter().enumerate() {
        if let Some(object) = result.as_object().filter(|object| object.contains_key("error")) {
            let (error, details) = (text_of(object, "error"), text_of(object, "details"));
            return Err(TransactError::Refused { index, error, details });
        }
    }
    if results.len() != count {
        return Err(malformed());
    }
    results.iter().map(outcome).collect()
}

fn outcome(result: &Value) -> Result<Outcome, TransactError> {
    let rows = result["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rows = rows.iter().map(row_from_json).collect::<Result<_, _>>()?;
    let uuid = result["uuid"].as_array().and_then(|pair| pair.get(1)?.as_str()?.parse().ok());
    Ok(Outcome { rows, count: result["count"].as_u64().unwrap_or_default(), uuid })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_written_as_the_rfc_says() {
        let uuid: Uuid = "36bef046-7da7-43a5-905a-c17899216fcb".parse().unwrap();
        let row = Row::from([("qos".to_owned(), Datum::none())]);
        let update =
            Operation::Update { table: "Port".into(), conditions: vec![Condition::row(uuid)], row };
        let wanted = json!({
            "op": "update", "table": "Port", "row": {"qos": ["set", []]},
            "where": [["_uuid", "==", ["uuid", "36bef046-7da7-43a5-905a-c17899216fcb"]]],
        });
        assert_eq!(update.to_json(), wanted);
    }

    #[test]
    fn the_first_error_of_a_transaction_is_told_with_its_text() {
        let result =
            json!([{"count": 1}, {"error": "constraint violation", "details": "why"}, null]);
        let (error, details) = ("constraint violation".to_owned(), "why".to_owned());
        let refused = TransactError::Refused { index: 1, error, details };
        assert_eq!(outcomes(3, &result), Err(refused));
        let late =
            json!([{"count": 1}, {"error": "referential integrity violation", "details": ""}]);
        assert!(matches!(outcomes(1, &late), Err(TransactError::Refused { index: 1, .. })));
        for wrong in [json!(null), json!([]), json!([{}, {}])] {
            assert!(matches!(outcomes(1, &wrong), Err(TransactError::Malformed { .. })));
        }
    }
}
