//! The section `[intermediary]` of `agent.toml`, checked. Used by `config`.
//!
//! ```toml
//! [intermediary]
//! memory = "4 GiB"                    # for others' pages, out of the host's `memory`; default: half
//! program = "/usr/bin/redis-server"
//! user = "redis"                      # default: redis if there is such a user, else nobody
//! ports = "7100-7199"                 # one for each store, at the address of page_listen
//! redis = "rediss://USER:PASSWORD@10.0.0.9:6380"  # a Redis that runs already, in place of own ones
//! ```
//!
//! Not here: whether the program is installed; that is told by the host's description.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use lifeboat_protocol::units::{Bytes, text};
use serde::Deserialize;

use super::{Checked, ConfigProblem, absolute, entry_of};
use crate::intermediary::{Existing, Settings};
use crate::qemu::process::User;

/// Where stores are reached when nothing else is said.
const PORTS: RangeInclusive<u16> = 7100..=7199;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct RawIntermediary {
    #[serde(default, with = "optional")]
    memory: Option<Bytes>,
    program: Option<PathBuf>,
    user: Option<String>,
    ports: Option<String>,
    redis: Option<String>,
}

pub(super) mod optional {
    use super::{Bytes, Deserialize, text};

    #[derive(Deserialize)]
    struct Size(#[serde(with = "text")] Bytes);

    pub(in crate::config) fn deserialize<'de, D>(from: D) -> Result<Option<Bytes>, D::Error>
    where
        D: serde::Deserializer<'de>,
    {
        Size::deserialize(from).map(|size| Some(size.0))
    }
}

impl RawIntermediary {
    /// The section, for a host that has `memory` in all and its folders below `state_dir`.
    pub(super) fn check(
        self,
        memory: Bytes,
        state_dir: &Path,
        tls_dir: Option<&Path>,
    ) -> Checked<Settings> {
        let program = self.program.unwrap_or_else(|| "/usr/bin/redis-server".into());
        Ok(Settings {
            memory: self.memory.unwrap_or(Bytes(memory.0 / 2)).min(memory),
            program: absolute("intermediary.program", program)?,
            user: user(self.user.as_deref())?,
            ports: ports(self.ports.as_deref())?,
            existing: self.redis.as_deref().map(existing).transpose()?,
            directory: state_dir.join("stores"),
            tls_dir: tls_dir.map(Path::to_owned),
        })
    }
}

/// By name, or one of the usual ones.
fn user(wanted: Option<&str>) -> Checked<User> {
    let key = || "intermediary.user".to_owned();
    let of = |name: &str| {
        let fields = entry_of("/etc/passwd", name)?;
        Some(User { uid: fields.get(2)?.parse().ok()?, gid: fields.get(3)?.parse().ok()? })
    };
    let found = match wanted {
        Some(name) => of(name),
        None => of("redis").or_else(|| of("nobody")),
    };
    match found {
        Some(User { uid: 0, .. }) => Err((key(), ConfigProblem::StoreRoot)),
        Some(user) => Ok(user),
        None => {
            let given = wanted.unwrap_or("nobody").to_owned();
            Err((key(), ConfigProblem::NoSuch { kind: "user", given }))
        }
    }
}

fn ports(given: Option<&str>) -> Checked<RangeInclusive<u16>> {
    let Some(text) = given else { return Ok(PORTS) };
    let range = text.split_once('-').and_then(|(first, last)| {
        let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (0 < first && first <= last).then_some(first..=last)
    });
    range.ok_or_else(|| {
        let wanted = "a range of ports such as `7100-7199`";
        ("intermediary.ports".to_owned(), ConfigProblem::Form { given: text.to_owned(), wanted })
    })
}

/// `redis://USER:PASSWORD@HOST:PORT`, and `rediss://` with TLS. A password holds no `@`.
fn existing(url: &str) -> Checked<Existing> {
    let parts = || {
        let (scheme, rest) = url.split_once("://")?;
        let plain = match scheme {
            "redis" => true,
            "rediss" => false,
            _ => return None,
        };
        let (login, address) = rest.rsplit_once('@')?;
        let (user, password) = login.split_once(':')?;
        let address = address.trim_end_matches('/');
        let (host, port) = address.rsplit_once(':')?;
        let complete = !host.is_empty() && port.parse::<u16>().is_ok() && !password.is_empty();
        let user = if user.is_empty() { "default" } else { user };
        complete.then(|| Existing {
            address: address.to_owned(),
            user: user.to_owned(),
            password: password.to_owned(),
            plain,
        })
    };
    parts().ok_or_else(|| {
        // Not what was given: there is a password in it.
        let given = url.split_once("://").map_or("...", |(scheme, _)| scheme).to_owned();
        let wanted = "of the form `rediss://USER:PASSWORD@HOST:PORT`";
        ("intermediary.redis".to_owned(), ConfigProblem::Form { given, wanted })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem<T>(checked: Checked<T>) -> String {
        checked.err().map(|(key, problem)| format!("{key}: {problem}")).unwrap_or_default()
    }

    #[test]
    fn a_redis_that_runs_already_is_named_by_its_url() {
        let found = existing("rediss://lb:s:e@10.0.0.9:6380/").unwrap();
        assert_eq!((found.address.as_str(), found.plain), ("10.0.0.9:6380", false));
        assert_eq!((found.user.as_str(), found.password.as_str()), ("lb", "s:e"));
        assert_eq!(existing("redis://:pw@[::1]:6379").unwrap().user, "default");
        for bad in ["http://a:b@c:1", "redis://c:1", "redis://a:b@c", "redis://a:@c:1", "x"] {
            let said = problem(existing(bad));
            assert!(said.contains("rediss://USER:PASSWORD@HOST:PORT"), "{said}");
        }
        assert!(!problem(existing("redis://a:hush@c")).contains("hush"));
    }

    #[test]
    fn ports_are_a_range_and_the_user_is_not_root() {
        assert_eq!(ports(Some("8000 - 8001")).unwrap(), 8000..=8001);
        for bad in ["7100", "7199-7100", "0-5", "a-b"] {
            assert!(problem(ports(Some(bad))).contains("7100-7199"), "{bad}");
        }
        assert!(problem(user(Some("root"))).contains("root"));
        assert!(problem(user(Some("no-such-user"))).contains("no-such-user"));
        assert_ne!(user(None).unwrap().uid, 0);
    }

    #[test]
    fn left_out_it_takes_half_of_the_memory() {
        let raw = RawIntermediary::default();
        let settings = raw.check(Bytes::from_mib(4096), Path::new("/s"), None).unwrap();
        assert_eq!(settings.memory, Bytes::from_mib(2048));
        assert_eq!(settings.directory, Path::new("/s/stores"));
    }
}
