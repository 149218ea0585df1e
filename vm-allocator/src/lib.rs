//! Address ranges, interrupt lines and ids: given out, taken back, never overlapping.
