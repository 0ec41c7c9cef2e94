"""Models as a whole: their decoder layers fused, and what they generate."""
