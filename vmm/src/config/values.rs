//! The kinds of values that options have.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Value, json};

use super::schema::OptionValue;

impl OptionValue for bool {
    const SYNTAX: &'static str = "on|off";
    const MUST: &'static str = "on or off (true or false in JSON)";

    fn from_option(text: &str) -> Value {
        match text {
            "on" => true.into(),
            "off" => false.into(),
            _ => text.into(),
        }
    }

    fn to_option(&self) -> Option<String> {
        Some(if *self { "on" } else { "off" }.into())
    }

    fn json_schema() -> Value {
        json!({ "type": "boolean" })
    }
}

macro_rules! number {
    ($($type:ty, $must:literal);*) => {$(
        impl OptionValue for $type {
            const SYNTAX: &'static str = "N";
            const MUST: &'static str = $must;

            fn from_option(text: &str) -> Value {
                match text.parse::<$type>() {
                    Ok(n) if text.bytes().all(|b| b.is_ascii_digit()) => n.into(),
                    _ => text.into(),
                }
            }

            fn to_option(&self) -> Option<String> {
                Some(self.to_string())
            }

            fn json_schema() -> Value {
                json!({ "type": "integer", "minimum": 0, "maximum": <$type>::MAX })
            }
        }
    )*};
}
number!(
    u8, "a number from 0 to 255";
    u16, "a number from 0 to 65535";
    u32, "a number from 0 to 4294967295";
    u64, "a number from 0 to 18446744073709551615"
);

impl OptionValue for String {
    const SYNTAX: &'static str = "TEXT";
    const MUST: &'static str = "a text";

    fn to_option(&self) -> Option<String> {
        (!self.is_empty()).then(|| self.clone())
    }

    fn json_schema() -> Value {
        json!({ "type": "string" })
    }
}

impl OptionValue for PathBuf {
    const SYNTAX: &'static str = "PATH";
    const MUST: &'static str = "a path";

    fn to_option(&self) -> Option<String> {
        let text = self.to_string_lossy();
        (!text.is_empty()).then(|| text.into_owned())
    }

    fn json_schema() -> Value {
        json!({ "type": "string" })
    }
}

impl<T: OptionValue> OptionValue for Option<T> {
    const SYNTAX: &'static str = T::SYNTAX;
    const MUST: &'static str = T::MUST;

    fn from_option(text: &str) -> Value {
        T::from_option(text)
    }

    fn to_option(&self) -> Option<String> {
        self.as_ref().and_then(T::to_option)
    }

    fn json_schema() -> Value {
        let mut schema = T::json_schema();
        if let Some(kind @ Value::String(_)) = schema.get_mut("type") {
            *kind = json!([kind.clone(), "null"]);
        }
        if let Some(Value::Array(words)) = schema.get_mut("enum") {
            words.push(Value::Null);
        }
        schema
    }
}

/// A number of bytes: `512M`, `2G` (powers of 1024) or plain bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Size(pub u64);

impl Size {
    const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a size: write for example 512M or 2G");
        let (digits, shift) = Self::UNITS
            .iter()
            .find_map(|(unit, shift)| Some((text.strip_suffix(*unit)?, *shift)))
            .unwrap_or((text, 0));
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let n: u64 = digits.parse().map_err(|_| wrong())?;
        n.checked_mul(1 << shift)
            .filter(|_| plain)
            .map(Self)
            .ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = Self::UNITS
            .iter()
            .rev()
            .find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift);
        match unit {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Bytes(u64),
            Text(String),
        }
        match Either::deserialize(deserializer)? {
            Either::Bytes(n) => Ok(Self(n)),
            Either::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

impl OptionValue for Size {
    const SYNTAX: &'static str = "SIZE";
    const MUST: &'static str = "a size, for example 512M, 2G or a number of bytes";

    fn to_option(&self) -> Option<String> {
        Some(self.to_string())
    }

    fn json_schema() -> Value {
        json!({
            "type": ["integer", "string"],
            "minimum": 0,
            "maximum": u64::MAX,
            "pattern": "^[0-9]{1,9}[KMGT]?$",
            "examples": [536_870_912, "512M"],
        })
    }
}

/// A guest-physical address: `0x8000000`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "NumberOrText", into = "String")]
pub struct Address(pub u64);

/// How an address is written in JSON.
#[derive(Deserialize)]
#[serde(untagged)]
enum NumberOrText {
    Number(u64),
    Text(String),
}

impl TryFrom<NumberOrText> for Address {
    type Error = String;

    fn try_from(written: NumberOrText) -> Result<Self, String> {
        let text = match written {
            NumberOrText::Number(number) => return Ok(Self(number)),
            NumberOrText::Text(text) => text,
        };
        let digits = text.strip_prefix("0x").unwrap_or("");
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u64::from_str_radix(digits, 16).ok().filter(|_| plain);
        let wrong = || format!("{text:?} is not an address: write for example 0x8000000");
        number.map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl OptionValue for Address {
    const SYNTAX: &'static str = "ADDR";
    const MUST: &'static str = "an address, for example 0x8000000";

    fn to_option(&self) -> Option<String> {
        Some(self.to_string())
    }

    fn json_schema() -> Value {
        json!({ "type": "string", "pattern": "^0x[0-9a-fA-F]{1,16}$" })
    }
}

/// A MAC address, as `52:54:00:12:34:56`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a MAC address");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            let hex = part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| hex)
                .ok_or_else(wrong)?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(wrong()),
        }
    }
}

impl OptionValue for Mac {
    const SYNTAX: &'static str = "MAC";
    const MUST: &'static str = "a MAC address, for example 52:54:00:12:34:56";

    fn to_option(&self) -> Option<String> {
        Some(self.to_string())
    }

    fn json_schema() -> Value {
        json!({ "type": "string", "pattern": "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$" })
    }
}

/// Defines an enum of words: `Tty` in JSON (as Cloud Hypervisor writes it), `tty` in options;
/// both are read everywhere.
macro_rules! words {
    (
        $(#[doc = $doc:literal])*
        pub enum $name:ident : $syntax:literal {
            $( $(#[$attribute:meta])* $variant:ident = $word:literal, )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $( $(#[$attribute])* #[serde(alias = $word)] $variant, )*
        }

        impl $crate::config::schema::OptionValue for $name {
            const SYNTAX: &'static str = $syntax;
            const MUST: &'static str = concat!("one of ", $syntax);

            fn to_option(&self) -> Option<String> {
                Some(match self { $( Self::$variant => $word, )* }.into())
            }

            fn json_schema() -> serde_json::Value {
                serde_json::json!({
                    "type": "string",
                    "enum": [$( stringify!($variant), $word ),*],
                })
            }
        }
    };
}
pub(crate) use words;
