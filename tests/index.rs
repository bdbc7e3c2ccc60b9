//! Indexes of documents, through the library and the tool: what is embedded again and what is not, what a reader sees
//! meanwhile, and what a process that was killed leaves. Most tests use a tiny embedding model made here; those of
//! real models and documents need `tools/fetch_models` and `tools/fetch_data`, or HANDMILL_MODELS and HANDMILL_DATA.

#[path = "index/cut.rs"]
mod cut;
#[path = "index/damage.rs"]
mod damage;
#[path = "index/files.rs"]
mod files;
#[path = "index/kept.rs"]
mod kept;
#[path = "index/killed.rs"]
mod killed;
#[path = "index/life.rs"]
mod life;
#[path = "index/pdf.rs"]
mod pdf;
#[path = "support/place.rs"]
mod place;
#[path = "index/real.rs"]
mod real;
#[path = "index/tiny.rs"]
mod tiny;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};

use handmill::device::cpu::Cpu;
use handmill::device::Device;
use handmill::model::generate::Embedder;
use handmill::model::weights::LoadOptions;
use handmill::npy::Array;
use handmill::retrieve::index::{self, Index, Options, Report};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

fn device() -> Arc<dyn Device> {
    Arc::new(Cpu::new())
}

/// The tiny model, in a folder that lives as long as the process.
fn tiny_dir() -> &'static Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    let make = || {
        let folder = tempfile::tempdir().unwrap();
        let words: Vec<String> = TOPICS.iter().flat_map(|topic| topic.split(' ')).map(str::to_string).collect();
        tiny::write(&folder.path().join("tiny"), &words.join(" "), 1);
        tiny::write(&folder.path().join("other"), &words.join(" "), 2);
        folder
    };
    DIR.get_or_init(make).path()
}

fn tiny() -> &'static Embedder {
    static MODEL: OnceLock<Embedder> = OnceLock::new();
    MODEL.get_or_init(|| open_embedder(&tiny_dir().join("tiny")))
}

fn open_embedder(path: &Path) -> Embedder {
    Embedder::open(path, device(), &LoadOptions::default()).unwrap()
}

/// A word list for each of the documents of [`corpus`].
const TOPICS: [&str; 6] = [
    "river water flows through the valley to the sea with fish and boats",
    "mountain snow covers the high peak where climbers rest in a hut",
    "market traders sell bread fruit and cloth in the old town square",
    "engine pistons turn the wheel while steam drives the iron machine",
    "orchestra violins and drums play music for dancers in the hall",
    "garden roses grow beside a wall with bees and summer light",
];

/// Writes a document for each topic, of three paragraphs, below `dir`.
fn corpus(dir: &Path) {
    std::fs::create_dir_all(dir.join("more")).unwrap();
    for (i, topic) in TOPICS.iter().enumerate() {
        let name = topic.split(' ').next().unwrap();
        let folder = if i % 2 == 0 { dir.to_path_buf() } else { dir.join("more") };
        let text = format!("# {name}\n\nOn {name}.\n\n{topic}.\n\nThe {name} again: {topic}.\n");
        std::fs::write(folder.join(format!("{name}.md")), text).unwrap();
    }
}

/// A folder with `docs`, the corpus, and room for an index at `idx`.
fn place() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let (docs, idx) = (folder.path().join("docs"), folder.path().join("idx"));
    corpus(&docs);
    (folder, docs, idx)
}

fn build(idx: &Path, docs: &Path) -> Report {
    build_with(idx, docs, &Options::default()).unwrap()
}

fn build_with(idx: &Path, docs: &Path, options: &Options) -> Result<Report, handmill::Error> {
    index::build(idx, &[docs.to_path_buf()], tiny(), options, &mut |_| true)
}

/// (added, changed, unchanged, removed, passages embedded).
fn counts(report: &Report) -> (usize, usize, usize, usize, usize) {
    (report.added, report.changed, report.unchanged, report.removed, report.chunks)
}

/// The path of the best passage for a question.
fn best(index: &Index, question: &str) -> String {
    index.search(&*device(), tiny(), &[question], 1, None).unwrap()[0][0].path.clone()
}

/// A passage as it was exported: path, first and last line, heading, text, SHA-256 of its document.
type Row = (String, i32, i32, String, String, String);

/// An index's export, read back by another reader than wrote it where there is one.
fn export(idx: &Path) -> Vec<(Row, Vec<f32>)> {
    let out = tempfile::tempdir().unwrap();
    let index = Index::open_any(idx).unwrap();
    let count = index.export(out.path()).unwrap();
    let array = Array::open::<f32>(&out.path().join("vectors.npy")).unwrap();
    assert_eq!(array.shape, [count, index.meta.d]);
    let vectors = array.to_vec::<f32>();
    let file = std::fs::File::open(out.path().join("chunks.parquet")).unwrap();
    let reader = SerializedFileReader::new(file).unwrap();
    let rows: Vec<Row> = reader
        .get_row_iter(None)
        .unwrap()
        .enumerate()
        .map(|(at, row)| {
            use parquet::record::RowAccessor;
            let row = row.unwrap();
            assert_eq!(row.get_long(0).unwrap(), at as i64);
            let text = |column: usize| row.get_string(column).unwrap().clone();
            (text(1), row.get_int(2).unwrap(), row.get_int(3).unwrap(), text(4), text(5), text(6))
        })
        .collect();
    assert_eq!(rows.len(), count);
    rows.into_iter().zip(vectors.chunks(index.meta.d).map(<[f32]>::to_vec)).collect()
}

/// Both hold the same passages, and vectors that differ by no more than rounding in another batch does.
fn same(a: &Path, b: &Path) {
    let (a, b) = (export(a), export(b));
    let rows = |list: &[(Row, Vec<f32>)]| list.iter().map(|(row, _)| row.clone()).collect::<Vec<_>>();
    assert_eq!(rows(&a), rows(&b));
    for ((row, a), (_, b)) in a.iter().zip(&b) {
        let off = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // f32's unit of 6e-8 through a few dozen sums of numbers of size 1.
        assert!(off < 1e-5, "{row:?}: off by {off}");
    }
}

/// Every file below a folder, by its path in it.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => drop(files.insert(path.strip_prefix(dir).unwrap().into(), std::fs::read(&path).unwrap())),
            }
        }
    }
    files
}

/// What a run of the tool left.
struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_handmill"));
    command.args(args).env_remove("RUST_LOG");
    command
}

fn handmill(args: &[&str]) -> Run {
    let output = command(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("the tool prints UTF-8");
    let code = output.status.code().expect("the tool was ended by a signal");
    let run = Run { code, stdout: text(output.stdout), stderr: text(output.stderr) };
    assert!(!run.stderr.contains("panicked"), "{args:?}: {}", run.stderr);
    run
}

fn start(args: &[&str]) -> Child {
    command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn json(args: &[&str]) -> Value {
    let run = handmill(args);
    assert_eq!(run.code, 0, "{args:?}: {}", run.stderr);
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{args:?}: {error}: {}", run.stdout))
}

fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}
