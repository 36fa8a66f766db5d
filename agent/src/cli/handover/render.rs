//! For people: a value as indented lines, memory as ranges, hardware addresses as people write them.

use serde_json::{Map, Value};

use super::show::{Piece, kind_name};

/// A piece with its heading.
pub fn piece(piece: &Piece) -> String {
    let mut text = format!("{} ({})\n", piece.format, piece.at);
    if let Some(problem) = &piece.problem {
        text.push_str(&format!("  NOT CREDIBLE: {problem}\n"));
    }
    lines(&piece.value, 1, &mut text);
    text
}

fn lines(value: &Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                match short(name, value) {
                    Some(short) => text.push_str(&format!("{indent}{name:<20} {short}\n")),
                    None => {
                        text.push_str(&format!("{indent}{name}\n"));
                        lines(value, depth + 1, text);
                    }
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                match short("", item) {
                    Some(short) => text.push_str(&format!("{indent}- {short}\n")),
                    None => {
                        text.push_str(&format!("{indent}-\n"));
                        lines(item, depth + 1, text);
                    }
                }
            }
        }
        Value::Null => {}
        other => text.push_str(&format!("{indent}{other}\n")),
    }
}

/// What fits on the line of its name.
fn short(name: &str, value: &Value) -> Option<String> {
    match value {
        Value::Null => Some("none".to_owned()),
        Value::Bool(value) => Some(if *value { "yes" } else { "no" }.to_owned()),
        Value::String(text) => Some(text.escape_debug().to_string()),
        Value::Number(number) => Some(match (name, number.as_u64()) {
            ("schema_kind", Some(kind)) => u32::try_from(kind).map_or_else(|_| number.to_string(), kind_name),
            ("address" | "root" | "top" | "seals", Some(number)) => format!("{number:#x}"),
            (_, _) => number.to_string(),
        }),
        Value::Array(items) if items.is_empty() => Some("none".to_owned()),
        Value::Array(items) => octets(items),
        Value::Object(fields) => range(fields).or_else(|| fields.is_empty().then(|| "none".to_owned())),
    }
}

/// A MAC or IPv4 address.
fn octets(items: &[Value]) -> Option<String> {
    let bytes: Option<Vec<u8>> = items.iter().map(|item| u8::try_from(item.as_u64()?).ok()).collect();
    let bytes = bytes?;
    let join = |form: fn(&u8) -> String, between: &str| bytes.iter().map(form).collect::<Vec<_>>().join(between);
    match bytes.len() {
        4 => Some(join(u8::to_string, ".")),
        6 => Some(join(|byte| format!("{byte:02x}"), ":")),
        _ => None,
    }
}

/// Physical memory.
fn range(fields: &Map<String, Value>) -> Option<String> {
    let (start, len) = (fields.get("start")?.as_u64()?, fields.get("len")?.as_u64()?);
    if fields.len() != 2 {
        return None;
    }
    let size = match len {
        len if len >= 1 << 20 && len.is_multiple_of(1 << 20) => format!("{} MiB", len >> 20),
        len if len.is_multiple_of(1 << 10) => format!("{} KiB", len >> 10),
        len => format!("{len} bytes"),
    };
    Some(format!("{start:#x}+{len:#x} ({size})"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_piece_reads_like_a_table() {
        let value = json!({
            "region": { "start": 0x2000_0000, "len": 256 << 20 }, "mac": [82, 84, 0, 1, 2, 255], "none": null,
            "services": [{ "name": "k\u{1b}v", "schema_kind": u32::from_le_bytes(*b"KVST"), "arenas": [] }],
        });
        let piece = super::piece(&Piece {
            format: "handover record".to_owned(),
            at: "file".to_owned(),
            value,
            problem: Some("a lie".to_owned()),
        });
        insta::assert_snapshot!(piece, @r"
        handover record (file)
          NOT CREDIBLE: a lie
          mac                  52:54:00:01:02:ff
          none                 none
          region               0x20000000+0x10000000 (256 MiB)
          services
            -
              arenas               none
              name                 k\u{1b}v
              schema_kind          KVST
        ");
    }
}
