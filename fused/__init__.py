"""Block attention and its merge: fused kernels, each beside a readable torch twin that is its oracle."""
