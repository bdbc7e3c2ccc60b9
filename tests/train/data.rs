//! Rows of every form, their masks, and every fault of a file at once.

use super::write_tiny;
use handmill::device::cpu::Cpu;
use handmill::model::generate::LanguageModel;
use handmill::model::weights::LoadOptions;
use handmill::train::data::{self, DataOptions, Encoder, OverLong, Row};
use handmill::train::prepared::{Order, TokenSet};
use std::path::Path;
use std::sync::Arc;

const OPTIONS: DataOptions = DataOptions { max_len: 64, over_long: OverLong::Truncate };

fn open(dir: &Path) -> LanguageModel {
    write_tiny(dir);
    LanguageModel::open(dir, Arc::new(Cpu::new()), &LoadOptions::default()).unwrap()
}

/// The rows of a text, or the error's words.
fn read(model: &LanguageModel, text: &str, options: &DataOptions) -> Result<Vec<Row>, String> {
    let encoder = Encoder::new(model).unwrap();
    data::read(Path::new("x.jsonl"), text.as_bytes(), &encoder, options).map(|read| read.0).map_err(|e| e.to_string())
}

/// The text of the tokens that are predicted, parts between masked ones joined by |.
fn predicted(model: &LanguageModel, row: &Row) -> String {
    let mut parts = vec![Vec::new()];
    for (&id, &label) in row.ids.iter().zip(&row.labels) {
        match label {
            -100 if !parts.last().unwrap().is_empty() => parts.push(Vec::new()),
            -100 => {}
            _ => {
                assert_eq!(id as i32, label);
                parts.last_mut().unwrap().push(id);
            }
        }
    }
    let parts = parts.iter().filter(|part| !part.is_empty()).map(|part| model.tokenizer.decode(part, false).unwrap());
    parts.collect::<Vec<_>>().join("|")
}

fn whole(model: &LanguageModel, row: &Row) -> String {
    model.tokenizer.decode(&row.ids, false).unwrap()
}

#[test]
fn every_form_predicts_what_it_should() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(dir.path());
    let text = r#"{"text": "all of it"}
{"prompt": "one and", "completion": " two", "id": 7}

{"messages": [MESSAGES]}
{"instruction": "do", "input": "this", "output": "done"}
{"instruction": "do", "input": null, "output": "done"}
{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
{"input_ids": [5, 6, 7]}
"#;
    let turns = [("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "bc")];
    let turns = turns.map(|(role, content)| format!("{{\"role\": \"{role}\", \"content\": \"{content}\"}}"));
    let rows = read(&model, &text.replace("MESSAGES", &turns.join(", ")), &OPTIONS).unwrap();
    assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 2, 4, 5, 6, 7, 8]);
    let found: Vec<String> = rows.iter().map(|row| predicted(&model, row)).collect();
    assert_eq!(found[0], "all of it");
    assert_eq!(found[1], " two<|im_end|>");
    assert_eq!(whole(&model, &rows[1]), "one and two<|im_end|>");
    // Turns end with their stop token; the line's end after it is the template's.
    assert_eq!(found[2], "a<|im_end|>|bc<|im_end|>");
    let expected =
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n\
                    <|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nbc<|im_end|>\n";
    assert_eq!(whole(&model, &rows[2]), expected);
    assert_eq!(found[3], "done<|im_end|>");
    assert!(whole(&model, &rows[3]).contains("user\ndo\n\nthis<|im_end|>"), "{}", whole(&model, &rows[3]));
    assert!(whole(&model, &rows[4]).contains("user\ndo<|im_end|>"), "{}", whole(&model, &rows[4]));
    assert_eq!(rows[5].labels, [-100, -100, 7, 8]);
    assert_eq!(rows[6].labels, [5, 6, 7]);
}

#[test]
fn a_conversation_begins_as_a_question_does() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(dir.path());
    let rows = read(
        &model,
        r#"{"messages": [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}]}"#,
        &OPTIONS,
    );
    let asked = model.chat_ids(&[handmill::model::chat::Message::new("user", "why?")]).unwrap();
    assert!(rows.unwrap()[0].ids.starts_with(&asked), "training sees the very ids that are asked later");
}

#[test]
fn every_fault_is_told_with_its_row() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(dir.path());
    let faults = [
        (r#"{"text": "unfinished"#, "is not JSON"),
        ("[1, 2]", "no JSON object"),
        (r#"{"txt": "x"}"#, "none of the keys"),
        (r#"{"text": "a", "messages": []}"#, "text and messages at once"),
        (r#"{"text": ""}"#, "text is empty"),
        (r#"{"text": 5}"#, "text is no string"),
        (r#"{"prompt": "a", "completion": ""}"#, "completion is empty"),
        (r#"{"completion": "b"}"#, "has no prompt"),
        (r#"{"messages": [{"role": "king", "content": "x"}]}"#, "role king"),
        (r#"{"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}"#, "stands first"),
        (r#"{"messages": [{"role": "user", "content": "x"}]}"#, "ends with a message of role user"),
        (r#"{"messages": [{"role": "assistant", "content": ""}]}"#, "says nothing"),
        (
            r#"{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": null}]}"#,
            "message 2: content",
        ),
        (r#"{"messages": {"role": "user"}}"#, "messages is no list"),
        (r#"{"prompt": "a", "completion": " \n"}"#, "only white space"),
        (r#"{"instruction": "a", "input": 3, "output": "b"}"#, "input is no string"),
        (r#"{"messages": []}"#, "no messages"),
        (r#"{"messages": [{"role": "user"}]}"#, "message 1 has no content"),
        (r#"{"input_ids": [1, 2], "labels": [1]}"#, "2 input_ids and 1 labels"),
        (r#"{"input_ids": [1, 100]}"#, "input_ids[1] is 100"),
        (r#"{"input_ids": [1, -1]}"#, "input_ids[1] is -1"),
        (r#"{"input_ids": [1, 2], "labels": [1, 1e3]}"#, "labels[1] is no integer"),
        (r#"{"input_ids": [1, 2], "labels": [-100, -100]}"#, "wholly masked"),
    ];
    for part in faults.chunks(12) {
        let text: String = part.iter().map(|(line, _)| format!("{line}\n")).collect();
        let said = read(&model, &format!("{{\"text\": \"fine\"}}\n{text}"), &OPTIONS).unwrap_err();
        assert!(said.contains(&format!("x.jsonl: {} of {} rows", part.len(), part.len() + 1)), "{said}");
        for (i, (line, what)) in part.iter().enumerate() {
            let told = said.lines().find(|line| line.starts_with(&format!("  #{} ", i + 2)));
            assert!(told.is_some_and(|told| told.contains(what)), "{line}: {what} is not in {told:?}");
        }
    }
    let many = "{}\n".repeat(30);
    assert!(read(&model, &many, &OPTIONS).unwrap_err().contains("and 10 more"));
    assert!(read(&model, "\n\n", &OPTIONS).unwrap_err().contains("no row"));
    let encoder = Encoder::new(&model).unwrap();
    let broken = data::read(Path::new("x.jsonl"), b"{\"text\": \"\xff\"}\n", &encoder, &OPTIONS).err().unwrap();
    assert!(broken.to_string().contains("#1 byte 10 is not UTF-8"), "{broken}");
}

#[test]
fn long_rows_are_cut_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(dir.path());
    let encoder = Encoder::new(&model).unwrap();
    let long = format!("{{\"text\": \"{}\"}}\n{{\"text\": \"ab\"}}\n", "x".repeat(100));
    let path = Path::new("x.jsonl");
    let (rows, notes) = data::read(path, long.as_bytes(), &encoder, &OPTIONS).unwrap();
    assert_eq!((rows[0].ids.len(), notes.truncated_count, &notes.truncated[..]), (64, 1, &[1u32][..]));
    let refuse = DataOptions { over_long: OverLong::Refuse, ..OPTIONS };
    assert!(read(&model, &long, &refuse).unwrap_err().contains("#1 has 100 tokens; at most 64"));
    // Nothing is left to predict once the prompt alone fills the row.
    let prompt = format!("{{\"prompt\": \"{}\", \"completion\": \"y\"}}", "x".repeat(100));
    assert!(read(&model, &prompt, &OPTIONS).unwrap_err().contains("raise --max-len"));
}

#[test]
fn duplicates_and_leaks_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(dir.path());
    let encoder = Encoder::new(&model).unwrap();
    let path = Path::new("x.jsonl");
    let pair = |p: &str, c: &str| format!("{{\"prompt\": \"{p}\", \"completion\": \"{c}\"}}\n");
    let train = pair("a", "b") + &pair("c", "d") + &pair("a", "b");
    let (train, notes) = data::read(path, train.as_bytes(), &encoder, &OPTIONS).unwrap();
    assert_eq!((notes.duplicate_count, &notes.duplicates[..]), (1, &[(3u32, 1u32)][..]));
    let held_out = pair("e", "f") + &pair("cc", "e") + &pair("c", "d") + &pair("cd", "d") + &pair("cd", "e");
    let (held_out, _) = data::read(path, held_out.as_bytes(), &encoder, &OPTIONS).unwrap();
    fn parts(rows: &[Row]) -> impl Iterator<Item = (u32, &[u32], &[i32])> {
        rows.iter().map(|row| (row.line, &row.ids[..], &row.labels[..]))
    }
    let leaks = data::leaks(parts(&train), parts(&held_out));
    assert_eq!((&leaks.rows[..], leaks.prompts.len()), (&[(3, 2)][..], 0));
    let leaks = data::leaks(parts(&held_out[3..4]), parts(&held_out));
    assert_eq!((&leaks.rows[..], &leaks.prompts[..]), (&[(4, 4)][..], &[(5, 4)][..]));
}

#[test]
fn a_prepared_set_is_found_again_and_a_damaged_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(dir.path());
    let encoder = Encoder::new(&model).unwrap();
    let (data, cache) = (dir.path().join("rows.jsonl"), dir.path().join("rows.tokens"));
    std::fs::write(&data, "{\"text\": \"abc\"}\n\n{\"text\": \"defgh\"}\n").unwrap();
    let open =
        |options: &DataOptions, hash: &str| TokenSet::open(&data, &encoder, hash, options, Some(&cache)).unwrap();
    let first = open(&OPTIONS, "h");
    assert!(!first.reused);
    let again = open(&OPTIONS, "h");
    assert!(again.reused);
    assert_eq!((first.len(), &first.sha256, first.row(1)), (again.len(), &again.sha256, again.row(1)));
    assert_eq!(again.lines(), [1, 3]);
    let s = again.statistics();
    assert_eq!((s.tokens, s.predicted, s.shortest, s.median, s.longest), (8, 6, 3, 3, 5));
    assert!(!open(&OPTIONS, "other").reused, "another model has other tokens");
    assert!(!open(&DataOptions { max_len: 4, ..OPTIONS }, "other").reused);

    open(&OPTIONS, "h");
    let whole = std::fs::read(&cache).unwrap();
    for at in (0..whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        std::fs::write(&cache, &bytes).unwrap();
        let found = open(&OPTIONS, "h");
        assert_eq!((found.reused, found.row(1)), (false, first.row(1)), "byte {at}");
    }
    std::fs::write(&cache, &whole[..whole.len() - 5]).unwrap();
    assert!(!open(&OPTIONS, "h").reused);
}

#[test]
fn rows_are_packed_whole_and_every_epoch_has_each_once() {
    let dir = tempfile::tempdir().unwrap();
    let model = open(dir.path());
    let encoder = Encoder::new(&model).unwrap();
    let data = dir.path().join("rows.jsonl");
    let text: String = (2..30).map(|n| format!("{{\"text\": \"{}\"}}\n", "a".repeat(n))).collect();
    std::fs::write(&data, text).unwrap();
    let set = TokenSet::open(&data, &encoder, "h", &OPTIONS, None).unwrap();
    let groups = set.groups(true, 32);
    let mut rows: Vec<u32> = groups.concat();
    rows.sort_unstable();
    assert_eq!(rows, (0..28).collect::<Vec<u32>>());
    let tokens = |group: &Vec<u32>| group.iter().map(|&row| set.row(row as usize).0.len()).sum::<usize>();
    assert!(groups.iter().all(|group| tokens(group) <= 32));
    assert!(groups.len() < 20, "{} groups of {} tokens", groups.len(), set.statistics().tokens);
    assert_eq!(set.groups(false, 32).len(), 28);

    let mut order = Order::new(5, Some(3));
    let epochs: Vec<Vec<usize>> = (0..4).map(|e| (0..5).map(|i| order.group(5 * e + i)).collect()).collect();
    for epoch in &epochs {
        let mut sorted = epoch.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2, 3, 4]);
    }
    assert!(epochs.windows(2).any(|pair| pair[0] != pair[1]));
    assert_eq!(Order::new(5, Some(3)).group(17), epochs[3][2], "a place is the same however it is come to");
    let mut plain = Order::new(3, None);
    assert_eq!((0..7).map(|i| plain.group(i)).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2, 0]);
}
