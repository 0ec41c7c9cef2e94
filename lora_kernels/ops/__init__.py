"""One file an op: argument checks, registration with torch.library, and the only autograd formulas."""
