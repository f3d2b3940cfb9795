//! What is sent for a command, and which commands are not sent.

use bytes::Buf;
use proptest::prelude::*;

use super::*;

/// A request as a server reads it.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u64,
}

fn decode(headers: Headers, bytes: &mut &[u8]) -> Request {
    let is_extended = headers == Headers::Extended;
    let magic = if is_extended { 0x21e4_1c71 } else { 0x2560_9513 };
    assert_eq!(bytes.get_u32(), magic);
    Request {
        flags: bytes.get_u16(),
        kind: bytes.get_u16(),
        cookie: bytes.get_u64(),
        offset: bytes.get_u64(),
        length: if is_extended {
            bytes.get_u64()
        } else {
            bytes.get_u32().into()
        },
    }
}

fn any_command() -> impl Strategy<Value = Command> {
    let range = || (0..SIZE).prop_flat_map(|offset| (Just(offset), 1..=(SIZE - offset).min(5000)));
    let zeroing = prop_oneof![Just(Zeroing::MayBeHole), Just(Zeroing::NoHole), Just(Zeroing::FastOnly)];
    prop_oneof![
        (range(), any::<bool>()).prop_map(|((offset, length), whole)| Command::Read {
            offset,
            length: u32::try_from(length).unwrap(),
            reading: if whole { Reading::Whole } else { Reading::Sparse },
        }),
        range().prop_map(|(offset, length)| Command::Write {
            offset,
            data: Bytes::from(vec![5; usize::try_from(length).unwrap()]),
        }),
        (range(), zeroing).prop_map(|((offset, length), zeroing)| Command::WriteZeroes {
            offset,
            length,
            zeroing
        }),
        range().prop_map(|(offset, length)| Command::Trim { offset, length }),
        Just(Command::Flush),
        range().prop_map(|(offset, length)| Command::BlockStatus { offset, length }),
    ]
}

proptest! {
    #[test]
    fn a_server_reads_what_was_commanded(commands in prop::collection::vec(any_command(), 1..20), compact in any::<bool>()) {
        let headers = if compact { Headers::Structured } else { Headers::Extended };
        let mut connection = ready(headers);
        for command in &commands {
            connection.submit(command.clone()).unwrap();
        }
        let bytes = sent(&mut connection);
        let mut bytes = &bytes[..];
        for (number, command) in (1..).zip(&commands) {
            let request = decode(headers, &mut bytes);
            let (kind, flags, offset, length) = match command {
                Command::Read { offset, length, reading } => (0, u16::from(*reading == Reading::Whole) << 2, *offset, u64::from(*length)),
                Command::Write { offset, data } => {
                    prop_assert_eq!(bytes.copy_to_bytes(data.len()), data);
                    (1, u16::from(!compact) << 5, *offset, data.len() as u64)
                }
                Command::WriteZeroes { offset, length, zeroing } => {
                    let flags = match zeroing { Zeroing::MayBeHole => 0, Zeroing::NoHole => 2, Zeroing::FastOnly => 16 };
                    (6, flags, *offset, *length)
                }
                Command::Trim { offset, length } => (4, 0, *offset, *length),
                Command::Flush => (3, 0, 0, 0),
                Command::BlockStatus { offset, length } => (7, 0, *offset, *length),
            };
            prop_assert_eq!(request, Request { flags, kind, cookie: number, offset, length });
        }
        prop_assert!(bytes.is_empty());
        prop_assert_eq!(connection.in_flight(), commands.len());
    }
}

/// A connection whose export has these flags and block sizes.
fn with(size: u64, flags: u16, sizes: [u32; 3], headers: u32) -> Connection {
    let mut said = greeting();
    said.extend(option_reply(11, headers, &[]));
    if headers != ACK {
        said.extend(option_reply(8, ACK, &[]));
    }
    said.extend(block_info(sizes));
    said.extend(export_info(size, flags));
    said.extend(option_reply(7, ACK, &[]));
    let mut connection = Connection::new("", vec![]).unwrap();
    connection.feed(&said, &mut Vec::new()).unwrap();
    connection
}

fn refusal(connection: &mut Connection, command: Command) -> RequestError {
    sent(connection);
    let error = connection.submit(command).unwrap_err();
    assert_eq!(sent(connection), b"", "nothing is sent");
    error
}

#[test]
fn what_an_export_does_not_offer_is_not_asked_of_it() {
    let zero = |zeroing| Command::WriteZeroes {
        offset: 0,
        length: 512,
        zeroing,
    };
    let write = || Command::Write {
        offset: 0,
        data: Bytes::from_static(&[1; 512]),
    };
    let trim = || Command::Trim { offset: 0, length: 512 };
    let mut none = with(SIZE, 1, [1, 4096, 4096], ACK);
    for command in [zero(Zeroing::MayBeHole), trim(), Command::Flush] {
        assert!(matches!(refusal(&mut none, command), RequestError::NotOffered { .. }));
    }
    assert!(none.submit(write()).is_ok());
    let mut read_only = with(SIZE, FLAGS | 2, [1, 4096, 4096], ACK);
    for command in [zero(Zeroing::MayBeHole), trim(), write()] {
        assert_eq!(
            refusal(&mut read_only, command),
            RequestError::NotOffered { what: "writing" }
        );
    }
    assert!(read_only.submit(read(0, 1)).is_ok());
    let mut slow = with(SIZE, FLAGS & !(1 << 11), [1, 4096, 4096], ACK);
    assert!(matches!(
        refusal(&mut slow, zero(Zeroing::FastOnly)),
        RequestError::NotOffered { .. }
    ));
    assert!(slow.submit(zero(Zeroing::NoHole)).is_ok());
    let status = Command::BlockStatus { offset: 0, length: 1 };
    assert!(matches!(refusal(&mut slow, status), RequestError::NotOffered { .. }));
}

#[test]
fn a_read_is_not_asked_for_in_one_piece_where_that_is_not_offered() {
    let mut connection = with(SIZE, FLAGS & !(1 << 7), [1, 4096, 4096], ACK);
    sent(&mut connection);
    let whole = Command::Read {
        offset: 0,
        length: 4096,
        reading: Reading::Whole,
    };
    connection.submit(whole).unwrap();
    assert_eq!(sent(&mut connection)[4..8], [0; 4]);
}

#[test]
fn requests_reach_the_last_byte_and_not_beyond() {
    let mut connection = ready(Headers::Structured);
    assert!(connection.submit(read(SIZE - 1, 1)).is_ok());
    for (offset, length) in [(SIZE - 1, 2), (SIZE, 1), (u64::MAX, 1)] {
        assert!(matches!(
            refusal(&mut connection, read(offset, length)),
            RequestError::OutOfExport { .. }
        ));
    }
    assert_eq!(refusal(&mut connection, read(5, 0)), RequestError::Empty { offset: 5 });
}

#[test]
fn requests_are_whole_blocks_except_at_the_end_of_an_export_that_is_none() {
    let mut connection = with(10_000, FLAGS, [512, 4096, 8192], ACK);
    assert!(connection.submit(read(512, 1024)).is_ok());
    assert!(connection.submit(read(9728, 272)).is_ok());
    for (offset, length) in [(1, 512), (512, 511), (9729, 271)] {
        assert!(matches!(
            refusal(&mut connection, read(offset, length)),
            RequestError::Unaligned { .. }
        ));
    }
}

#[test]
fn reads_and_writes_have_the_servers_limit_and_other_lengths_that_of_their_header() {
    let trim = |length| Command::Trim { offset: 0, length };
    let size = 1 << 40;
    let mut compact = with(size, FLAGS, [512, 4096, 8192], UNSUPPORTED);
    assert!(compact.submit(read(0, 8192)).is_ok());
    assert_eq!(
        refusal(&mut compact, read(0, 8704)),
        RequestError::TooLong {
            length: 8704,
            most: 8192
        }
    );
    assert!(compact.submit(trim((1 << 32) - 512)).is_ok());
    assert!(matches!(
        refusal(&mut compact, trim(1 << 32)),
        RequestError::TooLong { .. }
    ));
    let mut extended = with(size, FLAGS, [512, 4096, u32::MAX], ACK);
    assert!(extended.submit(trim(1 << 32)).is_ok());
    assert!(extended.submit(read(0, MAX_PAYLOAD)).is_ok());
    assert!(matches!(
        refusal(&mut extended, read(0, MAX_PAYLOAD + 512)),
        RequestError::TooLong { .. }
    ));
}

#[test]
fn so_many_requests_are_open_and_one_more_waits_for_an_answer() {
    let mut connection = ready(Headers::Structured);
    let cookies: Vec<Cookie> = (0..MAX_IN_FLIGHT)
        .map(|_| connection.submit(Command::Flush).unwrap())
        .collect();
    assert_eq!(refusal(&mut connection, Command::Flush), RequestError::TooManyInFlight);
    connection.feed(&simple(0, cookies[9], &[]), &mut Vec::new()).unwrap();
    assert!(connection.submit(Command::Flush).is_ok());
}

#[test]
fn a_connection_is_closed_when_its_last_answer_is_there() {
    let mut connection = ready(Headers::Structured);
    let flush = connection.submit(Command::Flush).unwrap();
    sent(&mut connection);
    connection.close();
    assert_eq!(sent(&mut connection), b"");
    assert_eq!(refusal(&mut connection, Command::Flush), RequestError::Closing);
    let mut events = Vec::new();
    connection.feed(&simple(0, flush, &[]), &mut events).unwrap();
    assert_eq!(events, [Event::Finished(flush, Ok(Answer::Done))]);
    let bytes = sent(&mut connection);
    let request = decode(Headers::Structured, &mut &bytes[..]);
    assert_eq!((request.kind, request.offset, request.length), (2, 0, 0));
    connection.close();
    assert_eq!(sent(&mut connection), b"", "it is said once");
}

#[test]
fn a_server_that_shuts_down_gets_no_more_requests_and_a_goodbye() {
    let mut connection = ready(Headers::Structured);
    let cookies = [(); 2].map(|()| connection.submit(Command::Flush).unwrap());
    sent(&mut connection);
    connection.feed(&simple(108, cookies[0], &[]), &mut Vec::new()).unwrap();
    assert_eq!(refusal(&mut connection, Command::Flush), RequestError::Closing);
    connection.feed(&simple(0, cookies[1], &[]), &mut Vec::new()).unwrap();
    let bytes = sent(&mut connection);
    assert_eq!(decode(Headers::Structured, &mut &bytes[..]).kind, 2);
}
