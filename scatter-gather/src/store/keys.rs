//! The names under which packs lie in a store. Used by the client and by the server's access rules.

use std::fmt;

use lifeboat_protocol::ids::MigrationId;

use crate::page::PackId;

/// The names of one migration: all begin alike, and its user may touch no others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySpace {
    prefix: String,
}

/// One name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Key {
    /// The name as Redis sees it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl KeySpace {
    /// The names of a migration. Ids are checked names, so a prefix holds no pattern.
    #[must_use]
    pub fn new(migration: &MigrationId) -> Self {
        Self { prefix: format!("lifeboat:{}:", migration.as_str()) }
    }

    /// What all names begin with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The name of a pack.
    #[must_use]
    pub fn pack(&self, pack: PackId) -> Key {
        Key(format!("{}p:{}", self.prefix, pack.0))
    }

    /// The name of a stripe's parity.
    #[must_use]
    pub fn parity(&self, stripe: u64) -> Key {
        Key(format!("{}x:{stripe}", self.prefix))
    }

    /// The stripe of a name, for rebuilding an index; `None` for any other name.
    #[must_use]
    pub fn stripe_of(&self, name: &str) -> Option<u64> {
        name.strip_prefix(&self.prefix)?.strip_prefix("x:")?.parse().ok()
    }

    /// The pack of a name, for rebuilding an index; `None` for any other name.
    #[must_use]
    pub fn pack_of(&self, name: &str) -> Option<PackId> {
        let number = name.strip_prefix(&self.prefix)?.strip_prefix("p:")?;
        number.parse().ok().map(PackId)
    }
}

#[test]
fn a_name_says_whose_it_is_and_what() {
    let keys = KeySpace::new(&MigrationId::new("m1").expect("a name"));
    let pack = keys.pack(PackId(7));
    assert_eq!(pack.as_str(), "lifeboat:m1:p:7");
    assert_eq!(keys.pack_of(pack.as_str()), Some(PackId(7)));
    assert_eq!(keys.parity(3).as_str(), "lifeboat:m1:x:3");
    assert_eq!(keys.stripe_of("lifeboat:m1:x:3"), Some(3));
    assert_eq!(keys.stripe_of(pack.as_str()), None);
    for other in ["lifeboat:m1:x:3", "lifeboat:m2:p:7", "lifeboat:m1:p:", "p:7"] {
        assert_eq!(keys.pack_of(other), None);
    }
}
