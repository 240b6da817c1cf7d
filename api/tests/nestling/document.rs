//! The OpenAPI document, held against answers.

use serde_json::Value;

pub(crate) const DOCUMENT: &str = include_str!("../../openapi.json");

/// Checks that the document promises this answer.
pub(crate) fn promised(verb: &str, path: &str, status: u16, body: &Value) {
    let document: Value = serde_json::from_str(DOCUMENT).unwrap();
    let operation = &document["paths"][format!("/api/v1/{path}")][verb.to_lowercase()];
    if operation.is_null() {
        // No such path or verb, which has an error like any other.
        assert!(matches!(status, 404 | 405), "{verb} {path}: {status}");
        return matches_schema(
            &document,
            &document["components"]["schemas"]["ApiError"],
            body,
        );
    }
    let answer = &operation["responses"][status.to_string()];
    assert!(
        !answer.is_null(),
        "{verb} {path} is answered {status}: {body}"
    );
    match &answer["content"]["application/json"]["schema"] {
        Value::Null if path == "openapi.json" => {}
        Value::Null => assert!(body.is_null(), "{verb} {path}: {body}"),
        schema => matches_schema(&document, schema, body),
    }
}

/// A JSON Schema as far as the document uses it.
pub(crate) fn matches_schema(document: &Value, schema: &Value, value: &Value) {
    if let Err(why) = check(document, schema, value) {
        panic!("{why}\nin {value:#}");
    }
}

fn check(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    if let Some(name) = schema["$ref"].as_str() {
        let name = name.strip_prefix("#/components/schemas/").unwrap();
        let schema = &document["components"]["schemas"][name];
        assert!(!schema.is_null(), "no schema {name}");
        return check(document, schema, value).map_err(|why| format!("{name}: {why}"));
    }
    for all in schema["allOf"].as_array().into_iter().flatten() {
        check(document, all, value)?;
    }
    for key in ["oneOf", "anyOf"] {
        if let Some(any) = schema[key].as_array() {
            let tried: Vec<_> = any.iter().map(|s| check(document, s, value)).collect();
            if tried.iter().all(Result::is_err) {
                return Err(format!("none of {tried:?}"));
            }
        }
    }
    let kinds: Vec<&str> = match &schema["type"] {
        Value::String(kind) => vec![kind],
        Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(n) if n.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    if !kinds.is_empty() && !kinds.contains(&kind) {
        return Err(format!("{value} is no {kinds:?}"));
    }
    if let Some(words) = schema["enum"].as_array()
        && !words.contains(value)
    {
        return Err(format!("{value} is none of {words:?}"));
    }
    if let Some(minimum) = schema["minimum"].as_f64()
        && value.as_f64().is_some_and(|n| n < minimum)
    {
        return Err(format!("{value} is below {minimum}"));
    }
    for item in value.as_array().into_iter().flatten() {
        check(document, &schema["items"], item)?;
    }
    let Some(object) = value.as_object() else {
        return Ok(());
    };
    for key in schema["required"].as_array().into_iter().flatten() {
        if !object.contains_key(key.as_str().unwrap()) {
            return Err(format!("no {key}"));
        }
    }
    for (key, item) in object {
        let property = match &schema["properties"][key] {
            Value::Null => &schema["additionalProperties"],
            property => property,
        };
        match property {
            Value::Bool(false) => return Err(format!("{key} is unknown")),
            Value::Object(_) => {
                check(document, property, item).map_err(|why| format!("{key}: {why}"))?;
            }
            _ => {}
        }
    }
    Ok(())
}
