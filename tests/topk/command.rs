//! `handmill search --corpus` through the binary.

use std::path::Path;
use std::process::Command;

use handmill::npy;
use serde_json::Value;

use super::*;

/// Exit code, stdout and stderr of the tool in a folder.
fn handmill(folder: &Path, args: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
    let output = command.args(args).current_dir(folder).env_remove("RUST_LOG").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let run = (output.status.code().unwrap(), text(output.stdout), text(output.stderr));
    assert!(!run.2.contains("panicked"), "{args:?}: {}", run.2);
    run
}

#[test]
fn search_writes_ids_and_scores() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut rng = ChaCha8Rng::seed_from_u64(23);
    let (n, d, k) = (700, 12, 9);
    let (rows, queries) = (unit(&mut rng, n, d), unit(&mut rng, 5, d));
    npy::write(&at("x.npy"), &[n, d], &rows).unwrap();
    npy::write(&at("q.npy"), &[5, d], &queries).unwrap();
    let mask: Vec<u8> = (0..n).map(|row| u8::from(row % 5 != 0)).collect();
    npy::write(&at("mask.npy"), &[n], &mask).unwrap();
    let base = ["search", "--corpus", "x.npy", "--queries", "q.npy", "-k", "9", "--device", "cpu", "--json"];
    let out = ["--out-ids", "i.npy", "--out-scores", "s.npy"];
    for (flags, filtered) in [
        (&[][..], false),
        (&["--format", "i8", "--batch", "2"], false),
        (&["--filter", "mask.npy", "--repeat", "3"], true),
    ] {
        let (code, stdout, stderr) = handmill(folder.path(), &[&base[..], &out, flags].concat());
        assert_eq!(code, 0, "{stderr}");
        let report: Value = serde_json::from_str(&stdout).unwrap();
        for (key, value) in [("n", n), ("d", d), ("queries", 5), ("k", k), ("dropped", 0), ("normalised", 0)] {
            assert_eq!(report[key], value, "{key} of {report}");
        }
        assert!(report["ms_per_batch"].as_f64().unwrap() > 0.0 && report["device"] == "cpu", "{report}");
        assert!(report["bytes"].as_u64().unwrap() >= (n * d) as u64, "{report}");
        let (ids, scores) =
            (npy::Array::open::<i64>(&at("i.npy")).unwrap(), npy::Array::open::<f32>(&at("s.npy")).unwrap());
        assert_eq!((&ids.shape[..], &scores.shape[..]), (&[5, k][..], &[5, k][..]));
        let hits: Vec<Hit> =
            queries.chunks(d).flat_map(|q| reference(&rows, d, q, k, |n| !filtered || n % 5 != 0)).collect();
        assert_eq!(ids.to_vec::<i64>(), hits.iter().map(|hit| hit.row as i64).collect::<Vec<_>>(), "{flags:?}");
        assert_eq!(scores.to_vec::<f32>(), hits.iter().map(|hit| hit.score).collect::<Vec<_>>(), "{flags:?}");
    }
    // Fewer rows than places.
    npy::write(&at("two.npy"), &[2, d], &rows[..2 * d]).unwrap();
    let few = ["search", "--corpus", "two.npy", "--queries", "q.npy", "-k", "3", "--device", "cpu"];
    let (code, _, stderr) = handmill(folder.path(), &[&few[..], &out].concat());
    assert_eq!(code, 0, "{stderr}");
    let (ids, scores) =
        (npy::Array::open::<i64>(&at("i.npy")).unwrap(), npy::Array::open::<f32>(&at("s.npy")).unwrap());
    assert_eq!(ids.to_vec::<i64>()[2], -1);
    assert_eq!(scores.to_vec::<f32>()[2], f32::NEG_INFINITY);
    // Without files the hits are printed: a line each, below the names of the columns.
    let (code, stdout, _) = handmill(folder.path(), &few);
    assert_eq!((code, stdout.lines().count()), (0, 1 + 5 * 2), "{stdout}");
}

#[test]
fn wrong_use_is_told_in_words() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    npy::write(&at("x.npy"), &[3, 2], &[1.0f32, 0.0, 0.0, 0.0, 0.0, 1.0]).unwrap();
    npy::write(&at("q.npy"), &[1, 2], &[1.0f32, 1.0]).unwrap();
    npy::write(&at("wide.npy"), &[1, 3], &[1.0f32; 3]).unwrap();
    npy::write(&at("mask.npy"), &[2], &[1u8, 1]).unwrap();
    let base = ["search", "--device", "cpu", "--corpus", "x.npy"];
    for (args, code, words) in [
        (&["--queries", "q.npy"][..], 1, "1 of 3 rows are zero or not finite: rows 1"),
        (&["--queries", "wide.npy", "--drop-bad"], 2, "queries have 3 elements"),
        (&["--queries", "x.npy", "--drop-bad"], 1, "cannot take the queries"),
        (&["--queries", "q.npy", "--drop-bad", "-k", "0"], 1, "k is 0"),
        (&["--queries", "q.npy", "--drop-bad", "--filter", "mask.npy"], 2, "a mask of shape [2] for 3 rows"),
        (&["--queries", "q.npy", "--drop-bad", "--batch", "0"], 2, "--batch"),
        (&["--queries", "missing.npy", "--drop-bad"], 1, "missing.npy"),
        (&[], 2, "--queries"),
    ] {
        let (got, _, stderr) = handmill(folder.path(), &[&base[..], args].concat());
        assert!(got == code && stderr.contains(words), "{args:?}: {got} {stderr}");
    }
    let (code, _, stderr) = handmill(folder.path(), &["search"]);
    assert!(code == 2 && stderr.contains("--corpus"), "{stderr}");
    let (code, stdout, stderr) =
        handmill(folder.path(), &[&base[..], &["--queries", "q.npy", "--drop-bad", "--json"]].concat());
    let report: Value = serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{stderr}"));
    assert!(code == 0 && report["dropped"] == 1, "{report}");
}
