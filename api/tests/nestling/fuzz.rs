//! The API under requests that schemathesis makes from the document: what it allows, and what it
//! forbids. Nothing may be a server error, and each answer must be one that the document promises.

use std::io;
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::document::DOCUMENT;
use super::support::{Served, has_kvm};

/// The Python that has schemathesis, as the lab installs it.
const PYTHON: &str = "NESTLING_SCHEMATHESIS";
/// So that two runs ask the same.
const SEED: &str = "20261120";
/// Requests of random content for each operation, beside those for each limit of the document.
const EXAMPLES: &str = "10";

/// How a VM comes to a state, and which operations are not asked for in it.
struct State {
    name: &'static str,
    requests: &'static [&'static str],
    /// Those that would take the VM out of the state; and where it has a guest, removals: this
    /// guest lets go of nothing, and waiting for it is no error of the server.
    left_out: &'static str,
    needs_kvm: bool,
}

const STATES: &[State] = &[
    State {
        name: "none",
        requests: &[],
        left_out: "",
        needs_kvm: false,
    },
    State {
        name: "created",
        requests: &["vm.create"],
        left_out: "|vm.boot|vm.delete",
        needs_kvm: false,
    },
    State {
        name: "running",
        requests: &["vm.create", "vm.boot"],
        left_out: "|vm.remove-device|vm.delete|vm.shutdown|vm.reboot|vm.pause",
        needs_kvm: true,
    },
    State {
        name: "paused",
        requests: &["vm.create", "vm.boot", "vm.pause"],
        left_out: "|vm.remove-device|vm.delete|vm.shutdown|vm.reboot|vm.resume",
        needs_kvm: true,
    },
];

#[test]
#[ignore = "needs schemathesis, which cargo lab test installs"]
fn whatever_is_asked_is_answered_as_the_document_says_in_every_state() {
    let python = std::env::var_os(PYTHON);
    let python = PathBuf::from(python.expect("NESTLING_SCHEMATHESIS names no Python"));
    let can_run = has_kvm();
    let states = STATES.iter().filter(|state| can_run || !state.needs_kvm);
    // They wait more than they work.
    std::thread::scope(|scope| {
        for state in states {
            scope.spawn(|| fuzz(state, &python));
        }
    });
}

fn fuzz(state: &State, python: &Path) {
    let nestling = Served::start(&format!("fuzz-{}", state.name));
    for request in state.requests {
        let body = match *request {
            "vm.create" => nestling.config(),
            _ => Value::Null,
        };
        assert_eq!(nestling.put(request, &body).0, 204, "{request}");
    }
    let before = nestling.get("vm.info").1["state"].clone();
    let port = bridge(nestling.socket());
    let document = nestling.scratch.file("openapi.json", DOCUMENT.as_bytes());
    // Events are told for ever, and after its shutdown nobody answers.
    let left_out = format!("vm.events|vmm.shutdown{}", state.left_out);
    let output = Command::new(python)
        .args(["-m", "schemathesis.cli", "run", &document])
        .args(["--url", &format!("http://127.0.0.1:{port}")])
        .args(["--exclude-path-regex", &left_out])
        .args(["--seed", SEED, "--max-examples", EXAMPLES])
        .args(["--phases", "examples,coverage,fuzzing"])
        // What the document cannot say (a path that is there) is refused, too.
        .args(["--checks", "all"])
        .args(["--exclude-checks", "positive_data_acceptance"])
        .args(["--suppress-health-check", "all", "--request-timeout", "300"])
        .args(["--warnings", "off", "--no-color"])
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env_remove("http_proxy")
        .env_remove("HTTP_PROXY")
        .current_dir(nestling.scratch.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "in the state {}:\n{text}{}",
        state.name,
        String::from_utf8_lossy(&output.stderr)
    );
    let cases = text.lines().find(|line| line.contains(" generated"));
    println!("{}: {}", state.name, cases.unwrap_or("no cases").trim());
    assert_eq!(nestling.get("vmm.ping").0, 200);
    if state.name != "none" {
        assert_eq!(nestling.get("vm.info").1["state"], before);
    }
}

/// A port of this machine that leads to the socket, until the test ends.
fn bridge(socket: PathBuf) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(server) = UnixStream::connect(&socket) else {
                return;
            };
            std::thread::spawn(move || {
                // Either end may close first; the other one learns it.
                let _ = connect(&client, &server);
            });
        }
    });
    port
}

fn connect(mut client: &TcpStream, mut server: &UnixStream) -> io::Result<()> {
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let there = std::thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let back = io::copy(&mut server, &mut client);
    client.shutdown(Shutdown::Both)?;
    let _ = there.join();
    back.map(drop)
}
