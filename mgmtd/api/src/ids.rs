//! 128-bit identities that live on the disks. Random bits come from the caller (the rim).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A text that is not 32 hexadecimal digits (dashes are allowed between them).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a uuid of 32 hexadecimal digits")]
pub struct IdError {
    text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema), schemars(with = "String"))]
        pub struct $name([u8; 16]);

        impl $name {
            /// The absent identity: all zero.
            pub const NIL: Self = Self([0; 16]);

            /// Takes 16 bytes, as they stand on disk.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Returns the 16 bytes, as they stand on disk.
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0
            }

            /// Says whether this is the absent identity.
            pub fn is_nil(self) -> bool {
                self == Self::NIL
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                for (i, byte) in self.0.iter().enumerate() {
                    if matches!(i, 4 | 6 | 8 | 10) {
                        f.write_str("-")?;
                    }
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let bad = || IdError { text: text.chars().take(64).collect() };
                let mut bytes = [0; 16];
                let mut digits = 0;
                for c in text.chars().filter(|c| *c != '-') {
                    let digit = c.to_digit(16).ok_or_else(bad)?;
                    let byte = bytes.get_mut(digits / 2).ok_or_else(bad)?;
                    *byte = *byte << 4 | u8::try_from(digit).map_err(|_| bad())?;
                    digits += 1;
                }
                if digits == 32 { Ok(Self(bytes)) } else { Err(bad()) }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                text.parse().map_err(de::Error::custom)
            }
        }
    };
}

id!(
    /// One Lunar system: a mgmtd with its ublk-target.
    SystemUuid
);
id!(
    /// One disk, partition or file that was given to Lunar.
    DiskUuid
);
id!(
    /// One RAID group.
    GroupUuid
);
id!(
    /// One logical unit.
    LuUuid
);
id!(
    /// One line of descent of a group: renewed when it goes on without a member that was in sync.
    History
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_parses_back() {
        let id = DiskUuid::from_bytes(*b"0123456789abcdef");
        assert_eq!(id.to_string(), "30313233-3435-3637-3839-616263646566");
        assert_eq!(id.to_string().parse(), Ok(id));
    }

    #[test]
    fn parse_refuses_what_is_not_32_digits() {
        for text in ["", "12", "zz", "30313233-3435-3637-3839-6162636465667", "é"] {
            assert!(text.parse::<DiskUuid>().is_err(), "{text}");
        }
    }
}
