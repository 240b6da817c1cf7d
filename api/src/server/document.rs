//! The OpenAPI document: made from the types and the paths, committed as `api/openapi.json`, and
//! held against each other by a test.

use utoipa::OpenApi;

/// The document as it is committed and served.
pub(super) const COMMITTED: &str = include_str!("../../openapi.json");

/// What it says beside the paths.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "nestling",
        description = "Create, boot, change and look inside a VM whose guest has an IOMMU of its own. \
            Paths, verbs and bodies are Cloud Hypervisor's where it has them; a field of its \
            configurations that nestling does not have is accepted when it is null or has its default.",
        license(name = "Apache-2.0 OR BSD-3-Clause", identifier = "Apache-2.0 OR BSD-3-Clause"),
    ),
    servers((url = "http://localhost", description = "The Unix socket of --api-socket")),
    // What only descriptions of answers name.
    components(schemas(vmm::control::PciDeviceInfo)),
    tags(
        (name = "vmm", description = "nestling itself"),
        (name = "vm", description = "The VM"),
        (name = "host", description = "The host"),
    )
)]
pub(super) struct Document;

#[cfg(test)]
mod tests {
    use super::*;

    fn generated() -> String {
        let (_, document) = super::super::routes::router();
        document.to_pretty_json().unwrap() + "\n"
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document: serde_json::Value = serde_json::from_str(COMMITTED).unwrap();
        for part in COMMITTED.split("\"$ref\": \"#").skip(1) {
            let path = part.split('"').next().unwrap();
            assert!(document.pointer(path).is_some(), "{path}");
        }
    }

    #[test]
    fn the_committed_document_is_the_one_that_the_code_describes() {
        let (committed, generated) = (COMMITTED, generated());
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(
                concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"),
                &generated,
            )
            .unwrap();
        } else {
            assert!(
                committed == generated,
                "api/openapi.json is stale: UPDATE=1 cargo test -p api document"
            );
        }
    }
}
