//! The gateway's source of randomness: the one edge where it is drawn.

/// Random bytes for names and secrets.
///
/// # Panics
/// Where the kernel has no randomness to give, and nothing safe can be done without it.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}
