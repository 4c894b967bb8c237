//! The rows of a monitor as they are now, kept by the updates that the server sends
//! (RFC 7047 section 4.1.6).
//!
//! Used by [`super::Monitor`]. Pure. What has changed is found by comparing two states, so that a reader
//! who is slow, or was away during a reconnection, misses states but never a difference.

use std::collections::BTreeMap;

use serde_json::Value;

use super::value::{Row, Uuid, ValueError, excerpt, row_from_json};

/// A row that has come, changed or gone.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Its table.
    pub table: String,
    /// The row.
    pub uuid: Uuid,
    /// As it was, as far as we knew; `None` when it is new.
    pub old: Option<Row>,
    /// As it is; `None` when it is gone.
    pub new: Option<Row>,
}

/// Rows by table.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cache {
    tables: BTreeMap<String, BTreeMap<Uuid, Row>>,
}

impl Cache {
    /// The rows of a table.
    pub fn table(&self, table: &str) -> impl Iterator<Item = (Uuid, &Row)> {
        self.tables.get(table).into_iter().flatten().map(|(uuid, row)| (*uuid, row))
    }

    /// One row.
    pub fn row(&self, table: &str, uuid: Uuid) -> Option<&Row> {
        self.tables.get(table)?.get(&uuid)
    }

    /// Takes an update of the server.
    ///
    /// # Errors
    /// When it is malformed; the cache is then as it was.
    pub fn update(&mut self, updates: &Value) -> Result<(), ValueError> {
        for (table, uuid, new) in read(updates)? {
            let rows = self.tables.entry(table).or_default();
            match new {
                Some(row) => rows.insert(uuid, row),
                None => rows.remove(&uuid),
            };
        }
        Ok(())
    }

    /// What differs from an `older` state: first what is gone, then what is new or changed.
    pub fn changes_since(&self, older: &Self) -> Vec<Change> {
        let mut changes = Vec::new();
        for (table, uuid, row) in older.rows() {
            if self.row(table, uuid).is_none() {
                let (table, old) = (table.to_owned(), Some(row.clone()));
                changes.push(Change { table, uuid, old, new: None });
            }
        }
        for (table, uuid, row) in self.rows() {
            let old = older.row(table, uuid);
            if old != Some(row) {
                let (table, new) = (table.to_owned(), Some(row.clone()));
                changes.push(Change { table, uuid, old: old.cloned(), new });
            }
        }
        changes
    }

    fn rows(&self) -> impl Iterator<Item = (&str, Uuid, &Row)> {
        self.tables
            .iter()
            .flat_map(|(table, rows)| rows.iter().map(|(uuid, row)| (table.as_str(), *uuid, row)))
    }
}

type RowUpdate = (String, Uuid, Option<Row>);

fn read(updates: &Value) -> Result<Vec<RowUpdate>, ValueError> {
    let object = |value: &Value| ValueError::NotARow(excerpt(value));
    let mut read = Vec::new();
    for (table, rows) in updates.as_object().ok_or_else(|| object(updates))? {
        for (uuid, update) in rows.as_object().ok_or_else(|| object(rows))? {
            let uuid = uuid.parse().map_err(|_| object(rows))?;
            let new = update.get("new").filter(|new| !new.is_null());
            read.push((table.clone(), uuid, new.map(row_from_json).transpose()?));
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ROW: &str = "36bef046-7da7-43a5-905a-c17899216fcb";

    #[test]
    fn rows_come_change_and_go() {
        let mut cache = Cache::default();
        let empty = cache.clone();
        let uuid: Uuid = ROW.parse().unwrap();
        cache.update(&json!({"Port": {ROW: {"new": {"name": "p1"}}}})).unwrap();
        let first = cache.clone();
        assert!(matches!(&first.changes_since(&empty)[..], [Change { old: None, .. }]));
        cache
            .update(&json!({"Port": {ROW: {"old": {"name": "p1"}, "new": {"name": "p2"}}}}))
            .unwrap();
        assert_eq!(cache.row("Port", uuid).unwrap()["name"].text(), Some("p2"));
        let told = cache.changes_since(&first);
        assert_eq!(told[0].old.as_ref().unwrap()["name"].text(), Some("p1"));
        cache.update(&json!({"Port": {ROW: {"old": {"name": "p2"}}}})).unwrap();
        assert!(matches!(&cache.changes_since(&first)[..], [Change { new: None, .. }]));
        assert_eq!(cache.changes_since(&empty), []);
    }

    #[test]
    fn a_malformed_update_changes_nothing() {
        let mut cache = Cache::default();
        let bad = json!({"Port": {ROW: {"new": {"name": "p1"}}}, "QoS": {"x": {"new": {}}}});
        assert!(cache.update(&bad).is_err());
        assert_eq!(cache, Cache::default());
    }
}
