//! The module's header is the definition: the C compiler's opinion of it against our mirror, struct by struct.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use kexec_core::registry::State;
use kexec_core::sys;

fn header() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("kmod/uapi/baton.h")
}

/// Compiles a program that prints `name value` for each C expression, and runs it.
fn ask_compiler(questions: &[(String, String)]) -> BTreeMap<String, u64> {
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (folder.path().join("ask.c"), folder.path().join("ask"));
    let prints: String = questions
        .iter()
        .map(|(name, expression)| format!("printf(\"%s %llu\\n\", \"{name}\", (unsigned long long)({expression}));\n"))
        .collect();
    let text = format!(
        "#include <stdio.h>\n#include <stddef.h>\n#include \"{}\"\nint main(void) {{\n{prints}return 0; }}\n",
        header().display()
    );
    std::fs::write(&source, text).unwrap();
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let output = Command::new(&compiler).arg("-Wall").arg("-Werror").arg(&source).arg("-o").arg(&program).output();
    let output = output.unwrap_or_else(|error| panic!("{compiler}: {error}; install gcc and libc6-dev"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = Command::new(&program).output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(name, value)| (name.to_owned(), value.parse().unwrap()))
        .collect()
}

#[test]
fn the_mirror_equals_the_header() {
    let mut expected: Vec<(String, String, u64)> = Vec::new();
    let mut expect = |name: String, expression: String, value: u64| expected.push((name, expression, value));
    for layout in sys::ALL_MESSAGES {
        let name = layout.name;
        expect(name.to_owned(), format!("sizeof(struct {name})"), layout.size as u64);
        for &(field, offset, size) in layout.fields {
            expect(format!("{name}.{field}"), format!("offsetof(struct {name}, {field})"), offset as u64);
            let of = format!("sizeof(((struct {name} *)0)->{field})");
            expect(format!("sizeof:{name}.{field}"), of, size as u64);
        }
    }
    for &(call, number) in sys::ALL_CALLS {
        expect(format!("IOC_{call}"), format!("BATON_IOC_{call}"), number.into());
    }
    for &(name, value) in sys::ALL_NUMBERS {
        expect(name.to_owned(), format!("BATON_{name}"), value);
    }
    use State::*;
    for state in [Created, Loaded, Booting, Running, Serving, Failed, Retired] {
        let name = format!("STATE_{}", state.to_string().to_uppercase());
        expect(name.clone(), format!("BATON_{name}"), state as u64);
    }
    expect("DEVICE".into(), format!("__builtin_strcmp(BATON_DEVICE, \"{}\")", sys::DEVICE), 0);

    let questions: Vec<_> = expected.iter().map(|(name, expression, _)| (name.clone(), expression.clone())).collect();
    let answers = ask_compiler(&questions);
    for (name, _, value) in &expected {
        assert_eq!(answers.get(name), Some(value), "{name}: the header's value (left) against the mirror's");
    }
}

/// Nothing in the header that the mirror has forgotten: every struct, every field, every number.
#[test]
fn the_mirror_is_complete() {
    let text = std::fs::read_to_string(header()).unwrap();
    let structs: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("struct ")?.strip_suffix(" {")).collect();
    let mirrored: Vec<&str> = sys::ALL_MESSAGES.iter().map(|layout| layout.name).collect();
    assert_eq!(structs, mirrored, "structs of the header (left) and the mirror, in order");

    let mut inside: Option<&sys::Layout> = None;
    let mut fields = 0;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("struct ").and_then(|l| l.strip_suffix(" {")) {
            inside = sys::ALL_MESSAGES.iter().find(|layout| layout.name == name);
            fields = 0;
        } else if line == "};" {
            if let Some(layout) = inside.take() {
                assert_eq!(fields, layout.fields.len(), "fields of {}", layout.name);
            }
        } else if inside.is_some() && line.split("/*").next().unwrap().contains(';') {
            fields += 1;
        }
    }

    for line in text.lines() {
        let Some(name) = line.strip_prefix("#define BATON_") else { continue };
        let name = name.split(|c: char| c.is_whitespace() || c == '(').next().unwrap();
        let known = sys::ALL_NUMBERS.iter().any(|(n, _)| *n == name)
            || name.strip_prefix("IOC_").is_some_and(|call| sys::ALL_CALLS.iter().any(|(c, _)| *c == call))
            || ["DEVICE", "IOC"].contains(&name);
        assert!(known, "BATON_{name} is not mirrored");
    }
}
