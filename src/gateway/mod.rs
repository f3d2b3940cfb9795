//! .
mod channel;
mod inbound;
mod outbound;
mod vmm_output;
