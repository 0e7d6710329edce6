//! The JSON of a header: text in, unchecked tensor entries out.
//!
//! The official parser reads the header through serde's derived, flattened structures, which
//! buffer every value before looking at it. This module accepts the same texts (a tensor's entry may
//! be an object or an array of its three fields, unknown fields are skipped but must be valid, a
//! dtype may be `"F32"` or `{"F32": null}`) but writes straight into flat buffers: one string of
//! all names, one list of all dimensions, one record per tensor.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::error::JsonError;
use crate::{Dtype, HeaderError, Metadata};

/// One tensor's entry. The ranges index the buffers in [`Entries`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// First byte, from the start of the data.
    pub(crate) begin: u64,
    /// End, from the start of the data.
    pub(crate) end: u64,
    /// Start of the name in the text of all names.
    pub(crate) name_start: u32,
    pub(crate) name_len: u32,
    /// Start of the shape in the list of all dimensions.
    pub(crate) dims_start: u32,
    pub(crate) dims_len: u32,
    pub(crate) dtype: Dtype,
}

/// All entries of a header in the order of its text, nothing checked but their form.
///
/// The header is at most 100 MB of text, so every count and offset in here fits `u32`.
#[derive(Clone)]
pub(crate) struct Entries {
    pub(crate) names: String,
    pub(crate) dims: Vec<usize>,
    pub(crate) tensors: Vec<Entry>,
    pub(crate) metadata: Metadata,
}

impl Entries {
    /// Empty. A tensor's entry is some 100 bytes of text, and a third of it is its name: room that
    /// real headers fill, and untouched (hence free) where they do not.
    fn with_room_for(text: &str) -> Self {
        Self {
            names: String::with_capacity(text.len() / 3),
            dims: Vec::with_capacity(text.len() / 50),
            tensors: Vec::with_capacity(text.len() / 90),
            metadata: Metadata::default(),
        }
    }

    pub(crate) fn name(&self, entry: &Entry) -> &str {
        &self.names[text_range(entry.name_start, entry.name_len)]
    }

    pub(crate) fn shape(&self, entry: &Entry) -> &[usize] {
        &self.dims[text_range(entry.dims_start, entry.dims_len)]
    }
}

fn text_range(start: u32, len: u32) -> Range<usize> {
    start as usize..start as usize + len as usize
}

/// Reads `text`, the whole header, which starts at `offset` of the file.
pub(crate) fn parse(text: &str, offset: u64) -> Result<Entries, HeaderError> {
    let mut state = State {
        entries: Entries::with_room_for(text),
        name: 0..0,
        in_tensor: false,
        failure: None,
    };
    let mut json = serde_json::Deserializer::from_str(text);
    let outcome = json.deserialize_map(TopLevel(&mut state)).and_then(|()| json.end());
    match outcome {
        Ok(()) => Ok(state.entries),
        Err(error) => Err(state.failure.take().unwrap_or_else(|| {
            let source = JsonError::new(error);
            HeaderError::Json {
                tensor: state.in_tensor.then(|| state.name().to_owned()),
                offset: offset + source.offset_in(text),
                source,
            }
        })),
    }
}

struct State {
    entries: Entries,
    /// The tensor being read, in `entries.names`.
    name: Range<usize>,
    in_tensor: bool,
    /// Set where an error has more to say than serde's message.
    failure: Option<HeaderError>,
}

impl State {
    fn name(&self) -> &str {
        &self.entries.names[self.name.clone()]
    }

    /// Keeps `failure` and returns the serde error that carries it outwards.
    fn fail<E: de::Error>(&mut self, failure: HeaderError) -> E {
        self.failure = Some(failure);
        E::custom("rejected")
    }
}

/// The object of all tensors and `__metadata__`.
struct TopLevel<'s>(&'s mut State);

impl<'de> Visitor<'de> for TopLevel<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let state = self.0;
        let mut has_metadata = false;
        while let Some(key) = map.next_key_seed(TopLevelKey(state))? {
            match key {
                Key::Metadata if has_metadata => {
                    return Err(state.fail(HeaderError::RepeatedMetadata));
                }
                Key::Metadata => {
                    has_metadata = true;
                    state.entries.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                }
                Key::Tensor => {
                    state.in_tensor = true;
                    map.next_value_seed(TensorEntry(state))?;
                    state.in_tensor = false;
                }
            }
        }
        Ok(())
    }
}

enum Key {
    Metadata,
    /// The name is at `State::name`.
    Tensor,
}

struct TopLevelKey<'s>(&'s mut State);

impl<'de> DeserializeSeed<'de> for TopLevelKey<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for TopLevelKey<'_> {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Key, E> {
        if name == METADATA {
            return Ok(Key::Metadata);
        }
        let names = &mut self.0.entries.names;
        let start = names.len();
        names.push_str(name);
        self.0.name = start..names.len();
        Ok(Key::Tensor)
    }
}

/// The value of a tensor: `{"dtype", "shape", "data_offsets"}` or an array of the three.
struct TensorEntry<'s>(&'s mut State);

impl<'de> DeserializeSeed<'de> for TensorEntry<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// The key of the file's own metadata among the tensors' names.
const METADATA: &str = "__metadata__";

const FIELDS: [&str; 3] = ["dtype", "shape", "data_offsets"];

impl<'de> Visitor<'de> for TensorEntry<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let state = self.0;
        let (mut dtype, mut dims, mut offsets) = (None, None, None);
        while let Some(field) = map.next_key_seed(FieldName)? {
            let seen = match field {
                Field::Dtype => dtype.is_some(),
                Field::Shape => dims.is_some(),
                Field::DataOffsets => offsets.is_some(),
                Field::Unknown => false,
            };
            if seen {
                let tensor = state.name().to_owned();
                let field = FIELDS[field as usize];
                return Err(state.fail(HeaderError::RepeatedField { tensor, field }));
            }
            match field {
                Field::Dtype => dtype = Some(map.next_value_seed(DtypeName(state))?),
                Field::Shape => dims = Some(map.next_value_seed(Shape(state))?),
                Field::DataOffsets => offsets = Some(map.next_value::<(u64, u64)>()?),
                Field::Unknown => map.next_value_seed(Skipped)?,
            }
        }
        let (Some(dtype), Some(dims), Some(offsets)) = (dtype, dims, offsets) else {
            let tensor = state.name().to_owned();
            let present = [dtype.is_some(), dims.is_some(), offsets.is_some()];
            let field = if !present[0] { FIELDS[0] } else { FIELDS[1 + usize::from(present[1])] };
            return Err(state.fail(HeaderError::MissingField { tensor, field }));
        };
        push(state, dtype, dims, offsets);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let state = self.0;
        let short = |n| de::Error::invalid_length(n, &"three fields");
        let dtype = seq.next_element_seed(DtypeName(state))?.ok_or_else(|| short(0))?;
        let dims = seq.next_element_seed(Shape(state))?.ok_or_else(|| short(1))?;
        let offsets = seq.next_element::<(u64, u64)>()?.ok_or_else(|| short(2))?;
        push(state, dtype, dims, offsets);
        Ok(())
    }
}

/// Completes the tensor that `state` is at.
fn push(state: &mut State, dtype: Dtype, dims_start: usize, (begin, end): (u64, u64)) {
    state.entries.tensors.push(Entry {
        begin,
        end,
        name_start: state.name.start as u32,
        name_len: state.name.len() as u32,
        dims_start: dims_start as u32,
        dims_len: (state.entries.dims.len() - dims_start) as u32,
        dtype,
    });
}

#[derive(Clone, Copy)]
enum Field {
    Dtype,
    Shape,
    DataOffsets,
    Unknown,
}

struct FieldName;

impl<'de> DeserializeSeed<'de> for FieldName {
    type Value = Field;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Field, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for FieldName {
    type Value = Field;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field's name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Field, E> {
        Ok(match name {
            "dtype" => Field::Dtype,
            "shape" => Field::Shape,
            "data_offsets" => Field::DataOffsets,
            _ => Field::Unknown,
        })
    }
}

/// `"F32"`, or `{"F32": null}` as serde writes a variant without content.
struct DtypeName<'s>(&'s mut State);

impl<'de> DeserializeSeed<'de> for DtypeName<'_> {
    type Value = Dtype;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Dtype, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for DtypeName<'_> {
    type Value = Dtype;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a dtype")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Dtype, E> {
        Dtype::from_name(name).ok_or_else(|| {
            let tensor = self.0.name().to_owned();
            self.0.fail(HeaderError::UnknownDtype { tensor, dtype: name.to_owned() })
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Dtype, A::Error> {
        let Some(name) = map.next_key::<Cow<'de, str>>()? else {
            return Err(de::Error::invalid_length(0, &self));
        };
        let dtype = self.visit_str(&name)?;
        map.next_value::<()>()?;
        match map.next_key::<Cow<'de, str>>()? {
            None => Ok(dtype),
            Some(_) => Err(de::Error::invalid_length(2, &"one dtype")),
        }
    }
}

/// An array of dimensions; its value is where in `Entries::dims` they start.
struct Shape<'s>(&'s mut State);

impl<'de> DeserializeSeed<'de> for Shape<'_> {
    type Value = usize;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Shape<'_> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<usize, A::Error> {
        let dims = &mut self.0.entries.dims;
        let start = dims.len();
        while let Some(dim) = seq.next_element()? {
            dims.push(dim);
        }
        Ok(start)
    }
}

/// A value that is read in full and dropped.
///
/// `serde::de::IgnoredAny` will not do: serde_json skips such values without looking at the
/// escapes of strings, the range of numbers and the depth of nesting, which the official parser
/// checks in every value.
struct Skipped;

impl<'de> DeserializeSeed<'de> for Skipped {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Skipped {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(Skipped)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(Skipped)?.is_some() {
            map.next_value_seed(Skipped)?;
        }
        Ok(())
    }
}
