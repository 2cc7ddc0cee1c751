"""Pure torch: modules and functions on tensors. No files, no processes, no logging."""
