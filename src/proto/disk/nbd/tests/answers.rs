//! Replies of servers that keep to the protocol.

use super::*;
use crate::proto::disk::extents::Extents;

const BOTH: [Headers; 2] = [Headers::Structured, Headers::Extended];

/// What comes of a command when the server answers with `chunks`.
fn answered(headers: Headers, command: &Command, chunks: impl Fn(Cookie) -> Vec<Chunk>) -> Result<Answer, Failure> {
    let mut connection = ready(headers);
    let cookie = connection.submit(command.clone()).unwrap();
    let mut events = Vec::new();
    for chunk in chunks(cookie) {
        assert_eq!(events, []);
        connection.feed(&chunk.encode(headers), &mut events).unwrap();
    }
    assert_eq!(connection.in_flight(), 0);
    match &events[..] {
        [Event::Finished(found, result)] if *found == cookie => result.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_read_is_put_together_from_chunks_in_any_order() {
    for headers in BOTH {
        let found = answered(headers, &read(4096, 2048), |cookie| {
            vec![
                Chunk::new(cookie, 4096, 1, data(5632, &[3; 512])),
                Chunk::new(cookie, 4096, 1, data(4096, &[1; 512])),
                Chunk::new(cookie, 4096, 2, hole(4608, 1024)),
                Chunk::new(cookie, 4096, 0, vec![]).last(),
            ]
        });
        let wanted = vec![piece(4096, &[1; 512]), hole_piece(4608, 1024), piece(5632, &[3; 512])];
        assert_eq!(found, Ok(Answer::Read(wanted)));
    }
}

#[test]
fn the_last_content_may_end_a_read() {
    for headers in BOTH {
        let found = answered(headers, &read(0, 3), |cookie| {
            vec![Chunk::new(cookie, 0, 1, data(0, b"abc")).last()]
        });
        assert_eq!(found, Ok(Answer::Read(vec![piece(0, b"abc")])));
    }
}

#[test]
fn replies_to_several_requests_are_interleaved() {
    for headers in BOTH {
        let mut connection = ready(headers);
        let one = connection.submit(read(0, 1024)).unwrap();
        let two = connection.submit(read(512, 1024)).unwrap();
        let flush = connection.submit(Command::Flush).unwrap();
        let mut events = Vec::new();
        for chunk in [
            Chunk::new(two, 512, 1, data(512, &[2; 512])),
            Chunk::new(one, 0, 2, hole(0, 512)),
            Chunk::new(flush, 0, 0, vec![]).last(),
            Chunk::new(two, 512, 2, hole(1024, 512)).last(),
            Chunk::new(one, 0, 1, data(512, &[2; 512])).last(),
        ] {
            connection.feed(&chunk.encode(headers), &mut events).unwrap();
        }
        let of_two = vec![piece(512, &[2; 512]), hole_piece(1024, 512)];
        let of_one = vec![hole_piece(0, 512), piece(512, &[2; 512])];
        assert_eq!(
            events,
            [
                Event::Finished(flush, Ok(Answer::Done)),
                Event::Finished(two, Ok(Answer::Read(of_two))),
                Event::Finished(one, Ok(Answer::Read(of_one))),
            ]
        );
    }
}

#[test]
fn a_server_without_chunks_answers_with_all_bytes_or_an_error() {
    let mut connection = ready(Headers::Simple);
    let one = connection.submit(read(0, 4)).unwrap();
    let two = connection.submit(read(4, 4)).unwrap();
    let mut events = Vec::new();
    let said = [simple(5, two, &[]), simple(0, one, b"abcd")].concat();
    connection.feed(&said, &mut events).unwrap();
    let failure = Failure {
        number: ErrorNumber::IO,
        text: String::new(),
        offset: None,
    };
    assert_eq!(
        events,
        [
            Event::Finished(two, Err(failure)),
            Event::Finished(one, Ok(Answer::Read(vec![piece(0, b"abcd")]))),
        ]
    );
}

#[test]
fn an_error_ends_its_request_and_nothing_else() {
    for headers in BOTH {
        let mut connection = ready(headers);
        let one = connection.submit(read(0, 1024)).unwrap();
        let two = connection.submit(read(1024, 512)).unwrap();
        let mut events = Vec::new();
        for chunk in [
            Chunk::new(one, 0, 1, data(0, &[1; 512])),
            Chunk::new(one, 0, 0x8002, error_at(5, "bad sector", 700)),
            Chunk::new(one, 0, 0x8001, error(28, "and another")),
            Chunk::new(one, 0, 0, vec![]).last(),
            Chunk::new(two, 1024, 1, data(1024, &[2; 512])).last(),
        ] {
            connection.feed(&chunk.encode(headers), &mut events).unwrap();
        }
        let failure = Failure {
            number: ErrorNumber::IO,
            text: "bad sector".into(),
            offset: Some(700),
        };
        assert!(failure.to_string().contains("at byte 700: bad sector"), "{failure}");
        assert_eq!(
            events,
            [
                Event::Finished(one, Err(failure)),
                Event::Finished(two, Ok(Answer::Read(vec![piece(1024, &[2; 512])]))),
            ]
        );
    }
}

#[test]
fn errors_of_kinds_that_are_not_known_end_their_request_too() {
    for headers in BOTH {
        let found = answered(headers, &Command::Flush, |cookie| {
            let payload = [&error(75, "too much")[..], &[9; 5]].concat();
            vec![Chunk::new(cookie, 0, 0x8123, payload).last()]
        });
        let failure = found.unwrap_err();
        assert_eq!((failure.number, &failure.text[..]), (ErrorNumber::OVERFLOW, "too much"));
    }
}

#[test]
fn a_write_is_answered_with_or_without_a_chunk() {
    let write = Command::Write {
        offset: 512,
        data: Bytes::from_static(&[1; 512]),
    };
    for headers in BOTH {
        let found = answered(headers, &write, |cookie| {
            vec![Chunk::new(cookie, 512, 0, vec![]).last()]
        });
        assert_eq!(found, Ok(Answer::Done));
        let found = answered(headers, &write, |cookie| {
            vec![Chunk::new(cookie, 512, 0x8001, error(28, "")).last()]
        });
        assert_eq!(found.unwrap_err().number, ErrorNumber::NOSPC);
    }
    let mut connection = ready(Headers::Structured);
    let cookie = connection.submit(write).unwrap();
    let mut events = Vec::new();
    connection.feed(&simple(28, cookie, &[]), &mut events).unwrap();
    assert!(matches!(&events[..], [Event::Finished(_, Err(failure))] if failure.number == ErrorNumber::NOSPC));
}

#[test]
fn block_status_is_told_for_each_context_in_the_order_of_asking() {
    let command = Command::BlockStatus {
        offset: 1000,
        length: 3000,
    };
    for headers in BOTH {
        let found = answered(headers, &command, |cookie| {
            let (kind, dirty) = status(headers, IDS[1], &[(3000, 1)]);
            // The last descriptor may reach beyond what was asked for; others may tell less.
            let (_, allocation) = status(headers, IDS[0], &[(500, 0), (500, 3), (5000, 0)]);
            vec![
                Chunk::new(cookie, 1000, kind, dirty),
                Chunk::new(cookie, 1000, kind, allocation).last(),
            ]
        });
        let mut allocation = Extents::uniform(1000..1500, 0);
        allocation.extend_to(2000, 3);
        allocation.extend_to(4000, 0);
        let dirty = Extents::uniform(1000..4000, 1);
        assert_eq!(found, Ok(Answer::Status(vec![allocation, dirty])));
    }
}

#[test]
fn neighbours_that_say_the_same_are_one_extent_and_less_than_asked_is_an_answer() {
    let command = Command::BlockStatus {
        offset: 0,
        length: 3000,
    };
    for headers in BOTH {
        let found = answered(headers, &command, |cookie| {
            let (kind, dirty) = status(headers, IDS[1], &[(10, 0)]);
            let (_, allocation) = status(headers, IDS[0], &[(500, 0), (500, 0)]);
            vec![
                Chunk::new(cookie, 0, kind, allocation),
                Chunk::new(cookie, 0, kind, dirty),
                Chunk::new(cookie, 0, 0, vec![]).last(),
            ]
        });
        let wanted = vec![Extents::uniform(0..1000, 0), Extents::uniform(0..10, 0)];
        assert_eq!(found, Ok(Answer::Status(wanted)));
    }
}
