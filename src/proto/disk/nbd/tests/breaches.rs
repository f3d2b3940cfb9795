//! Servers that do not keep to the protocol, one breach each.

use super::*;

const AT: u64 = 4096;

/// How the connection ends when a command at byte [`AT`] is answered with `said`.
fn ends(headers: Headers, command: &Command, said: impl Fn(Cookie) -> Vec<u8>) -> Breach {
    let mut connection = ready(headers);
    let cookie = connection.submit(command.clone()).unwrap();
    let mut events = Vec::new();
    let error = connection.feed(&said(cookie), &mut events).unwrap_err();
    assert_eq!(events, []);
    assert_eq!(connection.feed(&[], &mut events), Err(error.clone()), "it stays so");
    assert_eq!(connection.submit(Command::Flush), Err(RequestError::Closing));
    match error {
        ConnectionError::Breach(breach) => breach,
        other => panic!("{other}"),
    }
}

/// The same for a read of 1024 bytes, answered with chunks.
fn read_ends(headers: Headers, chunks: &[(u16, Vec<u8>)]) -> Breach {
    ends(headers, &read(AT, 1024), |cookie| {
        let mut said = Vec::new();
        for (number, (kind, payload)) in chunks.iter().enumerate() {
            let mut chunk = Chunk::new(cookie, AT, *kind, payload.clone());
            chunk.is_last = number + 1 == chunks.len();
            said.extend(chunk.encode(headers));
        }
        said
    })
}

const BOTH: [Headers; 2] = [Headers::Structured, Headers::Extended];

#[test]
fn replies_of_a_kind_that_was_not_agreed_on_are_refused() {
    let flush = Command::Flush;
    let chunk = |cookie| Chunk::new(cookie, 0, 0, vec![]).last();
    let breach = ends(Headers::Simple, &flush, |cookie| {
        chunk(cookie).encode(Headers::Structured)
    });
    assert_eq!(breach, Breach::NoReply { magic: 0x668e_33ef });
    let breach = ends(Headers::Structured, &flush, |cookie| {
        chunk(cookie).encode(Headers::Extended)
    });
    assert_eq!(breach, Breach::NoReply { magic: 0x6e8a_278c });
    let breach = ends(Headers::Extended, &flush, |cookie| {
        chunk(cookie).encode(Headers::Structured)
    });
    assert_eq!(breach, Breach::NoReply { magic: 0x668e_33ef });
    let breach = ends(Headers::Extended, &flush, |cookie| simple(0, cookie, &[]));
    assert_eq!(breach, Breach::NoReply { magic: 0x6744_6698 });
    assert_eq!(
        ends(Headers::Simple, &flush, |_| vec![0; 16]),
        Breach::NoReply { magic: 0 }
    );
}

#[test]
fn a_reply_to_nothing_is_refused() {
    for headers in BOTH {
        let breach = ends(headers, &Command::Flush, |cookie| {
            Chunk::new(Cookie(cookie.0 + 1), 0, 0, vec![]).last().encode(headers)
        });
        assert_eq!(breach, Breach::UnknownCookie { cookie: 2 });
    }
    let breach = ends(Headers::Simple, &Command::Flush, |_| simple(0, Cookie(9), &[]));
    assert_eq!(breach, Breach::UnknownCookie { cookie: 9 });
}

#[test]
fn a_second_reply_to_one_request_is_refused() {
    let mut connection = ready(Headers::Structured);
    let cookie = connection.submit(Command::Flush).unwrap();
    let other = connection.submit(Command::Flush).unwrap();
    let mut events = Vec::new();
    let twice = [simple(0, cookie, &[]), simple(0, cookie, &[]), simple(0, other, &[])].concat();
    let error = connection.feed(&twice, &mut events).unwrap_err();
    assert_eq!(
        error,
        ConnectionError::Breach(Breach::UnknownCookie { cookie: cookie.0 })
    );
    assert_eq!(events, [Event::Finished(cookie, Ok(Answer::Done))]);
}

#[test]
fn simple_replies_cannot_answer_what_has_content() {
    for error in [0, 5] {
        let breach = ends(Headers::Structured, &read(AT, 4), |cookie| {
            simple(error, cookie, b"abcd")
        });
        assert_eq!(breach, Breach::SimpleReply);
    }
    let status = Command::BlockStatus { offset: AT, length: 4 };
    let breach = ends(Headers::Structured, &status, |cookie| simple(0, cookie, &[]));
    assert_eq!(breach, Breach::SimpleReply);
}

#[test]
fn an_extended_reply_says_where_its_request_was() {
    let breach = ends(Headers::Extended, &read(AT, 4), |cookie| {
        Chunk::new(cookie, AT + 1, 1, data(AT, b"abcd"))
            .last()
            .encode(Headers::Extended)
    });
    let (asked, found) = (AT, AT + 1);
    assert_eq!(breach, Breach::OtherOffset { asked, found });
}

#[test]
fn lengths_are_compared_before_anything_is_taken_in() {
    for headers in BOTH {
        for (kind, length) in [
            (1_u16, 8_u64),
            (1, 8 + 1025),
            (1, u64::from(u32::MAX)),
            (2, 11),
            (2, 13),
            (0, 1),
            (0x8001, 5),
            (0x8001, 4111),
        ] {
            let breach = ends(headers, &read(AT, 1024), |cookie| {
                let head = Chunk::new(cookie, AT, kind, vec![]).last().encode(headers);
                let mut head = head;
                let at = head.len() - if headers == Headers::Extended { 8 } else { 4 };
                head.truncate(at);
                match headers {
                    Headers::Extended => head.put_u64(length),
                    _ => head.put_u32(u32::try_from(length).unwrap()),
                }
                head
            });
            assert_eq!(breach, Breach::ChunkLength { kind, bytes: length });
        }
    }
}

#[test]
fn bytes_that_were_not_asked_for_are_refused() {
    for headers in BOTH {
        for chunk in [
            (1, data(AT - 1, &[0; 2])),
            (1, data(AT + 1023, &[0; 2])),
            (1, data(u64::MAX, &[0; 2])),
            (2, hole(AT - 1, 1)),
            (2, hole(AT, 1025)),
            (2, hole(u64::MAX - 1, u32::MAX)),
        ] {
            let breach = read_ends(headers, std::slice::from_ref(&chunk));
            assert!(matches!(breach, Breach::OutOfRequest { from: AT, .. }), "{breach}");
        }
        for offset in [AT - 1, AT + 1024] {
            let breach = read_ends(headers, &[(0x8002, error_at(5, "", offset))]);
            assert!(matches!(breach, Breach::OutOfRequest { .. }), "{breach}");
        }
    }
}

#[test]
fn a_byte_that_comes_twice_is_refused_before_its_data_is_taken_in() {
    for headers in BOTH {
        let first = (1, data(AT + 256, &[0; 512]));
        for (second, offset) in [
            ((1, data(AT + 256, &[0; 512])), AT + 256),
            ((1, data(AT, &[0; 257])), AT + 256),
            ((1, data(AT + 767, &[0; 2])), AT + 767),
            ((1, data(AT + 300, &[0; 2])), AT + 300),
            ((2, hole(AT, 1024)), AT + 256),
        ] {
            assert_eq!(read_ends(headers, &[first.clone(), second]), Breach::Overlap { offset });
        }
    }
}

#[test]
fn a_read_that_ends_without_all_its_bytes_is_refused() {
    for headers in BOTH {
        assert_eq!(read_ends(headers, &[(0, vec![])]), Breach::Missing { offset: AT });
        let front = (1, data(AT, &[0; 512]));
        let back = (1, data(AT + 513, &[0; 511]));
        assert_eq!(
            read_ends(headers, &[back, front.clone()]),
            Breach::Missing { offset: AT + 512 }
        );
        assert_eq!(read_ends(headers, &[front]), Breach::Missing { offset: AT + 512 });
    }
}

#[test]
fn a_read_in_crumbs_is_refused() {
    for headers in BOTH {
        let crumbs: Vec<_> = (0..5).map(|crumb| (1, data(AT + crumb, &[0]))).collect();
        assert_eq!(read_ends(headers, &crumbs), Breach::TooManyPieces { most: 4 });
    }
}

#[test]
fn chunks_of_other_requests_are_refused() {
    for headers in BOTH {
        let (own, payload) = status(headers, IDS[0], &[(1024, 0)]);
        for (kind, payload) in [
            (own, payload.clone()),
            (11 - own, payload),
            (3, vec![]),
            (7, vec![0; 12]),
        ] {
            assert_eq!(read_ends(headers, &[(kind, payload)]), Breach::UnexpectedChunk { kind });
        }
        for (kind, payload) in [(1, data(0, b"a")), (2, hole(0, 1))] {
            let breach = ends(headers, &Command::Flush, |cookie| {
                Chunk::new(cookie, 0, kind, payload.clone()).last().encode(headers)
            });
            assert_eq!(breach, Breach::UnexpectedChunk { kind });
        }
    }
}

#[test]
fn malformed_chunks_are_refused() {
    for headers in BOTH {
        assert_eq!(read_ends(headers, &[(0x8001, error(0, ""))]), Breach::ErrorZero);
        let mut longer = error(5, "text");
        longer[5] += 1;
        assert_eq!(
            read_ends(headers, &[(0x8001, longer)]),
            Breach::MalformedChunk { kind: 0x8001 }
        );
        assert_eq!(
            read_ends(headers, &[(0x8002, error(5, "text"))]),
            Breach::MalformedChunk { kind: 0x8002 }
        );
        assert_eq!(
            read_ends(headers, &[(2, hole(AT, 0))]),
            Breach::MalformedChunk { kind: 2 }
        );
        let breach = ends(headers, &read(AT, 4), |cookie| {
            Chunk::new(cookie, AT, 0, vec![]).encode(headers)
        });
        assert_eq!(breach, Breach::EmptyChunkNotLast);
    }
}

#[test]
fn block_status_tells_each_context_once_and_only_what_was_asked() {
    let command = Command::BlockStatus {
        offset: AT,
        length: 1000,
    };
    for headers in BOTH {
        let status_ends = |payloads: &[(u32, &[(u32, u32)])]| {
            ends(headers, &command, |cookie| {
                let mut said = Vec::new();
                for (id, descriptors) in payloads {
                    let (kind, payload) = status(headers, *id, descriptors);
                    said.extend(Chunk::new(cookie, AT, kind, payload).encode(headers));
                }
                said.extend(Chunk::new(cookie, AT, 0, vec![]).last().encode(headers));
                said
            })
        };
        let all: &[(u32, u32)] = &[(1000, 0)];
        assert_eq!(status_ends(&[(IDS[0], all), (8, all)]), Breach::ContextStatus { id: 8 });
        assert_eq!(
            status_ends(&[(IDS[0], all), (IDS[0], all)]),
            Breach::ContextStatus { id: IDS[0] }
        );
        assert_eq!(
            status_ends(&[(IDS[0], all)]),
            Breach::StatusMissing {
                name: "qemu:dirty-bitmap:round-1".into()
            }
        );
        for descriptors in [
            &[(0, 0)][..],
            &[(10, 0), (0, 1)],
            &[(1000, 0), (1, 1)],
            &[(u32::MAX, 0), (1, 0)],
        ] {
            assert_eq!(
                status_ends(&[(IDS[0], descriptors)]),
                Breach::Descriptors { offset: AT }
            );
        }
        let (kind, _) = status(headers, 0, &[]);
        assert!(matches!(status_ends(&[(IDS[0], &[])]), Breach::ChunkLength { kind: found, .. } if found == kind));
        // Of the other headers' form.
        let breach = ends(headers, &command, |cookie| {
            Chunk::new(cookie, AT, 11 - kind, vec![0; 24]).encode(headers)
        });
        assert_eq!(breach, Breach::UnexpectedChunk { kind: 11 - kind });
    }
}

#[test]
fn a_count_of_descriptors_that_is_not_theirs_is_refused() {
    let command = Command::BlockStatus {
        offset: AT,
        length: 1000,
    };
    let breach = ends(Headers::Extended, &command, |cookie| {
        let (kind, mut payload) = status(Headers::Extended, IDS[0], &[(500, 0), (500, 1)]);
        payload[7] = 1;
        Chunk::new(cookie, AT, kind, payload).encode(Headers::Extended)
    });
    assert_eq!(breach, Breach::MalformedChunk { kind: 6 });
}

#[test]
fn as_many_descriptors_as_qemu_sends_are_waited_for_and_one_more_is_not() {
    let command = Command::BlockStatus {
        offset: 0,
        length: SIZE,
    };
    for (headers, kind, front, each) in [(Headers::Structured, 5, 4, 8), (Headers::Extended, 6, 8, 16)] {
        let head_of = |count: usize| {
            let mut connection = ready(headers);
            let cookie = connection.submit(command.clone()).unwrap();
            let chunk = Chunk::new(cookie, 0, kind, vec![0; front + count * each]).encode(headers);
            let head = chunk.len() - front - count * each;
            connection.feed(&chunk[..head], &mut Vec::new())
        };
        assert_eq!(head_of(MAX_DESCRIPTORS), Ok(()));
        assert!(head_of(MAX_DESCRIPTORS + 1).is_err());
    }
}
