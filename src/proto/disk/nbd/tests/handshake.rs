//! What servers say before the first request.

use super::*;

fn fed(
    export: &str,
    wanted: Vec<MetaContext>,
    said: &[Vec<u8>],
) -> (Connection, Vec<Event>, Result<(), ConnectionError>) {
    let mut connection = Connection::new(export, wanted).unwrap();
    let mut events = Vec::new();
    let result = connection.feed(&said.concat(), &mut events);
    (connection, events, result)
}

/// What ends the handshake.
fn ends_with(said: &[Vec<u8>]) -> ConnectionError {
    let (_, events, result) = fed("disk", contexts(), said);
    assert_eq!(events, []);
    result.unwrap_err()
}

fn breach(said: &[Vec<u8>]) -> Breach {
    match ends_with(said) {
        ConnectionError::Breach(breach) => breach,
        other => panic!("{other}"),
    }
}

#[test]
fn the_best_headers_that_are_offered_are_agreed_on() {
    for headers in [Headers::Simple, Headers::Structured, Headers::Extended] {
        let export = ready(headers).export().unwrap().clone();
        assert_eq!(export.headers, headers);
        assert_eq!(export.size_bytes, SIZE);
        assert_eq!(export.block_sizes.preferred, 4096);
        assert!(export.flags.can_flush() && export.flags.can_trim() && export.flags.can_zero_fast());
        assert!(!export.flags.is_read_only());
    }
}

#[test]
fn each_option_waits_for_the_answer_to_the_one_before() {
    let mut connection = Connection::new("disk", contexts()).unwrap();
    let said = |connection: &mut Connection, bytes: Vec<u8>| {
        let mut events = Vec::new();
        connection.feed(&bytes, &mut events).unwrap();
        (sent(connection), events)
    };
    assert_eq!(sent(&mut connection), b"");
    let (answer, _) = said(&mut connection, greeting());
    assert_eq!(answer, b"\0\0\0\x03IHAVEOPT\0\0\0\x0b\0\0\0\0");
    let (answer, _) = said(&mut connection, option_reply(11, UNSUPPORTED, b"what?"));
    assert_eq!(answer, b"IHAVEOPT\0\0\0\x08\0\0\0\0");
    let (answer, _) = said(&mut connection, option_reply(8, ACK, &[]));
    let names = b"\0\0\0\x04disk\0\0\0\x02\0\0\0\x0fbase:allocation\0\0\0\x19qemu:dirty-bitmap:round-1";
    assert_eq!(answer, [&b"IHAVEOPT\0\0\0\x0a\0\0\0\x3c"[..], names].concat());
    assert_eq!(names.len(), 0x3c);
    for (id, name) in [(0, "base:allocation"), (9, "qemu:dirty-bitmap:round-1")] {
        assert_eq!(said(&mut connection, context_reply(id, name)).0, b"");
    }
    let (answer, _) = said(&mut connection, option_reply(10, ACK, &[]));
    assert_eq!(answer, b"IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x04disk\0\x01\0\x03");
    assert_eq!(connection.submit(Command::Flush), Err(RequestError::NotReady));
    let (answer, events) = said(
        &mut connection,
        [export_info(SIZE, FLAGS), option_reply(7, ACK, &[])].concat(),
    );
    assert_eq!(answer, b"");
    assert!(matches!(&events[..], [Event::Ready(export)] if export.block_sizes.minimum == 512));
}

#[test]
fn a_server_without_the_zeroes_flag_is_not_promised_to_leave_them_out() {
    let (mut connection, ..) = fed("disk", vec![], &[b"NBDMAGICIHAVEOPT\0\x01".to_vec()]);
    assert!(sent(&mut connection).starts_with(&[0, 0, 0, 1]));
}

#[test]
fn an_export_that_is_not_there_is_refused_with_the_servers_words() {
    let said = [
        greeting(),
        option_reply(11, ACK, &[]),
        option_reply(7, 0x8000_0006, b"export 'disk' not present"),
    ];
    let (_, _, result) = fed("disk", vec![], &said);
    let error = result.unwrap_err();
    assert!(matches!(&error, ConnectionError::Refused(Refusal::UnknownExport { export, .. }) if export == "disk"));
    assert!(error.to_string().contains("export 'disk' not present"), "{error}");
}

#[test]
fn a_server_that_wants_tls_is_not_asked_for_less() {
    for option in [11, 8] {
        let mut said = vec![greeting()];
        if option == 8 {
            said.push(option_reply(11, UNSUPPORTED, &[]));
        }
        said.push(option_reply(option, 0x8000_0005, b"TLS first"));
        let error = ends_with(&said);
        assert!(matches!(&error, ConnectionError::Refused(Refusal::Option { .. })));
        assert!(error.to_string().contains("TLS"), "{error}");
    }
}

#[test]
fn a_context_that_is_not_selected_ends_the_handshake() {
    let said = [
        greeting(),
        option_reply(11, ACK, &[]),
        context_reply(1, "base:allocation"),
        option_reply(10, ACK, &[]),
    ];
    let error = ends_with(&said);
    assert!(
        matches!(&error, ConnectionError::Refused(Refusal::NoContext { name, .. }) if name == "qemu:dirty-bitmap:round-1")
    );
}

#[test]
fn contexts_cannot_be_had_without_structured_replies() {
    let said = [
        greeting(),
        option_reply(11, UNSUPPORTED, &[]),
        option_reply(8, UNSUPPORTED, &[]),
    ];
    assert_eq!(ends_with(&said), ConnectionError::Refused(Refusal::NoStructuredReplies));
}

#[test]
fn what_does_not_speak_nbd_or_only_the_old_one_is_told_apart() {
    assert!(matches!(
        breach(&[b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec()]),
        Breach::NotNbd { .. }
    ));
    let oldstyle = [&b"NBDMAGIC"[..], &0x0000_4202_8186_1253_u64.to_be_bytes(), &[0; 2]].concat();
    assert_eq!(breach(&[oldstyle]), Breach::NotFixedNewstyle);
    assert_eq!(breach(&[b"NBDMAGICIHAVEOPT\0\x02".to_vec()]), Breach::NotFixedNewstyle);
}

#[test]
fn replies_that_break_the_protocol_end_the_handshake() {
    let structured = || vec![greeting(), option_reply(11, ACK, &[])];
    let selected = || {
        let mut said = structured();
        said.push(context_reply(7, "base:allocation"));
        said
    };
    let after = |mut said: Vec<Vec<u8>>, next: Vec<u8>| {
        said.push(next);
        breach(&said)
    };
    assert!(matches!(
        after(vec![greeting()], vec![0; 20]),
        Breach::NoOptionReply { magic: 0 }
    ));
    assert_eq!(
        after(vec![greeting()], option_reply(8, ACK, &[])),
        Breach::OtherOption { asked: 11, found: 8 }
    );
    assert_eq!(
        after(vec![greeting()], option_reply(11, ACK, b"x")),
        Breach::MalformedOptionReply { option: 11, reply: 1 }
    );
    assert_eq!(
        after(vec![greeting()], option_reply(11, 3, &[0; 12])),
        Breach::UnexpectedOptionReply { option: 11, reply: 3 }
    );
    assert_eq!(
        after(structured(), option_reply(10, 4, &[0; 3])),
        Breach::MalformedOptionReply { option: 10, reply: 4 }
    );
    assert_eq!(
        after(structured(), option_reply(10, 4, &[0, 0, 0, 1, 0xff])),
        Breach::MalformedOptionReply { option: 10, reply: 4 }
    );
    assert_eq!(
        after(structured(), context_reply(7, "base:other")),
        Breach::UnexpectedContext {
            name: "base:other".into()
        }
    );
    assert_eq!(
        after(selected(), context_reply(8, "base:allocation")),
        Breach::UnexpectedContext {
            name: "base:allocation".into()
        }
    );
    assert_eq!(
        after(selected(), context_reply(7, "qemu:dirty-bitmap:round-1")),
        Breach::ContextIdTwice { id: 7 }
    );
}

#[test]
fn the_longest_reply_is_waited_for_and_a_longer_one_is_refused_at_its_head() {
    let reply = |length: u32| {
        let mut head = option_reply(11, UNSUPPORTED, &[]);
        head.splice(16.., length.to_be_bytes());
        fed("disk", vec![], &[greeting(), head]).2
    };
    assert_eq!(reply(4100), Ok(()));
    assert_eq!(
        reply(4101),
        Err(ConnectionError::Breach(Breach::OptionReplyTooLong {
            option: 11,
            bytes: 4101
        }))
    );
    assert!(reply(u32::MAX).is_err());
}

#[test]
fn an_export_needs_a_size_that_offsets_can_reach_and_block_sizes_that_make_sense() {
    let go = |infos: &[Vec<u8>]| {
        let said = [
            greeting(),
            option_reply(11, ACK, &[]),
            infos.concat(),
            option_reply(7, ACK, &[]),
        ];
        fed("disk", vec![], &said).2
    };
    let broken = |breach: Breach| Err(ConnectionError::Breach(breach));
    let largest = i64::MAX as u64;
    assert_eq!(go(&[export_info(largest, FLAGS)]), Ok(()));
    assert_eq!(
        go(&[export_info(largest + 1, FLAGS)]),
        broken(Breach::ExportTooLarge { bytes: largest + 1 })
    );
    assert_eq!(go(&[]), broken(Breach::NoExportInformation));
    assert_eq!(go(&[export_info(SIZE, 0)]), broken(Breach::NoExportInformation));
    assert!(matches!(
        go(&[option_reply(7, 3, &[0, 0, 1])]),
        Err(ConnectionError::Breach(Breach::MalformedOptionReply { .. }))
    ));
    let named = option_reply(7, 3, b"\0\x01disk");
    let most = vec![named.clone(); 15];
    assert_eq!(go(&[most.concat(), export_info(SIZE, FLAGS)]), Ok(()));
    let more = vec![named; 17];
    assert_eq!(go(&[more.concat()]), broken(Breach::TooManyOptionReplies { option: 7 }));
    for (sizes, is_sound) in [
        ([1, 4096, u32::MAX], true),
        ([512, 512, 512], true),
        ([65536, 65536, 1 << 20], true),
        ([131_072, 131_072, 1 << 20], false),
        ([0, 4096, 1 << 20], false),
        ([3, 4096, 1 << 20], false),
        ([512, 256, 1 << 20], false),
        ([512, 4096, 256], false),
        ([512, 4096, 4097], false),
    ] {
        let result = go(&[block_info(sizes), export_info(SIZE, FLAGS)]);
        assert_eq!(result.is_ok(), is_sound, "{sizes:?}: {result:?}");
    }
}

#[test]
fn names_that_cannot_be_said_are_refused_before_anything_is() {
    let long = "n".repeat(MAX_STRING);
    assert!(Connection::new(&long, vec![]).is_ok());
    assert!(matches!(
        Connection::new(&format!("{long}n"), vec![]),
        Err(RequestError::Name { .. })
    ));
    assert!(matches!(
        Connection::new("a\0b", vec![]),
        Err(RequestError::Name { .. })
    ));
    let many = |count: usize| {
        (0..count)
            .map(|number| MetaContext::DirtyBitmap(number.to_string()))
            .collect()
    };
    assert!(Connection::new("", many(MAX_CONTEXTS)).is_ok());
    assert!(matches!(
        Connection::new("", many(MAX_CONTEXTS + 1)),
        Err(RequestError::Contexts { .. })
    ));
    let twice = vec![MetaContext::Allocation, MetaContext::Allocation];
    assert!(matches!(Connection::new("", twice), Err(RequestError::Contexts { .. })));
}
