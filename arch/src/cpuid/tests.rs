//! CPUID leaves, by bytes.
