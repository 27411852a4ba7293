"""Many runs: the jobs of a sweep, and a search."""
