//! Why a request was not done: one object, the same for every request.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

/// What a client gets when a request was not done.
#[derive(
    Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error, utoipa::ToSchema,
)]
#[error("{message}{}", .remedy.as_ref().map(|r| format!("; {r}")).unwrap_or_default())]
pub struct ApiError {
    /// What kind of error it is. Codes stay; sentences may change.
    pub code: Code,
    /// What is wrong: the thing and its value, in one sentence.
    pub message: String,
    /// The field of the request, or the object, that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub field: Option<String>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub remedy: Option<String>,
}

impl ApiError {
    /// An error with a sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            field: None,
            remedy: None,
        }
    }

    /// An error whose sentence has its remedy after a semicolon, as those of this project have.
    pub fn from_sentence(code: Code, sentence: &str) -> Self {
        match sentence.rsplit_once("; ") {
            Some((message, remedy)) => Self::new(code, message).remedy(remedy),
            None => Self::new(code, sentence),
        }
    }

    /// An error of the code `code` that says what `error` and its sources say.
    pub fn from_error(code: Code, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::from_sentence(code, &sentence(error))
    }

    /// Names the field or the object.
    #[must_use]
    pub fn field(mut self, field: impl Into<String>) -> Self {
        self.field = Some(field.into());
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }

    /// Nothing is done any more.
    pub fn ending() -> Self {
        Self::new(Code::Ending, "nestling is ending").remedy("start it again")
    }
}

/// An error and its sources as one line; a source that is told already is left out.
pub fn sentence(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text.replace('\n', " ")
}

macro_rules! codes {
    ($( $(#[doc = $doc:literal])* $name:ident = $status:literal $text:literal; )*) => {
        /// The kinds of errors, each with the HTTP status that goes with it.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
        pub enum Code {
            $( $(#[doc = $doc])* #[serde(rename = $text)] $name, )*
        }

        impl Code {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The HTTP status.
            pub const fn status(self) -> u16 {
                match self { $( Self::$name => $status, )* }
            }

            /// The word in JSON.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$name => $text, )* }
            }
        }
    };
}

codes! {
    /// The request is not HTTP as it should be, or its body is not JSON.
    BadRequest = 400 "bad-request";
    /// A key is unknown, is missing, or has a value of the wrong kind or out of range.
    InvalidConfig = 400 "invalid-config";
    /// There is no such path.
    NoSuchPath = 404 "no-such-path";
    /// No VM was created.
    VmNotCreated = 404 "vm-not-created";
    /// The VM has no such device.
    NoSuchDevice = 404 "no-such-device";
    /// The path is there and takes another verb.
    MethodNotAllowed = 405 "method-not-allowed";
    /// The client was too slow.
    RequestTimeout = 408 "request-timeout";
    /// A VM was created already.
    VmAlreadyCreated = 409 "vm-already-created";
    /// The VM is not in the state that this needs.
    WrongState = 409 "wrong-state";
    /// Another device or vIOMMU has this name.
    IdInUse = 409 "id-in-use";
    /// The device is in the VM, or another process has it.
    DeviceInUse = 409 "device-in-use";
    /// The device is being removed.
    RemovalPending = 409 "removal-pending";
    /// The device cannot be removed while the VM runs.
    NotRemovable = 409 "not-removable";
    /// The body is too large.
    BodyTooLarge = 413 "body-too-large";
    /// The host refused something: a file, a device, memory, KVM.
    HostRefused = 422 "host-refused";
    /// nestling's sandbox does not let it open what this needs.
    SandboxRefused = 422 "sandbox-refused";
    /// The device cannot do what the guest was promised at boot.
    CapabilityMismatch = 422 "capability-mismatch";
    /// Every slot for devices is taken.
    NoFreeSlot = 422 "no-free-slot";
    /// Too many requests are waiting.
    TooManyRequests = 429 "too-many-requests";
    /// Something that nobody should ever see: a bug of nestling.
    Internal = 500 "internal-error";
    /// Something else must come to an end first.
    Busy = 503 "busy";
    /// The guest did not let go of the device in time.
    GuestDidNotEject = 503 "guest-did-not-eject";
    /// nestling is ending.
    Ending = 503 "ending";
}

impl utoipa::PartialSchema for Code {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some("What kind of error it is."))
            .enum_values(Some(Self::ALL.iter().map(|code| code.as_str())))
            .into()
    }
}

impl utoipa::ToSchema for Code {}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_a_code_a_sentence_a_field_and_a_remedy() {
        let error = ApiError::from_sentence(
            Code::InvalidConfig,
            "disk path=x is not there; correct the path",
        )
        .field("path");
        let json = serde_json::to_value(&error).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "code": "invalid-config",
                "message": "disk path=x is not there",
                "field": "path",
                "remedy": "correct the path",
            })
        );
        assert_eq!(serde_json::from_value::<ApiError>(json).unwrap(), error);
        assert_eq!(
            error.to_string(),
            "disk path=x is not there; correct the path"
        );
    }

    #[test]
    fn every_code_has_a_word_of_its_own_and_an_error_status() {
        for code in Code::ALL {
            assert_eq!(
                serde_json::to_value(code).unwrap(),
                code.as_str(),
                "{code:?}"
            );
            assert!((400..600).contains(&code.status()), "{code:?}");
        }
    }
}
