"""Read and write files, and check arguments."""
