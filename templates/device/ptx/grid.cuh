// Wait until the kernels before this one in its stream have ended and what they wrote can be seen. A launch without the attribute
// "programmatic stream serialization" starts no earlier, and finds nothing to wait for. PTX ISA: griddepcontrol.wait.
DEV void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Let the next kernel of the stream start where multiprocessors become free, once every block of this one has said so or ended; it
// waits itself, as above, for this one's end. To be said after one's own wait: then all before the last kernel has ended.
// PTX ISA: griddepcontrol.launch_dependents.
DEV void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
