//! Identifiers as types: a host's name is not a VM's name, and neither is a path on a disk.
//!
//! Names come from peers and from operators and end in file names, in OVSDB external-ids and on
//! command lines; so a name is checked once, here, when it is made, and is safe from then on.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name, in bytes. Short enough for a file name with a suffix.
pub const NAME_BYTES_MAX: usize = 63;

/// A text that cannot be a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{given}` is no name for a {kind}: 1 to 63 of a-z A-Z 0-9 `-` `_` `.`, beginning with a letter or a digit"
)]
pub struct NameError {
    /// What was given, shortened.
    pub given: String,
    /// What it should have named.
    pub kind: &'static str,
}

fn check(text: &str, kind: &'static str) -> Result<(), NameError> {
    let first_ok = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
    let rest_ok = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if first_ok && rest_ok && text.len() <= NAME_BYTES_MAX {
        Ok(())
    } else {
        Err(NameError { given: text.chars().take(80).collect(), kind })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $t:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $t(String);

        impl $t {
            /// The name, checked.
            ///
            /// # Errors
            /// When it is empty, too long, or holds anything but letters, digits, `-`, `_`, `.`.
            pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
                let text = text.into();
                check(&text, $kind)?;
                Ok(Self(text))
            }

            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $t {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl FromStr for $t {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }

        impl From<$t> for String {
            fn from(name: $t) -> String {
                name.0
            }
        }

        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name!(
    /// A hypervisor host, by the name in the configuration.
    HostId, "host"
);
name!(
    /// A virtual machine, by the name in its definition; the same on every host.
    VmId, "VM"
);
name!(
    /// A switch, by the name in the configuration (its datapath id is a [`DatapathId`]).
    SwitchId, "switch"
);
name!(
    /// One attempt to move one VM. A retry is a new migration.
    MigrationId, "migration"
);
name!(
    /// One `evacuate` or `migrate` command and everything that it started.
    EvacuationId, "evacuation"
);
name!(
    /// One command to an agent. The same id repeated is the same command, done once.
    OperationId, "operation"
);

/// An OpenFlow datapath id: 48 bits of the bridge's MAC and 16 of the implementor's choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatapathId(pub u64);

impl fmt::Display for DatapathId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for DatapathId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let error = || NameError { given: text.chars().take(80).collect(), kind: "datapath" };
        let hex = text.strip_prefix("0x").unwrap_or(text);
        if hex.is_empty() || hex.len() > 16 || hex.starts_with('+') {
            return Err(error());
        }
        u64::from_str_radix(hex, 16).map(Self).map_err(|_| error())
    }
}

impl TryFrom<String> for DatapathId {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<DatapathId> for String {
    fn from(id: DatapathId) -> String {
        id.to_string()
    }
}

/// How many times a VM has changed hands: the ownership generation. The host with the highest
/// durable generation owns the VM; every lower one has ceded it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "g{}", self.0)
    }
}

/// The term of a controller: grows with each controller start. Agents obey the highest seen.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Term(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_never_be_a_path_or_an_option() {
        for bad in ["", "../x", "a/b", "-rf", ".hidden", "a b", "ä", &"x".repeat(64)] {
            assert!(VmId::new(bad).is_err(), "{bad}");
        }
        for good in ["web-1", "h1", "a.b_c", &"x".repeat(63)] {
            assert_eq!(VmId::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn a_datapath_id_is_sixteen_hex_digits() {
        let id: DatapathId = "0x1".parse().unwrap();
        assert_eq!(id.to_string(), "0000000000000001");
        assert!("00000000000000001".parse::<DatapathId>().is_err());
        assert!("+1".parse::<DatapathId>().is_err());
    }
}
