//! The agreement of two page stores, model-checked: whatever crashes, is thrown out, damaged or restored, both ends of a session begin with the
//! same pages, and a session is never refused a page that it was promised unless the disk under it fails.
//!
//! The model has the decisions of `src/gateway/keeping.rs` and `src/store/pages/mod.rs` that this rests on, and none of their code: images by name and
//! digest, which of them were read whole since the gateway's start, which are held open. One VM moves to and fro between two sites. Left out: clocks
//! that go back, room and who makes it (any image may be thrown out at any time), seeds and tenants, and what only looks again at a suspect.

use std::collections::{BTreeMap, BTreeSet};

use stateright::{Checker, HasDiscoveries, Model, Property};

/// A file with what it holds, named or not: whoever has it open keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct File {
    /// Which migration's pages they are: equal where, and only where, the pages are.
    pages: u8,
    damage: Damage,
}

/// Of one page: the index is whole, and does not show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Damage {
    None,
    /// The process that uses it has read all of it, and it was whole then.
    SinceRead,
    /// It was there before, or nobody has looked.
    Unnoticed,
}

/// Number of a file.
type Open = usize;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Site {
    is_up: bool,
    /// By the migration's id, as images are named.
    images: BTreeMap<u8, Open>,
    /// Seen whole by this process.
    whole: BTreeSet<u8>,
    end: Option<End>,
    /// Id and pages of what a session has left, until they are written.
    to_keep: Option<(u8, u8)>,
}

/// A site's end of the attempt that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum End {
    /// Held open until the answer comes.
    Offering(Vec<(u8, Open)>),
    /// What the session begins with.
    Begun(Option<(u8, Open)>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    files: Vec<File>,
    sites: [Site; 2],
    /// Where the VM runs.
    home: usize,
    /// Id and pages of the attempt under way.
    attempt: Option<(u8, u8)>,
    attempts: u8,
    /// Ids and digests of the images offered, while the offer is on the way. Messages belong to the attempt's connection and go with it.
    offer: Option<Vec<(u8, u8)>>,
    /// Id of the image accepted, while the answer is on the way.
    answer: Option<Option<u8>>,
    faults_left: u8,
    /// A copy of the first site's images.
    backup: Option<BTreeMap<u8, Open>>,
    both_kept_once: bool,
    was_promised_unread: bool,
    was_missed: bool,
    was_wrong: bool,
    began_with_older: bool,
}

/// A decision of the store taken wrongly on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    None,
    DestinationGoesByTheNameAlone,
    DestinationOpensImagesAgainByName,
    ImagesAreOfferedUnread,
    SourceDoesNotWaitForTheAnswer,
    OnlyTheNewestIsKept,
    PagesAreNotAuthenticated,
}

struct Stores {
    mutation: Mutation,
    attempts: u8,
    faults: u8,
    /// Whether images may be thrown out, damaged, restored and ids used twice.
    unruly: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// With a new id, or with one that was used before.
    Begin {
        id: u8,
    },
    HearOffer,
    HearAnswer,
    /// A page of the image is referred to.
    Refer,
    /// The VM runs at the destination.
    Finish,
    Keep(usize),
    /// The background write fails.
    KeepFails(usize),
    /// One end gives up: cut, cancel, refusal.
    GiveUp,
    ThrowOut(usize, u8),
    Damage(Open),
    Crash(usize),
    Start(usize),
    /// One more image is read whole, or removed.
    Scrub(usize, u8),
    BackUp,
    Restore,
}

impl World {
    fn source(&self) -> usize {
        self.home
    }

    fn destination(&self) -> usize {
        1 - self.home
    }

    /// Whether one of these was damaged before the process that has it read it.
    fn has_unnoticed_damage<'a>(&self, mut images: impl Iterator<Item = &'a (u8, Open)>) -> bool {
        images.any(|(_, open)| self.files[*open].damage == Damage::Unnoticed)
    }

    /// The attempt ends at both sites; what they hold open is closed.
    fn give_up(&mut self) {
        for site in &mut self.sites {
            site.end = None;
        }
        self.attempt = None;
        self.offer = None;
        self.answer = None;
    }

    /// Files that nobody can reach are forgotten, and numbers given anew: equal worlds look equal.
    fn tidy(&mut self) {
        let mut numbers: Vec<Option<Open>> = vec![None; self.files.len()];
        let mut files = Vec::new();
        let old = std::mem::take(&mut self.files);
        let mut renumber = |open: &mut Open| {
            *open = *numbers[*open].get_or_insert_with(|| {
                files.push(old[*open]);
                files.len() - 1
            });
        };
        for site in &mut self.sites {
            site.images.values_mut().for_each(&mut renumber);
            match &mut site.end {
                Some(End::Offering(images)) => images.iter_mut().for_each(|(_, open)| renumber(open)),
                Some(End::Begun(Some((_, open)))) => renumber(open),
                _ => {}
            }
        }
        if let Some(backup) = &mut self.backup {
            backup.values_mut().for_each(&mut renumber);
        }
        self.files = files;
    }
}

impl Stores {
    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == mutation
    }

    fn is_offered(&self, site: &Site, id: u8) -> bool {
        site.whole.contains(&id) || self.is(Mutation::ImagesAreOfferedUnread)
    }

    /// Newest first, as `PageStore::candidates`.
    fn candidates(&self, world: &World) -> Vec<(u8, Open)> {
        let site = &world.sites[world.source()];
        let images = site.images.iter().map(|(id, open)| (*id, *open));
        let mut images: Vec<(u8, Open)> = images.filter(|(id, _)| self.is_offered(site, *id)).collect();
        images.sort_by_key(|(_, open)| std::cmp::Reverse(world.files[*open].pages));
        images
    }

    /// The peer's images that are here too and equal, as `keeping::find`.
    fn find(&self, world: &World, offered: &[(u8, u8)]) -> Option<(u8, Open)> {
        let site = &world.sites[world.destination()];
        offered.iter().find_map(|(id, pages)| {
            let open = *site.images.get(id)?;
            let is_equal = world.files[open].pages == *pages || self.is(Mutation::DestinationGoesByTheNameAlone);
            (is_equal && self.is_offered(site, *id)).then_some((*id, open))
        })
    }

    /// What a read of a page comes to: the pages that it is of, or that it is damaged.
    fn read(&self, file: &File) -> Option<u8> {
        match file.damage {
            Damage::None => Some(file.pages),
            _ if self.is(Mutation::PagesAreNotAuthenticated) => Some(u8::MAX),
            _ => None,
        }
    }

    fn keep(&self, world: &mut World, at: usize) {
        let Some((id, pages)) = world.sites[at].to_keep.take() else {
            return;
        };
        world.files.push(File {
            pages,
            damage: Damage::None,
        });
        let open = world.files.len() - 1;
        let site = &mut world.sites[at];
        // A name that is taken is a peer's doing.
        if site.images.contains_key(&id) {
            return;
        }
        site.images.insert(id, open);
        site.whole.insert(id);
        let keeps = if self.is(Mutation::OnlyTheNewestIsKept) { 1 } else { 2 };
        while site.images.len() > keeps {
            let oldest = site.images.iter().min_by_key(|(_, open)| world.files[**open].pages);
            let oldest = *oldest.expect("there are some").0;
            site.images.remove(&oldest);
            site.whole.remove(&oldest);
        }
    }

    fn refer(&self, world: &mut World) {
        let begun = |site: &Site| match &site.end {
            Some(End::Begun(image)) => *image,
            _ => None,
        };
        let source = begun(&world.sites[world.source()]);
        let destination = begun(&world.sites[world.destination()]);
        let Some((_, open)) = source else { return };
        // What the source cannot read it sends as if it were new.
        let Some(meant) = self.read(&world.files[open]) else {
            return;
        };
        let held = match destination {
            Some((id, _)) if self.is(Mutation::DestinationOpensImagesAgainByName) => {
                world.sites[world.destination()].images.get(&id).copied()
            }
            other => other.map(|(_, open)| open),
        };
        match held.map(|open| self.read(&world.files[open])) {
            Some(Some(given)) => world.was_wrong |= given != meant,
            // The disk failed: the migration fails, the VM stays.
            Some(None) => world.give_up(),
            None => world.was_missed = true,
        }
    }

    fn next(&self, world: &mut World, action: Action) {
        match action {
            Action::Begin { id } => {
                world.attempts += 1;
                world.attempt = Some((id, world.attempts));
                let offered = self.candidates(world);
                world.offer = Some(
                    offered
                        .iter()
                        .map(|(id, open)| (*id, world.files[*open].pages))
                        .collect(),
                );
                let best = offered.first().copied();
                let end = match self.is(Mutation::SourceDoesNotWaitForTheAnswer) {
                    true => End::Begun(best),
                    false => End::Offering(offered),
                };
                if let End::Offering(offered) = &end {
                    world.was_promised_unread |= world.has_unnoticed_damage(offered.iter());
                }
                let source = world.source();
                world.sites[source].end = Some(end);
            }
            Action::HearOffer => {
                let offered = world.offer.take().unwrap_or_default();
                let found = self.find(world, &offered);
                let at = world.destination();
                world.was_promised_unread |= world.has_unnoticed_damage(found.iter());
                world.began_with_older |=
                    found.is_some_and(|(id, _)| offered.first().is_some_and(|first| first.0 != id));
                world.sites[at].end = Some(End::Begun(found));
                world.answer = Some(found.map(|(id, _)| id));
            }
            Action::HearAnswer => {
                let image = world.answer.take().expect("an answer is on the way");
                let at = world.source();
                if let Some(End::Offering(offered)) = &world.sites[at].end {
                    let image = image.and_then(|id| offered.iter().find(|(offered, _)| *offered == id).copied());
                    world.sites[at].end = Some(End::Begun(image));
                }
            }
            Action::Refer => self.refer(world),
            Action::Finish => {
                let left = world.attempt;
                world.give_up();
                for site in &mut world.sites {
                    site.to_keep = left;
                }
                world.home = 1 - world.home;
            }
            Action::Keep(at) => {
                self.keep(world, at);
                let common = world.sites[0]
                    .images
                    .keys()
                    .any(|id| world.sites[1].images.contains_key(id));
                world.both_kept_once |= common;
            }
            Action::KeepFails(at) => {
                world.faults_left -= 1;
                world.sites[at].to_keep = None;
            }
            Action::GiveUp => world.give_up(),
            Action::ThrowOut(at, id) => {
                world.sites[at].images.remove(&id);
                world.sites[at].whole.remove(&id);
            }
            Action::Damage(open) => {
                world.faults_left -= 1;
                let reads = |site: &Site| {
                    let mut whole = site.whole.iter().filter_map(|id| site.images.get(id));
                    let is_held = match &site.end {
                        Some(End::Offering(images)) => images.iter().any(|(_, held)| *held == open),
                        Some(End::Begun(image)) => image.is_some_and(|(_, held)| held == open),
                        None => false,
                    };
                    is_held || whole.any(|whole| *whole == open)
                };
                world.files[open].damage = match world.sites.iter().any(reads) {
                    true => Damage::SinceRead,
                    false => Damage::Unnoticed,
                };
            }
            Action::Crash(at) => {
                world.faults_left -= 1;
                if world.attempt.is_some() {
                    world.give_up();
                }
                let site = &mut world.sites[at];
                site.is_up = false;
                site.to_keep = None;
                site.whole.clear();
                for open in site.images.values() {
                    let damage = &mut world.files[*open].damage;
                    if *damage == Damage::SinceRead {
                        *damage = Damage::Unnoticed;
                    }
                }
            }
            Action::Start(at) => world.sites[at].is_up = true,
            Action::Scrub(at, id) => {
                let open = world.sites[at].images[&id];
                if world.files[open].damage != Damage::None {
                    world.sites[at].images.remove(&id);
                } else {
                    world.sites[at].whole.insert(id);
                }
            }
            Action::BackUp => {
                let mut copy = world.sites[0].images.clone();
                for open in copy.values_mut() {
                    let damage = match world.files[*open].damage {
                        Damage::None => Damage::None,
                        _ => Damage::Unnoticed,
                    };
                    let pages = world.files[*open].pages;
                    world.files.push(File { pages, damage });
                    *open = world.files.len() - 1;
                }
                world.backup = Some(copy);
            }
            Action::Restore => {
                world.faults_left -= 1;
                world.sites[0].images = world.backup.take().expect("there is one");
                world.sites[0].whole.clear();
            }
        }
        world.tidy();
    }
}

impl Model for Stores {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let site = Site {
            is_up: true,
            ..Site::default()
        };
        vec![World {
            files: Vec::new(),
            sites: [site.clone(), site],
            home: 0,
            attempt: None,
            attempts: 0,
            offer: None,
            answer: None,
            faults_left: self.faults,
            backup: None,
            both_kept_once: false,
            was_promised_unread: false,
            was_missed: false,
            was_wrong: false,
            began_with_older: false,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let both_up = world.sites.iter().all(|site| site.is_up);
        let source = &world.sites[world.source()];
        let destination = &world.sites[world.destination()];
        match world.attempt {
            None if both_up && world.attempts < self.attempts => {
                actions.push(Action::Begin { id: world.attempts });
                if self.unruly && world.attempts > 0 {
                    actions.push(Action::Begin { id: 0 });
                }
            }
            Some(_) => {
                if world.offer.is_some() {
                    actions.push(Action::HearOffer);
                }
                if world.answer.is_some() {
                    actions.push(Action::HearAnswer);
                }
                let begun = |site: &Site| matches!(site.end, Some(End::Begun(_)));
                if begun(source) && begun(destination) {
                    actions.push(Action::Refer);
                    // Assumed: nobody lags behind by more than one. The code does not see to it: a session then begins with nothing.
                    if world.answer.is_none() && world.sites.iter().all(|site| site.to_keep.is_none()) {
                        actions.push(Action::Finish);
                    }
                }
                actions.push(Action::GiveUp);
            }
            None => {}
        }
        for (at, site) in world.sites.iter().enumerate() {
            if !site.is_up {
                actions.push(Action::Start(at));
                continue;
            }
            if site.to_keep.is_some() {
                actions.push(Action::Keep(at));
                if world.faults_left > 0 {
                    actions.push(Action::KeepFails(at));
                }
            }
            for id in site.images.keys() {
                if !site.whole.contains(id) {
                    actions.push(Action::Scrub(at, *id));
                }
                if self.unruly {
                    actions.push(Action::ThrowOut(at, *id));
                }
            }
            if world.faults_left > 0 {
                actions.push(Action::Crash(at));
            }
        }
        if self.unruly && world.faults_left > 0 {
            let files = world.files.iter().enumerate();
            let undamaged = files.filter(|(_, file)| file.damage == Damage::None);
            actions.extend(undamaged.map(|(open, _)| Action::Damage(open)));
            if !world.sites[0].is_up && world.backup.is_some() {
                actions.push(Action::Restore);
            }
        }
        if self.unruly && world.backup.is_none() && !world.sites[0].images.is_empty() {
            actions.push(Action::BackUp);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        self.next(&mut next, action);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(SAME_PAGES, |_, world: &World| {
                let begun = |site: &Site| match &site.end {
                    Some(End::Begun(image)) => Some(image.map(|(_, open)| world.files[open].pages)),
                    _ => None,
                };
                match (begun(&world.sites[0]), begun(&world.sites[1])) {
                    (Some(one), Some(other)) => one == other,
                    _ => true,
                }
            }),
            Property::always(NEVER_WRONG, |_, world: &World| !world.was_wrong),
            Property::always(NEVER_MISSED, |_, world: &World| !world.was_missed),
            Property::always(READ_FIRST, |_, world: &World| !world.was_promised_unread),
            Property::always(IN_COMMON, |model: &Self, world: &World| {
                let [one, other] = &world.sites;
                model.unruly || !world.both_kept_once || one.images.keys().any(|id| other.images.contains_key(id))
            }),
            Property::sometimes(OLDER, |_, world: &World| world.began_with_older),
        ]
    }
}

const SAME_PAGES: &str = "both ends of a session begin with the same pages";
const NEVER_WRONG: &str = "no page is taken for another";
const NEVER_MISSED: &str = "no page that was promised is missing";
const READ_FIRST: &str = "an image is promised only by a process that has found it whole";
const IN_COMMON: &str = "what the sites have in common is not given up while one of them lags behind";
const OLDER: &str = "a session begins with the image before the newest";

/// What is violated, of all states or of those up to the first that violates what is sought.
#[track_caller]
fn explore(model: Stores, sought: Option<&'static str>) -> Vec<&'static str> {
    let (mutation, unruly) = (model.mutation, model.unruly);
    let wanted = match sought {
        None => HasDiscoveries::AllFailures,
        Some(property) => HasDiscoveries::AnyOf([property].into()),
    };
    let checker = model.checker().threads(2).finish_when(wanted).spawn_bfs().join();
    println!(
        "{mutation:?}, {}: {} states",
        if unruly {
            "anything goes wrong"
        } else {
            "nothing goes wrong"
        },
        checker.unique_state_count()
    );
    let mut violated: Vec<&'static str> = checker
        .discoveries()
        .into_keys()
        .filter(|&name| name != OLDER)
        .collect();
    if mutation == Mutation::None {
        assert!(checker.discovery(OLDER).is_some());
        for name in &violated {
            println!(
                "{name}: {:?}",
                checker.discovery(name).map(stateright::Path::into_actions)
            );
        }
    }
    violated.sort_unstable();
    violated
}

fn stores(mutation: Mutation, unruly: bool) -> Stores {
    Stores {
        mutation,
        attempts: if unruly { 3 } else { 6 },
        faults: if unruly { 2 } else { 0 },
        unruly,
    }
}

#[test]
fn two_stores_agree_whatever_crashes_is_thrown_out_damaged_or_restored() {
    assert_eq!(explore(stores(Mutation::None, true), None), Vec::<&str>::new());
}

#[test]
fn sites_keep_an_image_in_common_while_one_of_them_is_still_writing() {
    assert_eq!(explore(stores(Mutation::None, false), None), Vec::<&str>::new());
}

#[test]
fn a_store_that_decides_wrongly_is_caught() {
    let caught = [
        (Mutation::DestinationGoesByTheNameAlone, true, SAME_PAGES),
        (Mutation::DestinationOpensImagesAgainByName, true, NEVER_MISSED),
        (Mutation::ImagesAreOfferedUnread, true, READ_FIRST),
        (Mutation::SourceDoesNotWaitForTheAnswer, true, SAME_PAGES),
        (Mutation::PagesAreNotAuthenticated, true, NEVER_WRONG),
        (Mutation::OnlyTheNewestIsKept, false, IN_COMMON),
    ];
    for (mutation, unruly, property) in caught {
        let violated = explore(stores(mutation, unruly), Some(property));
        assert!(violated.contains(&property), "{mutation:?}: {violated:?}");
    }
}
