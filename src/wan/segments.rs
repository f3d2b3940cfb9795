//! Segmentation-offload packets, seen as the datagrams that a wire would carry.
//!
//! ```text
//! frame  = virtio_net_hdr (10 bytes) | IP header | TCP or UDP header | payload of n segments, the last may be shorter
//! run    = the same, for some consecutive segments of it
//! ```
//!
//! The kernel hands trains of up to 64 KiB to a TUN device. Loss and rate apply to each segment, so what survives is written
//! as shorter trains with headers of their own: lengths, IPv4 identification and checksum, TCP sequence and flags. The
//! TCP or UDP checksum is partial (the sum of the pseudo-header) and stays so: only the length in it changes.
//! Layout and meaning: virtio 1.2, 5.1.6 and 5.1.6.2; `include/uapi/linux/virtio_net.h`.

use std::io::{self, IoSlice};
use std::ops::Range;

/// Bytes of `struct virtio_net_hdr` without `num_buffers`.
pub(super) const VNET_HEADER_BYTES: usize = 10;

/// Longest headers that a train may have: IPv6 with some extension headers and TCP with all options.
const MAX_HEADER_BYTES: usize = 256;

/// Segments of a train at most. 64 KiB at the smallest TCP segment that Linux sends, 48 bytes, are 1365.
pub(super) const MAX_SEGMENTS: u32 = 2048;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP_IPV4: u8 = 1;
const GSO_TCP_IPV6: u8 = 4;
const GSO_UDP: u8 = 5;
/// Flag beside the type: the first segment has CWR.
const GSO_ECN: u8 = 0x80;

const TCP_CWR: u8 = 0x80;
const TCP_PSH: u8 = 0x08;
const TCP_FIN: u8 = 0x01;

/// A frame is not what a kernel hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the frame's offload header does not fit its packet")]
pub(super) struct Malformed;

/// How a frame divides into the datagrams of the wire. Offsets are from the first byte of the IP packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Train {
    packet_bytes: u32,
    /// IP and transport headers, repeated in each segment. The whole packet where it is no train.
    header_bytes: u32,
    /// Payload of each segment but the last.
    segment_payload: u32,
    segments: u32,
    transport: Transport,
    transport_offset: u16,
    gso_type: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Transport {
    /// One datagram, passed as it is.
    #[default]
    Whole,
    Tcp,
    Udp,
}

impl Train {
    /// Reads the headers of `frame`.
    ///
    /// # Errors
    /// [`Malformed`] where an offset or a length leaves the packet, or a type is not one of those that were asked for.
    pub(super) fn parse(frame: &[u8]) -> Result<Self, Malformed> {
        let (vnet, packet) = frame.split_first_chunk::<VNET_HEADER_BYTES>().ok_or(Malformed)?;
        let field = |at: usize| u16::from_ne_bytes([vnet[at], vnet[at + 1]]);
        let (flags, gso_type) = (vnet[0], vnet[1]);
        let (gso_size, checksum_start, checksum_offset) = (field(4), field(6), field(8));
        let packet_bytes = u32::try_from(packet.len()).map_err(|_| Malformed)?;
        let version = packet.first().ok_or(Malformed)? >> 4;
        if gso_type == GSO_NONE {
            return Ok(Self {
                packet_bytes,
                header_bytes: packet_bytes,
                segment_payload: 0,
                segments: 1,
                transport: Transport::Whole,
                transport_offset: 0,
                gso_type,
            });
        }
        let transport_offset = usize::from(checksum_start);
        let smallest_ip_header = match version {
            4 => usize::from(packet[0] & 0x0f) * 4,
            6 => 40,
            _ => return Err(Malformed),
        };
        let (transport, transport_header, checksum_at) = match (gso_type & !GSO_ECN, version) {
            (GSO_TCP_IPV4, 4) | (GSO_TCP_IPV6, 6) => {
                let data_offset = packet.get(transport_offset + 12).ok_or(Malformed)? >> 4;
                if data_offset < 5 {
                    return Err(Malformed);
                }
                (Transport::Tcp, usize::from(data_offset) * 4, TCP_CHECKSUM)
            }
            (GSO_UDP, 4 | 6) => (Transport::Udp, 8, UDP_CHECKSUM),
            _ => return Err(Malformed),
        };
        let header = transport_offset + transport_header;
        let sound = flags & NEEDS_CHECKSUM != 0
            && usize::from(checksum_offset) == checksum_at
            && smallest_ip_header >= 20
            && smallest_ip_header <= transport_offset
            && header <= packet.len().min(MAX_HEADER_BYTES)
            && gso_size > 0;
        if !sound {
            return Err(Malformed);
        }
        let payload = packet_bytes - header as u32;
        let segments = payload.div_ceil(u32::from(gso_size)).max(1);
        if segments > MAX_SEGMENTS {
            return Err(Malformed);
        }
        Ok(Self {
            packet_bytes,
            header_bytes: header as u32,
            segment_payload: u32::from(gso_size),
            segments,
            transport,
            transport_offset: checksum_start,
            gso_type,
        })
    }

    /// How many datagrams a wire would carry, at least one.
    pub(super) fn segments(&self) -> u32 {
        self.segments
    }

    /// IP bytes of datagram `index`.
    pub(super) fn segment_bytes(&self, index: u32) -> u32 {
        let payload = self.payload_range(&(index..index + 1));
        self.header_bytes + (payload.end - payload.start) as u32
    }

    /// IP bytes of the datagrams in `segments`.
    pub(super) fn run_bytes(&self, segments: &Range<u32>) -> u64 {
        let payload = self.payload_range(segments);
        u64::from(segments.end - segments.start) * u64::from(self.header_bytes) + (payload.end - payload.start) as u64
    }

    /// Bytes of the frame that [`Train::write_run`] reads for datagrams before the one with number `end`.
    pub(super) fn frame_bytes(&self, end: u32) -> usize {
        VNET_HEADER_BYTES + self.header_bytes as usize + self.payload_range(&(0..end)).end
    }

    /// Writes the datagrams in `segments` of `frame`, which this train was parsed from and of which the first
    /// [`Train::frame_bytes`] are there, as one frame by one call of
    /// `write`, which is given the frame in parts.
    ///
    /// # Errors
    /// What `write` returns.
    pub(super) fn write_run(
        &self,
        frame: &[u8],
        segments: Range<u32>,
        write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if self.transport == Transport::Whole || segments == (0..self.segments) {
            return write(&[IoSlice::new(frame)]);
        }
        let packet = &frame[VNET_HEADER_BYTES..];
        let mut headers = [0; VNET_HEADER_BYTES + MAX_HEADER_BYTES];
        let payload = self.payload_range(&segments);
        let header_end = VNET_HEADER_BYTES + self.header_bytes as usize;
        headers[..header_end].copy_from_slice(&frame[..header_end]);
        let (vnet, headers_of_packet) = headers.split_at_mut(VNET_HEADER_BYTES);
        let headers_of_packet = &mut headers_of_packet[..self.header_bytes as usize];
        self.fix_vnet(vnet, &segments);
        self.fix_ip(headers_of_packet, &segments, payload.len());
        self.fix_transport(headers_of_packet, &segments, payload.len());
        let start = self.header_bytes as usize;
        write(&[
            IoSlice::new(&headers[..header_end]),
            IoSlice::new(&packet[start + payload.start..start + payload.end]),
        ])
    }

    fn fix_vnet(&self, vnet: &mut [u8], segments: &Range<u32>) {
        let single = segments.end - segments.start == 1;
        let gso_type = match (single, segments.start) {
            (true, _) => GSO_NONE,
            (false, 0) => self.gso_type,
            // CWR stays with the first segment.
            (false, _) => self.gso_type & !GSO_ECN,
        };
        let (header_bytes, gso_size) = if single {
            (0, 0)
        } else {
            (self.header_bytes as u16, self.segment_payload as u16)
        };
        vnet[1] = gso_type;
        vnet[2..4].copy_from_slice(&header_bytes.to_ne_bytes());
        vnet[4..6].copy_from_slice(&gso_size.to_ne_bytes());
    }

    fn fix_ip(&self, headers: &mut [u8], segments: &Range<u32>, payload: usize) {
        let packet_bytes = headers.len() + payload;
        if headers[0] >> 4 == 6 {
            put(headers, 4, (packet_bytes - 40) as u16);
            return;
        }
        put(headers, 2, packet_bytes as u16);
        let identification = get(headers, 4).wrapping_add(segments.start as u16);
        put(headers, 4, identification);
        put(headers, 10, 0);
        let header_bytes = usize::from(headers[0] & 0x0f) * 4;
        let checksum = !fold(sum(&headers[..header_bytes]));
        put(headers, 10, checksum);
    }

    fn fix_transport(&self, headers: &mut [u8], segments: &Range<u32>, payload: usize) {
        let start = usize::from(self.transport_offset);
        let before = self.packet_bytes - u32::from(self.transport_offset);
        let transport = &mut headers[start..];
        let after = (transport.len() + payload) as u32;
        match self.transport {
            Transport::Whole => {}
            Transport::Udp => {
                put(transport, 4, after as u16);
                adjust_partial_checksum(transport, UDP_CHECKSUM, before, after);
            }
            Transport::Tcp => {
                let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
                let sequence = sequence.wrapping_add(segments.start * self.segment_payload);
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                if segments.start > 0 {
                    transport[13] &= !TCP_CWR;
                }
                if segments.end < self.segments {
                    transport[13] &= !(TCP_PSH | TCP_FIN);
                }
                adjust_partial_checksum(transport, TCP_CHECKSUM, before, after);
            }
        }
    }

    /// Where the payload of `segments` lies behind the headers.
    fn payload_range(&self, segments: &Range<u32>) -> Range<usize> {
        let payload = self.packet_bytes - self.header_bytes;
        let at = |segment: u32| segment.saturating_mul(self.segment_payload).min(payload) as usize;
        at(segments.start)..at(segments.end)
    }
}

const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// The field holds the folded sum of the pseudo-header, in which the transport length changes (RFC 1624, without the
/// final complement).
fn adjust_partial_checksum(transport: &mut [u8], at: usize, before: u32, after: u32) {
    let adjusted = u32::from(get(transport, at)) + u32::from(!fold(before)) + u32::from(fold(after));
    put(transport, at, fold(adjusted));
}

/// One's-complement sum of big-endian words (RFC 1071); an odd last byte is padded with zero.
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)])))
        .sum()
}

fn fold(sum: u32) -> u16 {
    let once = (sum & 0xffff) + (sum >> 16);
    ((once & 0xffff) + (once >> 16)) as u16
}

fn get(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a receiver sees: one datagram with its checksum completed.
    #[derive(Debug, PartialEq)]
    struct Datagram {
        ip: Vec<u8>,
        payload: Vec<u8>,
    }

    #[derive(Clone, Copy, Debug)]
    struct Shape {
        version: u8,
        tcp: bool,
        gso_size: u16,
        payload: usize,
        sequence: u32,
        flags: u8,
    }

    const SHAPES: [(u8, bool); 4] = [(4, true), (4, false), (6, true), (6, false)];

    fn shape(version: u8, tcp: bool) -> Shape {
        Shape {
            version,
            tcp,
            gso_size: 1000,
            payload: 4500,
            sequence: 0xffff_fc00,
            flags: 0x99,
        }
    }

    fn pseudo_header(packet: &[u8], length: usize) -> u32 {
        let (addresses, protocol) = if packet[0] >> 4 == 4 {
            (&packet[12..20], packet[9])
        } else {
            (&packet[8..40], packet[6])
        };
        sum(addresses) + u32::from(protocol) + length as u32
    }

    /// A train as the kernel hands it over: the checksum field holds the pseudo-header's sum.
    fn frame(shape: Shape) -> Vec<u8> {
        let ip_header = if shape.version == 4 { 24 } else { 40 };
        let transport_header = if shape.tcp { 32 } else { 8 };
        let length = ip_header + transport_header + shape.payload;
        let mut packet = vec![0; length];
        if shape.version == 4 {
            // One word of options, so that nothing may assume 20 bytes.
            packet[0] = 0x46;
            put(&mut packet, 2, length as u16);
            put(&mut packet, 4, 0xfffe);
            packet[8] = 64;
            packet[9] = if shape.tcp { 6 } else { 17 };
            packet[12..20].copy_from_slice(&[10, 77, 0, 1, 10, 77, 0, 2]);
            packet[20] = 1;
            let checksum = !fold(sum(&packet[..24]));
            put(&mut packet, 10, checksum);
        } else {
            packet[0] = 0x60;
            put(&mut packet, 4, (length - 40) as u16);
            packet[6] = if shape.tcp { 6 } else { 17 };
            packet[8..40].copy_from_slice(&std::array::from_fn::<u8, 32, _>(|index| index as u8 * 7 + 1));
        }
        let partial = fold(pseudo_header(&packet, length - ip_header));
        let transport = &mut packet[ip_header..];
        put(transport, 0, 4000);
        put(transport, 2, 5000);
        if shape.tcp {
            transport[4..8].copy_from_slice(&shape.sequence.to_be_bytes());
            transport[12] = 8 << 4;
            transport[13] = shape.flags;
            put(transport, TCP_CHECKSUM, partial);
        } else {
            put(transport, 4, (8 + shape.payload) as u16);
            put(transport, UDP_CHECKSUM, partial);
        }
        for (index, byte) in transport[transport_header..].iter_mut().enumerate() {
            *byte = (index * 31 % 251) as u8;
        }
        let gso_type = match (shape.tcp, shape.version) {
            (false, _) => GSO_UDP,
            (true, 4) => GSO_TCP_IPV4 | GSO_ECN,
            (true, _) => GSO_TCP_IPV6 | GSO_ECN,
        };
        let mut frame = vec![NEEDS_CHECKSUM, gso_type];
        let checksum_offset = if shape.tcp { TCP_CHECKSUM } else { UDP_CHECKSUM };
        for field in [
            ip_header + transport_header,
            usize::from(shape.gso_size),
            ip_header,
            checksum_offset,
        ] {
            frame.extend((field as u16).to_ne_bytes());
        }
        frame.extend(packet);
        frame
    }

    fn run(frame: &[u8], segments: Range<u32>) -> Vec<u8> {
        let train = Train::parse(frame).expect("a sound frame");
        let mut written = Vec::new();
        train
            .write_run(frame, segments, |parts| {
                for part in parts {
                    written.extend_from_slice(part);
                }
                Ok(written.len())
            })
            .expect("a vector takes all");
        written
    }

    /// Segments a frame as Linux does (`tcp_gso_segment`, `__udp_gso_segment`), independently of the code under test, and
    /// checks every header on the way.
    fn receive(frame: &[u8]) -> Vec<Datagram> {
        let (vnet, packet) = frame.split_at(VNET_HEADER_BYTES);
        let field = |at: usize| usize::from(u16::from_ne_bytes([vnet[at], vnet[at + 1]]));
        let (gso_type, gso_size, start, offset) = (vnet[1], field(4), field(6), field(8));
        assert_eq!(vnet[0], NEEDS_CHECKSUM);
        let tcp = offset == TCP_CHECKSUM;
        let header = start
            + if tcp {
                usize::from(packet[start + 12] >> 4) * 4
            } else {
                8
            };
        if packet[0] >> 4 == 4 {
            assert_eq!(usize::from(get(packet, 2)), packet.len(), "IPv4 total length");
            assert_eq!(fold(sum(&packet[..start])), 0xffff, "IPv4 header checksum");
        } else {
            assert_eq!(usize::from(get(packet, 4)), packet.len() - 40, "IPv6 payload length");
        }
        if !tcp {
            assert_eq!(usize::from(get(packet, start + 4)), packet.len() - start, "UDP length");
        }
        // Completing the checksum must give what a full computation gives.
        let mut completed = packet[start..].to_vec();
        let complete = fold(sum(&completed));
        put(&mut completed, offset, 0);
        let whole = fold(pseudo_header(packet, completed.len()) + u32::from(fold(sum(&completed))));
        assert_eq!(complete % 0xffff, whole % 0xffff, "partial checksum");

        let payload = &packet[header..];
        if gso_type == GSO_NONE {
            assert_eq!((field(2), gso_size), (0, 0), "no train");
            return vec![Datagram {
                ip: packet[..header].to_vec(),
                payload: payload.to_vec(),
            }];
        }
        assert_eq!(field(2), header, "hdr_len");
        assert!(payload.len() > gso_size, "a train has at least two segments");
        let count = payload.len().div_ceil(gso_size);
        if tcp {
            assert_eq!(
                gso_type & GSO_ECN != 0,
                packet[start + 13] & TCP_CWR != 0,
                "ECN flag and CWR agree"
            );
        }
        payload
            .chunks(gso_size)
            .enumerate()
            .map(|(index, payload)| {
                let mut ip = packet[..header].to_vec();
                if ip[0] >> 4 == 4 {
                    put(&mut ip, 2, (header + payload.len()) as u16);
                    let identification = get(&ip, 4).wrapping_add(index as u16);
                    put(&mut ip, 4, identification);
                    put(&mut ip, 10, 0);
                    let checksum = !fold(sum(&ip[..start]));
                    put(&mut ip, 10, checksum);
                } else {
                    put(&mut ip, 4, (header + payload.len() - 40) as u16);
                }
                let length = header - start + payload.len();
                let partial = fold(pseudo_header(&ip, length));
                put(&mut ip, start + offset, partial);
                if tcp {
                    let sequence = u32::from_be_bytes([ip[start + 4], ip[start + 5], ip[start + 6], ip[start + 7]]);
                    let sequence = sequence.wrapping_add((index * gso_size) as u32);
                    ip[start + 4..start + 8].copy_from_slice(&sequence.to_be_bytes());
                    if index > 0 {
                        ip[start + 13] &= !TCP_CWR;
                    }
                    if index + 1 < count {
                        ip[start + 13] &= !(TCP_PSH | TCP_FIN);
                    }
                } else {
                    put(&mut ip, start + 4, length as u16);
                }
                Datagram {
                    ip,
                    payload: payload.to_vec(),
                }
            })
            .collect()
    }

    #[test]
    fn any_cut_into_runs_gives_the_datagrams_of_the_whole_train() {
        for (version, tcp) in SHAPES {
            let frame = frame(shape(version, tcp));
            let whole = receive(&frame);
            assert_eq!(whole.len(), 5);
            for cuts in 0..1_u32 << 4 {
                let mut starts = vec![0];
                starts.extend((1..5).filter(|segment| cuts & 1 << (segment - 1) != 0));
                starts.push(5);
                let cut: Vec<_> = starts
                    .windows(2)
                    .flat_map(|run_| receive(&run(&frame, run_[0]..run_[1])))
                    .collect();
                assert_eq!(cut, whole, "IPv{version}, tcp {tcp}, cuts {cuts:04b}");
            }
        }
    }

    #[test]
    fn lengths_count_every_header_and_the_short_last_segment() {
        for (version, tcp) in SHAPES {
            let train = Train::parse(&frame(shape(version, tcp))).expect("sound");
            let header = if version == 4 { 24 } else { 40 } + if tcp { 32 } else { 8 };
            let lengths: Vec<_> = (0..train.segments()).map(|index| train.segment_bytes(index)).collect();
            assert_eq!(
                lengths,
                [header + 1000, header + 1000, header + 1000, header + 1000, header + 500]
            );
            assert_eq!(train.run_bytes(&(0..5)), u64::from(5 * header + 4500));
            assert_eq!(train.run_bytes(&(3..5)), u64::from(2 * header + 1500));
        }
    }

    #[test]
    fn the_sequence_advances_and_wraps_and_flags_stay_at_their_ends() {
        let frame = frame(shape(4, true));
        let (first, middle, last) = (run(&frame, 0..2), run(&frame, 2..4), run(&frame, 4..5));
        let tcp = |frame: &[u8]| {
            let tcp = &frame[VNET_HEADER_BYTES + 24..];
            (u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]), tcp[13])
        };
        // The flags of the train are CWR, ACK, PSH and FIN.
        assert_eq!(tcp(&first), (0xffff_fc00, 0x90));
        assert_eq!(tcp(&middle), (0xffff_fc00_u32.wrapping_add(2000), 0x10));
        assert_eq!(tcp(&last), (0xffff_fc00_u32.wrapping_add(4000), 0x19));
    }

    #[test]
    fn a_packet_that_is_no_train_passes_unchanged() {
        let mut frame = frame(Shape {
            payload: 500,
            ..shape(4, false)
        });
        frame[1] = GSO_NONE;
        let train = Train::parse(&frame).expect("sound");
        assert_eq!((train.segments(), train.segment_bytes(0)), (1, 24 + 8 + 500));
        assert_eq!(run(&frame, 0..1), frame);
    }

    #[test]
    fn a_train_that_lost_nothing_is_written_as_it_came() {
        let frame = frame(shape(6, false));
        assert_eq!(run(&frame, 0..5), frame);
    }

    #[test]
    fn a_frame_that_lies_about_itself_is_refused() {
        let good = frame(shape(4, true));
        assert!(Train::parse(&good).is_ok());
        let with = |at: usize, value: u8| {
            let mut bad = good.clone();
            bad[at] = value;
            Train::parse(&bad)
        };
        assert_eq!(Train::parse(&good[..9]), Err(Malformed), "no header");
        assert_eq!(Train::parse(&good[..10]), Err(Malformed), "no packet");
        assert_eq!(Train::parse(&good[..40]), Err(Malformed), "headers cut off");
        assert_eq!(with(0, 0), Err(Malformed), "a train without a partial checksum");
        assert_eq!(with(1, 3), Err(Malformed), "UFO was not asked for");
        assert_eq!(with(1, GSO_TCP_IPV6), Err(Malformed), "IPv6 train in IPv4");
        assert_eq!(with(7, 0xff), Err(Malformed), "checksum beyond the packet");
        assert_eq!(with(6, 0), Err(Malformed), "checksum inside the IP header");
        assert_eq!(with(8, 6), Err(Malformed), "TCP with UDP's checksum place");
        assert_eq!(with(10, 0x51), Err(Malformed), "IP version 5");
        assert_eq!(with(10 + 24 + 12, 0x40), Err(Malformed), "TCP header of 16 bytes");
        let mut zero = good.clone();
        zero[4..6].fill(0);
        assert_eq!(Train::parse(&zero), Err(Malformed), "segments of nothing");
    }

    #[test]
    fn no_bytes_make_the_parser_or_the_walker_fail() {
        let mut random = crate::wan::random::Random::new(11, 0);
        for (version, tcp) in SHAPES {
            let good = frame(Shape {
                payload: 300,
                gso_size: 100,
                ..shape(version, tcp)
            });
            for _ in 0..5_000 {
                let mut bad = good.clone();
                for _ in 0..1 + random.bits() % 4 {
                    let at = random.bits() as usize % 72;
                    bad[at] = random.bits() as u8;
                }
                bad.truncate(random.bits() as usize % (good.len() + 1));
                if let Ok(train) = Train::parse(&bad) {
                    let end = train.segments();
                    for segment in [0, end / 2, end - 1] {
                        assert!(train.segment_bytes(segment) as usize <= bad.len());
                        let written = run(&bad, segment..segment + 1);
                        assert_eq!(written.len() - VNET_HEADER_BYTES, train.segment_bytes(segment) as usize);
                    }
                }
            }
        }
    }
}
