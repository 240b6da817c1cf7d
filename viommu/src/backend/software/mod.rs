//! The software engine: walks the guest's tables for emulated and vfio-user devices.
