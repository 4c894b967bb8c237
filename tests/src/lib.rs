//! The package that the integration tests lie in (`tests/tests/`); it has no code of its own.
//!
//! It may depend on every room, and no room depends on it. The house rules are `tests/tests/tidy/`.
