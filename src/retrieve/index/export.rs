//! An index for other engines: vectors as `.npy`, what they stand for as Parquet, row for row.

use std::io;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::{LogicalType, Repetition, Type as Physical};
use parquet::data_type::{ByteArray, ByteArrayType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::Type;

use super::Index;
use crate::aside::Aside;
use crate::error::Error;
use crate::model::adapter::hex;
use crate::npy;

/// Rows of a row group.
const GROUP: usize = 8192;
/// Unit vectors, f32[passages, d].
pub const VECTORS: &str = "vectors.npy";
/// A row a vector: id, path, first_line, last_line, heading, text, document_sha256.
pub const CHUNKS: &str = "chunks.parquet";

/// Where a passage's vector is, and what is told of it.
struct Row {
    segment: i64,
    row: i64,
    path: String,
    lines: (u32, u32),
    heading: String,
    text: String,
    hash: Vec<u8>,
}

/// Bytes on their way to a file aside.
struct Sink<'a>(&'a mut Aside);

impl io::Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Index {
    /// Writes [`VECTORS`] and [`CHUNKS`] into a directory, which is made where it is missing, in the order of
    /// documents' paths; gives the count of passages. The id is the row, from 0.
    pub fn export(&self, out: &Path) -> Result<usize, Error> {
        std::fs::create_dir_all(out).map_err(|cause| Error::io(out, cause))?;
        let rows = self.rows()?;
        let mut vectors = npy::Writer::<f32>::create(&out.join(VECTORS), &[rows.len(), self.meta.d])?;
        for row in &rows {
            let part = self.segments.iter().find(|part| part.segment.number == row.segment);
            let segment = part.map(|part| &part.segment).filter(|segment| (0..segment.rows as i64).contains(&row.row));
            let Some(segment) = segment else {
                let what = format!("segment {} has no row {}", row.segment, row.row);
                return Err(self.database().wrong(what));
            };
            vectors.write(segment.row(row.row as usize))?;
        }
        let path = out.join(CHUNKS);
        let mut file = Aside::create(&path)?;
        write_chunks(&mut file, &rows).map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
        file.commit()?;
        vectors.finish()?;
        Ok(rows.len())
    }

    fn rows(&self) -> Result<Vec<Row>, Error> {
        self.database().with(|connection| {
            let mut query = connection.prepare(
                "SELECT segment, row, path, first_line, last_line, heading, text, hash
                 FROM chunks JOIN documents ON document = id ORDER BY path, ordinal",
            )?;
            let rows = query.query_map([], |row| {
                let lines = (row.get(3)?, row.get(4)?);
                let (heading, text, hash) = (row.get(5)?, row.get(6)?, row.get(7)?);
                Ok(Row { segment: row.get(0)?, row: row.get(1)?, path: row.get(2)?, lines, heading, text, hash })
            })?;
            rows.collect()
        })
    }
}

fn write_chunks(file: &mut Aside, rows: &[Row]) -> Result<(), ParquetError> {
    let column = |name: &str, physical: Physical| {
        let logical = (physical == Physical::BYTE_ARRAY).then_some(LogicalType::String);
        let column = Type::primitive_type_builder(name, physical).with_repetition(Repetition::REQUIRED);
        column.with_logical_type(logical).build().map(Arc::new)
    };
    let columns = vec![
        column("id", Physical::INT64)?,
        column("path", Physical::BYTE_ARRAY)?,
        column("first_line", Physical::INT32)?,
        column("last_line", Physical::INT32)?,
        column("heading", Physical::BYTE_ARRAY)?,
        column("text", Physical::BYTE_ARRAY)?,
        column("document_sha256", Physical::BYTE_ARRAY)?,
    ];
    let schema = Arc::new(Type::group_type_builder("chunks").with_fields(columns).build()?);
    let mut writer = SerializedFileWriter::new(Sink(file), schema, Default::default())?;
    for (group, first) in rows.chunks(GROUP).zip((0i64..).step_by(GROUP)) {
        let mut out = writer.next_row_group()?;
        numbers::<Int64Type>(&mut out, &(first..first + group.len() as i64).collect::<Vec<_>>())?;
        texts(&mut out, group.iter().map(|row| row.path.as_str()))?;
        numbers::<Int32Type>(&mut out, &group.iter().map(|row| row.lines.0 as i32).collect::<Vec<_>>())?;
        numbers::<Int32Type>(&mut out, &group.iter().map(|row| row.lines.1 as i32).collect::<Vec<_>>())?;
        texts(&mut out, group.iter().map(|row| row.heading.as_str()))?;
        texts(&mut out, group.iter().map(|row| row.text.as_str()))?;
        texts(&mut out, group.iter().map(|row| hex(&row.hash)))?;
        out.close()?;
    }
    writer.close()?;
    Ok(())
}

type Group<'a, 'b> = SerializedRowGroupWriter<'a, Sink<'b>>;

/// The next column of a row group.
fn numbers<T: parquet::data_type::DataType>(out: &mut Group<'_, '_>, values: &[T::T]) -> Result<(), ParquetError> {
    let missing = || ParquetError::General("a column more than the schema has".into());
    let mut column = out.next_column()?.ok_or_else(missing)?;
    column.typed::<T>().write_batch(values, None, None)?;
    column.close()
}

fn texts<S: AsRef<str>>(out: &mut Group<'_, '_>, values: impl Iterator<Item = S>) -> Result<(), ParquetError> {
    let values: Vec<ByteArray> = values.map(|text| ByteArray::from(text.as_ref())).collect();
    numbers::<ByteArrayType>(out, &values)
}
