//! Varlink framing, shared by mgmtd and `lunar`: NUL-terminated JSON. Pure.

use lunar_api::mgmt::{INTERFACE, Request, VARLINK, VERBS};
use lunar_api::{ApiError, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// A call, as it stands on the socket.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    method: String,
    #[serde(default)]
    parameters: Option<Value>,
    #[serde(default)]
    oneway: Option<bool>,
    #[serde(default)]
    more: Option<bool>,
    #[serde(default)]
    upgrade: Option<bool>,
}

/// What a message asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    /// A verb of `io.lunar`; `changes` says whether it is for root only, `oneway` that nobody waits.
    Verb {
        request: Request,
        changes: bool,
        oneway: bool,
    },
    /// Something that is answered at once.
    Answer(Value),
}

/// Reads one message (without its NUL).
///
/// # Errors  not JSON or not a call: the connection is of no use any more
pub fn decode(message: &[u8]) -> Result<Asked, ApiError> {
    let call: Call = serde_json::from_slice(message).map_err(|e| {
        ApiError::new(ErrorKind::Usage, "the message is not a varlink call").because(e.to_string())
    })?;
    if call.upgrade == Some(true) {
        return Ok(Asked::Answer(invalid("upgrade")));
    }
    let parameters = match call.parameters {
        None | Some(Value::Null) => json!({}),
        Some(parameters) => parameters,
    };
    if let Some(answer) = service(&call.method, &parameters) {
        return Ok(Asked::Answer(answer));
    }
    let Some((_, changes)) = VERBS.iter().find(|(verb, _)| *verb == call.method) else {
        return Ok(Asked::Answer(unknown(&call.method)));
    };
    let oneway = call.oneway == Some(true);
    let whole = json!({"method": call.method, "parameters": parameters});
    match serde_json::from_value(whole) {
        Ok(request) => Ok(Asked::Verb {
            request,
            changes: *changes,
            oneway,
        }),
        Err(e) => Ok(Asked::Answer(encode_error(
            &ApiError::new(
                ErrorKind::Usage,
                format!("{} does not take these parameters", call.method),
            )
            .because(e.to_string())
            .hint("varlinkctl introspect /run/lunar/mgmtd.sock io.lunar"),
        ))),
    }
}

fn service(method: &str, parameters: &Value) -> Option<Value> {
    match method {
        "org.varlink.service.GetInfo" => Some(json!({"parameters": {
            "vendor": "Lunar",
            "product": "mgmtd",
            "version": env!("CARGO_PKG_VERSION"),
            "url": env!("CARGO_PKG_REPOSITORY"),
            "interfaces": ["org.varlink.service", INTERFACE],
        }})),
        "org.varlink.service.GetInterfaceDescription" => {
            Some(match parameters["interface"].as_str() {
                Some(INTERFACE) => json!({"parameters": {"description": VARLINK}}),
                Some("org.varlink.service") => json!({"parameters": {"description": SERVICE}}),
                Some(other) => json!({
                    "error": "org.varlink.service.InterfaceNotFound",
                    "parameters": {"interface": other},
                }),
                None => invalid("interface"),
            })
        }
        _ => None,
    }
}

fn unknown(method: &str) -> Value {
    let interface = method
        .rsplit_once('.')
        .map_or(method, |(interface, _)| interface);
    if interface == INTERFACE || interface == "org.varlink.service" {
        json!({"error": "org.varlink.service.MethodNotFound", "parameters": {"method": method}})
    } else {
        json!({
            "error": "org.varlink.service.InterfaceNotFound",
            "parameters": {"interface": interface},
        })
    }
}

fn invalid(parameter: &str) -> Value {
    json!({"error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": parameter}})
}

/// Makes the answer of a success.
pub fn encode_answer<T: Serialize>(answer: &T) -> Value {
    json!({ "parameters": answer })
}

/// Makes the answer of a failure.
pub fn encode_error(error: &ApiError) -> Value {
    json!({"error": "io.lunar.Error", "parameters": error})
}

/// Makes the bytes of a message, NUL included.
pub fn frame(message: &Value) -> Vec<u8> {
    let mut bytes = message.to_string().into_bytes();
    bytes.push(0);
    bytes
}

/// Reads an answer (without its NUL), in the client.
///
/// # Errors  what the daemon answered, or that it is not understood
pub fn decode_answer(message: &[u8]) -> Result<Value, ApiError> {
    let garbled = |why: String| {
        ApiError::new(ErrorKind::Failed, "the answer of mgmtd is not understood").because(why)
    };
    let mut answer: Value = serde_json::from_slice(message).map_err(|e| garbled(e.to_string()))?;
    let parameters = answer["parameters"].take();
    match answer["error"].as_str() {
        None => Ok(parameters),
        Some("io.lunar.Error") => {
            Err(serde_json::from_value(parameters).unwrap_or_else(|e| garbled(e.to_string())))
        }
        Some(other) => Err(
            ApiError::new(ErrorKind::Usage, format!("mgmtd answered {other}"))
                .because(parameters.to_string())
                .hint("use the command line of the same version as mgmtd"),
        ),
    }
}

const SERVICE: &str = "\
interface org.varlink.service

method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)
error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
";

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str) -> Value {
        match decode(text.as_bytes()).unwrap() {
            Asked::Answer(answer) => answer,
            verb @ Asked::Verb { .. } => panic!("{verb:?}"),
        }
    }

    #[test]
    fn decode_table_of_bad_calls() {
        for (text, error) in [
            (
                r#"{"method":"io.lunar.Nope"}"#,
                "org.varlink.service.MethodNotFound",
            ),
            (
                r#"{"method":"io.sun.Status"}"#,
                "org.varlink.service.InterfaceNotFound",
            ),
            (
                r#"{"method":"io.lunar.Status","upgrade":true}"#,
                "org.varlink.service.InvalidParameter",
            ),
            (
                r#"{"method":"io.lunar.DiskFail","parameters":{"x":1}}"#,
                "io.lunar.Error",
            ),
            (
                r#"{"method":"io.lunar.DiskFail","parameters":[1]}"#,
                "io.lunar.Error",
            ),
        ] {
            assert_eq!(answer(text)["error"], error, "{text}");
        }
        for text in ["", "{}", "[]", "\u{1}", r#"{"method":"a","x":1}"#] {
            assert!(decode(text.as_bytes()).is_err(), "{text}");
        }
        assert!(decode(&[0xff, 0xfe]).is_err());
    }

    #[test]
    fn decode_verb_without_parameters() {
        let asked = decode(br#"{"method":"io.lunar.DiskList"}"#).unwrap();
        assert!(matches!(
            asked,
            Asked::Verb {
                changes: false,
                oneway: false,
                ..
            }
        ));
    }

    #[test]
    fn decode_answer_gives_the_error_back() {
        let error = ApiError::new(ErrorKind::Busy, "in use")
            .because("mounted")
            .hint("umount");
        let bytes = frame(&encode_error(&error));
        assert_eq!(decode_answer(&bytes[..bytes.len() - 1]).unwrap_err(), error);
    }
}
