use proptest::prelude::*;

use super::*;

const A: Fingerprint = Fingerprint([0xa; 32]);
const B: Fingerprint = Fingerprint([0xb; 32]);
const C: Fingerprint = Fingerprint([0xc; 32]);
const VALID: Duration = Duration::from_secs(600);

fn code(secret: u8) -> InviteCode {
    InviteCode {
        site: "frankfurt".into(),
        address: "frankfurt.example.net".parse().unwrap(),
        fingerprint: A,
        secret: Secret([secret; 32]),
        expires_at: 0,
    }
}

fn binding(joiner: Fingerprint, connection: u8) -> Binding {
    Binding {
        exporter: [connection; 32],
        inviter: A,
        joiner,
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "any instant will do as the start of virtual time"
)]
fn start() -> Instant {
    Instant::now()
}

fn inviting(now: Instant) -> Invitations {
    let mut invitations = Invitations::default();
    invitations.add(now, code(1).secret, VALID).unwrap();
    invitations
}

fn request(code: &InviteCode, binding: Binding, site: &str) -> Vec<u8> {
    Joining::begin(code, binding, site, None).unwrap().1
}

#[test]
fn an_invited_gateway_and_its_host_trust_each_other() {
    let now = start();
    let (mut invitations, code, binding) = (inviting(now), code(1), binding(B, 1));
    let address = "tokyo.example.net:5000".parse().unwrap();
    let (joining, request) = Joining::begin(&code, binding, "tokyo", Some(&address)).unwrap();
    assert!(request.len() <= MAX_MESSAGE_BYTES);
    let joiner = invitations.verify(now, &request, &binding, "frankfurt").unwrap();
    assert_eq!((joiner.site.as_str(), &joiner.address), ("tokyo", &Some(address)));
    assert_eq!(joining.conclude(&joiner.accept()), Ok(()));
}

#[test]
fn a_wrong_secret_is_refused_and_five_of_them_void_the_invitation() {
    let now = start();
    let mut invitations = inviting(now);
    // The right id with a proof of another secret, as someone would send who saw an id.
    let mut forged: Vec<u8> = id_of(&code(1).secret).to_vec();
    forged.extend_from_slice(&request(&code(2), binding(B, 1), "tokyo")[16..]);
    for _ in 0..MAX_FAILED_TRIES {
        assert_eq!(
            invitations.verify(now, &forged, &binding(B, 1), "frankfurt"),
            Err(Reason::WrongProof)
        );
    }
    let honest = request(&code(1), binding(B, 1), "tokyo");
    assert_eq!(
        invitations.verify(now, &honest, &binding(B, 1), "frankfurt"),
        Err(Reason::NotInvited)
    );
}

#[test]
fn one_failed_try_less_leaves_the_invitation_open() {
    let now = start();
    let mut invitations = inviting(now);
    let mut forged = request(&code(1), binding(B, 1), "tokyo");
    *forged.last_mut().unwrap() ^= 1;
    for _ in 1..MAX_FAILED_TRIES {
        assert_eq!(
            invitations.verify(now, &forged, &binding(B, 1), "frankfurt"),
            Err(Reason::WrongProof)
        );
    }
    let honest = request(&code(1), binding(B, 1), "tokyo");
    assert!(invitations.verify(now, &honest, &binding(B, 1), "frankfurt").is_ok());
}

#[test]
fn a_gateway_that_is_unpaired_does_not_come_back_by_the_code_it_has_used() {
    let now = start();
    let mut invitations = inviting(now);
    invitations.add(now, code(2).secret, VALID).unwrap();
    let used = request(&code(1), binding(B, 1), "tokyo");
    assert!(invitations.verify(now, &used, &binding(B, 1), "frankfurt").is_ok());
    invitations.withdraw(&B);
    assert_eq!(
        invitations.verify(now, &used, &binding(B, 1), "frankfurt"),
        Err(Reason::NotInvited)
    );
    // What nobody has used is nobody's.
    let other = request(&code(2), binding(C, 1), "oslo");
    assert!(invitations.verify(now, &other, &binding(C, 1), "frankfurt").is_ok());
}

#[test]
fn an_unknown_invitation_is_refused() {
    let now = start();
    let request = request(&code(2), binding(B, 1), "tokyo");
    assert_eq!(
        inviting(now).verify(now, &request, &binding(B, 1), "frankfurt"),
        Err(Reason::NotInvited)
    );
}

#[test]
fn an_invitation_is_good_until_it_expires_and_not_a_moment_longer() {
    let now = start();
    let request = request(&code(1), binding(B, 1), "tokyo");
    let last = now + VALID - Duration::from_nanos(1);
    assert!(
        inviting(now)
            .verify(last, &request, &binding(B, 1), "frankfurt")
            .is_ok()
    );
    let mut invitations = inviting(now);
    assert_eq!(invitations.open_until(last), Some(now + VALID));
    assert_eq!(
        invitations.verify(now + VALID, &request, &binding(B, 1), "frankfurt"),
        Err(Reason::NotInvited)
    );
    assert_eq!(invitations.open_until(now + VALID), None);
}

#[test]
fn a_used_invitation_is_refused_to_others_but_not_to_whom_missed_the_answer() {
    let now = start();
    let mut invitations = inviting(now);
    for connection in [1, 2] {
        let request = request(&code(1), binding(B, connection), "tokyo");
        assert!(
            invitations
                .verify(now, &request, &binding(B, connection), "frankfurt")
                .is_ok()
        );
    }
    let other = request(&code(1), binding(C, 3), "osaka");
    assert_eq!(
        invitations.verify(now, &other, &binding(C, 3), "frankfurt"),
        Err(Reason::Used)
    );
}

#[test]
fn a_request_is_good_on_its_own_connection_between_its_own_keys_under_its_own_name_only() {
    let now = start();
    let bytes = request(&code(1), binding(B, 1), "tokyo");
    for elsewhere in [
        binding(B, 2),
        binding(C, 1),
        Binding {
            inviter: C,
            ..binding(B, 1)
        },
    ] {
        let verdict = inviting(now).verify(now, &bytes, &elsewhere, "frankfurt");
        assert_eq!(verdict, Err(Reason::WrongProof), "{elsewhere:?}");
    }
    assert_eq!(
        inviting(now).verify(now, &bytes, &binding(B, 1), "berlin"),
        Err(Reason::WrongProof)
    );
    let place = bytes.windows(5).position(|window| window == b"tokyo").unwrap();
    let mut renamed = bytes;
    renamed[place..place + 5].copy_from_slice(b"osaka");
    assert_eq!(
        inviting(now).verify(now, &renamed, &binding(B, 1), "frankfurt"),
        Err(Reason::WrongProof)
    );
}

#[test]
fn a_gateway_with_another_key_than_the_code_names_gets_nothing() {
    let impostor = Binding {
        inviter: C,
        ..binding(B, 1)
    };
    let error = Joining::begin(&code(1), impostor, "tokyo", None).unwrap_err();
    assert_eq!(error, JoinError::WrongKey { found: C, expected: A });
}

#[test]
fn an_answer_that_echoes_the_joiners_own_proof_is_not_believed() {
    let (code, binding) = (code(1), binding(B, 1));
    let (joining, bytes) = Joining::begin(&code, binding, "tokyo", None).unwrap();
    let sent: Request<'_> = exactly(&bytes).unwrap();
    assert_eq!(
        joining.conclude(&encode(&Answer::Accepted(sent.proof))),
        Err(JoinError::WrongProof)
    );
}

#[test]
fn a_refusal_is_told_with_its_reason() {
    let (code, binding) = (code(1), binding(B, 1));
    let (joining, _) = Joining::begin(&code, binding, "tokyo", None).unwrap();
    let error = joining.conclude(&refuse(Reason::Used)).unwrap_err();
    assert_eq!(
        error,
        JoinError::Refused {
            site: "frankfurt".into(),
            reason: Reason::Used
        }
    );
}

#[test]
fn a_site_does_not_pair_with_itself() {
    let now = start();
    let own_name = request(&code(1), binding(B, 1), "frankfurt");
    assert_eq!(
        inviting(now).verify(now, &own_name, &binding(B, 1), "frankfurt"),
        Err(Reason::SameSite)
    );
    let own_key = request(&code(1), binding(A, 1), "tokyo");
    assert_eq!(
        inviting(now).verify(now, &own_key, &binding(A, 1), "frankfurt"),
        Err(Reason::SameSite)
    );
}

#[test]
fn invitations_are_bounded_and_make_room_when_they_expire() {
    let now = start();
    let mut invitations = Invitations::default();
    for number in 0..MAX_INVITATIONS {
        invitations.add(now, Secret([number as u8; 32]), VALID).unwrap();
    }
    assert_eq!(invitations.add(now, Secret([99; 32]), VALID), Err(TooManyInvitations));
    assert_eq!(invitations.add(now + VALID, Secret([99; 32]), VALID), Ok(()));
}

#[test]
fn the_bytes_of_a_request_stay_as_they_are() {
    let bytes = request(&code(1), binding(B, 1), "tokyo");
    assert_eq!(
        crate::proto::page::hex(&bytes),
        concat!(
            "f4b6269fb9cce50bfb33dfef41b683fd",
            "05746f6b796f",
            "00",
            "c147b1e4a98b332a727546f70e099412b1669c46b0cbef00e88153152fd7b1fb"
        )
    );
}

proptest! {
    #[test]
    fn garbage_is_refused_on_both_sides_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), cut in 0_usize..400) {
        let now = start();
        let binding = binding(B, 1);
        prop_assert!(inviting(now).verify(now, &bytes, &binding, "frankfurt").is_err());
        let honest = request(&code(1), binding, "tokyo");
        if cut < honest.len() {
            prop_assert_eq!(inviting(now).verify(now, &honest[..cut], &binding, "frankfurt"), Err(Reason::Malformed));
        }
        let code = code(1);
        let (joining, _) = Joining::begin(&code, binding, "tokyo", None).unwrap();
        prop_assert!(joining.conclude(&bytes).is_err());
    }
}
