//! However a server's bytes are cut, and whatever becomes of them on the way.

use proptest::prelude::*;

use super::*;

/// Reads whose chunks are cut, shuffled and interleaved as the numbers say; the commands, what the server says, and what comes of it.
fn conversation(headers: Headers, reads: &[(u16, u16)], seed: u64) -> (Vec<Command>, Vec<Vec<u8>>, Vec<Event>) {
    let mut state = seed | 1;
    let mut draw = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let mut commands = Vec::new();
    let mut wanted = Vec::new();
    let mut queues = Vec::new();
    for (number, &(place, sectors)) in (1..).zip(reads) {
        let cookie = Cookie(number);
        let (offset, sectors) = (u64::from(place % 1024) * 512, u64::from(sectors % 30) + 1);
        commands.push(read(offset, u32::try_from(sectors * 512).unwrap()));
        let (mut pieces, mut chunks) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < sectors {
            let count = (1 + draw(8)).min(sectors - at);
            let (start, length) = (offset + at * 512, count * 512);
            if draw(3) == 0 {
                pieces.push(hole_piece(start, length));
                chunks.push(Chunk::new(
                    cookie,
                    offset,
                    2,
                    hole(start, u32::try_from(length).unwrap()),
                ));
            } else {
                let bytes = vec![u8::try_from(draw(256)).unwrap(); usize::try_from(length).unwrap()];
                pieces.push(piece(start, &bytes));
                chunks.push(Chunk::new(cookie, offset, 1, data(start, &bytes)));
            }
            at += count;
        }
        for place in (1..chunks.len()).rev() {
            chunks.swap(place, usize::try_from(draw(place as u64 + 1)).unwrap());
        }
        if draw(4) == 0 {
            chunks.push(Chunk::new(cookie, offset, 0x8001, error(5, "no")).last());
            wanted.push(Event::Finished(
                cookie,
                Err(Failure {
                    number: ErrorNumber::IO,
                    text: "no".into(),
                    offset: None,
                }),
            ));
        } else {
            chunks.push(Chunk::new(cookie, offset, 0, vec![]).last());
            wanted.push(Event::Finished(cookie, Ok(Answer::Read(pieces))));
        }
        chunks.reverse();
        queues.push(chunks);
    }
    let (mut said, mut events) = (Vec::new(), Vec::new());
    while queues.iter().any(|queue| !queue.is_empty()) {
        let which = usize::try_from(draw(queues.len() as u64)).unwrap();
        if let Some(chunk) = queues[which].pop() {
            said.push(chunk.encode(headers));
            if chunk.is_last {
                events.push(wanted[which].clone());
            }
        }
    }
    (commands, said, events)
}

/// Feeds all that a server ever says, cut at the multiples of `step`; submits `commands` when the connection is ready.
fn run(
    said: &[u8],
    step: usize,
    wanted: Vec<MetaContext>,
    commands: &[Command],
) -> (Vec<Event>, Result<(), ConnectionError>) {
    let mut connection = Connection::new("disk", wanted).unwrap();
    let mut events = Vec::new();
    for piece in said.chunks(step) {
        let result = connection.feed(piece, &mut events);
        if connection.export().is_some() && connection.in_flight() == 0 && events.len() == 1 {
            for command in commands {
                connection.submit(command.clone()).unwrap();
            }
        }
        if result.is_err() {
            return (events, result);
        }
    }
    (events, Ok(()))
}

fn any_headers() -> impl Strategy<Value = Headers> {
    prop_oneof![Just(Headers::Structured), Just(Headers::Extended)]
}

proptest! {
    #[test]
    fn a_conversation_is_understood_however_it_is_cut(
        headers in any_headers(),
        reads in prop::collection::vec(any::<(u16, u16)>(), 1..6),
        seed in any::<u64>(),
        step in 1_usize..3000,
    ) {
        let (commands, said, wanted) = conversation(headers, &reads, seed);
        let mut connection = ready(headers);
        for command in commands {
            connection.submit(command).unwrap();
        }
        let mut events = Vec::new();
        for piece in said.concat().chunks(step) {
            connection.feed(piece, &mut events).unwrap();
        }
        prop_assert_eq!(events, wanted);
        prop_assert_eq!(connection.in_flight(), 0);
    }

    #[test]
    fn a_handshake_is_understood_however_it_is_cut(
        headers in prop_oneof![Just(Headers::Simple), any_headers()],
        step in 1_usize..200,
    ) {
        let wanted = if headers == Headers::Simple { vec![] } else { contexts() };
        let (events, result) = run(&whole_handshake(headers), step, wanted, &[]);
        prop_assert_eq!(result, Ok(()));
        prop_assert!(matches!(&events[..], [Event::Ready(_)]));
    }

    #[test]
    fn damaged_bytes_end_the_connection_or_give_whole_answers_in_any_cutting(
        headers in any_headers(),
        reads in prop::collection::vec(any::<(u16, u16)>(), 1..4),
        seed in any::<u64>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 0..4),
        step in 1_usize..3000,
    ) {
        let (commands, chunks, _) = conversation(headers, &reads, seed);
        let mut said = chunks.concat();
        for (place, by) in &damage {
            let at = place.index(said.len());
            said[at] ^= by;
        }
        let fed = |step: usize| {
            let mut connection = ready(headers);
            for command in &commands {
                connection.submit(command.clone()).unwrap();
            }
            let mut events = Vec::new();
            let ended = said.chunks(step).try_for_each(|piece| connection.feed(piece, &mut events));
            (events, ended)
        };
        let (events, ended) = fed(step);
        prop_assert_eq!(fed(said.len()), (events.clone(), ended));
        for event in events {
            if let Event::Finished(cookie, Ok(Answer::Read(pieces))) = event {
                let Command::Read { offset, length, .. } = commands[usize::try_from(cookie.0 - 1).unwrap()] else { unreachable!() };
                let mut next = offset;
                for piece in pieces {
                    prop_assert_eq!(piece.offset, next);
                    prop_assert!(!piece.content.is_empty());
                    next += piece.content.len();
                }
                prop_assert_eq!(next, offset + u64::from(length));
            }
        }
    }

    #[test]
    fn a_damaged_handshake_ends_or_waits_and_never_more(
        headers in any_headers(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..4),
        step in 1_usize..200,
    ) {
        let mut said = whole_handshake(headers);
        for (place, by) in &damage {
            let at = place.index(said.len());
            said[at] ^= by;
        }
        let outcome = run(&said, step, contexts(), &[]);
        prop_assert_eq!(run(&said, said.len(), contexts(), &[]), outcome);
    }
}
