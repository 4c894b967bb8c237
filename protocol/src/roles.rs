//! What the holder of a certificate is. The role stands in a URI among the certificate's
//! alternative names: `lifeboat://operator/ann`, `lifeboat://agent/h1`,
//! `lifeboat://controller/c1`. Reading certificates is the rooms' own business; this is the
//! one meaning of what they find.

use std::fmt;

/// What the holder of a certificate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// May give commands to a controller.
    Operator,
    /// A host's agent: serves a controller, and opens page links to other agents.
    Agent,
    /// A controller: may give commands to agents.
    Controller,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 3] = [Self::Operator, Self::Agent, Self::Controller];

    /// The role's word in the URI.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Agent => "agent",
            Self::Controller => "controller",
        }
    }

    /// The URI of this role for a holder called `name`.
    #[must_use]
    pub fn uri(self, name: &str) -> String {
        format!("lifeboat://{self}/{name}")
    }

    /// The role and the name in a URI; `None` for any other URI.
    #[must_use]
    pub fn in_uri(uri: &str) -> Option<(Self, String)> {
        let (role, name) = uri.strip_prefix("lifeboat://")?.split_once('/')?;
        let role = Self::ALL.into_iter().find(|known| known.as_str() == role)?;
        (!name.is_empty() && !name.contains('/')).then(|| (role, name.to_owned()))
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_read_from_its_uri_and_from_nothing_else() {
        for role in Role::ALL {
            assert_eq!(Role::in_uri(&role.uri("h1")), Some((role, "h1".to_owned())));
        }
        for bad in
            ["https://agent/h1", "lifeboat://root/h1", "lifeboat://agent/", "lifeboat://agent/a/b"]
        {
            assert_eq!(Role::in_uri(bad), None, "{bad}");
        }
    }
}
