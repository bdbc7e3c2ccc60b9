//! An index whose files are not as they were written.

use std::fs;

use handmill::retrieve::index::{self, Index};
use rand::{Rng, SeedableRng};

use super::*;

fn segment(idx: &Path) -> PathBuf {
    fs::read_dir(idx.join("segments")).unwrap().next().unwrap().unwrap().path()
}

/// What an index says when it is opened, searched and checked.
fn look(idx: &Path) -> Result<(), handmill::Error> {
    let index = Index::open(idx, tiny())?;
    index.info()?;
    index.search(&*device(), tiny(), &["river water"], 3, None)?;
    index.verify()
}

#[test]
fn a_damaged_segment_is_named() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    look(&idx).unwrap();
    let path = segment(&idx);
    let whole = fs::read(&path).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    let nan = f32::NAN.to_le_bytes();
    let changes: [(&str, Vec<u8>); 6] = [
        ("cut", whole[..whole.len() - 4].to_vec()),
        ("longer", [&whole[..], &[0; 128]].concat()),
        ("empty", Vec::new()),
        ("header", [&whole[..24], &9i64.to_le_bytes(), &whole[32..]].concat()),
        ("a bit", [&whole[..100], &[whole[100] ^ 1], &whole[101..]].concat()),
        ("not a number", [&whole[..64], &nan[..], &whole[68..]].concat()),
    ];
    for (change, bytes) in changes {
        fs::write(&path, bytes).unwrap();
        let error = look(&idx).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("build"), "{change}: {error}");
    }
    fs::remove_file(&path).unwrap();
    let error = look(&idx).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("missing"), "{error}");
    let error = build_with(&idx, &docs, &Options::default()).unwrap_err().to_string();
    assert!(error.contains(name) && error.contains("missing"), "{error}");
    fs::write(&path, &whole).unwrap();
    look(&idx).unwrap();
}

#[test]
fn a_database_that_lies_is_not_believed() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    let path = idx.join("index.sqlite");
    let whole = fs::read(&path).unwrap();
    let sql = |text: &str| rusqlite::Connection::open(&path).unwrap().execute_batch(text).unwrap();
    for lie in [
        "UPDATE segments SET rows = 1e9",
        "UPDATE segments SET rows = -1",
        "UPDATE segments SET rows = rows + 32",
        "UPDATE segments SET alive = x'00'",
        "UPDATE segments SET id = -5",
        "UPDATE meta SET value = '4294967295' WHERE key = 'd'",
        "UPDATE meta SET value = '0' WHERE key = 'd'",
        "UPDATE meta SET value = '{}' WHERE key = 'chunking'",
        "DELETE FROM meta WHERE key = 'model_hash'",
        "DELETE FROM chunks",
        "DELETE FROM documents",
        "UPDATE chunks SET row = row + 1000",
        "UPDATE chunks SET segment = 77",
        "UPDATE chunks SET first_line = -3",
        "UPDATE chunks SET text = x'ff'",
        "DROP TABLE chunks",
        "PRAGMA user_version = 9",
        "PRAGMA application_id = 9",
    ] {
        sql(lie);
        let error = look(&idx).expect_err(lie).to_string();
        assert!(error.contains(str(&idx)), "{lie}: {error}");
        fs::write(&path, &whole).unwrap();
    }
    fs::write(&path, "no database at all, but long enough to be looked at as one").unwrap();
    let error = look(&idx).unwrap_err().to_string();
    assert!(error.contains("index.sqlite") && error.contains("damaged"), "{error}");
    fs::write(&path, b"").unwrap();
    let error = look(&idx).unwrap_err().to_string();
    assert!(error.contains("never begun"), "{error}");
    assert_eq!(build(&idx, &docs).added, 6, "one that was never begun is begun");
}

#[test]
fn no_change_of_a_byte_is_more_than_an_error() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    let path = idx.join("index.sqlite");
    let whole = fs::read(&path).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut refused = 0;
    for round in 0..150 {
        let mut bytes = whole.clone();
        match round % 3 {
            0 => (0..8).for_each(|_| {
                let at = rng.next_u32() as usize % bytes.len();
                bytes[at] = rng.next_u32() as u8;
            }),
            1 => bytes.truncate(rng.next_u32() as usize % bytes.len()),
            _ => {
                let at = rng.next_u32() as usize % bytes.len();
                bytes[at..].iter_mut().take(512).for_each(|byte| *byte = 0);
            }
        }
        fs::write(&path, &bytes).unwrap();
        refused += usize::from(look(&idx).is_err());
        let _ = Index::open_any(&idx).and_then(|index| index.documents());
        if round % 10 == 0 {
            let _ = index::remove(&idx, &["**".to_string()]);
            for end in ["-wal", "-shm"] {
                let _ = fs::remove_file(idx.join(format!("index.sqlite{end}")));
            }
        }
    }
    assert!(refused > 75, "{refused} of 150 were noticed");
}
