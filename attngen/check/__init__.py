"""What checks kernels rather than makes them: fp64 references, the bound, inputs, the verdict, times beside peers."""
