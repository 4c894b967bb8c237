//! The one place of this room that draws random numbers.
//!
//! For what nobody else may be able to guess. Whatever decides is given chance as a value.

/// Sixteen bytes that nobody can guess; `None` while the system has none to give.
#[must_use]
pub fn token() -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    filled.is_ok_and(|count| count == bytes.len()).then_some(bytes)
}

#[cfg(test)]
mod tests {
    #[test]
    fn no_two_tokens_are_the_same() {
        assert_ne!(super::token().unwrap(), super::token().unwrap());
    }
}
