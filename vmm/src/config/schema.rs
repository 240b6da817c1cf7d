//! One table per option group, from which option strings, JSON and help text all come.
//!
//! The macro `options!` turns a struct with doc comments into a serde type and a [`Group`]: the
//! names, the syntax, the defaults and the documentation of its fields. Everything a user writes
//! becomes a JSON value first ([`Group::parse`] for option strings), is held against the table
//! ([`Group::check`]) and is then deserialized, so that both ways in give the same errors.

use serde_json::{Map, Value, json};
use utoipa::openapi::{RefOr, Schema};

/// How the value of a field is written in an option string, checked and shown.
///
/// Called by the tables only.
pub trait OptionValue: serde::Serialize + serde::de::DeserializeOwned {
    /// The value's syntax, as help shows it.
    const SYNTAX: &'static str;
    /// What a value must be, for errors ("must be …").
    const MUST: &'static str;

    /// The JSON value for `text` of an option string.
    fn from_option(text: &str) -> Value {
        Value::String(text.into())
    }

    /// The value as it would be written in an option string; `None` when it is "nothing".
    fn to_option(&self) -> Option<String>;

    /// The JSON Schema of the value.
    fn json_schema() -> Value;
}

/// One field of a group.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its name in JSON.
    pub key: &'static str,
    /// Its name in option strings.
    pub option: &'static str,
    /// What it means.
    pub docs: &'static [&'static str],
    /// Whether it must be given.
    pub required: bool,
    /// The syntax of its value.
    pub syntax: &'static str,
    /// What its value must be.
    pub must: &'static str,
    /// Its default, as it would be written in an option string.
    pub default: fn() -> Option<String>,
    /// Text of an option string to JSON.
    pub parse: fn(&str) -> Value,
    /// Whether a JSON value is right.
    pub check: fn(&Value) -> Result<(), String>,
    /// The JSON Schema of its value.
    pub json_schema: fn() -> Value,
    /// Its default in JSON.
    pub json_default: fn() -> Value,
}

/// A group of fields: one option of the command line, one key of the JSON document.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// What it configures.
    pub docs: &'static [&'static str],
    /// The field that a bare word sets (`--serial tty`), with how each `key=value` that implies
    /// a word is known: a field named as the word in lower case.
    pub word: Option<&'static str>,
    /// The fields, in the order help shows them.
    pub fields: &'static [Field],
}

/// What is wrong with an option string or a document: one sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", one_line(.text))]
pub struct SchemaError {
    text: String,
    /// The field that it is about, as a path into the JSON document: `disks[0].path`.
    pub field: Option<String>,
}

impl SchemaError {
    /// An error about the document as a whole.
    pub fn new(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            field: None,
        }
    }

    pub(super) fn at(mut self, place: &str, key: &str) -> Self {
        self.field = Some(match place.is_empty() {
            true => key.into(),
            false => format!("{place}.{key}"),
        });
        self
    }
}

/// `text` as one line that a terminal can show: what a user wrote may have control characters.
pub(super) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

impl Group {
    /// The JSON object that the option string `text` of the option `--{option}` stands for.
    ///
    /// Values may stand in double quotes, in which `,` and `=` mean nothing.
    ///
    /// # Errors
    /// An unknown, repeated or malformed field; a value that is none.
    pub fn parse(&self, option: &str, text: &str) -> Result<Value, SchemaError> {
        let mut object = Map::new();
        for part in
            split_commas(text).map_err(|why| SchemaError::new(format!("--{option} {why}")))?
        {
            let (field, value) = match part.split_once('=') {
                Some((name, value)) => {
                    // `pasid-bits` is as good as `pasid_bits`: who writes options, writes both.
                    let plain = name.replace('-', "_");
                    let field = self.fields.iter().find(|f| f.option == plain);
                    let field = field.ok_or_else(|| {
                        let known = self.fields.iter().map(|f| f.option);
                        unknown(&format!("--{option} has no key"), name, known)
                    })?;
                    (field, unquote(value))
                }
                None => match self.word.and_then(|word| self.field(word)) {
                    Some(field) => (field, part.clone()),
                    None => {
                        return Err(SchemaError::new(format!(
                            "--{option} {part:?} is not key=value; write for example {}",
                            self.example()
                        )));
                    }
                },
            };
            let json = (field.parse)(&value);
            (field.check)(&json).map_err(|_| {
                SchemaError::new(format!(
                    "--{option} {}={value} is wrong: it must be {}",
                    field.option, field.must
                ))
            })?;
            // `file=PATH` alone says that the word is `file`.
            if let Some(word) = self.word.and_then(|word| self.field(word))
                && field.key != word.key
                && !object.contains_key(word.key)
                && (word.check)(&(word.parse)(field.option)).is_ok()
            {
                object.insert(word.key.into(), (word.parse)(field.option));
            }
            if object.insert(field.key.into(), json).is_some() && Some(field.key) != self.word {
                return Err(SchemaError::new(format!(
                    "--{option} gives {} twice; give it once",
                    field.option
                )));
            }
        }
        let value = Value::Object(object);
        self.check(&format!("--{option}"), &value)?;
        Ok(value)
    }

    /// Whether `value` is an object of this group, `place` being where the user wrote it.
    ///
    /// # Errors
    /// Not an object, an unknown key, a required key that is missing, a value of the wrong kind.
    pub fn check(&self, place: &str, value: &Value) -> Result<(), SchemaError> {
        let Value::Object(object) = value else {
            return Err(SchemaError::new(format!(
                "{place} is {}; it must be an object",
                short(value)
            )));
        };
        for (key, value) in object {
            let field = self.field(key).ok_or_else(|| {
                let known = self.fields.iter().map(|f| f.key);
                unknown(&format!("{place} has no key"), key, known).at(place, key)
            })?;
            (field.check)(value).map_err(|_| {
                let text = format!(
                    "{place}.{key} is {}; it must be {}",
                    short(value),
                    field.must
                );
                SchemaError::new(text).at(place, key)
            })?;
        }
        match self
            .fields
            .iter()
            .find(|f| f.required && !object.contains_key(f.key))
        {
            Some(field) => Err(SchemaError::new(format!(
                "{place} lacks {}; add {}={}",
                field.option, field.option, field.syntax
            ))
            .at(place, field.key)),
            None => Ok(()),
        }
    }

    /// Its JSON Schema: what [`check`](Self::check) checks, and the documentation.
    pub fn json_schema(&self) -> Value {
        let mut properties = Map::new();
        for field in self.fields {
            let mut schema = (field.json_schema)();
            if let Value::Object(schema) = &mut schema {
                schema.insert("description".into(), paragraph(field.docs).into());
                if !field.required {
                    schema.insert("default".into(), (field.json_default)());
                }
            }
            properties.insert(field.key.into(), schema);
        }
        let required = self.fields.iter().filter(|f| f.required).map(|f| f.key);
        json!({
            "type": "object",
            "description": paragraph(self.docs),
            "properties": properties,
            "required": required.collect::<Vec<_>>(),
            "additionalProperties": false,
        })
    }

    /// One line with the syntax of the whole option string.
    pub fn syntax(&self) -> String {
        let mut text = String::new();
        for field in self.fields {
            let item = match self.word {
                Some(word) if word == field.key => field.syntax.to_string(),
                _ => format!("{}={}", field.option, field.syntax),
            };
            let comma = if text.is_empty() { "" } else { "," };
            if field.required || self.word == Some(field.key) {
                text = format!("{text}{comma}{item}");
            } else {
                text = format!("{text}[{comma}{item}]");
            }
        }
        text
    }

    /// The help text: what the group is, then each field with its default.
    pub fn help(&self) -> String {
        let mut text = paragraph(self.docs);
        text.push_str("\n\n  ");
        text.push_str(&self.syntax());
        for field in self.fields {
            let default = match (field.required, (field.default)()) {
                (true, _) => " (required)".to_string(),
                (false, Some(default)) => format!(" (default {default})"),
                (false, None) => String::new(),
            };
            let name = match self.word {
                Some(word) if word == field.key => field.syntax.to_string(),
                _ => format!("{}={}", field.option, field.syntax),
            };
            text.push_str(&format!("\n\n  {name}{default}: {}", paragraph(field.docs)));
            if field.option != field.key {
                text.push_str(&format!(" In JSON: \"{}\".", field.key));
            }
        }
        text
    }

    fn field(&self, key: &str) -> Option<&'static Field> {
        self.fields.iter().find(|f| f.key == key)
    }

    fn example(&self) -> String {
        self.fields
            .iter()
            .find(|f| f.required)
            .or(self.fields.first())
            .map_or_else(String::new, |f| format!("{}={}", f.option, f.syntax))
    }
}

/// A JSON Schema as a part of an OpenAPI document.
pub(super) fn openapi(schema: Value) -> RefOr<Schema> {
    // A test looks at each of them.
    serde_json::from_value(schema).unwrap_or_else(|_| Schema::default().into())
}

/// Doc comment lines as one paragraph per blank-line-separated block.
pub fn paragraph(docs: &[&str]) -> String {
    docs.iter()
        .map(|line| line.trim())
        .collect::<Vec<_>>()
        .join(" ")
        .trim()
        .replace("  ", "\n\n")
}

/// The error for a name that does not exist: it names the nearest one that does, or all.
pub fn unknown<'a>(what: &str, name: &str, known: impl Iterator<Item = &'a str>) -> SchemaError {
    let known: Vec<&str> = known.collect();
    let nearest = known
        .iter()
        .map(|k| (distance(name, k), *k))
        .min()
        .filter(|(d, k)| *d <= k.len().max(2) / 2);
    SchemaError::new(match nearest {
        Some((_, nearest)) => format!("{what} {name:?}; did you mean {nearest:?}?"),
        None => format!("{what} {name:?}; known are {}", known.join(", ")),
    })
}

/// A value for a message, cut when it is long.
pub(super) fn short(value: &Value) -> String {
    const LONGEST: usize = 100;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Edit distance (insert, delete, replace), of the first 64 characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().take(64).enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

fn split_commas(text: &str) -> Result<Vec<String>, String> {
    let (mut parts, mut part, mut quoted) = (Vec::new(), String::new(), false);
    for c in text.chars() {
        match c {
            ',' if !quoted => parts.push(std::mem::take(&mut part)),
            '\0' => return Err("has a NUL character; remove it".into()),
            _ => {
                quoted ^= c == '"';
                part.push(c);
            }
        }
    }
    if quoted {
        return Err(format!("{text:?} has a quote that is not closed; add a \""));
    }
    parts.push(part);
    if parts.iter().any(String::is_empty) {
        return Err(format!("{text:?} has an empty part; write key=value,…"));
    }
    Ok(parts)
}

fn unquote(text: &str) -> String {
    match text.strip_prefix('"').and_then(|t| t.strip_suffix('"')) {
        Some(inside) if !inside.contains('"') => inside.into(),
        _ => text.into(),
    }
}

/// Defines a struct whose doc comments are its help text.
///
/// ```ignore
/// options! {
///     /// A disk.
///     pub struct DiskConfig {
///         /// The image file.
///         pub path: PathBuf, required;
///         /// Refuse writes.
///         pub readonly: bool = false;
///         /// How many; `queues` in option strings.
///         pub queue_count ("queues"): u16 = 1;
///         /// Which kind; `type` everywhere.
///         pub kind ["type"]: Kind = Kind::Raw;
///     }
/// }
/// ```
macro_rules! options {
    (
        $(#[doc = $doc:literal])*
        pub struct $name:ident $(word $word:ident)? {
            $(
                $(#[doc = $fdoc:literal])*
                pub $field:ident $(($option:literal))? $([$name_in_json:literal])? : $type:ty $(= $default:expr)? $(, $required:ident)? ;
            )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct $name {
            $( $(#[doc = $fdoc])* $(#[serde(rename = $name_in_json)])? pub $field: $type, )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $crate::config::schema::default_of!($type $(, $default)?), )* }
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                $crate::config::schema::openapi(Self::GROUP.json_schema())
            }
        }

        impl utoipa::ToSchema for $name {}

        impl $name {
            /// The table that parses, checks and documents this group.
            pub const GROUP: $crate::config::schema::Group = $crate::config::schema::Group {
                docs: &[$($doc),*],
                word: $crate::config::schema::word_of!($($word)?),
                fields: &[$(
                    $crate::config::schema::Field {
                        key: $crate::config::schema::name_of!($field $(, $name_in_json)?),
                        option: $crate::config::schema::name_of!($field $(, $name_in_json)? $(, $option)?),
                        docs: &[$($fdoc),*],
                        required: $crate::config::schema::required_of!($($required)?),
                        syntax: <$type as $crate::config::schema::OptionValue>::SYNTAX,
                        must: <$type as $crate::config::schema::OptionValue>::MUST,
                        default: || <$type as $crate::config::schema::OptionValue>::to_option(
                            &$crate::config::schema::default_of!($type $(, $default)?)
                        ),
                        parse: <$type as $crate::config::schema::OptionValue>::from_option,
                        check: |value| serde_json::from_value::<$type>(value.clone())
                            .map(drop)
                            .map_err(|why| why.to_string()),
                        json_schema: <$type as $crate::config::schema::OptionValue>::json_schema,
                        json_default: || serde_json::to_value::<$type>(
                            $crate::config::schema::default_of!($type $(, $default)?)
                        ).unwrap_or_default(),
                    },
                )*],
            };
        }
    };
}

macro_rules! default_of {
    ($type:ty) => {
        <$type as Default>::default()
    };
    ($type:ty, $default:expr) => {
        $default
    };
}

macro_rules! name_of {
    ($field:ident) => {
        stringify!($field)
    };
    ($field:ident, $option:literal) => {
        $option
    };
}

macro_rules! required_of {
    () => {
        false
    };
    (required) => {
        true
    };
}

macro_rules! word_of {
    () => {
        None
    };
    ($word:ident) => {
        Some(stringify!($word))
    };
}

pub(crate) use {default_of, name_of, options, required_of, word_of};
