//! What each path does. The comments are the document's descriptions.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use axum::Extension;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response, Sse, sse};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::{IntoResponses, OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use viommu::Rid;
use vmm::config::{DeviceConfig, DiskConfig, NetConfig, TestDeviceConfig, VmConfig};
use vmm::control::{
    ApiError, Code, Counters, Done, Given, Inspect, NewDevice, PciDeviceInfo, Record, Removal,
    Reply, Request, VmInfo,
};
use vmm::doctor::{Report, Roots};
use vmm::vm::ViommuStates;

use super::body::{Document, Refused};
use super::{Api, document, filter, follow};
use crate::descriptors::Received;

/// How long the guest has to let go of a device when the client does not say.
const EJECT: Duration = Duration::from_secs(10);
/// The longest time that a client can give it.
const LONGEST_EJECT: Duration = Duration::from_secs(600);

type Shared = State<Arc<Api>>;
type Answer<T> = Result<T, Refused>;

/// Every path, and the document that describes them.
pub(super) fn router() -> (axum::Router<Arc<Api>>, utoipa::openapi::OpenApi) {
    let paths = OpenApiRouter::new()
        .routes(routes!(ping))
        .routes(routes!(vmm_shutdown))
        .routes(routes!(create))
        .routes(routes!(boot))
        .routes(routes!(shutdown))
        .routes(routes!(delete))
        .routes(routes!(reboot))
        .routes(routes!(power_button))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(info))
        .routes(routes!(counters))
        .routes(routes!(viommu))
        .routes(routes!(events))
        .routes(routes!(add_disk))
        .routes(routes!(add_net))
        .routes(routes!(add_device))
        .routes(routes!(add_test_device))
        .routes(routes!(remove_device))
        .routes(routes!(host_info))
        .routes(routes!(openapi));
    let (router, document) = OpenApiRouter::with_openapi(document::Document::openapi())
        .nest("/api/v1", paths)
        .split_for_parts();
    let router = router
        .fallback(no_such_path)
        .method_not_allowed_fallback(method_not_allowed);
    (router, document)
}

async fn no_such_path(uri: axum::http::Uri) -> Refused {
    ApiError::new(Code::NoSuchPath, format!("there is no {}", uri.path()))
        .remedy("/api/v1/openapi.json lists the paths")
        .into()
}

async fn method_not_allowed(method: axum::http::Method, uri: axum::http::Uri) -> Refused {
    ApiError::new(
        Code::MethodNotAllowed,
        format!("{} does not take {method}", uri.path()),
    )
    .remedy("/api/v1/openapi.json lists the verbs")
    .into()
}

impl Api {
    /// Has `request` done by the thread that owns the VM.
    async fn ask(&self, request: Request) -> Result<Done, ApiError> {
        let (sender, answer) = oneshot::channel();
        let reply = Reply::new(move |result| {
            // A client that is gone does not learn it.
            let _ = sender.send(result);
        });
        self.controller.send(request, reply)?;
        answer.await.unwrap_or_else(|_| Err(ApiError::ending()))
    }

    async fn do_it(&self, request: Request) -> Answer<StatusCode> {
        self.ask(request).await?;
        Ok(StatusCode::NO_CONTENT)
    }

    async fn add(&self, device: NewDevice, given: Given) -> Answer<Response> {
        Ok(match self.ask(Request::Add(device, given)).await? {
            Done::Added(device) => (StatusCode::OK, axum::Json(device)).into_response(),
            Done::Nothing => StatusCode::NO_CONTENT.into_response(),
        })
    }
}

/// What any request can be answered.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it describes answers, in the document only")]
enum Always {
    /// Too many requests, or followers, are there; try again.
    #[response(status = 429)]
    TooMany(ApiError),
    /// A bug of nestling.
    #[response(status = 500)]
    Internal(ApiError),
    /// Something else must come to an end first, or nestling is ending.
    #[response(status = 503)]
    Busy(ApiError),
}

/// What a request with a body can be answered, too.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it describes answers, in the document only")]
enum WithBody {
    /// The body is no JSON, has an unknown key, or a value that makes no sense.
    #[response(status = 400)]
    Invalid(ApiError),
    /// The body did not come in time.
    #[response(status = 408)]
    TooSlow(ApiError),
    /// The body is too large.
    #[response(status = 413)]
    TooLarge(ApiError),
}

/// What a request about a VM can be answered, too.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it describes answers, in the document only")]
enum AboutVm {
    /// There is no VM.
    #[response(status = 404)]
    NotCreated(ApiError),
    /// The VM is in another state than this needs.
    #[response(status = 409)]
    WrongState(ApiError),
}

/// What a request that makes something can be answered, too.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it describes answers, in the document only")]
enum Making {
    /// The host refuses, or the VM cannot have it any more.
    #[response(status = 422)]
    Refused(ApiError),
}

/// Who answers.
#[derive(Serialize, ToSchema)]
struct VmmPingResponse {
    /// Name and version of the program.
    build_version: String,
    /// Its version.
    version: String,
    /// Its process on the host.
    pid: u32,
    /// What it was built with.
    features: Vec<String>,
}

/// Whether nestling is there.
#[utoipa::path(get, path = "/vmm.ping", tag = "vmm", responses((status = 200, body = VmmPingResponse)))]
async fn ping() -> axum::Json<VmmPingResponse> {
    let version = env!("CARGO_PKG_VERSION");
    axum::Json(VmmPingResponse {
        build_version: format!("nestling {version}"),
        version: version.into(),
        pid: std::process::id(),
        features: Vec::new(),
    })
}

/// Ends nestling, and the VM with it.
#[utoipa::path(put, path = "/vmm.shutdown", tag = "vmm", responses((status = 204, description = "It ends."), Always))]
async fn vmm_shutdown(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::VmmShutdown).await
}

/// Creates a VM from a configuration. Nothing of it is opened before it is booted.
#[utoipa::path(
    put, path = "/vm.create", tag = "vm",
    request_body = VmConfig,
    responses((status = 204, description = "It is created."), (status = 409, body = ApiError, description = "There is a VM."), Making, WithBody, Always)
)]
async fn create(State(api): Shared, body: Document) -> Answer<StatusCode> {
    let config = body.vm()?;
    if config.descriptors().next().is_some() {
        return Err(ApiError::new(
            Code::InvalidConfig,
            "fd and iommufd are of requests that add one device",
        )
        .field("fd")
        .remedy("add the device before the VM is booted (vm.add-disk, vm.add-net, vm.add-device)")
        .into());
    }
    api.do_it(Request::Create(Box::new(config))).await
}

/// Boots the VM that was created.
#[utoipa::path(put, path = "/vm.boot", tag = "vm", responses((status = 204, description = "The guest runs."), AboutVm, Making, Always))]
async fn boot(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::Boot).await
}

/// Stops the VM at once. It can be booted again.
#[utoipa::path(put, path = "/vm.shutdown", tag = "vm", responses((status = 204, description = "It stopped."), AboutVm, Always))]
async fn shutdown(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::Shutdown).await
}

/// Stops the VM if it runs, and forgets it.
#[utoipa::path(put, path = "/vm.delete", tag = "vm", responses((status = 204, description = "There is no VM."), AboutVm, Always))]
async fn delete(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::Delete).await
}

/// Resets the VM: its devices are made anew, and its kernel starts again.
#[utoipa::path(put, path = "/vm.reboot", tag = "vm", responses((status = 204, description = "The guest runs."), AboutVm, Making, Always))]
async fn reboot(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::Reboot).await
}

/// Presses the guest's power button. What it does then is the guest's business.
#[utoipa::path(put, path = "/vm.power-button", tag = "vm", responses((status = 204, description = "It is pressed."), AboutVm, Always))]
async fn power_button(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::PowerButton).await
}

/// Stops the vCPUs between two instructions. Devices finish what they were given.
#[utoipa::path(put, path = "/vm.pause", tag = "vm", responses((status = 204, description = "They stand still."), AboutVm, Always))]
async fn pause(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::Pause).await
}

/// Lets the vCPUs go on.
#[utoipa::path(put, path = "/vm.resume", tag = "vm", responses((status = 204, description = "They run."), AboutVm, Always))]
async fn resume(State(api): Shared) -> Answer<StatusCode> {
    api.do_it(Request::Resume).await
}

/// The VM's configuration, state and devices, and what is being done with it. Answered at once,
/// also while something else takes long.
#[utoipa::path(
    get, path = "/vm.info", tag = "vm",
    responses((status = 200, body = VmInfo), (status = 404, body = ApiError, description = "There is no VM."), Always)
)]
async fn info(State(api): Shared) -> Answer<axum::Json<VmInfo>> {
    let info = api.shared.info().ok_or_else(not_created)?;
    Ok(axum::Json(info))
}

/// What the devices of a VM that runs counted: by device, then by name.
#[utoipa::path(
    get, path = "/vm.counters", tag = "vm",
    responses((status = 200, body = Counters), AboutVm, Always)
)]
async fn counters(State(api): Shared) -> Answer<axum::Json<Counters>> {
    let vm = running(&api)?;
    let question = move || vm.upgrade().map(|vm| vm.counters());
    let counters = api.inspector.ask(question).await?;
    Ok(axum::Json(counters.ok_or_else(not_booted)?))
}

/// What `vm.viommu` can be asked for.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ViommuQuery {
    /// A function of the guest, as `0000:00:05.0`: tell of nothing else.
    #[param(example = "0000:00:05.0")]
    endpoint: Option<String>,
}

/// The live state of the vIOMMUs of a VM that runs: units, endpoints, domains, PASIDs, what is in
/// force for each of them, counters and the last faults.
#[utoipa::path(
    get, path = "/vm.viommu", tag = "vm", params(ViommuQuery),
    responses((status = 200, body = ViommuStates), (status = 400, body = ApiError, description = "The query makes no sense."), AboutVm, Always)
)]
async fn viommu(
    State(api): Shared,
    query: Result<Query<ViommuQuery>, axum::extract::rejection::QueryRejection>,
) -> Answer<Response> {
    let Query(query) = query.map_err(bad_query)?;
    let endpoint: Option<Rid> = match query.endpoint {
        Some(text) => Some(text.parse().map_err(|why: String| {
            ApiError::from_sentence(Code::InvalidConfig, &why).field("endpoint")
        })?),
        None => None,
    };
    let vm = running(&api)?;
    let json = api.inspector.ask(move || {
        let mut states = vm.upgrade()?.viommus();
        if let Some(endpoint) = endpoint {
            filter::by_endpoint(&mut states, endpoint);
        }
        Some(serde_json::to_string(&states))
    });
    let json = json
        .await?
        .ok_or_else(not_booted)?
        .map_err(|why| ApiError::new(Code::Internal, why.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}

/// What `vm.events` can be asked for.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct EventsQuery {
    /// The number of the last event that is known: tell what came after it, as far as it is kept.
    /// Without, only what happens from now on is told.
    after: Option<u64>,
}

/// What happens, as server-sent events, until the client goes or nestling ends: the data of each
/// is one JSON object, its id is its number. A header `Last-Event-ID` is as good as `after`. Who
/// falls behind gets an event `lost` with the number of those that it lost.
#[utoipa::path(
    get, path = "/vm.events", tag = "vm", params(EventsQuery),
    responses(
        (status = 200, content_type = "text/event-stream", body = Record),
        (status = 400, body = ApiError, description = "The query makes no sense."),
        Always
    )
)]
async fn events(
    State(api): Shared,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
    headers: HeaderMap,
) -> Answer<Response> {
    let Query(query) = query.map_err(bad_query)?;
    let place = api.followers.clone().try_acquire_owned().map_err(|_| {
        ApiError::new(
            Code::TooManyRequests,
            format!("{} clients follow the events", follow::MOST),
        )
        .remedy("let one of them go, or share its events")
    })?;
    let known = headers
        .get("last-event-id")
        .and_then(|id| id.to_str().ok()?.parse().ok());
    let last = api.shared.events.last();
    // A number from another life of nestling is not waited for.
    let after = query.after.or(known).unwrap_or(last).min(last);
    let alive = sse::KeepAlive::new().interval(Duration::from_secs(15));
    Ok(Sse::new(follow::stream(&api, after, place))
        .keep_alive(alive)
        .into_response())
}

/// The descriptors that came with a request, or before it on its connection.
type Came = Extension<Received>;

/// Those that a request names; what it does not name is closed.
fn given(came: &Received, fd: Option<u32>, iommufd: Option<u32>) -> Result<Given, ApiError> {
    let mut all: Vec<Option<OwnedFd>> = came.take().into_iter().map(Some).collect();
    let count = all.len();
    let mut claim = |field: &str, place: Option<u32>| {
        let Some(place) = place else {
            return Ok(None);
        };
        let its = all.get_mut(place as usize).and_then(Option::take);
        its.map(Some).ok_or_else(|| {
            ApiError::new(
                Code::InvalidConfig,
                format!("{field}={place} names no descriptor: {count} came with the request, each for one use"),
            )
            .field(field)
            .remedy("send it together with the request (SCM_RIGHTS); the first is 0")
        })
    };
    let given = Given {
        device: claim("fd", fd)?,
        iommufd: claim("iommufd", iommufd)?,
    };
    match all.iter().flatten().count() {
        0 => Ok(given),
        unused => Err(ApiError::new(
            Code::InvalidConfig,
            format!("{unused} of {count} descriptors are named by no field of the request"),
        )
        .field("fd")
        .remedy("name them with fd and iommufd, or do not send them")),
    }
}

/// What a request to add a device can be answered, too.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "it describes answers, in the document only")]
enum Added {
    /// It is in the guest that runs.
    #[response(status = 200)]
    Running(PciDeviceInfo),
    /// It will be in the guest when it is booted.
    #[response(status = 204)]
    Created,
}

/// Adds a disk.
#[utoipa::path(put, path = "/vm.add-disk", tag = "vm", request_body = DiskConfig, responses(Added, WithBody, AboutVm, Making, Always))]
async fn add_disk(State(api): Shared, came: Came, body: Document) -> Answer<Response> {
    let disk: DiskConfig = body.group("disks", &DiskConfig::GROUP)?;
    let given = given(&came, disk.fd, None)?;
    api.add(NewDevice::Disk(disk), given).await
}

/// Adds a network card.
#[utoipa::path(put, path = "/vm.add-net", tag = "vm", request_body = NetConfig, responses(Added, WithBody, AboutVm, Making, Always))]
async fn add_net(State(api): Shared, came: Came, body: Document) -> Answer<Response> {
    let net: NetConfig = body.group("net", &NetConfig::GROUP)?;
    let given = given(&came, net.fd, None)?;
    api.add(NewDevice::Net(net), given).await
}

/// Adds a device of the host.
#[utoipa::path(put, path = "/vm.add-device", tag = "vm", request_body = DeviceConfig, responses(Added, WithBody, AboutVm, Making, Always))]
async fn add_device(State(api): Shared, came: Came, body: Document) -> Answer<Response> {
    let device: DeviceConfig = body.group("devices", &DeviceConfig::GROUP)?;
    let given = given(&came, device.fd, device.iommufd)?;
    api.add(NewDevice::Device(device), given).await
}

/// Adds a DMA test engine.
#[utoipa::path(put, path = "/vm.add-test-device", tag = "vm", request_body = TestDeviceConfig, responses(Added, WithBody, AboutVm, Making, Always))]
async fn add_test_device(State(api): Shared, came: Came, body: Document) -> Answer<Response> {
    let device = body.group("test_devices", &TestDeviceConfig::GROUP)?;
    let given = given(&came, None, None)?;
    api.add(NewDevice::Test(device), given).await
}

/// Which device to remove, and how.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct VmRemoveDevice {
    /// Its name.
    id: String,
    /// Take it away when the guest has not let go of it in time.
    #[serde(default)]
    force: bool,
    /// How long the guest has, in seconds: up to 600.
    #[serde(default)]
    #[schema(maximum = 600)]
    timeout: Option<u64>,
}

/// Removes a device. Answered when the guest has let go of it and nothing of it is left: its name
/// and its address are free.
#[utoipa::path(
    put, path = "/vm.remove-device", tag = "vm", request_body = VmRemoveDevice,
    responses((status = 204, description = "It is gone."), WithBody, AboutVm, Making, Always)
)]
async fn remove_device(State(api): Shared, body: Document) -> Answer<StatusCode> {
    let request: VmRemoveDevice = body.read()?;
    let timeout = request.timeout.map_or(EJECT, Duration::from_secs);
    if timeout > LONGEST_EJECT {
        return Err(ApiError::new(
            Code::InvalidConfig,
            format!("timeout={} s is too long", timeout.as_secs()),
        )
        .field("timeout")
        .remedy(format!("give up to {}", LONGEST_EJECT.as_secs()))
        .into());
    }
    let how = Removal {
        force: request.force,
        timeout,
    };
    api.do_it(Request::Remove {
        id: request.id,
        how,
    })
    .await
}

/// What this host can do, device by device: what `nestling doctor` says.
#[utoipa::path(get, path = "/host.info", tag = "host", responses((status = 200, body = Report), Always))]
async fn host_info(State(api): Shared) -> Answer<axum::Json<Report>> {
    let report = api.inspector.ask(|| Report::examine(&Roots::default()));
    Ok(axum::Json(report.await?))
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "vmm", responses((status = 200, description = "An OpenAPI 3.1 document.", content_type = "application/json")))]
async fn openapi() -> Response {
    (
        [(header::CONTENT_TYPE, "application/json")],
        document::COMMITTED,
    )
        .into_response()
}

fn not_created() -> ApiError {
    ApiError::new(Code::VmNotCreated, "there is no VM").remedy("create it first (vm.create)")
}

fn not_booted() -> ApiError {
    ApiError::new(Code::WrongState, "the VM is not booted").remedy("boot it first (vm.boot)")
}

/// The VM, for a question that may have to wait: it does not keep a VM that is taken down meanwhile.
fn running(api: &Api) -> Result<Weak<dyn Inspect>, ApiError> {
    let vm = api.shared.vm().ok_or_else(not_created)?;
    vm.inspect
        .as_ref()
        .map(Arc::downgrade)
        .ok_or_else(not_booted)
}

fn bad_query(why: axum::extract::rejection::QueryRejection) -> ApiError {
    ApiError::new(Code::InvalidConfig, why.body_text())
        .remedy("/api/v1/openapi.json describes the query")
}
