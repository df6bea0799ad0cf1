//! Bindings to libxl, libxenctrl and their kin, with a thin safe layer.
