//! What is registered comes back as it was, is found by its name, and is told of when it is not what it was.

use std::fs;
use std::io::{BufRead, BufReader};

use handmill::model::adapter::{LoraConfig, TARGETS};
use handmill::model::checkpoint::Checkpoint;
use handmill::registry::entries::{New, Source};
use handmill::registry::{Kind, Registry};
use handmill::train::parameters;

use super::*;

/// Writes an adapter for the tiny model.
pub fn adapter(dir: &Path, seed: u64, base: &str) {
    let config = Checkpoint::open(model()).unwrap().config;
    let lora = LoraConfig {
        r: 4,
        alpha: 8.0,
        rslora: false,
        dropout: 0.0,
        targets: TARGETS.iter().map(|target| target.0).collect(),
        base: Some("tiny".into()),
    };
    let mut adapter = parameters::fresh(&config, lora, seed);
    adapter.base_sha256 = Some(base.into());
    adapter.save(dir).unwrap();
}

#[test]
fn versions_aliases_tags_and_lineage_go_round() {
    let place = Place::new();
    let base = place.json(&["registry", "add", "Tiny", str(model())]);
    assert_eq!((base["version"].as_i64(), base["kind"].as_str()), (Some(1), Some("model")), "{base}");
    let rows = place.file("rows.jsonl", "{\"text\":\"a\"}\n");
    let data = place.json(&["registry", "add", "rows", str(&rows), "--tag", "source=hand"]);
    let identity = base["identity"].as_str().unwrap();
    adapter(&place.path("one"), 1, identity);
    fs::write(place.path("one/handmill_prompt.json"), "{}").unwrap();
    let parent = ["--parent", "data=rows@1", "--alias", "champion"];
    let one = place.json(&[&["registry", "add", "support", str(&place.path("one"))][..], &parent].concat());
    assert_eq!(one["aliases"][0], "champion");
    let parents: Vec<(&str, &str)> = (one["parents"].as_array().unwrap().iter())
        .map(|parent| (parent["role"].as_str().unwrap(), parent["name"].as_str().unwrap()))
        .collect();
    assert_eq!(parents, [("base", "Tiny"), ("data", "rows")], "the base is what the adapter's own file says");

    // The same bytes are the same version; others are the next; the version's number is never given twice.
    let again = place.json(&["registry", "add", "SUPPORT", str(&place.path("one"))]);
    assert_eq!((&again["version"], &again["added"], &again["name"]), (&one["version"], &false.into(), &one["name"]));
    adapter(&place.path("two"), 2, identity);
    let two = place.json(&["registry", "add", "support", str(&place.path("two"))]);
    assert_eq!(two["version"], 2);
    place.json(&["registry", "remove", "support@2"]);
    assert_eq!(place.json(&["registry", "add", "support", str(&place.path("two"))])["version"], 3);

    // The source may change: what was registered does not.
    fs::write(&rows, "{\"text\":\"b\"}\n").unwrap();
    assert_eq!(place.json(&["registry", "verify"])["damage"], serde_json::json!([]));
    place.json(&["registry", "export", "rows@1", str(&place.path("out"))]);
    assert_eq!(fs::read_to_string(place.path("out/rows.jsonl")).unwrap(), "{\"text\":\"a\"}\n");
    place.json(&["registry", "export", "support@champion", str(&place.path("adapter"))]);
    for name in ["adapter_config.json", "adapter_model.safetensors", "handmill_prompt.json"] {
        assert_eq!(
            fs::read(place.path("adapter").join(name)).unwrap(),
            fs::read(place.path("one").join(name)).unwrap()
        );
    }
    assert!(place.fails(&["registry", "export", "rows", str(&place.path("out"))]).contains("not empty"));

    let tree = place.json(&["registry", "lineage", "rows"]);
    assert_eq!(tree["descendants"][0]["name"], "support");
    let tree = place.json(&["registry", "lineage", "support@1"]);
    assert_eq!(tree["ancestors"].as_array().unwrap().len(), 2);
    assert_eq!(data["tags"]["source"], "hand");
    assert_eq!(place.lines(&["registry", "list", "--kind", "dataset", "--tag", "source=hand"]).len(), 1);
    assert_eq!(place.lines(&["registry", "list", "--tag", "source=other"]).len(), 0);
    place.json(&["registry", "tag", "rows", "source", "n=1"]);
    assert_eq!(place.json(&["registry", "show", "rows"])["tags"], serde_json::json!({"n": "1"}));

    // What an alias or lineage holds stays; the rest goes, and its bytes with the next collection.
    assert!(place.fails(&["registry", "remove", "support@1"]).contains("champion"));
    assert!(place.fails(&["registry", "remove", "rows@1"]).contains("support@1 was made from"));
    assert!(place.fails(&["registry", "remove", "support"]).contains("support@3"));
    assert_eq!(place.json(&["registry", "gc"])["blobs"], 0);
    place.json(&["registry", "remove", "support@3"]);
    let gone = place.json(&["registry", "gc"]);
    assert_eq!((&gone["blobs"], &gone["trees"]), (&1.into(), &1.into()), "its config is another version's too: {gone}");
    assert_eq!(place.json(&["registry", "verify"])["damage"], serde_json::json!([]));
}

#[test]
fn names_stand_wherever_paths_do() {
    let place = Place::new();
    let base = place.json(&["registry", "add", "tiny", str(model())]);
    let text = place.file("text.txt", "the mill stands at the river, in the north.");
    let eval = |args: &[&str]| place.json(&[&["eval", "--text", str(&text), "--device", "cpu"], args].concat());
    let plain = eval(&["--model", str(model())]);
    assert_eq!(eval(&["--model", "tiny@latest"])["mean_nll"], plain["mean_nll"]);
    adapter(&place.path("fresh"), 1, base["identity"].as_str().unwrap());
    place.json(&["registry", "add", "support", str(&place.path("fresh")), "--alias", "candidate"]);
    // B of a fresh adapter is zero.
    assert_eq!(eval(&["--model", "tiny", "--adapter", "support@candidate"])["mean_nll"], plain["mean_nll"]);

    let flags = ["serve", "--model", "tiny", "--adapter", "now=support@candidate", "--listen", "127.0.0.1:0"];
    let mut server = place.start(&[&flags[..], &["--device", "cpu", "--json"]].concat());
    let mut ready = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    server.kill().unwrap();
    server.wait().unwrap();
    let ready: Value = serde_json::from_str(&ready).expect("it is ready");
    assert_eq!(ready["models"], serde_json::json!(["tiny", "now"]));

    let error = place.fails(&["eval", "--model", "tiny2", "--text", str(&text)]);
    assert!(
        error.contains("no file or directory") && error.contains("has no such model (its model names: tiny)"),
        "{error}"
    );
    let error = place.fails(&["eval", "--model", "support", "--text", str(&text)]);
    assert!(error.contains("support is of kind adapter"), "{error}");
    let error = place.fails(&["eval", "--model", "no/such/model", "--text", str(&text)]);
    assert!(error.contains("no/such/model") && !error.contains("registry"), "{error}");

    // An adapter of another base is refused, both hashes said.
    let other = "ab".repeat(32);
    adapter(&place.path("other"), 1, &other);
    place.json(&["registry", "add", "support", str(&place.path("other"))]);
    let error = place.fails(&["eval", "--model", "tiny", "--adapter", "support", "--text", str(&text)]);
    let hash = base["identity"].as_str().unwrap();
    assert!(error.contains(&other[..12]) && error.contains(&hash[..12]), "{error}");
}

#[test]
fn hostile_names_paths_and_bytes_are_refused() {
    let place = Place::new();
    let rows = place.file("rows.jsonl", "{\"text\":\"a\"}\n");
    for name in ["../x", "a/b", "..", "", ".x", "a b", "x@1", "ü", &"x".repeat(97)] {
        let error = place.fails(&["registry", "add", name, str(&rows)]);
        assert!(error.contains("cannot be a name"), "{name}: {error}");
    }
    // A name with NUL cannot be an argument; the library refuses it as well.
    let registry = Registry::create(&place.registry()).unwrap();
    assert!(registry.add(&New::of("a\0b", Kind::Dataset, Source::Path(&rows))).is_err());
    for file in ["../x", "/x", "a/../b", "a\0b", "", "a//b", "a\\b"] {
        let error = registry.add(&New::of("x", Kind::Run, Source::Bytes(file, b"x"))).err().map(|e| e.to_string());
        assert!(error.as_ref().is_some_and(|error| error.contains("no path inside")), "{file:?}: {error:?}");
    }
    assert!(registry.list(None, None).unwrap().is_empty(), "nothing was added");

    place.json(&["registry", "add", "rows", str(&rows)]);
    for alias in ["3", "latest", "a/b", ""] {
        assert!(place.fails(&["registry", "alias", "rows", alias]).contains("cannot be an alias"));
    }
    assert!(place.fails(&["registry", "add", "ROWS", str(model())]).contains("is the name of a dataset"));
    assert!(place.fails(&["registry", "add", "x", "/no/such/file.jsonl"]).contains("/no/such/file.jsonl"));
    assert!(place.fails(&["registry", "add", "x", str(&place.file("x.bin", "x"))]).contains("--kind"));
    let error = place.fails(&["registry", "add", "x", str(&rows), "--kind", "model"]);
    assert!(error.contains("rows.jsonl"), "{error}");
    let error = place.fails(&["registry", "add", "x", str(&rows), "--parent", "base=zz"]);
    assert!(error.contains("has no zz: its names are rows"), "{error}");
    let error = place.fails(&["registry", "show", "rwos", "--registry", str(&place.path("fresh"))]);
    assert!(error.contains("is no registry"), "{error}");
    place.json(&["registry", "init", "--registry", str(&place.path("fresh"))]);
    let error = place.fails(&["registry", "show", "rwos", "--registry", str(&place.path("fresh"))]);
    assert!(error.contains("nothing yet"), "{error}");
    #[cfg(unix)]
    {
        // A folder that links to its own parent.
        fs::create_dir(place.path("loop")).unwrap();
        std::os::unix::fs::symlink(place.path("loop"), place.path("loop/again")).unwrap();
        let error = place.fails(&["registry", "add", "x", str(&place.path("loop")), "--kind", "dataset"]);
        assert!(error.contains("link to a folder"), "{error}");
    }
    // Neither a registry nor its database.
    fs::create_dir(place.path("none")).unwrap();
    let error = place.fails(&["registry", "list", "--registry", str(&place.path("none"))]);
    assert!(error.contains("is no registry"), "{error}");
    place.file("bad/registry.sqlite", "this is no database at all, but a text of some length");
    let error = place.fails(&["registry", "list", "--registry", str(&place.path("bad"))]);
    assert!(error.contains("registry.sqlite"), "{error}");
}

#[test]
fn a_flipped_byte_is_found_with_its_file_and_entry() {
    let place = Place::new();
    place.json(&["registry", "add", "rows", str(&place.file("rows.jsonl", "{\"text\":\"a\"}\n"))]);
    place.json(&["registry", "add", "tiny", str(model()), "--in-place"]);
    adapter(&place.path("one"), 1, &"ab".repeat(32));
    place.json(&["registry", "add", "support", str(&place.path("one"))]);
    assert_eq!(place.json(&["registry", "verify"])["entries"], 3);
    for entry in ["rows", "support"] {
        let shown = place.json(&["registry", "show", entry]);
        for (before, file) in shown["files"].as_array().unwrap().iter().enumerate() {
            let hash = file["sha256"].as_str().unwrap();
            let blob = place.registry().join("blobs").join(&hash[..2]).join(hash);
            let whole = fs::read(&blob).unwrap();
            let mut flipped = whole.clone();
            flipped[whole.len() / 2] ^= 1;
            // In place, as a failing disk does it.
            let mut permissions = fs::metadata(&blob).unwrap().permissions();
            #[allow(clippy::permissions_set_readonly_false)] // of a file in a folder of this test's own
            permissions.set_readonly(false);
            fs::set_permissions(&blob, permissions).unwrap();
            fs::write(&blob, flipped).unwrap();
            let run = place.run(&["registry", "verify", "--json"]);
            let damage = &run.object()["damage"];
            let found = damage.as_array().unwrap();
            assert_eq!((run.code, found.len()), (1, before + 1), "{damage}");
            assert!(found.iter().all(|one| one["entry"].as_str().unwrap().starts_with(entry)), "{damage}");
            assert!(found.iter().any(|one| one["file"].as_str().unwrap().contains(hash)), "{damage}");
            let error = place.fails(&["registry", "export", entry, str(&place.path(&format!("out-{hash}")))]);
            assert!(error.contains("damaged"), "{error}");
        }
        // Registered anew, as `verify` advises, it is whole again, where it is used too.
        let source = place.path(if entry == "rows" { "rows.jsonl" } else { "one" });
        let again = place.json(&["registry", "add", entry, str(&source)]);
        assert_eq!((&again["version"], &again["added"]), (&1.into(), &false.into()));
        assert_eq!(place.json(&["registry", "verify"])["damage"], serde_json::json!([]));
        let used = PathBuf::from(shown["path"].as_str().unwrap());
        for file in shown["files"].as_array().unwrap() {
            let name = file["path"].as_str().unwrap();
            let [used, source] = [&used, &source].map(|at| if at.is_dir() { at.join(name) } else { at.clone() });
            assert_eq!(fs::read(used).unwrap(), fs::read(source).unwrap());
        }
    }
}

#[test]
fn a_rollback_finds_the_version_before_across_gaps() {
    let place = Place::new();
    for version in 1..=3 {
        let rows = place.file("rows.jsonl", &format!("{{\"text\":\"{version}\"}}\n"));
        place.json(&["registry", "add", "rows", str(&rows)]);
    }
    let point = |version: i64| place.json(&["registry", "alias", &format!("rows@{version}"), "champion"]);
    let back = || {
        let object = place.json(&["rollback", "rows"]);
        (object["version"].as_i64().unwrap(), object["from"].as_i64())
    };
    assert!(place.fails(&["rollback", "rows"]).contains("no version was promoted yet"));
    [1, 2, 3].into_iter().for_each(|version| drop(point(version)));
    // Taken away, it comes back as it was; then the one before it, and the one before that.
    place.json(&["registry", "alias", "rows", "champion", "--delete"]);
    assert_eq!(back(), (3, None));
    assert_eq!(back(), (2, Some(3)));
    assert_eq!(back(), (1, Some(2)));
    assert!(place.fails(&["rollback", "rows"]).contains("no way back"));
    // Across a time without one.
    place.json(&["registry", "alias", "rows", "champion", "--delete"]);
    point(3);
    assert_eq!(back(), (1, Some(3)));
    // The version before is gone: the one before that is named.
    [2, 3].into_iter().for_each(|version| drop(point(version)));
    place.json(&["registry", "remove", "rows@2"]);
    let error = place.fails(&["rollback", "rows"]);
    assert!(error.contains("removed since") && error.contains("registry alias rows@1 champion"), "{error}");
}

#[cfg(unix)]
#[test]
fn a_registry_that_cannot_be_written_can_be_used() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let place = Place::new();
    place.json(&["registry", "add", "tiny", str(model()), "--alias", "champion"]);
    let text = place.file("text.txt", "the mill stands at the river, in the north.");
    // Root may write anywhere: then it is tried as someone else, who must come by the program. Copied by another
    // process, it is open for writing in none that is started from here.
    let program = place.path("handmill");
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_handmill")).arg(&program).status().unwrap().success());
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mode = |bits: u32| {
        let mut paths = vec![place.registry()];
        while let Some(path) = paths.pop() {
            // Files too: a linked one has the mode of what was registered, which may be its owner's alone.
            let (folder, set) = (path.is_dir(), |bits| fs::set_permissions(&path, fs::Permissions::from_mode(bits)));
            if folder {
                set(bits | 0o200).unwrap();
                paths.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            set(if folder { bits } else { bits & 0o666 }).unwrap();
        }
    };
    mode(0o555);
    let root = fs::write(place.registry().join("probe"), "").is_ok();
    let run = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).env("HANDMILL_REGISTRY", place.registry()).current_dir(place.dir.path());
        if root {
            command.uid(65534).gid(65534);
        }
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, listed, error) = run(&["registry", "list"]);
    assert!(code == Some(0) && listed.contains("tiny@1"), "{error}");
    let (code, told, error) = run(&["registry", "verify"]);
    assert!(code == Some(0), "{told}{error}");
    // What was asked for is done, and that no record is kept is said.
    let eval = ["eval", "--model", "tiny@champion", "--text", str(&text), "--device", "cpu", "--json"];
    let (code, figures, error) = run(&eval);
    assert!(code == Some(0) && figures.contains("mean_nll") && error.contains("not recorded: "), "{error}");
    // What would change it is refused in words.
    for args in [
        &["registry", "tag", "tiny", "a=b"][..],
        &["registry", "gc"],
        &["registry", "add", "rows", str(&text), "--kind", "dataset"],
        &[&eval[..], &["--register", "x"]].concat(),
    ] {
        let (code, _, error) = run(args);
        assert!(code == Some(1) && error.contains(str(&place.registry())), "{args:?}: {error}");
    }
    mode(0o755);
    assert_eq!(place.run(&["registry", "verify"]).code, 0);
}

#[test]
fn models_on_the_machine_are_found_and_stay_where_they_are() {
    let place = Place::new();
    let snapshot = place.path("hub/models--Org--Tiny-1B/snapshots/0123abcd");
    let blobs = place.path("hub/models--Org--Tiny-1B/blobs");
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(&blobs).unwrap();
    for file in fs::read_dir(model()).unwrap().map(|file| file.unwrap().path()) {
        let name = file.file_name().unwrap().to_str().unwrap();
        fs::copy(&file, blobs.join(name)).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(format!("../../blobs/{name}"), snapshot.join(name)).unwrap();
        #[cfg(not(unix))]
        fs::copy(&file, snapshot.join(name)).unwrap();
    }
    place.file("hub/models--Org--Empty/snapshots/1/readme.txt", "nothing");
    place.file("hub/models--Org--Broken/snapshots/1/config.json", "{}");
    place.file("models/other/x.gguf", "GGUF, but no more");
    let flags = ["--hub", str(&place.path("hub")), "--folder", str(&place.path("models"))].map(str::to_string);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let found = place.lines(&[&["registry", "scan"], &flags[..]].concat());
    assert_eq!(found.len(), 3, "{found:?}");
    let tiny = found.iter().find(|one| one["name"] == "tiny-1b").unwrap();
    assert_eq!(tiny["metadata"]["origin"], "Org/Tiny-1B@0123abcd");
    assert_eq!(found.iter().filter(|one| one["error"].is_string()).count(), 2, "{found:?}");
    let shown = place.json(&["registry", "show", "tiny-1b"]);
    assert_eq!(fs::canonicalize(shown["path"].as_str().unwrap()).unwrap(), fs::canonicalize(&snapshot).unwrap());
    assert!(!place.registry().join("blobs").exists(), "nothing was copied");
    let again = place.lines(&[&["registry", "scan"], &flags[..]].concat());
    assert_eq!(again.iter().find(|one| one["name"] == "tiny-1b").unwrap()["version"], 1);
    let text = place.file("text.txt", "the mill stands at the river.");
    place.json(&["eval", "--model", "tiny-1b", "--text", str(&text), "--device", "cpu"]);
    fs::write(blobs.join("config.json"), "{}").unwrap();
    assert_eq!(place.run(&["registry", "verify"]).code, 1);
}

#[test]
fn commands_leave_what_they_made_and_from_what() {
    let place = Place::new();
    place.json(&["registry", "add", "base", str(model())]);
    let out = place.path("q8");
    place.json(&["quantize", "--model", "base", "--format", "q8", "--out", str(&out), "--register", "small"]);
    let small = place.json(&["registry", "show", "small"]);
    let parents: Vec<(&str, &str)> = (small["parents"].as_array().unwrap().iter())
        .map(|parent| (parent["role"].as_str().unwrap(), parent["name"].as_str().unwrap()))
        .collect();
    assert_eq!(parents, [("original", "base"), ("run", "quantize")]);

    let text = place.file("text.txt", "the mill stands at the river.");
    let eval = ["eval", "--model", "small", "--text", str(&text), "--device", "cpu"];
    place.json(&eval);
    assert!(
        place.lines(&["registry", "list", "--kind", "evaluation"]).is_empty(),
        "without a name only the run is kept"
    );
    place.json(&[&eval[..], &["--register", "figures"]].concat());
    let figures = place.json(&["registry", "lineage", "figures"]);
    let names: Vec<&str> =
        figures["ancestors"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["small", "eval", "base", "quantize"], "{figures}");

    let embedder = place.path("embedder");
    tiny::write(&embedder, "the mill stands at the river", 1);
    let docs = place.path("docs");
    place.file("docs/mill.md", "The mill stands at the river.\n");
    let idx = place.path("idx");
    let build = ["index", "build", "--model", str(&embedder), "--docs", str(&docs), "--out", str(&idx)];
    place.json(&[&build[..], &["--register", "faq", "--device", "cpu"]].concat());
    let info = place.json(&["index", "info", "faq"]);
    assert_eq!(info["documents"], 1);
    assert_eq!(place.json(&["registry", "show", "faq"])["bytes"], info["bytes"], "it has a size, though no files");
    let found = ["search", "--index", "faq", "--model", str(&embedder), "--query", "the mill", "--device", "cpu"];
    assert_eq!(place.json(&found)["hits"][0]["rank"], 1);
    // An index goes on changing, which is no damage; one that is broken is.
    fs::remove_file(place.path("docs/mill.md")).unwrap();
    place.file("docs/inn.md", "The inn stands at the bridge.\n");
    place.json(&[&build[..], &["--device", "cpu"]].concat());
    let verified = place.json(&["registry", "verify"]);
    assert_eq!((&verified["damage"], &verified["changed"]), (&serde_json::json!([]), &serde_json::json!(["faq@1"])));
    let segment = fs::read_dir(idx.join("segments")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&segment).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&segment, bytes).unwrap();
    let run = place.run(&["registry", "verify", "--json"]);
    assert_eq!((run.code, run.object()["damage"][0]["entry"].as_str()), (1, Some("faq@1")));

    for (name, words) in [("a/b", "cannot be a name"), ("base@1", "cannot be a name"), ("faq", "is of kind index")] {
        let error = place.fails(&[&eval[..], &["--register", name]].concat());
        assert!(error.contains(words), "{name}: {error}");
    }
    let mut alone = place.command(&[&eval[..], &["--register", "x"]].concat());
    let output = alone.env_remove("HANDMILL_REGISTRY").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}
