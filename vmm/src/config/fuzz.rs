//! The option parser's fuzz harness.

use super::{Builder, SECTIONS};

/// Feeds `input` to every way in, and checks what must hold for any text: no panic; what is
/// accepted is also accepted as JSON and means the same; every error is one line.
///
/// The first byte picks the way in, the rest is the text.
///
/// # Panics
/// When an invariant does not hold, as a fuzz harness must.
#[expect(
    clippy::panic,
    clippy::expect_used,
    reason = "a fuzz harness reports by panicking"
)]
pub fn options(input: &[u8]) {
    let Some((pick, text)) = input.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(text);
    let pick = usize::from(*pick) % (SECTIONS.len() + 1);
    let mut builder = match SECTIONS.get(pick) {
        None => match Builder::from_json("FILE", &text) {
            Ok(builder) => builder,
            Err(why) => return one_line(&why.to_string()),
        },
        Some(section) => {
            let mut builder = Builder::default();
            match builder.option(section.option, &text) {
                Ok(()) => builder,
                Err(why) => return one_line(&why.to_string()),
            }
        }
    };
    builder.option("kernel", "K").expect("a path is a path");
    let config = match builder.build() {
        Ok(config) => config,
        Err(why) => panic!("what the table accepts does not deserialize: {why}"),
    };
    let json = serde_json::to_string(&config).expect("a configuration is JSON");
    let again = Builder::from_json("FILE", &json).and_then(Builder::build);
    assert_eq!(again.as_ref(), Ok(&config), "{json}");
    if let Err(why) = config.validate() {
        one_line(&why.to_string());
    }
}

#[expect(clippy::panic, reason = "a fuzz harness reports by panicking")]
fn one_line(error: &str) {
    if error.contains('\n') {
        panic!("an error of more than one line: {error}");
    }
}
