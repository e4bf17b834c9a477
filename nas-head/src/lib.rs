//! One NAS head: owns export groups, mounts their LUs, serves NFS, watches its partner.
//!
//! Empty until the issue that builds the heads; the crate stands so that the map of the code is whole.
