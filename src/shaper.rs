//! .
use crate::proto::page::ByteRate;
#[derive(Debug)]
pub struct Shaper;
impl Shaper { pub fn new(_r: Option<ByteRate>) -> Self { Self } pub fn set_rate(&self, _r: Option<ByteRate>) {} pub async fn admit(&self, _bytes: u64) {} }
