//! Files of vectors, good and hostile.

use std::path::Path;

use handmill::npy;
use handmill::retrieve::topk::Exact;
use handmill::retrieve::vectors::{Bad, Vectors};

use super::*;

fn open(path: &Path) -> Result<Vectors, String> {
    Vectors::open(path, None, Bad::Refuse).map_err(|error| error.to_string())
}

/// A safetensors file of these tensors: name, type, shape, bytes.
fn safetensors(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(name.to_string(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        data.extend(bytes);
    }
    let text = serde_json::Value::Object(header).to_string();
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &data].concat()
}

fn fvecs(rows: &[Vec<f32>]) -> Vec<u8> {
    rows.iter().flat_map(|row| [&(row.len() as u32).to_le_bytes()[..], bytemuck::cast_slice(row)].concat()).collect()
}

#[test]
fn every_kind_of_file_has_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut rng = ChaCha8Rng::seed_from_u64(19);
    let (n, d) = (40, 7);
    let rows = unit(&mut rng, n, d);
    let halves: Vec<f16> = rows.iter().map(|v| f16::from_f32(*v)).collect();
    let brains: Vec<half::bf16> = rows.iter().map(|v| half::bf16::from_f32(*v)).collect();

    npy::write(&at("x.npy"), &[n, d], &rows).unwrap();
    std::fs::write(at("x.fvecs"), fvecs(&rows.chunks(d).map(<[f32]>::to_vec).collect::<Vec<_>>())).unwrap();
    let bytes = bytemuck::cast_slice(&rows).to_vec();
    std::fs::write(at("x.safetensors"), safetensors(&[("x", "F32", &[n, d], bytes.clone())])).unwrap();
    for name in ["x.npy", "x.fvecs", "x.safetensors"] {
        let vectors = open(&at(name)).unwrap();
        assert_eq!((vectors.n, vectors.d, vectors.normalised), (n, d, 0), "{name}");
        assert_eq!(vectors.to_f32(), rows, "{name}: unit rows stay as they are");
        assert!(vectors.norms.is_none() && vectors.filter(None).is_none(), "{name}");
    }

    npy::write(&at("half.npy"), &[n, d], &halves).unwrap();
    let vectors = open(&at("half.npy")).unwrap();
    assert!(matches!(vectors.exact(), Exact::F16(found) if found == halves), "half precision stays");
    assert!(matches!(vectors.into_f32().exact(), Exact::F32(_)));

    let other = ("y", "F16", &[1, d][..], bytemuck::cast_slice(&halves[..d]).to_vec());
    let brain = ("z", "BF16", &[n, d][..], bytemuck::cast_slice(&brains).to_vec());
    std::fs::write(at("three.safetensors"), safetensors(&[("x", "F32", &[n, d], bytes), other, brain])).unwrap();
    assert!(open(&at("three.safetensors")).err().unwrap().contains("several matrices"), "a name is needed");
    let named = |name| Vectors::open(&at("three.safetensors"), Some(name), Bad::Refuse);
    assert_eq!(named("x").unwrap().to_f32(), rows);
    assert_eq!(named("y").unwrap().n, 1);
    // 2⁻⁸ an element: not of unit norm as they lie.
    assert!(named("z").unwrap().normalised > 0);
    assert!(named("w").err().unwrap().to_string().contains("no tensor w"));
    assert!(Vectors::open(&at("x.npy"), Some("x"), Bad::Refuse).is_err());
}

#[test]
fn rows_are_brought_to_unit_norm() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    // The second is so small that its squares vanish in f32; the third so large that they overflow.
    let rows = [3.0f32, 4.0, 3e-30, -4e-30, 6e37, 8e37, 0.6, 0.8];
    npy::write(&path, &[4, 2], &rows).unwrap();
    let vectors = open(&path).unwrap();
    assert_eq!(vectors.to_f32(), [0.6, 0.8, 0.6, -0.8, 0.6, 0.8, 0.6, 0.8]);
    assert_eq!((vectors.normalised, vectors.bad.len()), (3, 0));
    assert_eq!(vectors.norms.unwrap(), [5.0, 5e-30, 1e38, 1.0]);
}

#[test]
fn rows_without_a_direction_are_refused_or_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.npy");
    let mut rows: Vec<f32> = (0..40).flat_map(|n| [1.0f32, n as f32]).collect();
    for (row, value) in [(3, f32::NAN), (8, f32::INFINITY), (33, f32::NEG_INFINITY)] {
        rows[2 * row] = value;
    }
    rows[..2].fill(0.0);
    (34..37).for_each(|row| rows[2 * row + 1] = f32::NAN);
    npy::write(&path, &[40, 2], &rows).unwrap();
    let refused = open(&path).err().unwrap();
    assert!(refused.contains("7 of 40 rows") && refused.contains("rows 0, 3, 8, 33, 34, ...;"), "{refused}");

    let vectors = Vectors::open(&path, None, Bad::Drop).unwrap();
    assert_eq!(vectors.bad, [0, 3, 8, 33, 34, 35, 36]);
    let filter = vectors.filter(None).unwrap();
    for (name, device) in devices() {
        let found = search(&*device, &vectors.corpus(), &[0.0, 1.0], 40, Some(&filter)).unwrap();
        assert_eq!(found[0].len(), 33, "{name}");
        assert!(found[0].iter().all(|hit| !vectors.bad.contains(&hit.row)), "{name}");
        assert_eq!((found[0][0].row, found[0][32].row), (39, 1), "{name}");
    }
    // What a caller allows is narrowed, not replaced.
    assert_eq!(vectors.filter(Some(&[0b1_0101, 0])), Some(vec![0b1_0100, 0]));
}

#[test]
fn hostile_files_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, bytes: &[u8], what: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = open(&path).err().unwrap_or_else(|| panic!("{name} ({what}) is taken"));
        assert!(error.contains(name) && error.contains(what), "{name}: {error}");
    };
    refused("x.csv", b"1,2", "none of .npy");
    refused("empty.npy", b"", "empty");
    refused("text.npy", b"no array", ".npy");
    refused("empty.fvecs", b"", "empty");
    refused("short.fvecs", b"ab", "too few");
    refused("wide.fvecs", &u32::MAX.to_le_bytes(), "claims 4294967295 elements");
    refused("none.fvecs", &[0; 8], "claims 0 elements");
    refused("cut.fvecs", &fvecs(&[vec![1.0; 3]])[..14], "too many for rows of 3");
    refused("mixed.fvecs", &fvecs(&[vec![1.0; 3], vec![1.0; 7], vec![1.0; 3], vec![1.0; 3]])[..48], "row 1");
    refused("bad.safetensors", &u64::MAX.to_le_bytes(), "header");
    refused("vector.safetensors", &safetensors(&[("x", "F32", &[2], vec![0; 8])]), "no matrix");
    refused("int.safetensors", &safetensors(&[("x", "I32", &[1, 2], vec![0; 8])]), "type I32");
    let npy_of = |shape: &[usize], values: &[f32]| {
        let path = folder.path().join("made.npy");
        npy::write(&path, shape, values).unwrap();
        std::fs::read(&path).unwrap()
    };
    refused("vector.npy", &npy_of(&[4], &[1.0; 4]), "shape [4]");
    refused("deep.npy", &npy_of(&[1, 2, 2], &[1.0; 4]), "shape [1, 2, 2]");
    refused("narrow.npy", &npy_of(&[4, 0], &[]), "rows of 0 elements");
    let path = folder.path().join("ids.npy");
    npy::write(&path, &[1, 2], &[1i64, 2]).unwrap();
    assert!(open(&path).err().unwrap().contains("<i8"));
    // Data that begin at an odd byte are copied.
    let mut bytes = npy_of(&[1, 2], &[0.6, 0.8]);
    let header = u16::from_le_bytes([bytes[8], bytes[9]]);
    bytes[8..10].copy_from_slice(&(header + 1).to_le_bytes());
    bytes.insert(10 + header as usize - 1, b' ');
    let path = folder.path().join("odd.npy");
    std::fs::write(&path, &bytes).unwrap();
    assert_eq!(open(&path).unwrap().to_f32(), [0.6, 0.8]);
}
