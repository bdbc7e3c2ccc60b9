//! `handmill sim`.

use super::*;

const KERNEL: &str = "rmsnorm_f32_warp";

#[test]
fn sim_counts_what_a_kernel_does() {
    let found = json(&["sim", KERNEL, "--dim", "M=7", "--dim", "K=33", "--json"]);
    has_keys(
        &found,
        &["thread_instructions", "mix", "global_sectors", "shared_waves", "shared_requests", "bank_conflicts", "races"],
    );
    has_keys(&found, &["uninitialised_reads", "out_of_bounds", "registers", "findings"]);
    assert_eq!(found["case"], "M=7 K=33 eps=0.00001");
    // x is read twice, gain once a row, y is written once.
    let bytes = |i: usize, key: &str| found["arguments"][i][key].as_u64().unwrap();
    assert_eq!((bytes(0, "least_bytes"), bytes(0, "read")), (7 * 33 * 4, 2 * 7 * 33 * 4));
    assert_eq!((bytes(1, "read"), bytes(2, "written"), bytes(2, "read")), (7 * 33 * 4, 7 * 33 * 4, 0));
    // The second reading of a row finds it in the first-level cache; the two blocks share gain and one sector of x.
    let moved = |i: usize| ["sector_bytes", "l2_bytes", "distinct_bytes"].map(|key| bytes(i, key));
    assert_eq!(moved(0)[1..], [30 * 32, 29 * 32]);
    assert_eq!((moved(0)[0] > 2 * moved(0)[2], moved(1)[1..].to_vec()), (true, vec![2 * 160, 160]));
    assert_eq!((found["grid"].clone(), found["out_of_bounds"].as_u64()), (serde_json::json!([2, 1, 1]), Some(0)));
    let mix = found["mix"].as_array().unwrap();
    let fma = mix.iter().find(|m| m["name"] == "fma.rn.f32").unwrap();
    assert_eq!(fma["threads"], 7 * 33);
    let threads: u64 = mix.iter().map(|m| m["threads"].as_u64().unwrap()).sum();
    assert_eq!(found["thread_instructions"], threads);
}

#[test]
fn sim_shows_tables_and_a_trace_to_a_person() {
    let run = handmill(&["sim", KERNEL, "--dim", "M=7", "--dim", "K=33", "--trace", "1,2", "--trace-steps", "30"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    for words in [
        "grid 2 x 1 x 1",
        "findings: none",
        "of DRAM, least",
        "an L1 of 128 KiB",
        "%row = 6",
        "%in = x+792, x+796 .. x+916",
        "first 30 instructions",
    ] {
        assert!(run.stdout.contains(words), "no {words:?} in {}", run.stdout);
    }
    let run = handmill(&["sim", KERNEL, "--unchecked"]);
    assert!(run.code == 0 && run.stdout.contains("M=128 K=576") && run.stdout.contains("not looked for"));
}

#[test]
fn sim_fails_with_what_it_found() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("kernels")).unwrap();
    let path = format!("kernels/{KERNEL}.ptx");
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(&path)).unwrap();
    let faulty = text.replacen("setp.ge.u32      %done, %k, %K", "setp.gt.u32      %done, %k, %K", 1);
    assert_ne!(text, faulty);
    std::fs::write(folder.path().join(&path), faulty).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_handmill"))
        .args(["sim", KERNEL, "--dim", "M=1", "--dim", "K=32", "--json"])
        .env("HANDMILL_SOURCES", folder.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["out_of_bounds"], 1, "{found}");
    let finding = &found["findings"][0];
    assert_eq!((&finding["kind"], &finding["lane"]), (&"out of bounds".into(), &0.into()), "{finding}");
    assert!(finding["message"].as_str().unwrap().contains("argument `x`, which has 128 bytes"), "{finding}");
}
