//! From the bytes of a request to what it asks for.

use std::time::Duration;

use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::Value;
use vmm::config::{Builder, Group, Validated};
use vmm::control::{ApiError, Code};

use super::compat;

/// The largest body, in bytes.
pub(super) const MOST_BYTES: usize = 1 << 20;
/// How long a client may take to send it.
const LIMIT: Duration = Duration::from_secs(10);

/// An error on its way to a client.
#[derive(Debug)]
pub(super) struct Refused(pub(super) ApiError);

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let code = self.0.code;
        let status = StatusCode::from_u16(code.status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.0)).into_response();
        if matches!(code, Code::TooManyRequests | Code::Busy) {
            let after = header::HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, after);
        }
        response
    }
}

/// The JSON body of a request, whatever its type is said to be: curl says that it is a form.
pub(super) struct Document(Value);

impl<S: Sync> FromRequest<S> for Document {
    type Rejection = Refused;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Refused> {
        let body = Limited::new(request.into_body(), MOST_BYTES).collect();
        let bytes = match tokio::time::timeout(LIMIT, body).await {
            Err(_) => {
                return Err(Refused(
                    ApiError::new(
                        Code::RequestTimeout,
                        format!("the body was not there within {} s", LIMIT.as_secs()),
                    )
                    .remedy("send it at once"),
                ));
            }
            Ok(Err(why)) if why.is::<LengthLimitError>() => {
                return Err(Refused(
                    ApiError::new(
                        Code::BodyTooLarge,
                        format!("the body has more than {MOST_BYTES} bytes"),
                    )
                    .remedy("send a smaller one"),
                ));
            }
            Ok(Err(why)) => {
                return Err(Refused(ApiError::new(
                    Code::BadRequest,
                    format!("the body cannot be read: {why}"),
                )));
            }
            Ok(Ok(body)) => body.to_bytes(),
        };
        match serde_json::from_slice(&bytes) {
            Ok(value) => Ok(Self(value)),
            Err(why) => Err(Refused(
                ApiError::new(Code::BadRequest, format!("the body is not JSON ({why})"))
                    .remedy("send one JSON object"),
            )),
        }
    }
}

impl Document {
    /// The configuration of a VM.
    pub(super) fn vm(self) -> Result<Validated, ApiError> {
        let mut value = self.0;
        compat::vm(&mut value)?;
        let wrong = |error: vmm::config::SchemaError| {
            let field = error.field.clone();
            let error = ApiError::from_error(Code::InvalidConfig, &error);
            match field {
                Some(field) => error.field(field),
                None => error,
            }
        };
        let config = Builder::from_value("the body", value)
            .and_then(Builder::build)
            .map_err(wrong)?;
        config
            .validate()
            .map_err(|why| ApiError::from_error(Code::InvalidConfig, &why))
    }

    /// One group of a configuration, the one that `vm.create` has as `section`.
    pub(super) fn group<T: DeserializeOwned>(
        self,
        section: &str,
        group: &Group,
    ) -> Result<T, ApiError> {
        let mut value = self.0;
        compat::group(section, "", &mut value)?;
        group.check("body", &value).map_err(|error| {
            let field = error.field.as_deref().unwrap_or_default();
            let field = field.strip_prefix("body.").unwrap_or(field).to_owned();
            ApiError::from_error(Code::InvalidConfig, &error).field(field)
        })?;
        serde_json::from_value(value)
            .map_err(|why| ApiError::new(Code::InvalidConfig, format!("the body is wrong: {why}")))
    }

    /// Anything else.
    pub(super) fn read<T: DeserializeOwned>(self) -> Result<T, ApiError> {
        serde_json::from_value(self.0).map_err(|why| {
            ApiError::new(Code::InvalidConfig, format!("the body is wrong: {why}"))
                .remedy("/api/v1/openapi.json describes it")
        })
    }
}
