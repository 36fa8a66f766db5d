//! The keys of a configuration, with what they mean: read out of its types and their comments (a JSON schema), so that the manual, the
//! error for a key that is not known, and the code that uses a key cannot say different things.

use schemars::Schema;
use serde_json::Value;

/// One key, or one table of keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// From the top: `update.region_mib`; in a list of tables `network.nic[].mac`.
    pub path: String,
    /// What its value is: `number`, `text`, `true or false`, `list of text`, `table`, `list of tables`.
    pub kind: String,
    /// What holds without it, as it would be written; nothing where it must be given, or where it is a table.
    pub default: Option<String>,
    /// What it means, in plain words.
    pub meaning: String,
}

impl Key {
    /// Whether it holds keys itself.
    pub fn is_table(&self) -> bool {
        self.kind.ends_with("table") || self.kind.ends_with("tables")
    }

    /// Its own name, without that of its table.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }
}

/// A key that is in a file and means nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    /// From the top, as [`Key::path`].
    pub path: String,
    /// The known key of the same table that looks most like it, from the top; nothing where none does.
    pub nearest: Option<String>,
}

/// All keys, tables before what is in them, by name. Nothing may refer to itself, and all references must be resolved
/// (`inline_subschemas`).
pub fn of(schema: &Schema) -> Vec<Key> {
    let mut keys = Vec::new();
    properties(schema.as_value(), "", &mut keys);
    keys
}

fn properties(schema: &Value, above: &str, into: &mut Vec<Key>) {
    for (name, property) in schema["properties"].as_object().into_iter().flatten() {
        let path = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
        let property = not_null(property);
        let (kind, below) = kind(property);
        let meaning = plain(property["description"].as_str().unwrap_or_default());
        let default = below.is_none().then(|| property.get("default").map(written)).flatten();
        into.push(Key { path: path.clone(), kind: kind.clone(), default, meaning });
        if let Some(below) = below {
            let path = if kind.starts_with("list") { format!("{path}[]") } else { path };
            properties(below, &path, into);
        }
    }
}

/// What may be left out is "this or null"; what it is otherwise.
fn not_null(property: &Value) -> &Value {
    let choices = property["anyOf"].as_array();
    choices.and_then(|all| all.iter().find(|choice| choice["type"] != "null")).unwrap_or(property)
}

/// The kind in words, and the schema of the keys below, if there are any.
fn kind(property: &Value) -> (String, Option<&Value>) {
    let named = |name: &str| match &property["type"] {
        Value::String(one) => one == name,
        Value::Array(several) => several.iter().any(|one| one == name),
        _ => false,
    };
    if named("array") {
        let (item, below) = kind(&property["items"]);
        let plural = if below.is_some() { "tables".to_owned() } else { item };
        return (format!("list of {plural}"), below);
    }
    if property.get("properties").is_some() {
        return ("table".to_owned(), Some(property));
    }
    if property.get("oneOf").is_some() || property.get("enum").is_some() {
        return ("names".to_owned(), None);
    }
    let word = [("integer", "number"), ("boolean", "true or false"), ("string", "text")];
    (word.iter().find(|(name, _)| named(name)).map_or("value", |(_, word)| word).to_owned(), None)
}

fn written(default: &Value) -> String {
    default.to_string()
}

/// A comment of the code as text for a reader who has no code: no links, no marks, one line.
fn plain(comment: &str) -> String {
    let mut text = String::new();
    for word in comment.split_whitespace() {
        if !text.is_empty() {
            text.push(' ');
        }
        // `[`Update::cmdline`]` names the key `cmdline`.
        let bare = word.replace(['`', '[', ']'], "");
        text.push_str(if word.contains("[`") { bare.rsplit("::").next().unwrap_or(&bare) } else { &bare });
    }
    text
}

/// The first key of a file that is not known, top down.
pub fn unknown(keys: &[Key], file: &toml::Table) -> Option<Unknown> {
    unknown_in(keys, file, "")
}

fn unknown_in(keys: &[Key], table: &toml::Table, above: &str) -> Option<Unknown> {
    for (name, value) in table {
        let path = if above.is_empty() { name.clone() } else { format!("{above}.{name}") };
        let Some(key) = keys.iter().find(|key| key.path == path) else {
            return Some(Unknown { nearest: nearest(keys, name, above), path });
        };
        if !key.is_table() {
            continue;
        }
        // A value of another kind is for the parser to complain of.
        let found = match value {
            toml::Value::Table(below) => unknown_in(keys, below, &path),
            toml::Value::Array(tables) => {
                let mut tables = tables.iter().filter_map(toml::Value::as_table);
                tables.find_map(|below| unknown_in(keys, below, &format!("{path}[]")))
            }
            _ => None,
        };
        if found.is_some() {
            return found;
        }
    }
    None
}

/// At least this alike (0 to 1, Jaro and Winkler's measure) are a word and what somebody may have meant by it.
const ALIKE: f64 = 0.8;

/// The key that looks most like a name: of the same table, else one of another table by the same last name.
fn nearest(keys: &[Key], name: &str, above: &str) -> Option<String> {
    let table = |key: &Key| key.path.rsplit_once('.').map_or(String::new(), |(table, _)| table.to_owned());
    let beside = keys.iter().filter(|key| table(key) == above);
    let likeness = |key: &&Key| strsim::jaro_winkler(key.name(), name);
    let best = beside.max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    let best = best.filter(|key| likeness(key) >= ALIKE);
    best.or_else(|| keys.iter().find(|key| key.name() == name)).map(|key| key.path.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_of_code_become_text() {
        assert_eq!(plain("Whose it\nis; see [`Update::cmdline`].\n\nA `word`."), "Whose it is; see cmdline. A word.");
        assert_eq!(plain(""), "");
    }

    #[test]
    fn a_likeness_is_needed_to_be_named() {
        let key = |path: &str| Key { path: path.into(), kind: "text".into(), default: None, meaning: String::new() };
        let keys = [key("update.cmdline"), key("update.accept"), key("initrd.modules")];
        assert_eq!(nearest(&keys, "cmdlin", "update").as_deref(), Some("update.cmdline"));
        assert_eq!(nearest(&keys, "modules", "update").as_deref(), Some("initrd.modules"), "in the wrong table");
        assert_eq!(nearest(&keys, "zzz", "update"), None);
    }
}
