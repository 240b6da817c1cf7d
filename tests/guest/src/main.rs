//! See the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match guest::run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            if guest::is_no_verdict(&error) {
                ExitCode::from(agent::NO_VERDICT)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}
