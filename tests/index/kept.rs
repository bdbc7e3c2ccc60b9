//! Rows that stay on a device between searches.

use std::fs;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use handmill::device::{ptx_sim::PtxSim, Buffer, Result};
use handmill::op::{Caps, Dims, Kernel, OpSpec};
use memmap2::Mmap;

use super::*;

/// A device with memory of its own that counts the bytes that are brought to it.
struct Counted {
    device: PtxSim,
    written: AtomicUsize,
}

impl Device for Counted {
    fn id(&self) -> &str {
        self.device.id()
    }

    fn description(&self) -> String {
        self.device.description()
    }

    fn caps(&self) -> &Caps {
        self.device.caps()
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.device.alloc(bytes)
    }

    fn import(&self, map: &Arc<Mmap>, range: Range<usize>) -> Result<Buffer> {
        self.written.fetch_add(range.len(), SeqCst);
        self.device.import(map, range)
    }

    fn write(&self, target: &Buffer, offset: usize, source: &[u8]) -> Result<()> {
        self.written.fetch_add(source.len(), SeqCst);
        self.device.write(target, offset, source)
    }

    fn read(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<()> {
        self.device.read(source, offset, target)
    }

    fn copy(&self, from: &Buffer, from_offset: usize, to: &Buffer, to_offset: usize, bytes: usize) -> Result<()> {
        self.device.copy(from, from_offset, to, to_offset, bytes)
    }

    fn launch(&self, spec: &OpSpec, kernel: &'static Kernel, args: &[&Buffer], dims: &Dims) -> Result<()> {
        self.device.launch(spec, kernel, args, dims)
    }

    fn sync(&self) -> Result<()> {
        self.device.sync()
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.device.time(work)
    }
}

#[test]
fn rows_are_brought_once_and_new_ones_when_the_index_is_refreshed() {
    let (_folder, docs, idx) = place();
    build(&idx, &docs);
    let counted = Arc::new(Counted { device: PtxSim::new(), written: AtomicUsize::new(0) });
    let device: Arc<dyn Device> = counted.clone();
    let questions = ["violins and drums", "bread and cloth", "steam"];
    let search = |index: &Index| {
        let before = counted.written.load(SeqCst);
        let found = index.search(&*device, tiny(), &questions, 4, None).unwrap();
        assert_eq!(found, index.search(&*super::device(), tiny(), &questions, 4, None).unwrap());
        counted.written.load(SeqCst) - before
    };
    let open = || Index::open(&idx, tiny()).unwrap();
    let index = open();
    let rows = |index: &Index| 4 * index.meta.d * index.info().unwrap().chunks;
    let every = search(&index);
    assert_eq!((search(&index), every > rows(&index)), (every, true), "nothing stays unless it is asked for");

    let mut index = index.keep_on(&device);
    assert_eq!(search(&index), every);
    let queries = every - rows(&index);
    assert_eq!((search(&index), search(&index)), (queries, queries), "queries and floors alone");
    assert!(!index.refresh().unwrap());
    assert_eq!(search(&index), queries, "nothing was written since");
    // Another device of the same kind has none of it.
    let other = Counted { device: PtxSim::new(), written: AtomicUsize::new(0) };
    index.search(&other, tiny(), &questions, 4, None).unwrap();
    assert_eq!(other.written.load(SeqCst), every);

    let (old, lines) = (rows(&index), "# bells\n\nThe bells of the old town ring.\n");
    fs::write(docs.join("bells.md"), lines).unwrap();
    fs::remove_file(docs.join("river.md")).unwrap();
    build(&idx, &docs);
    assert_eq!(search(&index), queries, "one state, until it is refreshed");
    assert!(index.refresh().unwrap() && index.info().unwrap().segments == 2);
    // The new segment has one row; with it come its own queries, filter and floors.
    let brought = search(&index);
    assert!(brought >= 2 * queries + 4 * index.meta.d && brought < queries + old, "{brought} bytes");
    assert_eq!(search(&index), brought - 4 * index.meta.d);
    assert_eq!(best(&index, "the bells ring"), format!("{}/bells.md", str(&docs)));

    let (other, _) = (tiny_dir().join("other"), fs::remove_dir_all(&idx).unwrap());
    index::build(&idx, &[docs], &open_embedder(&other), &Options::default(), &mut |_| true).unwrap();
    assert!(index.refresh().unwrap_err().to_string().contains("another embedding model"));
}
