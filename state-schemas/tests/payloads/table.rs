//! Prints what lies at each byte of a payload: a second writer of the wire form of `v1/mod.rs`, written from its text
//! and not with bincode, so that the two check each other.

use serde::ser::{self, Serialize};

/// The bytes and the table of a value.
pub fn table_of<T: Serialize>(value: &T) -> (Vec<u8>, String) {
    let mut table = Table::default();
    value.serialize(&mut table).expect("a table has no limits");
    (table.bytes, table.text)
}

#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    text: String,
    path: Vec<String>,
}

#[derive(Debug)]
struct Never(String);

impl std::fmt::Display for Never {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Never {}
impl ser::Error for Never {
    fn custom<T: std::fmt::Display>(message: T) -> Self {
        Never(message.to_string())
    }
}

impl Table {
    fn row(&mut self, bytes: &[u8], what: &str) {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let path = self.path.join(".");
        let line = format!("{:#06x} {:>3}  {path:<40} {what:<24} {hex}\n", self.bytes.len(), bytes.len());
        self.text.push_str(&line);
        self.bytes.extend_from_slice(bytes);
    }
    fn within<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<(), Never> {
        self.path.push(name.to_owned());
        value.serialize(&mut *self)?;
        self.path.pop();
        Ok(())
    }
}

macro_rules! numbers {
    ($($name:ident: $type:ty),*) => {
        $(fn $name(self, value: $type) -> Result<(), Never> {
            self.row(&value.to_le_bytes(), &format!("{} {value}", stringify!($type)));
            Ok(())
        })*
    };
}
macro_rules! refused {
    ($($name:ident: $type:ty),*) => {
        $(fn $name(self, _: $type) -> Result<(), Never> {
            Err(Never(format!("{} has no place in a payload", stringify!($type))))
        })*
    };
}

/// What has fields or items: each is written under its name or number.
struct Parts<'a> {
    table: &'a mut Table,
    index: usize,
}

impl Parts<'_> {
    fn item<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Never> {
        let name = self.index.to_string();
        self.index += 1;
        self.table.within(&name, value)
    }
}

impl<'a> ser::Serializer for &'a mut Table {
    type Ok = ();
    type Error = Never;
    type SerializeSeq = Parts<'a>;
    type SerializeTuple = Parts<'a>;
    type SerializeTupleStruct = Parts<'a>;
    type SerializeTupleVariant = Parts<'a>;
    type SerializeMap = ser::Impossible<(), Never>;
    type SerializeStruct = Parts<'a>;
    type SerializeStructVariant = Parts<'a>;

    numbers!(serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64,
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64);
    refused!(serialize_f32: f32, serialize_f64: f64, serialize_char: char, serialize_bytes: &[u8],
        serialize_unit_struct: &'static str);

    fn serialize_bool(self, value: bool) -> Result<(), Never> {
        self.row(&[value.into()], &format!("bool {value}"));
        Ok(())
    }
    fn serialize_str(self, value: &str) -> Result<(), Never> {
        self.row(&(value.len() as u64).to_le_bytes(), &format!("count {}", value.len()));
        self.row(value.as_bytes(), &format!("{value:?}"));
        Ok(())
    }
    fn serialize_none(self) -> Result<(), Never> {
        self.row(&[0], "none");
        Ok(())
    }
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Never> {
        self.row(&[1], "some");
        value.serialize(self)
    }
    fn serialize_unit(self) -> Result<(), Never> {
        Ok(())
    }
    fn serialize_unit_variant(self, _: &'static str, tag: u32, name: &'static str) -> Result<(), Never> {
        self.row(&tag.to_le_bytes(), name);
        Ok(())
    }
    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<(), Never> {
        value.serialize(self)
    }
    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        tag: u32,
        name: &'static str,
        value: &T,
    ) -> Result<(), Never> {
        self.row(&tag.to_le_bytes(), name);
        value.serialize(self)
    }
    fn serialize_seq(self, len: Option<usize>) -> Result<Parts<'a>, Never> {
        let len = len.ok_or_else(|| Never("a sequence needs its length".into()))? as u64;
        self.row(&len.to_le_bytes(), &format!("count {len}"));
        self.serialize_tuple(0)
    }
    fn serialize_tuple(self, _: usize) -> Result<Parts<'a>, Never> {
        Ok(Parts { table: self, index: 0 })
    }
    fn serialize_tuple_struct(self, _: &'static str, len: usize) -> Result<Parts<'a>, Never> {
        self.serialize_tuple(len)
    }
    fn serialize_tuple_variant(
        self,
        _: &'static str,
        tag: u32,
        name: &'static str,
        len: usize,
    ) -> Result<Parts<'a>, Never> {
        self.row(&tag.to_le_bytes(), name);
        self.serialize_tuple(len)
    }
    fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, Never> {
        Err(Never("a map has no place in a payload: its order is not fixed".into()))
    }
    fn serialize_struct(self, _: &'static str, len: usize) -> Result<Parts<'a>, Never> {
        self.serialize_tuple(len)
    }
    fn serialize_struct_variant(
        self,
        ty: &'static str,
        tag: u32,
        name: &'static str,
        len: usize,
    ) -> Result<Parts<'a>, Never> {
        self.serialize_tuple_variant(ty, tag, name, len)
    }
}

macro_rules! items {
    ($($trait:ident::$method:ident),*) => {
        $(impl ser::$trait for Parts<'_> {
            type Ok = ();
            type Error = Never;
            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Never> {
                self.item(value)
            }
            fn end(self) -> Result<(), Never> {
                Ok(())
            }
        })*
    };
}
macro_rules! fields {
    ($($trait:ident),*) => {
        $(impl ser::$trait for Parts<'_> {
            type Ok = ();
            type Error = Never;
            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Never> {
                self.table.within(name, value)
            }
            fn end(self) -> Result<(), Never> {
                Ok(())
            }
        })*
    };
}
items!(
    SerializeSeq::serialize_element,
    SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field,
    SerializeTupleVariant::serialize_field
);
fields!(SerializeStruct, SerializeStructVariant);
