//! The allocator, in one process and in several.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::pasid::{FILE_NAME, Holder, holders};

/// A directory of its own, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("nestling-pasids-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn open(&self, config: Config) -> Result<HostPasids, Error> {
        HostPasids::open(&self.0, config)
    }

    fn vm(&self, name: &str) -> HostPasids {
        self.open(Config::new(name, 20)).unwrap()
    }

    fn holder(&self, name: &str) -> Option<Holder> {
        let mut all = holders(&self.0).unwrap().into_iter();
        all.find(|holder| {
            holder
                .owner
                .as_ref()
                .is_some_and(|owner| owner.name == name)
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn config(min: u32, max: u32, quota: u32) -> Config {
    Config {
        min: Pasid(min),
        max: Pasid(max),
        quota,
        ..Config::new("vm", 20)
    }
}

/// Everything that can be allocated.
fn drain(vm: &HostPasids) -> Vec<u32> {
    std::iter::from_fn(|| vm.allocate().ok().map(|pasid| pasid.0)).collect()
}

#[test]
fn a_missing_directory_is_refused_with_its_name() {
    let error = HostPasids::open(Path::new("/no/such"), config(1, 9, 1)).unwrap_err();
    assert!(matches!(error, Error::NoDirectory(_)));
    assert!(error.to_string().contains("/no/such"), "{error}");
    assert_eq!(holders(Path::new("/no/such")).unwrap(), []);
}

#[test]
fn a_directory_that_may_not_be_written_is_refused() {
    let scratch = Scratch::new();
    std::fs::set_permissions(&scratch.0, PermissionsExt::from_mode(0o555)).unwrap();
    let result = scratch.open(config(1, 9, 1));
    std::fs::set_permissions(&scratch.0, PermissionsExt::from_mode(0o755)).unwrap();
    // Root may write everywhere but where nobody may.
    let error = match result {
        Ok(_) => HostPasids::open(Path::new("/sys"), config(1, 9, 1)).unwrap_err(),
        Err(error) => error,
    };
    assert!(matches!(error, Error::NoPermission { .. }), "{error}");
}

#[test]
fn what_is_not_a_pasid_file_is_refused_and_untouched() {
    let scratch = Scratch::new();
    let path = scratch.0.join(FILE_NAME);
    for contents in [&b"short"[..], &[7; 100], &[0; 100]] {
        std::fs::write(&path, contents).unwrap();
        let error = scratch.open(config(1, 9, 1)).unwrap_err();
        assert!(matches!(error, Error::NotOurs(_)), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), contents);
        assert!(matches!(holders(&scratch.0), Err(Error::NotOurs(_))));
    }
    std::fs::remove_file(&path).unwrap();
    std::fs::write(scratch.0.join("target"), b"").unwrap();
    std::os::unix::fs::symlink(scratch.0.join("target"), &path).unwrap();
    let error = scratch.open(config(1, 9, 1)).unwrap_err();
    assert!(
        matches!(error, Error::NotOurs(_)),
        "a link is not followed: {error}"
    );
}

#[test]
fn senseless_limits_are_refused() {
    let scratch = Scratch::new();
    for (min, max, quota) in [(0, 9, 1), (9, 8, 1), (1, 1 << 20, 1), (1, 9, 0)] {
        let error = scratch.open(config(min, max, quota)).unwrap_err();
        assert!(matches!(error, Error::Limits { .. }), "{error}");
    }
}

#[test]
fn pasids_stay_in_the_range_of_the_narrowest_device() {
    let scratch = Scratch::new();
    for (bits, most) in [(1, 1), (6, 63), (8, 255)] {
        let vm = scratch.open(Config::new("narrow", bits)).unwrap();
        let all: BTreeSet<_> = drain(&vm).into_iter().collect();
        assert_eq!(all, (1..=most).collect());
        assert!(matches!(vm.allocate(), Err(Error::Exhausted { .. })));
    }
    assert_eq!(Config::new("wide", 99).max, Pasid::MAX);
}

#[test]
fn the_quota_is_exact() {
    let scratch = Scratch::new();
    for quota in [1, 63, 64, 65, 200] {
        let vm = scratch.open(config(1, 0xf_ffff, quota)).unwrap();
        let all: BTreeSet<_> = drain(&vm).into_iter().collect();
        assert_eq!(all.len() as u32, quota);
        assert!(!all.contains(&0));
        assert!(matches!(vm.allocate(), Err(Error::Quota { .. })));
        let counts = vm.counts();
        assert_eq!((counts.owned, counts.in_use), (quota, quota));
        // What is given back can be had again.
        let some = *all.first().unwrap();
        vm.free(Pasid(some)).unwrap();
        assert_eq!(vm.allocate().unwrap(), Pasid(some));
    }
}

#[test]
fn a_vm_that_starts_can_allocate_once_or_is_refused() {
    let scratch = Scratch::new();
    let first = scratch.open(config(1, 64, 64)).unwrap();
    let second = scratch.open(config(1, 64, 64)).unwrap();
    assert!(matches!(
        scratch.open(config(1, 64, 64)),
        Err(Error::Exhausted { min: 1, max: 64 })
    ));
    assert!(first.allocate().is_ok() && second.allocate().is_ok());
    drop(first);
    assert!(scratch.open(config(1, 64, 64)).is_ok());
}

#[test]
fn only_what_was_allocated_is_freed_and_only_once() {
    let scratch = Scratch::new();
    let (a, b) = (scratch.vm("a"), scratch.vm("b"));
    let pasid = a.allocate().unwrap();
    for wrong in [0, pasid.0 + 1, 0xf_ffff, u32::MAX] {
        let error = a.free(Pasid(wrong)).unwrap_err();
        assert!(matches!(error, Error::NotOwned { pasid } if pasid == wrong));
    }
    assert!(b.free(pasid).is_err(), "another VM's");
    a.free(pasid).unwrap();
    assert!(a.free(pasid).is_err(), "twice");
}

#[test]
fn a_pasid_that_was_freed_is_not_the_next_one() {
    let scratch = Scratch::new();
    let vm = scratch.vm("vm");
    let first = vm.allocate().unwrap();
    vm.free(first).unwrap();
    assert_ne!(vm.allocate().unwrap(), first);
}

#[test]
fn vms_never_have_the_same() {
    let scratch = Scratch::new();
    let vms: Vec<_> = (0..4)
        .map(|_| scratch.open(config(1, 1000, 400)).unwrap())
        .collect();
    let mut seen = BTreeSet::new();
    let mut total = 0;
    for vm in &vms {
        let pasids = drain(vm);
        total += pasids.len();
        seen.extend(pasids);
    }
    assert_eq!(seen.len(), total);
    assert_eq!(seen, (1..=1000).collect(), "and together they have all");
}

#[test]
fn all_is_free_again_when_the_allocator_is_dropped() {
    let scratch = Scratch::new();
    for _ in 0..3 {
        let vm = scratch.open(config(1, 300, 300)).unwrap();
        assert_eq!(drain(&vm).len(), 300);
    }
    assert_eq!(holders(&scratch.0).unwrap(), []);
}

#[test]
fn a_guest_reset_frees_all_and_the_next_allocation_still_succeeds() {
    let scratch = Scratch::new();
    let vm = scratch.open(config(1, 1000, 500)).unwrap();
    drain(&vm);
    vm.free_all();
    let other = scratch.open(config(1, 1000, 1000)).unwrap();
    assert_eq!(drain(&other).len() as u32, 1000 - vm.counts().owned);
    assert_eq!(vm.counts().in_use, 0);
    assert!(vm.allocate().is_ok());
}

#[test]
fn freeing_scattered_pasids_gives_runs_back() {
    let scratch = Scratch::new();
    let vm = scratch.open(config(1, 0xf_ffff, 10_000)).unwrap();
    let mut all = drain(&vm);
    for pasid in all.drain(..) {
        vm.free(Pasid(pasid)).unwrap();
    }
    let counts = vm.counts();
    assert_eq!(counts.in_use, 0);
    assert!(counts.owned <= RUN, "{counts:?}");
}

#[test]
fn holders_says_who_has_what_and_how_much_is_used() {
    let scratch = Scratch::new();
    assert_eq!(holders(&scratch.0).unwrap(), []);
    let (a, _b) = (scratch.vm("a\x1b[31m"), scratch.vm("b"));
    let pasid = a.allocate().unwrap();
    let listed = scratch
        .holder("a?[31m")
        .expect("with control characters made harmless");
    assert_eq!(listed.owner.unwrap().pid, std::process::id());
    assert_eq!((listed.owned, listed.in_use), (a.counts().owned, 1));
    let [(first, last)] = listed.ranges[..] else {
        panic!("one range: {:?}", listed.ranges)
    };
    assert!((first..=last).contains(&pasid.0));
    assert_eq!(scratch.holder("b").unwrap().in_use, 0);
    a.free(pasid).unwrap();
    assert_eq!(scratch.holder("a?[31m").unwrap().in_use, 0);
}

#[test]
fn what_a_dead_vm_wrote_is_not_believed() {
    let scratch = Scratch::new();
    let dead = scratch.open(config(1, 64, 64)).unwrap();
    drain(&dead);
    drop(dead);
    // Takes the same seat, and of the dead one's PASIDs only a part.
    let vm = scratch.open(Config {
        owner: "new".into(),
        ..config(1, 64, 10)
    });
    let listed = scratch.holder("new").unwrap();
    assert_eq!((listed.owned, listed.in_use), (10, 0));
    assert_eq!(holders(&scratch.0).unwrap().len(), 1);
    drop(vm);
}

#[test]
fn a_lock_with_nothing_written_is_somebody_unknown() {
    let scratch = Scratch::new();
    let vm = scratch.vm("vm");
    let file = PasidFile::open(&scratch.0).unwrap();
    let free = (1..)
        .find(|pasid| vm.lock().covering(*pasid).is_none())
        .unwrap();
    assert!(file.try_lock(Range::new(free, free)).unwrap());
    let listed = holders(&scratch.0).unwrap();
    assert_eq!(listed[0].owner, None);
    assert_eq!(
        (&listed[0].ranges[..], listed[0].owned),
        (&[(free, free)][..], 1)
    );
}

#[test]
fn a_file_that_was_removed_or_replaced_is_noticed() {
    let scratch = Scratch::new();
    let vm = scratch.vm("vm");
    std::fs::remove_file(scratch.0.join(FILE_NAME)).unwrap();
    let errors: Vec<_> = std::iter::from_fn(|| vm.allocate().err().or(None))
        .take(1)
        .collect();
    assert_eq!(errors.len(), 0, "what is owned already can be used");
    let error = loop {
        match vm.allocate() {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Removed(_)), "{error}");
    let _other = scratch.vm("other");
    assert!(matches!(vm.allocate(), Err(Error::Removed(_))));
}

#[test]
fn a_file_full_of_vms_refuses_one_more() {
    let scratch = Scratch::new();
    let file = PasidFile::open(&scratch.0).unwrap();
    let seats = crate::pasid::file::SEATS;
    assert!(
        file.try_lock(Range::new(1 << 20, (1 << 20) + seats - 1))
            .unwrap()
    );
    let error = scratch.open(config(1, 9, 1)).unwrap_err();
    assert!(matches!(error, Error::NoSeat { .. }), "{error}");
}

#[test]
fn a_full_host_is_found_full_however_it_was_filled() {
    // Two others that have every second run each: the most locks that runs allow.
    let scratch = Scratch::new();
    let others = [(); 2].map(|()| PasidFile::open(&scratch.0).unwrap());
    for (number, first) in (0..1 << 16).step_by(RUN as usize).enumerate() {
        let run = Range::new(first, first + RUN - 1);
        assert!(others[number % 2].try_lock(run).unwrap());
    }
    let vm = || scratch.open(config(1, 0xffff, 64));
    assert!(matches!(vm(), Err(Error::Exhausted { .. })));
    // The very last place is found.
    others[1].unlock(Range::new(0xffff, 0xffff)).unwrap();
    let last = vm().unwrap();
    assert_eq!(last.allocate().unwrap(), Pasid(0xffff));
    drop(last);
    // One lock over all is passed in one step.
    drop(others);
    let other = PasidFile::open(&scratch.0).unwrap();
    assert!(other.try_lock(Range::new(0, 0xfffe)).unwrap());
    assert_eq!(vm().unwrap().allocate().unwrap(), Pasid(0xffff));
}

#[test]
fn a_short_search_goes_on_where_the_last_one_ended() {
    let scratch = Scratch::new();
    let others = [(); 2].map(|()| PasidFile::open(&scratch.0).unwrap());
    for pasid in 1..1000 {
        let one = Range::new(pasid, pasid);
        assert!(others[pasid as usize % 2].try_lock(one).unwrap());
    }
    let vm = scratch.open(config(1, 1000, 1)).unwrap();
    let mut runs = Runs {
        next: 1,
        ..Runs::default()
    };
    vm.file.unlock(Range::new(1000, 1000)).unwrap();
    let searches = (1..).find(|_| vm.find(&mut runs, 1, 100).is_ok());
    assert_eq!(searches, Some(10));
}

/// One allocator in a process of its own, told what to do over a pipe.
struct Vm {
    child: Child,
    say: ChildStdin,
    hear: BufReader<ChildStdout>,
}

impl Vm {
    fn start(scratch: &Scratch, name: &str, max: u32, quota: u32) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "pasid::host::tests::process",
                "--ignored",
                "--nocapture",
            ])
            .env(
                "PASID_TEST",
                format!("{name} {max} {quota} {}", scratch.0.display()),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let say = child.stdin.take().unwrap();
        let hear = BufReader::new(child.stdout.take().unwrap());
        let mut vm = Self { child, say, hear };
        vm.answer();
        vm
    }

    /// The next line that is ours, among those of the test harness.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(
                self.hear.read_line(&mut line).unwrap(),
                0,
                "the child ended"
            );
            if let Some((_, answer)) = line.split_once("> ") {
                return answer.trim().to_owned();
            }
        }
    }

    fn ask(&mut self, what: &str) -> Vec<u32> {
        writeln!(self.say, "{what}").unwrap();
        let answer = self.answer();
        answer
            .split_whitespace()
            .map(|n| n.parse().unwrap())
            .collect()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SIGKILL.
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[test]
#[ignore = "a process that other tests start"]
fn process() {
    let Ok(told) = std::env::var("PASID_TEST") else {
        return;
    };
    let told: Vec<_> = told.splitn(4, ' ').collect();
    let config = Config {
        owner: told[0].into(),
        ..config(1, told[1].parse().unwrap(), told[2].parse().unwrap())
    };
    let vm = HostPasids::open(Path::new(told[3]), config).unwrap();
    println!("> ready");
    for line in std::io::stdin().lines() {
        let pasids = match line.unwrap().as_str() {
            "drain" => drain(&vm),
            "churn" => churn(&vm),
            other => panic!("{other}"),
        };
        let text: Vec<_> = pasids.iter().map(u32::to_string).collect();
        println!("> {}", text.join(" "));
    }
}

/// Allocates and frees many times, and says what it has in the end.
fn churn(vm: &HostPasids) -> Vec<u32> {
    let mut have = BTreeSet::new();
    let mut random = std::process::id();
    for _ in 0..3000 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if random >> 31 == 0 {
            if let Ok(pasid) = vm.allocate() {
                assert!(have.insert(pasid.0));
            }
        } else if let Some(&pasid) = have.range(random >> 20..).next().or(have.first()) {
            have.remove(&pasid);
            vm.free(Pasid(pasid)).unwrap();
        }
    }
    have.into_iter().collect()
}

#[test]
fn a_killed_vm_leaves_nothing() {
    let scratch = Scratch::new();
    let mut victim = Vm::start(&scratch, "victim", 500, 500);
    assert_eq!(victim.ask("drain").len(), 500);
    let listed = scratch.holder("victim").unwrap();
    assert_eq!((listed.owned, listed.in_use), (500, 500));
    assert_eq!(listed.owner.unwrap().pid, victim.child.id());
    let refused = scratch.open(config(1, 500, 1)).unwrap_err();
    assert!(matches!(refused, Error::Exhausted { .. }), "{refused}");
    drop(victim);
    assert_eq!(scratch.holder("victim"), None);
    let vm = scratch.open(config(1, 500, 500)).unwrap();
    assert_eq!(drain(&vm).len(), 500);
}

#[test]
fn processes_that_race_have_disjoint_pasids() {
    let scratch = Scratch::new();
    let mut vms: Vec<_> = (0..4)
        .map(|n| Vm::start(&scratch, &format!("vm{n}"), 2000, 900))
        .collect();
    for vm in &mut vms {
        writeln!(vm.say, "churn").unwrap();
    }
    // A VM that is killed in the middle takes nothing with it and disturbs nobody.
    drop(vms.pop());
    let mut seen = BTreeSet::new();
    for (number, vm) in vms.iter_mut().enumerate() {
        let answer = vm.answer();
        let pasids: Vec<u32> = answer
            .split_whitespace()
            .map(|n| n.parse().unwrap())
            .collect();
        let listed = scratch.holder(&format!("vm{number}")).unwrap();
        assert_eq!(listed.in_use as usize, pasids.len());
        for pasid in pasids {
            assert!(listed.ranges.iter().any(|&(a, b)| (a..=b).contains(&pasid)));
            assert!(
                (1..=2000).contains(&pasid) && seen.insert(pasid),
                "{pasid} twice"
            );
        }
    }
    assert_eq!(scratch.holder("vm3"), None);
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(usize),
    Free(usize, usize),
    FreeAny(usize, u32),
    Restart(usize),
    Reset(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let vm = 0..3usize;
    prop_oneof![
        8 => vm.clone().prop_map(Step::Allocate),
        5 => (vm.clone(), any::<usize>()).prop_map(|(vm, which)| Step::Free(vm, which)),
        1 => (vm.clone(), 0..200u32).prop_map(|(vm, pasid)| Step::FreeAny(vm, pasid)),
        1 => vm.clone().prop_map(Step::Restart),
        1 => vm.prop_map(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn like_three_sets_that_never_meet(
        steps in prop::collection::vec(step(), 1..300), max in 150..200u32, quota in 1..90u32
    ) {
        let scratch = Scratch::new();
        let open = || scratch.open(config(1, max, quota)).ok();
        let mut vms: Vec<_> = (0..3).map(|_| (open(), BTreeSet::new())).collect();
        for step in steps {
            let others: BTreeSet<u32> = match step {
                Step::Allocate(vm) => (0..3).filter(|n| *n != vm).flat_map(|n| vms[n].1.clone()).collect(),
                _ => BTreeSet::new(),
            };
            match step {
                Step::Allocate(n) => {
                    let (Some(vm), have) = &mut vms[n] else { continue };
                    match vm.allocate() {
                        Ok(Pasid(pasid)) => {
                            prop_assert!((1..=max).contains(&pasid));
                            prop_assert!(!others.contains(&pasid));
                            prop_assert!(have.insert(pasid));
                        }
                        Err(Error::Quota { .. }) => prop_assert_eq!(have.len() as u32, quota),
                        Err(Error::Exhausted { .. }) => prop_assert!(!have.is_empty()),
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
                Step::Free(n, which) => {
                    let (Some(vm), have) = &mut vms[n] else { continue };
                    if have.is_empty() { continue }
                    let pasid = *have.iter().nth(which % have.len()).unwrap();
                    have.remove(&pasid);
                    prop_assert!(vm.free(Pasid(pasid)).is_ok());
                }
                Step::FreeAny(n, pasid) => {
                    let (Some(vm), have) = &mut vms[n] else { continue };
                    prop_assert_eq!(vm.free(Pasid(pasid)).is_ok(), have.remove(&pasid));
                }
                Step::Restart(n) => {
                    vms[n] = (None, BTreeSet::new());
                    vms[n].0 = open();
                }
                Step::Reset(n) => {
                    let (Some(vm), have) = &mut vms[n] else { continue };
                    vm.free_all();
                    have.clear();
                }
            }
            for (vm, have) in &vms {
                let Some(vm) = vm else { continue };
                let counts = vm.counts();
                prop_assert_eq!(counts.in_use as usize, have.len());
                prop_assert!(counts.owned <= quota && counts.in_use <= counts.owned);
                let runs = vm.lock();
                let idle = runs.all.values().filter(|run| run.used == 0).count();
                prop_assert!(idle <= 1, "{} idle runs", idle);
            }
        }
        let listed: u32 = holders(&scratch.0).unwrap().iter().map(|holder| holder.in_use).sum();
        let have: usize = vms.iter().map(|(_, have)| have.len()).sum();
        prop_assert_eq!(listed as usize, have);
    }
}
