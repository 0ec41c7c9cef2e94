"""Models of other packages on our kernels: each package is imported by its own module only."""
