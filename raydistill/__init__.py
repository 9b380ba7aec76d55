"""raydistill: distil a large transformer into a small one on a Ray cluster, from a cache that is paid for once."""
