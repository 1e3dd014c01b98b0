"""Random calls of the public functions: legal ones beside the reference, and illegal ones."""
