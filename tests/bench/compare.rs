//! `bench compare`: whatever the files hold, its exit code is 0 only where rows were compared and none is slower, and a
//! sentence says why.

use super::{bench, file, line};

const SAME: [f64; 3] = [98.0, 100.0, 102.0];

#[test]
fn runs_that_share_nothing_are_told_apart_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| file(folder.path(), name, text);
    let text = line("x", SAME, "A");
    let good = write("good", &text);
    let untimed = text.replace(
        "\"median_us\":100,\"p20_us\":98,\"p80_us\":102",
        "\"median_us\":null,\"p20_us\":null,\"p80_us\":null",
    );
    assert_ne!(untimed, text);
    let cases = [
        ("empty", String::new(), "the second no row of a kernel"),
        ("blank", "\n \n\n".to_string(), "the second no row of a kernel"),
        ("limits", text.replace("{\"op\"", "{\"kind\":\"roofline\",\"op\""), "the second no row of a kernel"),
        ("card", text.replace("\"cpu\"", "\"cuda:0\""), "the first has 1 of cpu, the second 1 of cuda:0"),
        ("shape", text.replace("K=8", "K=9"), "x (M=1 K=8) is only in the first, x (M=1 K=9) only in the second"),
        ("hot", text.replace("\"cold\":true", "\"cold\":false"), "x (M=1 K=8, hot) only in the second"),
        ("adapter", line("x", SAME, "B"), "cpu was A, then B: 1 rows are not compared"),
        ("threads", text.replace("\"n\":50", "\"n\":50,\"threads\":4"), "then A with 4 threads"),
        ("untimed", untimed, "no row has times"),
    ];
    for (name, text, word) in cases {
        let other = write(name, &text);
        for args in [&["compare", &good, &other][..], &["compare", "--json", &good, &other]] {
            let run = bench(args);
            assert_eq!(run.code, 1, "{name}: {}", run.stderr);
            assert!(run.stderr.contains(word), "{name}: no {word:?} in {}", run.stderr);
            assert!(run.stderr.contains("the two runs have no row to compare"), "{name}: {}", run.stderr);
        }
        // The other way round a sentence is there too.
        let run = bench(&["compare", &other, &good]);
        assert!(run.code == 1 && run.stderr.contains("no row to compare"), "{name}: {}", run.stderr);
    }
}

#[test]
fn files_that_are_no_runs_are_refused_by_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let text = line("x", SAME, "A");
    let good = file(folder.path(), "good", &text);
    let missing = folder.path().join("missing").to_str().unwrap().to_string();
    let binary = folder.path().join("binary").to_str().unwrap().to_string();
    std::fs::write(&binary, [0xff, 0xfe, 0, b'\n', 0x80]).unwrap();
    let page = file(folder.path(), "page", "<!doctype html>\n<p>no rows\n");
    let no_rows = file(folder.path(), "record", "{\"what\": \"doctor\"}\n");
    let of_folder = folder.path().to_str().unwrap().to_string();
    for other in [&missing, &binary, &page, &no_rows, &of_folder] {
        for args in [["compare", good.as_str(), other], ["compare", other, good.as_str()]] {
            let run = bench(&args);
            assert!(run.code == 1 && run.stdout.is_empty(), "{other}: {}", run.stdout);
            assert!(run.stderr.contains(other.as_str()) && run.stderr.lines().count() < 4, "{other}: {}", run.stderr);
        }
    }
    assert_eq!(bench(&["compare", &good]).code, 2, "one file is wrong use");
    // A folder that --out wrote stands for the rows in it.
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    file(&out, "bench.jsonl", &text);
    assert_eq!(bench(&["compare", &good, out.to_str().unwrap()]).code, 0);
    // Two runs would write over each other's rows.
    let held = handmill::bench::row::Log::create(&out).unwrap();
    let run = bench(&["--op", "rmsnorm", "--quick", "--device", "cpu", "--out", out.to_str().unwrap()]);
    assert!(run.code == 1 && run.stderr.contains("written by another run"), "{}", run.stderr);
    drop(held);
    let before = std::fs::read_to_string(out.join("bench.jsonl.before")).unwrap();
    assert_eq!(before, text, "what was there is kept, and once");
    // A page of nothing is none, and a file is no folder.
    let empty = file(folder.path(), "empty", "");
    for (rows, out, word) in [(&empty, "page", "hold no row"), (&good, "good", "is a file; name a directory")] {
        let out = folder.path().join(out);
        let run = bench(&["report", rows, "--out", out.to_str().unwrap()]);
        assert!(run.code == 1 && run.stderr.contains(word) && !out.join("bench.html").exists(), "{}", run.stderr);
    }

    // Cut off as by a kill, the last line is left out, and said to be; what was whole is compared.
    let half = file(folder.path(), "half", &format!("{text}{}", &text[..text.len() / 2]));
    let run = bench(&["compare", &good, &half]);
    assert!(run.code == 0 && run.stdout.contains("1 rows: 0 slower"), "{}{}", run.stdout, run.stderr);
    assert!(run.stderr.contains("cut off"), "{}", run.stderr);
    // With an end of line it is no cut, but a fault.
    let broken = file(folder.path(), "broken", &format!("{text}{}\n", &text[..text.len() / 2]));
    let run = bench(&["compare", &good, &broken]);
    assert!(run.code == 1 && run.stderr.contains("line 2: "), "{}", run.stderr);
}
